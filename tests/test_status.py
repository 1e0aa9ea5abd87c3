"""`t2ray status` reads from the folder alone how a run stands; a dead worker is told in one line with its knob."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import wait_until

from t2ray.cli.main import main
from t2ray.cluster.train.faults import diagnosis
from t2ray.cluster.train.launch import DomainsFailed, train
from t2ray.config.train import TrainConfig, resolve
from t2ray.runs import heartbeat, status
from t2ray.runs.folder import open_run
from t2ray.runs.heartbeat import Heartbeat, heartbeats, note_fault, start_heartbeat
from t2ray.runs.status import DomainStatus, read_status
from t2ray.store import Store
from t2ray.training.checkpoint import Checkpoint, Progress
from t2ray.training.domain import domain_store

SMALL = {"steps": 4, "prompts": 2, "samples": 2, "eval_every": 2, "eval_prompts": 2}
REWARDS = """
def good(completion, row):
    return 1.0

def broken(completion, row):
    raise ZeroDivisionError("unlucky")
"""


def job(folder: Path, reward: str = "good", **more: str) -> TrainConfig:
    """A job of the domain `own`, and of `more` with other rewards."""
    (folder / f"rewards_of_status_{reward}.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"hello {i}"}) + "\n" for i in range(20)))
    own = {"data": str(folder / "rows.jsonl"), "prompt": "{text}", "max_tokens": 2}
    domains = {
        name: own | {"reward": f"rewards_of_status_{reward}:{function}"}
        for name, function in {"own": reward, **more}.items()
    }
    values = {"model": "tiny", "out": str(folder / "runs"), "run": "own", "factors": str(folder / "factors"),
              "workers": 0, "verifiers": 0, "code": str(folder), "domains": domains, "rl": SMALL}  # fmt: skip
    return resolve(values, where="job.yaml")


def only(config: TrainConfig) -> DomainStatus:
    (found,) = read_status(config)
    return found


def test_a_run_is_followed_from_its_start_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path)
    assert only(config).state == "waiting"
    seen: list[DomainStatus] = []
    train(config, tick=lambda config: seen.append(only(config)))
    while_running, at_the_end = seen[:4], only(config)
    assert [s.state for s in while_running] == ["running"] * 4
    assert [(s.step, s.checkpoint) for s in while_running] == [(1, None), (2, 2), (3, 2), (4, 4)]
    assert while_running[0].left_s and while_running[0].tokens_per_s and while_running[1].validation is not None
    assert (at_the_end.state, at_the_end.step, at_the_end.steps, at_the_end.checkpoint) == ("done", 4, 4, 4)
    (worker,) = at_the_end.workers
    assert worker.rss_gib > 0 and 0 < worker.used_gib < worker.total_gib

    # another machine sees the folder under another name
    shutil.move(tmp_path / "runs" / "own", tmp_path / "moved")
    assert main(["status", str(tmp_path / "moved")]) == 0
    said = capsys.readouterr().out
    assert "own" in said and "done" in said and "4/4" in said and "validation 1.000 at step " in said
    assert main(["status", str(tmp_path / "moved"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["checkpoint"]) == ("done", 4)


def test_a_mistake_that_ended_a_run_is_told_until_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(tmp_path, "broken")
    with pytest.raises(DomainsFailed):
        train(config)
    now = only(config)
    assert now.state == "failed" and now.fault is not None and "ZeroDivisionError: unlucky" in now.fault.message
    assert main(["status", f"{config.out}/own"]) == 0
    assert "last error" in capsys.readouterr().out
    start_heartbeat(domain_store(config, "own"), 0)
    assert only(config).state == "running"


def test_domains_that_fail_are_told_beside_those_that_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, a line each, and by `t2ray status`."""
    config = job(tmp_path, "broken", second="good", third="broken")
    (tmp_path / "job.yaml").write_text(config.model_dump_json())
    assert main(["train", str(tmp_path / "job.yaml")]) == 2
    said = capsys.readouterr()
    first, third = [line for line in said.err.splitlines() if not line.startswith("t2ray: warning: ")]
    assert first.startswith("t2ray: domain 'own' failed: ") and third.startswith("t2ray: domain 'third' failed: ")
    assert all("ZeroDivisionError: unlucky; --resume trains the domains that are not done" in x for x in (first, third))
    assert "second: greedy validation accuracy" in said.out and "own: greedy" not in said.out
    assert main(["status", f"{config.out}/own", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["domain"], row["state"]) for row in rows] == [
        ("own", "failed"), ("second", "done"), ("third", "failed"),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "a folder", "binary"])
@pytest.mark.parametrize("name", [
    "metrics.jsonl", "result.json", "fault.json", "workers/0.json", "notes.jsonl", "trackers.json",
    "expert.safetensors", "checkpoints/step_000004.safetensors",
])  # fmt: skip
def test_no_damaged_file_of_a_domain_hides_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    config, store = job(tmp_path), domain_store(job(tmp_path), "own")
    open_run(config)
    tensors = {key: torch.ones(3) for key in ("p_K", "best_z_K", "exp_avg", "exp_avg_sq")}
    for step in (2, 4):
        Checkpoint(progress=Progress(step=step), tensors=tensors).save(store, config.digest)
    store.write_tensors("expert.safetensors", tensors, {})
    if name == "expert.safetensors":
        store.write_text("result.json", '{"accuracy": 0.5, "base_accuracy": 0.25, "best_step": 3, "steps": 7}')
    assert store.local is not None
    path = store.local / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if how == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b'{"ra\n' if how == "cut" else b"\xff\x00\n{")
    for flag in ([], ["--json"]):
        assert main(["status", f"{config.out}/own", *flag]) == 0
    said = capsys.readouterr().out
    if name.partition(".")[0] in ("metrics", "result", "expert", "checkpoints/step_000004"):
        assert f"own: {name}" in said and "--resume` mends what can be mended" in said
    assert f"last checkpoint: step {2 if 'step' in name else 4}" in said or name == "expert.safetensors"


def test_a_damaged_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in (b"", b"\xff", b"{}"):
        (tmp_path / "config.json").write_bytes(data)
        assert main(["status", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "config.json is not a configuration that this t2ray wrote" in said and said.count("\n") == 1


def test_a_worker_that_is_silent_for_long_is_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path)
    store = domain_store(config, "own")
    beat = start_heartbeat(store, 0)
    assert only(config).state == "running"
    monkeypatch.setattr(status, "STALE_S", -1.0)
    assert only(config).state == "stopped"
    monkeypatch.setattr(status, "STALE_S", 60.0)
    note_fault(store, "its node went away", ended=False)  # the run went on by itself
    assert only(config).state == "running"
    del beat


def test_a_heartbeat_goes_on_by_itself_until_its_worker_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a long step; none is written after the thread has ended or the writer was deleted."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    config, others = job(tmp_path), set(threading.enumerate())
    store = domain_store(config, "own")

    def at(rank: int) -> Heartbeat:
        return {beat.rank: beat for beat in heartbeats(store)}[rank]

    def beating() -> int:
        return len(set(threading.enumerate()) - others)

    writers = [start_heartbeat(store, 0)]
    worker = threading.Thread(target=lambda: writers.append(start_heartbeat(store, 1)))
    worker.start()
    worker.join()
    first = at(0)
    writers[0](7)
    wait_until(lambda: at(0).step == 7 and at(0).at > first.at, "a beat of the seventh step")
    assert at(0).began == first.began
    wait_until(lambda: beating() == 1, "the end of the heartbeat whose worker has ended")
    writers.clear()
    wait_until(lambda: not beating(), "the end of the heartbeat whose writer was deleted")


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "no run in" in capsys.readouterr().err


def test_a_sweep_has_a_status_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    store.write_text("sweep.json", "{}")
    base: dict[str, Any] = {"point": {"rl.lr": 0.01}, "seed": 0, "error": None}
    rows = [base | {"status": "done", "score": 0.5}, base | {"status": "failed", "score": None, "error": "boom"}]
    store.write_text("trials.json", json.dumps(rows))
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 trials: 1 done, 1 failed" in said and "0.5000" in said and "boom" in said


# ----------------------------------------------------------------------------------------------------------- diagnosis

# What Ray 2.60 says of a process that was killed, shortened at the dots.
DEAD = """A worker health check failed.
Worker info: Worker(
    node_ip='10.0.0.7',
    pid=1169,
)
The actor died unexpectedly before finishing this task.
\tip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly \
due to SIGSEGV or another unexpected error. ..."""
BEAT = Heartbeat(rank=0, host="node3", pid=1169, step=12, at=0.0, rss_gib=9.1, used_gib=30.0, total_gib=64.0)


def test_a_dead_workers_end_names_the_place_the_memory_and_the_knob() -> None:
    said = diagnosis(("math",), {0: RuntimeError(DEAD)}, (BEAT,))
    assert said.startswith("worker 0 of domain 'math' died: node 10.0.0.7, pid 1169, after step 12;")
    assert "the worker held 9.1 GiB, the machine 30.0 of 64.0 GiB" in said and "somebody ended it" in said
    full = diagnosis(("math",), {0: RuntimeError(DEAD)}, (replace(BEAT, used_gib=62.9),))
    assert "most likely the machine ran out of memory: lower rl.micro_batch" in full
    for earlier in ((), (replace(BEAT, pid=1),)):  # none, or one that its predecessor left
        assert "before its first step; " in diagnosis(("math",), {0: RuntimeError(DEAD)}, earlier)
    assert "\n" not in said + full


def test_of_a_dead_task_ray_says_nothing_and_its_last_sign_of_life_does() -> None:
    text = "The worker died unexpectedly while executing this task. Check python-core-worker-*.log files for more."
    said = diagnosis(("math",), {0: RuntimeError(text)}, (BEAT,))
    assert said.startswith(
        "worker 0 of domain 'math' died: node node3, pid 1169, after step 12; at its last sign of life"
    )
    assert "the worker held 9.1 GiB, the machine 30.0 of 64.0 GiB; the machine had memory left" in said
    assert "node unknown, pid unknown, before its first step" in diagnosis(("math",), {0: RuntimeError(text)}, ())


# What Ray 2.60's memory monitor says of a task, shortened at the dots.
FULL_TASK = """Task was killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: b364) was \
60.87GB used / 64.00GB limit (0.951)
Selected to kill: (Task: job ID=01000000, lease ID=00, task name=code, required resources={CPU: 1}, pid=4, actual \
memory used=0.10GB)
Selected to kill: (Task: job ID=01000000, lease ID=00, task name=math, required resources={CPU: 1}, pid=1169, actual \
memory used=44.39GB)
..."""


def test_of_the_tasks_that_ray_ended_for_their_memory_the_domains_own_is_told() -> None:
    said = diagnosis(("math",), {0: RuntimeError(FULL_TASK)}, (BEAT,))
    assert "node 10.0.0.7, pid 1169, after step 12; at its end the worker held 44.39 GiB, the machine 60.87 of" in said


# What Ray 2.60's memory monitor says, shortened at the dots.
FULL = """A worker health check failed.
Worker info: Worker(
    node_ip='10.0.0.7',
    pid=1169,
)
4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: b364) was \
60.87GB used / 64.00GB limit (0.951)
OOM kill reason: Memory usage 65359148032B exceeded threshold of 65283502899B (95% of 68719476736B limit)
Selected to kill: (Actor(fe76): ..., task name=PreemptionWatcher.__init__, ..., pid=1121, actual memory used=0.10GB)
Selected to kill: (Actor(121c): ..., task name=RayTrainWorker.__init__, ..., pid=1169, actual memory used=44.39GB)
..."""


@pytest.mark.parametrize(
    "text", [FULL, FULL.partition(")\n")[2]]
)  # of the worker; of the controller, which falls with it
def test_a_worker_that_ray_ended_for_its_memory(text: str) -> None:
    said = diagnosis(("math",), {0: RuntimeError(text)}, (BEAT,))
    assert said.startswith("worker 0 of domain 'math' died: node 10.0.0.7, pid 1169, after step 12; at its end the ")
    assert (
        "the worker held 44.39 GiB, the machine 60.87 of 64.00 GiB; Ray's memory monitor ended it, above 95% " in said
    )
    assert "lower rl.micro_batch" in said and "\n" not in said


def test_the_worker_that_died_is_named_and_not_one_that_lost_it() -> None:
    lost = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]"
    )
    said = diagnosis(("math",), {0: lost, 1: RuntimeError(DEAD), 2: lost}, (BEAT, replace(BEAT, rank=1, step=13)))
    assert said.startswith("worker 1 of domain 'math' died: node 10.0.0.7, pid 1169, after step 13;")
    assert diagnosis(("math",), {0: lost, 1: ValueError("shapes differ")}, ()).startswith("worker 1 ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Task was killed due to the node running low on memory.",
            "Ray's memory monitor ended it: lower rl.micro_batch",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "the GPU's memory is full; lower rl.m"),
        ("The actor died because its node has died. ip: 10.0.0.7", "its node went away"),
        ("Traceback ...\nValueError: shapes differ", "failed: ValueError: shapes differ"),
    ],
)
def test_other_ends_have_other_causes(text: str, expected: str) -> None:
    assert expected in diagnosis(("math",), {3: RuntimeError(text)}, ())
