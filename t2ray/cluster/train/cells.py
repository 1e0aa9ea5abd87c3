"""Makes the cells of a grid: each trains a job and measures its experts, in a process of its own or as a task of Ray.

Not here: what is measured (`measure`).

A process is never used again, because the most memory that a training had is that of its process. A cell that was cut
off goes on: its domains from their checkpoints, its measurements from the first that is not in its file.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from typing import Any

import torch

from t2ray.adapters.spectrum import variance
from t2ray.cluster.session import session, slots
from t2ray.cluster.train.launch import DomainsFailed, train
from t2ray.cluster.train.measure import measure, read_text
from t2ray.config.tables import BASE, TablesConfig, job_of, lender_of
from t2ray.config.train import TrainConfig
from t2ray.core import T2RayError
from t2ray.evals.cells import GridCell, cell_of, cells_of, load_cell, load_cells, save_cell
from t2ray.models.weights import open_weights
from t2ray.runs.folder import read_run
from t2ray.runs.prepare import prepare
from t2ray.training.domain import domain_store, finished
from t2ray.training.metrics import read_metrics
from t2ray.workbench import Place, Workbench, open_factors, open_workbench

GridTick = Callable[[GridCell], None]
_LEFTOVER_S = 60.0  # a cell of a grid that was killed may outlive it by some seconds
_RESTARTS = 2


def make_cells(config: TablesConfig, tick: GridTick = lambda cell: None) -> list[GridCell]:
    """Makes the cells that are not whole yet, and returns all; `tick` is told of each that ends.

    A cell that lacked nothing but the experts of another, which came later, is gone on with at the end.

    Raises:
        RunError: as `load_cells`.
        ResourceError: one cell needs more than the cluster has.
    """
    load_cells(config)  # a file that does not fit is told before anything is trained
    waiting = [new for new in cells_of(config) if load_cell(config, new).lacks(config)]
    _make(config, waiting, tick)
    _make(config, [new for new in waiting if _has_lender(config, load_cell(config, new))], tick)
    return load_cells(config)


def _has_lender(config: TablesConfig, cell: GridCell) -> bool:
    """Returns whether a cell lacks what it needs another model's experts for, and these are there."""
    lenders = {lender_of(strategy) for _, strategy in cell.lacks(config)} - {None}
    return any(
        load_cell(config, cell_of(config, lender, cell.method, cell.seed)).trained for lender in lenders if lender
    )


def _make(config: TablesConfig, waiting: list[GridCell], tick: GridTick) -> None:
    job = job_of(config, next(iter(config.models)), next(iter(config.methods)), 0)
    if job.workers == 0:
        _one_by_one(config, waiting, tick)
    elif waiting:
        _on_ray(config, waiting, {"CPU": job.cpus or 1.0, **({"GPU": job.gpus} if job.gpus else {})}, tick)


def _one_by_one(config: TablesConfig, waiting: list[GridCell], tick: GridTick) -> None:
    for new in waiting:
        process = multiprocessing.get_context("spawn").Process(
            target=make_cell, args=(config.model_dump(mode="json"), new)
        )
        process.start()
        try:
            process.join()
        finally:  # an interrupt ends the cell, too
            process.terminate()
        if process.exitcode:
            _note_loss(config, new, f"its process ended with code {process.exitcode}; was the machine out of memory?")
        tick(load_cell(config, new))


def _on_ray(config: TablesConfig, waiting: list[GridCell], needs: dict[str, float], tick: GridTick) -> None:
    import ray
    from ray.exceptions import RayError

    with session() as have:
        slots(needs, have, f"a cell of {config.run!r}")
        threads = {"OMP_NUM_THREADS": str(max(1, int(needs["CPU"]))), "TOKENIZERS_PARALLELISM": "false"}
        run = ray.remote(max_calls=1)(make_cell).options(
            num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=_RESTARTS,
            runtime_env={"env_vars": threads},
        )  # fmt: skip
        running = {run.remote(config.model_dump(mode="json"), new): new for new in waiting}
        while running:
            ended, _ = ray.wait(list(running))
            new = running.pop(ended[0])
            try:
                ray.get(ended[0])
            except RayError as error:
                _note_loss(config, new, str(error).strip().splitlines()[-1])
            tick(load_cell(config, new))


def _note_loss(config: TablesConfig, new: GridCell, why: str) -> None:
    cell = load_cell(config, new)
    save_cell(config, replace(cell, missing=cell.missing | {"/".join(key): why for key in cell.lacks(config)}))


# ------------------------------------------------------------------------------------------------------------- one cell


def make_cell(values: Mapping[str, Any], new: GridCell) -> None:
    """Trains and measures what a cell lacks, and leaves it in its file; what fails is noted there with its reason.

    Args:
        values: the grid's `TablesConfig`, as plain values.
    """
    config = TablesConfig.model_validate(values)
    began, cell = time.perf_counter(), load_cell(config, new)
    before = cell.seconds

    def keep(**changes: Any) -> None:
        nonlocal cell
        cell = replace(cell, seconds=before + time.perf_counter() - began, **changes)
        save_cell(config, cell)

    keep(missing={}, machine=machine(), date=date.today().isoformat())
    try:
        job, failed = _run(config, cell)
        keep(base_digest=open_weights(job.model).digest, missing=failed)
        if cell.method != BASE:
            keep(trained=_trained(job))
        bench = _bench(job, cell.method)
        if cell.method != BASE and job.trained.kind == "svf":
            keep(variance=variance(open_factors(bench.place)))
    except T2RayError as error:
        why = " ".join(str(error).split())
        keep(missing=cell.missing | {"/".join(key): why for key in cell.lacks(config)})
        return
    for task, strategy in cell.lacks(config):
        try:
            measured = read_text if task in config.texts else measure
            figures = asyncio.run(measured(config, job, bench, cell, task, strategy))
        except T2RayError as error:
            keep(missing=cell.missing | {f"{task}/{strategy}": " ".join(str(error).split())})
            continue
        keep(measured=cell.measured | {task: cell.measured.get(task, {}) | {strategy: figures}})


def machine() -> str:
    """Returns what figures of time depend on: `"2 cores, x86_64, Linux, Python 3.11.9, torch 2.13.0"`."""
    gpus = f", {torch.cuda.device_count()} {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{os.cpu_count()} cores{gpus}, {platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _run(config: TablesConfig, cell: GridCell) -> tuple[TrainConfig, dict[str, str]]:
    """Trains what the job of a cell lacks, in this process; returns the job as its run has it, and why domains failed.

    The base trains nothing, and has the settings of the first method.
    """
    method = next(iter(config.methods)) if cell.method == BASE else cell.method
    job = job_of(config, cell.model, method, cell.seed)
    job = job.model_copy(update={"run": cell.name, "workers": 0, "cpus": job.cpus or 1.0})
    torch.set_num_threads(max(1, int(job.cpus or 1)))
    if cell.method == BASE:
        return prepare(job, resume=True), {}
    failed: dict[str, str] = {}
    try:
        train(job, resume=True, wait_s=_LEFTOVER_S)
    except DomainsFailed as error:
        failed = {domain: " ".join(why.split()) for domain, why in error.args[1].items()}
    return read_run(f"{job.out}/{job.run}"), failed


def _trained(job: TrainConfig) -> dict[str, dict[str, Any]]:
    """Returns the figures of each domain that is done: accuracy, size, time, memory, KL at its best step, its curve."""
    found: dict[str, dict[str, Any]] = {}
    for domain in job.domains:
        store = domain_store(job, domain)
        result, rows = finished(store), read_metrics(store)
        if result is None or not rows:
            continue
        past, curve = 0.0, []
        for row in rows:
            past += row.seconds
            curve.append([row.step, past, row.accuracy, row.validation, row.kl])
        found[domain] = {
            "base": result.base_accuracy, "validation": result.accuracy, "best_step": result.best_step,
            "steps": result.steps, "numbers": rows[-1].numbers, "seconds": past, "peak_gib": rows[-1].peak_gib,
            "kl": next((row.kl for row in rows if row.step == result.best_step), 0.0), "curve": curve,
        }  # fmt: skip
    return found


def _bench(job: TrainConfig, method: str) -> Workbench:
    place = Place(model=job.model, factors=job.factors, experts=None if method == BASE else job.experts, run=job)
    return open_workbench(place)
