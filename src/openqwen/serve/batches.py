"""Files and batches: kept in a folder under names of our own; batches yield to everybody else and survive restarts."""

import asyncio
import email.policy
import json
import time
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

_MOST, _MOST_LINES = 1_000, 50_000  # files, and batches; lines of a batch
_TOGETHER = 8  # lines of a batch at work at once
_OPEN = ("in_progress", "cancelling")


class Batches:
    """The files and batches of one folder. All methods belong to the event loop."""

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = [read_json(path) for path in sorted(folder.glob("*.json"))]
        self.files: dict[str, Json] = {entry["id"]: entry for entry in known if entry["object"] == "file"}
        self.batches: dict[str, Json] = {entry["id"]: entry for entry in known if entry["object"] == "batch"}
        self._wake = asyncio.Event()

    def add_file(self, name: str, purpose: str, content: bytes) -> Json:
        """Keep a file."""
        kept = sum(entry["bytes"] for entry in self.files.values())
        if len(self.files) >= _MOST or kept + len(content) > self._most:
            raise ApiError(413, "There is no room for this file; delete others first.", "file", "storage_full")
        entry: Json = {"id": identity("file"), "object": "file", "bytes": len(content), "created_at": int(time.time())}
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
            raise ApiError(400, f"A batch has 1 to {_MOST_LINES} lines; this file has {count}.", "input_file_id")
        now, never = int(time.time()), ("errors", "output_file_id", "error_file_id", "expires_at", "completed_at")
        batch: Json = {"id": identity("batch"), "object": "batch", **request.model_dump(exclude={"model"})}
        batch |= {"status": "in_progress", "created_at": now, "in_progress_at": now, **dict.fromkeys(never)}
        batch |= {"request_counts": {"total": count, "completed": 0, "failed": 0}, "cancelled_at": None}
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
        while True:
            waiting = [batch for batch in self.batches.values() if batch["status"] in _OPEN]
            if waiting:
                await self._work(api, min(waiting, key=lambda batch: (batch["created_at"], batch["id"])))
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _work(self, api: Api, batch: Json) -> None:
        """Answer the lines of a batch that have no answer yet."""
        path = self._folder / f"{batch['id']}.done"
        done = _objects(path.read_bytes()) if path.exists() else []
        known, counts = {entry["line"] for entry in done}, batch["request_counts"]
        lines = [line for line in self.content(batch["input_file_id"]).splitlines() if line.strip()]
        left = iter([number for number in range(len(lines)) if number not in known])
        counts |= {"completed": sum(map(_good, done)), "failed": len(done) - sum(map(_good, done))}
        with open(path, "ab") as file:

            async def worker() -> None:
                for number in left:
                    if batch["status"] == "cancelling":
                        return
                    entry = {"line": number, **await _answer(api, batch["endpoint"], lines[number])}
                    done.append(entry)
                    # First the newline: a line cut short spoils no other.
                    file.write(b"\n" + json.dumps(entry).encode())
                    file.flush()
                    counts["completed" if _good(entry) else "failed"] += 1

            await asyncio.gather(*(worker() for _ in range(_TOGETHER)))
        done.sort(key=lambda entry: entry["line"])
        for key, wanted in (("output", True), ("error", False)):
            kept = [{k: v for k, v in entry.items() if k != "line"} for entry in done if _good(entry) == wanted]
            if kept:
                content = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
                batch[f"{key}_file_id"] = self.add_file(f"{batch['id']}_{key}.jsonl", "batch_output", content)["id"]
        batch["status"] = "cancelled" if batch["status"] == "cancelling" else "completed"
        batch[f"{batch['status']}_at"] = int(time.time())
        self._keep(self.batches, batch)
        path.unlink()


def _known(where: dict[str, Json], name: str) -> Json:
    if name not in where:
        raise ApiError(404, f"There is nothing named '{name}' here.", "id")
    return where[name]


def _good(entry: Json) -> bool:
    return entry["response"]["status_code"] == 200


async def _answer(api: Api, endpoint: str, line: bytes) -> Json:
    """One line's answer, in OpenAI's form."""
    custom_id: Any = None
    try:
        record = next(iter(_objects(line)), None)
        if not isinstance(record, dict) or not isinstance(record.get("body"), dict):
            raise ApiError(400, "A line of a batch is a JSON object with custom_id, method, url and body.")
        custom_id = record.get("custom_id")
        if record.get("url") != endpoint:
            raise ApiError(400, f"The url of this line is not the batch's, {endpoint}.", "url")
        body, status = await _value(api, endpoint, record["body"] | {"stream": False, "stream_options": None}), 200
    except (ApiError, OpenQwenError, ValidationError) as error:
        body, status = told(error).body(), told(error).status
    response = {"status_code": status, "request_id": identity("req"), "body": body}
    return {"id": identity("batch_req"), "custom_id": custom_id, "response": response, "error": None}


async def _value(api: Api, endpoint: str, body: Json) -> Json:
    """A batch waits where others would be told to come back."""
    while True:
        try:
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
        except ApiError as error:
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
    found: dict[str, Any] = {str(part.get_param("name", header="content-disposition")): part for part in parts}
    for name in ("file", "purpose"):
        if name not in found:
            raise ApiError(400, "Send a multipart form with file and purpose.", name)
    purpose = found["purpose"].get_payload(decode=True).decode(errors="replace")
    return found["file"].get_filename() or "file", purpose, found["file"].get_payload(decode=True)
