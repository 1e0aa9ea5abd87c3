"""The endpoint as a Ray Serve application: `build_app(args)` composes the deployments.

    ingress (HTTP, keys, limits) -> Dispatcher (pass 1) -> Generator (model, engine)
            \\------------------- pass 2 ------------------/

Pass 2 goes from the ingress straight to a `Generator`: its tokens would gain nothing from a stop at the dispatcher. How
many replicas, how long the queues: `serve_config.yaml`, which names the deployments as they are named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from t2ray.adapters.factors import MANIFEST, decompose, factors_folder
from t2ray.cluster.serve.dispatcher import Dispatcher
from t2ray.cluster.serve.generator import Generator
from t2ray.cluster.serve.ingress import Ingress
from t2ray.cluster.serve.monitor import Monitor
from t2ray.cluster.serve.searcher import Searcher
from t2ray.config.files import validate
from t2ray.config.serve import ServeConfig
from t2ray.core import ResourceError
from t2ray.experts.registry import SHIPPED_WITH
from t2ray.models.load import load_chat
from t2ray.models.weights import open_weights, resolve
from t2ray.store import Store

RUN_EXPERTS = "runs/demo/experts"


def build_app(args: Mapping[str, Any]) -> Any:
    """The bound application; `args` are the fields of `ServeConfig`, as in `serve_config.yaml`.

    Raises:
        T2RayError: a wrong key or value, a model that cannot be read, factors of another one.
    """
    config = resolved(validate(ServeConfig, dict(args), where="args"))
    fields = config.model_dump()
    monitor = serve.deployment(Monitor).bind()
    generator = serve.deployment(Generator).bind(fields, monitor)
    dispatcher = serve.deployment(Dispatcher).bind(fields, generator)
    searcher = serve.deployment(Searcher).bind(fields, generator)
    ingress = serve.deployment(serve.ingress()(Ingress), name="Ingress")
    return ingress.bind(fields, generator, dispatcher, searcher, monitor)


def resolved(config: ServeConfig) -> ServeConfig:
    """Absolute paths, since replicas run in other folders; the decomposition made where it is missing.

    Raises:
        ModelError: a model that cannot be read.
        ExpertError: factors of another model.
    """
    folder = resolve(config.model)
    digest = open_weights(folder).digest
    factors = Path(config.factors or factors_folder("runs", digest, None, None)).absolute()
    if not (factors / MANIFEST).exists():
        load_chat(folder)  # a model that cannot be used is told before it is decomposed
        decompose(config.model, factors)
    experts = config.experts
    if experts is None:
        demo = config.model == "tiny" and Store(RUN_EXPERTS).names()
        if not demo and config.model not in SHIPPED_WITH:
            raise ResourceError(
                f"no experts were named for {config.model}; name them by --experts or `experts: FOLDER`"
            )
        experts = RUN_EXPERTS if demo else str(SHIPPED_WITH[config.model])
    if "://" not in experts:
        experts = str(Path(experts).absolute())
    name = config.name or (folder.name if Path(config.model).exists() else config.model)  # no path of this machine
    fixed = {"model": str(folder), "name": name, "factors": str(factors), "experts": experts}
    return config.model_copy(update=fixed)
