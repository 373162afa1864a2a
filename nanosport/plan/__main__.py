"""What a recipe needs and takes before it is run: memory by moment and part, seconds of a step by
stage, GPU-hours.

python -m nanosport.plan 7b --gpus 8 --gpu-memory 80
python -m nanosport.plan 3b --gpus 4 --gpu A100 --micro-tokens 8192
python -m nanosport.plan 7b --gpus 1 --gpu-memory 80 --lora-rank 64
python -m nanosport.plan 7b --json

Memory is that of one GPU of one node, with turns as long as they may be. Seconds rest on
assumptions, which are flags and are printed too. GiB are 2^30 bytes, GB are 10^9.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import rl
import train
from nanosport import cli
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.image import ImageConfig, smart_resize
from nanosport.model import cost
from nanosport.model.folder import ASSETS, load_config
from nanosport.plan.memory import GIB, Stage, peak, totals
from nanosport.plan.synthetic import Lengths
from nanosport.train import presets

USABLE = 0.988
"""An H100 of "80 GB" reports 79.1 GiB."""
PAPER_GPU_HOURS = 796  # on H20, both stages


@dataclass(frozen=True)
class Config:
    preset: str = "7b"
    """nano, 3b, 7b, 7b-scaled, 8b or videobrain; the first word on the command line."""
    gpus: Annotated[int, Above(0)] = 8
    """The GPUs of one node, among which the weights are sharded."""
    gpu: Literal["H100", "H200", "A100", "H20"] = "H100"
    gpu_memory: Annotated[float, Above(0)] = 80.0
    """The GB on the card's label."""
    model: str | None = None
    """A model folder whose shape is taken instead of the preset's."""
    batch_size: Annotated[int | None, AtLeast(1)] = None
    """SFT's trajectories a step. None, here and below: as the preset says."""
    sft_steps: Annotated[int | None, AtLeast(1)] = None
    num_prompts: Annotated[int | None, AtLeast(1)] = None
    group_size: Annotated[int | None, AtLeast(2)] = None
    steps: Annotated[int | None, AtLeast(1)] = None
    """Steps of RL."""
    max_new_tokens: Annotated[int | None, AtLeast(1)] = None
    micro_tokens: Annotated[int | None, AtLeast(1)] = None
    recompute: Literal["auto", "all", "mlp", "none"] | None = None
    rollout_batch: Annotated[int | None, AtLeast(1)] = None
    offload_adam: bool = False
    lora_rank: Annotated[int, AtLeast(0)] = 0
    """As train.py's and rl.py's: adapters of this rank learn; 0: the weights themselves."""
    share_prefix: bool = True
    sampler: str = "own"
    """As rl.py's: own, vllm, or the addresses of servers, which need no memory here."""
    calls: Annotated[float, Above(0)] = 0.8
    """Tool calls of an episode, assumed."""
    prompt_text: Annotated[int, AtLeast(0)] = 300
    """Text tokens of a prompt besides the frames' labels, assumed."""
    turn_text: Annotated[int, Above(0)] = 200
    """Tokens of an assistant turn on average, assumed."""
    longest_turn: Annotated[float, Above(0)] = 2.0
    """Turns sampled together wait for the longest, assumed to be so many times the average."""
    mfu: Annotated[float, Above(0), AtMost(1)] = 0.4
    """Share of the peak FLOP/s in training and prefill, assumed."""
    bandwidth: Annotated[float, Above(0), AtMost(1)] = 0.6
    """Share of the peak bytes/s in decoding, in the update, and between GPUs, assumed."""
    layer_ms: Annotated[float, AtLeast(0)] = 0.2
    """A layer's least time in a decoding step, assumed: its kernels are launched one by one."""
    json: bool = False
    """Print a JSON object instead of the tables."""


def stages(cfg: Config) -> dict[str, Stage]:
    """SFT and RL of a preset with the flags over it. Raises ValueError for what no run can be."""
    cli.check(cfg)
    if cfg.preset not in presets.RL:
        raise ValueError(f"--preset {cfg.preset}: must be one of {', '.join(presets.RL)}")
    runs = []
    recipes = (train.Config, presets.SFT, cfg.sft_steps), (rl.Config, presets.RL, cfg.steps)
    for kind, known, steps in recipes:
        given = {field.name: getattr(cfg, field.name, None) for field in fields(kind)}
        given |= {"steps": steps, "model": None}
        flags = {name: value for name, value in given.items() if value is not None}
        runs.append(kind(**known[cfg.preset] | flags))
        runs[-1].check()
    sft, policy = runs
    if policy.num_prompts < cfg.gpus:
        raise ValueError(f"--num-prompts {policy.num_prompts}: must be at least --gpus {cfg.gpus}")
    if not cfg.calls < policy.max_turns - 1:
        most = policy.max_turns - 1
        raise ValueError(f"--calls {cfg.calls}: must be below {most}, the turns that may call")
    folder = cfg.model or ASSETS / Path(sft.model).name.lower().removesuffix("-instruct")
    model, image = load_config(folder), ImageConfig.from_folder(folder, sft.max_pixels)
    height, width = smart_resize(360, 640, image)
    frame_tokens = height * width // (image.patch_size * image.merge_size) ** 2
    texts = {"calls": cfg.calls, "prompt_text": cfg.prompt_text, "turn_text": cfg.turn_text}
    room = USABLE * cfg.gpu_memory * GIB
    shape = Lengths(frame_tokens, **texts), policy.max_new_tokens, cfg.gpus, room
    return {"SFT": Stage(model, sft, *shape), "RL": Stage(model, policy, *shape)}


def seconds(stage: Stage, cfg: Config) -> dict[str, float]:
    """A GPU's seconds of a step, with F the operations of the forward passes, W the weights:

    train      (3·F + 3·head + F·share computed again) ÷ (MFU · peak), or moving 8·W a
               micro-batch over NVLink, if that is longer; with adapters, which count as nothing,
               2·F + 2·head and 4·W
    reference  (F + head) ÷ (MFU · peak)
    decode     a token reads 2·W and the cache, and takes layers · layer_ms at least
    prefill    F of prompts and tool results; each frame goes once through the tower
    update     36·W/n through memory: norm and scaling of the gradients, AdamW, its square roots;
               here and below W is what learns
    sampler    2·W·(n − 1)/n over NVLink, then 2·W written
    """
    model, lengths, run, prompts = stage.model, stage.lengths, stage.run, stage.prompts
    shares = cfg.mfu, cfg.bandwidth, cfg.bandwidth
    flops, memory_s, nvlink = (most * share for most, share in zip(cost.CARDS[cfg.gpu], shares))
    episodes, away = prompts * stage.members, (cfg.gpus - 1) / cfg.gpus
    passes = 2 if run.lora_rank else 3

    forward = sum(unit.flops for unit in stage.units)
    head = cost.head_flops(model, episodes * lengths.trained)
    computing = ((passes + recomputed_share(stage)) * forward + passes * head) / flops
    moving = 4 * (passes - 1) * stage.num_moved * away * stage.micro_batches / nvlink
    shown = prompts * lengths.overview + episodes * lengths.calls * lengths.frames_per_call
    spent = {"frames": cost.vision_flops(model, shown * lengths.frame_tokens) / flops}
    if stage.is_rl:
        fed = prompts * lengths.prompt + episodes * lengths.calls * lengths.result
        spent["prefill"] = cost.text_flops(model, fed, fed * lengths.prompt) / flops
        spent["decode"] = decode_seconds(stage, cfg, memory_s)
        spent["reference"] = (forward + head) / flops if run.kl > 0 else 0.0
        # to vLLM go merged weights
        sent = stage.num_trained if run.sampler == "own" else stage.num_moved
        spent["weights to the sampler"] = 2 * sent * (away / nvlink + 1 / memory_s)
    update = 36 * stage.num_trained / cfg.gpus / memory_s
    return spent | {"train": max(computing, moving), "update": update}


def recomputed_share(stage: Stage) -> float:
    """The share of the forward pass that the backward pass computes again, at most."""
    cfg, modes = stage.model, stage.modes
    mlp = 3 * cfg.hidden_size * cfg.intermediate_size
    heads = cfg.num_attention_heads + cfg.num_key_value_heads
    layer = mlp + 2 * cfg.head_dim * cfg.hidden_size * heads
    return (modes.count("all") + modes.count("mlp") * mlp / layer) / len(modes)


def decode_seconds(stage: Stage, cfg: Config, bytes_per_s: float) -> float:
    """All rows wait for each turn's longest."""
    lengths, run, spent = stage.lengths, stage.run, 0.0
    tokens = min(lengths.turn_text * cfg.longest_turn, run.max_new_tokens)
    for turn in range(run.max_turns):
        rows = stage.sampled * stage.members * lengths.still_going(turn, run.max_turns)
        cached = rows * (lengths.prompt + turn * (lengths.result + lengths.turn_text))
        token_s = cost.decode_seconds(stage.model, cached, bytes_per_s, cfg.layer_ms / 1e3)
        spent += tokens * token_s * min(1.0, rows) * stage.prompts / stage.sampled
    return spent


def fits(cfg: Config) -> bool:
    sft, policy = stages(cfg).values()
    # what is sure to be there in RL's update saves most counts: weights, gradients, moments, the
    # reference, and the whole copy that computes or plays
    has_reference = policy.run.kl > 0 and not cfg.lora_rank
    a_weight = (8 if cfg.offload_adam else 16) + 2 * has_reference
    has_copy = cfg.gpus == 1 or cfg.sampler == "own"
    least = a_weight * policy.num_trained / cfg.gpus + 2 * has_copy * policy.num_weights
    return least <= policy.room and all(peak(one.memory) <= policy.room for one in (policy, sft))


def advice(cfg: Config) -> str | None:
    """The flags that make it fit, those that cost least first; None where none of these do."""
    policy = stages(cfg)["RL"].run
    auto, offload = {"recompute": "auto"}, {"offload_adam": True}
    half, quarter = ({"micro_tokens": policy.micro_tokens // k} for k in (2, 4))
    few_rows = {"rollout_batch": policy.group_size}
    everything = auto | quarter | offload | few_rows
    changes = [auto, half, quarter, auto | half, auto | quarter]
    changes += [few_rows, offload, offload | few_rows, everything]
    more = [n for n in range(cfg.gpus + 1, policy.num_prompts + 1) if policy.num_prompts % n == 0]
    changes += [{"gpus": n} for n in more] + [{"gpus": n, **everything} for n in more]
    change = next((change for change in changes if fits(replace(cfg, **change))), {})
    flags = (cli.flag(name) + f" {value}" * (value is not True) for name, value in change.items())
    return " ".join(flags) or None


def report(cfg: Config) -> dict:
    """All that is printed; memory in bytes."""
    both, is_enough = stages(cfg), fits(cfg)
    plan = {"config": asdict(cfg), "fits": is_enough, "advice": None if is_enough else advice(cfg)}
    for name, stage in both.items():
        spent, steps, moments = seconds(stage, cfg), stage.run.steps, stage.memory
        hours = steps * sum(spent.values()) * cfg.gpus / 3600
        plan[name] = {"memory": moments, "total": totals(moments)}
        plan[name] |= {"seconds": spent, "steps": steps, "gpu_hours": hours}
    plan["gpu_hours"] = sum(plan[name]["gpu_hours"] for name in both)
    return plan | {"saving": stage.saving, "lengths": asdict(stage.lengths)}


def main(cfg: Config) -> None:
    plan = report(cfg)
    if cfg.json:
        return print(json.dumps(plan, indent=1))
    print(f"{cfg.preset} on {cfg.gpus} × {cfg.gpu} of {cfg.gpu_memory:g} GB")
    for name in ("SFT", "RL"):
        part, total = plan[name], plan[name]["total"]
        print(f"\n{name}: GiB of each GPU, {max(total.values()) / GIB:.1f} at the peak")
        for moment, parts in part["memory"].items():
            listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in parts.items())
            sign = " " if moment == "always" else "+"
            print(f"  {moment:8}{total[moment] / GIB:7.1f} {sign} {listed}")
        spent = part["seconds"]
        hours = f"{part['steps']} steps, {part['gpu_hours']:.0f} GPU-hours"
        print(f"{name}: {sum(spent.values()):.1f} s a step, {hours}")
        print("  " + ", ".join(f"{what} {size:.1f}" for what, size in spent.items()))
    saved = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in plan["saving"].items())
    print(f"\nGB to save a step: {saved}.")
    hours = f"{plan['gpu_hours']:.0f} GPU-hours; the paper says {PAPER_GPU_HOURS}, on 8 × H20"
    print(f"Both: {hours}. Not counted: decoding of videos, judges, ranks that wait.")
    assumed = ("mfu", "bandwidth", "layer_ms", "calls", "prompt_text", "turn_text", "longest_turn")
    flags = " ".join(f"{cli.flag(name)} {getattr(cfg, name)}" for name in assumed)
    print(f"Assumed: {flags}; {plan['lengths']['frame_tokens']} tokens a frame.")
    way = f"turn {plan['advice']}" if plan["advice"] else "none of its flags helps"
    verdict = "it fits" if plan["fits"] else f"it does not fit: {way}"
    print(f"\n{cfg.gpu_memory:g} GB, {USABLE * cfg.gpu_memory:.0f} GiB of them usable: {verdict}.")


if __name__ == "__main__":
    cli.run(main, Config, {name: {"preset": name} for name in ("7b", *presets.RL)})
