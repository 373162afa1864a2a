"""Packing: what episodes begin with alike is computed once, and nothing else changes."""

import sys
from dataclasses import fields, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import attention
from kernels.attention import Keys, varlen_attention
from kernels.policy_loss import (
    Objective,
    TokenInputs,
    fused_linear_policy_loss,
    linear_logprobs,
)
from nanosport.engine.own import OwnSampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Limits
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS
from nanosport.image import ImageConfig
from nanosport.model.decoder import VLModel
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import read_questions
from nanosport.train.pack import MIN_SHARED, pack, prefix_tree
from tests.helpers.fake_card import CARD, FakeCard, move


@pytest.mark.parametrize("seed", range(20))
def test_the_ways_through_the_tree_are_the_sequences(seed):
    rng = np.random.default_rng(seed)
    keys = [rng.integers(2, size=rng.integers(1, 40)) for _ in range(12)]
    keys += [
        np.concatenate([keys[k], rng.integers(2, size=rng.integers(0, 9))])
        for k in rng.integers(12, size=12)
    ]
    shared = int(rng.integers(1, 8))
    nodes, lasts = prefix_tree(keys, shared)
    children = {n.parent for n in nodes}
    for key, last in zip(keys, lasts):
        way = []
        while last is not None:
            way.insert(0, nodes[last])
            last = nodes[last].parent
        assert (
            np.concatenate([keys[n.episode][n.start : n.end] for n in way]).tolist() == key.tolist()
        )
        assert [n.start for n in way] == [0, *(n.end for n in way[:-1])]
    for k, node in enumerate(nodes):
        assert node.end - node.start >= shared or k not in children
        assert node.parent is None or node.parent < k
    assert sum(n.end - n.start for n in nodes) < sum(map(len, keys))


def test_a_tree_of_sequences_that_share_too_little_is_the_plain_packing():
    keys = [np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([1, 2, 3])]
    nodes, lasts = prefix_tree(keys, 4)
    assert [(n.episode, n.start, n.end, n.parent) for n in nodes] == [
        (0, 0, 3, None),
        (1, 0, 3, None),
        (2, 0, 3, None),
    ] and lasts == [0, 1, 2]
    nodes, lasts = prefix_tree(keys, 2)
    assert [(n.episode, n.start, n.end, n.parent) for n in nodes] == [
        (0, 0, 2, None),
        (0, 2, 3, 0),
        (1, 2, 3, 0),
        (2, 2, 3, 0),
    ]
    assert lasts == [1, 2, 3]


def test_attention_behind_a_shared_prefix_is_that_of_whole_sequences():
    g = torch.Generator().manual_seed(0)
    prefix, tails = 7, (1, 5, 5, 3)
    bounds = np.cumsum([0, prefix, *tails])
    spans = [np.arange(a, b) for a, b in zip(bounds, bounds[1:])]
    seen = [spans[0], *(np.concatenate([spans[0], s]) for s in spans[1:])]
    qkv = [
        torch.randn(bounds[-1], h, 8, dtype=torch.float64, generator=g, requires_grad=True)
        for h in (4, 2, 2)
    ]
    weight = torch.randn(bounds[-1], 4, 8, dtype=torch.float64, generator=g)
    out = varlen_attention(
        *qkv, torch.from_numpy(bounds).int(), prefix, causal=True, keys=Keys.of(seen)
    )
    got = torch.autograd.grad((out * weight).sum(), qkv)

    whole, rows = [], 0
    for span, all_seen in zip(spans, seen):
        q, k, v = (x[all_seen] for x in qkv)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / 8**0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        whole.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v)[-len(span) :])
        rows += len(span)
    want = torch.cat(whole)
    torch.testing.assert_close(out, want)
    for mine, its in zip(got, torch.autograd.grad((want * weight).sum(), qkv)):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("knows_gqa", [True, False])
def test_torch_on_cuda_is_called_as_its_version_asks(knows_gqa, monkeypatch):
    """2.13 groups heads itself, 2.11 does not; both take the keys' own bounds."""

    def compute(q, k, v, cu_queries, cu_keys, max_queries, max_keys, *, window_size):
        assert (max_queries, max_keys, window_size) == (5, 8, (-1, 0))
        return attention.sdpa_per_length(q, k, v, (cu_queries, cu_keys), True)

    def groups_heads(*args, enable_gqa=False, **options):
        assert enable_gqa
        return compute(*args, **options)

    def groups_nothing(q, k, v, *args, **options):
        assert q.shape[1] == k.shape[1] == v.shape[1]
        return compute(q, k, v, *args, **options)

    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", groups_heads if knows_gqa else groups_nothing
    )
    q, k, v = (torch.randn(n, h, 8) for n, h in ((8, 4), (13, 2), (13, 2)))
    spans = torch.tensor([0, 3, 8]).int(), torch.tensor([0, 5, 13]).int(), 5, 8
    got = attention.torch_varlen(q, k, v, spans, causal=True)
    torch.testing.assert_close(got, attention.sdpa_per_length(q, k, v, spans, True))


def package(kind: str):
    """The flash_attn_varlen_func of a package: right, or wrong in this way."""

    def compute(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        for longest, bounds in ((max_seqlen_q, cu_seqlens_q), (max_seqlen_k, cu_seqlens_k)):
            assert longest == bounds.diff().max()
        if kind == "raises":
            raise RuntimeError("no kernel image is available")
        if kind == "mask counts from the first key":
            cu_seqlens_k = cu_seqlens_q
        out = attention.sdpa_per_length(q, k, v, (cu_seqlens_q, cu_seqlens_k), causal)
        if kind == "no gradient":
            out = out.detach().requires_grad_()
        return (out, "log-sums") if kind == "right, with log-sums" else out

    return compute


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "four, two, chosen",
    [
        ("right", "right", "FlashAttention 4"),
        ("right, with log-sums", "right", "FlashAttention 4"),
        ("raises", "right", "FlashAttention 2"),
        ("no gradient", "right", "FlashAttention 2"),
        (None, "right", "FlashAttention 2"),
        ("raises", None, "SDPA a segment"),
        (None, None, "SDPA a segment"),
    ],
)
def test_the_fastest_attention_that_is_right_is_chosen(four, two, chosen, causal, monkeypatch):
    """Of packages that are not there, that this card cannot run, or that compute something else."""
    for name, kind in (("flash_attn.cute", four), ("flash_attn", two)):
        module = ModuleType(name)
        if kind is not None:
            module.flash_attn_varlen_func = package(kind)
        monkeypatch.setitem(sys.modules, name, module)
    attention.choose.cache_clear()
    name, function = attention.choose((4, 2, 16), causal, torch.bfloat16, "cpu")
    attention.choose.cache_clear()
    assert name == chosen
    sizes = (73, 160, 160) if causal else (73, 73, 73)
    q, k, v = (torch.randn(n, h, 16) for n, h in zip(sizes, (4, 2, 2)))
    bounds = [torch.tensor([0, 70, n]).int() for n in sizes[:2]]
    out = function(q, k, v, (*bounds, 70, 90 if causal else 70), causal)
    exact = attention.sdpa_per_length(q, k, v, bounds, causal)
    torch.testing.assert_close(out, exact)


def test_the_choice_may_fall_inside_a_layer_that_is_computed_again(monkeypatch):
    """What it keeps for its own backward pass is no part of that layer's."""
    module = ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = package("right")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    attention.choose.cache_clear()
    names = []

    def layer(x):
        names.append(attention.choose((4, 2, 16), True, torch.bfloat16, "cpu")[0])
        return (x * x).sin()

    x = torch.randn(5, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    attention.choose.cache_clear()
    assert set(names) == {"FlashAttention 4"} and x.grad is not None


def test_an_attention_that_is_wrong_beyond_its_first_tile_is_not_taken():
    """Queries after the first 128 give keys and values no gradient here."""

    def wrong(q, k, v, spans, causal):
        right = attention.sdpa_per_length(q, k, v, spans, causal)
        without = attention.sdpa_per_length(q, k.detach(), v.detach(), spans, causal)
        is_near = torch.arange(len(q)) < 128
        return torch.where(is_near[:, None, None], right, without)

    for causal in (True, False):
        assert not attention.is_right(wrong, (4, 2, 16), causal, torch.bfloat16, "cpu")


def test_an_attention_whose_mask_counts_from_the_first_key_is_not_taken():
    compute, heads = package("mask counts from the first key"), (4, 2, 16)

    def wrong(q, k, v, spans, causal):
        return compute(q, k, v, *spans, causal)

    how = heads, True, torch.bfloat16, torch.device("cpu")
    assert attention.is_right(attention.sdpa_per_length, *how) and not attention.is_right(
        wrong, *how
    )


def test_gradients_of_shared_keys_add_up_in_float32():
    """300 gradients of 1 + 2⁻⁷: a bfloat16 sum is rounded each time."""
    x_TKd = torch.randn(3, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    index_S = torch.tensor([0] * 300 + [2])
    taken_SKd = attention.TakeRows.apply(x_TKd, index_S)
    assert torch.equal(taken_SKd, x_TKd[index_S])
    grad_SKd = torch.full_like(taken_SKd, 1 + 2**-7)
    taken_SKd.backward(grad_SKd)
    assert x_TKd.grad[:, 0, 0].tolist() == [302.0, 0.0, 1 + 2**-7]
    plain = torch.zeros(1, 1, dtype=torch.bfloat16)
    for _ in range(300):
        plain += grad_SKd[0, 0, 0]
    assert plain.item() != 302.0, "this test could not fail"


@pytest.fixture(scope="module", params=["taught_folder", "nano_qwen3_folder"])
def folder(request):
    """A model folder of each family."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def groups(taught_folder, arena_folder):
    """Six episodes of each of four questions, over two clips."""
    tokenizer, player = load_tokenizer(taught_folder), load_model(taught_folder)
    sampler = OwnSampler(player, tokenizer, Sampling(0.9, max_new_tokens=48, stops=STOPS))
    questions = read_questions(arena_folder / "rl.jsonl")
    encoder = FrameEncoder(player, ImageConfig.from_folder(taught_folder))
    return rollout(sampler, encoder, [questions[k] for k in (0, 1, 6, 7)], Limits(max_turns=3), 6)


def loss_and_gradients(model, batch, taught: bool):
    hidden_TD = model.hidden(
        batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys
    )
    advantages_M = torch.linspace(-1, 1, 24)[batch.episode_M]
    ref_M = batch.sampled_logp_M - 0.3
    scale_M = torch.full_like(advantages_M, 1 / len(advantages_M))
    tokens = TokenInputs(batch.targets_M, advantages_M, scale_M, ref_logp_M=ref_M)
    loss, stats = fused_linear_policy_loss(
        hidden_TD[batch.rows_M], model.head_weight_VD, tokens, Objective(0.9, beta=0.1)
    )
    model.zero_grad()
    loss.backward()
    return (
        loss.item(),
        stats.logp_M,
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_sharing_the_prefix_changes_neither_loss_nor_gradients(groups, model, folder, frozen):
    """Through the prompt, its frames and (frozen or not) the vision tower."""
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder), frozen)
    alone, shared = (pack(groups, encoder, model.cfg, share_prefix=s) for s in (False, True))
    assert (
        alone.keys is None
        and len(alone.ids_T) == sum(len(e.ids) for e in groups)
        and len(alone.cu_seqlens) == 25
    )
    assert len(shared.ids_T) < 0.5 * len(alone.ids_T) and len(shared.frames) < 0.5 * len(
        alone.frames
    )
    for name in ("targets_M", "episode_M", "sampled_logp_M", "after_image_M"):
        assert torch.equal(getattr(alone, name), getattr(shared, name))
    assert torch.equal(alone.ids_T[alone.rows_M], shared.ids_T[shared.rows_M])
    assert torch.equal(alone.positions_3T[:, alone.rows_M], shared.positions_3T[:, shared.rows_M])
    (loss, logp_M, grads), (its_loss, its_logp_M, its_grads) = (
        loss_and_gradients(model, b, frozen) for b in (alone, shared)
    )
    assert its_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(its_logp_M, logp_M, atol=1e-4, rtol=1e-4)
    assert (
        grads.keys() == its_grads.keys() and any(n.startswith("visual.") for n in grads) != frozen
    )
    for name, grad in grads.items():
        assert (its_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_a_frame_is_known_by_its_video_and_index_not_by_its_tokens(groups, model, folder, tmp_path):
    """The same ids over another video, and over other frames, share only what comes before the
    first frame that differs."""
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder))
    first = groups[0]
    other = next(e for e in groups if e.question.video != first.question.video)
    twins = [
        first,
        replace(first, question=other.question),
        replace(first, frames=(*first.frames[:4], 1, *first.frames[5:])),
    ]
    batch = pack(twins, encoder, model.cfg)
    is_image = np.array(first.ids) == model.cfg.image_token_id
    starts = np.flatnonzero(is_image)[::6]
    assert len(batch.ids_T) == len(first.ids) * 3 - 2 * starts[0] - (starts[4] - starts[0])
    names = [(first.question.clip, i) for i in first.frames]
    assert (
        batch.frames[:4] == tuple(names[:4])
        and (other.question.clip, first.frames[0]) in batch.frames
    )
    with torch.no_grad():
        hidden_TD = model.hidden(
            batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys
        )
        logp_M, _ = linear_logprobs(hidden_TD[batch.rows_M], model.head_weight_VD, batch.targets_M)
        for k, twin in enumerate(twins):
            own = pack([twin], encoder, model.cfg)
            hidden_TD = model.hidden(
                own.ids_T, own.positions_3T, own.cu_seqlens, own.features_ND, own.keys
            )
            want_M, _ = linear_logprobs(hidden_TD[own.rows_M], model.head_weight_VD, own.targets_M)
            torch.testing.assert_close(logp_M[batch.episode_M == k], want_M, atol=1e-4, rtol=1e-4)


def test_episodes_that_are_equal_stand_in_the_batch_once(groups, model, folder):
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder))
    batch, one = (pack([groups[0]] * n, encoder, model.cfg) for n in (3, 1))
    assert batch.ids_T.tolist() == list(groups[0].ids) and batch.keys is None
    assert (
        batch.rows_M.tolist() == one.rows_M.tolist() * 3
        and batch.episode_M.unique().tolist() == [0, 1, 2]
    )


def test_what_is_shared_is_long_enough_to_pay(groups, model, folder):
    batch = pack(groups, FrameEncoder(model, ImageConfig.from_folder(folder)), model.cfg)
    per_key = batch.keys.cu_seqlens.diff() - batch.cu_seqlens.diff()
    assert (per_key[per_key > 0] >= MIN_SHARED).all() and (
        per_key == 0
    ).sum() == 1  # the system's prompt begins them all


def to_card(x):
    """A batch's tensors, or a TokenInputs', on the card."""
    moved = {}
    for field in fields(x):
        value = getattr(x, field.name)
        if isinstance(value, Keys):
            value = to_card(value)
        if (
            isinstance(value, torch.Tensor)
            and field.name != "cu_seqlens"
            or (isinstance(x, Keys) and isinstance(value, torch.Tensor))
        ):
            value = value.to(CARD)
        moved[field.name] = value
    return replace(x, **moved)


def test_on_a_card_a_pass_waits_only_for_its_segments(model, groups, folder):
    """A group in one pack, its prompt shared, with frames, to the log-probs: no tensor lies in the
    wrong place, and the host waits where the attention of a CPU asks for its bounds alone."""
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder))
    batch = pack(groups, encoder, model.cfg)
    assert batch.keys is not None and len(batch.features_ND)
    with torch.no_grad():
        wanted, _ = linear_logprobs(batch.hidden_MD(model), model.head_weight_VD, batch.targets_M)
        twin = VLModel(model.cfg)
        twin.load_state_dict(model.state_dict())
        with FakeCard() as card:
            move(twin)
            there = to_card(batch)
            card.counts.clear()
            hidden_MD = there.hidden_MD(twin)
            waits = 2 * 2 * model.cfg.num_hidden_layers  # of sdpa_per_length
            assert card.counts["waits"] <= waits and card.counts["launches"] > 100
            rows = hidden_MD.to("cpu")
            got, _ = linear_logprobs(rows, model.head_weight_VD, batch.targets_M)
    torch.testing.assert_close(got, wanted)
