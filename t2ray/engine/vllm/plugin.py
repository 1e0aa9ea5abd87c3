"""The quantisation method "t2ray", by which vLLM builds its layers with SVF; and its entry point among vLLM's plugins.

    vllm serve MODEL --quantization t2ray --hf-overrides.quantization_config_file svf.json \\
      --logits-processors t2ray.engine.vllm.plugin:Mixtures --no-enable-prefix-caching
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.sparse import held
from t2ray.config.files import nearest
from t2ray.core import ConfigError, ModelError, T2RayError
from t2ray.engine.vllm import seams
from t2ray.engine.vllm.bank import ARGUMENT, Bank, Mode, mixture_of
from t2ray.engine.vllm.layers import SVFMethod
from t2ray.engine.vllm.runner import hook
from t2ray.experts.registry import Registry
from t2ray.models.weights import open_weights

CHECK = "t2ray.engine.vllm.plugin:Mixtures"


def register() -> None:
    """Registers the method in this process; vLLM calls it in each of its processes, since it is a plugin."""
    seams.register_quantization_config("t2ray")(Quantisation)


class Quantisation(seams.QuantizationConfig):
    """The configuration of "t2ray": the folder of factors, the mode, and the registry's experts by name and version.

    It is made in vLLM's first process and sent to the workers, which so agree on the versions.
    """

    def __init__(self, factors: str, mode: Mode = "mixtures", experts: str | None = None, salted: bool = False) -> None:
        super().__init__()
        self.factors, self.mode, self.experts, self.salted = factors, mode, experts, salted
        opened = Factors.open(factors)
        self.layout, self.base_digest = opened.layout, opened.base_digest
        self.names = {target.name: target.name for target in self.layout}
        self.versions = _versions(experts)
        self.bank: Bank | None = None
        Mixtures.known = frozenset(self.versions)

    @classmethod
    def from_config_dict_json(cls, text: str) -> Quantisation:
        """From `hf_overrides={"quantization_config_dict_json": text}`.

        Raises:
            ConfigError: text that is no such configuration.
        """
        try:
            return cls.from_config(json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"t2ray's configuration for vLLM: {error}; write factors, and experts") from None

    @classmethod
    def from_config_file(cls, path: str) -> Quantisation:
        """From `--hf-overrides.quantization_config_file FILE`; raises as `from_config_dict_json`."""
        return cls.from_config_dict_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Quantisation:
        """From the keys as they are."""
        return cls(**config)

    @classmethod
    def get_name(cls) -> str:
        return "t2ray"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM's names of the matrices of a model that it names in another way."""
        checkpoint = [target.name for target in self.layout]
        self.names = dict(zip(hf_to_vllm_mapper.apply_list(checkpoint), checkpoint, strict=True))

    def maybe_update_config(self, model_name: str, *others: object, **more: object) -> None:
        """Refuses factors of another model.

        Raises:
            ModelError: the factors were made from other weights.
        """
        if open_weights(model_name).digest != self.base_digest:
            raise ModelError(f"{self.factors} holds factors of another model than {model_name}; decompose this one")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; plain where nothing in it is adapted."""
        if not isinstance(layer, seams.LinearBase):
            return None
        before, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last, [last])
        names = [self.names.get(prefix)] if prefix in self.names else [self.names.get(f"{before}.{p}") for p in fused]
        if not any(names):
            return seams.UnquantizedLinearMethod()
        return SVFMethod(self.open(seams.get_current_vllm_config()), prefix, names)

    def open(self, vllm_config: Any) -> Bank:
        """This worker's bank, made at the first call.

        Raises:
            ConfigError: requests would share the cached keys and values of other mixtures.
        """
        if self.bank is None:
            if not self.salted:
                _refuse(vllm_config)
            scheduler = vllm_config.scheduler_config
            captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
            tokens = max(scheduler.max_num_batched_tokens, captured)
            hook()
            device = torch.device(seams.current_platform.device_type)
            self.bank = Bank(self.factors, self.mode, scheduler.max_num_seqs, tokens, device)
            self.bank.set_experts(_loaded(self.experts, self.versions, self.bank))
        return self.bank


def _versions(experts: str | None) -> dict[str, int]:
    if experts is None:
        return {}
    return {manifest.name: manifest.version for manifest in Registry(experts).list()}


def _loaded(experts: str | None, versions: dict[str, int], bank: Bank) -> dict[str, Tensor]:
    if experts is None:
        return {}
    registry, layout = Registry(experts), bank.factors.layout
    return {
        name: held(bank.factors, registry.load(name, version, base_digest=bank.factors.base_digest, layout=layout).z)
        for name, version in versions.items()
    }


def _refuse(vllm_config: Any) -> None:
    """What vLLM's own server must be started with, where nobody else salts its cache and checks its requests."""
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError("keys and values depend on the mixture: start vLLM with --no-enable-prefix-caching")
    if CHECK not in (vllm_config.model_config.logits_processors or ()):
        raise ConfigError(f"a wrong mixture must not reach the engine: start vLLM with --logits-processors {CHECK}")


class Mixtures(seams.FirstProcessor, seams.SecondProcessor):
    """Refuses a wrong mixture in front of the engine, with status 400. It changes no logits.

    Both of vLLM's runners take it: a processor is the one place where vLLM asks a plugin about a request's arguments.
    """

    known: frozenset[str] = frozenset()
    """The experts of vLLM's own server. An engine of t2ray's has its own, and checks its requests itself."""

    def __init__(self, *where: object) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for text that is no mixture, and for an expert that there is not."""
        argument = (sampling_params.extra_args or {}).get(ARGUMENT)
        if argument is not None and not isinstance(argument, str):
            raise ValueError(f"{ARGUMENT} is {argument!r}; write name:weight,name:weight")
        try:
            names = mixture_of(argument).names
        except T2RayError as error:
            raise ValueError(str(error)) from None
        for name in names:
            if name not in cls.known:
                raise ValueError(f"unknown expert {name!r}{nearest(name, cls.known)}")

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: object) -> None:
        """Nothing: the runners' hooks know who is in the batch."""

    def add_request(self, req_idx: int, sampling_params: object) -> bool:
        return False

    def apply(self, logits: Tensor, *context: object) -> Tensor:
        return logits
