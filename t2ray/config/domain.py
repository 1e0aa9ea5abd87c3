"""What a domain of a training job is configured by: a task, or rows and a reward, and what becomes of its expert.

Not here: the job (`train`). No torch, no ray.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from t2ray.config.files import FilePath, Strict, nearest, validate
from t2ray.config.rl import RLConfig


class WeightedReward(Strict):
    """One of a domain's reward functions."""

    use: str = Field(description='Reward function, written "module:function".')
    weight: float = Field(1.0, allow_inf_nan=False, description="Its weight; a negative one makes it a penalty.")


class DomainConfig(Strict):
    """One domain: a built-in `task`; `data`, `prompt` and `reward` of one's own; or, with `others`, the classifier."""

    task: str | None = Field(None, description="Name of a built-in task, such as math, gsm8k, arc_easy or textvqa.")
    data: FilePath | tuple[FilePath, ...] | None = Field(
        None,
        description="File of rows (JSONL, JSON, CSV, TSV, Parquet or Arrow, also .gz), a pattern such as "
        "shards/*.parquet, a folder, an s3:// or gs:// address, or a list of these; or a hub data set's id.",
    )
    split: str = Field("train", description="Split to train on: of a hub data set, or of a folder with files by split.")
    validation: FilePath | tuple[FilePath, ...] | None = Field(
        None, description="Files or split to validate on; without any, every tenth row of `data` is held out."
    )
    test: FilePath | tuple[FilePath, ...] | None = Field(
        None, description="Files or split for `t2ray eval` that choose no expert; without any, those of `validation`."
    )
    prompt: str | None = Field(
        None, description='Template, such as "Q: {question}" or "{meta.level:.1f}: {q}", or the name of a column of '
        "messages, of which an answer at the end is cut off.",
    )  # fmt: skip
    image: str | None = Field(None, description="Column of pictures before the prompt: paths, or the files' bytes.")
    reward: str | tuple[WeightedReward, ...] | None = Field(
        None,
        description='Reward function, written "module:function", plain or async; it takes (completion, example) and '
        "returns a number in [-1, 1], or None to abstain. Or a list of several, as "
        '{use: "module:function", weight: 1}, of which the mean by weights is the reward.',
    )
    success_above: float = Field(0.0, ge=-1, lt=1, description="A reward above this counts as right in an accuracy.")
    gold: str | None = Field(
        None, description="Column of the right answers, such as reward_model.ground_truth, for `t2ray verify` and for "
        "ties of the few-shot search; without one, the answers that messages end with.",
    )  # fmt: skip
    max_tokens: int | None = Field(
        None, ge=1, description="Greatest number of tokens of a completion; without one, the task's, or rl.max_tokens."
    )
    others: FilePath | None = Field(
        None, description="Task or file of prompts that fit no other domain; it makes this the classification domain."
    )
    on_reward_error: Literal["stop", "abstain"] = Field(
        "stop",
        description="What becomes of a completion for which a reward function fails: it stops the run (stop), or it "
        "leaves the batch and is counted (abstain).",
    )
    on_long_prompt: Literal["refuse", "skip"] = Field(
        "refuse",
        description="What becomes of a prompt that does not fit the model's context together with its answer: the job "
        "is refused before its first step (refuse), or the row is left out and counted (skip).",
    )
    publish: Literal["better", "always"] = Field(
        "better",
        description="When the registry receives the expert: if it beat its base in validation (better), or always.",
    )
    train: bool = Field(
        True,
        description="Whether the job trains the domain's expert (true); or the registry has it already, and the domain "
        "gives the classification domain the prompts of its label, nothing else (false).",
    )
    rl: dict[str, Any] = Field(
        default_factory=dict, description="RL settings of this domain alone: keys of `rl`, which they win over."
    )

    @field_validator("rl")
    @classmethod
    def _known(cls, rl: dict[str, Any]) -> dict[str, Any]:
        for key in rl.keys() - RLConfig.model_fields:
            raise ValueError(f"unknown key {key!r}{nearest(key, RLConfig.model_fields)}")
        return rl

    @field_validator("reward", mode="before")
    @classmethod
    def _functions(cls, reward: object) -> object:
        if reward is None or isinstance(reward, str):
            return reward
        if not isinstance(reward, list | tuple) or not reward:
            what = 'text such as "module:function", or a list of {use: "module:function", weight: 1}'
            raise ValueError(f"{what}, not {reward!r}")
        each = [
            one if isinstance(one, WeightedReward) else validate(WeightedReward, one, where="one of its functions")
            for one in reward
        ]
        names = [one.use for one in each]
        if len(set(names)) < len(names) or not any(one.weight for one in each):
            raise ValueError(f"{', '.join(names)}: name each function once, and give one a weight other than 0")
        return tuple(each)

    @property
    def rewards(self) -> str | dict[str, float] | None:
        """The reward function by itself, or the weights of several by their names."""
        if isinstance(self.reward, tuple):
            return {one.use: one.weight for one in self.reward}
        return self.reward

    @model_validator(mode="after")
    def _one_kind(self) -> DomainConfig:
        kinds = [kind for kind in ("task", "data", "others") if getattr(self, kind) is not None]
        if not kinds or (len(kinds) > 1 and set(kinds) != {"task", "data"}):
            raise ValueError(
                "a domain needs one of task (a built-in), data (with prompt and reward), or others (the classifier)"
            )
        for key in ("test", "image"):
            if getattr(self, key) is not None and kinds != ["data"]:
                raise ValueError(f"{key} belongs to data of one's own; a built-in task has its own {key} rows")
        if kinds == ["data"] and not (self.prompt and self.reward):
            missing = [key for key in ("prompt", "reward") if not getattr(self, key)]
            raise ValueError(f"a domain with data also needs {' and '.join(missing)}")
        return self
