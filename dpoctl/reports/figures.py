"""The figures of a report. A figure without data is left out."""

from dataclasses import replace
from pathlib import Path

from ..outputs.files import writing
from . import frontier, shared, wins
from .collect import Collected, Run

_NO_REFERENCE = ("simpo", "orpo", "unlikelihood")  # whose implicit reward is none


def draw(collected: Collected, folder: Path) -> list[tuple[str, str, list[Path]]]:
    """Draw what there is data for; returns (name, caption, [PNG, SVG]) of each figure."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dpoctl", "svg.fonttype": "path", "font.size": 10, "axes.grid": True,
                                "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    runs = collected.runs
    dpo = [run for run in runs if any("rewards/accuracies" in row for row in run.metrics)]
    implicit = [_behind_the_start(run) for run in dpo if run.options.get("loss") not in _NO_REFERENCE]
    judges = implicit + [run for run in runs if run.stage == "train-rm"]
    drawn = [
        frontier.plane(collected),
        frontier.kl_against_beta(collected.points),
        frontier.reward_against_pairs(collected),
        wins.against_temperature(collected.judged),
        wins.against_step(collected.judged),
        _over_optimisation(runs),
        _fluency(runs),
        _curves(judges, ("rewards/accuracies", "eval/rewards/accuracies", "accuracy", "eval/accuracy"), "accuracy",
                "share of pairs ranked right",
                "Share of pairs ranked right: by DPO's implicit reward, and by the reward model; eval/ on held-out pairs."),
        _curves([run for run in runs if run.stage not in ("train-ppo",)], ("loss", "eval/loss"), "loss", "loss",
                "Loss of each run against updates."),
        _curves(dpo, ("logps/chosen", "logps/rejected"), "logps", "summed log-prob (nats)",
                "Log-probs of chosen and rejected completions apart. Both falling together is likelihood displacement."),
        _curves(implicit, ("rewards/margins", "eval/rewards/margins"), "margins", "implicit-reward margin",
                "Margin of the implicit rewards, beta times the difference of the log-ratios."),
        _curves(runs, ("objective/kl",), "ppo-kl", "sequence KL of the episodes (nats)", "PPO: the KL of each step's episodes.",
                "PPO steps"),
        _curves(runs, ("objective/kl_coef",), "ppo-coefficient", "KL coefficient",
                "PPO: the coefficient of the KL penalty, as the controller moved it.", "PPO steps"),
    ]  # fmt: skip
    return [(name, caption, _save(figure, folder / name)) for name, caption, figure in filter(None, drawn)]


def _behind_the_start(run: Run) -> Run:
    """Without the first update, where policy and reference are one and the sign of a margin is rounding."""
    return replace(run, metrics=[row for row in run.metrics if row.get("step", 0) > 1])


def _save(figure, stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with writing(stem):
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def _curves(runs: list[Run], names: tuple[str, ...], name: str, label: str, caption: str, x: str = "updates"):
    series = [(run, key, [(r["step"], r[key]) for r in run.metrics if key in r]) for run in runs for key in names]
    series = [(run, key, points) for run, key, points in series if points]
    if not series:
        return None
    figure, axes = shared.axes()
    order = {run.name: i for i, run in enumerate(runs)}
    for run, key, points in series:
        which = names.index(key)
        style = {"marker": shared.MARKERS[which], "markersize": 4} if len(points) < 30 else {}
        shown = f"{run.name}: {key}" if len(names) > 1 else run.name
        colour = shared.COLOURS[order[run.name] % 7]
        line = shared.LINES[(which + order[run.name] // 7) % 4]
        axes.plot(*zip(*points, strict=True), line, color=colour, label=shown, **style)
    axes.set_xlabel(x)
    axes.set_ylabel(label)
    shared.legend(figure, axes)
    return name, caption, figure


def _over_optimisation(runs: list[Run]):
    """The learned reward beside the ground truth over PPO's training, each in its own units."""
    series = [(run, [p for p in run.points if "learned_reward" in p]) for run in runs]
    series = [(run, points) for run, points in series if len(points) > 1 and points[0]["method"] == "ppo"]
    if not series:
        return None
    figure, axes = shared.axes()
    right = axes.twinx()
    right.grid(False)
    for i, (run, points) in enumerate(series):
        steps = [p["step"] for p in points]
        colour = shared.COLOURS[i % 7]
        axes.errorbar(steps, [p["reward"] for p in points], yerr=[p["reward_se"] for p in points], color=colour, marker="o",
                      markersize=4, label=f"{run.name}: ground truth (left)")  # fmt: skip
        right.plot(steps, [p["learned_reward"] for p in points], "--", color=colour, marker="s", markersize=4)
        axes.plot([], [], "--", color=colour, marker="s", markersize=4, label=f"{run.name}: learned reward (right)")
    axes.set_xlabel("PPO steps")
    axes.set_ylabel("ground-truth reward")
    right.set_ylabel("learned reward")
    shared.legend(figure, axes)
    caption = (
        "What PPO maximises beside what is wanted, on test prompts: a learned reward that rises while the ground truth "
        "falls is over-optimisation. Bars of one standard error."
    )
    return "over-optimisation", caption, figure


def _fluency(runs: list[Run]):
    """Perplexity of the samples under the reference, and distinct-2, at each evaluation during training."""
    series = [(run, [p for p in run.points if p.get("perplexity_ref")]) for run in runs]
    series = [(run, points) for run, points in series if len(points) > 1]
    if not series:
        return None
    figure, (left, right) = shared.axes(8.4, 2)
    for i, (run, points) in enumerate(series):
        style = {"color": shared.COLOURS[i % 7], "linestyle": shared.LINES[i // 7 % 4], "marker": shared.MARKERS[i % 7]}
        kl = [p["kl"] or 0.0 for p in points]
        left.plot(kl, [p["perplexity_ref"] for p in points], markersize=4, label=run.name, **style)
        right.plot(kl, [p["distinct_2"] for p in points], markersize=4, **style)
    left.set_ylabel("perplexity under the reference")
    right.set_ylabel("distinct-2")
    for axes in (left, right):
        axes.set_xlabel("sequence KL to the reference (nats)")
    shared.legend(figure, left)
    caption = (
        "Fluency along training, against the KL: perplexity of the samples under the reference (left) and the share of "
        "distinct word pairs (right)."
    )
    return "fluency", caption, figure
