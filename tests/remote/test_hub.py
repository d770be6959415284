"""Banks on the Hugging Face hub: a server on loopback speaks its API, and the hub's own package is the client."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from patchbank import extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.config import ExtractConfig
from patchbank.errors import BankError, ConfigError
from patchbank.locations import locate
from tests.hub import COMMIT, Hub, hub_server
from tests.support import patchbank, photographs, tiny_manifest

constants = pytest.importorskip("huggingface_hub.constants")
file_download = pytest.importorskip("huggingface_hub.file_download")
HfFileSystem = pytest.importorskip("huggingface_hub").HfFileSystem
pytest.importorskip("upath")

URL = "hf://datasets/org/name/banks/tiny"
PINNED = f"hf://datasets/org/name@{COMMIT}/banks/tiny"
KEYS = [f"image_{number:02}.jpg" for number in range(12)]
OTHER = "2" * 40


def files_of(place: Path, seed: int) -> dict[str, bytes]:
    """A repository with a bank of random features, in three shards."""
    torch.manual_seed(seed)
    manifest = replace(tiny_manifest("shards", "float16"), part_size=4)
    with BankWriter(place, manifest, KEYS) as writer:
        made = [{name: torch.randn(output.shape) for name, output in manifest.outputs.items()} for _ in KEYS]
        writer.add([Feature(key, outputs, (64, 48)) for key, outputs in zip(KEYS, made, strict=True)], [])
    found = {f"banks/tiny/{path.name}": path.read_bytes() for path in place.glob("shard-*")}
    assert len(found) == 3
    return found | {"README.md": b"# A card\n", ".gitattributes": b""}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    place = tmp_path_factory.mktemp("hub") / "tiny"
    return place, files_of(place, seed=1)


def know(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, which has imported the hub's package already, find the server."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for place in (constants, file_download):  # an older package has copies of the constants
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(local: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub; this process, and those that it starts, know it."""
    with hub_server(repo="datasets/org/name", files=local[1]) as made:
        know(made.url, monkeypatch)
        for name, value in made.environment(HF_HOME=str(tmp_path / "home")).items():
            monkeypatch.setenv(name, value)
        yield made
        HfFileSystem.clear_instance_cache()


def test_it_is_read_as_on_the_disk(hub: Hub, local: tuple[Path, dict[str, bytes]]) -> None:
    bank, expected = open_bank(URL), open_bank(local[0])
    assert str(bank.path) == PINNED and PINNED in repr(bank)
    assert list(bank) == list(expected) and bank.manifest == expected.manifest and bank.digest == expected.digest
    for key in KEYS:
        assert torch.equal(bank[key], expected[key]) and torch.equal(bank.cls(key), expected.cls(key))
        assert bank.transform(key) == expected.transform(key)
    mixed = [KEYS[11], *KEYS[:7], KEYS[0]]
    assert torch.equal(bank.batch(mixed), expected.batch(mixed))
    assert verify(bank.path, KEYS).problems == []


def test_a_feature_is_one_request_for_its_bytes(hub: Hub, local: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    bank = open_bank(URL, cache=tmp_path / "cache")
    opened = [path for _, path, *_ in hub.asked if path.startswith("/api")]
    again = 0 if hasattr(HfFileSystem, "_get_instance_state") else 3  # an older package's threads share nothing
    assert sum("/tree/" in path for path in opened) == 1 + again
    assert len(opened) == 3 + 2 * again  # the branch, the commit, the directory
    assert len(hub.ranges) == 3  # a header each
    assert not any("resolve/main" in path for _, path, *_ in hub.asked)
    hub.asked.clear()
    first = bank[KEYS[5]]
    nbytes = first.numel() * 2
    assert [asked[0] for asked in hub.asked] == ["GET", "GET"] and len(hub.ranges) == 1  # sent on to the bytes
    begin, end = map(int, str(hub.ranges[0]).removeprefix("bytes=").split("-"))
    assert end + 1 - begin == nbytes < len(max(local[1].values(), key=len)) / 3
    hub.asked.clear()
    assert torch.equal(bank[KEYS[5]], first)
    assert hub.asked == []
    rows = bank.batch(KEYS[4:8])
    assert len(hub.ranges) == 1 and torch.equal(rows[1], first)  # a shard's rows at once
    hub.asked.clear()
    again = open_bank(PINNED, cache=tmp_path / "cache")
    hub.asked.clear()
    assert torch.equal(again.batch(KEYS[4:8]), rows) and hub.asked == []


def test_the_revision_is_that_of_the_opening(hub: Hub, local: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    expected = open_bank(local[0])
    bank = open_bank(URL)
    sent = pickle.dumps(bank)
    hub.move(files_of(tmp_path / "other", seed=2), OTHER)
    HfFileSystem.clear_instance_cache()  # as in another process
    assert torch.equal(bank[KEYS[0]], expected[KEYS[0]])
    assert torch.equal(pickle.loads(sent)[KEYS[1]], expected[KEYS[1]])
    new = open_bank(URL)
    assert str(new.path) == PINNED.replace(COMMIT, OTHER)
    assert torch.equal(new[KEYS[0]], open_bank(tmp_path / "other")[KEYS[0]])
    assert not torch.equal(new[KEYS[0]], expected[KEYS[0]])
    for old in (PINNED, bank.path):
        assert torch.equal(open_bank(old)[KEYS[0]], expected[KEYS[0]])
    assert str(open_bank("hf://datasets/org/name@v1/banks/tiny").path) == str(new.path)


def test_a_commit_is_asked_for_by_nobody(hub: Hub) -> None:
    assert str(locate(PINNED)) == str(locate(locate(PINNED))) == PINNED and hub.asked == []
    assert str(locate(locate(URL))) == PINNED and len(hub.asked) == 1


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process")
def test_data_loader_workers_read_the_same_commit(
    start: str, hub: Hub, local: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    bank = open_bank(URL)
    _ = bank[KEYS[0]]  # this process has connections
    hub.move(files_of(tmp_path / "other", seed=2), OTHER)
    loader = DataLoader(Rows(bank), batch_size=4, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), open_bank(local[0]).batch(KEYS))
    assert not any("main" in path for _, path, *_ in hub.asked[1:])


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, bank: object) -> None:
        self.bank = bank

    def __len__(self) -> int:
        return len(KEYS)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.bank[KEYS[index]]  # type: ignore[no-any-return, index]


@pytest.mark.parametrize(
    ("change", "url", "words"),
    [
        (
            {},
            "hf://datasets/org/other/bank",
            "has no datasets/org/other, or it is private: check the name, or set HF_TOKEN",
        ),
        ({}, "hf://org/name/bank", "has no org/name, or it is private"),
        (
            {},
            "hf://datasets/org/name@v9/bank",
            "datasets/org/name has no such revision at http.*: see http.*/tree/main",
        ),
        ({}, f"hf://datasets/org/name@{'9' * 40}/bank", "has no such revision"),
        ({}, "hf://datasets/org/name/nowhere", "There is no bank hf://.*/nowhere: it holds no shard"),
        ({}, "hf://datasets/org/name", "it holds no shard"),
        ({}, "hf://datasets/name", "names no repository: hf://datasets/ORG/NAME/BANK"),
        ({}, "hf://buckets/org/name/bank", "names no repository"),
        ({}, "hf://hf_secret@datasets/org/name", "must contain no credentials"),
        ({"refusal": (401, "RepoNotFound")}, URL, "or it is private"),
        ({"refusal": (403, "")}, URL, "or it is private"),
        ({"refusal": (418, "")}, URL, r"could not be fetched from http.* \(.*418.*\): check the network, or download"),
        (
            {"gated": (401, "GatedRepo")},
            URL,
            "is gated: accept its licence at http.*/datasets/org/name, and set HF_TOKEN",
        ),
        ({"gated": (403, "GatedRepo")}, URL, "is gated"),
        ({"url": "http://127.0.0.1:9"}, URL, "could not be fetched from http://127.0.0.1:9"),
        ({"url": "http://me:secret@127.0.0.1:9"}, URL, "could not be fetched from http://127.0.0.1:9"),
        ({"signature": "?X-Amz-Signature=secret&Key=secret"}, PINNED, r"\(.*501.*/banks/tiny/shard-[^?]*\): check"),
    ],
)
def test_what_cannot_be_opened(
    change: dict[str, object],
    url: str,
    words: str,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    know(hub.url, monkeypatch)
    with pytest.raises((BankError, ConfigError), match=words) as found:
        open_bank(url)
    assert "\n" not in str(found.value) and "secret" not in str(found.value).replace("hf_secret@", "")
    assert capfd.readouterr() == ("", "")


def test_the_hub_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = hub.environment(HF_HUB_OFFLINE="1")
    done = patchbank("info", URL, check=2, env=environment)
    assert "HF_HUB_OFFLINE is set" in done.stderr and "hf download" in done.stderr
    assert hub.asked == []


@pytest.mark.parametrize(("code", "words"), [("GatedRepo", "is gated"), ("RepoNotFound", "or it is private")])
def test_a_repository_that_is_closed_after_the_opening(code: str, words: str, hub: Hub) -> None:
    bank = open_bank(URL)
    hub.refusal = (403, code)
    for _ in range(2):
        with pytest.raises(BankError, match=rf"shard-.* cannot be read: .*datasets/org/name.* {words}"):
            bank[KEYS[0]]
        HfFileSystem.clear_instance_cache()  # as in another process, which asks for the repository first


def test_the_token_goes_to_the_hub_alone(hub: Hub) -> None:
    patchbank("info", URL, check=0, env=hub.environment(HF_TOKEN="hf_secret"))
    tokens = {path.startswith("/bytes"): token for _, path, _, token in hub.asked}
    assert tokens == {False: "Bearer hf_secret", True: None}


def test_the_commands_read_it_silently(hub: Hub, local: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    done = patchbank("info", URL, "--json", check=0, env=hub.environment())  # a process of its own
    facts = json.loads(done.stdout)
    assert (facts["path"], facts["checksum"], done.stderr) == (PINNED, open_bank(local[0]).digest, "")
    assert PINNED in patchbank("info", URL, check=0).stdout
    done = patchbank("verify", URL, check=0)
    assert PINNED in done.stdout and "No problems found" in done.stdout
    patchbank("convert", URL, tmp_path / "copy", check=0)
    assert torch.equal(open_bank(tmp_path / "copy").batch(KEYS), open_bank(local[0]).batch(KEYS))
    patchbank("report", URL, "-o", tmp_path / "page.html", "--sample", "2", check=1)  # of random numbers
    patchbank("show", URL, KEYS[0], "--at", "10,10", "-o", tmp_path / "show.png", check=0)
    patchbank("card", URL, "-o", tmp_path / "README.md", check=0)
    card = (tmp_path / "README.md").read_text()
    assert f"open_bank('{PINNED}')" in card and "safe_open('banks/tiny/shard-" in card
    assert "upload it again" in patchbank("repair", URL, check=2).stderr


def test_nothing_is_written_to_it(
    hub: Hub, local: tuple[Path, dict[str, bytes]], tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    photographs(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"cannot be written to: .*`hf upload .*`hf upload-large-folder`"):
        extract(load_dataset("folder", tmp_path), URL, tiny_config)
    for words in (
        ["extract", "folder", tmp_path, "--out", URL],
        ["convert", local[0], URL],
        ["import", tmp_path, URL, "--model", "ViT-B/16"],
    ):
        assert "hf upload-large-folder" in patchbank(*words, check=2).stderr
    assert hub.asked == []


def test_a_download_of_the_repository_is_a_bank(hub: Hub, local: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    script = (
        "import sys, huggingface_hub as hub; "
        "print(hub.snapshot_download('org/name', repo_type='dataset', cache_dir=sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=hub.environment(), capture_output=True, text=True, check=True
    )
    bank, expected = open_bank(f"{done.stdout.strip()}/banks/tiny"), open_bank(local[0])
    assert bank.digest == expected.digest and all(torch.equal(bank[key], expected[key]) for key in KEYS)
    assert verify(bank.path, KEYS).problems == []


def test_shards_in_the_repositorys_root(hub: Hub, local: tuple[Path, dict[str, bytes]]) -> None:
    hub.files = {name.removeprefix("banks/tiny/"): content for name, content in local[1].items()}
    bank = open_bank("hf://datasets/org/name")
    assert str(bank.path) == f"hf://datasets/org/name@{COMMIT}"
    assert torch.equal(bank[KEYS[3]], open_bank(local[0])[KEYS[3]])
