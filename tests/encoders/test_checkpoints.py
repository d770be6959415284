"""Checkpoints: formats, activations, refusals; and downloads from a real server on loopback."""

from __future__ import annotations

import copy
import hashlib
import json
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

from patchbank.config import Activation, ExtractConfig
from patchbank.encoders import find
from patchbank.encoders.archive import Archive
from patchbank.encoders.openai import checkpoints as weights
from patchbank.encoders.openai.checkpoints import (
    Checkpoint,
    activation_of,
    find_checkpoint,
    obtain_checkpoint,
    resolve_activation,
)
from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.encoders.openai.untrained import untrained_state, write_untrained
from patchbank.errors import ConfigError, WeightsError
from patchbank.extraction.recompute import spec_of
from tests.support import TINY, TINY_VOCABULARY, patchbank, photographs, tiny_manifest


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")


def load_visual(model: Model, path: Path, *, rounding: bool = True) -> Mapping[str, Tensor]:
    checkpoint = Checkpoint(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return weights.load_visual(model, checkpoint, rounding=rounding)


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
    lightning = {f"model.clip.{name}": value for name, value in state.items()} | {"model.head.weight": torch.ones(3)}
    torch.save({"state_dict": lightning, "hyper_parameters": {"lr": 0.1}}, tmp_path / "lightning.ckpt")
    torch.save({"model_state_dict": state, "optimizer": {"step": 5, 0: torch.ones(2)}}, tmp_path / "training.pth")
    save_file(state, tmp_path / "state.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert same(load_visual(TINY, path), archive), path.name


def test_parameters_are_rounded_as_clip_load_rounds_them(tmp_path: Path) -> None:
    """A float32 checkpoint gives the numbers it gives in the original scripts."""
    import clip

    fine = {name: value.float() + 1e-5 for name, value in untrained_state(TINY, vocabulary=TINY_VOCABULARY).items()}
    torch.save(fine, tmp_path / "fine.pt")
    model, _ = clip.load(str(tmp_path / "fine.pt"), device="cpu", jit=False)
    rounded = load_visual(TINY, tmp_path / "fine.pt")
    assert same(rounded, dict(model.visual.state_dict()))
    exact = load_visual(TINY, tmp_path / "fine.pt", rounding=False)
    assert same(exact, {name: fine[f"visual.{name}"] for name in exact})
    assert not same(rounded, exact)


def test_official_numbers_are_float16_already(tiny_weights: Path) -> None:
    assert same(load_visual(TINY, tiny_weights, rounding=True), load_visual(TINY, tiny_weights, rounding=False))


def test_parameters_do_not_change_with_their_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    fine = {name: value.float() for name, value in state.items()}
    for path, save in ((tmp_path / "state.safetensors", save_file), (tmp_path / "state.pt", torch.save)):
        save(fine, path)
        loaded = load_visual(TINY, path, rounding=False)
        path.write_bytes(bytes(path.stat().st_size))
        assert same(loaded, {name: fine[f"visual.{name}"] for name in loaded})


@pytest.mark.parametrize(
    ("value", "rounding", "word"),
    [
        (float("nan"), False, "visual.proj holds NaN or Inf"),
        (float("inf"), True, "visual.proj holds NaN or Inf"),
        (1e6, True, r"visual.proj does not fit into float16.*round_weights"),
        (None, False, "visual.proj holds int32 numbers"),
        (1e300, False, "visual.proj holds .* too large for float32"),
    ],
)
def test_numbers_that_no_trained_tower_has(
    tmp_path: Path, state: dict[str, Tensor], value: float | None, rounding: bool, word: str
) -> None:
    proj = state["visual.proj"].double()
    proj[3, 4] = value or 0
    torch.save(state | {"visual.proj": proj.int() if value is None else proj}, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match=word):
        load_visual(TINY, tmp_path / "state.pt", rounding=rounding)
    if value == 1e6:
        assert load_visual(TINY, tmp_path / "state.pt", rounding=False)["proj"][3, 4] == 1e6


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "complex64"])
def test_numbers_that_are_no_weights(tmp_path: Path, state: dict[str, Tensor], dtype: str) -> None:
    value = state["visual.proj"].to(getattr(torch, dtype))
    save_file(state | {"visual.proj": value}, tmp_path / "state.safetensors")
    with pytest.raises(WeightsError, match=rf"visual\.proj holds {dtype} numbers.*not quantised"):
        load_visual(TINY, tmp_path / "state.safetensors")


def test_weights_that_are_not_finite_are_refused_before_the_first_image(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    photographs(tmp_path / "images", 1)
    proj = state["visual.proj"].clone()
    proj[3, 4] = float("nan")
    torch.save(state | {"visual.proj": proj}, tmp_path / "state.pt")
    arguments = ("--model", "tiny", "--weights", tmp_path / "state.pt", "--activation", "gelu", "--out", tmp_path / "b")
    done = patchbank("extract", "folder", tmp_path / "images", *arguments, check=2)
    assert "visual.proj holds NaN or Inf" in " ".join(done.stderr.split())
    assert not (tmp_path / "b").exists()


def test_an_activation_without_weights() -> None:
    """OpenAI's own weights need QuickGELU: another one would be ignored."""
    with pytest.raises(ConfigError, match=r"activation gelu.*QuickGELU.*weights"):
        find(ExtractConfig(model="tiny", activation="gelu"))
    assert find(ExtractConfig(model="tiny", activation="quickgelu")).identity["activation"] == "quickgelu"
    bank = tiny_manifest()
    bank = replace(bank, identity={**bank.identity, "activation": "gelu", "weights": "1" * 64})
    with pytest.raises(WeightsError, match=r"made with other weights.*give the file with weights"):
        spec_of(bank, ExtractConfig(), None)


def test_a_file_of_several_towers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    both = {f"{tower}.{name}": value for tower in ("teacher", "student") for name, value in state.items()}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(WeightsError, match=r"several image towers: teacher\., student\."):
        load_visual(TINY, tmp_path / "both.pt")
    torch.save(state | both, tmp_path / "all.pt")
    torch.save(state, tmp_path / "one.pt")
    assert same(load_visual(TINY, tmp_path / "all.pt"), load_visual(TINY, tmp_path / "one.pt"))


LAION = {  # as in open_clip's repositories on the Hugging Face Hub
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 64, "act_kwargs": {}},
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def resolve(path: Path, asked: Activation | None = None) -> Activation:
    return resolve_activation(Checkpoint(path, ""), asked)


def test_openais_archives_prove_quickgelu(tmp_path: Path, tiny_weights: Path) -> None:
    assert activation_of(tiny_weights) == "quickgelu"
    assert resolve(tiny_weights) == resolve(tiny_weights, "quickgelu") == "quickgelu"
    with pytest.raises(WeightsError, match=r"tiny-weights.pt was trained with quickgelu.*Leave out activation gelu"):
        resolve(tiny_weights, "gelu")


def test_names_and_shapes_prove_no_activation(
    tmp_path: Path, tiny_weights: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LAION checkpoint has OpenAI's names; a state dict may come from anywhere."""
    with Archive(tiny_weights) as archive:
        everything = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    assert "input_resolution" in everything
    torch.save(everything, tmp_path / "saved.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "laion.safetensors")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "scripted.pt")
    for path in sorted(tmp_path.iterdir()):
        assert activation_of(path) is None
        with pytest.raises(WeightsError, match=r"does not say which activation.*activation quickgelu or activation"):
            resolve(path)
        assert (resolve(path, "gelu"), resolve(path, "quickgelu")) == ("gelu", "quickgelu")
    sha256 = hashlib.sha256((tmp_path / "saved.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, TINY.name, replace(TINY, sha256=sha256))
    assert activation_of(tmp_path / "saved.pt") == "quickgelu"


@pytest.mark.parametrize(("quick", "expected"), [(None, "gelu"), (False, "gelu"), (True, "quickgelu")])
def test_open_clips_config_beside_the_weights_proves_it(
    tmp_path: Path, state: dict[str, Tensor], quick: bool | None, expected: Activation
) -> None:
    path = tmp_path / "open_clip_model.safetensors"
    save_file(state, path)
    config = copy.deepcopy(LAION)
    if quick is not None:
        config["model_cfg"]["quick_gelu"] = quick
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert resolve(path) == resolve(path, expected) == expected
    other: Activation = "gelu" if expected == "quickgelu" else "quickgelu"
    with pytest.raises(WeightsError, match=f"was trained with {expected}.*not with {other}"):
        resolve(path, other)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "cannot be read as open_clip's config"),
        ("[]", "cannot be read as open_clip's config"),
        ("[" * 100_000, "cannot be read as open_clip's config"),
        ('{"model_cfg": {"quick_gelu": "yes", "vision_cfg": {}}}', "asks for quick_gelu yes"),
        ('{"model_cfg": {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}}', "asks for act_kwargs.*tanh"),
        ('{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}', r"asks for mean \[0.5"),
        ('{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": {"std": 0.5}}', "asks for std 0.5"),
        (
            '{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": {"interpolation": "bilinear"}}',
            "interpolation bilinear",
        ),
        (
            '{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": {"resize_mode": "squash"}}',
            "asks for resize_mode squash",
        ),
        ('{"model_cfg": {"vision_cfg": {"head_width": 32, "pool_type": "avg"}}}', "head_width 32, pool_type avg"),
        ('{"model_cfg": {"vision_cfg": {"global_average_pool": true}}}', "asks for global_average_pool True"),
    ],
)
def test_configs_that_ask_for_something_else(tmp_path: Path, state: dict[str, Tensor], text: str, word: str) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(WeightsError, match=word):
        resolve(tmp_path / "model.safetensors", "gelu")


def test_another_models_file_is_refused_and_recognised(tmp_path: Path, full_size_weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"not a ViT-L/14@336px.*By its shapes it is a ViT-B/16.*model"):
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
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the weights"),
        "page.pt": (b"<html>404</html>", "cannot be read as a checkpoint"),
        "moon.png": (b"\x89PNG\r\n", "is no checkpoint"),
        "page.safetensors": (b"<html>404</html>", "cannot be read"),
        "hostile.pt": (pickle.dumps({"visual.proj": _Hostile(trace)}), "not a checkpoint that can be read safely"),
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
    with pytest.raises(WeightsError, match=r"5806e77c.*cut short.*delete.*weights"):
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
    found = obtain_checkpoint(model, tmp_path / "root/pretrained_CLIP")
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
    reported: list[tuple[int, int]] = []
    checkpoints = tmp_path / "root/pretrained_CLIP"
    found = obtain_checkpoint(model, checkpoints, lambda *progress: reported.append(progress))
    assert found.path == checkpoints / "tiny.pt"
    assert found.path.read_bytes() == _Server.content
    assert reported[-1] == (len(_Server.content), len(_Server.content))
    assert [path.name for path in checkpoints.iterdir()] == ["tiny.pt"]
    _Server.mode = "missing"
    assert obtain_checkpoint(model, checkpoints) == found  # nothing is fetched again


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
        obtain_checkpoint(model, tmp_path / "pretrained_CLIP")
    assert not list((tmp_path / "pretrained_CLIP").glob("*"))
    assert not list((tmp_path / "pretrained_CLIP").glob(".*"))
    assert mode != "missing" or not (tmp_path / "pretrained_CLIP").exists()


def test_offline_the_message_says_which_file_to_put_where(tmp_path: Path) -> None:
    model = replace(TINY, url="http://127.0.0.1:9/tiny.pt")  # nothing listens there
    with pytest.raises(WeightsError, match=r"pretrained_CLIP/tiny.pt, .*refused.*Fetch http.*put it at .*tiny\.pt"):
        obtain_checkpoint(model, tmp_path / "pretrained_CLIP")
    assert not list(tmp_path.iterdir())
