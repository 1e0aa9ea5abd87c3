"""The sandbox holds what tries to get out, and no program that fails its tests can be taken for one that passes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import uuid
from functools import partial
from pathlib import Path

import needs
import psutil
import pytest
from waiting import GUARD_S, family, lives, wait_until

from t2ray.core import ResourceError
from t2ray.sandbox import check as sandbox
from t2ray.sandbox import child

SQUARE = ["assert f(3) == 9", "assert f(-2) == 4"]
# What the clock ends is only what a test lets it end: elsewhere a slow machine would fail an honest candidate.
check = partial(sandbox.check, timeout_s=GUARD_S)


MODES = [
    pytest.param(mode, marks=pytest.mark.skipif(not sandbox._works(mode), reason=needs.WALLS[mode]))
    for mode in ("namespaces", "bubblewrap")
]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def passes(code: str, *tests: str, mode: str | None = None, **limits: float) -> bool:
    return check(textwrap.dedent(code), tests or SQUARE, names=["f"], mode=mode, **limits).passed


# ---------------------------------------------------------------------------------------------------- honest candidates


@pytest.mark.parametrize(
    "value",
    ["None", "True", "-7", "2 ** 5000", "1.5", "float('inf')", "1e-320", "2 - 3j", "'\\u00e9 \\ud800'", "b'\\x00\\xff'",
     "[1, (2, {3: [4]})]", "{1, 2.5, 'x'}", "frozenset({(1,)})", "{'a': {'b': ()}}", "''", "[]", "int", "[str, None]"],
)  # fmt: skip
def test_plain_values_cross_both_ways_unchanged(value: str) -> None:
    data = child.encode(eval(value), int)
    assert child.decode(data, int) == eval(value)
    assert type(child.decode(data, int)) is type(eval(value))


def test_answers_are_compared_as_the_plain_values_they_are(mode: str) -> None:
    code = """
        import collections, math, sys
        print("noise on stdout"); print("and stderr", file=sys.stderr)
        def f(kind, *args, **kw):
            answers = {"args": [args, kw], "counter": collections.Counter("aab"), "point": point(1, 2), "nan": math.nan}
            return answers[kind]
        point = collections.namedtuple("point", "x y")
    """
    tests = [
        "assert f('args', 1, (2, 'three'), k={4}) == [(1, (2, 'three')), {'k': {4}}]",
        "assert f('counter') == {'a': 2, 'b': 1}",
        "assert f('point') == (1, 2) and f('nan') != f('nan')",
    ]
    assert check(textwrap.dedent(code), tests, names=["f"], mode=mode).reason == "pass"


def test_objects_of_the_candidate_can_be_built_changed_and_handed_back() -> None:
    code = """
        class Node:
            def __init__(self, v): self.v, self.next = v, None
        def f(node): return 0 if node is None else node.v + f(node.next)
    """
    setup = "root = Node(1)\nroot.next = Node(2)\nroot.next.next = Node(3)"
    names, tests = ["Node", "f"], ["assert f(root) == 6", "assert root.next.v == 2"]
    assert check(textwrap.dedent(code), tests, names=names, classes=["Node"], setup=setup).reason == "pass"


def test_a_wrong_answer_fails_and_says_by_which_test() -> None:
    verdict = check("def f(x): return x + x", ["assert f(2) == 4", *SQUARE], names=["f"])
    assert not verdict.passed and verdict.reason == "assert f(3) == 9: false"


def test_errors_fail_and_are_told() -> None:
    assert "ZeroDivisionError" in check("def f(x): return x / 0", SQUARE, names=["f"]).reason
    assert "SyntaxError" in check("def f(x: return", SQUARE, names=["f"]).reason
    assert "KeyError" in check("def g(x): return x", SQUARE, names=["f"]).reason


def test_two_runs_see_sets_in_the_same_order() -> None:
    code = "def f(x): return list({'ab', 'cd', 'ef', 'gh', 'ij', 'kl'})"
    assert len({check(code, ["assert f(0) == 0, f(0)", "x"], names=["f"]).reason for _ in range(2)}) == 1
    reasons = {check(code, ["raise ValueError(f(0))"], names=["f"]).reason for _ in range(3)}
    assert len(reasons) == 1 and "kl" in reasons.pop()


# -------------------------------------------------------------------------------------------------------- faked success

FAKES = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "exit when called": "import os\ndef f(x): os._exit(0)",
    "no function": "pass",
    "raises": "def f(x): raise SystemExit(0)",
    "returns true": "def f(x): return True",
    "equal to everything": """
        class Any:
            def __eq__(self, other): return True
            def __bool__(self): return True
            def __hash__(self): return 9
        def f(x): return Any()
    """,
    "int equal to everything": """
        class Int(int):
            def __eq__(self, other): return True
        def f(x): return Int(0)
    """,
    "list of objects equal to everything": """
        class Any:
            __eq__ = lambda self, other: True
        def f(x): return [Any()]
    """,
    "patched builtins": """
        import builtins
        builtins.AssertionError = type("E", (BaseException,), {"__init__": lambda *a: None})
        builtins.int = builtins.compile = builtins.exec = builtins.isinstance = lambda *a: True
        def f(x): return 0
    """,
    "patched interpreter": """
        import sys
        for module in list(sys.modules.values()):
            for name in ("check", "decode", "encode", "read_frame", "write_frame", "exec", "AssertionError"):
                try: setattr(module, name, lambda *a, **k: "pass")
                except Exception: pass
        def f(x): return 0
    """,
    "optimised asserts": "import sys, os; os.environ['PYTHONOPTIMIZE'] = '2'\ndef f(x): return 0",
    "printed marker": """
        import os
        for fd in range(64):
            try: os.write(fd, b"pass")
            except OSError: pass
        os._exit(0)
    """,
    "printed marker, then answers": "print('pass', flush=True)\ndef f(x): return 0",
    "atexit": "import atexit, os\natexit.register(lambda: (print('pass'), os._exit(0)))\ndef f(x): return 0",
    "stack walk": """
        import sys
        def f(x):
            frame = sys._getframe()
            while frame:
                frame.f_globals["check"] = lambda *a: "pass"
                frame = frame.f_back
            return 0
    """,
    "garbage search": """
        import gc
        for found in gc.get_objects():
            if isinstance(found, dict) and "tests" in found: found["tests"] = []
            if isinstance(found, list) and found and "assert" in str(found[0]): found.clear()
        def f(x): return 0
    """,
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\ndef f(x): return 0",
    "signals": """
        import signal
        for number in range(1, 32):
            try: signal.signal(number, lambda *a: None)
            except (OSError, ValueError): pass
        def f(x): return 0
    """,
    "malformed answers": "import os\nos.write(41, bytes(7) + b'\\x09+' + bytes(8))\ndef f(x): return 0",
    "endless answer": "import os\nos.write(41, b'\\xff' * 8 + b'+' * 4000)\ndef f(x): return 0",
    "deep answer": "def f(x):\n    v = []\n    for _ in range(100000): v = [v]\n    return v",
    "endless value": "def f(x):\n    v = []\n    v.append(v)\n    return v",
    "huge value": "def f(x): return 'x' * (1 << 22)",
}  # fmt: skip


@pytest.mark.parametrize("fake", FAKES)
def test_success_cannot_be_faked(fake: str) -> None:
    assert not passes(FAKES[fake], cpu_s=1)


@pytest.mark.parametrize(
    "test", ["assert f(3)", "assert not f(3)", "assert f(3) != 9", "assert f(3) in [9]", "assert {f(3)}"]
)
def test_an_object_is_never_taken_for_true_false_equal_or_unequal(test: str) -> None:
    assert not passes("class A: pass\ndef f(x): return A()", test)


YES = """
    class Yes:
        def __getattr__(self, name): return lambda *a: True
        ok = True
    def f(x): return Yes()
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert f(3).startswith('nine')",
        "assert f(3).ok",
        "assert hasattr(f(3), 'ok')",
        "assert getattr(f(3), 'ok', 0)",
        "assert (lambda y: y.isdigit())(f(3))",
        "x = f(3)\nassert x.ok",
        "assert f.ok",
    ],
)
def test_an_object_passes_no_test_by_its_methods(test: str) -> None:
    assert not passes(YES + "    f.ok = True", test)


def test_a_class_passes_as_a_function_for_no_test_that_asks_its_result() -> None:
    fake = "class f:\n    def __init__(self, x): pass\n    def startswith(self, text): return True"
    honest = "def f(x): return 'nine'"
    tests = ["assert f(3).startswith('nine')"]
    assert passes(honest, *tests) and not passes(fake, *tests)
    assert check(fake, tests, names=["f"], classes=["f"]).passed  # here the tests expect a class


def test_a_result_that_is_a_function_can_be_called() -> None:
    assert passes("def f(x): return lambda y: x + y", "assert f(3)(4) == 7")
    assert not passes("def f(x): return lambda y: x", "assert f(3)(4) == 7")


def test_bytes_that_no_encoder_wrote_never_become_a_value() -> None:
    good = child.encode([1, "x", {2: (3.0,)}], int)
    for at in range(len(good)):
        for byte in (0, 255, ord("l"), ord("q")):
            broken = good[:at] + bytes([byte]) + good[at + 1 :]
            try:
                value = child.decode(broken, int)
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            assert type(value) in (list, tuple, set, frozenset, dict, int)
    with pytest.raises(ValueError, match="malformed"):
        child.decode(good + b"x", int)


# ---------------------------------------------------------------------------------------------------------- containment


def end_of(code: str, mode: str | None, **limits: float) -> str:
    """Why a candidate that never answers was ended; by the clock only where the limits say so."""
    verdict = check(code, SQUARE, names=["f"], mode=mode, **limits)
    assert not verdict.passed
    return verdict.reason


WHOLE = 3  # processes of an isolated sandbox that runs: what holds the walls, the checker, the candidate
ENDED = "the code: the program ended before it answered"
BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"


def ok(body: str, mode: str) -> bool:
    """Whether the statements run without an error inside, and the sandbox still answers."""
    code = "def f(x):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n    return x * x"
    return passes(code, mode=mode)


def test_an_endless_loop_ends_by_its_cpu_time() -> None:
    assert end_of("while True: pass", None, cpu_s=1) == ENDED


def test_endless_sleep_ends_by_the_clock(mode: str) -> None:
    assert end_of("import time\nwhile True: time.sleep(1)", mode, timeout_s=1) == "it took longer than 1 s"


def test_a_memory_bomb_ends_in_a_memory_error(mode: str) -> None:
    reason = check("x = []\nwhile True: x.append(bytearray(1 << 24))", SQUARE, names=["f"], mode=mode).reason
    assert "MemoryError" in reason or "ended" in reason
    assert "MemoryError" in check("def f(x): return bytearray(1 << 32)", SQUARE, names=["f"], mode=mode).reason


def refused(statements: list[str], mode: str) -> bool:
    """Whether each of the statements, run inside, raises an exception."""
    code = f"""
        for statement in {statements!r}:
            try: exec(statement, {{}})
            except BaseException: continue
            raise SystemExit(statement)
        def f(x): return x * x
    """
    return passes(code, mode=mode)


def test_no_process_thread_or_program_can_be_started(mode: str) -> None:
    assert refused(
        [
            "import os; os.fork()",
            "import threading; threading.Thread(target=print).start()",
            "import subprocess; subprocess.run(['true'])",
            "import multiprocessing; multiprocessing.Process(target=print).start()",
            "import os; os.execv('/usr/bin/true', ['x'])",
            "import os; os.posix_spawn('/bin/true', ['x'], {})",
            "import ctypes; assert ctypes.CDLL(None).syscall(435, None, 0) >= 0",
        ],
        mode,
    )


def test_a_fork_bomb_goes_nowhere(mode: str) -> None:
    assert refused(["import os; os.fork()"] * 1000, mode)
    assert end_of(BOMB, mode, cpu_s=1) == ENDED


def test_nobody_is_home(mode: str, tmp_path: Path) -> None:
    home, secret = Path.home(), tmp_path / "secret"
    secret.write_text("x")
    private = [
        str(path) for path in (home / ".bashrc", home / ".ssh", "/etc/passwd", "/proc/self/environ", "/dev/mem", secret)
    ]
    assert ok(f"import os\nassert not any(os.path.exists(p) for p in {private})", mode)
    assert ok(f"import os\nassert not os.path.exists({str(Path(__file__))!r})", mode)


def test_the_environment_is_empty(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert ok("import os\nassert not os.environ and os.getenv('SECRET_TOKEN') is None", mode)


def test_the_folder_is_empty_writable_and_gone_afterwards(mode: str) -> None:
    code = """
        import os
        assert os.listdir() == []
        with open("file", "w") as file: file.write("x")
        assert os.listdir() == ["file"]
        def f(x): return x * x
    """
    assert passes(code, mode=mode) and passes(code, mode=mode)


def test_nothing_can_be_written_outside(mode: str) -> None:
    folders = ["", "/usr/lib", "/tmp", "/box/..", os.path.dirname(os.__file__), str(Path.home())]
    paths = [f"{folder}/{uuid.uuid4().hex}.py" for folder in folders]
    assert refused([f"open({path!r}, 'w')" for path in paths], mode)
    assert not any(os.path.exists(path) for path in paths)


def test_files_cannot_fill_the_disk(mode: str) -> None:
    assert "File too large" in end_of("with open('big', 'wb') as f:\n    while True: f.write(bytes(1 << 20))", mode)
    many = "for i in range(64):\n    with open(f'{i}', 'wb') as f: f.write(bytes(1 << 20))"
    assert not passes(many + "\ndef f(x): return x * x", mode=mode)


def test_files_are_counted(mode: str) -> None:
    code = """
        made = 0
        try:
            for made in range(10_000):
                open(str(made), "w").close()
        except OSError: pass
        def f(x): return x * x if made < 256 else made
    """
    assert passes(code, mode=mode)


def test_printing_gigabytes_costs_nothing(mode: str) -> None:
    assert end_of("while True: print('x' * (1 << 20))", mode, cpu_s=1) == ENDED
    assert ok("import sys\nfor _ in range(100): sys.stdout.write('x' * (1 << 20))", mode)


def test_there_is_no_network(mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        ways = (f"create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)", "socket(AF_UNIX)", "socketpair()")
        assert refused([f"from socket import *; {way}" for way in ways], mode)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_other_process_can_be_reached(mode: str) -> None:
    victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    targets = ("os.getppid()", "1", "-1", "0", str(victim.pid), str(os.getpid()))
    assert refused([f"import os; os.kill({target}, 9)" for target in targets], mode)
    assert victim.poll() is None
    victim.communicate(b"\n")


def test_the_walls_hold_against_new_namespaces_mounts_and_users(mode: str) -> None:
    libc = "import ctypes; c = ctypes.CDLL(None); "
    assert refused(
        [
            libc + "assert c.unshare(0x10000000) == 0",
            libc + "assert c.mount(b'x', b'/box', b'tmpfs', 0, None) == 0",
            libc + "assert c.umount2(b'/box', 2) == 0",
            libc + "assert c.ptrace(16, 1, 0, 0) == 0",
            "import os; os.chroot('/box')",
            "import os; os.setgroups([0])",
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        ],
        mode,
    )


def test_nothing_is_left_running(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[psutil.Process] = []
    end = sandbox._kill

    def noted(process: subprocess.Popen[bytes], mode: str) -> None:
        started.extend([psutil.Process(process.pid), *family(process.pid)])
        end(process, mode)

    monkeypatch.setattr(sandbox, "_kill", noted)
    for timeout_s in (0.5, 5.0, 50.0):  # the next where the machine was too slow for all of it to begin
        end_of("import time\ntime.sleep(600)", mode, timeout_s=timeout_s)
        if len(started) >= WHOLE:
            break
    assert len(started) >= WHOLE
    wait_until(lambda: not any(map(lives, started)), "the end of a sandbox whose time was up")


def test_the_sandbox_ends_when_its_owner_is_killed(mode: str) -> None:
    program = f"""
from t2ray.sandbox.check import check
check('import time; time.sleep(600)', [], names=['f'], mode={mode!r}, timeout_s=600)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1])
    try:
        wait_until(lambda: owner.poll() is not None or len(family(owner.pid)) >= WHOLE, "a sandbox that runs")
        started = family(owner.pid)
    finally:
        owner.kill()
        owner.wait()
    assert len(started) >= WHOLE
    wait_until(lambda: not any(map(lives, started)), "the end of a sandbox whose owner was killed")


# ---------------------------------------------------------------------------------------------------- without isolation


def test_without_isolation_it_refuses_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_ISOLATED", ())
    with pytest.raises(ResourceError, match="--unsafe-code"):
        check("def f(x): return x * x", SQUARE, names=["f"])
    sandbox.allow_unsafe(True)
    try:
        with pytest.warns(RuntimeWarning, match="without isolation"):
            assert check("def f(x): return x * x", SQUARE, names=["f"]).passed
    finally:
        sandbox.allow_unsafe(False)
    with pytest.raises(ResourceError):
        check("def f(x): return x * x", SQUARE, names=["f"])


@pytest.mark.filterwarnings("ignore:model-written code runs without isolation")
def test_limits_hold_without_isolation_too() -> None:
    assert end_of("while True: pass", "none", cpu_s=1) == ENDED
    assert not ok("import os\nos.fork()", "none")
    assert not ok("import os\nos.kill(os.getppid(), 9)", "none")
    assert not ok("import socket\nsocket.socket()", "none")
    assert not passes(FAKES["os._exit"], mode="none") and not passes(FAKES["equal to everything"], mode="none")


STAYS = {
    "when its time is up": "import os, time\nos.setsid()\ntime.sleep(600)",
    "after its answers": "import atexit, os, time\nos.setsid()\natexit.register(time.sleep, 600)\ndef f(x): return x*x",
    "though asked to end": "import os, signal, time\nos.setsid()\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(600)",
}


def left(name: str) -> list[int]:
    """The processes whose command line names a file so: those of a sandbox, and only of this test's."""
    found = [process for process in psutil.process_iter(["cmdline"]) if name in " ".join(process.info["cmdline"] or [])]
    return [process.pid for process in found if lives(process)]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that only this test's sandboxes have on their command lines."""
    name, command = f"sandbox-{uuid.uuid4().hex}", sandbox._command
    monkeypatch.setattr(sandbox, "_command", lambda *args: [*command(*args), name])
    return name


@pytest.mark.filterwarnings("ignore:model-written code runs without isolation")
@pytest.mark.parametrize("when", STAYS)
def test_what_leaves_the_session_is_ended_without_isolation_too(when: str, mine: str) -> None:
    verdict = check(STAYS[when], SQUARE, names=["f"], mode="none", timeout_s=GUARD_S if "answers" in when else 3)
    assert verdict.passed == ("answers" in when)
    assert left(mine) == []


def test_what_leaves_the_session_ends_with_the_owner_without_isolation_too(mine: str, tmp_path: Path) -> None:
    code = f"import os, time\nos.setsid()\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(600)"
    program = f"""
from t2ray.sandbox import check
command = check._command
check._command = lambda *args: [*command(*args), {mine!r}]
check.check({code!r}, [], names=['f'], mode='none', timeout_s=600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: owner.poll() is not None or (tmp_path / "begun").exists(), "a candidate that runs")
        family_of = [psutil.Process(pid) for pid in left(mine) if pid != owner.pid]
    finally:
        owner.kill()
        owner.wait()
    assert len(family_of) >= WHOLE
    wait_until(lambda: not any(map(lives, family_of)), "the end of a sandbox whose owner was killed")


def test_a_mode_that_this_system_lacks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_command", lambda *_: ["/nonexistent/bwrap"])
    with pytest.raises(ResourceError, match="bubblewrap"):
        check("def f(x): return x", SQUARE, names=["f"], mode="bubblewrap")
