"""HumanEval and EvalPlus: right code in any form passes, in the sandbox, and nothing else does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from waiting import GUARD_S

from t2ray.core import DataError
from t2ray.tasks import builtin, humaneval, mbpp_plus
from t2ray.tasks.verifier import Verifier, verify

PROMPT = '''from typing import List
import math


def shift(text: str) -> str:
    """ Moves every letter by one. """
    return "".join(chr(ord(c) + 1) for c in text)


def back(text: str, times: List[int]) -> str:
    """ Undoes `shift` as often as `times` has numbers.
    >>> back("b", [1])
    "a"
    """
'''
BODY = '    for _ in times:\n        text = "".join(chr(ord(c) - 1) for c in text)\n    return text\n'
TEST = """
METADATA = {"author": "x"}
def check(candidate):
    assert candidate("bcd", [1]) == "abc"
    for word in ("x", "hello"):
        assert candidate(shift(word), [0]) == word and math.isclose(len(word), len(candidate(word, [])))
"""
ROW = {"task_id": "HumanEval/0", "prompt": PROMPT, "canonical_solution": BODY, "test": TEST, "entry_point": "back"}
WHOLE = PROMPT + BODY
ALONE = WHOLE[WHOLE.index("def back") :]


def fence(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


RIGHT = {
    "the whole": [WHOLE, fence(WHOLE), fence(WHOLE, ""), f"Sure:\n\n{fence(WHOLE)}\nIt undoes.", fence(WHOLE, "py")],
    "without what the prompt has": [fence(ALONE), ALONE, f"Here it is:\n{fence(ALONE)}\nDone."],
    "a body": [BODY, BODY + "\n\ndef other():\n    pass", BODY + "print(back('b', [1]))", fence(BODY)],
    "a print": [
        fence(ALONE + "\nprint(back('b', [1]))"), fence(ALONE.replace("    return", "    print(text)\n    return")),
    ],
    "an import": [fence("import functools\n" + ALONE.replace("text\n", "functools.reduce(lambda a, b: a, [text])\n"))],
    "a helper": [fence(ALONE.replace("chr(ord(c) - 1)", "less(c)") + "\ndef less(c):\n    return chr(ord(c) - 1)")],
    "two blocks": [fence("def back(text, times): return ''") + "\nBetter:\n" + fence(ALONE)],
    "reasoning": ["<think>def back(...)</think>" + fence(ALONE), f"<think>{fence('x = 1')}</think>{fence(ALONE)}"],
    "an own test": [fence(ALONE) + "\n" + fence("assert back('b', [1]) == 'a'")],
}  # fmt: skip
WRONG = {
    "nothing": ["", "   ", "I would undo it.", fence(""), "pass", fence("pass"), PROMPT, fence(PROMPT)],
    "other code": [
        fence(ALONE.replace("- 1", "- 2")), "    return text", "    return None\n", fence(ALONE.replace("back", "ba"))
    ],
    "no end": [f"<think>{fence(WHOLE)}", "```python\ndef back(text, times):"],
    "no python": [
        fence("function back() {}", "js"), BODY.replace("for", "fore"), "    return (",
        fence(WHOLE, "js").replace("def", "fn"),
    ],
}  # fmt: skip
TRICKS = [
    fence("def back(text, times): raise SystemExit(0)"),
    fence("class Yes(str):\n    __eq__ = lambda *_: True\ndef back(text, times): return Yes('q')"),
    fence("def check(candidate): pass\ndef back(text, times): return 1"),
    fence("import builtins\nbuiltins.AssertionError = ValueError\ndef back(text, times): return 1"),
    fence("def shift(text): return text\ndef back(text, times): return text"),
    fence("def back(text, times): import os; os._exit(0)"),
]


def passes(text: str) -> bool:
    """Runs the program of a harmless completion with the test, here and not in the sandbox."""
    code = humaneval.program(text, ROW)
    namespace: dict[str, Any] = {}
    try:
        exec(f"{PROMPT}    pass\n{code or ''}\n{TEST}\ncheck(back)", namespace)
    except (AssertionError, NameError, TypeError, SyntaxError):
        return False
    return True


def test_right_code_is_found_in_any_form_and_other_code_is_not_made_right() -> None:
    assert [text for group in RIGHT.values() for text in group if not passes(text)] == []
    assert [text for group in WRONG.values() for text in group if passes(text)] == []


def test_the_sandbox_lets_right_code_pass_and_no_trick() -> None:
    texts = [RIGHT["a print"][0], RIGHT["a body"][0], *TRICKS, ""]
    with Verifier("t2ray.tasks.humaneval:reward", workers=2, timeout_s=GUARD_S) as check:
        grades = asyncio.run(check(texts, [ROW] * len(texts)))
    assert [grade.reward for grade in grades] == [1.0, 1.0] + [-1.0] * (len(TRICKS) + 1)


def test_a_gold_passes_and_the_splits_share_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROW | {"task_id": f"HumanEval/{i}"}) + "\n" for i in range(16)))
    task = builtin("humaneval", str(path))
    with Verifier(task.reward, workers=0) as check:
        assert verify(task, check, task.rows("all")[:1])["passed"] == 1
    ids = {split: {row["task_id"] for row in task.rows(split)} for split in ("train", "validation", "test")}
    assert [len(part) for part in ids.values()] == [2, 2, 12] and len(set.union(*ids.values())) == 16
    prompt = task.messages(ROW)[-1].content
    assert PROMPT in prompt and "return text\n" not in prompt
    path.write_text(json.dumps(ROW | {"entry_point": "bak"}))
    with pytest.raises(DataError, match="line 1: the prompt defines no function 'bak'"):
        builtin("humaneval", str(path))


# ------------------------------------------------------------------------------------------------------------- evalplus

PLUS = """
import numpy as np
from math import inf

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

inputs = [[[1.0, 2.0]], [[0.1, 0.2]], [[]], [[inf]]]
results = [[2.0, 4.0], [0.2, 0.4], [], [inf]]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(double(*inp), exp, 0)
"""
MBPP_ROW = {
    "task_id": 601, "prompt": "Write a function to double numbers.",
    "code": "def double(xs):\n    return [2 * x for x in xs]",
    "test_imports": ["import math"], "test_list": ["assert double([1]) == [2]"], "test": PLUS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "reward"),
    [
        ("def double(xs): return [x * 2 for x in xs]", 1),
        ("def double(xs): return [x * 2 + 1e-9 for x in xs]", 1),
        ("def double(xs): return [x * 2 + 1e-3 for x in xs]", -1),
        ("def double(xs): return [2] if xs == [1] else []", -1),
        ("def double(xs): return [x * 2 for x in xs][:1]", -1),
        ("def double(xs): return 2 * xs", -1),
        ("import numpy\ndef double(xs): return [x * 2 for x in xs]", -1),
    ],
)
def test_the_tests_of_evalplus_run_without_numpy_and_decide(code: str, reward: int) -> None:
    assert mbpp_plus.reward(fence(code), MBPP_ROW) == reward


def test_humaneval_plus_is_graded_by_its_own_test(tmp_path: Path) -> None:
    tests = PLUS.replace("double(", "candidate(").replace("inputs = ", "def check(candidate):\n    inputs = ")
    head, _, tail = tests.partition("    inputs = ")
    row = {
        "task_id": "HumanEval/0", "prompt": "def double(xs):\n    ''' Doubles. '''\n", "entry_point": "double",
        "canonical_solution": "    return [2 * x for x in xs]\n",
        "test": head + "    inputs = " + tail.replace("\n", "\n    "),
    }  # fmt: skip
    assert [humaneval.reward(text, row) for text in ("    return [x * 2 for x in xs]", "    return xs")] == [1, -1]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    task = builtin("humaneval_plus", str(path))
    with Verifier(task.reward, workers=0) as check:
        assert verify(task, check)["passed"] == 1


def test_mbpp_plus_verifies_a_file_and_says_which_line_is_no_python(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(MBPP_ROW | {"task_id": i}) + "\n" for i in (2, 11, 510, 601, 602)))
    task = builtin("mbpp_plus", str(path))
    ids = {split: [row["task_id"] for row in task.rows(split)] for split in ("train", "validation", "test", "all")}
    assert ids == {"train": [601], "validation": [602], "test": [11, 510], "all": [2, 11, 510, 601, 602]}
    with Verifier(task.reward, workers=0) as check:
        assert verify(task, check, task.rows("train"))["passed"] == 1
    assert "assert double([1]) == [2]" in task.messages(MBPP_ROW)[-1].content
    path.write_text(json.dumps(MBPP_ROW | {"test": "for"}))
    with pytest.raises(DataError, match="line 1: the code or the test is no Python"):
        builtin("mbpp_plus", str(path))
