"""Stand-ins for the engine, for t2ray's own tests and those of its users. Standard library only.

They satisfy `core.Generate` and `core.Score`, so that strategies, the few-shot search, evaluation and rollouts run in a
unit test without a model. The test decides what they answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Literal

from t2ray.core import Completion, Message, Mixture, SamplingParams

END = 256  # the token id that follows the UTF-8 bytes of a text


class FakeGenerate:
    """Answers from a dictionary (last message -> text) or a function (messages, mixture) -> text.

    The tokens are the UTF-8 bytes of the text and an end token, each with log-probability -0.5; `max_tokens` and
    `stop` work as in the engine. `calls` records every request in order. `peak` is the largest number of requests that
    were awaited together, which an engine would have put into one batch.

    >>> generate = FakeGenerate({"17+25": "42"})
    """

    def __init__(self, answer: Mapping[str, str] | Callable[[tuple[Message, ...], Mixture], str]) -> None:
        self._answer = answer
        self._waiting = 0
        self.calls: list[tuple[tuple[Message, ...], Mixture, SamplingParams]] = []
        self.peak = 0

    async def __call__(self, messages: tuple[Message, ...], mixture: Mixture, sampling: SamplingParams) -> Completion:
        self.calls.append((messages, mixture, sampling))
        self._waiting += 1
        self.peak = max(self.peak, self._waiting)
        await asyncio.sleep(0)  # lets all requests of a gather begin before the first one ends
        self._waiting -= 1
        answer = self._answer
        text = answer(messages, mixture) if callable(answer) else answer[messages[-1].content]
        for stop in sampling.stop:
            text = text.partition(stop)[0]
        token_ids = (*text.encode(), END)
        finish_reason: Literal["stop", "length"] = "stop"
        if len(token_ids) > sampling.max_tokens:
            token_ids, finish_reason = token_ids[: sampling.max_tokens], "length"
            text = bytes(token_ids).decode(errors="ignore")
        return Completion(
            prompt_ids=tuple("\n".join(m.content for m in messages).encode()),
            token_ids=token_ids,
            logprobs=(-0.5,) * len(token_ids),
            text=text,
            finish_reason=finish_reason,
            mixture=mixture,
        )


class FakeScore:
    """Scores by a function (messages, label, mixture) -> log-likelihood; `calls` records every request in order.

    >>> score = FakeScore(lambda messages, label, mixture: 0.0 if label in messages[-1].content else -9.0)
    """

    def __init__(self, log_likelihood: Callable[[tuple[Message, ...], str, Mixture], float]) -> None:
        self._log_likelihood = log_likelihood
        self.calls: list[tuple[tuple[Message, ...], tuple[str, ...], Mixture]] = []

    async def __call__(
        self, messages: tuple[Message, ...], labels: tuple[str, ...], mixture: Mixture
    ) -> tuple[float, ...]:
        self.calls.append((messages, labels, mixture))
        return tuple(self._log_likelihood(messages, label, mixture) for label in labels)
