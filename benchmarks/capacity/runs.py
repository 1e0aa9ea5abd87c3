"""Whole runs on Ray as processes of their own: domains beside one another, a decomposition shared out, starting up.

Times are read from what the runs leave: files and their dates. Not here: what a step costs (`steps`).
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
"""What two cores must give over one."""

DOMAINS = {"math": "math", "code": "code", "pick": "pick", "again": "math"}
"""Domains and their tasks."""

RL = {"prompts": 64, "samples": 1, "lr": 0.01, "kl": 0.002, "eval_every": 1000, "eval_prompts": 64}
MATRICES = BenchShape(layers=8, width=768, inner=768, heads=12, experts=1)
"""A model to decompose: all matrices of one size, so that counting them measures the work."""

STAGES = {
    "parent_s": "called",
    "controller_s": "controller",
    "resources_s": "resources",
    "processes_s": "workers",
    "group_s": "started",
    "model_s": "loop",
}
"""Of a job of Ray Train, one after the other, and the stamp that each ends with: the process that holds it, Ray Train's
controller, a placement group, the workers' processes, torch's process group, and model, factors and task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A finished `t2ray train`: when the process began, opened the run's folder and ended; and by domain what `STAGES`
    names, its first worker from `began` on, the training loop from `loop` to `result`. Seconds since the epoch."""

    start: float
    opened: float
    end: float
    stages: Mapping[str, Mapping[str, float]]

    def span(self) -> float:
        """From the first domain's loop to the last one's result."""
        return max(s["result"] for s in self.stages.values()) - min(s["loop"] for s in self.stages.values())

    def alone(self) -> float:
        """The domains' loops one after the other."""
        return sum(s["result"] - s["loop"] for s in self.stages.values())


def train(folder: Path, run: str, domains: Sequence[str], steps: int, **job: Any) -> Ran:
    """Runs a job on the tiny model on a private Ray, its stages stamped.

    Raises:
        ResourceError: it failed; with what it said last.
    """
    place, stamps = folder / f"{run}.yaml", folder / f"{run}.stamps"
    job = {
        "model": "tiny", "run": run, "out": str(folder / "runs"), "factors": str(folder / "factors"), "verifiers": 0,
        "rl": RL | {"steps": steps}, "domains": {name: {"task": DOMAINS[name]} for name in domains}, **job,
    }  # fmt: skip
    place.write_text(json.dumps(job), encoding="utf-8")  # which is YAML, too
    extra = {
        "RAY_TRAIN_CALLBACKS": "benchmarks.capacity.stamps.Stamps", "T2RAY_STAMPS": str(stamps),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),  # of the hooks
    }  # fmt: skip
    start = time.time()
    _call(["train", str(place)], extra)
    return _read(folder / "runs" / run, stamps, domains, start, time.time())


def _call(words: Sequence[str], extra: dict[str, str]) -> None:
    """`t2ray` with these words; one thread where nobody says otherwise, and no cluster but its own."""
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | extra
    done = subprocess.run([*PROGRAM, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ResourceError(f"t2ray {words[0]} failed ({done.returncode}): {' '.join(done.stderr.split())[-600:]}")


def _read(place: Path, stamps: Path, domains: Sequence[str], start: float, end: float) -> Ran:
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
        # TensorBoard's file is named for the moment at which the loop begins.
        stages[name]["loop"] = float(".".join(events.name.split(".")[3:5]))
        stages[name]["result"] = (folder / "result.json").stat().st_mtime
    return Ran(start=start, opened=(place / "config.json").stat().st_mtime, end=end, stages=stages)


# ------------------------------------------------------------------------------------------------------------ domains


def domains(folder: Path, rounds: int = 2, steps: int = 80) -> Figures:
    """Two domains on Ray at a time, a core each, over the same two one after the other in one process without Ray.

    Both are the same task: a shorter one would end early and leave its core idle. A loop goes from the first rollout to
    the result; starting and ending Ray is not in it, and is given apart.
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
    """Two workers over one, each of one thread; and over one process that uses both cores for every matrix."""
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
    """Matrices a second of a finished decomposition, and when its first was done.

    Counted from when `workers` were done. By then the others may have begun their next ones, and so one less than what
    is left is counted for each of them.
    """
    layout = Factors.open(out).layout
    ends = sorted((out / f"{target.name}.safetensors").stat().st_mtime for target in layout)
    left = ends[workers - 1 :]
    return (len(left) - workers) / (left[-1] - left[0]), ends[0]


# -------------------------------------------------------------------------------------------------------- startup


def startup(folder: Path, rounds: int = 2) -> Figures:
    """Seconds of starting and ending a run of three domains, a worker each; and, with `group_` before their names, of
    one domain with two workers, which is a job of Ray Train, in its stages. Times are the last domain's."""
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
