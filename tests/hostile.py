"""A server with OpenAI's API that misbehaves as it is told, one request after the other."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text="yes", **more):
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None} | more
    head = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "m"}
    return {**head, "choices": [choice]}


class Hostile(ThreadingHTTPServer):
    """script: functions that answer a request each, in order; after them `respond` does."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.seen, self.headers = [], [], []
        self.respond = lambda handler, body: handler.say(200, completion())
        self.lock = threading.Lock()
        self.active = self.most_active = self.broken = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        self.broken += 1  # the client has gone away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((self.path, body))
            server.headers.append(dict(self.headers))
            answer = server.script.pop(0) if server.script else server.respond
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            answer(self, body)
        finally:
            with server.lock:
                server.active -= 1

    def say(self, status, value, **headers):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(raw))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


def status(code, message="no", **headers):
    return lambda handler, _: handler.say(code, {"error": {"message": message}}, **headers)


def drop(handler, _):
    """Close the connection without a word."""
    handler.close_connection = True
    handler.connection.close()


def cut(handler, _):
    """Promise more bytes than come."""
    handler.close_connection = True
    handler.say(200, b'{"choices": [', Content_Length="1000")


def raw(content):
    return lambda handler, _: handler.say(200, content)


def slow(handler, _):
    """A byte now and then: the connection never falls silent for long."""
    handler.close_connection = True
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler, _):
    handler.close_connection = True
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b" " * 100_000)
