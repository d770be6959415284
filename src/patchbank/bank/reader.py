"""`open_bank`: a bank as a mapping from key to tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from patchbank.bank import ezhoi, manifest
from patchbank.bank.entries import Entry
from patchbank.bank.layouts import layout_in
from patchbank.bank.manifest import Manifest
from patchbank.bank.shards import ShardStore
from patchbank.config import Fingerprint
from patchbank.errors import BankError, KeyNotInBank
from patchbank.locations import is_remote, locate
from patchbank.transform import ImageTransform

if TYPE_CHECKING:
    from torch import Tensor


def open_bank(path: str | Path, *, cache: str | Path | None = None) -> Bank:
    """Open a bank for reading, whatever its layout.

    Args:
        path: its directory, or the URL of one in an object store (``s3://bucket/bank``).
        cache: a local directory in which features that come from an object store are kept; None keeps none, unless
            the environment variable ``PATCHBANK_CACHE`` names one. It grows to what was read, and may be deleted.

    Returns:
        A mapping: ``bank["HICO_train2015_00000001.jpg"]`` is the (N, D) tensor of that image's patch tokens.

    Raises:
        BankError: there is no bank, or it is damaged or of a later format.
        ConfigError: it is a URL of a store whose library is not installed.
    """
    cache = cache or os.environ.get("PATCHBANK_CACHE") or None
    return Bank(locate(path), None if cache is None else Path(cache).expanduser())


class _Store(Protocol):
    """What a layout's reading side gives."""

    manifest: Manifest

    @property
    def entries(self) -> dict[str, Entry]: ...
    def tokens(self, key: str) -> Tensor: ...
    def cls(self, key: str) -> Tensor: ...
    def checksum(self, key: str) -> str: ...
    def file(self, key: str) -> Path: ...
    def bytes_on_disk(self) -> int: ...


def _open_store(directory: Path, cache: Path | None) -> _Store:
    layout = layout_in(directory)
    if layout is None:
        raise BankError(_no_bank(directory))
    return ShardStore(directory, cache=cache) if layout == "shards" else ezhoi.PickleStore(directory)


def _no_bank(directory: Path) -> str:
    if is_remote(directory):
        return f"There is no bank {directory}: no shard lies there."
    if not directory.exists():
        return f"There is no bank {directory}."
    if not directory.is_dir():
        return f"{directory} is a file; a bank is a directory."
    found = {
        path.parent
        for pattern in (manifest.FILE_NAME, "shard-*.safetensors")
        for depth in ("*", "*/*")
        for path in directory.glob(f"{depth}/{pattern}")
    }
    if not found and next(ezhoi.pickles_in(directory), None):
        return (
            f"{directory} holds pickles that patchbank did not make. `patchbank verify {directory}` looks at them, and "
            f"`patchbank repair {directory}` makes a bank of them."
        )
    inside = f" It holds banks: {', '.join(sorted(path.relative_to(directory).as_posix() for path in found))}."
    return (
        f"{directory} is not a bank: there is neither a {manifest.FILE_NAME} nor a shard in it.{inside * bool(found)}"
    )


class Bank(Mapping[str, "Tensor"]):
    """A bank of patch tokens, read-only. Iterates over the keys that have features, sorted.

    What it lists is what was committed when it was opened. It can be pickled and sent to data-loader workers, where
    files are opened when they are first read from, and threads may share it.

    Attributes:
        path: its directory, or its URL.
        manifest: what it is.
        failures: key -> reason, of images that could not be extracted.
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path = path
        self._store = _open_store(path, cache)
        self.manifest = self._store.manifest
        entries = self._store.entries
        failed = {key for key, entry in entries.items() if entry.failure is not None}
        self._entries = {key: entries[key] for key in sorted(entries.keys() - failed if failed else entries)}
        self.failures = {key: entries[key].failure or "" for key in sorted(failed)}

    @property
    def fingerprint(self) -> Fingerprint:
        """What decides the numbers in it."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Tensor:
        """The patch tokens of one image.

        Returns:
            (N, D) in the bank's stored dtype (of int8: float32) on the CPU, row-major over the grid, not normalised to
            unit length. It is the caller's own: changing it changes nothing else.

        Raises:
            KeyNotInBank: a KeyError; the key was never listed, or failed (the message gives the reason).
            BankError: its file is missing, or holds no tensor of the bank's shape. Numbers are not compared with
                their checksum on every read: `check` does that.
        """
        if key not in self._entries:
            self._entry(key)  # raises
        return self._store.tokens(key)

    def cls(self, key: str) -> Tensor:
        """The [CLS] token's feature, CLIP's of the whole image, as OpenAI's ``encode_image`` gives it.

        Returns:
            (D,) on the CPU, of the dtype that the bank stores (of int8: float16), not normalised to unit length.

        Raises:
            KeyNotInBank: as ``bank[key]``.
            BankError: the bank has none: pickles hold patch tokens alone.
        """
        self._entry(key)
        return self._store.cls(key)

    def grid(self, key: str) -> Tensor:
        """The patch tokens as a picture: (Gh, Gw, D), row-major. Raises what ``bank[key]`` does."""
        return self[key].view(*self.manifest.grid, self.manifest.dim)

    def transform(self, key: str) -> ImageTransform:
        """How the image became the model's input. Raises KeyNotInBank, and BankError where its size is not known."""
        size = self._entry(key).size
        if size is None:
            raise BankError(
                f"The size of {key!r} is not known: {self.path} was made of somebody else's pickles, which do not say "
                "it. `patchbank repair` with the data set's options looks at the images."
            )
        return self.manifest.transform(size)

    def size(self, key: str) -> tuple[int, int] | None:
        """(width, height) of the original image in pixels; None where it is not known. Raises KeyNotInBank."""
        return self._entry(key).size

    def check(self, key: str) -> None:
        """Raise BankError where the key's feature is not what was written, by its checksum; or KeyNotInBank."""
        if self._store.checksum(self._entry(key).key) != self.sha256(key):
            raise BankError(
                f"{self._store.file(key)} is damaged: the feature of {key!r} is not what was written. "
                f"`patchbank repair {self.path}` says what to do."
            )

    def sha256(self, key: str) -> str:
        """The SHA-256 of the key's feature as it is stored (docs/bank-format.md). Raises KeyNotInBank."""
        return self._entry(key).sha256 or ""

    def file(self, key: str) -> Path:
        """Where the key's feature lies: its pickle, or its shard. Raises KeyNotInBank."""
        self._entry(key)
        return self._store.file(key)

    def bytes_on_disk(self) -> int:
        """The size of all features' files together, in bytes."""
        return self._store.bytes_on_disk()

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
        return (
            f"<Bank {self.path}: {len(self)} x {self.manifest.shape} {self.manifest.dtype}, "
            f"{self.manifest.fingerprint.model}, {len(self.failures)} failed>"
        )
