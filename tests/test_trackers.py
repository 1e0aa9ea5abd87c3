"""W&B and MLflow are told each step once, in the same run of theirs, whatever interrupts a training or themselves.

W&B writes offline files, MLflow a database in a file; both are read back by what they are made of.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from small import step_metrics

from t2ray.cli.main import main
from t2ray.cluster.train.launch import DomainsFailed, train
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import ConfigError
from t2ray.runs.folder import open_run
from t2ray.training.domain import domain_store
from t2ray.training.metrics import StepMetrics
from t2ray.training.trackers import Trackers, check_trackers, tracks

REWARDS = """
from pathlib import Path

def short(completion, row):
    calls = Path(__file__).parent / "calls"
    with calls.open("a") as file:
        file.write(".")
    if calls.stat().st_size == 17:
        raise ZeroDivisionError("once")
    return 1.0 if len(completion) < 12 else -1.0
"""
SMALL = {"steps": 5, "prompts": 2, "samples": 2, "eval_every": 2, "eval_prompts": 2}
REFUSED = "http://someone:hunter2@127.0.0.1:1"  # nobody listens there


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and nobody's settings."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(folder: Path, **changes: Any) -> TrainConfig:
    (folder / "rewards_of_trackers.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"hello {i}"}) + "\n" for i in range(20)))
    own = {"data": str(folder / "rows.jsonl"), "prompt": "{text}", "reward": "rewards_of_trackers:short",
           "max_tokens": 2}  # fmt: skip
    values = {"model": "tiny", "out": str(folder / "runs"), "run": "night", "factors": str(folder / "factors"),
              "workers": 0, "verifiers": 0, "code": str(folder), "domains": {"own": own}, "rl": SMALL}  # fmt: skip
    return resolve(values | changes, where="job.yaml")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as it begins: making one takes seconds."""
    mlflow = needs.extra("mlflow")
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").get_experiment_by_name("t2ray")
    return Path(file)


def rows(*steps: int) -> list[StepMetrics]:
    return [step_metrics(step) for step in steps]


def wandb_records(folder: Path) -> Iterator[Any]:
    """What W&B wrote offline in a domain's folder, in order: LevelDB's log format, with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:  # no header begins in a block's last bytes
                at += left
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield Record.FromString(whole)
                whole = b""


def wandb_steps(folder: Path) -> list[tuple[str, str, int]]:
    """(the run's id, its group, step) of each step in W&B's files."""
    needs.extra("wandb")
    found, run = [], ("", "")
    for record in wandb_records(folder):
        if record.HasField("run"):
            run = (record.run.run_id, record.run.run_group)
        if record.HasField("history"):
            found.append((*run, record.history.step.num))
    return found


def mlflow_steps(config: TrainConfig) -> dict[str, list[int]]:
    """The steps of each run in MLflow's database, by the run's name."""
    mlflow = needs.extra("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{config.out}/mlflow.db")
    experiment = client.get_experiment_by_name("t2ray")
    runs = client.search_runs([experiment.experiment_id], f"tags.`t2ray.run` = '{config.run}'")
    return {
        f"{run.info.run_name} {run.info.status}": [
            metric.step for metric in client.get_metric_history(run.info.run_id, "reward_mean")
        ]
        for run in runs
    }


def test_a_resumed_run_goes_on_in_the_same_tracker_runs_and_doubles_no_step(
    place: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended by its reward in step 4, after the checkpoint of step 2: step 3 is repeated."""
    needs.extra("wandb")
    config = job(place, track=["wandb", "mlflow"])
    (place / "runs").mkdir()
    shutil.copy(empty, place / "runs")
    store = domain_store(config, "own")
    assert store.local is not None
    with pytest.raises(DomainsFailed, match="once"):
        train(config)
    before = tracks(store)
    assert {name: track.told for name, track in before.items()} == {"wandb": 3, "mlflow": 3}
    assert mlflow_steps(config) == {"night/own FAILED": [1, 2, 3]}

    train(config, resume=True)
    after = tracks(store)
    assert {name: (track.id, track.told) for name, track in after.items()} == {
        "wandb": (before["wandb"].id, 5), "mlflow": (before["mlflow"].id, 5)}  # fmt: skip
    assert wandb_steps(store.local) == [(before["wandb"].id, "night", step) for step in range(1, 6)]
    assert mlflow_steps(config) == {"night/own FINISHED": [1, 2, 3, 4, 5]}

    assert main(["status", f"{config.out}/night"]) == 0
    said = capsys.readouterr().out
    assert f"wandb: told up to step 5, run {after['wandb'].id} in " in said and "mlflow: told up to step 5" in said


@pytest.fixture
def opened(place: Path, empty: Path) -> TrainConfig:
    """A run that MLflow has three steps of."""
    config = job(place, track=["mlflow"])
    open_run(config)
    shutil.copy(empty, config.out)
    trackers = Trackers(config, "own", domain_store(config, "own"))
    trackers.tell(rows(1, 2))
    trackers.tell(rows(1, 2, 3))
    return config


def test_a_tracker_that_a_resumed_run_adds_gets_the_steps_before(opened: TrainConfig) -> None:
    needs.extra("wandb")
    config = opened.model_copy(update={"track": ("mlflow", "wandb")})
    store = domain_store(config, "own")
    assert store.local is not None
    trackers = Trackers(config, "own", store)  # from the checkpoint of step 2
    trackers.tell(rows(1, 2, 3))
    trackers.close(rows(1, 2, 3, 4), failed=False)
    assert [step for _, _, step in wandb_steps(store.local)] == [1, 2, 3, 4]
    assert mlflow_steps(config) == {"night/own FINISHED": [1, 2, 3, 4]}


def test_a_server_that_is_away_ends_no_run_and_is_told_everything_when_it_is_back(
    opened: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = domain_store(opened, "own")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", REFUSED)
    away = Trackers(opened, "own", store)
    away.tell(rows(1, 2, 3, 4))
    away.tell(rows(1, 2, 3, 4, 5))
    away.close(rows(1, 2, 3, 4, 5), failed=False)
    track = tracks(store)["mlflow"]
    assert track.told == 3 and "127.0.0.1" in track.problem and "hunter2" not in track.problem
    assert main(["status", f"{opened.out}/night"]) == 0
    assert "mlflow: told up to step 3" in (said := capsys.readouterr().out) and "not told more: " in said

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    back = Trackers(opened, "own", store)
    back.close(rows(1, 2, 3, 4, 5, 6), failed=False)
    assert mlflow_steps(opened) == {"night/own FINISHED": [1, 2, 3, 4, 5, 6]}
    assert tracks(store)["mlflow"].problem == ""


def test_a_new_run_whose_tracker_does_not_answer_says_so_and_tells_no_password(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.extra("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", REFUSED)
    config = job(place, track=["mlflow"])
    with pytest.raises(ConfigError, match="mlflow does not start .*; set MLFLOW_TRACKING_URI") as told:
        Trackers(config, "own", domain_store(config, "own"))
    assert "hunter2" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_starts(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (place / "job.yaml").write_text(job(place).model_dump_json())
    assert main(["train", "job.yaml", f"track=[{name}]"]) == 2
    line = f"t2ray: track: {name} is not installed here; pip install 't2ray[{name}]', or leave it out of track\n"
    assert capsys.readouterr().err == line
    assert not (place / "runs").exists() and not (place / "factors").exists()


def test_a_folder_that_wandb_left_is_no_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check_trackers(job(place, track=["wandb"]))


def test_mlflow_needs_a_place_where_runs_have_none_on_a_disk(place: Path) -> None:
    needs.extra("mlflow")
    with pytest.raises(ConfigError, match="mlflow cannot write into s3://bucket/runs; set MLFLOW_TRACKING_URI"):
        check_trackers(job(place, track=["mlflow"], out="s3://bucket/runs"))


def test_trackers_can_change_when_a_run_is_resumed(place: Path) -> None:
    assert job(place, track=["wandb"]).digest == job(place).digest
    with pytest.raises(ConfigError, match="track.0: .*'wandb' or 'mlflow', not 'wanbd'"):
        job(place, track=["wanbd"])
