"""Prompts to token ids, and token ids to text: the only place where a loaded model's tokenizer is used."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from functools import lru_cache
from inspect import signature
from typing import Any

from jinja2 import TemplateError

from t2ray.core import ConfigError, Message, Prompt
from t2ray.grades import THOUGHTS
from t2ray.models.processor import Processor, Seen
from t2ray.prompts import pictured

SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTES = {chr(byte): byte for byte in SHOWN} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}
"""The characters that stand for bytes in a byte-level vocabulary, as GPT-2 introduced them."""

SIGNS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", *THOUGHTS, *THOUGHTS.values())
"""Tokens that are part of the text even if they are special: by them alone are calls and reasoning told from it."""

OPENING = 16
"""Tokens at a prompt's end in which its template may have opened the answer's reasoning."""

WRITTEN = {
    "xml": r"<tool_call>(?s:.*)<function=|<function=(?s:.*)<tool_call>",
    "hermes": "<tool_call>",
    "mistral": re.escape("[TOOL_CALLS]"),
    "python": r"\[\w+\(\w+=\w+",
    "llama": r'"name":[^{}]*"parameters":',
}
"""Styles in which templates have calls of functions written, and how a template that writes one looks."""

_ANSWER = "an answer that no template writes"
_KEPT = 16  # conversations whose pictures are kept as the model gets them: samples of one prompt come together


class Chat:
    """A model's tokenizer with its chat template.

    A model without a template gets a conversation as plain text: the contents of the messages, one after the other.
    `eos_ids` are the tokens that end an answer. `template` is what the chat template gets besides the conversation,
    such as `{"enable_thinking": False}`. `processor` is the model's for pictures, if it takes any; if not, `blind` says
    why.
    """

    def __init__(
        self, tokenizer: Any, eos_ids: Sequence[int], processor: Processor | None = None, blind: str = ""
    ) -> None:
        self.tokenizer, self.processor, self.blind = tokenizer, processor, blind or "it has no part that sees"
        self.template: dict[str, Any] = {}
        self._in_parts = self._reads_parts_alone()
        self._seeing = lru_cache(_KEPT)(self._see)
        self.eos_ids = tuple(eos_ids)
        self.end_id = self._end_of_turn()
        if self.end_id not in self.eos_ids:
            self.eos_ids += (self.end_id,)
        self.signs: dict[int, str] = {
            id: token.content for id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content in SIGNS
        }  # fmt: skip
        self._tokens: dict[int, tuple[str, bytes]] = {}
        # Some tokenizers strip the space that a text begins with: a text that goes on is decoded behind this one.
        self.before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._cut = len(tokenizer.decode(self.before))
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Returns the ids of a conversation up to where the answer begins, or of a text to continue as it stands.

        Raises:
            ConfigError: as `encode`; or there are pictures, and the model takes none, or not these.
        """
        if messages := pictured(prompt):
            return self._seeing(messages)[0]
        if isinstance(prompt, str):
            ids = self.encode_text(prompt)
        else:
            ids = tuple(id for id in prompt if isinstance(id, int))
            ids = ids or self.encode([message for message in prompt if isinstance(message, Message)])
        if self.processor and not self.processor.places.isdisjoint(ids):
            raise ConfigError(f"the prompt says {self.processor.mark!r}, the model's mark of a picture; leave it out")
        return ids

    def seen(self, messages: tuple[Message, ...]) -> Seen:
        """Returns what the model gets of a conversation's pictures besides ids; raises as `ids` does."""
        return self._seeing(messages)[1] if messages else {}

    def _see(self, messages: tuple[Message, ...]) -> tuple[tuple[int, ...], Seen]:
        if self.processor is None:
            raise ConfigError(f"this model takes no pictures: {self.blind}; send text alone")
        mark = self.processor.mark
        if any(mark in message.text for message in messages):
            raise ConfigError(f"a message says {mark!r}, the model's mark of a picture; leave it out")
        images = [image for message in messages for image in message.images]
        if self.tokenizer.chat_template:
            text = self._filled(messages, tokenize=False)
        else:
            contents = [message.content for message in messages if message.role not in ("tools", "template")]
            parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
            text = "".join(part if isinstance(part, str) else mark for part in parts)
        if text.count(mark) != len(images):
            raise ConfigError(
                f"the model's chat template writes {text.count(mark)} marks {mark!r} for {len(images)} pictures; it "
                "needs a template that knows pictures"
            )
        return self.processor.read(text, images, add_special_tokens=not self.tokenizer.chat_template)

    def continues(self, prompt: Prompt) -> bool:
        """Whether an answer goes on with a text, as it does unless the prompt is a conversation."""
        return isinstance(prompt, str) or not all(isinstance(message, Message) for message in prompt)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Returns the ids of a conversation, up to where the assistant's answer begins.

        Raises:
            ConfigError: the model's chat template refuses the conversation, in its own words, or it was given what
                is not for it to have.
        """
        if not self.tokenizer.chat_template:
            return self.encode_text("".join(m.text for m in messages if m.role not in ("tools", "template")))
        return tuple(self._filled(messages, tokenize=True))

    def _filled(self, messages: Sequence[Message], *, tokenize: bool) -> Any:
        """The chat template of a conversation, as ids or as a text; raises as `encode` does."""
        turns = [m for m in messages if m.role not in ("tools", "template")]
        tools = [tool for m in messages if m.role == "tools" for tool in json.loads(m.text)]
        template = self._given(messages)
        try:
            return self.tokenizer.apply_chat_template(
                _turns(turns, self._in_parts),
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=False,
                **template,
            )
        except TemplateError as error:
            roles = ", ".join(m.role for m in messages[:8]) + (", ..." if len(messages) > 8 else "")
            raise ConfigError(
                f"the model's chat template refuses this conversation ({roles}): {' '.join(str(error).split())[:500]}"
            ) from error

    @property
    def tools(self) -> str | None:
        """How the chat template has calls of functions written, by a name of `WRITTEN`; None in no way known here."""
        template = self._template
        if not re.search(r"\btools\b", template):
            return None
        return next((style for style, sign in WRITTEN.items() if re.search(sign, template)), None)

    @property
    def thinks(self) -> bool:
        """Whether the chat template knows of reasoning between tags."""
        return any(sign in self._template for sign in THOUGHTS.values())

    def opens(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends with the tag that opens the answer's reasoning."""
        return self.thinks and self.decode(ids[-OPENING:]).rstrip().endswith(tuple(THOUGHTS))

    @property
    def _template(self) -> str:
        given = self.tokenizer.chat_template or ""
        return given if isinstance(given, str) else " ".join(given.values())

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a text to continue as it stands, with the tokens that the tokenizer begins texts with.

        A text that begins with such a token itself gets no second one.
        """
        ids = tuple(self.tokenizer(text)["input_ids"])
        twice = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id
        return ids[1:] if twice and text.startswith(self.tokenizer.bos_token) else ids

    def _given(self, messages: Sequence[Message]) -> dict[str, Any]:
        """What the template gets besides the turns: a run's and the conversation's own; and the day that it is."""
        given = dict(self.template)
        for message in messages:
            if message.role == "template":
                given |= json.loads(message.text)
        if taken := sorted(given.keys() & signature(self.tokenizer.apply_chat_template).parameters.keys()):
            raise ConfigError(
                f"chat_template_kwargs has {taken[0]!r}, which t2ray itself says; name the template's variables"
            )
        return given

    @property
    def never(self) -> tuple[tuple[int, float], ...]:
        """A bias against the tokens that stand for pictures, which no answer has."""
        return tuple((id, -100.0) for id in self.processor.places) if self.processor else ()

    def tell_date(self, day: date) -> None:
        """Makes the chat template, where it asks for the date, take this day for today."""
        now = datetime.combine(day, time(12))

        def dated(template: str) -> str:
            call = r"strftime_now\(\s*([\"'])(.*?)\1\s*\)"
            return re.sub(call, lambda match: json.dumps(now.strftime(match[2])), template)

        given = self.tokenizer.chat_template
        if given:
            several = isinstance(given, dict)
            self.tokenizer.chat_template = {k: dated(v) for k, v in given.items()} if several else dated(given)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Returns the ids of an answer; with a chat template, the token that ends the turn is the last of them."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return (*ids, self.end_id) if self.tokenizer.chat_template else ids

    def _reads_parts_alone(self) -> bool:
        """Whether the chat template leaves out, without a word, a content that is a text and no list of parts."""

        def said(in_parts: bool) -> bool:
            turns = _turns([Message(role="user", content=_ANSWER)], in_parts)
            try:
                return _ANSWER in str(self.tokenizer.apply_chat_template(turns, tokenize=False))
            except TemplateError:
                return False

        return bool(self.tokenizer.chat_template) and not said(False) and said(True)

    def _end_of_turn(self) -> int:
        """The token that the chat template puts after an assistant's turn; else the model's first end token.

        The two differ: Llama 3's first end token ends a document, and its turns end by another.
        """
        if not self.tokenizer.chat_template:
            return self.eos_ids[0]
        turns = [Message(role="user", content="x"), Message(role="assistant", content=_ANSWER)]
        try:
            text = str(self.tokenizer.apply_chat_template(_turns(turns, self._in_parts), tokenize=False))
        except TemplateError:  # one that refuses this conversation
            return self.eos_ids[0]
        after = self.tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
        return after[0] if after and after[0] in self.tokenizer.all_special_ids else self.eos_ids[0]

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Returns the text of ids, without special tokens; with the space that it begins with if it `continues` one."""
        for i, id in enumerate(ids) if self.signs else ():
            if id in self.signs:
                after = self.decode(ids[i + 1 :], continues=True)
                return self.decode(ids[:i], continues=continues) + self.signs[id] + after
        before, cut = (self.before, self._cut) if continues else ([], 0)
        return str(self.tokenizer.decode([*before, *ids], skip_special_tokens=True))[cut:]

    def token(self, id: int) -> tuple[str, bytes]:
        """Returns the text of one token by itself and, where they are no whole characters, its bytes.

        The text of a special token is its name.
        """
        if id not in self._tokens:
            text, raw = str(self.tokenizer.decode([*self.before, id]))[self._cut :], b""
            if "\ufffd" in text:
                raw = _bytes(self.tokenizer.convert_ids_to_tokens(id))
            self._tokens[id] = text, raw
        return self._tokens[id]


def _turns(messages: Sequence[Message], in_parts: bool) -> list[dict[str, Any]]:
    """Turns as chat templates read them: the arguments of calls are no text, and a result names its function."""
    turns, names = [], dict[str, str]()
    for message in messages:
        content: Any = (message.content,) if in_parts and isinstance(message.content, str) else message.content
        if not isinstance(content, str):
            content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in content]
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.calls:
            turn["tool_calls"] = calls = json.loads(message.calls)
            names |= {call["id"]: call["function"]["name"] for call in calls}
            for call in calls:
                call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.call_id:
            turn |= {"tool_call_id": message.call_id, "name": names.get(message.call_id, "")}
        turns.append(turn)
    return turns


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bytes(token: str) -> bytes:
    """The bytes that a token stands for in the two ways of writing them: `<0xE6>`, and a character per byte."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(match[1])
    return bytes(BYTES[char] for char in token) if all(char in BYTES for char in token) else token.encode()
