"""Who acts beside the model in training, with the flags of how they do: the sampler, which plays;
the reference, which it must stay close to; the judge, who scores open answers."""

import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

from nanosport.engine.players import Room, make_sampler, server_urls
from nanosport.engine.sampler import Sampling
from nanosport.engine.servers import Servers
from nanosport.env.env import Limits
from nanosport.env.judge import Judge
from nanosport.env.reward import RULES, reward_function
from nanosport.env.tools import STOPS
from nanosport.fields import MAY_CHANGE, Above, AtLeast, AtMost, Share
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode
from nanosport.train import dist
from nanosport.train.config import TrainingConfig
from nanosport.train.deal import data_order
from nanosport.train.inputs import Records
from nanosport.train.metrics import take_work
from nanosport.train.training import Training
from nanosport.train.variants import LAGGING_CAP


@dataclass(frozen=True)
class RolloutConfig(TrainingConfig):
    """The flags of rollouts: who samples, what an episode is given, and what becomes of tokens
    whose sampler was not quite the policy that learns."""

    num_prompts: Annotated[int, AtLeast(1)] = 32
    """Questions of a step, over all ranks."""
    group_size: Annotated[int, AtLeast(2)] = 8
    """Episodes of each question."""
    rollout_batch: Annotated[int, AtLeast(1), MAY_CHANGE] = 256
    """A rank samples so many episodes at a time; it changes memory and time, not what is drawn."""
    temperature: Annotated[float, Above(0)] = 0.8
    """Temperature of the sampler, and of the log-probs in the loss."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 160
    """One assistant turn is cut after so many tokens."""
    max_turns: Annotated[int, AtLeast(1)] = 5
    frames_drawn: Annotated[tuple[int, ...], AtLeast(1)] = ()
    """The overview's number of frames is drawn from these for each prompt, by the seed (as in
    ParaVT). Without any it is always eight."""
    allow_repeats: bool = False
    """A window that was asked for before is shown again, and is no format error: for ablations."""
    episode_tokens: Annotated[int, AtLeast(1)] = 16_384
    """A whole episode, frames included, is ended when it reaches so many tokens."""
    reward: str = "v1"
    """v1, v2, videobrain, accuracy, ungated, or FILE.py:FUNCTION (docs/rewards.md). v2 and
    videobrain need a pass_rate in each question (python -m data_prep.difficulty)."""
    solved_rate: Share = 0.75
    """v2 and videobrain: the base model succeeds where its pass rate is at least this; guesses
    reach 0.5."""
    failed_rate: Share = 0.25
    """videobrain: the tool is needed where the base model's pass rate is at most this."""
    refill: Annotated[int, AtLeast(0)] = 0
    """Groups whose rewards are all equal are replaced by those of further questions, so often at
    most; 0: they stay, and teach nothing."""
    sampler: Annotated[str, MAY_CHANGE] = "own"
    """own: this project's. vllm: an engine of vLLM's in each process. Or vLLM servers, also on
    other nodes: http://HOST:PORT, several with commas between them (docs/vllm.md)."""
    sampler_wait_s: Annotated[float, Above(0), MAY_CHANGE] = 300.0
    """A server that has not answered a request for so long is given up, until the next weights."""
    weights_over: Annotated[Literal["files", "nccl"], MAY_CHANGE] = "files"
    """How servers get new weights: as files in `out`/sampler, which they must see under the same
    path, or GPU to GPU."""
    ahead: Annotated[int, AtLeast(0), AtMost(1), MAY_CHANGE] = 0
    """1: the next step's episodes are sampled by servers while this step learns, so from weights
    that are one step older. 0: exact."""
    rollout_cap: Annotated[float | None, Above(0)] = None
    """Weigh each token by min(trainer's ÷ sampler's probability, this), for samplers that drift
    from the trainer. None: do not; with --ahead 1, but for gspo, 2."""
    rollout_mask: Literal["none", "token", "sequence", "geometric"] = "none"
    """Leave out tokens where trainer's ÷ sampler's probability is off by more than --rollout-bound:
    each token's own, or all of an episode's by their product or by its geometric mean. It takes one
    more forward pass."""
    rollout_bound: Annotated[float | None, Above(1)] = None
    """None: 2, and 1.05 for the geometric mean."""
    keep_rollouts: Annotated[int, AtLeast(0), MAY_CHANGE] = 32
    """So many episodes of each step are kept with their tokens in `out`/rollouts, rounded up to
    whole groups, for the run's page (python -m nanosport.report); 0 keeps none."""

    def check(self) -> None:
        """Raise ValueError for values that no run can use."""
        super().check()
        if self.reward == "videobrain" and self.failed_rate >= self.solved_rate:
            rule = f"must be below --solved-rate {self.solved_rate}"
            raise ValueError(f"--failed-rate {self.failed_rate}: {rule}")
        reward_function(self.reward)
        if self.refill and self.ahead:
            rule = "the sampler is at work on the next step; leave one of them out"
            raise ValueError(f"--refill {self.refill} --ahead {self.ahead}: {rule}")
        urls = server_urls(self.sampler)
        if self.sampler != "own" and not self.frozen:
            rule = "its frames come from a tower that stays as it is"
            raise ValueError(
                f"--sampler {self.sampler}: {rule}: leave --freeze-vision and --freeze-projector on"
            )
        if self.ahead and not urls:
            rule = "learning and sampling at once needs --sampler http://HOST:PORT"
            raise ValueError(f"--ahead {self.ahead}: {rule}")
        if urls and 0 < self.stuck_after_s <= self.sampler_wait_s:
            raise ValueError(
                f"--sampler-wait-s {self.sampler_wait_s:g}: must be below --stuck-after-s"
            )

    @property
    def may_expand(self) -> bool:
        """Not beside vLLM's engine, whose sleep needs memory of its own kind."""
        return self.sampler != "vllm"

    def cap_of(self, loss: str) -> float | None:
        """What importance weights are cut to; None where there are none."""
        lags = self.ahead and loss != "gspo"
        return LAGGING_CAP if self.rollout_cap is None and lags else self.rollout_cap


class Draw(NamedTuple):
    """The questions that are played: a step's, or further ones."""

    step: int
    again: int = 0
    """The further ones are drawn for the again-th time."""
    num: int | None = None
    """So many of them; None: --num-prompts."""


class Actors:
    """The sampler with its encoder of frames, the reference, and the judge."""

    def __init__(self, training: Training, judge: Judge | None):
        cfg, source = training.cfg, training.source
        self.training, self.judge = training, judge
        # who samples needs whole weights: the model itself where it is not sharded, else a copy
        is_own, is_sharded = cfg.sampler == "own", dist.sharded(training.model)
        player = training.whole_copy() if is_own and is_sharded else training.computing
        self.weights = ()
        """What the sampler takes after an update."""
        if is_sharded or not is_own:  # our own adds adapters itself
            self.weights = dist.TrainedWeights(training.model, training.dtype, merged=not is_own)
        self.reference = None
        if cfg.kl > 0 and cfg.lora_rank:  # the same weights, with the adapters switched off
            self.reference = training.computing
        elif cfg.kl > 0:
            frozen = training.whole_copy().requires_grad_(False)
            self.reference = dist.shard(frozen, training.dtype, training.device)
        self.encoder = FrameEncoder(player, training.image)
        self.ref_encoder = self.encoder
        if self.reference is not None and not cfg.frozen:
            # where its tower is sharded, all ranks go through it each time
            kept = not dist.sharded(self.reference.visual)
            self.ref_encoder = FrameEncoder(self.reference, training.image, frozen=kept)
        sampling = Sampling(cfg.temperature, max_new_tokens=cfg.max_new_tokens, stops=STOPS)
        given = {"max_turns": cfg.max_turns, "max_tokens": cfg.episode_tokens}
        rules = {**RULES.get(cfg.reward, {}), **({"near": -1} if cfg.allow_repeats else {})}
        if cfg.frames_drawn:
            rules |= {"num_frames": max(cfg.frames_drawn), "frames_drawn": cfg.frames_drawn}
        self.limits = Limits(syntax=cfg.call_syntax, **given, **rules)
        self.reward = reward_function(cfg.reward, cfg.solved_rate, cfg.failed_rate)
        room = Room(cfg.episode_tokens + cfg.max_new_tokens, cfg.rollout_batch)
        files = (cfg.out / "sampler").absolute()
        servers = Servers(files, cfg.sampler_wait_s, cfg.weights_over, training.rank == 0)
        self.sampler = make_sampler(cfg.sampler, source, player, sampling, room, servers)
        self.coming: tuple[Draw, Future] | None = None
        """What is sampled ahead."""
        self.publish(training.state["step"])

    def publish(self, version: int) -> None:
        """Give the policy's weights to the sampler. All ranks must call this. version: the step
        that they are to play."""
        if self.coming:
            with self.training.stage("rollout"):
                wait([self.coming[1]])
                dist.barrier()  # rank 0 pauses servers that may still play another's episodes
        with self.training.stage("weights to the sampler"):
            self.sampler.load_weights(self.weights, version)
            dist.barrier()  # servers have them when rank 0 says so
            if not self.training.cfg.frozen:
                self.encoder.forget()

    def rollouts(self, records: Records, draw: Draw) -> tuple[list[Episode], dict[str, float]]:
        """This rank's episodes of a draw, and what its sampler has done for them."""
        cfg, coming, self.coming = self.training.cfg, self.coming, None
        if coming and coming[0] == draw:
            episodes = coming[1].result()
        else:
            episodes = self.play(records, draw)
        work = take_work(self.sampler.counts, self.encoder.counts)
        if cfg.ahead and draw.step + 1 < cfg.steps:
            self._begin(records, Draw(draw.step + 1))
        return episodes, work

    def _begin(self, records: Records, draw: Draw) -> None:
        """Sample a draw's episodes in a thread, with the weights that are there now."""
        future: Future = Future()

        def run() -> None:
            try:
                if self.training.device.type == "cuda":  # a thread begins with GPU 0
                    torch.cuda.set_device(self.training.device)
                future.set_result(self.play(records, draw))
            except Exception as error:
                future.set_exception(error)

        self.coming = draw, future
        threading.Thread(target=run, daemon=True).start()

    def play(self, records: Records, draw: Draw) -> list[Episode]:
        """Sample this rank's episodes of a draw."""
        cfg, rank = self.training.cfg, self.training.rank
        picked = self.picked(records, draw)
        mine, first = dist.share(picked, rank), rank * len(picked) // self.training.world
        seed = (cfg.seed, draw.step, draw.again) if draw.again else (cfg.seed, draw.step)
        size, episodes = max(1, cfg.rollout_batch // cfg.group_size), []
        for start in range(0, len(mine), size):
            places = mine[start : start + size]
            numbers = range(first + start, first + start + len(places))
            how = {"group_size": cfg.group_size, "seed": seed, "numbers": numbers}
            episodes += records.play(places, self.sampler, self.limits, **how)
        return episodes

    def picked(self, records: Records, draw: Draw) -> list[int]:
        """The places of a draw's questions, of all ranks."""
        cfg = self.training.cfg
        num_prompts = draw.num or cfg.num_prompts
        return data_order(len(records), cfg.seed + draw.again, draw.step, num_prompts)
