"""Configuration files: YAML with `key=value` overrides, checked by pydantic, with errors that name the nearest key.

Precedence: defaults < preset < YAML < `key=value` on the command line. A file that a person wrote is YAML; one that the
program wrote is JSON. Numbers are those of YAML 1.2: `1e-4` is one, `2026-11-25`, `1:30` and `007` are text; PyYAML by
itself follows YAML 1.1. No torch, no ray.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from t2ray.core import ConfigError

M = TypeVar("M", bound=BaseModel)

INT, FLOAT, MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"


class WrittenFloat(float):
    """A number that remembers how it was written, because it may turn out to be a text such as `run: 0.10`."""

    written: str


class Twice(yaml.YAMLError):
    """A mapping that has a key twice; says in which lines."""


class _Loader(yaml.SafeLoader):
    """Reads keys as the texts that they are, each once."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.checked: set[int] = set()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts merged keys (`<<`) before the node's own, which it checks first."""
        if id(node) not in self.checked:
            self.checked.add(id(node))
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise Twice(f"line {key.start_mark.line + 1}: a key is a text, not a list or a mapping")
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise Twice(
                        f"the key {key.value!r} is written twice, in line {lines[key.value]} and in line {line}"
                    )
                if key.tag != MERGE:
                    lines[key.value] = line
        super().flatten_mapping(node)

    def whole(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0)

    def decimal(self, node: yaml.ScalarNode) -> float:
        number = self.construct_yaml_float(node)
        if repr(number) == node.value:
            return float(number)
        written = WrittenFloat(number)
        written.written = node.value
        return written


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in (INT, FLOAT, "tag:yaml.org,2002:timestamp")]
        for first, rules in _kind.yaml_implicit_resolvers.items()
    }
    # YAML 1.2's core schema (section 10.3.2), but for whole numbers that begin with zeros or a plus.
    _kind.add_implicit_resolver(INT, re.compile(r"-?(?:0|[1-9][0-9]*)$|0o[0-7]+$|0x[0-9a-fA-F]+$"), list("-0123456789"))
    _kind.add_implicit_resolver(
        FLOAT,
        re.compile(
            r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
            r"|\.(?:nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    )
_Loader.add_constructor(INT, _Loader.whole)
_Loader.add_constructor(FLOAT, _Loader.decimal)
_Dumper.add_multi_representer(float, _Dumper.represent_float)


def expanded(path: str) -> str:
    """A path with the home folder for `~` at its beginning, and the environment's values for $NAME and ${NAME}.

    Raises:
        ConfigError: there is no such user, or no such variable and no file or folder of that very name either.
    """

    def value(match: re.Match[str]) -> str:
        if found := os.environ.get(match[1] or match[2]):
            return found
        if Path(path[: f"{path}/".index("/", match.end())]).exists():
            return match[0]
        raise ConfigError(f"the path {path!r} names the environment variable {match[0]}, which is not set")

    whole = os.path.expanduser(path)
    if whole.startswith("~") and not Path(whole.partition("/")[0]).exists():
        raise ConfigError(f"the path {path!r} begins with the home of a user whom there is not")
    return re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value, whole)


FilePath = Annotated[str, AfterValidator(expanded)]
"""The name of a file, of a folder, of a bucket's, or what may be one: `~` and environment variables are expanded."""


class Strict(BaseModel):
    """Frozen; an unknown key is an error, no boolean is a number, numbers are finite, and a number may be a text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in values):
            raise ValueError(f"a number, not {str(value).lower()}")
        if str in kinds and not kinds & {int, float}:
            values = [_as_text(item) for item in values]
        elif Any in kinds:
            values = [float(item) if isinstance(item, WrittenFloat) else item for item in values]
        return values if isinstance(value, list | tuple) else values[0]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, without what a cached property of the original remembered."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of: `{float, NoneType}` of `tuple[float, float] | None`."""
    parts = get_args(annotation)
    return {kind for part in parts for kind in _kinds(part)} if parts else {annotation}


def _as_text(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return getattr(value, "written", str(value))
    return value


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
    # what is unknown explains what is missing
    order = {"extra_forbidden": 0, "missing": 2}
    first = min(error.errors(), key=lambda one: order.get(one["type"], 1))
    path = ".".join(str(part) for part in first["loc"] if part != "str" and "[" not in str(part))  # those name types
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}{nearest(str(first['loc'][-1]), _keys(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"the key {path!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = f"a mapping of keys ({', '.join(_keys(model, first['loc']))})"
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
    path = Path(expanded(str(path)))
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Twice as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not {type(values).__name__}")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads as they were; keys stay in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def portable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values whose paths in a submitted job's working folder are relative to it.

    Ray unpacks a job's files into a folder that it deletes, and whose name changes with any of them.
    """
    folder = r'"[^"]*/working_dir_files/_ray_pkg_[0-9a-f]+'
    text = re.sub(rf'{folder}/+(?=[^"])', '"', json.dumps(values))
    return dict(json.loads(re.sub(rf'{folder}/*"', '"."', text)))


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
        except Twice as error:
            raise ConfigError(f"{text!r}: {error}") from None
        except yaml.YAMLError:
            raise ConfigError(f"{text!r}: the value is not valid YAML") from None
    return values
