"""Episodes of assumed lengths in random tokens, and the stages of train.py and rl.py on them,
without a folder, videos or a sampler: what the planner counts and the benchmark times."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from types import SimpleNamespace

import numpy as np
import torch

import rl
import train
from nanosport.model.decoder import ModelConfig
from nanosport.model.frames import FrameName
from nanosport.records import Episode, Question, Turn
from nanosport.train.faults import Skips, Stages
from nanosport.train.training import Training
from nanosport.train.variants import group_advantages

NUM_SPECIAL = 7
"""The nano tokenizer's special ids are below; the large models have theirs above 151,000."""


@dataclass(frozen=True)
class Lengths:
    """The tokens of an episode: frames as in the paper, texts assumed, for it does not say them."""

    frame_tokens: int = 299
    """A frame of 640×360 becomes so many tokens."""
    overview: int = 8
    """So many frames are shown before the first turn."""
    frames_per_call: int = 8
    calls: float = 0.8
    """Tool calls of an episode, on average: 8 + 0.8 · 8 = 14.4 frames."""
    label: int = 9
    """Text tokens beside each frame: `frame 123:` and the frame's delimiters."""
    prompt_text: int = 300
    """The system prompt with the tool's schema, the question and its options."""
    turn_text: int = 200
    """One assistant turn, the thought included."""
    result_text: int = 20
    """The text around a tool's frames."""

    @property
    def prompt(self) -> int:
        return self.overview * (self.frame_tokens + self.label) + self.prompt_text

    @property
    def result(self) -> int:
        """What a call adds, besides the turn that asks for it."""
        return self.frames_per_call * (self.frame_tokens + self.label) + self.result_text

    @property
    def trained(self) -> float:
        return (1 + self.calls) * self.turn_text

    @property
    def response(self) -> float:
        return self.trained + self.calls * self.result

    def grid(self, merge: int) -> tuple[int, int, int]:
        """(1, height, width) of a frame in patches, `merge` of them to a token's side."""
        sides = range(1, isqrt(self.frame_tokens) + 1)
        height = max(side for side in sides if self.frame_tokens % side == 0)
        return 1, height * merge, self.frame_tokens // height * merge

    def still_going(self, turn: int, max_turns: int) -> float:
        """Share of the episodes that have a turn number `turn`, 0 the first, if each turn is as
        likely to call the tool."""
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            calls = sum(share**k for k in range(1, max_turns))
            low, high = (share, high) if calls < self.calls else (low, share)
        return high**turn


def make_episodes(
    cfg: ModelConfig, lengths: Lengths, groups: int, group_size: int, tokens: int = 0
) -> list[Episode]:
    """Episodes of `lengths`, of random text; a group's members share their prompt. The last turn of
    all is longer where they would have fewer than `tokens` tokens together."""
    rng, episodes, total = np.random.default_rng(0), [], groups * group_size
    image = [cfg.image_token_id] * lengths.frame_tokens
    image = [cfg.vision_start_token_id, *image, cfg.vision_end_token_id]
    grid = lengths.grid(cfg.vision.spatial_merge_size)

    def text(count: int) -> list[int]:
        return rng.integers(NUM_SPECIAL, min(cfg.vocab_size, 151_000), count).tolist()

    def images(count: int) -> list[int]:
        return [token for _ in range(count) for token in (*text(lengths.label - 2), *image)]

    for number in range(total):
        group, member = divmod(number, group_size)
        if member == 0:
            question = Question(str(group), str(group), "", "recognition", "?", (), "a")
            prompt = images(lengths.overview) + text(lengths.prompt_text)
        ids, mask, turns = list(prompt), [0] * len(prompt), []
        calls = int((number + 1) * lengths.calls) - int(number * lengths.calls)
        for call in range(calls + 1):
            is_last, start, length = call == calls, len(ids), lengths.turn_text
            if is_last and number == total - 1:
                length = max(length, tokens - sum(len(e.ids) for e in episodes) - start)
            first = 100 * (member + 1) + 10 * call
            frames = () if is_last else tuple(range(first, first + lengths.frames_per_call))
            action, span = "answer" if is_last else "tool", (start, start + length)
            turns.append(Turn("", action, frames=frames, tokens=span))
            ids += text(length)
            mask += [1] * length
            if frames:
                ids += images(len(frames)) + text(lengths.result_text)
                mask += [0] * (len(ids) - len(mask))
        shown = (*range(lengths.overview), *(k for turn in turns for k in turn.frames))
        told = tuple(ids), tuple(mask), (0.0,) * len(ids), shown, tuple(turns)
        episodes.append(Episode(question, *told, "answered", grid=grid))
    return episodes


class SeenFrames:
    """A FrameEncoder whose frozen tower has seen every frame: the features are made up."""

    def __init__(self, cfg: ModelConfig, episode: Episode, device, dtype: torch.dtype):
        _, height, width = episode.grid
        frame_tokens = height * width // cfg.vision.merge_unit
        self.width, self.device, self.dtype = cfg.vision.feature_size, device, dtype
        self.wave = torch.arange(frame_tokens * self.width, device=device).float()

    def features(self, names: Sequence[FrameName]) -> torch.Tensor:
        """The same for the same frame, so that packings can be compared."""
        numbers = [int(clip.video) * 1000 + index for clip, index in names]
        numbers_F1 = torch.tensor(numbers, device=self.device)[:, None]
        return torch.sin(numbers_F1 * 0.37 + self.wave).view(-1, self.width).to(self.dtype)


def bare_training(
    run: train.Config | rl.Config, model, episode: Episode, device: torch.device, dtype: torch.dtype
) -> Training:
    """A Training of `model` without a folder: what the stages of train.py and rl.py ask it for."""
    training = Training.__new__(Training)
    training.cfg, training.rank, training.world = run, 0, 1
    training.device, training.dtype = device, dtype
    training.stage, training.skips = Stages(0, 0.0), Skips(run.out, 0)
    training.encoder = SeenFrames(model.cfg, episode, device, dtype)
    training.build(model)
    return training


def bare_actors(training: Training, reference) -> SimpleNamespace:
    """Actors that do not play: what the stages of rl.py ask them for after the rollout."""
    cfg, encoder = training.model.cfg, training.encoder
    banned = torch.tensor([cfg.image_token_id, cfg.video_token_id], device=training.device)
    seen = {"encoder": encoder, "ref_encoder": encoder}
    return SimpleNamespace(reference=reference, sampler=SimpleNamespace(banned=banned), **seen)


def advantages_of(episodes: Sequence[Episode], run: rl.Config) -> torch.Tensor:
    """Made-up rewards, 0, 1, 2, 0, … in each group, as advantages."""
    rewards = [float(k % run.group_size % 3) for k in range(len(episodes))]
    return group_advantages(rewards, run.group_size, run.loss)


def take_step(training: Training, actors, episodes: Sequence[Episode]) -> float:
    """One step of train.py or, with actors, of rl.py on given episodes; returns its loss."""
    homes, losses = [0] * len(episodes), []
    if actors is None:
        micro_batches, _ = training.deal(episodes, 1, homes)
        num_tokens = sum(sum(episode.mask) for episode in episodes)
    else:
        rollouts = rl.Rollouts(episodes, [], homes)
        advantages = advantages_of(episodes, training.cfg)
        micro_batches = rl.prepare(training, actors, rollouts, advantages, 0).micro_batches
    for micro in micro_batches:
        with training.stage("train"):
            if actors is None:
                numbers, counts = micro
                chosen = [episodes[number] for number in numbers]
                loss = train.sft_loss(training, chosen, counts / num_tokens)
            else:
                loss, _ = rl.policy_loss(training, actors, micro)
            loss.backward()
            losses.append(loss.detach())
    training.update(0, losses, episodes)
    return sum(loss.item() for loss in losses)
