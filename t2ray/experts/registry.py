"""A registry of expert vectors (paper: z_k): one folder per expert, in it one folder per version.

<uri>/<name>/v0001/{expert.safetensors, manifest.json}      <uri>/_mixtures/<name>.json
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from t2ray.config.adapter import AdapterConfig
from t2ray.config.files import nearest
from t2ray.core import NAME, ExpertError, Mixture, UnknownExpert, check_name
from t2ray.experts.manifest import ExpertManifest, MixtureRecord, first_mistake
from t2ray.integrity import Damaged, digest_of
from t2ray.models.targets import Target
from t2ray.store import Store

TENSORS, MANIFEST, MIXTURES = "expert.safetensors", "manifest.json", "_mixtures"
MARKER = "_registry.txt"
"""Stands where something has been deleted. So an empty registry is told apart from a folder whose disk is not there."""
SHIPPED = Path(__file__).parents[1] / "tiny" / "experts"
SHIPPED_WITH = {"tiny": SHIPPED, "tiny-vision": SHIPPED.with_name("vision_experts")}
"""The registry that comes with a model that t2ray ships."""
VERSION = re.compile(r"v(\d{4,})")
SVF = AdapterConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One expert in memory: `z` has one float32 vector per target, by the target's name, of the target's rank."""

    name: str
    version: int
    z: Mapping[str, Tensor]
    manifest: ExpertManifest


class Registry:
    """The experts and mixtures under a URI. Versions are never overwritten; the latest is the highest finished one."""

    def __init__(self, uri: str | Path) -> None:
        self.store = Store(uri)

    def names(self) -> tuple[str, ...]:
        """Returns the names of the experts that have a finished version."""
        return tuple(name for name in self.store.names() if NAME.fullmatch(name) and self.versions(name))

    def versions(self, name: str) -> tuple[int, ...]:
        """Returns the finished versions, rising: those with a manifest, which is written last."""
        return tuple(v for v in self._taken(name) if self.store.exists(f"{_folder(name, v)}/{MANIFEST}"))

    def list(self) -> tuple[ExpertManifest, ...]:
        """Returns the manifest of the latest version of each expert."""
        return tuple(self.manifest(name) for name in self.names())

    def manifest(self, name: str, version: int | None = None) -> ExpertManifest:
        """Returns the manifest of a version, by default the latest.

        Raises:
            UnknownExpert: there is no such expert or version.
            ExpertError: the manifest is malformed or of another schema.
        """
        return read_manifest(self.store, f"{_folder(name, self._finished(name, version)[-1])}/{MANIFEST}")

    def load(
        self,
        name: str,
        version: int | None = None,
        *,
        base_digest: str | None = None,
        layout: Sequence[Target] | None = None,
    ) -> Expert:
        """Returns a version of an expert, by default the latest.

        Args:
            base_digest: the digest of the base model that the expert must belong to; None for any.
            layout: the targets that the expert must fit; None for any.

        Raises:
            UnknownExpert: there is no such expert or version.
            ExpertError: it belongs to another base model, does not fit `layout`, is not finite, or is damaged.
        """
        manifest = self.manifest(name, version)
        return read_expert(self.store, _folder(name, manifest.version), manifest, base_digest, layout)

    def save(
        self,
        name: str,
        z: Mapping[str, Tensor],
        *,
        base_digest: str,
        rescaled: bool = False,
        domain: str | None = None,
        config: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        seed: int | None = None,
        adapter: AdapterConfig = SVF,
    ) -> int:
        """Writes the next version of an expert, one vector per target, and returns its number. No version is changed.

        Raises:
            ConfigError: the name is not allowed.
            ExpertError: `z` is empty, or one of its values is no vector of finite numbers.
            ResourceError: the disk is full; no version is left behind.
        """
        check_name(name)
        for target, z_R in z.items():
            if z_R.ndim != 1 or not bool(torch.isfinite(z_R).all()):
                raise ExpertError(f"expert {name!r}: z of {target} is not a vector of finite numbers; it is not saved")
        if not z:
            raise ExpertError(f"expert {name!r} has no targets; it is not saved")
        version = max(self._taken(name), default=0) + 1
        while not self.store.claim(_folder(name, version)):
            time.sleep(random.SystemRandom().random() / 10)  # the seeded generator is for the training run alone
            version = max(self._taken(name), default=0) + 1
        stored = {target: z_R.detach().to("cpu", torch.float32) for target, z_R in z.items()}
        manifest = ExpertManifest(
            name=name, version=version, base_digest=base_digest, digest=digest_of(stored),
            targets=tuple((target, len(z_R)) for target, z_R in z.items()),
            rescaled=rescaled, domain=domain, config=dict(config or {}), metrics=dict(metrics or {}), seed=seed,
            adapter={} if adapter.kind == "svf" else adapter.model_dump(mode="json", exclude_none=True),
        )  # fmt: skip
        try:
            write_expert(self.store, _folder(name, version), stored, manifest)
        except BaseException:
            self.store.delete(_folder(name, version))
            raise
        return version

    def delete(self, name: str, version: int | None = None) -> None:
        """Deletes a version, or (if None) the expert with all its versions, whatever is damaged in them.

        Raises:
            UnknownExpert: there is no such expert or version.
        """
        finished = self._finished(name, version)
        self._mark()
        for v in finished:
            self.store.delete(f"{_folder(name, v)}/{MANIFEST}")  # first: half a folder is then no version
            self.store.delete(_folder(name, v))
        if version is None:
            self.store.delete(name)

    def save_mixture(self, name: str, mixture: Mixture, meta: Mapping[str, Any] | None = None) -> None:
        """Saves a mixture, in place of one of that name."""
        record = MixtureRecord(name=check_name(name, "mixture"), weights=dict(mixture.weights), meta=dict(meta or {}))
        self.store.write_text(f"{MIXTURES}/{name}.json", record.model_dump_json(indent=1))

    def delete_mixture(self, name: str) -> None:
        """Deletes a saved mixture, damaged or not.

        Raises:
            UnknownExpert: there is no mixture of that name.
        """
        path = self._mixture_path(name)
        self._mark()
        self.store.delete(path)

    def mixtures(self) -> tuple[str, ...]:
        """Returns the names of the saved mixtures."""
        return tuple(file.removesuffix(".json") for file in self.store.names(MIXTURES) if file.endswith(".json"))

    def mixture_record(self, name: str) -> MixtureRecord:
        """Returns a saved mixture, with how it was found.

        Raises:
            UnknownExpert: there is no mixture of that name.
            ExpertError: its file is damaged.
        """
        path = self._mixture_path(name)
        try:
            return MixtureRecord.model_validate_json(self.store.read_bytes(path))
        except (Damaged, ValidationError) as error:
            why = first_mistake(error) if isinstance(error, ValidationError) else error
            raise ExpertError(f"{self.store.uri}/{path} is no mixture: {why}") from error

    def load_mixture(self, name: str) -> Mixture:
        """Returns a saved mixture; raises as `mixture_record` does."""
        return self.mixture_record(name).mixture

    def _mixture_path(self, name: str) -> str:
        """Returns the file of a saved mixture; raises UnknownExpert if there is none."""
        path = f"{MIXTURES}/{check_name(name, 'mixture')}.json"
        if not self.store.exists(path):
            raise UnknownExpert(f"no mixture {name!r} in {self.store.uri}{nearest(name, self.mixtures())}")
        return path

    def _finished(self, name: str, version: int | None) -> tuple[int, ...]:
        """Returns the finished versions, or that one alone; raises UnknownExpert if there is none."""
        versions = self.versions(check_name(name))
        if not versions:
            raise UnknownExpert(f"no expert {name!r} in {self.store.uri}{nearest(name, self.names())}")
        if version is None:
            return versions
        if version not in versions:
            raise UnknownExpert(f"expert {name!r} has no version {version}; it has {', '.join(map(str, versions))}")
        return (version,)

    def _mark(self) -> None:
        self.store.write_text(MARKER, "A registry of t2ray: what is missing here has been deleted.\n")

    def _taken(self, name: str) -> tuple[int, ...]:
        """Returns all version numbers in use, also those of unfinished versions."""
        return tuple(sorted(int(m[1]) for m in map(VERSION.fullmatch, self.store.names(name)) if m))


def read_manifest(store: Store, path: str) -> ExpertManifest:
    """Reads a manifest; raises ExpertError if it is missing, malformed or of another schema."""
    try:
        return ExpertManifest.model_validate_json(store.read_bytes(path))
    except FileNotFoundError as error:
        raise ExpertError(f"{store.uri}/{path} is missing") from error
    except (Damaged, ValidationError) as error:
        why = first_mistake(error) if isinstance(error, ValidationError) else error
        raise ExpertError(f"{store.uri}/{path} is not a manifest that this t2ray reads: {why}") from error


def read_expert(
    store: Store, folder: str, manifest: ExpertManifest, base_digest: str | None, layout: Sequence[Target] | None
) -> Expert:
    """Reads the expert in `folder`; raises as `Registry.load` does."""
    who = f"expert {manifest.name!r} (version {manifest.version})"
    if base_digest not in (None, manifest.base_digest):
        raise ExpertError(
            f"{who} belongs to another base model: it was made for {manifest.base_digest}, this is {base_digest}; "
            "name its own model, or another registry"
        )
    ranks = dict(manifest.targets)
    if layout is not None:
        ours = layout[0].method
        if (method := manifest.method.method) != ours:
            raise ExpertError(f"{who} was trained as {method}, and this model is adapted by {ours}; name another")
        there = {target.name: target.rank for target in layout}
        for name, rank in ranks.items():
            if name not in there:
                raise ExpertError(
                    f"{who} adapts {name}, which the factors lack; decompose with --targets that match it"
                )
            if there[name] != rank:
                raise ExpertError(f"{who} has {rank} numbers for {name}, whose factors have {there[name]}")
    try:
        z = {name: z_R.to(torch.float32) for name, z_R in store.read_tensors(f"{folder}/{TENSORS}").items()}
    except (Damaged, FileNotFoundError) as error:
        raise ExpertError(f"{who} is damaged: {store.uri}/{folder}/{TENSORS} cannot be read ({error})") from error
    shapes = {name: tuple(z_R.shape) for name, z_R in z.items()}
    if shapes != {name: (rank,) for name, rank in ranks.items()}:
        odd = sorted(name for name in {*shapes, *ranks} if shapes.get(name) != (ranks.get(name),))
        raise ExpertError(f"{who} is damaged: {odd[0]} has the shape {shapes.get(odd[0])}, not ({ranks.get(odd[0])},)")
    for name, z_R in z.items():
        if not bool(torch.isfinite(z_R).all()):
            raise ExpertError(f"{who} holds values that are not finite, in {name}; train or import it again")
    if manifest.digest not in (None, digest_of(z)):
        raise ExpertError(
            f"{who} is damaged: its numbers are not those of its manifest's digest; train or import it again"
        )
    # The file has the targets in alphabetical order, the manifest in the order of the model.
    ordered = {name: z[name] for name in ranks}
    return Expert(name=manifest.name, version=manifest.version, z=ordered, manifest=manifest)


def write_expert(store: Store, folder: str, z: Mapping[str, Tensor], manifest: ExpertManifest) -> None:
    """Writes an expert into `folder`: the tensors, float32, first, the manifest last."""
    store.write_tensors(f"{folder}/{TENSORS}", z, {"format": "pt"})
    store.write_text(f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=1))


def _folder(name: str, version: int) -> str:
    return f"{name}/v{version:04d}"
