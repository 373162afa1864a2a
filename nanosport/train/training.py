"""One run of either stage: set-up, resume, steps, update, log, save.

training = Training(cfg, "SFT")
training.load()
for step in training.steps():          # saves after a step if it is time to, ends on SIGTERM
    with training.stage("train"): …    # takes the time; a stage that hangs is named
    training.update(step, losses, episodes)
    training.log({…}, shown=("loss",))
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from kernels.policy_loss import free_bytes
from nanosport.cli import Preempted
from nanosport.engine.sampler import SamplerError
from nanosport.env.endpoint import EndpointError
from nanosport.env.judge import Judge
from nanosport.env.reward import RewardError
from nanosport.files import checksum
from nanosport.image import ImageConfig
from nanosport.model import lora
from nanosport.model.decoder import VLModel, attention_of
from nanosport.model.folder import (
    COPIED,
    aside,
    chain,
    first_few,
    hub_commit,
    load_model,
    resolve,
    settings_folder,
    weight_files,
)
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode
from nanosport.train import checkpoint, dist, mixed, optim, recompute
from nanosport.train.checkpoint import Checkpoints
from nanosport.train.config import TrainingConfig, check_resumed, settings
from nanosport.train.deal import deal, make_units
from nanosport.train.faults import Preemption, Skips, Stages
from nanosport.train.pack import Batch, pack
from nanosport.train.run import Run
from nanosport.train.track import SHOW_EVERY, numbers_of, open_tracker, show_episodes


@dataclass(frozen=True)
class Update:
    """What an optimizer update has come to."""

    loss: float
    """The loss of all ranks."""
    grad_norm: float
    """The gradient's norm before it was clipped."""
    lr: float
    skipped: bool
    """Nothing was learnt, since loss or gradient was non-finite."""


class Training:
    """A run: this process and its device, the model on it, the run's folder, and its state."""

    def __init__(self, cfg: TrainingConfig, title: str):
        """Join torchrun's processes. title: the stage's name, for the progress bar."""
        cfg.check()
        self.cfg, self.title = cfg, title
        self.rank, self.world, self.device = dist.start()
        if cfg.may_expand:
            dist.expand_segments(self.device)
        self.dtype = dist.dtype_of(cfg.dtype, self.device)
        self.tracker = None
        self.state: dict = {"step": 0}
        """What a checkpoint remembers beside weights and moments; `step` is the one to do next."""

    def load(self) -> None:
        """Open the run's folder and load the model; with --resume, as the newest checkpoint has it.

        Raises ValueError where the folder or the model cannot be used, or flags, model or data are
        not those of the resumed run.
        """
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        self.source = resolve(cfg.model)
        self.run: Run | None = None  # rank 0 has it
        dist.once(self._open)
        dist.check_shared(cfg.out / "run.lock")
        self.stage = Stages(self.rank, cfg.stuck_after_s)
        self.preemption, self.skips = Preemption(), Skips(cfg.out, self.rank)
        self.failure = ""
        # what stays as it is needs no float32
        dtype = self.dtype if cfg.lora_rank else torch.float32
        self.build(load_model(self.source, self.device, dtype))
        saved_as = {"dtype": self.dtype, "max_pixels": cfg.max_pixels}
        if cfg.lora_rank:
            saved_as |= {"dtype": torch.float32, "adapter": self._about_adapter()}
        self.checkpoints = Checkpoints(cfg.out, self.source, self.rank, cfg.keep, **saved_as)
        self.began_with = self._checksums()
        if cfg.resume and cfg.resumable:
            self._resume()
        if self.run:
            if self.device.type == "cuda":
                print(f"{self.title}: attention by {self.attention}")
            self.run.about["attention"] = self.attention
            self.run.about["model_commit"] = hub_commit(self.source)
            self.run.about["began_with"] = self.began_with
        self.image = ImageConfig.from_folder(settings_folder(self.source), cfg.max_pixels)
        self.encoder = FrameEncoder(self.computing, self.image, cfg.frozen)

    def _about_adapter(self) -> dict:
        """The adapter_config.json of what this run saves."""
        cfg, is_folder = self.cfg, Path(self.cfg.model).expanduser().exists()
        commit = None if is_folder else hub_commit(self.source)
        base = cfg.model.partition("@")[0] if commit else str(self.source.absolute())
        about = lora.config_of(self.model, base, cfg.lora_rank, cfg.lora_alpha)
        return about | {"revision": commit}

    def _open(self) -> None:
        cfg, model = self.cfg, (self.cfg.out / "model").resolve()
        written = {model, aside(model), (cfg.out / "best").resolve()}
        if written & {one.resolve() for one in chain(self.source)}:
            why = "the run in --out would replace the model that it begins with"
            raise ValueError(f"--model {cfg.model}: {why}; choose another --out")
        self.run = Run(cfg.out, cfg, cfg.resume, cfg.overwrite)

    def _checksums(self) -> dict[str, int]:
        """What a run begins with: the checksums of the data, and of each of the model's files."""
        paths = {"--data": self.cfg.data}
        for depth, folder in enumerate(chain(self.source)):  # an adapter, and what it stands on
            settings = [folder / name for name in ("config.json", lora.CONFIG, *COPIED)]
            files = [*weight_files(folder), *filter(Path.is_file, settings)]
            whose = "--model" + "'s base" * depth
            paths |= {f"{whose}, {path.name}": path for path in files}
        mine = {name: checksum(paths[name]) for name in dist.share(list(paths), self.rank)}
        return {name: crc32 for part in dist.gather(mine) for name, crc32 in part.items()}

    def _resume(self) -> None:
        """Go on from the newest checkpoint."""
        cfg = self.cfg
        folder, state = checkpoint.newest(cfg.out, self.rank)
        lines = check_resumed(cfg, state.pop("settings"), cfg.out)
        before, now = state.pop("began_with") or self.began_with, self.began_with
        if changed := [name for name in before | now if before.get(name) != now.get(name)]:
            what = f"{first_few(changed)}: not what the run in {cfg.out} began with"
            if not cfg.allow_changed:
                raise ValueError(f"{what}; give it the same, or go on with --allow-changed")
            lines.append(what)
        checkpoint.load(folder, self.model, self.optimizer)
        mixed.renew(self.computing)
        del state["crc32"]
        self.state |= state
        self.checkpoints.at = self.state["step"]
        if self.run:
            for line in lines:
                print(line)

    def build(self, model) -> None:
        """Lay `model` out over the ranks, and build its optimizer."""
        cfg = self.cfg
        if cfg.lora_rank:
            lora.attach(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
        optim.trainable(model, cfg.freeze_vision, cfg.freeze_projector)
        self.model = self.computing = dist.shard(model, self.dtype, self.device)
        if not (dist.sharded(model) or self.dtype == torch.float32 or cfg.lora_rank):
            self.computing = mixed.computing_copy(model, self.dtype)
        on_gpu = self.device.type == "cuda"
        tower = cfg.recompute if cfg.recompute != "auto" else ("all" if on_gpu else "none")
        self.computing.visual.recompute = tower
        self.attention = attention_of(self.model.cfg, self.device, self.dtype)
        self.optimizer = optim.build(self.model, cfg.weight_decay, cfg.adam_eps, cfg.offload_adam)

    def steps(self, held_out=None) -> Iterator[int]:
        """Yield each step that is still to do; after it save, if it is time to or SIGTERM has come.
        held_out: the questions (heldout.py) that may end the run before its last step.

        Raises Preempted after SIGTERM.
        """
        cfg, first = self.cfg, self.state["step"]
        dist.once(lambda: self.run.begin(first))
        if self.run:
            self.tracker = open_tracker(cfg.track, cfg.out, self.run.about["config"], first)
        numbers, hidden = range(first, cfg.steps), self.rank > 0
        self.bar = tqdm(numbers, self.title, cfg.steps, initial=first, disable=hidden)
        for step in self.bar:
            self.stage.new_step(step)
            if held_out and held_out.evaluate(step):
                tqdm.write(
                    f"step {step}: --patience {cfg.patience} is at its end, and so is the run"
                )
                break
            yield step
            done, stopping = step + 1, self.preempted()
            if done % cfg.save_every == 0 or done == cfg.steps or stopping:
                self.save(done)
            if stopping and done < cfg.steps:
                self._stop(f"after step {step}, which is saved")
        else:
            if held_out:
                held_out.evaluate(cfg.steps)

        # what the last save writes in the background must be whole before any rank leaves
        self.checkpoints.finish()
        self.stage.close()
        if self.run:
            self.run.describe()
            self.run.lock.close()
            if self.tracker:
                self.tracker.close()
            print(f"{self.title} model in {self.run.model}")
        dist.barrier()

    def deal(
        self, episodes: Sequence[Episode], together: int, homes: Sequence[int]
    ) -> tuple[list[tuple[list[int], bool]], float]:
        """This rank's micro-batches as (numbers of its episodes, whether they count), and how
        evenly the ranks are loaded."""
        cfg, model = self.cfg, self.model.cfg
        units = make_units(episodes, together, homes, model, cfg.micro_tokens, cfg.share_prefix)
        dealt, balance = deal(units, self.world, cfg.micro_tokens, cfg.frozen)
        # where there are more ranks than units, one idles on another's episode: all ranks go
        # through the layers together
        return [(numbers or [0], bool(numbers)) for numbers in dealt[self.rank]], balance

    def pack(self, episodes: Sequence[Episode], encoder: FrameEncoder) -> Batch:
        """A packed batch of `episodes` on this rank's device."""
        return pack(episodes, encoder, self.model.cfg, self.device, self.cfg.share_prefix)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """hidden_MD of the rows with loss; differentiable. The layers keep what memory allows."""
        model, mode = self.computing, self.cfg.recompute
        if mode == "auto" and self.device.type == "cpu":
            mode = "none"
        model.recompute = (mode,) * model.cfg.num_hidden_layers
        if mode == "auto":
            kept = recompute.Kept(model.cfg, len(batch.ids_T), self.dtype, self.attention)
            if batch.keys is not None and batch.keys.index_S is not None:
                kept = replace(kept, num_keys=len(batch.keys.index_S))
            model.recompute = recompute.choose(kept, self._room(kept))
        return batch.hidden_MD(model)

    def _room(self, kept: recompute.Kept) -> float:
        """Bytes of this GPU that the layers may keep of a micro-batch."""
        state, to_come = self.optimizer.state, 0
        for weight in (w for w in self.model.parameters() if w.requires_grad):
            moments = 0 if self.cfg.offload_adam or state[weight] else 8
            to_come += (4 * (weight.grad is None) + moments) * dist.local(weight).numel()
        return free_bytes(self.device) - to_come - recompute.reserve(kept)

    def update(
        self, step: int, losses: Sequence[torch.Tensor], episodes: Sequence[Episode]
    ) -> Update:
        """Clip the gradients, and take an optimizer step unless loss or gradient is non-finite.

        losses: of this rank's micro-batches; their sum is its share of the loss. On a GPU this is
        the step's first wait. episodes: those of all ranks, for the report of a batch that broke
        the step.
        """
        cfg = self.cfg
        with self.stage("update"):
            (loss,) = dist.total([sum(loss.item() for loss in losses)], self.device)
            grad_norm = optim.clip(self.model, cfg.max_grad_norm)
            lr = optim.set_lr(self.optimizer, step, cfg.lr, cfg.warmup, cfg.steps)
            skipped = self.skips.bad(step, loss, grad_norm, episodes)
            if not skipped:
                self.optimizer.step()
                mixed.renew(self.computing)
            self.optimizer.zero_grad()
        return Update(loss, grad_norm, lr, skipped)

    def log(
        self, row: dict, shown: Sequence[str], episodes: Sequence[Episode] = (), rewards=()
    ) -> None:
        """Write a step's line, with the seconds of all stages since the last; `shown` stands beside
        the bar too, and some of the episodes in the tracker, with their rewards."""
        if row["step"] % SHOW_EVERY == 0 and episodes:
            self.show(row["step"], "rollout", episodes, rewards)
        stages, self.stage.seconds = self.stage.seconds.items(), {}
        if self.run:
            seconds = {f"seconds_{stage.replace(' ', '_')}": spent for stage, spent in stages}
            row = {**row, **seconds}
            self.run.write(row)
            self.track(row["step"], row)
            self.bar.set_postfix({name: f"{row[name]:.3g}" for name in shown})

    def track(self, step: int, row: dict, prefix: str = "") -> None:
        """Hand a row's numbers to the tracker, if there is one."""
        if self.tracker:
            self.tracker.log(step, numbers_of(row, prefix))

    def show(
        self, step: int, kind: str, episodes: Sequence[Episode], scores: Sequence[float]
    ) -> None:
        """Hand some of the episodes to the tracker, with their frames."""
        if self.tracker:
            show_episodes(self.tracker, step, kind, episodes, scores)

    def whole_copy(self) -> VLModel:
        """Another whole model as the run began with, on this rank; a frozen tower is there once."""
        cfg, tower = self.cfg, self.computing.visual if self.cfg.frozen else None
        model = load_model(self.source, self.device, self.dtype, tower)
        if cfg.lora_rank:
            lora.attach(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
        return model

    def preempted(self) -> bool:
        """Whether SIGTERM has reached any rank. All ranks must ask."""
        return dist.total([float(self.preemption.asked)], self.device)[0] > 0

    def save(self, next_step: int) -> None:
        """Save a checkpoint in the background, and the model's folder with it."""
        with self.stage("save"):
            self.state["step"] = next_step
            more = {"settings": settings(self.cfg), "began_with": self.began_with}
            self.checkpoints.save(self.model, self.optimizer, {**self.state, **more})
            if self.run:
                self.run.describe()

    @contextmanager
    def serving(self, judge: Judge | None):
        """A block in which a judge is asked, or servers sample. Where they fail the run stops, as
        after SIGTERM, which ends the judge's block too."""
        self.preemption.service = judge and judge.endpoint
        if self.preemption.asked:
            self.preemption.hear()
        try:
            yield
        except (EndpointError, SamplerError, RewardError) as error:
            if not self.preemption.asked:
                self.failure, self.preemption.asked = str(error), True

    def stop_inside(self, step: int) -> None:
        """End the run in a step whose update has not begun: an update takes long, and without it
        the step can be done again. Raises Preempted, or ValueError where a service has failed."""
        self.save(step)
        where = f"in step {step}; what was before it is saved"
        if failure := next(filter(None, dist.gather(self.failure)), ""):
            self.checkpoints.finish()
            raise ValueError(f"{failure}; the run stops {where}, --resume goes on")
        self._stop(where)

    def _stop(self, where: str) -> None:
        self.checkpoints.finish()
        raise Preempted(f"stopped by SIGTERM {where}, --resume goes on")
