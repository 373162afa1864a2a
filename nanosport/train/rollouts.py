"""A step's episodes: sampled, scored, and gathered from all ranks."""

from dataclasses import dataclass, field

from nanosport.env.reward import Reward, flat_groups, rewards_of
from nanosport.records import Episode
from nanosport.train import dist
from nanosport.train.actors import Actors
from nanosport.train.inputs import Records
from nanosport.train.training import Training

REFILLS = ("flat_groups", "refilled")
"""What the log says of groups whose episodes all have one reward."""


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
        episodes, rewards, homes = [*self.episodes], [*self.rewards], [*self.homes]
        useless = flat_groups(more.rewards, size)
        good = [k for k in range(len(more.rewards) // size) if k not in useless]
        for to, of in zip(flat, good):
            there, here = slice(to * size, (to + 1) * size), slice(of * size, (of + 1) * size)
            episodes[there], rewards[there] = more.episodes[here], more.rewards[here]
            homes[there] = more.homes[here]
        work = {name: value + more.work[name] for name, value in self.work.items()}
        return Rollouts(episodes, rewards, homes, self.replaced + more.replaced, work)


def gathered(
    training: Training,
    actors: Actors,
    records: Records,
    step: int,
    again: int = 0,
    num: int | None = None,
) -> Rollouts:
    """Sample and score this rank's episodes of a step, and gather every rank's. again, num: those
    of so many further questions, drawn for the again-th time.

    Raises Preempted after SIGTERM, ValueError where the judge fails.
    """
    cfg, episodes, work = training.cfg, [], {}
    with training.stage("rollout"), training.serving(None):
        episodes, work = actors.rollouts(records, step, again, num)

    rewards: list[Reward] = []
    with training.stage("judge"), training.serving(actors.judge):
        rewards = rewards_of(episodes, actors.judge, actors.reward)
    with training.stage("gather"):  # frames are known by index: an episode is small
        pairs, homes = dist.gather_items(list(zip(episodes, rewards)))
        preempted = training.preempted()
    if preempted:
        training.stop_inside(step)
    episodes, rewards = map(list, zip(*pairs))
    picked = actors.picked(records, step, again, num)
    replaced = records.num_replaced(picked, episodes[:: cfg.group_size])
    return Rollouts(episodes, rewards, homes, replaced, work)
