"""Held-out questions, on which a run is measured as it trains: before its first step, every
`--eval-every` steps, and after the last one.

RUN/heldout.jsonl has a line for each time, with eval.py's figures. RUN/best is the model of the
best one, of equals the first.
"""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nanosport.engine.own import OwnSampler
from nanosport.engine.sampler import Sampler, Sampling
from nanosport.env.env import Limits
from nanosport.env.figures import figures
from nanosport.env.judge import Judge, graded
from nanosport.env.tools import STOPS
from nanosport.files import checksum, write_atomically
from nanosport.model.folder import load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode, read_lines, read_records
from nanosport.train import dist
from nanosport.train.inputs import Records
from nanosport.train.training import Training

BATCH = 32
"""So many questions are played at a time."""
TEMPERATURE, TOP_P = 0.6, 0.9
"""As eval.py's; RL plays as it samples."""


class HeldOut:
    """The questions, who plays them, and how the run has done on them until now."""

    def __init__(
        self,
        training: Training,
        trained: Records,
        sampler: Sampler,
        encoder: FrameEncoder,
        limits: Limits,
        judge: Judge | None = None,
        refresh: Callable[[int], None] | None = None,
    ):
        """trained: what the run learns from. refresh: gives the sampler the weights of a step; None
        where they are there. Raises ValueError where a video is in both."""
        cfg = training.cfg
        self.training, self.sampler = training, sampler
        self.limits, self.judge, self.refresh = limits, judge, refresh
        rows = read_records(cfg.eval_data)
        learnt = {Path(question.video).resolve() for question in trained.questions}
        if both := [q.id for q, _ in rows if Path(q.video).resolve() in learnt]:
            what = f"the video of {both[0]} is trained on (so of {len(both)} questions)"
            raise ValueError(f"--eval-data {cfg.eval_data}: {what}; python -m data_prep.split")
        self.records = Records(cfg.eval_data, rows, encoder)
        how = (cfg.max_unusable, training.rank, training.stage)
        self.records.check_prompts(sampler.tokenizer, [limits], *how)
        self.path, self.best = cfg.out / "heldout.jsonl", cfg.out / "best"
        first = training.state["step"]
        before = read_lines(self.path, "an evaluation") if self.path.exists() else ()
        again = first if first % cfg.eval_every == 0 or first == cfg.steps else first + 1
        self.history = [row for _, row in before if row["step"] < again]
        """What a run that goes on measures again is left out."""
        self.data_crc32 = checksum(cfg.eval_data)

    def evaluate(self, step: int) -> bool:
        """Measure the model that has done `step` steps, where it is time to. Returns whether the
        run is to end, since --patience is at its end. All ranks must call this."""
        cfg = self.training.cfg
        if step % cfg.eval_every and step < cfg.steps:
            return False
        self.training.save(step)  # a preemption during the evaluation then costs nothing
        row = self._measure(step)
        # other questions say nothing about which model is better
        alike = [one for one in self.history if one.get("eval_data_crc32") == self.data_crc32]
        is_best = not alike or row["accuracy"] > max(one["accuracy"] for one in alike)
        row = {"step": step, "best": is_best, "eval_data_crc32": self.data_crc32, **row}
        self.history.append(row)
        self.training.checkpoints.finish()
        dist.once(partial(self._write, step, is_best))
        since = [one["best"] for one in reversed([*alike, row])].index(True)
        return 0 < cfg.patience <= since

    def _measure(self, step: int) -> dict:
        """The figures of this step's model."""
        training, mine = self.training, dist.share(range(len(self.records)), self.training.rank)
        counters = self.sampler.counts, self.records.encoder.counts
        before = [Counter(counter) for counter in counters]
        if self.refresh is not None:
            self.refresh(step)
        episodes: list[Episode] = []
        for start in range(0, len(mine), BATCH):
            with training.stage("held out"), training.serving(None):
                places = mine[start : start + BATCH]
                how = {"seed": (training.cfg.seed,), "numbers": places}
                episodes += self.records.play(places, self.sampler, self.limits, **how)
            if training.preemption.asked:
                break
        for counter, its in zip(counters, before):  # what is counted here is not the step's work
            counter.clear()
            counter.update(its)
        if self.refresh is not None:  # else the run's rollouts come next
            self.sampler.sleep()
        scored: list[tuple] = []
        with training.stage("judge"), training.serving(self.judge):
            scored = list(zip(episodes, *graded(episodes, self.judge)))
        scored, _ = dist.gather_items(scored)
        if training.preempted():
            training.stop_inside(step)
        episodes, scores, grades = map(list, zip(*scored))
        training.show(step, "held_out", episodes, scores)
        more = {} if self.judge is None else {"ungraded": grades.count(None)}
        return figures(episodes, scores) | more

    def _write(self, step: int, is_best: bool) -> None:
        """Write down the last evaluation, and keep its model if it is the best."""
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomically(self.path, text)
        row = self.history[-1]
        if is_best:  # of its checkpoint: RUN/model is a later step's after a kill
            checkpoints, model = self.training.checkpoints, self.training.model
            checkpoints.write_model(model, checkpoints.folder / f"step_{step:06d}", self.best)
        bounds = row["intervals"].get("accuracy")
        said = f"step {step}: held out: {row['accuracy']:.1f}"
        said += " [{:.1f}, {:.1f}]".format(*bounds) if bounds else ""
        tqdm.write(said + (", the best until now" if is_best else ""))
        self.training.track(step, {k: v for k, v in row.items() if k != "step"}, "held_out/")


def of_sft(training: Training, trained: Records) -> HeldOut:
    """The held-out questions of a run that samples nothing otherwise: our own sampler plays with
    the model itself where it is not sharded, else with a whole copy."""
    cfg, player, weights = training.cfg, training.computing, ()
    if dist.sharded(training.model):
        player, weights = training.whole_copy(), dist.TrainedWeights(training.model, training.dtype)
    sampling = Sampling(TEMPERATURE, TOP_P, cfg.max_new_tokens, STOPS)
    sampler = OwnSampler(player, load_tokenizer(training.source), sampling)
    encoder = FrameEncoder(player, training.image)

    def refresh(step: int) -> None:
        sampler.load_weights(weights, step)
        if not cfg.frozen:
            encoder.forget()

    limits = Limits(max_tokens=cfg.episode_tokens, syntax=cfg.call_syntax)
    return HeldOut(training, trained, sampler, encoder, limits, refresh=refresh)
