"""All experts of a registry as tensors, kept up to date while the registry changes.

An update costs one listing; only new and changed files are read. Whatever a look meets, it changes nothing about the
other entries: an expert that cannot be used is listed with its problem. Not here: the format of the files
(`registry.py`).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from t2ray.core import NAME, ConfigError, ExpertError, Mixture, ResourceError, UnknownExpert
from t2ray.experts.admission import check_size
from t2ray.experts.manifest import ExpertManifest
from t2ray.experts.registry import MANIFEST, MARKER, MIXTURES, TENSORS, VERSION, Registry
from t2ray.models.targets import Target

Stamp = tuple[object, ...]
"""Equal while the files of an expert or a mixture are unchanged."""

READ_AGAIN: Stamp = ()
"""The stamp of an entry that could not be read: it equals none, so that the next look reads it again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """Snapshot of a registry.

    `tensors` has the vector of each expert by name, shape (K,), float32. `manifests` describes these experts, and those
    of which only the tensors are damaged. `problems` says of the experts that cannot be used why. `mixtures` has the
    saved mixtures by name. `odd` says what is wrong with any other entry, by its path: a mixture that cannot be used, a
    folder whose name no expert can have, a file that cannot be read just now (what was read before is still here).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    manifests: dict[str, ExpertManifest] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)

    def same(self, other: Snapshot) -> bool:
        """Whether the other says the same, with the same tensors."""
        mine, its = self.tensors, other.tensors
        told = [(x.manifests, x.problems, x.mixtures, x.odd) for x in (self, other)]
        return mine.keys() == its.keys() and all(mine[name] is its[name] for name in mine) and told[0] == told[1]


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
        self._strange: dict[str, str] = {}
        self._syncing = threading.Lock()

    def sync(self) -> bool:
        """Updates the snapshot. Returns whether anything in the registry was new, changed or deleted.

        Raises:
            ResourceError: the registry cannot be listed, or all that it had is gone and nothing says that it was
                deleted, as when a network disk is not mounted; the snapshot is unchanged.
        """
        with self._syncing:
            stamps, strange = self._listed()
            if stamps == self._stamps and strange == self._strange:
                return False
            changed = {name for name in {*stamps, *self._stamps} if stamps.get(name) != self._stamps.get(name)}
            old, snapshot = self.snapshot, _without(self.snapshot, changed, self._strange)
            for name in changed & stamps.keys():
                if not self._read(name, stamps[name], old, snapshot):
                    stamps[name] = READ_AGAIN
            snapshot.odd.update(strange)
            self._stamps, self._strange = stamps, strange
            if snapshot.same(old):  # what could not be read cannot be read yet
                return False
            self.snapshot = snapshot
            return True

    def _listed(self) -> tuple[dict[str, Stamp], dict[str, str]]:
        """A stamp of each expert's latest version, by name, and of each saved mixture, by path; and what is neither."""
        try:
            files, strange = self.registry.store.tree()
        except ResourceError:
            raise
        except Exception as error:  # of a file system that is not ours
            raise ResourceError(f"cannot look into {self.registry.store.uri} ({error!r}); check its address") from error
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
            if NAME.fullmatch(name):
                stamps[name] = (latest, files[f"{folder}/{MANIFEST}"], files.get(f"{folder}/{TENSORS}"))
            else:
                strange[name] = f"{name!r} cannot name an expert; rename the folder, or move it elsewhere"
        for path in strange:  # an expert that was there is still there, as far as anybody knows
            stamps |= {name: stamp for name, stamp in self._stamps.items() if f"{name}/".startswith(f"{path}/")}
            stamps |= {name: stamp for name, stamp in self._stamps.items() if path.startswith(f"{name}/")}
        if self._stamps and not stamps and MARKER not in files:
            raise ResourceError(
                f"all experts and mixtures of {self.registry.store.uri} are gone at once; mount its disk again, or, if "
                f"they were deleted by other means than t2ray's, write a file {MARKER} there"
            )
        return stamps, strange

    def _read(self, name: str, stamp: Stamp, old: Snapshot, new: Snapshot) -> bool:
        """Reads an entry into the new snapshot; returns whether that is what there is to know until it changes."""
        mixture = _mixture(name)
        try:
            if mixture is not None:
                new.mixtures[mixture] = self.registry.load_mixture(mixture)
            else:
                self._read_expert(name, int(str(stamp[0])), new)
        except (ExpertError, ConfigError) as error:
            (new.problems if mixture is None else new.odd)[name] = str(error)
        except UnknownExpert:  # deleted since the listing; the next update removes it
            new.manifests.pop(name, None)
        except Exception as error:  # noqa: BLE001 (one entry's failure, whatever it is, is that entry's alone)
            reason = " ".join(str(error).split()) or type(error).__name__
            text = f"{name} cannot be read ({reason}); check its files and your rights"
            known = name in old.tensors if mixture is None else mixture in old.mixtures
            if not known:
                (new.problems if mixture is None else new.odd)[name] = text
                return False
            new.odd[name] = f"{text}; what was read before is served"
            if mixture is not None:
                new.mixtures[mixture] = old.mixtures[mixture]
            else:
                new.tensors[name], new.manifests[name] = old.tensors[name], old.manifests[name]
            return False
        return True

    def _read_expert(self, name: str, version: int, new: Snapshot) -> None:
        new.manifests[name] = self.registry.manifest(name, version)
        expert = self.registry.load(name, version, base_digest=self.base_digest, layout=self.layout)
        check_size(expert.z, f"expert {name!r} (version {version})")
        new.tensors[name] = self.join(expert.z)


def _without(snapshot: Snapshot, changed: set[str], strange: Mapping[str, str]) -> Snapshot:
    mixtures = {_mixture(name) for name in changed}
    return Snapshot(
        tensors={name: z_K for name, z_K in snapshot.tensors.items() if name not in changed},
        manifests={name: manifest for name, manifest in snapshot.manifests.items() if name not in changed},
        problems={name: text for name, text in snapshot.problems.items() if name not in changed},
        mixtures={name: mixture for name, mixture in snapshot.mixtures.items() if name not in mixtures},
        odd={path: text for path, text in snapshot.odd.items() if path not in changed and path not in strange},
    )


def _mixture(path: str) -> str | None:
    """The name of the mixture that a path of the registry belongs to, or None for the name of an expert."""
    folder, _, file = path.partition("/")
    return file.removesuffix(".json") if folder == MIXTURES else None
