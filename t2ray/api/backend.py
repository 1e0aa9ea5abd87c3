"""What the API asks of whatever stands behind it: Ray Serve handles, or a fake in a test. No ray, fastapi or torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from t2ray.adapt.strategies import Dispatch
from t2ray.core import Delta, Message, Mixture, Prompt, SamplingParams
from t2ray.experts.heatmap import HeatMap


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertInfo:
    """An expert as the registry has it; `problem` says why it cannot be used, or is None.

    `ExpertInfo(name="math", version=3, domain="math", accuracy=0.93, created="2026-11-21T10:00:00+00:00",
    labels=(), problem=None)`. `accuracy` is the greedy validation accuracy in 0..1, where it is known. A classification
    expert has the `labels` that it tells apart, in its order.
    """

    name: str
    version: int
    domain: str | None = None
    accuracy: float | None = None
    created: str = ""
    classifies: bool = False
    labels: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What can be asked for now.

    `base` is the base model's name, `default` the strategy behind the model name `t2ray`, `strategies` those that work
    with the experts there are, `mixtures` the saved ones by name, `verifiers` what an adaptation may name, `context`
    the tokens that prompt and answer may have together.
    """

    base: str
    default: Literal["cls", "prompt", "base"]
    strategies: tuple[str, ...]
    experts: Mapping[str, ExpertInfo]
    mixtures: Mapping[str, Mixture]
    verifiers: tuple[str, ...]
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """A few-shot search: where it stands, and in the end its mixture, usable as `t2ray:fewshot/NAME`.

    `progress` is the share of rounds done in 0..1, `accuracy` that of the best member so far on the shots.
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

    `requests` counts those that were finished since the replicas started, `aborted` those whose clients went; `kv_used`
    is a share in 0..1.
    """

    replicas: int
    running: int
    waiting: int
    tokens_per_s: float
    requests: int
    aborted: int = 0
    kv_used: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationRequest:
    """`examples`: (messages, answer) pairs; `verifier` one of the catalog's; `settings` overrides of `CEMConfig`."""

    name: str
    examples: Sequence[tuple[tuple[Message, ...], str]]
    verifier: str
    experts: tuple[str, ...] = ()
    max_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Raises, in all methods: `UnknownExpert` (404), `ConfigError`, `DataError`, `ExpertError` (400), `Busy` (429),
    `ResourceError`, `GenerationError` (503)."""

    def catalog(self) -> Catalog:
        """What there is now; from memory, at most a few seconds old."""
        ...

    async def dispatch(self, strategy: str, messages: tuple[Message, ...]) -> Dispatch:
        """Pass 1 by `prompt` or `cls`."""
        ...

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, request_id: str) -> Delta:
        """The whole answer as one delta. Cancelling the call aborts the generation."""
        ...

    def stream(
        self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, request_id: str
    ) -> AsyncIterator[Delta]:
        """The answer piece by piece; the last delta has a finish reason. Closing the iterator aborts the generation."""
        ...

    async def heat(self, name: str) -> HeatMap:
        """The mean of |z - 1| of an expert, per decoder layer and kind of matrix."""
        ...

    async def put_expert(self, name: str, data: bytes) -> int:
        """Saves a safetensors file `{target: z}` as the next version of an expert; the version."""
        ...

    async def delete_expert(self, name: str) -> None:
        """Deletes an expert with all its versions."""
        ...

    async def adapt(self, request: AdaptationRequest) -> Adaptation:
        """Starts a few-shot search in the background."""
        ...

    async def adaptation(self, id: str) -> Adaptation:
        """Where a search stands; `UnknownExpert` for an id that there is not."""
        ...

    async def load(self) -> EndpointLoad:
        """The load of all replicas together."""
        ...

    async def ready(self) -> None:
        """Returns when a short generation works; else raises."""
        ...

    async def metrics(self) -> str:
        """All metrics in Prometheus' text format."""
        ...

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Records a metric: `observe("ttft_seconds", 0.04, strategy="cls")`."""
        ...
