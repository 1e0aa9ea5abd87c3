"""Formulas in LaTeX as values that are equal if the formulas are the same. Standard library only.

A term is (coefficient, above, below): a fraction, and the sorted factors that multiply and divide it. A sum is
("sum", its sorted terms), but of one term it is that term. Nothing is computed: 2 * 3 is not 6.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import gcd
from typing import Any

_FUNCTIONS = {"\\" + name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "arcsin", "arccos",
                                       "arctan", "sinh", "cosh", "tanh", "gcd", "lcm", "max", "min")}  # fmt: skip
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|[A-Za-z]|[-+*/^_!()\[\]{}]")


def expression(text: str) -> Any:
    """Reads an expression; None if the text is none."""
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}", text)
    tokens = _TOKEN.findall(text)
    if not tokens or "".join(tokens) != re.sub(r"\s", "", text) or re.search(r"\d\s+\d", text):
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum()
    except (ValueError, RecursionError):
        return None
    return value if reader.at == len(tokens) else None


class _Reader:
    """Reads tokens by recursive descent; each method returns a canonical value and raises ValueError for no LaTeX."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0

    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.next()
        if not token or (wanted and token not in wanted):
            raise ValueError(token)
        self.at += 1
        return token

    def sum(self) -> Any:
        terms: list[Any] = []
        while not terms or self.next() in ("+", "-"):
            minus = False
            while self.next() in ("+", "-"):
                minus ^= self.take() == "-"
            coefficient, above, below = self.term()
            terms.append((-coefficient if minus else coefficient, above, below))
        if len(terms) > 1:
            return ("sum", _sorted(terms))
        coefficient, above, below = terms[0]
        alone = len(above) == 1 and above[0][0] == "sum" and (coefficient, below) == (1, ())
        return above[0] if alone else terms[0]

    def term(self) -> Any:
        above: list[Any] = [self.factor()]
        below: list[Any] = []
        while self.next() and self.next() not in ("+", "-", ")", "]", "}"):
            sign = self.take() if self.next() in ("*", "/") else ""
            value = self.factor()
            if not sign and not below and len(above) == 1 and _is_mixed(above[0], value):
                above = [(above[0][0] + value[0], (), ())]
            else:
                (below if sign == "/" else above).append(value)
        return _product(above, below)

    def factor(self) -> Any:
        value = self.base()
        while self.next() in ("^", "_", "!"):
            mark = self.take()
            value = _atom((mark, value) if mark == "!" else (mark, value, self.argument()))
        return value

    def argument(self) -> Any:
        """What follows `^`: one token, or braces."""
        if self.next() == "{":
            return self.base()
        token = self.take()
        return _number(token[0]) if token[0].isdigit() and len(token) == 1 else self._symbol(token)

    def _symbol(self, token: str) -> Any:
        if re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", token):
            return _number(token)
        if not token[-1].isalpha():
            raise ValueError(token)
        return _atom(token)

    def base(self) -> Any:
        token = self.take()
        if token in ("{", "(", "["):
            value = self.sum()
            self.take({"{": "}", "(": ")", "[": "]"}[token])
            return value if value[0] != "sum" else _atom(value)
        if token == "\\frac":
            top, bottom = self.group(), self.group()
            return _product([top], [bottom])
        if token == "\\sqrt":
            index = _number("2")
            if self.next() == "[":
                index = self.base()
            return _atom(("root", index, self.group()))
        if token in _FUNCTIONS:
            power: tuple[Any, ...] = ()
            while self.next() in ("^", "_"):
                power += (self.take(), self.argument())
            return _atom((token, power, self.factor()))
        return self._symbol(token)

    def group(self) -> Any:
        """What `\\frac` and `\\sqrt` take: one digit or symbol, or braces."""
        return self.base() if self.next() == "{" else self._symbol(self.take())


def _number(token: str) -> Any:
    return (Fraction(token), (), ())


def _atom(value: Any) -> Any:
    return (Fraction(1), (value,), ())


def _is_mixed(whole: Any, part: Any) -> bool:
    """Says whether two numbers side by side are a mixed number, such as 2 and 1/2."""
    return bool(whole[1:] == part[1:] == ((), ()) and whole[0].denominator == 1 and 0 < part[0] < 1 and whole[0] > 0)


def _product(above: list[Any], below: list[Any]) -> Any:
    """Multiplies terms without arithmetic: 2/3 is a number, but 2 * 3, 2/4 and (1/2)(1/3) stay as they are."""
    up = [factor for term in above for factor in term[1]] + [factor for term in below for factor in term[2]]
    down = [factor for term in above for factor in term[2]] + [factor for term in below for factor in term[1]]
    sign = (-1) ** sum(term[0] < 0 for term in above + below)
    tops = sorted(abs(term[0]) for term in above if abs(term[0]) != 1)
    bottoms = sorted(abs(term[0]) for term in below if abs(term[0]) != 1)
    top, bottom = (tops or [Fraction(1)])[0], (bottoms or [Fraction(1)])[0]
    plain = top.denominator == bottom.denominator == gcd(top.numerator, bottom.numerator) == 1 or not bottoms
    if len(tops) > 1 or len(bottoms) > 1 or bottom == 0 or not plain:
        return (Fraction(sign), _sorted([*up, ("numbers", tuple(tops), tuple(bottoms))]), _sorted(down))
    return (sign * top / bottom, _sorted(up), _sorted(down))


def _sorted(factors: list[Any]) -> tuple[Any, ...]:
    return tuple(sorted(factors, key=repr))
