"""A small stand-in for a vLLM server, on loopback: the routes that nanosport/engine/servers.py
calls. What it says is a script: it looks once, then answers.

    with SamplingServer(tokenizer) as server: … server.url …

`wrong(number)` decides what goes wrong with the request of this number: None, "die" (nobody listens
any more), "hang" (until the end), "old" (as if it had been started anew), or a text that it says.
"""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load_file

from nanosport.env.tools import tool_call

LOOK = f"<think>i look.</think>\n{tool_call(20, 60)}"
ANSWER = "<think>red 7.</think>\n<answer>B</answer>"


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # of five, a busy machine refuses the next


class SamplingServer:
    def __init__(self, tokenizer, port: int = 0, room: int = 100_000):
        self.tokenizer, self.room = tokenizer, room
        self.version, self.weights = "default", {}
        self.wrong = lambda number: None
        self.asked: list[dict] = []
        """Bodies of the requests to sample."""
        self.calls: list[str] = []
        self.told: list[dict] = []
        """Paths and bodies of the others."""
        self.refused: set[str] = set()
        """Paths that it does not answer as vLLM would."""
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"data": [{"max_model_len": server.room}], "world_size": 1})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(server.answer(self, body))

            def reply(self, answer) -> None:
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = Listener(("127.0.0.1", port), Handler)
        self.http.handle_error = lambda *_: None  # a client that has given it up
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.die()

    def die(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request, body: dict):
        path = request.path.partition("?")[0]
        if path != "/inference/v1/generate":
            self.calls.append(path)
            self.told.append(body)
            if path in self.refused:
                return b"no"
            if path == "/collective_rpc":
                assert body["method"] == "take_files"
                self.weights = load_file(f"{body['args'][0]}/00000.safetensors")
            if path == "/update_weight_version":
                self.version = body["new_version"]
            return {"success": True}
        self.asked.append(body)
        wrong = self.wrong(len(self.asked))
        if wrong == "die":
            threading.Thread(target=self.die).start()
            request.connection.shutdown(socket.SHUT_RDWR)
            return {}
        if wrong == "hang":
            self.released.wait(60)
        if wrong == "old":
            self.version = "default"
        elif wrong and wrong != "hang":
            return wrong.encode()
        return self.say(body)

    def say(self, body: dict) -> dict:
        params, text = body["sampling_params"], self.tokenizer.decode(body["token_ids"])
        said, stop = ANSWER, "</answer>"
        if text.count("<|im_start|>assistant") == 1:
            said, stop = LOOK, "</tool_call>"
        ids = self.tokenizer.encode(said, add_special_tokens=False)
        if not params["stop"]:
            ids, stop = [self.tokenizer.convert_tokens_to_ids("<|im_end|>")], None
        finish, ids = (
            "stop" if len(ids) <= params["max_tokens"] else "length",
            ids[: params["max_tokens"]],
        )
        return {
            "choices": [
                {
                    "token_ids": ids,
                    "finish_reason": finish,
                    "stop_reason": stop if finish == "stop" else None,
                    "logprobs": {"content": [{"token_id": i, "logprob": -0.5} for i in ids]},
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
                }
            ]
        }
