"""A model with an adapter in its layers, and the few passes that t2ray asks of it.

Not here: generation (`t2ray.engine`) and the loss (`t2ray.training.loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.probe import probe, probe_pictures
from t2ray.adapters.svf import SVF, WHOLE
from t2ray.config.adapter import AdapterConfig
from t2ray.core import Message
from t2ray.models.chat import Chat
from t2ray.models.families import Family
from t2ray.models.load import load_base
from t2ray.models.processor import side_by_side
from t2ray.models.targets import select_targets
from t2ray.models.weights import open_weights, resolve

if TYPE_CHECKING:
    from t2ray.adapters.base import Adapter

NOTHING: Mapping[str, Tensor] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded model: `hf` (the transformers module, in eval mode, without gradients), the `adapter` in its layers, and
    its `chat`. `base_digest` names the weights."""

    hf: Any
    family: Family
    adapter: Adapter
    chat: Chat
    base_digest: str

    @property
    def device(self) -> torch.device:
        return self.adapter.neutral.device

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.family.context

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have an embedding."""
        return int(self.hf.get_input_embeddings().num_embeddings)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, seen: Mapping[str, Tensor] = NOTHING) -> Tensor:
        """The last hidden states, (B, T, D), of right-padded sequences; `mask_BT` is 1 on real tokens, `seen` is what
        the model gets of their pictures."""
        return self.family.hidden(ids_BT, mask_BT, seen).to(self.device)

    def seen(self, conversations: Sequence[tuple[Message, ...]], pads: Sequence[int], length: int) -> dict[str, Tensor]:
        """What the model gets of the pictures of a batch's conversations: of (B, length) ids, after so many pads."""
        rows = [self.chat.seen(messages) for messages in conversations]
        found = side_by_side(rows, pads, length) if any(rows) else {}
        floats = {name: value.to(self.hf.dtype) for name, value in found.items() if value.is_floating_point()}
        return {name: value.to(self.device) for name, value in (found | floats).items()}

    def featured(
        self,
        conversations: Sequence[tuple[Message, ...]],
        pads: Sequence[int],
        length: int,
        bound: Callable[[int], AbstractContextManager[None]],
    ) -> dict[str, Any]:
        """As `seen`, but what the tower makes of the pictures: of those of row i within `bound(i)`, with a z of its
        own. For a family that `takes_features`."""
        made = []
        for i, messages in enumerate(conversations):
            if messages:
                with bound(i):
                    made.append(self.family.features(self.seen([messages], [0], length)))
        return self.family.featured(self.seen(conversations, pads, length), made)

    def hidden_behind(
        self, prefix_UP: Tensor, real_UP: Tensor, prefix_of_B: Tensor, ids_BT: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """The last hidden states, (B, T, D), of sequences that go on from shared prefixes; see `Family`."""
        return self.family.hidden_behind(prefix_UP, real_UP, prefix_of_B, ids_BT, mask_BT).to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's float32 logits, (..., V), of hidden states."""
        return self.family.logits(hidden).to(self.device).float()


def load_model(
    ref: str,
    factors: str | Path,
    *,
    device: str | None = None,
    adapter: AdapterConfig = WHOLE,
    seed: int = 0,
) -> Model:
    """The model at `ref` with an adapter in its layers: of SVF, the decomposed matrices; here it is chosen.

    Args:
        factors: the folder of the decomposition, which only SVF needs.
        device: as in `load_base`, and what is raised there.
        seed: of the numbers that a baseline's training starts from.

    Raises:
        ExpertError: the decomposition was made from another model.
        ConfigError: the adapter needs what is not installed, or does not fit the model.
        ModelError: t2ray does not compute what this architecture computes, or does not show it pictures, for which the
            adapter has matrices (see `probe`).
    """
    folder = resolve(ref)
    weights = open_weights(folder)
    if adapter.kind == "svf":
        opened = Factors.open(factors, base_digest=weights.digest)  # before the slow part
        hf, chat = load_base(folder, device)
        made: Adapter = SVF(hf, opened, adapter)
    else:
        from t2ray.adapters.baselines import PeftAdapter  # PEFT takes seconds to import

        hf, chat = load_base(folder, device)
        made = PeftAdapter(hf, adapter, select_targets(hf, adapter.targets, adapter.layers).targets, seed)
    family = Family(hf)
    probe(hf, family, made)
    model = Model(hf=hf, family=family, adapter=made, chat=chat, base_digest=weights.digest)
    probe_pictures(model)
    return model
