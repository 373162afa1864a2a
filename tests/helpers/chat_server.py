"""A small OpenAI-compatible chat server over the project's engine, on loopback: what distillation
and the judge talk to in tests.

    with ChatServer(folder) as server: … server.url …

It reads system, user and assistant messages with JPEG data URLs, samples one turn, and cuts the
stop string off, as public services do. `trouble` holds what goes wrong with the next requests: a
status code, "drop", "rubbish", "cut" (by length), or a function that answers in the server's place.
With `tokenizes` it shows its tokens at /tokenize, as vLLM does.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import torch

from nanosport.engine.own import OwnSampler
from nanosport.engine.sampler import Piece, Sampling
from nanosport.env.prompt import IMAGE_PAD, VISION_END, VISION_START
from nanosport.env.tools import STOPS
from nanosport.image import ImageConfig, preprocess
from nanosport.model.folder import load_model, load_tokenizer


class ShownFrames:
    """What a Piece asks for its features, where the frames came as pictures."""

    def __init__(self, model, patches: list[torch.Tensor], grids: list[tuple[int, int, int]]):
        self.model, self.patches, self.grids = model, patches, grids

    def expect(self, frames) -> None:
        pass

    def features(self, frames: list[int]) -> torch.Tensor:
        patches_PC = torch.cat([self.patches[k] for k in frames])
        return self.model.encode(patches_PC, [self.grids[k] for k in frames])


class ChatServer:
    def __init__(self, folder):
        self.model, self.tokenizer, self.image = (
            load_model(folder),
            load_tokenizer(folder),
            ImageConfig.from_folder(folder),
        )
        self.trouble: list = []
        self.tokenizes = False
        self.prompts: list[list[int]] = []
        """The tokens of the requests that were answered."""
        self.answered: list[str] = []
        """Bodies of the requests that were answered."""
        self.headers: list[dict] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.handle(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"])).decode()
        if request.path.endswith("/tokenize"):
            return self.tokenize(request, json.loads(body))
        self.headers.append(dict(request.headers))
        wrong = self.trouble.pop(0) if self.trouble else None
        if isinstance(wrong, int):
            request.send_response(wrong)
            request.send_header("Retry-After", "0")
            request.end_headers()
            request.wfile.write(b'{"error": "as told"}')
            return
        if callable(wrong):
            return wrong(request)
        if wrong == "drop":
            request.connection.close()
            return
        if wrong == "rubbish":
            reply = b"<html>a proxy speaks</html>"
        else:
            with self.lock:
                reply = json.dumps(self.answer(json.loads(body), wrong == "cut")).encode()
        self.answered.append(body)  # before the reply is out: who has it may count
        request.send_response(200)
        request.send_header("Content-Length", str(len(reply)))
        request.end_headers()
        request.wfile.write(reply)

    def tokenize(self, request, body: dict) -> None:
        text = body.get("prompt") or self.text(body["messages"])[0]
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        request.send_response(200 if self.tokenizes else 404)
        request.end_headers()
        request.wfile.write(json.dumps({"tokens": tokens, "count": len(tokens)}).encode())

    def text(self, messages: list) -> tuple[str, list, list]:
        """The chat template's text of messages, with the patches and grids of their pictures."""
        text, patches, grids = "", [], []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text += f"<|im_start|>{message['role']}\n"
            for part in parts:
                if part["type"] == "text":
                    text += part["text"]
                    continue
                kind, data = part["image_url"]["url"].split(",")
                assert kind == "data:image/jpeg;base64"
                with av.open(io.BytesIO(base64.b64decode(data))) as container:
                    frame_HWC = torch.from_numpy(
                        next(container.decode(video=0)).to_ndarray(format="rgb24")
                    )
                patches_PC, ((_, h, w),) = preprocess(frame_HWC.permute(2, 0, 1)[None], self.image)
                patches.append(patches_PC)
                grids.append((1, h, w))
                pads = IMAGE_PAD * (h * w // self.image.merge_size**2)
                text += f"{VISION_START}{pads}{VISION_END}"
            text += "<|im_end|>\n"
        return text + "<|im_start|>assistant\n", patches, grids

    @torch.no_grad()
    def answer(self, body: dict, cut: bool) -> dict:
        text, patches, grids = self.text(body["messages"])
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.prompts.append(ids)
        piece = Piece(ids, grids, range(len(grids)), ShownFrames(self.model, patches, grids))
        num_tokens = min(body["max_tokens"], 160)
        sampling = Sampling(body["temperature"], max_new_tokens=num_tokens, stops=STOPS)
        sampler = OwnSampler(self.model, self.tokenizer, sampling)
        sampler.open(piece, [np.random.default_rng(len(self.answered))])
        _, turn = next(sampler.turns())
        said = self.tokenizer.decode(
            turn.ids[: len(turn.ids) // 2] if cut else turn.ids, skip_special_tokens=True
        )
        for stop in body.get("stop", []):
            said = said.split(stop)[0]
        finish = "stop" if turn.stopped and not cut else "length"
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(turn.ids)}
        return {
            "choices": [
                {"message": {"role": "assistant", "content": said}, "finish_reason": finish}
            ],
            "usage": usage,
        }
