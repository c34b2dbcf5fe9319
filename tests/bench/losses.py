"""Every objective that TRL has too, on the same batch: loss and gradients, dpoctl beside TRL (`make bench-losses`).

Prints a table, and exits with 1 where a loss, or a gradient by its norm, differs by more than 1e-5.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import inputs
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
LARGEST = 1e-5
BETA = 0.3
PLAIN = {"ld_alpha": None, "wpo": False, "f_divergence": "reverse-kl", "f_alpha": 0.5}
# name -> (our loss, its options, our other options, TRL's arguments)
CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "sigmoid": ("sigmoid", {}, {}, {"loss_type": "sigmoid"}),
    "robust": ("robust", {"label_smoothing": 0.2}, {}, {"loss_type": "robust", "label_smoothing": 0.2}),
    "ipo-mean (ipo)": ("ipo-mean", {}, {}, {"loss_type": "ipo"}),
    "hinge": ("hinge", {}, {}, {"loss_type": "hinge"}),
    "sigmoid-norm": ("sigmoid-norm", {}, {}, {"loss_type": "sigmoid_norm"}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.01}, {}, {"loss_type": "exo_pair", "label_smoothing": 0.01}),
    "nca_pair": ("nca_pair", {}, {}, {"loss_type": "nca_pair"}),
    "bco_pair, mean 0": ("bco_pair", {}, {}, {"loss_type": "bco_pair"}),  # TRL's has no running mean
    "sppo_hard": ("sppo_hard", {}, {}, {"loss_type": "sppo_hard"}),
    "aot": ("aot", {"label_smoothing": 0.1}, {}, {"loss_type": "aot", "label_smoothing": 0.1}),
    "aot_unpaired": ("aot_unpaired", {}, {}, {"loss_type": "aot_unpaired"}),
    "apo_zero": ("apo_zero", {}, {}, {"loss_type": "apo_zero"}),
    "apo_down": ("apo_down", {}, {}, {"loss_type": "apo_down"}),
    "discopop": ("discopop", {"discopop_tau": 0.5}, {}, {"loss_type": "discopop", "discopop_tau": 0.5}),
    "sft": ("sft", {}, {}, {"loss_type": "sft"}),
    "sum": (
        "sigmoid:0.8,nca_pair:0.2,sft:1",
        {},
        {},
        {"loss_type": ["sigmoid", "nca_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "forward KL": ("sigmoid", {}, {"f_divergence": "forward-kl"}, {"f_divergence_type": "forward_kl"}),
    "JS": ("hinge", {}, {"f_divergence": "js"}, {"loss_type": "hinge", "f_divergence_type": "js_divergence"}),
    "alpha": (
        "sigmoid",
        {},
        {"f_divergence": "alpha", "f_alpha": 0.3},  # its exponent is ours from 1
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "WPO": ("sigmoid", {}, {"wpo": True}, {"use_weighting": True}),
    "LD": ("sigmoid", {}, {"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
}


def make(folder: Path) -> list[dict]:
    """A policy, a reference and a batch of token ids with completions of different lengths."""
    from helpers.encoding import build
    from helpers.tiny_models import tiny_model

    tokenizer = build("bpe")
    for name in ("policy", "reference"):
        model = tiny_model("gpt2", vocab=len(tokenizer), context=64, width=32, heads=2, std=0.1)
        if name == "reference":
            for p in model.parameters():
                p.data += 0.02 * torch.randn_like(p)
        model.save_pretrained(folder / name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.save_pretrained(folder / name)
    draw = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(0, len(tokenizer), (n,), generator=draw).tolist()

    batch = [{"prompt_ids": ids(2, 8), "chosen_ids": ids(1, 24), "rejected_ids": ids(1, 24)} for _ in range(12)]
    (folder / "batch.json").write_text(json.dumps(batch))
    return batch


def ours(folder: Path, batch: list[dict], case: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of dpoctl, in micro-batches of a few pairs."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from dpoctl.data.encode import PairData
    from dpoctl.models.logprobs import response_logps
    from dpoctl.objectives.preference import objective_of
    from dpoctl.training import batch_statistics, pairs
    from dpoctl.training.comparison import Comparison, Dataset, prefixes_of
    from dpoctl.training.targets import Targets

    logging.disable_progress_bar()
    loss_name, options, changes, _ = CASES[case]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("policy", "reference"))
    data, n = PairData(), len(batch)
    for i, row in enumerate(batch):
        data.prompts.append(row["prompt_ids"])
        data.completions += [row["chosen_ids"], row["rejected_ids"]]
        data.prompt_of += [i, i]
        data.pairs.append((2 * i, 2 * i + 1))
    sequences = pairs.sequences(data)
    at, cut = prefixes_of(data, sequences)
    logps = response_logps(reference, [*sequences, *cut], tokens_per_batch=10_000)
    dataset = Dataset(data, sequences, Targets(), logps, at)
    comparison = Comparison(SimpleNamespace(**(PLAIN | changes)), policy, None, torch.device("cpu"))
    objective = objective_of(loss_name)
    micros = pairs.micro_batches(data, list(range(n)), 120)
    with torch.no_grad():
        compared = [(micro.rows, comparison.compare(micro, dataset)) for micro in micros]
    found = batch_statistics.of_batch(objective, compared, list(range(n)), dataset, torch.device("cpu"))
    if objective.needs_running_mean:
        found = found.with_running_mean((0.0, 1.0))
    total = torch.zeros(())
    for micro in micros:
        each = comparison.compare(micro, dataset)
        losses = objective.loss(found.added_to(each.logps, micro.rows), BETA, **options)
        losses = losses if each.weights is None else losses * each.weights
        (losses.sum() / n).backward()
        total += losses.detach().sum() / n
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return gradients | {"loss": total.reshape(1)}


def main() -> int:
    python = inputs.FOLDER.parent / "trl-1.16.0" / "bin" / "python"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = make(folder)
        files = {case: f"case{i}" for i, case in enumerate(CASES)}
        asked = {files[case]: {"beta": BETA} | arguments for case, (*_, arguments) in CASES.items()}
        subprocess.run([str(python), str(HERE / "peer_losses.py"), name, json.dumps(asked)], check=True, cwd=HERE)
        print(f"{'objective':20} {'TRL':>11} {'dpoctl':>11} {'difference':>11} {'of gradient':>12}")
        worst = 0.0
        for case, file in files.items():
            theirs, mine = load_file(folder / f"{file}.safetensors"), ours(folder, batch, case)
            assert theirs.keys() == mine.keys()
            loss = [float(found.pop("loss")) for found in (theirs, mine)]
            norm = torch.stack([g.double().norm() for g in theirs.values()]).norm()
            off = torch.stack([(theirs[n] - mine[n]).double().norm() for n in theirs]).norm() / norm
            difference = abs(loss[0] - loss[1]) / max(1.0, abs(loss[0]))
            worst = max(worst, difference, float(off))
            print(f"{case:20} {loss[0]:11.6f} {loss[1]:11.6f} {difference:11.1e} {off:12.1e}")
    print(f"largest difference {worst:.1e}, of which {LARGEST:g} are allowed")
    return int(not worst <= LARGEST)


if __name__ == "__main__":
    sys.exit(main())
