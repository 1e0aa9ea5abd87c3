"""All experts of a registry as tensors, kept up to date while the registry changes.

An update costs one listing; only new and changed files are read. An expert that cannot be used is listed with its
problem and does not affect the others. Not here: the format of the files (`registry.py`).
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
"""Equal while the files of an expert or a mixture are unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Snapshot of a registry.

    `tensors` has the vector of each expert by name, shape (K,), float32; `manifests` describes these experts.
    `problems` says of experts and mixtures why they cannot be used. `mixtures` has the saved mixtures by name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    manifests: dict[str, ExpertManifest] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)


class Follower:
    """Keeps `snapshot` up to date: the latest version of each expert, and the saved mixtures.

    `sync` replaces the snapshot and never changes one, so that a reader may keep it.

    Args:
        layout: the targets that the experts must fit.
        join: makes one vector of an expert's vectors by target (`Adapter.join`).
    """

    def __init__(
        self,
        registry: Registry,
        base_digest: str,
        layout: Sequence[Target],
        join: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        self.registry, self.base_digest, self.layout, self.join = registry, base_digest, layout, join
        self.snapshot = Snapshot()
        self._stamps: dict[str, Stamp] = {}
        self._syncing = threading.Lock()

    def sync(self) -> bool:
        """Updates the snapshot. Returns whether anything in the registry was new, changed or deleted.

        Raises:
            ResourceError: the registry cannot be reached; the snapshot is unchanged.
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
        """Returns a stamp of the latest version of each expert, by name, and of each saved mixture, by path."""
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
        except UnknownExpert:  # deleted since the listing; the next update removes it
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
    """The name of the mixture that a path of the registry belongs to, or None for the name of an expert."""
    folder, _, file = path.partition("/")
    return file.removesuffix(".json") if folder == MIXTURES else None
