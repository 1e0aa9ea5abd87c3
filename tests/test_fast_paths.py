"""Each fast path beside the plain one: in float64 where it has one, else its float32 beside a float64 product."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import load_as, random_z, together, token_rows
from torch import Tensor, nn

from t2ray.adapters.layer import Bound, SVFLinear, linear, packed
from t2ray.adapters.model import Model
from t2ray.core import Completion, Mixture, SamplingParams, user
from t2ray.engine import batches as static
from t2ray.engine.cache import RoomyLayer, roomy_cache
from t2ray.engine.offline import OfflineEngine
from t2ray.models import families
from t2ray.prompts import dispatch_prompt

EPS = torch.finfo(torch.float32).eps
SIZES = [(16, 16), (64, 24), (24, 64), (129, 77), (1, 5)]
MIXTURE = Mixture.parse("math:0.6,dispatch:0.4")
LABELS = ("math", "code", "pick", "others")


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float64, tiny_llama, tmp_path_factory.mktemp("float64"))


@pytest.fixture
def model(loaded: Model) -> Iterator[Model]:
    loaded.adapter.bank = {"math": random_z(loaded.adapter.size, 1), "dispatch": random_z(loaded.adapter.size, 2)}
    yield loaded
    loaded.adapter.bank = {}


# ----------------------------------------------------------------------------------------------------- packed products


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_product_is_the_float64_product_to_rounding(m: int, n: int, rows: int, biased: bool) -> None:
    weight_MN, x = gaussian(m, n), gaussian(2, rows, n, seed=1)
    bias = gaussian(m, seed=2) if biased else None
    exact = torch.nn.functional.linear(x.double(), weight_MN.double(), None if bias is None else bias.double())
    scale = x.double().abs() @ weight_MN.double().abs().T + 1  # what rounding errors are proportional to
    assert ((linear(x, packed(weight_MN), bias) - exact).abs() <= 2 * n**0.5 * EPS * scale).all()


def test_a_packed_product_takes_rows_that_lie_apart() -> None:
    weight_MN, x = gaussian(24, 16), gaussian(3, 5, 32, seed=1)[:, ::2, 7:23]
    torch.testing.assert_close(linear(x, packed(weight_MN), None), x @ weight_MN.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_is_packed(dtype: torch.dtype) -> None:
    weight_MN = gaussian(8, 8).to(dtype)
    assert packed(weight_MN) is weight_MN


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_factored_and_folded_without_gradients_are_the_float64_layer(m: int, n: int) -> None:
    rank = min(m, n)
    U_Mr, s_r, Vh_rN = torch.linalg.svd(gaussian(m, n).double(), full_matrices=False)
    dense = nn.Linear(n, m)
    with torch.no_grad():
        dense.weight.copy_((U_Mr * s_r) @ Vh_rN)
    layer = SVFLinear(dense.weight, dense.bias, U_Mr.float(), Vh_rN.float(), slice(2, 2 + rank), Bound())
    x, z_RK = gaussian(3, 4, n, seed=1), 1 + gaussian(2, rank + 5, seed=2)
    gain_RK = torch.zeros_like(z_RK)
    gain_RK[:, 2 : 2 + rank] = z_RK[:, 2 : 2 + rank] * s_r
    layer.bound.gain_RK, layer.bound.row_index = gain_RK, torch.tensor([1, 0, 1])
    plain = layer(x)
    with torch.no_grad():
        fast = layer(x)
        layer.fold((gain_RK[0, 2 : 2 + rank] - s_r).float())
        layer.bound.gain_RK, layer.bound.folded = None, True
        folded = layer(x)
    for row, i in enumerate([1, 0, 1]):
        weight_MN = (U_Mr * gain_RK[i, 2 : 2 + rank]) @ Vh_rN
        exact = torch.nn.functional.linear(x[row].double(), weight_MN, dense.bias.double()).float()
        torch.testing.assert_close(fast[row], exact, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(plain[row], exact, atol=2e-5, rtol=1e-5)
        if i == 0:
            torch.testing.assert_close(folded[row], exact, atol=2e-5, rtol=1e-5)


def test_a_forward_with_gradients_never_goes_through_packed_factors(tiny_llama: Path, tmp_path: Path) -> None:
    single = load_as(torch.float32, tiny_llama, tmp_path)
    z_1K = random_z(single.adapter.size, 3)[None].requires_grad_()
    ids_BT = token_rows(single, 2, 6)
    with single.adapter.rows(z_1K):
        single.hidden(ids_BT, torch.ones_like(ids_BT)).sum().backward()
    assert z_1K.grad is not None and (z_1K.grad != 0).all()
    assert all(layer.packed_factors is None for layer in single.adapter.layers)


# --------------------------------------------------------------------------------------------------- cache with room


def test_generation_with_a_roomy_cache_has_the_logits_of_generation_without(model: Model) -> None:
    ids_BT = token_rows(model, 3, 7)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    settings = {
        "attention_mask": mask_BT, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True, "eos_token_id": None,
    }  # fmt: skip
    cache = roomy_cache(model.hf.config, 16)
    fast, plain = model.hf.generate(ids_BT, past_key_values=cache, **settings), model.hf.generate(ids_BT, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(plain.logits), atol=1e-12, rtol=0)
    assert cache.get_seq_length() == 15  # the last token is not read
    for ours, theirs in zip(cache.layers, plain.past_key_values.layers, strict=True):
        assert isinstance(ours, RoomyLayer)
        assert ours.keys.data_ptr() == ours.rooms[0].data_ptr()  # nothing was copied
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------- shared prefix

QUESTIONS = ["2+2", "tell me something long about nothing", "a", "why?", "b b b"]


def scores(model: Model, mixtures: list[Mixture]) -> tuple[Tensor, int]:
    """The labels' scores, (B, L), and how many token positions the model was given."""
    given: list[int] = []
    hook = model.hf.get_input_embeddings().register_forward_hook(lambda _, args, out: given.append(args[0].numel()))
    runner = OfflineEngine(model)
    prompts = [dispatch_prompt(user(question), LABELS) for question in QUESTIONS]
    rows = together(*(runner.score(p, LABELS, m) for p, m in zip(prompts, mixtures, strict=True)))
    hook.remove()
    return torch.tensor(rows), sum(given)


@pytest.mark.parametrize("mixture", ["dispatch", "base", "math:0.5,dispatch:0.5"])
def test_a_prefix_that_is_read_once_changes_no_score(
    model: Model, mixture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtures = [Mixture.parse(mixture)] * len(QUESTIONS)
    shared, few = scores(model, mixtures)
    monkeypatch.setattr(static, "SHARED_TOKENS", 10**9)
    plain, many = scores(model, mixtures)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)  # scores leave the engine as float32
    assert few < 0.6 * many


def test_prompts_of_several_mixtures_share_no_prefix(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    mixtures = [Mixture.parse(text) for text in ("dispatch", "math", "dispatch", "base", "math")]
    given = scores(model, mixtures)[1]
    monkeypatch.setattr(static, "SHARED_TOKENS", 10**9)
    assert given == scores(model, mixtures)[1]


def test_equal_prompts_keep_a_token_of_their_own(model: Model) -> None:
    runner = OfflineEngine(model)
    prompt = user("the very same prompt, which is long enough to be worth a pass of its own")
    rows = together(*(runner.score(prompt, LABELS, Mixture.parse("math")) for _ in range(4)))
    alone = together(runner.score(prompt, LABELS, Mixture.parse("math")))
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(alone).expand(4, -1), atol=1e-5, rtol=0)


def test_the_head_gets_what_lies_in_one_piece_also_of_the_last_tokens_alone(model: Model) -> None:
    """torch multiplies `hidden[:, -1:]` of a batch in bfloat16 hundreds of times more slowly."""
    pieces: list[bool] = []
    hook = model.family.head.register_forward_hook(lambda _, args, out: pieces.append(args[0].is_contiguous()))
    try:
        ids_BT = token_rows(model, 3, 5)
        with torch.no_grad():
            alone = model.hf(input_ids=ids_BT, logits_to_keep=1).logits
            whole = model.hf(input_ids=ids_BT).logits
    finally:
        hook.remove()
    assert pieces == [True, True]
    torch.testing.assert_close(alone, whole[:, -1:])


def test_a_prompt_is_read_once_and_rows_that_ended_leave_and_no_answer_changes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["2+2", "2+2", "tell me something long about nothing", "a", "2+2", "tell me something long about nothing"]
    weights = [MIXTURE, MIXTURE, MIXTURE, Mixture.base(), Mixture.base(), MIXTURE]
    lengths = [2, 14, 1, 3, 9, 2]
    sampling = [
        SamplingParams(max_tokens=n, temperature=t, seed=i, ignore_eos=True, stop=("never",) if i == 4 else ())
        for i, (n, t) in enumerate(zip(lengths, [1.0, 0.0, 1.0, 1.0, 0.7, 0.0], strict=True))
    ]

    def answers() -> tuple[list[Completion], list[int]]:
        read: list[int] = []
        hook = model.hf.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
        engine = OfflineEngine(model)
        try:
            asked = zip(prompts, weights, sampling, strict=True)
            return together(*(engine.generate(user(prompt), *rest) for prompt, *rest in asked)), read
        finally:
            hook.remove()

    plain, all_read = answers()
    monkeypatch.setattr(families, "PASS", {"cpu": (0.0, 0)})
    found, read = answers()
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    for one, other in zip(found, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6) and one.finish_reason == other.finish_reason
    ids = {
        (prompt, mixture): len(model.chat.ids(user(prompt))) for prompt, mixture in zip(prompts, weights, strict=True)
    }
    assert all_read == [6 * max(ids.values())] + [6] * 13
    assert sum(read) < sum(ids.values()) + 6 + sum(lengths) + 8 and read[-1] == 1
