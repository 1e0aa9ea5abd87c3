"""Training on several nodes: who trains where, nodes, drivers and heads that die, and what a node's workers share.

Each node of a test's cluster is a raylet of its own with its own temporary folder and caches; the file system is
shared, as an NFS mount would be. A z is compared with that of the same job without faults.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from small import letter_task, sampler, train_in_parallel, verify_letters
from test_train_cluster import wait_for
from torch import Tensor
from waiting import GUARD_S

from benchmarks.core.shape import BenchShape, _write_model
from benchmarks.endpoint.processes import pss
from t2ray.adapters.factors import decompose, prepare
from t2ray.adapters.model import load_model
from t2ray.cluster.train.launch import train
from t2ray.config.rl import RLConfig
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import ConfigError, ResourceError
from t2ray.store import Store
from t2ray.training.domain import EXPERT, domain_store, finished
from t2ray.training.metrics import StepMetrics, read_metrics
from t2ray.training.trainer import Trainer

# Rewards that note which node they run on: the worker's, since these jobs have no verifier processes.
REWARDS = """
import time
from pathlib import Path

import ray

HERE = Path(__file__).parent

def short(completion, row):
    if ray.is_initialized():
        (HERE / f"{row['domain']}@{ray.get_runtime_context().get_node_id()}").touch()
    return 1.0 if len(completion) < 12 else -1.0

def slow(completion, row):
    time.sleep(0.01)
    return short(completion, row)

def last(completion, row):
    "Waits until the other domain has ended."
    deadline = time.monotonic() + 60
    while not list(HERE.glob("runs/*/domains/first/result.json")):
        assert time.monotonic() < deadline, "the first domain waits for this one"
        time.sleep(0.05)
    return short(completion, row)
"""
LONG = {"steps": 40, "prompts": 5, "samples": 2, "eval_every": 4, "eval_prompts": 4}


class Nodes:
    """A cluster of a head without work on it and of nodes of one core, which can die."""

    def __init__(self, folder: Path, count: int) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for i in range(count):
            own = {"HF_HOME": str(folder / f"{i}/hf"), "XDG_CACHE_HOME": str(folder / f"{i}/cache")}
            self.cluster.add_node(num_cpus=1, temp_dir=str(folder / str(i)), env_vars=own)

    def kill(self, node_id: str) -> None:
        """What a machine's end is: its raylet and all its processes at once, without a goodbye."""
        (node,) = [node for node in self.cluster.list_all_nodes() if node.node_id == node_id]
        started = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
        for process in [*started, *(child for one in started for child in one.children(recursive=True))]:
            process.kill()
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def nodes(count: int, *, attached: bool = True) -> Iterator[Nodes]:
    """A cluster for the block, to whose head this process is attached."""
    # Sockets lie in the folder, so that its name must be short.
    with tempfile.TemporaryDirectory(prefix="t2ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        started = Nodes(Path(folder), count)
        try:
            if attached:
                ray.init(address=started.cluster.address, log_to_driver=False, logging_level="error")
            yield started
        finally:
            ray.shutdown()
            started.cluster.shutdown()


def job(
    folder: Path, name: str, *, reward: str = "short", others: dict[str, str] | None = None, **changes: Any
) -> TrainConfig:
    """A job of one domain, `first`, and of others with rewards of their own, of workers of one core."""
    (folder / "rewards_of_nodes.py").write_text(REWARDS)
    domains = {}
    for domain, function in ({"first": reward} | (others or {})).items():
        data = folder / f"{domain}.jsonl"
        data.write_text("".join(json.dumps({"text": f"hello {i}", "domain": domain}) + "\n" for i in range(40)))
        own = {"data": str(data), "prompt": "{text}", "max_tokens": 6}
        domains[domain] = own | {"reward": f"rewards_of_nodes:{function}"}
    values = {
        "model": "tiny", "out": str(folder / "runs"), "run": name, "factors": str(folder / "factors"),
        "domains": domains, "code": str(folder), "cpus": 1, "verifiers": 0,
        "rl": {"steps": 3, "prompts": 5, "samples": 2, "eval_every": 3, "eval_prompts": 4},
    }  # fmt: skip
    return resolve(values | changes, where="job.yaml")


def expert(config: TrainConfig) -> dict[str, Tensor]:
    """The z of the first domain, by target."""
    return domain_store(config, "first").read_tensors(EXPERT)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def places(folder: Path, domain: str = "first") -> list[str]:
    """The ids of the nodes that have trained a domain."""
    return [path.name.partition("@")[2] for path in folder.glob(f"{domain}@*")]


def steps_done(config: TrainConfig) -> int:
    return len(read_metrics(domain_store(config, "first")))


# ------------------------------------------------------------------------------------------------------ shared batches


@pytest.mark.slow
def test_three_workers_make_the_z_that_one_makes_of_as_many_shares_bit_for_bit(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Also where a share holds no prompt: 4 shares of 3. Without shares, one worker's step is equal to rounding."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    decompose(str(tmp_path / "model"), tmp_path / "factors")
    rl = RLConfig(steps=4, prompts=3, samples=3, eval_every=2, eval_prompts=5, micro_batch=4, clip=1e9)
    workers = [get_context("spawn").Process(target=train_in_parallel, args=(i, 3, tmp_path, rl, 4)) for i in range(3)]
    for worker in workers:
        worker.start()
    model = load_model(str(tmp_path / "model"), tmp_path / "factors", device="cpu")

    def alone(shares: int) -> tuple[Trainer, list[StepMetrics]]:
        model.adapter.bank.clear()
        store, rows = Store(tmp_path / f"alone{shares}"), list[StepMetrics]()
        trainer = Trainer(
            *sampler(model), letter_task(), verify_letters, rl, store, seed=0, digest="x", shares=shares
        )  # fmt: skip
        asyncio.run(trainer.run(rows.append))
        return trainer, rows

    (_, whole_rows), (shared, shared_rows) = alone(1), alone(4)
    for worker in workers:
        worker.join(GUARD_S)
        assert worker.exitcode == 0
    timed = dict.fromkeys(("seconds", "tokens_per_s", "peak_gib"))
    for rows, p_K, gradient_K in (torch.load(tmp_path / f"rank{i}.pt") for i in range(3)):
        assert torch.equal(p_K, shared.p_K) and torch.equal(gradient_K, shared.p_K.grad)
        assert [row | timed for row in rows] == [row.row() | timed for row in shared_rows]
    for key in ("loss", "kl", "grad_norm"):
        assert getattr(shared_rows[0], key) == pytest.approx(getattr(whole_rows[0], key), abs=1e-6)


@pytest.mark.parametrize(("given", "span"), [(0, (0, 0)), (3, (3, 3)), ("3", (3, 3)), ("1-4", (1, 4)), ("2-2", (2, 2))])
def test_workers_are_a_number_or_a_range(tmp_path: Path, given: Any, span: tuple[int, int]) -> None:
    config = job(tmp_path, "span", workers=given)
    assert config.span == span
    assert config.digest == job(tmp_path, "span").digest  # a run goes on with another number of workers


@pytest.mark.parametrize("given", [-1, 1.5, "4-1", "0-4", "1-", "many", True])
def test_workers_of_no_sense_are_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"job.yaml: workers: a number of workers, or a range such as 1-4 .*, not "):
        job(tmp_path, "span", workers=given)


@pytest.mark.cluster
@pytest.mark.nodes
def test_domains_train_on_different_nodes_and_none_waits_for_a_straggler(tmp_path: Path) -> None:
    with nodes(2):
        with pytest.raises(ResourceError, match="a worker of run 'wide' needs 2 CPU, the largest node has 1; lower"):
            train(job(tmp_path, "wide", cpus=2))
        config = job(tmp_path, "placed", others={"second": "last"})
        train(config)
        on_first, on_second = places(tmp_path), places(tmp_path, "second")
        assert len(on_first) == len(on_second) == 1 and on_first != on_second
    assert not (tmp_path / "runs" / "wide").exists()


# ------------------------------------------------------------------------------------------------------- what dies


@pytest.fixture(scope="module")
def shared_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[StepMetrics]]:
    """The expert and the metrics of a job of two workers on two nodes, undisturbed; its batches have two shares."""
    folder = tmp_path_factory.mktemp("whole")
    config = job(folder, "whole", reward="slow", workers=2, rl=LONG)
    with nodes(2):
        train(config)
    assert len(places(folder)) == 2
    return expert(config), read_metrics(domain_store(config, "first"))


Undisturbed = tuple[dict[str, Tensor], list[StepMetrics]]


@pytest.mark.cluster
@pytest.mark.nodes
def test_workers_on_two_nodes_make_the_steps_that_one_worker_makes(shared_by_two: Undisturbed, tmp_path: Path) -> None:
    _, rows = shared_by_two
    config = job(tmp_path, "alone", workers=0, rl=LONG | {"steps": 1})
    train(config)
    alone = read_metrics(domain_store(config, "first"))
    assert [rows[0][key] for key in ("loss", "kl", "grad_norm")] == pytest.approx(
        [alone[0][key] for key in ("loss", "kl", "grad_norm")], abs=1e-6
    )


def killer(cluster: Nodes, folder: Path, killed: list[str]) -> Callable[[TrainConfig], None]:
    """Kills, once, a node that trains."""

    def tick(config: TrainConfig) -> None:
        if not killed and steps_done(config) >= 10:
            killed.append(places(folder)[0])
            cluster.kill(killed[0])

    return tick


@pytest.mark.cluster
@pytest.mark.nodes
@pytest.mark.parametrize(("workers", "count"), [(2, 3), ("1-2", 2)])  # as many again; with the nodes that are left
def test_a_killed_node_changes_no_z(shared_by_two: Undisturbed, tmp_path: Path, workers: int | str, count: int) -> None:
    killed: list[str] = []
    config = job(tmp_path, "killed", reward="slow", workers=workers, rl=LONG)
    with nodes(count) as cluster:
        train(config, tick=killer(cluster, tmp_path, killed))
    assert killed and len(places(tmp_path)) == count
    assert same(expert(config), shared_by_two[0])


@pytest.mark.cluster
@pytest.mark.nodes
def test_a_killed_driver_and_then_a_killed_head_change_no_z(shared_by_two: Undisturbed, tmp_path: Path) -> None:
    config = job(tmp_path, "run", reward="slow", workers=2, rl=LONG, out=f"file://{tmp_path}/runs")
    (tmp_path / "job.yaml").write_text(config.model_dump_json())
    code = "import sys; from t2ray.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", str(tmp_path / "job.yaml")]

    with nodes(2, attached=False) as cluster:
        env = os.environ | {"RAY_ADDRESS": cluster.cluster.address}
        with subprocess.Popen(command, env=env) as driver:
            wait_for(lambda: steps_done(config) >= 6 or driver.poll() is not None)
            driver.kill()
        at = steps_done(config)
        assert 6 <= at < 30
        with subprocess.Popen([*command, "--resume"], env=env, stderr=subprocess.PIPE, text=True) as driver:
            wait_for(lambda: steps_done(config) >= at + 6 or driver.poll() is not None)
            assert driver.poll() is None
            cluster.kill(cluster.cluster.head_node.node_id)
            _, err = driver.communicate(timeout=GUARD_S)
            assert driver.returncode == 2 and err.count("\n") == 1 and "the run goes on with --resume" in err
        assert finished(domain_store(config, "first")) is None
    with nodes(2):
        train(config, resume=True)
    assert same(expert(config), shared_by_two[0])


# ---------------------------------------------------------------------------------------------------- a node's memory


# A worker that loads the model and differentiates; before each it waits, so that its memory can be read.
HOLD = """
import sys
import torch
import transformers.models.llama.modeling_llama
from small import rollout
from t2ray.adapters import model as loading
from t2ray.training.loss import backward

model, factors = sys.argv[1:]
print("imported", flush=True), input()
loading.probe = lambda *args: None  # it would see that these factors are of no model
model = loading.load_model(model, factors, device="cpu")
z_1K = torch.ones(1, model.adapter.size, requires_grad=True)
z_1K.grad = torch.zeros_like(z_1K)
backward(model, z_1K, [rollout([4, 5, 6], [7, 8])], [1.0], lam=0.1, temperature=1.0, batch=1)
print("loaded", flush=True), input()
"""


def go_on(worker: subprocess.Popen[str], to: str) -> None:
    assert worker.stdin is not None and worker.stdout is not None
    if to != "imported":
        print(file=worker.stdin, flush=True)
    assert worker.stdout.readline() == f"{to}\n"


@pytest.mark.slow
def test_a_further_worker_of_a_node_shares_the_weights_and_the_factors(tmp_path: Path) -> None:
    _write_model(BenchShape(), tmp_path / "model")
    plan, size = prepare(str(tmp_path / "model"), tmp_path / "factors"), 0
    for target in plan.plan.targets:  # as large as a decomposition, and made in no time
        parts = {"U": torch.ones(target.m, target.rank), "s": torch.ones(target.rank)}
        parts["Vh"] = torch.ones(target.rank, target.n)
        size += sum(part.nbytes for part in parts.values())
        Store(plan.out).write_tensors(f"{target.name}.safetensors", parts, {"errors": "[0.0, 0.0]"})
    plan.finish()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "model"), str(tmp_path / "factors")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with ExitStack() as stack:
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers = [stack.enter_context(subprocess.Popen(command, env=env, **pipe)) for _ in range(4)]
        for worker in workers:
            go_on(worker, "imported")

        def taken() -> int:
            return sum(pss(worker.pid) for worker in workers)

        before = taken()
        go_on(workers[0], "loaded")
        one = taken()
        for worker in workers[1:]:
            go_on(worker, "loaded")
        four = taken()
        for worker in workers:
            worker.kill()
    assert one - before > size  # they were all read
    assert (four - one) / 3 < 0.1 * size


# ------------------------------------------------------------------------------------------ a model larger than a GPU


@pytest.mark.parametrize("gpus", [0, 0.5, 1, 2])
def test_a_worker_has_a_part_of_a_gpu_or_whole_ones(tmp_path: Path, gpus: float) -> None:
    assert job(tmp_path, "gpus", gpus=gpus).gpus == gpus
    with pytest.raises(ConfigError, match="gpus: a worker has a part of one GPU or whole ones, not 1.5"):
        job(tmp_path, "gpus", gpus=1.5)


def test_a_divided_model_is_the_same_model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided over what there is: one device. Without accelerate, the remedy is named."""
    decompose(str(tiny_llama), tmp_path)
    ids = torch.arange(10, 20)[None]
    whole, divided = (load_model(str(tiny_llama), tmp_path, device=device) for device in (None, "auto"))
    z_1K = torch.full((1, whole.adapter.size), 1.1)
    with whole.adapter.rows(z_1K), divided.adapter.rows(z_1K):
        assert torch.equal(whole.hidden(ids, torch.ones_like(ids)), divided.hidden(ids, torch.ones_like(ids)))
    monkeypatch.setattr("t2ray.models.load.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip install accelerate, on every node"):
        load_model(str(tiny_llama), tmp_path, device="auto")
