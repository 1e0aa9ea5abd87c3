"""Several domains on one model: each is trained as it is alone, and what becomes of one is nothing to the others."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import letter_task, load_as, verify_letters
from test_trainer import Stopped, settings, started

from t2ray.adapters.model import Model
from t2ray.cluster.train.domains import split
from t2ray.cluster.train.launch import DomainsFailed, _run_here, _together, train
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import Completion, ConfigError, Mixture, SamplingParams
from t2ray.engine.offline import OfflineEngine
from t2ray.grades import Rollout
from t2ray.runs.prepare import prepare
from t2ray.runs.status import read_status
from t2ray.store import Store
from t2ray.testing import FakeGenerate
from t2ray.training.domain import EXPERT, domain_store, finished, train_domain
from t2ray.training.lockstep import Lockstep, train_domains
from t2ray.training.metrics import StepMetrics, read_metrics
from t2ray.training.trainer import Trainer

NAMES = ("letters", "long", "sorted")
RL = settings(steps=4, eval_every=2, eval_prompts=4).model_dump()


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("lockstep"))


def job(model: Path, out: Path, name: str, **changes: Any) -> TrainConfig:
    """A job of three domains that differ in data, length and settings, verified in the training process."""
    data = out / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {i}", "more": "word " * (i % 7)}) + "\n" for i in range(40)))
    own = {"data": str(data), "prompt": "{text}", "reward": "small:letter", "max_tokens": 3, "publish": "always"}
    domains = {
        "letters": own,
        "long": own | {"prompt": "{more}{text}", "max_tokens": 6, "rl": {"lr": 0.02, "samples": 3}},
        "sorted": own | {"prompt": "sort {text}", "rl": {"prompts": 5, "eval_every": 3, "kl": 0.1, "steps": 5}},
    }
    values = {
        "model": str(model), "out": str(out), "run": name, "domains": domains, "workers": 0, "cpus": 1,
        "verifiers": 0, "rl": RL, "code": str(Path(__file__).parent), "domains_per_worker": 3,
    }  # fmt: skip
    return resolve(values | changes, where="job.yaml")


def together(config: TrainConfig, report: Any = lambda domain, row: None) -> dict[str, str]:
    return train_domains(config, tuple(config.domains), report, lambda domain, why: None)


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A job that was trained in lockstep to its end, undisturbed."""
    config = job(tiny_llama, tmp_path_factory.mktemp("whole"), "whole")
    train(config)
    return config


def expert(config: TrainConfig, domain: str) -> torch.Tensor:
    return torch.cat(list(domain_store(config, domain).read_tensors(EXPERT).values()))


# -------------------------------------------------------------------------------------------------- who waits for whom


def ask(of: Any, name: str) -> Any:
    return of(name)(name, Mixture.base(), SamplingParams(max_tokens=9))


def test_calls_wait_for_every_other_and_go_in_the_order_of_names() -> None:
    fake = FakeGenerate(lambda prompt, mixture: str(prompt))
    rounds = Lockstep(fake, ("a", "b", "c"))

    async def check() -> None:
        b = [asyncio.ensure_future(ask(rounds.of, "b")) for _ in range(2)]
        a = asyncio.ensure_future(ask(rounds.of, "a"))
        await asyncio.sleep(0.01)
        assert not fake.calls
        answers: list[Completion] = await asyncio.gather(ask(rounds.of, "c"), a, *b)
        assert [answer.text for answer in answers] == ["c", "a", "b", "b"]

    asyncio.run(check())
    assert [prompt for prompt, *_ in fake.calls] == ["a", "b", "b", "c"] and fake.peak == 4


def test_one_that_leaves_is_not_waited_for() -> None:
    fake = FakeGenerate(lambda prompt, mixture: str(prompt))
    rounds = Lockstep(fake, ("a", "b"))

    async def check() -> None:
        waiting = asyncio.ensure_future(ask(rounds.of, "a"))
        await asyncio.sleep(0.01)
        assert not fake.calls
        rounds.leave("b")
        await waiting
        await ask(rounds.of, "a")  # alone, from now on

    asyncio.run(check())
    assert len(fake.calls) == 2


# --------------------------------------------------------------------------------------------------------- as if alone


def trainers(model: Model, folder: Path, generates: dict[str, Any], engine: OfflineEngine) -> list[Trainer]:
    rls = {"letters": settings(), "long": settings(samples=3, lr=0.02), "sorted": settings(kl=0.1, prompts=6)}
    return [
        Trainer(
            model, generate, lambda name, z_K: engine.set_experts({name: z_K}), letter_task(name), verify_letters,
            rls[name].model_copy(update={"sigma": 0.05}), Store(folder / name), seed=3, digest="x",
        )  # fmt: skip
        for name, generate in generates.items()
    ]  # fmt: skip


def test_a_step_of_several_domains_is_one_batch_and_each_ones_step_alone(model: Model, tmp_path: Path) -> None:
    engine = OfflineEngine(model)
    rounds = Lockstep(engine.generate, NAMES)

    async def step(all_of: list[Trainer]) -> list[tuple[StepMetrics, list[Rollout]]]:
        return list(await asyncio.gather(*(one.step(1) for one in all_of)))

    beside = trainers(model, tmp_path / "beside", {name: rounds.of(name) for name in NAMES}, engine)
    found = asyncio.run(step(beside))
    assert engine.stats.steps == 1 and engine.stats.rows == 8 + 12 + 12 and engine.stats.mixtures == 3
    alone = trainers(model, tmp_path / "alone", dict.fromkeys(NAMES, engine.generate), engine)
    for one, other, (row, rollouts) in zip(alone, beside, found, strict=True):
        (expected, own), moved_K = asyncio.run(one.step(1)), one.p_K.detach()
        torch.testing.assert_close(other.p_K.detach(), moved_K, rtol=0, atol=1e-6)
        assert [r.completion.token_ids for r in rollouts] == [r.completion.token_ids for r in own]
        assert (row.kl, row.loss, row.grad_norm) == pytest.approx(
            (expected.kl, expected.loss, expected.grad_norm), rel=1e-5, abs=1e-7
        )


def test_whole_runs_of_several_domains_end_as_each_does_alone(
    whole: TrainConfig, tiny_llama: Path, tmp_path: Path
) -> None:
    alone = started(job(tiny_llama, tmp_path, "alone"))
    for domain in NAMES:
        train_domain(alone, domain, lambda row: None)
        torch.testing.assert_close(expert(whole, domain), expert(alone, domain), rtol=0, atol=1e-6)
        made, expected = (finished(domain_store(config, domain)) for config in (whole, alone))
        assert made is not None and expected is not None
        assert (made.steps, made.best_step, made.accuracy) == (expected.steps, expected.best_step, expected.accuracy)
        assert [row.step for row in read_metrics(domain_store(whole, domain))] == [*range(1, made.steps + 1)]


@pytest.mark.parametrize("stops", [NAMES, ("long",)], ids=["all", "one, and the others go on"])
def test_a_resumed_run_ends_with_the_same_numbers_bit_for_bit(
    whole: TrainConfig, tiny_llama: Path, tmp_path: Path, stops: tuple[str, ...]
) -> None:
    """Whatever each domain's newest checkpoint is: of step 2, of step 3, or the end."""
    stopped = started(job(tiny_llama, tmp_path, "stopped"))

    def stop(domain: str, row: StepMetrics) -> None:
        if row.step == 3 and domain in stops:
            raise Stopped

    with pytest.raises(Stopped):
        together(stopped, stop)
    done = [domain for domain in NAMES if finished(domain_store(stopped, domain))]
    assert done == [domain for domain in NAMES if domain not in stops]
    assert together(started(job(tiny_llama, tmp_path, "stopped"), resume=True)) == {}
    for domain in NAMES:
        assert torch.equal(expert(whole, domain), expert(stopped, domain)), domain
        rows = [[(r.step, r.kl, r.loss) for r in read_metrics(domain_store(c, domain))] for c in (whole, stopped)]
        assert rows[0] == rows[1]


# ------------------------------------------------------------------------------------------------- one domain's trouble


def broken(config: TrainConfig, domain: str, folder: Path) -> TrainConfig:
    """The job with a reward for one domain that fails in its third step, until the file `mended` is there."""
    (folder / "broken.py").write_text(f"""
import small
calls = []

def letter(completion, row):
    calls.append(1)
    if len(calls) > 4 + 2 * 12 + 1 and not __import__("os").path.exists({str(folder / "mended")!r}):
        raise ZeroDivisionError("reward")
    return small.letter(completion, row)
""")
    reward = config.domains[domain].model_copy(update={"reward": "broken:letter"})
    return config.model_copy(update={"domains": config.domains | {domain: reward}, "code": str(folder)})


def test_a_domain_that_fails_leaves_the_others_and_a_resume_trains_it_alone(
    whole: TrainConfig, tiny_llama: Path, tmp_path: Path
) -> None:
    config = broken(job(tiny_llama, tmp_path, "half"), "long", tmp_path)
    seen: set[tuple[str, str]] = set()

    def tick(config: TrainConfig) -> None:
        seen.update((one.domain, one.state) for one in read_status(config))

    with pytest.raises(DomainsFailed, match=r"^domain 'long' failed: .*ZeroDivisionError: reward; --resume") as told:
        train(config, tick=tick)
    assert len(str(told.value).splitlines()) == 1
    assert {("long", "failed"), ("letters", "running")} <= seen  # told at once
    assert {one.domain: one.state for one in read_status(config)} == {
        "letters": "done", "long": "failed", "sorted": "done"
    }  # fmt: skip
    before = domain_store(config, "letters").read_bytes("result.json")
    (tmp_path / "mended").touch()
    train(config, resume=True)
    assert domain_store(config, "letters").read_bytes("result.json") == before
    for domain in NAMES:
        torch.testing.assert_close(expert(config, domain), expert(whole, domain), rtol=0, atol=1e-6)


def test_with_fail_fast_a_domain_that_fails_ends_the_others_of_its_worker(tiny_llama: Path, tmp_path: Path) -> None:
    config = broken(job(tiny_llama, tmp_path, "fast", fail_fast=True), "long", tmp_path)
    with pytest.raises(DomainsFailed, match="^domain 'long' failed: "):
        train(config)
    assert not any(finished(domain_store(config, domain)) for domain in NAMES)


def test_a_worker_whose_model_is_gone_fails_for_all_of_its_domains(tiny_llama: Path, tmp_path: Path) -> None:
    config = started(job(tiny_llama, tmp_path, "gone"))
    failed = _run_here(config.model_copy(update={"model": str(tmp_path / "gone")}), lambda config: None)
    assert list(failed) == list(NAMES) and all("gone" in why for why in failed.values()), failed
    assert {one.state for one in read_status(config)} == {"failed"}


# ------------------------------------------------------------------------------------------------------- how many there


@pytest.mark.parametrize(
    ("domains", "together", "groups"),
    [("abcde", 1, ["a", "b", "c", "d", "e"]), ("abcde", 4, ["ab", "cde"]), ("abc", 8, ["abc"]), ("", 2, [])],
)
def test_domains_are_split_evenly_in_their_order(domains: str, together: int, groups: list[str]) -> None:
    assert split(domains, together) == [tuple(group) for group in groups]


@pytest.mark.parametrize(
    ("workers", "rl", "expected"),
    [
        (3, {}, 1),  # each has a worker
        (2, {}, 2),
        (1, {}, 3),
        (1, {"prompts": 64, "samples": 4}, 2),  # 512 rows are one batch
        (1, {"prompts": 512, "samples": 4}, 1),
        (1, {"engine": "vllm"}, 1),
    ],
)
def test_auto_is_as_many_as_would_else_wait_and_as_one_batch_has_room_for(
    tmp_path: Path, workers: int, rl: dict[str, Any], expected: int
) -> None:
    domains = {name: {"task": "math"} for name in NAMES}
    config = resolve({"domains": domains, "rl": rl, "domains_per_worker": "auto", "gpus": 1}, where="job.yaml")
    assert _together(config, workers) == expected
    assert _together(config.model_copy(update={"gpus": 0.0}), workers) == 1  # where a pass costs what its rows cost
    assert _together(config.model_copy(update={"domains_per_worker": 2}), workers) == 2


def test_what_cannot_share_a_model_is_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="domains_per_worker: 3 needs workers: 1 or 0, not '1-2'$"):
        job(tiny_llama, tmp_path, "shares", workers="1-2")
    with pytest.raises(ConfigError, match="domains_per_worker"):
        job(tiny_llama, tmp_path, "none", domains_per_worker=0)
    with pytest.raises(ConfigError, match="vLLM samples for one domain; use domains_per_worker: 1$"):
        prepare(job(tiny_llama, tmp_path, "vllm", rl=RL | {"engine": "vllm"}), resume=False)
    assert job(tiny_llama, tmp_path, "a").digest == job(tiny_llama, tmp_path, "a", domains_per_worker=1).digest
