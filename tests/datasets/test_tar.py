"""Images in WebDataset tars: listing, features equal those of single files, errors of damaged tars."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.cli.extract import run_jobs
from patchbank.cli.options import RunOptions
from patchbank.config import Partition
from patchbank.datasets.several import POSITIONS, expand
from patchbank.errors import ConfigError, DatasetError
from patchbank.extraction.plan import make_plan
from tests.datasets.packed import write_tar
from tests.support import SecondLook, contents, photographs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Eleven photographs."""
    directory = tmp_path_factory.mktemp("images")
    return {name: (directory / name).read_bytes() for name in photographs(directory, 11)}


@pytest.fixture
def tars(files: Mapping[str, bytes], tmp_path: Path) -> str:
    """A pattern for three tars of four, four and three photographs, each with its text."""
    names = list(files)
    for number in range(3):
        members = []
        for name in names[4 * number : 4 * number + 4]:
            members += [(name, files[name]), (name.replace(".jpg", ".txt"), b"words")]
        write_tar(tmp_path / f"s{number}.tar", members)
    return str(tmp_path / "s{0..2}.tar")


@pytest.fixture
def config(tiny_config: ExtractConfig) -> ExtractConfig:
    """Batches of four, shards of three images."""
    return replace(tiny_config, layout="shards", shard_size=3 * 2176)


def test_the_same_features_as_of_a_folder(
    files: Mapping[str, bytes], tars: str, config: ExtractConfig, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    extract(load_dataset("folder", tmp_path / "folder"), tmp_path / "expected", config)
    dataset = load_dataset("tar", tars)
    assert [sample.position for sample in dataset.samples][3:5] == [3, POSITIONS]
    summary = extract(pickle.loads(pickle.dumps(dataset)), tmp_path / "bank", config)
    assert (summary.images, summary.failures) == (11, {})
    bank, expected = open_bank(tmp_path / "bank"), open_bank(tmp_path / "expected")
    assert list(bank) == list(expected) == list(files)
    # A position decides a slot in the batch, which may move the last bits.
    assert all(bank[key].allclose(expected[key], rtol=0, atol=1e-5) for key in files)
    assert {sample.key: sample.source.content(sample).read() for sample in dataset.samples} == files  # type: ignore[union-attr]
    assert verify(tmp_path / "bank").problems == []  # its shards' numbers have gaps


def test_partitions_and_interruptions_leave_no_trace(tars: str, config: ExtractConfig, tmp_path: Path) -> None:
    extract(load_dataset("tar", tars), tmp_path / "whole", config)
    opened = []
    for index in (1, 0):
        part = Partition(index, 2)
        dataset = load_dataset("tar", tars, partition=part)
        opened.append(sorted({sample.source.location.name for sample in dataset.samples}))
        extract(dataset, tmp_path / "parts", replace(config, partition=part))
    assert opened == [["s1.tar", "s2.tar"], ["s0.tar"]]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")

    assert extract(load_dataset("tar", tars), tmp_path / "stopped", config, stop=SecondLook()).remaining
    assert 0 < len(open_bank(tmp_path / "stopped")) < 11
    extract(load_dataset("tar", tars), tmp_path / "stopped", config)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_part_without_tars_and_what_does_not_go_together(tars: str, config: ExtractConfig, tmp_path: Path) -> None:
    empty = Partition(0, 5)
    dataset = load_dataset("tar", tars, partition=empty)
    summary = extract(dataset, tmp_path / "bank", replace(config, partition=empty))
    assert (summary.images, summary.notes) == (0, ["Part 0/5 is empty: parts are whole files."])
    dataset = load_dataset("tar", tars, partition=Partition(1, 2))
    for wrong in (
        replace(config, partition=Partition(0, 2)),
        replace(config, limit=1),
        replace(config, overwrite=True),
    ):
        with pytest.raises(ConfigError):
            make_plan(dataset, tmp_path / "bank", wrong)


def test_damaged_tars_are_reported_and_not_in_the_index(
    tars: str, config: ExtractConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "s1.tar"
    content = whole.read_bytes()
    second = load_dataset("tar", whole).samples[1]
    assert second.place is not None
    whole.write_bytes(content[: sum(second.place) - 1])
    (tmp_path / "s2.tar").unlink()
    for _ in range(2):
        dataset = load_dataset("tar", tars)
        assert len(dataset) == 5  # the last member's data is cut off
        assert [Path(name).name for name in dataset.damaged] == ["s1.tar", "s2.tar"]
        summary = extract(dataset, tmp_path / "bank", config)
        assert summary.failures == dict(dataset.damaged)
        assert summary.remaining == 0
        assert open_bank(tmp_path / "bank").failures == {}
    with pytest.raises(typer.Exit) as caught:
        run_jobs(lambda: [(dataset, tmp_path / "bank", config)], RunOptions(json=True))
    assert caught.value.exit_code == 1
    assert "missing: there is no such file" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as caught:
        run_jobs(lambda: [(dataset, tmp_path / "bank", config)], RunOptions(dry_run=True))
    assert caught.value.exit_code == 0
    assert "cut short" in capsys.readouterr().out
    whole.write_bytes(content)
    assert extract(load_dataset("tar", tars), tmp_path / "bank", config).images == 3


@pytest.mark.parametrize(
    ("cut", "images", "word"),
    [
        (lambda tar, last: tar[: last.offset], 1, "the mark of a tar's end is missing"),
        (lambda tar, last: tar[: last.offset + 100], 1, "within a header"),
        (lambda tar, last: tar[: last.offset_data + 3], 1, "'b.jpg' is not all there"),
        (lambda tar, last: tar[: last.offset_data + last.size], 2, "unexpected end"),
        (lambda tar, last: tar[: last.offset] + b"x" * 512 + tar[last.offset + 512 :], 1, "what follows is no header"),
        (lambda tar, _: tar, 2, None),
    ],
)
def test_a_tar_gives_what_lies_before_its_damage(tmp_path: Path, cut, images: int, word: str | None) -> None:  # type: ignore[no-untyped-def]
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 700)])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(cut(path.read_bytes(), last))
    dataset = load_dataset("tar", path)
    assert len(dataset) == images
    assert (word is None and not dataset.damaged) or word in dataset.damaged[str(path)]  # type: ignore[operator]


def test_headers_that_lie(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("n" * 200 + ".jpg", b"2")])
    header = bytearray(path.read_bytes())
    header[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xfc\x00"  # the long name's header: -1024 bytes, in base 256
    block = bytes(header[1024 : 1024 + 512])
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    header[1024 + 148 : 1024 + 156] = b"%06o\0 " % total
    path.write_bytes(header)
    dataset = load_dataset("tar", path)
    assert [sample.key for sample in dataset.samples] == ["a.jpg"]
    assert "header" in dataset.damaged[str(path)]


def test_which_members_count(tmp_path: Path) -> None:
    names = ["./a.jpg", "b/c.PNG", "notes.txt", ".hidden.jpg", "._a.jpg", "d/.x/y.jpg", "__meta__/z.jpg", "__e__.jpg"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names] + [("a.jpg", b"last")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    samples = load_dataset("tar", path).samples
    assert [sample.key for sample in samples] == ["b/c.PNG", "__e__.jpg", "a.jpg"]
    assert samples[2].source.content(samples[2]).read() == b"last"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "a//x.jpg"])
def test_a_member_cannot_lead_out_of_the_directory(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"1"), ("a.jpg", b"2")])
    dataset = load_dataset("tar", path)
    assert [sample.key for sample in dataset.samples] == ["a.jpg"]
    assert dataset.damaged == {f"{path}/{name}": "its name is not a plain relative path"}
    with pytest.raises(DatasetError, match=r"no images(.|\n)*not a plain relative path"):
        load_dataset("tar", write_tar(tmp_path / "b.tar", [(name, b"1")]))


def test_hard_links_and_sparse_members(tmp_path: Path) -> None:
    """A sparse member's data are not its bytes: the holes are left out."""
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"one"), ("data.bin", b"two")])
    with tarfile.open(path, "a") as tar:
        for name, target in (("b.jpg", "./a.jpg"), ("c.jpg", "data.bin"), ("d.jpg", "none.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
        holes = tarfile.TarInfo("holes.jpg")
        holes.size = 4
        holes.pax_headers = {"GNU.sparse.map": "524288,4", "GNU.sparse.size": str(1 << 20)}
        tar.addfile(holes, io.BytesIO(b"data"))
    dataset = load_dataset("tar", path)
    found = {sample.key: sample.source.content(sample).read() for sample in dataset.samples}  # type: ignore[union-attr]
    assert found == {"a.jpg": b"one", "b.jpg": b"one"}
    reasons = {name.removeprefix(f"{path}/"): reason for name, reason in dataset.damaged.items()}
    assert {*reasons} == {"c.jpg", "d.jpg", "holes.jpg"}
    assert "a hard link to 'data.bin'" in reasons["c.jpg"] and "a sparse member" in reasons["holes.jpg"]


def test_tars_that_were_joined(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", name.encode())]) for name in "abc"]
    path = tmp_path / "all.tar"
    content = b"".join(tar.read_bytes() for tar in tars)
    path.write_bytes(content)
    dataset = load_dataset("tar", path)
    found = {sample.key: sample.source.content(sample).read() for sample in dataset.samples}  # type: ignore[union-attr]
    assert (found, dataset.damaged) == ({"a.jpg": b"a", "b.jpg": b"b", "c.jpg": b"c"}, {})
    path.write_bytes(content[:-1024] + b"words")  # what follows the end is no tar
    assert len(load_dataset("tar", path)) == 3
    path.write_bytes(content[: 2 * len(content) // 3 + 512])
    assert "the data of 'c.jpg' is not all there" in load_dataset("tar", path).damaged[str(path)]


def test_two_tars_with_one_key(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a.tar", "b.tar", "d/a.tar"):
        write_tar(tmp_path / name, [("x.jpg", b"1")])
    with pytest.raises(DatasetError, match=r"a\.tar and .*b\.tar both hold 'x\.jpg'.*prefix"):
        load_dataset("tar", [tmp_path / "a.tar", tmp_path / "b.tar"])
    keys = [sample.key for sample in load_dataset("tar", tmp_path / "*.tar", prefix=True).samples]
    assert keys == ["a/x.jpg", "b/x.jpg"]
    files = [tmp_path / "a.tar", tmp_path / "d/a.tar"]
    keys = [sample.key for sample in load_dataset("tar", files, prefix=True).samples]
    assert keys == [f"{tmp_path.name}/a/x.jpg", "d/a/x.jpg"]
    second = load_dataset("tar", files, prefix=True, partition=Partition(1, 2)).samples
    assert [sample.key for sample in second] == keys[1:]


def test_nothing_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="does not exist, nor does any other of the 3"):
        load_dataset("tar", str(tmp_path / "{0..2}.tar"))
    with pytest.raises(DatasetError, match="No file matches"):
        load_dataset("tar", str(tmp_path / "*.tar"))
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(DatasetError, match=r"no images(.|\n)*gzip"):
        load_dataset("tar", tmp_path / "a.tar")
    for wrong in ("pipe:cat a.tar", "a{0..1.tar", "${PATCHBANK_NOT_SET}::a.tar", []):
        with pytest.raises(ConfigError):
            load_dataset("tar", wrong)
    with pytest.raises(ConfigError, match="give only its files"):
        load_dataset("tar", "a.tar", "train")
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ConfigError, match=r"patchbank\[tar\]"):
        load_dataset("tar", "a{0..1}.tar")


def test_patterns(tmp_path: Path) -> None:
    for name in ("a0.tar", "a1.tar", "b.tar", "{x}.tar"):
        (tmp_path / name).touch()
    here = os.fspath(tmp_path)

    def names(*patterns: str) -> list[str]:
        return [place.name for place in expand([f"{here}/{pattern}" for pattern in patterns])]

    assert names("a{0..2}.tar") == ["a0.tar", "a1.tar", "a2.tar"]  # whether they are there is seen later
    assert names(f"b.tar::{here}/a{{1,0}}.tar") == ["b.tar", "a1.tar", "a0.tar"]
    assert names("b.tar", "a?.tar", "*.tar") == ["b.tar", "a0.tar", "a1.tar", "{x}.tar"]
    assert names("{x}.tar") == ["{x}.tar"]


def test_a_tar_that_goes_ends_the_run(tars: str, config: ExtractConfig, tmp_path: Path) -> None:
    dataset = load_dataset("tar", tars)
    (tmp_path / "s1.tar").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"s1\.tar.* is gone"):
        extract(dataset, tmp_path / "bank", config)
    (tmp_path / "elsewhere").rename(tmp_path / "s1.tar")
    summary = extract(dataset, tmp_path / "bank", config)
    assert (summary.images + summary.already_done, summary.failures) == (11, {})
