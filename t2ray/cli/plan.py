"""`t2ray plan`: how a model divides over GPUs, in training and in serving; not here: the arithmetic (plan.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from rich.table import Table

from t2ray.cli.output import console
from t2ray.core import ConfigError
from t2ray.runs.memory import GIB, RESERVE, GpuMemory, least_gpus, serving, shape_of, training
from t2ray.store import Store

_COLUMNS = 8  # GPUs shown one by one


def plan(args: argparse.Namespace) -> None:
    """Prints both tables, for the number of GPUs that was asked for or the smallest that fits."""
    for name in ("micro_batch", "tokens", "rows", "kv_tokens", "experts", "gpus"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.gpu_memory <= 0:
        raise ConfigError(f"--gpu-memory is {args.gpu_memory:g}; it must be above 0 (GiB)")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}; make it first")
    shape = shape_of(args.model, args.targets, args.layers)
    memory = int(args.gpu_memory * GIB)
    kinds: dict[str, Callable[[int], list[GpuMemory]]] = {
        "training": lambda gpus: training(
            shape, gpus, micro_batch=args.micro_batch, tokens=args.tokens, rows=args.rows
        ),
        "serving": lambda gpus: serving(
            shape, gpus, kv_tokens=args.kv_tokens, rows=args.batch_rows, experts=args.experts
        ),
    }  # fmt: skip
    factors = sum((t.m + t.n) * t.rank for t in shape.targets) * shape.size
    console.print(
        f"{shape.parameters:,} parameters in {shape.layers} layers; {len(shape.targets)} matrices with {shape.K:,} "
        f"singular values; factors {factors / GIB:.1f} GiB on disk"
    )
    found = {}
    for kind, loads in kinds.items():
        gpus = args.gpus or least_gpus(loads, memory, kind)
        found[kind] = loads(gpus)
        fullest = max(load.total for load in found[kind])
        fits = "fits" if fullest <= RESERVE * memory else "does not fit"
        console.print(_table(kind, found[kind]))
        console.print(
            f"{kind} {fits} on {gpus} GPU{'s' * (gpus > 1)} of {args.gpu_memory:g} GiB: {fullest / GIB:.1f} GiB on the "
            f"fullest, of {RESERVE * args.gpu_memory:.1f} that a plan fills\n"
        )
    rows = {kind: [asdict(load) | {"total": load.total} for load in loads] for kind, loads in found.items()}
    if args.json is not None:
        report = {"model": args.model, "parameters": shape.parameters, "K": shape.K, "bytes": rows}
        path = Path(args.json).absolute()
        Store(path.parent).write_text(path.name, json.dumps(report, indent=1) + "\n")


def _table(kind: str, loads: list[GpuMemory]) -> Table:
    """A row a use, a column a GPU; of many GPUs the fullest and the sum."""
    shown = {f"GPU {i}": load for i, load in enumerate(loads)}
    if len(loads) > _COLUMNS:
        shown = {"fullest": max(loads, key=lambda load: load.total)}
    table = Table(f"{kind}, GiB", *shown, "all", box=None)
    for name in [*(field.name for field in fields(GpuMemory)), "total"]:
        values = [getattr(load, name) / GIB for load in shown.values()]
        whole = sum(getattr(load, name) for load in loads) / GIB
        table.add_row(name, *(f"{value:.2f}" for value in values), f"{whole:.2f}")
    return table
