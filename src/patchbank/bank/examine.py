"""What can be wrong with a bank, and finding it in one feature."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from patchbank.bank.unpickling import UnsafePickleError, parse_pickle
from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.errors import BankError


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        name: for machines.
        says: for people, of one or several features.
        mend: ``repair`` (without pixels), ``extract`` (that feature from its image), ``anew`` (all of them), ``look``
            (somebody must), or None where there is nothing to mend.
    """

    name: str
    says: str
    mend: Literal["repair", "extract", "anew", "look"] | None


# The worst first.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("unsafe", "would run code when unpickled; was not run", "extract"),
        Kind("damaged-shard", "shard that cannot be read", "extract"),
        Kind("damaged-ledger", "part of the ledger that cannot be read", "extract"),
        Kind("unread", "could not be read: the disk, or permissions", "look"),
        Kind("unreadable", "cut short, or no tensor of features", "extract"),
        Kind("checksum", "not what was written: the checksum differs", "extract"),
        Kind("pixels", "not what the image's pixels give", "anew"),
        Kind("shape", "of a wrong shape", "extract"),
        Kind("not-finite", "with NaN or Inf", "extract"),
        Kind("zero", "with tokens that are all zero", "extract"),
        Kind("normalised", "already normalised: the norms are lost", "extract"),
        Kind("missing", "missing: the image is listed, and has no feature", "extract"),
        Kind("failed", "could not be extracted", "extract"),
        Kind("cls", "with [CLS] left in", "repair"),
        Kind("cuda", "saved from a GPU: it cannot be loaded without one", "repair"),
        Kind("dtype", "of a dtype that EZ-HOI's reader does not take", "repair"),
        Kind("view", "a view: with storage that is not its own alone", "repair"),
        Kind("gradient", "asking for gradients", "repair"),
        Kind("extra", "of no listed image (harmless)", None),
        Kind("aside", "set aside by an earlier repair (delete it once nothing is missing)", None),
    )
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a name in `KINDS`.
        name: the image's key, or the file's name in the bank where the key is not known.
        detail: what was found, for people.
    """

    kind: str
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Look:
    """What was found in one pickle.

    Attributes:
        defects: (kind, detail) of each.
        shape: the tensor's; None where there is none.
    """

    defects: tuple[tuple[str, str], ...]
    shape: tuple[int, ...] | None = None


def look_at(path: Path, dtype: torch.dtype = torch.float32) -> Look:
    """Everything that can be said of one pickle by itself; not of its shape, which the others must tell about."""
    try:
        found = parse_pickle(path.read_bytes())
    except (OSError, MemoryError) as error:  # of the file nothing is known
        return Look((("unread", getattr(error, "strerror", None) or "out of memory"),))
    except UnsafePickleError as error:
        return Look((("unsafe", str(error)),))
    except BankError as error:
        return Look((("unreadable", str(error)),))
    if not found.tensor.is_floating_point():
        return Look((("unreadable", f"it holds {str(found.tensor.dtype).removeprefix('torch.')} numbers"),))
    tensor = found.tensor
    defects: list[tuple[str, str]] = []
    if found.location != "cpu":
        defects.append(("cuda", found.location))
    if tensor.dtype != dtype:
        defects.append(("dtype", str(tensor.dtype).removeprefix("torch.")))
    if found.storage_bytes > tensor.nbytes:
        defects.append(("view", f"{found.storage_bytes:,} bytes for a tensor of {tensor.nbytes:,}"))
    elif not tensor.is_contiguous():
        defects.append(("view", f"strides {tuple(tensor.stride())}"))
    if found.requires_grad:
        defects.append(("gradient", ""))
    return Look((*defects, *look_into(tensor)), tuple(tensor.shape))


def look_into(tokens: Tensor) -> list[tuple[str, str]]:
    """(kind, detail) of what is wrong with the numbers of (N, D) patch tokens, or of any other tensor."""
    tokens = tokens.float()
    finite = torch.isfinite(tokens)
    if not finite.all():
        return [("not-finite", f"{int((~finite).sum()):,} of {tokens.numel():,} numbers")]
    norms = tokens.norm(dim=-1)
    if (zero := int((norms == 0).sum())) > 0:
        return [("zero", f"{zero:,} of {norms.numel():,} tokens")]
    if tokens.ndim == 2 and bool(((norms - 1).abs() < 5e-3).all()):
        return [("normalised", "every token's norm is 1")]
    return []


def shape_defect(shape: tuple[int, ...], expected: tuple[int, int] | None) -> tuple[str, str] | None:
    """(kind, detail) of a shape that is not the expected one; of none it is enough to be some model's."""
    if shape == expected or (expected is None and model_of(shape)):
        return None
    if len(shape) == 2 and (shape[0] - 1, shape[1]) == expected:
        return "cls", f"{shape}"
    if shape[-1:] == (511,):
        return "shape", f"{shape}: what the stock `clip` package gives, where EZ-HOI's own was meant"
    wanted = f"; expected is {expected}" if expected else ""
    return "shape", f"{shape}{wanted}"


def model_of(shape: tuple[int, ...]) -> Model | None:
    """The model whose patch tokens have this shape."""
    return next((model for model in MODELS.values() if (model.tokens, model.output_dim) == shape), None)
