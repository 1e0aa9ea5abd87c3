"""The cells of a grid of measurements: one file per model, method and seed, with what was trained and measured.

A cell knows by a digest what it was made of, and by another the weights of its model. So files that other machines made
may be put beside one's own; what does not belong to the grid is refused. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from t2ray.config.resume import before_betas
from t2ray.config.tables import BASE, SHUFFLED, TablesConfig, job_of
from t2ray.core import RunError
from t2ray.integrity import Damaged, seal, unseal
from t2ray.store import Store

CELLS = "cells"
_PLACES = ("data", "validation", "test", "others", "gold", "publish")
"""Of a domain's settings those that say where rows lie, which differs between machines, or that change no figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCell:
    """What one method came to on one model with one seed; the base model is the method `base`.

    `made_of` is the digest of its settings, `base_digest` that of the model's weights. `trained` has the figures of
    each domain's training, `measured` those of each task under each strategy, `missing` why something is not there, by
    `domain` or `task/strategy`. `variance` has, for each kind of matrix, the share of the variance that the r largest
    singular values hold, as [r, share]. `seconds` are those of all of it; `machine` and `date` say where and when.
    """

    model: str
    method: str
    seed: int
    made_of: str
    base_digest: str = ""
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    variance: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: float = 0.0
    machine: str = ""
    date: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}.{self.method}.{self.seed}"

    def lacks(self, config: TablesConfig) -> list[tuple[str, str]]:
        """Returns each (task, strategy) that the tables want of the cell and that is not measured."""
        return [
            (task, strategy)
            for task, strategy in config.measured(self.model, self.method)
            if strategy not in self.measured.get(task, {})
        ]


def cells_of(config: TablesConfig) -> Iterator[GridCell]:
    """Yields the cells of a grid as they begin, in the order in which they are made: a seed before the next."""
    for model in config.models:
        if config.measured(model, BASE):
            yield cell_of(config, model, BASE, config.seeds[0])
    for seed in config.seeds:
        for model in config.models:
            for method in config.methods:
                yield cell_of(config, model, method, seed)


def cell_of(config: TablesConfig, model: str, method: str, seed: int) -> GridCell:
    """Returns a cell of a method, or of the base, as it begins."""
    return GridCell(model=model, method=method, seed=seed, made_of=made_of(config, method))


def made_of(config: TablesConfig, method: str) -> str:
    """Returns the digest of what a cell's figures depend on, but for the files that machines have in other places."""
    job = job_of(config, next(iter(config.models)), next(iter(config.methods)) if method == BASE else method, 0)
    domains = {
        name: {key: value for key, value in domain.model_dump(mode="json").items() if key not in _PLACES}
        for name, domain in job.domains.items()
    }
    values = {
        "domains": domains,
        "limit": config.limit,
        "unseen": {name: [task.expert, task.task] for name, task in config.unseen.items()},
        "texts": {name: [text.expert, text.column] for name, text in config.texts.items()},
    }
    if method != BASE:
        values |= {
            "adapter": job.trained.model_dump(mode="json"),
            "rl": {
                name: before_betas(settings.model_dump(mode="json")) for name, settings in job.domain_settings.items()
            },
            "search": config.search.model_dump(mode="json"),
        }
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def save_cell(config: TablesConfig, cell: GridCell) -> None:
    """Writes the file of a cell, whole."""
    Store(config.folder).write_text(f"{CELLS}/{cell.name}.json", seal(asdict(cell), indent=1))


def load_cell(config: TablesConfig, new: GridCell) -> GridCell:
    """Returns a cell as its file has it, or as it begins if there is no file.

    Figures of `shuffled/MODEL` that do not say what was shuffled are left out: they are of whole z at other layers.

    Raises:
        RunError: the file is damaged, or is of a grid with other settings.
    """
    store, name = Store(config.folder), f"{CELLS}/{new.name}.json"
    if not store.exists(name):
        return new
    try:
        cell = GridCell(**unseal(store.read_bytes(name)))
    except (Damaged, TypeError) as error:
        raise RunError(f"{store.uri}/{name} is damaged ({error}); delete it, and the cell is measured again") from None
    if cell.made_of != new.made_of:
        raise RunError(
            f"{store.uri}/{name} was made with other settings of the job, the method or the grid; use another run=NAME"
        )
    measured = {
        task: {name: figures for name, figures in found.items() if not name.startswith(SHUFFLED) or SHUFFLED in figures}
        for task, found in cell.measured.items()
    }
    return replace(cell, measured=measured)


def load_cells(config: TablesConfig) -> list[GridCell]:
    """Returns all cells of a grid in their order, those that are not begun too.

    Raises:
        RunError: a file is damaged, is of another grid, or two cells of a model were made with other weights.
    """
    cells = [load_cell(config, new) for new in cells_of(config)]
    first: dict[str, GridCell] = {}
    for cell in cells:
        if cell.base_digest and first.setdefault(cell.model, cell).base_digest != cell.base_digest:
            raise RunError(
                f"{config.folder}/{CELLS}: {first[cell.model].name} and {cell.name} were made with other weights of "
                f"{cell.model!r}; delete one of them, or give the models two names"
            )
    return cells
