"""Time decontamination of real text against evaluation sets, and list what it finds.

    python benchmarks/decontaminate.py --against EVALUATION... --text FILE... [--show 5]

Rates are of processor time of this one thread.
"""

import argparse
import time
from pathlib import Path

from openqwen.corpus.decontaminate import EvaluationIndex, read_items
from openqwen.support.records import read_records


def main() -> None:
    """Print the size of the index, and for each file of text its matches and its rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--show", type=int, default=5)
    options = parser.parse_args()
    start = time.process_time()
    index = EvaluationIndex(read_items(options.against))
    seconds = time.process_time() - start
    short = index.too_short
    print(f"index: {len(index.items):,} texts in {seconds:.1f} s; {short:,} are too short")
    for path in options.text:
        texts = [record["text"] for _, record in read_records(path)]
        size = sum(len(text.encode()) for text in texts)
        start = time.process_time()
        found = [match for match in index.contamination(texts) if match]
        seconds = time.process_time() - start
        start = time.process_time()
        runs = index.shared_runs(texts)
        again = time.process_time() - start
        print(
            f"{path.name}: {len(texts):,} texts, {size / 1e6:.1f} MB: {len(found)} dropped "
            f"({size / 1e6 / seconds:.1f} MB/s); {len(runs)} items share 13 words "
            f"({size / 1e6 / again:.1f} MB/s)"
        )
        for match in found[: options.show]:
            print(f"    {match}")


if __name__ == "__main__":
    main()
