"""The mathematics of one update: advantages, token weights and the clipped objective.

Three kinds of proof: numbers worked by hand, an independent float64 computation token by token (`oracle`), and
properties that hold whatever the numbers are (splitting, padding, gradients, first update, KL).
"""

import math
from collections import Counter
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx
from torch import Tensor

import R1ZeroTrain
from R1ZeroTrain import Config, Rollout, group_advantages, grpo_loss, token_weights, update

LOSSES = pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
KL_BETAS = pytest.mark.parametrize("kl_beta", [0.0, 0.3])
LOW, HIGH = 0.2, 0.28  # unequal, so that swapping the two bounds makes a test fail
LN2 = math.log(2)


# --- the independent computation -------------------------------------------------------------------------------------


def oracle_advantages(rewards: np.ndarray) -> list[float]:
    """(r - mean) / (std + 1e-4) in each group, ddof 1. `statistics` computes in fractions: equal rewards give 0."""
    return [(r - mean(group)) / (stdev(group) + 1e-4) for group in rewards.tolist() for r in group]


def oracle_weights(lengths: list[int], loss: str, max_new_tokens: int) -> list[float]:
    n = len(lengths)
    if loss == "grpo":
        return [1 / (length * n) for length in lengths]
    return [1 / (sum(lengths) if loss == "dapo" else n * max_new_tokens)] * n


def oracle(case: dict) -> Counter:
    """Equation 1 token by token. Rounding is relative to `scale` and `kl_scale`, the sums of the terms' magnitudes."""
    sums = Counter()
    for i, t in zip(*case["mask"].nonzero()):
        advantage, weight = float(case["advantages"][i]), float(case["weights"][i])
        logp = float(case["logp"][i, t])
        ratio = math.exp(logp - case["logp_old"][i, t])
        clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
        surrogate = min(ratio * advantage, clipped * advantage)
        x = float(case["logp_ref"][i, t]) - logp
        k3, size = math.exp(x) - x - 1, math.exp(x) + abs(x) + 1
        sums["loss"] -= weight * (surrogate - case["kl_beta"] * k3)
        sums["scale"] += weight * (abs(surrogate) + case["kl_beta"] * size)
        sums["kl"] += k3
        sums["kl_scale"] += size
        sums[np.sign(advantage), np.sign(ratio - clipped)] += 1
    sums["clip_fraction"] = sums[1, 1] + sums[-1, -1]
    return sums


def make_case(
    seed: int, loss: str = "grpo", kl_beta: float = 0.04, dtype: type = np.float64
) -> dict:
    """A random rollout: ragged lengths, some all-equal groups, huge finite values in padding, no ratio at a bound."""
    rng = np.random.default_rng(seed)
    questions, group_size, width = rng.integers([1, 2, 1], [5, 6, 13])
    # Exact in float32 and far apart, so that r - mean does not use up the tolerance of 1e-6 on the loss.
    rewards = rng.choice([0.0, 0.5, 1.0, 1.5], (questions, group_size))
    lengths = rng.integers(1, width + 1, rewards.size)
    mask = np.arange(width) < lengths[:, None]
    logp = -rng.exponential(2.0, mask.shape).astype(dtype)
    logp_old, logp_ref = (logp - rng.normal(0, s, mask.shape).astype(dtype) for s in (0.4, 0.5))
    # At a clip bound, rounding decides whether a token counts as clipped, and finite differences straddle two slopes.
    for bound in (1 - LOW, 1 + HIGH):
        logp_old[abs(np.exp(logp - logp_old) - bound) < 5e-3] -= 0.02
    for values in (logp, logp_old, logp_ref):
        values[~mask] = rng.choice([50.0, -1e4], (~mask).sum())
    limit = int(width + rng.integers(0, 4))
    return {
        "logp": logp,
        "logp_old": logp_old,
        "logp_ref": logp_ref,
        "advantages": np.array(oracle_advantages(rewards), dtype),
        "mask": mask,
        "weights": np.array(oracle_weights(lengths.tolist(), loss, limit), dtype),
        "kl_beta": kl_beta,
        "rollout": (rewards, lengths, limit),
    }


def evaluate(case: dict, **changed: object) -> tuple[Tensor, Tensor, dict]:
    """grpo_loss of a case: (loss, its gradient with respect to logp, metrics)."""
    case = case | {"clip_low": LOW, "clip_high": HIGH} | changed
    case.pop("rollout", None)
    case = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    if not case["kl_beta"]:
        case["logp_ref"] = None
    before = {k: v.clone() for k, v in case.items() if isinstance(v, Tensor)}
    logp = case["logp"].requires_grad_()
    loss, metrics = grpo_loss(**case)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert all(torch.equal(case[k], v) for k, v in before.items()), "an argument was modified"
    assert loss.shape == () and loss.dtype == gradient.dtype == logp.dtype
    assert set(metrics) == {"clip_fraction", *(["kl"] if case["kl_beta"] else [])}
    return loss.detach(), gradient, {name: float(value) for name, value in metrics.items()}


def assert_close(case: dict, got: tuple, expected: dict | tuple, tolerance: float) -> None:
    """Loss and metrics are as expected, up to rounding."""
    sizes = oracle(case)
    if isinstance(expected, tuple):
        expected = {"loss": expected[0], **expected[2]}
    assert float(got[0]) == approx(float(expected["loss"]), rel=0, abs=tolerance * sizes["scale"])
    assert got[2]["clip_fraction"] == expected["clip_fraction"]
    if "kl" in got[2]:
        assert got[2]["kl"] == approx(expected["kl"], rel=0, abs=tolerance * sizes["kl_scale"])


# --- advantages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        # one right of four: mean 1/4, std sqrt((9/16 + 3/16) / 3) = 1/2
        ([0, 0, 1, 0], [-0.499900, -0.499900, 1.499700, -0.499900]),
        # two of four: std sqrt(1/3); one of two: std sqrt(1/2)
        ([1, 1, 0, 0], [0.865875, 0.865875, -0.865875, -0.865875]),
        ([0, 1], [-0.7070068, 0.7070068]),
        # 1, 2, 3: mean 2, std 1
        ([3, 1, 2], [0.99990001, -0.99990001, 0.0]),
        # a format reward for all and one right answer: the shared 0.1 cancels
        ([0.1, 1.1, 0.1, 0.1], [-0.499900, 1.499700, -0.499900, -0.499900]),
        # std 5e-4 is of the order of the 1e-4 added to it: 7.5e-4 / 6e-4
        ([1e-3, 0, 0, 0], [1.25, -0.4166667, -0.4166667, -0.4166667]),
    ],
)
def test_advantages_by_hand(group: list[float], expected: list[float]) -> None:
    rewards = torch.tensor([group, group[::-1]], dtype=torch.float32)
    advantages = group_advantages(rewards)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == approx(expected + expected[::-1], rel=0, abs=2e-6)


def test_advantages_without_scaling_only_subtract_the_mean() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
    advantages = group_advantages(rewards, scale="none")
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25, 1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 5, 6, 7, 8, 10, 11, 16, 33, 64])
def test_all_equal_groups_are_exactly_zero(scale: str, group_size: int) -> None:
    # In float32, the mean of several 0.1 is not 0.1; the difference would be divided by little more than 1e-4.
    values = torch.tensor([0.0, 1.0, 0.1, 0.2, 0.3, 0.7, 1.1, 1 / 3, -0.1, 1e-8, 12345.678])
    rewards = torch.cat([values[:, None].repeat(1, group_size), torch.arange(group_size)[None]])
    advantages = group_advantages(rewards, scale).view(-1, group_size)
    assert not advantages[:-1].any()
    assert advantages[-1].abs().max() > 0.4, "equality is judged group by group"


@pytest.mark.parametrize("seed", range(10))
def test_advantages_against_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = torch.tensor(
        rng.choice([0.0, 0.1, 0.5, 1.0, 1.1], (16, 2 + seed)), dtype=torch.float32
    )
    for rewards in (values, values.T.contiguous().T):  # the second is not contiguous
        advantages = group_advantages(rewards)
        expected = oracle_advantages(values.double().numpy())
        assert advantages.tolist() == approx(expected, rel=0, abs=3e-6)
        before = rewards.clone()
        advantages.add_(1)
        assert torch.equal(rewards, before), "the result shares no memory with its input"


# --- token weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("grpo", [1 / 3, 1 / 9, 1 / 12]),  # 1 / (len·3); times the lengths, they add up to 1
        ("dapo", [1 / 8, 1 / 8, 1 / 8]),  # 1 / (1 + 3 + 4)
        ("dr_grpo", [1 / 30, 1 / 30, 1 / 30]),  # 1 / (3·10)
    ],
)
def test_token_weights_by_hand(loss: str, expected: list[float]) -> None:
    for integer in (torch.int64, torch.int32):
        lengths = torch.tensor([1, 3, 4], dtype=integer)
        weights = token_weights(lengths, loss, 10)
        assert weights.dtype == torch.float32 and lengths.tolist() == [1, 3, 4]
        assert weights.tolist() == approx(expected, rel=2e-7)


# --- by hand ---------------------------------------------------------------------------------------------------------


def tokens_by_hand(ratio: list, advantages: list, x: list, weights: list, kl_beta: float) -> dict:
    """A case with given ratios pi / pi_old and given x = logp_ref - logp; a ratio of 0 marks padding."""
    ratio, x = np.array(ratio), np.array(x)
    logp = np.full(ratio.shape, -2.0)
    with np.errstate(divide="ignore"):
        logp_old = np.maximum(logp - np.log(ratio), -50)
    return {
        "logp": logp,
        "logp_old": logp_old,
        "logp_ref": logp + x,
        "advantages": np.array(advantages),
        "mask": ratio > 0,
        "weights": np.array(weights),
        "kl_beta": kl_beta,
    }


@KL_BETAS
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    # weight 1/2, clip to [0.8, 1.28]; loss = -min(ratio·A, clip(ratio)·A) / 2, its slope -ratio·A / 2 where unclipped
    [
        (2.0, 1.5, -1.28, 0.0, 1),  # good and already more likely: no further push
        (2.0, 0.5, -0.5, -0.5, 0),  # good and less likely: the lower bound does not apply
        (-2.0, 0.5, 0.8, 0.0, 1),  # bad and already less likely: no further push
        (-2.0, 1.5, 1.5, 1.5, 0),  # bad and more likely: the upper bound does not apply
        (2.0, 1.25, -1.25, -1.25, 0),  # inside, but beyond 1 + clip_low
        (2.0, 1.3, -1.28, 0.0, 1),
        (-2.0, 0.75, 0.8, 0.0, 1),  # outside, though above 1 - clip_high
        (-2.0, 0.85, 0.85, 0.85, 0),
        (-2.0, 1.25, 1.25, 1.25, 0),
        (2.0, 0.75, -0.75, -0.75, 0),
        (0.0, 1.5, 0.0, 0.0, 0),  # advantage 0: both terms are 0, and no bound is active
        (0.0, 0.5, 0.0, 0.0, 0),
    ],
)
def test_one_token_by_hand(
    advantage: float, ratio: float, loss: float, gradient: float, clipped: int, kl_beta: float
) -> None:
    got, slope, metrics = evaluate(tokens_by_hand([[ratio]], [advantage], [[LN2]], [0.5], kl_beta))
    k3 = 0.3068528194400547  # 2 - ln 2 - 1; its slope in logp is 1 - 2 = -1
    assert float(got) == approx(loss + 0.5 * kl_beta * k3, abs=1e-12)
    assert float(slope) == approx(gradient - 0.5 * kl_beta, abs=1e-12)
    assert metrics == approx({"clip_fraction": clipped} | ({"kl": k3} if kl_beta else {}))


@pytest.mark.parametrize(
    ("x", "k3", "slope"),  # x = logp_ref - logp; k3 = e^x - x - 1, d k3 / d logp = 1 - e^x
    [
        (LN2, 0.3068528194400547, -1.0),
        (-LN2, 0.1931471805599453, 0.5),
        (0.0, 0.0, 0.0),
        (-5.0, 4.006737946999085, 0.9932620530009145),
    ],
)
def test_k3_by_hand(x: float, k3: float, slope: float) -> None:
    loss, gradient, metrics = evaluate(tokens_by_hand([[1.0]], [0.0], [[x]], [1.0], 1.0))
    assert float(loss) == approx(k3, abs=1e-12)  # the KL is a penalty: it raises the loss
    assert metrics["kl"] == approx(k3, abs=1e-12) and float(gradient) == approx(slope, abs=1e-12)


def test_two_rows_by_hand() -> None:
    # Row 0: A = 1, ratios 1 and 2 (clipped to 1.28), weight 1/4. Row 1: A = -3, ratio 1/2 (clipped to 0.8), weight 1/2.
    x = -LN2 * np.ones((2, 2))
    case = tokens_by_hand([[1.0, 2.0], [0.5, 0.0]], [1.0, -3.0], x, [0.25, 0.5], 0.5)
    loss, _, metrics = evaluate(case)
    k3 = 0.1931471805599453
    expected = -(0.25 * (1.0 + 1.28 - 2 * 0.5 * k3) + 0.5 * (-2.4 - 0.5 * k3))
    assert float(loss) == approx(expected, abs=1e-12)
    # Metrics are sums over the mask, not yet divided by the three tokens.
    assert metrics == approx({"clip_fraction": 2, "kl": 3 * k3})


# --- against the independent computation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kl_beta", [0.0, 0.001, 0.3])
@LOSSES
def test_loss_against_the_oracle(loss: str, kl_beta: float) -> None:
    for seed in range(30):
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
            case = make_case(seed, loss, kl_beta, dtype)
            assert_close(case, evaluate(case), oracle(case), tolerance)
        # From the rewards to the loss, in float32.
        rewards, lengths, limit = case["rollout"]
        got = evaluate(
            case,
            advantages=group_advantages(torch.tensor(rewards, dtype=torch.float32)),
            weights=token_weights(torch.tensor(lengths), loss, limit),
        )
        case["advantages"] = oracle_advantages(rewards)
        case["weights"] = oracle_weights(lengths.tolist(), loss, limit)
        assert_close(case, got, oracle(case), 1e-6)


def test_the_random_cases_reach_every_branch() -> None:
    reached = set().union(*(oracle(make_case(seed)) for seed in range(30)))
    assert {(sign, side) for sign in (-1, 0, 1) for side in (-1, 0, 1)} <= reached


@KL_BETAS
@LOSSES
def test_gradient_against_finite_differences_of_the_oracle(loss: str, kl_beta: float) -> None:
    step = 1e-5
    for seed in range(200, 206):
        case = make_case(seed, loss, kl_beta)
        expected = np.zeros_like(case["logp"])  # padding stays 0
        for place in zip(*case["mask"].nonzero()):
            for sign in (1, -1):
                logp = case["logp"].copy()
                logp[place] += sign * step
                expected[place] += sign * oracle(case | {"logp": logp})["loss"] / (2 * step)
        gradient = evaluate(case)[1].numpy()
        size = max(1, oracle(case)["scale"])
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9 * size)
        assert not gradient[~case["mask"]].any()


# --- padding and splitting -------------------------------------------------------------------------------------------


@KL_BETAS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_padding_does_not_matter(kl_beta: float, dtype: type) -> None:
    # With most of these, exp overflows to inf, and inf times a mask of 0 is NaN, in the loss or in its gradient.
    fillings = [(50, 50, 50), (50, -1e4, -1e4), (-1e4, 50, 50), (50, -1e4, 50), (-1e4, 0, 0)]
    for seed in range(400, 405):
        case = make_case(seed, "dapo", kl_beta, dtype)
        expected, (n, width) = evaluate(case), case["mask"].shape
        for extra, filling in zip((0, 1, 1, 7, 64), fillings):
            wide = case | {"mask": np.pad(case["mask"], ((0, 0), (0, extra)))}
            for name, value in zip(("logp", "logp_old", "logp_ref"), filling):
                wide[name] = np.full((n, width + extra), value, dtype)
                wide[name][wide["mask"]] = case[name][case["mask"]]
            got = evaluate(wide)
            assert_close(case, got, expected, 1e-6)
            torch.testing.assert_close(got[1][:, :width], expected[1], rtol=1e-6, atol=0)
            assert not got[1][~torch.tensor(wide["mask"])].any()


@KL_BETAS
@LOSSES
def test_micro_batches_add_up_to_the_whole(loss: str, kl_beta: float) -> None:
    for seed in range(500, 510):
        case, rng = make_case(seed, loss, kl_beta, np.float32), np.random.default_rng(seed)
        whole, lengths, n = evaluate(case), case["rollout"][1], len(case["mask"])
        for pieces in {1, min(2, n), min(3, n), n}:
            cuts = rng.choice(np.arange(1, n), pieces - 1, replace=False)
            total, gradient, sums = 0.0, torch.zeros_like(whole[1]), Counter()
            for rows in np.split(rng.permutation(n), sorted(cuts)):
                width = lengths[rows].max()  # each micro-batch is as wide as its own longest row
                part = {k: v[rows] for k, v in case.items() if isinstance(v, np.ndarray)}
                part = {k: v[:, :width] if v.ndim == 2 else v for k, v in part.items()}
                value, gradient[rows, :width], metrics = evaluate(part, kl_beta=kl_beta)
                total += float(value)
                sums.update(metrics)
            assert_close(case, (total, gradient, sums), whole, 1e-6)
            torch.testing.assert_close(gradient, whole[1], rtol=1e-6, atol=0)


# --- the first update of a rollout -----------------------------------------------------------------------------------


@LOSSES
def test_first_update_is_exact(loss: str) -> None:
    # Except for logp, all values are exact in binary: sums are exact in any order, so the test can require equality.
    lengths = torch.tensor([1, 2, 4, 8, 8, 4, 4, 1])  # 8 rows, 32 tokens
    logp = -3 * torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) - 0.001
    case = {
        "logp": logp,
        "logp_old": logp.clone(),
        "logp_ref": logp.clone(),
        "advantages": torch.tensor([1.5, -0.5, -0.5, -0.5, 2.0, -2.0, 0.25, 0.0]),
        "mask": torch.arange(8) < lengths[:, None],
        "weights": token_weights(lengths, loss, 8),
        "kl_beta": 0.5,
    }
    value, gradient, metrics = evaluate(case)
    expected = case["weights"][:, None] * case["mask"] * case["advantages"][:, None]
    assert float(value) == -float(expected.sum()) and torch.equal(gradient, -expected)
    assert metrics == {"clip_fraction": 0, "kl": 0}


@LOSSES
def test_weights_are_those_of_all_processes(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the second of two processes. DDP averages gradients, so each process has twice its share of the sum."""
    lengths, advantages = torch.tensor([4, 2, 1, 3]), torch.tensor([1.0, -2.0])
    ids = torch.where(torch.arange(4) < lengths[2:, None], 7, -1)
    rollout = Rollout(ids, ids, lengths[2:], lengths[2:] == 4, torch.zeros(2, 4), [])
    policy = torch.nn.Linear(4, 2, bias=False)  # its weights are the log-probabilities
    monkeypatch.setattr(
        R1ZeroTrain,
        "token_logprobs",
        lambda policy, _, rows, cfg: (
            policy.weight[rows],
            torch.zeros(len(rows), 4),
            ids[rows] > 0,
        ),
    )
    optimizer, gradients = torch.optim.SGD(policy.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(policy.weight.grad.clone()))
    accelerator = SimpleNamespace(
        num_processes=2,
        process_index=1,
        gather=lambda own: torch.cat([lengths[:2], own]),
        backward=Tensor.backward,
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        reduce=lambda total, *_: total,
    )
    cfg = Config(kl_beta=0.0, loss=loss, max_new_tokens=5, max_grad_norm=99.0)
    update(policy, None, optimizer, rollout, advantages, cfg, accelerator)
    weights = torch.tensor(oracle_weights(lengths.tolist(), loss, 5)[2:])
    expected = -2 * (weights * advantages)[:, None] * (ids > 0)
    torch.testing.assert_close(gradients[0], expected)


# --- the KL estimate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_k3_is_never_negative(dtype: type) -> None:
    for size in (0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0, 20.0):
        for x in (size, -size, 0.59 * size, -0.59 * size):
            case = tokens_by_hand([[1.0]], [0.0], [[x]], [1.0], 1.0)
            case = {k: v.astype(dtype) for k, v in case.items() if k != "kl_beta"}
            k3 = evaluate(case, kl_beta=1.0)[2]["kl"]
            assert k3 >= -2 * np.finfo(dtype).eps  # e^x - x - 1 subtracts numbers near 1
            assert k3 > 0 or abs(x) < 2e-3


@pytest.mark.parametrize("seed", range(10))
def test_k3_is_unbiased(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    # Rows are the outcomes, each weighted by its probability under the policy: the loss is E_{x~p}[k3].
    case = tokens_by_hand([[1.0]] * 6, [0.0] * 6, np.log(q / p)[:, None], p, 1.0)
    assert float(evaluate(case)[0]) == approx((p * np.log(p / q)).sum(), rel=1e-12)
