"""Sparse SVF: a support's vectors compute what the whole factors compute, train what they hold, and refuse the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import load_as, random_z, token_rows
from test_longer import made
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.model import Model, load_model
from t2ray.adapters.sparse import held, joined, shared_support, sparsify, support_of
from t2ray.cli.main import main
from t2ray.cluster.train.launch import train
from t2ray.core import ConfigError, ExpertError, Mixture, RunError
from t2ray.experts.exchange import export_expert, import_expert
from t2ray.experts.follow import Follower
from t2ray.experts.registry import Registry
from t2ray.runs.prepare import prepare

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}
LEARNS = {"steps": 12, "eval_every": 6, "prompts": 8, "samples": 4, "lr": 0.2, "eval_prompts": 16}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def pair(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Model]:
    """The tiny Llama with whole factors and those of a tenth of the components, none in the last matrix."""
    folder = tmp_path_factory.mktemp("sparse")
    whole = load_as(request.param, tiny_llama, folder)
    factors = Factors.open(folder / "factors")
    most = whole.adapter.size - factors.layout[-1].rank
    support_S = torch.randperm(most, generator=torch.Generator().manual_seed(0))[: whole.adapter.size // 10]
    sparsify(factors, support_S.sort().values, folder / "few")
    few = load_model(str(folder / "model"), folder / "few", device="cpu")
    for ours, theirs in zip(few.hf.modules(), whole.hf.modules(), strict=True):
        if "Norm" in type(ours).__name__:
            ours.forward = theirs.forward  # in float64 they are exact
    return whole, few


def supported(few: Model, seed: int) -> Tensor:
    """A random z, (K,), that is 1 outside of the support."""
    assert few.adapter.support_S is not None  # type: ignore[attr-defined]
    place: Tensor = few.adapter.support_S  # type: ignore[attr-defined]
    return few.adapter.neutral.index_copy(0, place, random_z(few.adapter.size, seed)[place])


def logits(model: Model, z_RK: Tensor, index: Tensor | None, ids_BT: Tensor) -> Tensor:
    with model.adapter.rows(z_RK, index):
        out: Tensor = model.hf(input_ids=ids_BT, use_cache=False).logits
    return out


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[b.dtype] * float(b.abs().max()))


def test_a_mixed_batch_is_that_of_the_whole_factors(pair: tuple[Model, Model]) -> None:
    whole, few = pair
    z_RK = torch.stack([few.adapter.neutral, supported(few, 1), supported(few, 2)])
    ids, index = token_rows(few, 4, 9), torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        mixed, alone = logits(few, z_RK, index, ids), logits(few, z_RK[1:2], None, ids)
        close(mixed, logits(whole, z_RK, index, ids))
        close(logits(few, z_RK[:1], None, ids), whole.hf(input_ids=ids, use_cache=False).logits)
        with few.adapter.each([z_RK[i] for i in index]):
            close(few.hf(input_ids=ids, use_cache=False).logits, mixed)
        if few.hf.dtype != torch.bfloat16:  # where no mixture is folded
            with few.adapter.folded(z_RK[1]):
                close(few.hf(input_ids=ids, use_cache=False).logits, alone)


def test_only_the_support_has_a_gradient_and_it_is_that_of_the_whole_factors(pair: tuple[Model, Model]) -> None:
    whole, few = pair
    ids = token_rows(few, 2, 7)
    gradients = []
    for model in (few, whole):
        p_K = supported(few, 1).requires_grad_()
        z_K = model.adapter.vector("scale", p_K)
        logits(model, z_K[None], None, ids).double().square().mean().backward()
        assert p_K.grad is not None
        gradients.append(p_K.grad)
    kept = support_of(Factors.open(_folder(few)))  # as it stands in the files
    assert kept is not None and torch.equal(kept, few.adapter.support_S)  # type: ignore[attr-defined]
    torch.testing.assert_close(
        gradients[0][kept],
        gradients[1][kept],
        rtol=0,
        atol=5 * TOLERANCE[few.hf.dtype] * float(gradients[1].abs().max()),
    )
    assert int(gradients[0].count_nonzero()) <= len(kept) < few.adapter.size / 9
    start_K = random_z(few.adapter.size, 3)  # of a dense run
    z_K = few.adapter.vector("scale", few.adapter.initial("scale", torch.zeros(few.adapter.size), start_K))
    assert torch.equal(z_K[kept], start_K[kept]) and int((z_K != 1).sum()) == len(kept)


def _folder(few: Model) -> Path:
    return Path(few.hf.config._name_or_path).parent / "few"


def test_what_the_support_does_not_hold_is_refused(pair: tuple[Model, Model]) -> None:
    whole, few = pair
    with pytest.raises(ExpertError, match=r"changes \d+ singular values of which the sparse factors have no vectors"):
        few.adapter.set_experts({"dense": random_z(few.adapter.size, 1)})
    assert few.adapter.bank == {}
    one_K = supported(few, 1)
    few.adapter.set_experts({"one": one_K})
    whole.adapter.set_experts({"one": one_K})
    assert torch.equal(few.adapter.mix(Mixture.of({"one": 0.5})), whole.adapter.mix(Mixture.of({"one": 0.5})))
    for (_, left, right), (_, whole_left, whole_right) in zip(
        few.adapter.changes(one_K), whole.adapter.changes(one_K), strict=True
    ):
        torch.testing.assert_close(left @ right, whole_left @ whole_right, rtol=1e-4, atol=1e-5)
    for model in pair:
        model.adapter.set_experts({}, ["one"])


def test_the_support_is_what_some_expert_moves_most(pair: tuple[Model, Model]) -> None:
    whole, few = pair
    factors = Factors.open(_folder(few).parent / "factors")
    s_K = torch.cat([factors.load(target.name)[1].float() for target in factors.layout])
    one, other = torch.ones(2, len(s_K)).unbind()
    one[7], one[8] = 1 + 30 / s_K[7], 1 + 40 / s_K[8]  # |c| / ||c|| of 0.6 and 0.8
    other[3], other[5], other[6] = 1 - 2 / s_K[3], 1 + 1 / s_K[5], 1 + 2 / s_K[6]  # of 2/3, 1/3 and 2/3
    assert shared_support(factors, [one, other], 3.5 / len(s_K)).tolist() == [3, 6, 8]
    with pytest.raises(ConfigError, match="holds sparse factors; choose a support of the whole ones"):
        sparsify(Factors.open(_folder(few)), torch.tensor([1]), _folder(few).parent / "new")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        sparsify(factors, torch.tensor([1]), _folder(few))


def test_a_run_is_sparsified_trained_on_and_resumed_with_its_own_support_alone(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = made(tiny_llama, tmp_path, "dense", LEARNS)
    assert train(dense)["letters"].better
    assert main(["experts", "sparsify", "--run", str(tmp_path / "dense"), "--out", str(tmp_path / "few")]) == 0
    assert "from=RUN factors=" in " ".join(capsys.readouterr().out.split())
    few = {"from": str(tmp_path / "dense"), "factors": str(tmp_path / "few")}
    sparse = made(tiny_llama, tmp_path, "sparse", LEARNS, **few)
    train(sparse)
    factors, registry = Factors.open(tmp_path / "few"), Registry(tmp_path / "sparse" / "experts")
    z_K, dense_z = held(factors, registry.load("letters").z), Registry(tmp_path / "dense" / "experts").load("letters").z
    start_K, support_S = joined(factors.layout, dense_z), support_of(factors)
    assert support_S is not None and len(support_S) == factors.K // 10
    assert int((z_K != 1).sum()) == len(support_S)
    assert not torch.equal(z_K[support_S], start_K[support_S])  # it was trained on
    with pytest.raises(RunError, match="another configuration: factors: .*few, now .*of another support"):
        prepare(sparse.model_copy(update={"factors": dense.factors}), resume=True)
    assert train(sparse, resume=True)["letters"].steps == 12
    # a sparse expert works with whole factors, and a dense one not with sparse factors: an endpoint names it
    for folder, sound in ("sparse", True), ("dense", False):
        follower = Follower(
            Registry(tmp_path / folder / "experts"), factors.base_digest, factors.layout, lambda z: held(factors, z)
        )
        follower.sync()
        assert (follower.snapshot.tensors.keys() == {"letters"}) is sound
        assert ("sparse factors have no vectors" in follower.snapshot.problems.get("letters", "")) is not sound
    for name, number in ("dense", 0), ("sparse", 1):  # so is an import
        folder, there = tmp_path / f"{name}_file", Registry(tmp_path / "there")
        export_expert(Registry(tmp_path / name / "experts").load("letters"), folder)
        if number:
            assert import_expert(there, "new", folder, factors) == number
        else:
            with pytest.raises(ExpertError, match="sparse factors have no vectors"):
                import_expert(there, "new", folder, factors)
            assert there.names() == ()
    assert main(["experts", "sparsify", "--run", str(tmp_path / "dense"), "--keep", "1", "--out", "x"]) == 2
    assert "--keep 1: a share of the components above 0 and below 1" in capsys.readouterr().err
