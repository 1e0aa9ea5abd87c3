"""Which engine: transformers, or vLLM where it is installed. vLLM is imported when it computes."""

from __future__ import annotations

import logging
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import AutoConfig

from t2ray.adapters.factors import MANIFEST, Factors
from t2ray.config.serve import EngineConfig
from t2ray.core import ModelError, ResourceError
from t2ray.models.load import load_chat
from t2ray.models.weights import resolve

if TYPE_CHECKING:
    from t2ray.engine.vllm.engine import VLLMEngine

log = logging.getLogger(__name__)

Chosen = Literal["transformers", "vllm"]

RELEASES = ("0.32", "0.33")
"""The releases of vLLM that have what t2ray needs (`engine.vllm.seams`)."""

COMPARED = ("llama",)
"""The model types whose answers by vLLM were held against the offline engine's."""


def choose(
    asked: Literal["auto", "transformers", "vllm"], model: str, factors: str | None, *, gpu: bool, against: str = ""
) -> Chosen:
    """Returns what computes, and logs why where that was open (`auto`).

    Args:
        factors: the folder of the decomposition, which may not have been made yet.
        gpu: whether what computes has a GPU.
        against: what else speaks against vLLM.
    """
    if asked != "auto":
        return asked
    kind, why = decided(gpu=gpu, installed=installed(), against=against or unfit(model, factors))
    log.log(logging.WARNING if gpu else logging.INFO, "engine: %s, since %s", kind, why)
    return kind


def decided(*, gpu: bool, installed: str | None, against: str) -> tuple[Chosen, str]:
    """Returns what computes where that is open, and why: vLLM on a GPU, where it is installed and fits.

    Args:
        installed: vLLM's version.
        against: why vLLM does not fit, if it does not.
    """
    if not gpu:
        return "transformers", "there is no GPU"
    if installed is None:
        return "transformers", "vLLM is not installed"
    if ".".join(installed.split(".")[:2]) not in RELEASES:
        return "transformers", f"vLLM {installed} is none of the releases that are known: {', '.join(RELEASES)}"
    if against:
        return "transformers", against
    return "vllm", f"there is a GPU, and vLLM {installed} is installed (its speed is not measured yet)"


def installed() -> str | None:
    """The version of vLLM in this environment; None without one."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None


def unfit(model: str, factors: str | None) -> str:
    """Why vLLM is not chosen for a model by itself; empty where nothing speaks against it."""
    try:
        kind = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False).model_type
    except (ValueError, OSError, KeyError):  # what loads it says more
        return "transformers does not know this model"
    if kind not in COMPARED:
        return f"models of type {kind} have not been compared in vLLM; choose it by name to try"
    if factors and (Path(factors) / MANIFEST).exists() and Factors.open(factors).manifest.support is not None:
        return "vLLM runs no sparse factors"
    return ""


def vllm_engine(model: str, factors: Factors, config: EngineConfig, *, mode: Literal["mixtures", "one"]) -> VLLMEngine:
    """Loads a model into vLLM; see `engine.vllm.engine`.

    Raises:
        ResourceError: vLLM is not installed.
        ModelError: vLLM does not run this model, or the factors have matrices for pictures, of which it is given none.
    """
    if tower := [target.name for target in factors.layout if target.in_tower]:
        raise ModelError(
            f"{model}: the engine vllm is given no pictures, and the factors have {tower[0]} for them; use transformers"
        )
    if find_spec("vllm") is None:
        raise ResourceError("the engine vllm needs vLLM in this environment: pip install vllm; or choose transformers")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # by itself it writes pages about every start
    from t2ray.engine.vllm.engine import VLLMEngine

    folder = resolve(model)
    chat, _ = load_chat(folder)
    chat.processor, chat.blind = None, "the engine vllm takes none; use transformers"
    return VLLMEngine(folder, factors, chat, config, mode=mode)
