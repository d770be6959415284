"""Where a model's files are: a repository of the Hugging Face hub, or a directory."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchbank.config import ExtractConfig
from patchbank.encoders import hub
from patchbank.encoders.hub import HubFile
from patchbank.encoders.transformers.configuration import PREFIX
from patchbank.encoders.weights import sha256_of_weights
from patchbank.errors import ConfigError, WeightsError, first_line
from patchbank.files import bytes_text, is_plain, parse_json, read_regular

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
# Bytes of a JSON file, and of a tokenizer's: vocabularies take tens of megabytes.
_MOST, _MOST_WORDS = 1 << 24, 1 << 28


@dataclass(frozen=True)
class Place:
    """Where a model's files are.

    Attributes:
        repo: ``ORG/NAME``.
        revision: its commit, of which all files are; None for a directory.
        directory: with all files, instead of the repository.
        file: with the weights, instead of those there.
    """

    repo: str
    revision: str | None = None
    directory: Path | None = None
    file: Path | None = None

    @classmethod
    def of(cls, config: ExtractConfig) -> Place:
        """The place that a configuration names. Raises ConfigError and WeightsError."""
        repo = config.model.removeprefix(PREFIX)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) is None:
            raise ConfigError(
                f"There is no model {config.model!r}: name a repository of the Hugging Face hub, such as "
                f"{PREFIX}facebook/dinov2-base."
            )
        given = config.weights and config.weights.absolute()
        if given is not None and given.is_dir():
            return cls(repo, directory=given)
        if given is not None and given.with_name("config.json").is_file():
            return cls(repo, directory=given.parent, file=given)
        try:
            found = hub.locate(repo, ["config.json"])
            _path(found)
            return cls(repo, found.revision, file=given)
        except WeightsError as error:
            if given is None:
                raise
            sha256_of_weights(given)  # it must be there
            raise WeightsError(
                f"{given} has no config.json beside it: give --weights the directory that save_pretrained made. Nor is "
                f"it on the hub: {error.args[0]}"
            ) from error

    def find(self, *names: str) -> HubFile | Path:
        """The first of some files that is there. Raises WeightsError if none is."""
        if self.directory is None:
            return hub.locate(self.repo, names, self.revision)
        found = [path for name in names if (path := self.directory / name).is_file()]
        if not found:
            raise WeightsError(
                f"{self.directory} has no {' or '.join(names)}: give --weights a directory that save_pretrained made."
            )
        return found[0]

    def path(self, *names: str, most: int = _MOST) -> Path:
        """The same on this machine; a file of at most that many bytes."""
        return _path(self.find(*names), most)

    def read(self, *names: str) -> dict[str, Any]:
        """The object in the first of some JSON files. Raises WeightsError."""
        path = self.path(*names)
        try:
            if path.stat().st_size > _MOST:
                raise ValueError("it is too large")
            content: dict[str, Any] = parse_json(read_regular(path), dict[str, Any])
            return content
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{path} cannot be read as JSON ({first_line(error)}). Download it again.") from error

    def weights(self) -> tuple[HubFile | Path, ...]:
        """The files of the weights. Raises WeightsError."""
        if self.file is not None:
            sha256_of_weights(self.file)  # it must be there
            return (self.file,)
        first = self.find(*_WEIGHTS)
        name = first.name
        if not name.endswith(".index.json"):
            return (first,)
        shards = self.read(name).get("weight_map")
        files = {each for each in shards.values() if isinstance(each, str)} if isinstance(shards, dict) else set()
        if not files or len(files) > 1000 or not all("/" not in each and is_plain(each) for each in files):
            raise WeightsError(f"{name} of {self.directory or self.repo} names no files of weights. Download it again.")
        return tuple(self.find(each) for each in sorted(files))

    def tokenizer(self) -> Path:
        """The directory with the tokenizer's files. Raises WeightsError if the hub has none."""
        if self.directory is not None:
            return self.directory
        self.path("config.json")
        for name in _TOKENIZER[1:]:
            with contextlib.suppress(WeightsError):  # not every tokenizer has all
                self.path(name, most=_MOST_WORDS)
        return self.path(_TOKENIZER[0], most=_MOST_WORDS).parent


def _path(file: HubFile | Path, most: int = _MOST) -> Path:
    """A file on this machine; downloads one of at most that many bytes. Raises WeightsError."""
    if isinstance(file, Path):
        return file
    if file.size > most:
        raise WeightsError(f"{file.url} has {bytes_text(file.size)}: that is no {file.name}.")
    path = hub.download(file).path
    assert path is not None
    return path
