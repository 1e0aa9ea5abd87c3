"""The options of `t2ray bench` and of its kinds: serve, load, soak, scaling. Loads nothing; called by `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

SCALING = ("domains", "decomposition", "startup", "training", "serving", "endpoint")
"""The parts of `bench scaling`."""


def add(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """Adds the five commands; `command(name, function, text)` makes a parser."""
    p = command(
        "bench", "bench:bench", "measure the core's speed against the plain model, PEFT and the reference's algorithm"
    )
    p.add_argument(
        "benches", nargs="*", metavar="BENCH", help="of rows, folded, update, rollout, cem, dispatch (default: all)"
    )
    p.add_argument("--json", metavar="FILE", help="writes the figures there too")
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved repeats, at least 5 (default: 5)")
    p.add_argument("--threads", type=int, default=1, metavar="N")

    p = command("bench serve", "bench_serving:serve", "measure a private endpoint beside the engine alone")
    p.add_argument("--json", metavar="FILE", help="writes the figures there too")

    p = command("bench load", "bench_serving:load", "ask a running endpoint at random times, however fast it answers")
    p.add_argument("url", metavar="URL", help="for instance http://127.0.0.1:8000")
    p.add_argument("--rate", type=float, required=True, metavar="R", help="requests a second, on average")
    p.add_argument("--seconds", type=float, default=30.0, metavar="S", help="of arrivals (default: 30)")
    p.add_argument("--model", default="t2ray", metavar="M", help="default: t2ray")
    p.add_argument("--stream", action="store_true", help="answers as streams: also times first tokens")
    p.add_argument("--key", metavar="ENV", help="the environment variable that holds the API key")
    p.add_argument(
        "--prompt", default="{n}+17", metavar="TEXT", help='"{n}" in it is the request\'s number (default: "{n}+17")'
    )
    p.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of an answer (default: 64)")
    p.add_argument("--ignore-eos", action="store_true", help="every answer has N tokens (t2ray and vLLM take this)")
    p.add_argument("--json", metavar="FILE", help="writes the figures there too")

    p = command("bench soak", "bench_serving:soak", "a mixed load on a private endpoint: no error, no growth")
    p.add_argument("--minutes", type=float, default=10.0, metavar="M", help="default: 10")
    p.add_argument("--rate", type=float, default=4.0, metavar="R", help="visits a second, on average (default: 4)")
    p.add_argument("--json", metavar="FILE", help="writes the report there too")

    p = command("bench scaling", "bench_scaling:scaling", "what more cores and workers give, and cost models of both")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SCALING)} (default: all)")
    p.add_argument(
        "--fleet", metavar="MODEL", help="simulates 10,000 requests a second of a model on GPUs, from its config.json"
    )
    p.add_argument("--json", metavar="FILE", help="writes the figures, the fitted prices and their points there too")
