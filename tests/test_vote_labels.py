"""--soft-labels votes: the share of the votes for the chosen completion as the label of a pair."""

import pytest
import torch

from dpoctl.objectives.kl import kl_regularised_optimum
from helpers.losses import Plain, caller, enter, metrics, small_models, write
from test_closed_form import PAIRS, PROMPTS, bradley_terry, completion_logps, total_variation, train, world

SHARES = (1.0, 0.75, 0.5, 2 / 3)
BASE = (
    "train-dpo --model m --ref r --data rows.jsonl --batch-size 4 --max-steps 1 --log-every 1 --warmup-steps 0 "
    "--beta 0.5"
)
CASES = {
    "plain": "",
    "smoothed": "--label-smoothing 0.1",
    "robust": "--loss robust --label-smoothing 0.2",
    "exo": "--loss exo_pair --label-smoothing 0.05",
    "rpo": "--loss rpo --alpha 0.5",
}


def rows_of() -> list[dict]:
    texts = ("good film", "bad long film", "short", "warm and dull plot", "made me cry")
    return [
        {"prompt": f"{word} film", "chosen": f" {texts[i]}", "rejected": f" {texts[i + 1]}"}
        | {"chosen_share": share, "votes": 4}
        for i, (word, share) in enumerate(zip(("the", "it", "a", "story"), SHARES, strict=True))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("votes"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    return enter(folder, tmp_path, monkeypatch, rows_of())


@pytest.fixture
def command(here, capsys):
    return caller(capsys)


def test_the_first_loss_is_that_of_a_plain_computation(command, here):
    policy, reference, s = Plain("m"), Plain("r"), torch.nn.functional.logsigmoid
    sides: dict[str, list] = {"chosen": [], "rejected": []}
    nll = []
    for row in rows_of():
        for side, found in sides.items():
            mine, theirs = (model.tokens(row["prompt"], row[side])[0] for model in (policy, reference))
            found.append(mine.sum() - theirs.sum())
            nll += [-mine.mean()] if side == "chosen" else []
    d = 0.5 * (torch.stack(sides["chosen"]) - torch.stack(sides["rejected"])).detach()
    q = torch.tensor(SHARES, dtype=torch.float64)

    def logistic(won: torch.Tensor) -> torch.Tensor:
        return -won * s(d) - (1 - won) * s(-d)

    p, t = torch.sigmoid(d), q * 0.95 + (1 - q) * 0.05
    expected = {
        "plain": logistic(q),
        "smoothed": logistic(q * 0.9 + (1 - q) * 0.1),
        "robust": (-(q - 0.2) * s(d) - (1 - q - 0.2) * s(-d)) / 0.6,
        "exo": p * (p / t).log() + (1 - p) * ((1 - p) / (1 - t)).log(),
        "rpo": logistic(q) + 0.5 * torch.stack(nll).detach(),
    }
    for name, losses in expected.items():
        code, said = command(f"{BASE} {CASES[name]} --soft-labels votes --out {name}")
        assert code == 0, said
        assert metrics(here / name)[0]["loss"] == pytest.approx(losses.mean().item(), rel=2e-5), name
    assert "votes: 0.729 for the chosen completion on average; 1 of 4 pairs unanimous" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"chosen_share": None},
            "rows.jsonl:3: field 'chosen_share': expected a number (--soft-labels votes), got nothing",
        ),
        ({"chosen_share": 1.5}, "rows.jsonl:3: field 'chosen_share': expected a number from 0 to 1, got 1.5"),
        ({"chosen_share": "most"}, "rows.jsonl:3: field 'chosen_share'"),
    ],
)
def test_rows_without_a_share_are_refused(command, here, change, said):
    rows = rows_of()
    write("rows.jsonl", [*rows[:2], rows[2] | change, rows[3] | change])
    for more in ("", "--dry-run"):
        code, told = command(f"{BASE} --soft-labels votes --out o {more}")
        assert code == 2 and said in told
        assert "2 of 4 pairs have none" in told or change["chosen_share"] is not None
    assert not list(here.glob("o*"))


def test_labels_that_are_hard_or_turned_are_told(command, here):
    write("rows.jsonl", [row | {"chosen_share": 1.0} for row in rows_of()])
    assert "every vote is unanimous" in command(f"{BASE} --soft-labels votes --out o")[1]
    write("rows.jsonl", [row | {"chosen_share": 0.25} for row in rows_of()])
    assert "in 4 of 4 pairs the chosen completion has fewer votes" in command(f"{BASE} --soft-labels votes --out p")[1]


def test_options_that_votes_do_not_read_are_refused(command, here):
    code, said = command(f"{BASE} --soft-labels votes --score-type reward --out o")
    assert code == 2 and "--score-type has no effect" in said
    code, said = command(f"{BASE} --soft-labels vote --out o")
    assert code == 2 and "--soft-labels: expected a number or votes, got 'vote'" in said
    code, said = command(f"{BASE} --soft-labels votes --loss ipo --out o")
    assert code == 2 and "--soft-labels has no effect with --loss ipo" in said


def test_shares_of_all_voters_reach_the_optimum_and_those_of_some_what_their_votes_say():
    """As many votes as one likes have Bradley-Terry's shares; five votes a pair are five pairs of hard labels."""
    tables, rewards = world(4)
    w, l = PAIRS.unbind(1)  # noqa: E741
    every = bradley_terry(rewards)[:, w, l]
    once = (every >= 0.5).double()
    optimum = kl_regularised_optimum(completion_logps(tables), rewards, 0.5)
    found = train("sigmoid", once, tables, 0.5, {"label": every})
    assert total_variation(found, optimum).max() < 1e-5
    g = torch.Generator().manual_seed(0)
    cast = torch.binomial(torch.full((PROMPTS, len(PAIRS)), 5.0, dtype=torch.float64), every, generator=g)
    back = {tuple(pair): n for n, pair in enumerate(PAIRS.tolist())}
    other = torch.tensor([back[b, a] for a, b in PAIRS.tolist()])
    cast = torch.where(w < l, cast, 5 - cast[:, other])  # what one order says, the other says too
    shares = cast / 5
    soft = train("sigmoid", (w < l).double().expand(PROMPTS, -1), tables, 0.5, {"label": shares})
    hard = train("sigmoid", cast, tables, 0.5)
    assert total_variation(soft, hard).max() < 1e-4
    assert total_variation(soft, optimum).max() > 0.01
