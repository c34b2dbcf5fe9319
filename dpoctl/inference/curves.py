"""Curves of the reward-KL plane that need no trained policy: best-of-n and the exact optimum, from reference samples."""

from typing import Any

import torch

from ..errors import InputError
from ..objectives.best_of_n import expected_best
from ..objectives.kl import best_of_n_kl_bound, kl_regularised_optimum, optimal_point
from .text_statistics import mean_se

BETAS = 32
_WEAKEST, _STRONGEST = 30.0, 0.02  # range of beta, in standard deviations of the reward
SUPPORTED = 5.0  # effective samples a prompt, on average, from which on a point of the optimum is trusted


def by_prompt(rows: list[dict], values: list[float], path: str) -> torch.Tensor:
    """Values [prompts, samples], the same number for every prompt. Raises InputError where numbers differ."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row["prompt_id"], []).append(value)
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1 or sizes == {1}:
        raise InputError(
            f"{path}: {min(sizes)} to {max(sizes)} samples a prompt; curves need the same number of each, 2 or more",
            hint="dpoctl sample --n 64 writes such a file",
        )
    return torch.tensor(list(groups.values()), dtype=torch.float64)


def best_of_n(selection_scorer: torch.Tensor, truth: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of the best-of-n curve for n = 1, 2, 4, ... N: reward with its error over prompts, and the KL's bound.

    `chooser` and `truth` are [prompts, N]: what chooses, and what the choice is worth.
    """
    prompts, total = truth.shape
    sizes = sorted({2**i for i in range(total.bit_length()) if 2**i <= total} | {total})
    rows = []
    for n in sizes:
        reward, error = mean_se([float(expected_best(c, t, n)) for c, t in zip(selection_scorer, truth, strict=True)])
        bound = best_of_n_kl_bound(n)
        options = {"n": n, "samples": total}
        rows.append({"options": options, "reward": reward, "reward_se": error, "kl": bound, "kl_se": 0.0, "n": prompts})
    return rows


def optimum_curve(truth: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of the KL-constrained optimum pi_ref exp(r / beta) / Z over a sweep of beta, from `truth` [prompts, M].

    By self-normalised importance weights (PAPER section 5): at finite M it lies low, and its KL cannot exceed log M.
    `effective_samples` is the mean over prompts of 1 / sum w^2; below SUPPORTED a row says `supported: false`.
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
