"""Which values of a training job a resume may change. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from t2ray.config.adapter import AdapterConfig
from t2ray.config.files import portable
from t2ray.config.rl import TORCH_BETAS

# What does not change the z that a training job comes to, step by step: it may change when a run is resumed.
FREE = frozenset(
    {"run", "out", "experts", "factors", "workers", "domains_per_worker", "cpus", "gpus", "verifiers", "code", "track",
     "fail_fast", "preset", "unsafe_code", "verify_timeout_s", "date"}
)  # fmt: skip
FREE_DOMAIN = frozenset({"gold", "test", "on_reward_error", "on_long_prompt", "publish", "train"})
FREE_RL = frozenset({"steps", "micro_batch", "micro_tokens", "eval_every", "patience"})

_UNTOLD = (("objective", "reinforce"), ("engine", "transformers"))


def lasting(job: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a job that change what a step does to z.

    A key that came later is left out where it says what jobs did without it.
    """
    fields = {key: value for key, value in job.items() if key not in FREE}
    domains = {
        name: {key: value for key, value in domain.items() if key not in FREE_DOMAIN}
        for name, domain in fields["domains"].items()
    }
    shared = fields["rl"]
    usual = "betas" not in before_betas(shared)
    for settings in (fields, *domains.values()):
        rl = {key: value for key, value in settings["rl"].items() if key not in FREE_RL}
        if "engine" in rl and sampler(rl["engine"]) == "transformers":
            rl = {key: value for key, value in rl.items() if key not in ("engine", "truncate")}
            if sampler(shared["engine"]) == "vllm":
                rl["engine"] = "transformers"
        if rl.get("objective") == shared["objective"] == "reinforce":
            del rl["objective"]
        settings["rl"] = before_betas(rl) if usual else rl  # else a domain that names them differs from the job
    rl = fields["rl"]
    if rl.get("algorithm") == "reinforce":
        del rl["algorithm"]
        rl["baseline"] = rl["baseline"] or "mean"
    if rl.get("length") is None:
        rl.pop("length", None)
    if rl.get("updates") == 1:
        del rl["updates"], rl["ratio_clip"]
    if fields["adapter"] == AdapterConfig().model_dump(mode="json"):
        del fields["adapter"]
    if not fields["chat_template_kwargs"]:
        del fields["chat_template_kwargs"]
    return portable(fields | {"domains": domains})


def digest_of(fields: Mapping[str, Any]) -> str:
    """The digest of the values of `lasting`: 24 hex digits.

    A domain's own `objective: reinforce` or `engine: transformers` is left out, though the job has another: digests in
    checkpoints never told it, and go on to be read.
    """
    domains = {
        name: domain | {"rl": {key: value for key, value in domain["rl"].items() if (key, value) not in _UNTOLD}}
        for name, domain in fields["domains"].items()
    }
    values = json.dumps({**fields, "domains": domains}, sort_keys=True)
    return hashlib.blake2b(values.encode(), digest_size=12).hexdigest()


def sampler(engine: str) -> str:
    """What samples the rollouts of a run that has begun: `auto` was transformers before there was another."""
    return "vllm" if engine == "vllm" else "transformers"


def before_betas(rl: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of RL settings without `betas`, where they say what jobs did before there was such a key."""
    return {key: value for key, value in rl.items() if key != "betas" or tuple(value) != TORCH_BETAS}
