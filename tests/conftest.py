"""One thread: on tiny tensors several threads on few cores wait for each other more than they
compute. Triton interprets: the tests run on the CPU, and it must know before torch imports it."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data_prep import arena, pretrain, teacher
from nanosport.model.decoder import VLModel
from nanosport.model.folder import load_config, save_model
from nanosport.records import read_questions

torch.set_num_threads(1)


@pytest.fixture
def rounding(monkeypatch):
    """The interpreter cuts float32 off where it makes bfloat16 of it; a card rounds to nearest."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def random_nano(tmp_path_factory, family: str) -> Path:
    source = tmp_path_factory.mktemp("source")
    pretrain.build_tokenizer(source)
    pretrain.write_config(source, family)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nano") / "model"
    save_model(VLModel(load_config(source)).init_weights(), folder, source)
    return folder


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory) -> Path:
    """A model folder of the nano size with random weights."""
    return random_nano(tmp_path_factory, "qwen2_5_vl")


@pytest.fixture(scope="session")
def nano_qwen3_folder(tmp_path_factory) -> Path:
    """Its like of the Qwen3-VL family."""
    return random_nano(tmp_path_factory, "qwen3_vl")


@pytest.fixture(scope="session")
def arena_folder(tmp_path_factory) -> Path:
    """Two clips in each split, six questions a clip, and the teacher's trajectories."""
    folder = tmp_path_factory.mktemp("arena")
    arena.main(arena.Config(out=folder, sft_clips=2, rl_clips=2, test_clips=2, workers=1))
    teacher.main(teacher.Config(data=folder))
    return folder


@pytest.fixture(scope="session")
def taught_folder(nano_folder, arena_folder, tmp_path_factory) -> Path:
    """The random model after a short SFT: it sees nothing, but mostly holds the format, and calls
    the tool now and then."""
    folder = tmp_path_factory.mktemp("taught")
    lines = []
    for k, question in enumerate(read_questions(arena_folder / "sft.jsonl")):
        question = asdict(question) | {"video": str(Path(question.video).absolute())}
        messages = [teacher.answer_turn("i see.", "ABC"[k % 3])]
        if k % 2:
            messages.insert(0, teacher.tool_turn("i look.", 10 * (k // 2), 10 * (k // 2) + 20))
        lines.append(json.dumps({"question": question, "messages": messages}))
    (folder / "trajectories.jsonl").write_text("\n".join(lines) + "\n")
    cfg = train.Config(
        str(nano_folder),
        folder / "trajectories.jsonl",
        folder,
        steps=110,
        batch_size=4,
        lr=5e-3,
        warmup=5,
    )
    train.main(cfg)
    return folder / "model"
