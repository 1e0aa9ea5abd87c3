"""Rollouts: the prompts of a step, their sampled completions or right answers, and the grades. No torch, no engine.

Everything random is a function of (seed, step), so that a resumed run and any number of workers draw the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from t2ray.core import Completion, DataError, Example, Generate, Mixture, SamplingParams, Token
from t2ray.grades import Grade, Rollout, Verify, for_verifier

if TYPE_CHECKING:
    from t2ray.models.chat import Chat
    from t2ray.tasks.task import Task


def prompts_of_step(examples: Sequence[Example], prompts: int, step: int, seed: int) -> list[Example]:
    """Returns the `prompts` examples of a step, from step 1 on.

    Each epoch goes through all examples once, in an order of its own.
    """
    cursor = (step - 1) * prompts
    return [
        examples[_epoch_order(len(examples), position // len(examples), seed)[position % len(examples)]]
        for position in range(cursor, cursor + prompts)
    ]


@lru_cache(maxsize=4)
def _epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def rollout_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """Returns the seed of one sampled completion, which is the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{sample}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


async def roll_out(
    generate: Generate,
    verify: Verify,
    examples: Sequence[Example],
    mixture: Mixture,
    sampling: SamplingParams,
    seeds: Sequence[Sequence[int]],
) -> list[Rollout]:
    """Generates `len(seeds[i])` rollouts of example i in one batch, verifies them together, returns them by prompt.

    Raises:
        RewardError: the reward function failed.
    """
    jobs = [(example, seed) for example, row in zip(examples, seeds, strict=True) for seed in row]
    completions = await asyncio.gather(
        *(generate(example.messages, mixture, replace(sampling, seed=seed)) for example, seed in jobs)
    )
    grades = await verify(for_verifier(completions), [example.row for example, _ in jobs])
    return [
        Rollout(example=example, completion=completion, grade=grade)
        for (example, _), completion, grade in zip(jobs, completions, grades, strict=True)
    ]


def right_answers(chat: Chat, context: int, task: Task, examples: Sequence[Example]) -> list[Rollout]:
    """Returns each example's right answer as a rollout of reward 1; next-token training raises its likelihood.

    Raises:
        DataError: an example with its answer is longer than the context.
    """
    assert task.gold is not None, task.name
    rollouts = []
    for example in examples:
        text = task.gold(example.row)
        prompt_ids, answer_ids = chat.ids(example.messages), chat.encode_answer(text)
        if len(prompt_ids) + len(answer_ids) > context:
            raise DataError(
                f"{example.id} has {len(prompt_ids)} tokens and its right answer {len(answer_ids)}; the model's "
                f"context has {context}: leave the row out"
            )
        tokens = tuple(Token(id=id, text=chat.token(id)[0], logprob=float("nan")) for id in answer_ids)
        completion = Completion(
            prompt_ids=prompt_ids, tokens=tokens, text=text, finish_reason="stop", mixture=Mixture.base()
        )
        rollouts.append(Rollout(example=example, completion=completion, grade=Grade(reward=1.0, right=True)))
    return rollouts
