"""The benches: the peers compute what t2ray computes, the figures are what the clock says; no speed is asserted."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.core import generation, record, suite
from benchmarks.core.reference import Reference, greedy
from benchmarks.core.shape import BenchShape, Subject, make
from benchmarks.core.training import Allocations, random_rollouts
from benchmarks.harness import Measure, Skipped, interleaved, measure, ratio
from t2ray.config.search import CEMConfig
from t2ray.core import ConfigError, Mixture, SamplingParams
from t2ray.training.loss import backward

SMALL = BenchShape(
    layers=2, width=32, inner=64, heads=4, vocabulary=64, prompt=6, new=5, sequence=12, members=3, shots=2, answer=3,
    pass2=4, experts=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.set_num_threads(1)
    return make(SMALL, tmp_path_factory.mktemp("subject"))


# ------------------------------------------------------------------------------------------------------------- subject


def test_the_default_shape_is_the_one_that_targets_are_stated_for() -> None:
    shape = BenchShape()
    matrices = shape.layers * sum(m * n for m, n in shape.matrices().values())
    assert 43e6 < matrices + shape.vocabulary * shape.width < 45e6
    assert shape.bound() == pytest.approx(12 / 19)  # 7 matrices: 4 square, 3 of 3:8


def test_the_plain_model_has_the_same_tensors_and_answers_without_svf_layers(subject: Subject) -> None:
    plain, svf = subject.plain.state_dict(), subject.model.hf.state_dict()
    assert plain.keys() == svf.keys()
    assert all(plain[name].data_ptr() == svf[name].data_ptr() for name in svf)
    assert not any("SVF" in type(module).__name__ for module in subject.plain.modules())
    prompts = subject.prompts(3)
    ours = subject.generate(prompts, [Mixture.base()] * 3, [SamplingParams(max_tokens=5)] * 3)
    assert [list(c.token_ids) for c in ours] == greedy(subject.plain, subject.ids(prompts), 5).tolist()


def test_every_answer_is_as_long_as_it_may_be(subject: Subject) -> None:
    sampling = [SamplingParams(max_tokens=40, temperature=2.0, seed=i) for i in range(8)]
    answers = subject.generate(subject.prompts(8), subject.mixtures(8), sampling)
    assert {len(answer.token_ids) for answer in answers} == {40}


# ----------------------------------------------------------------------------------------------------------- reference


def test_the_reference_composes_the_base_at_z_1(subject: Subject) -> None:
    reference = Reference(subject.plain, subject.factors)
    for weight, composed in zip(
        reference.weights, reference.compose(torch.ones(subject.model.adapter.size)), strict=True
    ):
        torch.testing.assert_close(composed, weight, atol=1e-6, rtol=1e-4)


def test_the_reference_answers_each_row_with_its_mixture_as_the_engine_does(subject: Subject) -> None:
    prompts, mixtures = subject.prompts(6), subject.mixtures(3)
    z_RK = torch.stack([subject.model.adapter.mix(mixture) for mixture in mixtures])
    row_index = [0, 2, 1, 1, 0, 2]
    theirs = Reference(subject.plain, subject.factors).generate(subject.ids(prompts), z_RK, row_index, 5)
    ours = subject.generate(prompts, [mixtures[i] for i in row_index], [SamplingParams(max_tokens=5)] * 6)
    assert [list(c.token_ids) for c in ours] == theirs.tolist()


def test_the_reference_leaves_the_base_as_it_was(subject: Subject) -> None:
    before = {name: tensor.clone() for name, tensor in subject.plain.state_dict().items()}
    reference = Reference(subject.plain, subject.factors)
    reference.load(reference.compose(torch.zeros(subject.model.adapter.size)))
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.plain.state_dict().items())


def test_the_reference_has_the_gradient_of_z_that_the_factored_update_has(subject: Subject) -> None:
    rollouts = random_rollouts(subject)
    z_1K = 1 + 0.2 * torch.randn(1, subject.model.adapter.size, generator=torch.Generator().manual_seed(0))
    advantage = [0.5 - i for i in range(len(rollouts))]
    leaf_1K = z_1K.clone().requires_grad_()
    leaf_1K.grad = torch.zeros_like(leaf_1K)
    backward(subject.model, leaf_1K, rollouts, advantage, lam=0.3, temperature=1.0, batch=len(rollouts))
    rows = [(r.completion.prompt_ids, r.completion.token_ids) for r in rollouts]
    theirs = Reference(subject.plain, subject.factors).gradient(z_1K[0], rows, advantage, 0.3)
    torch.testing.assert_close(leaf_1K.grad[0], theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- record


def test_a_ratio_that_is_worse_than_the_record_by_more_than_the_tolerance_is_told() -> None:
    recorded = {"rows": {"over_base": {"value": 3.0}, "share": {"value": 0.1}, "seconds": {"value": 1.0}}}
    figures = {
        "over_base": measure([2.0], 0.9),  # exactly 1.5 times worse
        "share": measure([0.15], 0.2, at_most=True),
        "seconds": measure([100.0]),  # no target: the machine's own
        "peft": Skipped(reason="peft is not installed"),
    }
    assert record.behind({"rows": figures}, recorded) == []
    figures |= {"over_base": measure([1.9], 0.9), "share": measure([0.16], 0.2, at_most=True)}
    assert record.behind({"rows": figures}, recorded) == [
        "rows.over_base is 1.9, 1.58 times worse than the record of 3",
        "rows.share is 0.16, 1.60 times worse than the record of 0.1",
    ]
    with pytest.raises(ConfigError, match=r"the record has no rows\.new; make it anew: .*--quick --json"):
        record.behind({"rows": {"new": measure([1.0], 1.0)}}, recorded)


def test_a_quick_run_is_held_against_the_record_and_fails_behind_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "SHAPE", SMALL)
    monkeypatch.setattr(record, "BENCHES", ("update",))
    monkeypatch.setattr(record, "RECORD", tmp_path / "results.json")
    assert main(["--quick"]) == 2 and "there is no record" in capsys.readouterr().err
    assert main(["--quick", "--json", str(record.RECORD)]) == 0
    figures = json.loads(record.RECORD.read_text())
    for value, code in (1e-9, 0), (1e9, 1):
        figures["update"]["over_reference"]["value"] = value
        record.RECORD.write_text(json.dumps(figures))
        assert main(["--quick"]) == code
    assert "update.over_reference is" in capsys.readouterr().out.replace("\n", " ")
    assert main(["--quick", "rows"]) == 2 and "takes no names, not 'rows'" in capsys.readouterr().err


def test_the_shipped_record_has_what_a_quick_run_measures() -> None:
    assert record.read().keys() == {*record.BENCHES, "machine", "date"}


# ------------------------------------------------------------------------------------------------------------- figures


def test_sides_take_turns_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    ticks = count()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(ticks)))
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ababab")
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b", 10) == [20.0, 30.0]


def test_a_measure_is_the_median_with_its_spread_held_against_a_target() -> None:
    least, most = measure([3.0, 1.0, 2.0], 2.0), measure([3.0, 1.0, 2.5], 2.0, at_most=True)
    assert least.as_json() == {"value": 2.0, "low": 1.0, "high": 3.0, "target": 2.0, "met": True}
    assert most.met is False
    assert measure([1.0]).met is None


def test_allocations_count_what_is_alive_and_not_what_was_there() -> None:
    there = torch.zeros(1000)
    with Allocations() as made:
        there.view(10, 100).add_(1.0)
        one = there + 1
        del one
        two = there * 2
        two[:500] += 1
    assert made.total == made.peak + 4000 == 8000


# -------------------------------------------------------------------------------------------------------------- benches


def test_every_bench_gives_its_figures_and_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    results = suite.run(
        list(suite.BENCHES), shape=SMALL, repeats=1, threads=1, progress=lambda name, figures: seen.append(name)
    )
    assert seen == list(results) == ["rows", "sparse", "folded", "update", "rollout", "cem", "dispatch"]
    written = json.loads(json.dumps(suite.as_json(results, 1)))
    assert written.keys() == {*results, "machine", "date"}
    assert written["machine"]["threads"] == 1
    for name in results:
        for key, figure in written[name].items():
            assert figure.keys() >= {"value", "low", "high", "target", "met"}, (name, key)
            assert figure["value"] is None or 0 < figure["low"] <= figure["value"] <= figure["high"]
    assert [written["rows"][f"same_tokens_{n}"]["value"] for n in (4, 16)] == [1.0, 1.0]
    targets = {(name, key): figure["target"] for name in results for key, figure in written[name].items()}
    assert targets["rows", "over_reference_4"] == 4 and targets["rows", "over_reference_16"] == 12
    assert targets["folded", "fold_steps"] == 8 and targets["dispatch", "share"] == 0.1
    assert written["update"]["peak_over_bound"]["met"]


def test_without_peft_its_rows_are_skipped_with_the_reason(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "available", lambda: False)
    figure = generation.rows(subject, 1)["over_peft_4"]
    assert isinstance(figure, Skipped) and "t2ray[bench]" in figure.reason


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["row"], "unknown bench 'row'; did you mean 'rows'?"),
        (["--repeats", "2"], "--repeats is 2; a median with its spread needs at least 5"),
        (["--threads", "0"], "--threads is 0"),
        (["--json", "nowhere/bench.json"], "there is no folder"),
    ],
)
def test_a_mistaken_call_ends_with_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_the_command_prints_a_table_and_writes_the_figures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.core import command as bench

    monkeypatch.setattr(bench, "BenchShape", lambda: SMALL)
    monkeypatch.setattr(
        suite, "BENCHES", {"rows": lambda subject, n: {"x": measure([2.0], 1.0), "y": Skipped(reason="why")}}
    )
    assert main(["rows", "--json", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    assert "met" in printed and "skipped: why" in printed
    assert (
        json.loads((tmp_path / "bench.json").read_text())["rows"]["x"]
        == Measure(value=2.0, low=2.0, high=2.0, target=1.0).as_json()
    )


def test_the_bench_of_a_gpu_runs_on_a_small_model(tmp_path: Path) -> None:
    """What the GPU's hour is spent on has run before: each part has its figures, or says what is missing."""
    assert main(["gpu", "--small", "--json", str(tmp_path / "gpu.json")]) == 0
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["transformers"]["mixtures_tokens_per_s"]["value"] > 0
    assert figures["update"]["update_s"]["value"] > 0
    for part in ("vllm_mixtures", "vllm_one"):
        found = figures[part]["over_base"]
        assert found["value"] or found["skipped"] == "vLLM is not installed"


def test_more_experts_are_measured_in_pass_1_and_in_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.experts import command

    monkeypatch.setattr(command, "COUNTS", (5,))
    monkeypatch.setattr(command, "SEARCH", CEMConfig(population=2, iterations=1))
    assert main(["experts", "--prompts", "1", "--json", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["experts"]
    assert (row["experts"], row["acc"]) == (5, 1.0)
    # 10 shots: the mean, the base and five experts; or five by themselves, and then the mean, the base and four
    assert [one["answers"] for one in row["searches"].values()] == [70, 50 + 60]
