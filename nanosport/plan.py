"""What a recipe needs and takes before it is run: memory of each GPU by part, seconds of a step by stage, GPU-hours.

python -m nanosport.plan 7b --gpus 8 --gpu-memory 80
python -m nanosport.plan 3b --gpus 4 --gpu A100 --micro-tokens 8192
python -m nanosport.plan 7b --json

Memory is that of memory.py, of one GPU of one node. Times rest on assumptions (MFU, lengths of episodes), which are flags and are
printed beside the figures. Decoding of videos and a judge are not in them. GiB are 2^30 bytes. Letters as in memory.py.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import rl
import train
from nanosport import cli, memory, presets
from nanosport.cost import CARDS, causal_pairs, head_flops, num_weights, text_flops, vision_flops
from nanosport.frames import CACHE_BYTES
from nanosport.image import ImageConfig, smart_resize
from nanosport.load import load_config
from nanosport.memory import GIB, Layout, Lengths, Micro
from nanosport.model import ModelConfig

PAPER_GPU_HOURS = 796  # on H20, both stages


@dataclass(frozen=True)
class Config:
    preset: str = "7b"
    """nano, 3b, 7b or 7b-scaled; the first word on the command line."""
    gpus: int = 8
    """Of one node: the weights are sharded among them."""
    gpu: Literal["H100", "H200", "A100", "H20"] = "H100"
    gpu_memory: float = 80.0
    """GiB of each."""
    model: str | None = None
    """A model folder whose shape is taken instead of the preset's."""
    batch_size: int | None = None
    """SFT's trajectories a step. None, here and below: as the preset says."""
    sft_steps: int | None = None
    num_prompts: int | None = None
    group_size: int | None = None
    steps: int | None = None
    """Of RL."""
    max_new_tokens: int | None = None
    micro_tokens: int | None = None
    recompute_every: int | None = None
    rollout_batch: int | None = None
    offload_adam: bool = False
    share_prefix: bool = True
    calls: float = 0.8
    """Assumed tool calls of an episode."""
    prompt_text: int = 300
    """Assumed text tokens of a prompt, besides the frames' labels."""
    turn_text: int = 200
    """Assumed tokens of an assistant turn."""
    longest_turn: float = 2.0
    """Assumed length of the longest turn among those sampled together, in mean ones: all wait for it."""
    mfu: float = 0.4
    """Assumed share of the peak FLOP/s in training and prefill."""
    bandwidth: float = 0.6
    """Assumed share of the peak bytes/s in decoding, in the update, and between GPUs."""
    layer_ms: float = 0.2
    """Assumed least time of a layer in a decoding step: its kernels are launched one by one."""
    json: bool = False
    """Print a JSON object instead of the tables."""


@dataclass(frozen=True)
class Stage:
    """SFT or RL, as one GPU sees it."""

    model: ModelConfig
    lengths: Lengths
    layout: Layout
    run: Any
    """train.Config or rl.Config."""
    prompts: float
    """A step."""
    members: int
    """Episodes of each."""
    share_prefix: bool

    @property
    def episodes(self) -> float:
        return self.prompts * self.members

    @property
    def sampled(self) -> float:
        """Episodes a rank samples at a time."""
        return min(self.episodes, max(self.run.rollout_batch, self.members))

    @property
    def micro(self) -> Micro:
        return memory.micro_batch(self.lengths, self.run.micro_tokens, self.members if self.share_prefix else 1, self.episodes)

    @property
    def micro_batches(self) -> float:
        return self.episodes * self.lengths.trained / self.micro.rows


def stages(cfg: Config) -> dict[str, Stage]:
    """SFT and RL of a preset with the flags over it. Raises ValueError for what no run can be."""
    for flag in ("gpus", "gpu_memory", "calls", "mfu", "bandwidth", "turn_text", "longest_turn"):
        if getattr(cfg, flag) <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: must be above 0")
    if cfg.preset not in presets.RL:
        raise ValueError(f"--preset {cfg.preset}: must be one of {', '.join(presets.RL)}")
    given = {name: value for name, value in asdict(cfg).items() if value is not None and name != "model"}
    wanted = {
        "SFT": ({"batch_size"}, train.Config, presets.SFT),
        "RL": ({"num_prompts", "group_size", "steps", "max_new_tokens", "rollout_batch"}, rl.Config, presets.RL),
    }
    runs = {}
    for name, (own, config, known) in wanted.items():
        runs[name] = config(
            **known[cfg.preset] | {k: v for k, v in given.items() if k in own | {"micro_tokens", "recompute_every", "offload_adam"}}
        )
    sft, policy = replace(runs["SFT"], steps=cfg.sft_steps or runs["SFT"].steps), runs["RL"]
    sft.check()
    policy.check()
    if policy.num_prompts < cfg.gpus:
        raise ValueError(f"--num-prompts {policy.num_prompts}: must be at least one for each of --gpus {cfg.gpus}")
    if not cfg.calls < policy.max_turns - 1:
        raise ValueError(f"--calls {cfg.calls}: must be below {policy.max_turns - 1}, one less than an episode's turns")
    folder = cfg.model or (Path(__file__).parent.parent / sft.model if cfg.preset == "nano" else None)
    model = load_config(folder) if folder else memory.MODELS[cfg.preset[:2]]
    image = ImageConfig.from_folder(folder, sft.max_pixels) if folder else ImageConfig(max_pixels=sft.max_pixels)
    height, width = smart_resize(360, 640, image)
    tokens = height * width // (image.patch_size * image.merge_size) ** 2
    same = model, Lengths(tokens, calls=cfg.calls, prompt_text=cfg.prompt_text, turn_text=cfg.turn_text)
    layout = [Layout(cfg.gpus, recompute_every=run.recompute_every, offload_adam=run.offload_adam) for run in (sft, policy)]
    return {
        "SFT": Stage(*same, layout[0], sft, sft.batch_size / cfg.gpus, 1, False),
        "RL": Stage(*same, layout[1], policy, -(-policy.num_prompts // cfg.gpus), policy.group_size, cfg.share_prefix),
    }


def by_moment(stage: Stage) -> dict[str, dict[str, float]]:
    """{moment: {part: bytes}}. The moments follow each other; the parts of "always" are there in all but "start", when each rank
    loads all weights in float32 before it keeps its shard."""
    model, lengths, run, micro, layout = stage.model, stage.lengths, stage.run, stage.micro, stage.layout
    feature, weights = 2 * model.hidden_size, num_weights(model)
    always = {"CUDA, NCCL": memory.RESERVED, **memory.state_bytes(model, layout)}
    always["frames seen"] = min(CACHE_BYTES, run.steps * stage.episodes * lengths.frames * lengths.frame_tokens * feature)
    moments = {
        "always": always,
        "start": {"all weights": 4 * sum(weights.values())},
        "encode": {"tower": memory.encode_bytes(model, lengths)},
    }
    if stage.members > 1:
        always["rollout copy"] = 2 * sum(weights.values())
        always["reference"] = 2 * (memory.trained_weights(model) / layout.gpus + weights["vision"]) if run.kl > 0 else 0.0
        called = stage.sampled * lengths.still_going(1, run.max_turns)
        moments["rollout"] = {
            "KV cache": memory.cache_bytes(model, lengths, stage.sampled, run.max_new_tokens, run.max_turns),
            "prefill": max(
                memory.prefill_bytes(model, stage.sampled / stage.members, lengths.prompt, lengths.prompt),
                memory.prefill_bytes(model, called, lengths.result, lengths.prompt + lengths.result),
            ),
        }
    always["frames of the step"] = feature * micro.features * (max(1.0, stage.micro_batches) if stage.members > 1 else 1)
    return moments | {
        "train": memory.train_bytes(model, micro, layout),
        "update": {"Adam's square roots": memory.update_bytes(model, layout)},
    }


def totals(moments: dict[str, dict[str, float]]) -> dict[str, float]:
    """{moment: bytes with what is always there}."""
    always = sum(moments["always"].values())
    return {
        moment: sum(parts.values()) + {"always": 0.0, "start": memory.RESERVED}.get(moment, always)
        for moment, parts in moments.items()
    }


def peak(stage: Stage) -> float:
    return max(totals(by_moment(stage)).values())


def train_flops(stage: Stage) -> tuple[float, float]:
    """(operations of the forward passes of a step, of its head); attention's pairs as they are packed."""
    micro, lengths = stage.micro, stage.lengths
    length, together = lengths.prompt + lengths.response, micro.rows / lengths.trained
    pairs = together * length**2 / 2
    if micro.keys > micro.tokens:
        units = (micro.tokens - together * lengths.response) / lengths.prompt
        pairs = units * causal_pairs([length] * round(together / units), lengths.prompt)
    count = stage.micro_batches
    return count * text_flops(stage.model, micro.tokens, pairs), count * head_flops(stage.model, micro.rows)


def seconds(stage: Stage, cfg: Config) -> dict[str, float]:
    """Of a step of one GPU, with F the operations of the forward passes:

    train      (3·F + 3·head + F·share of recomputed layers) ÷ (MFU · peak), or moving 8·W a micro-batch over NVLink if that is longer
    reference  (F + head) ÷ (MFU · peak)
    decode     a token reads 2·(W_layers + head) and the cache, and takes L·layer_ms at least; all wait for each turn's longest row
    prefill    F of prompts and tool results; each frame once through the tower
    update     36·W/n through memory: norm and scaling of the gradients, AdamW, its square roots
    sampler    4·W·(n − 1)/n over NVLink, then 2·W written
    """
    model, lengths, run = stage.model, stage.lengths, stage.run
    flops, bandwidth, nvlink = (peak * share for peak, share in zip(CARDS[cfg.gpu], (cfg.mfu, cfg.bandwidth, cfg.bandwidth)))
    trained, away = memory.trained_weights(model), (cfg.gpus - 1) / cfg.gpus
    forward, head = train_flops(stage)
    again = 1 / run.recompute_every if run.recompute_every else 0.0
    train = max(((3 + again) * forward + 3 * head) / flops, 8 * trained * away * stage.micro_batches / nvlink)
    looked = stage.prompts * lengths.overview + stage.episodes * lengths.calls * lengths.frames_per_call
    found = {"frames": vision_flops(model, looked * lengths.frame_tokens) / flops}
    if stage.members > 1:
        fed = stage.prompts * lengths.prompt + stage.episodes * lengths.calls * lengths.result
        found["prefill"], found["decode"] = text_flops(model, fed, fed * lengths.prompt) / flops, 0.0
        for turn in range(run.max_turns):
            left = stage.sampled * lengths.still_going(turn, run.max_turns)
            read = 2 * (num_weights(model)["layers"] + model.vocab_size * model.hidden_size)
            read += memory.token_bytes(model) * left * (lengths.prompt + turn * (lengths.result + lengths.turn_text))
            tokens = min(lengths.turn_text * cfg.longest_turn, run.max_new_tokens) * min(1.0, left) * stage.episodes / stage.sampled
            found["decode"] += tokens * max(read / bandwidth, cfg.layer_ms / 1e3 * model.num_hidden_layers)
        found["reference"] = (forward + head) / flops if run.kl > 0 else 0.0
        found["weights to the sampler"] = 4 * trained * away / nvlink + 2 * trained / bandwidth
    return found | {"train": train, "update": 36 * trained / cfg.gpus / bandwidth}


def fits(cfg: Config) -> bool:
    return max(peak(stage) for stage in stages(cfg).values()) <= cfg.gpu_memory * GIB


def advice(cfg: Config) -> str | None:
    """The flags that make it fit, those that cost least first; None where none of these do."""
    policy = stages(cfg)["RL"].run
    fewer = [{"micro_tokens": policy.micro_tokens // k} for k in (2, 4)]
    changes = [{"recompute_every": 1}, *fewer, *({"recompute_every": 1, **less} for less in fewer)]
    changes += [
        {"rollout_batch": policy.group_size},
        {"offload_adam": True},
        {"offload_adam": True, "rollout_batch": policy.group_size},
    ]
    changes += [{"recompute_every": 1, **fewer[-1], **changes[-1]}]
    more = [n for n in range(cfg.gpus + 1, policy.num_prompts + 1) if policy.num_prompts % n == 0]
    changes += [{"gpus": n} for n in more] + [{"gpus": n, **changes[-1]} for n in more]
    found = next((change for change in changes if fits(replace(cfg, **change))), None)
    return found and " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in found.items()
    )


def report(cfg: Config) -> dict:
    """All that is printed. Memory in bytes; `kv_cache_at_most`: were the tool called in every turn of every episode."""
    both, found = stages(cfg), {"config": asdict(cfg), "fits": fits(cfg)}
    found["advice"] = None if found["fits"] else advice(cfg)
    for name, stage in both.items():
        parts, spent = by_moment(stage), seconds(stage, cfg)
        found[name] = {
            "micro_batch": asdict(stage.micro),
            "memory": parts,
            "total": totals(parts),
            "seconds": spent,
            "steps": stage.run.steps,
        }
        found[name]["gpu_hours"] = stage.run.steps * sum(spent.values()) * cfg.gpus / 3600
    stage, run = both["RL"], both["RL"].run
    always = replace(stage.lengths, calls=run.max_turns - 1.01)
    found["RL"]["kv_cache_at_most"] = memory.cache_bytes(stage.model, always, stage.sampled, run.max_new_tokens, run.max_turns)
    return found | {"lengths": asdict(stage.lengths), "gpu_hours": found["SFT"]["gpu_hours"] + found["RL"]["gpu_hours"]}


def main(cfg: Config) -> None:
    found = report(cfg)
    if cfg.json:
        return print(json.dumps(found, indent=1))
    print(f"{cfg.preset} on {cfg.gpus} × {cfg.gpu} with {cfg.gpu_memory:g} GiB")
    for name in ("SFT", "RL"):
        part = found[name]
        total, tokens = part["total"], part["micro_batch"]["tokens"]
        print(f"\n{name}: GiB of each GPU, {max(total.values()) / GIB:.1f} at the peak; a micro-batch has up to {tokens:,} tokens")
        for moment, parts in part["memory"].items():
            listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in parts.items())
            print(f"  {moment:8}{total[moment] / GIB:7.1f} {' ' if moment == 'always' else '+'} {listed}")
        print(f"{name}: {sum(part['seconds'].values()):.1f} s a step, {part['steps']} steps, {part['gpu_hours']:.0f} GPU-hours")
        print("  " + ", ".join(f"{what} {size:.1f}" for what, size in part["seconds"].items()))
    print(f"\nBoth: {found['gpu_hours']:.0f} GPU-hours; the paper says {PAPER_GPU_HOURS}, on 8 × H20.")
    print("Not counted: decoding of videos, judges, ranks that wait.")
    assumed = ("mfu", "bandwidth", "layer_ms", "calls", "prompt_text", "turn_text", "longest_turn")
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(cfg, name)}" for name in assumed)
    print(f"Assumed: {flags}; {found['lengths']['frame_tokens']} tokens a frame.")
    print(f"Were the tool called in every turn, the KV cache would take {found['RL']['kv_cache_at_most'] / GIB:.1f} GiB.")
    way = f"turn {found['advice']}" if found["advice"] else "none of its flags helps"
    print(f"\n{cfg.gpu_memory:g} GiB: {'it fits' if found['fits'] else f'it does not fit: {way}'}.")


if __name__ == "__main__":
    cli.run(main, Config, {name: {"preset": name} for name in ("7b", *presets.RL)})
