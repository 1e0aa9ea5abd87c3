"""Every name of vLLM that t2ray leans on, and nothing else: the one module that imports vLLM.

Public are the quantisation registry, the linear layers and methods, the logits processors, `worker_extension_cls`,
`collective_rpc` and the engine. The model states of the second runner are vLLM's own affair. A release that moves a
name, an argument or an attribute fails `tests/test_vllm_seams.py`, by its name.
"""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstProcessor
from vllm.v1.sample.logits_processor import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondProcessor

__all__ = [
    "EngineArgs",
    "Executor",
    "FirstProcessor",
    "LLMEngine",
    "LinearBase",
    "MoveDirectionality",
    "QKVParallelLinear",
    "QuantizationConfig",
    "RequestOutputKind",
    "RowParallelLinear",
    "SamplingParams",
    "SecondProcessor",
    "StatLoggerBase",
    "StructuredOutputsParams",
    "TokensPrompt",
    "UnquantizedLinearMethod",
    "VLLMClientError",
    "VllmConfig",
    "current_platform",
    "first_runner",
    "get_current_vllm_config",
    "has_second_runner",
    "model_states",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
]

SUPPORTED = ">=0.32,<0.34"
"""The releases that have these seams: 0.32 is tested, 0.33 asks for a GPU."""


def first_runner() -> Any:
    """The class of the first runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # not while vLLM is being imported

    return GPUModelRunner


def has_second_runner() -> bool:
    """Whether Triton is there, without which the second runner's modules cannot be imported."""
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


def model_states() -> Any:
    """The module in which the second runner looks up a model's state; it needs Triton, as that runner does."""
    from vllm.v1.worker.gpu import model_states as module

    return module
