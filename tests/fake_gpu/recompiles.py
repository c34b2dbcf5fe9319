"""How often the compiled attention is compiled, on fake CUDA tensors: by Dynamo and AOTAutograd, without Inductor.

Prints JSON: `variants` after each phase, by name; `limit`, torch's; `eager`, warnings of attention that was not
compiled; `error`, where a call raised. An argument is a limit to set once the attention is compiled.
"""

import json
import os
import random
import sys
import warnings
from typing import Any

from fake_gpu import device

device.install()

import torch  # noqa: E402
import torch._dynamo.config as limits  # noqa: E402
from functorch.compile import make_boxed_func  # noqa: E402
from torch._functorch.aot_autograd import aot_module_simplified  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

from helpers.log_probs import random_sequences  # noqa: E402

variants = 0
own = torch.compile


def counting(graph: Any, example: Any) -> Any:
    """A backend that runs the graphs of forward and backward as they are."""
    global variants
    variants += 1
    compiler = lambda inner, _: make_boxed_func(inner.forward)  # noqa: E731
    return aot_module_simplified(graph, example, fw_compiler=compiler, bw_compiler=compiler)


def compile_for_counting(function: Any = None, **options: Any) -> Any:
    kept = {name: options[name] for name in ("dynamic", "fullgraph") if name in options}
    return own(function, backend=counting, **kept)


torch.compile = compile_for_counting

from dpoctl.models import packed  # noqa: E402


def attend(tokens: int, draw: random.Random, *, heads: tuple[int, int], window: int | None, trains: bool) -> None:
    """A call as a layer of `heads` (query, key) makes it, and its backward pass where it trains."""
    _, tree, *_ = packed.pack(random_sequences(tokens, draw, range(3, 99)), 1024, torch.device("cuda"), whole=False)
    shape = (len(tree.group), 64)

    def states(n: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.randn(1, shape[0], n, shape[1], device="cuda", dtype=dtype, requires_grad=trains)
        return made.transpose(1, 2)

    # rotary positions leave queries and keys in float32 under autocast
    q, k, v = states(heads[0], torch.float32), states(heads[1], torch.float32), states(heads[1], torch.bfloat16)
    with torch.set_grad_enabled(trains), torch.autocast("cuda", torch.bfloat16):
        out, _ = packed.attend(None, q, k, v, None, tree=tree, scaling=0.125, sliding_window=window)
    if trains:
        out.float().sum().backward()


def phases(draw: random.Random) -> dict[str, int]:
    """Variants after each phase of a run of a model with two windows, and of a scorer of another size."""
    found: dict[str, int] = {}
    policy, scorer = (8, 4), (16, 16)
    for name, heads, windows, trains in (
        ("reference", policy, (40, None), False),
        ("training", policy, (40, None), True),
        ("scorer", scorer, (None,), False),
        ("training goes on", policy, (40, None), True),
    ):
        for tokens in (100, 300, *(draw.randint(300, 1500) for _ in range(4))):
            for window in windows:
                attend(tokens, draw, heads=heads, window=window, trains=trains)
            if len(sys.argv) > 1:
                limits.recompile_limit = int(sys.argv[1])
        found[name] = variants
        if len(sys.argv) > 1 and name == "training":  # which asks for further variants
            break
    return found


if __name__ == "__main__":
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    torch.Tensor.pin_memory = lambda self, *_: self
    result: dict[str, Any] = {"error": "", "variants": {}}
    with warnings.catch_warnings(record=True) as caught, FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("always")
        try:
            result["variants"] = phases(random.Random(0))
        except Exception as e:
            result["error"] = f"{type(e).__name__}: {e}"
    result["limit"] = limits.recompile_limit
    result["eager"] = sum("without torch.compile" in str(w.message) for w in caught)
    print(json.dumps(result), flush=True)
    os._exit(0)
