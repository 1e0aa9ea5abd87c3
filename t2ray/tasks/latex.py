r"""Answers in LaTeX: which one a text boxes, and whether two are the same. Standard library only.

Two answers are the same if they are written alike up to what has no meaning: spaces and sizes, `\frac` and `/`,
decimals and fractions, units, the order of sums, products, sets and lists. Nothing is computed: `\frac{15}{45}`,
`2 \cdot 3`, `\sqrt{12}` and `(x-1)(x+1)` are not 1/3, 6, 2\sqrt{3} and x^2-1. Else an answer that repeats the question
would be right, and training would find out.
"""

from __future__ import annotations

import re
from typing import Any

from t2ray.tasks.algebra import expression

_MOST = 400  # characters of an answer that is read; a longer one is compared as it stands
_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\leq": "<=", "\\ge": ">=", "\\geq": ">=", "\\ne": "!=",
              "\\neq": "!=", "\\in": "in", "\\equiv": "=="}  # fmt: skip
_RELATION = re.compile(r"([=<>]|\\(?:leq?|geq?|neq?|in|equiv)(?![A-Za-z]))")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)\s+(?=[^{\s])")
_WORDS = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})])\s*\\(?:text(?:rm|normal)?|mbox|mathrm)\s*\{\s*([^{}]*)\}(\^\{?[23]\}?)?\s*$")
_PLAIN_UNIT = re.compile(r"(?<=[\d}])\s+((?!pi\b|and\b|or\b|mod\b)[A-Za-z]{2,}(?:[ /][A-Za-z]+)*(?:\^\{?[23]\}?)?)\s*$")
_AND = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*(?:,?\s*(?:and|or)\s*)\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)|(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")

# In this order.
_TIDY: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"[\u2212\u2013\u2010\u2011]", "-"),
        (r"\u00d7|\u00b7|\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|\\ast(?![a-zA-Z])", "*"),
        (r"\u03c0", r"\\pi "),
        (r"\u221a\s*\(?(\d+)\)?", r"\\sqrt{\1}"),
        (r"\u221e", r"\\infty "),
        (r"\u222a", r"\\cup "),
        (r"\u2264|\\leqslant", r"\\le "),
        (r"\u2265|\\geqslant", r"\\ge "),
        (r"\\varnothing(?![a-zA-Z])|\u2205|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\[lr]vert(?![a-zA-Z])", "|"),
        (r"\\[td]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\div(?![a-zA-Z])|\u00f7", "/"),
        (r"\\!|\\(?:left|right|[bB]ig[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:hspace|vspace)\{[^{}]*\}|[\u00a0\u2009\u202f]", " "),
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\\\$|[£€]", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\^\s*\{?\s*(?:\\circ|\u00b0)\s*\}?|\\degrees?(?![a-zA-Z])|\u00b0|\\?%", ""),
        (r"\{,\}", ","),
        (r"\\[hv]?phantom\s*\{[^{}]*\}", ""),
        (r"\\(?:dots|ldots|cdots)(?![a-zA-Z])", "..."),
    )
)


# -------------------------------------------------------------------------------------------------------- what is boxed


def boxed(text: str) -> str | None:
    r"""Returns what the last `\boxed{}` of a text holds, its braces balanced; None if there is none, or it never ends.

    Different boxes in one last line are one answer: "`\boxed{2}` or `\boxed{3}`" is the list "2, 3".
    """
    found: list[tuple[int, str]] = []
    end = 0
    for match in _BOX.finditer(text):
        start = match.end()
        if start < end:  # a box in a box
            continue
        inside = _braced(text, start) if text[start] == "{" else text[start:][:40].split(maxsplit=1)[0].rstrip("$.")
        if inside is None:
            return None
        end = start + len(inside)
        found.append((start, re.sub(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r"\1", inside)))
    if not found:
        return None
    line = text.rfind("\n", 0, found[-1][0])
    parts = dict.fromkeys(inside.strip() for start, inside in found if start > line)
    return ", ".join(part for part in parts if tidy(part))


def _braced(text: str, start: int) -> str | None:
    """Returns what stands between the brace at `start` and the one that closes it."""
    depth = 0
    for match in re.compile(r"\\[\\{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return None


# ----------------------------------------------------------------------------------------------------- what is the same


def same(one: str, other: str) -> bool:
    """Says whether two answers in LaTeX are the same, up to how they are written."""
    (a, unit), (b, other_unit) = _without_unit(one), _without_unit(other)
    if unit and other_unit and unit != other_unit:
        return False
    for sign in ("=", r"\\in(?![a-z])"):
        if bool(re.search(sign, a)) != bool(re.search(sign, b)):
            a, b = _unnamed(a, sign), _unnamed(b, sign)
    return bool(a.strip()) and _canonical(a) == _canonical(b)


def _unnamed(text: str, sign: str) -> str:
    """Returns 5 for "x = 5", and the list "5, 6" for "x = 5 or x = 6"; what names different things stays."""
    parts = _split(_AND.sub(",", text), ",")
    named = [re.match(rf"\s*([A-Za-z]|[a-z]\([a-z]\))\s*{sign}", part) for part in parts]
    names = {match[1] if match else "" for match in named[1:]} - {""}
    if named[0] is None or names - {named[0][1]}:
        return text
    return ",".join(part[match.end() :] if match else part for part, match in zip(parts, named, strict=True))


def _without_unit(text: str) -> tuple[str, str]:
    """Returns an answer in its tidied form and its unit: ("12", "cm") for `12\\text{ cm}.`"""
    text = tidy(re.sub(r"^\s*\\text\s*\{([^{}]*)\}\s*$", r"\1", text))
    match = _UNIT.search(text) or _PLAIN_UNIT.search(text)
    if match is None:
        return text, ""
    unit = "".join(part or "" for part in match.groups())
    return text[: match.start()], re.sub(r"[\s{}.]", "", unit).lower().rstrip("s")


def tidy(text: str) -> str:
    """Returns an answer without spaces and signs of LaTeX that mean nothing."""
    for pattern, by in _TIDY:
        text = pattern.sub(by, text)
    if text.lstrip()[:1] not in ("(", "[", "\\"):  # in a tuple or a set a comma separates
        text = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    text = re.sub(r"(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def _canonical(text: str) -> Any:
    """Returns a value that is equal for answers that are the same."""
    text = text.strip()
    words = re.sub(r"\s+", " ", _WORDS.sub(r"\1", text)).strip(" .")
    if re.fullmatch(r"\(?([A-Za-z])\)?", words):
        return ("letter", words.strip("()"))
    if re.fullmatch(r"[A-Z]{2,}", words):
        return ("words", words)
    if re.fullmatch(r"[A-Za-z][A-Za-z' -]*[A-Za-z]", words) and len(re.sub(r"[^A-Za-z]", "", words)) > 2:
        return ("words", words.lower())
    if len(text) > _MOST:
        return ("long", re.sub(r"\s", "", text))
    text = re.sub(r",(\s*,)+", ",", _AND.sub(",", text))
    for read in (_matrix, _collection, _relation, _formula):
        if (value := read(text)) is not None:
            return value
    return ("raw", re.sub(r"\s", "", text))


def _matrix(text: str) -> Any:
    match = re.fullmatch(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", text)
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
    kind = match[1] if match[1] in ("vmatrix", "Vmatrix") else "matrix"
    return (kind, tuple(tuple(_canonical(cell) for cell in row.split("&")) for row in rows))


def _collection(text: str) -> Any:
    """Reads a set, a list, a tuple, an interval or a union of these; None if the text is none."""
    if len(parts := _split(text, r"\cup")) > 1:
        return ("union", _unordered(parts))
    if len(parts := _split(text, ",")) > 1:
        return ("list", _unordered(parts))
    if text.count(r"\pm") == 1:
        return ("list", _unordered([text.replace(r"\pm", sign) for sign in "+-"]))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = _split(text[2:-2], ",")
        return ("list", _unordered(inside)) if len(inside) > 1 else ("set", _canonical(text[2:-2]))
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]" and len(inside := _split(text[1:-1], ",")) > 1:
        return (text[0] + text[-1], tuple(map(_canonical, inside)))
    return None


def _unordered(parts: list[str]) -> tuple[Any, ...]:
    return tuple(sorted(map(_canonical, parts), key=repr))


def _split(text: str, mark: str) -> list[str]:
    """Splits a text where a mark stands outside of all brackets; an interval may open with ( and close with ]."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"\\[{{}}]|[()\[\]{{}}]|{re.escape(mark)}", text):
        if match[0] == mark and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif match[0] != mark:
            depth += 1 if match[0][-1] in "([{" else -1
    return [*parts, text[start:]] if depth == 0 else [text]


def _formula(text: str) -> Any:
    return expression(_WORDS.sub(r"\1", text))


def _relation(text: str) -> Any:
    """Reads "x > 3", "1 < x \\le 2" or "y = 2x"; None if the text has no relation."""
    pieces = _RELATION.split(text)
    if len(pieces) < 3 or not all(piece.strip() for piece in pieces):
        return None
    signs, sides = [_RELATIONS[sign] for sign in pieces[1::2]], [_canonical(side) for side in pieces[::2]]
    if all(sign in (">", ">=") for sign in signs):
        signs, sides = [sign.replace(">", "<") for sign in reversed(signs)], sides[::-1]
    if signs in (["="], ["!="]):
        sides.sort(key=repr)
    return ("relation", tuple(signs), tuple(sides))
