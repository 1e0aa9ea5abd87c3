"""The settings of REINFORCE, with the paper's as a preset. No torch, no ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from t2ray.config.files import Strict


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
    baseline: Literal["none", "mean", "loo"] = Field(
        "mean",
        description="What is subtracted from a reward: 0 (none), the mean of the batch (mean), or the mean of the same "
        "prompt's other samples (loo).",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Greatest number of tokens of a rollout, where neither the domain nor its task says one; without "
        "one, 512, or as many as the model's context has room for.",
    )
    lr: float = Field(2e-2, gt=0, description="Highest learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="How the learning rate goes on from its highest: down to a tenth (cosine), or unchanged."
    )
    kl: float = Field(
        0.02, ge=0, description="Weight lambda of the penalty KL(policy || base), which is counted in nats per token."
    )
    clip: Annotated[float | None, BeforeValidator(lambda clip: None if clip == float("inf") else clip)] = Field(
        1.0,
        gt=0,
        description="Greatest norm of the gradient, to which a longer one is scaled down; null or .inf clips nothing.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What samples the rollouts: the model that is trained (transformers), or vLLM beside it with the "
        "expert folded into its weights (vllm).",
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
    def _loo_needs_siblings(self) -> RLConfig:
        if self.baseline == "loo" and self.samples < 2:
            raise ValueError("baseline: loo (leave-one-out) needs samples >= 2; use baseline: mean, or more samples")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Table 6 and the reference code: one sample a prompt, no baseline, batch 256.
    "paper": {
        "prompts": 256, "samples": 1, "baseline": "none", "lr": 2e-3, "schedule": "constant", "kl": 0.2, "clip": 1e-3,
        "init": "sigmoid", "sigma": 1e-3**0.5, "max_tokens": 512, "micro_batch": 8,
    },
}  # fmt: skip
