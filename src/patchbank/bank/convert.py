"""From one layout or stored dtype to another: the same keys, failures and provenance in another form."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from patchbank.bank import ezhoi
from patchbank.bank.base_writer import BankWriter, Feature
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import NotFiniteError, images_a_shard
from patchbank.bank.reader import Bank
from patchbank.bank.runs import copy_runs
from patchbank.bank.writer import bank_state, disk_bytes, existing_manifest, open_writer
from patchbank.config import Layout, StoredDtype, check_dtype
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.files import bytes_text, free_bytes
from patchbank.locations import is_remote

_AT_ONCE = 64  # features read before they are handed on


@dataclass
class Converted:
    """What a conversion did.

    Attributes:
        bank: the new bank's directory.
        manifest: what it is.
        features: written by this run.
        already_done: that were there before.
        failures: carried over: images that never had a feature.
        damaged: key -> reason, of features that could not be read, and are in the new bank neither way.
        refused: key -> reason, of features that the new dtype cannot hold.
        remaining: not reached, since it was stopped.
        bytes_written: of features.
    """

    bank: Path
    manifest: Manifest
    features: int = 0
    already_done: int = 0
    failures: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    remaining: int = 0
    bytes_written: int = 0


def convert(
    source: Bank,
    target: Path,
    layout: Layout,
    dtype: StoredDtype | None = None,
    *,
    shard_size: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> Converted:
    """Write a bank's features into another bank; what is there already, and the same, is left as it is.

    Args:
        dtype: what the new bank stores; None is float32 for pickles, which is what EZ-HOI reads, and else the source's.
        shard_size: bytes a shard holds, about.
        overwrite: start the new bank anew.
        progress: told how many features are done, of how many.
        stop: set it to end early; the same call goes on.

    Raises:
        ConfigError: int8 pickles are asked for.
        BankError: the target is the source or another bank, the disk is too small, or two keys would share a pickle.
    """
    if str(source.path) == str(target) or (
        not (is_remote(source.path) or is_remote(target))
        and source.path.resolve() in (target.resolve(), *target.resolve().parents)
    ):
        raise BankError(f"{target} is the bank itself, or in it. Give the new one a directory of its own.")
    wanted = _wanted(source.manifest, layout, dtype, shard_size)
    keys = sorted([*source, *source.failures])
    if layout == "ezhoi":
        ezhoi.check_names(keys)
    stop = stop or Event()
    existing = existing_manifest(target, overwrite=overwrite)
    there = bank_state(target, existing).done if existing else set()
    _check_disk(target, len({*keys} - there), wanted)
    with open_writer(target, wanted, keys, overwrite=overwrite) as writer:
        # What is there is read again too, last: the source may have changed since.
        missing = [key for key in keys if key not in writer.done]
        again = [key for key in keys if key in writer.done and key in source]
        todo = missing + again
        done = Converted(target, writer.manifest, already_done=len(again))
        refused: list[Failure] = []
        with ThreadPoolExecutor(thread_name_prefix="read") as threads:
            for begin in range(0, len(todo), _AT_ONCE):
                if stop.is_set():
                    done.remaining = max(0, len(missing) - begin)
                    break
                outcomes = list(threads.map(lambda key: _read(source, key), todo[begin : begin + _AT_ONCE]))
                features = [each for each in outcomes if isinstance(each, Feature) and not _there(writer, each)]
                done.already_done -= sum(feature.key in writer.done for feature in features)
                failures = [each for each in outcomes if isinstance(each, Failure) and each.key in source.failures]
                done.damaged |= {
                    each.key: each.reason
                    for each in outcomes
                    if isinstance(each, Failure) and each.key not in source.failures
                }
                refused += writer.add(features, failures)
                done.features += len(features)
                done.failures += len(failures)
                if progress:
                    progress(begin + len(outcomes), len(todo))
    copy_runs(source.path, target)
    done.refused = dict(refused)
    done.features -= len(refused)
    done.bytes_written = writer.bytes_written
    return done


def _wanted(source: Manifest, layout: Layout, dtype: StoredDtype | None, shard_size: int) -> Manifest:
    dtype = dtype or ("float32" if layout == "ezhoi" else source.dtype)
    check_dtype(layout, dtype)
    shards = layout == "shards"
    wanted = replace(
        source,
        layout=layout,
        fingerprint=source.fingerprint.stored_as(dtype),
        cls=source.cls and shards,
        shard_images=None,
    )
    return replace(wanted, shard_images=images_a_shard(wanted, shard_size)) if shards else wanted


def _read(source: Bank, key: str) -> Feature | Failure:
    """A feature of the source, once it is known to be what was written."""
    if key in source.failures:
        return Failure(key, source.failures[key])
    try:
        source.check(key)
        cls = source.cls(key) if source.manifest.cls else None
        return Feature(key, source[key], source.size(key), cls)
    except BankError as error:
        return Failure(key, str(error))


def _there(writer: BankWriter, feature: Feature) -> bool:
    try:
        return feature.key in writer.done and writer.has(feature)
    except NotFiniteError:
        return False  # adding it will say so


def _check_disk(target: Path, count: int, wanted: Manifest) -> None:
    if is_remote(target):
        return
    needed, free = disk_bytes(count, wanted), free_bytes(target)
    if needed > free:
        raise BankError(
            f"Not enough disk: the features need {bytes_text(needed)} and {target} has {bytes_text(free)} free. "
            "Free some space, choose another directory, or store them in half the space with --dtype float16."
        )
