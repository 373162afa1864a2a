"""The training benchmark on a CPU: what it compares is one computation, and a shared prefix
pays."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanosport.bench import train as bench
from nanosport.bench.device import kind_of
from nanosport.bench.theirs import Theirs, Work, family_of
from nanosport.bench.train import NANO, Ours
from nanosport.model.cost import causal_pairs, head_flops, text_flops
from nanosport.model.folder import load_config
from nanosport.plan.synthetic import Lengths

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("policy", [False, True], ids=["SFT step", "policy update"])
@pytest.mark.parametrize("folder", ["nano_folder", "nano_qwen3_folder"])
def test_ours_and_transformers_compute_one_loss(folder, policy, request):
    cfg = load_config(request.getfixturevalue(folder))
    members = 8 if policy else 1
    works = [
        Work.of(cfg, NANO, 8 // members, members, micro_tokens=600, share_prefix=share)
        for share in (True, False)
    ]
    ours, theirs = (kind(cfg, works[0], torch.float32) for kind in (Ours, Theirs))
    losses, grads = [], []
    for trainer, model, work in (
        (ours, ours.training.model, works[0]),
        (ours, ours.training.model, works[1]),
        (theirs, theirs.model, works[0]),
    ):
        # the gradients as the optimizer sees them: they are gone when the step has ended
        seen, optimizer = {}, getattr(trainer, "training", trainer).optimizer
        hook = optimizer.register_step_pre_hook(
            lambda *_, model=model, seen=seen: seen.update(
                {
                    name.removeprefix("model."): weight.grad.clone()
                    for name, weight in model.named_parameters()
                    if weight.grad is not None
                }
            )
        )
        losses.append(trainer.step(work))
        grads.append(seen)
        hook.remove()
    grads = [grads[1], grads[2]]
    assert losses == pytest.approx([losses[-1]] * 3, rel=1e-4, abs=1e-6)
    # on policy the loss is 0 whatever the computation: its gradients tell
    assert len(grads[0]) == len(grads[1]) > 40
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=2e-3, atol=2e-5, msg=name)


def test_a_shared_prefix_pays_at_the_papers_ratio(nano_folder):
    """Forward, loss and backward pass of one group of 8, on one thread. Width and lengths are the
    7B's and the paper's ÷ 14: on whole lengths attention is most of so narrow a model's operations,
    and of attention sharing saves less (next test); in the nano shape itself, ÷ 28, the time that
    Python takes for each operation hides a part of it."""
    nano, seven = load_config(nano_folder), load_config(ROOT / "assets/qwen2.5-vl-7b")
    width = seven.hidden_size // 14
    sizes = {"hidden_size": width, "intermediate_size": seven.intermediate_size // 14}
    vision = replace(nano.vision, out_hidden_size=width)
    cfg = replace(nano, **sizes, num_hidden_layers=2, mrope_section=(8, 12, 12), vision=vision)
    tokens = ("frame_tokens", "label", "prompt_text", "turn_text", "result_text")
    lengths = replace(NANO, **{name: 2 * getattr(NANO, name) for name in tokens})
    papers = Lengths().prompt / Lengths().response
    assert lengths.prompt / lengths.response == pytest.approx(papers, rel=0.02)
    assert ceiling(cfg, lengths) == pytest.approx(ceiling(seven, Lengths()), rel=0.05)
    works = {share: Work.of(cfg, lengths, 1, 8, share_prefix=share) for share in (True, False)}
    ours = Ours(cfg, works[True], torch.float32)
    gains, seconds = [], {}
    for _ in range(7):
        for share, work in works.items():
            ours.step(work)
            seconds[share] = ours.seconds["train"]
        # of neighbours in time, which other work on the machine slows alike
        gains.append(seconds[False] / seconds[True])
    assert statistics.median(gains) >= 1.6, gains


def ceiling(cfg, lengths) -> float:
    """Operations of a group of 8 without sharing ÷ with it."""
    length, prompt = lengths.prompt + lengths.response, lengths.prompt
    head = head_flops(cfg, 8 * lengths.trained)
    plain = text_flops(cfg, 8 * length, causal_pairs([length] * 8))
    return (plain + head) / (
        text_flops(cfg, prompt + 8 * lengths.response, causal_pairs([length] * 8, prompt)) + head
    )


@pytest.mark.parametrize("name", bench.SHAPES)
def test_each_shape_has_its_cases(name):
    cfg, label, timed = bench.shape(name, None)
    assert label == name and len(timed) == 5
    assert family_of(cfg) == ("qwen3_vl" if "qwen3" in bench.SHAPES[name] else "qwen2_5_vl")


def test_what_sharing_can_save_is_a_matter_of_width(nano_folder):
    nano = load_config(nano_folder)
    three, seven = (load_config(ROOT / f"assets/qwen2.5-vl-{size}") for size in ("3b", "7b"))
    assert ceiling(seven, Lengths()) > 1.75 and ceiling(three, Lengths()) > 1.65
    assert ceiling(nano, NANO) == pytest.approx(ceiling(seven, Lengths()), rel=0.05)
    assert ceiling(nano, Lengths()) < 1.5


def test_it_runs_without_a_gpu_and_says_so(tmp_path):
    """Where neither video decoders nor tyro are installed, as on a bare GPU machine."""
    code = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("av", "torchcodec", "tyro"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
sys.argv[1:] = ["--out", sys.argv[1], "--repeats", "1", "--shapes", "nano"]
runpy.run_module("nanosport.bench.train", run_name="__main__")
"""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No GPU" in done.stdout
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert (
        report["gpu"] is False
        and "no GPU measured" in report["note"]
        and report["torch"] == torch.__version__
    )
    assert {(r["op"], r["impl"]) for r in report["rows"]} >= {
        (op, i)
        for op in ("SFT step", "policy update")
        for i in ("nanosport", "transformers, padded")
    }
    for row in report["rows"]:
        assert row["tokens_per_s"] > 0 and row["seconds"]["step"] > 0
        assert row["unshared_tflops"] >= row["tflops"] > 0
        products, spent = row["device_ms"]["products"], sum(row["device_ms"].values())
        assert 0.1 * spent < products < spent and row["device_ms"]["other"] < 0.4 * spent
        if "planned_gib" in row:
            assert row["planned_gib"] == pytest.approx(row["peak_gib"], rel=0.15)
    ours = [row for row in report["rows"] if row["impl"] == "nanosport"]
    assert sum("planned_gib" in row for row in ours) == 3


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("row_kernel", "loss"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
         "Adam, gradient norm"),
        ("Memcpy DtoD (Device -> Device)", "copies, casts, fills"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
         "elementwise"),
        ("something else", "other"),
    ],
)  # fmt: skip
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


def test_the_engines_benchmark_runs_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "nanosport.bench.engine", "--repeats", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert (report["gpu"], report["shape"]) == (False, "nano-sft")
    assert [row["rows"] for row in report["steps"]] == [1, 8]
    assert all(row["ms_a_step"] > 0 and len(row["all"]) == 1 for row in report["steps"])
    played = report["episodes"]
    assert played["episodes"] == 8 and played["tokens_said"] > 8 * 8
    assert 0 < played["seconds_video"] < played["seconds_read"] < played["seconds"]
    turns = report["beside_generate"]
    assert turns["times_faster"] > 0 and set(turns["seconds"]) == {"nanosport", "generate"}
