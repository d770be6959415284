"""`open_bank`: a mapping from key to tensor, with each image's geometry."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchbank import Bank, ExtractConfig, ImageTransform, extract, load_dataset, open_bank
from patchbank.bank.convert import convert
from patchbank.errors import BankError, KeyNotInBank
from tests.support import REPOSITORY, photographs


@pytest.fixture(scope="module")
def bank(tiny_config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    root = tmp_path_factory.mktemp("reader")
    photographs(root / "images", 4)
    (root / "images/broken.jpg").write_bytes(b"")
    extract(load_dataset("folder", root / "images"), root / "bank", tiny_config)
    return open_bank(root / "bank")


def test_it_is_a_mapping(bank: Bank) -> None:
    assert list(bank) == [f"photo_000{number}.jpg" for number in range(4)]
    assert len(bank) == len(list(bank.items())) == 4
    assert "photo_0001.jpg" in bank
    assert "broken.jpg" not in bank
    assert bank.get("nowhere.jpg") is None
    assert bank["photo_0001.jpg"].shape == (16, 32)
    assert bank != open_bank(bank.path)  # reads nothing to find out


def test_the_grid_is_row_major(bank: Bank) -> None:
    tokens, grid = bank["photo_0002.jpg"], bank.grid("photo_0002.jpg")
    assert grid.shape == (4, 4, 32)
    assert torch.equal(grid[2, 1], tokens[2 * 4 + 1])


def test_the_transform_is_the_images(bank: Bank) -> None:
    with Image.open(bank.path.parent / "images/photo_0001.jpg") as image:
        assert bank.transform("photo_0001.jpg") == ImageTransform(*image.size, "center-crop", (32, 32), 8)


def test_what_is_not_there(bank: Bank) -> None:
    with pytest.raises(KeyError, match=r"broken\.jpg' could not be extracted: the file is empty"):
        bank["broken.jpg"]
    with pytest.raises(KeyNotInBank, match=r"no 'photo_0001'\. Its keys look like 'photo_0000\.jpg'"):
        bank.transform("photo_0001")


def test_workers_get_it_pickled(bank: Bank) -> None:
    copy = pickle.loads(pickle.dumps(bank))
    assert torch.equal(copy["photo_0003.jpg"], bank["photo_0003.jpg"])


def test_a_file_that_something_else_wrote(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 1)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    bank = open_bank(tmp_path / "bank")
    bank.file("photo_0000.jpg").write_bytes(pickle.dumps(torch.ones(511)))
    with pytest.raises(BankError, match=r"holds \(511,\)"):
        bank["photo_0000.jpg"]


def test_what_is_not_a_bank(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="There is no bank"):
        open_bank(tmp_path / "nowhere")
    with pytest.raises(BankError, match="is a file"):
        open_bank(bank.path / "photo_0000_clip.pkl")
    with pytest.raises(BankError, match="It holds banks: bank"):
        open_bank(bank.path.parent)
    (tmp_path / "a_clip.pkl").write_bytes(b"")
    with pytest.raises(BankError, match=r"third-party pickles.*patchbank import"):
        open_bank(tmp_path)


def test_a_trainer_imports_neither_the_encoder_nor_the_command_line(bank: Bank) -> None:
    program = (
        "import sys, patchbank; bank = patchbank.open_bank(sys.argv[1]); bank[next(iter(bank))];"
        "bank.transform(next(iter(bank)));"
        "loaded = {name for name in sys.modules if name.split('.')[0] in ('patchbank', 'typer', 'rich', 'PIL')};"
        "encoder = {'patchbank.encoders.openai', 'patchbank.encoders.runner', 'patchbank.preprocess'};"
        "assert not loaded & {'typer', 'rich', 'patchbank.cli', 'PIL', *encoder}, loaded"
    )
    subprocess.run([sys.executable, "-c", program, str(bank.path)], check=True, cwd=REPOSITORY)


def test_what_asks_for_no_tensor_needs_no_torch(bank: Bank) -> None:
    program = (
        "import sys, patchbank; bank = patchbank.open_bank(sys.argv[1]); bank.failures, bank.bytes_on_disk();"
        "assert len(bank) == 4; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(bank.path)], check=True, cwd=REPOSITORY)


def test_a_shard_cut_short_under_a_reader(bank: Bank, tmp_path: Path) -> None:
    convert(bank, tmp_path / "bank", "shards", shard_size=1 << 20)
    reader = open_bank(tmp_path / "bank", mmap=False)
    assert all(torch.equal(reader[key], bank[key]) for key in bank)
    shard = reader.file("photo_0003.jpg")
    os.truncate(shard, shard.stat().st_size - 1)
    assert torch.equal(reader["photo_0000.jpg"], bank["photo_0000.jpg"])
    with pytest.raises(BankError, match="2,047 bytes came, not 2,048"):
        reader["photo_0003.jpg"]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("stored", ["pickles", "float32", "float16", "bfloat16", "int8"])
def test_a_batch_is_its_features(bank: Bank, tmp_path: Path, stored: str, mmap: bool) -> None:
    layout = "ezhoi" if stored == "pickles" else "shards"
    convert(bank, tmp_path / "bank", layout, "float32" if stored == "pickles" else stored, shard_size=5000)  # type: ignore[arg-type]
    read = open_bank(tmp_path / "bank", mmap=mmap)
    keys = list(read)
    for chosen in (keys, [keys[each] for each in (3, 0, 1, 1, 2)], keys[2:3], []):
        for name in read.manifest.outputs:
            alone = [read.output(key, name) for key in chosen]
            shape = (len(chosen), *read.manifest.outputs[name].shape)
            batch = read.batch(chosen, name)
            assert batch.dtype == read.output(keys[0], name).dtype and batch.is_contiguous()
            assert torch.equal(batch, torch.stack(alone) if alone else batch.new_empty(shape))
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert read.batch(chosen, name, dtype=dtype).dtype == dtype
                assert torch.equal(read.batch(chosen, name, dtype=dtype), batch.to(dtype))
                out = torch.full((*shape[:-1], 2 * shape[-1]), 7.0, dtype=dtype)[..., ::2]  # not contiguous
                assert read.batch(chosen, name, out=out) is out and torch.equal(out, batch.to(dtype))
    read.batch(keys).zero_()
    assert read[keys[0]].any()  # the batch was the caller's own


def test_what_no_batch_is_made_of(bank: Bank) -> None:
    with pytest.raises(KeyNotInBank, match=r"broken\.jpg' could not be extracted"):
        bank.batch(["photo_0001.jpg", "broken.jpg"])
    with pytest.raises(BankError, match="does not store the output 'cls'"):
        bank.batch([], "cls")
    with pytest.raises(ValueError, match=r"out must be \(1, 16, 32\) on the CPU, .* not \(2, 16, 32\)"):
        bank.batch(["photo_0001.jpg"], out=torch.empty(2, 16, 32))
    wide, mixed = torch.empty(2, 16, 32), torch.empty(2, 16, 32, dtype=torch.float64)
    for out, dtype in (
        (wide.long(), None),
        (wide, torch.float16),
        (mixed, torch.float32),
        (wide[:1].expand(2, 16, 32), None),
        (torch.empty(2 * 16 * 32).as_strided((2, 16, 32), (511, 32, 1)), None),
        (wide.to("meta"), None),
    ):
        with pytest.raises(ValueError, match=r"^out must be \(2, 16, 32\) on the CPU, of (a floating dtype|torch\.)"):
            bank.batch(["photo_0001.jpg", "photo_0002.jpg"], out=out, dtype=dtype)
    turned = torch.empty(32, 2, 16).permute(1, 2, 0)
    assert bank.batch(["photo_0001.jpg", "photo_0002.jpg"], out=turned, dtype=torch.float32) is turned
    with pytest.raises(ValueError, match=r"dtype cannot be torch\.int64"):
        bank.batch(["photo_0001.jpg"], dtype=torch.int64)
    with pytest.raises(TypeError, match=r"keys are several: batch\(\['photo_0001.jpg'\]\)"):
        bank.batch("photo_0001.jpg")
    with pytest.raises(TypeError, match=r"not ndarray: torch\.from_numpy makes one"):
        bank.batch(["photo_0001.jpg"], out=np.empty((1, 16, 32), np.float32))  # type: ignore[arg-type]
    assert torch.equal(bank.batch(key for key in ["photo_0001.jpg"]), bank.batch(["photo_0001.jpg"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_memory_is_page_locked_for_accelerators(bank: Bank) -> None:
    with pytest.raises(ValueError, match="needs an accelerator"):
        bank.batch(["photo_0001.jpg"], pin_memory=True)
