"""rewards.py: the statistics over several completions and questions, by hand and by brute force."""

import time
from itertools import combinations

import pytest

from rewards import bootstrap_interval, evaluation, majority, normalized_answer, pass_at_k


def turn(answer: str) -> str:
    return f"<think> a </think>\n<answer> {answer} </answer>"


# --- pass@k ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 1 / 4
    assert pass_at_k(4, 1, 2) == 1 / 2  # of the 6 pairs, 3 have the right one
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # one pair has none
    assert pass_at_k(5, 2, 3) == pytest.approx(9 / 10)  # one triple has none
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 1, 8) == 1.0
    assert pass_at_k(1000, 500, 500) == 1.0  # in floats; the numbers of subsets have 300 digits


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                right = sum(
                    min(subset) < correct for subset in subsets
                )  # the first `correct` ones are right
                assert pass_at_k(n, correct, k) == pytest.approx(right / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "correct", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1), (0, 0, 0)]
)
def test_pass_at_k_refuses(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {n} completions"):
        pass_at_k(n, correct, k)


# --- votes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        (
            "1234",
            "1,234",
            "1234.0",
            "$1234",
            "$1,234.00",
            "\\$1234",
            "1234.",
            "**1234**",
            "01234",
            "\\boxed{1234}",
        ),
        (
            "1/2",
            "0.5",
            ".5",
            "\\frac12",
            "\\dfrac{1}{2}",
            "$\\frac{2}{4}$",
            "so \\boxed{0.50}",
            "x = 1/2",
        ),
        ("(1,2)", "( 1, 2 )", "\\left(1,\\,2\\right)", "$(1, 2)$"),
        ("5", "5\\text{ cm}", "5%", "5^\\circ", "5 degrees"),
        ("(1 + 2) * 3", "(1+2)*3"),
        ("\\text{(C)}", "C", "(C)"),
        ("2x", "2x.", "$2x$."),
        ("-3", "\\boxed{-3}", "-3.0", "first \\boxed{4}, then \\boxed{-3}"),
    ],
)
def test_one_key(answers: tuple[str, ...]) -> None:
    assert len({normalized_answer(turn(answer)) for answer in answers}) == 1


def test_different_keys() -> None:
    answers = [
        "1",
        "-1",
        "10",
        "1/3",
        "0.333333",
        "(1,2)",
        "(2,1)",
        "[1,2)",
        "1 2",
        "12",
        "x",
        "2x",
        "12_3",
        "C",
        "5/0",
    ]
    assert len({normalized_answer(turn(answer)) for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "5",
        "<think>5</think>",
        "<think><answer>5</answer>",
        turn(""),
        turn("$$"),
        turn("9" * 2000),
    ],
)
def test_no_key(completion: str) -> None:
    assert normalized_answer(completion) is None


@pytest.mark.parametrize(
    "piece", ["9", "9,999", "\\boxed{", "{", "(", "\\frac", " ", "\\text{", "$", "\ud800", "a or "]
)
def test_a_key_is_found_fast(piece: str) -> None:
    for text in (turn(piece * (100_000 // len(piece))), turn(piece * (990 // len(piece)))):
        start = time.perf_counter()
        normalized_answer(text)
        assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "8", "8"], [1.0, 0.0, 0.0], 0.0),
        (["7", "8", "8"], [0.0, 1.0, 1.0], 1.0),
        (["7", "8"], [1.0, 0.0], 1.0),  # a tie: the first seen
        (["8", "7"], [0.0, 1.0], 0.0),
        (["8", "7", "7", "8"], [0.0, 1.0, 1.0, 0.0], 0.0),
        ([None, None, None, "7"], [0.0, 0.0, 0.0, 1.0], 1.0),  # None has no vote
        ([None, "8", "7", "7"], [0.0, 0.0, 1.0, 1.0], 1.0),
        ([None, None], [0.0, 0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_majority(answers: list[str | None], correct: list[float], expected: float) -> None:
    assert majority(answers, correct) == expected


# --- intervals -------------------------------------------------------------------------------------------------------


def test_bootstrap_of_equal_values_is_that_value() -> None:
    assert bootstrap_interval([0.3]) == (0.3, 0.3)
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_bootstrap_of_two_values() -> None:
    # A resample is 00, 01, 10 or 11, each a quarter of the time: 2.5% from either end lie 00 and 11.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)


def test_bootstrap_is_near_the_normal_interval() -> None:
    values = [1.0] * 128 + [0.0] * 384  # mean 1/4, standard error sqrt(3/16 / 512) = 0.01914
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.25 - 1.96 * 0.01914, abs=0.004)
    assert high == pytest.approx(0.25 + 1.96 * 0.01914, abs=0.004)


def test_bootstrap_is_always_the_same() -> None:
    values = [i**0.5 for i in range(100)]  # no two resamples have the same mean
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_bootstrap_is_fast() -> None:
    values = [i / 512 for i in range(512)]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        bootstrap_interval(values)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.15


# --- an evaluation ---------------------------------------------------------------------------------------------------


def sampled(answers: str, right: str, lengths: list[int]) -> list[dict]:
    """A question's samples: a letter for each answer, "-" for none at all, which is cut off and not well-formed."""
    return [
        {"text": "<think> a" if answer == "-" else turn(answer), "accuracy": float(answer == right)}
        | {"format": float(answer != "-"), "length": length, "truncated": answer == "-"}
        for answer, length in zip(answers, lengths, strict=True)
    ]


def split(metrics: dict) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """(values, intervals), each by the value's name; there is one interval for each value, around it."""
    values = {name: value for name, value in metrics.items() if not name.endswith("_interval")}
    intervals = {
        name.removesuffix("_interval"): value
        for name, value in metrics.items()
        if name not in values
    }
    assert set(intervals) == set(values)
    for name, (low, high) in intervals.items():
        assert low - 1e-12 <= values[name] <= high + 1e-12
    return values, intervals


def test_evaluation_of_three_questions_with_four_samples_by_hand() -> None:
    questions = [
        sampled("ABBC", "A", [10, 20, 30, 40]),  # 1 of 4 right; B, wrong, has most votes
        sampled("A--A", "A", [5, 9, 9, 5]),  # 2 of 4 right; A has all the votes
        sampled("B-CD", "A", [1, 9, 2, 4]),  # none right
    ]
    values, intervals = split(evaluation(questions))
    assert values == pytest.approx(
        {
            "pass@1": (1 / 4 + 2 / 4 + 0) / 3,
            "pass@2": (1 / 2 + 5 / 6 + 0) / 3,  # of 6 pairs, 3 and 5 have a right one
            "pass@4": (1 + 1 + 0) / 3,
            "maj@4": (0 + 1 + 0) / 3,
            "format": (1 + 2 / 4 + 3 / 4) / 3,
            "length": (25 + 7 + 4) / 3,
            "truncated": (0 + 2 / 4 + 1 / 4) / 3,
        }
    )
    # 27 resamples of three questions. The extreme ones, the lowest or highest thrice, come up once in 27 times, which
    # is 3.7%: more than the 2.5% on either side.
    assert intervals["pass@1"] == pytest.approx((0, 1 / 2))
    assert intervals["pass@2"] == pytest.approx((0, 5 / 6))
    assert intervals["pass@4"] == pytest.approx((0, 1))
    assert intervals["maj@4"] == pytest.approx((0, 1))
    assert intervals["format"] == pytest.approx((1 / 2, 1))
    assert intervals["length"] == pytest.approx((4, 25))
    assert intervals["truncated"] == pytest.approx((0, 1 / 2))


def test_evaluation_of_single_samples_has_no_other_k_and_no_vote() -> None:
    questions = [
        sampled("A", "A", [3]),
        sampled("B", "A", [5]),
        sampled("-", "A", [8]),
        sampled("C", "A", [8]),
    ]
    values, _ = split(evaluation(questions))
    assert values == {"pass@1": 0.25, "format": 0.75, "length": 6, "truncated": 0.25}


def test_evaluation_of_three_samples_has_the_powers_of_two_and_three() -> None:
    questions = [sampled("BAB", "A", [1, 2, 3]), sampled("AAB", "A", [4, 5, 6])]
    values, intervals = split(evaluation(questions))
    assert values == pytest.approx(
        {"pass@1": (1 / 3 + 2 / 3) / 2, "pass@2": (2 / 3 + 1) / 2, "pass@3": 1, "maj@3": 1 / 2}
        | {"format": 1, "length": 3.5, "truncated": 0}
    )
    assert intervals["pass@3"] == intervals["format"] == (1, 1) and intervals["truncated"] == (0, 0)


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16]), (17, [*range(17)])],
)
def test_evaluation_reports_pass_at_powers_of_two_and_at_all_samples(
    samples: int, sizes: list[int]
) -> None:
    values, _ = split(evaluation([sampled("A" * samples, "A", [1] * samples)]))
    sizes = [1, 2, 4, 8, 16, 17] if samples == 17 else sizes
    assert [name for name in values if "@" in name] == [
        *(f"pass@{size}" for size in sizes),
        f"maj@{samples}",
    ]


@pytest.mark.parametrize("samples", [1, 3, 5, 10])
@pytest.mark.parametrize("questions", [1, 2, 3, 7, 128])
def test_equal_questions_have_intervals_of_equal_ends(samples: int, questions: int) -> None:
    same = sampled("A" + "B" * (samples - 1), "A", [*range(1, samples + 1)])
    values, intervals = split(evaluation([same] * questions))
    for name, (low, high) in intervals.items():
        assert low == high == pytest.approx(values[name], abs=1e-12)


def test_evaluation_counts_votes_by_value_not_by_text() -> None:
    texts = ["7", "1,000", "$1000.00$", "\\boxed{7}", "1000"]
    samples = [
        sampled("A", "A", [1])[0] | {"text": turn(text), "accuracy": float("7" not in text)}
        for text in texts
    ]
    assert evaluation([samples])["maj@5"] == 1.0
    assert evaluation([samples[:1] + samples[3:]])["maj@3"] == 0.0
