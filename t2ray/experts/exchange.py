"""Experts in and out of a registry: importing files of other programs, exporting folders, and a drawing of z as text.

Not here: the registry's own files (`registry.py`).
"""

from __future__ import annotations

import pickle
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.sparse import held
from t2ray.core import ConfigError, ExpertError, ResourceError
from t2ray.experts.admission import HEADER_BYTES, check_header, check_size, header, place
from t2ray.experts.card import CARD, expert_card
from t2ray.experts.registry import MANIFEST, Expert, Registry, read_expert, read_manifest, write_expert
from t2ray.integrity import Damaged
from t2ray.models.targets import Target
from t2ray.store import Store

# The errors of torch.load for files that are damaged, contain code or are missing (found by changing random bytes).
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
)
LOADING = """```bash
t2ray experts import NAME FOLDER --model MODEL
```"""
BARS, BINS = " ▁▂▃▄▅▆▇█", 24


def import_expert(
    registry: Registry, name: str, path: str | Path, factors: Factors, *, reference: bool | None = None
) -> int:
    """Saves an expert from outside as the next version of `name`; returns the version.

    Args:
        path: a folder that `export_expert` wrote; or a safetensors file `{target name: z}`; or a `.pt` file of the
            paper's reference code, a dictionary `{parameter name: p}`. Of the last, `z = sigmoid(p)` is saved, times
            that code's rescaling `sum(s) / sum(s * z)`. Other pickles are refused. Names may end in ".weight" and have
            underscores in place of dots.
        factors: the decomposition whose targets the expert must fit.
        reference: whether the file is the reference code's; by default what its name ends in tells.

    Raises:
        ExpertError: the file cannot be read, has unknown names, wrong shapes or types, numbers that are not finite or
            above `admission.LARGEST`, belongs to another base model, or changes what sparse factors do not hold.
    """
    path = Path(path)
    if path.is_dir() and not reference:
        store = Store(path)
        manifest = read_manifest(store, MANIFEST)
        expert = read_expert(store, ".", manifest, factors.base_digest, factors.layout)
        check_size(expert.z, str(path))
        held(factors, expert.z)
        kept = manifest.model_dump(include={"rescaled", "domain", "config", "metrics", "seed"})
        return registry.save(name, expert.z, base_digest=factors.base_digest, **kept)
    if reference is None:
        reference = path.suffix in (".pt", ".pth", ".bin")
    found = _read_pickled(path) if reference else _read_safetensors(path, factors.layout)
    z = _place(path, found, factors.layout)
    if reference:
        z = {target: _rescaled(torch.sigmoid(p_R), factors.load(target)[1]) for target, p_R in z.items()}
    check_size(z, str(path))
    held(factors, z)
    return registry.save(
        name, z, base_digest=factors.base_digest, rescaled=reference, config={"imported_from": path.name}
    )


def export_expert(expert: Expert, path: str | Path, base: str | None = None) -> None:
    """Writes an expert as a folder with a safetensors file and a manifest, which `import_expert` reads, and a card.

    Args:
        base: the base model's name, for the card.

    Raises:
        ConfigError: `path` exists and is not an empty folder.
        ResourceError: the files cannot be written.
    """
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder; name a new one")
    Store(path).write_text(CARD, expert_card(expert.manifest, base, LOADING))
    write_expert(Store(path), ".", expert.z, expert.manifest)


def _read_safetensors(path: Path, layout: Sequence[Target]) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            head = header(file.read(8 + HEADER_BYTES))
        check_header(head, path.stat().st_size, layout, str(path))
        return Store(path.parent).read_tensors(path.name)
    except (Damaged, FileNotFoundError, ResourceError) as error:
        raise ExpertError(
            f"{path} cannot be read as an expert ({error}); name an exported folder, a .safetensors or a .pt file"
        ) from error


def _read_pickled(path: Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ExpertError(f"{path} cannot be read safely (it must be a dictionary of tensors alone)") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ExpertError(f"{path} holds a {type(found).__name__}; it must hold a dictionary of tensors by name")
    return found


def _place(path: Path, found: Mapping[str, Any], layout: Sequence[Target]) -> dict[str, Tensor]:
    """Returns the vectors in float32, under the names of `layout` and in its order."""
    shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for name, x in found.items()}
    placed = {target: found[name] for name, target in place(str(path), shapes, layout).items()}
    for target, vector in placed.items():
        if not vector.is_floating_point():
            raise ExpertError(f"{path}: {target} holds {vector.dtype}; an expert's numbers are floating-point ones")
    return {t.name: placed[t.name].detach().to(torch.float32) for t in layout if t.name in placed}


def _rescaled(z_R: Tensor, s_R: Tensor) -> Tensor:
    s_R = s_R.to(torch.float32)
    return z_R * (s_R.sum() / (s_R * z_R).sum())


def histogram(expert: Expert) -> str:
    """Draws z as text, one line per kind of matrix (q_proj, ...): its distribution, and its min, mean and max."""
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, z_R in expert.z.items():
        kinds[name.rpartition(".")[2]].append(z_R)
    z_by_kind = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    low, high = min(float(z.min()) for z in z_by_kind.values()), max(float(z.max()) for z in z_by_kind.values())
    width = max(len("kind"), *map(len, z_by_kind))
    lines = [f"{'kind':<{width}}  {f'z in [{low:.3g}, {high:.3g}]':<{BINS}}     min    mean     max  numbers"]
    for kind, z in z_by_kind.items():
        # torch.histc widens an empty range by itself, to low - 1 and high + 1
        count = torch.histc(z, BINS, low, high)
        level = torch.ceil(count / count.max() * (len(BARS) - 1)).int()
        bars = "".join(BARS[i] for i in level.tolist())
        figures = f"{float(z.min()):7.3f} {float(z.mean()):7.3f} {float(z.max()):7.3f} {len(z):8d}"
        lines.append(f"{kind:<{width}}  {bars} {figures}")
    return "\n".join(lines)
