"""`/openapi.json` against the API: schemathesis makes requests, right and wrong ones, and checks every answer.

`T2RAY_SCHEMATHESIS_EXAMPLES=5000 pytest tests/test_api_schema.py` makes 5,000, shared out over the routes. Not
checked: that every request that fits the schema is accepted, since JSON's schema cannot say what a limit is configured
to, that a model exists, or that `top_logprobs` needs `logprobs`.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import schemathesis
from fake_backend import FakeBackend
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from t2ray.api.app import create_api
from t2ray.api.backend import Adaptation
from t2ray.config.serve import ApiConfig

DEFAULT = 300
EXAMPLES = int(os.environ.get("T2RAY_SCHEMATHESIS_EXAMPLES", DEFAULT))
MODELS = ("t2ray", "t2ray:prompt", "t2ray:base", "t2ray:math", "t2ray:math:0.7,code:0.3", "t2ray:fewshot/sums")
KEY = "an-admin-key-of-the-tests"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def operations() -> dict[str, Any]:
    """Every operation of the document of an API that needs a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2RAY_API_KEYS", f"admin:{KEY}")
        app = create_api(ApiConfig(max_prompt_chars=2000))
    app.state.backend = FakeBackend()
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return {operation.label: operation for operation in (result.ok() for result in schema.get_all_operations())}


# Of `EXAMPLES`, the share of a route with right and with wrong requests; one without parameters is asked once, and a
# path's parameter, which is a text, cannot be wrong.
SHARES = {
    "POST /v1/chat/completions": (0.2, 0.2),
    "POST /v1/completions": (0.1, 0.1),
    "POST /v1/responses": (0.1, 0.1),
    "POST /v1/adaptations": (0.1, 0.05),
    "PUT /v1/experts/{name}": (0.03, 0.02),
    "DELETE /v1/experts/{name}": (0.01, 0.0),
    "GET /v1/experts/{name}": (0.01, 0.0),
    "GET /v1/models/{model}": (0.01, 0.0),
    "GET /v1/adaptations/{id}": (0.01, 0.0),
    "GET /page/{name}": (0.01, 0.0),
    "GET /": (0.0, 0.0),
    "GET /v1/models": (0.0, 0.0),
    "GET /v1/experts": (0.0, 0.0),
    "GET /v1/load": (0.0, 0.0),
    "GET /health": (0.0, 0.0),
    "GET /metrics": (0.0, 0.0),
}


def share(label: str, mode: str) -> int:
    right, wrong = SHARES[label]
    return max(round(EXAMPLES * right), 1) if mode == "POSITIVE" else round(EXAMPLES * wrong)


def steer(case: Any, model: str) -> None:
    """Names what there is, which a generated text never does, so that a request comes as far as an answer."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = model
    if isinstance(case.body, dict):  # a schema made at random can seldom be followed, nor its tools be told of
        for form in ("response_format", "tools", "tool_choice", "text"):
            case.body.pop(form, None)
        for message in case.body.get("messages", ()):  # what goes with which role, the schema cannot say
            for part in ("tool_calls", "tool_call_id", "reasoning_content"):
                message.pop(part, None)
            message |= {"content": message.get("content") or "2+2"}
            if message["role"] == "tool":
                message["role"] = "user"
    if isinstance(case.body, dict) and "verifier" in case.body:
        case.body |= {"verifier": "exact", "experts": ["math"]}
        for example in case.body["examples"]:  # either messages or a prompt, which the schema cannot say
            if example.get("messages"):
                example.pop("prompt", None)
            elif not example.get("prompt"):
                example["prompt"] = "2+2"
    if case.method == "PUT":
        case.body = save({"layers.0": np.ones(4, np.float32)})
    known = {"name": "app.js" if "page" in case.path else "math", "id": "adapt-0", "model": model}
    case.path_parameters = {name: known[name] for name in case.path_parameters or ()}


@pytest.mark.parametrize(
    ("label", "mode"), [(label, mode) for mode in ("POSITIVE", "NEGATIVE") for label in SHARES if share(label, mode)]
)
def test_every_answer_is_as_documented(operations: dict[str, Any], label: str, mode: str) -> None:
    operation = operations[label]
    operation.app.state.backend = backend = FakeBackend()
    backend.adaptations["adapt-0"] = Adaptation(id="adapt-0", name="tens", status="queued")
    right = mode == "POSITIVE"
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=share(label, mode),
        deadline=None,
        database=None,
        derandomize=EXAMPLES == DEFAULT,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=GenerationMode[mode]),
        model=st.sampled_from(MODELS),
        known=st.sampled_from((True, True, False)),
    )
    def ask(case: Any, model: str, known: bool) -> None:
        if right and known:
            steer(case, model)
        response = case.call(headers={"authorization": f"Bearer {KEY}"})
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS if right else [*CHECKS, negative_data_rejection])

    ask()
    print(f"{label} {mode}: {dict(statuses)}")
    assert not right or any(status < 300 for status in statuses), "nothing but refusals was tried"


def test_every_route_is_documented_and_tried(operations: dict[str, Any]) -> None:
    assert set(operations) == set(SHARES)
