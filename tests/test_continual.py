"""A domain more in a registry that has some: nothing of the others is touched, and the classifier learns its label."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from t2ray.cluster.train.launch import train
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import ConfigError, Mixture, RunError, SamplingParams, user
from t2ray.experts.registry import Registry
from t2ray.integrity import seal
from t2ray.runs.status import read_status
from t2ray.training.domain import RESULT, Result, domain_store, finished
from t2ray.training.metrics import notes
from t2ray.workbench import Place, open_workbench

KNOWN = ("a", "b")


def job(
    folder: Path, model: Path, run: str, domains: Sequence[str], known: Sequence[str] = (), **changes: Any
) -> TrainConfig:
    """A job of one step for domains and the classifier `kind`; the `known` ones are not trained."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    every = {"max_tokens": 3, "publish": changes.pop("publish", "always")}
    own = {"data": str(folder / "rows.jsonl"), "reward": "small:letter"}
    values = {
        "model": str(model), "out": str(folder), "run": run, "experts": str(folder / "four" / "experts"), "workers": 0,
        "cpus": 1, "verifiers": 0, "code": str(Path(__file__).parent),
        "domains": {
            **{name: every | own | {"prompt": f"{name} {{text}}", "train": name not in known} for name in domains},
            "kind": every | {"others": str(folder / "rows.jsonl"), "prompt": "{text}"},
        },
        "rl": {"steps": 1, "prompts": 2, "samples": 2, "eval_every": 1, "eval_prompts": 2},
    }  # fmt: skip
    return resolve(values | changes, where="job.yaml")


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    train(job(folder, tiny_llama, "before", KNOWN))
    return folder


@pytest.fixture
def before(trained: Path, tiny_llama: Path, tmp_path: Path) -> TrainConfig:
    """A run of two domains and the classifier, and a registry that has their experts."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return job(tmp_path, tiny_llama, "before", KNOWN)


def files(config: TrainConfig) -> dict[str, bytes]:
    folder = Path(str(config.experts))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(config: TrainConfig) -> list[Any]:
    """The tokens and their log-probabilities of one batch of requests of several mixtures."""
    bench = open_workbench(Place(model=config.model, factors=config.factors, experts=config.experts, run=None))
    mixtures = [Mixture.of({"a": 1.0}), Mixture.of({"b": 1.0}), Mixture.of({"a": 0.3, "b": 0.6}), Mixture.base()]

    async def asked() -> list[Any]:
        sampling = SamplingParams(max_tokens=4)
        return await asyncio.gather(*(bench.engine.generate(user("row 1"), mixture, sampling) for mixture in mixtures))

    return [(answer.token_ids, answer.logprobs) for answer in asyncio.run(asked())]


def test_a_domain_more_leaves_the_others_bit_for_bit_and_the_classifier_names_them_all(before: TrainConfig) -> None:
    folder, model = Path(before.out), Path(before.model)
    registry, kept, said = Registry(str(before.experts)), files(before), answers(before)
    more = job(folder, model, "more", (*KNOWN, "c"), KNOWN)
    assert [*train(more)] == ["c", "kind"] == [one.domain for one in read_status(more)]
    assert sorted(path.name for path in (folder / "more" / "domains").iterdir()) == ["c", "kind"]
    assert {name: registry.versions(name) for name in registry.names()} == {
        "a": (1,),
        "b": (1,),
        "c": (1,),
        "kind": (1, 2),
    }
    assert registry.manifest("kind").labels == ("a", "b", "c", "others")
    assert {name: data for name, data in files(more).items() if name in kept} == kept and answers(more) == said

    alone = job(folder, model, "alone", ("c", "b"), ("c", "b"))  # the classifier alone, of some labels in another order
    assert [*train(alone)] == ["kind"]
    assert registry.versions("kind") == (1, 2, 3) and registry.manifest("kind").labels == ("c", "b", "others")


def test_a_classifier_is_refused_labels_of_which_there_is_no_expert(before: TrainConfig) -> None:
    folder, model = Path(before.out), Path(before.model)
    with pytest.raises(ConfigError, match="domains.kind would name a, b, of which .*elsewhere has no expert; name the"):
        train(job(folder, model, "more", (*KNOWN, "c"), KNOWN, experts=str(folder / "elsewhere")))
    assert not (folder / "more").exists()


def test_what_is_trained_changes_no_run_and_may_change_when_it_goes_on(before: TrainConfig) -> None:
    folder, model = Path(before.out), Path(before.model)
    part = job(folder, model, "part", (*KNOWN, "c"), KNOWN)
    whole = job(folder, model, "part", (*KNOWN, "c"))
    assert part.digest == whole.digest
    train(part)
    assert [*train(whole, resume=True)] == ["a", "b", "c", "kind"]
    (folder / "rows.jsonl").write_text('{"text": "another"}\n' * 20)
    with pytest.raises(RunError, match="domain 'a': its .* rows have changed"):  # they were noted when it came
        train(whole, resume=True)


def test_a_job_without_a_domain_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no domain is left to train; leave out train: false of one"):
        resolve({"domains": {"math": {"task": "math", "train": False}}}, where="job.yaml")


def test_a_classifier_waits_for_the_expert_that_it_names(before: TrainConfig) -> None:
    """The one before it stays, so that `cls` goes on."""
    folder, model = Path(before.out), Path(before.model)
    config = job(folder, model, "more", (*KNOWN, "c"), KNOWN, publish="better")
    train(config)

    def is_better(domain: str) -> None:
        store = domain_store(config, domain)
        result = finished(store)
        assert isinstance(result, Result)
        store.write_text(RESULT, seal(asdict(replace(result, better=True))))

    registry = Registry(str(config.experts))
    is_better("kind")
    train(config, resume=True)
    assert registry.names() == ("a", "b", "kind") and registry.versions("kind") == (1,)
    assert any("it names c, and no expert of that name" in line for line in notes(domain_store(config, "kind")))
    is_better("c")
    train(config, resume=True)
    assert registry.versions("c") == (1,) and registry.versions("kind") == (1, 2)
