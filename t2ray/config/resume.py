"""What of a training job must stay the same when its run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2ray.config.files import portable

# What does not change the z that a training job comes to, step by step: it may change when a run is resumed.
FREE = frozenset(
    {"run", "out", "experts", "factors", "workers", "cpus", "gpus", "verifiers", "code", "track", "fail_fast",
     "preset", "unsafe_code", "verify_timeout_s", "date"}
)  # fmt: skip
FREE_DOMAIN = frozenset({"gold", "on_reward_error", "on_long_prompt", "publish"})
FREE_RL = frozenset({"steps", "micro_batch", "eval_every", "patience"})


def unchangeable(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job's plain values without those that change nothing of what a step does to z."""
    fields = {key: value for key, value in job.items() if key not in FREE}
    domains = {name: {k: v for k, v in one.items() if k not in FREE_DOMAIN} for name, one in fields["domains"].items()}
    for settings in (fields, *domains.values()):
        settings["rl"] = {key: value for key, value in settings["rl"].items() if key not in FREE_RL}
        if settings["rl"].get("engine") == "transformers":  # as runs were written before there was another
            del settings["rl"]["engine"], settings["rl"]["truncate"]
    if not fields["chat_template_kwargs"]:  # as runs were written before there were any
        del fields["chat_template_kwargs"]
    return portable(fields | {"domains": domains})
