"""What chat models write around an answer is read as the answer, and what differs from it by a little is not."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from t2ray.tasks import arc, gsm8k, mbpp
from t2ray.tasks.text import plain, settled

# ---------------------------------------------------------------------------------------------------------------- gsm8k

# gold -> (right, wrong): forms that stand beside each other differ by little
NUMBERS: dict[str, list[tuple[str, str]]] = {
    "18": [
        ("#### 18", "#### 81"),
        ("#### 18.", "#### 18.5"),
        ("#### 18.0", "#### 1.80"),
        ("#### +18", "#### -18"),
        ("#### **18**", "#### **-18**"),
        ("**#### 18**", "**#### 8**"),
        ("#### 18 eggs", "#### 18 or 19 eggs"),
        ("#### 18 eggs (9 + 9)", "#### 9 eggs (18 / 2)"),
        ("#### 18 ft2", "#### 18^2"),
        ("#### 18 ft^2", "#### 18²"),
        ("#### 18 cm²", "#### 18π"),
        ("#### 18 mph", "#### 18x"),
        ("#### 18 km/h", "#### 18/2"),
        ("#### $18", "#### -$18"),
        ("#### 18€", "#### $-18"),
        ("#### USD 18.00", "#### USD 1.800"),
        ("#### Rs. 18", "#### Rs. .18"),
        ("#### 18%", "#### 0.18"),
        ("#### 18\\%", "#### 18k"),
        ("#### 9 + 9 = 18", "#### 9 + 18 = 27"),
        ("#### x = 18", "#### x ≠ 18"),
        ("#### ≈ 18", "#### > 18"),
        ("#### Answer: 18", "#### Answer: not 18"),
        ("####\n18", "18\n####"),
        ("#### 36/2", "#### 18/36"),
        ("#### Part 1: halve 36\nfine\n#### 18", "#### Part 1: halve 36\n#### Part 18"),
        ("#### 1. Halve\n36/2\n#### 2. Check\nfine\n#### 18", "#### 18\n#### 19"),
        ("#### Working\n36/2 = 18", "#### Working\n36/2 = 18\n#### no idea"),
        ("= 18", "= 18 or 19"),
        ("The answer is 18.", "The answer is not 18."),
        ("The answer is 18 eggs.", "The answer is 1 dozen and 18 eggs."),
        ("**Final answer:** 18", "**Final answer:** 17 or 18"),
        ("The answer is 18 since 9 + 9 = 18.", "It isn't 18"),
        ("The answer is 18. It took 2 steps.", "The answer is 2. It took 18 steps."),
        ('{"answer": 18}', '{"answer": 8}'),
        ("\\boxed{18}", "\\boxed{17}, not 18"),
        ("So \\(\\boxed{18}\\) in 2 weeks.", "So \\(\\boxed{2}\\) in 18 weeks."),
        ("\\boxed{18 \\text{ eggs}}", "\\boxed{18 \\text{ or } 19}"),
        ("\\boxed{18^\\circ}", "\\boxed{18^2}"),
        ("$\\dfrac{36}{2}$", "$\\sqrt{18}$"),
        ("#### \\boxed{18}", "#### \\boxed{1.8}"),
        ("<answer>18</answer>", "<answer>8</answer>18"),
        ("<think>17? No.</think>#### 18", "<think>18? No.</think>#### 17"),
        ("17?</think>18", "18?</think>I do not know."),
        ("<think>17</think>\n<think>19</think>\n18", "<think>\n#### 18"),
        ("#### 18<|im_end|>", "#### 18 19"),
        ("#### **Step 1**: 27 - 9 = 18\n\n**Answer: 18**", "#### 1 hour 18 minutes"),
        ("18\nDone!", "between 17 and 18"),
        ("#### １８", "#### １８０"),
        ("#### 18 ✅", "#### 18 ❌"),
        ("#### half of 36 = 18", "#### half of 18"),
        ("Half of 36 is 18.", "#### 18 squared"),
        ("The answer is 17? No. The answer is 18.", "The answer is 18? No. The answer is 17."),
        ("The answer is 18 in all.", "#### ±18"),
        ("There are 18 eggs left.", "The answer is less than 18."),
        ("She has more than 10: 18.", "#### up to 18"),
        ("#### 3 x 6 = 18", "#### 3 x 6 = 19"),
        ("#### $6 x 3 = $18", "#### 3x6"),
        ("#### <18>", "#### <18"),
        ("#### <$18.00>", "#### 3 < 18 and 19 > 3"),
    ],
    "2500": [
        ("#### 2,500", "#### 2,50"),
        ("#### 2 500", "#### 2 5"),
        ("#### 2\u202f500", "#### 2.500"),
        ("#### 2_500", "#### 2,500,0"),
        ("#### 2{,}500", "#### 2{,}5"),
        ("\\boxed{2,\\!500}", "\\boxed{2.5}"),
        ("\\boxed{\\$2\\,500}", "\\boxed{2500.1}"),
        ("#### 2.5e3", "#### 2.5e2"),
        ("#### 2.5 \\times 10^3", "#### 2.5 \\times 10^2"),
        ("#### 2.5 thousand", "#### 2.5 million"),
        ("#### 2.5k", "#### 2500k"),
        ("#### 2.5×10³", "#### 2.5×10²"),
        ("#### $2,500.00", "#### 2500e999999999"),
    ],
    "-7": [
        ("#### -7", "#### 7"),
        ("#### \u22127", "#### \u221270"),
        ("#### \u2212 7", "#### 10 \u2212 7"),
        ("#### –7", "#### – 7"),
        ("#### minus 7", "#### minus 8"),
        ("It is negative 7.", "It is 7."),
        ("#### \u2212$7", "#### $7"),
        ("#### $-7$", "#### $7$"),
    ],
    "7": [
        ("#### 7", "#### \u22127"),
        ("10 \u2212 3 = 7", "10 \u2212 17 = \u22127"),
        ("#### (7)", "#### minus 7"),
        ("- 7", "#### - 7"),
    ],
    "2.5": [
        ("#### 5/2", "#### 2/5"),
        ("#### \\frac{5}{2}", "#### \\frac{2}{5}"),
        ("\\tfrac52", "\\tfrac25"),
        ("#### 2 1/2", "#### 21/2"),
        ("#### 2½", "#### 1½"),
        ("\\boxed{2\\frac{1}{2}}", "\\boxed{2}"),
        ("#### 2.50", "#### 2.05"),
        ("#### 2.5", "#### 2.5 thousand"),
    ],
    "2": [("#### 2", "#### 2 1/2"), ("#### 4/2", "#### 2/4"), ("#### 1 + 1 = 2", "#### 2/0")],
}


@pytest.mark.parametrize(
    ("completion", "gold", "accepted"),
    [
        (text, gold, right)
        for gold, pairs in NUMBERS.items()
        for pair in pairs
        for text, right in zip(pair, (1, -1), strict=True)
    ],
)
def test_gsm8k_accepts_the_right_number_in_any_form_and_no_other(completion: str, gold: str, accepted: int) -> None:
    assert gsm8k.reward(completion, {"answer": f"First <<1+1=2>>2.\n#### {gold}"}) == accepted


# ------------------------------------------------------------------------------------------------------------------ arc

LETTERS = {"label": ["A", "B", "C", "D"], "text": ["a root", "the leaf", "rain", "the Moon"]}
CHOICES = [
    ("B", "C"),
    ("b", "d"),
    ("(b)", "(e)"),
    ("[B]", "[AB]"),
    ("**B**", "**BC**"),
    ("**B.** the leaf", "**B.** rain"),
    ("`B`", "`Bee`"),
    ("$B$", "$B2$"),
    ("\\boxed{B}", "\\boxed{B or C}"),
    ("$\\boxed{\\text{(B)}}$", "$\\boxed{\\text{(D)}}$"),
    ("B - the leaf", "B - rain"),
    ("B – The leaf", "B and D"),
    ("B the leaf", "B rain"),
    ("B (the leaf)", "B (or C)"),
    ("B the leaf.", "B the leafy"),
    ("B because leaves are green.", "Because leaves are green."),
    ("B, since A is wrong", "A, since B is wrong"),
    ("B is correct.", "B is incorrect."),
    ("Option B is the right answer", "Option B is not the right answer"),
    ("Option B", "Options B, C"),
    ("choice (B)", "choice (B) or (C)"),
    ("Answer B", "Plan B"),
    ("answer: b", "answer: bad"),
    ("**Answer:** B", "**Answer:** B/C"),
    ("Answer = B", "Answer = B + C"),
    ("Answer - B", "Answer - A"),
    ("Answer: B (the leaf)", "Answer: B (rain)"),
    ("Answer: B the leaf", "Answer: A root"),
    ("Answer:\nB", "Answer:\nBees"),
    ("The best choice is (B).", "The best choice is (B) or (C)."),
    ("The answer is B, not D.", "The answer is not B."),
    ("It is green, so the answer is (B)", "It is green, so the answer is (C), not (B)"),
    ("Therefore, (B).", "Therefore, (B) fails."),
    ("It's B.", "It's C."),
    ("I would go with B.", "I would not go with B."),
    ('{"answer": "B"}', '{"answer": ["B", "C"]}'),
    ("Leaves are green.\n\nB", "Leaves are green.\n\nBees"),
    ("B\n\nExplanation: A is below ground.", "B\nC"),
    ("A. a root\nB. the leaf\nC. rain\nD. the Moon\n\nB", "A. a root\nB. the leaf\nC. rain\nD. the Moon"),
    ("B\n\nA. is below ground\nC. is wet", "B\n\nC. is wet"),
    ("<answer>B</answer>", "<answer>A</answer>B"),
    ("<think>A?</think>B", "<think>B</think>"),
    ("The answer is A.</think>B", "The answer is B.</think>A"),
    ("B<|eot|>", "<think>B"),
    ("Ｂ", "Ｃ"),
    ("✅ B", "❌ B"),
    ("👉 **B. the leaf**", "👉 **B. rain**"),
    ("B → the leaf", "B → rain"),
    ("Letter B", "Vitamin B"),
    ("The label is B", "The first label is A"),
    ("Ans. B", "Ants. B"),
    ("Correct: B", "Incorrect: B"),
    ("Sure, B.", "Sure, not B."),
    ("Of course! **B**", "Of course! B or C"),
    ("It is green, so B.", "It is green, so A, not B."),
    ("I think it's B", "I think it's B or C"),
    ("B is my answer", "B is my problem"),
    ("=> B", "!= B"),
    ("The answer is B.", "The wrong answer is B."),
    ("B would be correct.", "B would be wrong."),
    ("Only B makes sense.", "Only B fails."),
    ("The most likely answer is B.", "The least likely answer is B."),
    ("The correct answer among these is B.", "The incorrect answer among these is B."),
    ("A is wrong, so it's B.", "B is wrong, so it's A."),
    ("B is correct.", "B is correct? No."),
    ("Pick B", "Never pick B"),
    ("Option B is right about leaves", "Student B is right about leaves"),
    ('{"answer": "B", "reason": "A is below"}', '{"reason": "B is below", "answer": "A"}'),
    ('["B"]', '["B", "C"]'),
    ("B…", "B… or C"),
    ("B。", "B、C"),
    ("Leaves are green.\n\nB. the leaf", "Leaves are green.\n\nA. a root\nB. the leaf"),
    ("B. the leaf. A. a root is wrong.", "B. the leaf or A. a root"),
    ("B) the leaf. It is green.", "A. a root B. the leaf C. rain D. the Moon"),
    ("(B) the leaf", "(B) the leaf, (C) rain, and (D) the Moon"),
    ("The answer is B. the leaf.", "The answer is A. a root, B. the leaf, C. rain or D. the Moon."),
    ("The leaf (B)", "The leaf (C)"),
    ("The leaf. (B)", "The leaf. (C)"),
    ("The answer is the leaf (B).", "A root (A)\nThe leaf (B)"),
    ("B, not A", "A, not B"),
    ("B rather than (C)", "B rather than green"),
    ("I'd choose B over C.", "I'd choose C over B."),
    ("The answer is definitely B", "The answer is definitely not B"),
    ("The correct answer to this question is (B) the leaf.", "The correct answer to this question is not (B)."),
    ("The best answer from the given options is: B", "The answer for the wrong ones is B"),
    ("The right answer, then, is B.", "The answer here is B or C."),
]


@pytest.mark.parametrize(
    ("completion", "accepted"), [(text, right) for pair in CHOICES for text, right in zip(pair, (1, -1), strict=True)]
)
def test_arc_accepts_the_right_label_in_any_form_and_no_other(completion: str, accepted: int) -> None:
    assert arc.reward(completion, {"choices": LETTERS, "answerKey": "B"}) == accepted


@pytest.mark.parametrize(
    ("completion", "accepted"),
    [
        ("3", 1),
        ("3.", 1),
        ("3. 3.5 cm", 1),
        ("3.5 cm (3)", 1),
        ("2. 3 cm 3. 3.5 cm", -1),
        ("3: 3.5 cm", 1),
        ("3 3.5 cm", 1),
        ("**3**", 1),
        ("3, because 2 is wrong", 1),
        ("The answer is 3.", 1),
        ("Answer: 3", 1),
        ("3.5", -1),
        ("3,5", -1),
        ("3.5 cm", -1),
        ("3 cm", -1),
        ("3rd", -1),
        ("3/4", -1),
        ("3-4", -1),
        ("-3", -1),
        ("30", -1),
        ("The answer is 3.5.", -1),
        ("The answer is 3 cm", -1),
        ("Answer: -3", -1),
        ("2, because 3 is wrong", -1),
    ],
)
def test_arc_takes_no_part_of_a_number_for_a_label(completion: str, accepted: int) -> None:
    choices = {"label": ["1", "2", "3", "4"], "text": ["1 m", "3 cm", "3.5 cm", "3 apples"]}
    assert arc.reward(completion, {"choices": choices, "answerKey": "3"}) == accepted


# ----------------------------------------------------------------------------------------------------------------- mbpp

AREA = {
    "task_id": 1,
    "text": "Write a function for the area of a circle.",
    "code": "import math\ndef area(r):\n    return math.pi * r * r",
    "test_setup_code": "",
    "test_list": ["assert math.isclose(area(1), math.pi)", "assert area(0) == 0 and area(2) > 12"],
}
BODY = "def area(r):\n    return math.pi * r * r\n"
GOOD = "import math\n" + BODY
BAD = GOOD.replace("r * r", "r")


def fence(code: str, language: str = "python", mark: str = "```") -> str:
    return f"{mark}{language}\n{code}\n{mark}\n"


CODE = {
    "a language": [
        fence(GOOD, language) for language in ("", "py", "Python3", "{.python}", 'python title="a.py"', "text")
    ],
    "a fence": [fence(GOOD, mark="~~~"), fence(GOOD, mark="````"), "1. So:\n" + fence(GOOD).replace("\n", "\n  ")],
    "no end": ["```python\n" + GOOD, "[BEGIN]\n" + GOOD],
    "marks": [f"[BEGIN]\n{GOOD}\n[DONE]\nNext: write", GOOD + "[DONE]\nand so on", f"[PYTHON]\n{GOOD}[/PYTHON]"],
    "prose": [
        f"Here:\n\n{GOOD}\nIt squares r.",
        "Here:\n" + fence(GOOD) + "Fine.\n",
        "<answer>" + fence(GOOD) + "</answer>",
    ],
    "other blocks": [fence("pip install x", "bash") + fence(GOOD), fence(GOOD) + "prints\n" + fence("3.14", "")],
    "use of it": [fence(GOOD) + fence("print(area(2))\nassert area(1) == 4")],
    "use under its name": [fence(GOOD) + fence("area = area(2)\nprint(area)")],
    "Markdown in Markdown": [fence(fence(GOOD), "markdown", "````"), fence("# Area\n" + fence(GOOD), "md", "~~~")],
    "a better one": [fence(BAD) + "No:\n" + fence(GOOD), fence("def area(r): return ...(") + fence(GOOD)],
    "parts": [
        fence("import math") + fence(BODY),
        fence(BODY.replace("r * r", "sq(r)")) + fence("import math\n@staticmethod\ndef sq(r):\n    return r ** 2"),
    ],
    "reasoning": [f"<think>{fence(BAD)}</think>" + fence(GOOD), fence(BAD) + "</think>" + fence(GOOD)],
    "characters": [
        fence("\ufeff" + GOOD),
        fence(GOOD.replace("    ", "  \u00a0\u00a0")),
        fence(GOOD).replace("\n", "\r\n"),
        GOOD + "<|im_end|>",
        "<think>So</think>" + GOOD,
    ],
    "quotations": [
        fence(GOOD).replace("\n", "\n> ").join(("> ", "")),
        f"'''python\n{GOOD}'''",
        "    " + GOOD.replace("\n", "\n    "),
    ],
    "fences in strings": [
        fence(GOOD.replace("    return", "    s = '''```'''\n    return")),
        fence(GOOD.replace("    return", "    '''\n```python\narea(1)\n```\n    '''\n    return")),
    ],
    "names in parts": [
        fence("try:\n    import math\nexcept ImportError:\n    math = None\nTWO: int = 2")
        + fence(BODY.replace("r * r", "r ** TWO")),
    ],
}
NO_CODE = {
    "wrong": [fence(BAD), fence(GOOD) + "Better:\n" + fence(BAD), fence(GOOD.replace("area", "size"))],
    "reasoning": [
        f"<think>{fence(GOOD)}</think>" + fence(BAD),
        f"<think>{fence(GOOD)}</think>",
        "<think>" + fence(GOOD),
    ],
    "no code": [
        "",
        "I would square it.",
        fence(""),
        fence("assert True"),
        fence("function area(r) {}", "js"),
        "[DONE]" + GOOD,
    ],
    "not there": [fence("# " + GOOD.replace("\n", "\n# ")), f"def f():\n    {GOOD}".replace("\n", "\n    ")],
}


@pytest.mark.parametrize("kind", CODE)
def test_mbpp_finds_the_code_that_defines_the_function(kind: str) -> None:
    assert [text for text in CODE[kind] if mbpp.reward(text, AREA) != 1] == []


@pytest.mark.parametrize("kind", NO_CODE)
def test_mbpp_refuses_what_does_not_answer_with_right_code(kind: str) -> None:
    assert [text for text in NO_CODE[kind] if mbpp.reward(text, AREA) != -1] == []


# ----------------------------------------------------------------------------------------------------------------- text


def test_reasoning_ends_where_its_last_tag_ends() -> None:
    assert settled("a <think>b <think>c</think> d</think> e").strip() == "e"
    assert settled("a <THINK>b").strip() == "a"
    assert settled("no tags at all") == "no tags at all"


def test_marks_go_and_words_stay() -> None:
    assert plain("**\\$1{,}200** for `x_1`").split() == ["1,200", "for", "x", "1"]


@pytest.mark.parametrize(
    "piece", ["9", "1,", " ", "\n", "(", "*", "`", "```", "1 ", "{", "\\boxed{", "<think>", "> ", "so, ", "#### 1\n"]
)
def test_no_text_takes_long_to_read(piece: str) -> None:
    text = piece * (20_000 // len(piece))
    readers: list[Callable[[str], object]] = [
        gsm8k.extract,
        partial(arc.extract, choices=LETTERS),
        partial(mbpp.extract, names=["f"]),
    ]
    for read in readers:
        start = time.process_time()
        read(text)
        assert time.process_time() - start < 10  # a quadratic reading takes minutes
