"""`openqwen preview`: what SFT would learn from a file of demonstrations, token by token."""

from codecs import getincrementaldecoder
from pathlib import Path

import numpy as np
from rich.text import Text

from openqwen.support.progress import console, progress
from openqwen.support.records import read_records
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.conversations import encode_demonstration
from openqwen.train.packed_batch import Sample
from openqwen.train.packing import waste

# Two styles in turn, so that neighbouring tokens can be told apart.
_LEARNED = ("black on green", "black on bright_green")
_READ = ("default", "bright_black")


def preview(model: Path, demonstrations: Path, show: int = 3, max_length: int = 32_768) -> None:
    """Show the first demonstrations, learned tokens in green, and counts over the whole file.

    Args:
        model: The model's folder, for its tokenizer and chat template.
        demonstrations: A JSONL, JSON or Parquet file of demonstrations, or hub:owner/name:split.
        show: How many of them to show.
        max_length: The longest conversation that fits, in tokens.
    """
    tokenizer = load_tokenizer(model)
    lengths: list[int] = []
    learned: list[int] = []
    with progress("read", unit="records") as bar:
        for number, (where, record) in enumerate(read_records(demonstrations), 1):
            ids, mask = encode_demonstration(tokenizer, record, where)
            if number <= show:
                title = f"record {number}: {len(ids)} tokens, {sum(mask)} learned"
                console.rule(title, align="left")
                console.print(colored(tokenizer, (ids, mask)))
            lengths.append(len(ids))
            learned.append(sum(mask))
            bar.advance()
    if not lengths:
        console.print("The file holds no demonstration.")
        return
    console.rule(f"{len(lengths):,} demonstrations", align="left")
    low, middle, high = np.percentile(lengths, [5, 50, 95]).astype(int)
    fitting = [n for n in lengths if n <= max_length]
    console.print(
        f"tokens     {sum(lengths):,}, of which {sum(learned):,} learned "
        f"({sum(learned) / sum(lengths):.0%})"
    )
    console.print(
        f"lengths    {low:,} to {high:,} for nine of ten, half below {middle:,}, longest "
        f"{max(lengths):,}"
    )
    console.print(f"too long   {len(lengths) - len(fitting):,} over {max_length:,} tokens")
    console.print(
        f"packing    {waste(fitting, max_length):.2%} of the places in rows of {max_length:,}"
        " tokens stay empty"
    )


def colored(tokenizer: Tokenizer, sample: Sample) -> Text:
    """A conversation as text, learned tokens on green; neighbouring tokens differ in shade.

    A character that several tokens make up has the colour of the last one.
    """
    text, decoder = Text(), getincrementaldecoder("utf-8")(errors="replace")
    for number, (i, learn) in enumerate(zip(*sample, strict=True)):
        piece = decoder.decode(tokenizer.token_bytes(int(i)))
        if learn:
            piece = piece.replace("\n", "⏎\n")
        text.append(piece, style=(_LEARNED if learn else _READ)[number % 2])
    return text
