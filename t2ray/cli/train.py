"""`t2ray train` trains one expert per domain of a job, by reinforcement learning on Ray."""

from __future__ import annotations

import argparse
import sys

from t2ray.cli.options import Parser
from t2ray.cli.output import console
from t2ray.config.train import load


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("config", metavar="CONFIG.yaml", help="The file of the training job.")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Keys that win over the file's, such as run=second rl.lr=0.01 domains.math.rl.steps=60; `t2ray config "
        "train` lists every key.",
    )
    p.add_argument("--resume", action="store_true", help="Go on with the run of that name.")


def run(args: argparse.Namespace) -> int:
    """Trains the experts of a job, and shows a live line per domain; returns 2 if domains failed."""
    config = load(args.config, args.overrides)

    from t2ray.cli.display import TrainingDisplay
    from t2ray.cluster.train.launch import DomainsFailed, train
    from t2ray.training.domain import domain_store, finished

    failed = ""
    with TrainingDisplay(config) as display:
        try:
            train(config, resume=args.resume, tick=display.show)
        except DomainsFailed as error:
            failed = str(error)
        finally:
            display.tell(config)
    for domain in config.trains:
        result = finished(domain_store(config, domain))
        if result is None:
            continue
        console.print(
            f"{domain}: greedy validation accuracy {result.base_accuracy:.3f} (base) -> {result.accuracy:.3f}, "
            f"best at step {result.best_step} of {result.steps}"
        )
        if not result.beats_base:
            kept = "it is published all the same" if config.domains[domain].publish == "always" else (
                f"it is not published; --resume domains.{domain}.publish=always publishes it"
            )  # fmt: skip
            console.print(f"{domain}: it never beat its base in validation: {kept}", markup=False)
    console.print(f"experts: {config.experts or f'{config.out}/{config.run}/experts'}")
    for line in failed.splitlines():
        print(f"t2ray: {line}", file=sys.stderr)
    return 2 if failed else 0
