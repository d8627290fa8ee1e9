"""Data files of every kind, data sets of the hub, and what is said of those that cannot be read."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openqwen.recipe.artifact import outside_source
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import dataset_files, pinned
from openqwen.support.records import read_records
from openqwen.tokenizer.messages import demonstration

RECORDS = [
    {
        "messages": [{"role": "user", "content": "é 2+2?"}, {"role": "assistant", "content": "4"}],
        "tools": "[]",
    },
    {
        "messages": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 2}}}],
            }
        ]
    },
]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif ".json." in f"{path.name}.":
        path.write_text(json.dumps(records, indent=1))
    else:
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet"])
def test_files_of_every_kind_give_the_same_records(tmp_path, name):
    path = write(tmp_path / name, RECORDS)
    assert list(read_records(path)) == [
        (f"{path}, record {n}", record) for n, record in enumerate(RECORDS, 1)
    ]


def test_lines_may_bear_the_ending_of_a_list(tmp_path):
    path = write(tmp_path / "d.jsonl", RECORDS).rename(tmp_path / "d.json")
    assert [record for _, record in read_records(path)] == RECORDS


def test_a_column_of_structs_keeps_what_each_row_has(tmp_path):
    """As pandas and `datasets` write it: one struct for all rows, null where one has no field."""
    calls = [
        {"name": "f", "arguments": {"a": 2, "b": None}},
        {"name": "g", "arguments": {"a": None, "b": [1.5, 2.5]}},
    ]
    rows = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": c}]}]}
        for c in calls
    ]
    types = pa.map_(pa.string(), pa.string())
    table = pa.Table.from_pylist(rows).append_column("meta", pa.array([[("k", "v")], None], types))
    pq.write_table(table, tmp_path / "d.parquet")
    (_, first), (_, second) = read_records(tmp_path / "d.parquet")
    assert first["meta"] == {"k": "v"}
    assert "meta" not in second
    arguments = [
        demonstration(r)[0][0]["tool_calls"][0]["function"]["arguments"] for r in (first, second)
    ]
    assert arguments == [{"a": 2}, {"b": [1.5, 2.5]}]


LINES = {
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "thousands of digits"),
    "levels": (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "100 levels"),
    "fewer levels": (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "100 levels"),
    "surrogate": (rb'{"a": ["\ud83d"]}', "lone surrogate"),
    "key": (rb'{"\udfff": 1}', "lone surrogate"),
    "nan": (b'{"a": NaN}', "nan is not a number"),
    "infinity": (b'{"a": [-Infinity]}', "inf is not a number"),
    "too large": (b'{"a": 1e999}', "inf is not a number"),
    "not UTF-8": (b'{"a": "\xe9"}', "byte 0xe9 at 7 is not UTF-8"),
    "cut": (b'{"a": "b', "not JSON"),
    "list": (b'["a"]', "not an object"),
}


@pytest.mark.parametrize(("line", "told"), LINES.values(), ids=LINES)
def test_a_line_that_is_no_record_is_named(tmp_path, line, told):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"ok": 1}\n' + line + b"\n")
    with pytest.raises(OpenQwenError, match=told) as caught:
        list(read_records(path))
    assert (str(caught.value.where), caught.value.do) == (f"{path}:2", "write one object per line")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("d.json", b'[{"a": 1},', "not JSON"),
        ("d.json", b'[{"a": 1}, 2]', "not an object(.|\n)*record 2"),
        ("d.json", b"[" * 5000, "100 levels"),
        ("d.parquet", b"PAR1 no", "Parquet file cannot be read"),
        ("d.jsonl.gz", b"no", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OpenQwenError, match=told) as caught:
        list(read_records(tmp_path / name))
    assert str(caught.value.where).startswith(str(tmp_path / name))


def test_what_is_no_file_is_said(tmp_path):
    for path, told in ((tmp_path, "is a folder"), (tmp_path / "no.jsonl", "does not exist")):
        with pytest.raises(OpenQwenError, match=told):
            list(read_records(path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Make a data set in a cache as `hf download` leaves it; nothing is reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def make(name, files, card=""):
        repository = tmp_path / f"datasets--{name.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        for number, file in enumerate(files):
            write(folder / file, [{"prompt": f"{number}"}])
        (folder / "README.md").write_text(card)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return folder

    return make


def names(folder, source):
    return [path.relative_to(folder).as_posix() for path in dataset_files(source)]


def test_splits_of_the_hub_by_their_files(hub):
    shards = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    folder = hub("a/b", [*shards, "data/test_sft-00000-of-00001.parquet"])
    assert (
        names(folder, "hub:a/b")
        == names(folder, "hub:a/b:train")
        == names(folder, "hub:a/b@main:train")
        == shards
    )
    assert names(folder, "hub:a/b:test_sft") == ["data/test_sft-00000-of-00001.parquet"]
    assert [record for _, record in read_records("hub:a/b")] == [{"prompt": "0"}, {"prompt": "1"}]
    assert [record for _, record in read_records(Path("hub:a/b:test_sft"))] == [{"prompt": "2"}]
    commit = pinned("hub:a/b")
    assert commit == f"hub:a/b@{folder.name}:train"
    assert names(folder, commit) == shards
    with pytest.raises(OpenQwenError, match=r"no split 'tset'(.|\n)*Did you mean 'test_sft'"):
        dataset_files("hub:a/b:tset")
    folder = hub("a/c", ["eval_set.jsonl", "my_train.jsonl", "my-dev.jsonl"])
    splits = {split: names(folder, f"hub:a/c:{split}") for split in ("train", "test", "validation")}
    assert splits == {
        "train": ["my_train.jsonl"],
        "test": ["eval_set.jsonl"],
        "validation": ["my-dev.jsonl"],
    }
    folder = hub("a/d", ["alpaca.json"])
    assert names(folder, "hub:a/d") == ["alpaca.json"]


def test_a_stage_depends_on_the_content_of_a_split_and_reads_its_commit(hub):
    folder = hub("a/b", ["train.jsonl", "test.jsonl"])
    before, other = (outside_source(Path(f"hub:a/b{split}"), "prompts") for split in ("", ":test"))
    assert str(before.path) == before.entry.stage == f"hub:a/b@{folder.name}:train"
    write(folder / "test.jsonl", RECORDS)
    assert outside_source(Path("hub:a/b:train"), "prompts").entry == before.entry
    assert outside_source(Path("hub:a/b:test"), "prompts").entry != other.entry


CARD = """---
license: mit
configs:
- config_name: {name}
  data_files:
  - split: train
    path: some/*.jsonl
  - split: held
    path: [x.jsonl, y.jsonl]
- config_name: other
  data_files: "*.jsonl"
---
words
"""


def test_splits_of_the_hub_by_the_card(hub):
    files = ["some/1.jsonl", "some/2.jsonl", "x.jsonl", "y.jsonl"]
    folder = hub("a/b", files, CARD.format(name="default"))
    assert names(folder, "hub:a/b") == ["some/1.jsonl", "some/2.jsonl"]
    assert names(folder, "hub:a/b:held") == ["x.jsonl", "y.jsonl"]
    hub("a/c", files, CARD.format(name="main"))
    with pytest.raises(OpenQwenError, match="several configurations: main, other"):
        dataset_files("hub:a/c")
    for number, card in enumerate(
        ["---\nconfigs: 4\n---", "---\n: [\n---", "no header", "---\n---"]
    ):
        folder = hub(f"a/d{number}", ["some.jsonl"], card)
        assert names(folder, f"hub:a/d{number}") == ["some.jsonl"]


def test_what_the_hub_cannot_give_is_said(hub):
    hub("a/b", [])
    for source, told in (
        ("hub:a/other:train", r"no data set 'a/other' here(.|\n)*HF_HUB_OFFLINE"),
        ("hub:a", "not the name of a data set(.|\n)*hub:owner/name"),
        ("hub:a/b", "no split 'train'"),
    ):
        with pytest.raises(OpenQwenError, match=told):
            list(read_records(source))
