"""Messages to token ids and back: the only place where text is tokenised.

Not here: what the ids are for. `model` makes a `Chat`, the engine uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2ray.core import Message, Prompt


class Chat:
    """A model's tokenizer with its chat template.

    A model without a template continues plain text: the contents of the messages, one after the other.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self._tokens: dict[int, str] = {}
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a conversation up to where the answer begins, or of a text that is continued as it stands."""
        return self.encode_text(prompt) if isinstance(prompt, str) else self.encode(prompt)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt's ids, up to where the assistant's answer begins."""
        if not self.tokenizer.chat_template:
            return self.encode_text("".join(m.content for m in messages))
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return tuple(
            self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of a text to continue as it stands, begun as the tokenizer begins texts."""
        return tuple(self.tokenizer(text)["input_ids"])

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """An answer's ids; with a chat template the end of the turn counts as part of it."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids + self.eos_ids[:1] if self.tokenizer.chat_template else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def token(self, id: int) -> str:
        """The text of one token by itself, special tokens with their names."""
        if id not in self._tokens:
            self._tokens[id] = str(self.tokenizer.decode([id]))
        return self._tokens[id]
