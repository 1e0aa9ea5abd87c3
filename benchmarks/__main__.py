"""`python -m benchmarks [NAME ...]`: measures how fast t2ray is, compared with its peers; prints tables, writes JSON.

| command | what is measured |
| --- | --- |
| `python -m benchmarks [rows folded ...]` | the core, compared with the plain model, PEFT and the reference |
| `python -m benchmarks --quick` | in a minute, whether a ratio fell behind the record in docs/results.json |
| `python -m benchmarks serve` | a private endpoint, compared with its engine alone |
| `python -m benchmarks soak` | hours of mixed load on a private endpoint: no error, no growth |
| `python -m benchmarks gpu` | both engines and a training step on one GPU, a model of 8 B parameters |
| `python -m benchmarks experts` | 4 to 64 experts: pass 1, and the few-shot search |
| `python -m benchmarks fifth` | a fifth domain after four: what is kept, named, answered and found |
| `python -m benchmarks learn [SETTING]` | RL on z beside TRL's RLOO and GRPO on LoRA, at equal rollouts |
| `python -m benchmarks scaling [PART ...]` | the gain of more cores and workers, and cost models |

They need the `bench` extra and a checkout of the repository. `t2ray load` measures a running endpoint.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from benchmarks.capacity import PARTS
from t2ray.core import T2RayError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 2 after a user's mistake, 130 after an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    kind = words.pop(0) if words and words[0] in _KINDS else "core"
    args = _KINDS[kind]().parse_args(words)
    try:
        command = importlib.import_module(args.module)
        return int(getattr(command, args.function)(args) or 0)
    except T2RayError as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


class _BenchParser(argparse.ArgumentParser):
    """A parser that reports a wrong call in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message}; see {self.prog} --help\n")


def _parser(name: str, module: str, function: str, text: str) -> argparse.ArgumentParser:
    parser = _BenchParser(prog=f"python -m benchmarks{name}", description=text)
    parser.set_defaults(module=f"benchmarks.{module}.command", function=function)
    parser.add_argument("--json", metavar="FILE", help="Also write the figures to this file.")
    return parser


def _core() -> argparse.ArgumentParser:
    p = _parser("", "core", "core", "Compares the core with the plain model, PEFT and the reference's algorithm.")
    p.epilog = "Other commands: serve, soak, scaling, gpu, experts, fifth, learn; each has its own --help."
    p.add_argument(
        "benches",
        nargs="*",
        metavar="BENCH",
        help="Of rows, sparse, folded, update, rollout, cem, dispatch (default: all).",
    )
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="Interleaved repeats, at least 5 (default: 5).")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="Threads of torch (default: 1).")
    p.add_argument(
        "--quick",
        action="store_true",
        help="Hold a smaller model's ratios against docs/results.json; exit with 1 if one is much worse. With --json, "
        "write them instead.",
    )
    return p


def _serve() -> argparse.ArgumentParser:
    p = _parser(" serve", "endpoint", "serve", "Compares a private endpoint with its engine alone.")
    p.add_argument(
        "--model", metavar="FOLDER", help="Measure the throughput of this model in place of the tiny one's figures."
    )
    p.add_argument("--experts", metavar="FOLDER", help="A registry of two or more of its experts.")
    return p


def _soak() -> argparse.ArgumentParser:
    p = _parser(" soak", "endpoint", "soak", "Puts a mixed load on a private endpoint: no error, no growth of memory.")
    p.add_argument("--minutes", type=float, default=10.0, metavar="M", help="How long (default: 10).")
    p.add_argument("--rate", type=float, default=4.0, metavar="R", help="Requests per second, on average (default: 4).")
    return p


def _scaling() -> argparse.ArgumentParser:
    p = _parser(" scaling", "capacity", "scaling", "Measures the gain of more cores and workers, and fits cost models.")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"Of {', '.join(PARTS)} (default: all).")
    p.add_argument(
        "--fleet",
        metavar="MODEL",
        help="Simulate 10,000 requests per second of this model on GPUs, from its config.json.",
    )
    return p


def _gpu() -> argparse.ArgumentParser:
    p = _parser(" gpu", "gpu", "gpu", "Measures both engines and a training step on one GPU, with random weights.")
    p.add_argument("--small", action="store_true", help="A model that any machine runs, to see that it runs.")
    return p


def _experts() -> argparse.ArgumentParser:
    p = _parser(" experts", "experts", "experts", "Measures pass 1 and the few-shot search over 4 to 64 experts.")
    p.add_argument("--prompts", type=int, default=50, metavar="N", help="Test prompts per kind (default: 50).")
    return p


def _fifth() -> argparse.ArgumentParser:
    p = _parser(" fifth", "fifth", "fifth", "Trains four domains and then a fifth, and measures before and after it.")
    p.add_argument("--prompts", type=int, default=100, metavar="N", help="Test prompts per kind (default: 100).")
    p.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="How many times, with seeds 0, 1, ... (default: 3)."
    )
    return p


def _learn() -> argparse.ArgumentParser:
    p = _parser(" learn", "learn", "learn", "Trains z beside TRL's RLOO and GRPO on LoRA: time, rollouts, KL, memory.")
    p.add_argument(
        "setting",
        nargs="?",
        default="larger",
        choices=("larger", "dog", "brief"),
        help="What is learnt: the README's own domain by the tiny model (larger, the default), a dog in a story by a "
        "model of stories (dog, which needs --model), or answers of at most 12 words by SmolLM2-135M (brief).",
    )
    p.add_argument("--trl", metavar="PYTHON", help="Python of an environment with TRL; without it, t2ray's side alone.")
    p.add_argument("--model", metavar="FOLDER", help="Another model than the setting's.")
    p.add_argument("--data", metavar="FILE", help="Rows in the place of the hub's (brief).")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="Runs of each learning rate (default: 3).")
    return p


_KINDS = {
    "core": _core, "serve": _serve, "soak": _soak, "scaling": _scaling, "gpu": _gpu, "experts": _experts,
    "fifth": _fifth, "learn": _learn,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
