"""The server's routes: the page, videos, and questions as OpenAI's chat completions."""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nanosport.env.printing import as_json, turn_json
from nanosport.records import Episode, Question, check_text
from nanosport.serve.desk import Desk, Job
from nanosport.serve.uploads import MB, Refused, Uploads
from nanosport.train.inputs import check_prompt

PARTS = Path(__file__).parent
FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
OWN = "; ".join(f"{kind}-src 'self'" for kind in ("script", "style", "connect"))
POLICY = f"default-src 'none'; {OWN}; media-src blob:"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_REQUEST_MB = 64
"""A question may bring its video along, up to this size."""


@dataclass(frozen=True)
class Server:
    """What the routes share."""

    desk: Desk
    uploads: Uploads
    model: str
    token: str
    """What each request must bring; empty: none."""
    timeout_s: float
    """A question is given up after so long, the time that it waits included."""
    began: int = field(default_factory=lambda: int(time.time()))

    def admit(self, request: Request) -> None:
        """Raise Refused for whoever may not ask: without the token; or, where there is none, a page
        of another site in this machine's browser."""
        if self.token:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise Refused(401, "give the server's token: Authorization: Bearer …")
            return
        for name in ("host", "origin"):
            at = request.headers.get(name, "localhost")
            try:
                host = urlsplit(at if "://" in at else f"//{at}").hostname
            except ValueError:
                host = None
            if host not in LOCAL:
                raise Refused(403, f"{name} {at!r:.100}: only for this machine; start with --token")


def application(server: Server) -> Starlette:
    """The server as an ASGI application."""

    def route(path: str, handle: Callable, method: str) -> Route:
        async def guarded(request: Request) -> Response:
            try:
                server.admit(request)
                return await handle(server, request)
            except Refused as error:
                return failure(error.status, str(error))
            except ClientDisconnect:
                return failure(499, "gone")
            except OSError as error:  # a full disk
                return failure(507, error.strerror or str(error))

        return Route(path, guarded, methods=[method])

    @asynccontextmanager
    async def lifespan(_):
        async def sweep() -> None:
            while True:
                server.uploads.sweep()
                await asyncio.sleep(min(10.0, server.uploads.keep_s))

        run, forget = asyncio.get_running_loop().run_in_executor, server.desk.encoder.forget
        server.uploads.on_removed = lambda path: run(None, forget, str(path))
        task = asyncio.create_task(sweep())
        yield
        task.cancel()
        server.uploads.folder.cleanup()

    return Starlette(
        routes=[
            *(Route(path, page) for path in FILES),
            route("/videos", send_video, "POST"),
            route("/videos/{name}", drop_video, "DELETE"),
            route("/v1/models", list_models, "GET"),
            route("/v1/chat/completions", complete, "POST"),
        ],
        lifespan=lifespan,
    )


def failure(status: int, why: str) -> JSONResponse:
    """An error as OpenAI's interface has it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "5"} if status == 503 else {}
    error = {"message": why, "type": kind, "code": status}
    return JSONResponse({"error": error}, status, headers)


def page(request: Request) -> Response:
    path = PARTS / FILES[request.url.path]
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)


async def list_models(server: Server, request: Request) -> Response:
    about = {"id": server.model, "object": "model", "owned_by": "nanosport"}
    about["created"] = server.began
    return JSONResponse({"object": "list", "data": [about]})


async def send_video(server: Server, request: Request) -> Response:
    """Take a video: its bytes are the request's body."""
    need_type(request, "application/octet-stream")  # a form of another site cannot send that
    name = await server.uploads.receive(request.stream(), promised_size(request))
    try:
        with server.uploads.reading(name) as path:
            question = question_of(path, "?")
            video = await asyncio.to_thread(server.desk.encoder.open, question.clip)
    except ValueError as error:
        server.uploads.drop(name)
        raise Refused(400, said_of(error, name)) from None
    about = {"num_frames": video.num_frames, "fps": video.fps}
    return JSONResponse({"id": name, "url": f"upload:{name}", **about})


async def drop_video(server: Server, request: Request) -> Response:
    server.uploads.drop(request.path_params["name"])
    return Response(status_code=204)


def need_type(request: Request, wanted: str) -> None:
    if request.headers.get("content-type", "").partition(";")[0] != wanted:
        raise Refused(415, f"Content-Type must be {wanted}")


def promised_size(request: Request) -> int | None:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 19 else None


def question_of(path: Path, text: str) -> Question:
    return Question("serve", str(path), "", "recognition", text, (), "")


def said_of(error: Exception, name: str) -> str:
    """An error's line, without the path that the video has here."""
    return str(error).partition(f"{name}: ")[2] or str(error)


async def read_request(server: Server, request: Request) -> tuple[dict, str, str]:
    """(the request's JSON object, the question, the address of its video). Raises Refused."""
    need_type(request, "application/json")
    body = bytearray()
    parts = aiter(request.stream())
    while part := await server.uploads.next_part(parts):
        body.extend(part)
        if len(body) > MAX_REQUEST_MB * MB:
            raise Refused(413, f"a request may have {MAX_REQUEST_MB} MB: send the video first")
    try:
        asked = json.loads(body)
        texts, urls = [], []
        for message in asked["messages"]:
            if message["role"] != "user":
                continue
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if said := [part["text"] for part in parts if part["type"] == "text"]:
                texts = said
            urls += [part["video_url"]["url"] for part in parts if part["type"] == "video_url"]
        text = check_text("\n".join(texts).strip(), "the question")
    except RecursionError:
        raise Refused(400, "nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(400, f"no request for a chat completion: {error!r:.200}") from None
    if not text or not urls or not isinstance(urls[-1], str):
        raise Refused(400, "a user's message must have a text, and one a video_url")
    return asked, text, urls[-1]


async def video_at(server: Server, url: str) -> tuple[str, bool]:
    """(id of the video at an address, whether it came with the question). Raises Refused."""
    if url.startswith("upload:"):
        return url.removeprefix("upload:"), False
    head, comma, data = url.partition(",")
    if not (head.startswith("data:video/") and head.endswith(";base64") and comma):
        raise Refused(400, "video_url must be upload:ID, or data:video/…;base64,…")
    try:
        raw = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise Refused(400, f"video_url: {error}") from None

    async def whole() -> AsyncIterator[bytes]:
        yield raw

    return await server.uploads.receive(whole(), len(raw)), True


async def complete(server: Server, request: Request) -> Response:
    """Answer a question; with "stream", as it comes. "show_turns": with what is thought and called
    on the way; else the answer alone is the content."""
    asked, text, url = await read_request(server, request)
    name, came_along = await video_at(server, url)
    shows = bool(asked.get("show_turns"))
    is_watched = shows and bool(asked.get("stream"))
    events = answering(server, request, name, text, came_along, is_watched)
    first = await anext(events)  # refused before an answer begins
    about = {"id": f"chatcmpl-{secrets.token_hex(8)}", "created": int(time.time())}
    about["model"] = server.model
    if asked.get("stream"):
        lines = streamed(first, events, about, shows)
        return StreamingResponse(lines, media_type="text/event-stream", headers=HEADERS)
    said, began = [], time.monotonic()
    try:
        async for kind, value in events:
            if kind == "error":
                raise Refused(*value)
            if kind == "turn":
                said.append(value.text)
            if kind == "end":
                content = "\n".join(said) if shows else value.answer or ""
                return JSONResponse(completion(value, content, about, time.monotonic() - began))
    finally:
        await events.aclose()
    raise ClientDisconnect  # else the events end with an answer or an error


def completion(episode: Episode, content: str, about: dict, seconds: float) -> dict:
    """A finished answer, with the episode beside it."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish(episode)}
    counts = len(episode.mask) - sum(episode.mask), sum(episode.mask)
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = dict(zip(names, (*counts, sum(counts))))
    told = as_json(episode, seconds) | {"video": "upload"}
    kind = {"object": "chat.completion", "choices": [choice], "usage": usage, "nanosport": told}
    return about | kind


def finish(episode: Episode) -> str:
    return "stop" if episode.status == "answered" else "length"


async def streamed(first, events: AsyncIterator, about: dict, shows: bool) -> AsyncIterator[str]:
    """Server-sent events: pieces of the content, and beside them turns as they end."""

    def line(content: str = "", finish_reason: str | None = None, role: str = "", **beside) -> str:
        delta = ({"role": role} if role else {}) | ({"content": content} if content else {})
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = about | {"object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {json.dumps(chunk | ({'nanosport': beside} if beside else {}))}\n\n"

    try:
        yield line(role="assistant", **first)
        async for kind, value in events:
            if kind == "text":
                yield line(value)
            elif kind == "turn":
                yield line("\n" if shows else "", turn=turn_json(value))
            elif kind == "error":
                yield f"data: {json.dumps({'error': {'code': value[0], 'message': value[1]}})}\n\n"
            elif kind == "end":
                answer = {"answer": value.answer, "status": value.status}
                yield line("" if shows else value.answer or "", finish(value), **answer)
        yield "data: [DONE]\n\n"
    finally:
        await events.aclose()


async def answering(
    server: Server, request: Request, name: str, text: str, came_along: bool, is_watched: bool
) -> AsyncIterator:
    """Yield what the page must know of the video, then what the desk tells of the question. However
    it ends, the desk goes on to others, and a video that came along is removed.

    Raises Refused before the first event; later troubles are events: ("error", (status, why)).
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def tell(*event) -> None:
        with suppress(RuntimeError):  # the server has gone meanwhile
            loop.call_soon_threadsafe(events.put_nowait, event)

    job, until = None, loop.time() + server.timeout_s
    try:
        with server.uploads.reading(name) as path:
            desk, question = server.desk, question_of(path, text)
            job = Job(question, tell, is_watched)
            try:
                prompt = (question, desk.encoder, desk.sampler.tokenizer, [desk.limits])
                await asyncio.to_thread(check_prompt, *prompt)
                desk.put(job)
            except Full:
                raise Refused(503, "too many questions wait already; ask again later") from None
            except ValueError as error:
                raise Refused(400, said_of(error, name)) from None
            video = desk.encoder.open(question.clip)
            overview = video.sample(desk.limits.num_frames)
            yield {"num_frames": video.num_frames, "frames": overview}
            kind = ""
            while kind not in ("end", "error"):
                left = until - loop.time()
                if left <= 0:
                    yield "error", (408, f"no answer within {server.timeout_s:g} s")
                    return
                with suppress(TimeoutError):
                    kind, value = await asyncio.wait_for(events.get(), min(1.0, left))
                    value = (500, said_of(ValueError(value), name)) if kind == "error" else value
                    yield kind, value
                if await request.is_disconnected():
                    return
    finally:
        if job:
            job.given_up = True
        if came_along:
            server.uploads.drop(name)
