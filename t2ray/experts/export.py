"""A mixture as files that other programs load: a plain model (`merged`), or an adapter of PEFT (`peft`).

A folder is whole or absent: it is filled under a hidden name beside its place and then renamed. Not here: a registry's
own experts as files (`exchange`).

Shapes: M rows and N columns of a weight, R the rank of its change.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.core import ConfigError, Mixture, ResourceError, __version__
from t2ray.experts.card import CARD, card, shown
from t2ray.experts.manifest import ExpertManifest
from t2ray.models.load import load_base
from t2ray.models.skeleton import model_class
from t2ray.models.targets import Target, matrix
from t2ray.models.weights import resolve
from t2ray.store import Store

RECORD = "t2ray_export.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "README.md", ".*")
"""What a merged model does not take over from the base's folder."""

MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```"""
PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)
```"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is exported: the `mixture` of `experts` on the loaded `model`, which has them and was named `base`."""

    model: Model
    base: str
    mixture: Mixture
    experts: Sequence[ExpertManifest]

    @property
    def changes(self) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """See `Adapter.changes`."""
        return self.model.adapter.changes(self.model.adapter.mix(self.mixture))


def check_place(out: str | Path) -> Path:
    """The folder to export to.

    Raises:
        ConfigError: it is a URI, or exists and is not an empty folder.
    """
    path = Path(out).expanduser()
    if "://" in str(out):
        raise ConfigError(f"{out}: an export goes into a local folder; copy it from there")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; name a new one")
    return path


def export_merged(source: Source, out: str | Path, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Writes a model whose weights hold the mixture, with the base's tokenizer and chat template.

    `generation_config.json` names the tokens that end an answer here, and nothing else: t2ray answers without the
    penalties that some models bring along.

    Args:
        dtype: the type of the adapted weights, and of all others; by default the base's.

    Returns:
        By target, how far the stored change is from the mixture's, relative to it: what rounding has cost.

    Raises:
        ConfigError: as `check_place`.
        ResourceError: the files cannot be written; nothing is left behind.
    """
    chat, errors = source.model.chat, {}
    base = resolve(source.base)
    hf, _ = load_base(base, "cpu")
    if dtype is not None and torch.finfo(dtype).bits > torch.finfo(hf.dtype).bits:
        hf.to(dtype)
    for target, left_MR, right_RN in source.changes:
        weight_MN, change_MN = matrix(hf, target)[0], (left_MR @ right_RN).cpu()
        stored_MN = (weight_MN.float() + change_MN).to(dtype or weight_MN.dtype)
        errors[target.name] = _missed(change_MN, stored_MN.float() - weight_MN.float())
        weight_MN.copy_(stored_MN)
    with _whole(out) as folder:
        hf.to(dtype or hf.dtype).save_pretrained(folder)
        ends = {"eos_token_id": list(chat.eos_ids), "pad_token_id": chat.pad_id}
        Store(folder).write_text("generation_config.json", json.dumps(ends, indent=1))
        for path in folder.glob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode)  # safetensors gives its files to their owner alone
        for path in base.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        about = "A model with a mixture of experts in its weights; nothing but transformers is needed to run it."
        _leave(folder, source, kind="merged", errors=errors, library="transformers", about=about, loading=MERGED)
    return errors


def export_peft(source: Source, out: str | Path, rank: int) -> dict[str, float]:
    """Writes the best LoRA of a rank: the truncated SVD of what the mixture adds to each weight.

    Where no change has a larger rank, the adapter is the mixture to rounding.

    Returns:
        By target, the Frobenius norm of what is left out, relative to that of the change.

    Raises:
        ConfigError: the rank is below 1, the mixture changes nothing, or as `check_place`.
        ResourceError: the files cannot be written; nothing is left behind.
    """
    if rank < 1:
        raise ConfigError(f"the rank is {rank}; it must be at least 1")
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    changes = [change for change in source.changes if change[1].shape[1]]
    if not changes:
        raise ConfigError(f"the mixture {source.mixture} changes nothing; name an expert that does")
    if moe := [target.name for target, _, _ in changes if target.expert is not None]:
        raise ConfigError(f"{moe[0]} is of an MoE expert, of which PEFT has no LoRA by matrix; export it as merged")
    rank = min(rank, max(left_MR.shape[1] for _, left_MR, _ in changes))
    for target, left_MR, right_RN in changes:
        kept = min(rank, left_MR.shape[1])
        up_MR, down_RN = left_MR.new_zeros(target.m, rank), right_RN.new_zeros(rank, target.n)
        up_MR[:, :kept], down_RN[:kept] = left_MR[:, :kept], right_RN[:kept]
        tensors[f"base_model.model.{target.name}.lora_A.weight"] = down_RN
        tensors[f"base_model.model.{target.name}.lora_B.weight"] = up_MR
        errors[target.name] = _missed(left_MR @ right_RN, up_MR @ down_RN)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": source.base, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted(errors),
    }  # fmt: skip
    with _whole(out) as folder:
        Store(folder).write_tensors("adapter_model.safetensors", tensors, {"format": "pt"})
        Store(folder).write_text("adapter_config.json", json.dumps(config, indent=1))
        about = f"A LoRA of rank {rank}: the best approximation of a mixture of experts, for PEFT."
        _leave(folder, source, kind="peft", errors=errors, library="peft", about=about, loading=PEFT)
    return errors


def _missed(change_MN: Tensor, stored_MN: Tensor) -> float:
    """`||change - stored|| / ||change||`; 0 where there is no change and none is stored."""
    missed = torch.linalg.vector_norm(change_MN - stored_MN)
    return float(missed / torch.linalg.vector_norm(change_MN)) if bool(missed) else 0.0


def _leave(
    folder: Path, source: Source, *, kind: str, errors: dict[str, float], library: str, about: str, loading: str
) -> None:
    """Writes what the files are: the record for programs, the card for people."""
    record = {
        "schema_version": 1, "as": kind, "t2ray": __version__, "base": shown(source.base),
        "base_digest": source.model.base_digest, "mixture": dict(source.mixture.weights),
        "experts": {e.name: {"version": e.version, "digest": e.digest} for e in source.experts},
        "relative_errors": errors,
    }  # fmt: skip
    Store(folder).write_text(RECORD, json.dumps(record, indent=1))
    worst, name = max(errors.values(), default=0.0), shown(source.base)
    about += f" Of the change of a weight at most {worst:.2g} is missing; `{RECORD}` has it by matrix."
    loading = loading.replace("AutoModelForCausalLM", model_class(source.model.hf.config).__name__)
    text = card(
        f"{name} with {source.mixture}", base=name, mixture=source.mixture, experts=source.experts,
        library=library, about=about, loading=loading,
    )  # fmt: skip
    Store(folder).write_text(CARD, text)


@contextmanager
def _whole(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends and is deleted when it raises."""
    place = check_place(out).absolute()
    folder = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.exists():  # an empty folder, which a rename would take for a place to move into on some systems
            place.rmdir()
        folder.rename(place)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"cannot write {out} ({error}); free some space or name another place") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
