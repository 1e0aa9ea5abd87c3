"""`t2ray decompose` factors the matrices of a model, in this process or as Ray tasks."""

from __future__ import annotations

import argparse

from t2ray.cli.options import Parser, add_job
from t2ray.cli.output import bar, console


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "model", metavar="MODEL", help='The model: "tiny", "tiny-vision", a local Hugging Face folder or a hub id.'
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="The folder that receives one file per matrix; a run that was cut off goes on there.",
    )
    p.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help='Patterns of the matrices to factor, such as "*.mlp.*". Default: every linear layer of the '
        "decoder, and no routed MoE expert. One without a match there, such as '*vision_tower*', chooses among the "
        "linear layers that pictures go through before it.",
    )
    p.add_argument(
        "--layers", metavar="RANGES", help='The decoder layers to factor, such as "0-15,20". Default: all of them.'
    )
    p.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="How many matrices are factored at once, as Ray tasks; 1 needs no Ray.",
    )
    p.add_argument(
        "--svd-dtype", choices=["float32", "float64"], default="float32", help="The precision of the decomposition."
    )
    p.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="The precision of the stored factors. Default: that of the model.",
    )
    add_job(p)


def run(args: argparse.Namespace) -> None:
    """Factors the matrices of the model, and shows a progress bar."""
    from t2ray.adapters.factors import decompose
    from t2ray.cluster.train.decompose import decompose_on_ray
    from t2ray.models.targets import adapted

    options = {"targets": args.targets, "layers": args.layers, "svd_dtype": args.svd_dtype, "dtype": args.dtype}
    with bar("decompose") as progress:
        if args.workers > 1:
            factors = decompose_on_ray(args.model, args.out, workers=args.workers, progress=progress, **options)
        else:
            factors = decompose(args.model, args.out, progress=progress, **options)
    computed, stored = (max(pair) for pair in zip(*factors.manifest.errors.values(), strict=True))
    console.print(
        f"{len(factors.layout)} matrices, {factors.K} singular values in {args.out}; largest relative reconstruction "
        f"error {computed:.1e}, of the factors as stored {stored:.1e}"
    )
    if factors.manifest.share is not None:
        console.print(adapted(factors.manifest.share, factors.manifest.left_out, factors.layout))
