"""The review page: its refusals over HTTP, and a reviewer's work in a real browser."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from favchat_jax.corpus.annotations import Annotation, read_annotations
from favchat_jax.corpus.manifest import KEPT, write_table
from favchat_jax.corpus.review import LARGEST_REQUEST, Desk, Server
from favchat_jax.corpus.reviews import Reviews
from favchat_jax.data.record import Question
from favchat_jax.errors import UserError
from tests.conftest import ROOT
from tests.corpus.corpus_folder import fill, row

CLIPS = 5
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def annotation(name: str, problems: tuple[str, ...] = ()) -> Annotation:
    pairs = (
        Question("Who is seen?", "A <b>young</b> man.", "appearance"),
        Question("How does he feel?", "Happy.", "emotion"),
    )
    return Annotation(name, "key", "openai", "some-model", "v", {}, f"A man & <i>{name}</i>.", pairs, 3, problems)


@pytest.fixture
def out(tmp_path):
    """A corpus folder with texts; those of the last clip have a problem."""
    out = fill(tmp_path / "out", CLIPS)
    problems = [()] * (CLIPS - 1) + [("it says beard, and the labels say no beard",)]
    lines = [annotation(f"clip{n:03d}", found).line() for n, found in enumerate(problems)]
    (out / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    return out


@pytest.fixture
def server(out):
    server = Server(out, 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method="GET", path="/", body=None, **headers) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, response.read(), response.headers
    connection.close()
    return found


def post(server, **change) -> tuple[int, dict]:
    """Sends a verdict as the page does, with some fields changed."""
    one = annotation("clip000")
    verdict = {
        "id": one.id,
        "reviewer": "ada",
        "verdict": "accept",
        "text": one.text(),
        "summary": "x",
        "questions": [],
    }
    origin = f"http://127.0.0.1:{server.server_port}"
    verdict = json.dumps({**verdict, **change})
    status, body, _ = ask(server, "POST", "/reviews", verdict, Content_Type="application/json", Origin=origin)
    return status, json.loads(body)


def test_a_verdict_is_on_the_disk_before_it_is_answered(server, out):
    assert post(server, verdict="reject") == (200, {"id": "clip000", "verdict": "reject"})
    review = json.loads((out / "reviews.jsonl").read_text())
    one = annotation("clip000")
    assert set(review) == {"id", "reviewer", "verdict", "summary", "questions", "time", "text"}
    assert review["summary"] == one.summary and review["text"] == one.text()  # the judged text, not the sent one
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", review["time"])


@pytest.mark.parametrize(
    ("change", "status", "line"),
    [
        ({"id": "../etc"}, 404, "no such clip"),
        ({"verdict": "maybe"}, 400, "no such verdict"),
        ({"reviewer": "  "}, 400, "name has 1 to 40"),
        ({"reviewer": "a\nb"}, 400, "name has 1 to 40"),
        ({"text": "0"}, 409, "rewritten: reload"),
        ({"questions": [{"question": 1}]}, 400, "not a verdict"),
        ({"questions": "x"}, 400, "not a verdict"),
        ({"verdict": "edit", "summary": " "}, 400, "summary is empty"),
        ({"verdict": "edit", "questions": [{"question": "?", "answer": "", "kind": "motion"}]}, 400, "answer is empty"),
        ({"verdict": "edit", "questions": [{"question": "?", "answer": "a", "kind": "x"}]}, 400, "kind is one of"),
        ({"summary": "x" * LARGEST_REQUEST}, 413, "too long"),
    ],
)
def test_an_invalid_verdict_is_refused_in_one_line_and_not_stored(server, out, change, status, line):
    found, answer = post(server, **change)
    assert found == status and line in answer["error"]
    assert not (out / "reviews.jsonl").exists()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "text/plain", "Origin": "ours"},  # what a form of another site can send
        {"Content_Type": "application/json", "Origin": "http://evil.example"},
        {"Content_Type": "application/json"},
        {"Content_Type": "application/json", "Origin": "ours", "Host": "evil.example"},
    ],
)
def test_verdicts_of_other_sites_are_refused(server, out, headers):
    if headers.get("Origin") == "ours":
        headers = {**headers, "Origin": f"http://localhost:{server.server_port}"}
    assert ask(server, "POST", "/reviews", "{}", **headers)[0] == 403
    assert not (out / "reviews.jsonl").exists()


def test_requests_under_another_host_name_are_refused(server):
    for path in ("/", "/clips?reviewer=ada", "/videos/clip000"):
        assert ask(server, path=path, Host=f"evil.example:{server.server_port}")[0] == 403
        assert ask(server, path=path, Host=f"localhost:{server.server_port}")[0] == 200


def test_only_this_machine_can_reach_the_page(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path", ["/kept.parquet", "/../kept.parquet", "/videos/../kept.parquet", "/videos/..%2fkept.parquet"]
)
def test_no_other_file_of_the_folder_is_served(server, path):
    assert ask(server, path=path)[0] == 404


def test_a_verdict_without_a_length_is_refused(server):
    origin = {"Origin": f"http://127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest("POST", "/reviews")
    for name, value in origin.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 411


def test_a_browser_can_request_a_part_of_a_clip(server, out):
    content = (out / "kept/clip000.mp4").read_bytes()
    assert ask(server, path="/videos/clip000")[1] == content
    for asked, part in {"bytes=2-5": content[2:6], "bytes=10-": content[10:], "bytes=-7": content[-7:]}.items():
        status, body, headers = ask(server, path="/videos/clip000", Range=asked)
        assert (status, body) == (206, part) and headers["Content-Range"].endswith(f"/{len(content)}")
    assert ask(server, path="/videos/clip000", Range=f"bytes={len(content)}-")[0] == 416


def test_a_full_disk_is_reported_and_stored_verdicts_stay(server, out, monkeypatch):
    assert post(server)[0] == 200
    kept = (out / "reviews.jsonl").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, answer = post(server, verdict="reject")
    assert status == 507 and "No space left" in answer["error"]
    assert (out / "reviews.jsonl").read_bytes() == kept
    monkeypatch.undo()
    assert post(server, reviewer="bob")[0] == 200 and len(Reviews(out).of(annotation("clip000"))) == 2


def test_concurrent_reviewers_lose_no_verdict(server, out):
    texts = [annotation(f"clip{n:03d}") for n in range(CLIPS)]

    def judge_all(name: str) -> None:
        for text in texts:
            assert post(server, reviewer=name, id=text.id, text=text.text())[0] == 200

    threads = [threading.Thread(target=judge_all, args=(name,)) for name in ("ada", "bob", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((out / "reviews.jsonl").read_text().splitlines()) == 3 * CLIPS
    assert all(len(Reviews(out).of(text)) == 3 for text in texts)


def test_a_folder_without_texts_is_refused_with_the_command_to_run(tmp_path):
    with pytest.raises(UserError, match="run annotate"):
        Desk(fill(tmp_path / "out", 1))


def test_a_clip_with_invalid_labels_is_shown_with_the_reason(out):
    write_table(out, KEPT, [row("clip000", attributes='{"action": ["fly"]}')])
    assert "'fly' is not a label of CelebV-HQ's action" in Desk(out).clip("clip000", "ada")["problems"][0]


def test_the_command_prints_its_address_and_finally_the_agreement(out):
    for name, said in (("ada", "accept"), ("bob", "accept")):
        Desk(out).judge(
            {
                "id": "clip000",
                "reviewer": name,
                "verdict": said,
                "text": annotation("clip000").text(),
                "summary": "",
                "questions": [],
            }
        )
    command = [sys.executable, "-m", "tools.build_dataset", "review", f"--out={out}", "--port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ shows 5 clips; Ctrl-C ends it\n", first), process.communicate()
    process.terminate()
    rest, errors = process.communicate()
    assert (rest, errors, process.returncode) == ("ada and bob: 1 clips, 1.000 equal, Cohen's kappa undefined\n", "", 0)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reviewer:
    """A reviewer at the page, with a name and a separate browser profile."""

    def __init__(self, browser, server, name: str):
        self.page = browser.new_context().new_page()
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(f"http://127.0.0.1:{server.server_port}/")
        self.page.fill("#reviewer", name)
        self.page.keyboard.press("Enter")
        self.sees("#name", "clip000")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def sees(self, place: str, text: str) -> None:
        """Waits until an element has this text."""
        self.page.wait_for_function(
            "([place, text]) => document.querySelector(place).textContent === text", arg=[place, text]
        )


def verdicts(out, reviewer: str) -> dict[str, str]:
    reviews = Reviews(out)
    found = {name: reviews.of(text).get(reviewer) for name, text in read_annotations(out).items()}
    return {name: review.verdict for name, review in found.items() if review}


def test_a_reviewer_judges_by_the_keyboard_and_every_verdict_is_stored_immediately(browser, server, out):
    ada = Reviewer(browser, server, "ada")
    for key, said, following in (
        ("a", "accept", "clip001"),
        ("r", "reject", "clip002"),
        ("g", "regenerate", "clip003"),
    ):
        before = ada.page.text_content("#name")
        ada.press(key)
        ada.sees("#name", following)
        assert verdicts(out, "ada")[before] == said
    ada.sees("#count", "3 of 5 judged")
    ada.press("ArrowLeft")  # moves among the clips left
    ada.sees("#name", "clip004")
    ada.press("ArrowRight")
    ada.sees("#name", "clip003")
    ada.press("a")
    ada.sees("#name", "clip004")
    assert "it says beard" in ada.page.text_content("#problems")
    ada.press("a")
    ada.page.wait_for_selector("#empty:not([hidden])")
    assert len(verdicts(out, "ada")) == CLIPS and ada.errors == []
    ada.page.reload()  # the server has the verdicts
    ada.sees("#count", "5 of 5 judged")


def test_an_edit_is_saved_and_escape_discards_it(browser, server, out):
    ada = Reviewer(browser, server, "ada")
    ada.press("e")
    ada.page.fill("#summary", "Not to be kept.")
    ada.press("Escape")
    assert ada.page.input_value("#summary") == annotation("clip000").summary
    ada.press("e")
    ada.page.keyboard.press("End")
    ada.page.keyboard.type(" are here")  # letters that are shortcuts outside an edit
    ada.page.fill("[aria-label='answer 1']", "A man.")
    ada.page.click("#questions li:nth-child(2) .remove")
    ada.press("Control+Enter")
    ada.sees("#name", "clip001")
    review = Reviews(out).of(annotation("clip000"))["ada"]
    assert (review.verdict, review.summary) == ("edit", annotation("clip000").summary + " are here")
    assert review.questions == (Question("Who is seen?", "A man.", "appearance"),)
    ada.page.select_option("#filter", "all")
    ada.sees("#name", "clip000")
    assert ada.page.input_value("[aria-label='answer 1']") == "A man." and ada.errors == []
    ada.sees("#verdict", "edited")


def test_clip_labels_and_text_are_side_by_side_and_text_is_never_read_as_html(browser, server):
    ada = Reviewer(browser, server, "ada")
    assert ada.page.locator("main b, main i").count() == 0
    assert ada.page.input_value("[aria-label='answer 1']") == "A <b>young</b> man."
    chips = ada.page.locator(".chip").all_text_contents()
    assert chips == ["male", "young", "brown hair", "eyeglasses", "no beard", "talk", "nod", "happy"]
    ada.page.wait_for_function("() => document.querySelector('video').readyState >= 2")  # the clip itself plays
    assert ada.page.evaluate("document.querySelector('video').videoWidth") == 96
    left, right = ada.page.locator(".seen").bounding_box(), ada.page.locator(".written").bounding_box()
    assert left["x"] + left["width"] <= right["x"] + 1 and abs(left["y"] - right["y"]) < 2
    assert ada.errors == []


def test_space_pauses_the_clip_and_the_dot_steps_one_frame(browser, server):
    ada = Reviewer(browser, server, "ada")
    ada.page.wait_for_function(
        "() => document.querySelector('video').readyState >= 2 && !document.querySelector('video').paused"
    )
    ada.press(" ")
    assert ada.page.evaluate("document.querySelector('video').paused")
    before = ada.page.evaluate("(document.querySelector('video').currentTime = 0.1)")
    ada.press(".")
    assert ada.page.evaluate("document.querySelector('video').currentTime") == pytest.approx(before + 0.04, abs=0.01)


def test_two_reviewers_see_their_own_verdicts_and_their_agreement(browser, server):
    ada, bob = Reviewer(browser, server, "ada"), Reviewer(browser, server, "bob")
    for person, keys in ((ada, "aar"), (bob, "arr")):
        for number, key in enumerate(keys, start=1):
            person.press(key)
            person.sees("#name", f"clip00{number}")
    ada.sees("#count", "3 of 5 judged")
    bob.page.click("#agreement-button")
    bob.page.wait_for_selector("#pairs td")
    assert bob.page.locator("#pairs td").all_text_contents() == ["ada, bob", "3", "0.67", "0.40"]
    assert ada.errors == bob.errors == []


def test_a_verdict_that_cannot_be_saved_is_reported_and_the_page_stays(browser, server, out, monkeypatch):
    ada = Reviewer(browser, server, "ada")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ada.press("a")
    ada.sees("#status", "not saved: No space left on device")
    assert ada.page.text_content("#name") == "clip000" and verdicts(out, "ada") == {}
    monkeypatch.undo()
    ada.press("a")
    ada.sees("#name", "clip001")
