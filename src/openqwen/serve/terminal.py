"""`openqwen chat MODEL`: a conversation in the terminal, streamed; from a pipe too, a message a
line.
"""

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
from typing import Annotated, Literal

import tyro

from openqwen.engine import Engine, EngineConfig, Request, Sampling
from openqwen.model import load_model
from openqwen.model.long_context import context_tokens
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import parse_json, write_json
from openqwen.support.progress import console
from openqwen.tokenizer import load_tokenizer

_COMMANDS = {
    "help": ("", "this list"),
    "new": ("", "begin afresh, with the same system prompt"),
    "system": ("[TEXT]", "show or set the system prompt"),
    "set": ("[NAME VALUE]", "show or set how answers are made: /set temperature 0.7"),
    "undo": ("", "take back the last message and its answer"),
    "retry": ("", "answer the last message anew"),
    "save": ("FILE", "write the conversation as JSON"),
    "load": ("FILE", "go on with a saved conversation"),
    "quit": ("", "end, as Ctrl-D does"),
}
_KEYS = (
    'A line that ends in \\ goes on in the next; """ begins and ends a text of many lines; pasted '
    "lines are one "
    "message. Ctrl-C stops an answer, Ctrl-D ends the chat."
)
_EXAMPLES = {int: "20", float: "0.7", bool: "true"}  # of what /set takes
_UNSEEN = {
    code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"
}  # no steering of terminals


def chat(
    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="A Hugging Face folder, a .gguf file or a hub id.", metavar="MODEL"),
    ],
    system: Annotated[
        str | None, tyro.conf.arg(help="System prompt; none: the checkpoint's own.")
    ] = None,
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, tyro.conf.arg(help="Longest answer, in tokens.")] = 1024,
    seed: Annotated[int, tyro.conf.arg(help="Of the sampling.")] = 0,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        tyro.conf.arg(help="Weights in 8 or 4 bits, packed while loading."),
    ] = None,
    max_context: Annotated[
        str | None,
        tyro.conf.arg(
            help="Tokens of the whole conversation, such as 128k; none: as the model says."
        ),
    ] = None,
) -> None:
    """Talk to a model."""
    most = None if max_context is None else context_tokens(max_context)
    network = load_model(model, device=best_device(), quantize=quantize)
    engine = Engine(network, load_tokenizer(model), EngineConfig(max_context=most))
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    talk = Chat(engine, sampling, system)
    with _history():
        if sys.stdin.isatty():
            console.print(
                f"{Path(model).name}. {_KEYS} /help lists commands.", style="dim", soft_wrap=False
            )
        while talk.turn():
            pass


class Chat:
    """A conversation. messages: as the chat template reads them, without the system prompt."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None = None):
        self.engine, self.sampling, self.system = engine, sampling, system
        self.messages: list[dict[str, str]] = []
        self._typed = sys.stdin.isatty()
        self._answers: list[Request] = []
        self._files: set[Path] = set()  # that may be written over

    def turn(self) -> bool:
        """Read a message or a command and do it; False at the end."""
        try:
            text = _read(self._typed)
        except EOFError:
            if self._typed:
                console.print()
            return False
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /quit ends the chat.[/dim]")
            return self._typed
        try:
            if text.startswith("/"):
                return self._command(text[1:])
            if text.strip():
                self._ask(text.strip())
        except OpenQwenError as error:
            console.print(str(error), style="red", markup=False)
        return True

    # ---- Answers

    def _ask(self, text: str) -> None:
        """Answer a message; one that cannot be answered is taken back."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except OpenQwenError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def _answer(self) -> str:
        """Print an answer as it comes; returns what was written, all of it or up to Ctrl-C."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        seed = self.sampling.seed + len(self._answers)
        request = self.engine.submit([*start, *self.messages], self.sampling, seed)
        self._answers.append(request)
        if self._typed:
            console.print("qwen › ", end="", style="bold")
        said = ""
        with _ctrl_c() as pressed:
            while request.finish_reason is None:
                if pressed():
                    self.engine.cancel(request)
                for event in self.engine.step():
                    said += event.text
                    console.print(event.text.translate(_UNSEEN), end="", markup=False)
        console.print()
        if self._typed:
            console.print(f"[dim]{_facts(request)}[/dim]")
        return said

    # ---- Commands

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name == "quit":
            return False
        if name not in _COMMANDS:
            near = suggestion(name, _COMMANDS)
            raise OpenQwenError(
                f"There is no command /{name}.{near}", do="/help; a message may begin with a space"
            )
        act: Callable[[str], None] = getattr(self, f"_{name}")
        act(rest.strip())
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
            console.print(
                "The checkpoint's own." if self.system is None else self.system, markup=False
            )

    def _set(self, text: str) -> None:
        names = [f.name for f in dataclasses.fields(Sampling) if type(f.default) in _EXAMPLES]
        names.remove("top_logprobs")
        if not text:
            for name in names:
                console.print(f"  {name:<20}{getattr(self.sampling, name)}")
            return
        name, _, value = text.partition(" ")
        if name not in names:
            raise OpenQwenError(
                f"There is no setting '{name}'.{suggestion(name, names)}", do="/set lists them"
            )
        kind = type(getattr(self.sampling, name))
        try:
            parsed = kind(json.loads(value))
        except (ValueError, TypeError):
            raise OpenQwenError(
                f"{name} cannot be '{value}'.", do=f"give one like {_EXAMPLES[kind]}"
            ) from None
        self.sampling = dataclasses.replace(self.sampling, **{name: parsed})

    def _undo(self, _: str) -> None:
        if not self.messages:
            raise OpenQwenError("There is nothing to take back.")
        while self.messages and self.messages.pop()["role"] != "user":
            pass

    def _retry(self, _: str) -> None:
        if not self.messages:
            raise OpenQwenError("There is no message to answer anew.")
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
            raise OpenQwenError("There is such a file already.", where=path, do="give another name")
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            write_json(path, {"messages": [*start, *self.messages]})
        except OSError as error:
            raise OpenQwenError(f"It cannot be written: {error.strerror}.", where=path) from None
        self._files.add(path)
        console.print(f"[dim]{len(self.messages)} messages written.[/dim]")

    def _load(self, name: str) -> None:
        path = _path(name)
        try:
            messages = parse_json(path.read_bytes())["messages"]
            read = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        except OSError as error:
            raise OpenQwenError(f"It cannot be read: {error.strerror}.", where=path) from None
        except (ValueError, TypeError, KeyError):
            need = 'it must hold {"messages": [{"role": ..., "content": ...}, ...]}'
            raise OpenQwenError("This is no saved conversation.", where=path, do=need) from None
        self.system = read.pop(0)["content"] if read and read[0]["role"] == "system" else None
        self.messages = read
        self._files.add(path)
        console.print(f"[dim]{len(read)} messages read.[/dim]")


def _facts(request: Request) -> str:
    """`48 tokens · 27.1 tokens/s · first after 0.31 s`."""
    count = len(request.token_ids)
    parts = [f"{count} tokens" if count != 1 else "1 token"]
    end = request.finished or time.monotonic()
    if request.first_token is not None:
        if count > 1 and end > request.first_token:
            parts.append(f"{(count - 1) / (end - request.first_token):.1f} tokens/s")
        parts.append(f"first after {request.first_token - request.arrived:.2f} s")
    if request.cached_tokens:
        parts.append(
            f"{request.cached_tokens:,} of {len(request.prompt_ids):,} prompt tokens were in "
            "the cache"
        )
    ends = {"length": "the longest answer (/set max_tokens)", "cancelled": "stopped"}
    return " · ".join([*parts, *filter(None, [ends.get(request.finish_reason or "")])])


def _path(name: str) -> Path:
    if not name:
        raise OpenQwenError("Which file?", do="/save FILE or /load FILE")
    return Path(shlex.split(name)[0] if name[0] in "'\"" else name).expanduser()


def _read(typed: bool) -> str:
    """A message: one line, several joined by backslashes or pasted at once, or a text between
    triple quotes.
    """
    line = input("you  › " if typed else "")
    while (
        typed and select.select([sys.stdin], [], [], 0.03)[0]
    ):  # nobody types so fast: the rest of a paste
        line += "\n" + input()
    more = "…    › " if typed else ""
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
    """Within it Ctrl-C breaks nothing off but is noted: the engine ends its step.

    A second one interrupts.
    """
    times: list[float] = []

    def note(*_: object) -> None:
        times.append(time.monotonic())
        if len(times) > 1 and times[-1] - times[0] > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(times)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _history() -> Iterator[None]:
    """Lines typed in earlier chats under the arrow keys, from a file that only the user reads."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    file = (
        Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        / "openqwen"
        / "chat_history"
    )
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
