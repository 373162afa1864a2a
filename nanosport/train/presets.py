"""The paper's recipes as flags: `python train.py 7b`, `torchrun --nproc-per-node 8 rl.py 7b`. A
flag given after the name wins.

Known of DeepSport are backbone, data sizes, one epoch of SFT, 32 questions × 8 rollouts, 300 steps,
12,800 response tokens, 640×360 and a KL term. Marked "open" is what the paper leaves out; the value
is then FrameThinker's, the nearest ancestor, where it says one, else ours.
"""

from pathlib import Path

SPLITS, SCALED = Path("out/splits"), Path("out/splits_scaled")

# 640×360, 720p and 1080p all become 644×364, 299 tokens a frame; for Qwen3-VL 640×352, 220 tokens
_FRAMES = {"max_pixels": 240_000}
_LARGE_SFT = {
    **_FRAMES,
    "batch_size": 32,  # open
    "steps": 457,  # one epoch of 14,599 trajectories
    "lr": 1e-5,  # open
    "warmup": 14,  # open
    "weight_decay": 0.0,  # open
    "max_new_tokens": 2048,  # as in RL
    "micro_tokens": 16_384,
    "save_every": 50,
}
_LARGE_RL = {
    **_FRAMES,
    "steps": 300,
    "num_prompts": 32,
    "group_size": 8,
    "kl": 0.01,  # open: on, its weight is not said
    "lr": 5e-7,  # open; FrameThinker's
    "warmup": 10,  # open
    "adam_eps": 1e-8,  # the usual one
    "temperature": 1.0,  # open: FrameThinker's 0.6 is for inference
    "max_new_tokens": 2048,  # open: of a turn
    "episode_tokens": 15_360,  # eight frames and the question, 2,560, and 12,800 of response
    "micro_tokens": 16_384,
    "save_every": 20,
}
_SCALED_SFT = {"data": SCALED / "trajectories.jsonl", "out": Path("out/sft_7b_scaled"), "steps": 46}
_SCALED_RL = {
    "data": SCALED / "rl.jsonl",
    "out": Path("out/rl_7b_scaled"),
    "steps": 80,
    "num_prompts": 16,
    "max_new_tokens": 1024,
}
_VIDEOBRAIN = {  # arXiv 2602.04094, on its own 6,400 questions; what is "open" above, known there
    "steps": 200,  # one epoch
    "reward": "videobrain",
    "lr": 1e-6,
    "kl": 1e-3,
    "entropy_bonus": 1e-3,
    "temperature": 1.0,  # open
    "max_turns": 6,  # five calls, then an answer
    "max_new_tokens": 8192,
    "episode_tokens": 24_576,  # a prompt of 8,192 and a response of 16,384
    "micro_tokens": 24_576,
    "data": SPLITS / "rl_measured.jsonl",
    "out": Path("out/rl_videobrain"),
}


def _large(size: str, family: str = "Qwen2.5-VL") -> tuple[dict, dict]:
    sft, rl = Path(f"out/sft_{size}"), Path(f"out/rl_{size}")
    model = f"Qwen/{family}-{size.upper()}-Instruct"
    return (
        {**_LARGE_SFT, "model": model, "data": SPLITS / "trajectories.jsonl", "out": sft},
        {**_LARGE_RL, "model": str(sft / "model"), "data": SPLITS / "rl.jsonl", "out": rl},
    )


(SFT_3B, RL_3B), (SFT_7B, RL_7B) = _large("3b"), _large("7b")
SFT_8B, RL_8B = _large("8b", "Qwen3-VL")
_VIDEOBRAIN_SFT = {"out": Path("out/sft_videobrain"), "steps": 50}  # one epoch of 1,600
SFT = {
    "nano": {},
    "3b": SFT_3B,
    "7b": SFT_7B,
    "7b-scaled": {**SFT_7B, **_SCALED_SFT},
    "8b": SFT_8B,
    "videobrain": {**SFT_8B, **_VIDEOBRAIN_SFT},
}
"""Fields of train.py's Config by preset. 7b-scaled: a tenth of the data (data_prep.split --scale
0.1 --out out/splits_scaled)."""
RL = {
    "nano": {},
    "3b": RL_3B,
    "7b": RL_7B,
    "7b-scaled": {**RL_7B, **_SCALED_RL, "model": str(_SCALED_SFT["out"] / "model")},
    "8b": RL_8B,
    "videobrain": {**RL_8B, **_VIDEOBRAIN, "model": str(_VIDEOBRAIN_SFT["out"] / "model")},
}
"""Fields of rl.py's Config by preset. 8b: the paper's recipe on Qwen3-VL. videobrain: the nearest
published code's constants, on its own backbone, Qwen3-VL-8B. 7b-scaled: sized by the planner for a
day on one node of eight 80 GB GPUs."""
