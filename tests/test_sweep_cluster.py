"""Sweeps on Ray: who is stopped, who wins, a sweep that is killed, and winners that train and adapt as they are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from waiting import wait_until

from t2ray.cli.main import main
from t2ray.cluster.session import session
from t2ray.cluster.train.cells import make_cell, make_cells
from t2ray.cluster.train.tune import sweep
from t2ray.config import tables
from t2ray.config.search import SweepConfig, load
from t2ray.core import DataError, ResourceError, RunError
from t2ray.evals.cells import cells_of, load_cell
from t2ray.sweep.results import TRIALS, ReportScore, Trial, write_results

pytestmark = [pytest.mark.cluster, pytest.mark.long]

ROOT = Path(__file__).parents[1]
CPU = {"CPU": 1.0}
JOB = {"model": "tiny", "domains": {"math": {"task": "math"}}, "rl": {"steps": 9}}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # trials cannot import a test module
    with session(num_cpus=2):
        yield
    cloudpickle.unregister_pickle_by_value(here)


def made(folder: Path, **values: Any) -> SweepConfig:
    path = folder / "sweep.yaml"
    space = {"rl.lr": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]}
    path.write_text(
        yaml.safe_dump(
            {"kind": "rl", "out": str(folder / "runs"), "sampler": "grid", "job": JOB, "space": space} | values
        )
    )
    return load(path)


def rising(config: SweepConfig, trial: Trial, report: ReportScore) -> float:
    """A run whose score is its learning rate, from the first step on; the best of the search is bad by other seeds."""
    lr = float(trial.point["rl.lr"])
    score = lr if trial.seed == 0 or lr < 0.06 else 0.0
    for step in (3, 6):
        report(step, score)
    return score


def fails_at_its_best(config: SweepConfig, trial: Trial, report: ReportScore) -> float:
    """The highest score is that of a trial that then fails: one by a mistake, one by its process's death."""
    lr = float(trial.point["rl.lr"])
    report(3, lr)
    if lr == 0.06:
        raise DataError("no such row")
    if lr == 0.05:
        os._exit(1)
    return lr


def by_lr(trials: list[Trial]) -> dict[float, Trial]:
    return {trial.point["rl.lr"]: trial for trial in trials if not trial.final}


def test_a_winner_is_named_on_further_seeds_and_the_rest_is_stopped_early(tmp_path: Path) -> None:
    # one at a time: who comes after better ones is stopped at the first rung
    order = {"rl.lr": [0.05, 0.06, 0.04, 0.03, 0.02, 0.01]}
    config = made(tmp_path, space=order, at_once=1, finalists=2)
    ticks: list[int] = []
    trials = sweep(config, rising, steps=9, holds=CPU, needs=CPU, tick=lambda trials, total: ticks.append(total))
    search = by_lr(trials)
    assert search[0.06].status == "done" and search[0.06].history == ((3, 0.06), (6, 0.06), (9, 0.06))
    assert [search[lr].status for lr in (0.04, 0.03, 0.02, 0.01)] == ["stopped"] * 4
    assert all(trial.step < 9 for trial in trials if trial.status == "stopped")
    assert write_results(config, trials)["rl.lr"] == 0.05  # 0.06 was the luckiest of the search
    assert set(ticks) == {6 + 2 * 2}
    assert not (tmp_path / "runs" / "sweep" / "tune").exists()


def test_a_trial_that_failed_never_wins_and_is_tried_again_by_a_resume(tmp_path: Path) -> None:
    config = made(tmp_path, space={"rl.lr": [0.06, 0.05, 0.04, 0.03]}, stop_early=False, finalists=1)
    trials = sweep(config, fails_at_its_best, steps=9, holds=CPU, needs=CPU)
    search = by_lr(trials)
    assert search[0.06].status == "failed" and search[0.06].error == "no such row"
    assert search[0.05].status == "failed" and "failed 3 times" in str(search[0.05].error)
    assert write_results(config, trials) == {"rl.lr": 0.04}
    again = sweep(config, rising, steps=9, holds=CPU, needs=CPU, resume=True)
    assert by_lr(again)[0.05].status == "done" and by_lr(again)[0.04] == search[0.04]


def test_more_than_the_cluster_has_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="a trial of sweep 'sweep' needs 8 CPU, the cluster has 2 CPU"):
        sweep(made(tmp_path), rising, steps=9, holds={"CPU": 8}, needs={"CPU": 8})
    assert not (tmp_path / "runs").exists()


def counted(config: SweepConfig, trial: Trial, report: ReportScore) -> float:
    """Leaves a mark for each time it runs; once four trials have begun, none ends before the gate opens."""
    folder = Path(config.out)
    with open(folder / f"ran-{trial.id}", "a") as file:
        file.write(".")
    report(3, trial.point["rl.lr"])
    while len(list(folder.glob("ran-*"))) >= 4 and not (folder / "gate").exists():
        time.sleep(0.05)
    report(6, trial.point["rl.lr"])
    return float(trial.point["rl.lr"])


DRIVER = """
import sys
from ray import cloudpickle
import test_sweep_cluster as here
cloudpickle.register_pickle_by_value(here)
here.sweep(here.load(sys.argv[1]), here.counted, steps=9, holds=here.CPU, needs=here.CPU)
"""


def test_a_killed_sweep_goes_on_and_runs_no_finished_trial_again(tmp_path: Path) -> None:
    config = made(tmp_path, stop_early=False, finalists=1)
    out = Path(config.out)
    out.mkdir()
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "sweep.yaml")]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    state = out / "sweep" / TRIALS

    def settled() -> set[str]:
        rows = json.loads(state.read_text()) if state.exists() else []
        return {Trial(point=row["point"], seed=row["seed"]).id for row in rows if row["status"] == "done"}

    first = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with first:
        try:
            wait_until(
                lambda: first.poll() is not None or (len(settled()) >= 2 and len(list(out.glob("ran-*"))) >= 4),
                "two trials that are done and two that run",
            )
            assert first.poll() is None, first.stdout and first.stdout.read()
        finally:
            os.killpg(first.pid, signal.SIGKILL)
    before = settled()
    assert 2 <= len(before) < 6

    (out / "gate").touch()
    trials = sweep(config, counted, steps=9, holds=CPU, needs=CPU, resume=True)
    assert write_results(config, trials) == {"rl.lr": 0.06}
    assert len(settled()) == 6 + 2
    ran = {path.name.removeprefix("ran-"): len(path.read_text()) for path in out.glob("ran-*")}
    assert all(ran[name] == 1 for name in before)
    assert sum(ran.values()) > len(ran)  # those that were under way began again


def test_optuna_proposes_points_within_the_space(tmp_path: Path) -> None:
    space = {"rl.lr": {"log": [0.001, 0.03]}, "rl.baseline": ["mean", "loo"]}
    job = JOB | {"rl": {"steps": 9, "lr": 0.02, "baseline": "mean"}}
    config = made(tmp_path, job=job, sampler="optuna", space=space, trials=4, stop_early=False, finalists=1)
    trials = sweep(config, rising, steps=9, holds=CPU, needs=CPU)
    search = [trial for trial in trials if not trial.final]
    assert len(search) == 4 and all(trial.status == "done" for trial in search)
    assert {"rl.lr": 0.02, "rl.baseline": "mean"} in [trial.point for trial in search]  # the job's own
    assert all(0.001 <= t.point["rl.lr"] <= 0.03 and t.point["rl.baseline"] in ("mean", "loo") for t in search)
    best = max(search, key=lambda trial: trial.score or 0.0)
    assert write_results(config, trials) == best.point
    with pytest.raises(RunError, match="go on with it by --resume"):
        sweep(config, rising, steps=9, holds=CPU, needs=CPU)


# ------------------------------------------------------------------------------------------------- the commands, whole


def test_the_winner_of_a_sweep_trains_and_then_adapts_as_its_file_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"steps": 2, "prompts": 2, "samples": 2, "eval_every": 1, "eval_prompts": 4}
    domains = {"pick": {"task": "pick", "publish": "always"}}
    job = {"model": "tiny", "workers": 0, "cpus": 1, "verifiers": 0, "domains": domains, "rl": small}
    made(tmp_path, job=job, space={"rl.lr": [0.01, 0.03]}, finalists=1)
    assert main(["sweep", "sweep.yaml", "run=lr"]) == 0
    assert "use it: t2ray train" in capsys.readouterr().out
    assert main(["sweep", "sweep.yaml", "run=lr"]) == 2
    assert "go on with it by --resume" in capsys.readouterr().err
    assert main(["train", "runs/lr/best.yaml"]) == 0
    assert "best at step" in capsys.readouterr().out

    for name in ("pick", "_mixtures"):  # an expert that answers: a search without a right answer is not saved
        shutil.copytree(ROOT / "t2ray" / "tiny" / "experts" / name, tmp_path / "known" / name)
    search = {"model": "tiny", "experts": "known", "tasks": "pick", "shots": 4, "held_out": 4, "max_tokens": 8,
              "settings": {"iterations": 1, "population": 4}}  # fmt: skip
    made(tmp_path, kind="cem", job=search, space={"settings.population": [4, 6]}, finalists=1, run="cem")
    assert main(["sweep", "sweep.yaml"]) == 0
    capsys.readouterr()
    assert main(["adapt", "--config", "runs/cem/best.yaml"]) == 0
    assert "fewshot/cem-best" in capsys.readouterr().out
    for name in ("results.md", "results.parquet", "parallel.png", "heatmap.png"):
        assert (tmp_path / "runs" / "cem" / name).exists()


def test_a_trials_workers_have_resources_beside_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"steps": 1, "prompts": 2, "samples": 2, "eval_prompts": 2}
    job = {"model": "tiny", "workers": 1, "cpus": 1, "verifiers": 0, "domains": {"pick": {"task": "pick"}}, "rl": small}
    made(tmp_path, job=job, space={"rl.lr": [0.01]}, finalists=1, seeds=2)
    assert main(["sweep", "sweep.yaml"]) == 0
    assert "over 2 further seeds, of 3 trials" in capsys.readouterr().out


def test_a_sweep_that_does_not_fit_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, job=JOB | {"cpus": 7})
    assert main(["sweep", "sweep.yaml"]) == 2
    assert "a trial of sweep 'sweep' needs 7 CPU, the cluster has 2 CPU" in capsys.readouterr().err
    made(tmp_path, job=JOB | {"gpus": 1})
    assert main(["sweep", "sweep.yaml"]) == 2
    assert "needs 1 GPU, the cluster has 0 GPU" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_cells_of_a_grid_are_tasks_of_the_cluster_and_come_to_what_they_come_to_here(tmp_path: Path) -> None:
    rl = {"steps": 1, "prompts": 4, "samples": 1, "eval_prompts": 4, "eval_every": 1}
    grid = {
        "models": {"tiny": "tiny"}, "limit": 4, "methods": {"svf": {}}, "job": {"domains": {"pick": {"task": "pick"}},
        "workers": 1, "verifiers": 0, "rl": rl},
        "tables": {"t": {"title": "T", "methods": ["svf"], "tasks": ["pick"]}},
    }  # fmt: skip
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump(grid))
    there, here = (tables.load(path, [f"out={tmp_path}/{place}"]) for place in ("there", "here"))
    told = list[str]()
    cells = make_cells(there, lambda cell: told.append(cell.name))
    assert sorted(told) == ["tiny.base.0", "tiny.svf.0"]
    assert not any(cell.missing or cell.lacks(there) for cell in cells)
    base = next(cells_of(here))
    make_cell(here.model_dump(mode="json"), base)
    assert cells[0].measured["pick"]["base"]["correct"] == load_cell(here, base).measured["pick"]["base"]["correct"]
    assert cells[1].trained["pick"]["steps"] == 1
    assert make_cells(there, lambda cell: told.append(cell.name)) == cells and len(told) == 2
