"""What may be an expert: a safetensors file judged by its header alone, and the sizes of the numbers in z.

A header is a few kilobytes, so that a file of any size which is no expert is refused before its tensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from t2ray.core import ExpertError
from t2ray.models.targets import Target

HEADER_BYTES = 1 << 22
"""The longest header that is read; one of 10,000 targets, as MoE experts may have, has about a quarter of it."""

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The types of numbers that z may be stored in, and their bytes."""

LARGEST = 1e3
"""Of |z|. Trained experts stay below 10; far above, a model's numbers overflow."""


def header(data: bytes) -> bytes:
    """The beginning of a safetensors file, up to where its tensors begin, or to where it is certain that it is none."""
    return data[: 8 + min(int.from_bytes(data[:8], "little"), HEADER_BYTES)]


def check_header(head: bytes, size: int, layout: Sequence[Target], where: str) -> None:
    """Judges a safetensors file by its `header` and its size in bytes.

    Args:
        layout: the targets, one or more of which the file must fit.
        where: the file's name, for messages.

    Raises:
        ExpertError: it is no safetensors file, has tensors that are no targets or of another number of values or type,
            or is shorter or longer than they are.
    """
    length = int.from_bytes(head[:8], "little")
    try:
        if not 2 <= length <= HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, where 2 to {HEADER_BYTES:,} are read")
        entries = json.loads(head[8:])
        entries.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        types = {name: str(entry["dtype"]) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ExpertError(
            f"{where} cannot be read as an expert ({error}); name an exported folder, a .safetensors or a .pt file"
        ) from None
    place(where, shapes, layout)
    for name, kind in types.items():
        if kind not in FLOATS:
            raise ExpertError(f"{where}: {name!r} holds {kind}; an expert's numbers are one of {', '.join(FLOATS)}")
    whole = 8 + length + sum(prod(shapes[name]) * FLOATS[kind] for name, kind in types.items())
    if size != whole or end != whole - 8 - length:
        raise ExpertError(f"{where} cannot be read as an expert (it has {size:,} bytes, not {whole:,}); send it again")


def place(where: str, shapes: Mapping[str, object], layout: Sequence[Target]) -> dict[str, str]:
    """The target's name for each tensor's. Names may end in ".weight" and have underscores in place of dots.

    Args:
        shapes: the tensors' shapes by name; what is no tuple is no tensor and is shown as it is.

    Raises:
        ExpertError: there are too many, or one has a name or a shape that no target has.
    """
    if len(shapes) > len(layout):
        raise ExpertError(f"{where} has {len(shapes):,} tensors; the factors have {len(layout):,} targets")
    by_name = {target.name.replace(".", "_"): target for target in layout}
    placed: dict[str, str] = {}
    for name, shape in shapes.items():
        target = by_name.get(name.replace(".", "_").removesuffix("_weight"))
        if target is None:
            raise ExpertError(
                f"{where}: {name!r:.200} is no target of the factors, which are such as {layout[0].name!r}"
            )
        if target.name in placed.values():
            raise ExpertError(f"{where} names the target {target.name!r} twice")
        if shape != (target.rank,):
            raise ExpertError(f"{where}: {name!r} has the shape {shape}; its factors need ({target.rank},)")
        placed[name] = target.name
    return placed


def check_size(z: Mapping[str, Tensor], where: str) -> None:
    """Checks that no |z| is above `LARGEST`.

    Raises:
        ExpertError: one is.
    """
    for name, z_R in z.items():
        if (largest := float(z_R.abs().max())) > LARGEST:
            raise ExpertError(f"{where}: z of {name} has the value {largest:.3g}; |z| is at most {LARGEST:g}")
