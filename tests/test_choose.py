"""Which engine computes where that is open: a decision without a GPU, and what it is told by a job."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from test_lockstep import RL, job

from t2ray.config.train import TrainConfig
from t2ray.engine import choose
from t2ray.engine.choose import COMPARED, decided, unfit
from t2ray.runs.prepare import prepare


@pytest.mark.parametrize(
    ("gpu", "installed", "against", "kind", "why"),
    [
        (True, "0.33.0", "", "vllm", "vLLM 0.33.0 is installed"),
        (True, "0.32.1+cu130", "", "vllm", "not measured"),
        (False, "0.33.0", "", "transformers", "no GPU"),
        (True, None, "", "transformers", "not installed"),
        (True, "0.34.0", "", "transformers", "none of the releases"),
        (True, "0.3.0", "", "transformers", "none of the releases"),
        (True, "0.33.0", "sparse", "transformers", "sparse"),
    ],
)
def test_vllm_computes_on_a_gpu_where_a_known_release_is_there_and_fits(
    gpu: bool, installed: str | None, against: str, kind: str, why: str
) -> None:
    found, because = decided(gpu=gpu, installed=installed, against=against)
    assert found == kind and why in because


def test_models_that_were_not_compared_are_left_to_transformers(tiny_llama: Path) -> None:
    assert unfit("tiny", None) == unfit(str(tiny_llama), None) == "" and "llama" in COMPARED
    assert "llava have not been compared" in unfit("tiny-vision", None)


def test_a_model_that_transformers_does_not_know_is_left_to_what_loads_it(tmp_path: Path) -> None:
    """Which refuses it in one line."""
    (tmp_path / "config.json").write_text('{"model_type": "unheard"}')
    assert choose.choose("auto", str(tmp_path), None, gpu=False) == "transformers"


def test_what_is_named_is_taken_and_what_is_open_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "installed", lambda: "0.33.0")
    for named in ("vllm", "transformers"):
        assert choose.choose(named, "tiny", None, gpu=named == "transformers") == named
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        assert choose.choose("auto", "tiny", None, gpu=True) == "vllm"
        assert choose.choose("auto", "tiny", None, gpu=False) == "transformers"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[1] == "engine: transformers, since there is no GPU"


ONE = {"math": {"task": "math"}}


def prepared(folder: Path, out: Path, run: str, **more: Any) -> tuple[str, TrainConfig]:
    """What samples the rollouts of a job, and the job."""
    config = prepare(job(folder, out, run, **more), resume=False)
    (engine,) = {rl.engine for rl in config.domain_settings.values()}
    return engine, config


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"gpus": 1.0, "domains_per_worker": 1}, ""),
        ({"domains_per_worker": 1}, "there is no GPU"),
        ({"gpus": 2.0, "domains_per_worker": 1}, "gpus: 2"),
        ({"gpus": 1.0}, "share a worker's model"),
        ({"gpus": 1.0, "domains_per_worker": 2, "domains": ONE}, "share a worker's model"),
        ({"gpus": 1.0, "domains_per_worker": "auto", "domains": ONE}, ""),
        ({"gpus": 1.0, "domains_per_worker": 1, "adapter": {"kind": "lora"}}, "SVF alone"),
    ],
)
def test_a_job_samples_by_vllm_where_its_model_has_a_gpu_of_its_own(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    more: dict[str, Any], why: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(choose, "installed", lambda: "0.33.0")
    with caplog.at_level(logging.INFO):
        engine, config = prepared(tiny_llama, tmp_path, "a", **more)
    assert engine == ("transformers" if why else "vllm")
    assert why in caplog.text
    assert config.rl.engine == engine  # what the run's file has, and what it goes on with
    assert prepared(tiny_llama, tmp_path, "b", **more, rl=RL | {"engine": "transformers"})[0] == "transformers"
