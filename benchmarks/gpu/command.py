"""`python -m benchmarks gpu`: both engines on one GPU, and a training step; fits into 8 minutes.

Each part loads the model, measures, and gives the memory back. Not here: the model (`weights`).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.core.command import print_figures
from benchmarks.core.shape import SPECIAL, BenchShape
from benchmarks.core.suite import machine
from benchmarks.gpu.weights import LLAMA_8B, write
from benchmarks.harness import Figures, Skipped, interleaved, measure, ratio
from t2ray.adapters.factors import Factors
from t2ray.adapters.model import load_model
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.config.serve import EngineConfig
from t2ray.core import Completion, Example, Mixture, SamplingParams, Token, user
from t2ray.engine.choose import vllm_engine
from t2ray.engine.online import OnlineEngine
from t2ray.engine.protocol import Engine
from t2ray.grades import Grade, Rollout
from t2ray.training.loss import backward

EXPERTS, ROUNDS = 8, 2
SMALL = BenchShape(layers=2, width=128, inner=256, heads=4, vocabulary=256, rows=4, prompt=8, new=8)


def gpu(args: argparse.Namespace) -> None:
    """Measures and prints; `--small` is the same on a model that any machine runs, to see that it runs."""
    check_json_folder(args.json)
    shape = SMALL if args.small else LLAMA_8B
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, factors = write(shape, Path(folder))
        for name, part in PARTS.items():
            results[name] = part(shape, model, factors)
            print_figures(name, results[name])
            gc.collect()
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    console.print(f"on {device}")
    figures = {name: {key: value.as_json() for key, value in rows.items()} for name, rows in results.items()}
    write_json(args.json, {**figures, "machine": machine(torch.get_num_threads()) | {"device": device}})


def transformers(shape: BenchShape, folder: Path, factors: Factors) -> Figures:
    """The online engine: the base, as many mixtures as rows, and one mixture."""
    model = load_model(str(folder), factors.folder)
    config = _config(shape)
    with _running(OnlineEngine(model, config), shape, factors) as engine:
        return _speeds(engine, shape, {"base": 0, "mixtures": EXPERTS, "one": 1})


def vllm_mixtures(shape: BenchShape, folder: Path, factors: Factors) -> Figures:
    """vLLM with the gains of each token's mixture."""
    if find_spec("vllm") is None:
        return {"over_base": Skipped(reason="vLLM is not installed")}
    engine = vllm_engine(str(folder), factors, _config(shape), mode="mixtures")
    with _running(engine, shape, factors):
        return _speeds(engine, shape, {"base": 0, "mixtures": EXPERTS, "one": 1})


def vllm_one(shape: BenchShape, folder: Path, factors: Factors) -> Figures:
    """vLLM with one mixture folded: the rollouts of a step, with the message of the new z and its fold, and without."""
    if find_spec("vllm") is None:
        return {"over_base": Skipped(reason="vLLM is not installed")}
    engine = vllm_engine(str(folder), factors, _config(shape), mode="one")
    draw = torch.Generator().manual_seed(1)
    policy, base = Mixture.parse("e0"), Mixture.base()

    def published() -> None:
        engine.set_experts({"e0": 1 + 0.01 * torch.randn(sum(t.rank for t in factors.layout), generator=draw)})
        _generated(engine, shape, [policy] * shape.rows)

    with _running(engine, shape, factors):
        times = interleaved({
            "base": lambda: _generated(engine, shape, [base] * shape.rows),
            "rollout": published,
            "again": lambda: _generated(engine, shape, [policy] * shape.rows),
        }, ROUNDS)  # fmt: skip
        figures = _figures(shape, times)
        return figures | {"over_base": measure(ratio(times, "base", "rollout")), "lost_by_fold": measure([engine.lost])}


def update(shape: BenchShape, folder: Path, factors: Factors) -> Figures:
    """The gradient of a batch of `rows` rollouts, in micro-batches of 8."""
    model = load_model(str(folder), factors.folder)
    ids = random.Random(0)

    def rollout() -> Rollout:
        tokens = [ids.randrange(len(SPECIAL), shape.vocabulary) for _ in range(shape.prompt + shape.new)]
        answer = Completion(
            prompt_ids=tuple(tokens[: shape.prompt]), text="", finish_reason="length", mixture=Mixture.base(),
            tokens=tuple(_token(id) for id in tokens[shape.prompt :]),
        )  # fmt: skip
        return Rollout(example=Example(id="x", messages=user("x"), row={}), completion=answer, grade=Grade.of(1.0))

    rollouts = [rollout() for _ in range(shape.rows)]
    z_1K = model.adapter.neutral[None].clone().requires_grad_()

    def step() -> None:
        for start in range(0, len(rollouts), 8):
            part = rollouts[start : start + 8]
            backward(model, z_1K, part, [1.0] * len(part), lam=0.1, temperature=1.0, batch=len(rollouts))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = interleaved({"update": step}, ROUNDS)
    tokens = [shape.rows * shape.new / seconds for seconds in times["update"]]
    figures: Figures = {"update_s": measure(times["update"]), "answer_tokens_per_s": measure(tokens)}
    if torch.cuda.is_available():
        figures["peak_gib"] = measure([torch.cuda.max_memory_allocated() / 2**30])
    return figures


PARTS: Mapping[str, Callable[[BenchShape, Path, Factors], Figures]] = {
    "vllm_mixtures": vllm_mixtures, "vllm_one": vllm_one, "transformers": transformers, "update": update,
}  # fmt: skip


def _token(id: int) -> Token:
    return Token(id=id, text="", logprob=-1.0)


def _config(shape: BenchShape) -> EngineConfig:
    tokens = shape.rows * (shape.prompt + shape.new + 64)
    return EngineConfig(kv_tokens=max(1024, tokens), batch_rows=shape.rows, batch_tokens=max(64, 16 * shape.rows))


@contextmanager
def _running(engine: Engine, shape: BenchShape, factors: Factors) -> Iterator[Engine]:
    draw, size = torch.Generator().manual_seed(1), sum(target.rank for target in factors.layout)
    engine.set_experts({f"e{i}": 1 + 0.01 * torch.randn(size, generator=draw) for i in range(EXPERTS)})
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _generated(engine: Engine, shape: BenchShape, mixtures: list[Mixture]) -> list[Completion]:
    draw = random.Random(0)
    words = range(len(SPECIAL), shape.vocabulary)
    prompts = [tuple(draw.choice(words) for _ in range(shape.prompt)) for _ in mixtures]
    sampling = SamplingParams(max_tokens=shape.new, ignore_eos=True)

    async def together() -> list[Completion]:
        rows = zip(prompts, mixtures, strict=True)
        return list(await asyncio.gather(*(engine.generate(prompt, mixture, sampling) for prompt, mixture in rows)))

    return asyncio.run(together())


def _speeds(engine: Engine, shape: BenchShape, sides: Mapping[str, int]) -> Figures:
    """Tokens per second with as many experts in the batch; 0 is the base."""
    draw = random.Random(1)

    def mixtures(count: int) -> list[Mixture]:
        some = [
            Mixture.of({f"e{i}": draw.uniform(0.2, 0.9)}) if count > 1 else Mixture.parse("e0") for i in range(count)
        ]
        return [some[i % count] if count else Mixture.base() for i in range(shape.rows)]

    chosen = {name: mixtures(count) for name, count in sides.items()}
    times = interleaved({name: partial(_generated, engine, shape, rows) for name, rows in chosen.items()}, ROUNDS)
    return _figures(shape, times) | {"over_base": measure(ratio(times, "base", "mixtures"))}


def _figures(shape: BenchShape, times: Mapping[str, list[float]]) -> Figures:
    tokens = shape.rows * shape.new
    return {f"{name}_tokens_per_s": measure([tokens / seconds for seconds in rounds]) for name, rounds in times.items()}
