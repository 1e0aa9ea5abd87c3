"""The GPU hours of a training, computed from a model's config.json alone: what to expect before it starts.

The estimate is of one kind of GPU, an H100, of which training is taken to reach a share of the arithmetic and
generation a share of the memory bandwidth. Answers are taken to be as long as they may be. It is right within a factor
of two or so where that holds, and leaves out loading, decomposing and verifying.
"""

from __future__ import annotations

from t2ray.runs.memory import ModelShape

GPU = "H100"
_FLOPS = 0.4 * 989e12  # bfloat16 without sparsity, of NVIDIA's data sheet
_BYTES_PER_S = 0.4 * 3.35e12
PROMPT = 256
"""Tokens of a prompt, as the estimate takes them."""


def training_hours(shape: ModelShape, *, steps: int, rollouts: int, tokens: int, rows: int = 128) -> float:
    """Returns the hours of one domain's training on one GPU.

    A step generates its rollouts, and runs over all their tokens the base forwards, the policy forwards through the
    factors, and the policy backwards without gradients of weights.

    Args:
        tokens: greatest number of tokens of an answer.
        rows: number of rollouts that are generated at once.
    """
    dense = sum(target.m * target.n for target in shape.targets)
    factors = sum((target.m + target.n) * target.rank for target in shape.targets)
    forward = 2.0 * shape.parameters
    policy = forward + 2.0 * (factors - dense)
    update = rollouts * (PROMPT + tokens) * (forward + 2 * policy) / _FLOPS
    return steps * (update + _generation_s(shape, rollouts, tokens, rows)) / 3600


def answering_hours(shape: ModelShape, *, prompts: int, tokens: int, rows: int = 128) -> float:
    """Returns the hours of answering prompts on one GPU, as evaluations and few-shot searches do."""
    return _generation_s(shape, prompts, tokens, rows) / 3600


def _generation_s(shape: ModelShape, prompts: int, tokens: int, rows: int) -> float:
    """Returns the seconds of answering: prompts are arithmetic, each token of a batch reads weights and caches."""
    read = prompts * PROMPT * 2.0 * shape.parameters / _FLOPS
    rows = min(rows, prompts)
    cache = rows * (PROMPT + tokens / 2) * shape.kv_token_layer * shape.layers
    each = (shape.parameters * shape.size + cache) / _BYTES_PER_S
    return read + -(-prompts // max(1, rows)) * tokens * each
