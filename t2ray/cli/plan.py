"""`t2ray plan` shows how a model divides over GPUs, in training and in serving.

Not here: the arithmetic (`runs.memory`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING

from rich.table import Table

from t2ray.cli.options import Parser, add_json, at_least_one
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.core import ConfigError

if TYPE_CHECKING:
    from t2ray.runs.memory import GpuMemory

_COLUMNS = 8  # GPUs shown one by one


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "model", metavar="MODEL", help='A config.json, a folder with one, "tiny", "tiny-vision" or a hub id.'
    )
    p.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="Patterns of the adapted matrices. Default: see decompose.",
    )
    p.add_argument(
        "--layers", metavar="RANGES", help='The adapted decoder layers, such as "0-15,20". Default: all of them.'
    )
    p.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="How many GPUs one worker has. Default: the smallest number that the model fits on.",
    )
    p.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="The memory of one GPU, in GiB.")
    p.add_argument(
        "--keep",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="The share of singular values of sparse factors (t2ray experts sparsify). Default: 1, whole factors.",
    )
    p.add_argument("--micro-batch", type=int, default=8, metavar="N", help="The job's rl.micro_batch.")
    p.add_argument("--tokens", type=int, default=1024, metavar="N", help="The tokens of prompt and answer together.")
    p.add_argument("--rows", type=int, default=128, metavar="N", help="A domain's rollouts that are generated at once.")
    p.add_argument("--domains", type=int, default=1, metavar="N", help="The job's domains_per_worker.")
    p.add_argument("--kv-tokens", type=int, default=16_384, metavar="N", help="The endpoint's engine.kv_tokens.")
    p.add_argument("--batch-rows", type=int, default=64, metavar="N", help="The endpoint's engine.batch_rows.")
    p.add_argument("--experts", type=int, default=4, metavar="N", help="How many experts are served.")
    add_json(p)


def run(args: argparse.Namespace) -> None:
    """Prints both tables, for the number of GPUs that was asked for or for the smallest that fits."""
    at_least_one(args, "micro_batch", "tokens", "rows", "domains", "kv_tokens", "experts", "gpus")
    if not 0 < args.gpu_memory < float("inf"):
        raise ConfigError(f"--gpu-memory is {args.gpu_memory:g}; it must be above 0 (GiB)")
    if not 0 < args.keep <= 1:
        raise ConfigError(f"--keep is {args.keep:g}; it must be above 0 and at most 1")
    check_json_folder(args.json)

    from t2ray.models.targets import adapted
    from t2ray.runs.memory import GIB, RESERVE, least_gpus, serving, shape_of, training

    shape = replace(shape_of(args.model, args.targets, args.layers), keep=args.keep)
    memory = int(args.gpu_memory * GIB)
    kinds: dict[str, Callable[[int], list[GpuMemory]]] = {
        "training": lambda gpus: training(
            shape, gpus, micro_batch=args.micro_batch, tokens=args.tokens, rows=args.rows, domains=args.domains
        ),
        "serving": lambda gpus: serving(
            shape, gpus, kv_tokens=args.kv_tokens, rows=args.batch_rows, experts=args.experts
        ),
    }  # fmt: skip
    console.print(
        f"{shape.parameters:,} parameters in {shape.layers} layers; {len(shape.targets)} matrices with {shape.K:,} "
        f"singular values; factors {shape.factors(shape.targets) / GIB:.1f} GiB on disk"
    )
    console.print(adapted(shape.selection.share, shape.selection.left_out, shape.targets))
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
    write_json(args.json, {"model": args.model, "parameters": shape.parameters, "K": shape.K, "bytes": rows})


def _table(kind: str, loads: list[GpuMemory]) -> Table:
    """Returns a table with a row per use and a column per GPU; of many GPUs it shows the fullest and the sum."""
    from t2ray.runs.memory import GIB, GpuMemory

    shown = {f"GPU {i}": load for i, load in enumerate(loads)}
    if len(loads) > _COLUMNS:
        shown = {"fullest": max(loads, key=lambda load: load.total)}
    table = Table(f"{kind}, GiB", *shown, "all", box=None)
    for name in [*(field.name for field in fields(GpuMemory)), "total"]:
        values = [getattr(load, name) / GIB for load in shown.values()]
        whole = sum(getattr(load, name) for load in loads) / GIB
        table.add_row(name, *(f"{value:.2f}" for value in values), f"{whole:.2f}")
    return table
