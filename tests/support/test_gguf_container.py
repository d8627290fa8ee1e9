"""The GGUF container: what is written is read back, by others too; whatever is broken is named and
never believed.
"""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import _UNREAD, BLOCKS, TYPES, NewTensor, read_header, write_gguf

METADATA = {
    "general.architecture": "qwen2",
    "a.count": 7,
    "a.rate": 0.5,
    "a.yes": True,
    "a.no": False,
    "a.signed": np.int64(-3),
    "a.big": np.uint64(2**63),
    "a.double": np.float64(1e-300),
    "a.texts": ["Ġä", "", "<|im_end|>"],
    "a.types": np.array([1, 3, 4], np.int32),
    "a.floats": np.array([0.5, -2.0], np.float32),
    "a.flags": np.array([True, False, True]),
}
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def tensors():
    return [
        NewTensor(
            "blk.0.ffn_up.weight",
            (3, 4),
            "F32",
            lambda: [VALUES[:1].tobytes(), VALUES[1:].tobytes()],
        ),
        NewTensor("one", (5,), "F16", lambda: [np.ones(5, np.float16).tobytes()]),
        NewTensor("blocks", (2, 32), "Q8_0", lambda: [bytes(range(68))]),
    ]


@pytest.fixture
def path(tmp_path):
    write_gguf(tmp_path / "x.gguf", METADATA, tensors())
    return tmp_path / "x.gguf"


def test_what_is_written_is_read_back(path):
    header = read_header(path)
    assert list(header.metadata) == list(METADATA)
    for key, value in METADATA.items():
        assert np.array_equal(header.metadata[key], value), key
        assert isinstance(header.metadata[key], (bool, int, float, str, list, np.ndarray)), key
    assert header.metadata["a.yes"] is True
    data = path.read_bytes()
    assert [t.shape for t in header.tensors.values()] == [(3, 4), (5,), (2, 32)]
    assert [t.type for t in header.tensors.values()] == ["F32", "F16", "Q8_0"]
    assert all(t.offset % 32 == 0 for t in header.tensors.values())
    first = header.tensors["blk.0.ffn_up.weight"]
    assert data[first.offset : first.offset + first.size] == VALUES.tobytes()
    last = header.tensors["blocks"]
    assert data[last.offset : last.offset + last.size] == bytes(range(68))


def test_the_reference_reader_agrees(path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        assert np.array_equal(reader.get_field(key).contents(), value), key
    assert [t.name for t in reader.tensors] == [t.name for t in tensors()]
    assert np.array_equal(reader.tensors[0].data, VALUES)
    header = read_header(path)
    for tensor in reader.tensors:
        assert header.tensors[tensor.name].offset == tensor.data_offset
        assert header.tensors[tensor.name].size == tensor.n_bytes


def test_the_reference_writer_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "qwen2")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "ü"])
    writer.add_array("numbers", [1, 2])
    writer.add_bool("flag", True)
    writer.add_tensor("x", VALUES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "y.gguf")
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "ü"]
    assert header.metadata["numbers"].tolist() == [1, 2]
    assert header.metadata["flag"] is True
    assert header.tensors["x"].shape == (3, 4)
    assert header.tensors["x"].offset % 64 == 0


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    end = max(t.offset + t.size for t in read_header(path).tensors.values())
    for size in [*range(0, end, 7), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(OpenQwenError):
            read_header(path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_byte_may_be_wrong_without_a_crash(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    write_gguf(path, METADATA, tensors())
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 127, 255]))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except OpenQwenError:
        return
    assert all(t.offset + t.size <= len(raw) for t in header.tensors.values())


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def directory(shape, kind=0, offset=0):
    return (
        struct.pack("<Q", 1)
        + b"t"
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    )


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (struct.pack("<IQQ", 3, 0, 2**60), "metadata entries"),
        (struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
        (struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "inside a key"),
        (struct.pack("<IQQ", 3, 0, 1) + entry(b"k", 9, struct.pack("<IQ", 4, 2**61)), "claims"),
        (struct.pack("<IQQ", 3, 0, 1) + entry(b"k", 9, struct.pack("<IQ", 8, 2**61)), "claims"),
        (struct.pack("<IQQ", 3, 0, 1) + entry(b"k", 9, struct.pack("<IQ", 9, 1)), "unknown type 9"),
        (struct.pack("<IQQ", 3, 0, 1) + entry(b"k", 77, b""), "unknown type 77"),
        (
            struct.pack("<IQQ", 3, 0, 1) + entry(b"k", 8, struct.pack("<Q", 1) + b"\xff"),
            "not UTF-8",
        ),
        (struct.pack("<IQQ", 3, 0, 2) + entry(b"k", 0, b"1") * 2, "occurs twice"),
        (
            struct.pack("<IQQ", 3, 0, 1) + entry(b"general.alignment", 4, struct.pack("<I", 24)),
            "power of two",
        ),
        (struct.pack("<IQQ", 3, 1, 0) + directory((1,) * 5), "5 dimensions"),
        (struct.pack("<IQQ", 3, 1, 0) + directory((2**40, 2**40)), "inside the tensor 't'"),
        (struct.pack("<IQQ", 3, 1, 0) + directory((4,), offset=2**50), "inside the tensor 't'"),
        (struct.pack("<IQQ", 3, 1, 0) + directory((4,), offset=3), "multiple of 32"),
        (struct.pack("<IQQ", 3, 1, 0) + directory((33,), kind=8), "cannot hold"),
        (struct.pack("<IQQ", 3, 2, 0) + directory((1,)) * 2, "occurs twice"),
    ],
)
def test_absurd_headers_are_refused(tmp_path, body, told):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + body + bytes(16))
    with pytest.raises(OpenQwenError, match=told):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize(("kind", "name"), [(15, "Q8_K"), (28, "F64"), (99, "type 99")])
def test_a_type_that_is_not_read_does_not_hide_the_metadata(tmp_path, kind, name):
    body = struct.pack("<IQQ", 3, 1, 1) + entry(b"k", 0, b"\1") + directory((256,), kind=kind)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + body + bytes(64))
    header = read_header(tmp_path / "x.gguf")
    assert header.metadata == {"k": 1}
    assert header.tensors["t"].type == name
    assert header.tensors["t"].size == 0


def test_every_type_that_the_reference_unpacks_is_known_and_every_other_has_its_name():
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    sizes = gguf.constants.GGML_QUANT_SIZES
    unpacked = {kind.name for kind in gguf.quants._type_traits}
    assert set(BLOCKS) == unpacked | {"F32", "F16"}
    for number, (name, weights, size) in TYPES.items():
        assert sizes[gguf.GGMLQuantizationType[name]] == (weights, size)
        assert gguf.GGMLQuantizationType(number).name == name
    assert {kind.value: kind.name for kind in sizes if kind.name not in BLOCKS} == _UNREAD


def test_what_is_no_gguf_is_said(tmp_path):
    with pytest.raises(OpenQwenError, match="no such file"):
        read_header(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK" + bytes(40))
    with pytest.raises(OpenQwenError, match="not a GGUF file"):
        read_header(tmp_path / "x.gguf")
    with pytest.raises(OpenQwenError, match="cannot be read"):
        read_header(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(OpenQwenError, match="damaged: it ends at byte 8"):
        read_header(tmp_path / "x.gguf")


def test_a_failed_write_leaves_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="one gave 2 bytes, not 10"):
        write_gguf(path, {}, [NewTensor("one", (5,), "F16", lambda: [b"no"])])
    assert path.read_bytes() == before
