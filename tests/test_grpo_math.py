"""The mathematics of one update: advantages, token weights and the clipped objective.

Three kinds of proof: numbers worked by hand, an independent float64 computation written with explicit loops (`oracle`),
and properties that must hold whatever the numbers are (splitting, padding, gradients, first update, KL).
"""

import math

import numpy as np
import pytest
import torch

from R1ZeroTrain import group_advantages, grpo_loss, token_weights

LOSSES = ("grpo", "dapo", "dr_grpo")
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # unequal, so that exchanging the two sides shows
TENSORS = ("logp", "logp_old", "logp_ref", "advantages", "mask", "weights")
LN2 = 0.6931471805599453


# ---------------------------------------------------------------- the independent computation


def oracle_advantages(rewards: np.ndarray) -> list[float]:
    """(r - mean) / (std + 1e-4) per group, ddof 1, question by question; an all-equal group is 0."""
    advantages = []
    for group in rewards.tolist():
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
        equal = all(r == group[0] for r in group)
        advantages += [0.0 if equal else (r - mean) / (std + 1e-4) for r in group]
    return advantages


def oracle_weights(lengths: list[int], loss: str, max_new_tokens: int) -> list[float]:
    if loss == "grpo":
        return [1 / (length * len(lengths)) for length in lengths]
    if loss == "dapo":
        return [1 / sum(lengths) for _ in lengths]
    return [1 / (len(lengths) * max_new_tokens) for _ in lengths]


def oracle(case: dict) -> dict:
    """Equation 1 token by token. `scale` sums the sizes of all that is added up: rounding is relative to that."""
    terms, kl_terms, sizes, kl_sizes, kinds = [], [], [], [], []
    for i, length in enumerate(case["lengths"]):
        a, w = float(case["advantages"][i]), float(case["weights"][i])
        for t in range(length):
            ratio = math.exp(case["logp"][i, t] - case["logp_old"][i, t])
            clipped = min(max(ratio, 1 - case["clip_low"]), 1 + case["clip_high"])
            surrogate = min(ratio * a, clipped * a)
            side = (
                "high"
                if ratio > 1 + case["clip_high"]
                else "low"
                if ratio < 1 - case["clip_low"]
                else "inside"
            )
            kinds.append(("+" if a > 0 else "-" if a < 0 else "0") + side)
            k3 = k3_size = 0.0
            if case["kl_beta"] > 0:
                x = float(case["logp_ref"][i, t] - case["logp"][i, t])
                k3, k3_size = math.exp(x) - x - 1, math.exp(x) + abs(x) + 1
            kl_terms.append(k3)
            kl_sizes.append(k3_size)
            terms.append(w * (surrogate - case["kl_beta"] * k3))
            sizes.append(w * (abs(surrogate) + case["kl_beta"] * k3_size))
    return {
        "loss": -math.fsum(terms),
        "scale": math.fsum(sizes),
        "kl": math.fsum(kl_terms),
        "kl_scale": math.fsum(kl_sizes),
        "clip_fraction": kinds.count("+high") + kinds.count("-low"),
        "kinds": set(kinds),
    }


def make_case(
    seed: int, loss: str = "grpo", kl_beta: float = 0.04, dtype: type = np.float64
) -> dict:
    """Random rollout: ragged lengths, some all-equal groups, huge finite values in the padding, no token on a kink."""
    rng = np.random.default_rng(seed)
    questions, group_size, width = rng.integers(1, 5), rng.integers(2, 6), int(rng.integers(1, 13))
    n = int(questions * group_size)
    # Exact in float32 and far apart: the 1e-6 asked of the loss is then not used up by the subtraction r - mean.
    rewards = rng.choice([0.0, 0.5, 1.0, 1.5], size=(questions, group_size)).astype(np.float32)
    lengths = rng.integers(1, width + 1, size=n).tolist()
    mask = np.arange(width)[None, :] < np.array(lengths)[:, None]
    logp = (-rng.exponential(2.0, size=(n, width))).astype(dtype)
    logp_old = (logp - rng.normal(0, 0.4, size=(n, width))).astype(dtype)
    logp_ref = (logp + rng.normal(0, 0.5, size=(n, width))).astype(dtype)
    # On a clip bound rounding decides whether a token counts as clipped, and finite differences straddle two slopes.
    for bound in (1 - CLIP_LOW, 1 + CLIP_HIGH):
        near = np.abs(np.exp(logp.astype(np.float64) - logp_old) - bound) < 5e-3
        logp_old = np.where(near, logp_old - dtype(0.02), logp_old)
    for values in (logp, logp_old, logp_ref):
        values[~mask] = rng.choice([50.0, -1e4], size=int((~mask).sum()))
    max_new_tokens = width + int(rng.integers(0, 4))
    return {
        "logp": logp,
        "logp_old": logp_old,
        "logp_ref": logp_ref if kl_beta > 0 else None,
        "advantages": np.array(oracle_advantages(rewards.astype(np.float64)), dtype=dtype),
        "mask": mask,
        "weights": np.array(oracle_weights(lengths, loss, max_new_tokens), dtype=dtype),
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "kl_beta": kl_beta,
        "rewards": rewards,
        "lengths": lengths,
        "max_new_tokens": max_new_tokens,
    }


def to_tensors(case: dict) -> dict:
    """The arguments of grpo_loss, in tensors of their own."""
    arguments = {k: None if case[k] is None else torch.tensor(case[k]) for k in TENSORS}
    return arguments | {k: case[k] for k in ("clip_low", "clip_high", "kl_beta")}


def loss_and_gradient(arguments: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    logp = arguments["logp"].clone().requires_grad_()
    loss, metrics = grpo_loss(**(arguments | {"logp": logp}))
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, {k: v.detach() for k, v in metrics.items()}


def rows_of(arguments: dict, rows: list[int], width: int) -> dict:
    """A micro-batch: some rows, cut to `width` tokens; advantages and weights stay those of the whole batch."""
    part = dict(arguments)
    for name in TENSORS:
        if arguments[name] is not None:
            part[name] = (
                arguments[name][rows][:, :width]
                if arguments[name].dim() == 2
                else arguments[name][rows]
            )
    return part


def kl_arguments(logp: torch.Tensor, logp_ref: torch.Tensor, weights: torch.Tensor) -> dict:
    """One token a row, no advantage, beta 1: the loss is the weighted sum of k3 and nothing else."""
    return {
        "logp": logp[:, None],
        "logp_old": logp[:, None].clone(),
        "logp_ref": logp_ref[:, None],
        "advantages": torch.zeros_like(logp),
        "mask": torch.ones(len(logp), 1, dtype=torch.bool),
        "weights": weights,
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "kl_beta": 1.0,
    }


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        # one right of four: mean 1/4, std sqrt((9/16 + 3/16) / 3) = 1/2
        ([1, 0, 0, 0], [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]),
        ([0, 0, 1, 0], [-0.499900, -0.499900, 1.499700, -0.499900]),
        # two of four: std sqrt(1/3); one of two: std sqrt(1/2)
        ([1, 1, 0, 0], [0.865875, 0.865875, -0.865875, -0.865875]),
        ([0, 1], [-0.7070068, 0.7070068]),
        # 1, 2, 3: mean 2, std 1
        ([3, 1, 2], [0.99990001, -0.99990001, 0.0]),
        # a format reward for all and one right answer: the shared 0.1 cancels
        ([0.1, 1.1, 0.1, 0.1], [-0.499900, 1.499700, -0.499900, -0.499900]),
        # std 5e-4 is of the size of the 1e-4 beside it: 7.5e-4 / 6e-4
        ([1e-3, 0, 0, 0], [1.25, -0.4166667, -0.4166667, -0.4166667]),
    ],
)
def test_advantages_by_hand(group: list[float], expected: list[float]) -> None:
    advantages = group_advantages(torch.tensor([group], dtype=torch.float32))
    assert advantages.shape == (len(group),)
    assert advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=0, atol=2e-6)


def test_advantages_without_scaling_only_subtract_the_mean() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
    advantages = group_advantages(rewards, scale="none")
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25, 1.0, -1.0, 0.0, 0.0]
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, scale="group")), (
        "group is the default"
    )


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 5, 6, 7, 8, 10, 11, 16, 33, 64])
def test_all_equal_groups_are_exactly_zero(scale: str, group_size: int) -> None:
    # The mean of several 0.1 is not 0.1 in float32; what is left would be divided by little more than 1e-4.
    values = torch.tensor([0.0, 1.0, 0.1, 0.2, 0.3, 0.7, 1.1, 1 / 3, -0.1, 1e-8, 12345.678])
    rewards = torch.cat(
        [values[:, None].repeat(1, group_size), torch.arange(group_size)[None].float()]
    )
    advantages = group_advantages(rewards, scale=scale).view(-1, group_size)
    assert advantages[:-1].flatten().tolist() == [0.0] * (len(values) * group_size)
    assert advantages[-1].abs().max() > 0.4, "equality is judged group by group"


def test_an_equal_group_beside_an_unequal_one() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 1.1], [1.1, 1.1, 1.1]])
    advantages = group_advantages(rewards).view(3, 3)
    assert advantages[0].tolist() == advantages[2].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(
        advantages[1].numpy(), oracle_advantages(rewards[1:2].double().numpy()), rtol=1e-5
    )


def test_advantages_are_flattened_question_by_question() -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0], [40.0, 20.0, 0.0]])
    advantages = group_advantages(rewards, scale="none")
    assert advantages.tolist() == [-2.0, -1.0, 3.0, 20.0, 0.0, -20.0]


def test_advantages_of_a_non_contiguous_input() -> None:
    contiguous = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.1, 1.1, 1.1, 0.1], [0.1, 0.1, 0.1, 0.1]])
    expected = oracle_advantages(contiguous.double().numpy())
    transposed = contiguous.t().contiguous().t()
    strided = torch.stack([contiguous, -contiguous], dim=2)[:, :, 0]
    for rewards in (transposed, strided):
        assert not rewards.is_contiguous()
        advantages = group_advantages(rewards)
        assert advantages.shape == (12,)
        np.testing.assert_allclose(advantages.numpy(), expected, rtol=0, atol=2e-6)


def test_groups_do_not_touch_one_another() -> None:
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    before = group_advantages(rewards).view(4, 8)
    changed = rewards.clone()
    changed[2] = torch.arange(8) * 100.0
    after = group_advantages(changed).view(4, 8)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])
    for q in range(4):
        torch.testing.assert_close(
            group_advantages(rewards[q : q + 1]), before[q], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("seed", range(10))
def test_advantages_against_the_oracle(seed: int) -> None:
    rewards = (
        np.random.default_rng(seed)
        .choice([0.0, 0.1, 0.5, 1.0, 1.1], size=(16, 2 + seed))
        .astype(np.float32)
    )
    advantages = group_advantages(torch.tensor(rewards))
    np.testing.assert_allclose(
        advantages.numpy(), oracle_advantages(rewards.astype(np.float64)), rtol=0, atol=3e-6
    )


# ---------------------------------------------------------------- token weights


@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("grpo", [1 / 3, 1 / 9, 1 / 12]),  # 1 / (len·3)
        ("dapo", [1 / 8, 1 / 8, 1 / 8]),  # 1 / (1 + 3 + 4)
        ("dr_grpo", [1 / 30, 1 / 30, 1 / 30]),  # 1 / (3·10)
    ],
)
def test_token_weights_by_hand(loss: str, expected: list[float], integer: torch.dtype) -> None:
    weights = token_weights(torch.tensor([1, 3, 4], dtype=integer), loss, 10)
    assert weights.shape == (3,)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("seed", range(10))
def test_token_weights_of_a_batch_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = torch.tensor(rng.integers(1, 2000, size=int(rng.integers(1, 300))))
    total = {
        loss: float((token_weights(lengths, loss, 2048).double() * lengths).sum())
        for loss in LOSSES
    }
    assert total["grpo"] == pytest.approx(1, rel=1e-6)
    assert total["dapo"] == pytest.approx(1, rel=1e-6)
    assert total["dr_grpo"] == pytest.approx(float(lengths.double().mean()) / 2048, rel=1e-6)


# ---------------------------------------------------------------- one token, by hand


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    # weight 1/2, clip to [0.8, 1.28]; loss = -min(ratio·A, clip(ratio)·A) / 2, its slope -ratio·A / 2 where unclipped
    [
        (2.0, 1.5, -1.28, 0.0, 1),  # good and already likelier: no further push
        (2.0, 0.5, -0.5, -0.5, 0),  # good and less likely: the bound below does not hold it back
        (-2.0, 0.5, 0.8, 0.0, 1),  # bad and already unlikelier: no further push
        (-2.0, 1.5, 1.5, 1.5, 0),  # bad and likelier: the bound above does not hold it back
        (2.0, 1.25, -1.25, -1.25, 0),  # inside, but beyond 1 + clip_low
        (2.0, 1.3, -1.28, 0.0, 1),
        (-2.0, 0.75, 0.8, 0.0, 1),  # outside, though above 1 - clip_high
        (-2.0, 0.85, 0.85, 0.85, 0),
        (-2.0, 1.25, 1.25, 1.25, 0),
        (2.0, 0.75, -0.75, -0.75, 0),
        (0.0, 1.5, 0.0, 0.0, 0),  # no advantage: both bounds give 0, neither is active
        (0.0, 0.5, 0.0, 0.0, 0),
    ],
)
@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_one_token_by_hand(
    advantage: float, ratio: float, loss: float, gradient: float, clipped: int, kl_beta: float
) -> None:
    logp = torch.tensor([[-1.0]], dtype=torch.float64)
    arguments = {
        "logp": logp,
        "logp_old": logp - math.log(ratio),
        # k3 = 2 - ln 2 - 1 = 0.306853, and its slope in logp is 1 - 2 = -1
        "logp_ref": logp + LN2 if kl_beta else None,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "weights": torch.tensor([0.5], dtype=torch.float64),
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_beta": kl_beta,
    }
    got, slope, metrics = loss_and_gradient(arguments)
    assert got.shape == ()
    assert float(got) == pytest.approx(loss + 0.5 * kl_beta * 0.3068528194400547, abs=1e-12)
    assert float(slope) == pytest.approx(gradient - 0.5 * kl_beta, abs=1e-12)
    assert float(metrics["clip_fraction"]) == clipped
    if kl_beta:
        assert float(metrics["kl"]) == pytest.approx(0.3068528194400547, abs=1e-12)
    elif gradient == 0:
        assert float(slope) == 0.0


@pytest.mark.parametrize(
    (
        "log_ratio_to_reference",
        "k3",
        "slope",
    ),  # x = logp_ref - logp; k3 = e^x - x - 1, d k3 / d logp = 1 - e^x
    [
        (LN2, 0.3068528194400547, -1.0),
        (-LN2, 0.1931471805599453, 0.5),
        (0.0, 0.0, 0.0),
        (-5.0, 4.006737946999, None),
    ],
)
def test_k3_by_hand(log_ratio_to_reference: float, k3: float, slope: float | None) -> None:
    logp = torch.tensor([-2.0], dtype=torch.float64)
    arguments = kl_arguments(
        logp, logp + log_ratio_to_reference, torch.ones(1, dtype=torch.float64)
    )
    loss, gradient, metrics = loss_and_gradient(arguments)
    assert float(loss) == pytest.approx(k3, abs=1e-12)  # the KL is a penalty: it raises the loss
    assert float(metrics["kl"]) == pytest.approx(k3, abs=1e-12)
    if slope is not None:
        assert float(gradient) == pytest.approx(slope, abs=1e-12)


def test_two_rows_by_hand() -> None:
    # Row 0: A = 1, ratios 1 and 2 (clipped to 1.2), weight 1/4. Row 1: A = -3, ratio 1/2 (clipped to 0.8), weight 1/2.
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], dtype=torch.float64)
    ratio = torch.tensor([[1.0, 2.0], [0.5, 9.0]], dtype=torch.float64)
    arguments = {
        "logp": logp,
        "logp_old": logp - ratio.log(),
        "logp_ref": logp - LN2,
        "advantages": torch.tensor([1.0, -3.0], dtype=torch.float64),
        "mask": torch.tensor([[True, True], [True, False]]),
        "weights": torch.tensor([0.25, 0.5], dtype=torch.float64),
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_beta": 0.5,
    }
    loss, _, metrics = loss_and_gradient(arguments)
    k3 = 0.1931471805599453
    expected = -(0.25 * (1.0 + 1.2 - 2 * 0.5 * k3) + 0.5 * (-2.4 - 0.5 * k3))
    assert float(loss) == pytest.approx(expected, abs=1e-12)
    assert (
        float(metrics["clip_fraction"]) == 2
    )  # sums over the mask, not yet divided by the three tokens
    assert float(metrics["kl"]) == pytest.approx(3 * k3, abs=1e-12)


# ---------------------------------------------------------------- against the independent computation


@pytest.mark.parametrize("kl_beta", [0.0, 0.001, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_against_the_oracle(loss: str, kl_beta: float) -> None:
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-12)):
        for seed in range(30):
            case = make_case(seed, loss, kl_beta, dtype)
            expected = oracle(case)
            got, metrics = grpo_loss(**to_tensors(case))
            assert got.shape == ()
            where = f"seed {seed}, {dtype.__name__}"
            assert float(got) == pytest.approx(
                expected["loss"], rel=0, abs=tolerance * expected["scale"]
            ), where
            assert float(metrics["clip_fraction"]) == expected["clip_fraction"], where
            if kl_beta > 0:
                assert float(metrics["kl"]) == pytest.approx(
                    expected["kl"], rel=0, abs=tolerance * expected["kl_scale"]
                ), where


@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize("loss", LOSSES)
def test_rewards_to_loss_in_float32_against_the_oracle(loss: str, kl_beta: float) -> None:
    for seed in range(100, 130):
        case = make_case(seed, loss, kl_beta, np.float32)
        arguments = to_tensors(case)
        arguments["advantages"] = group_advantages(torch.tensor(case["rewards"]))
        arguments["weights"] = token_weights(
            torch.tensor(case["lengths"]), loss, case["max_new_tokens"]
        )
        case["advantages"] = oracle_advantages(case["rewards"].astype(np.float64))
        case["weights"] = oracle_weights(case["lengths"], loss, case["max_new_tokens"])
        expected = oracle(case)
        got, _ = grpo_loss(**arguments)
        assert float(got) == pytest.approx(expected["loss"], rel=0, abs=1e-6 * expected["scale"]), (
            f"seed {seed}"
        )


def test_the_random_cases_reach_every_branch() -> None:
    reached = set().union(*(oracle(make_case(seed))["kinds"] for seed in range(30)))
    assert reached == {sign + side for sign in "+-0" for side in ("low", "inside", "high")}


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_against_finite_differences_of_the_oracle(loss: str, kl_beta: float) -> None:
    step = 1e-5
    for seed in range(200, 206):
        case = make_case(seed, loss, kl_beta)
        _, gradient, _ = loss_and_gradient(to_tensors(case))
        expected = np.zeros_like(case["logp"])  # padding stays 0
        for i, length in enumerate(case["lengths"]):
            for t in range(length):
                sides = []
                for sign in (1, -1):
                    logp = case["logp"].copy()
                    logp[i, t] += sign * step
                    sides.append(oracle(case | {"logp": logp})["loss"])
                expected[i, t] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(
            gradient.numpy(), expected, rtol=1e-6, atol=1e-9 * max(1, oracle(case)["scale"])
        )
        assert not gradient.numpy()[~case["mask"]].any()


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_gradcheck(kl_beta: float) -> None:
    for seed in (300, 301, 302):
        arguments = to_tensors(make_case(seed, "dapo", kl_beta))

        def loss_of(logp: torch.Tensor, arguments: dict = arguments) -> torch.Tensor:
            return grpo_loss(**(arguments | {"logp": logp}))[0]

        # gradcheck's steps vanish beside -1e4: here the padding holds ordinary numbers
        logp = torch.where(arguments["mask"], arguments["logp"], -1.0).requires_grad_()
        for name in ("logp_old", "logp_ref"):
            if arguments[name] is not None:
                arguments[name] = torch.where(arguments["mask"], arguments[name], -1.5)
        assert torch.autograd.gradcheck(loss_of, (logp,))


# ---------------------------------------------------------------- padding and splitting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_values_outside_the_mask_do_not_matter(kl_beta: float, dtype: torch.dtype) -> None:
    arguments = to_tensors(make_case(7, "grpo", kl_beta))
    arguments = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    mask = arguments["mask"]
    assert not mask.all()
    names = [k for k in ("logp", "logp_old", "logp_ref") if arguments[k] is not None]
    plain = arguments | {k: arguments[k].masked_fill(~mask, 0.0) for k in names}
    expected, expected_gradient, expected_metrics = loss_and_gradient(plain)
    # Most of these overflow exp to inf: multiplied by a mask of 0 that is NaN, in the loss or in its gradient.
    for filling in (
        (50.0, 50.0, 50.0),
        (50.0, -1e4, -1e4),
        (-1e4, 50.0, 50.0),
        (50.0, -1e4, 50.0),
        (-1e4, 0.0, 0.0),
    ):
        values = dict(zip(("logp", "logp_old", "logp_ref"), filling, strict=True))
        loss, gradient, metrics = loss_and_gradient(
            plain | {k: arguments[k].masked_fill(~mask, values[k]) for k in names}
        )
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)
        assert not gradient[~mask].any()
        for name in metrics:
            torch.testing.assert_close(metrics[name], expected_metrics[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_padding_width_does_not_matter(kl_beta: float) -> None:
    for seed in range(400, 405):
        case = make_case(seed, "dapo", kl_beta, np.float32)
        arguments, scale = to_tensors(case), oracle(case)["scale"]
        n, width = arguments["mask"].shape
        expected, expected_gradient, expected_metrics = loss_and_gradient(arguments)
        for extra in (1, 7, 64):
            wide = dict(arguments)
            for name in ("logp", "logp_old", "logp_ref", "mask"):
                if arguments[name] is not None:
                    filling = arguments[name].new_full((n, extra), 0 if name == "mask" else -1e4)
                    wide[name] = torch.cat([arguments[name], filling], dim=1)
            loss, gradient, metrics = loss_and_gradient(wide)
            assert float(loss) == pytest.approx(float(expected), rel=0, abs=1e-6 * scale)
            torch.testing.assert_close(gradient[:, :width], expected_gradient, rtol=1e-6, atol=0)
            assert not gradient[:, width:].any()
            for name in metrics:
                torch.testing.assert_close(
                    metrics[name], expected_metrics[name], rtol=1e-6, atol=1e-6, equal_nan=True
                )


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_whole(loss: str, kl_beta: float) -> None:
    for seed in range(500, 510):
        case = make_case(seed, loss, kl_beta, np.float32)
        reference = oracle(case)
        arguments, n = to_tensors(case), len(case["lengths"])
        rng = np.random.default_rng(seed)
        # A parameter shared by all rows, as a policy's weights are: its gradient is a sum over every token.
        features = torch.tensor(rng.normal(size=(*case["logp"].shape, 5)), dtype=torch.float32)

        def backward(
            part: dict, part_features: torch.Tensor, theta: torch.Tensor
        ) -> tuple[torch.Tensor, dict]:
            value, metrics = grpo_loss(**(part | {"logp": part["logp"] + part_features @ theta}))
            value.backward()
            return value.detach(), metrics

        whole_theta = torch.zeros(5, requires_grad=True)
        whole, whole_metrics = backward(arguments, features, whole_theta)
        _, per_token, _ = loss_and_gradient(arguments)
        gradient_scale = torch.einsum("nt,ntd->d", per_token.abs(), features.abs())
        for pieces in {1, min(2, n), min(3, n), n}:
            cuts = sorted(rng.choice(np.arange(1, n), size=pieces - 1, replace=False).tolist())
            theta, total, sums = torch.zeros(5, requires_grad=True), 0.0, {}
            for rows in np.split(rng.permutation(n), cuts):
                rows = rows.tolist()
                width = max(
                    case["lengths"][i] for i in rows
                )  # each micro-batch is as wide as its own longest row
                value, metrics = backward(
                    rows_of(arguments, rows, width), features[rows][:, :width], theta
                )
                total += float(value)
                sums = {k: sums.get(k, 0.0) + float(v) for k, v in metrics.items()}
            assert total == pytest.approx(float(whole), rel=0, abs=1e-6 * reference["scale"])
            assert bool(((theta.grad - whole_theta.grad).abs() <= 1e-6 * gradient_scale).all())
            assert sums.keys() == whole_metrics.keys()
            assert (
                sums["clip_fraction"]
                == float(whole_metrics["clip_fraction"])
                == reference["clip_fraction"]
            )
            for name, value in sums.items():
                size = (
                    max(1.0, reference["kl_scale"])
                    if name == "kl"
                    else max(1.0, abs(float(whole_metrics[name])))
                )
                assert value == pytest.approx(
                    float(whole_metrics[name]), rel=0, abs=1e-6 * size, nan_ok=True
                ), name


# ---------------------------------------------------------------- the first update of a rollout


@pytest.mark.parametrize("loss", LOSSES)
def test_first_update_is_exact(loss: str) -> None:
    # Powers of two everywhere but in logp: sums are exact in any order, so equality can be asked for.
    lengths = torch.tensor([1, 2, 4, 8, 8, 4, 4, 1])  # 8 rows, 32 tokens
    mask = torch.arange(8)[None, :] < lengths[:, None]
    logp = -3 * torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) - 0.001
    logp.requires_grad_()
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5, 2.0, -2.0, 0.25, 0.0])
    weights = token_weights(lengths, loss, 8)
    value, metrics = grpo_loss(
        logp,
        logp.detach(),
        logp.detach().clone(),
        advantages,
        mask,
        weights,
        CLIP_LOW,
        CLIP_HIGH,
        0.5,
    )
    (gradient,) = torch.autograd.grad(value, logp)
    expected = weights[:, None] * mask * advantages[:, None]
    assert float(value.detach()) == -float(expected.sum())
    assert torch.equal(gradient, -expected)
    assert float(metrics["clip_fraction"]) == 0.0
    assert float(metrics["kl"]) == 0.0


def test_first_update_on_random_rollouts() -> None:
    for seed in range(600, 620):
        arguments = to_tensors(make_case(seed, "grpo", 0.3, np.float32))
        arguments |= {"logp_old": arguments["logp"].clone(), "logp_ref": arguments["logp"].clone()}
        loss, gradient, metrics = loss_and_gradient(arguments)
        expected = -(arguments["weights"] * arguments["advantages"])[:, None] * arguments["mask"]
        scale = float(expected.abs().sum())
        assert float(loss) == pytest.approx(float(expected.double().sum()), rel=0, abs=1e-6 * scale)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
        assert float(metrics["clip_fraction"]) == 0.0
        assert float(metrics["kl"]) == 0.0


# ---------------------------------------------------------------- the KL estimate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype: torch.dtype) -> None:
    rounding = 2 * torch.finfo(dtype).eps  # e^x - x - 1 subtracts numbers near 1
    for size in (0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0, 20.0):
        for x in (size, -size, 0.59 * size, -0.59 * size):
            logp = torch.tensor([-1.25], dtype=dtype)
            _, metrics = grpo_loss(**kl_arguments(logp, logp + x, torch.ones(1, dtype=dtype)))
            k3 = float(metrics["kl"])
            assert k3 >= -rounding
            if abs(x) >= 2e-3:
                assert k3 > 0


@pytest.mark.parametrize("seed", range(10))
def test_k3_is_unbiased(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    # Rows are the outcomes, each weighted with the policy's probability of it: the loss is E_{x~p}[k3].
    loss, _ = grpo_loss(
        **kl_arguments(torch.tensor(p).log(), torch.tensor(q).log(), torch.tensor(p))
    )
    assert float(loss) == pytest.approx(kl, rel=1e-12, abs=1e-12)
    metric = 0.0
    for a, b in zip(p, q, strict=True):
        one = torch.tensor([a])
        _, metrics = grpo_loss(
            **kl_arguments(one.log(), torch.tensor([b]).log(), torch.ones(1, dtype=torch.float64))
        )
        metric += a * float(metrics["kl"])
    assert metric == pytest.approx(kl, rel=1e-12, abs=1e-12)


# ---------------------------------------------------------------- arguments and types


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_arguments_are_not_written_into(kl_beta: float) -> None:
    arguments = to_tensors(make_case(3, "grpo", kl_beta, np.float32))
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v)}
    loss, _ = grpo_loss(**(arguments | {"logp": arguments["logp"].requires_grad_()}))
    loss.backward()
    assert all(torch.equal(arguments[k], v) for k, v in before.items())

    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 1.1, 0.1]])
    lengths = torch.tensor([3, 1, 2])
    kept_rewards, kept_lengths = rewards.clone(), lengths.clone()
    for scale in ("group", "none"):
        advantages = group_advantages(rewards, scale)
        assert advantages.dtype == torch.float32
        advantages.add_(1)  # nor does the result share memory with the argument
    for name in LOSSES:
        assert token_weights(lengths, name, 4).dtype == torch.float32
    assert torch.equal(rewards, kept_rewards)
    assert torch.equal(lengths, kept_lengths)


def test_float32_stays_float32() -> None:
    loss, gradient, _ = loss_and_gradient(to_tensors(make_case(3, "grpo", 0.3, np.float32)))
    assert loss.dtype == gradient.dtype == torch.float32
