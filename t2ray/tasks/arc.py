"""ARC-Easy and ARC-Challenge, science multiple choice (Clark et al. 2018; hub: allenai/ai2_arc). No rows are shipped.

One row: `{"question": "Which factor ...?", "choices": {"text": ["a leg ...", ...], "label": ["A", "B", "C", "D"]},
"answerKey": "B"}`. Some rows have the labels 1 to 4, some have three or five choices. The hub's three splits are used
as they are; a local file is split as GSM8K's is.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.tasks.files import read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import boxed, plain, settled

HUB = "allenai/ai2_arc"
COLUMNS = {"question": str, "choices": dict, "answerKey": str}

_CALLED = r"(?:(?:the|option|choice|letter|label|number)\s+)*[(\[]{0,3}LABEL"
_IS = (
    r" ?(?:(?:is|are|(?:would|must|should|will) be|therefore|thus|clearly|likely|probably|definitely|certainly"
    r"|:|=|-(?=\s))\s*)*"
)
_AMONG = (  # "to this question", "of the four"
    r"(?:,? (?:(?:among|of|from|to|for|in)(?: (?!(?:not|wrong|incorrect|false)\b)\w+){1,5}"
    r"(?=,? (?:is|would|must|should)\b| ?:)|here|then)\b,?)?"
)
_MOST = r"(?:(?:only|final|most (?:likely|appropriate|reasonable|suitable|plausible|accurate))\s+)?"
_RIGHT = (
    r"\s+(?:(?:is|would be|must be|should be|has to be)\s+(?:(?:the|my|our)\s+)?"
    rf"{_MOST}(?:correct|right|best|answer|choice)|makes (?:the most )?sense)\b(?![^.!\n]*\?)"
)
_LEADS = (
    "therefore|thus|so|hence|it is|it's|it must be|that is|that's|that would be|this is|this means|only|sure|certainly|"
    "of course|yes|ok|okay|i think|i believe|i would say|i'd say"
)
_BEFORE = (  # what a clause about a label begins with: "Model B is correct" is about a model
    r"(?:^|[.,;:!?>#*-]|\b(?:option|choice|answer|letter|label|so|thus|therefore|hence|that|but|only|because|since|then|is|"
    r"believe|think|say|conclude|makes|clearly|while|whereas|the))"
)
_SAID = (
    rf"(?<!wrong )(?<!worst )(?<!incorrect )(?<!false )(?<!least likely )"
    rf"\b(?:answer|ans\.?|(?:correct|right|best|final|my)\s+(?:option|choice|letter|label|one)){_AMONG}{_IS}{_CALLED}",
    rf"^\s*(?:the\s+)?(?:label|letter|choice|option|result|solution|correct|conclusion|final)\s*(?:is\s|[:=])\s*{_CALLED}",
    rf"(?<!not )(?<!n't )(?<!never )\b(?:choose|chose|pick|select|go with|going with)\s+{_CALLED}",
    rf"{_BEFORE}\s*[(\[]{{0,3}}(?<!\w)LABEL[)\]]*(?={_RIGHT})",
    rf"^\s*(?:(?:{_LEADS}|=)(?:\b|(?<==))[\s,:!=]*)+{_CALLED}(?=[.!,)\]\s]*$)",
    rf"[,;.]\s+(?:(?:so|therefore|thus|hence|it is|it's|it must be)[\s,:]+)+{_CALLED}(?=[.!,)\]\s]*$)",
)  # fmt: skip
_SPEAKS_OF_OTHERS = re.compile(
    r"\b(?:all|none|both|either|neither|any|some) (?:of )?(?:the )?(?:above|these|those|others)\b|\bthe above\b"
    r"|\b(?-i:[A-E]|[1-5]),? (?:and|or|nor|&) \(?(?-i:[A-E]|[1-5])\b",
    re.I,
)
_REASON = (
    rf"[)\]]?[,;.]?\s*(?:because|since|as it)\b|[)\]]?{_RIGHT}"
    r"|[)\]]?,?\s*(?:not|over|rather than|instead of)\s+[(\[]?(?:LABEL)(?!\w)"
)


def easy(data: str | Sequence[str] | None = None) -> Task:
    """The task ARC-Easy, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("arc_easy", f"{HUB}:ARC-Easy", data)


def challenge(data: str | Sequence[str] | None = None) -> Task:
    """The task ARC-Challenge, from the hub or from a local file with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("arc_challenge", f"{HUB}:ARC-Challenge", data)


def _task(name: str, hub: str, data: str | Sequence[str] | None) -> Task:
    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        if data is not None:
            return split_rows(_checked(read(data)))
        parts: dict[str, list[DataRow]] = {
            split: [*_checked(read(hub, split))] for split in ("train", "validation", "test")
        }
        return parts | {"all": [row for part in parts.values() for row in part]}

    if data is not None:
        splits()
    return Task(
        name=name,
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.arc:reward",
        gold=lambda row: str(row["answerKey"]),
        max_tokens=32,
        reading=lambda completion, row: extract(completion, row["choices"]),
        choices=lambda row: row["choices"]["label"],
        shuffle=shuffle,
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    table.need(COLUMNS)
    for place, row in zip(table.places, table.rows, strict=True):
        labels, texts = row["choices"].get("label"), row["choices"].get("text")
        if not labels or not texts or len(labels) != len(texts) or row["answerKey"] not in labels:
            raise DataError(
                f'{place}: choices must be {{"text": [...], "label": [...]}} of equal lengths, '
                f"with the answerKey {row['answerKey']!r} among the labels"
            )
    return table.rows


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the question, its labelled choices, and the form that the answer must have."""
    choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    lines = "\n".join(f"{label}. {text}" for label, text in choices)
    return user(f"{row['question']}\n\n{lines}\n\nAnswer with the label of the right choice alone.")


def shuffle(row: DataRow, rng: random.Random) -> DataRow:
    """Returns the row with its choices in another order under the same labels, and the answerKey of the right one.

    A row in which a choice speaks of others ("all of the above", "both A and B") stays as it is.
    """
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if any(_SPEAKS_OF_OTHERS.search(str(text)) for text in texts):
        return row
    order = rng.sample(range(len(texts)), len(texts))
    key = labels[order.index(labels.index(row["answerKey"]))]
    return {**row, "choices": {**row["choices"], "text": [texts[i] for i in order]}, "answerKey": key}


def reward(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion gives the right label as its one answer, else -1."""
    return 1.0 if extract(completion, row["choices"]) == row["answerKey"] else -1.0


def extract(completion: str, choices: Mapping[str, list[str]]) -> str | None:
    r"""Returns the one label that a text answers with, or None if it gives none or several.

    It counts after the reasoning (`text.settled`), in either case ("b"). "The answer is B.", "\boxed{B}", "Option B is
    correct", "Therefore, (B)." and the line "Sunlight (B)" count anywhere in the text, if all of them agree. Without
    them, the first or the last line must be the label alone ("B", "(B)"), or the first line must begin with the label
    before its choice or a reason ("B. sunlight", "B because ..."). "A or B" is no answer, nor is "2.5" for the label 2,
    nor a line of several choices ("A. soil B. sunlight"), nor prose that merely has a letter ("A plant needs").
    """
    text = plain(settled(completion))
    for box in boxed(text)[-1:]:
        text = box
    text = re.sub(r"[{}]", " ", text).strip()
    answers = _Answers(choices)
    said = answers.said(text)
    if said is None:
        said = answers.of_lines([line for line in text.splitlines() if line.strip()])
    return said.pop() if len(said) == 1 else None


def _bare(text: str) -> str:
    """Returns a choice's text without what may stand around it, in lower case."""
    return " ".join(text.split()).strip(" .,:;()[]!-=").lower()


class _Answers:
    """Finds labels that stand in a text as answers: `Answers(row["choices"]).said("The answer is B.")` is {"B"}."""

    def __init__(self, choices: Mapping[str, list[str]]) -> None:
        self.texts = {
            label: _bare(re.sub(r"[{}]", " ", plain(str(text))))
            for label, text in zip(choices["label"], choices["text"], strict=True)
        }
        self.names = {label.lower(): label for label in self.texts}
        self.label = "(?:" + "|".join(map(re.escape, self.texts)) + r")(?!\w)"
        self.reason = _REASON.replace("LABEL", self.label)

    def said(self, text: str) -> set[str] | None:
        """Returns the labels that a text calls its answer, in so many words; None if it calls none so."""
        found: set[str] = set()
        for pattern in _SAID:
            for match in re.finditer(pattern.replace("LABEL", f"({self.label})"), text, re.I | re.M | re.ASCII):
                kind = self.ending(match[1], text[match.end() :].partition("\n")[0])
                found |= {"": set(), "several": {*self.texts}}.get(kind, {self.names[match[1].lower()]})
        lower = text.lower()
        for label, choice in self.texts.items():  # "The answer is the leaf (B)."
            if choice not in lower:  # a pattern of its own for every choice takes longer to compile than to search
                continue
            bracketed = rf"(?:^|\banswer{_IS})\s*{re.escape(choice)}[.!]?\s*[(\[]{re.escape(label)}[)\]](?=[.!\s]*$)"
            found |= {label} if re.search(bracketed, text, re.I | re.M) else set()
        return found or None

    def of_lines(self, lines: list[str]) -> set[str]:
        """Returns the labels that a text answers with by its lines: several if they are at odds."""
        begun = re.compile(
            rf"\s*(?:[>#*-]+\s+)?[(\[\s]*(?:(?:option|choice|letter|label)\s+)?[(\[\s]*({self.label})", re.I | re.ASCII
        )
        found: list[tuple[str, str]] = []
        for line in lines:
            match = begun.match(line)
            kind = self.ending(match[1], line[match.end() :]) if match else ""
            found.append((self.names[match[1].lower()] if match else "", kind))
        ends = [kind for _, kind in (found[:1] + found[-1:])]
        alone = {label for label, kind in found if kind == "alone"}
        before = {label for label, kind in found if kind in ("text", "own", "comma")}
        if "several" in ends or not ends:
            return set()
        if ends[-1] == "own" and {label for label, _ in found if label} == {found[-1][0]}:
            return {found[-1][0]}
        if "alone" in ends:
            # beside it, two or more lines that begin with labels repeat or discuss the choices
            return alone if len(before) > 1 else alone | before
        return alone | before if ends[0] in ("text", "own") else set()

    def goes_on(self, label: str, rest: str) -> bool:
        """Whether after a label's choice another label with its choice follows: "A. a root B. the leaf C. rain"."""
        following = {other: text for other, text in self.texts.items() if other != label and text in rest.lower()}
        if not following:
            return False
        others = "|".join(rf"{re.escape(other)}[.:)\]]+[\s(=-]*{re.escape(text)}" for other, text in following.items())
        next_one = rf"[\s.,;]*(?:$|(?:or|and)\b|[(\[]?{self.label}[.:)\]])"
        listed = rf"[\s.:)\](=-]*{re.escape(self.texts[label])}[\s.,;]*(?:or|and)?\s*[(\[]?(?:{others})(?={next_one})"
        return re.match(listed, rest, re.I | re.ASCII) is not None

    def ending(self, label: str, rest: str) -> str:
        """Says what follows a label: "alone", "own" (its choice), "text" (a reason), "comma", "several", or ""."""
        also = rf"[\s.,:;()\]/&]*(?:or\b|and\b)?\s*[(\[]?{self.label}(?=[.,:;)\]](?!\d)|\s*$)"
        if re.match(also, rest, re.I | re.ASCII):
            return "several"
        if re.fullmatch(r"[\s.,:;!)\]]*", rest):
            return "alone"
        if self.goes_on(self.names[label.lower()], rest):
            return "several"
        choice = _bare(rest)
        own = self.texts[self.names[label.lower()]]
        if choice in self.texts.values() and choice != own:
            return "several"
        if choice == own:
            return "own"
        if choice.startswith(own) and not choice[len(own) : len(own) + 1].isalnum():
            return "text"
        if re.match(self.reason, rest, re.I) or re.match(r"[)\]]?(?:[.:](?!\d)|[)\]]|\s+-+\s|\s*\()", rest):
            return "text"
        return "comma" if re.match(r"\s*[,;](?!\d)", rest) else ""
