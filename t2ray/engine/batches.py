"""Static batches: given requests, of any mixtures, are generated and scored in as few padded batches as limits allow.

transformers' `generate` runs the loop; this module decides which requests share a batch and which z each row uses. It
computes in its caller's thread. Not here: where requests come from (`offline`, `loop`).

Shapes: B rows, T tokens, L labels of a request, R mixtures of a batch, K singular values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from os.path import commonprefix

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from t2ray.adapters.model import Model
from t2ray.core import Completion, SamplingParams, Token
from t2ray.engine.cache import RoomyLayer, like_lengths, repeat, roomy_cache
from t2ray.engine.requests import Request
from t2ray.engine.sampling import RowEnds, RowSampler, likeliest

READ_TOKENS = 256
"""Tokens of a prompt whose scores are computed at once when it is read."""

SHARED_TOKENS = 64
"""Prompt tokens that a pass over a shared prefix must save to be worth its own time."""

RESTART = 4
"""Passes that a batch's decoding is worth at least before it goes on with fewer rows."""

MAX_ROWS, MAX_TOKENS = 512, 131_072
"""Rows of a batch at most, and its tokens with the answers', of which it keeps keys and values."""


class StaticBatches:
    """Computes requests of one model; a batch has at most `max_rows` rows (a label is one) and `max_tokens` tokens."""

    def __init__(self, model: Model, *, max_rows: int = MAX_ROWS, max_tokens: int = MAX_TOKENS) -> None:
        self.model = model
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.tower = any(target.in_tower for target in model.adapter.layout)
        self.recurrent = any(hasattr(layer, "conv_states") for layer in DynamicCache(config=model.family.config).layers)

    def run(self, requests: Iterable[Request]) -> None:
        """Sets the `result` of each request."""
        by_row = self.model.adapter.by_row
        seen_by_row = not self.tower or self.model.family.takes_features

        def alike(request: Request) -> tuple[int, str]:
            apart = not by_row or (request.pictured and not seen_by_row)  # by z, as experts of one mixture may change
            return request.kind, f"{request.mixture.weights} {id(request.z_K)}" if apart else ""

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

    def _bind(
        self, batch: Sequence[Request], repeat: int = 1, tokens: int | None = None
    ) -> AbstractContextManager[None]:
        """The cheapest exact way to give every row its z: the base for free, a fold that pays, else rows.

        A fold pays from some number of `tokens` on, by default those of the batch.
        """
        adapter = self.model.adapter
        distinct = {id(request.z_K): request.z_K for request in batch}
        only = next(iter(distinct.values()))
        if len(distinct) == 1:
            if only is None:
                return nullcontext()
            tokens = tokens or sum(request.tokens for request in batch)
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
        """Rows that ended leave the batch when half of it has, where that pays."""
        chat, device, family = self.model.chat, self.model.device, self.model.family
        params = [replace(p, logit_bias=p.logit_bias + chat.never) for r in batch if (p := r.sampling)]
        ids_BT, mask_BT = self._left_padded(batch)
        prompt, whole = ids_BT.shape[1], sum(request.tokens for request in batch)
        longest = max(p.max_tokens for p in params)
        seen = self._seen(batch, prompt)
        sampler = RowSampler(params, device, [request.guide for request in batch])
        decode = [partial(chat.decode, continues=request.continues) for request in batch]
        leaves = family.shares_prefixes and not seen  # a picture's places are computed as its batch begins
        pays = partial(family.pays, passes=RESTART) if leaves else None
        ends = RowEnds(params, prompt, chat.eos_ids, decode, device, pays)
        room = prompt + longest
        cache = roomy_cache(family.config, room) if seen else self._prefilled(batch, prompt, room)
        found: list[Completion | None] = [None] * len(batch)
        under_way = list(range(len(batch)))
        while under_way:
            family.forget()
            with self._bind([batch[i] for i in under_way], tokens=whole):
                ids_BT = self.model.hf.generate(
                    ids_BT, attention_mask=mask_BT, past_key_values=cache, do_sample=False, pad_token_id=chat.pad_id,
                    max_new_tokens=prompt + longest - ids_BT.shape[1],
                    logits_processor=LogitsProcessorList([sampler]), stopping_criteria=StoppingCriteriaList([ends]),
                    **seen,
                )  # fmt: skip
            tokens_BT, logprobs_BT = ids_BT[:, prompt:].tolist(), torch.stack(sampler.logprobs, dim=1).tolist()
            rows = zip(under_way, tokens_BT, logprobs_BT, ends.length_B.tolist(), strict=True)
            for i, tokens, logprobs, length in rows:
                if length:
                    found[i] = self._completion(batch[i], params[i], tokens[:length], logprobs[:length])
            kept_B = (ends.length_B == 0).nonzero()[:, 0]
            under_way = [under_way[i] for i in kept_B.tolist()]
            if under_way:
                cache.reorder_cache(kept_B)
                ids_BT, mask_BT = ids_BT[kept_B], mask_BT[kept_B]
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), ids_BT.shape[1] - mask_BT.shape[1])], 1)
                sampler.keep(kept_B)
                ends.keep(kept_B)
        return [completion for completion in found if completion is not None]

    def _seen(self, batch: list[Request], prompt: int) -> Mapping[str, object]:
        """What the model gets of a batch's pictures; an adapted tower sees each row's by that row's z."""
        pictured, pads = [r.pictured for r in batch], [prompt - len(r.prompt_ids) for r in batch]
        if not self.tower or not any(pictured) or len({id(request.z_K) for request in batch}) == 1:
            return self.model.seen(pictured, pads, prompt)
        return self.model.featured(pictured, pads, prompt, lambda i: self._bind([batch[i]], tokens=1))

    def _prefilled(self, batch: list[Request], prompt: int, capacity: int) -> DynamicCache:
        """The keys and values of all but the last of `prompt` tokens, where it pays to read them apart: else none.

        Each prompt of a mixture is read once, whatever the number of its samples, beside prompts of like length.
        """
        family = self.model.family
        cache = roomy_cache(family.config, capacity)
        rows: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for i, request in enumerate(batch):
            rows[request.prompt_ids, id(request.z_K)].append(i)
        groups = [own for (ids, _), own in rows.items() if len(ids) > 1]
        pieces = like_lengths(groups, [len(batch[own[0]].prompt_ids) - 1 for own in groups], family.pays)
        read = sum(len(piece) * (len(batch[piece[-1][0]].prompt_ids) - 1) for piece in pieces)
        if not family.shares_prefixes or not pieces or not family.pays(len(batch) * (prompt - 1) - read, len(pieces)):
            return cache
        for piece in pieces:
            firsts = [replace(batch[own[0]], prompt_ids=batch[own[0]].prompt_ids[:-1]) for own in piece]
            ids_UT, mask_UT = self._left_padded(firsts)
            part = DynamicCache(config=family.config)
            with self._bind(firsts, tokens=sum(request.tokens for request in batch)):
                self.model.hf(
                    input_ids=ids_UT, attention_mask=mask_UT, position_ids=(mask_UT.cumsum(-1) - 1).clamp_min(0),
                    past_key_values=part, logits_to_keep=1,
                )  # fmt: skip
            # On the CPU, which any device is indexed by: layers may lie on several GPUs.
            source_B = torch.tensor([u for u, own in enumerate(piece) for _ in own])
            row_B = torch.tensor([i for own in piece for i in own])
            for layer, read_layer in zip(cache.layers, part.layers, strict=True):
                assert isinstance(layer, RoomyLayer) and isinstance(read_layer, DynamicLayer)
                layer.place(read_layer, source_B, row_B, len(batch), prompt - 1)
        return cache

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
            thinking=self.model.chat.opens(request.prompt_ids),
        )

    def _read(self, request: Request) -> tuple[Token, ...]:
        """Piece by piece, since the scores of all places at once would be large."""
        from t2ray.engine.text import TextStream  # an endpoint alone reads prompts

        chat, ids, cache = self.model.chat, request.prompt_ids, DynamicCache(config=self.model.family.config)
        step = len(ids) if self.recurrent else READ_TOKENS
        stream, tokens = TextStream(chat, ()), list[Token]()
        logprob, top = float("nan"), tuple[Token, ...]()
        self.model.family.forget()
        with self._bind([request]):
            for start in range(0, len(ids), step):
                piece_1T = torch.tensor([ids[start : start + step]], device=self.model.device)
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
        if self.recurrent or any(request.pictured for request in batch):
            return [self._score_whole(request) for request in batch]
        hf, L, shared = self.model.hf, len(batch[0].labels), _shared_prefix(batch)
        ids_BT, mask_BT = self._left_padded(batch, shared)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, shared:]
        cache = DynamicCache(config=self.model.family.config)
        with self._bind(batch):
            if shared:
                prefix_1T = torch.tensor([batch[0].prompt_ids[:shared]], device=ids_BT.device)
                hf(input_ids=prefix_1T, past_key_values=cache, logits_to_keep=1)
                repeat(cache, 1, len(batch))
            first = hf(
                input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache,
                logits_to_keep=1,
            ).logits  # fmt: skip
        labels = [label for request in batch for label in request.labels]
        longest = max(map(len, labels))
        label_LT = torch.tensor([[*label, *[0] * (longest - len(label))] for label in labels], device=ids_BT.device)
        real_LT = torch.tensor(
            [[1] * len(label) + [0] * (longest - len(label)) for label in labels], device=ids_BT.device
        )
        logits = first.float().repeat_interleave(L, 0)
        if longest > 1:
            repeat(cache, len(batch), L)
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

    def _score_whole(self, request: Request) -> tuple[float, ...]:
        """Each label behind the whole prompt, where neither a recurrent state nor a picture's places are continued."""
        model, labels, start = self.model, request.labels, len(request.prompt_ids)
        longest, device = max(map(len, labels)), model.device
        real_LT = torch.tensor([[1] * len(label) + [0] * (longest - len(label)) for label in labels], device=device)
        pad = [model.chat.pad_id] * longest
        ids_LT = torch.tensor([[*request.prompt_ids, *[*label, *pad][:longest]] for label in labels], device=device)
        seen = model.seen([request.pictured] * len(labels), [0] * len(labels), start + longest)
        mask_LT = torch.cat([torch.ones_like(ids_LT[:, :start]), real_LT], 1)
        with self._bind([request]):
            logits = model.logits(model.hidden(ids_LT, mask_LT, seen)[:, start - 1 : -1])
        logprob_LT = logits.log_softmax(-1).gather(-1, ids_LT[:, start:, None])[..., 0] * real_LT
        return tuple(logprob_LT.sum(-1).tolist())


def _shared_prefix(batch: Sequence[Request]) -> int:
    """The tokens that all prompts of a batch begin with, as far as a pass of their own over them pays: else 0.

    The keys and values depend on z: only prompts of one mixture share any. Each keeps a token of its own.
    """
    if len({request.mixture for request in batch}) > 1:
        return 0
    prompts = [request.prompt_ids for request in batch]
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    return shared if shared * (len(batch) - 1) >= SHARED_TOKENS else 0
