"""Which values of a training job a resume may change. No torch."""

from __future__ import annotations

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
FREE_DOMAIN = frozenset({"gold", "test", "on_reward_error", "on_long_prompt", "publish"})
FREE_RL = frozenset({"steps", "micro_batch", "micro_tokens", "eval_every", "patience"})


def lasting(job: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a job that change what a step does to z.

    A key that came later is left out where it says what jobs did without it.
    """
    fields = {key: value for key, value in job.items() if key not in FREE}
    domains = {
        name: {key: value for key, value in domain.items() if key not in FREE_DOMAIN}
        for name, domain in fields["domains"].items()
    }
    usual = "betas" not in before_betas(fields["rl"])
    for settings in (fields, *domains.values()):
        settings["rl"] = {key: value for key, value in settings["rl"].items() if key not in FREE_RL}
        if settings["rl"].get("engine") in ("auto", "transformers"):
            settings["rl"] = {key: value for key, value in settings["rl"].items() if key not in ("engine", "truncate")}
        if settings["rl"].get("objective") == "reinforce":
            del settings["rl"]["objective"]
        if usual:  # else a domain that names them differs from the job
            settings["rl"] = before_betas(settings["rl"])
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


def before_betas(rl: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of RL settings without `betas`, where they say what jobs did before there was such a key."""
    return {key: value for key, value in rl.items() if key != "betas" or tuple(value) != TORCH_BETAS}
