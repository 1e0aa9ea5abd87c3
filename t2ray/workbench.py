"""A model with its factors, an engine and all experts of a registry: what `t2ray.open`, adapt, chat and eval work with.

Not here: what they do with it, and training, which loads models in its workers.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from t2ray.adapt.strategies import FEWSHOT, SOFT, Strategy, classify, classify_by_generation, dispatch_labels, fixed
from t2ray.adapters.factors import MANIFEST, Factors, decompose, factors_folder
from t2ray.adapters.model import Model, load_model
from t2ray.adapters.sparse import held
from t2ray.config.adapter import AdapterConfig
from t2ray.config.files import nearest
from t2ray.config.serve import EngineConfig
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, Mixture, SamplingParams, UnknownExpert
from t2ray.engine.choose import choose, vllm_engine
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.protocol import Engine
from t2ray.experts.manifest import ExpertManifest
from t2ray.experts.registry import SHIPPED_WITH, Expert, Registry
from t2ray.models.load import load_chat
from t2ray.models.weights import open_weights
from t2ray.runs.folder import read_run
from t2ray.store import Store
from t2ray.tasks.task import Task
from t2ray.training.domain import CONFIG

DEFAULT_RUN = "runs/demo"
_BATCH_TOKENS, _BATCH_TOKENS_ON_GPU = 16_384, 131_072  # beyond, a CPU gains no speed and takes gigabytes
_ADAPTIVE = ("base", "prompt", "cls", "soft", "fewshot/NAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where things are: `Place(model="tiny", factors=None, experts="runs/demo/experts", run=None)`."""

    model: str
    factors: str | None
    experts: str | None
    run: TrainConfig | None

    def registry(self) -> Registry:
        """The registry, with experts in it or not.

        Raises:
            ConfigError: none was named, and there is no default run.
        """
        if self.experts is None:
            raise ConfigError(
                f"no registry: there is no {DEFAULT_RUN} here; name one by --experts or --run, or run `t2ray demo`"
            )
        return Registry(self.experts)


def find_place(
    run: str | Path | None = None,
    model: str | None = None,
    factors: str | Path | None = None,
    experts: str | Path | None = None,
) -> Place:
    """What was named; where nothing was, the demo's run where there is one, else the tiny model by itself.

    Raises:
        ConfigError: both a run and a model were named.
        RunError: there is no run in that folder.
    """
    if run is not None and model is not None:
        raise ConfigError(f"the run {run} brings its own model; leave out the model {model} or the run")
    if run is None and model is None and experts is None and Store(DEFAULT_RUN).exists(CONFIG):
        run = DEFAULT_RUN
    config = read_run(str(run)) if run is not None else None
    return Place(
        model=model or (config.model if config else "tiny"),
        factors=str(factors) if factors else (config.factors if config else None),
        experts=str(experts) if experts else (config.experts if config else None),
        run=config,
    )


def place_or_shipped(
    run: str | Path | None, model: str | None, factors: str | Path | None, experts: str | Path | None
) -> Place:
    """As `find_place`; but a model that t2ray ships comes with its experts where no others are named."""
    place = find_place(run, model, factors, experts)
    if place.experts is None and place.model in SHIPPED_WITH:
        return replace(place, experts=str(SHIPPED_WITH[place.model]))
    return place


Bar = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]
"""Draws the progress of what a title names: yields `progress(done, total, name)`."""


@contextmanager
def quiet(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Draws nothing."""
    yield lambda done, total, name: None


def open_factors(place: Place, bar: Bar = quiet) -> Factors:
    """The model's decomposition, made where it is missing; `bar` shows how far it is.

    Raises:
        ModelError: a model that cannot be read, or factors of another one.
    """
    weights = open_weights(place.model)
    folder = Path(place.factors or factors_folder("runs", weights.digest, None, None))
    if (folder / MANIFEST).exists():
        return Factors.open(folder, weights.digest)
    targets, layers = (place.run.trained.targets, place.run.trained.layers) if place.run else (None, None)
    load_chat(weights.folder)  # a model that cannot be used is told before it is decomposed
    with bar("decompose") as progress:
        return decompose(place.model, folder, targets=targets, layers=layers, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """A loaded model with experts.

    `experts` are those that answer; `classifiers` those that name the kind of request (one, usually), each with the
    labels that it was trained on. `batch_tokens` is the number of tokens that the engine computes at once.
    """

    place: Place
    engine: Engine
    experts: tuple[str, ...]
    classifiers: Mapping[str, tuple[str, ...]]
    batch_tokens: int

    @property
    def usual(self) -> str:
        """The strategy where none is named: `cls`, `prompt` without a classification expert, `base` without experts."""
        if not self.experts:
            return "base"
        return "cls" if len(self.classifiers) == 1 else "prompt"

    def strategy(self, name: str, *, generate_label: bool = False) -> Strategy:
        """`base`, `prompt`, `cls`, `soft` or `soft/T` (by the classification expert, where there is one, with the
        temperature T), `fewshot/NAME` (a saved mixture), or a mixture such as `math:0.7,code:0.3`.

        Raises:
            UnknownExpert: no expert or saved mixture of that name.
            ConfigError: text that is no strategy, or one that needs experts where there are none.
        """
        if name.startswith(FEWSHOT):
            return fixed(self.mixture(name.removeprefix(FEWSHOT)), name=name)
        if soft := SOFT.fullmatch(name):
            temperature = float(soft[1] or 1.0)
            if not temperature or generate_label:
                raise ConfigError(f"strategy {name!r} needs a temperature above 0 and labels that are scored")
            labels, mixture = self.classifying("cls" if self.classifiers else "prompt")
            return classify(self.engine.score, labels, mixture, name=name, temperature=temperature)
        if name in ("prompt", "cls"):
            labels, mixture = self.classifying(name)
            if generate_label:
                return classify_by_generation(self.engine.generate, labels, mixture, name=name)
            return classify(self.engine.score, labels, mixture, name=name)
        mixture = Mixture.parse(name)
        for expert in mixture.names:
            if expert not in self.engine.experts:
                known = [*self.engine.experts, *_ADAPTIVE]
                raise UnknownExpert(f"no strategy or expert {expert!r}{nearest(expert, known)}")
        return fixed(mixture, name=name)

    def classifying(self, strategy: str) -> tuple[tuple[str, ...], Mixture]:
        """The labels that `prompt` or `cls` chooses from, and the mixture that does; raises as `dispatch_labels`."""
        labels = self.dispatch_labels(strategy)
        return labels, Mixture.of({next(iter(self.classifiers)): 1.0}) if strategy == "cls" else Mixture.base()

    def mixture(self, name: str) -> Mixture:
        """A mixture saved by `t2ray adapt`.

        Raises:
            ConfigError: there is no registry.
            UnknownExpert: no mixture of that name, or one of an expert that is gone.
        """
        mixture = self.place.registry().load_mixture(name)
        self.engine.vector(mixture)
        return mixture

    def dispatch_labels(self, strategy: str) -> tuple[str, ...]:
        """What `prompt` or `cls` chooses from; the base model is also asked about experts that came later.

        Raises:
            ConfigError: there are no experts, or for `cls` not one classification expert.
            UnknownExpert: an expert that the classification expert was trained to name is gone.
        """
        where = self.place.experts or "no registry"
        return dispatch_labels(strategy, self.experts, self.classifiers, where)

    def sampling(self, asked: int | None, task: Task) -> SamplingParams:
        """Returns how to answer a task: greedily, with so many tokens as were asked for, or as the task says."""
        if asked is not None:
            return SamplingParams(max_tokens=asked)
        return SamplingParams(max_tokens=task.max_tokens, to_end=task.to_end)


def load_experts(place: Place, names: Sequence[str], bar: Bar = quiet) -> tuple[Model, list[Expert]]:
    """The model with these experts in its adapter, and the experts.

    Raises:
        UnknownExpert: there is no such expert.
        ExpertError: an expert of another base model.
        ConfigError: the experts were trained by several methods.
        ModelError: the model cannot be read.
    """
    digest = open_weights(place.model).digest
    # An expert of another base is refused before the model is decomposed.
    manifests = [place.registry().load(name, base_digest=digest).manifest for name in names]
    method = _method(place, manifests)
    factors = open_factors(place, bar).folder if method.kind == "svf" else ""
    model = load_model(place.model, factors, adapter=method)
    adapter = model.adapter
    experts = [place.registry().load(name, base_digest=digest, layout=adapter.layout) for name in names]
    adapter.set_experts({expert.name: adapter.join(expert.z) for expert in experts})
    return model, experts


def _method(place: Place, manifests: Sequence[ExpertManifest]) -> AdapterConfig:
    """The adapter that all experts were trained in; without experts that of the run, else SVF."""
    found = {manifest.method.method: manifest for manifest in manifests}
    if len(found) > 1:
        names = ", ".join(f"{manifest.name} by {method}" for method, manifest in found.items())
        raise ConfigError(f"{place.experts} holds experts of several methods ({names}); name a registry of one method")
    if found:
        return next(iter(found.values())).method
    return place.run.trained if place.run else AdapterConfig()


def _with_vllm(place: Place, names: Sequence[str], bar: Bar) -> Engine:
    """vLLM with the model and these experts; raises as `load_experts`. It ends with the process."""
    factors = open_factors(place, bar)
    loaded = [place.registry().load(name, base_digest=factors.base_digest, layout=factors.layout) for name in names]
    engine = vllm_engine(place.model, factors, EngineConfig(kind="vllm"), mode="mixtures")
    engine.set_experts({expert.name: held(factors, expert.z) for expert in loaded})
    engine.start()
    atexit.register(engine.stop)
    return engine


def open_workbench(
    place: Place, bar: Bar = quiet, engine: Literal["auto", "transformers", "vllm"] = "transformers"
) -> Workbench:
    """Loads the model and every expert into an engine, "transformers", "vllm", or "auto" for what `choose` says.

    Raises:
        ResourceError: vLLM is not installed.
        ConfigError: a registry was named that has no experts, or has those of several methods.
        ExpertError: an expert of another base model.
        ModelError: the model cannot be read.
    """
    manifests = place.registry().list() if place.experts is not None else ()
    if place.experts is not None and not manifests and place.run is None:
        raise ConfigError(
            f"{place.experts} holds no experts; train some by `t2ray train`, or name another by --experts"
        )
    names = [manifest.name for manifest in manifests]
    made: Engine
    kind = _method(place, manifests).kind
    against = f"vLLM runs experts of SVF alone, and these are of {kind}" if kind != "svf" else ""
    if choose(engine, place.model, place.factors, gpu=torch.cuda.is_available(), against=against) == "vllm":
        made, batch_tokens = _with_vllm(place, names, bar), _BATCH_TOKENS_ON_GPU
    else:
        model, _ = load_experts(place, names, bar)
        batch_tokens = _BATCH_TOKENS if model.device.type == "cpu" else _BATCH_TOKENS_ON_GPU
        made = OfflineEngine(model, max_batch_tokens=batch_tokens)
    labels = {manifest.name: manifest.labels for manifest in manifests if manifest.labels}
    experts = tuple(manifest.name for manifest in manifests if manifest.name not in labels)
    return Workbench(
        place=place,
        engine=made,
        experts=experts,
        classifiers=labels,
        batch_tokens=batch_tokens,
    )
