"""Rollouts: which prompts a step takes, their sampled completions, and the verifier's grades. No torch, no engine.

Everything random is a function of (seed, step), so that a resumed run and any number of workers draw the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from t2ray.core import Example, Generate, Mixture, SamplingParams
from t2ray.grades import Rollout, Verify


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
    grades = await verify([completion.text for completion in completions], [example.row for example, _ in jobs])
    return [
        Rollout(example=example, completion=completion, grade=grade)
        for (example, _), completion, grade in zip(jobs, completions, grades, strict=True)
    ]
