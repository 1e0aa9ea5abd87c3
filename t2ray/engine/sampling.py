"""Choosing the next token, row by row: a logits processor, so that transformers' own generation loop does the rest.

Each row has its own parameters and stream of random numbers, so that a seeded row's text does not depend on
its neighbours. Also records the log-probability of each token that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from t2ray.core import ConfigError, SamplingParams, Token
from t2ray.models.chat import Chat

if TYPE_CHECKING:
    from t2ray.engine.grammar import Guide


class RowSampler(LogitsProcessor):
    """Leaves one finite score a row, the chosen token's: the greedy loop around it then samples.

    Sampling inverts the cumulative distribution at one uniform number a token. The numbers of a row are drawn at once
    from its own seed; a row without one gets a seed from torch's global generator.
    """

    def __init__(
        self, sampling: Sequence[SamplingParams], device: torch.device, guides: Sequence[Guide | None] = ()
    ) -> None:
        self.sampling = sampling
        self.guides = guides or [None] * len(sampling)
        self.temperature_B1 = torch.tensor([[s.temperature] for s in sampling], device=device)
        self.greedy = all(s.temperature == 0 for s in sampling)
        self.cuts_B3 = cuts(sampling, device)
        self.logprobs: list[Tensor] = []
        self.uniform_BT = torch.zeros(len(sampling), 0, device=device)
        if not self.greedy:
            longest = max(s.max_tokens for s in sampling)
            self.uniform_BT = torch.stack([uniforms(s.seed, longest) for s in sampling]).to(device)

    def keep(self, row_B: Tensor) -> None:
        """Goes on with these rows alone."""
        rows = row_B.tolist()
        self.sampling, self.guides = [self.sampling[i] for i in rows], [self.guides[i] for i in rows]
        self.temperature_B1 = self.temperature_B1[row_B]
        self.greedy = all(s.temperature == 0 for s in self.sampling)
        self.cuts_B3 = None if self.cuts_B3 is None else self.cuts_B3[row_B]
        self.uniform_BT = self.uniform_BT[row_B]
        self.logprobs = [logprob_B[row_B] for logprob_B in self.logprobs]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprob_BV, length = scores.log_softmax(-1), len(self.logprobs)
        answer_BT = input_ids[:, input_ids.shape[1] - length :]
        adjusted_BV = adjusted(logprob_BV, self.sampling, answer_BT, self.guides)
        token_B1 = adjusted_BV.argmax(-1, keepdim=True)
        if not self.greedy:
            sampled_B1 = sample(adjusted_BV, self.temperature_B1, self.cuts_B3, self.uniform_BT[:, length, None])
            token_B1 = torch.where(self.temperature_B1 > 0, sampled_B1, token_B1)
        for i, guide in enumerate(self.guides):
            if guide is not None:
                guide.push(int(token_B1[i]))
                if guide.error:
                    raise ConfigError(guide.error)
        self.logprobs.append(logprob_BV.gather(-1, token_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)


def adjusted(
    logit_BV: Tensor,
    sampling: Sequence[SamplingParams],
    answers: Tensor | Sequence[Sequence[int]],
    guides: Sequence[Guide | None],
) -> Tensor:
    """The logits with each row's bias, penalties and grammar, by its answer's tokens so far; itself where none has any.

    Unlike the temperature they change the greedy choice too. The recorded log-probabilities are without them.
    """
    rows = [
        i
        for i, (s, guide) in enumerate(zip(sampling, guides, strict=True))
        if guide or s.logit_bias or s.presence_penalty or s.frequency_penalty
    ]
    if not rows:
        return logit_BV
    logit_BV, device = logit_BV.clone(), logit_BV.device
    for i in rows:
        s = sampling[i]
        answer_T = torch.as_tensor(answers[i], dtype=torch.long, device=device)
        count_V = torch.bincount(answer_T, minlength=logit_BV.shape[-1])
        logit_BV[i] -= s.frequency_penalty * count_V + s.presence_penalty * (count_V > 0)
        for id, bias in s.logit_bias:
            logit_BV[i, id] += bias
        if guide := guides[i]:
            allowed_V = torch.frombuffer(bytearray(guide.allowed), dtype=torch.uint8).to(device)
            logit_BV[i].masked_fill_(allowed_V == 0, -torch.inf)
    return logit_BV


def cuts(sampling: Sequence[SamplingParams], device: torch.device) -> Tensor | None:
    """Each row's top_k, min_p and top_p, (B, 3); None where no row cuts off anything."""
    if all(s.top_k == 0 and s.min_p == 0 and s.top_p == 1 for s in sampling):
        return None
    return torch.tensor([[s.top_k or 2**31, s.min_p, s.top_p] for s in sampling], dtype=torch.float64, device=device)


def sample(logit_BV: Tensor, temperature_B1: Tensor, cuts_B3: Tensor | None, u_B1: Tensor) -> Tensor:
    """The tokens, (B, 1), where each row's cumulative distribution reaches its uniform number `u_B1` in [0, 1).

    top_p is a share of what top_k and min_p leave; the likeliest token always stays.
    """
    p_BV = (logit_BV / temperature_B1.clamp_min(1e-6)).softmax(-1)
    if cuts_B3 is not None:
        top_k_B1, min_p_B1, top_p_B1 = cuts_B3.split(1, 1)
        sorted_BV, order_BV = p_BV.sort(-1, descending=True)
        rank_V = torch.arange(p_BV.shape[-1], device=p_BV.device)
        outside_BV = (rank_V >= top_k_B1) | (sorted_BV < (min_p_B1 * sorted_BV[:, :1]).to(p_BV.dtype))
        left_BV = sorted_BV.masked_fill(outside_BV, 0.0)
        total_B1 = torch.where(outside_BV.any(-1, keepdim=True), left_BV.sum(-1, keepdim=True), 1.0)
        outside_BV |= left_BV.cumsum(-1) - left_BV >= top_p_B1.to(p_BV.dtype) * total_B1
        outside_BV[:, 0] = False
        p_BV = torch.zeros_like(p_BV).scatter_(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    cumulative_BV = p_BV.double().cumsum(-1)
    # `right` never picks a token of probability 0; rounding can never pass the last token that has some.
    token_B1 = torch.searchsorted(cumulative_BV, u_B1 * cumulative_BV[:, -1:], right=True)
    last_B1 = p_BV.shape[-1] - 1 - (p_BV > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(token_B1, last_B1)


def likeliest(chat: Chat, logprob_V: Tensor, count: int) -> tuple[Token, ...]:
    """The `count` likeliest tokens, each by itself."""
    best = logprob_V.topk(min(count, len(logprob_V)))
    rows = [(logprob, id, *chat.token(id)) for logprob, id in zip(*map(Tensor.tolist, best), strict=True)]
    return tuple(Token(id=id, text=text, logprob=logprob, raw=raw) for logprob, id, text, raw in rows)


def uniforms(seed: int | None, n: int) -> Tensor:
    """`n` numbers in [0, 1), float64, of a row's own seed; of one from torch's generator without one."""
    seed = int(torch.randint(2**62, (1,))) if seed is None else seed
    return torch.rand(n, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)


class RowEnds(StoppingCriteria):
    """Ends each row at an end token, a text of its own `stop` or its own `max_tokens`, and records where.

    `length_B` holds each row's number of tokens, the end token included: padding cannot tell, where the padding token
    is the end token or one that the model may choose. With `pays`, which says whether so many tokens less are worth a
    restart, all rows stop when half of them have ended and the others' rest pays; those that go on have length 0.
    """

    def __init__(
        self,
        sampling: Sequence[SamplingParams],
        prompt: int,
        eos_ids: Sequence[int],
        decode: Sequence[Callable[[Sequence[int]], str]],
        device: torch.device,
        pays: Callable[[int], bool] | None = None,
    ) -> None:
        self.prompt, self.pays = prompt, pays
        self.limit_B = torch.tensor([s.max_tokens for s in sampling], device=device)
        self.eos = torch.tensor(eos_ids, device=device)
        self.ignores_eos_B = torch.tensor([s.ignore_eos for s in sampling], device=device)
        self.stops = [(row, s.stop, decode[row]) for row, s in enumerate(sampling) if s.stop]
        self.length_B = torch.zeros_like(self.limit_B)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        answer_BT = input_ids[:, self.prompt :]
        ends_B = torch.isin(answer_BT[:, -1], self.eos) & ~self.ignores_eos_B
        ends_B |= self.limit_B <= answer_BT.shape[1]
        for row, stops, decode in self.stops:
            if not self.length_B[row]:
                text = decode(answer_BT[row].tolist())
                ends_B[row] |= any(stop in text for stop in stops)
        self.length_B[ends_B & (self.length_B == 0)] = answer_BT.shape[1]
        ended_B = self.length_B > 0
        if self.pays is not None and ended_B.any():
            ended = int(ended_B.sum())
            left = int(self.limit_B.masked_fill(ended_B, 0).max()) - answer_BT.shape[1]
            if 2 * ended >= len(ended_B) and self.pays(ended * left):
                return torch.ones_like(ended_B)
        return ended_B

    def keep(self, row_B: Tensor) -> None:
        """Goes on with these rows alone."""
        place = {row: i for i, row in enumerate(row_B.tolist())}
        self.limit_B, self.ignores_eos_B = self.limit_B[row_B], self.ignores_eos_B[row_B]
        self.length_B = self.length_B[row_B]
        self.stops = [(place[row], stops, decode) for row, stops, decode in self.stops if row in place]
