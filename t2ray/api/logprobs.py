"""The log-probabilities of an answer's tokens, as OpenAI's two kinds of completion show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t2ray.core import Token

LOWEST = -9999.0  # least log-probability shown, as in OpenAI's API: JSON has no -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    """One of the likeliest tokens at a place, with its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A chosen token with its log-probability in nats, and the likeliest tokens at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLogprobs:
    """The log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLogprobs:
    """The log-probabilities of a text answer's tokens, as columns of equal length; `text_offset` is in characters.

    The first token of an echoed prompt has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    """Those of a chat answer."""

    def row(token: Token) -> dict[str, Any]:
        bytes_ = list(token.raw or token.text.encode())
        return {"token": token.text, "logprob": max(token.logprob, LOWEST), "bytes": bytes_}

    return ChatLogprobs(
        content=[
            TokenLogprob(**row(token), top_logprobs=[TopLogprob(**row(top)) for top in token.top]) for token in tokens
        ]
    )


def text_logprobs(tokens: Sequence[Token], offset: int) -> TextLogprobs:
    """Those of a text answer, of which `offset` characters of tokens were sent before."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[None if math.isnan(token.logprob) else max(token.logprob, LOWEST) for token in tokens],
        top_logprobs=[None if math.isnan(token.logprob) else _alternatives(token.top) for token in tokens],
        text_offset=offsets,
    )


def _alternatives(top: Sequence[Token]) -> dict[str, float]:
    """Log-probabilities by texts; a token without a text of its own goes by its bytes or, at last, by its id."""
    found: dict[str, float] = {}
    for token in top:
        names = [token.text] if not token.raw else []
        names += ["bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw or token.text.encode())]
        name = next((name for name in names if name not in found), f"token:{token.id}")
        found[name] = max(token.logprob, LOWEST)
    return found
