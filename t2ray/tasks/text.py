"""What chat models put around an answer: reasoning, tags, Markdown and LaTeX. Standard library only.

`settled` drops the reasoning, `plain` turns Markdown and LaTeX into plain text, `boxed` finds LaTeX boxes. They read a
text in linear time, however it was made. Not here: which part of a text is the answer; each task's module says that.
"""

from __future__ import annotations

import re
import unicodedata

_THOUGHT = re.compile(
    r"[<◁](think|thinking|thought|reasoning)[>▷].*?(?:[<◁]/\1[>▷]|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)", re.DOTALL | re.I
)
_THOUGHT_END = re.compile(r"[<◁]/(?:think|thinking|thought|reasoning)[>▷]|\[/THINK\]", re.I)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.I)
_BOXED = re.compile(r"\\f?boxed\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\S+))")

_WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}  # the full-width forms of ASCII: "１２" is "12"
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

# In this order. A currency sign is dropped, so that "-$5" and "$-5" are -5 and "$B$" is B.
_PLAIN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII | re.MULTILINE), by)
    for pattern, by in (
        (r"[ \t\r\f\v]+", " "),  # one space: no run of them is walked through twice
        (r"\n(?: ?\n)+", "\n"),
        (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator: 48/2 = <<48/2=24>>24
        (r"<\|[^<>|]*\|>|</?[A-Za-z][A-Za-z0-9]*[ /]{0,2}>", " "),  # <|im_end|>, <b>, </s>
        (r"<(-?[$€£¥₹]?\d[\d,.]*(?:/\d+)?%?)>", r" \1 "),  # <72>, as a prompt's "<number>"
        ("[\u200b-\u200f\u2060\ufe0e\ufe0f\ufeff]", ""),
        ("[❌✖✗✘🚫]", " not "),
        ("[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]", " "),
        ("(?<=\\d)[\u00a0\u2009\u202f'\u2019_](?=\\d{3}(?!\\d))|\\\\!", ""),  # 1'234, 1_234
        ("[\u00a0\u2009\u202f]", " "),
        ("\u2019", "'"),
        ("[\u3002\u3001]", ". "),  # the full stop and the comma of Chinese and Japanese
        ("\u2026", "..."),
        (r"^[ \t]*>[ \t]", ""),  # a quotation
        # ---------------------------------------------------------------------------------------------------- LaTeX
        (r"\{,\}", ","),
        (r"\\([$%#&_{}])", r"\1"),
        (r"\\(?:[,;: ()\[\]]|(?:left|right|displaystyle|quad|qquad)(?![A-Za-z]))|~", " "),
        (r"\\(?:text[a-z]*|math[a-z]+|mbox|boldsymbol|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"(?<=\d)\\[dtc]?frac", r" \\frac"),
        (r"\\[dtc]?frac\s*\{\s*([^{}]*)\}\s*\{\s*([^{}]*)\}", r"\1/\2"),
        (r"\\[dtc]?frac\s*(\d)(\d)", r"\1/\2"),
        (r"\\(?:times|cdot)(?![A-Za-z])|[×·]", "*"),
        (r"\\(?:approx|sim|implies|Rightarrow|rightarrow|to)(?![A-Za-z])|[≈→⇒]|[=-]>", "="),
        (r"\\pm(?![A-Za-z])\s?", "±"),
        (r"(?<=\d)\(([\d.,]+)\)", r"*\1"),  # 4(5)
        (r"\\(?:neq|ne|lt|gt|leq|le|geq|ge)(?![A-Za-z])|[≤≥]|!=", "≠"),
        (r"\^\s?\{?(?:\\circ(?![A-Za-z])|°)\}?", " "),  # 20^\circ
        (r"\\sqrt\s?\{?", "√"),
        (r"\\pi(?![A-Za-z])", "π"),
        (r" ?[*x] ?10\s?(?:\^|\*\*)\s?\{?([+-]?\d{1,3})\}?", r"e\1"),  # 2 * 10^3
        (r"(?<![\w.])10\s?\^\s?\{?([+-]?\d{1,3})\}?", r"1e\1"),
        (r"(?<=[A-Za-z])\s?\^\s?\{?[+-]?\d+\}?", ""),  # m^2
        # ------------------------------------------------------------------------------------ signs, currencies, marks
        ("(?<=[\\d)\\]])([ \\t]*)[\u2212\u2013]\\s*", r"\1- "),  # between two numbers
        ("\u2212\\s*", "-"),
        ("[\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d]", "-"),
        (r"(?<=\d)[$€£¥₹](?=\d)", " "),
        (r"(?:\b(?:US|CA|AU|C|A|HK))?[$€£¥₹]", ""),
        (r"\b(?:USD|EUR|GBP|INR|CAD|AUD|Rs\.?)\s*(?=[\d.-])", ""),
        (r"(?<=\d) ?[xX] ?(?=\d)", "*"),  # 3 x 24
        (r"(?<!\d)\*+|\*+(?!\d)", " "),
        (r"[_`\"“”]|(?<![A-Za-z])'|'(?![A-Za-z])", " "),
    )
)


def settled(text: str) -> str:
    """Returns what a text says after its reasoning, and of that the last `<answer>...</answer>`, if it has one.

    Reasoning is `<think>...</think>` and its like. What is never closed is reasoning to its end; what is never opened
    is reasoning from the text's beginning, because some prompts end with the opening tag.
    """
    text = _THOUGHT.sub("\n", text)
    for end in [*_THOUGHT_END.finditer(text)][-1:]:
        text = text[end.end() :]
    answers = _ANSWER.findall(text)
    return str(answers[-1]) if answers else text


def plain(text: str) -> str:
    r"""Returns a text without Markdown's and LaTeX's signs: `**\$1{,}200**` is " 1,200 "; `\boxed{}` stays."""
    text = re.sub(
        "(?<![\\d.,])10([⁻⁰¹²³⁴-⁹]+)", lambda match: f"10^{match[1].translate(_RAISED)}", text.translate(_WIDE)
    )
    for pattern, by in _PLAIN:
        text = pattern.sub(by, text)
    return re.sub(r"(\d?)([¼-¾⅐-⅞])", _vulgar, text, flags=re.ASCII)


def _vulgar(match: re.Match[str]) -> str:
    whole, part = match.groups()
    return f"{whole} "[: 2 * len(whole)] + unicodedata.normalize("NFKC", part).replace("\u2044", "/")


def boxed(text: str) -> list[str]:
    r"""Returns what stands in a text's boxes: `["3"]` for `x = \boxed{3}`."""
    return [inside or bare for inside, bare in _BOXED.findall(text)]
