"""t2ray: Transformer-squared (arXiv 2501.06252) as a distributed system on Ray.

>>> import t2ray
>>> with t2ray.open() as model:  # the tiny model that t2ray ships, with its experts
...     model.answer("17+25").text
'42'

The functions here load what they need when they are called: `import t2ray` loads neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ray.core import (
    Busy,
    Completion,
    ConfigError,
    DataError,
    ExpertError,
    GenerationError,
    Image,
    Message,
    Mixture,
    ModelError,
    ResourceError,
    RewardError,
    RunError,
    SamplingParams,
    T2RayError,
    Token,
    UnknownExpert,
    __version__,
)

if TYPE_CHECKING:
    from t2ray.adapters.factors import Factors
    from t2ray.adaptive import AdaptiveModel
    from t2ray.config.train import TrainConfig
    from t2ray.training.domain import Result

__all__ = [
    "Busy",
    "Completion",
    "ConfigError",
    "DataError",
    "ExpertError",
    "GenerationError",
    "Image",
    "Message",
    "Mixture",
    "ModelError",
    "ResourceError",
    "RewardError",
    "RunError",
    "SamplingParams",
    "T2RayError",
    "Token",
    "UnknownExpert",
    "__version__",
    "decompose",
    "open",
    "train",
]


def open(
    run: str | Path | None = None,
    *,
    model: str | None = None,
    factors: str | Path | None = None,
    experts: str | Path | None = None,
) -> AdaptiveModel:
    """Loads a model with its experts, to be asked.

    `t2ray.open("runs/demo")` is a training run with all it made. `t2ray.open(model="org/name", experts="FOLDER")` names
    the parts. `t2ray.open()` is the tiny model that t2ray ships: with the experts of `runs/demo` where there is that
    run, else with the shipped ones.

    Args:
        run: the folder of a run, or its URI.
        model: "tiny", "tiny-vision", a local Hugging Face folder, or a hub id.
        factors: the model's decomposition; made in `runs/factors` where it is missing, which takes a while once.
        experts: a registry: a folder, `s3://` or `gs://`.

    Raises:
        ConfigError: a run and a model were named together, or a registry that has no experts.
        RunError: there is no run in that folder.
        ModelError: the model cannot be read.
        ExpertError: an expert of another base model.
    """
    from t2ray.adaptive import AdaptiveModel
    from t2ray.workbench import open_workbench, place_or_shipped

    return AdaptiveModel(open_workbench(place_or_shipped(run, model, factors, experts)))


def train(
    config: str | Path | Mapping[str, Any] | TrainConfig, *overrides: str, resume: bool = False
) -> dict[str, Result]:
    """Trains one expert per domain, in parallel on Ray, as `t2ray train` does.

    `t2ray.train("dog.yaml", "rl.steps=20")`, or the job itself: `t2ray.train({"domains": {"math": {"task": "math"}}})`.

    Args:
        config: a YAML file, a mapping of its keys (`t2ray config train` lists them), or a `TrainConfig`.
        overrides: `key=value` words, which win over the file.
        resume: whether to go on with the run of that name.

    Returns:
        The result of each domain, in the job's order; the experts are in the run's registry.

    Raises:
        T2RayError: a mistake in the job or its data, a run that exists, a cluster too small.
    """
    from t2ray.cluster.train.launch import train as train_domains
    from t2ray.config.files import override
    from t2ray.config.train import load, resolve

    if isinstance(config, str | Path):
        config = load(config, overrides)
    elif isinstance(config, Mapping):
        config = resolve(override(dict(config), overrides), where="the job", code=str(Path.cwd()))
    elif overrides:
        raise ConfigError(f"{overrides[0]!r}: a TrainConfig takes no overrides; name a file or a mapping")
    return train_domains(config, resume=resume)


def decompose(model: str, out: str | Path, *, workers: int = 1, **options: Any) -> Factors:
    """Factors a model's projections, `W = U diag(s) V^T`, as `t2ray decompose` does; a run that was cut off resumes.

    Args:
        model: "tiny", "tiny-vision", a local Hugging Face folder, or a hub id.
        out: the folder that receives one file per matrix.
        workers: matrices at once, as Ray tasks; with 1, in this process without Ray.
        options: `targets`, `layers`, `svd_dtype`, `dtype` and `progress`, as in `t2ray.adapters.factors.decompose`.

    Raises:
        ModelError: the model cannot be read.
        ConfigError: targets or layers that it does not have.
    """
    if workers > 1:
        from t2ray.cluster.train.decompose import decompose_on_ray

        return decompose_on_ray(model, out, workers=workers, **options)
    from t2ray.adapters.factors import decompose as decompose_here

    return decompose_here(model, out, **options)
