"""Serves the review by people (paper, section 3.2): a local web page that shows each clip beside its text.

Every verdict is on disk before the page moves on. Several people can use the page at the same time, each under a name.
"""

import contextlib
import dataclasses
import json
import logging
import mimetypes
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from absl import flags

from favchat_jax.corpus import checks
from favchat_jax.corpus.annotations import Annotation, read_annotations, read_questions
from favchat_jax.corpus.kept import Kept, read_kept
from favchat_jax.corpus.reviews import VERDICTS, Review, Reviews, agreement
from favchat_jax.data.record import Question
from favchat_jax.errors import UserError
from favchat_jax.signals import termination

log = logging.getLogger("favchat_jax")

PAGE = Path(__file__).with_name("page")
FILES = {"/": "index.html", "/review.css": "review.css", "/review.js": "review.js"}
LARGEST_REQUEST = 64 << 10  # bytes of a verdict
LONGEST_NAME = 40
BLOCK = 1 << 18
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; "
    "script-src 'self'; style-src 'self'; media-src 'self'; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """Raised for a refused request, with the HTTP status and one line for the reviewer."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class Desk:
    """Provides the data behind the page: clips with their texts, and the verdicts so far."""

    def __init__(self, out: Path):
        annotations = read_annotations(out)
        self.clips: dict[str, tuple[Kept, Annotation]] = {
            kept.id: (kept, annotations[kept.id]) for kept in read_kept(out) if kept.id in annotations
        }
        if not self.clips:
            raise UserError(f"{out}: no kept clip has a text; run annotate --out={out} first")
        self._reviews = Reviews(out)

    def overview(self, reviewer: str) -> dict:
        """Returns each clip's verdict by this reviewer and whether it has problems, and all reviewers' agreement."""
        rows = []
        for name, (_, annotation) in self.clips.items():
            verdicts = self._reviews.of(annotation)
            mine = verdicts[reviewer].verdict if reviewer in verdicts else ""
            rows.append([name, mine, bool(annotation.problems)])
        pairs = [dataclasses.asdict(row) for row in self.agreement()]
        return {"clips": rows, "agreement": pairs}

    def clip(self, name: str, reviewer: str) -> dict:
        """Returns everything that the page shows of one clip."""
        kept, annotation = self._known(name)
        try:
            labels, fault = kept.labels(), ""
        except UserError as error:
            labels, fault = {}, str(error)
        mine = self._reviews.of(annotation).get(reviewer)
        shown = mine if mine is not None and mine.verdict == "edit" else annotation
        return {
            "id": name,
            "source": kept.source,
            "labels": labels,
            "problems": [*annotation.problems, *([fault] if fault else [])],
            "backend": annotation.model or annotation.backend,
            "summary": shown.summary,
            "questions": [dataclasses.asdict(pair) for pair in shown.questions],
            "verdict": mine.verdict if mine else "",
            "text": annotation.text(),
        }

    def judge(self, posted: object) -> dict:
        """Stores a verdict and returns it.

        Raises:
          Refused: this is not a verdict on a current text.
        """
        try:
            name, reviewer, verdict = (str(posted[field]) for field in ("id", "reviewer", "verdict"))
            text = posted["text"]
            summary, questions = str(posted["summary"]).strip(), read_questions(posted["questions"])
        except (KeyError, TypeError):
            raise Refused(HTTPStatus.BAD_REQUEST, "not a verdict: reload the page") from None
        reviewer = check_name(reviewer)
        if verdict not in VERDICTS:
            raise Refused(HTTPStatus.BAD_REQUEST, f"no such verdict: {verdict!r}")
        _, annotation = self._known(name)
        if text != annotation.text():
            raise Refused(HTTPStatus.CONFLICT, "the text has been rewritten: reload the page")
        if verdict == "edit":
            check_edit(summary, questions)
        else:  # the server's text counts, whatever the page sent
            summary, questions = annotation.summary, annotation.questions
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._reviews.add(Review(name, reviewer, verdict, summary, questions, now, annotation.text()))
        return {"id": name, "verdict": verdict}

    def agreement(self) -> list:
        """Returns the agreement of every pair of reviewers."""
        return agreement((annotation for _, annotation in self.clips.values()), self._reviews)

    def video(self, name: str) -> Path:
        """Returns the file of a clip."""
        return self._known(name)[0].path

    def _known(self, name: str) -> tuple[Kept, Annotation]:
        if name not in self.clips:
            raise Refused(HTTPStatus.NOT_FOUND, f"no such clip: {name!r}")
        return self.clips[name]


def check_name(reviewer: str) -> str:
    """Returns a reviewer's name without surrounding blanks; raises Refused if it is invalid."""
    reviewer = reviewer.strip()
    if not reviewer or len(reviewer) > LONGEST_NAME or not reviewer.isprintable():
        raise Refused(HTTPStatus.BAD_REQUEST, f"a reviewer's name has 1 to {LONGEST_NAME} characters")
    return reviewer


def check_edit(summary: str, questions: tuple[Question, ...]) -> None:
    """Refuses an edit with an empty text or an unknown kind; the reviewer is responsible for its quality."""
    if not summary:
        raise Refused(HTTPStatus.BAD_REQUEST, "the summary is empty: reject the clip instead")
    if any(not pair.question.strip() or not pair.answer.strip() for pair in questions):
        raise Refused(HTTPStatus.BAD_REQUEST, "a question or an answer is empty: fill it or remove the pair")
    if any(pair.kind not in checks.KINDS for pair in questions):
        raise Refused(HTTPStatus.BAD_REQUEST, f"a question's kind is one of {', '.join(checks.KINDS)}")


class Handler(BaseHTTPRequestHandler):
    """Serves the page, its data and the clips. Only this page, in a browser on this machine, may write."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "favchat-review", ""
    timeout = 30  # seconds for a request to arrive
    server: "Server"

    def do_GET(self) -> None:
        """Answers a request for the page, an overview, a clip's text or a video."""
        self._respond(self._get)

    def do_POST(self) -> None:
        """Stores a verdict."""
        self._respond(self._post)

    def _get(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        reviewer = query.get("reviewer", [""])[0]
        if path in FILES:
            self._send((PAGE / FILES[path]).read_bytes(), mimetypes.guess_type(FILES[path])[0])
        elif path == "/clips":
            self._send_json(self.server.desk.overview(check_name(reviewer)))
        elif path.startswith("/clips/"):
            self._send_json(self.server.desk.clip(path.removeprefix("/clips/"), check_name(reviewer)))
        elif path.startswith("/videos/"):
            self._send_video(self.server.desk.video(path.removeprefix("/videos/")))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> None:
        if self.path != "/reviews":
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        # Another site's page can send forms here, but not JSON, and not with our origin.
        if (
            self.headers.get("Origin") not in self.server.origins
            or self.headers.get_content_type() != "application/json"
        ):
            raise Refused(HTTPStatus.FORBIDDEN, "only the review page can send verdicts")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the verdict is missing")
        if int(length) > LARGEST_REQUEST:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the text is too long")
        try:
            posted = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "not JSON") from None
        self._send_json(self.server.desk.judge(posted))

    def _respond(self, work: Callable[[], None]) -> None:
        try:
            if self.headers.get("Host") not in self.server.hosts:  # another site's name that resolves to this machine
                raise Refused(HTTPStatus.FORBIDDEN, "open the address that the review command printed")
            work()
        except Refused as error:
            self._send_error(error.status, str(error))
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the browser has moved on to another clip
        except OSError as error:
            self._send_error(HTTPStatus.INSUFFICIENT_STORAGE, f"not saved: {error.strerror}")
        except UserError as error:
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._send(json.dumps({"error": message}).encode(), "application/json", status)

    def _send_json(self, content: object) -> None:
        self._send(json.dumps(content, ensure_ascii=False).encode(), "application/json")

    def _send(self, content: bytes, kind: str | None, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(status, kind, len(content))
        self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str | None, length: int, **more: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind or "application/octet-stream", "Content-Length": str(length), **HEADERS, **more}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send_video(self, path: Path) -> None:
        """Sends a clip, or the part of it that the browser requests to jump within it."""
        try:
            file = path.open("rb")
        except OSError:
            raise Refused(HTTPStatus.NOT_FOUND, f"{path.name} cannot be read: run clip again") from None
        with file:
            size = path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            start, end, status, more = 0, size, HTTPStatus.OK, {"Accept_Ranges": "bytes"}
            if asked and any(asked.groups()):
                first, last = asked.groups()
                start = int(first) if first else max(0, size - int(last))
                end = min(size, int(last) + 1) if first and last else size
                if start >= end:
                    raise Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "there is no such part of the clip")
                status, more["Content_Range"] = HTTPStatus.PARTIAL_CONTENT, f"bytes {start}-{end - 1}/{size}"
            self._head(status, mimetypes.guess_type(path.name)[0], end - start, **more)
            file.seek(start)
            while start < end and (block := file.read(min(BLOCK, end - start))):
                self.wfile.write(block)
                start += len(block)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing, since the page itself reports errors."""


class Server(ThreadingHTTPServer):
    """Serves one corpus folder's review page to browsers on this machine. Port 0 picks a free one."""

    daemon_threads = True

    def __init__(self, out: Path, port: int):
        self.desk = Desk(out)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--port={port}: {error.strerror}; choose another") from None
        names = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.hosts, self.origins = set(names), {f"http://{name}" for name in names}


def define_flags() -> None:
    """Defines the options of `review`."""
    flags.DEFINE_integer("port", 8010, "Port of the page, on this machine only", lower_bound=0, upper_bound=65535)


def run(out: Path) -> None:
    """Serves the page until Ctrl-C or SIGTERM, then prints the reviewers' agreement."""
    server = Server(out, flags.FLAGS.port)
    # Ctrl-C is the usual way to end the page, not a failure.
    with contextlib.suppress(KeyboardInterrupt), termination("the page closes") as ended:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(
            f"http://127.0.0.1:{server.server_port}/ shows {len(server.desk.clips)} clips; Ctrl-C ends it", flush=True
        )
        ended.wait()
        server.shutdown()
    for row in server.desk.agreement():
        kappa = "undefined" if row.kappa is None else f"{row.kappa:.3f}"
        print(f"{row.first} and {row.second}: {row.clips} clips, {row.equal:.3f} equal, Cohen's kappa {kappa}")
