"""The tiny models that t2ray ships, as Hugging Face folders (`MODEL`, `VISION`), and how they are made."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
VISION = MODEL.with_name("vision_model")
