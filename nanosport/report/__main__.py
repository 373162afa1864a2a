"""A run as a page: its curves, then its episodes with the frames that they looked at.

    python -m nanosport.report out/rl             # → out/rl/page/index.html
    python -m nanosport.report out/rl --watch     # again after every step, until Ctrl-C

The page is a folder of its own: it loads nothing from elsewhere, and needs no server. What it shows
of episodes is what `rl.py` has kept of them (--keep-rollouts).
"""

import base64
import hashlib
import html
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated

import tyro
from tqdm import tqdm

from nanosport import cli
from nanosport.fields import Above, AtLeast, read_json
from nanosport.files import replacing, write_atomically
from nanosport.image import encode_jpeg
from nanosport.records import Clip, Question, parse_question, read_lines
from nanosport.report import small
from nanosport.video import Video

PARTS = Path(__file__).parent
KINDS = (
    "right without the tool", "right with the tool", "wrong without the tool", "wrong window",
    "wrong on the right frames", "wrong with the tool", "format",
)  # fmt: skip
"""How an episode can end. `wrong with the tool` is of a question whose event is not known."""
EPISODE = ("status", "answer", "reward", "advantage")
"""What the page shows of an episode as it was kept."""


@dataclass(frozen=True)
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run of rl.py or train.py."""
    out: Path | None = None
    """The page's folder. None: `run`/page."""
    episodes: Annotated[int, AtLeast(1)] = 2000
    """The newest so many episodes are shown."""
    watch: bool = False
    """Make the page again when the run has done a step. An open page then follows it."""
    every_s: Annotated[float, Above(0)] = 20.0
    """With --watch: look so often."""


def kind_of(row: dict, window: tuple[int, int] | None) -> str:
    """Which of KINDS a kept episode is. window: the event, where it is known."""
    reward = row["reward"]
    if not reward["format"]:
        return "format"
    side = "right" if reward["accuracy"] >= 0.5 else "wrong"
    if not reward["used_tool"]:
        return f"{side} without the tool"
    if side == "right" or window is None:
        return f"{side} with the tool"
    looked = [turn["window"] for turn in row["turns"] if turn["frames"]]
    is_hit = any(start <= window[0] and window[1] <= end for start, end in looked)
    return "wrong on the right frames" if is_hit else "wrong window"


def kept_groups(run: Path, most: int) -> list[tuple[int, Question, list[dict]]]:
    """(step, question, episodes) of the newest groups that a run has kept, the oldest first: as
    many as hold `most` episodes."""
    groups, num = [], 0
    for path in sorted(run.glob("rollouts/step_*.jsonl"), reverse=True):
        step = int(path.stem.removeprefix("step_"))
        for _, (question, episodes) in reversed([*read_lines(path, "a kept group", parse_group)]):
            if num >= most:
                return groups[::-1]
            groups.append((step, question, episodes))
            num += len(episodes)
    return groups[::-1]


def parse_group(row: dict) -> tuple[Question, list[dict]]:
    for one in row["episodes"]:
        [one[name] for name in (*EPISODE, "frames", "turns")]
    return parse_question(row["question"]), row["episodes"]


def log_rows(path: Path) -> list[dict]:
    """The lines of a log; what a run at work has only half written is left for the next look."""
    lines = path.read_text("utf-8", errors="replace").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: a line is damaged ({error}); --resume mends it") from None


class Frames:
    """The small pictures of a page: one file for each frame of a clip, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clips: dict[Clip, tuple[str, Video]] = {}

    def of(self, clip: Clip, indices: set[int]) -> dict:
        """What the page knows of a clip, whose frames at `indices` it may show; or its error."""
        try:
            name, video = self.clips.setdefault(clip, self.clips.get(clip) or self._open(clip))
            paths = {i: self.folder / f"{name}_{i}.jpg" for i in sorted(indices)}
            missing = [i for i, path in paths.items() if not path.exists()]
            for i, frame_CHW in zip(missing, small(video.frames(missing))):
                with replacing(paths[i]) as new:
                    new.write_bytes(encode_jpeg(frame_CHW))
        except ValueError as error:  # the video has gone, or is not what it was
            return {"error": str(error)}
        return {"name": name, "num_frames": video.num_frames}

    def keep(self, clips: Iterable[Clip]) -> None:
        """Forget the clips that are not among these, and drop their pictures."""
        self.clips = {clip: self.clips[clip] for clip in clips if clip in self.clips}
        names = {name for name, _ in self.clips.values()}
        for path in self.folder.glob("*.jpg"):
            if path.name.partition("_")[0] not in names:
                path.unlink(missing_ok=True)

    def _open(self, clip: Clip) -> tuple[str, Video]:
        """Another file under an old name has another name for its frames."""
        video, about = Video(clip.video, span_s=clip.span_s), Path(clip.video).stat()
        key = f"{clip} {about.st_size} {about.st_mtime_ns}".encode(errors="replace")
        return hashlib.sha256(key).hexdigest()[:16], video


def shown_groups(kept: Sequence[tuple], frames: Frames) -> Iterator[tuple[dict, list]]:
    """(what the page shows of a group, by member and turn its tokens with their log-probs)."""
    for step, question, rows in tqdm(kept, desc="page", unit="group", disable=not kept):
        seen = {i for row in rows for i in row["frames"]}
        episodes = []
        for row in rows:
            called = sum(len(turn["frames"]) for turn in row["turns"])
            names = ("text", "window", "frames", "error")
            episodes.append(
                {name: row[name] for name in EPISODE}
                | {"kind": kind_of(row, question.window)}
                | {"overview": row["frames"][: len(row["frames"]) - called]}
                | {"turns": [{name: turn[name] for name in names} for turn in row["turns"]]}
            )
        fields = ("id", "question", "options", "answer", "window")
        group = {name: getattr(question, name) for name in fields}
        group |= {"step": step, "video": Path(question.video).name, "episodes": episodes}
        group["clip"] = frames.of(question.clip, seen)
        yield group, [[(t["tokens"], t["logp"]) for t in row["turns"]] for row in rows]


def as_json(value) -> str:
    """JSON as it may stand in a <script>: it can neither end that nor begin a comment."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def page_of(run: Path, groups: Sequence[tuple[dict, list]], live_s: float | None = None) -> str:
    """The page as one text; its frames lie beside it. live_s: it loads itself again so often."""
    about = read_json(run / "run.json")
    told = [about.get(name) for name in ("command", "commit", "device", "date")]
    shown = {
        "about": " · ".join(str(value) for value in told if value),
        "log": log_rows(run / "metrics.jsonl"),
        "kinds": KINDS,
        "groups": [group for group, _ in groups],
        "live_s": live_s,
    }
    tokens = "\n".join(
        f'<script type="application/json" id="tokens-{g}">{as_json(its)}</script>'
        for g, (_, its) in enumerate(groups)
    )
    style, script = ((PARTS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    mine = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("style", style), ("script", script))
    }
    policy = "; ".join(f"{name}-src 'sha256-{digest}'" for name, digest in mine.items())
    return Template((PARTS / "page.html").read_text("utf-8")).substitute(
        policy=f"default-src 'none'; img-src 'self' file:; {policy}",
        title=html.escape(str(run).encode(errors="replace").decode()),
        style=style,
        script=script,
        run=as_json(shown),
        tokens=tokens,
    )


def main(cfg: Config) -> None:
    cli.check(cfg)
    log, out = cfg.run / "metrics.jsonl", cfg.out or cfg.run / "page"
    if not (cfg.run.is_dir() if cfg.watch else log.is_file()):
        raise ValueError(f"{cfg.run}: no metrics.jsonl there; give the folder of a run")
    (out / "frames").mkdir(parents=True, exist_ok=True)
    frames, before = Frames(out / "frames"), None
    while True:
        now = log.stat().st_mtime_ns if log.is_file() else None
        if now != before:
            kept = kept_groups(cfg.run, cfg.episodes)
            groups = list(shown_groups(kept, frames))
            live_s = cfg.every_s if cfg.watch else None
            write_atomically(out / "index.html", page_of(cfg.run, groups, live_s))
            frames.keep(question.clip for _, question, _ in kept)
            episodes = sum(len(group["episodes"]) for group, _ in groups)
            print(f"{episodes} episodes: {out / 'index.html'}", flush=True)
            before = now
        if not cfg.watch:
            return
        time.sleep(cfg.every_s)


if __name__ == "__main__":
    cli.run(main, Config)
