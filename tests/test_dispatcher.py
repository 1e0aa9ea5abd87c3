"""The Dispatcher's memory, with a Generator that is no model: what was read decides whether a decision is known."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from fake_backend import FakeBackend

from t2ray.core import Message

with warnings.catch_warnings():  # Ray's schemas use what pydantic has deprecated
    warnings.simplefilter("ignore")
    from t2ray.cluster.serve.dispatcher import Dispatcher


class Remote:
    """A handle's method: `remote` calls the function."""

    def __init__(self, function: Any) -> None:
        self.remote = function


class FakeGenerator:
    """Takes every text that has a digit for math; `asked` are the questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.catalog, self.score = Remote(self._catalog), Remote(self._score)

    async def _catalog(self, seen: str) -> Any:
        return "1", FakeBackend().catalog()

    async def _score(self, prompt: Any, labels: Any, mixture: Any) -> Any:
        self.asked.append(prompt[0].content.rpartition("\n")[2])
        kind = "math" if any(sign.isdigit() for sign in self.asked[-1]) else "others"
        return tuple(0.0 if label == kind else -5.0 for label in labels)


def said(*turns: tuple[Any, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


def test_a_decision_is_remembered_by_what_was_read_and_by_nothing_else() -> None:
    generator = FakeGenerator()

    async def main() -> None:
        dispatcher = Dispatcher.__new__(Dispatcher)
        await dispatcher.__init__({}, generator)  # type: ignore[misc]
        first = await dispatcher.decide("cls", said(("user", "what is 17+25?")))
        assert (first.label, first.cached) == ("math", False)
        again = said(("system", "be brief"), ("user", "what is 17+25?"), ("assistant", "42"))
        assert (await dispatcher.decide("cls", again)).cached
        follow = await dispatcher.decide("cls", said(*[(m.role, m.content) for m in again], ("user", "and twice?")))
        assert (follow.label, follow.cached) == ("math", False)
        other = said(("user", "write me a long song, please"), ("assistant", "la"), ("user", "and twice?"))
        assert (await dispatcher.decide("cls", other)).label == "others"

    asyncio.run(main())
    assert generator.asked == [
        "what is 17+25?", "and twice?", "what is 17+25?", "and twice?", "write me a long song, please"
    ]  # fmt: skip


def test_below_the_threshold_the_base_answers() -> None:
    """The fake is sure of math by 1 / (1 + 3 e^-5) or less, however many labels there are."""

    async def main() -> None:
        for threshold, label in ((0.9, "math"), (0.999, "others")):
            dispatcher = Dispatcher.__new__(Dispatcher)
            await dispatcher.__init__({"threshold": threshold}, FakeGenerator())  # type: ignore[misc]
            found = await dispatcher.decide("cls", said(("user", "what is 17+25, my good friend?")))
            assert (found.label, found.mixture.names) == (label, ("math",) if label == "math" else ())

    asyncio.run(main())
