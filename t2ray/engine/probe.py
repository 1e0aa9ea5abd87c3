"""A probe of an online engine: three tokens and a scoring are what the offline engine computes from the same model.

transformers' continuous batching does not run every architecture, and some it runs wrongly without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from t2ray.adapters.model import Model
from t2ray.core import Completion, GenerationError, Mixture, ModelError, SamplingParams
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.protocol import Engine

TEXT, LABELS = "1 2 3 4 5 6 7", ("8", "nine")
TOLERANCE = 1e-2, 0.5  # nats, of a logprob in full and in half precision
_REMEDY = "it can be trained and evaluated, and not be served"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What an engine computed: a greedy answer of three tokens, and the log-likelihoods of two labels."""

    answer: Completion
    scores: tuple[float, ...]


async def expected(model: Model) -> Sample:
    """What an online engine of this model has to compute; to be asked before it starts.

    Raises:
        ModelError: transformers says that it cannot batch this architecture continuously.
    """
    compatible = getattr(model.hf, "is_backend_compatible", None)
    if compatible is not None and not compatible():
        raise ModelError(
            f"{model.family.architecture}: transformers' continuous batching does not support it; {_REMEDY}"
        )
    return await _sample(OfflineEngine(model))


async def compare(engine: Engine, model: Model, wanted: Sample) -> None:
    """Compares a started engine with what is `expected` of it.

    Raises:
        ModelError: it computes something else.
    """
    try:
        found = await _sample(engine)
    except GenerationError as error:
        raise ModelError(
            f"{model.family.architecture}: transformers' continuous batching fails ({error}); {_REMEDY}"
        ) from error
    half = torch.finfo(model.hf.dtype).bits < 32
    pairs = zip((*wanted.answer.logprobs, *wanted.scores), (*found.answer.logprobs, *found.scores), strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    if found.answer.token_ids != wanted.answer.token_ids and not half or not difference <= TOLERANCE[half]:
        raise ModelError(
            f"{model.family.architecture}: transformers' continuous batching computes other answers than the model "
            f"(log-probabilities differ by {difference:.3g}); {_REMEDY}"
        )


async def _sample(engine: Engine) -> Sample:
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    answer = await engine.generate(TEXT, Mixture.base(), sampling)
    return Sample(answer=answer, scores=await engine.score(TEXT, LABELS, Mixture.base()))
