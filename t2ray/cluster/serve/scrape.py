"""What `/metrics` shows of all that Ray's metrics agents have: t2ray's own, and beside them what vLLM has names for."""

from __future__ import annotations

import re
from collections.abc import Iterable

OWN = re.compile(r"(?:# (?:HELP|TYPE) )?(ray_t2ray_\w+)")
VLLM = {
    "running_requests": "num_requests_running",
    "waiting_requests": "num_requests_waiting",
    "kv_used": "kv_cache_usage_perc",
    "prompt_tokens_total": "prompt_tokens_total",
    "generation_tokens_total": "generation_tokens_total",
    "ttft_seconds": "time_to_first_token_seconds",
    "time_per_token_seconds": "time_per_output_token_seconds",
    "request_seconds": "e2e_request_latency_seconds",
}
"""t2ray's names, and vLLM's for what means the same, so that dashboards and routers for vLLM read both."""
NAMED = re.compile(rf"^((?:# (?:HELP|TYPE) )?)ray_t2ray_({'|'.join(VLLM)})(?=[ {{]|_(?:bucket|count|sum|created)\b)")


def own(texts: Iterable[str], model: str) -> str:
    """Returns t2ray's metrics out of Prometheus' texts of several nodes, and under vLLM's names those that it has, too.

    A metric's lines stand together, under one head, as the format asks. `model` labels vLLM's.
    """
    metrics: dict[str, dict[str, None]] = {}
    name = ""
    for text in texts:
        for line in text.splitlines():
            if not (found := OWN.match(line)):
                continue
            if line.startswith("# HELP"):
                name = found[1]
            metrics.setdefault(name, {})[line] = None
            if named := NAMED.match(line):
                theirs = f"{named[1]}vllm:{VLLM[named[2]]}{line[named.end() :]}"
                if not named[1]:
                    theirs = theirs.replace("{", f'{{model_name="{model}",', 1)
                metrics.setdefault(f"vllm {name}", {})[theirs] = None
    return "".join(f"{line}\n" for lines in metrics.values() for line in lines)
