"""Prompts to token ids, and token ids to text: the only place where a loaded model's tokenizer is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from t2ray.core import ConfigError, Message, Prompt


class Chat:
    """A model's tokenizer with its chat template.

    A model without a template gets a conversation as plain text: the contents of the messages, one after the other.
    `eos_ids` are the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self._tokens: dict[int, str] = {}
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Returns the ids of a conversation up to where the answer begins, or of a text to continue as it stands."""
        return self.encode_text(prompt) if isinstance(prompt, str) else self.encode(prompt)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Returns the ids of a conversation, up to where the assistant's answer begins.

        Raises:
            ConfigError: the model's chat template refuses the conversation, in its own words.
        """
        if not self.tokenizer.chat_template:
            return self.encode_text("".join(m.content for m in messages))
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return tuple(
                self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
            )
        except TemplateError as error:
            roles = ", ".join(m.role for m in messages[:8]) + (", ..." if len(messages) > 8 else "")
            raise ConfigError(
                f"the model's chat template refuses this conversation ({roles}): {' '.join(str(error).split())[:500]}"
            ) from error

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a text to continue as it stands, with the tokens that the tokenizer begins texts with."""
        return tuple(self.tokenizer(text)["input_ids"])

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Returns the ids of an answer; with a chat template, the token that ends the turn is the last of them."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids + self.eos_ids[:1] if self.tokenizer.chat_template else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def token(self, id: int) -> str:
        """Returns the text of one token by itself; of a special token, its name."""
        if id not in self._tokens:
            self._tokens[id] = str(self.tokenizer.decode([id]))
        return self._tokens[id]
