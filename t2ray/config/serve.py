"""What an endpoint is configured by: the model, its engine, and the API's keys and limits. No torch, no ray.

Ray's own settings (replicas, queues, ports) stand in `serve_config.yaml`, and this model's under its `args`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from t2ray.config.files import FilePath, Strict, override, read_yaml, validate
from t2ray.core import ConfigError

VERIFIERS = {"equal": "t2ray.tasks.equal:reward", "gsm8k": "t2ray.tasks.gsm8k:reward"}
"""What an adaptation may be graded by: rewards of rows that are a prompt and an "answer". Nothing else is imported."""


class EngineConfig(Strict):
    """The continuous engine of one replica."""

    kind: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="What computes: transformers, or vLLM, which has to be installed beside t2ray; auto is vLLM on a "
        "GPU, where it is installed and its answers for this type of model have been compared, else transformers "
        "(docs/vllm.md).",
    )

    kv_tokens: int = Field(
        16_384, ge=64, description="Number of tokens whose keys and values are held, of all requests together."
    )
    batch_tokens: int = Field(
        512, ge=16, description="Greatest number of tokens of one step; a prompt is read in pieces of this size."
    )
    batch_rows: int = Field(64, ge=1, description="Greatest number of requests of one step.")
    threads: int = Field(1, ge=1, description="Number of torch's threads on a CPU.")
    tensor_parallel: int = Field(1, ge=1, description="Number of GPUs over which vLLM divides the model.")


class ApiConfig(Strict):
    """Who may ask, and for how much."""

    keys_file: FilePath | None = Field(
        None,
        description="File with one key per line: `user NAME sha256:HEX` or `admin NAME sha256:HEX`; `t2ray keys` adds "
        "lines to it.",
    )
    keys_env: str = Field(
        "T2RAY_API_KEYS", description="Environment variable that holds further keys: `user:SECRET,admin:SECRET`."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Web origins whose pages may ask from a browser; without any, only the endpoint's own."
    )
    max_body_bytes: int = Field(1_048_576, ge=1, description="Greatest size of a JSON request, in bytes.")
    max_upload_bytes: int = Field(67_108_864, ge=1, description="Greatest size of an uploaded expert, in bytes.")
    max_messages: int = Field(256, ge=1, description="Greatest number of messages of a conversation.")
    max_prompt_chars: int = Field(
        262_144, ge=1, description="Greatest number of characters of a prompt, counted before it is tokenised."
    )
    max_images: int = Field(8, ge=0, description="Greatest number of pictures of a request.")
    max_image_bytes: int = Field(8_388_608, ge=1, description="Greatest size of a picture's file, in bytes.")
    max_image_pixels: int = Field(16_777_216, ge=1, description="Greatest number of pixels of a picture.")
    image_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts from which pictures may be fetched whose address a request has; without any, a request "
        "brings its pictures with it. No private address is connected to, and no redirect followed.",
    )
    max_tokens: int = Field(1_024, ge=1, description="Greatest number of tokens that a request may ask for.")
    default_max_tokens: int | None = Field(
        None,
        ge=1,
        description="Greatest number of tokens of an answer, where the request says none; without one, `max_tokens`. "
        "The end of the context may come first.",
    )
    max_n: int = Field(8, ge=1, description="Greatest number of answers to one prompt.")
    max_prompts: int = Field(64, ge=1, description="Greatest number of prompts, and of their answers, of one request.")
    max_stop: int = Field(4, ge=0, description="Greatest number of stop strings of a request.")
    max_streams: int = Field(64, ge=1, description="Greatest number of requests of one key at the same time.")
    max_examples: int = Field(256, ge=1, description="Greatest number of labelled examples of an adaptation.")
    log_prompts: bool = Field(False, description="Whether prompts and answers are written to the log.")


class ServeConfig(Strict):
    """One endpoint: `args` in `serve_config.yaml`."""

    model: FilePath = Field(
        "tiny",
        description='Model to serve: "tiny", "tiny-vision", a local folder, or an id on the Hugging Face hub.',
    )
    name: str | None = Field(None, description="Name of the base model that users see; without one, `model`.")
    factors: FilePath | None = Field(
        None,
        description="Folder of the model's decomposition, which is made when it is missing; without one, "
        "a folder in runs/factors.",
    )
    experts: FilePath | None = Field(
        None,
        description="Registry of the experts; without one, that of runs/demo, or the experts that come with a model "
        "that t2ray ships.",
    )
    strategy: Literal["cls", "prompt", "base"] | None = Field(
        None,
        description="What answers under the model name `t2ray`; without one, cls where there is a classification "
        "expert, prompt where there are other experts, else base.",
    )
    threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Least probability of the likeliest label in pass 1 with which its expert answers; below it the "
        "base model does. `t2ray dispatch` shows what each costs.",
    )
    on_damaged: Literal["error", "base"] = Field(
        "error",
        description="What a request gets that a strategy dispatches to an expert which cannot be used: an error that "
        "names the expert, or the base model's answer.",
    )
    poll_s: float = Field(1.0, gt=0, description="Seconds from one look into the registry to the next.")
    engine: EngineConfig = Field(EngineConfig(), description="Settings of the engine of each replica.")
    api: ApiConfig = Field(ApiConfig(), description="Keys and limits of the API.")


def load(path: str | Path, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], ServeConfig]:
    """A `serve_config.yaml`: the document, most of which is Ray's, and the `args` of its one application.

    `overrides` are laid over the `args`, and only over them.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    document = read_yaml(Path(path))
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: `applications` needs exactly one entry; see serve_config.yaml")
    for place, key in ((document, "http_options"), (applications[0], "args")):
        if not isinstance(place.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}: a mapping of keys, not {place[key]!r}; leave it out for the defaults")
    return document, validate(ServeConfig, override(applications[0].get("args", {}), overrides), where=f"{path}: args")
