"""Limits on work in progress."""

import asyncio

import pytest

from openqwen.http.errors import ApiError
from openqwen.http.limits import ConcurrencyLimit, EventStream, while_connected


def test_places_are_taken_and_given_back():
    places = ConcurrencyLimit(3)
    places.take(2)
    with pytest.raises(ApiError, match="2 of 3 places") as caught:
        places.take(2)
    assert (caught.value.status, caught.value.code, caught.value.retry) == (429, "queue_full", 1)
    places.take(1)
    places.release(1, seconds=20.0)
    places.release(1, seconds=40.0)
    with pytest.raises(ApiError) as caught:
        places.take(3)
    assert caught.value.retry == 30
    with pytest.raises(AssertionError):
        places.release(2)


class Work:
    """Runs until it is cancelled, or ends at once."""

    def __init__(self):
        self.cancelled = False

    async def endless(self):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def stays():
    await asyncio.sleep(60)


async def leaves():
    return {"type": "http.disconnect"}


@pytest.mark.parametrize(("receive", "seconds"), [(leaves, None), (stays, 0.01)])
def test_work_ends_when_the_client_leaves_or_time_is_over(receive, seconds):
    work = Work()
    assert asyncio.run(while_connected(receive, work.endless(), seconds)) is None
    assert work.cancelled


def test_work_gives_its_result_and_its_error():
    async def good():
        return 5

    async def bad():
        raise ValueError("bad")

    assert asyncio.run(while_connected(stays, good())) == 5
    with pytest.raises(ValueError, match="bad"):
        asyncio.run(while_connected(stays, bad()))


def test_a_stream_is_sent_and_closed():
    sent, closed = [], []

    async def frames():
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    async def send(message):
        sent.append(message)

    stream = EventStream(frames(), lambda: closed.append(True), 10.0)
    asyncio.run(stream({"type": "http"}, stays, send))
    assert [message.get("body", b"") for message in sent] == [
        b"",
        b"data: 1\n\n",
        b"data: 2\n\n",
        b"",
    ]
    assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert closed == [True]


def test_a_stream_is_closed_when_the_client_leaves():
    work, closed = Work(), []

    async def frames():
        yield b"data: 1\n\n"
        await work.endless()

    async def send(message):
        pass

    stream = EventStream(frames(), lambda: closed.append(True), 10.0)
    asyncio.run(stream({"type": "http"}, leaves, send))
    assert closed == [True]
