"""A decoding step: one token more for each row that speaks.

All that a step needs lies on the device and is moved on there: its tokens are the next step's
input. On a GPU the step is a CUDA graph, one for each number of rows in a ladder, so that a step is
one launch, and nothing is copied to the device until the rows change.

Letters: R rows, W pages a row at most, V vocabulary, T tokens a turn.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.draw import draw
from kernels.policy_loss import float_logits
from nanosport.engine.pages import Pages
from nanosport.engine.row import Row
from nanosport.engine.sampler import Sampling
from nanosport.model.decoder import VLModel, mrope_cos_sin, mrope_tables


class Launched:
    """A step on its way."""

    def __init__(self, out_2R: torch.Tensor):
        self.out_2R, self.event = out_2R.to("cpu", non_blocking=True, copy=True), None
        if out_2R.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> tuple[list[float], list[float]]:
        """(tokens, log-probs), when the step has ended."""
        if self.event is not None:
            self.event.synchronize()
        return tuple(self.out_2R.tolist())


class Step:
    """The step of up to R rows."""

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
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, rows: Sequence[Row]) -> None:
        """Take these rows. The slots that are left write to page 0."""
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

    def launch(self) -> Launched:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run()
        return Launched(self.out_2R)

    @torch.no_grad()
    def run(self) -> None:
        """Compute the input tokens, draw the next ones, and make them the input."""
        token_R, position_R, cached_R, drawn_R, speaks_R = self.state_5R
        size, model, how = self.pages.size, self.model, self.sampling
        page_R1 = self.table_RW.gather(1, (cached_R // size)[:, None])
        places = self.pages.places(page_R1[:, 0] * size + cached_R % size)
        attend_cached = self.pages.attention(self.table_RW, (cached_R + 1).int())

        def attend(layer, q_RHd, k_RKd, v_RKd):
            self.pages.write(layer, places, k_RKd, v_RKd)
            return attend_cached(layer, q_RHd)

        x_RD = model.model.embed_tokens(token_R)
        cos_sin = mrope_cos_sin(position_R.expand(3, -1), self.tables, x_RD.dtype)
        hidden_RD = model.run_layers(x_RD, cos_sin, attend)
        logits_RV = float_logits(hidden_RD, model.head_weight_VD)
        draw_R = self.draws_RT.gather(1, drawn_R[:, None])[:, 0]
        next_R, logp_R = draw(logits_RV, draw_R, how.temperature, how.top_p, self.banned)
        self.out_2R[0], self.out_2R[1] = next_R, logp_R
        token_R.copy_(next_R)
        self.state_5R[1:4] += speaks_R


class Steps:
    """The steps of a sampler. On a GPU few sizes serve any number of rows, each with a CUDA graph;
    the graphs share their memory, and the stream they are captured on, whose workspaces are then
    made once."""

    def __init__(self, model: VLModel, sampling: Sampling, banned: torch.Tensor):
        self.how, self.width = (model, sampling, banned), 64
        self.drop()

    def drop(self) -> None:
        """Forget them: the pages that they read go."""
        self.captured: dict[tuple[int, int], Step] = {}
        self.pool, self.stream = None, None

    def of(self, rows: Sequence[Row], pages: Pages, on_gpu: bool) -> Step:
        """The step of these rows, loaded."""
        shape = len(rows), max(len(row.pages) for row in rows)
        if on_gpu:  # the width only grows, else there would be many graphs
            self.width = max(self.width, ladder(shape[1]))
            shape = ladder(shape[0]), self.width
        step = self.captured.get(shape) or Step(*self.how, pages, shape)
        if on_gpu and shape not in self.captured:
            self.capture(step)
            self.captured[shape] = step
        step.load(rows)
        return step

    def capture(self, step: Step) -> None:
        """Make a CUDA graph of the step."""
        if self.stream is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # compiles kernels, lets cuBLAS take what it needs
            step.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        step.graph = torch.cuda.CUDAGraph()
        # other threads (NCCL has one) may ask the card things that a capture forbids its own
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(step.graph, **how):
            step.run()


def ladder(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …"""
    power = 1 << max(0, (count - 1).bit_length())
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
