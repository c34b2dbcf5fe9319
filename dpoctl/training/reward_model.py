"""A reward model by Bradley-Terry (2305.18290, eq. 2), centred on the reference's completions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import log
from ..config.training import TrainRM
from ..data.answers import row_tokens
from ..data.encode import PairData, encode_pairs, truncate
from ..data.readers import Rows, load_rows
from ..errors import InputError
from ..models.load import Loaded, load_reward_start
from ..models.logprobs import Sequences
from ..models.rewards import last_token_rewards, rewards_of
from ..objectives.reward import bradley_terry, calibration, centring
from ..outputs.accuracy import check_groups, group_of, metrics_of, tally
from ..outputs.claims import Output
from ..runtime import sharing
from ..runtime.devices import to_device
from . import held_out as held_out_files
from . import pairs, setup
from .metrics import Sums
from .pair_task import PairTask
from .pairs import PairBatch

_MARGIN_EDGES = (0.0, 0.1, 0.25, 0.5, float("inf"))  # bins of the rows' score margins, for accuracy by margin
_EVALUATIONS_PER_EPOCH = 4


class RewardModel(PairTask):
    """A sequence classifier with one label, trained so that chosen completions get higher rewards."""

    config: TrainRM
    adapter_task = "SEQ_CLS"
    whole = True
    finalizes = True
    next_command = "dpoctl train-ppo --model {model} --reward {out} --prompts PROMPTS.jsonl --out runs/ppo"

    def __init__(self, config: TrainRM, output: Output):
        super().__init__(config, output)
        self.data, self.held_out = self._split()
        self.trains_chats = self.data.counts["chats"] > 0
        self.stream = pairs.pair_stream(self.data, config)
        if config.eval_every is None:
            per_epoch = max(1, len(self.data.pairs) // (config.batch_size * _EVALUATIONS_PER_EPOCH))
            self.config = replace(config, eval_every=per_epoch)
        self.sequences, self.held_out_sequences = pairs.sequences(self.data), pairs.sequences(self.held_out)
        self.has_held_out = True
        self.select, self.patience = "accuracy" if config.select == "best" else "", config.patience
        counts = {"train_pairs": len(self.data.pairs), "validation_pairs": len(self.held_out.pairs)}
        self.extra_metrics |= dict(self.data.counts) | counts
        self.parts = held_out_files.parts_of(self.held_out.lines, config.eval_data)
        self.by_group: dict[str, Any] = {}  # with --by: the accuracies of the model that is kept

    def load_model(self) -> Loaded:
        config = self.config
        options: dict[str, Any] = {
            "seed": config.seed,
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
            "templates": self.templates,
        }
        return setup.load(
            config,
            setup.trained_at(config, self.compute),
            lambda place: load_reward_start(config.model, place, **options),
        )

    def _split(self) -> tuple[PairData, PairData]:
        """(training, validation) pairs; no prompt is in both."""
        config = self.config
        rows, held_out_rows = held_out_files.load_rows(config, "preferences")
        data = self._encode(rows)
        self.extra_metrics |= held_out_files.counts_of(rows)
        self.groups = groups_of(held_out_rows or rows, config.by)
        if held_out_rows is None:
            data, held_out = pairs.split_by_prompt(data, config.validation, config.seed)
        else:
            every = self._encode(held_out_rows)
            held_out = pairs.without_prompts(every, data)
            if dropped := len(every.pairs) - len(held_out.pairs):
                log.warn(
                    f"{held_out_rows.path}: left out {dropped} of {len(every.pairs)} pairs whose prompts are trained on"
                )
            if not held_out.pairs:
                raise InputError(f"{held_out_rows.path}: all of its prompts are trained on", "leave --eval-data out")
        log.say(f"{rows.path}: {len(data.pairs)} pairs to train on, {len(held_out.pairs)} of other prompts held out")
        return data, held_out

    def _encode(self, rows: Rows) -> PairData:
        return encode_pairs(rows, self.codec, setup.lengths(self.config, self.model))

    # --- an update

    def micro_batches(self, step: int) -> list[PairBatch]:
        return self.pair_batches(step)

    def loss(self, micro: PairBatch) -> tuple[Tensor, Sums]:
        sequences, counts = self.texts(micro)
        routed = self.balance.watch(counts)
        rewards = last_token_rewards(self.model, sequences, routed)
        w, l = to_device(micro.pairs, self.compute.device).unbind(1)  # noqa: E741
        margin = self._margins(micro.rows) if self.config.use_margins else 0.0
        losses = bradley_terry(rewards[w], rewards[l], margin)
        sums = _sums(rewards.detach(), w, l)
        if self.config.center_rewards:
            centre = centring(rewards[w], rewards[l])
            losses = losses + self.config.center_rewards * centre
            sums["centring"] = (centre.detach().double().sum(), float(len(w)))
        balance, logged = self.balance.loss(routed, len(w) / micro.n_global)
        return losses.sum() / micro.n_global + balance, sums | logged

    def texts(self, micro: PairBatch) -> tuple[Sequences, list[float]]:
        return [self.sequences[i] for i in micro.completions], pairs.counts(micro)

    def dummy_loss(self) -> Tensor:
        return last_token_rewards(self.model, [([0, 0], 1)]).sum()

    def tokens(self, micro: PairBatch) -> int:
        return pairs.batch_tokens(self.data, micro)

    def _margins(self, rows: list[int]) -> Tensor:
        margins = [self.data.margins[i] for i in rows]
        if None in margins:
            line = self.data.lines[rows[margins.index(None)]]
            raise InputError(f"line {line}: --use-margins needs a margin in every row", "or leave it out")
        return to_device(torch.tensor(margins), self.compute.device)

    # --- around the updates

    def evaluate(self) -> dict[str, float]:
        with self.compute.autocast():
            return self._validate()[0]

    def on_log(self, row: dict[str, float]) -> None:
        if row["step"] == 1:
            log.say(f"update 1: loss {row['loss']:.4f} (log 2 is 0.6931), accuracy {row['accuracy']:.3f}")

    def finalize(self) -> dict[str, Any]:
        """Centre the rewards, then measure the model that is kept, by score margin and by confidence."""
        with self.compute.autocast():
            shift, scale = self._moments()
            metrics, details = self._validate(self._stop_if_asked)
        self.by_group = details.get("held_out_by", {})
        self.model.config.reward_shift, self.model.config.reward_scale = shift, scale
        log.say(
            f"held-out accuracy {metrics['accuracy']:.3f} on {len(self.held_out.pairs)} pairs of prompts not trained "
            f"on; rewards shifted by {shift:.3f}, divided by {scale:.3f}"
        )
        for low, high, accuracy, n in details["accuracy_by_margin"]:
            log.say(f"  score margin {low:g} to {high:g}: {accuracy:.3f} of {n}")
        held_out = {f"eval/{name}": value for name, value in metrics.items()}
        return held_out | details | {"reward_shift": shift, "reward_scale": scale}

    def _stop_if_asked(self) -> None:
        sharing.stop_together(f"update {self.updates} of {self.stream.steps}; the state is saved")

    def _validate(self, after_round: Callable[[], None] = lambda: None) -> tuple[dict[str, float], dict[str, Any]]:
        """(logged metrics, accuracy by score margin and by confidence) on the held-out pairs."""
        data = self.held_out
        used = sorted({i for pair in data.pairs for i in pair})
        sequences = [self.held_out_sequences[i] for i in used]
        tokens = self.config.tokens_per_batch
        values = rewards_of(self.model, sequences, tokens_per_batch=tokens, after_round=after_round)
        rewards = dict(zip(used, values.tolist(), strict=True))
        metrics, details = _held_out_metrics(data, rewards)
        for name, members in self.parts.items():
            if members:
                of_part, _ = _held_out_metrics(pairs.only(data, members), rewards)
                metrics |= {f"{name}/{key}": value for key, value in of_part.items()}
        if self.groups:
            groups = [self.groups[line] for line in data.lines]
            chosen, rejected = ([rewards[pair[side]] for pair in data.pairs] for side in (0, 1))
            details["held_out_by"] = metrics_of(tally(chosen, rejected, groups))
        return metrics, details

    def _moments(self) -> tuple[float, float]:
        """(shift, scale) that give the rewards of the reference's completions mean 0 (and standard deviation 1)."""
        config = self.config
        if config.normalize == "none":
            return 0.0, 1.0
        sequences: Sequences = self.sequences
        if config.reference_completions:
            sequences = self._completion_sequences(config.reference_completions)
        tokens, stop = config.tokens_per_batch, self._stop_if_asked
        rewards = rewards_of(self.model, sequences, tokens_per_batch=tokens, after_round=stop).double()
        scale = rewards.std(correction=0).item() if config.normalize == "shift-scale" else 1.0
        return rewards.mean().item(), scale or 1.0

    def _completion_sequences(self, path: str) -> list[tuple[list[int], int]]:
        """(ids, start of the completion) of the rows of a completions file, truncated to --max-length."""
        config = self.config
        limits, found = setup.lengths(config, self.model), []
        for row in load_rows(path, "completions", skip_bad=config.skip_bad_rows, columns=config.columns).rows:
            prompt, ids, _ = row_tokens(self.codec, row, finished=row.get("finish") != "length")
            prompt, ids, _ = truncate(prompt, ids, limits, self.codec.bos_of(prompt))
            found.append((prompt + ids, len(prompt)))
        return found


def groups_of(rows: Rows, column: str | None) -> dict[Any, str]:
    """The value of the column of --by of each row, by its line. Raises InputError for a row without one."""
    if column is None:
        return {}
    groups = [group_of(row, column, rows.place(i)) for i, row in enumerate(rows.rows)]
    check_groups(groups, column)
    return dict(zip(rows.lines, groups, strict=True))


def _held_out_metrics(data: PairData, rewards: dict[int, float]) -> tuple[dict[str, float], dict[str, Any]]:
    """(logged metrics, accuracy by score margin and by confidence) of pairs with the rewards of their completions."""
    values = torch.tensor([rewards[i] for i in sorted({i for pair in data.pairs for i in pair})])
    chosen, rejected = (torch.tensor([rewards[pair[side]] for pair in data.pairs]) for side in (0, 1))
    margin = chosen - rejected
    error, bins = calibration(margin)
    right = _right(margin)
    metrics = {
        "loss": bradley_terry(chosen, rejected).mean().item(),
        "accuracy": right.mean().item(),
        "margin": margin.mean().item(),
        "mean_reward": values.mean().item(),
        "min_reward": values.min().item(),
        "max_reward": values.max().item(),
        "calibration_error": error,
    }
    by_margin = []
    for low, high in zip(_MARGIN_EDGES, _MARGIN_EDGES[1:], strict=False):
        members = [i for i, m in enumerate(data.margins) if m is not None and low <= m < high]
        if members:
            by_margin.append([low, min(high, 1.0), right[members].mean().item(), len(members)])
    return metrics, {"accuracy_by_margin": by_margin, "calibration": [list(b) for b in bins]}


def _right(margin: Tensor) -> Tensor:
    """How right each pair is [P] float64: 1, 0, or a half for equal rewards, which bfloat16 gives."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def _sums(rewards: Tensor, w: Tensor, l: Tensor) -> Sums:  # noqa: E741
    """Sums and weights of what is logged: accuracy and margin over pairs, the reward over completions, its extremes."""
    margin = rewards[w] - rewards[l]
    return {
        "accuracy": (_right(margin).sum(), float(len(w))),
        "margin": (margin.double().sum(), float(len(w))),
        "mean_reward": (rewards.double().sum(), float(len(rewards))),
        "min_reward": (rewards.min(), min),
        "max_reward": (rewards.max(), max),
    }
