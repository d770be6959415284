"""Every error patchbank raises for a cause it knows. Each message names the cause and what to do about it.

The last line of a message of several lines is what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar

_SECRETS = re.compile(r"(?:(?<=http://)|(?<=https://))[^\s/?#]*@|\?[^\s?=]+=\S*?(?=[^\w\s]*(?:\s|$))")
_FLAG = re.compile(r"(?<![^\s(])--([a-z]+(?:-[a-z]+)*)\b")  # not within a path


class PatchbankError(Exception):
    """The base class: the setup is wrong, or the run cannot continue. The command line exits with code 2.

    Attributes:
        flags: whether messages name options as the command line does, ``--batch-size``, or as Python's arguments are
            named, ``batch_size``. Messages are written with flags.
    """

    flags: ClassVar[bool] = False

    def __str__(self) -> str:  # nor KeyError's, which would show the message in quotes
        return with_options(Exception.__str__(self))


class ConfigError(PatchbankError):
    """Options that are unknown, out of range, or do not go together."""


class DatasetError(PatchbankError):
    """Annotation files or image directories that are missing, of another structure, or unsafe."""


class WeightsError(PatchbankError):
    """A checkpoint that is missing, damaged, or of another model."""


class BankError(PatchbankError):
    """A bank that cannot be opened, continued or written."""


class TogetherTooLargeError(PatchbankError):
    """A GPU's memory does not hold several models at once: make their banks one after the other."""


class KeyNotInBank(BankError, KeyError):
    """The bank holds no feature for this key: it was never listed, or its extraction failed."""


def with_options(text: str) -> str:
    """A message for the user, with each ``--option`` as `PatchbankError.flags` says; those in `commands` stay."""
    if PatchbankError.flags:
        return text
    parts = text.split("`")
    parts[::2] = [_FLAG.sub(lambda flag: flag[1].replace("-", "_"), part) for part in parts[::2]]
    return "`".join(parts)


def install(extra: str) -> str:
    """How to install the packages of an extra, such as ``timm``: the end of a message."""
    return f'pip install "patchbank[{extra}]" (in a checkout: pip install -e ".[{extra}]")'


def printable(text: str, allowed: str = "") -> str:
    """The text with control and other invisible characters escaped, but for those allowed: it may come from data."""
    if text.isprintable():
        return text
    return "".join(each if each in allowed or each.isprintable() else repr(each)[1:-1] for each in text)


def without_secrets(text: str) -> str:
    """The text with the queries of URLs left out, which may be signatures, and users and passwords."""
    return _SECRETS.sub("", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without addresses and secrets: a file always fails with the same words."""
    text = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip() or type(error).__name__
    return without_secrets(text.splitlines()[0])
