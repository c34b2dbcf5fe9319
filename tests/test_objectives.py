"""The preference losses: hand arithmetic, an independent float64 reference, gradients, properties, extreme inputs."""

import inspect
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpoctl.config.schema import spec_of
from dpoctl.config.dpo import TrainDPO
from dpoctl.objectives.preference import LOSSES, PairLogps, _log_odds

OPTIONS = {  # values under which every option of every loss matters
    "sigmoid": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "rpo": {"alpha": 0.7},
    "dpop": {"lambda_": 3.0},
    "simpo": {"gamma": 0.6},
    "orpo": {"lambda_": 0.4},
    "kto": {"lambda_chosen": 1.3, "lambda_rejected": 0.6},
    "unlikelihood": {"alpha": 0.3},
}


def pairs(chosen, rejected, ref_chosen, ref_rejected, n_w, n_l, z=None, dtype=torch.float64) -> PairLogps:
    values = (chosen, rejected, ref_chosen, ref_rejected, n_w, n_l)
    made = [torch.as_tensor(v, dtype=dtype).reshape(-1) for v in values]
    return PairLogps(*made, None if z is None else torch.as_tensor(z, dtype=dtype))


def some_pairs(n=64, seed=0, dtype=torch.float64) -> PairLogps:
    """Random pairs whose log-ratios have both signs and lie within a few nats, as in training."""
    g = np.random.default_rng(seed)
    n_w, n_l = g.integers(1, 30, n), g.integers(1, 30, n)
    ref_w, ref_l = -n_w * g.uniform(0.3, 2.0, n), -n_l * g.uniform(0.3, 2.0, n)
    # log p stays below 0, as a log-prob must
    w, l = np.minimum(ref_w + g.normal(0, 2, n), -0.05), np.minimum(ref_l + g.normal(0, 2, n), -0.05)  # noqa: E741
    return pairs(w, l, ref_w, ref_l, n_w, n_l, z=0.4, dtype=dtype)


def swapped(p: PairLogps) -> PairLogps:
    return PairLogps(
        p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_tokens, p.chosen_tokens, p.batch_mean
    )


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
]


@pytest.mark.parametrize("name, pair, beta, options, expected", BY_HAND)
def test_worked_by_hand(name, pair, beta, options, expected):
    # ten decimals are written out above
    assert loss(name, pairs(*pair), beta, **options).item() == pytest.approx(expected, rel=0, abs=6e-11)


def test_every_loss_is_worked_by_hand():
    assert {name for name, *_ in BY_HAND} == set(LOSSES)


# --- an independent reference ----------------------------------------------------------------------------------------


def reference_losses(p: PairLogps, beta: float) -> dict[str, np.ndarray]:
    """Every loss under OPTIONS from probabilities and odds, in float64 NumPy: no log-sigmoid anywhere."""
    w, l, rw, rl, n_w, n_l = (  # noqa: E741
        getattr(p, f.name).double().numpy() for f in fields(p) if f.name != "batch_mean"
    )
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
    return {
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


@pytest.mark.parametrize("name", LOSSES)
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
    shifted = replace(p, chosen=p.chosen - 3.0, rejected=p.rejected - 3.0)
    for name in LOSSES:
        options = OPTIONS.get(name, {})
        change = (loss(name, shifted, **options) - loss(name, p, **options)).abs().max()
        if name in ("sigmoid", "robust", "ipo", "hinge"):
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
    tensors = [getattr(p, f.name) for f in fields(p)][:-1]
    whole = loss(name, p, **OPTIONS.get(name, {}))
    mixed = loss(name, PairLogps(*(t[order] for t in tensors), p.batch_mean), **OPTIONS.get(name, {}))
    alone = loss(name, PairLogps(*(t[:1] for t in tensors), p.batch_mean), **OPTIONS.get(name, {}))
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
    other_reference = replace(p, ref_chosen=p.ref_chosen - 1.0)
    assert torch.equal(value, loss(name, other_reference, **options)) != objective.needs_reference
    other_mean = replace(p, batch_mean=p.batch_mean + 1.0)
    assert torch.equal(value, loss(name, other_mean, **options)) != objective.needs_batch_mean
    assert torch.equal(value, loss(name, p, 0.7, **options)) == (name in ("orpo", "unlikelihood"))
    given_up = replace(p, rejected=torch.full_like(p.rejected, -1e6))
    assert bool((loss(name, given_up, **options) < -1e4).all()) != objective.bounded_below


def test_the_catalogue_has_the_defaults_of_the_functions():
    for name, objective in LOSSES.items():
        parameters = inspect.signature(objective.loss).parameters.values()
        assert objective.options == {p.name: p.default for p in parameters if p.default is not p.empty}, name
    shown = {f.name: spec_of(f).help for f in fields(TrainDPO)}
    assert "(default: sigmoid 0, robust 0.1)" in shown["label_smoothing"]
    assert "(default: rpo 1, unlikelihood 0.1)" in shown["alpha"] and "(default: 1)" in shown["gamma"]


def test_the_command_line_knows_the_same_losses_and_options():
    known = {f.name: f for f in fields(TrainDPO)}
    assert set(spec_of(known["loss"]).choices) == set(LOSSES)
    # what is not given falls to the loss's own default
    assert all(known[option].default is None for objective in LOSSES.values() for option in objective.options)


# --- extreme inputs --------------------------------------------------------------------------------------------------

LOGP = st.one_of(st.sampled_from([0.0, -1e-45, -1e-38, -1e-30, -1e-7, -1e4]), st.floats(-1e4, 0.0, width=32))
TOKENS = st.sampled_from([1.0, 7.0, 2048.0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LOGP, LOGP, LOGP, LOGP, TOKENS, TOKENS, st.floats(-1e4, 1e4, width=32))
def test_finite_whatever_comes(w, l, ref_w, ref_l, n_w, n_l, z):  # noqa: E741
    for name, objective in LOSSES.items():
        p = pairs(w, l, ref_w, ref_l, n_w, n_l, z=z, dtype=torch.float32)
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
