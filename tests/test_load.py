"""Model folders: transformers loads ours, we load theirs, and what is broken is refused in one
line."""

import ast
import copy
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nanosport.model.decoder import VLModel
from nanosport.model.folder import (
    ASSETS,
    aside,
    load_config,
    load_model,
    load_tokenizer,
    own_name,
    read_config,
    resolve,
    save_model,
)
from tests.helpers.families import FAMILIES

ROOT = Path(__file__).parents[1]
REAL = Path(__file__).parents[2] / "shared" / "data" / "qwen"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"the published Qwen files are not at {REAL}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
TOOL = ["<tool_call>", "</tool_call>"]


def tiny_config(tied=True, family="qwen2_5_vl") -> dict:
    """In the published layout: flat, or of Qwen3-VL nested."""
    vision = {
        "model_type": family, "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    ids = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}  # fmt: skip
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
        more = {"model_type": "qwen3_vl_text", "head_dim": 16, "rope_scaling": rope}
        text = {"text_config": text | more | {"dtype": "float32"}}
        vision |= {"in_channels": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        vision |= {"hidden_act": "gelu_pytorch_tanh"}
    else:
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        text |= {"torch_dtype": "float32"}
        vision |= {"in_chans": 3, "window_size": 112, "fullatt_block_indexes": [1]}
        vision |= {"hidden_act": "silu"}
    architecture = {"model_type": family, "architectures": [FAMILIES[family].model.__name__]}
    return architecture | text | ids | {"tie_word_embeddings": tied, "vision_config": vision}


def tiny_tokenizer(tokens=(*SPECIAL, "<|video_pad|>", *TOOL), vocab_start=0) -> Tokenizer:
    """Byte level, each digit a token of its own: a splitting rule that is not Qwen2Tokenizer's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*tokens, *letters, "12"), start=vocab_start)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if t not in TOOL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens if t in TOOL])
    return tokenizer


def write_source(
    folder: Path, tied=True, tokenizer: Tokenizer | None = None, family="qwen2_5_vl"
) -> Path:
    """A model folder but for the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(tied, family)))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 0], "do_sample": True})
    )
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tiny_model(source: Path) -> VLModel:
    torch.manual_seed(0)
    return VLModel(load_config(source)).init_weights(0.3)


def logits(model, ids):
    positions_3T = torch.arange(len(ids)).expand(3, -1)
    hidden_TD = model.hidden(
        torch.tensor(ids), positions_3T, torch.tensor([0, len(ids)], dtype=torch.int32)
    )
    return hidden_TD @ model.head_weight_VD.T


def same_weights(a: VLModel, b: VLModel) -> bool:
    return all(torch.equal(w, b.state_dict()[name]) for name, w in a.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5e9, 60e3])
def test_transformers_loads_what_we_save(tmp_path, tied, shard_bytes, family):
    source = write_source(tmp_path / "source", tied, tiny_tokenizer(), family)
    ours = tiny_model(source)
    save_model(ours, tmp_path / "saved", source, max_shard_bytes=shard_bytes)
    num_files = len(list((tmp_path / "saved").glob("*.safetensors")))
    assert (num_files == 1) == (shard_bytes == 5e9)

    theirs, info = FAMILIES[family].model.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = [7, 8, 9, 10, 11]
    expected = theirs(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-4, atol=1e-4)
    assert same_weights(ours, load_model(tmp_path / "saved"))
    assert load_config(tmp_path / "saved") == ours.cfg
    assert load_tokenizer(tmp_path / "saved").encode("frame 12:") == load_tokenizer(source).encode(
        "frame 12:"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_we_load_what_transformers_saves(tmp_path, tied, shard_size, family):
    torch.manual_seed(0)
    its, raw = FAMILIES[family], tiny_config(tied, family)
    theirs = its.model(its.config(**copy.deepcopy(raw)))
    theirs.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) == 1) == (shard_size == "5GB")
    ours = load_model(tmp_path / "saved")
    ids = [7, 8, 9, 10, 11]
    expected = theirs(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-4, atol=1e-5)
    # the nested layout of transformers 5 and the published flat one say the same
    assert "text_config" in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert ours.cfg == read_config(raw)


def test_module_path_names_and_a_repeated_head_load_too(tmp_path):
    source = write_source(tmp_path / "source")
    ours = tiny_model(source)
    state = {
        name.replace("model.", "model.language_model.").replace(
            "visual.", "model.visual."
        ): weight.clone()
        for name, weight in ours.state_dict().items()
    }
    state["lm_head.weight"] = ours.head_weight_VD.detach().clone()
    save_file(state, source / "model.safetensors")
    assert same_weights(ours, load_model(source))


def test_saving_in_bfloat16_says_so_in_the_config(tmp_path):
    source = write_source(tmp_path / "source")
    ours = tiny_model(source)
    save_model(ours, tmp_path / "saved", source, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(
        w.dtype == torch.bfloat16
        for w in load_file(tmp_path / "saved" / "model.safetensors").values()
    )
    assert (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved").dtype
        == torch.bfloat16
    )
    assert same_weights(ours.bfloat16(), load_model(tmp_path / "saved", dtype=torch.bfloat16))


@needs_real
@pytest.mark.parametrize("size", ["3B", "7B"])
def test_names_and_sizes_are_the_published_ones(size):
    folder = REAL / f"Qwen2.5-VL-{size}-Instruct"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        model = VLModel(load_config(folder))
    assert model.state_dict().keys() == index["weight_map"].keys()
    assert (
        sum(2 * w.numel() for w in model.state_dict().values()) == index["metadata"]["total_size"]
    )
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    shapes = {own_name(name): weight.shape for name, weight in theirs.named_parameters()}
    assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
    assert load_config(folder).eos_token_ids == (151645, 151643)


def test_names_and_shapes_of_8b_are_those_of_its_config():
    """transformers' own names are those of the published index file: it has no map for them."""
    folder = ASSETS / "qwen3-vl-8b"
    with torch.device("meta"):
        model = VLModel(load_config(folder))
        its = FAMILIES["qwen3_vl"]
        theirs = its.model(its.config.from_pretrained(folder))
    shapes = {name: weight.shape for name, weight in theirs.named_parameters()}
    published, named = model.cfg.published_name, dict(model.named_parameters())
    assert {published(name): weight.shape for name, weight in named.items()} == shapes
    assert {own_name(published(name)) for name in named} == named.keys()
    assert sum(2 * weight.numel() for weight in named.values()) == 17_534_247_392


@pytest.mark.parametrize(
    "section, change, match",
    [
        ("text_config", {"attention_bias": True}, "attention_bias True: this code has only False"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False}}, "mrope_interleaved False"),
        ("text_config", {"rope_scaling": {"mrope_section": [1, 1, 6]}}, "in every third of 8"),
        ("text_config", {"head_dim": 18}, "mrope_section .* must sum to 18/2"),
        ("text_config", {"head_dim": None}, "'head_dim' is missing"),
        ("vision_config", {"deepstack_visual_indexes": [2]}, "must rise, and be below 2"),
        ("vision_config", {"deepstack_visual_indexes": [1, 0]}, "must rise, and be below 2"),
        ("vision_config", {"num_position_embeddings": 15}, "15: must be a square"),
        ("vision_config", {"hidden_act": "silu"}, "vision_config: hidden_act 'silu'"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size: must be hidden_size"),
    ],
)
def test_what_no_qwen3_vl_can_be_is_said(section, change, match):
    raw = tiny_config(family="qwen3_vl")
    changed = {name: value for name, value in (raw[section] | change).items() if value is not None}
    read_config(raw)
    with pytest.raises(ValueError, match=f"config.json: .*{match}"):
        read_config(raw | {section: changed})


def test_broken_folders_are_refused_by_name(tmp_path):
    source = write_source(tmp_path / "source")
    model = tiny_model(source)
    save_model(model, tmp_path / "good", source, max_shard_bytes=60e3)
    state = {n: w.clone() for n, w in model.state_dict().items()}

    def refuses(match, change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        save_model(model, folder, source)
        change(folder)
        with pytest.raises(ValueError, match=match) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)

    def weights(**changes):
        changed = {n: w for n, w in (state | changes).items() if w is not None}
        return lambda folder: save_file(changed, folder / "model.safetensors")

    refuses("weights missing: model.norm.weight$", weights(**{"model.norm.weight": None}))
    refuses("no place for: model.extra", weights(**{"model.extra": torch.ones(1)}))
    refuses("another shape .* model.norm.weight$", weights(**{"model.norm.weight": torch.ones(3)}))
    refuses("model.safetensors is missing", lambda folder: (folder / "model.safetensors").unlink())
    refuses(
        "not a whole safetensors file",
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
    )
    refuses(
        "cannot be read as a JSON object", lambda folder: (folder / "config.json").write_text("{")
    )
    for match, config in (
        (
            "model_type 'llama': this code has only 'qwen2_5_vl' and 'qwen3_vl'",
            {"model_type": "llama"},
        ),
        ("vision_config: 'depth' is missing", {"model_type": "qwen2_5_vl"}),
    ):
        refuses(
            match,
            lambda folder, config=config: (folder / "config.json").write_text(json.dumps(config)),
        )
    next((tmp_path / "good").glob("model-00001-*")).unlink()
    with pytest.raises(ValueError, match="model-00001-of-.* is missing"):
        load_model(tmp_path / "good")


def test_resolve_finds_folders_and_names_what_it_cannot_find(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source")
    assert resolve(str(source)) == source
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a model folder"):
        resolve(str(tmp_path / "empty"))
    for missing in (str(tmp_path / "nowhere"), "./nowhere/model", "nowhere"):
        with pytest.raises(ValueError, match="no such folder$"):
            resolve(missing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no such folder, and the hub did not give it") as caught:
        resolve("nanosport-nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_an_older_model_is_replaced_and_nothing_else(tmp_path):
    source = write_source(tmp_path / "source")
    model, place = tiny_model(source), tmp_path / "saved"
    save_model(model, place, source, max_shard_bytes=60e3)
    save_model(model.init_weights(0.1), place, source)
    assert sorted(p.name for p in place.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert same_weights(model, load_model(place))
    save_model(model, place, source=place)  # its own source
    assert same_weights(model, load_model(place))

    (place / "checkpoints").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    for precious in (place, tmp_path / "notes"):
        with pytest.raises(ValueError, match="holds other things than a model"):
            save_model(model, precious, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes",
        "saved",
        "source",
    ]  # no temporary folder stays


def test_a_save_that_is_killed_between_its_renames_leaves_the_old_model(tmp_path):
    source = write_source(tmp_path / "source")
    old, place = tiny_model(source), tmp_path / "saved"
    save_model(old, place, source)
    place.rename(aside(place))
    assert same_weights(old, load_model(resolve(str(place))))
    new = tiny_model(source).init_weights(0.1)
    save_model(new, place, source)
    assert same_weights(new, load_model(resolve(str(place)))) and not same_weights(new, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "source"]


def test_a_save_that_fails_leaves_the_old_model(tmp_path):
    source = write_source(tmp_path / "source")
    model, place = tiny_model(source), tmp_path / "saved"
    save_model(model, place, source)
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, hard)
    )  # what a full disk does: the write fails midway
    try:
        with pytest.raises(ValueError, match="could not be saved") as caught:
            save_model(model, place, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "source"]
    with pytest.raises(ValueError, match="could not be saved"):  # a file where a folder should be
        save_model(model, source / "config.json" / "model", source)


def test_saving_under_another_models_config_is_refused(tmp_path):
    model = tiny_model(write_source(tmp_path / "tied"))
    with pytest.raises(ValueError, match="describes another model"):
        save_model(model, tmp_path / "saved", write_source(tmp_path / "untied", tied=False))


def test_the_tokenizer_is_taken_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer()
    loaded = load_tokenizer(write_source(tmp_path / "source", tokenizer=tokenizer))
    text = "<|im_start|>user\nframe 1212: <|image_pad|> it's 12-12\n<tool_call>{}</tool_call><|im_end|>"
    ids = tokenizer.encode(text).ids
    assert loaded.encode(text) == ids
    assert tokenizer.token_to_id("12") not in ids  # its own splitting rule was obeyed
    assert loaded.decode(ids) == text
    assert loaded.eos_token == "<|im_end|>"


def test_no_or_the_wrong_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(write_source(tmp_path / "none"))
    (write_source(tmp_path / "garbled", tokenizer=tiny_tokenizer()) / "tokenizer.json").write_text(
        '{"version"'
    )
    with pytest.raises(ValueError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path / "garbled")
    wrong = {
        "must be one token each": tiny_tokenizer((*SPECIAL, "<|video_pad|>")),
        r"<\|image_pad\|> is 6, in config.json 5": tiny_tokenizer(
            (*SPECIAL[:5], "<|video_pad|>", SPECIAL[5], *TOOL)
        ),
        r"<\|image_pad\|> is 15": tiny_tokenizer(vocab_start=10),
        "it has id 3": tiny_tokenizer(
            (*SPECIAL, "<|video_pad|>", *TOOL, *(f"<|{i}|>" for i in range(60)))
        ),
    }
    for i, (match, tokenizer) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=match) as caught:
            load_tokenizer(write_source(tmp_path / str(i), tokenizer=tokenizer))
        assert "\n" not in str(caught.value)


@needs_real
def test_the_published_tokenizer_loads(tmp_path):
    tokenizer = load_tokenizer(REAL / "Qwen2.5-VL-7B-Instruct")
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|im_start|><tool_call>") == [151644, 151657]
    assert tokenizer.encode("frame 12:") == [6763, 220, 16, 17, 25]  # Qwen's rule: each digit alone
    tokenizer.save_pretrained(tmp_path)  # as tokenizer.json, which the published folder has as well
    shutil.copyfile(REAL / "Qwen2.5-VL-7B-Instruct" / "config.json", tmp_path / "config.json")
    text = "<|im_start|>user\nFrame 1205: <|image_pad|> Who's in? Çà et là, 北京\n\n  <tool_call>{}</tool_call><|im_end|>"
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(REAL / "Qwen2.5-VL-3B-Instruct")  # carries none here


def test_kernels_is_ours_and_never_imports_transformers():
    for path in (ROOT / "kernels").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", "") or ""]
            )
            assert not any(name.split(".")[0] == "transformers" for name in imported), path
    ours, theirs = (
        "import kernels.attention",
        "from transformers import Qwen2_5_VLForConditionalGeneration",
    )
    for lines in (
        (ours, "import sys; assert 'transformers' not in sys.modules", theirs),
        (theirs, ours),
    ):
        program = "; ".join((*lines, "print(kernels.__file__)"))
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download takes: a model's list of files, and each
    file."""

    folder, commit = ROOT / "assets" / "nano-sft", "0123456789abcdef0123456789abcdef01234567"
    revisions = {"main": commit, "v1.0": "89abcdef" * 5}
    asked: list[str] = []

    def do_GET(self, body=True):
        self.asked.append(self.path)
        names = [(p.name, p.stat().st_size) for p in self.folder.iterdir()] + [("harm.bin", 1)]
        revision = self.path.partition("/revision/")[2].partition("?")[0]
        commits = [commit for commit in self.revisions.values() if commit in self.path]
        commit = self.revisions.get(revision, [*commits, None][0])
        if self.path.startswith("/api/models/owner/nano/revision/") and commit:
            content = json.dumps(
                {
                    "id": "owner/nano",
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name, _ in names],
                }
            ).encode()
        elif self.path.startswith(f"/api/models/owner/nano/tree/{commit}"):
            content = json.dumps(
                [
                    {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                    for name, size in names
                ]
            ).encode()
        elif self.path.startswith(f"/owner/nano/resolve/{commit}/"):
            content = (self.folder / self.path.rpartition("/")[2]).read_bytes()
        else:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *_):
        pass


def test_a_hub_id_is_downloaded_once(tmp_path):
    """By huggingface_hub, from a server on loopback that speaks the hub's protocol."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from nanosport.model.folder import load_model, load_tokenizer, resolve\n"
    code += (
        "folder = resolve('owner/nano'); load_model(folder); load_tokenizer(folder); print(folder)"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
    }
    env |= {"HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1500:]
        folder = Path(done.stdout.strip())
        fetched, wanted = ((f / "model.safetensors").read_bytes() for f in (folder, Hub.folder))
        assert folder.is_relative_to(tmp_path) and fetched == wanted
        assert folder.name == Hub.commit
    fetched = [p for p in Hub.asked if p.endswith("/model.safetensors")]
    # a look at its size, then the file; nothing the second time
    assert 1 <= len(fetched) <= 2 and not (folder / "harm.bin").exists()
    for model, name in (("owner/nano@v1.0", "89abcdef" * 5), ("owner/nano@no-such", None)):
        code = f"from nanosport.model.folder import resolve; print(resolve({model!r}))"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == (0 if name else 1)
        if name:
            assert Path(done.stdout.strip()).name == name
        else:
            refused = "ValueError: model owner/nano@no-such: no such folder, and the hub did not"
            assert done.stderr.splitlines()[-1].startswith(refused)
    server.shutdown()
    server.server_close()
