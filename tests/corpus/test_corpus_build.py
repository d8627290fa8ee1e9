"""The whole stage on a small folder: what is kept, counted, held out, and that it is the same
twice.
"""

import gzip
import json
import shutil
import sysconfig
import tracemalloc
from collections import Counter
from importlib import metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from openqwen.corpus import CorpusConfig, build_corpus, documents, work
from openqwen.corpus import build as corpus_build
from openqwen.corpus.documents import DocumentEntry, read_documents
from openqwen.corpus.installation import InstallationReader
from openqwen.corpus.mixture import beyond_cap, heldout, sample, shares
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl
from openqwen.support.generators import Generators
from openqwen.tokenizer import fast

TEXT = """
    the of and to river stone light paper harbour winter music garden letter engine window market
    silver quiet"""
WORDS = TEXT.split()


def essay(name, sentences=12):
    draw = Generators(1)[name]
    lines = [
        " ".join(draw.choice(WORDS, 14)).capitalize() + f" {name}{i}." for i in range(sentences)
    ]
    return "\n\n".join(" ".join(lines[i : i + 3]) for i in range(0, sentences, 3))


@pytest.fixture
def folder(tmp_path):
    raw = tmp_path / "raw"
    for source in ("letters", "essays"):
        (raw / source).mkdir(parents=True)
        for index in range(30):
            (raw / source / f"{index:02}.txt").write_text(essay(f"{source}{index}"))
    (raw / "letters/copy.txt").write_text(essay("letters1").replace(" ", "  "))
    (raw / "letters/near.txt").write_text(essay("letters2") + "\n\nOne more line at the end.\n")
    (raw / "short.txt").write_text("too short")
    (raw / "bad.jsonl").write_text("{oops\n")
    return raw


def tasks(count=100):
    for index in range(count):
        text = f"What is {index} + 1? It is {index + 1}."
        yield {
            "id": f"task/{index}",
            "text": text,
            "source": "tasks",
            "language": "en",
            "meta": {"task": "sum"},
        }


def build(config, out, extra=(), seed=0, scratch=None):
    out.mkdir(exist_ok=True)
    return build_corpus(config, extra, out, seed, scratch), json.loads(
        (out / "corpus.json").read_text()
    )


def test_the_report_accounts_for_every_document(folder, tmp_path):
    metrics, report = build(CorpusConfig(folder=folder), tmp_path / "out", tasks())
    assert report["read"]["documents"] == 63
    assert report["skipped"]["not JSON"]["examples"][0]["file"] == "bad.jsonl"
    assert report["skipped"]["not JSON"]["examples"][0]["line"] == 1
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == ["cap", "clean", "filter", "exact", "near", "paragraphs"]
    assert steps["filter"]["reasons"]["word count"]["examples"][0]["id"] == "short.txt"
    assert steps["exact"]["reasons"]["exact duplicate"]["examples"][0]["id"] == "letters/copy.txt"
    assert steps["near"]["reasons"]["near-duplicate"]["examples"][0]["why"] == "like letters/02.txt"
    assert (steps["exact"]["kept"], steps["near"]["kept"]) == (161, 60)
    train, held = (
        list(read_documents(tmp_path / "out" / f"{n}.parquet")) for n in ("train", "heldout")
    )
    assert len(train) + len(held) == 160 == metrics["documents"] + metrics["heldout_documents"]
    assert not {d["text"] for d in train} & {d["text"] for d in held}
    assert {d["source"] for d in held} == {"letters", "essays", "tasks"} == set(report["sources"])
    for source, entry in report["sources"].items():
        assert entry["bytes"] == sum(
            len(d["text"].encode()) for d in train if d["source"] == source
        )
        assert entry["heldout_documents"] == sum(d["source"] == source for d in held)
    assert sum(entry["weight"] for entry in report["sources"].values()) == pytest.approx(1)
    raw = "".join(d["text"] for d in held).encode()
    assert report["gzip_bits_per_byte"] == pytest.approx(
        8 * len(gzip.compress(raw, 9)) / len(raw), rel=1e-3
    )


def test_every_decision_stands_in_a_file_with_the_number_that_caused_it(folder, tmp_path):
    _, report = build(CorpusConfig(folder=folder), tmp_path / "out", tasks())
    rows = pq.read_table(tmp_path / "out/decisions.parquet").to_pylist()
    counts = Counter((row["step"], row["rule"]) for row in rows)
    for step in report["steps"]:
        for rule, entry in step["reasons"].items():
            assert counts.pop((step["name"], rule)) == entry["documents"]
    assert not counts
    (short,) = (row for row in rows if row["id"] == "short.txt")
    assert (short["rule"], short["value"], short["kept"]) == ("word count", 2.0, False)
    assert short["why"] == "2, wanted 50 to 100,000"


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    for name in ("one", "two"):
        build(CorpusConfig(folder=folder), tmp_path / name, tasks())
    for file in ("train.parquet", "heldout.parquet", "corpus.json", "decisions.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    build(CorpusConfig(folder=folder), tmp_path / "three", tasks(), seed=1)
    assert (tmp_path / "one/heldout.parquet").read_bytes() != (
        tmp_path / "three/heldout.parquet"
    ).read_bytes()


def test_a_preset_takes_the_place_of_the_profile(folder, tmp_path):
    limits = {"published": {"repetition": {"max_top_ngrams": {}, "max_duplicate_ngrams": {}}}}
    config = CorpusConfig(folder=folder, presets={"letters": "c4", "*": "gopher"}, filters=limits)
    _, report = build(config, tmp_path / "out")
    (step,) = (step for step in report["steps"] if step["name"] == "filter")
    assert set(step["reasons"]) == {"word count", "lines"}  # C4 cuts blank lines
    assert report["sources"]["letters"]["documents"] > 20
    with pytest.raises(OpenQwenError, match="62 x line length, 1 x file length"):
        build(CorpusConfig(folder=folder, presets={"*": "code"}), tmp_path / "code")


FILES = ("train.parquet", "heldout.parquet", "corpus.json", "decisions.parquet", "quarantine.jsonl")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(work, "_CHUNK_BYTES", 5_000)
    monkeypatch.setattr(corpus_build, "_UNIT_BYTES", 20_000)


def bytes_of(out):
    return {name: (out / name).read_bytes() for name in FILES}


def test_chunks_and_processes_change_no_byte(folder, tmp_path, small_chunks):
    build(CorpusConfig(folder=folder), tmp_path / "one", tasks())
    config = CorpusConfig(folder=folder, engine="processes", workers={"count": 2})
    build(config, tmp_path / "two", tasks(), scratch=tmp_path / "scratch")
    assert len(list((tmp_path / "scratch/final").glob("*.jsonl"))) >= 4
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


@pytest.mark.parametrize("step", ["_write_raw", "document_keys", "cut_repeats"])
def test_a_run_that_was_stopped_goes_on_and_does_nothing_twice(
    folder, tmp_path, small_chunks, monkeypatch, step
):
    """The steps of reading, of mapping and of applying stop in the middle, and go on."""
    build(CorpusConfig(folder=folder), tmp_path / "one", tasks())
    whole, calls = getattr(work, step), []

    def stops(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return whole(*arguments)

    config, scratch = CorpusConfig(folder=folder), tmp_path / "scratch"
    scratch.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(work, step, stops)
        with pytest.raises(KeyboardInterrupt):
            build(config, tmp_path / "two", tasks(), scratch=scratch)
    done = {path: path.stat().st_mtime_ns for path in scratch.rglob("0*.json")}
    assert done
    build(config, tmp_path / "two", tasks(), scratch=scratch)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    # Other input: nothing of it is used.
    (folder / "letters/new.txt").write_text(essay("new"))
    metrics, _ = build(config, tmp_path / "two", tasks(), scratch=scratch)
    assert metrics["read_documents"] == 64


def test_too_much_that_cannot_be_read_is_an_error_at_the_end(folder, tmp_path):
    for number in range(20):
        (folder / f"bad{number}.txt").write_bytes(b"\0")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(OpenQwenError, match=r"could not be read, 25\.0% of all") as caught:
        build(CorpusConfig(folder=folder), tmp_path / "out", scratch=scratch)
    assert "quarantine.jsonl" in str(caught.value)
    rows = list(read_jsonl(tmp_path / "out/quarantine.jsonl"))
    assert len(rows) == 21
    assert rows[0] == {"id": "bad.jsonl#1", "reason": "not JSON", "text": rows[0]["text"]}
    config = CorpusConfig(folder=folder, max_quarantined=0.5)
    assert build(config, tmp_path / "out", scratch=scratch)[0]["skipped"] == 21


def test_ids_that_come_twice_are_counted_and_nothing_is_lost(folder, tmp_path):
    lines = [{"id": str(n // 2), "text": essay(f"record{n}")} for n in range(8)]
    (folder / "letters/records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = CorpusConfig(folder=folder, profiles={"letters": "text"})
    metrics, report = build(config, tmp_path / "out")
    assert report["read"]["duplicate_ids"] == metrics["read_duplicate_ids"] == 4
    assert metrics["near_dropped"] == 1
    ids = [d["id"] for n in FILES[:2] for d in read_documents(tmp_path / "out" / n)]
    assert len(ids) == len(set(ids)) == 68


def test_steps_that_are_left_out(folder, tmp_path):
    """Each alone keeps what it would drop; all together keep every document that was read."""
    whole = build(CorpusConfig(folder=folder), tmp_path / "whole")[0]
    kept = whole["documents"] + whole["heldout_documents"]
    for step, more in (("filter", 1), ("exact", 1), ("near", 1), ("paragraphs", 0)):
        config = CorpusConfig(folder=folder, leave_out=[step])
        metrics, report = build(config, tmp_path / step)
        assert step not in [entry["name"] for entry in report["steps"]]
        # Without exact deduplication the copy is a near-duplicate.
        more = 0 if step == "exact" else more
        assert metrics["documents"] + metrics["heldout_documents"] == kept + more
    config = CorpusConfig(folder=folder, leave_out=["filter", "exact", "near", "paragraphs"])
    metrics, _ = build(config, tmp_path / "all")
    assert metrics["documents"] + metrics["heldout_documents"] == 63
    with pytest.raises(ValidationError):
        CorpusConfig(leave_out=["clean"])


def test_a_sample_of_the_documents(folder, tmp_path):
    config = CorpusConfig(folder=folder, sample=0.5, heldout_share=0.2)
    first = build(config, tmp_path / "one")[0]["read_documents"]
    assert 15 < first < 50


def test_a_cap_and_a_profile_for_one_source(folder, tmp_path):
    config = CorpusConfig(folder=folder, max_bytes={"letters": 5000}, profiles={"essays": "code"})
    _, report = build(config, tmp_path / "out")
    letters = report["sources"]["letters"]
    assert 3000 < letters["bytes"] + letters["heldout_bytes"] <= 5000
    assert set(report["steps"][2]["reasons"]) == {"word count", "line length"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no document that can be read"),
        ({"a.png": b"x", "b.txt": b"\0"}, "1 x unknown file type"),
        ({"a.txt": b"too short"}, "Every document was filtered out"),
        ({"a.txt": essay("a").encode()}, "No document could be held out"),
    ],
)
def test_a_corpus_with_nothing_in_it_is_an_error_that_says_what_to_do(tmp_path, files, message):
    (tmp_path / "raw").mkdir()
    for name, content in files.items():
        (tmp_path / "raw" / name).write_bytes(content)
    with pytest.raises(OpenQwenError, match=message) as caught:
        build(CorpusConfig(folder=tmp_path / "raw"), tmp_path / "out")
    assert caught.value.do
    assert str(tmp_path / "raw") in str(caught.value)


def entries(count, source, group=None):
    ids = [f"{source}{i}" for i in range(count)]
    groups = [f"{group}{i}" for i in range(count)] if group else ids
    return [DocumentEntry(name, source, group, 10) for name, group in zip(ids, groups)]


def test_held_out_groups_are_whole_and_adding_documents_moves_none():
    pages = entries(500, "docs", "module") + entries(500, "code", "module")
    out = heldout(pages, 0.05, 10**9, seed=0)
    assert 30 < len(out) < 80
    assert {i[4:] for i in out if i.startswith("docs")} == {i[4:] for i in out if i[0] == "c"}
    more = pages + entries(100, "extra")
    assert out <= heldout(more, 0.05, 10**9, seed=0)
    capped = heldout(pages, 0.05, 105, seed=0)
    assert len(capped) == 20
    assert capped < out
    assert len(heldout(entries(2, "few"), 0.001, 100, seed=0)) == 1


def test_caps_and_shares():
    pages = entries(100, "a") + entries(5, "b")
    left_out = beyond_cap(pages, {"a": 305}, seed=0)
    assert (left_out[:100].sum(), left_out[100:].sum()) == (70, 0)
    assert shares({"a": 300, "b": 100}, {"b": 3.0}) == {"a": 0.5, "b": 0.5}


def test_a_sample_follows_the_weights_and_no_order():
    """In the order of their paths, the first bytes were all of one source."""
    pages = [entry for source in "abc" for entry in entries(2000, source)]
    weights = {"a": 1.0, "b": 4.0}
    chosen = sample(pages, weights, 10_000, seed=0)
    assert len(chosen) == 1000
    counts = Counter(name[0] for name in chosen)
    assert counts["b"] / 1000 == pytest.approx(0.8, abs=0.05)
    assert counts["c"] == 0
    assert sample(pages[::-1], weights, 10_000, seed=0) == chosen
    assert sample(pages, weights, 10_000, seed=1) != chosen
    assert len(sample(pages, weights, 10**9, seed=0)) == 4000
    assert sample(pages[:1], weights, 3, seed=0) == {"a0"}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library: reading the whole one takes seconds."""
    folder = tmp_path / "python"
    for name in ("json", "test"):
        (folder / name).mkdir(parents=True)
    for name in ("textwrap.py", "json/__init__.py", "json/scanner.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, folder / name)
    shutil.copy(folder / "textwrap.py", folder / "test/test_wrap.py")
    (folder / "test/broken.py").write_text("def (")
    (folder / "abc.py").write_text("def (")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(folder))
    return folder


def test_the_standard_library_is_a_corpus(library):
    reader = InstallationReader(10_000_000)
    pages = {document["id"]: document for document in reader}
    library_pages = [name for name in pages if name.startswith(("python/", "docs/"))]
    modules = ("abc", "json/__init__", "json/scanner", "test/broken", "test/test_wrap", "textwrap")
    references = ("json", "json.scanner", "textwrap")
    assert sorted(library_pages) == [
        *(f"docs/{m}" for m in references),
        *(f"python/{m}.py" for m in modules),
    ]
    assert {d["source"] for d in pages.values()} == {"code", "docs"}
    assert (
        "wrap(text, width=70, **kwargs)\nWrap a single paragraph of text"
        in pages["docs/textwrap"]["text"]
    )
    assert pages["docs/textwrap"]["meta"]["group"] == pages["python/textwrap.py"]["meta"]["group"]
    assert "pydoc/booleans" in pages
    assert reader.files == len(modules)


def test_what_else_is_installed_changes_nothing(library, tmp_path, monkeypatch):
    """One more README changed every draw of the tiny recipe."""
    before = list(InstallationReader(10_000_000))
    description = (
        f"Metadata-Version: 2.1\nName: extra\nVersion: 1\nSummary: More\n\n{essay('extra')}"
    )
    added = {
        "site-packages/extra/code.py": essay("code"),
        "site-packages/extra-1.dist-info/METADATA": description,
        "dist-packages/other.py": essay("other"),
        "_sysconfigdata__linux_x86_64-linux-gnu.py": essay("paths of this build"),
        "config-3.11-x86_64-linux-gnu/python-config.py": essay("paths of this build, again"),
        "sitecustomize.py": essay("the administrator's"),
        "EXTERNALLY-MANAGED": essay("the distribution's"),
        "json/__pycache__/scanner.txt": essay("cache"),
    }
    for name, text in added.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text)
    monkeypatch.syspath_prepend(library / "site-packages")
    assert metadata.version("extra") == "1"
    assert list(InstallationReader(10_000_000)) == before


def test_memory_hardly_grows_with_the_text(tmp_path, monkeypatch):
    """When documents were held in memory, 1 MB of text more took 2 MB."""
    monkeypatch.setattr(documents, "_GROUP_BYTES", 20_000)
    monkeypatch.setattr(fast, "_BATCH_SIZE", 5_000)
    monkeypatch.setattr(work, "_CHUNK_BYTES", 20_000)
    draw = Generators(0)["lines"]
    config = CorpusConfig(folder=tmp_path / "raw", profiles={"documents": "code"})
    config.folder.mkdir()
    sizes, peaks = [], []
    for name, count in (("a", 40), ("b", 120)):  # the second time on 160 documents
        with open(config.folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                text = "\n".join(" ".join(draw.choice(WORDS, 12)) for _ in range(80))
                file.write(json.dumps({"text": text}) + "\n")
        tracemalloc.start()
        metrics, _ = build(config, tmp_path / name)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(metrics["bytes"] + metrics["heldout_bytes"])
    assert sizes[1] - sizes[0] > 400_000
    assert peaks[1] - peaks[0] < 0.6 * (sizes[1] - sizes[0])


def test_large_corpora_are_several_files(folder, tmp_path, monkeypatch):
    build(CorpusConfig(folder=folder), tmp_path / "one")
    whole = list(read_documents(tmp_path / "one/train.parquet"))
    monkeypatch.setattr(documents, "_FILE_BYTES", 9_000)
    build(CorpusConfig(folder=folder), tmp_path / "many")
    files = sorted(path.name for path in (tmp_path / "many").glob("train*.parquet"))
    assert files[:2] == ["train-00001.parquet", "train-00002.parquet"]
    assert len(files) > 4
    path = tmp_path / "many/train.parquet"
    assert list(read_documents(path)) == whole
    assert documents.count_documents(path) == len(whole)
    sizes = [sum(len(d["text"]) for d in read_file(part)) for part in documents.parts(path)]
    assert all(9_000 <= size < 11_000 for size in sizes[:-1])
    # Fewer documents, in the same place: nothing of the old ones is left.
    assert documents.write_documents(path, whole[:3]) == 3
    assert list(read_documents(path)) == whole[:3]
    assert documents.write_documents(path, []) == 0
    assert list(read_documents(path)) == []


def read_file(path):
    return pq.read_table(path).to_pylist()


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError):
        CorpusConfig(heldout=0.1)
