"""Train on a raw, a filtered and a scored corpus, and compare the losses on other text.

    python benchmarks/corpus_ablation.py --books BOOKS.jsonl.gz --model MODEL --output runs/ablation
    python benchmarks/corpus_ablation.py --output runs/ablation --print

The arms differ in the corpus alone: `raw` has neither filters nor deduplication, `filtered` both,
`scored` also drops what the classifier of quality rates lowest. It learns from ratings of MODEL (or
of --ratings FILE; without either there is no such arm). Tokens, shares of the sources, vocabulary,
network and seeds are the same, from recipes/corpus-ablation.yaml. Held-out text is of other authors
and packages, by source, and no filter sees it. The shares of the sources are fixed, so that no
filter wins by making the mixture like the held-out text.

Square brackets hold 95 % intervals over seeds and held-out documents (benchmarks/alignment.py).
A lower number of bits per byte is better. The same command continues where it was interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from alignment import interval
from evidence import documents_in, heldout_documents, interval_plot, raw_text, stage

from openqwen.evaluate.bits_per_byte import bits_per_byte
from openqwen.model import load_model
from openqwen.support.files import read_json, write_json, write_text
from openqwen.tokenizer import load_tokenizer

RECIPE = "corpus-ablation"
RAW = ["--leave-out", "filter", "exact", "near", "paragraphs"]


def make(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Make all corpora and models that are not there, and score them."""
    out: Path = options.output
    raw_text(out, options.books, options.megabytes)
    arms = {"raw": RAW, "filtered": []}
    if options.model or options.ratings:
        ratings = options.ratings or _rate(options, out)
        stage("quality", "--ratings", ratings, "--output", out / "quality")
        keep = [word for name in ("books", "code", "packages") for word in (name, options.keep)]
        arms["scored"] = ["--classifier", out / "quality", "--score.keep", *keep]
    recipe = ["--recipe", options.recipe]
    for arm, flags in arms.items():
        words = ["corpus", *recipe, "--folder", out / "text", *flags]
        stage(*words, "--output", out / arm / "corpus")
    stage("tokenizer", *recipe, "--corpus", out / "raw/corpus", "--output", out / "tokenizer")
    held = heldout_documents(out)
    for arm in arms:
        folder = out / arm
        inputs = ["--corpus", folder / "corpus", "--tokenizer", out / "tokenizer"]
        stage("tokens", *inputs, "--output", folder / "tokens")
        for seed in options.seeds:
            model = folder / f"seed-{seed}"
            words = ["pretrain", *recipe, *inputs, "--tokens", folder / "tokens", "--seed", seed]
            stage(*words, "--output", model, *rest)
            scores = folder / f"seed-{seed}.json"
            if not scores.exists():
                network, tokenizer = load_model(model), load_tokenizer(model)
                found = bits_per_byte(network, tokenizer, held, options.context)
                write_json(scores, {"bits": found.bits, "bytes": found.bytes})


def _rate(options: argparse.Namespace, out: Path) -> Path:
    """Ratings of a sample of the raw documents by the model."""
    share = min(1.0, options.rated / max(1, documents_in(out / "text")))
    words = ["synthesize", "ratings", "--documents", out / "text", "--model", options.model]
    stage(*words, "--share", share, "--output", out / "ratings")
    return out / "ratings/ratings.jsonl"


def tables(out: Path) -> tuple[str, str]:
    """The results as Markdown, and as an SVG."""
    held = heldout_documents(out)
    sources = sorted({document["source"] for document in held})
    found: dict[str, np.ndarray] = {}
    for arm in ("raw", "filtered", "scored"):
        files = sorted((out / arm).glob("seed-*.json"))
        if files:
            found[arm] = np.array([read_json(path)["bits"] for path in files])
    if not found:
        raise SystemExit(f"no finished model in {out}")
    count = min(len(bits_SN) for bits_SN in found.values())
    names = [document["id"] for document in held]
    sizes_N = np.array([float(len(document["text"].encode())) for document in held])
    owner_N = np.array([document["source"] for document in held])
    chosen = {source: owner_N == source for source in sources}

    def per_byte(bits_SN: np.ndarray, source: str) -> tuple[float, float, float]:
        """Bits per byte of a source's documents, or of the mean over sources."""
        if source != "mean":
            mine = chosen[source]
            values = bits_SN[:count, mine] / sizes_N[mine].mean()
            return tuple(interval(values, [n for n, own in zip(names, mine) if own]))
        # Each source has the same weight, however much text of it is held out.
        weights_N = sum(len(names) * m / (len(sources) * sizes_N[m].sum()) for m in chosen.values())
        return tuple(interval(bits_SN[:count] * weights_N, names))

    lines = [f"{count} seeds, {len(names)} held-out documents, bits per byte.", ""]
    lines += ["| held-out text | arm | bits per byte | less than raw | less than filtered |"]
    lines.append("|---|---|---|---|---|")
    rows = []
    for source in [*sources, "mean"]:
        for arm, bits_SN in found.items():
            cells = [source, arm, _told(per_byte(bits_SN, source))]
            for other in ("raw", "filtered"):
                better = other in found and list(found).index(arm) > list(found).index(other)
                gain = found[other][:count] - bits_SN[:count] if better else None
                cells.append("" if gain is None else _told(per_byte(gain, source)))
                if gain is not None and other == "raw":
                    rows.append((f"{source}, {arm}", *per_byte(gain, source)))
            lines.append(f"| {' | '.join(cells)} |")
    title = "Bits per byte saved against the raw corpus (95 % intervals; right is better)"
    return "\n".join(lines), interval_plot(title, rows) if rows else ""


def _told(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, and print the table."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--books", type=Path, nargs="+", default=[])
    parser.add_argument("--megabytes", type=float, default=12, help="most raw text of a source")
    parser.add_argument("--model", help="rates documents")
    parser.add_argument("--ratings", type=Path, help="ratings in place of a model's")
    parser.add_argument("--rated", type=int, default=400, help="documents that the model rates")
    parser.add_argument("--keep", type=float, default=0.6, help="scored: share of a source to keep")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--context", type=int, default=256, help="tokens of a scored window")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--print", action="store_true", help="make nothing")
    options = parser.parse_args(arguments[:cut])
    if not options.print:
        make(options, arguments[cut + 1 :])
    table, plot = tables(options.output)
    print(table)
    if plot:
        write_text(options.output / "ablation.svg", plot)
        print(f"\nplot: {options.output / 'ablation.svg'}")


if __name__ == "__main__":
    main()
