"""`open_bank`: a bank as a mapping from key to tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from patchbank.bank import reduction
from patchbank.bank.index import Entry, Part, Row, failures_of, joined, rows_of
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import SCALE, unpack
from patchbank.bank.parts import find_payload, read_parts
from patchbank.bank.payload import Column
from patchbank.bank.pickles import pickles_in
from patchbank.bank.reduction import Reducer
from patchbank.bank.runs import read_runs
from patchbank.config import PAGE_IMAGES
from patchbank.errors import BankError, ConfigError, KeyNotInBank
from patchbank.features import CLS
from patchbank.files import bytes_text, sha256_of_chunks
from patchbank.locations import is_remote, locate, of_hub
from patchbank.notebook import facts, failed, shown
from patchbank.regions import GRID_CUT, Region
from patchbank.transform import ImageTransform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from patchbank.datasets import Dataset
    from patchbank.show.page import Written
    from patchbank.show.showing import Drawing
    from patchbank.show.statistics import Progress

_ATTEMPTS = 100  # at reading what others are writing

_T = TypeVar("_T")


def open_bank(path: str | Path, *, cache: str | Path | None = None, mmap: bool = True) -> Bank:
    """Open a bank for reading, whatever its layout.

    Args:
        path: its directory, or its URL in an object store (``s3://bucket/bank``) or on the Hugging Face hub
            (``hf://datasets/ORG/NAME/BANK``, or ``.../NAME@REVISION/BANK``). On the hub a branch becomes a commit now,
            which `Bank.path` names, and which is read ever after.
        cache: a local directory that keeps features from a URL; None keeps none, unless the environment
            variable ``PATCHBANK_CACHE`` names one. It grows to what was read, and may be deleted.
        mmap: whether to map shards into memory. A process ends with SIGBUS when a mapped file is cut short or its
            network disk fails; with False each read opens the file, and raises BankError.

    Returns:
        A mapping: ``bank["HICO_train2015_00000001.jpg"]`` is the (N, D) tensor of that image's patch tokens, or the
        first output of a bank that does not store them.

    Raises:
        BankError: there is no bank, or it is damaged or of a later format.
        ConfigError: it is a URL of a store whose library is not installed, or of a repository or revision that the hub
            does not have, or does not give.
    """
    cache = cache or os.environ.get("PATCHBANK_CACHE") or None
    place = locate(path)
    try:
        return Bank(place, None if cache is None else Path(cache).expanduser(), mmap=mmap)
    except OSError as error:  # of a commit, the hub is asked only now
        if not of_hub(place):
            raise
        raise ConfigError(f"{place}: {error}") from error


def _no_bank(directory: Path) -> str:
    if is_remote(directory):
        return f"There is no bank {directory}: it holds no shard. A bank of pickles has to be downloaded first."
    if not directory.exists():
        return f"There is no bank {directory}."
    if not directory.is_dir():
        return f"{directory} is a file; a bank is a directory."
    found = {
        path.parent
        for pattern in ("index", "shard-*.safetensors")
        for depth in ("*", "*/*")
        for path in directory.glob(f"{depth}/{pattern}")
    }
    if not found and next(pickles_in(directory), None):
        return (
            f"{directory} holds third-party pickles, and no index. `patchbank verify {directory}` checks them, and "
            f"`patchbank import {directory} BANK --model MODEL` makes a bank of them."
        )
    inside = f" It holds banks: {', '.join(sorted(path.relative_to(directory).as_posix() for path in found))}."
    return f"{directory} is not a bank: it holds neither shards nor an index.{inside * bool(found)}"


def _writable(out: Tensor) -> bool:
    """Whether a tensor takes features: it is floating, and no two of its numbers share memory."""
    end = 1
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < end:
            return False
        end += stride * (size - 1)
    return out.is_floating_point()


class _State(NamedTuple):
    """What a reader knows of a bank at one time. Replaced as a whole, so that threads never see half of it."""

    parts: list[Part]
    rows: dict[str, Row]
    columns: list[Mapping[str, Column] | None]


class Bank(Mapping[str, "Tensor"]):
    """A bank of features, read-only. Iterates over the keys that have some, sorted.

    It lists what was committed when it was opened. It can be pickled and sent to data-loader workers, which open files
    when they first read from them, and threads may share it.

    Attributes:
        path: its directory, or its URL.
        manifest: what it is.
        failures: key -> reason, of images that could not be extracted.
    """

    def __init__(
        self,
        path: Path,
        cache: Path | None = None,
        *,
        mmap: bool = True,
        damaged: Literal["raise", "skip"] = "raise",
        known: Iterable[Part] = (),
    ) -> None:
        """
        Args:
            cache, mmap: as in `open_bank`.
            damaged: what to do about a damaged part: raise, or leave it out.
            known: parts that were read before, and are not read again.

        Raises:
            BankError: there is no bank, or no part of its index is sound.
        """
        if (payload := find_payload(path)) is None:
            raise BankError(_no_bank(path))
        self.path = path
        self._payload = payload
        self._cache, self._mmap = cache, mmap
        self._damaged = damaged
        self._reducer: Reducer | None = None
        self._state, entries = self._load(known)
        if not self._state.parts:
            raise BankError(f"{path} is not a bank: no part of its index is sound.")
        self.manifest: Manifest = self._state.parts[0].manifest
        failed = failures_of(entries)
        self._entries = {key: entries[key] for key in sorted(entries.keys() - failed.keys() if failed else entries)}
        self.failures = dict(sorted(failed.items()))

    def _load(self, known: Iterable[Part] = ()) -> tuple[_State, dict[str, Entry]]:
        parts = read_parts(self._payload, self._damaged, known)
        entries = joined(parts)
        return _State(parts, rows_of(parts, entries), [None] * len(parts)), entries

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": self._state._replace(columns=[None] * len(self._state.parts))}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Tensor:
        """The main output of one image (`Manifest.main`): its patch tokens, if the bank stores them.

        Returns:
            (N, D) in the bank's stored dtype (of int8: float32) on the CPU, row-major over the grid, not normalised to
            unit length. It is the caller's own: changing it changes nothing else.

        Raises:
            KeyNotInBank: a KeyError; the key was never listed, or failed (the message gives the reason).
            BankError: its file is missing, or holds no tensor of the bank's shape. Numbers are not compared with
                their checksum on every read: `check` does that.
        """
        return self.output(key, self.manifest.main)

    def output(self, key: str, name: str) -> Tensor:
        """One of the bank's outputs (`Manifest.outputs`) of a sample.

        Returns:
            A tensor of the output's shape, on the CPU, in its stored dtype (int8: float32); the caller's own.

        Raises:
            KeyNotInBank: as ``bank[key]``.
            BankError: the bank does not store this output, or its file cannot be read.
        """
        self._entry(key)
        output = self.manifest.outputs[self.output_name(name)]
        if output.dtype == "int8":
            return self.batch([key], name)[0]
        import torch

        out = torch.empty(output.shape, dtype=getattr(torch, output.dtype))
        memory = out.view(torch.uint8).numpy().reshape(-1)

        def read(state: _State) -> None:
            number, row = self._row(state, key)
            self._columns(state, number)[name](row, 1, memory)

        self._in_attempts(read)
        return out

    def batch(
        self,
        keys: Iterable[str],
        name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        pin_memory: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """An output of several samples, read and converted at once: for training, faster than a tensor a key.

        Args:
            keys: K, in any order; one may occur several times.
            name: of the output; None is the main one.
            dtype: of the result, a floating one; None is that of `out`, or the stored one (int8: float32).
            pin_memory: whether a new result lies in page-locked memory, from which ``.to("cuda", non_blocking=True)``
                copies while the program goes on. Needs an accelerator.
            out: a floating tensor (K, ...) on the CPU to read into, instead of a new one.

        Returns:
            (K, ...) on the CPU, contiguous, in the order of the keys; the caller's own. Or `out`.

        Raises what `output` does; ValueError if `out` has another shape or dtype, lies elsewhere or overlaps itself, as
        expanded tensors do; or `dtype` is not floating; or memory is to be page-locked without an accelerator.
        TypeError if `keys` is one string, or `out` no tensor.
        """
        import torch

        if isinstance(keys, str):
            raise TypeError(f"keys are several: batch([{keys!r}]), or output({keys!r}) for one")
        if out is not None and not isinstance(out, torch.Tensor):
            raise TypeError(f"out is a tensor, not {type(out).__qualname__}: torch.from_numpy makes one of an array")
        keys = list(keys)
        for key in keys:
            self._entry(key)
        name = self.output_name(name)
        output = self.manifest.outputs[name]
        shape = (len(keys), *output.shape)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"features are floating numbers: dtype cannot be {dtype}")
        if out is None:
            if pin_memory and not getattr(torch, "accelerator", torch.cuda).is_available():  # torch 2.5: CUDA alone
                raise ValueError("pin_memory=True needs an accelerator, and torch finds none: leave it out")
            dtype = dtype or getattr(torch, "float32" if output.dtype == "int8" else output.dtype)
            out = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        elif out.shape != shape or out.device.type != "cpu" or out.dtype != (dtype or out.dtype) or not _writable(out):
            raise ValueError(
                f"out must be {shape} on the CPU, of {dtype or 'a floating dtype'}, each number in memory of its own; "
                f"not {tuple(out.shape)} on {out.device}, of {out.dtype}, with strides {out.stride()}"
            )
        fields = (name, name + SCALE) if output.dtype == "int8" else (name,)
        as_stored = len(fields) == 1 and out.dtype == getattr(torch, output.dtype) and out.is_contiguous()
        memory = out.view(torch.uint8).numpy().reshape(len(keys), -1) if as_stored and keys else None

        def read(state: _State) -> None:
            end = 0
            for columns, row, count in self._runs(state, keys):
                begin, end = end, end + count
                if memory is not None:
                    columns[name](row, count, memory[begin:end].reshape(-1))
                else:
                    numbers = {field: columns[field](row, count) for field in fields}
                    unpack(output, name, numbers, out[begin:end])

        self._in_attempts(read)
        return out

    def cls(self, key: str) -> Tensor:
        """The [CLS] token's feature, (D,): `output` of ``cls``. Pickles hold patch tokens alone."""
        return self.output(key, CLS)

    def grid(self, key: str, name: str | None = None) -> Tensor:
        """An output as a picture: (Gh, Gw, D), row-major. None is the main output.

        Raises what `output` does, and BankError if the output is no grid.
        """
        return self.output(key, self.grid_name(name)).view(*self.manifest.grid, -1)

    def grid_name(self, name: str | None = None) -> str:
        """The name of an output that is a grid; None is the main output. Raises BankError if it is none."""
        if (name := self.output_name(name)) not in (grids := self.manifest.grids):
            others = f"It stores {', '.join(grids)}." if grids else "It stores no grid: extract patch_tokens too."
            raise BankError(f"The output {name} of {self.path} is no grid of patches. {others}")
        return name

    def output_name(self, name: str | None = None) -> str:
        """The name of an output; None is the main output. Raises BankError if the bank does not store it."""
        if name is not None and name not in self.manifest.outputs:
            raise BankError(
                f"{self.path} does not store the output {name!r}. It stores {', '.join(self.manifest.outputs)}."
            )
        return name or self.manifest.main

    @property
    def reducer(self) -> Reducer:
        """What reduced the features, `Manifest.reduction`. Raises BankError if nothing did, or its file is damaged."""
        if self._reducer is None:
            if self.manifest.reduction is None:
                raise BankError(f"{self.path} holds features of the model's own width: nothing reduced them.")
            self._reducer = reduction.read(self._payload.parts, self.manifest.reduction)
        return self._reducer

    def project(self, features: Any) -> Any:
        """Features of the original space, such as a text's or pooled ones, reduced as the bank's main output is.

        Args:
            features: (..., D), an array or a tensor; on any device, and gradients flow back.

        Returns:
            (..., K) alike; of a bank that is not reduced, the features themselves.

        Raises ValueError if they have another width, BankError if the file of the components is missing or damaged.
        """
        return features if self.manifest.reduction is None else self.reducer(features)

    def transform(self, key: str) -> ImageTransform:
        """How the image became the model's input.

        Raises KeyNotInBank; BankError if its size is unknown, or if a box was cut out of it.
        """
        _, size, *_, region = self._entry(key)
        if region and region.box and self.manifest.input.cut != GRID_CUT:
            raise BankError(f"{key!r} was cut out of its image: only whole images map to a grid.")
        if size is None:
            raise BankError(
                f"The size of {key!r} is not known: {self.path} was imported from pickles, which do not hold it. "
                "`patchbank import` with the dataset's options reads it from the images."
            )
        return self.manifest.transform(size)

    def size(self, key: str) -> tuple[int, int] | None:
        """(width, height) of the original image in pixels; None if it is unknown. Raises KeyNotInBank."""
        return self._entry(key).size

    def region(self, key: str) -> Region | None:
        """The part of an image that a sample is; None for an image. Raises KeyNotInBank."""
        return self._entry(key).region

    def in_order(self) -> Iterator[str]:
        """The keys that have features, in the order of the dataset: of shards, that of their rows."""
        state = self._state
        found = sorted((state.parts[row.part].number, row.part, row.row, key) for key, row in state.rows.items())
        return (key for *_, key in found if key in self._entries)

    def show(
        self,
        key: str,
        *,
        at: Sequence[Sequence[float]] = (),
        boxes: Sequence[Sequence[float]] = (),
        texts: Sequence[str] = (),
        image: str | Path | None = None,
        dataset: Dataset | None = None,
        weights: str | Path | None = None,
        checkpoints: str | Path | None = None,
        all_pairs: bool = False,
        output: str | None = None,
    ) -> Drawing:
        """Draw one image's features, as ``patchbank show`` does. Arguments and errors: `patchbank.show_features`."""
        from patchbank import show_features

        return show_features(
            self,
            key,
            at=at,
            boxes=boxes,
            texts=texts,
            image=image,
            dataset=dataset,
            weights=weights,
            checkpoints=checkpoints,
            all_pairs=all_pairs,
            output=output,
        )

    def report(
        self,
        path: str | Path | None = None,
        dataset: Dataset | None = None,
        *,
        sample: int = PAGE_IMAGES,
        seed: int = 0,
        read: int | None = None,
        output: str | None = None,
        progress: Progress | None = None,
        gallery_progress: Progress | None = None,
    ) -> Written:
        """Write a page about the bank, as ``patchbank report`` does. Arguments and errors: `patchbank.write_report`."""
        from patchbank import write_report

        return write_report(
            self,
            path,
            dataset,
            sample=sample,
            seed=seed,
            read=read,
            output=output,
            progress=progress,
            gallery_progress=gallery_progress,
        )

    def check(self, key: str) -> None:
        """Raise BankError if the key's feature differs from what was written, by its checksum; or KeyNotInBank."""
        if self.checksum(key) != self.sha256(key):
            raise BankError(
                f"{self.file(key)} is damaged: the feature of {key!r} is not what was written. "
                f"`patchbank repair {self.path}` says what to do."
            )

    def sha256(self, key: str) -> str:
        """The SHA-256 of the key's feature, by the index (docs/reference/bank-format.md). Raises KeyNotInBank."""
        return self._entry(key).sha256 or ""

    def checksum(self, key: str) -> str:
        """The SHA-256 of the key's feature as it is stored now. Raises KeyNotInBank; BankError if it is unreadable."""
        self._entry(key)

        def read(state: _State) -> str:
            number, row = self._row(state, key)
            return self._payload.checksum(state.parts[number], row, self._columns(state, number))

        return self._in_attempts(read)

    def file(self, key: str) -> Path:
        """The file with the key's feature: its pickle, or its shard. Raises KeyNotInBank."""
        self._entry(key)
        state = self._state
        return self._payload.file(state.parts[state.rows[key].part], key)

    @property
    def digest(self) -> str:
        """One checksum of the bank: the SHA-256 of the names of its index's parts, sorted, a line each.

        A name contains the hash of what its part says, which contains the SHA-256 of each feature.
        """
        return sha256_of_chunks(f"{part.path.name}\n".encode() for part in self._state.parts)

    def bytes_on_disk(self) -> int:
        """The size of all features' files together, in bytes."""
        return self._payload.bytes_on_disk(self._state.parts, self._entries)

    def _runs(self, state: _State, keys: Sequence[str]) -> Iterator[tuple[Mapping[str, Column], int, int]]:
        """(a part's fields, row, count) of features that follow each other in that part, for all keys in order."""
        rows = [self._row(state, key) for key in keys]
        single = self._payload.layout == "ezhoi"
        begins = [n for n, row in enumerate(rows) if n == 0 or single or row != (rows[n - 1].part, rows[n - 1].row + 1)]
        for begin, end in pairwise([*begins, len(rows)]):
            yield self._columns(state, rows[begin].part), rows[begin].row, end - begin

    def _row(self, state: _State, key: str) -> Row:
        try:
            return state.rows[key]
        except KeyError:
            raise BankError(f"{self.path} had features of {key!r} when it was opened, and has none now.") from None

    def _columns(self, state: _State, number: int) -> Mapping[str, Column]:
        if (columns := state.columns[number]) is None:
            columns = state.columns[number] = self._payload.columns(state.parts[number], self._cache, mmap=self._mmap)
        return columns

    def _in_attempts(self, action: Callable[[_State], _T]) -> _T:
        """What an action returns. Raises BankError where a part, or the whole bank, is gone."""
        state = self._state
        for _ in range(_ATTEMPTS):
            try:
                return action(state)
            except FileNotFoundError:
                # A run has put a more complete part in its place since the bank was opened.
                state = self._load()[0]
                if not state.parts:
                    raise BankError(f"{self.path} is gone: its index has no part any more.") from None
                if state.parts[0].manifest.differences(self.manifest):
                    raise BankError(f"{self.path} was replaced since it was opened. Open it again.") from None
                self._state = state
        raise BankError(f"{self.path} changes too fast to be read.")

    def _entry(self, key: str) -> Entry:
        try:
            return self._entries[key]
        except KeyError:
            pass
        if key in self.failures:
            raise KeyNotInBank(f"{key!r} could not be extracted: {self.failures[key]}.")
        example = f" Its keys look like {next(iter(self))!r}." if self._entries else " It is empty."
        raise KeyNotInBank(f"The bank {self.path} has no {key!r}.{example}")

    __eq__ = object.__eq__  # a Mapping's would read every feature of both
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {each.shape} {each.dtype}" for name, each in self.manifest.outputs.items())
        return f"<Bank {self.path}: {len(self)} x {outputs}, {self.manifest.model}, {len(self.failures)} failed>"

    def _repr_html_(self) -> str:
        from patchbank.bank.writer import disk_bytes

        made = self.manifest
        h, w = made.input.size
        values = {
            "features": f"{len(self):,} of {made.title}, such as {next(iter(self))}" if self._entries else "none",
            "failed": failed(self.failures),
            "outputs": [f"{name} {each.shape} {each.dtype}" for name, each in made.outputs.items()],
            "reduced": made.reduction and f"{made.reduction}, {made.reduction.explained:.1%} of the variance",
            "input": f"{h}x{w} (height x width), {made.input.resize}, grid {made.grid[0]} x {made.grid[1]}",
            "model": made.model,
            "weights": any(run.untrained for run in read_runs(self.path)) and "UNTRAINED: the numbers mean nothing",
            "on disk": f"about {bytes_text(disk_bytes(len(self), made))}, layout {made.layout}",
        }
        return shown(f"Bank {self.path}", facts(values))
