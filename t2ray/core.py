"""The nouns that the whole program passes around, and its errors. Standard library only.

Every record is frozen, slotted and keyword-only, and crosses processes as it is; tensors never do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

__version__ = "0.1.0"


class T2RayError(Exception):
    """The root of every error that t2ray raises for a mistake that a user can mend.

    No error has an own __init__: Ray must be able to unpickle it on the driver.
    """

    def __str__(self) -> str:  # KeyError would print its message in quotes
        return str(self.args[0]) if self.args else ""


class ConfigError(T2RayError, ValueError):
    """A key, value or file that the user wrote is wrong."""


class ContextExceeded(ConfigError):
    """A prompt and its answer are too long together; `args[1:]` are the tokens of the two and of the context."""


class DataError(T2RayError, ValueError):
    """A data file or one of its rows is missing, malformed or mistyped; names the file and the line."""


class UnknownExpert(T2RayError, KeyError):
    """No expert or mixture of that name exists."""


class ExpertError(T2RayError, ValueError):
    """An expert that cannot be used: made for another base, of another shape, not finite."""


class ModelError(T2RayError, ValueError):
    """A model folder that cannot be read."""


class RewardError(T2RayError, RuntimeError):
    """A reward function that raised, called sys.exit, ended its process or returned no number in [-1, 1]."""


class ResourceError(T2RayError, RuntimeError):
    """The cluster, the disk or the sandbox lacks what the job needs."""


class Busy(ResourceError):
    """What the request needs is there but fully used; it succeeds when it is sent again later."""


class GenerationError(T2RayError, RuntimeError):
    """A generation that began and could not be finished: its replica died, or its engine stopped."""


class RunError(T2RayError, RuntimeError):
    """A run folder that cannot be started or resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A picture in a message: the bytes of a PNG, JPEG, WebP or GIF file; or the path of one, read when it is used."""

    data: bytes = field(default=b"", repr=False)
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat: `Message(role="user", content="17+25")`, a text or its parts with pictures between them; or
    the `tools` on offer, as a JSON list, or what the chat `template` gets besides, as a JSON object. `calls` is the
    JSON list of the functions that it calls, `call_id` the call whose result a `tool` turn has, `reasoning` what an
    assistant's turn has thought before its content."""

    role: Literal["system", "user", "assistant", "tool", "tools", "template"]
    content: str | tuple[str | Image, ...]
    calls: str = ""
    call_id: str = ""
    reasoning: str = ""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p for p in self.content if isinstance(p, str))

    @property
    def images(self) -> tuple[Image, ...]:
        return () if isinstance(self.content, str) else tuple(part for part in self.content if isinstance(part, Image))


Prompt = tuple[Message, ...] | str | tuple[int, ...]
"""A conversation that the model's chat template formats, or a text to continue as it stands, also as token ids."""

FinishReason = Literal["stop", "length"]
"""Why an answer ended: at an end token or a stop string, or at `max_tokens`."""


def user(content: str | tuple[str | Image, ...]) -> tuple[Message, ...]:
    """A conversation of one user turn, which is what nearly every prompt is."""
    return (Message(role="user", content=content),)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt: `SamplingParams(max_tokens=32, temperature=1.0, seed=7)`.

    `temperature=0` is greedy. Penalties (by the answer so far) and `logit_bias` change the logits; then `top_k` (0:
    all), `min_p` (a share of the likeliest token's) and `top_p` cut off what is unlikely. With a `seed`, the text
    depends on prompt, mixture and seed alone, whatever else is in the batch. `ignore_eos` goes on past the model's end
    token, up to `max_tokens`, for load tests. The continuous engine records `top_logprobs` of the likeliest tokens
    beside each chosen one. With `to_end`, `max_tokens` is lowered to the context's room. It follows a `grammar`.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    to_end: bool = False
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("max_tokens", self.max_tokens >= 1, "be at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "be 0 (greedy) or a positive number"),
            ("top_p", 0.0 < self.top_p <= 1.0, "lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "be at least 1, or 0 for all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "lie in 0..1"),
            ("presence_penalty", abs(self.presence_penalty) <= 2.0, "lie in -2..2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2.0, "lie in -2..2"),
            ("logit_bias", all(id >= 0 and abs(b) <= 100.0 for id, b in self.logit_bias), "be ids and -100..100"),
            ("top_logprobs", 0 <= self.top_logprobs <= 20, "lie in 0..20"),
        ):
            if not fine:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must {rule}")


NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def check_name(name: str, what: str = "expert") -> str:
    """Returns a name that an expert, a mixture or a run may have, and a folder anywhere; else raises ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be this {what}'s name: use 1 to 63 of a-z, 0-9, '.', '_', '-', first a letter or digit"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Experts and weights: `z' = 1 + sum_k alpha_k (z_k - 1)`; the base holds what they leave (paper section 3.2).

    `Mixture.parse("math:0.7,code:0.3")` holds `weights=(("code", (0.3,)), ("math", (0.7,)))`: sorted by name, without
    zeros. A weight is one number, or one number for each decoder layer.
    """

    weights: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @classmethod
    def base(cls) -> Mixture:
        """The base model: no expert."""
        return cls()

    @classmethod
    def of(cls, weights: Mapping[str, float | Sequence[float]]) -> Mixture:
        """From `{"math": 0.7}`, or `{"math": [0.7, 0.2, ...]}` with a weight per layer.

        Raises:
            ConfigError: a name that no expert can have, or a weight that is not a finite number.
        """
        rows = []
        for name, weight in weights.items():
            check_name(name)
            alpha = tuple(float(w) for w in (weight if isinstance(weight, Sequence) else (weight,)))
            if not alpha or any(w != w or abs(w) == float("inf") for w in alpha):
                raise ConfigError(f"the weight of expert {name!r} is {weight!r}; it must be a finite number")
            if any(w != 0.0 for w in alpha):
                rows.append((name, alpha))
        return cls(weights=tuple(sorted(rows)))

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """From `"math"`, `"math:0.7,code:0.3"` or `"base"`.

        Raises:
            ConfigError: text that is no list of `name` or `name:weight`, or that names an expert twice.
        """
        if text == "base":
            return cls.base()
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, colon, weight = part.strip().partition(":")
            if name in weights:
                raise ConfigError(f"mixture {text!r} names the expert {name!r} twice")
            try:
                weights[name] = float(weight) if colon else 1.0
            except ValueError:
                raise ConfigError(f"mixture {text!r}: {weight!r} is not a number; write name:weight, ...") from None
        return cls.of(weights)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.weights)

    def __str__(self) -> str:
        return ",".join(f"{name}:{'/'.join(f'{w:.3g}' for w in alpha)}" for name, alpha in self.weights) or "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One sampled token: `Token(id=30, text="42", logprob=-0.1, top=(Token(id=30, ...), ...))`.

    `text` is what it adds to the answer: of a character in several tokens, the last has all of it. `raw` are its bytes
    where they are not the text's. `logprob` is the model's own, in nats, at temperature 1, except in rollouts by vLLM,
    where it is the sampler's, at the sampling temperature. `top` holds the likeliest tokens where they were asked for.
    """

    id: int
    text: str
    logprob: float
    raw: bytes = b""
    top: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One generated answer. `tokens` are the sampled ones, a sampled end token included; the loss uses their ids. With
    `thinking` the prompt ends with `<think>`, so that the text begins with reasoning."""

    prompt_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason
    mixture: Mixture
    thinking: bool = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The log-probability of each token in nats; see `Token`."""
        return tuple(token.logprob for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a stream adds to an answer; a possible beginning of a stop string is held back from `text`. `thinking` is
    said of the first piece."""

    text: str
    tokens: tuple[Token, ...] = ()
    prompt_tokens: int = 0
    finish_reason: FinishReason | None = None
    thinking: bool = False


def joined(deltas: Sequence[Delta]) -> Delta:
    """Several deltas that follow one another as one."""
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return replace(deltas[-1], text="".join(delta.text for delta in deltas), tokens=tokens, thinking=deltas[0].thinking)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of a task: `Example(id="gsm8k/train/17", messages=user("Natalia ..."), row={"answer": "#### 72"})`."""

    id: str
    messages: tuple[Message, ...]
    row: Mapping[str, Any] = field(repr=False)


class Generate(Protocol):
    """Answers a prompt with a mixture, as engines and `FakeGenerate` do; calls awaited together share a batch."""

    async def __call__(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, /) -> Completion: ...


class Score(Protocol):
    """The log-likelihood of each of `labels` as the continuation of a prompt, in nats, summed over a label's tokens."""

    async def __call__(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture, /) -> tuple[float, ...]: ...
