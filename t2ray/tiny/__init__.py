"""The tiny model that t2ray ships, and how it is made: `MODEL` is a Hugging Face folder like any other."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
