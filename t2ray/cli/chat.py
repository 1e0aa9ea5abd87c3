"""`t2ray chat` holds a conversation in the terminal, and shows which experts answer and how long both passes take.

It reads lines from standard input, from a person or a pipe, until that ends. Not here: strategies and the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from t2ray.adapt.strategies import FEWSHOT, Dispatch, Strategy
from t2ray.cli.options import Parser, add_model, locate
from t2ray.cli.output import bar, console
from t2ray.core import Completion, ConfigError, Message, SamplingParams, T2RayError

if TYPE_CHECKING:
    from t2ray.workbench import Workbench

_HELP = """\
/strategy NAME  prompt, cls, base, fewshot/NAME, an expert, or a mixture such as math:0.7,code:0.3
/new            forget the conversation so far
/help           this
/quit           leave (so does the end of the input)"""


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--strategy",
        metavar="NAME",
        help="What answers: base, prompt, cls, soft, fewshot/NAME, an expert, or a mixture such as math:0.7,code:0.3. "
        "Default: cls where there is a classification expert, else prompt, or base without experts.",
    )
    p.add_argument("--max-tokens", type=int, default=128, metavar="N", help="The greatest number of tokens per answer.")
    p.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="The sampling temperature; 0 takes the likeliest token.",
    )
    p.add_argument(
        "--generate-label",
        action="store_true",
        help="Let pass 1 write the label, as in the paper, instead of scoring all labels.",
    )
    add_model(p)


def run(args: argparse.Namespace) -> None:
    """Answers line after line. Every line and every answer is part of the conversation that follows."""
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)

    from t2ray.workbench import open_workbench

    bench = open_workbench(locate(args), bar)
    strategy = args.strategy or bench.usual
    talk = Talk(bench, strategy, sampling, generate_label=args.generate_label)
    console.print(f"{bench.place.model}, strategy {strategy}; {_choices(bench)}. /help for commands", markup=False)
    for line in _lines():
        if line.startswith("/"):
            if not talk.command(line):
                return
        elif line:
            talk.say(line)


class Talk:
    """A conversation under a strategy, both of which commands can change."""

    def __init__(self, bench: Workbench, strategy: str, sampling: SamplingParams, *, generate_label: bool) -> None:
        self.bench, self.sampling, self.generate_label = bench, sampling, generate_label
        self.history: tuple[Message, ...] = ()
        self.strategy = self._strategy(strategy)

    def _strategy(self, name: str) -> Strategy:
        return self.bench.strategy(name, generate_label=self.generate_label)

    def command(self, line: str) -> bool:
        """Obeys a command such as `/strategy NAME`. Returns False for `/quit`. A mistake changes nothing."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/strategy" and rest:
            try:
                self.strategy = self._strategy(rest)
            except T2RayError as error:
                _complain(error)
            else:
                console.print(f"strategy {rest}", markup=False)
        elif word == "/new":
            self.history = ()
            console.print("a new conversation")
        elif word != "/quit":
            console.print(_HELP if word == "/help" else f"no command {line!r}\n{_HELP}", markup=False)
        return word != "/quit"

    def say(self, line: str) -> None:
        """Runs both passes for one line, and prints the answer and who gave it."""
        messages = self._fitting((*self.history, Message(role="user", content=line)))
        try:
            dispatch, completion, seconds = asyncio.run(self._answer(messages))
        except ConfigError as error:  # a line that is too long by itself
            _complain(error)
            return
        self.history = (*messages, Message(role="assistant", content=completion.text))
        console.print(completion.text, markup=False)
        console.print(_who(dispatch, completion, seconds), style="dim", markup=False)

    async def _answer(self, messages: tuple[Message, ...]) -> tuple[Dispatch, Completion, float]:
        dispatch = await self.strategy(messages)
        start = time.perf_counter()
        completion = await self.bench.engine.generate(messages, dispatch.mixture, self.sampling)
        return dispatch, completion, time.perf_counter() - start

    def _fitting(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Returns the conversation without its oldest turns, if the model's context cannot hold all of them."""
        kept = messages
        while len(kept) > 2 and not self.bench.engine.fits(kept, self.sampling.max_tokens):
            kept = kept[2:]
        if len(kept) < len(messages):
            console.print(f"(the context is full: the oldest {len(messages) - len(kept)} messages are left out)")
        return kept


def _lines() -> Iterator[str]:
    """Yields the lines of standard input, and asks a person for each."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        yield line.encode(errors="replace").decode().strip()  # a pipe may hold bytes that are no text


def _choices(bench: Workbench) -> str:
    if not bench.experts:
        return "no experts"
    names = [*bench.experts, *(FEWSHOT + name for name in bench.place.registry().mixtures())]
    return f"experts {', '.join(names)}"


def _who(dispatch: Dispatch, completion: Completion, seconds: float) -> str:
    """Returns `[math:1 | cls: math 0.98, others 0.02 | pass 1 4 ms, pass 2 35 ms, 9 tokens]`."""
    parts = [str(dispatch.mixture), dispatch.strategy]
    if dispatch.probabilities:
        ranked = sorted(dispatch.probabilities.items(), key=lambda pair: -pair[1])
        parts[1] += ": " + ", ".join(f"{label} {p:.2f}" for label, p in ranked)
    elif dispatch.label is not None:
        parts[1] += f": {dispatch.label}"
    tokens = len(completion.token_ids)
    passes = f"pass 1 {1e3 * dispatch.seconds:.0f} ms, pass 2 {1e3 * seconds:.0f} ms, {tokens} tokens"
    cut = ", cut off at --max-tokens" if completion.finish_reason == "length" else ""
    return f"[{' | '.join([*parts, passes + cut])}]"


def _complain(error: T2RayError) -> None:
    sys.stdout.flush()
    print(f"t2ray: {' '.join(str(error).split())}", file=sys.stderr)
