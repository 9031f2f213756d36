"""Statistics of rewards.py over several completions and questions, checked by hand and by brute force."""

from itertools import combinations

import pytest

from rewards import (
    bootstrap_interval,
    eval_metrics,
    majority,
    normalized_answer,
    pass_at_k,
    step_means,
)


def turn(answer: str) -> str:
    return f"<think> a </think>\n<answer> {answer} </answer>"


# --- pass@k --------------------------------------------------------------------------------------


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 1 / 4
    assert pass_at_k(4, 1, 2) == 1 / 2  # of the 6 pairs, 3 have the right one
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # one pair has none
    assert pass_at_k(5, 2, 3) == pytest.approx(9 / 10)  # one triple has none
    assert pass_at_k(1000, 500, 500) == 1.0  # subset counts have 300 digits, this is a float


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))  # the first `correct` ones are right
                right = sum(min(subset) < correct for subset in subsets)
                assert pass_at_k(n, correct, k) == pytest.approx(right / len(subsets), abs=1e-12)


# --- votes ---------------------------------------------------------------------------------------

SAME_KEY = r"""
1234  1,234  1234.0  $1234  $1,234.00  \$1234  1234.  **1234**  01234  \boxed{1234}  1{,}234
1/2  0.5  .5  \frac12  \dfrac{1}{2}  $\frac{2}{4}$  so \boxed{0.50}  x = 1/2  (1)/(2)
(1,2)  ( 1, 2 )  \left(1,\,2\right)  $(1, 2)$
5  5\text{ cm}  5%  5^\circ  5 degrees
(1 + 2) * 3  (1+2)*3
\text{(C)}  C  (C)
2x  2x.  $2x$.
-3  \boxed{-3}  -3.0  first \boxed{4}, then \boxed{-3}
"""
DIFFERENT_KEYS = "1 -1 10 1/3 0.333333 (1,2) (2,1) [1,2) 12 x 2x x+1 1+x 12_3 C 5/0"


def test_votes_are_counted_by_value() -> None:
    for line in SAME_KEY.strip().splitlines():
        assert len({normalized_answer(turn(answer)) for answer in line.split("  ")}) == 1, line
    different = DIFFERENT_KEYS.split()
    assert len({normalized_answer(turn(answer)) for answer in different}) == len(different)
    for completion in ("", "5", "<think>5</think>", "<think><answer>5</answer>"):
        assert normalized_answer(completion) is None
    for answer in ("", "$$", "9" * 2000):
        assert normalized_answer(turn(answer)) is None


# Answers, which of them are right, maj@K. "-" is None, which does not vote.
MAJORITY = """
788 100 0
788 011 1
78 10 1  a tie: the first one counts
87 01 0
8778 0110 0
---7 0001 1
-877 0011 1
-- 00 0
"""


def test_majority() -> None:
    for line in MAJORITY.strip().splitlines():
        answers, correct, expected = line.split()[:3]
        votes = [None if answer == "-" else answer for answer in answers]
        assert majority(votes, [*map(float, correct)]) == float(expected), line
    assert majority([], []) == 0.0


# --- intervals -----------------------------------------------------------------------------------


def test_bootstrap_by_hand() -> None:
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)
    # A resample is 00, 01, 10 or 11, each a quarter of the time, so 00 and 11 lie 2.5% from either end.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)


def test_bootstrap_is_near_the_normal_interval_and_always_the_same() -> None:
    values = [1.0] * 128 + [0.0] * 384  # mean 1/4, standard error sqrt(3/16 / 512) = 0.01914
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.25 - 1.96 * 0.01914, abs=0.004)
    assert high == pytest.approx(0.25 + 1.96 * 0.01914, abs=0.004)
    assert bootstrap_interval(values) == (low, high)


# --- an evaluation and a step --------------------------------------------------------------------


def sampled(answers: str, lengths: list[int]) -> list[dict]:
    """The samples of a question, a letter for each answer: A is right, "-" is truncated and not well-formed."""
    return [
        {
            "text": "<think> a" if answer == "-" else turn(answer),
            "accuracy": float(answer == "A"),
            "format": float(answer != "-"),
            "length": length,
            "truncated": answer == "-",
        }
        for answer, length in zip(answers, lengths)
    ]


def evaluation(questions: list[list[dict]]) -> dict:
    metrics = eval_metrics(
        [sample for samples in questions for sample in samples], len(questions[0])
    )
    assert all(name.startswith("eval_") for name in metrics)
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def test_evaluation_of_three_questions_with_four_samples_by_hand() -> None:
    questions = [
        sampled("ABBC", [10, 20, 30, 40]),  # 1 of 4 right; B, wrong, has most votes
        sampled("A--A", [5, 9, 9, 5]),  # 2 of 4 right; A has all the votes
        sampled("B-CD", [1, 9, 2, 4]),  # none right
    ]
    # Three questions have 27 resamples. Each extreme one, three times the lowest or three times the highest, has a
    # probability of 1/27 or 3.7%, which is more than the 2.5% on either side.
    by_hand = {
        "pass@1": [(1 / 4 + 2 / 4 + 0) / 3, 0, 1 / 2],
        "pass@2": [(1 / 2 + 5 / 6 + 0) / 3, 0, 5 / 6],  # of 6 pairs, 3 and 5 have a right one
        "pass@4": [(1 + 1 + 0) / 3, 0, 1],
        "maj@4": [(0 + 1 + 0) / 3, 0, 1],
        "format": [(1 + 2 / 4 + 3 / 4) / 3, 1 / 2, 1],
        "length": [(25 + 7 + 4) / 3, 4, 25],
        "truncated": [(0 + 2 / 4 + 1 / 4) / 3, 0, 1 / 2],
    }
    metrics = evaluation(questions)
    assert len(metrics) == 2 * len(by_hand)
    for name, values in by_hand.items():
        assert [metrics[name], *metrics[f"{name}_interval"]] == pytest.approx(values), name


def test_evaluation_of_single_samples_has_no_other_k_and_no_vote() -> None:
    metrics = evaluation([sampled(answer, [6]) for answer in "AB-C"])
    values = {name: metrics[name] for name in metrics if not name.endswith("_interval")}
    assert values == {"pass@1": 0.25, "format": 0.75, "length": 6, "truncated": 0.25}


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])],
)
def test_evaluation_has_pass_at_powers_of_two_and_at_all(samples: int, sizes: list[int]) -> None:
    metrics = evaluation([sampled("A" + "B" * (samples - 1), [1] * samples)] * 3)
    names = [name for name in metrics if "@" in name and "interval" not in name]
    assert names == [f"pass@{size}" for size in sizes] + [f"maj@{samples}"]
    for size in sizes:  # equal questions: an interval of length 0
        assert metrics[f"pass@{size}"] == pytest.approx(size / samples)
        assert metrics[f"pass@{size}_interval"] == pytest.approx((size / samples,) * 2)


def test_evaluation_counts_votes_by_value_not_by_text() -> None:
    samples = sampled("BAABA", [1] * 5)
    for sample, text in zip(samples, ["7", "1,000", "$1000.00$", "\\boxed{7}", "1000"]):
        sample["text"] = turn(text)
    assert evaluation([samples])["maj@5"] == 1.0
    assert evaluation([samples[:1] + samples[3:]])["maj@3"] == 0.0


def test_step_means_by_hand() -> None:
    samples = sampled("AB-A", [10, 20, 30, 40])
    for sample, reward, advantage in zip(samples, [1.5, 0.5, 0.0, 1.5], [0.7, -0.7, 0.0, 0.0]):
        sample.update(reward=reward, advantage=advantage)
    assert step_means(samples) == {
        "reward": 0.875,
        "accuracy": 0.5,
        "format": 0.75,
        "length": 25,
        "truncated": 0.25,
        "equal_groups": 0.5,
    }
