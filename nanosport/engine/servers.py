"""vLLM servers as a sampler: one model, served by as many as there are, here or on other nodes.

Each turn is one request or two (see Talk), ids in and ids out, in a thread of its own. A server
that dies, hangs, or answers with other weights than it was given is named on standard error and
given up; what it was asked for, another is asked, with the same seed. With the next weights every
server is tried again, so one that was started anew plays on. Where none is left, SamplerError.

Servers are started by nanosport/engine/serve.py.
"""

import json
import queue
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanosport.engine import nccl
from nanosport.engine.sampler import Generated, SamplerError
from nanosport.engine.vllm import Answer, Frame, Talk, Talks, import_vllm, items_of


@dataclass(frozen=True)
class Servers:
    """How servers are spoken to."""

    files: Path
    """The folder in which they find new weights; they must see it under the same path."""
    wait_s: float
    """A server that has not answered a request after so long is given up."""
    over: str
    """`files` or `nccl`: how weights come to them."""
    pushes: bool
    """Whether this process brings them; one does."""


class Lost(Exception):
    """A server that cannot be counted on any more, and why."""


@dataclass
class Server:
    url: str
    wait_s: float
    down: str = ""
    """Why it is given up; empty where it is not."""
    way: object = None
    """To its GPUs, once weights have gone there."""

    def __post_init__(self):
        # straight there: a proxy knows no node of ours
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict:
        return self._open(self.url + path)

    def post(self, path: str, body: dict | None = None) -> dict:
        """Its answer. Raises Lost where it has none."""
        data = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self.url + path, data, headers))

    def _open(self, request) -> dict:
        try:
            with self.opener.open(request, timeout=self.wait_s) as response:
                raw = response.read()
            answer = json.loads(raw) if raw else {}
        except urllib.error.HTTPError as error:
            raise Lost(f"status {error.code}: {error.read(300)!r}") from None
        except TimeoutError:
            raise Lost(f"no answer for {self.wait_s:g} s") from None
        except (OSError, HTTPException, ValueError) as error:
            raise Lost(str(getattr(error, "reason", error)) or type(error).__name__) from None
        if not isinstance(answer, dict):
            raise Lost("its answer is no JSON object")
        return answer

    def room(self) -> int:
        """How long a conversation of its may be."""
        models = self.get("/v1/models").get("data")
        try:
            return int(models[0]["max_model_len"])
        except (TypeError, LookupError, ValueError):
            raise Lost("is no vLLM server") from None

    def take_files(self, folder: Path) -> None:
        """Have it load the weights in a folder's files."""
        self.post("/collective_rpc", {"method": "take_files", "args": [str(folder)]})

    def take_sent(self, weights: Iterator[tuple[str, torch.Tensor]], announced: list) -> None:
        """Send it the weights from GPU to GPU. announced: as nccl.connect has it."""
        try:
            if self.way is None:
                workers = int(self.get("/get_world_size")["world_size"])
                self.way = nccl.connect(self.url, self.post, workers, announced)
            self.way.source.weights = weights
            self.way.send_weights()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise Lost(f"takes no weights: {error!r}") from error

    def renew(self, take: Callable[[], None], version: int) -> None:
        """Have it take new weights, and forget what the old ones have computed. take: one of its
        two ways to do so."""
        self.post("/pause?mode=abort")  # what was asked for before it was given up
        try:
            take()
        except Lost:
            with suppress(Lost):  # paused, it would keep other ranks waiting; its version is old
                self.post("/resume")
            raise
        self.post("/reset_encoder_cache")
        if not self.post("/reset_prefix_cache").get("success"):
            raise Lost("keeps what its old weights have computed")
        self.post("/update_weight_version", {"new_version": str(version)})
        self.post("/resume")


class ServerSampler(Talks):
    """A Sampler over vLLM's servers."""

    def __init__(self, urls: Sequence[str], how: Servers, max_tokens: int, *about):
        """about: as Talks takes it. Raises SamplerError where no server can play conversations of
        max_tokens."""
        import_vllm()
        super().__init__(*about)
        self.how, self.lock = how, threading.Lock()
        self.servers = [Server(url, how.wait_s) for url in urls]
        self.homes: dict[int, Server] = {}
        """Who plays each of them."""
        self.waiting: set[int] = set()
        """Conversations that wait for a turn."""
        self.said: queue.SimpleQueue = queue.SimpleQueue()
        """(number, turn or what went wrong), as they come."""
        for server in self.servers:
            try:
                if (room := server.room()) < max_tokens:
                    raise Lost(f"takes {room:,} tokens, {max_tokens:,} are needed: --max-tokens")
            except Lost as lost:
                self._give_up(server, str(lost))
        self._some_server()

    # The seam.

    def turns(self) -> Iterator[tuple[int, Generated]]:
        while self.waiting:
            began = time.monotonic()
            number, turn = self.said.get()
            self.counts["seconds_speak"] += time.monotonic() - began
            if number not in self.waiting:
                continue  # it was closed meanwhile
            self.waiting.remove(number)
            if isinstance(turn, Exception):
                raise turn
            self.counts["tokens_said"] += len(turn.ids)
            yield number, turn

    def close(self, number: int) -> None:
        self.waiting.discard(number)
        with self.lock:
            self.talks.pop(number, None)
            self.homes.pop(number, None)

    def sleep(self) -> None:
        """Servers keep what they have: nobody trains there."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = version
        by_files = self.how.over == "files"
        if not self.how.pushes:
            for server in self.servers:
                server.down = ""  # what is lost shows itself again
            for _ in self.servers[: 1 if by_files else None]:
                deque(weights, 0)  # all ranks gather them together
        elif by_files:
            folder = self.how.files / f"step_{version:06d}"
            write_files(weights, folder)
            with ThreadPoolExecutor(len(self.servers)) as pool:
                takes = [partial(server.take_files, folder) for server in self.servers]
                deque(pool.map(self._renew, self.servers, takes), 0)
            shutil.rmtree(self.how.files)
        else:
            for server in self.servers:
                once = iter(weights)
                self._renew(server, partial(server.take_sent, once, weights.announced))
                deque(once, 0)  # as the other ranks do, whether or not it has taken them

    # Servers.

    def _settle(self, group: Iterable[int]) -> None:
        home = self._some_server()  # one for all: it reads their prompt once
        with self.lock:
            self.homes |= dict.fromkeys(group, home)

    def _renew(self, server: Server, take: Callable[[], None]) -> None:
        """Give a server new weights; one that was given up and takes them plays again."""
        try:
            server.renew(take, self.version)
        except Lost as lost:
            return self._give_up(server, str(lost))
        if server.down:
            server.down = ""
            say(f"{server.url}: is back, with the weights of step {self.version}")

    def _give_up(self, server: Server, why: str) -> None:
        with self.lock:
            news, server.down = not server.down, why
            server.way = None  # what comes back is another process
            self.counts["servers_lost"] += news
        if news:
            say(f"{server.url}: {why}: given up; others play its conversations")

    def _some_server(self) -> Server:
        """The one with the fewest conversations. Raises SamplerError where none is left."""
        with self.lock:
            loads = Counter(home.url for home in self.homes.values())
            up = [server for server in self.servers if not server.down]
            if up:
                return min(up, key=lambda server: loads[server.url])
        whys = "; ".join(f"{server.url}: {server.down}" for server in self.servers)
        fix = "start one with python -m nanosport.engine.serve"
        raise SamplerError(f"--sampler: no server is left ({whys}); {fix}")

    def _ask(self, number: int) -> None:
        """Have the next turn of a conversation sampled, in a thread."""
        self.waiting.add(number)
        threading.Thread(target=self._turn, args=(number, self.talks[number]), daemon=True).start()

    def _turn(self, number: int, talk: Talk) -> None:
        turn = None
        try:
            while turn is None:
                turn = talk.take(self._answer(number, talk))
        except Exception as error:
            turn = error
        self.said.put((number, turn))

    def _answer(self, number: int, talk: Talk) -> Answer:
        """What a server says next; where it is lost, another does."""
        body = {"token_ids": talk.ids, "sampling_params": self.constant_params | talk.params()}
        if talk.frames:
            body["features"] = sendable(talk.frames, self.cfg.vision.spatial_merge_size)
        while True:
            home = self.homes.get(number)
            if home is None or home.down:
                home = self._some_server()
                with self.lock:
                    if number in self.talks:  # else it was closed meanwhile
                        self.homes[number] = home
            try:
                return read_answer(home.post("/inference/v1/generate", body), self.version)
            except Lost as lost:
                self._give_up(home, str(lost))
                with self.lock:
                    self.counts["asked_again"] += 1


def read_answer(reply: dict, version: int) -> Answer:
    """The answer in a server's reply. Raises Lost where it is none, or of other weights than those
    of `version`."""
    try:
        (choice,) = reply["choices"]
        ids, stop = choice["token_ids"], choice["stop_reason"]
        logp = [row["logprob"] for row in choice["logprobs"]["content"]]
        versions = {span["version"] for span in choice["weight_versions"]}
        whole = len(ids) == len(logp) > 0 and choice["finish_reason"] in ("stop", "length")
    except (KeyError, TypeError, ValueError) as error:
        raise Lost(f"its reply is not one of vLLM's ({error!r})") from None
    if versions != {str(version)}:
        raise Lost(f"has the weights of step {', '.join(sorted(versions))}, not of {version}")
    if not whole or not all(map(isfinite, logp)):
        raise Lost(f"its turn is not whole ({choice['finish_reason']}, {len(ids)} tokens)")
    return Answer(
        ids, logp, choice["finish_reason"], stop if isinstance(stop, str) else None, version
    )


def sendable(frames: Sequence[Frame], merge_size: int) -> dict:
    """Frames as vLLM's servers take them."""
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    items = items_of(frames, merge_size)
    places = items["mm_placeholders"]["image"]
    data = [encode_mm_kwargs_item(item) for item in items["mm_kwargs"]["image"]]
    return {
        "mm_hashes": items["mm_hashes"],
        "mm_placeholders": {"image": [{"offset": p.offset, "length": p.length} for p in places]},
        "kwargs_data": {"image": data},
    }


def write_files(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write each weight to a safetensors file of its own, as it comes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (name, weight) in enumerate(weights):
        save_file({name: weight.detach().cpu().contiguous()}, folder / f"{number:05d}.safetensors")


def say(line: str) -> None:
    print(f"\n{line}", file=sys.stderr, flush=True)
