"""Servers that sample: what becomes of a step where one dies, hangs, or has other weights. The
servers here are scripted; tests/test_vllm.py has vLLM's own."""

import json
import re
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rl
from nanosport.engine import servers
from nanosport.engine.players import Room, load_sampler, make_sampler, server_urls
from nanosport.engine.sampler import Piece, SamplerError, Sampling
from nanosport.engine.servers import Servers
from nanosport.engine.vllm import Answer, Talk, VllmSampler, frames_of
from nanosport.env.env import Limits
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.records import read_questions
from nanosport.train.variants import near
from tests.helpers.runs import free_port, log
from tests.helpers.sampling_server import SamplingServer

MODEL = Path("assets/nano-sft")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def encoder():
    return load_sampler(MODEL, Sampling())[0]


@pytest.fixture(autouse=True)
def names_only(monkeypatch):
    """Frames go by their names: how vLLM writes features is tested with vLLM."""
    monkeypatch.setattr(servers, "import_vllm", lambda: None)
    monkeypatch.setattr(servers, "sendable", lambda frames, _: [frame.name for frame in frames])


@pytest.fixture
def three(tokenizer):
    with SamplingServer(tokenizer) as a, SamplingServer(tokenizer) as b:
        with SamplingServer(tokenizer) as c:
            yield a, b, c


def sampler_of(urls, model, folder, wait_s=20.0, **sampling):
    how = Servers(folder / "weights", wait_s, "files", True)
    sampling = Sampling(0.8, stops=STOPS, **sampling)
    return make_sampler(",".join(urls), MODEL, model, sampling, Room(20_000, 64), how)


def play(sampler, encoder, arena_folder, group_size=4):
    questions = read_questions(arena_folder / "rl.jsonl")[:6]
    return rollout(sampler, encoder, questions, Limits(), group_size)


def assert_whole(episodes, version: int, count: int = 24) -> None:
    """Every episode is there, played to its end by the weights that were asked for."""
    assert len(episodes) == count
    for episode in episodes:
        assert episode.status == "answered" and [t.action for t in episode.turns] == [
            "tool",
            "answer",
        ]
        assert {turn.version for turn in episode.turns} == {version}
        assert len(episode.frames) == 16


def test_all_servers_play_and_take_the_weights(three, model, encoder, arena_folder, tmp_path):
    sampler = sampler_of([server.url for server in three], model, tmp_path)
    weights = {"lm_head.weight": torch.arange(6.0).view(2, 3)}
    sampler.load_weights(weights.items(), 5)
    assert not (tmp_path / "weights").exists()  # gigabytes are not left behind
    assert_whole(play(sampler, encoder, arena_folder), 5)
    for server in three:
        assert torch.equal(server.weights["lm_head.weight"], weights["lm_head.weight"])
        order = "/pause /collective_rpc /reset_encoder_cache /reset_prefix_cache"
        assert server.calls == [*order.split(), "/update_weight_version", "/resume"]
        assert len(server.asked) == 32  # two groups each, four requests an episode
        body = server.asked[0]
        params = body["sampling_params"]
        assert params["temperature"] == 0.8 and params["logprobs"] == 0
        assert all(bias == float("-inf") for bias in params["logit_bias"].values())
        assert {int(i) for i in params["logit_bias"]} == set(sampler.banned.tolist())
        assert len(body["features"]) == 8  # frames, by name
    assert sampler.counts["servers_lost"] == sampler.counts["asked_again"] == 0


@pytest.mark.parametrize(
    "wrong, why",
    [
        ("die", "refused|reset|closed|disconnected|aborted"),
        ("hang", "no answer for 1 s"),
        ("old", "has the weights of step default, not of 3"),
        ("<html>a proxy speaks</html>", "Expecting value"),
        ('{"choices": []}', "not one of vLLM's"),
    ],
)
def test_a_lost_server_is_named_and_its_episodes_are_played_elsewhere(
    wrong, why, three, model, encoder, arena_folder, tmp_path, capfd
):
    bad, *good = three
    sampler = sampler_of([server.url for server in three], model, tmp_path, wait_s=1.0)
    sampler.load_weights([("w", torch.zeros(1))], 3)
    # from its seventh request on: some of its episodes are in their middle then
    bad.wrong = lambda number: wrong if number >= 7 else None
    assert_whole(play(sampler, encoder, arena_folder), 3)
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if "given up" in line]
    assert bad.url in line and re.search(why, line), line
    assert sampler.counts["servers_lost"] == 1 and sampler.counts["asked_again"] >= 1
    # what it was asked for, another was asked for, word for word
    failed = bad.asked[6]
    assert any(body == failed for server in good for body in server.asked)


def test_a_server_that_was_started_anew_plays_on_with_the_next_weights(
    model, encoder, tokenizer, arena_folder, tmp_path, capfd
):
    port = free_port()
    with SamplingServer(tokenizer) as steady:
        with SamplingServer(tokenizer, port) as first:
            sampler = sampler_of([first.url, steady.url], model, tmp_path)
            sampler.load_weights([("w", torch.zeros(1))], 3)
            first.wrong = lambda number: "die"
            assert_whole(play(sampler, encoder, arena_folder), 3)
        with SamplingServer(tokenizer, port) as anew:
            assert_whole(play(sampler, encoder, arena_folder), 3)
            assert not anew.asked  # nobody knows its weights
            sampler.load_weights([("w", torch.ones(1))], 4)
            assert_whole(play(sampler, encoder, arena_folder), 4)
            assert anew.asked and anew.version == "4"
            assert f"{anew.url}: is back, with the weights of step 4" in capfd.readouterr().err


def test_a_server_that_takes_no_weights_is_not_left_paused(three, model, tmp_path):
    """Another rank may ask it: it must be refused at once, not wait."""
    sampler = sampler_of([server.url for server in three], model, tmp_path)
    three[0].refused.add("/collective_rpc")
    sampler.servers[0].way = "to a process that may be gone"
    sampler.load_weights([("w", torch.zeros(1))], 3)
    assert three[0].calls == ["/pause", "/collective_rpc", "/resume"]
    assert sampler.servers[0].down and sampler.servers[0].way is None
    assert not sampler.servers[1].down


def test_another_rank_meets_a_server_anew_without_bringing_weights(
    three, model, encoder, arena_folder, tmp_path
):
    urls = [server.url for server in three]
    first = sampler_of(urls, model, tmp_path)
    second = sampler_of(urls, model, tmp_path)
    second.how = replace(second.how, pushes=False)
    first.load_weights([("w", torch.zeros(1))], 3)
    gone_through = []
    second.load_weights(((gone_through.append(1), ("w", torch.zeros(1)))[1] for _ in range(2)), 3)
    assert len(gone_through) == 2  # all ranks gather weights together
    assert_whole(play(second, encoder, arena_folder), 3)
    assert three[0].calls.count("/collective_rpc") == 1


def test_none_left_is_one_line(three, model, encoder, arena_folder, tmp_path):
    sampler = sampler_of([server.url for server in three[:2]], model, tmp_path)
    sampler.load_weights([("w", torch.zeros(1))], 3)
    for server in three[:2]:
        server.wrong = lambda number: "die"
    with pytest.raises(SamplerError, match="no server is left .*start one with") as error:
        play(sampler, encoder, arena_folder)
    assert all(server.url in str(error.value) for server in three[:2])
    assert "\n" not in str(error.value)
    assert not sampler.talks and not sampler.waiting


def test_no_server_at_the_start_is_one_line(three, model, tokenizer, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SamplerError, match=f"no server is left .{nobody}: .*refused"):
        sampler_of([nobody], model, tmp_path)
    with SamplingServer(tokenizer, room=19_999) as small:
        with pytest.raises(SamplerError, match="takes 19,999 tokens, 20,000 are needed"):
            sampler_of([small.url], model, tmp_path)
        sampler = sampler_of([small.url, three[0].url], model, tmp_path)
        assert [bool(server.down) for server in sampler.servers] == [True, False]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("name", ["vllm", "http://127.0.0.1:1"])
def test_without_vllm_there_is_one_line(name, model, tmp_path, monkeypatch):
    monkeypatch.undo()
    how = Servers(tmp_path, 1.0, "files", True)
    with pytest.raises(ValueError, match="vLLM cannot be imported .*; make .venv-vllm"):
        make_sampler(name, MODEL, model, Sampling(), Room(100, 1), how)


@pytest.mark.parametrize(
    "name, why",
    [
        ("vlm", "must be own, vllm, or servers"),
        ("http://host", "must be own, vllm, or servers"),
        ("http://host:1/v1", "must be own, vllm, or servers"),
        ("http://host:99999", "must be own, vllm, or servers"),
        ("http://host:1,http://host:1/", "names a server twice"),
    ],
)
def test_an_address_that_is_none_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        server_urls(name)


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"ahead": 1}, "--ahead 1: .* needs --sampler http"),
        ({"ahead": 1, "sampler": "vllm"}, "--ahead 1: .* needs --sampler http"),
        ({"sampler": "vllm", "freeze_projector": False}, "leave --freeze-vision"),
        (
            {"sampler": "http://h:1", "sampler_wait_s": 1800.0},
            "--sampler-wait-s 1800: must be below",
        ),
        ({"loss": "gspo", "rollout_mask": "token"}, "choose sequence or geometric"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, why):
    with pytest.raises(ValueError, match=why):
        rl.Config(**flags).check()


def test_only_rl_speaks_to_servers():
    with pytest.raises(ValueError, match="servers play what rl.py trains"):
        load_sampler(MODEL, Sampling(), name="http://127.0.0.1:1")


# A conversation, as vLLM is asked for it.


def test_a_turn_has_one_token_more_after_a_stop_text():
    sampling = Sampling(0.0, max_new_tokens=5, stops=("</answer>",))
    talk = Talk(np.random.default_rng(0), sampling)
    assert talk.params()["max_tokens"] == 5 and talk.params()["stop"]
    assert talk.take(Answer([1, 2], [-1.0, -2.0], "stop", "</answer>", 3)) is None
    assert talk.params()["max_tokens"] == 1 and not talk.params()["stop"]
    turn = talk.take(Answer([4], [-3.0], "length", None, 3))
    assert turn.ids == (1, 2, 4) and turn.sampled_logp == (-1.0, -2.0, -3.0)
    assert turn.stopped and turn.num_end == 1 and turn.version == 3 and turn.text_ids == (1, 2)
    assert talk.ids == [1, 2, 4] and not talk.said
    # its own end of turn, the length, and a stop text with no room for an end
    ended = talk.take(Answer([1, 7], [0.0, 0.0], "stop", None, 3))
    assert ended.stopped and ended.num_end == 1
    cut = talk.take(Answer([1] * 5, [0.0] * 5, "length", None, 3))
    assert not cut.stopped and cut.num_end == 0
    full = talk.take(Answer([1] * 5, [0.0] * 5, "stop", "</answer>", 3))
    assert full.stopped and full.num_end == 0


class Engine:
    """What a VllmSampler asks of its engine, written down."""

    def __init__(self):
        self.calls, self.llm_engine = [], self

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method, kwargs):
        self.calls.append(f"{method} {' '.join(name for name, _ in kwargs['weights_iterator'])}")

    def apply_model(self, function):
        self.calls.append(function.__name__)

    def reset_encoder_cache(self):
        self.calls.append("no features")

    def reset_prefix_cache(self):
        self.calls.append("no prefixes")
        return True


def test_on_a_gpu_the_engine_sleeps_while_the_policy_learns(model, tokenizer, monkeypatch):
    """Level 2 drops weights and cache; it wakes by parts, so that both do not lie beside what
    training holds; nothing that old weights have computed stays."""
    engine = Engine()
    sampler = VllmSampler(engine, tokenizer, model.cfg, torch.tensor([1]), Sampling())
    renewed = ["reload_weights a b", "renew_packed_head"]
    emptied = ["no features", "no prefixes"]
    weights = [("a", torch.zeros(1)), ("b", torch.zeros(1))]
    sampler.sleep()  # on a CPU it does not
    sampler.load_weights(weights, 1)
    assert engine.calls == [*renewed, *emptied] and sampler.version == 1
    engine.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sampler.sleep()
    sampler.load_weights(weights, 2)
    assert engine.calls == ["sleep 2", "wake weights", *renewed, "wake kv_cache", *emptied]
    sampler.load_weights(weights, 3)  # awake already
    assert engine.calls[-4:] == [*renewed, *emptied] and len(engine.calls) == 11


def test_placeholders_are_as_many_as_features(model):
    cfg, grid = model.cfg, (1, 4, 4)
    ids, width = [900] + [cfg.image_token_id] * 4 + [901], 8

    def piece_of(ids, grids, num_rows: int) -> Piece:
        encoder = SimpleNamespace(features=lambda names: torch.rand(num_rows, width))
        return Piece(ids, grids, range(len(grids)), encoder)

    talk = Talk(np.random.default_rng(0), Sampling())
    assert frames_of(Piece([1, 2]), cfg) == []
    talk.add([1, 2], [])
    talk.add(ids + ids, frames_of(piece_of(ids + ids, [grid, grid], 8), cfg))
    assert [frame.start for frame in talk.frames] == [3, 9]
    assert talk.frames[0].name != talk.frames[1].name
    for piece in (
        Piece(ids, [grid]),  # expanded, and no features
        piece_of(ids, [grid], 3),
        piece_of([900, cfg.image_token_id, 901], [grid], 4),  # one for a picture
        piece_of(ids, [], 4),
    ):
        with pytest.raises(ValueError, match="placeholders for"):
            frames_of(piece, cfg)


# RL with servers: the step ends, or the run does, with one line.


def config(urls, arena_folder, out, **more) -> rl.Config:
    return rl.Config(
        model=str(MODEL), data=arena_folder / "rl.jsonl", out=out, sampler=",".join(urls),
        num_prompts=2, group_size=4, episode_tokens=8192, min_tool_rate=0, max_logprob_gap=100.0,
        warmup=1, **more,
    )  # fmt: skip


def test_a_step_ends_though_a_server_dies_in_it(three, arena_folder, tmp_path):
    urls = [server.url for server in three[:2]]
    three[0].wrong = lambda number: "die" if number == 5 else None
    rl.main(config(urls, arena_folder, tmp_path / "run", steps=2))
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["servers_lost"] for row in rows] == [1, 0]
    assert [row["staleness"] for row in rows] == [0, 0] and rows[0]["asked_again"] >= 1
    assert three[1].version == "2"


def test_where_none_is_left_the_run_saves_and_ends(three, arena_folder, tmp_path):
    cfg = config([three[0].url], arena_folder, tmp_path / "run", steps=3)
    three[0].wrong = lambda number: "die" if three[0].version == "1" else None
    with pytest.raises(ValueError, match="no server is left .*in step 1; .*--resume goes on"):
        rl.main(cfg)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").exists()
    with pytest.raises(SamplerError, match="no server is left"):  # still none: one line again
        rl.main(replace(cfg, resume=True))
    rl.main(replace(cfg, resume=True, sampler=three[1].url))
    assert [row["step"] for row in log(tmp_path / "run")] == [0, 1, 2]
    assert three[1].version == "3"


def test_ahead_samples_the_next_step_while_this_one_learns(three, arena_folder, tmp_path):
    """Each batch but the first is one step stale, and no turn is of mixed weights."""
    learning, beside = threading.Event(), []
    whole = rl.policy_loss

    def policy_loss(*args):
        learning.set()
        try:
            return whole(*args)
        finally:
            learning.clear()

    def watch(number):
        # so long a turn takes; on a busy machine what is between two updates takes a while
        beside.append(learning.wait(0.2 if any(beside) else 2.0))

    for server in three:
        server.wrong = watch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "policy_loss", policy_loss)
        urls = [server.url for server in three]
        rl.main(config(urls, arena_folder, tmp_path / "run", steps=4, ahead=1))
    rows = log(tmp_path / "run")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert any(beside)
    bodies = [body for server in three for body in server.asked]
    assert len(bodies) == 4 * 8 * 4  # steps, episodes, requests: nothing is sampled in vain


def test_the_committed_runs_learn_alike():
    """Ten steps of the arena from the same SFT models, vLLM's draws beside our own: reward rises,
    and the sampler's log-probs are the trainer's in every step."""
    paths = sorted(Path("results/engine/vllm_rl").glob("*_seed*.jsonl"))
    runs = {path.stem: [json.loads(line) for line in path.open()] for path in paths}
    rises = {"own": [], "vllm": []}
    for name, rows in runs.items():
        assert [row["step"] for row in rows] == [*range(10)]
        assert all(row["staleness"] == 0 and row["skipped"] == 0 for row in rows)
        assert all(row[f"logprob_gap_{where}"] < 1e-6 for row in rows for where in GAPS)
        rewards = [row["reward"] for row in rows]
        rises[name.partition("_")[0]].append(np.mean(rewards[7:]) - np.mean(rewards[:3]))
    assert len(rises["own"]) == len(rises["vllm"]) == 3
    assert min(rises["own"] + rises["vllm"]) > 0.1, rises


GAPS = ("text", "after_image")


# Tokens whose sampler was not quite the policy.


def test_masks_follow_their_rule():
    log_ratio_M = torch.tensor([0.1, -0.1, 0.9, 0.05, 0.3, 0.3, 0.3, -1.0])
    episode_M = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    bound = float(np.exp(0.8))
    kept = {rule: near(rule, bound, log_ratio_M, episode_M).tolist() for rule in RULES}
    assert kept["token"] == [True, True, False, True, True, True, True, False]
    # sums 0.95, 0.9, −1; means 0.24, 0.3, −1
    assert kept["sequence"] == [False] * 8
    assert kept["geometric"] == [True] * 7 + [False]


RULES = ("token", "sequence", "geometric")


@pytest.mark.parametrize("rule", ("none", *RULES))
def test_what_is_masked_is_not_learnt_from(rule, three, arena_folder, tmp_path):
    """The scripted sampler says −0.5 for every token, which is far off: nothing is left."""
    mask = {"rollout_mask": rule, "rollout_bound": 1.0001}
    rl.main(config([three[0].url], arena_folder, tmp_path / rule, steps=1, kl=0.1, **mask))
    (row,) = log(tmp_path / rule)
    if rule == "none":
        assert row["masked"] == 0
    else:
        assert row["masked"] > 0.99 and row["grad_norm"] < 1e-3
