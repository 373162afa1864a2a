"""Episodes → a packed batch, in three passes: each episode's tokens, what they share, the layout.

Sequences lie end to end without padding. What they begin with alike stands in the batch once, as a
segment of its own that the others see before themselves. Tensors are made in the last pass alone.

Letters: T tokens of the batch, M rows with loss (they predict a trained token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels.attention import Keys
from nanosport.model.decoder import ModelConfig, VLModel, check_features, mrope_positions
from nanosport.model.frames import FrameEncoder, FrameName
from nanosport.records import Episode

MIN_SHARED = 32
"""A shared run must save so many tokens to be worth a segment of its own."""


@dataclass(frozen=True)
class Batch:
    """What the model and the loss take."""

    ids_T: torch.Tensor
    positions_3T: torch.Tensor
    cu_seqlens: torch.Tensor
    """On the CPU."""
    keys: Keys | None
    """What each segment sees, where some see more than themselves."""
    features_ND: torch.Tensor
    frames: tuple[FrameName, ...]
    """The frames of the image tokens in ids_T, in order."""
    rows_M: torch.Tensor
    """Positions in T whose hidden state predicts a trained token. One that many episodes share
    comes as often."""
    targets_M: torch.Tensor
    episode_M: torch.Tensor
    """Which of the batch's episodes each row belongs to."""
    sampled_logp_M: torch.Tensor
    """The sampler's log-probability of each target; 0 for a teacher's."""
    after_image_M: torch.Tensor
    """Whether the row's turn follows frames of the tool: log-probs drift there first if positions
    or features are wrong."""

    def hidden_MD(self, model: VLModel) -> torch.Tensor:
        """The hidden states of the rows with loss; differentiable."""
        hidden_TD = model.hidden(
            self.ids_T, self.positions_3T, self.cu_seqlens, self.features_ND, self.keys
        )
        return hidden_TD[self.rows_M]


class EpisodeTokens(NamedTuple):
    """One episode, ready to be laid out."""

    ids: np.ndarray
    keys: np.ndarray
    """As ids, but an image token has its frame's number instead: equal keys mean equal tokens."""
    positions_3T: torch.Tensor
    frames: dict[int, FrameName]
    """The frame that begins at each image's first token."""
    trained: list[int]
    """Positions of the trained tokens; the next two are of these."""
    sampled_logp: list[float]
    after_image: list[bool]


class Node(NamedTuple):
    """Tokens start … end of an episode, the first of those that share them; they follow node
    `parent`'s."""

    episode: int
    start: int
    end: int
    parent: int | None


def pack(
    episodes: Sequence[Episode],
    encoder: FrameEncoder,
    cfg: ModelConfig,
    device="cpu",
    share_prefix: bool = True,
) -> Batch:
    """One packed batch. With a frozen tower its features come from the cache, else they carry
    gradients.

    share_prefix: the system's prompt, a group's question and frames, and whatever else of
    MIN_SHARED tokens or more the episodes begin with alike stand in the batch once. Loss and
    gradients are those of the episodes one by one.
    """
    numbers: dict[FrameName, int] = {}
    sequences = [tokens_of(episode, cfg, numbers) for episode in episodes]
    longest = max(len(tokens.ids) for tokens in sequences)
    min_shared = MIN_SHARED if share_prefix else longest + 1
    nodes, last_nodes = prefix_tree([tokens.keys for tokens in sequences], min_shared)
    return lay_out(sequences, nodes, last_nodes, encoder, cfg.image_token_id, device)


def tokens_of(episode: Episode, cfg: ModelConfig, numbers: dict[FrameName, int]) -> EpisodeTokens:
    """First pass: an episode's tokens, with their positions, frames, and what the loss wants.

    numbers: of every frame of the batch; new frames are added.
    """
    clip, (_, height, width) = episode.question.clip, episode.grid
    per_frame = height * width // cfg.vision.spatial_merge_size**2
    names = [(clip, index) for index in episode.frames]

    # a frame is known by its clip and index: its tokens all have one id
    ids = np.array(episode.ids)
    is_image = ids == cfg.image_token_id
    keys = ids.copy()
    frame_numbers = [-1 - numbers.setdefault(name, len(numbers)) for name in names]
    keys[is_image] = np.repeat(frame_numbers, per_frame)
    first_tokens = np.flatnonzero(is_image)[::per_frame].tolist()

    trained, after_image = [], []
    for before, turn in zip((None, *episode.turns), episode.turns):
        trained += range(*turn.tokens)
        after_image += [bool(before and before.frames)] * (turn.tokens[1] - turn.tokens[0])
    return EpisodeTokens(
        ids=ids,
        keys=keys,
        positions_3T=mrope_positions(episode.ids, [episode.grid] * len(names), cfg)[0],
        frames=dict(zip(first_tokens, names)),
        trained=trained,
        sampled_logp=[episode.sampled_logp[t] for t in trained],
        after_image=after_image,
    )


def prefix_tree(keys: Sequence[np.ndarray], min_shared: int) -> tuple[list[Node], list[int]]:
    """Second pass: (nodes, the node each sequence ends in).

    Sequences that begin alike share nodes, of at least `min_shared` tokens; parents come before
    their children.
    """
    nodes: list[Node] = []
    last_nodes = [0] * len(keys)

    def grow(members: list[int], start: int, parent: int | None) -> None:
        """Add the nodes of sequences that are equal up to `start`."""
        alike: dict[object, list[int]] = {}
        for k in members:
            ahead = keys[k][start : start + min_shared]
            alike.setdefault(ahead.tobytes() if len(ahead) == min_shared else k, []).append(k)
        for group in alike.values():
            end = common_length([keys[k] for k in group], start)
            nodes.append(Node(group[0], start, end, parent))
            here = len(nodes) - 1
            for k in group:
                last_nodes[k] = here
            if going_on := [k for k in group if len(keys[k]) > end]:
                grow(going_on, end, here)

    grow([k for k in range(len(keys)) if len(keys[k])], 0, None)
    return nodes, last_nodes


def common_length(keys: Sequence[np.ndarray], start: int = 0) -> int:
    """How many tokens all sequences begin with alike, given that they do up to `start`."""
    first, end = keys[0], len(keys[0])
    for other in keys[1:]:
        end = min(end, len(other))
        differs = np.flatnonzero(first[start:end] != other[start:end])
        end = start + int(differs[0]) if len(differs) else end
    return end


def lay_out(
    sequences: Sequence[EpisodeTokens],
    nodes: Sequence[Node],
    last_nodes: Sequence[int],
    encoder: FrameEncoder,
    image_token: int,
    device,
) -> Batch:
    """Third pass: the nodes one after the other, and where each episode's tokens then lie."""
    begins = np.cumsum([0, *(node.end - node.start for node in nodes)])
    seen: list[np.ndarray] = []  # by each node: its tokens' places in T, after those before them
    for k, node in enumerate(nodes):
        own = np.arange(begins[k], begins[k + 1])
        seen.append(own if node.parent is None else np.concatenate([seen[node.parent], own]))
    ids, positions, frames = [], [], []
    for node in nodes:
        tokens, span = sequences[node.episode], slice(node.start, node.end)
        ids.append(tokens.ids[span])
        positions.append(tokens.positions_3T[:, span])
        frames += [name for t, name in tokens.frames.items() if node.start <= t < node.end]

    # a trained token is predicted by the one before it, wherever that lies
    rows, targets, episode_numbers, logp, after_image = [], [], [], [], []
    for k, tokens in enumerate(sequences):
        places = seen[last_nodes[k]]
        rows += [int(places[t - 1]) for t in tokens.trained]
        targets += tokens.ids[tokens.trained].tolist()
        episode_numbers += [k] * len(tokens.trained)
        logp += tokens.sampled_logp
        after_image += tokens.after_image
    ids_T, features_ND = torch.from_numpy(np.concatenate(ids)), encoder.features(frames)
    check_features(ids_T == image_token, features_ND)
    return Batch(
        ids_T=ids_T.to(device),
        positions_3T=torch.cat(positions, 1).to(device),
        cu_seqlens=torch.from_numpy(begins).int(),
        keys=Keys.of(seen, device) if any(node.parent is not None for node in nodes) else None,
        features_ND=features_ND,
        frames=tuple(frames),
        rows_M=torch.tensor(rows, dtype=torch.long).to(device),
        targets_M=torch.tensor(targets, dtype=torch.long).to(device),
        episode_M=torch.tensor(episode_numbers, dtype=torch.long).to(device),
        sampled_logp_M=torch.tensor(logp).to(device),
        after_image_M=torch.tensor(after_image, dtype=torch.bool).to(device),
    )
