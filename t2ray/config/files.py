"""Configuration files: YAML with `key=value` overrides, checked by pydantic, with errors that name the nearest key.

Precedence: defaults < preset < YAML < `key=value` on the command line. A file that a person wrote is YAML; one that the
program wrote is JSON. `1e-4` is a number, as in YAML 1.2; PyYAML by itself follows YAML 1.1, where it is text.
No torch, no ray.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from t2ray.core import ConfigError

M = TypeVar("M", bound=BaseModel)

FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag != FLOAT]
        for first, rules in _kind.yaml_implicit_resolvers.items()
    }
    # YAML 1.2's core schema (section 10.3.2). Whole numbers match it too; PyYAML asks its rule for those first.
    _kind.add_implicit_resolver(
        FLOAT,
        re.compile(
            r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    )


class Strict(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, without what a cached property of the original remembered."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


def validate(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """`values` as a `model`, or one line that says what is wrong with which key.

    Raises:
        ConfigError: with the key's path, the value, and for an unknown key the nearest one that exists.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}{nearest(str(first['loc'][-1]), _keys(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"the key {path!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    given = f", not {first['input']!r}" if first["loc"] and first["type"] != "value_error" else ""
    return f"{path + ': ' if path else ''}{message}{given}"


def _keys(model: type[BaseModel], loc: Iterable[str | int]) -> list[str]:
    """The keys accepted at a place inside `model`."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # a key of a dict, such as a domain's name
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'steps'? (known: ...)"`: the tail of an error about an unknown word."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    shown = [*known[:30], *([f"and {len(known) - 30} more"] if len(known) > 30 else [])]
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(shown) or 'none'})"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: the file is missing, is no YAML (with the line), or holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not {type(values).__name__}")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads as they were; keys stay in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`values` with `rl.steps=30`-like assignments laid over it; values are read as YAML.

    Raises:
        ConfigError: an assignment that is not `key=value`, or that goes through something that is no mapping.
    """
    values = copy.deepcopy(values)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} is not key=value; write for instance rl.steps=30")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{text!r}: {parent!r} holds no keys")
        try:
            place[last] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise ConfigError(f"{text!r}: the value is not valid YAML") from None
    return values
