"""`openqwen chat MODEL`: a conversation in the terminal, streamed."""

from typing import Annotated

import tyro

from openqwen.engine import Engine, Sampling
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.progress import console
from openqwen.tokenizer import StreamDecoder, load_tokenizer

_HELP = "An empty line or Ctrl-D ends the chat, Ctrl-C stops an answer; /new starts afresh."


def chat(
    model: Annotated[str, tyro.conf.arg(help="A Hugging Face folder, a .gguf file or a hub id.", metavar="MODEL")],
    system: Annotated[str | None, tyro.conf.arg(help="System prompt; none: the checkpoint's own.")] = None,
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, tyro.conf.arg(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, tyro.conf.arg(help="Of the sampling.")] = 0,
) -> None:
    """Talk to a model."""
    tokenizer = load_tokenizer(model)
    engine = Engine(load_model(model, device=best_device()), tokenizer)
    start = [{"role": "system", "content": system}] if system is not None else []
    messages = list(start)
    console.print(f"[dim]{model}. {_HELP}[/dim]")
    while True:
        try:
            line = input("you  › ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line:
            return
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed + len(messages))
        messages.append({"role": "assistant", "content": _answer(engine, messages, sampling)})


def _answer(engine: Engine, messages: list[dict[str, str]], sampling: Sampling) -> str:
    """Print an answer as it comes; returns what was written, all of it or up to Ctrl-C."""
    decoder, said = StreamDecoder(engine.tokenizer), ""
    console.print("qwen › ", end="")
    try:
        for token in engine.stream(messages, sampling):
            piece = decoder.push(token)
            said += piece
            console.print(piece, end="", markup=False)
        rest = decoder.finish()
        said += rest
        console.print(rest, markup=False)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]")
    return said
