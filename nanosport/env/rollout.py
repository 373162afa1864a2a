"""Episodes in tokens: sampled by a policy (`rollout`), or from given texts (`replay`).

Both take each turn through the same Env and the same Transcript, so SFT data and rollouts are made
by the same code.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanosport.engine.sampler import Generated, Piece, Sampler
from nanosport.env import prompt
from nanosport.env.env import Env, Limits
from nanosport.env.transcript import Transcript
from nanosport.records import Episode, Question

if TYPE_CHECKING:  # a command's --help must not wait for the model's code
    from nanosport.model.frames import FrameEncoder


class Conversation:
    """An episode in progress: its rules, and its tokens."""

    def __init__(self, question: Question, encoder: "FrameEncoder", tokenizer, limits: Limits):
        video = encoder.open(question.clip)
        self.end_id = tokenizer.convert_tokens_to_ids(prompt.END)
        self.env = Env(question, video, limits)
        self.transcript = Transcript(question.clip, encoder, tokenizer)

    def open(self) -> Piece:
        """Say everything before the first turn."""
        env, transcript = self.env, self.transcript
        text = prompt.opening_of(env, transcript.tokens_per_frame)
        return transcript.observe(text, env.overview)

    def take(self, said: Generated) -> Piece | None:
        """Read one turn of the model's; return what comes back, or None where the episode ends."""
        env, transcript = self.env, self.transcript
        text = transcript.add_turn(said)
        turn = env.step(text, cut=None if said.stopped else len(said.ids))
        if env.status is not None:
            return None

        sizes = [transcript.tokens_per_frame] * len(turn.frames)
        shown = f"error: {turn.error}"
        if turn.frames:
            shown = prompt.frame_text(turn.frames, sizes, env.times_s)
        text = prompt.tool_result(shown)
        if said.ids[-1:] == (self.end_id,):  # the model has ended its turn itself
            text = text.removeprefix(prompt.END)
        piece = transcript.observe(text, turn.frames)
        if len(transcript.ids) >= env.limits.max_tokens:
            env.end("out_of_tokens")
            return None
        return piece

    def episode(self) -> Episode:
        """Return the episode that has ended, with its tokens."""
        tokens = self.transcript
        played = self.env.episode()
        born = zip(played.turns, tokens.turn_tokens, tokens.versions, strict=True)
        return replace(
            played,
            ids=tuple(tokens.ids),
            mask=tuple(tokens.mask),
            sampled_logp=tuple(tokens.sampled_logp),
            turns=tuple(replace(turn, tokens=span, version=its) for turn, span, its in born),
            grid=tokens.grid,
        )


@torch.no_grad()
def rollout(
    sampler: Sampler,
    encoder: "FrameEncoder",
    questions: Sequence[Question],
    limits: Limits,
    group_size: int = 1,
    seed: Sequence[int] = (0,),
    numbers: Sequence[int] = (),
    on_turn: Callable[[Env], None] | None = None,
    on_end: Callable[[int, Episode], None] | None = None,
) -> list[Episode]:
    """Sample `group_size` episodes of every question, a group's members side by side.

    A question draws from the streams (seed, its number, member), whatever else is sampled beside
    it. numbers: of the questions, 0, 1, … by default. on_turn: called with an episode's Env after
    each of its turns. on_end: called with an episode's place among those returned and the episode,
    as each ends. Raises VideoError where a video cannot be used.
    """
    playing: dict[int, Conversation] = {}
    members = range(group_size)
    try:
        for q, question in zip(numbers or range(len(questions)), questions, strict=True):
            its = limits.drawn([*seed, q, 1 << 20])  # no member's stream
            group = [Conversation(question, encoder, sampler.tokenizer, its) for _ in members]
            prompt = [conversation.open() for conversation in group][0]
            streams = [np.random.default_rng([*seed, q, member]) for member in members]
            playing |= zip(sampler.open(prompt, streams), group, strict=True)

        places = {number: place for place, number in enumerate(playing)}
        for number, said in sampler.turns():
            conversation = playing[number]
            piece = conversation.take(said)
            if piece is None:
                sampler.close(number)
            else:
                sampler.say(number, piece)
            if on_turn is not None:
                on_turn(conversation.env)
            if on_end is not None and piece is None:
                on_end(places[number], conversation.episode())
    finally:  # a video that cannot be used must not leave its neighbours open
        for number in playing:
            sampler.close(number)
        encoder.expect_no_more()
    return [conversation.episode() for conversation in playing.values()]


def replay(
    question: Question, messages: Sequence[str], encoder: "FrameEncoder", tokenizer, limits: Limits
) -> Episode:
    """Return the episode of given assistant turns, each with its end; no frame is decoded.

    Raises ValueError where the turns are not one whole, valid trajectory.
    """
    conversation = Conversation(question, encoder, tokenizer, limits)
    conversation.open()
    env = conversation.env
    for k, message in enumerate(messages, 1):
        if env.status is not None:
            raise ValueError(
                f"{question.id}: the episode ends ({env.status}) before message {k} of "
                f"{len(messages)}"
            )
        ids = (*tokenizer.encode(message, add_special_tokens=False), conversation.end_id)
        conversation.take(Generated(ids, (0.0,) * len(ids), stopped=True, num_end=1))
        if (error := env.turns[-1].error) is not None:
            raise ValueError(f"{question.id}, message {k}: {error}")
    if env.status != "answered":
        raise ValueError(f"{question.id}: the trajectory ends without an answer")
    return conversation.episode()
