"""Files of the Hugging Face hub: a server on loopback speaks its URLs, and each client is a process of its own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import COMMIT, Hub, hub_server

pytest.importorskip("huggingface_hub")

REPO, NAMES = "org/name", ("model.safetensors", "pytorch_model.bin")
WEIGHTS = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()

CLIENT = """
import dataclasses, json, sys
from patchbank.encoders.hub import download, locate
from patchbank.errors import PatchbankError
names, revision, fetch = json.loads(sys.argv[1])
told = []
try:
    file = locate("org/name", names, revision)
    if fetch:
        file = download(file, lambda *counts: told.append(counts))
    result = dataclasses.asdict(file) | {"path": file.path and str(file.path), "told": told}
except PatchbankError as error:
    result = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(result))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server(files={NAMES[0]: WEIGHTS}) as made:
        yield made


def client(
    home: Path, hub: Hub, *, fetch: bool = True, revision: str | None = None, **environment: str
) -> dict[str, Any]:
    """What a process finds that knows the hub; nothing but its answer may reach the terminal."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CLIENT, json.dumps((NAMES, revision, fetch))],
        env=hub.environment(HF_HOME=str(home), **environment),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def whole_files(home: Path) -> list[Path]:
    """The files in the cache that count as whole."""
    return [path for path in home.glob("hub/models--*/snapshots/*/*") if path.exists()]


def test_a_file_is_located_by_one_request_and_downloaded_with_its_progress(hub: Hub, tmp_path: Path) -> None:
    found = client(tmp_path, hub, fetch=False)
    assert [asked[:2] for asked in hub.asked] == [("HEAD", f"/{REPO}/resolve/main/{NAMES[0]}")]
    assert found["path"] is None
    facts = {"repo": REPO, "name": NAMES[0], "revision": COMMIT, "sha256": SHA256, "size": len(WEIGHTS)}
    assert facts.items() <= found.items()
    made = client(tmp_path, hub)
    assert facts.items() <= made.items()
    assert Path(made["path"]).read_bytes() == WEIGHTS
    if made["told"]:  # by a huggingface_hub that is new enough
        assert made["told"][-1] == [len(WEIGHTS), len(WEIGHTS)]
        assert made["told"] == sorted(made["told"])


def test_a_cached_file_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    made = client(tmp_path, hub)
    hub.asked.clear()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = client(tmp_path, hub, **environment)
        same = ("repo", "name", "revision", "sha256", "path", "size")
        assert [again[name] for name in same] == [made[name] for name in same]
    assert hub.asked == []


def test_offline_without_a_cached_file(hub: Hub, tmp_path: Path) -> None:
    error = client(tmp_path, hub, HF_HUB_OFFLINE="1")["error"]
    assert "HF_HUB_OFFLINE is set" in error and str(tmp_path) in error
    assert f"has no {NAMES[0]} or {NAMES[1]} of {REPO}" in error
    assert hub.asked == []


def test_a_download_that_is_cut_off_goes_on_or_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = 1
    made = client(tmp_path / "once", hub)
    if "error" not in made:
        assert Path(made["path"]).read_bytes() == WEIGHTS
    hub.cuts = 1000
    error = client(tmp_path / "always", hub, HF_HUB_DOWNLOAD_TIMEOUT="5")["error"]
    assert "could not be fetched" in error and "\n" not in error
    assert not whole_files(tmp_path / "always")
    hub.cuts = 0
    assert Path(client(tmp_path / "always", hub)["path"]).read_bytes() == WEIGHTS


def test_other_bytes_than_those_announced_are_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.content = WEIGHTS[::-1]  # as long as the announced ones
    error = client(tmp_path, hub)["error"]
    assert "is damaged" in error and SHA256 in error
    assert not whole_files(tmp_path)
    hub.content = None
    made = client(tmp_path, hub)
    blob = Path(made["path"]).resolve()
    blob.write_bytes(WEIGHTS[::-1])
    assert f"{blob} is damaged" in client(tmp_path, hub)["error"]
    blob.unlink()
    assert Path(client(tmp_path, hub)["path"]).read_bytes() == WEIGHTS


def test_a_blob_that_other_repositories_share(hub: Hub, tmp_path: Path) -> None:
    blob = Path(client(tmp_path, hub)["path"]).resolve()
    blob.symlink_to(blob.rename(tmp_path / ("0" * 64)))  # as the hub shares blobs, by a name of its own
    assert client(tmp_path, hub)["sha256"] == SHA256


def test_a_cache_on_a_disk_without_links(hub: Hub, tmp_path: Path) -> None:
    made = client(tmp_path, hub, HF_HUB_DISABLE_SYMLINKS="1")
    if not Path(made["path"]).is_symlink():  # a huggingface_hub that knows this variable
        assert client(tmp_path, hub, HF_HUB_OFFLINE="1")["sha256"] == SHA256


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "GatedRepo"), "is gated: accept its licence at"),
        ((403, "GatedRepo"), "is gated: accept its licence at"),
        ((401, "RepoNotFound"), "or it is private"),
        ((403, ""), "or it is private"),
        ((404, "RepoNotFound"), "has no org/name"),
        ((404, "RevisionNotFound"), "has no such revision"),
        ((404, "EntryNotFound"), "has no model.safetensors or pytorch_model.bin"),
        ((500, ""), "could not be fetched"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, tmp_path: Path, refusal: tuple[int, str], words: str) -> None:
    hub.refusal = refusal
    error = client(tmp_path, hub)["error"]
    assert error.startswith("WeightsError: ") and words in error and "\n" not in error
    assert not whole_files(tmp_path)


def test_a_download_that_fails_of_another_cause_than_the_cache_says_which(hub: Hub, tmp_path: Path) -> None:
    hub.later = (418, "")
    assert "418" in client(tmp_path, hub)["error"]


def test_no_server_at_all(tmp_path: Path) -> None:
    error = client(tmp_path, Hub(url="http://127.0.0.1:9"))["error"]
    assert "could not be fetched from http://127.0.0.1:9" in error and "\n" not in error


def test_the_names_are_tried_in_order_and_a_revision_is_one(hub: Hub, tmp_path: Path) -> None:
    hub.files = {NAMES[1]: WEIGHTS}
    assert client(tmp_path, hub, revision="v1")["name"] == NAMES[1]
    hub.asked.clear()
    assert client(tmp_path, hub, revision="v1", HF_HUB_OFFLINE="1")["name"] == NAMES[1]
    assert client(tmp_path, hub, revision=COMMIT, HF_HUB_OFFLINE="1")["name"] == NAMES[1]
    assert "HF_HUB_OFFLINE" in client(tmp_path, hub, HF_HUB_OFFLINE="1")["error"]  # which commit main is, is unknown
    assert hub.asked == []


def test_a_mirror_gets_the_token_and_the_host_of_the_bytes_does_not(hub: Hub, tmp_path: Path) -> None:
    client(tmp_path, hub, HF_TOKEN="hf_secret")
    tokens = {path.startswith("/bytes"): token for _, path, _, token in hub.asked}
    assert tokens == {False: "Bearer hf_secret", True: None}
    hub.commit = None
    assert "HF_ENDPOINT" in client(tmp_path / "other", hub)["error"]
