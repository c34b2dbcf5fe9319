"""The peers' side of the benchmark, in an environment of its own: TRL's trainers, transformers' generate. One JSON line."""

import json
import resource
import statistics
import sys
import tempfile
import time


def train(command: str, model: str, data: str, pairs: int, steps: int, tuned: bool) -> dict:
    """Pairs per second of the updates after the first, the first one's loss and gradient norm.

    Default: TRL's own settings. Tuned: no gradient checkpointing and, for DPO, reference log-probs computed beforehand;
    the caller sets the allocator's environment.
    """
    import datasets
    import transformers
    import trl

    rows = [json.loads(line) for line in open(data)]
    table = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{model}/policy")
    settings = {"gradient_checkpointing": False} if tuned else {}
    each = min(8, pairs)
    common = {"per_device_train_batch_size": each, "gradient_accumulation_steps": pairs // each, "max_steps": steps,
              "learning_rate": 1e-6, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
              "report_to": [], "max_length": 512, "use_cpu": True, "disable_tqdm": True}  # fmt: skip
    times: list[float] = []
    logs: list[dict] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter() - self.start)

        def on_log(self, args, state, control, logs=None, **kwargs):
            keep_log(logs)

    def keep_log(row):
        logs.append(row)

    with tempfile.TemporaryDirectory() as out:
        if command == "train-dpo":
            if tuned:
                settings["precompute_ref_log_probs"] = True
            policy = transformers.AutoModelForCausalLM.from_pretrained(f"{model}/policy")
            reference = transformers.AutoModelForCausalLM.from_pretrained(f"{model}/reference")
            trainer = trl.DPOTrainer(model=policy, ref_model=reference, args=trl.DPOConfig(out, **common, **settings),
                                     train_dataset=table, processing_class=tokenizer, callbacks=[Clock()])  # fmt: skip
        else:
            reward = transformers.AutoModelForSequenceClassification.from_pretrained(f"{model}/reward", num_labels=1)
            trainer = trl.RewardTrainer(model=reward, args=trl.RewardConfig(out, **common, **settings), train_dataset=table,
                                        processing_class=tokenizer, callbacks=[Clock()])  # fmt: skip
        trainer.train()
    first = next(row for row in logs if "grad_norm" in row)
    return {
        "rate": pairs / statistics.median(times[1:]),
        "loss": float(first["loss"]),
        "grad_norm": float(first["grad_norm"]),
    }


def sample(model: str, rows: int, tokens: int, dtype: str) -> dict:
    """Tokens per second of model.generate on the same prompts."""
    import torch
    import transformers
    from ours import sample_prompts

    policy = transformers.AutoModelForCausalLM.from_pretrained(f"{model}/policy", dtype=getattr(torch, dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{model}/policy", padding_side="left")
    batch = tokenizer.pad({"input_ids": sample_prompts(rows)}, return_tensors="pt")
    times = []
    for seed in range(4):
        torch.manual_seed(seed)
        start = time.perf_counter()
        ids = policy.generate(**batch, do_sample=True, top_k=0, max_new_tokens=tokens)[:, batch["input_ids"].shape[1] :]
        seconds = time.perf_counter() - start
        times.append(int(((ids != tokenizer.pad_token_id) & (ids != tokenizer.eos_token_id)).sum()) / seconds)
    return {"rate": statistics.median(times[1:])}


if __name__ == "__main__":
    what, arguments = sys.argv[1], json.loads(sys.argv[2])
    result = sample(**arguments) if what == "sample" else train(what, **arguments)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("RESULT " + json.dumps(result))
