"""Encoding speed beside tokenizers, tiktoken and quicktok-v1, with a real vocabulary.

    python -m venv peers && peers/bin/pip install -r benchmarks/requirements-tokenizer.txt -e .
    taskset -c 0 peers/bin/python benchmarks/tokenizer.py --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
    peers/bin/python benchmarks/tokenizer.py --model ... --batch

Texts of 4 kB: English books and classical Chinese from the shared data, Python code from the
installation. Each encoder turns one text after the other into a list of ids, control tokens left as
text; in each round all encoders do the same texts, in turn, and the table has the median of the
rounds. `first` is a round on texts not seen before, `again` the rounds after it on the same texts,
when caches of words are warm. Seconds are of the CPU, so that other work on the machine disturbs
less. With --batch, all texts go in one call, each library's own for that, on one and on all cores:
seconds are of the clock there. Ids are compared first.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from tokenizer_ids import reference
from tokenizer_texts import python_files, records

from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.pretokenize import PATTERN

SIZE = 4096  # bytes of a text
Encode = Callable[[str], list[int]]
EncodeBatch = Callable[[list[str], int], object]


def cut(documents: Iterator[str]) -> Iterator[str]:
    """Texts of SIZE bytes, cut between characters, out of documents one after the other."""
    rest = b""
    for document in documents:
        rest += document.encode() + b"\n"
        while len(rest) > SIZE + 4:
            end = SIZE
            while rest[end] & 0xC0 == 0x80:
                end -= 1
            yield rest[:end].decode()
            rest = rest[end:]


def sources(count: int) -> dict[str, list[str]]:
    """`count` texts of each kind."""
    kinds = {
        "English": records("corpus/books_en_train_1.jsonl.gz"),
        "classical Chinese": records("corpus/classical_zh.jsonl.gz"),
        "Python": python_files(),
    }
    return {name: list(islice(cut(documents), count)) for name, documents in kinds.items()}


def encoders(tokenizer: Tokenizer) -> dict[str, tuple[Encode, EncodeBatch]]:
    """Return name -> (encode one text, encode many on n threads); names missing peers."""
    found: dict[str, tuple[Encode, EncodeBatch]] = {
        f"OpenQwen, {tokenizer.path}": (
            tokenizer.encode,
            lambda texts, n: tokenizer.encode_batch(texts, threads=n),
        )
    }
    library = reference(tokenizer)
    library.encode_special_tokens = True
    found["tokenizers"] = (
        lambda text: library.encode(text, add_special_tokens=False).ids,
        lambda texts, n: [
            e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)
        ],
    )
    try:
        import tiktoken

        ranks = {token: i for i, token in enumerate(tokenizer.vocabulary)}
        other = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        found["tiktoken"] = (
            other.encode_ordinary,
            lambda texts, n: other.encode_ordinary_batch(texts, num_threads=n),
        )
    except ImportError:
        print("tiktoken is not installed")
    try:
        import quicktok

        quick = quicktok.get_encoding("qwen2.5")
        found["quicktok-v1"] = (
            quick.encode_ordinary,
            lambda texts, n: quick.encode_batch(texts, threads=n),
        )
    except ImportError:
        print("quicktok-v1 is not installed")
    return found


def seconds(clock: Callable[[], float], work: Callable[[], object]) -> float:
    """How long `work` takes by `clock`."""
    start = clock()
    work()
    return clock() - start


def single(tokenizer: Tokenizer, kinds: dict[str, list[str]], rounds: int) -> None:
    """One core, one text at a time."""
    print(f"{'MB/s on one core':<20}" + "".join(f"{kind:>27}" for kind in kinds))
    print(f"{'':<20}" + f"{'first':>15}{'again':>12}" * len(kinds))
    rows: dict[str, list[str]] = {}
    for texts in kinds.values():
        found = encoders(tokenizer)  # anew, so that no cache knows the texts
        size = sum(len(text.encode()) for text in texts) / 1e6
        taken: dict[str, list[float]] = {name: [] for name in found}
        for encode, _ in found.values():
            encode("warm up")
        [
            list(range(1000, 1000 + SIZE)) for _ in texts
        ]  # memory from the system, which the first would pay for
        for _ in range(rounds + 1):
            for name, (encode, _) in found.items():
                taken[name].append(
                    seconds(time.process_time, lambda e=encode, t=texts: list(map(e, t)))
                )
        expected = [tokenizer.encode(text) for text in texts]
        for name, (encode, _) in found.items():
            first, *again = taken[name]
            same = sum(encode(text) == ids for text, ids in zip(texts, expected))
            mark = "" if same == len(texts) else f" ({len(texts) - same} texts differ)"
            rows.setdefault(name, []).append(
                f"{size / first:>15.1f}{size / statistics.median(again):>12.1f}{mark}"
            )
    for name, cells in rows.items():
        print(f"{name:<20}" + "".join(cells))


def batch(tokenizer: Tokenizer, kinds: dict[str, list[str]], rounds: int) -> None:
    """Many texts in one call, on one and on all cores."""
    cores = os.cpu_count() or 1
    print(f"{'MB/s in one call':<20}" + "".join(f"{kind:>27}" for kind in kinds))
    print(f"{'':<20}" + f"{'1 core':>15}{f'{cores} cores':>12}" * len(kinds))
    found = encoders(tokenizer)
    rows: dict[str, str] = dict.fromkeys(found, "")
    for texts in kinds.values():
        size = sum(len(text.encode()) for text in texts) / 1e6
        taken: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for name, (_, encode) in found.items():
                for threads in (1, cores):
                    os.environ["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()
                    work = partial(encode, texts, threads)
                    taken.setdefault((name, threads), []).append(seconds(time.perf_counter, work))
        for name in found:
            one, all_ = (size / statistics.median(taken[name, threads]) for threads in (1, cores))
            rows[name] += f"{one:>15.1f}{all_:>12.1f}"
    for name, row in rows.items():
        print(f"{name:<20}{row}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a folder or .gguf file with Qwen2's vocabulary"
    )
    parser.add_argument("--texts", type=int, default=1000, help="of each kind")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--batch", action="store_true", help="many texts in one call, on one and on all cores"
    )
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    (batch if options.batch else single)(tokenizer, sources(options.texts), options.rounds)


if __name__ == "__main__":
    main()
