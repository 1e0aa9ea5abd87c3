"""Stand-ins for the engine, for t2ray's own tests and those of its users. Standard library only.

They satisfy `core.Generate` and `core.Score`, so that strategies, the few-shot search, evaluation and rollouts run in a
unit test without a model. The test decides what they answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from t2ray.core import Completion, FinishReason, Message, Mixture, Prompt, SamplingParams, Token

END = 256  # the token id that follows the UTF-8 bytes of a text


class FakeGenerate:
    """Answers from a dictionary (text of the last message -> answer) or a function (prompt, mixture) -> answer.

    The tokens are the UTF-8 bytes of the text and an end token, each with log-probability -0.5; `max_tokens` and
    `stop` work as in the engine. `calls` records every request in order. `peak` is the largest number of requests that
    were awaited together, which an engine would have put into one batch.

    >>> generate = FakeGenerate({"17+25": "42"})
    """

    def __init__(self, answer: Mapping[str, str] | Callable[[Prompt, Mixture], str]) -> None:
        self._answer = answer
        self._waiting = 0
        self.calls: list[tuple[Prompt, Mixture, SamplingParams]] = []
        self.peak = 0

    async def __call__(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        self.calls.append((prompt, mixture, sampling))
        self._waiting += 1
        self.peak = max(self.peak, self._waiting)
        await asyncio.sleep(0)  # lets all requests of a gather begin before the first one ends
        self._waiting -= 1
        answer = self._answer
        text = answer(prompt, mixture) if callable(answer) else answer[_text(prompt, -1)]
        for stop in sampling.stop:
            text = text.partition(stop)[0]
        token_ids = (*text.encode(), END)
        finish_reason: FinishReason = "stop"
        if len(token_ids) > sampling.max_tokens:
            token_ids, finish_reason = token_ids[: sampling.max_tokens], "length"
            text = bytes(token_ids).decode(errors="ignore")
        return Completion(
            prompt_ids=tuple(_text(prompt).encode()),
            tokens=tuple(Token(id=id, text=chr(id), logprob=-0.5) for id in token_ids),
            text=text,
            finish_reason=finish_reason,
            mixture=mixture,
        )


class FakeScore:
    """Log-likelihoods from a function (prompt, label, mixture) -> float; `calls` records every request in order.

    >>> score = FakeScore(lambda prompt, label, mixture: 0.0 if label in prompt[-1].content else -9.0)
    """

    def __init__(self, log_likelihood: Callable[[Prompt, str, Mixture], float]) -> None:
        self._log_likelihood = log_likelihood
        self.calls: list[tuple[Prompt, tuple[str, ...], Mixture]] = []

    async def __call__(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        self.calls.append((prompt, labels, mixture))
        return tuple(self._log_likelihood(prompt, label, mixture) for label in labels)


def _text(prompt: Prompt, first: int = 0) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(part.text if isinstance(part, Message) else str(part) for part in prompt[first:])
