"""Static batches: given requests, of any mixtures, are generated and scored in as few padded batches as limits allow.

transformers' `generate` runs the loop; this module decides which requests share a batch and which z each row uses. It
computes in its caller's thread. Not here: where requests come from (`offline`, `loop`).

Shapes: B rows, T tokens, L labels of a request, R mixtures of a batch, K singular values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from t2ray.adapters.model import Model
from t2ray.core import Completion, SamplingParams, Token
from t2ray.engine.requests import Request
from t2ray.engine.sampling import RowEnds, RowSampler, likeliest

READ_TOKENS = 256
"""Tokens of a prompt whose scores are computed at once when it is read."""

SHARED_TOKENS = 64
"""Prompt tokens that a pass over a shared prefix must save to be worth its own time."""


class StaticBatches:
    """Computes requests of one model; a batch has at most `max_rows` rows (a label is one) and `max_tokens` tokens."""

    def __init__(self, model: Model, *, max_rows: int = 512, max_tokens: int = 131_072) -> None:
        self.model = model
        self.max_rows, self.max_tokens = max_rows, max_tokens

    def run(self, requests: Iterable[Request]) -> None:
        """Sets the `result` of each request."""
        by_row = self.model.adapter.by_row

        def alike(request: Request) -> tuple[int, str]:
            return request.kind, "" if by_row else str(request.mixture.weights)

        ordered = sorted(requests, key=lambda r: (alike(r), len(r.prompt_ids)))  # rows of like length pad little
        with torch.no_grad():
            for (labels, _), same_kind in groupby(ordered, key=alike):
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
        longest = max(p.max_tokens for p in params)
        sampler = RowSampler(params, device, [request.guide for request in batch])
        decode = [partial(chat.decode, continues=request.continues) for request in batch]
        ends = RowEnds(params, ids_BT.shape[1], chat.eos_ids, decode, device)
        with self._bind(batch):
            out_BT = self.model.hf.generate(
                ids_BT,
                attention_mask=mask_BT,
                past_key_values=roomy_cache(self.model.family.config, ids_BT.shape[1] + longest),
                do_sample=False,
                max_new_tokens=longest,
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
        from t2ray.engine.text import TextStream  # an endpoint alone reads prompts

        chat, ids, cache = self.model.chat, request.prompt_ids, DynamicCache(config=self.model.family.config)
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
        cache = DynamicCache(config=self.model.family.config)
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


# ------------------------------------------------------------------------------------------------ keys and values


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values, (B, heads, T, D), are the filled part of buffers for `capacity` tokens.

    A step writes its own token. transformers' own cache grows by concatenation, which copies all tokens at every step.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the buffers when the first keys show their sizes."""
        super().lazy_initialization(key_states, value_states)
        self.rooms = tuple(
            states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens; the keys and values of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


def roomy_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache that `config`'s model asks for, its plain layers with room for `capacity` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
