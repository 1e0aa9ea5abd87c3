"""Text as it grows: tokens to text piece by piece, which stops at a request's stop strings.

Not here: which tokens. One `TextStream` an answer; called by the continuous engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from t2ray.models.chat import Chat


class TextStream:
    """The text of one answer. What `push` and `finish` return adds up to the decoded answer, cut at the first stop.

    Held back are bytes that are no character yet, and an end that may become a stop string. `added` is what the last
    token has added to the text, held back or not; `ids` are all tokens.
    The answer `continues` a text, or is a turn by itself.
    """

    def __init__(self, chat: Chat, stop: Sequence[str], *, continues: bool = False) -> None:
        self.stopped = False
        self.added = ""
        self._chat, self._stop = chat, stop
        self._continues = self._begun = continues
        self._decoder = DecodeStream(ids=chat.before, skip_special_tokens=True)
        self.ids: list[int] = []
        self._text = ""
        self._sent = 0

    def push(self, token_id: int) -> str:
        """What can be shown after one more token; sets `stopped` when the text now holds a stop string."""
        self.ids.append(token_id)
        self.added = self._chat.signs.get(token_id) or (
            self._decoder.step(self._chat.tokenizer.backend_tokenizer, token_id) or ""
        )
        if self.added and not self._begun:  # what the tokenizer strips where a text begins
            decode = self._chat.decode
            self.added = self.added[len(decode(self.ids, continues=True)) - len(decode(self.ids)) :]
            self._begun = True
        self._text += self.added
        self._cut()
        end = len(self._text) if self.stopped else len(self._text) - self._held()
        return self._take(end)

    def finish(self) -> str:
        """What was held back."""
        if not self.stopped:
            whole = self._chat.decode(self.ids, continues=self._continues)
            self.added += whole[len(self._text) :]
            self._text = self._text[: self._sent] + whole[self._sent :]
            self._cut()
        return self._take(len(self._text))

    def _cut(self) -> None:
        cuts = [at for stop in self._stop if (at := self._text.find(stop, self._sent)) >= 0]
        if cuts:
            self._text, self.stopped = self._text[: min(cuts)], True

    def _held(self) -> int:
        """The length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stop), default=0)
        unsent = self._text[self._sent :]
        sizes = range(min(len(unsent), longest - 1), 0, -1)
        return next((size for size in sizes if any(stop.startswith(unsent[-size:]) for stop in self._stop)), 0)

    def _take(self, end: int) -> str:
        piece, self._sent = self._text[self._sent : end], max(end, self._sent)
        return piece
