"""The peers' side of the benchmark, in an environment of its own: TRL's trainers, transformers' generate. One JSON
line."""

import json
import resource
import statistics
import sys
import tempfile
import time


def train(
    command: str,
    model: str,
    data: str,
    pairs: int,
    each: int,
    steps: int,
    tuned: bool,
    dtype: str,
    device: str = "cpu",
) -> dict:  # the arguments of one line of JSON
    """Pairs per second of the updates after the first, the first one's loss and gradient norm; `each` pairs a forward.

    Default: TRL's own settings. Tuned: no gradient checkpointing and, for DPO, reference log-probs computed beforehand;
    the caller sets the allocator's environment. `dtype` is what TRL computes in: bfloat16 is its default.
    """
    import datasets
    import transformers
    import trl

    rows = [json.loads(line) for line in open(data)]
    table = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{model}/policy")
    settings = {"gradient_checkpointing": False} if tuned else {}
    common = {
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": pairs // each,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "max_length": 512,
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "bf16": dtype == "bfloat16",
    }
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
            trainer = trl.DPOTrainer(
                model=policy,
                ref_model=reference,
                args=trl.DPOConfig(out, **common, **settings),
                train_dataset=table,
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        else:
            reward = transformers.AutoModelForSequenceClassification.from_pretrained(f"{model}/reward", num_labels=1)
            trainer = trl.RewardTrainer(
                model=reward,
                args=trl.RewardConfig(out, **common, **settings),
                train_dataset=table,
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        trainer.train()
    first = next(row for row in logs if "grad_norm" in row)
    return {
        "rate": pairs / statistics.median(times[1:]),
        "loss": float(first["loss"]),
        "grad_norm": float(first["grad_norm"]),
    }


def ppo(model: str, episodes: int, tokens: int, tuned: bool, dtype: str) -> dict:
    """Updates per second of TRL's last PPO: one update of `episodes` rollouts, 4 passes of 4 micro-batches each."""
    import datasets
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{model}/policy", padding_side="left")
    rows = [json.loads(line)["prompt"] for line in open(f"{model}/prompts.jsonl")]
    table = datasets.Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in rows])
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(f"{model}/{name}") for name in ("policy", "reference")
    )
    reward, value = (
        transformers.AutoModelForSequenceClassification.from_pretrained(f"{model}/reward", num_labels=1)
        for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as out:
        args = PPOConfig(
            out,
            per_device_train_batch_size=episodes // 4,
            gradient_accumulation_steps=4,
            num_ppo_epochs=4,
            num_mini_batches=1,
            total_episodes=episodes,
            response_length=tokens,
            learning_rate=1e-6,
            num_sample_generations=0,
            local_rollout_forward_batch_size=episodes,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            bf16=dtype == "bfloat16",
            gradient_checkpointing=not tuned,
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=table,
            eval_dataset=table,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"rate": 1 / seconds}


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
    if what in ("sample", "train-ppo"):
        result = {"sample": sample, "train-ppo": ppo}[what](**arguments)
    else:
        result = train(what, **arguments)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("RESULT " + json.dumps(result))
