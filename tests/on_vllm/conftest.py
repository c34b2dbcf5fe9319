"""Models in miniature of three families, each with one vLLM for all tests of a session: a start takes a minute."""

import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch

from dpoctl.inference.engines.local import LocalEngine
from dpoctl.inference.engines.vllm_engine import VllmEngine
from dpoctl.models.load import load_policy
from dpoctl.runtime.devices import Compute
from helpers.engines import VllmOptions
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import byte_level_bpe, chat

FAMILIES = {"gpt2": byte_level_bpe, "llama": chat, "qwen2": chat}
# heads of 32: vLLM's kernels for processors have no smaller ones
SHAPE = {"context": 128, "width": 64, "heads": 2}


class Pair(NamedTuple):
    """The same model in both engines."""

    folder: str
    here: LocalEngine
    vllm: VllmEngine


def save_model(folder: Path, family: str) -> Path:
    tokenizer = FAMILIES[family]()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vocabulary = len(tokenizer) + 4  # Qwen2's tokenizer adds a token of its own
    tiny_model(family, vocab=vocabulary, **SHAPE, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def open_pair(folder: Path) -> Pair:
    policy = load_policy(str(folder))
    options = VllmOptions(("enforce_eager=true",), dtype="float32", gpu_memory_utilization=0.3)
    here = LocalEngine(policy, Compute(torch.device("cpu"), torch.float32))
    return Pair(str(folder), here, VllmEngine(options, str(folder), policy.codec, here.context))


@pytest.fixture(scope="session", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    found = open_pair(save_model(tmp_path_factory.mktemp("models") / request.param, request.param))
    found.vllm.logps = True
    yield found
    found.vllm.close()
