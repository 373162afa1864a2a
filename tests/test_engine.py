"""The sampler's engine: whatever the schedule, its tokens are those of a plain forward pass."""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kernels.draw import draw
from nanosport.engine import own
from nanosport.engine.own import OwnSampler
from nanosport.engine.pages import Pages, WidePages
from nanosport.engine.sampler import Piece, Sampling
from nanosport.engine.step import Step, ladder
from nanosport.files import ASSETS
from nanosport.model.decoder import VLModel, join_projections, mrope_positions
from nanosport.model.folder import load_tokenizer, read_config
from tests.helpers.fake_card import CARD, FakeCard, move
from tests.helpers.families import FAMILIES, engine_config

NUM_NEW = 6


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "nano-sft")


@pytest.fixture(scope="module", params=FAMILIES)
def model(tokenizer, request):
    cfg = read_config(engine_config(request.param, len(tokenizer)))
    torch.manual_seed(0)
    return VLModel(cfg).init_weights(std=0.3).requires_grad_(False)


class Shown:
    """What stands for a FrameEncoder: made-up features, a frame's name is its number."""

    def __init__(self, width: int, device="cpu"):
        self.width, self.device = width, device
        self.made, self.asked, self.expected = [], [], []

    def make(self, rng, num_tokens: int) -> int:
        self.made.append(torch.from_numpy(rng.normal(size=(num_tokens, self.width))).float())
        return len(self.made) - 1

    def expect(self, frames) -> None:
        self.expected.append(list(frames))

    def features(self, frames) -> torch.Tensor:
        self.asked.append(list(frames))
        return self.plain(frames).to(self.device)

    def plain(self, frames) -> torch.Tensor:
        return torch.cat([self.made[k] for k in frames])


class Talk:
    """What a conversation should hold, kept beside the sampler."""

    def __init__(self):
        self.ids, self.grids, self.features, self.turns = [], [], [], []

    def hear(self, piece: Piece) -> None:
        self.ids += piece.ids
        self.grids += piece.grids
        self.features += [piece.encoder.plain(piece.frames)] if piece.frames else []

    def check(self, model, sampler, seed) -> None:
        """Each turn against a forward pass without a cache, with the draws of its stream."""
        positions_3T, _ = mrope_positions(self.ids, self.grids, model.cfg)
        features_ND = torch.cat(self.features) if self.features else None
        bounds = torch.tensor([0, len(self.ids)], dtype=torch.int32)
        hidden_TD = model.hidden(torch.tensor(self.ids), positions_3T, bounds, features_ND)
        stream = np.random.default_rng(seed)
        for start, said in self.turns:
            draws = torch.from_numpy(stream.random(NUM_NEW))[: len(said.ids)]
            logits = hidden_TD[start - 1 : start - 1 + len(said.ids)] @ model.head_weight_VD.T
            how = sampler.sampling.temperature, sampler.sampling.top_p, sampler.banned
            token, logp = draw(logits, draws, *how)
            assert token.tolist() == list(said.ids)
            torch.testing.assert_close(torch.tensor(said.sampled_logp), logp, rtol=0, atol=5e-5)


def random_piece(rng, shown: Shown, longest: int = 40) -> Piece:
    """Text, with up to two frames between."""
    ids, grids, frames = rng.integers(10, 200, rng.integers(1, longest)).tolist(), [], []
    for _ in range(rng.integers(0, 3)):
        h, w = (2 * rng.integers(1, 4, 2)).tolist()
        ids += [3, *[5] * (h * w // 4), 4, *rng.integers(10, 200, rng.integers(1, 4)).tolist()]
        grids.append((1, h, w))
        frames.append(shown.make(rng, h * w // 4))
    return Piece(ids, grids, frames, shown if frames else None)


def play(sampler, rng, num_groups: int, device="cpu") -> list[tuple]:
    """Play random episodes of up to three turns; return each with the seed of its stream."""
    talks, done, waiting, shown = (
        {},
        [],
        list(range(num_groups)),
        Shown(sampler.model.cfg.vision.feature_size, device),
    )

    def open_some() -> None:
        for group in [waiting.pop() for _ in range(min(len(waiting), rng.integers(1, 3)))]:
            prompt, size = random_piece(rng, shown), int(rng.integers(1, 4))
            streams = [np.random.default_rng([group, member]) for member in range(size)]
            for member, number in enumerate(sampler.open(prompt, streams)):
                talks[number] = Talk(), [group, member]
                talks[number][0].hear(prompt)

    open_some()
    while talks or waiting:
        if waiting and not talks:
            open_some()
        for number, said in sampler.turns():
            talk, seed = talks[number]
            talk.turns.append((len(talk.ids), said))
            talk.ids += said.ids
            if len(talk.turns) == 3 or rng.random() < 0.3:
                sampler.close(number)
                done.append(talks.pop(number))
            else:
                piece = random_piece(rng, shown)
                talk.hear(piece)
                sampler.say(number, piece)
            if waiting and rng.random() < 0.3:  # others come in the middle
                open_some()
    return done


def make_sampler(model, tokenizer, pages: Pages | None, sampling: Sampling, like_gpu: bool):
    """like_gpu: with a GPU's schedule: packs beside steps, a step launched ahead, a ladder."""
    sampler = OwnSampler(model, tokenizer, sampling)
    sampler.pages, sampler.on_gpu = pages, like_gpu
    sampler.end_ids = set(range(0, len(tokenizer), 5))  # turns of any length
    return sampler


class Idle(nullcontext):
    """A stream or a graph of a card that is not there."""

    replay = None

    def wait_stream(self, stream) -> None:
        pass


@pytest.fixture
def no_graphs(monkeypatch):
    """Steps are captured as on a card, with the runs that this takes, but not launched as graphs."""
    capture = Step.capture
    monkeypatch.setattr(Step, "capture", lambda step: capture(step) or step.run)
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, **how: Idle())


COUNTS = Counter()


@pytest.mark.parametrize("part", range(10))
def test_tokens_and_logprobs_are_those_of_a_plain_pass(
    part, model, tokenizer, monkeypatch, no_graphs
):
    """Ten schedules: other lengths, packs, pages, admissions, temperatures; rows are put back. Each
    family has schedules of its own."""
    part += 10 * model.cfg.qk_norm
    for number in range(10 * part, 10 * part + 10):
        rng = np.random.default_rng(number)
        monkeypatch.setattr(own, "PACK_TOKENS", int(rng.choice([1, 7, 50, 8192])))
        monkeypatch.setattr(own, "PACK_PAIRS", int(rng.choice([1, 500, 2**26])))
        size, like_gpu = int(rng.choice([1, 8, 16])), bool(rng.random() < 0.7)
        # the longest talk has about 200 tokens: the smallest pool holds little more
        num_pages = int(rng.choice([240, 300, 5000])) // size
        pages = WidePages(model.cfg, "cpu", torch.float32)
        if like_gpu or rng.random() < 0.5:
            pages = Pages(model.cfg, "cpu", torch.float32, num_pages, size)
        sampling = Sampling(float(rng.choice([0, 0.8, 1.5])), float(rng.choice([1, 0.9])), NUM_NEW)
        sampler = make_sampler(model, tokenizer, pages, sampling, like_gpu)
        done = play(sampler, rng, int(rng.integers(1, 9)))
        for talk, seed in done:
            talk.check(model, sampler, seed)
        assert pages.num_used == 0 and not sampler.rows and not pages.users[1:].any()
        COUNTS.update(sampler.counts)
        COUNTS["turns"] += sum(len(talk.turns) for talk, _ in done)
        COUNTS["schedules"] += 1


def test_the_schedules_were_as_hard_as_they_should_be():
    if COUNTS["schedules"] < 200:
        pytest.skip("it counts what the 200 schedules did, and they have not all run")
    assert COUNTS["turns"] > 2500
    assert COUNTS["rows_put_back"] > 100, COUNTS


def fixed_pages(model, num_pages: int = 60, size: int = 16) -> Pages:
    return Pages(model.cfg, "cpu", torch.float32, num_pages, size)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("wide", [True, False])
def test_no_page_is_lost_over_ten_thousand_short_episodes(wide, model, tokenizer, no_graphs):
    pages = WidePages(model.cfg, "cpu", torch.float32) if wide else fixed_pages(model, 250)
    sampler = make_sampler(model, tokenizer, pages, Sampling(max_new_tokens=1), not wide)
    played = 0
    for number in range(50):
        for k in range(25):
            streams = [np.random.default_rng([number, k, member]) for member in range(8)]
            sampler.open(Piece([10 + k] * (1 + k % 20)), streams)
        for name, said in sampler.turns():
            assert len(said.ids) == 1
            sampler.close(name)
            played += 1
    assert played == 10_000 and pages.num_used == 0 and not pages.users[1:].any()
    assert sorted(pages.free) == list(range(1, len(pages.users)))
    assert len(pages.users) < 600  # a pool that grows does not grow for ever


@pytest.mark.parametrize("like_gpu", [True, False])
def test_no_page_is_lost_where_a_video_is(like_gpu, model, tokenizer, no_graphs):
    """Frames that cannot be had in the middle of the others' turns; the sampler plays on."""
    pages = fixed_pages(model)
    sampler = make_sampler(model, tokenizer, pages, Sampling(max_new_tokens=4), like_gpu)

    class Lost(Shown):
        def features(self, frames):
            raise OSError("the disk is gone")

    numbers = sampler.open(Piece([20, 21, 22]), [np.random.default_rng(k) for k in range(4)])
    with pytest.raises(OSError, match="the disk is gone"):
        for number, _ in sampler.turns():
            frames = Piece([3, 5, 4, 30], [(1, 2, 2)], [0], Lost(32))
            sampler.say(number, frames if number == numbers[2] else Piece([30, 31]))
    for number in numbers:
        sampler.close(number)
    assert pages.num_used == 0 and not sampler.rows
    (number,) = sampler.open(Piece([20, 21, 22]), [np.random.default_rng(0)])
    (turn,) = sampler.turns()
    again = make_sampler(model, tokenizer, fixed_pages(model), Sampling(max_new_tokens=4), like_gpu)
    again.open(Piece([20, 21, 22]), [np.random.default_rng(0)])
    assert turn[1].ids == next(iter(again.turns()))[1].ids


@pytest.mark.parametrize("like_gpu", [True, False])
def test_frames_of_all_that_is_read_together_are_asked_for_together(
    like_gpu, model, tokenizer, no_graphs, monkeypatch
):
    """Also where a pack's end cuts through a frame; a group's are expected once, and its positions
    computed once."""
    said = []
    for budget in (8192, 22):
        monkeypatch.setattr(own, "PACK_TOKENS", budget)
        sampling = Sampling(0.0, max_new_tokens=NUM_NEW)
        sampler = make_sampler(model, tokenizer, fixed_pages(model), sampling, like_gpu)
        rng, shown = np.random.default_rng(3), Shown(model.cfg.vision.feature_size)
        for k in range(3):
            frames = [shown.make(rng, 6), shown.make(rng, 6)]
            ids = [20 + k, 3, *[5] * 6, 4, 30, 3, *[5] * 6, 4, 31]
            prompt = Piece(ids, [(1, 4, 6)] * 2, frames, shown)
            sampler.open(prompt, [np.random.default_rng(m) for m in range(3)])
        assert shown.expected == [[0, 1], [2, 3], [4, 5]]
        assert len({id(row.positions_3T) for row in sampler.rows.values()}) == 3
        said.append(sorted(sampler.turns()))
        for number in list(sampler.rows):
            sampler.close(number)
        if budget == 8192:
            assert shown.asked == [[0, 1, 2, 3, 4, 5]]
        else:
            assert shown.asked == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5]]
    ids = [[turn.ids for _, turn in turns] for turns in said]
    assert ids[0] == ids[1] and len(set(ids[0])) > 1


def test_a_conversation_that_no_cache_holds_says_so(model, tokenizer, no_graphs):
    pages = fixed_pages(model, 4)
    sampler = make_sampler(model, tokenizer, pages, Sampling(max_new_tokens=4), True)
    sampler.open(Piece([20] * 70), [np.random.default_rng(0)])
    with pytest.raises(ValueError, match="needs room for 75 tokens, but the cache has 64: a GPU"):
        list(sampler.turns())


def test_what_slept_wakes_with_new_weights(model, tokenizer):
    sampler = make_sampler(model, tokenizer, None, Sampling(0.0, max_new_tokens=5), False)

    def turn() -> tuple:
        (number,) = sampler.open(Piece([20, 21, 22, 23]), [np.random.default_rng(0)])
        ((_, said),) = sampler.turns()
        sampler.close(number)
        return said

    first = turn()
    sampler.sleep()
    assert sampler.pages is None and turn() == first
    head = model.head_weight_VD.clone()
    try:
        sampler.load_weights([("lm_head.weight", -head)], 1)
        assert turn().ids[0] != first.ids[0]
    finally:
        model.head_weight_VD.copy_(head)


def test_a_conversation_outlives_a_sleep_between_its_turns(model, tokenizer):
    said = []
    for sleeps in (False, True):
        sampler = make_sampler(model, tokenizer, None, Sampling(max_new_tokens=5), False)
        (number,) = sampler.open(Piece([20, 21, 22, 23]), [np.random.default_rng(0)])
        ((_, first),) = sampler.turns()
        if sleeps:
            sampler.sleep()
        sampler.say(number, Piece([30, 31]))
        ((_, second),) = sampler.turns()
        said.append((first.ids, second.ids))
    assert said[0] == said[1]


def test_who_has_ended_waits_to_be_answered(model, tokenizer):
    """Although whoever asked has left after the first of them."""
    sampler = make_sampler(model, tokenizer, None, Sampling(max_new_tokens=3), False)
    numbers = sampler.open(Piece([20, 21, 22]), [np.random.default_rng(k) for k in range(4)])
    sampler.end_ids = set()
    next(sampler.turns())
    assert list(sampler.turns()) == []
    for number in numbers:
        sampler.say(number, Piece([30]))
    assert sorted(number for number, _ in sampler.turns()) == numbers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_broken_end_in_one_line(temperature, model, tokenizer):
    twin = VLModel(model.cfg)
    twin.load_state_dict(model.state_dict())
    twin.requires_grad_(False).model.norm.weight[3] = float("nan")
    sampler = make_sampler(twin, tokenizer, None, Sampling(temperature), False)
    (number,) = sampler.open(Piece([20, 21, 22]), [np.random.default_rng(0)])
    with pytest.raises(ValueError, match="logits are not finite"):
        list(sampler.turns())


def test_joined_projections_are_the_same_weights(model):
    twin = VLModel(model.cfg)
    twin.load_state_dict(model.state_dict())
    ids, bounds = torch.arange(20, 40), torch.tensor([0, 20], dtype=torch.int32)
    positions_3T = torch.arange(20).expand(3, -1)
    with torch.no_grad():
        before = twin.hidden(ids, positions_3T, bounds)
        join_projections(twin)
        torch.testing.assert_close(twin.hidden(ids, positions_3T, bounds), before)
        twin.model.layers[1].self_attn.k_proj.weight.zero_()  # written in place, and seen
        twin.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        after = twin.hidden(ids, positions_3T, bounds)
        assert (after - before).abs().max() > 0.1
        plain = VLModel(model.cfg)
        plain.load_state_dict(twin.state_dict())
        torch.testing.assert_close(plain.hidden(ids, positions_3T, bounds), after)


def test_a_ladder_of_few_sizes_holds_any_number():
    sizes = [ladder(n) for n in range(1, 300)]
    assert all(n <= size < 1.51 * n + 1 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 18


@pytest.fixture
def card(no_graphs):
    with FakeCard() as fake:
        yield fake


def on_card(model) -> VLModel:
    twin = VLModel(model.cfg)
    twin.load_state_dict(model.state_dict())
    move(twin)
    return twin


def make_on_card(model, tokenizer, sampling: Sampling, num_pages: int = 400) -> OwnSampler:
    twin = on_card(model)
    pages = Pages(model.cfg, CARD, torch.float32, num_pages, 16)
    return make_sampler(twin, tokenizer, pages, sampling, like_gpu=True)


def test_the_fake_card_refuses_what_a_card_refuses(card):
    there = torch.zeros(3, device=CARD)
    with pytest.raises(RuntimeError, match="of the card and of the host"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="of the card and of the host"):
        there[torch.tensor([0, 1])]
    assert (there + 1).tolist() == [1, 1, 1] and card.counts["waits"] == 1
    assert int((there + 1).sum()) == 3 and card.counts["waits"] == 2
    there.copy_(torch.ones(3))
    assert there.to("cpu", non_blocking=True).sum() == 3
    assert (card.counts["to card"], card.counts["to host"]) == (1, 2)


def test_on_a_card_a_token_costs_no_copy_to_it_and_no_wait(card, model, tokenizer):
    """And a step is read when the next one is on its way."""
    sampling = Sampling(0.8, 0.9, max_new_tokens=12)
    sampler = make_on_card(model, tokenizer, sampling)
    sampler.end_ids = set()
    for k in range(5):
        sampler.open(Piece([20 + k, *range(30, 40 + k)]), [np.random.default_rng(k)])
    while not all(row.can_speak for row in sampler.rows.values()):
        sampler._read()
    sampler._speak()
    assert card.counts["to card"] > 5 and len(sampler.launched) == 1
    for _ in range(8):
        card.counts.clear()
        sampler._read()
        sampler._speak()
        assert card.counts["to card"] == card.counts["waits"] == 0
        assert card.counts["to host"] == 1 and len(sampler.launched) == 1
        # on a real card a graph makes one launch of them
        norms = 6 * 2 * model.cfg.qk_norm  # of queries and keys, in two layers
        assert card.counts["launches"] < 170 + norms
    row = next(iter(sampler.rows.values()))
    assert len(row.sampled_logp) == 8 and row.length == len(row.ids) - 1


def test_on_a_card_the_same_is_said(card, model, tokenizer):
    """Packs, steps, shared prompts, frames and rows put back, without a tensor in the wrong
    place."""
    rng = np.random.default_rng(5)
    sampler = make_on_card(model, tokenizer, Sampling(0.8, max_new_tokens=NUM_NEW), 16)
    done = play(sampler, rng, 6, CARD)
    assert sampler.counts["rows_put_back"] > 0 and len(done) >= 6
    for talk, seed in done:
        talk.check(model, with_host_bans(sampler), seed)
    assert sampler.pages.num_used == 0


def with_host_bans(sampler: OwnSampler) -> OwnSampler:
    sampler.banned = sampler.banned.cpu()
    return sampler
