"""Training on a private Ray: domains in parallel, those that fail, workers and drivers that are killed, an interrupt.

The z that a job must end with is that of the same job in one process without Ray, undisturbed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from torch import Tensor
from waiting import GUARD_S, wait_until

from t2ray.cluster.session import PRIVATE, session
from t2ray.cluster.train import domains
from t2ray.cluster.train.domains import Share, run_domains
from t2ray.cluster.train.launch import DomainsFailed, train
from t2ray.cluster.train.trials import train_trial
from t2ray.config.domain import DomainConfig
from t2ray.config.search import SweepConfig
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import ResourceError, RunError
from t2ray.experts.registry import Registry
from t2ray.runs.status import read_status
from t2ray.sweep.results import Trial
from t2ray.training.checkpoint import FOLDER
from t2ray.training.domain import EXPERT, domain_store, finished
from t2ray.training.metrics import METRICS, read_metrics

pytestmark = pytest.mark.cluster

Driver = Callable[..., "subprocess.Popen[str]"]

# Rewards whose verifier process kills the worker that started it, once, or tells who it is.
REWARDS = """
import os, signal, time
from pathlib import Path

HERE = Path(__file__).parent

def short(completion, row):
    (HERE / f"verifier-{os.getpid()}").touch()
    return 1.0 if len(completion) < 12 else -1.0

def kills(completion, row):
    steps = HERE / "calls"
    with steps.open("a") as file:
        file.write(".")
    if steps.stat().st_size == 60:
        os.kill(os.getppid(), signal.SIGKILL)
    return short(completion, row)

def slow(completion, row):
    time.sleep(0.02)
    return short(completion, row)

def broken(completion, row):
    if not (HERE / "mended").exists():
        raise ZeroDivisionError("reward")
    return short(completion, row)

def after_a_failure(completion, row):
    "Waits until another domain has failed, and then long enough to be ended with it."
    deadline = time.monotonic() + 300
    while not list(HERE.glob("runs/*/domains/*/fault.json")):
        assert time.monotonic() < deadline, "no domain has failed"
        time.sleep(0.05)
    if (HERE / "hangs").exists():
        time.sleep(60)
    return short(completion, row)

def broken_for_one(completion, row):
    from torch import distributed
    if distributed.get_rank() == 0:
        raise ZeroDivisionError("reward")
    return short(completion, row)
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with session(num_cpus=2):
        yield


def job(folder: Path, name: str, reward: str, *, steps: int = 12, both: bool = False, **changes: Any) -> TrainConfig:
    return of_domains(folder, name, {"own": reward} | ({"pick": None} if both else {}), steps=steps, **changes)


def of_domains(
    folder: Path, name: str, rewards: dict[str, str | None], *, steps: int = 12, **changes: Any
) -> TrainConfig:
    """A job of domains with rewards of `REWARDS`, or of the task `pick`, of workers of one core."""
    module = f"rewards_{folder.name}"  # in this process, each test's is a module of its own
    (folder / f"{module}.py").write_text(REWARDS)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"hello {i}"}) + "\n" for i in range(40)))
    own = {"data": str(data), "prompt": "{text}", "max_tokens": 6, "publish": "always"}
    values = {
        "model": "tiny", "out": str(folder / "runs"), "run": name, "factors": str(folder / "factors"),
        "domains": {
            domain: own | {"reward": f"{module}:{reward}"} if reward else {"task": "pick", "publish": "always"}
            for domain, reward in rewards.items()
        },
        "code": str(folder), "cpus": 1,
        "rl": {"steps": steps, "prompts": 2, "samples": 2, "eval_every": 3, "eval_prompts": 4},
    }  # fmt: skip
    return resolve(values | changes, where="job.yaml")


def experts(config: TrainConfig) -> dict[str, dict[str, Tensor]]:
    return {domain: domain_store(config, domain).read_tensors(EXPERT) for domain in config.domains}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return all(a[d].keys() == b[d].keys() and all(torch.equal(a[d][k], b[d][k]) for k in a[d]) for d in a.keys() | b)


def undisturbed(folder: Path, reward: str, **changes: Any) -> dict[str, dict[str, Tensor]]:
    """The experts of the same job, in this process, with an equal reward that kills nobody."""
    config = job(folder, "alone", reward, workers=0, verifiers=0, **changes)
    train(config)
    return experts(config)


def wait_for(what: Any) -> None:
    wait_until(what, "a state of the training")


def verifiers(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("verifier-*")]


def test_domains_train_in_parallel_and_a_killed_worker_changes_no_z(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, "short", both=True)
    own, *earlier = verifiers(tmp_path)
    assert own == os.getpid() and not earlier
    config = job(tmp_path, "killed", "kills", both=True)
    ticks: list[TrainConfig] = []
    results = train(config, tick=ticks.append)
    assert same(experts(config), expected)
    assert list(results) == ["own", "pick"] and all(result.steps == 12 for result in results.values())
    assert (tmp_path / "calls").stat().st_size > 60  # it did die, and graded again
    started = [pid for pid in verifiers(tmp_path) if pid != own]
    assert len(started) == 2  # one before and one after
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in started))
    assert [row.step for row in read_metrics(domain_store(config, "own"))] == list(range(1, 13))
    assert Registry(f"{config.out}/killed/experts").names() == ("own", "pick")
    assert ticks and not list(Path(config.out, "killed", "ray").glob("*"))


def test_a_killed_worker_of_two_domains_goes_on_with_both_and_changes_no_z(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, "short", both=True, domains_per_worker=2)
    config = job(tmp_path, "killed", "kills", both=True, domains_per_worker=2)
    train(config)
    assert same(experts(config), expected)
    assert len(verifiers(tmp_path)) == 1 + 2  # this process's, and one before and one after
    own, pick = read_status(config)
    assert own.state == pick.state == "done" and own.fault is not None and pick.fault is not None
    assert own.fault.message == pick.fault.message and not own.fault.ended
    assert own.fault.message.startswith("worker 0 of domains 'own', 'pick' died: node ")
    assert own.workers[0].pid == pick.workers[0].pid


def test_a_job_that_does_not_fit_says_so_at_once_and_writes_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"needs 6 CPU, the cluster has 2 CPU; lower workers"):
        train(job(tmp_path, "large", "short", cpus=3, workers=2))
    with pytest.raises(ResourceError, match=r"needs 1 GPU, the cluster has 0 GPU"):
        train(job(tmp_path, "large", "short", gpus=1))
    assert time.monotonic() - start < 10
    assert not (tmp_path / "runs").exists() and not (tmp_path / "factors").exists()


def saved(config: TrainConfig) -> tuple[str, ...]:
    """The names in the job's registry."""
    return Registry(f"{config.out}/{config.run}/experts").names()


def states(config: TrainConfig) -> dict[str, str]:
    return {domain.domain: domain.state for domain in read_status(config)}


FAILED = (
    r"^domain 'own' failed: .*'rewards_\w+:broken'.*'hello \d+'.*raised ZeroDivisionError: reward; "
    r"--resume trains the domains that are not done, and no others$"
)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_domain_that_fails_leaves_the_others_to_train_and_a_resume_trains_it_alone(
    tmp_path: Path, workers: int
) -> None:
    own = {"own": "broken", "other": "after_a_failure"}
    config = of_domains(tmp_path, "half", own, workers=workers, verifiers=workers)
    with pytest.raises(DomainsFailed, match=FAILED):
        train(config)
    assert states(config) == {"own": "failed", "other": "done"} and saved(config) == ("other",)
    done = domain_store(config, "other").read_bytes(METRICS)
    (tmp_path / "mended").touch()
    assert list(train(config, resume=True)) == ["own", "other"]
    assert states(config) == {"own": "done", "other": "done"} and saved(config) == ("other", "own")
    assert domain_store(config, "other").read_bytes(METRICS) == done
    assert Registry(f"{config.out}/half/experts").versions("other") == (1,)


@pytest.mark.parametrize("workers", [0, 1])
def test_with_fail_fast_a_domain_that_fails_ends_the_others(tmp_path: Path, workers: int) -> None:
    (tmp_path / "hangs").touch()
    own = {"own": "broken", "other": "after_a_failure"}
    config = of_domains(tmp_path, "fast", own, workers=workers, verifiers=workers, fail_fast=True)
    with pytest.raises(DomainsFailed, match=FAILED):
        train(config)
    assert states(config)["own"] == "failed" and finished(domain_store(config, "other")) is None
    assert saved(config) == ()
    assert config.digest == of_domains(tmp_path, "fast", own).digest  # it changes no z


def test_each_domain_that_fails_has_a_line(tmp_path: Path) -> None:
    config = of_domains(tmp_path, "all", {"own": "broken", "other": "broken"}, workers=0, verifiers=0)
    with pytest.raises(DomainsFailed) as told:
        train(config)
    own, other = str(told.value).splitlines()
    assert re.match(FAILED, own) and re.match(FAILED.replace("own", "other"), other)


def test_the_classifier_is_trained_beside_a_domain_that_fails(tmp_path: Path) -> None:
    """Its prompts are those of the other tasks; what they have learned is nothing to it."""
    config = of_domains(tmp_path, "sorted", {"own": "broken", "pick": None}, workers=0, verifiers=0, steps=3)
    sorter = DomainConfig(others=str(tmp_path / "rows.jsonl"), prompt="{text}", publish="always")
    config = config.model_copy(update={"domains": config.domains | {"sorter": sorter}})
    with pytest.raises(DomainsFailed, match=FAILED):
        train(config)
    assert saved(config) == ("pick", "sorter")
    assert Registry(f"{config.out}/sorted/experts").manifest("sorter").labels == ("own", "pick", "others")


def test_a_domain_that_fails_as_it_starts_leaves_the_others_to_train(tmp_path: Path) -> None:
    """Its reward can be imported here and not by a worker, as where a node lacks a library."""
    (tmp_path / "reward_of_one.py").write_text(f"""
import os
if os.getpid() != {os.getpid()}:
    import no_such_library

def good(completion, row):
    return 1.0
""")
    config = of_domains(tmp_path, "start", {"own": "short", "pick": None}, steps=3, verifiers=0)
    lacking = config.domains["own"].model_copy(update={"reward": "reward_of_one:good"})
    config = config.model_copy(update={"domains": config.domains | {"own": lacking}})
    with pytest.raises(DomainsFailed, match="^domain 'own' failed: .*no_such_library"):
        train(config)
    assert states(config) == {"own": "failed", "pick": "done"} and saved(config) == ("pick",)


def test_a_trial_of_a_sweep_ends_with_its_first_domain_that_fails(tmp_path: Path) -> None:
    both = of_domains(tmp_path, "trial", {"own": "broken", "other": "short"}, workers=0, verifiers=0)
    sweep = SweepConfig(
        kind="rl", out=str(tmp_path / "runs"), job=both.model_dump(exclude_unset=True, exclude={"run", "out"}),
        space={"rl.lr": [0.01]},
    )  # fmt: skip
    with pytest.raises(DomainsFailed, match=FAILED):
        train_trial(sweep, Trial(point={"rl.lr": 0.01}, seed=0), lambda step, score: None)
    (run,) = (tmp_path / "runs" / "sweep" / "trials").iterdir()
    assert [path.name for path in (run / "domains").iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("private", "most", "gpus", "trainer"),
    [(True, 1, 0, False), (True, 2, 0, True), (True, 1, 0.5, True), (False, 1, 0, True)],
)
def test_a_domain_is_a_plain_task_only_with_one_worker_on_a_private_ray_without_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool, most: int, gpus: float, trainer: bool
) -> None:
    class Trainers:
        def fit(self, job: dict[str, Any], most: int) -> str:
            return "trainer"

    monkeypatch.setattr(domains, "Groups", Trainers)
    monkeypatch.setattr(domains, "work", lambda job: "task")
    config = job(tmp_path, "placed", "short", gpus=gpus)
    with domains._launcher(config, Share(at_once=1, most=most, private=private)) as launch:
        assert ray.get(launch(("own",))) == ("trainer" if trainer else "task")


def test_the_processes_of_a_private_ray_know_that_it_is_private() -> None:
    """A sweep's trials train in such a process."""

    def seen() -> bool:
        with session() as have:
            return PRIVATE in have

    assert seen() and ray.get(ray.remote(num_cpus=0)(seen).remote())


def test_a_private_ray_listens_on_the_loopback_alone() -> None:
    """Also its metrics agent, which asks for no token."""
    with session():
        ray.get(ray.remote(num_cpus=0)(lambda: None).remote())  # a worker listens, too
        own = psutil.Process()
        listening = {
            connection.laddr.ip
            for process in (own, *own.children(recursive=True))
            if process.is_running()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@pytest.mark.long
def test_a_mistake_that_only_one_of_several_workers_finds_ends_the_job_and_no_worker_waits(tmp_path: Path) -> None:
    config = job(tmp_path, "bad", "broken_for_one", workers=2, verifiers=0)
    with pytest.raises(DomainsFailed, match=r"'rewards_\w+:broken_for_one'.*raised ZeroDivisionError: reward"):
        train(config)
    (fault,) = [domain.fault for domain in read_status(config)]
    assert fault is not None and fault.ended and "ZeroDivisionError" in fault.message


def test_a_domain_is_given_up_when_its_workers_die_without_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(tmp_path, "dying", "short")
    store = domain_store(config, "own")
    started: list[int] = []

    def launch(domain: str) -> ray.ObjectRef:
        started.append(len(started))
        if len(started) < 3:
            store.write_bytes(f"{FOLDER}/step_{len(started):06d}.safetensors", b"")
        return ray.remote(max_retries=0)(lambda: os._exit(1)).remote()

    monkeypatch.setattr("t2ray.cluster.train.domains._launcher", lambda *_: nullcontext(launch))
    failed = run_domains(config, ["own"], Share(at_once=1, most=1, private=True), lambda _: None)
    assert re.search("died.*; started 4 times, it came to no new checkpoint$", failed.pop("own")) and not failed
    assert len(started) == 2 + 4  # a checkpoint begins a new count
    (fault,) = [domain.fault for domain in read_status(config)]
    assert fault is not None and fault.ended and "worker 0 of domain 'own' died" in fault.message


def test_domains_whose_worker_dies_again_and_again_are_parted_and_the_sound_one_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []

    def launch(domains: tuple[str, ...]) -> ray.ObjectRef:
        started.append(domains)
        return ray.remote(max_retries=0)(lambda: os._exit(1)).remote() if "own" in domains else ray.put({})

    monkeypatch.setattr("t2ray.cluster.train.domains._launcher", lambda *_: nullcontext(launch))
    config = job(tmp_path, "parted", "short", both=True)
    share = Share(at_once=1, most=1, private=True, together=2)
    assert list(run_domains(config, ["own", "pick"], share, lambda _: None)) == ["own"]
    assert started == [("own", "pick")] * 2 + [("own",)] * 4 + [("pick",)]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    """Starts `t2ray train` as a person does, on a cluster of its own; a failed test leaves none behind."""
    started: list[subprocess.Popen[str]] = []
    code = "import sys; from t2ray.cli.main import main; sys.exit(main(sys.argv[1:]))"

    def start(config: TrainConfig, *flags: str) -> subprocess.Popen[str]:
        (tmp_path / "job.yaml").write_text(config.model_dump_json())
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", str(tmp_path / "job.yaml"), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes its pipes
            process.kill()


def steps_done(config: TrainConfig) -> int:
    path = Path(config.out, config.run, "domains", "own", METRICS)
    return len(path.read_text().splitlines()) if path.exists() else 0


def processes(of: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(of.pid).children(recursive=True)


def gone(those: list[psutil.Process], *but: str) -> bool:
    """Whether all have ended, but those whose names begin with one of `but`."""

    def lives(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and not process.name().startswith(but)
        except psutil.NoSuchProcess:
            return False

    return not any(map(lives, those))


def complaints(err: str) -> list[str]:
    """The lines of stderr but for the warnings of training: some of these small jobs have steps without a signal."""
    return [line for line in err.splitlines() if not line.startswith("t2ray: warning: ")]


def interrupt(of: subprocess.Popen[str], least: int) -> None:
    """Ctrl-C, which a terminal sends to the whole group: one line, exit code 130, at least `least` processes gone."""
    ended(of, least, lambda: os.killpg(of.pid, signal.SIGINT), 130, "t2ray: interrupted")


def ended(of: subprocess.Popen[str], least: int, end: Callable[[], None], code: int, line: str) -> None:
    children = processes(of)
    assert len(children) >= least
    end()
    out, err = of.communicate(timeout=GUARD_S)
    assert (of.returncode, complaints(err)) == (code, [line]), (out, err)
    wait_for(lambda: gone(children))


@pytest.mark.nodes
def test_an_interrupted_and_then_killed_driver_leaves_no_process_and_a_run_that_ends_with_the_same_z(
    tmp_path: Path, driver: Driver
) -> None:
    expected = undisturbed(tmp_path, "slow", steps=60)
    config = job(tmp_path, "run", "slow", steps=60)
    first = driver(config)
    wait_for(lambda: steps_done(config) >= 8 or first.poll() is not None)
    interrupt(first, 5)
    at = steps_done(config)
    assert 8 <= at < 60

    second = driver(config, "--resume")
    wait_for(lambda: steps_done(config) >= at + 4 or second.poll() is not None)
    children = processes(second)
    second.kill()
    out, err = second.communicate()
    assert second.returncode == -signal.SIGKILL, (out, err)
    # Two of Ray's own agents go on for a minute: they try to tell the dead cluster that it has died.
    wait_for(lambda: gone(children, "ray::Dashboard", "ray::RuntimeEnv"))
    assert steps_done(config) < 60 and finished(domain_store(config, "own")) is None

    train(config.model_copy(update={"workers": 0, "verifiers": 0}), resume=True)
    assert same(experts(config), expected)


def test_an_interrupt_ends_a_job_without_workers_too(tmp_path: Path, driver: Driver) -> None:
    config = job(tmp_path, "run", "slow", steps=200, workers=0)
    first = driver(config)
    wait_for(lambda: steps_done(config) >= 4 or first.poll() is not None)
    interrupt(first, 1)
    with pytest.raises(RunError, match="go on with it by --resume"):
        train(config)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_sigterm_ends_a_job_as_an_interrupt_does(tmp_path: Path, driver: Driver, workers: int) -> None:
    config = job(tmp_path, "run", "slow", steps=200, workers=workers)
    first = driver(config)
    wait_for(lambda: steps_done(config) >= 4 or first.poll() is not None)
    ended(first, 5 if workers else 1, first.terminate, 143, "t2ray: terminated")
    (status,) = read_status(config)
    assert status.checkpoint is not None and status.checkpoint >= 3 and not status.damaged


def test_a_killed_driver_is_followed_at_once_and_a_living_one_is_not(tmp_path: Path, driver: Driver) -> None:
    config = job(tmp_path, "run", "slow", steps=20, workers=0, verifiers=0)
    first = driver(config)
    wait_for(lambda: steps_done(config) >= 4 or first.poll() is not None)
    with pytest.raises(RunError, match=f"is trained by another driver: process {first.pid} on "):
        train(config, resume=True)
    first.kill()
    first.wait()
    start = time.monotonic()
    seen: list[float] = []
    train(config, resume=True, tick=lambda config: seen.append(time.monotonic() - start))
    assert seen[0] < 15


def test_one_of_two_drivers_that_start_at_once_is_refused(tmp_path: Path, driver: Driver) -> None:
    config = job(tmp_path, "run", "slow", steps=200, workers=0, verifiers=0)  # neither ends before the other begins
    both = [driver(config, "--resume"), driver(config, "--resume")]
    wait_for(lambda: any(process.poll() is not None for process in both))
    refused, other = sorted(both, key=lambda process: process.poll() is None)
    errors = refused.communicate()[1]
    assert refused.returncode == 2, errors
    (line,) = complaints(errors)
    assert f"is trained by another driver: process {other.pid} " in line
    wait_for(lambda: steps_done(config) >= 1 or other.poll() is not None)
    interrupt(other, 0)


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    for name in ("t2ray.cli.options", "torch"):
        code = f"""
import sys, os, signal, importlib.abc
class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from t2ray.cli.main import main
sys.exit(main(["train", sys.argv[1]]))
"""
        (tmp_path / "job.yaml").write_text(job(tmp_path, "run", "short").model_dump_json())
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "job.yaml")], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (130, "t2ray: interrupted\n")
