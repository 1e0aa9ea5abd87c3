"""Training: it learns, it is a function of its seed, it goes on after a stop or a kill as if there had been none."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small
import torch
from small import letter, letter_task, load_as, sampler, step_metrics, train_in_parallel, verify_letters
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import full_disk
from waiting import GUARD_S, wait_until

from t2ray.adapters.factors import decompose
from t2ray.adapters.model import Model
from t2ray.cluster.train.launch import train
from t2ray.config.rl import RLConfig
from t2ray.config.train import resolve
from t2ray.core import ConfigError, ResourceError, RewardError, RunError, user
from t2ray.experts.registry import Registry
from t2ray.grades import Grade
from t2ray.integrity import unseal
from t2ray.runs.folder import free_name, open_run, read_run
from t2ray.runs.prepare import prepare
from t2ray.runs.status import read_status
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER, latest
from t2ray.training.domain import EXPERT, RESULT, Result, domain_store, finished, train_domain
from t2ray.training.loss import LossTerms, Update, _micro_batches, advantages, backward
from t2ray.training.metrics import METRICS, StepMetrics, as_lines, notes, read_metrics
from t2ray.training.records import Records
from t2ray.training.trainer import Trained, Trainer

KEYS = {
    "step", "reward_mean", "accuracy", "kl", "loss", "grad_norm", "z_min", "z_max", "tokens_per_s", "seconds",
    "answer_tokens", "cut", "same_reward", "abstained", "timeouts", "errors", "skipped", "numbers", "peak_gib",
}  # fmt: skip


class Stopped(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("trainer"))


def settings(**changes: Any) -> RLConfig:
    values = {"steps": 7, "prompts": 4, "samples": 2, "eval_every": 2, "eval_prompts": 6, "micro_batch": 3, "lr": 0.05}
    return RLConfig(**(values | changes))


def trainer_of(model: Model, folder: Path | Store, rl: RLConfig, **changes: Any) -> Trainer:
    model.adapter.bank.clear()
    values = {"task": letter_task(), "verify": verify_letters, "seed": 0, "digest": "abc"} | changes
    store = folder if isinstance(folder, Store) else Store(folder)
    return Trainer(
        *sampler(model), values["task"], values["verify"], rl, store, seed=values["seed"], digest=values["digest"]
    )


def run(trainer: Trainer, report: Callable[[StepMetrics], None] = lambda row: None) -> Trained:
    return asyncio.run(trainer.run(report))


def told(folder: Path) -> str:
    """The one note of a run that is no alarm."""
    (line,) = [line for line in notes(Store(folder)) if not line.startswith("step ")]
    return line


def stop_after(step: int) -> Callable[[StepMetrics], None]:
    def report(row: StepMetrics) -> None:
        if row.step == step:
            raise Stopped

    return report


# ------------------------------------------------------------------------------------------------------------- learning


def test_further_updates_of_a_step_are_clipped_against_its_first(model: Model, tmp_path: Path) -> None:
    """The second update is one from the first's z, on the same rollouts, with the probabilities that they had."""
    rl = settings(updates=2, ratio_clip=0.01, kl=0.0, algorithm="rloo", samples=4)
    trainer = trainer_of(model, tmp_path / "a", rl)
    start_K = trainer.p_K.detach().clone()
    row, rollouts = asyncio.run(trainer.step(1))
    assert trainer.optimiser.state[trainer.p_K]["step"] == 2
    once = trainer_of(model, tmp_path / "b", rl.model_copy(update={"updates": 1}))
    first, _ = asyncio.run(once.step(1))
    assert (first.kl, first.loss, first.grad_norm) == (row.kl, row.loss, row.grad_norm)

    def backwards(z_K: torch.Tensor, **more: Any) -> tuple[torch.Tensor, LossTerms]:
        leaf_1K = z_K.detach()[None].clone().requires_grad_()
        rewards = torch.tensor([one.reward for one in rollouts], dtype=torch.float64)
        terms = backward(
            model, leaf_1K, rollouts, advantages(rewards, 4, "loo", 0.0).tolist(),
            lam=0.0, temperature=1.0, batch=len(rollouts), clip=0.01, **more,
        )  # fmt: skip
        assert leaf_1K.grad is not None
        return leaf_1K.grad[0], terms

    _, before = backwards(start_K)
    parts = before.chosen_N.split([len(one.completion.tokens) for one in rollouts])
    clipped_K, _ = backwards(once.p_K, before=parts)
    unclipped_K, _ = backwards(once.p_K)
    assert trainer.p_K.grad is not None
    norm = float(clipped_K.norm())
    torch.testing.assert_close(trainer.p_K.grad, clipped_K * min(1.0, 1 / norm), rtol=1e-3, atol=1e-4)
    assert float((clipped_K - unclipped_K).norm()) > 0.1 * float(unclipped_K.norm())


def test_without_means_of_earlier_gradients_each_step_moves_each_number_by_the_learning_rate(
    model: Model, tmp_path: Path
) -> None:
    """AdamW with betas [0, 0] is the gradient's sign; with its own, earlier gradients shorten and lengthen a step."""

    def second(**changes: Any) -> torch.Tensor:
        trainer = trainer_of(model, tmp_path / str(len(changes)), settings(schedule="constant", **changes))
        asyncio.run(trainer.step(1))
        before_K = trainer.p_K.detach().clone()
        asyncio.run(trainer.step(2))
        assert trainer.p_K.grad is not None
        return ((trainer.p_K.detach() - before_K) / 0.05)[trainer.p_K.grad.abs() > 1e-4].abs()

    torch.testing.assert_close(moved := second(betas=(0.0, 0.0)), torch.ones_like(moved), rtol=1e-2, atol=0)
    assert float((second() - 1).abs().mean()) > 0.1


def test_reinforce_raises_the_reward(model: Model, tmp_path: Path) -> None:
    rows: list[StepMetrics] = []
    rl = settings(steps=25, prompts=16, samples=2, eval_every=25, micro_batch=32, lr=0.1, kl=0.0)
    trained = run(trainer_of(model, tmp_path, rl), rows.append)
    first, last = (sum(row.reward_mean for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.3
    assert trained.accuracy > trained.base_accuracy
    assert rows[-1].kl > rows[0].kl


def test_the_penalty_keeps_the_policy_near_the_base(model: Model, tmp_path: Path) -> None:
    ends = {}
    for kl in (0.0, 5.0):
        rows: list[StepMetrics] = []
        run(trainer_of(model, tmp_path / str(kl), settings(steps=6, kl=kl, eval_every=6)), rows.append)
        ends[kl] = rows[-1].kl
    assert ends[5.0] < 0.5 * ends[0.0]


@pytest.mark.parametrize("init", ["scale", "sigmoid"])
def test_without_noise_training_starts_at_the_base_model(model: Model, tmp_path: Path, init: str) -> None:
    trainer_of(model, tmp_path, settings(init=init, sigma=0.0))
    torch.testing.assert_close(model.adapter.bank["letters"], torch.ones(model.adapter.size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["scale", "sigmoid"])
def test_noise_at_the_start_follows_the_seed(model: Model, tmp_path: Path, init: str) -> None:
    def start(seed: int) -> torch.Tensor:
        trainer_of(model, tmp_path, settings(init=init, sigma=0.1), seed=seed)
        return model.adapter.bank["letters"]

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))
    spread = float((start(1) - 1).std())
    assert (0.08 < spread < 0.12) if init == "scale" else (0.03 < spread < 0.07)  # 0.1 * (1 - sigmoid(0.1)) = 0.0475


def test_a_sigmoid_trains(model: Model, tmp_path: Path) -> None:
    rows: list[StepMetrics] = []
    run(trainer_of(model, tmp_path, settings(init="sigmoid", steps=3)), rows.append)
    assert all(row.grad_norm > 0 for row in rows) and rows[-1].z_max > 1 > rows[-1].z_min


def test_the_learning_rate_falls_along_a_cosine_to_a_tenth(model: Model, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, settings(steps=100, lr=1.0))
    rates = [trainer._lr(step) for step in range(1, 101)]
    assert rates[0] == 1.0 and rates[50] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates == sorted(rates, reverse=True)
    constant = trainer_of(model, tmp_path, settings(schedule="constant", lr=0.3))
    assert {constant._lr(step) for step in (1, 4, 7)} == {0.3}


def test_the_gradient_is_clipped(model: Model, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, settings(clip=1e-3))
    row, _ = asyncio.run(trainer.step(1))
    assert row.grad_norm > 1e-3  # before clipping
    assert trainer.p_K.grad is not None
    assert float(trainer.p_K.grad.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_micro_batches_are_within_rows_and_tokens_and_a_longer_sequence_is_alone() -> None:
    lengths = [2, 3, 3, 9, 4, 2]
    assert _micro_batches([0, 5, 1, 2, 4, 3], lengths, settings(micro_batch=3, micro_tokens=None)) == [
        [0, 5, 1],
        [2, 4, 3],
    ]
    assert _micro_batches([0, 5, 1, 2, 4, 3], lengths, settings(micro_batch=3, micro_tokens=8)) == [
        [0, 5],
        [1, 2],
        [4],
        [3],
    ]


def test_micro_batches_change_no_step(model: Model, tmp_path: Path) -> None:
    ends = []
    for size in (1, 3, 32):
        trainer = trainer_of(model, tmp_path, settings(micro_batch=size, schedule="constant"))
        row, _ = asyncio.run(trainer.step(1))
        assert trainer.p_K.grad is not None
        ends.append((trainer.p_K.grad.clone(), row.loss, row.kl))
    for gradient, loss, kl in ends[1:]:
        torch.testing.assert_close(gradient, ends[0][0], rtol=0, atol=1e-5 * float(gradient.abs().max()))
        assert (loss, kl) == pytest.approx(ends[0][1:], rel=1e-4, abs=1e-6)


def test_the_best_validation_is_what_remains(model: Model, tmp_path: Path) -> None:
    """The z that is kept is the one of the best validation, not the last: rewards turn against the policy half-way."""
    grades = iter([0.2] + [0.5, 0.9, 0.1, 0.3])
    validations: list[torch.Tensor] = []

    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        if rows[0]["text"].startswith("validation"):
            share = next(grades)
            validations.append(model.adapter.bank["letters"].clone())
            return [Grade.of(1.0 if i < share * len(rows) else -1.0) for i in range(len(rows))]
        return await verify_letters(completions, rows)

    rl = settings(steps=8, eval_every=2, eval_prompts=10)
    trained = run(trainer_of(model, tmp_path, rl, verify=verify))
    assert (trained.base_accuracy, trained.accuracy, trained.best_step) == (0.2, 0.9, 4)
    assert torch.equal(trained.z_K, validations[2]) and not torch.equal(trained.z_K, validations[-1])


def test_patience_ends_a_run_early(model: Model, tmp_path: Path) -> None:
    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        return [Grade.of(-1.0)] * len(completions)

    trained = run(trainer_of(model, tmp_path, settings(steps=40, patience=2), verify=verify))
    assert trained.steps == 4
    again = run(trainer_of(model, tmp_path, settings(steps=40, patience=2), verify=verify))
    assert again.steps == 4 and torch.equal(again.z_K, trained.z_K)  # an end is an end, also when resumed


# ------------------------------------------------------------------------------------------------------ reproducibility


def test_one_seed_gives_one_z_bit_for_bit(model: Model, tmp_path: Path) -> None:
    rows: dict[str, list[StepMetrics]] = {"a": [], "b": [], "c": []}
    z = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = trainer_of(model, tmp_path / name, settings(), seed=seed)
        trained = run(trainer, rows[name].append)
        z[name] = (trained.z_K, trainer.p_K.detach())
    assert torch.equal(z["a"][0], z["b"][0]) and torch.equal(z["a"][1], z["b"][1])
    assert not torch.equal(z["a"][1], z["c"][1])
    timed = {"seconds", "tokens_per_s", "peak_gib"}
    assert [{k: v for k, v in row.row().items() if k not in timed} for row in rows["a"]] == [
        {k: v for k, v in row.row().items() if k not in timed} for row in rows["b"]
    ]


@pytest.mark.parametrize(
    ("step", "changes"),
    [(step, {"init": init}) for step in (1, 2, 3, 5, 7) for init in ("scale", "sigmoid")]
    + [(3, {"algorithm": "grpo", "updates": 2, "lr": None})],
)
def test_a_run_that_was_stopped_ends_with_the_same_z(
    model: Model, tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    rl = settings(sigma=0.01, patience=9, **changes)
    whole = trainer_of(model, tmp_path / "whole", rl)
    expected = run(whole)
    with pytest.raises(Stopped):
        run(trainer_of(model, tmp_path / "stopped", rl), stop_after(step))
    resumed = trainer_of(model, tmp_path / "stopped", rl)
    assert resumed.progress.step == (7 if step == 7 else step // 2 * 2)  # checkpoints stand at 2, 4, 6 and the last
    trained = run(resumed)
    assert torch.equal(resumed.p_K, whole.p_K) and torch.equal(trained.z_K, expected.z_K)
    assert (trained.accuracy, trained.best_step, trained.base_accuracy) == (
        expected.accuracy, expected.best_step, expected.base_accuracy,
    )  # fmt: skip
    steps = [row.step for row in read_metrics(Store(tmp_path / "stopped"))]
    assert steps == sorted(events(tmp_path / "stopped", "loss")) == [1, 2, 3, 4, 5, 6, 7]  # each once


def test_a_checkpoint_of_another_configuration_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(trainer_of(model, tmp_path, settings()), stop_after(3))
    with pytest.raises(RunError, match="another configuration"):
        trainer_of(model, tmp_path, settings(), digest="abd")


def test_two_workers_make_the_step_that_one_makes(model: Model, tmp_path: Path) -> None:
    source = Path(model.hf.config._name_or_path).parent
    for name in ("model", "factors"):
        shutil.copytree(source / name, tmp_path / name)
    rl = settings(steps=1, prompts=5, samples=2, clip=1e9, baseline="loo")  # a raw gradient; shares of 3 and 2 prompts
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=train_in_parallel, args=(rank, 2, tmp_path, rl)) for rank in range(2)]
    for worker in workers:
        worker.start()
    alone = trainer_of(model, tmp_path / "alone", rl)
    rows: list[StepMetrics] = []
    run(alone, rows.append)
    for worker in workers:
        worker.join(GUARD_S)
        assert worker.exitcode == 0
    (rows_0, p_0, grad_0), (rows_1, p_1, grad_1) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(p_0, p_1) and torch.equal(grad_0, grad_1)
    assert alone.p_K.grad is not None
    torch.testing.assert_close(grad_0, alone.p_K.grad, rtol=0, atol=1e-6 * max(1.0, float(grad_0.abs().max())))
    for key in KEYS - {"seconds", "tokens_per_s", "peak_gib"} | {"validation"}:
        values = [rows_0[0][key], rows_1[0][key], rows[0].row()[key]]
        assert values[0] == values[1] == pytest.approx(values[2], rel=1e-5, abs=1e-6), key
    assert [row.step for row in read_metrics(Store(tmp_path / "run"))] == [1]  # the first worker alone writes


# -------------------------------------------------------------------------------------------------------------- records


def events(folder: Path, tag: str) -> dict[int, float]:
    """A scalar's values by step, as TensorBoard shows them."""
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {event.step: event.value for event in reader.Scalars(tag)}


def test_the_records_hold_what_they_must(model: Model, tmp_path: Path) -> None:
    run(trainer_of(model, tmp_path, settings()))
    rows = read_metrics(Store(tmp_path))
    assert [unseal(line) for line in (tmp_path / METRICS).read_text().splitlines()] == [row.row() for row in rows]
    assert [row.step for row in rows] == list(range(1, 8))
    for row in rows:
        validated = row.step in (2, 4, 6, 7)
        assert set(row.row()) == KEYS | ({"validation"} if validated else set())
        assert -1 <= row.reward_mean <= 1 and row.accuracy == pytest.approx((row.reward_mean + 1) / 2)
        assert row.z_min <= row.z_max and row.tokens_per_s > 0 and row.kl > -1e-4
    assert events(tmp_path, "reward_mean") == {row.step: pytest.approx(row.reward_mean) for row in rows}
    assert set(events(tmp_path, "validation")) == {2, 4, 6, 7}
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [f"step_{i:06d}.parquet" for i in range(1, 8)]
    table = pq.read_table(tmp_path / "rollouts" / "step_000003.parquet")
    assert table.column_names == [
        "example", "prompt", "completion", "prompt_ids", "token_ids", "logprobs", "finish_reason", "reward",
    ]  # fmt: skip
    assert table.num_rows == 8
    for line in table.to_pylist():
        ids = model.chat.encode(user(line["prompt"]))
        assert tuple(line["prompt_ids"]) == ids and model.chat.decode(line["token_ids"]) == line["completion"]
        assert len(line["logprobs"]) == len(line["token_ids"]) <= 3
        assert line["reward"] == letter(line["completion"], {}) and line["example"].startswith("letters/train/")


def test_a_line_that_a_kill_cut_short_is_no_row(tmp_path: Path) -> None:
    whole = as_lines([step_metrics(1)])
    (tmp_path / METRICS).write_text(as_lines([step_metrics(1), step_metrics(2)]) + '{"ste')
    assert [row.step for row in read_metrics(Store(tmp_path))] == [1, 2]
    Records(Store(tmp_path), 1).close()
    assert (tmp_path / METRICS).read_text() == whole


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_reward_that_fails_stops_the_run_and_leaves_its_checkpoints(model: Model, tmp_path: Path) -> None:
    calls: list[int] = []

    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        calls.append(1)
        if len(calls) == 6:  # the base, steps 1 and 2, a validation, step 3, step 4
            raise RewardError("the reward function 'm:f', for the completion 'x' of the example {}, raised")
        return await verify_letters(completions, rows)

    with pytest.raises(RewardError, match="m:f"):
        run(trainer_of(model, tmp_path, settings(), verify=verify))
    assert [row.step for row in read_metrics(Store(tmp_path))] == [1, 2, 3]
    stands = latest(Store(tmp_path), "abc")
    assert stands is not None and stands.progress.step == 2


def test_a_damaged_newest_checkpoint_is_noted_and_changes_no_z(model: Model, tmp_path: Path) -> None:
    trained = run(trainer_of(model, tmp_path / "whole", settings()))
    with pytest.raises(Stopped):
        run(trainer_of(model, tmp_path / "run", settings()), stop_after(5))
    newest = tmp_path / "run" / FOLDER / "step_000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = trainer_of(model, tmp_path / "run", settings())
    assert resumed.progress.step == 2
    assert torch.equal(run(resumed).z_K, trained.z_K)
    line = told(tmp_path / "run")
    assert line.startswith("checkpoints/step_000004.safetensors is damaged") and line.endswith("went on after step 2")


@pytest.mark.parametrize("what", ["gradient", "z"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_ends_the_run_with_the_last_finite_checkpoint(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float
) -> None:
    trainer = trainer_of(model, tmp_path, settings())

    def update(*args: Any) -> Update:
        done = Trainer.update(trainer, *args)
        if args[-1] < 5:
            return done
        if what == "gradient":
            return replace(done, grad_norm=value)
        trainer.p_K.data[3] = value
        return done

    monkeypatch.setattr(trainer, "update", update)
    with pytest.raises(RunError, match=r"^step 5: .*(is nan|is inf).*; the checkpoint before stands: lower rl\.lr"):
        run(trainer)
    assert [unseal(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3, 4]
    stands = latest(Store(tmp_path), "abc")
    assert stands is not None and stands.progress.step == 4
    assert bool(model.adapter.bank["letters"].isfinite().all())


def rewrite(path: Path, how: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    if how == "missing":
        path.unlink()
    else:
        odd = {"flipped": lines[1].replace('"step": 2', '"step": 3'), "NaN": '{"step": 2, "kl": NaN}\n',
               "cut": lines[1][:9] + "\n", "binary": "\udcff\n", "other keys": '{"a": 1}\n'}[how]  # fmt: skip
        path.write_bytes("".join([lines[0], odd, *lines[2:]]).encode(errors="surrogateescape"))


@pytest.mark.parametrize("how", ["missing", "flipped", "NaN", "cut", "binary", "other keys"])
def test_damaged_metrics_are_noted_and_the_run_goes_on(model: Model, tmp_path: Path, how: str) -> None:
    with pytest.raises(Stopped):
        run(trainer_of(model, tmp_path, settings()), stop_after(4))
    rewrite(tmp_path / METRICS, how)
    run(trainer_of(model, tmp_path, settings()))
    first = [] if how == "missing" else [1, 3, 4]
    assert [row.step for row in read_metrics(Store(tmp_path))] == [*first, 5, 6, 7]
    line = told(tmp_path)
    assert METRICS in line and f"of steps 1 to 4 it holds {len(first)}" in line


def test_metrics_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps(step_metrics(1).row()) + "\n")
    assert read_metrics(Store(tmp_path)) == [step_metrics(1)]


class FullAtStep4(Store):
    """A disk that is full when the second checkpoint is written."""

    def write_tensors(self, path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        if "step_000004" in path:
            with full_disk():
                super().write_tensors(path, tensors, metadata)
        super().write_tensors(path, tensors, metadata)


def test_a_run_whose_disk_was_full_goes_on_from_the_checkpoint_before(model: Model, tmp_path: Path) -> None:
    whole = trainer_of(model, tmp_path / "whole", settings())
    run(whole)
    with pytest.raises(ResourceError, match="cannot write .*step_000004.* free some space"):
        run(trainer_of(model, FullAtStep4(tmp_path / "full"), settings()))
    assert Store(tmp_path / "full").names(FOLDER) == ["step_000002.safetensors"]
    resumed = trainer_of(model, tmp_path / "full", settings())
    run(resumed)
    assert torch.equal(resumed.p_K, whole.p_K)


@pytest.mark.parametrize("what", [METRICS, "rollouts"])
def test_records_that_cannot_be_written_are_the_disks_fault_and_no_traceback(
    model: Model, tmp_path: Path, what: str
) -> None:
    def spoil(row: dict[str, Any]) -> None:
        if row.step == 2:
            path = tmp_path / what
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.mkdir() if what == METRICS else path.touch()

    with pytest.raises(ResourceError, match="free some space"):
        run(trainer_of(model, tmp_path, settings()), spoil)


def test_a_prompt_that_does_not_fit_the_model_is_a_clear_mistake(model: Model, tmp_path: Path) -> None:
    task = replace(letter_task(), max_tokens=600, to_end=False)
    with pytest.raises(ConfigError, match="exceed the model's context of 512"):
        run(trainer_of(model, tmp_path, settings(), task=task))


# ----------------------------------------------------------------------------------------------------------------- jobs

# Near its end the run stands still, so that whoever kills it is never too late.
JOB = """
import sys, time
from t2ray.config.train import TrainConfig
from t2ray.training.domain import train_domain

def report(row):
    while row.step == 50:
        time.sleep(1)

train_domain(TrainConfig.model_validate_json(open(sys.argv[1]).read()), "letters", report)
"""


def job(tiny_llama: Path, out: Path, run_name: str, **changes: Any) -> Any:
    """A job of one domain, `letters`, verified in the training process."""
    data = out / "letters.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    domain = {"data": str(data), "prompt": "{text}", "reward": "small:letter", "max_tokens": 3}
    values = {
        "model": str(tiny_llama), "out": str(out), "run": run_name, "domains": {"letters": domain}, "workers": 0,
        "cpus": 1, "verifiers": 0, "rl": settings().model_dump(), "code": str(Path(__file__).parent),
    }  # fmt: skip
    return resolve(values | changes, where="job.yaml")


def started(config: Any, *, resume: bool = False) -> Any:
    config = prepare(config, resume=resume)
    decompose(config.model, config.factors)
    open_run(config)
    return config


def test_every_prompt_of_a_run_is_made_with_what_the_job_says_to_the_chat_template(
    tiny_llama: Path, tmp_path: Path
) -> None:
    demands = "{% if not loud %}{{ raise_exception('be loud') }}{% endif %}"
    shutil.copytree(tiny_llama, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(demands + template.read_text())
    rl = settings(steps=1, prompts=1, eval_every=1, eval_prompts=1).model_dump()
    with pytest.raises(ConfigError, match="be loud"):
        started(job(tmp_path / "model", tmp_path, "plain", rl=rl))
    told = started(job(tmp_path / "model", tmp_path, "told", rl=rl, chat_template_kwargs={"loud": True}))
    train_domain(told, "letters", lambda row: None)
    assert [row.step for row in read_metrics(domain_store(told, "letters"))] == [1]


@pytest.mark.slow
def test_a_run_whose_process_was_killed_ends_with_the_same_z(tiny_llama: Path, tmp_path: Path) -> None:
    rl = settings(steps=60, prompts=2, eval_every=5).model_dump()
    whole = started(job(tiny_llama, tmp_path, "whole", rl=rl))
    train_domain(whole, "letters", lambda row: None)
    killed = started(job(tiny_llama, tmp_path, "killed", rl=rl))
    folder = Path(killed.out, "killed")
    process = subprocess.Popen([sys.executable, "-c", JOB, folder / "config.json"])
    metrics = folder / "domains" / "letters" / METRICS
    try:
        wait_until(
            lambda: process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) >= 12),
            "twelve steps",
        )
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    store = domain_store(killed, "letters")
    assert finished(store) is None and 12 <= len(read_metrics(store)) < 60
    resumed = started(job(tiny_llama, tmp_path, "killed", rl=rl), resume=True)
    train_domain(resumed, "letters", lambda row: None)
    expected = domain_store(whole, "letters").read_tensors(EXPERT)
    result = store.read_tensors(EXPERT)
    assert list(result) == list(expected)
    assert all(torch.equal(result[name], z) for name, z in expected.items())
    assert finished(store) == finished(domain_store(whole, "letters"))
    drop = {"seconds", "tokens_per_s", "peak_gib"}
    rows = [[{k: v for k, v in row.row().items() if k not in drop} for row in read_metrics(domain_store(c, "letters"))]
            for c in (whole, killed)]  # fmt: skip
    assert rows[0] == rows[1]


def test_a_run_name_that_exists_is_refused_unless_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    config = started(job(tiny_llama, tmp_path, "one"))
    prepare(job(tiny_llama, tmp_path, "one"), resume=False)  # no step has been made
    domain_store(config, "letters").write_text(METRICS, "{}\n")
    with pytest.raises(
        RunError, match=r"run 'one' exists in .*; go on with it by --resume, or choose another run=NAME"
    ):
        prepare(job(tiny_llama, tmp_path, "one"), resume=False)
    assert prepare(job(tiny_llama, tmp_path, "one"), resume=True) == read_run(str(tmp_path / "one"))


def test_a_resume_with_another_configuration_names_the_keys_that_differ(tiny_llama: Path, tmp_path: Path) -> None:
    config = started(job(tiny_llama, tmp_path, "one"))
    domain_store(config, "letters").write_text(METRICS, "{}\n")
    other = job(tiny_llama, tmp_path, "one", seed=3, workers=2, rl=settings(lr=0.5, kl=0.5).model_dump())
    with pytest.raises(RunError) as caught:
        prepare(other, resume=True)
    line = str(caught.value)
    assert "rl.lr: 0.05, now 0.5" in line and "seed: 0, now 3" in line and "rl.kl: 0.02, now 0.5" in line
    assert "workers" not in line and "steps" not in line and "\n" not in line


def test_a_run_that_could_not_begin_leaves_its_name_free(tiny_llama: Path, tmp_path: Path) -> None:
    config = started(job(tiny_llama, tmp_path, "one"))
    store = domain_store(config, "letters")
    store.write_text(METRICS, "")
    store.write_text("fault.json", "{}")
    Path(config.out, "one", "config.json").write_text("damaged")
    for resume in (False, True):
        prepare(job(tiny_llama, tmp_path, "one", seed=3), resume=resume)
    assert free_name(f"{config.out}/one") and not Path(config.out, "one", "domains").exists()
    config = started(job(tiny_llama, tmp_path, "one", seed=3))
    assert read_run(str(tmp_path / "one")).seed == 3
    store.write_text(METRICS, "{}\n")
    assert not free_name(f"{config.out}/one") and store.exists(METRICS)


def test_a_mistake_leaves_no_run_behind(tiny_llama: Path, tmp_path: Path) -> None:
    domain = {"data": str(tmp_path / "letters.jsonl"), "prompt": "{txt}", "reward": "small:letter"}
    with pytest.raises(ConfigError, match="txt"):
        prepare(job(tiny_llama, tmp_path, "one", domains={"letters": domain}), resume=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters.jsonl"]


def test_a_reward_that_is_no_number_names_the_function_and_the_example(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "letter", lambda completion, row: float("nan"))
    with pytest.raises(RewardError, match=r"'small:letter'.*'text': 'row \d+'.*returned nan; it must return a number"):
        train_domain(started(job(tiny_llama, tmp_path, "one")), "letters", lambda row: None)


def test_a_finished_domain_leaves_its_expert_and_figures(tiny_llama: Path, tmp_path: Path) -> None:
    config = started(job(tiny_llama, tmp_path, "one"))
    train_domain(config, "letters", lambda row: None)
    result = finished(domain_store(config, "letters"))
    assert result is not None and result.steps == 7
    z = domain_store(config, "letters").read_tensors(EXPERT)
    assert set(z) == {f"model.layers.{i}.{kind}_proj" for i in range(2) for kind in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in z.values())


@pytest.mark.parametrize("name", [RESULT, EXPERT])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_result_or_an_expert_that_is_lost_is_made_again_from_the_checkpoint(
    tiny_llama: Path, tmp_path: Path, name: str, how: str
) -> None:
    config = job(tiny_llama, tmp_path, "one", workers=0)
    results = train(config)
    store = domain_store(config, "letters")
    assert store.local is not None
    path, before = store.local / name, store.read_bytes(EXPERT)
    shutil.rmtree(tmp_path / "one" / "experts")
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name == EXPERT else data.replace(b"7", b"8", 1))
    if (name, how) != (RESULT, "missing"):
        (found,) = read_status(config)
        assert [line for line in found.damaged if name in line]
    assert train(config, resume=True) == results and store.read_bytes(EXPERT) == before
    (found,) = read_status(config)
    assert found.state == "done" and not found.damaged
    assert Registry(tmp_path / "one" / "experts").names() == ("letters",)


def test_a_result_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    figures = {"accuracy": 0.5, "base_accuracy": 0.25, "best_step": 3, "steps": 7}
    (tmp_path / RESULT).write_text(json.dumps(figures))
    assert finished(Store(tmp_path)) == Result(**figures)


def test_a_registry_keeps_an_expert_whose_run_has_lost_it(tiny_llama: Path, tmp_path: Path) -> None:
    config = job(tiny_llama, tmp_path, "one", workers=0)
    results = train(config)
    store = domain_store(config, "letters")
    store.delete(EXPERT)
    store.delete(FOLDER)
    assert train(config, resume=True) == results and not store.exists(EXPERT)


def test_each_rollout_has_its_choices_in_an_order_of_its_own_and_validation_the_files(
    model: Model, tmp_path: Path
) -> None:
    task = replace(letter_task(), shuffle=lambda row, rng: {"text": f"{row['text']} {rng.random()}"})

    def asked(folder: str, seed: int) -> dict[float, list[str]]:
        prompts: dict[float, list[str]] = {0.0: [], 1.0: []}
        trainer = trainer_of(model, tmp_path / folder, settings(steps=2), task=task, seed=seed)
        generate = trainer.generate

        async def listen(prompt: Any, mixture: Any, sampling: Any, /) -> Any:
            prompts[sampling.temperature].append(prompt[-1].content)
            return await generate(prompt, mixture, sampling)

        trainer.generate = listen
        run(trainer)
        return prompts

    first = asked("first", 0)
    assert len(first[1.0]) == 16 and len({text.split()[-1] for text in first[1.0]}) == 16
    assert len({text.rsplit(" ", 1)[0] for text in first[1.0]}) == 8  # two samples of each prompt
    assert {text for text in first[0.0]} == {f"validation {i}" for i in range(6)}
    assert asked("again", 0) == first and asked("other", 1)[1.0] != first[1.0]
