"""Which engine computes where that is open: a decision without a GPU, and what it is told by a job."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_lockstep import RL, job
from test_trainer import started

from t2ray import workbench
from t2ray.adapters.model import load_model
from t2ray.config.train import TrainConfig
from t2ray.engine import choose
from t2ray.engine.choose import COMPARED, decided, unfit
from t2ray.engine.offline import OfflineEngine
from t2ray.experts.registry import Registry
from t2ray.models.weights import open_weights
from t2ray.runs.prepare import prepare
from t2ray.training.domain import domain_store
from t2ray.training.metrics import METRICS
from t2ray.workbench import Place, open_workbench


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


def test_a_domain_that_leaves_its_sampler_open_goes_on_with_that_of_its_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains = job(tiny_llama, tmp_path, "a").model_dump(mode="json", exclude_none=True)["domains"]
    for domain in domains.values():
        domain["rl"]["engine"] = "auto"
    again = {"domains": domains, "gpus": 1.0, "domains_per_worker": 1}
    for installed, later, kind in ((None, "0.33.0", "transformers"), ("0.33.0", None, "vllm")):
        monkeypatch.setattr(choose, "installed", lambda version=installed: version)
        engine, config = prepared(tiny_llama, tmp_path, kind, **again)
        assert engine == kind
        domain_store(started(config), "letters").write_text(METRICS, "{}\n")
        monkeypatch.setattr(choose, "installed", lambda version=later: version)
        config = prepare(job(tiny_llama, tmp_path, kind, **again), resume=True)
        assert {rl.engine for rl in config.domain_settings.values()} == {kind}


@pytest.mark.parametrize("trained", [False, True])
def test_experts_that_vllm_cannot_run_are_answered_with_by_transformers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trained: bool
) -> None:
    """Also before there is one, where the run says what they will be."""
    monkeypatch.setattr(choose, "installed", lambda: "0.33.0")
    gpu = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(workbench, "torch", gpu)  # the model itself is loaded to where it can be
    config = prepared(tiny_llama, tmp_path, "a", adapter={"kind": "lora"})[1]
    if trained:
        adapter = load_model(str(tiny_llama), "", adapter=(lora := config.trained)).adapter
        digest = open_weights(str(tiny_llama)).digest
        Registry(str(config.experts)).save("math", adapter.split(adapter.neutral), base_digest=digest, adapter=lora)
    place = Place(model=str(tiny_llama), factors=None, experts=config.experts, run=config)
    with caplog.at_level(logging.INFO):
        bench = open_workbench(place, engine="auto")
    assert isinstance(bench.engine, OfflineEngine) and bench.experts == (("math",) if trained else ())
    assert "vLLM runs experts of SVF alone, and these are of lora" in caplog.text
