"""The routes under `/v1`: models, completions, experts, adaptations, load.

Not here: how a completion is made (`answers.py`), and who may ask (`guard.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from t2ray.api.answers import answer
from t2ray.api.backend import AdaptationRequest, Backend, EndpointLoad
from t2ray.api.errors import SERVER, ErrorReply, Refusal
from t2ray.api.images import with_images
from t2ray.api.limits import at_most, check_prompts, invalid, read, read_json
from t2ray.api.names import known_expert, names
from t2ray.api.outputs import ResponseReply, respond
from t2ray.api.replies import (
    AdaptationReply,
    DeletedReply,
    ExpertReply,
    ExpertsReply,
    ModelReply,
    ModelsReply,
    SavedReply,
    model_reply,
)
from t2ray.api.responses import ResponsesRequest
from t2ray.api.schema import AdaptationBody, ChatRequest, CompletionRequest
from t2ray.api.shapes import ChatReply, ChatShape, TextReply, TextShape
from t2ray.config.files import nearest
from t2ray.config.serve import ApiConfig
from t2ray.core import check_name

SEARCHED = 64
"""Tokens of an answer in a few-shot search, which makes thousands of them, where the request says none."""

router = APIRouter(prefix="/v1")


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route for `/openapi.json`: `statuses` and those that every route can give."""
    return {status: {"model": ErrorReply, "description": "refused"} for status in (401, 403, *statuses, 503)}


def takes(schema: str, kind: str = "application/json") -> dict[str, Any]:
    """The body of a route for `/openapi.json`: FastAPI does not see it, because routes read it themselves."""
    content = {"$ref": f"#/components/schemas/{schema}"} if schema else {"type": "string", "format": "binary"}
    return {"requestBody": {"required": True, "content": {kind: {"schema": content}}}}


def backend_of(request: Request) -> Backend:
    """Returns the application's backend.

    Raises:
        Refusal: 503, it has not been set yet.
    """
    backend: Backend | None = request.app.state.backend
    if backend is None:
        raise Refusal(status=503, message="the endpoint is starting", type=SERVER, code="starting", retry_after=2)
    return backend


def config_of(request: Request) -> ApiConfig:
    """Returns the application's configuration."""
    config: ApiConfig = request.app.state.config
    return config


def admin(request: Request) -> None:
    """Checks that the request's key is an admin's.

    Raises:
        Refusal: 403, it is a user's.
    """
    key = request.state.trace.key
    if key.role != "admin":
        raise Refusal(
            status=403, message=f"the key {key.name!r} is a user's; this takes an admin's key", code="admin_only"
        )


def reply(value: Any, status: int = 200) -> Response:
    """Returns `value` as a JSON response."""
    return Response(to_json(value), status, media_type="application/json")


EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk or an error as JSON; [DONE] at the end"}},
    "required": ["data"],
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; with `stream`, its chunks as server-sent events",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


@router.post(
    "/chat/completions",
    response_model=ChatReply,
    responses=refused(400, 404, 413, 429) | STREAM,
    openapi_extra=takes("ChatRequest"),
)
async def chat(request: Request) -> Response:
    """Continues a conversation."""
    backend_of(request)
    body = await read_json(request, ChatRequest, config_of(request).max_body_bytes)
    return await answer(request, body, ChatShape(), [body.conversation])


@router.post(
    "/completions",
    response_model=TextReply,
    responses=refused(400, 404, 413, 429) | STREAM,
    openapi_extra=takes("CompletionRequest"),
)
async def complete(request: Request) -> Response:
    """Continues texts as they stand."""
    backend_of(request)
    body = await read_json(request, CompletionRequest, config_of(request).max_body_bytes)
    return await answer(request, body, TextShape(), body.prompt)


@router.post(
    "/responses",
    response_model=ResponseReply,
    responses=refused(400, 404, 413, 429) | STREAM,
    openapi_extra=takes("ResponsesRequest"),
)
async def responses(request: Request) -> Response:
    """Continues a conversation, in the form of the newer API. Nothing is kept of it."""
    backend_of(request)
    return await respond(request, await read_json(request, ResponsesRequest, config_of(request).max_body_bytes))


@router.get("/models/", response_model=ModelsReply, responses=refused(), include_in_schema=False)
@router.get("/models", response_model=ModelsReply, responses=refused())
async def models(request: Request) -> Response:
    """Lists all model names except mixtures in the form `t2ray:a:0.7,b:0.3`, of which there is no end."""
    catalog = backend_of(request).catalog()
    return reply(ModelsReply(data=[model_reply(name, catalog) for name in names(catalog)]))


@router.get("/models/{model:path}", response_model=ModelReply, responses=refused(400, 404))
async def model(request: Request, model: str) -> Response:
    """Says what a model name means."""
    return reply(model_reply(model, backend_of(request).catalog()))


@router.get("/experts", response_model=ExpertsReply, responses=refused())
async def experts(request: Request) -> Response:
    """Lists all experts; one that cannot be used says why in `problem`, and `problems` has whatever is wrong."""
    catalog = backend_of(request).catalog()
    return reply(ExpertsReply(data=list(catalog.experts.values()), problems=catalog.problems))


@router.get("/experts/{name}", response_model=ExpertReply, responses=refused(404))
async def expert(request: Request, name: str) -> Response:
    """Describes an expert. `heat` is its mean |z - 1| per layer and kind of matrix, or null if it cannot be read."""
    backend = backend_of(request)
    info = known_expert(name, backend.catalog())
    heat = None if info.problem else await backend.heat(name)
    return reply(asdict(info) | {"heat": heat})


@router.put(
    "/experts/{name}",
    response_model=SavedReply,
    responses=refused(400, 413),
    openapi_extra=takes("", "application/octet-stream"),
    dependencies=[Depends(admin)],
)
async def put_expert(request: Request, name: str) -> Response:
    """Saves the body, a safetensors file with one vector z per target, as the next version of an expert."""
    backend, config = backend_of(request), config_of(request)
    check_name(name)
    version = await backend.put_expert(name, await read(request, config.max_upload_bytes))
    return reply(SavedReply(name=name, version=version))


@router.delete("/experts/{name}", response_model=DeletedReply, responses=refused(404), dependencies=[Depends(admin)])
async def delete_expert(request: Request, name: str) -> Response:
    """Deletes an expert with all its versions."""
    backend = backend_of(request)
    await backend.delete_expert(known_expert(name, backend.catalog()).name)
    return reply(DeletedReply(name=name))


@router.post(
    "/adaptations",
    status_code=202,
    response_model=AdaptationReply,
    responses=refused(400, 404, 413, 429),
    openapi_extra=takes("AdaptationBody"),
    dependencies=[Depends(admin)],
)
async def adapt(request: Request) -> Response:
    """Starts a few-shot search for a task's mixture, from labelled examples and a verifier's name."""
    backend, config = backend_of(request), config_of(request)
    body = await read_json(request, AdaptationBody, config.max_body_bytes)
    catalog = backend.catalog()
    at_most(config.max_examples, len(body.examples), "examples", "examples")
    conversations = await with_images([example.conversation for example in body.examples], config)
    check_prompts(conversations, config)
    at_most(config.max_tokens, body.max_tokens or 1, "max_tokens", "tokens")
    if body.verifier not in catalog.verifiers:
        raise invalid(
            f"unknown verifier {body.verifier[:80]!r}{nearest(body.verifier[:80], catalog.verifiers)}", "verifier"
        )
    for name in body.experts:
        known_expert(name, catalog, param="experts")
    started = await backend.adapt(
        AdaptationRequest(
            name=body.name,
            examples=[(pair[0], pair[1].answer) for pair in zip(conversations, body.examples, strict=True)],
            verifier=body.verifier,
            experts=tuple(body.experts),
            max_tokens=body.max_tokens or min(SEARCHED, config.max_tokens),
            settings=body.settings,
        )
    )
    return reply(AdaptationReply.of(started), 202)


@router.get("/adaptations/{id}", response_model=AdaptationReply, responses=refused(404))
async def adaptation(request: Request, id: str) -> Response:
    """Describes a few-shot search: its status, its progress and, at its end, its mixture."""
    return reply(AdaptationReply.of(await backend_of(request).adaptation(id)))


@router.get("/load", response_model=EndpointLoad, responses=refused())
async def load(request: Request) -> Response:
    """Describes the present load of all replicas together."""
    return reply(await backend_of(request).load())
