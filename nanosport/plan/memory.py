"""The memory of one GPU by moment and part: the stages of train.py, rl.py and the sampler, run on
fake tensors of the planned shape. All sizes are bytes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
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
from nanosport.engine.sampler import Sampling
from nanosport.engine.step import Step
from nanosport.model.cost import num_adapted, num_weights
from nanosport.model.decoder import ModelConfig, VLModel
from nanosport.model.frames import CACHE_BYTES, TOWER_PATCHES
from nanosport.model.vision import VisionConfig
from nanosport.plan.ledger import Ledger, counting
from nanosport.plan.synthetic import (
    Lengths,
    Texts,
    bare_actors,
    bare_training,
    make_episodes,
    take_step,
)
from nanosport.records import Episode
from nanosport.train import dist, optim

GIB = 2**30
RESERVED = 2 * GIB
"""What the CUDA context, NCCL and cuBLAS take, and the allocator cannot fill."""
Moments = dict[str, dict[str, float]]
"""What each part holds at each moment: {moment: {part: bytes}}."""


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


def at_depth(moments_of: Callable[[ModelConfig], Moments], cfg: ModelConfig, few: int) -> Moments:
    """The moments of a deep model from two shallow ones, of `few` layers and one more: with every
    layer, each part grows by the same."""
    more = cfg.num_hidden_layers - few
    if more <= 1:
        return moments_of(cfg)
    small, larger = (moments_of(replace(cfg, num_hidden_layers=n)) for n in (few, few + 1))
    return {
        moment: {part: size + more * (larger[moment][part] - size) for part, size in parts.items()}
        for moment, parts in small.items()
    }


def shape_of(cfg: ModelConfig, dtype: torch.dtype) -> VLModel:
    """A model without storage, and without its tower, which is frozen and whole on every GPU."""
    with torch.device("meta"):
        model = VLModel(cfg).to(dtype)
    model.visual = torch.nn.Identity()
    return model


def computing_dtype(run: train.Config | rl.Config, on_gpu: bool) -> torch.dtype:
    return dist.dtype_of(run.dtype, torch.device("cuda" if on_gpu else "cpu"))


@lru_cache
def training_moments(
    model: ModelConfig,
    run: train.Config | rl.Config,
    episodes: tuple[Episode, ...],
    gpus: int,
    on_gpu: bool = True,
) -> Moments:
    """A step on `episodes`, where gradients are there from a micro-batch before, and Adam's moments
    from a step before. gpus: the model is sharded among so many; 0: it is not."""
    dtype, has_reference = computing_dtype(run, on_gpu), getattr(run, "kl", 0) > 0
    policy = shape_of(model, dtype if run.lora_rank else torch.float32)
    reference = shape_of(model, dtype)
    device, actors = torch.device("cpu"), None
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
            elif has_reference:
                reference = reference.to_empty(device=device).requires_grad_(False)
                reference = dist.shard(reference, dtype, device)
            actors = bare_actors(training, reference if has_reference else None)
        ledger.enter("Adam moments")
        optim.start_moments(training.optimizer)
        for group in training.optimizer.param_groups:
            group["foreach"], group["fused"] = False, on_gpu  # as it is built on a GPU
        ledger.enter("gradients")
        for weight in training.model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        take_step(training, actors, episodes)
        if actors:
            ledger.enter("a whole weight", "publish")
            for _ in dist.TrainedWeights(training.model, training.dtype):
                pass
    return ledger.peaks


def step_peak(
    model: ModelConfig, run: train.Config | rl.Config, episodes: tuple, gpus: int, on_gpu: bool
) -> float:
    """A step's peak with frozen towers, but without a sampler and the CUDA context. No process
    group may be there."""
    step = run, episodes, gpus, on_gpu
    moments = at_depth(lambda cfg: training_moments(cfg, *step), model, 3)
    towers = 2 if getattr(run, "kl", 0) > 0 and not run.lora_rank else 1
    towers *= num_weights(model)["vision"] * computing_dtype(run, on_gpu).itemsize
    return towers + max(sum(parts.values()) for parts in moments.values())


def follow(model: VLModel, ledger: Ledger) -> None:
    """Tell the ledger where in its forward and backward pass the model is."""

    def after_embedding(module, args, x_TD):
        ledger.enter("activations")
        if x_TD.requires_grad:
            x_TD.register_hook(lambda _: ledger.enter("backward pass", "embedding"))

    def after_norm(module, args, x_TD):
        ledger.enter("loss")
        if x_TD.requires_grad:
            x_TD.register_hook(lambda _: ledger.enter("backward pass"))

    model.model.embed_tokens.register_forward_hook(after_embedding)
    model.model.norm.register_forward_hook(after_norm)


@lru_cache
def sampler_moments(model: ModelConfig, lengths: Lengths, prompts: int, run: rl.Config) -> Moments:
    """The sampler in a rollout of `prompts` groups, all of whose turns are as long as they may be:
    the pages of the fullest turn, and on top a pack of results, or a step of all rows."""
    longest, most = lengths.prompt + run.max_new_tokens, 0
    for turn in range(run.max_turns):
        rows = ceil(prompts * run.group_size * lengths.still_going(turn, run.max_turns))
        # an episode that reaches episode_tokens with the result has ended
        longest = min(longest, run.episode_tokens)
        whole = lengths.prompt // PAGE
        most = max(most, prompts * whole + rows * (ceil(longest / PAGE) - whole))
        longest += lengths.result + run.max_new_tokens

    policy, texts = shape_of(model, torch.bfloat16), Texts(model, lengths)
    tokenizer = SimpleNamespace(get_vocab=dict, convert_tokens_to_ids=lambda token: 0)
    sampling = Sampling(max_new_tokens=run.max_new_tokens)
    num_frames = PACK_TOKENS // (lengths.frame_tokens + lengths.label)
    with counting(on_gpu=True) as ledger:
        ledger.enter("rollout copy")
        sampler = OwnSampler(policy.to_empty(device="cpu"), tokenizer, sampling)
        before = min(longest, run.episode_tokens)
        (number,) = sampler.open(texts.piece(0, before), [np.random.default_rng(0)])
        sampler.say(number, texts.piece(num_frames, 1))
        row = sampler.rows[number]
        ledger.enter("a pack's pages")
        sampler.pages = Pages(model, "cpu", torch.bfloat16, ceil(row.room / PAGE), PAGE)
        sampler.pages.reserve(row)
        row.length = before
        ledger.enter("prefill")
        sampler._compute([(row, before, len(row.ids) - 1)])
        ledger.enter("decode")
        shape = prompts * run.group_size, len(row.pages)
        Step(policy, sampling, sampler.banned, sampler.pages, shape).run()
    pages = {"KV cache": most * Pages.page_bytes(model, PAGE, torch.bfloat16), "a pack's pages": 0}
    return {name: ledger.peaks[name] | pages for name in ("prefill", "decode")}


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


def fullest(model: ModelConfig, run: train.Config | rl.Config, lengths: Lengths) -> tuple:
    """(Episodes that fill a micro-batch to its last token, what memory depends on of `run`)."""
    together = getattr(run, "group_size", 1) if run.share_prefix else 1
    while together > 1 and lengths.prompt + together * lengths.response > run.micro_tokens:
        together //= 2
    groups = max(1, int(run.micro_tokens / (lengths.prompt + together * lengths.response)))
    episodes = make_episodes(model, lengths, groups, together)
    shared = groups * (together - 1) * lengths.prompt
    spare = run.micro_tokens + shared - sum(len(episode.ids) for episode in episodes)
    episodes = make_episodes(model, lengths, groups, together, max(0, spare))
    names = "micro_tokens", "recompute", "share_prefix", "kl", "updates", "loss"
    counts = only(run, *names, "lora_rank", "lora_targets")
    return tuple(episodes), replace(
        counts, **({"group_size": together} if hasattr(run, "kl") else {})
    )


def only(run: train.Config | rl.Config, *names: str) -> train.Config | rl.Config:
    """`run` with these flags alone, so that recipes which need as much are counted once."""
    return type(run)(**{name: getattr(run, name) for name in names if hasattr(run, name)})


def stage_moments(
    model: ModelConfig,
    run: train.Config | rl.Config,
    lengths: Lengths,
    gpus: int,
    prompts: int,
    micro_batches: int,
) -> Moments:
    """What a GPU holds in SFT or RL; "always" is there at every moment but the start, when each
    rank loads all weights before it keeps its shard. lengths: of episodes whose turns are as long
    as they may be. prompts: sampled at a time."""
    episodes, counted = fullest(model, run, lengths)
    if run.recompute == "auto":  # what is kept beside this is added by the room there is
        counted = replace(counted, recompute="all")
    step = at_depth(lambda cfg: training_moments(cfg, counted, episodes, gpus), model, 3)
    weights, head = num_weights(model), 12 * model.vocab_size * model.hidden_size
    image_bytes = 2 * model.vision.feature_size * num_features(model, episodes)

    always = {"CUDA, NCCL": RESERVED, "vision tower": 2 * weights["vision"]}
    always |= {part: step["update"][part] for part in ("weights", "Adam moments")}
    always["frames seen"] = min(CACHE_BYTES, run.steps * image_bytes * micro_batches)
    whole = sum(weights.values())
    moments = {"always": always, "start": {"all weights": (2 if run.lora_rank else 4) * whole}}
    moments["encode"] = {"tower": encode_bytes(model.vision, lengths)}
    if isinstance(run, rl.Config):
        is_own = run.sampler == "own"  # what is not sharded plays itself
        its_own = is_own and gpus == 1
        copy = {"rollout copy": 0 if its_own else rollout_copy(model, run.sampler)}
        always |= copy if is_own else {}
        always["reference"] = step["update"].get("reference", 0.0)
        always["frames of the step"] = image_bytes * (micro_batches - 1)
        plays = only(run, "group_size", "max_turns", "max_new_tokens", "episode_tokens")
        rollout = at_depth(lambda cfg: sampler_moments(cfg, lengths, prompts, plays), model, 1)
        if "http" not in run.sampler:  # vLLM's copy sleeps while the policy learns
            moments["rollout"] = largest(rollout) | copy
    passes = {"loss", "backward pass", "embedding"} & step.keys()
    moments["train"] = largest({name: step[name] for name in passes})
    moments["update"] = largest({"update": step["update"]})
    if run.offload_adam:  # the moments of one weight at a time visit the GPU
        always["Adam moments"] = 0.0
        moments["update"] = {"gradients": step["update"]["gradients"], "one moment": head / gpus}
    return {
        name: {p: size for p, size in parts.items() if name == "always" or p not in always}
        for name, parts in moments.items()
    }


def num_features(model: ModelConfig, episodes: tuple[Episode, ...]) -> int:
    return sum(episode.ids.count(model.image_token_id) for episode in episodes)


def rollout_copy(model: ModelConfig, sampler: str) -> float:
    """Bytes of a sampler's weights. vLLM takes DeepStack's features only beside a tower."""
    weights, wide = num_weights(model), model.vision.feature_size > model.hidden_size
    tower = 0 if sampler == "vllm" and wide else weights["vision"]
    return 2 * (sum(weights.values()) - tower)


def largest(moments: Moments) -> dict[str, float]:
    parts = max(moments.values(), key=lambda parts: sum(parts.values()))
    return {part: size for part, size in parts.items() if size >= 1 << 20}


def totals(moments: Moments) -> dict[str, float]:
    """{moment: bytes with what is always there}."""
    sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
    before = {"always": 0.0, "start": RESERVED}
    return {moment: size + before.get(moment, sums["always"]) for moment, size in sums.items()}


def peak(moments: Moments) -> float:
    return max(totals(moments).values())


def num_trained(model: ModelConfig, run: train.Config | rl.Config) -> int:
    """The weights that learn, with a frozen tower."""
    if run.lora_rank:
        return num_adapted(model, run.lora_rank, run.lora_targets)
    weights = num_weights(model)
    return sum(weights.values()) - weights["vision"]


def saving_bytes(model: ModelConfig, run: train.Config | rl.Config, gpus: int) -> dict[str, float]:
    """What checkpoints take on the host while they are saved, and on disk.

    A rank copies its shards of weights and moments out of the GPU, and writes them from there.
    The model's folder is made of what was written, weight after weight: the largest is the head. Of
    a model with adapters, they alone are saved.
    """
    trained, weights = num_trained(model, run), num_weights(model)
    whole, checkpoint = 2 * sum(weights.values()), 12 * trained + 2 * weights["vision"]
    head = 8 * model.vocab_size * model.hidden_size  # in float32, in parts and put together
    if run.lora_rank:
        whole, checkpoint, head = 4 * trained, 12 * trained, 0
    host = {"host, a rank": checkpoint / gpus, "host, rank 0 more": head}
    return host | {"disk, a checkpoint": checkpoint, "disk, the model": whole}
