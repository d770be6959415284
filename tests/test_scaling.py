"""What docs/guides/scaling.md names: the job script, the clusters' files; and the tables of docs/why/billion.md."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import billion

from patchbank import open_bank
from patchbank.encoders.openai.registry import MODELS
from tests.support import REPOSITORY, TINY, no_leftovers, parse_line, photographs

EXAMPLES = REPOSITORY / "examples"
PAGE = (REPOSITORY / "docs/why/billion.md").read_text()
SLURM = EXAMPLES / "slurm.sh"


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment whose `patchbank` knows the tiny model, without variables that name a part."""
    shim = tmp_path / "bin/patchbank"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.tiny_program "$@"\n')
    shim.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not re.match("SLURM_|RANK$|WORLD_SIZE$|PART$", name)}
    return kept | {"PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_tasks_of_a_job_array_fill_one_bank(tmp_path: Path, tiny_weights: Path, program: dict[str, str]) -> None:
    names = photographs(tmp_path / "images", 6)
    bank = tmp_path / "bank"
    run = [SLURM, "folder", tmp_path / "images", "--out", bank, "--model", "tiny", "--weights", tiny_weights]
    run += ["--device", "cpu", "--shard-size", 4352, "--batch-size", 2]  # two images a shard
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    # The second task of two is submitted again, alone: of its own array it would be the only one.
    tasks = [
        array | {"SLURM_ARRAY_TASK_ID": "1"},
        {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "1", "PART": "1/2"},
    ]
    command = ["bash", *map(str, run)]
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, env=program | task, stdout=subprocess.PIPE, text=True)
        for task in tasks
    ]
    printed = [task.communicate(timeout=300)[0] for task in started]
    assert [task.returncode for task in started] == [0, 0]
    assert [re.search(r"(\d+) features written", text)[1] for text in printed] == ["2", "4"]  # type: ignore[index]
    assert list(open_bank(bank)) == names
    assert no_leftovers(bank)


def test_the_job_script_is_sound_and_its_directives_come_first() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    lines = SLURM.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert max(directives) < min(commands)  # SLURM reads none behind a command
    assert SLURM.stat().st_mode & 0o111


def parsed(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((EXAMPLES / name).read_text())


def test_the_ray_clusters_file_is_what_ray_takes() -> None:
    cluster = parsed("ray-cluster.yaml")
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["max_workers"] <= cluster["max_workers"]
    jsonschema = pytest.importorskip("jsonschema")
    if (ray := importlib.util.find_spec("ray")) is None or ray.origin is None:
        pytest.skip("ray is not installed")
    schema = json.loads((Path(ray.origin).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_the_ray_job_asks_for_what_it_uses() -> None:
    job = parsed("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    containers = [
        container for part in (spec["headGroupSpec"], group) for container in part["template"]["spec"]["containers"]
    ]
    assert {container["image"] for container in containers} == {f"patchbank-ray:{spec['rayVersion']}"}
    assert all(each["resources"]["requests"] == each["resources"]["limits"] for each in containers)
    assert containers[1]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert (
        f"--num-workers {group['maxReplicas']} --workers {containers[1]['resources']['limits']['cpu']}"
        in (job["spec"]["entrypoint"])
    )
    parse_line(job["spec"]["entrypoint"])


def test_the_commands_of_the_job_script_are_commands() -> None:
    lines = [line for line in SLURM.read_text().splitlines() if "sbatch " in line]
    assert len(lines) == 3
    for line in lines:
        parse_line(f"patchbank extract {line.partition('slurm.sh ')[2]}")


def test_the_tables_of_the_page_are_the_scripts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(MODELS, TINY.name)
    billion.main([])
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["benchmark"] == "billion"
    assert result["machine"] and result["versions"]["patchbank"]

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.split("|")]

    page = [cells(line) for line in PAGE.splitlines() if line.startswith("|")]
    tables = [line for line in printed if line.startswith("|") and not line.startswith("|-")]
    assert len(tables) > 15
    for line in tables:
        assert cells(line) in page, f"docs/why/billion.md lacks, of `python -m benchmarks.billion`: {line}"
