"""`openqwen chat` as a person uses it, in a pseudo-terminal, and as a script does, through a
pipe.
"""

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from codecs import getincrementaldecoder
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from forks import Fork

from openqwen.engine import Engine, Sampling
from openqwen.model import ModelConfig, Qwen2, initialize, load_model, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

SOURCE = Path(__file__).parents[2] / "src"
COMMAND = [sys.executable, "-m", "openqwen.cli", "chat"]
PROMPT = "you  › "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that talks without end, in short words and many."""
    tokenizer = train_tokenizer(
        [topics[name] for name in sorted(topics)[:10]], TokenizerConfig(vocabulary=400)
    )
    config = ModelConfig(
        tokenizer.vocab_size,
        32,
        48,
        2,
        4,
        2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    network = Qwen2(config)
    initialize(network, torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_checkpoint(network, tokenizer, folder)
    return folder


def environment(state):
    return os.environ | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(state),
        "TERM": "xterm",
        "COLUMNS": "200",
        "LINES": "50",
        "PYTHONIOENCODING": "utf-8",
    }


class Terminal:
    """A chat under a pseudo-terminal: what it shows, without colours, and keys for it."""

    def __init__(self, model, state, *arguments):
        self.shown, self.decoder = "", getincrementaldecoder("utf-8")()
        self.keys, other = pty.openpty()
        self.process = Fork(["chat", str(model), *arguments], environment(state), other, other)
        os.close(other)

    def until(self, text, seconds=60):
        """Wait for a text to be shown after what was seen before; returns all up to it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} did not come: {self.shown[-2000:]!r}"
            if select.select([self.keys], [], [], 0.1)[0]:
                try:
                    data = self.decoder.decode(os.read(self.keys, 65536))
                except OSError:
                    data = ""
                self.shown += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", data)
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.keys, text.encode())

    def say(self, line):
        """Type a line when asked for one; returns what is shown until the next is asked for."""
        self.type(line + "\n")
        return self.until(PROMPT)

    def end(self):
        self.type("\x04")
        return self.process.wait(30)

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.keys)


@pytest.fixture(scope="module")
def only(model, tmp_path_factory):
    """One chat for the tests that need none of their own."""
    terminal = Terminal(model, tmp_path_factory.mktemp("state"))
    terminal.until(PROMPT)
    yield terminal
    terminal.close()


@pytest.fixture
def terminal(only):
    """That chat, as if it had just begun."""
    only.say("/new")
    for setting in ("temperature 0", "max_tokens 6", "top_k 0"):
        only.say(f"/set {setting}")
    return only


def expected(model, messages, **options):
    """What the engine says to the messages, asked directly."""
    engine = Engine(load_model(model), load_tokenizer(model))
    return engine.generate([messages], Sampling(**options))[0].text


def test_answers_are_the_engine_s(terminal, model, tmp_path):
    terminal.say("/system Be brief.")
    terminal.say("/set max_tokens 12")
    shown = terminal.say("Hello")
    assert re.search(r"\d+ tokens? · \d+\.\d tokens/s · first after \d+\.\d\d s", shown)
    terminal.say(f"/save {tmp_path}/talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"] == expected(model, saved[:2], max_tokens=12)


def test_many_lines(terminal, tmp_path):
    terminal.type("one\\\n")
    terminal.until("… ")
    terminal.say("two")
    terminal.type('"""first\n')
    terminal.until("… ")
    terminal.type("\n")
    terminal.until("… ")
    terminal.say('/last"""')
    terminal.type("pasted\nat once\n")
    terminal.until(PROMPT)
    terminal.say(f"/save {tmp_path}/talk.json")
    said = [
        m["content"]
        for m in json.loads((tmp_path / "talk.json").read_text())["messages"]
        if m["role"] == "user"
    ]
    assert said == ["one\ntwo", "first\n\n/last", "pasted\nat once"]


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, tmp_path):
    terminal.say("/set max_tokens 3900")
    terminal.type("Talk\n")
    terminal.until("qwen › ")
    time.sleep(1)
    terminal.type("\x03")
    assert "stopped" in terminal.until(PROMPT)
    terminal.say("/set max_tokens 5")
    assert "5 tokens" in terminal.say("And now?")
    terminal.say(f"/save {tmp_path}/talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    talk = [m for m in saved if m["role"] != "system"]
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2
    assert talk[1]["content"]
    terminal.type("half a line\x03")
    terminal.until("Ctrl-D or /quit ends the chat.")
    terminal.until(PROMPT)


def test_commands(terminal, tmp_path):
    terminal.say("/set temperature 1")
    assert "/retry" in terminal.say("/help")
    assert "There is no command /sit. Did you mean 'set'?" in terminal.say("/sit")
    assert "temperature         1.0" in terminal.say("/set")
    assert "temperature cannot be 'hot'" in terminal.say("/set temperature hot")
    assert "temperature cannot be -1" in terminal.say("/set temperature -1")
    assert "There is no setting 'topk'. Did you mean 'top_k'?" in terminal.say("/set topk 5")
    terminal.say("/set top_k 7")
    assert "top_k               7" in terminal.say("/set")
    assert "There is no message to remove." in terminal.say("/undo")
    terminal.say("/system Be kind.")
    assert "Be kind." in terminal.say("/system")
    first = terminal.say("Hello")
    second = terminal.say("/retry")
    assert (
        first.partition("qwen › ")[2].partition("\n")[0]
        != second.partition("qwen › ")[2].partition("\n")[0]
    )
    terminal.say("Another")
    terminal.say("/undo")
    file = tmp_path / "with space.json"
    assert "2 messages written" in terminal.say(f'/save "{file}"')
    assert "This is not a file name: No closing quotation." in terminal.say('/save "foo')
    assert "This is not a file name" in terminal.say("/load ~nobody-here/x")
    terminal.say("/new")
    assert "There is no message to remove." in terminal.say("/undo")
    assert "There is no message to answer again." in terminal.say("/retry")
    assert "This file exists already." in terminal.say(f"/save {SOURCE}/openqwen/cli.py")
    assert "This is not a saved conversation." in terminal.say(f"/load {SOURCE}/openqwen/cli.py")
    assert "This file cannot be read: No such file or directory." in terminal.say("/load /nowhere")
    assert "2 messages read" in terminal.say(f'/load "{file}"')
    assert "Be kind." in terminal.say("/system")


def test_lines_are_there_in_the_next_chat(model, tmp_path):
    terminal = Terminal(model, tmp_path, "--max-tokens", "3", "--max-context", "64")
    terminal.until(PROMPT)
    assert "The checkpoint's own." in terminal.say("/system")
    terminal.say("a line to remember")
    too_long = terminal.say("word " * 60)  # is said, and taken back
    assert "do:" in too_long
    terminal.say("/undo")
    assert "There is no message to remove." in terminal.say("/undo")
    terminal.type("/quit\n")
    assert terminal.process.wait(30) == 0
    terminal.close()
    file = tmp_path / "openqwen/chat_history"
    assert "a line to remember" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    terminal = Terminal(model, tmp_path, "--max-tokens", "3")
    terminal.until(PROMPT)
    terminal.type("\x12remember\r")  # Ctrl-R searches
    terminal.until("3 tokens")
    terminal.until(PROMPT)
    assert terminal.end() == 0
    terminal.close()


def test_through_a_pipe(model, tmp_path):
    done = subprocess.run(
        [*COMMAND, str(model), "--max-tokens", "8"],
        input='Hello\n"""two\nlines"""\n',
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=True,
    )
    first = expected(model, [{"role": "user", "content": "Hello"}], max_tokens=8)
    turns = [("user", "Hello"), ("assistant", first), ("user", "two\nlines")]
    second = expected(
        model, [{"role": role, "content": text} for role, text in turns], max_tokens=8
    )
    printable = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text) for text in (first, second)]
    assert done.stdout == "\n".join([*printable, ""])
    assert not (tmp_path / "openqwen").exists()
