"""`openqwen chat MODEL`: a conversation in the terminal, or through a pipe, one message a line."""

import dataclasses
import json
import os
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import tyro

from openqwen.engine import Engine, EngineConfig, Request, Sampling
from openqwen.model import load_model
from openqwen.model.long_context import context_tokens
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import parse_json, write_json
from openqwen.support.progress import console
from openqwen.support.settings import Quantization
from openqwen.tokenizer import load_tokenizer

_COMMANDS = {
    "help": ("", "this list"),
    "new": ("", "begin a new conversation with the same system prompt"),
    "system": ("[TEXT]", "show or set the system prompt"),
    "set": ("[NAME VALUE]", "show or set the sampling: /set temperature 0.7"),
    "undo": ("", "remove the last message and its answer"),
    "retry": ("", "answer the last message again"),
    "save": ("FILE", "write the conversation as JSON"),
    "load": ("FILE", "continue a saved conversation"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}
_KEYS = (
    'A line that ends in \\ continues in the next one; """ begins and ends a text of many lines; '
    "pasted lines are one message. Ctrl-C stops an answer, Ctrl-D ends the chat."
)
_EXAMPLES = {int: "20", float: "0.7", bool: "true"}  # of values for /set
# Control characters, which would act on the terminal.
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def chat(
    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="A Hugging Face folder, a .gguf file or a hub id.", metavar="MODEL"),
    ],
    system: Annotated[
        str | None, tyro.conf.arg(help="System prompt; default: the checkpoint's.")
    ] = None,
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, tyro.conf.arg(help="Longest answer, in tokens.")] = 1024,
    seed: Annotated[int, tyro.conf.arg(help="Seed of the sampling.")] = 0,
    quantize: Annotated[
        Quantization | None,
        tyro.conf.arg(help="Weights in 8 or 4 bits, quantized while loading."),
    ] = None,
    max_context: Annotated[
        str | None,
        tyro.conf.arg(
            help="Most tokens of a conversation, such as 128k; default: the model's own limit."
        ),
    ] = None,
) -> None:
    """Talk to a model."""
    limit = None if max_context is None else context_tokens(max_context)
    network = load_model(model, device=best_device(), quantize=quantize)
    engine = Engine(network, load_tokenizer(model), EngineConfig(max_context=limit))
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    conversation = Chat(engine, sampling, system)
    with _history():
        if sys.stdin.isatty():
            welcome = f"{Path(model).name}. {_KEYS} /help lists the commands."
            console.print(welcome, style="dim", soft_wrap=False)
        while conversation.turn():
            pass


class Chat:
    """A conversation. messages: in the chat template's form, without the system prompt."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None = None):
        self.engine, self.sampling, self.system = engine, sampling, system
        self.messages: list[dict[str, str]] = []
        self._interactive = sys.stdin.isatty()
        self._answers = 0  # so far; each has a seed of its own
        self._files: set[Path] = set()  # saved or loaded here, so /save may overwrite them

    def turn(self) -> bool:
        """Read a message or a command and answer it; returns False at the end."""
        try:
            text = _read(self._interactive)
        except EOFError:
            if self._interactive:
                console.print()
            return False
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /quit ends the chat.[/dim]")
            return self._interactive
        try:
            if text.startswith("/"):
                return self._command(text[1:])
            if text.strip():
                self._send(text.strip())
        except OpenQwenError as error:
            console.print(str(error), style="red", markup=False)
        return True

    # ---- Answers

    def _send(self, text: str) -> None:
        """Answer a message; a message that the engine refuses is removed."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except OpenQwenError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def _answer(self) -> str:
        """Print an answer while it is generated; returns its text, which Ctrl-C may cut short."""
        seed = self.sampling.seed + self._answers
        request = self.engine.submit(self._with_system(), self.sampling, seed)
        self._answers += 1
        if self._interactive:
            console.print("qwen › ", end="", style="bold")
        answer = ""
        with _ctrl_c() as pressed:
            while request.finish_reason is None:
                if pressed():
                    self.engine.cancel(request)
                for event in self.engine.step():
                    answer += event.text
                    console.print(event.text.translate(_CONTROL), end="", markup=False)
        console.print()
        if self._interactive:
            console.print(f"[dim]{_summary(request)}[/dim]")
        return answer

    def _with_system(self) -> list[dict[str, str]]:
        """The conversation, with the system prompt if there is one."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*start, *self.messages]

    # ---- Commands

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name == "quit":
            return False
        if name not in _COMMANDS:
            what = f"There is no command /{name}.{suggestion(name, _COMMANDS)}"
            raise OpenQwenError(
                what, do="see /help; put a space before a message that begins with /"
            )
        command: Callable[[str], None] = getattr(self, f"_{name}")
        command(rest.strip())
        return True

    def _help(self, _: str) -> None:
        for name, (argument, text) in _COMMANDS.items():
            console.print(f"  {f'/{name} {argument}':<20}{text}", markup=False)
        console.print(_KEYS, soft_wrap=False)

    def _new(self, _: str) -> None:
        self.messages = []

    def _system(self, text: str) -> None:
        if text:
            self.system = text
        else:
            shown = "The checkpoint's own." if self.system is None else self.system
            console.print(shown, markup=False)

    def _set(self, text: str) -> None:
        names = [f.name for f in dataclasses.fields(Sampling) if type(f.default) in _EXAMPLES]
        names.remove("top_logprobs")
        if not text:
            for name in names:
                console.print(f"  {name:<20}{getattr(self.sampling, name)}")
            return
        name, _, value = text.partition(" ")
        if name not in names:
            what = f"There is no setting '{name}'.{suggestion(name, names)}"
            raise OpenQwenError(what, do="/set lists the settings")
        kind = type(getattr(self.sampling, name))
        try:
            parsed = kind(json.loads(value))
        except (ValueError, TypeError):
            do = f"give a value such as {_EXAMPLES[kind]}"
            raise OpenQwenError(f"{name} cannot be '{value}'.", do=do) from None
        self.sampling = dataclasses.replace(self.sampling, **{name: parsed})

    def _undo(self, _: str) -> None:
        if not self.messages:
            raise OpenQwenError("There is no message to remove.")
        while self.messages and self.messages.pop()["role"] != "user":
            pass

    def _retry(self, _: str) -> None:
        if not any(message["role"] == "user" for message in self.messages):
            raise OpenQwenError("There is no message to answer again.")
        kept = list(self.messages)
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        try:
            self.messages.append({"role": "assistant", "content": self._answer()})
        except OpenQwenError:
            self.messages = kept
            raise

    def _save(self, name: str) -> None:
        path = _path(name)
        if path.exists() and path not in self._files:
            raise OpenQwenError("This file exists already.", where=path, do="give another name")
        try:
            write_json(path, {"messages": self._with_system()})
        except OSError as error:
            what = f"This file cannot be written: {error.strerror}."
            raise OpenQwenError(what, where=path) from None
        self._files.add(path)
        console.print(f"[dim]{len(self.messages)} messages written.[/dim]")

    def _load(self, name: str) -> None:
        path = _path(name)
        try:
            messages = parse_json(path.read_bytes())["messages"]
            read = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        except OSError as error:
            what = f"This file cannot be read: {error.strerror}."
            raise OpenQwenError(what, where=path) from None
        except (ValueError, TypeError, KeyError):
            do = 'give a file of {"messages": [{"role": ..., "content": ...}, ...]}'
            raise OpenQwenError("This is not a saved conversation.", where=path, do=do) from None
        self.system = read.pop(0)["content"] if read and read[0]["role"] == "system" else None
        self.messages = read
        self._files.add(path)
        console.print(f"[dim]{len(read)} messages read.[/dim]")


def _summary(request: Request) -> str:
    """The line below an answer, such as `48 tokens · 27.1 tokens/s · first after 0.31 s`."""
    count = len(request.token_ids)
    parts = [f"{count} tokens" if count != 1 else "1 token"]
    end = request.finished or time.monotonic()
    if request.first_token is not None:
        if count > 1 and end > request.first_token:
            parts.append(f"{(count - 1) / (end - request.first_token):.1f} tokens/s")
        parts.append(f"first after {request.first_token - request.arrived:.2f} s")
    if request.cached_tokens:
        cached, prompt = request.cached_tokens, len(request.prompt_ids)
        parts.append(f"{cached:,} of {prompt:,} prompt tokens from the cache")
    ends = {"length": "reached the longest answer (/set max_tokens)", "cancelled": "stopped"}
    if ending := ends.get(request.finish_reason or ""):
        parts.append(ending)
    return " · ".join(parts)


def _path(name: str) -> Path:
    if not name:
        raise OpenQwenError("Which file?", do="/save FILE or /load FILE")
    try:
        return Path(shlex.split(name)[0] if name[0] in "'\"" else name).expanduser()
    except (ValueError, RuntimeError) as error:  # an open quote, an unknown user
        raise OpenQwenError(f"This is not a file name: {error}.", where=name) from None


def _read(interactive: bool) -> str:
    """A message: one line, lines joined by backslashes, pasted lines, or text in triple quotes."""
    line = input("you  › " if interactive else "")
    # Input that follows at once was not typed: it is the rest of a paste.
    while interactive and select.select([sys.stdin], [], [], 0.03)[0]:
        line += "\n" + input()
    more = "…    › " if interactive else ""
    if line.lstrip().startswith('"""'):
        text = line.lstrip()[3:]
        while '"""' not in text:
            text += "\n" + input(more)
        return text.partition('"""')[0].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(more)
    return line


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C without interrupting, so that the engine finishes its step.

    Gives a function that tells whether Ctrl-C was pressed. A second Ctrl-C, more than a second
    later, does interrupt.
    """
    times: list[float] = []

    def record(*_: object) -> None:
        times.append(time.monotonic())
        if times[-1] - times[0] > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, record)
    try:
        yield lambda: bool(times)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _history() -> Iterator[None]:
    """Keep typed lines for the arrow keys of later chats, in a file that only the user reads."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    file = state / "openqwen" / "chat_history"
    readline.set_history_length(1000)
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT, 0o600))
            readline.write_history_file(file)
