"""A decoding step: one token more for each row that speaks.

All that a step needs lies on the device and is moved on there: its tokens are the next step's
input. On a GPU the step is a CUDA graph, one for each number of rows in a ladder, so that a step is
one launch, and nothing is copied to the device until the rows change.

Letters: R rows, W pages a row at most, V vocabulary, T tokens a turn.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.draw import draw
from kernels.policy_loss import float_logits
from nanosport.engine.pages import Pages
from nanosport.engine.row import Row
from nanosport.engine.sampler import Sampling
from nanosport.model.decoder import VLModel, mrope_cos_sin, mrope_tables


class Step:
    """The step of up to R rows.

    Its graphs share their memory, and the stream they are captured on, whose workspaces are then
    made once.
    """

    def __init__(
        self, model: VLModel, sampling: Sampling, banned: torch.Tensor, pages: Pages, shape
    ):
        """shape: (rows, pages that one of them can have)."""
        (num_rows, width), device = shape, model.head_weight_VD.device
        self.model, self.pages, self.sampling, self.banned = model, pages, sampling, banned
        self.tables = mrope_tables(model.cfg, device)
        self.state_5R = torch.zeros(5, num_rows, dtype=torch.long, device=device)
        """Next input token, its position, the tokens before it, draws used, 1 where a row
        speaks."""
        self.table_RW = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        num_draws = sampling.max_new_tokens + 1  # a step may be launched ahead of a turn's end
        self.draws_RT = torch.zeros(num_rows, num_draws, dtype=torch.float64, device=device)
        self.out_2R = torch.zeros(2, num_rows, dtype=torch.float64, device=device)
        self.num_rows = num_rows
        self.graphs: dict[int, Callable[[], None]] = {}
        self.pool, self.stream = None, None

    def load(self, rows: Sequence[Row], as_graph: bool) -> None:
        """Take these rows. The slots that a graph has beside them write to page 0."""
        self.num_rows = ladder(len(rows)) if as_graph else len(rows)
        if as_graph and self.num_rows not in self.graphs:
            self.graphs[self.num_rows] = self.capture()
        state = np.zeros(self.state_5R.shape, dtype=np.int64)
        table = np.zeros(self.table_RW.shape, dtype=np.int32)
        for r, row in enumerate(rows):
            position = row.positions_3T[0, row.length]  # of text: the same on all axes
            state[:, r] = row.ids[-1], position, row.length, len(row.sampled_logp), 1
            table[r, : len(row.pages)] = row.pages
        draws = np.stack([row.draws for row in rows])
        self.state_5R.copy_(torch.from_numpy(state))
        self.table_RW.copy_(torch.from_numpy(table))
        self.draws_RT[: len(rows)].copy_(torch.from_numpy(draws))

    def capture(self) -> Callable[[], None]:
        """Make a CUDA graph of the step, and return what launches it. Rows must be loaded after."""
        self.state_5R.zero_()  # the first run is a real one: it writes to page 0 alone
        self.table_RW.zero_()
        if self.stream is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # compiles kernels, lets cuBLAS take what it needs
            self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # other threads (NCCL has one) may ask the card things that a capture forbids its own
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **how):
            self.run()
        return graph.replay

    def launch(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """(out_2R on the host: tokens and log-probs; the event after which they are there)."""
        self.graphs.get(self.num_rows, self.run)()
        out_2R = self.out_2R.to("cpu", non_blocking=True, copy=True)
        on_gpu = self.out_2R.is_cuda
        return out_2R, torch.cuda.current_stream().record_event() if on_gpu else None

    @torch.no_grad()
    def run(self) -> None:
        """Compute the input tokens, draw the next ones, and make them the input."""
        rows, model, how = slice(self.num_rows), self.model, self.sampling
        token_R, position_R, cached_R, drawn_R, speaks_R = self.state_5R[:, rows]
        attend = self.pages.step_attention(self.table_RW[rows], cached_R)
        x_RD = model.model.embed_tokens(token_R)
        cos_sin = mrope_cos_sin(position_R.expand(3, -1), self.tables, x_RD.dtype)
        hidden_RD = model.run_layers(x_RD, cos_sin, attend)

        logits_RV = float_logits(hidden_RD, model.head_weight_VD)
        draw_R = self.draws_RT[rows].gather(1, drawn_R[:, None])[:, 0]
        next_R, logp_R = draw(logits_RV, draw_R, how.temperature, how.top_p, self.banned)
        self.out_2R[0, rows], self.out_2R[1, rows] = next_R, logp_R
        token_R.copy_(next_R)
        self.state_5R[1:4, rows] += speaks_R


def ladder(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …"""
    power = 1 << max(0, (count - 1).bit_length())
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
