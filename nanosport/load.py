"""Model folders in and out: config.json, safetensors (one file or shards), tokenizer, all as transformers has them."""

import ctypes
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .model import ModelConfig, Qwen25VL

INDEX = "model.safetensors.index.json"
COPIED = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
SINGLE_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<tool_call>", "</tool_call>",
)  # fmt: skip


def resolve(model: str) -> Path:
    """The folder of a model: a path, or a Hugging Face hub id (`owner/name`), which is downloaded once and cached."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {model}: the folder holds no config.json, so it is not a model folder")
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model {model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))
    except Exception as error:  # whatever the network, the hub or its cache answers
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"model {model}: no such folder, and the hub did not give it ({reason})") from error


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as a JSON object ({error})") from error


def load_config(folder: str | Path) -> ModelConfig:
    """config.json, and the end-of-sequence ids of generation_config.json, for chat models stop at several."""
    folder = Path(folder)
    cfg = ModelConfig.from_dict(read_json(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder / "generation_config.json").get("eos_token_id")
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        cfg = replace(cfg, eos_token_ids=tuple(dict.fromkeys((*cfg.eos_token_ids, *eos))))
    return cfg


def published_name(name: str) -> str:
    """The published name of a weight that a newer tool has saved under its module path."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing")
    return [folder / name for name in names]


def some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_model(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Qwen25VL:
    """The model of a folder. Raises ValueError where the weights are not exactly the ones its config asks for."""
    folder = Path(folder)
    with torch.device("meta"):
        model = Qwen25VL(load_config(folder))
    state = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                for name in names:  # copy: the tensors must not stay mapped to a file that may be replaced
                    state[published_name(name)] = file.get_tensor(name).to(device, dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if model.cfg.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # some tools write the shared matrix twice
    wanted = model.state_dict()
    if missing := wanted.keys() - state.keys():
        raise ValueError(f"{folder}: weights missing: {some(missing)}")
    if unexpected := state.keys() - wanted.keys():
        raise ValueError(f"{folder}: weights the model has no place for: {some(unexpected)}")
    if wrong := {name for name, weight in wanted.items() if state[name].shape != weight.shape}:
        raise ValueError(f"{folder}: weights of another shape than config.json says: {some(wrong)}")
    model.load_state_dict(state, assign=True)
    return model


def save_model(
    model: Qwen25VL, folder: str | Path, source: str | Path, max_shard_bytes: float = 5e9,
    dtype: torch.dtype | None = None, state: dict[str, torch.Tensor] | None = None, max_pixels: int | None = None,
):  # fmt: skip
    """Write a model folder; config, tokenizer and preprocessor files are copied from `source`.

    The folder appears whole or not at all, and replaces an older model folder in one step. dtype: of the saved weights
    (None: as they are). state: the full weights, where the model itself holds only a shard of them (FSDP). max_pixels: of a
    frame, where it was trained with another bound than the source's. Raises ValueError where the place cannot be written, or
    holds something else than a model.
    """
    folder, source, state = Path(folder).absolute(), Path(source), model.state_dict() if state is None else state
    if replace(load_config(source), eos_token_ids=()) != replace(model.cfg, eos_token_ids=()):
        raise ValueError(f"{source}: its config.json describes another model than the one to be saved")
    check_replaceable(folder)
    temp = folder.with_name(f".{folder.name}.{os.getpid()}")  # beside it: a rename works only inside one file system
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
        write_weights(state, temp, max_shard_bytes, dtype)
        saved_dtype = dtype or model.head_weight_VD.dtype
        write_json(temp / "config.json", with_dtype(read_json(source / "config.json"), saved_dtype))
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, temp / name)
        if max_pixels is not None:
            raw = read_json(source / "preprocessor_config.json")
            size = {"size": {**raw["size"], "longest_edge": max_pixels}} if raw.get("size") else {}
            write_json(temp / "preprocessor_config.json", {**raw, **size, "max_pixels": max_pixels})
        for path in (*temp.iterdir(), temp):
            sync(path)
        move_into_place(temp, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the model could not be saved ({error})") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)  # the unfinished new folder, or the old one


def version(folder: Path) -> str:
    """What changes when a model folder is trained anew: sizes and times of its weights."""
    stats = ((path.name, path.stat()) for path in sorted(Path(folder).glob("*.safetensors")))
    return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def check_replaceable(folder: Path):
    """Refuse to replace what is not plainly a model folder: the old one is deleted."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: exists and is not a folder")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if entries and (any(e.is_dir() for e in entries) or not any(e.suffix == ".safetensors" for e in entries)):
        raise ValueError(f"{folder}: exists and holds other things than a model: choose another place")


def write_weights(state: dict, folder: Path, max_shard_bytes: float, dtype: torch.dtype | None):
    size = {n: w.numel() * (dtype or w.dtype).itemsize for n, w in state.items()}
    if (free := shutil.disk_usage(folder).free) < sum(size.values()):
        raise OSError(f"{sum(size.values()) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    shards, filled = [[]], 0
    for name in state:
        if shards[-1] and filled + size[name] > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size[name]
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: state[n].detach().to("cpu", dtype or state[n].dtype).contiguous() for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map})


def with_dtype(raw: dict, dtype: torch.dtype) -> dict:
    """config.json as it was, but for the dtype it names: transformers loads with that one."""
    name = str(dtype).removeprefix("torch.")
    return {
        key: with_dtype(value, dtype) if isinstance(value, dict) else name if key in ("dtype", "torch_dtype") else value
        for key, value in raw.items()
    }


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


def sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(new: Path, folder: Path):
    """Rename `new` to `folder`. An older folder ends up under the name `new`, or is gone."""
    if not folder.exists():
        return new.rename(folder)
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux: swaps two names in one step
    at_cwd, swap = -100, 2
    if exchange and exchange(at_cwd, os.fsencode(new), at_cwd, os.fsencode(folder), swap) == 0:
        return None
    old = new.with_name(new.name + ".old")  # elsewhere: two steps, and a crash between them leaves both folders whole
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizer(folder: str | Path):
    """The folder's fast tokenizer. Raises ValueError where it has none, or not one that fits the model."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    cfg = load_config(folder)
    if (folder / "tokenizer.json").is_file():  # taken as it is: a model's own class may put in its own splitting rule
        tokenizer_class = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer_class = AutoTokenizer
    else:  # AutoTokenizer would make up a tokenizer of one token, without an error
        raise ValueError(f"{folder}: no tokenizer (neither tokenizer.json nor vocab.json and merges.txt)")
    try:
        tokenizer = tokenizer_class.from_pretrained(folder)
    except Exception as error:  # the library names no type for a file it cannot read
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder}: its tokenizer cannot be read ({reason})") from error
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in SINGLE_TOKENS}
    split = [token for token in SINGLE_TOKENS if len(ids[token]) != 1 or tokenizer.decode(ids[token]) != token]
    if split:
        raise ValueError(f"{folder}: the wrong tokenizer: {some(split)} must be one token each")
    expected = {
        "<|image_pad|>": cfg.image_token_id,
        "<|vision_start|>": cfg.vision_start_token_id,
        "<|vision_end|>": cfg.vision_end_token_id,
    }
    for token, token_id in expected.items():
        if ids[token] != [token_id]:
            raise ValueError(f"{folder}: the wrong tokenizer: {token} is {ids[token][0]}, in config.json {token_id}")
    if (highest := max(tokenizer.get_vocab().values())) >= cfg.vocab_size:
        raise ValueError(f"{folder}: the wrong tokenizer: it has id {highest}, the model {cfg.vocab_size} rows")
    return tokenizer
