"""Archives against torch's own readers; and hostile files, which run code, read elsewhere or fill the memory."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patchbank.encoders.archive import Archive
from patchbank.encoders.openai.untrained import untrained_state
from patchbank.errors import WeightsError
from tests.support import TINY, TINY_VOCABULARY
from tests.third_party import BEYOND_TWELVE_NUMBERS, Call


def read(path: Path) -> dict[str, Tensor]:
    with Archive(path) as archive:
        return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].stride() == value.stride() or not value.numel(), name
        value = value.detach()
        assert found[name].contiguous().view(-1).numpy().tobytes() == value.contiguous().view(-1).numpy().tobytes(), (
            name
        )


def scripted(path: Path) -> dict[str, Tensor]:
    return dict(torch.jit.load(path, map_location="cpu").state_dict())


class Part(nn.Module):
    """Every kind of attribute that a TorchScript module can have, and most kinds of views."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(6, 4)
        self.upper, self.lower = nn.Parameter(both[:3]), nn.Parameter(both[3:].t())
        self.register_parameter("none", None)
        self.register_buffer("steps", torch.arange(7)[1::2])
        self.register_buffer("unsaved", torch.ones(2, dtype=torch.bool), persistent=False)
        self.register_buffer("small", torch.randn(3).double())
        self.register_buffer("empty", torch.zeros(0, 5))
        self.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))
        self.plain, self.several, self.by_name = torch.ones(4), [torch.ones(1)], {"a": torch.ones(2)}
        self.whole, self.fractions, self.text, self.pair = [1, 2], [1.5], "text", (1, 2.0)
        self.maybe: torch.Tensor | None = torch.zeros(1)
        self.device = torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.plain.sum() + self.several[0] + self.by_name["a"].sum() + self.whole[0] + self.pair[1]
        return x + self.fractions[0] + len(self.text) + self.steps.sum()


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Part()
        self.again = self.first
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Conv2d(3, 2, 2, bias=False).half())

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


def test_what_torch_jit_load_gives(tmp_path: Path, tiny_weights: Path, full_size_weights: Path) -> None:
    torch.jit.save(torch.jit.script(Whole()), tmp_path / "scripted.pt")
    traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16(), torch.ones(2, 4).bfloat16())
    torch.jit.save(traced, tmp_path / "traced.pt")
    expected = scripted(tmp_path / "scripted.pt")
    assert "again.lower" in expected and "first.unsaved" in expected and "first.plain" not in expected
    for path in (tmp_path / "scripted.pt", tiny_weights, full_size_weights):
        assert_same(read(path), scripted(path))
    found, expected = read(tmp_path / "traced.pt"), scripted(tmp_path / "traced.pt")
    assert_same({n: v.float() for n, v in found.items()}, {n: v.float() for n, v in expected.items()})
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_what_torch_load_gives(tmp_path: Path, options: dict[str, object]) -> None:
    both = torch.randn(6, 4)
    state = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).state_dict()  # an OrderedDict with `_metadata`
    state |= {"upper": both[:3], "lower": nn.Parameter(both[3:].t()), "half": both.half()}
    path = tmp_path / "state.pt"
    torch.save(state, path, **options)
    assert_same(read(path), torch.load(path, weights_only=False))
    assert read(path)["upper"].untyped_storage().data_ptr() != both.untyped_storage().data_ptr()
    for key in ("state_dict", "model", "model_state_dict"):
        torch.save(
            {"epoch": 3, "lr": 0.1, "shape": torch.Size([3]), "optimizer": {0: both}, key: state}, path, **options
        )
        assert_same(read(path), torch.load(path, weights_only=False)[key])


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, each in content.items():
            archive.writestr(name, each)
    return path


def test_tensors_of_a_gpu_are_read_on_the_cpu(tmp_path: Path, tiny_weights: Path) -> None:
    content = entries(tiny_weights)
    pickled = content["tiny-weights/data.pkl"]
    tagged = pickled.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert tagged != pickled
    path = write(tmp_path / "cuda.pt", content | {"tiny-weights/data.pkl": tagged})
    assert_same(read(path), scripted(tiny_weights))


def test_a_pickle_that_names_other_functions(tmp_path: Path, tiny_weights: Path) -> None:
    trace = tmp_path / "trace"
    program = f"__import__('os').mkdir({str(trace)!r})"
    hostile = [
        pickle.dumps({"visual.proj": Call(os.system, f"mkdir {trace}")}),
        pickle.dumps({"visual.proj": Call(eval, program)}, protocol=2),
        pickle.dumps([{Call(exec, program)}], protocol=4),
        pickle.dumps({"visual.proj": Call(getattr, Call, "mro")}),
        b"(S'" + program.encode() + b"'\ni__builtin__\neval\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__cos\nsystem\nsb.",
    ]
    content = entries(tiny_weights)
    for pickled in hostile:
        for path, name in (
            (tmp_path / "archive.pt", "tiny-weights/data.pkl"),
            (tmp_path / "state.pt", "archive/data.pkl"),
            (tmp_path / "legacy.pt", ""),
        ):
            if name:
                write(path, (content if "tiny" in name else {}) | {name: pickled})
            else:
                path.write_bytes(pickled)
            with pytest.raises(WeightsError, match=r"read safely: it names .*nothing was run.*state dict"):
                read(path)
            assert not trace.exists()
    pickle.loads(hostile[1])
    assert trace.exists()  # torch itself runs them


class Restoring(nn.Module):
    """Its code makes a file when torch loads it."""

    def __init__(self, trace: str) -> None:
        super().__init__()
        self.trace = trace
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return self.trace, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        self.trace, self.weight, self.training = state
        self.weight = torch.from_file(self.trace, shared=True, size=4)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_code_that_torch_runs_on_loading_is_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "restoring.pt"
    torch.jit.save(torch.jit.script(Restoring(str(trace))), path)
    trace.unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="restores itself by code of its own, which is not run"):
        read(path)
    assert not trace.exists()
    torch.jit.load(path)
    assert trace.exists()


def test_code_is_read_as_text(tmp_path: Path, tiny_weights: Path) -> None:
    trace, content = tmp_path / "trace", entries(tiny_weights)
    for name in [name for name in content if name.endswith(".py")]:
        content[name] = f"__import__('os').mkdir({str(trace)!r})\n".encode() + content[name]
    assert_same(read(write(tmp_path / "code.pt", content)), scripted(tiny_weights))
    assert not trace.exists()
    for name in [name for name in content if name.endswith(".py")]:
        del content[name]
    with pytest.raises(WeightsError, match="lacks code/"):
        read(write(tmp_path / "code.pt", content))


class _Storage:
    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Pickler(pickle._Pickler):  # the pure Python one takes a class as part of a persistent id
    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", value.numel) if isinstance(value, _Storage) else None


def state_of(path: Path, *arguments: object, numbers: bytes = bytes(48)) -> Path:
    """A state dict of one tensor, rebuilt with these arguments."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump({"a": Call(torch._utils._rebuild_tensor_v2, *arguments, False, None)})
    return write(path, {"x/data.pkl": stream.getvalue(), "x/data/0": numbers, "x/byteorder": b"little"})


@pytest.mark.parametrize(("size", "stride", "offset"), BEYOND_TWELVE_NUMBERS)
def test_a_tensor_cannot_reach_beyond_its_storage(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    numbers = torch.arange(12.0)
    path = state_of(tmp_path / "a.pt", _Storage(12), 0, (4, 3), (1, 4), numbers=numbers.numpy().tobytes())
    assert torch.equal(read(path)["a"], numbers.view(3, 4).t())
    with pytest.raises(WeightsError, match="cannot be read"):
        read(state_of(tmp_path / "a.pt", _Storage(12), offset, size, stride))


@pytest.mark.parametrize("numel", [11, 13, 1 << 40, -1, 1 << 70, True])
def test_a_storage_has_the_bytes_it_says(tmp_path: Path, numel: int) -> None:
    with pytest.raises(WeightsError, match=r"does not have the .* bytes|impossible size|larger than its storage"):
        read(state_of(tmp_path / "a.pt", _Storage(numel), 0, (1,), (1,)))


def test_a_legacy_file_that_says_something_else_of_its_storages(tmp_path: Path) -> None:
    path = tmp_path / "legacy.pt"
    torch.save({"a": torch.arange(12.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert whole.count(struct.pack("<q", 12)) == 1
    for content in (whole[:-4], whole + b"more", whole.replace(struct.pack("<q", 12), struct.pack("<q", 1 << 40))):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="cannot be read"):
            read(path)


def zipped(name: str, path: Path) -> Path:
    """A state dict's archive with one thing wrong."""
    torch.save({"a": torch.arange(256.0)}, path)
    content = entries(path)
    top = next(iter(content)).partition("/")[0]
    storage = f"{top}/data/0"
    match name:
        case "missing storage":
            del content[storage]
        case "missing pickle":
            del content[f"{top}/data.pkl"]
        case "absolute":
            content["/etc/passwd"] = b"x"
        case "leading out":
            content[f"{top}/../../x"] = b"x"
        case "two directories":
            content["other/data.pkl"] = content[f"{top}/data.pkl"]
        case "big-endian":
            content[f"{top}/byteorder"] = b"big"
    write(path, content, zipfile.ZIP_DEFLATED if name == "compressed" else zipfile.ZIP_STORED)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = whole[archive.start_dir :]
        info = archive.getinfo(storage) if name != "missing storage" else archive.infolist()[0]
    place = directory.index(info.filename.encode()) - 46  # of the storage, in the directory
    changed = bytearray(directory)
    match name:
        case "two of one name":
            with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
                archive.writestr(storage, bytes(1024))
            return path
        case "overlapping":
            struct.pack_into("<I", changed, place + 42, info.header_offset - 20)
        case "declared larger":
            struct.pack_into("<II", changed, place + 20, 0xFFFFFFF0, 0xFFFFFFF0)
        case "encrypted":
            struct.pack_into("<H", changed, place + 8, 1)
        case "truncated":
            whole = whole[:-30]
            changed = bytearray(whole[-100:])
            directory = bytes(changed)
    path.write_bytes(whole.replace(directory, bytes(changed)))
    return path


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("missing storage", "lacks data/0"),
        ("missing pickle", "lacks data.pkl"),
        ("absolute", "an entry '/etc/passwd'"),
        ("leading out", "has an entry"),
        ("two directories", "has an entry"),
        ("big-endian", "little-endian"),
        ("compressed", "does not have the 1,024 bytes"),
        ("two of one name", "two entries of one name"),
        ("overlapping", "overlap"),
        ("declared larger", "overlap"),
        ("encrypted", "encrypted"),
        ("truncated", "cannot be read"),
    ],
)
def test_zips_with_something_wrong(tmp_path: Path, name: str, word: str) -> None:
    assert torch.equal(read(zipped("nothing", tmp_path / "fine.pt"))["a"], torch.arange(256.0))
    with pytest.raises(WeightsError, match=word):
        read(zipped(name, tmp_path / "file.pt"))


def test_small_files_that_would_fill_the_memory(tmp_path: Path) -> None:
    """Each would take gigabytes, or for ever."""
    name = b"X\x01\x00\x00\x00a"
    tuples = b"\x80\x02)" + b"q\x00h\x00\x86" * 60  # (((), ()), ((), ())) ... : 2^60 to hash
    keyed = tuples.replace(b"\x80\x02", b"\x80\x02}", 1) + b"Ns."
    module = b"c__torch__\nM\n)\x81"
    inside = b"\x80\x02" + module + b"q\x00}" + name + b"h\x00sb."
    many = b"\x80\x02" + module + b"q\x00"
    for _ in range(40):  # each has the one before it twice
        many += module + b"}(" + name + b"h\x00" + b"X\x01\x00\x00\x00bh\x00ub" + b"q\x00"
    many += b"."
    wide = (
        b"\x80\x02" + module + b"}(" + b"".join(b"X\x04\x00\x00\x00%04dN" % each for each in range(2000)) + b"ubq\x00"
    )
    for _ in range(10):  # 2^10 ways lead to one module of 2,000 attributes
        wide += module + b"}(" + name + b"h\x00" + b"X\x01\x00\x00\x00bh\x00ub" + b"q\x00"
    wide += b"."
    far = b"\x80\x02Nr\xff\xff\xff\xff."
    code = {"x/code/__torch__.py": b"class M(Module):\n  __parameters__ = []\n"}
    path = tmp_path / "file.pt"
    for pickled, word in (
        (inside, "contain each other"),
        (many, "contain each other"),
        (wide, "contain each other"),
        (far, "keeps values where"),
    ):
        with pytest.raises(WeightsError, match=word):
            read(write(path, {"x/data.pkl": pickled, **code}))
    assert read(write(path, {"x/data.pkl": keyed})) == {}  # no such key is kept
    with pytest.raises(WeightsError, match="larger than any checkpoint's"):
        read(write(path, {"x/data.pkl": b"\x80\x02" + b"]" * (9 << 20) + b"."}, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 20_000
    path.write_bytes(b"\x80\x02" + b"]" * (9 << 20) + b".")
    with pytest.raises(WeightsError, match="longer than any"):
        read(path)


def test_a_directory_larger_than_any_checkpoints(tmp_path: Path) -> None:
    path = write(tmp_path / "file.pt", {"x/data.pkl": b"\x80\x02}.", **{f"x/{n:065000}": b"" for n in range(140)}})
    with pytest.raises(WeightsError, match="directory is larger"):
        read(path)


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    others = [torch.eye(3).to_sparse(), quantised, torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64)]
    for value in others:
        torch.save({"a": torch.ones(1), "b": value}, tmp_path / "state.pt")
        with pytest.raises(
            WeightsError,
            match=r"cannot be read as a checkpoint: (b is a .*, not a dense|it holds a torch\.\w+Storage, not)",
        ):
            read(tmp_path / "state.pt")
    negative = torch._neg_view(torch.ones(3))
    torch.save({"a": negative}, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match="negative view"):
        read(tmp_path / "state.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "state.pt")
    with pytest.raises(WeightsError, match=r"names torch\.nn\.modules\.linear\.Linear.*state dict"):
        read(tmp_path / "state.pt")


@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_flipped_bytes_give_an_error_or_the_right_tensors(tmp_path: Path, tiny_weights: Path, form: str) -> None:
    path, flip = tmp_path / "flipped.pt", random.Random(0)
    if form == "archive":
        whole, expected = tiny_weights.read_bytes(), scripted(tiny_weights)
    else:
        expected = untrained_state(TINY, vocabulary=TINY_VOCABULARY)
        torch.save(expected, path)
        whole = path.read_bytes()
    with zipfile.ZipFile(path if form == "state dict" else tiny_weights) as archive:
        described = archive.start_dir
        [pickled] = [info.header_offset for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    refused = 0
    for number in range(400):
        damaged = bytearray(whole)
        # Anywhere; in the pickle; in the directory.
        place = flip.randrange(
            (0, pickled, described)[number % 3], (len(whole), pickled + 5000, len(whole))[number % 3]
        )
        damaged[place] ^= 1 << flip.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read(path)
        except WeightsError:
            refused += 1
        else:
            assert_same(found, expected)
    assert 200 < refused < 400
