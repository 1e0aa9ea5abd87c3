"""What an engine is asked: a generation, a scoring, or a reading, as token ids that are known to fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from t2ray.core import (
    Completion,
    ConfigError,
    ContextExceeded,
    Delta,
    ExpertError,
    Message,
    Mixture,
    Prompt,
    SamplingParams,
    Token,
)
from t2ray.models.chat import Chat
from t2ray.prompts import pictured

if TYPE_CHECKING:
    from t2ray.engine.grammar import Guide


class Reader(Protocol):
    """What a prompt is read by: a model, or an engine that has its model elsewhere.

    `vocabulary` is the number of its tokens, `context` of those that prompt and answer may have together.
    """

    @property
    def chat(self) -> Chat: ...
    @property
    def context(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


@dataclass(slots=True, kw_only=True)
class Request:
    """A call: with `sampling` a generation, with `labels` a scoring, with `top` a reading of the prompt itself.

    `z_K` is None for the base model.

    `pictured` is the conversation, where it has pictures: what the model gets of them is made when its batch is.

    An answer `continues` a text, or is a turn by itself. Requests of one mixture share one tensor `z_K`: batches tell
    mixtures apart by it.
    """

    prompt_ids: tuple[int, ...]
    mixture: Mixture
    pictured: tuple[Message, ...] = ()
    continues: bool = False
    z_K: Tensor | None = None
    sampling: SamplingParams | None = None
    guide: Guide | None = None
    labels: tuple[tuple[int, ...], ...] = ()
    top: int | None = None
    result: Completion | tuple[float, ...] | tuple[Token, ...] | None = None

    @property
    def kind(self) -> int:
        """Requests of one kind share a batch, if they fit: generations, scorings of one number of labels, readings."""
        return len(self.labels) if self.top is None else -1

    @property
    def tokens(self) -> int:
        answer = self.sampling.max_tokens if self.sampling else sum(max(map(len, self.labels)) for _ in self.labels)
        return len(self.prompt_ids) + answer


def fitting(
    model: Reader, prompt: Prompt, sampling: SamplingParams, context: int
) -> tuple[tuple[int, ...], SamplingParams]:
    """The ids of a prompt, and its sampling with `max_tokens` that fit; raises as `prompt_ids` does."""
    ids = prompt_ids(model, prompt, 1 if sampling.to_end else sampling.max_tokens, sampling.logit_bias)
    if sampling.to_end:
        sampling = replace(sampling, max_tokens=max(1, min(sampling.max_tokens, context - len(ids))))
    return ids, sampling


def prompt_ids(model: Reader, prompt: Prompt, answer: int, bias: Sequence[tuple[int, float]] = ()) -> tuple[int, ...]:
    """The ids of a prompt (`Chat.ids`) that is answered with a `bias` of some tokens.

    Raises:
        ConfigError: the prompt has no tokens or unknown ones, or the model's chat template refuses it.
        ContextExceeded: the prompt and `answer` further tokens exceed the model's context.
    """
    ids = model.chat.ids(prompt)
    if not ids:
        raise ConfigError("the prompt is empty: it has no tokens; write something")
    for what, tokens in (("the prompt", ids), ("logit_bias", [id for id, _ in bias])):
        if wrong := [id for id in tokens if not 0 <= id < model.vocabulary]:
            raise ConfigError(f"{what} has the token {wrong[0]}; the model's tokens are 0..{model.vocabulary - 1}")
    if len(ids) + answer > model.context:
        raise ContextExceeded(
            f"a prompt of {len(ids)} tokens and {answer} for the answer exceed the model's context of "
            f"{model.context}; shorten the prompt or lower max_tokens",
            len(ids), answer, model.context,
        )  # fmt: skip
    return ids


def finite(completion: Completion) -> Completion:
    """The answer itself.

    Raises:
        ExpertError: the mixture's numbers overflow.
    """
    if any(logprob != logprob for logprob in completion.logprobs):
        raise ExpertError("this mixture's numbers overflow: the model's scores are not finite; use smaller weights")
    return completion


def whole(completion: Completion) -> Delta:
    """A whole answer as the one piece of a stream, since a batch ends as a whole."""
    return Delta(
        text=completion.text,
        tokens=completion.tokens,
        prompt_tokens=len(completion.prompt_ids),
        finish_reason=completion.finish_reason,
        thinking=completion.thinking,
    )


def scoring(model: Reader, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> Request:
    """The request for the log-likelihoods of `labels`; raises as `prompt_ids` does."""
    label_ids = tuple(model.chat.encode_answer(label) for label in labels)
    ids = prompt_ids(model, prompt, max(map(len, label_ids)))
    return Request(prompt_ids=ids, mixture=mixture, pictured=pictured(prompt), labels=label_ids)


def reading(model: Reader, prompt: Prompt, mixture: Mixture, top: int) -> Request:
    """The request for the log-probabilities of a prompt's own tokens; raises as `prompt_ids` does."""
    if pictured(prompt):
        raise ConfigError("a prompt with pictures is not read for its own log-probabilities; leave them out")
    return Request(prompt_ids=prompt_ids(model, prompt, 0), mixture=mixture, top=top)
