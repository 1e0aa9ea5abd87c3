"""What an answer may be held to: bodies of `response_format`, of `tools`, and of the calls that a model has made."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from t2ray.api.body import Body
from t2ray.engine.grammar import following

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Schema = dict[str, Any]


class SchemaBody(Body):
    """A JSON schema with a name. `strict` changes nothing: the answer follows the schema in any case."""

    ignored = ("description", "strict")
    name: Name = Field(description="a name of the client's, which the model does not see")
    schema_: Schema = Field(alias="schema", description="the JSON schema that the answer follows")


class ResponseFormat(Body):
    """What form the answer has: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            message = "'json_schema' is for the type 'json_schema', which needs it"
            raise PydanticCustomError("json_schema", "{message}", {"message": message, "param": "json_schema"})
        return self

    @property
    def grammar(self) -> str | None:
        """The grammar that holds the answer; None if any text will do."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else {"type": "object"}
        return f"start: {following(schema)}"


class FunctionBody(Body):
    """A function that the model may ask to be called; without `parameters` it takes none."""

    ignored = ("strict",)
    name: Name
    description: str | None = None
    parameters: Schema | None = Field(None, description="the JSON schema of its arguments, an object")


class ToolBody(Body):
    """A tool on offer."""

    ignored = ("cache_control",)
    type: Literal["function"]
    function: FunctionBody


class FunctionName(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Body):
    """A function with the arguments of a call, as JSON text."""

    name: str = Field(min_length=1)
    arguments: str


class ToolCallBody(Body):
    """A call in an earlier turn of the model's."""

    ignored = ("index",)
    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction


def offer(tools: list[ToolBody]) -> str:
    """Returns the definitions of tools as a chat template shows them, a JSON list; templates ask for every field."""
    nothing = {"type": "object", "properties": {}}
    return json.dumps(
        [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description or "",
                    "parameters": nothing | (function.parameters or {}),
                },
            }
            for function in (tool.function for tool in tools)
        ],
        ensure_ascii=False,
    )
