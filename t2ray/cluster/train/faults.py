"""Says in one line how a worker ended: where, with how much memory, most likely why, and what to change.

Ray's own account of a dead process is a page that begins with the process's number. The line is noted whenever a worker
fails, also when it is started again afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from t2ray.cluster.train.worker import task_name
from t2ray.runs.heartbeat import Heartbeat

_NEARLY_FULL = 0.9  # of a machine's memory at the last sign of life
_DIED = re.compile(r"died|is dead|low on memory|OutOfMemory|preempt")
_PID = r"pid[=:] ?(\d+)"
_LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|[Gg]loo|NCCL")


def diagnosis(domains: Sequence[str], causes: Mapping[int, BaseException], last: tuple[Heartbeat, ...]) -> str:
    """Returns one line about the worker that failed by itself; the others fail because they lose it.

    `worker 0 of domain 'math' died: node 10.0.0.7, pid 811, after step 12; the worker held 9.1 GiB, the machine 62.9 of
    64.0 GiB; most likely the machine ran out of memory: lower rl.micro_batch ...`
    """
    of = f"domain{'s' * (len(domains) > 1)} {', '.join(map(repr, domains))}"
    rank, cause = min(causes.items(), key=lambda item: (_follows(str(item[1])), item[0]))
    text = str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(cause).__name__]
    if "CUDA out of memory" in text:
        return (
            f"worker {rank} of {of}: the GPU's memory is full; lower rl.micro_batch or max_tokens, adapt "
            "fewer layers, or see `t2ray plan`"
        )
    if not _DIED.search(text):
        return f"worker {rank} of {of} failed: {_short(lines[-1])}"
    # Ray's account of a lack of memory lists many processes, the worker's own among them: a group's, or a task
    own = re.escape(task_name(domains))
    pids = re.findall(rf"(?:RayTrainWorker\.__init__|name={own}),.*pid=(\d+)", text) or re.findall(_PID, text)
    pid = pids[0] if pids else None
    # of another process: what its predecessor left
    seen = next((beat for beat in last if beat.rank == rank and pid in (None, str(beat.pid))), None)
    node = next(iter(re.findall(r"(?:node_ip='|ip: |IP: )([\w.:-]+)", text)), seen.host if seen else "unknown")
    after = f"after step {seen.step}" if seen else "before its first step"
    which = pid or (seen.pid if seen else "unknown")  # of a task Ray says no more than that it died
    what = f"worker {rank} of {of} died: node {node}, pid {which}, {after}"
    return "; ".join(part for part in (what, _memory(text, pid, seen), _likely(text, seen)) if part)


def _memory(text: str, pid: str | None, seen: Heartbeat | None) -> str:
    """Returns how much memory was held at the end, as Ray's memory monitor measured it or as the worker last told."""
    machine = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB limit", text)
    if machine is None:
        return f"at its last sign of life {seen.memory}" if seen else ""
    own = re.search(rf"pid={pid}, actual memory used=([\d.]+)GB", text)
    held = f"the worker held {own[1]} GiB, " if own else ""
    return f"at its end {held}the machine {machine[1]} of {machine[2]} GiB"


def _follows(text: str) -> int:
    """Returns 0 for a worker that died, 2 for one that only lost another, 1 for any other failure."""
    return 0 if _DIED.search(text) else 2 if _LOST.search(text) else 1


def _likely(text: str, seen: Heartbeat | None) -> str:
    """Returns the likely cause, and what to change."""
    memory = "lower rl.micro_batch, rl.samples or the domains at once (more cpus each), or take larger nodes"
    if "OutOfMemory" in text or "running low on memory" in text or "memory monitor" in text:
        limit = re.search(r"exceeded threshold of \d+B \(([\d.]+%)", text)
        return f"Ray's memory monitor ended it{f', above {limit[1]} of the machine' if limit else ''}: {memory}"
    if re.search(r"[Nn]ode .{0,80}(died|dead|removed|terminated)|preempt|NODE_DIED", text):
        return "its node went away (spot, or ended by hand): nothing to change, the run goes on where it has a node"
    if seen is not None and seen.used_gib > _NEARLY_FULL * seen.total_gib:
        return f"most likely the machine ran out of memory: {memory}"
    if "SIGSEGV" in text and "SYSTEM_ERROR" not in text:
        return "it crashed in native code: see the worker's log"
    return (
        "the machine had memory left, so somebody ended it, or it crashed in native code; if it was the system after "
        f"all (dmesg says so), {memory}"
    )


def _short(line: str) -> str:
    return line if len(line) <= 300 else f"{line[:300]} ..."
