"""The places of vLLM that t2ray leans on: each by its name, so that a release that moves one says which."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():  # of vLLM's own imports
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vLLM (make vllm)")
    from t2ray.engine.vllm import seams

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from waiting import GUARD_S

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

# What is called or overridden, and the arguments that t2ray gives it or expects of it.
CALLS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "EngineArgs": (
        seams.EngineArgs,
        ("model", "quantization", "dtype", "max_model_len", "generation_config", "hf_overrides",
         "structured_outputs_config", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "enforce_eager",
         "distributed_executor_backend", "worker_extension_cls", "logprobs_mode", "gpu_memory_utilization"),
    ),
    "LLMEngine": (seams.LLMEngine, ("vllm_config", "executor_class", "log_stats", "stat_loggers", "multiprocess_mode")),
    "LLMEngine.add_request": (seams.LLMEngine.add_request, ("request_id", "prompt", "params")),
    "LLMEngine.abort_request": (seams.LLMEngine.abort_request, ("request_ids",)),
    "LLMEngine.collective_rpc": (seams.LLMEngine.collective_rpc, ("method", "args")),
    "LLMEngine.step": (seams.LLMEngine.step, ()),
    "LLMEngine.reset_prefix_cache": (seams.LLMEngine.reset_prefix_cache, ()),
    "SamplingParams": (
        seams.SamplingParams,
        ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias",
         "seed", "logprobs", "prompt_logprobs", "detokenize", "ignore_eos", "stop_token_ids", "output_kind",
         "extra_args", "structured_outputs"),
    ),
    "StructuredOutputsParams": (seams.StructuredOutputsParams, ("grammar",)),
    "UnquantizedLinearMethod.apply": (seams.UnquantizedLinearMethod.apply, ("layer", "x", "bias")),
    "UnquantizedLinearMethod.process_weights_after_loading": (
        seams.UnquantizedLinearMethod.process_weights_after_loading, ("layer",),
    ),
    "QuantizationConfig.get_quant_method": (seams.QuantizationConfig.get_quant_method, ("layer", "prefix")),
    "QuantizationConfig.apply_vllm_mapper": (seams.QuantizationConfig.apply_vllm_mapper, ("hf_to_vllm_mapper",)),
    "QuantizationConfig.maybe_update_config": (seams.QuantizationConfig.maybe_update_config, ("model_name",)),
    "FirstProcessor.validate_params": (seams.FirstProcessor.validate_params, ("sampling_params",)),
    "SecondProcessor.validate_params": (seams.SecondProcessor.validate_params, ("sampling_params",)),
    "GPUModelRunner._prepare_inputs": (
        seams.first_runner()._prepare_inputs, ("scheduler_output", "num_scheduled_tokens"),
    ),
    "StatLoggerBase.record": (seams.StatLoggerBase.record, ("scheduler_stats",)),
}  # fmt: skip


# What is hooked or called by vLLM, as its source says it, in modules that cannot be imported without a GPU or Triton.
PLACES: dict[str, tuple[str, ...]] = {
    "v1/worker/gpu/model_states/__init__.py": ("cls = resolve_model_state_cls(vllm_config, model)",),
    "v1/worker/gpu/model_states/interface.py": ("def add_request(self, req_index: int, new_req_data",
                                                "def prepare_inputs("),
    "v1/worker/gpu/model_runner.py": ("init_model_state(", "self.model_state.add_request(req_index, new_req_data)",
                                      "self.model_state.prepare_inputs(input_batch, self.req_states)"),
    "v1/worker/gpu/input_batch.py": ("idx_mapping_np: np.ndarray", "num_scheduled_tokens: np.ndarray"),
    "v1/worker/gpu_model_runner.py": ("self._prepare_inputs(scheduler_output, num_scheduled_tokens_np)",
                                      "req_ids = self.input_batch.req_ids"),
    "model_executor/model_loader/weight_utils.py": ("quant_cls.from_config_dict_json(",
                                                    "quant_cls.from_config_file("),
    "model_executor/layers/linear.py": ("self.num_kv_head_replicas", "self.output_partition_sizes",
                                        "self.input_size_per_partition"),
    "v1/core/kv_cache_utils.py": ("cache_salt",),
    # What `kv_cache_memory_bytes` does not make void is a check of the start.
    "v1/worker/gpu_worker.py": ("if kv_cache_memory_bytes := self.cache_config.kv_cache_memory_bytes:",
                                "self.requested_memory = request_memory("),
    # Both samplers say, where they are asked to, the probabilities that they draw from.
    "v1/sample/sampler.py": ("raw_logprobs = processed_logprobs",),
    "v1/worker/gpu/sample/sampler.py": ("if self.logprobs_mode in PROCESSED_LOGPROBS_MODES:",),
}  # fmt: skip


def resolved(*wanted: str) -> dict[str, str]:
    """The versions that a resolver finds for these requirements, by what the index publishes today."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "-"]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(wanted), capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)


def test_one_environment_can_hold_t2ray_and_the_newest_vllm() -> None:
    """Not an older one, to which a resolver would turn; and the newest of those that t2ray supports."""
    newest = resolved("vllm")["vllm"]
    assert resolved("-e .", "vllm")["vllm"] == newest
    supported = resolved("-e .", f"vllm{seams.SUPPORTED}")
    assert Version(supported["vllm"]) in SpecifierSet(">=0.33,<0.34") and {"ray", "torch"} <= supported.keys()


def test_the_release_is_one_that_has_been_tried() -> None:
    import vllm

    assert Version(Version(vllm.__version__).base_version) in SpecifierSet(seams.SUPPORTED), vllm.__version__


@pytest.mark.parametrize("name", CALLS)
def test_a_seam_takes_what_t2ray_gives_it(name: str) -> None:
    call, wanted = CALLS[name]
    missing = [argument for argument in wanted if argument not in inspect.signature(call).parameters]
    assert not missing, f"vLLM's {name} has no {', '.join(missing)}"


def text_of(path: str) -> str:
    """The source of a module of vLLM that cannot be imported without a GPU or Triton."""

    import vllm

    return (Path(vllm.__file__).parent / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PLACES)
def test_a_seam_stands_where_it_stood(path: str) -> None:
    source = text_of(path)
    missing = [line for line in PLACES[path] if line not in source]
    assert not missing, f"vLLM's {path} has no more {missing}"
