"""The fused head and loss, in torch and in Triton's interpreter, against plain autograd over all
the logits in float64."""

import importlib.util
from pathlib import Path

import pytest
import torch

from kernels import policy_loss, policy_row
from kernels.draw import draw
from kernels.policy_loss import (
    Objective,
    TokenInputs,
    fused_linear_cross_entropy,
    fused_linear_policy_loss,
    linear_logprobs,
)
from nanosport.engine import step
from nanosport.env.env import Limits
from nanosport.env.rollout import replay
from nanosport.image import ImageConfig
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.plan.ledger import counting
from nanosport.records import read_records
from nanosport.train import optim
from nanosport.train.deal import deal, make_units
from nanosport.train.pack import pack
from nanosport.train.variants import VARIANTS, token_scale

M, D, V = 37, 24, 101  # none a multiple of anything
BANNED = torch.tensor([0, 17, 100])


@pytest.fixture(params=["torch", "triton"])
def rows_by(request, monkeypatch, rounding):
    """Both implementations of the row; the interpreter walks the 101 columns in blocks of 32."""
    if request.param == "triton":
        monkeypatch.setattr(policy_loss, "torch_rows", policy_row.triton_rows)
        monkeypatch.setattr(policy_row, "BLOCK", 32)
    return request.param


def inputs(
    seed: int = 0, rows: int = M, size: float = 1.0, dtype=torch.float32, temperature=1.0, banned=()
) -> dict[str, torch.Tensor]:
    """Old log-probs near the policy's own, so that ratios fall inside the clip range and on both
    sides of it."""
    g = torch.Generator().manual_seed(seed)
    x = {
        "hidden": torch.randn(rows, D, generator=g) * size,
        "weight": torch.randn(V, D, generator=g) * 0.5,
    }
    x["targets"] = torch.randint(1, 17, (rows,), generator=g)
    x["sequence"] = torch.arange(rows) // 4  # of which all tokens share their advantage and scale
    x["advantages"] = torch.randn(rows, generator=g)[x["sequence"]]
    x["scale"] = (torch.rand(rows, generator=g) / max(rows, 1))[x["sequence"]]
    logits = (x["hidden"] @ x["weight"].T / temperature).index_fill(
        1, torch.as_tensor(banned, dtype=torch.long), -1e30
    )
    logp = logits.log_softmax(-1)[torch.arange(rows), x["targets"]]
    for name in ("old", "ref", "rollout"):
        x[name] = logp + 0.4 * torch.randn(rows, generator=g)
    return x | {name: x[name].to(dtype) for name in ("hidden", "weight")}


def plain(x, objective: Objective, given=(), banned=None, dtype=torch.float64, sign=1.0, shift=0):
    """(loss, dhidden, dweight, logp, entropy) by autograd over all the logits; clips are gates
    here, not minima."""
    narrow = dtype in (
        torch.float16,
        torch.bfloat16,
    )  # products in that type, the row in float32, as is usual
    x = {
        k: v.to(torch.float32 if narrow and k not in ("hidden", "weight") else dtype)
        if v.is_floating_point()
        else v
        for k, v in x.items()
    }
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    logits = (hidden @ weight.T).to(torch.float32 if narrow else dtype) / objective.temperature
    if banned is not None:
        keep = torch.ones(V, dtype=torch.bool)
        keep[banned] = False
        logits = logits.masked_fill(~keep, -1e30)
    log_p = logits.log_softmax(-1)
    logp = log_p[torch.arange(len(hidden)), x["targets"] + shift]
    entropy = -(log_p.exp() * log_p).sum(-1)
    old = x["old"] if "old" in given else logp.detach()
    exponent = logp - old
    if "sequence" in given:
        means = [exponent[x["sequence"] == k].mean() for k in x["sequence"]]
        exponent = torch.stack(means) if means else exponent
    ratio, a = exponent.exp(), x["advantages"]
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.likelihood:
        gain = ratio.detach().clamp(low, high) * a * logp
    else:
        gain = torch.where(a >= 0, a * ratio.clamp(max=high), a * ratio.clamp(min=low))
    if "rollout" in given:
        gain = gain * (old - x["rollout"]).exp().clamp(max=objective.rollout_cap)
    loss = -sign * gain - objective.entropy_bonus * entropy
    if "ref" in given:
        d = x["ref"] - logp
        loss = loss + objective.beta * (d.exp() - d - 1)
    loss = (loss * x["scale"]).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, logp.detach(), entropy.detach()


def token_inputs(x, given) -> TokenInputs:
    """What is known of the rows, but for what is not `given`."""
    names = {"old": "old_logp_M", "ref": "ref_logp_M", "rollout": "sampled_logp_M"}
    names["sequence"] = "sequence_M"
    optional = {names[name]: x[name] for name in given}
    return TokenInputs(x["targets"], x["advantages"], x["scale"], **optional)


def ours(x, objective: Objective, given=(), banned=None):
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    tokens = token_inputs(x, given)
    loss, stats = fused_linear_policy_loss(hidden, weight, tokens, objective, banned)
    loss.backward()
    return (loss.detach(), hidden.grad, weight.grad, stats.logp_M, stats.entropy_M), stats


CASES = {
    "on policy": (Objective(), (), None),
    "old": (Objective(), ("old",), None),
    "clip higher": (Objective(clip_low=0.1, clip_high=0.28), ("old",), None),
    "kl": (Objective(beta=0.3), ("ref",), None),
    "kl, old, temperature": (Objective(0.7, beta=0.04), ("old", "ref"), None),
    "all": (Objective(0.7, 0.15, 0.35, 0.3, 0.1, 1.2), ("old", "ref", "rollout"), BANNED),
    "entropy": (Objective(entropy_bonus=0.5), (), None),
    "importance weight": (Objective(rollout_cap=1.1), ("old", "rollout"), None),
    "importance weight, on policy": (Objective(rollout_cap=1.1), ("rollout",), None),
    "cispo": (Objective(clip_low=0.3, clip_high=0.3, likelihood=True), ("old",), None),
    "cispo, all": (
        Objective(1.6, 1.0, 0.3, 0.2, 0.1, 1.2, likelihood=True),
        ("old", "ref", "rollout"),
        BANNED,
    ),
    "gspo": (Objective(clip_low=0.05, clip_high=0.05), ("old", "sequence"), None),
    "gspo, kl": (Objective(0.7, 0.05, 0.08, 0.3), ("old", "ref", "sequence"), BANNED),
}


def inputs_of(
    case: str, seed: int = 0, rows: int = M, size: float = 1.0, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    objective, _, banned = CASES[case]
    return inputs(seed, rows, size, dtype, objective.temperature, () if banned is None else banned)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1 << 20, 16, 1])
def test_against_float64_with_all_logits(case, chunk, rows_by, monkeypatch):
    monkeypatch.setattr(policy_loss, "chunk_rows", lambda *_: chunk)
    for seed in range(3 if rows_by == "torch" else 1):
        x = inputs_of(case, seed)
        (got, _), want = ours(x, *CASES[case]), plain(x, *CASES[case])
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want).norm().item() / max(want.norm().item(), 1e-12)


@pytest.mark.parametrize(
    "case", ["on policy", "all", "cispo, all", "gspo, kl", "importance weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, size", [(M, 1.0), (1, 1.0), (M, 12.0)], ids=["37 rows", "1 row", "extreme logits"]
)
def test_error_is_at_most_twice_plain_torchs(case, dtype, rows, size, rows_by):
    objective, given, banned = CASES[case]
    worst = {}
    for seed in range(3 if rows > 1 else 10):
        x = inputs_of(case, seed, rows, size, dtype)
        if size > 1:
            assert (x["hidden"].double() @ x["weight"].double().T).abs().max() > 80
        (got, _), want = ours(x, objective, given, banned), plain(x, objective, given, banned)
        usual = plain(x, objective, given, banned, dtype)
        for name, a, b, gold in zip(("loss", "dX", "dW", "logp", "entropy"), got, usual, want):
            assert a.isfinite().all()
            worst.setdefault(name, []).append((error(a, gold), error(b, gold)))
    for name, pairs in worst.items():
        mine, its = (max(p[k] for p in pairs) for k in (0, 1))
        assert mine <= 2 * its + 4 * torch.finfo(torch.float32).eps, (name, mine, its)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences(case):
    """In float64, by torch's own gradcheck. What the loss holds constant (old, cispo's ratio) has
    no gradient to compare."""
    objective, given, banned = CASES[case]
    x = {k: v.double() if v.is_floating_point() else v for k, v in inputs(1, 9).items()}
    logp, _ = linear_logprobs(x["hidden"], x["weight"], x["targets"], objective.temperature, banned)
    if "old" not in given:  # on policy, the constant is today's log-prob
        x["old"], given = logp, (*given, "old")
    if objective.likelihood:  # far above the clip range the ratio is a constant
        x["old"] = logp - 3.0

    def loss(hidden, weight):
        tokens = token_inputs(x, given)
        return fused_linear_policy_loss(hidden, weight, tokens, objective, banned)[0]

    torch.autograd.gradcheck(
        loss,
        (x["hidden"].requires_grad_(), x["weight"].requires_grad_()),
        eps=1e-6,
        atol=1e-7,
        rtol=1e-5,
    )


@pytest.mark.parametrize("case", ["gspo, kl", "all", "cispo, all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [2, 4])
def test_a_chunk_of_several_products(products, dtype, case, rows_by, monkeypatch):
    """Rows' figures do not depend on it, to the bit; and dW no more than on the order of a sum."""
    x, found = inputs_of(case, dtype=dtype), []
    monkeypatch.setattr(policy_loss, "product_rows", lambda *_: 10)
    for held in (10, 10 * products):
        monkeypatch.setattr(policy_loss, "chunk_rows", lambda *_, held=held: held)
        found.append(ours(x, *CASES[case])[0])
    want, usual = plain(x, *CASES[case]), plain(x, *CASES[case], dtype=dtype)
    for number, (one, several, gold, torchs) in enumerate(zip(*found, want, usual)):
        if number != 2:
            torch.testing.assert_close(one, several, rtol=0, atol=0 if number != 1 else 1e-7)
        assert error(several, gold) <= 2 * error(torchs, gold) + 1e-6


def test_a_product_makes_as_many_rows_of_float32_as_it_may(monkeypatch):
    monkeypatch.setitem(policy_loss.PRODUCT_BYTES, "cpu", 80 * 4 * V)
    for dtype in (torch.float32, torch.bfloat16):
        weight_VD = torch.empty(V, D, dtype=dtype)
        assert [policy_loss.product_rows(weight_VD, n) for n in (0, 37, 80, 81, 161)] == [
            1,
            37,
            80,
            41,
            54,
        ]


@pytest.mark.parametrize(
    "free, least, rows",
    [(0, 0, 10), (39, 0, 10), (40, 0, 20), (73, 0, 20), (74, 0, 40), (0, 20, 20), (99, 20, 40)],
)
def test_a_chunk_takes_what_half_of_the_free_memory_holds(free, least, rows, monkeypatch):
    """Of four products of ten rows; three of them would save no chunk over two. free, least: in
    rows."""
    weight_VD = torch.empty(V, D)
    monkeypatch.setattr(policy_loss, "product_rows", lambda *_: 10)
    monkeypatch.setattr(policy_loss, "free_bytes", lambda device: free * V * 4)
    monkeypatch.setitem(policy_loss.CHUNK_BYTES, "cpu", least * V * 4)
    assert policy_loss.chunk_rows(weight_VD, 37) == rows


def test_a_chunk_is_whole_where_a_sum_of_dw_would_take_as_much(monkeypatch):
    weight_VD = torch.empty(V, D, dtype=torch.bfloat16)
    monkeypatch.setattr(policy_loss, "product_rows", lambda *_: 10)
    monkeypatch.setitem(policy_loss.CHUNK_BYTES, "cpu", 20 * V * 2)
    assert policy_loss.chunk_rows(weight_VD, 20 + D) == 50
    assert policy_loss.chunk_rows(weight_VD, 21 + D) == 20
    assert policy_loss.chunk_rows(weight_VD.float(), 20 + D) == 10


def test_on_a_cpu_gradients_lie_over_the_logits_of_one_product():
    weight_VD = torch.empty(1 << 15, 2)
    assert policy_loss.chunk_rows(weight_VD, 1000) == policy_loss.product_rows(weight_VD, 1000) < 70


@pytest.mark.parametrize(
    "free, num_rows, product, held",
    [(0, 8192, 1024, 8192), (0, 16384, 1093, 4372), (1 << 40, 16384, 1093, 16384)],
)
def test_the_heads_memory_on_a_gpu(free, num_rows, product, held, monkeypatch):
    """The 7B's head: a planner counts with the least that is held. A chunk of all rows needs no
    float32 sum of dW."""
    monkeypatch.setattr(policy_loss, "free_bytes", lambda device: free)
    width, vocab = 3584, 152064
    with counting(on_gpu=True) as ledger:
        ledger.enter("inputs")
        hidden = torch.empty(num_rows, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocab, width, dtype=torch.bfloat16, requires_grad=True)
        targets, scale = torch.zeros(num_rows, dtype=torch.long), torch.ones(num_rows)
        ledger.enter("loss")
        loss, _ = fused_linear_cross_entropy(hidden, weight, targets, scale)
        ledger.enter("backward pass")
        loss.backward()
    peak, after = (ledger.peaks[name]["loss"] for name in ("loss", "backward pass"))
    logits, gradients = 4 * product * vocab, 2 * held * vocab
    dweight = (2 if held == num_rows else 4) * vocab * width
    assert peak == pytest.approx(logits + gradients + dweight + 2 * num_rows * width, rel=0.01)
    assert after == pytest.approx(2 * (vocab + num_rows) * width, rel=0.01)
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [3e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("narrow_logits", [False, True])
def test_small_changes_of_the_policy_are_seen_from_bfloat16(
    change, narrow_logits, rows_by, monkeypatch
):
    """Ratio and k3 of inputs in bfloat16 against float64, at logits of 16 to 32; logits rounded to
    bfloat16 show changes that are not there."""
    torch.manual_seed(0)
    hidden = torch.randn(200, D)
    weight = (torch.randn(V, D) * 6).bfloat16()
    after = (hidden + change / 6 * torch.randn(200, D)).bfloat16()
    before, targets = hidden.bfloat16(), torch.randint(V, (200,))
    if narrow_logits:
        exact = policy_loss.float_logits
        monkeypatch.setattr(
            policy_loss,
            "float_logits",
            lambda h, w, out: out.copy_(exact(h, w).bfloat16()),
        )
    gold = [
        (h.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        for h in (before, after)
    ]
    ref, _ = linear_logprobs(before, weight, targets)
    x = {"hidden": after, "weight": weight, "targets": targets, "old": ref, "ref": ref}
    x |= {"advantages": torch.ones(200), "scale": torch.ones(200)}
    _, stats = ours(x, Objective(beta=0.1), ("old", "ref"))
    moved = gold[1] - gold[0]
    k3 = (-moved).expm1() + moved
    ratio_error = (stats.ratio_M.double() - moved.exp()).abs().mean() / moved.abs().mean()
    k3_error = (stats.kl_M.double().mean() - k3.mean()).abs() / k3.mean()
    seen = ratio_error < 0.02 and k3_error < 0.02
    assert seen != narrow_logits, (ratio_error, k3_error, moved.abs().mean())


def test_the_sampler_and_the_loss_take_the_same_logits(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, D).bfloat16(), torch.randn(V, D).bfloat16()
    draws = torch.rand(9).double()
    token, logp = draw(step.float_logits(hidden, weight), draws, 0.7, 1.0, BANNED)
    trained, _ = linear_logprobs(hidden, weight, token, 0.7, BANNED)
    torch.testing.assert_close(logp, trained, rtol=1e-6, atol=1e-6)
    z = (hidden.double() @ weight.double().T / 0.7).index_fill(1, BANNED, float("-inf"))
    exact = z.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0, float("nan")])
def test_a_gradient_is_scaled_in_place(scale, dtype, rounding, monkeypatch):
    monkeypatch.setattr(policy_row, "SCALE_BLOCK", 32)
    monkeypatch.setattr(policy_row, "SCALE_PROGRAMS", 3)
    x, given = torch.randn(7, 37).to(dtype), torch.tensor(scale)
    want = x * given.to(dtype) if dtype == torch.float32 else (x.float() * given).to(dtype)
    policy_row.scale_in_place(x, given)
    torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_a_scaled_loss_on_a_gpu(scale, rounding, monkeypatch):
    """As a GPU goes there: the gradients are scaled in place, so a second pass is refused."""
    monkeypatch.setattr(policy_loss, "by_triton", lambda x: x.dtype != torch.float64)
    x, found = inputs(), []
    for dtype in (torch.float32, torch.float64):
        hidden, weight = (x[n].to(dtype, copy=True).requires_grad_() for n in ("hidden", "weight"))
        loss, _ = fused_linear_cross_entropy(hidden, weight, x["targets"], x["scale"])
        (scale * loss).backward(retain_graph=dtype == torch.float32)
        found.append((hidden.grad, weight.grad))
        if dtype == torch.float32:
            again = loss
    for mine, want in zip(*found):
        torch.testing.assert_close(mine.double(), want, rtol=2e-5, atol=2e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()


def test_a_wrong_reference_is_told_apart():
    """The comparisons above are worth something: each setting shows."""
    x = inputs_of("all")
    objective, given, banned = CASES["all"]
    (got, _), right = ours(x, objective, given, banned), plain(x, objective, given, banned)
    torch.testing.assert_close(got[1].double(), right[1], rtol=2e-5, atol=2e-6)
    changed = [
        Objective(*(getattr(objective, f) * (2 if f == g else 1) for f in FIELDS)) for g in FIELDS
    ]
    wrong = [plain(x, o, given, banned) for o in changed]
    wrong += [plain(x, objective, tuple(g for g in given if g != left), banned) for left in given]
    wrong += [
        plain(x, objective, given, None),
        plain(x, objective, given, banned, sign=-1.0),
        plain(x, objective, given, banned, shift=1),
    ]
    assert len(wrong) == 6 + 3 + 3
    for other in wrong:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got[1].double(), other[1], rtol=2e-5, atol=2e-6)


FIELDS = ("temperature", "clip_low", "clip_high", "beta", "entropy_bonus", "rollout_cap")
BUGS = [
    ("policy_row.py", "slope -= beta * (1 - tl.exp(gap))", "slope += beta * (1 - tl.exp(gap))"),
    (
        "policy_row.py",
        "hit_B = (start + columns == target)",
        "hit_B = (start + columns == target + 1)",
    ),
    ("policy_row.py", "tl.load(logits_ptr + target)", "tl.load(logits_ptr + target + 1)"),
    ("policy_row.py", "bonus * spread_B", "-bonus * spread_B"),
    (
        "policy_row.py",
        "slope = tl.where(outside, 0.0, ratio * advantage)",
        "slope = ratio * advantage",
    ),
    ("policy_row.py", "mask=start + columns < V", "mask=start + columns < V - 9"),
    ("policy_row.py", "gap * series", "gap + series"),
    ("policy_row.py", "pull = -scale * slope / temperature", "pull = -scale * slope"),
    ("policy_loss.py", "slope_C = slope_C - objective.beta", "slope_C = slope_C + objective.beta"),
    (
        "policy_loss.py",
        "d_CV.scatter_add_(1, tokens.targets_M[:, None]",
        "d_CV.scatter_add_(1, tokens.targets_M[:, None] + 1",
    ),
    ("policy_loss.py", ".masked_fill(clipped_C, 0.0)", ""),
]


@pytest.mark.parametrize(
    "file, right, wrong", BUGS, ids=[f"{f[7:-3]}: {w or r}" for f, r, w in BUGS]
)
def test_planted_bugs_are_caught(file, right, wrong, tmp_path, monkeypatch):
    source = Path(policy_loss.__file__).with_name(file).read_text()
    assert source.count(right) >= 1
    (tmp_path / file).write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / file)
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.import_module("sys").modules, "planted", planted)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(
        policy_loss,
        "torch_rows",
        planted.triton_rows if file == "policy_row.py" else planted.torch_rows,
    )
    x = inputs_of("all")
    got, want = ours(x, *CASES["all"])[0], plain(x, *CASES["all"])
    with pytest.raises(AssertionError):
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


def test_a_step_down_the_loss_makes_good_tokens_likelier(rows_by):
    x = inputs()
    (_, hidden_grad, *_), stats = ours(x, Objective())
    after, _ = linear_logprobs(x["hidden"] - 0.1 * hidden_grad, x["weight"], x["targets"])
    moved = after - stats.logp_M
    assert ((moved > 0) == (x["advantages"] > 0)).all()


def test_clipped_rows_have_no_gradient_and_all_others_have(rows_by):
    x = inputs()
    (_, hidden_grad, *_), stats = ours(x, Objective(), ("old",))
    up, down = x["advantages"] > 0, x["advantages"] < 0
    clipped = (up & (stats.ratio_M > 1.2)) | (down & (stats.ratio_M < 0.8))
    assert 0 < (clipped & up).sum() and 0 < (clipped & down).sum() and clipped.sum() < M
    assert torch.equal(stats.clipped_M, clipped.float())
    assert (hidden_grad[clipped] == 0).all()
    assert (hidden_grad[~clipped].abs().sum(1) > 0).all()


def test_old_and_new_log_probs_are_bitwise_equal_on_policy(rows_by):
    x = inputs(rows=M)
    for objective in (Objective(beta=1.0), Objective(0.7, beta=1.0)):
        logp, entropy = linear_logprobs(
            x["hidden"], x["weight"], x["targets"], objective.temperature
        )
        (_, *_), stats = ours(x | {"old": logp, "ref": logp}, objective, ("old", "ref"))
        assert torch.equal(stats.logp_M, logp) and torch.equal(stats.entropy_M, entropy)
        assert (
            (stats.ratio_M == 1).all() and (stats.clipped_M == 0).all() and (stats.kl_M == 0).all()
        )
    _, stats = ours(x, Objective(beta=1.0), ("old", "ref"))
    assert (stats.kl_M >= 0).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_never_positive(size, dtype, rows_by):
    x = inputs()
    for banned in (None, BANNED):
        logp, entropy = linear_logprobs(
            (x["hidden"] * size).to(dtype), x["weight"].to(dtype), x["targets"], 0.7, banned
        )
        assert logp.dtype == torch.float32 and (logp <= 0).all() and logp.isfinite().all()
        assert (entropy >= -1e-5).all() and entropy.isfinite().all()
    sure = torch.full((1, D), 100.0)  # one token takes all the probability
    weight = torch.zeros(V, D)
    weight[5] = 1.0
    assert linear_logprobs(sure, weight, torch.tensor([5]))[0].item() == 0.0


def test_probabilities_sum_to_one_over_what_can_be_sampled(rows_by):
    x = inputs()
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[BANNED] = False
    every = torch.arange(V)[allowed]
    hidden = x["hidden"][:1].expand(len(every), -1)
    logp, entropy = linear_logprobs(hidden, x["weight"], every, 0.7, BANNED)
    p = logp.double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert entropy[0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_no_rows(rows_by):
    """A rank without action rows still takes part in the backward pass."""
    x = inputs(rows=0)
    (loss, hidden_grad, weight_grad, *_), stats = ours(
        x, Objective(beta=0.1), ("old", "ref", "sequence")
    )
    assert (
        loss == 0
        and hidden_grad.shape == (0, D)
        and (weight_grad == 0).all()
        and len(stats.logp_M) == 0
    )
    loss, logp = fused_linear_cross_entropy(
        x["hidden"].requires_grad_(), x["weight"].requires_grad_(), x["targets"], x["scale"]
    )
    loss.backward()
    assert loss == 0 and len(logp) == 0


def test_a_clipped_ratio_may_overflow(rows_by):
    """old far below: the ratio is infinite, the row clipped, its gradient zero and not ∞·0."""
    x = inputs()
    x["old"], x["advantages"] = torch.full((M,), -200.0), torch.ones(M)
    (loss, hidden_grad, *_), stats = ours(x, Objective(), ("old",))
    assert loss.isfinite() and (stats.clipped_M == 1).all() and (hidden_grad == 0).all()


def test_nan_is_not_hidden(rows_by):
    x = inputs()
    x["hidden"][3, 0] = float("nan")
    (loss, *_), stats = ours(x, Objective(beta=0.1), ("old", "ref"))
    assert loss.isnan() and stats.logp_M[3].isnan() and stats.logp_M.isnan().sum() == 1


def test_strided_row_vectors(rows_by):
    x = inputs()
    x["scale"] = torch.tensor(1 / M).expand(M)
    (got, _), want = ours(x, Objective(), ("old",)), plain(x, Objective(), ("old",))
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-5, atol=2e-6)


def test_rows_of_scale_zero_have_no_gradient(rows_by):
    x = inputs()
    x["scale"] = x["scale"] * (torch.arange(M) % 2)
    (_, hidden_grad, *_), _ = ours(x, *CASES["all"])
    assert (hidden_grad[::2] == 0).all() and (hidden_grad[1::2].abs().sum(1) > 0).all()


def test_only_the_gradients_asked_for_are_made(rows_by):
    x = inputs()
    for names in (("hidden",), ("weight",), ("hidden", "weight")):
        leaves = {n: x[n].clone().requires_grad_(n in names) for n in ("hidden", "weight")}
        loss, _ = fused_linear_cross_entropy(
            leaves["hidden"], leaves["weight"], x["targets"], x["scale"]
        )
        (3 * loss).backward()
        both = [x[n].clone().requires_grad_() for n in ("hidden", "weight")]
        (
            3
            * (
                -(both[0] @ both[1].T).log_softmax(-1)[torch.arange(M), x["targets"]] * x["scale"]
            ).sum()
        ).backward()
        for name, leaf, want in zip(leaves, leaves.values(), both):
            if name in names:
                torch.testing.assert_close(leaf.grad, want.grad, rtol=2e-5, atol=2e-6)
            else:
                assert leaf.grad is None


@pytest.fixture(scope="module")
def trained(nano_folder, arena_folder):
    """(model, encoder, four teacher episodes, with and without a tool call)."""
    model, tokenizer = load_model(nano_folder), load_tokenizer(nano_folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(nano_folder))
    records = sorted(read_records(arena_folder / "trajectories.jsonl"), key=lambda r: len(r[1]))
    return (
        model,
        encoder,
        [replay(q, m, encoder, tokenizer, Limits()) for q, m in (*records[:2], *records[-2:])],
    )


def gradients(model, encoder, episodes, max_tokens: int, variant: str | None) -> list[torch.Tensor]:
    """Accumulated over micro-batches as the loops do it: SFT's loss, or the policy loss of a
    variant."""
    lengths = [sum(e.mask) for e in episodes]
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8])
    model.zero_grad()
    units = make_units(episodes, 1, [0] * len(episodes), model.cfg, max_tokens, share_prefix=True)
    ((parts,), _) = deal(units, 1, max_tokens, frozen_vision=True)
    for part in parts:
        batch = pack([episodes[k] for k in part], encoder, model.cfg)
        hidden_MD = model.hidden(
            batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys
        )[batch.rows_M]
        if variant is None:
            scale_M = torch.full((len(hidden_MD),), 1 / sum(lengths))
            loss, _ = fused_linear_cross_entropy(
                hidden_MD, model.head_weight_VD, batch.targets_M, scale_M
            )
        else:
            weigh = torch.tensor(
                [token_scale(variant, lengths[k], len(episodes), sum(lengths), 200) for k in part]
            )
            weights_M = advantages[part][batch.episode_M], weigh[batch.episode_M]
            tokens = TokenInputs(batch.targets_M, *weights_M)
            loss, _ = fused_linear_policy_loss(
                hidden_MD, model.head_weight_VD, tokens, Objective(0.7)
            )
        loss.backward()
    return [
        p.grad.clone() for name, p in model.named_parameters() if not name.startswith("visual.")
    ]


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_micro_batches_leave_the_gradients_as_they_are(variant, trained):
    model, encoder, episodes = trained
    assert len({len(e.ids) for e in episodes}) > 1
    one, four = (
        gradients(model, encoder, episodes, 1, variant),
        gradients(model, encoder, episodes, 1 << 20, variant),
    )
    norm = torch.stack([g.norm() for g in four]).norm()
    assert norm > 1e-3
    for a, b in zip(one, four):
        assert (a - b).norm() <= 1e-5 * norm


def test_twenty_steps_of_the_nano_model_are_those_of_plain_autograd(nano_folder, trained):
    """Same parameters to rounding, by the fused loss and by all logits at once; the tied head gets
    both its gradients."""
    _, encoder, episodes = trained
    lengths = [sum(e.mask) for e in episodes]
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8])
    runs = []
    for fused in (True, False):
        model = load_model(nano_folder)
        optim.trainable(model, freeze_vision=True, freeze_projector=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        batch = pack(episodes, encoder, model.cfg)
        scale_M = torch.tensor([token_scale("grpo", n, 4, sum(lengths), 200) for n in lengths])[
            batch.episode_M
        ]
        advantages_M = advantages[batch.episode_M]
        reference_M = None
        for _ in range(20):
            hidden_MD = model.hidden(
                batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys
            )[batch.rows_M]
            if reference_M is None:
                reference_M, _ = linear_logprobs(hidden_MD, model.head_weight_VD, batch.targets_M)
            if fused:
                tokens = TokenInputs(batch.targets_M, advantages_M, scale_M, ref_logp_M=reference_M)
                loss, _ = fused_linear_policy_loss(
                    hidden_MD, model.head_weight_VD, tokens, Objective(beta=0.1)
                )
            else:
                log_p_MV = (hidden_MD @ model.head_weight_VD.T).log_softmax(-1)
                logp_M = log_p_MV.gather(1, batch.targets_M[:, None])[:, 0]
                d_M = reference_M - logp_M
                loss = (
                    scale_M
                    * (
                        0.1 * (d_M.exp() - d_M - 1)
                        - advantages_M * (logp_M - logp_M.detach()).exp()
                    )
                ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    start = dict(load_model(nano_folder).named_parameters())
    moved = torch.stack([(p - start[n]).norm() for n, p in runs[0].items()]).norm()
    apart = torch.stack([(p - runs[1][n]).norm() for n, p in runs[0].items()]).norm()
    assert moved > 0.01 and apart < 1e-4 * moved, (moved, apart)
