"""Append-only files of JSON lines that survive a kill: finished calls, and finished items."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from openqwen.engine import Output, Prompt, Sampling
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import parse_json

_FLUSH = 5.0  # seconds between two flushes to the disk; a kill loses nothing, a power cut this much


class Journal:
    """A file of JSON lines that one process appends to.

    A line that a kill or a full disk cut short is removed when the file is opened again.

    Args:
        path: the file; it need not exist.
        flush: seconds between two flushes to the disk; with 0 each line is flushed.

    Raises:
        OpenQwenError: another process has opened the file, or there is no space left.
    """

    def __init__(self, path: Path, flush: float = _FLUSH):
        self.path, self.flush = path, flush
        with disk_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = FileIO(path, "a+")
            except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
                what = f"This file cannot be written: {e.strerror}."
                raise OpenQwenError(what, path, "choose another one") from None
        try:
            # Of this open file, not of the process: closing another handle must not release it.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            what = "Another run writes to this file."
            raise OpenQwenError(what, path, "wait for it, or choose another folder") from None
        self._reader = BufferedReader(FileIO(path))
        self._end = self._file.seek(0, os.SEEK_END)
        self._flushed = time.monotonic()

    @property
    def empty(self) -> bool:
        """Whether nothing was written yet."""
        return self._end == 0

    def lines(self) -> Iterator[tuple[int, Any]]:
        """Yield each line's place and value, None where the line is damaged."""
        place = 0
        while place < self._end:
            self._reader.seek(place)
            line = self._reader.readline()
            if not line.endswith(b"\n"):
                break
            try:
                value = parse_json(line)
            except ValueError:
                value = None
            yield place, value
            place += len(line)
        if place < self._end:
            self.cut(place)

    def cut(self, place: int) -> None:
        """Remove every line from a place on."""
        self._file.truncate(place)
        self._end = place
        self._reader = BufferedReader(FileIO(self.path))  # the old one may hold removed bytes

    def read(self, place: int) -> Any:
        """The value of the line at a place."""
        self._reader.seek(place)
        return parse_json(self._reader.readline())

    def append(self, value: Any) -> int:
        """Write a line, and return its place."""
        # A lone surrogate, half of a character, becomes "?": no reader would take it.
        data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        place = self._end
        with disk_errors(self.path):
            try:
                while data:
                    data = data[self._file.write(data) :]
                if time.monotonic() - self._flushed >= self.flush:
                    os.fsync(self._file.fileno())
                    self._flushed = time.monotonic()
            except OSError:
                self.cut(place)
                raise
        self._end = self._file.seek(0, os.SEEK_END)
        return place

    def close(self) -> None:
        """Flush to the disk and release the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
            self._reader.close()


@dataclass(frozen=True)
class ModelCall:
    """One request to a generator.

    by: which of the run's generators answers. seed: without effect where sampling is greedy.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    by: str = "model"

    def key(self, identity: str) -> str:
        """What the answer depends on, as a hash. identity: of the model."""
        how = asdict(self.sampling) | {"seed": 0 if self.sampling.greedy else self.seed}
        text = json.dumps([identity, self.prompt, how], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class CallLog:
    """Finished calls by key, in a file that later runs may share.

    An answer is kept as its text, token ids and ending, without the prompt and the answer's
    log-probabilities: a call that is repeated and one that is read give the method the same output.
    """

    def __init__(self, path: Path):
        self._journal = Journal(path)
        self._places: dict[bytes, int] = {}  # 16 bytes a call: a million fit into memory
        for place, line in self._journal.lines():
            if isinstance(line, dict) and "key" in line:
                self._places[bytes.fromhex(line["key"])] = place
            elif place == 0:
                self._journal.close()
                raise OpenQwenError("This is no log of calls.", path, "choose another file")

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> tuple[Output, int] | None:
        """The output of a finished call, and the tokens of its prompt and answer."""
        place = self._places.get(bytes.fromhex(key))
        return None if place is None else _output(self._journal.read(place))

    def keep(self, key: str, prompt: Prompt, output: Output) -> tuple[Output, int]:
        """Write a finished call; returns what `get` will return."""
        line: dict[str, Any] = {"key": key, "text": output.text, "ids": output.token_ids}
        line |= {"finish": output.finish_reason, "stop_id": output.stop_id}
        line["tokens"] = _tokens(prompt, output)
        if output.prompt_logprobs:
            line["prompt_logprobs"] = [max(value, -1e30) for value in output.prompt_logprobs]
        place = self._places[bytes.fromhex(key)] = self._journal.append(line)
        return _output(self._journal.read(place))

    def close(self) -> None:
        """Flush to the disk and release the file."""
        self._journal.close()


def _output(line: dict[str, Any]) -> tuple[Output, int]:
    output = Output(line["text"], list(line["ids"]), [], line["finish"], stop_id=line["stop_id"])
    output.prompt_logprobs = list(line.get("prompt_logprobs", ()))
    return output, line["tokens"]


def _tokens(prompt: Prompt, output: Output) -> int:
    """Tokens of prompt and answer; about a third of the characters where none were reported."""
    asked = len(output.prompt_ids) or len(json.dumps(prompt, ensure_ascii=False)) // 3
    return asked + (len(output.written_ids) or len(output.text) // 3)
