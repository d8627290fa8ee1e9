"""Listening."""

import asyncio
import socket

from openqwen.http.server import listen


def test_small_writes_do_not_wait_for_the_client():
    """Without TCP_NODELAY each token of a stream may wait 40 ms for an acknowledgement."""

    async def found():
        told = asyncio.get_running_loop().create_future()

        async def connected(reader, writer):
            served = writer.get_extra_info("socket")
            told.set_result(served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listen("127.0.0.1", 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            value = await told
            writer.close()
        return value

    assert asyncio.run(found()) != 0
