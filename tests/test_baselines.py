"""LoRA, DoRA, IA3 and TinyLoRA are PEFT's, to the gradient; they train, resume, mix and are stored as SVF is."""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, TinyLoraConfig, get_peft_model
from small import letter_task, plain, random_z, rollout, sampler, together, token_rows, verify_letters
from torch import Tensor

from t2ray.adapters.baselines import PeftAdapter
from t2ray.adapters.model import Model, load_model
from t2ray.cli.main import main
from t2ray.config.adapter import AdapterConfig
from t2ray.config.train import RLConfig, load, resolve
from t2ray.core import ConfigError, DataError, ExpertError, Mixture, SamplingParams, user
from t2ray.engine.offline import OfflineEngine
from t2ray.experts.registry import Registry
from t2ray.store import Store
from t2ray.training.loss import Weighed
from t2ray.training.metrics import StepMetrics, read_metrics
from t2ray.training.rollout import right_answers
from t2ray.training.trainer import Trainer
from t2ray.workbench import find_place, load_experts

# peft 0.21 asks transformers 5.23 under the old name of a class.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

KINDS = {
    "lora": AdapterConfig(kind="lora", rank=4, alpha=8),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=8),
    "ia3": AdapterConfig(kind="ia3"),
    "tinylora": AdapterConfig(kind="tinylora", rank=2, numbers=5, tying=0.5),
}


def peft_config(kind: str, names: list[str]) -> Any:
    """What a user of PEFT would write."""
    if kind == "ia3":
        down = [name for name in names if name.endswith("down_proj")]
        return IA3Config(target_modules=names, feedforward_modules=down)
    if kind == "tinylora":
        return TinyLoraConfig(target_modules=names, r=2, u=5, weight_tying=0.5)
    return LoraConfig(target_modules=names, r=4, lora_alpha=8, use_dora=kind == "dora")


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tiny_llama: Path) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return load_model(str(tiny_llama), "", device="cpu", adapter=KINDS[request.param], seed=3)


@pytest.fixture
def baseline(model: Model) -> Iterator[PeftAdapter]:
    assert isinstance(model.adapter, PeftAdapter)
    model.adapter.bank.clear()
    yield model.adapter


def moved(baseline: PeftAdapter, seed: int, spread: float = 0.1) -> Tensor:
    """A vector that changes the model, (P,)."""
    return baseline.start_P + random_z(baseline.size, seed, spread) - 1


def theirs(model: Model, v_P: Tensor) -> tuple[Any, list[Tensor]]:
    """Plain PEFT with the same numbers, and its trained parameters in the vector's order."""
    baseline = model.adapter
    assert isinstance(baseline, PeftAdapter)
    peft = get_peft_model(plain(model), peft_config(baseline.config.kind, [t.name for t in baseline.layout])).eval()
    parameters: dict[int, Tensor] = {}
    for target in baseline.layout:
        for parameter in peft.get_submodule(f"base_model.model.{target.name}").parameters():
            if parameter.requires_grad:
                parameters.setdefault(id(parameter), parameter)
    found = list(parameters.values())
    assert sum(p.numel() for p in found) == baseline.size
    with torch.no_grad():
        for parameter, part in zip(found, v_P.split([p.numel() for p in found]), strict=True):
            parameter.copy_(part.view(parameter.shape))
    return peft, found


def logits(model: Model, ids_BT: Tensor) -> Tensor:
    return model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))


def log_likelihood(logits_BTV: Tensor, ids_BT: Tensor, start: int) -> Tensor:
    """Of the tokens from `start` on, summed by row."""
    logp = logits_BTV[:, start - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids_BT[:, start:, None])[..., 0].sum(-1)


# ------------------------------------------------------------------------------------------------------------ the layer


def test_unbound_the_model_is_the_base_bit_for_bit_and_the_neutral_vector_is_the_base(
    model: Model, baseline: PeftAdapter
) -> None:
    ids_BT = token_rows(model, 2, 9)
    with torch.no_grad():
        expected = plain(model)(input_ids=ids_BT).logits
        assert torch.equal(logits(model, ids_BT), expected)
        for v_P in (baseline.neutral, baseline.start_P, baseline.join({})):
            with baseline.rows(v_P[None]):
                torch.testing.assert_close(logits(model, ids_BT), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(model, ids_BT), expected)


def test_logits_and_gradients_are_those_of_plain_peft(model: Model, baseline: PeftAdapter) -> None:
    ids_BT = token_rows(model, 2, 9)
    v_1P = moved(baseline, 1)[None].requires_grad_()
    with baseline.rows(v_1P):
        ours = logits(model, ids_BT)
        log_likelihood(ours, ids_BT, 4).sum().backward()
    peft, parameters = theirs(model, v_1P.detach()[0])
    expected = peft(input_ids=ids_BT).logits
    log_likelihood(expected, ids_BT, 4).sum().backward()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.testing.assert_close(v_1P.grad[0], gradient, rtol=1e-3, atol=1e-4)  # type: ignore[index]
    assert float((plain(model)(input_ids=ids_BT).logits - expected).detach().abs().max()) > 1e-2


def test_one_training_step_is_that_of_a_loop_of_ones_own_around_peft(
    model: Model, baseline: PeftAdapter, tmp_path: Path
) -> None:
    rl = RLConfig(steps=4, prompts=2, samples=1, lr=0.01, kl=0.3, clip=0.5, micro_batch=1, schedule="constant")
    trainer = Trainer(*sampler(model), letter_task(), verify_letters, rl, Store(tmp_path), seed=0, digest="x")
    rows_BT = token_rows(model, 2, 9).tolist()
    rollouts = [rollout(row[:4], row[4:]) for row in rows_BT]
    advantage = [1.0, -0.4]
    start_P = trainer.p_K.detach().clone()
    trainer.update([Weighed(rollouts=rollouts, advantage_B=advantage, share_B=[1.0, 1.0])], 2, 1)

    peft, parameters = theirs(model, start_P)
    optimiser = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    ids_BT = torch.tensor(rows_BT)
    found = peft(input_ids=ids_BT).logits
    with torch.no_grad():
        base = plain(model)(input_ids=ids_BT).logits.log_softmax(-1)[:, 3:-1]
    policy = found.log_softmax(-1)[:, 3:-1]
    kl_B = (policy.exp() * (policy - base)).sum((-1, -2))
    ((0.3 * kl_B - torch.tensor(advantage) * log_likelihood(found, ids_BT, 4)).sum() / 2).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    optimiser.step()
    after_P = torch.cat([parameter.detach().flatten() for parameter in parameters])
    assert not torch.equal(after_P, start_P)
    # AdamW's first step is lr * sign: a gradient that is 0 but for rounding may go either way
    close = torch.isclose(trainer.p_K.detach(), after_P, rtol=1e-3, atol=1e-4)
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    assert bool((close | (gradient.abs() < 1e-5)).all()) and float(close.float().mean()) > 0.99


def test_a_stopped_run_resumes_bit_for_bit(model: Model, tmp_path: Path) -> None:
    if model.adapter.layout[0].method not in ("lora rank=4 alpha=8", "ia3"):
        return  # one that draws its start and one that does not; the trainer knows no other difference

    def trainer(folder: str) -> Trainer:
        model.adapter.bank.clear()
        rl = RLConfig(steps=4, prompts=3, samples=2, eval_every=2, eval_prompts=4, lr=0.02, micro_batch=4)
        store = Store(tmp_path / folder)
        return Trainer(*sampler(model), letter_task(), verify_letters, rl, store, seed=0, digest="x")

    def stop(row: StepMetrics) -> None:
        if row.step == 3:
            raise InterruptedError

    rows: list[StepMetrics] = []
    whole = trainer("whole")
    expected = asyncio.run(whole.run(rows.append))
    with pytest.raises(InterruptedError):
        asyncio.run(trainer("stopped").run(stop))
    resumed = trainer("stopped")
    assert resumed.progress.step == 2
    found = asyncio.run(resumed.run(lambda row: None))
    assert torch.equal(resumed.p_K, whole.p_K) and torch.equal(found.z_K, expected.z_K)
    assert rows[0].numbers == model.adapter.size and 0.1 < (rows[0].peak_gib or 0.0) < 100
    assert rows[0].kl < 1e-5 < rows[-1].kl, "training starts at the base model"


# --------------------------------------------------------------------------------------------------- experts, mixtures


def test_an_expert_is_the_same_after_its_file(model: Model, baseline: PeftAdapter, tmp_path: Path) -> None:
    v_P = moved(baseline, 1)
    registry = Registry(tmp_path)
    registry.save("x", baseline.split(v_P), base_digest=model.base_digest, adapter=baseline.config)
    expert = registry.load("x", base_digest=model.base_digest, layout=baseline.layout)
    assert torch.equal(baseline.join(expert.z), v_P)
    assert expert.manifest.method == baseline.config
    for other in ("svf", "lora rank=8 alpha=8"):
        layout = [replace(target, method=other) for target in baseline.layout]
        with pytest.raises(ExpertError, match=f"was trained as {baseline.config.method}, .* adapted by {other}"):
            registry.load("x", layout=layout)


def test_a_mixture_changes_the_weights_by_the_sum_of_its_experts_changes(model: Model, baseline: PeftAdapter) -> None:
    baseline.set_experts({"a": moved(baseline, 1), "b": moved(baseline, 2)})
    if baseline.config.kind == "dora":
        assert torch.equal(baseline.mix(Mixture.parse("a")), baseline.bank["a"])
        for text in ("a:0.5", "a,b"):
            with pytest.raises(ExpertError, match="DoRA's experts cannot be mixed or weighted"):
                baseline.mix(Mixture.parse(text))
        return
    base, weights = plain(model), {"a": [0.7, -0.3], "b": [0.5, 0.5]}  # by decoder layer
    if baseline.config.kind == "tinylora":
        with pytest.raises(ExpertError, match="layers share numbers here"):
            baseline.mix(Mixture.of(weights))
        weights = {"a": [0.7, 0.7], "b": [-0.5, -0.5]}
    for name, alpha in weights.items():
        with baseline.rows(baseline.bank[name][None]), torch.no_grad():
            for target, layer in zip(baseline.layout, baseline.layers, strict=True):
                eye = torch.eye(target.n)
                change_MN = (layer(eye) - layer.base_layer(eye)).T
                base.get_parameter(f"{target.name}.weight").add_(alpha[target.layer] * change_MN)
    alone = {name: alpha[0] for name, alpha in weights.items()}
    mixture = Mixture.of(alone if baseline.config.kind == "tinylora" else weights)
    ids_BT = token_rows(model, 2, 9)
    with torch.no_grad(), baseline.rows(baseline.mix(mixture)[None]):
        torch.testing.assert_close(logits(model, ids_BT), base(input_ids=ids_BT).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(baseline.mix(Mixture.base()), baseline.neutral)


def test_requests_of_several_mixtures_answer_as_each_does_alone(model: Model, baseline: PeftAdapter) -> None:
    baseline.set_experts({"a": moved(baseline, 1, 0.5), "b": moved(baseline, 2, 0.5)})
    engine, sampling = OfflineEngine(model), SamplingParams(max_tokens=8)
    asked = [(text, Mixture.parse(name)) for text in ("17+25", "abc") for name in ("a", "base", "b")]
    alone = [together(engine.generate(user(text), mixture, sampling))[0].token_ids for text, mixture in asked]
    found = together(*(engine.generate(user(text), mixture, sampling) for text, mixture in asked))
    assert [answer.token_ids for answer in found] == alone and len(set(alone)) > 3
    labels = ("x", "yes")
    scores = [together(engine.score(user(text), labels, mixture))[0] for text, mixture in asked]
    for one, other in zip(together(*(engine.score(user(t), labels, m) for t, m in asked)), scores, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_the_start_follows_the_seed_and_leaves_the_generator_alone(tiny_llama: Path) -> None:
    state = torch.get_rng_state()
    first, same, other = (
        load_model(str(tiny_llama), "", device="cpu", adapter=KINDS["lora"], seed=seed).adapter for seed in (1, 1, 2)
    )
    starts = [adapter.initial("scale", torch.zeros(adapter.size)) for adapter in (first, same, other)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- jobs, golds


def job(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "model": "tiny", "out": str(tmp_path), "run": "r", "workers": 0, "cpus": 1, "verifiers": 0,
        "domains": {"math": {"task": "math", "publish": "always"}},
        "rl": {"steps": 2, "prompts": 2, "samples": 2, "eval_every": 2, "eval_prompts": 2, "lr": 1e-3},
    }  # fmt: skip
    return values | changes


@pytest.mark.parametrize("objective", ["reinforce", "sft"])
def test_a_job_trains_a_lora_which_eval_finds(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2ray.cluster.train.launch import train

    monkeypatch.chdir(tmp_path)
    adapter = {"kind": "lora", "rank": 4, "targets": ["*.mlp.*"], "layers": "0-1"}
    rl = job(tmp_path)["rl"] | {"objective": objective}
    config = resolve(job(tmp_path, adapter=adapter, rl=rl), where="job")
    train(config)
    manifest = Registry(f"{tmp_path}/r/experts").manifest("math")
    assert manifest.method.method == "lora rank=4 alpha=32" and len(manifest.targets) == 6
    metrics = read_metrics(Store(f"{tmp_path}/r/domains/math"))
    assert [row.numbers for row in metrics] == [sum(count for _, count in manifest.targets)] * 2
    assert not (tmp_path / "factors").exists(), "nothing was decomposed"
    model, experts = load_experts(find_place(run=f"{tmp_path}/r"), ["math"])
    assert model.adapter.layout[0].method == manifest.method.method
    assert torch.equal(model.adapter.bank["math"], model.adapter.join(experts[0].z))
    if objective == "sft":
        assert {row.reward_mean for row in metrics} == {1.0}
        return
    assert main(["eval", "--run", f"{tmp_path}/r", "--tasks", "math", "--strategies", "base,math", "--limit", "2"]) == 0
    assert main(["export", "--run", f"{tmp_path}/r", "--mixture", "math", "--as", "merged", "--out", "o"]) == 2


def test_next_token_training_follows_the_mean_log_likelihood_of_the_right_answers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    task = replace(letter_task(), gold=lambda row: f"is {row['text']}")
    model = load_model(str(tiny_llama), "", device="cpu", adapter=KINDS["ia3"])
    rl = RLConfig(
        objective="sft",
        steps=30,
        prompts=4,
        samples=3,
        lr=0.05,
        kl=5.0,
        baseline="loo",
        temperature=2.0,
        eval_prompts=2,
    )
    trainer = Trainer(
        *sampler(model), task, verify_letters, rl, Store(tmp_path), seed=0, digest="x"
    )  # fmt: skip
    before = copy.deepcopy(trainer.p_K.detach())
    row, rollouts = asyncio.run(trainer.step(1))
    assert [r.completion.text for r in rollouts] == [f"is {r.example.row['text']}" for r in rollouts]
    hf = plain(model)
    total = torch.tensor(0.0)
    for r in rollouts:
        ids_BT = torch.tensor([[*r.completion.prompt_ids, *r.completion.token_ids]])
        assert r.completion.token_ids[-1] == model.chat.end_id
        total -= log_likelihood(hf(input_ids=ids_BT).logits, ids_BT, len(r.completion.prompt_ids)).sum().detach()
    assert row.loss == pytest.approx(float(total) / 4, rel=1e-4), "transformers' loss, summed over an answer's tokens"
    losses = [row.loss] + [asyncio.run(trainer.step(step))[0].loss for step in range(2, 31)]
    assert losses[-1] < 0.8 * losses[0] and not torch.equal(trainer.p_K.detach(), before)


def test_an_answer_beyond_the_context_is_refused(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), "", device="cpu", adapter=KINDS["ia3"])
    task = replace(letter_task(), gold=lambda row: "x" * 600)
    with pytest.raises(DataError, match="letters/train/0 has .* its right answer 601; the model's context has 512"):
        right_answers(model.chat, model.context, task, task.examples("train", 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"kind": "loro"}}, "adapter.kind"),
        ({"adapter": {"kind": "svf", "rank": 4}}, "svf has no rank; it has numbers, tied"),
        ({"adapter": {"numbers": 4}, "rl": {"init": "sigmoid"}}, "need rl.init: scale, not sigmoid"),
        ({"adapter": {"kind": "ia3", "alpha": 4}}, "ia3 has no alpha"),
        ({"adapter": {"kind": "lora", "numbers": 4}}, "lora has no numbers; it has rank, alpha"),
        ({"adapter": {"kind": "lora", "rank": 0}}, "adapter.rank"),
        ({"adapter": {"kind": "lora", "targets": ["*.mlp.*"]}, "targets": ["*"]}, "say the same; leave one out"),
        ({"rl": {"objective": "sftt"}}, "rl.objective"),
        ({"adapter": "lora"}, r"adapter: a mapping of keys \(kind, rank, .*\), not 'lora'"),
        ({"adapter": {"kind": "lora", "alpha": -1}}, "adapter.alpha: .* greater than 0, not -1"),
        ({"adapter": {"kind": "lora", "targets": []}}, "adapter.targets: .* at least 1 item"),
        ({"targets": []}, "targets: .* at least 1 item"),
    ],
)
def test_a_wrong_adapter_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(job(tmp_path, **changes), where="job")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "lora", "targets": ["*.nothing"]}, r"'\*\.nothing' matches no matrix; its names look like"),
        ({"kind": "ia3", "layers": "99"}, "no targets in layer 99"),
        ({"kind": "lora", "rank": 129}, "adapter.rank: 129, and no matrix of this model has a rank above 128"),
        ({"kind": "tinylora", "rank": 1000}, "adapter.rank: 1000"),
    ],
)
def test_a_baseline_that_does_not_fit_the_model_is_told_before_the_run_begins(
    adapter: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from t2ray.cluster.train.launch import train

    with pytest.raises(ConfigError, match=message):
        train(resolve(job(tmp_path, adapter=adapter), where="job"))
    assert [*tmp_path.iterdir()] == []


def test_golds_are_needed_for_next_token_training(tmp_path: Path) -> None:
    from t2ray.runs.prepare import prepare

    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n' * 20)
    domain = {"data": str(tmp_path / "rows.jsonl"), "prompt": "{q}", "reward": "small:letter"}
    config = resolve(
        job(tmp_path, domains={"x": domain}, rl={"objective": "sft"}, code=str(Path(__file__).parent)), where="job"
    )
    with pytest.raises(ConfigError, match="domain 'x' has no right answers to train on; name their column by gold"):
        prepare(config, resume=False)


def test_a_job_of_before_has_the_digest_that_it_had(tmp_path: Path) -> None:
    """The digest of jobs/train.yaml before there were other adapters: a run of then can be resumed."""
    shipped = load(Path(__file__).parents[1] / "jobs" / "train.yaml")
    fields = shipped.resume_fields()
    assert "adapter" not in fields and "objective" not in fields["rl"]
    lora = resolve(job(tmp_path, adapter={"kind": "lora"}), where="job")
    assert lora.digest != resolve(job(tmp_path), where="job").digest
