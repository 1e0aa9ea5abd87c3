"""The house rules that a machine can check: layers, libraries, sizes, docstrings on the syntax tree; and the pins."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from waiting import GUARD_S

ROOT = Path(__file__).parents[1]

# Row by row from the top: a package imports rows below its own and itself, never another package of its row. A name is
# a package with all that is in it, or a module by itself. docs/architecture.md draws this table.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("jobs", "benchmarks", "t2ray.__main__"),
    ("t2ray.cli",),
    ("t2ray",),
    ("t2ray.adaptive",),
    ("t2ray.cluster", "t2ray.tiny"),
    ("t2ray.workbench",),
    ("t2ray.sweep", "t2ray.runs"),
    ("t2ray.training", "t2ray.api"),
    ("t2ray.evals", "t2ray.tasks"),
    ("t2ray.adapt", "t2ray.sandbox", "t2ray.engine"),
    ("t2ray.experts",),
    ("t2ray.adapters",),
    ("t2ray.models",),
    ("t2ray.pictures",),
    ("t2ray.config", "t2ray.store", "t2ray.prompts", "t2ray.testing"),
    ("t2ray.integrity", "t2ray.grades"),
    ("t2ray.core",),
)

# Library -> who may import it. Programs (jobs, the tiny model's pretraining) may use transformers as any user would.
RIMS = {
    "ray": ("t2ray.cluster", "benchmarks.capacity.stamps"),
    "fastapi": ("t2ray.api", "t2ray.cluster.serve.ingress"),
    "vllm": ("t2ray.engine.vllm.seams",),
    "transformers": ("t2ray.models", "t2ray.engine", "t2ray.tiny.pretrain", "t2ray.tiny.vision", "jobs", "benchmarks"),
    "peft": ("t2ray.adapters", "benchmarks"),
}

# Where an error of any kind is not a fault but the answer: model-written code runs there; or a reward function whose
# failures a job asked to count; or its cause is one request
# among those of many users; or what was met there, by somebody who looks again and again, must not end the looking.
CATCH_ALL = {
    "t2ray.sandbox.child",
    "t2ray.tasks.grading",
    "t2ray.engine.loop",
    "t2ray.engine.vllm.pump",
    "t2ray.experts.follow",
    "t2ray.cluster.serve.looking",
}

TORCH_FREE = (
    "t2ray.core",
    "t2ray.config",
    "t2ray.prompts",
    "t2ray.testing",
    "t2ray.adapt",
    "t2ray.tasks",
    "t2ray.sandbox",
    "t2ray.training.rollout",
    "t2ray.evals",
)
HEAVY = {"torch", "transformers", "ray", "fastapi", "vllm"}


def picture() -> str:
    """The table as docs/architecture.md shows it."""
    return "\n".join("   ".join(name.removeprefix("t2ray.") for name in row) for row in LAYERS)


def test_the_architecture_page_draws_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert picture() in page, f"docs/architecture.md must draw the rows as they are:\n{picture()}"


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((*ROOT.glob("t2ray/**/*.py"), *ROOT.glob("jobs/*.py"), *ROOT.glob("benchmarks/**/*.py")))
}
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"), filename=str(FILES[module]))


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a module, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module is not None
            # `from t2ray.tasks import tiny` imports a module, `from t2ray.core import Message` a name of one
            yield from (
                (node.lineno, name if (name := f"{node.module}.{alias.name}") in FILES else node.module)
                for alias in node.names
            )


def under(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def column(module: str) -> tuple[int, str]:
    """The row of a module, counted from the top, and its column."""
    fits = [(row, name) for row, names in enumerate(LAYERS) for name in names if under(module, (name,))]
    # the package's own name covers `t2ray/__init__.py` alone, not every module there is
    fits = [(row, name) for row, name in fits if name != "t2ray" or module == "t2ray"]
    assert fits, f"{module} stands in no row of LAYERS"
    return max(fits, key=lambda fit: len(fit[1]))


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_rows_below_its_own(module: str) -> None:
    row, name = column(module)
    wrong = []
    for line, imported in imports(module):
        if not under(imported, ("t2ray", "jobs", "benchmarks")):
            continue
        other_row, other = column(imported)
        if other != name and other_row <= row:
            wrong.append(f"{module}:{line} imports {imported}, {'sideways' if other_row == row else 'upward'}")
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_in_no_circle() -> None:
    """Not by an import within a function, either."""
    TopologicalSorter({module: {name for _, name in imports(module)} - {module} for module in FILES}).prepare()


@pytest.mark.parametrize("module", FILES)
def test_a_library_stays_at_its_rim(module: str) -> None:
    roots = {(line, name.partition(".")[0]) for line, name in imports(module)}
    wrong = [
        f"{module}:{line} imports {root}" for line, root in roots if root in RIMS and not under(module, RIMS[root])
    ]
    if under(module, TORCH_FREE):
        wrong += [f"{module}:{line} imports torch" for line, root in roots if root == "torch"]
    assert not wrong, "\n".join(wrong)


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after `code`."""
    code += f"\nimport sys; print(); print('loaded:', *sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_help_loads_no_heavy_library_and_no_command() -> None:
    code = "from t2ray.cli.main import main\ntry: main(['--help'])\nexcept SystemExit as e: assert not e.code"
    assert loaded_by(f"{code}\nimport sys; assert not {{'pydantic', 'yaml', 'rich'}} & set(sys.modules)") == set()


# A mistake that each command answers at once: words of the command line, with the files that they name.
MISTAKES = {
    "decompose": ("tiny --out f --config job.yaml", "unknown key 'domains'"),
    "train": ("job.yaml rl.stepz=3", "unknown key 'rl.stepz'; did you mean 'steps'?"),
    "demo": ("--limit 0", "--limit is 0; it must be at least 1"),
    "experts": ("import X! file", "'X!' cannot be this expert's name"),
    "export": ("--mixture math --as peft --out o", "--as peft needs --rank"),
    "adapt": ("--task math --name x populaton=3", "unknown key 'populaton'; did you mean 'population'?"),
    "chat": ("--max-tokens 0", "max_tokens is 0; it must be at least 1"),
    "eval": ("--tasks math,math", "write names separated by commas, each once"),
    "verify": ("--task maths", "unknown task 'maths'; did you mean 'math'?"),
    "serve": ("--config serve.yaml", "unknown key 'modle'; did you mean 'model'?"),
    "keys": ("X!", "'X!' cannot be this key's name"),
    "load": ("localhost --rate 1", "'localhost' is no address of an endpoint"),
    "sweep": ("sweep.yaml", "space: unknown key 'rl.lrr'; did you mean 'lr'?"),
    "dispatch": ("--strategies cls,fewshot", "fewshot is not prompt or cls"),
    "tables": ("tables.yaml", "tables.t: no method 'svg'; did you mean 'svf'?"),
    "status": ("run --jason", "unknown option --jason; did you mean --json?; see t2ray status --help"),
    "plan": ("tiny --tokens 0", "--tokens is 0; it must be at least 1"),
    "config": ("--show job.yaml rl.lrr=1", "unknown key 'rl.lrr'; did you mean 'lr'?"),
}
ANSWERS = """
import sys
from t2ray.cli.main import main
codes = []
for words in ([sys.argv[1], "--help"], sys.argv[1:]):
    try:
        codes.append(main(words))
    except SystemExit as end:
        codes.append(end.code)
print("codes:", *codes, "loaded:", *sorted({"torch", "transformers", "ray", "fastapi"} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", MISTAKES)
def test_a_command_tells_its_help_and_a_mistake_without_a_heavy_library(command: str, tmp_path: Path) -> None:
    job = "domains: {math: {task: math}}"
    (tmp_path / "job.yaml").write_text(job)
    (tmp_path / "sweep.yaml").write_text(f"kind: rl\njob: {{{job}}}\nspace: {{rl.lrr: [1e-3]}}\n")
    table = "{title: T, methods: [svg], tasks: [math]}"
    (tmp_path / "tables.yaml").write_text(
        f"models: {{m: tiny}}\nmethods: {{svf: {{}}}}\njob: {{{job}}}\ntables: {{t: {table}}}\n"
    )
    (tmp_path / "serve.yaml").write_text("applications: [{args: {modle: tiny}}]\n")
    words, message = MISTAKES[command]
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, command, *words.split()],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=GUARD_S,
    )  # fmt: skip
    assert message in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("t2ray: "), done.stderr
    assert f"usage: t2ray {command} " in done.stdout
    assert done.stdout.endswith("codes: 0 2 loaded:\n")


def test_every_command_has_a_mistake_to_be_told_and_a_file_of_its_own() -> None:
    from t2ray.cli.main import COMMANDS

    files = {name.rpartition(".")[2] for name in FILES if under(name, ("t2ray.cli",)) and name.count(".") == 2}
    assert set(MISTAKES) == set(COMMANDS) == files - {"main", "options", "output", "display", "reference"}


def test_torch_free_modules_load_no_heavy_library() -> None:
    modules = [module for module in FILES if under(module, TORCH_FREE)]
    assert loaded_by("import " + ", ".join(modules)) == set()


def imported_first(module: str) -> set[str]:
    """The modules of this repository that a module imports when it is imported itself."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in FILES else str(node.module) for name in names)
            elif isinstance(node, ast.If | ast.Try | ast.With):
                visit(node.body)

    visit(tree(module).body)
    packages = {name.rpartition(".")[0] for name in found}
    return {name for name in found | packages if name in FILES}


def closure(module: str) -> set[str]:
    """All modules with code in them that importing `module` loads; a package that holds its docstring alone is none."""
    loaded, waiting = set[str](), [module]
    while waiting:
        if (name := waiting.pop()) not in loaded:
            loaded.add(name)
            waiting += imported_first(name)
    return {name for name in loaded if len(tree(name).body) > 1 and name != "t2ray"}


def test_a_worker_loads_what_it_trains_with_and_little_else() -> None:
    loaded = closure("t2ray.cluster.train.worker")
    assert len(loaded) <= 52, sorted(loaded)
    others = ("t2ray.api", "t2ray.adapt", "t2ray.evals", "t2ray.cli", "t2ray.sweep", "t2ray.training.trackers")
    assert not [name for name in loaded if under(name, others)]


@pytest.mark.parametrize("deployment", ["ingress", "dispatcher", "generator", "searcher", "monitor"])
def test_an_endpoint_knows_no_training(deployment: str) -> None:
    loaded = closure(f"t2ray.cluster.serve.{deployment}")
    assert not [name for name in loaded if under(name, ("t2ray.training", "t2ray.runs", "t2ray.cluster.train"))]


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in FILES if name.count(".") > 1}))
def test_no_modules_of_a_package_import_one_another_in_a_circle(package: str) -> None:
    """Not even inside of functions."""
    modules = [name for name in FILES if under(name, (package,))]
    edges = {name: {other for _, other in imports(name) if other in modules and other != name} for name in modules}
    while free := [name for name, others in edges.items() if not others & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges, f"a circle: {sorted(edges)}"


@pytest.mark.parametrize("module", FILES)
def test_a_module_and_its_functions_are_short(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    limit = 40 if under(module, ("jobs",)) else 300
    wrong = [f"{module}: {lines} lines, more than {limit}"] if lines > limit else []
    for node in ast.walk(tree(module)):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            wrong += [f"{module}:{node.lineno} {node.name}: {length} lines, more than 60"] if length > 60 else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [module for module in FILES if module not in CATCH_ALL])
def test_nothing_swallows_every_error(module: str) -> None:
    """A bare `except` never; `except Exception` only to clean up or to name the culprit, and then raise."""
    wrong = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind).rpartition(".")[2] if kind else "everything" for kind in caught}
            raises = isinstance(node.body[-1], ast.Raise)
            if "everything" in names or (names & {"Exception", "BaseException"} and not raises):
                wrong.append(f"{module}:{node.lineno} catches {', '.join(sorted(names))}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", FILES)
def test_what_is_public_has_a_docstring(module: str) -> None:
    nodes = [
        node
        for node in tree(module).body
        if isinstance(node, (*Function, ast.ClassDef))
        and under(module, ("t2ray", "benchmarks"))
        and not node.name.startswith("_")
    ]
    missing = [f"{module}:{node.lineno} {node.name}" for node in nodes if not ast.get_docstring(node)]
    if tree(module).body and not ast.get_docstring(tree(module)):
        missing.append(f"{module}: the module itself")
    assert not missing, "\n".join(missing)


def test_a_public_class_has_a_name_of_its_own() -> None:
    """One word, one meaning: no two modules define a public class or a type alias of one name."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module in FILES:
        for node in tree(module).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else _aliases(node)
            for name in names:
                if under(module, ("t2ray", "benchmarks")) and not name.startswith("_"):
                    homes[name].append(f"{module}:{node.lineno}")
    shared = [f"{name}: {', '.join(places)}" for name, places in sorted(homes.items()) if len(places) > 1]
    assert not shared, "\n".join(shared)


def _aliases(node: ast.stmt) -> list[str]:
    """The types that an assignment names: `Verify = Callable[...]`, `Prompt = tuple[Message, ...] | str`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Subscript | ast.BinOp):
        return []
    return [target.id for target in node.targets if isinstance(target, ast.Name) and re.match("[A-Z][a-z]", target.id)]


# ------------------------------------------------------------------------------------------------------- dependencies


def declared() -> dict[str, Requirement]:
    """Every requirement in pyproject.toml, the extras' too, by its canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_what_the_package_imports_is_declared() -> None:
    distributions = packages_distributions()
    roots = {name.partition(".")[0] for module in FILES for _, name in imports(module)}
    own = {"t2ray", "jobs", "benchmarks", *(module.rpartition(".")[2] for module in FILES)}  # scripts name neighbours
    own |= {"vllm"}  # a GPU's own build, which users choose: docs/vllm.md
    own |= {"trl"}  # in an environment of its own: docs/results.md
    third_party = roots - sys.stdlib_module_names - own
    undeclared = [
        root
        for root in sorted(third_party)
        if not declared().keys() & {canonicalize_name(name) for name in distributions.get(root, [root])}
    ]
    assert not undeclared, f"imported, but not in pyproject.toml: {undeclared}"


def test_an_environment_can_hold_vllm_too() -> None:
    """Each requirement that both have is met by some version: one that a bound of either names."""
    lines = (ROOT / "tests" / "vllm_requires.txt").read_text(encoding="utf-8").splitlines()
    theirs = [Requirement(line) for line in lines if not line.startswith("#")]
    both = []
    for other in theirs:
        own = declared().get(name := canonicalize_name(other.name))
        if own is None or other.marker and not other.marker.evaluate():
            continue
        both.append(name)
        named = [spec.version.removesuffix(".*") for spec in (*own.specifier, *other.specifier)]
        assert any(own.specifier.contains(v) and other.specifier.contains(v) for v in named), f"{own} against {other}"
    assert {"fastapi", "numpy", "torch", "transformers"} <= set(both)


def test_every_pin_is_an_exact_version_within_the_declared_range() -> None:
    wrong = []
    for name, pin in pinned().items():
        if not re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)) or pin.url:
            wrong.append(f"{pin} is no exact version (a local suffix such as +cpu is one machine's alone)")
        elif name in declared() and not declared()[name].specifier.contains(str(pin.specifier)[2:]):
            wrong.append(f"{pin} is outside {declared()[name]}")
    wrong += [f"{name} is not pinned" for name in sorted(declared().keys() - pinned().keys())]
    assert not wrong, "\n".join(wrong)
