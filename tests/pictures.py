"""Pictures for tests."""

from __future__ import annotations

import io

from PIL import Image as Pillow

from t2ray.core import Image


def picture(width: int, height: int, seed: int = 0, format: str = "PNG") -> Image:
    """Noise of that size."""
    noise = bytes((seed * 97 + i * 31 + (i * i) % 193) % 256 for i in range(width * height * 3))
    out = io.BytesIO()
    Pillow.frombytes("RGB", (width, height), noise).save(out, format)
    return Image(data=out.getvalue())
