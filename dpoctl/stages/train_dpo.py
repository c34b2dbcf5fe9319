"""DPO and its relatives: reference log-probs once, then updates on pairs whose completions are forwarded once."""

import torch

from .. import log
from ..config.training import LOSS_OPTIONS, TrainDPO
from ..data.encode import PairData, encode_pairs
from ..data.schema import load_rows
from ..data.tokens import fingerprint
from ..errors import NumericalError
from ..models.hub import resolve
from ..models.logprobs import summed_logps
from ..objectives.preference import LOSSES, PairLogps
from ..outputs import claims, files
from ..runtime import collectives, devices, fsdp
from ..training import loop, pairs, setup
from ..training.plan import plan_of_pairs


def run(config: TrainDPO, output: claims.Output) -> None:
    device, dtype = setup.open_device(config, output)
    policy, tokenizer = setup.open_model(config, config.model, device)
    adapters = setup.adapt(config, policy)
    setup.share(config, policy, device, dtype)
    data = _encode(config, config.data, policy, tokenizer)
    held_out = _encode(config, config.eval_data, policy, tokenizer) if config.eval_data else None
    ref = config.ref or config.model
    objective = LOSSES[config.loss]

    seqs = pairs.sequences(data)
    ref_logps = _reference(config, ref, seqs, policy, tokenizer, device, dtype)
    settings = {name: getattr(config, name) for name in LOSS_OPTIONS[config.loss] if getattr(config, name) is not None}
    stream = pairs.pair_stream(data, config, config.shuffle)

    def compare(batch: pairs.PairBatch, data_, seqs_, ref_, z=None) -> PairLogps:
        """The policy's and the reference's log-probs of a micro-batch's pairs."""
        own = pairs.batch_logps(policy, seqs_, batch)
        other = ref_[batch.completions].to(device)
        tokens = torch.tensor([float(len(data_.completions[i])) for i in batch.completions], device=device)
        w, l = batch.pairs.to(device).unbind(1)  # noqa: E741
        return PairLogps(own[w], own[l], other[w], other[l], tokens[w], tokens[l], z)

    def idle() -> torch.Tensor:
        return summed_logps(policy, [([0, 0], 1)]).sum()

    def batch_mean(batches) -> torch.Tensor:
        """Mean of c and r over the global batch, without gradient (KTO's z)."""
        total = torch.zeros((), device=device)
        with torch.no_grad(), devices.autocast(device, dtype):
            for batch in fsdp.in_lockstep(policy, batches, idle):
                p = compare(batch, data, seqs, ref_logps)
                total += (p.c.sum() + p.r.sum()) / (2 * batch.n_global)
        return collectives.sum_over_ranks(total)

    def micro_batches(step: int) -> list:
        batches = pairs.micro_batches(
            data, stream.batch(step), config.tokens_per_batch, collectives.rank(), collectives.world_size()
        )
        z = batch_mean(batches) if objective.needs_batch_mean else None
        return [(batch, z) for batch in batches]

    def loss(micro) -> tuple[torch.Tensor, dict]:
        batch, z = micro
        p = compare(batch, data, seqs, ref_logps, z)
        losses = objective.loss(p, config.beta, **settings)
        return losses.sum() / batch.n_global, _metrics(p, config.beta)

    def evaluate() -> dict[str, float]:
        return _evaluate(
            config, policy, idle, held_out, held_seqs, held_ref, compare, objective, settings, device, dtype
        )

    if held_out:
        held_seqs = pairs.sequences(held_out)
        held_ref = _reference(config, ref, held_seqs, policy, tokenizer, device, dtype)
    _check_start(
        config,
        policy,
        idle,
        ref,
        compare,
        micro_batches,
        data,
        seqs,
        ref_logps,
        device,
        dtype,
        fresh=not output.resuming,
    )
    point = setup.frontier_point(
        config, policy, tokenizer, device, dtype, method_name(config), ref, {tuple(p) for p in data.prompts}
    )
    task = loop.Task(
        steps=stream.steps,
        count="pairs",
        epoch=lambda step: stream.epoch(step),
        loss=loss,
        idle=idle,
        point=point,
        micro_batches=micro_batches,
        tokens=lambda micro: pairs.batch_tokens(data, micro[0]),
        where=lambda step: "rows at lines " + loop.listed(data.lines[i] for i in stream.batch(step)),
        evaluate=evaluate if held_out else None,
        watch=Watch(config, objective.bounded_below),
        saved=adapters,
        notes=dict(data.counts),
    )
    loop.train(policy, tokenizer, task, config, output, device, dtype)


def method_name(config: TrainDPO) -> str:
    return "dpo" if config.loss == "sigmoid" else config.loss


def _encode(config: TrainDPO, path: str, policy, tokenizer) -> PairData:
    rows = load_rows(path, "preferences", skip_bad=config.skip_bad_rows)
    max_length, max_prompt = setup.lengths(config, policy)
    data = encode_pairs(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt)
    log.say(f"{path}: {len(data.pairs)} pairs over {len(data.completions)} completions of {len(data.prompts)} prompts")
    for name, what in (
        ("truncated", "were cut to length"),
        ("equal_dropped", "are equal on both sides: dropped"),
        ("empty_dropped", "have an empty side: dropped"),
    ):
        if data.counts.get(name):
            log.say(f"{path}: {data.counts[name]} pairs {what}")
    return data


def _reference(config, ref: str, seqs, policy, tokenizer, device, dtype) -> torch.Tensor:
    """Reference log-probs [completions]; zeros for an objective that knows no reference."""
    if not LOSSES[config.loss].needs_reference:
        return torch.zeros(len(seqs))

    def load():
        if ref == config.model:
            return policy  # untouched so far: the very same weights
        reference, other = setup.open_model(config, ref, device)
        setup.same_tokenizer(tokenizer, other, config.model, ref)
        setup.share(config, reference, device, dtype)
        return reference

    key = {
        "weights": files.sha256_path(resolve(ref, config.revision)),
        "tokenizer": fingerprint(tokenizer),
        "dtype": str(dtype),
        "device": device.type,
        "format": 1,
    }
    return pairs.reference_logps(load, key, seqs, config, device, dtype)


def _metrics(p: PairLogps, beta: float) -> dict[str, tuple[float, float]]:
    """Sums and weights of what the log shows: implicit rewards, margins, accuracy, log-probs, lengths."""
    n = float(len(p.chosen))
    margin = beta * p.d.detach()
    metrics = {
        "rewards/chosen": beta * p.c,
        "rewards/rejected": beta * p.r,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(),
        "logps/chosen": p.chosen,
        "logps/rejected": p.rejected,
        "length/chosen": p.chosen_tokens,
        "length/rejected": p.rejected_tokens,
    }
    sums = torch.stack([v.detach().double().sum() for v in metrics.values()]).tolist()
    return {name: (total, n) for name, total in zip(metrics, sums, strict=True)}


@torch.no_grad()
def _evaluate(config, policy, idle, data, seqs, ref, compare, objective, settings, device, dtype) -> dict[str, float]:
    """The log's figures and the loss over all held-out pairs."""
    from ..training.metrics import Meter

    meter = Meter()
    everything = list(range(len(data.pairs)))
    batches = pairs.micro_batches(
        data, everything, config.tokens_per_batch, collectives.rank(), collectives.world_size()
    )
    with devices.autocast(device, dtype):
        compared = [compare(batch, data, seqs, ref) for batch in fsdp.in_lockstep(policy, batches, idle)]
    z = None
    if objective.needs_batch_mean:
        z = collectives.sum_over_ranks(
            sum((p.c.sum() + p.r.sum() for p in compared), torch.zeros((), device=device)) / (2 * len(everything))
        )
    for p in compared:
        p = PairLogps(p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, p.chosen_tokens, p.rejected_tokens, z)
        meter.add("loss", objective.loss(p, config.beta, **settings).double().sum().item(), float(len(p.chosen)))
        meter.add_all(_metrics(p, config.beta))
    return meter.take()


@torch.no_grad()
def _check_start(
    config, policy, idle, ref, compare, micro_batches, data, seqs, ref_logps, device, dtype, *, fresh: bool
) -> None:
    """Before the first update, a policy that is its reference has log-ratios of 0: checked, and said."""
    if not LOSSES[config.loss].needs_reference or not fresh:
        return
    with devices.autocast(device, dtype):
        micros = fsdp.in_lockstep(policy, micro_batches(0), idle)
        ratios = [compare(micro[0], data, seqs, ref_logps) for micro in micros]
    own = max((float(torch.stack([p.c, p.r]).abs().max()) for p in ratios), default=0.0)
    largest = max(collectives.gather(own))
    same = files.sha256_path(resolve(ref, config.revision)) == files.sha256_path(resolve(config.model, config.revision))
    limit = 1e-2 if dtype == torch.float32 else 2.0  # rounding of a sum over a response, not a difference of models
    if same and largest > limit:
        raise NumericalError(
            f"policy and reference are the same model, yet a log-ratio of the first batch is {largest:.3g}",
            hint="a cache from other software or hardware? give another --cache-dir",
        )
    log.say(
        f"log-ratios before the first update: at most {largest:.1e}"
        + ("" if same else " (the policy does not start from its reference)")
    )


class Watch:
    """Looks at each logged row: warns once where both log-probs fall together, and where an unbounded loss runs away."""

    def __init__(self, config: TrainDPO, bounded_below: bool):
        self.config, self.bounded_below = config, bounded_below
        self.first: dict[str, float] | None = None
        self.warned: set[str] = set()

    def __call__(self, row: dict[str, float]) -> None:
        self.first = self.first or row
        chosen, rejected = (row[f"logps/{s}"] - self.first[f"logps/{s}"] for s in ("chosen", "rejected"))
        if chosen < -0.1 * abs(self.first["logps/chosen"]) and rejected < -0.1 * abs(self.first["logps/rejected"]):
            self._once(
                "displacement",
                f"update {row['step']}: the log-probs of chosen and rejected fall together "
                f"({chosen:+.1f} and {rejected:+.1f} nats since the first update): likelihood displacement. "
                "A larger --beta, a smaller --lr, or --loss rpo or dpop holds the chosen up",
            )
        if not self.bounded_below and rejected < -3.0 * abs(self.first["logps/rejected"]):
            self._once(
                "runaway",
                f"update {row['step']}: --loss {self.config.loss} has no lower bound and is running away "
                f"(rejected log-probs {rejected:+.0f} nats). A smaller --lr, fewer updates or a smaller weight of that term",
            )

    def _once(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            log.warn(text)


def plan(config: TrainDPO) -> dict:
    return plan_of_pairs(
        config, "policy", lambda model, sequences: summed_logps(model, sequences).sum(), config.shuffle
    )
