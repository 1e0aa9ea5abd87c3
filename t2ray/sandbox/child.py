"""What runs inside the sandbox: a checker that evaluates the tests, and the candidate, which only answers its calls.

`sandbox.check` starts this file as a script in a fresh interpreter. It imports nothing of t2ray but `sandbox.jail`.

The candidate's code and the tests never share a process. The checker evaluates `assert f(2) == 4` with its own,
untouched builtins, where `f` is a stand-in: the call's arguments go to the candidate's process as bytes, the bytes of a
result come back and are read as plain values (numbers, text, lists, tuples, sets, dicts) and nothing else. So an exit,
a patched builtin, an object that equals everything or a printed "success" is at most a wrong answer. An object that is
no plain value stays in the candidate's process. The checker has a stand-in for it, which tests can call, pass on and
set attributes of, but not compare, count or test for truth. Only of what a class makes that the tests know as a class
can they read attributes and call methods: `f(3).startswith("nine")` asks text, and never an object that says yes.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # `typing` would take longer to import than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from t2ray.sandbox import jail
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import jail

    del sys.path[0]

MOST_BYTES = 1 << 20  # the largest answer
_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}


class Remote:
    """The checker's stand-in for an object in the candidate's process; `known` if it is or comes from a known class."""

    def __init__(self, number: int, ask: Callable[..., Any], known: bool) -> None:
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_known", known)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask(("call", self, args, kwargs), self._known)

    def __getattr__(self, name: str) -> Any:
        if not self._known:
            raise TypeError(f"the answer is no plain value: a test cannot use its {name!r}")
        return self._ask(("get", self, name), True)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask(("set", self, name, value), False)

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("the answer is no plain value: a test cannot compare it or take it for true")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __str__ = __repr__ = _refuse


# ------------------------------------------------------------------------------------------ plain values to bytes, back


def encode(value: Any, number_of: Callable[[Any], int]) -> bytes:
    """Returns `value` as bytes: a tag, a length or count of 8 bytes, the content. `number_of` numbers other objects."""
    if value is None:
        return _tagged(b"n", b"")
    if isinstance(value, bool):
        return _tagged(b"t" if value else b"f", b"")
    if isinstance(value, int):
        return _tagged(b"i", b"%x" % value)
    if isinstance(value, float):
        return _tagged(b"d", value.hex().encode())
    if isinstance(value, complex):
        return _tagged(b"c", value.real.hex().encode() + b" " + value.imag.hex().encode())
    if isinstance(value, str):
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray)):
        return _tagged(b"b", bytes(value))
    if isinstance(value, type) and value in _TYPES.values():
        return _tagged(b"y", value.__name__.encode())
    if isinstance(value, dict):
        value, tag = [part for item in value.items() for part in item], b"m"
    else:
        tags = {list: b"l", tuple: b"u", set: b"e", frozenset: b"z"}
        tag = next((tag for kind, tag in tags.items() if isinstance(value, kind)), b"")
    if not tag:
        return _tagged(b"r", b"%d" % number_of(value))
    return tag + len(value).to_bytes(8, "big") + b"".join([encode(part, number_of) for part in value])


def _tagged(tag: bytes, content: bytes) -> bytes:
    return tag + len(content).to_bytes(8, "big") + content


def decode(data: bytes, object_of: Callable[[int], Any]) -> Any:
    """Returns the value that `encode` made bytes of; raises for any other bytes, and never returns another type."""
    value, end = _decode(data, 0, object_of)
    if end != len(data):
        raise ValueError("malformed answer")
    return value


def _decode(data: bytes, at: int, object_of: Callable[[int], Any]) -> tuple[Any, int]:
    tag, count = data[at : at + 1], int.from_bytes(data[at + 1 : at + 9], "big")
    at += 9
    if not tag or at > len(data) or count > len(data):
        raise ValueError("malformed answer")
    if tag in b"lumez":
        parts = []
        for _ in range(count):
            part, at = _decode(data, at, object_of)
            parts.append(part)
        if tag == b"m":
            return dict(zip(parts[::2], parts[1::2], strict=True)), at
        return {b"l": list, b"u": tuple, b"e": set, b"z": frozenset}[tag](parts), at
    text = data[at : at + count].decode("utf-8", "surrogatepass") if tag != b"b" else ""
    readers: dict[bytes, Callable[[], Any]] = {
        b"n": lambda: None,
        b"t": lambda: True,
        b"f": lambda: False,
        b"i": lambda: int(text, 16),
        b"d": lambda: float.fromhex(text),
        b"c": lambda: complex(*map(float.fromhex, text.split(" "))),
        b"s": lambda: text,
        b"b": lambda: data[at : at + count],
        b"y": lambda: _TYPES[text],
        b"r": lambda: object_of(int(text)),
    }
    return readers[tag](), at + count


def read_frame(file: int, most: int) -> bytes:
    """Reads one frame from a descriptor: 8 bytes of length, then so many bytes, which are returned.

    Raises:
        EOFError: the other side has ended.
        ValueError: the frame has more than `most` bytes.
    """

    def exactly(count: int) -> bytes:
        parts = []
        while count:
            part = os.read(file, min(count, 1 << 16))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    length = int.from_bytes(exactly(8), "big")
    if length > most:
        raise ValueError(f"an answer of {length} bytes is more than {most}")
    return exactly(length)


def write_frame(file: int, data: bytes) -> None:
    """Writes one frame to a descriptor: the length of `data` in 8 bytes, big-endian, then `data`."""
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(file, data) :]


# -------------------------------------------------------------------------------------------------------- two processes


def candidate(code: str, questions: int, answers: int) -> NoReturn:
    """Runs the code, then answers the checker's questions until it ends."""
    objects: list[Any] = []

    def number_of(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(code, "<candidate>", "exec"), module.__dict__)
        failed = ""
    except BaseException as error:  # any error, also SystemExit, is the candidate's answer
        failed = _described(error)
    while True:
        kind, target, *rest = decode(read_frame(questions, 1 << 30), lambda number: objects[number])
        try:
            if failed:
                raise RuntimeError(failed)
            if kind == "name":
                answer = encode(module.__dict__[target], number_of)
            elif kind == "call":
                answer = encode(target(*rest[0], **rest[1]), number_of)
            elif kind == "get":
                answer = encode(getattr(target, rest[0]), number_of)
            else:
                setattr(target, *rest)
                answer = encode(None, number_of)
            answer = b"+" + answer
        except BaseException as error:
            answer = b"-" + _described(error).encode("utf-8", "replace")
        write_frame(answers, answer)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def check(request: dict[str, Any], questions: int, answers: int) -> str:
    """Returns "pass", or how the first failing test failed."""

    def ask(question: tuple[Any, ...], known: bool) -> Any:
        write_frame(questions, encode(question, lambda remote: remote._number))
        answer = read_frame(answers, MOST_BYTES)
        if answer[:1] != b"+":
            raise RuntimeError(answer[1:400].decode("utf-8", "replace"))
        return decode(answer[1:], lambda number: Remote(number, ask, known))

    namespace: dict[str, Any] = {}
    step = "the code"
    try:
        namespace.update((name, ask(("name", name), name in request["classes"])) for name in request["names"])
        for step in (request["setup"], *request["tests"]):
            exec(compile(step, "<test>", "exec"), namespace)
    except EOFError:
        return f"{step}: the program ended before it answered"
    except AssertionError:
        return f"{step}: false"
    except BaseException as error:
        return f"{step}: {_described(error)}"
    return "pass"


def main() -> None:
    """Reads the code, isolates itself, starts the candidate, and only then reads the tests.

    Writes "pass", "fail ..." or "no isolation ..." to stdout, to which the candidate has no access.
    """
    mode, memory_mb, cpu_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.set_int_max_str_digits(0)
    code = read_frame(0, 1 << 30).decode("utf-8", "replace")
    nothing = os.open("/dev/null", os.O_RDWR)
    try:
        if mode == "namespaces":
            jail.die_with_parent()
            jail.enter_namespaces(sys.argv[4:])
        elif mode == "bubblewrap":
            jail.enter_box()
        else:
            jail.end_with_child()
        jail.give_up_rights(refuse_calls=False)
    except (OSError, KeyError) as error:
        os.write(1, f"no isolation: {error}".encode())
        return
    os.environ.clear()
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    if os.fork() == 0:
        for number, file in ((0, nothing), (1, nothing), (2, nothing), (40, theirs_in), (41, theirs_out)):
            os.dup2(file, number)
        os.closerange(3, 40)
        os.closerange(42, 1 << 16)
        try:
            jail.limit(memory_mb, cpu_s)
            jail.give_up_rights(refuse_calls=True)
        except (OSError, KeyError):
            os._exit(3)
        candidate(code, 40, 41)
    os.close(theirs_in)
    os.close(theirs_out)
    jail.limit(memory_mb, cpu_s)
    request = decode(read_frame(0, 1 << 30), int)
    verdict = check(request, ours_out, ours_in)
    os.write(1, (verdict if verdict == "pass" else f"fail {verdict}").encode("utf-8", "replace")[:2000])


if __name__ == "__main__":
    main()
    os._exit(0)
