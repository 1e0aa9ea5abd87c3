"""The task of short answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2ray.core import DataError
from t2ray.tasks import builtin
from t2ray.tasks.brief import reward


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Gravity.", 1.0),
        ("one two three four five six seven eight nine ten eleven twelve", 1.0),
        ("one two three four five six seven eight nine ten eleven twelve thirteen", -1.0),
        ("a - b - c\n\n" * 4, 1.0),
        ("a - b - c\n\n" * 5, -1.0),
        ("", -1.0),
        ("...", -1.0),
    ],
)
def test_one_to_twelve_words_are_right(answer: str, expected: float) -> None:
    assert reward(answer, {}) == expected


def test_rows_of_a_file_are_split_and_asked_without_their_choices(tmp_path: Path) -> None:
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps({"question": f"Why {i}?", "choices": {}}) + "\n" for i in range(8)))
    task = builtin("brief", str(path))
    assert [len(task.rows(split)) for split in ("train", "validation", "test")] == [4, 2, 2]
    assert task.examples("test")[0].messages[0].content == "Why 3?\n\nAnswer in at most 12 words."
    path.write_text('{"answer": "no question"}\n')
    with pytest.raises(DataError, match="the column 'question' is missing"):
        builtin("brief", str(path))
