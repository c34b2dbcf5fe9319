"""Where the figures are taken and written: `cpu` tries the code with tiny sizes, `cuda` is `make test-gpu`."""

import json
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic algorithms, before CUDA starts

import pytest
import torch


@pytest.fixture
def place(request) -> torch.device:
    """The device of a case: see `cases`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def figures(request):
    """Write a row of figures of a device: to the file in DPOCTL_GPU_FIGURES, and shown with -rP."""

    def write(place: torch.device, **row) -> None:
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
        line = json.dumps({"test": request.node.name, "torch": torch.__version__, "device": name} | row)
        print(line)
        if (file := os.environ.get("DPOCTL_GPU_FIGURES")) and place.type == "cuda":
            with open(file, "a") as out:
                out.write(line + "\n")

    return write
