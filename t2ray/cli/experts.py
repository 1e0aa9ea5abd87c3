"""`t2ray experts` lists, shows, deletes, imports and exports experts, and brings them to the hub and back.

Not here: the files of a registry (`t2ray.experts.registry`), those of other programs (`t2ray.experts.exchange`) and
the hub (`t2ray.experts.hub`).
A mixture goes by the name `fewshot/NAME`, as it does among the strategies of chat and eval, since an expert may have
the same NAME.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from t2ray.adapt.strategies import FEWSHOT
from t2ray.cli.options import Parser, add_model, add_registry, locate
from t2ray.cli.output import bar, console, weight_bars
from t2ray.core import ConfigError, ExpertError, ResourceError, T2RayError, UnknownExpert, check_name

if TYPE_CHECKING:
    from t2ray.experts.registry import Registry

T = TypeVar("T")


def add(p: Parser) -> None:
    """Adds the commands about experts and their options."""
    group = p.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
        parser = group.add_parser(name, help=text, description=text)
        parser.set_defaults(command=run)
        return parser

    either, expert = "The name of an expert, or fewshot/NAME of a mixture.", "The name of the expert."
    listed = command("list", _list, "List the experts and mixtures of a registry.")
    shown = command("show", _show, "Show an expert, its manifest and histograms of z, or a mixture.")
    shown.add_argument("name", metavar="NAME", help=either)
    deleted = command("delete", _delete, "Delete an expert with all its versions, or a mixture.")
    deleted.add_argument("name", metavar="NAME", help=either)
    imported = command("import", _import, "Add an expert from outside as the next version of its name.")
    imported.add_argument("name", metavar="NAME", nargs="?", help=f"{expert} It may also be given by --name.")
    imported.add_argument(
        "path", metavar="PATH", help="A safetensors file, an exported folder, or a .pt file of the reference code."
    )
    imported.add_argument("--name", dest="named", metavar="NAME", help=expert)
    imported.add_argument(
        "--from",
        dest="origin",
        choices=["t2ray", "sakana"],
        help="Who wrote the file: t2ray, or the paper's reference code. Default: what its name ends in tells.",
    )
    exported = command("export", _export, "Write an expert into a folder of its own.")
    exported.add_argument("name", metavar="NAME", help=expert)
    exported.add_argument("path", metavar="PATH", help="The folder that receives the expert.")
    pushed = command("push", _push, "Upload an expert to the Hugging Face hub, with its manifest and a model card.")
    pushed.add_argument("name", metavar="NAME", help=expert)
    pushed.add_argument("place", metavar="hf://USER/REPO", help="The repository, which is made where it is missing.")
    pushed.add_argument("--base", metavar="MODEL", help="The base model's name on the card. Default: that of the run.")
    pushed.add_argument("--private", action="store_true", help="Make a new repository private.")
    pulled = command("pull", _pull, "Add an expert from the Hugging Face hub as the next version of its name.")
    pulled.add_argument("place", metavar="hf://USER/REPO", help="The repository, at a @REVISION where one is named.")
    pulled.add_argument("--name", dest="named", metavar="NAME", help="The expert's name here. Default: its own.")
    sparse = command("sparsify", _sparsify, "Write the factors of the components that the experts change most.")
    sparse.add_argument(
        "--keep", type=float, default=0.1, metavar="SHARE", help="The share of components that are kept (default: 0.1)."
    )
    sparse.add_argument("--out", required=True, metavar="DIR", help="The folder that receives the factors.")
    for parser in (listed, shown, deleted, exported, pushed, sparse):
        add_registry(parser)
    for parser in (imported, pulled):
        add_model(parser)
        parser.add_argument("--base", dest="model", metavar="MODEL", help="Another name of --model.")


def _list(args: argparse.Namespace) -> None:
    """Prints a line for each expert and each mixture, and one for each that is damaged."""
    registry = _registry(args)
    experts, damaged = _sound(registry.manifest, registry.names())
    mixtures, lost = _sound(registry.mixture_record, registry.mixtures())
    if not experts and not mixtures and not damaged and not lost:
        console.print(f"no experts in {registry.store.uri}", markup=False)
    if experts:
        rows = [
            [m.name, f"v{m.version}", m.domain or "-", str(sum(r for _, r in m.targets)), m.base_digest[:12], m.created,
             ", ".join(f"{key} {value:.3g}" for key, value in m.metrics.items() if isinstance(value, int | float))]
            for m in experts
        ]  # fmt: skip
        head = ["expert", "version", "domain", "numbers", "base", "created", "metrics"]
        console.print(_aligned([head, *rows]), markup=False)
    if mixtures:
        rows = [[FEWSHOT + m.name, str(m.mixture), m.created] for m in mixtures]
        console.print(("\n" if experts else "") + _aligned([["mixture", "weights", "created"], *rows]), markup=False)
    for error in (*damaged, *lost):
        console.print(str(error), markup=False)


def _sound(read: Callable[[str], T], names: Sequence[str]) -> tuple[list[T], list[T2RayError]]:
    """What can be read, and the errors of what is damaged."""
    found: list[T] = []
    errors: list[T2RayError] = []
    for name in names:
        try:
            found.append(read(name))
        except (ExpertError, ResourceError) as error:
            errors.append(error)
    return found, errors


def _show(args: argparse.Namespace) -> None:
    """Prints the manifest of an expert with histograms of z; or a mixture, and how it was found."""
    from t2ray.experts.exchange import histogram

    registry = _registry(args)
    if args.name.startswith(FEWSHOT):
        record = registry.mixture_record(args.name.removeprefix(FEWSHOT))
        console.print(f"{args.name}: {record.mixture}, created {record.created}", markup=False)
        console.print(weight_bars(record.mixture, record.mixture.names), markup=False)
        console.print(json.dumps(record.meta, indent=1), markup=False)
        return
    _known(registry, args.name)
    expert = registry.load(args.name)
    manifest = expert.manifest.model_dump(exclude={"targets"})
    manifest["digest"] = manifest["digest"] or "unverified"
    targets = expert.manifest.targets
    manifest["targets"] = f"{len(targets)} matrices, {sum(rank for _, rank in targets)} numbers"
    manifest["versions"] = ", ".join(map(str, registry.versions(args.name)))
    width = max(map(len, manifest))
    for key, value in manifest.items():
        text = value if isinstance(value, str) else json.dumps(value)
        console.print(f"{key:<{width}}  {text}", markup=False)
    console.print("\n" + histogram(expert), markup=False)


def _delete(args: argparse.Namespace) -> None:
    """Deletes an expert with all its versions, or a mixture; names the mixtures that lose an expert by it."""
    registry = _registry(args)
    if args.name.startswith(FEWSHOT):
        registry.delete_mixture(args.name.removeprefix(FEWSHOT))
        console.print(f"deleted the mixture {args.name} from {registry.store.uri}", markup=False)
        return
    _known(registry, args.name)
    versions = registry.versions(args.name)
    registry.delete(args.name)
    console.print(
        f"deleted the expert {args.name} (versions {', '.join(map(str, versions))}) from {registry.store.uri}",
        markup=False,
    )
    mixtures, _ = _sound(registry.mixture_record, registry.mixtures())
    orphans = [FEWSHOT + record.name for record in mixtures if args.name in record.mixture.names]
    if orphans:
        console.print(f"these mixtures name it and can no longer be used: {', '.join(orphans)}", markup=False)


def _import(args: argparse.Namespace) -> None:
    """Adds an expert as the next version of its name."""
    name = args.named or args.name
    if name is None or (args.named and args.name):
        raise ConfigError(f"name the expert once: t2ray experts import NAME {args.path}")
    check_name(name)

    from t2ray.experts.exchange import import_expert
    from t2ray.workbench import open_factors

    place = locate(args)
    registry = place.registry()
    reference = None if args.origin is None else args.origin == "sakana"
    version = import_expert(registry, name, args.path, open_factors(place, bar), reference=reference)
    console.print(f"{args.path} is now expert {name}, version {version}, in {registry.store.uri}", markup=False)


def _export(args: argparse.Namespace) -> None:
    """Writes the latest version of an expert into a folder of its own."""
    from t2ray.experts.exchange import export_expert

    place = locate(args)
    registry = place.registry()
    _known(registry, args.name)
    expert = registry.load(args.name)
    export_expert(expert, args.path, place.run.model if place.run else None)
    console.print(f"expert {expert.name}, version {expert.version}, is in {args.path}", markup=False)


def _push(args: argparse.Namespace) -> None:
    """Uploads the latest version of an expert."""
    from t2ray.experts.hub import HubPlace, push_expert

    target, place = HubPlace.parse(args.place), locate(args)
    base = args.base or (place.run.model if place.run else None)
    if base is None:
        raise ConfigError("the card names the base model: write --base MODEL")
    registry = place.registry()
    _known(registry, args.name)
    expert = registry.load(args.name)
    url = push_expert(expert, target, base, private=args.private)
    console.print(f"expert {expert.name}, version {expert.version}, is in {target}: {url}", markup=False)


def _pull(args: argparse.Namespace) -> None:
    """Adds an expert of the hub as the next version of its name."""
    from t2ray.experts.hub import HubPlace, pull_expert
    from t2ray.models.weights import open_weights
    from t2ray.workbench import open_factors

    source, place = HubPlace.parse(args.place), locate(args)
    registry, digest = place.registry(), open_weights(place.model).digest
    name, version = pull_expert(registry, source, digest, lambda: open_factors(place, bar), args.named)
    console.print(f"{source} is now expert {name}, version {version}, in {registry.store.uri}", markup=False)


def _sparsify(args: argparse.Namespace) -> None:
    """Writes factors of one support for all experts of a registry, which are then trained again on it."""
    from t2ray.adapters.sparse import held, shared_support, sparsify
    from t2ray.workbench import open_factors

    if not 0 < args.keep < 1:
        raise ConfigError(f"--keep {args.keep:g}: a share of the components above 0 and below 1")
    place, registry = locate(args), _registry(args)
    factors = open_factors(place, bar)
    names = registry.names()
    if not names:
        raise ConfigError(f"no experts in {registry.store.uri}; train some first")
    layout, digest = factors.layout, factors.base_digest
    vectors = [held(factors, registry.load(name, base_digest=digest, layout=layout).z) for name in names]
    made = sparsify(factors, shared_support(factors, vectors, args.keep), args.out)
    console.print(
        f"{made.manifest.kept} of {made.K} singular values, those that {', '.join(names)} change most; "
        f"train the experts on them: t2ray train JOB.yaml from=RUN factors={made.folder} run=NAME"
    )


def _registry(args: argparse.Namespace) -> Registry:
    return locate(args).registry()


def _known(registry: Registry, name: str) -> None:
    """Raises an error that says how a mixture is named, if only a mixture has this name."""
    if name in registry.mixtures() and name not in registry.names():
        raise UnknownExpert(f"no expert {name!r} in {registry.store.uri}; the mixture goes by {FEWSHOT}{name}")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
