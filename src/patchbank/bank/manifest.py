"""What a bank is. In the layout ``ezhoi`` it is written once, as ``bank.json``; in ``shards`` every shard says it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

from patchbank import __version__
from patchbank.config import Decode, Fingerprint, Layout, ResizeMode, StoredDtype
from patchbank.encoders.openai.registry import Model
from patchbank.errors import BankError
from patchbank.files import fsync_directory, write_and_sync
from patchbank.transform import ImageTransform

FILE_NAME = "bank.json"
FORMAT, FORMAT_VERSION = "patchbank", 1
_LARGEST = 1 << 31  # no size in a manifest is near it


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
        layout: how the features lie on disk, ``ezhoi`` or ``shards``.
        dataset, split: what was extracted; `split` is None for a folder. Of pickles that somebody else made, the
            data set is ``unknown`` until somebody says which it is.
        grid: (Gh, Gw), rows and columns of patches.
        dim: D, the dimension of a token.
        input_size, patch_size: in pixels; with `resize` and an image's size they make its `ImageTransform`.
        fingerprint: what decides the numbers.
        batch_size: images a forward pass; with `device` and `versions` it can decide the last bits.
        device: the kind of device, ``cpu`` or ``cuda``.
        compiled: whether `torch.compile` made the encoder, which can decide the last bits too.
        versions: of the libraries that the bank was begun with.
        cls: whether each image's [CLS] feature is stored too.
        shard_images: images a shard is made for; None where there are no shards.
        adopted: of a bank made of somebody else's pickles, how that was done; else None.
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
    compiled: bool = False
    cls: bool = False
    shard_images: int | None = None
    adopted: str | None = None

    @classmethod
    def of_model(cls, model: Model, /, **facts: Any) -> Manifest:
        """A bank's of a model's features; `facts` are the attributes that the model does not decide."""
        size, patch = model.input_size, model.patch_size
        return cls(grid=model.grid, dim=model.output_dim, input_size=size, patch_size=patch, **facts)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of one image's patch tokens."""
        return self.grid[0] * self.grid[1], self.dim

    @property
    def dtype(self) -> StoredDtype:
        """What is stored: ``float32``, ``float16``, ``bfloat16`` or ``int8``."""
        return cast(StoredDtype, self.fingerprint.dtype.rpartition(" > ")[2])  # checked on reading

    @property
    def resize(self) -> ResizeMode:
        """How images became square."""
        return cast(ResizeMode, self.fingerprint.resize)  # checked on reading

    @property
    def decode(self) -> Decode:
        """How the images were resized."""
        return "fast" if "torch" in self.fingerprint.preprocessing else "exact"

    @property
    def title(self) -> str:
        """``hicodet train``, ``folder``: for people."""
        return f"{self.dataset} {self.split}" if self.split else self.dataset

    def transform(self, size: tuple[int, int]) -> ImageTransform:
        """How an image of (width, height) pixels became the model's input."""
        return ImageTransform(*size, self.resize, self.input_size, self.patch_size)

    def differences(self, other: Manifest) -> list[tuple[str, object, object]]:
        """(what, own value, other's value) for each thing in which two banks' features differ, or how they lie."""
        names = ["layout", "dataset", "split", "grid", "dim", "input_size", "patch_size"]
        if self.layout == other.layout:
            names.append("cls")  # which layouts differ in
        differing = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [each for each in differing if each[1] != each[2]] + self.fingerprint.differences(other.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """As it is written: JSON's types, in a fixed order. What does not apply is left out."""
        content = asdict(self) | {"versions": dict(self.versions)}
        for name in ("compiled", "cls", "shard_images", "adopted"):
            if not content[name]:
                del content[name]
        return {"format": FORMAT, "version": FORMAT_VERSION, **content}

    @classmethod
    def from_dict(cls, content: Any, source: Path) -> Manifest:
        """The inverse of `to_dict`; what else is in `content` is passed over. Raises BankError, naming `source`."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BankError(f"{source} is not a part of a patchbank bank. Is {source.parent} the right directory?")
        if content.get("version") != FORMAT_VERSION:
            raise BankError(
                f"{source} has format version {content.get('version')!r}; patchbank {__version__} reads version "
                f"{FORMAT_VERSION}. Use the version of patchbank that made it ({_maker(content)})."
            )
        try:
            return cls._from_json(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BankError(
                f"{source} is damaged: {type(error).__name__} {error}. Restore it or start anew."
            ) from error

    def create(self, directory: Path, scratch: Path) -> Manifest:
        """Write it as `directory`'s, unless another process was first: then that one's is returned."""
        temporary = self._write(scratch)
        try:
            os.link(temporary, directory / FILE_NAME)  # a rename would replace what another run relies on
            fsync_directory(directory)
        except FileExistsError:
            pass
        return Manifest.read(directory)

    def replace(self, directory: Path, scratch: Path) -> None:
        """Write it as `directory`'s in the place of the one that is there."""
        self._write(scratch).rename(directory / FILE_NAME)
        fsync_directory(directory)

    def _write(self, scratch: Path) -> Path:
        temporary = scratch / FILE_NAME
        write_and_sync(temporary, [(json.dumps(self.to_dict(), indent=2) + "\n").encode()])
        return temporary

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """A bank's ``bank.json``. Raises BankError where there is none, or it is damaged or of a later format."""
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise BankError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise BankError(f"{path} is damaged: it is not JSON ({error}). Restore it or start anew.") from error
        return cls.from_dict(content, path)

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        values = {each.name: content[each.name] for each in fields(cls) if each.name in content}
        rows, columns = values.pop("grid")
        fingerprint = Fingerprint.from_dict(values.pop("fingerprint"))
        manifest = cls(grid=(int(rows), int(columns)), fingerprint=fingerprint, **values)
        for name, choices in (("layout", Layout), ("dtype", StoredDtype), ("resize", ResizeMode)):
            if (value := getattr(manifest, name)) not in get_args(choices):
                raise ValueError(f"unknown {name} {value!r}")
        sizes: list[Any] = [rows, columns, manifest.dim, manifest.input_size, manifest.patch_size, manifest.batch_size]
        if manifest.layout == "shards":
            sizes.append(manifest.shard_images)
        if any(type(size) is not int or not 1 <= size < _LARGEST for size in sizes):
            raise ValueError("a size is not positive")
        texts = [manifest.dataset, manifest.device, manifest.split or "", manifest.adopted or ""]
        texts += manifest.versions.values()
        if any(type(flag) is not bool for flag in (manifest.compiled, manifest.cls)) or any(
            type(text) is not str for text in texts
        ):
            raise ValueError("a fact is of another type")
        return manifest


def _maker(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    return f"patchbank {versions['patchbank']}" if isinstance(versions, dict) and "patchbank" in versions else "later"
