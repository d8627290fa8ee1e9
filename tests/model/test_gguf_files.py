"""Every block format and every way in which a GGUF file can be given."""

import shutil
import struct

import gguf
import numpy as np
import pytest
import torch

from openqwen import cli, load_model, load_tokenizer, save_checkpoint
from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.model.gguf import save_gguf
from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import NewTensor, read_header, write_gguf
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.gguf import gguf_metadata
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER

WORDS = Tokenizer([*BYTES_IN_ID_ORDER, b"th", b"the"], [(83, 71), (256, 68)])
TEXT = "the other"
KINDS = [kind.name for kind in gguf.quants._type_traits]


def network(width=64):
    model = Qwen2(ModelConfig(288, width, 256, 1, 4, 2, tie_word_embeddings=True))
    initialize(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def file(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.gguf"
    save_gguf(network(), path, "F32", "tiny", gguf_metadata(WORDS, 288, WORDS.eos_id))
    return path


def is_read(source):
    """The network and the tokenizer of `file` come from this source."""
    expected = network().state_dict()
    state = load_model(source).state_dict()
    assert load_tokenizer(source).encode(TEXT) == WORDS.encode(TEXT)
    assert state.keys() == expected.keys()
    return all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_that_the_reference_unpacks_is_loaded(kind, tmp_path):
    """The file is the reference's writer's; its matrices are random blocks."""
    model, draw = network(256), np.random.default_rng(0)
    save_gguf(model, tmp_path / "plain.gguf", "F32", "tiny", {})
    plain = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    for key, field in plain.fields.items():
        if key.startswith("qwen2."):
            writer.add_key_value(key, field.contents(), field.types[0])
    quantity, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    expected = {}
    for tensor in plain.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if len(shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        data = draw.integers(0, 120, (shape[0], shape[1] // quantity * size), dtype=np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        expected[tensor.name] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_model(tmp_path / "x.gguf")
    layer = loaded.model.layers[0]
    found = {
        "token_embd.weight": loaded.model.embed_tokens.weight,
        "blk.0.attn_k.weight": layer.self_attn.k_proj.weight,
        "blk.0.ffn_down.weight": layer.mlp.down_proj.weight,
    }
    for name, weight in found.items():
        assert np.isfinite(expected[name]).all()
        np.testing.assert_array_equal(weight.detach().numpy(), expected[name])


@pytest.mark.parametrize(("number", "name"), [(15, "Q8_K"), (26, "I32"), (99, "type 99")])
def test_a_type_that_the_reference_cannot_unpack_is_named(file, number, name):
    raw = bytearray(file.read_bytes())
    entry = raw.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight")
    raw[entry + 4 + 16 : entry + 4 + 16 + 4] = struct.pack("<I", number)
    file.write_bytes(raw)
    with pytest.raises(OpenQwenError, match=f"'blk.0.ffn_up.weight' is stored as {name}"):
        load_model(file)


@pytest.mark.parametrize("name", ["model", "sha256-0123", "x.GGUF", "x.bin", "x.json"])
def test_a_file_of_any_name_is_known_by_its_first_bytes(name, file):
    other = file.rename(file.with_name(name))
    assert is_read(other)


def test_a_folder_with_one_file_is_that_file(file):
    assert is_read(file.parent)
    (file.parent / "config.json").write_text('{"model_type": "qwen2"}')  # published beside it
    assert is_read(file.parent)


def test_every_command_takes_every_form(file, tmp_path, capsys):
    bare = shutil.copy(file, tmp_path / "bare")
    for source in (file, file.parent, bare):
        for number, command in enumerate((["convert"], ["quantize", "--to", "int8"])):
            target = tmp_path / "out" / f"{source.name}{number}"
            status = cli.main([command[0], str(source), str(target), *command[1:]])
            assert status == 0, capsys.readouterr()
    assert is_read(tmp_path / "out" / "in0")


def test_weights_in_safetensors_come_first(file):
    save_checkpoint(network(), WORDS, file.parent)
    file.write_bytes(b"GGUF, but damaged")
    assert is_read(file.parent)


def test_a_folder_with_several_files_lists_them(file):
    shutil.copy(file, file.with_name("y.gguf"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(OpenQwenError, match=r"2 models: x\.gguf, y\.gguf"):
            load(file.parent)


def split(file, count=2, **first):
    """The file as a model in several, and their paths."""
    header, raw = read_header(file), file.read_bytes()
    tensors = [
        NewTensor(name, t.shape, t.type, lambda t=t: [raw[t.offset :][: t.size]])
        for name, t in header.tensors.items()
    ]
    paths = [file.with_name(f"x-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for number, path in enumerate(paths):
        metadata = {"split.no": np.uint16(number), "split.count": np.uint16(count)}
        if number == 0:
            metadata = {**header.metadata, **metadata, **first}
        write_gguf(path, metadata, tensors[number::count])
    file.unlink()
    return paths


@pytest.mark.parametrize("count", [2, 3])
def test_a_model_in_several_files_is_read_whole(file, count):
    first = split(file, count)[0]
    assert is_read(first)
    assert is_read(first.parent)


def test_parts_that_do_not_stand_alone_are_named(file):
    first, second = split(file)
    for load in (load_model, load_tokenizer):
        with pytest.raises(OpenQwenError, match="one of 2 files of a model, and not the first"):
            load(second)
    renamed = first.rename(first.with_name("model"))
    with pytest.raises(OpenQwenError, match=r"one of 2 files .*name does not say which"):
        load_model(renamed)
    with pytest.raises(OpenQwenError, match="one of 2 files of a model, and not the first"):
        load_model(second.parent)
    renamed.rename(first)
    second.unlink()
    with pytest.raises(OpenQwenError, match="no such file") as caught:
        load_model(first)
    assert caught.value.where == second


def test_an_odd_count_of_files_is_damage(file):
    with pytest.raises(OpenQwenError, match=r"split\.count is 'two'"):
        load_model(split(file, **{"split.count": "two"})[0])


def test_files_of_other_kinds_are_told_apart(file):
    raw = file.read_bytes()
    for changed, told in (
        (raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian"),
        (raw[:4] + struct.pack("<I", 9) + raw[8:], "version 9"),
        (raw[:10], "damaged: it ends at byte 10"),
        (raw[: len(raw) // 2], "damaged: it ends at byte"),
    ):
        for name in ("x.gguf", "bare"):
            path = file.with_name(name)
            path.write_bytes(changed)
            with pytest.raises(OpenQwenError, match=told):
                load_model(path)
            path.unlink()
    file.write_bytes(b"version https://git-lfs")
    with pytest.raises(OpenQwenError, match="not a GGUF file"):
        load_model(file)
