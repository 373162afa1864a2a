"""Episodes → packed batches: sequences end to end, what they begin with alike computed once, and the rows that carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kernels.attention import Keys
from nanosport.cost import causal_pairs, text_flops, vision_flops
from nanosport.episode import Clip, Episode
from nanosport.frames import FrameEncoder
from nanosport.model import ModelConfig, mrope_positions

MIN_SHARED = 32  # tokens: what a shared run must save to be worth a segment of its own


@dataclass(frozen=True)
class Batch:
    ids_T: torch.Tensor
    positions_3T: torch.Tensor
    cu_seqlens: torch.Tensor
    keys: Keys | None
    """What each segment sees where some see more than themselves: the tokens that its episode begins with."""
    features_ND: torch.Tensor
    frames: tuple[tuple[Clip, int], ...]
    """(clip, frame index) of the images in ids_T, in order."""
    rows_M: torch.Tensor
    """Positions in T whose hidden state predicts a trainable token; one that many episodes share comes as often."""
    targets_M: torch.Tensor
    episode_M: torch.Tensor
    """Which of the batch's episodes each row belongs to."""
    sampled_logp_M: torch.Tensor
    """The sampler's log-probability of each target (0 for a teacher's)."""
    after_image_M: torch.Tensor
    """Whether the row's turn follows tool frames: where log-probs drift first if positions or features are wrong."""


@dataclass(frozen=True)
class Node:
    """Tokens start … end of `episode`, the first of those that have them in common; they follow node `parent`'s."""

    episode: int
    start: int
    end: int
    parent: int | None


def prefix_tree(keys: Sequence[np.ndarray], min_shared: int) -> tuple[list[Node], list[int]]:
    """(nodes, the node each sequence ends in). Sequences that begin alike share nodes, of at least `min_shared` tokens;
    parents come before their children."""
    nodes: list[Node] = []
    lasts = [0] * len(keys)

    def grow(members: list[int], start: int, parent: int | None) -> None:
        alike: dict[object, list[int]] = {}
        for k in members:
            ahead = keys[k][start : start + min_shared]
            alike.setdefault(ahead.tobytes() if len(ahead) == min_shared else k, []).append(k)
        for group in alike.values():
            first, *others = group
            end = len(keys[first])
            for k in others:
                shared = min(end, len(keys[k]))
                differs = np.flatnonzero(keys[first][start:shared] != keys[k][start:shared])
                end = start + int(differs[0]) if len(differs) else shared
            nodes.append(Node(first, start, end, parent))
            here = len(nodes) - 1
            for k in group:
                lasts[k] = here
            if going_on := [k for k in group if len(keys[k]) > end]:
                grow(going_on, end, here)

    grow([k for k in range(len(keys)) if len(keys[k])], 0, None)
    return nodes, lasts


def pack(episodes: Sequence[Episode], encoder: FrameEncoder, cfg: ModelConfig, device="cpu", share_prefix: bool = True) -> Batch:
    """One packed batch. With a frozen tower its features come from the cache, else they carry gradients.

    share_prefix: the system's prompt, a group's question and frames, and whatever else of MIN_SHARED tokens or more the
    episodes begin with alike stand in the batch once. Loss and gradients are those of the episodes one by one.
    """
    numbers: dict[tuple[Clip, int], int] = {}  # a frame is known by its clip and index: its tokens all have one id
    keys, positions, frame_places = [], [], []
    for episode in episodes:
        grid, per_frame = encoder.grid(episode.question.clip), encoder.tokens_per_frame(episode.question.clip)
        positions.append(mrope_positions(episode.ids, [grid] * len(episode.frames), cfg)[0])
        key = np.array(episode.ids)
        is_image = key == cfg.image_token_id
        names = [(episode.question.clip, index) for index in episode.frames]
        key[is_image] = np.repeat([-1 - numbers.setdefault(name, len(numbers)) for name in names], per_frame)
        keys.append(key)
        frame_places.append(dict(zip(np.flatnonzero(is_image)[::per_frame].tolist(), names)))
    nodes, lasts = prefix_tree(keys, MIN_SHARED if share_prefix else max(map(len, keys)) + 1)

    begins = np.cumsum([0, *(n.end - n.start for n in nodes)])
    seen = []  # of each node: where its tokens and all those before them lie in T
    for k, node in enumerate(nodes):
        own = np.arange(begins[k], begins[k + 1])
        seen.append(own if node.parent is None else np.concatenate([seen[node.parent], own]))
    places = [seen[last] for last in lasts]
    frames = [name for n in nodes for place, name in frame_places[n.episode].items() if n.start <= place < n.end]

    rows, targets, episode_rows, after = [], [], [], []
    for k, episode in enumerate(episodes):
        trained = [t for t, m in enumerate(episode.mask) if m]
        rows += [int(places[k][t - 1]) for t in trained]
        targets += [episode.ids[t] for t in trained]
        episode_rows += [k] * len(trained)
        turn, previous = 0, None
        for t in trained:
            turn += previous is not None and t != previous + 1
            previous = t
            after.append(bool(episode.turns[turn - 1].frames) if turn else False)
    logp = [p for e in episodes for p, m in zip(e.logprobs, e.mask) if m]
    return Batch(
        ids_T=torch.tensor([t for n in nodes for t in episodes[n.episode].ids[n.start : n.end]]).to(device),
        positions_3T=torch.cat([positions[n.episode][:, n.start : n.end] for n in nodes], 1).to(device),
        cu_seqlens=torch.from_numpy(begins).int().to(device),
        keys=Keys.of(seen, device) if any(n.parent is not None for n in nodes) else None,
        features_ND=encoder.features(frames),
        frames=tuple(frames),
        rows_M=torch.tensor(rows, dtype=torch.long).to(device),
        targets_M=torch.tensor(targets, dtype=torch.long).to(device),
        episode_M=torch.tensor(episode_rows, dtype=torch.long).to(device),
        sampled_logp_M=torch.tensor(logp).to(device),
        after_image_M=torch.tensor(after, dtype=torch.bool).to(device),
    )


@dataclass(frozen=True)
class Unit:
    """Episodes packed together since they begin alike, such as a group, and what they cost."""

    episodes: tuple[int, ...]
    tokens: int
    """What they begin with alike counted once."""
    flops: float
    """Of a forward pass through the decoder."""
    vision_flops: float
    """Of encoding their frames, for a rank that has not seen them or has to see them anew."""
    home: int
    """The rank that has seen the frames."""


def make_units(
    episodes: Sequence[Episode], together: int, homes: Sequence[int], cfg: ModelConfig, micro_tokens: int, share_prefix: bool
) -> list[Unit]:
    """Units of `together` neighbours, or of fewer where so many do not fit into a micro-batch of `micro_tokens`."""
    units = []

    def add(numbers: tuple[int, ...]) -> None:
        lengths = [len(episodes[k].ids) for k in numbers]
        first, prefix = np.array(episodes[numbers[0]].ids), 0
        if share_prefix and len(numbers) > 1:
            prefix = min(lengths)
            for k in numbers[1:]:
                differs = np.flatnonzero(first[:prefix] != np.array(episodes[k].ids[:prefix]))
                prefix = int(differs[0]) if len(differs) else prefix
        tokens = prefix + sum(length - prefix for length in lengths)
        if tokens > micro_tokens and len(numbers) > 1:
            half = len(numbers) // 2
            add(numbers[:half])
            add(numbers[half:])
            return
        features = [episodes[k].ids.count(cfg.image_token_id) for k in numbers]
        seen_alike = int((first[:prefix] == cfg.image_token_id).sum())
        frames = seen_alike + sum(n - seen_alike for n in features)
        flops = text_flops(cfg, tokens, causal_pairs(lengths, prefix))
        units.append(Unit(numbers, tokens, flops, vision_flops(cfg, frames), homes[numbers[0]]))

    for start in range(0, len(episodes), together):
        add(tuple(range(start, min(start + together, len(episodes)))))
    return units


def deal(units: Sequence[Unit], world: int, micro_tokens: int, frozen_vision: bool) -> tuple[list[list[list[int]]], float]:
    """([rank][micro-batch] → episode numbers, balance). Every rank gets as many micro-batches, as few as hold the units.

    The costly first, each unit stays with the rank that has seen its frames until that rank has its share of the work, and goes then
    where the least work is, which includes seeing the frames anew. A micro-batch of more than one unit holds at most `micro_tokens`;
    one that is empty, where there are too few units, is an empty list. `balance`: the share of the time in which the ranks, who wait
    for each other at each micro-batch, work.
    """
    fair = sum(u.flops for u in units) / world
    num = min(-(-sum(u.tokens for u in units) // (world * micro_tokens)), -(-len(units) // world))
    while True:
        load, tokens, held = np.zeros((world, num)), np.zeros((world, num)), [[[] for _ in range(num)] for _ in range(world)]
        for unit in sorted(units, key=lambda u: (-u.flops, u.episodes)):
            away = np.arange(world)[:, None] != np.full(num, unit.home)
            stays = load[unit.home].sum() + unit.flops <= fair
            full = (tokens > 0) & (tokens + unit.tokens > micro_tokens)
            after = load + unit.flops + unit.vision_flops * (away if frozen_vision else 1)
            rank, slot = np.unravel_index(np.lexsort((after.ravel(), (away & stays).ravel(), full.ravel()))[0], load.shape)
            load[rank, slot], tokens[rank, slot] = after[rank, slot], tokens[rank, slot] + unit.tokens
            held[rank][slot].append(unit)
        crowded = any(len(those) > 1 and sum(u.tokens for u in those) > micro_tokens for rank in held for those in rank)
        if not crowded:
            break
        num += 1
    order = np.argsort(-load, axis=1, kind="stable")  # the heavy ones of all ranks at the same time
    waited = np.take_along_axis(load, order, 1).max(0).sum() * world
    dealt = [[sorted(k for u in held[rank][slot] for k in u.episodes) for slot in order[rank]] for rank in range(world)]
    return dealt, float(load.sum() / waited) if waited else 1.0


@lru_cache(maxsize=2)
def _epoch(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_items)


def data_order(num_items: int, seed: int, step: int, batch: int) -> list[int]:
    """The items of step 0, 1, …: epoch after epoch, each shuffled by (seed, epoch), so that a resumed run sees the same."""
    places = (divmod(k, num_items) for k in range(step * batch, (step + 1) * batch))
    return [int(_epoch(num_items, seed, epoch)[place]) for epoch, place in places]
