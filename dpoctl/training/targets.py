"""What rows say of their pairs beside which completion is better: scores and weights, and the scale of the scores."""

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from .. import log
from ..config.dpo import VOTES
from ..config.scorer import parse_scorer
from ..data.encode import PairData
from ..data.readers import Rows
from ..errors import InputError
from ..objectives.catalogue import traits_of
from ..outputs.manifests import read_manifest
from ..runtime import pipes
from ..runtime.hub_data import is_hub_data


class TargetOptions(Protocol):
    """What train-dpo reads of the rows."""

    @property
    def loss(self) -> str: ...
    @property
    def soft_labels(self) -> float | str | None: ...
    @property
    def score_type(self) -> str | None: ...
    @property
    def use_weights(self) -> bool: ...


@dataclass(frozen=True)
class Targets:
    """Of every pair [N] float32, where a loss reads it: `gap`, the chosen completion's score less the rejected one's;
    `label`, the probability that the chosen one is better; `weights`, of mean 1."""

    gap: Tensor | None = None
    label: Tensor | None = None
    weights: Tensor | None = None


def reads_scores(config: TargetOptions) -> bool:
    """Whether the loss reads the rows' scores."""
    return _tau(config) is not None or traits_of(config.loss).needs_scores


def _tau(config: TargetOptions) -> float | None:
    """TAU of --soft-labels; None without it, and with votes."""
    return None if isinstance(config.soft_labels, str) else config.soft_labels


def targets_of(config: TargetOptions, rows: Rows, data: PairData) -> Targets:
    """The targets of the pairs of `data`, which were encoded from `rows`.

    Raises InputError, naming file, line and field, for a row without what is read, and where all weights are 0.
    """
    gap = label = weights = None
    if reads_scores(config):
        gap, tau = torch.tensor(_gaps(config, rows, data), dtype=torch.float64), _tau(config)
        label = None if tau is None else torch.sigmoid(gap / tau)
        _say_gaps(rows.path, gap, label)
    if config.soft_labels == VOTES:
        label = _shares(rows, data)
    if config.use_weights:
        weights = _weights(rows, data)
    elif any(weight is not None for weight in data.weights):
        log.warn(f"{rows.path}: the rows' 'weight' is not used; --use-weights weights the loss by it")
    if label is not None:
        label = label.float()
    return Targets(None if gap is None else gap.float(), label, weights)


def _gaps(config: TargetOptions, rows: Rows, data: PairData) -> list[float]:
    what = f"--loss {config.loss}" if _tau(config) is None else "--soft-labels"
    found = []
    for (chosen, rejected), line in zip(data.scores, data.lines, strict=True):
        if chosen is None or rejected is None:
            field = "chosen_score" if chosen is None else "rejected_score"
            hint = "make-prefs writes both scores; of other rows --columns names the columns that hold them"
            _refuse(rows, line, field, what, hint)
        found.append(chosen - rejected)
    return found


def _shares(rows: Rows, data: PairData) -> Tensor:
    """The share of the votes for the chosen completion [N] float64."""
    hint = "make-prefs --judgements and --judge write it; --columns chosen_share=COLUMN names another column"
    for share, line in zip(data.shares, data.lines, strict=True):
        if share is None:
            without = sum(each is None for each in data.shares)
            _refuse(
                rows,
                line,
                "chosen_share",
                "--soft-labels votes",
                f"{without} of {len(data.shares)} pairs have none; {hint}",
            )
        if not 0 <= share <= 1:
            place = line if isinstance(line, str) else f"{rows.path}:{line}"
            raise InputError(f"{place}: field 'chosen_share': expected a number from 0 to 1, got {share:g}", hint)
    label = torch.tensor(data.shares, dtype=torch.float64)
    unanimous, turned = int((label == 1).sum()), int((label < 0.5).sum())
    log.say(
        f"{rows.path}: votes: {label.mean():.3f} for the chosen completion on average; "
        f"{unanimous} of {len(label)} pairs unanimous"
    )
    if unanimous == len(label):
        log.warn(f"{rows.path}: every vote is unanimous, so that labels are hard; one judge has one vote on a pair")
    if turned:
        log.warn(f"{rows.path}: in {turned} of {len(label)} pairs the chosen completion has fewer votes; shares decide")
    return label


def _weights(rows: Rows, data: PairData) -> Tensor:
    """[N] float32 of mean 1."""
    for weight, line in zip(data.weights, data.lines, strict=True):
        if weight is None:
            hint = "give every row one; --columns weight=COLUMN names the column that holds it"
            _refuse(rows, line, "weight", "--use-weights", hint)
    weights = torch.tensor(data.weights, dtype=torch.float64)
    mean = weights.mean()
    if not mean > 0:
        raise InputError(f"{rows.path}: every 'weight' is 0", "a row of weight 0 is not trained on")
    zeros = int((weights == 0).sum())
    log.say(
        f"{rows.path}: weights from {weights.min():g} to {weights.max():g}, divided by their mean {mean:.4g}"
        + (f"; {zeros} rows have weight 0" if zeros else "")
    )
    return (weights / mean).float()


def _refuse(rows: Rows, line: Any, field: str, what: str, hint: str) -> NoReturn:
    place = line if isinstance(line, str) else f"{rows.path}:{line}"
    raise InputError(f"{place}: field '{field}': expected a number ({what}), got nothing", hint)


def _say_gaps(path: str, gap: Tensor, label: Tensor | None) -> None:
    turned = int((gap < 0).sum())
    told = f"differences of scores: {gap.mean():.3g} on average, {gap.min():.3g} to {gap.max():.3g}"
    if label is not None:
        told += f"; soft labels: {label.mean():.3f} on average"
    log.say(f"{path}: {told}")
    if turned:
        log.warn(f"{path}: in {turned} of {len(gap)} pairs the chosen completion has the lower score; scores decide")


# --- the scale of the scores -----------------------------------------------------------------------------------------


def check_score_type(config: TargetOptions, files: tuple[str, ...], every: list[PairData]) -> None:
    """Say on which scale the scores are that a loss reads.

    Raises InputError for files of different scales, for a --score-type that a manifest contradicts, and for
    probabilities where --score-type does not say prob: their differences are at most 1, and shrink to nothing where
    the classifier is certain.
    """
    if not reads_scores(config):
        return
    known = {path: found for path in files if (found := score_type_of(path))}
    types = set(known.values())
    if len(types) > 1:
        told = ", ".join(f"{path}: {kind}" for path, kind in known.items())
        raise InputError(f"scores of different scales: {told}", "make them with the same --scorer")
    recorded = next(iter(types), None)
    if config.score_type and recorded and config.score_type != recorded:
        path = next(iter(known))
        hint = f"leave it out, or make the preferences with another --scorer, such as MODEL@{config.score_type}"
        raise InputError(
            f"--score-type {config.score_type}: by its manifest {path} has scores of type {recorded}", hint
        )
    kind = config.score_type or recorded
    if kind is None and _look_like_probabilities(every):
        hint = "--score-type prob trains on probabilities; say another type if they are something else"
        raise InputError(f"{files[0]}: every score is between 0 and 1, and no manifest says what they are", hint)
    if kind == "prob" and config.score_type is None:
        hint = "--score-type prob trains on them; make-prefs --scorer MODEL@log-odds gives scores that do not saturate"
        raise InputError(f"{next(iter(known))}: its scores are probabilities, whose differences are at most 1", hint)
    log.say(f"scores: {kind or 'of unknown scale, read as they are'}")


def score_type_of(path: str) -> str | None:
    """The type of the scores in a file of preferences, by the manifest beside it; None where that does not say."""
    if is_hub_data(path) or pipes.is_pipe(path):
        return None
    manifest = read_manifest(path)
    if manifest is None or manifest["stage"] not in ("make-prefs", "score"):
        return None
    if recorded := manifest["metrics"].get("score_type"):
        return recorded
    # a manifest of an older version: what the notation says, which of a model without one may be prob or reward
    return parse_scorer(manifest.get("options", {}).get("scorer") or "").score_type


def _look_like_probabilities(every: list[PairData]) -> bool:
    scores = [score for data in every for pair in data.scores for score in pair if score is not None]
    return bool(scores) and min(scores) >= 0 and max(scores) <= 1
