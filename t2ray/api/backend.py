"""What the API needs of its backend, which is Ray Serve's handles, or a fake in a test. No ray, fastapi or torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from t2ray.adapt.strategies import Dispatch
from t2ray.core import Completion, Delta, Message, Mixture, Prompt, SamplingParams, Token
from t2ray.experts.heatmap import HeatMap


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertInfo:
    """An expert of the registry: `ExpertInfo(name="math", version=3, domain="math", accuracy=0.93)`.

    `accuracy` is the greedy validation accuracy in 0..1, or None if it is not known. `created` is an ISO 8601 time.
    `labels` are those that a classification expert tells apart, in its order. `problem` says why the expert cannot be
    used, or is None; `version` is 0 if not even its manifest can be read.
    """

    name: str
    version: int
    domain: str | None = None
    accuracy: float | None = None
    created: str = ""
    classifies: bool = False
    labels: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def answers(self) -> bool:
        """Whether it answers requests when it is not damaged, as far as is known."""
        return self.version > 0 and not self.classifies


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What clients can ask for now.

    `base` is the base model's name, `default` the strategy behind the model name `t2ray`. `strategies` are those that
    work with the present experts. `mixtures` holds the saved mixtures by name, `verifiers` the names that an adaptation
    may use. `context` is the most tokens that a prompt and its answer may have together. `tools` is how the chat
    template has calls of functions written (`Chat.tools`), `thinks` whether it knows of reasoning. `problems` says what
    is wrong in the registry, by the names of experts that cannot be used and the paths of other entries; "." is all.
    """

    base: str
    default: Literal["cls", "prompt", "base"]
    strategies: tuple[str, ...]
    experts: Mapping[str, ExpertInfo]
    mixtures: Mapping[str, Mixture]
    verifiers: tuple[str, ...]
    context: int
    tools: str | None = None
    thinks: bool = False
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """A few-shot search and its state. Its mixture, once found, is the model `t2ray:fewshot/NAME`.

    `progress` is the share of rounds done, in 0..1; `accuracy` is that of the best mixture so far on the shots.
    """

    id: str
    name: str
    status: Literal["queued", "running", "succeeded", "failed"]
    progress: float = 0.0
    accuracy: float | None = None
    seconds: float = 0.0
    mixture: Mixture | None = None
    error: str | None = None
    created: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointLoad:
    """The endpoint's load now: `EndpointLoad(replicas=2, running=5, waiting=0, tokens_per_s=812.0, requests=1204)`.

    `requests` counts the requests finished since the replicas started, `aborted` those whose clients disconnected.
    `kv_used` is the used share of the cache of keys and values, in 0..1. `problems` are those of the registry.
    """

    replicas: int
    running: int
    waiting: int
    tokens_per_s: float
    requests: int
    aborted: int = 0
    kv_used: float = 0.0
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationRequest:
    """A few-shot search to start: `examples` are (messages, answer) pairs, `settings` overrides of `CEMConfig`."""

    name: str
    examples: Sequence[tuple[tuple[Message, ...], str]]
    verifier: str
    experts: tuple[str, ...] = ()
    max_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """What stands behind the API.

    All methods may raise `UnknownExpert` (404), `ConfigError`, `DataError`, `ExpertError` (400), `Busy` (429),
    `ResourceError` and `GenerationError` (503).
    """

    def catalog(self) -> Catalog:
        """Returns what clients can ask for. It is read from memory and at most a few seconds old."""
        ...

    async def dispatch(self, strategy: str, messages: tuple[Message, ...]) -> Dispatch:
        """Runs pass 1 by the strategy `prompt` or `cls`."""
        ...

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, /) -> Completion:
        """Returns the whole answer (`core.Generate`). Cancelling the call aborts the generation."""
        ...

    def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, /) -> AsyncIterator[Delta]:
        """Yields the answer piece by piece; the last delta has a finish reason. Closing the iterator aborts it."""
        ...

    async def read(self, prompt: Prompt, mixture: Mixture, top: int, /) -> tuple[Token, ...]:
        """Returns a prompt's own tokens with their log-probabilities, the first one's NaN, and the `top` likeliest."""
        ...

    async def heat(self, name: str) -> HeatMap:
        """Returns the mean of |z - 1| of an expert, per decoder layer and kind of matrix."""
        ...

    async def put_expert(self, name: str, data: bytes) -> int:
        """Saves a safetensors file with one z per target as the next version of an expert; returns the version."""
        ...

    async def delete_expert(self, name: str) -> None:
        """Deletes an expert with all its versions."""
        ...

    async def adapt(self, request: AdaptationRequest) -> Adaptation:
        """Starts a few-shot search in the background."""
        ...

    async def adaptation(self, id: str) -> Adaptation:
        """Returns the state of a search; raises `UnknownExpert` if there is no search of that id."""
        ...

    async def load(self) -> EndpointLoad:
        """Returns the load of all replicas together."""
        ...

    async def ready(self) -> None:
        """Returns if a short generation works, and raises otherwise."""
        ...

    async def metrics(self) -> str:
        """Returns all metrics in Prometheus' text format."""
        ...

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Records a metric: `observe("ttft_seconds", 0.04, strategy="cls")`."""
        ...
