"""A client of any OpenAI-compatible chat endpoint. Every answer is on disk before it counts, so none is paid for twice.

    endpoint = Endpoint("http://localhost:8000/v1", "qwen", cache=Path("out/answers"))
    reply = endpoint.chat([{"role": "user", "content": "Hello"}], sample=0, temperature=0.7, max_tokens=500)
    endpoint.tally      # calls, answers from disk, retries, tokens, cost

The key of the service is read from the environment variable OPENAI_API_KEY, and written nowhere. Threads may share one Endpoint.
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
    """Of one request."""
    retries: int = 6
    """After a time-out, a lost connection, 429 or 5xx: waits 1, 2, 4, … seconds, or what the server asks for."""
    per_minute: float = 0.0
    """Requests a minute at most; 0 for no limit."""
    price_in: float = 0.0
    """Of a million prompt tokens."""
    price_out: float = 0.0
    """Of a million completion tokens."""
    tally: Counter = field(default_factory=Counter)
    """calls, cached, retries, prompt_tokens, completion_tokens."""

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{self.url}: an endpoint is an http or https address, such as http://localhost:8000/v1")
        self._lock, self._next_s, self._asking = threading.Lock(), 0.0, WeakValueDictionary()

    @property
    def cost(self) -> float:
        """In the unit of the prices, of the calls made in this run."""
        return (self.tally["prompt_tokens"] * self.price_in + self.tally["completion_tokens"] * self.price_out) / 1e6

    def chat(self, messages: Sequence[dict], sample: int = 0, **options) -> Reply:
        """The answer to a conversation. `sample` numbers independent answers to the same one. Raises EndpointError."""
        body = {"model": self.model, "messages": list(messages), **options}
        asked = json.dumps([body, sample], sort_keys=True).encode()
        name = hashlib.sha256(asked).hexdigest()
        path = self.cache / name[:2] / f"{name}.json"
        with self._lock:
            alone = self._asking.setdefault(name, threading.Lock())
        with alone:  # threads that ask the same wait for the first one's answer
            if cached := path.exists():
                answer = json.loads(path.read_text())
                self._count(cached=1)
            else:
                answer = self._ask(json.dumps(body).encode())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(answer))
                usage = {k: answer["usage"].get(k) or 0 for k in ("prompt_tokens", "completion_tokens")}
                self._count(calls=1, **usage)
        return Reply(answer["text"], answer["finish_reason"] != "length", cached)

    def _count(self, **more: int) -> None:
        with self._lock:
            self.tally.update(more)

    def _ask(self, body: bytes) -> dict:
        headers = {"Content-Type": "application/json", "User-Agent": "nanosport"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        for attempt in range(self.retries + 1):
            self._wait_turn()
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return self._read(response.read(MAX_REPLY))
            except urllib.error.HTTPError as error:
                why, pause = f"status {error.code}: {error.read(300).decode(errors='replace')!r}", error.headers.get("Retry-After")
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise EndpointError(
                        f"{self.url}, {self.model}: {why}; check the address, the model's name and OPENAI_API_KEY"
                    ) from None
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
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
        try:
            answer = json.loads(raw)
            (choice, *_) = answer["choices"]
            message = choice["message"]
            text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
            if thought and "<think>" not in text:  # served apart by servers that know the model reasons
                text = f"<think>{thought.strip()}</think>\n{text}"
            return {"text": text, "finish_reason": choice.get("finish_reason"), "usage": answer.get("usage") or {}}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EndpointError(f"{self.url}, {self.model}: the reply is not a chat completion: {raw[:200]!r}") from None


def image_part(frame_CHW: torch.Tensor) -> dict:
    """A uint8 frame as the part of a message: a JPEG in a data URL."""
    picture = av.VideoFrame.from_ndarray(frame_CHW.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1, options={"qmin": "2", "qmax": "2", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuvj444p"
        container.mux([*stream.encode(picture), *stream.encode()])
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()}}
