"""Questions about pictures: easy-VQA, TextVQA (Singh et al. 2019) and OK-VQA (Marino et al. 2019). No rows are shipped.

A row of the last two: `{"image": ..., "question": "what brand is this?", "answers": ["nokia", ...]}`, with the answers
of ten people; and of easy-VQA `{"image": "images/0.png", "question": "what color is the shape?", "answer": "blue"}`.
A picture is the path of a file, seen from the rows' file, its bytes, or both as the hub has them. TextVQA's answers to
its test questions are secret: its tests are its validation. The hub has one split of OK-VQA, which is split as a local
file is: half of the pictures for training, a quarter each for validation and tests.

The accuracy of an answer is VQA's (Antol et al. 2015): of each of the ten people, how many of the other nine say the
same, three at least counting as 1; and the mean of that. The reward is 2 x accuracy - 1.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t2ray.core import DataError, Message, user
from t2ray.tasks.files import read
from t2ray.tasks.gsm8k import split_rows
from t2ray.tasks.images import images_of, with_images
from t2ray.tasks.table import Table
from t2ray.tasks.task import DataRow, Task
from t2ray.tasks.text import settled

_HUB = {"textvqa": "lmms-lab/textvqa", "okvqa": "lmms-lab/OK-VQA"}
ASKED = "Answer the question using a single word or phrase."

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = {
    "aint", "arent", "cant", "couldve", "couldnt", "couldntve", "didnt", "doesnt", "dont", "hadnt", "hadntve",
    "hasnt", "havent", "hed", "hedve", "hes", "howd", "howll", "hows", "idve", "im", "ive", "isnt", "itd", "itdve",
    "itll", "maam", "mightnt", "mightntve", "mightve", "mustnt", "mustve", "neednt", "notve", "oclock", "oughtnt",
    "shant", "shedve", "shouldve", "shouldnt", "shouldntve", "somebodyd", "somebodydve", "somebodyll", "somebodys",
    "someoned", "someonedve", "someonell", "someones", "somethingd", "somethingdve", "somethingll", "thats",
    "thered", "theredve", "therere", "theres", "theyd", "theydve", "theyll", "theyre", "theyve", "twas", "wasnt",
    "wedve", "weve", "werent", "whatll", "whatre", "whats", "whatve", "whens", "whered", "wheres", "whereve",
    "whod", "whodve", "wholl", "whos", "whove", "whyll", "whyre", "whys", "wont", "wouldve", "wouldnt", "wouldntve",
    "yall", "yallll", "yalldve", "youd", "youdve", "youll", "youre", "youve",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d", re.ASCII)
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)


def easy(data: str | Sequence[str] | None = None) -> Task:
    """The task easy-VQA, from a local file or folder.

    Raises:
        DataError: there is none, it cannot be read, or one of its rows is not as above.
    """
    if data is None:
        raise DataError("easy_vqa is on no hub; name its folder, with questions.jsonl and images, by data")
    rows = _split(with_images(read(data).need({"question": str, "answer": str}), "image").rows)
    return Task(
        name="easy_vqa",
        rows=rows.__getitem__,
        messages=messages,
        reward="t2ray.tasks.vqa:same",
        gold=lambda row: str(row["answer"]),
        max_tokens=8,
        reading=lambda completion, row: normal(settled(completion)),
    )


def textvqa(data: str | Sequence[str] | None = None) -> Task:
    """The task TextVQA, from the hub or from local files with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """

    def hub() -> Mapping[str, list[DataRow]]:
        train, validation = _checked(read(_HUB["textvqa"])), _checked(read(_HUB["textvqa"], "validation"))
        return {"train": train, "validation": validation, "test": validation, "all": [*train, *validation]}

    return _task("textvqa", data, hub)


def okvqa(data: str | Sequence[str] | None = None) -> Task:
    """The task OK-VQA, from the hub or from local files with the same columns.

    Raises:
        DataError: the local file cannot be read, or one of its rows is not as above.
    """
    return _task("okvqa", data, lambda: _split(_checked(read(_HUB["okvqa"], "val2014"))))


def _task(name: str, data: str | Sequence[str] | None, hub: Callable[[], Mapping[str, list[DataRow]]]) -> Task:
    @functools.cache
    def splits() -> Mapping[str, list[DataRow]]:
        return hub() if data is None else _split(_checked(read(data)))

    if data is not None:
        splits()
    return Task(
        name=name,
        rows=lambda split: splits()[split],
        messages=messages,
        reward="t2ray.tasks.vqa:reward",
        gold=consensus,
        best=lambda row: reward(consensus(row), dict(row)),
        max_tokens=16,
        reading=lambda completion, row: normal(settled(completion)),
        test_is_unseen=data is not None or name != "textvqa",
    )


def _split(rows: Sequence[DataRow]) -> Mapping[str, list[DataRow]]:
    """Splits rows as `gsm8k.split_rows` does, but whole pictures: all questions about one are in one split."""
    pictures: dict[Any, list[DataRow]] = {}
    for row in rows:
        pictures.setdefault(row["image"], []).append(row)
    parts = split_rows([{"rows": asked} for asked in pictures.values()])
    return {name: [row for picture in part for row in picture["rows"]] for name, part in parts.items()} | {
        "all": [*rows]
    }


def _checked(table: Table) -> list[DataRow]:
    table.need({"question": str, "answers": list})
    for place, row in zip(table.places, table.rows, strict=True):
        if len(row["answers"]) < 2 or not all(isinstance(answer, str) for answer in row["answers"]):
            raise DataError(f"{place}: the column 'answers' must hold the answers of ten people, each a text")
    return [*with_images(table, "image").rows]


def messages(row: DataRow) -> tuple[Message, ...]:
    """The prompt: the picture, the question, and the form that the answer must have."""
    return user((*images_of(row["image"]), f"{row['question']}\n{ASKED}"))


def consensus(row: DataRow) -> str:
    """Returns the answer that most people gave, the first of several, as one of them wrote it."""
    common = Counter(map(normal, row["answers"])).most_common(1)[0][0]
    return next(str(answer) for answer in row["answers"] if normal(answer) == common)


def reward(completion: str, row: dict[str, Any]) -> float:
    """Twice the VQA accuracy of the completion less 1: 1 if four people or more gave that answer, -1 if nobody did.

    An answer without any word has -1.
    """
    said, given = normal(settled(completion)), [normal(answer) for answer in row["answers"]]
    same = given.count(said)
    # of those who said it, one fewer of the others did
    share = (same * min(1.0, (same - 1) / 3) + (len(given) - same) * min(1.0, same / 3)) / len(given)
    return 2 * share - 1 if said else -1.0


def same(completion: str, row: dict[str, Any]) -> float:
    """+1 if the completion is the row's "answer", both as `normal` writes them, else -1."""
    said = normal(settled(completion))
    return 1.0 if said and said == normal(row["answer"]) else -1.0


def normal(answer: str) -> str:
    """Returns an answer as VQA's evaluation compares it: lower case, no articles, numbers as digits, no punctuation.

    Punctuation goes where it stands beside a space, or anywhere if a number has a comma; else it becomes a space. A
    full stop stays before a digit. Contractions are written without their apostrophe, whether it is there or not. An
    answer of articles alone keeps them: the letter "a" is not the same as no answer.
    """
    text = given = " ".join(answer.split())
    for sign in _PUNCTUATION:
        beside = f"{sign} " in given or f" {sign}" in given or _COMMA.search(given)
        text = text.replace(sign, "" if beside else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    bare = [word.replace("'", "") for word in words]
    kept = [b if b in _CONTRACTIONS else word for word, b in zip(words, bare, strict=True) if word not in _ARTICLES]
    return " ".join(kept or words)
