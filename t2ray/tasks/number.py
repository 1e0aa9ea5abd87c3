"""Numbers as they are written: 72, -3, 1,200.50, .5, 3/4, 1 1/2, 1e3, 1.5 million. Standard library only.

The texts are those of `text.plain`. A number is a fraction, so that 3/4 and 0.75 are the same and 0.333 is not 1/3.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3, "K": 3, "M": 6}
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|(?<![.\w])\.\d+)(?:[eE][+-]?\d{{1,3}})?"

# The minus of "10-5" is no sign, and "1,2" is two numbers. No number are the digits of "m2", "1.2.3", "7^2" or "√4".
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])(?<![\d)\]] )-|\b(?:minus|negative)\s+)?"
    rf"(?<![\w/^√±])(?<!\d\.)(?:(?P<whole>{_WHOLE})\s+(?=\d+/\d))?(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?"
    r"(?!\.?\d)(?![eE][+-]?\d)(?!,\d{3}(?!\d))(?!\s?[\^π√²³⁴])(?!\s*/\s*\d)(?!\*\*)(?!\s?[xyn]\b|x\d)"
    r"(?P<scales>[kKM]\b|(?:\s*(?:hundred|thousand|million|billion|trillion)\b)*)",
    re.ASCII,
)
_COUNTED = re.compile(r"\b(?:step|part|case|question|problem|example)\s*#?\s*\d+", re.I | re.ASCII)
_BOUND = (
    r"(?:less|greater|more|fewer|lower|higher|larger|smaller|later|earlier) than|under|over|below|above|beyond|up to"
)
_PART = r"twice|thrice|half(?: of)?|double|triple|a (?:third|quarter|fifth|tenth) of"
_DOUBT = re.compile(rf"[<>≠]|\bnot\b|n't\b|\bor\b|\bbetween\b|\b(?:{_BOUND}|{_PART})\s+(?=[-.]?\d)", re.I)
_RAISED = re.compile(r"\d\s+(?:squared|cubed)\b", re.I)
_UNLIKE = re.compile(
    rf"(?:(?:not|n't)(?:\s+(?:be|equal|exactly))?(?:\s+to)?|\bor|[<>≠±]|\bbetween\b[^.]*\band|\b(?:{_BOUND}|{_PART}))\s*$",
    re.I,
)
_MOST = 100  # characters of a number


def numbers(text: str) -> list[tuple[int, Fraction | None]]:
    """Returns (position, value) of each number of a text; the value of 1/0 and of endless digits is None."""
    text = _COUNTED.sub(lambda match: " " * len(match[0]), text)
    return [(match.start(), _value(match)) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MOST:
        return None
    parts = [(match["whole"], "0"), (match["top"], "0"), (match["bottom"], "1")]
    whole, top, bottom = [Fraction((part or default).replace(",", "")) for part, default in parts]
    if bottom == 0:
        return None
    scale = Fraction(10 ** sum(_SCALES[word] for word in match["scales"].split()))
    return (whole + top / bottom) * (-scale if match["sign"] else scale)


def only(text: str) -> Fraction | None:
    """Returns the one number that an answer states: 72 for "72 clips (48 + 24)", "48 + 24 = 72" and "$x = 72"; or None.

    "1 hour 12 minutes", "7 or 8", "not 72" and "> 72" state none.
    """
    text = re.sub(r"\\f?boxed|[{}]", " ", text)
    text = re.sub(r"(?<![\d,.])\d{1,3}(?: \d{3})+(?![\d,/])", lambda match: match[0].replace(" ", ""), text)
    outside = re.sub(r"\([^()]*\)", " ", text)
    text = outside if numbers(outside) else text
    if (
        _DOUBT.search(text) or _RAISED.search(text) or re.search(r"(?:^|[=:])\s*-\s+[\d.]", text)
    ):  # "- 72" may be -72 or an item of a list
        return None
    sides = [numbers(side) for side in text.split("=")]
    stated = {side[0][1] for side in sides if len(side) == 1}
    return stated.pop() if len(stated) == 1 else None


def last(text: str) -> Fraction | None:
    """Returns the number that a text ends with: what its last line with a number states, or else its last number."""
    for line in reversed(text.splitlines()):
        if not numbers(line):
            continue
        outside = re.sub(r"\([^()]*\)", " ", line)
        sentences = re.split(r"(?<=[.!?])\s+", outside if numbers(outside) else line)
        line = next(sentence for sentence in reversed(sentences) if numbers(sentence))
        found = numbers(line)
        if (stated := only(line)) is not None:
            return stated
        at, value = found[-1]
        unlike = _UNLIKE.search(line[max(0, at - _MOST) : at]) or _RAISED.search(line[at:])
        return None if unlike else value
    return None
