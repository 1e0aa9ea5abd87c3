"""The parts of the endpoint by themselves: following, the catalog, dispatching, calls. No Ray runs."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from t2ray.adapt.strategies import Dispatch
from t2ray.adapters.factors import Target
from t2ray.api.backend import Catalog, ExpertInfo
from t2ray.cluster.serve import looking
from t2ray.cluster.serve.catalog import Watch
from t2ray.cluster.serve.deploy import wait_for_registry
from t2ray.cluster.serve.dispatcher import Dispatcher
from t2ray.cluster.serve.experts import Experts
from t2ray.cluster.serve.handles import asked, told
from t2ray.cluster.serve.looking import Looking
from t2ray.config.serve import ServeConfig
from t2ray.core import (
    ConfigError,
    ExpertError,
    GenerationError,
    Mixture,
    ResourceError,
    T2RayError,
    UnknownExpert,
    user,
)
from t2ray.experts.registry import Registry

BASE = "ab" * 16
LAYOUT = (Target(name="model.layers.0.mlp.up_proj", layer=0, m=3, n=8, rank=3),)


class FakeHandle:
    """A handle to a deployment: `FakeHandle(method=function)`."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, method in methods.items():
            setattr(self, name, SimpleNamespace(remote=lambda *args, method=method: _Reply(method, args)))


class _Reply:
    def __init__(self, method: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.call, self.cancelled = lambda: method(*args), False

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return pickle.loads(pickle.dumps(self.call()))  # noqa: S301 (our own)

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    base_digest, layout, context = BASE, LAYOUT, 512
    chat = SimpleNamespace(tools="hermes", thinks=False)

    def __init__(self) -> None:
        self.experts: dict[str, Tensor] = {}
        self.fails = False

    def set_experts(self, changed: Mapping[str, Tensor], gone: set[str]) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        self.experts = {name: z for name, z in self.experts.items() if name not in gone} | dict(changed)


def save(registry: Registry, name: str, **config: Any) -> None:
    registry.save(name, {LAYOUT[0].name: torch.full((3,), 1.5)}, base_digest=BASE, config=config)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "experts")
    for name in ("math", "code"):
        save(registry, name)
    save(registry, "dispatch", labels=["math", "code", "others"])
    return registry


def opened(registry: Registry) -> Experts:
    config = ServeConfig(experts=registry.store.uri, poll_s=0.01)
    experts = Experts(config, FakeEngine(), lambda z: z[LAYOUT[0].name])  # type: ignore[arg-type]
    asyncio.run(experts.open())
    return experts


def catalog(experts: Experts) -> Catalog:
    made = experts.catalog()[1]
    assert made is not None and made.tools == "hermes"
    return made


# ------------------------------------------------------------------------------------------------------------- looking


def test_looking_goes_on_whatever_a_look_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [OSError("gone"), RuntimeError("ours"), KeyError("theirs"), GenerationError("no replica")]
    looks: list[Exception] = []

    async def look() -> None:
        if len(looks) < len(errors):
            looks.append(errors[len(looks)])
            raise looks[-1]
        done.set()

    async def main() -> None:
        follow = Looking("the registry", 0.001)
        follow.start(look)
        await done.wait()
        follow.check()

    done = asyncio.Event()
    asyncio.run(main())
    assert looks == errors


def test_a_health_check_sees_a_look_that_hangs_and_not_a_slow_or_failing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(looking, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def main() -> None:
        began, go = asyncio.Event(), asyncio.Event()

        async def look() -> None:
            began.set()
            await go.wait()
            raise OSError("gone")

        follow = Looking("the registry", 0.001)
        follow.start(look)
        await began.wait()
        clock[0] = 50.0
        follow.check()
        clock[0] = 61.0
        with pytest.raises(GenerationError, match="the registry: no look for 61 s"):
            follow.check()
        began.clear()
        go.set()
        await began.wait()
        follow.check()

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("mounted", "says"), [(False, "cannot look into"), (True, "gone at once; mount its disk again")]
)
def test_while_the_registry_is_gone_all_experts_are_served_and_nothing_is_written(
    registry: Registry, tmp_path: Path, mounted: bool, says: str
) -> None:
    experts = opened(registry)
    before = catalog(experts)
    assert set(before.experts) == {"math", "code", "dispatch"} and not before.problems and before.default == "cls"
    (tmp_path / "experts").rename(tmp_path / "away")
    if mounted:
        (tmp_path / "experts").mkdir()
    now = catalog(experts)
    assert now.experts == before.experts and says in now.problems["."]
    asyncio.run(experts.know(Mixture.of({"math": 1.0})))
    with pytest.raises(ResourceError, match=says):
        experts.change(lambda registry: save(registry, "new"))
    assert (tmp_path / "experts").exists() == mounted and not list(tmp_path.glob("experts/*"))
    (tmp_path / "away").rename(tmp_path / "experts")
    assert catalog(experts) == before


def test_who_starts_without_a_registry_waits_for_it(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "experts").rename(tmp_path / "away")
    said: list[str] = []

    def back(text: str) -> None:
        said.append(text)
        (tmp_path / "away").rename(tmp_path / "experts")

    wait_for_registry(registry.store.uri, back)
    assert len(said) == 1 and "waiting for the registry of experts: cannot look into" in said[0]
    (tmp_path / "experts").rename(tmp_path / "away")
    (tmp_path / "experts").write_text("a file")  # which is no folder either
    config = ServeConfig(experts=str(tmp_path / "experts"), poll_s=0.01)

    async def main() -> None:
        waiting = Experts(config, FakeEngine(), lambda z: z[LAYOUT[0].name])  # type: ignore[arg-type]
        task = asyncio.create_task(waiting.open())
        await asyncio.sleep(0.1)
        assert not task.done()
        (tmp_path / "experts").unlink()
        (tmp_path / "away").rename(tmp_path / "experts")
        await task
        assert set(catalog(waiting).experts) == {"math", "code", "dispatch"}

    asyncio.run(main())


def test_what_the_engine_did_not_take_it_is_given_again(registry: Registry) -> None:
    engine = FakeEngine()
    config = ServeConfig(experts=registry.store.uri)
    experts = Experts(config, engine, lambda z: z[LAYOUT[0].name])  # type: ignore[arg-type]
    asyncio.run(experts.open())
    save(registry, "new")
    engine.fails = True
    with pytest.raises(RuntimeError):
        experts.catalog()
    engine.fails = False
    assert "new" in catalog(experts).experts and "new" in engine.experts


def test_a_damaged_expert_is_told_with_what_is_known_of_it(registry: Registry, tmp_path: Path) -> None:
    for name in ("math", "dispatch"):
        (tmp_path / "experts" / name / "v0001" / "expert.safetensors").write_bytes(b"\xff" * 99)
    (tmp_path / "experts" / "Math").mkdir()
    registry.store.write_text("Math/v0001/manifest.json", "{}")
    experts = opened(registry)
    made = catalog(experts)
    assert made.experts["math"].version == 1 and "damaged" in (made.experts["math"].problem or "")
    assert made.experts["dispatch"].classifies and made.strategies == ("prompt",) and made.default == "prompt"
    assert list(made.problems) == ["Math", "dispatch", "math"]
    with pytest.raises(ResourceError, match="expert 'math' cannot be used: .*damaged"):
        asyncio.run(experts.know(Mixture.of({"math": 1.0})))


# ---------------------------------------------------------------------------------------------------------- dispatching


def info(name: str, **other: Any) -> ExpertInfo:
    return replace(ExpertInfo(name=name, version=1), **other)


def decided(experts: list[ExpertInfo], label: str, strategy: str = "cls", **config: Any) -> Dispatch | T2RayError:
    """What a dispatcher decides about a prompt of which `label` is the likeliest."""
    seen = Catalog(
        base="tiny", default="cls", strategies=("prompt", "cls"), experts={e.name: e for e in experts},
        mixtures={}, verifiers=(), context=512,
    )  # fmt: skip
    generator = FakeHandle(
        catalog=lambda digest: ("1", seen),
        score=lambda prompt, labels, mixture: tuple(float(one == label) for one in labels),
    )

    async def main() -> Dispatch | T2RayError:
        dispatcher = Dispatcher.__new__(Dispatcher)
        await dispatcher.__init__(ServeConfig(**config).model_dump(), generator)  # type: ignore[misc]
        first = await dispatcher.decide(strategy, user("17+25"))
        again = await dispatcher.decide(strategy, user("17+25"))
        assert isinstance(first, T2RayError) or isinstance(again, Dispatch) and again.mixture == first.mixture
        dispatcher.check_health()
        return first

    return asyncio.run(main())


CLASSIFIER = info("dispatch", classifies=True, labels=("math", "code", "others"))
DAMAGED = [info("math", problem="it is damaged"), info("math", version=0, problem="it cannot be read")]


@pytest.mark.parametrize("strategy", ["cls", "prompt"])
@pytest.mark.parametrize("math", [*DAMAGED, None])
def test_a_damaged_expert_takes_the_default_model_from_nobody_else(math: ExpertInfo | None, strategy: str) -> None:
    experts = [*([math] if math else []), info("code"), CLASSIFIER]
    result = decided(experts, "code", strategy)
    assert isinstance(result, Dispatch) and result.mixture.names == ("code",)
    labels = {"math", "code", "others"} if math or strategy == "cls" else {"code", "others"}
    assert set(result.probabilities) == labels


@pytest.mark.parametrize("math", [*DAMAGED, None])
def test_what_is_dispatched_to_a_damaged_expert_names_it_or_is_the_base_s(math: ExpertInfo | None) -> None:
    experts = [*([math] if math else []), info("code"), CLASSIFIER]
    result = decided(experts, "math")
    assert isinstance(result, Dispatch) and result.mixture.names == ("math",)  # which the API refuses by its name
    based = decided(experts, "math", on_damaged="base")
    assert isinstance(based, Dispatch) and based.mixture == Mixture.base() and based.label == "math"


def test_a_damaged_classification_expert_is_no_label() -> None:
    result = decided([info("math"), replace(CLASSIFIER, problem="it is damaged")], "math", "prompt")
    assert isinstance(result, Dispatch) and set(result.probabilities) == {"math", "others"}


def test_an_expert_more_and_a_classifier_that_names_it_are_taken_while_all_goes_on(registry: Registry) -> None:
    """`prompt` asks about the expert at once, `cls` when its new classification expert is there."""
    experts, labels_asked = opened(registry), list[tuple[str, ...]]()
    before = dict(experts.snapshot.tensors)

    def score(prompt: Any, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        labels_asked.append(labels)
        return tuple({"middle": 2.0, "code": 1.0}.get(label, 0.0) for label in labels)

    async def main() -> None:
        dispatcher = Dispatcher.__new__(Dispatcher)
        generator = FakeHandle(catalog=lambda seen: experts.catalog(), score=score)
        await dispatcher.__init__({"poll_s": 60}, generator)  # type: ignore[misc]

        async def label(strategy: str) -> tuple[str | None, bool]:
            await dispatcher.watch.refresh()
            decided = await dispatcher.decide(strategy, user("middle? A 97 B 30 C 10"))
            assert isinstance(decided, Dispatch) and decided.mixture.names == (decided.label,)
            return decided.label, decided.cached

        assert [await label("prompt"), await label("cls")] == [("code", False), ("code", False)]
        save(registry, "middle")
        assert [await label("prompt"), await label("cls")] == [("middle", False), ("code", True)]
        save(registry, "dispatch", labels=["math", "code", "middle", "others"])
        assert await label("cls") == ("middle", False)

    asyncio.run(main())
    assert labels_asked[-1] == ("math", "code", "middle", "others")
    assert all(experts.snapshot.tensors[name] is before[name] for name in ("math", "code"))


# ---------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("error", [UnknownExpert("no"), ConfigError("no"), ExpertError("no"), ResourceError("no")])
def test_a_user_s_mistake_is_returned_by_a_deployment_and_raised_where_it_was_called(error: T2RayError) -> None:
    """Serve would log it with a traceback if the deployment raised it."""

    @told
    async def method() -> int:
        raise error

    answer = asyncio.run(method())
    assert answer is error
    with pytest.raises(type(error), match="no"):
        asyncio.run(asked(FakeHandle(method=lambda: answer).method))


def test_a_watch_waits_for_its_first_catalog_and_keeps_it_while_nobody_answers() -> None:
    answers: list[Any] = [RayActorError()] * 4 + [ResourceError("starting"), ("1", "the catalog")]
    asked_for = 0

    def answer(seen: str) -> Any:
        nonlocal asked_for
        asked_for += 1
        found = answers.pop(0) if answers else RuntimeError("a fault")
        if isinstance(found, Exception):
            raise found
        return found

    async def main() -> None:
        watch = Watch(FakeHandle(catalog=answer), 0.001)
        await watch.start()
        before = asked_for
        while asked_for < before + 3:
            await asyncio.sleep(0.01)
        watch.looking.check()
        assert watch.catalog == "the catalog"

    asyncio.run(main())
