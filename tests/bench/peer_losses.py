"""The peer's side of `losses.py`, in TRL's environment: loss and gradients of DPOTrainer on one batch, by case."""

import json
import sys
import tempfile

import datasets
import torch
import transformers
import trl
from safetensors.torch import save_file
from trl.trainer.dpo_trainer import DataCollatorForPreference


def main(folder: str, cases: dict[str, dict]) -> None:
    """Write each case's loss and gradients to FOLDER/CASE.safetensors; `cases` holds DPOConfig's arguments."""
    transformers.utils.logging.disable_progress_bar()
    batch = json.load(open(f"{folder}/batch.json"))
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("policy", "reference")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/policy")
    table = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    for name, arguments in cases.items():
        with tempfile.TemporaryDirectory() as out:
            args = trl.DPOConfig(
                out, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_length=None, **arguments
            )
            trainer = trl.DPOTrainer(
                model=policy, ref_model=reference, args=args, train_dataset=table, processing_class=tokenizer
            )
        inputs = DataCollatorForPreference(pad_token_id=0)(batch)
        policy.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
        loss.backward()
        found = {n: p.grad.contiguous().clone() for n, p in policy.named_parameters() if p.grad is not None}
        save_file(found | {"loss": loss.detach().reshape(1).to(torch.float32)}, f"{folder}/{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
