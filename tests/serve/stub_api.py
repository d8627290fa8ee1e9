"""A small server for tests of the chat page: the page's files, and OpenAI's protocol with answers
made to order.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openqwen.http
import openqwen.serve

PAGE = Path(openqwen.serve.__file__).parent / "page"
FOLDERS = (PAGE, Path(openqwen.http.__file__).parent / "page")
KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Stub(ThreadingHTTPServer):
    """`answers`: what to say, one a request, each a text, a dict (a delta), or a list of pieces;
    the last one repeats.

    `refusals`: (status, message or whole error, headers) to give instead, one a request. `pause`:
    seconds between pieces. `cut`: end the stream without saying so after so many pieces. `seen`:
    bodies of the requests for answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Any] = ["Hello there."]
        self.refusals: list[tuple[int, Any, dict[str, str]]] = []
        self.key: str | None = None
        self.pause, self.cut, self.renders = 0.0, None, True
        self.seen: list[dict[str, Any]] = []
        self.aborted = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def next(self) -> Any:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.endswith("/models"):
            names = ["other"] if self.path.startswith("/reference") else ["tiny", "reference"]
            if self._allowed():
                self._json(
                    {
                        "data": [
                            {"id": name, "object": "model", "max_model_len": 4096} for name in names
                        ]
                    }
                )
            return
        name = self.path.split("?")[0].strip("/") or "index.html"
        file = next((folder / name for folder in FOLDERS if (folder / name).is_file()), PAGE)
        if file.parent not in FOLDERS:
            self._json({"error": {"message": "There is no such page."}}, 404)
            return
        self._send(file.read_bytes(), KINDS[file.suffix], 200, {"Content-Security-Policy": POLICY})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.path.endswith("/tokenize"):
            self._json({"tokens": [0] * len(body["content"]), "count": len(body["content"])})
            return
        if self.path.endswith("/apply-template"):
            if not self.server.renders:
                self._json({"error": {"message": "Not Found"}}, 404)
                return
            turns = "".join(
                f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"]
            )
            self._json({"prompt": f"{turns}<|im_start|>assistant\n"})
            return
        self.server.seen.append(body)
        if body.get("model", "tiny") not in ("tiny", "reference", "other"):
            self._json({"error": {"message": f"There is no model '{body['model']}'."}}, 404)
            return
        if self.server.refusals:
            status, message, headers = self.server.refusals.pop(0)
            error = message if isinstance(message, dict) else {"message": message}
            self._json({"error": error}, status, headers)
            return
        try:
            self._stream(body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.aborted += 1

    def _allowed(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._json({"error": {"message": "The key is missing or wrong."}}, 401)
            return False
        return True

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        said = self.server.next()
        pieces = (
            said
            if isinstance(said, list)
            else [said]
            if isinstance(said, dict)
            else list(split(said))
        )
        self._event(delta={"role": "assistant", "content": None})
        reason = "stop"
        for number, piece in enumerate(pieces):
            if self.server.cut == number:
                return
            delta = piece if isinstance(piece, dict) else {"content": piece}
            reason = "tool_calls" if "tool_calls" in delta else delta.pop("finish", reason)
            probabilities = None
            if body.get("logprobs"):
                top = [{"token": piece, "logprob": -0.2}, {"token": " else", "logprob": -2.0}]
                probabilities = {
                    "content": [{"token": piece, "logprob": -0.2, "top_logprobs": top}]
                }
            self._event(delta=delta, logprobs=probabilities)
            time.sleep(self.server.pause)
        self._event(delta={}, finish=reason)
        usage = {
            "prompt_tokens": 11,
            "completion_tokens": len(pieces),
            "total_tokens": 11 + len(pieces),
        }
        self._write({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(
        self, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> None:
        self._write(
            {
                "choices": [
                    {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
                ]
            }
        )

    def _write(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps({'id': 'chatcmpl-1', **chunk})}\n\n".encode())
        self.wfile.flush()

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), "application/json", status, headers or {})

    def _send(self, data: bytes, kind: str, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def split(text: str) -> list[str]:
    """Pieces as tokens might be."""
    return [text[i : i + 5] for i in range(0, len(text), 5)]
