"""The memory of one GPU by moment and part: the stages of train.py, rl.py and the sampler, run on
fake tensors of the planned shape. All sizes are bytes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache
from math import ceil
from types import SimpleNamespace

import numpy as np
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import rl
import train
from nanosport import cli
from nanosport.engine.own import PACK_TOKENS, OwnSampler
from nanosport.engine.pages import PAGE, Pages
from nanosport.engine.sampler import Piece, Sampling
from nanosport.engine.step import Step
from nanosport.model.cost import num_adapted, num_weights
from nanosport.model.decoder import ModelConfig, VLModel
from nanosport.model.frames import CACHE_BYTES, CACHE_SHARE, TOWER_PATCHES
from nanosport.model.vision import VisionConfig
from nanosport.plan.ledger import Ledger, counting
from nanosport.plan.synthetic import Lengths, bare_actors, bare_training, make_episodes, take_step
from nanosport.records import Episode
from nanosport.train import dist, optim, recompute
from nanosport.train.deal import Unit, make_units

GIB = 2**30
RESERVED = 2 * GIB
"""What the CUDA context, NCCL and cuBLAS take, and the allocator cannot fill."""
Moments = dict[str, dict[str, float]]
"""What each part holds at each moment: {moment: {part: bytes}}."""
Run = train.Config | rl.Config


class Stage:
    """SFT or RL, as the GPU sees it that has most to do."""

    def __init__(
        self, model: ModelConfig, run: Run, lengths: Lengths, max_turn: int, gpus: int, room: float
    ):
        """lengths: an average episode's. max_turn: the tokens that a turn may have. room: usable
        bytes of a GPU."""
        self.model, self.run, self.gpus, self.room = model, run, gpus, room
        self.lengths, self.longest = lengths, replace(lengths, turn_text=max_turn)
        self.kept = recompute.Kept(model, run.micro_tokens)

        # the GPU's prompts of a step, the episodes of each, the prompts that are sampled at a time
        self.is_rl = isinstance(run, rl.Config)
        if self.is_rl:
            self.prompts, self.members = ceil(run.num_prompts / gpus), run.group_size
            self.sampled = min(self.prompts, max(1, run.rollout_batch // run.group_size))
        else:
            self.prompts, self.members = ceil(run.batch_size / gpus), 1

        # the tower is frozen, and counts to neither what learns nor what moves between GPUs
        self.weights = num_weights(model)
        self.num_weights = sum(self.weights.values())
        self.num_moved = self.num_trained = self.num_weights - self.weights["vision"]
        if run.lora_rank:
            self.num_trained = num_adapted(model, run.lora_rank, run.lora_targets)

    @cached_property
    def units(self) -> list[Unit]:
        """What a step's episodes become when they are packed."""
        episodes = make_episodes(self.model, self.lengths, self.prompts, self.members)
        packing = self.model, self.run.micro_tokens, self.run.share_prefix
        return make_units(episodes, self.members, [0] * len(episodes), *packing)

    @property
    def micro_batches(self) -> int:
        return -(-sum(unit.tokens for unit in self.units) // self.run.micro_tokens)

    @property
    def copy_bytes(self) -> float:
        """The sampler's weights. What is not sharded plays itself; vLLM takes DeepStack's features
        only beside a tower."""
        sampler, wide = self.run.sampler, self.model.vision.feature_size > self.model.hidden_size
        tower = 0 if sampler == "vllm" and wide else self.weights["vision"]
        return 0 if sampler == "own" and self.gpus == 1 else 2 * (self.num_weights - tower)

    @property
    def rollout(self) -> dict[str, float]:
        """What the sampler holds: the pages of the fullest turn, and on top a pack of results, or a
        step of all rows."""
        run, lengths, whole = self.run, self.longest, self.longest.prompt // PAGE
        tokens, pages = lengths.prompt, 0
        for turn in range(run.max_turns):
            # an episode that reaches episode_tokens with the result has ended
            tokens = min(tokens + run.max_new_tokens, run.episode_tokens)
            rows = ceil(self.sampled * self.members * lengths.still_going(turn, run.max_turns))
            pages = max(pages, self.sampled * whole + rows * (ceil(tokens / PAGE) - whole))
            tokens += lengths.result
        longest = min(tokens + run.max_new_tokens, run.episode_tokens)
        step = lengths, self.sampled * self.members, run.max_new_tokens, longest
        beside = at_depth(sampler_moments, 1, self.model, *step)
        cache = pages * Pages.page_bytes(self.model, PAGE, torch.bfloat16)
        return largest(beside, "rollout copy", "pages") | {"KV cache": cache}

    @cached_property
    def moments(self) -> Moments:
        """What the GPU holds, but for what --recompute auto keeps. "always" is there at every
        moment but the start, when each rank loads all weights before it keeps its shard."""
        # a step whose micro-batches are full, and the features of one
        model, run = self.model, self.run
        episodes, flags = fullest(model, run, self.longest)
        step = at_depth(training_moments, 3, model, flags, episodes, self.gpus)
        update = step["update"]
        num_features = sum(episode.ids.count(model.image_token_id) for episode in episodes)
        image_bytes = 2 * model.vision.feature_size * num_features
        step_bytes = image_bytes * self.micro_batches

        # before the step: what stays, and the moments that end when their work is done
        always = {
            "CUDA, NCCL": RESERVED,
            "vision tower": 2 * self.weights["vision"],
            "weights": update["weights"],
            "Adam moments": 0.0 if run.offload_adam else update["Adam moments"],
            "frames seen": min(CACHE_BYTES, CACHE_SHARE * self.room, run.steps * step_bytes),
        }
        moments = {"always": always}
        moments["start"] = {"all weights": (2 if run.lora_rank else 4) * self.num_weights}
        moments["encode"] = {"tower": encode_bytes(model.vision, self.longest)}
        if self.is_rl:
            copy, stays = {"rollout copy": self.copy_bytes}, run.sampler == "own"
            always |= copy if stays else {}
            always["reference"] = update.get("reference", 0.0)
            always["frames of the step"] = step_bytes - image_bytes
            if "http" not in run.sampler:  # vLLM's copy sleeps while the policy learns
                moments["rollout"] = ({} if stays else copy) | self.rollout

        # the step, of which only the fullest pass is told
        passes = {"loss", "backward pass", "embedding"} & step.keys()
        moments["train"] = largest({name: step[name] for name in passes}, *always)
        moments["update"] = largest({"update": update}, *always)
        if run.offload_adam:  # the moments of one weight at a time visit the GPU
            head = 12 * model.vocab_size * model.hidden_size
            moments["update"] = {"gradients": update["gradients"], "one moment": head / self.gpus}
        return moments

    @cached_property
    def modes(self) -> list[str]:
        """What each layer computes again in the backward pass."""
        if self.run.recompute != "auto":
            return [self.run.recompute] * self.model.num_hidden_layers
        held = sum(self.moments["always"].values()) + self.moments["train"].get("gradients", 0)
        return recompute.choose(self.kept, self.room - held - recompute.reserve(self.kept))

    @property
    def memory(self) -> Moments:
        """What the GPU holds, with what its layers keep in the room that there is."""
        beside = 0
        if self.run.recompute == "auto":
            beside = self.kept.layers(self.modes) - self.kept.layers(["all"] * len(self.modes))
        train = self.moments["train"] | {"kept beside layers' inputs": beside}
        return self.moments | {"train": train}

    @property
    def saving(self) -> dict[str, float]:
        """What checkpoints take on the host while they are saved, and on disk.

        A rank copies its shards of weights and moments out of the GPU, and writes them from there.
        The model's folder is made of what was written, weight after weight: the largest is the
        head. Of a model with adapters, they alone are saved.
        """
        checkpoint = 12 * self.num_trained + 2 * self.weights["vision"]
        whole = 2 * self.num_weights
        head = 8 * self.model.vocab_size * self.model.hidden_size  # in float32, in parts and joined
        if self.run.lora_rank:
            checkpoint, whole, head = 12 * self.num_trained, 4 * self.num_trained, 0
        host = {"host, a rank": checkpoint / self.gpus, "host, rank 0 more": head}
        return host | {"disk, a checkpoint": checkpoint, "disk, the model": whole}


def fullest(model: ModelConfig, run: Run, lengths: Lengths) -> tuple[tuple[Episode, ...], Run]:
    """(Episodes that fill a micro-batch to its last token, what memory depends on of `run`)."""
    together = getattr(run, "group_size", 1) if run.share_prefix else 1
    while together > 1 and lengths.prompt + together * lengths.response > run.micro_tokens:
        together //= 2
    groups = max(1, int(run.micro_tokens / (lengths.prompt + together * lengths.response)))
    tokens = run.micro_tokens + groups * (together - 1) * lengths.prompt  # a prompt counts once
    episodes = make_episodes(model, lengths, groups, together, tokens)

    # few flags, so that recipes which need as much are counted once
    names = "micro_tokens", "share_prefix", "kl", "updates", "loss", "lora_rank", "lora_targets"
    flags = {name: getattr(run, name) for name in names if hasattr(run, name)}
    flags["recompute"] = "all" if run.recompute == "auto" else run.recompute
    if isinstance(run, rl.Config):
        flags["group_size"] = together
    return tuple(episodes), type(run)(**flags)


def at_depth(moments_of: Callable[..., Moments], few: int, cfg: ModelConfig, *how) -> Moments:
    """moments_of(cfg, *how) of a deep model from two shallow ones, of `few` layers and one more:
    with every layer, each part grows by the same."""
    more = cfg.num_hidden_layers - few
    if more <= 1:
        return moments_of(cfg, *how)
    small, larger = (moments_of(replace(cfg, num_hidden_layers=n), *how) for n in (few, few + 1))
    return {
        moment: {part: size + more * (larger[moment][part] - size) for part, size in parts.items()}
        for moment, parts in small.items()
    }


def largest(moments: Moments, *apart: str) -> dict[str, float]:
    """The parts of the fullest moment, but for those apart and what is below a MiB."""
    parts = max(moments.values(), key=lambda parts: sum(parts.values()))
    return {p: size for p, size in parts.items() if size >= 1 << 20 and p not in apart}


def totals(moments: Moments) -> dict[str, float]:
    """{moment: bytes with what is always there}."""
    sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
    before = {"always": 0.0, "start": RESERVED}
    return {moment: size + before.get(moment, sums["always"]) for moment, size in sums.items()}


def peak(moments: Moments) -> float:
    return max(totals(moments).values())


def computing_dtype(run: Run, on_gpu: bool) -> torch.dtype:
    return dist.dtype_of(run.dtype, torch.device("cuda" if on_gpu else "cpu"))


def step_peak(
    model: ModelConfig, run: Run, episodes: tuple[Episode, ...], gpus: int, on_gpu: bool
) -> float:
    """A step's peak with frozen towers, but without a sampler and the CUDA context. No process
    group may be there."""
    moments = at_depth(training_moments, 3, model, run, episodes, gpus, on_gpu)
    towers = 2 if getattr(run, "kl", 0) > 0 and not run.lora_rank else 1
    towers *= num_weights(model)["vision"] * computing_dtype(run, on_gpu).itemsize
    return towers + max(sum(parts.values()) for parts in moments.values())


@contextmanager
def ranks(num_ranks: int) -> Iterator[None]:
    """A process group of which only this rank is there; 0: no group."""
    if num_ranks:
        warnings.filterwarnings("ignore", "Set timeout is now only supported")
        one = {"store": FakeStore(), "rank": 0, "world_size": num_ranks}
        torch.distributed.init_process_group("fake", **one)
    try:
        yield
    finally:
        cli.leave_group()


def shape_of(cfg: ModelConfig, dtype: torch.dtype) -> VLModel:
    """A model without storage, and without its tower, which is frozen and whole on every GPU."""
    with torch.device("meta"):
        model = VLModel(replace(cfg, vision=cfg.vision.shallow())).to(dtype)
    model.cfg, model.visual = cfg, torch.nn.Identity()
    return model


@lru_cache
def training_moments(
    model: ModelConfig, run: Run, episodes: tuple[Episode, ...], gpus: int, on_gpu: bool = True
) -> Moments:
    """A step on `episodes`, where gradients are there from a micro-batch before, and Adam's moments
    from a step before. gpus: the model is sharded among so many; 0: it is not."""
    dtype, device, actors = computing_dtype(run, on_gpu), torch.device("cpu"), None
    policy = shape_of(model, dtype if run.lora_rank else torch.float32)
    reference = shape_of(model, dtype).requires_grad_(False)
    with ranks(gpus), counting(on_gpu) as ledger:
        ledger.enter("weights")
        training = bare_training(run, policy.to_empty(device=device), episodes[0], device, dtype)
        parts = {"train": "activations", "update": "Adam's square roots"}
        training.stage = lambda name: nullcontext(ledger.enter(parts.get(name, name), name))
        follow(training.computing, ledger)
        if isinstance(run, rl.Config):
            ledger.enter("reference")
            if run.lora_rank:  # it is the policy, with its adapters switched off
                reference = training.computing
            elif run.kl > 0:
                reference = dist.shard(reference.to_empty(device=device), dtype, device)
            actors = bare_actors(training, reference if run.kl > 0 else None)
        ledger.enter("Adam moments")
        optim.start_moments(training.optimizer)
        for group in training.optimizer.param_groups:
            group["foreach"], group["fused"] = False, on_gpu  # as it is built on a GPU
        ledger.enter("gradients")
        for weight in training.model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        take_step(training, actors, episodes)
    return ledger.peaks


def follow(model: VLModel, ledger: Ledger) -> None:
    """Tell the ledger where in its forward and backward pass the model is."""
    embedding, norm = model.model.embed_tokens, model.model.norm
    entered = {embedding: ("activations", "embedding"), norm: ("loss", "backward pass")}

    def after(module, args, x_TD):
        forward, backward = entered[module]
        ledger.enter(forward)
        if x_TD.requires_grad:
            x_TD.register_hook(lambda _: ledger.enter("backward pass", backward))

    for module in entered:
        module.register_forward_hook(after)


@lru_cache
def sampler_moments(
    model: ModelConfig, lengths: Lengths, rows: int, max_new_tokens: int, before: int
) -> Moments:
    """The sampler as it reads a pack of frames that come after `before` tokens, and in a step of so
    many rows of that length."""
    num_frames = PACK_TOKENS // (lengths.frame_tokens + lengths.label)
    shown = {"overview": 0, "calls": 1, "frames_per_call": num_frames, "result_text": 1}
    lengths = replace(lengths, **shown, prompt_text=before, turn_text=0)
    (episode,) = make_episodes(model, lengths, 1, 1)
    shape = num_frames * lengths.frame_tokens, model.vision.feature_size
    tokenizer = SimpleNamespace(get_vocab=dict, convert_tokens_to_ids=lambda token: 0)
    policy, sampling = shape_of(model, torch.bfloat16), Sampling(max_new_tokens=max_new_tokens)
    with counting(on_gpu=True) as ledger:
        ledger.enter("rollout copy")
        sampler = OwnSampler(policy.to_empty(device="cpu"), tokenizer, sampling)
        sampler._features = lambda pack: torch.empty(shape, dtype=torch.bfloat16)
        sampler.open(Piece(episode.ids, [episode.grid] * num_frames), [np.random.default_rng(0)])
        (row,) = sampler.rows.values()
        ledger.enter("pages")
        sampler.pages = Pages(model, "cpu", torch.bfloat16, ceil(row.room / PAGE), PAGE)
        sampler.pages.reserve(row)
        row.length = before
        ledger.enter("prefill")
        sampler._compute([(row, before, len(row.ids) - 1)])
        ledger.enter("decode")
        Step(policy, sampling, sampler.banned, sampler.pages, (rows, len(row.pages))).run()
    return {name: ledger.peaks[name] for name in ("prefill", "decode")}


@lru_cache
def encode_bytes(cfg: VisionConfig, lengths: Lengths) -> float:
    """What the tower holds at its peak, besides its weights, for all frames that it takes at
    once."""
    with torch.device("meta"):
        tower = cfg.shallow().tower().to(torch.bfloat16)
    with counting(on_gpu=True) as ledger, torch.no_grad():
        ledger.enter("weights")
        tower.to_empty(device="cpu")
        ledger.enter("frames")
        frame_patches = lengths.frame_tokens * cfg.merge_unit
        frames = max(1, TOWER_PATCHES // frame_patches)
        patches_PC = torch.empty(frames * frame_patches, cfg.patch_width)
        tower(patches_PC, [lengths.grid(cfg.spatial_merge_size)] * frames)
    return ledger.peaks["frames"]["frames"]
