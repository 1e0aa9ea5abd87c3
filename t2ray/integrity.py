"""Digests of what must not change unnoticed: tensors, and JSON objects that carry their own (`seal`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Damaged(ValueError):
    """A file that does not hold what was written into it; says what is wrong with it."""


def digest_of(tensors: Mapping[str, torch.Tensor], *texts: str) -> str:
    """The digest of tensors with their names, types and shapes, in whatever order, and of texts: 32 hex digits."""
    import torch  # a program that reads files of rows alone does without

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(json.dumps(texts).encode())
    return digest.hexdigest()


def seal(values: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object that ends with a digest of its other values; NaN and Infinity are refused, as JSON has neither."""
    return json.dumps({**values, "digest": _digest_of_values(values)}, allow_nan=False, indent=indent)


def unseal(text: str | bytes) -> dict[str, Any]:
    """The values that `seal` wrote; those of a JSON object without a digest, which earlier versions wrote, too.

    Raises:
        Damaged: it is no such object, holds NaN or Infinity, or has the digest of other values.
    """
    try:
        values = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Damaged("it is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)) from None
    if not isinstance(values, dict):
        raise Damaged("it is no JSON object")
    if values.pop("digest", None) not in (None, _digest_of_values(values)):
        raise Damaged("its digest belongs to other values")
    return values


def _no_number(word: str) -> None:
    raise ValueError(f"it holds {word}, which is no number of JSON")


def _digest_of_values(values: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
