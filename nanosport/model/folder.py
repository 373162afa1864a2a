"""Model folders in and out: config.json, safetensors (one file or shards), tokenizer, all as
transformers has them."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short

import torch
from safetensors import SafetensorError, safe_open

from nanosport.fields import check, only, read_json, section
from nanosport.files import ASSETS
from nanosport.image import image_settings
from nanosport.model import lora, qwen2_5_vl, qwen3_vl, shards
from nanosport.model.decoder import ModelConfig, VLModel, as_ids

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_ID = r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
COPIED = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", *TOKENIZER_SETTINGS, "tokenizer.json", "vocab.json",
    "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
SINGLE_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<tool_call>", "</tool_call>",
)  # fmt: skip


def resolve(model: str) -> Path:
    """The folder of a model: a path, or a Hugging Face hub id (`owner/name`, or a revision of it,
    `owner/name@revision`), which is downloaded once and cached. What is shipped, `assets/…`, is
    found from any folder. Raises ValueError where there is no such model."""
    folder = Path(os.path.expanduser(model))
    if not folder.exists() and model.startswith("assets/"):
        folder = ASSETS.parent / folder
    if not folder.exists() and (old := aside(folder)).is_dir():
        folder = old  # a save was killed between its two renames
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            why = "the folder holds no config.json, so it is not a model folder"
            raise ValueError(f"model {model}: {why}")
        say_which(folder)
        return folder
    hub_id = re.fullmatch(HUB_ID, model)
    # whoever owns these names at the hub, ours are meant
    if folder.exists() or hub_id is None or model.startswith(("assets/", "out/")):
        raise ValueError(f"model {model}: no such folder")
    from huggingface_hub import snapshot_download

    (name, revision), patterns = hub_id.groups(), ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # whatever the network, the hub or its cache answers
        why = f"no such folder, and the hub did not give it ({first_line(error)})"
        raise ValueError(f"model {model}: {why}") from error
    say_which(folder)
    return folder


def hub_commit(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None of another folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, whose base is elsewhere."""
    return (folder / lora.CONFIG).is_file()


def chain(folder: Path) -> list[Path]:
    """A model folder; of an adapter the adapter, its base, which may be one too, and so on. Raises
    ValueError where a base cannot be found."""
    folders = [Path(folder)]
    while is_adapter(folders[-1]):
        file = folders[-1] / lora.CONFIG
        raw = read_json(file)
        base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
        if not isinstance(base, str) or not base:
            raise ValueError(f"{file}: names no base_model_name_or_path: write the base's there")
        try:
            folders.append(resolve(f"{base}@{revision}" if revision else base))
        except ValueError as error:
            raise ValueError(f"{file}: its base_model_name_or_path: {error}") from error
        if folders[-1].resolve() in [other.resolve() for other in folders[:-1]]:
            raise ValueError(f"{file}: base_model_name_or_path {base}: is an adapter of itself")
    return folders


def settings_folder(folder: Path) -> Path:
    """Where config, tokenizer and preprocessor are: in an adapter's folder, or in its base's."""
    return next((one for one in chain(folder) if (one / "config.json").is_file()), Path(folder))


def check_whole_model(folder: Path, taker: str) -> None:
    """Raise ValueError for an adapter's folder, where `taker` takes whole models alone."""
    if is_adapter(folder):
        merge = f"python -m nanosport.train.checkpoint {folder} OUT"
        raise ValueError(f"model {folder}: {taker} takes no adapter; merge it: {merge}")


def say_which(folder: Path) -> None:
    """Say which weights are taken where a folder has them twice."""
    twice = (folder / WHOLE).is_file() and (folder / INDEX).is_file()
    if twice and os.environ.get("RANK", "0") == "0":
        why = f"is taken, as transformers does, and not what {INDEX} names"
        print(f"note: {folder}: {WHOLE} {why}", file=sys.stderr)


FAMILIES = {"qwen2_5_vl": qwen2_5_vl.ModelConfig, "qwen3_vl": qwen3_vl.ModelConfig}
"""By config.json's model_type."""


def read_config(raw: dict, where="config.json") -> ModelConfig:
    """A family's config from the object in config.json. Raises ValueError where no family here is
    of its model_type, or a field is wrong."""
    only(where, "model_type", model_type := raw.get("model_type"), *FAMILIES)
    return FAMILIES[model_type].from_dict(raw, where)


def load_config(folder: str | Path) -> ModelConfig:
    """config.json, and the end-of-sequence ids of generation_config.json, for chat models stop at
    several."""
    folder = settings_folder(folder)
    file, more = folder / "config.json", folder / "generation_config.json"
    cfg = read_config(read_json(file), file)
    if more.is_file():
        ids = as_ids(read_json(more).get("eos_token_id"))
        check(ModelConfig, "eos_token_ids", ids, more)
        cfg = replace(cfg, eos_token_ids=tuple(dict.fromkeys((*cfg.eos_token_ids, *ids))))
    return cfg


def load_model(
    folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32, tower=None
) -> VLModel:
    """The model of a folder, an adapter merged into its base. tower: the same one of another model,
    to share. Raises ValueError where the weights are not exactly the ones its config asks for."""
    *adapters, folder = chain(Path(folder))
    model = load_whole(folder, device, dtype)
    for adapter in reversed(adapters):
        state = read_weights(weight_files(adapter), device, torch.float32)
        lora.merge(model, read_json(adapter / lora.CONFIG), state, adapter)
    if tower is not None:
        model.visual = tower
    return model


def load_whole(folder: Path, device, dtype: torch.dtype) -> VLModel:
    """The model of a folder that holds all its weights."""
    with torch.device("meta"):
        model = VLModel(load_config(folder))
    state, wanted = read_weights(weight_files(folder), device, dtype), model.state_dict()
    if model.cfg.tie_word_embeddings and "lm_head.weight" in state:  # some tools write it twice
        head = state.pop("lm_head.weight")
        if not torch.equal(head, state.get("model.embed_tokens.weight", head)):
            says = "config.json ties lm_head to the embeddings, the file has another lm_head.weight"
            which = "set tie_word_embeddings to false, or take lm_head.weight out of the file"
            raise ValueError(f"{folder}: {says}: {which}")
    if missing := wanted.keys() - state.keys():
        raise ValueError(f"{folder}: weights missing: {first_few(missing)}")
    if unexpected := state.keys() - wanted.keys():
        raise ValueError(f"{folder}: weights the model has no place for: {first_few(unexpected)}")
    if wrong := {name for name, weight in wanted.items() if state[name].shape != weight.shape}:
        shapes = "weights of another shape than config.json says"
        raise ValueError(f"{folder}: {shapes}: {first_few(wrong)}")
    model.load_state_dict(state, assign=True)
    return model


def read_weights(files: Iterable[Path], device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of files by our names. Raises ValueError where a file is not whole,
    or a weight is there twice or not finite."""
    state = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # a copy: it must not stay mapped to a file that may be replaced; cast on the
                    # device, for a host takes long
                    weight = file.get_tensor(name).to(device, copy=True).to(dtype)
                    if (own := own_name(name)) in state:
                        why = "is there twice, in another file or under an older name"
                        raise ValueError(f"{path}: {name} {why}")
                    # both are NaN where one value is; of all checks by far the cheapest
                    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
                        why = "holds NaN or infinity: take the model from before its run broke"
                        raise ValueError(f"{path}: {name} is not finite: it {why}")
                    state[own] = weight
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    return state


def own_name(name: str) -> str:
    """What we call a weight: as Qwen2.5-VL was published, whatever family or tool has saved it."""
    name = name.removeprefix(lora.PREFIX)
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers takes: the whole one, else those of the index; of an
    adapter its own, without its base's. Raises ValueError where one is missing, or is not in the
    folder (but links in it may lead outside)."""
    names = {lora.WEIGHTS if is_adapter(folder) else WHOLE}
    if names == {WHOLE} and not (folder / WHOLE).is_file() and (index := folder / INDEX).is_file():
        named = section(read_json(index), "weight_map", index).values()
        if outside := [n for n in named if not isinstance(n, str) or n != Path(n).name]:
            raise ValueError(f"{index}: weight_map {short(outside[0])}: must be a file beside it")
        names = set(named)
    for name in sorted(names):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing")
    return [folder / name for name in sorted(names)]


def version(folder: Path) -> str:
    """What changes when a model folder is trained anew, and stays when it is copied: names, sizes
    and a digest of its files of weights, an adapter's base's too: the whole of 16 MiB, an even
    sample of larger ones."""
    parts, block = [], 2**14
    for path in (path for one in chain(folder) for path in weight_files(one)):
        size, digest = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            for start in range(0, size, max(block, size // 1024)):
                file.seek(start)
                digest.update(file.read(block))
        parts.append(f"{path.name}:{size}:{digest.hexdigest()[:16]}")
    return " ".join(parts)


def save_model(
    model: VLModel,
    folder: str | Path,
    source: str | Path,
    max_shard_bytes: float = 5e9,
    dtype: torch.dtype | None = None,
    shapes: Shapes | None = None,
    load: Callable[[str], torch.Tensor] | None = None,
    max_pixels: int | None = None,
    adapter: dict | None = None,
):
    """Write a model folder; config, tokenizer and preprocessor files are copied from `source`.

    It appears whole or not at all; an older model there stays until then. dtype: of the weights
    (None: as they are). shapes, load: of each weight, and what gives it in one piece, where the
    model holds a shard of it (FSDP) and may be computing. max_pixels: a frame's bound in training,
    where it is not the source's. adapter: adapter_config.json, where the weights are an adapter's.
    Raises ValueError where the place cannot be written, or holds something else than a model.
    """
    folder, source = Path(folder).absolute(), settings_folder(source)
    if shapes is None or load is None:
        weights = model.state_dict()
        shapes, load = {n: (w.shape, w.dtype) for n, w in weights.items()}, weights.__getitem__
    if replace(load_config(source), eos_token_ids=()) != replace(model.cfg, eos_token_ids=()):
        raise ValueError(f"{source}: its config.json describes another model than that to be saved")
    check_replaceable(folder)
    new = folder.with_name(f".{folder.name}.{os.getpid()}")  # beside it, where a rename works
    shutil.rmtree(new, ignore_errors=True)  # a killed run's, whose pid has come again
    try:
        new.mkdir(parents=True)
        own = {model.cfg.published_name(name): name for name in shapes}
        shapes = {name: shapes[own[name]] for name in own}
        write_weights(shapes, new, max_shard_bytes, dtype, lambda name: load(own[name]))
        if adapter:
            (new / WHOLE).rename(new / lora.WEIGHTS)
            write_json(new / lora.CONFIG, adapter)
        copy_settings(source, new, dtype or model.head_weight_VD.dtype, max_pixels)
        for path in (*new.iterdir(), new):
            sync(path)
        move_into_place(new, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the model could not be saved ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Refuse to replace what is not plainly a model folder: the old one is deleted."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: exists and is not a folder")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    has_weights = any(entry.suffix == ".safetensors" for entry in entries)
    if entries and (not has_weights or any(entry.is_dir() for entry in entries)):
        what = "exists and holds other things than a model"
        raise ValueError(f"{folder}: {what}: choose another place")


def write_weights(
    shapes: Shapes,
    folder: Path,
    max_shard_bytes: float,
    dtype: torch.dtype | None,
    load: Callable[[str], torch.Tensor],
):
    """Write the weights as one file, or as shards with an index."""
    shapes = {name: (shape, dtype or own) for name, (shape, own) in shapes.items()}
    size = {name: shape.numel() * kind.itemsize for name, (shape, kind) in shapes.items()}
    total, free = sum(size.values()), shutil.disk_usage(folder).free
    if free < total:
        raise OSError(f"{total / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free")
    files, filled = [[]], 0
    for name in shapes:
        if files[-1] and filled + size[name] > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size[name]

    weight_map = {}
    for number, names in enumerate(files, start=1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = f"model{part}.safetensors"
        its = {name: shapes[name] for name in names}
        # cast where the weight is, which on a GPU takes no time
        shards.write(
            folder / file, its, lambda name: load(name).detach().to(shapes[name][1]).cpu(), {}
        )
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_settings(source: Path, folder: Path, dtype: torch.dtype, max_pixels: int | None) -> None:
    """Copy what is beside the weights; only the dtype and the bound on pixels may be others."""
    named = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", with_dtype(read_json(source / "config.json"), named))
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if max_pixels is not None:
        file, settings = image_settings(source)
        settings = settings | {"max_pixels": max_pixels}
        if size := settings.get("size"):
            settings["size"] = size | {"longest_edge": max_pixels}
        nested = file.name == "processor_config.json"
        whole = read_json(file) | {"image_processor": settings} if nested else settings
        write_json(folder / file.name, whole)


def with_dtype(config: dict, dtype: str) -> dict:
    """config.json as it was, but for the dtype it names: transformers loads with that one."""
    named = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    sections = [key for key in ("text_config", "vision_config") if config.get(key)]
    return config | {key: with_dtype(config[key], dtype) for key in sections} | named


def move_into_place(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. While that takes two renames, `resolve` gives the older folder."""
    if folder.exists():
        shutil.rmtree(aside(folder), ignore_errors=True)
        folder.rename(aside(folder))
    new.rename(folder)
    shutil.rmtree(aside(folder), ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where an older model is while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def load_tokenizer(folder: str | Path):
    """The folder's fast tokenizer. Raises ValueError where it has none, or not one that fits the
    model."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = settings_folder(folder)
    cfg = load_config(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer_class = PreTrainedTokenizerFast  # a model's own class may put in its own rules
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer_class = AutoTokenizer
    else:  # AutoTokenizer would make up a tokenizer of one token, without an error
        why = "no tokenizer (neither tokenizer.json nor vocab.json and merges.txt)"
        raise ValueError(f"{folder}: {why}")
    for file in map(folder.joinpath, TOKENIZER_SETTINGS):
        if file.is_file():
            read_json(file)  # whose errors name the file
    try:
        tokenizer = tokenizer_class.from_pretrained(folder)
    except Exception as error:  # the library names no type for a file it cannot read
        why = f"its tokenizer cannot be read ({first_line(error)})"
        raise ValueError(f"{folder}: {why}") from error
    if (mistake := tokenizer_mistake(tokenizer, cfg)) is not None:
        raise ValueError(f"{folder}: the wrong tokenizer: {mistake}")
    return tokenizer


def tokenizer_mistake(tokenizer, cfg: ModelConfig) -> str | None:
    """Why a tokenizer does not fit a model, or None where it does."""
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in SINGLE_TOKENS}
    split = [t for t in SINGLE_TOKENS if len(ids[t]) != 1 or tokenizer.decode(ids[t]) != t]
    if split:
        return f"{first_few(split)} must be one token each"
    expected = {
        "<|image_pad|>": cfg.image_token_id,
        "<|vision_start|>": cfg.vision_start_token_id,
        "<|vision_end|>": cfg.vision_end_token_id,
    }
    for token, token_id in expected.items():
        if ids[token] != [token_id]:
            return f"{token} is {ids[token][0]}, in config.json {token_id}"
    if (highest := max(tokenizer.get_vocab().values())) >= cfg.vocab_size:
        return f"it has id {highest}, the model {cfg.vocab_size} rows"
    return None


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
