"""A probe of a loaded model: what t2ray computes by its own ways is what the model computes by its own.

A few tokens show whether an architecture is put together as `models.families` thinks: the loss's logits, rows of
different z in one batch, and that every adapted layer is really called. A fold needs no probe: it is the same layer
with another weight, and costs a product of whole matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2ray.core import ModelError
from t2ray.models.families import Family

if TYPE_CHECKING:
    from t2ray.adapters.base import Adapter

TOKENS = 6
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of two logits that are computed in another order, as a share of the largest logit."""


def probe(hf: Any, family: Family, adapter: Adapter) -> None:
    """Compares the ways in which logits are computed.

    Raises:
        ModelError: two of them differ, or an adapted layer was not called; it names the architecture and the stage.
    """
    device = adapter.neutral.device
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(family.vocabulary, (2, TOKENS), generator=draw).to(device)
    mask_BT = torch.ones_like(ids_BT)
    z_RK = (1 + 0.1 * torch.randn(2, adapter.size, generator=draw)).to(device)
    called: set[str] = set()
    modules = dict(hf.named_modules())
    hooks = [
        modules[target.name].register_forward_hook(lambda *_, name=target.name: called.add(name))
        for target in adapter.layout
    ]
    try:
        with torch.enable_grad():  # nothing here has a gradient; without it the layers would keep packed copies
            own = hf(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            _same(own, family.logits(family.hidden(ids_BT, mask_BT)), family, "the loss's logits")
            if adapter.by_row:
                with adapter.rows(z_RK, torch.arange(2, device=device)):
                    together = family.hidden(ids_BT, mask_BT)
            for row in range(2 if adapter.by_row else 0):
                with adapter.rows(z_RK[row : row + 1]):
                    alone = family.hidden(ids_BT[row : row + 1], mask_BT[:1])
                _same(alone, together[row : row + 1], family, "a row of a batch with several mixtures")
    finally:
        for hook in hooks:
            hook.remove()
    missed = [target.name for target in adapter.layout if target.name not in called]
    if missed:
        raise ModelError(
            f"{family.architecture}: its forward passes by {missed[0]} and {len(missed) - 1} more adapted layers, so "
            "that experts could not change them; choose other matrices by --targets"
        )


def _same(expected: Tensor, found: Tensor, family: Family, stage: str) -> None:
    scale = float(expected.float().abs().max())
    difference = float((expected.float() - found.float().to(expected.device)).abs().max())
    if not difference <= TOLERANCE.get(expected.dtype, 1e-3) * max(scale, 1e-6):
        raise ModelError(
            f"{family.architecture}: {stage} differ by {difference:.3g} from the model's own (at most {scale:.3g}); "
            "t2ray does not support this architecture, and would train or serve it wrongly"
        )
