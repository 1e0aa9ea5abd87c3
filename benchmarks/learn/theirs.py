"""The side of TRL: RLOO or GRPO on LoRA, in TRL's own environment. `python -m benchmarks.learn.theirs JOB`.

What is not given is TRL's default, but for what would make it slower or the comparison unequal: no gradient
checkpointing, float32, t2ray's betas of AdamW, its schedule of the learning rate, and its weight of the KL.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.learn.divergence import mean_kl
from benchmarks.learn.turns import STEP, Clock, Rows, Turns

TRAINERS = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}


class Side(TrainerCallback):
    """Lets the trainer make a step when one is asked for, and replies with its figures."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.turns, self.clock = Turns(), Clock()
        sys.path.insert(0, job["code"])
        module, _, function = job["reward"].partition(":")
        self.function = getattr(importlib.import_module(module), function)
        self.model: Any = None
        self.figures: dict[str, Any] = {}

    def reward(self, completions: Sequence[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Returns the rewards of a step's answers. The KL, which is measured here, takes no time of the step's."""
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        rewards = [self.function(text, json.loads(row)) for text, row in zip(texts, columns["row"], strict=True)]
        self.clock.stop()
        rows = list(zip(columns["prompt_ids"], completion_ids, strict=True))
        right = sum(reward > 0 for reward in rewards) / len(rewards)
        self.figures = {"right": right, "kl": self.kl(rows), "rows": rows}
        self.clock.start()
        return rewards

    def kl(self, rows: Rows) -> float:
        """The KL of the model, as it stands, to the one without its adapter."""

        def base(ids_BT: torch.Tensor) -> Any:
            with self.model.disable_adapter():
                return self.model(ids_BT).logits

        return mean_kl(lambda ids_BT: self.model(ids_BT).logits, base, rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Says how many numbers are trained, and waits for the first step."""
        self.model = kwargs["model"]
        self.turns.reply(numbers=sum(p.numel() for p in self.model.parameters() if p.requires_grad))
        self._wait(control)
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Replies, and waits for the next step."""
        self.turns.reply(**self.clock.take(), **self.figures)
        self._wait(control)
        return control

    def _wait(self, control: Any) -> None:
        asked = self.turns.asked()
        if asked == STEP:
            self.clock.start()
            return
        if asked:
            self.turns.reply(kl=self.kl(asked))
        control.should_training_stop = True


def main(path: str) -> None:
    """Trains as the job says, as long as steps are asked for."""
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    side = Side(job)
    rl, (settings, trainer) = job["config"]["rl"], TRAINERS[job["side"]]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=side.reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([_row(tokenizer, one) for one in job["prompts"]]),
        callbacks=[side],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=settings(
            output_dir=job["folder"], seed=job["config"]["seed"], use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            max_steps=rl["steps"], per_device_train_batch_size=rl["prompts"] * rl["samples"],
            num_generations=rl["samples"], temperature=rl["temperature"], beta=rl["kl"],
            max_completion_length=job["max_tokens"], learning_rate=job["rate"],
            adam_beta1=rl["betas"][0], adam_beta2=rl["betas"][1],
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        ),
    ).train()  # fmt: skip


def _row(tokenizer: Any, one: dict[str, Any]) -> dict[str, Any]:
    messages = one["messages"]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        messages = "".join(message["content"] for message in messages)
        ids = tokenizer(messages)["input_ids"]
    return {"prompt": messages, "prompt_ids": ids, "row": json.dumps(one["row"])}


if __name__ == "__main__":
    main(sys.argv[1])
