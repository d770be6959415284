"""The images that a dataset lists, from every annotation structure; errors of malformed files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from patchbank import extract, load_dataset, open_bank
from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.hoi import read_indices
from patchbank.encoders.openai.checkpoints import load_state
from patchbank.errors import ConfigError, DatasetError, PatchbankError
from patchbank.images import image_extensions
from tests.support import (
    REPOSITORY,
    command,
    hico_list,
    hico_root,
    patchbank,
    photographs,
    vcoco_dict,
    vcoco_root,
    write_json,
)

ANNOTATIONS = Path(os.environ.get("PATCHBANK_ANNOTATIONS", REPOSITORY.parent / "shared" / "annotations"))


def test_hicodet_lists_every_image_once_in_order(tmp_path: Path) -> None:
    hico_root(tmp_path, 4)
    names = json.loads((tmp_path / "hicodet/trainval_hico.json").read_text())
    write_json(tmp_path / "hicodet/trainval_hico.json", [*names[::-1], names[2]])
    dataset = load_dataset("hicodet", tmp_path, "train")
    assert [sample.key for sample in dataset.samples] == [entry["file_name"] for entry in names[::-1]]
    assert all(sample.path.is_file() for sample in dataset.samples)
    assert dataset.title == "hicodet train"


@pytest.mark.parametrize(
    "use",
    [
        lambda pipe: load_dataset("tar", pipe),
        lambda pipe: load_dataset("parquet", pipe),
        lambda pipe: load_dataset("hicodet", split="train", annotations=pipe),
        read_indices,
        load_state,
        lambda pipe: load_state(pipe.rename(pipe.with_suffix(".safetensors"))),
    ],
)
def test_a_pipe_does_not_hang(tmp_path: Path, use: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PatchbankError, match="not a regular file"):
        use(tmp_path / "pipe")


def test_vcoco_takes_train2014_and_val2014(tmp_path: Path) -> None:
    vcoco_root(tmp_path, 3)
    train, val = (load_dataset("vcoco", tmp_path, split) for split in ("train", "val"))
    assert train.images.name == "train2014"
    assert train.annotations == tmp_path / "vcoco/instances_vcoco_trainval.json"
    assert val.images.name == "val2014"
    assert val.annotations == tmp_path / "vcoco/instances_vcoco_test.json"


def test_upts_file_is_read_where_the_lists_are_missing(tmp_path: Path) -> None:
    hico_root(tmp_path, 3)
    (tmp_path / "hicodet/test_hico.json").unlink()
    names = sorted(path.name for path in (tmp_path / "hicodet/hico_20160224_det/images/test2015").iterdir())
    write_json(tmp_path / "hicodet/instances_test2015.json", {"annotation": [], "filenames": names, "size": []})
    assert [sample.key for sample in load_dataset("hicodet", tmp_path, "test").samples] == names


@pytest.mark.parametrize("structure", [hico_list, vcoco_dict, lambda names: {"filenames": list(names)}])
def test_structures_are_told_apart_whatever_the_file_is_called(tmp_path: Path, structure: object) -> None:
    path = write_json(tmp_path / "some.json", structure(["b.jpg", "a.jpg"]))  # type: ignore[operator]
    assert read_file_names(path) == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not valid JSON"),
        ("\udcff", "UTF-8"),
        ("[" * 100_000, "not valid JSON"),
        ('[{"file_name": "a.jpg", "score": 1e999}]', "a number that is out of range"),
        (f'[{{"file_name": "a.jpg", "id": {"7" * 5000}}}]', "a number that is out of range"),
        ("[]", "lists no images"),
        ("3", "another structure"),
        ('{"images": [], "info": 1}', "'images', 'info'"),
        ('[{"file_name": "a.jpg"}, {"name": "b.jpg"}]', "entry 1 has no file_name"),
        ('{"annotations": ["a.jpg"]}', "annotations entry 0"),
        ('{"filenames": ["a.jpg", 7]}', "filenames entry 1"),
    ],
)
def test_malformed_annotations(tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DatasetError, match=word) as caught:
        read_file_names(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "", "a//b.jpg", "./a.jpg", "a\0.jpg"]
)
def test_a_name_cannot_lead_out_of_the_image_directory(tmp_path: Path, name: str) -> None:
    hico_root(tmp_path, 2, splits=["test"])
    write_json(tmp_path / "hicodet/test_hico.json", hico_list(["HICO_test2015_0000.jpg", name]))
    with pytest.raises(DatasetError, match="file_name") as caught:
        load_dataset("hicodet", tmp_path, "test")
    assert repr(name) in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"trainval_hico\.json.*instances_train2015\.json.*annotations"):
        load_dataset("hicodet", tmp_path, "train")
    hico_root(tmp_path, 2, splits=["train"])
    with pytest.raises(DatasetError, match=r"nowhere does not exist.*images"):
        load_dataset("hicodet", tmp_path, "train", images=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no split 'val' of hicodet"):
        load_dataset("hicodet", tmp_path, "val")
    with pytest.raises(ConfigError, match="no dataset 'coco'"):
        load_dataset("coco", tmp_path, "val")


def test_an_image_whose_name_is_too_long_is_not_there(tmp_path: Path) -> None:
    path = hico_root(tmp_path, 1, splits=["train"]) / "hicodet/trainval_hico.json"
    names = json.loads(path.read_text())
    write_json(path, [{**names[0], "file_name": "a" * 300 + ".jpg"}, *names])
    first, *others = load_dataset("hicodet", tmp_path, "train").samples
    assert not first.exists() and all(sample.exists() for sample in others)


def test_a_folder_takes_what_pillow_opens(tmp_path: Path) -> None:
    photographs(tmp_path / "a/b", 2)
    (tmp_path / "link").symlink_to(tmp_path / "a")  # the same directory: entered once
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "no_extension").write_bytes((tmp_path / "a/b/photo_0000.jpg").read_bytes())
    (tmp_path / "damaged.PNG").write_bytes(b"not a png")
    (tmp_path / "._photo.jpg").write_bytes(b"a resource fork")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/x.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "film.mpg").write_bytes(b"\x00\x00\x01\xb3" + bytes(100))
    keys = [sample.key for sample in load_dataset("folder", tmp_path).samples]
    assert keys == ["a/b/photo_0000.jpg", "a/b/photo_0001.jpg", "damaged.PNG", "no_extension"]


def test_a_link_takes_no_keys_of_a_directory(tmp_path: Path) -> None:
    photographs(tmp_path / "images/run2/deep", 1)
    photographs(tmp_path / "elsewhere", 1)
    (tmp_path / "images/latest").symlink_to("run2")  # sorts before it
    (tmp_path / "images/a").symlink_to("run2/deep")
    (tmp_path / "images/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    keys = [sample.key for sample in load_dataset("folder", tmp_path / "images").samples]
    assert keys == ["other/photo_0000.jpg", "run2/deep/photo_0000.jpg"]


def test_directories_that_cannot_be_listed(tmp_path: Path, tiny_weights: Path) -> None:
    """In a process that cannot override permissions, as a superuser can."""
    unprivileged = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if unprivileged and not shutil.which("setpriv"):
        pytest.skip("a superuser may enter everything, and there is no setpriv here")
    images = tmp_path / "images"
    names = [*photographs(images, 2), *(f"{place}/photo_0000.jpg" for place in ("closed", "names_only"))]
    for place in ("closed", "names_only"):
        photographs(images / place, 1)
    run = ("extract", "folder", images, "--out", tmp_path / "bank", "--model", "tiny", "--weights", tiny_weights)
    verify = "verify", tmp_path / "bank", "--images", images

    def unprivileged_run(*arguments: object, closed: Path) -> subprocess.CompletedProcess[str]:
        closed.chmod(0)
        (images / "names_only").chmod(0o444)
        try:
            return subprocess.run([*unprivileged, *command(*arguments)], cwd=REPOSITORY, capture_output=True, text=True)
        finally:
            closed.chmod(0o755)
            (images / "names_only").chmod(0o755)

    done = unprivileged_run(*run, closed=images / "closed")
    assert done.returncode == 1, done.stderr
    assert f"{images / 'closed'}: cannot be listed: Permission denied" in done.stdout
    assert f"{images / 'names_only'}: cannot be read: Permission denied" in done.stdout
    assert [*open_bank(tmp_path / "bank")] == names[:2]
    done = unprivileged_run(*verify, closed=images / "closed")
    assert done.returncode == 2
    assert f"{images / 'closed'} cannot be listed: Permission denied" in done.stderr
    done = unprivileged_run(*run, closed=images)
    assert done.returncode == 2
    assert f"{images} cannot be listed: Permission denied" in done.stderr
    patchbank(*run, check=0)
    assert {*open_bank(tmp_path / "bank")} == {*names}


def test_what_a_folder_leaves_out_is_counted(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 2)
    for name in ("a.svg", "b.SVG", "deep/notes.txt", "README", ".hidden", "e.1", "e.2", "e.3", "e.4"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_text("words")
    done = patchbank(
        *("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank"),
        *("--model", "tiny", "--weights", tiny_weights),
        check=0,
    )
    [kinds] = re.findall("note: 8 files are not read as images: (.*)\\.", done.stderr)
    assert kinds.startswith(".svg 2, ") and kinds.endswith(", others 2")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.heic").write_bytes(b"words")
    if ".heic" not in image_extensions():
        with pytest.raises(DatasetError, match=r"1 file is passed over .*: \.heic 1\. .*pip install pillow-heif"):
            load_dataset("folder", tmp_path / "none")


def test_an_objects_name_that_is_no_path_fails_alone(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("upath")
    fsspec.filesystem("memory").pipe({f"/names{tmp_path}/{name}": b"content" for name in ("a.jpg", "b//c.jpg", "d.md")})
    url = f"memory://names{tmp_path}"
    dataset = load_dataset("folder", url)
    assert [sample.key for sample in dataset.samples] == ["a.jpg"]
    assert dataset.damaged == {f"{url}/b//c.jpg": "its name is not a plain relative path"}
    assert dataset.passed_over == {".md": 1}


@pytest.mark.timeout(60)
def test_a_link_to_a_pipe_is_no_image(tmp_path: Path) -> None:
    names = photographs(tmp_path / "images", 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "images/link").symlink_to(tmp_path / "pipe")
    assert [sample.key for sample in load_dataset("folder", tmp_path / "images").samples] == names


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no images"):
        load_dataset("folder", tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        load_dataset("folder", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file_name", "listed"),
    [("instances_test2015.json", 9658), ("instances_vcoco_trainval.json", 5400), ("instances_vcoco_test.json", 4946)],
)
def test_the_fields_real_files(file_name: str, listed: int) -> None:
    path = ANNOTATIONS / file_name
    if not path.exists():
        pytest.skip(f"{file_name} is not here: set PATCHBANK_ANNOTATIONS to a directory that has it")
    names = read_file_names(path)
    assert len(names) == len(set(names)) == listed
    assert all(name.endswith(".jpg") for name in names)


def test_a_dataset_is_a_sequence_of_samples(tmp_path: Path) -> None:
    photographs(tmp_path / "images", 5)
    dataset = load_dataset("folder", tmp_path / "images")
    assert [sample.key for sample in dataset] == [f"photo_000{number}.jpg" for number in range(5)]
    assert dataset[-1].key == "photo_0004.jpg" and dataset[0] in dataset and len(dataset[1:3]) == 2
    assert "photo_0003.jpg" in dataset and "photo_0003.jpg" not in dataset[:3]
    with pytest.raises(DatasetError, match="folder has no images"):
        extract(dataset[:0], tmp_path / "bank")
    assert repr(dataset[1:3]) == f"<Dataset folder: 2 images in {tmp_path / 'images'}>"
    assert dataset[1:3].samples == dataset.samples[1:3]
    annotated = load_dataset("hicodet", hico_root(tmp_path / "root", 4), "train")
    assert annotated[2:].target(annotated[2].key).key == annotated[2].key
