"""Images are opened in one place: no format starts a program, and every error is of one kind."""

from __future__ import annotations

import ast
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from patchbank.bank.reader import open_bank
from patchbank.bank.runs import read_runs
from patchbank.budget import ByteBudget
from patchbank.datasets import load_dataset
from patchbank.datasets.samples import Failure, image_size
from patchbank.decoder_warnings import Warned
from patchbank.encoders.openai.registry import MEAN, STD
from patchbank.errors import DatasetError
from patchbank.features import Input
from patchbank.images import FORMATS, image_extensions, open_image
from patchbank.preprocess import load
from patchbank.show import gallery, showing
from patchbank.transform import ImageTransform
from tests.support import patchbank_process, photograph, photographs, sample
from tests.test_house import MODULES

INPUT = Input(size=(32, 32), patch=8, mean=MEAN, std=STD)
BUDGET = ByteBudget(1 << 30)
TRANSFORM = ImageTransform(30, 20, "center-crop", (32, 32), 8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\n{ } loop\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Ghostscript on the PATH. It leaves the file that this returns."""
    trace = tmp_path / "trace"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho run >> {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


def test_no_image_starts_a_program(tmp_path: Path, ghostscript: Path) -> None:
    (tmp_path / "eps").mkdir()
    path = tmp_path / "eps/a.jpg"
    path.write_bytes(EPS)
    reason = "EPS pictures are not read"
    assert load(sample("a.jpg", path.parent), INPUT, BUDGET) == Failure("a.jpg", reason)
    with pytest.raises(OSError, match=reason), open_image(io.BytesIO(EPS)):  # a member of a tar, a row of a table
        pass
    with pytest.raises(DatasetError, match=rf"a\.jpg cannot be opened: {reason}\."):
        showing.image_of("a.jpg", path, None, TRANSFORM)
    shown: dict[str, list[str]] = {"notes": []}
    gallery._add_picture(shown, sample("a.jpg", path.parent), TRANSFORM)
    assert shown["notes"] == [f"The image cannot be opened: {reason}."]
    assert image_size(path) is None
    path.rename(path.with_name("a"))
    with pytest.raises(DatasetError, match="no images"):
        load_dataset("folder", path.parent)
    assert not ghostscript.exists()
    with pytest.raises(OSError), Image.open(path.with_name("a")) as image:
        image.load()
    assert ghostscript.exists()  # Pillow itself would have run it


def test_heic_is_read_where_its_package_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(photograph("chelsea")).save(tmp_path / "a.heic")
    assert [each.key for each in load_dataset("folder", tmp_path).samples] == ["a.heic"]
    found = load(sample("a.heic", tmp_path), INPUT, BUDGET)
    assert not isinstance(found, Failure) and found.size == photograph("chelsea").size


def test_images_are_opened_in_one_place() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        if name != "patchbank.images"
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and ast.unparse(node).endswith("Image.open"))
        or (isinstance(node, ast.alias) and node.name in ("open", "PIL", "PIL.Image", "ImageFile"))
    ]
    assert not wrong


def test_formats_that_pillow_cannot_decode_by_itself_are_not_read() -> None:
    Image.init()
    stubs = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
    assert stubs <= set(Image.OPEN) and stubs.isdisjoint(FORMATS)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm"} <= image_extensions()
    assert image_extensions().isdisjoint({".eps", ".ps", ".wmf", ".emf", ".fits", ".h5", ".mpg", ".grib", ".iim"})


def test_one_picture_in_every_format_is_read(tmp_path: Path) -> None:
    picture = photograph("coffee").resize((40, 30))
    for extension in ("jpg", "png", "webp", "tif", "bmp", "gif", "ppm", "jp2", "dib", "pcx", "sgi", "tga"):
        picture.save(tmp_path / f"a.{extension}")
        with open_image(tmp_path / f"a.{extension}") as image:
            assert image.convert("RGB").size == (40, 30)
        assert f".{extension}" in image_extensions()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _broken_png() -> bytes:
    """Pillow raises a SyntaxError where its second chunk of pixels should begin."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(stream, "PNG")
    content = stream.getvalue()
    begin = content.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", content[begin : begin + 4])
    pixels = content[begin + 8 : begin + 8 + length]
    return content[:begin] + _chunk(b"IDAT", pixels[: length // 2]) + b"\0" * 40


def _broken_tiff() -> bytes:
    stream = io.BytesIO()
    photograph("coffee").resize((30, 20)).save(stream, "TIFF", compression="tiff_deflate")
    content = bytearray(stream.getvalue())
    content[12:60] = bytes(48)
    return bytes(content)


@pytest.mark.parametrize("content", [_broken_png(), _broken_tiff()], ids=["png", "tiff"])
def test_damage_is_one_kind_of_error_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    found = load(sample("a.png", tmp_path), INPUT, BUDGET)
    assert isinstance(found, Failure) and found.reason.startswith("decoding failed: "), found
    with pytest.raises(DatasetError, match=r"a\.png cannot be opened: decoding failed: "):
        showing.image_of("a.png", path, None, TRANSFORM)


@pytest.mark.parametrize("error", [NotImplementedError("pixel format 3"), KeyError(7), RuntimeError(), MemoryError()])
def test_whatever_a_decoder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    photograph("coffee").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: fails())
    assert image_size(tmp_path / "a.png") is None
    with pytest.raises(OSError) as caught, open_image(tmp_path / "a.png"):
        pass
    assert caught.value.errno is None and str(caught.value)


@pytest.mark.parametrize("workers", ["1", "4"])
def test_warnings_of_decoders_are_counted_and_not_printed(tmp_path: Path, tiny_weights: Path, workers: str) -> None:
    photographs(tmp_path / "images", 2)
    Image.new("1", (9_500, 9_500)).save(tmp_path / "images/large.png")  # Pillow warns of so many pixels
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255).convert("1")
    for name, compression in (("fax1", "group4"), ("fax2", "group4"), ("zip", "tiff_adobe_deflate")):
        noise.save(tmp_path / "whole.tif", compression=compression)
        content = bytearray((tmp_path / "whole.tif").read_bytes())
        for place in range(40, len(content) - 200, 23):
            content[place] ^= 0x5A
        (tmp_path / f"images/{name}.tif").write_bytes(content)
    arguments = ("extract", "folder", tmp_path / "images", "--model", "tiny", "--weights", tiny_weights)
    done = patchbank_process(*arguments, "--out", tmp_path / "bank", "--workers", workers, check=1)
    assert "Warning: " not in done.stderr and "site-packages" not in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("Fax4Decode")]
    text = " ".join(done.stderr.split())
    assert "3 images were read, but the decoder warned: " in text
    assert "Fax4Decode: Bad code word at line N of strip N (x N): 2 images, such as fax" in text
    assert "(ZIPDecode: Decoding error at scanline 0" in open_bank(tmp_path / "bank").failures["zip.tif"]
    [run] = read_runs(tmp_path / "bank")
    assert any("Fax4Decode" in line and "2 images, such as fax" in line for line in run.warnings)
    assert any("DecompressionBomb" not in line and line.endswith("1 image, such as large.png") for line in run.warnings)


def test_outside_of_patchbank_decoders_warn_as_ever(tmp_path: Path) -> None:
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")
    program = (
        "import sys; from PIL import Image; from patchbank.images import open_image; from pathlib import Path\n"
        "with open_image(Path(sys.argv[1])): pass\n"
        "for _ in range(3): Image.open(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "large.png"], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("DecompressionBombWarning") == 1


def test_kinds_of_warnings_are_bounded_and_their_texts_escaped() -> None:
    warned, other = Warned(), Warned()
    for number in range(1500):
        (warned if number % 2 else other).add(f"{number}\x1b.jpg", [f"kind{number}\x1b[31m"])
    warned.merge(other)
    assert warned.images == sum(warned.counts.values()) == 1500
    assert len(warned.counts) == 1001 and warned.counts["other warnings"] == 500
    assert warned.lines()[0].startswith("other warnings: 500 images, such as ")
    assert len(warned.lines()) == 20 and all(line.isprintable() for line in warned.lines())
