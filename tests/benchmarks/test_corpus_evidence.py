"""The programs of evidence about the corpus: their text, their tables, and a toy run."""

import importlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A small standard library and packages, and books."""
    for n in range(30):
        package = tmp_path / f"packages/pack{n}"
        package.mkdir(parents=True)
        (package / "code.py").write_text(f"def f{n}():\n    return {n}\n" * 30)
        (package / "table.json").write_text(json.dumps(list(range(n, n + 200))))
        (tmp_path / "packages" / f"pack{n}-1.0.dist-info").mkdir()
        about = tmp_path / f"packages/pack{n}-1.0.dist-info"
        (about / "LICENSE").write_text("Do as you like. " * 40)
        said = f"It does {n} things. " * 40 if n % 2 else "Do as you like. " * 40
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pack{n}\n\n{said}")
    (tmp_path / "library").mkdir()
    for n in range(30):
        (tmp_path / f"library/module{n}.py").write_text(f"VALUE = {n}\n" * 80)
    places = {"stdlib": tmp_path / "library", "purelib": tmp_path / "packages"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(places[name]))
    lines = []
    for n in range(40):
        text = "\n\n".join(f"Sentence {n} and {m} of a book. " * 30 for m in range(20))
        lines.append(json.dumps({"id": f"b{n}", "author": f"a{n}", "text": text}) + "\n")
    (tmp_path / "books.jsonl").write_text("".join(lines))
    return tmp_path


def test_raw_text_and_held_out_text_have_no_author_or_package_in_common(script, machine):
    evidence = script("evidence")
    out = machine / "out"
    evidence.raw_text(out, [machine / "books.jsonl"], 1.0)
    held = evidence.heldout_documents(out)
    assert {d["source"] for d in held} == {"books", "code", "packages"}
    groups = {"books": lambda name: name.split("/")[0]}
    for source in ("books", "code", "packages"):
        group = groups.get(source, lambda name: name.split("/")[0].partition("-")[0])
        lines = (out / "text" / source / "documents.jsonl").read_text().splitlines()
        mine = {group(json.loads(line)["id"]) for line in lines}
        other = {group(d["id"]) for d in held if d["source"] == source}
        assert mine
        assert other
        assert not mine & other
    said = [d["text"] for d in held if d["source"] == "packages"]
    assert all(text.startswith("It does") for text in said), (
        "no metadata, no licence, nothing known"
    )
    assert evidence.documents_in(out / "text") > 100
    before = (out / "heldout.jsonl").stat().st_mtime_ns
    evidence.raw_text(out, [machine / "books.jsonl"], 1.0)
    assert (out / "heldout.jsonl").stat().st_mtime_ns == before


def test_a_plot_is_an_svg_with_all_rows(script):
    rows = [("a & b", 1.0, 0.5, 1.5), ("c", -1.0, -2.0, 0.0)]
    tree = ElementTree.fromstring(script("evidence").interval_plot("<title>", rows))
    texts = [node.text for node in tree.iter() if node.tag.endswith("text")]
    assert {"a & b", "c", "<title>"} <= set(texts)
    assert sum(node.tag.endswith("circle") for node in tree.iter()) == 2


def test_the_table_of_the_ablation(script, tmp_path):
    """A known saving of 0.25 bits per byte in every document and seed is found."""
    ablation = script("corpus_ablation")
    rng = np.random.default_rng(0)
    held = [
        {"source": s, "id": f"{s}{n}", "text": "x" * int(rng.integers(500, 900))}
        for s in ("books", "code")
        for n in range(30)
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(d) + "\n" for d in held))
    sizes = np.array([len(d["text"]) for d in held])
    for arm, level in (("raw", 2.0), ("filtered", 1.75)):
        (tmp_path / arm).mkdir()
        for seed in (1, 2, 3):
            record = {"bits": (sizes * level).tolist(), "bytes": sizes.tolist()}
            (tmp_path / arm / f"seed-{seed}.json").write_text(json.dumps(record))
    table, plot = ablation.tables(tmp_path)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip("| ") for row in rows] == [
        "books",
        "books",
        "code",
        "code",
        "mean",
        "mean",
    ]
    assert rows[0][2].startswith("2.0000")
    for row in rows[1::2]:
        mean, low, high = (float(x.strip("[],|")) for x in row[3].split()[:3])
        assert low <= 0.25 <= high
        assert mean == pytest.approx(0.25, abs=1e-3)
    assert "filtered" in plot
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/heldout.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no finished model"):
        ablation.tables(tmp_path / "empty")


def test_the_table_of_the_search(script, tmp_path):
    search = script("mixture_search")
    for seed, gain in ((1, 0.1), (2, 0.2), (3, 0.3)):
        entry = {"weights": [0.5, 0.5], "predicted_mean": 3.0, "measured_means": [3.0, 3.2]}
        better = entry | {"predicted_mean": 2.9, "measured_means": [3.0 - gain, 3.2 - gain]}
        result = {"sources": ["a", "b"], "natural": entry, "proposed": better}
        result["fits"] = {name: {"error": 0.01, "rank": 0.9} for name in "ab"}
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}/mixture.json").write_text(json.dumps(result))
    table, plot = search.tables(tmp_path)
    # 0.2 ± 4.303 · 0.1 / √3
    assert "0.2000 [-0.0484, 0.4484] (0.1000, 0.2000, 0.3000); predicted 0.1000" in table
    assert "search 3" in plot


@pytest.mark.slow
def test_a_toy_ablation(machine, tmp_path):
    toy = "corpus: {profiles: {books: text, code: code, packages: web}, task_documents: 0}\n"
    toy += "tokenizer: {vocabulary: 400}\npretrain:\n  network: {hidden_size: 32, "
    toy += "intermediate_size: 64, layers: 1, heads: 2, kv_heads: 1}\n"
    toy += "  data: {tokens: 4000, context: 64, batch_tokens: 512}\n"
    (tmp_path / "toy.yaml").write_text(toy)
    code = f"""
import sys, sysconfig
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from evidence import raw_text
places = {{"stdlib": {str(machine / "library")!r}, "purelib": {str(machine / "packages")!r}}}
sysconfig.get_path = places.__getitem__
raw_text(Path("out"), [Path({str(machine / "books.jsonl")!r})], 0.2)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    words = [sys.executable, str(SCRIPTS / "corpus_ablation.py"), "--output", "out"]
    words += ["--recipe", "toy.yaml", "--seeds", "1", "2", "--context", "64"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "| mean | filtered |" in done.stdout
    assert (tmp_path / "out/ablation.svg").exists()
