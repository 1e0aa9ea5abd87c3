"""What the sides learn, and the job of one run of a side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2ray.config.files import read_yaml
from t2ray.config.train import TrainConfig, resolve
from t2ray.models.weights import resolve as resolve_model
from t2ray.tasks.build import build_task
from t2ray.training.rollout import prompts_of_step
from t2ray.workbench import Place, open_factors

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward"
PEERS = ("rloo", "grpo")

BETAS = (0.0, 0.9)
"""Of AdamW on every side: z learns the settings in fewer steps than with torch's 0.9 and 0.999 (decision 24)."""

Rates = Mapping[str, tuple[float, ...]]
"""The learning rates that each side tries, as many for each: "t2ray" and the peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is learnt: a training job, the tokens of an answer, and when it is learnt.

    It is learnt after the step in which the share of right rollouts, in the mean of the last `window` steps, is
    `target` or more. Of the job's `domains` there is one.
    """

    job: dict[str, Any]
    code: str
    target: float
    window: int
    rates: Rates


def larger() -> Setting:
    """The README's own domain: the bare letter of the larger number, by the tiny model."""
    job = read_yaml(EXAMPLE / "larger.yaml")
    job["domains"]["larger"]["max_tokens"] = 12
    rates = {"t2ray": (0.01, 0.02, 0.04), "rloo": (1e-3, 2e-3, 5e-3), "grpo": (1e-3, 2e-3, 5e-3)}
    return Setting(job=job, code=str(EXAMPLE), target=0.95, window=1, rates=rates)


def dog(folder: Path) -> Setting:
    """A story with a dog in it, by a model of stories. Its one prompt is written into `folder`."""
    rows = folder / "stories.jsonl"
    rows.write_text(json.dumps({"begin": "Once upon a time"}) + "\n", encoding="utf-8")
    domain = {"data": str(rows), "prompt": "{begin}", "reward": "benchmarks.learn.rewards:dog", "max_tokens": 48}
    rates = {"t2ray": (0.027, 0.04, 0.08), "rloo": (1e-3, 2e-3, 5e-3), "grpo": (1e-3, 2e-3, 5e-3)}
    return Setting(job={"domains": {"dog": domain}}, code=str(folder), target=0.95, window=1, rates=rates)


def brief() -> Setting:
    """Answers of at most 12 words, by a real instruct model."""
    job = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "domains": {"brief": {"task": "brief", "max_tokens": 24}},
        "rl": {"steps": 12, "prompts": 4, "samples": 4, "temperature": 0.7},
    }
    rates = {"t2ray": (1.5e-3, 3e-3), "rloo": (5e-4, 1e-3), "grpo": (5e-4, 1e-3)}
    return Setting(job=job, code="", target=0.8, window=3, rates=rates)


def configured(setting: Setting, name: str, model: str | None, data: str | None) -> TrainConfig:
    """Returns the job of t2ray's side, but for the learning rate and the seed.

    Raises:
        T2RayError: the model or the rows cannot be read.
    """
    values = setting.job | ({"model": model} if model else {})
    if data:
        values["domains"][name]["data"] = data
    config = resolve(values | {"workers": 0, "cpus": 1, "verifiers": 0}, where=name, code=setting.code)
    at_once = config.rl.prompts * config.rl.samples  # as TRL is told
    config = config.model_copy(update={"rl": config.rl.model_copy(update={"betas": BETAS, "micro_batch": at_once})})
    factors = open_factors(Place(model=config.model, factors=None, experts=None, run=None))
    return config.model_copy(update={"factors": str(factors.folder)})


def job(config: TrainConfig, side: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Returns what the process of a side gets: the configuration, and for TRL what it holds in plain values."""
    (name,) = config.domains
    rl = config.rl.model_copy(update={"lr": rate} if side == "t2ray" else {})
    config = config.model_copy(update={"rl": rl, "seed": seed})
    task = build_task(config, name)
    shown = [
        {"messages": [{"role": turn.role, "content": turn.text} for turn in example.messages], "row": example.row}
        for step in range(1, rl.steps + 1)
        for example in prompts_of_step(task.examples("train"), rl.prompts, step, seed)
    ]
    return {
        "config": config.model_dump(mode="json"), "side": side, "rate": rate, "folder": str(folder / side),
        "model": str(resolve_model(config.model)), "prompts": shown, "reward": task.reward, "code": config.code,
        "max_tokens": task.max_tokens,
    }  # fmt: skip
