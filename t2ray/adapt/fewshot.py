"""The search for a task's mixture from a handful of labelled prompts (paper section 3.2, c). No torch.

It translates between experts and the vectors of `cem`, and evaluates a whole population as one batch of requests. Not
here: the search algorithm (`cem`), and saving the mixture (the registry does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2ray.adapt.cem import Array, Fitness, Round, cem
from t2ray.config.search import CEMConfig
from t2ray.core import ConfigError, Example, Generate, Mixture, RewardError, SamplingParams, Score
from t2ray.grades import Verify, for_verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShotResult:
    """The mixture that was found, its accuracy and mean log-likelihood (nats) on the shots, the rounds, and the number
    of answers that were generated in all."""

    mixture: Mixture
    accuracy: float
    log_likelihood: float
    history: tuple[Round, ...]
    prompts: int

    def check(self) -> None:
        """Raises if the mixture is not worth saving.

        Raises:
            RewardError: it answers no prompt right.
        """
        if not self.accuracy:
            raise RewardError(
                "no mixture answers any of the labelled prompts right, and none is saved; check the right answers and "
                "the reward, or allow longer answers"
            )


async def fewshot(
    generate: Generate,
    score: Score,
    verify: Verify,
    examples: Sequence[Example],
    experts: Sequence[str],
    *,
    settings: CEMConfig,
    sampling: SamplingParams,
    gold: Callable[[Mapping[str, Any]], str] | None = None,
    n_layers: int | None = None,
    progress: Callable[[Round], None] | None = None,
) -> FewShotResult:
    """Searches for the weights of `experts` that answer `examples` best.

    A member's fitness is its accuracy on the shots, then the mean log-likelihood of the right
    answers: of the golds, summed over tokens, if the task has golds; else of its own right answers, as the mean over
    tokens (the paper's rule). The first population has the mean, the base model and each expert alone at weight 1 (or
    the nearest weight within the bounds), so that the result is at least as good on its shots as the best single
    expert. A population of 32 on 10 shots is one gather of 320 generations and one of 320 scorings.

    Args:
        examples: the labelled shots; 10 in the paper. Fewer are easily fitted by chance.
        gold: the right answer of a row; None if the task has no gold answers.
        n_layers: number of decoder layers, for one weight per expert and layer; None for one weight per expert.

    Raises:
        ConfigError: there are no shots or experts, an expert is named twice, or the budget is below one population.
    """
    if not examples:
        raise ConfigError("the few-shot search has no examples; give it at least one labelled prompt (10 in the paper)")
    if not experts or len(set(experts)) < len(experts):
        raise ConfigError(f"the few-shot search got the experts {list(experts)}; name at least one, each once")
    width = n_layers or 1

    def mixture_of(alpha: Array) -> Mixture:
        return Mixture.of({name: row.tolist() for name, row in zip(experts, alpha.reshape(-1, width), strict=True)})

    async def objective(alphas: Array) -> list[Fitness]:
        rows = [(mixture_of(alpha), example) for alpha in alphas for example in examples]
        correct, likelihood = await _answer(generate, score, verify, rows, gold, sampling)
        correct, likelihood = correct.reshape(len(alphas), -1), likelihood.reshape(len(alphas), -1)
        counted = correct if gold is None else np.ones_like(correct)
        return [
            Fitness(float(right.mean()), float(nats[use].mean()) if use.any() else 0.0)
            for right, nats, use in zip(correct, likelihood, counted, strict=True)
        ]

    mean = 1.0 / len(experts) if settings.mean is None else settings.mean
    singles = np.repeat(np.eye(len(experts)), width, axis=1)
    seeds = np.vstack([np.full_like(singles[:1], mean), np.zeros_like(singles[:1]), singles])
    found = await cem(objective, seeds, settings, prompts_per_member=len(examples), progress=progress)
    return FewShotResult(
        mixture=mixture_of(found.alpha),
        accuracy=found.fitness.accuracy,
        log_likelihood=found.fitness.log_likelihood,
        history=found.history,
        prompts=found.prompts,
    )


async def _answer(
    generate: Generate,
    score: Score,
    verify: Verify,
    rows: Sequence[tuple[Mixture, Example]],
    gold: Callable[[Mapping[str, Any]], str] | None,
    sampling: SamplingParams,
) -> tuple[NDArray[np.bool_], Array]:
    """Returns whether each row was answered right, (R,), and the log-likelihood of its gold or its own answer, (R,)."""
    answers = asyncio.gather(*(generate(example.messages, mixture, sampling) for mixture, example in rows))
    if gold is None:
        completions = await answers
        likelihood = [float(np.mean(c.logprobs)) for c in completions]
    else:
        golds = asyncio.gather(*(score(example.messages, (gold(example.row),), mixture) for mixture, example in rows))
        completions, scores = await asyncio.gather(answers, golds)
        likelihood = [nats for (nats,) in scores]
    grades = await verify(for_verifier(completions), [example.row for _, example in rows])
    return np.array([grade.right for grade in grades]), np.array(likelihood)
