"""OpenAI-compatible servers on the loopback interface with scripted replies."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A message, an HTTP error status, a response body, or the fields of a choice or of an error with status 400.
Reply = str | int | bytes | dict[str, Any]


class Server:
    """The address of a running server, the requests that it received, and the key of each."""

    def __init__(self, url: str):
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []


@contextlib.contextmanager
def serve(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Server]:
    """Runs a server that answers each chat completion with `reply(body of the request)`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                said = reply(body)
            status = 400 if isinstance(said, dict) and "error" in said else said if isinstance(said, int) else 200
            if not isinstance(said, bytes):
                said = json.dumps({"error": {"message": "no"}} if isinstance(said, int) else completion(said)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(said: str | dict[str, Any]) -> dict[str, Any]:
    """Makes a chat completion in the format of OpenAI's API from its text or its choice; an error stays as it is."""
    if isinstance(said, str):
        said = {"message": {"role": "assistant", "content": said}}
    if "error" in said:
        return said
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", **said}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def asked(body: dict[str, Any]) -> str:
    """Returns the text of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")
