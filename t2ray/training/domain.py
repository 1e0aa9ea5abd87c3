"""One domain's training inside one worker: loads the model, trains, leaves the expert in the run folder. No Ray."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2ray.adapters.model import Model, load_model
from t2ray.config.train import TrainConfig
from t2ray.engine.offline import OfflineEngine
from t2ray.integrity import Damaged, digest_of, seal, unseal
from t2ray.store import Store
from t2ray.tasks.build import build_task
from t2ray.tasks.verifier import Verifier
from t2ray.training.metrics import note
from t2ray.training.trainer import ReportMetrics, Trained, Trainer

if TYPE_CHECKING:
    from t2ray.training.trackers import Trackers

CONFIG, RESULT, EXPERT = "config.json", "result.json", "expert.safetensors"
"""The run's configuration in its folder; a domain's result and expert in its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished domain's figures: greedy validation accuracy of the base and of its expert, and where it was best.

    `expert` is the digest of the expert's vectors; earlier versions wrote none.
    """

    accuracy: float
    base_accuracy: float
    best_step: int
    steps: int
    expert: str | None = None


def domain_store(config: TrainConfig, domain: str) -> Store:
    """The folder of one domain's run."""
    return Store(f"{config.out}/{config.run}/domains/{domain}")


def finished(store: Store) -> Result | None:
    """The result of a domain that ended, or None, also where it is damaged; it is written after the expert."""
    try:
        return _result(store)
    except (FileNotFoundError, Damaged):
        return None


def expert_of(store: Store, result: Result) -> dict[str, Tensor]:
    """The vectors of a finished domain's expert, by target.

    Raises:
        Damaged: the file is missing, cannot be read, or holds other numbers than the result says.
    """
    try:
        z = store.read_tensors(EXPERT)
    except FileNotFoundError:
        raise Damaged(f"{EXPERT} is missing") from None
    except Damaged as error:
        raise Damaged(f"{EXPERT} is damaged: {error}") from None
    if result.expert not in (None, digest_of(z)):
        raise Damaged(f"{EXPERT} is damaged: its numbers are not those of which {RESULT} has the digest")
    return z


def damage(store: Store) -> str | None:
    """What is wrong with the result or the expert of a domain that ended; None of one that goes on."""
    try:
        expert_of(store, _result(store))
    except FileNotFoundError:
        return None
    except Damaged as error:
        return str(error)
    return None


def _result(store: Store) -> Result:
    try:
        result = Result(**unseal(store.read_bytes(RESULT)))
    except (Damaged, TypeError) as error:
        raise Damaged(f"{RESULT} is damaged: {error}") from None
    if not all(isinstance(value, int | float) for key, value in asdict(result).items() if key != "expert"):
        raise Damaged(f"{RESULT} is damaged: a figure is no number")
    return result


def train_domain(config: TrainConfig, domain: str, report: ReportMetrics) -> None:
    """Trains one domain's expert from where its run stands.

    Raises:
        T2RayError: what the user can mend: data, reward, model, disk.
    """
    assert config.factors is not None and config.cpus is not None, "the launcher resolves these"
    torch.set_num_threads(max(1, int(config.cpus)))
    torch.manual_seed(config.seed)
    store = domain_store(config, domain)
    task = build_task(config, domain)
    model = load_model(config.model, config.factors, device="auto" if config.gpus > 1 else None)
    engine = OfflineEngine(model)
    verifier = Verifier(
        task.reward, workers=config.verifiers, timeout_s=config.verify_timeout_s, path=config.code or None,
        unsafe_code=config.unsafe_code,
    )  # fmt: skip
    with verifier as verify:
        trainer = Trainer(
            model, engine.generate, lambda name, z_K: engine.set_experts({name: z_K}),
            task, verify, config.domain_rl(domain), store,
            seed=config.seed, digest=config.digest, shares=config.span[1],
        )  # fmt: skip
        first = trainer.shares.rank == 0
        if first and (lost := damage(store)):
            note(store, f"{lost}; it was made again")
        trained = asyncio.run(trainer.run(report, _trackers(config, domain, store) if first else None))
    if first:
        _leave(store, trained, model)


def _trackers(config: TrainConfig, domain: str, store: Store) -> Trackers | None:
    if not config.track:
        return None
    from t2ray.training.trackers import Trackers  # most runs have none

    return Trackers(config, domain, store)


def _leave(store: Store, trained: Trained, model: Model) -> None:
    """Writes the expert, then the result that says it is complete."""
    z = model.adapter.split(trained.z_K)
    store.write_tensors(EXPERT, z, {"base_digest": model.base_digest})
    figures = {key: value for key, value in asdict(trained).items() if key != "z_K"}
    store.write_text(RESULT, seal(asdict(Result(**figures, expert=digest_of(z))), indent=1))
