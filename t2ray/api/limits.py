"""Reading a request's body: strict JSON of limited size, and the configured limits on what it asks for.

Not here: the types of parameters (`schema.py`), and the number of a prompt's tokens, which only the engine knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from t2ray.api.errors import Refusal
from t2ray.api.schema import ChatRequest, CompletionRequest
from t2ray.config.serve import ApiConfig
from t2ray.core import Message, Prompt, SamplingParams

M = TypeVar("M", bound=BaseModel)


def invalid(message: str, param: str | None, code: str = "invalid_value") -> Refusal:
    """A refusal with status 400 that names the parameter at fault."""
    return Refusal(status=400, message=message, param=param, code=code)


def at_most(limit: int, value: int, param: str, what: str) -> None:
    """Checks a value against a configured limit.

    Raises:
        Refusal: 400, `value` is above `limit`.
    """
    if value > limit:
        message = f"{param}: {value:,} {what}, more than the {limit:,} that this endpoint accepts"
        raise invalid(message, param, "too_large")


async def read(request: Request, limit: int) -> bytes:
    """Returns the request's body. Its bytes are counted as they arrive, whatever the content-length header says.

    Raises:
        Refusal: 413, the body has more than `limit` bytes.
    """
    refusal = Refusal(
        status=413, message=f"the body has more than the {limit:,} bytes that are accepted", code="body_too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)


async def read_json(request: Request, model: type[M], limit: int) -> M:
    """Returns the JSON body as a `model`.

    The content type must be application/json: a web page of another origin cannot send that one without this
    endpoint's consent (CORS).

    Raises:
        Refusal: 413 if the body has more than `limit` bytes; 400 for another content type, for invalid JSON (also NaN,
            bad UTF-8, half a surrogate pair, hundreds of nested brackets), and for what `model` refuses, with the
            parameter's name.
    """
    body = await read(request, limit)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid(f"the content type is {kind[:80]!r}; it must be application/json", None, "content_type")
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", None, "invalid_json") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error) from None


def explained(error: ValidationError) -> Refusal:
    """The refusal for the first mistake; it names the parameter by its path, such as `messages[0].role`."""
    first = error.errors(include_url=False)[0]
    # Without the names of a union's parts, which have signs that no parameter's has.
    inner = [place for place in first["loc"] if isinstance(place, int) or re.fullmatch(r"\w+", place)]
    places = [*inner, *([first["ctx"]["param"]] if "param" in first.get("ctx", {}) else [])]
    path = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).lstrip(".")
    if first["type"] in ("unknown", "unsupported"):
        return invalid(first["msg"], path, f"{first['type']}_parameter")
    if first["type"] == "missing":
        return invalid(f"the parameter {path!r} is missing", path, "missing_parameter")
    shown = f" (given: {first['input']!r:.80})" if first["loc"] else ""
    return invalid(f"{path or 'the body'}: {first['msg']}{shown}", path or None)


def check_numbers(answers: int, prompts: int, config: ApiConfig) -> None:
    """Checks the numbers of prompts, and of answers to each.

    Raises:
        Refusal: 400, there are more than the configuration allows.
    """
    at_most(config.max_n, answers, "n", "answers to one prompt")
    at_most(config.max_prompts, prompts, "prompt", "prompts")
    at_most(max(config.max_n, config.max_prompts), answers * prompts, "n", "answers to one request")


def check_prompts(prompts: Sequence[Prompt], config: ApiConfig) -> None:
    """Checks the numbers of turns and characters of each prompt.

    Raises:
        Refusal: 400, a prompt has more of them than the configuration allows.
    """
    for prompt in prompts:
        if isinstance(prompt, str):
            at_most(config.max_prompt_chars, len(prompt), "prompt", "characters")
            continue
        messages = [message for message in prompt if isinstance(message, Message)]
        at_most(config.max_messages, len(messages), "messages", "messages")
        characters = sum(len(m.text) + len(m.calls) for m in messages)
        at_most(config.max_prompt_chars, characters, "messages", "characters")
        at_most(config.max_prompt_chars, len(prompt), "prompt", "tokens")


def sampling(body: ChatRequest | CompletionRequest, config: ApiConfig) -> SamplingParams:
    """Returns the sampling of a request's first answer.

    Raises:
        Refusal: 400, the request asks for more than a configured limit.
    """
    stops, tokens = tuple(body.stop or ()), getattr(body, body.limit) if body.limit else None
    top = body.top_logprobs if isinstance(body, ChatRequest) else body.logprobs
    at_most(config.max_stop, len(stops), "stop", "stop texts")
    for stop in stops:
        at_most(256, len(stop), "stop", "characters in a stop text")
    at_most(config.max_tokens, tokens or 1, body.limit or "max_tokens", "tokens")
    usual = min(config.default_max_tokens or config.max_tokens, config.max_tokens)
    return SamplingParams(
        max_tokens=tokens or (1 if body.max_tokens == 0 else usual),
        to_end=body.max_tokens is None and tokens is None,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple((int(id), bias) for id, bias in (body.logit_bias or {}).items()),
        seed=body.seed,
        stop=stops,
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=top or 0,
    )
