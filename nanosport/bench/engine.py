"""Times the project's own sampler: a decoding step, whole episodes by stage, and beside generate.

    python -m nanosport.bench.engine      # → results/engine/<card>.json; four minutes at most
    python -m nanosport.bench.engine --shape qwen3-vl-8b      # another folder in assets/

On a GPU the model has the 7B's shape and random weights in bfloat16. A step is timed over a turn of
rows whose cache is as full as said, with its CUDA graph and without; the floor is what the card
needs to read the weights and the cache once. Episodes are scripted: turns of log-normal length, and
frames of 720p clips that are rendered here and really decoded (where PyAV is there). Without a GPU
the model is the nano one, and the same turns are sampled by transformers' generate as well: that is
no figure of any GPU.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

from nanosport.bench.device import card_name, wait, write_report
from nanosport.cli import ending
from nanosport.engine.own import OwnSampler
from nanosport.engine.pages import PAGE, Pages
from nanosport.engine.row import Row
from nanosport.engine.sampler import Generated, Piece, Sampling
from nanosport.engine.step import Step
from nanosport.fields import COUNT
from nanosport.files import ASSETS, provenance
from nanosport.image import ImageConfig
from nanosport.model.cost import CARDS, decode_seconds
from nanosport.model.decoder import VLModel
from nanosport.model.folder import load_config, load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import Clip

TOKENS = 32
"""The turn over which a step is timed."""
TEXT = 300
"""Text tokens of a prompt."""
FRAMES = 8
"""Frames of a prompt, and of a tool's answer."""


def random_model(name: str, device: str, dtype: torch.dtype) -> VLModel:
    """A model of a shape in assets/, with random weights."""
    with torch.device("meta"):
        model = VLModel(load_config(ASSETS / name)).to(dtype)
    return model.to_empty(device=device).init_weights().requires_grad_(False)


def step_ms(sampler: OwnSampler, num_rows: int, cached: int) -> float:
    """Milliseconds of a step of `num_rows` conversations with `cached` tokens each. What they have
    cached is zeros: it takes as long."""
    rng = np.random.default_rng(0)
    if sampler.on_gpu:
        num_pages, dtype = num_rows * (2 + cached // PAGE), sampler.model.head_weight_VD.dtype
        sampler.pages = Pages(sampler.model.cfg, sampler.device, dtype, num_pages, PAGE)
    else:
        sampler.pages = sampler.make_pages()
    for k in range(num_rows):
        ids = rng.integers(10, 200, cached + 1).tolist()
        (number,) = sampler.open(Piece(ids), [np.random.default_rng(k)])
        row = sampler.rows[number]
        sampler.pages.reserve(row)
        row.length = cached
    sampler._speak()  # captures the graph
    sampler._speak()
    wait()
    began = time.perf_counter()
    for _ in range(TOKENS - 4):
        sampler._speak()
    wait()
    spent = time.perf_counter() - began
    for number in list(sampler.rows):
        sampler.close(number)
    sampler.sleep()
    return 1e3 * spent / (TOKENS - 4)


def step_rows(model: VLModel, repeats: int) -> list[dict]:
    card = card_name()
    bandwidth = next((speeds[1] for name, speeds in CARDS.items() if name in card), None)
    cases = [(rows, cached) for cached in (2764, 5500) for rows in (1, 8, 32, 64)]
    sampler = OwnSampler(
        model, load_tokenizer(ASSETS / "nano-sft"), Sampling(max_new_tokens=TOKENS)
    )
    sampler.end_ids, rows = set(), []  # every turn is as long
    for with_graph in (True, False) if sampler.on_gpu else (False,):
        no_graph = patch.object(Step, "capture", lambda step: step.run)
        with nullcontext() if with_graph else no_graph:
            for num_rows, cached in cases if sampler.on_gpu else [(1, 60), (8, 60)]:
                times = [step_ms(sampler, num_rows, cached) for _ in range(repeats)]
                row = {"rows": num_rows, "cached_tokens": cached, "graph": with_graph}
                row |= {"ms_a_step": round(median(times), 3), "all": [round(t, 3) for t in times]}
                if bandwidth:
                    floor = decode_seconds(model.cfg, num_rows * cached, bandwidth, 0.0)
                    row["floor_ms"] = round(1e3 * floor, 2)
                rows.append(row)
                print(row)
    return rows


def render(path: Path, seed: int, width: int, height: int, num_frames: int = 250) -> None:
    """A clip in which squares move over noise, in H.264."""
    import av

    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    ground = ground.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(num_frames):
            picture, left = ground.copy(), (7 * k) % (width - 64)
            picture[height // 3 : height // 3 + 64, left : left + 64] = (255, 200, 0)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def shown(encoder: FrameEncoder, clip: Clip, indices, text: list[int]) -> Piece:
    """Frames, and text after them."""
    cfg, names = encoder.model.cfg, [(clip, int(i)) for i in indices]
    image = [cfg.image_token_id] * encoder.tokens_per_frame(clip)
    frame = [cfg.vision_start_token_id, *image, cfg.vision_end_token_id]
    return Piece(frame * len(names) + text, [encoder.grid(clip)] * len(names), names, encoder)


def play_episodes(model: VLModel, image: ImageConfig, num_groups: int, size: tuple) -> dict:
    """Groups of eight scripted episodes, of one to three turns, over clips of this size."""
    encoder, rng = FrameEncoder(model, image), np.random.default_rng(0)
    sampler = OwnSampler(model, load_tokenizer(ASSETS / "nano-sft"), Sampling(max_new_tokens=400))

    take, goals = sampler._take, {}

    def take_until(row: Row, token: int, logp: float) -> Generated | None:
        row.closed = len(row.sampled_logp) + 1 == goals[row.number]
        return take(row, token, logp)

    def speak(number: int) -> None:
        goals[number] = int(np.clip(rng.lognormal(np.log(60), 0.6), 8, 400))

    sampler._take, sampler.end_ids = take_until, set()
    with tempfile.TemporaryDirectory() as folder:
        clips = [Clip(str(Path(folder) / f"{k}.mp4")) for k in range(num_groups)]
        for k, clip in enumerate(clips):
            render(Path(clip.video), k, *size)
        wait()
        began, left, clip_of = time.perf_counter(), {}, {}
        for clip in clips:
            overview = np.linspace(0, 249, FRAMES).astype(int)
            prompt = shown(encoder, clip, overview, rng.integers(10, 200, TEXT).tolist())
            for number in sampler.open(prompt, [np.random.default_rng(k) for k in range(8)]):
                left[number], clip_of[number] = int(rng.choice([0, 1, 1, 2])), clip
                speak(number)
        for number, _ in sampler.turns():
            if not left[number]:
                sampler.close(number)
                continue
            left[number] -= 1
            start = int(rng.integers(0, 200))
            window = np.linspace(start, start + 49, FRAMES).astype(int)
            answer = shown(encoder, clip_of[number], window, rng.integers(10, 200, 20).tolist())
            sampler.say(number, answer)
            speak(number)
        wait()
        seconds = time.perf_counter() - began
    counts = sampler.counts + encoder.counts
    said = counts["tokens_said"]
    figures = {"episodes": 8 * num_groups, "clip": f"{size[0]}x{size[1]}", "seconds": seconds}
    figures |= {"tokens_per_s": said / seconds, **counts}
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in figures.items()}


def beside_generate(repeats: int, num_prompts: int = 8, num_tokens: int = 48) -> dict:
    """The same turns of the nano model by transformers' generate: prompts of eight frames, eight
    samples each, one turn, all as long."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder, rng = ASSETS / "nano-sft", np.random.default_rng(0)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    cfg, grid = model.cfg, (1, 6, 10)
    width = cfg.vision.patch_width
    patches_FPC = torch.randn(num_prompts * FRAMES, 60, width)
    frame = [cfg.vision_start_token_id, *[cfg.image_token_id] * 15, cfg.vision_end_token_id]
    prompts = [frame * FRAMES + rng.integers(10, 200, TEXT).tolist() for _ in range(num_prompts)]
    sampling = Sampling(max_new_tokens=num_tokens)
    turns = {"prompts": num_prompts, "samples": 8, "tokens_a_turn": num_tokens}

    # in place of a FrameEncoder: frames that are cut already, encoded whenever they are asked for
    def features(frames: list[int]) -> torch.Tensor:
        return model.encode(patches_FPC[frames].flatten(0, 1), [grid] * len(frames))

    encoder = SimpleNamespace(expect=lambda frames: None, features=features)

    def ours() -> None:
        sampler = OwnSampler(model, tokenizer, sampling)
        sampler.end_ids = set()
        for k, ids in enumerate(prompts):
            frames = range(k * FRAMES, (k + 1) * FRAMES)
            piece = Piece(ids, [grid] * FRAMES, frames, encoder)
            sampler.open(piece, [np.random.default_rng(k) for k in range(8)])
        assert sum(len(said.ids) for _, said in sampler.turns()) == 8 * num_prompts * num_tokens

    patches = patches_FPC.view(num_prompts, -1, width)
    ids = torch.tensor(prompts).repeat_interleave(8, 0)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches.repeat_interleave(8, 0).flatten(0, 1),
        "image_grid_thw": torch.tensor([grid] * (FRAMES * 8 * num_prompts)),
        "mm_token_type_ids": (ids == cfg.image_token_id).int(),
    }
    length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    generate = partial(theirs.generate, **given, **length, do_sample=True)
    return turns | timed({"nanosport": ours, "generate": generate}, repeats)


@torch.no_grad()
def timed(ways: dict, repeats: int) -> dict:
    """The seconds of two ways, turn by turn, and how many times the first is faster. Where
    there are several repeats, one more comes first and warms up."""
    seconds, warm_up = {name: [] for name in ways}, repeats > 1
    for repeat in range(repeats + warm_up):
        for name, play in ways.items():
            began = time.perf_counter()
            play()
            if repeat >= warm_up:
                seconds[name].append(round(time.perf_counter() - began, 3))
    ours, theirs = (median(times) for times in seconds.values())
    return {"seconds": seconds, "times_faster": round(theirs / ours, 2)}


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--out", type=Path, default=Path("results/engine"))
    parser.add_argument("--repeats", type=COUNT, default=3, help="runs a time is the median of")
    gpu = torch.cuda.is_available()
    usual = "qwen2.5-vl-7b" if gpu else "nano-sft"
    parser.add_argument("--shape", default=usual, help="a folder in assets/")
    args = parser.parse_args()
    where = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    model = random_model(args.shape, *where)
    report = {**provenance(), "gpu": gpu, "shape": args.shape}
    report["steps"] = step_rows(model, args.repeats)
    try:
        size = (4, (1280, 720)) if gpu else (1, (320, 180))
        image = ImageConfig.from_folder(ASSETS / args.shape, 640 * 360)
        report["episodes"] = play_episodes(model, image, *size)
        print(report["episodes"])
    except ImportError as error:
        print(f"no episodes: {error}; install av to render and decode clips")
    if not gpu:
        report["beside_generate"] = beside_generate(args.repeats)
        print(report["beside_generate"])
    name = card_name() if args.shape == usual else f"{card_name()}-{args.shape}"
    print(write_report(args.out, name, report))


if __name__ == "__main__":
    ending(main)
