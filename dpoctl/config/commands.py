"""The commands by name, each with its config class."""

from .dpo import TrainDPO
from .files import Merge, Prepare, Report
from .ilql import TrainILQL
from .judging import Judge
from .make_prefs import MakePrefs
from .ppo import TrainPPO
from .preview import Preview
from .sampling import Evaluate, Sample, Score
from .training import SFT, TrainRM

COMMANDS = {
    "prepare": Prepare,
    "preview": Preview,
    "sft": SFT,
    "make-prefs": MakePrefs,
    "train-dpo": TrainDPO,
    "train-rm": TrainRM,
    "train-ppo": TrainPPO,
    "train-ilql": TrainILQL,
    "sample": Sample,
    "score": Score,
    "evaluate": Evaluate,
    "judge": Judge,
    "merge": Merge,
    "report": Report,
}
