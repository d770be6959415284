"""``bank.json``: what a bank is. Written once, before the first feature, and never changed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

from patchbank import __version__
from patchbank.config import Fingerprint, ResizeMode, StoredDtype
from patchbank.errors import BankError
from patchbank.files import fsync_directory, write_and_sync

FILE_NAME = "bank.json"
FORMAT, FORMAT_VERSION = "patchbank", 1


def library_versions() -> dict[str, str]:
    """The versions that can move a feature's last bits."""
    return {
        "patchbank": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "pillow")},
    }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bank is.

    Attributes:
        layout: how the features lie on disk; ``ezhoi``.
        dataset, split: what was extracted; `split` is None for a folder.
        grid: (Gh, Gw), rows and columns of patches.
        dim: D, the dimension of a token.
        input_size, patch_size: in pixels; with `resize` and an image's size they make its `ImageTransform`.
        fingerprint: what decides the numbers.
        batch_size: images a forward pass; with `device` and `versions` it can decide the last bits.
        device: the kind of device, ``cpu`` or ``cuda``.
        versions: of the libraries that made the bank.
    """

    layout: str
    dataset: str
    split: str | None
    grid: tuple[int, int]
    dim: int
    input_size: int
    patch_size: int
    fingerprint: Fingerprint
    batch_size: int
    device: str
    versions: Mapping[str, str] = field(default_factory=library_versions)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of one image's patch tokens."""
        return self.grid[0] * self.grid[1], self.dim

    @property
    def dtype(self) -> str:
        """What is stored: ``float32``, ``float16`` or ``bfloat16``."""
        return self.fingerprint.dtype

    @property
    def resize(self) -> ResizeMode:
        """How images became square."""
        return cast(ResizeMode, self.fingerprint.resize)  # checked on reading

    @property
    def title(self) -> str:
        """``hicodet train``, ``folder``: for people."""
        return f"{self.dataset} {self.split}" if self.split else self.dataset

    def create(self, directory: Path, scratch: Path) -> Manifest:
        """Write it as `directory`'s, unless another process was first: then that one's is returned."""
        temporary = scratch / FILE_NAME
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **asdict(self),
            "versions": dict(self.versions),
        }
        write_and_sync(temporary, [(json.dumps(content, indent=2) + "\n").encode()])
        try:
            os.link(temporary, directory / FILE_NAME)  # a rename would replace what another run relies on
            fsync_directory(directory)
        except FileExistsError:
            pass
        return Manifest.read(directory)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a bank. Raises BankError where there is none, or it is damaged or of a later format."""
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise BankError(_no_bank(directory)) from None
        except OSError as error:
            raise BankError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise BankError(f"{path} is damaged: it is not JSON ({error}). Restore it or start anew.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BankError(f"{path} is not the manifest of a patchbank bank. Is {directory} the right directory?")
        if content.get("version") != FORMAT_VERSION:
            raise BankError(
                f"{path} has format version {content.get('version')!r}; patchbank {__version__} reads version "
                f"{FORMAT_VERSION}. Use the version of patchbank that made it ({_maker(content)})."
            )
        try:
            return cls._from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise BankError(f"{path} is damaged: {type(error).__name__} {error}. Restore it or start anew.") from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        values = {key: value for key, value in content.items() if key not in ("format", "version")}
        rows, columns = values.pop("grid")
        fingerprint = Fingerprint.from_dict(values.pop("fingerprint"))
        manifest = cls(grid=(int(rows), int(columns)), fingerprint=fingerprint, **values)
        if manifest.dtype not in get_args(StoredDtype) or manifest.resize not in get_args(ResizeMode):
            raise ValueError(f"unknown dtype {manifest.dtype!r} or resize {manifest.resize!r}")
        if min(rows, columns, manifest.dim, manifest.input_size, manifest.patch_size, manifest.batch_size) < 1:
            raise ValueError("a size is not positive")
        return manifest


def _maker(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    return f"patchbank {versions['patchbank']}" if isinstance(versions, dict) and "patchbank" in versions else "later"


def _no_bank(directory: Path) -> str:
    if not directory.exists():
        return f"There is no bank {directory}."
    if not directory.is_dir():
        return f"{directory} is a file; a bank is a directory."
    if any(directory.glob("*_clip.pkl")):
        return f"{directory} holds pickles but no {FILE_NAME}: patchbank did not make it."
    found = [*directory.glob(f"*/{FILE_NAME}"), *directory.glob(f"*/*/{FILE_NAME}")]
    banks = sorted(path.parent.relative_to(directory).as_posix() for path in found)
    inside = f" It holds banks: {', '.join(banks)}." if banks else ""
    return f"{directory} is not a bank: it has no {FILE_NAME}.{inside}"
