"""The vision tower adapted beside the decoder, or alone: against transformers' model itself, of tiny random weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from families import settings
from peft import PeftModel
from seeing import write_seeing
from test_families import (
    MATH,
    SEEN,
    alone,
    check_seen,
    close,
    ids_of,
    merged,
    plain,
    random_z,
    seen_answers,
    served,
)
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.modeling_clip import CLIPMLP

from t2ray.adapters.factors import Factors, decompose
from t2ray.adapters.model import Model, load_model
from t2ray.config.serve import EngineConfig
from t2ray.core import Completion, ConfigError, Example, Message, Mixture, ModelError, SamplingParams
from t2ray.engine.batches import StaticBatches
from t2ray.engine.choose import vllm_engine
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.requests import Request
from t2ray.experts.export import Source, export_merged, export_peft
from t2ray.experts.registry import Registry
from t2ray.grades import Grade, Rollout
from t2ray.models.targets import Selection, adapted, select_targets
from t2ray.prompts import pictured
from t2ray.runs.memory import serving, shape_of, training
from t2ray.training.loss import backward

EYES = {
    "llava": ["*vision_tower*", "*projector*"], "llava_next": ["*vision_tower*", "*projector*"],
    "qwen2_vl": ["*visual*"], "qwen2_5_vl": ["*visual*"], "gemma3": ["*vision_tower*"],
    "smolvlm": ["*vision_model*", "*connector*"], "idefics3": ["*vision_model*", "*connector*"],
}  # fmt: skip
"""What names all that pictures go through before the decoder."""


def adapted_model(name: str, tokenizer: Path, folder: Path, targets: list[str]) -> Model:
    model = write_seeing(name, tokenizer, folder / "model")
    decompose(str(model), folder / "factors", targets=targets)
    return load_model(str(model), folder / "factors", device="cpu")


def moved(model: Model, rollouts: list[Rollout]) -> set[str]:
    """The matrices whose z two steps from z = 1 move."""
    z_1K = torch.ones(1, model.adapter.size, requires_grad=True)
    optimizer = torch.optim.AdamW([z_1K], lr=0.01, weight_decay=0.0)
    advantages = [1.0, -0.5, 0.5][: len(rollouts)]
    for _ in range(2):
        z_1K.grad = torch.zeros_like(z_1K)
        backward(model, z_1K, rollouts, advantages, lam=0.1, temperature=1.0, batch=len(rollouts))
        optimizer.step()
    return {name for name, z_r in model.adapter.split(z_1K.detach()[0]).items() if bool((z_r != 1).any())}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n not in ("llava", "qwen2_5_vl"))) for n in EYES]
)
def test_a_vision_tower_is_adapted_beside_the_decoder(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Prompts with pictures and without, with mixtures of their own, asked together: each as the model by itself."""
    model = adapted_model(name, tiny_llama, tmp_path, ["*", *EYES[name]])
    tower = {target.name for target in model.adapter.layout if target.in_tower}
    assert len(tower) >= 6 and len(tower) < len(model.adapter.layout) and model.family.takes_features
    base, z_K = plain(model), random_z(model, 2)[1]
    with torch.no_grad():
        ids_1T = torch.tensor([[*model.chat.ids(SEEN[2]), 70]])
        with model.adapter.rows(model.adapter.neutral[None]):
            seen = model.seen([pictured(SEEN[2])], [0], ids_1T.shape[1])
            neutral = model.logits(model.hidden(ids_1T, torch.ones_like(ids_1T), seen))
        close(neutral[0], alone(model, base, SEEN[2], (70,)))
    engine = OfflineEngine(model)
    engine.set_experts({"math": z_K})
    found = asyncio.run(seen_answers(engine))
    check_seen(model, found, [base, merged(model, z_K)])

    rollouts = [
        Rollout(example=Example(id="x", messages=messages, row={}), completion=answer, grade=Grade.of(1.0))
        for messages, answer in zip(SEEN, found[0][::2], strict=True)
    ]
    assert moved(model, rollouts) == {target.name for target in model.adapter.layout}
    assert moved(model, rollouts[1:2]) == {target.name for target in model.adapter.layout} - tower  # it is text alone


def test_a_tower_alone_is_adapted_served_saved_and_exported(tiny_llama: Path, tmp_path: Path) -> None:
    model = adapted_model("llava", tiny_llama, tmp_path, EYES["llava"])
    layout, z_K = model.adapter.layout, random_z(model, 1)[0]
    assert all(target.in_tower for target in layout)
    base, reference = plain(model), merged(model, z_K)
    _, answers = asyncio.run(served(model, z_K, seen_answers))
    check_seen(model, answers, [base, reference])
    with torch.no_grad(), model.adapter.folded(z_K):
        close(alone(model, model.hf, SEEN[0], (70,)), alone(model, reference, SEEN[0], (70,)))
        ids_BT = ids_of()
        assert torch.equal(model.hf(input_ids=ids_BT).logits, base(input_ids=ids_BT).logits)  # a text sees no tower

    registry = Registry(tmp_path / "experts")
    registry.save("math", model.adapter.split(z_K), base_digest=model.base_digest)
    loaded = registry.load("math", base_digest=model.base_digest, layout=layout)
    assert torch.equal(model.adapter.join(loaded.z), z_K)
    model.adapter.set_experts({"math": z_K})
    assert torch.equal(model.adapter.mix(Mixture.parse("math:0.5")), 1 + 0.5 * (z_K - 1))
    folder = str(tmp_path / "model")
    source = Source(model=model, base=folder, mixture=MATH, experts=[loaded.manifest])
    export_peft(source, tmp_path / "lora", rank=64)
    lora = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), str(tmp_path / "lora"))
    close(alone(model, lora, SEEN[0], (70,)), alone(model, reference, SEEN[0], (70,)))
    export_merged(source, tmp_path / "out")
    assert "AutoModelForImageTextToText.from_pretrained(" in (tmp_path / "out" / "README.md").read_text()
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        close(alone(model, exported, SEEN[0], (70,)), alone(model, reference, SEEN[0], (70,)))
    with pytest.raises(ModelError, match="the engine vllm is given no pictures, and the factors have model.vision_tow"):
        vllm_engine(folder, Factors.open(tmp_path / "factors"), EngineConfig(), mode="mixtures")


@pytest.mark.parametrize("takes_features", [True, False])
def test_rows_of_several_z_see_by_their_own(takes_features: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """In one batch where the model takes what its tower made of each row's pictures, else in a batch for each z: also
    where one mixture has two, since its experts changed between two requests."""
    model = adapted_model("llava", tiny_llama, tmp_path, ["*", *EYES["llava"]])
    z_2K, sampling = random_z(model, 2), SamplingParams(max_tokens=2, ignore_eos=True)
    assert model.family.takes_features
    model.family.takes_features = takes_features

    def asked(messages: tuple[Message, ...], z_K: Tensor) -> Request:
        ids = model.chat.ids(messages)
        return Request(prompt_ids=ids, mixture=MATH, pictured=pictured(messages), z_K=z_K, sampling=sampling)

    by_z = z_2K.unbind()
    requests = [asked(messages, z_K) for messages in SEEN for z_K in by_z]
    batches = StaticBatches(model)
    sizes, generate = list[int](), batches._generate
    batches._generate = lambda batch: (sizes.append(len(batch)), generate(batch))[1]  # type: ignore[method-assign]
    batches.run(requests)
    assert sorted(sizes) == ([6] if takes_features else [2, 2, 2])  # the texts share theirs
    for request, messages in zip(requests, [messages for messages in SEEN for _ in range(2)], strict=True):
        assert request.z_K is not None
        single = asked(messages, request.z_K)
        StaticBatches(model).run([single])
        assert isinstance(request.result, Completion) and isinstance(single.result, Completion)
        assert request.result.token_ids == single.result.token_ids
        close(torch.tensor(request.result.logprobs), torch.tensor(single.result.logprobs))


def test_a_layer_of_a_tower_refuses_rows_of_several_z(tiny_llama: Path, tmp_path: Path) -> None:
    model = adapted_model("llava", tiny_llama, tmp_path, EYES["llava"])
    ids = model.chat.ids(SEEN[0])
    seen = model.seen([pictured(SEEN[0])] * 2, [0, 0], len(ids))
    with (
        pytest.raises(RuntimeError, match="pictures of several mixtures"),
        model.adapter.rows(random_z(model, 2), torch.arange(2)),
    ):
        model.hidden(torch.tensor([ids, ids]), torch.ones(2, len(ids)).long(), seen)


# -------------------------------------------------------------------------------------------------------------- targets


def llava(**own: Any) -> Any:
    config = settings("llava")
    eyes = config["vision_config"] | {"num_hidden_layers": 3}
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(**config | {"vision_config": eyes} | own))


def test_a_pattern_that_a_matrix_of_the_decoder_matches_means_the_decoder_alone() -> None:
    """So that patterns of before towers could be chosen, such as the attention's, choose what they did."""
    hf = llava()
    usual = select_targets(hf)
    assert not any(target.in_tower for target in usual.targets)
    assert select_targets(hf, ["*"]) == usual and (usual.share, usual.left_out) == (1.0, ())
    assert not any(target.in_tower for target in select_targets(hf, ["*self_attn*"]).targets)
    both = select_targets(hf, ["*vision_tower*self_attn*", "*self_attn.q_proj"]).targets
    assert [target.layer for target in both] == [-1] * 8 + [0, 1]


@pytest.mark.parametrize(("taken", "layers"), [(-1, 3), (-2, 2), (1, 1), ([-3, 2], 2), (0, 0)])
def test_layers_of_a_tower_whose_states_nobody_takes_are_no_targets(taken: int | list[int], layers: int) -> None:
    found = select_targets(llava(vision_feature_layer=taken), ["*vision_tower*"] if layers else ["*projector*"])
    numbers = {int(target.name.split(".")[4]) for target in found.targets if "tower" in target.name}
    assert numbers == set(range(layers))


def test_the_layers_of_a_choice_are_the_decoders() -> None:
    found = select_targets(llava(), ["*self_attn.q_proj", "*projector*"], "1")
    assert [target.name for target in found.targets] == [
        "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2",
        "model.language_model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="layers '1': the targets are none of the decoder's; leave layers out"):
        select_targets(llava(), ["*projector*"], "1")
    with pytest.raises(ConfigError, match=r"'\*eye\*' matches .*'model\.lang.*in its vision tower like 'model\.vision"):
        select_targets(llava(), ["*eye*"])


def test_the_share_is_that_of_the_decoder_and_the_towers_matrices_are_counted_beside() -> None:
    found: Selection = select_targets(llava(), ["*projector*"])
    assert found.share == 0 and "self_attn.q_proj" in found.left_out
    assert adapted(0.0, ["mlp.down_proj"], found.targets) == (
        "adapted: 0 % of the decoder layers' weights and 2 matrices of the vision tower and its projector; "
        "left out: mlp.down_proj (choose by targets and layers)"
    )


def test_a_plan_counts_the_factors_of_a_tower(tmp_path: Path) -> None:
    llava().config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), ["*", "*vision_tower*"])
    for loads in (
        training(shape, 2, micro_batch=1, tokens=64, rows=2),
        serving(shape, 2, kv_tokens=64, rows=2, experts=1),
    ):
        assert sum(gpu.factors for gpu in loads) == shape.factors(shape.targets)


def test_a_plan_puts_a_tower_on_the_first_gpu_before_the_layers(tmp_path: Path) -> None:
    """There the modules' order puts it, by which accelerate divides a model."""
    hf = llava()
    hf.config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    last = sum(p.nbytes for p in (hf.model.language_model.norm.weight, hf.lm_head.weight))
    layers = sum(p.nbytes for p in hf.model.language_model.layers.parameters())
    first = sum(p.nbytes for p in hf.parameters()) - layers - last
    assert (shape.weight_bytes[None], shape.weight_bytes[-1]) == (first, last)
    loads = serving(shape, 2, kv_tokens=64, rows=2, experts=1)
    assert [gpu.weights for gpu in loads] == [first + layers // 2, layers // 2 + last]


# --------------------------------------------------------------------------------------------------------------- probe


def test_a_tower_that_nothing_is_shown_to_is_refused_at_load(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_seeing("llava", tiny_llama, tmp_path / "model")
    decompose(str(folder), tmp_path / "factors", targets=["*vision_tower*"])
    with monkeypatch.context() as patch:
        patch.setattr(CLIPMLP, "forward", lambda self, x: x)
        with pytest.raises(ModelError, match=r"^Llava.*: experts of model.vision.* passes by model.vision.*mlp.fc\d"):
            load_model(str(folder), tmp_path / "factors", device="cpu")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"takes none: its folder has no preprocessor_config.json; choose .*"):
        load_model(str(folder), tmp_path / "factors", device="cpu")
