"""A run that learned nothing looks like one: steps without a signal, ties, abstentions, faults, and what is told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import letter, letter_task, load_as, step_metrics, verify_letters
from test_trainer import Stopped, events, run, settings, stop_after, trainer_of

from t2ray.adapters.model import Model
from t2ray.config.rl import RLConfig
from t2ray.core import user
from t2ray.grades import Grade, Verify
from t2ray.store import Store
from t2ray.tasks.fits import long_prompts, without
from t2ray.tasks.task import Task
from t2ray.training.alarms import Alarms
from t2ray.training.checkpoint import latest
from t2ray.training.counts import as_counts, counted
from t2ray.training.loss import Weighed
from t2ray.training.metrics import StepMetrics, notes, read_metrics


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("signal"))


def verifying(reward: Any) -> Verify:
    """A verifier of this process: `reward(completion, row, call)`, where calls count from 0."""
    calls = [0]

    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        call, calls[0] = calls[0], calls[0] + 1
        return [
            found if isinstance(found, Grade) else Grade.of(found)
            for found in (reward(text, row, call) for text, row in zip(completions, rows, strict=True))
        ]

    return verify


# ---------------------------------------------------------------------------------------------------------- no signal


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("reward", [-1.0, 0.1, 1.0])
def test_a_run_without_a_signal_leaves_z_at_the_base_and_says_so(
    model: Model, tmp_path: Path, baseline: str, reward: float
) -> None:
    rl = settings(baseline=baseline, lr=0.1)
    trainer = trainer_of(model, tmp_path, rl, verify=verifying(lambda text, row, call: reward))
    trained = run(trainer)
    assert torch.equal(trained.z_K, model.adapter.neutral) and torch.equal(trainer.p_K, model.adapter.neutral)
    assert (trained.best_step, trained.better) == (0, False)
    rows = read_metrics(Store(tmp_path))
    assert [row.skipped for row in rows] == [1] * 7 and trainer.progress.skipped == 7
    assert [row.same_reward for row in rows] == [1.0] * 7 and set(events(tmp_path, "skipped").values()) == {1.0}
    assert [line for line in notes(Store(tmp_path)) if "no signal" in line] == [
        "step 1: no signal: the rewards do not tell a prompt's answers apart; such a step leaves z as it is and is "
        "counted. Use prompts that the base answers now and then, a finer reward, or more rl.samples"
    ]


def test_a_step_without_a_signal_is_as_if_it_had_not_been(model: Model, tmp_path: Path) -> None:
    """Neither z nor AdamW's moments know of steps 2 and 3; also when the run was stopped between them."""

    def reward(text: str, row: Mapping[str, Any], call: int) -> float:
        return letter(text, row) if call in (1, 4) else -1.0  # the base, steps 1 to 4

    rl = settings(steps=4, schedule="constant", kl=0.1, eval_every=9)
    trainer = trainer_of(model, tmp_path / "all", rl, verify=verifying(reward))
    moved = []
    for step in (1, 2, 3, 4):
        row, rollouts = asyncio.run(trainer.step(step)) if step > 1 else asyncio.run(first(trainer))
        moved.append((row.skipped, trainer.p_K.detach().clone()))
    assert [skipped for skipped, _ in moved] == [0, 1, 1, 0]
    assert torch.equal(moved[0][1], moved[2][1]) and not torch.equal(moved[2][1], moved[3][1])
    state = trainer.optimiser.state[trainer.p_K]
    assert float(state["step"]) == 2.0


async def first(trainer: Any) -> Any:
    await trainer._begin()
    return await trainer.step(1)


def test_a_run_with_skipped_steps_that_was_stopped_ends_with_the_same_z(model: Model, tmp_path: Path) -> None:
    def verify() -> Verify:
        # by the prompts: what a step's rewards are must not depend on how often it was begun
        return verifying(lambda text, row, call: letter(text, row) if row["text"] < "train 5" else -1.0)

    rl = settings(steps=12, prompts=1, samples=2, baseline="loo")
    whole = trainer_of(model, tmp_path / "whole", rl, verify=verify())
    expected = run(whole)
    assert 0 < whole.progress.skipped < 12
    with pytest.raises(Stopped):
        run(trainer_of(model, tmp_path / "stopped", rl, verify=verify()), stop_after(7))
    resumed = trainer_of(model, tmp_path / "stopped", rl, verify=verify())
    trained = run(resumed)
    assert torch.equal(resumed.p_K, whole.p_K) and torch.equal(trained.z_K, expected.z_K)
    assert resumed.progress.skipped == whole.progress.skipped


def test_the_paper_without_a_baseline_learns_from_equal_rewards(model: Model, tmp_path: Path) -> None:
    rl = settings(baseline="none", samples=1)
    trainer = trainer_of(model, tmp_path, rl, verify=verifying(lambda text, row, call: -1.0))
    row, _ = asyncio.run(trainer.step(1))
    assert row.skipped == 0 and row.grad_norm > 1e-3 and not torch.equal(trainer.p_K, model.adapter.neutral)


def test_of_equal_validations_the_earlier_z_is_kept(model: Model, tmp_path: Path) -> None:
    grades = iter([0.2, 0.5, 0.5, 0.4, 0.5])
    share = [0.0]

    def reward(text: str, row: Mapping[str, Any], call: int) -> float:
        if not row["text"].startswith("validation"):
            return letter(text, row)
        if row["text"] == "validation 0":
            share[0] = next(grades)
        return 1.0 if int(row["text"].split()[1]) < 10 * share[0] else -1.0

    rl = settings(steps=8, eval_every=2, eval_prompts=10)
    trained = run(trainer_of(model, tmp_path, rl, verify=verifying(reward)))
    assert (trained.best_step, trained.better, trained.accuracy, trained.stale) == (2, True, 0.5, 3)


# --------------------------------------------------------------------------------------------------------- abstentions


def test_rollouts_without_a_reward_leave_the_batch(model: Model, tmp_path: Path) -> None:
    """The step is the one of the prompts that are left: their gradient, divided by their number."""
    ends = []
    for abstains in (True, False):
        rl = settings(prompts=4 if abstains else 2, clip=1e9, baseline="mean", samples=2, kl=0.5, sigma=0.1)
        trainer = trainer_of(model, tmp_path / str(abstains), rl)
        kept = {example.row["text"] for example in trainer.train[:2]}
        trainer.train = trainer.train[:4]

        def grade(text: str, row: Mapping[str, Any], call: int, kept: set[str] = kept) -> float | None:
            return float(len(text) / 10) if row["text"] in kept else None

        rollouts = asyncio.run(rolled(trainer, grade, range(4) if abstains else range(2)))
        counts = as_counts(counted(rollouts, 2, ()), ())
        assert counts.figures["abstained"] == (4 if abstains else 0) and counts.graded == 4
        rewards = torch.tensor([float("nan") if r.reward is None else r.reward for r in rollouts], dtype=torch.float64)
        from t2ray.training.loss import advantages

        advantage = advantages(rewards, 2, "mean", counts.reward / counts.graded).tolist()
        part = Weighed(rollouts=rollouts, advantage_B=advantage, share_B=[1.0] * len(rollouts))
        done = trainer.update([part], int(counts.graded), 1)
        assert trainer.p_K.grad is not None
        ends.append((trainer.p_K.grad.clone(), done.loss, done.kl, done.tokens))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-6 * float(ends[1][0].abs().max()))
    assert ends[0][1:] == pytest.approx(ends[1][1:])


async def rolled(trainer: Any, reward: Any, places: range) -> Any:
    from t2ray.training.rollout import roll_out, rollout_seed

    seeds = [[rollout_seed(0, 1, i, j) for j in range(2)] for i in places]
    examples = [trainer.train[i] for i in places]
    return await roll_out(trainer.generate, verifying(reward), examples, trainer.policy, trainer.sampling, seeds)


def test_a_verifier_that_always_abstains_moves_nothing_and_is_told(model: Model, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, settings(steps=2), verify=verifying(lambda text, row, call: None))
    trained = run(trainer)
    rows = read_metrics(Store(tmp_path))
    assert [(row.reward_mean, row.accuracy, row.abstained, row.skipped) for row in rows] == [(None, None, 8, 1)] * 2
    assert not trained.better and "the verifier abstained from all answers" in notes(Store(tmp_path))[-1]


# ---------------------------------------------------------------------------------------------------- what is counted


def test_the_metrics_count_lengths_cuts_faults_and_each_reward(model: Model, tmp_path: Path) -> None:
    def reward(text: str, row: Mapping[str, Any], call: int) -> Grade:
        if row["text"].startswith("validation"):
            return Grade(reward=-1.0, right=False, fault="timeout")
        parts = {"a:f": 1.0, "b:g": letter(text, row)}
        return Grade(reward=parts["b:g"] / 2, right=True, parts=parts, fault="error" if text[:1] == "a" else None)

    task = replace(letter_task(), reward={"a:f": 1.0, "b:g": 2.0})
    rl = settings(steps=2, eval_prompts=6)
    run(trainer_of(model, tmp_path, rl, verify=verifying(reward), task=task))
    rows = read_metrics(Store(tmp_path))
    assert rows[0].timeouts == 6 and rows[1].timeouts == 0  # of the base's validation, and of none since
    assert rows[0].rewards["a:f"] == 1.0 and rows[0].values["reward/a.f"] == 1.0
    assert rows[0].rewards["b:g"] / 2 == pytest.approx(rows[0].reward_mean)
    assert 0 < (rows[0].answer_tokens or 0) <= 3 and 0 < (rows[0].cut or 0) <= 1
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "rollouts" / "step_000001.parquet").to_pylist()
    assert [line["a:f"] for line in table] == [1.0] * 8
    assert sum(line["finish_reason"] == "length" for line in table) / 8 == rows[0].cut
    assert sum(len(line["token_ids"]) for line in table) / 8 == rows[0].answer_tokens


def told(*rows: StepMetrics) -> list[str]:
    alarms = Alarms(RLConfig(), "7 tokens")
    return [line for row in rows for line in alarms.of(row)]


def test_an_alarm_is_told_once_at_the_first_step_that_gives_cause() -> None:
    rows = [step_metrics(step, cut=cut) for step, cut in enumerate((0.1, 0.6, 1.0), 1)]
    assert told(*rows) == [
        "step 2: 60% of the answers were cut at 7 tokens, before they ended; raise the domain's max_tokens, or ask for "
        "shorter answers"
    ]
    assert told(step_metrics(1, timeouts=1), step_metrics(2, timeouts=0)) == []
    (line,) = told(step_metrics(1, timeouts=1), step_metrics(2, timeouts=1), step_metrics(3, timeouts=9))
    assert line.startswith("step 2: the reward function ran out of time for 2 answers so far")
    (line,) = told(step_metrics(1, errors=0), step_metrics(2, errors=3))
    assert line.startswith("step 2: the reward function failed for 3 answers")


@pytest.mark.parametrize(
    ("kl", "leaps"), [([0.0, 0.003, 0.44], True), ([0.0, 0.35], True), ([0.0, 0.1, 0.2, 0.35, 0.5], False)]
)
def test_a_leap_of_the_kl_is_told(kl: list[float], leaps: bool) -> None:
    lines = told(*(step_metrics(step, kl=value) for step, value in enumerate(kl, 1)))
    assert bool(lines) == leaps
    assert not leaps or f"leapt from {kl[-2]:.3f} to {kl[-1]:.3f} nats per token" in lines[0]


def test_a_resumed_run_tells_no_alarm_twice(model: Model, tmp_path: Path) -> None:
    verify = verifying(lambda text, row, call: -1.0)
    with pytest.raises(Stopped):
        run(trainer_of(model, tmp_path, settings(), verify=verify), stop_after(4))
    before = notes(Store(tmp_path))
    run(trainer_of(model, tmp_path, settings(), verify=verify))
    assert notes(Store(tmp_path)) == before and len(before) >= 1


# ------------------------------------------------------------------------------------------------- longer, and forked


def test_a_run_that_is_made_longer_ends_where_a_longer_one_does(model: Model, tmp_path: Path) -> None:
    rl = settings(schedule="constant")
    run(trainer_of(model, tmp_path / "grown", rl.model_copy(update={"steps": 4})))
    grown = trainer_of(model, tmp_path / "grown", rl)
    assert grown.progress.step == 4 and not grown.progress.done
    ends = [run(grown)]
    whole = trainer_of(model, tmp_path / "whole", rl)
    ends.append(run(whole))
    assert torch.equal(grown.p_K, whole.p_K) and torch.equal(ends[0].z_K, ends[1].z_K)
    assert [row.step for row in read_metrics(Store(tmp_path / "grown"))] == list(range(1, 8))


@pytest.mark.parametrize("init", ["scale", "sigmoid"])
def test_a_run_may_go_on_from_anothers_vector(model: Model, tmp_path: Path, init: str) -> None:
    first = trainer_of(model, tmp_path / "first", settings(init=init, sigma=0.3))
    run(first)
    start_K = first._z().detach().clone()
    model.adapter.bank.clear()
    from small import sampler

    from t2ray.training.trainer import Trainer

    rl = settings(init=init, steps=1, lr=1e-9)
    forked = Trainer(
        *sampler(model), letter_task(), verify_letters, rl, Store(tmp_path / init), seed=0, digest="x", start_K=start_K
    )
    torch.testing.assert_close(forked._z(), start_K, rtol=1e-4, atol=1e-5)
    trained = run(forked)
    better = read_metrics(Store(tmp_path / init))[0].validation or 0.0
    assert trained.better == (better > trained.base_accuracy) and trained.best_step == 0


def test_a_checkpoint_of_an_earlier_version_is_read(model: Model, tmp_path: Path) -> None:
    """Its configuration's digest had 16 digits; its progress said nothing of skipped steps."""
    run(trainer_of(model, tmp_path, settings(), digest="0123456789abcdef"))
    found = latest(Store(tmp_path), "0123456789abcdef01234567")
    assert found is not None and found.progress.step == 7


# ------------------------------------------------------------------------------------------------------- long prompts


def texts(*lengths: int, **changes: Any) -> Task:
    rows = {"train": [{"text": "x" * n} for n in lengths], "validation": [{"text": "y"}]}
    values = {
        "name": "t", "rows": rows.__getitem__, "messages": lambda row: user(row["text"]), "reward": "m:f",
        "gold": None, "max_tokens": 4, "to_end": False,
        "places": {"train": [f"d.jsonl, line {i}" for i in range(1, 9)], "validation": ["v.jsonl, line 1"]}.__getitem__,
    }  # fmt: skip
    return Task(**(values | changes))


def tokens(messages: Any) -> int:
    return len(messages[0].content)


def test_long_prompts_are_found_by_file_and_line_and_left_out() -> None:
    task = texts(6, 7, 3, 99)
    assert long_prompts(texts(6, 3), tokens, 10) is None
    long = long_prompts(task, tokens, 10)
    assert long is not None and long.text == (
        "prompts too long for the model's context of 10 tokens with 4 for the answer: 2 of 4 of train: "
        "d.jsonl, line 2 (7 tokens), d.jsonl, line 4 (99 tokens)"
    )
    assert [row["text"] for row in without(task, long).rows("train")] == ["x" * 6, "xxx"]
    open_end = long_prompts(replace(task, to_end=True), tokens, 10)
    assert open_end is not None and open_end.rows["train"] == {3: 99}  # an answer of one token is enough


def test_a_task_whose_prompts_are_all_too_long_is_refused() -> None:
    long = long_prompts(texts(7, 8), tokens, 10)
    assert long is not None
    with pytest.raises(ValueError, match="2 of 2 of train.*none is left in its train split"):
        without(texts(7, 8), long)
