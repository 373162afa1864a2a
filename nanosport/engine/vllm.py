"""vLLM as a sampler: an engine in this process, behind the same seam as our own.

A conversation enters as ids, with one placeholder for each row of features of our own encoder; vLLM
sees no picture, and its tower is not loaded, or stands idle. Ids that are expanded already, with
pictures beside them, are what vLLM would take without an error and get wrong: here there is no way
to say that. Turns are handed on as they end. New weights come in place, one after the other.

Tested with the release that requirements-vllm.txt pins: names of vLLM's that begin with _ move.
Letters: N vision tokens, D hidden.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanosport.engine.sampler import Generated, Piece, Sampling
from nanosport.model.decoder import ModelConfig
from nanosport.model.folder import check_whole_model, load_config

GPU_SHARE = 0.6
"""vLLM takes this share of the GPU memory that is left when it starts."""
CPU_CACHE_BYTES = 1 << 30


class Frame(NamedTuple):
    """One frame of a conversation."""

    start: int
    """Its first token."""
    grid: tuple[int, int, int]
    features_ND: torch.Tensor
    name: str
    """A digest of the features: equal frames are cached once."""


class Answer(NamedTuple):
    """What vLLM has said."""

    ids: Sequence[int]
    sampled_logp: Sequence[float]
    finish: str
    """`stop` or `length`."""
    stop_text: str | None
    """The text that ended it; None where a token has, or the length."""
    version: int


class Talk:
    """A conversation: all its ids, its frames, and the turn that is being said.

    After a stop text the model has one token more, for the end of its turn: that is asked for by
    itself. So a turn takes one request, or two.
    """

    def __init__(self, stream: np.random.Generator, sampling: Sampling):
        self.stream, self.sampling = stream, sampling
        self.ids: list[int] = []
        self.frames: list[Frame] = []
        self.said: list[int] = []
        self.sampled_logp: list[float] = []
        self.closed = False
        """Whether a stop text has been said."""

    def add(self, ids: Sequence[int], frames: Sequence[Frame]) -> None:
        """Go on with a piece's ids, and its frames."""
        self.frames += [frame._replace(start=len(self.ids) + frame.start) for frame in frames]
        self.ids += ids

    def params(self) -> dict:
        """What vLLM's SamplingParams say of the next request alone."""
        sampling = self.sampling
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": 1 if self.closed else sampling.max_new_tokens,
            "seed": int(self.stream.integers(2**31)),
            "stop": [] if self.closed else list(sampling.stops),
        }

    def take(self, answer: Answer) -> Generated | None:
        """Add what vLLM has said; the turn, or None where its end must still be asked for."""
        self.said += answer.ids
        self.sampled_logp += answer.sampled_logp
        self.ids += answer.ids
        by_token = self.closed or (answer.finish == "stop" and answer.stop_text is None)
        self.closed = answer.finish == "stop" and not by_token
        if self.closed and len(self.said) < self.sampling.max_new_tokens:
            return None
        said, logp = tuple(self.said), tuple(self.sampled_logp)
        turn = Generated(said, logp, by_token or self.closed, int(by_token), answer.version)
        self.said, self.sampled_logp, self.closed = [], [], False
        return turn


def frames_of(piece: Piece, cfg: ModelConfig) -> list[Frame]:
    """The frames of a piece, from its first token on. Raises ValueError where its placeholders are
    not as many as its features."""
    features_ND = piece.encoder.features(piece.frames).cpu() if piece.encoder else torch.empty(0)
    sizes = [t * h * w // cfg.vision.merge_unit for t, h, w in piece.grids]
    placeholders = piece.ids.count(cfg.image_token_id)
    if not placeholders == sum(sizes) == len(features_ND):
        raise ValueError(
            f"a piece has {placeholders} placeholders for {len(features_ND)} rows of features, "
            f"where its grids ask for {sum(sizes)}"
        )
    frames, start = [], 0
    for grid, part_ND in zip(piece.grids, features_ND.split(sizes)):
        start = piece.ids.index(cfg.image_token_id, start)
        raw = part_ND.contiguous().view(torch.uint8).numpy()
        name = hashlib.blake2b(raw, digest_size=16).hexdigest()
        frames.append(Frame(start, grid, part_ND, name))
        start += len(part_ND)
    return frames


def constant_params(tokenizer, cfg: ModelConfig, banned: torch.Tensor) -> dict:
    """What vLLM's SamplingParams say of every request. banned: ids that are never sampled."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return {
        "stop_token_ids": sorted({end, *cfg.eos_token_ids}),
        "logit_bias": {int(i): float("-inf") for i in banned},
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": 0,  # of the sampled token alone
    }


def items_of(frames: Sequence[Frame], merge_size: int) -> dict:
    """Frames as the arguments of vLLM's mm_input: items, names and places, by modality."""
    from transformers import BatchFeature
    from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    features_ND = torch.cat([frame.features_ND for frame in frames])
    grids = torch.tensor([frame.grid for frame in frames])
    data = BatchFeature({"image_embeds": features_ND, "image_grid_thw": grids})
    fields = _create_qwen2vl_field_factory(merge_size)(data)
    places = [PlaceholderRange(frame.start, len(frame.features_ND)) for frame in frames]
    return {
        "mm_kwargs": MultiModalKwargsItems.from_hf_inputs(data, fields),
        "mm_hashes": {"image": [frame.name for frame in frames]},
        "mm_placeholders": {"image": places},
    }


def engine_flags(folder: Path, max_tokens: int, max_rows: int) -> dict:
    """What an engine must be told to be the trainer's sampler, in this process or in a server.

    max_tokens: of a whole conversation; max_rows: conversations at a time. Raises ValueError for
    the folder of an adapter.
    """
    check_whole_model(folder, "vLLM")
    cfg, on_gpu = load_config(folder), torch.cuda.is_available()
    # without room for a picture it loads no tower; but then it takes no features of DeepStack
    pictures = int(cfg.vision.feature_size > cfg.hidden_size)
    flags = {
        "model": str(folder),
        "dtype": "bfloat16" if on_gpu else "float32",
        "max_model_len": max_tokens,
        "max_num_seqs": max_rows,
        "logprobs_mode": "processed_logprobs",  # under temperature and bans, as the trainer has it
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": {"image": pictures, "video": 0},
        "generation_config": "vllm",  # not the folder's own temperature
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if pictures:  # none comes, so none is tried at the start
        flags |= {"skip_mm_profiling": True}
    if not on_gpu:
        # "CPU Generator does not use offset": a seed, and a prompt read in several parts
        flags |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max_tokens}
        flags |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return flags


def renew_packed_head(model: torch.nn.Module) -> None:
    """On a CPU vLLM multiplies by packed copies of weights, and renews all but a tied head's."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = model.language_model.lm_head
    if hasattr(head, "cpu_linear"):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def import_vllm() -> None:
    """Import vLLM, before several threads do. Raises ValueError where it is not installed."""
    try:
        import vllm.model_executor.models.qwen2_vl  # noqa: F401
    except ImportError as error:
        fix = "make .venv-vllm/.installed and its python, or on a GPU pip install vllm"
        raise ValueError(f"vLLM cannot be imported ({error}); {fix}") from error


def start_engine(folder: Path, max_tokens: int, max_rows: int):
    """vLLM's LLM in this process, under torchrun one in each. Raises ValueError where it cannot be
    started."""
    # in this very process, so that weights are handed over as tensors
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    flags = engine_flags(folder, max_tokens, max_rows)
    import_vllm()
    from vllm import LLM

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        share = GPU_SHARE * free / total
        flags |= {"gpu_memory_utilization": share, "enable_sleep_mode": True}
    if "RANK" in os.environ:
        flags["distributed_executor_backend"] = "external_launcher"
    return LLM(**flags)


class Talks:
    """The conversations of a Sampler (see sampler.py) over vLLM, wherever it runs."""

    def __init__(self, tokenizer, cfg: ModelConfig, banned: torch.Tensor, sampling: Sampling):
        self.tokenizer, self.cfg, self.banned, self.sampling = tokenizer, cfg, banned, sampling
        self.constant_params = constant_params(tokenizer, cfg, banned)
        self.talks: dict[int, Talk] = {}
        self.numbers, self.version = count(), 0
        self.counts: Counter[str] = Counter()
        """tokens_said, seconds_speak; of servers also servers_lost, asked_again."""

    def open(self, prompt: Piece, streams: Sequence[np.random.Generator]) -> list[int]:
        frames = frames_of(prompt, self.cfg)
        group = {next(self.numbers): Talk(stream, self.sampling) for stream in streams}
        self._settle(group)
        self.talks |= group
        for number, talk in group.items():
            talk.add(prompt.ids, frames)
            self._ask(number)
        return list(group)

    def say(self, number: int, piece: Piece) -> None:
        self.talks[number].add(piece.ids, frames_of(piece, self.cfg))
        self._ask(number)

    def _settle(self, group: Iterable[int]) -> None:
        """Choose who plays a group, where there is a choice."""

    def _ask(self, number: int) -> None:
        """Ask for the next tokens of a conversation."""
        raise NotImplementedError


class VllmSampler(Talks):
    """A Sampler over vLLM in this process, of which a process can have one."""

    def __init__(self, llm, *about):
        super().__init__(*about)
        self.llm, self.num_asked = llm, 0
        self.asked: dict[str, int] = {}
        """The conversation of each request that is under way."""
        self.asleep = False

    def turns(self) -> Iterator[tuple[int, Generated]]:
        torch.get_num_threads()  # a new thread learns here how many it has; vLLM counts on it
        while self.asked:
            began = time.monotonic()
            outputs = [out for out in self.llm.llm_engine.step() if out.finished]
            self.counts["seconds_speak"] += time.monotonic() - began
            for output in outputs:
                number = self.asked.pop(output.request_id, None)
                if number is None:
                    continue  # its conversation was closed meanwhile
                (said,) = output.outputs
                self.counts["tokens_said"] += len(said.token_ids)
                turn = self.talks[number].take(self._answer(said))
                if turn is None:
                    self._ask(number)
                else:
                    yield number, turn

    def close(self, number: int) -> None:
        self.talks.pop(number, None)
        under_way = [name for name, its in self.asked.items() if its == number]
        for name in under_way:
            del self.asked[name]
        if under_way:
            self.llm.llm_engine.abort_request(under_way)

    def sleep(self) -> None:
        if torch.cuda.is_available():  # weights too: whoever trains brings new ones
            self.llm.sleep(level=2)
            self.asleep = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.apply_model(renew_packed_head)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        # what the old weights have computed; the worker has dropped its features already
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.reset_prefix_cache(), "conversations are open"
        self.version = version

    def _ask(self, number: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import mm_input, tokens_input
        from vllm.sampling_params import RequestOutputKind

        talk, name = self.talks[number], str(self.num_asked)
        given = tokens_input(list(talk.ids))
        if talk.frames:
            merge_size = self.cfg.vision.spatial_merge_size
            given = mm_input(list(talk.ids), **items_of(talk.frames, merge_size))
        how = {"output_kind": RequestOutputKind.FINAL_ONLY, "flat_logprobs": True}
        params = SamplingParams(**self.constant_params, **talk.params(), **how)
        self.llm.llm_engine.add_request(name, given, params)
        self.asked[name] = number
        self.num_asked += 1

    def _answer(self, said) -> Answer:
        logp = list(said.logprobs.logprobs)
        assert len(logp) == len(said.token_ids), "one log-prob a token"
        if not np.isfinite(logp).all():
            raise ValueError("the sampler's log-probs are not finite: its weights are broken")
        stop_text = said.stop_reason if isinstance(said.stop_reason, str) else None
        return Answer(list(said.token_ids), logp, said.finish_reason, stop_text, self.version)
