"""The benches that generate: mixtures by row, one folded mixture, rollouts, an iteration of a search, and pass 1.

The reference runs its mixtures one after the other, so that its time is linear in them: one is timed, and multiplied.
Not here: the update (`training`).
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from benchmarks.core.peft_rows import MISSING, PeftRows, available
from benchmarks.core.reference import Reference, greedy
from benchmarks.core.shape import Subject
from benchmarks.harness import Figures, Skipped, interleaved, measure, ratio
from t2ray.core import Mixture, SamplingParams
from t2ray.prompts import dispatch_prompt

REFERENCE_TARGETS = {4: 4.0, 16: 12.0}


def rows(subject: Subject, repeats: int) -> Figures:
    """Measures 4 and 16 mixtures in one batch, compared with the base, PEFT's mixed adapters and the reference."""
    shape = subject.shape
    prompts, greedily = subject.prompts(shape.rows), [SamplingParams(max_tokens=shape.new)] * shape.rows
    ids_BT, reference = subject.ids(prompts), Reference(subject.plain, subject.factors)
    peft = PeftRows(subject.plain, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], max(
        REFERENCE_TARGETS)) if available() else None  # fmt: skip
    sides = {"base": lambda: greedy(subject.plain, ids_BT, shape.new)}
    for count in REFERENCE_TARGETS:
        row_index = [i * count // shape.rows for i in range(shape.rows)]
        some = subject.mixtures(count)
        mixtures, first = [some[i] for i in row_index], row_index.count(0)
        z_1K = subject.model.adapter.mix(some[0])[None]

        def ours(mixtures: list[Mixture] = mixtures) -> Tensor:
            answers = subject.generate(prompts, mixtures, greedily)
            return torch.tensor([answer.token_ids for answer in answers])

        def group(z_1K: Tensor = z_1K, first: int = first) -> Tensor:
            return reference.generate(ids_BT[:first], z_1K, [0] * first, shape.new)

        def adapters(row_index: list[int] = row_index) -> Tensor:
            assert peft is not None
            return peft.generate(ids_BT, row_index, shape.new)

        sides |= {f"rows_{count}": ours, f"reference_{count}": group}
        if peft is not None:
            sides[f"peft_{count}"] = adapters
    times = interleaved(sides, repeats)
    figures: Figures = {}
    for count, target in REFERENCE_TARGETS.items():
        over_base = ratio(times, "base", f"rows_{count}")
        figures[f"over_base_{count}"] = measure(over_base)
        figures[f"over_bound_{count}"] = measure([value / shape.bound() for value in over_base], 0.95)
        figures[f"over_peft_{count}"] = (
            measure(ratio(times, f"peft_{count}", f"rows_{count}"), 1.0) if peft else Skipped(reason=MISSING)
        )
        figures[f"over_reference_{count}"] = measure(ratio(times, f"reference_{count}", f"rows_{count}", count), target)
        same = sides[f"rows_{count}"]()[: shape.rows // count] == sides[f"reference_{count}"]()
        figures[f"same_tokens_{count}"] = measure([float(same.float().mean())], 1.0)
    return figures


def folded(subject: Subject, repeats: int) -> Figures:
    """Measures one folded mixture for the batch, and the cost of a fold in decoding steps of the base."""
    shape, svf = subject.shape, subject.model.adapter
    prompts, greedily = subject.prompts(shape.rows), [SamplingParams(max_tokens=shape.new)] * shape.rows
    ids_BT, turns = subject.ids(prompts), cycle(subject.mixtures(2))
    current = next(turns)

    def fold() -> None:
        nonlocal current
        current = next(turns)
        with svf.folded(svf.mix(current)):
            pass

    times = interleaved(
        {
            "base": lambda: greedy(subject.plain, ids_BT, shape.new),
            "first": lambda: greedy(subject.plain, ids_BT, 1),
            "fold": fold,
            "folded": lambda: subject.generate(prompts, [current] * shape.rows, greedily),
        },
        repeats,
    )
    step_s = [(base - first) / (shape.new - 1) for base, first in zip(times["base"], times["first"], strict=True)]
    steps = [fold_s / one for fold_s, one in zip(times["fold"], step_s, strict=True)]
    return {
        "over_base": measure(ratio(times, "base", "folded"), 0.97),
        "fold_steps": measure(steps, 8.0, at_most=True),
        "fold_s": measure(times["fold"]),
    }


def rollout(subject: Subject, repeats: int) -> Figures:
    """Measures the sampling of a training step, without and with its fold, compared with sampling from the base."""
    shape, svf = subject.shape, subject.model.adapter
    prompts = subject.prompts(shape.rows)
    sampled = [SamplingParams(max_tokens=shape.new, temperature=1.0, seed=i) for i in range(shape.rows)]
    ids_BT, turns = subject.ids(prompts), cycle(subject.mixtures(2))
    policy = next(turns)

    def plain() -> None:
        subject.plain.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=shape.new, do_sample=True, top_k=0,
            temperature=1.0, pad_token_id=0,
        )  # fmt: skip

    def fold() -> None:
        nonlocal policy
        policy = next(turns)
        with svf.folded(svf.mix(policy)):
            pass

    times = interleaved(
        {"plain": plain, "fold": fold, "ours": lambda: subject.generate(prompts, [policy] * shape.rows, sampled)},
        repeats,
    )
    whole = {"plain": times["plain"], "ours": [a + b for a, b in zip(times["fold"], times["ours"], strict=True)]}
    return {
        "over_generate": measure(ratio(times, "plain", "ours"), 0.95),
        "over_generate_with_fold": measure(ratio(whole, "plain", "ours")),
        "tokens_per_s": measure([shape.rows * shape.new / seconds for seconds in times["ours"]]),
    }


def cem(subject: Subject, repeats: int) -> Figures:
    """Measures one iteration of the few-shot search, in which every member answers every shot."""
    shape = subject.shape
    members, shots = subject.mixtures(shape.members), subject.prompts(shape.shots)
    prompts = [shot for _ in members for shot in shots]
    mixtures = [member for member in members for _ in shots]
    greedily = [SamplingParams(max_tokens=shape.answer)] * len(prompts)
    ids_BT, reference = subject.ids(shots), Reference(subject.plain, subject.factors)
    z_1K = subject.model.adapter.mix(members[0])[None]
    times = interleaved(
        {
            "ours": lambda: subject.generate(prompts, mixtures, greedily),
            "reference": lambda: reference.generate(ids_BT, z_1K, [0] * shape.shots, shape.answer),
        },
        repeats,
    )
    return {
        "over_reference": measure(ratio(times, "reference", "ours", shape.members), 10.0),
        "iteration_s": measure(times["ours"]),
    }


def dispatch(subject: Subject, repeats: int) -> Figures:
    """Measures pass 1 with a classification expert as a share of pass 2, for one request and for a batch."""
    shape = subject.shape
    labels = ("w10 w11", "w12 w13", "w14 w15", "w16")
    prompts, mixtures = subject.prompts(shape.rows), subject.mixtures(shape.rows)
    questions = [dispatch_prompt(prompt, labels) for prompt in prompts]
    classifier = Mixture.parse("e0")
    answers = [SamplingParams(max_tokens=shape.pass2)] * shape.rows
    times = interleaved(
        {
            "pass1": lambda: subject.score(questions[:1], labels, [classifier]),
            "pass2": lambda: subject.generate(prompts[:1], mixtures[:1], answers[:1]),
            "batch1": lambda: subject.score(questions, labels, [classifier] * shape.rows),
            "batch2": lambda: subject.generate(prompts, mixtures, answers),
        },
        repeats,
    )
    return {
        "share": measure(ratio(times, "pass1", "pass2"), 0.10, at_most=True),
        f"share_{shape.rows}_rows": measure(ratio(times, "batch1", "batch2")),
        "pass1_s": measure(times["pass1"]),
    }
