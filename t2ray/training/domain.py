"""The training of one domain inside one worker: it loads the model, trains, and leaves the expert in the run folder.

Not here: several domains on one model (`lockstep`), and Ray (`t2ray.cluster.train`).
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import date
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.model import Model, load_model
from t2ray.config.rl import RLConfig
from t2ray.config.train import TrainConfig
from t2ray.core import ExpertError, Generate, RunError
from t2ray.engine.offline import OfflineEngine
from t2ray.integrity import Damaged, digest_of, seal, unseal
from t2ray.store import Store
from t2ray.tasks.build import build_task
from t2ray.tasks.fits import long_prompts, without
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier
from t2ray.training.checkpoint import steps
from t2ray.training.metrics import note
from t2ray.training.trainer import ReportMetrics, Trained, Trainer

if TYPE_CHECKING:
    from t2ray.engine.protocol import Engine
    from t2ray.training.trackers import Trackers

CONFIG, RESULT, EXPERT, START = "config.json", "result.json", "expert.safetensors", "start.safetensors"
"""In the folder of a run its configuration; in that of a domain its result, its expert, and what it starts from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The figures of a finished domain: greedy validation accuracy of base and expert, and where it was best.

    `expert` is the digest of the expert's vectors. `better` says whether it beat the base. The last `stale` validations
    were not better than the best. Earlier versions wrote none of these three.
    """

    accuracy: float
    base_accuracy: float
    best_step: int
    steps: int
    expert: str | None = None
    stale: int | None = None
    better: bool | None = None

    @property
    def beats_base(self) -> bool:
        """Whether the expert has a better validation than the base."""
        return self.best_step > 0 if self.better is None else self.better

    def goes_on(self, rl: RLConfig) -> bool:
        """Whether a domain with these settings has steps left: its run has been made longer."""
        impatient = rl.patience > 0 and (self.stale is None or self.stale >= rl.patience)
        return self.steps < rl.steps and not impatient


def domain_store(config: TrainConfig, domain: str) -> Store:
    """Returns the folder of a domain in its run."""
    return Store(f"{config.out}/{config.run}/domains/{domain}")


def finished(store: Store) -> Result | None:
    """Returns the result of a domain that ended, or None, also if it is damaged; it is written after the expert."""
    try:
        return _result(store)
    except (FileNotFoundError, Damaged):
        return None


def expert_of(store: Store, result: Result) -> dict[str, Tensor]:
    """Returns the vectors of the expert of a finished domain, by target.

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
    """Returns what is wrong with the result or the expert of a domain that ended; None for one that goes on."""
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
    if not all(
        isinstance(value, int | float) for key, value in asdict(result).items() if value is not None and key != "expert"
    ):
        raise Damaged(f"{RESULT} is damaged: a figure is no number")
    return result


def train_domain(config: TrainConfig, domain: str, report: ReportMetrics) -> None:
    """Trains the expert of one domain from where its run stands.

    Raises:
        T2RayError: what the user can mend: data, reward, model, disk.
    """
    check_checkpoints(config, domain)
    model = job_model(config)
    engine = _sampler(config, domain, model)
    try:
        engine.start()
        asyncio.run(train_on(config, domain, model, engine, engine.generate, report))
    finally:
        engine.stop()


def check_checkpoints(config: TrainConfig, domain: str) -> None:
    """Raises RunError if a domain that ended goes on, and has no checkpoint that it could go on from."""
    store = domain_store(config, domain)
    if finished(store) is not None and not damage(store) and not steps(store):
        raise RunError(
            f"{store.uri} has no checkpoint to go on from; start another run from its expert: run=NAME "
            f"from={config.out}/{config.run}"
        )


def job_model(config: TrainConfig) -> Model:
    """Returns the model of a job, with as many threads as a worker has CPUs.

    Raises:
        T2RayError: as `load_model`.
    """
    assert config.factors is not None and config.cpus is not None, "the launcher resolves these"
    torch.set_num_threads(max(1, int(config.cpus)))
    torch.manual_seed(config.seed)
    device = "auto" if config.gpus > 1 else None
    model = load_model(config.model, config.factors, device=device, adapter=config.trained, seed=config.seed)
    model.chat.template = config.chat_template_kwargs
    if config.date:
        model.chat.tell_date(date.fromisoformat(config.date))
    return model


async def train_on(
    config: TrainConfig, domain: str, model: Model, engine: Engine, generate: Generate, report: ReportMetrics
) -> None:
    """Trains the expert of one domain on a model, and leaves it in the domain's folder.

    Args:
        generate: `engine`'s own, or one that asks the engine together with other domains.

    Raises:
        T2RayError: as `train_domain`.
    """
    store, rl = domain_store(config, domain), config.domain_rl(domain)
    task, lines = _fitting(build_task(config, domain), model)
    verifier = Verifier(
        task.reward, workers=config.verifiers, timeout_s=config.verify_timeout_s, path=config.code or None,
        unsafe_code=config.unsafe_code, success_above=task.success_above,
        forgive=config.domains[domain].on_reward_error == "abstain",
    )  # fmt: skip
    with verifier as verify:
        trainer = Trainer(
            model, generate, lambda name, z_K: engine.set_experts({name: z_K}),
            task, verify, rl, store,
            seed=config.seed, digest=config.digest, shares=config.span[1], start_K=_start(store, model),
            truncate=rl.truncate or None if rl.engine == "vllm" else None,
        )  # fmt: skip
        first = trainer.shares.rank == 0
        if first and (lost := damage(store)):
            lines.append(f"{lost}; it was made again")
        for line in (*lines, *task.notes) if first else ():
            note(store, line)
        if first and finished(store) is not None:  # it goes on, and is not done until it has ended again
            store.delete(RESULT)
        trained = await trainer.run(report, _trackers(config, domain, store) if first else None)
    if first:
        _leave(store, trained, model)


def _fitting(task: Task, model: Model) -> tuple[Task, list[str]]:
    """Returns the task without prompts that are too long, and a line that says so; a job that refuses them has none."""
    long = long_prompts(task, lambda messages: len(model.chat.ids(tuple(messages))), model.context)
    return (task, []) if long is None else (without(task, long), [f"{long.text}; they are left out"])


def _start(store: Store, model: Model) -> Tensor | None:
    """Returns the vector that the domain starts from, (K,); None for the base.

    Raises:
        ExpertError: it adapts matrices that the job does not.
    """
    if not store.exists(START):
        return None
    parts, ranks = store.read_tensors(START), {target.name: target.rank for target in model.adapter.layout}
    odd = [name for name, z_r in parts.items() if ranks.get(name) != len(z_r)]
    if odd:
        raise ExpertError(f"from: that run adapts {odd[0]}, which this job does not; use its targets and layers")
    return model.adapter.join(parts)


def _sampler(config: TrainConfig, domain: str, model: Model) -> Engine:
    """Returns what samples the rollouts: the model itself, or vLLM with the same weights and the expert folded."""
    if config.domain_rl(domain).engine != "vllm":
        return OfflineEngine(model)
    from t2ray.config.serve import EngineConfig  # most runs need neither
    from t2ray.engine.choose import vllm_engine

    assert config.factors is not None
    engine = vllm_engine(config.model, Factors.open(config.factors, model.base_digest), EngineConfig(), mode="one")
    # What the job says of its conversations: the template's variables, and the day that the tokenizer's template has.
    engine.chat.template, engine.chat.tokenizer = model.chat.template, model.chat.tokenizer
    return engine


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
