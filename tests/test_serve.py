"""The local server: OpenAI's interface, its page, many questions at once, and bad guests.

It runs where requirements-serve.txt is installed."""

import base64
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="requirements-serve.txt is not installed")
pytest.importorskip("starlette", reason="requirements-serve.txt is not installed")

from nanosport.engine.players import load_sampler  # noqa: E402
from nanosport.engine.sampler import Sampling  # noqa: E402
from nanosport.env.env import Limits  # noqa: E402
from nanosport.env.tools import STOPS  # noqa: E402
from nanosport.files import ASSETS  # noqa: E402
from nanosport.records import read_questions  # noqa: E402
from nanosport.serve.app import Server, application, question_of  # noqa: E402
from nanosport.serve.desk import Desk, Job  # noqa: E402
from nanosport.serve.uploads import Uploads  # noqa: E402
from nanosport.video import VideoError  # noqa: E402
from tests.helpers.browser import Browser, in_a_browser  # noqa: E402
from tests.helpers.clips import write  # noqa: E402

ASKED = "Call the decisive play."
OF_BYTES = {"Content-Type": "application/octet-stream"}


class Running:
    """A server on a port of its own."""

    def __init__(self, server: Server):
        self.server = server
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.failed, app = [], application(server)

        async def watched(scope, receive, send):
            try:
                await app(scope, receive, send)
            except Exception as error:
                self.failed.append(error)
                raise

        self.uvicorn = uvicorn.Server(uvicorn.Config(watched, log_level="critical", lifespan="on"))
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [self.listening]}, daemon=True
        )
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.02)

    def call(self, method: str, path: str, body=None, headers=(), timeout=120):
        """(status, JSON or text)."""
        to = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        to.request(method, path, body, dict(headers))
        reply = to.getresponse()
        text = reply.read().decode()
        to.close()
        is_json = "json" in reply.getheader("content-type", "")
        return reply.status, json.loads(text) if is_json else text

    def send(self, clip: Path, **headers) -> dict:
        kind = OF_BYTES | headers
        status, reply = self.call("POST", "/videos", clip.read_bytes(), kind)
        assert status == 200, reply
        return reply

    def ask(self, url, text=ASKED, headers=(), **more):
        content = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "text", "text": text},
        ]
        body = json.dumps({"messages": [{"role": "user", "content": content}], **more})
        kind = {"Content-Type": "application/json"} | dict(headers)
        return self.call("POST", "/v1/chat/completions", body, kind)

    def files(self) -> list[str]:
        return [path.name for path in Path(self.server.uploads.folder.name).iterdir()]

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def eventually(holds, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def desk():
    sampling = Sampling(0.0, 1.0, 160, STOPS)
    encoder, sampler = load_sampler(ASSETS / "nano-deepsport", sampling)
    desk = Desk(encoder, sampler, Limits(), rows=64, most=100)
    yield desk
    desk.close()


@pytest.fixture
def start(desk):
    """Start a server with these settings."""
    begun = []

    def begin(most=8, max_mb=5.0, keep_s=600.0, pause_s=2.0, **more) -> Running:
        uploads = Uploads(most, max_mb, keep_s, pause_s)
        server = Server(desk, uploads, "nano", **{"token": "", "timeout_s": 60.0} | more)
        begun.append(Running(server))
        return begun[-1]

    yield begin
    for one in begun:
        folder = Path(one.server.uploads.folder.name)
        one.stop()
        assert not folder.exists()  # whatever happened, nothing is left behind


@pytest.fixture(scope="module")
def clip(arena_folder) -> Path:
    return Path(read_questions(arena_folder / "test.jsonl")[0].video)


# Answers.


def test_an_answer_has_openais_form_and_the_episode_beside_it(start, clip, arena_folder):
    running = start()
    asked = (q for q in read_questions(arena_folder / "test.jsonl") if q.question == ASKED)
    truth = next(q.options["ABCDEFGHIJ".index(q.answer)] if q.options else q.answer for q in asked)
    status, reply = running.ask(running.send(clip)["url"])
    (choice,) = reply["choices"]
    assert status == 200 and reply["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == reply["nanosport"]["answer"] == truth
    turns = reply["nanosport"]["turns"]
    assert turns[0]["window"] and len(turns[0]["frames"]) == 8
    usage = reply["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 100
    status, shown = running.ask(running.send(clip)["url"], show_turns=True)
    assert shown["choices"][0]["message"]["content"] == "\n".join(t["text"] for t in turns)
    (about,) = running.call("GET", "/v1/models")[1]["data"]
    assert about["id"] == "nano" and time.time() - 3600 < about["created"] <= time.time()


@pytest.mark.parametrize("shows", [False, True])
def test_an_answer_is_streamed_with_its_turns_hidden_or_shown(start, clip, shows):
    running = start()
    url = running.send(clip)["url"]
    whole = running.ask(url)[1]["nanosport"]
    status, text = running.ask(url, stream=True, show_turns=shows)
    lines = text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]" and all(line.startswith("data: {") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines]
    content = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    said = "".join(turn["text"] + "\n" for turn in whole["turns"])
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(content) == (said if shows else whole["answer"])
    assert len(list(filter(None, content))) > 30 if shows else 1
    beside = [chunk["nanosport"] for chunk in chunks if "nanosport" in chunk]
    assert beside[0]["frames"][0] == 0 and beside[0]["num_frames"] > 100
    assert [one["turn"]["window"] for one in beside if "turn" in one] == [
        turn["window"] for turn in whole["turns"]
    ]
    assert beside[-1] == {"answer": whole["answer"], "status": "answered"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_openais_own_client_understands_it(start, clip, docs=ASSETS.parent / "docs"):
    """As docs/serving.md has it, word by word; then streamed, listed and refused."""
    openai = pytest.importorskip("openai")
    running = start()
    url, said = running.send(clip)["url"], (docs / "serving.md").read_text()
    code = said.split("```python\n")[1].split("```")[0].replace(":8000", f":{running.port}")
    given, last = code.rstrip().replace("upload:…", url).rsplit("\n", 1)
    names: dict = {}
    exec(given, names)
    reply, client = eval(last, names), names["client"]
    whole = running.ask(url, "Who scored?")[1]
    (choice,), wanted = reply.choices, whole["choices"][0]
    assert choice.message.content == wanted["message"]["content"]
    assert choice.finish_reason == wanted["finish_reason"]
    assert reply.usage.total_tokens == whole["usage"]["total_tokens"] > 100
    assert reply.nanosport["turns"] == whole["nanosport"]["turns"]
    assert [one.id for one in client.models.list()] == ["nano"]

    ask = client.chat.completions.create
    names["content"][1]["text"] = ASKED
    messages = [{"role": "user", "content": names["content"]}]
    whole = running.ask(url)[1]["nanosport"]
    for shows in (False, True):
        more = {"show_turns": shows}
        chunks = [*ask(model="any", messages=messages, stream=True, extra_body=more)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        turns = "".join(turn["text"] + "\n" for turn in whole["turns"])
        assert text == (turns if shows else whole["answer"])
        assert chunks[-1].choices[0].finish_reason == "stop"
    names["content"][0]["video_url"]["url"] = "upload:gone"
    with pytest.raises(openai.NotFoundError, match="no such video here"):
        ask(model="any", messages=messages)


def test_a_video_may_come_with_its_question_and_goes_with_it(start, clip):
    running = start()
    data = base64.b64encode(clip.read_bytes()).decode()
    status, reply = running.ask(f"data:video/mp4;base64,{data}")
    assert status == 200 and reply["choices"][0]["message"]["content"]
    assert not running.files()


def test_a_video_that_was_sent_is_removed_after_it_was_used(start, clip, desk):
    running = start(keep_s=1.0)
    sent = running.send(clip)
    assert running.files() == [sent["id"]]
    assert running.ask(sent["url"])[0] == 200
    eventually(lambda: not running.files())
    assert running.ask(sent["url"]) == (
        404,
        failure(404, "no such video here; send it (again) first"),
    )
    running = start()
    again = running.send(clip)
    assert running.ask(again["url"])[0] == 200
    encoder, path = desk.encoder, str(running.server.uploads.videos[again["id"]].path)
    known, size = [name for name in encoder.cache if name[0].video == path], encoder.cached_bytes
    freed = sum(encoder.cache[name].nbytes for name in known)
    assert path in encoder.videos and freed > 0
    assert running.call("DELETE", f"/videos/{again['id']}")[0] == 204 and not running.files()
    eventually(lambda: path not in encoder.videos)
    assert encoder.cached_bytes == size - freed and encoder.cache.keys().isdisjoint(known)
    assert encoder.num_indexed == sum(video.num_frames for video in encoder.videos.values())


def failure(status: int, why: str) -> dict:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": why, "type": kind, "code": status}}


def test_one_that_is_given_up_takes_no_other_along(clip, desk):
    """Its video may be gone and forgotten before it is known to have failed."""
    told, question = [], question_of(clip, ASKED)
    jobs = [
        Job(question, lambda *event, k=k: told.append((k, *event)), given_up=k == 0) for k in (0, 1)
    ]
    desk.playing |= enumerate(jobs, 10**9)
    desk._fail(VideoError("gone"))
    left = [*desk.playing.values()]
    desk.playing.clear()
    assert told == [(0, "error", "gone")] and left == jobs[1:]


def test_fifty_questions_at_once_are_all_answered_and_batched(start, clip, desk):
    running = start()
    url = running.send(clip)["url"]
    running.ask(url)  # its frames are known
    texts = [f"{ASKED} {k}" for k in range(50)]
    desk.most_at_once, times, alone_times = 0, [], []
    for _ in range(3):  # in turns, since others use the machine too
        began = time.monotonic()
        with ThreadPoolExecutor(50) as guests:
            replies = [*guests.map(lambda text: running.ask(url, text), texts)]
        times.append(time.monotonic() - began)
        began = time.monotonic()
        alone = [running.ask(url, text) for text in texts[::10]]
        alone_times.append(10 * (time.monotonic() - began))
    assert all(status == 200 and reply["nanosport"]["status"] for status, reply in replies)
    assert desk.most_at_once >= 40
    assert [reply["nanosport"]["answer"] for _, reply in alone] == [
        reply["nanosport"]["answer"] for _, reply in replies[::10]
    ]
    # 4.6 to 6 were measured in six runs on two cores, and up to 7.7 beside other work
    assert sum(alone_times) > 3 * sum(times), (alone_times, times)


def test_a_turn_comes_in_pieces_only_to_those_who_watch(clip, desk):
    told, ended = {True: [], False: []}, threading.Semaphore(0)

    def tell(watches, kind, value):
        told[watches].append((kind, value))
        if kind == "end":
            ended.release()

    for watches in told:
        question = question_of(clip, ASKED)
        desk.put(Job(question, partial(tell, watches), is_watched=watches))
    assert ended.acquire(timeout=60) and ended.acquire(timeout=60)
    rest = [(kind, value) for kind, value in told[True] if kind != "text"]
    assert len(rest) < len(told[True]) and [kind for kind, _ in rest] == [k for k, _ in told[False]]
    assert [value.text for _, value in rest[:-1]] == [value.text for _, value in told[False][:-1]]


# Bad guests.


def test_a_video_that_is_too_large_is_refused_before_it_comes_or_while_it_does(start):
    running = start(max_mb=1.0)
    with socket.create_connection(("127.0.0.1", running.port)) as guest:
        head = (
            "POST /videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        )
        guest.sendall(f"{head}Content-Length: 5000000000\r\n\r\n".encode())
        assert b" 413 " in guest.recv(4096)
    with socket.create_connection(("127.0.0.1", running.port)) as guest:
        guest.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        part = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        try:
            for _ in range(200):
                guest.sendall(part)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert b" 413 " in guest.recv(4096)
    assert not running.files() and not running.server.uploads.videos


def test_a_slow_sender_is_cut_off_and_one_that_leaves_leaves_nothing(start, clip):
    running = start(pause_s=0.5)
    head = "POST /videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    head = f"{head}Content-Length: 100000\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port)) as guest:
        guest.sendall(head + bytes(1000))
        guest.settimeout(20)
        assert b" 408 " in guest.recv(4096)
    assert not running.files()
    guest = socket.create_connection(("127.0.0.1", running.port))
    guest.sendall(head + bytes(1000))
    eventually(lambda: len(running.files()) == 1)
    guest.close()
    eventually(lambda: not running.files())
    assert running.ask(running.send(clip)["url"])[0] == 200


def test_one_that_leaves_in_mid_answer_holds_up_nobody(start, clip, desk):
    running = start()
    url = running.send(clip)["url"]
    for stream in (True, False):
        for _ in range(3):
            content = [
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "text", "text": ASKED},
            ]
            body = json.dumps(
                {"messages": [{"role": "user", "content": content}], "stream": stream}
            )
            guest = socket.create_connection(("127.0.0.1", running.port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            guest.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
            if stream:
                guest.recv(200)
            guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            guest.close()
    assert running.ask(url)[0] == 200
    eventually(lambda: not desk.playing and not desk.sampler.rows)
    (upload,) = running.server.uploads.videos.values()
    eventually(lambda: upload.readers == 0)
    assert not running.failed, "whoever leaves is no fault of the server"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "../../etc/passwd", "upload:../../etc/passwd", "upload:/etc/passwd",
        "https://example.com/v.mp4", "data:text/html;base64,AAAA", "data:video/mp4;base64,@", "data:video/mp4;base64,é", "", 7,
    ],
)  # fmt: skip
def test_no_address_reaches_a_file_of_the_machine(start, url):
    status, reply = start().ask(url)
    assert status in (400, 404) and reply["error"]["message"] and "/tmp" not in json.dumps(reply)


@pytest.mark.parametrize("path", ["/../app.py", "/%2e%2e/app.py", "/videos/..%2f..%2fx", "/app.py"])
def test_no_path_leads_out(start, path):
    assert start().call("GET", path)[0] in (404, 405)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [{"role": "user"}]}',
        b"\xff", b"[" * 100_000, json.dumps({"messages": [{"role": "user", "content": "Who?"}]}).encode(),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"},
        {"type": "video_url", "video_url": {"url": "upload:x"}}]}]}).encode(),
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_refused(start, body):
    running = start()
    json_type = {"Content-Type": "application/json"}
    status, reply = running.call("POST", "/v1/chat/completions", body, json_type)
    assert status == 400 and reply["error"]["message"]
    assert running.call("POST", "/v1/chat/completions", body)[0] == 415


def test_what_is_no_video_is_refused_without_a_path_of_ours(start):
    running = start()
    kind = {"Content-Type": "application/octet-stream"}
    status, reply = running.call("POST", "/videos", b"no video at all", kind)
    assert status == 400 and reply["error"]["message"].startswith("not a video")
    assert not running.files()


def test_only_this_machine_is_served_without_a_token_and_nobody_without_it_elsewhere(start, clip):
    running = start()
    for headers in ({"Host": "evil.example"}, {"Host": "[::1"}, {"Origin": "https://evil.example"}):
        assert running.call("GET", "/v1/models", headers=headers)[0] == 403
    kind = {"Content-Type": "text/plain"}  # what a form of another site can send without asking
    assert running.call("POST", "/videos", b"x", kind)[0] == 415
    guarded = start(token="secret")
    assert guarded.call("GET", "/v1/models")[0] == 401
    assert guarded.call("GET", "/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
    right = {"Authorization": "Bearer secret", "Host": "node7"}
    assert guarded.call("GET", "/v1/models", headers=right)[0] == 200
    assert (
        guarded.call("POST", "/videos", b"x", {"Content-Type": "application/octet-stream"})[0]
        == 401
    )


def test_questions_beyond_the_queue_and_beyond_the_time_are_refused(start, clip, desk):
    running = start(timeout_s=0.001)
    url = running.send(clip)["url"]
    assert running.ask(url)[1] == failure(408, "no answer within 0.001 s")
    assert "no answer within" in running.ask(url, stream=True)[1]
    full = start(most=1)
    full.send(clip)
    kind = {"Content-Type": "application/octet-stream"}
    assert full.call("POST", "/videos", clip.read_bytes(), kind)[0] == 503
    small = Desk(desk.encoder, desk.sampler, desk.limits, rows=1, most=1)
    small.waiting.put(None)  # nobody plays
    small.thread.join()
    small.waiting.put(None)
    waiting = Running(replace(full.server, desk=small))
    try:
        status, reply = waiting.ask(f"upload:{next(iter(full.server.uploads.videos))}")
        assert status == 503 and "too many questions wait" in reply["error"]["message"]
    finally:
        desk.sampler.on_token = desk._say
        waiting.uvicorn.should_exit = True
        waiting.thread.join(20)


def test_a_video_that_breaks_off_fails_alone(start, clip, desk, monkeypatch, tmp_path):
    running = start()
    bad, good = running.send(write(tmp_path / "bad.mp4")), running.send(clip)
    whole = desk.encoder._decode

    def decode(clip, indices):
        if clip.video.endswith(bad["id"]):
            raise desk.encoder._lose(clip.video, ValueError("broke off"))
        return whole(clip, indices)

    monkeypatch.setattr(desk.encoder, "_decode", decode)
    with ThreadPoolExecutor(4) as guests:
        replies = [*guests.map(running.ask, [bad["url"], good["url"], bad["url"], good["url"]])]
    assert [status for status, _ in replies] in (
        [500, 200, 500, 200],
        [400, 200, 400, 200],
        [500, 200, 400, 200],
    )


# The page.


@in_a_browser
def test_a_person_sends_a_video_asks_and_sees_the_windows(start, clip, tmp_path):
    running, hurt = start(), "<img src=x onerror=alert(1)> Who?"
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"http://127.0.0.1:{running.port}/")
        page = browser.call("DOM.getDocument")["root"]["nodeId"]
        named = tmp_path / "<script>alert(2)<.mp4"
        named.write_bytes(clip.read_bytes())
        chosen = browser.call("DOM.querySelector", nodeId=page, selector="#file")["nodeId"]
        browser.call("DOM.setFileInputFiles", nodeId=chosen, files=[str(named)])
        eventually(lambda: not browser.value("document.getElementById('question').disabled"))
        assert named.name in browser.value("document.getElementById('state').textContent")
        done = "document.querySelectorAll('article p[role=status] b').length"
        last = "document.querySelector('article p[role=status]')?.textContent"
        for text in (ASKED, hurt):
            assert browser.value("document.activeElement.id") == "question"
            browser.value("document.getElementById('question').value = ''")
            for letter in text:
                browser.press(letter)
            browser.press("Enter")  # by keyboard alone
            eventually(lambda: browser.value(last))
        lines = browser.value(
            "[...document.querySelectorAll('article:last-child .line span')].map(s => s.textContent)"
        )
        assert lines[0].startswith("frames 0 to") and lines[1].startswith("asked: ")
        assert browser.value(done) >= 1
        assert "<think>" in browser.value(
            "document.querySelector('article:last-child pre').textContent"
        )
        assert hurt in browser.value("document.querySelector('article h2').textContent")
        assert browser.value("document.images.length") == 0 and not browser.said
        unnamed = "[...document.querySelectorAll('input')].filter(e => !e.labels.length).length"
        assert browser.value(unnamed) == 0
        browser.open("about:blank")
        eventually(lambda: not running.files())  # the page that goes takes its video along
    finally:
        browser.close()


@in_a_browser
def test_the_newest_of_two_videos_is_asked_about(start, clip, tmp_path):
    """Though the one before takes longer to send: it goes."""
    running = start()
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"http://127.0.0.1:{running.port}/")
        page = browser.call("DOM.getDocument")["root"]["nodeId"]
        chosen = browser.call("DOM.querySelector", nodeId=page, selector="#file")["nodeId"]
        browser.value(
            "void (original => { let n = 0; call = async (...given) => { const reply = "
            "await original(...given); if (!n++) await new Promise(go => setTimeout(go, 1500)); "
            "return reply; }; })(call)"
        )
        for name in ("first.mp4", "second.mp4"):
            (tmp_path / name).write_bytes(clip.read_bytes())
            path = str(tmp_path / name)
            browser.call("DOM.setFileInputFiles", nodeId=chosen, files=[path])
        eventually(lambda: not browser.value("document.getElementById('question').disabled"))
        time.sleep(2)
        assert "second.mp4: " in browser.value("document.getElementById('state').textContent")
        assert running.files() == [browser.value("upload.id")]
    finally:
        browser.close()


def test_a_terminal_that_closes_leaves_no_video_behind(clip, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nanosport.serve", "--port", str(port)]
    default = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, preexec_fn=default, **quiet)
    try:

        def send() -> bool:
            with suppress(OSError):
                to = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                to.request("POST", "/videos", clip.read_bytes(), OF_BYTES)
                return to.getresponse().status == 200

        eventually(send, 90)
        assert [*tmp_path.glob("nanosport*/*")]
        process.send_signal(signal.SIGHUP)
        process.wait(30)
        assert not [*tmp_path.glob("nanosport*")]
    finally:
        process.kill()


def test_a_command_that_cannot_listen_says_so_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "nanosport.serve", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"error: --host 127.0.0.1 --port {port}: Address already in use\n"
