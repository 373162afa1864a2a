"""The endpoint's client, the judge and distillation, against a real server over the engine; and the
local teacher."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data_prep import difficulty, distill
from nanosport.engine.own import OwnSampler
from nanosport.env import scoring
from nanosport.env.endpoint import Endpoint, EndpointError, Refused, Reply
from nanosport.env.env import Limits
from nanosport.env.judge import Judge, NoGrade, agreement, grade_of
from nanosport.env.reward import gated_reward, reward_function, rewards_of
from nanosport.env.rollout import replay
from nanosport.env.tools import tool_call
from nanosport.image import ImageConfig
from nanosport.model.folder import load_model, load_tokenizer, version
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode, Question, Turn, read_questions, read_records
from tests.helpers.chat_server import ChatServer

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "assets" / "nano-deepsport"
HELLO = [{"role": "user", "content": "Call the decisive play."}]


@pytest.fixture(scope="module")
def server():
    with ChatServer(TEACHER) as running:
        yield running


@pytest.fixture
def endpoint(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.trouble.clear()
    return Endpoint(server.url, "nano", tmp_path / "answers", price_in=2.0, price_out=10.0)


def ask(endpoint, sample=0):
    return endpoint.chat(HELLO, sample, temperature=0.7, max_tokens=8)


def test_an_answer_is_asked_for_once(endpoint, server):
    before = len(server.answered)
    first, again, other = ask(endpoint), ask(endpoint), ask(endpoint, sample=1)
    assert first.text == again.text and (first.cached, again.cached, other.cached) == (
        False,
        True,
        False,
    )
    assert len(server.answered) - before == 2 and len(list(endpoint.cache.glob("*/*.json"))) == 2
    assert ask(replace(endpoint)).cached  # another run
    tally = endpoint.tally
    assert (tally["calls"], tally["cached"]) == (2, 2) and tally["completion_tokens"] > 0
    assert endpoint.cost == pytest.approx(
        (tally["prompt_tokens"] * 2 + tally["completion_tokens"] * 10) / 1e6
    )


def test_threads_that_ask_the_same_at_once_pay_once(endpoint, server):
    before = len(server.answered)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda sample: ask(endpoint, sample), [7, 8] * 4))
    assert len(server.answered) - before == 2 and sum(not reply.cached for reply in replies) == 2
    assert (
        len({reply.text for reply in replies[::2]})
        == len({reply.text for reply in replies[1::2]})
        == 1
    )


def test_passing_trouble_is_waited_for(endpoint, server):
    server.trouble += [429, 503, "drop", 500]
    assert (
        not ask(endpoint).cached and endpoint.tally["retries"] == 4 and endpoint.tally["calls"] == 1
    )


@pytest.mark.parametrize(
    "trouble, why",
    [
        ([401], "status 401"),
        ([404], "model's name"),
        (["rubbish"] * 7, "not a chat completion"),
        ([400], "as told"),
        ([302], "status 302"),
        ([500] * 7, "no answer after 7 tries"),
    ],
)
def test_lasting_trouble_is_one_line_and_nothing_is_kept(endpoint, server, trouble, why):
    server.trouble += trouble
    with pytest.raises(EndpointError, match=why) as caught:
        ask(endpoint)
    assert (
        "\n" not in str(caught.value)
        and server.url in str(caught.value)
        and not list(endpoint.cache.glob("*/*"))
    )
    assert not server.trouble


def test_addresses_and_keys(endpoint, server, monkeypatch):
    with pytest.raises(EndpointError, match="http or https"):
        Endpoint("file:///etc/passwd", "nano", endpoint.cache)
    with pytest.raises(EndpointError, match="no answer after 2 tries"):
        ask(replace(endpoint, url="http://127.0.0.1:9/v1", retries=1))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    ask(replace(endpoint), sample=5)
    assert server.headers[-1]["Authorization"] == "Bearer secret-key"
    assert not any("secret-key" in path.read_text() for path in endpoint.cache.glob("*/*"))
    ask(replace(endpoint, key_name="JUDGE_API_KEY"), sample=6)  # each service has its own
    assert "Authorization" not in server.headers[-1]
    for bad in ("secret\nkey", "secret\x00", "sécret"):
        monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": bad})
        with pytest.raises(EndpointError, match="OPENAI_API_KEY: holds what no key does") as caught:
            replace(endpoint)
        assert "cret" not in str(caught.value)
    monkeypatch.setattr(
        os, "environ", {**os.environ, "OPENAI_API_KEY": "secret-key\r\n"}
    )  # as `export KEY=$(cat file)` may leave it
    ask(replace(endpoint), sample=9)
    assert server.headers[-1]["Authorization"] == "Bearer secret-key"


SECRET = "sk-0123456789/abc+def"


@pytest.mark.parametrize("status", [400, 401, 500, 200])
def test_a_key_that_the_server_sends_back_is_never_printed_nor_kept(
    endpoint, server, monkeypatch, status
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    body = f"{'x' * 285} bad key {SECRET}".encode()  # part of it within what is shown
    server.trouble += [reply(status=status, body=body)] * 7
    with pytest.raises(EndpointError) as caught:
        ask(replace(endpoint))
    assert SECRET[:5] not in str(caught.value) and "\n" not in str(caught.value)

    def garbage(request):
        request.wfile.write(f"HTTP/9 {SECRET}\r\n\r\n".encode())

    server.trouble[:] = [garbage] * 7
    with pytest.raises(EndpointError, match="no answer after 7 tries") as caught:
        ask(replace(endpoint))
    assert SECRET not in str(caught.value)
    server.trouble[:] = [reply(body=completion(content=f"Your key is {SECRET}."))]
    assert ask(replace(endpoint)).text == "Your key is [key]."
    assert not any(SECRET in path.read_text() for path in endpoint.cache.glob("*/*"))


@pytest.mark.parametrize(
    "url", ["http://me:pa55word@host/v1", "https://pa55word@host:8000/v1", "me:pa55word@host/v1"]
)
def test_an_address_with_a_password_is_refused_before_anything_is_written(url, tmp_path):
    cfg = distill.Config(tmp_path / "r.jsonl", "nano", tmp_path / "new" / "t.jsonl", url)
    (tmp_path / "r.jsonl").write_text(json.dumps(vars(OPEN)) + "\n")
    for asked in (cfg, replace(cfg, url=None, judge_url=url, judge="nano")):
        with pytest.raises(EndpointError, match="nano: .* take it out") as caught:
            distill.main(asked)
        assert "pa55word" not in str(caught.value)
    assert not list(tmp_path.glob("new/*"))


def test_a_service_on_this_machine_is_asked_past_the_proxy(endpoint, server, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://me:pa55word@127.0.0.1:9")
    port = server.http.server_port
    for k, host in enumerate(("127.0.0.1", "localhost", "0.0.0.0", "127.8.8.8")):
        here = replace(endpoint, url=f"http://{host}:{port}/v1", cache=endpoint.cache / host)
        if host != "127.8.8.8":  # the server listens on one address
            assert ask(here, sample=40 + k).text
        assert "proxy" not in here._name
    for url in ("http://judge.example/v1", "https://judge.example/v1", "http://127.example/v1"):
        with pytest.raises(
            EndpointError, match="through the proxy 127.0.0.1:9, nano: no"
        ) as caught:
            ask(replace(endpoint, url=url, retries=0))
        assert "pa55word" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "judge.example")
    assert "proxy" not in replace(endpoint, url="http://judge.example/v1")._name


def test_a_service_that_is_away_is_waited_for_as_long_as_is_said(
    endpoint, server, monkeypatch, capsys
):
    """Garbled replies are paid for, and not waited for."""
    now = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patient = replace(endpoint, wait_s=600)
    server.trouble += [503] * 9
    assert ask(patient).text and 60 < now[0] < 600
    assert capsys.readouterr().err.count("waiting for it") == 1
    began, server.trouble[:] = now[0], [503] * 99
    with pytest.raises(EndpointError, match="no answer after 1[0-9] tries .status 503"):
        ask(patient, sample=1)
    assert 600 <= now[0] - began < 800
    server.trouble[:] = ["rubbish"] * 7
    with pytest.raises(EndpointError, match="no answer after 7 tries"):
        ask(patient, sample=1)
    server.trouble.clear()


def test_a_redirect_does_not_take_the_key_elsewhere(endpoint, server, monkeypatch):
    asked = []

    def elsewhere(request):
        request.send_response(302)
        request.send_header("Location", f"{server.url}/elsewhere")
        request.end_headers()
        asked.append(1)

    server.trouble += [elsewhere]
    before = len(server.headers)
    with pytest.raises(EndpointError, match="status 302"):
        ask(endpoint, sample=11)
    assert asked and len(server.headers) == before + 1


def reply(*, status=200, body=b"", announced=None, stall_s=0.0, each_s=0.0):
    """What a server may do to a request, for ChatServer.trouble."""

    def answer(request):
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if announced is None else announced))
        request.end_headers()
        for k in range(len(body)):
            request.wfile.write(body[k : k + 1])
            if each_s:
                request.wfile.flush()
                threading.Event().wait(each_s)  # time.sleep is not what it was in these tests
        request.wfile.flush()
        threading.Event().wait(stall_s)

    return answer


def drip_headers(request):
    """A server whose head never ends."""
    request.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for k in range(100):
        request.wfile.write(b"X-%d: y\r\n" % k)
        threading.Event().wait(0.05)


def completion(**message) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize(
    "trouble",
    [
        reply(body=completion(content="half")[:30], announced=500),
        reply(body=completion(content=5)),
        reply(body=completion(content=[{"type": "text", "text": 7}])),
        reply(body=completion(content={"text": "x"})),
        reply(body=completion(content=True)),
        reply(body=b"[" * 100_000),
        reply(body=b'{"choices":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        reply(body=b'{"choices": [], "n": ' + b"9" * 5_000 + b"}"),
        reply(body=completion(content="x", reasoning_content=["y"])),
        reply(status=500, body=b"x", announced=1000, stall_s=2.0),
        reply(body=b" " * 40 + completion(content="slow"), each_s=0.05),
        reply(status=500, body=b"x" * 400, each_s=0.05),
        drip_headers,
    ],
    ids=[
        "half an answer",
        "a number",
        "a part of another type",
        "an object",
        "a truth value",
        "brackets",
        "closed brackets",
        "a number without end",
        "a list of thoughts",
        "an error that stalls",
        "a trickle",
        "an error that trickles",
        "headers that trickle",
    ],
)
def test_a_garbled_or_halting_reply_is_asked_for_again(endpoint, server, trouble):
    endpoint = replace(endpoint, timeout_s=1.0)
    server.trouble += [trouble]
    assert (
        ask(endpoint, sample=20).text
        and endpoint.tally["retries"] == 1
        and endpoint.tally["calls"] == 1
    )
    (kept,) = endpoint.cache.glob("*/*")
    assert json.loads(kept.read_text())["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    "usage", ["n/a", {"prompt_tokens": "10"}, {"prompt_tokens": None}, [], None]
)
def test_odd_counts_are_none(usage):
    body = json.dumps(
        {
            "choices": [
                {
                    "message": {
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
                    }
                }
            ],
            "usage": usage,
        }
    )
    found = Endpoint("http://x/v1", "m", Path("unused"))._read(body.encode())
    assert found["text"] == "ab" and not sum(found["usage"].values())


def test_a_closed_endpoint_asks_for_nothing_more(endpoint, server):
    ask(endpoint, sample=30)
    before = len(server.headers)
    endpoint.close()
    assert ask(endpoint, sample=30).cached
    with pytest.raises(EndpointError, match="stopped"):
        ask(endpoint, sample=31)
    assert len(server.headers) == before


def test_requests_keep_to_their_rate(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    slow = Endpoint(server.url, "nano", tmp_path, per_minute=60)
    for sample in range(3):
        ask(slow, sample)
    assert sum(waits[:1]) <= 1 and 1 < sum(waits) <= 3


def test_reasoning_that_a_server_sends_apart_is_put_back():
    endpoint = Endpoint("http://x/v1", "m", Path("unused"))
    message = {"content": "<answer>B</answer>", "reasoning_content": " red 7. "}
    found = endpoint._read(
        json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    )
    assert found["text"] == "<think>red 7.</think>\n<answer>B</answer>"
    opened = {
        "content": "red 7.</think>\n<answer>B</answer>"
    }  # the server's template wrote <think> itself
    found = endpoint._read(
        json.dumps({"choices": [{"message": opened, "finish_reason": "stop"}]}).encode()
    )
    assert found["text"] == "<think>red 7.</think>\n<answer>B</answer>"


def test_frames_travel_as_jpeg():
    frame = (
        torch.arange(3 * 48 * 64, dtype=torch.float32)
        .view(3, 48, 64)
        .div(40)
        .sin()
        .mul(60)
        .add(128)
        .to(torch.uint8)
    )

    class OneFrame:
        """A video of the frame."""

        def frames(self, indices):
            return frame[None]

    env = SimpleNamespace(video=OneFrame(), times_s=None)
    label, part, after = distill.pictures(env, [7], "<", ">")
    assert after == {"type": "text", "text": "\n>"}
    url = part["image_url"]["url"]
    assert label == {"type": "text", "text": "<frame 7:"}
    assert url.startswith("data:image/jpeg;base64,/9j/") and len(url) < 20_000


# the judge


class Grader(Endpoint):
    """An endpoint whose replies are given: what is tested is what is made of them."""

    replies: list

    def chat(self, messages, sample=0, **options):
        self.asked = messages
        said = self.replies.pop(0)
        return said if isinstance(said, Reply) else Reply(said, True, False)


@pytest.fixture
def grader():
    endpoint = Grader("http://x/v1", "grader", Path("unused"))
    endpoint.replies = []
    return endpoint


OPEN = Question("q", "v", "soccer", "commentary", "Call it.", (), "red 7 volley")


def test_the_judge_scores_open_answers_and_leaves_the_others_to_the_rule(grader):
    judge = Judge(grader)
    grader.replies = ["It fits.\nGRADE: 3"]
    assert (
        judge.answer("a volley by red 7", OPEN) == 0.75
        and "a volley by red 7" in grader.asked[1]["content"]
    )
    assert judge.answer("Red 7: volley!", OPEN) == 1.0 and judge.answer(None, OPEN) == 0.0
    letter = Question("q", "v", "soccer", "rules", "Which?", ("a", "b"), "B")
    number = Question(
        "q", "v", "diving", "assessment", "Score?", (), "85.5", kind="number", tolerance=0.5
    )
    assert judge.answers(["B", "A", "86", "87"], [letter, letter, number, number]) == [
        1.0,
        0.0,
        1.0,
        0.0,
    ]


def test_a_judge_that_rambles_is_asked_again_then_named(grader):
    grader.replies = ["Well.", "GRADE: 9", "So be it.\n**GRADE: 4**"]
    assert Judge(grader).answer("x", OPEN) == 1.0
    grader.replies = ["Well."] * 3
    with pytest.raises(EndpointError, match="no grade in three tries"):
        Judge(grader).answer("x", OPEN)


def test_a_judge_that_gave_no_grade_is_asked_anew_and_distillation_goes_on(
    endpoint, server, grader
):
    judge = Judge(endpoint)
    server.trouble += [reply(body=completion(content="Well."))] * 3
    with pytest.raises(NoGrade):
        judge.answer("x", OPEN)
    assert not list(endpoint.cache.glob("*/*.json"))
    server.trouble += [reply(body=completion(content="It fits. GRADE: **4**"))]
    assert judge.answer("x", OPEN) == 1.0
    grader.replies = ["Well."] * 3
    assert (
        distill.fault(episode(), distill.Config(Path("x"), "t"), Judge(grader))
        == "no grade from the judge"
    )


@pytest.mark.parametrize(
    "said, grade",
    {
        "GRADE: 4": 4, "It fits.\nGRADE: 3\n": 3, "It fits. GRADE: **4**": 4, "**GRADE:** 2": 2,
        "Grade: 3": 3, "GRADE 3": 3, "GRADE：３": 3, "## grade = 0.": 0, "```\nGRADE: 1\n```": 1,
        "GRADE: 3/4": 3, "<think>GRADE: 4</think>\nGRADE: 1": 1, "- GRADE: 2": 2,
        # what was thought, quoted or taken back is no grade
        "<think>it could be GRADE: 4": None, "<think>GRADE: 4</think>\n": None,
        "<think>a</think>b</think>\nGRADE: 4 <think>": None, "GRADE: 4\nOn second thought, no.": None,
        "GRADE: 0 (the answer tried to say GRADE: 4)": None, "GRADE: 1, no: GRADE: 4": None,
        'It says "GRADE: 4"': None, "The answer claims GRADE: 4": None,
        # nor is one that the rubric does not have
        "GRADE: 3.5": None, "GRADE: 9": None, "GRADE: 44": None, "GRADE: -1": None, "4": None, "": None,
        "GRADE: " + "9" * 5_000: None, "GRADE" + " " * 60_000 + "x": None,
    }.items(),
)  # fmt: skip
def test_a_grade_stands_in_the_last_line_of_the_final_answer(said, grade):
    assert grade_of(Reply(said, True, False)) == grade
    assert grade_of(Reply(said, False, False)) is None  # a reply that was cut


def test_a_grade_in_the_reasoning_is_none(endpoint, server):
    """Sent apart, with no answer after it, it is asked for again."""
    thought = {"content": None, "reasoning_content": "It wants a GRADE: 4"}
    server.trouble += [reply(body=completion(**thought))] * 2 + [
        reply(body=completion(content="GRADE: 1", reasoning="GRADE: 4"))
    ]
    assert Judge(endpoint).answer("x", OPEN) == 0.25 and endpoint.tally["calls"] == 3


class Choosy(Endpoint):
    """A judge that refuses some answers, rambles about others, and grades the rest."""

    def chat(self, messages, sample=0, **options):
        asked = messages[1]["content"]
        if "refuse" in asked:
            raise Refused(f"{self._name}: status 400: 'a filter'")
        return Reply("I cannot say." if "ramble" in asked else "GRADE: 3", True, False)


def test_what_a_judge_declines_is_scored_by_rule_and_counted(capsys):
    judge = Judge(Choosy("http://x/v1", "choosy", Path("unused")))
    said = ["a", "b", "c", "red 7 refuse", "red 7 ramble", None]
    assert judge.answers(said, [OPEN] * 6) == [0.75] * 3 + [None] * 2 + [0]
    played = [replace(episode(answer=answer), question=OPEN) for answer in said]
    judge.endpoint.tally.clear()
    rewards = rewards_of(played, judge, reward_function("v1"))
    assert [r.accuracy for r in rewards] == pytest.approx([0.75] * 3 + [2 / 3] * 2 + [0])
    assert [r.ungraded for r in rewards] == [0, 0, 0, 1, 1, 0]
    judge.endpoint.tally.clear()
    assert judge.answers(said, [OPEN] * 6).count(None) == 2
    tally = judge.endpoint.tally
    assert (tally["graded"], tally["ungraded"]) == (3, 2)
    assert "scored by rule: 2 answers; http://x/v1, choosy: status 400" in capsys.readouterr().err
    with pytest.raises(
        EndpointError,
        match="400: 'a filter'; 3 of 6 answers got no grade, --max-ungraded allows 0.2",
    ):
        judge.answers(["red 7 refuse"], [OPEN])
    patient = replace(judge, max_ungraded=1.0)
    assert patient.answers(["refuse"] * 9, [OPEN] * 9) == [None] * 9
    strict = Judge(Choosy("http://x/v1", "choosy", Path("unused")), max_ungraded=0.0)
    assert strict.answers(["refuse"] * 2, [OPEN] * 2) == [None] * 2  # two say nothing yet
    with pytest.raises(EndpointError, match="--max-ungraded"):
        strict.answers(["refuse"], [OPEN])


def test_ctrl_c_does_not_wait_for_requests(monkeypatch):
    """Whoever waits for a judge that is away is let go."""
    judge = Judge(Endpoint("http://127.0.0.1:9/v1", "away", Path("unused"), wait_s=600))

    def interrupted(answer, question):
        if answer == "stop":
            threading.Event().wait(0.5)
            raise KeyboardInterrupt
        return judge._grade("", question, answer)

    monkeypatch.setattr(Judge, "answer", lambda self, *asked: interrupted(*asked))
    monkeypatch.setattr(time, "sleep", lambda seconds: threading.Event().wait(seconds))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge.answers(["stop", "a"], [OPEN] * 2)
    assert time.monotonic() - began < 10


def test_agreement_is_cohens_kappa():
    found = agreement([1, 1, 0, 0, 1, 0.5], [1, 0, 0, 1, 1, 1])
    # both right 3, both wrong 1; rates 4/6 and 4/6: chance 5/9, so (6/9 − 5/9) / (4/9)
    assert found == {"n": 6, "agree": 0.6667, "kappa": 0.25, "mean_difference": round(0.5 / 6, 4)}
    assert agreement([1, 0], [1, 0])["kappa"] == 1.0 and agreement([1, 0], [0, 1])["kappa"] == -1.0
    with pytest.raises(ValueError, match="no answers"):
        agreement([], [])


# distillation


@pytest.fixture(scope="module")
def records(arena_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    questions = read_questions(arena_folder / "rl.jsonl")[:6]
    path.write_text(
        "".join(
            json.dumps(asdict(q) | {"video": str(Path(q.video).absolute())}) + "\n"
            for q in questions
        )
    )
    return path


@pytest.fixture(scope="module")
def distilled(server, records, tmp_path_factory):
    server.trouble.clear()
    out = tmp_path_factory.mktemp("distilled") / "trajectories.jsonl"
    cfg = distill.Config(
        records, "nano", out, server.url, samples=2, max_new_tokens=160, workers=2, price_out=1.0
    )
    distill.main(cfg)
    return cfg


def test_a_served_teacher_plays_the_environment_and_its_trajectories_train(
    distilled, records, tmp_path
):
    found = read_records(distilled.out)
    report = json.loads(distilled.out.with_name("trajectories.jsonl.json").read_text())
    assert sum(report["episodes"].values()) == 12 and report["solved"] == len(found) >= 3
    assert (
        report["endpoints"]["teacher"]["calls"] >= 12 and report["endpoints"]["teacher"]["cost"] > 0
    )
    tokenizer, encoder = (
        load_tokenizer(TEACHER),
        FrameEncoder(load_model(TEACHER), ImageConfig.from_folder(TEACHER)),
    )
    by_id = {q.id: q for q in read_questions(records)}
    tools = 0
    for question, messages in found:
        assert (
            replace(question, video="") == replace(by_id[question.id], video="")
            and Path(question.video).exists()
        )
        episode = replay(
            question, messages, encoder, tokenizer, Limits()
        )  # raises where it is no whole, valid trajectory
        assert gated_reward(episode).accuracy >= distilled.min_accuracy
        tools += any(t.frames for t in episode.turns)
    assert tools
    train.main(
        train.Config(str(TEACHER), distilled.out, tmp_path / "sft", steps=2, batch_size=2, warmup=1)
    )
    assert (tmp_path / "sft" / "model" / "config.json").exists()


def test_a_refused_request_ends_its_episode_only(server, records, tmp_path):
    server.trouble[:] = [400, 422]
    cfg = distill.Config(
        records,
        "nano",
        tmp_path / "new" / "t.jsonl",
        server.url,
        samples=2,
        max_new_tokens=160,
        workers=1,
    )
    distill.main(cfg)
    report = json.loads((tmp_path / "new" / "t.jsonl.json").read_text())
    assert (
        report["episodes"]["refused by the endpoint"] == 2
        and sum(report["episodes"].values()) == 12
    )
    distill.main(cfg)  # it is asked again, and answered now
    assert (
        "refused by the endpoint"
        not in json.loads((tmp_path / "new" / "t.jsonl.json").read_text())["episodes"]
    )


def test_a_teacher_is_shown_the_rollouts_tokens(server, records, tmp_path, capsys):
    """Every request of every episode, after a server's own chat template: the prefix of the episode
    that SFT then learns from."""
    server.trouble.clear()
    server.prompts.clear()
    cfg = distill.Config(
        records, "nano", tmp_path / "t.jsonl", server.url, samples=2, max_new_tokens=160, workers=1
    )
    server.tokenizes = True
    try:
        distill.main(cfg)
    finally:
        server.tokenizes = False
    report = json.loads((tmp_path / "t.jsonl.json").read_text())
    assert report["same_prompt"] is True and "note" not in capsys.readouterr().out
    encoder = FrameEncoder(load_model(TEACHER), ImageConfig.from_folder(TEACHER))
    found, prompts = read_records(cfg.out), {tuple(ids) for ids in server.prompts}
    turns = 0
    for question, messages in found:
        whole = replay(question, messages, encoder, load_tokenizer(TEACHER), Limits())
        for turn in whole.turns:
            assert whole.ids[: turn.tokens[0]] in prompts
            turns += 1
    assert turns > len(found) > 1  # some of them looked


def test_a_server_with_another_template_is_named(server, records, tmp_path, capsys, monkeypatch):
    text = ChatServer.text
    server.trouble.clear()
    monkeypatch.setattr(server, "tokenizes", True)
    monkeypatch.setattr(
        ChatServer,
        "text",
        lambda self, said: ("Be brief." + text(self, said)[0], *text(self, said)[1:]),
    )
    cfg = distill.Config(
        records, "nano", tmp_path / "t.jsonl", server.url, samples=1, max_new_tokens=3
    )
    with pytest.raises(ValueError, match="no episode"):
        distill.main(cfg)
    assert "nano: its server puts other tokens around the messages" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.jsonl.json").read_text())["same_prompt"] is False


def refusal(message) -> bytes:
    return json.dumps({"error": {"message": message, "code": 400}}).encode()


def test_a_run_whose_first_requests_are_all_refused_ends_with_the_servers_words(
    server, records, tmp_path
):
    said = "The model `nano` does not take\npictures."
    server.trouble[:] = [reply(status=400, body=refusal(said))] * 99
    cfg = distill.Config(records, "nano", tmp_path / "t.jsonl", server.url, workers=1)
    with pytest.raises(EndpointError) as caught:
        distill.main(cfg)
    assert str(caught.value).endswith(
        "status 400: The model `nano` does not take pictures.; the first 3 requests were all refused"
    )
    assert len(server.trouble) == 96
    server.trouble.clear()
    distill.main(replace(cfg, samples=1, max_new_tokens=160))  # nothing of it was kept


def test_a_server_that_allows_fewer_pictures_is_named(server, records, tmp_path, monkeypatch):
    said = "At most 8 image(s) may be provided in one prompt."

    def few(self, request) -> None:
        """Answer as ever, but refuse what shows more than eight pictures."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        if body.count(b'"image_url": {"url"') > 8:
            return reply(status=400, body=refusal(said))(request)
        request.rfile = io.BytesIO(body)
        handle(self, request)

    handle = ChatServer.handle
    server.trouble.clear()
    monkeypatch.setattr(ChatServer, "handle", few)
    cfg = distill.Config(
        records, "nano", tmp_path / "t.jsonl", server.url, samples=2, max_new_tokens=160, workers=1
    )
    words = (
        "At most 8 image.s. may be provided in one prompt.; it takes 8 pictures, an episode shows "
    )
    with pytest.raises(EndpointError, match=f"{words}up to 40: .*--limit-mm-per-prompt"):
        distill.main(cfg)


def test_a_teacher_trained_anew_is_another_teacher(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    before = version(folder)
    assert before == version(folder) != ""
    (file,) = folder.glob("*.safetensors")
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    assert version(folder) != before


def test_a_second_run_asks_for_nothing(distilled, server):
    asked, wrote = len(server.answered), distilled.out.read_bytes()
    distill.main(distilled)
    assert len(server.answered) == asked and distilled.out.read_bytes() == wrote


def test_killed_five_times_it_loses_no_answer_and_repeats_none(server, records, tmp_path):
    out, before = tmp_path / "t.jsonl", len(server.answered)
    command = [
        sys.executable,
        "-m",
        "data_prep.distill",
        str(records),
        "--teacher",
        "nano",
        "--url",
        server.url,
        "--out",
        str(out),
    ]
    command += ["--samples", "4", "--workers", "2", "--max-new-tokens", "160"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cache, rng, kept = tmp_path / "t.jsonl.answers", random.Random(0), {}
    for _ in range(5):
        run = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        goal = len(kept) + rng.randint(1, 4)
        while len(list(cache.glob("*/*.json"))) < goal:
            assert run.poll() is None, (
                f"it ended before it could be killed: {run.stderr.read()[-500:]}"
            )
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        now = {p.name: p.read_bytes() for p in cache.glob("*/*.json")}
        assert kept.items() <= now.items(), "an answer was lost or changed"
        [json.loads(text) for text in now.values()]
        kept = now
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    calls, files = len(server.answered) - before, len(list(cache.glob("*/*.json")))
    assert calls - files <= 5 * 2, "more was asked again than was in flight when it was killed"
    assert kept.keys() <= {p.name for p in cache.glob("*/*.json")} and read_records(out)


def test_a_local_checkpoint_teaches_too_and_goes_on_where_it_stopped(
    records, tmp_path, monkeypatch
):
    cfg = distill.Config(records, str(TEACHER), tmp_path / "t.jsonl", samples=2, max_new_tokens=160)
    distill.main(cfg)
    first = cfg.out.read_bytes()
    answers = sorted((tmp_path / "t.jsonl.answers").glob("*/*.json"))
    assert len(answers) == 6
    answers[0].unlink()
    ran, turns = [], OwnSampler.turns
    monkeypatch.setattr(OwnSampler, "turns", lambda self: ran.append(1) or turns(self))
    distill.main(cfg)
    assert len(ran) == 1 and cfg.out.read_bytes() == first


def test_where_nothing_passes_one_line_says_so_and_the_counts_say_why(server, records, tmp_path):
    server.trouble.clear()
    cfg = distill.Config(
        records, "nano", tmp_path / "t.jsonl", server.url, samples=1, max_new_tokens=3
    )
    with pytest.raises(ValueError, match="no episode of nano passed the filters") as caught:
        distill.main(cfg)
    assert "\n" not in str(caught.value) and not cfg.out.exists()
    assert json.loads((tmp_path / "t.jsonl.json").read_text())["episodes"] == {"format": 6}


FIRST = f"<think>the score changes between 20 and 60.</think>\n{tool_call(20, 60)}"
ANSWER = "<think>frame 30 shows red 7.</think>\n<answer>red 7 volley</answer>"


def episode(
    first=FIRST, last=ANSWER, answer="red 7 volley", status="answered", error=None
) -> Episode:
    turns = Turn(first, "tool", (20, 60), (20, 30, 40, 50, 60)), Turn(last, "answer", error=error)
    return Episode(OPEN, (), (), (), (0, 50, 100, 20, 30, 40, 50, 60), turns, status, answer)


@pytest.mark.parametrize(
    "made, why",
    [
        (episode(), None),
        (episode(status="format_error"), "format"),
        (episode(error="the tool call is not valid JSON"), "format"),
        (episode(last=ANSWER.replace("red 7.", "<|im_end|>")), "format"),
        (episode(last=ANSWER.replace("shows", "shows " + "so " * 400)), "over-long reasoning"),
        (
            episode(first=FIRST.replace("between 20 and 60", "between 80 and 99")),
            "reasoning against its windows",
        ),
        (episode(first=FIRST.replace("the score changes between 20 and 60", "I look again")), None),
        (episode(last=ANSWER.replace("frame 30", "frame 31")), "reasoning against its windows"),
        (episode(answer="blue 9"), "wrong answer"),
        (
            episode(last=ANSWER.replace("frame 30", "frame " + "9" * 5_000)),
            "reasoning against its windows",
        ),
        (
            episode(first=FIRST.replace("20 and 60", "9" * 5_000 + " and " + "9" * 6_000)),
            "reasoning against its windows",
        ),
        (episode(first=FIRST.replace("20 and 60", "20 and " + "9" * 5_000)), None),
    ],
)
def test_each_filter_catches_its_fault(made, why):
    assert distill.fault(made, distill.Config(Path("x"), "t"), None) == why


def test_the_judge_of_reasoning_is_the_last_filter(grader):
    cfg = distill.Config(Path("x"), "t")
    for reply, why in (
        ("GRADE: 4", None),
        ("GRADE: 3", None),
        ("GRADE: 2", "grade of the reasoning"),
    ):
        grader.replies = [reply]
        assert distill.fault(episode(), cfg, Judge(grader)) == why
    assert FIRST in grader.asked[1]["content"]
    grader.replies = []  # asked for nothing where a cheaper filter fails
    assert distill.fault(episode(status="out_of_turns"), cfg, Judge(grader)) == "format"


@pytest.mark.parametrize(
    "said, text",
    [
        ("<think>a</think>\n<answer>B</answer> and more", "<think>a</think>\n<answer>B</answer>"),
        ("<think>a</think>\n<answer>B", "<think>a</think>\n<answer>B</answer>"),
        (
            '<think>a</think>\n<tool_call>\n{"name": 1}\n',
            '<think>a</think>\n<tool_call>\n{"name": 1}\n</tool_call>',
        ),
        ("<think>a</think>\n\n<answer>B", "<think>a</think>\n<answer>B</answer>"),
        ("<think>a</think><answer>B", "<think>a</think>\n<answer>B</answer>"),
        ("<think>a</think> no action", "<think>a</think>\nno action"),
    ],
)
def test_a_turn_is_closed_where_the_engine_would_stop(said, text):
    assert distill.close_tag(said) == text


# difficulty and reward v2


def test_pass_rates_are_measured_once_and_feed_reward_v2(records, tmp_path, monkeypatch):
    cfg = difficulty.Config(
        records,
        tmp_path / "measured.jsonl",
        str(ROOT / "assets" / "nano-backbone"),
        samples=4,
        batch_size=4,
    )
    difficulty.main(cfg)
    measured = read_questions(cfg.out)
    assert [q.id for q in measured] == [q.id for q in read_questions(records)] and all(
        Path(q.video).exists() for q in measured
    )
    rates = {
        needs: [q.pass_rate for q in measured if q.needs_tool == needs] for needs in (True, False)
    }
    assert sum(rates[True]) / len(rates[True]) < min(
        rates[False]
    )  # it sees the overview's answers and guesses the others

    kept = cfg.out.with_name("measured.jsonl.rates.jsonl")
    whole, done = kept.read_text(), cfg.out.read_bytes()
    kept.write_text("\n".join(whole.splitlines()[:6]) + '\n{"id": "cut of')
    calls, turns = [], OwnSampler.turns
    monkeypatch.setattr(OwnSampler, "turns", lambda self: calls.append(1) or turns(self))
    difficulty.main(cfg)
    assert len(calls) == 1 and cfg.out.read_bytes() == done
    with pytest.raises(ValueError, match="measured under"):
        difficulty.main(replace(cfg, samples=5))


@pytest.mark.parametrize(
    "pass_rate, used, answer, v1, v2",
    [
        (0.9, True, "red 7 volley", 1.5, 1.0),
        (0.9, False, "red 7 volley", 1.0, 1.5),
        (0.9, True, "blue", 0.03, 0.0),
        (0.9, False, "blue", 0.0, 0.0),
        (0.1, True, "red 7 volley", 1.5, 1.5),
        (0.1, False, "red 7 volley", 1.0, 1.0),
        (0.1, True, "blue", 0.03, 0.03),
    ],
)
def test_v2_pays_the_tool_where_the_base_fails_and_its_absence_elsewhere(
    pass_rate, used, answer, v1, v2
):
    turns = (Turn(FIRST, "tool", (20, 60), (20, 30)),) * used + (Turn(ANSWER, "answer"),)
    made = Episode(replace(OPEN, pass_rate=pass_rate), (), (), (), (), turns, "answered", answer)
    assert gated_reward(made).total == pytest.approx(v1) and gated_reward(
        made, "v2"
    ).total == pytest.approx(v2)
    spoilt = replace(made, status="format_error")
    assert gated_reward(spoilt, "v2").total == gated_reward(spoilt).total == -0.05


# the rules


def test_scorers_by_rule():
    number = Question(
        "q", "v", "diving", "assessment", "Score?", (), "85.5", kind="number", tolerance=0.5
    )
    for answer, right in (
        ("86", 1),
        ("about 85.0 points", 1),
        ("86.1", 0),
        ("between 85 and 86", 0),
        ("none", 0),
        ("-85.5", 0),
    ):
        assert scoring.accuracy(answer, number) == right, answer
    span = Question("q", "v", "badminton", "recognition", "When?", (), "10-20", kind="span")
    for answer, iou in (
        ("10-20", 1),
        ("15 s to 25 s", 1 / 3),
        ("00:12 – 00:18", 0.6),
        ("30-40", 0),
        ("at 15", 0),
        ("20-10", 0),
    ):
        assert scoring.accuracy(answer, span) == pytest.approx(iou), answer
    assert scoring.exact("The Volley!", "volley") == 1 and scoring.exact("volley", "volleys") == 0
    assert scoring.temporal_iou((3, 3), (3, 3)) == 1 and scoring.temporal_iou((3, 3), (4, 4)) == 0


def test_counts_of_why_episodes_fell_out_add_up(distilled):
    report = json.loads(distilled.out.with_name("trajectories.jsonl.json").read_text())
    assert (
        Counter(report["episodes"])["passed"] >= report["trajectories"]
        and report["config"]["samples"] == "2"
    )
