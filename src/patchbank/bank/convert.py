"""A new bank from another one, in another layout or stored dtype, or from third-party pickles.

The source is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from patchbank.bank.check import KINDS, Finding, Progress, Report, SizeOf, examined, shape_defect, verify
from patchbank.bank.manifest import Manifest
from patchbank.bank.parts import find_payload, part_size, payload_of
from patchbank.bank.payload import Feature
from patchbank.bank.pickles import check_names, key_of, pickle_name
from patchbank.bank.reader import Bank
from patchbank.bank.reduction import Reducer, fit, one_thread
from patchbank.bank.removal import place_of, removable
from patchbank.bank.runs import copy_runs
from patchbank.bank.writer import BankWriter, bank_state, check_room, disk_bytes, existing_manifest, gone_on_with
from patchbank.config import Layout, StoredDtype, check_dtype
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError, ConfigError
from patchbank.features import GRID
from patchbank.locations import filesystem, is_remote

_AT_ONCE = 64  # features that are read and then written


@dataclass
class Converted:
    """What a conversion did.

    Attributes:
        bank: the new bank's directory.
        manifest: what it is.
        features: number of features written by this run.
        already_done: number of features that the new bank had before.
        failures: number of failures carried over: images without a feature.
        damaged: key -> reason, of features that could not be read; the new bank does not list them.
        refused: key -> reason, of features that the new dtype cannot hold.
        remaining: number of features not reached before the run was stopped.
        bytes_written: of features.
        kept: why ``overwrite`` did not replace the old bank; empty if it did.
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
    kept: str = ""


def convert(
    source: Bank,
    target: Path,
    layout: Layout,
    dtype: StoredDtype | None = None,
    *,
    shard_size: int,
    outputs: Sequence[str] = (),
    components: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    fitting: Progress | None = None,
    stop: Event | None = None,
) -> Converted:
    """Write a bank's features into another bank; features that it already holds stay as they are.

    Args:
        dtype: the new bank's stored dtype; None is float32 for pickles, as EZ-HOI reads, and the source's for shards.
        shard_size: approximate bytes of a shard.
        outputs: those to keep, in this order; none keeps all.
        components: reduce the main output, and all of its space, to so many principal components.
        overwrite: start the new bank from scratch; it replaces the target's bank when it is complete.
        progress: called with the numbers of features done, and of all.
        fitting: likewise, while principal components are computed.
        stop: set it to end early; the same call continues.

    Raises:
        ConfigError: pickles cannot store int8, other outputs than patch tokens, reduced features, or regions.
        BankError: the source does not store an output, is reduced already, or has too few features for so many
            components; the target shares the source's directory or is another bank, the disk is too small, or two keys
            would share a pickle.
    """
    refuse_shared(source.path, target)
    dtype = dtype or ("float32" if layout == "ezhoi" else source.manifest.dtype)
    check_dtype(layout, dtype)
    made = source.manifest
    if outputs:
        made = made.with_outputs([source.output_name(name) for name in outputs])
    if layout == "ezhoi" and made.input.cut:
        raise ConfigError("Pickles are EZ-HOI's, of whole images: use --layout shards for regions.")
    if layout == "ezhoi" and (components is not None or made.reduction is not None):
        raise ConfigError("Pickles store features of the model's own width: use --layout shards for reduced ones.")
    wanted, new, reducer = made.stored_as(layout, dtype), None, source.reducer if made.reduction else None
    if components is not None:
        existing = existing_manifest(target, overwrite=overwrite)
        place = payload_of(place_of(target, overwrite), layout).parts
        known = (place, existing.reduction) if existing and existing.reduction else None
        if (new := fit(source, made, components, fitting, stop, known)) is None:
            return Converted(target, made, remaining=len(source) + len(source.failures))
        wanted, reducer = new.reduced(wanted), new
    wanted = replace(wanted, part_size=part_size(layout, wanted.outputs, shard_size))

    def read(key: str) -> Feature | Failure:
        if key in source.failures:
            return Failure(key, source.failures[key])
        try:
            source.check(key)
            outputs = {name: source.output(key, name) for name in wanted.outputs}
            if new is not None:
                outputs |= {name: new(outputs[name].float()) for name in new.made.outputs}
            return Feature(key, outputs, source.size(key), source.region(key))
        except BankError as error:
            return Failure(key, str(error))

    # Regions stay in the dataset's order; images are sorted, whatever layout they come from.
    keys = [*source.in_order(), *source.failures] if made.input.cut else sorted([*source, *source.failures])
    with one_thread() if new is not None else nullcontext():
        return transfer(
            target, wanted, keys, read, set(source.failures), overwrite, progress, stop, source.path, reducer
        )


@dataclass
class Imported:
    """What an import did.

    Attributes:
        written: what was written of them.
        fixed: findings about pickles that needed a change; their tensors are sound.
        left_out: findings about unusable pickles and about listed images without one. The new bank lists them as
            failures, except for pickles of no listed image: nothing could make them again.
    """

    written: Converted
    fixed: list[Finding] = field(default_factory=list)
    left_out: list[Finding] = field(default_factory=list)


def import_pickles(
    source: Path,
    target: Path,
    wanted: Manifest,
    listed: Sequence[str] | None = None,
    *,
    size_of: SizeOf = lambda _: None,
    confirm: Callable[[Report], Manifest] | None = None,
    models_with: Callable[[tuple[int, ...]], Sequence[str]] = lambda _: (),
    overwrite: bool = False,
    progress: Progress | None = None,
    writing: Progress | None = None,
    stop: Event | None = None,
) -> Imported:
    """Make a bank of third-party pickles. They are read as data: nothing that they name runs.

    Args:
        source: a directory of pickles as EZ-HOI's scripts write them.
        wanted: the new bank's manifest.
        listed: the expected keys. None: keys are the file names without suffix, since the images' extensions are
            unknown.
        size_of: sizes of the images; without them boxes cannot be mapped.
        confirm: returns the final manifest from the report on the pickles; raises to write nothing.
        models_with: names of models whose patch tokens have a shape, for a message.
        overwrite: as in `convert`.
        progress, writing: called with the numbers of pickles checked or written, and of all.
        stop: set it to end early; the same call continues.

    Raises:
        BankError: there is no usable pickle, or none of a listed image; a file cannot be read at the moment; or as
            `convert`.
    """
    refuse_shared(source, target)
    if find_payload(source) is not None:
        raise BankError(f"{source} is a bank of patchbank already. `patchbank convert` makes another of it.")
    report = verify(source, listed, progress, expected=wanted.shape)
    if unread := [finding for finding in report.findings if finding.kind == "unread"]:
        first = unread[0]
        raise BankError(
            f"{len(unread):,} files could not be read, such as {first.name} ({first.detail}). Nothing was written. "
            "Check the disk or the permissions, and run it again."
        )
    useless = {finding.name: finding for finding in reversed(report.problems) if KINDS[finding.kind].fix == "extract"}
    files = {key: pickle_name(key) for key in listed or ()}
    names = {*report.sound, *(finding.name for finding in report.findings)} - files.keys() - {*files.values()}
    for name in names:  # files of no listed image are kept too, under their names
        if (key := key_of(name)) is not None and (source / name).exists():
            files[key] = name
    reasons = {key: useless[name] for key, file in files.items() for name in (key, file) if name in useless}
    if files.keys() == reasons.keys():
        models = models_with(report.shape) if report.shape else []
        raise BankError(_nothing_usable(report, wanted, models, next(iter(reasons.values()), None)))
    if listed and all(key in reasons and reasons[key].kind == "missing" for key in listed):
        raise BankError(
            f"None of the pickles in {source} belongs to the listed images, such as {next(iter(listed))}; nothing was "
            "written. Is this another split's or dataset's list?"
        )
    wanted = confirm(report) if confirm else wanted
    left_out = [replace(finding, name=key) for key, finding in sorted(reasons.items())]
    if listed is not None:
        for key in reasons.keys() - set(listed):
            del files[key], reasons[key]

    def read(key: str) -> Feature | Failure:
        if key in reasons:
            return Failure(key, reasons[key].reason)
        tokens, defects = examined(source / files[key])  # again: the file may have changed since
        if tokens is None or any(KINDS[kind].fix == "extract" for kind, _ in defects):
            return Failure(key, "; ".join(detail or kind for kind, detail in defects))
        if (wrong := shape_defect(tuple(tokens.shape), wanted.shape)) and wrong[0] != "cls":
            return Failure(key, wrong[1])
        tokens = tokens.float()
        return Feature(key, {GRID: tokens[1:] if wrong else tokens}, size_of(key))

    keys = sorted(files)
    written = transfer(target, wanted, keys, read, set(reasons), overwrite, writing, stop)
    fixed = [
        finding
        for finding in report.findings
        if KINDS[finding.kind].fix == "import" and finding.kind != "unlisted" and finding.name not in useless
    ]
    return Imported(written, fixed, left_out)


def _nothing_usable(report: Report, wanted: Manifest, models: Sequence[str], first: Finding | None) -> str:
    """Why none of the pickles can be imported, and what to do."""
    text = f"None of the pickles in {report.bank} is usable; nothing was written."
    if report.shape not in (None, wanted.shape):
        return f"{text} Most are of shape {report.shape}, and {wanted.model}'s is {wanted.shape}: " + (
            f"give --model {' or '.join(models)}." if models else "no known model has theirs."
        )
    return f"{text} {f'{first.name}: {first.reason}. ' if first else ''}`patchbank verify {report.bank}` names all."


def refuse_shared(source: Path, target: Path) -> None:
    """Raise BankError if a target lies in the source's directory, or around it."""
    if _within(target, source) or _within(source, target):
        raise BankError(
            f"{target} is the source itself, or in it, or around it. Give the new bank a directory of its own."
        )


def _within(place: Path, directory: Path) -> bool:
    """Whether a place is a directory or lies in it, by whatever link, mount or scheme its name leads there."""
    if is_remote(place) and is_remote(directory):
        (store, path), (other, outer) = filesystem(place), filesystem(directory)
        names, outer_names = (list(filter(None, each.split("/"))) for each in (path, outer))
        return type(store) is type(other) and names[: len(outer_names)] == outer_names
    if is_remote(place) or is_remote(directory) or not directory.exists():
        return False
    place = place.resolve()
    return any(each.exists() and each.samefile(directory) for each in (place, *place.parents))


def transfer(
    target: Path,
    wanted: Manifest,
    keys: Sequence[str],
    read: Callable[[str], Feature | Failure],
    failed: set[str],
    overwrite: bool,
    progress: Progress | None,
    stop: Event | None,
    log: Path | None = None,
    reducer: Reducer | None = None,
) -> Converted:
    """Write what `read` returns for each key. Failures of keys in `failed` are written too, others are damage.

    `log`: the bank whose runs the new bank's log has. `reducer`: what reduced the features, to be kept with them.
    """
    if wanted.layout == "ezhoi":
        check_names(keys, target)
    stop = stop or Event()
    existing = gone_on_with(existing_manifest(target, overwrite=overwrite), wanted, overwrite)
    state = bank_state(place_of(target, overwrite), existing) if existing else None
    if overwrite:
        removable(target)  # what must not be deleted is refused before anything is written
    if not is_remote(target):
        needed = disk_bytes(len({*keys} - (state.done if state else set())), wanted)
        check_room(target, needed, "directory", overwrite=overwrite)
    with BankWriter(target, wanted, keys, overwrite=overwrite, known=state, reducer=reducer) as writer:
        # What the target holds is compared too, last: the source may have changed since.
        known = writer.state.failed.keys() | writer.done
        missing = [key for key in keys if key not in known]
        retried = [key for key in keys if key in known and key not in writer.done]
        again = [key for key in keys if key in writer.done and key not in failed]
        todo = missing + retried + again
        done = Converted(target, writer.manifest, already_done=len(again))
        refused: list[Failure] = []
        with ThreadPoolExecutor(thread_name_prefix="read") as threads:
            for begin in range(0, len(todo), _AT_ONCE):
                if stop.is_set():
                    done.remaining = max(0, len(missing) - begin)
                    break
                outcomes = list(threads.map(read, todo[begin : begin + _AT_ONCE]))
                features = [each for each in outcomes if isinstance(each, Feature) and not writer.has(each)]
                done.already_done -= sum(feature.key in writer.done for feature in features)
                failures = [each for each in outcomes if isinstance(each, Failure)]
                done.damaged |= {each.key: each.reason for each in failures if each.key not in failed}
                failures = [each for each in failures if each.key in failed]
                refused += writer.add(features, failures)
                done.features += len(features)
                done.failures += len(failures)
                if progress:
                    progress(begin + len(outcomes), len(todo))
    done.refused = dict(refused)
    done.features -= len(refused)
    done.bytes_written = writer.bytes_written
    if log:
        copy_runs(log, writer.bank)
    if overwrite and not done.remaining:
        done.kept = writer.replace(keys)
    return done
