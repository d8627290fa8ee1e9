"""Files and batches: kept in a folder under names of our own making; batches yield to everybody else and survive restarts."""

import asyncio
import email.policy
import json
import time
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openqwen.serve.answers import identity
from openqwen.serve.api import Api
from openqwen.serve.errors import ApiError, told
from openqwen.serve.protocol import BatchRequest, ChatRequest, CompletionRequest, EmbeddingRequest, Json
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json

_MOST_FILES, _MOST_LINES = 1_000, 50_000
_TOGETHER = 8  # lines of a batch at work at once
_OPEN = ("in_progress", "cancelling")
PURPOSES = ("batch", "user_data", "evals", "fine-tune", "assistants")


class Batches:
    """The files and batches of one folder. All methods belong to the event loop."""

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = [read_json(path) for path in sorted(folder.glob("*.json"))]
        self.files: dict[str, Json] = {entry["id"]: entry for entry in known if entry["object"] == "file"}
        self.batches: dict[str, Json] = {entry["id"]: entry for entry in known if entry["object"] == "batch"}
        self._wake = asyncio.Event()
        self._wake.set()

    def add_file(self, name: str, purpose: str, content: bytes) -> Json:
        """Keep a file."""
        if purpose not in PURPOSES:
            raise ApiError(400, f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
        kept = sum(entry["bytes"] for entry in self.files.values())
        if len(self.files) >= _MOST_FILES or kept + len(content) > self._most:
            raise ApiError(413, "There is no room for this file; delete others first.", "file", "storage_full")
        entry = {"id": identity("file"), "object": "file", "bytes": len(content), "created_at": int(time.time())}
        entry |= {"filename": name, "purpose": purpose, "status": "processed"}
        (self._folder / entry["id"]).write_bytes(content)
        write_json(self._folder / f"{entry['id']}.json", entry)
        self.files[entry["id"]] = entry
        return entry

    def file(self, name: str) -> Json:
        """What is known of a file."""
        if name not in self.files:
            raise ApiError(404, f"There is no file '{name}'.", "file_id")
        return self.files[name]

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
        if name not in self.batches:
            raise ApiError(404, f"There is no batch '{name}'.", "batch_id")
        return self.batches[name]

    def add_batch(self, request: BatchRequest) -> Json:
        """Queue a batch."""
        content = self.content(request.input_file_id)
        if len(self.batches) >= _MOST_FILES:
            raise ApiError(413, "Too many batches are kept.", code="storage_full")
        count = sum(1 for line in content.splitlines() if line.strip())
        if not 0 < count <= _MOST_LINES:
            raise ApiError(400, f"A batch has 1 to {_MOST_LINES} lines; this file has {count}.", "input_file_id")
        now = int(time.time())
        batch: Json = {"id": identity("batch"), "object": "batch", **request.model_dump(), "errors": None}
        batch |= {"status": "in_progress", "output_file_id": None, "error_file_id": None, "created_at": now}
        batch |= {"in_progress_at": now, "expires_at": None, "completed_at": None, "cancelled_at": None}
        batch |= {"request_counts": {"total": count, "completed": 0, "failed": 0}}
        self._keep(batch)
        self._wake.set()
        return batch

    def cancel(self, name: str) -> Json:
        """Stop a batch; what it has made is kept."""
        batch = self.batch(name)
        if batch["status"] == "in_progress":
            batch["status"] = "cancelling"
            self._keep(batch)
            self._wake.set()
        return batch

    def _keep(self, batch: Json) -> None:
        self.batches[batch["id"]] = batch
        write_json(self._folder / f"{batch['id']}.json", batch)

    async def run(self, api: Api) -> None:
        """Work through the batches, oldest first, for as long as the server runs."""
        while True:
            waiting = [batch for batch in self.batches.values() if batch["status"] in _OPEN]
            if not waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = min(waiting, key=lambda batch: (batch["created_at"], batch["id"]))
            await self._work(api, batch)

    async def _work(self, api: Api, batch: Json) -> None:
        """Answer the lines of a batch that have no answer yet."""
        done_path = self._folder / f"{batch['id']}.done"
        done = list(_objects(done_path.read_bytes())) if done_path.exists() else []
        known = {entry["line"] for entry in done}
        lines = [line for line in self.content(batch["input_file_id"]).splitlines() if line.strip()]
        left = iter([number for number in range(len(lines)) if number not in known])
        with open(done_path, "ab") as file:

            async def worker() -> None:
                for number in left:
                    if batch["status"] == "cancelling":
                        return
                    entry = {"line": number, **await _answer(api, batch["endpoint"], lines[number])}
                    done.append(entry)
                    # A newline first: a line that a crash cut short then spoils no other.
                    file.write(b"\n" + json.dumps(entry).encode())
                    file.flush()
                    counts = batch["request_counts"]
                    counts["completed" if entry["response"]["status_code"] == 200 else "failed"] += 1

            failed = sum(entry["response"]["status_code"] != 200 for entry in done)
            batch["request_counts"] |= {"completed": len(done) - failed, "failed": failed}
            await asyncio.gather(*(worker() for _ in range(_TOGETHER)))
        done.sort(key=lambda entry: entry["line"])
        self._finish(batch, done)
        done_path.unlink()

    def _finish(self, batch: Json, done: list[Json]) -> None:
        for key, name, wanted in (("output_file_id", "output", True), ("error_file_id", "errors", False)):
            kept = [entry for entry in done if (entry["response"]["status_code"] == 200) == wanted]
            lines = [json.dumps({k: v for k, v in entry.items() if k != "line"}) + "\n" for entry in kept]
            if lines:
                content = "".join(lines).encode()
                batch[key] = self.add_file(f"{batch['id']}_{name}.jsonl", "batch", content)["id"]
        cancelled = batch["status"] == "cancelling"
        batch["status"] = "cancelled" if cancelled else "completed"
        batch["cancelled_at" if cancelled else "completed_at"] = int(time.time())
        self._keep(batch)


async def _answer(api: Api, endpoint: str, line: bytes) -> Json:
    """One line's answer, in OpenAI's form."""
    custom_id: Any = None
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("body"), dict):
            raise ApiError(400, "A line of a batch is an object with custom_id, method, url and body.")
        custom_id = record.get("custom_id")
        if record.get("url") != endpoint:
            raise ApiError(400, f"The url of this line is not the batch's, {endpoint}.", "url")
        body, status = await _patiently(lambda: _value(api, endpoint, record["body"])), 200
    except json.JSONDecodeError:
        fault = ApiError(400, "A line of a batch is JSON.")
        body, status = fault.body(), fault.status
    except (ApiError, OpenQwenError, ValidationError) as error:
        body, status = told(error).body(), told(error).status
    response = {"status_code": status, "request_id": identity("req"), "body": body}
    return {"id": identity("batch_req"), "custom_id": custom_id, "response": response, "error": None}


async def _value(api: Api, endpoint: str, body: Json) -> Json:
    body = body | {"stream": False, "stream_options": None}
    if endpoint == "/v1/embeddings":
        return await api.embed(EmbeddingRequest.model_validate(body))
    if endpoint == "/v1/completions":
        writing = await api.complete(CompletionRequest.model_validate(body), priority=-1)
    else:
        writing = await api.chat(ChatRequest.model_validate(body), priority=-1)
    try:
        return await writing.whole()
    finally:
        writing.answers.close()


async def _patiently(make: Callable[[], Any]) -> Json:
    """A batch waits where others would be told to come back."""
    while True:
        try:
            return await make()
        except ApiError as error:
            if error.status != 429:
                raise
            await asyncio.sleep(min(error.retry or 1, 5))


def _objects(content: bytes) -> Iterator[Json]:
    for line in content.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the line at which a crash cut the file
            continue


def read_upload(body: bytes, content_type: str) -> tuple[str, str, bytes]:
    """(file name, purpose, content) of a multipart form."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1")
    form = BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    if not form.is_multipart():
        raise ApiError(400, "Send a multipart form with file and purpose.", "file")
    found: dict[str, Any] = {str(part.get_param("name", header="content-disposition")): part for part in form.iter_parts()}
    if "file" not in found or "purpose" not in found:
        raise ApiError(400, "The form needs file and purpose.", "purpose" if "file" in found else "file")
    purpose = found["purpose"].get_payload(decode=True).decode(errors="replace")
    return found["file"].get_filename() or "file", purpose, found["file"].get_payload(decode=True)
