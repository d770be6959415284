"""Files that a command writes to the user's path: it never replaces a third-party file."""

from __future__ import annotations

from pathlib import Path

from patchbank.errors import ConfigError

_LOOKED_AT = 1 << 24  # bytes at a file's start, searched for the mark


def require_own(target: Path, mark: str, what: str) -> None:
    """Raise ConfigError if `target` exists without the mark of this program's files. An empty file may be replaced."""
    try:
        if not target.exists():
            return
        if target.is_file():
            with open(target, "rb") as file:
                content = file.read(_LOOKED_AT)
            if not content or mark.encode() in content:
                return
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}.") from error
    raise ConfigError(f"{target} is there, and is not {what}: name another file, or remove it.")
