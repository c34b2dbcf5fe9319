"""The training loop of all training stages: global batch, gradient, update, log, evaluation, checkpoint."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import log
from ..errors import NumericalError
from ..models import quantized
from ..models.blocks import recompute_activations
from ..models.save import check_saving, save_model
from ..outputs import cleanup, files
from ..runtime import collectives, devices, fsdp, hardware, replicated, sharing, signals
from ..runtime.fsdp_root import is_sharded
from . import checkpoints
from .metrics import Board, Log, Meter, rounded
from .optimization import clip_gradients, gradient_norm, learning_rate, make_optimizer
from .rounding import SavedChanges
from .summary import say_summary
from .task import Task


def train(task: Task) -> None:
    """Run a task from its last checkpoint to its end, then save the model and write the manifest.

    Raises Interrupted (state saved) on a signal, NumericalError on a non-finite loss or gradient norm, before the
    update that it would have spoilt.
    """
    config, steps, output = task.config, task.stream.steps, task.output
    if config.warmup_steps >= steps:
        last = learning_rate(config, steps - 1, steps)
        log.warn(
            f"the warm-up of {config.warmup_steps} updates is longer than the run of {steps}: "
            f"the learning rate ends at {last:.3g} of {config.lr:.3g}"
        )
    if config.activation_checkpointing:
        recompute_activations(task.model)
    _check_saving(task)
    replicated.broadcast_weights(task.model)
    trainer = Trainer(task)
    first_step = trainer.restore()
    if first_step == 0 and task.frontier:
        trainer.measure_frontier_point(0)
    over = trainer.out_of_patience  # known to a checkpoint that was saved after the last evaluation
    last_row = trainer.last_row() if over or first_step == steps else {}
    with log.progress(output.stage, steps, "updates", first_step) as meter:
        if collectives.world_size() == 1:  # several ranks stop together, after an update
            signals.at_boundary(f"update {first_step} of {steps}")
        for step in range(first_step, first_step if over else steps):
            last_row = trainer.update(step, meter) or last_row
            _save_and_stop(trainer, step + 1)
            if trainer.out_of_patience:
                break
    _finish(trainer, last_row)
    collectives.leave_ranks()


def _check_saving(task: Task) -> None:
    """Raise InputError, on every rank, for a model whose configuration or tokenizer cannot be saved."""
    sharing.on_rank_0(lambda: check_saving(task.saved_model, task.tokenizer, Path(task.config.out)))


def _save_and_stop(trainer: "Trainer", step: int) -> None:
    """Save a checkpoint where one is due, or where a signal stops the run after update `step`.

    After the last update one is due where the task has long work left to do, which a signal may stop.
    """
    steps, more = trainer.task.stream.steps, trainer.task.finalizes
    due = step % trainer.config.save_every == 0 if step < steps else more
    due = due or (more and trainer.out_of_patience)
    stopped = collectives.any_rank(bool(signals.stop.signal))
    if due or stopped:
        trainer.save(step)
    if stopped and (step < steps or more):
        raise sharing.stopped(f"update {step} of {steps}; the state is saved")


class Trainer:
    """The state of a run: optimizer, logs, meters, and the best weights so far."""

    def __init__(self, task: Task):
        self.task, self.config, self.compute = task, task.config, task.compute
        self.model, self.output, self.out = task.model, task.output, Path(task.config.out)
        self.step = 0  # updates so far
        self.optimizer = make_optimizer(self.config, self.model)
        dtype = devices.torch_dtype(self.config.save_dtype)
        self.saved_changes = None if dtype == torch.float32 else SavedChanges(self.model, dtype)
        self.caches_casts = not self.config.activation_checkpointing  # a pass uses each weight of a block once
        self.mfu: float | None = None
        self.flops = 0  # of this rank's updates since the last row of timing.jsonl
        self.meter = Meter()
        self.tokens = self.tokens_at_line = self.step_at_line = 0
        self.best: dict[str, Any] | None = None
        self.seconds: dict[str, float] = {}
        self.logs: dict[str, Log] = {}
        self.started = self.line_time = time.monotonic()

    def restore(self) -> int:
        """Load the last checkpoint of a run that is resumed, open the logs, and return the update to go on from."""
        task, config = self.task, self.config
        state = None
        if self.output.resuming:
            state = checkpoints.load_latest(self.out, self.model, self.optimizer, task.further_tensors)
        state = state or {"step": 0, "sizes": {}, "tokens": 0, "meter": {}, "best": None, "task": {}}
        task.state.update(state["task"])
        if state["step"]:
            log.say(f"{self.out}: resuming after update {state['step']}")
        if collectives.rank() == 0:
            options = yaml.safe_dump({"stage": self.output.stage} | self.output.options, sort_keys=False)
            files.write_atomic(self.out / "config.yaml", options)
        names = ["metrics", "timing"]
        if task.frontier:
            names += ["eval", "samples"] if task.frontier.config.keep_samples else ["eval"]
        self.logs = {name: Log(self.out / f"{name}.jsonl", state["sizes"].get(name, 0)) for name in names}
        self.board = Board(config.log_to, self.out, self.output.options)
        self.tokens, self.best = state["tokens"], state["best"]
        self.tokens_at_line, self.step_at_line = self.tokens, state["step"]
        if collectives.rank() == 0:
            self.meter.restore(state["meter"])
        self.line_time = time.monotonic()
        self.step = state["step"]
        return self.step

    def update(self, step: int, meter: log.Progress) -> dict[str, float] | None:
        """Update number `step` (0-based); returns the row of metrics.jsonl where one was due."""
        lr = learning_rate(self.config, step, self.task.stream.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.task.step(step, self)
        self._add("loss", loss)
        meter.advance(1, loss=f"{loss:.4f}", **{"tok/s": f"{self._rate():.0f}"}, **self._utilization())
        self.step = step + 1
        return self._after(self.step, lr)

    def optimize(self, micros: list, where: str) -> float:
        """One optimizer step on micro-batches whose losses add up to the global mean, which is returned.

        Raises NumericalError, before the weights are changed, where loss or gradient norm is not finite; `where` names
        the batch. The host waits for the device once, when all passes are queued.
        """
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.compute.device), 0
        for micro in fsdp.in_lockstep(self.model, micros, self._dummy_backward):
            with self.compute.autocast(cached=self.caches_casts):
                loss, sums = self.task.loss(micro)
            self.flops += self.task.flops(micro)
            loss.backward()
            total += loss.detach().double()
            tokens += self.task.tokens(micro)
            self.meter.add_all(sums)
        # Before the gradients, so that a lost rank is noticed where an error can still be reported.
        self.tokens += int(collectives.sum_over_ranks(torch.tensor(tokens)))
        replicated.sum_gradients(self.model)
        gradients = gradient_norm(self.model)
        mine, norm = self.meter.settle(total, fsdp.full(gradients))
        mean = float(collectives.sum_over_ranks(torch.tensor(mine, dtype=torch.float64)))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise NumericalError(f"{where}: the loss is {mean}, the gradient norm {norm}", hint=self.last_good())
        clip_gradients(self.model, self.config.max_grad_norm, gradients, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._add("grad_norm", norm)
        return mean

    def _add(self, name: str, value: float) -> None:
        """Add a value that is the same on all ranks to the meter, once."""
        first = collectives.rank() == 0
        self.meter.add(name, value if first else 0.0, float(first))

    def _dummy_backward(self) -> None:
        """A forward and backward pass that adds nothing to the gradients."""
        with self.compute.autocast(cached=self.caches_casts):
            loss = self.task.dummy_loss() * 0.0
        loss.backward()

    def _after(self, step: int, lr: float) -> dict[str, float] | None:
        config, task = self.config, self.task
        end = step == task.stream.steps
        evaluate = end or (config.eval_every is not None and step % config.eval_every == 0)
        evaluates = evaluate and (task.has_held_out or task.frontier is not None)
        if not (end or step == 1 or step % config.log_every == 0 or evaluates):
            return None
        means = self.meter.take()
        row = {"step": step, "epoch": task.stream.epoch(step), "loss": means.pop("loss")}
        row |= {"grad_norm": means.pop("grad_norm"), "lr": lr, **means}
        self._write_timing(step)
        found: dict[str, Any] = {}
        if evaluate and task.has_held_out:
            found = collectives.from_rank_0(task.evaluate())
            row |= {f"eval/{name}": value for name, value in found.items()}
        if task.select in found:
            self._keep_best(step, found)
        if evaluate and task.frontier:
            point = self.measure_frontier_point(step)
            if task.select == "reward":
                self._keep_best(step, collectives.from_rank_0(point))
        row = rounded(row)
        self.logs["metrics"].write(row)
        self.board.write(step, row)
        self.line_time = time.monotonic()
        task.on_log(row)
        return row

    def measure_frontier_point(self, step: int) -> dict[str, Any]:
        """A point of the frontier; it goes to eval.jsonl, and with --keep-samples its completions to samples.jsonl."""
        frontier = self.task.frontier
        assert frontier is not None
        row, completions = frontier.measure(step)
        self.logs["eval"].write(row)
        if frontier.config.keep_samples:
            self.logs["samples"].write(*({"step": step} | c for c in completions))
        return row

    def _keep_best(self, step: int, found: dict[str, Any]) -> None:
        """Save the weights aside where the metric that selects is the best so far; else count the evaluation.

        A point of the frontier whose KL is too large is not the best; before the first that is not, none are counted.
        """
        select, most = self.task.select, self.task.most_kl
        value = found[select]
        if not math.isfinite(value):
            raise NumericalError(f"{self._where(step)}: the held-out {select} is {value}", hint=self.last_good())
        sign = -1 if select == "loss" else 1
        kl = kl_of(found) if select == "reward" else None
        too_far = most is not None and (kl is None or kl > most)
        if too_far or (self.best and sign * value <= sign * self.best["value"]):
            if self.task.patience and self.best:
                self.best["waited"] = self.best.get("waited", 0) + 1
            return
        self.best = {"step": step, "value": value}
        if kl is not None:
            self.best["kl"] = kl
        checkpoints.check_finite(self.model, None, self._where(step), self.last_good())
        self.best["sha256"] = checkpoints.save_best(self.out, self.model)

    @property
    def out_of_patience(self) -> bool:
        """Whether --patience ends the run: so many evaluations found nothing better. The same on every rank."""
        patience = self.task.patience
        return bool(patience and self.best and self.best.get("waited", 0) >= patience)

    def _where(self, step: int) -> str:
        return f"update {step} ({self.task.describe(step - 1)})"

    def _rate(self) -> float:
        """Tokens per second since the last row of metrics.jsonl."""
        return (self.tokens - self.tokens_at_line) / max(time.monotonic() - self.line_time, 1e-9)

    def _utilization(self) -> dict[str, str]:
        """What the progress line shows of `_mfu`: the last row's."""
        return {} if self.mfu is None else {"mfu": f"{self.mfu:.0%}"}

    def _mfu(self, seconds: float) -> float:
        """Model FLOP utilisation: the share of all devices' peak that the updates' FLOPs are, since the last row."""
        flops = sum(collectives.gather(self.flops))
        peak = hardware.peak_flops(self.compute.device, self.compute.dtype)
        return flops / max(seconds, 1e-9) / (peak * collectives.world_size())

    def _write_timing(self, step: int) -> None:
        seconds = time.monotonic() - self.line_time
        parts = self.task.timing()
        for name, value in parts.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        items = (step - self.step_at_line) * self.config.batch_size
        utilization = self._mfu(parts.get("learning", seconds))  # PPO's other parts are not counted
        row = {
            "step": step,
            "seconds": seconds,
            f"{self.task.unit}_per_s": items / max(seconds, 1e-9),
            "tokens_per_s": self._rate(),
            "mfu": utilization,
            "peak_memory_gb": devices.highest_memory_bytes(self.compute.device) / 1e9,
        }
        self.logs["timing"].write(rounded(row | {f"seconds/{name}": value for name, value in parts.items()}))
        self.tokens_at_line, self.step_at_line, self.flops = self.tokens, step, 0
        self.mfu = utilization

    def save(self, step: int) -> None:
        """Write a checkpoint after update `step`. Called on every rank."""
        self.meter.merge()
        sizes = {name: each.sync() for name, each in self.logs.items()}
        state = {"sizes": sizes, "tokens": self.tokens, "meter": self.meter.state, "best": self.best}
        state["task"] = self.task.state
        checkpoints.check_finite(self.model, self.optimizer, self._where(step), self.last_good())
        checkpoints.save(self.out, step, self.model, self.optimizer, state, self.task.further_tensors)

    def last_row(self) -> dict[str, float]:
        """The last row of metrics.jsonl, which an earlier start wrote."""
        if collectives.rank() != 0:
            return {}
        return json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])

    def held_out_at(self, step: int) -> dict[str, float]:
        """The held-out metrics that the row of update `step` has."""
        if collectives.rank() != 0:
            return {}
        rows = map(json.loads, (self.out / "metrics.jsonl").read_text().splitlines())
        return next({k: v for k, v in row.items() if k.startswith("eval/")} for row in rows if row["step"] == step)

    def last_good(self) -> str:
        """The hint of a numerical failure: the last checkpoint, and what may help."""
        known = sorted((self.out / "checkpoints").glob("step-*"))
        kept = f"the last good checkpoint is {known[-1]}; " if known else "no checkpoint had been written yet; "
        return kept + "a smaller --lr, a longer --warmup-steps or --dtype float32 may help"


def kl_of(point: dict[str, Any]) -> float | None:
    """The KL of a point of the frontier: the exact one where there is one; None without any."""
    exact = point.get("kl_exact")
    return point["kl"] if exact is None else exact


def _finish(trainer: Trainer, last_row: dict[str, float]) -> None:
    """Save the run directory as a Hugging Face model, write its manifest, and print the summary."""
    task, out, compute = trainer.task, trainer.out, trainer.compute
    peak = devices.highest_memory_bytes(compute.device)
    for each in trainer.logs.values():
        each.sync()
    trainer.board.close()
    checkpoints.check_finite(trainer.model, None, trainer._where(trainer.step), trainer.last_good())
    metrics: dict[str, Any] = dict(last_row)
    if trainer.best:
        checkpoints.load_best(out, trainer.model, trainer.best["sha256"])
        metrics["best_step"], metrics[f"best/{task.select}"] = trainer.best["step"], trainer.best["value"]
        kl = trainer.best.get("kl")
        metrics |= trainer.held_out_at(trainer.best["step"]) | ({} if kl is None else {"best/kl": kl})
        if trainer.step < task.stream.steps:
            log.say(f"{out}: ends early, {task.patience} evaluations without a better {task.select}")
        shown = "" if kl is None else f" at KL {kl:.2f}"
        log.say(f"{out}: keeps update {trainer.best['step']}, {task.select} {trainer.best['value']:.4f}{shown}")
    elif task.most_kl is not None:
        log.warn(f"{out}: no evaluation had a KL of at most {task.most_kl:g}: the last weights are kept")
    task.updates = trainer.step
    metrics |= task.finalize()
    if trainer.saved_changes and (share := trainer.saved_changes.warn()) is not None:
        metrics["saved_changes"] = share
    saved, trained = task.saved_model, trainer.model
    state = fsdp.full_tensors(saved.state_dict()) if is_sharded(trained) else None
    if collectives.rank() != 0:
        return
    dtype = devices.torch_dtype(trainer.config.save_dtype)
    model_files = save_model(saved, task.tokenizer, out, dtype, state, task.ends) + task.save_more(dtype)
    weights = quantized.count(trained)
    cost = {
        "tokens": trainer.tokens,
        "flops": 6 * weights * trainer.tokens + task.state.get("flops", 0),
        "peak_memory_bytes": peak,
        "device": compute.name,
        "world_size": collectives.world_size(),
    } | {f"seconds_{name}": round(value, 3) for name, value in trainer.seconds.items()}
    written = [out / "config.yaml", *(out / f"{name}.jsonl" for name in trainer.logs if name != "timing")]
    task.output.finish([(path, None) for path in (*model_files, *written)], task.extra_metrics | metrics, cost)
    cleanup.prune(out, trainer.config.keep_checkpoints, best=False)  # needed until the manifest is written
    say_summary(task, trainer.step, time.monotonic() - trainer.started, trainer.tokens, peak)
