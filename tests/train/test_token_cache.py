"""The cache of tokens: it says what the tokenizer says, is used again, and is never trusted blindly."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from test_parallel import start
from token_caches import (
    READERS,
    demonstrations,
    preferences,
    preferences_of,
    read,
    samples_of,
    tokenizer,
    turn,
    write,
)

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl
from openqwen.support.records import count_records
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import encode_demonstration, encode_preference
from openqwen.train.preferences import group_by_prompt

RANKS = Path(__file__).with_name("encode_ranks.py")


def made_at(scratch):
    """When the cache was written."""
    return (scratch / "demonstrations" / "index.json").stat().st_mtime_ns


def test_samples_are_those_of_the_tokenizer_in_the_order_of_the_file(tmp_path):
    source = demonstrations(tmp_path / "d.jsonl", 20)
    samples, records, _ = samples_of(source, tmp_path / "scratch")
    expected = [encode_demonstration(tokenizer(), record, "") for record in read_jsonl(source)]
    assert samples == [[ids, [bool(m) for m in mask]] for ids, mask in expected]
    assert records == list(range(1, 21))


def test_preferences_are_grouped_as_without_a_cache(tmp_path):
    source = preferences(tmp_path / "p.jsonl", 23)
    groups, counts, sizes, answers = preferences_of(source, tmp_path / "scratch")
    cool = [r for r in read_jsonl(source) if r["origin"]["temperature"] <= 1]
    expected = group_by_prompt(encode_preference(tokenizer(), record, "") for record in cool)
    assert groups == [[g.prompt, g.answers, [list(p) for p in g.pairs]] for g in expected]
    assert sizes == [group.size for group in expected]
    assert answers == [len(group.answers) for group in expected]
    assert (counts["too_hot"], counts["prompts"]) == (23 - len(cool), len(expected))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what each of two ranks read."""
    folder = tmp_path_factory.mktemp("ranks")
    demonstrations(folder / "sft.jsonl", 21)
    preferences(folder / "dpo.jsonl", 21)
    good = {"messages": turn("user", "Say 1.") + turn("assistant", "one")}
    bad = {"messages": turn("user", "Say 1.")}
    write(folder / "bad.jsonl", [good, good, good, bad, bad, good])
    start(2, RANKS, folder)
    return folder


@pytest.mark.parametrize("kind", READERS)
def test_two_ranks_encode_what_one_process_encodes(two_ranks, tmp_path, kind):
    source = two_ranks / f"{kind}.jsonl"
    one = json.loads(json.dumps(READERS[kind](source, tmp_path)))
    assert one[0]
    for rank in range(2):
        assert json.loads((two_ranks / f"{kind}-{rank}.json").read_text()) == one
    # Each rank encoded its own records, once; here one process reads the files of two.
    tables = [np.load(path) for path in sorted((two_ranks / kind).glob("*/*.samples.npy"))]
    assert [set(table[:, 0] % 2) for table in tables] == [{1}, {0}]
    made = (next((two_ranks / kind).iterdir()) / "index.json").stat().st_mtime_ns
    assert json.loads(json.dumps(READERS[kind](source, two_ranks / kind))) == one
    assert (next((two_ranks / kind).iterdir()) / "index.json").stat().st_mtime_ns == made


def test_every_rank_raises_the_error_of_the_first_bad_record(two_ranks):
    for rank in range(2):
        assert "record 4" in json.loads((two_ranks / f"bad-{rank}.json").read_text())
    assert not (two_ranks / "bad" / "demonstrations").exists()


def test_a_cache_is_used_again_until_data_template_or_tokenizer_change(tmp_path):
    source, scratch = demonstrations(tmp_path / "d.jsonl", 5), tmp_path / "scratch"
    first = read(source, scratch).samples()
    made = made_at(scratch)
    os.utime(source)
    assert len(read(source, scratch)) == 5
    assert made_at(scratch) == made
    demonstrations(source, 6)
    assert len(read(source, scratch)) == 6
    plain = tokenizer()
    template = plain.template.replace("<|im_start|>", "<|im_start|> ")
    other = Tokenizer(plain.vocabulary, plain.merges, plain.control, template)
    changed = read(source, scratch, other).samples()
    assert len(changed[0][0]) > len(first[0][0])
    fewer = Tokenizer(plain.vocabulary[:260], [], plain.control, plain.template)
    assert len(read(source, scratch, fewer).samples()[0][0]) > len(first[0][0])
    made = made_at(scratch)
    read(source, scratch, fewer)
    assert made_at(scratch) == made


@pytest.mark.parametrize("name", ["0.tokens", "0.samples.npy", "index.json"])
@pytest.mark.parametrize("fault", ["flipped", "short", "gone"])
def test_a_damaged_cache_is_named_and_made_anew(tmp_path, capfd, name, fault):
    source, scratch = demonstrations(tmp_path / "d.jsonl", 5), tmp_path / "scratch"
    expected = samples_of(source, scratch)
    path = scratch / "demonstrations" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] if fault == "short" else bytes([raw[0] ^ 1]) + raw[1:])
    if fault == "gone":
        path.unlink()
    capfd.readouterr()
    assert samples_of(source, scratch) == expected
    assert f"damaged ({name})" in capfd.readouterr().err
    assert path.read_bytes()[:1] == raw[:1]
    assert samples_of(source, scratch) == expected
    assert not capfd.readouterr().err


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from openqwen.train import sft
    from token_caches import read
    real, calls = sft.encode_demonstration, []
    def encode(*given):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    sft.encode_demonstration = encode
    read(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_an_interrupted_cache_is_made_anew(tmp_path):
    source, scratch = demonstrations(tmp_path / "d.jsonl", 9), tmp_path / "scratch"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), source, scratch]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert [path.name for path in scratch.iterdir()] == [".demonstrations.aside"]
    assert len(read(source, scratch)) == 9
    assert [path.name for path in scratch.iterdir()] == ["demonstrations"]


def test_no_records_are_named(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(OpenQwenError, match="no records"):
        read(tmp_path / "d.jsonl", tmp_path / "scratch")


def test_records_are_counted_where_that_is_cheap(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    assert count_records(path) == 3
    path = tmp_path / "d.json"
    path.write_text('[{"a": 1}]')
    assert count_records(path) is None


MEMORY = """
    import sys, tracemalloc
    from pathlib import Path
    from token_caches import read, tokenizer
    source, scratch, made_with = Path(sys.argv[1]), Path(sys.argv[2]), tokenizer()
    read(Path(sys.argv[3]), scratch, made_with)  # what is loaded once
    tracemalloc.start()
    data = read(source, scratch, made_with)
    data[len(data) - 1]
    print(tracemalloc.get_traced_memory()[1] / data.lengths.sum())
"""


@pytest.mark.parametrize("count", [5_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_grows_with_conversations_and_not_with_tokens(tmp_path, count):
    """Two Python lists took 26 bytes a token here, where ids are small, and 44 elsewhere."""
    source = demonstrations(tmp_path / "d.jsonl", count)
    few = demonstrations(tmp_path / "few.jsonl", 10)
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), source, tmp_path / "scratch", few]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 6
