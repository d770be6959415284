"""The command that extracts what a bank lacks, for the user to run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.cli.console import one_line, say
from patchbank.config import BOXES
from patchbank.features import UNKNOWN

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest


def show_completing(
    title: str, bank: Path, manifest: Manifest | None, options: str, weights: Path | None, pickles: str = "PICKLES"
) -> None:
    """Print the command that extracts what a bank lacks, below a title; what nobody knows is for the user to fill in.

    Imported features of unknown origin cannot be completed: their pickles are imported again, and compared.

    Args:
        options: that name the images.
        pickles: the directory that the bank was imported from.
    """
    from patchbank.encoders import known_weights, models_with

    place = shlex.quote(str(bank))
    if weights is not None:
        options += f" --weights {shlex.quote(str(weights))}"
    elif manifest is not None and not known_weights(manifest.identity) and UNKNOWN not in manifest.identity.values():
        options += " --weights FILE"
    command = f"patchbank repair {place} --extract{options}"
    if manifest is not None and UNKNOWN in manifest.identity.values():
        title = "To complete it, import the pickles again, and compare them with a fresh extraction:"
        options += " --layout shards" * (manifest.layout == "shards") + f" --resize {manifest.input.resize}"
        if manifest.model not in models_with(manifest.shape):  # which are of the model's own size
            options += " --input-size {}x{} --pool-grid {}".format(*manifest.input.size, manifest.input.pool)
        command = (
            f"patchbank import {pickles} {place} --model {shlex.quote(manifest.model)}{options} --sample 20 --overwrite"
        )
    elif manifest is not None and manifest.dataset == BOXES:
        made = f"--model {shlex.quote(manifest.model)} --crop {manifest.input.cut}"
        command = f"patchbank extract boxes IMAGES --boxes FILE --out {place} {made}{options}"
    elif manifest is not None and manifest.reduction is not None:
        title = "Complete the bank that it was made of, and convert that again:"
        command = f"patchbank convert SRC {place} --pca {manifest.reduction.components} --dtype {manifest.dtype}"
    say(title)
    say(f"  {one_line(command)}", "cyan")
