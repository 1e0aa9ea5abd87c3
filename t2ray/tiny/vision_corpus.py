"""What the tiny vision model is pretrained on: drawn shapes with questions, between what the tiny model was (`corpus`).

As there, each answer has a random one of its formats. Of a picture there is perhaps a description, then questions of
`t2ray.tasks.tiny_vision`; of a single shape mostly those in easy-VQA's wording, some with the line that
`t2ray.tasks.vqa` asks for a short answer by. No held-out picture occurs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from t2ray.core import Message, user
from t2ray.prompts import OTHERS, dispatch_prompt
from t2ray.tasks import tiny_vision
from t2ray.tasks.tiny_vision import COLORS, QUESTIONS, SHAPES, WORDINGS, Scene, corner
from t2ray.tasks.vqa import ASKED
from t2ray.tiny.corpus import LAST_SHARES, Corpus, load

MARK, PLACES = "<image>", 16
"""What stands for a picture in a text, and how often: once per patch."""

LABELS = ("shapes", "counts", OTHERS)
PROSE, FORMS = "It is {}.", ("{}", "#### {}", "({})")
PARTS, MOST_QUESTIONS, MOST_TURNS = (1, 1, 1, 2), 12, 3
"""Of a conversation, one of these; of a picture; of what is said without a picture."""
TEXT_SHARE, CLASS_SHARE = 0.1, 0.05  # of the parts
ALONE_SHARE = 0.35  # of the pictures
TELL = {"describe the image": "{color} {kind} {place}", "which shapes are in the image?": "{kind} {color} {place}"}
TELL_SHARE = 0.4  # of the first questions
ASKS = (("shapes", "color"), ("shapes", "shape"), ("counts", "counts"), ("counts", "counts"), ("places", "places"))
"""Task and kind of a question about shapes in corners; to count is harder than to look up."""

ALONE = {
    "color": ("what is the color of the {kind}?", "what color is the {kind}?", "what is the color of the shape?",
              "what color is the shape?"),
    "kind": ("what shape is present?", "what shape is in the image?", "what shape does the image contain?",
             "what is the {color} shape?"),
    "yes": ("is there a {}?", "is there a {} in the image?", "does the image contain a {}?", "is a {} present?"),
    "no": ("is there not a {}?", "is there not a {} in the image?", "does the image not contain a {}?",
           "is no {} present?"),
}  # fmt: skip
"""Easy-VQA's questions: of the colour, of the kind, and with yes or no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureChat:
    """A conversation whose texts have `PLACES` marks per picture, and its pictures in their order."""

    messages: tuple[Message, ...]
    scenes: tuple[Scene, ...]


class Pictures:
    """A source of random conversations about pictures; one seed gives one sequence."""

    def __init__(self, seed: int) -> None:
        self.rng, self.text = random.Random(f"pictures/{seed}"), Corpus(seed)
        self.talk = load(OTHERS, "train")
        self.held = {repr(row["scene"]) for task in tiny_vision.TASKS for split in ("validation", "test")
                     for row in tiny_vision.rows(task, split)}  # fmt: skip

    def draw(self, count: int) -> list[PictureChat]:
        """Returns `count` conversations of `PARTS` parts, each about a picture or without one."""
        return [self._chat() for _ in range(count)]

    def scene(self) -> Scene:
        """Returns a picture that is not held out."""
        while True:
            drawn = tiny_vision.alone(self.rng) if self.rng.random() < ALONE_SHARE else tiny_vision.scene(self.rng)
            if repr(drawn) not in self.held:
                return drawn

    def _chat(self) -> PictureChat:
        said: list[Message] = []
        scenes: list[Scene] = []
        for _ in range(self.rng.choice(PARTS)):
            kind = self.rng.random()
            if kind < TEXT_SHARE:
                turns = [m for m in self.text.draw(1, LAST_SHARES)[0] if m.role != "system"]
                said += turns[: 2 * self.rng.randint(1, MOST_TURNS)]
            elif kind < TEXT_SHARE + CLASS_SHARE:
                label = self.rng.choice(LABELS)
                asked = self.rng.choice(self.talk)["prompt"] if label == OTHERS else self._of_task(label)
                said += [*dispatch_prompt(user(asked), LABELS), Message(role="assistant", content=label)]
            else:
                scenes.append(self.scene())
                said += self._about(scenes[-1])
        return PictureChat(messages=tuple(said), scenes=tuple(scenes))

    def _of_task(self, task: str) -> str:
        while (row := tiny_vision.asked(task, tiny_vision.scene(self.rng), self.rng)) is None:
            pass
        return str(row["prompt"])

    def _about(self, drawn: Scene) -> list[Message]:
        said = []
        before = MARK * PLACES
        if self.rng.random() < TELL_SHARE:
            asked = self.rng.choice(tuple(TELL))
            answer = ", ".join(
                TELL[asked].format(kind=shape[0], color=shape[1], place=corner(shape)) for shape in drawn["shapes"]
            )
            said += [*user(before + asked), Message(role="assistant", content=answer)]
            before = ""
        for _ in range(self.rng.randint(1, MOST_QUESTIONS)):
            single = len(drawn["shapes"]) == 1 and self.rng.random() < 0.7
            asked, answer = self._alone(drawn) if single else self._cornered(drawn)
            said += [*user(before + asked), Message(role="assistant", content=answer)]
            before = ""
        return said

    def _cornered(self, drawn: Scene) -> tuple[str, str]:
        while True:
            task, kind = self.rng.choice(ASKS)
            if found := QUESTIONS[kind](drawn):
                right = self.rng.choice(sorted({answer for _, answer in found}))
                name = self.rng.choice([name for name, answer in found if answer == right])
                wording = self.rng.randrange(2)
                return WORDINGS[kind][wording].format(name), self._formatted(right, tiny_vision.FORMATS[task], wording)

    def _alone(self, drawn: Scene) -> tuple[str, str]:
        ((kind, color, *_),) = drawn["shapes"]
        about = self.rng.choice(tuple(ALONE))
        wording = self.rng.randrange(4)
        question = ALONE[about][wording]
        if about in ("color", "kind"):
            asked, answer = question.format(kind=kind, color=color), {"color": color, "kind": kind}[about]
        else:
            present = self.rng.random() < 0.5
            right, names = self.rng.choice(((kind, SHAPES), (color, tuple(COLORS))))
            name = right if present else self.rng.choice([other for other in names if other != right])
            asked = question.format(name if names == SHAPES else f"{name} shape")
            answer = "yes" if present == (about == "yes") else "no"
        line = f"\n{ASKED}" if self.rng.random() < 0.5 else ""
        return asked + line, self._formatted(answer, "{}", wording % 2)

    def _formatted(self, answer: str, wanted: str, wording: int) -> str:
        """An answer in the wanted format in half of the cases, or of a later wording in a quarter; else in another."""
        others = [form for form in FORMS if form != wanted]
        shares = (0.5, 0.26, 0.12, 0.12) if wording == 0 else (0.25, 0.51, 0.12, 0.12)
        return self.rng.choices((wanted, PROSE, *others), shares)[0].format(answer)
