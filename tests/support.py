"""What the tests share: a tiny CLIP, photographs of every kind, made-up EZ-HOI roots, and the program."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import numpy as np
import PIL
import pytest
import torch
from packaging.version import Version
from PIL import Image
from rich.console import Console
from skimage import data
from torch import Tensor
from typer.main import get_command

from patchbank.bank import parts
from patchbank.bank.index import Part
from patchbank.bank.manifest import Manifest
from patchbank.cli import console, main
from patchbank.cli.application import app
from patchbank.config import Activation, ExtractConfig
from patchbank.datasets import Dataset, Sample
from patchbank.datasets.samples import Failure
from patchbank.datasets.sources import Directory
from patchbank.encoders import FAMILIES
from patchbank.encoders.openai import OpenAISpec
from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.encoders.tower import VisionTransformer
from patchbank.errors import PatchbankError
from patchbank.extraction.devices import Devices
from patchbank.extraction.plan import describe
from patchbank.extraction.progress import Progress
from patchbank.files import scratch_directory

# As small as CLIP's architecture allows (one head is 64 wide); 16 patch tokens of 32 dimensions.
TINY = Model(
    name="tiny",
    bank_prefix="cliptiny",
    file_name="tiny.pt",
    sha256="0" * 64,
    input_size=32,
    patch_size=8,
    width=64,
    layers=2,
    output_dim=32,
)
TINY_VOCABULARY = 64

REPOSITORY = Path(__file__).parents[1]


def tiny_manifest(layout: str = "ezhoi", dtype: str = "float32") -> Manifest:
    """What a bank of the tiny model's features of a folder is."""
    config = ExtractConfig(model="tiny", dtype=dtype, layout=layout, batch_size=4)  # type: ignore[arg-type]
    dataset = Dataset("folder", None, Path("images"), ())
    made = describe(dataset, layout, config, Devices(("cpu",)), OpenAISpec(TINY))  # type: ignore[arg-type]
    return replace(made, part_size=100) if layout == "shards" else made


def tower_of(
    model: Model,
    parameters: Mapping[str, Tensor],
    activation: Activation = "quickgelu",
    dtype: torch.dtype = torch.float32,
    request: ExtractConfig = ExtractConfig(),  # noqa: B008
) -> VisionTransformer:
    """A model's image tower, its layers not packed."""
    spec = OpenAISpec(model, request=request)
    return VisionTransformer(parameters, spec.input, spec.outputs, dtype, heads=model.heads, activation=activation)


def all_tokens(outputs: Mapping[str, Tensor]) -> Tensor:
    """[CLS] and the patch tokens: (B, 1 + N, D)."""
    return torch.cat([outputs["cls"].unsqueeze(1), outputs["patch_tokens"]], dim=1)


def sample(key: str, directory: Path, position: int = 0) -> Sample:
    """An image of a directory."""
    return Sample(key, Directory(directory), position)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


@cache
def photograph(name: str) -> Image.Image:
    """One of scikit-image's bundled photographs, as RGB."""
    return Image.open(next(Path(data.__file__).parent.glob(f"{name}.*"))).convert("RGB")


def photographs(directory: Path, count: int, size: tuple[int, int] = (120, 90), prefix: str = "photo") -> list[str]:
    """Write `count` different JPEGs, crops of photographs, into `directory`; returns their names."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = [photograph(name) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    names = []
    for number in range(count):
        source = sources[number % len(sources)]
        width, height = size if number % 3 else size[::-1]
        left, top = (number * 7) % (source.width - width), (number * 5) % (source.height - height)
        name = f"{prefix}_{number:04}.jpg"
        source.crop((left, top, left + width, top + height)).save(directory / name, quality=90)
        names.append(name)
    return names


def every_kind(directory: Path) -> list[str]:
    """Write a photograph in every kind of file the original scripts can open; returns their names, of unique stems."""
    directory.mkdir(parents=True, exist_ok=True)
    colour, cat, coffee = photograph("astronaut"), photograph("chelsea"), photograph("coffee")
    grey = colour.convert("L")
    mask = Image.fromarray(np.tile(np.linspace(0, 255, cat.width).astype(np.uint8), (cat.height, 1)))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 3)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the camera was held upright
    transparent = cat.quantize(32)
    transparent.info["transparency"] = 3

    def save(image: Image.Image, name: str, **options: object) -> None:
        image.save(directory / name, **options)
        names.append(name)

    names: list[str] = []
    save(colour, "baseline.jpg", quality=90)
    save(coffee, "progressive.jpg", quality=85, progressive=True)
    save(grey, "grey_jpeg.jpg")
    save(coffee.convert("CMYK"), "cmyk_jpeg.jpg")
    save(coffee, "exif_rotated.jpg", exif=rotated)
    save(coffee.resize((800, 600)), "odd_subsampling.jpg", subsampling="4:1:1")
    save(cat, "colour.png")
    save(cat.quantize(64), "palette.png")
    save(transparent, "palette_transparent.png")
    save(Image.merge("RGBA", (*cat.split(), mask)), "rgba.png")
    save(Image.merge("LA", (cat.convert("L"), mask)), "la.png")
    save(grey.convert("1"), "one_bit.png")
    save(deep, "sixteen_bit.png")
    save(grey, "grey.png")
    save(colour.crop((0, 200, 400, 203)), "three_pixels_high.png")
    save(colour.crop((100, 0, 102, 500)), "two_pixels_wide.png")
    save(colour.crop((100, 100, 101, 101)), "one_pixel.png")
    save(colour.resize((224, 224)), "exact_224.png")
    save(colour.resize((336, 336)), "exact_336.png")
    save(cat, "bitmap.bmp")
    save(cat, "gif.gif")
    save(coffee, "webp.webp", quality=80)
    if Version(PIL.__version__) >= Version("13"):  # earlier ones cannot read the YCbCr TIFF that they wrote
        save(cat.convert("YCbCr"), "ycbcr.tif")
    save(cat.convert("LAB"), "lab.tif")
    save(deep, "sixteen_bit_tiff.tif")
    save(Image.fromarray(np.asarray(grey).astype(np.float32)), "float.tif")
    save(cat.convert("CMYK"), "cmyk_tiff.tif")
    return names


def flat_pictures(directory: Path, side: int = 224) -> list[str]:
    """Write pictures of one colour or two, whose features differ most between ways of rounding; returns their names."""
    halves = Image.new("RGB", (side, side))
    halves.paste((255, 255, 255), (0, 0, side // 2, side))
    pictures = {"black.png": Image.new("RGB", (side, side)), "half_black_half_white.png": halves}
    pictures["mean_colour.png"] = Image.new("RGB", (side, side), (123, 117, 104))  # CLIP's
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(directory / name)
    return list(pictures)


def hico_list(names: Iterable[str]) -> list[dict[str, object]]:
    """HICO-DET's list; every second image has no pair."""
    return [
        {
            "file_name": name,
            "img_id": number,
            "annotations": [{"bbox": [1, 2, 30, 40], "category_id": 1}, {"bbox": [5, 6, 50, 60], "category_id": 4}],
            "hoi_annotation": [{"subject_id": 0, "object_id": 1, "category_id": 73, "hoi_category_id": 153}]
            * (number % 2),
        }
        for number, name in enumerate(names)
    ]


def vcoco_dict(names: Iterable[str]) -> dict[str, object]:
    """V-COCO's dict."""
    annotations = [{"boxes_h": [], "boxes_o": [], "actions": [], "objects": [], "file_name": name} for name in names]
    return {"annotations": annotations, "classes": [], "objects": [], "images": [], "action_to_object": []}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def hico_root(root: Path, count: int = 6, *, splits: Sequence[str] = ("train", "test")) -> Path:
    """An EZ-HOI root with HICO-DET's directories and lists, `count` photographs a split."""
    for split in splits:
        names = photographs(root / f"hicodet/hico_20160224_det/images/{split}2015", count, prefix=f"HICO_{split}2015")
        stem = {"train": "trainval", "test": "test"}[split]
        write_json(root / f"hicodet/{stem}_hico.json", hico_list(names))
    return root


# Of each picture of `pairs_root`: its pairs, as indices of _THINGS and a verb; the fourth has none.
PAIRS = {
    "z.jpg": [(0, 1, 73), (0, 2, 5), (3, 1, 73)],
    "b.jpg": [(0, 4, 5), (3, 2, 73), (0, 1, 9)],  # the first object's box has no area
    "m.jpg": [(3, 5, 9)],  # the object's box is half outside
    "none.jpg": [],
    "a.jpg": [(0, 1, 73), (0, 4, 9)],
}
_THINGS = [
    ([1, 2, 30, 40], 1),
    ([5, 6, 50, 60], 4),
    ([20, 10, 80, 60], 4),
    ([40.5, 3.25, 70, 55], 1),
    ([9, 9, 9, 30], 2),
    ([60, 10, 180, 60], 2),
]


def pairs_root(root: Path) -> Path:
    """An EZ-HOI root with HICO-DET's training split: `PAIRS`, of which two regions cannot be extracted."""
    images = root / "hicodet/hico_20160224_det/images/train2015"
    photographs(images, len(PAIRS), (120, 90))
    for path, name in zip(sorted(images.iterdir()), PAIRS, strict=True):
        Image.open(path).crop((0, 0, 120, 90)).save(images / name)
        path.unlink()
    things = [{"bbox": box, "category_id": category} for box, category in _THINGS]
    listed = [
        {
            "file_name": name,
            "img_id": number,
            "annotations": things,
            "hoi_annotation": [
                {"subject_id": human, "object_id": thing, "category_id": verb, "hoi_category_id": 2 * verb}
                for human, thing, verb in pairs
            ],
        }
        for number, (name, pairs) in enumerate(PAIRS.items())
    ]
    write_json(root / "hicodet/trainval_hico.json", listed)
    return root


def vcoco_root(root: Path, count: int = 6) -> Path:
    """The same with V-COCO's."""
    for split, stem in (("train", "trainval"), ("val", "test")):
        names = photographs(root / f"vcoco/mscoco2014/{split}2014", count, prefix=f"COCO_{split}2014")
        write_json(root / f"vcoco/instances_vcoco_{stem}.json", vcoco_dict(names))
    return root


def command(*arguments: object, tiny: bool = True) -> list[str]:
    """The command line of `patchbank ...`; with `tiny`, of one that knows the model ``tiny`` too."""
    module = "tests.tiny_program" if tiny else "patchbank"
    return [sys.executable, "-m", module, *map(str, arguments)]


def unprivileged() -> list[str]:
    """What precedes the command line of a process that cannot override permissions, as a superuser's can."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("a superuser may enter everything, and there is no setpriv here")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


Done = subprocess.CompletedProcess[str]


def patchbank(
    *arguments: object, tiny: bool = True, check: int | None = None, directory: Path = REPOSITORY, **options: object
) -> Done:
    """Run `patchbank ...` within this process, in a directory; with `check`, assert that it exits with that code.

    It prints what a process prints whose output is a pipe. A warning is an error, and an exception that the program
    does not expect is raised. With options of a process, such as `env`, it is one: see `patchbank_process`.
    """
    if options:  # libraries read some variables once, as they are imported
        return patchbank_process(*arguments, tiny=tiny, check=check, **options)
    line = command(*arguments, tiny=tiny)
    with _as_in_a_process(line, tiny, directory) as (stdout, stderr):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
            assert isinstance(code, int), code
        finally:
            PatchbankError.flags = False  # as in every other process that calls the library
    return _checked(Done(line, code, stdout.getvalue(), stderr.getvalue()), check)


def patchbank_process(*arguments: object, tiny: bool = True, check: int | None = None, **options: object) -> Done:
    """Run `patchbank ...` as a fresh process, which takes seconds: where the process is the point of a test.

    Many processes, or some that meet with signals: `tests.faults.processes`.
    """
    done = subprocess.run(command(*arguments, tiny=tiny), cwd=REPOSITORY, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    return _checked(done, check)


def _checked(done: Done, code: int | None) -> Done:
    if code is not None:
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    return done


class _Pipe(io.TextIOWrapper):
    """A standard stream that keeps what is written to it."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, "utf-8", write_through=True)

    def getvalue(self) -> str:
        return self._bytes.getvalue().decode()


@contextlib.contextmanager
def _as_in_a_process(line: list[str], tiny: bool, directory: Path) -> Iterator[tuple[_Pipe, _Pipe]]:
    """Directory, arguments, streams and models as a fresh process finds them; what the program changes is undone."""
    streams = _Pipe(), _Pipe()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(directory))
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS="80"))  # no terminal's width
        stack.enter_context(mock.patch.dict(MODELS))
        stack.enter_context(
            mock.patch.multiple(sys, argv=["patchbank", *line[3:]], stdout=streams[0], stderr=streams[1])
        )
        for each in (console.stdout, console.stderr):
            stack.enter_context(mock.patch.dict(vars(each), vars(Console(highlight=False, stderr=each.stderr))))
        if not tiny:
            del MODELS[TINY.name]
        try:
            yield streams
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def parse_line(line: str) -> None:
    """Parse a line of shell with `patchbank ...` as the program does, without running it."""
    text = line[line.index("patchbank ") :].partition(" > ")[0].replace("BUCKET", "bucket")
    if text.count("'") % 2:  # it is quoted for another program
        text = text.rpartition("'")[0]
    words = shlex.split(text, comments=True)[1:]
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def contents(directory: Path) -> dict[str, str]:
    """Every file of a bank, by relative name, with the SHA-256 of its bytes; but not what it says of its runs."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.parent != directory / "runs"
    }


def parts_in(directory: Path) -> list[Path]:
    """The parts of a bank's index, in order: its shards, or the files in ``index/``."""
    payload = parts.find_payload(directory)
    return [payload.parts.directory / name for name in parts.part_names(payload)] if payload else []


def read_part(path: Path) -> Part:
    """A part of a bank's index."""
    bank = path.parent if path.suffix == ".safetensors" else path.parent.parent
    payload = parts.payload_of(bank, "shards" if path.suffix == ".safetensors" else "ezhoi")
    return parts.read_part(payload, path.name)


def abandoned_scratch(directory: Path) -> Path:
    """Make a scratch directory as a killed process of this host leaves it."""
    with scratch_directory(directory) as live:
        name = live.name
    (directory / name).mkdir()
    (directory / name / "lock").touch()
    return directory / name


def no_leftovers(directory: Path) -> bool:
    """Whether nothing temporary lies in a bank."""
    return not list(directory.glob(".*"))


class OnBatch(Progress):
    """A run's progress: calls a function with every batch's numbers."""

    def __init__(self, function: Callable[[int, Sequence[Failure]], object]) -> None:
        self.advance = function  # type: ignore[assignment]


class SecondLook(Event):
    """A stop that is set when the pipeline looks for the second time."""

    _looks = 0

    def is_set(self) -> bool:
        self._looks += 1
        return self._looks > 1


torch.set_num_threads(2)  # the same on every machine the tests run on


@pytest.fixture(scope="module", autouse=True)
def toy_is_known() -> Iterator[None]:
    """The toy family by its name, in modules that import this fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", "tests.toy_family")
        yield
