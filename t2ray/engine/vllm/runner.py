"""Which token of a step is whose: what t2ray does inside of vLLM's workers, in its second runner and in its first.

The second runner, the one of GPUs, tells a model's state of every request; t2ray adds its own to that state. The first
one has no such place: its method that packs a step's tokens is wrapped, for CPUs, where the second does not run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from t2ray.engine.vllm import seams
from t2ray.engine.vllm.bank import ARGUMENT, Bank, mixture_of

_HOOKED = "t2ray_hooked"


def hook() -> None:
    """Lays t2ray's parts over both runners, once per process; without a bank they do what they always did."""
    runner = seams.first_runner()
    if not hasattr(runner, _HOOKED):
        setattr(runner, _HOOKED, True)
        _wrap_first(runner)
    if not seams.has_second_runner():
        return
    states = seams.model_states()
    if not hasattr(states, _HOOKED):
        setattr(states, _HOOKED, True)
        resolve = states.resolve_model_state_cls
        states.resolve_model_state_cls = lambda vllm_config, model: _state(resolve(vllm_config, model), vllm_config)


def bank_of(vllm_config: Any) -> Bank | None:
    """The bank of the worker that has this configuration; None where its model has no SVF layers."""
    bank = getattr(vllm_config.quant_config, "bank", None)
    return bank if isinstance(bank, Bank) and bank.mode == "mixtures" else None


def _argument(sampling_params: Any) -> object:
    return ((sampling_params and sampling_params.extra_args) or {}).get(ARGUMENT)


# ---------------------------------------------------------------------------------------------------- the second runner


def _state(cls: Any, vllm_config: Any) -> Any:
    """A model state that also tells the bank which request has which slot, and each token's slot."""
    found = bank_of(vllm_config)
    if found is None:
        return cls
    bank: Bank = found

    class State(cls):
        def add_request(self, req_index: int, new_req_data: Any) -> None:
            bank.begin(req_index, mixture_of(_argument(new_req_data.sampling_params)))
            super().add_request(req_index, new_req_data)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            slots = np.repeat(input_batch.idx_mapping_np, input_batch.num_scheduled_tokens)
            bank.bind(torch.from_numpy(slots))
            return super().prepare_inputs(input_batch, req_states)

    return State


# ----------------------------------------------------------------------------------------------------- the first runner


def _wrap_first(runner: Any) -> None:
    prepare = runner._prepare_inputs

    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *more: Any, **other: Any) -> Any:
        bank = bank_of(self.vllm_config)
        if bank is not None:
            ids = list(self.input_batch.req_ids)
            slots = _slots(bank, ids, {id: self.requests[id].sampling_params for id in ids})
            bank.bind(torch.from_numpy(np.repeat(slots, num_scheduled_tokens)))
        return prepare(self, scheduler_output, num_scheduled_tokens, *more, **other)

    runner._prepare_inputs = prepare_inputs


def _slots(bank: Bank, ids: list[str], sampling: dict[str, Any]) -> list[int]:
    """The slot of each request of a step; who is not in it any more has given its slot back."""
    taken = {id: slot for id, slot in bank.taken.items() if id in sampling}
    free = set(range(bank.slots)) - set(taken.values())
    for id in ids:
        if id not in taken:
            taken[id] = free.pop()
            bank.begin(taken[id], mixture_of(_argument(sampling[id])))
    bank.taken = taken
    return [taken[id] for id in ids]


# ------------------------------------------------------------------------------------------------------- between steps


class WorkerExtension:
    """What `collective_rpc` asks of each worker. Vectors come as their bytes, which every way of transport takes."""

    vllm_config: Any

    def t2ray_set_experts(self, changed: dict[str, bytes], gone: list[str]) -> None:
        """Adds experts, float32, by their keys, and forgets others."""
        vectors = {key: torch.frombuffer(bytearray(data), dtype=torch.float32) for key, data in changed.items()}
        self.vllm_config.quant_config.bank.set_experts(vectors, gone)

    def t2ray_fold(self, mixture: list[tuple[str, list[float]]]) -> float:
        """Folds a mixture into the weights; see `Bank.fold`."""
        lost: float = self.vllm_config.quant_config.bank.fold(mixture_of(mixture))
        return lost

    def t2ray_missing(self) -> list[str]:
        """The adapted matrices that no layer of this worker has."""
        bank = self.vllm_config.quant_config.bank
        missing: list[str] = bank.missing() if bank else ["all"]
        return missing
