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
from itertools import count, groupby
from math import isfinite

import numpy as np
import torch

from nanosport.engine.pages import PAGE, Pages, Spans, WidePages
from nanosport.engine.row import Row, hear
from nanosport.engine.sampler import Generated, Piece, Sampling
from nanosport.engine.step import Step, ladder
from nanosport.model.decoder import VLModel, join_projections, mrope_cos_sin, mrope_tables
from nanosport.model.folder import own_name

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


class OwnSampler:
    """A Sampler (see sampler.py) over a model in this process."""

    def __init__(self, model: VLModel, tokenizer, sampling: Sampling):
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

        self.numbers, self.version = count(), 0
        self.rows: dict[int, Row] = {}  # the open conversations, the oldest first
        self.pages: Pages | None = None
        self.step: Step | None = None
        self.shape = 64, 64  # the step's room; it only grows, else there would be many graphs
        self.batch: list[Row | None] = []  # the row of each slot of the step; None: it has left
        self.launched: deque[tuple] = deque()  # steps on their way
        self.counts: Counter[str] = Counter()
        """tokens_read, tokens_said, decode_steps, rows_put_back, pages (in use at most),
        seconds_read, seconds_speak."""
        self.on_token: Callable[[int, int], None] | None = None
        """Called with a conversation's number and each token that it says."""

    # The seam.

    def open(self, prompt: Piece, streams: Sequence[np.random.Generator]) -> list[int]:
        group, shared = [], len(prompt.ids) - 1
        group += [Row(next(self.numbers), stream, group, shared) for stream in streams]
        hear(group, prompt, self.model.cfg, self.sampling.max_new_tokens)
        self.rows |= {row.number: row for row in group}
        return [row.number for row in group]

    def turns(self) -> Iterator[tuple[int, Generated]]:
        while any(row.draws is not None for row in self.rows.values()):
            if self.pages is None:
                self.pages = self.make_pages()
            if self._read() and not self.on_gpu:
                continue  # a CPU reads everything before rows speak
            began = time.monotonic()
            ended = self._speak()
            self.counts["seconds_speak"] += time.monotonic() - began
            yield from ended

    def say(self, number: int, piece: Piece) -> None:
        row = self.rows[number]
        hear([row], piece, self.model.cfg, self.sampling.max_new_tokens)
        row.due = self.counts["decode_steps"] + READ_AFTER * (self.on_gpu and bool(piece.grids))

    def close(self, number: int) -> None:
        row = self.rows.pop(number, None)
        if row is not None:
            row.group.remove(row)
            self._put_back(row)

    def sleep(self) -> None:
        for row in self.rows.values():
            self._put_back(row)
        if self.on_gpu:
            torch.cuda.synchronize()  # a step may be on its way
        self.pages, self.step, self.batch = None, None, []
        self.launched.clear()
        torch.cuda.empty_cache()  # else what trains would cut the cache's memory into pieces

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = version
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own[own_name(name)].data.copy_(weight)

    # Reading.

    def _read(self) -> bool:
        """Compute a pack of what rows have not read yet, if there is one; on a CPU not beside rows
        that speak."""
        if not self.on_gpu and any(self.batch):
            return False
        began = time.monotonic()
        pack = self._next_pack()
        if pack:
            self._compute(pack)
            if self.on_gpu:  # else its time would be the next step's
                torch.cuda.synchronize()
        self.counts["seconds_read"] += time.monotonic() - began
        return bool(pack)

    def _next_pack(self) -> Spans:
        """The tokens to compute now, of the oldest rows; they get room for all their turn."""
        rows, pack, budget, num_keys = self.rows.values(), [], PACK_TOKENS, 0
        unread = [row for row in rows if row.draws is not None and not row.can_speak]
        if any(row.can_speak for row in rows):
            unread = [row for row in unread if row.due <= self.counts["decode_steps"]]
        for row in unread:
            num_keys += len(row.ids)
            if budget == 0 or (pack and num_keys > PACK_KEYS):
                break
            if not row.pages and not row.source and row is not row.group[0]:
                continue  # the first of its group reads for all
            if not self._make_room(row):
                break
            if row.num_unread:
                num_new = min(row.num_unread, budget, max(1, PACK_PAIRS // len(row.ids)))
                pack.append((row, row.length, row.length + num_new))
                budget -= num_new
        return pack

    def _make_room(self, row: Row) -> bool:
        """Give a row the pages of its turn, if need be those of younger rows."""
        while not self.pages.reserve(row):
            others = [other for other in self.rows.values() if other.pages and other is not row]
            if not others:
                has = self.pages.size * (len(self.pages.users) - 1)
                raise ValueError(
                    f"a conversation needs room for {row.room} tokens, but the cache has {has}: "
                    f"a GPU with more memory left, or smaller --max-pixels, is needed"
                )
            if others[-1].number < row.number:
                return False
            self._put_back(others[-1])
            self.counts["rows_put_back"] += 1
        self.counts["pages"] = max(self.counts["pages"], self.pages.num_used)
        return True

    def _put_back(self, row: Row) -> None:
        """Take a row out of the cache."""
        self.batch = [None if other is row else other for other in self.batch]
        if row.pages:
            self.pages.release(row)

    @torch.no_grad()
    def _compute(self, pack: Spans) -> None:
        """Compute the tokens of a pack, into the cache."""
        model, ids = self.model, [i for row, start, end in pack for i in row.ids[start:end]]
        positions = np.concatenate([row.positions_3T[:, a:b] for row, a, b in pack], axis=1)
        x_TD, deep = model.embed(torch.tensor(ids).to(self.device), self._features(pack))
        positions_3T = torch.from_numpy(positions).to(self.device)
        cos_sin = mrope_cos_sin(positions_3T, mrope_tables(model.cfg, self.device), x_TD.dtype)
        model.run_layers(x_TD, cos_sin, self.pages.pack_attention(pack), deep)
        for row, _, end in pack:
            row.length = end
        self.counts["tokens_read"] += len(ids)

    def _features(self, pack: Spans) -> torch.Tensor | None:
        """features_ND of a pack's image tokens; their frames are asked for together."""
        image_id, shown, features = self.model.cfg.image_token_id, [], []
        for row, start, end in pack:
            for at, piece in row.pieces:
                first, last = (piece.ids[: max(0, k - at)].count(image_id) for k in (start, end))
                shown += [(piece, first, last)] if first < last else []
        for encoder, parts in groupby(shown, key=lambda part: part[0].encoder):
            pieces, firsts, lasts = zip(*parts)
            names = [name for piece in pieces for name in piece.frames]
            of_piece = encoder.features(names).split([p.ids.count(image_id) for p in pieces])
            features += [f_ND[a:b] for f_ND, a, b in zip(of_piece, firsts, lasts)]
        return torch.cat(features) if features else None

    # Speaking.

    def _speak(self) -> list[tuple[int, Generated]]:
        """Launch a step, and return the turns that have ended with an earlier one.

        On a GPU a step is read when the next one is on its way.
        """
        ready = [row for row in self.rows.values() if row.can_speak]
        # on a CPU those who have left go with the step: to move rows costs as much as some steps
        left, many = self.batch.count(None), 0 if self.on_gpu else len(self.batch) // 6
        if left > many or len(ready) > len(self.batch) - left:
            if self.launched:  # its tokens are the next input
                return self._take_step()
            self.batch = self.pages.line_up(ready, self.rows.values())
            if ready:
                self._load_step()
        if not ready:
            return []
        self.launched.append(self.step.launch())
        self.counts["decode_steps"] += 1
        return self._take_step() if len(self.launched) > self.on_gpu else []

    def _load_step(self) -> None:
        """Load the step with the batch; where it is too small, make one for all open rows."""
        needed = len(self.rows), max(len(row.pages) for row in self.batch)
        shape = tuple(max(has, ladder(its)) for has, its in zip(self.shape, needed))
        if self.step is None or shape != self.shape:
            self.shape = shape
            self.step = Step(self.model, self.sampling, self.banned, self.pages, shape)
        self.step.load(self.batch, self.on_gpu)

    def _take_step(self) -> list[tuple[int, Generated]]:
        """Read a step's tokens; return the turns that end there."""
        out_2R, is_there = self.launched.popleft()
        if is_there is not None:
            is_there.synchronize()
        ended = []
        for slot, (row, token, logp) in enumerate(zip(self.batch, *out_2R.tolist())):
            if row is not None and (turn := self._take(row, int(token), logp)) is not None:
                ended.append((row.number, turn))
                self.batch[slot] = None
        return ended

    def _take(self, row: Row, token: int, logp: float) -> Generated | None:
        """Let a row say a token; return its turn where it ends there."""
        if not isfinite(logp):
            raise ValueError("the sampler's logits are not finite: its weights are broken")
        row.ids.append(token)
        row.sampled_logp.append(logp)
        row.length += 1
        is_end = row.closed or token in self.end_ids
        said = row.ids[-len(row.sampled_logp) :]
        row.closed = row.closed or self._closes(said)
        self.counts["tokens_said"] += 1
        if self.on_token is not None:
            self.on_token(row.number, token)
        if not is_end and len(row.sampled_logp) < self.sampling.max_new_tokens:
            return None
        row.draws, turn = None, (tuple(said), tuple(row.sampled_logp))
        return Generated(*turn, is_end or row.closed, int(is_end), self.version)

    def _closes(self, ids: list[int]) -> bool:
        """Whether the last id completes a stop text."""
        if ids[-1] not in self.closing_ids:
            return False
        tail = self.tokenizer.decode(ids[-12:], skip_special_tokens=False)
        return any(stop in tail for stop in self.sampling.stops)

    def make_pages(self) -> Pages:
        cfg, dtype = self.model.cfg, self.model.head_weight_VD.dtype
        if not self.on_gpu:
            return WidePages(cfg, self.device, dtype)
        torch.cuda.empty_cache()
        left = POOL_SHARE * torch.cuda.mem_get_info(self.device)[0]
        num_pages = min(int(left) // Pages.page_bytes(cfg, PAGE, dtype), POOL_TOKENS // PAGE)
        return Pages(cfg, self.device, dtype, num_pages, PAGE)


def banned_ids(model: VLModel, tokenizer) -> torch.Tensor:
    """Ids that must never be sampled: all of vision, the start of a message, the tool's own tags,
    and the rows of the head after the tokenizer's last id."""
    cfg, vocabulary, num_rows = model.cfg, tokenizer.get_vocab(), len(model.head_weight_VD)
    banned = {cfg.image_token_id, cfg.video_token_id}
    banned |= {cfg.vision_start_token_id, cfg.vision_end_token_id}
    tags = ("<|vision_pad|>", "<|im_start|>", "<tool_response>", "</tool_response>")
    banned |= {vocabulary[tag] for tag in tags if tag in vocabulary}
    banned |= set(range(num_rows)) - set(vocabulary.values())
    return torch.tensor(sorted(i for i in banned if i < num_rows))
