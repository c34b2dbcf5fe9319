"""Options that every command has, or that several share, and the panels of the help that options stand in."""

from dataclasses import dataclass

from .schema import option

RUN, DATA, OPT, GEN, EVAL, LOSS = "Run", "Data", "Optimisation", "Generation", "Evaluation", "Objective"
PPO, JUDGE, SERVER, SCORING, PEOPLE = "PPO", "Judging", "Server", "Scoring", "People"
DEVICES = "Devices and memory"
# the order of the panels on a help page, below the required options
PANELS = (DATA, JUDGE, SERVER, SCORING, PEOPLE, LOSS, PPO, OPT, GEN, EVAL, DEVICES, RUN)
SIEBERT = "siebert/sentiment-roberta-large-english"


@dataclass(frozen=True, kw_only=True)
class Common:
    out: str = option(help="Directory to write.", panel=RUN, identity=False, metavar="DIR")
    seed: int = option(0, "Seed of everything drawn at random.", RUN, at_least=0)
    overwrite: bool = option(False, "Start anew over what an earlier command wrote there.", RUN, identity=False)
    dry_run: bool = option(False, "Show the plan and its cost, and do nothing.", RUN, identity=False)

    def problems(self) -> list[str]:
        """Impossible combinations, in words."""
        return []


@dataclass(frozen=True, kw_only=True)
class Tabular:
    """A command that ends in a table on stdout."""

    json: bool = option(False, "Print one JSON object on stdout in place of the table.", RUN, identity=False)


@dataclass(frozen=True, kw_only=True)
class Device:
    device: str = option(
        "auto", "cpu, cuda, cuda:1, mps; auto takes the GPU where there is one.", RUN, identity=False, metavar="DEVICE"
    )
    dtype: str = option(
        "auto",
        "Compute precision; weights stay float32. auto: bfloat16 on a GPU, else float32.",
        RUN,
        choices=("auto", "float32", "bfloat16"),
    )
    revision: str | None = option(None, "Branch, tag or commit of hub ids.", RUN, metavar="REVISION")
    trust_remote_code: bool = option(False, "Run the code that a hub model brings along.", RUN)
