"""What an engine is: it answers prompts, each with a mixture of its own; requests of different mixtures share a batch.

`offline` computes what is awaited together in static batches, `online` lets requests come and go. Whoever holds an
engine asks it for no more than this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from t2ray.core import Completion, Delta, Mixture, Prompt, SamplingParams, Token
from t2ray.models.chat import Chat
from t2ray.models.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts since the start, and how things are now.

    `running` and `waiting` are requests, `rows` and `mixtures` the last step's. `kv_free` and `kv_total` are bytes of
    the cache of keys and values. `idle_s` are the seconds since the engine last did anything.
    """

    running: int
    waiting: int
    rows: int
    mixtures: int
    steps: int
    tokens: int
    finished: int
    aborted: int
    failed: int
    folds: int
    kv_free: int
    kv_total: int
    idle_s: float


class Engine(Protocol):
    """An engine of one model.

    `layout` names the adapted matrices, `base_digest` the weights, `context` is the number of tokens that a prompt and
    its answer may have together, `chat` makes ids of a prompt, and `experts` are the names that a mixture may use.
    """

    layout: tuple[Target, ...]
    base_digest: str
    context: int
    chat: Chat

    @property
    def experts(self) -> Collection[str]: ...
    @property
    def stats(self) -> EngineStats: ...

    def start(self) -> None:
        """Takes what it needs to answer."""
        ...

    def stop(self) -> None:
        """Gives it back; what is still running fails."""
        ...

    def check(self) -> None:
        """Raises GenerationError when the engine can no longer answer."""
        ...

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether a prompt and an answer of `max_tokens` fit the model's context."""
        ...

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """Adds or replaces experts, each (P,), float32, and forgets others. Requests that run keep what they had."""
        ...

    def vector(self, mixture: Mixture) -> Tensor:
        """The vector of a mixture, (P,); raises as `generate` does."""
        ...

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, /) -> Completion:
        """The whole answer. A call that is cancelled ends its generation.

        Raises:
            ContextExceeded: prompt and answer do not fit the model's context, or the cache.
            ConfigError: the prompt is empty, or the model's chat template refuses it.
            UnknownExpert: the mixture names an expert that the engine does not have.
            ExpertError: the mixture's numbers overflow.
            GenerationError: the engine stopped.
        """
        ...

    def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, /) -> AsyncIterator[Delta]:
        """The answer as it grows; raises as `generate` does. Closing the iterator ends the generation."""
        ...

    async def read(self, prompt: Prompt, mixture: Mixture, top: int, /) -> tuple[Token, ...]:
        """The tokens of a prompt, each with its log-probability after those before it, which the first has none of
        (NaN), and the `top` likeliest in its place. Raises as `generate` does."""
        ...

    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture, /) -> tuple[float, ...]:
        """See `core.Score`; raises as `generate` does."""
        ...
