"""The preference losses: hand arithmetic, an independent float64 reference, gradients, properties, extreme inputs."""

import inspect
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpoctl.config.dpo import TrainDPO
from dpoctl.config.schema import spec_of
from dpoctl.objectives.catalogue import canonical, having, parse_loss, traits_of
from dpoctl.objectives.divergence import DIVERGENCES
from dpoctl.objectives.pair_logps import PairLogps, Ranks, ranks_of
from dpoctl.objectives.preference import LOSSES, _log_odds, objective_of
from dpoctl.objectives.unpaired import UNPAIRED_LOSSES

OPTIONS = {  # values under which every option of every loss matters
    "sigmoid": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "rpo": {"alpha": 0.7},
    "dpop": {"lambda_": 3.0},
    "simpo": {"gamma": 0.6},
    "orpo": {"lambda_": 0.4},
    "kto": {"lambda_chosen": 1.3, "lambda_rejected": 0.6},
    "unlikelihood": {"alpha": 0.3},
    "exo_pair": {"label_smoothing": 0.2},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "discopop": {"discopop_tau": 0.6},
}
SIX = [f.name for f in fields(PairLogps)][:6]  # the log-probs and the numbers of tokens


def pairs(chosen, rejected, ref_chosen, ref_rejected, n_w, n_l, z=None, dtype=torch.float64, **more) -> PairLogps:
    """Pairs of these log-probs; `z` stands for both means of c and r, `more` for what else some losses read."""
    values = (chosen, rejected, ref_chosen, ref_rejected, n_w, n_l)
    made = list(torch.broadcast_tensors(*(torch.as_tensor(v, dtype=dtype).reshape(-1) for v in values)))
    mean = None if z is None else torch.as_tensor(z, dtype=dtype)
    found = {k: v if isinstance(v, float) else torch.as_tensor(v, dtype=dtype).reshape(-1) for k, v in more.items()}
    made_ranks = ranks_of(*made[:4])
    return PairLogps(*made, mean, mean, **({"mean_tokens": 7.0, "ranks": made_ranks} | found))


def some_pairs(n=64, seed=0, dtype=torch.float64) -> PairLogps:
    """Random pairs whose log-ratios have both signs and lie within a few nats, as in training."""
    g = np.random.default_rng(seed)
    n_w, n_l = g.integers(1, 30, n), g.integers(1, 30, n)
    ref_w, ref_l = -n_w * g.uniform(0.3, 2.0, n), -n_l * g.uniform(0.3, 2.0, n)
    # log p stays below 0, as a log-prob must
    w, l = np.minimum(ref_w + g.normal(0, 2, n), -0.05), np.minimum(ref_l + g.normal(0, 2, n), -0.05)  # noqa: E741
    return pairs(w, l, ref_w, ref_l, n_w, n_l, z=0.4, dtype=dtype, gap=g.normal(0, 1, n))


def swapped(p: PairLogps) -> PairLogps:
    return PairLogps(
        p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_tokens, p.chosen_tokens, p.batch_mean
    )


def changed(p: PairLogps, **changes) -> PairLogps:
    """Pairs of which some inputs are others, as a batch: with the ranks that these have."""
    new = replace(p, **changes)
    return replace(new, ranks=ranks_of(*(getattr(new, name).detach() for name in SIX[:4])))


def loss(name: str, p: PairLogps, beta: float = 0.5, **options) -> torch.Tensor:
    return LOSSES[name].loss(p, beta, **options)


# --- hand arithmetic -------------------------------------------------------------------------------------------------
# Pair A: log p_w -4 (reference -5), log p_l -6 (reference -5), 4 and 2 tokens: c = 1, r = -1, D = 2;
# per token c/4 - r/2 = 0.25 + 0.5 = 0.75; means -1 and -3. Pair B has log p_w -7: c = -2, r = -1, D = -1.
A = (-4.0, -6.0, -5.0, -5.0, 4, 2)
B = (-7.0, -6.0, -5.0, -5.0, 4, 2)
# Pair O: mean log-probs log 3/4 and log 1/4, so odds 3 and 1/3, and their ratio 9
O = (4 * math.log(0.75), 2 * math.log(0.25), 0.0, 0.0, 4, 2)  # noqa: E741

BY_HAND = [
    # log(1 + e^-1) = 0.3132616875, and with the label turned log(1 + e) = 1.3132616875
    ("sigmoid", A, 0.5, {}, 0.3132616875),
    # 0.8 * 0.3132616875 + 0.2 * 1.3132616875
    ("sigmoid", A, 0.5, {"label_smoothing": 0.2}, 0.5132616875),
    # (0.8 * 0.3132616875 - 0.2 * 1.3132616875) / 0.6 = -0.0120429875 / 0.6
    ("robust", A, 0.5, {"label_smoothing": 0.2}, -0.0200716458),
    ("ipo", A, 0.5, {}, 1.0),  # (2 - 1/(2 * 0.5))^2
    ("ipo", B, 0.25, {}, 9.0),  # (-1 - 1/(2 * 0.25))^2
    ("ipo-mean", A, 0.5, {}, 0.0625),  # (0.75 - 1)^2
    ("hinge", A, 0.25, {}, 0.5),  # 1 - 0.25 * 2
    ("hinge", A, 1.0, {}, 0.0),  # 1 - 2 is below 0
    ("hinge", B, 0.5, {}, 1.5),  # 1 + 0.5
    ("rpo", A, 0.5, {"alpha": 0.5}, 0.8132616875),  # 0.3132616875 + 0.5 * 4/4
    ("dpop", A, 0.5, {"lambda_": 2.0}, 0.3132616875),  # c > 0: nothing added
    # c = -2: D - 2 * 2 = -5, times 0.5 is -2.5: 2.5 + log(1 + e^-2.5) = 2.5 + 0.0788897343
    ("dpop", B, 0.5, {"lambda_": 2.0}, 2.5788897343),
    ("sigmoid-norm", A, 2.0, {}, 0.2014132780),  # log(1 + e^-1.5), 2 * 0.75 = 1.5
    ("simpo", A, 2.0, {"gamma": 0.5}, 0.0297504183),  # 2 * (-1 + 3) - 0.5 = 3.5: log(1 + e^-3.5)
    # -log(3/4) - 0.5 log s(log 9) = log(4/3) + 0.5 log(10/9) = 0.2876820724 + 0.5 * 0.1053605157
    ("orpo", O, 0.1, {"lambda_": 0.5}, 0.3403623303),
    # z = 0.5: s(-2 * 0.5) + 2 s(-2 * 1.5) = 0.26894142137 + 2 * 0.04742587318
    ("kto", (*A, 0.5), 2.0, {"lambda_rejected": 2.0}, 0.3637931677),
    # z = max(0, -3) = 0: 3 s(-2) + s(-2) = 4 * 0.1192029220
    ("kto", (*A, -3.0), 2.0, {"lambda_chosen": 3.0}, 0.4768116881),
    ("unlikelihood", A, 0.1, {"alpha": 0.25}, 2.5),  # 4 - 0.25 * 6
    ("distill", (*A, None, {"gap": 3.0}), 0.5, {}, 4.0),  # (0.5 * 2 - 3)^2
    # q = s(1) = 0.7310585786: q (log q - log 0.8) + (1 - q) (log(1 - q) - log 0.2)
    # = 0.7310585786 (-0.3132616875 + 0.2231435513) + 0.2689414214 (-1.3132616875 + 1.6094379124)
    ("exo_pair", A, 0.5, {"label_smoothing": 0.2}, 0.0137724183),
    # beta c = 0.5, beta r = -0.5: log(1 + e^-0.5) = 0.4740769842, log(1 + e^0.5) = 0.9740769842:
    # 0.4740769842 + 0.5 * 0.9740769842 + 0.5 * 0.4740769842
    ("nca_pair", A, 0.5, {}, 1.1981539684),
    # delta = 0.4: c - delta = 0.6, r - delta = -1.4, halved: log(1 + e^-0.3) + log(1 + e^-0.7)
    # = 0.5543552445 + 0.4031860489
    ("bco_pair", (*A, 0.4), 0.5, {}, 0.9575412934),
    ("sppo_hard", A, 0.5, {}, 0.0),  # (1 - 1)^2 + (-1 + 1)^2
    ("sppo_hard", B, 0.25, {}, 17.0),  # (-2 - 2)^2 + (-1 + 2)^2
    # alone in its batch a pair is its own partner: DPO
    ("aot", A, 0.5, {"label_smoothing": 0.2}, 0.5132616875),
    ("aot_unpaired", A, 0.5, {"label_smoothing": 0.2}, 0.5132616875),
    ("apo_zero", A, 2.0, {}, 0.2384058440),  # s(-2) + s(-2)
    ("apo_down", A, 2.0, {}, 0.8987832879),  # s(2) + s(-4) = 0.8807970780 + 0.0179862100
    # x = 1, m = s(1 / 0.5) = 0.8807970780: 0.1192029220 * 0.3132616875 + 0.8807970780 * 0.3678794412
    ("discopop", A, 0.5, {"discopop_tau": 0.5}, 0.3613688453),
    ("sft", (*A, None, {"mean_tokens": 8.0}), 0.5, {}, 0.5),  # 4 nats over 8 tokens
]


@pytest.mark.parametrize("name, pair, beta, options, expected", BY_HAND)
def test_worked_by_hand(name, pair, beta, options, expected):
    # ten decimals are written out above
    *given, more = pair if isinstance(pair[-1], dict) else (*pair, {})
    assert loss(name, pairs(*given, **more), beta, **options).item() == pytest.approx(expected, rel=0, abs=6e-11)


def test_every_loss_is_worked_by_hand():
    assert {name for name, *_ in BY_HAND} == set(LOSSES)


# --- an independent reference ----------------------------------------------------------------------------------------


def reference_losses(p: PairLogps, beta: float) -> dict[str, np.ndarray]:
    """Every loss under OPTIONS from probabilities and odds, in float64 NumPy: no log-sigmoid anywhere."""
    w, l, rw, rl, n_w, n_l = (getattr(p, name).double().numpy() for name in SIX)  # noqa: E741
    ratio_w, ratio_l = np.exp(w) / np.exp(rw), np.exp(l) / np.exp(rl)  # pi / pi_ref
    geometric_w, geometric_l = ratio_w ** (1 / n_w), ratio_l ** (1 / n_l)
    p_w, p_l = np.exp(w) ** (1 / n_w), np.exp(l) ** (1 / n_l)  # geometric means of the tokens' probabilities
    bt = ratio_w**beta / (ratio_w**beta + ratio_l**beta)  # Bradley-Terry with rewards beta log ratio
    won, lost = np.log(bt), np.log(1 - bt)
    penalised = ratio_w * np.minimum(1, ratio_w) ** OPTIONS["dpop"]["lambda_"]
    margin = np.exp(OPTIONS["simpo"]["gamma"])
    odds = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    z = max(0.0, float(p.batch_mean))
    gain, cost = (ratio_w / np.exp(z)) ** beta, (np.exp(z) / ratio_l) ** beta
    e = OPTIONS["sigmoid"]["label_smoothing"]
    kto = OPTIONS["kto"]
    kl = bt * np.log(bt / (1 - e)) + (1 - bt) * np.log((1 - bt) / e)
    alone_w, alone_l = ratio_w**beta / (1 + ratio_w**beta), ratio_l**beta / (1 + ratio_l**beta)
    mean = np.exp(float(p.running_mean))
    odds_m = (ratio_w / ratio_l) ** (beta / OPTIONS["discopop"]["discopop_tau"])
    policy, reference = w - l, rw - rl  # of each rank: sorted by hand
    margins, sides = sorted(zip(policy, range(64), strict=True)), sorted(reference)
    dominated = np.empty(64)
    for rank, (mine, i) in enumerate(margins):
        dominated[i] = mine - sides[rank]
    ranked_w = sorted(zip(np.log(ratio_w), range(64), strict=True))
    ranked_l = sorted(zip(np.log(ratio_l), range(64), strict=True))
    unpaired = np.zeros(64)
    for (of_w, i), (of_l, j) in zip(ranked_w, ranked_l, strict=True):
        win = 1 / (1 + np.exp(-beta * (of_w - of_l)))
        smoothed = -(1 - e) * np.log(win) - e * np.log(1 - win)
        unpaired[i] += smoothed / 2
        unpaired[j] += smoothed / 2
    win = 1 / (1 + np.exp(-beta * dominated))
    return {
        "distill": (np.log(bt / (1 - bt)) - p.gap.double().numpy()) ** 2,
        "exo_pair": kl,
        "nca_pair": -np.log(alone_w * np.sqrt((1 - alone_w) * (1 - alone_l))),
        "bco_pair": np.log(1 + (mean / ratio_w) ** beta) + np.log(1 + (ratio_l / mean) ** beta),
        "sppo_hard": np.log(ratio_w / np.exp(0.5 / beta)) ** 2 + np.log(ratio_l * np.exp(0.5 / beta)) ** 2,
        "aot": -(1 - e) * np.log(win) - e * np.log(1 - win),
        "aot_unpaired": unpaired,
        "apo_zero": 1 - alone_w + alone_l,
        "apo_down": alone_w + (1 - bt),
        "discopop": (-np.log(bt) + odds_m * (ratio_l / ratio_w) ** beta) / (1 + odds_m),
        "sft": -w / p.mean_tokens,
        "sigmoid": -(1 - e) * won - e * lost,
        "robust": -((1 - e) * won - e * lost) / (1 - 2 * e),
        "ipo": (np.log(ratio_w / ratio_l) - 0.5 / beta) ** 2,
        "ipo-mean": (np.log(geometric_w / geometric_l) - 0.5 / beta) ** 2,
        "hinge": np.maximum(0, 1 - np.log((ratio_w / ratio_l) ** beta)),
        "rpo": -won - OPTIONS["rpo"]["alpha"] * np.log(p_w),
        "dpop": np.log(1 + (ratio_l / penalised) ** beta),
        "sigmoid-norm": np.log(1 + (geometric_l / geometric_w) ** beta),
        "simpo": np.log(1 + (p_l / p_w) ** beta * margin),
        "orpo": -np.log(p_w) - OPTIONS["orpo"]["lambda_"] * np.log(odds / (1 + odds)),
        "kto": kto["lambda_chosen"] * (1 - gain / (1 + gain)) + kto["lambda_rejected"] * (1 - cost / (1 + cost)),
        "unlikelihood": -np.log(np.exp(w) / np.exp(l) ** OPTIONS["unlikelihood"]["alpha"]),
    }


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_agrees_with_an_independent_reference(name, beta):
    for dtype, rtol, atol in [
        # the reference's own 1 - s and 1 - p lose about five digits of float64's sixteen
        (torch.float64, 1e-9, 1e-11),
        # log-probs reach -60, where a float32's half step is 2e-6: so much may c and r be off, and D twice that; times
        # beta <= 2, and, for the squares, relative to their own size
        (torch.float32, 2e-6, 1e-5),
    ]:
        p = some_pairs(dtype=dtype)
        ours = loss(name, p, beta, **OPTIONS.get(name, {}))
        assert ours.dtype == dtype and ours.shape == (64,)
        np.testing.assert_allclose(ours.double(), reference_losses(p, beta)[name], rtol=rtol, atol=atol)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_dpo_gradient_has_the_papers_weights():
    """2305.18290, section 4: the gradient is -beta s(r_l - r_w) [grad log p_w - grad log p_l], r = beta log-ratio."""
    p, beta = some_pairs(), 0.3
    p = replace(p, chosen=p.chosen.requires_grad_(), rejected=p.rejected.requires_grad_())
    by_chosen, by_rejected = torch.autograd.grad(loss("sigmoid", p, beta).sum(), [p.chosen, p.rejected])
    weight = beta / (1 + torch.exp(beta * p.c - beta * p.r)).detach()
    torch.testing.assert_close(by_chosen, -weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_rejected, weight, rtol=1e-12, atol=0)
    # a pair that the implicit reward has wrong weighs more than one it has right
    wrong = (p.d < 0).detach()
    assert weight[wrong].min() > beta / 2 > weight[~wrong].max()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "aot_unpaired"])
def test_gradients_are_those_of_the_values(name):
    p = some_pairs(16, seed=1)  # no pair within the finite difference (1e-6) of a kink of hinge and dpop
    assert (1 - 0.5 * p.d).abs().min() > 1e-3 and p.c.abs().min() > 1e-3

    def value(chosen, rejected):
        return loss(name, replace(p, chosen=chosen, rejected=rejected), **OPTIONS.get(name, {}))

    assert torch.autograd.gradcheck(value, (p.chosen.requires_grad_(), p.rejected.requires_grad_()))


def test_kto_lets_no_gradient_through_z():
    p = some_pairs()
    chosen = p.chosen.clone().requires_grad_()
    p = replace(p, chosen=chosen)
    attached = replace(p, batch_mean=(p.c + p.r).mean().abs())
    plain = replace(p, batch_mean=attached.batch_mean.detach())
    got, expected = (torch.autograd.grad(loss("kto", q).sum(), chosen)[0] for q in (attached, plain))
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="mean of c and r"):
        loss("kto", replace(p, batch_mean=None))


def test_sorted_losses_have_the_values_and_gradients_of_a_sort_over_the_batch():
    """Autograd through the sort of all pairs at once, against pairs that know their partners alone."""
    p = some_pairs(40, seed=3)
    for name, e in (("aot", 0.2), ("aot_unpaired", 0.2)):
        found = []
        for sorts in (True, False):
            chosen, rejected = p.chosen.clone().requires_grad_(), p.rejected.clone().requires_grad_()
            q = replace(p, chosen=chosen, rejected=rejected)
            if not sorts:
                losses = loss(name, q, label_smoothing=e)
            elif name == "aot":
                losses = loss_of_difference(
                    (chosen - rejected).sort().values - (p.ref_chosen - p.ref_rejected).sort().values, e
                )
            else:
                losses = loss_of_difference(q.c.sort().values - q.r.sort().values, e)
            losses.sum().backward()
            found.append((losses.sum().detach(), chosen.grad, rejected.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


def loss_of_difference(difference, e, beta=0.5):
    won = torch.sigmoid(beta * difference)
    return -(1 - e) * won.log() - e * (1 - won).log()


# --- properties ------------------------------------------------------------------------------------------------------


def test_values_where_policy_is_reference():
    p = some_pairs()
    p = replace(p, chosen=p.ref_chosen, rejected=p.ref_rejected, batch_mean=torch.zeros((), dtype=torch.float64))
    for name in ("sigmoid", "robust", "dpop", "sigmoid-norm"):
        # log 2 to the last digits of float64
        np.testing.assert_allclose(loss(name, p, **OPTIONS.get(name, {})), math.log(2), rtol=1e-15)
    for name in ("ipo", "ipo-mean"):
        np.testing.assert_allclose(loss(name, p, 0.25), 4.0, rtol=0)  # (1 / (2 * 0.25))^2
    np.testing.assert_array_equal(loss("hinge", p), 1.0)
    np.testing.assert_array_equal(loss("kto", p), 1.0)  # 1/2 of each half
    np.testing.assert_allclose(loss("rpo", p, alpha=2.0) - math.log(2), -2 * p.chosen / p.chosen_tokens, rtol=1e-14)


def test_a_shift_of_both_log_ratios_changes_nothing_where_only_their_difference_counts():
    p = some_pairs()
    shifted = changed(p, chosen=p.chosen - 3.0, rejected=p.rejected - 3.0)
    for name in LOSSES:
        options = OPTIONS.get(name, {})
        change = (loss(name, shifted, **options) - loss(name, p, **options)).abs().max()
        if name in ("sigmoid", "robust", "ipo", "hinge", "distill", "exo_pair", "aot", "aot_unpaired", "discopop"):
            assert change < 1e-11, name  # rounding of sums of about 60, squared by ipo
        else:  # these also ask where chosen stands, or its length
            assert change > 1e-3, name
    per_token = replace(p, chosen=p.chosen - 0.2 * p.chosen_tokens, rejected=p.rejected - 0.2 * p.rejected_tokens)
    for name in ("ipo-mean", "sigmoid-norm", "simpo"):
        torch.testing.assert_close(loss(name, per_token), loss(name, p), rtol=1e-11, atol=1e-12)


def test_labels_turned():
    """A coin for a label knows no order; robust DPO under flipped labels is DPO under true ones, on average."""
    p, e = some_pairs(), 0.3
    torch.testing.assert_close(
        loss("sigmoid", p, label_smoothing=0.5), loss("sigmoid", swapped(p), label_smoothing=0.5)
    )
    assert (loss("sigmoid", p) - loss("sigmoid", swapped(p))).abs().min() > 1e-3
    mixed = (1 - e) * loss("robust", p, label_smoothing=e) + e * loss("robust", swapped(p), label_smoothing=e)
    torch.testing.assert_close(mixed, loss("sigmoid", p), rtol=1e-12, atol=1e-14)
    assert torch.equal(loss("robust", p, label_smoothing=0.0), loss("sigmoid", p))


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_do_not_see_each_other(name):
    p, order = some_pairs(), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([0])
    whole = loss(name, p, **OPTIONS.get(name, {}))
    mixed, alone = (
        loss(
            name,
            replace(p.only(kept), ranks=Ranks(*(t[kept] for t in vars(p.ranks).values()))),
            **OPTIONS.get(name, {}),
        )
        for kept in (order, first)
    )
    # vectorised and scalar code paths may round the last digit differently
    torch.testing.assert_close(mixed, whole[order], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(alone, whole[:1], rtol=1e-14, atol=1e-15)


# --- what the table says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_tells_the_truth(name):
    objective, p, options = LOSSES[name], some_pairs(), OPTIONS.get(name, {})
    assert set(options) == set(objective.options) == set(inspect.signature(objective.loss).parameters) - {"p", "beta"}
    value = loss(name, p, **options)
    for option in options:
        assert not torch.allclose(value, loss(name, p, **(options | {option: 0.45}))), option
    other_reference = changed(p, ref_chosen=p.ref_chosen - 1.0)
    assert torch.equal(value, loss(name, other_reference, **options)) != objective.needs_reference
    other_ranks = ranks_of(p.chosen, p.rejected, p.ref_chosen - 1.0, p.ref_rejected)
    for others, needed in [
        ({"batch_mean": p.batch_mean + 1.0}, objective.needs_batch_mean),
        ({"running_mean": p.running_mean + 1.0}, objective.needs_running_mean),
        ({"ranks": other_ranks}, objective.needs_ranks),
        ({"gap": p.gap + 1.0}, objective.needs_scores),
        ({"label": torch.full_like(p.gap, 0.7)}, objective.takes_labels),
        ({"slope": DIVERGENCES["js"]}, objective.takes_divergence or name == "apo_down" or name == "dpop"),
    ]:
        assert torch.equal(value, loss(name, replace(p, **others), **options)) != needed, others
    assert torch.equal(value, loss(name, p, 0.7, **options)) == (name in ("orpo", "unlikelihood", "sft"))
    given_up = changed(p, rejected=torch.full_like(p.rejected, -1e6))
    assert bool((loss(name, given_up, **options) < -1e4).all()) != objective.bounded_below


def test_the_catalogue_has_the_defaults_of_the_functions():
    for name, objective in LOSSES.items():
        parameters = inspect.signature(objective.loss).parameters.values()
        assert objective.options == {p.name: p.default for p in parameters if p.default is not p.empty}, name
    shown = {f.name: spec_of(f).help for f in fields(TrainDPO)}
    assert "(default: sigmoid 0, robust 0.1, exo_pair 0.001," in shown["label_smoothing"]
    assert "(default: rpo 1, unlikelihood 0.1)" in shown["alpha"] and "(default: 1)" in shown["gamma"]


def test_the_command_line_knows_the_same_losses_and_options():
    known = {f.name: f for f in fields(TrainDPO)}
    assert set(spec_of(known["loss"]).choices) == set(LOSSES) | set(UNPAIRED_LOSSES)
    # what is not given falls to the loss's own default
    assert all(known[option].default is None for objective in LOSSES.values() for option in objective.options)


# --- sums, soft labels, divergences -----------------------------------------------------------------------------------


def test_a_sum_is_the_weighted_sum_of_its_terms():
    p = some_pairs()
    found = objective_of("sigmoid:0.8,bco-pair:0.2,sft")
    expected = 0.8 * loss("sigmoid", p, label_smoothing=0.1) + 0.2 * loss("bco_pair", p) + loss("sft", p)
    torch.testing.assert_close(found.loss(p, 0.5, label_smoothing=0.1), expected, rtol=1e-14, atol=0)
    assert found.needs_running_mean and found.needs_reference and found.bounded_below and not found.needs_ranks
    assert found.options == {"label_smoothing": 0.0}
    assert objective_of("sigmoid") is LOSSES["sigmoid"]
    torch.testing.assert_close(objective_of("ipo:2").loss(p, 0.5), 2 * loss("ipo", p), rtol=0, atol=0)
    assert not traits_of("sigmoid,unlikelihood").bounded_below and not traits_of("sft,orpo").needs_reference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sigmoid:0", "weight above 0"),
        ("sigmoid:-1,sft", "weight above 0"),
        ("sigmoid:x", "weight above 0"),
        ("sigmoid:inf", "weight above 0"),
        ("sigmoid,", "'' is not one of sigmoid"),
        ("sigmoid:1,dpo:1", "'dpo' is not one of"),
        ("sft,sft:2", "sft is given twice"),
        ("exo-pair,exo_pair", "exo_pair is given twice"),
    ],
)
def test_a_sum_that_cannot_be_read(text, said):
    with pytest.raises(ValueError, match=said):
        parse_loss(text)


def test_names_have_one_spelling():
    assert canonical("ipo_mean:0.5, exo-pair") == "ipo-mean:0.5,exo_pair"


@pytest.mark.parametrize("name", having("takes_labels"))
def test_a_soft_label_is_the_mean_over_both_orders(name):
    """A pair that is turned with probability 1 - q."""
    p, options = some_pairs(), OPTIONS.get(name, {})
    q = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if name == "rpo":  # its NLL is the chosen completion's in any case
        options = {"alpha": 0.0}
    got = loss(name, replace(p, label=q), **options)
    if name == "exo_pair":  # a KL is not linear in its labels: from probabilities
        won, e = torch.sigmoid(0.5 * p.d), options["label_smoothing"]
        t = q * (1 - e) + (1 - q) * e
        expected = won * (won / t).log() + (1 - won) * ((1 - won) / (1 - t)).log()
    else:
        expected = q * loss(name, p, **options) + (1 - q) * loss(name, swapped(p), **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    hard = loss(name, replace(p, label=torch.ones_like(q)), **options)
    torch.testing.assert_close(hard, loss(name, p, **options), rtol=1e-13, atol=1e-14)


def test_divergences_by_hand():
    x = torch.tensor([math.log(2.0), 0.0, math.log(0.5)], dtype=torch.float64)  # ratios 2, 1 and 1/2
    for name, alpha, expected in [
        ("reverse-kl", 0.5, [math.log(2), 0, -math.log(2)]),
        ("forward-kl", 0.5, [0.5, 0, -1]),  # 1 - 1/u
        ("js", 0.5, [math.log(4 / 3), 0, math.log(2 / 3)]),  # log 2u/(1 + u)
        ("alpha", 1.0, [0.5, 0, -1]),
        ("alpha", 0.5, [2 - math.sqrt(2), 0, 2 - 2 * math.sqrt(2)]),  # (1 - u^-1/2) / (1/2)
    ]:
        found = DIVERGENCES[name](x, alpha)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_discopop_is_finite_at_a_high_temperature():
    """From tau = 1 on m exp(-x) does not fall again far below 0."""
    value = loss("discopop", pairs(-1e4, 0.0, 0.0, 0.0, 1.0, 1.0, dtype=torch.float32), discopop_tau=4.0)
    assert value.isfinite().all() and value > 1e4 / 2


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_finite_and_rise_with_the_ratio(name):
    x = torch.linspace(-1e4, 1e4, 2001, dtype=torch.float32).requires_grad_()
    found = DIVERGENCES[name](x, 0.9)
    found.sum().backward()
    assert found.isfinite().all() and x.grad.isfinite().all()
    assert (found.diff() >= 0).all() and (x.grad >= 0).all() and (x.grad[:1000] > 0).all()


def test_divergences_have_the_slope_of_their_generators():
    """f' is the derivative of f, as 2309.16240 writes it, up to a constant."""
    u, a = torch.linspace(0.2, 5, 50, dtype=torch.float64).requires_grad_(), 0.3
    generators = {
        "reverse-kl": u * u.log(),
        "forward-kl": -u.log(),
        "js": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
    }
    for name, f in generators.items():
        slope = torch.autograd.grad(f.sum(), u)[0]
        got = DIVERGENCES[name](u.detach().log(), a)
        assert (slope - got).std() < 1e-12, name


# --- single completions with a label ----------------------------------------------------------------------------------

UNPAIRED_BY_HAND = [  # c = 1 (pair A's chosen completion), beta 2, l_D = 3, l_U = 0.5
    # z = 0.5: 3 s(-1) and 0.5 s(1) = 0.5 * 0.7310585786
    ("kto", 0.5, 0.8068242641, 0.3655292893),
    # z = max(0, -2) = 0: 3 s(-2) and 0.5 s(2)
    ("kto", -2.0, 0.3576087661, 0.4403985390),
    # delta = 0.5: 3 log(1 + e^-1) and 0.5 log(1 + e)
    ("bco", 0.5, 0.9397850626, 0.6566308438),
    ("apo_zero_unpaired", 9.0, 0.3576087661, 0.4403985390),  # as kto with z = 0, whatever the means are
]


@pytest.mark.parametrize(("name", "mean", "desirable", "undesirable"), UNPAIRED_BY_HAND)
def test_unpaired_losses_by_hand(name, mean, desirable, undesirable):
    for label, expected in ((1.0, desirable), (0.0, undesirable)):
        p = pairs(*A, mean, label=[label])
        value = UNPAIRED_LOSSES[name].loss(p, 2.0, lambda_chosen=3.0, lambda_rejected=0.5).item()
        assert value == pytest.approx(expected, rel=0, abs=6e-11)


def test_unpaired_losses_read_what_their_traits_say():
    p = replace(some_pairs(), label=(torch.arange(64) % 3 == 0).double())
    for name, objective in UNPAIRED_LOSSES.items():
        value = objective.loss(p, 0.5)
        assert value.min() >= 0 and objective.bounded_below
        other = objective.loss(replace(p, batch_mean=p.batch_mean + 1), 0.5)
        assert torch.equal(value, other) != objective.needs_batch_mean, name
        other = objective.loss(replace(p, running_mean=p.running_mean + 1), 0.5)
        assert torch.equal(value, other) != objective.needs_running_mean, name
        for option, sign in (("lambda_chosen", p.label == 1), ("lambda_rejected", p.label == 0)):
            changed_where = objective.loss(p, 0.5, **{option: 2.0}) != value
            assert torch.equal(changed_where, sign), name
        with pytest.raises(ValueError):
            objective.loss(replace(p, label=None), 0.5)
    # KTO on pairs is the sum of its two halves, where z is the same
    halves = [
        UNPAIRED_LOSSES["kto"].loss(replace(each, label=torch.full((64,), label, dtype=torch.float64)), 0.5)
        for each, label in ((p, 1.0), (replace(swapped(p), batch_mean=p.batch_mean), 0.0))
    ]
    torch.testing.assert_close(loss("kto", p), sum(halves), rtol=1e-13, atol=0)


# --- extreme inputs --------------------------------------------------------------------------------------------------

LOGP = st.one_of(st.sampled_from([0.0, -1e-45, -1e-38, -1e-30, -1e-7, -1e4]), st.floats(-1e4, 0.0, width=32))
TOKENS = st.sampled_from([1.0, 7.0, 2048.0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LOGP, LOGP, LOGP, LOGP, TOKENS, TOKENS, st.floats(-1e4, 1e4, width=32))
def test_finite_whatever_comes(w, l, ref_w, ref_l, n_w, n_l, z):  # noqa: E741
    for name, objective in LOSSES.items():
        p = pairs(w, l, ref_w, ref_l, n_w, n_l, z=z, dtype=torch.float32, gap=z)
        p = replace(p, chosen=p.chosen.requires_grad_(), rejected=p.rejected.requires_grad_())
        value = loss(name, p, 2.0, **OPTIONS.get(name, {}))
        value.sum().backward()
        assert value.isfinite().all(), name
        if objective.bounded_below:
            assert (value >= 0).all(), name
        for side in (p.chosen, p.rejected):  # a loss need not read both sides on every input
            assert side.grad is None or side.grad.isfinite().all(), name


def test_log_odds_keep_their_digits_from_certain_to_impossible():
    logp = -torch.logspace(-6, 2, 400, dtype=torch.float32)
    x = logp.double().numpy()
    # a few float32 roundings of the terms, which are at most 100 and near even odds about 0.7
    np.testing.assert_allclose(_log_odds(logp).double(), x - np.log(-np.expm1(x)), rtol=4e-7, atol=2e-7)


def test_orpo_where_the_policy_is_certain():
    """Both completions all but certain: their odds tie, the term is log 2, the gradient what a clip can hold."""
    p = pairs([0.0, -1e-9], [0.0, -1e-9], 0.0, 0.0, 4.0, 4.0, dtype=torch.float32)
    p = replace(p, chosen=p.chosen.requires_grad_())
    value = loss("orpo", p, lambda_=0.1)
    np.testing.assert_allclose(value.detach(), 0.1 * math.log(2), rtol=1e-6)
    value.sum().backward()
    # lambda s(0) d(log odds) <= 0.05 / eps per unit of mean log p, beside the NLL's own -1/4
    assert p.chosen.grad.abs().max() <= 0.25 + 0.05 / torch.finfo(torch.float32).eps
