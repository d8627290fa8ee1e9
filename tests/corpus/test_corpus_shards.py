"""Token shards: round trip with a tokenizer of bytes, and every kind of damage."""

import json

import numpy as np
import pytest

from openqwen.corpus.documents import count_documents, read_documents, write_documents
from openqwen.corpus.shards import TokenShard, write_shards
from openqwen.support.errors import OpenQwenError

TEXTS = [("code", "x = 1"), ("docs", "naïve"), ("code", "y"), ("docs", ""), ("docs", "z" * 9)]
DOCUMENTS = [
    {"id": f"{source}/{i}", "text": text, "source": source, "language": "en", "meta": {"n": i}}
    for i, (source, text) in enumerate(TEXTS)
]


class Bytes:
    """Ids are bytes plus 100,000, so that they need more than 16 bits."""

    endoftext_id = 151_643

    def encode(self, text):
        return [100_000 + byte for byte in text.encode()]

    def encode_batch(self, texts):
        parts = [np.array(self.encode(text), dtype=np.uint32) for text in texts]
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


@pytest.fixture
def shards(tmp_path):
    write_documents(tmp_path / "train.parquet", DOCUMENTS)
    table = write_shards(tmp_path / "train.parquet", Bytes(), tmp_path / "tokens")
    return tmp_path / "tokens", table


def test_documents_come_back(tmp_path):
    assert (
        write_documents(tmp_path / "d.parquet", DOCUMENTS)
        == 5
        == count_documents(tmp_path / "d.parquet")
    )
    assert list(read_documents(tmp_path / "d.parquet")) == DOCUMENTS
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    for read in (count_documents, lambda path: list(read_documents(path))):
        with pytest.raises(OpenQwenError, match=r"d\.parquet"):
            read(tmp_path / "d.parquet")


def test_round_trip(shards):
    folder, table = shards
    assert table == json.loads((folder / "tokens.json").read_text())
    assert table["docs"] == {"tokens": 6 + 0 + 9 + 3, "documents": 3, "bytes": 15}
    for source in ("code", "docs"):
        shard = TokenShard(folder, source, verify=True)
        texts = [d["text"] for d in DOCUMENTS if d["source"] == source]
        assert len(shard) == len(texts)
        assert shard.lengths.tolist() == [len(text.encode()) + 1 for text in texts]
        for number, text in enumerate(texts):
            assert shard.document(number).tolist() == [*Bytes().encode(text), Bytes.endoftext_id]
        with pytest.raises(IndexError):
            shard.document(len(texts))
    assert np.fromfile(folder / "code.bin", dtype="<u4")[0] == 100_000 + ord("x")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("docs.bin", truncate),
        ("docs.bin", flip),
        ("docs.bin", lambda p: p.unlink()),
        ("docs.offsets.npy", truncate),
        ("docs.offsets.npy", lambda p: np.save(p, np.array([0, 5, 3, 18]))),
        ("docs.offsets.npy", lambda p: np.save(p, np.array([0, 5, 7, 18]))),
        ("docs.offsets.npy", lambda p: p.unlink()),
        ("docs.json", truncate),
        ("docs.json", lambda p: p.write_text("[]")),
        ("docs.json", lambda p: p.unlink()),
    ],
)
def test_damage_is_named(shards, name, damage):
    folder, _ = shards
    damage(folder / name)
    with pytest.raises(OpenQwenError, match=name.replace(".", r"\.")):
        TokenShard(folder, "docs", verify=True)
