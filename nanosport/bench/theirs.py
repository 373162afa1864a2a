"""What nanosport's training is timed beside: the same decoder from transformers, with the same
weights and episodes, trained as trl.GRPOTrainer and SFTTrainer train it."""

import zlib
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

import rl
import train
from nanosport.model.cost import head_flops
from nanosport.model.decoder import ModelConfig
from nanosport.plan.synthetic import Lengths, SeenFrames, advantages_of, make_episodes
from nanosport.records import Episode
from nanosport.train.deal import make_units
from nanosport.train.faults import Stages
from nanosport.train.pack import pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Work:
    """A step's episodes, and the flags of train.py or rl.py that it is taken with."""

    episodes: tuple[Episode, ...]
    run: train.Config | rl.Config

    @classmethod
    def of(cls, cfg: ModelConfig, lengths: Lengths, groups: int, size: int, **flags) -> "Work":
        """An SFT step on groups of one, a policy update on larger ones. Its learning rate is so
        small that every step of a comparison sees the same weights."""
        flags = {"lr": 1e-9, "warmup": 1, "weight_decay": 0.0, **flags}
        if size == 1:
            run = train.Config(**flags)
        else:
            policy = {"group_size": size, "kl": 0.01, "temperature": 1.0, "adam_eps": 1e-8}
            run = rl.Config(**flags, **policy)
        return cls(tuple(make_episodes(cfg, lengths, groups, size)), run)

    @property
    def is_policy(self) -> bool:
        return isinstance(self.run, rl.Config)

    @property
    def lengths(self) -> list[int]:
        """Trained tokens of each episode."""
        return [sum(episode.mask) for episode in self.episodes]

    def flops(self, cfg: ModelConfig, share_prefix: bool) -> float:
        """Operations of a forward pass, head included."""
        size, homes = getattr(self.run, "group_size", 1), [0] * len(self.episodes)
        units = make_units(self.episodes, size, homes, cfg, self.run.micro_tokens, share_prefix)
        return sum(unit.flops for unit in units) + head_flops(cfg, sum(self.lengths))


def family_of(cfg: ModelConfig) -> str:
    """A config's family, by transformers' name of it."""
    return type(cfg).__module__.rpartition(".")[2]


def fill(named_weights: dict[str, torch.Tensor]) -> None:
    """Random weights that depend on their name alone: the same here and in transformers."""
    for name, weight in named_weights.items():
        if weight.ndim == 1:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
            weight.data.normal_(0.0, 0.02, generator=generator)


class Theirs:
    """The same decoder from transformers, as trl.GRPOTrainer and SFTTrainer train it: padded, with
    the logits of all tokens after the prompts."""

    def __init__(self, cfg: ModelConfig, work: Work, dtype: torch.dtype):
        self.cfg, self.dtype, self.stage = cfg, dtype, Stages(0, 0.0)
        self.encoder = SeenFrames(cfg, work.episodes[0], DEVICE, dtype)
        self.banned = torch.tensor([cfg.image_token_id, cfg.video_token_id], device=DEVICE)
        self.model, self.head_VD = self._model(torch.float32)
        if work.run.recompute != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.reference = self._model(dtype) if work.is_policy else None
        self.weights = [*self.model.parameters()]
        if not cfg.tie_word_embeddings:
            self.weights.append(self.head_VD)
        how = {"lr": work.run.lr, "betas": (0.9, 0.98), "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(self.weights, **how)

    def _model(self, dtype: torch.dtype) -> tuple:
        """(the decoder, its head)."""
        from transformers import AutoConfig, AutoModel

        cfg, default = self.cfg, {"rope_type": "default", "type": "default"}
        rope = default | {"mrope_section": [*cfg.mrope_section], "rope_theta": cfg.rope_theta}
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        same = (*sizes, "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
        shape = {name: getattr(cfg, name) for name in same}
        kind = f"{family_of(cfg)}_text"
        config = AutoConfig.for_model(kind, **shape, rope_parameters=rope, use_cache=False)
        config._attn_implementation = "sdpa"
        with torch.device(DEVICE):
            model = AutoModel.from_config(config).to(dtype)
            head_VD = model.embed_tokens.weight
            if not cfg.tie_word_embeddings:
                head_VD = torch.nn.Parameter(torch.empty_like(head_VD))
        named = {f"model.{name}": weight for name, weight in model.named_parameters()}
        fill(named | ({} if cfg.tie_word_embeddings else {"lm_head.weight": head_VD}))
        return model, head_VD

    def logprobs(self, model, head_VD, batch: list[Episode], start: int) -> torch.Tensor:
        """logp of the tokens start + 1, … of each row; padding at the right."""
        packs = [pack([episode], self.encoder, self.cfg, DEVICE, False) for episode in batch]
        ids_BT = pad_sequence([p.ids_T for p in packs], batch_first=True)
        positions_BT3 = pad_sequence([p.positions_3T.T for p in packs], batch_first=True)
        lengths_B1 = torch.tensor([len(p.ids_T) for p in packs], device=DEVICE)[:, None]
        mask_BT = torch.arange(ids_BT.shape[1], device=DEVICE) < lengths_B1
        mixed = self.dtype != torch.float32
        with torch.autocast(DEVICE.type, self.dtype, enabled=mixed):
            x_BTD = model.embed_tokens(ids_BT)
            features = torch.cat([p.features_ND for p in packs]).to(x_BTD.dtype)
            features_ND, *deep = features.split(self.cfg.hidden_size, dim=1)
            is_image_BT = ids_BT == self.cfg.image_token_id
            x_BTD = x_BTD.masked_scatter(is_image_BT[..., None], features_ND)
            given = {"inputs_embeds": x_BTD, "attention_mask": mask_BT.long()}
            given |= {"position_ids": positions_BT3.movedim(2, 0)}
            if deep:
                given |= {"visual_pos_masks": is_image_BT, "deepstack_visual_embeds": deep}
            out_BTD = model(**given).last_hidden_state
            logits_BTV = torch.nn.functional.linear(out_BTD[:, start:-1], head_VD)
        targets_BT = ids_BT[:, start + 1 :]
        if self.reference is not None:
            logits_BTV[..., self.banned] = float("-inf")
        # a banned target is no action: 0 · −∞ would be NaN in the gradient
        targets_BT = targets_BT.masked_fill(torch.isin(targets_BT, self.banned), 0)
        # row by row, in float32: trl's selective_log_softmax, the memory-lean way
        rows = zip(logits_BTV, targets_BT)
        return torch.stack(
            [row.float().log_softmax(-1).gather(-1, y[:, None])[:, 0] for row, y in rows]
        )

    def loss(self, work: Work, chosen: list[int]) -> torch.Tensor:
        """The loss of the episodes `chosen`, as kernels/policy_loss.py has it."""
        batch, lengths, run = [work.episodes[k] for k in chosen], work.lengths, work.run
        start = min(episode.mask.index(1) for episode in batch) - 1
        masks = [torch.tensor(episode.mask[start + 1 :]) for episode in batch]
        is_trained_BT = pad_sequence(masks, batch_first=True).to(DEVICE) > 0
        if self.reference is None:
            loss_BT = -self.logprobs(self.model, self.head_VD, batch, start) / sum(lengths)
            return loss_BT[is_trained_BT].sum()
        with torch.no_grad():
            ref_BT = self.logprobs(*self.reference, batch, start)
        logp_BT = self.logprobs(self.model, self.head_VD, batch, start)
        advantage_B1 = advantages_of(work.episodes, run)[chosen].to(DEVICE)[:, None]
        ratio_BT, gap_BT = (logp_BT - logp_BT.detach()).exp(), ref_BT - logp_BT
        low, high = 1 - run.objective.clip_low, 1 + run.objective.clip_high
        clipped_BT = ratio_BT.clamp(low, high) * advantage_B1
        gain_BT = torch.minimum(ratio_BT * advantage_B1, clipped_BT)
        loss_BT = run.kl * (gap_BT.exp() - gap_BT - 1) - gain_BT
        counts_B1 = torch.tensor([lengths[k] for k in chosen], device=DEVICE)[:, None]
        return (loss_BT / (len(lengths) * counts_B1))[is_trained_BT].sum()

    def step(self, work: Work) -> float:
        """Take a step, and return its loss."""
        self.stage.seconds.clear()
        longest = max(len(episode.ids) for episode in work.episodes)
        size, loss_sum = max(1, work.run.micro_tokens // longest), 0.0
        self.optimizer.zero_grad()
        with self.stage("train, reference included"):
            for first in range(0, len(work.episodes), size):
                loss = self.loss(work, [*range(len(work.episodes))][first : first + size])
                loss.backward()
                loss_sum += loss.item()
        with self.stage("update"):
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
        return loss_sum

    @property
    def seconds(self) -> dict[str, float]:
        return self.stage.seconds


class WithLiger(Theirs):
    """With Liger's rotary embedding, RMSNorm and SwiGLU. Liger puts them into transformers itself:
    no plain one can follow in the same process."""

    def _model(self, dtype: torch.dtype) -> tuple:
        import liger_kernel.transformers as liger

        patch = getattr(liger, f"apply_liger_kernel_to_{family_of(self.cfg)}")
        patch(fused_linear_cross_entropy=False)
        return super()._model(dtype)
