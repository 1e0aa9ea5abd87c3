"""Reasoning apart from the answer: the block that an answer of a thinking model begins with, `<think>...</think>`."""

from __future__ import annotations

from collections.abc import Iterable

from t2ray.core import Token
from t2ray.grades import THINK, THOUGHTS


class ReasoningReader:
    """Parts a text that grows into the reasoning that it begins with, if it `thinks`, and the answer.

    Line breaks within the block's tags and behind it belong to neither, as chat templates write it. Reasoning that is
    never closed goes on to the end.
    """

    def __init__(self, thinks: bool) -> None:
        self._part = "start" if thinks else "answer"
        self._held = self._end = ""
        self._fresh = False  # where line breaks are dropped

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Returns the reasoning and the answer that can be shown after some more text."""
        self._held += text
        if self._part == "start":
            begun = self._held.lstrip()
            if opened := next((sign for sign in THOUGHTS if begun.startswith(sign)), None):
                self._end = THOUGHTS[opened]
                self._begin("reasoning", begun.removeprefix(opened))
            elif last or not any(sign.startswith(begun) for sign in THOUGHTS):
                self._part = "answer"
            else:
                return "", ""
        thought = self._thought(last) if self._part == "reasoning" else ""
        return thought, self._take(len(self._held)) if self._part == "answer" else ""

    @property
    def reasons(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._part == "reasoning"

    def _begin(self, part: str, held: str) -> None:
        self._part, self._held, self._fresh = part, held, True

    def _thought(self, last: bool) -> str:
        inside, end, after = self._held.partition(self._end)
        if end:
            self._held = inside
            thought = self._take(len(inside.rstrip("\n")))
            self._begin("answer", after)
            return thought
        keep = 0 if last else beginning(inside, self._end)
        return self._take(len(inside[: len(inside) - keep].rstrip("\n")))

    def _take(self, end: int) -> str:
        taken, self._held = self._held[:end], self._held[end:]
        if self._fresh:
            taken = taken.lstrip("\n")
            self._fresh = not taken
        return taken


class ThoughtCounter:
    """Counts the tokens of an answer's reasoning, the block's tags among them, as the answer grows."""

    def __init__(self, thinks: bool) -> None:
        self.count = 0
        self._reader, self._tokens = ReasoningReader(thinks), 0

    def push(self, tokens: Iterable[Token], *, thinking: bool = False) -> int:
        """Returns the count after some more tokens; `thinking` is `Delta.thinking`."""
        if thinking:
            self._reader.push(THINK)
        for token in tokens:
            self._tokens += 1
            before = self._reader.reasons
            self._reader.push(token.text)
            if before or self._reader.reasons:
                self.count = self._tokens
        return self.count


def beginning(text: str, sign: str) -> int:
    """The length of the longest end of `text` that begins `sign`."""
    return next((n for n in range(min(len(sign) - 1, len(text)), 0, -1) if sign.startswith(text[-n:])), 0)
