"""The bench of sparse experts: a tenth of the components in every layer, four mixtures in one batch."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.core.reference import greedy
from benchmarks.core.shape import Subject
from benchmarks.harness import Figures, interleaved, measure, ratio
from t2ray.adapters.model import load_model
from t2ray.adapters.sparse import sparsify
from t2ray.core import SamplingParams
from t2ray.engine.offline import OfflineEngine

KEEP, MIXTURES = 0.1, 4


def sparse(subject: Subject, repeats: int) -> Figures:
    """Measures four mixtures of sparse experts in one batch, compared with the base and with whole experts."""
    shape, whole = subject.shape, subject.model
    support_S = torch.randperm(whole.adapter.size, generator=torch.Generator().manual_seed(3))
    support_S = support_S[: int(KEEP * whole.adapter.size)].sort().values
    with tempfile.TemporaryDirectory() as folder:
        factors = sparsify(subject.factors, support_S, Path(folder, "sparse"))
        model = load_model(str(subject.factors.folder.parent / "model"), factors.folder, device="cpu")
        model.chat.eos_ids = whole.chat.eos_ids
        for name, z_K in whole.adapter.bank.items():
            model.adapter.set_experts({name: whole.adapter.neutral.index_copy(0, support_S, z_K[support_S])})
        few = replace(subject, model=model, engine=OfflineEngine(model))
        prompts, greedily = subject.prompts(shape.rows), [SamplingParams(max_tokens=shape.new)] * shape.rows
        some = subject.mixtures(MIXTURES)
        mixtures, ids_BT = [some[i % MIXTURES] for i in range(shape.rows)], subject.ids(prompts)
        sides = {
            "base": lambda: greedy(subject.plain, ids_BT, shape.new),
            "whole": lambda: subject.generate(prompts, mixtures, greedily),
            "sparse": lambda: few.generate(prompts, mixtures, greedily),
        }
        times = interleaved(sides, repeats)
    return {
        "over_base": measure(ratio(times, "base", "sparse"), 0.90),
        "over_whole": measure(ratio(times, "whole", "sparse")),
    }
