"""The keys of a configuration, read from its model: what `t2ray config` and docs/config.md list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

_KINDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping",
    "null": "null",
}  # fmt: skip
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    """`ConfigKey(path="rl.lr", type="number above 0", default="0.02", text="Highest learning rate of AdamW.")`.

    `default` is JSON. It is "required" for a key that has to be given, and empty where there is none: `text` says then
    what happens without one.
    """

    path: str
    type: str
    default: str
    text: str


def keys(model: type[BaseModel], prefix: str = "") -> list[ConfigKey]:
    """Every key of a model, those inside of others after them; NAME in `domains.NAME.task` is a user's own choice."""
    schema = model.model_json_schema()
    return list(_walk(schema, schema.get("$defs", {}), prefix))


def shown_default(value: Any) -> str:
    """A default as JSON, which is YAML too; None is no default."""
    return "" if value is None else json.dumps(value)


def _walk(schema: Mapping[str, Any], parts: Mapping[str, Any], prefix: str) -> Iterator[ConfigKey]:
    for name, field in schema["properties"].items():
        values = field.get("additionalProperties")
        named = isinstance(values, dict)
        inner = (values if named else field).get("$ref", "").rpartition("/")[2]
        default = "" if inner and not named else shown_default(field.get("default", {}))
        yield ConfigKey(
            path=prefix + name,
            type="mapping" if inner else _type(field),
            default="required" if name in schema.get("required", ()) else default,
            text=field.get("description", ""),
        )
        if inner:
            yield from _walk(parts[inner], parts, f"{prefix}{name}.{'NAME.' * named}")


def _type(field: Mapping[str, Any]) -> str:
    """A JSON schema in words: `whole number, at least 1`."""
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"] if part.get("type") != "null")
    if "$ref" in field:
        return "mapping"
    if "enum" in field or "const" in field:
        return " or ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"[{', '.join(_type(part) for part in field['prefixItems'])}]"
    if field.get("type") == "array":
        return f"[{_type(field['items'])}, ...]"
    kind = _KINDS.get(field.get("type", ""), "anything")
    return ", ".join([kind, *(f"{word} {field[bound]:g}" for bound, word in _BOUNDS.items() if bound in field)])
