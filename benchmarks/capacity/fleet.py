"""An endpoint of thousands of requests per second on GPUs, simulated from a model's shape: an extrapolation.

A GPU's speed is that of its data sheet times shares that are assumed here. The processor times of ingress and
dispatcher are those that the part `endpoint` measured on a CPU. Not here: the simulation itself (`simulate`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from benchmarks.capacity.simulate import Fleet, Simulation, Traffic
from benchmarks.harness import Figures, measure
from t2ray.runs.memory import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU: its data sheet in bfloat16, and the shares of it that are assumed to be reached.

    `host_s` is the least time of a step in seconds: Python and the launches of kernels, whatever the batch.
    """

    flops: float = 989e12
    bytes_s: float = 3.35e12
    of_flops: float = 0.4
    of_bytes: float = 0.7
    host_s: float = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The demand: requests per second, and tokens of the prompt, of pass 1's question around it and of the answer.

    `scored` is the share of requests whose pass 1 is not cached, `full` the share of time that GPUs shall be busy.
    """

    rate: float = 10_000.0
    prompt: int = 200
    question: int = 100
    answer: int = 64
    scored: float = 1.0
    full: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Processor seconds per request in an ingress and in a dispatcher, as measured by the part `endpoint`.

    `full` is the share of time that these processes shall be busy.
    """

    ingress_s: float = 0.008
    dispatch_s: float = 0.004
    full: float = 0.7

    def processes(self, rate: float, seconds: float) -> int:
        """Returns the number of processes for `rate` requests per second that take `seconds` each."""
        return ceil(rate * seconds / self.full)


def token_flops(shape: ModelShape) -> float:
    """Returns the operations of one token with a mixture of its own: adapted matrices take the way of their factors."""
    dense = shape.parameters - shape.vocabulary * shape.hidden  # the embeddings are looked up
    adapted = sum(target.m * target.n for target in shape.targets)
    factored = sum(target.rank * (target.m + target.n) for target in shape.targets)
    return 2.0 * (dense - adapted + factored)


def fleet(shape: ModelShape, demand: Demand, costs: Costs, device: Device, rows: int) -> Fleet:
    """Returns a fleet that carries the demand: replicas of one GPU with `rows` in the batch, ingresses, dispatchers."""
    flops, speed = token_flops(shape), device.flops * device.of_flops
    weights = flops / 2 * shape.size / (device.bytes_s * device.of_bytes)

    def step_s(running: int) -> float:
        cache = running * (demand.prompt + demand.answer / 2) * shape.kv_token_layer * shape.layers
        return max(device.host_s, weights + cache / (device.bytes_s * device.of_bytes), running * flops / speed)

    prompt_s = flops / speed
    score_s = (demand.prompt + demand.question) * flops / speed
    of_gpu = step_s(rows) / rows * demand.answer + demand.prompt * prompt_s + demand.scored * score_s
    return Fleet(
        step_s=step_s,
        replicas=ceil(demand.rate * of_gpu / demand.full),
        rows=rows,
        ongoing=rows,
        queued=1_000_000,
        prompt_s=prompt_s,
        score_s=(score_s, score_s),
        ingresses=costs.processes(demand.rate, costs.ingress_s),
        ingress_s=costs.ingress_s,
        dispatchers=costs.processes(demand.rate, costs.dispatch_s),
        dispatch_s=costs.dispatch_s,
    )


def figures(shape: ModelShape) -> Figures:
    """Returns the figures of fleets for 10,000 requests per second.

    `rows_64`, `rows_256`: batches of that many rows. `remembered`: pass 1 is cached for nine requests in ten. `burst`:
    30 % more requests than the fleet was made for. `ingresses_90_percent`: nine tenths of the ingresses that the
    requests keep busy all the time.
    """
    demand, remembered = Demand(), Demand(scored=0.1)
    costs, device = Costs(), Device()
    made = fleet(shape, demand, costs, device, rows=256)
    cases = {
        "rows_64": (fleet(shape, demand, costs, device, rows=64), demand),
        "rows_256": (made, demand),
        "remembered": (fleet(shape, remembered, costs, device, rows=256), remembered),
        "burst": (made, replace(demand, rate=1.3 * demand.rate)),
        "ingresses_90_percent": (replace(made, ingresses=int(0.9 * demand.rate * costs.ingress_s)), demand),
    }
    found: Figures = {}
    for name, (each, asked) in cases.items():
        found |= {f"{name}_{key}": value for key, value in simulated(each, asked).items()}
    return found


def simulated(made: Fleet, demand: Demand, seconds: float = 8.0) -> Figures:
    """Returns the figures of a fleet, empty at first, under Poisson arrivals for some seconds."""
    traffic = Traffic(
        rate=demand.rate, seconds=seconds, tokens=demand.answer, prompt=demand.prompt, scored=demand.scored
    )
    report: dict[str, Any] = Simulation(made, traffic).run()
    return {
        "gpus": measure([made.replicas]),
        "ingresses": measure([made.ingresses]),
        "dispatchers": measure([made.dispatchers]),
        "rows_a_step": measure([report["rows_a_step"]]),
        **{f"latency_{name}_ms": measure([value]) for name, value in report["latency_ms"].items() if name != "p90"},
        **{f"first_token_{name}_ms": measure([value]) for name, value in report["ttft_ms"].items() if name != "p90"},
    }
