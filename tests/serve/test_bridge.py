"""The engine's thread: no failure of it goes unnoticed, and a panic of a library fails one request
alone.
"""

import asyncio
from types import SimpleNamespace

import pytest

from openqwen.engine import Sampling, Stats
from openqwen.http.errors import ApiError
from openqwen.serve.app import application
from openqwen.serve.bridge import Bridge


class Panic(BaseException):
    """As libraries in Rust raise it."""


class Engine:
    """Takes a request, and fails at the first step."""

    busy, version, adapters, tokenizer = (
        False,
        0,
        SimpleNamespace(names=[]),
        SimpleNamespace(info=dict),
    )

    def submit_many(self, prompt, sampling, n, adapter, priority):
        if prompt == [0]:
            raise Panic("grammar")
        self.busy = True
        return [SimpleNamespace(finish_reason=None)]

    def step(self):
        raise Panic("step")

    def stats(self):
        return Stats()


METRICS = SimpleNamespace(update=lambda stats: None, finished=lambda *_: None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_panic_fails_its_request_and_the_end_of_the_thread_is_told(tmp_path):
    async def go():
        failed = asyncio.Event()
        bridge = Bridge(Engine(), METRICS, 8, 60.0, failed.set)
        with pytest.raises(RuntimeError, match="grammar"):
            await bridge.submit([([0], Sampling(), 1)])
        assert bridge.fault is None
        answers = await bridge.submit([([1], Sampling(), 1)])
        with pytest.raises(ApiError, match="The engine has failed: Panic"):
            async for _ in answers:
                pass
        await asyncio.wait_for(failed.wait(), 10)
        with pytest.raises(ApiError) as refused:
            await bridge.submit([([1], Sampling(), 1)])
        assert refused.value.status == 503
        return await health(bridge)

    status, body = asyncio.run(go())
    assert status == 503
    assert body["status"] == "failed"
    assert "The engine has failed: Panic." in body["reason"]
    assert "Batches" in body["reason"]


async def health(bridge):
    import httpx

    api = SimpleNamespace(
        bridge=bridge, tokenizer=bridge.engine.tokenizer, adapters=[], names=["m"]
    )
    for name in (
        "chat",
        "complete",
        "embed",
        "score",
        "tokenize",
        "detokenize",
        "template",
        "update_weights",
    ):
        setattr(api, name, None)
    batches = SimpleNamespace(fault="Batches are no longer processed: TypeError.")
    for name in ("file", "delete", "batch", "cancel", "add_batch"):
        setattr(batches, name, None)
    app = application(api, batches, None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        answer = await http.get("/health")
        return answer.status_code, answer.json()
