"""How well pass 1 names requests: worked out by hand, and by the command on the tiny model."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from t2ray.adapt.strategies import Dispatch, Strategy, classify, weighted
from t2ray.adapters.factors import decompose
from t2ray.cli.main import main
from t2ray.core import ConfigError, Mixture, user
from t2ray.evals.dispatched import Labelled, changed, figures, name_all, told, variants
from t2ray.evals.plots import reliability
from t2ray.experts.registry import Registry
from t2ray.testing import FakeScore

LABELS = ("math", "code", "others")


def row(label: str, group: str = "all", text: str = "x") -> Labelled:
    return Labelled(messages=user(text), labels=tuple(label.split("|")), group=group)


def named(p: Mapping[str, float]) -> Dispatch:
    return Dispatch(mixture=Mixture.base(), strategy="prompt", label=max(p, key=p.__getitem__), probabilities=p)


def test_calibration_and_thresholds_are_those_worked_out_by_hand() -> None:
    rows = [row("math"), row("code"), row("others"), row("code|math")]
    sure = [{"math": 0.95, "others": 0.05}, {"math": 0.92, "code": 0.08}, {"others": 0.55, "math": 0.45},
            {"code": 0.6, "math": 0.4}]  # fmt: skip
    found = figures(rows, [named(p) for p in sure])
    assert (found["n"], found["acc"]) == (4, 0.75)
    # the bins: [0.95 right, 0.92 wrong], [0.55 right], [0.6 right]
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.935) + abs(1 - 0.55) + abs(1 - 0.6)) / 4)
    above = {one["threshold"]: one for one in found["thresholds"]}
    assert above[0.0] == {"threshold": 0.0, "answered": 0.75, "acc": 0.75, "wrong": 0.25}
    assert above[0.7] == {"threshold": 0.7, "answered": 0.5, "acc": 0.5, "wrong": 0.25}  # the base answers the last
    assert above[0.95] == {"threshold": 0.95, "answered": 0.25, "acc": 0.5, "wrong": 0.0}


def test_one_that_is_as_often_right_as_it_is_sure_has_no_calibration_error() -> None:
    dispatches = [named({"math": 0.75, "code": 0.25})] * 4
    assert figures([row("math")] * 3 + [row("code")], dispatches)["ece"] == pytest.approx(0)


def test_labels_are_shown_in_other_orders_and_by_other_names_and_read_back() -> None:
    """A strategy that takes what is shown first names everything anew in every other order, and by no other name."""

    def first(shown: tuple[str, ...]) -> Strategy:
        return classify(FakeScore(lambda _, label, __: -float(shown.index(label))), shown, Mixture.base())

    rows = [row("math", text=f"a long enough request {i}") for i in range(5)]
    own = asyncio.run(name_all(first(LABELS), rows))
    ways = variants(LABELS, 6, {"math=sums": {"math": "sums"}})
    found = asyncio.run(changed(first, rows, own, ways))
    assert found["math=sums"] == {"acc": 1.0, "changed": 0.0}
    for title, shown in ways.items():
        assert sorted(shown.values()) == sorted(LABELS)
        moved = next(iter(shown.values())) != "math"
        assert found[title] == {"acc": 1.0 - moved, "changed": float(moved)}
    with pytest.raises(ConfigError, match="--names x: give names of their own to some of math, code"):
        variants(LABELS, 0, {"x": {"math": "code"}})


@pytest.mark.parametrize(("threshold", "mixture"), [(0.7, "math"), (0.8, "base")])
def test_below_the_threshold_the_base_answers(threshold: float, mixture: str) -> None:
    likely = {"math": 0.75, "code": 0.125, "others": 0.125}
    score = FakeScore(lambda _, label, __: math.log(likely[label]))
    strategy = classify(score, LABELS, Mixture.base(), threshold=threshold)
    found = asyncio.run(strategy(user("a request that is long enough")))
    assert found.mixture == Mixture.parse(mixture)
    assert found.probabilities == pytest.approx(likely)


def test_a_soft_mixture_has_the_probabilities_as_weights_and_temperature_levels_or_hardens_them() -> None:
    p = {"math": 0.6, "code": 0.2, "others": 0.2}
    assert weighted(p, 1.0) == Mixture.of({"math": 0.6, "code": 0.2})
    assert weighted(p, 0.05) == Mixture.of({"math": 1.0})
    assert weighted(p, 1e6) == Mixture.of({"math": 0.33, "code": 0.33})
    assert weighted({"math": 0.001, "others": 0.999}, 1.0) == Mixture.base()


def test_the_command_tells_draws_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "17+25 and add 3 to n", "label": "math|code", "group": "two kinds"}]
    Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    words = ["dispatch", "--model", "tiny", "--limit", "2", "--orders", "1", "--rows", "rows.jsonl"]
    tasks = ["--tasks", "math,code,pick,others"]
    assert main([*words, *tasks, "--json", "found.json", "--picture", "found.svg"]) == 0
    found: dict[str, Any] = json.loads(Path("found.json").read_text())
    assert told(found) in capsys.readouterr().out
    assert [*found["strategies"]] == ["prompt", "cls"]
    cls = found["strategies"]["cls"]
    assert {group: one["n"] for group, one in cls["groups"].items()} == {
        "math": 2, "code": 2, "pick": 2, "others": 2, "two kinds": 1,
    }  # fmt: skip
    assert cls["groups"]["math"]["acc"] == 1.0
    assert Path("found.svg").read_text().startswith("<svg")
    assert reliability({"cls": cls["bins"]}).count("<svg") == 1
    assert main([*words, "--tasks", "math:sums"]) == 2
    assert "sums: no label of pass 1; it chooses from" in capsys.readouterr().err


def test_a_file_of_requests_is_enough_and_without_any_a_line_says_what_to_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    factors = decompose(str(tiny_llama), "factors")
    ones = {target.name: torch.ones(target.rank) for target in factors.layout}
    Registry("experts").save("poems", ones, base_digest=factors.base_digest)  # a kind of which t2ray has no task
    Path("rows.jsonl").write_text('{"prompt": "a verse about the sea", "label": "poems", "group": "verses"}\n')
    words = ["dispatch", "--model", str(tiny_llama), "--factors", "factors", "--experts", "experts", "--orders", "0"]
    assert main([*words, "--rows", "rows.jsonl", "--json", "found.json"]) == 0
    assert [*json.loads(Path("found.json").read_text())["strategies"]["prompt"]["groups"]] == ["verses"]
    capsys.readouterr()
    assert main(words) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("no task is called poems: name labelled requests by --tasks TASK:LABEL,... or --rows FILE")
    )
