"""The one training loop: global batch, gradient, update, log, evaluation, checkpoint. All training stages share it.

A task gives plain functions: the micro-batches of an update, the loss of one, and what to measure. The loss of a
micro-batch is its share of the global mean, so that micro-batches and ranks add up to the same gradient.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import log
from ..errors import Interrupted, NumericalError
from ..models.blocks import recompute_activations
from ..outputs import claims, cleanup, files
from ..runtime import collectives, devices, fsdp, replicated, signals
from ..runtime.fsdp_root import is_sharded
from . import checkpoints
from .metrics import Board, Log, Meter, rounded


@dataclass
class Task:
    """What is trained, by functions.

    `micro_batches(step)`: this rank's micro-batches of update `step` (0-based). `loss(micro)`: (loss, sums) where the
    micro-batches' losses of all ranks add up to the global mean and sums is name -> (total, weight) of figures to log.
    `tokens(micro)`: tokens it forwards. `where(step)`: the batch in words, for an error. `evaluate()`: held-out figures.
    `idle()`: any loss that reaches all weights, for a rank that has fewer micro-batches where all must run as many.
    `point(step)`: a row for eval.jsonl and the completions it rests on. `watch(row)`: looks at each logged row and may warn or raise.

    A step that is more than one update gives `update(step, run)` in place of micro_batches and loss: it calls
    `run.optimize` as often as it needs and returns the loss to show. `state` is saved and restored with checkpoints.
    `best` names a held-out figure: the weights where it was highest are those that are saved in the end. `wrap_up()`
    may change the model after that and returns figures. `timing()`: seconds by part since the last line. `saved`: the
    model of the run directory, where more than it is trained.
    """

    steps: int
    tokens: Callable[[Any], int]
    epoch: Callable[[int], float]
    where: Callable[[int], str]
    micro_batches: Callable[[int], list] | None = None
    loss: Callable[[Any], tuple[torch.Tensor, dict[str, tuple[float, float]]]] | None = None
    idle: Callable[[], torch.Tensor] | None = None
    update: Callable[[int, "Run"], float] | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    point: Callable[[int], tuple[dict[str, Any], list[dict]]] | None = None
    watch: Callable[[dict[str, float]], None] = lambda row: None
    wrap_up: Callable[[], dict[str, Any]] = dict
    timing: Callable[[], dict[str, float]] = dict
    count: str = "examples"
    best: str = ""
    saved: Any = None
    state: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def listed(rows: Iterable, most: int = 32) -> str:
    """The rows of a batch, by their lines or ids, as an error names them."""
    rows = list(rows)
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def make_optimizer(config, model) -> torch.optim.Optimizer:
    parameters = replicated.trainable(model)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.lr, weight_decay=config.weight_decay)
    eps = getattr(config, "adam_eps", 1e-8)
    fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over memory in place of ten
    return torch.optim.AdamW(
        parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999), eps=eps, fused=fused
    )


def clip_gradients(model, limit: float) -> float:
    """The gradients' norm; they are scaled down to `limit` where it is larger (0: never)."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit and bool(norm > limit):  # else nothing is written: a pass over all gradients saved
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def learning_rate(config, step: int, steps: int) -> float:
    """Learning rate of update `step` (0-based): a linear rise over the warm-up, then constant, linear or cosine."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = max(0.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.schedule]
    return config.lr * rise * fall


def train(
    model, tokenizer, task: Task, config, output: claims.Output, device: torch.device, dtype: torch.dtype
) -> None:
    """Run `task` to its end from where the last checkpoint stands, then save the model and write the manifest.

    Raises Interrupted (state saved) on a signal, NumericalError on a non-finite loss or gradient norm, before the
    update that it would have spoilt.
    """
    out = Path(config.out)
    if config.warmup_steps >= task.steps:
        log.warn(
            f"the warm-up of {config.warmup_steps} updates is longer than the run of {task.steps}: "
            f"the learning rate ends at {learning_rate(config, task.steps - 1, task.steps):.3g} of {config.lr:.3g}"
        )
    if config.activation_checkpointing:
        recompute_activations(model)
    replicated.broadcast_weights(model)
    optimizer = make_optimizer(config, model)
    state = checkpoints.load_latest(out, model, optimizer) if output.resuming else None
    state = state or {"step": 0, "sizes": {}, "tokens": 0, "meter": {}, "best": None, "task": {}}
    task.state.update(state["task"])
    if state["step"]:
        log.say(f"{out}: continues behind update {state['step']}")
    if collectives.rank() == 0:
        options = yaml.safe_dump({"stage": output.stage} | output.options, sort_keys=False)
        files.write_atomic(out / "config.yaml", options)
    logs = {name: Log(out / f"{name}.jsonl", state["sizes"].get(name, 0)) for name in ("metrics", "timing")}
    if task.point:
        kept = ("eval", "samples") if config.keep_samples else ("eval",)
        logs |= {name: Log(out / f"{name}.jsonl", state["sizes"].get(name, 0)) for name in kept}
    run = Run(model, task, config, out, device, dtype, optimizer, logs, Board(config.log_to, out, output.options))
    run.tokens, run.best = state["tokens"], state["best"]
    run.tokens_at_line, run.items_at_line = run.tokens, state["step"]
    if collectives.rank() == 0:
        run.meter.restore(state["meter"])
    if state["step"] == 0 and task.point:
        run.measure_point(0)
    last: dict[str, float] = {}
    stop = signals.stop
    with log.progress(output.stage, task.steps, "updates", state["step"]) as meter:
        if collectives.world_size() == 1:  # several ranks stop together, behind an update
            signals.at_boundary(f"update {state['step']} of {task.steps}")
        for step in range(state["step"], task.steps):
            last = run.update(step, meter) or last
            due = step + 1 < task.steps and (step + 1) % config.save_every == 0
            stopped = collectives.any_rank(bool(stop.signal))
            if due or stopped:
                run.save(step + 1)
            if stopped and step + 1 < task.steps:
                raise Interrupted(
                    f"stopped by {stop.signal or 'a signal to another rank'} behind update {step + 1} of {task.steps}; the state is saved",
                    hint="the same command again continues",
                )
    _finish(run, model, tokenizer, last, output)
    collectives.leave_ranks()


class Run:
    """What an update needs beside the task."""

    def __init__(self, model, task, config, out, device, dtype, optimizer, logs, board):
        self.model, self.task, self.config, self.out, self.device = model, task, config, out, device
        self.dtype, self.optimizer, self.logs, self.board = dtype, optimizer, logs, board
        self.meter = Meter()
        self.tokens = self.tokens_at_line = self.items_at_line = 0
        self.best: dict[str, float] | None = None
        self.seconds: dict[str, float] = {}
        self.line_time = time.monotonic()

    def update(self, step: int, meter: log.Progress) -> dict[str, float] | None:
        """One update; returns the row of metrics.jsonl where one was due."""
        config, task = self.config, self.task
        lr = learning_rate(config, step, task.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if task.update:
            loss = task.update(step, self)
        else:
            loss = self.optimize(task.micro_batches(step), task.loss, f"update {step + 1} ({task.where(step)})")
        first = collectives.rank() == 0
        self.meter.add("loss", loss if first else 0.0, float(first))
        meter.advance(1, loss=f"{loss:.4f}", **{"tok/s": f"{self._rate():.0f}"})
        return self._after(step + 1, lr)

    def optimize(self, micros: list, loss_of: Callable, where: str) -> float:
        """One optimizer step on micro-batches whose losses add up to the global mean, which is returned.

        Raises NumericalError, before the weights are touched, where loss or gradient norm is not finite.
        """
        totals = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for micro in fsdp.in_lockstep(self.model, micros, self._idle):
            with devices.autocast(self.device, self.dtype):
                loss, sums = loss_of(micro)
            loss.backward()
            totals[0] += loss.detach().double().cpu()
            totals[1] += self.task.tokens(micro)
            self.meter.add_all(sums)
        # Before the gradients: a rank that is lost is noticed here, where it can be said.
        loss, tokens = collectives.sum_over_ranks(totals).tolist()
        replicated.sum_gradients(self.model)
        norm = clip_gradients(self.model, self.config.max_grad_norm)
        self.tokens += int(tokens)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericalError(f"{where}: the loss is {loss}, the gradient norm {norm}", hint=self.last_good())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        first = collectives.rank() == 0
        self.meter.add("grad_norm", norm if first else 0.0, float(first))
        return loss

    def _idle(self) -> None:
        """A forward and backward that add nothing to the gradients."""
        with devices.autocast(self.device, self.dtype):
            loss = self.task.idle() * 0.0
        loss.backward()

    def _after(self, step: int, lr: float) -> dict[str, float] | None:
        config, task = self.config, self.task
        end = step == task.steps
        evaluate = end or (config.eval_every is not None and step % config.eval_every == 0)
        if not (end or step == 1 or step % config.log_every == 0 or (evaluate and (task.evaluate or task.point))):
            return None
        means = self.meter.take()
        row = {"step": step, "epoch": task.epoch(step), "loss": means.pop("loss"), "grad_norm": means.pop("grad_norm")}
        row |= {"lr": lr, **means}
        self._write_timing(step)
        if evaluate and task.evaluate:
            metrics = collectives.from_rank_0(task.evaluate())
            row |= {f"eval/{name}": value for name, value in metrics.items()}
            self._keep_best(step, metrics)
        if evaluate and task.point:
            self.measure_point(step)
        row = rounded(row)
        self.logs["metrics"].write(row)
        self.board.write(step, row)
        self.line_time = time.monotonic()
        task.watch(row)
        return row

    def measure_point(self, step: int) -> None:
        """A point of the frontier for eval.jsonl, and its completions for samples.jsonl where they are kept."""
        row, completions = self.task.point(step)
        self.logs["eval"].write(row)
        if self.config.keep_samples:
            self.logs["samples"].write(*({"step": step} | c for c in completions))

    def _keep_best(self, step: int, metrics: dict[str, float]) -> None:
        """Put the weights aside where the figure that decides is the highest so far."""
        if not self.task.best or (self.best and metrics[self.task.best] <= self.best["value"]):
            return
        self.best = {"step": step, "value": metrics[self.task.best]}
        where = f"update {step} ({self.task.where(step - 1)})"
        checkpoints.check_finite(self.model, None, where, self.last_good())
        self.best["sha256"] = checkpoints.save_best(self.out, self.model)

    def _rate(self) -> float:
        return (self.tokens - self.tokens_at_line) / max(time.monotonic() - self.line_time, 1e-9)

    def _write_timing(self, step: int) -> None:
        seconds = time.monotonic() - self.line_time
        parts = self.task.timing()
        for name, value in parts.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        items = (step - self.items_at_line) * self.config.batch_size
        self.logs["timing"].write(
            rounded(
                {
                    "step": step,
                    "seconds": seconds,
                    f"{self.task.count}_per_s": items / max(seconds, 1e-9),
                    "tokens_per_s": self._rate(),
                    "peak_memory_gb": devices.highest_memory_bytes(self.device) / 1e9,
                }
                | {f"seconds/{name}": value for name, value in parts.items()}
            )
        )
        self.tokens_at_line, self.items_at_line = self.tokens, step

    def save(self, step: int) -> None:
        self.meter.merge()
        sizes = {name: each.sync() for name, each in self.logs.items()}
        state = {"sizes": sizes, "tokens": self.tokens, "meter": self.meter.state, "best": self.best}
        state["task"] = self.task.state
        where = f"update {step} ({self.task.where(step - 1)})"
        checkpoints.check_finite(self.model, self.optimizer, where, self.last_good())
        checkpoints.save(self.out, step, self.model, self.optimizer, state)

    def last_good(self) -> str:
        known = sorted((self.out / "checkpoints").glob("step-*"))
        kept = f"the last good checkpoint is {known[-1]}; " if known else "no checkpoint had been written yet; "
        return kept + "a smaller --lr, a longer --warmup-steps or --dtype float32 may help"


def _finish(run: Run, model, tokenizer, last: dict[str, float], output: claims.Output) -> None:
    """Save the run directory as a Hugging Face model and write its manifest."""
    peak = devices.highest_memory_bytes(run.device)
    for each in run.logs.values():
        each.sync()
    run.board.close()
    where = f"update {run.task.steps} ({run.task.where(run.task.steps - 1)})"
    checkpoints.check_finite(model, None, where, run.last_good())
    metrics = dict(last)
    if run.best:
        checkpoints.load_best(run.out, model, run.best["sha256"])
        metrics["best_step"], metrics[f"best/{run.task.best}"] = run.best["step"], run.best["value"]
        log.say(f"{run.out}: keeps update {run.best['step']}, {run.task.best} {run.best['value']:.4f}")
    metrics |= run.task.wrap_up()
    model, trained = run.task.saved or model, model
    state = fsdp.whole(model.state_dict()) if is_sharded(trained) else None
    if collectives.rank() != 0:
        return
    saved = save_model(model, tokenizer, run.out, devices.torch_dtype(run.config.save_dtype), state)
    weights = sum(p.numel() for p in trained.parameters())
    cost = {
        "tokens": run.tokens,
        "flops": 6 * weights * run.tokens + run.task.state.get("flops", 0),
        "peak_memory_bytes": peak,
        "device": devices.device_name(run.device),
        "world_size": collectives.world_size(),
    } | {f"seconds_{name}": round(value, 3) for name, value in run.seconds.items()}
    rows = [(run.out / f"{name}.jsonl", None) for name in run.logs if name != "timing"]
    output.finish([*((p, None) for p in saved), (run.out / "config.yaml", None), *rows], run.task.notes | metrics, cost)
    cleanup.prune(run.out, run.config.keep_checkpoints, best=False)  # last: until the manifest stands they are needed
    log.say(f"{run.out}: {run.task.steps} updates, loss {last.get('loss', float('nan')):.4f}")


def save_model(
    model, tokenizer, out: Path, dtype: torch.dtype, state: dict[str, torch.Tensor] | None = None
) -> list[Path]:
    """Save model and tokenizer as an ordinary Hugging Face directory, each file whole or absent.

    `state` are the weights, where the model itself holds but a share of them.
    """
    import shutil

    tmp = out / ".saving"
    shutil.rmtree(tmp, ignore_errors=True)
    if state is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    elif dtype != torch.float32:
        model = model.to(dtype)
    model.config.dtype = dtype
    # an adapter's embeddings are the base's, also where train-rm gave them a row for padding: it does so again
    only = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with files.writing(tmp, sum(p.numel() * p.element_size() for p in model.parameters())):
        model.save_pretrained(tmp, state_dict=state, **only)
        (tmp / "README.md").unlink(missing_ok=True)  # peft's card, full of blanks
        if hasattr(model.config, "reward_shift"):  # what a reward's adapters cannot say
            model.config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        return files.move_into(tmp, out)
