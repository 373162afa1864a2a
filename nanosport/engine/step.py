"""A decoding step: one token more for each row that speaks.

All that a step needs lies on the device and is moved on there: its tokens are the next step's
input. On a GPU the step is a CUDA graph, one for each number of rows in a ladder, so that a step is
one launch, and nothing is copied to the device until the rows change.

Letters: R rows, W pages a row at most, V vocabulary, T tokens a turn.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.policy_loss import float_logits
from nanosport.engine.pages import Pages
from nanosport.engine.sampler import Sampling
from nanosport.model.qwen2_5_vl import Qwen25VL, mrope_cos_sin, mrope_tables


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


class Graphs:
    """What the CUDA graphs of a sampler share: their memory, and the stream they are captured on,
    whose workspaces are then made once."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


class Step:
    """The step of up to R rows."""

    def __init__(
        self,
        model: Qwen25VL,
        pages: Pages,
        sampling: Sampling,
        banned: torch.Tensor,
        num_rows: int,
        width: int,
    ):
        """width: the pages that a row can have."""
        self.model, self.pages, self.sampling, self.banned = model, pages, sampling, banned
        self.device = model.head_weight_VD.device
        self.tables = mrope_tables(model.cfg, self.device)
        zeros = {"dtype": torch.long, "device": self.device}
        self.state_5R = torch.zeros(5, num_rows, **zeros)
        """Next input token, its position, the tokens before it, draws used, 1 where a row
        speaks."""
        self.table_RW = torch.zeros(num_rows, width, dtype=torch.int32, device=self.device)
        num_draws = sampling.max_new_tokens + 1  # a step may be launched ahead of a turn's end
        self.draws_RT = torch.zeros(num_rows, num_draws, dtype=torch.float64, device=self.device)
        self.out_2R = torch.zeros(2, num_rows, dtype=torch.float64, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.table_RW.shape)

    def load(self, states: Sequence[tuple], tables: Sequence[list[int]], draws: Sequence) -> None:
        """Take these rows: (token, position, cached tokens, draws used) each, their pages, and what
        their turn draws. The slots that are left write to page 0."""
        (num_rows, width), used = self.shape, len(states)
        state = np.zeros((5, num_rows), dtype=np.int64)
        state[:4, :used], state[4, :used] = np.array(states).T, 1
        table = np.zeros((num_rows, width), dtype=np.int32)
        for row, pages in enumerate(tables):
            table[row, : len(pages)] = pages
        self.state_5R.copy_(torch.from_numpy(state))
        self.table_RW.copy_(torch.from_numpy(table))
        self.draws_RT[:used].copy_(torch.from_numpy(np.stack(draws)))

    def capture(self, graphs: Graphs) -> None:
        """Make a CUDA graph of the step."""
        graphs.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(graphs.stream):  # compiles kernels, lets cuBLAS take what it needs
            self.run()
        torch.cuda.current_stream().wait_stream(graphs.stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads (NCCL has one) may ask the card things that a capture forbids its own
        how = {"pool": graphs.pool, "stream": graphs.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.graph, **how):
            self.run()

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
        size, model = self.pages.size, self.model
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
        next_R, logp_R = draw(logits_RV, draw_R, self.sampling, self.banned)
        self.out_2R[0], self.out_2R[1] = next_R, logp_R
        token_R.copy_(next_R)
        self.state_5R[1:4] += speaks_R


def draw(logits_RV, draw_R, sampling: Sampling, banned: torch.Tensor) -> tuple:
    """(token_R, logp_R): the inverse of the cumulative distribution at draw_R ∈ [0, 1)."""
    temperature, top_p = sampling.temperature, sampling.top_p
    logits_RV = (logits_RV / (temperature or 1.0)).index_fill(1, banned, float("-inf"))
    log_p_RV = logits_RV.log_softmax(-1)
    if temperature == 0:
        token_R = log_p_RV.argmax(-1)
        return token_R, log_p_RV.gather(1, token_R[:, None])[:, 0]

    # top-p: only the most likely tokens, the first of which reach that probability together
    p_RV = log_p_RV.double().exp()
    if top_p < 1:
        sorted_RV, order_RV = p_RV.sort(dim=-1, descending=True, stable=True)
        outside_RV = sorted_RV.cumsum(-1) - sorted_RV >= top_p
        outside_RV = torch.empty_like(outside_RV).scatter_(1, order_RV, outside_RV)
        p_RV = p_RV.masked_fill(outside_RV, 0.0)

    # a draw below the total meets a token with a probability above 0: banned ones add nothing
    cumulative_RV = p_RV.cumsum(-1)
    total_R1 = cumulative_RV[:, -1:]
    point_R1 = (draw_R[:, None] * total_R1).minimum(total_R1 * (1 - 1e-12))
    token_R = torch.searchsorted(cumulative_RV, point_R1, right=True)[:, 0]
    token_R = token_R.clamp(max=logits_RV.shape[1] - 1)  # of NaN comes an id that is not there
    return token_R, log_p_RV.gather(1, token_R[:, None])[:, 0]
