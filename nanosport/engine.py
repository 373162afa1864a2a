"""The one generation engine: infer, evaluation, RL and distillation all sample here.

A State holds the conversations in flight: their KV cache, the next M-RoPE position and the next token's logits of each.
    state = engine.prefill(prompts)      each prompt once …
    state = state.select([0] * 8)        … then forked into its group of rollouts
    turns = engine.generate(state, …)    until every row wrote </tool_call>, </answer> or its end of turn
    state = state.select(rows)           the rows that go on
    engine.append(state, pieces)         what the tool returned
Each row draws from its own random stream, so its tokens do not depend on what else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanosport.frames import FrameEncoder
from nanosport.image import ImageConfig
from nanosport.load import load_model, load_tokenizer
from nanosport.model import KVCache, Qwen25VL, mrope_positions
from nanosport.tools import STOPS


@dataclass(frozen=True)
class Piece:
    """Tokens that enter a conversation from outside, with the grids and features of the frames among them."""

    ids: Sequence[int]
    grids: Sequence[tuple[int, int, int]] = ()
    features_ND: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    max_new_tokens: int = 160
    """A turn."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must lie above 0 and not above 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True)
class Generated:
    """One turn of one row."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Under the sampler's temperature with banned tokens at −∞, before top-p: what the trainer recomputes."""
    stopped: bool
    """False where max_new_tokens cut it."""


class State:
    """B conversations in flight."""

    def __init__(self, cache: KVCache, next_start: list[int], logits_BV: torch.Tensor):
        self.cache, self.next_start, self.logits_BV = cache, next_start, logits_BV

    def __len__(self) -> int:
        return len(self.next_start)

    def select(self, rows: Sequence[int]) -> "State":
        """A copy with these rows, in this order; a row may come often."""
        rows = list(rows)
        return State(self.cache.select(rows), [self.next_start[r] for r in rows], self.logits_BV[rows])


class Engine:
    def __init__(self, model: Qwen25VL, tokenizer, sampling: Sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.head_weight_VD.device
        self.banned = banned_ids(model, tokenizer).to(self.device)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.end_ids = {end, *model.cfg.eos_token_ids}
        # only a token with ">" in its text can complete a stop string: only then is the tail decoded and looked at
        self.closing = {i for token, i in tokenizer.get_vocab().items() if ">" in token}

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Piece]) -> State:
        cache = KVCache(self.model.cfg, len(prompts), 0, self.device, self.model.head_weight_VD.dtype)
        vocab = self.model.head_weight_VD.shape[0]
        state = State(cache, [0] * len(prompts), torch.zeros(len(prompts), vocab, device=self.device))
        self.append(state, prompts)
        return state

    @torch.no_grad()
    def append(self, state: State, pieces: Sequence[Piece]) -> None:
        """Feed each row its piece; `state` is updated."""
        lengths = torch.tensor([len(p.ids) for p in pieces])
        width = int(lengths.max())
        ids_BT = torch.zeros(len(pieces), width, dtype=torch.long)
        positions_3BT = torch.zeros(3, len(pieces), width, dtype=torch.long)
        for b, piece in enumerate(pieces):
            ids_BT[b, : lengths[b]] = torch.tensor(piece.ids)
            positions, state.next_start[b] = mrope_positions(piece.ids, piece.grids, self.model.cfg, state.next_start[b])
            positions_3BT[:, b, : lengths[b]] = positions
        features = [p.features_ND for p in pieces if p.features_ND is not None]
        room = int(state.cache.lengths_B.max()) + width
        if room > state.cache.capacity:
            state.cache = state.cache.grow(room + self.sampling.max_new_tokens)
        hidden_BTD = self.model.decode(
            ids_BT.to(self.device),
            positions_3BT.to(self.device),
            lengths.to(self.device),
            state.cache,
            torch.cat(features) if features else None,
        )
        last_BD = hidden_BTD[torch.arange(len(pieces)), lengths - 1]
        state.logits_BV = (last_BD @ self.model.head_weight_VD.T).float()

    @torch.no_grad()
    def generate(self, state: State, streams: Sequence[np.random.Generator]) -> list[Generated]:
        """One turn for every row of `state`, which is updated; row b draws from streams[b]."""
        cfg, num_rows = self.sampling, len(state)
        draws_BT = torch.from_numpy(np.stack([s.random(cfg.max_new_tokens) for s in streams])).to(self.device)
        room = int(state.cache.lengths_B.max()) + cfg.max_new_tokens
        if room > state.cache.capacity:
            state.cache = state.cache.grow(room)
        ids: list[list[int]] = [[] for _ in range(num_rows)]
        logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        stopped = [False] * num_rows
        # the rows at work, with a cache of their own once half of them have ended: the last ones must not carry all the others
        rows, cache, logits_BV = list(range(num_rows)), state.cache, state.logits_BV
        start_B = torch.tensor(state.next_start)
        for step in range(cfg.max_new_tokens):
            token_B, logp_B = self._sample(logits_BV, draws_BT[rows, step])
            # the token that ends a turn is fed too: the cache then holds all that was said
            num_new_B = torch.tensor([not stopped[row] for row in rows], dtype=torch.long)
            for row, token, logp in zip(rows, token_B.tolist(), logp_B.tolist()):
                if not stopped[row]:
                    ids[row].append(token)
                    logprobs[row].append(logp)
                    stopped[row] = self._ends(ids[row])
            positions_3B1 = start_B[rows].expand(3, -1)[..., None]
            hidden_BTD = self.model.decode(token_B[:, None], positions_3B1.to(self.device), num_new_B.to(self.device), cache)
            start_B[rows] += num_new_B
            running = [k for k, row in enumerate(rows) if not stopped[row]]
            if not running:
                break
            logits_BV = (hidden_BTD[:, 0] @ self.model.head_weight_VD.T).float()
            if 2 * len(running) <= len(rows):
                if cache is not state.cache:
                    state.cache.put(rows, cache)
                rows, cache, logits_BV = [rows[k] for k in running], cache.select(running), logits_BV[running]
        if cache is not state.cache:
            state.cache.put(rows, cache)
        state.next_start = start_B.tolist()
        return [Generated(tuple(i), tuple(p), s) for i, p, s in zip(ids, logprobs, stopped)]

    def _sample(self, logits_BV: torch.Tensor, draw_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(token_B, logp_B): the inverse of the cumulative distribution at draw_B ∈ [0, 1)."""
        cfg = self.sampling
        log_p_BV = (logits_BV / (cfg.temperature or 1.0)).index_fill(1, self.banned, float("-inf")).log_softmax(-1)
        if cfg.temperature == 0:
            token_B = log_p_BV.argmax(-1)
        else:
            p_BV = log_p_BV.double().exp()
            if cfg.top_p < 1:
                sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
                outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= cfg.top_p
                p_BV = p_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)
            cumulative_BV = p_BV.cumsum(-1)
            # a draw below the total lands on a token whose probability is above 0: banned ones add nothing to the sum
            point_B1 = (draw_B[:, None] * cumulative_BV[:, -1:]).minimum(cumulative_BV[:, -1:] * (1 - 1e-12))
            token_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]
        return token_B, log_p_BV.gather(1, token_B[:, None])[:, 0]

    def _ends(self, ids: list[int]) -> bool:
        if ids[-1] in self.end_ids:
            return True
        if ids[-1] not in self.closing:
            return False
        tail = self.tokenizer.decode(ids[-12:], skip_special_tokens=False)
        return any(stop in tail for stop in STOPS)


def load_engine(folder: Path, sampling: Sampling) -> tuple[FrameEncoder, Engine]:
    """What a model folder needs to play episodes: on the GPU if there is one, in bfloat16 there."""
    model = load_model(folder, *(("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)))
    return FrameEncoder(model, ImageConfig.from_folder(folder)), Engine(model, load_tokenizer(folder), sampling)


def banned_ids(model: Qwen25VL, tokenizer) -> torch.Tensor:
    """Ids that must never be sampled: everything of vision, the start of a message, and rows behind the tokenizer's end."""
    banned = {model.cfg.image_token_id, model.cfg.video_token_id, model.cfg.vision_start_token_id, model.cfg.vision_end_token_id}
    vocab = tokenizer.get_vocab()
    banned |= {vocab[t] for t in ("<|vision_pad|>", "<|im_start|>", "<tool_response>", "</tool_response>") if t in vocab}
    banned |= set(range(model.head_weight_VD.shape[0])) - set(vocab.values())
    return torch.tensor(sorted(i for i in banned if i < model.head_weight_VD.shape[0]))
