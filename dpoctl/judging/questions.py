"""What a command asks a judge: a criterion or a rubric for comparisons, or a scale for grades."""

from ..config.judge_options import JudgeOptions
from ..config.judging import Judge
from ..errors import InputError
from .grading import load_scale
from .prompts import Criterion, load_criterion
from .reading import as_asked


def question_of(config: JudgeOptions) -> Criterion:
    """Raises InputError as load_criterion and as_asked do, and for a rubric where one criterion is needed."""
    if isinstance(config, Judge) and config.scale:
        return load_scale(config.criterion, config.prompt_noun)
    criterion = load_criterion(config.criterion, config.prompt_noun)
    if isinstance(config, Judge) and criterion.rows_each > 1:
        if config.backend == "scorer":
            hint = "use --backend openai, or name one criterion"
            message = "a scorer has one score, not one for each criterion"
            raise InputError(f"--criterion {config.criterion}: {message}", hint)
        if config.check:
            hint = "the better answer is known by one criterion: give a rubric of one, or a name"
            raise InputError(f"--criterion {config.criterion}: --check takes one criterion", hint)
    return as_asked(criterion, config)
