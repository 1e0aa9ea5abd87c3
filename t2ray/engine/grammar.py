"""Answers that follow a grammar: which tokens may come next, by llguidance, the extra `t2ray[structured]`. No torch.

A grammar is Lark as llguidance reads it; `start: %json {"type": "object"}` holds any JSON object (`following`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from t2ray.core import ConfigError
from t2ray.models.chat import Chat

KEPT = 64
"""Grammars whose compiled form is kept: a client asks with few schemas, and each takes milliseconds to compile."""

# As Python's `json` and chat templates write it: where any white space is allowed, small models write nothing else.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def following(schema: Mapping[str, Any]) -> str:
    """Returns a JSON schema as a piece of a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': SPACES})}"


@lru_cache(KEPT)
def check(grammar: str) -> None:
    """Checks that answers can be held to a grammar.

    Raises:
        ConfigError: it is wrong, or has what llguidance does not support, in its words; or that is not installed.
    """
    wrong, messages = _library().LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise ConfigError(_said(messages[0]))


class Guide:
    """What an answer may go on with, by the tokens that it has."""

    __slots__ = ("_ends", "_matcher")

    def __init__(self, matcher: Any, ends: bytes) -> None:
        self._matcher, self._ends = matcher, ends

    @property
    def allowed(self) -> bytes:
        """A byte per token of the vocabulary, 0 where it may not come next; behind a whole answer, but end tokens."""
        return self._ends if self._matcher.is_stopped() else bytes(self._matcher.compute_logit_bias())

    @property
    def error(self) -> str:
        """Why the answer can no longer be held to the grammar, or nothing."""
        return _said(self._matcher.get_error()) if self._matcher.is_error() else ""

    def push(self, token: int) -> None:
        """Goes on by a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Guides:
    """The guides of one model's answers; `vocabulary` is the number of its scores."""

    def __init__(self, chat: Chat, vocabulary: int) -> None:
        self._chat, self._vocabulary = chat, vocabulary
        self._tokenizer: Any = None
        self._compiled = lru_cache(KEPT)(self._compile)

    def guide(self, grammar: str) -> Guide:
        """Returns the guide of an answer that begins.

        Raises:
            ConfigError: as `check`.
        """
        ends = bytearray(self._vocabulary)
        for id in self._chat.eos_ids:
            ends[id] = 1
        return Guide(self._compiled(grammar).deep_copy(), bytes(ends))

    def _compile(self, grammar: str) -> Any:
        library = _library()
        if self._tokenizer is None:
            backend = self._chat.tokenizer.backend_tokenizer
            self._tokenizer = library.LLTokenizer(
                backend.to_str(), n_vocab=self._vocabulary, eos_token=list(self._chat.eos_ids)
            )
        matcher = library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(_said(matcher.get_error()))
        return matcher


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        message = "this needs llguidance, which is not installed here; pip install 't2ray[structured]'"
        raise ConfigError(message) from None
    return llguidance


def _said(error: str) -> str:
    return f"the grammar cannot be followed: {' '.join(error.partition('<state>')[0].split())[:300]}"
