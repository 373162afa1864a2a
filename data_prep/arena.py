"""The arena: short clips of made-up matches as real H.264 files, with questions whose answers are
known.

    python -m data_prep.arena               # → out/arena: clips, sft.jsonl, rl.jsonl, test.jsonl
    python -m data_prep.arena --rl-clips 500 --seed 1

A clip shows one passage of play. At some moment the director cuts for four frames to the scorer,
and then the score changes. Eight overview frames show *that* and roughly *when* the score changed;
who scored, how, in what balance and with which card only the close-up shows, and it lies between
two overview frames. Some questions need it, some do not. The three sets share no clip and no seed;
the test set also has venue layouts that the others never show.
"""

import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from data_prep import draw
from nanosport import cli
from nanosport.fields import AtLeast, AtMost
from nanosport.files import replacing, write_atomically, writing
from nanosport.image import encode_png
from nanosport.records import LETTERS, Question

FPS = 12
EVENT_FRAMES = 4
SHOTS = {  # ball struck high, at the middle, low
    "soccer": ("header", "volley", "tap-in"),
    "volleyball": ("spike", "push", "dig"),
    "badminton": ("smash", "drive", "lift"),
    "table tennis": ("loop", "block", "chop"),
}
BALANCE = {-1: "leans left", 0: "upright", 1: "leans right"}
SANCTION = {"none": "no sanction", "yellow": "a warning", "red": "sent off"}
PLAYERS = {"soccer": 5, "volleyball": 4, "badminton": 2, "table tennis": 1}
TRAIN_LAYOUTS, TEST_LAYOUTS = range(0, 24), range(24, 32)


@dataclass(frozen=True)
class Plan:
    """Everything that happens in one clip."""

    sport: str
    layout: int
    kits: tuple[str, str]
    """Left team, right team."""
    deep: tuple[bool, bool]
    """Whether each team stands back at its end, or up at the middle: variety for the eye, no
    question asks for it."""
    num_frames: int
    score: tuple[int, int]
    """Before the decisive play."""
    scorer: int
    """0 left, 1 right."""
    number: int
    shot: int
    lean: int
    card: str
    start: int
    """First frame of the close-up; it lasts EVENT_FRAMES, then the score changes."""
    motion: int
    """Seed of the players' running."""

    @property
    def end(self) -> int:
        return self.start + EVENT_FRAMES - 1

    def in_event(self, frame: int) -> bool:
        return self.start <= frame <= self.end

    def score_at(self, frame: int) -> tuple[int, int]:
        left, right = self.score
        scored = frame > self.end
        return left + (scored and self.scorer == 0), right + (scored and self.scorer == 1)


def make_plan(rng: np.random.Generator, layouts: range) -> Plan:
    """A random clip. The close-up lies strictly inside one of the seven gaps between eight uniform
    frames."""
    num_frames = int(rng.integers(144, 193))
    overview = np.round(np.linspace(0, num_frames - 1, 8)).astype(int)
    gap = int(rng.integers(7))
    kits = rng.permutation(list(draw.KITS))[:2]
    sport = str(rng.choice(list(SHOTS)))
    return Plan(
        sport=sport,
        layout=int(rng.choice(layouts)),
        kits=(str(kits[0]), str(kits[1])),
        deep=(bool(rng.integers(2)), bool(rng.integers(2))),
        num_frames=num_frames,
        score=(int(rng.integers(4)), int(rng.integers(4))),
        scorer=int(rng.integers(2)),
        number=int(rng.integers(1, 10)),
        shot=int(rng.integers(3)),
        lean=int(rng.integers(-1, 2)),
        card=str(rng.choice(list(SANCTION))),
        start=int(rng.integers(overview[gap] + 2, overview[gap + 1] - EVENT_FRAMES - 1)),
        motion=int(rng.integers(1 << 30)),
    )


def render(plan: Plan, frame: int) -> np.ndarray:
    """One frame of the clip → uint8 (HEIGHT, WIDTH, 3)."""
    canvas = draw.court(plan.sport, plan.layout).copy()
    if plan.in_event(frame):
        kit, phase = plan.kits[plan.scorer], frame * 1.3 + plan.motion % 7
        draw.closeup(canvas, plan.sport, kit, plan.number, plan.shot, plan.lean, plan.card, phase)
    else:
        _wide_shot(canvas, plan, frame)
    draw.scoreboard(canvas, plan.kits, plan.score_at(frame))
    return canvas


def _wide_shot(canvas: np.ndarray, plan: Plan, frame: int) -> None:
    rng = np.random.default_rng(plan.motion)
    count, t = PLAYERS[plan.sport], frame / FPS
    figures = []
    for team in (0, 1):
        depth = 0.10 if plan.deep[team] else 0.30
        for k in range(count):
            phase, speed = rng.uniform(0, 6.3, 2), rng.uniform(0.8, 1.6, 2)
            u = depth + 0.05 * (k % 2) + 0.03 * math.sin(speed[0] * t + phase[0])
            v = (k + 0.75) / (count + 0.5) + 0.07 * math.sin(speed[1] * t + phase[1])
            figures.append((v, u if team == 0 else 1 - u, plan.kits[team], 5 * t + phase[0]))
    for v, u, kit, stride in sorted(figures):
        draw.player(canvas, u, v, kit, stride)
    # the rally: the ball flies from side to side, and before the close-up towards the scorer's
    # target
    rally = 0.5 + 0.32 * math.sin(2.1 * t + rng.uniform(0, 6.3))
    if 0 <= plan.start - frame < 6:
        rally += (0.9 - 0.8 * plan.scorer - rally) * (6 - plan.start + frame) / 6
    x, y = draw.project(rally, 0.5 + 0.2 * math.sin(1.3 * t))
    draw.ball(canvas, x, y - 26 * abs(math.sin(4.2 * t)), 8, plan.sport)


def describe(plan: Plan, frame: int) -> str:
    """What one frame shows, in the few words that matter: the score, or the close-up. The card has
    words of its own: in those of the kits, red and yellow, the backbone never learnt to say its
    colour."""
    if not plan.in_event(frame):
        return "{}-{}".format(*plan.score_at(frame))
    shot = SHOTS[plan.sport][plan.shot]
    who, card = f"{plan.kits[plan.scorer]} {plan.number}", SANCTION[plan.card]
    return f"{who}, {shot}, {BALANCE[plan.lean]}, {card}"


def scene(plan: Plan) -> str:
    """What every wide frame shows: the sport and the two teams."""
    return f"{plan.sport}, {plan.kits[0]} left, {plan.kits[1]} right"


def closeup_questions(plan: Plan, rng: np.random.Generator) -> dict[str, list[tuple]]:
    """By dimension, the questions that only the close-up answers: (text, answer, wrong options or
    None for an open question)."""
    shots, kit = SHOTS[plan.sport], plan.kits[plan.scorer]
    shot, number, lean, card = shots[plan.shot], plan.number, BALANCE[plan.lean], plan.card
    others = [int(n) for n in rng.permutation([n for n in range(1, 10) if n != number])[:3]]
    wrong_calls = [
        f"{kit} {others[0]} {shot}",
        f"{kit} {number} {shots[(plan.shot + 1) % 3]}",
        f"{kit} {others[0]} {shots[(plan.shot + 2) % 3]}",
    ]
    call, who = "Call the decisive play.", "Which shirt number scored?"
    balance = "How is the balance of the scorer?"
    rule, imposed = "What do the rules impose on the scorer?", SANCTION[card]
    return {
        "recognition": [
            (who, str(number), [str(n) for n in others]),
            ("How was the point scored?", shot, without(shots, shot)),
            (who, str(number), None),
        ],
        "rules": [
            (rule, imposed, without(SANCTION.values(), imposed)),
            ("Which card did the official show?", card, None),
        ],
        "assessment": [
            (balance, lean, without(BALANCE.values(), lean)),
            (balance, lean, None),
        ],
        "commentary": [
            (call, f"{kit} {number} {shot}", wrong_calls),
            (call, f"{kit} {number} {shot}", None),
        ],
    }


def overview_questions(plan: Plan) -> dict[str, tuple]:
    """By dimension, the question that the overview answers."""
    (left, right), (first, second) = plan.kits, plan.score_at(plan.num_frames)
    leader, loser = (left, right) if first > second else (right, left)
    if first == second:
        leader, loser = "level", "neither"
    score, trails = f"{left} {first} {right} {second}", "Which team must score more?"
    return {
        "recognition": ("Which sport is this?", plan.sport, without(SHOTS, plan.sport)),
        "rules": ("Who leads at the end?", leader, without((left, right, "level"), leader)),
        "assessment": (trails, loser, without((left, right, "neither"), loser)),
        "commentary": ("Give the final score.", score, None),
    }


def without(options: Iterable[str], answer: str) -> list[str]:
    """The wrong options."""
    return [option for option in options if option != answer]


def make_questions(plan: Plan, rng: np.random.Generator, clip: str, video: str) -> list[Question]:
    """Six questions: one in each dimension that needs the close-up, and two that the overview
    answers."""
    closeup, overview = closeup_questions(plan, rng), overview_questions(plan)
    drawn = [(d, kinds[int(rng.integers(len(kinds)))], True) for d, kinds in closeup.items()]
    drawn += [(str(d), overview[d], False) for d in rng.permutation(list(overview))[:2]]
    questions = []
    for k, (dimension, (text, answer, wrong), needs_tool) in enumerate(drawn):
        options = () if wrong is None else tuple(str(o) for o in rng.permutation([answer, *wrong]))
        letter = LETTERS[options.index(answer)] if options else answer
        asked = (plan.sport, dimension, text, options, letter, needs_tool, (plan.start, plan.end))
        questions.append(Question(f"{clip}-{k}", video, *asked))
    return questions


def write_video(path: Path, frames, fps: int = FPS) -> None:
    """uint8 (H, W, 3) frames → an H.264 mp4 with a key frame every two seconds."""
    import av  # not before it is needed: a benchmark's machine may have none

    with av.open(str(path), "w") as container:
        # one thread and plain SIMD: with x264's own choice the same frames now and then gave other
        # bytes
        exact = {"x264-params": "threads=1:lookahead-threads=1:asm=sse4.2"}
        options = {"crf": "24", "preset": "superfast", "g": str(2 * fps), **exact}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height = draw.WIDTH, draw.HEIGHT
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def clip_rng(seed: int, split: str, number: int) -> np.random.Generator:
    """Each clip's own stream, so that more clips leave the first ones as they are."""
    return np.random.default_rng([seed, ("sft", "rl", "test", "pretrain").index(split), number])


def _make_clip(job: tuple[Path, str, int, int]) -> tuple[Plan, list[Question]]:
    folder, split, seed, number = job
    rng = clip_rng(seed, split, number)
    plan = make_plan(rng, TEST_LAYOUTS if split == "test" else TRAIN_LAYOUTS)
    name = f"{split}_{number:05d}"
    with replacing(folder / "clips" / f"{name}.mp4") as path:
        write_video(path, (render(plan, t) for t in range(plan.num_frames)))
    return plan, make_questions(plan, rng, name, f"clips/{name}.mp4")


@dataclass(frozen=True)
class Config:
    out: Path = Path("out/arena")
    """Folder to write."""
    sft_clips: Annotated[int, AtLeast(1)] = 240
    """Clips for teacher trajectories, six questions each."""
    rl_clips: Annotated[int, AtLeast(1)] = 120
    """Clips for reinforcement learning."""
    test_clips: Annotated[int, AtLeast(1)] = 50
    """Held-out clips."""
    seed: Annotated[int, AtLeast(0)] = 0
    workers: Annotated[int, AtLeast(1), AtMost(1024)] = 2
    """Rendering processes."""


def main(cfg: Config) -> None:
    cli.check(cfg)
    began = time.time()
    (cfg.out / "clips").mkdir(parents=True, exist_ok=True)
    counts = {"sft": cfg.sft_clips, "rl": cfg.rl_clips, "test": cfg.test_clips}
    jobs = [(cfg.out, split, cfg.seed, k) for split in counts for k in range(counts[split])]
    with ProcessPoolExecutor(cfg.workers) as pool:
        clips = pool.map(_make_clip, jobs, chunksize=4)
        made = list(tqdm(clips, "render clips", len(jobs), unit="clip"))
    for split in counts:
        rows = [m for m, job in zip(made, jobs) if job[1] == split]
        with (
            writing(cfg.out / f"{split}.jsonl") as questions,
            writing(cfg.out / f"{split}_plans.jsonl") as plans,
        ):
            for plan, asked in rows:
                plans.write(json.dumps({"video": asked[0].video, **asdict(plan)}) + "\n")
                questions.writelines(json.dumps(asdict(q)) + "\n" for q in asked)
    with replacing(cfg.out / "contact_sheet.png") as path:
        path.write_bytes(encode_png(contact_sheet([m[0] for m in made[:6]])))
    report = {"clips": len(jobs), "seed": cfg.seed, "seconds": round(time.time() - began, 1)}
    write_atomically(cfg.out / "arena.json", json.dumps(report) + "\n")
    print(f"{len(jobs)} clips, {sum(len(m[1]) for m in made)} questions in {cfg.out}")


def contact_sheet(plans: list[Plan]) -> np.ndarray:
    """One row a clip: four overview frames, with the close-up where it belongs."""
    rows = []
    for plan in plans:
        frames = sorted({0, plan.start - 3, plan.start + 1, plan.end + 3, plan.num_frames - 1})
        rows.append(np.concatenate([render(plan, t) for t in frames], axis=1))
    width = max(r.shape[1] for r in rows)
    return np.concatenate([np.pad(r, ((0, 4), (0, width - r.shape[1]), (0, 0))) for r in rows])


if __name__ == "__main__":
    cli.run(main, Config)
