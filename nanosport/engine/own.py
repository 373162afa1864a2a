"""The project's own sampler: batched generation over a KV cache, nothing to install.

Each conversation is a row that comes and goes by itself. What it has not read yet is computed in
packs, up to a budget of tokens, beside the rows that speak (on a CPU when all have spoken: there
a pack costs as much as its tokens). A group's prompt is computed once. Where the cache is full, the
youngest row is put back, and computed again when there is room. A row draws from its own random
stream, so but for rounding its tokens do not depend on what else is in the batch.

Letters: T packed tokens, D hidden, V vocabulary.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from kernels.attention import Keys, varlen_attention
from nanosport.engine.pages import PAGE, Cached, Pages, WidePages
from nanosport.engine.sampler import Generated, Piece, Sampling
from nanosport.engine.step import Graphs, Launched, Step
from nanosport.image import ImageConfig
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.model.qwen2_5_vl import (
    Qwen25VL,
    join_projections,
    mrope_cos_sin,
    mrope_positions,
    mrope_tables,
)

PACK_TOKENS = 8192
"""A pack has at most so many new tokens."""
PACK_PAIRS = 2**26
"""And a row of it at most so many pairs of a new token and one that it may see: memory grows with a
conversation's length, not with its square, whatever attention there is."""
PACK_KEYS = 2**18
"""Its rows have at most so many tokens together: their keys are copied, a layer at a time."""
READ_AFTER = 8
"""On a GPU a row that was shown frames reads them so many steps later, which gives their decoding
time; by steps, not by the clock, so that a seed gives the same packs."""
POOL_SHARE, POOL_TOKENS = 0.6, 2**22
"""The cache takes this share of the GPU memory that is left, up to so many tokens; packs, frames
and logits need the rest."""


class Draft:
    """A turn while it is being sampled."""

    def __init__(self, draws: np.ndarray):
        self.draws = draws
        """One for each token that it may have, and one to spare."""
        self.ids, self.sampled_logp = [], []
        self.closed = False
        """Whether a stop text has been said: one token more, and the turn has ended."""
        self.stopped = False

    def generated(self) -> Generated:
        ids, sampled_logp = tuple(self.ids), tuple(self.sampled_logp)
        return Generated(ids, sampled_logp, self.closed or self.stopped, int(self.stopped))


class Row(Cached):
    """A conversation: all its tokens, of which the first `length` are in the cache.

    A row can speak when all but its last token are there: that one is the next step's input.
    """

    def __init__(self, number: int, stream: np.random.Generator):
        super().__init__()
        self.number, self.stream = number, stream
        self.ids: list[int] = []
        self.positions_3T = np.empty((3, 0), dtype=np.int64)
        """Of what has come in pieces; what is being said counts on from there."""
        self.next_start = 0
        self.pieces: list[tuple[int, Piece]] = []
        """Those with frames, and where they begin."""
        self.draft: Draft | None = None
        """None while the row waits to be answered."""
        self.due = 0
        """It reads when so many steps have been made, or when no row can speak."""
        self.group: list[Row] = [self]
        """The rows that begin alike, with so many tokens before the last of their prompt."""
        self.shared = 0

    def add(self, piece: Piece, cfg, num_draws: int) -> None:
        """Go on with a piece, and speak after it."""
        start = self.positions_3T.shape[1]
        said = np.arange(self.next_start, self.next_start + len(self.ids) - start)
        positions_3T, self.next_start = mrope_positions(
            piece.ids, piece.grids, cfg, self.next_start + len(said)
        )
        parts = self.positions_3T, np.tile(said, (3, 1)), positions_3T.numpy()
        self.positions_3T = np.concatenate(parts, axis=1)
        if piece.grids:
            self.pieces.append((len(self.ids), piece))
        if piece.expect is not None:
            piece.expect()
        self.ids += piece.ids
        self.draft = Draft(np.append(self.stream.random(num_draws), 0.0))

    @property
    def num_unread(self) -> int:
        """Tokens to compute before it can speak."""
        return len(self.ids) - 1 - self.length

    @property
    def can_speak(self) -> bool:
        return self.draft is not None and self.num_unread == 0 and bool(self.pages)

    @property
    def must_read(self) -> bool:
        return self.draft is not None and not self.can_speak

    @property
    def room(self) -> int:
        """How long it can get in this turn, and by the step that is launched ahead of its end."""
        return len(self.ids) + len(self.draft.draws) - len(self.draft.ids)

    def positions(self, start: int, end: int) -> np.ndarray:
        """positions_3T of its tokens start … end − 1."""
        known = self.positions_3T.shape[1]
        said = self.next_start + np.arange(max(start, known), max(end, known)) - known
        return np.concatenate((self.positions_3T[:, start:end], np.tile(said, (3, 1))), axis=1)

    @property
    def last_position(self) -> int:
        """Of its last token, which is text: the same on all axes."""
        return self.next_start + len(self.ids) - self.positions_3T.shape[1] - 1

    def features(self, start: int, end: int, image_id: int) -> list[torch.Tensor]:
        """The features of the image tokens among its tokens start … end − 1."""
        parts = []
        for first, piece in self.pieces:
            is_image = np.array(piece.ids) == image_id
            before = is_image[: max(0, start - first)].sum()
            count = is_image[: max(0, end - first)].sum() - before
            if count:
                parts.append(piece.features()[before : before + count])
        return parts


class OwnSampler:
    """A Sampler (see sampler.py) over a model in this process."""

    def __init__(
        self,
        model: Qwen25VL,
        tokenizer,
        sampling: Sampling,
        make_pages: Callable[[], Pages] | None = None,
    ):
        """make_pages: makes the cache; else it is what the device likes."""
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.head_weight_VD.device
        self.on_gpu = self.device.type == "cuda"
        self.banned = banned_ids(model, tokenizer).to(self.device)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.end_ids = {end, *model.cfg.eos_token_ids}
        # only a token with a stop text's last letter can complete it: only then is the tail decoded
        last_letters = {stop[-1] for stop in sampling.stops}
        vocabulary = tokenizer.get_vocab().items()
        self.closing_ids = {i for token, i in vocabulary if last_letters & set(token)}
        if self.on_gpu:
            join_projections(model)

        self.make_pages = make_pages or self._pages_of_device
        self.pages: Pages | None = None
        self.num_opened = 0
        self.rows: dict[int, Row] = {}  # the open conversations, the oldest first
        self.steps: dict[tuple[int, int], Step] = {}
        self.step: Step | None = None
        self.batch: list[Row | None] = []  # the row of each slot of the step; None: it has left
        self.launched: deque[Launched] = deque()
        self.graphs, self.width = None, 0
        self.counts: Counter[str] = Counter()
        """tokens_read, tokens_said, decode_steps, rows_put_back, pages (in use at most),
        seconds_read, seconds_speak."""

    # The seam.

    def open(self, prompt: Piece, streams: Sequence[np.random.Generator]) -> list[int]:
        numbers = range(self.num_opened, self.num_opened + len(streams))
        self.num_opened += len(streams)
        group = [Row(number, stream) for number, stream in zip(numbers, streams)]
        for row in group:
            row.add(prompt, self.model.cfg, self.sampling.max_new_tokens)
            row.group, row.shared = group, len(prompt.ids) - 1
        self.rows |= zip(numbers, group)
        return list(numbers)

    def turns(self) -> Iterator[tuple[int, Generated]]:
        while any(row.draft is not None for row in self.rows.values()):
            if self.pages is None:
                self.pages = self.make_pages()
            self._read()
            began = time.monotonic()
            ended = [(row, row.draft.generated()) for row in self._speak()]
            self.counts["seconds_speak"] += time.monotonic() - began
            for row, _ in ended:
                row.draft = None
            yield from ((row.number, said) for row, said in ended)

    def say(self, number: int, piece: Piece) -> None:
        row = self.rows[number]
        row.add(piece, self.model.cfg, self.sampling.max_new_tokens)
        row.due = self.counts["decode_steps"] + READ_AFTER * bool(piece.grids)

    def close(self, number: int) -> None:
        row = self.rows.pop(number, None)
        if row is not None:
            row.group.remove(row)
            self._put_back(row)

    def sleep(self) -> None:
        for row in self.rows.values():
            self._put_back(row)
        self.pages, self.step = None, None
        self.steps.clear()
        self.launched.clear()
        self.batch, self.graphs = [], None
        if self.on_gpu:  # to the driver: what trains would cut the cache's memory into pieces
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own[name].data.copy_(weight)

    # Reading.

    def _read(self) -> None:
        """Compute what rows have not read yet: a pack, or on a CPU all, when no row can speak."""
        while self.on_gpu or not any(self.batch):
            began, unread = time.monotonic(), [row for row in self.rows.values() if row.must_read]
            if self.on_gpu and any(row.can_speak for row in self.rows.values()):
                unread = [row for row in unread if row.due <= self.counts["decode_steps"]]
            pack = self._next_pack(unread)
            if pack:
                self._compute(pack)
                if self.on_gpu:  # else its time would be the next step's
                    torch.cuda.synchronize()
            self.counts["seconds_read"] += time.monotonic() - began
            if self.on_gpu or not pack:
                return

    def _next_pack(self, unread: Sequence[Row]) -> list[tuple[Row, int]]:
        """(row, tokens to compute now) for the oldest rows, which have room for all their turn."""
        pack, budget, num_keys = [], PACK_TOKENS, 0
        for row in unread:
            num_keys += len(row.ids)
            if budget == 0 or (pack and num_keys > PACK_KEYS):
                break
            if not row.length:
                read = [other for other in row.group if other.length >= row.shared > 0]
                if row.shared and not read and row.group[0] is not row:
                    continue  # the first of its group reads for all
                if not self._make_room(row, read[0] if read else None):
                    break
            elif not self._make_room(row, None):
                break
            if row.num_unread:
                longest = PACK_PAIRS // len(row.ids)
                pack.append((row, min(row.num_unread, budget, max(1, longest))))
                budget -= pack[-1][1]
        return pack

    def _make_room(self, row: Row, source: Row | None) -> bool:
        """Give a row the pages of its turn, if need be those of younger rows. source: a row that it
        begins like."""
        while True:
            if source is not None and source.length >= row.shared:
                given = self.pages.fork(row, source, row.shared, row.room)
            else:
                given = self.pages.reserve(row, row.room)
            if given:
                self.counts["pages"] = max(self.counts["pages"], self.pages.num_used)
                return True
            holders = [other for other in self.rows.values() if other.pages]
            if not holders or holders == [row]:
                size, room = self.pages.size, row.room
                raise ValueError(
                    f"a conversation needs room for {room} tokens, but the cache has "
                    f"{size * (len(self.pages.users) - 1)}: a GPU with more memory left, or "
                    f"smaller --max-pixels, is needed"
                )
            if holders[-1].number <= row.number:
                return False
            self._put_back(holders[-1])
            self.counts["rows_put_back"] += 1

    def _put_back(self, row: Row) -> None:
        """Take a row out of the cache."""
        if row in self.batch:
            self.batch[self.batch.index(row)] = None
        if self.pages is not None:
            self.pages.release(row)

    @torch.no_grad()
    def _compute(self, pack: Sequence[tuple[Row, int]]) -> None:
        """Compute the next tokens of some rows, into the cache."""
        spans = [(row, row.length, row.length + count) for row, count in pack]
        cfg, model = self.model.cfg, self.model
        ids = [i for row, start, end in spans for i in row.ids[start:end]]
        positions = np.concatenate([row.positions(start, end) for row, start, end in spans], axis=1)
        new_places, seen_places = (
            self.pages.places(self.pages.slots(part))
            for part in (spans, [(row, 0, end) for row, _, end in spans])
        )
        lengths, ends = [count for _, count in pack], [end for _, _, end in spans]
        cu_seqlens, cu_keys = (
            torch.tensor([0, *accumulate(part)], dtype=torch.int32).to(self.device)
            for part in (lengths, ends)
        )
        keys = Keys(None, cu_keys, max(ends))

        def attend(layer, q_THd, k_TKd, v_TKd):
            self.pages.write(layer, new_places, k_TKd, v_TKd)
            kv = self.pages.read(layer, seen_places)
            return varlen_attention(q_THd, *kv, cu_seqlens, max(lengths), causal=True, keys=keys)

        features = [f for span in spans for f in span[0].features(*span[1:], cfg.image_token_id)]
        features_ND = torch.cat(features) if features else None
        x_TD = model.embed(torch.tensor(ids).to(self.device), features_ND)
        positions_3T = torch.from_numpy(positions).to(self.device)
        cos_sin = mrope_cos_sin(positions_3T, mrope_tables(cfg, self.device), x_TD.dtype)
        model.run_layers(x_TD, cos_sin, attend)
        for row, _, end in spans:
            row.length = end
        self.counts["tokens_read"] += len(ids)

    # Speaking.

    def _speak(self) -> list[Row]:
        """Launch a step, and return the rows whose turn has ended with an earlier one.

        On a GPU a step is read when the next one is on its way.
        """
        ready = [row for row in self.rows.values() if row.can_speak]
        if self._is_stale(ready):
            if self.launched:  # its tokens are the next input
                return self._take_step()
            self._line_up(ready)
        if not ready:
            return []
        self.launched.append(self.step.launch())
        self.counts["decode_steps"] += 1
        return self._take_step() if len(self.launched) > self.on_gpu else []

    def _is_stale(self, ready: Sequence[Row]) -> bool:
        """Whether the step should be loaded with other rows. On a CPU those who have left go with
        it, until they are many: to move rows costs as much as some steps."""
        left = self.batch.count(None)
        came = len(ready) > len(self.batch) - left
        return came or left > (0 if self.on_gpu else len(self.batch) // 6)

    def _line_up(self, ready: Sequence[Row]) -> None:
        self.batch = self.pages.line_up(ready)
        if not ready:
            return
        num_rows, width = len(ready), max(len(row.pages) for row in ready)
        if self.on_gpu:
            self.width = max(self.width, ladder(max(width, 64)))  # a graph for each would be waste
            num_rows, width = ladder(num_rows), self.width
        self.step = self.steps.get((num_rows, width))
        if self.step is None:
            how = self.sampling, self.banned, num_rows, width
            self.step = Step(self.model, self.pages, *how)
            if self.on_gpu:
                self.graphs = self.graphs or Graphs()
                self.step.capture(self.graphs)
                self.steps[num_rows, width] = self.step
        states = [
            (row.ids[-1], row.last_position, row.length, len(row.draft.ids)) for row in self.batch
        ]
        self.step.load(
            states, [row.pages for row in self.batch], [row.draft.draws for row in self.batch]
        )

    def _take_step(self) -> list[Row]:
        """Read a step's tokens; return the rows whose turn ends there."""
        ended = []
        for slot, (row, token, logp) in enumerate(zip(self.batch, *self.launched.popleft().read())):
            if row is not None:
                if not isfinite(logp):
                    raise ValueError("the sampler's logits are not finite: its weights are broken")
                self._take(row.draft, int(token), logp)
                row.ids.append(int(token))
                row.length += 1
                if row.draft.stopped or len(row.draft.ids) == self.sampling.max_new_tokens:
                    ended.append(row)
                    self.batch[slot] = None
        self.counts["tokens_said"] += sum(row is not None for row in self.batch) + len(ended)
        return ended

    def _take(self, draft: Draft, token: int, logp: float) -> None:
        """Add a token to its turn, and see whether it ends there."""
        draft.ids.append(token)
        draft.sampled_logp.append(logp)
        draft.stopped = draft.closed or token in self.end_ids
        draft.closed = draft.closed or self._closes(draft.ids)

    def _closes(self, ids: list[int]) -> bool:
        """Whether the last id completes a stop text."""
        if ids[-1] not in self.closing_ids:
            return False
        tail = self.tokenizer.decode(ids[-12:], skip_special_tokens=False)
        return any(stop in tail for stop in self.sampling.stops)

    def _pages_of_device(self) -> Pages:
        cfg, dtype = self.model.cfg, self.model.head_weight_VD.dtype
        if not self.on_gpu:
            return WidePages(cfg, self.device, dtype)
        torch.cuda.empty_cache()
        left = POOL_SHARE * torch.cuda.mem_get_info(self.device)[0]
        num_pages = min(int(left) // Pages.page_bytes(cfg, PAGE, dtype), POOL_TOKENS // PAGE)
        return Pages(cfg, num_pages, PAGE, self.device, dtype)


def ladder(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …: so few graphs serve any number of rows."""
    power = 1 << max(0, (count - 1).bit_length())
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def load_sampler(
    folder: Path, sampling: Sampling, max_pixels: int | None = None
) -> tuple[FrameEncoder, OwnSampler]:
    """Load what plays episodes from a model folder: on a GPU, in bfloat16, if there is one.
    max_pixels: a frame's bound, where it is not the folder's."""
    on_gpu = torch.cuda.is_available()
    model = load_model(folder, *(("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)))
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder, max_pixels))
    return encoder, OwnSampler(model, load_tokenizer(folder), sampling)


def banned_ids(model: Qwen25VL, tokenizer) -> torch.Tensor:
    """Ids that must never be sampled.

    They are everything of vision, the start of a message, the tool's own tags, and the rows of the
    head after the tokenizer's last id.
    """
    cfg, vocabulary, num_rows = model.cfg, tokenizer.get_vocab(), len(model.head_weight_VD)
    banned = {cfg.image_token_id, cfg.video_token_id}
    banned |= {cfg.vision_start_token_id, cfg.vision_end_token_id}
    tags = ("<|vision_pad|>", "<|im_start|>", "<tool_response>", "</tool_response>")
    banned |= {vocabulary[tag] for tag in tags if tag in vocabulary}
    banned |= set(range(num_rows)) - set(vocabulary.values())
    return torch.tensor(sorted(i for i in banned if i < num_rows))
