"""Points of the reward-KL frontier during training (2305.18290, section 6.1): what --eval-prompts asks for."""

from typing import TYPE_CHECKING, Any

from .. import log
from ..data.readers import load_rows
from ..inference.completions import prompt_set
from ..inference.policy_evaluation import PolicyEvaluation, Reference
from ..inference.scorers import Scorer, load_scorer, scorer_options
from ..models.load import Loaded, context_length
from ..runtime import collectives, devices, fsdp
from . import setup
from .options import FrontierOptions

if TYPE_CHECKING:
    from .task import Task

# what tells the points of a sweep apart
_OPTIONS = ("beta", "loss", "alpha", "soft_labels", "sync_ref_every", "target_kl", "kl_coef", "preset")


class FrontierEvaluation:
    """Measures the reward of a policy's completions and its KL to the reference, at any update.

    `reference` is the task's, where it has one in memory; with adapters on --model it is a copy of the policy at the
    start that shares the frozen weights. Otherwise it is loaded for a point, and kept for the next ones where memory
    allows. `trained_on` holds the ids of the training prompts: an overlap is warned of, since the reward on prompts
    seen in training says little.
    """

    def __init__(
        self,
        config: FrontierOptions,
        task: "Task",
        method: str,
        trained_on: set[tuple[int, ...]],
        reference: Reference | None = None,
    ):
        assert config.eval_prompts is not None
        self.config = config
        self.policy = Loaded(task.policy, task.tokenizer, task.codec)
        self.task, self.compute, self.templates = task, task.compute, task.templates
        self.method = method
        self.reference = reference or self._start_of_adapters()
        self.learned: Scorer | None = None  # the reward that is trained on; its mean is reported next to --scorer's
        rows = load_rows(
            config.eval_prompts,
            "prompts",
            skip_bad=config.skip_bad_rows,
            columns=config.columns,
            limit=config.eval_limit,
        )
        self.prompts = prompt_set(rows, task.codec, context_length(task.policy), config.max_prompt_length)
        seen = sum(tuple(ids) in trained_on for ids in self.prompts.ids)
        if seen:
            log.warn(f"{seen} of {len(self.prompts)} prompts of {config.eval_prompts} are in the training data too")
        self.scorer = load_scorer(config.scorer, scorer_options(config, self.compute, self.templates))

    def measure(self, step: int) -> tuple[dict[str, Any], list[dict]]:
        """(a row for eval.jsonl, the completions with scores that it rests on) of the policy after update `step`."""
        config = self.config
        reference = self._reference(step)
        with self.compute.autocast():
            metrics, completions = PolicyEvaluation(self.scorer, config, config.seed).measure(
                self.policy, reference, self.prompts
            )
        if self.learned:
            metrics["learned_reward"] = sum(self.learned.score(completions).values) / len(completions)
        options = {name: getattr(config, name, None) for name in _OPTIONS}
        options = {"seed": config.seed} | {name: value for name, value in options.items() if value is not None}
        row = {"model": config.out, "method": self.method, "options": options, "step": step}
        row |= {"temperature": config.temperature, "scorer": f"{self.scorer.name}@{self.scorer.score_type}"} | metrics
        kl = f", KL {row['kl']:.2f}" if row["kl"] is not None else ""
        log.say(f"update {step}: reward {row['reward']:.3f} +- {row['reward_se']:.3f}{kl}")
        return row, completions

    def _reference(self, step: int) -> Reference:
        if self.reference is not None:
            return self.reference
        opened = self._open_reference()
        # Before the first update it is not known how much memory training takes.
        room = step > 0 and devices.has_room(self.compute.device, fsdp.bytes_of(opened.model))
        if not collectives.any_rank(not room):
            self.reference = opened
        return opened

    def _start_of_adapters(self) -> Reference | None:
        """The policy before its training, where only adapters are trained, and from the reference."""
        task = self.task
        if not task.adapters or self.config.reference != (task.config.model, task.config.revision):
            return None
        start = setup.frozen_start(task.config, task.policy)
        return None if start is None else Reference(start)

    def _open_reference(self) -> Reference:
        model = self.task.open_model(*self.config.reference).model
        setup.shard_model(self.task.config, model, self.compute)
        return Reference(model)
