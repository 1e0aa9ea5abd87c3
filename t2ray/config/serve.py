"""What an endpoint is configured by: the model, its engine, and the API's keys and limits. No torch, no ray.

Ray's own settings (replicas, queues, ports) stand in `serve_config.yaml`. Called by `cluster.serve`, `api` and the CLI.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from t2ray.config.files import Strict

VERIFIERS = {"equal": "t2ray.tasks.equal:reward", "gsm8k": "t2ray.tasks.gsm8k:reward"}
"""What an adaptation may be graded by: rewards of rows that are a prompt and an "answer". Nothing else is imported."""


class EngineConfig(Strict):
    """The continuous engine of one replica."""

    kv_tokens: int = Field(16_384, ge=64, description="tokens whose keys and values are held, of all requests together")
    batch_tokens: int = Field(512, ge=16, description="tokens of one step: prompts are read in pieces of this size")
    batch_rows: int = Field(64, ge=1, description="requests of one step")
    threads: int = Field(1, ge=1, description="of torch, on a CPU")


class ApiConfig(Strict):
    """Who may ask, and for how much."""

    keys_file: str | None = Field(None, description="a line a key: `user NAME sha256:HEX` or `admin NAME sha256:HEX`")
    keys_env: str = Field("T2RAY_API_KEYS", description="variable with keys: `user:SECRET,admin:SECRET`")
    cors_origins: tuple[str, ...] = Field((), description="web origins that may call from a browser; none by default")
    max_body_bytes: int = Field(1_048_576, ge=1, description="of a JSON request")
    max_upload_bytes: int = Field(67_108_864, ge=1, description="of an expert's file")
    max_messages: int = Field(256, ge=1, description="of a conversation")
    max_prompt_chars: int = Field(262_144, ge=1, description="of a prompt, before it is tokenised")
    max_tokens: int = Field(1_024, ge=1, description="of one answer")
    default_max_tokens: int = Field(64, ge=1, description="of an answer, where the request does not say")
    max_n: int = Field(8, ge=1, description="answers to one request")
    max_stop: int = Field(4, ge=0, description="stop strings of a request")
    max_streams: int = Field(64, ge=1, description="requests of one key at once")
    max_examples: int = Field(256, ge=1, description="labelled examples of an adaptation")
    log_prompts: bool = Field(False, description="whether prompts and answers are logged")


class ServeConfig(Strict):
    """One endpoint: `args` in `serve_config.yaml`."""

    model: str = Field("tiny", description="a folder, a hub name, or `tiny`")
    name: str | None = Field(None, description="the base model's name for users; as `model` when not given")
    factors: str | None = Field(None, description="the decomposition; made beside `runs` when it is missing")
    experts: str | None = Field(None, description="the registry; runs/demo's or the shipped experts when not given")
    strategy: Literal["cls", "prompt", "base"] | None = Field(
        None, description="what the model name `t2ray` means; cls when there is a classification expert, else prompt"
    )
    poll_s: float = Field(1.0, gt=0, description="seconds between two looks into the registry")
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()
