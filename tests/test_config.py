"""A training job's configuration: precedence, and one clear line for whatever is wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2ray.config.files import nearest, override
from t2ray.config.train import PRESETS, DomainConfig, RLConfig, TrainConfig, load, resolve
from t2ray.core import ConfigError

MINIMAL: dict[str, Any] = {"domains": {"math": {"task": "math"}}}


def made(values: dict[str, Any] | None = None, **more: Any) -> TrainConfig:
    return resolve(MINIMAL | (values or {}) | more, where="job.yaml")


def refusal(values: dict[str, Any] | None = None, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(values, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- precedence


def test_defaults_then_preset_then_file_then_command_line(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("preset: paper\nrl: {kl: 0.5, lr: 1e-4}\ndomains: {math: {task: math, rl: {lr: 0.3}}}\n")
    config = load(job, ["rl.kl=0.7", "domains.math.rl.samples=3", "run=second"])
    assert config.rl.steps == RLConfig().steps  # type: ignore[call-arg]
    assert config.rl.prompts == PRESETS["paper"]["prompts"] == 256
    assert config.rl.lr == 1e-4  # YAML reads 1e-4 as text
    assert config.rl.kl == 0.7
    rl = config.domain_rl("math")
    assert (rl.lr, rl.samples, rl.kl, config.rl.samples) == (0.3, 3, 0.7, 1)
    assert config.run == "second"
    assert config.code == str(tmp_path)


def test_the_papers_preset_is_table_six() -> None:
    rl = made(preset="paper").rl
    assert (rl.lr, rl.kl, rl.clip, rl.prompts, rl.samples) == (2e-3, 0.2, 1e-3, 256, 1)
    assert (rl.baseline, rl.init, rl.schedule) == ("none", "sigmoid", "constant")


def test_overrides_make_the_mappings_they_need_and_leave_the_file_alone() -> None:
    values = {"rl": {"lr": 1.0}}
    texts = ["rl.steps=3", "domains.dog.prompt='Q: {x}'", "targets=['*.mlp.*']", "layers="]
    assert override(values, texts) == {
        "rl": {"lr": 1.0, "steps": 3},
        "domains": {"dog": {"prompt": "Q: {x}"}},
        "targets": ["*.mlp.*"],
        "layers": None,
    }
    assert values == {"rl": {"lr": 1.0}}


def test_a_configuration_survives_its_own_json() -> None:
    config = made(preset="paper", targets=("*.mlp.*",), workers=2)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model_": "tiny"}, "job.yaml: unknown key 'model_'; did you mean 'model'?"),
        ({"rl": {"stepz": 3}}, "job.yaml: unknown key 'rl.stepz'; did you mean 'steps'?"),
        ({"domains": {"a": {"taks": "math"}}}, "unknown key 'domains.a.taks'; did you mean 'task'?"),
        ({"domains": {"a": {"task": "math", "rl": {"lrr": 1}}}}, "domains.a.rl: unknown key 'lrr'; did you mean 'lr'?"),
        ({"rl": {"lr": -1}}, "rl.lr: Input should be greater than 0, not -1"),
        ({"rl": {"steps": "many"}}, "rl.steps: Input should be a valid integer"),
        ({"rl": {"baseline": "loo", "samples": 1}}, "needs samples >= 2"),
        ({"rl": {"baseline": "median"}}, "rl.baseline: Input should be 'none', 'mean' or 'loo', not 'median'"),
        ({"rl": 3}, "rl: "),
        ({"rl": None}, "rl: "),
        ({"preset": "papper"}, "unknown preset 'papper'; did you mean 'paper'? (known: default, paper)"),
        ({"preset": ["paper"]}, "unknown preset ['paper']"),
        ({"domains": {}}, "domains: "),
        ({"domains": {"Math": {"task": "math"}}}, "'Math' cannot name a domain"),
        ({"domains": {"a": {}}}, "domains.a: a domain needs one of task"),
        ({"domains": {"a": {"task": "math", "others": "others"}}}, "domains.a: a domain needs one of task"),
        ({"domains": {"a": {"data": "x.jsonl"}}}, "domains.a: a domain with data also needs prompt and reward"),
        ({"domains": {"a": {"data": "x.jsonl", "prompt": "{x}"}}}, "also needs reward"),
        ({"run": "../up"}, "'../up' cannot name a run"),
        ({"workers": -1}, "workers: "),
        ({"cpus": 0}, "cpus: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(values: dict[str, Any], line: str) -> None:
    assert line in refusal(values)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"job.yaml: the key 'domains' is missing"):
        resolve({}, where="job.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is a mapping of keys, not NoneType"),
        ("- a", "is a mapping of keys, not list"),
        ("a: [", "not valid YAML"),
        ("a: b: c", "line 1"),
        ("\x00", "not valid YAML"),
        ("run: 2026-01-01\ndomains: {math: {task: math}}", "run: Input should be a valid string"),
        ("1: 2\ndomains: {math: {task: math}}", "1"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, line: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(job)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rl.steps", "is not key=value; write for instance rl.steps=30"),
        ("=3", "is not key=value"),
        ("rl.lr.x=3", "'lr' holds no keys"),
        ("rl.lr=[", "the value is not valid YAML"),
    ],
)
def test_an_assignment_that_is_none_is_refused(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"rl": {"lr": 1.0}}, [text])
    assert line in str(caught.value)


def test_the_nearest_word_is_offered_only_where_one_is_near() -> None:
    assert nearest("stepz", ["steps", "lr"]) == "; did you mean 'steps'? (known: lr, steps)"
    assert nearest("qqq", ["steps"]) == " (known: steps)"
    assert nearest("x", []) == " (known: none)"


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "change",
    [{"workers": 3}, {"cpus": 2.0}, {"gpus": 1.0}, {"verifiers": 4}, {"run": "x"}, {"out": "y"}, {"code": "z"}],
)
def test_where_and_by_how_many_changes_no_digest(change: dict[str, Any]) -> None:
    assert made(change).digest == made().digest


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rl": {"lr": 0.5}}, {"model": "x"}, {"targets": ["*.mlp.*"]}, {"layers": "0"},
     {"domains": {"math": {"task": "code"}}}, {"domains": {"math": {"task": "math", "rl": {"kl": 1}}}}],
)  # fmt: skip
def test_what_changes_z_changes_the_digest(change: dict[str, Any]) -> None:
    assert made(change).digest != made().digest


def test_a_job_has_few_fields() -> None:
    """The house's budget: at most 20 a job, so that one can be read as a whole."""
    assert all(len(model.model_fields) <= 20 for model in (TrainConfig, RLConfig, DomainConfig))
