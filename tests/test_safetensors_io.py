"""safetensors files: the same bytes as the reference library writes, mapped reading, damage told in one line."""

import json
import os
import stat
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from messages import mentioning
from running import script

from library.errors import RunError
from library.files import write_atomically
from library.safetensors_io import (
    TensorFile,
    file_hashes,
    load_tensors,
    network_hashes,
    read_header,
    write_safetensors,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 4),
        "a.half": torch.randn(5).half(),
        "a.bf16": torch.randn(2, 2).bfloat16(),
        "whole": torch.arange(6).view(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "transposed": torch.randn(3, 5).t(),
    }


def test_the_file_is_byte_equal_to_the_reference_librarys(tensors, tmp_path):
    metadata = {"key": 'ü "quoted"\n'}
    write_safetensors(tmp_path / "ours", tensors, metadata)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "theirs",
        metadata,
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("mapped", [True, False])
def test_tensors_come_back_as_they_were(tensors, tmp_path, mapped):
    write_safetensors(tmp_path / "x", tensors, {})
    file = TensorFile(tmp_path / "x", mapped=mapped)
    for name, tensor in tensors.items():
        assert file[name].dtype == tensor.dtype and file[name].shape == tensor.shape
        assert torch.equal(
            file[name].view(torch.uint8) if name == "fp8" else file[name],
            tensor.view(torch.uint8) if name == "fp8" else tensor,
        )


def test_changing_a_mapped_tensor_never_reaches_the_file(tensors, tmp_path):
    write_safetensors(tmp_path / "x", tensors, {})
    before = (tmp_path / "x").read_bytes()
    TensorFile(tmp_path / "x")["b"].fill_(0)
    assert (tmp_path / "x").read_bytes() == before


def test_replacing_the_file_doesnt_change_what_was_opened(tensors, tmp_path):
    write_safetensors(tmp_path / "x", tensors, {})
    file = TensorFile(tmp_path / "x")
    write_safetensors(tmp_path / "x", {"b": torch.zeros(3, 4)}, {})
    assert torch.equal(file["b"], tensors["b"])


def test_dtypes_can_be_chosen_for_each_tensor(tensors, tmp_path):
    write_safetensors(
        tmp_path / "x",
        tensors,
        {},
        dtype_of=lambda name, tensor: "float16" if tensor.is_floating_point() else None,
    )
    stored = read_header(tmp_path / "x").tensors
    assert stored["b"].dtype == "F16" and stored["whole"].dtype == "I64"


def _mutations(raw: bytes) -> dict[str, bytes]:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def with_header(changed: object) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return {
        "empty": b"",
        "shorter than its length field": raw[:5],
        "cut in the header": raw[: 8 + length // 2],
        "cut in the data": raw[:-7],
        "followed by more": raw + b"x",
        "huge header": (1 << 60).to_bytes(8, "little") + raw[8:],
        "no JSON": raw[:8] + b"\xff" * length + raw[8 + length :],
        "unknown dtype": with_header({**header, name: {**header[name], "dtype": "F7"}}),
        "shape of another size": with_header({**header, name: {**header[name], "shape": [99]}}),
        "metadata that is no text": with_header({**header, "__metadata__": {"a": 1}}),
        "a list": with_header([1]),
    }


@pytest.mark.parametrize("kind", list(_mutations(safetensors.torch.save({"t": torch.zeros(4)}))))
def test_fault_15_a_damaged_file_is_one_line_with_its_path(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(_mutations(safetensors.torch.save({"t": torch.zeros(4)}, {"m": "x"}))[kind])
    with pytest.raises(RunError) as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_headers_are_read_without_torch_and_without_mapping_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.zeros(2).bfloat16(),
        "b": torch.zeros(3, dtype=torch.float8_e5m2),
        "c": torch.zeros(0, 4),
    }
    write_safetensors(path, tensors, {"k": "v"})
    program = """
        import sys
        from pathlib import Path
        from library.safetensors_io import read_header
        header = read_header(Path(PATH))
        stored = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        assert stored == {"a": ("BF16", (2,)), "b": ("F8_E5M2", (3,)), "c": ("F32", (0, 4))}
        assert header.metadata == {"k": "v"}
        assert "torch" not in sys.modules
        maps = Path("/proc/self/maps")
        assert not maps.exists() or "model.safetensors" not in maps.read_text()
        print("fine")
    """.replace("PATH", repr(str(path)))
    done = script("-c", textwrap.dedent(program))
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


@pytest.mark.parametrize("spaces", range(8))
def test_tensors_at_odd_positions_are_read(spaces, tmp_path):
    """Other programs don't pad their headers."""
    path = tmp_path / "x"
    header = (
        json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        + b" " * spaces
    )
    path.write_bytes(
        len(header).to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes()
    )
    tensor = TensorFile(path)["t"]
    assert tensor.tolist() == [1.0, 2.0] and tensor.data_ptr() % 4 == 0


def test_fault_15_a_cut_file_is_told_with_both_sizes(tmp_path):
    path = tmp_path / "model.safetensors"
    raw = safetensors.torch.save({"t": torch.zeros(1000)})
    path.write_bytes(raw[:-100])
    with pytest.raises(RunError, match=mentioning(path, f"{len(raw):,}", f"{len(raw) - 100:,}")):
        read_header(path)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 90_000_000,
        json.dumps([[[[]]]] * 1000),
        "../../etc/passwd",
        "<script>alert(1)</script>",
    ],
)
def test_fault_23_hostile_metadata_is_only_text(value, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"t": torch.zeros(2)}, {"ss_output_name": value})
    assert read_header(path).metadata["ss_output_name"] == value


def test_fault_23_nesting_without_end_in_the_header_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    text = b"[" * 1_000_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(RunError, match="invalid JSON"):
        read_header(path)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=mentioning(path, "No space left on device")):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_the_umask_decides_who_may_read_a_file(tensors, tmp_path):
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "x", tensors, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["lora_unet", "lora_te"])
def test_network_hashes_are_the_references(name):
    tensors, metadata = load_tensors(GOLDEN / "10_training" / f"{name}.out.safetensors")
    assert network_hashes(tensors, metadata) == (
        metadata["sshs_model_hash"],
        metadata["sshs_legacy_hash"],
    )


def test_the_legacy_hash_is_of_64_kib_at_1_mib_of_the_file_without_other_metadata(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(300_000), "b": torch.randn(7)}
    safetensors.torch.save_file(tensors, tmp_path / "x", {"ss_a": "1"})
    assert (
        network_hashes(tensors, {"ss_a": "1", "modelspec.title": "left out"})[1]
        == file_hashes(tmp_path / "x")[1]
    )


def test_the_golden_model_has_the_golden_hashes(golden_model):
    whole, legacy = file_hashes(golden_model)
    assert whole.startswith("b6f5f3ac65d25136") and legacy == "618d43f5"
