"""What the process that forks a fault's victims has imported: each victim then starts in milliseconds.

One thread, so that a fork has no pool of threads to miss, and every run computes the same bytes.
"""

import gc
import importlib
import os
import pkgutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.backends.backend_svg  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import openai  # noqa: F401
import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import transformers.models.roberta.modeling_roberta  # noqa: F401

import dpoctl.cli.app
import dpoctl.stages
from dpoctl.tasks import toy_models  # noqa: F401

for stage in pkgutil.iter_modules(dpoctl.stages.__path__):  # a signal finds a victim in its command, not in imports
    importlib.import_module(f"dpoctl.stages.{stage.name}")

torch.set_num_threads(1)
gc.freeze()  # a collection in a forked process would copy what it looks at
