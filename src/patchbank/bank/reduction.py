"""Principal components: fitted on a bank in one pass, kept in a file beside its shards, applied to features.

They are computed in float64, in an order that the bank's keys decide, and stored as float32. Each product is computed
by one thread, and several products at once: the bits do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.manifest import Manifest
from patchbank.bank.storage import Storage
from patchbank.errors import BankError, ConfigError
from patchbank.features import Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from patchbank.bank.reader import Bank

_BLOCK = 1 << 19  # numbers of features of a product; more are no faster
_AT_ONCE = max(1, min(8, os.cpu_count() or 1))  # products
_HEADER = 4096  # bytes: more than the file has before its numbers


@dataclass(frozen=True, eq=False)
class Reducer:
    """A reduction with its numbers.

    Attributes:
        made: what the manifest says of it.
        content: the file.
        components: (K, D) float64, orthonormal rows; of the largest entry of each, the sign is positive.
        mean: (D,) float64.
    """

    made: Reduction
    content: bytes
    components: NDArray[np.float64]
    mean: NDArray[np.float64]

    def __call__(self, features: Any) -> Any:
        """Features (..., D) as an array or a tensor to (..., K) alike; float32 if not floats. Raises ValueError."""
        if not hasattr(features, "new_tensor"):
            features = np.asarray(features)
        if features.shape[-1:] != (self.made.dim,):
            raise ValueError(f"features (..., {self.made.dim}) are needed, not {tuple(features.shape)}")
        if not hasattr(features, "new_tensor"):
            dtype = features.dtype if np.issubdtype(features.dtype, np.floating) else np.float32
            return ((features - self.mean) @ self.components.T).astype(dtype)
        # In float64: the mean may be many times as long as what distinguishes two features.
        exact = features.double()
        mean, components = exact.new_tensor(self.mean), exact.new_tensor(self.components)
        reduced = (exact - mean) @ components.T
        return reduced.to(features.dtype) if features.is_floating_point() else reduced.float()

    def reduced(self, manifest: Manifest) -> Manifest:
        """The manifest of a bank after this reduction."""
        names, width = self.made.outputs, self.made.components
        outputs = {
            name: replace(each, shape=(*each.shape[:-1], width)) if name in names else each
            for name, each in manifest.outputs.items()
        }
        return replace(manifest, outputs=outputs, reduction=self.made)


def read(place: Storage, made: Reduction) -> Reducer:
    """The reduction of a bank's manifest, read from its file. Raises BankError if it is missing or damaged."""
    path = place.directory / made.name
    try:
        start, size = place.head(made.name)
        if size > (most := 4 * made.dim * (made.components + 1) + _HEADER):
            raise BankError(f"{path} is damaged: it has {size:,} bytes, and at most {most:,} are expected.")
        content = start + (place.read(made.name, len(start), size) if len(start) < size else b"")
    except OSError as error:
        raise BankError(
            f"{path}, with the bank's principal components, cannot be read: {error.strerror or error}."
        ) from error
    if hashlib.sha256(content).hexdigest() != made.sha256:
        raise BankError(f"{path} is damaged: its content does not match its name.")
    return _reducer(made, content)


def _reducer(made: Reduction, content: bytes) -> Reducer:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        numbers = load(content)
        components, mean = (numbers[name].astype(np.float64) for name in ("components", "mean"))
        if (components.shape, mean.shape) != ((made.components, made.dim), (made.dim,)):
            raise ValueError(f"{components.shape} components, and a mean of {mean.shape}")
    except (KeyError, SafetensorError, ValueError) as error:
        raise BankError(f"{made.name} does not hold {made.components} components of {made.dim}: {error}.") from error
    return Reducer(made, content, components, mean)


def fit(
    source: Bank,
    made: Manifest,
    count: int,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
    known: tuple[Storage, Reduction] | None = None,
) -> Reducer | None:
    """The first `count` principal components of a bank's main output, for all outputs of its space.

    Args:
        made: what is kept of the bank's manifest.
        progress: called with the numbers of features read, and of all.
        stop: set it to end early, with None.
        known: an earlier reduction, and where it lies; it is read if it was fitted on the same features.

    Raises:
        ConfigError: `count` is less than 1, or more than the dimensions.
        BankError: the bank is reduced already, has too few features, or a damaged one.
    """
    import torch

    main, keys = made.outputs[made.main], list(source)
    width = main.shape[-1]
    if made.reduction is not None:
        raise BankError(f"{source.path} is reduced already, to {made.reduction}: convert the bank that it was made of.")
    if not 1 <= count <= width:
        raise ConfigError(f"--pca {count}: {made.main} of {source.path} has {width} dimensions. Choose 1 to {width}.")
    if (rows := len(keys) * prod(main.shape[:-1])) <= count:
        raise BankError(f"--pca {count} needs more features than {count}, and {source.path} has {rows:,}.")
    fitted_on = hashlib.sha256("".join(map(source.sha256, keys)).encode()).hexdigest()
    names = (
        made.main,
        *(name for name, each in made.outputs.items() if name != made.main and each.space == main.space),
    )
    if known and (known[1].outputs, known[1].components, known[1].fitted_on) == (names, count, fitted_on):
        with suppress(BankError):
            return read(*known)
    step = max(1, _BLOCK // prod(main.shape))
    blocks = [keys[begin : begin + step] for begin in range(0, len(keys), step)]

    def read_block(some: Sequence[str]) -> Tensor:
        for key in some:
            source.check(key)
        return torch.cat([source.output(key, made.main).reshape(-1, width) for key in some]).double()

    def moments(some: Sequence[str]) -> tuple[Tensor, Tensor]:
        block = read_block(some) - shift
        return block.sum(0), block.T @ block

    with one_thread(), ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="components") as threads:
        # Near the mean, so that the squares of what is far from zero do not drown the variance.
        shift = read_block(blocks[0]).mean(0)
        mean, covariance = torch.zeros_like(shift), shift.new_zeros(width, width)
        for begin in range(0, len(blocks), _AT_ONCE):
            if stop and stop.is_set():
                return None
            for total, products in threads.map(moments, blocks[begin : begin + _AT_ONCE]):
                mean += total / rows
                covariance += products / rows
            if progress:
                progress(min((begin + _AT_ONCE) * step, len(keys)), len(keys))
        variances, vectors = torch.linalg.eigh(covariance - mean.outer(mean))  # the largest last
    if variances[-1] <= 0:
        raise BankError(f"--pca {count}: all features of {source.path} are equal, and have no components.")
    components = vectors.T.flip(0)[:count]
    signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    content = _file(components * signs, shift + mean)
    made_of = Reduction(
        outputs=names,
        dim=width,
        components=count,
        explained=float(variances[-count:].sum() / variances.sum()),
        fitted_on=fitted_on,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return _reducer(made_of, content)


def _file(components: Tensor, mean: Tensor) -> bytes:
    from safetensors.torch import save

    content: bytes = save({"components": components.float().contiguous(), "mean": mean.float()})
    return content


@contextmanager
def one_thread() -> Iterator[None]:
    """Products are computed by the thread that asks for them, also in threads that it starts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
