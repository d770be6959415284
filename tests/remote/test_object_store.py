"""Images and banks in an object store: an S3 server on loopback, and fsspec's in memory."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from patchbank import extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.bank.convert import convert
from patchbank.bank.payload import Feature
from patchbank.bank.storage import storage_of
from patchbank.bank.writer import BankWriter
from patchbank.config import ExtractConfig, Partition
from patchbank.errors import BankError, ConfigError, DatasetError
from patchbank.extraction.plan import make_plan
from patchbank.features import CLS, GRID
from patchbank.locations import filesystem, locate
from tests.faults.processes import Run, run
from tests.s3 import Store, failing, none, s3_server, slow
from tests.support import contents, patchbank, photographs

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning"
)  # the stores' libraries

COUNT = 30


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with s3_server() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.trouble = none


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("remote") / "images"
    photographs(directory, COUNT)
    return directory


@pytest.fixture
def bucket(store: Store, images: Path, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own, with the images."""
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**9}"
    files, _ = filesystem(locate(f"s3://{name}"))
    files.mkdir(name)
    files.put(str(images) + "/", f"{name}/images/", recursive=True)
    return name


@pytest.fixture
def config(tiny_config: ExtractConfig) -> ExtractConfig:
    return replace(tiny_config, layout="shards", shard_size=7 * 2200)  # seven images a shard


def download(url: str, directory: Path) -> dict[str, str]:
    """What lies there, as files."""
    files, path = filesystem(locate(url))
    files.invalidate_cache()
    directory.mkdir()
    for name in files.find(path):
        target = directory / name.removeprefix(path).lstrip("/")
        target.parent.mkdir(exist_ok=True)
        files.get_file(name, str(target))
    return contents(directory)


def test_the_bank_is_that_of_the_disk_and_reads_the_same(
    bucket: str, images: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    url = f"s3://{bucket}/banks/tiny"
    first = extract(load_dataset("folder", f"s3://{bucket}/images"), url, replace(config, limit=17))
    rest = extract(load_dataset("folder", f"s3://{bucket}/images"), url, config)  # a shard is put in another's place
    assert (first.images, rest.already_done, rest.images, rest.settled) == (17, 17, COUNT - 17, COUNT)
    assert download(url, tmp_path / "there") == contents(tmp_path / "bank")
    local, remote = open_bank(tmp_path / "bank"), open_bank(url)
    assert list(remote) == list(local) and remote.manifest == local.manifest
    for key in local:
        assert torch.equal(remote[key], local[key]) and torch.equal(remote.cls(key), local.cls(key))
        assert remote.transform(key) == local.transform(key)
    assert verify(locate(url), list(local)).problems == []
    convert(remote, tmp_path / "pickles", "ezhoi", shard_size=1)
    convert(local, locate(f"s3://{bucket}/copy"), "shards", dtype="int8", shard_size=10_000)
    copy = open_bank(f"s3://{bucket}/copy")
    assert all((copy[key] - local[key]).abs().max() < 0.05 for key in copy) and len(copy) == COUNT


def test_reduced_banks_keep_their_components(bucket: str, images: Path, config: ExtractConfig, tmp_path: Path) -> None:
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    local, url = open_bank(tmp_path / "bank"), f"s3://{bucket}/reduced"
    for components in (5, 8):  # the second replaces the first
        convert(local, tmp_path / "reduced", "shards", shard_size=9000, components=components, overwrite=True)
        convert(local, locate(url), "shards", shard_size=9000, components=components, overwrite=True)
        assert download(url, tmp_path / f"there-{components}") == contents(tmp_path / "reduced")
    remote, key = open_bank(url), next(iter(local))
    assert torch.allclose(remote.project(local[key]), remote[key], atol=1e-5)
    convert(remote, tmp_path / "copy", "shards", shard_size=9000)
    assert contents(tmp_path / "copy") == contents(tmp_path / "reduced")
    assert verify(locate(url), list(local)).problems == []
    place = storage_of(locate(url))
    place.delete(remote.reducer.made.name)
    assert [each.kind for each in verify(locate(url), list(local)).problems] == ["components"]


def test_partitions_fill_one_bank(bucket: str, images: Path, config: ExtractConfig, tmp_path: Path) -> None:
    url = f"s3://{bucket}/bank"
    for index in (1, 0, 2):
        extract(load_dataset("folder", images), url, replace(config, partition=Partition(index, 3)))
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    assert download(url, tmp_path / "there") == contents(tmp_path / "bank")


def test_reading_asks_for_one_feature_at_a_time_and_a_cache_keeps_it(
    bucket: str, store: Store, images: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/bank"
    extract(load_dataset("folder", images), url, config)
    bank = open_bank(url, cache=tmp_path / "cache")
    before = len(store.requests)
    first = bank["photo_0003.jpg"]
    assert [method for method, _ in store.requests[before:]] == ["GET"]
    first.zero_()  # the caller's own
    assert torch.equal(bank["photo_0003.jpg"], open_bank(url)["photo_0003.jpg"])
    store.trouble = lambda method, path: 503 if "shard-" in path else None
    assert bank["photo_0003.jpg"].abs().sum() > 0
    [kept] = (tmp_path / "cache").rglob("*.patch_tokens")
    assert kept.name == f"{bank.sha256('photo_0003.jpg')}.patch_tokens"
    store.trouble = none
    kept.write_bytes(b"half")  # of another size: fetched again
    assert torch.equal(bank["photo_0003.jpg"], open_bank(url)["photo_0003.jpg"])


class Features(Dataset):  # type: ignore[type-arg]
    def __init__(self, url: str) -> None:
        self.bank = open_bank(url)
        self.keys = list(self.bank)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.bank[self.keys[index]]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process")
def test_data_loader_workers_read_it(start: str, bucket: str, images: Path, config: ExtractConfig) -> None:
    url = f"s3://{bucket}/bank"
    extract(load_dataset("folder", images), url, config)
    features = Features(url)
    expected = torch.stack([features[index] for index in range(len(features))])  # this process has connections
    loader = DataLoader(features, batch_size=8, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_store_that_fails_now_and_then_and_is_slow(
    bucket: str, store: Store, images: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    """Requests are made again: nothing fails, and the bank is the same."""
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    flaky, late = failing(every=7), slow(0.02)
    store.trouble = lambda method, path: flaky(method, path) or late(method, path)
    summary = extract(load_dataset("folder", f"s3://{bucket}/images"), f"s3://{bucket}/bank", config)
    remote = open_bank(f"s3://{bucket}/bank")
    assert torch.equal(remote["photo_0003.jpg"], open_bank(tmp_path / "bank")["photo_0003.jpg"])
    store.trouble = none
    assert summary.failures == {}
    assert download(f"s3://{bucket}/bank", tmp_path / "there") == contents(tmp_path / "bank")


@pytest.mark.parametrize("after", [0, 2])
def test_a_store_that_takes_no_more(
    after: int, bucket: str, store: Store, images: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    """One message; shards are there whole or not at all; the same call goes on."""
    url = f"s3://{bucket}/bank"
    puts: list[str] = []

    def trouble(method: str, path: str) -> int | None:
        if method in ("PUT", "POST") and "shard-" in path:
            puts.append(path)
        return 403 if method in ("PUT", "POST") and len(puts) > after else None

    store.trouble = trouble
    if after == 0:
        store.trouble = lambda method, path: 403 if method in ("PUT", "POST") else None
    with pytest.raises(BankError, match=r"bank.* cannot be written.*What was committed is safe"):
        extract(load_dataset("folder", images), url, config)
    store.trouble = none
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    whole = contents(tmp_path / "bank")
    there = download(url, tmp_path / "some")
    assert there.items() <= whole.items() and (after == 0 or len(there) == after)
    extract(load_dataset("folder", images), url, config)
    assert download(url, tmp_path / "there") == whole


def test_a_shard_that_arrives_cut_short_is_not_kept(
    images: Path, config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the store says that all is well."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    put = memory.put_file

    def half(self: Any, lpath: str, rpath: str, **options: Any) -> None:
        Path(lpath).write_bytes(Path(lpath).read_bytes()[:-100])
        put(self, lpath, rpath, **options)

    url = "memory://patchbank/short"
    monkeypatch.setattr(memory, "put_file", half)
    with pytest.raises(BankError, match=r"bytes arrived|cannot be written"):
        extract(load_dataset("folder", images), url, config)
    assert not download(url, tmp_path / "short")
    monkeypatch.undo()
    extract(load_dataset("folder", images), url, config)
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    assert download(url, tmp_path / "there") == contents(tmp_path / "bank")


def test_a_process_that_is_killed_leaves_whole_shards(
    bucket: str, store: Store, images: Path, tiny_weights: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    extract(load_dataset("folder", images), tmp_path / "bank", config)
    url = f"s3://{bucket}/bank"
    arguments = ("extract", "folder", f"s3://{bucket}/images", "--model", "tiny", "--weights", tiny_weights)
    options = ("--out", url, "--batch-size", "4", "--shard-size", str(config.shard_size))
    shards: list[str] = []

    def trouble(method: str, path: str) -> None:
        if method == "PUT" and "shard-" in path:
            shards.append(path)
            if len(shards) == 2:
                process.send(signal.SIGKILL)

    process = Run(tmp_path / "printed", *arguments, *options, pause_after=1).paused()
    store.trouble = trouble
    process.send(signal.SIGCONT)
    assert process.wait() == -signal.SIGKILL
    store.trouble = none
    there = download(url, tmp_path / "some")
    assert 1 <= len(there) <= 2 and there.items() <= contents(tmp_path / "bank").items()
    printed = run(tmp_path / "printed", *arguments, *options, check=0)
    assert download(url, tmp_path / "there") == contents(tmp_path / "bank")
    for secret in (store.environment["AWS_SECRET_ACCESS_KEY"], store.environment["AWS_ACCESS_KEY_ID"]):
        assert secret not in printed
        assert all(
            secret.encode() not in path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()
        )


def test_images_that_cannot_be_had(bucket: str, store: Store, config: ExtractConfig, tmp_path: Path) -> None:
    dataset = load_dataset("folder", f"s3://{bucket}/images")
    store.trouble = lambda method, path: 403 if "photo_0003" in path and method == "GET" else None
    summary = extract(dataset, tmp_path / "bank", config)
    assert list(summary.failures) == ["photo_0003.jpg"] and summary.images == COUNT - 1
    store.trouble = none
    assert extract(dataset, tmp_path / "bank", config).images == 1
    with pytest.raises(DatasetError, match=r"There are no images under s3://.*/nothing"):
        load_dataset("folder", f"s3://{bucket}/nothing")


def test_a_run_whose_features_another_one_has_moved_deletes_no_bank(
    bucket: str, images: Path, config: ExtractConfig
) -> None:
    """Nothing is locked in a store: of two runs that make a bank from scratch, the second may end first."""
    url, dataset = f"s3://{bucket}/bank", load_dataset("folder", images)
    extract(dataset, url, config)
    overwriting = replace(config, overwrite=True)
    plan = make_plan(dataset, locate(url), overwriting)
    made = [Feature(sample.key, {GRID: torch.ones(16, 32), CLS: torch.ones(32)}, (40, 30)) for sample in dataset]
    with BankWriter(plan.out, plan.manifest, [each.key for each in made], overwrite=True) as first:
        first.add(made[:7], [])
        first.commit()
        assert extract(dataset, url, overwriting).failures == {}
        first.add(made[7:14], [])
    assert len(open_bank(url)) == COUNT
    assert first.replace([each.key for each in made]).startswith("23 images have features in the old bank and none in")
    assert len(open_bank(url)) == COUNT


def test_a_plan_finds_that_there_is_no_bucket(
    store: Store, images: Path, tiny_weights: Path, bucket: str, tmp_path: Path
) -> None:
    arguments = ("extract", "folder", images, "--model", "tiny", "--weights", tiny_weights, "--dry-run", "--out")
    done = patchbank(*arguments, "s3://nowhere/bank", check=2)
    assert "error: s3://nowhere/bank cannot be written: " in done.stderr
    patchbank(*arguments, f"s3://{bucket}/bank", check=0)


def test_a_bank_in_memory(images: Path, config: ExtractConfig, tmp_path: Path) -> None:
    extract(load_dataset("folder", images), "memory://patchbank/bank", config)
    extract(load_dataset("folder", images), f"file://{tmp_path}/bank", config)
    assert {*open_bank("memory://patchbank/bank")} == {*open_bank(tmp_path / "bank")}
    assert download("memory://patchbank/bank", tmp_path / "there") == contents(tmp_path / "bank")
    replaced = extract(load_dataset("folder", images), "memory://patchbank/bank", replace(config, overwrite=True))
    assert replaced.images == COUNT
    assert download("memory://patchbank/bank", tmp_path / "again") == contents(tmp_path / "bank")


def test_a_cached_feature_that_is_damaged_or_closed_is_fetched_again(
    images: Path, config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = "memory://patchbank/cached", "photo_0003.jpg"
    extract(load_dataset("folder", images), url, config)
    bank = open_bank(url, cache=tmp_path)
    expected = bank[key]
    [kept] = tmp_path.rglob("*.patch_tokens")
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"0", bytes([whole[0] ^ 1]) + whole[1:]):
        kept.write_bytes(damaged)
        assert torch.equal(bank[key], expected)
        assert kept.read_bytes() == whole

    def closed(path: Path) -> BufferedReader:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("patchbank.bank.ranges.open_regular", closed)  # root may read anything
    assert torch.equal(bank[key], expected)


def test_where_a_bank_cannot_be(images: Path, config: ExtractConfig) -> None:
    dataset = load_dataset("folder", images)
    with pytest.raises(ConfigError, match="must contain no credentials") as caught:
        extract(dataset, "s3://key:geheim@bucket/bank", config)
    assert "geheim" not in str(caught.value)
    with pytest.raises(ConfigError, match="must have no query") as caught:
        extract(dataset, "s3://bucket/bank?X-Amz-Signature=geheim", config)
    assert "geheim" not in str(caught.value)
    for chained in ("memory://x::s3://key:geheim@bucket", "filecache::s3://key:geheim@bucket"):
        with pytest.raises(ConfigError, match="must not chain file systems") as caught:
            extract(dataset, chained, config)
        assert "geheim" not in str(caught.value)
    for empty in ("s3://", "s3:///"):
        with pytest.raises(ConfigError, match="names no bucket: s3://BUCKET/DIRECTORY"):
            extract(dataset, empty, config)
    with pytest.raises(ConfigError, match="A path is empty"):
        extract(dataset, "", config)
    with pytest.raises(ConfigError, match="nowhere:// is unknown"):
        extract(dataset, "nowhere://bucket/bank", config)
    with pytest.raises(BankError, match="an object store has the layout shards"):
        extract(dataset, "memory://patchbank/other", replace(config, layout="ezhoi"))
    with pytest.raises(BankError, match="There is no bank memory://"):
        open_bank("memory://patchbank/nothing")


def test_a_url_may_have_a_scheme_in_capitals_and_azures_account() -> None:
    assert str(locate("MEMORY://patchbank/bank/")) == "memory://patchbank/bank"
    with pytest.raises(ConfigError, match=r"pip install universal-pathlib, and .* \(Install adlfs"):  # not refused
        locate("abfs://container@account.dfs.core.windows.net/bank")
    with pytest.raises(ConfigError, match="must contain no credentials"):
        locate("abfs://user:geheim@account/bank")


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("S3A", "s3"), ("gs", "gcs"), ("gcs", "gcs")])
def test_a_missing_library_names_its_extra(scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(
        ConfigError, match=rf'bucket/bank needs further packages: pip install "patchbank\[{extra}\]" \(in'
    ):
        locate(f"{scheme}://bucket/bank")


def test_a_name_that_looks_like_a_chain_is_one_name(
    bucket: str, store: Store, images: Path, config: ExtractConfig
) -> None:
    files, path = filesystem(locate(f"s3://{bucket}/pictures"))
    for name in ("a.jpg", "a.jpg::b.jpg"):
        files.pipe_file(f"{path}/{name}", next(images.glob("*.jpg")).read_bytes() + name.encode())
    extract(load_dataset("folder", f"s3://{bucket}/pictures"), f"s3://{bucket}/bank", config)
    dataset = load_dataset("folder", f"s3://{bucket}/pictures")
    assert [each.key for each in dataset.samples] == ["a.jpg", "a.jpg::b.jpg"]
    assert [each.source.content(each).read()[-5:] for each in dataset.samples] == [b"a.jpg", b"b.jpg"]
    assert len(open_bank(f"s3://{bucket}/bank")) == 2


def test_a_bucket_that_is_not_there(images: Path, config: ExtractConfig, store: Store) -> None:
    with pytest.raises(BankError, match=r"s3://no-such-bucket/bank.* cannot be written"):
        extract(load_dataset("folder", images), "s3://no-such-bucket/bank", config)


def test_a_damaged_shard_is_found_and_made_again(
    bucket: str, store: Store, images: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/bank"
    extract(load_dataset("folder", images), url, config)
    before = download(url, tmp_path / "before")
    files, path = filesystem(locate(url))
    name = sorted(before)[1]
    content = bytearray(files.cat_file(f"{path}/{name}"))
    content[20] ^= 1  # in the header: the next run sees it
    files.pipe_file(f"{path}/{name}", bytes(content))
    assert [finding.kind for finding in verify(locate(url)).problems] == ["damaged-part"]
    with pytest.raises(BankError, match="is damaged"):
        open_bank(url)
    done = patchbank("repair", url, check=2)
    assert "delete the shards" in done.stderr
    summary = extract(load_dataset("folder", images), url, config)
    assert summary.images == 7 and any("in quarantine" in note for note in summary.notes)
    after = download(url, tmp_path / "after")
    assert {name: after[name] for name in before} == before
    assert [*after.keys() - before.keys()] == [f"{name}.damaged"]


def test_a_figure_and_a_page_of_a_bank_in_a_bucket(
    bucket: str, store: Store, config: ExtractConfig, tiny_weights: Path, tmp_path: Path
) -> None:
    images, bank = f"s3://{bucket}/images", f"s3://{bucket}/bank"
    run = ("--model", "tiny", "--weights", tiny_weights, "--out", bank, "--limit", "4")
    patchbank("extract", "folder", images, *run, check=0)
    out = ("-o", tmp_path / "a.png")
    asked = ("show", bank, "photo_0002.jpg", "--images", images, *out)
    done = patchbank(*asked, check=0)
    assert "not available" not in done.stderr and (tmp_path / "a.png").stat().st_size > 10_000
    out = ("--images", images, "-o", tmp_path / "page.html")
    patchbank("report", bank, *out, check=0)
    content = (tmp_path / "page.html").read_text()
    assert "4 of the 30 images" in content and "Untrained weights." in content
    assert content.count("data:image/jpeg;base64,") == 4
