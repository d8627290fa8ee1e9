"""Small applications behind the gate, asked without a network."""

import asyncio

import httpx
import pytest


@pytest.fixture
def ask():
    """Send one request to an ASGI application; returns the response."""

    def send(app, method, path, **options):
        async def go():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.request(method, path, **options)

        return asyncio.run(go())

    return send
