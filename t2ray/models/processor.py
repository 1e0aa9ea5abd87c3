"""What a vision-language model gets of pictures: transformers' processor of the model, without torchvision.

transformers' own loading wants torchvision for videos, which are not read here, also where there are only pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ray.core import ConfigError, Image
from t2ray.pictures import rgb

if TYPE_CHECKING:
    from torch import Tensor

Seen = Mapping[str, "Tensor"]
"""What a model gets of a row's pictures besides ids, by the name of its argument; nothing of a row without any."""


class Processor:
    """A model's processor. `mark` is what a chat template writes in a picture's place, `places` are the ids of the
    tokens that stand for a picture's parts when it is read."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.mark = str(processor.image_token)
        self.template = processor.chat_template
        self.places = frozenset(id for id in processor.image_token_ids if id is not None)

    def read(
        self, text: str, images: Sequence[Image], *, add_special_tokens: bool
    ) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """Returns the ids of a text whose marks stand for `images`, and what the model gets besides.

        Raises:
            ConfigError: a picture is broken, or the model has no use for one of its size.
        """
        pixels = [rgb(image) for image in images]
        try:
            made = self.processor(
                images=pixels, text=[text], add_special_tokens=add_special_tokens, return_tensors="pt"
            )
        except ValueError as error:
            raise ConfigError(f"the model's processor refuses this: {' '.join(str(error).split())[:300]}") from error
        ids = tuple(made.pop("input_ids")[0].tolist())
        return ids, {name: value for name, value in made.items() if name != "attention_mask"}


def load_processor(folder: Path, config: Any, tokenizer: Any) -> Processor | None:
    """Returns the processor of the model in a folder; None if it takes no pictures.

    Raises:
        ValueError, OSError: the folder lacks a file of it.
    """
    from transformers import AutoImageProcessor, Idefics3Processor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if getattr(config, "vision_config", None) is None or type(config) not in PROCESSOR_MAPPING:
        return None
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError("its folder has no preprocessor_config.json")
    kind = PROCESSOR_MAPPING[type(config)]
    if kind.__name__ == "SmolVLMProcessor":  # for pictures it is that of Idefics 3; for videos it wants num2words
        kind = Idefics3Processor
    kept = [name for name in kind.get_attributes() if name != "video_processor"]
    still: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: kept)})
    settings, _ = kind.get_processor_dict(folder)
    return Processor(still.from_args_and_dict([AutoImageProcessor.from_pretrained(folder), tokenizer], settings))


def side_by_side(rows: Sequence[Seen], pads: Sequence[int], length: int) -> dict[str, Tensor]:
    """Returns what a model gets of a batch's pictures: of rows of ids with so many pads before them, (B, length).

    What is of tokens is 0 where a row has none of its own. The rest follow one another, picture by picture, filled up
    with zeros where one is larger than another, which is what transformers' processors do with a batch.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, Tensor] = {}
    for name in names:
        given = [row[name] for row in rows if name in row]
        if name.endswith("token_type_ids"):
            found[name] = given[0].new_zeros(len(rows), length)
            for i, (row, pad) in enumerate(zip(rows, pads, strict=True)):
                if name in row:
                    found[name][i, pad : pad + row[name].shape[1]] = row[name][0]
            continue
        largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in given), strict=True)]
        room = given[0].new_zeros(sum(len(value) for value in given), *largest)
        start = 0
        for value in given:
            room[(slice(start, start + len(value)), *map(slice, value.shape[1:]))] = value
            start += len(value)
        found[name] = room
    return found
