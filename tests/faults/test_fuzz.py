"""Every reader of files against files that somebody damaged or made up: hundreds for each reader, from fixed seeds.

A reader runs in a process of its own. Whatever it reads, it raises a PatchbankError or gives its documented failure,
takes little memory and processor time, and leaves no file outside of its directory.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import tarfile
import traceback
import zipfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from patchbank import extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.bank.convert import convert
from patchbank.bank.runs import read_runs
from patchbank.bank.unpickling import read_pickle
from patchbank.budget import ByteBudget
from patchbank.config import ExtractConfig
from patchbank.encoders.openai.checkpoints import activation_of, load_state
from patchbank.errors import PatchbankError
from patchbank.features import Input
from patchbank.preprocess import load
from tests.faults.processes import server
from tests.support import every_kind, hico_list, photographs, sample, vcoco_dict, write_json

pytestmark = pytest.mark.full

SEEDS = 500  # of each reader
MEMORY = 256 << 20  # bytes beyond those that the process held before
SECONDS = 30  # of the processor's time, for one file
LARGEST = 4 << 20  # bytes of a document
INPUT = Input(size=(32, 32), patch=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

DEEP = "<deep>"  # stands for lists within lists
NAMES = [
    "",
    "../../x",
    "/proc/self/cwd/x",
    "..",
    "a\0b",
    "\x1b[31m",
    "\ud800",
    "x" * 300,
    "x" * 100_000,
    "a/" * 2000,
    DEEP,
]
WRONG: list[Any] = [
    *(0, -1, 1, 2**31, 2**53, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan"), True, None, [], {}, [[]], [0]),
    *NAMES,
]


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        each = left.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        found += [(each, key) for key, _ in items]
        left += [inner for _, inner in items]
    return found


def other_document(rng: Random, document: Any, only: str = "") -> bytes:
    """A JSON document with some values replaced, removed or repeated: in one of its fields, or anywhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        if not (places := places_in(document[only] if only else document)):
            break
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1:
                other, its = rng.choice(places)
                container[key] = copy.deepcopy(other[its])
            case 2 if isinstance(container, list):
                container += [container[key]] * rng.choice([1, 1000])
            case 3 if isinstance(container, dict):
                container[rng.choice(NAMES)] = container.pop(key)
            case _:
                container[key] = copy.deepcopy(rng.choice(WRONG))
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(document).replace(json.dumps(DEEP), deep).encode()[:LARGEST]


def other_bytes(rng: Random, content: bytes) -> bytes:
    """A file with some bytes flipped, removed, repeated or replaced; or cut short."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        end = len(changed)
        # Headers lie at the beginning or the end.
        place = rng.choice([rng.randrange(end or 1), rng.randrange(min(end, 200) or 1), end - 1 - rng.randrange(400)])
        place = max(place, 0)
        stop = place + rng.choice([1, 2, 4, 8, 50])
        match rng.randrange(10):
            case 0:
                del changed[place:]
            case 1:
                del changed[place:stop]
            case 2:
                changed[place:place] = changed[place:stop] * rng.choice([1, 100])
            case 3:
                changed[place:stop] = rng.choice([b"\0", b"\xff", b"\x7f", b"9"]) * (stop - place)
            case 4:
                changed[place:stop] = struct.pack("<q", rng.choice([-1, 2**31 - 1, 2**40, 2**62, 0, 1]))
            case 5 if numbers := [*re.finditer(rb"\d+", changed[:4096])]:
                number = rng.choice(numbers)
                changed[slice(*number.span())] = b"%d" % rng.choice([-1, 0, 2**31, 2**63, 10**30])
            case _ if place < end:
                changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def other_json(rng: Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other_document(rng, json.loads(content)) if rng.random() < 0.8 else other_bytes(rng, content))


def framed(header: bytes, rest: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + rest


def read_header(content: bytes) -> tuple[Any, bytes]:
    """A safetensors file's header, and what is behind it."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


# The readers. Each one changes a file in a directory of its own, and reads it.


def read_bank(rng: Random, place: Path, only: str = "") -> None:
    """Every feature, all checks, and a conversion to pickles, whose names are the keys. The part's name is its hash."""
    bank = place / rng.choice(["shards", "ezhoi"])
    part = rng.choice(sorted([*bank.glob("*.safetensors"), *bank.glob("index/*")]))
    content = part.read_bytes()
    if not only and rng.random() < 0.3:
        content = other_bytes(rng, content)
    elif part.suffix == ".json":
        content = other_document(rng, json.loads(content), only)
    else:
        header, rest = read_header(content)
        document = header["__metadata__"]["patchbank"]
        header["__metadata__"]["patchbank"] = other_document(rng, json.loads(document), only).decode()
        content = framed(json.dumps(header).encode(), rest)
    hashed = content
    if part.suffix != ".json" and len(content) > 8:
        hashed = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    name = re.sub("[0-9a-f]{16}", hashlib.sha256(hashed).hexdigest()[:16], part.name)
    part.unlink()
    part.with_name(name).write_bytes(content)
    with suppress(PatchbankError):
        verify(bank)
    opened = open_bank(bank)
    for key in opened:
        for read in (opened.__getitem__, opened.grid, opened.size, opened.transform, opened.file, opened.checksum):
            with suppress(PatchbankError):
                read(key)
    convert(opened, place / "converted", "ezhoi", shard_size=10_000)


def read_log(rng: Random, place: Path) -> None:
    [log] = (place / "shards/runs").iterdir()
    other_json(rng, log)
    read_runs(place / "shards")


def read_third_party(rng: Random, place: Path) -> None:
    path = rng.choice(sorted((place / "pickles").iterdir()))
    path.write_bytes(other_bytes(rng, path.read_bytes()))
    read_pickle(path)


def read_checkpoint(rng: Random, place: Path) -> None:
    """And open_clip's config beside it."""
    path, config = (
        rng.choice(sorted((place / "checkpoints").glob("*.[ps]*"))),
        place / "checkpoints/open_clip_config.json",
    )
    content = path.read_bytes()
    if content.startswith(b"PK") and rng.random() < 0.7:  # inside of the archive, whose checksums are right again
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = rng.choice([each for each in entries if not re.search(r"/data/\d", each)])
        entries[name] = other_bytes(rng, entries[name])
        if rng.random() < 0.2:
            entries[rng.choice(NAMES).encode(errors="replace").decode()[:60_000]] = entries.pop(name)
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, each in entries.items():
                archive.writestr(name or "x", each)
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        header, rest = read_header(content)
        path.write_bytes(framed(other_document(rng, header), rest))
    else:
        path.write_bytes(other_bytes(rng, content))
    other_json(rng, config)
    with suppress(PatchbankError):
        load_state(path, "visual.")
    activation_of(path)


def read_annotations(rng: Random, place: Path) -> None:
    path = rng.choice(sorted((place / "annotations").iterdir()))
    other_json(rng, path)
    dataset = load_dataset("hicodet", place, "train", images=place / "images", annotations=path)
    for each in dataset.samples[:10]:
        dataset.target(each.key)


def read_archive(rng: Random, place: Path, kind: str) -> None:
    """A tar or a table, and its images."""
    path = rng.choice(sorted((place / "archives").glob(f"*.{kind}")))
    content = path.read_bytes()
    if kind == "tar" and rng.random() < 0.7:  # a header whose checksum is right
        start = rng.choice([each.start() - 257 for each in re.finditer(b"ustar", content)])
        header = bytearray(content[start : start + 512])
        first, size = rng.choice([(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (345, 155)])
        values = [
            *(name.encode(errors="replace") for name in NAMES),
            b"\x80" + b"\xff" * 11,
            b"7" * 11,
            b"-1",
            *b"LxS1",
        ]
        value = rng.choice([each if isinstance(each, bytes) else bytes([each]) for each in values])
        header[first : first + size] = value[:size].ljust(size, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(content[:start] + header + content[start + 512 :])
    else:
        path.write_bytes(other_bytes(rng, content))
    for each in load_dataset(kind, path).samples:
        load(each, INPUT, ByteBudget(MEMORY))


def read_image(rng: Random, place: Path) -> None:
    path = rng.choice(sorted((place / "kinds").iterdir()))
    path.write_bytes(other_bytes(rng, path.read_bytes()))
    load(sample(path.name, path.parent), INPUT, ByteBudget(MEMORY))


READERS: dict[str, tuple[Any, list[str]]] = {  # with the directories of the examples
    "bank": (read_bank, ["shards", "ezhoi"]),
    "manifest": (partial(read_bank, only="manifest"), ["shards", "ezhoi"]),
    "run log": (read_log, ["shards"]),
    "pickle": (read_third_party, ["pickles"]),
    "checkpoint": (read_checkpoint, ["checkpoints"]),
    "annotations": (read_annotations, ["annotations", "images"]),
    "tar": (partial(read_archive, kind="tar"), ["archives"]),
    "parquet": (partial(read_archive, kind="parquet"), ["archives"]),
    "image": (read_image, ["kinds"]),
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> Path:
    """Valid files of each kind."""
    place = tmp_path_factory.mktemp("examples")
    names = photographs(place / "images", 3, size=(40, 30))
    for layout in ("shards", "ezhoi"):
        config = replace(tiny_config, layout=layout, shard_size=2 * 2176)  # type: ignore[arg-type]
        extract(load_dataset("folder", place / "images"), place / layout, config)
    pickles, checkpoints, archives = (place / name for name in ("pickles", "checkpoints", "archives"))
    for directory in (pickles, checkpoints, archives):
        directory.mkdir()

    for protocol in (0, 2, 4):
        (pickles / f"{protocol}_clip.pkl").write_bytes(pickle.dumps(torch.randn(4, 8)[1:], protocol))

    state = {"visual.conv1.weight": torch.randn(4, 3, 2, 2), "visual.ln_post.bias": torch.randn(3).half()}
    torch.save({"epoch": 3, "state_dict": state}, checkpoints / "zip.pt")
    torch.save(state, checkpoints / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, checkpoints / "plain.safetensors")
    shutil.copy(str(tiny_config.weights), checkpoints / "scripted.pt")
    vision = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 64}}, "preprocess_cfg": {"size": 32}}
    write_json(checkpoints / "open_clip_config.json", vision)

    boxes = {"boxes_h": [[1, 1, 5, 5]], "boxes_o": [[2, 2, 9, 9]]}
    vcoco: Any = vcoco_dict(names)
    vcoco["annotations"][0] |= boxes | {"actions": [0], "objects": [2]}
    vcoco |= {"classes": ["hold"], "objects": ["background", "person", "cup"], "action_to_object": [[1, 2]]}
    upt = {"filenames": names[:1], "annotation": [boxes | {"object": [0], "verb": [0], "hoi": [0]}], "size": [[40, 30]]}
    upt |= {"objects": ["cup"], "verbs": ["hold"], "correspondence": [[0, 0, 0]]}
    for name, document in (("hico", hico_list(names)), ("vcoco", vcoco), ("upt", upt)):
        write_json(place / f"annotations/{name}.json", document)

    images = [(place / "images" / name).read_bytes() for name in names]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(archives / f"{form}.tar", "w", format=form) as tar:
            for number, image in enumerate(images):
                member = tarfile.TarInfo(f"{'long' * 40 * (number == 1)}{number}.jpg")
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
    structs = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)]
    table, write = pyarrow.table({"image": structs, "label": [1, 2, 3]}), pyarrow.parquet.write_table
    for compression in ("none", "snappy", "zstd", "gzip", "brotli", "lz4"):
        write(table, archives / f"{compression}.parquet", compression=compression, row_group_size=2)
    delta = {"image.path": "DELTA_BYTE_ARRAY", "image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}
    options = {"use_dictionary": False, "column_encoding": delta, "data_page_version": "2.0"}
    write(table, archives / "delta.parquet", **options)

    every_kind(place / "kinds")
    for path in (place / "kinds").iterdir():
        with Image.open(path) as picture:
            if picture.mode in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK"):
                picture.resize((40, 30)).save(path)
    return place


def fuzz(reader: str, seeds: range, examples: Path, place: Path) -> None:
    """In a process of its own: read one file for each seed. A file `problem` in the place says what went wrong."""
    torch.set_num_threads(1)
    os.chdir(place)
    problem, work = place / "problem", place / "outer/inner"
    read, used = READERS[reader]

    def most() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for seed in seeds:
        shutil.rmtree(work.parent, ignore_errors=True)
        for name in used:
            shutil.copytree(examples / name, work / name)
        problem.write_text(f"seed {seed}: it ended the process, or took more than {SECONDS} s")
        before = most()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        wrong = ""
        try:
            read(Random(seed), work)
        except PatchbankError as error:
            str(error).encode(errors="backslashreplace")
        except BaseException:
            wrong = traceback.format_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if most() - before > MEMORY:
            wrong = f"it took {most() - before:,} bytes"
        if {*place.iterdir()} != {work.parent, problem} or [*work.parent.iterdir()] != [work]:
            wrong = "it wrote outside of its directory"
        if wrong:
            problem.write_text(f"seed {seed}: {wrong}")
            os._exit(1)


@pytest.mark.parametrize("reader", READERS)
def test_damaged_and_hostile_files(reader: str, examples: Path, tmp_path: Path) -> None:
    process = server().Process(target=fuzz, args=(reader, range(SEEDS), examples, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "problem").read_text()
