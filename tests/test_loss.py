"""REINFORCE with a KL: hand-computed values, and the gradient against the plain algorithm's and its own parts'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import load_as, plain, random_z, rollout
from torch import Tensor
from torch.func import functional_call

from t2ray.adapters.model import Model
from t2ray.grades import Rollout
from t2ray.models import families
from t2ray.training import loss
from t2ray.training.loss import LossTerms, advantages, backward, importance, shares_of_tokens, surrogate, token_losses

A, B = (0.9, 0.1), (0.5, 0.5)
KL_AB = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float64, tiny_llama, tmp_path_factory.mktemp("loss"))


ROLLOUTS = [
    rollout([7, 8, 9], [10, 11]),
    rollout([7], [200, 4, 60, 61, 1]),
    rollout([30, 31, 32, 33, 34, 35], [1]),
    rollout([8, 8], [100, 101, 102]),
    rollout([7, 8, 9], [10, 12, 13, 14]),
]
ADVANTAGES = [1.0, -0.5, 0.25, -1.0, 0.75]


def gradient(
    model: Model,
    z_K: Tensor,
    rollouts: Sequence[Rollout] = ROLLOUTS,
    advantage_B: Sequence[float] = ADVANTAGES,
    *,
    lam: float = 0.3,
    temperature: float = 1.0,
    truncate: float | None = None,
    **more: Any,
) -> tuple[Tensor, LossTerms]:
    """The gradient of one micro-batch of a batch of 5 at z, (K,), and its sums."""
    leaf_1K = z_K.double()[None].requires_grad_()
    terms = backward(
        model, leaf_1K, rollouts, advantage_B,
        lam=lam, temperature=temperature, batch=len(ROLLOUTS), truncate=truncate, **more,
    )  # fmt: skip
    assert leaf_1K.grad is not None
    return leaf_1K.grad[0], terms


# -------------------------------------------------------------------------------------------------------- hand-computed


def test_the_loss_of_a_token_by_hand() -> None:
    loss_N, kl_N, _ = token_losses(
        torch.tensor([A, A, B]).log(), torch.tensor([B, B, A]).log(), torch.tensor([0, 1, 1]),
        torch.tensor([1.0, -2.0, 0.0]), 0.5, 1.0,
    )  # fmt: skip
    kl_BA = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_N.tolist() == pytest.approx([KL_AB, KL_AB, kl_BA], rel=1e-5)
    expected = [0.5 * KL_AB - math.log(0.9), 0.5 * KL_AB + 2 * math.log(0.1), 0.5 * kl_BA]
    assert loss_N.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_the_policys_from_the_base_and_not_the_other_way_round() -> None:
    _, kl_N, _ = token_losses(
        torch.tensor([A]).log(), torch.tensor([B]).log(), torch.zeros(1).long(), torch.ones(1), 1, 1
    )
    assert float(kl_N) == pytest.approx(KL_AB, rel=1e-5)
    assert abs(KL_AB - (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))) > 0.1  # the other way round differs


def test_the_temperature_reaches_the_sampled_token_and_not_the_divergence() -> None:
    loss_N, kl_N, _ = token_losses(
        torch.tensor([A]).log(), torch.tensor([B]).log(), torch.zeros(1).long(), torch.ones(1), 0.0, 2.0
    )
    assert float(loss_N) == pytest.approx(-math.log(3 / 4), rel=1e-5)  # sqrt(.9) : sqrt(.1) = 3 : 1
    assert float(kl_N) == pytest.approx(KL_AB, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-30, 30)] * 2), min_size=2, max_size=9))
def test_the_divergence_is_never_negative(logits: list[tuple[float, float]]) -> None:
    both = torch.tensor(logits, dtype=torch.float64).T
    _, kl_N, _ = token_losses(both[:1], both[1:], torch.zeros(1).long(), torch.zeros(1), 1.0, 1.0)
    assert float(kl_N) >= -1e-12


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    mean = float(rewards.mean())
    assert advantages(rewards, 3, "none", mean).tolist() == rewards.tolist()
    assert advantages(rewards, 3, "mean", mean).tolist() == pytest.approx([r - 1 / 6 for r in rewards.tolist()])
    # (1, -1, 1): each less the mean of the other two; then (1, -1, 0)
    assert advantages(rewards, 3, "loo", mean).tolist() == pytest.approx([1.0, -2.0, 1.0, 1.5, -1.5, 0.0])


def test_advantages_over_the_deviation_of_a_group_by_hand() -> None:
    """TRL's: `(r - mean) / (std + 1e-4)`, with the standard deviation of a sample."""
    nan = float("nan")
    rewards = torch.tensor([1.0, -1.0, 1.0, 0.0, 4.0, nan, 7.0, nan, nan], dtype=torch.float64)
    high, low = (2 / 3) / (math.sqrt(4 / 3) + 1e-4), (-4 / 3) / (math.sqrt(4 / 3) + 1e-4)
    two = 2 / (math.sqrt(8) + 1e-4)
    expected = [high, low, high, -two, two, 0.0, 0.0, 0.0, 0.0]
    assert advantages(rewards, 3, "group", 0.0).tolist() == pytest.approx(expected)


def test_the_share_of_a_rollout_by_hand() -> None:
    assert shares_of_tokens([4, 1], "sum", 2.5, 8) == [1.0, 1.0]
    assert shares_of_tokens([4, 1], "mean", 2.5, 8) == [0.25, 1.0]
    assert shares_of_tokens([4, 1], "batch", 2.5, 8) == [0.4, 0.4]
    assert shares_of_tokens([4, 1], "limit", 2.5, 8) == [0.125, 0.125]


def test_the_surrogate_by_hand_stops_at_the_clip_on_the_side_that_it_is_pushed_to() -> None:
    ratio, advantage = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, 3.0])
    chosen_N = ratio.log().requires_grad_()
    found_N = surrogate(chosen_N, torch.zeros(6), advantage, 0.2)
    assert found_N.tolist() == pytest.approx([2.0, 1.2, -1.5, 0.5, -0.8, 3.3])
    found_N.sum().backward()
    assert chosen_N.grad is not None
    assert chosen_N.grad.tolist() == pytest.approx([2.0, 0.0, -1.5, 0.5, 0.0, 3.3])  # r A, or nothing


@pytest.mark.parametrize("reward", [-1.0, 0.1, 1 / 3])
def test_a_group_without_variance_carries_nothing(reward: float) -> None:
    """0.1 twelve times, added up and divided by 12, is not 0.1: a difference that AdamW would make a whole step of."""
    alike = torch.full((12,), reward, dtype=torch.float64)
    mean = sum([reward] * 12) / 12
    for baseline in ("mean", "loo", "group"):
        assert advantages(alike, 3, baseline, mean).tolist() == [0.0] * 12
    mixed = torch.tensor([reward, reward, reward, 1.0, -1.0, 1.0], dtype=torch.float64)
    assert advantages(mixed, 3, "loo", 0.0).tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0, -2.0, 1.0])


def test_a_rollout_without_a_reward_has_no_advantage_and_is_in_no_baseline() -> None:
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, -1.0, nan, nan, 1.0, nan, nan, nan], dtype=torch.float64)
    assert advantages(rewards, 3, "none", 0.0).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    mean = advantages(rewards, 3, "mean", 1 / 3).tolist()
    assert mean == pytest.approx([2 / 3, 0.0, -4 / 3, 0.0, 0.0, 2 / 3, 0.0, 0.0, 0.0])
    # two samples, then one alone, which nothing is compared with, then none
    assert advantages(rewards, 3, "loo", 1 / 3).tolist() == [2.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("baseline", ["none", "mean", "loo", "group"])
def test_a_worker_without_rollouts_has_no_advantages(baseline: str) -> None:
    assert advantages(torch.tensor([], dtype=torch.float64), 2, baseline, 0.5).tolist() == []


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(("lam", "temperature"), [(0.3, 1.0), (0.0, 1.0), (0.3, 0.7), (5.0, 1.6)])
def test_the_gradient_is_that_of_the_plain_algorithm(model: Model, lam: float, temperature: float) -> None:
    """Row by row, without padding or chunks: dense weights U diag(s z) V^T, one autograd graph to z."""
    z_K = random_z(model.adapter.size, 3).double().requires_grad_()
    policy, base, gain_K = plain(model), plain(model), z_K * model.adapter.s_K
    weights = {
        f"{target.name}.weight": (layer.U_Mr * gain_K[layer.span]) @ layer.Vh_rN
        for target, layer in zip(model.adapter.layout, model.adapter.layers, strict=True)
    }
    total, kl_sum = torch.zeros((), dtype=torch.float64), 0.0
    for one, advantage in zip(ROLLOUTS, ADVANTAGES, strict=True):
        prompt, answer = one.completion.prompt_ids, one.completion.token_ids
        ids = torch.tensor([prompt + answer])
        logits = functional_call(policy, weights, (ids,)).logits[0, len(prompt) - 1 : -1]
        reference = base(ids).logits[0, len(prompt) - 1 : -1]
        log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        sampled = (logits / temperature).log_softmax(-1)
        chosen = sum(sampled[i, token] for i, token in enumerate(answer))
        total = total + lam * kl - advantage * chosen
        kl_sum += float(kl.detach())
    (total / len(ROLLOUTS)).backward()
    grad_K, terms = gradient(model, z_K.detach(), lam=lam, temperature=temperature)
    assert z_K.grad is not None
    # The model's logits are float32 from the head on, whatever its weights are.
    torch.testing.assert_close(grad_K, z_K.grad, rtol=0, atol=1e-6 * float(z_K.grad.abs().max()))
    assert terms.loss == pytest.approx(float(total.detach()) / len(ROLLOUTS), rel=1e-5)
    assert terms.kl == pytest.approx(kl_sum, rel=1e-5)
    assert terms.tokens == sum(len(r.completion.token_ids) for r in ROLLOUTS)


@pytest.mark.parametrize("tokens_at_once", [1, 4, 7])
def test_chunks_of_the_vocabulary_give_what_the_whole_gives(
    model: Model, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    z_K = random_z(model.adapter.size, 3)
    whole, terms = gradient(model, z_K)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", tokens_at_once * model.hf.config.vocab_size)
    chunked, chunked_terms = gradient(model, z_K)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert (chunked_terms.loss, chunked_terms.kl) == pytest.approx((terms.loss, terms.kl), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole_batch(model: Model, size: int) -> None:
    z_K = random_z(model.adapter.size, 3)
    whole, terms = gradient(model, z_K)
    parts = [gradient(model, z_K, ROLLOUTS[i : i + size], ADVANTAGES[i : i + size]) for i in range(0, 5, size)]
    summed = torch.stack([grad for grad, _ in parts]).sum(0)
    torch.testing.assert_close(summed, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert sum(t.loss for _, t in parts) == pytest.approx(terms.loss, rel=1e-6)
    assert sum(t.tokens for _, t in parts) == terms.tokens


def test_a_micro_batch_adds_to_the_gradient_that_is_there(model: Model) -> None:
    leaf_1K = torch.ones(1, model.adapter.size, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        backward(model, leaf_1K, ROLLOUTS[:1], [1.0], lam=0.1, temperature=1.0, batch=1)
    once = torch.ones(1, model.adapter.size, dtype=torch.float64, requires_grad=True)
    backward(model, once, ROLLOUTS[:1], [1.0], lam=0.1, temperature=1.0, batch=1)
    torch.testing.assert_close(leaf_1K.grad, 2 * once.grad)


def test_at_the_base_model_the_divergence_and_its_gradient_are_zero(model: Model) -> None:
    ones = torch.ones(model.adapter.size)
    grad_K, terms = gradient(model, ones, advantage_B=[0.0] * 5, lam=1.0)
    away, _ = gradient(model, random_z(model.adapter.size, 3), advantage_B=[0.0] * 5, lam=1.0)
    assert abs(terms.kl) < 1e-6
    assert float(grad_K.abs().max()) < 1e-5 * float(away.abs().max())


def test_the_divergence_pulls_z_back_to_the_base(model: Model) -> None:
    z_K = random_z(model.adapter.size, 3, spread=0.05).double()
    grad_K, terms = gradient(model, z_K, advantage_B=[0.0] * 5, lam=1.0)
    assert terms.kl > 0
    assert float(grad_K @ (z_K - 1)) > 0  # a step against the gradient goes back towards 1


def test_a_rewarded_answer_becomes_likelier(model: Model) -> None:
    z_K = torch.ones(model.adapter.size, dtype=torch.float64)
    grad_K, before = gradient(model, z_K, ROLLOUTS[:1], [1.0], lam=0.0)
    _, after = gradient(model, z_K - 1e-3 * grad_K / grad_K.norm(), ROLLOUTS[:1], [1.0], lam=0.0)
    assert after.loss < before.loss
    assert after.loss - before.loss == pytest.approx(-1e-3 * float(grad_K.norm()), rel=0.05)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_a_prompt_that_is_read_once_for_its_samples_changes_no_gradient(
    model: Model, monkeypatch: pytest.MonkeyPatch, lam: float
) -> None:
    z_K = random_z(model.adapter.size, 3)
    batch = [*ROLLOUTS, rollout([7], [3]), rollout([30, 31, 32, 33, 34, 35], [9, 9, 1, 4, 5, 6, 7])]
    advantage_B = [*ADVANTAGES, 0.5, -0.3]
    plain_K, terms = gradient(model, z_K, batch, advantage_B, lam=lam)
    monkeypatch.setattr(families, "PASS", {"cpu": (0.0, 0)})
    read: list[int] = []
    hook = model.hf.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    try:
        shared_K, shared = gradient(model, z_K, batch, advantage_B, lam=lam)
    finally:
        hook.remove()
    assert read == [4 * 5, 7 * 7] * 2  # of the base and of the policy: the prompts but for one token, and the rest
    torch.testing.assert_close(shared_K, plain_K, rtol=0, atol=1e-6 * float(plain_K.abs().max()))
    torch.testing.assert_close(shared.chosen_N, terms.chosen_N)
    assert (shared.loss, shared.kl, shared.tokens) == pytest.approx((terms.loss, terms.kl, terms.tokens))


# -------------------------------------------------------------------------------------------------------------- its kin


def test_from_where_a_step_began_the_surrogates_gradient_is_that_of_the_plain_loss(model: Model) -> None:
    z_K = random_z(model.adapter.size, 3)
    plain_K, terms = gradient(model, z_K)
    before = terms.chosen_N.split([len(r.completion.tokens) for r in ROLLOUTS])
    again_K, _ = gradient(model, z_K, before=before)
    torch.testing.assert_close(again_K, plain_K, rtol=0, atol=1e-6 * float(plain_K.abs().max()))


@pytest.mark.parametrize("how", ["sum", "mean", "batch", "limit"])
def test_the_loss_is_the_published_one_of_padded_rows(model: Model, how: str) -> None:
    """TRL's `grpo` (mean), `dapo` (batch) and `dr_grpo` (limit), whose losses are written over (B, T) with a mask."""
    lengths = [len(r.completion.tokens) for r in ROLLOUTS]
    longest, limit, clip = max(lengths), 7, 0.2
    mask_BT = torch.tensor([[1.0] * n + [0.0] * (longest - n) for n in lengths])
    _, terms = gradient(model, random_z(model.adapter.size, 4), lam=0.0)
    before = [part + 0.3 * torch.randn(len(part)) for part in terms.chosen_N.split(lengths)]
    now_BT, before_BT = (
        torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        for parts in (terms.chosen_N.split(lengths), before)
    )
    ratio_BT, advantage_B1 = (now_BT - before_BT).exp(), torch.tensor(ADVANTAGES)[:, None]
    per_token_BT = -torch.min(ratio_BT * advantage_B1, ratio_BT.clamp(1 - clip, 1 + clip) * advantage_B1)
    masked_BT = per_token_BT * mask_BT
    expected = {
        "sum": masked_BT.sum(-1).mean(), "mean": (masked_BT.sum(-1) / mask_BT.sum(-1)).mean(),
        "batch": masked_BT.sum() / mask_BT.sum(), "limit": masked_BT.sum() / (len(lengths) * limit),
    }  # fmt: skip
    share_B = shares_of_tokens(lengths, how, sum(lengths) / len(lengths), limit)
    _, found = gradient(model, random_z(model.adapter.size, 4), lam=0.0, before=before, clip=clip, share_B=share_B)
    assert found.loss == pytest.approx(float(expected[how]), rel=1e-5)


# --------------------------------------------------------------------------------------------------- importance weights


def test_an_importance_weight_is_the_ratio_of_the_probabilities_and_cut() -> None:
    weight_N, ratio_N = importance(torch.tensor([0.3, 0.2, 0.5]).log(), torch.tensor([0.3, 0.4, 0.1]).log(), 2.0)
    assert weight_N.tolist() == pytest.approx([1.0, 0.5, 2.0]) and ratio_N.tolist() == pytest.approx([1.0, 0.5, 5.0])


def logp_of(model: Model, z_K: Tensor, one: Rollout, temperature: float) -> Tensor:
    """The trainer's log-probabilities of all tokens, at each token of an answer, (T, V)."""
    prompt, answer = one.completion.prompt_ids, one.completion.token_ids
    ids_1T = torch.tensor([[*prompt, *answer]])
    with torch.no_grad(), model.adapter.rows(z_K.double()[None]):
        logits_TV = model.logits(model.hidden(ids_1T, torch.ones_like(ids_1T)))[0]
    return (logits_TV[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def told(one: Rollout, logprobs: Sequence[float]) -> Rollout:
    """The rollout, with what its sampler says of its tokens."""
    pairs = zip(one.completion.tokens, logprobs, strict=True)
    return replace(one, completion=replace(one.completion, tokens=tuple(replace(t, logprob=p) for t, p in pairs)))


def sampled(model: Model, z_K: Tensor, over: float, temperature: float = 1.0) -> list[Rollout]:
    """The rollouts, as a sampler says them that gives every token `1 / over` of the trainer's own probability."""
    found = []
    for one in ROLLOUTS:
        token_T = torch.tensor(one.completion.token_ids)
        logp_T = logp_of(model, z_K, one, temperature).gather(-1, token_T[:, None])[:, 0]
        found.append(told(one, (logp_T - math.log(over)).tolist()))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("over", "factor", "cut"), [(1.0, 1.0, 0), (0.5, 0.5, 0), (1.9, 1.9, 0), (3.0, 2.0, 1)])
def test_every_advantage_is_multiplied_by_its_weight(
    model: Model, over: float, factor: float, cut: int, temperature: float
) -> None:
    z_K = random_z(model.adapter.size, 3)
    plain_K, _ = gradient(model, z_K, lam=0.0, temperature=temperature)
    found = sampled(model, z_K, over, temperature)
    weighted_K, terms = gradient(model, z_K, found, lam=0.0, temperature=temperature, truncate=2.0)
    torch.testing.assert_close(weighted_K, factor * plain_K, rtol=1e-4, atol=1e-6)
    assert terms.ratio / terms.tokens == pytest.approx(over, rel=1e-4) and terms.cut == cut * terms.tokens


def test_the_weight_is_that_of_the_distribution_that_was_sampled_from(model: Model) -> None:
    """Every token is drawn with probability 1 / V at T = 0.7, so that its weight is V e^(l / T) / sum e^(l / T)."""
    z_K, vocabulary = random_z(model.adapter.size, 3), model.family.vocabulary
    one = ROLLOUTS[1]
    found = told(one, [-math.log(vocabulary)] * len(one.completion.tokens))
    logit_TV = logp_of(model, z_K, one, 1.0).tolist()  # at T = 1, up to a constant
    by_hand = sum(
        vocabulary * math.exp(logit_V[id] / 0.7) / sum(math.exp(logit / 0.7) for logit in logit_V)
        for id, logit_V in zip(one.completion.token_ids, logit_TV, strict=True)
    )
    _, terms = gradient(model, z_K, [found], [1.0], temperature=0.7, truncate=2.0)
    assert terms.ratio == pytest.approx(by_hand, rel=1e-4)


def test_a_later_update_keeps_the_weight_of_the_first(model: Model) -> None:
    """What z has moved meanwhile is in the surrogate's own ratio, and must not be counted twice."""
    first_K, z_K, over = random_z(model.adapter.size, 3), random_z(model.adapter.size, 4), 1.5
    found = sampled(model, first_K, over, 0.7)
    _, terms = gradient(model, first_K, found, temperature=0.7)
    more = {"before": terms.chosen_N.split([len(r.completion.tokens) for r in found]), "clip": 0.9}
    plain_K, _ = gradient(model, z_K, found, lam=0.0, temperature=0.7, **more)
    weighted_K, again = gradient(model, z_K, found, lam=0.0, temperature=0.7, truncate=2.0, **more)
    torch.testing.assert_close(weighted_K, over * plain_K, rtol=1e-4, atol=1e-6)
    assert again.ratio / again.tokens == pytest.approx(over, rel=1e-4)
