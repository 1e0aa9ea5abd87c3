"""A probe of a loaded model: what t2ray computes by its own ways is what the model computes by its own.

A few tokens show whether an architecture is put together as `models.families` thinks: the loss's logits, tokens that go
on from a cache, rows of different z in one batch, and that every adapted layer is really called. A fold needs no probe:
it is the same layer with another weight, and costs a product of whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2ray.core import Message, ModelError, T2RayError, user
from t2ray.models.chat import Chat
from t2ray.models.families import Family
from t2ray.models.targets import Target
from t2ray.pictures import drawn
from t2ray.prompts import pictured

if TYPE_CHECKING:
    from t2ray.adapters.base import Adapter

See = Callable[[Sequence[tuple[Message, ...]], Sequence[int], int], Mapping[str, Tensor]]

TOKENS = 6
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of two logits that are computed in another order, as a share of the largest logit."""


def probe(hf: Any, family: Family, adapter: Adapter) -> None:
    """Compares the ways in which logits are computed.

    Raises:
        ModelError: two of them differ, one fails, or an adapted layer was not called; it names the architecture and the
            stage.
    """
    device = adapter.neutral.device
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(family.vocabulary, (2, TOKENS), generator=draw).to(device)
    mask_BT = torch.ones_like(ids_BT)
    z_RK = (1 + 0.1 * torch.randn(2, adapter.size, generator=draw)).to(device)
    try:
        # Nothing here has a gradient; without `enable_grad` the layers would keep packed copies.
        with _called(hf, family, [target for target in adapter.layout if not target.in_tower]), torch.enable_grad():
            own = hf(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            _same(own, family.logits(family.hidden(ids_BT, mask_BT, {})), family, "the loss's logits")
            last = family.logits(family.continued(ids_BT, mask_BT))
            _same(own[:, -1:], last, family, "the logits of a token behind a cache")
            with adapter.rows(adapter.neutral[None]):
                neutral = family.logits(family.hidden(ids_BT, mask_BT, {}))
            _same(own, neutral, family, "the logits through the factors")
            if adapter.by_row:
                with adapter.rows(z_RK, torch.arange(2, device=device)):
                    together = family.hidden(ids_BT, mask_BT, {})
            for row in range(2 if adapter.by_row else 0):
                with adapter.rows(z_RK[row : row + 1]):
                    alone = family.hidden(ids_BT[row : row + 1], mask_BT[:1], {})
                _same(alone, together[row : row + 1], family, "a row of a batch with several mixtures")
    except (T2RayError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an unknown forward raises
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{family.architecture}: its forward fails as t2ray calls it ({type(error).__name__}: {reason}); t2ray "
            "does not support this architecture"
        ) from error


def probe_pictures(hf: Any, family: Family, adapter: Adapter, chat: Chat, see: See) -> None:
    """Compares a batch, of rows with a picture and without, with the model's own logits of each row.

    Where pictures go through adapted matrices it does so through their factors, too. A model for which logits differ
    goes on with text: it takes no pictures, and its chat says why. `see` makes what the model gets of conversations'
    pictures (`Model.seen`).

    Raises:
        ModelError: it takes no pictures, for which the adapter has matrices.
    """
    tower = [target for target in adapter.layout if target.in_tower]
    if chat.processor is not None:
        device = adapter.neutral.device
        z_1K = (1 + 0.1 * torch.randn(1, adapter.size, generator=torch.Generator().manual_seed(0))).to(device)
        try:
            with torch.no_grad():
                _compare_seen(hf, family, chat, see, device)
            if tower:
                with _called(hf, family, tower), adapter.rows(z_1K), torch.enable_grad():
                    _compare_seen(hf, family, chat, see, device)
        except (T2RayError, ValueError, TypeError, RuntimeError) as error:  # whatever an unknown forward raises
            chat.processor, chat.blind = None, " ".join(str(error).split())[:300]
    if tower and chat.processor is None:
        raise ModelError(
            f"{family.architecture}: experts of {tower[0].name} need pictures, and the model takes none: {chat.blind}; "
            "choose matrices of its decoder alone by --targets"
        )


def _compare_seen(hf: Any, family: Family, chat: Chat, see: See, device: torch.device) -> None:
    rows = (user((drawn(96, 48), "1")), user("12"), user((drawn(32, 64), "123")))
    ids = [chat.ids(messages) for messages in rows]
    longest = max(map(len, ids))
    ids_BT = torch.tensor([[*row, *[chat.pad_id] * (longest - len(row))] for row in ids], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    seen = see([pictured(messages) for messages in rows], [0, 0, 0], longest)
    together = family.logits(family.hidden(ids_BT, mask_BT, seen))
    for row, messages, found in zip(ids, rows, together, strict=True):
        alone = see([pictured(messages)], [0], len(row))
        own = hf(input_ids=torch.tensor([row], device=device), use_cache=False, **alone).logits
        _same(own, found[None, : len(row)], family, "the logits beside other pictures")


@contextmanager
def _called(hf: Any, family: Family, targets: Sequence[Target]) -> Iterator[None]:
    """Raises ModelError at its end where forwards within it have passed by the layer of one of the targets."""
    called: set[str] = set()
    places = {target: target.name if target.expert is None else _experts(target) for target in targets}
    hooks = [
        hf.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in dict.fromkeys(places.values())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    missed = [target.name for target, place in places.items() if place not in called]
    if missed:
        raise ModelError(
            f"{family.architecture}: its forward passes by {missed[0]} and {len(missed) - 1} more adapted layers, so "
            "that experts could not change them; choose other matrices by --targets"
        )


def _experts(target: Target) -> str:
    """The module of an MoE layer that has all its experts: which of them are called depends on the tokens."""
    return target.parameter.rpartition(".")[0]


def _same(expected: Tensor, found: Tensor, family: Family, stage: str) -> None:
    scale = float(expected.float().abs().max())
    difference = float((expected.float() - found.float().to(expected.device)).abs().max())
    if not difference <= TOLERANCE.get(expected.dtype, 1e-3) * max(scale, 1e-6):
        raise ModelError(
            f"{family.architecture}: {stage} differ by {difference:.3g} from the model's own (at most {scale:.3g}); "
            "t2ray does not support this architecture, and would train or serve it wrongly"
        )
