"""A Ray cluster of several nodes on this machine. Workers and nodes are killed in mid-run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from patchbank import extract, load_dataset
from patchbank.config import ExtractConfig
from patchbank.errors import BankError, ConfigError, install
from patchbank.extraction import work
from patchbank.extraction.cluster import workers
from patchbank.extraction.ray import _cpus
from tests.datasets.packed import packed
from tests.support import REPOSITORY, OnBatch, contents, no_leftovers, patchbank, photographs

pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # warnings: of Ray's own

NAMES = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many") / "images"
    photographs(directory, NAMES - 1)
    (directory / "broken.jpg").write_bytes(b"no picture")
    return directory


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that computes nothing, and three nodes of one core each."""
    import ray

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def run(
    cluster: Any, images: Path, tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Extract on the cluster into ``bank``; `meanwhile` happens once, when the first images are done."""
    monkeypatch.setattr(work, "_UNIT", 4)

    def function(
        layout: str, meanwhile: Callable[[], object] = lambda: None, dataset: Any = None, **options: Any
    ) -> Any:
        left = [meanwhile]

        def progress(*_: object) -> None:
            if left:
                left.pop()()

        config = replace(tiny_config, layout=layout, shard_size=4 * 2200, engine="ray", ray_address=cluster.address)  # type: ignore[arg-type]
        stop = options.pop("stop", None)
        bank = tmp_path / "bank"
        dataset = dataset or load_dataset("folder", images)
        return extract(dataset, bank, replace(config, **options), progress=OnBatch(progress), stop=stop)

    return function


def expected(layout: str, images: Path, config: ExtractConfig, directory: Path) -> dict[str, str]:
    """The bank of the local engine."""
    extract(load_dataset("folder", images), directory, replace(config, layout=layout, shard_size=4 * 2200))  # type: ignore[arg-type]
    return contents(directory)


def busy_workers() -> list[int]:
    """Processes of actors that are doing a unit, by the name that Ray gives them."""
    return workers_of(b"ray::_Worker.do")


def workers_of(name: bytes) -> list[int]:
    """Processes with names that begin with this."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(name):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
def test_the_bank_is_the_local_engines_though_a_worker_is_killed(
    layout: str, run: Callable[..., Any], images: Path, tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    killed: list[int] = []
    ended = Event()

    def kill() -> None:
        while not killed and not ended.is_set():
            for busy in busy_workers()[:1]:
                os.kill(busy, signal.SIGKILL)
                killed.append(busy)

    killer = Thread(target=kill)
    try:
        summary = run(layout, killer.start)
    finally:
        ended.set()
        if killer.ident:
            killer.join()
    assert len(killed) == 1
    assert (summary.images, summary.failures) == (NAMES - 1, {"broken.jpg": "not an image that Pillow can identify"})
    assert contents(tmp_path / "bank") == expected(layout, images, tiny_config, tmp_path / "local")
    assert run(layout).already_done == NAMES - 1  # and nothing is left behind for it to do or to tidy up
    assert no_leftovers(tmp_path / "bank")


def test_the_bank_is_complete_though_a_node_is_lost(
    run: Callable[..., Any], cluster: Any, images: Path, tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    """Its actor finds no other node while the others compute; they get its unit."""
    node = cluster.add_node(num_cpus=1)
    nodes = len(cluster.worker_nodes)
    summary = run("shards", lambda: cluster.remove_node(node, allow_graceful=False))
    assert len(cluster.worker_nodes) == nodes - 1
    assert summary.images == NAMES - 1
    assert contents(tmp_path / "bank") == expected("shards", images, tiny_config, tmp_path / "local")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_tars_and_tables_are_read_by_the_workers(
    kind: str, run: Callable[..., Any], images: Path, tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    dataset = packed(kind, images, tmp_path / "packed", files=3)
    assert run("shards", dataset=dataset).images == NAMES - 1
    extract(dataset, tmp_path / "local", replace(tiny_config, layout="shards", shard_size=4 * 2200))
    assert contents(tmp_path / "bank") == contents(tmp_path / "local")


def test_a_stop_ends_after_the_images_in_flight(
    run: Callable[..., Any], images: Path, tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    stop = Event()
    summary = run("ezhoi", stop.set, stop=stop)
    assert 0 < summary.images < NAMES - 1
    assert summary.remaining == NAMES - summary.images - len(summary.failures)
    run("ezhoi")
    assert contents(tmp_path / "bank") == expected("ezhoi", images, tiny_config, tmp_path / "local")


def test_what_a_worker_finds_wrong_is_one_message_that_names_its_node(
    run: Callable[..., Any], tiny_weights: Path, images: Path, tmp_path: Path
) -> None:
    def away() -> None:
        (images.parent / "away").mkdir()
        images.rename(images.parent / "away/images")

    try:
        with pytest.raises(Exception, match=r"On the node [\d.]+: .*which holds the images, is gone"):
            run("ezhoi", away)
    finally:
        (images.parent / "away/images").rename(images)
        (images.parent / "away").rmdir()


def test_workers_that_die_whatever_they_do_end_the_run(run: Callable[..., Any], tmp_path: Path) -> None:
    ended = Event()

    def kill() -> None:
        while not ended.wait(0.02):
            for worker in workers_of(b"ray::_Worker"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(BankError, match=r"No worker can be started: |Workers died 5 times of the 4 images from "):
            run("ezhoi", num_workers=1)
    finally:
        ended.set()
        killer.join()


_LISTENING = """
import ipaddress, sys
from patchbank import ExtractConfig, extract, load_dataset
from patchbank.encoders.openai.registry import MODELS
from tests.support import TINY, OnBatch

def look(*_):
    import ray, psutil  # Ray's own copy of psutil
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        for each in process.net_connections():
            if each.status == psutil.CONN_LISTEN:
                host = ipaddress.ip_address(each.laddr.ip)
                found[getattr(host, "ipv4_mapped", None) or host, process.pid] = " ".join(process.cmdline())[:60]

MODELS["tiny"] = TINY
found = {}
config = ExtractConfig(model="tiny", weights=sys.argv[2], engine="ray", ray_address="local", num_workers=1, limit=2)
extract(load_dataset("folder", sys.argv[1]), sys.argv[3], config, progress=OnBatch(look))
assert len({pid for _, pid in found}) > 2 and any("_Worker" in name for name in found.values()), found
assert all(host.is_loopback for host, _ in found), found
"""


def test_a_cluster_of_this_machine_alone_listens_on_loopback(images: Path, tiny_weights: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _LISTENING, images, tiny_weights, tmp_path / "bank"],
        env=environment | {"HOME": str(tmp_path)},  # Ray keeps a token there
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_how_a_cluster_is_divided(cluster: Any) -> None:
    config = ExtractConfig(engine="ray", ray_address=cluster.address)
    assert workers(config) == (3, 0)
    assert workers(replace(config, num_workers=7)) == (7, 0)
    for wrong, words in (
        ({"device": "cuda:0"}, "Ray decides which GPU a worker gets"),
        ({"device": "cpu", "num_gpus_per_worker": 1}, "do not go together"),
        ({"device": "cuda", "num_gpus_per_worker": 0}, "do not go together"),
    ):
        with pytest.raises(ConfigError, match=words):
            workers(replace(config, **wrong))  # type: ignore[arg-type]
    assert workers(replace(config, device="cuda"))[1] == 1
    big, small = {"CPU": 16, "GPU": 4}, {"CPU": 8, "GPU": 4}
    assert _cpus([big], 4, 1) == 4
    assert _cpus([big, small, {"CPU": 64}], 8, 1) == 2  # what fits on each node with GPUs
    assert _cpus([big], 8, 0.5) == 2
    assert _cpus([{"CPU": 16}, {"CPU": 8}, {}], 2, 0) == 8
    assert _cpus([{"CPU": 16}, {"CPU": 8}], 4, 0) == 4
    assert _cpus([], 3, 1) == 1


def test_without_a_cluster_and_without_ray(images: Path, tiny_weights: Path, tmp_path: Path) -> None:
    run = ("extract", "folder", images, "--model", "tiny", "--weights", tiny_weights, "--out", tmp_path / "bank")
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": ""}
    done = patchbank(*run, "--engine", "ray", "--ray-address", "127.0.0.1:1", check=2, env=environment)
    assert "--ray-address 127.0.0.1:1 cannot be reached" in done.stderr
    blocked = tmp_path / "blocked/ray"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(blocked.parent), *filter(None, sys.path)])
    done = patchbank(*run, "--engine", "ray", check=2, env={**os.environ, "PYTHONPATH": path})
    assert done.stderr.endswith(f"\nerror: --engine ray needs Ray: {install('ray')}\n")
    assert not (tmp_path / "bank").exists()
