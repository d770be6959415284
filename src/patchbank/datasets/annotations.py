"""Reading the list of images from any of the field's annotation files, told apart by structure and not by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchbank.errors import DatasetError
from patchbank.files import parse_json

_KNOWN = (
    "Known are: HICO-DET's list of {file_name, ...}; V-COCO's {annotations: [{file_name, ...}], ...}; "
    "UPT's {filenames: [...], annotation: [...], ...}."
)


def read_file_names(path: Path) -> list[str]:
    """The ``file_name`` of every listed image, in the file's order, repeats included.

    Raises DatasetError where the file cannot be read, is not JSON, or is none of the known structures.
    """
    content = _read_json(path)
    if isinstance(content, list):  # HICO-DET: trainval_hico.json, test_hico.json
        entries, where = content, "entry"
    elif isinstance(content, dict) and isinstance(content.get("annotations"), list):  # V-COCO
        entries, where = content["annotations"], "annotations entry"
    elif isinstance(content, dict) and isinstance(content.get("filenames"), list):  # UPT's HICO-DET
        entries, where = [{"file_name": name} for name in content["filenames"]], "filenames entry"
    else:
        keys = ", ".join(map(repr, list(content)[:6])) if isinstance(content, dict) else ""
        found = f"an object of {keys or 'nothing'}" if isinstance(content, dict) else "a bare value"
        raise DatasetError(f"{path} is JSON of another structure ({found}). {_KNOWN}")

    names: list[str] = []
    for index, entry in enumerate(entries):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DatasetError(f"{path}: {where} {index} has no file_name. {_KNOWN}")
        names.append(name)
    if not names:
        raise DatasetError(f"{path} lists no images.")
    return names


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"The annotation file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"The annotation file {path} is not UTF-8 text: {error.reason}.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(
            f"The annotation file {path} is not valid JSON ({error}). Was its download cut short?"
        ) from error
