"""GGUF files as models: transformers dequantises one into a model folder of safetensors, once per machine."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from t2ray.core import ModelError, ResourceError

# Files above this many bytes are told apart by samples: to read tens of gigabytes only for a name takes minutes.
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def dequantised(path: Path) -> Path:
    """Returns the folder of a GGUF file's dequantised model, in bfloat16, and makes it first where it is missing.

    It stands below `$XDG_CACHE_HOME/t2ray/gguf`, by default `~/.cache/t2ray/gguf`, under a name that follows the
    file's content, and comes into being whole. A line on stderr says when it is made.

    Args:
        path: a GGUF file, or a folder with one.

    Raises:
        ModelError: the folder has several GGUF files, or transformers cannot read the file.
        ResourceError: gguf or accelerate is not installed, which transformers needs for it.
    """
    file = _only(path) if path.is_dir() else path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "t2ray" / "gguf"
    folder = cache / f"{file.stem}-{_digest(file)}"
    if folder.is_dir():
        return folder
    if lacking := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ResourceError(f"{file}: GGUF files need {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    print(f"t2ray: {file} is quantised; its dequantised weights (bfloat16) go to {folder}", file=sys.stderr, flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as made:
        _convert(file, Path(made) / "model")
        try:
            os.rename(Path(made) / "model", folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and made the same
                raise
    return folder


def _only(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{folder} has {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0]


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with open(file, "rb") as opened:
        for i in range(SAMPLES):
            opened.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _convert(file: Path, out: Path) -> None:
    import torch
    import transformers

    # A transformers that has this class keeps the blocks as they are unless it is told; older ones dequantise.
    config = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (ValueError, OSError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file}: transformers cannot read this GGUF file: {reason}; use the model before quantisation"
        ) from None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
