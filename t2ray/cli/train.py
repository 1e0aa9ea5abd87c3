"""`t2ray decompose` and `t2ray train`."""

from __future__ import annotations

import argparse
import sys

from t2ray.adapters.factors import decompose as decompose_here
from t2ray.cli.display import TrainingDisplay
from t2ray.cli.output import bar, console
from t2ray.cluster.train.decompose import decompose_on_ray
from t2ray.cluster.train.launch import DomainsFailed
from t2ray.cluster.train.launch import train as train_on_cluster
from t2ray.config.train import load
from t2ray.training.domain import domain_store, finished


def decompose(args: argparse.Namespace) -> None:
    """Factors the model's matrices, with a progress bar."""
    options = {"targets": args.targets, "layers": args.layers, "svd_dtype": args.svd_dtype, "dtype": args.dtype}
    with bar("decompose") as progress:
        if args.workers > 1:
            factors = decompose_on_ray(args.model, args.out, workers=args.workers, progress=progress, **options)
        else:
            factors = decompose_here(args.model, args.out, progress=progress, **options)
    worst = max(factors.manifest.errors.values(), key=lambda error: error[0])
    console.print(
        f"{len(factors.layout)} matrices, {factors.K} singular values in {args.out}; "
        f"largest relative reconstruction error {worst[0]:.1e}"
    )


def train(args: argparse.Namespace) -> int:
    """Trains the experts of a job, with a live line for each domain; 2 where some failed, each with its own line."""
    config = load(args.config, args.overrides)
    failed = ""
    with TrainingDisplay() as display:
        try:
            train_on_cluster(config, resume=args.resume, tick=display.show)
        except DomainsFailed as error:
            failed = str(error)
    for domain in config.domains:
        result = finished(domain_store(config, domain))
        if result is not None:
            console.print(
                f"{domain}: greedy validation accuracy {result.base_accuracy:.3f} (base) -> {result.accuracy:.3f}, "
                f"best at step {result.best_step} of {result.steps}"
            )
    console.print(f"experts: {config.experts or f'{config.out}/{config.run}/experts'}")
    for line in failed.splitlines():
        print(f"t2ray: {line}", file=sys.stderr)
    return 2 if failed else 0
