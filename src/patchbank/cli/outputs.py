"""Files that a command writes where the user says: never over a third-party file."""

from __future__ import annotations

from pathlib import Path

from patchbank.errors import ConfigError

_LOOKED_AT = 1 << 24  # bytes of a file, within which its mark stands


def require_own(target: Path, mark: str, what: str) -> None:
    """Raise ConfigError where something lies at `target` that does not hold the mark of this program's files.

    An empty file is nobody's.
    """
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
