"""rewards.py: the statistics over several completions and questions, by hand and by brute force."""

import time
from itertools import combinations

import pytest

from rewards import bootstrap_interval, majority, normalized_answer, pass_at_k


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
                right = sum(min(subset) < correct for subset in subsets)  # the first `correct` ones are right
                assert pass_at_k(n, correct, k) == pytest.approx(right / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1), (0, 0, 0)])
def test_pass_at_k_refuses(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {n} completions"):
        pass_at_k(n, correct, k)


# --- votes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        ("1234", "1,234", "1234.0", "$1234", "$1,234.00", "\\$1234", "1234.", "**1234**", "01234", "\\boxed{1234}"),
        ("1/2", "0.5", ".5", "\\frac12", "\\dfrac{1}{2}", "$\\frac{2}{4}$", "so \\boxed{0.50}", "x = 1/2"),
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
    "completion", ["", "5", "<think>5</think>", "<think><answer>5</answer>", turn(""), turn("$$"), turn("9" * 2000)]
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
