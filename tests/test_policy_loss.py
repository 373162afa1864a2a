"""The fused head and loss against plain float64 autograd with all the logits, and what must hold whatever the numbers."""

import pytest
import torch

from kernels import policy_loss
from kernels.policy_loss import linear_cross_entropy, linear_logprobs, linear_policy_loss
from nanosport.batch import micro_batches, pack
from nanosport.episode import read_records
from nanosport.frames import FrameEncoder
from nanosport.image import ImageConfig
from nanosport.load import load_model, load_tokenizer
from nanosport.loss import token_scale
from nanosport.rollout import Loop, replay

M, D, V = 37, 24, 101  # none a multiple of anything
BANNED = torch.tensor([0, 17, 100])


def inputs(seed: int = 0, rows: int = M) -> dict[str, torch.Tensor]:
    """Old log-probs near the policy's own, so that ratios fall inside the clip range and on both sides of it."""
    g = torch.Generator().manual_seed(seed)
    x = {"hidden": torch.randn(rows, D, generator=g), "weight": torch.randn(V, D, generator=g) * 0.5}
    x["targets"] = torch.randint(1, 17, (rows,), generator=g)
    x["advantages"] = torch.randn(rows, generator=g)
    x["scale"] = torch.rand(rows, generator=g) / max(rows, 1)
    for name in ("old", "ref"):
        logp, _ = linear_logprobs(x["hidden"], x["weight"], x["targets"], 0.7, BANNED)
        x[name] = logp + 0.4 * torch.randn(rows, generator=g)
    return x


def gold(x, old: bool, ref: bool, low=0.2, high=0.2, beta=0.0, temperature=1.0, banned=None, sign=1.0):
    """(loss, dhidden, dweight) in float64, the clip written as the gradient's gate, not as a minimum."""
    x = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    logits = hidden @ weight.T / temperature
    if banned is not None:
        keep = torch.ones(V, dtype=torch.bool)
        keep[banned] = False
        logits = logits.where(keep, torch.tensor(float("-inf"), dtype=torch.float64))
    logp = logits[torch.arange(len(hidden)), x["targets"]] - logits.logsumexp(-1)
    ratio = torch.exp(logp - (x["old"] if old else logp.detach()))
    a = x["advantages"]
    gained = torch.where(a >= 0, a * ratio.clamp(max=1 + high), a * ratio.clamp(min=1 - low))
    loss = -sign * gained
    if ref:
        d = x["ref"] - logp
        loss = loss + beta * (d.exp() - d - 1)
    loss = (loss * x["scale"]).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def ours(x, old: bool, ref: bool, low=0.2, high=0.2, beta=0.0, temperature=1.0, banned=None):
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    loss, stats = linear_policy_loss(
        hidden, weight, x["targets"], x["advantages"], x["old"] if old else None, x["ref"] if ref else None, x["scale"],
        clip_low=low, clip_high=high, beta=beta, temperature=temperature, banned=banned,
    )  # fmt: skip
    loss.backward()
    return (loss.detach(), hidden.grad, weight.grad), stats


OPTIONS = [
    {"old": False, "ref": False},
    {"old": True, "ref": False},
    {"old": True, "ref": False, "low": 0.1, "high": 0.28},
    {"old": False, "ref": True, "beta": 0.3},
    {"old": True, "ref": True, "beta": 0.04, "temperature": 0.7},
    {"old": True, "ref": True, "beta": 0.3, "low": 0.15, "high": 0.35, "temperature": 0.7, "banned": BANNED},
    {"old": False, "ref": False, "temperature": 1.6, "banned": BANNED},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("chunk", [2048, 16, 1])
def test_against_float64_with_all_logits(options, chunk, monkeypatch):
    monkeypatch.setattr(policy_loss, "CHUNK", chunk)
    for seed in range(3):
        x = inputs(seed)
        (got, _), want = ours(x, **options), gold(x, **options)
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


def test_a_wrong_sign_or_clip_is_caught():
    """The comparison above is worth something: it tells these apart."""
    x = inputs()
    right = {"old": True, "ref": True, "beta": 0.1, "temperature": 0.7, "banned": BANNED}
    got, _ = ours(x, **right)
    torch.testing.assert_close(got[1].double(), gold(x, **right)[1], rtol=2e-5, atol=2e-6)
    for change in ({"sign": -1.0}, {"high": 0.3}, {"low": 0.3}, {"old": False}, {"ref": False}, {"temperature": 0.72}, {"banned": None}):
        wrong = gold(x, **(right | change))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got[1].double(), wrong[1], rtol=2e-5, atol=2e-6)


def test_a_step_down_the_loss_makes_good_tokens_likelier():
    x = inputs()
    (_, hidden_grad, _), stats = ours(x, False, False)
    after, _ = linear_logprobs(x["hidden"] - 0.1 * hidden_grad, x["weight"], x["targets"])
    moved = after - stats.logp_M
    assert ((moved > 0) == (x["advantages"] > 0)).all()


def test_clipped_rows_have_no_gradient_and_all_others_have():
    x = inputs()
    (_, hidden_grad, _), stats = ours(x, True, False, temperature=0.7, banned=BANNED)
    up, down = x["advantages"] > 0, x["advantages"] < 0
    clipped = (up & (stats.ratio_M > 1.2)) | (down & (stats.ratio_M < 0.8))
    assert 0 < (clipped & up).sum() and 0 < (clipped & down).sum() and clipped.sum() < M
    assert torch.equal(stats.clipped_M, clipped.float())
    assert (hidden_grad[clipped] == 0).all()
    assert (hidden_grad[~clipped].abs().sum(1) > 0).all()


def test_on_policy_ratio_is_one_and_kl_to_itself_is_zero():
    x = inputs()
    logp, _ = linear_logprobs(x["hidden"], x["weight"], x["targets"])
    _, stats = ours(x | {"ref": logp}, False, True, beta=1.0)
    assert (stats.ratio_M == 1).all() and (stats.clipped_M == 0).all() and (stats.kl_M == 0).all()
    _, stats = ours(x, True, True, beta=1.0)
    assert (stats.kl_M >= 0).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_never_positive(size, dtype):
    x = inputs()
    for banned in (None, BANNED):
        logp, entropy = linear_logprobs((x["hidden"] * size).to(dtype), x["weight"].to(dtype), x["targets"], 0.7, banned)
        assert logp.dtype == torch.float32 and (logp <= 0).all() and logp.isfinite().all()
        assert (entropy >= -1e-5).all() and entropy.isfinite().all()
    sure = torch.full((1, D), 100.0)  # one token takes all the probability
    weight = torch.zeros(V, D)
    weight[5] = 1.0
    assert linear_logprobs(sure, weight, torch.tensor([5]))[0].item() == 0.0


def test_probabilities_sum_to_one_over_what_can_be_sampled():
    x = inputs()
    every = torch.arange(V)
    hidden = x["hidden"][:1].expand(V, -1)
    logp, entropy = linear_logprobs(hidden, x["weight"], every, 0.7, BANNED)
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[BANNED] = False
    assert (logp[~allowed] == float("-inf")).all()
    p = logp[allowed].double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert entropy[0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_no_rows():
    x = inputs(rows=0)
    (loss, hidden_grad, weight_grad), stats = ours(x, True, True, beta=0.1)
    assert loss == 0 and hidden_grad.shape == (0, D) and (weight_grad == 0).all() and len(stats.logp_M) == 0
    loss, logp = linear_cross_entropy(x["hidden"].requires_grad_(), x["weight"].requires_grad_(), x["targets"], x["scale"])
    loss.backward()
    assert loss == 0 and len(logp) == 0


def test_cross_entropy_is_torchs():
    x = inputs()
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, x["targets"], torch.full((M,), 1 / M))
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, x["targets"])
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))):
        torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def trained(nano_folder, arena_folder):
    """(model, encoder, four teacher episodes, with and without a tool call)."""
    model, tokenizer = load_model(nano_folder), load_tokenizer(nano_folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(nano_folder))
    records = sorted(read_records(arena_folder / "trajectories.jsonl"), key=lambda r: len(r[1]))
    return model, encoder, [replay(q, m, encoder, tokenizer, Loop()) for q, m in (*records[:2], *records[-2:])]


def gradients(model, encoder, episodes, max_tokens: int, variant: str | None) -> list[torch.Tensor]:
    """Accumulated over micro-batches as the loops do it: SFT's loss, or the policy loss of a variant."""
    lengths = [sum(e.mask) for e in episodes]
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8])
    model.zero_grad()
    for part in micro_batches([len(e.ids) for e in episodes], max_tokens):
        batch = pack([episodes[k] for k in part], encoder, model.cfg)
        hidden_MD = model.hidden(batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND)[batch.rows_M]
        if variant is None:
            scale_M = torch.full((len(hidden_MD),), 1 / sum(lengths))
            loss, _ = linear_cross_entropy(hidden_MD, model.head_weight_VD, batch.targets_M, scale_M)
        else:
            weigh = torch.tensor([token_scale(variant, lengths[k], len(episodes), sum(lengths), 200) for k in part])
            loss, _ = linear_policy_loss(
                hidden_MD, model.head_weight_VD, batch.targets_M, advantages[part][batch.episode_M],
                None, None, weigh[batch.episode_M], temperature=0.7,
            )  # fmt: skip
        loss.backward()
    return [p.grad.clone() for name, p in model.named_parameters() if not name.startswith("visual.")]


@pytest.mark.parametrize("variant", [None, "grpo", "dapo", "dr_grpo"])
def test_micro_batches_leave_the_gradients_as_they_are(variant, trained):
    model, encoder, episodes = trained
    assert len({len(e.ids) for e in episodes}) > 1
    one, four = gradients(model, encoder, episodes, 1, variant), gradients(model, encoder, episodes, 1 << 20, variant)
    norm = torch.stack([g.norm() for g in four]).norm()
    assert norm > 1e-3
    for a, b in zip(one, four):
        assert (a - b).norm() <= 1e-5 * norm
