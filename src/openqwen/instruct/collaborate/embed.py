"""Embeddings of tags, by the model that wrote them: in this process or behind a server."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from openqwen.engine import Endpoint, Generator
from openqwen.instruct.collaborate.aggregate import Embed
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import progress

_BATCH = 256  # texts of one call
# A language model that was not trained for embeddings gathers the meaning of a text at a place
# where it must say it in one word (PromptEOL, Jiang et al. 2023).
_FRAME = 'This topic: "{}" means in one word: "'
_DO = "give a model that has them, or --aggregation.distance 0"


def embedder(generator: Generator) -> Embed:
    """The embeddings of texts by a generator: rows of length 1."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        parts: list[np.ndarray] = []
        with progress("embeddings", len(texts), "tags") as bar:
            for start in range(0, len(texts), _BATCH):
                framed = [_FRAME.format(text) for text in texts[start : start + _BATCH]]
                parts.append(_vectors(generator, framed))
                bar.advance(len(framed))
        vectors_ND = np.concatenate(parts)
        lengths = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return np.asarray(vectors_ND / np.maximum(lengths, 1e-12))

    return embed


def _vectors(generator: Any, texts: list[str]) -> np.ndarray:
    if isinstance(generator, Endpoint):
        return asyncio.run(_from_server(generator, texts))
    if not hasattr(generator, "embed"):
        raise OpenQwenError("This generator has no embeddings.", do=_DO)
    vectors: np.ndarray = generator.embed(texts).float().cpu().numpy()
    return vectors


async def _from_server(endpoint: Endpoint, texts: list[str]) -> np.ndarray:
    where = f"{endpoint.url}/embeddings"
    body = {"model": endpoint.model, "input": texts}
    try:
        async with endpoint.client() as client:
            response = await client.post(where, json=body, timeout=endpoint.timeout)
        response.raise_for_status()
        rows = sorted(response.json()["data"], key=lambda row: row["index"])
        vectors = np.array([row["embedding"] for row in rows], np.float32)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        what = f"The server gives no embeddings: {type(error).__name__} {error}."
        raise OpenQwenError(what, where, _DO) from None
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise OpenQwenError("The server's embeddings cannot be read.", where, _DO)
    return vectors
