"""The pipeline: every image in its slot, memory bounded in bytes, and a stop that commits what is begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Lock

import numpy as np
import pytest
import torch

from patchbank.bank.payload import Feature
from patchbank.budget import ByteBudget
from patchbank.datasets.samples import Decoded, Failure
from patchbank.extraction import pipeline
from patchbank.features import CLS, GRID, Input
from patchbank.regions import Region
from tests.support import sample

SIZE = (4, 6)  # (h, w)
INPUT = Input(size=SIZE, patch=2, mean=(0, 0, 0), std=(1, 1, 1))


class Watched:
    """A lane that logs its samples. Sample "n" is a picture of brightness n; names with an x fail."""

    def __init__(self, seconds_to_commit: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.features: dict[str, float] = {}
        self.failures: list[str] = []
        self.together: list[list[str]] = []
        self.decoded = self.waiting = self.most_waiting = self.most_ahead = 0
        self._seconds, self._lock = seconds_to_commit, Lock()

    def decode(self, wanted: Sequence[pipeline.Wanted], _: ByteBudget) -> Sequence[Decoded | Failure]:
        samples = [each for _, each in wanted]
        with self._lock:
            self.decoded += len(samples)
            self.most_ahead = max(self.most_ahead, self.decoded - 4 * len(self.batches))
            self.together.append([each.key for each in samples])
        return [
            Failure(each.key, "x")
            if "x" in each.key
            else Decoded(each, np.full((*SIZE, 3), int(each.key.split("#")[-1]), np.uint8), (1, 1))
            for each in samples
        ]

    def submit(self, pixels: torch.Tensor) -> Callable[[], pipeline.Outputs]:
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        tokens = pixels[:, 0, :3].float()  # (B, 1 + 2, 3)
        outputs = {CLS: tokens[:, 0], GRID: tokens[:, 1:]}
        with self._lock:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        return lambda: outputs

    def add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> Sequence[Failure]:
        time.sleep(self._seconds)
        self.features |= {feature.key: float(feature.outputs[GRID][0, 0]) for feature in features}
        self.failures += [failure.key for failure in failures]
        with self._lock:
            self.waiting -= 1
        return ()

    def added(self, count: int, failures: Sequence[Failure]) -> None:
        pass

    def run(
        self,
        batches: list[list[tuple[int, str]]],
        stop: Event | None = None,
        *,
        deferred: bool = True,
        regions: bool = False,
    ) -> None:
        region = Region() if regions else None
        samples = [
            sample(key, Path())._replace(position=4 * number + slot, region=region)
            for number, batch in enumerate(batches)
            for slot, key in batch
        ]
        lane = pipeline.Lane(samples, INPUT, 4, self.submit, self.add, self.added, deferred=deferred)
        pipeline.run([lane], self.decode, workers=2, stop=(stop or Event()).is_set)


def test_every_image_is_in_its_slot_and_no_other_slot_is_filled() -> None:
    watched = Watched()
    watched.run([[(0, "1"), (1, "2"), (2, "3"), (3, "4")], [(1, "5"), (2, "x"), (3, "6")], [(0, "x2")], [(2, "7")]])
    assert watched.batches == [[1, 2, 3, 4], [0, 5, 0, 6], [0, 0, 7, 0]]  # nothing is encoded of a batch that failed
    assert watched.features == {key: float(key) for key in "1234567"}
    assert watched.failures == ["x", "x2"]


def test_features_are_found_by_their_slot_in_any_order() -> None:
    """A full batch too, as a dataset whose samples are not in the order of their positions gives it."""
    watched = Watched()
    watched.run([[(2, "1"), (0, "2"), (3, "3"), (1, "4")], [(3, "5"), (1, "6")]])
    assert watched.batches == [[2, 4, 1, 3], [0, 6, 0, 5]]
    assert watched.features == {key: float(key) for key in "123456"}


def test_an_image_is_decoded_once_for_its_regions_in_several_batches() -> None:
    watched = Watched()
    keys = [f"{image}#{number}" for image, count in (("a", 6), ("b", 1), ("c", 70)) for number in range(count)]
    watched.run([[*enumerate(keys[begin : begin + 4])] for begin in range(0, len(keys), 4)], regions=True)
    assert list(watched.features) == keys
    assert sorted(map(len, watched.together)) == [1, 6, 6, 64]
    assert all(len({key[0] for key in each}) == 1 for each in watched.together)


def test_features_that_wait_to_be_written_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_bytes = 4 * (1 + 2) * 3 * 4
    monkeypatch.setattr(pipeline, "_WRITING_BYTES", 2 * batch_bytes)
    watched = Watched(seconds_to_commit=0.01)
    watched.run([[(slot, str(4 * number + slot + 1)) for slot in range(4)] for number in range(20)])
    assert len(watched.features) == 80
    assert watched.most_waiting <= 4  # two that wait, one that has just been received, and one that is computed


def test_decoding_runs_ahead_no_further_than_its_bound() -> None:
    watched = Watched(seconds_to_commit=0.005)
    watched.run([[(slot, str(4 * number + slot + 1)) for slot in range(4)] for number in range(40)])
    assert watched.most_ahead <= 4 * 4  # with two workers: the batch that is waited for, two ahead, one being added


def test_on_the_cpu_a_batch_is_reported_before_the_next_one_is_computed() -> None:
    """A batch of a large model takes long, and a run may have few."""

    class Reported(Watched):
        reported = Event()

        def submit(self, pixels: torch.Tensor) -> Callable[[], pipeline.Outputs]:
            assert not self.batches or self.reported.wait(60)
            self.reported.clear()
            return super().submit(pixels)

        def added(self, count: int, failures: Sequence[Failure]) -> None:
            self.reported.set()

    watched = Reported()
    watched.run([[(0, "1")], [(0, "2")], [(0, "3")]], deferred=False)
    assert watched.features == {"1": 1.0, "2": 2.0, "3": 3.0}


def test_a_stop_commits_what_was_encoded() -> None:
    stop = Event()

    class Encoded(Watched):
        def submit(self, pixels: torch.Tensor) -> Callable[[], pipeline.Outputs]:
            stop.set()
            return super().submit(pixels)

    watched = Encoded()
    watched.run([[(0, str(number))] for number in range(1, 9)], stop)
    assert watched.features == {"1": 1.0}


def test_an_error_in_a_stage_ends_the_run() -> None:
    class Broken(Watched):
        def add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> Sequence[Failure]:
            raise OSError("no more room")

    with pytest.raises(OSError, match="no more room"):
        Broken().run([[(0, str(number))] for number in range(1, 9)])


def test_the_next_batch_is_begun_before_the_last_one_is_waited_for() -> None:
    happened: list[str] = []

    class Device(Watched):
        def submit(self, pixels: torch.Tensor) -> Callable[[], pipeline.Outputs]:
            number = len(self.batches)
            wait = super().submit(pixels)
            happened.append(f"begun {number}")

            def received() -> pipeline.Outputs:
                happened.append(f"received {number}")
                return wait()

            return received

    watched = Device()
    watched.run([[(0, "1")], [(0, "2")], [(0, "3")]])
    assert happened == ["begun 0", "begun 1", "received 0", "begun 2", "received 1", "received 2"]
    assert watched.features == {"1": 1.0, "2": 2.0, "3": 3.0}


def test_a_lanes_batch_ends_where_another_lane_is_beyond_it() -> None:
    """One lane has two samples far apart; its first is written long before its second is decoded."""
    written: list[tuple[str, str]] = []
    decoded: list[int] = []

    def lane(name: str, numbers: Sequence[int], batch_size: int) -> pipeline.Lane:
        watched = Watched()

        def add(features: Sequence[Feature], failures: Sequence[Failure]) -> Sequence[Failure]:
            written.extend((name, feature.key) for feature in features)
            return watched.add(features, failures)

        todo = [sample(str(number), Path())._replace(position=number) for number in numbers]
        return pipeline.Lane(todo, INPUT, batch_size, watched.submit, add, watched.added, deferred=False)

    def decode(wanted: Sequence[pipeline.Wanted], budget: ByteBudget) -> Sequence[Decoded | Failure]:
        decoded.append(wanted[0][1].position)
        return Watched().decode(wanted, budget)

    lanes = [lane("few", [1, 90], 4), lane("all", range(1, 100), 8)]
    pipeline.run(lanes, decode, workers=1, stop=Event().is_set)
    assert sorted(decoded) == list(range(1, 100))  # each once
    assert [key for name, key in written if name == "all"] == [str(number) for number in range(1, 100)]
    few = [index for index, (name, _) in enumerate(written) if name == "few"]
    assert [written[index][1] for index in few] == ["1", "90"]
    assert few[0] < 40 < 80 < few[1]
