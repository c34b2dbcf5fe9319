"""What a command asks a judge: a criterion or a rubric for comparisons, or a scale for grades."""

from ..config.judge_options import JudgeOptions
from ..config.judging import Judge
from ..errors import InputError
from .grading import load_scale
from .prompts import Criterion, load_criterion
from .reading import as_asked


def question_of(config: JudgeOptions) -> Criterion:
    """Raises InputError as load_criterion and as_asked do, and for a rubric whose judge answers no questions."""
    if isinstance(config, Judge) and config.scale:
        return load_scale(config.criterion, config.prompt_noun)
    criterion = load_criterion(config.criterion, config.prompt_noun)
    if isinstance(config, Judge) and config.backend == "scorer" and criterion.rows_each > 1:
        hint = "use --backend openai, or name one criterion"
        raise InputError(f"--criterion {config.criterion}: a scorer has one score, not one for each criterion", hint)
    return as_asked(criterion, config)
