"""The keys and values of every row: pages of one pool, and a table of pages for each row.

Members of a group share the pages that their prompt fills. A page that is not full belongs to one
row alone, so nothing is ever written into a shared one. Page 0 is nobody's: slots of a step that no
row uses write there.

Letters: L layers, P pages, S tokens a page, K key/value heads, d head width, R rows of a step.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.attention import cached_attention
from kernels.paged_attention import paged_attention
from nanosport.model.qwen2_5_vl import ModelConfig

PAGE = 64
"""Tokens a page on a GPU."""


class Cached:
    """What a row has in the cache."""

    def __init__(self):
        self.pages: list[int] = []
        self.length = 0
        """So many of its tokens are computed."""


class Pages:
    """A pool of a fixed size."""

    def __init__(self, cfg: ModelConfig, num_pages: int, size: int, device, dtype: torch.dtype):
        """size: tokens a page."""
        shape = cfg.num_hidden_layers, num_pages + 1, cfg.num_key_value_heads, size, cfg.head_dim
        self.k_LPKSd = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LPKSd = torch.zeros(shape, device=device, dtype=dtype)
        self.users = np.zeros(num_pages + 1, dtype=np.int64)
        self.free = list(range(num_pages, 0, -1))

    @staticmethod
    def page_bytes(cfg: ModelConfig, size: int, dtype: torch.dtype) -> int:
        width = cfg.num_key_value_heads * cfg.head_dim
        return 2 * cfg.num_hidden_layers * size * width * dtype.itemsize

    @property
    def size(self) -> int:
        return self.k_LPKSd.shape[3]

    @property
    def num_used(self) -> int:
        return len(self.users) - 1 - len(self.free)

    def reserve(self, row: Cached, length: int) -> bool:
        """Give a row room for `length` tokens; False, and nothing changed, where there is none."""
        needed = -(-length // self.size) - len(row.pages)
        if needed > len(self.free):
            return False
        taken = [self.free.pop() for _ in range(needed)]
        self.users[taken] = 1
        row.pages += taken
        return True

    def fork(self, row: Cached, source: Cached, shared: int, length: int) -> bool:
        """Let an empty row begin with the first `shared` tokens of `source`, and have room for
        `length`; False, and nothing changed, where there is none."""
        whole, rest = divmod(shared, self.size)
        row.pages = source.pages[:whole]
        self.users[row.pages] += 1
        if not self.reserve(row, length):
            self.release(row)
            return False
        if rest:
            to, origin = row.pages[whole], source.pages[whole]
            for x_LPKSd in (self.k_LPKSd, self.v_LPKSd):
                x_LPKSd[:, to, :, :rest] = x_LPKSd[:, origin, :, :rest]
        row.length = shared
        return True

    def release(self, row: Cached) -> None:
        """Take a row's pages back."""
        self._give_back(row.pages)
        row.pages, row.length = [], 0

    def _give_back(self, pages: list[int]) -> None:
        self.users[pages] -= 1
        self.free += [page for page in reversed(pages) if self.users[page] == 0]

    def slots(self, spans: Sequence[tuple[Cached, int, int]]) -> torch.Tensor:
        """Where the tokens start … end − 1 of these rows lie: page · S + place in it."""
        parts = []
        for row, start, end in spans:
            at = np.arange(start, end)
            parts.append(np.array(row.pages)[at // self.size] * self.size + at % self.size)
        return torch.from_numpy(np.concatenate(parts)).to(self.k_LPKSd.device)

    def places(self, slots_T: torch.Tensor) -> torch.Tensor:
        """Where the key heads of these slots lie among all rows of width d; (T·K,)."""
        heads = torch.arange(self.k_LPKSd.shape[2], device=slots_T.device)
        page_T, at_T = slots_T // self.size, slots_T % self.size
        return ((page_T[:, None] * len(heads) + heads) * self.size + at_T[:, None]).flatten()

    def write(self, layer: int, places: torch.Tensor, k_TKd, v_TKd) -> None:
        for x_LPKSd, new_TKd in ((self.k_LPKSd, k_TKd), (self.v_LPKSd, v_TKd)):
            x_LPKSd[layer].flatten(0, 2).index_copy_(0, places, new_TKd.flatten(0, 1))

    def read(self, layer: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_TKd, v_TKd) in these places."""
        heads = self.k_LPKSd.shape[2]
        pools = self.k_LPKSd[layer], self.v_LPKSd[layer]
        return tuple(
            pool.flatten(0, 2).index_select(0, places).unflatten(0, (-1, heads)) for pool in pools
        )

    def line_up(self, rows: Sequence[Cached]) -> list[Cached]:
        """The rows in the order in which a step can take them."""
        return list(rows)

    def attention(self, table_RW: torch.Tensor, length_R: torch.Tensor):
        """attend(layer, q_RHd) over the first length_R tokens of each row. table_RW: int32, the
        pages of each row."""

        def attend(layer: int, q_RHd: torch.Tensor) -> torch.Tensor:
            kv = self.k_LPKSd[layer], self.v_LPKSd[layer]
            return paged_attention(q_RHd, *kv, table_RW, length_R)

        return attend


class WidePages(Pages):
    """A pool for a CPU, where no kernel follows a table: a row has one page, as wide as the longest
    row needs. Rows that speak stand side by side, so that a step sees them as one tensor. It grows
    as it must, and never runs out."""

    def __init__(self, cfg: ModelConfig, device, dtype: torch.dtype):
        super().__init__(cfg, 0, 0, device, dtype)
        self.rows: set[Cached] = set()

    def reserve(self, row: Cached, length: int) -> bool:
        more_pages = 0 if self.free or row.pages else max(8, self.num_used)
        wider = max(length, self.size * 5 // 4) - self.size if length > self.size else 0
        if more_pages or wider:
            extra = (0, 0, 0, wider, 0, 0, 0, more_pages)
            self.k_LPKSd = torch.nn.functional.pad(self.k_LPKSd, extra)
            self.v_LPKSd = torch.nn.functional.pad(self.v_LPKSd, extra)
            first = len(self.users)
            self.users = np.pad(self.users, (0, more_pages))
            self.free += reversed(range(first, first + more_pages))
        self.rows.add(row)
        return super().reserve(row, length)

    def release(self, row: Cached) -> None:
        self.rows.discard(row)
        super().release(row)

    def line_up(self, rows: Sequence[Cached]) -> list[Cached]:
        """Move the rows to pages 1, 2, … and let them change places with what was there."""
        front = range(1, len(rows) + 1)
        far = [row.pages[0] for row in rows if row.pages[0] not in front]
        holes = sorted(set(front) - {row.pages[0] for row in rows})
        for x_LPKSd in (self.k_LPKSd, self.v_LPKSd) if far else ():
            x_LPKSd[:, holes], x_LPKSd[:, far] = x_LPKSd[:, far], x_LPKSd[:, holes]
        goes = np.arange(len(self.users))
        goes[far], goes[holes] = holes, far
        self.users, self.free = self.users[goes], goes[self.free].tolist()
        for row in self.rows:
            row.pages = goes[row.pages].tolist()
        return sorted(rows, key=lambda row: row.pages[0])

    def attention(self, table_RW: torch.Tensor, length_R: torch.Tensor):
        rows, longest = slice(1, len(length_R) + 1), int(length_R.max())
        unseen_RS = torch.arange(longest) >= length_R[:, None]
        mask_RS = torch.zeros(unseen_RS.shape, dtype=self.k_LPKSd.dtype)
        mask_RS = mask_RS.masked_fill_(unseen_RS, float("-inf"))

        def attend(layer: int, q_RHd: torch.Tensor) -> torch.Tensor:
            kv = (x[layer, rows, :, :longest] for x in (self.k_LPKSd, self.v_LPKSd))
            return cached_attention(q_RHd, *kv, mask_RS)

        return attend
