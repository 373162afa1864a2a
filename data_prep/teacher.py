"""A scripted teacher for the arena: writes tool trajectories with stated error rates, as a real
teacher would.

    python -m data_prep.teacher                 # out/arena/sft.jsonl → out/arena/trajectories.jsonl

It knows each clip's plan. With probability `wrong_window` it misreads a score, so that the change
seems to come a frame early or late: it asks for the interval beside the right one, sees nothing,
and then answers by guessing or (with probability `retry`) asks again; with probability `guess` it
answers without looking; with probability `needless` it calls the tool where the overview was
enough. One line a trajectory: {"question": {…}, "messages": ["assistant turn", …]}, the form that
distillation from a real teacher has.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from data_prep.arena import BALANCE, SANCTION, SHOTS, Plan, describe, scene
from nanosport import cli
from nanosport.env.tools import tool_call
from nanosport.fields import AtLeast, Share
from nanosport.files import write_atomically
from nanosport.records import Question, read_lines, read_questions
from nanosport.video import Video

NUM_FRAMES = 8
NOTHING = "no frame shows the play."


def listing(plan: Plan, shown) -> str:
    """What each frame shows."""
    return ", ".join(f"{t} {describe(plan, t)}" for t in shown)


def change(plan: Plan, shown) -> int:
    """Position k of the gap shown[k] … shown[k+1] in which the score changes."""
    return max(k for k, t in enumerate(shown[:-1]) if t <= plan.end)


def notice(plan: Plan, shown, k: int) -> str:
    """The reasoning that grounds a window: frame after frame, until one shows another score than
    the one before it."""
    seen = listing(plan, shown[: k + 2])
    return f"{seen}. the score changes between {shown[k]} and {shown[k + 1]}."


def truth(question: Question) -> str:
    """The answer in words: the text of the right option, or the reference."""
    return question.options["ABCD".index(question.answer)] if question.options else question.answer


def evidence(plan: Plan, question: Question, shown) -> str:
    """What the frames say about the question, and what follows from it."""
    if not question.needs_tool:
        return f"{scene(plan)}, {describe(plan, shown[-1])} at the end. so {truth(question)}."
    seen = next((t for t in shown if plan.in_event(t)), None)
    if seen is None:
        return NOTHING
    return f"frame {seen} shows {describe(plan, seen)}. so {truth(question)}."


def guess(plan: Plan, question: Question, rng: np.random.Generator) -> str:
    """An answer of the right form, by chance."""
    if question.options:
        return str(rng.choice(question.options))
    if question.dimension == "recognition":
        return str(rng.integers(1, 10))
    if question.dimension == "rules":
        return str(rng.choice(list(SANCTION)))
    if question.dimension == "assessment":
        return str(rng.choice(list(BALANCE.values())))
    kit, number = plan.kits[int(rng.integers(2))], rng.integers(1, 10)
    return f"{kit} {number} {rng.choice(SHOTS[plan.sport])}"


def answer_turn(think: str, answer: str) -> str:
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


def tool_turn(think: str, start: int, end: int) -> str:
    return f"<think>{think}</think>\n{tool_call(start, end)}"


@dataclass(frozen=True)
class Config:
    data: Path = Path("out/arena")
    """Folder with sft.jsonl and sft_plans.jsonl."""
    wrong_window: Share = 0.1
    """Share of the questions that need the tool where it misreads a score and asks for a
    neighbouring interval first."""
    retry: Share = 0.2
    """Share of those where it then asks for the right one."""
    guess: Share = 0.5
    """Share of the questions that need the tool which it answers without looking."""
    needless: Share = 0.2
    """Share of the other questions where it calls the tool all the same."""
    draws: Annotated[int, AtLeast(1)] = 4
    """Trajectories a question: of one alone, a student learns the slips by heart."""
    seed: Annotated[int, AtLeast(0)] = 0


def trajectory(
    plan: Plan, question: Question, video: Video, cfg: Config, rng: np.random.Generator
) -> list[str]:
    """The assistant turns for one question."""
    shown = video.sample(NUM_FRAMES)
    gaps = list(zip(shown, shown[1:]))
    if not question.needs_tool:
        final = answer_turn(evidence(plan, question, shown), truth(question))
        if rng.random() >= cfg.needless:
            return [final]
        return [tool_turn("i look at more frames.", *gaps[int(rng.integers(len(gaps)))]), final]

    if rng.random() < cfg.guess:
        return [answer_turn(NOTHING, guess(plan, question, rng))]
    right = change(plan, shown)
    turns, first = [], right
    if rng.random() < cfg.wrong_window / (1 - cfg.guess):
        beside = [k for k in (right - 1, right + 1) if 0 <= k < len(gaps)]
        first = beside[int(rng.integers(len(beside)))]
        # the score as it would stand, had it changed in that gap
        misread = replace(plan, start=shown[first] + 2)
        turns.append(tool_turn(notice(misread, shown, first), *gaps[first]))
        if rng.random() >= cfg.retry:
            return [*turns, answer_turn(NOTHING, guess(plan, question, rng))]
        think = "{} i look between {} and {}.".format(NOTHING, *gaps[right])
        turns.append(tool_turn(think, *gaps[right]))
    else:
        turns.append(tool_turn(notice(plan, shown, right), *gaps[right]))
    seen = video.sample(NUM_FRAMES, *gaps[right])
    return [*turns, answer_turn(evidence(plan, question, seen), truth(question))]


def read_plans(path: Path) -> dict[str, Plan]:
    """Plans by the clip's path, as the arena wrote them."""

    def parse(row: dict) -> tuple[str, Plan]:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        return fields.pop("video"), Plan(**fields)

    return dict(plan for _, plan in read_lines(path, "a plan", parse))


def main(cfg: Config) -> None:
    cli.check(cfg)
    if cfg.wrong_window + cfg.guess > 1:
        raise ValueError("--wrong-window and --guess together must not pass 1")
    out, read = cfg.data / "trajectories.jsonl", cfg.data / "sft.jsonl"
    cli.not_the_input(out, read, flag="--data")
    plans = read_plans(cfg.data / "sft_plans.jsonl")
    rng = np.random.default_rng([cfg.seed, 5])
    lines, opened = [], {}
    for question in tqdm(read_questions(read) * cfg.draws, desc="teacher", unit="trajectory"):
        key = str(Path(question.video).relative_to(cfg.data))
        if key not in opened:
            opened[key] = Video(question.video)
        messages = trajectory(plans[key], question, opened[key], cfg, rng)
        row = {"question": asdict(question) | {"video": key}, "messages": messages}
        lines.append(json.dumps(row))
    write_atomically(out, "\n".join(lines) + "\n")
    print(f"{len(lines)} trajectories in {out}")


if __name__ == "__main__":
    cli.run(main, Config)
