"""Reading any of the field's annotation files, recognised by structure and not by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from patchbank.errors import DatasetError
from patchbank.files import parse_json, read_regular

_KNOWN = (
    "Known are: HICO-DET's list of {file_name, ...}; V-COCO's {annotations: [{file_name, ...}], ...}; "
    "UPT's {filenames: [...], annotation: [...], ...}."
)


class Annotations(NamedTuple):
    """The content of an annotation file.

    Attributes:
        structure: ``hicodet``: trainval_hico.json, test_hico.json. ``upt``: instances_train2015.json,
            instances_test2015.json. ``vcoco``: instances_vcoco_*.json.
        content: the parsed JSON.
        file_names: of every listed image, in the file's order, with repeats.
    """

    structure: Literal["hicodet", "upt", "vcoco"]
    content: Any
    file_names: list[str]


def read_annotations(path: Path) -> Annotations:
    """Read an annotation file. Raises DatasetError if it is unreadable, not JSON, or of an unknown structure."""
    content = _read_json(path)
    if isinstance(content, list):
        found, where = Annotations("hicodet", content, _file_names(content)), "entry"
    elif isinstance(content, dict) and isinstance(entries := content.get("annotations"), list):
        found, where = Annotations("vcoco", content, _file_names(entries)), "annotations entry"
    elif isinstance(content, dict) and isinstance(names := content.get("filenames"), list):
        found, where = Annotations("upt", content, names), "filenames entry"
    else:
        keys = ", ".join(map(repr, list(content)[:6])) if isinstance(content, dict) else ""
        kind = f"an object of {keys or 'nothing'}" if isinstance(content, dict) else "a bare value"
        raise DatasetError(f"{path} is JSON of another structure ({kind}). {_KNOWN}")
    for index, name in enumerate(found.file_names):
        if not isinstance(name, str):
            raise DatasetError(f"{path}: {where} {index} has no file_name. {_KNOWN}")
    if not found.file_names:
        raise DatasetError(f"{path} lists no images.")
    return found


def read_file_names(path: Path) -> list[str]:
    """The ``file_name`` of every listed image. Raises as `read_annotations`."""
    return read_annotations(path).file_names


def _file_names(entries: list[Any]) -> list[Any]:
    try:
        return [entry["file_name"] for entry in entries]
    except (KeyError, TypeError):
        return [entry.get("file_name") if isinstance(entry, dict) else None for entry in entries]


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_regular(path))
    except OSError as error:
        raise DatasetError(f"The annotation file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"The annotation file {path} is not UTF-8 text: {error.reason}.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(
            f"The annotation file {path} is not valid JSON ({error}). Was its download cut short?"
        ) from error
    except ValueError as error:
        raise DatasetError(f"The annotation file {path} has a number that is out of range ({error}).") from error
