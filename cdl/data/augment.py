"""One image: decoding, the view that is evaluated, and the random views that are trained on.

Arrays that have the size of their views get them a batch at a time, `array_views`: in NumPy one image costs as much as
dozens in one call.

An image is encoded bytes (JPEG, PNG, BMP or WebP) or a uint8 array HxWxC with C = 1 or 3. What is not RGB becomes
it: grey, 16-bit grey (its high byte), CMYK and palettes by conversion; alpha is dropped, as most loaders do. The EXIF
orientation is ignored, as in the pipelines that published ImageNet numbers come from.

Resizing is Pillow's bilinear filter, which widens with the scale (antialiased). A JPEG that is much larger than its
view is decoded at 1/2, 1/4 or 1/8 (`Image.draft`), never below twice the size that is asked for: the filter still
averages over at least two pixels, and values change by a fraction of a level of 255.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from cdl.errors import unknown

__all__ = [
    "ARRAY_VIEWS",
    "AUGMENTATIONS",
    "CROP",
    "Undecodable",
    "array_views",
    "augmentation",
    "evaluation_view",
    "resized_crop_box",
    "size_of",
    "whole_view",
]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
CROP = 0.875  # share of the shorter side that the evaluation of an encoded image keeps: 224 of 256
_DRAFT = 2  # decode a JPEG at least this many times as large as its view

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Undecodable(Exception):
    """Bytes that are no image, or not a whole one."""


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """(height, width), from the header alone.

    Raises:
      Undecodable: it has none.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    width, height = _opened(image).size
    return height, width


def evaluation_view(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """The fixed view, uint8 [size, size, 3].

    An image of this size already is left as it is. Else its shorter side is resized, to size / 0.875 if the image is
    encoded and to size if it is an array, and the centre is cropped.

    Raises:
      Undecodable: the bytes are no whole image.
    """
    height, width = size_of(image)
    if (height, width) == (size, size):
        return _rgb(image)
    shorter = size if isinstance(image, np.ndarray) else round(size / CROP)
    scale = shorter / min(height, width)
    new_height, new_width = (shorter if side == min(height, width) else int(side * scale) for side in (height, width))
    whole = (0, 0, width, height)
    resized_HxWxC = np.asarray(_resized(image, whole, (new_width, new_height)))
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized_HxWxC[top : top + size, left : left + size]


def whole_view(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """All of the image, its sides stretched to a square, uint8 [size, size, 3]. Raises as `evaluation_view`."""
    height, width = size_of(image)
    if (height, width) == (size, size):
        return _rgb(image)
    return np.asarray(_resized(image, (0, 0, width, height), (size, size)))


def unvaried(image: bytes | np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The evaluation view."""
    return evaluation_view(image, size)


def flip(image: bytes | np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The evaluation view, mirrored left to right with probability 1/2."""
    return _flipped(evaluation_view(image, size), rng)


def crop_flip(image: bytes | np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The evaluation view in a black frame of size / 8 (4 pixels for 32), a window of it anywhere, mirrored or not."""
    frame = _frame(size)
    padded_HxWxC = np.zeros((size + 2 * frame, size + 2 * frame, 3), np.uint8)  # np.pad takes as long as all the rest
    padded_HxWxC[frame:-frame, frame:-frame] = evaluation_view(image, size)
    top, left = rng.integers(0, 2 * frame + 1, 2)
    return _flipped(padded_HxWxC[top : top + size, left : left + size], rng)


def inception(image: bytes | np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random box (`resized_crop_box`) resized to the view, mirrored or not (Szegedy et al., arXiv 1409.4842)."""
    box = resized_crop_box(*size_of(image), rng)
    return _flipped(np.asarray(_resized(image, box, (size, size))), rng)


def resized_crop_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """A box with 8% to 100% of the image's area, uniform, and a ratio of 3/4 to 4/3, uniform in its logarithm.

    Drawn until it fits, ten times at most; then it is the largest box in the centre whose ratio is allowed.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(low), np.log(high)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# what `data.augment` may be
View = Callable[[bytes | np.ndarray, int, np.random.Generator], np.ndarray]
AUGMENTATIONS: dict[str, View] = {
    "none": unvaried,
    "flip": flip,
    "crop_flip": crop_flip,
    "inception": inception,
}


def augmentation(name: str) -> View:
    """(image, size, rng) -> uint8 [size, size, 3], by its name in the config.

    Raises:
      UserError: there is none of this name.
    """
    if name not in AUGMENTATIONS:
        raise unknown("data.augment", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


# of what `data.augment` may be, all that needs no resizing: the frame of a view of this size, how many ways it may face
ARRAY_VIEWS: dict[str, Callable[[int], tuple[int, int]]] = {
    "none": lambda size: (0, 1),
    "flip": lambda size: (0, 2),
    "crop_flip": lambda size: (_frame(size), 2),
}


def array_views(
    name: str, image_NxSxSxC: np.ndarray, index_B: np.ndarray, rows: slice, rng: np.random.Generator
) -> np.ndarray:
    """uint8 [rows, S, S, 3]: some rows of a batch of varied images, distributed as one by one by `augmentation(name)`.

    Args:
      name: one of `ARRAY_VIEWS`.
      image_NxSxSxC: uint8, C = 1 or 3.
      index_B: which image each row of the whole batch is.
      rows: which rows to make. They are the same whichever others are.
      rng: draws for the whole batch.
    """
    S, C = image_NxSxSxC.shape[2:]
    frame, ways = ARRAY_VIEWS[name](S)
    most_3x1 = np.array([2 * frame, 2 * frame, ways - 1])[:, None]
    top_B, left_B, mirrored_B = rng.integers(0, most_3x1, (3, len(index_B)), endpoint=True)[:, rows]
    B, W = len(top_B), S + 2 * frame
    padded_BxWxWxC = np.zeros((B, W, W, C), np.uint8)
    padded_BxWxWxC[:, frame : frame + S, frame : frame + S] = image_NxSxSxC[index_B[rows]]
    # all windows are a view of the memory; only those that are picked are copied
    image_BxSxSxC = sliding_window_view(padded_BxWxWxC, (S, S, C), axis=(1, 2, 3))[np.arange(B), top_B, left_B, 0]
    mirrored_B = mirrored_B.astype(bool)
    image_BxSxSxC[mirrored_B] = image_BxSxSxC[mirrored_B, :, ::-1]
    return image_BxSxSxC if C == 3 else image_BxSxSxC.repeat(3, axis=-1)


def _frame(size: int) -> int:
    return max(1, size // 8)


def _flipped(image_HxWxC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image_HxWxC[:, ::-1] if rng.random() < 0.5 else image_HxWxC


def _opened(image: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(image), formats=FORMATS)
    except Exception as e:  # Pillow raises a dozen types on broken files
        raise Undecodable(str(e)) from e


def _rgb(image: bytes | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return np.broadcast_to(image, (*image.shape[:2], 3))
    return np.asarray(_converted(_opened(image)))


def _resized(image: bytes | np.ndarray, box: Box, size: tuple[int, int]) -> Image.Image:
    """The box of an image at (width, height)."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(_rgb(image)).resize(size, Image.Resampling.BILINEAR, box)
    opened = _opened(image)
    width, height = opened.size
    # the least size of the whole image at which the box is _DRAFT times the view
    scale = _DRAFT * max(size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1]))
    if scale < 1:
        opened.draft(None, (int(np.ceil(width * scale)), int(np.ceil(height * scale))))
    across, down = opened.size[0] / width, opened.size[1] / height
    drawn = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return _converted(opened).resize(size, Image.Resampling.BILINEAR, drawn)


def _converted(opened: Image.Image) -> Image.Image:
    try:
        opened.load()
        if opened.mode.startswith("I"):  # 16-bit grey, of which Pillow's conversion clips all above 255
            return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
        if opened.mode == "P":  # by way of RGBA, since Pillow warns of palettes with transparency
            opened = opened.convert("RGBA")
        return opened.convert("RGB")
    except Exception as e:
        raise Undecodable(str(e)) from e
