"""The bench of scaling: models find the prices that made the points, the simulation obeys queueing's laws, counts hold.

Runs on Ray and private endpoints are the bench's own business; here is what is made of them.
"""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import main
from benchmarks.capacity import PARTS, engines, queues, runs, scaling, steps
from benchmarks.capacity import fleet as fleets
from benchmarks.capacity.engines import Batch
from benchmarks.capacity.fit import Fit, FitPoint, fitted
from benchmarks.capacity.fleet import Costs, Demand, Device, token_flops
from benchmarks.capacity.simulate import Fleet, Simulation, Traffic
from benchmarks.capacity.steps import StepBench, StepWork
from benchmarks.core.shape import BenchShape
from t2ray.adapters.factors import decompose
from t2ray.runs.memory import shape_of

ROOT = Path(__file__).parents[1]
SMALL = BenchShape(layers=2, width=16, inner=32, heads=2, vocabulary=32, experts=1)

# -------------------------------------------------------------------------------------------------------------- fit


def points(prices: dict[str, float], held: bool = False) -> list[FitPoint]:
    terms = [{name: float((i + 1) ** power) for power, name in enumerate(prices)} for i in range(6)]
    return [
        FitPoint(name=str(i), terms=each, seconds=sum(prices[name] * each[name] for name in prices), held=held)
        for i, each in enumerate(terms)
    ]


def test_a_fit_finds_the_prices_that_made_the_points() -> None:
    fit = fitted(points({"once": 3e-3, "each": 2e-6, "square": 5e-9}))
    assert fit.prices == pytest.approx({"once": 3e-3, "each": 2e-6, "square": 5e-9})
    assert max(fit.errors(held=False)) < 1e-9


def test_points_held_out_are_predicted_and_change_no_price() -> None:
    prices = {"once": 1.0, "each": 2.0}
    far = FitPoint(name="far", terms={"once": 1.0, "each": 50.0}, seconds=202.0, held=True)
    fit = fitted([*points(prices), far])
    assert fit.prices == pytest.approx(prices)
    assert fit.errors(held=True) == pytest.approx([0.5])
    assert fit.figures()["held_out_error"].met is False  # type: ignore[union-attr]


def test_no_price_is_negative() -> None:
    """Times that grow more slowly than any term: the line through them would begin below 0."""
    fit = fitted(
        [FitPoint(name="", terms={"once": 1.0, "each": n}, seconds=n**1.1 - 0.5) for n in (1.0, 2.0, 4.0, 8.0)]
    )
    assert set(fit.prices) == {"each"} and fit.prices["each"] > 0


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> StepBench:
    made = StepBench(tmp_path_factory.mktemp("steps"), SMALL)
    made.write()
    return made


def test_a_steps_work_is_counted(bench: StepBench) -> None:
    """Per layer 4 of 16 x 16 and 3 of 16 x 32; a fold pays from 16 to 64 tokens of a row on, depending on the shape."""
    dense, factored = 4 * 256 + 3 * 512, 4 * 512 + 3 * 768
    work = StepWork(rows=10, prompt=6, answer=4, layers="0-1")
    found = steps.terms(work, SMALL, bench.factors("0-1"))
    assert found["pass"] == 4 and found["z"] == 2 * 7 * 16
    assert found["fold_gmac"] * 1e9 == 2 * 16 * dense
    assert found["generate_gmac"] * 1e9 == 100 * 2 * dense + 40 * 512
    assert found["update_gmac"] * 1e9 == 100 * 2 * (dense + 2 * factored) + 3 * 40 * 512


def test_what_is_not_adapted_costs_no_factors_and_nothing_below_it_a_gradient(bench: StepBench) -> None:
    dense, factored = 4 * 256 + 3 * 512, 4 * 512 + 3 * 768
    found = steps.terms(StepWork(rows=10, prompt=6, answer=4), SMALL, bench.factors("1"))
    assert found["z"] == 7 * 16
    assert found["update_gmac"] * 1e9 == 100 * (2 * dense + dense + 2 * factored) + 3 * 40 * 512


def test_few_tokens_are_generated_through_the_factors(bench: StepBench) -> None:
    found = steps.terms(StepWork(rows=2, prompt=6, answer=4), SMALL, bench.factors("0-1"))
    assert found["fold_gmac"] == 0
    assert found["generate_gmac"] * 1e9 == 20 * 2 * (4 * 512 + 3 * 768) + 8 * 512


def test_two_workers_have_half_the_rows_each(bench: StepBench) -> None:
    factors = bench.factors("0-1")
    whole, half = (steps.terms(StepWork(rows=20, prompt=6, answer=4, workers=n), SMALL, factors) for n in (1, 2))
    assert half["update_gmac"] == pytest.approx(whole["update_gmac"] / 2)
    assert half["fold_gmac"] == whole["fold_gmac"]


def test_steps_of_several_sizes_are_timed_and_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [StepWork(rows=rows, prompt=4, answer=answer, layers="0-1") for rows in (2, 4, 6) for answer in (2, 5)]
    grid += [
        StepWork(rows=4, prompt=4, answer=3, layers="1"),
        StepWork(rows=8, prompt=4, answer=3, layers="0-1", held=True),
    ]
    figures, fit = steps.steps(rounds=1, shape=SMALL, grid=grid, shared=())
    assert len(fit.points) == 8 and all(point.seconds > 0 for point in fit.points)
    assert figures["held_out_error"].target == 0.15  # type: ignore[union-attr]
    assert json.loads(json.dumps(fit.as_json()))["prices_s"] == fit.prices


def test_workers_sum_together() -> None:
    assert all(seconds > 0 for seconds in steps.together(2, partial(steps.summed, (8, 64), 2)))


# ------------------------------------------------------------------------------------------------------------- engines


def test_an_engine_is_timed_and_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decompose("tiny", tmp_path / "factors")
    monkeypatch.setattr(engines, "SCORED", (1, 2))
    monkeypatch.setattr(engines, "SCORED_HELD", (3,))
    grid = [Batch(rows=r, mixtures=m, tokens=t) for r, m, t in ((1, 1, 2), (2, 2, 3), (4, 2, 2), (3, 1, 4), (4, 4, 3))]
    figures, step, score = engines.engine(
        tmp_path / "factors", 1, [*grid, Batch(rows=2, mixtures=1, tokens=2, held=True)]
    )
    assert len(step.points) == 6 and len(score.points) == 3
    assert {"fit_error", "held_out_error", "score_fit_error", "score_held_out_error"} <= set(figures)


def test_a_batch_counts_mixing_only_where_there_are_several() -> None:
    one, several = Batch(rows=4, mixtures=1, tokens=8).terms(), Batch(rows=4, mixtures=3, tokens=8).terms()
    assert (one["mixed"], one["mixed_row"]) == (0, 0)
    assert (several["mixed"], several["mixed_row"]) == (8, 32)


# ---------------------------------------------------------------------------------------------------------- simulation


def fleet(**changes: object) -> Fleet:
    return Fleet(**{"step_s": lambda rows: 0.01, **changes})  # type: ignore[arg-type]


def test_a_request_alone_takes_the_sum_of_its_parts() -> None:
    made = fleet(ingress_s=0.2, dispatch_s=0.1, score_s=(0.3, 0.05), prompt_s=0.001)
    report = Simulation(made, Traffic(rate=1e-3, seconds=5e3, tokens=10, prompt=20, scored=1.0)).run()
    assert report["requests"] > 0 and report["refused"] == 0
    assert report["latency_ms"]["p50"] == pytest.approx(1000 * (0.2 + 0.1 + 0.3 + 0.02 + 10 * 0.01))
    assert report["ttft_ms"]["p50"] == pytest.approx(1000 * (0.2 + 0.1 + 0.3 + 0.02 + 0.01))


def test_waiting_for_one_process_is_that_of_its_queue() -> None:
    """M/D/1 at 0.8 of what it can do: the mean wait is 0.8 / (2 (1 - 0.8)) = 2 services, the median a little less."""
    made = fleet(step_s=lambda rows: 0.0, ingress_s=1.0)
    report = Simulation(made, Traffic(rate=0.8, seconds=50_000, tokens=1)).run()
    assert 1000 * (1 + 1.0) < report["latency_ms"]["p50"] < 1000 * (1 + 2.0)
    assert report["requests_per_s"] == pytest.approx(0.8, rel=0.02)


def test_a_batch_takes_what_comes_until_it_is_full_and_then_the_queue_until_it_is_too() -> None:
    made = fleet(rows=8, ongoing=12, queued=3)
    report = Simulation(made, Traffic(rate=500, seconds=10, tokens=10)).run()
    assert report["refused"] > 0
    assert report["requests_per_s"] == pytest.approx(8 / (10 * 0.01), rel=0.03)
    assert report["rows_a_step"] == pytest.approx(8, rel=0.03)


def test_a_place_that_nobody_waits_for_inside_is_empty_for_a_step() -> None:
    report = Simulation(fleet(rows=8, ongoing=8, queued=3), Traffic(rate=500, seconds=10, tokens=10)).run()
    assert report["requests_per_s"] == pytest.approx(8 / (11 * 0.01), rel=0.03)


def test_twice_the_replicas_serve_twice_the_requests_and_share_them_evenly() -> None:
    traffic = Traffic(rate=1000, seconds=10, tokens=10)
    one, two = (Simulation(fleet(rows=8, ongoing=8, replicas=n), traffic) for n in (1, 2))
    assert two.run()["requests_per_s"] == pytest.approx(2 * one.run()["requests_per_s"], rel=0.03)
    left, right = (replica.row_steps for replica in two.replicas)
    assert left == pytest.approx(right, rel=0.05)


def test_a_seed_is_a_run() -> None:
    made, traffic = fleet(ingress_s=0.001), Traffic(rate=50, seconds=5)
    assert Simulation(made, traffic).run() == Simulation(made, traffic).run()


# -------------------------------------------------------------------------------------------------------------- queues


def test_the_simulated_endpoint_reaches_what_the_real_one_showed() -> None:
    """Steps of 2 ms and 0.1 ms a row, made half as fast by their neighbours, and 20 ms elsewhere."""
    step = Fit(prices={"step": 2e-3, "row": 1e-4}, points=())
    score = Fit(prices={"turn": 5e-3, "prompt": 1e-3}, points=())
    full_s = 2 * 64 * (2e-3 + 32 * 1e-4) + 0.02
    times = queues.EndpointSpeed(alone_s=2 * 64 * 2.1e-3 + 0.02, capacity=32 / full_s)
    made = queues.fleet(step, score, times)
    assert (made.step_s(1), made.step_s(32)) == pytest.approx((2 * 2.1e-3, 2 * 5.2e-3))
    assert made.ingress_s == pytest.approx(0.02) and made.score_s == pytest.approx((1.2e-2, 2e-3))
    alone = Simulation(made, Traffic(rate=0.1, seconds=500, tokens=64)).run()
    assert alone["latency_ms"]["p50"] == pytest.approx(1000 * times.alone_s)


# --------------------------------------------------------------------------------------------------------------- fleet


def test_a_fleet_carries_what_it_was_made_for() -> None:
    shape = shape_of(str(ROOT / "docs" / "configs" / "llama-3-8b.json"))
    demand = Demand(rate=200.0, answer=16)
    made = fleets.fleet(shape, demand, Costs(), Device(), rows=64)
    assert token_flops(shape) == pytest.approx(20.5e9, rel=0.01)  # 1.39 times the dense layers', and the vocabulary's
    report = Simulation(made, Traffic(rate=200.0, seconds=10, tokens=16, prompt=200, scored=1.0)).run()
    steps_s, prompts_s = 16 * 0.025 / 64, (200 + 300) * token_flops(shape) / (0.4 * 989e12)
    assert made.replicas == math.ceil(200 * (steps_s + prompts_s) / 0.7) == 10
    assert report["requests_per_s"] == pytest.approx(200, rel=0.1)
    assert report["refused"] == 0


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_decompositions_speed_counts_what_was_surely_done(tmp_path: Path) -> None:
    runs.make(SMALL, tmp_path)
    names = sorted(path for path in (tmp_path / "factors").iterdir() if path.suffix == ".safetensors")
    for i, path in enumerate(names):  # two workers: a pair each second
        os.utime(path, (0, 100 + i // 2))
    assert len(names) == 14
    assert runs.rate(tmp_path / "factors", 2) == pytest.approx(((13 - 2) / 6, 100))
    for i, path in enumerate(names):
        os.utime(path, (0, 100 + i))
    assert runs.rate(tmp_path / "factors", 1) == (1.0, 100)


def test_a_run_is_read_from_what_it_left(tmp_path: Path) -> None:
    stamps = tmp_path / "stamps"
    lines = [("", "called", 3.0), ("", "called", 3.5), ("code", "workers", 5.0), ("math", "workers", 6.0)]
    stamps.write_text("".join(json.dumps({"domain": d, "stage": s, "at": at}) + "\n" for d, s, at in lines))
    for name, loop, result in (("math", 10, 20), ("code", 12, 26)):
        folder = tmp_path / "run" / "domains" / name / "tensorboard"
        folder.mkdir(parents=True)
        (folder / f"events.out.tfevents.{loop}.500000.77").touch()
        (folder.parent / "result.json").touch()
        os.utime(folder.parent / "result.json", (0, result))
        (folder.parent / "workers").mkdir()
        (folder.parent / "workers" / "0.json").write_text(json.dumps({"began": loop - 1.0}))
    (tmp_path / "run" / "config.json").touch()
    ran = runs._read(tmp_path / "run", stamps, ["math", "code"], 1.0, 30.0)
    assert ran.stages["math"] == {"called": 3.0, "workers": 6.0, "began": 9.0, "loop": 10.5, "result": 20.0}
    assert ran.span() == 26 - 10.5
    assert ran.alone() == (20 - 10.5) + (26 - 12.5)


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(runs.ResourceError, match="nosuchtask"):
        runs._call(["verify", "--task", "nosuchtask"], {})


def test_stamps_name_the_domain_once_the_controller_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.capacity.stamps import Stamps

    monkeypatch.setenv("T2RAY_STAMPS", str(tmp_path / "stamps"))
    stamps = Stamps()
    stamps.after_controller_start(SimpleNamespace(run_config=SimpleNamespace(name="my-domain-0a1b2c3d")))
    stamps.before_worker_group_start(None)
    rows = [json.loads(line) for line in (tmp_path / "stamps").read_text().splitlines()]
    assert [(row["domain"], row["stage"]) for row in rows] == [
        ("", "called"), ("my-domain", "controller"), ("my-domain", "resources"),
    ]  # fmt: skip
    assert rows[0]["at"] <= rows[1]["at"] <= rows[2]["at"]


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_runs_the_parts_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuple(scaling.PARTS) == PARTS
    fit = fitted(points({"once": 1.0, "each": 2.0}) + points({"once": 1.0, "each": 2.1}, held=True))
    monkeypatch.setitem(scaling.PARTS, "training", lambda folder: (fit.figures(), {"step": fit.as_json()}))
    assert main(["scaling", "training", "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["training"]["held_out_error"]["met"] is True
    assert written["models"]["training_step"]["prices_s"] == pytest.approx({"once": 1.0, "each": 2.0})
    assert "held_out_error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["trainning"], "did you mean 'training'"), (["--json", "/nowhere/out.json"], "make it first")],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", *words]) == 2
    assert message in capsys.readouterr().err
