"""vLLM's outputs as t2ray's: tokens with their texts and log-probabilities, deltas, and the scores of prompts.

Texts are made and stopped here, as in the other engines, so that all of them answer alike: vLLM gives token ids.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2ray.core import Delta, ExpertError, FinishReason, SamplingParams, Token
from t2ray.engine.loop import DELTAS_PER_S, LONGEST_GAP_S
from t2ray.engine.text import TextStream
from t2ray.models.chat import Chat

OVERFLOW = "this mixture's numbers overflow: the model's scores are not finite; use smaller weights"

Scores = Mapping[int, Any]
"""What vLLM says of one place: by token id, its `logprob`, and its `rank` among all from 1 on."""


@dataclass(slots=True, eq=False, kw_only=True)
class Answer:
    """An answer as it grows: vLLM's thread adds to `pieces`, its caller is woken by `woken`, from `due` on."""

    chat: Chat
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    text: TextStream
    loop: asyncio.AbstractEventLoop
    streams: bool
    pieces: deque[Delta] = field(default_factory=deque)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    due: float = 0.0
    length: int = 0
    ended: bool = False
    error: Exception | None = None

    def add(self, token_ids: Sequence[int], scores: Sequence[Scores]) -> int:
        """Takes new tokens up to the answer's end, and sets `ended` there; returns how many it took.

        Raises:
            ExpertError: a log-probability is not finite.
        """
        before = self.length
        for id, places in zip(token_ids, scores, strict=True):
            if self.ended:
                break
            self._add(id, places)
        return self.length - before

    def _add(self, id: int, places: Scores) -> None:
        logprob = float(places[id].logprob)
        if logprob != logprob:
            raise ExpertError(OVERFLOW)
        self.length += 1
        piece = self.text.push(id)
        stopped = self.text.stopped or (id in self.chat.eos_ids and not self.sampling.ignore_eos)
        reason: FinishReason | None = None
        if stopped or self.length == self.sampling.max_tokens:
            reason = "stop" if stopped else "length"
            piece += self.text.finish()
            self.ended = True
        top = likeliest(self.chat, places, self.sampling.top_logprobs)
        token = Token(id=id, text=self.text.added, logprob=logprob, raw=self.chat.token(id)[1], top=top)
        self.pieces.append(
            Delta(
                text=piece,
                tokens=(token,),
                prompt_tokens=len(self.prompt_ids),
                finish_reason=reason,
                thinking=self.length == 1 and self.chat.opens(self.prompt_ids),
            )
        )

    def is_due(self, streams: int) -> bool:
        """Whether its caller is to be woken now, beside so many `streams`: at its end, and in a stream at its pace."""
        if self.ended or self.error is not None:
            return True
        now = time.monotonic()
        if not self.streams or now < self.due:
            return False
        self.due = now + min(streams / DELTAS_PER_S, LONGEST_GAP_S)
        return True


def likeliest(chat: Chat, places: Scores, count: int) -> tuple[Token, ...]:
    """The `count` likeliest tokens of one place, each by itself."""
    best = sorted((score.rank, id, score.logprob) for id, score in places.items() if score.rank <= count)
    rows = [(id, logprob, *chat.token(id)) for _, id, logprob in best[:count]]
    return tuple(Token(id=id, text=text, logprob=logprob, raw=raw) for id, logprob, text, raw in rows)


def label_score(ids: Sequence[int], label: int, scores: Sequence[Scores | None]) -> float:
    """The log-likelihood of the last `label` tokens of `ids`, in nats."""
    places = zip(ids[-label:], scores[len(ids) - label : len(ids)], strict=True)
    return float(sum(place[id].logprob for id, place in places if place is not None))


def prompt_tokens(chat: Chat, ids: Sequence[int], scores: Sequence[Scores | None], top: int) -> tuple[Token, ...]:
    """The tokens of a prompt; see `Engine.read`."""
    stream, tokens = TextStream(chat, ()), list[Token]()
    for i, (id, places) in enumerate(zip(ids, scores, strict=True)):
        stream.push(id)
        if i + 1 == len(ids):
            stream.finish()
        logprob = float("nan") if places is None else float(places[id].logprob)
        best = () if places is None else likeliest(chat, places, top)
        tokens.append(Token(id=id, text=stream.added, logprob=logprob, raw=chat.token(id)[1], top=best))
    return tuple(tokens)
