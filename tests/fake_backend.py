"""A `Backend` without a model, for tests of the API and the page; `python tests/fake_backend.py --port 8000` serves it.

An answer is a function of the prompt, the mixture and the seed. Nothing here takes time unless a test or `--pace` says
so: `pause_after` holds every stream after so many tokens until `go` is set.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

import uvicorn
from safetensors import SafetensorError
from safetensors.numpy import load

from t2ray.adapt.strategies import Dispatch
from t2ray.api.app import create_api
from t2ray.api.backend import Adaptation, AdaptationRequest, Catalog, EndpointLoad, ExpertInfo
from t2ray.config.serve import ApiConfig
from t2ray.core import (
    Completion,
    ContextExceeded,
    Delta,
    ExpertError,
    Message,
    Mixture,
    Prompt,
    SamplingParams,
    Token,
    UnknownExpert,
    joined,
)
from t2ray.experts.heatmap import HeatMap

MADE = "2026-11-21T10:00:00+00:00"
CONTEXT = 4096
WORDS = {"math": "0123456789+", "code": "(){}=", "pick": "?"}
VOCABULARY = ("seven", "rivers", "carry", "small", "bright", "numbers", "home")


def expert(name: str, **other: object) -> ExpertInfo:
    return replace(ExpertInfo(name=name, version=1, domain=name, accuracy=0.9, created=MADE), **other)


class FakeBackend:
    """Satisfies `Backend`.

    `running` holds the numbers of generations that run, `aborted` those that were cut off, `calls` every
    generation in order, `observed` every metric. `says` are the pieces of every answer, if there are any. Of its chat
    template, `tools` says how calls are written, `thinks` that it knows reasoning, `opens` that it opens that itself.
    `failures` maps a method's name to what it raises; `break_after` makes every generation raise `failures["stream"]`
    after so many tokens.
    """

    def __init__(self, *, pace: float = 0.0) -> None:
        self.experts = {
            "math": expert("math", version=3, accuracy=0.96),
            "code": expert("code", version=2, accuracy=1.0),
            "pick": expert("pick", accuracy=None),
            "dispatch": expert(
                "dispatch", domain="dispatch", classifies=True, labels=("math", "code", "pick", "others")
            ),
        }
        self.base = "fake"
        self.mixtures = {"sums": Mixture.of({"math": 0.7, "code": 0.2})}
        self.default: Literal["cls", "prompt", "base"] = "cls"
        self.strategies: tuple[str, ...] = ("prompt", "cls")
        self.problems: dict[str, str] = {}
        self.adaptations: dict[str, Adaptation] = {}
        self.tools: str | None = None
        self.thinks = self.opens = False
        self.says: tuple[str, ...] = ()
        self.pace = pace
        self.go = asyncio.Event()
        self.pause_after: int | None = None
        self.break_after: int | None = None
        self.failures: dict[str, Exception] = {}
        self.running: set[int] = set()
        self.aborted: list[int] = []
        self.paused = asyncio.Event()  # set when a generation waits for `go`
        self.idle = asyncio.Event()  # set when no generation runs
        self.calls: list[tuple[Prompt, Mixture, SamplingParams]] = []
        self.adapted: list[AdaptationRequest] = []
        self.observed: list[tuple[str, float, dict[str, str]]] = []
        self._finished = 0

    def _fail(self, method: str) -> None:
        if method in self.failures:
            raise self.failures[method]

    def catalog(self) -> Catalog:
        return Catalog(
            base=self.base,
            default=self.default,
            strategies=self.strategies,
            experts=dict(self.experts),
            mixtures=dict(self.mixtures),
            verifiers=("math", "exact"),
            context=CONTEXT,
            tools=self.tools,
            thinks=self.thinks,
            problems=dict(self.problems),
        )

    async def dispatch(self, strategy: str, messages: tuple[Message, ...]) -> Dispatch:
        self._fail("dispatch")
        text = messages[-1].text
        hits = {name: 1.0 + sum(text.count(c) for c in signs) for name, signs in WORDS.items() if name in self.experts}
        hits["others"] = 1.5
        label = max(hits, key=hits.__getitem__)
        return Dispatch(
            mixture=Mixture.base() if label == "others" else Mixture.of({label: 1.0}),
            strategy=strategy,
            label=label,
            probabilities={name: hit / sum(hits.values()) for name, hit in hits.items()},
            seconds=0.004,
            cached=len(messages) > 1,
        )

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        self._fail("generate")
        answer = joined([delta async for delta in self.stream(prompt, mixture, sampling)])
        assert answer.finish_reason is not None
        return Completion(
            prompt_ids=tuple(range(answer.prompt_tokens)), tokens=answer.tokens, text=answer.text,
            finish_reason=answer.finish_reason, mixture=mixture, thinking=answer.thinking,
        )  # fmt: skip

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        number = len(self.calls)
        self.calls.append((prompt, mixture, sampling))
        text = prompt if isinstance(prompt, str) else "\n".join(getattr(m, "text", str(m)) for m in prompt)
        prompt_tokens = len(text.split())
        answer = 1 if sampling.to_end else sampling.max_tokens
        if prompt_tokens + answer > CONTEXT:
            raise ContextExceeded("too long", prompt_tokens, answer, CONTEXT)
        self.running.add(number)
        self.idle.clear()
        done = False
        try:
            if self.break_after is None:
                self._fail("stream")
            async for delta in self._pieces(self._words(text, mixture, sampling), sampling):
                yield replace(delta, prompt_tokens=prompt_tokens)
            done = True
        finally:
            self.running.discard(number)
            if done:
                self._finished += 1
            else:
                self.aborted.append(number)
            if not self.running:
                self.idle.set()

    def _words(self, text: str, mixture: Mixture, sampling: SamplingParams) -> list[str]:
        """`math:1 answers 17+25 with seven rivers ...`, whose tail a seed changes where there is a temperature."""
        if self.says:
            return list(self.says)
        salt = f"{text}|{mixture}|{sampling.seed if sampling.temperature else None}"
        dice = hashlib.sha256(salt.encode()).digest()
        tail = [VOCABULARY[byte % len(VOCABULARY)] for byte in dice[:8]]
        words = [f"{mixture}", "answers", *text.split()[-12:], "with", *tail]
        while sampling.ignore_eos and len(words) < sampling.max_tokens:
            words += tail
        return [word if i == 0 else f" {word}" for i, word in enumerate(words)]

    async def _pieces(self, words: list[str], sampling: SamplingParams) -> AsyncIterator[Delta]:
        said = ""
        for i, word in enumerate(words):
            if i == self.break_after:
                self._fail("stream")
            if i == self.pause_after:
                self.paused.set()
                await self.go.wait()
            await asyncio.sleep(self.pace)
            top = tuple(Token(id=k, text=f"{word}{k or ''}", logprob=-0.5 - k) for k in range(sampling.top_logprobs))
            token = Token(id=i, text=word, logprob=-0.5, top=top)
            ends = [end for stop in sampling.stop if (end := (said + word).find(stop)) >= 0]
            text = (said + word)[: min(ends)][len(said) :] if ends else word
            said += text
            last = bool(ends) or i == len(words) - 1
            finish: Literal["stop", "length"] | None = "stop" if last else None
            if not last and i + 1 == sampling.max_tokens:
                finish = "length"
            yield Delta(text=text, tokens=(token,), finish_reason=finish, thinking=self.opens and i == 0)
            if finish:
                return

    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """The words of a text, or a letter for each id."""
        self._fail("read")
        words = prompt.split(" ") if isinstance(prompt, str) else [chr(97 + id % 26) for id in prompt]
        words = [word if i == 0 or not isinstance(prompt, str) else f" {word}" for i, word in enumerate(words)]
        return tuple(
            Token(id=i, text=word, logprob=-0.25 * len(mixture.names) if i else float("nan"),
                  top=tuple(Token(id=k, text=f"{word}{k or ''}", logprob=-0.5 - k) for k in range(top if i else 0)))
            for i, word in enumerate(words)
        )  # fmt: skip

    async def heat(self, name: str) -> HeatMap:
        self._fail("heat")
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        dice = hashlib.sha256(name.encode()).digest()
        rows = tuple(tuple(dice[(7 * i + k) % 32] / 2550 for k in range(len(kinds))) for i in range(4))
        return HeatMap(layers=tuple(range(4)), kinds=kinds, values=rows)

    async def put_expert(self, name: str, data: bytes) -> int:
        try:
            z = load(data)
        except SafetensorError as error:
            raise ExpertError(f"this is no safetensors file: {error}") from None
        if not z:
            raise ExpertError("the file has no tensors")
        version = self.experts[name].version + 1 if name in self.experts else 1
        self.experts[name] = expert(name, version=version)
        return version

    async def delete_expert(self, name: str) -> None:
        if self.experts.pop(name, None) is None:
            raise UnknownExpert(f"no expert {name!r}")

    async def adapt(self, request: AdaptationRequest) -> Adaptation:
        self._fail("adapt")
        self.adapted.append(request)
        id = f"adapt-{len(self.adapted)}"
        self.adaptations[id] = Adaptation(id=id, name=request.name, status="queued", created=MADE)
        return self.adaptations[id]

    async def adaptation(self, id: str) -> Adaptation:
        """Every look brings the search a third further."""
        if id not in self.adaptations:
            raise UnknownExpert(f"no adaptation {id!r}")
        now = self.adaptations[id]
        if now.progress < 0.9:
            now = replace(now, status="running", progress=now.progress + 0.34, seconds=now.seconds + 1, accuracy=0.8)
        elif now.status == "running":
            now = replace(now, status="succeeded", progress=1.0, mixture=Mixture.of({"math": 0.5, "pick": 0.4}))
            self.mixtures[now.name] = now.mixture or Mixture.base()
        self.adaptations[id] = now
        return now

    async def load(self) -> EndpointLoad:
        return EndpointLoad(
            replicas=1, running=len(self.running), waiting=0, tokens_per_s=8.0 * len(self.running),
            requests=self._finished, kv_used=min(len(self.running) / 16, 1.0),
        )  # fmt: skip

    async def ready(self) -> None:
        self._fail("ready")

    async def metrics(self) -> str:
        counts = Counter(name for name, _, _ in self.observed)
        return "".join(f"t2ray_{name} {count}\n" for name, count in sorted(counts.items()))

    def observe(self, name: str, value: float, **tags: str) -> None:
        self.observed.append((name, value, tags))


@asynccontextmanager
async def served(backend: FakeBackend | None, config: ApiConfig | None = None) -> AsyncIterator[str]:
    """The API over `backend` on a real port of this machine, in this event loop; its address."""
    app = create_api(config or ApiConfig())
    app.state.backend = backend
    # asyncio switches Nagle's algorithm off only where the protocol is named: else every answer waits 40 ms for an ACK.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # already now, so that nobody needs to wait
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=2))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


def main() -> None:
    parser = argparse.ArgumentParser(description="The API and the page with a fake model behind them.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pace", type=float, default=0.03, help="seconds a token")
    parser.add_argument("--keys-file", help="as ApiConfig's; without one and without T2RAY_API_KEYS no key is needed")
    arguments = parser.parse_args()
    app = create_api(ApiConfig(keys_file=arguments.keys_file))
    app.state.backend = FakeBackend(pace=arguments.pace)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
