"""Options from a file are the options of the command line, and a wrong key is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from t2ray.cli.main import build_parser, main
from t2ray.cli.options import JOB
from t2ray.core import ConfigError

ROOT = Path(__file__).parents[1]


def parsed(*words: str) -> dict[str, object]:
    return vars(build_parser().parse_args(words))


def test_a_file_says_what_the_command_line_says(tmp_path: Path) -> None:
    file = tmp_path / "adapt.yaml"
    file.write_text(
        "task: rows.jsonl\nname: mine\nshots: 5\nper_layer: true\nonly: [math, code]\nunsafe_code: false\n"
        "max_tokens: null\nsettings: {population: 8, elite: 5e-1, mean: null}\n"
    )
    words = ("--task", "rows.jsonl", "--name", "mine", "--shots", "5", "--per-layer", "--only", "math,code")
    assert parsed("adapt", "--config", str(file)) == parsed("adapt", *words, "population=8", "elite=0.5", "mean=null")
    # what is typed wins, as an option or as key=value
    assert parsed("adapt", "--config", str(file), "--shots", "7")["shots"] == 7
    changed = parsed("adapt", "--config", str(file), "shots=7", "settings.elite=0.1", "name=other")
    assert (changed["shots"], changed["name"], changed["settings"]) == (
        7,
        "other",
        ["population=8", "elite=0.1", "mean=null"],
    )


def test_positionals_and_lists_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "decompose.yaml"
    file.write_text("model: tiny\nout: factors\ntargets: ['*.mlp.*', '*q_proj']\nlayers: 0-3\nworkers: 2\n")
    words = ("decompose", "tiny", "--out", "factors", "--targets", "*.mlp.*", "*q_proj", "--layers", "0-3")
    assert parsed("decompose", "--config", str(file)) == parsed(*words, "--workers", "2")


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("taks: x\nname: n\n", (), r"a.yaml: unknown key 'taks'; did you mean 'task'\?"),
        ("task: x\nname: n\nsettings: 3\n", (), r"settings: a mapping of keys, not 3"),
        ("task: x\nname: n\n", ("shotz=3",), r"unknown key 'shotz'; did you mean 'shots'\?"),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest(
    text: str, words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parsed("adapt", "--config", str(tmp_path / "a.yaml"), *words)
    assert main(["adapt", "--config", str(tmp_path / "a.yaml"), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_not_named_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        parsed("eval", "--config")
    with pytest.raises(ConfigError, match="no such configuration file"):
        parsed("eval", "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", ["decompose", "adapt", "evaluate"])
def test_a_shipped_job_is_accepted(name: str) -> None:
    command = {"evaluate": "eval"}.get(name, name)
    path = ROOT / "jobs" / f"{name}.yaml"
    args = parsed(command, JOB, str(path))
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(args)
