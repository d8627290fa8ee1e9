"""The tiny model, a server for most tests, and servers with flags of a test's own."""

import signal
from pydoc_data.topics import topics

import pytest
from serving import Server, save

from openqwen.model import Qwen2, Scorer
from openqwen.tokenizer import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(
        [topics[name] for name in sorted(topics)[:40]], TokenizerConfig(vocabulary=600)
    )


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    return save(Qwen2, tmp_path_factory.mktemp("models") / "tiny", tokenizer, 0)


@pytest.fixture(scope="session")
def reward(tokenizer, tmp_path_factory):
    return save(Scorer, tmp_path_factory.mktemp("models") / "reward", tokenizer, 1)


@pytest.fixture(scope="session")
def server(tiny, reward):
    """The one that most tests talk to."""
    running = Server(tiny, "--reward", reward, "--queue", "64")
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log, running.log


@pytest.fixture
def start():
    """Start servers with flags of a test's own."""
    running = []

    def make(*arguments, **environment):
        running.append(Server(*arguments, **environment))
        return running[-1]

    yield make
    for one in running:
        if one.process.poll() is None:
            one.stop(signal.SIGKILL)


@pytest.fixture
def client(server):
    return server.client()
