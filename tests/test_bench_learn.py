"""`python -m benchmarks learn`: both sides get one job, their KL is one function's, and figures are compared fairly."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core.shape import BenchShape, make
from benchmarks.core.training import random_rollouts
from benchmarks.learn import command, figures, runs, settings, turns
from benchmarks.learn.divergence import mean_kl
from benchmarks.learn.runs import SideRun
from t2ray.core import ResourceError
from t2ray.training.loss import backward

SMALL = BenchShape(layers=2, width=32, inner=64, heads=4, vocabulary=64, prompt=6, new=5, sequence=12)


def test_the_kl_is_that_of_the_trainer(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    subject = make(SMALL, tmp_path)
    model, rollouts = subject.model, random_rollouts(subject)
    z_1K = 1 + torch.randn(1, model.adapter.size, generator=torch.Generator().manual_seed(0))
    leaf_1K = z_1K.clone().requires_grad_()
    leaf_1K.grad = torch.zeros_like(leaf_1K)
    terms = backward(model, leaf_1K, rollouts, [1.0] * len(rollouts), lam=0.1, temperature=1.0, batch=len(rollouts))

    def base(ids_BT: torch.Tensor) -> torch.Tensor:
        return model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))

    def policy(ids_BT: torch.Tensor) -> torch.Tensor:
        with model.adapter.rows(z_1K):
            return base(ids_BT)

    rows = [(list(r.completion.prompt_ids), list(r.completion.token_ids)) for r in rollouts]
    assert terms.kl > 0.01
    assert mean_kl(policy, base, rows) == pytest.approx(terms.kl / terms.tokens, rel=1e-4)


def test_the_kl_counts_answers_alone_whatever_stands_beside_them() -> None:
    """Two tokens, the policy says 3 to 1 after a 1 and even odds else: hand-computed, rows of several lengths."""

    def policy(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.where(ids_BT == 1, math.log(3), 0.0), torch.zeros_like(ids_BT)], -1)

    def even(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids_BT.shape, 2)

    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert mean_kl(policy, even, [([0, 1], [0])]) == pytest.approx(one)
    assert mean_kl(policy, even, [([1, 0], [1])]) == pytest.approx(0.0)  # what is read before and after does not count
    assert mean_kl(policy, even, [([0, 1], [1, 0, 0, 0]), ([0], [1])]) == pytest.approx(2 * one / 5)


@pytest.mark.parametrize(
    ("right", "window", "step"),
    [([0.5, 0.9, 1.0], 1, 2), ([0.9, 0.5, 0.95, 0.9], 2, 4), ([0.9], 2, None), ([0.8] * 5, 1, None), ([], 1, None)],
)
def test_a_run_has_learnt_after_the_first_steps_that_reach_the_target(
    right: list[float], window: int, step: int | None
) -> None:
    run = SideRun(side="t2ray", rate=0.1, seed=0, steps=[{"right": share} for share in right])
    setting = replace(settings.brief(), target=0.9, window=window)
    assert run.learnt(setting) == step


def _run(side: str, rate: float, steps: int, seconds: float, kl: float, learns: bool = True) -> SideRun:
    made = [
        {"right": float(learns and i == steps - 1), "seconds": seconds, "wall_s": 9.0, "kl": kl, "peak_gib": 1.0}
        for i in range(steps)
    ]
    return SideRun(side=side, rate=rate, seed=0, numbers=3, steps=made, fixed_kl=0.1)


def test_each_side_is_compared_at_its_best_rate_and_at_no_more_kl() -> None:
    setting = replace(settings.brief(), target=1.0, window=1)
    made = [
        _run("t2ray", 0.01, 8, 1.0, 0.2), _run("t2ray", 0.02, 3, 1.0, 0.6), _run("t2ray", 0.04, 9, 1.0, 0.1, False),
        _run("rloo", 1e-3, 5, 2.0, 0.3), _run("rloo", 5e-3, 50, 2.0, 0.3),
    ]  # fmt: skip
    rows = figures.summed(made, setting)
    assert [(row["side"], row["learnt"]) for row in rows] == [
        ("t2ray", 1), ("t2ray", 1), ("t2ray", 0), ("rloo", 1), ("rloo", 1)
    ]  # fmt: skip
    assert figures.compared(rows) == {"rloo": {"step": 0.5, "learnt": 0.3, "at_no_more_kl": 0.8}}
    assert "0 of 1 |  |  |  |" in figures.table(rows)
    never = figures.summed([*made[2:3], *made[3:]], setting)
    assert figures.told(figures.compared(never)).endswith("a step 0.50, until it is learnt -, at no more KL -")


def test_a_rate_that_one_seed_has_missed_has_no_time() -> None:
    setting = replace(settings.brief(), target=1.0, window=1)
    (row,) = figures.summed([_run("t2ray", 0.1, 3, 1.0, 0.2), _run("t2ray", 0.1, 3, 1.0, 0.2, False)], setting)
    assert (row["learnt"], row["seeds"], row["seconds"], row["steps"]) == (1, 2, None, None)


def test_sides_that_read_other_prompts_are_not_compared() -> None:
    same = {"t2ray": [[[1, 2], [3]]], "rloo": [[[1, 2], [4]]]}
    runs._same_prompts(same)
    with pytest.raises(ResourceError, match="grpo and t2ray read different prompts"):
        runs._same_prompts(same | {"grpo": [[[1, 5], [3]]]})


def test_the_clock_leaves_out_what_is_measured_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 11.0, 20.0, 20.5])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(now))
    clock = turns.Clock()
    clock.start()
    clock.stop()
    clock.start()
    assert clock.take()["wall_s"] == 3.0
    clock.start()
    assert clock.take()["wall_s"] == 0.5


def test_a_step_is_made_in_a_process_of_its_own_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = settings.larger()
    few = whole.job | {"rl": {"steps": 1, "prompts": 2, "samples": 3}}
    monkeypatch.setattr(command, "larger", lambda: replace(whole, job=few, rates={"t2ray": (0.02,)}))
    monkeypatch.chdir(tmp_path)
    assert main(["learn", "--seeds", "1", "--json", "learn.json"]) == 0
    assert "skipped: TRL's RLOO and GRPO" in capsys.readouterr().out
    found = json.loads(Path("learn.json").read_text(encoding="utf-8"))
    (run,) = found["runs"]
    assert (run["side"], run["numbers"], len(run["steps"])) == ("t2ray", 3584, 1)
    assert run["steps"][0]["kl"] == pytest.approx(0, abs=1e-6) and run["fixed_kl"] > 0.01  # before and after the step
    assert found["beside"] == {} and found["learn"][0]["rate"] == 0.02


@pytest.mark.parametrize(
    ("python", "text"),
    [("/no/such/python", "there is no such interpreter"), (sys.executable, "it needs trl==")],
)
def test_a_wrong_interpreter_is_refused_before_anything_is_made(
    python: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["learn", "--trl", python]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_side_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2; echo out of luck >&2\n", encoding="utf-8")
    broken.chmod(0o755)
    with (
        pytest.raises(ResourceError, match="the process of rloo ended: out of luck$"),
        runs._process(str(broken), "rloo", tmp_path / "rloo.json") as line,
    ):
        line.read()
