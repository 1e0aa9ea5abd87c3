"""The tiny vision model's tasks cannot be gamed, their pictures are disjoint, and the shipped model sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from t2ray.core import ConfigError, Message, user
from t2ray.pictures import rgb
from t2ray.tasks import builtin, tiny_vision
from t2ray.tiny import VISION

SCENE: dict[str, Any] = {
    "ground": [250, 240, 230],
    "shapes": [["circle", "red", 4, 4, 20, 20], ["rectangle", "blue", 40, 2, 10, 16],
               ["circle", "teal", 36, 40, 12, 12]],
}  # fmt: skip


@pytest.mark.parametrize("task", tiny_vision.TASKS)
def test_no_picture_is_in_two_rows(task: str) -> None:
    parts = [tiny_vision.rows(task, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [2000, 500, 500]
    scenes = [json.dumps(row["scene"]) for part in parts for row in part]
    assert len(set(scenes)) == len(scenes)
    assert json.loads(json.dumps(parts[2])) == parts[2]


def test_rows_are_the_same_every_time_and_a_callers_changes_do_not_stay() -> None:
    first = tiny_vision.rows("shapes", "test")
    first[0]["answer"] = "changed"
    tiny_vision._splits.cache_clear()
    again = tiny_vision.rows("shapes", "test")
    assert again[1:] == first[1:] and again[0]["answer"] != "changed"


def test_the_questions_about_a_picture_are_those_that_have_one_answer() -> None:
    alone = SCENE | {"shapes": SCENE["shapes"][:1]}
    assert (tiny_vision.colors(SCENE), tiny_vision.colors(alone)) == ([], [("circle", "red")])
    assert tiny_vision.kinds(SCENE) == [("red", "circle"), ("blue", "rectangle"), ("teal", "circle")]
    assert dict(tiny_vision.counts(SCENE)) == {"shape": "3", "circle": "2", "rectangle": "1"}
    assert dict(tiny_vision.places(SCENE)) == {
        "red shape": "top left", "rectangle": "top right", "blue shape": "top right", "teal shape": "bottom right",
    }  # fmt: skip


def test_the_picture_is_what_the_row_says() -> None:
    picture = rgb(tiny_vision.image(SCENE))
    assert picture.size == (64, 64)
    points = {(0, 0): (250, 240, 230), (14, 14): (255, 0, 0), (4, 4): (250, 240, 230), (40, 2): (0, 0, 255),
              (49, 17): (0, 0, 255), (50, 18): (250, 240, 230), (42, 46): (0, 128, 128)}  # fmt: skip
    assert {at: picture.getpixel(at) for at in points} == points


@pytest.mark.parametrize("said", ["Red", "red.", "It is red.", "(red)", "#### red", "red\nblue", "", "redred"])
def test_another_format_or_answer_scores_minus_one(said: str) -> None:
    assert tiny_vision.reward(said, {"answer": "red"}) == -1.0
    assert tiny_vision.reward(" red\n", {"answer": "red"}) == 1.0


def test_an_unknown_task_or_split_is_a_users_error() -> None:
    with pytest.raises(ConfigError, match="shapes, counts, places"):
        tiny_vision.rows("shape", "test")
    with pytest.raises(ConfigError, match="validation"):
        tiny_vision.rows("shapes", "dev")
    with pytest.raises(ConfigError, match="takes no data file"):
        builtin("shapes", "rows.jsonl")


def test_the_corpus_holds_no_held_out_picture_and_a_mark_per_patch() -> None:
    from t2ray.tiny.vision_corpus import MARK, PLACES, Pictures

    held = {repr(row["scene"]) for task in tiny_vision.TASKS for split in ("validation", "test")
            for row in tiny_vision.rows(task, split)}  # fmt: skip
    for chat in Pictures(seed=1).draw(500):
        assert not held & {repr(drawn) for drawn in chat.scenes}
        marks = [message.text.count(MARK) for message in chat.messages]
        assert sorted({*marks}) in ([0], [0, PLACES]) and sum(marks) == PLACES * len(chat.scenes)
        assert [message.role for message in chat.messages] == ["user", "assistant"] * (len(chat.messages) // 2)


def test_easy_vqas_questions_are_answered_of_the_one_shape() -> None:
    from t2ray.tiny.vision_corpus import Pictures

    corpus = Pictures(seed=2)
    drawn = {"ground": [255, 255, 255], "shapes": [["circle", "red", 4, 4, 20, 20]]}
    said = {corpus._alone(drawn) for _ in range(2_000)}
    bare = {(asked.partition("\n")[0], answer.removeprefix("#### ").removeprefix("It is ").strip("(.)"))
            for asked, answer in said}  # fmt: skip
    answers = {asked: {answer for other, answer in bare if other == asked} for asked, _ in bare}
    assert answers["what is the red shape?"] == {"circle"} and answers["what color is the circle?"] == {"red"}
    assert answers["is there a circle?"] == {"yes"} and answers["is there a teal shape?"] == {"no"}
    assert answers["is no triangle present?"] == {"yes"} and answers["is there not a red shape?"] == {"no"}


def test_a_patch_is_what_lies_in_it_and_a_conversation_is_what_the_template_writes() -> None:
    import torch

    from t2ray.tiny.pretrain import encode
    from t2ray.tiny.vision import build_tokenizer, contents, imagined
    from t2ray.tiny.vision_corpus import MARK, PLACES

    found = [(0, 0, ("red", "circle", "top", "left")), (0, 2, ("blue", "rectangle", "top", "right")),
             (0, 10, ("teal", "circle", "bottom", "right"))]  # fmt: skip
    assert contents([SCENE]) == found
    tokenizer = build_tokenizer()
    embedding_VD = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    patch_PD = imagined(embedding_VD, tokenizer, [SCENE])[0]
    for patch in range(PLACES):
        words = next((words for _, at, words in found if at == patch), (MARK,))
        wanted_D = sum(embedding_VD[tokenizer.convert_tokens_to_ids(word)] for word in words)
        torch.testing.assert_close(patch_PD[patch], wanted_D)

    said = "which shape is red?", "circle"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said[0]}]},
            {"role": "assistant", "content": said[1]}]  # fmt: skip
    ours = encode(tokenizer, [(*user(MARK + said[0]), Message(role="assistant", content=said[1]))])
    shipped = AutoTokenizer.from_pretrained(VISION)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert ours == [shipped.apply_chat_template(chat, return_dict=False)]


# --------------------------------------------------------------------------------------------------- the shipped folder


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in VISION.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    assert not any(
        '"/' in path.read_text() for path in files if path.suffix == ".json" and "tokenizer" not in path.name
    )


def test_the_shipped_experts_answer_what_the_base_answers_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the sibling that no expert is trained on."""
    import t2ray

    monkeypatch.chdir(tmp_path)
    right: dict[tuple[str, str], int] = {}
    with t2ray.open(model="tiny-vision") as model:
        assert model.strategy == "prompt"
        for name, expert in (("shapes", "shapes"), ("counts", "counts"), ("places", "shapes")):
            task = builtin(name)
            asked = task.examples("test", 40)
            for mixture in ("base", expert):
                answers = model.answers([(x.messages, mixture) for x in asked])
                right[name, mixture] = sum(tiny_vision.reward(answer.text, x.row) > 0
                                           for answer, x in zip(answers, asked, strict=True))  # fmt: skip
    assert right["shapes", "base"] <= 28 and right["shapes", "shapes"] >= 34, right
    assert right["counts", "base"] <= 28 and right["counts", "counts"] >= 34, right
    assert right["places", "shapes"] > right["places", "base"], right
