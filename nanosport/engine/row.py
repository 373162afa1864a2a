"""A conversation as the sampler keeps it: its tokens, its place in the cache, the turn it speaks.

Letters: T tokens.
"""

from collections.abc import Sequence

import numpy as np

from nanosport.engine.sampler import Piece
from nanosport.model.decoder import ModelConfig, mrope_positions


class Row:
    """All tokens of a conversation, of which the first `length` are in the cache.

    It can speak when all but its last token are there: that one is the next step's input.
    """

    def __init__(self, number: int, stream: np.random.Generator, group: list["Row"], shared: int):
        """group: the rows that begin alike, with `shared` tokens before the last of their
        prompt."""
        self.number, self.stream, self.group, self.shared = number, stream, group, shared
        self.ids: list[int] = []
        self.positions_3T = np.empty((3, 0), dtype=np.int64)
        """Of its tokens, and of those that it may say in this turn."""
        self.pieces: list[tuple[int, Piece]] = []
        """Those with frames, and where they begin."""
        self.draws: np.ndarray | None = None
        """The random numbers of its turn, one for each token that it may have and one to spare;
        None while it waits to be answered."""
        self.sampled_logp: list[float] = []
        """Of the tokens that it has said in this turn."""
        self.closed = False
        """Whether a stop text has been said: one token more, and the turn has ended."""
        self.due = 0
        """It reads when so many steps have been made, or when no row can speak."""
        self.pages: list[int] = []
        self.length = 0

    @property
    def num_unread(self) -> int:
        """Tokens to compute before it can speak."""
        return len(self.ids) - 1 - self.length

    @property
    def can_speak(self) -> bool:
        return self.draws is not None and self.num_unread == 0 and bool(self.pages)

    @property
    def room(self) -> int:
        """How long it can get in this turn, and by the step that is launched ahead of its end."""
        return len(self.ids) + len(self.draws) - len(self.sampled_logp)

    @property
    def source(self) -> "Row | None":
        """A row whose cache it can begin with."""
        readers = (o for o in self.group if o.pages and o.length >= self.shared)
        return None if self.pages else next(readers, None)


def hear(rows: Sequence[Row], piece: Piece, cfg: ModelConfig, max_tokens: int) -> None:
    """Let rows, alike so far, go on with a piece, and then say up to `max_tokens` tokens."""
    num_ids = len(rows[0].ids)
    known_3T = rows[0].positions_3T[:, :num_ids]
    start = int(known_3T[0, -1]) + 1 if num_ids else 0  # what was said is text
    piece_3T, start = mrope_positions(piece.ids, piece.grids, cfg, start)
    turn_3T = np.tile(start + np.arange(max_tokens + 1), (3, 1))
    positions_3T = np.concatenate((known_3T, piece_3T.numpy(), turn_3T), axis=1)
    if piece.encoder is not None:
        piece.encoder.expect(piece.frames)
    for row in rows:
        if piece.grids:
            row.pieces.append((num_ids, piece))
        row.ids += piece.ids
        row.positions_3T = positions_3T
        row.draws = np.append(row.stream.random(max_tokens), 0.0)
        row.sampled_logp, row.closed = [], False
