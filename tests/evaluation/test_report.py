"""The report: the page's content, its safety against untrusted text, and its look in a browser."""

import base64
import copy
import html.parser
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from favchat_jax.errors import UserError
from favchat_jax.evaluation import ablations, report
from favchat_jax.evaluation.report import charts, examples

EVIL = "<script>alert('x')</script>\"'><img src=http://e.vil/x onerror=alert(1)> | *b* &amp; {{ 7*7 }}"
VOID = {"meta", "img", "line", "circle", "polyline", "polygon", "br", "link"}


class Page(html.parser.HTMLParser):
    """Collects elements with their attributes and each element's text; fails if elements are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, len(self.texts)))
            self.texts.append((tag, ""))
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, number in self._open:
            tag, text = self.texts[number]
            self.texts[number] = (tag, text + data)

    def all(self, tag):
        return [" ".join(text.split()) for name, text in self.texts if name == tag]

    def rows(self):
        return self.all("tr")


def sample(number, correct, answer, **more):
    return {
        "id": f"{number:03d}",
        "question": "Which emotion?",
        "expected": "happy",
        "answer": answer,
        "predicted": "happy" if correct else None,
        "correct": correct,
        **more,
    }


def result(model="runs/tiny-v1/stage3", hits=(True, False, True, False), **more):
    share = sum(hits) / len(hits)
    accuracy = {"value": share, "low": share - 0.1, "high": share + 0.1, "scale": 100}
    return {
        "benchmark": "dfew",
        "model": model,
        "describer": None,
        "n": len(hits),
        "complete": True,
        "missing": [],
        "notes": [],
        "figures": {"war": accuracy, "cider": {"value": 0.4164, "low": None, "high": None, "scale": 1}},
        "groups": {"fold 1": {"n": len(hits), "figures": {"war": accuracy}}},
        "confusion": {"labels": ["happy", "sad"], "counts": [[3, 1, 0], [0, 0, 0]]},
        "curves": {"ROC": {"x": [0, 0.5, 1], "y": [0, 0.8, 1], "x_label": "false", "y_label": "true"}},
        "published": [{"model": "FaVChat", "figures": {"war": 77.88}}],
        "judge": None,
        "provenance": {"config": {"data": {"root": "DFEW"}}, "seed": 0},
        "samples": [sample(i, hit, "It is happy." if hit else "Hm.", kind="ab"[i % 2]) for i, hit in enumerate(hits)],
        **more,
    }


def ablation_table(ablate=ablations):
    def answers(*hits):
        return [
            {"clip": f"c{i}", "question": "?", "kind": "ab"[i % 2], "correct": bool(hit)} for i, hit in enumerate(hits)
        ]

    compared = ablate.compare("v1", {"none": [answers(1, 1), answers(1, 0)], "no_face": [answers(0, 1), answers(0, 0)]})
    steps = {"stage1": 240, "stage2": 360, "stage3": 30}
    return {"table": "ablations", "variant": "v1", "seeds": [0, 1], "steps": steps, **compared}


def frame_lengths():
    figures = {"all": {"n": 4, "value": 0.5, "low": 0.4, "high": 0.6, "scale": 100}}
    figures |= {"motion": {"n": 2, "value": 0.25, "low": 0.2, "high": 0.3, "scale": 100}}
    rows = [{"frames": frames, "figures": figures} for frames in (4, 8)]
    published = {"frames": [16, 32], "Correctness": [4.84, 4.89]}
    return {"table": "frame_length", "checkpoint": "run", "trained_on": 8, "rows": rows, "published": published}


def adapter_weights():
    groups = {
        "face clips": {"n": 2, "mean": 0.7, "std": 0.1, "weights": [0.6, 0.8], "published": [0.702, 0.084]},
        "general clips": {"n": 2, "mean": 0.3, "std": 0.1, "weights": [0.2, 0.4], "published": [0.297, 0.08]},
    }
    about = {"table": "adapter_weights", "checkpoint": "run", "question": "Describe it.", "cohens_d": 4.0}
    return {**about, "groups": groups}


def no_frames(result, sample):
    return None


def red(result, sample):
    return np.broadcast_to(np.array([200, 20, 20], np.uint8), (4, 16, 16, 3))


def page_of(*results, frames=no_frames, examples=9):
    built = report.build(results, frames, examples)
    return built, Page(report.to_html(built))


def test_the_table_shows_percent_with_intervals_and_the_papers_row_as_printed():
    _, page = page_of(result())
    rows = page.rows()
    assert "model war cider" in rows
    assert "runs/tiny-v1/stage3 50.00 40.00 – 60.00 0.416" in rows
    assert "FaVChat published 77.88 –" in rows


def test_several_models_on_a_benchmark_share_a_section_and_the_best_is_marked():
    server = result("openai:http://host:8000/v1#gpt-4o", hits=(True, True, True, False))
    again = result("openai:http://host:8000/v1#gpt-4o", hits=(False,) * 4, describer="runs/tiny-v1/stage3")
    built, page = page_of(result(), server, again, result())
    assert len(built["sections"]) == 1
    models = [row["name"] for row in built["sections"][0]["tables"][0]["rows"] if row["tag"] != "baseline"]
    assert models == ["runs/tiny-v1/stage3", "gpt-4o", "gpt-4o w. FaVChat", "runs/tiny-v1/stage3 (run 2)", "FaVChat"]
    best = [row["cells"][0]["best"] for row in built["sections"][0]["tables"][0]["rows"]]
    assert best == [False, True, False, False, False, False]


def test_differing_answers_of_several_models_are_shown_side_by_side():
    built, page = page_of(result(), result("openai:http://h#other", hits=(True, True, True, False)))
    lists = {shown["title"]: shown["cards"] for shown in built["sections"][0]["examples"]}
    assert list(lists) == ["Side by side", "Failures", "Examples"]
    (card,) = lists["Side by side"]
    assert card["id"] == "001" and [said["verdict"] for said in card["answers"]] == ["wrong", "right"]
    assert [said["read"] for said in card["answers"]] == ["no label found", "read as happy"]
    assert [card["id"] for card in lists["Failures"]] == ["003"]
    assert [card["id"] for card in lists["Examples"]] == ["000", "002"]


def test_failures_take_kinds_in_turn():
    one = result(hits=(False,) * 8)
    for number, row in enumerate(one["samples"]):
        row["kind"] = "rare" if number == 7 else "often"
    built, _ = page_of(one, examples=3)
    (failures,) = built["sections"][0]["examples"]
    assert [card["id"] for card in failures["cards"]] == ["000", "007", "001"]


def test_answers_with_scores_instead_of_right_and_wrong_are_shown_worst_first():
    one = result(hits=(True,) * 3)
    for row, correctness in zip(one["samples"], (4, 1, 3), strict=True):
        row |= {"correct": None, "predicted": None, "scores": {"correctness": correctness, "reason": "text"}}
    built, page = page_of(one, examples=2)
    (lowest, _) = built["sections"][0]["examples"]
    assert lowest["title"] == "Lowest scores" and [card["id"] for card in lowest["cards"]] == ["001", "002"]
    assert lowest["cards"][0]["answers"][0]["scores"] == "correctness 1" and "✗" not in report.to_html(built)


def test_frames_of_a_clip_are_embedded_as_one_picture():
    _, page = page_of(result(), frames=red, examples=1)
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    encoded = np.frombuffer(base64.b64decode(sources[0].partition(",")[2]), np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert picture.shape == (16, 64, 3)
    assert np.abs(picture.reshape(-1, 3).mean(0) - [20, 20, 200]).max() < 8  # OpenCV's order is blue, green, red


def test_confusion_counts_are_shares_of_their_row_and_an_empty_row_is_empty():
    built, page = page_of(result())
    assert "happy 75 25 4" in page.rows() and "sad 0" in page.rows()
    (confusion,) = built["sections"][0]["confusions"]
    assert confusion["columns"] == ["happy", "sad", "none"]


def test_an_incomplete_result_says_what_is_missing():
    missing = [{"id": f"{i}.mp4", "reason": "its clip is not there"} for i in range(5)]
    _, page = page_of(result(complete=False, missing=missing))
    warning = "runs/tiny-v1/stage3 is incomplete: 5 listed samples have no result (0.mp4, 1.mp4, 2.mp4, ...)"
    assert any(warning in text for text in page.all("p"))
    assert any("its clip is not there" in text for text in page.all("pre"))


def test_figures_that_are_not_comparable_say_so_above_the_published_rows():
    reasons = ["the clips are a miniature of rendered faces", "the model is an embedded one"]
    built, page = page_of(result(incomparable=reasons), result())
    warning = "runs/tiny-v1/stage3 is not comparable with the published rows: " + "; ".join(reasons) + "."
    assert page.all("p").count(warning) == 1 and built["sections"][0]["warnings"] == [warning]
    assert "is not comparable with the published rows" in report.to_markdown(built)
    assert page_of(result(incomparable=reasons, published=[]))[0]["sections"][0]["warnings"] == []


def test_the_most_frequent_answer_stands_beside_shares_of_hits_alone():
    one = result()
    for row, expected in zip(one["samples"], ("happy", "sad", "sad", "sad"), strict=True):
        row["expected"] = expected
    assert "always the most frequent answer baseline 75.00 –" in page_of(one)[1].rows()
    scored = [{**row, "correct": None} for row in one["samples"]]
    assert not any("most frequent" in row for row in page_of(result(samples=scored))[1].rows())


def test_each_kinds_most_frequent_answer_is_a_line_on_its_bar():
    kinds = {"fold 1": {"n": 4, "accuracy": 0.5, "majority_baseline": 0.375}}
    built, page = page_of(result(by_kind=kinds, majority_baseline=0.375))
    assert "always the most frequent answer baseline 37.50 –" in page.rows()
    lines = [attributes["style"] for tag, attributes in page.elements if attributes.get("class") == "majority"]
    assert lines == ["left: 37.5%"] and any("The upright line" in text for text in page.all("p"))


def test_table_6_has_differences_intervals_and_both_orders():
    _, page = page_of(ablation_table())
    rows = page.rows()
    assert any(row.startswith("FaVChat 75.00") and row.endswith("77.88 60.97") for row in rows)
    assert any(row.startswith("w/o FE 25.00") and " 50.00 " in row for row in rows)
    assert page.all("li") == ["Order found: FaVChat > w/o FE.", "Order in the paper: FaVChat > w/o FE."]


def test_charts_of_frame_lengths_and_weights_are_drawn_to_scale():
    _, page = page_of(frame_lengths(), adapter_weights())
    assert "all 50.00 40.00 – 60.00 50.00 40.00 – 60.00" in page.rows()
    assert "face clips n 2 0.700 0.100 0.702 0.084" in page.rows()
    specks = [float(a["cx"]) for tag, a in page.elements if tag == "circle" and a["class"].startswith("speck")]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert sorted(specks) == pytest.approx([120 + x * (right - 120) for x in (0.2, 0.4, 0.6, 0.8)], abs=0.1)
    points = [a["points"] for tag, a in page.elements if tag == "polyline"][0].split()
    assert all(left <= float(point.split(",")[0]) <= right for point in points)


def evil_results():
    evil = result(model=f"openai:http://h#{EVIL}", notes=[EVIL], complete=False, missing=[{"id": EVIL, "reason": EVIL}])
    evil["benchmark"] = EVIL
    evil["figures"][EVIL] = evil["figures"].pop("cider")
    evil["groups"] = {EVIL: evil["groups"]["fold 1"]}
    evil["confusion"]["labels"] = [EVIL, "sad"]
    evil["curves"] = {EVIL: {**evil["curves"]["ROC"], "x_label": EVIL, "y_label": EVIL}}
    evil["published"] = [{"model": EVIL, "figures": {"war": 1.0}}]
    evil["provenance"] = {EVIL: EVIL}
    for row in evil["samples"]:
        row |= {name: EVIL for name in ("id", "question", "expected", "answer", "predicted", "kind")}
    weights = adapter_weights()
    weights["groups"][EVIL] = weights["groups"].pop("general clips")
    lengths = frame_lengths()
    lengths["checkpoint"] = lengths["rows"][0]["figures"][EVIL] = EVIL
    lengths["rows"] = [
        {**row, "figures": {"all": row["figures"]["all"], EVIL: row["figures"]["motion"]}} for row in lengths["rows"]
    ]
    return evil, weights, lengths


def test_untrusted_text_never_becomes_markup_and_the_page_loads_and_runs_nothing():
    built, page = page_of(*evil_results(), frames=red)
    assert not {"script", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#part-")), value
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    text = report.to_html(built)
    assert "<script" not in text and "{{ 7*7 }}" in text
    assert any(EVIL in said for said in page.all("dd"))
    markdown = report.to_markdown(built)
    assert "<script" not in markdown and "<img" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(re.sub(r"\\.", "", line).count("|") >= 3 for line in tables)


def test_markdown_and_json_hold_the_same_figures():
    built, _ = page_of(result(), ablation_table(), frames=red)
    markdown = report.to_markdown(built)
    assert "| runs/tiny-v1/stage3 | 50.00 40.00 – 60.00 | 0.416 |" in markdown
    assert "| FaVChat (published) | 77.88 |  |" in markdown
    assert "| happy | 3 | 1 | 0 |" in markdown and "- Order found: FaVChat > w/o FE." in markdown
    content = json.loads(report.to_json(built))
    assert content["sections"][0]["tables"][0]["rows"][0]["cells"][0]["value"] == "50.00"
    assert "base64" not in report.to_json(built)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[1]", "is not a result"),
        ('{"loss": 1}', "is not a result"),
        ('{"benchmark": "dfew", "model": "x"}', "lacks complete, figures, groups, n, provenance, samples"),
        ('{"table": "frame_length"}', "lacks checkpoint, published, rows, trained_on"),
        ('{"table": "seating"}', "is not a result"),
    ],
)
def test_a_file_that_is_not_a_result_is_refused_by_name(content, says, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"file.json {says}"):
        report.read([path])


def test_a_damaged_result_is_a_users_error():
    damaged = result()
    del damaged["samples"][0]["question"]
    with pytest.raises(UserError, match="a result of dfew is damaged .KeyError: 'question'."):
        report.build([damaged], no_frames)


def test_building_a_report_does_not_change_the_results(tmp_path):
    written = [result(), ablation_table()]
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, one in zip(paths, written, strict=True):
        path.write_text(json.dumps(one))
    read = report.read(paths)
    before = copy.deepcopy(read)
    report.build(read, no_frames)
    assert read == before


def test_axes_have_round_ticks_that_enclose_their_values():
    axis = charts._Axis([0.62, 0.913], 0, 100)
    assert axis.ticks == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0]) and axis(0.6) == 0 and axis(1.0) == 100
    assert charts._Axis([16, 128], 0, 100).ticks == [0, 50, 100, 150]
    assert len(charts._Axis([0.5, 0.5], 0, 100).ticks) == 2


def test_a_strip_keeps_the_frames_order():
    frames = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 120, 240)])
    encoded = np.frombuffer(base64.b64decode(examples.strip(frames).partition(",")[2]), np.uint8)
    row = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)[4]
    assert row.shape == (24,) and row[4] < 20 < row[12] < 200 < row[20]


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    pytest.skip("no Chromium on this machine: install Debian's chromium to see the page in a browser")


def browse(chromium, path, *options):
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    return subprocess.run([*command, profile, path.as_uri()], capture_output=True, timeout=120, text=True)


def test_a_browser_shows_the_page_light_and_dark_and_runs_nothing(chromium, tmp_path):
    built, _ = page_of(*evil_results(), ablation_table(), frames=red)
    path = tmp_path / "page.html"
    # Any script or handler that ran would change the title.
    path.write_text(report.to_html(built).replace("alert(", "document.title=("))
    dumped = browse(chromium, path, "--dump-dom").stdout
    assert f"<title>{report.TITLE}</title>" in dumped and "Table 6 in miniature (v1)" in dumped
    brightness = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        look = f"--blink-settings=preferredColorScheme={number}"
        browse(chromium, path, look, "--window-size=1200,900", f"--screenshot={shot}")
        brightness[scheme] = cv2.imread(str(shot), cv2.IMREAD_GRAYSCALE).mean()
    assert brightness["dark"] < 80 and brightness["light"] > 170


def test_the_page_fits_500_pixels(chromium, tmp_path):
    long = result(model="openai:http://host:8000/v1#some-organisation/some-very-long-model-name-7B-Instruct")
    group, figures = "questions about the direction of a movement", long["groups"]["fold 1"]
    kinds = {"groups": {group: figures}, "by_kind": {group: {"majority_baseline": 0.4}}}
    built, _ = page_of({**long, **kinds}, result(**kinds), ablation_table(), frames=red)
    path = tmp_path / "page.html"
    measure = "<script>document.title = `${document.documentElement.scrollWidth} ${innerWidth}`</script>"
    page = re.sub(r"<meta http-equiv[^>]*>", "", report.to_html(built))  # the policy would stop the script
    path.write_text(page.replace("</body>", f"{measure}</body>"))
    dumped = browse(chromium, path, "--window-size=500,900", "--dump-dom").stdout
    needed, given = map(int, re.search(r"<title>(\d+) (\d+)</title>", dumped).groups())
    assert needed <= given == 500
