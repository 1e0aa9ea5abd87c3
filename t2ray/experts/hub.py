"""Experts on the Hugging Face hub: one repository per expert, with its vectors, its manifest and its card.

Only `expert.safetensors` and `manifest.json` are ever fetched. The endpoint is `HF_ENDPOINT`, the token that of
`hf auth login` or `HF_TOKEN`; no message shows it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t2ray.adapters.factors import Factors
from t2ray.core import ConfigError, ExpertError, ResourceError, T2RayError, check_name
from t2ray.experts.card import CARD, expert_card, shown
from t2ray.experts.exchange import import_expert
from t2ray.experts.registry import MANIFEST, TENSORS, Expert, Registry, read_expert, read_manifest, write_expert
from t2ray.integrity import digest_of
from t2ray.store import Store

SCHEME = "hf://"
SLACK_BYTES = 1 << 24
"""The longest manifest, and the longest header of the tensors, that are downloaded."""

LOADING = """```bash
t2ray experts pull {uri} --model {base}
```"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """A repository of the hub: `HubPlace(repo="user/name", revision=None)`."""

    repo: str
    revision: str | None

    @classmethod
    def parse(cls, uri: str) -> HubPlace:
        """From `hf://USER/NAME` or `hf://USER/NAME@REVISION`.

        Raises:
            ConfigError: it is neither.
        """
        part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
        match = re.fullmatch(rf"{SCHEME}({part}/{part})(?:@([A-Za-z0-9._/-]+))?", uri)
        if match is None:
            raise ConfigError(
                f"{uri!r} names no repository of the hub; write hf://USER/NAME or hf://USER/NAME@REVISION"
            )
        return cls(repo=match[1], revision=match[2])

    def __str__(self) -> str:
        return SCHEME + self.repo + (f"@{self.revision}" if self.revision else "")


def push_expert(expert: Expert, place: HubPlace, base: str, *, private: bool = False) -> str:
    """Uploads an expert in one commit, into a repository that is made where it is missing; returns the commit's URL.

    Args:
        base: the base model's name, for the card.

    Raises:
        ResourceError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    manifest = expert.manifest.model_copy(update={"digest": digest_of(expert.z)})
    text = expert_card(manifest, base, LOADING.format(uri=place, base=shown(base)))
    with tempfile.TemporaryDirectory() as folder, _asking(place):
        write_expert(Store(folder), ".", expert.z, manifest)
        Store(folder).write_text(CARD, text)
        api = HfApi()
        api.create_repo(place.repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=place.repo, folder_path=folder, revision=place.revision,
            commit_message=f"expert {expert.name}, version {expert.version}",
        )  # fmt: skip
    return str(commit.commit_url)


def pull_expert(
    registry: Registry, place: HubPlace, base_digest: str, factors: Callable[[], Factors], name: str | None = None
) -> tuple[str, int]:
    """Saves an expert of the hub as the next version of `name`, by default its own; returns both.

    Args:
        factors: gives the decomposition whose targets the expert must fit; it is asked once the expert is known to be
            whole and of this base model.

    Raises:
        ResourceError: the hub cannot be reached, or refuses.
        ExpertError: the repository holds no expert, or one without or with another digest, of another base model, of
            other targets, or a file larger than an expert of its targets.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with _asking(place):
            fetch = _commit_of(place, Path(folder))
            fetch(MANIFEST, SLACK_BYTES)
            manifest = read_manifest(store, MANIFEST)
            fetch(TENSORS, SLACK_BYTES + 8 * sum(rank for _, rank in manifest.targets))
        if manifest.digest is None:
            raise ExpertError(f"{place} has no digest in its {MANIFEST}; push it again with this version of t2ray")
        name = check_name(name or manifest.name)
        read_expert(store, ".", manifest, base_digest, None)
        return name, import_expert(registry, name, folder, factors())


def _commit_of(place: HubPlace, folder: Path) -> Callable[[str, int], None]:
    """`fetch(path, limit)` downloads a file of at most `limit` bytes, always from the same commit."""
    from huggingface_hub import HfApi, RepoFile

    api = HfApi()
    revision = api.model_info(place.repo, revision=place.revision).sha

    def fetch(path: str, limit: int) -> None:
        sizes = [f.size for f in api.get_paths_info(place.repo, path, revision=revision) if isinstance(f, RepoFile)]
        if not sizes:
            raise ExpertError(f"{place} has no {path}; name a repository that `t2ray experts push` wrote")
        if sizes[0] > limit:
            raise ExpertError(f"{place}: {path} has {sizes[0]:,} bytes; an expert has at most {limit:,}")
        api.hf_hub_download(place.repo, path, revision=revision, local_dir=folder)

    return fetch


@contextmanager
def _asking(place: HubPlace) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line without the token."""
    from huggingface_hub import errors, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    own = (errors.EntryNotFoundError, errors.RevisionResolutionError, errors.XetDownloadError, errors.OIDCError)
    unreached = errors.HTTPError  # type: ignore[attr-defined]  # of its HTTP client, such as a refused connection
    disable_progress_bars()  # the files are small
    try:
        yield
    except T2RayError:
        raise
    except (*own, unreached, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or type(error).__name__
        if token := get_token():
            reason = reason.replace(token, "***")
        raise ResourceError(
            f"{place}: {reason}; check the name, the network, and who `hf auth whoami` says you are"
        ) from None
