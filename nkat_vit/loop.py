"""The training loop. Every random number follows from (seed, step, process), so that a run can go on from any step.

A checkpoint is written after each epoch (and every `save_steps` steps): killed at any moment and resumed, a run ends
with the same weights, bit by bit on a processor.

With `grad_accum` a batch goes through the model in parts, whose gradients add up: the pictures, their augmentation and
the step are the whole batch's, and so are the numbers, up to rounding, where nothing depends on a part. Two things do:
BatchNorm, in the stem, takes the statistics of a part, and dropout draws for each part anew.

A loss that is no number any more stops it; what was saved stays good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nkat.errors import NKATError
from nkat.host import console
from nkat.host.distributed import World
from nkat.host.heap import keep_freed_memory
from nkat_vit import checkpoint
from nkat_vit.augment import Batch, augment
from nkat_vit.data import ImageSet, split
from nkat_vit.model import NKATViT
from nkat_vit.optim import Average, lr_factor, make_optimizers, set_lr
from nkat_vit.predict import accuracy, autocast
from nkat_vit.recipe import Recipe, check_schedule, with_amp

_CHECK_STEPS = 20  # reading the loss more often would make a GPU wait
_AMP_TRIALS = 4
_THREAD_TRIALS = 3
_THREAD_SECONDS = 5.0  # after which the first of them has to do
_ROW = {"epoch", "loss", "validation", "lr", "seconds", "images_per_second"}


class DivergedError(NKATError):
    """The loss or the weights are no numbers any more."""


def mixed_loss(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Cross-entropy against two labels by weight, with label smoothing; the mean over the batch."""
    losses = [
        F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none") for y in (batch.labels, batch.others)
    ]
    return torch.lerp(losses[1], losses[0], batch.weight).mean()


def compile_model(model: nn.Module, world: World, parts: int = 1) -> nn.Module:
    """The same model by torch.compile, which shares its weights.

    On a GPU alone its kernels are recorded as CUDA graphs: a thousand small ones a step keep a processor busy launching
    them, and the GPU waiting for it. Not where a batch goes through in `parts`, whose gradients a graph makes in the
    same place.
    """
    graphs = world.device.type == "cuda" and world.size == 1 and parts == 1
    return cast(nn.Module, torch.compile(model, mode="reduce-overhead" if graphs else None))


def measure_amp(recipe: Recipe, images: ImageSet, device: torch.device) -> tuple[str, dict[str, float]]:
    """Which of "off" and "bf16" trains faster here, and the seconds of a step of each (the fastest of four)."""
    step = _bare_step(recipe, images, device)
    seconds = {amp: min(step(amp) for _ in range(_AMP_TRIALS)) for amp in ("off", "bf16")}
    return min(seconds, key=lambda amp: seconds[amp]), seconds


def measure_threads(recipe: Recipe, images: ImageSet) -> dict[int, float]:
    """Pictures a second of a processor, by number of threads: those in force now, half of them, one.

    Measured in turns, the fastest of three, or the first where steps are long. Beside other work, threads that wait for
    one another can be slower than one alone.
    """
    before = torch.get_num_threads()
    counts = sorted({before, (before + 1) // 2, 1})
    step = _bare_step(recipe, images, torch.device("cpu"))
    step(recipe.train.amp)  # the first makes what the others find
    seconds = dict.fromkeys(counts, float("inf"))
    started = perf_counter()
    try:
        with console.bar(_THREAD_TRIALS * len(counts), "measuring threads", "step") as progress:
            for _ in range(_THREAD_TRIALS):
                for count in counts:
                    torch.set_num_threads(count)
                    seconds[count] = min(seconds[count], step(recipe.train.amp))
                    progress.update()
                if perf_counter() - started > _THREAD_SECONDS:
                    break
    finally:
        torch.set_num_threads(before)
    return {count: recipe.train.batch_size // recipe.train.grad_accum / s for count, s in seconds.items()}


def _bare_step(recipe: Recipe, images: ImageSet, device: torch.device) -> Callable[[str], float]:
    """A function of `amp` that makes the gradients of one batch, or of a part, and returns the seconds that took."""
    model = NKATViT(recipe.model).to(device).train()
    count = recipe.train.batch_size // recipe.train.grad_accum
    batch, labels = images.images[:count].float() / 255, images.labels[:count]

    def step(amp: str) -> float:
        started = perf_counter()
        with autocast(device, amp):
            logits = model(batch)[0]
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        loss.item()  # waits for a GPU
        return perf_counter() - started

    return step


class Trainer:
    """One run: model, optimisers, averages, position. `run` trains from there to the end.

    folder: where rank 0 writes last.pt and best.pt
    label: what the progress bar says before the epoch
    judge_last: whether the history has the validation accuracy of the last weights beside that of the averaged ones
    on_epoch: called on rank 0 after each epoch, before its checkpoint, with the history so far
    """

    def __init__(
        self,
        recipe: Recipe,
        train: ImageSet,
        held: ImageSet,
        world: World,
        folder: Path,
        *,
        save_steps: int = 0,
        compiled: bool = False,
        label: str = "",
        judge_last: bool = True,
        on_epoch: Callable[[list[dict[str, float]]], None] | None = None,
    ) -> None:
        config = recipe.train
        if config.batch_size % world.size:
            raise NKATError(f"batch_size {config.batch_size} cannot be divided among {world.size} processes")
        if (config.batch_size // world.size) % config.grad_accum:
            share = f"{config.batch_size // world.size} of a process's batch_size"
            raise NKATError(f"grad_accum {config.grad_accum} does not divide the {share} {config.batch_size}")
        if len(train) < config.batch_size:
            raise NKATError(
                f"{len(train)} training pictures are fewer than one batch of {config.batch_size}; give a smaller "
                "--batch-size"
            )
        self.recipe, self.world, self.folder = recipe, world, folder
        self.train_set, self.held = train.to(world.device), held.to(world.device)
        self.save_steps, self.label, self.judge_last, self.on_epoch = save_steps, label, judge_last, on_epoch
        self.pass_steps = len(train) // config.batch_size  # through all of the pictures
        self.epoch_steps = config.epoch_size // config.batch_size or self.pass_steps
        if world.device.type == "cpu":
            keep_freed_memory()  # a step's tensors are as large as those of the step before it
        torch.manual_seed(config.seed)
        self.model = NKATViT(recipe.model).to(world.device)
        self.model.fit_stem(self.train_set.images)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.judge = deepcopy(self.model).eval()
        self.optimizers = make_optimizers(self.model, config)
        self.forward: nn.Module = compile_model(self.model, world, config.grad_accum) if compiled else self.model
        if world.size > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.step = 0
        self.losses = torch.zeros((), device=world.device)
        self.history: list[dict[str, float]] = []
        self.best = -1.0
        self.extended_from: list[int] = []  # the numbers of epochs it was to have before it was made longer
        self._order = -1, torch.empty(0)  # the number of a pass through the pictures, and their order in it

    def run(self) -> None:
        """Trains to the last epoch."""
        for _ in self.epochs():
            pass

    def epochs(self) -> Iterator[None]:
        """Trains epoch by epoch and stands still after each, its row in `history` and its checkpoint written."""
        while self.step < self.recipe.train.epochs * self.epoch_steps:
            self.model.train()
            self._run_epoch()
            yield

    def train_step(self) -> Tensor:
        """One step of the optimiser; returns the loss of this process's part of the batch, without waiting for it."""
        config, rank = self.recipe.train, self.world.rank
        steps, warmup = config.epochs * self.epoch_steps, round(config.warmup * self.epoch_steps)
        set_lr(self.optimizers, lr_factor(self.step, steps, warmup))
        random = np.random.default_rng([config.seed, self.step, rank])
        torch.manual_seed(int(random.integers(2**62)))  # of the dropouts
        index = self._batch_index()
        images, labels = self.train_set.images[index], self.train_set.labels[index]
        batch = augment(images, labels, self.recipe.augment, self.recipe.model.mean, random)
        loss = self._gradients(batch)
        if config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        return loss

    def _gradients(self, batch: Batch) -> Tensor:
        """Adds up the gradients of a batch's parts; returns the batch's mean loss."""
        config = self.recipe.train
        parts = batch.parts(config.grad_accum)
        total = torch.zeros((), device=self.world.device)
        for number, part in enumerate(parts, 1):
            # Processes tell each other their gradients once, with those of the last part.
            forward, silent = self.forward, number < len(parts)
            quiet = forward.no_sync() if silent and isinstance(forward, DistributedDataParallel) else nullcontext()
            with quiet:
                with autocast(self.world.device, config.amp):
                    logits = forward(part.images)[0]
                loss = mixed_loss(logits.float(), part, config.smoothing) / len(parts)
                loss.backward()
            total += loss.detach()
        return total

    def _run_epoch(self) -> None:
        config = self.recipe.train
        epoch, done = divmod(self.step, self.epoch_steps)
        started, first = perf_counter(), self.step
        title = f"{self.label}epoch {epoch + 1}/{config.epochs}"
        with console.bar(self.epoch_steps, title, "step", enabled=self.world.first) as progress:
            progress.update(done)
            for position in range(done, self.epoch_steps):
                self.losses += self.train_step()
                progress.update()
                last = position + 1 == self.epoch_steps
                if last or self.step % _CHECK_STEPS == 0 or self._saves_now():
                    mean = float(self.losses) / (position + 1)
                    progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
                    self._check_finite(mean)
                if self._saves_now() and not last:
                    self._save_run()
        seconds = perf_counter() - started
        self.losses.zero_()
        if self.world.first:
            images = (self.step - first) * config.batch_size
            self._judge_epoch(epoch + 1, mean, images, seconds)
        self.world.wait()

    def _saves_now(self) -> bool:
        return self.save_steps > 0 and self.step % self.save_steps == 0

    def _batch_index(self) -> Tensor:
        config, world = self.recipe.train, self.world
        number, position = divmod(self.step, self.pass_steps)
        if self._order[0] != number:
            seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1, np.uint64)[0] >> 1)
            order = torch.randperm(len(self.train_set), generator=torch.Generator().manual_seed(seed))
            self._order = number, order.to(world.device)
        part = config.batch_size // world.size
        start = position * config.batch_size + world.rank * part
        return self._order[1][start : start + part]

    def _check_finite(self, loss: float) -> None:
        weights = torch.stack([p.detach().abs().sum() for p in self.model.parameters()]).sum()
        if np.isfinite(loss) and bool(torch.isfinite(weights)):
            return
        saved = self.folder / "last.pt"
        kept = f"the last good checkpoint is {saved}" if saved.exists() else "no epoch was finished yet"
        raise DivergedError(f"the loss is no number any more at step {self.step}; {kept}; try a lower --lr")

    def _judge_epoch(self, epoch: int, loss: float, images: int, seconds: float) -> None:
        """Validation, history, and both checkpoints."""
        config = self.recipe.train
        self.judge.load_state_dict(self.model.state_dict() if self.average is None else self.average.weights)
        started = perf_counter()
        validation = accuracy(self.judge, self.held, config.tta, config.amp)
        judged = len(self.held) / (perf_counter() - started)
        row = {
            "epoch": float(epoch),
            "loss": loss,
            "validation": validation,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            "images_per_second": images / seconds,
        }
        if not self.history or "judged_per_second" in self.history[0]:  # rows of older runs are without
            row["judged_per_second"] = judged
        if self.judge_last:
            row["validation_last"] = accuracy(self.model, self.held, config.tta, config.amp)
        self.history.append(row)
        if row["validation"] > self.best:
            self.best = row["validation"]
            self._save_best(epoch)
        if self.on_epoch is not None:
            self.on_epoch(self.history)
        self._save_run()

    def _save_best(self, epoch: int) -> None:
        facts = {"epoch": epoch, "steps": self.step, "validation": self.best, "data_sha256": self.train_set.sha256}
        facts |= {"train_images": len(self.train_set), "kind": "weights", "recipe": self.recipe.values()}
        checkpoint.save(self.folder / "best.pt", facts | {"weights": self.judge.state_dict()})

    def _save_run(self) -> None:
        if not self.world.first:
            return
        content: dict[str, Any] = {
            "kind": "run",
            "recipe": self.recipe.values(),
            "data_sha256": self.train_set.sha256,
            "processes": self.world.size,
            "step": self.step,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "average": self.average.state() if self.average else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "history": self.history,
            "best": self.best,
            "extended_from": self.extended_from,
        }
        checkpoint.save(self.folder / "last.pt", content)

    def restore(self, content: dict[str, Any]) -> None:
        """Goes on from a `last.pt`; raises NKATError when it belongs to another run, or is damaged."""
        path = self.folder / "last.pt"
        wanted = {"data_sha256": self.train_set.sha256, "processes": self.world.size, "best": self.best}
        wanted |= {"model": self.model.state_dict(), "losses": self.losses}
        wanted["average"] = self.average and self.average.state()
        for name, mine in wanted.items():
            checkpoint.check_like(content.get(name), mine, path, name)
        optimizers = _states(content.get("optimizers"))
        checkpoint.check_like(optimizers, self._states_after_a_step(), path, "optimizers, or another version's")
        for name in ("data_sha256", "processes"):
            if content[name] != wanted[name]:
                raise NKATError(f"{path}: was made with another {name}: {content[name]}, here it is {wanted[name]}")
        step, history = content.get("step"), cast(Any, content.get("history"))
        if type(step) is not int or not 0 <= step <= self.recipe.train.epochs * self.epoch_steps:
            raise checkpoint.damaged(path, "step")
        if not _is_history(history, step // self.epoch_steps):
            raise checkpoint.damaged(path, "history")
        if self.average is not None and content["average"]["updates"] != step:
            raise checkpoint.damaged(path, "average")
        extended = content.get("extended_from", [])
        if not isinstance(extended, list) or not all(type(epochs) is int for epochs in extended):
            raise checkpoint.damaged(path, "extended_from")
        self.extended_from = list(extended)
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            # Rates and the like are the recipe's.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        if self.average is not None:
            self.average.restore(content["average"])
        self.step, self.history, self.best = step, history, content["best"]
        # The loss of an epoch is a sum over its steps; after its last step, the next one starts from zero.
        if self.step % self.epoch_steps:
            self.losses.copy_(content["losses"])

    def _states_after_a_step(self) -> list[object]:
        """What optimisers keep of each parameter once they have begun."""
        model = deepcopy(self.model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers = make_optimizers(model, self.recipe.train)
        for optimizer in optimizers:
            optimizer.step()
        return _states([optimizer.state_dict() for optimizer in optimizers])


def _states(optimizers: object) -> list[object]:
    """What several optimisers keep of each parameter, out of their state dictionaries."""
    found = optimizers if isinstance(optimizers, list) else []
    return [state.get("state") if isinstance(state, dict) else None for state in found]


def _is_history(history: object, epochs: int) -> bool:
    """Whether it has a row of numbers for each epoch, all of the same names."""
    return (
        isinstance(history, list)
        and len(history) == epochs
        and all(isinstance(row, dict) and row.keys() == history[0].keys() >= _ROW for row in history)
        and all(isinstance(value, float) and math.isfinite(value) for row in history for value in row.values())
    )


def open_run(recipe: Recipe, whole: ImageSet, world: World, folder: Path, label: str) -> Trainer:
    """A run of the recipe on a whole training set, standing where an interrupted one in the folder was left.

    That one goes on in its own precision (`amp`), which may have been measured elsewhere. Raises NKATError when the
    folder holds a run with other settings.
    """
    saved = folder / "last.pt"
    content = checkpoint.load(saved, "run") if saved.exists() else None
    if content is not None:
        kept = checkpoint.recipe_of(content, saved)  # with defaults for settings that are newer than it
        recipe = with_amp(recipe, kept.train.amp)
        if kept != recipe:
            raise NKATError(f"{folder}: holds a run with other settings")
    config = recipe.train
    if content is None:
        check_schedule(config)
    train, held = split(whole, config.validation, config.seed, config.limit_train or None)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, train, held, world, folder, label=label, judge_last=False)
    if content is not None:
        trainer.restore(content)
    return trainer
