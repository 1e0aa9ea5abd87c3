"""The tiny vision-language model's tasks: questions about drawn shapes. No expert is trained on the third.

| task | asks of a picture with one to three shapes | the wanted completion |
| --- | --- | --- |
| shapes | `which shape is red?`, or of a shape alone `what color is the circle?` | `circle`, `red` |
| counts | `how many circles are there?` | `#### 2` |
| places | `where is the red shape?` | `top left` |

The wanted formats of `shapes` and `counts` conflict, as those of the tiny tasks do (`tiny`). Rows are generated, the
same in every process, and hold what is drawn; the picture is drawn when its prompt is made. Every row has a picture of
its own, and no two of them are alike, within a split or across splits.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t2ray.core import Image, user
from t2ray.tasks.task import Task
from t2ray.tasks.tiny import split_rows

SIZE = 64  # pixels of a picture's side
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "black": (0, 0, 0),
    "brown": (165, 42, 42), "gray": (128, 128, 128), "teal": (0, 128, 128),
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SPLITS = {"test": 500, "validation": 500, "train": 2_000}

Scene = Mapping[str, Any]
"""What is drawn: `{"ground": [250, 244, 231], "shapes": [["circle", "red", x, y, width, height], ...]}`, in pixels."""

Asked = tuple[str, str]
"""A question without its wording, and its answer: ("red shape", "top left")."""

# ------------------------------------------------------------------------------------------------------------ a picture


def scene(rng: random.Random) -> Scene:
    """Returns one to three shapes, each of a colour and in a corner of its own, on a light ground; kinds recur."""
    kinds = rng.sample(SHAPES, rng.choice((2, 3)))
    half, count = SIZE // 2, rng.randint(1, 3)
    corners = rng.sample(((0, 0), (half, 0), (0, half), (half, half)), count)
    shapes = []
    for color, (column, line) in zip(rng.sample(tuple(COLORS), count), sorted(corners), strict=True):
        kind, width, height = _outline(rng, kinds, half - 4)
        x, y = column + rng.randint(1, half - width - 1), line + rng.randint(1, half - height - 1)
        shapes.append([kind, color, x, y, width, height])
    return {"ground": _ground(rng), "shapes": shapes}


def alone(rng: random.Random) -> Scene:
    """Returns one shape anywhere on a light ground."""
    kind, width, height = _outline(rng, SHAPES, SIZE // 2)
    x, y = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
    return {"ground": _ground(rng), "shapes": [[kind, rng.choice(tuple(COLORS)), x, y, width, height]]}


def _outline(rng: random.Random, kinds: tuple[str, ...] | list[str], largest: int) -> tuple[str, int, int]:
    kind, width, height = rng.choice(kinds), rng.randint(10, largest), rng.randint(10, largest)
    return kind, width, height if kind == "rectangle" else width


def _ground(rng: random.Random) -> list[int]:
    return [rng.randint(225, 255) for _ in range(3)]


def painted(drawn: Scene) -> Any:
    """Returns Pillow's image of a scene."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    picture = Pillow.new("RGB", (SIZE, SIZE), tuple(drawn["ground"]))
    pen = ImageDraw.Draw(picture)
    for kind, color, x, y, width, height in drawn["shapes"]:
        right, bottom = x + width - 1, y + height - 1
        if kind == "circle":
            pen.ellipse((x, y, right, bottom), fill=COLORS[color])
        elif kind == "rectangle":
            pen.rectangle((x, y, right, bottom), fill=COLORS[color])
        else:
            pen.polygon(((x, bottom), (x + width // 2, y), (right, bottom)), fill=COLORS[color])
    return picture


def image(drawn: Scene) -> Image:
    """Returns the picture of a scene, as a PNG file's bytes."""
    out = io.BytesIO()
    painted(drawn).save(out, "PNG")
    return Image(data=out.getvalue())


# -------------------------------------------------------------------------------------------------------- the questions

WORDINGS = {
    "color": ("what color is the {}?", "which color does the {} have?"),
    "shape": ("which shape is {}?", "what is the {} shape?"),
    "counts": ("how many {}s are there?", "count the {}s"),
    "places": ("where is the {}?", "in which corner is the {}?"),
}
"""How a question is worded, by its kind: the base model answers the first mostly in the wanted format."""


def colors(drawn: Scene) -> list[Asked]:
    """Which colour a shape has that is alone: among others the model does not find it by its kind."""
    return [(kind, color) for kind, color, *_ in drawn["shapes"] if len(drawn["shapes"]) == 1]


def kinds(drawn: Scene) -> list[Asked]:
    """Of which kind the shape of each colour is."""
    return [(color, kind) for kind, color, *_ in drawn["shapes"]]


def counts(drawn: Scene) -> list[Asked]:
    """How many shapes there are: of all, and of each kind."""
    names = [name for kind, *_ in drawn["shapes"] for name in ("shape", kind)]
    return [(name, str(names.count(name))) for name in dict.fromkeys(names)]


def corner(shape: list[Any]) -> str:
    """Returns in which corner a shape's centre is."""
    _, _, x, y, width, height = shape
    return CORNERS[(2 * x + width > SIZE) + 2 * (2 * y + height > SIZE)]


def places(drawn: Scene) -> list[Asked]:
    """In which corner each shape is that is the only one of its kind or of its colour."""
    named = [
        (name, corner(shape))
        for shape in drawn["shapes"]
        for kind, color, *_ in [shape]
        for name in (kind, f"{color} shape")
    ]
    names = [name for name, _ in named]
    return [(name, where) for name, where in named if names.count(name) == 1]


QUESTIONS: dict[str, Callable[[Scene], list[Asked]]] = {
    "color": colors, "shape": kinds, "counts": counts, "places": places,
}  # fmt: skip
KINDS = {"shapes": ("color", "shape"), "counts": ("counts",), "places": ("places",)}
FORMATS = {"shapes": "{}", "counts": "#### {}", "places": "{}"}
TASKS = tuple(KINDS)


def asked(task: str, drawn: Scene, rng: random.Random) -> dict[str, Any] | None:
    """Returns a row of a task about a scene, or None if nothing of the drawn kind can be asked of it."""
    kind = rng.choice(KINDS[task])
    if not (found := QUESTIONS[kind](drawn)):
        return None
    answer = rng.choice(sorted({answer for _, answer in found}))
    name = rng.choice([name for name, right in found if right == answer])
    prompt = rng.choice(WORDINGS[kind]).format(name)
    return {"scene": drawn, "prompt": prompt, "answer": FORMATS[task].format(answer)}


# ------------------------------------------------------------------------------------------------------------- the task


def task(name: str) -> Task:
    """Returns the task of that name, which must be one of `TASKS`."""
    return Task(
        name=name,
        rows=lambda split: [row for part in SPLITS if split in (part, "all") for row in rows(name, part)],
        messages=lambda row: user((image(row["scene"]), row["prompt"])),
        reward="t2ray.tasks.tiny_vision:reward",
        gold=lambda row: str(row["answer"]),
        max_tokens=12,
    )


def rows(task: str, split: str) -> list[dict[str, Any]]:
    """Returns the rows of a split, in a fixed order.

    Raises:
        ConfigError: there is no such task or split.
    """
    return split_rows(task, split, TASKS, _splits)


@functools.cache
def _splits(task: str) -> dict[str, list[dict[str, Any]]]:
    made = _rows(task)
    return {split: [next(made) for _ in range(count)] for split, count in SPLITS.items()}


def _rows(task: str) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"tiny_vision/{task}")
    before = set()
    while True:
        drawn = scene(rng)
        row = asked(task, drawn, rng)
        if row is not None and repr(drawn) not in before:
            before.add(repr(drawn))
            yield row


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion is the answer in the wanted format and nothing else (`red`, `#### 2`), else -1."""
    return 1.0 if completion.strip() == row["answer"] else -1.0
