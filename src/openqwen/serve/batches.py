"""Files and batches: kept in a folder under names of our own; batches yield to everybody else and
survive restarts.
"""

import asyncio
import email.policy
import json
import logging
import time
from contextlib import suppress
from email.parser import BytesParser
from pathlib import Path
from typing import Any

from openqwen.serve.api import Api
from openqwen.serve.errors import ApiError, checked, identity, told
from openqwen.serve.json_text import parse_json
from openqwen.serve.protocol import (
    BatchRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Json,
)
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json

_MOST, _MOST_LINES = 1_000, 50_000  # files, and batches; lines of a batch
_TOGETHER = 8  # lines of a batch at work at once
_OPEN = ("in_progress", "cancelling")
_KEYS = {
    "file": {"id", "bytes"},
    "batch": {"id", "status", "created_at", "input_file_id", "endpoint", "request_counts"},
}
_log = logging.getLogger(__name__)


class Batches:
    """The files and batches of one folder. All methods belong to the event loop."""

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = [entry for path in sorted(folder.glob("*.json")) for entry in _entries(path)]
        self.files: dict[str, Json] = {
            entry["id"]: entry for entry in known if entry["object"] == "file"
        }
        self.batches: dict[str, Json] = {
            entry["id"]: entry for entry in known if entry["object"] == "batch"
        }
        self._wake = asyncio.Event()
        self.fault: str | None = None  # why batches are no longer worked through

    def add_file(self, name: str, purpose: str, content: bytes) -> Json:
        """Keep a file."""
        kept = sum(entry["bytes"] for entry in self.files.values())
        if len(self.files) >= _MOST or kept + len(content) > self._most:
            raise ApiError(
                413, "There is no room for this file; delete others first.", "file", "storage_full"
            )
        entry: Json = {
            "id": identity("file"),
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
        }
        entry |= {"filename": name, "purpose": purpose, "status": "processed"}
        (self._folder / entry["id"]).write_bytes(content)
        self._keep(self.files, entry)
        return entry

    def file(self, name: str) -> Json:
        """What is known of a file."""
        return _known(self.files, name)

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        return (self._folder / self.file(name)["id"]).read_bytes()

    def delete(self, name: str) -> Json:
        """Forget a file."""
        entry = self.file(name)
        if any(b["input_file_id"] == name and b["status"] in _OPEN for b in self.batches.values()):
            raise ApiError(409, "A batch still reads this file.", "file_id")
        del self.files[name]
        for path in (self._folder / entry["id"], self._folder / f"{entry['id']}.json"):
            path.unlink(missing_ok=True)
        return {"id": entry["id"], "object": "file", "deleted": True}

    def batch(self, name: str) -> Json:
        """How a batch stands."""
        return _known(self.batches, name)

    async def add_batch(self, request: BatchRequest) -> Json:
        """Queue a batch."""
        count = sum(1 for line in self.content(request.input_file_id).splitlines() if line.strip())
        if not 0 < count <= _MOST_LINES or len(self.batches) >= _MOST:
            raise ApiError(
                400,
                f"A batch has 1 to {_MOST_LINES} lines; this file has {count}.",
                "input_file_id",
            )
        now, never = (
            int(time.time()),
            ("errors", "output_file_id", "error_file_id", "expires_at", "completed_at"),
        )
        batch: Json = {
            "id": identity("batch"),
            "object": "batch",
            **request.model_dump(exclude={"model"}),
        }
        batch |= {
            "status": "in_progress",
            "created_at": now,
            "in_progress_at": now,
            **dict.fromkeys(never),
        }
        batch |= {
            "request_counts": {"total": count, "completed": 0, "failed": 0},
            "cancelled_at": None,
        }
        self._keep(self.batches, batch)
        self._wake.set()
        return batch

    def cancel(self, name: str) -> Json:
        """Stop a batch; what it has made is kept."""
        batch = self.batch(name)
        if batch["status"] == "in_progress":
            batch["status"] = "cancelling"
            self._keep(self.batches, batch)
        return batch

    def _keep(self, where: dict[str, Json], entry: Json) -> None:
        where[entry["id"]] = entry
        write_json(self._folder / f"{entry['id']}.json", entry)

    async def run(self, api: Api) -> None:
        """Work through the batches, oldest first, for as long as the server runs."""
        try:
            while True:
                waiting = [batch for batch in self.batches.values() if batch["status"] in _OPEN]
                if waiting:
                    oldest = min(waiting, key=lambda batch: (batch["created_at"], batch["id"]))
                    await self._work_or_fail(api, oldest)
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except Exception as error:
            self.fault = f"Batches are no longer worked through: {type(error).__name__}."
            _log.exception(self.fault)

    async def _work_or_fail(self, api: Api, batch: Json) -> None:
        """Work on a batch. One that cannot be ended fails (a full disk), and the next goes on."""
        try:
            await self._work(api, batch)
        except Exception as error:
            _log.exception("Batch %s has failed.", batch["id"])
            said = told(error).message
            fault = {"code": "batch_failed", "message": said, "param": None, "line": None}
            batch |= {"status": "failed", "failed_at": int(time.time())}
            batch["errors"] = {"object": "list", "data": [fault]}
            with suppress(Exception):  # a full disk; the file then says that it is still to be done
                self._keep(self.batches, batch)

    async def _work(self, api: Api, batch: Json) -> None:
        """Answer the lines of a batch that have no answer yet."""
        path = self._folder / f"{batch['id']}.done"
        done = _objects(path.read_bytes()) if path.exists() else []
        known, counts = {entry["line"] for entry in done}, batch["request_counts"]
        lines = self.content(batch["input_file_id"]).splitlines()
        left = iter([n for n, line in enumerate(lines) if line.strip() and n not in known])
        counts |= {"completed": sum(map(_good, done)), "failed": len(done) - sum(map(_good, done))}
        with open(path, "ab") as file:

            async def worker() -> None:
                for number in left:
                    if batch["status"] == "cancelling":
                        return
                    answer = await _answer(api, batch["endpoint"], lines[number], number + 1)
                    entry = {"line": number, **answer}
                    done.append(entry)
                    # First the newline: a line cut short spoils no other.
                    file.write(b"\n" + json.dumps(entry).encode())
                    file.flush()
                    counts["completed" if _good(entry) else "failed"] += 1

            async with asyncio.TaskGroup() as group:  # where one fails, the others end too
                for _ in range(_TOGETHER):
                    group.create_task(worker())
        done.sort(key=lambda entry: entry["line"])
        for key, wanted in (("output", True), ("error", False)):
            kept = [
                {k: v for k, v in entry.items() if k != "line"}
                for entry in done
                if _good(entry) == wanted
            ]
            if kept:
                content = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
                batch[f"{key}_file_id"] = self.add_file(
                    f"{batch['id']}_{key}.jsonl", "batch_output", content
                )["id"]
        batch["status"] = "cancelled" if batch["status"] == "cancelling" else "completed"
        batch[f"{batch['status']}_at"] = int(time.time())
        self._keep(self.batches, batch)
        path.unlink()


def _entries(path: Path) -> list[Json]:
    """What a file of the folder says of a file or a batch; nothing where a crash has spoiled it."""
    try:
        entry = read_json(path)
        if not _KEYS[entry["object"]] <= entry.keys() or entry["id"] != path.stem:
            raise KeyError
    except (OpenQwenError, OSError, LookupError, TypeError, AttributeError):
        _log.warning("%s tells of no file or batch; it is passed over.", path)
        return []
    return [entry]


def _known(where: dict[str, Json], name: str) -> Json:
    if name not in where:
        raise ApiError(404, f"There is nothing named '{name}' here.", "id")
    return where[name]


def _good(entry: Json) -> bool:
    return entry["response"]["status_code"] == 200


async def _answer(api: Api, endpoint: str, line: bytes, number: int) -> Json:
    """One line's answer, in OpenAI's form; whatever is wrong with the line is its answer."""
    custom_id: Any = None
    try:
        record = parse_json(line, f"Line {number}")
        if not isinstance(record, dict) or not isinstance(record.get("body"), dict):
            wanted = "JSON object with custom_id, method, url and body"
            raise ApiError(400, f"Line {number} is no {wanted}.")
        custom_id = record.get("custom_id")
        if record.get("url") != endpoint:
            raise ApiError(400, f"The url of line {number} is not the batch's, {endpoint}.", "url")
        body, status = (
            await _value(api, endpoint, record["body"] | {"stream": False, "stream_options": None}),
            200,
        )
    except Exception as error:
        fault = told(error)
        if fault.status >= 500:
            _log.exception("Line %d of a batch has failed.", number)
        body, status = fault.body(), fault.status
    response = {"status_code": status, "request_id": identity("req"), "body": body}
    return {
        "id": identity("batch_req"),
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


async def _value(api: Api, endpoint: str, body: Json) -> Json:
    """A batch waits where others would be told to come back."""
    while True:
        try:
            if endpoint == "/v1/embeddings":
                return await api.embed(checked(EmbeddingRequest, body))
            if endpoint == "/v1/completions":
                writing = await api.complete(checked(CompletionRequest, body), priority=-1)
            else:
                writing = await api.chat(checked(ChatRequest, body), priority=-1)
            try:
                return await writing.whole()
            finally:
                writing.answers.close()
        except ApiError as error:
            if error.status == 503:  # the engine has ended; the next server goes on from here
                await asyncio.Future()
            if error.status != 429:
                raise
            await asyncio.sleep(min(error.retry or 1, 5))


def _objects(content: bytes) -> list[Json]:
    """The JSON values of the lines; one that a crash cut short is none."""
    values = []
    for line in content.splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def read_upload(body: bytes, content_type: str) -> tuple[str, str, bytes]:
    """(file name, purpose, content) of a multipart form."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1")
    form = BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts = form.iter_parts() if form.is_multipart() else []
    found: dict[str, Any] = {
        str(part.get_param("name", header="content-disposition")): part for part in parts
    }
    for name in ("file", "purpose"):
        if name not in found:
            raise ApiError(400, "Send a multipart form with file and purpose.", name)
    purpose, content = (found[name].get_payload(decode=True) for name in ("purpose", "file"))
    if purpose is None or content is None:
        raise ApiError(400, "The parts file and purpose of a form have no parts of their own.")
    name = found["file"].get_filename() or "file"
    # The parser keeps bytes that are not ASCII as halves of surrogate pairs.
    name = name.encode("utf-8", "surrogateescape").decode(errors="replace")
    return name, purpose.decode(errors="replace"), content
