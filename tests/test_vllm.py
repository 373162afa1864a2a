"""vLLM beside our own sampler, token for token: `make test-vllm` runs this in an environment of its
own. Without vLLM there is nothing to test."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import eval
import infer
from data_prep import arena, distill, pretrain
from kernels.policy_loss import linear_logprobs
from nanosport.engine import own, players
from nanosport.engine.players import Room, load_sampler, make_sampler
from nanosport.engine.sampler import Piece, Sampling
from nanosport.engine.servers import Servers
from nanosport.engine.vllm import VllmSampler
from nanosport.env.endpoint import EndpointError
from nanosport.env.env import Limits
from nanosport.env.judge import judge_of
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS
from nanosport.model.decoder import VLModel
from nanosport.model.folder import ASSETS, load_config, save_model
from nanosport.records import Question, read_questions
from nanosport.train.pack import pack
from nanosport.video import VideoError
from tests.helpers.runs import ROOT, assert_same, free_port, log
from tests.helpers.sampling_server import SamplingServer

MODEL = ASSETS / "nano-deepsport"
GREEDY, WARM = (Sampling(t, max_new_tokens=160, stops=STOPS) for t in (0.0, 0.8))
LIMITS, ROOM = Limits(max_tokens=8192), Room(8192 + 160, 64)
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONFAULTHANDLER"] = "1"  # a crash in C code says where each thread stood


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    arena.main(arena.Config(out=folder, sft_clips=1, rl_clips=8, test_clips=1, workers=1))
    return folder


@pytest.fixture(scope="module")
def few(clips) -> Path:
    """Four questions of one clip."""
    path = clips / "few.jsonl"
    path.write_text("".join((clips / "rl.jsonl").read_text().splitlines(True)[:4]))
    return path


@pytest.fixture(scope="module")
def ours():
    """The encoder, and our own sampler, whose model stands for the trainer's."""
    return load_sampler(MODEL, GREEDY)


@pytest.fixture(scope="module")
def theirs(ours) -> VllmSampler:
    """One engine: a process has no second."""
    return make_sampler("vllm", MODEL, ours[1].model, GREEDY, ROOM)


@pytest.fixture(scope="module")
def questions(ours, clips):
    """32 questions that our sampler answers in several turns."""
    encoder, sampler = ours
    asked = read_questions(clips / "rl.jsonl")
    episodes = rollout(sampler, encoder, asked, LIMITS)
    several = [e.question for e in episodes if len(e.turns) > 1 and len(e.frames) > 8]
    assert len(several) >= 32
    return several[:32]


def play(sampler, ours, questions, sampling=GREEDY, group_size=1, limits=LIMITS):
    sampler.sampling = sampling
    return rollout(sampler, ours[0], questions, limits, group_size)


def num_alike(some, others) -> int:
    return sum(a.ids == b.ids and a.status == b.status for a, b in zip(some, others, strict=True))


def gap(some, others) -> float:
    """The largest difference of two samplers' log-probs of equal episodes."""
    pairs = [(a.sampled_logp, b.sampled_logp) for a, b in zip(some, others) if a.ids == b.ids]
    return max(abs(p - q) for a, b in pairs for p, q in zip(a, b, strict=True))


def trainer_gap(ours, episodes) -> float:
    """The largest difference of the sampled log-probs and the trainer's."""
    encoder, sampler = ours
    batch = pack(episodes, encoder, sampler.model.cfg)
    with torch.no_grad():
        hidden_MD, head_VD = batch.hidden_MD(sampler.model), sampler.model.head_weight_VD
        logp_M, _ = linear_logprobs(hidden_MD, head_VD, batch.targets_M, 0.8, sampler.banned)
    return float((logp_M - batch.sampled_logp_M).abs().max())


def test_greedy_episodes_are_ours_token_for_token(ours, theirs, questions):
    wanted, got = (play(sampler, ours, questions) for sampler in (ours[1], theirs))
    assert num_alike(got, wanted) == 32
    assert gap(got, wanted) <= 1e-5
    assert all(len(episode.turns) > 1 for episode in got)


@pytest.mark.parametrize("length", [1, 2, 21, 40])
def test_turns_are_cut_and_end_as_ours(length, ours, theirs, questions):
    """A turn may end with its last token, before it, or between a stop text and its end."""
    sampling = replace(GREEDY, max_new_tokens=length)
    mine = own.OwnSampler(ours[1].model, ours[1].tokenizer, sampling)
    wanted, got = (play(sampler, ours, questions, sampling) for sampler in (mine, theirs))
    assert num_alike(got, wanted) == 32


def test_sampled_logprobs_are_the_trainers(ours, theirs, questions):
    episodes = play(theirs, ours, questions, WARM, group_size=4)
    assert len({episode.ids for episode in episodes}) > 40  # they are drawn
    assert trainer_gap(ours, episodes) <= 1e-4
    again = play(theirs, ours, questions, WARM, group_size=4)
    assert num_alike(again, episodes) == 128  # by their seeds


def test_a_banned_token_is_never_sampled(ours, theirs, questions):
    said = [i for e in play(theirs, ours, questions, WARM) for i, m in zip(e.ids, e.mask) if m]
    favourites = {max(set(said), key=said.count), said[0]}
    banned = torch.tensor(sorted({*theirs.banned.tolist(), *favourites}))
    strict = VllmSampler(theirs.llm, theirs.tokenizer, theirs.cfg, banned, WARM)
    episodes = play(strict, ours, questions, replace(WARM, temperature=2.0, max_new_tokens=40))
    said = {i for e in episodes for i, m in zip(e.ids, e.mask) if m}
    assert len(said) > 100 and not said & set(banned.tolist())


def test_no_picture_can_be_given(ours, theirs, questions):
    """Placeholders that are expanded, with a picture beside them, are what vLLM would take without
    an error: this engine has no tower, and no room for a picture."""
    from PIL import Image
    from vllm.exceptions import VLLMValidationError

    picture, cfg = Image.new("RGB", (320, 180)), ours[1].model.cfg
    ids = [900, *[cfg.image_token_id] * 15, 901]
    with pytest.raises(VLLMValidationError, match="At most 0 image"):
        theirs.llm.generate({"prompt_token_ids": ids, "multi_modal_data": {"image": [picture]}})
    assert theirs.llm.apply_model(
        lambda model: [n for n, _ in model.named_parameters() if "visual" in n]
    ) == [[]]
    piece = Piece(ids, [(1, 6, 10)])  # without features
    with pytest.raises(ValueError, match="15 placeholders for 0 rows"):
        theirs.open(piece, [np.random.default_rng(0)])


def test_what_is_closed_leaves_no_request(ours, theirs, questions):
    def features(names):
        raise VideoError("the disk is gone")

    gone = SimpleNamespace(features=features)

    numbers = theirs.open(Piece([900, 901]), [np.random.default_rng(k) for k in range(3)])
    with pytest.raises(VideoError):
        theirs.say(numbers[0], Piece([theirs.cfg.image_token_id] * 15, [(1, 6, 10)], [0], gone))
    for number in numbers:
        theirs.close(number)
    assert not theirs.asked and not list(theirs.turns())
    assert not theirs.llm.llm_engine.has_unfinished_requests()


def test_new_weights_are_taken_in_place_and_not_before(ours, theirs, questions):
    model = ours[1].model
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = play(ours[1], ours, questions)
    torch.manual_seed(0)
    with torch.no_grad():  # as if trained
        for name, weight in model.named_parameters():
            if not name.startswith("visual."):
                weight.add_(0.07 * weight.abs().mean() * torch.randn_like(weight))
    try:
        wanted = play(ours[1], ours, questions)
        assert num_alike(before, wanted) < 32
        assert sum(len(episode.turns) > 1 for episode in wanted) > 16
        assert num_alike(play(theirs, ours, questions), wanted) < 32  # it was not told
        stale = play(theirs, ours, questions, WARM)
        assert trainer_gap(ours, stale) > 1e-3
        trained = {n: w for n, w in model.named_parameters() if not n.startswith("visual.")}
        theirs.load_weights(trained.items(), 4)
        got = play(theirs, ours, questions)
        # these weights are noise, and their log-probs large: 1.5e-5 was measured on one kind of CPU
        assert num_alike(got, wanted) == 32 and gap(got, wanted) <= 3e-5
        assert {turn.version for episode in got for turn in episode.turns} == {4}
        assert trainer_gap(ours, play(theirs, ours, questions, WARM)) <= 1e-4
    finally:
        model.load_state_dict(kept)
        theirs.load_weights(kept.items(), 0)


def test_weights_go_over_nccl_as_vllm_has_it(ours, theirs, tmp_path, monkeypatch):
    """With vLLM's own classes, up to the communicator: what the server is told, and that it is told
    what is then sent; each rank goes through the weights once a server, there or not."""
    from vllm.distributed.weight_transfer import nccl_engine

    sent, gone_through = [], []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: info)

    def broadcast(iterator, group, **_):
        sent.append((group.world_size, [name for name, _ in iterator]))

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)

    class Weights:
        announced = [("a", torch.float32, (2, 3)), ("b", torch.float32, (4,))]

        def __iter__(self):
            gone_through.append(1)
            return iter((name, torch.zeros(shape)) for name, _, shape in self.announced)

    with SamplingServer(theirs.tokenizer) as server:
        urls = [server.url, f"http://127.0.0.1:{free_port()}"]
        how = Servers(tmp_path, 20.0, "nccl", True)
        sampler = make_sampler(",".join(urls), MODEL, ours[1].model, GREEDY, ROOM, how)
        for version in (1, 2):
            sampler.load_weights(Weights(), version)
        assert sent == [(2, ["a", "b"])] * 2 and len(gone_through) == 4
        assert server.calls[:4] == [
            "/pause",
            "/init_weight_transfer_engine",
            "/start_weight_update",
            "/update_weights",
        ]
        (told,) = {json.dumps(body["update_info"]) for body in server.told if "update_info" in body}
        assert json.loads(told) == {
            "names": ["a", "b"],
            "dtype_names": ["float32"] * 2,
            "shapes": [[2, 3], [4]],
        }
        (init,) = [body["init_info"] for body in server.told if "init_info" in body]
        assert init["master_address"] == "127.0.0.1" and init["world_size"] == 2
        assert init["rank_offset"] == 1 and server.version == "2"
        other = make_sampler(
            ",".join(urls), MODEL, ours[1].model, GREEDY, ROOM, replace(how, pushes=False)
        )
        other.load_weights(Weights(), 3)
        assert len(gone_through) == 6 and server.version == "2"


def test_the_second_family_says_the_same(clips, tmp_path):
    """Qwen3-VL's features are wider than its model: the slices of DeepStack come with them."""
    source, folder = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    pretrain.build_tokenizer(source)
    pretrain.write_config(source, "qwen3_vl")
    torch.manual_seed(0)
    save_model(VLModel(load_config(source)).init_weights(0.1), folder, source)
    clip = next((clips / "clips").glob("*.mp4"))
    assert command("-m", "tests.helpers.vllm_family", folder, clip).splitlines()[-1] == "alike"


# The commands, each in a process of its own.


def command(*words, ranks: int = 1) -> str:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line = [sys.executable, *(several if ranks > 1 else []), *map(str, words)]
    done = subprocess.run(
        line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rl_flags(clips, out) -> list:
    return [
        *("--model", ASSETS / "nano-sft", "--data", clips / "rl.jsonl", "--out", out),
        *("--sampler", "vllm", "--num-prompts", 4, "--group-size", 4, "--episode-tokens", 8192),
        *("--steps", 3, "--warmup", 1, "--min-tool-rate", 0, "--save-every", 2),
        *("--max-logprob-gap", 1e-5),
    ]  # fmt: skip


def test_rl_learns_and_goes_on_exactly(clips, tmp_path):
    out = tmp_path / "run"
    command("rl.py", *rl_flags(clips, out))
    rows = log(out)
    assert len(rows) == 3 and all(row["grad_norm"] > 0 and row["staleness"] == 0 for row in rows)
    (out / "checkpoints" / "step_000003").rename(tmp_path / "aside")
    command("rl.py", *rl_flags(clips, out), "--resume")
    assert_same(log(out), rows)


def test_two_ranks_have_an_engine_each(clips, tmp_path):
    command("rl.py", *rl_flags(clips, tmp_path / "run"), ranks=2)
    rows = log(tmp_path / "run")
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)


def test_two_ranks_share_servers(clips, theirs, tmp_path):
    """Rank 0 brings the weights; the scripted servers are asked by both ranks, with real frames."""
    with SamplingServer(theirs.tokenizer) as a, SamplingServer(theirs.tokenizer) as b:
        b.wrong = lambda number: "old" if number == 9 else None
        servers = ["--sampler", f"{a.url},{b.url}", "--max-logprob-gap", 100, "--ahead", 1]
        command("rl.py", *rl_flags(clips, tmp_path / "run"), *servers, ranks=2)
        assert a.calls.count("/collective_rpc") == b.calls.count("/collective_rpc") == 4
        assert a.version == b.version == "3"
        assert len(a.asked) + len(b.asked) >= 3 * 16 * 4
    assert [row["staleness"] for row in log(tmp_path / "run")] == [0, 1, 1]


def test_infer_eval_and_distillation_take_it_too(clips, few, theirs, tmp_path, monkeypatch, capsys):
    """Greedy answers are those of our own sampler. The engine is the one that is there: a process
    has no second."""
    monkeypatch.setattr(players, "start_engine", lambda *_: theirs.llm)
    question = read_questions(clips / "test.jsonl")[0]
    words = question.video, question.question
    ask = infer.Config(words, model=str(MODEL), json=True, episode_tokens=8192)
    report = eval.Config(
        model=str(MODEL), data=clips / "test.jsonl", limit=3, episode_tokens=8192, temperature=0.0,
        top_p=1.0, modes=("tool",),
    )  # fmt: skip
    turns, episodes = [], []
    for name in ("own", "vllm"):
        capsys.readouterr()
        infer.main(replace(ask, sampler=name))
        turns.append(json.loads(capsys.readouterr().out)["turns"])
        eval.main(replace(report, sampler=name, out=tmp_path / f"{name}.json"))
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        episodes.append(rows["nano-deepsport"]["episodes"])
    assert turns[0] == turns[1] and episodes[0] == episodes[1] and len(episodes[0]) == 3
    out = tmp_path / "taught.jsonl"
    distill.main(distill.Config(few, str(MODEL), out, sampler="vllm", max_new_tokens=160))
    assert out.read_text()


# Servers: vLLM's own, on loopback.


class Server:
    def __init__(self, printed: Path, *line):
        """line: what Python is to run, before the port."""
        self.port, self.line = free_port(), line
        self.url = f"http://127.0.0.1:{self.port}"
        self.printed = open(printed, "a")
        self.start()

    def start(self) -> None:
        line = [sys.executable, *map(str, self.line), "--port", str(self.port)]
        told = {"cwd": ROOT, "env": ENVIRONMENT, "start_new_session": True}
        self.process = subprocess.Popen(line, **told, stdout=self.printed, stderr=self.printed)

    def wait(self) -> "Server":
        for _ in range(400):
            assert self.process.poll() is None, Path(self.printed.name).read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the server does not come up")

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait(30)


TEMPLATE = (  # Qwen2.5-VL's own, without its default for a first message that is missing
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is "
    "string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if "
    "part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SERVE = "from vllm.entrypoints.launchers.api_server.entry import main; main()"


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory):
    """Two servers that sample and one that teaches; they come up while other tests run."""
    folder = tmp_path_factory.mktemp("servers")
    samples = "-m", "nanosport.engine.serve", MODEL, "--max-tokens", ROOM.tokens, "--rows", 64
    teaches = [
        *("-c", SERVE, "--model", MODEL, "--served-model-name", "teacher", "--dtype", "float32"),
        *("--chat-template", TEMPLATE, "--generation-config", "vllm", "--enforce-eager"),
        *("--limit-mm-per-prompt", '{"image": 40, "video": 0}', "--max-num-seqs", 8),
        *("--max-model-len", 8192, "--max-num-batched-tokens", 8192),
        *("--no-enable-chunked-prefill", "--kv-cache-memory-bytes", 1 << 29),
    ]
    servers = [Server(folder / f"{k}.log", *samples) for k in range(2)]
    servers.append(Server(folder / "teacher.log", *teaches))
    yield servers
    for server in servers:
        server.stop()


def test_servers_play_as_ours_through_death_and_stall(running, ours, questions, tmp_path, capfd):
    first, second = (server.wait() for server in running[:2])
    how = Servers(tmp_path / "weights", 120.0, "files", True)
    urls = f"{first.url},{second.url}"
    sampler = make_sampler(urls, MODEL, ours[1].model, GREEDY, ROOM, how)
    weights = [p for p in ours[1].model.named_parameters() if not p[0].startswith("visual.")]
    sampler.load_weights(weights, 1)
    wanted = play(ours[1], ours, questions)
    got = play(sampler, ours, questions)
    assert num_alike(got, wanted) == 32 and gap(got, wanted) <= 1e-5
    assert trainer_gap(ours, play(sampler, ours, questions, WARM)) <= 1e-4
    assert sampler.counts["servers_lost"] == 0

    # killed in mid-step
    killer = threading.Timer(0.5, first.signal, [signal.SIGKILL])
    killer.start()
    assert num_alike(play(sampler, ours, questions), wanted) == 32
    killer.join()
    sampler.sampling = WARM
    assert num_alike(play(sampler, ours, questions), wanted) == 32
    assert f"{first.url}: " in capfd.readouterr().err and sampler.counts["servers_lost"] == 1

    # started anew: it has the weights of its folder, and says so
    first.stop()
    first.start()
    first.wait()
    sampler.servers[0].down = ""  # as a rank that does not know
    assert num_alike(play(sampler, ours, questions), wanted) == 32
    assert "has the weights of step default, not of 1" in capfd.readouterr().err
    sampler.load_weights(weights, 2)
    assert f"{first.url}: is back" in capfd.readouterr().err

    # stalled
    for server in sampler.servers:
        server.wait_s = 15.0
    second.signal(signal.SIGSTOP)
    got = play(sampler, ours, questions)
    second.signal(signal.SIGCONT)
    assert num_alike(got, wanted) == 32
    assert {turn.version for episode in got for turn in episode.turns} == {2}
    assert f"{second.url}: no answer for 15 s" in capfd.readouterr().err


def num_answered(server: Server) -> int:
    """The requests that a server has answered, and would be paid for."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    counts = [line for line in lines if line.startswith("vllm:request_success_total")]
    return int(sum(float(line.split()[-1]) for line in counts if 'reason="abort"' not in line))


def test_a_served_teacher_sees_the_rollouts_tokens_and_nothing_is_paid_for_twice(
    running, few, tmp_path
):
    """vLLM's own tokenisation of the teacher's messages is the rollout's, frames reach it, and a
    distillation that is killed goes on behind what it has."""
    teacher, out = running[2].wait(), tmp_path / "t.jsonl"
    cfg = distill.Config(
        few, "teacher", out, url=f"{teacher.url}/v1", samples=4, max_new_tokens=160, workers=1
    )
    flags = ["--url", cfg.url, "--teacher", "teacher", "--out", out, "--workers", 1]
    flags += ["--max-new-tokens", 160]
    line = [sys.executable, "-m", "data_prep.distill", few, *flags]
    kept = lambda: set((tmp_path / "t.jsonl.answers").glob("*/*.json"))  # noqa: E731
    with open(tmp_path / "killed.log", "w") as printed:
        killed = subprocess.Popen([*map(str, line)], cwd=ROOT, env=ENVIRONMENT, stderr=printed)
    while len(kept()) < 3:
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    before = len(kept())
    distill.main(cfg)
    report = json.loads((tmp_path / "t.jsonl.json").read_text())
    tally = report["endpoints"]["teacher"]
    assert report["same_prompt"] is True
    assert tally["cached"] == before and tally["calls"] == len(kept()) - before > 0
    # one request may have been under way when it was killed
    assert len(kept()) <= num_answered(teacher) <= len(kept()) + 1
    # who sees nothing guesses: of three or four options, and of shirt numbers
    assert report["solved"] >= 3 and report["episodes"]["passed"] > 6
    paid = num_answered(teacher)
    distill.main(cfg)
    assert num_answered(teacher) == paid


def test_a_served_model_that_cannot_judge_gives_no_grade(running, tmp_path):
    """It rambles, in whatever words: the rule scores, and it is counted."""
    teacher = running[2].wait()
    judge = judge_of(f"{teacher.url}/v1", "teacher", tmp_path / "answers", max_ungraded=1.0)
    asked = Question("q", "v", "soccer", "commentary", "Call it.", (), "red 7 volley")
    assert judge.answers(["red 7 header", "red 7 volley"], [asked, asked]) == [None, 1.0]
    assert judge.endpoint.tally["ungraded"] == 1 and judge.endpoint.tally["calls"] == 3
    strict = judge_of(f"{teacher.url}/v1", "teacher", tmp_path / "answers")
    with pytest.raises(EndpointError, match="3 of 3 answers got no grade"):
        strict.answers(["blue", "white", "black"], [asked] * 3)
