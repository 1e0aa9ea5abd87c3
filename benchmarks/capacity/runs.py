"""Whole runs on Ray, in processes of their own: domains in parallel, a decomposition by several workers, starting up.

Times are read from the runs' files and their dates. Not here: the cost of a step (`steps`).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core.shape import BenchShape, make
from benchmarks.endpoint.private import PROGRAM
from benchmarks.harness import Figures, measure
from t2ray.adapters.factors import Factors, decompose
from t2ray.core import ResourceError

ROOT = Path(__file__).parents[2]
GAIN = 1.7
"""The speed that two cores must have over one."""

DOMAINS = {"math": "math", "code": "code", "pick": "pick", "again": "math"}
"""Domain -> task."""

RL = {"prompts": 64, "samples": 1, "lr": 0.01, "kl": 0.002, "eval_every": 1000, "eval_prompts": 64}
MATRICES = BenchShape(layers=8, width=768, inner=768, heads=12, experts=1)
"""A model to decompose, with all matrices of one size, so that their number measures the work."""

STAGES = {
    "parent_s": "called",
    "controller_s": "controller",
    "resources_s": "resources",
    "processes_s": "workers",
    "group_s": "started",
    "model_s": "loop",
}
"""The stages of a job of Ray Train in their order, each with the stamp at its end: the process that calls it, Ray
Train's controller, a placement group, the workers' processes, torch's process group; model, factors and task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """The times of a finished `t2ray train`, in seconds since 1970.

    The process began at `start`, wrote the run's configuration at `opened` and ended at `end`. `stages` has, per
    domain, the stamps of `STAGES`, the first worker's start (`began`), and the training loop from `loop` to `result`.
    """

    start: float
    opened: float
    end: float
    stages: Mapping[str, Mapping[str, float]]

    def span(self) -> float:
        """Returns the seconds from the first domain's loop to the last domain's result."""
        return max(s["result"] for s in self.stages.values()) - min(s["loop"] for s in self.stages.values())

    def alone(self) -> float:
        """Returns the seconds of all domains' loops, added up."""
        return sum(s["result"] - s["loop"] for s in self.stages.values())


def train(folder: Path, run: str, domains: Sequence[str], steps: int, **job: Any) -> FinishedRun:
    """Runs a job of the tiny model on a private Ray and returns its times.

    Raises:
        ResourceError: the job failed; the message has the end of its output.
    """
    place, stamps = folder / f"{run}.yaml", folder / f"{run}.stamps"
    job = {
        "model": "tiny", "run": run, "out": str(folder / "runs"), "factors": str(folder / "factors"), "verifiers": 0,
        "rl": RL | {"steps": steps}, "domains": {name: {"task": DOMAINS[name]} for name in domains}, **job,
    }  # fmt: skip
    place.write_text(json.dumps(job), encoding="utf-8")  # JSON is YAML too
    extra = {
        "RAY_TRAIN_CALLBACKS": "benchmarks.capacity.stamps.Stamps", "T2RAY_STAMPS": str(stamps),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),  # for the hooks
    }  # fmt: skip
    start = time.time()
    _call(["train", str(place)], extra)
    return _read(folder / "runs" / run, stamps, domains, start, time.time())


def _call(words: Sequence[str], extra: dict[str, str]) -> None:
    """Runs `t2ray` with these words, on a Ray of its own; raises ResourceError if it fails."""
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | extra
    done = subprocess.run([*PROGRAM, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ResourceError(f"t2ray {words[0]} failed ({done.returncode}): {' '.join(done.stderr.split())[-600:]}")


def _read(place: Path, stamps: Path, domains: Sequence[str], start: float, end: float) -> FinishedRun:
    lines = stamps.read_text(encoding="utf-8").splitlines() if stamps.exists() else []
    rows = [json.loads(line) for line in lines]
    called = sorted(row["at"] for row in rows if row["stage"] == "called")
    stages: dict[str, dict[str, float]] = {}
    for number, name in enumerate(domains):
        folder = place / "domains" / name
        (events,) = (folder / "tensorboard").iterdir()
        stages[name] = {row["stage"]: row["at"] for row in rows if row["domain"] == name}
        if called:
            stages[name]["called"] = called[number]
        stages[name]["began"] = json.loads((folder / "workers" / "0.json").read_text(encoding="utf-8"))["began"]
        # The name of TensorBoard's file has the time at which the loop began.
        stages[name]["loop"] = float(".".join(events.name.split(".")[3:5]))
        stages[name]["result"] = (folder / "result.json").stat().st_mtime
    return FinishedRun(start=start, opened=(place / "config.json").stat().st_mtime, end=end, stages=stages)


# ------------------------------------------------------------------------------------------------------------ domains


def domains(folder: Path, rounds: int = 2, steps: int = 80) -> Figures:
    """Returns the gain of two domains in parallel on Ray, a core each, over the same two in one process without Ray.

    Both domains have the same task, because a shorter one would leave its core idle. Times are those of the training
    loops, from the first rollout to the result; starting and ending Ray is measured separately.
    """
    decompose("tiny", folder / "factors")
    names = ["math", "again"]
    gains, over, starts = [], [], []
    for number in range(rounds):
        one = train(folder, f"one-{number}", names, steps, workers=0, cpus=1)
        two = train(folder, f"two-{number}", names, steps, workers=1, cpus=1)
        gains.append(one.alone() / two.span())
        over.append((one.end - one.start) / (two.end - two.start))
        starts.append((two.end - two.start) - two.span())
    return {
        "two_at_a_time": measure(gains, GAIN),
        "start_and_end_s": measure(starts),
        "with_start_and_end": measure(over),
    }


# ---------------------------------------------------------------------------------------------------- decomposition


def decomposition(folder: Path, rounds: int = 3, shape: BenchShape = MATRICES) -> Figures:
    """Returns the gain of two workers over one, each of one thread, and over one process of two threads."""
    make(shape, folder / "subject")
    model, gains, over, starts = str(folder / "subject" / "model"), [], [], []
    for number in range(rounds):
        rates, begun = {}, {}
        for name, workers, threads in (("one", 1, "1"), ("both", 1, "2"), ("two", 2, "1")):
            out, start = folder / f"{name}-{number}", time.time()
            words = ["decompose", model, "--out", str(out), "--workers", str(workers)]
            _call(words, {"OMP_NUM_THREADS": threads})
            rates[name], first = rate(out, workers)
            begun[name] = first - start
        gains.append(rates["two"] / rates["one"])
        over.append(rates["two"] / rates["both"])
        starts.append(begun["two"] - begun["one"])
    return {
        "two_workers": measure(gains, GAIN),
        "two_workers_over_two_threads": measure(over),
        "start_on_ray_s": measure(starts),
    }


def rate(out: Path, workers: int) -> tuple[float, float]:
    """Returns the matrices per second of a finished decomposition, and the time at which its first was done.

    The count begins when `workers` matrices were done. By then each worker may have begun its next one, so that one
    matrix per worker is not counted.
    """
    layout = Factors.open(out).layout
    ends = sorted((out / f"{target.name}.safetensors").stat().st_mtime for target in layout)
    left = ends[workers - 1 :]
    return (len(left) - workers) / (left[-1] - left[0]), ends[0]


# -------------------------------------------------------------------------------------------------------- startup


def startup(folder: Path, rounds: int = 2) -> Figures:
    """Returns the seconds of each stage of starting and ending a run, of the last domain to start.

    The run has three domains with one worker each. Figures that begin with `group_` are those of a run of one domain
    with two workers, which is a job of Ray Train.
    """
    decompose("tiny", folder / "factors")
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        three = train(folder, f"three-{number}", list(DOMAINS)[:3], 2, workers=1, cpus=0.5)
        group = train(folder, f"group-{number}", list(DOMAINS)[:1], 2, workers=2, cpus=0.5)
        for prefix, ran in (("", three), ("group_", group)):
            last = max(ran.stages.values(), key=lambda stages: stages["loop"])
            ends = {"imports_and_ray_s": ran.opened, "workers_s": last["began"], "model_s": last["loop"]}
            if prefix:
                ends = {"imports_and_ray_s": ran.opened, **{name: last[stamp] for name, stamp in STAGES.items()}}
            for (name, end), start in zip(ends.items(), (ran.start, *ends.values()), strict=False):
                found.setdefault(f"{prefix}{name}", []).append(end - start)
            result = max(stages["result"] for stages in ran.stages.values())
            found.setdefault(f"{prefix}end_s", []).append(ran.end - result)
            found.setdefault(f"{prefix}until_loop_s", []).append(last["loop"] - ran.start)
            found.setdefault(f"{prefix}total_s", []).append(ran.end - ran.start)
    return {name: measure(seconds) for name, seconds in found.items()}
