"""Every error patchbank raises for a cause it knows. Each message names the cause and what to do about it."""


class PatchbankError(Exception):
    """The base of them all: the setup is wrong or the run cannot go on. The command line exits with code 2."""


class ConfigError(PatchbankError):
    """Options that are unknown, out of range, or do not go together."""


class DatasetError(PatchbankError):
    """Annotation files or image directories that are missing, of another structure, or not to be trusted."""


class WeightsError(PatchbankError):
    """A checkpoint that is missing, damaged, or of another model."""


class BankError(PatchbankError):
    """A bank that cannot be opened, continued or written."""


class KeyNotInBank(BankError, KeyError):
    """The bank holds no feature for this key: it was never listed, or its extraction failed."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return Exception.__str__(self)
