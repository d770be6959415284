"""What features are: the input they are computed from, the outputs of a sample, the identity that decides the numbers.

Plain data without torch. An encoder states it, and a bank stores it; neither imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from patchbank.config import Decode, ResizeMode, Rounding, StoredDtype

if TYPE_CHECKING:
    from patchbank.transform import ImageTransform

GRID = "patch_tokens"  # the output of the grid: (N, D), row-major
CLS = "cls"  # the [CLS] token: (D,)
REGISTERS = "registers"  # the register tokens: (R, D)
POOLED = "pooled"  # the library's own feature of the whole image: (D,)
UNKNOWN = "unknown"  # a field of the identity of imported features

Rgb = Literal["first", "last", "white"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

# Named fields that decide the numbers: family, model, weights, activation, precision, and others of a family. Two
# encoders with equal identities and equal inputs give the same outputs.
Identity = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Input:
    """An encoder's input, and how an image becomes it.

    Attributes:
        size: (h, w) in pixels.
        patch: the side of a patch in pixels.
        mean, std: of RGB scaled to 0..1; the encoder subtracts and divides.
        interpolation: the resizing filter, by Pillow's name.
        resize: how an image of any shape becomes `size`.
        decoder: ``exact``: Pillow resizes; ``fast``: torch does.
        cover: (h, w) that an image is resized to or to cover, before the centre of `size` is cut out; None is `size`.
            With a crop fraction of 0.875, 224 pixels are the centre of 256.
        crop: how half a pixel at the cut is rounded: ``nearest`` (torchvision), ``down`` (transformers).
        rgb: when images become RGB: ``first``, before they are resized; ``last``, after it; ``white``: first, and laid
            over white where they are transparent.
        pool: the side of the square of patches that become one token, by their mean; 1 leaves them alone.
        cut: how a region is cut out of its image (`patchbank.regions`): ``pad``, ``squash``, ``context=1.5``, or
            ``grid``, which pools the image's grid. Empty for images.
    """

    size: tuple[int, int]
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    resize: ResizeMode = "center-crop"
    decoder: Decode = "exact"
    cover: tuple[int, int] | None = None
    crop: Rounding = "nearest"
    rgb: Rgb = "last"
    pool: int = 1
    cut: str = ""

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std", "cover"):  # lists would have no hash
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    @property
    def cell(self) -> int:
        """The side of a token's square in pixels: a patch's, or of several that are pooled."""
        return self.patch * self.pool

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches, as the encoder computes them."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw): rows and columns of tokens."""
        return self.size[0] // self.cell, self.size[1] // self.cell

    def transform(self, size: tuple[int, int]) -> ImageTransform:
        """How an image of (width, height) pixels becomes this input."""
        from patchbank.transform import ImageTransform  # it imports numpy, which the command line does not need

        return ImageTransform(*size, self.resize, self.size, self.cell, cover=self.cover, crop=self.crop)

    def resized_by(self, mode: ResizeMode | None) -> Input:
        """The same with another way to resize; it shows as much of an image as it can."""
        return self if mode in (None, self.resize) else replace(self, resize=mode, cover=None)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor that an encoder gives for a sample.

    Attributes:
        shape: of one sample: (N, D) for patch tokens, (D,) for [CLS].
        dtype: as stored; ``int8`` is stored with a float32 scale for each token.
        block: the transformer block it comes from, counted from 1.
        norm, projection: the layers after that block, by their names in the model; empty if there is none.
        variant: how the block was changed; empty if it was not.
    """

    shape: tuple[int, ...]
    dtype: StoredDtype = "float32"
    block: int
    norm: str = ""
    projection: str = ""
    variant: str = ""

    @property
    def space(self) -> tuple[object, ...]:
        """Outputs that are equal in this lie in one space: [CLS], registers and patch tokens of one block and norm."""
        return self.block, self.norm, self.projection, self.shape[-1]

    def stored_as(self, dtype: StoredDtype) -> Output:
        """The same in another stored dtype. ``int8`` makes a vector float16, since it is small."""
        return replace(self, dtype="float16" if dtype == "int8" and len(self.shape) == 1 else dtype)


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What reduced the features of some outputs to their principal components.

    A feature x, a row of D numbers, became ``components @ (x - mean)``; both lie in the bank's file `name`.

    Attributes:
        outputs: the names of the outputs that it reduced: the main one, whose components they are, and its space's.
        dim: the width D of the features before.
        components: how many there are, K: the width of the features now.
        explained: their share of the main output's variance, 0 to 1.
        fitted_on: SHA-256 of the checksums of the features that they were computed of.
        sha256: of the file.
    """

    outputs: tuple[str, ...]
    dim: int
    components: int
    explained: float
    fitted_on: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.components} of {self.dim} principal components"

    @property
    def name(self) -> str:
        """The name of the file with `components` (K, D) and `mean` (D,), float32."""
        return f"pca-{self.sha256[:16]}.safetensors"


def is_grid(name: str, output: Output) -> bool:
    """Whether an output has one row for each token of the grid."""
    return len(output.shape) == 2 and name != REGISTERS


def differences(
    one: Mapping[str, object], other: Mapping[str, object], *, prefix: str = ""
) -> list[tuple[str, object, object]]:
    """(field, value of one, value of the other) for each field in which two mappings differ; None: absent."""
    names = dict.fromkeys([*one, *other])
    return [(prefix + name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]
