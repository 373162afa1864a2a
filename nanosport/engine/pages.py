"""The keys and values of every row: pages of one pool, and a table of pages for each row.

Members of a group share the pages that their prompt fills. A page that is not full belongs to one
row alone, so nothing is ever written into a shared one. Page 0 is nobody's: slots of a step that no
row uses write there.

Letters: L layers, P pages, S tokens a page, K key/value heads, d head width, R rows of a step.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kernels.attention import cached_attention
from kernels.paged_attention import paged_attention
from nanosport.engine.row import Row
from nanosport.model.decoder import ModelConfig

PAGE = 64
"""Tokens a page on a GPU."""


class Pages:
    """A pool of a fixed size."""

    def __init__(self, cfg: ModelConfig, num_pages: int, size: int, device, dtype: torch.dtype):
        """size: tokens a page."""
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
        if source is not None:
            row.pages = source.pages[:whole]
            self.users[row.pages] += 1
        needed = -(-row.room // self.size) - len(row.pages)
        if needed > len(self.free):
            if source is not None:
                self.release(row)
            return False
        taken = [self.free.pop() for _ in range(needed)]
        self.users[taken] = 1
        row.pages += taken
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

    def slots(self, spans: Sequence[tuple[Row, int, int]]) -> torch.Tensor:
        """Where the tokens start … end − 1 of these rows lie: page · S + place in it."""
        parts = []
        for row, start, end in spans:
            at = np.arange(start, end)
            parts.append(np.array(row.pages)[at // self.size] * self.size + at % self.size)
        return torch.from_numpy(np.concatenate(parts)).to(self.kv_2LPKSd.device)

    def places(self, slots_T: torch.Tensor) -> torch.Tensor:
        """Where the key heads of these slots lie among all rows of width d; (T·K,)."""
        heads = torch.arange(self.kv_2LPKSd.shape[3], device=slots_T.device)
        page_T, at_T = slots_T // self.size, slots_T % self.size
        return ((page_T[:, None] * len(heads) + heads) * self.size + at_T[:, None]).flatten()

    def write(self, layer: int, places: torch.Tensor, k_TKd, v_TKd) -> None:
        for x_PKSd, new_TKd in zip(self.kv_2LPKSd[:, layer], (k_TKd, v_TKd)):
            x_PKSd.flatten(0, 2).index_copy_(0, places, new_TKd.flatten(0, 1))

    def read(self, layer: int, places: torch.Tensor) -> list[torch.Tensor]:
        """[k_TKd, v_TKd] in these places."""
        parts = [x.flatten(0, 2).index_select(0, places) for x in self.kv_2LPKSd[:, layer]]
        return [part.unflatten(0, (-1, self.kv_2LPKSd.shape[3])) for part in parts]

    def line_up(self, ready: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
        """The rows that are ready, in the order in which a step can take them. rows: all."""
        return list(ready)

    def attention(self, table_RW: torch.Tensor, length_R: torch.Tensor):
        """attend(layer, q_RHd) over the first length_R tokens of each row. table_RW: int32, the
        pages of each row."""

        def attend(layer: int, q_RHd: torch.Tensor) -> torch.Tensor:
            return paged_attention(q_RHd, *self.kv_2LPKSd[:, layer], table_RW, length_R)

        return attend


class WidePages(Pages):
    """A pool for a CPU, where no kernel follows a table: a row has one page, as wide as the longest
    row needs. Rows that speak stand side by side, so that a step sees them as one tensor. It grows
    as it must, and never runs out."""

    def __init__(self, cfg: ModelConfig, device, dtype: torch.dtype):
        super().__init__(cfg, 0, 0, device, dtype)

    def reserve(self, row: Row) -> bool:
        more_pages = 0 if self.free or row.pages else max(8, self.num_used)
        wider = max(row.room, self.size * 5 // 4) - self.size if row.room > self.size else 0
        if more_pages or wider:
            extra = (0, 0, 0, wider, 0, 0, 0, more_pages)
            self.kv_2LPKSd = torch.nn.functional.pad(self.kv_2LPKSd, extra)
            first = len(self.users)
            self.users = np.pad(self.users, (0, more_pages))
            self.free += reversed(range(first, first + more_pages))
        return super().reserve(row)

    def line_up(self, ready: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
        """Move those that are ready to pages 1, 2, … and let them change places with what was
        there."""
        front = range(1, len(ready) + 1)
        far = [row.pages[0] for row in ready if row.pages[0] not in front]
        holes = sorted(set(front) - {row.pages[0] for row in ready})
        goes = np.arange(len(self.users))
        goes[far], goes[holes] = holes, far
        if far:
            kv_2LPKSd = self.kv_2LPKSd
            kv_2LPKSd[:, :, holes + far] = kv_2LPKSd[:, :, far + holes]
        self.users, self.free = self.users[goes], goes[self.free].tolist()
        for row in rows:
            row.pages = goes[row.pages].tolist()
        return sorted(ready, key=lambda row: row.pages[0])

    def attention(self, table_RW: torch.Tensor, length_R: torch.Tensor):
        rows, longest = slice(1, len(length_R) + 1), int(length_R.max())
        mask_RS = torch.zeros(len(length_R), longest, dtype=self.kv_2LPKSd.dtype)
        mask_RS.masked_fill_(torch.arange(longest) >= length_R[:, None], float("-inf"))

        def attend(layer: int, q_RHd: torch.Tensor) -> torch.Tensor:
            return cached_attention(q_RHd, *self.kv_2LPKSd[:, layer, rows, :, :longest], mask_RS)

        return attend
