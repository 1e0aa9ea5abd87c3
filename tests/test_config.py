"""Configurations: precedence, one clear line for what is wrong, numbers as in YAML 1.2, a sentence for every key."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import t2ray.config
from t2ray.config import search
from t2ray.config.domain import DomainConfig
from t2ray.config.files import Strict, dump_yaml, nearest, override, read_yaml, validate
from t2ray.config.rl import PRESETS, RLConfig
from t2ray.config.train import TrainConfig, load, resolve
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
    assert config.rl.lr == 1e-4
    assert config.rl.kl == 0.7
    rl = config.domain_rl("math")
    assert (rl.lr, rl.samples, rl.kl, config.rl.samples) == (0.3, 3, 0.7, 1)
    assert config.run == "second"
    assert config.code == str(tmp_path)


def test_an_algorithm_says_what_is_not_given() -> None:
    assert (RLConfig().compared, RLConfig().summed) == ("mean", "sum")
    grpo = made(rl={"algorithm": "grpo"}, domains={"math": {"task": "math", "rl": {"length": "limit"}}})
    assert (grpo.rl.compared, grpo.rl.summed) == ("group", "mean")
    assert (grpo.domain_rl("math").compared, grpo.domain_rl("math").summed) == ("group", "limit")
    mixed = made(domains={"math": {"task": "math", "rl": {"algorithm": "rloo"}}})
    assert (mixed.rl.compared, mixed.domain_rl("math").compared) == ("mean", "loo")


def test_a_job_without_the_later_keys_has_the_fields_of_a_resume_that_it_had() -> None:
    """Those of the version before there were algorithms: a run of then can be resumed."""
    fields = made(rl={"lr": 0.02}).resume_fields()["rl"]
    assert fields == {
        "prompts": 24, "samples": 4, "baseline": "mean", "temperature": 1.0, "max_tokens": None, "lr": 0.02,
        "schedule": "cosine", "kl": 0.02, "clip": 1.0, "init": "scale", "sigma": 0.0, "eval_prompts": 128,
    }  # fmt: skip
    assert made(rl={"algorithm": "rloo"}).digest != made().digest != made(rl={"updates": 2}).digest


@pytest.mark.parametrize(("numbers", "rate"), [(3_584, 0.02), (1_920, 0.027), (97_920, 0.0038), (720_896, 0.0014)])
def test_the_learning_rate_that_is_not_given_falls_with_the_numbers_that_are_trained(numbers: int, rate: float) -> None:
    assert RLConfig().rate(numbers) == rate
    assert RLConfig(lr=0.5).rate(numbers) == 0.5


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
        ({"rl": {"algorithm": "grpo", "samples": 1}}, "baseline: group needs samples >= 2"),
        (
            {"preset": "paper", "rl": {"algorithm": "rloo", "samples": 4}},
            "compares a prompt's samples, and baseline: none",
        ),
        ({"rl": {"objective": "sft", "updates": 2}}, "use updates: 1"),
        ({"rl": {"baseline": "median"}}, "'none', 'mean', 'loo' or 'group', not 'median'"),
        ({"rl": 3}, "rl: "),
        ({"rl": None}, "rl: "),
        ({"preset": "papper"}, "unknown preset 'papper'; did you mean 'paper'? (known: default, paper)"),
        ({"preset": ["paper"]}, "unknown preset ['paper']"),
        ({"domains": {}}, "domains: "),
        ({"domains": {"Math": {"task": "math"}}}, "'Math' cannot be this domain's name"),
        ({"domains": {"a": {}}}, "domains.a: a domain needs one of task"),
        ({"domains": {"a": {"task": "math", "others": "others"}}}, "domains.a: a domain needs one of task"),
        ({"domains": {"a": {"data": "x.jsonl"}}}, "domains.a: a domain with data also needs prompt and reward"),
        ({"domains": {"a": {"data": "x.jsonl", "prompt": "{x}"}}}, "also needs reward"),
        ({"run": "../up"}, "'../up' cannot be this run's name"),
        ({"workers": -1}, "workers: "),
        ({"cpus": 0}, "cpus: "),
        ({"rl": {"lr": math.inf}}, "rl.lr: Input should be a finite number, not inf"),
        ({"rl": {"kl": math.nan}}, "rl.kl: Input should be a finite number, not nan"),
        ({"rl": {"clip": -math.inf}}, "rl.clip: "),
        ({"domains": {"a": {"task": "math", "rl": {"lr": math.inf}}}}, "domains.a.rl: lr: Input should be a finite"),
        ({"rl": {"steps": True}}, "rl.steps: a number, not true"),
        ({"gpus": False}, "gpus: a number, not false"),
        ({"workers": True}, "workers: a number of workers, or a range"),
        ({"run": True}, "run: Input should be a valid string, not True"),
        ({"domains": {"a": {"data": "x.jsonl", "rl": {"stepz": 1}}}}, "rl: unknown key 'stepz'; did you mean 'steps'?"),
        ({"domains": {"a": {"data": "x.jsonl"}}, "modle": "tiny"}, "unknown key 'modle'; did you mean 'model'?"),
        ({"out": "$NOWHERE/runs"}, "out: the path '$NOWHERE/runs' names the environment variable $NOWHERE, which is"),
        ({"experts": "~nobody-here/runs"}, "experts: the path '~nobody-here/runs' begins with the home of a user"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(values: dict[str, Any], line: str) -> None:
    assert line in refusal(values)


def test_a_missing_key_is_named_after_an_unknown_one() -> None:
    with pytest.raises(ConfigError, match=r"job.yaml: the key 'domains' is missing"):
        resolve({}, where="job.yaml")
    with pytest.raises(ConfigError, match=r"job.yaml: unknown key 'domain'; did you mean 'domains'?"):
        resolve({"domain": {}}, where="job.yaml")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("rl: {lr: 1}\nrun: a\nrl: {kl: 1}\n", "the key 'rl' is written twice, in line 1 and in line 3"),
        ("rl:\n  lr: 1\n  kl: 2\n  lr: 3\n", "the key 'lr' is written twice, in line 2 and in line 4"),
        ("rl: {lr: 1, lr: 1}\n", "the key 'lr' is written twice, in line 1 and in line 1"),
        ("a: [{b: 1,\n 'b': 2}]\n", "the key 'b' is written twice, in line 1 and in line 2"),
        ("1: a\n'1': b\n", "the key '1' is written twice, in line 1 and in line 2"),
        ("a: &a {x: 1}\nb:\n  x: 2\n  <<: *a\n  x: 3\n", "the key 'x' is written twice, in line 3 and in line 5"),
    ],
)
def test_a_key_that_is_written_twice_is_told_with_both_lines(text: str, lines: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.yaml: {lines}$"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="the key 'lr' is written twice"):
        override({}, ["rl={lr: 1, lr: 2}"])


def test_merged_keys_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c, y: 3}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 1}, "b": {"c": {"x": 2, "y": 1}}, "d": {"x": 2, "y": 3}}


@pytest.mark.parametrize("name", ["123", "2026-11-25", "0.10", "1e3", "007", "12", "1.5"])
def test_a_name_may_look_like_a_number_or_a_date(name: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"run: {name}\ndomains: {{{name}: {{task: math}}}}\n")
    config = load(job)
    assert config.run == name and [*config.domains] == [name]
    assert load(job, ["run=other", f"run={name}"]).run == name


def test_a_word_of_yaml_may_name_a_domain(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("domains: {no: {task: math}, on: {task: code}, null: {task: pick}}\n")
    assert [*load(job).domains] == ["no", "on", "null"]


def test_no_clipping_is_null_or_infinity_and_survives_its_json() -> None:
    for clip in (None, math.inf):
        config = made(rl={"clip": clip})
        assert config.rl.clip is None
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_paths_may_name_the_home_folder_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    domain = {"data": ["~/a.jsonl", "$SCRATCH/b.jsonl"], "prompt": "costs $5: {x}", "reward": "r:f"}
    config = made(out="~/runs", factors="${SCRATCH}/f", experts="s3://b/$SCRATCH", domains={"d": domain})
    assert (config.out, config.factors, config.experts) == ("/home/me/runs", "/scratch/f", "s3://b//scratch")
    assert config.domains["d"].data == ("/home/me/a.jsonl", "/scratch/b.jsonl")
    assert config.domains["d"].prompt == "costs $5: {x}"
    (tmp_path / "a$B").mkdir()  # a folder of that very name
    assert made(out=f"{tmp_path}/a$B/runs").out == f"{tmp_path}/a$B/runs"
    (tmp_path / "job.yaml").write_text("domains: {math: {task: math}}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/job.yaml").code == str(tmp_path)


def test_the_elite_is_a_share(tmp_path: Path) -> None:
    for wrong in (8, 0, -0.5, math.nan):
        with pytest.raises(ConfigError, match=r"elite: (a share of the population|Input should be a finite)"):
            validate(search.CEMConfig, {"elite": wrong}, where="settings")
    assert validate(search.CEMConfig, {"elite": 1}, where="settings").elite == 1.0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is a mapping of keys, not NoneType"),
        ("- a", "is a mapping of keys, not list"),
        ("a: [", "not valid YAML"),
        ("a: b: c", "line 1"),
        ("\x00", "not valid YAML"),
        ("run: [a]\ndomains: {math: {task: math}}", "run: Input should be a valid string"),
        ("? [a]\n: 1\n", "line 1: a key is a text"),
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


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E4", 1e4), ("-2e+3", -2e3), (".5", 0.5), ("1.", 1.0), ("-.5e-1", -0.05), ("3.25", 3.25),
        ("7", 7), ("-7", -7), (".inf", math.inf), ("1e4abc", "1e4abc"), ('"1e-4"', "1e-4"), ("'7'", "7"), ("e4", "e4"),
        ("1e", "1e"), (".", "."), ("-", "-"), ("1.2.3", "1.2.3"), ("1:30.5", "1:30.5"), ("0-3", "0-3"),
    ],
)  # fmt: skip
def test_a_number_is_what_yaml_1_2_takes_for_one(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\nkeys: [{text}]\n" if text != "-" else "key: '-'\nkeys: ['-']\n")
    read = read_yaml(path)
    assert read == {"key": value, "keys": [value]} and isinstance(read["key"], type(value))
    if text != "-":  # a list with nothing in it
        said = override({}, [f"key={text}"])["key"]
        assert said == value and isinstance(said, type(value))


def test_the_values_of_a_sweep_are_numbers_though_no_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    space = "{rl.lr: [1e-4, 2e-4], rl.kl: {log: [1e-3, 1]}}"
    path.write_text(f"kind: rl\njob: {{domains: {{math: {{task: math}}}}}}\nspace: {space}\n")
    read = search.load(path).space
    assert (read["rl.lr"].values, read["rl.kl"].log) == ((1e-4, 2e-4), (1e-3, 1.0))


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126)) | st.from_regex(r"[-+.0-9e_:]{1,6}", fullmatch=True)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
)


@given(values=st.dictionaries(TEXT, PLAIN, max_size=4))
def test_what_is_written_is_read_as_it_was(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(dump_yaml(values), encoding="utf-8")
    read = read_yaml(path)
    assert read == values and str(read) == str(values)


# --------------------------------------------------------------------------------------------------------- descriptions


def models() -> list[type[Strict]]:
    """Every configuration model that there is."""
    for module in pkgutil.iter_modules(t2ray.config.__path__, "t2ray.config."):
        importlib.import_module(module.name)
    return sorted((m for m in Strict.__subclasses__() if m.__module__.startswith("t2ray.")), key=lambda m: m.__name__)


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_key_is_described_by_a_sentence(model: type[Strict]) -> None:
    wrong = [
        f"{name}: {field.description!r}"
        for name, field in model.model_fields.items()
        if not re.fullmatch(r"[A-Z]\S*( \S+){2,}\.", field.description or "")
    ]
    assert not wrong, f"{model.__name__}: a capital letter, three words or more, a full stop:\n" + "\n".join(wrong)


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_copy_with_other_values_has_its_own_digest_and_settings() -> None:
    job = made()
    before, steps = job.digest, job.domain_rl("math").steps
    for changed in (job.model_copy(update={"seed": 5}), job.model_copy(update={"seed": 5}, deep=True)):
        assert changed.digest == made(seed=5).digest != before
    longer = job.model_copy(update={"rl": job.rl.model_copy(update={"steps": steps + 1})})
    assert (longer.domain_rl("math").steps, job.domain_rl("math").steps) == (steps + 1, steps)
    assert job.model_copy().digest == before


def test_what_a_job_remembers_is_no_part_of_it() -> None:
    asked, fresh = made(), made()
    assert asked.digest and asked.domain_rl("math") is asked.domain_rl("math")
    for other in (fresh, copy.copy(asked), copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert asked == other and other.digest == asked.digest and repr(other) == repr(asked)
        assert other.model_dump_json() == asked.model_dump_json()
    assert asked != made(seed=1)


@pytest.mark.parametrize(
    "change",
    [{"workers": 3}, {"cpus": 2.0}, {"gpus": 1.0}, {"verifiers": 4}, {"run": "x"}, {"out": "y"}, {"code": "z"}],
)
def test_where_and_by_how_many_changes_no_digest(change: dict[str, Any]) -> None:
    assert made(change).digest == made().digest


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rl": {"lr": 0.5}}, {"rl": {"betas": [0, 0.9]}}, {"model": "x"}, {"layers": "0"},
     {"targets": ["*.mlp.*"]}, {"domains": {"math": {"task": "code"}}},
     {"domains": {"math": {"task": "math", "rl": {"kl": 1}}}}],
)  # fmt: skip
def test_what_changes_z_changes_the_digest(change: dict[str, Any]) -> None:
    assert made(change).digest != made().digest


def test_a_job_has_few_fields() -> None:
    """The house's budget: about 20 per job, so that one can be read as a whole."""
    assert all(len(model.model_fields) <= 25 for model in (TrainConfig, RLConfig, DomainConfig))


def test_another_sampler_is_another_run_and_the_first_is_as_before_there_were_two() -> None:
    vllm = made({"rl": {"engine": "vllm"}})
    assert vllm.digest != made().digest == made({"rl": {"truncate": 0.0}}).digest
    assert made({"rl": {"engine": "vllm", "truncate": 0.0}}).digest != vllm.digest


def test_a_domain_that_names_the_default_engine_is_the_job_that_names_none() -> None:
    named = resolve({"domains": {"math": {"task": "math", "rl": {"engine": "transformers"}}}}, where="job")
    assert named.digest == resolve({"domains": {"math": {"task": "math"}}}, where="job").digest


@pytest.mark.parametrize(("key", "other"), [("objective", "sft"), ("engine", "vllm")])
def test_a_domain_with_the_default_beside_a_job_with_another_value_is_told_apart(key: str, other: str) -> None:
    """But not by the digest: those in checkpoints of before go on to be read."""

    def of(job: dict[str, Any], domain: dict[str, Any]) -> TrainConfig:
        return resolve({"domains": {"math": {"task": "math", "rl": domain}}, "rl": job}, where="job")

    default = {"objective": "reinforce", "engine": "transformers"}[key]
    plain, own, same = of({key: other}, {"kl": 0.5}), of({key: other}, {"kl": 0.5, key: default}), of({}, {"kl": 0.5})
    assert plain.resume_fields() != own.resume_fields() and plain.digest == own.digest
    assert of({}, {"kl": 0.5, key: default}).resume_fields() == same.resume_fields()
    assert of({}, {"kl": 0.5, key: other}).digest != same.digest


def test_digests_are_those_that_checkpoints_hold() -> None:
    own = {"baseline": None, "betas": [0, 0.9], "objective": "sft", "engine": "auto", "truncate": 1.0}
    values = {"domains": {"math": {"task": "math", "rl": own}, "code": {"task": "code"}}, "rl": {"engine": "vllm"}}
    assert resolve(values, where="job").digest == "da19a51a2294276f9d230702"


def test_betas_of_before_are_another_domain_beside_a_job_with_others() -> None:
    def of(job: dict[str, Any], domain: dict[str, Any]) -> str:
        values = {"domains": {"math": {"task": "math", "rl": domain}}, "rl": job}
        return resolve(values, where="job").digest

    usual, newest = {"betas": [0.9, 0.999]}, {"betas": [0, 0.9]}
    assert of(newest, usual) != of(newest, {})
    assert of(usual, usual) == of({}, usual) == of({}, {})
