"""An OpenAI-compatible endpoint on loopback that answers well, or fails in one of the ways of real endpoints."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FEATURES = {
    "person": {"looks_like": "man", "age": "young"},
    "face": {"shape": "oval", "skin": "pale", "nose": "straight", "mouth": "thin lips", "brows": "dark and straight"},
    "hair": "short brown hair",
    "facial_hair": "none",
    "eyes": "brown",
    "worn": ["eyeglasses with a thin frame"],
    "marks": [],
    "expressions": [{"when": "throughout", "emotion": "happy", "evidence": "raised corners of the mouth"}],
    "movements": [{"when": "start", "what": "he nods"}],
    "gaze": "at the camera",
    "talking": "yes",
    "setting": "a plain wall",
}
SUMMARY = (
    "A young man with short brown hair and thin eyeglasses talks to the camera in front of a plain wall. At the start "
    "he nods, then he keeps talking, and the raised corners of his mouth show that he is happy. He was filmed as "
    "number {}."
)
PAIRS = [
    ("What is his hair like?", "It is short and brown.", "appearance"),
    ("Does he wear glasses?", "Yes, he wears glasses with a thin frame.", "appearance"),
    ("What emotion does he show?", "He looks happy.", "emotion"),
    ("What does he do at the start?", "He nods.", "motion"),
]
QUESTIONS = {"questions": [dict(zip(("question", "answer", "kind"), pair, strict=True)) for pair in PAIRS]}


@dataclass
class Asked:
    """A request as the server saw it."""

    step: str
    key: str  # the header that names the call
    body: dict
    sent: bool = False  # whether the answer has been sent completely


@dataclass
class Answer:
    """A response: text in a chat completion, or raw bytes instead."""

    text: str = ""
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0


def good(asked: Asked, number: int) -> Answer:
    """Returns an answer that passes every check; summaries differ from clip to clip."""
    texts = {
        "features": lambda: json.dumps(FEATURES),
        "summary": lambda: SUMMARY.format(asked.key[:8]),
        "questions": lambda: json.dumps(QUESTIONS),
    }
    return Answer(texts[asked.step]())


class ChatServer(ThreadingHTTPServer):
    """Answers with `answer(asked, number)`, where `number` counts earlier requests, and records all requests."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Asked, int], Answer] = good):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked = answer, []
        self._counting = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """The value for OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def note(self, asked: Asked) -> int:
        """Records a request and returns its number."""
        with self._counting:
            self.asked.append(asked)
            return len(self.asked) - 1

    def handle_error(self, request, client_address) -> None:
        """Ignores the errors of killed clients."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][1]["content"][0]["text"]
        step = next(s for s, words in STEPS.items() if words in text)
        asked = Asked(step, self.headers["Idempotency-Key"], body)
        answer = self.server.answer(asked, self.server.note(asked))
        time.sleep(answer.delay)
        content = answer.raw if answer.raw is not None else completion(answer)
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            **answer.headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
        asked.sent = True

    def log_message(self, *_) -> None:
        """Logs nothing."""


STEPS = {
    "features": "fill in the dictionary of features",
    "summary": "Write one paragraph",
    "questions": "Write exactly 4 questions",
}


def completion(answer: Answer) -> bytes:
    """Returns a chat completion in the published format."""
    message = {"role": "assistant", "content": answer.text}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    choices = [{"index": 0, "message": message, "finish_reason": answer.finish}]
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 1, "choices": choices, "usage": usage}
    ).encode()
