"""How an architecture is put together: its backbone, its head with all that happens to logits after it, its context.

transformers' own API says most of it. What it does not say is data here, and a probe at load (`adapters.probe`) refuses
a model for which the data is not right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from t2ray.core import ModelError

# What a model does to its logits after the head, by the attribute of its configuration, in this order.
_AFTER_HEAD: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "logits_scaling": lambda logits, value: logits / value,  # Granite
    "logit_scale": lambda logits, value: logits * value,  # Cohere
    "lm_head_multiplier": lambda logits, value: logits * value,  # Falcon-H1
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,  # Gemma 2, 3n and 4
}

_CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length")
_NO_LIMIT = 2048  # tokens, of an architecture without a limit of its own (ALiBi)


PASS = {"cpu": (1e7, 20), "cuda": (1e11, 130)}
"""What a pass of its own costs, by device: multiply-adds that Python's time per layer is good for, and the tokens in
whose time all weights are read. Measured on a CPU (0.4 ms at 25e9 per second; SmolLM2-135M), reckoned for a GPU."""


class Family:
    """The parts of a loaded causal language model.

    `architecture` is its class's name, `config` that of its text decoder, `backbone` the module that makes hidden
    states, `context` the tokens that prompt and answer may have together, `vocabulary` the number of logits. It
    `takes_features` where the probe has found that it can be given what its tower makes of pictures in their place.
    """

    takes_features = False

    def __init__(self, hf: Any) -> None:
        self.architecture = type(hf).__name__
        self.config = hf.config.get_text_config(decoder=True)
        self.backbone: nn.Module = _headless(hf.base_model)
        self.head: nn.Module = hf.get_output_embeddings()
        self.head.register_forward_pre_hook(_in_one_piece)
        self.vocabulary = int(self.config.vocab_size)
        self.context = context_of(self.config)
        _fix_long_rope(hf, self.config)
        self.parameters = _numbers(self.backbone)
        self.device = next(self.backbone.parameters()).device.type
        self._keepers: list[Any] = [module for module in hf.modules() if hasattr(module, "rope_deltas")]
        self.shares_prefixes = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.config).layers)
        values = {name: getattr(self.config, name, None) for name in _AFTER_HEAD}
        self._after_head = {name: value for name, value in values.items() if isinstance(value, int | float)}

    def forget(self) -> None:
        """Forgets where the pictures of the last call stood: some models keep it for a next call that goes on with it.

        A call that does not would have its tokens in places of other rows.
        """
        for module in self._keepers:
            module.rope_deltas = None

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, seen: Mapping[str, Any]) -> Tensor:
        """The last hidden states, (B, T, D), of right-padded sequences; `mask_BT` is 1 on real tokens, `seen` is what
        the model gets of their pictures (`processor.side_by_side`)."""
        made = self.backbone(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **seen)
        states: Tensor = made.last_hidden_state
        return states

    def features(self, seen: Mapping[str, Tensor]) -> Tensor | Sequence[Tensor]:
        """What the tower makes of pictures for the decoder, as the architecture has it; `seen` as in `hidden`."""
        look: Any = self.backbone.get_image_features
        given = {name: seen[name] for name in inspect.signature(look).parameters if name in seen}
        made: Tensor | Sequence[Tensor] = look(**given, return_dict=True).pooler_output
        return made

    def featured(self, seen: Mapping[str, Tensor], made: Sequence[Any]) -> dict[str, Any]:
        """What the model gets in place of `seen`, where the `features` of each row's pictures are made already."""
        whole = torch.cat(list(made)) if isinstance(made[0], Tensor) else [one for row in made for one in row]
        given: dict[str, Any] = {name: value for name, value in seen.items() if name != "pixel_values"}
        return given | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=whole)}}

    def continued(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The last hidden state, (B, 1, D), of the last token of each sequence, which goes on from a cache."""
        cache = DynamicCache(config=self.config)
        self.backbone(
            input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1], past_key_values=cache, use_cache=True
        )  # fmt: skip
        places_BT = mask_BT.cumsum(-1) - 1  # named: not every model counts what its cache has
        states: Tensor = self.backbone(
            input_ids=ids_BT[:, -1:], attention_mask=mask_BT, position_ids=places_BT[:, -1:], past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip
        self.forget()
        return states

    def hidden_behind(
        self, prefix_UP: Tensor, real_UP: Tensor, prefix_of_B: Tensor, ids_BT: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """The last hidden states, (B, T, D), of sequences of which row i goes on from prefix `prefix_of_B[i]`.

        Prefixes are padded on the left (`real_UP` is 1 on real tokens), what comes behind on the right. A prefix is
        read once, however many rows go on from it; the gradient is exact. For models that `shares_prefixes`.
        """
        cache = DynamicCache(config=self.config)
        positions_UP = (real_UP.cumsum(-1) - 1).clamp_min(0)
        self.backbone(
            input_ids=prefix_UP, attention_mask=real_UP, position_ids=positions_UP, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache.reorder_cache(prefix_of_B)
        real_BP = real_UP[prefix_of_B]
        start_B1 = real_BP.sum(-1, keepdim=True)
        states: Tensor = self.backbone(
            input_ids=ids_BT, attention_mask=torch.cat([real_BP, mask_BT], 1), past_key_values=cache, use_cache=True,
            position_ids=start_B1 + torch.arange(ids_BT.shape[1], device=ids_BT.device),
        ).last_hidden_state  # fmt: skip
        return states

    def pays(self, saved: int, passes: int = 1) -> bool:
        """Whether to read so many tokens less is worth so many `passes` more."""
        per_layer, tokens = PASS["cpu" if self.device == "cpu" else "cuda"]
        layers = int(self.config.num_hidden_layers)
        return saved * self.parameters >= passes * (layers * per_layer + tokens * self.parameters)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits, (..., V), of hidden states (..., D)."""
        logits: Tensor = self.head(hidden)
        for name, value in self._after_head.items():
            logits = _AFTER_HEAD[name](logits, value)
        return logits


def _in_one_piece(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input without gaps: `hidden[:, -1:]`, which every prefill asks for, has gaps in a batch.

    In bfloat16 torch then multiplies 64 rows by 49,152 tokens in 10 s on a CPU without AMX, where 0.04 s are needed.
    """
    return args[0].contiguous(), *args[1:]


def context_of(config: Any) -> int:
    """Returns the tokens that prompt and answer may have together, from the configuration of a text decoder."""
    limits = (getattr(config, name, None) for name in _CONTEXT)
    limit = int(next((limit for limit in limits if limit), _NO_LIMIT))
    return min(limit, int(_rope(config)["original_max_position_embeddings"])) if _is_long_rope(config) else limit


def layers_prefix(hf: Any) -> str:
    """What the names of all that is in the layers of the language decoder begin with: "model.layers.".

    Raises:
        ModelError: its layers are in no list.
    """
    decoder = _headless(hf.get_decoder())
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(hf).__name__} keeps its decoder's layers in no list; t2ray cannot tell them apart")
    layers = max(lists, key=_numbers)
    return next(f"{name}." for name, module in hf.named_modules() if module is layers)


def sees_by(hf: Any) -> dict[str, nn.Module]:
    """What pictures go through before the language decoder, by name: the vision tower, and what connects the two.

    Layers behind the last one whose states the decoder gets are left out. A model without a tower has nothing of it.
    """
    if getattr(hf.config, "vision_config", None) is None:
        return {}
    others = {*hf.get_decoder().modules(), hf.get_output_embeddings()}
    lists = [module for module in hf.modules() if isinstance(module, nn.ModuleList) and module not in others]
    taken = getattr(hf.config, "vision_feature_layer", None)
    if taken is not None and lists:
        layers = max(lists, key=_numbers)
        last = max(i % (len(layers) + 1) for i in ([taken] if isinstance(taken, int) else taken))  # 0: what they get
        others.update(module for layer in layers[last:] for module in layer.modules())
    return {name: module for name, module in hf.named_modules() if module not in others}


def layer_of(name: str, prefix: str) -> int | None:
    """The number of the decoder's layer that a module or parameter lies in; None of one that lies elsewhere."""
    number = name.removeprefix(prefix).partition(".")[0]
    return int(number) if name.startswith(prefix) and number.isdigit() else None


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_long_rope(config: Any) -> bool:
    return bool(_rope(config).get("rope_type") == "longrope")


def _rope(config: Any) -> Any:
    return getattr(config, "rope_parameters", None) or {}


def _fix_long_rope(hf: Any, config: Any) -> None:
    """Keeps a model with long rope to its short factors, which reach as far as `context_of` says.

    transformers takes the long factors for a whole batch as soon as one row of it is longer, so that a row's answer
    would depend on its neighbours.
    """
    for module in hf.modules() if _is_long_rope(config) else ():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"  # which never changes the frequencies that it has now, the short ones


def _headless(hf: Any) -> Any:
    """The part that makes hidden states, of a model that may have a head, or one within that has."""
    while hf.get_output_embeddings() is not None:
        hf = hf.base_model if hf.base_model is not hf else getattr(hf, "language_model", None) or hf.model
    return hf
