"""A bank's features as files for other programs. Written whole or not at all; the bank is not changed."""

from __future__ import annotations

import json
import os
import re
from collections import ChainMap
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from patchbank.bank.check import Progress
from patchbank.bank.convert import refuse_shared
from patchbank.bank.formats import FACTS, FORMATS, MARK, RESERVED, VERSION, Batch, Contents, Format, Row, is_hdf5_export
from patchbank.bank.reader import Bank
from patchbank.bank.writer import check_room
from patchbank.config import ExportFormat, StoredDtype
from patchbank.errors import BankError, ConfigError, install
from patchbank.files import fsync_directory, parse_json, sync_file, whole_directory, whole_file
from patchbank.locations import is_remote
from patchbank.regions import GRID_CUT, Region

_BATCH = 32_000_000  # bytes of features that are read and then written; more only if one sample has more
_FACTS = 1024  # approximate bytes of what else is known of a sample, in memory
_ABOUT = "_manifest.json"  # readers of a directory of Parquet files pass over names with an underscore


@dataclass
class Exported:
    """What an export did.

    Attributes:
        place: the file, or the directory.
        to: its format.
        dtype: of its features.
        outputs: name -> shape of one sample.
        features: number of samples in it.
        failures: number of images without a feature in the bank.
        left_out: key -> reason, of features that are damaged, or that the format or the dtype cannot hold; with the
            places of files, which the export itself does not name.
        files: number of files.
        bytes_written: their size.
    """

    place: Path
    to: ExportFormat
    dtype: str
    outputs: dict[str, tuple[int, ...]]
    features: int = 0
    failures: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    files: int = 0
    bytes_written: int = 0


def export(
    source: Bank,
    target: Path,
    to: ExportFormat,
    dtype: StoredDtype | None = None,
    *,
    shard_size: int,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a bank's features for other programs; docs/guides/exporting.md says what is in the files.

    Every feature is compared with its checksum. The same bank gives the same bytes. Nothing remains of an interrupted
    export, and the next one starts from scratch. Memory is bounded by a batch of `_BATCH` bytes and the bank's index.

    Args:
        dtype: ``float32`` or ``float16``; None is the bank's, if it is one of these, and else float32.
        shard_size: approximate bytes of a file, where there are several.
        outputs: those to keep, in this order; none keeps all.
        overwrite: replace what another export wrote.
        progress: called with the numbers of samples done, and of all.

    Raises:
        ConfigError: a package is missing, or the dtype cannot be written.
        BankError: the target exists, is a URL, shares the source's directory or cannot be written; the bank has no
            features, or lacks an output; the disk is too small.
    """
    made = source.manifest
    dtype = dtype or ("float16" if made.dtype == "float16" else "float32")
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"--dtype {dtype}: --to {to} writes float32 or float16: give one of these, or leave it out.")
    form = FORMATS[to]
    if form.package:
        try:
            import_module(form.package)
        except ImportError:
            raise ConfigError(f"--to {to} needs {form.package}: {install(form.extra)}") from None
    refuse_shared(source.path, target)
    _check_target(target, form, overwrite)
    if outputs:
        made = made.with_outputs([source.output_name(name) for name in outputs])
    made = made.stored_as(made.layout, dtype)
    if wrong := [name for name in made.outputs if name in RESERVED or not re.fullmatch(r"\w[\w:-]*", name)]:
        raise BankError(f"The output {wrong[0]!r} cannot name a file or a column: choose others with --output.")
    facts = ["size", *(["scale", "offset"] if made.input.cut in ("", GRID_CUT) else [])]
    facts += ["box", *Region._fields[1:]] if made.input.cut else []
    shapes = {name: each.shape for name, each in made.outputs.items()}
    done = Exported(target, to, dtype, shapes, failures=len(source.failures))
    failures = ChainMap(dict[str, str](), source.failures)  # what is added is in the first
    about = {"format": MARK, "version": VERSION, "dtype": dtype, "shapes": shapes, "grid": made.grid}
    about |= {"cell": made.input.cell, "manifest": msgspec.to_builtins(made)}
    contents = Contents(shapes, dtype, tuple(facts), about, failures)
    keys = [*(source.in_order() if made.input.cut else source)]
    size = np.dtype(dtype).itemsize * sum(map(prod, shapes.values()))
    stored = size + form.overhead * (len(shapes) + 1)
    check_room(target, len(keys) * stored, "directory")

    def batches() -> Iterator[Batch]:
        a_file, at_once = max(1, shard_size // stored), rows_at_once(size)
        with ThreadPoolExecutor(thread_name_prefix="check") as threads:
            for first in range(0, len(keys), a_file):
                last = min(first + a_file, len(keys))
                for begin in range(first, last, at_once):
                    end = min(begin + at_once, last)
                    batch = _read(source, keys[begin:end], contents, first // a_file, failures, done.left_out, threads)
                    done.features += len(batch.rows)
                    if batch.rows:
                        yield batch
                    if progress:
                        progress(end, len(keys))

    try:
        with (whole_file if form.single else whole_directory)(target, replace=overwrite) as place:
            form.write(place, contents, batches())
            if not done.features:
                reason = next(iter(ChainMap(done.left_out, source.failures).values()), "it is empty")
                raise BankError(f"{source.path} has no feature to export ({reason}); nothing was written.")
            names = [] if form.single else sorted(each.name for each in place.iterdir())
            if names:
                about |= {"failures": dict(failures), "files": names}
                (place / _ABOUT).write_text(json.dumps(about, indent=1))
            written = [place / name for name in (*names, _ABOUT)] if names else [place]
            done.files, done.bytes_written = len(names) or 1, sum(map(sync_file, written))
            _check_target(target, form, overwrite)  # again: another process may have written there
        fsync_directory(target.resolve().parent)
    except OSError as error:
        where = error.filename or target
        raise BankError(f"{where} cannot be written: {error.strerror or error}. Nothing was written.") from error
    return done


def rows_at_once(size: int) -> int:
    """How many samples of `size` bytes are read at once."""
    return max(1, _BATCH // (size + _FACTS))


def _check_target(target: Path, form: Format, overwrite: bool) -> None:
    """Raise BankError for a place that an export cannot be written to."""
    if is_remote(target):
        raise BankError(f"{target}: exports are written to a local path; copy them to the store then.")
    if not os.path.lexists(target) or (not form.single and target.is_dir() and not any(target.iterdir())):
        return
    if target.is_dir() == form.single:
        what = "a directory; name a file, such as bank.h5" if form.single else "a file; name a directory"
        raise BankError(f"{target} is {what}.")
    if not overwrite:
        raise BankError(f"{target} exists. --overwrite replaces it; else choose another.")
    if foreign := _foreign(target):
        raise BankError(
            f"{foreign} is not of an export, so that --overwrite does not replace it. Choose another, or remove it."
        )


def _foreign(target: Path) -> Path | None:
    """What no export wrote: a file, or the first such file in a directory; None if there is nothing."""
    if not target.is_dir():
        return None if is_hdf5_export(target) else target
    try:
        about = parse_json((target / _ABOUT).read_bytes())
        own = {_ABOUT, *about["files"]} if about["format"] == MARK else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    return next((each for each in sorted(target.iterdir()) if each.name not in own), None)


def _read(
    source: Bank,
    keys: Sequence[str],
    contents: Contents,
    file: int,
    failures: MutableMapping[str, str],
    left_out: dict[str, str],
    threads: ThreadPoolExecutor,
) -> Batch:
    """The batch of these samples; those that cannot be written are added to `failures` and `left_out`."""
    import torch

    def defect(key: str) -> tuple[str, str]:
        try:
            key.encode()
            source.check(key)
        except UnicodeEncodeError:
            return "its key is not UTF-8", ""
        except BankError as error:  # its text names this machine's files
            return "damaged: it is not what was written, or cannot be read", str(error)
        return "", ""

    found = dict(zip(keys, threads.map(defect, keys), strict=True))
    sound = [key for key, (reason, _) in found.items() if not reason]
    for key, (reason, details) in found.items():
        if reason:
            failures[key], left_out[key] = reason, details or reason
    dtype = getattr(torch, contents.dtype)
    outputs: dict[str, NDArray[Any]] = {
        name: source.batch(sound, name, dtype=dtype).numpy() for name in contents.outputs
    }
    if contents.dtype == "float16" and sound:  # else it holds what the bank does
        finite = np.all([np.isfinite(each).reshape(len(sound), -1).all(1) for each in outputs.values()], axis=0)
        if not finite.all():
            for key in [key for key, fine in zip(sound, finite, strict=True) if not fine]:
                failures[key] = left_out[key] = "its features are too large for float16"
            sound = [key for key in sound if key not in left_out]
            outputs = {name: each[finite] for name, each in outputs.items()}
    return Batch(file, [_row(source, key, contents.facts) for key in sound], outputs)


def _row(source: Bank, key: str, facts: Sequence[str]) -> Row:
    size, region = source.size(key), source.region(key) or Region()
    transform = source.transform(key) if size and "scale" in facts else None
    box = region.box or (size and (0, 0, *size))
    known = region._asdict() | {"box": box, "size": size}
    known |= {"scale": transform and transform.scale, "offset": transform and transform.offset}
    return {"key": key} | {name: known[name] for name in FACTS if name in facts}
