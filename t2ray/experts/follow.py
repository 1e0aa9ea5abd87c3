"""All experts of a registry as tensors, following the registry as it changes.

A look is one listing; only what is new or changed is read. An expert that cannot be used is a `problem` of its own and
disturbs no other. Not here: the files (experts.py) and who uses the tensors. Called by the serving replicas.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from t2ray.core import ConfigError, ExpertError, Mixture, UnknownExpert
from t2ray.experts.registry import MANIFEST, MIXTURES, TENSORS, VERSION, ExpertManifest, Registry
from t2ray.models.targets import Target

Stamp = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a registry held at one look: z, (K,), float32 by name; what each expert is; why some cannot be used."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    manifests: dict[str, ExpertManifest] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)


class Follower:
    """The latest version of each expert, and the saved mixtures: `held`, which a look replaces and never changes."""

    def __init__(
        self,
        registry: Registry,
        base_digest: str,
        layout: Sequence[Target],
        join: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        """`join` makes one vector of an expert's named parts (`Adapter.join`)."""
        self.registry, self.base_digest, self.layout, self.join = registry, base_digest, layout, join
        self.snapshot = Snapshot()
        self._stamps: dict[str, Stamp] = {}
        self._syncing = threading.Lock()

    def sync(self) -> bool:
        """Looks into the registry; whether anything was new, changed or gone.

        Raises:
            ResourceError: the registry cannot be reached; nothing has changed.
        """
        with self._syncing:
            stamps = self._stamps_now()
            if stamps == self._stamps:
                return False
            changed = {name for name in {*stamps, *self._stamps} if stamps.get(name) != self._stamps.get(name)}
            snapshot = _without(self.snapshot, changed)
            for name in changed & stamps.keys():
                self._read(name, stamps[name], snapshot)
            self.snapshot, self._stamps = snapshot, stamps
            return True

    def _stamps_now(self) -> dict[str, Stamp]:
        """What identifies the latest version of each expert, and each mixture by its path."""
        files = self.registry.store.tree()
        versions: dict[str, list[int]] = defaultdict(list)
        stamps: dict[str, Stamp] = {}
        for path, stamp in files.items():
            folder, _, file = path.rpartition("/")
            name, _, version = folder.partition("/")
            if folder == MIXTURES and file.endswith(".json"):
                stamps[path] = stamp
            elif file == MANIFEST and (match := VERSION.fullmatch(version)):
                versions[name].append(int(match[1]))
        for name, numbers in versions.items():
            latest = max(numbers)
            folder = f"{name}/v{latest:04d}"
            stamps[name] = (latest, files[f"{folder}/{MANIFEST}"], files.get(f"{folder}/{TENSORS}"))
        return stamps

    def _read(self, name: str, stamp: Stamp, snapshot: Snapshot) -> None:
        mixture = _mixture(name)
        try:
            if mixture is not None:
                snapshot.mixtures[mixture] = self.registry.load_mixture(mixture)
                return
            version = stamp[0]
            assert isinstance(version, int)
            expert = self.registry.load(name, version, base_digest=self.base_digest, layout=self.layout)
            snapshot.tensors[name], snapshot.manifests[name] = self.join(expert.z), expert.manifest
        except (ExpertError, ConfigError) as error:
            snapshot.problems[mixture or name] = str(error)
        except UnknownExpert:  # deleted since the listing; the next look tells
            pass


def _without(snapshot: Snapshot, changed: set[str]) -> Snapshot:
    gone = {_mixture(name) or name for name in changed}
    mixtures = {_mixture(name) for name in changed}
    return Snapshot(
        tensors={name: z_K for name, z_K in snapshot.tensors.items() if name not in changed},
        manifests={name: manifest for name, manifest in snapshot.manifests.items() if name not in changed},
        problems={name: text for name, text in snapshot.problems.items() if name not in gone},
        mixtures={name: mixture for name, mixture in snapshot.mixtures.items() if name not in mixtures},
    )


def _mixture(path: str) -> str | None:
    """The mixture's name in a path of the registry; None for an expert's."""
    folder, _, file = path.partition("/")
    return file.removesuffix(".json") if folder == MIXTURES else None
