"""A token is drawn from its logits, with the log-probability that the trainer computes again.

Letters: R rows, V vocabulary.
"""

import torch


def draw(logits_RV, draw_R, temperature: float, top_p: float, banned: torch.Tensor) -> tuple:
    """(token_R, logp_R): the inverse of the cumulative distribution at draw_R ∈ [0, 1).

    temperature: 0 takes the most likely token. banned: ids that are never drawn. logp_R is that
    before top-p.
    """
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
