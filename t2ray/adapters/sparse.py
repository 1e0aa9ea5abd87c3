"""Sparse SVF: a support of singular components that experts share; all others keep z = 1, exactly.

A folder of sparse factors is a folder of factors that holds the singular vectors of the support alone. An expert's
vector has all K numbers nevertheless, so that it works with the whole factors too. A layer computes
`W x + U_S diag(s (z - 1))_S V_S^T x`.

Shapes: K singular values of all targets in a row, S of them in the support, M outputs, N inputs, r rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from t2ray.adapters.factors import MANIFEST, PLAN, Factors, Plan, Target
from t2ray.core import ConfigError, ExpertError
from t2ray.store import Store


def shared_support(factors: Factors, experts: Sequence[Tensor], keep: float) -> Tensor:
    """The components, (S,), that some expert moves most: the share `keep` with the largest `max_k |c_k| / ||c_k||`.

    `c_k = s (z_k - 1)` are the singular values of what expert k adds to the weights; its norm is taken out, so that an
    expert of small changes has its part of the support. They are fewer where the experts move fewer.

    Args:
        experts: the vectors, each (K,).

    Raises:
        ConfigError: no expert moves any.
    """
    s_K = torch.cat([factors.load(target.name)[1].float() for target in factors.layout])
    moved_K = torch.stack([normalize(s_K * (z_K - 1), dim=0).abs() for z_K in experts]).amax(0)
    most = min(int(keep * len(s_K)), int(moved_K.count_nonzero()))
    if not most:
        raise ConfigError(f"{len(experts)} experts and a share of {keep:g} leave no singular value that they change")
    return moved_K.argsort(descending=True, stable=True)[:most].sort().values


def sparsify(factors: Factors, support_S: Tensor, out: str | Path) -> Factors:
    """Writes the factors of a support, (S,), of ascending places in the K singular values, into the folder `out`.

    Raises:
        ConfigError: `out` holds something already, or `factors` are sparse themselves.
        ResourceError: the files cannot be written.
    """
    out = Path(out).expanduser().absolute()
    if factors.manifest.support is not None:
        raise ConfigError(f"{factors.folder} holds sparse factors; choose a support of the whole ones")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; name a new one")
    store, start = Store(out), 0
    store.write_text(PLAN, Plan(**{key: getattr(factors.manifest, key) for key in Plan.model_fields}).model_dump_json())
    for target in factors.layout:
        U_Mr, s_r, Vh_rN = factors.load(target.name)
        kept = support_S[(support_S >= start) & (support_S < start + target.rank)] - start
        tensors = {"U": U_Mr[:, kept].contiguous(), "s": s_r, "Vh": Vh_rN[kept].contiguous(), "kept": kept}
        errors = json.dumps(factors.manifest.errors[target.name])
        store.write_tensors(f"{target.name}.safetensors", tensors, {"errors": errors})
        start += target.rank
    digest = hashlib.blake2b(support_S.numpy().tobytes(), digest_size=12).hexdigest()
    manifest = factors.manifest.model_copy(update={"support": digest, "kept": len(support_S)})
    store.write_text(MANIFEST, manifest.model_dump_json(indent=1))
    return Factors(out, manifest)


def support_of(factors: Factors) -> Tensor | None:
    """The support, (S,), of sparse factors: ascending places in the K singular values; None of whole factors."""
    if factors.manifest.support is None:
        return None
    parts, start = [], 0
    for target in factors.layout:
        parts.append(factors.kept(target.name) + start)
        start += target.rank
    return torch.cat(parts)


def joined(layout: Sequence[Target], parts: Mapping[str, Tensor]) -> Tensor:
    """The z, (K,), float32, of one vector per target; 1, which changes nothing, for a target without one."""
    vectors = [parts[target.name].float() if target.name in parts else torch.ones(target.rank) for target in layout]
    return torch.cat([z_r.cpu() for z_r in vectors])


def held(factors: Factors, parts: Mapping[str, Tensor]) -> Tensor:
    """As `joined`, of an expert that is used with these factors; raises as `check_support`."""
    z_K = joined(factors.layout, parts)
    check_support(z_K, support_of(factors))
    return z_K


def check_support(z_K: Tensor, support_S: Tensor | None) -> None:
    """Raises ExpertError where z, (K,), is not 1 at a component outside of a support, (S,)."""
    if support_S is not None and (lost := int((z_K != 1).sum() - (z_K[support_S] != 1).sum())):
        raise ExpertError(
            f"an expert changes {lost} singular values of which the sparse factors have no vectors; use the whole "
            "factors, or train it on these: t2ray train JOB.yaml from=RUN factors=FOLDER"
        )
