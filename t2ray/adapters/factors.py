"""A model's matrices as factors `W = U diag(s) V^T` in a folder (paper section 3.1), and that folder read again.

Not here: what is done with the factors (`svf`), and sharing the work out over a cluster (`cluster.train.decompose`),
which runs the three steps of `decompose` itself: `prepare`, `Decomposition.run` per missing matrix, and
`Decomposition.finish`.

M rows and N columns of a weight as `torch.nn.Linear` stores it, R = min(M, N) singular values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2ray.core import ConfigError, ModelError
from t2ray.models.checkpoint import open_checkpoint
from t2ray.models.targets import Selection, Target, select_targets
from t2ray.models.weights import Weights, open_weights
from t2ray.store import Store

__all__ = [
    "Factors",
    "Decomposition",
    "Target",
    "decompose",
    "decompose_matrix",
    "prepare",
    "relative_error",
    "select_targets",
]

Float = Literal["float32", "float64"]
Stored = Literal["float64", "float32", "bfloat16", "float16"]
ShowProgress = Callable[[int, int, str], None]

TOLERANCE = 1e-4  # relative reconstruction error of a computed SVD above which it is refused
PLAN, MANIFEST = "plan.json", "manifest.json"
STORED: dict[str, Stored] = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def decompose_matrix(w_MN: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, float]:
    """`(U_MR, s_R, Vh_RN, error)` of `dtype`: the thin SVD, and `||W - U diag(s) V^T||_F / ||W||_F`.

    Singular vectors are unique up to a sign only: here the component of largest magnitude of each column of U is
    positive, so that equal matrices have equal factors (to the last bit, where as many threads compute them).
    """
    w_MN = w_MN.to(dtype)
    u_MR, s_R, vh_RN = torch.linalg.svd(w_MN, full_matrices=False)
    sign_R = torch.sgn(u_MR.gather(0, u_MR.abs().argmax(0, keepdim=True))).squeeze(0)
    u_MR *= sign_R
    vh_RN *= sign_R[:, None]
    return u_MR, s_R, vh_RN, relative_error(w_MN, u_MR, s_R, vh_RN)


def relative_error(w_MN: Tensor, u_MR: Tensor, s_R: Tensor, vh_RN: Tensor) -> float:
    """`||W - U diag(s) V^T||_F / ||W||_F` in the dtype of W, some rows at a time: no second matrix of that size."""
    dtype, difference, norm = w_MN.dtype, 0.0, 0.0
    vh_RN = vh_RN.to(dtype)
    for start in range(0, len(w_MN), 512):
        w_BN, u_BR = w_MN[start : start + 512], u_MR[start : start + 512]
        product_BN = (u_BR.to(dtype) * s_R.to(dtype)) @ vh_RN
        difference += float(torch.linalg.vector_norm(w_BN - product_BN)) ** 2
        norm += float(torch.linalg.vector_norm(w_BN)) ** 2
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


class Plan(BaseModel):
    """What a folder of factors is made of; the first file in it, so that a run that was cut off resumes as it began."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    base_digest: str
    svd_dtype: Float
    dtype: Stored
    targets: tuple[Target, ...]


class Manifest(Plan):
    """The last file of a folder of factors. `errors`: of the computed SVD and of the factors as stored, by target.

    `share` and `left_out` are as in `Selection`; folders of before version 0.2 do not have them. Sparse factors hold
    the singular vectors of `kept` components, whose digest is `support`.
    """

    model: str
    errors: dict[str, tuple[float, float]]
    share: float | None = None
    left_out: tuple[str, ...] = ()
    support: str | None = None
    kept: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """A decomposition under way: what `prepare` found, in a form that crosses processes."""

    plan: Plan
    model: str
    weights: Weights
    selection: Selection
    out: Path

    def missing(self) -> list[Target]:
        """The targets whose factors are not in the folder yet."""
        return [target for target in self.plan.targets if not (self.out / f"{target.name}.safetensors").exists()]

    def run(self, target: Target) -> None:
        """Decompose one matrix and write its file; when that exists, it is whole.

        Raises:
            ModelError: a weight that is not finite, or whose factors do not reproduce it.
            ResourceError: the file cannot be written.
        """
        w_MN = open_checkpoint(self.weights.folder).matrix(target)
        if not bool(torch.isfinite(w_MN).all()):
            raise ModelError(f"{self.weights.folder}: {target.name} holds values that are not finite")
        u_MR, s_R, vh_RN, error = decompose_matrix(w_MN, getattr(torch, self.plan.svd_dtype))
        if not error <= TOLERANCE:
            raise ModelError(
                f"{target.name}: the factors miss the weight by {error:.1e} of its norm (at most {TOLERANCE:.0e}); "
                "decompose with svd_dtype float64"
            )
        dtype = getattr(torch, self.plan.dtype)
        # R numbers cost nothing: below float32, rounding the singular values would only add to the error.
        u_MR, vh_RN, s_R = u_MR.to(dtype), vh_RN.to(dtype), s_R.to(torch.promote_types(dtype, torch.float32))
        stored = relative_error(w_MN.to(getattr(torch, self.plan.svd_dtype)), u_MR, s_R, vh_RN)
        Store(self.out).write_tensors(
            f"{target.name}.safetensors",
            {"U": u_MR, "s": s_R, "Vh": vh_RN},
            {"errors": json.dumps([error, stored])},  # one key: the library writes several in any order
        )

    def finish(self) -> Factors:
        """Write the manifest over the finished files; nothing where it stands already."""
        if (self.out / MANIFEST).exists():
            return Factors.open(self.out, self.plan.base_digest)
        errors = {target.name: _errors(self.out / f"{target.name}.safetensors") for target in self.plan.targets}
        said = {"share": self.selection.share, "left_out": self.selection.left_out}
        manifest = Manifest(**dict(self.plan), model=self.model, errors=errors, **said)
        Store(self.out).write_text(MANIFEST, manifest.model_dump_json(indent=1))
        return Factors(self.out, manifest)


def prepare(
    model: str,
    out: str | Path,
    *,
    targets: Sequence[str] | None = None,
    layers: str | None = None,
    svd_dtype: Float = "float32",
    dtype: Stored | None = None,
) -> Decomposition:
    """Read the model's headers, choose the targets and claim the folder `out`.

    Raises:
        ConfigError: bad targets or layers, or an `out` that holds something else.
        ModelError: a model that cannot be read, whose targets are quantised, or whose weights are not those that its
            configuration says.
    """
    if "://" in str(out):
        raise ConfigError(f"{out}: factors are memory-mapped; name a folder of a file system that every worker sees")
    weights, out = open_weights(model), Path(out).expanduser().absolute()
    checkpoint = open_checkpoint(weights.folder)
    selection = select_targets(checkpoint.hf, targets, layers)
    dtypes = {key: weights.entries[key].dtype for target in selection.targets for key in checkpoint.sources(target)}
    for key, found in dtypes.items():
        if found not in STORED:
            raise ModelError(f"{weights.folder}: {key} is stored as {found}; use the model before quantisation")
    for target in selection.targets:
        checkpoint.check(target)
    dtype = dtype or STORED[next(iter(dtypes.values()))]
    plan = Plan(base_digest=weights.digest, svd_dtype=svd_dtype, dtype=dtype, targets=selection.targets)
    store = Store(out)
    if (out / PLAN).exists():
        _refuse_other(out, store.read_text(PLAN), plan)
    elif out.exists() and not (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())):
        raise ConfigError(f"{out} holds files that are no factors; choose a new or an empty folder")
    else:
        store.write_text(PLAN, plan.model_dump_json(indent=1))
    store.sweep()
    return Decomposition(plan=plan, model=model, weights=weights, selection=selection, out=out)


def _refuse_other(out: Path, text: str, wanted: Plan) -> None:
    try:
        there = Plan.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"{out / PLAN} is not a plan of factors that this t2ray reads; choose another folder"
        ) from error
    differing = []
    for key in Plan.model_fields:
        old, new = getattr(there, key), getattr(wanted, key)
        if old != new:
            old, new = (f"{len(v)} matrices" if key == "targets" else repr(v) for v in (old, new))
            differing.append(f"{key} (there {old}, asked {new})")
    if differing:
        raise ConfigError(
            f"{out} holds other factors, which differ in {', '.join(differing)}; delete it or choose another"
        )


def decompose(
    model: str,
    out: str | Path,
    *,
    targets: Sequence[str] | None = None,
    layers: str | None = None,
    svd_dtype: Float = "float32",
    dtype: Stored | None = None,
    progress: ShowProgress | None = None,
) -> Factors:
    """Factor a model's matrices into the folder `out`, one matrix in memory at a time; a run that was cut off resumes.

    `dtype` is that of the stored U and V^T (default: the model's; s is at least float32). `progress(done, total, name)`
    is called after each matrix. Raises as `prepare` and `Decomposition.run` do.
    """
    job = prepare(model, out, targets=targets, layers=layers, svd_dtype=svd_dtype, dtype=dtype)
    missing, total = job.missing(), len(job.plan.targets)
    for done, target in enumerate(missing, start=total - len(missing) + 1):
        job.run(target)
        if progress is not None:
            progress(done, total, target.name)
    return job.finish()


class Factors:
    """A finished folder of factors; tensors are memory-mapped, so that processes of one machine share their pages."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.layout: tuple[Target, ...] = manifest.targets
        self.K: int = sum(target.rank for target in manifest.targets)
        self.base_digest: str = manifest.base_digest

    @classmethod
    def open(cls, folder: str | Path, base_digest: str | None = None) -> Factors:
        """The factors in a folder that `decompose` finished.

        Raises:
            ModelError: no finished factors there, or factors of another base than `base_digest`.
        """
        path = Path(folder) / MANIFEST
        if not path.exists():
            raise ModelError(f"{folder} holds no finished factors; run t2ray decompose MODEL --out {folder}")
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ModelError(f"{path} is not a manifest of factors: {error.errors()[0]['msg']}") from error
        if base_digest not in (None, manifest.base_digest):
            raise ModelError(
                f"{folder} holds factors of the base {manifest.base_digest}, the model is {base_digest}; "
                "decompose this model into a folder of its own"
            )
        return cls(Path(folder), manifest)

    def load(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """`(U_MR, s_R, Vh_RN)` of a target of `layout`; of sparse factors U and V^T have the support's vectors alone.

        Raises:
            ModelError: the file is missing or damaged.
        """
        U_MR, s_R, Vh_RN = self._read(name, "U", "s", "Vh")
        return U_MR, s_R, Vh_RN

    def kept(self, name: str) -> Tensor:
        """Which singular vectors of a target sparse factors hold, ascending; raises as `load`."""
        (kept,) = self._read(name, "kept")
        return kept

    def _read(self, name: str, *parts: str) -> list[Tensor]:
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return [file.get_tensor(part) for part in parts]
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{path} cannot be read ({error}); delete the folder and decompose again") from error


def _errors(path: Path) -> tuple[float, float]:
    with safe_open(path, framework="pt") as file:
        computed, stored = json.loads(file.metadata()["errors"])
    return computed, stored


def factors_folder(out: str, base_digest: str, targets: Sequence[str] | None, layers: str | None) -> str:
    """Returns the default folder of a model's decomposition: one per base model and choice of targets."""
    spec = json.dumps([base_digest, targets, layers]).encode()
    return f"{out}/factors/{hashlib.blake2b(spec, digest_size=6).hexdigest()}"
