"""Curves in the reward-KL plane from samples of the reference alone: best-of-n and the exact optimum."""

from typing import Any

import torch

from ..errors import InputError
from ..objectives.best_of_n import expected_best
from ..objectives.kl import best_of_n_kl_bound, kl_regularised_optimum, optimal_point
from .text_statistics import mean_se

BETAS = 32
_WEAKEST, _STRONGEST = 30.0, 0.02  # range of beta, in standard deviations of the reward
SUPPORTED = 5.0  # effective samples per prompt, on average, from which a point of the optimum counts as supported


def by_prompt(rows: list[dict], values: list[float], path: str) -> torch.Tensor:
    """Values [prompts, samples]. Raises InputError unless all prompts have the same number of samples, 2 or more."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row["prompt_id"], []).append(value)
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1 or sizes == {1}:
        raise InputError(
            f"{path}: {min(sizes)} to {max(sizes)} samples per prompt; curves need the same number for each, 2 or more",
            hint="dpoctl sample --n 64 writes such a file",
        )
    return torch.tensor(list(groups.values()), dtype=torch.float64)


def best_of_n(selection_scores: torch.Tensor, truth: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of the best-of-n curve for n = 1, 2, 4, ... N: reward with its standard error over prompts, bound of the KL.

    `selection_scores` [prompts, N] select a sample; `truth` [prompts, N] is the reward of the selected one.
    """
    prompts, total = truth.shape
    sizes = sorted({2**i for i in range(total.bit_length()) if 2**i <= total} | {total})
    rows = []
    for n in sizes:
        reward, error = mean_se([float(expected_best(c, t, n)) for c, t in zip(selection_scores, truth, strict=True)])
        bound = best_of_n_kl_bound(n)
        options = {"n": n, "samples": total}
        rows.append({"options": options, "reward": reward, "reward_se": error, "kl": bound, "kl_se": 0.0, "n": prompts})
    return rows


def optimum_curve(truth: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of the KL-constrained optimum pi_ref exp(r / beta) / Z over a sweep of beta, from `truth` [prompts, M].

    By self-normalised importance weights: with M samples the reward is underestimated, and the KL cannot exceed log M.
    `effective_samples` is the mean over prompts of 1 / sum w^2; rows below SUPPORTED have `supported: false`.
    """
    prompts, m = truth.shape
    uniform = torch.full_like(truth, -torch.tensor(float(m)).log().item())
    spread = truth.std().item() or 1.0
    rows = []
    for beta in torch.logspace(torch.tensor(_WEAKEST).log10().item(), torch.tensor(_STRONGEST).log10().item(), BETAS):
        scaled = float(beta) * spread
        rewards, kls = optimal_point(uniform, truth, scaled)
        weights = kl_regularised_optimum(uniform, truth, scaled).exp()
        effective = (1.0 / (weights**2).sum(-1)).mean().item()
        reward, reward_se = mean_se(rewards.tolist())
        kl, kl_se = mean_se(kls.tolist())
        options = {"beta": float(f"{scaled:.6g}"), "samples": m}
        row = {"options": options, "reward": reward, "reward_se": reward_se, "kl": kl, "kl_se": kl_se, "n": prompts}
        rows.append(row | {"effective_samples": effective, "supported": effective >= SUPPORTED})
    return rows
