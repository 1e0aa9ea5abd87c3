"""What the bodies of requests are made of: a strict JSON object, and the types of its parameters.

A parameter of OpenAI's that t2ray does not support is accepted if its value changes nothing (its neutral values), and
otherwise refused by name. An unknown parameter is refused with the nearest known name.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from t2ray.config.files import nearest
from t2ray.core import Image

MOST = 2**31 - 1  # upper bound of any number; the configured limits are far below
NULL: tuple[Any, ...] = (None,)
ZERO: tuple[Any, ...] = (None, 0, 0.0)
EMPTY: tuple[Any, ...] = (None, [])
ONE: tuple[Any, ...] = (None, 1, 1.0)
FALSE: tuple[Any, ...] = (None, False)


def _document(schema: dict[str, Any], model: type[Any]) -> None:
    """Adds the unsupported parameters with their neutral values to the JSON schema."""
    for name, values in model.neutral.items():
        unique = [value for i, value in enumerate(values) if value not in values[:i]]  # in JSON, 0 and 0.0 are one
        schema["properties"][name] = {"enum": unique, "description": "not supported; accepted with these values"}
    for name in model.ignored:
        schema["properties"][name] = {"description": "accepted, not used"}


class Body(BaseModel):
    """A JSON object in a request: strict types, no unknown keys.

    `neutral` holds its unsupported parameters with the values that change nothing, `ignored` those that say nothing
    about the answer.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra=_document, allow_inf_nan=False
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        known = {}
        for key, value in values.items():
            if key in fields:
                known[key] = value
            elif key in cls.ignored:
                continue
            elif key not in cls.neutral:
                message = f"unknown parameter {key[:80]!r}{nearest(key[:80], fields)}"
                raise PydanticCustomError("unknown", "{message}", {"message": message, "param": key[:80]})
            elif not any(type(value) is type(neutral) and value == neutral for neutral in cls.neutral[key]):
                message = f"{key!r} is not supported here; leave it out"
                raise PydanticCustomError("unsupported", "{message}", {"message": message, "param": key})
        return known


def _content(value: Any) -> Any:
    """A string as it is; a list of parts as one string, or with pictures as its texts and pictures in turn."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    parts = tuple(_part(part) for part in value)
    if any(isinstance(part, Image) for part in parts):
        return parts
    return "".join(part for part in parts if isinstance(part, str))


def _part(part: Any) -> str | Image:
    match part:
        case {"type": "text", "text": str(text)} if not part.keys() - {"type", "text", "cache_control"}:
            return text
        case {"type": "text", "text": _}:
            raise PydanticCustomError("part", "the text of a part must be a string")
        case {"type": "image_url", "image_url": {"url": str(url), **more}} if not part.keys() - {
            "type",
            "image_url",
            "cache_control",
        } and not more.keys() - {"detail"}:
            return _image(url)
    raise PydanticCustomError(
        "part", 'a part is {"type": "text", "text": "..."}, or {"type": "image_url", "image_url": {"url": "..."}}'
    )


def _image(url: str) -> Image:
    """The picture in a `data:` URI; of another address, that of one which is still to be fetched (`images`)."""
    if url.startswith(("https://", "http://")):
        return Image(path=url)
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[a-z.+-]+;base64", head):
        raise PydanticCustomError("image_url", "a picture's url begins with data:image/png;base64, or https://")
    try:
        return Image(data=binascii.a2b_base64(data, strict_mode=True))
    except ValueError:
        raise PydanticCustomError("image_url", "what follows base64, in a picture's url is not base64") from None


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """A list of prompts, of which each is a text or the ids of its tokens."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        value = [value]
    value = _strings(value)
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "token-ids" if isinstance(value, tuple) else "a-text"


PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}, "cache_control": {}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
URL = {
    "type": "object",
    "properties": {
        "url": {"type": "string", "description": "data:image/png;base64,... (also jpeg, webp, gif), or an address"},
        "detail": {},
    },
    "required": ["url"],
    "additionalProperties": False,
}
PICTURE = {
    "type": "object",
    "properties": {"type": {"const": "image_url"}, "image_url": URL, "cache_control": {}},
    "required": ["type", "image_url"],
    "additionalProperties": False,
}
CONTENT = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [PART, PICTURE]}}, {"type": "null"}],
    "description": "needed, but beside tool_calls; pictures are of a user's turn alone",
}
STRING = {"type": "string", "minLength": 1}
Content = Annotated[Any, BeforeValidator(_content), WithJsonSchema(CONTENT)]
Nonempty = Annotated[str, Field(min_length=1)]
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MOST}, "minItems": 1}
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST)], ...], Field(min_length=1)]
Prompts = Annotated[
    list[Annotated[Annotated[Nonempty, Tag("a-text")] | Annotated[TokenIds, Tag("token-ids")], Discriminator(_kind)]],
    BeforeValidator(_prompts),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [STRING, IDS, {"type": "array", "items": {"anyOf": [STRING, IDS]}, "minItems": 1}]}),
]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Stops = Annotated[
    list[Nonempty] | None,
    BeforeValidator(_strings),
    WithJsonSchema({"anyOf": [STRING, {"type": "array", "items": STRING}, {"type": "null"}]}),
]
