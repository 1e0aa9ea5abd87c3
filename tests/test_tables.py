"""The grid of `t2ray tables`: its configuration, its cells, and what its tables say of them."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from t2ray.cli.main import main
from t2ray.cluster.train.cells import make_cell
from t2ray.config.tables import TablesConfig, job_of, load
from t2ray.core import ConfigError, RunError
from t2ray.evals.cells import CELLS, GridCell, cells_of, load_cells, save_cell
from t2ray.evals.intervals import over_seeds, paired, wilson
from t2ray.evals.pictures import named, pictures, searched
from t2ray.evals.plots import alphas, by_numbers, confusion, explained, learning
from t2ray.evals.tabled import markdown
from t2ray.evals.tables import summary
from t2ray.models.weights import open_weights
from t2ray.runs.hours import answering_hours, training_hours
from t2ray.runs.memory import shape_of

ROOT = Path(__file__).parents[1]
GRID: dict[str, Any] = {
    "models": {"tiny": "tiny"},
    "seeds": [0, 1],
    "limit": 8,
    "job": {
        "workers": 0, "cpus": 1, "verifiers": 0,
        "domains": {"pick": {"prompt": "{q}", "reward": "t2ray.tasks.equal:reward", "gold": "answer"}},
        "rl": {"steps": 1, "prompts": 4, "samples": 1, "eval_prompts": 4, "eval_every": 1},
    },
    "methods": {"svf": {}, "ia3": {"adapter": {"kind": "ia3"}, "rl.lr": 0.5}},
    "unseen": {"pick_more": {"expert": "pick"}},
    "texts": {"stories": {"expert": "pick", "column": "q", "data": "rows.jsonl"}},
    "search": {"population": 2, "iterations": 1},
    "tables": {
        "trained": {"title": "Trained tasks", "methods": ["svf", "ia3"], "tasks": ["pick", "stories"],
                    "against": "svf/expert"},
        "unseen": {
            "title": "Unseen tasks", "methods": ["svf"], "strategies": ["cls", "fewshot/2"], "tasks": ["pick_more"],
        },
    },
}  # fmt: skip


def written(folder: Path, **values: Any) -> Path:
    rows, path = folder / "rows.jsonl", folder / "tables.yaml"
    rows.write_text("".join(json.dumps({"q": f"Is it {i}?", "answer": f"It is {i}."}) + "\n" for i in range(10)))
    grid = copy.deepcopy(GRID | {"out": str(folder / "runs")} | values)
    for text in grid["texts"].values():
        text["data"] = str(rows)
    grid["job"]["domains"]["pick"] |= {"data": str(rows), "test": str(rows)}
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def grid(folder: Path, **values: Any) -> TablesConfig:
    return load(written(folder, **values))


def measured(correct: str, **more: Any) -> dict[str, Any]:
    figures = {
        "correct": correct, "warning": None, "pass1_s": 0.0, "pass2_s": 1.0,
        "baselines": {"majority": None, "random": None, "golds": {}},
    }  # fmt: skip
    return figures | more


# ----------------------------------------------------------------------------------------------------------- statistics


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_the_interval_of_one_seed_is_wilsons(right: list[bool]) -> None:
    mean = over_seeds([right])
    assert (mean.low, mean.high) == wilson(sum(right), len(right))


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_a_seed_that_is_told_twice_narrows_nothing(right: list[bool]) -> None:
    once, twice = over_seeds([right]), over_seeds([right, right])
    assert twice.acc == once.acc
    assert twice.high - twice.low >= once.high - once.low - 1e-9


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = over_seeds([[True, False] * 50] * 3)
    apart = over_seeds([[True] * 100, [True, False] * 50, [False] * 100])
    assert alike.acc == apart.acc == 0.5
    # the means 1, 0.5 and 0 vary by 0.25, that of 3 seeds by a twelfth: as the mean of 3 independent answers does
    assert (apart.low, apart.high) == pytest.approx(wilson(1.5, 3), abs=0.01)
    assert alike.high - alike.low < 0.2


def test_with_one_seed_the_paired_test_is_mcnemars() -> None:
    first = [True] * 9 + [False] + [True] * 20
    second = [False] * 9 + [True] + [True] * 20
    exact = 2 * (comb(10, 0) + comb(10, 1)) / 2**10  # of ten examples that differ, nine favour the first
    assert paired([first], [second]).p == pytest.approx(exact, abs=0.005)
    assert paired([first], [second]).gain == pytest.approx(8 / 30)


def test_a_comparison_the_other_way_round_says_the_opposite() -> None:
    first, second = [[True, True, False, True]], [[False, True, False, False], [True, False, False, False]]
    there, back = paired(first, second), paired(second, first)
    assert (there.gain, there.low, there.high) == pytest.approx((-back.gain, -back.high, -back.low))
    assert there.p == back.p


def test_what_is_equal_everywhere_does_not_differ() -> None:
    same = paired([[True, False]], [[True, False]])
    assert (same.gain, same.p) == (0.0, 1.0)
    assert (same.low, same.high) == pytest.approx((wilson(2, 2)[0] - 1, 1 - wilson(2, 2)[0])), "of two examples"


def test_a_difference_of_accuracies_ends_at_100_points_and_is_never_certain() -> None:
    ninety_nine = paired([[True] * 100], [[False] * 99 + [True]])
    assert ninety_nine.gain == 0.99 and ninety_nine.high == 1.0 and ninety_nine.low == pytest.approx(0.97, abs=0.001)
    every, none = paired([[True] * 24], [[False] * 24]), paired([[True] * 24], [[True] * 24])
    unseen = 1 - wilson(24, 24)[0]
    assert (every.low, every.high) == pytest.approx((1 - 2 * unseen, 1.0))
    assert (none.low, none.high) == pytest.approx((-unseen, unseen))
    losses = paired([[1.0, 9.0]], [[3.0, 4.0]], math.inf)
    assert losses.low < -1 and losses.high > 1, "a loss has no such end"
    assert paired([[3.0] * 4], [[1.0] * 4], math.inf).low == 2.0


def test_two_strategies_over_the_same_experts_are_not_told_apart_by_how_much_the_experts_differ() -> None:
    good, bad = [True] * 8, [False] * 8
    same = paired([good, bad], [good, bad], alike=True)
    few = 1 - wilson(8, 8)[0]  # what eight examples leave open
    assert (same.low, same.high) == pytest.approx((-few, few))
    other = paired([good, bad], [good, bad])
    assert (other.low, other.high) == (-1.0, 1.0)
    # the seeds' gains, 0.5 and 0, vary by 0.125; the examples' gains, half of them 0.5 and half 0, by 1 / 14
    moved = paired([good, bad], [[True, False] * 4, bad], alike=True)
    assert moved.high - moved.gain == pytest.approx(1.96 * (1 / 14 / 8 + 0.125 / 2) ** 0.5)


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"svf": {"rl.lrr": 1}}}, r"method 'svf': unknown key 'rl\.lrr'; did you mean 'lr'\?"),
        ({"methods": {"base": {}}}, r"'base' is the model itself"),
        ({"unseen": {"pick": {"expert": "pick"}}}, r"'pick' is a name of two tasks"),
        ({"unseen": {"pick_more": {"expert": "pik"}}}, r"no domain 'pik'; did you mean 'pick'\?"),
        ({"job": GRID["job"] | {"model": "tiny"}}, r"job\.model: the grid says it, by models"),
        ({"texts": {"pick": GRID["texts"]["stories"]}}, r"'pick' is a name of two tasks"),
        ({"tables": {"t": GRID["tables"]["unseen"] | {"tasks": ["stories"]}}}, r"'stories' is a text"),
        ({"seeds": []}, r"seeds: .*at least 1 item"),
        ({"tables": {"t": {"title": "T", "methods": ["svg"], "tasks": ["pick"]}}}, r"no method 'svg'; did you mean"),
        ({"tables": {"t": {"title": "T", "methods": ["svf"], "tasks": ["pik"]}}}, r"no task 'pik'; did you mean"),
        ({"tables": {"t": GRID["tables"]["trained"] | {"against": "svf/cls"}}}, r"against: no row 'svf/cls'"),
        ({"tables": {"t": GRID["tables"]["trained"] | {"strategies": ["fewshot/0"]}}}, r"not 'fewshot/0'"),
    ],
)
def test_a_wrong_grid_is_refused_in_a_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(tmp_path, **change)


def test_a_method_changes_the_job_and_every_expert_is_published(tmp_path: Path) -> None:
    job = job_of(grid(tmp_path), "tiny", "ia3", 1)
    assert (job.adapter.kind, job.rl.lr, job.seed, job.run) == ("ia3", 0.5, 1, "tiny.ia3.1")
    assert job.domains["pick"].publish == "always"


def test_the_base_is_measured_once_and_a_seed_comes_before_the_next(tmp_path: Path) -> None:
    names = [cell.name for cell in cells_of(grid(tmp_path))]
    assert names == ["tiny.base.0", "tiny.svf.0", "tiny.ia3.0", "tiny.svf.1", "tiny.ia3.1"]


def test_a_grid_of_before_there_were_samplers_and_betas_to_choose_goes_on(tmp_path: Path) -> None:
    """Its cells say the same of the settings; methods are compared by one sampler, which is transformers."""
    values = GRID["job"] | {"rl": GRID["job"]["rl"] | {"engine": "transformers", "betas": [0.9, 0.999]}}
    (tmp_path / "named").mkdir()
    assert [cell.made_of for cell in cells_of(grid(tmp_path))] == [
        cell.made_of for cell in cells_of(grid(tmp_path / "named", job=values))
    ]


# ---------------------------------------------------------------------------------------------------------------- cells


def test_a_cell_is_made_once_and_what_fails_is_a_hole_with_its_reason(tmp_path: Path) -> None:
    config = grid(tmp_path, seeds=[0])
    values = config.model_dump(mode="json")
    base, svf, _ = cells_of(config)
    for new in (base, svf):
        make_cell(values, new)
    base, svf, ia3 = load_cells(config)
    assert svf.base_digest == open_weights("tiny").digest
    assert len(svf.measured["pick"]["expert"]["correct"]) == len(base.measured["pick"]["base"]["correct"]) == 8
    assert svf.measured["pick"]["expert"]["unseen"], "the domain names rows for tests"
    assert svf.trained["pick"]["numbers"] > 0 and len(svf.trained["pick"]["curve"]) == 1
    assert "pick" in svf.measured["pick_more"]["fewshot/2"]["mixture"] or svf.missing
    assert svf.lacks(config) == [("pick_more", "cls")]
    assert "classification" in svf.missing["pick_more/cls"]

    nats = [cell.measured["stories"][strategy]["nats"] for cell, strategy in ((base, "base"), (svf, "expert"))]
    assert [len(row) for row in nats] == [8, 8] and all(0 < loss < 20 for row in nats for loss in row)

    marked = replace(svf, measured=svf.measured | {"pick": {"expert": measured("11111111")}})
    save_cell(config, marked)
    make_cell(values, svf)
    assert load_cells(config)[1].measured == marked.measured, "what is measured is not measured again"

    text = markdown(summary(config, load_cells(config)))
    assert "100.0 (67.6-100.0; n 8)" in text
    assert "- tiny.ia3.0 pick/expert: not begun" in text
    assert f"- tiny.svf.0 pick_more/cls: {svf.missing['pick_more/cls']}" in text
    assert ia3.measured == {}


def test_a_cell_of_other_settings_is_refused_but_not_one_of_other_places(tmp_path: Path) -> None:
    config = grid(tmp_path)
    save_cell(config, next(cells_of(config)))
    elsewhere = grid(tmp_path, unseen={"pick_more": {"expert": "pick", "data": "elsewhere.jsonl"}}, seeds=[0, 1, 2])
    assert len(load_cells(elsewhere)) == 7
    with pytest.raises(RunError, match=r"tiny\.base\.0\.json was made with other settings"):
        load_cells(grid(tmp_path, limit=9))


def test_cells_of_two_models_under_one_name_are_refused(tmp_path: Path) -> None:
    config = grid(tmp_path)
    for new, digest in zip(cells_of(config), "aab", strict=False):
        save_cell(config, replace(new, base_digest=digest))
    with pytest.raises(RunError, match=r"tiny\.base\.0 and tiny\.ia3\.0 were made with other weights of 'tiny'"):
        load_cells(config)


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    config = grid(tmp_path)
    cell = next(cells_of(config))
    save_cell(config, cell)
    file = Path(config.folder, CELLS, f"{cell.name}.json")
    file.write_text(file.read_text().replace('"seconds": 0.0', '"seconds": 1.0'))
    with pytest.raises(RunError, match=r"tiny\.base\.0\.json is damaged .*delete it"):
        load_cells(config)


# --------------------------------------------------------------------------------------------------------------- tables


def some_cells(config: TablesConfig) -> list[GridCell]:
    """Base 1 of 4 right, svf 4 and 2 of 4, ia3 2 of 4 with one seed alone."""
    right = {("base", 0): "0001", ("svf", 0): "1111", ("svf", 1): "0011", ("ia3", 0): "0011"}
    cells = []
    for new in cells_of(config):
        digits = right.get((new.method, new.seed))
        strategy = "base" if new.method == "base" else "expert"
        cells.append(replace(new, measured={"pick": {strategy: measured(digits)}} if digits else {}))
    return cells


def test_a_table_shows_means_intervals_seeds_and_differences(tmp_path: Path) -> None:
    config = grid(tmp_path)
    found = summary(config, some_cells(config))
    base, svf, ia3 = found["tables"]["trained"]["rows"]
    assert [row["tasks"]["pick"]["acc"] for row in (base, svf, ia3)] == [0.25, 0.75, 0.5]
    assert svf["tasks"]["pick"]["seeds"] == 2 and "difference" not in svf["tasks"]["pick"]
    assert ia3["tasks"]["pick"]["difference"]["gain"] == -0.25
    text = markdown(found)
    low, high = wilson(2, 4)
    assert f"50.0 ({100 * low:.1f}-{100 * high:.1f}; n 4, seeds 1)" in text
    assert "-25.0 (" in text


def test_the_file_of_figures_renders_to_the_same_tables(tmp_path: Path) -> None:
    config = grid(tmp_path)
    found = summary(config, some_cells(config))
    assert markdown(json.loads(json.dumps(found, allow_nan=False))) == markdown(found)


def test_a_table_tells_what_pass_1_chose_and_took(tmp_path: Path) -> None:
    config = grid(tmp_path)
    cells = some_cells(config)
    chosen = measured("0000", labels={"pick": 3, "others": 1}, pass1_s=1.0, pass2_s=4.0)
    found_by_search = measured("0000", mixture="pick:0.5")
    svf = cells[1]
    cells[1] = replace(svf, measured=svf.measured | {"pick_more": {"cls": chosen, "fewshot/2": found_by_search}})
    text = markdown(summary(config, cells))
    assert "| tiny  | svf    | cls     | 25        |" in text
    assert "tiny.svf.0 pick_more/cls | pick 3, others 1 |" in text
    assert "tiny.svf.0 pick_more/fewshot/2 | pick:0.5 |" in text


def test_a_text_is_told_by_its_perplexity_and_the_nats_that_an_expert_costs(tmp_path: Path) -> None:
    config = grid(tmp_path)
    cells = some_cells(config)
    cells[0] = replace(cells[0], measured={"stories": {"base": {"nats": [1.0, 3.0], "warning": None}}})
    cells[1] = replace(cells[1], measured={"stories": {"expert": {"nats": [1.5, 3.5], "warning": None}}})
    base, svf, _ = summary(config, cells)["tables"]["trained"]["rows"]
    assert (base["tasks"]["stories"]["nats"], svf["tasks"]["stories"]["nats"]) == (2.0, 2.5)
    text = markdown(summary(config, cells))
    assert "perplexity 7.39 (" in text  # e^2
    assert "-0.500 nats a token (-0.500 to -0.500), p 0.5" in text  # of two examples, half of the exchanges go as far


# ------------------------------------------------------------------------------------------------------------ GPU hours


def test_hours_grow_with_steps_answers_and_model() -> None:
    tiny = shape_of("tiny")
    one = training_hours(tiny, steps=10, rollouts=64, tokens=100)
    assert training_hours(tiny, steps=20, rollouts=64, tokens=100) == pytest.approx(2 * one)
    assert training_hours(tiny, steps=10, rollouts=64, tokens=200) > one
    assert training_hours(replace(tiny, parameters=2 * tiny.parameters), steps=10, rollouts=64, tokens=100) > one
    assert answering_hours(tiny, prompts=0, tokens=100) == 0


def test_the_hours_of_8_billion_parameters_are_as_reckoned_by_hand() -> None:
    # 256 rollouts of 768 tokens, 2 x 8e9 operations each, at 0.4 x 989e12 per second: 7.95 s; the base forwards, the
    # policy forwards, and a backward pass without gradients of weights takes as long
    shape = replace(shape_of("tiny"), parameters=8 * 10**9, size=2)
    hours = training_hours(shape, steps=100, rollouts=256, tokens=512)
    updates = 100 * 3 * 7.95 / 3600
    assert updates < hours < 2 * updates


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/tables*.yaml")), ids=lambda path: path.name)
def test_every_shipped_grid_is_valid(path: Path) -> None:
    load(path)


def test_a_dry_run_shows_cells_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", str(written(tmp_path)), "job.gpus=1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "5 of 5 cells are to be made" in said and "GPU hours" in said
    assert not (tmp_path / "runs").exists()


def test_the_papers_grid_tells_its_hours_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the shape of a model that is here in place of those on the hub
    words = [f"out={tmp_path}", "models={llama3-8b: tiny, mistral-7b: tiny}"]
    assert main(["tables", str(ROOT / "jobs" / "tables_paper.yaml"), *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "50 of 50 cells are to be made" in said and "hours of an H100 in all" in said
    assert "1,000 test prompts of each task" in said


def test_the_papers_largest_model_is_a_grid_of_the_words_in_the_file() -> None:
    path = ROOT / "jobs" / "tables_paper.yaml"
    comment = path.read_text().partition("run: paper\n")[0].replace("#", "").replace("\\\n", "")
    (line,) = [line for line in comment.splitlines() if "llama3-70b" in line]
    config = load(path, shlex.split(line)[3:])
    assert [*config.models] == ["llama3-70b"]


def test_a_table_of_rows_that_chose_the_expert_says_so_once(tmp_path: Path) -> None:
    config = grid(tmp_path)
    cells = some_cells(config)
    assert "chose the expert" not in markdown(summary(config, cells))
    for at in (1, 3):
        cells[at] = replace(cells[at], measured={"pick": {"expert": measured("1100", unseen=False)}})
    assert markdown(summary(config, cells)).count("- pick: these rows chose the expert in training") == 1


def test_an_example_that_the_verifier_left_open_counts_for_nobody(tmp_path: Path) -> None:
    config = grid(tmp_path)
    cells = some_cells(config)
    svf = cells[1]
    cells[1] = replace(svf, measured={"pick": {"expert": measured("1-11")}})
    _, svf_row, ia3_row = summary(config, cells)["tables"]["trained"]["rows"]
    assert (svf_row["tasks"]["pick"]["n"], svf_row["tasks"]["pick"]["acc"]) == (3, 5 / 6)
    assert ia3_row["tasks"]["pick"]["n"] == 4
    assert ia3_row["tasks"]["pick"]["difference"]["gain"] == pytest.approx(2 / 3 - 5 / 6)


def test_a_table_of_several_sizes_is_drawn_by_numbers_one_line_for_each_kind() -> None:
    rows = [
        {"model": "tiny", "method": method, "strategy": "expert", "training": {"numbers": numbers},
         "tasks": {"pick": {"acc": 0.5, "low": 0.25, "high": 0.75, "n": 8, "seeds": 1}}}
        for method, numbers in (("few", 13), ("all", 3584), ("lora", 900))
    ]  # fmt: skip
    base = {"model": "tiny", "method": "base", "strategy": "base", "training": None, "tasks": {}}
    table = {"title": "Few", "tasks": ["pick"], "rows": [base, *rows]}
    drawn = by_numbers(table, {"few": "svf", "all": "svf", "lora": "lora"})
    assert drawn.count(">svf<") == drawn.count(">lora<") == 1
    assert "trained numbers" in drawn


def test_a_table_tells_what_its_searches_spent_as_means_over_seeds(tmp_path: Path) -> None:
    config = grid(tmp_path)
    cells = some_cells(config)
    for at, prompts, seconds in ((1, 600, 10.0), (3, 800, 31.0)):
        found = measured("0000", mixture="pick:0.5", search_prompts=prompts, search_s=seconds)
        cells[at] = replace(cells[at], measured=cells[at].measured | {"pick_more": {"fewshot/2": found}})
    text = markdown(summary(config, cells))
    assert "| tiny  | svf    | fewshot/2 | 700 answers, 20 s |" in text


def pictured(config: TablesConfig) -> list[GridCell]:
    """Cells of two seeds with what pass 1 chose, what a search found, and the model's variance."""
    cells = some_cells(config)
    for at, labels, mixture in ((1, {"pick": 3, "others": 1}, "pick:0.5"), (3, {"pick": 2, "code": 2}, "base")):
        more = {"cls": measured("0000", labels=labels), "fewshot/2": measured("0000", mixture=mixture)}
        cells[at] = replace(cells[at], measured=cells[at].measured | {"pick_more": more})
    cells[1] = replace(cells[1], variance={"q_proj": [[1, 0.5], [2, 0.75], [4, 1.0]]})
    return cells


def test_there_is_a_picture_of_what_is_in_the_grid_and_of_nothing_else(tmp_path: Path) -> None:
    config = grid(tmp_path)
    without, cells = some_cells(config), pictured(config)
    assert pictures(config, without, summary(config, without)) == {}
    drawn = pictures(config, cells, summary(config, cells))
    assert [*drawn] == ["tiny.variance.svg", "tiny.svf.cls.svg", "tiny.svf.alpha.svg"]
    assert pictures(config, cells, summary(config, cells)) == drawn
    text = markdown(summary(config, cells), tuple(drawn))
    assert "![tiny.svf.cls](tiny.svf.cls.svg)" in text
    assert "## Pictures" not in markdown(summary(config, cells))


def test_what_pass_1_chose_is_summed_over_seeds_and_a_search_has_a_weight_for_each(tmp_path: Path) -> None:
    cells = pictured(grid(tmp_path))
    assert named(cells, "cls") == {"pick_more": {"pick": 5, "others": 1, "code": 2}}
    assert named(cells, "prompt") == {}
    assert searched(cells) == {"pick_more fewshot/2": {"pick": [0.5, 0.0]}}


def test_a_confusion_has_a_number_for_each_task_and_label() -> None:
    drawn = confusion("tiny svf cls", {"math": {"math": 41}, "code": {"code": 37, "others": 5}})
    assert [drawn.count(f">{what}<") for what in (41, 37, 5, 0, "others", "tiny svf cls")] == [1, 1, 1, 3, 1, 1]


def texts_of(svg: str) -> list[tuple[str, float, float]]:
    """Returns each horizontal text of a picture with where it begins and about where it ends, in points."""
    found = re.findall(
        r'<text style="font-size: ([\d.]+)px[^>]*text-anchor: start[^>]* x="([-\d.]+)"[^>]*>([^<]*)<', svg
    )
    return [(text, float(x), float(x) + 0.55 * float(size) * len(text)) for size, x, text in found]


def test_no_title_and_no_name_of_a_line_is_cut_off() -> None:
    methods = ["svf", "svf-mlp", "svf-attention", "svf-sft", "lora", "lora-rl", "ia3", "dora"]
    curves = [
        {"model": "m", "method": name, "seed": 0, "domain": "d", "base": 0.1, "rows": [[1, 2.0, 0.1, 0.2, 0.0]]}
        for name in methods
    ]
    experts = ["gsm8k", "mbpp", "arc_easy", "llama3-8b.gsm8k", "llama3-8b.mbpp", "llama3-8b.arc_easy"]
    title = "HuggingFaceTB-SmolLM2-135M-Instruct svf prompt and more"
    drawn = {
        learning(title, curves): methods,
        alphas({"arc": dict.fromkeys(experts, 0.5)}, title): experts,
        confusion(title, {"arc": dict.fromkeys(experts, 1)}): [],
        explained(title, {name: [[1, 0.5], [2, 1.0]] for name in ["experts.gate_up_proj", *methods]}): methods,
    }
    for svg, names in drawn.items():
        (size,) = re.findall(r'viewBox="0 0 ([\d.]+) ', svg)
        texts = texts_of(svg)
        assert {*names} <= {text for text, _, _ in texts}
        lines = [text for text in re.findall(r">([^<]+)</text>", svg) if text in title and " " in text]
        assert " ".join(lines) == title and max(map(len, lines)) < 50
        assert [text for text, start, end in texts if start < 0 or end > float(size)] == []


def test_of_several_models_each_has_its_learning_curves(tmp_path: Path) -> None:
    config = grid(tmp_path, models={"tiny": "tiny", "other": "tiny"})
    curve = {"base": 0.0, "curve": [[1, 1.0, 0.0, 0.5, 0.0]], "numbers": 3, "validation": 0.5, "seconds": 1.0,
             "peak_gib": 1.0, "kl": 0.0}  # fmt: skip
    cells = [replace(new, trained={"pick": curve}) if new.method != "base" else new for new in cells_of(config)]
    drawn = pictures(config, cells, summary(config, cells))
    assert [*drawn] == ["tiny.pick.svg", "other.pick.svg"]
    assert drawn["tiny.pick.svg"].count(">svf<") == drawn["tiny.pick.svg"].count(">tiny pick<") == 1


def test_every_kind_of_matrix_has_its_line_of_explained_variance() -> None:
    kinds = [f"kind{i}" for i in range(8)]  # more than there are colours
    drawn = explained("tiny", {kind: [[1, 0.5], [2, 1.0]] for kind in kinds})
    assert all(drawn.count(f">{kind}<") == 1 for kind in kinds)
    assert "largest singular values" in drawn
