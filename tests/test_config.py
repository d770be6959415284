"""The options' one statement, and the part of a run that the environment assigns to a process."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from patchbank.config import WHOLE, ExtractConfig, Option, Partition, choices, partition_of_environment
from patchbank.encoders import model_name
from patchbank.errors import BankError, ConfigError, PatchbankError


def array(index: int, count: int, lowest: int = 0, step: int = 1) -> dict[str, str]:
    """What SLURM sets in a task of ``--array=LOWEST-...:STEP``."""
    return {
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(lowest),
        "SLURM_ARRAY_TASK_MAX": str(lowest + (count - 1) * step),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


def processes(index: int, count: int) -> dict[str, str]:
    """What `srun` sets in a process."""
    return {"SLURM_PROCID": str(index), "SLURM_NTASKS": str(count)}


def torchrun(rank: int, count: int) -> dict[str, str]:
    """What torchrun sets in a process."""
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param(array(3, 16), "3/16", id="array"),
        pytest.param(array(5, 4, lowest=1, step=2), "2/4", id="array=1-7:2"),
        pytest.param(array(10, 3, lowest=10, step=5), "0/3", id="array=10-20:5"),
        pytest.param({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, "1/2", id="no lowest, no step"),
        pytest.param(processes(5, 8), "5/8", id="srun"),
        pytest.param(torchrun(2, 4), "2/4", id="torchrun"),
        pytest.param(torchrun(5, 8) | processes(1, 2), "5/8", id="torchrun under srun: a node a task"),
        # sbatch sets SLURM_PROCID and SLURM_NTASKS in the script itself.
        pytest.param(array(3, 16) | processes(0, 1), "3/16", id="array of one process each"),
        pytest.param(array(1, 3) | processes(2, 4), "6/12", id="array of sruns"),
        pytest.param(array(2, 3, lowest=1) | torchrun(3, 4), "7/12", id="array of torchruns"),
        pytest.param(array(1, 3) | torchrun(3, 4) | processes(1, 2), "7/12", id="array of torchruns under srun"),
    ],
)
def test_the_environment_gives_the_part(environment: dict[str, str], expected: str) -> None:
    assert partition_of_environment(environment) == Partition.parse(expected)


def test_an_arrays_tasks_have_every_part_once() -> None:
    parts = {
        partition_of_environment(array(4 + 3 * task, 5, lowest=4, step=3) | torchrun(rank, 2))
        for task in range(5)
        for rank in range(2)
    }
    assert parts == {Partition(index, 10) for index in range(10)}


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"SLURM_ARRAY_TASK_ID": "0"}, {"HOME": "/"}])
def test_an_incomplete_environment_is_an_error(environment: dict[str, str]) -> None:
    half = r"(RANK is set, and WORLD_SIZE|SLURM_ARRAY_TASK_ID is set, and SLURM_ARRAY_TASK_COUNT) is not.*0/4"
    nothing = r"neither SLURM_ARRAY_TASK_ID, SLURM_PROCID nor RANK is set.*0/4"
    with pytest.raises(ConfigError, match=half if environment.keys() & {"RANK", "SLURM_ARRAY_TASK_ID"} else nothing):
        partition_of_environment(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (torchrun(0, 2) | {"RANK": "first"}, "RANK and WORLD_SIZE must be integers, got first and 2"),
        (processes(0, 2) | {"SLURM_NTASKS": ""}, "SLURM_PROCID and SLURM_NTASKS must be integers, got 0 and "),
        (
            array(0, 2) | {"SLURM_ARRAY_TASK_MIN": "x"},
            "_MIN and SLURM_ARRAY_TASK_STEP must be integers, got 0, 2, x and 1",
        ),
        (torchrun(4, 4), "parts are numbered from 0 to N-1"),
        (torchrun(-1, 4), "parts are numbered from 0 to N-1"),
        (processes(0, 0), "parts are numbered from 0 to N-1"),
        # Some tasks of an array with gaps (--array=0,7): SLURM gives their number, and not which they are.
        (array(7, 2), "parts are numbered from 0 to N-1"),
        (array(0, 2, step=0), "SLURM_ARRAY_TASK_STEP must not be 0"),
    ],
)
def test_nonsense_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition_of_environment(environment)


def test_auto_asks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*array(0, 1), *processes(0, 1), *torchrun(0, 1)}:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"^partition auto"):
        Partition.parse("auto")
    for name, value in array(3, 16).items():
        monkeypatch.setenv(name, value)
    assert Partition.parse("auto") == Partition(3, 16)
    assert Partition.parse("0/4") == Partition(0, 4)  # an explicit part counts, in an array too


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, tf32, not 'fp8'."),
        ({"precision": None}, "precision must be one of fp32, bf16, fp16, tf32, not None."),
        ({"workers": "x"}, "workers must be a number, not 'x'."),
        ({"layout": "zip"}, "layout must be one of ezhoi, shards, not 'zip'."),
        ({"activation": "relu"}, "activation must be one of quickgelu, gelu, not 'relu'."),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0."),
        ({"shard_size": 0}, "shard_size must be at least 1, not 0."),
        ({"shard_size": "many"}, "shard_size: 'many' is no size in bytes, such as 256MB."),
        ({"workers": 1025}, "workers must be at most 1024, not 1025."),
        ({"num_gpus_per_worker": -0.5}, "num_gpus_per_worker must be at least 0, not -0.5."),
        ({"num_gpus_per_worker": float("inf")}, "num_gpus_per_worker must be at least 0, not inf."),
        ({"num_gpus_per_worker": float("nan")}, "num_gpus_per_worker must be at least 0, not nan."),
        ({"overwrite": True, "partition": Partition(0, 2)}, "would delete what the other partitions wrote"),
    ],
)
def test_an_invalid_value_is_named_as_it_was_given(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ExtractConfig(**values)
    assert message in str(raised.value)
    with pytest.raises(ConfigError):
        replace(ExtractConfig(), **values)


def test_a_dtype_has_its_usual_spellings() -> None:
    for short, long in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        for given in (short, long):
            config = ExtractConfig(precision=given, dtype=given, layout="shards")  # type: ignore[arg-type]
            assert (config.precision, config.dtype) == (short, long)


def test_a_model_has_its_usual_spellings() -> None:
    for given in ("vit-b-16", "ViT-B/16", "VITB16", "vit_b_16"):
        assert model_name(given) == "ViT-B/16"
    assert model_name("vit-l-14-336px") == "ViT-L/14@336px"
    with pytest.raises(ConfigError, match=r"no model 'ViT-B/61'. Did you mean ViT-B/16\? Choose from: ViT-B/32, "):
        model_name("ViT-B/61")
    with pytest.raises(ConfigError, match=r"no model 'nonsense'. Choose from: "):
        model_name("nonsense")


def test_errors_name_arguments_in_python_and_options_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size must be at least 1, not 0\.$") as caught:
        ExtractConfig(batch_size=0)
    monkeypatch.setattr(PatchbankError, "flags", True)
    assert str(caught.value) == "--batch-size must be at least 1, not 0."
    monkeypatch.undo()
    error = BankError("/x/a--b-c.jpg is in `patchbank extract --out B`. Use (--num-workers 2) or --prefix.")
    assert str(error) == "/x/a--b-c.jpg is in `patchbank extract --out B`. Use (num_workers 2) or prefix."


def test_text_is_taken_where_the_command_line_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = ExtractConfig(weights="~/a.pt", shard_size="1.5 MB", partition="1/4")  # type: ignore[arg-type]
    assert (config.weights, config.shard_size, config.partition) == (Path("/home/me/a.pt"), 1_500_000, Partition(1, 4))
    assert ExtractConfig(weights=Path("~/a.pt")).weights == Path("/home/me/a.pt")


def test_every_field_is_an_option_whose_help_names_its_choices() -> None:
    for each in fields(ExtractConfig):
        stated = Option.of(each)
        assert stated.help.endswith("."), each.name
        assert f"{each.name}: {stated.help}" in (ExtractConfig.__doc__ or "")
        for choice in choices(each.type):
            assert choice in stated.help or choice == each.default == "auto", (each.name, choice)
    assert choices(ExtractConfig.__dataclass_fields__["layout"].type) == ("ezhoi", "shards")


def test_the_arguments_are_what_differs_from_the_defaults() -> None:
    assert ExtractConfig(model="ViT-B/32").arguments() == ()
    config = ExtractConfig(dtype="int8", layout="shards", batch_size=3, round_weights=True, weights=Path("a b.pt"))
    assert config.arguments() == (
        *("--weights", "a b.pt", "--round-weights", "--layout", "shards", "--dtype", "int8", "--batch-size", "3"),
    )
    assert ExtractConfig(partition=WHOLE).arguments() == ()
