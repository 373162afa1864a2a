"""Who trains on what: the order of the data, and a step's episodes dealt to ranks and micro-batches
by what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanosport.model.cost import causal_pairs, text_flops, vision_flops
from nanosport.model.decoder import ModelConfig
from nanosport.records import Episode
from nanosport.train.pack import common_length


@lru_cache(maxsize=2)
def _epoch(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_items)


def data_order(num_items: int, seed: int, step: int, batch: int) -> list[int]:
    """The items of a step: epoch after epoch, each shuffled by (seed, epoch), so that a resumed run
    sees the same."""
    places = (divmod(k, num_items) for k in range(step * batch, (step + 1) * batch))
    return [int(_epoch(num_items, seed, epoch)[place]) for epoch, place in places]


@dataclass(frozen=True)
class Unit:
    """Episodes packed together since they begin alike, such as a group, and what they cost."""

    episodes: tuple[int, ...]
    tokens: int
    """What they begin with alike is counted once."""
    flops: float
    """Operations of a forward pass through the decoder."""
    vision_flops: float
    """Operations of encoding their frames, for a rank that has not seen them or must see them
    anew."""
    home: int
    """The rank that has seen the frames."""


def make_units(
    episodes: Sequence[Episode],
    together: int,
    homes: Sequence[int],
    cfg: ModelConfig,
    micro_tokens: int,
    share_prefix: bool,
) -> list[Unit]:
    """Units of `together` neighbours, halved until they fit into a micro-batch of
    `micro_tokens`."""
    units = []

    def add(numbers: tuple[int, ...]) -> None:
        ids = [np.array(episodes[k].ids) for k in numbers]
        lengths = [len(one) for one in ids]
        prefix = common_length(ids) if share_prefix and len(ids) > 1 else 0
        tokens = prefix + sum(length - prefix for length in lengths)
        if tokens > micro_tokens and len(numbers) > 1:
            half = len(numbers) // 2
            add(numbers[:half])
            add(numbers[half:])
            return

        # what the episodes share is computed once, frames included
        features = [int((one == cfg.image_token_id).sum()) for one in ids]
        shared = int((ids[0][:prefix] == cfg.image_token_id).sum())
        num_features = shared + sum(n - shared for n in features)
        flops = text_flops(cfg, tokens, causal_pairs(lengths, prefix))
        vision = vision_flops(cfg, num_features)
        units.append(Unit(numbers, tokens, flops, vision, homes[numbers[0]]))

    for start in range(0, len(episodes), together):
        add(tuple(range(start, min(start + together, len(episodes)))))
    return units


def deal(
    units: Sequence[Unit], world: int, micro_tokens: int, frozen_vision: bool
) -> tuple[list[list[list[int]]], float]:
    """([rank][micro-batch] → episode numbers, balance).

    Every rank gets as many micro-batches, as few as hold the units. One of more than one unit holds
    at most `micro_tokens`; where there are too few units, some are empty lists. The ranks wait for
    each other at each micro-batch: `balance` is the share of the time in which they work.
    """
    fewest = -(-sum(unit.tokens for unit in units) // (world * micro_tokens))
    num_micro = min(fewest, -(-len(units) // world))
    while True:
        dealt, load = deal_into(units, world, num_micro, micro_tokens, frozen_vision)
        several = [micro for rank in dealt for micro in rank if len(micro) > 1]
        if all(sum(unit.tokens for unit in micro) <= micro_tokens for micro in several):
            break
        num_micro += 1

    # the heavy ones of all ranks at the same time
    order = np.argsort(-load, axis=1, kind="stable")
    waited = np.take_along_axis(load, order, 1).max(0).sum() * world
    numbers = [
        [sorted(k for unit in dealt[rank][slot] for k in unit.episodes) for slot in order[rank]]
        for rank in range(world)
    ]
    return numbers, float(load.sum() / waited) if waited else 1.0


def deal_into(
    units: Sequence[Unit], world: int, num_micro: int, micro_tokens: int, frozen_vision: bool
) -> tuple[list[list[list[Unit]]], np.ndarray]:
    """([rank][micro-batch] → units, the load of each), for a given number of micro-batches.

    The costly go first. Each unit stays with the rank that has seen its frames until that rank has
    its share of the work; then it goes where the least work is, seeing the frames anew included.
    """
    fair_share = sum(unit.flops for unit in units) / world
    load, tokens = np.zeros((world, num_micro)), np.zeros((world, num_micro))
    dealt = [[[] for _ in range(num_micro)] for _ in range(world)]
    for unit in sorted(units, key=lambda unit: (-unit.flops, unit.episodes)):
        away = np.arange(world)[:, None] != np.full(num_micro, unit.home)
        stays = load[unit.home].sum() + unit.flops <= fair_share
        full = (tokens > 0) & (tokens + unit.tokens > micro_tokens)
        load_after = load + unit.flops + unit.vision_flops * (away if frozen_vision else 1)
        # not a full one, then one at home, then the lightest
        best = np.lexsort((load_after.ravel(), (away & stays).ravel(), full.ravel()))[0]
        rank, slot = np.unravel_index(best, load.shape)
        load[rank, slot] = load_after[rank, slot]
        tokens[rank, slot] += unit.tokens
        dealt[rank][slot].append(unit)
    return dealt, load
