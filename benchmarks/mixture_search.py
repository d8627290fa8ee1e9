"""Search a mixture with several seeds, and print what was predicted and what was measured.

    python benchmarks/mixture_search.py --books BOOKS.jsonl.gz --output runs/mixture
    python benchmarks/mixture_search.py --output runs/mixture --print

Each search is `openqwen corpus-mix` (recipes/corpus-mix.yaml) over books, code and the other text
of installed packages: random mixtures, a regression, a proposal. The proposal and the natural
mixture are then trained with seeds that the search has not seen. The gain is the natural mixture's
mean held-out loss minus the proposal's; its interval is Student's over the searches. What stands
behind `--` goes to `openqwen corpus-mix`. The same command continues where it was interrupted.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from alignment import t_quantile
from evidence import interval_plot, raw_text, stage

from openqwen.support.files import read_json, write_text


def make(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Make the corpus once, and a search for each seed."""
    out, recipe = options.output, ["--recipe", options.recipe]
    raw_text(out, options.books, options.megabytes)
    stage("corpus", *recipe, "--folder", out / "text", "--output", out / "corpus")
    stage("tokenizer", *recipe, "--corpus", out / "corpus", "--output", out / "tokenizer")
    inputs = ["--corpus", out / "corpus", "--tokenizer", out / "tokenizer"]
    stage("tokens", *inputs, "--output", out / "tokens")
    for seed in options.seeds:
        words = ["corpus-mix", *recipe, *inputs, "--tokens", out / "tokens", "--seed", seed * 1_000]
        stage(*words, "--output", out / f"seed-{seed}", *rest)


def tables(out: Path) -> tuple[str, str]:
    """The results as Markdown, and as an SVG."""
    found = [read_json(path) for path in sorted(out.glob("seed-*/mixture.json"))]
    if not found:
        raise SystemExit(f"no finished search in {out}")
    sources = found[0]["sources"]
    lines = [f"| search | mixture | {' | '.join(sources)} | mean: predicted | measured |"]
    lines.append(f"|---|---|{'---|' * len(sources)}---|---|")
    gains, predicted = [], []
    for number, result in enumerate(found, 1):
        for name in ("natural", "proposed"):
            entry = result[name]
            weights = [f"{weight:.3f}" for weight in entry["weights"]]
            means = entry["measured_means"]
            cells = [str(number), name, *weights, f"{entry['predicted_mean']:.4f}"]
            told = ", ".join(f"{mean:.4f}" for mean in means)
            lines.append(f"| {' | '.join(cells)} | {np.mean(means):.4f} ({told}) |")
        natural, proposed = (result[name] for name in ("natural", "proposed"))
        gains.append(np.mean(natural["measured_means"]) - np.mean(proposed["measured_means"]))
        predicted.append(natural["predicted_mean"] - proposed["predicted_mean"])
    lines += [
        "",
        "| search | source | leave-one-out error | rank correlation |",
        "|---|---|---|---|",
    ]
    for number, result in enumerate(found, 1):
        for source, fit in result["fits"].items():
            lines.append(f"| {number} | {source} | {fit['error']:.4f} | {fit['rank']:.2f} |")
    mean, half = float(np.mean(gains)), 0.0
    if len(gains) > 1:
        half = t_quantile(len(gains) - 1) * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    each = ", ".join(f"{gain:.4f}" for gain in gains)
    ends = f" [{mean - half:.4f}, {mean + half:.4f}]" if half else ""
    lines += ["", f"Gain of the proposal, nats per token: {mean:.4f}{ends} ({each}); predicted "]
    lines[-1] += f"{np.mean(predicted):.4f}."
    rows = [(f"search {n}", gain, gain, gain) for n, gain in enumerate(gains, 1)]
    rows += [("mean", mean, mean - half, mean + half)]
    rows += [("predicted", *[float(np.mean(predicted))] * 3)]
    title = "Held-out loss saved by the proposed mixture, nats per token (95 % interval)"
    return "\n".join(lines), interval_plot(title, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, and print the tables."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--books", type=Path, nargs="+", default=[])
    parser.add_argument("--megabytes", type=float, default=12, help="most raw text of a source")
    parser.add_argument("--recipe", default="corpus-mix")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--print", action="store_true", help="make nothing")
    options = parser.parse_args(arguments[:cut])
    if not options.print:
        make(options, arguments[cut + 1 :])
    table, plot = tables(options.output)
    print(table)
    write_text(options.output / "mixture.svg", plot)
    print(f"\nplot: {options.output / 'mixture.svg'}")


if __name__ == "__main__":
    main()
