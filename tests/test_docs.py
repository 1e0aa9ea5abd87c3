"""What the documentation says holds: its commands and jobs are accepted as they are, its links and names exist."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from benchmarks.experts.command import row_text
from benchmarks.fifth.figures import told as after_a_fifth
from benchmarks.learn import figures
from t2ray.cli.reference import pages
from t2ray.config import tables
from t2ray.config import train as config
from t2ray.evals.dispatched import told
from t2ray.evals.measured import table
from t2ray.evals.tabled import differences, spent, table_text, times

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md")
PAGES = sorted(path for place in PLACES for path in ROOT.glob(place) if path.name != "CHANGELOG.md")
MARKDOWN = MarkdownIt("commonmark").enable("table")
SHELL = {"", "bash", "sh", "shell", "console"}


def blocks(text: str, languages: set[str]) -> Iterator[str]:
    fences = (token for token in MARKDOWN.parse(text) if token.type == "fence")
    return (fence.content for fence in fences if fence.info.partition(" ")[0] in languages)


def commands(text: str) -> list[list[str]]:
    """The `t2ray`, `make` and `python` commands in a page's code blocks, as words, up to a pipe or a redirection."""
    found = []
    for block in blocks(text, SHELL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r"&&|;", line.strip().removeprefix("$ ")):
                words = (
                    shlex.split(part, comments=True) if re.match(r"\s*(\S+=\S+ +)*\S*(t2ray|make|python)", part) else []
                )
                while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                    words.pop(0)
                end = next(
                    (i for i, word in enumerate(words) if word[0:1] in {"|", ">", "<", "&"} or word == "2>"), None
                )
                if words[:1] and Path(words[0]).name in {"t2ray", "make", "python", "python3"}:
                    found.append([Path(words[0]).name, *words[1:end]])
    return found


def complaint(command: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    program, *arguments = command
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        wrong = [word for word in arguments if "=" not in word and word not in targets]
        return f"the Makefile has no target {wrong}" if wrong else None
    if program.startswith("python"):
        if arguments[:2] == ["-m", "benchmarks"]:
            return refusal(benchmarks_parser(arguments[2:]))
        script = arguments[0] if arguments else "-"
        return f"there is no {script}" if script.startswith("jobs/") and not (ROOT / script).is_file() else None

    from t2ray.cli.main import build_parser

    return refusal(lambda: build_parser().parse_args(arguments))


def benchmarks_parser(words: list[str]) -> Callable[[], object]:
    from benchmarks.__main__ import _KINDS

    kind, rest = (words[0], words[1:]) if words and words[0] in _KINDS else ("core", words)
    return lambda: _KINDS[kind]().parse_args(rest)


def refusal(parse: Callable[[], object]) -> str | None:
    """What a parser says against a command's words, or None."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse()
    except SystemExit as end:
        return said.getvalue().strip() if end.code else None
    return None


def test_commands_are_found_in_all_the_forms_that_pages_use() -> None:
    page = """
```bash
$ make demo               # six minutes
t2ray train dog.yaml \\
    rl.steps=30 run=dog   # an override
cd x && OMP_NUM_THREADS=1 .venv/bin/t2ray eval --json out.json | tee log > all.txt
echo t2ray nothing; ls
```
```python
t2ray = 1
```
"""
    assert commands(page) == [
        ["make", "demo"],
        ["t2ray", "train", "dog.yaml", "rl.steps=30", "run=dog"],
        ["t2ray", "eval", "--json", "out.json"],
    ]


def test_a_command_that_does_not_exist_is_complained_about() -> None:
    assert complaint(["t2ray", "no-such-command"])
    assert complaint(["t2ray", "train", "a.yaml", "--no-such-option"])
    assert complaint(["make", "nosuchtarget"])
    assert complaint(["python", "jobs/no_such_job.py"])
    assert complaint(["python", "-m", "benchmarks", "serve", "--no-such-option"])
    assert complaint(["python", "-m", "benchmarks", "rows", "--json", "rows.json"]) is None
    assert complaint(["t2ray", "train", "a.yaml", "rl.steps=3"]) is None


def test_the_readme_names_the_two_commands_and_the_main_job() -> None:
    named = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["make", "demo"] in named
    assert ["make", "test"] in named
    assert {"train", "decompose", "eval"} <= {words[1] for words in named if words[0] == "t2ray" and len(words) > 1}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_on_a_page_is_accepted(page: Path) -> None:
    wrong = []
    for command in commands(page.read_text(encoding="utf-8")):
        if said := complaint(command):
            wrong.append(f"{shlex.join(command)}\n    {said}")
    assert not wrong, f"{page.name} tells the reader to type what fails:\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_training_job_on_a_page_is_valid(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), {"yaml"}):
        values = yaml.safe_load(block)
        if isinstance(values, dict) and "domains" in values:
            assert config.resolve(values, where=page.name).domains


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/train*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_training_job_is_valid(path: Path) -> None:
    assert config.load(path, []).domains


@pytest.mark.parametrize("name", pages())
def test_a_generated_page_says_what_the_program_says(name: str) -> None:
    stands = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert stands == pages()[name], f"docs/{name} is stale: run `make docs`"


def test_the_training_job_is_shipped() -> None:
    assert (ROOT / "jobs" / "train.yaml").is_file()


def test_the_architecture_page_has_a_line_for_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(ROOT / "t2ray").as_posix() for path in ROOT.glob("t2ray/**/__init__.py")}
    missing = sorted(package for package in packages - {"."} if f"| `{package}/` |" not in page)
    assert not missing, f"docs/architecture.md has no line for {missing}"


# ------------------------------------------------------------------------------------------------------ links and names


def tokens(page: Path) -> Iterator[Token]:
    """A page's Markdown, blocks and what is inside them, in order."""
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def links(page: Path) -> list[str]:
    """The addresses of a page's links and pictures that are no other site's."""
    found = [str(token.attrGet("href") or token.attrGet("src") or "") for token in tokens(page)]
    return [address for address in found if address and not urlsplit(address).scheme]


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives a page's headings."""
    found: list[str] = []
    blocks_of_page = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    for opening, heading in zip(blocks_of_page, blocks_of_page[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children or () if part.type in {"text", "code_inline"})
            slug = re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return frozenset(found)


def target(page: Path, address: str) -> Path:
    """The file that a relative link leads to; of a folder, its README.md where it has one."""
    path = (page.parent / unquote(urlsplit(address).path)).resolve() if urlsplit(address).path else page
    return path / "README.md" if (path / "README.md").is_file() else path


def broken(page: Path, address: str) -> str | None:
    """What is wrong with a relative link, or None."""
    path, anchor = target(page, address), urlsplit(address).fragment
    if not path.exists() or not path.is_relative_to(ROOT):
        return f"{address}: there is no such file"
    if anchor and anchor not in (anchors(path) if path.suffix == ".md" else ()):
        return f"{address}: there is no such heading"
    return None


def test_a_link_that_leads_nowhere_is_complained_about() -> None:
    page = ROOT / "docs" / "index.md"
    assert broken(page, "nowhere.md")
    assert broken(page, "../../outside.md")
    assert broken(page, "architecture.md#no-such-heading")
    assert broken(page, "architecture.md#the-svf-layer-one-rule") is None
    assert broken(page, "decisions") is None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    wrong = [said for address in links(page) if (said := broken(page, address))]
    assert not wrong, f"{page.name}:\n" + "\n".join(wrong)


def test_every_page_is_reached_from_the_readme_and_the_index() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md", ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.is_file():
            reached.add(page)
            waiting += [target(page, address) for address in links(page)]
    lost = sorted(str(page.relative_to(ROOT)) for page in set(PAGES) - reached)
    assert not lost, f"no page links {lost}"


OF_THE_READER = {"rewards.py"}  # files that a page tells its reader to write


def names_in(module: Path) -> set[str]:
    """The names that a module defines or imports; as a text, too, where it imports them late."""
    nodes = ast.walk(ast.parse(module.read_text(encoding="utf-8")))
    names = (getattr(node, key, None) for node in nodes for key in ("name", "id", "value"))
    return {name for name in names if isinstance(name, str)}


def missing_modules(text: str, beside: Path = ROOT) -> list[str]:
    """The Python files and the modules of t2ray that a text names and that do not exist; a file may lie `beside` it."""
    files = [name for name in re.findall(r"(?<![\w./-])[\w./-]*\w\.py\b", text) if name not in OF_THE_READER]
    places = (ROOT, ROOT / "t2ray", ROOT / "docs", beside)
    wrong = [name for name in files if not any((place / name).is_file() for place in places)]
    for name in re.findall(r"(?<![\w./-])t2ray(?:\.[a-zA-Z_]\w*)+", text):
        place, parts = ROOT / "t2ray", name.split(".")[1:]
        while parts and (place / parts[0]).is_dir():
            place /= parts.pop(0)
        module = place / f"{parts[0]}.py" if parts else place / "__init__.py"
        if module.is_file():
            parts = parts[1:]
        else:
            module = place / "__init__.py"
        if parts and parts[0] not in names_in(module):
            wrong.append(name)
    return wrong


def test_a_module_that_does_not_exist_is_found() -> None:
    assert missing_modules("t2ray.core.Mixture, `t2ray.adapters.svf`, core.py, jobs/train.py") == []
    assert missing_modules("`svf.py`, t2ray.bench.loss, t2ray.core.Nil") == [
        "svf.py",
        "t2ray.bench.loss",
        "t2ray.core.Nil",
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "decisions"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    """But for the decisions, which speak of the code as it was then."""
    wrong = missing_modules(page.read_text(encoding="utf-8"), page.parent)
    assert not wrong, f"{page.name} names what does not exist: {wrong}"


@cache
def literals() -> tuple[str, ...]:
    """Every text in the source as one piece, with … where a value is put in."""
    found = []
    for path in (*ROOT.glob("t2ray/**/*.py"), *ROOT.glob("benchmarks/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def test_every_error_in_troubleshooting_is_one_that_the_code_says() -> None:
    rows = MARKDOWN.parse((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    firsts = [cell for row, _, cell in zip(rows, rows[1:], rows[2:], strict=False) if row.type == "tr_open"]
    said = [part.content for cell in firsts for part in cell.children or () if part.type == "code_inline"]
    wrong = []
    for symptom in said:
        pieces = [re.escape(piece) for piece in re.split(r"'?…'?", symptom) if piece.strip()]
        if not any(re.search("['…].*?".join(pieces), text) for text in literals()):
            wrong.append(symptom)
    assert len(said) > 100
    assert not wrong, "no code says:\n" + "\n".join(wrong)


def test_the_blocks_of_the_python_page_run_in_an_empty_folder_and_print_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    said = "".join(blocks(page, {"text"}))
    done = subprocess.run(
        [sys.executable, "-c", "".join(blocks(page, {"python"}))], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *printed, trained = done.stdout.splitlines()
    assert printed == said.splitlines() and len(trained.split()) == 2


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/results/*.json")), ids=lambda path: path.name)
def test_the_results_page_shows_the_tables_of_every_file_of_figures(path: Path) -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found, texts = json.loads(path.read_text(encoding="utf-8")), list[str]()
    for one in found.get("tables", {}).values():
        texts += [table_text(one), *([differences(one)] if one["against"] else [])]
        texts += [spent(one)] if any(row.get("search") for row in one["rows"]) else []
        texts += [times(one)] if any(row.get("pass1") for row in one["rows"]) else []
    if "strategies" in found:
        texts += told(found).split("\n\n")
    if "tasks" in found:
        texts.append(table(found["tasks"], list(next(iter(found["tasks"].values()))["strategies"])))
    texts += [row_text(row) for row in found.get("experts", ())]
    if "fifth" in found:
        texts += after_a_fifth(found["fifth"])
    if "learn" in found:
        texts += [figures.table(found["learn"]), *figures.told(found["beside"]).splitlines()]
    assert texts, f"{path.name} has no figures that a test knows how to show"
    for text in texts:
        assert text in page, f"docs/results.md must show this table of {path.name} as it is:\n{text}"


def test_the_readme_has_the_real_models_figures() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs" / "results" / "real.json").read_text(encoding="utf-8"))
    for row in found["tables"]["trained"]["rows"]:
        training, acc = row["training"], row["tasks"]["brief"]["acc"]
        name = {"base": "base", "svf": "SVF", "lora": "LoRA, rank 16", "lora-1": "LoRA, rank 1"}[row["method"]]
        numbers, kl = (f"{training['numbers']:,.0f}", f"{training['kl']:.2f}") if training else ("", "0")
        assert re.search(rf"^\| {name} \| {numbers} ?\| {100 * acc:.0f} %.* \| {kl} \|$", page, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_grid_on_a_page_is_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), {"yaml"}):
        values = yaml.safe_load(block)
        if isinstance(values, dict) and "tables" in values:
            (tmp_path / "grid.yaml").write_text(block, encoding="utf-8")
            assert tables.load(tmp_path / "grid.yaml").tables
