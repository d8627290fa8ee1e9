"""Files and batches, kept in a folder.

A batch yields to all other requests, and continues after a restart of the server.
"""

import asyncio
import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from openqwen.http.errors import ApiError, as_api_error, new_id, validated
from openqwen.http.json_body import parse_json
from openqwen.serve.api import FIELDS, Api
from openqwen.serve.protocol import (
    BatchRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Json,
)
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json

_MOST_ENTRIES, _MOST_LINES = 1_000, 50_000  # files, and batches; lines of one batch
_CONCURRENCY = 8  # lines of a batch that are answered at once
_UNFINISHED = ("in_progress", "cancelling")
_KEYS = {  # that an entry on the disk must have
    "file": {"id", "bytes"},
    "batch": {"id", "status", "created_at", "input_file_id", "endpoint", "request_counts"},
}
_log = logging.getLogger(__name__)


class Batches:
    """The files and batches of one folder. All methods run in the event loop."""

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most_bytes = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.files: dict[str, Json] = {}
        self.batches: dict[str, Json] = {}
        for path in sorted(folder.glob("*.json")):
            if entry := _read_entry(path):
                entries = self.files if entry["object"] == "file" else self.batches
                entries[entry["id"]] = entry
        self._wake = asyncio.Event()
        self.fault: str | None = None  # why batches are no longer processed

    def add_file(self, name: str, purpose: str, content: bytes) -> Json:
        """Keep a file; returns its entry."""
        kept = sum(entry["bytes"] for entry in self.files.values())
        if len(self.files) >= _MOST_ENTRIES or kept + len(content) > self._most_bytes:
            message = "There is no room for this file; delete other files first."
            raise ApiError(413, message, "file", "storage_full")
        entry: Json = {
            "id": new_id("file"),
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        (self._folder / entry["id"]).write_bytes(content)
        self._save(self.files, entry)
        return entry

    def file(self, name: str) -> Json:
        """The entry of a file."""
        return _entry(self.files, name)

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        return (self._folder / self.file(name)["id"]).read_bytes()

    def delete(self, name: str) -> Json:
        """Delete a file, unless a batch still reads it."""
        entry = self.file(name)
        for batch in self.batches.values():
            if batch["input_file_id"] == name and batch["status"] in _UNFINISHED:
                raise ApiError(409, "A batch still reads this file.", "file_id")
        del self.files[name]
        for path in (self._folder / entry["id"], self._folder / f"{entry['id']}.json"):
            path.unlink(missing_ok=True)
        return {"id": entry["id"], "object": "file", "deleted": True}

    def batch(self, name: str) -> Json:
        """The entry of a batch, with its progress."""
        return _entry(self.batches, name)

    async def add_batch(self, request: BatchRequest) -> Json:
        """Queue a batch; returns its entry."""
        lines = self.content(request.input_file_id).splitlines()
        count = sum(1 for line in lines if line.strip())
        if not 0 < count <= _MOST_LINES or len(self.batches) >= _MOST_ENTRIES:
            message = f"A batch has 1 to {_MOST_LINES} lines; this file has {count}."
            if 0 < count <= _MOST_LINES:
                message = f"This server keeps {_MOST_ENTRIES} batches at most."
            raise ApiError(400, message, "input_file_id")
        now = int(time.time())
        batch: Json = {
            "id": new_id("batch"),
            "object": "batch",
            **request.model_dump(exclude={"model"}),
            "status": "in_progress",
            "created_at": now,
            "in_progress_at": now,
            "errors": None,
            "output_file_id": None,
            "error_file_id": None,
            "expires_at": None,
            "completed_at": None,
            "cancelled_at": None,
            "request_counts": {"total": count, "completed": 0, "failed": 0},
        }
        self._save(self.batches, batch)
        self._wake.set()
        return batch

    def cancel(self, name: str) -> Json:
        """Cancel a batch; the answers that it has are kept."""
        batch = self.batch(name)
        if batch["status"] == "in_progress":
            batch["status"] = "cancelling"
            self._save(self.batches, batch)
        return batch

    def _save(self, entries: dict[str, Json], entry: Json) -> None:
        entries[entry["id"]] = entry
        write_json(self._folder / f"{entry['id']}.json", entry)

    async def run(self, api: Api) -> None:
        """Process the batches, oldest first, for as long as the server runs."""
        try:
            while True:
                waiting = [b for b in self.batches.values() if b["status"] in _UNFINISHED]
                if waiting:
                    oldest = min(waiting, key=lambda batch: (batch["created_at"], batch["id"]))
                    await self._process_or_fail(api, oldest)
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except Exception as error:
            self.fault = f"Batches are no longer processed: {type(error).__name__}."
            _log.exception(self.fault)

    async def _process_or_fail(self, api: Api, batch: Json) -> None:
        """Process a batch; where that is impossible (a full disk), the batch fails."""
        try:
            await self._process(api, batch)
        except Exception as error:
            _log.exception("Batch %s has failed.", batch["id"])
            message = as_api_error(error, FIELDS).message
            fault = {"code": "batch_failed", "message": message, "param": None, "line": None}
            batch |= {"status": "failed", "failed_at": int(time.time())}
            batch["errors"] = {"object": "list", "data": [fault]}
            # Where this fails too, the file says that the batch is in progress, and the next
            # server tries again.
            with suppress(Exception):
                self._save(self.batches, batch)

    async def _process(self, api: Api, batch: Json) -> None:
        """Answer the lines of a batch that have no answer yet, and write its files."""
        path = self._folder / f"{batch['id']}.done"
        done = _read_lines(path) if path.exists() else []
        answered = {entry["line"] for entry in done}
        lines = self.content(batch["input_file_id"]).splitlines()
        numbers = [n for n, line in enumerate(lines) if line.strip() and n not in answered]
        remaining = iter(numbers)  # all workers take from this one
        counts, completed = batch["request_counts"], sum(map(_succeeded, done))
        counts |= {"completed": completed, "failed": len(done) - completed}
        with open(path, "ab") as file:

            async def worker() -> None:
                for number in remaining:
                    if batch["status"] == "cancelling":
                        return
                    answer = await _answer(api, batch["endpoint"], lines[number], number + 1)
                    entry = {"line": number, **answer}
                    done.append(entry)
                    # The newline comes first, so that a line cut short spoils no other.
                    file.write(b"\n" + json.dumps(entry).encode())
                    file.flush()
                    counts["completed" if _succeeded(entry) else "failed"] += 1

            async with asyncio.TaskGroup() as group:  # where one worker fails, the others end too
                for _ in range(_CONCURRENCY):
                    group.create_task(worker())
        self._finish(batch, sorted(done, key=lambda entry: entry["line"]))
        path.unlink()

    def _finish(self, batch: Json, done: list[Json]) -> None:
        """Write the files of answers and of errors, and the batch's last status."""
        for key, success in (("output", True), ("error", False)):
            rows = []
            for entry in done:
                if _succeeded(entry) == success:
                    row = {name: value for name, value in entry.items() if name != "line"}
                    rows.append(json.dumps(row) + "\n")
            if rows:
                name, content = f"{batch['id']}_{key}.jsonl", "".join(rows).encode()
                batch[f"{key}_file_id"] = self.add_file(name, "batch_output", content)["id"]
        batch["status"] = "cancelled" if batch["status"] == "cancelling" else "completed"
        batch[f"{batch['status']}_at"] = int(time.time())
        self._save(self.batches, batch)


def _read_entry(path: Path) -> Json | None:
    """The entry of a file or batch on the disk; None where a crash has damaged it."""
    try:
        entry = read_json(path)
        if _KEYS[entry["object"]] <= entry.keys() and entry["id"] == path.stem:
            return entry
    except (OpenQwenError, OSError, LookupError, TypeError, AttributeError):
        pass
    _log.warning("%s does not describe a file or batch; it is ignored.", path)
    return None


def _read_lines(path: Path) -> list[Json]:
    """The JSON values of a file's lines, without those that a crash cut short."""
    values = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


def _entry(entries: dict[str, Json], name: str) -> Json:
    if name not in entries:
        raise ApiError(404, f"There is nothing named '{name}' here.", "id")
    return entries[name]


def _succeeded(entry: Json) -> bool:
    return entry["response"]["status_code"] == 200


async def _answer(api: Api, endpoint: str, line: bytes, number: int) -> Json:
    """The answer to one line, in OpenAI's form; any fault of the line becomes its answer."""
    custom_id: Any = None
    try:
        record = parse_json(line, f"Line {number}")
        if not isinstance(record, dict) or not isinstance(record.get("body"), dict):
            form = "a JSON object with custom_id, method, url and body"
            raise ApiError(400, f"Line {number} is not {form}.")
        custom_id = record.get("custom_id")
        if record.get("url") != endpoint:
            message = f"The url of line {number} is not that of the batch, {endpoint}."
            raise ApiError(400, message, "url")
        body = record["body"] | {"stream": False, "stream_options": None}
        body, status = await _generate(api, endpoint, body), 200
    except Exception as error:
        fault = as_api_error(error, FIELDS)
        if fault.status >= 500:
            _log.exception("Line %d of a batch has failed.", number)
        body, status = fault.body(), fault.status
    response = {"status_code": status, "request_id": new_id("req"), "body": body}
    return {
        "id": new_id("batch_req"),
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


async def _generate(api: Api, endpoint: str, body: Json) -> Json:
    """The answer to a body. Where the server is busy, the batch waits and tries again."""
    while True:
        try:
            if endpoint == "/v1/embeddings":
                return await api.embed(validated(EmbeddingRequest, body))
            if endpoint == "/v1/completions":
                response = await api.complete(validated(CompletionRequest, body), priority=-1)
            else:
                response = await api.chat(validated(ChatRequest, body), priority=-1)
            try:
                return await response.result()
            finally:
                response.answers.close()
        except ApiError as error:
            if error.status == 503:  # the engine has ended; the next server continues from here
                await asyncio.Future()
            if error.status != 429:
                raise
            await asyncio.sleep(min(error.retry or 1, 5))
