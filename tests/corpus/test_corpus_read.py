"""The reader on a folder of every bad input: each one a counted skip with its place, never a
traceback.
"""

import errno
import gzip
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openqwen.corpus import read, streams
from openqwen.corpus.installation import InstallationReader
from openqwen.corpus.read import FolderReader, html_text
from openqwen.corpus.streams import mend
from openqwen.support.errors import OpenQwenError

LIMIT = 11_000


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.fixture
def reader(tmp_path):
    return FolderReader(tmp_path, LIMIT)


def skipped(reader):
    return {
        (reason, example["file"], example["line"])
        for reason, entry in reader.skips.reasons.items()
        for example in entry["examples"]
    }


def test_good_documents_of_every_type(tmp_path, reader):
    (tmp_path / "books/deep").mkdir(parents=True)
    (tmp_path / "books/deep/a.txt").write_bytes(b"\xef\xbb\xbfWith a byte-order mark")
    (tmp_path / "note.md").write_text("# Title")
    (tmp_path / "README").write_text("no suffix")
    (tmp_path / "prog.py").write_text("x = 1")
    (tmp_path / "page.html").write_text(
        "<html><head><script>var x</script></head><body><main><p>Fish &amp; "
        "chips</p></main></body></html>"
    )
    # U+2028 and U+0085 are not line ends in JSONL.
    (tmp_path / "d.jsonl").write_text(
        '{"text": "one\u2028still\x85one", "id": 7}\n\n{"text": "two", "language": "en"}'
    )
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    frame = zstd(b'{"text": "frame"}\n')
    (tmp_path / "d.jsonl.zst").write_bytes(frame + frame)
    pq.write_table(pa.table({"text": ["row", None], "other": [1, 2]}), tmp_path / "d.parquet")
    documents = {d["id"]: d for d in reader}
    assert {name: d["text"] for name, d in documents.items()} == {
        "README": "no suffix",
        "books/deep/a.txt": "With a byte-order mark",
        "d.jsonl#1": "one\u2028still\x85one",
        "d.jsonl#3": "two",
        "d.jsonl.gz#1": "packed",
        "d.jsonl.zst#1": "frame",
        "d.jsonl.zst#2": "frame",
        "d.parquet#1": "row",
        "note.md": "# Title",
        "page.html": "Fish & chips",
        "prog.py": "x = 1",
    }
    assert [documents[k]["source"] for k in ("books/deep/a.txt", "note.md")] == [
        "books",
        "documents",
    ]
    assert [documents[k]["meta"]["profile"] for k in ("note.md", "page.html", "prog.py")] == [
        "text",
        "web",
        "code",
    ]
    assert documents["d.jsonl#1"]["meta"]["id"] == "7"
    assert documents["d.jsonl#3"]["language"] == "en"
    assert skipped(reader) == {("no text", "d.parquet", 2)}
    assert reader.files == 9


def test_every_bad_input_is_counted_with_its_place(tmp_path, reader):
    (tmp_path / "binary.txt").write_bytes(b"PK\x03\x04\0\0")
    (tmp_path / "noise.txt").write_bytes(bytes(range(1, 32)) + b"\x81\x8d\xff" * 20)
    (tmp_path / "long.txt").write_text("x" * (LIMIT + 1))
    (tmp_path / "blank.md").write_text(" \n")
    (tmp_path / "deep.html").write_text("<div>" * 2001)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    deep = "[" * 100_000
    lines = [
        '{"text": "good"}',
        "{not json",
        '{"title": "no text"}',
        '"a string"',
        '{"text": 3}',
        '{"text": "' + "x" * LIMIT + '"}',
        '{"text": "\\ud800"}',
        '{"text": ""}',
        '{"text": "after all that"}',
    ]
    (tmp_path / "bad.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}')
    (tmp_path / "deep.jsonl").write_text(deep[: LIMIT - 1])
    (tmp_path / "digits.jsonl").write_text('{"text": ' + "1" * 9000 + "}")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(os.urandom(9000))[:5000])
    (tmp_path / "torn.jsonl.zst").write_bytes(zstd(os.urandom(9000))[:5000])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "columns.parquet")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert [d["text"] for d in reader] == ["good", "after all that"]
    reader.skips.reasons["no text"]["examples"] = reader.skips.reasons["no text"]["examples"][:1]
    expected = {
        ("binary file", "binary.txt", None),
        ("invalid UTF-8", "noise.txt", 2),
        ("invalid UTF-8", "bad.jsonl", 10),
        ("too long", "long.txt", None),
        ("too long", "bad.jsonl", 6),
        ("empty", "blank.md", None),
        ("nested too deeply", "deep.html", None),
        ("empty", "bad.jsonl", 8),
        ("unknown file type", "photo.png", None),
        ("not JSON", "bad.jsonl", 2),
        ("not JSON", "deep.jsonl", 1),
        ("not JSON", "digits.jsonl", 1),
        ("no text", "bad.jsonl", 3),
        ("invalid Unicode", "bad.jsonl", 7),
        ("damaged file", "torn.jsonl.gz", None),
        ("damaged file", "torn.jsonl.zst", None),
        ("damaged file", "torn.parquet", None),
        ("folder linked again", "loop", None),
        ("broken link", "gone.txt", None),
        ("not a regular file", "pipe.txt", None),
    }
    assert skipped(reader) == expected
    assert reader.skips.reasons["no text"]["count"] == 4


def test_a_hundred_megabyte_line_costs_neither_memory_nor_the_rest(tmp_path):
    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    reader = FolderReader(tmp_path, 1_000_000)
    tracemalloc.start()
    assert [d["text"] for d in reader] == ["after"]
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert skipped(reader) == {("too long", "huge.jsonl", 1)}


def test_files_and_folders_that_may_not_be_read(tmp_path, reader, monkeypatch):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "closed").mkdir()

    def denied(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(read, "open_bounded", denied)
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda p: denied() if Path(p).name == "closed" else scandir(p)
    )
    assert list(reader) == []
    assert skipped(reader) == {
        ("unreadable file", "secret.txt", None),
        ("unreadable folder", "closed", None),
    }


def test_file_names_that_are_not_utf8_give_ids_that_are(tmp_path, reader):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    (document,) = reader
    assert document["id"] == "caf\\xe9.txt"
    json.dumps(document, ensure_ascii=False).encode()


def test_a_missing_folder_and_a_file_are_errors(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file.txt"):
        with pytest.raises(OpenQwenError, match="folder"):
            FolderReader(path, LIMIT)


def test_html_keeps_the_article_and_drops_the_rest():
    article = "<article><h1>Tides</h1><p>Twice a day.</p></article>"
    text = html_text(f"<body><nav><a href=/>Home</a></nav>{article}<footer>© us</footer></body>")
    assert "Twice a day." in text
    assert "Home" not in text
    assert "<" not in text


PAGE = "<html><body><main><p>Fish &amp; chips</p></main></body></html>"


def warc(pages):
    """A web archive, each record packed alone, as crawlers write them."""
    packed = b""
    for number, (head, body) in enumerate(pages):
        lines = [
            "WARC/1.0",
            "WARC-Type: response",
            f"WARC-Record-ID: <urn:uuid:{number}>",
            f"WARC-Target-URI: http://example.org/{number}",
            "WARC-Date: 2024-05-06T07:08:09Z",
            "Content-Type: application/http; msgtype=response",
            f"Content-Length: {len(head) + len(body)}",
        ]
        record = "\r\n".join(lines).encode() + b"\r\n\r\n" + head + body + b"\r\n\r\n"
        packed += gzip.compress(record)
    return packed


def http(body, status="200 OK", kind="text/html; charset=utf-8", more=""):
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode(), body


def test_a_web_archive(tmp_path, reader):
    bomb = gzip.compress(b"x" * 30_000)
    pages = [
        http(PAGE.encode()),
        http(b"gone", "404 Not Found"),
        http(b"\x89PNG", kind="image/png"),
        http(bomb, more="Content-Encoding: gzip\r\n"),
        http(
            ("<p>" + "größe und café, déjà vu, " * 9 + "</p>").encode("latin-1"), kind="text/html"
        ),
        http("Plain text – all of it.".encode(), kind="text/plain"),
    ]
    (tmp_path / "crawl.warc.gz").write_bytes(warc(pages))
    documents = {d["id"]: d for d in reader}
    assert documents["crawl.warc.gz#1"]["text"] == "Fish & chips"
    assert documents["crawl.warc.gz#1"]["meta"]["url"] == "http://example.org/0"
    assert documents["crawl.warc.gz#5"]["text"].startswith("größe und café, déjà vu")
    assert documents["crawl.warc.gz#6"]["text"] == "Plain text – all of it."
    assert [d["meta"]["profile"] for d in documents.values()] == ["web", "web", "text"]
    assert skipped(reader) == {
        ("no page", "crawl.warc.gz", 2),
        ("no page", "crawl.warc.gz", 3),
        ("too long", "crawl.warc.gz", 4),
    }
    (tmp_path / "crawl.warc.gz").write_bytes(warc(pages)[:-60])
    list(reader)
    assert "damaged file" in reader.skips.reasons


def test_packed_texts_and_zip_archives(tmp_path, reader):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed text"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/page.html", PAGE)
        archive.writestr("x/d.jsonl", '{"text": "one"}\n{oops\n')
        archive.writestr("inner.zip", b"PK")
        archive.writestr("long.txt", "x" * (LIMIT + 1))
    (tmp_path / "torn.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:200])
    found = {d["id"]: d["text"] for d in reader}
    pages = {"b.zip/x/page.html": "Fish & chips", "b.zip/x/d.jsonl#1": "one"}
    assert found == {"a.txt.gz": "packed text", **pages}
    assert skipped(reader) == {
        ("unknown file type", "b.zip/inner.zip", None),
        ("too long", "b.zip/long.txt", None),
        ("not JSON", "b.zip/x/d.jsonl", 2),
        ("damaged file", "torn.zip", None),
    }


def test_bombs_and_endless_lines_are_left_early(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(streams, "_BOMB_BYTES", 1_000_000)
    monkeypatch.setattr(streams, "_LONGEST_LINE", 3_000_000)
    bomb = (b" " * 99 + b"\n") * 300_000
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "before"}\n' + bomb))
    (tmp_path / "bomb.jsonl.zst").write_bytes(zstd(bomb))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", bomb)
        archive.writestr("b.txt", "after")
    with open(tmp_path / "endless.jsonl", "wb") as file:
        file.truncate(10**12)  # a terabyte of zeros that takes no room
    assert [d["text"] for d in reader] == ["before", "after"]
    assert skipped(reader) == {
        ("decompression bomb", "bomb.jsonl.gz", None),
        ("decompression bomb", "bomb.jsonl.zst", None),
        ("decompression bomb", "bomb.zip/a.jsonl", None),
        ("endless line", "endless.jsonl", None),
    }


def test_other_encodings_are_repaired(tmp_path, reader, monkeypatch):
    russian = "Привет, мир! Это текст на русском языке, и его кодировка не указана."
    (tmp_path / "a.txt").write_bytes(russian.encode("koi8-r"))
    (tmp_path / "b.txt").write_bytes("Zwei Größen: größer, schöner, süßer.".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes("It’s a “café.".encode().decode("cp1252").encode())
    found = {d["id"]: (d["text"], d["meta"].get("encoding")) for d in reader}
    assert found == {
        "a.txt": (russian, "koi8-r"),
        "b.txt": ("Zwei Größen: größer, schöner, süßer.", "utf-16"),
        "c.txt": ("It’s a “café.", None),
    }
    for text in ("Ã la carte", "São Paulo, Âncora", "naïve façade â"):
        assert mend(text) == text
    assert not InstallationReader(LIMIT).repair
