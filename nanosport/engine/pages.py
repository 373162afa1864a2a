"""The keys and values of every row: pages of one pool, and a table of pages for each row.

Members of a group share the pages that their prompt fills. A page that is not full belongs to one
row alone, so nothing is ever written into a shared one. Page 0 is nobody's: slots of a step that no
row uses write there.

Letters: L layers, P pages, S tokens a page, K key/value heads, d head width, R rows of a step, T
tokens of a pack.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F

from kernels.attention import Keys, cached_attention, varlen_attention
from kernels.paged_attention import paged_attention
from nanosport.engine.row import Row
from nanosport.model.decoder import ModelConfig

PAGE = 64
"""Tokens a page on a GPU."""
Spans = Sequence[tuple[Row, int, int]]
"""(row, start, end): the tokens start … end − 1 of some rows."""


class Pages:
    """A pool of a fixed size."""

    def __init__(self, cfg: ModelConfig, device, dtype, num_pages: int = 0, size: int = 0):
        """size: tokens a page. A pool that grows begins with nothing."""
        shape = cfg.num_hidden_layers, num_pages + 1, cfg.num_key_value_heads, size, cfg.head_dim
        self.kv_2LPKSd = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.users = np.zeros(num_pages + 1, dtype=np.int64)
        self.free = list(range(num_pages, 0, -1))

    @staticmethod
    def page_bytes(cfg: ModelConfig, size: int, dtype: torch.dtype) -> int:
        width = cfg.num_key_value_heads * cfg.head_dim
        return 2 * cfg.num_hidden_layers * size * width * dtype.itemsize

    @property
    def size(self) -> int:
        return self.kv_2LPKSd.shape[4]

    @property
    def num_used(self) -> int:
        return len(self.users) - 1 - len(self.free)

    def reserve(self, row: Row) -> bool:
        """Give a row the pages of its turn; an empty one begins with the tokens that it shares with
        its source. False, and nothing changed, where there is no room."""
        source, (whole, rest) = row.source, divmod(row.shared, self.size)
        pages = row.pages if source is None else source.pages[:whole]
        needed = -(-row.room // self.size) - len(pages)
        if needed > len(self.free):
            return False
        num_held = len(row.pages)
        row.pages = pages + [self.free.pop() for _ in range(needed)]
        self.users[row.pages[num_held:]] += 1
        if source is not None:
            to, origin, kv_2LPKSd = row.pages[whole], source.pages[whole], self.kv_2LPKSd
            kv_2LPKSd[:, :, to, :, :rest] = kv_2LPKSd[:, :, origin, :, :rest]
            row.length = row.shared
        return True

    def release(self, row: Row) -> None:
        """Take a row's pages back."""
        self.users[row.pages] -= 1
        self.free += [page for page in reversed(row.pages) if self.users[page] == 0]
        row.pages, row.length = [], 0

    def line_up(self, ready: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
        """The rows that are ready, in the order in which a step can take them. rows: all."""
        return list(ready)

    def places(self, page_T: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
        """Where the key heads of these tokens lie among all rows of width d; (T·K,)."""
        heads = torch.arange(self.kv_2LPKSd.shape[3], device=page_T.device)
        row_TK, at_T1 = page_T[:, None] * len(heads) + heads, token_T[:, None] % self.size
        return (row_TK * self.size + at_T1).flatten()

    def places_of(self, spans: Spans) -> torch.Tensor:
        page_T = np.concatenate([np.repeat(row.pages, self.size)[a:b] for row, a, b in spans])
        token_T = np.concatenate([np.arange(a, b) for _, a, b in spans])
        both_2T = torch.from_numpy(np.stack((page_T, token_T)))
        return self.places(*both_2T.to(self.kv_2LPKSd.device))

    def write(self, layer: int, places: torch.Tensor, *kv_TKd: torch.Tensor) -> torch.Tensor:
        """Keep the keys and values of new tokens; return all of the layer, kv_2PKSd."""
        for x_PKSd, new_TKd in zip(self.kv_2LPKSd[:, layer], kv_TKd):
            x_PKSd.flatten(0, 2).index_copy_(0, places, new_TKd.flatten(0, 1))
        return self.kv_2LPKSd[:, layer]

    def pack_attention(self, spans: Spans):
        """attend(layer, q_THd, k_TKd, v_TKd): each token of a pack sees its row up to itself."""
        ends, lengths = [end for _, _, end in spans], [end - start for _, start, end in spans]
        new, seen = self.places_of(spans), self.places_of([(row, 0, b) for row, _, b in spans])
        cu_seqlens, cu_keys = (
            torch.tensor([0, *accumulate(part)], dtype=torch.int32).to(new.device)
            for part in (lengths, ends)
        )
        keys = Keys(None, cu_keys, max(ends))

        def attend(layer: int, q_THd: torch.Tensor, *kv_TKd: torch.Tensor) -> torch.Tensor:
            rows = (x.flatten(0, 2).index_select(0, seen) for x in self.write(layer, new, *kv_TKd))
            kv = (x.unflatten(0, (-1, kv_TKd[0].shape[1])) for x in rows)
            return varlen_attention(q_THd, *kv, cu_seqlens, max(lengths), causal=True, keys=keys)

        return attend

    def step_attention(self, table_RW: torch.Tensor, cached_R: torch.Tensor):
        """attend(layer, q_RHd, k_RKd, v_RKd): one token more for each row, after cached_R ones.
        table_RW: int32, the pages of each row."""
        length_R = (cached_R + 1).int()
        page_R1 = table_RW.gather(1, (cached_R // self.size)[:, None])
        places = self.places(page_R1[:, 0], cached_R)

        def attend(layer: int, q_RHd: torch.Tensor, *kv_RKd: torch.Tensor) -> torch.Tensor:
            kv_2PKSd = self.write(layer, places, *kv_RKd)
            return paged_attention(q_RHd, *kv_2PKSd, table_RW, length_R)

        return attend


class WidePages(Pages):
    """A pool for a CPU, where no kernel follows a table: a row has one page, as wide as the longest
    row needs. Rows that speak stand side by side, so that a step sees them as one tensor. It grows
    as it must, and never runs out."""

    def reserve(self, row: Row) -> bool:
        more = 0 if self.free or row.pages else max(8, self.num_used)
        wider = max(row.room, self.size * 5 // 4) - self.size if row.room > self.size else 0
        if more or wider:
            self.kv_2LPKSd = F.pad(self.kv_2LPKSd, (0, 0, 0, wider, 0, 0, 0, more))
            self.free += reversed(range(len(self.users), len(self.users) + more))
            self.users = np.pad(self.users, (0, more))
        return super().reserve(row)

    def line_up(self, ready: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
        """Move those that are ready to pages 1, 2, … and let them change places with what was
        there."""
        front, pages = range(1, len(ready) + 1), [row.pages[0] for row in ready]
        far = [page for page in pages if page not in front]
        holes = sorted(set(front) - set(pages))
        goes = np.arange(len(self.users))
        goes[far + holes] = holes + far
        if far:
            self.kv_2LPKSd[:, :, holes + far] = self.kv_2LPKSd[:, :, far + holes]
        self.users, self.free = self.users[goes], goes[self.free].tolist()
        for row in rows:
            row.pages = goes[row.pages].tolist()
        return sorted(ready, key=lambda row: row.pages[0])

    def step_attention(self, table_RW: torch.Tensor, cached_R: torch.Tensor):
        num_rows, longest = len(cached_R), int(cached_R.max()) + 1
        places = self.places(torch.arange(1, num_rows + 1), cached_R)
        mask_RS = torch.zeros(num_rows, longest, dtype=self.kv_2LPKSd.dtype)
        mask_RS.masked_fill_(torch.arange(longest) > cached_R[:, None], float("-inf"))

        def attend(layer: int, q_RHd: torch.Tensor, *kv_RKd: torch.Tensor) -> torch.Tensor:
            kv_2RKSd = self.write(layer, places, *kv_RKd)[:, 1 : num_rows + 1, :, :longest]
            return cached_attention(q_RHd, *kv_2RKSd, mask_RS)

        return attend
