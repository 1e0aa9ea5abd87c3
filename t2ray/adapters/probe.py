"""A probe of a loaded model: what t2ray computes by its own ways is what the model computes by its own.

A few tokens show whether an architecture is put together as `models.families` thinks: the loss's logits, tokens that go
on from a cache, rows of different z in one batch, and that every adapted layer is really called. A fold needs no probe:
it is the same layer with another weight, and costs a product of whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from t2ray.core import Message, ModelError, T2RayError, user
from t2ray.models.families import Family
from t2ray.models.targets import Target
from t2ray.pictures import drawn
from t2ray.prompts import pictured

if TYPE_CHECKING:
    from t2ray.adapters.base import Adapter
    from t2ray.models.chat import Chat

TOKENS = 6
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of two logits that are computed in another order, as a share of the largest logit."""


class Seeing(Protocol):
    """The model that pictures are shown to: `adapters.model.Model`."""

    @property
    def hf(self) -> Any: ...
    @property
    def family(self) -> Family: ...
    @property
    def adapter(self) -> Adapter: ...
    @property
    def chat(self) -> Chat: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def seen(self) -> Callable[[Sequence[tuple[Message, ...]], Sequence[int], int], Mapping[str, Any]]: ...
    @property
    def featured(self) -> Callable[..., Mapping[str, Any]]: ...


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


def probe_pictures(model: Seeing) -> None:
    """Compares a batch, of rows with a picture and without, with the model's own logits of each row.

    A model for which they differ goes on with text: it takes no pictures, and its chat says why. Where pictures go
    through adapted matrices, they do so with a z for all rows, and with one for each, if the model takes the features
    that its tower made of them by row; if it does not, batches with pictures have one mixture.

    Raises:
        ModelError: it takes no pictures, for which the adapter has matrices.
    """
    chat, family = model.chat, model.family
    tower = [target for target in model.adapter.layout if target.in_tower]
    z_RK = 1 + 0.1 * torch.randn(2, model.adapter.size, generator=torch.Generator().manual_seed(0))
    first, second = z_RK.to(model.device)
    if chat.processor is not None:
        try:
            _compare_seen(model, [None] * 3)
            if tower:
                with _called(model.hf, family, tower):
                    _compare_seen(model, [first] * 3)
        except (T2RayError, ValueError, TypeError, RuntimeError) as error:  # whatever an unknown forward raises
            chat.processor, chat.blind = None, " ".join(str(error).split())[:300]
    if tower and chat.processor is None:
        raise ModelError(
            f"{family.architecture}: experts of {tower[0].name} need pictures, and the model takes none: {chat.blind}; "
            "choose matrices of its decoder alone by --targets"
        )
    if tower and model.adapter.by_row:
        with suppress(Exception):  # whatever it is, the model is used without
            _compare_seen(model, [first, second, second])
            family.takes_features = True


def _compare_seen(model: Seeing, z: Sequence[Tensor | None]) -> None:
    """Raises ModelError where the logits of a row of three differ from its own; row i has `z[i]`, None is the base."""
    rows = (user((drawn(96, 48), "1")), user("12"), user((drawn(32, 64), "123")))
    chat, hf, device = model.chat, model.hf, model.device
    ids = [chat.ids(messages) for messages in rows]
    longest = max(map(len, ids))
    ids_BT = torch.tensor([[*row, *[chat.pad_id] * (longest - len(row))] for row in ids], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    conversations = [pictured(messages) for messages in rows]

    def bound(i: int) -> AbstractContextManager[None]:
        z_K = z[i]
        return nullcontext() if z_K is None else model.adapter.rows(z_K[None])

    with torch.enable_grad():  # see `probe`
        if all(z_K is z[0] for z_K in z):
            together, seen = bound(0), model.seen(conversations, [0, 0, 0], longest)
        else:
            seen = model.featured(conversations, [0, 0, 0], longest, bound)
            together = model.adapter.rows(model.adapter.table(z), torch.arange(len(z), device=device))
        with together:
            logits_BTV = model.family.logits(model.family.hidden(ids_BT, mask_BT, seen))
        for i, row in enumerate(ids):
            alone = model.seen([conversations[i]], [0], len(row))
            with bound(i):
                own = hf(input_ids=torch.tensor([row], device=device), use_cache=False, **alone).logits
            _same(own, logits_BTV[i : i + 1, : len(row)], model.family, "the logits beside other pictures")


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
