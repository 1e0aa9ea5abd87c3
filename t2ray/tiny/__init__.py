"""The tiny model that t2ray ships, as a Hugging Face folder (`MODEL`), and how it is made."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
