"""Runs model-written Python against tests in a sandbox: `check(code, tests, names=...)`, for use in reward functions.

What isolates the code:

- a fresh interpreter with the standard library alone, an empty environment, and an empty working folder of 16 MB and
  255 files;
- namespaces of its own: no network, no other process is visible, no file but the interpreter's library and the system's
  shared libraries, read-only. If the system refuses namespaces, bubblewrap (`bwrap`) gives the same;
- limits on wall time, CPU time, memory, file size and open files; no further process or thread; output is discarded,
  and an answer has at most 1 MiB;
- a filter that refuses the system calls for processes, signals, sockets, mounts and the kernel's rarer services;
- the tests are evaluated in another process than the candidate's, on plain values: see `sandbox.child`.

If a machine can isolate neither way, `check` raises, unless `allow_unsafe(True)` (`--unsafe-code`) was called. Then the
limits, the filter and the two processes remain, and what the candidate leaves running is ended, also outside of its
session. What `--unsafe-code` cannot stop:

- reading every file that this user can read, and the environment of this user's processes in /proc;
- writing and deleting this user's files, as many as the disk takes: also such as a shell, cron or Python runs later;
- reaching into this user's other processes through /proc, and so faking a verdict, or outliving it in one of them;
- asking a program that listens at a named pipe or reads a folder.

What it does not protect against:

- a hole in the kernel, in Python or in bubblewrap: it is no virtual machine; run strangers' models in one;
- hard-coded answers: the tests' arguments are no secret (MBPP's prompt shows the tests);
- the tests themselves, which are trusted: they are isolated too, but decide the verdict. A test such as
  `assert f(1) is not None` passes for any object. Tests cannot expect a certain exception or see a changed argument;
- timing and other side channels between sandboxes that run at once, and their CPU time together;
- the memory of all sandboxes together: each may use `memory_mb` twice (candidate and checker) and 16 MB of files;
- in user namespaces before Linux 5.14, a process limit of its own (the filter refuses processes anyhow).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2ray.core import ResourceError
from t2ray.sandbox import child

_CHILD = Path(child.__file__)
_ISOLATED = ("namespaces", "bubblewrap")
_unsafe = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of `check`: `Verdict(passed=False, reason="assert f(2) == 5: false")`, or with the reason "pass"."""

    passed: bool
    reason: str


def allow_unsafe(allowed: bool) -> None:
    """Sets whether `check` may run code without isolation, in this process, on a machine that cannot isolate it."""
    global _unsafe
    _unsafe = allowed


def check(
    code: str,
    tests: Sequence[str],
    *,
    names: Sequence[str],
    classes: Sequence[str] = (),
    setup: str = "",
    timeout_s: float = 9.0,
    cpu_s: int = 5,
    memory_mb: int = 512,
    mode: str | None = None,
) -> Verdict:
    """Says whether `code` passes all `tests`.

    Args:
        code: the candidate, the text of a Python module.
        tests: statements such as `assert f(2) == 4`, run in turn; the first that raises fails the candidate.
        names: the names that the tests use of the candidate (`["f"]`); all other names are the checker's own.
        classes: those of the names that are classes: tests may read attributes and call methods of what they make. What
            else the code returns must be a plain value for that.
        setup: statements that run before the tests and may use the same names.
        timeout_s: seconds for everything, the interpreter's start included.
        cpu_s: seconds of processor time for the candidate, and as many for the checker; unlike `timeout_s`, this limit
            does not depend on the machine's other load.
        memory_mb: address space of the candidate, and as much of the checker.
        mode: "namespaces", "bubblewrap" or "none"; if None, the first of them that works here (and is allowed).

    Raises:
        ResourceError: this machine cannot isolate code, and `allow_unsafe(True)` was not called.
    """
    allowed = (*_ISOLATED, "none") if _unsafe else _ISOLATED
    mode = mode or next(filter(_works, allowed), None)
    if mode is None:
        raise ResourceError(
            "cannot isolate model-written code here, neither by namespaces nor by bubblewrap: install it, use a "
            "machine that allows user namespaces, or accept the risk with --unsafe-code"
        )
    if mode == "none":
        warnings.warn("model-written code runs without isolation (--unsafe-code)", RuntimeWarning, stacklevel=2)
    request = {"names": [*names], "classes": [*classes], "setup": setup, "tests": [*tests]}
    verdict = _run(mode, memory_mb, cpu_s, code, request, timeout_s)
    if verdict.startswith("no isolation"):
        raise ResourceError(f"cannot isolate model-written code by {mode}: {verdict.partition(': ')[2]}")
    return Verdict(passed=verdict == "pass", reason=verdict.removeprefix("fail "))


@functools.cache
def _works(mode: str) -> bool:
    """Whether a harmless program passes in this mode on this machine."""
    request = {"names": ["f"], "classes": [], "setup": "", "tests": ["assert f() == 1"]}
    return _run(mode, 512, 5, "def f(): return 1", request, 10.0) == "pass"


def _run(mode: str, memory_mb: int, cpu_s: int, code: str, request: Mapping[str, object], timeout_s: float) -> str:
    frames = (code.encode("utf-8", "replace"), child.encode({**request}, int))
    data = b"".join(len(frame).to_bytes(8, "big") + frame for frame in frames)
    try:
        process = subprocess.Popen(
            _command(mode, memory_mb, cpu_s),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},  # the order of sets, and so a reward, is the same in every run
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:  # bubblewrap is not installed
        return f"no isolation: {error}"
    with process:
        try:
            out, _ = process.communicate(data, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"fail it took longer than {timeout_s:g} s"
        finally:
            _kill(process, mode)
    return out.decode("utf-8", "replace") or "fail the checker ended without a verdict"


def _kill(process: subprocess.Popen[bytes], mode: str) -> None:
    """Ends what is left of the child, and with it its own children: see `die_with_parent` and `end_with_child`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM if mode == "none" else signal.SIGKILL)


def _command(mode: str, memory_mb: int, cpu_s: int) -> list[str]:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    library = sysconfig.get_paths()["stdlib"]
    shown = list(dict.fromkeys(["/usr/lib", "/usr/lib64", "/lib", "/lib64", os.path.dirname(library), library]))
    child = [python, "-s", "-S", "-P", "-B", str(_CHILD), mode, str(memory_mb), str(cpu_s), *shown]
    if mode != "bubblewrap":
        return child
    bubblewrap = [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
        "--cap-add",  # until the child has mounted its working folder: bubblewrap cannot bound the number of files
        "CAP_SYS_ADMIN",
        "--dev-bind",
        "/dev/null",
        "/dev/null",
    ]
    for path in (*shown, python, str(_CHILD.parent)):
        bubblewrap += ["--ro-bind-try", path, path]
    return [*bubblewrap, "--dir", "/box", "--remount-ro", "/", "--chdir", "/box", *child]
