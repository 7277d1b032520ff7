"""`baton chat` against a server that is scripted."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from deploy.chat import BROKE_OFF, chat

DELTA = b"data: " + json.dumps({"choices": [{"delta": {"content": "Hi"}}]}).encode() + b"\n\n"


class Script(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: list[bytes]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(self.answers.pop(0))
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None: ...


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Script) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_an_answer_that_breaks_off_is_no_whole_one(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Script.answers = [chunk(DELTA), chunk(DELTA) + chunk(b""), chunk(DELTA + b"data: [DONE]\n\n") + chunk(b"")]
    lines = iter(["a", "b", "c", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat(server, "m", "", max_tokens=4, is_thinking=False)
    shown = capsys.readouterr()
    assert shown.out.count("Hi") == 3 and shown.err.count(BROKE_OFF) == 2
