"""What the documentation and the shipped files tell a reader to type is accepted by the program as it is."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from t2ray.config import train as config

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md")
PAGES = sorted(path for place in PLACES for path in ROOT.glob(place) if path.name != "CHANGELOG.md")
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL = {"", "bash", "sh", "shell", "console"}


def blocks(text: str, languages: set[str]) -> Iterator[str]:
    return (body for language, body in FENCE.findall(text) if language in languages)


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
        script = arguments[0] if arguments else "-"
        return f"there is no {script}" if script.startswith("jobs/") and not (ROOT / script).is_file() else None

    from t2ray.cli.main import build_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            build_parser().parse_args(arguments)
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


def test_the_training_job_is_shipped() -> None:
    assert (ROOT / "jobs" / "train.yaml").is_file()


def test_the_architecture_page_has_a_line_for_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(ROOT / "t2ray").as_posix() for path in ROOT.glob("t2ray/**/__init__.py")}
    missing = sorted(package for package in packages - {"."} if f"| `{package}/` |" not in page)
    assert not missing, f"docs/architecture.md has no line for {missing}"
