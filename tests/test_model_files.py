"""Model folders as they are met: written by several tools, at odds with themselves, or damaged.
What transformers takes is taken, and what nobody can take is refused in one line."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

import eval as evaluation
import infer
import rl
import train
from nanosport.files import ASSETS
from nanosport.image import ImageConfig
from nanosport.model.folder import (
    hub_commit,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
    version,
)
from nanosport.model.frames import FrameEncoder
from nanosport.model.qwen2_5_vl import ModelConfig
from tests.helpers.clips import write
from tests.helpers.hub_cache import hub_cache

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act rms_norm_eps rope_theta rope_scaling vocab_size max_position_embeddings"
).split()


@pytest.fixture
def folder(nano_folder, tmp_path) -> Path:
    return Path(shutil.copytree(nano_folder, tmp_path / "model"))


def edit(file: Path, **fields) -> None:
    """Set fields of a JSON file; a field of ... is taken away."""
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: v for name, v in raw.items() if v is not ...}))


def put(file: Path, place: str, value) -> None:
    """Set one value, at a place such as `vision_config.depth`."""
    raw = json.loads(file.read_text())
    *sections, name = place.split(".")
    inner = raw
    for section in sections:
        inner = inner[section]
    inner[name] = value
    file.write_text(json.dumps(raw))


def reweigh(folder: Path, change) -> dict:
    """Save the weights as `change` leaves them; returns them as they were."""
    before = load_file(folder / WHOLE)
    weights = {name: weight.clone() for name, weight in before.items()}
    change(weights)
    save_file(weights, folder / WHOLE, metadata={"format": "pt"})
    return before


def refused(match: str, call, *arguments) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def logits(model) -> torch.Tensor:
    ids = torch.arange(20, 28)
    positions = torch.arange(len(ids)).expand(3, -1)
    hidden = model.hidden(ids, positions, torch.tensor([0, len(ids)], dtype=torch.int32))
    return (hidden @ model.head_weight_VD.T).detach()


def assert_as_transformers(folder: Path) -> None:
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    expected = theirs(input_ids=torch.arange(20, 28)[None]).logits[0].detach()
    torch.testing.assert_close(logits(load_model(folder)), expected, rtol=1e-4, atol=1e-4)


# The image processor's settings.


def nest(folder: Path, **changes) -> dict:
    """Move the settings to where transformers 5 saves them."""
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    bounds = {"shortest_edge": raw.pop("min_pixels"), "longest_edge": raw.pop("max_pixels")}
    raw |= {"size": bounds, "do_resize": True, "do_normalize": True, "resample": 3} | changes
    both = {"image_processor": raw, "video_processor": {"size": {"longest_edge": 1}}}
    both["processor_class"] = "Qwen2_5_VLProcessor"
    (folder / "processor_config.json").write_text(json.dumps(both))
    (folder / "preprocessor_config.json").unlink()
    return raw


def test_image_settings_are_read_where_transformers_now_saves_them(folder, tmp_path, capsys):
    wanted = ImageConfig.from_folder(folder)
    raw = nest(folder)
    assert ImageConfig.from_folder(folder) == wanted
    clip = write(tmp_path / "clip.mp4")
    infer.main(infer.Config(clip, "Who?", model=str(folder), max_new_tokens=3))
    assert "frames looked at" in capsys.readouterr().out

    # both files: transformers reads the nested settings, unless they are missing there
    old = {**raw, "size": ..., "min_pixels": 784, "max_pixels": 10_000}
    (folder / "preprocessor_config.json").write_text("{}")
    edit(folder / "preprocessor_config.json", **old)
    assert ImageProcessingMixin.get_image_processor_dict(folder)[0]["size"] == raw["size"]
    assert ImageConfig.from_folder(folder) == wanted
    edit(folder / "processor_config.json", image_processor=...)
    assert ImageProcessingMixin.get_image_processor_dict(folder)[0]["max_pixels"] == 10_000
    assert ImageConfig.from_folder(folder).max_pixels == 10_000


def test_nested_image_settings_are_saved_with_the_bound_of_training(folder, tmp_path):
    nest(folder)
    save_model(load_model(folder), tmp_path / "saved", folder, max_pixels=12_544)
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    whole = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert whole["image_processor"]["size"]["longest_edge"] == 12_544
    assert whole["video_processor"] == {"size": {"longest_edge": 1}}
    assert ImageConfig.from_folder(tmp_path / "saved").max_pixels == 12_544
    save_model(load_model(folder), tmp_path / "same", folder)
    assert ImageConfig.from_folder(tmp_path / "same") == ImageConfig.from_folder(folder)


def test_image_settings_that_this_code_has_not_are_refused(folder):
    for name, value in (("do_normalize", False), ("do_rescale", None), ("resample", 2)):
        put(folder / "preprocessor_config.json", name, value)
        refused(f"preprocessor_config.json: {name} .*: this code has only", images, folder)
        edit(folder / "preprocessor_config.json", **{name: ...})
    least = ImageConfig.from_folder(folder).min_pixels
    rule = f"^--max-pixels 1000: must be at least {least}, the model's min_pixels"
    refused(rule, ImageConfig.from_folder, folder, 1000)
    put(folder / "preprocessor_config.json", "max_pixels", 1000)
    refused(f"_config.json: max_pixels 1000: must be at least {least}", images, folder)
    edit(folder / "preprocessor_config.json", max_pixels=18816, patch_size=14)
    refused(
        "settings are another model's", lambda: FrameEncoder(load_model(folder), images(folder))
    )
    (folder / "preprocessor_config.json").unlink()
    refused("cannot be read: it is missing", images, folder)


def images(folder: Path) -> ImageConfig:
    return ImageConfig.from_folder(folder)


# Which weights a folder means.


@pytest.mark.parametrize("top", [..., True, False])
@pytest.mark.parametrize("text", [None, ..., True, False])
def test_the_head_is_the_one_that_transformers_takes(folder, top, text):
    """Tied where either level of config.json says so; a head beside that is the same, or refused:
    transformers' versions differ there."""
    raw = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", tie_word_embeddings=top)
    if text is not None:
        its = {name: raw[name] for name in TEXT} | {"model_type": "qwen2_5_vl_text"}
        its |= {} if text is ... else {"tie_word_embeddings": text}
        edit(folder / "config.json", text_config=its)
    tied = top is True or text is True
    assert load_config(folder).tie_word_embeddings == tied

    if tied:
        assert_as_transformers(folder)  # the file has none
    else:
        refused("weights missing: lm_head.weight$", load_model, folder)
    reweigh(folder, lambda w: w.update({HEAD: w[EMBEDDINGS].clone()}))
    assert_as_transformers(folder)
    reweigh(folder, lambda w: w.update({HEAD: w[EMBEDDINGS] + 0.05 * torch.randn(1023, 128)}))
    if tied:
        refused("ties lm_head to the embeddings, the file has another", load_model, folder)
    else:
        assert_as_transformers(folder)


def shard(folder: Path, weights: dict, names=("model-00001.safetensors", "b.safetensors")) -> None:
    """Write weights as two shards with an index."""
    keys = list(weights)
    parts = {names[0]: keys[: len(keys) // 2], names[1]: keys[len(keys) // 2 :]}
    for file, its in parts.items():
        save_file({k: weights[k] for k in its}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, its in parts.items() for key in its}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_whole_file_goes_before_the_shards_of_an_older_save(folder, capsys):
    before = load_file(folder / WHOLE)
    shard(folder, {name: torch.zeros_like(weight) for name, weight in before.items()})
    named = version(folder)
    assert resolve(str(folder)) == folder
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{folder}: model.safetensors is taken" in said[0]
    assert torch.equal(load_model(folder).state_dict()[EMBEDDINGS], before[EMBEDDINGS].float())
    assert_as_transformers(folder)
    for path in folder.glob("*-00001.safetensors"):
        path.unlink()  # nobody reads it
    assert version(folder) == named and named.startswith("model.safetensors:")
    assert load_model(folder)

    (folder / WHOLE).unlink()
    refused("model-00001.safetensors is missing", load_model, folder)
    shard(folder, before)
    assert_as_transformers(folder)
    assert version(folder) != named
    capsys.readouterr()
    resolve(str(folder))
    assert capsys.readouterr().err == ""


def test_a_folders_version_is_what_its_weights_are(folder, tmp_path):
    named = version(folder)
    os.utime(folder / WHOLE, ns=(1, 1))
    assert version(shutil.copytree(folder, tmp_path / "copy")) == version(folder) == named
    (folder / "unused.safetensors").write_bytes(b"x")
    assert version(folder) == named
    times = (folder / WHOLE).stat()
    reweigh(folder, lambda w: w["model.norm.weight"].mul_(2))
    os.utime(folder / WHOLE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert version(folder) != named

    with open(folder / WHOLE, "wb") as file:  # larger than what is read whole
        file.truncate(2**25)
    zeros = version(folder)
    with open(folder / WHOLE, "r+b") as file:
        file.seek(2**24)
        file.write(b"\1" * 2**16)
    assert version(folder) != zeros


def test_the_shards_of_an_index_lie_beside_it(folder, tmp_path):
    weights = load_file(folder / WHOLE)
    (folder / WHOLE).rename(tmp_path / "x.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(tmp_path / "x.safetensors", folder / "sub")
    outside = ("../x.safetensors", str(tmp_path / "x.safetensors"), "sub/x.safetensors", 7, None)
    for name in (*outside, ["x"], {}):
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
        refused(f"{INDEX}: weight_map .*: must be a file beside it", load_model, folder)
        refused("must be a file beside it", version, folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": ["x.safetensors"]}))
    refused(f"{INDEX}: weight_map .*: must be an object", load_model, folder)
    for name in ("", "..", "a\0b"):
        (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDINGS: name}}))
        refused("is missing", load_model, folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path, sharded):
    before = logits(load_model(folder))
    if sharded:
        shard(folder, load_file(folder / WHOLE))
        (folder / WHOLE).unlink()
    snapshot = hub_cache(folder, tmp_path)
    assert torch.equal(logits(load_model(snapshot)), before)
    assert version(snapshot) == version(folder)
    assert hub_commit(snapshot) == snapshot.name and hub_commit(folder) is None


def test_a_weight_that_is_there_twice_is_refused(folder):
    new = "model.language_model.norm.weight"
    reweigh(folder, lambda w: w.update({new: w["model.norm.weight"] + 1}))
    refused(f"{WHOLE}: .*norm.weight is there twice", load_model, folder)
    before = reweigh(folder, lambda w: w.pop(new))
    before.pop(new)
    (folder / WHOLE).unlink()
    shard(folder, before)
    name, extra = next(iter(before.items()))
    rest = load_file(folder / "b.safetensors")
    save_file(rest | {name: extra + 1}, folder / "b.safetensors")
    refused(f"{name} is there twice", load_model, folder)


# Values that nothing can be computed with.


@pytest.mark.parametrize(
    "name, value",
    [
        ("model.layers.0.mlp.up_proj.weight", math.nan),
        ("visual.blocks.1.attn.qkv.bias", -math.inf),
        (EMBEDDINGS, math.inf),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_every_command(
    folder, arena_folder, tmp_path, name, value
):
    """The weights are saved as the shipped ones are, in bfloat16."""

    def break_one(weights):
        for key in weights:
            weights[key] = weights[key].bfloat16()
        weights[name].view(-1)[-1] = value

    reweigh(folder, break_one)
    clip, model, out = write(tmp_path / "clip.mp4"), str(folder), tmp_path / "out"
    asked, taught = arena_folder / "test.jsonl", arena_folder / "trajectories.jsonl"
    for main, cfg in (
        (infer.main, infer.Config(clip, "Who?", model=model)),
        (evaluation.main, evaluation.Config(model, asked)),
        (train.main, train.Config(model, taught, out / "sft")),
        (rl.main, rl.Config(model, asked, out / "rl")),
    ):
        refused(f"{name} is not finite: it holds NaN or infinity", main, cfg)
    refused("is not finite", load_model, folder, "cpu", torch.bfloat16)


def test_a_large_weight_is_still_a_number(folder):
    """Their sum would be infinite."""
    reweigh(folder, lambda w: w["model.norm.weight"].fill_(3e38))
    assert load_model(folder).state_dict()["model.norm.weight"].isfinite().all()


ATLEAST, ABOVE = r"must be a whole number .*, at least \d", "must be a finite number, above 0"


@pytest.mark.parametrize(
    "place, value, rule",
    [
        ("num_attention_heads", 0, ATLEAST),
        ("num_key_value_heads", 3, "must divide the 4 heads"),
        ("num_key_value_heads", None, ATLEAST),
        ("num_hidden_layers", -4, ATLEAST),
        ("hidden_size", "128", ATLEAST),
        ("num_attention_heads", 7, "must divide hidden_size"),
        ("intermediate_size", 384.0, ATLEAST),
        ("vocab_size", True, ATLEAST),
        ("vocab_size", 10**20, ATLEAST),
        ("rms_norm_eps", math.nan, ABOVE),
        ("rms_norm_eps", "1e-6", ABOVE),
        ("rms_norm_eps", 0, ABOVE),
        ("rope_theta", 0, ABOVE),
        ("rope_theta", math.inf, ABOVE),
        ("rope_theta", 10**400, ABOVE),
        ("rope_scaling", ["mrope"], "must be an object"),
        ("rope_scaling.mrope_section", [4, 6], "must be a list of 3, each a whole number"),
        ("rope_scaling.mrope_section", 16, "must be a list of 3"),
        ("rope_scaling.mrope_section", [4, 6, 7], "half a head"),
        ("rope_scaling.mrope_section", [-4, 10, 10], "must be a list of 3"),
        ("text_config", "none", "must be an object"),
        ("tie_word_embeddings", "false", "must be true or false"),
        ("eos_token_id", "2", "must be a list, each a whole number"),
        ("eos_token_id", {"id": 2}, "must be a list"),
        ("image_token_id", None, ATLEAST),
        ("vision_config", [], "must be an object"),
        ("vision_config", None, "'depth' is missing"),
        ("vision_config.depth", 0, ATLEAST),
        ("vision_config.num_heads", 3, "must divide hidden_size / 4"),
        ("vision_config.out_hidden_size", 64, "must be hidden_size"),
        ("vision_config.window_size", 10, "must be at least 56"),
        ("vision_config.fullatt_block_indexes", 3, "must be a list, each a whole number"),
        ("vision_config.fullatt_block_indexes", [1, "3"], "must be a list, each a whole number"),
        ("vision_config.hidden_act", ["silu"], "this code has only 'silu'"),
        # what no machine can hold is refused before it is built
        ("num_hidden_layers", 10**8, "at most 1000"),
        ("vision_config.depth", 10**8, "at most 1000"),
        ("vision_config.hidden_size", 10**9, r"at most \d"),
        ("vision_config.out_hidden_size", 10**9, r"at most \d"),
        ("vision_config.patch_size", 10**9, r"at most \d"),
        ("vision_config.spatial_merge_size", 10**9, r"at most \d"),
        ("vision_config.temporal_patch_size", 10**9, r"at most \d"),
        ("vision_config.in_channels", 10**9, r"at most \d"),
    ],
)
def test_a_value_of_config_json_that_no_model_has_is_named(folder, place, value, rule):
    put(folder / "config.json", place, value)
    field = place.rpartition(".")[2].replace("eos_token_id", "eos_token_ids")
    if place != "vision_config" or value == []:
        rule = f"{field}.*{rule}"
    refused(f"{folder}/config.json: .*{rule}", load_model, folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("patch_size", 0),
        ("patch_size", [14, 14]),
        ("patch_size", 10**9),  # every frame would be enlarged to it
        ("merge_size", 10**9),
        ("min_pixels", 2**30),
        ("merge_size", "2"),
        ("temporal_patch_size", -2),
        ("min_pixels", math.nan),
        ("max_pixels", 1e6),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5, math.nan, 0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", 0.5),
        ("size", 448),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_value_of_the_image_settings_that_none_can_have_is_named(folder, field, value, nested):
    file = folder / "preprocessor_config.json"
    put(file, field, value)
    if nested:
        raw = json.loads(file.read_text())
        file = folder / "processor_config.json"
        file.write_text(json.dumps({"image_processor": raw}))
    refused(f"{file}: {field} .*: must be", images, folder)


GARBLED = {
    "empty": b"",
    "zeros": bytes(4096),
    "20,000 lists": b"[" * 20_000 + b"]" * 20_000,
    "20,000 objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "latin": '{"model_type": "é"}'.encode("latin-1"),
    "a key twice": b'{"model_type": "qwen2_5_vl", "model_type": "llama"}',
    "a list": b"[]",
    "pairs": b'[["model_type", "qwen2_5_vl"]]',
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", INDEX, "preprocessor_config.json",
        "processor_config.json", "tokenizer_config.json", "added_tokens.json",
        "special_tokens_map.json", "tokenizer.json",
    ],
)  # fmt: skip
def test_a_garbled_file_is_named(folder, name):
    def load() -> None:
        images(folder), load_tokenizer(folder), load_model(folder)

    load()
    if name == INDEX:
        (folder / WHOLE).unlink()
    for content in GARBLED.values():
        (folder / name).write_bytes(content)
        by_library = f"{folder}: its tokenizer cannot be read"
        refused(by_library if name == "tokenizer.json" else f"{folder / name}: cannot be", load)


@pytest.mark.parametrize("ids", ["2", {"a": 2}, [2, "0"], [-1], 1.5, [[2]]])
def test_end_of_sequence_ids_are_checked_in_both_files(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    refused("generation_config.json: eos_token_ids .*: must be a list", load_config, folder)


def test_settings_that_are_not_there_have_transformers_defaults(tmp_path):
    """A preprocessor's file that names some of them; a text_config whose token ids are null."""
    (tmp_path / "preprocessor_config.json").write_text('{"max_pixels": 500000}')
    assert ImageConfig.from_folder(tmp_path) == ImageConfig(max_pixels=500_000)
    raw = json.loads((ASSETS / "qwen2.5-vl-7b/config.json").read_text())
    inner = {"image_token_id": None, "video_token_id": None}
    assert ModelConfig.from_dict(raw | {"text_config": inner}) == ModelConfig.from_dict(raw)
