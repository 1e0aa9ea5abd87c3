"""A sweep's space, its points, who wins it, and the files it leaves; no Ray."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from t2ray.cli.main import main
from t2ray.config import train as training
from t2ray.config.search import CEMJob, Dimension, SweepConfig, job_at, load
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, RunError
from t2ray.sweep.pictures import draw
from t2ray.sweep.results import Trial, finalists, open_sweep, save, standings, start, write_results
from t2ray.sweep.space import points, trial_id

ROOT = Path(__file__).parents[1]
JOB = {"model": "tiny", "domains": {"math": {"task": "math"}}, "rl": {"steps": 9}}
SPACE = {"rl.kl": [0.0, 0.1, 0.2, 0.3], "rl.lr": {"log": [0.001, 0.1]}}


def write(folder: Path, **values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"kind": "rl", "out": str(folder / "runs"), "job": JOB, "space": SPACE} | values))
    return path


def made(folder: Path, *overrides: str, **values: Any) -> SweepConfig:
    return load(write(folder, **values), overrides)


# --------------------------------------------------------------------------------------------------------------- space


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"rl.lrr": [0.1]}}, r"space: unknown key 'rl\.lrr'; did you mean 'lr'\?"),
        ({"space": {"rll.lr": [0.1]}}, r"space: unknown key 'rll'; did you mean 'rl'\?"),
        ({"space": {"rl.lr": [0.1, -1.0]}}, r"rl\.lr: .*greater than 0, not -1\.0"),
        ({"space": {"rl.lr": {"log": [0.1, 0.01]}}}, r"low 0\.1 must be below high 0\.01"),
        ({"space": {"rl.lr": {"log": [0.0, 0.01]}}}, r"log: low 0\.0 must be above 0"),
        ({"space": {"rl.lr": {"log": [1, 2], "uniform": [1, 2]}}}, r"one of uniform, log and integers"),
        ({"space": {"rl.lr": {"lag": [1, 2]}}}, r"unknown key 'space\.rl\.lr\.lag'; did you mean 'log'\?"),
        ({"space": {"out": ["a", "b"]}}, r"'out' cannot be swept"),
        ({"space": {"seed": [1, 2]}}, r"'seed' cannot be swept"),
        ({"space": {}}, r"space: .*at least 1 item"),
        ({"sampler": "grid"}, r"sampler grid needs lists of values; rl\.lr is a range"),
        ({"seeds": 1}, r"seeds: .*greater than or equal to 2, not 1"),
        ({"preset": "papr"}, r"unknown preset 'papr'; did you mean 'paper'\?"),
        ({"trails": 3}, r"unknown key 'trails'; did you mean 'trials'\?"),
        ({"job": "none.yaml"}, r"none\.yaml: no such configuration file"),
        ({"kind": "cem"}, r"job: unknown key 'domains'"),
        ({"kind": "cem", "job": {"tasks": "math"}, "space": {"settings.elit": [0.1]}}, r"did you mean 'elite'\?"),
    ],
)
def test_a_mistake_in_a_sweep_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, **change)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_the_papers_grid_is_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"kind": "rl", "preset": "paper", "job": JOB | {"preset": "paper"}}))
    config = load(path)
    assert points(config) == [{"rl.kl": 0.0}, {"rl.kl": 0.1}, {"rl.kl": 0.2}, {"rl.kl": 0.3}]
    job = job_at(config, {"rl.kl": 0.3})
    assert isinstance(job, TrainConfig)
    assert (job.rl.kl, job.rl.lr, job.rl.samples) == (0.3, 2e-3, 1)


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    lists = {"rl.kl": [0.0, 0.1], "targets": [["*.mlp.*"], None], "rl.baseline": ["mean", "loo", "mean"]}
    config = made(tmp_path, sampler="grid", space=lists)
    expected = {json.dumps([a, b, c]) for a, b, c in itertools.product(*lists.values())}
    assert {json.dumps([point[key] for key in lists]) for point in points(config)} == expected
    assert len(points(config)) == 8


@pytest.mark.parametrize("sampler", ["random", "quasi"])
def test_points_are_those_of_the_seed_and_begin_with_the_job_itself(sampler: str, tmp_path: Path) -> None:
    config = made(tmp_path, sampler=sampler, trials=20)
    tried = points(config)
    assert tried == points(config) and len(tried) == 20
    assert tried[0] == {"rl.kl": 0.02, "rl.lr": None}  # the defaults: the rate follows from the model
    assert tried[1:] != points(made(tmp_path, sampler=sampler, trials=20, seed=1))[1:]
    assert points(made(tmp_path, sampler=sampler, trials=5)) == tried[:5]  # more trials only add


def test_quasi_random_points_leave_smaller_holes_than_random_ones(tmp_path: Path) -> None:
    space = {"rl.lr": {"uniform": [0.0001, 1.0]}, "rl.kl": {"uniform": [0.0, 1.0]}}
    corners = np.random.default_rng(0).random((500, 2))

    def hole(sampler: str, seed: int) -> float:
        tried = points(made(tmp_path, sampler=sampler, trials=33, space=space, seed=seed))[1:]
        at = np.array([[p["rl.lr"], p["rl.kl"]] for p in tried])
        return float(np.linalg.norm(corners[:, None] - at[None], axis=2).min(axis=1).max())

    assert np.mean([hole("quasi", s) for s in range(5)]) < np.mean([hole("random", s) for s in range(5)])


@given(u=st.floats(0, 1, exclude_max=True), low=st.floats(1e-6, 10), factor=st.floats(1.001, 1e4))
def test_a_value_lies_within_its_dimension(u: float, low: float, factor: float) -> None:
    high = low * factor
    for given_ in ({"log": (low, high)}, {"uniform": (low, high)}):
        assert low <= Dimension.model_validate(given_).at(u) <= high
    assert Dimension.model_validate({"integers": (3, 5)}).at(u) in (3, 4, 5)
    assert Dimension.model_validate([1, "a", None]).at(u) in (1, "a", None)


def test_the_shipped_sweep_is_valid() -> None:
    config = load(ROOT / "jobs" / "sweep.yaml")
    assert len(points(config)) == config.trials
    assert isinstance(job_at(config, points(config)[1]), TrainConfig)


# ------------------------------------------------------------------------------------------------------------- winners


def trial(lr: float, seed: int = 0, **values: Any) -> Trial:
    return Trial(point={"rl.kl": 0.1, "rl.lr": lr}, seed=seed, **{"status": "done", "step": 9} | values)


def test_trials_that_failed_or_were_stopped_are_no_finalists() -> None:
    trials = [
        trial(0.1, score=0.9, status="failed", error="boom"),
        trial(0.2, score=0.8, status="stopped", step=3),
        trial(0.3, score=0.7, status="running", step=8),
        trial(0.4, score=0.5),
        trial(0.5, score=0.6),
    ]
    assert [point["rl.lr"] for point in finalists(trials, 3)] == [0.5, 0.4]
    with pytest.raises(RunError, match="no trial ran to its end; boom"):
        finalists(trials[:3], 3)


def test_the_winner_is_the_best_on_seeds_that_the_search_has_not_seen() -> None:
    lucky, steady, broken = (
        [trial(lr, seed, final=True, score=score, **more) for seed, score, more in runs]
        for lr, runs in (
            (0.1, [(1, 0.2, {}), (2, 0.3, {})]),
            (0.2, [(1, 0.6, {}), (2, 0.5, {})]),
            (0.3, [(1, 0.9, {}), (2, None, {"status": "failed", "error": "boom"})]),
        )
    )
    search = [trial(0.1, score=0.99), trial(0.2, score=0.6), trial(0.3, score=0.7)]
    ranked = standings([*search, *lucky, *steady, *broken])
    assert [(point["rl.lr"], scores) for point, scores in ranked] == [(0.2, [0.6, 0.5]), (0.1, [0.2, 0.3])]


def test_a_sweep_is_resumed_on_purpose_and_as_it_was(tmp_path: Path) -> None:
    config = made(tmp_path)
    assert open_sweep(config, resume=False) == {}
    start(config)
    kept = [trial(0.1, score=0.5, history=((3, 0.4), (9, 0.5))), trial(0.2, score=0.3, status="stopped")]
    torn = [trial(0.3, status="running", score=0.2, history=((3, 0.2),)), trial(0.4, status="failed", error="boom")]
    save(config, {t.id: t for t in (*kept, *torn)})
    with pytest.raises(RunError, match="go on with it by --resume"):
        open_sweep(config, resume=False)
    known = open_sweep(config, resume=True)
    assert [known[t.id] for t in kept] == kept
    assert [known[t.id].status for t in torn] == ["waiting", "waiting"]
    with pytest.raises(RunError, match=r"started with another trials: 16, now 4; use another run=NAME"):
        open_sweep(made(tmp_path, trials=4), resume=True)


# --------------------------------------------------------------------------------------------------------------- files


def ended(config: SweepConfig) -> list[Trial]:
    """A sweep's trials as if the score rose with lr."""
    found = [
        Trial(point=point, seed=0, status="done" if i % 3 else "stopped", score=i / 20, step=9, seconds=1.0)
        for i, point in enumerate(points(config))
    ]
    found.append(Trial(point={"rl.kl": 0.3, "rl.lr": 0.05}, seed=0, status="failed", error="boom | bang"))
    best = finalists(found, 2)
    return found + [
        Trial(point=p, seed=s, final=True, status="done", score=0.5 - i / 10, step=9)
        for i, p in enumerate(best)
        for s in (1, 2)
    ]


def test_best_yaml_is_a_training_job_as_it_stands(tmp_path: Path) -> None:
    config = made(tmp_path)
    trials = ended(config)
    best = write_results(config, trials)
    assert best == finalists(trials, 1)[0]
    job = training.load(tmp_path / "runs" / "sweep" / "best.yaml")
    winner = job_at(config, best)
    assert isinstance(winner, TrainConfig)
    assert job.rl == winner.rl and job.domains == winner.domains and job.run == "sweep-best"
    assert job.digest == winner.digest


PACKAGE = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"


def test_best_yaml_names_no_folder_of_a_submitted_job(tmp_path: Path) -> None:
    own = {"data": f"{PACKAGE}/rows.jsonl", "prompt": "{text}", "reward": "mine:good"}
    config = made(tmp_path, job={"model": f"{PACKAGE}/models/own", "code": PACKAGE, "domains": {"own": own}})
    write_results(config, ended(config))
    text = (tmp_path / "runs" / "sweep" / "best.yaml").read_text()
    assert "_ray_pkg_" not in text
    job = training.load(tmp_path / "runs" / "sweep" / "best.yaml")
    assert (job.model, job.code, job.domains["own"].data) == ("models/own", ".", "rows.jsonl")


def test_a_sweep_that_is_submitted_again_goes_on(tmp_path: Path) -> None:
    """Its files lie in another folder then."""
    job = JOB | {"code": PACKAGE}
    start(made(tmp_path, job=job))
    assert open_sweep(made(tmp_path, job=job | {"code": PACKAGE.replace("0123", "4567")}), resume=True) == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [("trials.json", "[{"), ("trials.json", '[{"id": 3}]'), ("sweep.json", "\0"), ("trials.json", "1")],
)
def test_a_damaged_file_of_a_sweep_is_named(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(tmp_path)
    start(config)
    (tmp_path / "runs" / "sweep" / name).write_text(text)
    with pytest.raises(RunError, match=f"{name} is damaged.*put back a copy of it"):
        open_sweep(config, resume=True)
    assert main(["status", str(tmp_path / "runs" / "sweep")]) == (2 if name == "trials.json" else 0)
    assert capsys.readouterr().err.count("\n") <= 1


def test_the_table_holds_every_trial_with_its_settings(tmp_path: Path) -> None:
    config = made(tmp_path)
    trials = ended(config)
    write_results(config, trials)
    table = pq.read_table(tmp_path / "runs" / "sweep" / "results.parquet").to_pylist()
    assert [row["trial"] for row in table] == [t.id for t in trials]
    assert [(row["rl.kl"], row["rl.lr"]) for row in table] == [(t.point["rl.kl"], t.point["rl.lr"]) for t in trials]
    text = (tmp_path / "runs" / "sweep" / "results.md").read_text()
    assert all(f"| {t.id} |" in text for t in trials)
    assert f"{trials[16].id} failed: boom | bang" in text


def test_the_pictures_are_drawn_for_numbers_names_and_a_single_value(tmp_path: Path) -> None:
    spaces: list[dict[str, Any]] = [
        SPACE,
        {"rl.kl": [0.1]},
        {"targets": [["*.mlp.*"], None], "rl.baseline": ["mean", "loo"], "rl.steps": {"integers": [3, 90]}},
    ]
    for space in spaces:
        config = made(tmp_path, space=space, trials=9)
        trials = [
            Trial(point=point, seed=0, status="done", score=i / 10, step=9) for i, point in enumerate(points(config))
        ]
        for name in draw(config, trials):
            assert (tmp_path / "runs" / "sweep" / name).read_bytes().startswith(b"\x89PNG")


def test_a_trials_name_depends_on_its_point_and_seed_alone() -> None:
    assert trial_id({"rl.lr": 0.1, "rl.kl": 0.2}, 3) == trial_id({"rl.kl": 0.2, "rl.lr": 0.1}, 3)
    assert len({trial_id({"rl.lr": lr}, seed) for lr in (0.1, 0.2) for seed in (0, 1)}) == 4


def test_a_search_of_mixtures_has_its_own_keys(tmp_path: Path) -> None:
    space = {"settings.population": [8, 16], "settings.elite": {"uniform": [0.1, 0.5]}, "shots": [5, 10],
             "per_layer": [False, True], "settings.sigma": {"log": [0.05, 0.5]}}  # fmt: skip
    config = made(tmp_path, kind="cem", job={"model": "tiny", "tasks": "math"}, space=space, trials=3)
    job = job_at(config, {"settings.population": 8, "per_layer": True})
    assert isinstance(job, CEMJob)
    assert (job.settings.population, job.per_layer, job.tasks, job.shots) == (8, True, ("math",), 10)
    trials = [Trial(point=p, seed=0, status="done", score=0.5, step=1) for p in points(config)]
    final = [Trial(point=points(config)[1], seed=s, final=True, status="done", score=0.5, step=1) for s in (1, 2)]
    write_results(config, [*trials, *final])
    assert draw(config, trials) == ["parallel.png", "heatmap.png"]
    best = yaml.safe_load((tmp_path / "runs" / "sweep" / "best.yaml").read_text())
    assert best["settings"]["population"] == points(config)[1]["settings.population"]
    assert best["task"] == "math" and best["name"] == "sweep-best"
