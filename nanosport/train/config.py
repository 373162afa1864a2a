"""The flags that SFT and RL share, and which of them may differ when a run is resumed."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from nanosport import cli
from nanosport.env.tools import TOOL_NAME, Syntax
from nanosport.fields import MAY_CHANGE, MAY_GROW, Above, AtLeast, marks_of
from nanosport.model.lora import DECODER, Target
from nanosport.train import checkpoint
from nanosport.train.track import Tracker, check_installed


@dataclass(frozen=True)
class TrainingConfig:
    """Every flag is compared with the resumed run's, unless it is marked beside the flag."""

    model: Annotated[str | None, MAY_CHANGE]
    """A model folder, or a Hugging Face hub id, of a revision if it ends in @REVISION."""
    data: Annotated[Path, MAY_CHANGE]
    """JSON lines. The default is rendered where it is missing."""
    out: Annotated[Path, MAY_CHANGE]
    """The run's folder, with model/, metrics.jsonl, run.json and checkpoints/."""
    steps: Annotated[int, AtLeast(1), MAY_GROW]
    """Steps of the whole run. A resumed run may have more: its schedule goes on over all of
    them."""
    lr: Annotated[float, Above(0), MAY_CHANGE]
    """Peak learning rate: linear warm-up, then cosine decay to a tenth."""
    warmup: Annotated[int, AtLeast(0)]
    """Steps until the learning rate is at its peak."""
    weight_decay: Annotated[float, AtLeast(0)]
    save_every: Annotated[int, AtLeast(1), MAY_CHANGE]
    """A checkpoint is saved after so many steps."""
    adam_eps: Annotated[float, Above(0)] = 1e-8
    """Adam divides by √v + this. At 1e-8 every weight moves by about lr, signal or noise; at ten
    times the gradient's root mean square the update follows the gradient itself."""
    max_grad_norm: Annotated[float, Above(0), MAY_CHANGE] = 1.0
    """Larger gradients are scaled down to this norm."""
    micro_tokens: Annotated[int, AtLeast(1), MAY_CHANGE] = 16_384
    """A micro-batch holds so many tokens at most, on one rank; it changes memory, not gradients."""
    share_prefix: Annotated[bool, MAY_CHANGE] = True
    """Compute what episodes begin with alike once; it changes time and memory, not gradients."""
    freeze_vision: bool = True
    """Leave the vision tower as it is."""
    freeze_projector: bool = True
    """Leave the projector after the tower as it is (`visual.merger`, and DeepStack's)."""
    lora_rank: Annotated[int, AtLeast(0)] = 0
    """Train adapters of this rank beside the model's weights, which then stay as they are
    (docs/lora.md). 0: train the weights themselves."""
    lora_alpha: Annotated[int, AtLeast(1)] = 32
    """What an adapter adds is weighed by lora_alpha / lora_rank."""
    lora_targets: tuple[Target, ...] = DECODER
    """The products that get an adapter. merger: those of the projector after the tower."""
    max_pixels: Annotated[int | None, AtLeast(1)] = None
    """Larger frames are scaled down to this. None: as the model's preprocessor_config.json says."""
    recompute: Annotated[Literal["auto", "all", "mlp", "none"], MAY_CHANGE] = "auto"
    """What of each layer the backward pass computes again instead of keeping it: all, mlp (all but
    the attention), or none. auto: as little as a GPU's memory allows; on a CPU none."""
    offload_adam: Annotated[bool, MAY_CHANGE] = False
    """Keep Adam's moments in the CPU's memory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute in this; what learns, its gradients and Adam's moments are float32 always. None:
    bfloat16 on a GPU, float32 on a CPU."""
    call_syntax: Syntax = TOOL_NAME
    """How the model calls the tool: as Qwen's function calls, or as in the paper's first
    version."""
    seed: Annotated[int, AtLeast(0)] = 0
    eval_every: Annotated[int, AtLeast(0), MAY_CHANGE] = 0
    """The model is measured on --eval-data before the first step, after so many steps each, and
    after the last; 0: never. It is saved first, and the best is kept in `out`/best."""
    eval_data: Annotated[Path | None, MAY_CHANGE] = None
    """Held-out questions, one JSON object a line, about other videos than those trained on."""
    patience: Annotated[int, AtLeast(0), MAY_CHANGE] = 0
    """The run ends after so many evaluations in a row without a better one; 0: never."""
    track: Annotated[Tracker, MAY_CHANGE] = "none"
    """Show figures and rollouts with their frames there too, where it is installed: TensorBoard,
    wandb (offline), or trackio (docs/metrics.md)."""
    keep: Annotated[int, AtLeast(1), MAY_CHANGE] = 2
    """So many checkpoints are kept, the newest."""
    stuck_after_s: Annotated[float, AtLeast(0), MAY_CHANGE] = 1800.0
    """End the run where a stage of a step takes longer, and say on which rank; 0: never."""
    resume: Annotated[bool, MAY_CHANGE] = False
    """Go on from the newest checkpoint in `out`."""
    allow_changed: Annotated[bool, MAY_CHANGE] = False
    """Resume although the files of model or data are not those that the run began with. Where they
    are does not matter."""
    overwrite: Annotated[bool, MAY_CHANGE] = False
    """Replace the run in `out`."""

    def check(self) -> None:
        """Raise ValueError for values that no run can use."""
        cli.check(self)
        check_installed(self.track)
        if bool(self.eval_every) != (self.eval_data is not None):
            raise ValueError("--eval-every, --eval-data: give both, or neither")
        if self.patience and not self.eval_every:
            raise ValueError(f"--patience {self.patience}: needs --eval-every and --eval-data")
        read = [path for path in (self.data, self.eval_data) if path]
        for name in ("metrics.jsonl", "run.json", "heldout.jsonl"):
            cli.not_the_input(self.out / name, *read)
        if self.lora_rank and not (self.freeze_vision and self.freeze_projector):
            rule = "adapters alone learn; leave --freeze-vision and --freeze-projector on"
            raise ValueError(f"--lora-rank {self.lora_rank}: {rule}, and see --lora-targets merger")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("--lora-targets: name at least one")

    @property
    def resumable(self) -> bool:
        """Whether `resume` has a checkpoint to go on from."""
        return checkpoint.latest(self.out) is not None

    @property
    def may_expand(self) -> bool:
        """Whether all that shares the GPU's memory here can live with segments that grow."""
        return True

    @property
    def frozen(self) -> bool:
        """Whether a frame's features never change, so that each frame is encoded once."""
        adapted = self.lora_rank > 0 and "merger" in self.lora_targets
        return self.freeze_vision and self.freeze_projector and not adapted


def settings(cfg: TrainingConfig) -> dict[str, str]:
    """What a resumed run is compared with: every flag but those that may change."""
    marks = marks_of(type(cfg))
    names = [field.name for field in fields(cfg) if MAY_CHANGE not in marks[field.name]]
    return {name: str(getattr(cfg, name)) for name in names}


def check_resumed(cfg: TrainingConfig, saved: dict[str, str], run: Path) -> list[str]:
    """Compare the flags with the `saved` ones of the run in folder `run`; returns a line for each
    that has grown. A flag that the run did not have yet had its default then.

    Raises ValueError that names the first flag which must not differ.
    """
    marks, defaults, grown = marks_of(type(cfg)), settings(type(cfg)()), []
    for name, value in settings(cfg).items():
        before = saved.get(name, defaults[name])
        if value == before:
            continue
        flag = cli.flag(name)
        if MAY_GROW not in marks[name] or int(value) < int(before):
            may_grow = MAY_GROW in marks[name]
            advice = "it may grow, not shrink" if may_grow else "resume with the same"
            raise ValueError(f"{flag} {value}: the run in {run} has {before}; {advice}")
        schedule = f"the learning rate's schedule goes on over all {value} steps"
        grown.append(f"{flag} grows from {before} to {value}: {schedule}")
    return grown
