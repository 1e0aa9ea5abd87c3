"""The engine that serves a model: the online one where it computes what the model does, else batches of whole answers.

transformers' continuous batching does not run every architecture, and some it runs wrongly without a word: three tokens
and a scoring are compared with what the offline engine computes from the same model.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from t2ray.adapters.model import Model
from t2ray.config.serve import EngineConfig
from t2ray.core import Completion, GenerationError, Mixture, ModelError, SamplingParams, T2RayError
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.online import OnlineEngine
from t2ray.engine.protocol import Engine

log = logging.getLogger(__name__)

TEXT, LABELS = "1 2 3 4 5 6 7", ("8", "nine")
TOLERANCE = 1e-2, 0.5  # nats, of a logprob in full and in half precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What an engine computed: a greedy answer of three tokens, and the log-likelihoods of two labels."""

    answer: Completion
    scores: tuple[float, ...]


async def serving_engine(model: Model, config: EngineConfig) -> Engine:
    """A started engine for requests that come and go.

    Where continuous batching does not compute what the model does, and the log says why, requests that wait together
    share a batch, which ends as a whole: an answer waits for the longest beside it, and a stream comes at its end.
    """
    if config.tensor_parallel > 1:
        log.warning(
            "engine.tensor_parallel: %d changes nothing: transformers computes; use engine.kind: vllm, or leave it out",
            config.tensor_parallel,
        )
    wanted = await sample(OfflineEngine(model))
    try:
        return await _online(model, config, wanted)
    except ModelError as error:
        log.warning("%s; requests share batches of whole answers instead, and streams come at their end", error)
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    return OfflineEngine(model, max_batch_rows=config.batch_rows, max_batch_tokens=config.kv_tokens, pool=pool)


async def _online(model: Model, config: EngineConfig, wanted: Sample) -> Engine:
    compatible = getattr(model.hf, "is_backend_compatible", None)
    if compatible is not None and not compatible():
        raise ModelError(f"{model.family.architecture}: transformers' continuous batching does not support it")
    try:
        engine = OnlineEngine(model, config)
        engine.start()
    except (T2RayError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError) as error:  # layers that it has no cache for, or of several kinds
        raise ModelError(
            f"{model.family.architecture}: transformers' continuous batching does not support it ({error})"
        ) from error
    try:
        await compare(engine, model, wanted)
    except ModelError:
        engine.stop()
        raise
    return engine


async def compare(engine: Engine, model: Model, wanted: Sample) -> None:
    """Compares a started engine with what is `wanted` of it.

    Raises:
        ModelError: it computes something else.
    """
    try:
        found = await sample(engine)
    except GenerationError as error:
        raise ModelError(f"{model.family.architecture}: transformers' continuous batching fails ({error})") from error
    half = torch.finfo(model.hf.dtype).bits < 32
    pairs = zip((*wanted.answer.logprobs, *wanted.scores), (*found.answer.logprobs, *found.scores), strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    if found.answer.token_ids != wanted.answer.token_ids and not half or not difference <= TOLERANCE[half]:
        raise ModelError(
            f"{model.family.architecture}: transformers' continuous batching computes other answers than the model "
            f"(log-probabilities differ by {difference:.3g})"
        )


async def sample(engine: Engine) -> Sample:
    """What an engine computes of a short prompt with the base model."""
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    answer = await engine.generate(TEXT, Mixture.base(), sampling)
    return Sample(answer=answer, scores=await engine.score(TEXT, LABELS, Mixture.base()))
