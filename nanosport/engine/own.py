"""The project's own sampler: batched generation over a KV cache, nothing to install.

It runs the open conversations together, a turn of each at a time. A group's prompt is computed
once, and its cache copied for each member. Each conversation draws from its own random stream, so
its tokens do not depend on what else is in the batch.

Letters: B rows (conversations), T tokens, V vocabulary, D hidden.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch

from nanosport.engine.sampler import Generated, Piece, Sampling
from nanosport.image import ImageConfig
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.model.qwen2_5_vl import KVCache, Qwen25VL, mrope_positions

MASK_ENTRIES = 2**26
"""Queries × keys of one pass, over all rows: longer pieces are computed in several passes, so that
memory grows with their length, not with its square."""


class State:
    """B conversations in flight: their cache, next M-RoPE positions, and next tokens' logits."""

    def __init__(self, cache: KVCache, next_start_B: torch.Tensor, logits_BV: torch.Tensor):
        self.cache, self.next_start_B, self.logits_BV = cache, next_start_B, logits_BV

    def __len__(self) -> int:
        return len(self.next_start_B)

    def select(self, rows: Sequence[int]) -> "State":
        """Copy these rows, in this order; a row may come often."""
        rows = list(rows)
        return State(self.cache.select(rows), self.next_start_B[rows], self.logits_BV[rows])

    def put(self, rows: Sequence[int], part: "State") -> None:
        """Write back what `select(rows)` has copied; its logits are not needed any more."""
        self.cache.put(rows, part.cache)
        self.next_start_B[rows] = part.next_start_B

    def make_room(self, num_tokens: int) -> None:
        """Let each row take so many more tokens."""
        room = int(self.cache.lengths_B.max()) + num_tokens
        if room > self.cache.capacity:
            self.cache = self.cache.grow(room)


class Draft:
    """A turn while it is being sampled."""

    def __init__(self):
        self.ids, self.sampled_logp = [], []
        self.closed = False
        """Whether a stop text has been said: one token more, and the turn has ended."""
        self.stopped = False

    def generated(self) -> Generated:
        ids, sampled_logp = tuple(self.ids), tuple(self.sampled_logp)
        return Generated(ids, sampled_logp, self.closed or self.stopped, int(self.stopped))


class OwnSampler:
    """A Sampler (see sampler.py) over a model in this process."""

    def __init__(self, model: Qwen25VL, tokenizer, sampling: Sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.head_weight_VD.device
        self.banned = banned_ids(model, tokenizer).to(self.device)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.end_ids = {end, *model.cfg.eos_token_ids}
        # only a token with a stop text's last letter can complete it: only then is the tail decoded
        last_letters = {stop[-1] for stop in sampling.stops}
        vocabulary = tokenizer.get_vocab().items()
        self.closing_ids = {i for token, i in vocabulary if last_letters & set(token)}

        self.numbers = count()
        self.streams: dict[int, np.random.Generator] = {}  # of every open conversation
        self.prompts: list[tuple[Piece, list[int]]] = []  # opened, not computed yet
        self.answers: dict[int, Piece] = {}  # said, not computed yet
        self.rows: list[int] = []  # the conversation of each row of the state
        self.state: State | None = None

    # The seam.

    def open(self, prompt: Piece, streams: Sequence[np.random.Generator]) -> list[int]:
        opened = {next(self.numbers): stream for stream in streams}
        self.streams |= opened
        self.prompts.append((prompt, list(opened)))
        return list(opened)

    def turns(self) -> Iterator[tuple[int, Generated]]:
        while self._advance():
            streams = [self.streams[number] for number in self.rows]
            yield from zip(self.rows, self.generate(self.state, streams))

    def say(self, number: int, piece: Piece) -> None:
        self.answers[number] = piece

    def close(self, number: int) -> None:
        self.streams.pop(number, None)
        self.answers.pop(number, None)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own[name].data.copy_(weight)

    def _advance(self) -> bool:
        """Compute what was said, or the prompts of new conversations; False where there is none."""
        going_on = [row for row, number in enumerate(self.rows) if number in self.answers]
        self.rows = [self.rows[row] for row in going_on]
        if self.rows:
            self.state = self.state.select(going_on)
            self.append(self.state, [self.answers.pop(number) for number in self.rows])
            return True

        # one row for each prompt, then a copy of it for each member of its group
        self.state, prompts, self.prompts = None, self.prompts, []
        if prompts:
            self.state = self.prefill([prompt for prompt, _ in prompts])
            members = [(row, n) for row, (_, group) in enumerate(prompts) for n in group]
            members = [(row, number) for row, number in members if number in self.streams]
            self.rows = [number for _, number in members]
            self.state = self.state.select([row for row, _ in members])
        return bool(self.rows)

    # The engine.

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Piece]) -> State:
        """Compute prompts, a row each."""
        head_VD = self.model.head_weight_VD
        cache = KVCache(self.model.cfg, len(prompts), 0, self.device, head_VD.dtype)
        logits_BV = torch.zeros(len(prompts), len(head_VD), device=self.device)
        state = State(cache, torch.zeros(len(prompts), dtype=torch.long), logits_BV)
        self.append(state, prompts)
        return state

    @torch.no_grad()
    def append(self, state: State, pieces: Sequence[Piece]) -> None:
        """Feed each row its piece; `state` is updated."""
        cfg = self.model.cfg
        lengths_B = torch.tensor([len(piece.ids) for piece in pieces])
        width = int(lengths_B.max())
        ids_BT = torch.zeros(len(pieces), width, dtype=torch.long)
        positions_3BT = torch.zeros(3, len(pieces), width, dtype=torch.long)
        for b, piece in enumerate(pieces):
            start = int(state.next_start_B[b])
            positions_3T, next_start = mrope_positions(piece.ids, piece.grids, cfg, start)
            ids_BT[b, : lengths_B[b]] = torch.tensor(piece.ids)
            positions_3BT[:, b, : lengths_B[b]] = positions_3T
            state.next_start_B[b] = next_start

        # room for the turn that follows too: the cache is copied once, not twice
        num_keys = int(state.cache.lengths_B.max()) + width
        if num_keys > state.cache.capacity:
            state.make_room(width + self.sampling.max_new_tokens)
        is_image_BT = ids_BT == cfg.image_token_id
        step = max(1, MASK_ENTRIES // (len(pieces) * num_keys))
        for start in range(0, width, step):
            part = slice(start, start + step)
            num_new_B = (lengths_B - start).clamp(0, step)
            hidden_BTD = self.model.decode(
                ids_BT[:, part].to(self.device),
                positions_3BT[:, :, part].to(self.device),
                num_new_B.to(self.device),
                state.cache,
                features_of(pieces, is_image_BT, part),
            )
            ends = [b for b, n in enumerate(lengths_B.tolist()) if start < n <= start + step]
            state.logits_BV[ends] = self._logits(hidden_BTD[ends, num_new_B[ends] - 1])

    @torch.no_grad()
    def generate(self, state: State, streams: Sequence[np.random.Generator]) -> list[Generated]:
        """Sample one turn for every row of `state`, which is updated; row b draws from
        streams[b]."""
        num_tokens = self.sampling.max_new_tokens
        draws_BT = torch.from_numpy(np.stack([stream.random(num_tokens) for stream in streams]))
        draws_BT = draws_BT.to(self.device)
        state.make_room(num_tokens)

        # rows still at work go on in a copy once half have ended: the last must not carry them all
        drafts, part, rows = [Draft() for _ in streams], state, list(range(len(state)))
        for step in range(num_tokens):
            self._add_token(part, [drafts[row] for row in rows], draws_BT[rows, step])
            running = [k for k, row in enumerate(rows) if not drafts[row].stopped]
            if not running:
                break
            if 2 * len(running) <= len(rows):
                if part is not state:
                    state.put(rows, part)
                part, rows = part.select(running), [rows[k] for k in running]
        if part is not state:
            state.put(rows, part)
        return [draft.generated() for draft in drafts]

    def _add_token(self, state: State, drafts: Sequence[Draft], draw_B: torch.Tensor) -> None:
        """Sample the next token of each draft that has not stopped, and compute it."""
        token_B, logp_B = self._sample(state.logits_BV, draw_B)
        # the token that ends a turn is computed too: the cache then holds all that was said
        num_new_B = torch.tensor([not draft.stopped for draft in drafts], dtype=torch.long)
        for draft, token, logp in zip(drafts, token_B.tolist(), logp_B.tolist()):
            if not draft.stopped:
                self._take(draft, token, logp)
        positions_3B1 = state.next_start_B.expand(3, -1)[..., None].to(self.device)
        hidden_BTD = self.model.decode(
            token_B[:, None], positions_3B1, num_new_B.to(self.device), state.cache
        )
        state.next_start_B = state.next_start_B + num_new_B
        state.logits_BV = self._logits(hidden_BTD[:, 0])

    def _take(self, draft: Draft, token: int, logp: float) -> None:
        """Add a token to its turn, and see whether it ends there."""
        draft.ids.append(token)
        draft.sampled_logp.append(logp)
        draft.stopped = draft.closed or token in self.end_ids
        draft.closed = draft.closed or self._closes(draft.ids)

    def _logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return (hidden_BD @ self.model.head_weight_VD.T).float()

    def _sample(self, logits_BV: torch.Tensor, draw_B: torch.Tensor) -> tuple:
        """(token_B, logp_B): the inverse of the cumulative distribution at draw_B ∈ [0, 1)."""
        temperature, top_p = self.sampling.temperature, self.sampling.top_p
        logits_BV = (logits_BV / (temperature or 1.0)).index_fill(1, self.banned, float("-inf"))
        log_p_BV = logits_BV.log_softmax(-1)
        if temperature == 0:
            token_B = log_p_BV.argmax(-1)
            return token_B, log_p_BV.gather(1, token_B[:, None])[:, 0]

        # top-p: only the most likely tokens, the first of which reach that probability together
        p_BV = log_p_BV.double().exp()
        if top_p < 1:
            sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
            outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
            p_BV = p_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)

        # a draw below the total meets a token with a probability above 0: banned ones add nothing
        cumulative_BV = p_BV.cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]
        point_B1 = (draw_B[:, None] * total_B1).minimum(total_B1 * (1 - 1e-12))
        token_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]
        return token_B, log_p_BV.gather(1, token_B[:, None])[:, 0]

    def _closes(self, ids: list[int]) -> bool:
        """Whether the last id completes a stop text."""
        if ids[-1] not in self.closing_ids:
            return False
        tail = self.tokenizer.decode(ids[-12:], skip_special_tokens=False)
        return any(stop in tail for stop in self.sampling.stops)


def features_of(
    pieces: Sequence[Piece], is_image_BT: torch.Tensor, part: slice
) -> torch.Tensor | None:
    """The features of the image tokens in these columns, row by row."""
    before_B = is_image_BT[:, : part.start].sum(1).tolist()
    count_B = is_image_BT[:, part].sum(1).tolist()
    chosen = [
        piece.features_ND[before : before + count]
        for piece, before, count in zip(pieces, before_B, count_B)
        if piece.features_ND is not None
    ]
    return torch.cat(chosen) if any(count_B) else None


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
