"""What a plan does not check: missing images, checkpoints, `clip` packages, all disks together, the device's speed."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from patchbank import encoders
from patchbank.bank.manifest import library_versions
from patchbank.budget import ByteBudget
from patchbank.config import ExtractConfig
from patchbank.datasets import ANNOTATIONS, SPLITS, Dataset, Sample, load_dataset
from patchbank.datasets.samples import Decoded, Failure
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.defaults import auto_batch_size
from patchbank.encoders.runner import Runner
from patchbank.errors import DatasetError, PatchbankError, first_line
from patchbank.extraction.advice import auto_workers
from patchbank.extraction.devices import decide
from patchbank.extraction.plan import ExtractPlan, by_disk, check_disk
from patchbank.files import bytes_text, free_bytes, nearest_existing
from patchbank.preprocess import load

# ok: nothing to do. note: worth knowing, stops nothing. problem: an extraction would stop, or lack images.
Level = Literal["ok", "note", "problem"]

_LISTS = {name: [place for places in splits.values() for place in places] for name, splits in ANNOTATIONS.items()}
_ARCHIVES = {
    "hicodet": "Unpack hico_20160224_det.tar.gz in hicodet/.",
    "vcoco": "Unpack http://images.cocodataset.org/zips/{split}2014.zip in vcoco/mscoco2014/.",
}
_SHOWN = 3  # names of missing images
_DEPTH, _DIRECTORIES = 5, 200  # limits of the search for missing images
_SAMPLED, _DECODE_SECONDS, _ENCODE_SECONDS = 16, 0.7, 4.0  # measured for each model: images, seconds
_LONGEST = 15.0  # seconds of a pass: a batch that takes longer is measured with fewer images
_DATA = re.compile(r"(?i)(hico|coco)(?!.*_(pkl_files|shards)$)")  # directories of a root that may hold images
_exists = os.path.exists  # Path.exists raises without permission to look, and on impossible names
# OpenAI's forward keeps the [CLS] token alone; EZ-HOI's fork has this line as a comment.
_STOCK = re.compile(rb"^\s*x = self\.ln_post\(x\[:, 0", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: the thing, in a word or two: ``hicodet train``, ``ViT-B/16``, ``disk``.
        level: its state.
        text: its state in words. An error's text names the cause and the fix.
        fix: what to do, one step per line; a line that begins with ``$ `` is a command. None: nothing, or in the text.
        data: its state for programs, in JSON's types.
    """

    what: str
    level: Level
    text: str
    fix: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def refusal(what: str, error: PatchbankError | OSError, fix: str | None = None) -> Finding:
    """The problem that an error describes."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, PermissionError) and (finding := denied(what, Path(cause.filename))):
        return finding
    text = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) else str(error)
    if fix is None and "\n" in text:
        text, _, fix = text.rpartition("\n")
    return Finding(what, "problem", text, fix=fix)


def denied(what: str, path: Path) -> Finding | None:
    """The problem that this user may not read or enter a part of `path`; None if all can be read."""
    for place in reversed((path, *path.parents)):
        if _exists(place) and not os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0)):
            fix = run(shell("chmod", "u+rX", place))
            return Finding(what, "problem", f"{place}: permission denied.", fix=fix)
    return None


def shell(*words: object) -> str:
    """A command line, its words quoted for a shell."""
    return shlex.join(str(word) for word in words)


def run(*commands: str) -> str:
    """Commands, as lines of a fix."""
    return "\n".join(f"$ {command}" for command in commands)


def extract_command(root: Path, dataset: str, *options: object) -> str:
    """``patchbank extract ...`` for this root."""
    at = () if root == Path() else ("--root", root)
    return shell("patchbank", "extract", dataset, *at, *options)


def check_data(root: Path) -> tuple[list[Finding], list[Dataset]]:
    """Check the lists and images of both datasets. Also returns the splits that have at least one image."""
    findings: list[Finding] = []
    datasets: list[Dataset] = []
    for name in SPLITS:
        if not _exists(root / name):
            alone, fix = not any(_exists(root / other) for other in SPLITS), _rename(root, name)
            text = f"{root} has no {name}/.{' Is --root an EZ-HOI checkout?' if alone else ''}"
            if alone and not fix:
                fix = "Name the checkout with --root. docs/guides/ezhoi.md says which files it has."
            findings.append(Finding(name, "problem" if alone or fix else "note", text, fix=fix))
            continue
        if closed := denied(name, root / name):
            findings.append(closed)
            continue
        for split in SPLITS[name]:
            try:
                dataset = load_dataset(name, root, split)
            except (DatasetError, OSError) as error:
                fix = "\n".join(filter(None, (_rename(root, place) for place in _LISTS[name])))
                fix = fix or "Put the original list there again (see EZ-HOI's README)."
                findings.append(refusal(f"{name} {split}", error, fix))
                continue
            findings.append(denied(dataset.title, dataset.images) or _check_images(root, dataset))
            if findings[-1].data.get("found"):
                datasets.append(dataset)
    return findings, datasets


def _rename(root: Path, place: str) -> str | None:
    """The command that renames a part of `place` which exists in another case only; None if there is no such part."""
    here = root
    for part in Path(place).parts:
        if not _exists(here / part):
            found = [each for each in sorted(here.glob("*")) if each.name.lower() == part.lower()]
            return run(shell("mv", found[0], here / part)) if found else None
        here /= part
    return None


def _check_images(root: Path, dataset: Dataset) -> Finding:
    """How many listed images exist; the first names of the others, and where they may be."""
    with ThreadPoolExecutor(32) as pool:  # on a network file system, every look waits
        exist = pool.map(_exists, (sample.path for sample in dataset.samples))
        missing = [sample.key for sample, there in zip(dataset.samples, exist, strict=True) if not there]
    found, listed = len(dataset) - len(missing), f"{len(dataset):,} images in {dataset.annotations}"
    data = {"images": str(dataset.images), "listed": len(dataset), "found": found, "missing": missing[:_SHOWN]}
    if not missing:
        return Finding(dataset.title, "ok", f"all {listed} exist.", data=data)
    names = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    text = f"{found:,} of the {listed} are in {dataset.images}"
    if not _exists(dataset.images):
        text += ", a link to nothing" if dataset.images.is_symlink() else ", which does not exist"
    text += f". Missing: {len(missing):,} ({names})."
    fix = f"{_ARCHIVES[dataset.name].format(split=dataset.split)} `extract` lists missing images as failed."
    if held := _elsewhere(root, missing):
        path, key = held[0]
        name = key.rpartition("/")[2]
        text += f" {len(held):,} are in {path.parent}, such as {path.name}"
        if path.name == name:
            text += "."
            command = extract_command(root, dataset.name, "--split", dataset.split, "--images", path.parent)
            fix = (
                f"Move them to {dataset.images} (where two directories or two lists are swapped, exchange them), or "
                f"run:\n{run(command)}"
            )
        elif path.name.lower() == name.lower():
            text += f", listed as {name}."
            fix = f"Rename them as they are listed, in {dataset.images}."
        else:
            text += f", COCO 2017's name of {name}."
    return Finding(dataset.title, "problem", text, fix=fix, data=data)


def _elsewhere(root: Path, missing: Sequence[str]) -> list[tuple[Path, str]]:
    """(file, key) of the missing images in the directory below the root that holds most of them.

    Names may differ by case, or be COCO 2017's: there ``COCO_train2014_000000000009.jpg`` is ``000000000009.jpg``.
    """
    wanted = {key.rpartition("/")[2].lower(): key for key in missing}
    wanted |= {name.rpartition("_")[2]: key for name, key in wanted.items() if name.startswith("coco_")}
    best: list[tuple[Path, str]] = []
    for directory, subdirectories, files in islice(os.walk(root, followlinks=True), _DIRECTORIES):
        place = Path(directory)
        depth = len(place.relative_to(root).parts)
        subdirectories[:] = (
            [] if depth == _DEPTH else sorted(each for each in subdirectories if depth or _DATA.search(each))
        )
        held = [(place / name, wanted[name.lower()]) for name in sorted(files) if name.lower() in wanted]
        best = max(best, [each for each in held if _exists(each[0])], key=len)
    return best


def check_weights(root: Path, model: str, config: ExtractConfig) -> Finding:
    """Where a model's weights are, or how to get them."""
    try:
        if config.weights and (finding := denied(model, config.weights)):
            return finding
        spec = encoders.find(replace(config, model=model), root)
    except (PatchbankError, OSError) as error:
        return refusal(model, error)
    if found := spec.weights:
        name = encoders.known_weights(spec.identity)
        kind = f", {name}, SHA-256 checked" if name else ", your own" if config.weights else ""
        size = f" ({bytes_text(Path(found).stat().st_size)})" if Path(found).is_file() else ""
        return Finding(model, "ok", f"{found}{kind}{size}.", data={"path": found})
    urls = [source for source in spec.sources if "://" in source]
    paths = [source for source in spec.sources if source not in urls]
    if paths and (finding := denied(model, Path(paths[0]))):
        return finding
    text = f"none of {', '.join(paths)}." if paths else "not on this machine."
    if not urls:
        return Finding(model, "problem", text, fix="Give one with --weights.")
    fix = f"Without a network, put {urls[0]} at {paths[0]}." if paths else None
    return Finding(model, "note", f"{text} `extract` downloads it.", fix=fix)


def check_clip(root: Path) -> Finding:
    """The package that `import clip` gives in a script of the root. Imports nothing."""
    importlib.invalidate_caches()
    try:
        # A script's own directory comes first. The second call also asks import hooks.
        spec = PathFinder.find_spec("clip", [str(root.absolute()), *sys.path]) or importlib.util.find_spec("clip")
    except (ImportError, ValueError, OSError):  # a loaded module without a spec
        spec = None
    found = next(iter(spec.submodule_search_locations or [spec.origin or ""]), "") if spec else ""
    fork = root.absolute() / "CLIP/clip"
    data = {"location": found or None}
    if not found or os.path.realpath(found) == os.path.realpath(fork):
        text = "import clip gives EZ-HOI's fork, CLIP/clip." if found else "no clip package can be imported."
        return Finding("clip", "ok", f"{text} patchbank uses none.", data=data)
    model = Path(found, "model.py")
    if _exists(model) and _STOCK.search(model.read_bytes()):
        effect = "OpenAI's stock package: EZ-HOI's own scripts write (511,) tensors with it, without an error"
    else:
        effect = "neither OpenAI's package nor this root's fork, which EZ-HOI's own scripts need"
    fix = (
        "Put EZ-HOI's CLIP directory first on PYTHONPATH, or uninstall the package (clip, clip-anytorch, openai-clip)."
    )
    if _exists(fork):
        fix += f"\n{run(f'export PYTHONPATH={shlex.quote(str(fork.parent))}${{PYTHONPATH:+:$PYTHONPATH}}')}"
    text = f"import clip gives {found}, {effect}. patchbank uses none."
    return Finding("clip", "note", text, fix=fix, data=data)


def check_disks(plans: Sequence[ExtractPlan]) -> list[Finding]:
    """Whether each file system has room for all its banks together, and is writable."""
    findings = []
    for together in by_disk(plans):
        needed, free = sum(each.bytes_needed for each in together), free_bytes(together[0].out)
        directories = " and ".join(sorted({str(each.out.parent) for each in together}))
        data = {"bytes_needed": needed, "bytes_free": free}
        try:
            check_disk(together)
        except PatchbankError as error:
            findings.append(refusal("disk", error))
        else:
            text = f"{bytes_text(needed)} to write into {directories}, {bytes_text(free)} free."
            findings.append(Finding("disk", "ok", text, data=data))
    for place in dict.fromkeys(nearest_existing(plan.out) for plan in plans if plan.todo):
        if not os.access(place, os.W_OK | os.X_OK):
            fix = run(shell("chmod", "u+rwx", place))
            findings.append(Finding("disk", "problem", f"{place} may not be written.", fix=fix))
    return findings


def check_device(models: Sequence[EncoderSpec], config: ExtractConfig) -> Finding:
    """The devices that an extraction computes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of old drivers: the text below says that it sees no GPU
        try:
            devices = decide(config)
        except PatchbankError as error:
            return refusal("device", error)
    first, workers = devices.first, config.workers or auto_workers()
    batches = {model.name: config.batch_size or auto_batch_size(model.input.patches, first.type) for model in models}
    kind = torch.cuda.get_device_name(first) if first.type == "cuda" else f"{torch.get_num_threads()} threads"
    text = (
        f"torch {torch.__version__} on {', '.join(devices.names)} ({kind}), {config.precision}, batch size "
        f"{', '.join(f'{size} for {name}' for name, size in batches.items())}; decode threads: {workers}."
    )
    data = {"devices": [*devices.names], "batch_size": batches, "workers": workers, "versions": library_versions()}
    driver = _exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    if first.type == "cuda" or config.device != "auto" or not driver:
        return Finding("device", "ok", text, data=data)
    why = "is built without CUDA" if torch.version.cuda is None else "does not see the GPU"
    fix = "Install torch's CUDA build for the driver (https://pytorch.org/get-started/locally)."
    return Finding("device", "note", f"{text} There is an NVIDIA driver; torch {why}.", fix=fix, data=data)


def measure(plans: Sequence[ExtractPlan]) -> tuple[dict[str, tuple[float, float]], list[Finding]]:
    """The least and the most seconds per image in a long run, for each model with images to do; and the findings.

    Decoding goes on beside encoding; at worst, on the CPU, in its time.
    """
    speeds: dict[str, tuple[float, float]] = {}
    findings: list[Finding] = []
    failures: dict[str, str] = {}
    for name in dict.fromkeys(plan.config.model for plan in plans if plan.todo):
        plan, *more = (each for each in plans if each.todo and each.config.model == name)
        todo = [sample for each in (plan, *more) for sample in each.todo]
        try:
            decode, failed = _decode(plan, todo[:: -(-len(todo) // _SAMPLED)])
            images, passes = _encode(plan)
        except (PatchbankError, RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
            fix = "If memory is short: end other programs on the device, or extract with a smaller --batch-size."
            findings.append(Finding(name, "note", f"its speed is unknown: {first_line(error)}", fix=fix))
            continue
        failures.update(failed)
        workers = plan.config.workers or auto_workers()
        encode = [each / len(plan.devices.names) for each in passes]
        most = max(encode) + decode / workers if plan.devices.first.type == "cpu" else max(*encode, decode / workers)
        speeds[name] = max(min(encode), decode / workers), most
        text = (
            f"{_span(1 / each for each in speeds[name])} images/s, bound by "
            f"{'encoding' if max(encode) > decode / workers else 'decoding'}. Encoding: "
            f"{_span(1000 * each for each in passes)} ms an image in {len(passes)} passes of {images}; decoding: "
            f"{_span([1000 * decode])} ms in each of {workers} threads. A short measurement, as busy as the machine is."
        )
        data = {"encode_seconds": passes, "decode_seconds": decode, "images_a_pass": images}
        findings.append(Finding(name, "ok", text, data=data))
    for key, reason in islice(failures.items(), 1):
        text = f"{len(failures)} of the few images tried cannot be decoded: {key}: {reason}."
        fix = "Copy them again. `extract` lists each as failed."
        findings.append(Finding("images", "problem", text, fix=fix, data={"failures": failures}))
    return speeds, findings


def _decode(plan: ExtractPlan, samples: Sequence[Sample]) -> tuple[float, list[Failure]]:
    """Seconds to decode and resize an image in one thread (0 if none can be decoded), and the failures."""
    budget, taken, failures = ByteBudget(1 << 30), list[float](), list[Failure]()
    ends = time.perf_counter() + _DECODE_SECONDS
    for sample in samples:
        began = time.perf_counter()
        if began > ends:
            break
        if _exists(sample.path):  # missing ones are counted elsewhere
            result = load(sample, plan.manifest.input, budget)
            if isinstance(result, Decoded):
                taken.append(time.perf_counter() - began)
            else:
                failures.append(result)
    return median(taken) if taken else 0.0, failures


def _encode(plan: ExtractPlan) -> tuple[int, list[float]]:
    """(images per pass, seconds per image in each pass). A pass is the plan's batch, or less if that takes long.

    The weights are random: no checkpoint is needed. Raises RuntimeError if memory is short.
    """
    device, batch_size = plan.devices.first, plan.manifest.batch_size
    runner = Runner(encoders.random(plan.config), device, batch_size=batch_size)

    def one_pass(images: int) -> float:
        pixels = torch.randint(0, 256, (images, *plan.manifest.input.size, 3), dtype=torch.uint8)
        began = time.perf_counter()
        runner.submit(pixels)()
        return (time.perf_counter() - began) / images

    one_pass(1)  # loads libraries, packs weights
    one = one_pass(1)
    images = max(1, min(batch_size, int(_LONGEST / one)))
    passes: list[float] = []
    if device.type == "cuda":
        one_pass(images)  # chooses kernels
    ends = time.perf_counter() + _ENCODE_SECONDS
    while len(passes) < 2 or time.perf_counter() < ends:
        passes.append(one_pass(images))
    return images, passes


def duration(seconds: Sequence[float]) -> str:
    """The least and the most seconds, for people: ``about 3.4 to 3.9 hours``."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if max(seconds) >= 1.5 * size:
            return f"about {_span(each / size for each in seconds)} {unit}"
    return "under two minutes"


def _span(values: Iterable[float]) -> str:
    """The least and the greatest number, two digits each: ``5.1 to 5.6``."""
    least, *_, most = (float(f"{each:.2g}") for each in sorted([*values] * 2))
    return " to ".join(dict.fromkeys(f"{each:,.0f}" if each >= 10 else f"{each:g}" for each in (least, most)))
