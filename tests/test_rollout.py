"""Episodes: which tokens are trained, how they end, and that sampler and trainer see the same
model."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.draw import draw
from kernels.policy_loss import linear_logprobs
from nanosport.engine import own
from nanosport.engine.own import OwnSampler
from nanosport.engine.sampler import Generated, Piece, Sampling
from nanosport.env.env import Limits
from nanosport.env.prompt import IMAGE_PAD, SYSTEM, VISION_END, VISION_START
from nanosport.env.reward import format_valid, gated_reward
from nanosport.env.rollout import Conversation, replay, rollout
from nanosport.env.tools import STOPS, tool_call
from nanosport.image import ImageConfig
from nanosport.model import frames
from nanosport.model.decoder import mrope_positions
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode, read_questions
from nanosport.train.pack import pack
from nanosport.video import VideoError

QWEN = Path(__file__).parents[2] / "shared" / "data" / "qwen" / "Qwen2.5-VL-7B-Instruct"
FIRST = f"<think>between 20 and 60.</think>\n{tool_call(20, 60)}"
SECOND = f"<think>later.</think>\n{tool_call(60, 100)}"
ANSWER = "<think>red 7.</think>\n<answer>B</answer>"


@pytest.fixture(scope="module")
def model(taught_folder):
    return load_model(taught_folder)


@pytest.fixture(scope="module")
def tokenizer(taught_folder):
    return load_tokenizer(taught_folder)


@pytest.fixture(scope="module")
def encoder(model, taught_folder):
    return FrameEncoder(model, ImageConfig.from_folder(taught_folder))


@pytest.fixture(scope="module")
def questions(arena_folder):
    return read_questions(arena_folder / "rl.jsonl")


def make_sampler(model, tokenizer, **sampling) -> OwnSampler:
    return OwnSampler(
        model, tokenizer, Sampling(**({"max_new_tokens": 48, "stops": STOPS} | sampling))
    )


def play(
    texts, question, encoder, tokenizer, limits=None, stopped=True
) -> tuple[Conversation, Piece | None]:
    """A conversation that takes these turns, as if a model had written them, and what came back for
    the last."""
    conversation = Conversation(question, encoder, tokenizer, limits or Limits())
    piece = conversation.open()
    for text in texts:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        piece = conversation.take(Generated(ids, (-0.5,) * len(ids), stopped))
    return conversation, piece


def played(*args, **kwargs) -> Episode:
    return play(*args, **kwargs)[0].episode()


def spans(episode, tokenizer) -> list[tuple[int, str]]:
    """(mask, text) of each run of tokens with the same mask."""
    runs = groupby(zip(episode.mask, episode.ids), key=lambda pair: pair[0])
    return [
        (m, tokenizer.decode([i for _, i in run], skip_special_tokens=False)) for m, run in runs
    ]


def test_the_mask_of_a_two_tool_episode_token_by_token(questions, encoder, tokenizer):
    question = next(q for q in questions if q.options)
    episode = replay(question, [FIRST, SECOND, ANSWER], encoder, tokenizer, Limits())
    total = encoder.open(question.clip).num_frames

    def frames(first, last):
        indices = [int(i) for i in np.rint(np.linspace(first, last, 8))]
        return indices, "".join(
            f"frame {i}:{VISION_START}{IMAGE_PAD * 6}{VISION_END}\n" for i in indices
        )

    (overview, shown_0), (window_1, shown_1), (window_2, shown_2) = (
        frames(0, total - 1),
        frames(20, 60),
        frames(60, 100),
    )
    options = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCD", question.options))
    asked = f"The video has {total} frames. {question.question}{options}\nAnswer with one option."
    between = (
        "\n<|im_start|>user\n<tool_response>\n{}</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    expected = [
        (
            0,
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{shown_0}{asked}<|im_end|>\n<|im_start|>assistant\n",
        ),
        (1, FIRST + "<|im_end|>"),
        (0, between.format(shown_1)),
        (1, SECOND + "<|im_end|>"),
        (0, between.format(shown_2)),
        (1, ANSWER + "<|im_end|>"),
    ]
    ids, mask = [], []
    for trained, text in expected:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        mask += [trained] * len(piece)
    assert list(episode.ids) == ids and list(episode.mask) == mask
    assert spans(episode, tokenizer) == expected
    assert episode.frames == (*overview, *window_1, *window_2)
    outside = {
        tokenizer.convert_tokens_to_ids(t)
        for t in (IMAGE_PAD, VISION_START, VISION_END, "<|im_start|>")
    }
    assert outside <= set(ids) and not any(
        m for i, m in zip(episode.ids, episode.mask) if i in outside
    )
    assert [t.action for t in episode.turns] == ["tool", "tool", "answer"]
    assert (episode.status, episode.answer, format_valid(episode)) == ("answered", "B", True)


def test_rows_that_carry_loss_predict_exactly_the_masked_tokens(
    questions, encoder, tokenizer, model
):
    episodes = [
        replay(questions[0], turns, encoder, tokenizer, Limits())
        for turns in ([FIRST, SECOND, ANSWER], [ANSWER])
    ]
    batch = pack(episodes, encoder, model.cfg, share_prefix=False)
    trained = [i for e in episodes for i, m in zip(e.ids, e.mask) if m]
    assert batch.targets_M.tolist() == trained
    assert batch.ids_T[batch.rows_M + 1].tolist() == trained
    turns = [text + "<|im_end|>" for text in (FIRST, SECOND, ANSWER)]
    counts = [len(tokenizer.encode(turn, add_special_tokens=False)) for turn in turns]
    assert (
        batch.after_image_M.tolist()
        == [False] * counts[0] + [True] * (counts[1] + counts[2]) + [False] * counts[2]
    )
    assert batch.episode_M.tolist() == [0] * sum(counts) + [1] * counts[2]
    assert batch.cu_seqlens.tolist() == [0, len(episodes[0].ids), len(batch.ids_T)]


@pytest.mark.parametrize(
    "texts, limits, status",
    [
        ([ANSWER], Limits(), "answered"),
        ([FIRST, ANSWER], Limits(), "answered"),
        (["<answer>B</answer>"], Limits(), "format_error"),
        ([FIRST, "no tags at all"], Limits(), "format_error"),
        ([FIRST], Limits(use_tool=False), "format_error"),
        ([FIRST, SECOND], Limits(max_turns=2), "out_of_turns"),
        ([FIRST], Limits(max_turns=1), "out_of_turns"),
        ([FIRST, FIRST], Limits(max_turns=2), "out_of_turns"),
        ([FIRST], Limits(max_tokens=300), "out_of_tokens"),
    ],
)
def test_every_ending_has_a_name(texts, limits, status, questions, encoder, tokenizer):
    conversation, piece = play(texts, questions[0], encoder, tokenizer, limits)
    episode = conversation.episode()
    assert episode.status == status and piece is None
    assert (episode.answer == "B") == (status == "answered") == format_valid(episode)
    assert len(episode.ids) == len(episode.mask) == len(episode.sampled_logp)
    assert all((p == -0.5) == (m == 1) for p, m in zip(episode.sampled_logp, episode.mask))


def test_a_turn_that_was_cut_ends_the_episode(questions, encoder, tokenizer):
    episode = played(["<think>on and on"], questions[0], encoder, tokenizer, stopped=False)
    assert episode.status == "out_of_tokens" and episode.turns[0].error.startswith(
        "no action within"
    )
    with pytest.raises(AssertionError, match="goes on"):
        played([FIRST], questions[0], encoder, tokenizer)


def test_a_bad_call_is_answered_with_an_error_and_the_episode_goes_on(
    questions, encoder, tokenizer
):
    bad = f"<think>x</think>\n{tool_call(20, 9000)}"
    conversation, piece = play([bad], questions[0], encoder, tokenizer)
    assert conversation.env.status is None and not piece.frames
    said = tokenizer.decode(piece.ids, skip_special_tokens=False)
    assert (
        "<tool_response>\nerror: the interval must lie inside 0 to" in said
        and IMAGE_PAD not in said
    )
    episode = played([bad, FIRST, ANSWER], questions[0], encoder, tokenizer)
    assert [t.action for t in episode.turns] == ["bad_call", "tool", "answer"] and len(
        episode.frames
    ) == 16
    assert (
        episode.status == "answered"
        and not format_valid(episode)
        and gated_reward(episode).total == -0.05
    )


def test_a_repeated_interval_is_a_format_error(questions, encoder, tokenizer):
    episode = played([FIRST, FIRST, ANSWER], questions[0], encoder, tokenizer)
    assert (
        episode.turns[1].error.startswith("frames 20 to 60 were already returned")
        and episode.turns[1].frames == ()
    )
    assert len(episode.frames) == 16 and not format_valid(episode)
    # a refused call returned nothing: asking properly for what it named is no repetition
    bad = f"<think>x</think>\n{tool_call(20, 27)}"
    conversation, _ = play([bad, bad, FIRST], questions[0], encoder, tokenizer)
    assert conversation.env.turns[2].action == "tool"


@pytest.mark.parametrize(
    "turns, why",
    [
        ([FIRST], "without an answer"),
        ([ANSWER, ANSWER], "ends .answered. before"),
        ([FIRST, FIRST, ANSWER], "already"),
        ([], "without"),
    ],
)
def test_replay_refuses_what_is_no_trajectory(turns, why, questions, encoder, tokenizer):
    with pytest.raises(ValueError, match=f"{questions[0].id}.*{why}"):
        replay(questions[0], turns, encoder, tokenizer, Limits())


@pytest.fixture(scope="module")
def sampled(model, tokenizer, encoder, questions):
    """Eight episodes of each of three questions at temperature 0.7."""
    sampler = make_sampler(model, tokenizer, temperature=0.7)
    return sampler, rollout(sampler, encoder, questions[:3], Limits(max_turns=3), 8, seed=(0, 3))


def test_tokens_in_are_tokens_out(sampled, tokenizer, encoder):
    """Each piece of the environment is encoded once; what was sampled is kept, also where encoding
    its text differs."""
    _, episodes = sampled
    other = 0
    assert any(t.action == "tool" and t.frames for e in episodes for t in e.turns), (
        "the model never called the tool"
    )
    for k, episode in enumerate(episodes):
        runs = [
            list(run)
            for _, run in groupby(zip(episode.mask, episode.ids), key=lambda pair: pair[0])
        ]
        said = [[i for _, i in run] for run in runs if run[0][0]]
        given = [[i for _, i in run] for run in runs if not run[0][0]]
        assert given[0] == Conversation(episode.question, encoder, tokenizer, Limits()).open().ids
        for ids, turn in zip(said, episode.turns, strict=True):
            assert turn.text in (tokenizer.decode(ids[:-1]), tokenizer.decode(ids))
        for ids in given:
            assert ids == tokenizer.encode(
                tokenizer.decode(ids, skip_special_tokens=False), add_special_tokens=False
            )
        other += sum(
            s[:-1] != tokenizer.encode(t.text, add_special_tokens=False)
            for s, t in zip(said, episode.turns)
        )
        assert len(episode.frames) * 6 == sum(
            i == tokenizer.convert_tokens_to_ids(IMAGE_PAD) for i in episode.ids
        ), k
    print(f"{other} turns encode to other ids than were sampled")


def test_rollout_logprob_equals_trainer_logprob(sampled, model, encoder):
    """Also after images that the tool returned, under the sampler's temperature and bans."""
    sampler, episodes = sampled
    batch = pack(episodes, encoder, model.cfg)
    with torch.no_grad():
        hidden_TD = model.hidden(
            batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys
        )
        logp_M, _ = linear_logprobs(
            hidden_TD[batch.rows_M], model.head_weight_VD, batch.targets_M, 0.7, sampler.banned
        )
        plain_M, _ = linear_logprobs(hidden_TD[batch.rows_M], model.head_weight_VD, batch.targets_M)
    assert batch.after_image_M.sum() > 20 and (batch.sampled_logp_M < 0).any()
    for rows in (batch.after_image_M, ~batch.after_image_M):
        torch.testing.assert_close(batch.sampled_logp_M[rows], logp_M[rows], atol=1e-4, rtol=1e-4)
    assert (batch.sampled_logp_M - plain_M).abs().max() > 1e-2  # the temperature does matter here


def test_a_rollout_is_the_same_whatever_it_is_batched_with(
    sampled, model, tokenizer, encoder, questions
):
    sampler, together = sampled
    for k in range(3):
        alone = rollout(
            sampler, encoder, questions[k : k + 1], Limits(max_turns=3), 8, seed=(0, 3), numbers=[k]
        )
        assert [e.ids for e in alone] == [e.ids for e in together[8 * k : 8 * k + 8]]
        assert [e.turns for e in alone] == [e.turns for e in together[8 * k : 8 * k + 8]]
    smaller = rollout(sampler, encoder, questions[:1], Limits(max_turns=3), 3, seed=(0, 3))
    assert [e.ids for e in smaller] == [e.ids for e in together[:3]]
    other = rollout(sampler, encoder, questions[:1], Limits(max_turns=3), 8, seed=(0, 4))
    assert [e.ids for e in other] != [e.ids for e in together[:8]]


@pytest.mark.parametrize("pairs", [60_000, 1_500, 1])
def test_long_pieces_in_several_packs_give_the_same(
    pairs, model, tokenizer, encoder, questions, monkeypatch
):
    """Frames that a pack's end cuts through included; a row of a pack never has more pairs than
    allowed, but for one token's."""
    sampler, seen = make_sampler(model, tokenizer, temperature=0.7), []
    play = (encoder, questions[:1], Limits(max_turns=2), 4)
    straight = rollout(sampler, *play)
    compute = sampler._compute
    sampler._compute = lambda pack: (
        seen.extend((end - start, end) for _, start, end in pack) or compute(pack)
    )
    monkeypatch.setattr(own, "PACK_PAIRS", pairs)
    packed = rollout(sampler, *play)
    assert seen and all(new * keys <= pairs or new == 1 for new, keys in seen)
    assert [e.ids for e in packed] == [e.ids for e in straight]
    for a, b in zip(packed, straight):
        np.testing.assert_allclose(a.sampled_logp, b.sampled_logp, rtol=0, atol=1e-4)


def test_a_groups_prompt_is_read_once(model, tokenizer, encoder, questions):
    sampler, asked = make_sampler(model, tokenizer), []
    features, encoder.features = (
        encoder.features,
        lambda names: asked.append(names) or features(names),
    )
    try:
        episodes = rollout(sampler, encoder, questions[:2], Limits(max_turns=1), 4)
    finally:
        del encoder.features
    (names,) = asked  # those of both prompts together, of one clip
    assert len(names) == 16 and len(set(names)) == 8
    prompts = [episode.ids[: episode.mask.index(1)] for episode in episodes[::4]]
    assert sampler.counts["tokens_read"] == sum(map(len, prompts)) - 2  # each but its last token


def test_vision_tokens_are_never_sampled_however_likely(taught_folder, tokenizer, questions):
    """The head is turned towards the image token until it is the argmax."""
    model = load_model(taught_folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(taught_folder))
    piece = Conversation(questions[0], encoder, tokenizer, Limits()).open()
    pads = [model.cfg.image_token_id, model.cfg.video_token_id]
    with (
        torch.no_grad()
    ):  # features stand in for its embedding, so the prompt's hidden states stay as they are
        ids_T, positions = (
            torch.tensor(piece.ids),
            mrope_positions(piece.ids, piece.grids, model.cfg)[0],
        )
        last_D = model.hidden(
            ids_T,
            positions,
            torch.tensor([0, len(ids_T)], dtype=torch.int32),
            encoder.features(piece.frames),
        )[-1]
        model.model.embed_tokens.weight[pads] = 50 * last_D / last_D.norm()
    assert int((last_D @ model.head_weight_VD.T).argmax()) in pads
    for temperature in (0.0, 1.0, 3.0):
        sampler = make_sampler(model, tokenizer, temperature=temperature)
        sampler.open(piece, [np.random.default_rng(k) for k in range(8)])
        turns = [turn for _, turn in sampler.turns()]
        assert len(turns) == 8
        assert not set(sampler.banned.tolist()) & {i for turn in turns for i in turn.ids}
        assert all(np.isfinite(turn.sampled_logp).all() for turn in turns)


def test_banned_are_vision_message_starts_and_ids_without_a_token(model, tokenizer):
    banned = set(make_sampler(model, tokenizer).banned.tolist())
    vocab = tokenizer.get_vocab()
    tokens = {
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|im_start|>",
        "<tool_response>",
        "</tool_response>",
    }
    assert {vocab[t] for t in tokens} <= banned
    assert not banned & {
        vocab[t]
        for t in (
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<answer>",
            "</answer>",
            "<|im_end|>",
        )
    }
    assert banned - {vocab[t] for t in tokens} == set(range(model.cfg.vocab_size)) - set(
        vocab.values()
    )


def test_a_turn_ends_with_its_end_or_one_token_after_an_action(sampled, tokenizer):
    _, episodes = sampled
    closing = {tokenizer.convert_tokens_to_ids(t) for t in STOPS}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = []
    for episode in episodes:
        runs = [
            [i for _, i in run]
            for m, run in groupby(zip(episode.mask, episode.ids), key=lambda pair: pair[0])
            if m
        ]
        for ids, turn in zip(runs, episode.turns):
            assert not set(ids[:-2]) & (closing | {end}) and ids[-2] != end
            if ids[-1] == end or ids[-2] in closing:
                ends.append(ids[-1])
                assert turn.text == tokenizer.decode(ids[:-1], skip_special_tokens=False)
            elif ids[-1] not in closing:
                assert len(ids) == 48 and turn is episode.turns[-1]
                assert episode.status == "out_of_tokens"
    assert ends.count(end) > len(ends) / 2  # it has been learnt


def test_an_end_that_the_model_says_is_not_said_again(questions, encoder, tokenizer):
    """With its own end or without one: what follows makes the same text."""
    end, texts = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for num_end, last in ((1, [end]), (0, [])):
        conversation = Conversation(questions[0], encoder, tokenizer, Limits())
        conversation.open()
        ids = (*tokenizer.encode(FIRST, add_special_tokens=False), *last)
        conversation.take(Generated(ids, (-0.5,) * len(ids), True, num_end))
        assert conversation.env.turns[0].text == FIRST
        assert sum(conversation.transcript.mask) == len(ids)
        texts.append(tokenizer.decode(conversation.transcript.ids))
    assert texts[0] == texts[1] and f"{FIRST}<|im_end|>\n<|im_start|>user" in texts[0]


def test_what_stands_where_an_end_should_is_learnt_from_but_not_read(questions, encoder, tokenizer):
    conversation = Conversation(questions[0], encoder, tokenizer, Limits())
    conversation.open()
    said = tokenizer.encode(ANSWER, add_special_tokens=False)
    extra = tokenizer.encode("red", add_special_tokens=False)[:1]
    ids = (*said, *extra)
    assert conversation.take(Generated(ids, (-0.5,) * len(ids), True, 1)) is None
    episode = conversation.episode()
    assert (episode.status, episode.answer, episode.turns[0].text) == ("answered", "B", ANSWER)
    assert episode.ids[-len(ids) :] == ids and episode.mask[-len(ids) :] == (1,) * len(ids)


def test_an_action_that_ends_at_the_limit_counts(model, tokenizer):
    """The last token allowed completes the stop text: there is an action, though no end."""
    ids = tokenizer.encode(f"B{STOPS[1]}", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for tokens, num_end in ((ids, 0), ([*ids, end], 1)):
        sampler = make_sampler(model, tokenizer, max_new_tokens=len(tokens))
        (number,) = sampler.open(Piece([20]), [np.random.default_rng(0)])
        row = sampler.rows[number]
        *earlier, said = [sampler._take(row, token, -0.5) for token in tokens]
        assert earlier == [None] * (len(tokens) - 1)
        assert (said.stopped, said.num_end, said.ids) == (True, num_end, tuple(tokens))
        assert said.text_ids == tuple(ids)


@pytest.fixture(scope="module")
def qwen_sampler(model) -> OwnSampler:
    if not QWEN.is_dir():
        pytest.skip(f"{QWEN} is not here")
    return make_sampler(model, load_tokenizer(QWEN))


@pytest.mark.parametrize("end", ["</answer>", "</tool_call>"])
@pytest.mark.parametrize(
    "before", ["B", "B.", "(B)", "3-2\n", "volley ", "{}}", '"', ">", "</", "</answer", "赢"]
)
def test_stops_that_are_several_tokens(end, before, qwen_sampler):
    """In the published tokenizer </answer> has no id of its own, and its "<" may join what stands
    before."""
    sampler, tokenizer = qwen_sampler, qwen_sampler.tokenizer
    text = f"<think>x > y, <b>.</think>\n<answer>{before}"
    whole = tokenizer.encode(text + end, add_special_tokens=False)
    letters = [i for c in text + end for i in tokenizer.encode(c, add_special_tokens=False)]
    if end == "</answer>":
        assert (
            whole[-1] not in (tokenizer.get_vocab().get(end), None)
            and len(tokenizer.encode(end)) > 1
        )
    for ids in (whole, letters):
        ends = [sampler._closes(ids[: k + 1]) for k in range(len(ids))]
        assert ends == [False] * (len(ids) - 1) + [True]


def test_top_p_and_greedy(model, tokenizer):
    p = torch.full((model.cfg.vocab_size,), 1e-9)
    top = [300, 200, 400, 100]
    p[top] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logits_BV = p.log().expand(4000, -1)

    def shares(**sampling):
        sampler = make_sampler(model, tokenizer, **sampling)
        assert not set(top) & set(sampler.banned.tolist())
        how = sampler.sampling.temperature, sampler.sampling.top_p, sampler.banned
        token_B, logp_B = draw(logits_BV, draws, *how)
        counts = torch.bincount(token_B, minlength=len(p)) / 4000
        return counts[top].tolist(), token_B, logp_B

    assert shares()[0] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    assert shares(temperature=0.5)[0] == pytest.approx(
        (np.square([0.5, 0.3, 0.15, 0.05]) / 0.365).tolist(), abs=1e-3
    )
    assert shares(top_p=0.7)[0] == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert shares(top_p=0.81)[0] == pytest.approx(
        [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=1e-3
    )
    assert shares(top_p=0.01)[0] == [1, 0, 0, 0]
    greedy, token_B, logp_B = shares(temperature=0.0)
    assert greedy == [1, 0, 0, 0]
    # the log-probability is the policy's own, before top-p cut it: what the trainer computes
    _, token_B, logp_B = shares(top_p=0.7)
    torch.testing.assert_close(logp_B, p.log()[token_B], atol=1e-5, rtol=0)
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    sampler = make_sampler(model, tokenizer)
    drawn, _ = draw(logits_BV[:2], extremes, 1.0, 1.0, sampler.banned)
    assert not set(drawn.tolist()) & set(sampler.banned.tolist())


def test_greedy_does_not_depend_on_the_seed(model, tokenizer, encoder, questions):
    sampler = make_sampler(model, tokenizer, temperature=0.0)
    one, two = (rollout(sampler, encoder, questions[:2], Limits(), seed=(s,)) for s in (0, 1))
    assert [e.ids for e in one] == [e.ids for e in two]


def test_without_the_tool_it_is_not_offered(model, tokenizer, encoder, questions):
    limits = Limits(num_frames=16, use_tool=False)
    sampler = make_sampler(model, tokenizer, temperature=0.7)
    episodes = rollout(sampler, encoder, questions[:2], limits, 4)
    for episode in episodes:
        assert (
            len(episode.frames) == 16
            and len(episode.turns) == 1
            and episode.turns[0].action in ("answer", "invalid")
        )
        assert "frame_extraction_tool" not in spans(episode, tokenizer)[0][1]


def test_frames_are_encoded_once(model, taught_folder, tokenizer, questions):
    encoder = FrameEncoder(model, ImageConfig.from_folder(taught_folder))
    for _ in range(3):
        episode = replay(questions[0], [FIRST, SECOND, ANSWER], encoder, tokenizer, Limits())
        pack([episode], encoder, model.cfg)
    assert encoder.counts["frames_decoded"] == len(set(episode.frames))
    three = 3 * next(iter(encoder.cache.values())).nbytes
    small = FrameEncoder(model, ImageConfig.from_folder(taught_folder))
    small.cache_bytes = three
    keys = [(questions[0].clip, i) for i in episode.frames]
    assert (
        torch.equal(small.features(keys), encoder.features(keys))
        and len(small.cache) == 3
        and small.cached_bytes == three
    )


def test_frames_go_through_the_tower_together(model, taught_folder, questions, monkeypatch):
    """Up to a number of patches, each frame once; their features are those of one by one."""
    image, clip = ImageConfig.from_folder(taught_folder), questions[0].clip
    names, calls, encode = [(clip, k) for k in (40, 3, 90, 3, 7, 11)], [], model.encode
    one_by_one = FrameEncoder(model, image)
    apart = torch.cat([one_by_one.features([name]) for name in names])
    monkeypatch.setattr(
        model, "encode", lambda patches, grids: calls.append(len(grids)) or encode(patches, grids)
    )
    _, height, width = one_by_one.grid(clip)
    for budget, expected in ((76_544, [5]), (2 * height * width + 1, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(frames, "TOWER_PATCHES", budget)
        together = FrameEncoder(model, image)
        torch.testing.assert_close(together.features(names), apart, rtol=0, atol=1e-5)
        assert calls == expected
        together.features(names)
        assert calls == expected
        calls.clear()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_sampling_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(Sampling(), **wrong)
    with pytest.raises(ValueError, match="max_turns 0"):
        Limits(max_turns=0)


def test_frames_are_decoded_ahead_once_and_are_the_same(model, taught_folder, questions):
    image, clip = ImageConfig.from_folder(taught_folder), questions[0].clip
    plain, ahead = FrameEncoder(model, image), FrameEncoder(model, image)
    plain.expect([(clip, 3)])
    assert plain.coming == {}  # a CPU has no time to spare
    ahead.decodes_ahead = True
    names = [(clip, index) for index in (40, 3, 90, 3)]
    for _ in range(2):
        ahead.expect(names)
    assert len(ahead.coming) == 3
    assert torch.equal(ahead.features(names), plain.features(names))
    assert ahead.coming == {} and ahead.counts["frames_decoded"] == 3
    ahead.expect(names)  # they are in the cache
    assert ahead.coming == {}
    ahead.expect([(clip, 50), (clip, 51)])
    some = [(clip, 51), (clip, 60)]  # one of them was not expected
    assert torch.equal(ahead.features(some), plain.features(some))


def test_a_video_lost_while_it_is_decoded_ahead_is_named(model, taught_folder, questions, tmp_path):
    copy = tmp_path / "clip.mp4"
    copy.write_bytes(Path(questions[0].clip.video).read_bytes())
    clip = questions[0].clip._replace(video=str(copy))
    encoder = FrameEncoder(model, ImageConfig.from_folder(taught_folder))
    encoder.decodes_ahead = True
    encoder.open(clip)
    copy.unlink()
    encoder.expect([(clip, 5)])
    with pytest.raises(VideoError, match="clip.mp4"):
        encoder.features([(clip, 5)])
    with pytest.raises(VideoError, match="clip.mp4"):  # and from now on
        encoder.open(clip)


def test_nothing_is_decoded_ahead_when_a_rollout_has_ended(
    model, tokenizer, taught_folder, questions, monkeypatch
):
    encoder = FrameEncoder(model, ImageConfig.from_folder(taught_folder))
    encoder.decodes_ahead = True
    sampler = make_sampler(model, tokenizer)
    rollout(sampler, encoder, questions[:2], Limits(max_turns=2), 2)
    assert encoder.coming == {} and encoder.counts["frames_decoded"] > 0
    decoded = encoder.counts["frames_decoded"]
    replay(questions[3], [FIRST, ANSWER], encoder, tokenizer, Limits())
    assert encoder.coming == {} and encoder.counts["frames_decoded"] == decoded

    def broken(names):
        raise VideoError("lost.mp4: gone")

    monkeypatch.setattr(encoder, "features", broken)
    with pytest.raises(VideoError, match="gone"):
        rollout(sampler, encoder, questions[4:6], Limits(), 2)
    assert encoder.coming == {} and not sampler.rows and sampler.pages.num_used == 0
