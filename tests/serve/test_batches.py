"""Files and batches: kept, answered at leisure, and taken up again after a kill."""

import asyncio
import json
import signal
import time

import openai
import pytest

from openqwen.serve.batches import Batches
from openqwen.serve.protocol import BatchRequest


def lines(count, **body):
    default = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
    entry = {"method": "POST", "url": "/v1/chat/completions", "body": default | body}
    entries = [{"custom_id": f"r{n}", **entry} for n in range(count)]
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def begin(client, content, endpoint="/v1/chat/completions"):
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )


def ended(client, batch, seconds=60):
    end = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "cancelled"):
        assert time.monotonic() < end
        time.sleep(0.1)
    return batch


def read(client, name):
    return [json.loads(line) for line in client.files.content(name).text.splitlines()]


def test_files(client):
    content = bytes(range(256)) + b"\r\n--boundary\r\n\n"
    file = client.files.create(file=("../../evil name.bin", content), purpose="batch")
    assert (file.object, file.bytes, file.purpose) == ("file", len(content), "batch")
    assert client.files.retrieve(file.id) == file
    assert file.id in [entry.id for entry in client.files.list().data]
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_batch(client):
    content = (
        lines(12)
        + lines(1, max_tokens=-1)
        + b"no json\n"
        + lines(1).replace(b"chat/completions", b"other")
    )
    batch = ended(client, begin(client, content))
    assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (15, 12, 3)
    output = read(client, batch.output_file_id)
    assert [entry["custom_id"] for entry in output] == [f"r{n}" for n in range(12)]
    assert all(entry["response"]["body"]["usage"]["completion_tokens"] == 4 for entry in output)
    assert (
        len({entry["response"]["body"]["choices"][0]["message"]["content"] for entry in output})
        == 1
    )
    faults = read(client, batch.error_file_id)
    assert [entry["response"]["status_code"] for entry in faults] == [400] * 3
    assert all(entry["response"]["body"]["error"]["message"] for entry in faults)
    assert batch.id in [entry.id for entry in client.batches.list().data]


def test_embeddings_in_a_batch(client):
    entry = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}
    batch = ended(client, begin(client, json.dumps(entry).encode(), "/v1/embeddings"))
    assert read(client, batch.output_file_id)[0]["response"]["body"]["data"][0]["embedding"]


def test_others_go_first_and_a_batch_can_be_stopped(client):
    batch = begin(client, lines(300, max_tokens=300, ignore_eos=True))
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices
    assert client.batches.retrieve(batch.id).status == "in_progress"
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert ended(client, batch).status == "cancelled"


def test_nonsense(client, server):
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="file-1", endpoint="/v1/completions", completion_window="24h"
        )
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch-1")
    file = client.files.create(file=b"\n\n", purpose="batch")
    with pytest.raises(openai.BadRequestError):
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
    for kind in ("multipart/form-data", "multipart/form-data; boundary=y", "application/json", "x"):
        assert (
            server.http.post("/v1/files", content=b"x", headers={"content-type": kind}).status_code
            == 400
        )
    assert server.http.post("/v1/files", content=b"x").status_code == 400


def test_a_batch_survives_a_kill(start, tiny, tmp_path):
    folder = tmp_path / "kept"
    server = start(tiny, "--data", folder)
    client = server.client()
    batch = begin(client, lines(60, max_tokens=60, ignore_eos=True))
    while client.batches.retrieve(batch.id).request_counts.completed < 9:
        time.sleep(0.02)
    server.stop(signal.SIGKILL)
    (partial,) = folder.glob("*.done")
    partial.write_bytes(partial.read_bytes()[:-20])  # the last line was being written
    before = {
        entry["id"]
        for entry in map(json.loads, filter(None, partial.read_bytes().splitlines()[:-1]))
    }
    client = start(tiny, "--data", folder).client()
    batch = ended(client, batch)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (60, 0)
    output = read(client, batch.output_file_id)
    assert [entry["custom_id"] for entry in output] == [f"r{n}" for n in range(60)]
    assert before < {entry["id"] for entry in output}  # what was answered before was kept


@pytest.mark.parametrize(
    "line",
    [
        b"1" * 5000,
        b"[" * 5000 + b"]" * 5000,
        lines(1, messages="x").strip().replace(b'"x"', b"[" * 5000 + b"]" * 5000),
        lines(1, seed="x").strip().replace(b'"x"', b"1" * 5000),
        b"\xff\xfe",
        b'"text"',
    ],
    ids=["digits", "brackets", "brackets inside", "digits inside", "bytes", "text"],
)
def test_a_line_that_is_no_json_fails_by_its_number_and_stops_nothing(server, client, line):
    batch = ended(client, begin(client, b"\r\n" + line + b"\n\n" + lines(2)))  # empty lines count
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    (fault,) = read(client, batch.error_file_id)
    assert fault["response"]["status_code"] == 400
    assert "ine 2 " in fault["response"]["body"]["error"]["message"]
    assert ended(client, begin(client, lines(1))).request_counts.completed == 1
    assert server.http.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"id": "batch-1"',
        b"[]",
        b"{}",
        b"5",
        b"\xff",
        b'{"id": "batch-1", "object": "batch", "status": "in_progress"}',
        b'{"id": "../batch-1", "object": "file", "bytes": 1}',
        b'{"id": "batch-1", "object": ["file"]}',
    ],
)
def test_a_file_that_a_crash_has_spoiled_is_passed_over_at_the_start(tmp_path, caplog, content):
    (tmp_path / "batch-1.json").write_bytes(content)
    batches, request = begun(tmp_path)
    assert "batch-1.json" in caplog.text

    async def go():
        made = await batches.add_batch(request)
        await worked(batches, lambda: made["status"] == "completed")
        return made

    assert asyncio.run(go())["status"] == "completed"
    assert (len(batches.files), len(batches.batches), batches.fault) == (2, 1, None)


class Broken:
    """An engine behind the API that fails in a way that nobody foresaw."""

    async def embed(self, request):
        raise RecursionError("deep")


def begun(folder, content=b'{"url": "/v1/embeddings", "body": {"input": "x"}}\n'):
    batches = Batches(folder, 1 << 20)
    name = batches.add_file("in.jsonl", "batch", content)["id"]
    return batches, BatchRequest(input_file_id=name, endpoint="/v1/embeddings")


async def worked(batches, until):
    task = asyncio.create_task(batches.run(Broken()))
    while not until() and not task.done():
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_fault_of_ours_fails_the_line_and_the_batch_ends(tmp_path, caplog):
    batches, request = begun(tmp_path)

    async def go():
        batch = await batches.add_batch(request)
        await worked(batches, lambda: batch["status"] == "completed")
        return batch

    batch = asyncio.run(go())
    assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
    assert b'"status_code": 500' in batches.content(batch["error_file_id"])
    assert "RecursionError: deep" in caplog.text


def test_a_batch_that_cannot_be_ended_fails_and_the_next_goes_on(tmp_path, caplog):
    batches, request = begun(tmp_path)

    async def go():
        first, second = await batches.add_batch(request), await batches.add_batch(request)
        (tmp_path / f"{first['id']}.done").mkdir()  # it can be neither read nor written
        await worked(batches, lambda: second["status"] == "completed")
        return first, second

    first, second = asyncio.run(go())
    assert (first["status"], second["status"], batches.fault) == ("failed", "completed", None)
    assert first["errors"]["data"][0]["message"]
    assert "IsADirectoryError" in caplog.text


def test_the_end_of_all_batches_is_told(tmp_path, caplog, monkeypatch):
    batches, request = begun(tmp_path)
    monkeypatch.setattr(batches, "_process_or_fail", None)

    async def go():
        await batches.add_batch(request)
        await worked(batches, lambda: False)

    asyncio.run(go())
    assert batches.fault == "Batches are no longer processed: TypeError."
    assert batches.fault in caplog.text
