"""The model families as tiny models: transformers' and ours with the same weights."""

from typing import NamedTuple

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from nanosport.model.decoder import VLModel
from nanosport.model.folder import own_name, read_config

IMAGE, VIDEO, START, END = 190, 191, 192, 193
TEXT = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "eos_token_id": 5, "bos_token_id": 4,
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "patch_size": 14,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6}
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip


class Family(NamedTuple):
    config: type
    model: type
    modeling: object
    """transformers' module."""
    text: dict
    vision: dict
    broken: dict
    """Settings that change the function, by the section they are in."""


FAMILIES = {
    "qwen2_5_vl": Family(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        modeling_qwen2_5_vl,
        TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}},
        VISION | {"fullatt_block_indexes": [1], "window_size": 112},
        {
            "mrope_section": [3, 3, 2],
            "rope_theta": 1e4,
            "window_size": 56,
            "fullatt_block_indexes": [2],
        },
    ),
    # heads that are wider together than the model, and a table of an odd side
    "qwen3_vl": Family(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        modeling_qwen3_vl,
        TEXT
        | {"num_attention_heads": 6, "head_dim": 16}
        | {"rope_parameters": ROPE | {"rope_theta": 1e3, "mrope_section": [4, 2, 2]}},
        VISION | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
        {
            "mrope_section": [6, 1, 1],
            "rope_theta": 1e6,
            "deepstack_visual_indexes": [0, 2],
            "rms_norm_eps": 0.1,
        },
    ),
}


def tiny_config(family: str, tied=False, patch_size=14):
    """transformers' config of a tiny model."""
    its = FAMILIES[family]
    vision = its.vision | {"patch_size": patch_size}
    sections = {"text_config": dict(its.text), "vision_config": vision}
    return its.config(**sections, **IDS, tie_word_embeddings=tied, attn_implementation="eager")


def tiny_pair(family: str, tied=False, patch_size=14, dtype=torch.float32):
    """(transformers' model, ours with the same weights): large weights, so that every one shows in
    the logits."""
    torch.manual_seed(0)
    cfg = tiny_config(family, tied, patch_size)
    theirs = FAMILIES[family].model(cfg)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(1.0, 0.2) if weight.ndim == 1 else weight.normal_(
                0.0, weight[0].numel() ** -0.5
            )
            # not theirs.to(dtype), which would round the rotary frequencies too
            weight.data = weight.to(dtype)
    ours = VLModel(read_config(cfg.to_dict())).to(dtype)
    state = {own_name(name): weight.clone() for name, weight in theirs.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    ours.load_state_dict(state)
    return theirs, ours


def engine_config(family: str, vocab_size: int) -> dict:
    """config.json of a tiny model for the sampler's tests, with assets/nano-sft's tokenizer."""
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": vocab_size, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    ids = {
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4,
    }  # fmt: skip
    if family == "qwen3_vl":
        rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        text |= {"head_dim": 16, "rope_scaling": rope}
        vision |= {"depth": 2, "num_position_embeddings": 9, "deepstack_visual_indexes": [0, 1]}
    else:
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        vision |= {"window_size": 8, "fullatt_block_indexes": [0]}
    config = {"model_type": family, "tie_word_embeddings": False, "vision_config": vision, **ids}
    return config | ({"text_config": text} if family == "qwen3_vl" else text)
