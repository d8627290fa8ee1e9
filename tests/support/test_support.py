"""Files that are whole or absent, named generators, errors with a place and a next step."""

import errno
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from openqwen.support.device import best_device, tf32
from openqwen.support.errors import OpenQwenError, disk_errors, suggestion
from openqwen.support.files import read_json, read_jsonl, write_jsonl, write_text
from openqwen.support.generators import Generators
from openqwen.support.gguf import read_header
from openqwen.support.progress import Progress, duration
from openqwen.support.records import read_records
from openqwen.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer


def test_generators_are_independent_and_restore_exactly():
    generators = Generators(3)
    first = generators["a"].random(5)
    state = json.loads(json.dumps(generators.state()))
    generators["b"].random(100)
    later = generators["a"].integers(0, 10**9, 7)
    restored = Generators(0)
    restored.restore(state)
    assert np.array_equal(restored["a"].integers(0, 10**9, 7), later)
    assert np.array_equal(Generators(3)["a"].random(5), first)
    assert not np.array_equal(Generators(4)["a"].random(5), first)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_round_trip_keeps_line_separators_inside_strings(tmp_path, suffix):
    records = [{"text": "a\u0085b\u2028c"}, {"text": "d"}]
    plain = tmp_path / "x.jsonl"
    assert write_jsonl(plain, records) == 2
    path = tmp_path / f"y.jsonl{suffix}"
    with pa.output_stream(
        str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(suffix)
    ) as stream:
        stream.write(plain.read_bytes())
    assert list(read_jsonl(path)) == records
    if suffix:
        torn = tmp_path / f"z.jsonl{suffix}"
        torn.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(OpenQwenError, match="cannot be read"):
            list(read_jsonl(torn))


@pytest.mark.parametrize(
    ("line", "told"), [(b'{"a": 1', "not JSON"), (b"[1]", "not an object"), (b"\xff", "not JSON")]
)
def test_a_bad_line_is_named(tmp_path, line, told):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"ok": 1}\n\n' + line + b"\n")
    with pytest.raises(OpenQwenError, match=told) as caught:
        list(read_jsonl(path))
    assert "x.jsonl:3" in str(caught.value)


@pytest.mark.parametrize(
    "read", [read_json, lambda path: list(read_jsonl(path)), read_header, load_tokenizer]
)
def test_a_pointer_of_git_lfs_is_told_from_damage(tmp_path, read):
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n")
    with pytest.raises(OpenQwenError, match="git-lfs pointer") as error:
        read(path)
    assert error.value.where == path
    (tmp_path / "merges.txt").write_bytes(path.read_bytes())
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(OpenQwenError, match="git-lfs pointer"):
        load_tokenizer(tmp_path / "merges.txt")
    records = tmp_path / "records.parquet"
    records.write_bytes(path.read_bytes())
    with pytest.raises(OpenQwenError, match="git-lfs pointer"):
        next(read_records(records))


def test_a_template_that_is_a_pointer_of_git_lfs_is_told(tmp_path):
    train_tokenizer(["abc"], TokenizerConfig(vocabulary=300)).save(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "chat_template.jinja").write_text(pointer)
    with pytest.raises(OpenQwenError, match="git-lfs pointer"):
        load_tokenizer(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_a_full_disk_is_said_and_other_errors_pass(tmp_path):
    with pytest.raises(OpenQwenError, match="no space left"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OpenQwenError, match="no space left"), disk_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_words():
    assert suggestion("lerning_rate", ["learning_rate", "beta"]) == " Did you mean 'learning_rate'?"
    assert suggestion("qqq", ["learning_rate"]) == ""
    assert [duration(s) for s in (7.4, 61, 3 * 3600 + 240)] == ["7s", "1m01s", "3h04m"]


def test_float32_on_a_gpu_is_float32_until_it_is_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == torch.device("cuda")
    precision = torch.get_float32_matmul_precision
    assert precision() == "highest"
    with tf32(True):
        assert precision() == "high"
        with tf32(False):
            assert precision() == "highest"
        assert precision() == "high"
    assert precision() == "highest"


def test_what_was_done_before_does_not_count_for_the_rate(monkeypatch):
    monkeypatch.setattr("openqwen.support.progress.time.monotonic", lambda: 0.0)
    work = Progress("work", 100, "steps")
    work.skip(50)
    work.advance(10)
    assert "40s left" in work._line(10.0).plain
