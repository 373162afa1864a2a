"""What a CPU cannot run: kernels as a card compiles them, its attentions, CUDA graphs, a training
step on it. `make test-gpu` runs these; they need neither video decoders nor tyro."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import attention, elementwise
from kernels.paged_attention import gathered_attention, paged_attention
from nanosport.bench import kernels as bench
from nanosport.bench.theirs import Work, fill
from nanosport.bench.train import NANO
from nanosport.engine.own import OwnSampler
from nanosport.engine.pages import PAGE
from nanosport.engine.sampler import Piece, Sampling
from nanosport.engine.step import Step
from nanosport.files import ASSETS
from nanosport.model.decoder import VLModel
from nanosport.model.folder import load_config, load_tokenizer
from nanosport.plan.synthetic import bare_actors, bare_training, take_step
from nanosport.train import checkpoint, dist
from tests.helpers.runs import ROOT
from tests.test_elementwise import CASES, error, gradients

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU that this run may use: make test-gpu"
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FOLDER = ASSETS / "nano-sft"
FAMILIES = pytest.mark.parametrize("family", ["nano-sft", "nano-backbone-qwen3-vl"])
HEADS = {"7B": (28, 4, 128), "3B": (16, 2, 128), "tower": (16, 16, 80)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strided", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("case", CASES)
def test_fused_kernels_are_as_good_as_torch(case, strided, dtype, monkeypatch):
    op, make = CASES[case]
    torch.manual_seed(0)
    with CUDA:  # made there: a copy would have no gaps
        x = make(333, dtype, strided)
    want = gradients(op, {name: value.double() for name, value in x.items()})
    mine = gradients(op, x)
    monkeypatch.setattr(elementwise, "is_fused", lambda x: False)
    usual = gradients(op, x)
    for name, gold in want.items():
        found, torchs = error(mine[name], gold), error(usual[name], gold)
        assert found <= 2 * torchs + 4 * torch.finfo(torch.float32).eps, (name, found, torchs)


def test_the_losss_kernel_is_as_good_as_torch():
    assert bench.check()  # raises where it is not


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_rows", [1, 12, 160])
def test_the_decoding_kernel_says_what_its_reference_does(num_rows, dtype, most):
    """With 160 rows of a 7B none is split."""
    generator = torch.Generator().manual_seed(0)
    length_R = torch.randint(1, 700, (num_rows,), generator=generator).int()
    table_RW = torch.randperm(11 * num_rows, generator=generator).view(num_rows, 11).int() + 1
    H, K, d = HEADS["7B"]
    shapes = (num_rows, H, d), *[(11 * num_rows + 1, K, PAGE, d)] * 2
    drawn = [torch.randn(*shape, generator=generator).to(CUDA, dtype) for shape in shapes]
    where = table_RW.to(CUDA), length_R.to(CUDA)
    out = paged_attention(*drawn, *where)
    exact = gathered_attention(*(x.float() for x in drawn), *where)
    assert (out - exact).norm() < most * exact.norm()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", attention.FLASH)
def test_each_attention_that_is_installed_is_right(name, heads):
    how = HEADS[heads], heads != "tower", torch.bfloat16, CUDA
    try:
        right = attention.is_right(attention.FLASH[name], *how)
    except Exception as error:  # not installed, or it says itself that it is not made for this
        pytest.skip(f"{name}: {error!r}"[:200])
    assert right


def trainer(device, work, dtype, recompute="none", family="nano-sft"):
    """A training of a nano model with weights that depend on their names."""
    models = [VLModel(load_config(ASSETS / family)) for _ in range(2)]
    for model in models:
        fill({name: weight.cpu() for name, weight in model.named_parameters()})
    run = replace(work.run, recompute=recompute)
    training = bare_training(run, models[0].to(device), work.episodes[0], device, dtype)
    actors = None
    if work.is_policy:
        reference = models[1].to(device, dtype).requires_grad_(False)
        actors = bare_actors(training, reference)
    return training, actors


def gradients_of(device, work, dtype, family, recompute="none") -> tuple[float, dict]:
    training, actors = trainer(device, work, dtype, recompute, family)
    training.update = lambda *_: None
    training.stage.new_step(0)
    loss = take_step(training, actors, work.episodes)
    named = training.model.named_parameters()
    return loss, {name: w.grad.cpu().double() for name, w in named if w.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "mlp", "all", "auto"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("size", [1, 4], ids=["SFT", "policy"])
@FAMILIES
def test_a_steps_gradients_are_the_cpus(family, size, dtype, most, recompute):
    """In float32 but for the order of sums, in bfloat16 but for its rounding."""
    torch.set_float32_matmul_precision("highest")
    work = Work.of(load_config(ASSETS / family), NANO, 8 // size, size, micro_tokens=600)
    loss, wanted = gradients_of(CPU, work, torch.float32, family)
    found, got = gradients_of(CUDA, work, dtype, family, recompute)
    assert found == pytest.approx(loss, rel=most, abs=most)
    assert got.keys() == wanted.keys()
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        if grad.norm() > 1e-4 * largest:  # the keys' biases have none
            assert (got[name] - grad).norm() < most * grad.norm(), name


def test_a_run_on_the_card_goes_on_from_its_checkpoint(tmp_path):
    """With its fused Adam, whose steps are counted on the card. What comes next may differ by the
    order in which a card adds up."""
    work = Work.of(load_config(FOLDER), NANO, 8, 1, micro_tokens=600, lr=1e-3)
    training, _ = trainer(CUDA, work, torch.bfloat16)
    training.stage.new_step(0)
    take_step(training, None, work.episodes)
    how = {"dtype": torch.bfloat16, "keep": 1}
    checkpoints = checkpoint.Checkpoints(tmp_path, FOLDER, 0, **how)
    checkpoints.save(training.model, training.optimizer, {"step": 1, "settings": {}})
    checkpoints.finish()
    other, _ = trainer(CUDA, work, torch.bfloat16)
    folder, state = checkpoint.newest(tmp_path)
    checkpoint.load(folder, other.model, other.optimizer)
    assert state["step"] == 1
    for mine, its in zip(training.model.parameters(), other.model.parameters()):
        assert torch.equal(mine, its)
        for key, value in training.optimizer.state[mine].items():
            assert torch.equal(value, other.optimizer.state[its][key])
            assert value.device == other.optimizer.state[its][key].device


def test_one_process_on_one_gpu_is_no_group():
    _, world, device = dist.start()
    assert (world, device.type, torch.distributed.is_initialized()) == (1, "cuda", False)


def test_the_memory_of_a_run_grows_without_gaps():
    """In a process of its own, since the allocator of this one is at work already."""
    script = (
        "import torch\nfrom nanosport.train import dist\n"
        "_, _, device = dist.start()\ndist.expand_segments(device)\n"
        "block = torch.ones(2**25, device=device)\n"
        "assert all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot())\n"
    )
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_more_processes_than_gpus_end_in_one_clear_line(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "from nanosport.cli import ending\nfrom nanosport.train import dist\nending(dist.start)\n"
    )
    count = str(torch.cuda.device_count() + 1)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        count,
        str(script),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"--nproc-per-node {count}: GPUs here: {int(count) - 1}" in done.stderr
    assert "nanosport/train/dist.py" not in done.stderr, "a traceback of ours"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAMILIES
def test_a_graph_says_what_its_step_says(family, dtype, monkeypatch):
    """Twice over, since a sampler that slept captures anew; in float32 also what a CPU says."""
    tokenizer = load_tokenizer(ASSETS / family)
    torch.manual_seed(0)
    model = VLModel(load_config(ASSETS / family)).init_weights(0.1).requires_grad_(False)
    twin = VLModel(model.cfg)
    twin.load_state_dict(model.state_dict())
    twin = twin.to(CUDA, dtype).requires_grad_(False)

    def say(where: VLModel) -> list[tuple]:
        sampler = OwnSampler(where, tokenizer, Sampling())
        said = []
        for k, top_p in enumerate((1.0, 0.9)):
            sampler.sampling = Sampling(0.8, top_p, 20)
            for group in range(3):
                prompt = Piece(list(range(20 + group, 120 + 30 * group)))
                sampler.open(prompt, [np.random.default_rng([k, group, m]) for m in range(4)])
            for number, turn in sampler.turns():
                said.append((number, turn.ids))
                sampler.close(number)
            assert sampler.pages.num_used == 0
            sampler.sleep()
        return sorted(said)

    with_graphs = say(twin)
    with monkeypatch.context() as patch:
        patch.setattr(Step, "capture", lambda step: step.run)
        assert say(twin) == with_graphs
    if dtype == torch.float32:
        same = sum(a == b for a, b in zip(say(model), with_graphs))
        assert same >= len(with_graphs) - 1  # a draw may fall between two roundings
