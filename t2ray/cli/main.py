"""The command line has a table of commands, and ends each of them in the same way.

A mistake of the user ends a command with one line and exit code 2, an interrupt with 130, SIGTERM with 143. A command
imports what it needs only after it has checked what it was given: help and errors come without torch, ray, transformers
and fastapi.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from t2ray.core import T2RayError, __version__

if TYPE_CHECKING:
    from t2ray.cli.options import Parser

COMMANDS = {
    "decompose": "Factor a model's projections into W = U diag(s) V^T.",
    "train": "Train one expert per domain by RL, in parallel on Ray.",
    "demo": "Run the main job on the tiny model: decompose, train, adapt, evaluate and report.",
    "experts": "List, show, delete, import, export, push or pull experts.",
    "export": "Write a mixture as a plain model or as a LoRA, for other programs.",
    "adapt": "Search the mixture of experts for a task from a few labelled prompts, by CEM.",
    "chat": "Chat in the terminal, and see which experts answered and how long both passes took.",
    "eval": "Measure the accuracy of strategies on tasks, with Wilson intervals.",
    "dispatch": "Measure how well pass 1 names the kinds of requests: accuracy, calibration, thresholds, other labels.",
    "tables": "Train and measure a grid of models, methods and seeds, and write its tables.",
    "verify": "Run a task's verifier over its right answers.",
    "serve": "Serve the OpenAI-compatible endpoint and its page, on Ray Serve.",
    "keys": "Make an API key for the endpoint and show its secret once.",
    "load": "Ask a running endpoint at random times, however fast it answers.",
    "sweep": "Try settings of training or of the few-shot search, on Ray Tune.",
    "status": "Show how a run or a sweep stands, also while it runs elsewhere.",
    "plan": "Show how a model's memory divides over GPUs, from its config.json alone.",
    "config": "List the keys of a configuration, or show a file as t2ray reads it.",
}
"""Each command has a module of its name, which adds its options and runs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, and returns its exit code."""
    terminated: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        """Ends what runs as Ctrl-C does, also where Ctrl-C is ignored, as in a shell's background."""
        terminated.append(number)
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        args = build_parser().parse_args(argv)
        return int(args.command(args) or 0)
    except T2RayError as error:
        print(f"t2ray: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"t2ray: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(143 if terminated else 130)  # threads that still wait for a cluster must not hold the exit back
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def build_parser() -> Parser:
    """Returns the parser of all commands, which adds the options of a command when it is asked for."""
    from t2ray.cli.options import Parser  # here, where an interrupt is one line

    parser = Parser(
        prog="t2ray", description="Self-adaptive language models: SVF experts, trained by RL, mixed for every request."
    )
    parser.add_argument(
        "--version", action="version", version=f"t2ray {__version__}", help="Show the version and exit."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, module=f"t2ray.cli.{name}")
    return parser
