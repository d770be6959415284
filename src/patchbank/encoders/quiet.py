"""Packages that families import on demand, without words of their own on the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from threading import RLock
from typing import Any

from patchbank.errors import ConfigError

# What is silenced, and what a family changes in a package for a moment, is the whole program's.
_LOCK = RLock()


@contextlib.contextmanager
def quiet(package: str, missing: str, *loggers: str) -> Iterator[Any]:
    """A package, for one thread at a time, while warnings and what some loggers say are off; "" is the root.

    Raises ConfigError, `missing`, if it is not installed.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_module(package)
        except ImportError as error:
            raise ConfigError(missing) from error
        silent = logging.NullHandler()
        before = [(logger, logger.level) for logger in map(logging.getLogger, loggers)]
        for logger, _ in before:
            logger.addHandler(silent)  # without any, the root's first word would make one for the whole program
            logger.setLevel(logging.CRITICAL)
        try:
            yield sys.modules[package.partition(".")[0]]
        finally:
            for logger, level in before:
                logger.setLevel(level)
                logger.removeHandler(silent)
