"""The video doctor: opens every clip of a record file as the training would, and keeps the records
whose clip is usable.

    python -m data_prep.check records.jsonl    # → records.clean.jsonl, records.clean.report.jsonl
    python -m data_prep.check records.jsonl --out clean.jsonl --workers 8 --resume

A decoder may hang or crash inside C code, where no exception ends it. So each clip is opened in a
worker process that is killed and replaced when it passes the time-out or dies; only that clip is
then lost. The report beside the clean file gets one line a clip as soon as it is checked: --resume
goes on from there and trusts it. A line holds

    video, span_s       the clip, the path as it stands in the record file
    usable, reason      whether it can be used, and in one line why not
    frames_promised     what the header says of the whole file; null where it says nothing, and for
                        a part of a file
    frames              that are there and decode
    span_outside        whether span_s ends after the video; what is there of it is used
    window_outside      whether a record's window ends after the last of them; such records are kept
    duration_s, fps, width, height, rotation (degrees counter-clockwise; null for stills), backend
    seconds             the check took
"""

import json
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data_prep.paths import moved
from nanosport import cli
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.files import append, mend, writing
from nanosport.image import ImageConfig, check_shape
from nanosport.media import load_decoders
from nanosport.records import Clip, read_lines, stream_records
from nanosport.video import Video

NUM_FRAMES = 8


@dataclass(frozen=True)
class Config:
    records: Annotated[Path, tyro.conf.Positional]
    """Records or trajectories, one JSON object a line."""
    out: Path | None = None
    """The clean file; default: RECORDS with .clean before its suffix."""
    workers: Annotated[int, AtLeast(1), AtMost(1024)] = 2
    """Processes that decode."""
    timeout_s: Annotated[float, Above(0), AtMost(86_400)] = 60.0
    """A clip that takes longer is given up."""
    resume: bool = False
    """Skip the clips that the report already has."""

    @property
    def clean(self) -> Path:
        return self.out or self.records.with_suffix(".clean.jsonl")

    @property
    def report(self) -> Path:
        return self.clean.with_suffix(".report.jsonl")

    @property
    def resumable(self) -> bool:
        """Whether `resume` has a report to go on from."""
        return self.report.exists()


# In a worker.


def examine(path: str, span_s: tuple[float, float] | None, timeout_s: float) -> dict:
    """What the report says of one clip, besides its name."""
    began = time.monotonic()
    try:
        video = Video(path, timeout_s=timeout_s)
        check_shape(video, ImageConfig())
        end_s = video.end_s
        video = video if span_s is None else video.part(span_s)
        video.frames(video.sample(NUM_FRAMES))
        found = {
            "usable": True,
            "frames_promised": video.frames_promised if span_s is None else None,
            "frames": video.num_frames,
            "span_outside": span_s is not None and span_s[1] > end_s + 1 / video.fps,
            "duration_s": round(float(video.times_s[-1]), 3),
            "fps": round(video.fps, 3),
            "width": video.width,
            "height": video.height,
            "rotation": video.rotation,
            "backend": video.backend,
        }
    except Exception as error:  # whatever an untrusted file brings about
        why = str(error).removeprefix(str(Path(path))).lstrip(":/ ") or type(error).__name__
        found = {
            "usable": False,
            "reason": "".join(c if c.isprintable() else "?" for c in " ".join(why.split())),
        }
    return {**found, "seconds": round(time.monotonic() - began, 3)}


def _work(pipe: Connection, timeout_s: float) -> None:
    # Ctrl-C is the parent's, which then ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_decoders()
    pipe.send("ready")
    while True:
        try:
            path, span_s = pipe.recv()
        except EOFError:  # the parent is gone
            return
        pipe.send(examine(path, span_s, timeout_s))


# In the parent.


def start(timeout_s: float) -> tuple[multiprocessing.Process, Connection]:
    """A worker that has imported everything: that time does not count against its first clip."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanosport.cli", "nanosport.video"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, timeout_s), daemon=True)
    process.start()
    theirs.close()
    ours.recv()
    return process, ours


def check_clips(
    clips: Iterable[Clip], folder: Path, workers: int, timeout_s: float
) -> Iterator[tuple[Clip, dict]]:
    """(clip, its line of the report), in the order in which they are done. Relative paths start at
    `folder`."""
    waiting, idle, busy = iter(clips), [], {}
    try:
        while True:
            while len(busy) < workers and (clip := next(waiting, None)) is not None:
                process, pipe = idle.pop() if idle else start(timeout_s)
                busy[pipe] = process, clip, time.monotonic()
                pipe.send((str(folder / clip.video), clip.span_s))
            if not busy:
                return
            oldest = min(began for _, _, began in busy.values())
            ready = wait(list(busy), max(0.0, oldest + timeout_s - time.monotonic()))
            for pipe, (process, clip, began) in list(busy.items()):
                spent = time.monotonic() - began
                if pipe not in ready and spent < timeout_s:
                    continue
                why = (
                    f"not checked within {timeout_s:g} s; raise --timeout-s if the clip is long, "
                    "else its decoder hangs: convert it"
                )
                try:
                    found = pipe.recv() if pipe in ready else None
                except (EOFError, OSError):
                    found = None
                    why = f"its decoder crashed{_signal(process)}; download or convert it anew"
                if found:
                    idle.append((process, pipe))
                else:
                    found = {"usable": False, "reason": why, "seconds": round(spent, 3)}
                    process.kill()
                    # not for ever: one that waits for a dead network disk outlives even this
                    process.join(5)
                del busy[pipe]
                yield clip, {"video": clip.video, "span_s": clip.span_s, **found}
    finally:
        for process in [process for process, *_ in [*idle, *busy.values()]]:
            process.kill()
            process.join(5)


def _signal(process: multiprocessing.Process) -> str:
    process.join(5)
    code = process.exitcode or 0
    return f" ({signal.strsignal(-code)})" if code < 0 else ""


def read_report(path: Path) -> Iterator[tuple[Clip, dict]]:
    """(clip, line) of a report; a last line that a kill cut short is removed from the file."""

    def parse(row: dict) -> tuple[Clip, dict]:
        _ = row["frames"] if row["usable"] else row["reason"]
        return Clip(row["video"], row["span_s"] and tuple(row["span_s"])), row

    mend(path)
    what = "a line of this report (remove the file to check anew)"
    for _, found in read_lines(path, what, parse):
        yield found


def last_windows(records: Path) -> dict[Clip, int]:
    """Every clip of the file, with the last frame that a window on it asks for; -1 where none
    does."""
    last = {}
    for _, _, question in stream_records(records):
        asked = question.window[1] if question.window else -1
        last[question.clip] = max(last.get(question.clip, -1), asked)
    return last


def write_clean(records: Path, out: Path, frames: dict[Clip, int]) -> tuple[int, int, list[str]]:
    """Copy the records whose clip has frames, all at once or not at all → (kept, dropped, ids with
    a window outside the clip).

    Only `video` changes, where the new file lies in another folder; `group`, which defaults to it,
    is then written out.
    """
    kept, dropped, outside = 0, 0, []
    old, new = records.parent.resolve(), out.parent.resolve()
    with writing(out) as file:
        for _, row, question in stream_records(records):
            if question.clip not in frames:
                raise ValueError(
                    f"{records}: has changed during the check; start again with --resume"
                )
            if not (count := frames[question.clip]):
                dropped += 1
                continue
            kept += 1
            if question.window and question.window[1] >= count:
                outside.append(question.id)
            if old != new and not os.path.isabs(question.video):
                fields = row["question"] if "messages" in row else row
                fields |= {"video": moved(question.video, old, new), "group": question.group}
            file.write(json.dumps(row) + "\n")
    return kept, dropped, outside


def write_report(cfg: Config, report: Path, last: dict[Clip, int]) -> None:
    """Check every clip of `last` that the report does not have yet."""
    left = dict.fromkeys(last)
    for clip, _ in read_report(report) if report.exists() else ():
        left.pop(clip, None)
    rows = check_clips(left, cfg.records.parent, cfg.workers, cfg.timeout_s)
    counts = {"initial": len(last) - len(left), "total": len(last)}
    for clip, row in tqdm(rows, desc="check", unit="clip", **counts):
        if row["usable"]:
            row["window_outside"] = last[clip] >= row["frames"]
        append(report, json.dumps(row) + "\n")


def sum_up(report: Path, last: dict[Clip, int]) -> dict[Clip, int]:
    """Print what the report says of the clips of `last`; returns their frames, 0 where a clip is
    unusable."""
    frames, reasons, short, cut = dict.fromkeys(last, 0), Counter(), 0, []
    for clip, row in read_report(report):
        if clip in last and row["usable"]:
            frames[clip] = row["frames"]
            short += row["frames"] < (row["frames_promised"] or 0)
            cut += [str(clip)] if row.get("span_outside") else []
        elif clip in last:
            reasons[re.sub(r"(?<= )\d[\d.x]*", "…", row["reason"])] += 1
    unusable = reasons.total()
    print(
        f"{len(frames)} clips: {len(frames) - unusable} usable, {short} of them with fewer frames "
        f"than promised; {unusable} unusable"
    )
    for reason, count in reasons.most_common(20):
        print(f"{count:8}  {reason}")
    if cut:
        named = ", ".join(cut[:3]) + (", …" if cut[3:] else "")
        print(f"{len(cut)} clips end after their video, and are shorter than they say: {named}")
    return frames


def main(cfg: Config) -> None:
    cli.check(cfg)
    last, out, report = last_windows(cfg.records), cfg.clean, cfg.report
    videos = {cfg.records.parent / clip.video for clip in last}
    cli.not_the_input(out, cfg.records, *videos, beside=report)
    if report.exists() and not cfg.resume:
        raise ValueError(
            f"{report}: is there already; go on with --resume, or remove it to check anew"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(cfg, report, last)
    frames = sum_up(report, last)
    if not any(frames.values()):
        raise ValueError(
            f"{cfg.records}: not one clip is usable, nothing is kept; are its video paths right? "
            f"Reasons in {report}"
        )
    kept, dropped, outside = write_clean(cfg.records, out, frames)
    if outside:
        named = ", ".join(map(repr, outside[:5])) + (", …" if outside[5:] else "")
        print(f"{len(outside)} records kept with a window outside their clip: {named}")
    print(f"{kept} records kept, {dropped} dropped: {out}; clip by clip: {report}")


if __name__ == "__main__":
    cli.run(main, Config)
