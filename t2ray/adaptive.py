"""A model with its experts as a plain object, for scripts and notebooks: what `t2ray.open` returns.

The engine works in a thread of its own with an event loop of its own, so that the plain methods work wherever a loop
runs already, as in a notebook, and so that Ctrl-C ends them. Every plain method has a twin to await.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Any, Self, TypeVar

from t2ray.adapt.fewshot import FewShotResult, fewshot
from t2ray.adapt.strategies import Dispatch
from t2ray.config.files import nearest, validate
from t2ray.config.search import CEMConfig
from t2ray.core import (
    Completion,
    ConfigError,
    Example,
    Message,
    Mixture,
    SamplingParams,
    UnknownExpert,
    check_name,
    user,
)
from t2ray.grades import Grade
from t2ray.tasks.equal import reward as equal
from t2ray.tasks.grading import Grader, weighed
from t2ray.tasks.task import Reward
from t2ray.workbench import Workbench

T = TypeVar("T")
ROLES = ("system", "user", "assistant")
Question = str | Message | Sequence[Message | Mapping[str, str]]
"""One user turn as a text, or a conversation: messages, or `{"role": ..., "content": ...}` as OpenAI's clients have."""
Choice = str | Mixture | Mapping[str, float] | None
"""Which experts answer: a strategy or a mixture by name, a mixture, `{"math": 0.7}`, or None: the model decides."""


class AdaptiveModel:
    """A loaded model that answers every prompt with the mixture of experts that fits it.

    >>> with t2ray.open() as model:
    ...     model.answer("17+25").text
    '42'

    `experts` are the names that answer, `strategy` is what decides where no mixture is named: `cls` where there is a
    classification expert, else `prompt`, or `base` where there are no experts.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.experts = bench.experts
        self.strategy = bench.usual
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="t2ray", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------------ answering

    def answer(self, prompt: Question, mixture: Choice = None, **sampling: Any) -> Completion:
        """The answer to one prompt.

        Args:
            mixture: `"math"`, `"math:0.7,code:0.3"`, `"base"`, `"cls"`, `"prompt"`, `"fewshot/NAME"`, a `Mixture`, a
                mapping of weights, or None: the model finds out what the prompt needs.
            sampling: the fields of `SamplingParams`: `max_tokens=64, temperature=0.0, top_p=1.0, seed=None, stop=()`.

        Raises:
            UnknownExpert: there is no such expert or saved mixture.
            ConfigError: an unknown setting, or a prompt that does not fit the model's context.
        """
        return self._wait(self._answers([(prompt, mixture)], sampling))[0]

    async def answer_async(self, prompt: Question, mixture: Choice = None, **sampling: Any) -> Completion:
        """As `answer`; calls that are awaited together share batches."""
        return (await self._awaited(self._answers([(prompt, mixture)], sampling)))[0]

    def answers(self, prompts: Sequence[Question | tuple[Question, Choice]], **sampling: Any) -> list[Completion]:
        """The answers to several prompts, each with its own mixture, in one batch; each is what `answer` would give.

        A prompt is given by itself or as `(prompt, mixture)`. Raises as `answer` does.
        """
        return self._wait(self._answers(prompts, sampling))

    async def answers_async(
        self, prompts: Sequence[Question | tuple[Question, Choice]], **sampling: Any
    ) -> list[Completion]:
        """As `answers`."""
        return await self._awaited(self._answers(prompts, sampling))

    def dispatch(self, prompt: Question, strategy: str | None = None) -> Dispatch:
        """What pass 1 decides about a prompt: the mixture, the label and each label's probability."""
        return self._wait(self._decided(prompt, strategy))

    async def dispatch_async(self, prompt: Question, strategy: str | None = None) -> Dispatch:
        """As `dispatch`."""
        return await self._awaited(self._decided(prompt, strategy))

    def adapt(
        self,
        examples: Sequence[tuple[Question, str]],
        *,
        name: str | None = None,
        experts: Sequence[str] | None = None,
        reward: Reward = equal,
        max_tokens: int = 64,
        per_layer: bool = False,
        **settings: Any,
    ) -> FewShotResult:
        """Searches the mixture that answers a few labelled prompts best (paper section 3.2, c).

        `model.answer(prompt, found.mixture)` uses what was found.

        Args:
            examples: (prompt, right answer) pairs; the paper takes 10.
            name: saves the mixture under this name in the registry, as `fewshot/NAME`.
            experts: those to mix; by default all but the classification expert.
            reward: `reward(completion, row)` in [-1, 1], with the right answer in `row["answer"]`; by default the
                completion must equal it. It runs in this process: do not let it run model-written code.
            max_tokens: of an answer.
            per_layer: whether each decoder layer gets its own weight of each expert.
            settings: of the search: `population=32, iterations=50, elite=0.2, seed=0, budget_s=60, ...` (`t2ray config
                adapt` lists them).

        Raises:
            ConfigError: no examples, no experts, or a wrong setting.
            RewardError: no mixture answers any prompt right, so that there is none to save.
            UnknownExpert: there is no such expert.
        """
        return self._wait(self._search(examples, name, experts, reward, max_tokens, per_layer, settings))

    async def adapt_async(self, examples: Sequence[tuple[Question, str]], **options: Any) -> FewShotResult:
        """As `adapt`, with the same options."""
        return await asyncio.to_thread(self.adapt, examples, **options)

    # ---------------------------------------------------------------------------------------------------------- parts

    async def _search(
        self,
        examples: Sequence[tuple[Question, str]],
        name: str | None,
        experts: Sequence[str] | None,
        reward: Reward,
        max_tokens: int,
        per_layer: bool,
        settings: Mapping[str, Any],
    ) -> FewShotResult:
        engine, search = self.bench.engine, validate(CEMConfig, settings, where="settings of the search")
        if name is not None:
            check_name(name, "mixture")
        for expert in experts or ():
            if expert not in engine.experts:
                raise UnknownExpert(f"no expert {expert!r}{nearest(expert, engine.experts)}")
        shots = [
            Example(id=f"shot/{i}", messages=conversation(prompt), row={"answer": answer})
            for i, (prompt, answer) in enumerate(examples)
        ]

        grader = Grader({"reward": reward})

        async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
            items = [(text, dict(row)) for text, row in zip(completions, rows, strict=True)]
            return [weighed({"reward": 1.0}, marks, 0.0) for marks in await grader.marks(items)]

        found = await fewshot(
            engine.generate, engine.score, verify, shots, experts or self.experts,
            settings=search, sampling=SamplingParams(max_tokens=max_tokens), gold=lambda row: str(row["answer"]),
            n_layers=max(target.depth for target in engine.layout) + 1 if per_layer else None,
        )  # fmt: skip
        if name is not None:
            found.check()
            meta = {"shots": len(shots), "accuracy": found.accuracy, "settings": search.model_dump()}
            self.bench.place.registry().save_mixture(name, found.mixture, meta)
        return found

    async def _answers(self, prompts: Sequence[Any], sampling: Mapping[str, Any]) -> list[Completion]:
        params = _sampling(sampling)
        pairs = [pair if _is_pair(pair) else (pair, None) for pair in prompts]
        asked = [conversation(prompt) for prompt, _ in pairs]
        dispatches = await asyncio.gather(
            *(self._dispatched(messages, choice) for messages, (_, choice) in zip(asked, pairs, strict=True))
        )
        generate = self.bench.engine.generate
        return list(
            await asyncio.gather(*(generate(m, d.mixture, params) for m, d in zip(asked, dispatches, strict=True)))
        )

    async def _decided(self, prompt: Question, strategy: str | None) -> Dispatch:
        return await self._dispatched(conversation(prompt), strategy)

    async def _dispatched(self, messages: tuple[Message, ...], choice: Choice) -> Dispatch:
        if isinstance(choice, Mixture):
            choice = str(choice) if not choice.weights else choice
        if choice is None or isinstance(choice, str):
            return await self.bench.strategy(choice or self.strategy)(messages)
        mixture = choice if isinstance(choice, Mixture) else Mixture.of(choice)
        self.bench.engine.vector(mixture)
        return Dispatch(mixture=mixture, strategy="fixed")

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submitted(work).result()

    async def _awaited(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self._submitted(work))

    def _submitted(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            work.close()
            raise ConfigError("this model was closed; open it again by t2ray.open")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # ---------------------------------------------------------------------------------------------------------- its end

    def close(self) -> None:
        """Ends the engine's thread; the model cannot be asked any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def conversation(question: Question) -> tuple[Message, ...]:
    """The messages of a question; a text is one user turn.

    Raises:
        ConfigError: something that is no text and no list of messages.
    """
    if isinstance(question, str):
        return user(question)
    if isinstance(question, Message):
        return (question,)
    messages = []
    for turn in question:
        if isinstance(turn, Message):
            messages.append(turn)
        elif isinstance(turn, Mapping) and turn.get("role") in ROLES and isinstance(turn.get("content"), str):
            messages.append(Message(role=turn["role"], content=turn["content"]))  # type: ignore[arg-type]
        else:
            raise ConfigError(f'{turn!r} is no message; write {{"role": "user", "content": "..."}}, or a text alone')
    return tuple(messages)


def _is_pair(prompt: Any) -> bool:
    """Whether this is (prompt, mixture) rather than a conversation of two messages."""
    return isinstance(prompt, tuple) and len(prompt) == 2 and not isinstance(prompt[1], Message)


def _sampling(settings: Mapping[str, Any]) -> SamplingParams:
    known = [field.name for field in fields(SamplingParams)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} of an answer{nearest(name, known)}")
    return SamplingParams(**settings)
