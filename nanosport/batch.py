"""Episodes → packed batches: sequences end to end, and the rows that carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from nanosport.episode import Episode
from nanosport.frames import FrameEncoder
from nanosport.model import ModelConfig, mrope_positions


@dataclass(frozen=True)
class Batch:
    ids_T: torch.Tensor
    positions_3T: torch.Tensor
    cu_seqlens: torch.Tensor
    features_ND: torch.Tensor
    rows_M: torch.Tensor
    """Positions in T whose hidden state predicts a trainable token."""
    targets_M: torch.Tensor
    episode_M: torch.Tensor
    """Which of the batch's episodes each row belongs to."""
    sampled_logp_M: torch.Tensor
    """The sampler's log-probability of each target (0 for a teacher's)."""
    after_image_M: torch.Tensor
    """Whether the row's turn follows tool frames: where log-probs drift first if positions or features are wrong."""


def pack(episodes: Sequence[Episode], encoder: FrameEncoder, cfg: ModelConfig, device="cpu") -> Batch:
    """One packed batch. With a frozen tower its features come from the cache, else they carry gradients."""
    ids, positions, rows, episode_rows, after, lengths = [], [], [], [], [], [0]
    for k, episode in enumerate(episodes):
        grid = encoder.grid(episode.question.video)
        positions.append(mrope_positions(episode.ids, [grid] * len(episode.frames), cfg)[0])
        trained = [t for t, m in enumerate(episode.mask) if m]
        rows += [len(ids) + t - 1 for t in trained]
        episode_rows += [k] * len(trained)
        turn, previous = 0, None
        for t in trained:
            turn += previous is not None and t != previous + 1
            previous = t
            after.append(bool(episode.turns[turn - 1].frames) if turn else False)
        ids += episode.ids
        lengths.append(len(episode.ids))
    keys = [(e.question.video, index) for e in episodes for index in e.frames]
    ids_T, rows_M = torch.tensor(ids), torch.tensor(rows, dtype=torch.long)
    logp = [p for e in episodes for p, m in zip(e.logprobs, e.mask) if m]
    return Batch(
        ids_T=ids_T.to(device),
        positions_3T=torch.cat(positions, 1).to(device),
        cu_seqlens=torch.tensor(lengths).cumsum(0).int().to(device),
        features_ND=encoder.features(keys),
        rows_M=rows_M.to(device),
        targets_M=ids_T[rows_M + 1].to(device),
        episode_M=torch.tensor(episode_rows, dtype=torch.long).to(device),
        sampled_logp_M=torch.tensor(logp).to(device),
        after_image_M=torch.tensor(after, dtype=torch.bool).to(device),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequence numbers, in order, into runs of at most `max_tokens` tokens (a longer sequence goes alone)."""
    runs: list[list[int]] = []
    room = 0
    for k, length in enumerate(lengths):
        if not runs or length > room:
            runs.append([])
            room = max_tokens
        runs[-1].append(k)
        room -= length
    return runs


@lru_cache(maxsize=2)
def _epoch(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_items)


def data_order(num_items: int, seed: int, step: int, batch: int) -> list[int]:
    """The items of step 0, 1, …: epoch after epoch, each shuffled by (seed, epoch), so that a resumed run sees the same."""
    places = (divmod(k, num_items) for k in range(step * batch, (step + 1) * batch))
    return [int(_epoch(num_items, seed, epoch)[place]) for epoch, place in places]
