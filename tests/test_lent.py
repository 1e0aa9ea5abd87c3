"""Experts that one model of a grid lends to another: they arrive as they are or shuffled, and nowhere else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import random_z
from test_tables import GRID, grid

from t2ray.cluster.train import cells
from t2ray.cluster.train.lent import check_lenders, lend, shuffled
from t2ray.config.tables import TablesConfig, job_of, lender_of, search_of
from t2ray.core import ConfigError, ExpertError, Mixture, UnknownExpert
from t2ray.evals.cells import cell_of, load_cell, save_cell
from t2ray.experts.registry import Registry
from t2ray.runs.folder import open_run
from t2ray.runs.prepare import prepare
from t2ray.workbench import Place, Workbench, open_workbench

STRATEGIES = ["expert", "transfer/second", "shuffled/first", "fewshot/2/2x1+second"]


def two(folder: Path, model: Path, strategies: list[str] = STRATEGIES, **more: Any) -> TablesConfig:
    """A grid of a model and one of the same shape with other weights."""
    other = folder / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    table = {"title": "T", "methods": ["svf"], "strategies": strategies, "tasks": ["pick"]}
    pick = GRID["job"]["domains"]["pick"] | {"max_tokens": 4}  # random weights do not end by themselves
    job = GRID["job"] | {"domains": {"pick": pick}}
    values = {
        "job": job,
        "models": {"first": str(model), "second": str(other)},
        "methods": {"svf": {}},
        "seeds": [0],
        "texts": {},
    }
    return grid(folder, **(values | {"tables": {"t": table}} | more))


def lending(config: TablesConfig) -> tuple[Workbench, Registry]:
    """The engine of the first model, and the registry of the second, whose cell has trained `pick`."""
    first, second = (
        prepare(job_of(config, name, "svf", 0).model_copy(update={"cpus": 1.0}), resume=False) for name in config.models
    )
    bench = open_workbench(Place(model=first.model, factors=first.factors, experts=None, run=first))
    save_cell(config, replace(cell_of(config, "second", "svf", 0), trained={"pick": {}}))
    open_run(second)
    assert second.experts
    return bench, Registry(second.experts)


def test_an_expert_is_lent_as_it_is_or_with_its_components_in_another_order(tmp_path: Path, tiny_llama: Path) -> None:
    config = two(tmp_path, tiny_llama)
    bench, registry = lending(config)
    layout = bench.engine.layout
    z_K = random_z(sum(target.rank for target in layout), seed=3)
    parts = dict(zip([t.name for t in layout], z_K.split([t.rank for t in layout]), strict=True))
    registry.save("pick", parts, base_digest="of other weights")
    with pytest.raises(ExpertError, match="belongs to another base model"):
        registry.load("pick", base_digest=bench.engine.base_digest)

    cell = cell_of(config, "first", "svf", 0)
    assert lend(config, bench, cell, "transfer/second", ["pick"]) == ("second.pick",)
    assert torch.equal(bench.engine.vector(Mixture.parse("second.pick")), z_K)
    assert lend(config, bench, cell, "shuffled/second", ["pick"]) == ("second.pick",)
    assert torch.equal(bench.engine.vector(Mixture.parse("second.pick")), torch.cat([*shuffled(parts, 0).values()]))


def test_what_is_not_trained_is_not_lent_and_the_reason_is_that_of_its_cell(tmp_path: Path, tiny_llama: Path) -> None:
    config = two(tmp_path, tiny_llama)
    bench, _ = lending(config)
    theirs, ours = (cell_of(config, name, "svf", 0) for name in ("second", "first"))
    for missing, why in (({}, "it is not trained yet"), ({"pick": "no signal"}, "no signal")):
        save_cell(config, replace(theirs, missing=missing))
        with pytest.raises(UnknownExpert, match=rf"^second\.svf\.0 has no expert 'pick' to lend: {why}$"):
            lend(config, bench, ours, "transfer/second", ["pick"])


def test_a_cell_goes_on_when_the_model_that_lends_has_come(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rounds, holes = two(tmp_path, tiny_llama), list[list[str]](), list[dict[str, str]]()

    def in_this_process(config: TablesConfig, waiting: list[Any], tick: Any) -> None:
        for new in waiting:
            cells.make_cell(config.model_dump(mode="json"), new)
        rounds.append([new.name for new in waiting])
        holes.append(load_cell(config, cell_of(config, "first", "svf", 0)).missing)

    monkeypatch.setattr(cells, "_one_by_one", in_this_process)
    first, second = cells.make_cells(config)
    assert rounds == [["first.svf.0", "second.svf.0"], ["first.svf.0"]]
    why = "second.svf.0 has no expert 'pick' to lend: it is not trained yet"
    assert holes == [{"pick/transfer/second": why, "pick/fewshot/2/2x1+second": why}, {}]
    assert [*first.measured["pick"]] == ["expert", "transfer/second", "fewshot/2/2x1+second"]
    assert [*second.measured["pick"]] == ["expert", "shuffled/first"], "no model lends itself experts"
    assert second.lacks(config) == [], "a shuffled row is measured once"
    # the mean, the base and each of two experts, and as many finalists beside the elites' mean, on two shots
    assert first.measured["pick"]["fewshot/2/2x1+second"]["search_prompts"] <= 2 * (4 + 5)
    assert {*first.variance} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_shuffle_keeps_each_vectors_components_and_draws_an_order_by_seed_and_matrix() -> None:
    z = {name: torch.arange(16.0) + 100 * i for i, name in enumerate(("a.q_proj", "b.q_proj", "b.up_proj"))}
    moved = [shuffled(z, seed) for seed in range(3)]
    for one in moved:
        assert one.keys() == z.keys()
        for name in z:
            assert not torch.equal(one[name], z[name])
            assert torch.equal(one[name].sort().values, z[name]), "each component stays in its matrix"
    orders = {tuple((one[name] % 100).tolist()) for one in moved for name in z}
    assert len(orders) == 9, "each matrix and each seed have an order of their own"
    assert all(torch.equal(shuffled(z, 0)[name], moved[0][name]) for name in z)


def test_figures_of_the_shuffle_of_layers_are_measured_again(tmp_path: Path, tiny_llama: Path) -> None:
    config = two(tmp_path, tiny_llama, ["shuffled/second", "transfer/second"])
    new = cell_of(config, "first", "svf", 0)
    save_cell(config, replace(new, measured={"pick": {"shuffled/second": {}, "transfer/second": {}}}))
    assert load_cell(config, new).lacks(config) == [("pick", "shuffled/second")]
    save_cell(config, replace(new, measured={"pick": {"shuffled/second": {"shuffled": "components"}}}))
    assert load_cell(config, new).lacks(config) == [("pick", "transfer/second")]


def test_models_of_two_shapes_lend_each_other_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    config = two(tmp_path, tiny_llama)
    check_lenders(config)
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))
    message = (
        r"^tables 'tables': 'second' cannot lend experts to 'first': model\.layers\.0\.mlp\.gate_proj is 48 x 32 there "
        r"and 64 x 32 here; name models of equal shape$"
    )
    with pytest.raises(ConfigError, match=message):
        check_lenders(config)
    check_lenders(two(tmp_path / "b", tiny_llama, ["expert"]))


@pytest.mark.parametrize(
    ("strategies", "more", "message"),
    [
        (["transfer/secnd"], {}, r"transfer/secnd: no model 'secnd'; did you mean 'second'\?"),
        (["fewshot+third"], {}, r"fewshot\+third: no model 'third'"),
        (["shuffled"], {}, "not 'shuffled'"),
        (["fewshot/10/8"], {}, "not 'fewshot/10/8'"),
        (["fewshot/10/1x4"], {}, r"strategy 'fewshot/10/1x4': population: .* 2"),
        (["fewshot/10/8x0"], {}, r"strategy 'fewshot/10/8x0': iterations: .* 1"),
        (["transfer/first"], {"models": {"first": "tiny"}}, "the grid has no other model than 'first'"),
    ],
)
def test_a_wrong_lender_or_budget_is_refused_in_a_line(
    tmp_path: Path, tiny_llama: Path, strategies: list[str], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        two(tmp_path, tiny_llama, strategies, **more)


def test_a_strategy_says_its_shots_its_budget_and_its_lender(tmp_path: Path) -> None:
    config = grid(tmp_path)
    said = [
        (count, settings.population, settings.iterations, lender_of(strategy))
        for strategy in ("fewshot", "fewshot/3", "fewshot/3/8x5", "fewshot/3/8x5+a.b", "fewshot+b")
        for count, settings in [search_of(config, strategy)]
    ]
    assert said == [(10, 2, 1, None), (3, 2, 1, None), (3, 8, 5, None), (3, 8, 5, "a.b"), (10, 2, 1, "b")]
