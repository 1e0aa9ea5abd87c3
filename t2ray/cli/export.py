"""`t2ray export`: a mixture as a plain model, or as a LoRA of PEFT."""

from __future__ import annotations

import argparse

from t2ray.adapt.strategies import FEWSHOT
from t2ray.cli.options import Parser, add_job, add_model
from t2ray.cli.output import bar, console
from t2ray.core import ConfigError, Mixture


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--mixture",
        required=True,
        metavar="MIXTURE",
        help="What is exported: an expert, a mixture such as math:0.7,code:0.3, or fewshot/NAME.",
    )
    p.add_argument(
        "--as",
        dest="kind",
        required=True,
        choices=["merged", "peft"],
        help="A plain model with the mixture in its weights (merged), or a LoRA that comes nearest to it (peft).",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="The folder that receives the files; a new one.")
    p.add_argument(
        "--rank", type=int, metavar="K", help="The rank of the LoRA; from a matrix's own rank on it is exact."
    )
    p.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="The precision of a merged model. Default: that of the base, in which a small change is rounded away.",
    )
    add_model(p)
    p.add_argument("--base", dest="model", metavar="MODEL", help="Another name of --model.")
    add_job(p)


def run(args: argparse.Namespace) -> None:
    """Loads the base with its experts, writes the folder and says how near the files come to the mixture."""
    if args.kind == "peft" and args.rank is None:
        raise ConfigError("--as peft needs --rank, such as --rank 16")
    if args.rank is not None and (args.kind != "peft" or args.rank < 1):
        raise ConfigError(f"--rank {args.rank} goes with --as peft alone, and is at least 1")
    if args.dtype is not None and args.kind != "merged":
        raise ConfigError(f"--dtype {args.dtype} goes with --as merged alone; a LoRA is float32")
    mixture = None if args.mixture.startswith(FEWSHOT) else Mixture.parse(args.mixture)

    import torch

    from t2ray.experts.export import Source, check_place, export_merged, export_peft
    from t2ray.workbench import load_experts, place_or_shipped

    check_place(args.out)
    place = place_or_shipped(args.run, args.model, args.factors, args.experts)
    mixture = mixture or place.registry().load_mixture(args.mixture.removeprefix(FEWSHOT))
    model, experts = load_experts(place, mixture.names, bar)
    source = Source(model=model, base=place.model, mixture=mixture, experts=[expert.manifest for expert in experts])
    if args.kind == "merged":
        errors = export_merged(source, args.out, getattr(torch, args.dtype) if args.dtype else None)
    else:
        errors = export_peft(source, args.out, args.rank)
    name, worst = max(errors.items(), key=lambda error: error[1])
    mean = sum(errors.values()) / len(errors)
    console.print(
        f"{mixture} on {place.model} is in {args.out}; of the change of a weight {worst:.2g} is missing at most "
        f"({name}), {mean:.2g} in the mean of {len(errors)} matrices",
        markup=False,
    )
