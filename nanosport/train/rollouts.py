"""A step's episodes: sampled, scored, gathered from all ranks, and some of them kept."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from nanosport.env.reward import Reward, flat_groups, rewards_of
from nanosport.files import write_atomically
from nanosport.records import Episode, Turn
from nanosport.train import dist
from nanosport.train.actors import Actors, Draw
from nanosport.train.inputs import Records
from nanosport.train.training import Training


@dataclass(frozen=True)
class Rollouts:
    """The episodes of a step, of every rank: question after question, a group's members side by
    side."""

    episodes: list[Episode]
    rewards: list[Reward]
    homes: list[int]
    """The rank that has sampled each episode."""
    replaced: int = 0
    """So many questions stand in for one whose video is lost."""
    work: dict[str, float] = field(default_factory=dict)
    """What this rank's sampler has done."""

    def refilled(self, flat: list[int], more: "Rollouts", size: int) -> "Rollouts":
        """These with the groups of `more` that are not flat in the place of those at `flat`, as far
        as they go."""
        mine, others = (list(zip(r.episodes, r.rewards, r.homes)) for r in (self, more))
        useless = flat_groups(more.rewards, size)
        good = [k for k in range(len(more.rewards) // size) if k not in useless]
        for to, of in zip(flat, good):
            mine[to * size : (to + 1) * size] = others[of * size : (of + 1) * size]
        work = {name: value + more.work[name] for name, value in self.work.items()}
        return Rollouts(*map(list, zip(*mine)), self.replaced + more.replaced, work)


def gathered(training: Training, actors: Actors, records: Records, draw: Draw) -> Rollouts:
    """Sample and score this rank's episodes of a draw, and gather every rank's.

    Raises Preempted after SIGTERM, ValueError where the judge fails.
    """
    episodes, work = [], {}
    with training.stage("rollout"), training.serving(None):
        episodes, work = actors.rollouts(records, draw)

    rewards: list[Reward] = []
    with training.stage("judge"), training.serving(actors.judge):
        rewards = rewards_of(episodes, actors.judge, actors.reward)
    with training.stage("gather"):  # frames are known by index: an episode is small
        pairs, homes = dist.gather_items(list(zip(episodes, rewards)))
        preempted = training.preempted()
    if preempted:
        training.stop_inside(draw.step)
    episodes, rewards = map(list, zip(*pairs))
    picked = actors.picked(records, draw)
    replaced = records.num_replaced(picked, episodes[:: training.cfg.group_size])
    return Rollouts(episodes, rewards, homes, replaced, work)


def keep(
    training: Training, actors: Actors, rollouts: Rollouts, advantages: torch.Tensor, step: int
) -> None:
    """Write the step's first groups with their tokens, for the run's page: a JSON line a group."""
    size, most = training.cfg.group_size, training.cfg.keep_rollouts
    if training.run is None or not most:
        return
    num = min(len(rollouts.episodes), -(-most // size) * size)
    sampled = {t for e in rollouts.episodes[:num] for turn in e.turns for t in sampled_ids(e, turn)}
    texts = actors.sampler.tokenizer.batch_decode([[t] for t in sampled])
    pieces, lines = dict(zip(sampled, texts)), []
    for first in range(0, num, size):
        members = range(first, first + size)
        question = rollouts.episodes[first].question
        question = asdict(question) | {"video": str(Path(question.video).absolute())}
        rows = [
            episode_row(rollouts.episodes[k], rollouts.rewards[k], float(advantages[k]), pieces)
            for k in members
        ]
        lines.append(json.dumps({"question": question, "episodes": rows}) + "\n")
    path = training.run.rollouts_of(step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(lines))


def sampled_ids(episode: Episode, turn: Turn) -> Sequence[int]:
    return episode.ids[slice(*turn.tokens)]


def episode_row(episode: Episode, reward: Reward, advantage: float, pieces: dict[int, str]) -> dict:
    """An episode as JSON. Of each turn: its tokens' texts, and their log-probs as sampled.

    pieces: the text of each id.
    """
    turns = []
    for turn in episode.turns:
        logp = [round(value, 4) for value in episode.sampled_logp[slice(*turn.tokens)]]
        tokens = [pieces[t] for t in sampled_ids(episode, turn)]
        turns.append(asdict(turn) | {"tokens": tokens, "logp": logp})
    shown = ("frames", "status", "answer")
    row = {name: getattr(episode, name) for name in shown} | {"turns": turns}
    return row | {"reward": asdict(reward), "advantage": round(advantage, 4)}
