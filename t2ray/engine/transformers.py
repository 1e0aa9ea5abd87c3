"""The seam to transformers' continuous batching: the one place that leans on its insides.

The manager keeps the paged cache, the schedule and the loop's thread. Here it is told, at each step, to bind every
token to its request's mixture, and to let the engine choose the next tokens. Not here: what is bound and chosen
(`loop`). A release of transformers that moves the seam fails `tests/test_continuous.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter

from t2ray.config.serve import EngineConfig

PAGE_TOKENS = {"cpu": 16, "cuda": 256}
"""Tokens of a page of the cache: small ones waste little, flash attention on a GPU reads large ones."""

ID_BITS, SALT_BITS, SALTED = 20, 11, 4
"""Of a token's 31 bits those of its id, and those of the salt; and the number of tokens that have some of it."""

OVERFLOW = 1e15
"""Keys and values from here on are no model's, and add up to more than a mask takes away."""


class Steps(Protocol):
    """What the engine does at each turn of the loop, in the loop's thread."""

    def before_step(self) -> bool:
        """Before a batch is prepared; returns whether there is more to do before the next one."""
        ...

    def bound(self, requests: list[tuple[str, int]]) -> AbstractContextManager[None]:
        """Binds the packed tokens of a step: (request, its number of tokens), in order."""
        ...

    def choose(self, requests: list[str], logits_BV: Tensor) -> Tensor:
        """The next token, (B,), of each request that has read its prompt."""
        ...

    def after_step(self) -> None:
        """After the tokens were added, and the pages of what ended are free."""
        ...

    def fail(self, request: str | None, error: Exception) -> None:
        """A request, or with None all of them, that the manager gave up."""
        ...


class Manager(ContinuousBatchingManager):
    """transformers' manager, driving `Steps`."""

    def __init__(self, hf: Any, config: EngineConfig, steps: Steps) -> None:
        page = PAGE_TOKENS[hf.device.type]
        super().__init__(
            hf,
            GenerationConfig(do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=page,
                num_blocks=-(-config.kv_tokens // page),
                max_batch_tokens=config.batch_tokens,
                max_requests_per_batch=config.batch_rows,
                # Within a mixture alone, as far as ids leave room for its number: see `salted`.
                allow_block_sharing=hf.get_input_embeddings().num_embeddings <= 1 << ID_BITS,
                use_async_batching=False,
                use_cuda_graph=False,  # a replayed graph would keep the first step's mixtures
            ),
        )
        self.steps = steps
        self.overflowed: set[str] = set()
        self.refused: set[str] = set()
        self.logit_processor = _Chooser(self)
        self.output_router = _Router(steps)

    def begin(self) -> None:
        """Allocates the cache and starts the loop.

        Raises:
            MemoryError: the cache does not fit.
        """
        try:
            self.warmup()
        except Exception:
            if self._original_attn_impl is not None:
                self.model.set_attn_implementation(self._original_attn_impl)
            raise
        cache = self.batch_processor.cache
        if self.model.device.type == "cpu":
            cache.update = self._guarded(cache.update)
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request, ids: search(request, salted(request, ids))
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._shared(allocator.mark_complete_blocks)
        self.start()

    def _shared(self, mark: Any) -> Any:
        """`mark_complete_blocks` of an allocator, by mixture, and not of a request that has overflowed: it has zeros
        where another would overflow too, and be refused."""

        def shared(request: str, ids: list[int], blocks: int) -> None:
            if request not in self.overflowed:
                mark(request, salted(request, ids), blocks)

        return shared

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """The model with the attention that it was loaded with, for forwards that do not use the paged cache.

        Models without SDPA run with a paged attention of their own while the loop runs, which takes no other forward.
        """
        paged, plain = self.model.config._attn_implementation, self._original_attn_impl
        if plain is None or plain == paged:
            yield
            return
        self.model.set_attn_implementation(plain)
        try:
            yield
        finally:
            self.model.set_attn_implementation(paged)

    @property
    def pages(self) -> tuple[int, int]:
        """Bytes of the cache that are free, and all of them. What is kept for other requests is free when needed."""
        cache = self.batch_processor.cache
        kept = sum(len(one.ledger.cached_blocks) * one.bytes_per_block for one in cache.cache_allocators.values())
        return int(cache.compute_free_capacity(relative=False)) + kept, int(cache.num_sectors * cache.bytes_per_sector)

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that have pages, and those that wait for some."""
        scheduler = self.batch_processor.scheduler
        return len(scheduler.active_requests), len(scheduler.waiting_requests) + self.input_queue.qsize()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        if self.steps.before_step():
            self._wake_up_loop.set()
        goes_on: bool = super()._generation_loop_body(batch_processor, bootstrapping)
        self.overflowed -= self.refused
        self.refused.clear()
        self.steps.after_step()
        return goes_on

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs.requests_in_batch
        with torch.no_grad(), self.steps.bound([(future.state.request_id, future.query_length) for future in batch]):
            super()._generation_step()

    def _guarded(self, update: Any) -> Any:
        """`cache.update` that keeps a request's overflow to itself.

        On a CPU all tokens of a step share one attention with an additive mask, where one key near the largest number,
        or a weight of 0 times NaN, is NaN for everybody. A request with such keys or values gets zeros there, and is
        remembered: its scores are made NaN in the end.
        """

        def guarded(key_states: Tensor, value_states: Tensor, **kwargs: Any) -> Any:
            largest = torch.maximum(key_states.abs().amax(), value_states.abs().amax())
            if not bool(largest < OVERFLOW):  # also when it is NaN
                fine_T = ((key_states.abs() < OVERFLOW) & (value_states.abs() < OVERFLOW)).all(-1).all(1)[0]
                batch = self.batch_processor.inputs_and_outputs.requests_in_batch
                owners = [future.state.request_id for future in batch for _ in range(future.query_length)]
                self.overflowed |= {owner for owner, fine in zip(owners, fine_T.tolist(), strict=True) if not fine}
                keep_T1 = fine_T[:, None]
                key_states, value_states = (states.where(keep_T1, 0.0) for states in (key_states, value_states))
            return update(key_states=key_states, value_states=value_states, **kwargs)

        return guarded

    def _fail_all_remaining_requests(self, error: Exception, batch_processor: Any) -> None:
        super()._fail_all_remaining_requests(error, batch_processor)
        self.steps.fail(None, error)


def salted(request: str, ids: list[int]) -> list[int]:
    """The tokens that stand for a request's prefix where prefixes are compared: with its salt in their spare bits.

    Keys and values depend on z, and transformers shares the pages of equal tokens. A request's name begins with its
    salt, a number that is another for each z (`salt-number`); it takes the upper 11 bits of the first four tokens, of
    which a vocabulary leaves them free. Pages are longer than that, and each page's hash follows from the one before.
    """
    salt = int(request.partition("-")[0])
    first = [id | (salt >> SALT_BITS * i & (1 << SALT_BITS) - 1) << ID_BITS for i, id in enumerate(ids[:SALTED])]
    return first + ids[SALTED:]


class _Chooser(ContinuousBatchingLogitsProcessorList):
    """Stands where logits processors do: leaves one finite score a row, the chosen token's, for the argmax after it."""

    def __init__(self, manager: Manager) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._manager = manager

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        rows = [future.state.request_id for future in batch if future.has_new_token]
        lost = [i for i, row in enumerate(rows) if row in self._manager.overflowed]
        if lost:
            scores = scores.index_fill(0, torch.tensor(lost), torch.nan)
            self._manager.refused |= {rows[i] for i in lost}
        token_B = self._manager.steps.choose(rows, scores[: len(rows)])
        return torch.full_like(scores, -torch.inf).index_put_((torch.arange(len(rows)), token_B), scores.new_zeros(()))


class _Router(OutputRouter):
    """Hands failures on. Results go their own way (`Steps.after_step`), and would only pile up here."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps

    def deliver(self, output: Any) -> None:
        """Nobody collects it."""

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Nobody collects them."""

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """A request that was refused or given up."""
        self._steps.fail(state.request_id, error)
