"""The command that evaluates: checkpoints and servers, describers, results that say what they are of, and stops."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from configs.eval import dfew as dfew_config
from configs.eval import rendered as rendered_config
from favchat_jax.checkpoints.run import load_run
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluate import evaluate, identity_of, judge_of
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.respondents import FaVChat
from favchat_jax.evaluation.result import PACKAGES, write_result
from favchat_jax.evaluation.session import Journal
from tests.conftest import DATA, places_of, start_module
from tests.evaluation.servers import asked, serve
from tools import miniatures


@pytest.fixture(scope="module")
def dfew(tmp_path_factory) -> Path:
    """A miniature of DFEW, 10 clips."""
    return miniatures.make("dfew", tmp_path_factory.mktemp("miniature") / "dfew", clips=10)


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    """The workdir of a finished stage 3."""
    return trained.folder / "stage3"


def config_of(root: Path, **changes):
    ours = {"batch": 4, "description_tokens": 4, "max_new_tokens": 4, "describe": "Who?", "question": "Mood?"}
    config = EvaluationConfig.from_ml_collections(dfew_config.get_config())
    return config.updated({"data.root": str(root), **ours, **changes})


def server_config(root: Path, **changes):
    return config_of(root, **changes).updated({"server.frames": 2, "server.size": 32, "server.retries": 0})


@pytest.mark.parametrize("method", ["describe", "likelihood"])
def test_a_checkpoint_is_evaluated_on_a_data_set_in_its_published_layout(method, dfew, checkpoint):
    result = evaluate(config_of(dfew, method=method), checkpoint)
    assert result["n"] == 10 and result["complete"] and result["model"] == str(checkpoint)
    assert {row["id"] for row in result["samples"]} == {str(i) for i in range(1, 11)}
    if method == "likelihood":
        assert all(max(row["likelihood"], key=row["likelihood"].get) == row["predicted"] for row in result["samples"])


def test_a_result_says_what_it_is_of(dfew, checkpoint, trained):
    result = evaluate(config_of(dfew, method="direct", seed=3, limit=1), checkpoint)
    told = result["provenance"]
    assert told["config"]["data"]["root"] == str(dfew) and told["seed"] == 3 and told["describer"] is None
    assert set(told["versions"]) == {"python", *PACKAGES}
    assert told["checkpoint"] == identity_of(checkpoint, load_run(checkpoint))
    assert (told["checkpoint"]["stage"], told["checkpoint"]["step"]) == ("stage3", 20)
    other = identity_of(trained.folder / "stage2", load_run(trained.folder / "stage2"))
    assert told["checkpoint"]["sha256"] != other["sha256"]
    assert told["data"]["name"] == "DFEW" and told["data"]["listed"] == 10 and len(told["data"]["sha256"]) == 64
    json.dumps(result, allow_nan=False)


def test_an_evaluation_with_face_crops_names_the_clips_without_a_face(dfew, checkpoint):
    result = evaluate(config_of(dfew, method="direct", limit=3).updated({"data.face_crop": True}), checkpoint)
    assert result["provenance"]["checkpoint"]["face_crop"]["detector"] == "centerface"
    assert set(result["without_face"]) <= {row["id"] for row in result["samples"]}
    assert "without_face" not in evaluate(config_of(dfew, method="direct", limit=1), checkpoint)
    finer = config_of(dfew, method="direct", limit=1).updated({"data.face_crop": True, "data.smallest_face": 0.05})
    assert evaluate(finer, checkpoint)["provenance"]["checkpoint"]["face_crop"]["smallest"] == 0.05
    missing = config_of(dfew, method="direct").updated({"data.face_crop": True, "data.detector_model": "gone.onnx"})
    with pytest.raises(UserError, match="detector model gone.onnx: no such file"):
        evaluate(missing, checkpoint)


def test_narrow_kernels_are_named_in_the_result_and_a_batch_must_divide_over_the_mesh(dfew, checkpoint):
    config = config_of(dfew, method="direct", limit=1)
    identity = evaluate(config, checkpoint, storage="int8")["provenance"]["checkpoint"]
    assert identity == identity_of(checkpoint, load_run(checkpoint), "int8") and identity["storage"] == "int8"
    with pytest.raises(UserError, match=f"batch={config.batch} does not divide over 7 devices of --mesh"):
        evaluate(config, checkpoint, mesh={"data": 7})


def test_the_data_sets_hash_changes_with_its_labels_and_its_clips(dfew, tmp_path):
    def hashed(root):
        with serve(lambda body: "happy") as server:
            result = evaluate(server_config(root, method="direct"), model=f"openai:{server.url}#m")
        return result["provenance"]["data"]["sha256"]

    first, root = hashed(dfew), Path(shutil.copytree(dfew, tmp_path / "dfew"))
    assert hashed(root) == first
    fold = root / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv"
    fold.write_text(fold.read_text().replace(",1", ",2").replace(",3", ",2"))
    second = hashed(root)
    (root / "Clip" / "original" / "1.mp4").write_bytes((root / "Clip" / "original" / "2.mp4").read_bytes())
    assert len({first, second, hashed(root)}) == 3


def test_a_servers_model_is_sent_the_frames_as_pictures_in_order(dfew):
    with serve(lambda body: "The man is happy.") as server:
        result = evaluate(server_config(dfew, method="direct"), model=f"openai:{server.url}#some/model")
    assert result["model"] == f"openai:{server.url}#some/model" and result["n"] == 10
    assert {row["predicted"] for row in result["samples"]} == {"happy"}
    body = server.requests[0]
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0, 4)
    assert kinds == ["image_url", "image_url", "text"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_server_is_told_its_own_description_in_the_second_turn(dfew):
    with serve(lambda body: "A smiling man." if asked(body) == "Who?" else "happy") as server:
        evaluate(server_config(dfew, limit=1, folds=(1,)), model=f"openai:{server.url}#m")
    messages = server.requests[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "A smiling man." and asked(server.requests[-1]) == "Mood?"


def test_a_describers_words_reach_the_server(dfew, checkpoint):
    with serve(lambda body: "happy") as server:
        config = server_config(dfew, method="direct", limit=1)
        result = evaluate(config, model=f"openai:{server.url}#m", describer=checkpoint)
    assert result["describer"] == str(checkpoint) == result["provenance"]["describer"]["name"]
    assert all(asked(body).startswith("Description of the video: ") for body in server.requests)


def test_a_server_that_refuses_one_clip_leaves_it_out_and_one_that_is_gone_ends_the_run(dfew, tmp_path):
    count = [0]

    def third(body):
        count[0] += 1
        return 400 if count[0] == 3 else "happy"

    config = server_config(dfew, method="direct")
    with serve(third) as server:
        result = evaluate(config, model=f"openai:{server.url}#m")
    assert (result["n"], result["complete"], len(result["missing"])) == (9, False, 1)
    with pytest.raises(RunError, match="does not answer"):
        evaluate(config, model=f"openai:{server.url}#m")


@pytest.mark.parametrize(
    "model", ["gpt-4o", "openai:gpt-4o", "openai:http://x/v1", "openai:ftp://x#y", "openai:http://x#"]
)
def test_a_model_of_another_form_is_refused(model, dfew):
    with pytest.raises(UserError, match="is not of the form openai:URL#NAME"):
        evaluate(server_config(dfew), model=model)


def test_a_server_has_no_likelihoods(dfew):
    with serve(lambda body: "x") as server, pytest.raises(UserError, match="gives no likelihoods: choose"):
        evaluate(server_config(dfew, method="likelihood"), model=f"openai:{server.url}#m")


def test_a_second_judge_without_a_first_is_refused(dfew):
    config = config_of(dfew)
    assert judge_of(config) is None
    with pytest.raises(UserError, match="second_judge.model is set but judge.model is not"):
        config.updated({"second_judge.model": "m"})


def test_an_evaluation_that_was_killed_gives_the_same_json_when_it_is_resumed(small_world, tmp_path):
    asked_for, go_on = [0], threading.Event()

    def reply(body):
        asked_for[0] += 1
        if asked_for[0] == 21:  # in one of the middle batches
            go_on.wait(200)
        return asked(body)[::-1]

    journal = tmp_path / "killed.json.answers.jsonl"
    with serve(reply) as server:
        arguments = [
            "--config=configs/eval/rendered.py",
            f"--config.data.name={DATA}",
            f"--config.data.packed={small_world.packed}",
            *("--config.batch=2", "--config.server.frames=2", "--config.server.size=32"),
            f"--model=openai:{server.url}#m",
        ]
        process = start_module("favchat_jax.evaluate", *arguments, f"--out={tmp_path / 'killed.json'}")
        while asked_for[0] < 21:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        go_on.set()
        assert journal.exists() and not (tmp_path / "killed.json").exists()
        before = asked_for[0]
        for name in ("killed.json", "whole.json"):
            process = start_module("favchat_jax.evaluate", *arguments, f"--out={tmp_path / name}")
            _, stderr = process.communicate(timeout=250)
            assert process.returncode == 0, stderr
            asked_for.append(asked_for[0] - before)
            before = asked_for[0]
    assert 0 < asked_for[1] < asked_for[2]  # the resumed one had less to ask
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not journal.exists()


def rendered_arguments(small_world, *model: str) -> list[str]:
    """The command line of the held-out rendered clips, in batches of 2."""
    data = f"--config.data.name={DATA}", f"--config.data.packed={small_world.packed}"
    return ["--config=configs/eval/rendered.py", *data, "--config.batch=2", *model]


def test_two_processes_write_the_json_of_one(small_world, checkpoint, tmp_path):
    arguments = rendered_arguments(small_world, f"--checkpoint={checkpoint}")
    places = {"two.json": places_of(2), "one.json": [""]}
    for name, of in places.items():
        started = [
            start_module("favchat_jax.evaluate", *arguments, f"--out={tmp_path / name}", f"--processes={place}")
            for place in of
        ]
        outputs = [process.communicate(timeout=250) for process in started]
        assert all(process.returncode == 0 for process in started), outputs
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_when_one_of_two_processes_dies_the_other_ends_and_one_goes_on_with_all_answers(small_world, tmp_path):
    answers, held = [], threading.Event()

    def reply(body):
        answers.append(body)
        if len(answers) >= 41:  # both have written some batches
            held.wait(200)
        return asked(body)[::-1]

    with serve(reply) as server:
        model = "--config.server.frames=2", "--config.server.size=32", f"--model=openai:{server.url}#m"
        arguments = rendered_arguments(small_world, *model)
        out = f"--out={tmp_path / 'two.json'}"
        first, second = (
            start_module("favchat_jax.evaluate", *arguments, out, f"--processes={place}") for place in places_of(2)
        )
        while len(answers) < 41:
            assert first.poll() is None and second.poll() is None
            time.sleep(0.01)
        second.send_signal(signal.SIGKILL)
        second.communicate()
        _, stderr = first.communicate(timeout=60)
        assert first.returncode == 1
        assert [line for line in stderr.splitlines() if "all answers are kept: start all processes again" in line]
        held.set()
        counts = []
        for name in ("two.json", "one.json"):
            answers.clear()
            process = start_module("favchat_jax.evaluate", *arguments, f"--out={tmp_path / name}")
            _, stderr = process.communicate(timeout=250)
            assert process.returncode == 0, stderr
            counts.append(len(answers))
    assert 0 < counts[0] <= counts[1] - 20
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_more_processes_than_batches_are_refused_by_all(small_world, checkpoint, tmp_path):
    arguments = rendered_arguments(small_world, f"--checkpoint={checkpoint}", "--config.batch=100")
    started = [
        start_module("favchat_jax.evaluate", *arguments, f"--out={tmp_path / 'x.json'}", f"--processes={place}")
        for place in places_of(2)
    ]
    for process in started:
        _, stderr = process.communicate(timeout=250)
        assert process.returncode == 2
        assert "2 processes are more than the 1 batches of batch=100: start fewer processes" in stderr


def test_a_checkpoints_evaluation_that_was_stopped_gives_the_same_result_when_it_is_resumed(
    dfew, checkpoint, tmp_path, monkeypatch
):
    answer, batches = FaVChat.answer, [0]

    def stopping(self, *arguments, **options):
        batches[0] += 1
        if batches[0] == 5:  # the second batch of the second step
            raise KeyboardInterrupt
        return answer(self, *arguments, **options)

    monkeypatch.setattr(FaVChat, "answer", stopping)
    journal = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_of(dfew), checkpoint, journal=Journal(journal))
    resumed = evaluate(config_of(dfew), checkpoint, journal=Journal(journal))
    assert batches[0] == 5 + 2
    assert resumed == evaluate(config_of(dfew), checkpoint)


def test_batches_of_one_and_of_eight_give_the_same_answers(small_world, checkpoint):
    config = EvaluationConfig.from_ml_collections(rendered_config.get_config())
    config = config.updated({"data.name": DATA, "data.packed": small_world.packed, "limit": 6})
    answers = []
    for batch in (1, 8):
        result = evaluate(config.updated({"batch": batch}), checkpoint)
        answers.append([row["answer"] for row in result["samples"]])
    assert answers[0] == answers[1]


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "r.json"
    write_result(out, {"n": 1})
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write_result(out, {"n": float("nan")})
    assert json.loads(out.read_text()) == {"n": 1}
