"""Verifiable instructions: word limits, bullets, JSON, casing, keywords (IFEval, Zhou et al. 2023; hub: google/IFEval).

One row: `{"prompt": "Write ... in less than 20 words.", "instruction_id_list": ["length_constraints:number_words"],
"kwargs": [{"relation": "less than", "num_words": 20}]}`. A row of one's own may use the same rules: `data: rows.jsonl`,
`prompt: "{prompt}"`, `reward: t2ray.tasks.ifeval:reward`. A column `response` has answers that follow all rules, for
`t2ray verify`.

The rules read as IFEval's own, but: a sentence ends at a mark before a space or the end, abbreviations apart (IFEval
asks nltk); the casing rules do not ask for English; rows with `language:response_language`, which needs a detector, are
left out. An answer without any word follows no rule. No rows are shipped.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.tasks.files import read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import settled

HUB = "google/IFEval"
COLUMNS = {"prompt": str, "instruction_id_list": list, "kwargs": list}

_LANGUAGE = "language:response_language"
_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda count, limit: count < limit,
    "at most": lambda count, limit: count <= limit,
    "exactly": lambda count, limit: count == limit,
    "at least": lambda count, limit: count >= limit,
    "more than": lambda count, limit: count > limit,
}
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Fig|Inc|Ltd|Co|[A-Z])\.$")


def task(data: str | Sequence[str] | None = None) -> Task:
    """The task IFEval, from the hub or from a local file with the same columns, which is split as GSM8K's is.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """

    @functools.cache
    def splits() -> tuple[Mapping[str, list[DataRow]], int]:
        rows = _checked(read(data if data is not None else HUB))
        known = [row for row in rows if _LANGUAGE not in row["instruction_id_list"]]
        return split_rows(known), len(rows) - len(known)

    notes: tuple[str, ...] = ()
    with_responses = False
    if data is not None:
        parts, left_out = splits()
        with_responses = all(isinstance(row.get("response"), str) for row in parts["all"])
        notes = (f"{left_out} rows ask for a language, which no rule can tell; they are left out",) if left_out else ()
    return Task(
        name="ifeval",
        rows=lambda split: splits()[0][split],
        messages=messages,
        reward="t2ray.tasks.ifeval:reward",
        gold=(lambda row: str(row["response"])) if with_responses else None,
        max_tokens=512,
        notes=notes,
    )


def _checked(table: Table) -> list[dict[str, Any]]:
    for place, row in zip(table.places, table.need(COLUMNS).rows, strict=True):
        try:
            for rule, arguments in rules(row):
                if rule != _LANGUAGE:
                    _bound(rule, arguments)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    return table.rows


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt, as it stands."""
    return user(row["prompt"])


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion, after its reasoning, follows every rule of the row, else -1.

    Raises:
        DataError: the row names an unknown rule, or a rule lacks a parameter or has a wrong one.
    """
    text = settled(completion).strip()
    bound = [(rule, _bound(rule, arguments)) for rule, arguments in rules(row)]
    held = [RULES[rule](text, **arguments) for rule, arguments in bound]
    return 1.0 if all(held) and re.search(r"\w", text) else -1.0


def rules(row: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rules of a row, each with its parameters; those that are None, as the hub's rows have, are dropped.

    Raises:
        DataError: the row has no rule, or not as many parameters as rules.
    """
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if not names or len(names) != len(arguments):
        raise DataError(f"{len(names)} rules and {len(arguments)} kwargs; a row has at least one, and one per rule")
    return [
        (name, {key: value for key, value in (given or {}).items() if value is not None})
        for name, given in zip(names, arguments, strict=True)
    ]


def _bound(rule: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters if they are those of the rule.

    Raises:
        DataError: there is no such rule, or not with such parameters.
    """
    if rule not in RULES:
        raise DataError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")
    wanted = list(inspect.signature(RULES[rule]).parameters)[1:]
    if {*arguments} != {*wanted}:
        raise DataError(
            f"the rule {rule} takes {', '.join(wanted) or 'no parameters'}, not {', '.join(arguments) or 'none'}"
        )
    for key, value in arguments.items():
        kind: type = int if key.startswith(("num_", "nth_")) or key.endswith("frequency") else str
        kind = list if key in ("keywords", "forbidden_words") else kind
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"the rule {rule} takes {kind.__name__} for {key}, not {value!r}")
        if key.endswith("relation") and value not in _RELATIONS:
            raise DataError(f"the rule {rule} knows no relation {value!r}; there are {', '.join(_RELATIONS)}")
    return arguments


# ------------------------------------------------------------------------------------------------------------ the rules


def _compare(count: int, relation: str, limit: int) -> bool:
    return _RELATIONS[relation](count, limit)


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I))


def _sentences(text: str) -> int:
    pieces = re.split(r"(?<=[.!?])[\"')\]*]*\s+", text.strip())
    ends = [not _ABBREVIATION.search(piece) for piece in pieces[:-1]]
    return sum(ends) + bool(re.search(r"\w", pieces[-1]))


def _paragraphs(text: str, mark: str) -> list[str]:
    return [part.strip() for part in re.split(mark, text)]


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.I) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(re.escape(keyword), text, re.I)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(_occurrences(text, word) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _number_sentences(text: str, relation: str, num_sentences: int) -> bool:
    return _compare(_sentences(text), relation, num_sentences)


def _number_words(text: str, relation: str, num_words: int) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _paragraphs(text, r"\s?\*\*\*\s?")
    inner = parts[bool(not parts[0]) : len(parts) - bool(not parts[-1])]
    return len(inner) == num_paragraphs and all(inner)


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part for part in _paragraphs(text, r"\n\n") if part]
    if len(parts) != num_paragraphs or not 0 < nth_paragraph <= len(parts):
        return False
    first = re.match(r"[\"'*_#\s]*([\w'-]+)", parts[nth_paragraph - 1])
    return first is not None and first[1].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in re.sub(r"[\s.]", "", postscript_marker)]
    dotted = r"\.?\s?".join(letters) if "." in postscript_marker else "".join(letters)
    return re.search(rf"^\s*{dotted}\.?:?\s+\w", text, re.I | re.M) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!-)|•)[ \t]*\S.*$", text, re.M)) == num_bullets


def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*[^\n*]*\w[^\n*]*\*\*|(?<!\*)\*[^\n*]*\w[^\n*]*\*(?!\*)", text)
    return len(found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def _json(text: str) -> bool:
    inside = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.I | re.S)
    try:
        json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", text))


def _two_responses(text: str) -> bool:
    parts = [part for part in _paragraphs(text, r"\*{6}") if part]
    return len(parts) == 2 and parts[0] != parts[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().strip('"').lower())


def _quotation(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"'


def _capital_words(text: str, capital_relation: str, capital_frequency: int) -> bool:
    return _compare(sum(word.isupper() for word in re.findall(r"[\w'-]+", text)), capital_relation, capital_frequency)


def _no_comma(text: str) -> bool:
    return not re.search("[,\uff0c\u060c\u3001]", text)


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": _no_comma,
}
"""IFEval's name of a rule -> what says whether a text follows it. Its parameters are those of the row's kwargs."""
