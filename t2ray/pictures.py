"""Pictures as files: their format, their size and their pixels. Pillow is imported when there is a picture. No torch.

Not here: what a model makes of one (`t2ray.models.processor`).
"""

from __future__ import annotations

import io
from typing import Any

from t2ray.core import ConfigError, Image
from t2ray.store import Store

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""What a picture may be, as Pillow calls it. No other format's reader sees a byte."""


def opened(image: Image) -> Any:
    """Returns Pillow's image of a picture, of which only the head is read: `format` and `size` are known.

    Raises:
        ConfigError: it is no picture of these formats, or has so many pixels that it can only be meant to do harm.
        ResourceError: its file cannot be read.
    """
    from PIL import Image as Pillow

    where, data = image.path or "a picture", image.data
    if image.path:
        folder, slash, name = image.path.rpartition("/")
        store = Store(folder or slash or ".")
        if not store.exists(name):
            raise ConfigError(f"{where}: there is no such file")
        data = store.read_bytes(name)
    try:
        return Pillow.open(io.BytesIO(data), formats=FORMATS)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise ConfigError(f"{where}: {error}") from None
    except (OSError, ValueError, SyntaxError):
        raise ConfigError(f"{where} of {len(data):,} bytes is no {', '.join(FORMATS)} file") from None


def drawn(width: int, height: int) -> Image:
    """Returns a picture to try a model with: a disc on a slope of grey."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    ground = Pillow.linear_gradient("L").resize((width, height)).convert("RGB")
    ImageDraw.Draw(ground).ellipse((width // 4, height // 4, width // 2, height * 3 // 4), fill="red")
    out = io.BytesIO()
    ground.save(out, "PNG")
    return Image(data=out.getvalue())


def rgb(image: Image) -> Any:
    """Returns a picture's pixels as Pillow's image in RGB: turned as its camera says, and on white where it has none.

    Of one that moves, it is the first frame.

    Raises:
        ConfigError, ResourceError: as `opened`; or its pixels are broken.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    found = opened(image)
    try:
        turned = ImageOps.exif_transpose(found)
        if not turned.has_transparency_data:
            return turned.convert("RGB")
        ground = Pillow.new("RGBA", turned.size, "white")
        ground.alpha_composite(turned.convert("RGBA"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's readers raise for broken files
        raise ConfigError(f"{image.path or 'a picture'}: its {found.format} file is broken: {error}") from None
    return ground.convert("RGB")
