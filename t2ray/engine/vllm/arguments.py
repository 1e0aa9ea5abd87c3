"""What vLLM is given: the arguments of its engine and of each request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from t2ray.adapters.factors import STORED, Factors
from t2ray.config.serve import EngineConfig
from t2ray.core import ModelError, SamplingParams
from t2ray.engine.vllm import plugin, seams
from t2ray.engine.vllm.bank import Mode
from t2ray.models.chat import Chat
from t2ray.models.families import context_of
from t2ray.models.weights import open_weights


def request_arguments(sampling: SamplingParams, chat: Chat, streams: bool) -> dict[str, Any]:
    """The arguments of vLLM's sampling. It makes no texts and knows no stop strings; see `answers`."""
    kind = seams.RequestOutputKind
    return {
        "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "min_p": sampling.min_p, "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty, "logit_bias": dict(sampling.logit_bias) or None,
        "seed": sampling.seed, "logprobs": sampling.top_logprobs, "detokenize": False, "ignore_eos": True,
        "stop_token_ids": [] if sampling.ignore_eos else list(chat.eos_ids),
        "output_kind": kind.DELTA if streams or sampling.stop else kind.FINAL_ONLY,
        "structured_outputs": seams.StructuredOutputsParams(grammar=sampling.grammar) if sampling.grammar else None,
    }  # fmt: skip


def engine_arguments(folder: Path, factors: Factors, config: EngineConfig, mode: Mode) -> Any:
    """vLLM's configuration: its cache as large as `kv_tokens`, its weights as they are stored.

    By itself vLLM would halve the precision of float32 weights.
    """
    plugin.register()
    if seams.current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # what it binds to cores would stay bound
        if config.tensor_parallel == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else a process of its own for the worker
    stored = open_weights(folder).entries[f"{factors.layout[0].name}.weight"].dtype
    text = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    context = min(context_of(text), config.kv_tokens)
    # On a CPU a request with a seed whose prompt is read in pieces would end vLLM's first runner.
    cpu = seams.current_platform.is_cpu()
    tokens = max(config.batch_tokens, config.batch_rows, context if cpu else 0)
    options = {"factors": str(factors.folder.absolute()), "mode": mode, "salted": True}
    try:
        vllm_config = seams.EngineArgs(
            model=str(folder), quantization="t2ray", dtype=STORED[stored], max_model_len=context,
            generation_config="vllm",
            # A trainer needs the probabilities of the distribution that was drawn from; callers ask for the model's.
            logprobs_mode="processed_logprobs" if mode == "one" else "raw_logprobs",
            gpu_memory_utilization=0.01,  # `kv_cache_memory_bytes` says it; else a start needs 92 % of the GPU free
            hf_overrides={"quantization_config_dict_json": json.dumps(options)},
            structured_outputs_config={"backend": "guidance"},  # the library, and the language, of t2ray's grammars
            max_num_seqs=config.batch_rows, max_num_batched_tokens=tokens, enable_chunked_prefill=not cpu,
            tensor_parallel_size=config.tensor_parallel, enforce_eager=cpu,
            distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
            worker_extension_cls="t2ray.engine.vllm.runner.WorkerExtension", trust_remote_code=False,
        ).create_engine_config()  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{folder}: vLLM does not run it: {' '.join(str(error).split())[:300]}") from None
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    width = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.get_num_layers(parallel)
    blocks = 1 + -(-config.kv_tokens // vllm_config.cache_config.block_size)  # the first one is vLLM's own
    bytes_per_token = width * torch.finfo(model.dtype).bits // 8
    vllm_config.cache_config.kv_cache_memory_bytes = blocks * vllm_config.cache_config.block_size * bytes_per_token
    return vllm_config
