"""Help is plain English and the same everywhere; `t2ray config` lists every key, and shows a file as it is read."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from t2ray.cli.config import KINDS, shown
from t2ray.cli.main import build_parser, main
from t2ray.cli.options import Parser
from t2ray.cli.reference import commands_of, pages
from t2ray.config import search, serve, train
from t2ray.core import ConfigError, __version__

ROOT = Path(__file__).parents[1]
COMMANDS = [build_parser(), *commands_of(build_parser())]
SENTENCE = r"[A-Z]\S*( \S+){2,}\."
FILES = [
    "jobs/train.yaml",
    "jobs/sweep.yaml",
    "jobs/adapt.yaml",
    "serve_config.yaml",
    "t2ray/tiny/demo.yaml",
    "t2ray/tiny/demo_vision.yaml",
]


@pytest.mark.parametrize("parser", COMMANDS, ids=lambda parser: parser.prog)
def test_a_command_and_each_of_its_words_is_told_in_a_sentence(parser: Parser) -> None:
    told = {parser.prog: parser.description or ""} | {action.dest: action.help or "" for action in parser._actions}
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        del told[group.dest]
        told |= {action.dest: action.help or "" for action in group._choices_actions}
    assert not {name: text for name, text in told.items() if not re.fullmatch(SENTENCE, text)}


@pytest.mark.parametrize("columns", ["20", "200"])
def test_help_is_the_same_in_every_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pages()
    monkeypatch.setenv("COLUMNS", columns)
    assert pages() == before
    assert all(len(line) <= 80 for parser in COMMANDS for line in parser.format_help().splitlines())


def test_help_shows_how_a_command_is_written_and_its_defaults() -> None:
    train, decompose = (next(p for p in COMMANDS if p.prog == f"t2ray {name}") for name in ("train", "decompose"))
    assert train.format_help().startswith("usage: t2ray train CONFIG.yaml [key=value ...] [options]\n")
    assert "`t2ray config train` lists every key" in " ".join(train.format_help().split())
    assert decompose.format_help().startswith("usage: t2ray decompose MODEL --out DIR [options]\n")
    demo = next(p for p in COMMANDS if p.prog == "t2ray demo")
    assert "The seed of all randomness. Default: 0." in demo.format_help()
    told = " ".join(decompose.format_help().split())
    assert "--svd-dtype float32|float64 The precision of the decomposition. Default: float32." in told


def test_the_package_itself_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "t2ray", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"t2ray {__version__}\n")


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_lists_every_key_with_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", name]) == 0
    said = capsys.readouterr().out
    for key in KINDS[name].list_keys():
        head = re.search(rf"^{re.escape(key.path)}  \((.+)\)$", said, re.MULTILINE)
        assert head and key.type in head[1] and key.default in head[1], key
        assert " ".join(key.text.split()) in " ".join(said.split())


def test_keys_have_their_dotted_paths() -> None:
    paths = {name: {key.path for key in kind.list_keys()} for name, kind in KINDS.items()}
    assert {"model", "rl", "rl.lr", "domains.NAME.task"} <= paths["train"]
    assert {"engine.kv_tokens", "api.max_tokens"} <= paths["serve"]
    assert {"space.NAME.log", "job.settings.elite"} <= paths["sweep"]
    assert {"task", "shots", "max_tokens", "settings.population"} <= paths["adapt"]
    models = (train.TrainConfig, train.RLConfig, train.DomainConfig, train.AdapterConfig)
    assert len(paths["train"]) == sum(len(model.model_fields) for model in models)


def test_the_overview_has_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in said for name in ("train", "serve", "sweep", "adapt"))


@pytest.mark.parametrize("file", FILES)
def test_what_is_shown_says_the_same_when_it_is_read_again(file: str, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    again.write_text(shown(str(ROOT / file), []))
    assert shown(str(again), []) == again.read_text()


def test_a_shown_job_is_the_job_that_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rl.lr=1e-4", "run=other"]
    assert main(["config", "--show", str(ROOT / "jobs" / "train.yaml"), *words]) == 0
    (tmp_path / "job.yaml").write_text(capsys.readouterr().out)
    job = train.load(tmp_path / "job.yaml")
    assert job == train.load(ROOT / "jobs" / "train.yaml", words)
    assert (job.rl.lr, job.rl.prompts, job.run) == (1e-4, train.PRESETS["paper"]["prompts"], "other")


def test_a_shown_sweep_has_the_same_points_and_jobs(tmp_path: Path) -> None:
    path = ROOT / "jobs" / "sweep.yaml"
    (tmp_path / "sweep.yaml").write_text(shown(str(path), ["trials=3"]))
    before, after = search.load(path, ["trials=3"]), search.load(tmp_path / "sweep.yaml")
    assert (before.space, before.trials) == (after.space, after.trials)
    for point in ({}, {"rl.lr": 0.01, "rl.kl": 0.3}):
        assert search.job_at(before, point) == search.job_at(after, point)


def test_a_shown_endpoint_keeps_what_is_rays_and_has_all_args(tmp_path: Path) -> None:
    before = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    after = yaml.safe_load(shown(str(ROOT / "serve_config.yaml"), ["engine.batch_rows=8"]))
    (application,), (was,) = after.pop("applications"), before.pop("applications")
    assert after == before and application["deployments"] == was["deployments"]
    assert application["args"] == serve.ServeConfig(engine={"batch_rows": 8}).model_dump(mode="json")


def test_a_shown_search_has_its_options_and_settings() -> None:
    values = yaml.safe_load(shown(str(ROOT / "jobs" / "adapt.yaml"), ["shots=3", "settings.sigma=1e-1"]))
    assert (values["shots"], values["task"], values["gold"]) == (3, "gsm8k", None)
    assert values["settings"] == search.CEMConfig(sigma=0.1).model_dump(mode="json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no kind of configuration 'trian'; did you mean 'train'?"),
        (["train", "sweep"], "there is no kind of configuration 'train sweep'"),
        (["--show", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--show", "eval.yaml"], "eval.yaml: its keys (tasks) do not tell what kind of configuration it is"),
        (["--show", "eval.yaml", "rl.lr"], "'rl.lr' is not key=value"),
        (["--show", "job.yaml", "rl.stepz=3"], "job.yaml: unknown key 'rl.stepz'; did you mean 'steps'?"),
        (["--show", "serve.yaml"], "serve.yaml: args: unknown key 'modle'; did you mean 'model'?"),
        (["--show", "serves.yaml"], "serves.yaml: `applications` needs exactly one entry"),
        (["--show", "args.yaml"], "args.yaml: args: a mapping of keys, not 3"),
        (["--show", "adapt.yaml", "settings.elit=1"], "unknown key 'elit'; did you mean 'elite'?"),
        (["--show", "adapt.yaml", "shotz=1"], "adapt.yaml: unknown key 'shotz'; did you mean 'shots'?"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "eval": "tasks: [math]", "job": "domains: {math: {task: math}}", "adapt": "task: math\nname: x",
        "serve": "applications: [{args: {modle: tiny}}]", "serves": "applications: []",
        "args": "applications: [{args: 3}]",
    }.items():  # fmt: skip
        Path(f"{name}.yaml").write_text(text)
    assert main(["config", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    if words[0] == "--show":
        with pytest.raises(ConfigError):
            shown(words[1], words[2:])
