"""Opening images: the formats that are read, and errors of one kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from patchbank.decoder_warnings import collected
from patchbank.errors import first_line
from patchbank.files import LFS_POINTER, open_regular

# Photographs that decode within the process; HEIF only if the package pillow-heif is installed. Pillow opens more: EPS
# starts Ghostscript; IPTC opens a picture of any format in it; BUFR, GRIB, HDF5, MPEG and WMF it cannot decode by
# itself; the rest are textures, icon sets, animations and measurements. TGA has no signature, and comes last.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000"),
    *("QOI", "PSD", "ICO", "PCX", "SGI", "SUN", "TGA"),
)
# Pillow does not open larger pictures; a resized one must not be larger either.
MAX_PIXELS = 2 * int(Image.MAX_IMAGE_PIXELS or 89_478_485)

logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextmanager
def open_image(content: Path | BinaryIO) -> Iterator[Image.Image]:
    """An image to read and decode within the block.

    Raises OSError alone, for what the block raises too: the system's, with its errno, or one whose text is the reason.
    A path must be a regular file's.
    """
    said: list[str] = []
    try:
        with (
            collected() as said,
            open_regular(content) if isinstance(content, Path) else nullcontext(content) as file,
            Image.open(file, formats=_formats()) as image,
        ):
            yield image
    except Exception as error:  # on damaged files, Pillow's plugins raise many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(_reason(error, content, said)) from error


@cache
def image_extensions() -> frozenset[str]:
    """The extensions of the formats that are read, in lower case."""
    known = _formats()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in known)


def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    _initialise()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _initialise() -> None:
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _reason(error: Exception, content: Path | BinaryIO, said: Sequence[str]) -> str:
    if isinstance(error, UnidentifiedImageError):
        start = _start(content)
        if start.startswith(LFS_POINTER):
            return "a Git LFS pointer, not the image: git lfs pull fetches it"
        name = _other_format(start)
        return f"{name} pictures are not read" if name else "not an image that Pillow can identify"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: more than {MAX_PIXELS:,} pixels"
    if isinstance(error, MemoryError):
        return "out of memory while decoding"
    words = isinstance(error, (OSError, SyntaxError, ValueError, NotImplementedError)) and str(error)
    more = f" ({said[-1]})" if said else ""
    return f"decoding failed: {'' if words else f'{type(error).__name__}: '}{first_line(error)}{more}"


def _start(content: Path | BinaryIO) -> bytes:
    if isinstance(content, Path):
        with open_regular(content) as file:
            return file.read(64)
    content.seek(0)
    return content.read(64)


def _other_format(start: bytes) -> str | None:
    """The format whose signature a file has, if it is not read here."""
    for name, (_, accept) in Image.OPEN.items():
        with suppress(Exception):  # of a file of few bytes
            found = accept is not None and accept(start[:16])
            if found and (name not in FORMATS or isinstance(found, str)):  # a text says that a library is missing
                return name
    return None
