"""Compare ids with transformers on 50 MB of mixed text and 100,000 fuzzed strings.

    PYTHONPATH=src python benchmarks/tokenizer_ids.py --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

transformers gets vocab.json, merges.txt and tokenizer_config.json, so that its own Qwen2 class
makes the rules. Control tokens in the text are found by both; ours without them is compared on
texts that hold none. Decoding is compared too. Exits with 1 at any difference and shows the first
of each source. OPENQWEN_NATIVE=0 tries the Python path.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizer_texts import fuzzed, mixed
from transformers import AutoTokenizer

from openqwen.tokenizer import Tokenizer, load_tokenizer

BATCH = 256


def reference(tokenizer: Tokenizer):
    """transformers' tokenizer for the same vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        (Path(folder) / "tokenizer.json").unlink()
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer


def differences(tokenizer: Tokenizer, library, sources: Iterator[tuple[str, str]]) -> int:
    """Print a line a source; returns how many texts differ."""
    count, size, wrong, first = defaultdict(int), defaultdict(int), defaultdict(int), {}
    while batch := list(islice(sources, BATCH)):
        encodings = library.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (name, text), encoding in zip(batch, encodings):
            ids = tokenizer.encode(text, allow_control=True)
            same = ids == encoding.ids and tokenizer.decode(ids) == library.decode(encoding.ids)
            if max(ids, default=0) < len(tokenizer.vocabulary):
                same = same and tokenizer.encode(text) == ids
            count[name] += 1
            size[name] += len(text.encode())
            if not same:
                wrong[name] += 1
                first.setdefault(name, text)
    for name in count:
        print(
            f"{name:>18}: {count[name]:8,} texts {size[name] / 1e6:8.2f} MB   {wrong[name]} differ",
            flush=True,
        )
    for name, text in first.items():
        print(f"first difference in {name}: {text[:2000]!r}")
    print(
        f"{'all':>18}: {sum(count.values()):8,} texts {sum(size.values()) / 1e6:8.2f} MB   "
        f"{sum(wrong.values())} differ"
    )
    return sum(wrong.values())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or .gguf file with a tokenizer")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--strings", type=int, default=100_000)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    print(
        f"{options.model}: {tokenizer.vocab_size:,} tokens, the {tokenizer.path} path", flush=True
    )
    start = time.monotonic()
    strings = (("fuzzed strings", text) for text in fuzzed(options.strings))
    wrong = differences(
        tokenizer, reference(tokenizer), chain(strings, mixed(int(options.megabytes * 1e6)))
    )
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
