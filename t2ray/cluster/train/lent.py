"""Experts of one model of a grid that answer on another of the same shape (the paper's table 5).

An expert belongs to the weights that it was trained on, and everywhere else it is refused on others. Here it is used on
them on purpose, to find out what it does there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from t2ray.adapters.sparse import joined
from t2ray.config.tables import SHUFFLED, TablesConfig, job_of, lender_of, lent_name
from t2ray.core import ConfigError, UnknownExpert
from t2ray.evals.cells import GridCell, cell_of, load_cell
from t2ray.experts.registry import Registry
from t2ray.runs.folder import read_run
from t2ray.runs.memory import shape_of
from t2ray.workbench import Workbench


def check_lenders(config: TablesConfig) -> None:
    """Raises ConfigError for a model whose adapted matrices are not those of the model that lends it experts."""
    pairs = {
        (lender, model, method): None
        for model in config.models
        for method in config.methods
        for _, strategy in config.measured(model, method)
        if (lender := lender_of(strategy))
    }
    for lender, model, method in pairs:
        theirs, ours = _sizes(config, lender, method), _sizes(config, model, method)
        for name in {**theirs, **ours}:
            if theirs.get(name) != ours.get(name):
                there, here = (sizes.get(name, "missing") for sizes in (theirs, ours))
                raise ConfigError(
                    f"tables {config.run!r}: {lender!r} cannot lend experts to {model!r}: {name} is {there} there and "
                    f"{here} here; name models of equal shape"
                )


def _sizes(config: TablesConfig, model: str, method: str) -> dict[str, str]:
    job = job_of(config, model, method, 0)
    targets = shape_of(job.model, job.trained.targets, job.trained.layers).targets
    return {target.name: f"{target.m} x {target.n}" for target in targets}


def lend(
    config: TablesConfig, bench: Workbench, cell: GridCell, strategy: str, experts: Sequence[str]
) -> tuple[str, ...]:
    """Gives a cell's engine experts of the same method and seed on another model, and returns their names there.

    Raises:
        UnknownExpert: the other model's cell has not trained one of them.
        RunError: it was made on another machine, and its run is not here.
        ExpertError: an expert of another shape or method.
    """
    lender = lender_of(strategy)
    assert lender, strategy
    theirs = load_cell(config, cell_of(config, lender, cell.method, cell.seed))
    lent = {}
    for name in experts:
        if name not in theirs.trained:
            why = theirs.missing.get(name, "it is not trained yet")
            raise UnknownExpert(f"{theirs.name} has no expert {name!r} to lend: {why}")
        folder = read_run(f"{config.folder}/runs/{theirs.name}").experts
        assert folder, theirs.name
        z = Registry(folder).load(name, layout=bench.engine.layout).z  # of other weights: that is what is measured
        if strategy.startswith(SHUFFLED):
            z = shuffled(z, cell.seed)
        lent[lent_name(lender, name)] = joined(bench.engine.layout, z)
    bench.engine.set_experts(lent)
    return tuple(lent)


def shuffled(z: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Returns an expert's vectors, (r,) each, with the components of each in an order that seed and matrix draw."""
    return {name: z_r[random.Random(f"{seed}/{name}").sample(range(len(z_r)), len(z_r))] for name, z_r in z.items()}
