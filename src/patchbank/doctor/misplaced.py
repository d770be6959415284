"""Images that lie in another directory than their split's, and how to bring directory and list together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from patchbank.doctor import mends
from patchbank.doctor.findings import Finding, extract_command, relative, run
from patchbank.doctor.splits import Elsewhere, Split


def misplaced(
    root: Path, split: Split, found: Elsewhere, splits: Sequence[Split], told: set[tuple[str, Path]]
) -> Finding:
    """Images of a split that lie in another directory, and how to bring directory and list together."""
    owner = next((each for each in splits if each is not split and _same(each.actual, found.place)), None)
    here, there = relative(split.images, root), relative(found.place, root)
    data = {
        "cause": "elsewhere",
        "count": len(found.names),
        "place": str(found.place),
        "expected": str(split.images),
        "example": found.names[0],
    }

    def problem(what: str, text: str, mend: str) -> Finding:
        return Finding(what=what, level="problem", text=text, mend=mend, data=data)

    count = f"{len(found.names):,} of the {len(split.keys):,} listed images"
    if found.renamed:
        return problem(
            split.title,
            f"{count} lie in {there} under COCO 2017's names: {found.names[0]} is {found.names[0].rpartition('_')[2]}. "
            f"V-COCO takes COCO 2014's, in {here}.",
            mends.fetch_images(split.dataset, split.split, root),
        )
    exchanged = owner is not None and any(_same(each.place, split.actual) for each in owner.elsewhere)
    both = f"{split.dataset} {split.split}, {owner.split}" if owner else split.title
    if owner is not None and _named_after(found, found.place) and not _named_after(found, split.images):
        # The directory is right, so the list is wrong.
        assert split.annotations is not None
        wrong = relative(split.annotations, root)
        text = f"{wrong} lists images of the split {owner.split} ({found.names[0]}, in {there})"
        if exchanged and owner.annotations is not None:
            told.add((owner.split, split.actual))
            return problem(
                both,
                f"{text}, and {relative(owner.annotations, root)} those of {split.split}: the two lists are swapped.",
                mends.swap(split.annotations, owner.annotations),
            )
        return problem(
            split.title,
            f"{text}: it is another list than that of {split.title}.",
            f"Put the list of {split.title} at {split.annotations} (see EZ-HOI's README).",
        )
    if owner is not None and exchanged and not split.there and not owner.there:
        told.add((owner.split, split.actual))
        return problem(
            both,
            f"The two image directories are swapped: {here} holds the images of {owner.split} and {there} those of "
            f"{split.split} ({found.names[0]}, for one).",
            mends.swap(split.images, owner.images),
        )
    others = [name for each in splits if each is not split for name in (*_in(each, found.place), *_listed(each, owner))]
    text = f"{count} lie in {there}, not in {here}: {found.names[0]}, for one."
    if not others and _is_free(split.images) and not split.images.is_relative_to(found.place):
        return problem(split.title, text, mends.move_directory(found.place, split.images))
    move = mends.move_files(found.place, split.images, found.names, others)
    without = run(extract_command(root, split.dataset, "--split", split.split, "--images", found.place))
    return problem(split.title, text, move or f"Move them there, or leave them and run:\n{without}")


def _in(split: Split, place: Path) -> list[str]:
    """Images of another split that lie in `place`, a directory that is not its own."""
    return [name for each in split.elsewhere if _same(each.place, place) for name in each.names]


def _listed(split: Split, owner: Split | None) -> list[str]:
    """Images of a split that lie in its own directory, if that is `owner`'s."""
    return split.there if split is owner else []


def _named_after(found: Elsewhere, directory: Path) -> bool:
    """Whether image names carry a directory's: ``COCO_train2014_...`` and ``train2014``."""
    return all(directory.name in name for name in found.names)


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _is_free(directory: Path) -> bool:
    """Whether a directory can be put here: nothing is, or an empty directory."""
    if not os.path.lexists(directory):
        return True
    try:
        return directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir())
    except OSError:
        return False
