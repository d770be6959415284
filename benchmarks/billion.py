"""What does a bank of a billion images cost, and which part fails first? Computed, not measured.

    python -m benchmarks.billion [--images 1000000000] [--bank-images 10000000] [--model ViT-B/16] [--dtype float16]

Bytes, shards, headers and requests are the code's own: shapes and dtypes of `patchbank.bank.packing`, headers of
`patchbank.bank.shard`, listings of the writer. Seconds and memory of planning and opening are scaled from
what `benchmarks.growth` measured at ten million keys. CPU-hours are those of two measured cores (constants below).

**Nothing was measured on a GPU.** Its speed is `--gpu-images-per-second`, or else an assumption: `--gpu-fraction`
of `--gpu-tflops`, the manufacturer's peak (312 TFLOP/s in bfloat16 is the A100's), by the model's operations.
Seconds of requests assume `--request-ms` each, and the code's own number of parallel requests.

Imports no torch. Prints four tables, and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import patchbank
from benchmarks.tables import print_table
from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest, stored_outputs
from patchbank.bank.packing import sample_bytes
from patchbank.bank.parts import name_part, part_size, payload_of
from patchbank.bank.storage import _HEADER, _REQUESTS
from patchbank.config import ExtractConfig, Layout, StoredDtype
from patchbank.encoders.base import flops
from patchbank.encoders.openai import OpenAISpec
from patchbank.encoders.openai.registry import MODELS, Model, get_model

# Shards, ten million keys, by `benchmarks.growth` on two cores of an Intel Xeon, torch 2.14.1, November 2026.
_KEYS = 10_000_000
OPEN_SECONDS, OPEN_MB = 53.6, 6_395  # to open, and the process that has opened
AGAIN_MB = 8_476  # `extract` at its peak, on a complete bank
PLAN_SECONDS, PLAN_KEY_BYTES = 17.9, 438  # the list and the plan; memory it holds a key
UNIT_BYTES, UNIT_IMAGES = 31_985, 634  # as a worker gets it

# Of two cores of an AMD EPYC (Zen 5), torch 2.15.0, November 2026: patchbank to shards, fp32 and bf16
# (`benchmarks.end_to_end`); milliseconds of one core to decode an image, exact and fast (`benchmarks.decode`).
CPU_IMAGES_PER_SECOND = {"ViT-B/16": (9.29, 16.3), "ViT-L/14@336px": (0.894, 1.69)}
DECODE_MS = (3.33, 2.10)

# Of the stores: keys that S3 lists at once; the part of a file that s3fs sends at once, and from how many of them on.
_LISTED, _PART, _PARTS_FROM = 1000, 50 << 20, 2


def main(arguments: Sequence[str] | None = None) -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--images", type=int, default=1_000_000_000)
    command.add_argument("--bank-images", type=int, default=_KEYS, help="of one of many banks")
    command.add_argument("--model", default="ViT-B/16")
    command.add_argument("--dtype", default="float16")
    command.add_argument("--shard-size", type=int, default=ExtractConfig().shard_size)
    command.add_argument("--gpu-images-per-second", type=float, help="of one GPU; default: the assumption")
    command.add_argument("--gpu-tflops", type=float, default=312.0)
    command.add_argument("--gpu-fraction", type=float, default=0.4)
    command.add_argument("--request-ms", type=float, default=50.0)
    command.add_argument("--image-bytes", type=int, default=100_000, help="of an input image, about")
    options = command.parse_args(arguments)
    get_model(options.model)
    tables: dict[str, list[dict[str, Any]]] = {
        "features": [
            _features(MODELS[model], dtype, options)
            for model in ("ViT-B/16", "ViT-L/14@336px")
            for dtype in ("float32", "float16", "int8")
        ],
        "gpu": [_gpu(model, options) for model in MODELS.values()],
        "cpu": [_cpu(model, options) for model in CPU_IMAGES_PER_SECOND],
        "banks": _banks(options),
    }
    for rows in tables.values():
        print_table(list(rows[0]), [list(row.values()) for row in rows])
    head = {"benchmark": "billion", "machine": "none: computed", "weights": "none"}
    versions = {"python": platform.python_version(), "patchbank": patchbank.__version__}
    print(json.dumps(head | {"versions": versions, "options": vars(options)} | tables))


def _manifest(model: Model, dtype: StoredDtype, shard_size: int, layout: Layout = "shards") -> Manifest:
    """The manifest of a model's bank; fields that do not affect a size have placeholders."""
    spec = OpenAISpec(model, "bf16")
    outputs = stored_outputs(spec.outputs, layout, dtype)
    return Manifest(
        layout=layout,
        dataset="folder",
        split=None,
        outputs=outputs,
        identity=dict(spec.identity),
        input=spec.input,
        part_size=part_size(layout, outputs, shard_size),
        batch_size=256,
        device="cuda",
        versions={},
    )


def _part_bytes(manifest: Manifest) -> int:
    """Bytes of a whole part of the index; for a shard, of its header."""
    part = Part(Path(), manifest, 0, tuple(_entries(manifest.part_size)), (), 0, 0)
    return len(name_part(payload_of(Path(), manifest.layout), part)[0])


def _entries(count: int) -> list[Entry]:
    """As of images in tars of ten thousand each: ``00000/000000000.jpg``."""
    sha256 = "0" * 64
    return [Entry(f"{number // 10_000:05}/{number:09}.jpg", (640, 480), sha256) for number in range(count)]


def _shards(manifest: Manifest, images: int) -> tuple[int, int, int]:
    """The number of shards for so many images; the bytes of a whole shard's header, and of a whole shard."""
    each = manifest.part_size
    header = _part_bytes(manifest)
    return -(-images // each), header, header + each * sample_bytes(manifest.outputs)


def _features(model: Model, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    manifest = _manifest(model, dtype, options.shard_size)
    shards, header, size = _shards(manifest, options.images)
    parts = -(-size // _PART)
    puts = shards * (parts + 2 if size >= _PARTS_FROM * _PART else 1)
    return {
        "features": f"{model.name}, {dtype}",
        "bytes per image": sample_bytes(manifest.outputs),
        "images per shard": manifest.part_size,
        "shards": shards,
        "TB": shards * size / 1e12,
        "header, bytes per image": round(header / manifest.part_size),
        "headers, GB": shards * header / 1e9,
        "puts": puts,
    }


def _gpu(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    rate = options.gpu_images_per_second or options.gpu_tflops * 1e12 * options.gpu_fraction / flops(OpenAISpec(model))
    return {
        "on a GPU, assumed": model.name,
        "GFLOP per image": flops(OpenAISpec(model)) / 1e9,
        "images/s": rate,
        "GPU-hours": round(options.images / rate / 3600),
        "cores to decode for it": rate * DECODE_MS[0] / 1e3,
        "with --decode fast": rate * DECODE_MS[1] / 1e3,
        "images read, MB/s": rate * options.image_bytes / 1e6,
    }


def _cpu(model: str, options: argparse.Namespace) -> dict[str, Any]:
    hours = [2 * options.images / rate / 3600 for rate in CPU_IMAGES_PER_SECOND[model]]
    decode = [options.images * each / 1e3 / 3600 for each in DECODE_MS]
    names = ("core-hours, fp32", "bf16", "of it decoding, exact", "fast")
    return {"on the CPU": model} | dict(zip(names, map(round, (*hours, *decode)), strict=True))


def _banks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The quantities that grow with a bank, for one bank and for many."""
    manifest = _manifest(get_model(options.model), options.dtype, options.shard_size)
    single = dict.fromkeys(("one bank", f"one of {-(-options.images // options.bank_images)} banks"))
    columns = dict(
        zip(single, (_bank(manifest, size, options) for size in (options.images, options.bank_images)), strict=True)
    )
    names = list(next(iter(columns.values())))
    return [
        {f"{options.model}, {options.dtype}": name} | {each: columns[each][name] for each in columns} for name in names
    ]


def _bank(manifest: Manifest, images: int, options: argparse.Namespace) -> dict[str, Any]:
    shards, header, _ = _shards(manifest, images)
    listing = -(-shards // _LISTED)
    requests = shards * (3 if header > _HEADER else 2)  # its size; its beginning; what of the header is longer
    pickles = _manifest(get_model(options.model), "float32", options.shard_size, "ezhoi")
    line = _part_bytes(pickles) / pickles.part_size
    share = images / _KEYS
    return {
        "images": images,
        "files in the directory": shards,
        "... as pickles": images,
        "the driver's memory for the plan, GB": images * PLAN_KEY_BYTES / 1e9,
        "... of a run that finds it complete, GB": AGAIN_MB * share / 1e3,
        "reading the list and planning, s": PLAN_SECONDS * share,
        "opening: header bytes read, GB": shards * header / 1e9,
        "... s, on a disk": OPEN_SECONDS * share,
        "... memory, GB": OPEN_MB * share / 1e3,
        "... requests to a store": requests + listing,
        "... s for these": requests * options.request_ms / 1e3 / _REQUESTS + listing * options.request_ms / 1e3,
        "requests to list it once": listing,
        "listings while it is written": math.floor(math.log2(shards)) + 1,
        "... requests for them, at most": sum(
            -(-min(2**step, shards) // _LISTED) for step in range(shards.bit_length())
        ),
        "... and with one at each commit": shards * (shards + _LISTED) // (2 * _LISTED),
        "a cluster's units": -(-images // (span := _span(manifest))),
        "... sent to workers, GB": images / UNIT_IMAGES * UNIT_BYTES / 1e9,
        "... images of one, done again if a worker dies": span,
        "pickles' index, GB": images * line / 1e9,
    }


def _span(manifest: Manifest) -> int:
    """Images per unit, as in `patchbank.extraction.work.units_of`."""
    atom = manifest.part_size
    return atom * max(1, 1024 // atom)


if __name__ == "__main__":
    main()
