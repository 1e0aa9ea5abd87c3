r"""Answers in LaTeX: the same however they are written, and nothing wrong, computed or repeated from the question."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from t2ray.core import DataError
from t2ray.tasks import builtin, latex
from t2ray.tasks.competition_math import extract, messages, reward

# gold -> (right, wrong): forms that stand beside each other differ by little
ANSWERS: dict[str, list[tuple[str, str]]] = {
    r"\frac{1}{2}": [
        (r"\dfrac{1}{2}", r"\frac{2}{1}"),
        (r"\frac12", r"\frac13"),
        ("1/2", "2/1"),
        ("0.5", "0.05"),
        (".5", "5"),
        (r"\tfrac 1 2", r"-\frac{1}{2}"),
        (r"x = \frac{1}{2}", r"x \ne \frac{1}{2}"),
        (r"$\frac{1}{2}$", r"\frac{2}{4}"),
        (r"\frac{1}{2}\text{ hour}", r"\frac{1}{3}\text{ hour}"),
        (r"\left(\frac{1}{2}\right)", r"1\frac{1}{2}"),
        (r"0.50", r"\frac{1}{4}+\frac{1}{4}"),
        (r"\frac{-1}{-2}", r"1 \div 4"),
    ],
    "10000": [
        ("10,000", "10,00"),
        (r"10{,}000", "1000"),
        (r"10\,000", "10.000"),
        ("10 000", "10 00"),
        (r"\$10,\!000", "10, 000, 1"),
        (r"10000\text{ dollars}", r"100^2"),
        ("10000.0", r"10^4"),
        ("10000 cm", r"100 \cdot 100"),
    ],
    "-7": [
        ("\u22127", "7"),
        ("- 7", r"\pm 7"),
        (r"x=-7", "10-17"),
        (r"-7^\circ", r"|-7|"),
    ],
    r"\frac{\sqrt{3}}{2}": [
        (r"\sqrt{3}/2", r"\sqrt{3/2}"),
        (r"\frac{\sqrt3}{2}", r"\frac{3}{2}"),
        (r"\frac12\sqrt{3}", r"\frac{1}{2}+\sqrt{3}"),
        (r"\dfrac{1}{2} \cdot \sqrt{3}", r"\frac{\sqrt[3]{3}}{2}"),
        (r"0.5\sqrt3", r"\sqrt{0.75}"),
        (r"\tfrac{\sqrt3}2", r"\tfrac2{\sqrt3}"),
    ],
    r"\frac{2\pi}{3}": [
        (r"2\pi/3", r"2\pi \cdot 3"),
        (r"\frac{2}{3}\pi", r"\frac{4\pi}{6}"),
        ("2\u03c0/3", r"\frac{2}{3\pi}"),
    ],
    "2x+3y": [
        ("3y + 2x", "2y+3x"),
        (r"2 \cdot x + 3 \cdot y", "2x-3y"),
        ("x \\cdot 2 + 3y", "(2x+3)y"),
        ("(2x+3y)", "2(x+3y)"),
        ("2x + 3y.", "23xy"),
    ],
    "x^2-1": [
        ("-1 + x^{2}", "(x-1)(x+1)"),
        ("x^2 - 1", "x^2 - 1 = 0"),
        ("f(x) = x^2 - 1", "2x - 1"),
        ("y=x^2-1", "x^{2-1}"),
    ],
    r"(1,\infty)": [
        (r"(1, \infty)", r"[1,\infty)"),
        (r"\left(1,\infty\right)", r"(\infty, 1)"),
        (r"x \in (1,\infty)", r"(-\infty, 1)"),
    ],
    r"(-\infty,-2]\cup[3,5)": [
        (r"[3,5) \cup (-\infty,-2]", r"(-\infty,-2)\cup[3,5)"),
        ("(-\\infty, -2] \u222a [3, 5)", r"(-\infty,-2]"),
    ],
    "1,-2": [
        ("-2, 1", "1, 2"),
        (r"1 \text{ and } -2", "1"),
        ("1 or -2", "1, -2, 3"),
        ("x = 1 or x = -2", "x = 1 or y = -2"),
        (r"x = 1 \text{ and } x = -2", "x = 1"),
        ("x = 1, -2", "x = 1, x = -2, x = 3"),
        (r"\{1, -2\}", "(1,-2)"),
    ],
    r"3\pm\sqrt{2}": [
        (r"3+\sqrt{2}, 3-\sqrt{2}", r"3+\sqrt{2}"),
        (r"3 - \sqrt2 \text{ or } 3 + \sqrt2", r"2\pm\sqrt{3}"),
    ],
    r"\begin{pmatrix}1&2\\3&-4\end{pmatrix}": [
        (r"\begin{bmatrix} 1 & 2 \\ 3 & -4 \end{bmatrix}", r"\begin{pmatrix}1&3\\2&-4\end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \\[4pt] 3 & - 4 \end{pmatrix}", r"\begin{vmatrix}1&2\\3&-4\end{vmatrix}"),
    ],
    r"\text{Evelyn}": [("Evelyn", "Eve"), (r"\mathrm{evelyn}", "nylevE"), (r"\textbf{Evelyn}.", "Evelyn or Briana")],
    r"\text{(C)}": [("C", "A"), ("(C)", "A, B, C, D"), (r"\text{C}", "(A) or (C)"), (r"\mathbf{C}", "CD")],
    "12": [
        (r"12\text{ cm}^2", "12 or 13"),
        ("12 \\mbox{ inches}", "x > 12"),
        (r"12\%", r"3 \cdot 4"),
        (r"12\mathrm{ miles}", "1,2"),
        ("12 square feet", r"12_7"),
        ("12.", "12x"),
        (r"n = 12", r"\approx 12"),
        ("12^{\\circ}", r"12!"),
        ("+12", r"\frac{24}{2}"),
    ],
    r"12\text{ cm}": [("12", r"12\text{ m}"), (r"12 \text{cm}", r"12\text{ cm}^2")],
    r"50\%": [("50", "0.5"), (r"50\%", r"5\%")],
    "4210_7": [("4210_{7}", "4210"), (r"4210_7", "4210_5")],
    r"\text{6:00 PM}": [("6:00 PM", "6:00 AM"), (r"6:00\text{ PM}", "18:00 PM")],
    r"\emptyset": [(r"\varnothing", r"\{0\}"), (r"\{\}", "0"), ("\u2205", r"\{\emptyset\}")],
    r"\binom{5}{2}|x|": [(r"\dbinom{5}{2}\lvert x\rvert", r"\binom{2}{5}|x|")],
    r"x \le 3": [(r"x \leq 3", "x < 3"), (r"3 \ge x", r"x \ge 3")],
    r"\sin x\cos y": [(r"\cos y \sin x", r"\sin y \cos x"), (r"\sin{x}\cos{y}", r"\sin(x\cos y)")],
    r"2\sqrt{3}": [(r"2 \sqrt 3", r"\sqrt{12}"), (r"\sqrt{3} \cdot 2", r"3\sqrt{2}")],
    "5/2": [(r"2\frac{1}{2}", r"21/2"), ("2 1/2", r"2\cdot\frac{1}{2}"), ("2.5", "2,5")],
}


@pytest.mark.parametrize(
    ("answer", "gold", "accepted"),
    [
        (text, gold, accepted)
        for gold, pairs in ANSWERS.items()
        for pair in pairs
        for text, accepted in zip(pair, (1, -1), strict=True)
    ],
)
def test_an_answer_is_the_same_in_any_form_and_no_other(answer: str, gold: str, accepted: int) -> None:
    row = {"problem": "?", "solution": rf"So it is $\boxed{{{gold}}}$."}
    assert reward(rf"We get $\boxed{{{answer}}}$.", row) == accepted
    assert latex.same(answer, gold) == latex.same(gold, answer) == (accepted == 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"first \boxed{1}, then" + "\n" + r"\boxed{2}", "2"),
        (r"\boxed{2} or \boxed{3}", "2, 3"),
        (r"\boxed{2} = \boxed{2}", "2"),
        (r"\boxed{\phantom{2}}\boxed{4}", "4"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{1", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{}", None),
        ("The answer is $12$.", "12"),
        ("**Final Answer:** 12", "12"),
        ("The final answer is 12, because it is.", "12"),
        (r"The answer is \(x+1\). It took 3 steps.", "x+1"),
        ("12", None),
        ("", None),
        (r"<think>\boxed{1}</think>", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{1}<think>hm", "1"),
    ],
)
def test_the_last_box_or_what_the_answer_is_called_is_the_answer(text: str, answer: str | None) -> None:
    assert (extract(text) or None) == answer


def test_a_prompt_does_not_answer_itself_and_nor_does_nothing() -> None:
    row = {"problem": r"What is $\boxed{3}$?", "solution": r"\boxed{4}"}
    assert reward(messages(row)[-1].content, row) == -1.0
    assert [reward(text, row) for text in ("", r"\boxed{}", r"\boxed{ }", r"\boxed{?}")] == [-1.0] * 4


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "{", "(", "1,", "\\frac{", "-", "\\boxed{1}", "1 ", "x", "\\sqrt", "[1,", "_"]
)
def test_no_text_takes_long_or_too_deep(piece: str) -> None:
    row = {"problem": "?", "solution": r"\boxed{" + piece.replace("\\boxed{", "x") * 100 + "1}"}
    start = time.process_time()
    for text in (piece * 5_000, r"\boxed{" + piece * 5_000 + "}", r"\boxed{" + piece * 150 + "}"):
        reward(text, row)
    assert time.process_time() - start < 10


def test_a_solution_without_a_box_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "?", "solution": "\\\\boxed{1}"}\n{"problem": "?", "solution": "it is 1"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the solution boxes no answer"):
        builtin("competition_math", str(path))
