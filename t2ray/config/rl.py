"""The settings of REINFORCE, with the paper's as a preset. No torch, no ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from t2ray.config.files import Strict

Beta = Annotated[float, Field(ge=0, lt=1)]

TORCH_BETAS = (0.9, 0.999)


class RLConfig(Strict):
    """REINFORCE with a KL penalty on z (paper section 3.1). Defaults for small models; `preset: paper` is Table 6."""

    objective: Literal["reinforce", "sft"] = Field(
        "reinforce",
        description="What training follows: the verifier's rewards (reinforce), or the next token of the right answers "
        "(sft), in which sampling, baseline and KL penalty have no part.",
    )
    steps: int = Field(30, ge=1, description="Number of optimiser steps.")
    prompts: int = Field(24, ge=1, description="Number of prompts per step.")
    samples: int = Field(4, ge=1, description="Number of rollouts per prompt.")
    algorithm: Literal["reinforce", "rloo", "grpo"] = Field(
        "reinforce",
        description="What baseline and length are where they are not given: mean and sum (reinforce), loo and sum "
        "(rloo), group and mean (grpo).",
    )
    baseline: Literal["none", "mean", "loo", "group"] | None = Field(
        None,
        description="What is subtracted from a reward: 0 (none), the mean of the batch (mean), the mean of the same "
        "prompt's other samples (loo), or the mean of the prompt's samples, over their standard deviation (group).",
    )
    length: Literal["sum", "mean", "batch", "limit"] | None = Field(
        None,
        description="How the tokens of a rollout add up to its loss: their sum (sum), divided by the rollout's own "
        "length (mean), by the batch's mean length (batch), or by max_tokens (limit).",
    )
    updates: int = Field(
        1,
        ge=1,
        description="Number of updates of z per step, all from the same rollouts; those after the first are clipped "
        "by ratio_clip.",
    )
    ratio_clip: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="From which distance to 1 on a token's probability over that of the step's first update is "
        "pushed no further.",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Greatest number of tokens of a rollout, where neither the domain nor its task says one; without "
        "one, 512, or as many as the model's context has room for.",
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="Highest learning rate of AdamW; without one, 1.2 over the square root of the number of trained "
        "numbers, to two digits.",
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="How the learning rate goes on from its highest: down to a tenth (cosine), or unchanged."
    )
    betas: tuple[Beta, Beta] = Field(
        TORCH_BETAS,
        description="How much of AdamW's two means, of the gradient and of its square, a step keeps: [0, 0.9] follows "
        "the newest rollouts, which learns a format in fewer steps and nearer to the base.",
    )
    kl: float = Field(
        0.02, ge=0, description="Weight lambda of the penalty KL(policy || base), which is counted in nats per token."
    )
    clip: Annotated[float | None, BeforeValidator(lambda clip: None if clip == float("inf") else clip)] = Field(
        1.0,
        gt=0,
        description="Greatest norm of the gradient, to which a longer one is scaled down; null or .inf clips nothing.",
    )
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="What samples the rollouts: the model that is trained (transformers), or vLLM beside it with the "
        "expert folded into its weights (vllm); auto is vLLM where a float32 model has a GPU of its own and vLLM is "
        "installed, else transformers (docs/vllm.md).",
    )
    truncate: float = Field(
        2.0,
        ge=0,
        description="Greatest importance weight of a token, which corrects for sampling by engine: vllm; 0 means none.",
    )
    init: Literal["scale", "sigmoid"] = Field(
        "scale",
        description="How z begins: as 1 + N(0, sigma^2) (scale), or as the sigmoid of the parameters (sigmoid), which "
        "is the reference code's way.",
    )
    sigma: float = Field(0.0, ge=0, description="Standard deviation of the initial parameters.")
    micro_batch: int = Field(
        32, ge=1, description="Number of sequences that are differentiated at once; it bounds the memory."
    )
    micro_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of tokens, padding included, that are differentiated at once at most; the memory of a step "
        "grows with it. A longer sequence is differentiated alone. Without one, micro_batch alone bounds them.",
    )
    eval_every: int = Field(
        10, ge=1, description="Number of steps from one greedy validation, with its checkpoint, to the next."
    )
    eval_prompts: int = Field(128, ge=1, description="Number of validation prompts.")
    patience: int = Field(
        0,
        ge=0,
        description="Number of validations without a better one after which the run stops early; 0 means never.",
    )

    @model_validator(mode="after")
    def _siblings(self) -> RLConfig:
        if self.compared in ("loo", "group") and self.samples < 2:
            raise ValueError(
                f"baseline: {self.compared} needs samples >= 2, which it compares; use baseline: mean, or more samples"
            )
        if self.algorithm != "reinforce" and self.baseline in ("none", "mean"):
            raise ValueError(
                f"algorithm: {self.algorithm} compares a prompt's samples, and baseline: {self.baseline} does not; "
                "leave one of them out, or use baseline: loo or group"
            )
        if self.objective == "sft" and self.updates > 1:
            raise ValueError("updates > 1 reuses sampled rollouts, which objective: sft has none of; use updates: 1")
        return self

    @property
    def compared(self) -> str:
        """The baseline that is given, or the algorithm's."""
        return self.baseline or _ALGORITHMS[self.algorithm][0]

    @property
    def summed(self) -> str:
        """The length that is given, or the algorithm's."""
        return self.length or _ALGORITHMS[self.algorithm][1]

    def rate(self, numbers: int) -> float:
        """The highest learning rate of AdamW, which moves each of so many `numbers` by about that.

        A step of one size in each of K numbers moves the model by its size times sqrt(K) (decision 20).
        """
        return self.lr or float(f"{_STEP / numbers**0.5:.1e}")


_ALGORITHMS = {"reinforce": ("mean", "sum"), "rloo": ("loo", "sum"), "grpo": ("group", "mean")}

_STEP = 1.2
"""The norm of a step of AdamW on z: 0.02 for the tiny model's 3,584 numbers."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Table 6 and the reference code: one sample a prompt, no baseline, batch 256.
    "paper": {
        "prompts": 256, "samples": 1, "baseline": "none", "lr": 2e-3, "schedule": "constant", "kl": 0.2, "clip": 1e-3,
        "init": "sigmoid", "sigma": 1e-3**0.5, "max_tokens": 512, "micro_batch": 8,
    },
}  # fmt: skip
