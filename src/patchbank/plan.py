"""The plan of a run: everything that can be found out, and can be wrong, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchbank.bank import ezhoi
from patchbank.bank.manifest import Manifest
from patchbank.bank.writer import disk_bytes, done_keys, existing_manifest, removable
from patchbank.config import ExtractConfig, Fingerprint
from patchbank.datasets import Dataset
from patchbank.encoder.encoder import auto_batch_size, resolve_device
from patchbank.encoder.weights import Checkpoint, find_checkpoint
from patchbank.errors import BankError, DatasetError
from patchbank.files import free_bytes, nearest_existing
from patchbank.models import MEAN, STD, Model, get_model


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """One bank that a run will make or complete, checked as far as that is possible without writing anything.

    Attributes:
        dataset, out, config: what was asked for.
        model: the model.
        checkpoint: its weights; None if the official file has to be downloaded first.
        manifest: of the bank: the one that is there, or the one that will be written.
        resumed: whether the bank is there already.
        selected: positions in ``dataset.records`` of the images this run is for.
        todo: those of them without a feature yet.
    """

    dataset: Dataset
    out: Path
    config: ExtractConfig
    model: Model
    checkpoint: Checkpoint | None
    manifest: Manifest
    resumed: bool
    selected: range
    todo: list[int]

    @property
    def bytes_needed(self) -> int:
        """Disk space that the images left to do will take."""
        return disk_bytes(len(self.todo), self.manifest)

    @property
    def bytes_freed(self) -> int:
        """Disk space of the features that ``overwrite`` deletes first."""
        return sum(path.stat().st_size for path in removable(self.out)) if self.config.overwrite else 0


def make_plan(dataset: Dataset, out: Path, config: ExtractConfig) -> ExtractPlan:
    """Find out what there is to do. Writes nothing; raises every PatchbankError that `extract` can foresee."""
    done = set() if config.overwrite else done_keys(out)
    ezhoi.check_names([*(record.key for record in dataset.records), *done])
    _check_images(dataset)
    model = get_model(config.model)
    device = resolve_device(config.device, config.precision)
    checkpoint = find_checkpoint(model, config.weights, config.checkpoints)
    sha256 = checkpoint.sha256 if checkpoint else model.sha256
    wanted = Manifest(
        layout="ezhoi",
        dataset=dataset.name,
        split=dataset.split,
        grid=model.grid,
        dim=model.output_dim,
        dtype=config.dtype,
        resize=config.resize,
        input_size=model.input_size,
        patch_size=model.patch_size,
        fingerprint=make_fingerprint(model, sha256, config),
        batch_size=config.batch_size or auto_batch_size(model, device),
        device=device.type,
    )
    existing = existing_manifest(out, wanted, overwrite=config.overwrite)
    limit = min(config.limit or len(dataset), len(dataset))
    selected = config.partition.of(limit)
    return ExtractPlan(
        dataset=dataset,
        out=out,
        config=config,
        model=model,
        checkpoint=checkpoint,
        manifest=existing or wanted,
        resumed=existing is not None,
        selected=selected,
        todo=[position for position in selected if dataset.records[position].key not in done],
    )


def make_fingerprint(model: Model, weights_sha256: str, config: ExtractConfig) -> Fingerprint:
    """What decides the numbers that this configuration gives."""
    fill = " on the mean colour" if config.resize == "pad" else ""
    return Fingerprint(
        model=model.name,
        weights_sha256=weights_sha256,
        architecture=model.architecture,
        output="patch tokens: ln_post and proj on every token, [CLS] dropped, not normalised",
        preprocessing=(
            f"{config.resize} to {model.input_size}{fill}, Pillow bicubic in the image's own mode, RGB after "
            f"cropping, no EXIF rotation, mean {MEAN}, std {STD}"
        ),
        precision=config.precision,
        dtype=config.dtype,
    )


def _check_images(dataset: Dataset) -> None:
    if not any(record.path.exists() for record in dataset.records):
        first = dataset.records[0]
        raise DatasetError(
            f"None of the {len(dataset):,} listed images is in {dataset.images}: there is no {first.path}, for one. "
            "Are these the images of another split or data set? Name their directory with --images."
        )


def check_disk(plans: Sequence[ExtractPlan]) -> None:
    """Raise BankError if the banks will not fit on their disks, taken together."""
    needed: dict[int, tuple[int, Path]] = {}
    for plan in plans:
        disk = nearest_existing(plan.out).stat().st_dev
        before = needed[disk][0] if disk in needed else 0
        needed[disk] = (before + plan.bytes_needed - plan.bytes_freed, plan.out)
    for size, place in needed.values():
        if size > (free := free_bytes(place)):
            raise BankError(
                f"Not enough disk: the features need {size / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free. "
                "Free some space, choose another --out, or store them in half the space with --dtype float16."
            )
