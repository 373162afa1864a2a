"""A client of any OpenAI-compatible chat endpoint. Every answer is on disk before it counts, so none is paid for twice.

    endpoint = Endpoint("http://localhost:8000/v1", "qwen", cache=Path("out/answers"))
    reply = endpoint.chat([{"role": "user", "content": "Hello"}], sample=0, temperature=0.7, max_tokens=500)
    endpoint.tally      # calls, answers from disk, retries, tokens, cost

The key of the service is read from an environment variable (OPENAI_API_KEY; a judge's from JUDGE_API_KEY), sent to the address given
and to no other, and written nowhere. Threads may share one Endpoint.
"""

import base64
import hashlib
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import av
import torch

from nanosport.log import write_atomically

MAX_REPLY = 16 * 2**20
"""Bytes: no honest reply is longer."""


class EndpointError(ValueError):
    """A request that will not be answered. One line: what, why, what to do."""


class Refused(EndpointError):
    """This one request will not be, others may: too long for the model, or against the service's rules."""


class Garbled(ValueError):
    """A reply that is no chat completion."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect ends as the error that its status is: it would take the key to another host."""

    def redirect_request(self, *args):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


@dataclass(frozen=True)
class Reply:
    text: str
    finished: bool
    """False where the length limit cut it."""
    cached: bool
    """Whether it came from disk."""


@dataclass
class Endpoint:
    url: str
    """Up to and with /v1."""
    model: str
    cache: Path
    """Folder of the answers, one file each, named by what was asked."""
    timeout_s: float = 300.0
    """Of one request, its reply included."""
    retries: int = 6
    """After a time-out, a lost connection, a garbled reply, 429 or 5xx: waits 1, 2, 4, … seconds, or what the server asks for."""
    per_minute: float = 0.0
    """Requests a minute at most; 0 for no limit."""
    price_in: float = 0.0
    """Of a million prompt tokens."""
    price_out: float = 0.0
    """Of a million completion tokens."""
    key_name: str = "OPENAI_API_KEY"
    """The environment variable that holds its key."""
    tally: Counter = field(default_factory=Counter)
    """calls, cached, retries, prompt_tokens, completion_tokens."""

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{self.url}: an endpoint is an http or https address, such as http://localhost:8000/v1")
        self._lock, self._next_s, self._asking = threading.Lock(), 0.0, WeakValueDictionary()
        self._closed = threading.Event()
        self._key = os.environ.get(self.key_name, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise EndpointError(f"{self.key_name}: holds what no key does; set it anew")

    @property
    def cost(self) -> float:
        """In the unit of the prices, of the calls made in this run."""
        return (self.tally["prompt_tokens"] * self.price_in + self.tally["completion_tokens"] * self.price_out) / 1e6

    def chat(self, messages: Sequence[dict], sample: int = 0, **options) -> Reply:
        """The answer to a conversation. `sample` numbers independent answers to the same one. Raises EndpointError."""
        body, path = self._asked(messages, sample, options)
        with self._lock:
            alone = self._asking.setdefault(path.name, threading.Lock())
        with alone:  # threads that ask the same wait for the first one's answer
            if cached := path.exists():
                answer = json.loads(path.read_text())
                self._count(cached=1)
            else:
                answer = self._ask(json.dumps(body).encode())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(answer))
                self._count(calls=1, **answer["usage"])
        return Reply(answer["text"], answer["finish_reason"] != "length", cached)

    def forget(self, messages: Sequence[dict], sample: int = 0, **options) -> None:
        """Remove an answer that was of no use: it will be asked for again."""
        self._asked(messages, sample, options)[1].unlink(missing_ok=True)

    def close(self) -> None:
        """Ask for nothing more: what waits to be asked for fails."""
        self._closed.set()

    def _asked(self, messages: Sequence[dict], sample: int, options: dict) -> tuple[dict, Path]:
        """(the request, the file of its answer)."""
        body = {"model": self.model, "messages": list(messages), **options}
        name = hashlib.sha256(json.dumps([body, sample], sort_keys=True).encode()).hexdigest()
        return body, self.cache / name[:2] / f"{name}.json"

    def _count(self, **more: int) -> None:
        with self._lock:
            self.tally.update(more)

    def _ask(self, body: bytes) -> dict:
        headers = {"Content-Type": "application/json", "User-Agent": "nanosport"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        for attempt in range(self.retries + 1):
            self._wait_turn()
            if self._closed.is_set():
                raise EndpointError(f"{self.url}, {self.model}: stopped; what is done is kept")
            try:
                with OPENER.open(request, timeout=self.timeout_s) as response:
                    return self._read(whole(response, time.monotonic() + self.timeout_s))
            except urllib.error.HTTPError as error:
                why, pause = f"status {error.code}: {beginning(error)!r}", error.headers.get("Retry-After")
                if error.code in (400, 413, 422):
                    raise Refused(f"{self.url}, {self.model}: {why}") from None
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise EndpointError(
                        f"{self.url}, {self.model}: {why}; check the address, the model's name and {self.key_name}"
                    ) from None
            except (OSError, http.client.HTTPException, Garbled) as error:  # URLError and time-outs are OSErrors
                why, pause = str(getattr(error, "reason", error)) or type(error).__name__, None
            if attempt < self.retries:
                self._count(retries=1)
                asked_s = float(pause) if pause and pause.isdigit() else 0.0
                time.sleep(min(120.0, max(asked_s, 2.0**attempt * random.uniform(0.75, 1.25))))
        raise EndpointError(
            f"{self.url}, {self.model}: no answer after {self.retries + 1} tries ({why}); start again later, what is done is kept"
        )

    def _wait_turn(self) -> None:
        if self.per_minute:
            with self._lock:
                at_s = max(self._next_s, time.monotonic())
                self._next_s = at_s + 60 / self.per_minute
            time.sleep(max(0.0, at_s - time.monotonic()))

    def _read(self, raw: bytes) -> dict:
        """{text, finish_reason, usage} of a reply's bytes. Raises Garbled."""
        try:
            answer = json.loads(raw)
            (choice, *_) = answer["choices"]
            message, usage = choice["message"], answer.get("usage")
            text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"] == "text")
            if thought and "<think>" not in text:  # served apart by servers that know the model reasons
                text = f"<think>{thought.strip()}</think>\n{text}"
            elif "</think>" in text and "<think>" not in text:  # the template of the server has opened it
                text = f"<think>{text}"
            usage = usage if isinstance(usage, dict) else {}
            counts = {k: usage[k] for k in ("prompt_tokens", "completion_tokens") if isinstance(usage.get(k), int)}
            return {"text": text, "finish_reason": choice.get("finish_reason"), "usage": counts}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Garbled(f"the reply is not a chat completion: {raw[:200]!r}") from None


def whole(response: http.client.HTTPResponse, until_s: float) -> bytes:
    """A reply's bytes. Raises TimeoutError after `until_s`, and IncompleteRead where fewer came than were announced."""
    parts, num_bytes = [], 0
    while part := response.read1(2**16):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > MAX_REPLY:
            raise Garbled(f"the reply is longer than {MAX_REPLY} bytes")
        if time.monotonic() > until_s:
            raise TimeoutError("timed out")
    if response.length:
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def image_part(frame_CHW: torch.Tensor) -> dict:
    """A uint8 frame as the part of a message: a JPEG in a data URL."""
    picture = av.VideoFrame.from_ndarray(frame_CHW.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1, options={"qmin": "2", "qmax": "2", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuvj444p"
        container.mux([*stream.encode(picture), *stream.encode()])
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()}}
