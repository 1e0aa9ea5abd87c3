"""The options of `t2ray sweep`, `status` and `plan`. Loads nothing; called by `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """Adds the three commands; `command(name, function, text)` makes a parser."""
    p = command("sweep", "sweep:sweep", "try settings of training or of the few-shot search, on Ray Tune")
    p.add_argument("config", metavar="CONFIG.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="for instance run=second trials=8 job.rl.steps=20")
    p.add_argument("--resume", action="store_true", help="go on with the sweep of that name")

    p = command("status", "status:status", "how a run or a sweep stands, also while it runs elsewhere")
    p.add_argument("run", metavar="RUN", help="its folder, s3:// or gs://")
    p.add_argument("--json", action="store_true", help="prints the figures as JSON")

    p = command("plan", "plan:plan", "how a model's memory divides over GPUs, from its config.json alone")
    p.add_argument("model", metavar="MODEL", help='a config.json, a folder with one, "tiny" or a hub id')
    p.add_argument("--targets", nargs="+", metavar="PATTERN", help="which matrices (default: every projection)")
    p.add_argument("--layers", metavar="RANGES", help='which decoder layers, e.g. "0-15,20" (default: all)')
    p.add_argument("--gpus", type=int, metavar="N", help="GPUs of a worker (default: the fewest that it fits on)")
    p.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of one GPU (default: 80)")
    p.add_argument("--micro-batch", type=int, default=8, metavar="N", help="rl.micro_batch (default: 8)")
    p.add_argument("--tokens", type=int, default=1024, metavar="N", help="prompt and answer together (default: 1024)")
    p.add_argument("--rows", type=int, default=128, metavar="N", help="rollouts generated at once (default: 128)")
    p.add_argument("--kv-tokens", type=int, default=16_384, metavar="N", help="engine.kv_tokens (default: 16384)")
    p.add_argument("--batch-rows", type=int, default=64, metavar="N", help="engine.batch_rows (default: 64)")
    p.add_argument("--experts", type=int, default=4, metavar="N", help="experts served (default: 4)")
    p.add_argument("--json", metavar="FILE", help="writes the figures there too")
