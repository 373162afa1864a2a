"""A client of any OpenAI-compatible chat endpoint. Every answer is on disk before it counts, so
none is paid for twice.

    endpoint = Endpoint("http://localhost:8000/v1", "qwen", cache=Path("out/answers"))
    reply = endpoint.chat([{"role": "user", "content": "Hello"}], sample=0, max_tokens=500)
    endpoint.tally      # calls, answers from disk, retries, tokens

The key of the service is read from an environment variable (OPENAI_API_KEY; a judge's from
JUDGE_API_KEY), sent to the address given and to no other, and neither printed nor written, though a
server may send it back. A service on this machine is asked past any proxy. Threads may share one
Endpoint.
"""

import hashlib
import http.client
import ipaddress
import json
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from nanosport.files import write_atomically

MAX_REPLY = 16 * 2**20
"""Bytes: no honest reply is longer."""
SECRET = 8
"""A shorter key is a placeholder such as EMPTY: it may stand in any text."""


class EndpointError(ValueError):
    """A request that will not be answered. It says in one line what, why, and what to do."""


class Refused(EndpointError):
    """This one request will not be answered, others may: it is too long for the model, or against
    the service's rules."""


class TryAgain(Exception):
    """A lost, late or garbled reply: another try may help, after a pause the server may ask for."""

    def __init__(self, why: str, pause_s: float = 0.0, away: bool = False):
        """away: nothing came that would be paid for, so trying on costs time only."""
        super().__init__(why)
        self.pause_s, self.away = pause_s, away


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect ends as the error that its status is: it would take the key to another host."""

    def redirect_request(self, *args):
        return None


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
    """Its address, up to and with /v1."""
    model: str
    cache: Path
    """Folder of the answers, one file each, named by what was asked."""
    timeout_s: float = 300.0
    """One request, its reply included, may take so long."""
    retries: int = 6
    """How often a request is repeated after a time-out, a lost connection, a garbled reply, 429 or
    5xx. It waits 1, 2, 4, … seconds, or what the server asks for."""
    wait_s: float = 0.0
    """A service that is away (no connection, a time-out, 429, 5xx) is asked again for so long. 0:
    as often as `retries` says."""
    per_minute: float = 0.0
    """Requests a minute at most; 0 for no limit."""
    price_in: float = 0.0
    """What a million prompt tokens cost."""
    price_out: float = 0.0
    """What a million completion tokens cost."""
    key_name: str = "OPENAI_API_KEY"
    """The environment variable that holds its key."""
    tally: Counter = field(default_factory=Counter)
    """calls, cached, retries, prompt_tokens, completion_tokens; answers that a judge
    has graded, and those that are ungraded; refused requests."""

    def __post_init__(self):
        if "@" in self.url:
            rule = "its address holds a name or password, which reports would keep; take it out"
            raise EndpointError(f"{self.model}: {rule}, {self.key_name} is for secrets")
        if not self.url.startswith(("http://", "https://")):
            rule = "an endpoint is an http or https address, such as http://localhost:8000/v1"
            raise EndpointError(f"{self.url}: {rule}")
        self._lock, self._next_s, self._asking = threading.Lock(), 0.0, WeakValueDictionary()
        self._closed = self._dropped = self._told = False
        proxies = proxies_for(self.url)
        self._opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler(proxies))
        through = proxies.get(urlsplit(self.url).scheme, "").rpartition("@")[2]  # no password
        proxy = f" through the proxy {through}" if through else ""
        self._name = f"{self.url}{proxy}, {self.model}"
        self._key = os.environ.get(self.key_name, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise EndpointError(f"{self.key_name}: holds what no key does; set it anew")

    @property
    def cost(self) -> float:
        """What the calls of this run cost, in the unit of the prices."""
        prompt, completion = self.tally["prompt_tokens"], self.tally["completion_tokens"]
        return (prompt * self.price_in + completion * self.price_out) / 1e6

    def chat(self, messages: Sequence[dict], sample: int = 0, **options) -> Reply:
        """The answer to a conversation. sample: the number of one of several independent answers.
        Raises EndpointError."""
        body, path = self._asked(messages, sample, options)
        with self._lock:
            alone = self._asking.setdefault(path.name, threading.Lock())
        with alone:  # threads that ask the same wait for the first one's answer
            if cached := path.exists():
                answer = json.loads(path.read_text())
                self.count(cached=1)
            else:
                answer = self._ask(json.dumps(body).encode())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(answer))
                self.count(calls=1, **answer["usage"])
        return Reply(answer["text"], answer["finish_reason"] != "length", cached)

    def forget(self, messages: Sequence[dict], sample: int = 0, **options) -> None:
        """Remove an answer that was of no use: it will be asked for again."""
        self._asked(messages, sample, options)[1].unlink(missing_ok=True)

    def close(self, drop: bool = False) -> None:
        """Ask for nothing more: what waits to be asked for fails; drop: what is under way too. A
        signal's handler may call it, for it takes no lock."""
        self._closed, self._dropped = True, drop or self._dropped

    def _asked(self, messages: Sequence[dict], sample: int, options: dict) -> tuple[dict, Path]:
        """(the request, the file of its answer)."""
        body = {"model": self.model, "messages": list(messages), **options}
        name = hashlib.sha256(json.dumps([body, sample], sort_keys=True).encode()).hexdigest()
        return body, self.cache / name[:2] / f"{name}.json"

    def count(self, **more: int) -> None:
        """Add to the tally."""
        with self._lock:
            self.tally.update(more)

    def _ask(self, body: bytes) -> dict:
        """The answer to a request, which is repeated where another try may help."""
        began, attempt = time.monotonic(), 0
        while True:
            self._wait_turn()
            if self._closed:
                raise EndpointError(f"{self._name}: stopped; its answers are kept")
            try:
                answer = self._within(self.timeout_s, lambda: self._post(body))
                self._told = False
                return answer
            except TryAgain as error:
                why, pause_s, away = str(error), error.pause_s, error.away
            left_s = began + self.wait_s - time.monotonic() if away else 0.0
            if left_s <= 0 and (attempt >= self.retries or away and self.wait_s > 0):
                break
            self.count(retries=1)
            if attempt == 3 and left_s > 0 and not self._told:
                self._told = True
                wait = f"{why}; waiting for it, up to {self.wait_s:g} s"
                print(f"\n{self._name}: {wait}", file=sys.stderr)
            backoff_s = 2.0 ** min(attempt, 7) * random.uniform(0.75, 1.25)
            attempt += 1
            self._pause(min(120.0, max(pause_s, backoff_s)))
        tries = f"no answer after {attempt + 1} tries ({why})"
        raise EndpointError(f"{self._name}: {tries}; start again later, its answers are kept")

    def _pause(self, seconds: float) -> None:
        """Wait, but not long after `close`."""
        for _ in range(parts := ceil(seconds)):
            if not self._closed:
                time.sleep(seconds / parts)

    def _within(self, limit_s: float, action: Callable[[], dict]) -> dict:
        """What `action` returns or raises. Raises TryAgain after `limit_s`: a server that drips
        bytes never lets a socket's own time-out pass."""
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        for _ in range(parts := ceil(limit_s)):
            with suppress(TimeoutError):
                return future.result(0 if self._dropped else limit_s / parts)
        raise TryAgain("timed out", away=True)

    def _request(self, url: str, body: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "User-Agent": "nanosport"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return urllib.request.Request(url, body, headers)

    def _post(self, body: bytes) -> dict:
        """Send a request once. Raises TryAgain where another try may help, else EndpointError."""
        request = self._request(self.url.rstrip("/") + "/chat/completions", body)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return self._read(read_all(response))
        except urllib.error.HTTPError as error:
            why = f"status {error.code}: {self._said(read_start(error))}"
            if error.code in (400, 413, 422):
                self.count(refused=1)
                raise Refused(f"{self._name}: {why}") from None
            if error.code not in (408, 409, 429) and error.code < 500:
                fix = f"check the address, the model's name and {self.key_name}"
                raise EndpointError(f"{self._name}: {why}; {fix}") from None
            pause = error.headers.get("Retry-After")
            pause_s = float(pause) if pause and pause.isdecimal() else 0.0
            raise TryAgain(why, pause_s, away=True) from None
        except (OSError, http.client.HTTPException) as error:  # a time-out is an OSError
            why = str(getattr(error, "reason", error)) or type(error).__name__
            raise TryAgain(self._hide(why.encode()).decode(), away=True) from None

    def _hide(self, raw: bytes) -> bytes:
        """What a server has sent, without the key."""
        return raw.replace(self._key.encode(), b"[key]") if len(self._key) >= SECRET else raw

    def _start(self, raw: bytes) -> str:
        """What a reply begins with, for an error's line; a key at its edge is hidden too."""
        return repr(self._hide(raw)[:300].decode(errors="replace"))

    def _said(self, raw: bytes) -> str:
        """The sentence of an error's page, as the server has put it, else what the page begins
        with."""
        try:
            said = json.loads(self._hide(raw))
            for name in ("error", "message", "detail"):
                said = said.get(name, said) if isinstance(said, dict) else said
        except (ValueError, RecursionError):
            said = None
        return " ".join(said.split())[:500] if isinstance(said, str) else self._start(raw)

    def tokens(self, **asked) -> list[int] | None:
        """A server's own tokens of a text (`prompt`) or of `messages`, as vLLM's /tokenize has
        them; None where there is no such service."""
        url = self.url.rstrip("/").removesuffix("/v1") + "/tokenize"
        body = json.dumps({"model": self.model, **asked}).encode()
        try:
            with self._opener.open(self._request(url, body), timeout=30) as response:
                tokens = json.loads(read_all(response))["tokens"]
        except (OSError, http.client.HTTPException, TryAgain, ValueError, KeyError, TypeError):
            return None
        return tokens if isinstance(tokens, list) else None

    def _wait_turn(self) -> None:
        if self.per_minute:
            with self._lock:
                at_s = max(self._next_s, time.monotonic())
                self._next_s = at_s + 60 / self.per_minute
            self._pause(at_s - time.monotonic())

    def _read(self, raw: bytes) -> dict:
        """{text, finish_reason, usage} of a reply's bytes. Raises TryAgain."""
        try:
            reply = json.loads(self._hide(raw))
            (choice, *_) = reply["choices"]
            usage = reply.get("usage")
            usage = usage if isinstance(usage, dict) else {}
            counts = {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}
            return {
                "text": text_of(choice["message"]),
                "finish_reason": choice.get("finish_reason"),
                "usage": {k: count for k, count in counts.items() if isinstance(count, int)},
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TryAgain(f"the reply is not a chat completion: {self._start(raw)}") from None


def proxies_for(url: str) -> dict[str, str]:
    """The proxies of the environment; none where the address is this machine, or excepted there."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        here = address.is_loopback or address.is_unspecified
    except ValueError:
        here = host == "localhost"
    return {} if here or urllib.request.proxy_bypass(host) else urllib.request.getproxies()


def text_of(message: dict) -> str:
    """The text of a reply's message, its reasoning inside <think></think>."""
    text = message.get("content") or ""
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if part["type"] == "text")
    if not isinstance(text, str):
        raise TypeError("content is no text")
    # some servers know that the model reasons, and send that apart
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if thought and "<think>" not in text:
        return f"<think>{thought.strip()}</think>\n{text.lstrip()}"
    # the templates of others have opened it
    return f"<think>{text}" if "</think>" in text and "<think>" not in text else text


def read_all(response: http.client.HTTPResponse) -> bytes:
    """A reply's bytes. Raises IncompleteRead where fewer came than were announced."""
    raw = response.read(MAX_REPLY + 1)
    if len(raw) > MAX_REPLY:
        raise TryAgain(f"the reply is longer than {MAX_REPLY} bytes")
    if response.length:
        raise http.client.IncompleteRead(raw, response.length)
    return raw


def read_start(error: urllib.error.HTTPError) -> bytes:
    """What an error's page begins with, and the whole of a key that begins there."""
    try:
        return error.read(10_000)
    except (OSError, http.client.HTTPException):
        return b""
