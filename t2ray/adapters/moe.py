"""SVF in a layer's MoE experts: each token goes through the factors of the experts that its router chose.

Not here: the routing, which is the model's own, and the layer of one matrix (`layer`).

Shapes: S tokens of all rows, D features, C experts chosen by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2ray.adapters.layer import Bound, SVFLinear
from t2ray.models.targets import stored


class SVFExperts(nn.Module):
    """Stands in place of a module that stores the matrices of a layer's MoE experts together.

    With nothing bound that module computes, bit for bit. Bound or folded, the experts are taken one by one, each with
    the tokens that were routed to it. Matrices that are no targets stay as they are.
    """

    def __init__(self, experts: nn.Module, matrices: Mapping[tuple[int, str], SVFLinear], bound: Bound) -> None:
        """
        Args:
            matrices: the layers of the adapted ones, by the expert's number and the parameter's name.
        """
        super().__init__()
        self.experts, self.bound = experts, bound
        self.matrices = nn.ModuleDict({f"{i} {name}": layer for (i, name), layer in matrices.items()})
        self.up = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
        self.number = len(getattr(experts, self.up))

    def forward(self, hidden_SD: Tensor, chosen_SC: Tensor | None = None, weight_SC: Tensor | None = None) -> Tensor:
        """The sum of the chosen experts' outputs, (S, D), weighted. Llama 4 sends all tokens, copied, to each expert:
        (experts * S, D) in and out."""
        if self.bound.gain_RK is None and not self.bound.folded:
            routing = () if chosen_SC is None else (chosen_SC, weight_SC)
            every: Tensor = self.experts(hidden_SD, *routing)
            return every
        if chosen_SC is None or weight_SC is None:
            return torch.cat([self._expert(i, x_TD) for i, x_TD in enumerate(hidden_SD.chunk(self.number))])
        row_S = self._rows(len(hidden_SD), hidden_SD.device)
        out_SD = torch.zeros_like(hidden_SD)
        kept = self.bound.row_index
        try:
            for i in chosen_SC.unique().tolist():
                token_T, place_T = torch.where(chosen_SC == i)
                self.bound.row_index = None if row_S is None else row_S[token_T]
                change_TD = self._expert(i, hidden_SD[token_T]) * weight_SC[token_T, place_T, None]
                out_SD = out_SD.index_add(0, token_T, change_TD.to(out_SD.dtype))
        finally:
            self.bound.row_index = kept
        return out_SD

    def _rows(self, tokens: int, device: torch.device) -> Tensor | None:
        """The row of gains of each token, (S,); None where all have the only one."""
        gain_RK, row_index = self.bound.gain_RK, self.bound.row_index
        if gain_RK is None or (row_index is None and len(gain_RK) == 1):
            return None
        rows = torch.arange(len(gain_RK)) if row_index is None else row_index
        assert tokens % len(rows) == 0, f"{tokens} tokens are no whole number for each of {len(rows)} rows"
        return rows.to(device).repeat_interleave(tokens // len(rows))

    def _expert(self, i: int, x_TD: Tensor) -> Tensor:
        inner = self._product(i, self.up, x_TD)
        gate: Any = getattr(self.experts, "_apply_gate", None)
        if gate is not None and self.up == "gate_up_proj":
            inner = gate(inner)
        elif self.up == "gate_up_proj":
            first, second = inner.chunk(2, dim=-1)
            inner = self.experts.act_fn(first) * second  # type: ignore[operator]
        else:
            inner = self.experts.act_fn(inner)  # type: ignore[operator]
        return self._product(i, "down_proj", inner)

    def _product(self, i: int, name: str, x_TN: Tensor) -> Tensor:
        if (key := f"{i} {name}") in self.matrices:
            y: Tensor = self.matrices[key](x_TN)
            return y
        return F.linear(x_TN, *stored(self.experts, name, i))
