"""Each family's model is the same function as transformers', and passes on the same
gradients."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from kernels.attention import varlen_attention
from kernels.elementwise import rotate
from nanosport.model.decoder import VLModel, mrope_cos_sin, mrope_positions, mrope_tables
from nanosport.model.folder import own_name, read_config
from nanosport.model.layers import RMSNorm
from tests.helpers import families
from tests.helpers.families import END, FAMILIES, IMAGE, START

GRIDS = [(1, 4, 6), (1, 10, 18), (1, 2, 2), (1, 8, 8), (1, 2, 26), (1, 26, 2)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and lose tenfold where the cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tiny_pair(family):
    return partial(families.tiny_pair, family)


def sequence(grids, seed=0, text=5):
    """Text, then each image and more text."""
    generator, ids = torch.Generator().manual_seed(seed), []
    for t, h, w in grids:
        ids += torch.randint(0, 180, (text,), generator=generator).tolist()
        ids += [START] + [IMAGE] * (t * h * w // 4) + [END]
    return ids + torch.randint(0, 180, (text,), generator=generator).tolist()


def patches(grids, cfg, seed=0):
    num_patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(
        num_patches, cfg.vision.patch_width, generator=torch.Generator().manual_seed(seed)
    )


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def their_logits(theirs, ids, patches_PC, grids):
    ids_1T = torch.tensor(ids)[None]
    is_image = (
        ids_1T == IMAGE
    ).int()  # without it transformers falls back to 1-D positions, without a word
    dtype = theirs.lm_head.weight.dtype
    return theirs(
        input_ids=ids_1T, pixel_values=patches_PC.to(dtype), image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=is_image, use_cache=False,
    ).logits[0]  # fmt: skip


def our_hidden(ours, ids, patches_PC, grids):
    positions_3T, _ = mrope_positions(ids, grids, ours.cfg)
    return ours.hidden(
        torch.tensor(ids), positions_3T, cu(len(ids)), ours.visual(patches_PC, grids)
    )


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("tied", "patch_size"), [(False, 14), (True, 14), (True, 28)])
def test_logits_and_every_gradient_equal_transformers(tied, patch_size, tiny_pair):
    theirs, ours = tiny_pair(tied, patch_size)
    ids, patches_PC = sequence(GRIDS), patches(GRIDS, ours.cfg)
    expected = their_logits(theirs, ids, patches_PC, GRIDS)
    logits = our_hidden(ours, ids, patches_PC, GRIDS) @ ours.head_weight_VD.T
    assert relative_error(logits, expected) < 1e-5

    weight = torch.randn(expected.shape)
    (expected * weight).mean().backward()
    (logits * weight).mean().backward()
    gradients = {own_name(name): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert gradients[name].abs().max() > 0, name
        assert relative_error(p.grad, gradients[name]) < 2e-5, name


@pytest.mark.parametrize("broken", range(4))
def test_a_wrong_model_would_be_noticed(broken, family, tiny_pair):
    theirs, ours = tiny_pair()
    ids, patches_PC = sequence(GRIDS), patches(GRIDS, ours.cfg)
    expected = their_logits(theirs, ids, patches_PC, GRIDS)
    cfg = theirs.config.to_dict()
    text, vision = cfg["text_config"], cfg["vision_config"]
    name, value = list(FAMILIES[family].broken.items())[broken]
    (where,) = (part for part in (text["rope_parameters"], text, vision) if name in part)
    where[name] = value
    wrong = VLModel(read_config(cfg))
    wrong.load_state_dict(ours.state_dict())
    logits = our_hidden(wrong, ids, patches_PC, GRIDS) @ wrong.head_weight_VD.T
    assert relative_error(logits, expected) > 1e-3


def test_bfloat16_rounds_where_transformers_rounds(family, tiny_pair):
    oracle = FAMILIES[family].modeling
    norm = getattr(oracle, "Qwen3VLTextRMSNorm", None) or oracle.Qwen2_5_VLRMSNorm
    x = torch.randn(7, 4, 16, dtype=torch.bfloat16)
    our_norm, their_norm = (
        RMSNorm(16, 1e-6).bfloat16(),
        norm(16, 1e-6).bfloat16(),
    )
    with torch.no_grad():
        our_norm.weight.copy_(torch.randn(16))
        their_norm.weight.copy_(our_norm.weight)
    assert torch.equal(our_norm(x), their_norm(x))

    theirs, ours = tiny_pair(dtype=torch.bfloat16)
    positions_3T = mrope_positions(sequence([(1, 4, 6)]), [(1, 4, 6)], ours.cfg)[0][:, :7]
    cos, sin = mrope_cos_sin(positions_3T, mrope_tables(ours.cfg, "cpu"), torch.bfloat16)
    their_cos_sin = theirs.model.language_model.rotary_emb(x, positions_3T[:, None])
    expected, _ = oracle.apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], *their_cos_sin
    )
    assert torch.equal(rotate(x, cos, sin), expected[0].transpose(0, 1))


def test_bfloat16_error_is_no_larger_than_transformers(tiny_pair):
    exact, _ = tiny_pair()
    theirs, ours = tiny_pair(dtype=torch.bfloat16)
    ids, patches_PC = sequence(GRIDS), patches(GRIDS, ours.cfg)
    with torch.no_grad():
        gold = their_logits(exact, ids, patches_PC, GRIDS)
        logits = our_hidden(ours, ids, patches_PC, GRIDS) @ ours.head_weight_VD.T
        their_error = (their_logits(theirs, ids, patches_PC, GRIDS).float() - gold).square().mean()
    assert (logits.float() - gold).square().mean() < 2 * their_error


def test_packed_sequences_do_not_see_each_other(tiny_pair):
    _, ours = tiny_pair(tied=True)
    sequences = [
        (sequence(grids, seed=i), grids) for i, grids in enumerate((GRIDS[:2], [], GRIDS[2:]))
    ]
    ids = [torch.tensor(ids) for ids, _ in sequences]
    positions = [mrope_positions(ids, grids, ours.cfg)[0] for ids, grids in sequences]
    features = [
        ours.visual(patches(g, ours.cfg, seed=i), g) if g else None
        for i, (_, g) in enumerate(sequences)
    ]
    alone = [
        ours.hidden(one, where, cu(len(one)), feature)
        for one, where, feature in zip(ids, positions, features, strict=True)
    ]
    all_features = ours.visual(
        torch.cat([patches(GRIDS[:2], ours.cfg, 0), patches(GRIDS[2:], ours.cfg, 2)]), GRIDS
    )
    packed = ours.hidden(torch.cat(ids), torch.cat(positions, 1), cu(*map(len, ids)), all_features)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=2e-5)
    torch.testing.assert_close(
        all_features, torch.cat([f for f in features if f is not None]), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("recompute", ["all", "mlp"])
def test_recomputation_changes_no_gradient(recompute, tiny_pair):
    gradients = []
    for mode in ("none", recompute):
        _, ours = tiny_pair(tied=True)
        modes = [mode] + ["none"] * (ours.cfg.num_hidden_layers - 1)
        ours.recompute, ours.visual.recompute = modes, mode
        our_hidden(
            ours, sequence(GRIDS), patches(GRIDS, ours.cfg), GRIDS
        ).square().mean().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_sharding_from_outside_changes_no_gradient(tiny_pair):
    """FSDP2 on the layers, and on the root by its two entrances; nothing in the model knows of
    it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        gradients = []
        for sharded in (False, True):
            _, ours = tiny_pair(tied=True)
            if sharded:
                for part in (*ours.visual.blocks, *ours.model.layers, ours):
                    fully_shard(part)
                register_fsdp_forward_method(ours, "encode")
                register_fsdp_forward_method(ours, "hidden")
            ids, features_ND = sequence(GRIDS), ours.encode(patches(GRIDS, ours.cfg), GRIDS)
            positions_3T, _ = mrope_positions(ids, GRIDS, ours.cfg)
            ours.hidden(
                torch.tensor(ids), positions_3T, cu(len(ids)), features_ND
            ).square().mean().backward()
            gradients.append(
                {n: p.grad.full_tensor() if sharded else p.grad for n, p in ours.named_parameters()}
            )
    finally:
        dist.destroy_process_group()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_positions_equal_transformers_and_can_be_appended(tiny_pair):
    theirs, ours = tiny_pair()
    ids = sequence(GRIDS)
    ids_1T = torch.tensor(ids)[None]
    expected, delta = theirs.model.get_rope_index(
        ids_1T, mm_token_type_ids=(ids_1T == IMAGE).int(), image_grid_thw=torch.tensor(GRIDS)
    )
    positions_3T, next_start = mrope_positions(ids, GRIDS, ours.cfg)
    assert torch.equal(positions_3T, expected[:, 0])
    assert next_start == len(ids) + delta.item()

    cut = ids.index(END, ids.index(END) + 1) + 1  # after the second image
    first, start = mrope_positions(ids[:cut], GRIDS[:2], ours.cfg)
    second, end = mrope_positions(torch.tensor(ids[cut:]), GRIDS[2:], ours.cfg, start)
    assert torch.equal(torch.cat([first, second], dim=1), positions_3T)
    assert end == next_start


def test_positions_refuse_images_that_do_not_fit(tiny_pair):
    cfg = tiny_pair()[1].cfg
    with pytest.raises(ValueError, match="image 1: 6 image tokens in a row, but its grid makes 4"):
        mrope_positions(sequence([(1, 4, 6)]), [(1, 4, 4)], cfg)
    with pytest.raises(ValueError, match="image 2 has no grid"):
        mrope_positions(sequence(GRIDS), GRIDS[:1], cfg)
    with pytest.raises(ValueError, match="6 grids were given, but the tokens hold 3 images"):
        mrope_positions(sequence(GRIDS[:3]), GRIDS, cfg)
    assert mrope_positions([], [], cfg, start=7)[1] == 7


def test_features_must_be_as_many_as_image_tokens(tiny_pair):
    _, ours = tiny_pair()
    ids = sequence(GRIDS[:1])
    positions_3T, _ = mrope_positions(ids, GRIDS[:1], ours.cfg)
    with pytest.raises(ValueError, match="6 image tokens, but 5 vision features"):
        ours.hidden(torch.tensor(ids), positions_3T, cu(len(ids)), torch.zeros(5, 64))
    with pytest.raises(ValueError, match="6 image tokens, but 0 vision features"):
        ours.hidden(torch.tensor(ids), positions_3T, cu(len(ids)))


def test_a_dummy_image_reaches_the_tower_with_zero_gradient(tiny_pair):
    """What a rank without images does so that all ranks run the tower: it takes none of a dummy's
    features."""
    _, ours = tiny_pair()
    ids = torch.arange(5)
    features_ND = ours.visual(patches([(1, 2, 2)], ours.cfg), [(1, 2, 2)])[:0]
    ours.hidden(ids, ids.expand(3, -1), cu(5), features_ND).sum().backward()
    assert all((p.grad == 0).all() for p in ours.visual.parameters())


def test_patches_must_fit_their_grids(tiny_pair):
    _, ours = tiny_pair()
    with pytest.raises(
        ValueError, match=r"patches of shape \(24, 1176\): 1 grids ask for \(36, 1176\)"
    ):
        ours.visual(torch.zeros(24, 1176), [(1, 6, 6)])
    with pytest.raises(ValueError, match="multiples of 2"):
        ours.visual(torch.zeros(12, 1176), [(1, 3, 4)])


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_equals_softmax_segment_by_segment(causal):
    lengths = [3, 1, 4, 3, 4, 9]
    q, k, v = (
        torch.randn(sum(lengths), heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    out = varlen_attention(q, k, v, cu(*lengths), max(lengths), causal)
    expected, start = [], 0
    for n in lengths:
        one = slice(start, start := start + n)
        k_nHd, v_nHd = k[one].repeat_interleave(2, 1), v[one].repeat_interleave(2, 1)
        scores = torch.einsum("ihd,jhd->hij", q[one], k_nHd) / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        expected.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_nHd))
    expected = torch.cat(expected)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_meta_model_and_initial_weights(tiny_pair):
    cfg = tiny_pair()[1].cfg
    with torch.device("meta"):
        model = VLModel(cfg)
    assert all(p.is_meta for p in model.parameters())
    assert not dict(model.named_buffers())  # nothing that to_empty would leave as garbage
    torch.manual_seed(0)
    model = model.to_empty(device="cpu").init_weights(std=0.02)
    state = model.state_dict()
    assert all((w == 0).all() for n, w in state.items() if n.endswith("bias"))
    weights = {n: w for n, w in state.items() if not n.endswith("bias")}
    assert all((w == 1).all() for n, w in weights.items() if "norm" in n or "ln_q" in n)
    assert abs(state["model.embed_tokens.weight"].std() - 0.02) < 0.002
    assert our_hidden(model, sequence(GRIDS), patches(GRIDS, cfg), GRIDS).isfinite().all()
