"""Static batches: generation and scoring of given requests, mixtures mixed, as few padded batches as limits allow.

transformers' `generate` runs the loop; this module decides what shares a batch and which z each row sees. It
computes in its caller's thread. Not here: where requests come from (`engine`, `continuous`).

Shapes: B rows, T tokens, L labels of a request, R mixtures of a batch, K singular values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from os.path import commonprefix

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from t2ray.adapters.model import Model
from t2ray.core import Completion, ConfigError, ContextExceeded, Mixture, Prompt, SamplingParams, Token
from t2ray.engine.cache import roomy_cache
from t2ray.engine.sampling import RowEnds, RowSampler, likeliest
from t2ray.engine.text import TextStream

READ_TOKENS = 256
"""Tokens of a prompt whose scores are computed at once when it is read."""

SHARED_TOKENS = 64
"""Prompt tokens that a pass over a shared prefix must save to be worth its own time."""


@dataclass(slots=True, kw_only=True)
class Request:
    """A call: with `sampling` a generation, with `labels` a scoring, with `top` a reading of the prompt itself.

    `z_K` is None for the base model.

    An answer `continues` a text, or is a turn by itself. Requests of one mixture share one tensor `z_K`: batches tell
    mixtures apart by it.
    """

    prompt_ids: tuple[int, ...]
    mixture: Mixture
    continues: bool = False
    z_K: Tensor | None = None
    sampling: SamplingParams | None = None
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
    model: Model, prompt: Prompt, sampling: SamplingParams, context: int
) -> tuple[tuple[int, ...], SamplingParams]:
    """The ids of a prompt, and its sampling with `max_tokens` that fit; raises as `prompt_ids` does."""
    ids = prompt_ids(model, prompt, 1 if sampling.to_end else sampling.max_tokens, sampling.logit_bias)
    if sampling.to_end:
        sampling = replace(sampling, max_tokens=max(1, min(sampling.max_tokens, context - len(ids))))
    return ids, sampling


def prompt_ids(model: Model, prompt: Prompt, answer: int, bias: Sequence[tuple[int, float]] = ()) -> tuple[int, ...]:
    """The ids of a prompt (`Chat.ids`) that is answered with a `bias` of some tokens.

    Raises:
        ConfigError: the prompt has no tokens or unknown ones, or the model's chat template refuses it.
        ContextExceeded: the prompt and `answer` further tokens exceed the model's context.
    """
    ids = model.chat.ids(prompt)
    if not ids:
        raise ConfigError("the prompt is empty: it has no tokens; write something")
    vocabulary = model.hf.get_input_embeddings().num_embeddings
    for what, tokens in (("the prompt", ids), ("logit_bias", [id for id, _ in bias])):
        if wrong := [id for id in tokens if not 0 <= id < vocabulary]:
            raise ConfigError(f"{what} has the token {wrong[0]}; the model's tokens are 0..{vocabulary - 1}")
    if len(ids) + answer > model.context:
        raise ContextExceeded(
            f"a prompt of {len(ids)} tokens and {answer} for the answer exceed the model's context of "
            f"{model.context}; shorten the prompt or lower max_tokens",
            len(ids), answer, model.context,
        )  # fmt: skip
    return ids


def scoring(model: Model, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> Request:
    """The request for the log-likelihoods of `labels`; raises as `prompt_ids` does."""
    label_ids = tuple(model.chat.encode_answer(label) for label in labels)
    ids = prompt_ids(model, prompt, max(map(len, label_ids)))
    return Request(prompt_ids=ids, mixture=mixture, labels=label_ids)


def reading(model: Model, prompt: Prompt, mixture: Mixture, top: int) -> Request:
    """The request for the log-probabilities of a prompt's own tokens; raises as `prompt_ids` does."""
    return Request(prompt_ids=prompt_ids(model, prompt, 0), mixture=mixture, top=top)


class StaticBatches:
    """Computes requests of one model; a batch has at most `max_rows` rows (a label is one) and `max_tokens` tokens."""

    def __init__(self, model: Model, *, max_rows: int = 512, max_tokens: int = 131_072) -> None:
        self.model = model
        self.max_rows, self.max_tokens = max_rows, max_tokens

    def run(self, requests: Iterable[Request]) -> None:
        """Sets the `result` of each request."""
        ordered = sorted(requests, key=lambda r: (r.kind, len(r.prompt_ids)))  # rows of like length pad little
        with torch.no_grad():
            for labels, same_kind in groupby(ordered, key=lambda r: r.kind):
                for batch in self._batches(same_kind):
                    if labels < 0:
                        for request in batch:
                            request.result = self._read(request)
                    elif labels:
                        for request, scores in zip(batch, self._score(batch), strict=True):
                            request.result = scores
                    else:
                        for request, completion in zip(batch, self._generate(batch), strict=True):
                            request.result = completion

    def _batches(self, requests: Iterable[Request]) -> Iterable[list[Request]]:
        batch: list[Request] = []
        longest = 0
        for request in requests:
            longest = max(longest, request.tokens)
            rows = (len(batch) + 1) * max(1, len(request.labels))
            if batch and (rows > self.max_rows or (len(batch) + 1) * longest > self.max_tokens):
                yield batch
                batch, longest = [], request.tokens
            batch.append(request)
        yield batch

    def _bind(self, batch: Sequence[Request], repeat: int = 1) -> AbstractContextManager[None]:
        """The cheapest exact way to give every row its z: the base for free, a fold that pays, else rows."""
        adapter = self.model.adapter
        distinct = {id(request.z_K): request.z_K for request in batch}
        only = next(iter(distinct.values()))
        if len(distinct) == 1:
            if only is None:
                return nullcontext()
            tokens = sum(request.tokens for request in batch)
            if adapter.is_folded(only) or tokens >= adapter.tokens_to_fold():
                return adapter.folded(only)
            return adapter.rows(only[None])
        index_B = torch.tensor([list(distinct).index(id(request.z_K)) for request in batch], device=self.model.device)
        return adapter.rows(adapter.table(list(distinct.values())), index_B.repeat_interleave(repeat))

    def _left_padded(self, batch: Sequence[Request], skip: int = 0) -> tuple[Tensor, Tensor]:
        """Ids (B, T) of the prompts without their first `skip` tokens, and the mask (B, skip + T) of all of them."""
        longest = max(len(request.prompt_ids) for request in batch)
        pads = [longest - len(request.prompt_ids) for request in batch]
        ids = [[self.model.chat.pad_id] * pad + list(r.prompt_ids[skip:]) for pad, r in zip(pads, batch, strict=True)]
        mask = [[1] * skip + [0] * pad + [1] * (longest - skip - pad) for pad in pads]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _generate(self, batch: list[Request]) -> list[Completion]:
        chat, device = self.model.chat, self.model.device
        params = [request.sampling for request in batch if request.sampling]
        ids_BT, mask_BT = self._left_padded(batch)
        sampler = RowSampler(params, device)
        decode = [partial(chat.decode, continues=request.continues) for request in batch]
        ends = RowEnds(params, ids_BT.shape[1], chat.eos_ids, decode, device)
        with self._bind(batch):
            out_BT = self.model.hf.generate(
                ids_BT,
                attention_mask=mask_BT,
                past_key_values=roomy_cache(self.model.hf.config, ids_BT.shape[1] + max(p.max_tokens for p in params)),
                do_sample=False,
                max_new_tokens=max(p.max_tokens for p in params),
                pad_token_id=chat.pad_id,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([ends]),
            )
        tokens_BT = out_BT[:, ids_BT.shape[1] :].tolist()
        logprobs_BT = torch.stack(sampler.logprobs, dim=1).tolist()
        rows = zip(batch, params, tokens_BT, logprobs_BT, ends.length_B.tolist(), strict=True)
        return [
            self._completion(request, p, tokens[:length], logprobs[:length])
            for request, p, tokens, logprobs, length in rows
        ]

    def _completion(
        self, request: Request, sampling: SamplingParams, tokens: list[int], logprobs: list[float]
    ) -> Completion:
        text = self.model.chat.decode(tokens, continues=request.continues)
        cuts = [text.find(stop) for stop in sampling.stop if stop in text]
        ended = bool(cuts) or (tokens[-1] in self.model.chat.eos_ids and not sampling.ignore_eos)
        return Completion(
            prompt_ids=request.prompt_ids,
            tokens=tuple(
                Token(id=token, text=self.model.chat.token(token)[0], logprob=logprob)
                for token, logprob in zip(tokens, logprobs, strict=True)
            ),
            text=text[: min(cuts)] if cuts else text,
            finish_reason="stop" if ended else "length",
            mixture=request.mixture,
        )

    def _read(self, request: Request) -> tuple[Token, ...]:
        """Piece by piece, since the scores of all places at once would be large."""
        chat, ids, cache = self.model.chat, request.prompt_ids, DynamicCache(config=self.model.hf.config)
        stream, tokens = TextStream(chat, ()), list[Token]()
        logprob, top = float("nan"), tuple[Token, ...]()
        with self._bind([request]):
            for start in range(0, len(ids), READ_TOKENS):
                piece_1T = torch.tensor([ids[start : start + READ_TOKENS]], device=self.model.device)
                logits_TV = self.model.hf(input_ids=piece_1T, past_key_values=cache).logits[0]
                logprob_TV = logits_TV.float().log_softmax(-1)
                for i, logprob_V in enumerate(logprob_TV, start):
                    stream.push(ids[i])
                    if i + 1 == len(ids):
                        stream.finish()
                    raw = chat.token(ids[i])[1]
                    tokens.append(Token(id=ids[i], text=stream.added, logprob=logprob, raw=raw, top=top))
                    if i + 1 < len(ids):
                        logprob = float(logprob_V[ids[i + 1]])
                        top = likeliest(chat, logprob_V, request.top or 0)
        return tuple(tokens)

    def _score(self, batch: list[Request]) -> list[tuple[float, ...]]:
        """Reads what all prompts begin with once, then each one's rest; its labels continue from its cache."""
        hf, L, shared = self.model.hf, len(batch[0].labels), _shared_prefix(batch)
        ids_BT, mask_BT = self._left_padded(batch, shared)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, shared:]
        cache = DynamicCache(config=hf.config)
        with self._bind(batch):
            if shared:
                prefix_1T = torch.tensor([batch[0].prompt_ids[:shared]], device=ids_BT.device)
                hf(input_ids=prefix_1T, past_key_values=cache, logits_to_keep=1)
                cache.batch_repeat_interleave(len(batch))
            first = hf(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
        labels = [label for request in batch for label in request.labels]
        longest = max(map(len, labels))
        label_LT = torch.tensor([[*label, *[0] * (longest - len(label))] for label in labels], device=ids_BT.device)
        real_LT = torch.tensor(
            [[1] * len(label) + [0] * (longest - len(label)) for label in labels], device=ids_BT.device
        )
        logits = first.float().repeat_interleave(L, 0)
        if longest > 1:
            cache.batch_repeat_interleave(L)
            mask = torch.cat([mask_BT.repeat_interleave(L, 0), real_LT[:, :-1]], 1)
            start = positions_BT[:, -1:].repeat_interleave(L, 0) + 1
            positions = start + torch.arange(longest - 1, device=start.device)
            with self._bind(batch, repeat=L):
                rest = hf(
                    input_ids=label_LT[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=cache
                ).logits
            logits = torch.cat([logits, rest.float()], 1)
        logprob_LT = logits.log_softmax(-1).gather(-1, label_LT[..., None])[..., 0] * real_LT
        totals: list[float] = logprob_LT.sum(-1).tolist()
        return [tuple(totals[i : i + L]) for i in range(0, len(totals), L)]


def _shared_prefix(batch: Sequence[Request]) -> int:
    """The tokens that all prompts of a batch begin with, as far as a pass of their own over them pays: else 0.

    The keys and values depend on z: only prompts of one mixture share any. Each keeps a token of its own.
    """
    if len({request.mixture for request in batch}) > 1:
        return 0
    prompts = [request.prompt_ids for request in batch]
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    return shared if shared * (len(batch) - 1) >= SHARED_TOKENS else 0
