"""The model that is measured: a Llama of random weights with its decomposition and experts, and without SVF.

It is written into a folder and loaded like any other model.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from t2ray.adapters.factors import Factors, decompose
from t2ray.adapters.model import Model, load_model
from t2ray.core import Completion, Message, Mixture, SamplingParams, user
from t2ray.engine.offline import OfflineEngine

SPECIAL = ("<pad>", "<end>", "<unk>")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchShape:
    """The sizes of the model and of the work. By default a Llama of 44 M parameters, 16 rows, 32 new tokens.

    `prompt` and `new` are tokens per prompt and per answer. `sequence` is the tokens of a rollout in `update`; `answer`
    is the new tokens of a shot in `cem`, and `pass2` those of an answer in `dispatch`.
    """

    layers: int = 6
    width: int = 768
    inner: int = 2048
    heads: int = 12
    vocabulary: int = 2048
    rows: int = 16
    prompt: int = 16
    new: int = 32
    sequence: int = 64
    members: int = 32
    shots: int = 10
    answer: int = 8
    pass2: int = 64
    experts: int = 16

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Returns the matrices of one decoder layer: name -> (outputs, inputs)."""
        up, down = (self.inner, self.width), (self.width, self.inner)
        attention = {f"self_attn.{name}_proj": (self.width, self.width) for name in "qkvo"}
        return attention | {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}

    def bound(self) -> float:
        """Returns the multiply-adds of a dense pass over those of a factored one: `sum mn / sum r(m+n)`."""
        sizes = self.matrices().values()
        return sum(m * n for m, n in sizes) / sum(min(m, n) * (m + n) for m, n in sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model under measurement: with SVF layers (`model`, `engine`), and `plain`, the same tensors without them.

    Its experts "e0", "e1", ... are random: z = 1 + 0.1 N(0, 1).
    """

    shape: BenchShape
    model: Model
    engine: OfflineEngine
    plain: Any
    factors: Factors

    def prompts(self, count: int) -> list[tuple[Message, ...]]:
        """Returns `count` prompts of `shape.prompt` tokens each."""
        draw = random.Random(0)
        words = range(len(SPECIAL), self.shape.vocabulary)
        return [user(" ".join(f"w{draw.choice(words)}" for _ in range(self.shape.prompt))) for _ in range(count)]

    def ids(self, prompts: Sequence[tuple[Message, ...]]) -> Tensor:
        """Returns the token ids of prompts of one length, (B, T)."""
        return torch.tensor([self.model.chat.encode(prompt) for prompt in prompts])

    def mixtures(self, count: int) -> list[Mixture]:
        """Returns `count` different mixtures of two experts each."""
        draw = random.Random(1)
        names = range(self.shape.experts)
        return [
            Mixture.of({f"e{name}": draw.uniform(0.1, 0.9) for name in draw.sample(names, 2)}) for _ in range(count)
        ]

    def generate(
        self,
        prompts: Sequence[tuple[Message, ...]],
        mixtures: Sequence[Mixture],
        samplings: Sequence[SamplingParams],
    ) -> list[Completion]:
        """Returns the engine's answers to one batch."""

        async def together() -> list[Completion]:
            rows = zip(prompts, mixtures, samplings, strict=True)
            return await asyncio.gather(*(self.engine.generate(*row) for row in rows))

        return asyncio.run(together())

    def score(
        self, prompts: Sequence[tuple[Message, ...]], labels: tuple[str, ...], mixtures: Sequence[Mixture]
    ) -> list[tuple[float, ...]]:
        """Returns the labels' log-likelihoods for each prompt of one batch."""

        async def together() -> list[tuple[float, ...]]:
            rows = zip(prompts, mixtures, strict=True)
            return await asyncio.gather(*(self.engine.score(prompt, labels, mixture) for prompt, mixture in rows))

        return asyncio.run(together())


def make(shape: BenchShape, folder: Path) -> Subject:
    """Writes the model and its factors into `folder` and loads them; always the same for one shape."""
    _write_model(shape, folder / "model")
    factors = decompose(str(folder / "model"), folder / "factors")
    model = load_model(str(folder / "model"), folder / "factors", device="cpu")
    model.chat.eos_ids = (shape.vocabulary,)  # an id beyond the vocabulary: every answer has all its tokens
    draw = torch.Generator().manual_seed(2)
    for i in range(shape.experts):
        model.adapter.bank[f"e{i}"] = 1 + 0.1 * torch.randn(model.adapter.size, generator=draw)
    plain = type(model.hf)(model.hf.config)
    plain.load_state_dict(model.hf.state_dict(), assign=True)
    plain.tie_weights()
    plain = plain.eval().requires_grad_(False)
    return Subject(shape=shape, model=model, engine=OfflineEngine(model), plain=plain, factors=factors)


def _write_model(shape: BenchShape, folder: Path) -> None:
    """Writes a Hugging Face folder of random weights, with a tokenizer of one token per word and no chat template."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    sizes = {
        f"model.layers.{layer}.{name}.weight": size
        for layer in range(shape.layers)
        for name, size in shape.matrices().items()
    }
    sizes["model.embed_tokens.weight"] = (shape.vocabulary, shape.width)
    tensors = {name: 0.02 * torch.randn(size, generator=draw) for name, size in sizes.items()}
    norms = [f"model.layers.{i}.{kind}_layernorm" for i in range(shape.layers) for kind in ("input", "post_attention")]
    tensors |= {f"{name}.weight": torch.ones(shape.width) for name in (*norms, "model.norm")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32",
        "hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": None, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(shape, folder)


def write_tokenizer(shape: BenchShape, folder: Path) -> None:
    """Writes a tokenizer of one token per word, without a chat template."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), shape.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, end, unknown = SPECIAL
    special = {"pad_token": pad, "eos_token": end, "unk_token": unknown}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
