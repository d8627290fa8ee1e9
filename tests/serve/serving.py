"""A tiny random model on the disk, and a server of it in a process of its own, on a free port."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import torch
from forks import Fork

from openqwen.model import ModelConfig, initialize, save_checkpoint

CONTEXT = 1024


def save(kind, folder, tokenizer, seed):
    config = ModelConfig(
        tokenizer.vocab_size,
        32,
        48,
        2,
        4,
        2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model = kind(config)
    initialize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # sharper than a fresh network, so that answers differ
        for parameter in model.parameters():
            parameter.mul_(4.0)
    save_checkpoint(model, tokenizer, folder)
    return folder


class Server:
    """A running `openqwen serve`, ended by its process id. forked: begun with all imported; else by
    its command.
    """

    def __init__(self, *arguments, forked=True, **environment):
        port = () if "--port" in arguments else ("--port", "0")
        words = ["serve", *map(str, (*arguments, *port))]
        source = str(Path(__file__).parents[2] / "src")
        variables = (
            os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source, "COLUMNS": "500"}
            | environment
        )
        self._output, written = os.pipe()
        os.set_blocking(self._output, False)
        if forked:
            self.process = Fork(words, variables, None, written)
        else:
            command = [sys.executable, "-m", "openqwen.cli", *words]
            self.process = subprocess.Popen(command, stdout=written, stderr=written, env=variables)
        os.close(written)
        self.log = ""
        self.url = self._wait_for(r"(http://\S+)$").group(1)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for(self, pattern, seconds=90):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            select.select([self._output], [], [], 0.2)
            self._read()
            if found := re.search(pattern, self.log, re.MULTILINE):
                return found
            if self.process.poll() is not None:
                break
        raise AssertionError(f"the server did not start:\n{self.log}")

    def client(self, key="none", **options):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options
        )

    def metric(self, name):
        text = self.http.get("/metrics").text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if re.match(rf"{name}[{{ ]", line)
        )

    def settles(self, name, value, seconds=30):
        """Whether a metric comes to a value, or to where a function of it is true."""
        good = value if callable(value) else lambda seen: seen == value
        end = time.monotonic() + seconds
        while not good(self.metric(name)):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def stop(self, number=signal.SIGTERM, seconds=60):
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(seconds)
        finally:
            self.process.kill()
        self._read()
        os.close(self._output)
        return self.process.wait()

    def _read(self):
        """Add what the server has printed since to the log."""
        with suppress(BlockingIOError):
            while part := os.read(self._output, 65536):
                self.log += part.decode()
