"""SVF layers: exact by row and by token, exact when folded, differentiated in z alone; and the mixing of experts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import load_as, plain, random_z, token_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2ray.adapters.factors import Factors, Target
from t2ray.adapters.model import Model
from t2ray.adapters.svf import SVF
from t2ray.adapters.trained import Few, parametrise
from t2ray.config.adapter import AdapterConfig
from t2ray.core import ExpertError, Mixture, UnknownExpert

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def loaded(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(request.param, tiny_llama, tmp_path_factory.mktemp("svf"))


@pytest.fixture(scope="module")
def loaded64(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float64, tiny_llama, tmp_path_factory.mktemp("svf64"))


def with_experts(model: Model) -> Iterator[Model]:
    model.adapter.bank = {
        name: random_z(model.adapter.size, seed) for seed, name in enumerate(("math", "code", "pick"))
    }
    yield model
    model.adapter.bank = {}


@pytest.fixture
def model(loaded: Model) -> Iterator[Model]:
    yield from with_experts(loaded)


@pytest.fixture
def model64(loaded64: Model) -> Iterator[Model]:
    yield from with_experts(loaded64)


def forward(model: Model, ids_BT: Tensor) -> Tensor:
    """Logits in the model's own precision, (B, T, V)."""
    with torch.no_grad():
        logits: Tensor = model.hf(input_ids=ids_BT, use_cache=False).logits
    return logits


def close(model: Model, a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[model.hf.dtype] * float(b.abs().max()))


# -------------------------------------------------------------------------------------------------------- equivalences


def test_with_nothing_bound_it_is_the_base_model_bit_for_bit(model: Model) -> None:
    ids = token_rows(model, 2, 9)
    assert torch.equal(forward(model, ids), plain(model)(input_ids=ids, use_cache=False).logits)


def test_z_of_one_is_the_base_model(model: Model) -> None:
    ids = token_rows(model, 2, 9)
    with model.adapter.rows(torch.ones(1, model.adapter.size)):
        close(model, forward(model, ids), plain(model)(input_ids=ids).logits)


def test_an_expert_answers_unlike_the_base(model: Model) -> None:
    ids = token_rows(model, 2, 9)
    with model.adapter.rows(model.adapter.bank["math"][None]):
        difference = forward(model, ids)
    assert float((difference - forward(model, ids)).abs().max()) > 0.5


def test_a_row_of_a_mixed_batch_is_that_row_alone(model: Model) -> None:
    ids, index = token_rows(model, 5, 9), [0, 1, 2, 1, 3]
    z_RK = torch.stack([*model.adapter.bank.values(), torch.ones(model.adapter.size)])
    with model.adapter.rows(z_RK, torch.tensor(index)):
        mixed = forward(model, ids)
    for row, z in enumerate(index):
        with model.adapter.rows(z_RK[z : z + 1]):
            close(model, mixed[row : row + 1], forward(model, ids[row : row + 1]))


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_inference_gives_what_training_differentiates(model: Model, rows: int) -> None:
    """Without autograd the factors may lie in another layout."""
    ids, z_RK = token_rows(model, rows, 9), torch.stack(list(model.adapter.bank.values())).requires_grad_()
    with model.adapter.rows(z_RK, torch.arange(rows) % 3):
        differentiable = model.hf(input_ids=ids, use_cache=False).logits
        assert differentiable.requires_grad
        close(model, forward(model, ids), differentiable.detach())


@pytest.mark.parametrize("text", ["math", "math:0.7,code:0.3", "base", "math:-0.5,pick:1.5"])
def test_folded_equals_factored(model: Model, text: str) -> None:
    ids, mixture = token_rows(model, 3, 9), Mixture.parse(text)
    with model.adapter.rows(model.adapter.mix(mixture)[None]):
        factored = forward(model, ids)
    with model.adapter.folded(model.adapter.mix(mixture)):
        close(model, forward(model, ids), factored)


def test_rows_with_a_z_each_are_those_of_a_table_bit_for_bit_whatever_was_bound_before(model: Model) -> None:
    a, b, _ = model.adapter.bank.values()
    ids, same = token_rows(model, 3, 9), b.clone()
    for z in ([a, None, b], [a, None, b], [b, None, a], [a, None, same], [a, a, a]):
        with model.adapter.rows(model.adapter.table(z), torch.arange(3)):
            expected = forward(model, ids)
        with model.adapter.each(z):
            assert torch.equal(forward(model, ids), expected)
    with model.adapter.each([a]):
        alone = forward(model, ids[:1])
    close(model, alone, expected[:1])


def test_an_index_by_token_equals_an_index_by_row(model: Model) -> None:
    z_RK = torch.stack(list(model.adapter.bank.values()))
    for layer in model.adapter.layers[:7]:
        x_BTN = torch.randn(4, 6, layer.weight.shape[1], dtype=layer.weight.dtype)
        index = torch.tensor([2, 0, 1, 0])
        with model.adapter.rows(z_RK, index):
            by_row = layer(x_BTN)
        with model.adapter.rows(z_RK, index.repeat_interleave(6)):
            close(model, layer(x_BTN.reshape(1, 24, -1)).reshape_as(by_row), by_row)


def test_a_fold_follows_its_expert(model: Model) -> None:
    """An expert that is trained changes under one name: the folded weights must not be the old ones."""
    ids, mixture = token_rows(model, 1, 5), Mixture.parse("math")
    with model.adapter.folded(model.adapter.mix(mixture)):
        before = forward(model, ids)
    assert model.adapter.is_folded(model.adapter.mix(mixture))
    model.adapter.bank["math"] = random_z(model.adapter.size, 99)
    assert not model.adapter.is_folded(model.adapter.mix(mixture))
    with model.adapter.folded(model.adapter.mix(mixture)):
        after = forward(model, ids)
    assert float((after - before).abs().max()) > 0.1
    with model.adapter.rows(model.adapter.bank["math"][None]):
        close(model, after, forward(model, ids))


def test_experts_that_are_added_change_nothing_for_the_others_bit_for_bit(model: Model) -> None:
    ids, mixture = token_rows(model, 2, 7), Mixture.parse("math:0.7,code:0.3")

    def outputs() -> list[Tensor]:
        with model.adapter.rows(
            torch.stack([model.adapter.mix(mixture), model.adapter.bank["pick"]]), torch.tensor([0, 1])
        ):
            factored = forward(model, ids)
        with model.adapter.folded(model.adapter.mix(mixture)):
            return [factored, forward(model, ids), forward(model, ids)]

    before = outputs()
    for seed in range(20):
        model.adapter.bank[f"new-{seed}"] = random_z(model.adapter.size, 100 + seed)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))


def test_singular_values_keep_their_precision_under_a_bfloat16_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_as(torch.bfloat16, tiny_llama, tmp_path)
    stored = torch.cat([Factors.open(tmp_path / "factors").load(target.name)[1] for target in model.adapter.layout])
    assert model.adapter.s_K.dtype == torch.float32
    assert torch.equal(model.adapter.s_K, stored)
    assert not torch.equal(stored, stored.bfloat16().float())
    assert all(
        layer.weight.dtype == layer.U_Mr.dtype == layer.Vh_rN.dtype == torch.bfloat16 for layer in model.adapter.layers
    )
    # A z so near to 1 that bfloat16 would round it away still moves the output.
    ids = token_rows(model, 4, 9)
    with model.adapter.rows(torch.ones(1, model.adapter.size)):
        at_one = forward(model, ids)
    with model.adapter.rows(torch.full((1, model.adapter.size), 1.002)):
        assert not torch.equal(forward(model, ids), at_one)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_the_gradient_of_z_is_that_of_finite_differences(model64: Model) -> None:
    ids, generator = token_rows(model64, 3, 5), torch.Generator().manual_seed(1)
    weight = torch.randn(3, 5, model64.hf.config.vocab_size, generator=generator, dtype=torch.float64)
    index = torch.tensor([0, 1, 0])
    z_RK = torch.stack([random_z(model64.adapter.size, 5), random_z(model64.adapter.size, 6)]).double().requires_grad_()

    def f(z_RK: Tensor) -> Tensor:
        with model64.adapter.rows(z_RK, index):
            return (model64.hf(input_ids=ids, use_cache=False).logits * weight).sum()

    f(z_RK).backward()
    assert z_RK.grad is not None
    for _ in range(8):
        direction = torch.randn(z_RK.shape, generator=generator, dtype=torch.float64)
        h = 1e-6
        with torch.no_grad():
            slope = (f(z_RK + h * direction) - f(z_RK - h * direction)) / (2 * h)
        torch.testing.assert_close((z_RK.grad * direction).sum(), slope, rtol=1e-6, atol=1e-6)


class Watch(TorchDispatchMode):
    """Collects the shapes of matrices that operations allocate: what is no view of a tensor there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.made.add(tuple(tensor.shape))
        return out


def test_only_z_gets_a_gradient_and_no_weights_gradient_is_ever_allocated(model: Model) -> None:
    ids, hf = token_rows(model, 3, 7), model.hf  # 21 tokens: no activation has a weight's shape
    z_1K = torch.ones(1, model.adapter.size, requires_grad=True)
    shapes = {tuple(p.shape) for p in hf.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    known = [*hf.parameters(), *hf.buffers()]

    def backward() -> set[tuple[int, ...]]:
        with model.adapter.rows(z_1K):
            loss = hf(input_ids=ids, use_cache=False).logits.square().mean()
        with Watch(known) as watch:
            loss.backward()
        return watch.made & shapes

    assert backward() == set()
    assert z_1K.grad is not None and float(z_1K.grad.abs().sum()) > 0
    assert [name for name, p in hf.named_parameters() if p.requires_grad or p.grad is not None] == []
    # The watch does see a weight's gradient where there is one.
    head = hf.get_output_embeddings().weight.requires_grad_()
    assert backward() != set()
    head.requires_grad_(False).grad = None


# ------------------------------------------------------------------------------------------------------------ bindings


@pytest.mark.parametrize("outer", ["rows", "folded"])
@pytest.mark.parametrize("inner", ["rows", "folded"])
def test_bindings_refuse_to_nest(model: Model, outer: str, inner: str) -> None:
    def bind(kind: str) -> Any:
        return (
            model.adapter.folded(model.adapter.bank["math"])
            if kind == "folded"
            else model.adapter.rows(torch.ones(1, model.adapter.size))
        )

    with bind(outer), pytest.raises(AssertionError, match="do not nest"), bind(inner):
        pass


@pytest.mark.parametrize("kind", ["rows", "folded"])
def test_an_exception_unbinds(model: Model, kind: str) -> None:
    ids = token_rows(model, 1, 4)
    base = forward(model, ids)
    z = model.adapter.bank["math"][None]
    binding = model.adapter.folded(model.adapter.bank["math"]) if kind == "folded" else model.adapter.rows(z)
    with pytest.raises(KeyboardInterrupt), binding:
        assert not torch.equal(forward(model, ids), base)
        raise KeyboardInterrupt
    assert torch.equal(forward(model, ids), base)


def test_a_binding_is_its_threads_own(model: Model) -> None:
    ids = token_rows(model, 1, 4)
    base, seen = forward(model, ids), []
    with model.adapter.rows(model.adapter.bank["math"][None]):
        thread = threading.Thread(target=lambda: seen.append(forward(model, ids)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], base)


def test_rows_of_another_length_are_a_mistake(model: Model) -> None:
    with pytest.raises(AssertionError), model.adapter.rows(torch.ones(1, model.adapter.size + 1)):
        pass
    with pytest.raises(AssertionError), model.adapter.rows(torch.ones(2, model.adapter.size)):  # which row is which?
        pass


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_weights_that_sum_to_one_give_the_papers_sum(model: Model) -> None:
    bank = model.adapter.bank
    paper = 0.5 * bank["math"] + 0.3 * bank["code"] + 0.2 * bank["pick"]
    torch.testing.assert_close(model.adapter.mix(Mixture.parse("math:0.5,code:0.3,pick:0.2")), paper)


def test_the_base_holds_what_the_weights_leave(model: Model) -> None:
    bank = model.adapter.bank
    assert torch.equal(model.adapter.mix(Mixture.base()), torch.ones(model.adapter.size))
    torch.testing.assert_close(model.adapter.mix(Mixture.parse("math:0.4")), 0.6 + 0.4 * bank["math"])


def test_weights_by_layer_reach_their_layers(model: Model) -> None:
    z_K = model.adapter.mix(Mixture.of({"math": [0.25, 2.0], "code": 1.0}))
    for target, z_r in zip(model.adapter.layout, model.adapter.split(z_K).values(), strict=True):
        math, code = (model.adapter.split(model.adapter.bank[name])[target.name] for name in ("math", "code"))
        torch.testing.assert_close(z_r, 1 + (0.25, 2.0)[target.layer] * (math - 1) + (code - 1))


def test_a_wrong_number_of_layers_is_refused(model: Model) -> None:
    with pytest.raises(ExpertError, match=r"'math' has 3 weights by layer; the model has 2 layers"):
        model.adapter.mix(Mixture.of({"math": [1.0, 1.0, 1.0]}))


def test_an_unknown_expert_names_the_nearest(model: Model) -> None:
    with pytest.raises(UnknownExpert) as caught:
        model.adapter.mix(Mixture.parse("maths"))
    assert str(caught.value) == "unknown expert 'maths'; did you mean 'math'? (known: code, math, pick)"


def test_equal_parameters_of_a_sigmoid_are_the_base_model(model: Model) -> None:
    svf = model.adapter
    ranks = [target.rank for target in svf.layout]
    for value in (-2.0, 0.1, 3.0):
        z_K = parametrise(torch.full((svf.size,), value), "sigmoid", svf.s_K, ranks)
        torch.testing.assert_close(z_K, torch.ones(svf.size), rtol=1e-5, atol=0)


def test_a_sigmoid_is_rescaled_matrix_by_matrix() -> None:
    """By hand: sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4; s = (2, 1) gives sum s / sum s z = 3 / 1.75."""
    p_K = torch.tensor([0.0, 3.0, 0.0]).log().nan_to_num(neginf=0.0)
    z_K = parametrise(p_K, "sigmoid", torch.tensor([2.0, 1.0, 5.0]), [2, 1])
    torch.testing.assert_close(z_K, torch.tensor([0.5 * 3 / 1.75, 0.75 * 3 / 1.75, 1.0]))


def test_the_parameters_of_a_scale_are_z_itself() -> None:
    p_K = torch.tensor([0.5, 2.0])
    assert parametrise(p_K, "scale", torch.ones(2), [2]) is p_K


LAYOUT = [
    Target(name=f"layers.{layer}.{kind}", layer=layer, m=3, n=3, rank=rank)
    for layer in range(2)
    for kind, rank in (("up", 3), ("down", 2))
]


@pytest.mark.parametrize(
    ("config", "z"),
    [
        ({"numbers": 1}, [2, 1, 1, 3, 1, 4, 1, 1, 5, 1]),
        ({"numbers": 9, "tied": "layers"}, [2, 3, 4, 5, 6, 2, 3, 4, 5, 6]),
        ({"numbers": 2, "tied": "all"}, [2, 3, 1, 2, 3, 2, 3, 1, 2, 3]),
    ],
    ids=str,
)
def test_few_numbers_scale_the_largest_singular_values_of_each_matrix_or_of_all_that_are_tied(
    config: dict[str, Any], z: list[float]
) -> None:
    few = Few(LAYOUT, AdapterConfig(**config), torch.device("cpu"))
    p_P = (2 + torch.arange(float(len(few.first_P)))).requires_grad_()
    z_K = few.spread(p_P)
    assert z_K.tolist() == z
    assert torch.equal(few.of(z_K), p_P)
    z_K.sum().backward()  # a number's gradient is the sum of those of what it scales
    assert p_P.grad is not None
    assert p_P.grad.tolist() == [z.count(value) for value in p_P.tolist()]


def test_a_tower_and_the_decoder_have_no_numbers_in_common_where_layers_are_tied() -> None:
    """Else rollouts without pictures would move the tower."""
    tower = [replace(target, name=f"tower.{target.name}", layer=-1) for target in LAYOUT]
    few = Few([*tower, *LAYOUT], AdapterConfig(numbers=1, tied="layers"), torch.device("cpu"))
    z_K = few.spread(2 + torch.arange(float(len(few.first_P))))
    assert z_K.tolist() == [2, 1, 1, 3, 1] * 2 + [4, 1, 1, 5, 1] * 2


def test_few_numbers_start_from_what_they_can_say_and_refuse_the_rest(model: Model) -> None:
    hf, folder = plain(model), Path(model.hf.config._name_or_path).parent / "factors"
    svf = SVF(hf, Factors.open(folder), AdapterConfig(numbers=2, tied="layers"))
    noise_K = torch.zeros(svf.size)
    p_P = svf.initial("scale", noise_K)
    assert torch.equal(svf.vector("scale", p_P), svf.neutral)
    moved_P = p_P + torch.arange(1.0, len(p_P) + 1)
    assert torch.equal(svf.initial("scale", noise_K, svf.vector("scale", moved_P)), moved_P)
    with pytest.raises(ExpertError, match="leave out adapter.numbers"):
        svf.initial("scale", noise_K, random_z(svf.size, 1))
    with pytest.raises(ExpertError, match="need init: scale and whole factors"):
        svf.initial("sigmoid", noise_K)


def test_factors_of_another_shape_are_refused(model: Model, tiny_llama: Path, tmp_path: Path) -> None:
    factors = Factors.open(Path(model.hf.config._name_or_path).parent / "factors")
    with pytest.raises(ExpertError, match=r"the decomposition has model.layers.0.self_attn.q_proj \(32 x 32\)"):
        SVF(torch.nn.Linear(3, 3), factors)


# ------------------------------------------------------------------------------------------------------------- vectors


def test_a_vector_is_split_by_target_and_joined_again_with_1_where_a_target_is_missing(model: Model) -> None:
    adapter = model.adapter
    z_K = random_z(adapter.size, 3)
    parts = dict(adapter.split(z_K))
    assert list(parts) == [target.name for target in adapter.layout]
    assert torch.equal(adapter.join(dict(reversed(parts.items()))), z_K)
    first, *_ = adapter.layout
    del parts[first.name]
    joined = adapter.join(parts)
    assert joined.dtype == torch.float32 and torch.equal(joined[: first.rank], torch.ones(first.rank))
    assert torch.equal(joined[first.rank :], z_K[first.rank :])


@pytest.mark.parametrize("kind", ["scale", "sigmoid"])
def test_training_starts_from_the_neutral_vector(model: Model, kind: str) -> None:
    start = model.adapter.initial(kind, torch.zeros(model.adapter.size))
    torch.testing.assert_close(model.adapter.vector(kind, start), model.adapter.neutral, rtol=0, atol=1e-6)
