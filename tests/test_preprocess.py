"""Pixels equal OpenAI's own preprocessing, bit for bit; unreadable files become failures."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip.clip import _transform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from patchbank.budget import ByteBudget
from patchbank.datasets.samples import Decoded, Failure
from patchbank.encoders.openai.registry import MEAN, STD
from patchbank.errors import first_line
from patchbank.features import Input
from patchbank.preprocess import load, load_all, preprocess
from tests.support import REPOSITORY, every_kind, photograph, sample

BUDGET = ByteBudget(1 << 30)


def square(side: int, **changes: Any) -> Input:
    """CLIP's input with this side."""
    return Input(size=(side, side), patch=16, mean=MEAN, std=STD, **changes)


CLIP, FAST = square(224), square(224, decoder="fast")


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """The encoder's normalisation."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255).sub_(mean).div_(std)


@pytest.mark.parametrize("size", [224, 336])
def test_every_kind_of_picture_gives_openais_pixels(tmp_path: Path, size: int) -> None:
    reference = _transform(size)
    for name in every_kind(tmp_path):
        with Image.open(tmp_path / name) as image:
            expected = reference(image)
        found = load(sample(name, tmp_path), square(size), BUDGET)
        assert isinstance(found, Decoded), found
        assert torch.equal(normalised(found.pixels), expected), name


@settings(max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([32, 224]))
def test_any_size_gives_openais_pixels(width: int, height: int, size: int) -> None:
    image = photograph("coffee").resize((width, height), Image.Resampling.NEAREST)
    assert torch.equal(normalised(preprocess(image, square(size))), _transform(size)(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["center-crop", "squash"])
def test_the_centre_of_a_larger_size_is_torchvisions(tmp_path: Path, mode: Any, interpolation: Any) -> None:
    wanted = square(224, resize=mode, interpolation=interpolation, cover=(256, 256), rgb="first")
    reference = transforms.Compose(
        [
            transforms.Resize(256 if mode == "center-crop" else (256, 256), InterpolationMode(interpolation)),
            transforms.CenterCrop(224),
        ]
    )
    for name in every_kind(tmp_path):
        with Image.open(tmp_path / name) as image:
            expected = np.asarray(reference(image.convert("RGB")))
        found = load(sample(name, tmp_path), wanted, BUDGET)
        assert isinstance(found, Decoded), found
        assert np.array_equal(found.pixels, expected), name


@settings(max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700))
def test_a_cut_rounded_down_is_that_of_transformers(width: int, height: int) -> None:
    image = photograph("coffee").resize((width, height), Image.Resampling.NEAREST)
    seen = np.asarray(transforms.Resize(37, InterpolationMode.BILINEAR)(image))
    top, left = (seen.shape[0] - 32) // 2, (seen.shape[1] - 32) // 2
    wanted = square(32, cover=(37, 37), crop="down", interpolation="bilinear")
    assert np.array_equal(preprocess(image, wanted), seen[top : top + 32, left : left + 32])


def test_another_mode_shows_the_whole_image() -> None:
    wanted = square(64, cover=(80, 80))
    assert wanted.resized_by(None) == wanted.resized_by("center-crop") == wanted
    assert wanted.resized_by("squash") == square(64, resize="squash")
    image = photograph("coffee")
    assert np.array_equal(preprocess(image, wanted, "squash"), np.asarray(image.resize((64, 64), 3)))


@settings(max_examples=40)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(["squash", "pad"]))
def test_the_whole_image_fits_in_the_other_modes(width: int, height: int, mode: str) -> None:
    pixels = preprocess(Image.new("RGB", (width, height), "white"), square(64), mode)
    assert pixels.shape == (64, 64, 3)
    white = (pixels == 255).all(axis=2)
    fill = (pixels == [123, 117, 104]).all(axis=2)
    assert (white | fill).all()
    if mode == "squash":
        assert white.all()
    else:
        rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
        assert max(len(rows), len(columns)) == 64
        for seen in (rows, columns):  # centred
            assert abs(seen[0] - (63 - seen[-1])) <= 1


def _bomb() -> bytes:
    """A PNG of a few bytes whose header claims 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _jpeg() -> bytes:
    stream = io.BytesIO()
    photograph("astronaut").save(stream, "JPEG")
    return stream.getvalue()


def broken_files(directory: Path) -> dict[str, str]:
    """Files that cannot be extracted, and a word of each reason."""
    stream = io.BytesIO()
    photograph("astronaut").save(stream, "PNG")
    files = {
        "truncated.jpg": (_jpeg()[:9000], "truncated"),
        "header_only.jpg": (_jpeg()[:40], "truncated"),
        "truncated_png.png": (stream.getvalue()[:20_000], "truncated"),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"this is no image\n" * 50, "identify"),
        "html.jpg": (b"<!DOCTYPE html><html>404 Not Found</html>", "identify"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        "bomb.png": (_bomb(), "too large"),
    }
    for name, (content, _) in files.items():
        (directory / name).write_bytes(content)
    return {name: word for name, (_, word) in files.items()}


def test_what_cannot_be_read_becomes_a_failure_with_its_reason(tmp_path: Path) -> None:
    words = broken_files(tmp_path)
    (tmp_path / "directory.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("1", (100_000, 20)).save(tmp_path / "elongated.png")
    words |= {"directory.jpg": "not a regular file", "pipe.jpg": "not a regular file", "elongated.png": "elongated"}
    words |= {"missing.jpg": "missing"}
    for name, word in words.items():
        first, second = (load(sample(name, tmp_path), CLIP, BUDGET) for _ in range(2))
        assert isinstance(first, Failure), name
        assert first.key == name
        assert word in first.reason.lower(), first
        assert first == second  # the index's bytes depend on it
        assert str(tmp_path) not in first.reason
        assert "0x" not in first.reason


def test_several_inputs_of_one_picture_are_as_each_alone(tmp_path: Path) -> None:
    """Of every kind of picture, in any order; what some inputs cannot take fails for these alone."""
    Image.new("RGB", (40_000, 4)).save(tmp_path / "elongated.png")
    inputs = [
        *(CLIP, FAST, square(336)),
        *(square(64, resize="pad", rgb="white"), square(48, resize="squash", rgb="first", interpolation="bilinear")),
    ]
    inputs.append(square(32, interpolation="none"))  # an error of one input, whatever the picture
    for name in (*every_kind(tmp_path), "elongated.png", *broken_files(tmp_path)):
        one = sample(name, tmp_path)
        alone = {each: load(one, each, BUDGET) for each in inputs}
        for order in (inputs, inputs[::-1]):
            for each, [found] in load_all({each: [one] for each in order}, BUDGET).items():
                expected = alone[each]
                if isinstance(expected, Failure):
                    assert found == expected
                else:
                    assert isinstance(found, Decoded) and found.size == expected.size, name
                    assert np.array_equal(found.pixels, expected.pixels), name
    assert isinstance(load(sample("elongated.png", tmp_path), CLIP, BUDGET), Failure)
    assert isinstance(load(sample("elongated.png", tmp_path), inputs[-2], BUDGET), Decoded)


def test_unreadable_for_want_of_permission(tmp_path: Path) -> None:
    path = tmp_path / "locked.jpg"
    path.write_bytes(_jpeg())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert load(sample("locked.jpg", tmp_path), CLIP, BUDGET) == Failure("locked.jpg", "Permission denied")


def test_the_budget_bounds_what_is_held_at_once() -> None:
    budget, held, most = ByteBudget(100), 0, 0
    lock = threading.Lock()

    def hold(size: int) -> None:
        nonlocal held, most
        for _ in range(200):
            with budget.reserve(size):
                with lock:
                    held += size
                    most = max(most, held)
                with lock:
                    held -= size

    threads = [threading.Thread(target=hold, args=(size,)) for size in (30, 40, 50, 60, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 100
    with budget.reserve(10**12):  # larger than the budget: it waits for all of it
        pass


def test_a_picture_is_decoded_within_the_budget(tmp_path: Path) -> None:
    photograph("coffee").save(tmp_path / "coffee.png")
    held: list[int] = []

    class Watched(ByteBudget):
        def acquire(self, size: int) -> int:
            held.append(size)
            return super().acquire(size)

    budget = Watched(1 << 30)
    assert isinstance(load(sample("coffee.png", tmp_path), CLIP, budget), Decoded)
    assert held == [8 * (600 * 400 + 336 * 224)]
    assert budget.acquire(1 << 30) == 1 << 30  # all of it was given back


_DECODE_MANY = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from patchbank.budget import ByteBudget, keep_freed_memory
from patchbank.datasets.samples import Decoded
from patchbank.preprocess import load
from tests.test_preprocess import CLIP, sample

place, threads, keep = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "command"
if keep:
    keep_freed_memory()
names = sorted(path.name for path in place.iterdir())
load(sample("small.jpg", place), CLIP, ByteBudget(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
budget = ByteBudget(256 << 20)
with ThreadPoolExecutor(threads) as pool:
    found = list(pool.map(lambda name: load(sample(name, place), CLIP, budget), names * (2 * threads)))
assert all(isinstance(each, Decoded) for each in found)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not GNU's")
@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("kind", ["library", "command"])
def test_the_process_holds_no_more_than_the_budget(tmp_path: Path, threads: int, kind: str) -> None:
    for name, side in (("large", 5000), ("middle", 2500), ("small", 700)):
        Image.new("RGB", (side, side), (90, 120, 30)).save(tmp_path / f"{name}.jpg")
    command = [sys.executable, "-c", _DECODE_MANY, str(tmp_path), str(threads), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1.25 * (256 << 20)


def test_reasons_hold_no_addresses_and_one_line() -> None:
    error = ValueError("cannot read <_io.BytesIO object at 0x7f3a5c1d2e30>: bad header\nand more")
    assert first_line(error) == "cannot read: bad header"
    assert first_line(ValueError()) == "ValueError"


def test_fast_decoding_differs_by_little_and_only_of_rgb(tmp_path: Path) -> None:
    rgb = 0
    for name in every_kind(tmp_path):
        with Image.open(tmp_path / name) as image:
            colours, size = image.mode == "RGB", image.size
        for mode in ("center-crop", "squash", "pad"):
            exact = load(sample(name, tmp_path), replace(CLIP, resize=mode), BUDGET)
            fast = load(sample(name, tmp_path), replace(FAST, resize=mode), BUDGET)
            assert isinstance(exact, Decoded) and isinstance(fast, Decoded)
            assert (fast.size, fast.pixels.shape, fast.pixels.dtype) == (size, (224, 224, 3), np.uint8)
            difference = np.abs(fast.pixels.astype(int) - exact.pixels)
            assert difference.max() <= 2 * colours, name
            assert (difference > 0).mean() < (0.02 if min(size) > 10 else 0.2), name  # more where it is magnified
            rgb += difference.max()
    assert rgb > 10  # it is another resizing


def test_fast_decoding_fails_where_exact_decoding_does(tmp_path: Path) -> None:
    for name in broken_files(tmp_path):
        exact = load(sample(name, tmp_path), CLIP, BUDGET)
        assert load(sample(name, tmp_path), FAST, BUDGET) == exact
        assert isinstance(exact, Failure)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pixels_do_not_depend_on_the_inputs_made_before(tmp_path: Path) -> None:
    """A PNG whose transparency follows its pixels: Pillow knows of it when they are read."""
    stream = io.BytesIO()
    photograph("chelsea").quantize(8).save(stream, "PNG")
    content, kind = stream.getvalue(), b"tRNS" + bytes([0, 0, 0, 0, 255, 255, 255, 255])
    end = content.rindex(b"IEND") - 4
    chunk = struct.pack(">I", 8) + kind + struct.pack(">I", zlib.crc32(kind))
    (tmp_path / "late.png").write_bytes(content[:end] + chunk + content[end:])
    late, inputs = sample("late.png", tmp_path), [square(32, rgb=each) for each in ("last", "white", "first")]
    for order in (inputs, inputs[::-1]):
        together = load_all({each: [late] for each in order}, BUDGET)
        for each in inputs:
            [found], alone = together[each], load(late, each, BUDGET)
            assert isinstance(found, Decoded) and isinstance(alone, Decoded)
            assert np.array_equal(found.pixels, alone.pixels), each.rgb


def test_an_input_may_be_stated_in_lists() -> None:
    assert hash(Input(size=[32, 48], patch=16, mean=[0, 0, 0], std=[1, 1, 1])) == hash(  # type: ignore[arg-type]
        Input(size=(32, 48), patch=16, mean=(0, 0, 0), std=(1, 1, 1))
    )
