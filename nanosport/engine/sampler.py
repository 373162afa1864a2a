"""The seam between episodes and whoever generates their turns.

A sampler is given a conversation, samples the assistant's turns, and is told what came back. Ids go
in and ids come out. Conversations are opened, answered and closed one by one; a sampler is free to
run them together, and hands on each turn when it has ended.

    numbers = sampler.open(prompt, streams)       # one conversation for each random stream
    for number, said in sampler.turns():          # turns, as they end
        sampler.say(number, piece)                # what the tool returned: the conversation goes on
        sampler.close(number)                     # or it has ended
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

import numpy as np
import torch

from nanosport.fields import Above, AtLeast, AtMost, check

if TYPE_CHECKING:  # a command's --help must not wait for the model's code
    from nanosport.model.frames import FrameEncoder, FrameName


@dataclass(frozen=True)
class Piece:
    """Tokens that enter a conversation from outside, with the frames among them."""

    ids: Sequence[int]
    grids: Sequence[tuple[int, int, int]] = ()
    """(1, height, width) in patches, one for each frame."""
    frames: Sequence["FrameName"] = ()
    """Their names, in order."""
    encoder: "FrameEncoder | None" = None
    """Who has their features. A sampler tells it to `expect` the frames when the piece comes, and
    asks for the `features` of all that it reads together; again where it has to read again."""


@dataclass(frozen=True)
class Sampling:
    """How a turn is sampled."""

    temperature: Annotated[float, AtLeast(0)] = 1.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    max_new_tokens: Annotated[int, AtLeast(1)] = 160
    """A turn is cut after this many tokens."""
    stops: tuple[str, ...] = ()
    """The first of these texts leaves the model one token more, in which to end its turn; its own
    end of turn ends the turn anywhere."""

    def __post_init__(self):
        for name, value in vars(self).items():
            check(Sampling, name, value, "Sampling")


@dataclass(frozen=True)
class Generated:
    """A turn that the model has sampled."""

    ids: tuple[int, ...]
    sampled_logp: tuple[float, ...]
    """The log-probability of each id under the sampler's temperature with banned tokens at −∞,
    before top-p: what the trainer computes again."""
    stopped: bool
    """False where max_new_tokens cut the turn."""
    num_end: int = 0
    """How many of the last ids are no text: 1 for the end of the turn, or for what the model has
    said in its place after a stop text."""
    version: int = 0
    """The version of the weights that have sampled it, as `load_weights` was told."""

    @property
    def text_ids(self) -> tuple[int, ...]:
        return self.ids[: len(self.ids) - self.num_end]


class SamplerError(ValueError):
    """Nobody is left who could sample. It says in one line what, why, and what to do."""


class Sampler(Protocol):
    """Generates the turns of any number of conversations."""

    tokenizer: object
    sampling: Sampling
    banned: torch.Tensor
    """Ids that it never samples: the loss leaves them out of its probabilities too."""
    counts: Counter[str]
    """What it has done, by the log's names; whoever reads it clears it."""

    def open(self, prompt: Piece, streams: Sequence[np.random.Generator]) -> list[int]:
        """Open a conversation for each random stream, all with one prompt; return their numbers."""

    def turns(self) -> Iterator[tuple[int, Generated]]:
        """Yield (number, turn) as turns end, until no conversation waits for one.

        Each turn must be answered or its conversation closed before the next one is asked for.
        """

    def say(self, number: int, piece: Piece) -> None:
        """Answer a turn: the conversation goes on with `piece`."""

    def close(self, number: int) -> None:
        """End a conversation. One that is closed already is left alone."""

    def sleep(self) -> None:
        """Give back the memory that only open conversations need."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take new weights by their published names. version: the update that they come from."""
