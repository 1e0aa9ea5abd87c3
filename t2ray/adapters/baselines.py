"""LoRA, DoRA, IA3 and TinyLoRA behind the seam of all adapters, to be compared with SVF: the layers are PEFT's.

PEFT's trained parameters are parts of the one vector here: a forward finds them in their places, as views of the
vector that is bound. Rows of one batch share a vector; the engine makes a batch of each mixture.

Shapes: P numbers of an expert, R vectors.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t2ray.adapters.svf import terms
from t2ray.config.adapter import AdapterConfig
from t2ray.core import ConfigError, ExpertError, Mixture
from t2ray.models.targets import Target

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of one of PEFT's parameters, which is a part of the vector."""

    module: nn.Module
    name: str
    shape: torch.Size
    span: slice
    input_side: bool  # of LoRA's two factors, the one that its input meets first


class PeftAdapter:
    """One of PEFT's methods in the layers of a model; see `adapters.base.Adapter`.

    `layout` has the number of trained parameters of each target as its rank.
    """

    by_row = False

    def __init__(self, model: nn.Module, config: AdapterConfig, targets: Sequence[Target], seed: int = 0) -> None:
        """Replaces the targets' layers in `model` by PEFT's.

        Args:
            seed: of the numbers that training starts from, where the method draws them.

        Raises:
            ConfigError: as `check_baseline`, or peft has no such layer for a target.
        """
        self.config = config
        self.layers, slots = _inject(model, config, targets, seed), list[Slot]()
        layout, start = list[Target](), list[Tensor]()
        seen: set[int] = set()
        size = 0
        for target, layer in zip(targets, self.layers, strict=True):
            before = size
            for path, parameter in layer.named_parameters():
                if not parameter.requires_grad or id(parameter) in seen:  # TinyLoRA's may belong to several targets
                    continue
                seen.add(id(parameter))
                place, _, name = path.rpartition(".")
                span = slice(size, size := size + parameter.numel())
                slots.append(
                    Slot(
                        module=layer.get_submodule(place), name=name, shape=parameter.shape, span=span,
                        input_side=".lora_A." in f".{path}",
                    )
                )  # fmt: skip
                start.append(parameter.detach().float().flatten())
            layout.append(replace(target, rank=size - before, method=config.method))
        self.slots, self.layout, self.size = slots, tuple(layout), size
        self.start_P = torch.cat(start)
        self.neutral = self.start_P.clone()
        for slot in slots:
            if slot.input_side:
                self.neutral[slot.span] = 0.0
        self.ranks = [target.rank for target in self.layout]
        layers = torch.tensor([target.depth for target in self.layout])
        self.layer_of_P = torch.repeat_interleave(layers, torch.tensor(self.ranks)).to(self.neutral.device)
        self.bank: dict[str, Tensor] = {}
        self._bound = False
        self._put(self.neutral)
        self._switch(on=False)

    # ------------------------------------------------------------------------------------------- vector of a forward

    @contextmanager
    def rows(self, v_RP: Tensor, row_index: Tensor | None = None) -> Iterator[None]:
        """See `Adapter.rows`; R is 1."""
        assert not self._bound, "rows are bound already: bindings do not nest"
        assert len(v_RP) == 1, f"{len(v_RP)} vectors in one batch: a baseline takes one"
        self._put(v_RP[0])
        self._switch(on=True)
        try:
            yield
        finally:
            self._switch(on=False)
            self._put(self.neutral)  # else the last vector's graph would live on

    @contextmanager
    def each(self, v: Sequence[Tensor | None]) -> Iterator[None]:
        """See `Adapter.each`; all are the same."""
        assert all(one is v[0] for one in v), "a baseline takes one vector in a batch"
        with self.rows(self.table(v[:1])):
            yield

    @contextmanager
    def folded(self, v_P: Tensor) -> Iterator[None]:
        """As `rows`: nothing is folded."""
        with self.rows(v_P[None]):
            yield

    def is_folded(self, v_P: Tensor) -> bool:
        """Never."""
        return False

    def tokens_to_fold(self) -> int:
        """More than any batch has: nothing is folded."""
        return sys.maxsize

    def table(self, v: Sequence[Tensor | None]) -> Tensor:
        """See `Adapter.table`."""
        return torch.stack([self.neutral if v_P is None else v_P for v_P in v])

    def _put(self, v: Tensor) -> None:
        """Sets PEFT's parameters to views of a vector, or of the several that `mix` lays side by side for LoRA."""
        vectors = v.view(-1, self.size)
        for slot in self.slots:
            parts = vectors[:, slot.span].view(-1, *slot.shape)
            # side by side along the rank: rows of the factor that the input meets first, columns of the other
            whole = parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=0 if slot.input_side else 1)
            slot.module._parameters[slot.name] = whole  # type: ignore[assignment]  # a view, through which gradients go

    def _switch(self, *, on: bool) -> None:
        self._bound = on
        for layer in self.layers:
            layer._disable_adapters = not on

    # -------------------------------------------------------------------------------------------------------- experts

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """See `Adapter.set_experts`."""
        bank = {name: v_P.to(self.neutral.device) for name, v_P in changed.items()}
        self.bank = {name: v_P for name, v_P in {**self.bank, **bank}.items() if name not in gone}

    def mix(self, mixture: Mixture) -> Tensor:
        """The vector whose change of the weights is the sum of the experts' changes, each times its weight.

        IA3 and TinyLoRA change weights linearly in their numbers, as SVF does. LoRA's experts are laid side by side,
        `[a_1 B_1, a_2 B_2] [A_1; A_2]`, and the vector is as many times as long. DoRA divides by a norm of the changed
        weight: of it only an expert by itself is known.

        Raises:
            UnknownExpert: the mixture names an expert that is not in the bank.
            ExpertError: it has weights per layer, and not one for each; or this method cannot mix them.
        """
        if 0 in self.ranks and any(len(alpha) > 1 for _, alpha in mixture.weights):
            raise ExpertError(
                f"{mixture}: layers share numbers here, and have no weights of their own; give one weight"
            )
        experts = list(terms(mixture, self.bank, self.layer_of_P))
        if not experts:
            return self.neutral
        if self.config.kind == "dora":
            if len(experts) > 1 or not bool((experts[0][0] == 1).all()):
                raise ExpertError(f"{mixture}: DoRA's experts cannot be mixed or weighted; name one, with weight 1")
            return experts[0][1]
        if self.config.kind == "lora":
            output_P = torch.ones(self.size, dtype=torch.bool, device=self.neutral.device)
            for slot in self.slots:
                output_P[slot.span] = not slot.input_side
            return torch.cat([torch.where(output_P, alpha * v_P, v_P) for alpha, v_P in experts])
        mixed_P = self.neutral.clone()
        for alpha, v_P in experts:
            mixed_P = mixed_P + alpha * (v_P - self.neutral)
        return mixed_P

    def split(self, v_P: Tensor) -> Mapping[str, Tensor]:
        """See `Adapter.split`; a target that shares another's numbers has no part."""
        parts = zip(self.layout, v_P.split(self.ranks), strict=True)
        return {target.name: part for target, part in parts if target.rank}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Adapter.join`."""
        neutral = zip(self.layout, self.neutral.split(self.ranks), strict=True)
        return torch.cat([parts.get(target.name, part).to(part) for target, part in neutral])

    def changes(self, v_P: Tensor) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """A baseline is not exported.

        Raises:
            ExpertError: always.
        """
        raise ExpertError(f"experts of the method {self.config.method} are not exported; name one of SVF")

    # ------------------------------------------------------------------------------------------------------- training

    def initial(self, kind: str, noise_P: Tensor, start_P: Tensor | None = None) -> Tensor:
        """What PEFT starts from, which is the base model, or `start_P`; `rl.init` and its noise are SVF's."""
        return (self.start_P if start_P is None else start_P.to(self.start_P)).clone()

    def vector(self, kind: str, p_P: Tensor) -> Tensor:
        """The trained parameters themselves."""
        return p_P


def check_baseline(config: AdapterConfig, targets: Sequence[Target]) -> None:
    """Checks what needs no weights of a model.

    Raises:
        ConfigError: peft is not installed, or LoRA's rank is beyond that of every target.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"adapter: {config.kind} needs peft; pip install 't2ray[baselines]'")
    rank, most = config.settings.get("rank", 0), max(min(target.m, target.n) for target in targets)
    if rank > most:
        raise ConfigError(f"adapter.rank: {rank}, and no matrix of this model has a rank above {most}; choose less")


def _inject(model: nn.Module, config: AdapterConfig, targets: Sequence[Target], seed: int) -> list[Any]:
    """PEFT's layers in place of the targets', in their order."""
    check_baseline(config, targets)
    from peft import get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an older name of transformers
        torch.manual_seed(seed)
        try:
            get_peft_model(model, _peft_config(model, config, [target.name for target in targets]))
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"adapter: peft refuses {config.kind} for this model: {reason}") from None
    return [model.get_submodule(target.name) for target in targets]


def _peft_config(model: Any, config: AdapterConfig, names: list[str]) -> PeftConfig:
    """The method's configuration as PEFT calls it. Nothing is dropped out: the policy that samples is the one that is
    differentiated."""
    from peft import IA3Config, LoraConfig, TinyLoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

    settings = config.settings
    if config.kind == "ia3":  # the layers whose inputs are scaled rather than their outputs
        last = set(FEEDFORWARD.get(model.config.model_type, ()))
        inner = [name for name in names if last & {name.rpartition(".")[2], ".".join(name.split(".")[-2:])}]
        return IA3Config(target_modules=names, feedforward_modules=inner)
    if config.kind == "tinylora":
        return TinyLoraConfig(
            target_modules=names, r=settings["rank"], u=settings["numbers"], weight_tying=settings["tying"]
        )
    return LoraConfig(
        target_modules=names, r=settings["rank"], lora_alpha=settings["alpha"], use_dora=config.kind == "dora"
    )
