"""Megabytes a second of each step of the corpus, against datatrove's on the same documents.

    python benchmarks/corpus_pipeline.py --text FILE.jsonl.gz... [--megabytes 20]
        [--datatrove peers/datatrove/bin/python]

filters_datatrove.py says how to make datatrove's environment. Rates are of processor time of one
thread. "whole" is the stage from JSON Lines to train.parquet with FineWeb's filters, then token
shards with a vocabulary of 4,096; datatrove's is the sum of its filters and its MinHash signature:
no reading, no writing, no tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filters_datatrove import pieces

from openqwen.corpus import CorpusConfig, build_corpus, write_shards
from openqwen.corpus.clean import normalize
from openqwen.corpus.config import MinHashConfig, PublishedRules
from openqwen.corpus.deduplicate import band_keys, exact_key, signatures
from openqwen.corpus.identify import language_of
from openqwen.corpus.published import PublishedFilters
from openqwen.corpus.read import FolderReader
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.tokenizer.fast import text_batches

# Run by datatrove's Python: prints the seconds of its filters and of its signatures.
THEIRS = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter)
chain = [GopherRepetitionFilter(), GopherQualityFilter(),
         C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()]
hashing = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)
signer = MinhashDedupSignature(output_folder=sys.argv[2], config=hashing)
texts = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
chain[1].filter(Document(text="one two", id="warm"))
start = time.process_time()
for text in texts:
    document = Document(text=text, id="x")
    for step in chain:
        result = step.filter(document)
        if result is not True and result[0] is not True:
            break
filtered = time.process_time()
for text in texts:
    shingles = signer.get_shingles(text)
    if shingles.size:
        signer.get_signature(shingles)
print(json.dumps({"filters": filtered - start, "minhash": time.process_time() - filtered}))
"""


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--datatrove", type=Path, help="its environment's Python")
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the documents that datatrove gets"
    )
    options = parser.parse_args()
    texts = list(pieces(options.text, int(options.megabytes * 1e6 / 2_900), step=3_000))
    size = sum(len(text.encode()) for text in texts) / 1e6
    filters, minhash = PublishedFilters(PublishedRules()), MinHashConfig()
    for text in texts[:2_000]:
        filters.apply(text, "fineweb")  # the table of words fills, as in the first minute of a run
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        raw.mkdir()
        with open(raw / "documents.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        seconds = {
            "read JSON Lines": timed(lambda: list(FolderReader(raw, 10**7))),
            "normalise": timed(lambda: [normalize(text) for text in texts]),
            "language": timed(lambda: [language_of(text) for text in texts]),
            "filters": timed(lambda: [filters.apply(text, "fineweb") for text in texts]),
            "exact keys": timed(lambda: [exact_key(text) for text in texts]),
            "minhash": timed(
                lambda: [band_keys(signatures(b, minhash), minhash) for b in text_batches(texts)]
            ),
        }
        tokenizer = train_tokenizer(texts[:500], TokenizerConfig(vocabulary=4096))
        out = Path(name) / "out"
        out.mkdir()
        config = CorpusConfig(folder=raw, presets={"*": "fineweb"}, max_bytes={})
        seconds["corpus stage"] = timed(lambda: build_corpus(config, [], out))
        seconds["tokens"] = timed(
            lambda: write_shards(out / "train.parquet", tokenizer, out / "tokens")
        )
        seconds["whole"] = seconds["corpus stage"] + seconds["tokens"]
        rates = {step: size / taken for step, taken in seconds.items()}
        theirs: dict[str, float] = {}
        if options.datatrove:
            part = texts[:: round(1 / options.share)]
            path = Path(name) / "part.jsonl"
            path.write_text("".join(json.dumps(text) + "\n" for text in part), encoding="utf-8")
            command = [str(options.datatrove), "-W", "ignore", "-c", THEIRS, str(path), name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            taken = json.loads(done.stdout.splitlines()[-1])
            taken["whole"] = taken["filters"] + taken["minhash"]
            part_size = sum(len(text.encode()) for text in part) / 1e6
            theirs = {step: part_size / spent for step, spent in taken.items()}
    print(f"{len(texts):,} documents, {size:.1f} MB")
    for step, rate in rates.items():
        line = f"{step:<16} {rate:8.1f} MB/s"
        if step in theirs:
            line += f"   datatrove {theirs[step]:6.2f} MB/s   {rate / theirs[step]:5.0f} x"
        print(line)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
