"""One tensor, one pickle: torch's structure, reproducible bytes, its own storage; and nothing hostile runs."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchbank.bank.pickling import pickle_bytes, read_own, to_pickle
from patchbank.bank.unpickling import read_pickle
from patchbank.errors import BankError
from tests.third_party import BEYOND_TWELVE_NUMBERS, Call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dumped(tensor: Tensor) -> bytes:
    return b"".join(to_pickle(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(196, 512), (3, 5), (1, 1)])
def test_any_torch_unpickles_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape).to(dtype)
    content = dumped(tensor)
    found = pickle.loads(content)
    assert type(found) is Tensor
    assert torch.equal(found, tensor)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert found.device.type == "cpu"
    assert found.untyped_storage().nbytes() == tensor.nbytes
    assert len(content) == pickle_bytes(shape, dtype)


def test_it_is_what_pickle_dumps_writes_except_the_address() -> None:
    """The opcodes and arguments are torch's; only the storage's key differs."""
    tensor = torch.randn(7, 3)

    def structure(content: bytes) -> list[tuple[str, object]]:
        found = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(content)]
        return [item for item in found if item[0] not in ("FRAME", "BINBYTES", "SHORT_BINBYTES")]

    def payload(content: bytes) -> bytes:
        [found] = [argument for opcode, argument, _ in pickletools.genops(content) if "BINBYTES" in opcode.name]
        return re.sub(rb"X.{4}\d+q", b"KEYq", found, flags=re.DOTALL)

    ours, torchs = dumped(tensor), pickle.dumps(tensor, protocol=4)
    assert structure(ours) == structure(torchs)
    assert payload(ours) == payload(torchs)


def test_a_slice_is_written_without_the_rest_of_its_batch() -> None:
    batch = torch.randn(32, 197, 512)
    assert len(pickle.dumps(batch[3, 1:])) > 12_000_000  # what the original scripts' batched variant writes
    content = dumped(batch[3, 1:])
    assert 401_408 < len(content) < 402_000
    assert torch.equal(pickle.loads(content), batch[3, 1:])


def test_two_processes_write_the_same_bytes() -> None:
    program = (
        "import sys, torch; from patchbank.bank.pickling import to_pickle;"
        "junk = [torch.zeros(int(sys.argv[1]))];"
        "sys.stdout.buffer.write(b''.join(to_pickle(torch.arange(600.).view(20, 30))))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", program, size], capture_output=True, check=True).stdout
        for size in ("10", "100000")
    )
    assert first == second == dumped(torch.arange(600.0).view(20, 30))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 4).to(dtype)
    path = tmp_path / "a_clip.pkl"
    path.write_bytes(dumped(tensor))
    own = read_own(str(path), (5, 4), dtype)
    assert own is not None
    assert own.base is None and own.nbytes == tensor.nbytes
    assert torch.equal(torch.from_numpy(own).view(dtype).view(5, 4), tensor)
    assert torch.equal(read_pickle(path), tensor)
    assert read_own(str(path), (4, 5), dtype) is None
    path.write_bytes(dumped(tensor)[:-1])
    assert read_own(str(path), (5, 4), dtype) is None


def test_the_original_scripts_pickles_are_read_too(tmp_path: Path) -> None:
    tokens = torch.randn(1, 17, 8).squeeze(0)[1:]
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(tokens))
    assert torch.equal(read_pickle(tmp_path / "a_clip.pkl"), tokens)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "a_clip.pkl", tmp_path / "trace"
    nested = Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, str(trace))))
    for value in (Call(os.mkdir, str(trace)), [Call(exec, f"import os; os.mkdir({str(trace)!r})")], nested):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(BankError, match="is not the pickle of a tensor"):
            read_pickle(path)
        assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it ends early"),
        (pickle.dumps(torch.zeros(9))[:-200], "it ends early"),
        (b"\x80\x04B\xff\x00\x00\x00few", "it ends early"),
        (b"no pickle", "its bytes are not a pickle's"),
    ],
)
def test_damaged_bytes_have_a_reason_in_plain_words(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a_clip.pkl").write_bytes(content)
    with pytest.raises(BankError, match=reason):
        read_pickle(tmp_path / "a_clip.pkl")


def _rebuild(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    storage = torch.arange(12.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return Call(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, None)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [*BEYOND_TWELVE_NUMBERS, (b"\x03\x04", (4, 1), 0), ((0, 4), (4, 1), 0)],
)
def test_a_tensor_cannot_reach_beyond_its_storage(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    path = tmp_path / "a_clip.pkl"
    path.write_bytes(pickle.dumps(_rebuild((3, 4), (4, 1))))
    assert torch.equal(read_pickle(path), torch.arange(12.0).view(3, 4))
    path.write_bytes(pickle.dumps(_rebuild(size, stride, offset)))
    with pytest.raises(BankError, match="is not the pickle of a tensor"):
        read_pickle(path)


def test_a_pickle_cannot_change_the_functions_it_calls(tmp_path: Path) -> None:
    path = tmp_path / "a_clip.pkl"
    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
        state = pickle.dumps((None, {"__defaults__": ({"neg": True},)}), protocol=2)[2:-1]
        path.write_bytes(b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + state + b"b.")
        with pytest.raises(BankError):
            read_pickle(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    path.write_bytes(dumped(torch.ones(2, 2)))
    assert torch.equal(read_pickle(path), torch.ones(2, 2))


def test_a_cuda_tensors_pickle_is_read_on_the_cpu(tmp_path: Path) -> None:
    """As the original scripts write on a GPU. The tag is inserted by hand, so that the test needs no GPU."""
    tokens = torch.randn(3, 4)
    [payload] = [argument for opcode, argument, _ in pickletools.genops(dumped(tokens)) if "BINBYTES" in opcode.name]
    tagged = payload.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert tagged != payload
    storage = Call(torch.storage._load_from_bytes, tagged)
    path = tmp_path / "a_clip.pkl"
    path.write_bytes(pickle.dumps(Call(torch._utils._rebuild_tensor_v2, storage, 0, (3, 4), (4, 1), False, None)))
    found = read_pickle(path)
    assert found.device.type == "cpu"
    assert torch.equal(found, tokens)


def test_texts_do_not_multiply(tmp_path: Path) -> None:
    """Protocol 2 makes bytes of texts; one text that is used often must not become many times the file."""
    text = b"X" + (1_000_000).to_bytes(4, "little") + b"x" * 1_000_000
    arguments = text + b"X\x06\x00\x00\x00latin1\x86q\x01"
    calls = b"c_codecs\nencode\nq\x00" + arguments + b"R" + b"h\x00h\x01R" * 20
    (tmp_path / "a_clip.pkl").write_bytes(b"\x80\x02" + calls + b".")
    with pytest.raises(BankError, match="makes more bytes of its texts"):
        read_pickle(tmp_path / "a_clip.pkl")


def test_distant_memo_positions_are_refused(tmp_path: Path) -> None:
    """Python's unpickler allocates memory for all lower positions."""
    (tmp_path / "a_clip.pkl").write_bytes(b"\x80\x02Nr" + (1 << 28).to_bytes(4, "little") + b".")
    with pytest.raises(BankError, match="keeps values where"):
        read_pickle(tmp_path / "a_clip.pkl")


def test_a_short_file_that_announces_much_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a_clip.pkl"
    path.write_bytes(b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.")
    with pytest.raises(BankError):
        read_pickle(path)


def test_damage_is_a_bank_error(tmp_path: Path) -> None:
    path = tmp_path / "a_clip.pkl"
    whole = dumped(torch.randn(64, 64))
    for length in [*range(0, len(whole), 1000), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BankError):
            read_pickle(path)
    path.write_bytes(pickle.dumps("text"))
    with pytest.raises(BankError, match="holds a str"):
        read_pickle(path)
    with pytest.raises(BankError, match="cannot be read"):
        read_pickle(tmp_path / "nowhere_clip.pkl")
