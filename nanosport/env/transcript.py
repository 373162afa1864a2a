"""The tokens of one conversation: each id is born with its mask and its log-prob.

What the environment says is encoded once, when it is said. What the model says comes as ids, and is
never decoded and encoded again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanosport.engine.sampler import Generated, Piece
from nanosport.records import Clip

if TYPE_CHECKING:  # a command's --help must not wait for the model's code
    from nanosport.model.frames import FrameEncoder


class Transcript:
    """Ids, mask and log-probs of a conversation about one clip."""

    def __init__(self, clip: Clip, encoder: "FrameEncoder", tokenizer):
        self.clip, self.encoder, self.tokenizer = clip, encoder, tokenizer
        self.grid = encoder.grid(clip)
        self.tokens_per_frame = encoder.tokens_per_frame(clip)
        self.ids: list[int] = []
        self.mask: list[int] = []
        """1 for a token of the model's, 0 for the prompt's, a frame's and the tool's."""
        self.sampled_logp: list[float] = []
        """The sampler's log-probability where the mask is 1, 0.0 elsewhere."""
        self.turn_tokens: list[tuple[int, int]] = []
        """First and one past the last id of each of the model's turns."""
        self.versions: list[int] = []
        """The version of the weights that have sampled each turn."""

    def observe(self, text: str, frames: Sequence[int] = ()) -> Piece:
        """Add what the environment says, with the frames that its placeholders stand for: mask 0.
        They are encoded when whoever reads the piece asks for their features."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.ids += ids
        self.mask += [0] * len(ids)
        self.sampled_logp += [0.0] * len(ids)
        if not frames:
            return Piece(ids)
        names = [(self.clip, index) for index in frames]
        return Piece(ids, [self.grid] * len(names), names, self.encoder)

    def add_turn(self, said: Generated) -> str:
        """Add what the model says, its end of turn included, mask 1, and return its text."""
        start = len(self.ids)
        self.ids += said.ids
        self.mask += [1] * len(said.ids)
        self.sampled_logp += said.sampled_logp
        self.turn_tokens.append((start, len(self.ids)))
        self.versions.append(said.version)
        return self.tokenizer.decode(said.text_ids, skip_special_tokens=False)
