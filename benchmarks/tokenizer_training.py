"""Train a vocabulary beside the `tokenizers` library: time, memory, equal merges.

    PYTHONPATH=src python benchmarks/tokenizer_training.py --megabytes 500 --vocabulary 50000

Text: the shared data (books, classical Chinese, 388 languages), then sources and documentation of
the Python installation and the system until there is enough. Each trainer reads the same file in a
process of its own and uses all cores. CPU seconds are all threads'; wall seconds tell little while
other work runs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizer_texts import python_files, records, shared_data

TRAINERS = ("openqwen", "tokenizers")


def texts(size: int) -> Iterator[str]:
    """Documents of `size` bytes in all; fewer where the machine has no more."""
    shared = (
        "books_en_train_1",
        "books_en_train_2",
        "classical_zh",
        "udhr2",
        "us_presidential_speeches",
    )
    found = (
        [records(f"corpus/{name}.jsonl.gz") for name in shared] if shared_data().is_dir() else []
    )
    for text in chain(*found, python_files(), system_files()):
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def system_files() -> Iterator[str]:
    """Headers and documentation of the system."""
    for folder in (
        "/usr/include",
        "/usr/lib/gcc",
        "/usr/share/doc",
        "/usr/share/perl",
        "/usr/lib/python3",
    ):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and not path.is_symlink():
                try:
                    yield path.read_bytes().decode()
                except UnicodeDecodeError:
                    continue  # a packed file


def read(path: str) -> Iterator[str]:
    """The documents of a JSON Lines file."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def train(name: str, path: str, vocabulary: int) -> list[list[str]]:
    """Merges in byte characters."""
    if name == "openqwen":
        from openqwen.tokenizer import TokenizerConfig, train_tokenizer
        from openqwen.tokenizer.pretokenize import to_characters

        trained = train_tokenizer(
            read(path), TokenizerConfig(vocabulary=vocabulary, max_bytes=10**12)
        )
        names = [to_characters(token) for token in trained.vocabulary]
        return [[names[left], names[right]] for left, right in trained.merges]
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from openqwen.tokenizer.pretokenize import PATTERN

    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(read(path), trainer)
    return json.loads(library.to_str())["model"]["merges"]


def measured(name: str, path: str, vocabulary: int) -> dict:
    """Run one trainer in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--trainer",
        name,
        "--file",
        path,
        "--vocabulary",
        str(vocabulary),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "true"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--trainer", choices=TRAINERS, help="run this one alone, on --file")
    parser.add_argument("--file")
    options = parser.parse_args()
    if options.trainer:
        start = time.monotonic()
        merges = train(options.trainer, options.file, options.vocabulary)
        wall, usage = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        print(
            json.dumps(
                {"wall": wall, "cpu": cpu, "memory": usage.ru_maxrss / 2**20, "merges": merges}
            )
        )
        return
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        size = count = 0
        for text in texts(int(options.megabytes * 1e6)):
            file.write(json.dumps(text) + "\n")
            size, count = size + len(text.encode()), count + 1
        file.flush()
        print(
            f"{size / 1e6:.0f} MB, {count:,} documents, vocabulary {options.vocabulary:,}, "
            f"{os.cpu_count()} cores"
        )
        results = {name: measured(name, file.name, options.vocabulary) for name in TRAINERS}
    for name, result in results.items():
        print(
            f"{name:>12}: {result['wall']:7.1f} s wall  {result['cpu']:7.1f} s CPU  "
            f"{result['memory']:5.2f} GiB at most"
        )
    ours, theirs = (results[name]["merges"] for name in TRAINERS)
    agree = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
    )
    print(f"merges: {len(ours):,} and {len(theirs):,}, the first {agree:,} the same")
    sys.exit(ours != theirs)


if __name__ == "__main__":
    main()
