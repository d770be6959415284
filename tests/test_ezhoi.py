"""docs/guides/ezhoi.md: a reader with EZ-HOI's behaviour, on pickles and, with three lines changed, on shards."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchbank import ExtractConfig, extract, load_dataset
from patchbank.config import Layout
from patchbank.datasets.example import write_sample
from tests.support import REPOSITORY, patchbank, relative_error

PAGE = (REPOSITORY / "docs/guides/ezhoi.md").read_text()


class Reader(nn.Module):
    """What EZ-HOI's prompt learner does with the features of a batch's images: no cast, no choice of device."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = str(directory)
        torch.manual_seed(0)
        self.down = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def load(self, file_name: str) -> Tensor:
        with open(os.path.join(self.directory, file_name.split(".")[0] + "_clip.pkl"), "rb") as file:  # noqa: PTH118
            features: Tensor = pickle.load(file)
        return features

    def forward(self, targets: list[dict[str, Any]]) -> Tensor:
        batch = []
        for target in targets:
            features = self.load(target["filename"])
            features /= features.norm(dim=-1, keepdim=True)
            batch.append(features)
        down: Tensor = self.down(torch.stack(batch).to("cpu"))
        return down


class ReaderOfShards(Reader):
    """The same with the page's three lines."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        first, opened, self.read = _lines()
        self.names: dict[str, Any] = {"directory": directory}
        exec(f"{first}\n{opened}", self.names)

    def load(self, file_name: str) -> Tensor:
        exec(self.read, self.names, found := {"filename": file_name})
        features: Tensor = found["features"]  # type: ignore[assignment]
        return features


def _lines() -> list[str]:
    """The three lines that docs/guides/ezhoi.md changes."""
    (snippet,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "open_bank" in text)
    lines: list[str] = [line for line in snippet.splitlines() if line]
    assert len(lines) == 3
    return lines


@pytest.mark.parametrize("name", ["hicodet", "vcoco"])
def test_ez_hois_reader_on_both_layouts(
    name: str, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patchbank_reader.py").write_text(patchbank("reader", check=0).stdout)
    monkeypatch.syspath_prepend(tmp_path)
    write_sample(tmp_path / "root")
    split = "test" if name == "hicodet" else "val"
    dataset = load_dataset(name, tmp_path / "root", split)
    layouts: list[tuple[Layout, str]] = [("ezhoi", "float32"), ("shards", "float16")]
    for layout, dtype in layouts:
        config = ExtractConfig(model="tiny", weights=tiny_weights, layout=layout, dtype=dtype)  # type: ignore[arg-type]
        extract(dataset, tmp_path / layout, config)
    targets = [{"filename": sample.key} for sample in dataset.samples]
    with torch.no_grad():
        unchanged = Reader(tmp_path / "ezhoi")(targets)
        changed = ReaderOfShards(tmp_path / "shards")
        halves = changed(targets)
        assert torch.equal(halves, changed(targets))  # dividing in place changed nothing in the bank
    assert unchanged.shape == (5, 16, 64)
    assert 0 < relative_error(halves, unchanged) < 1e-3
