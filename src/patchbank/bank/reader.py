"""`open_bank`: a bank as a mapping from key to tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.bank import ezhoi
from patchbank.bank.ledger import Entry, read_ledger
from patchbank.bank.manifest import Manifest
from patchbank.config import Fingerprint
from patchbank.errors import BankError, KeyNotInBank
from patchbank.geometry import ImageTransform

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = "Delete it and run the same extraction again: it makes anew what is missing."


def open_bank(path: str | Path) -> Bank:
    """Open a bank for reading.

    Returns:
        A mapping: ``bank["HICO_train2015_00000001.jpg"]`` is the (N, D) tensor of that image's patch tokens.

    Raises:
        BankError: there is no bank, or it is damaged or of a later format.
    """
    return Bank(Path(path).expanduser())


class Bank(Mapping[str, "Tensor"]):
    """A bank of patch tokens, read-only. Iterates over the keys that have features, sorted.

    What it lists is what was committed when it was opened. It holds no open file: it can be pickled and sent to
    data-loader workers.

    Attributes:
        path: its directory.
        manifest: what it is.
        failures: key -> reason, of images that could not be extracted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.read(path)
        entries = read_ledger(path)
        self._entries = {key: entries[key] for key in sorted(entries) if entries[key].failure is None}
        self.failures = {key: entries[key].failure or "" for key in sorted(entries) if entries[key].failure}

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
            (N, D) in the bank's stored dtype on the CPU, row-major over the grid, not normalised to unit length.

        Raises:
            KeyNotInBank: a KeyError; the key was never listed, or failed (the message gives the reason).
            BankError: its file is missing, damaged, or not a tensor of the bank's shape.
        """
        import torch  # here, so that what asks for no tensor needs no torch

        from patchbank.bank.pickles import read_own, read_pickle

        path = self.file(key)
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        try:
            tokens = read_own(path, self.manifest.shape, dtype)
        except OSError as error:
            raise BankError(f"{path} cannot be read: {error.strerror}. {_AGAIN}") from error
        if tokens is not None:
            return tokens
        found = read_pickle(path)  # says what it is instead
        if tuple(found.shape) != self.manifest.shape or found.dtype != dtype:
            raise BankError(
                f"{path} holds {tuple(found.shape)} {found.dtype}, not the bank's {self.manifest.shape} {dtype}: "
                f"something else wrote it. {_AGAIN}"
            )
        return found

    def grid(self, key: str) -> Tensor:
        """The patch tokens as a picture: (Gh, Gw, D), row-major. Raises what ``bank[key]`` does."""
        return self[key].view(*self.manifest.grid, self.manifest.dim)

    def transform(self, key: str) -> ImageTransform:
        """How the image became the model's input. Raises KeyNotInBank."""
        size = self._entry(key).size
        assert size is not None  # an entry without failure has one
        return ImageTransform(*size, self.manifest.resize, self.manifest.input_size, self.manifest.patch_size)

    def sha256(self, key: str) -> str:
        """The SHA-256 of the key's file, as it was written. Raises KeyNotInBank."""
        return self._entry(key).sha256 or ""

    def file(self, key: str) -> Path:
        """Where the key's feature lies. Raises KeyNotInBank."""
        self._entry(key)
        return self.path / ezhoi.pickle_name(key)

    def bytes_on_disk(self) -> int:
        """The size of all features' files together, in bytes."""
        return sum(path.stat().st_size for path in map(self.file, self) if path.exists())

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
