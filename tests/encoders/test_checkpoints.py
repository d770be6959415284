"""Checkpoints: the formats that load, the ones that are refused, and downloads, from a real server on loopback."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchbank.encoders.openai import checkpoints as weights
from patchbank.encoders.openai.checkpoints import Checkpoint, find_checkpoint, obtain_checkpoint
from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.encoders.openai.untrained import untrained_state, write_untrained
from patchbank.errors import WeightsError
from tests.support import TINY, TINY_VOCABULARY


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")


def load_visual(model: Model, path: Path) -> Mapping[str, Tensor]:
    return weights.load_visual(model, Checkpoint(path, hashlib.sha256(path.read_bytes()).hexdigest()), rounding=True)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return untrained_state(TINY, seed=1, vocabulary=TINY_VOCABULARY)


def test_every_format_gives_the_same_parameters(tmp_path: Path, tiny_weights: Path, state: dict[str, Tensor]) -> None:
    archive = load_visual(TINY, tiny_weights)
    assert all(value.dtype == torch.float32 for value in archive.values())
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "parallel.pt")
    torch.save({"model": {name: value.float() for name, value in state.items()}, "epoch": 3}, tmp_path / "nested.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "state.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert same(load_visual(TINY, path), archive), path.name


def test_parameters_are_rounded_as_clip_load_rounds_them(tmp_path: Path) -> None:
    """A float32 checkpoint gives the numbers it gives in the original scripts."""
    import clip

    fine = {name: value.float() + 1e-5 for name, value in untrained_state(TINY, vocabulary=TINY_VOCABULARY).items()}
    torch.save(fine, tmp_path / "fine.pt")
    model, _ = clip.load(str(tmp_path / "fine.pt"), device="cpu", jit=False)
    assert same(load_visual(TINY, tmp_path / "fine.pt"), dict(model.visual.state_dict()))


def test_another_models_file_is_refused_and_recognised(tmp_path: Path, full_size_weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"not a ViT-L/14@336px.*By its shapes it is a ViT-B/16.*--model"):
        load_visual(MODELS["ViT-L/14@336px"], full_size_weights)
    more = replace(TINY, name="more", layers=1)
    write_untrained(TINY, tmp_path / "tiny.pt", vocabulary=TINY_VOCABULARY)
    with pytest.raises(WeightsError, match="more parameters"):
        load_visual(more, tmp_path / "tiny.pt")


class _Hostile:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> object:
        return os.mkdir, (str(self._trace),)


def test_what_is_no_checkpoint(tmp_path: Path, tiny_weights: Path) -> None:
    whole = tiny_weights.read_bytes()
    trace = tmp_path / "trace"
    files = {
        "truncated.pt": (whole[: len(whole) // 2], "cannot be read"),
        "empty.pt": (b"", "cannot be read"),
        "page.pt": (b"<html>404</html>", "cannot be read as a CLIP checkpoint"),
        "page.safetensors": (b"<html>404</html>", "cannot be read"),
        "hostile.pt": (pickle.dumps({"visual.proj": _Hostile(trace)}), "no checkpoint that can be read safely"),
    }
    for name, (content, word) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=word):
            load_visual(TINY, tmp_path / name)
    assert not trace.exists()
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(WeightsError, match="not a state dict"):
        load_visual(TINY, tmp_path / "tensor.pt")
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="no CLIP image tower"):
        load_visual(TINY, tmp_path / "other.pt")


def test_a_file_under_the_official_name_must_be_the_official_one(tmp_path: Path, tiny_weights: Path) -> None:
    model = MODELS["ViT-B/16"]
    checkpoints = tmp_path / "pretrained_CLIP"
    checkpoints.mkdir()
    (checkpoints / "ViT-B-16.pt").write_bytes(tiny_weights.read_bytes())
    with pytest.raises(WeightsError, match=r"5806e77c.*cut short.*delete.*--weights"):
        find_checkpoint(model, None, checkpoints)
    found = find_checkpoint(model, checkpoints / "ViT-B-16.pt", None)  # given by the user: any file will do
    assert found is not None
    assert found.sha256 == hashlib.sha256(tiny_weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("place", ["root/pretrained_CLIP", "root/pretrained_clip", "cache"])
def test_where_checkpoints_are_looked_for(tmp_path: Path, tiny_weights: Path, place: str) -> None:
    content = tiny_weights.read_bytes()
    model = replace(TINY, sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "tiny.pt").write_bytes(content)
    found = obtain_checkpoint(model, None, tmp_path / "root/pretrained_CLIP")
    assert found.path == tmp_path / place / "tiny.pt"
    with pytest.raises(WeightsError, match="no checkpoint"):
        find_checkpoint(model, tmp_path / "nowhere.pt", None)


class _Server(BaseHTTPRequestHandler):
    content = b""
    mode = "whole"

    def do_GET(self) -> None:
        if self.mode == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2] if self.mode == "cut" else self.content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tiny_weights: Path) -> Iterator[str]:
    _Server.content, _Server.mode = tiny_weights.read_bytes(), "whole"
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/tiny.pt"
        running.shutdown()
        thread.join()


def test_a_download(tmp_path: Path, server: str) -> None:
    model = replace(TINY, url=server, sha256=hashlib.sha256(_Server.content).hexdigest())
    told: list[tuple[int, int]] = []
    checkpoints = tmp_path / "root/pretrained_CLIP"
    found = obtain_checkpoint(model, None, checkpoints, lambda *progress: told.append(progress))
    assert found.path == checkpoints / "tiny.pt"
    assert found.path.read_bytes() == _Server.content
    assert told[-1] == (len(_Server.content), len(_Server.content))
    assert [path.name for path in checkpoints.iterdir()] == ["tiny.pt"]
    _Server.mode = "missing"
    assert obtain_checkpoint(model, None, checkpoints) == found  # there now: nothing is fetched


@pytest.mark.parametrize(
    ("mode", "sha256", "word"),
    [("cut", None, "damaged"), ("whole", "1" * 64, "damaged"), ("missing", None, r"Not Found.*put it at")],
)
def test_a_download_that_fails_leaves_nothing(
    tmp_path: Path, server: str, mode: str, sha256: str | None, word: str
) -> None:
    _Server.mode = mode
    model = replace(TINY, url=server, sha256=sha256 or hashlib.sha256(_Server.content).hexdigest())
    with pytest.raises(WeightsError, match=word):
        obtain_checkpoint(model, None, tmp_path / "pretrained_CLIP")
    assert not list((tmp_path / "pretrained_CLIP").glob("*"))
    assert not list((tmp_path / "pretrained_CLIP").glob(".*"))
    assert mode != "missing" or not (tmp_path / "pretrained_CLIP").exists()


def test_offline_the_message_says_which_file_to_put_where(tmp_path: Path) -> None:
    model = replace(TINY, url="http://127.0.0.1:9/tiny.pt")  # nothing listens there
    with pytest.raises(WeightsError, match=r"pretrained_CLIP/tiny.pt, .*refused.*Fetch http.*put it at .*tiny\.pt"):
        obtain_checkpoint(model, None, tmp_path / "pretrained_CLIP")
    assert not list(tmp_path.iterdir())
