"""What every scorer is: rows in, a number for each row out; and how one is opened."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..data.chats import TemplateOptions
from ..errors import InputError
from .scorer_text import describe


@dataclass(frozen=True)
class ScorerOptions:
    """How a scorer is opened. `revision` (see `model_revisions`) and `trust_remote_code` concern models on the Hub.

    `text`: `joined` scores prompt and completion joined, `completion` the completion alone (classifiers and reward
    models only). `score_type`: a classifier's, where the notation leaves it open. `tokens_per_batch`: the most
    tokens in one forward pass, padding counted. `dtype`: the precision of forward passes. `apart` and `quantize`: how a
    reward model's adapter meets its base, as in `load_classifier`.
    """

    device: str | torch.device = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    text: str = "joined"
    score_type: str = "prob"
    tokens_per_batch: int = 16384
    templates: TemplateOptions = TemplateOptions()
    dtype: torch.dtype = torch.float32
    apart: bool = False
    quantize: str | None = None

    @property
    def joined(self) -> bool:
        """Whether prompt and completion are scored together."""
        return self.text == "joined"


@dataclass
class Scores:
    """`values`: the score of each row. `keys`: float64 numbers to compare by (log-odds for a classifier)."""

    values: list[float]
    keys: list[float]


class Scorer(ABC):
    """`name` is the SCORER as given; `score_type`: prob, logit, log-odds (classifiers), reward, implicit, python or
    remote."""

    score_type: str

    def __init__(self, name: str, options: ScorerOptions):
        self.name, self.options = name, options

    def score(self, rows: list[dict]) -> Scores:
        """The rows' scores in order; a row holds `prompt` (text or messages) and `completion`, or `text`.

        The ranks of a process group score the same rows together, each a share of them, and every rank gets all scores.
        Raises InputError, naming the row, where a score is not a finite number.
        """
        if not rows:
            return Scores([], [])
        device, dtype = torch.device(self.options.device), self.options.dtype
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # whatever surrounds it
            scores = self._score(rows)
        for row, value, key in zip(rows, scores.values, scores.keys, strict=True):
            if not (math.isfinite(value) and math.isfinite(key)):
                raise InputError(f"the scorer gave {value} for {describe(row)}", "a score must be a finite number")
        return scores

    @abstractmethod
    def _score(self, rows: list[dict]) -> Scores:
        """The scores of one row or more."""
