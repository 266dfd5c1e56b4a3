# SPDX-License-Identifier: Apache-2.0
"""Pictures in, `data:` URIs out, so that a report is one file."""

import base64
import io

import numpy as np
from PIL import Image


def jpeg_uri(image: Image.Image, quality: int = 82) -> str:
    """The image as a data: URI in JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def png_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4] as a data: URI in PNG, with a palette where there are at most 256 colours."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.mode == "RGBA":
        image = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
