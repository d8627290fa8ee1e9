"""A server that misbehaves on demand, for the tests of `Endpoint`."""

import pytest

from hostile import Hostile
from openqwen.support import retry


@pytest.fixture
def quick(monkeypatch):
    """Short waits, and no key of the environment."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server(quick):
    server = Hostile()
    yield server
    server.shutdown()
    server.server_close()
