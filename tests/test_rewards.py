"""rewards.py: every rule by a hand-worked case, the exploits that earn nothing, and any text at all within a second."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    MAX_ANSWER_CHARS,
    MAX_DIGITS,
    MAX_NESTING,
    countdown_reward,
    equal_by_worker,
    extract_answer,
    format_reward,
    gsm8k_reward,
    math_reward,
    math_verify_missing,
    read_number,
    worker,
)

thorough = settings(deadline=None, max_examples=300, derandomize="CI" in os.environ)


def turn(answer: str) -> str:
    return f"<think> 1 + 2 = 3 </think>\n<answer> {answer} </answer>"


# --- format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        "\n <think>\na\n\nb < c </think>\r\n\t\n<answer>\n1 + 2\n</answer>\n\n",
        "<think></think><answer>b</answer>",
        "<think>a</b> <Answer> </think><answer> <b> </answer>",  # other tags are text
    ],
)
def test_format_is_paid(completion: str) -> None:
    assert format_reward(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "<think>",
        "<think>a</think>",
        "<answer>b</answer>",
        "<think>a</think><answer>b",
        "<think>a</think><answer>b</answer",
        "<think>a</think><answer> \n </answer>",  # nothing was answered
        "a</think><answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think>so<answer>b</answer>",
        "so<think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer>done",
        "<think>a</think><answer>b</answer><|im_end|>",
        "<think>a</think><answer>b</answer>\0",
        "<think><think>a</think><answer>b</answer>",
        "<think>a</think></think><answer>b</answer>",
        "<think>a</think><answer>b</answer></answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>in <answer> tags</think><answer>b</answer>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<THINK>a</THINK><ANSWER>b</ANSWER>",
        "<think >a</think><answer>b</answer>",
    ],
)
def test_format_is_not_paid(completion: str) -> None:
    assert format_reward(completion) == 0.0


# --- which answer is graded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>a</think><answer>1</answer>", "1"),
        ("<think>a</think>\nwell\n<answer>\n1 +\n2\n</answer>\n\n", "1 +\n2"),
        ("a</think><answer>1</answer>", "1"),
        ("<think>a</think><answer></answer>", ""),
        # several: the last complete one
        ("<think>a</think><answer>1</answer><answer>2</answer>", "2"),
        ("<think>a</think><answer>1</answer> or <answer>2", "1"),
        ("<think>a</think><answer>1</answer> or </answer>", "1"),
        ("<think>a</think><answer>1<answer>2</answer>", "2"),
        ("<think>a</think><answer>1<answer>2</answer>3</answer>", "2"),
        ("<think>a</think></answer><answer>1</answer>", "1"),
        # incomplete ones
        ("", None),
        ("<think>a</think>1", None),
        ("<think>a</think><answer>1", None),
        ("<think>a</think>1</answer>", None),
        ("<think>a</think></answer>1<answer>", None),
        # inside the thinking nothing counts
        ("<think><answer>1</answer>", None),
        ("<think><answer>1</answer></think>", None),
        ("<think><answer>1</think></answer>", None),
        ("<think><answer>1</answer></think><answer>2</answer>", "2"),
        ("<think><answer>1</answer></think>so <answer>2", None),
        ("<think>use <think> tags, <answer>1</answer></think><answer>2</answer>", "2"),
        ("<think>a</think><answer>1</answer><think>or <answer>2</answer></think>", "1"),
        ("<think>a</think><answer>1</answer><think>or <answer>2</answer>", "1"),
        ("<think>a</think><think>b</think><answer>2</answer>", "2"),
        ("<think>a</think><answer>1</answer><think>b</think><answer>2</answer>", "2"),
        ("<think>use <think> </think> tags <answer>1</answer> so </think> <answer>2</answer>", "2"),
        ("<answer>1</answer>", None),
    ],
)
def test_extract_answer(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


# --- countdown -------------------------------------------------------------------------------------------------------

# (answer, numbers and target, expected, reason)
COUNTDOWN = [
    ("44 + 19 + 35", ([44, 19, 35], 98), 1.0, "44 + 19 = 63, 63 + 35 = 98"),
    ("35+44+19", ([44, 19, 35], 98), 1.0, "any order, no white space"),
    ("(1 + 2) / 3", ([3, 2, 1], 1), 1.0, "3 / 3"),
    ("8 / (3 - 8 / 3)", ([8, 8, 3, 3], 24), 1.0, "8 / (1/3): right only in exact fractions"),
    ("2 + 3 * 4", ([2, 3, 4], 14), 1.0, "* before +"),
    ("9 - 3 - 2", ([9, 3, 2], 4), 1.0, "from the left: 9 - (3 - 2) would be 8"),
    ("24 / 4 / 2", ([24, 4, 2], 3), 1.0, "from the left: 24 / (4 / 2) would be 12"),
    ("24 / 4 * 2", ([24, 4, 2], 12), 1.0, "from the left: 24 / (4 * 2) would be 3"),
    ("-(3 - 5) * 2", ([3, 5, 2], 4), 1.0, "a sign before a parenthesis, -(-2) * 2"),
    ("2 - -(3 + 1)", ([2, 3, 1], 6), 1.0, "2 + 4"),
    ("2 * -(3 - 5)", ([2, 3, 5], 4), 1.0, "2 * 2"),
    ("+(1 + 2)", ([1, 2], 3), 1.0, "a plus sign is a sign"),
    ("3 - 5", ([3, 5], -2), 1.0, "a negative target"),
    ("((((7))))", ([7], 7), 1.0, "parentheses to no purpose"),
    ("(" * MAX_NESTING + "7" + ")" * MAX_NESTING, ([7], 7), 1.0, "as deep as is allowed"),
    ("7 * 0", ([7, 0], 0), 1.0, "zero is a number"),
    ("7\n+\t1 ", ([7, 1], 8), 1.0, "any white space"),
    ("5 + 5", ([5, 5], 10), 1.0, "a number that is given twice"),
    (
        "9" * MAX_DIGITS + " - 1",
        ([10**MAX_DIGITS - 1, 1], 10**MAX_DIGITS - 2),
        1.0,
        "as long as is allowed",
    ),
    # what reward functions built on eval pay, or hang on
    ("99**98**97", ([99, 98, 97], 1), 0.0, "a tower of powers would never end"),
    ("2**3+4", ([2, 3, 4], 12), 0.0, "** is none of the four operations"),
    ("2* *3+4", ([2, 3, 4], 12), 0.0, "nor is it with a space inside"),
    ("7//2+1", ([7, 2, 1], 4), 0.0, "// rounds"),
    ("7/ /2+1", ([7, 2, 1], 4), 0.0, "// with a space inside"),
    ("1.5*2", ([1, 5, 2], 3), 0.0, "no decimals, made of 1 and 5"),
    ("1.5*2", ([15, 2], 3), 0.0, "no decimals, made of 15"),
    ("7 + 1/(98*99*100)", ([7, 1, 98, 99, 100], 7), 0.0, "near is not equal: 7 + 1/970200"),
    ("7%4", ([7, 4], 3), 0.0, "% is no operation"),
    ("1e3", ([1, 3], 1000), 0.0, "no scientific notation"),
    ("0x10", ([0, 10], 16), 0.0, "no hexadecimals"),
    ("1_0 + 2", ([10, 2], 12), 0.0, "Python's 1_0 is not 10"),
    ("1_0 + 2", ([1, 0, 2], 12), 0.0, "nor is it 1 and 0"),
    ("1 0 + 2", ([10, 2], 12), 0.0, "1 0 is not 10"),
    ("1 0 + 2", ([1, 0, 2], 12), 0.0, "1 0 has no operation between them"),
    ("007 + 1", ([7, 1], 8), 0.0, "leading zeros would be numbers 0"),
    ("07 + 1", ([0, 7, 1], 8), 0.0, "which would use up a 0 for nothing"),
    ("6 # + 2", ([6, 2], 6), 0.0, "a comment would hide a number"),
    ("6 or 2", ([6, 2], 6), 0.0, "Python's or would hide a number"),
    ("6, 2", ([6, 2], 6), 0.0, "a tuple"),
    ("[6, 2][0]", ([6, 2, 0], 6), 0.0, "an index"),
    ("3!", ([3], 6), 0.0, "no factorials"),
    ("5^3", ([5, 3], 6), 0.0, "Python's ^ is a bitwise 5 xor 3 = 6"),
    ("~3 + 10", ([3, 10], 6), 0.0, "Python's ~3 is -4"),
    ("__import__('os').system('exit 1') or 3 + 3", ([3, 3], 6), 0.0, "code"),
    ("print(3)", ([3], 3), 0.0, "a call"),
    ("lambda: 3", ([3], 3), 0.0, "a function"),
    # digits and operators of other scripts
    ("３ + 4", ([3, 4], 7), 0.0, "a full-width digit, which int() takes"),
    ("٣ + 4", ([3, 4], 7), 0.0, "an Arabic digit, which int() takes"),
    ("3² + 4", ([3, 4], 13), 0.0, "a power"),
    ("3² + 4", ([3, 2, 4], 13), 0.0, "a power whose exponent is given"),
    ("3 × 4", ([3, 4], 12), 0.0, "the typographic sign"),
    ("5 \u2212 4", ([5, 4], 1), 0.0, "the typographic minus sign"),
    # the numbers
    ("98", ([44, 19, 35], 98), 0.0, "the target itself"),
    ("44 + 54", ([44, 19, 35], 98), 0.0, "54 is not given"),
    ("44 + 19 + 35", ([44, 19, 35, 0], 98), 0.0, "0 is left out"),
    ("44 + 19 + 35 + 1 - 1", ([44, 19, 35], 98), 0.0, "1 is not given"),
    ("5 + 5 + 5", ([5, 5], 15), 0.0, "5 is given twice, not three times"),
    ("5", ([5, 5], 5), 0.0, "5 is given twice, not once"),
    # signs
    ("-3 + 5", ([3, 5], 2), 0.0, "no sign before a number"),
    ("-3 + 5", ([-3, 5], 2), 0.0, "not even where the number is negative"),
    ("+3 + 5", ([3, 5], 8), 0.0, "nor a plus"),
    ("2 - -3", ([2, 3], 5), 0.0, "nor behind an operator"),
    ("2 + -3", ([2, 3], -1), 0.0, "nor behind a plus"),
    ("--(3)", ([3], 3), 0.0, "one sign, not two"),
    # syntax
    ("", ([], 0), 0.0, "nothing"),
    ("", ([3], 3), 0.0, "no number"),
    ("()", ([], 0), 0.0, "nothing in parentheses"),
    ("3()", ([3], 3), 0.0, "nothing in parentheses, behind a number"),
    ("(3", ([3], 3), 0.0, "not closed"),
    ("3)", ([3], 3), 0.0, "not opened"),
    (")3(", ([3], 3), 0.0, "closed before it is opened"),
    ("3 +", ([3], 3), 0.0, "no second operand"),
    ("* 3", ([3], 3), 0.0, "no first operand"),
    ("-", ([], 0), 0.0, "no operand"),
    ("(-)3", ([3], 3), 0.0, "a sign in parentheses"),
    ("3 4", ([3, 4], 7), 0.0, "no operation"),
    ("3(4)", ([3, 4], 12), 0.0, "no operation before a parenthesis"),
    ("(3)(4)", ([3, 4], 12), 0.0, "no operation between parentheses"),
    ("[3 + 4]", ([3, 4], 7), 0.0, "brackets"),
    ("{3 + 4}", ([3, 4], 7), 0.0, "braces"),
    ("3 + 4 = 7", ([3, 4], 7), 0.0, "an equation; the task asks for an expression"),
    ("7 = 3 + 4", ([3, 4], 7), 0.0, "an equation"),
    ("7 == 3 + 4", ([3, 4, 7], 1), 0.0, "True is not 1"),
    ("x = 3 + 4", ([3, 4], 7), 0.0, "an assignment"),
    ("$3 + 4$", ([3, 4], 7), 0.0, "LaTeX"),
    ("3 + 4\0", ([3, 4], 7), 0.0, "NUL"),
    ("3 + 4\ud800", ([3, 4], 7), 0.0, "a surrogate"),
    # division by zero
    ("3 / 0", ([3, 0], 0), 0.0, "undefined"),
    ("3 / (4 - 4)", ([3, 4, 4], 0), 0.0, "undefined"),
    ("0 / 0", ([0, 0], 0), 0.0, "undefined"),
    # bounds
    ("(" * (MAX_NESTING + 1) + "7" + ")" * (MAX_NESTING + 1), ([7], 7), 0.0, "one level too deep"),
    ("1" + "0" * MAX_DIGITS, ([10**MAX_DIGITS], 10**MAX_DIGITS), 0.0, "one digit too long"),
    ("3" + " " * MAX_ANSWER_CHARS + "+ 4", ([3, 4], 7), 0.0, "too long"),
    # questions that cannot be
    ("1", ([True], 1), 0.0, "True is no number"),
    ("1", ([1], True), 0.0, "nor a target"),
    ("3", ([3.0], 3), 0.0, "floats are not exact"),
    ("3", (["3"], 3), 0.0, "text"),
    ("3", ([3], None), 0.0, "no target"),
    ("3", ([3], "3"), 0.0, "text as a target"),
]


@pytest.mark.parametrize(("answer", "question", "expected", "reason"), COUNTDOWN)
def test_countdown(answer: str, question: tuple, expected: float, reason: str) -> None:
    numbers, target = question
    assert countdown_reward(turn(answer), numbers, target) == expected, reason
    if expected:
        assert countdown_reward(turn(answer), numbers, target + 1) == 0.0
        assert countdown_reward(turn(answer), [*numbers, 1], target) == 0.0


def test_countdown_takes_huge_numbers() -> None:
    huge = 10**6000  # has no str(): Python refuses to write more than 4,300 digits
    assert countdown_reward(turn("3"), [huge], huge) == 0.0
    assert countdown_reward(turn("3"), [3], huge) == 0.0
    assert countdown_reward(turn("9" * 6000), [huge - 1], huge - 1) == 0.0


def test_countdown_grades_the_answer_alone() -> None:
    assert countdown_reward("<think>1 + 2</think>", [1, 2], 3) == 0.0
    assert countdown_reward("<think><answer>1 + 2</answer>", [1, 2], 3) == 0.0
    assert (
        countdown_reward("<think><answer>1 + 2</answer></think><answer>2 + 2</answer>", [1, 2], 3)
        == 0.0
    )
    assert (
        countdown_reward("<think>a</think><answer>1 + 2</answer><answer>2 + 2</answer>", [1, 2], 3)
        == 0.0
    )
    assert (
        countdown_reward("<think>a</think>not the best form:<answer>1 + 2</answer> :-)", [1, 2], 3)
        == 1.0
    )


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, list[int], Fraction]:
    """An expression by a random tree with redundant parentheses and white space, its numbers, and its value.

    The text is written with as few parentheses as precedence allows or with more; the value comes from the tree.
    """
    gap = st.sampled_from(["", "", " ", "  ", "\n", "\t"])
    numbers = draw(st.lists(st.integers(0, 120), min_size=1, max_size=6))

    def parenthesise(text: str) -> str:
        return f"({draw(gap)}{text}{draw(gap)})"

    def build(
        leaves: list[int],
    ) -> tuple[str, Fraction, int]:  # text, value, precedence: 0 sum, 1 product, 2 operand
        if len(leaves) == 1:
            text, value, precedence = str(leaves[0]), Fraction(leaves[0]), 2
        else:
            cut = draw(st.integers(1, len(leaves) - 1))
            (left, a, left_precedence), (right, b, right_precedence) = (
                build(leaves[:cut]),
                build(leaves[cut:]),
            )
            operator = draw(st.sampled_from("+-*/" if b else "+-*"))
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[operator]
            precedence = 0 if operator in "+-" else 1
            left = parenthesise(left) if left_precedence < precedence else left
            right = parenthesise(right) if right_precedence <= precedence else right
            text = f"{left}{draw(gap)}{operator}{draw(gap)}{right}"
        for _ in range(draw(st.integers(0, 2))):
            text, precedence = parenthesise(text), 2
            sign = draw(st.sampled_from(["", "", "-", "+"]))
            # A signed parenthesis stands by itself: "-(1)" is not the operand of another sign.
            text, value = (
                (parenthesise(sign + text), -value if sign == "-" else value)
                if sign
                else (text, value)
            )
        return text, value, precedence

    text, value, _ = build(numbers)
    return text, numbers, value


@thorough
@given(expressions(), st.randoms(use_true_random=False), st.integers(0, 120))
def test_countdown_pays_every_correct_expression_and_no_other_numbers(
    expression: tuple[str, list[int], Fraction], rng: random.Random, other: int
) -> None:
    text, numbers, value = expression
    shuffled = rng.sample(numbers, len(numbers))
    # A target is a whole number: where the value is not one, the answer is wrong for each.
    target = round(value)
    paid = 1.0 if value == target and len(text) <= MAX_ANSWER_CHARS else 0.0
    assert countdown_reward(turn(text), shuffled, target) == paid
    assert countdown_reward(turn(text), shuffled, target + 1) == 0.0
    # one number changed, left out, given twice
    place = rng.randrange(len(numbers))
    changed = [*numbers[:place], other, *numbers[place + 1 :]]
    if other != numbers[place]:
        assert countdown_reward(turn(text), changed, target) == 0.0
    assert countdown_reward(turn(text), [*numbers[:place], *numbers[place + 1 :]], target) == 0.0
    assert countdown_reward(turn(text), [*numbers, numbers[place]], target) == 0.0
    # The same from the other side, the expression not being that of the question: a number more, worth nothing.
    assert countdown_reward(turn(f"({text}) + {other} * 0"), numbers, target) == 0.0


# --- GSM8K -----------------------------------------------------------------------------------------------------------

# (answer, gold, expected, reason)
GSM8K = [
    ("18", "18", 1.0, "the number itself"),
    ("18.", "18", 1.0, "the end of a sentence"),
    ("18.0", "18", 1.0, "a zero behind the point"),
    ("18.00", "18", 1.0, "two of them, as in prices"),
    ("10.00", "10", 1.0, "but the 0 before the point counts"),
    ("10.00", "1", 0.0, "as here"),
    ("018", "18", 1.0, "a leading zero"),
    ("+18", "18", 1.0, "a plus sign"),
    ("$18", "18", 1.0, "dollars"),
    ("\\$18", "18", 1.0, "dollars in LaTeX"),
    ("$18.00.", "18", 1.0, "a price at the end of a sentence"),
    ("18%", "18", 1.0, "percent"),
    ("18 %", "18", 1.0, "percent with a space"),
    ("18 eggs", "18", 1.0, "a unit"),
    ("18eggs", "18", 1.0, "a unit without a space"),
    ("$18 per day", "18", 1.0, "dollars, and a unit in words"),
    ("$18/day", "18", 1.0, "a unit with a stroke"),
    ("**18**", "18", 1.0, "Markdown bold"),
    ("**$18**", "18", 1.0, "bold dollars"),
    ("**18.**", "18", 1.0, "a bold sentence"),
    ("*18*", "18", 1.0, "italics"),
    ("__18__", "18", 1.0, "the other bold"),
    ("`18`", "18", 1.0, "code"),
    ("\\boxed{18}", "18", 1.0, "a box"),
    ("#### 18", "18", 1.0, "as the data writes it"),
    ("The answer is 18.", "18", 1.0, "a sentence with one number"),
    ("x = 18", "18", 1.0, "a name in front"),
    ("18\n", "18", 1.0, "white space"),
    ("18, that is 18 eggs", "18", 1.0, "the same number twice"),
    ("18 and 18.0", "18", 1.0, "written in two ways"),
    ("1,234", "1234", 1.0, "thousands"),
    ("1234", "1,234", 1.0, "thousands in the gold answer"),
    ("$1,234.50", "1234.5", 1.0, "thousands and cents"),
    ("1,234,567", "1234567", 1.0, "millions"),
    (".5", "0.5", 1.0, "no zero before the point"),
    ("0.50", "0.5", 1.0, "a zero at the end"),
    ("-5", "-5", 1.0, "negative"),
    ("x=-5", "-5", 1.0, "negative, with a name in front"),
    ("-$5", "-5", 1.0, "negative dollars"),
    ("-\\$5", "-5", 1.0, "negative dollars in LaTeX"),
    ("$-5", "-5", 1.0, "the sign behind the dollar"),
    ("\u22125", "-5", 1.0, "the typographic minus sign"),
    ("5", "-5", 0.0, "the sign counts"),
    ("covid-19", "19", 1.0, "a hyphen is no sign"),
    ("0", "0", 1.0, "zero"),
    ("-0", "0", 1.0, "the same number"),
    ("9" * MAX_DIGITS, "9" * MAX_DIGITS, 1.0, "as long as is allowed"),
    (
        "18",
        "They had to compute 2+3=<<2+3=5>>5 first.\n#### 18",
        1.0,
        "the gold number stands behind ####",
    ),
    ("5", "They had to compute 2+3=<<2+3=5>>5 first.\n#### 18", 0.0, "not before it"),
    ("19", "18", 0.0, "another number"),
    ("1.8", "18", 0.0, "the point counts"),
    ("180", "18", 0.0, "ten times as much"),
    ("0.333333", "0.33333333", 0.0, "nothing is rounded"),
    # not one number
    ("", "18", 0.0, "nothing"),
    ("eighteen", "18", 0.0, "a word"),
    ("$", "18", 0.0, "a sign without a number"),
    ("1,234 or 1,235", "1234", 0.0, "two guesses"),
    ("18 or 19", "18", 0.0, "two guesses, the first right"),
    ("18 or 19", "19", 0.0, "two guesses, the last right"),
    ("5 -5", "5", 0.0, "a number and its negative"),
    ("2 hours 30 minutes", "2", 0.0, "two numbers with units"),
    ("1, 234", "234", 0.0, "a list"),
    ("12,34", "1234", 0.0, "no thousands: two digits behind the comma"),
    ("1,2345", "12345", 0.0, "no thousands: four digits"),
    ("1,2341234", "12341234", 0.0, "no thousands: seven digits"),
    ("1234,567", "1234567", 0.0, "no thousands: four digits before the comma"),
    ("1 234", "1234", 0.0, "two numbers"),
    ("1.2.3", "1.2", 0.0, "a version"),
    # expressions are not worked out, nor mistaken for one of their numbers
    ("5-3", "2", 0.0, "a difference"),
    ("3 - 3", "3", 0.0, "a difference of equal numbers"),
    ("$3 - $3", "3", 0.0, "the same in dollars"),
    ("3 + 3", "3", 0.0, "a sum of equal numbers"),
    ("1/2", "0.5", 0.0, "a quotient"),
    ("2/2", "2", 0.0, "a quotient of equal numbers"),
    ("2*2", "2", 0.0, "a product"),
    ("2**2", "2", 0.0, "a power, not bold"),
    ("2^2", "2", 0.0, "a power in LaTeX"),
    ("3 x 3", "3", 0.0, "a product with a letter"),
    ("3 × 3", "3", 0.0, "a product with the typographic sign"),
    ("3:3", "3", 0.0, "a ratio"),
    ("1e1", "1", 0.0, "scientific notation"),
    ("1E+1", "10", 0.0, "the same with a sign"),
    ("1.e1", "1", 0.0, "the same with a point"),
    # digits outside ASCII
    ("１８", "18", 0.0, "full-width digits"),
    ("5²", "5", 0.0, "a power"),
    ("3½", "3", 0.0, "a mixed number"),
    ("18 ١٨", "18", 0.0, "Arabic digits, the same number even"),
    # bounds
    ("9" * (MAX_DIGITS + 1), "9" * (MAX_DIGITS + 1), 0.0, "one digit too long"),
    ("18" + " " * MAX_ANSWER_CHARS + "eggs", "18", 0.0, "too long"),
]


@pytest.mark.parametrize(("answer", "gold", "expected", "reason"), GSM8K)
def test_gsm8k(answer: str, gold: str, expected: float, reason: str) -> None:
    assert gsm8k_reward(turn(answer), gold) == expected, reason
    if expected:
        assert gsm8k_reward(turn(answer), gold + "1") == 0.0


@pytest.mark.parametrize(
    "answer", ["5-3", "2/2", "18 or 19", "1e1", "3½", "", "9" * (MAX_DIGITS + 1)]
)
def test_no_number_equals_no_number(answer: str) -> None:
    assert read_number(answer) is None
    assert gsm8k_reward(turn(answer), answer) == 0.0


def test_gsm8k_gold() -> None:
    assert (
        gsm8k_reward(turn("1234"), "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 1,234")
        == 1.0
    )
    assert (
        gsm8k_reward(turn("9"), "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 1,234") == 0.0
    )
    assert gsm8k_reward(turn("-5"), "#### -5") == 1.0
    assert gsm8k_reward(turn("5"), "#### -5") == 0.0
    assert gsm8k_reward(turn("0.1"), "0.1") == 1.0
    assert (
        gsm8k_reward(turn("0.1"), "0.1000000000000000055511151231257827") == 0.0
    )  # what float takes it for
    assert gsm8k_reward(turn(""), "") == 0.0
    assert gsm8k_reward(turn("18"), "") == 0.0
    assert gsm8k_reward("<think>18</think>", "18") == 0.0
    assert gsm8k_reward("<think><answer>18</answer>", "18") == 0.0


# --- any text whatever -----------------------------------------------------------------------------------------------

REWARDS = [
    format_reward,
    lambda text: countdown_reward(text, [3, 5, 7], 15),
    lambda text: gsm8k_reward(text, "18"),
    lambda text: gsm8k_reward("<think></think><answer>18</answer>", text),
]


def assert_graded_within_a_second(text: str) -> None:
    for reward in REWARDS:
        start = time.perf_counter()
        assert reward(text) in (0.0, 1.0)
        assert time.perf_counter() - start < 1.0


any_text = st.text(st.characters(codec=None))  # surrogates and NUL included
CODE = (
    "<think> </think> <answer> </answer> ( ) + - * / ** // 3 5 7 15 18 99 1,234 $ % . , = e E _ ² ٣ #### eval( exec( "
    "__import__('os') os.abort() open('x','w') lambda : 1/0 while True: pass \\boxed{ } # ; [ ]"
)
code_text = st.lists(st.sampled_from([*CODE.split(), " ", "\n", "\0", "\ud800"]), max_size=40).map(
    "".join
)


@thorough
@given(st.one_of(any_text, code_text, any_text.map(turn), code_text.map(turn)))
def test_any_text_is_graded(text: str) -> None:
    assert_graded_within_a_second(text)


@pytest.mark.parametrize("size", [100_000, 1_000_000])
@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "</think><answer>",
        "<think></think><answer>",
    ]
    + [
        "(",
        ")",
        "-",
        "-(",
        "9",
        "9 ",
        "9-",
        "9,",
        "9,999",
        ".",
        "1e",
        "3+",
        "9**",
        "<",
        " ",
        "\n",
        "\0",
        "\ud800",
        "٣",
    ],
)
def test_long_text_is_graded(piece: str, size: int) -> None:
    body = piece * (size // len(piece))
    for text in (
        body,
        f"<think></think>{body}",
        f"<think></think><answer>{body}</answer>",
        f"<think>{body}",
    ):
        assert_graded_within_a_second(text)


def test_text_as_long_as_is_graded_is_cheap() -> None:
    """Texts just within the bounds, where the parsers do work."""
    for piece in (
        "(",
        "-(",
        "9",
        "9 ",
        "9-",
        "9 -",
        "9,",
        "9,999",
        "1e",
        "9*9",
        "9 * ",
        "9-+-+",
        ".9",
        "$",
        "(9)+",
    ):
        assert_graded_within_a_second(turn((piece * MAX_ANSWER_CHARS)[: MAX_ANSWER_CHARS - 2]))
    numbers = list(range(2, 202))  # the largest sum of different fractions that fits
    text = "+".join(f"1/{n}" for n in numbers if n < 180)
    start = time.perf_counter()
    assert len(text) < MAX_ANSWER_CHARS
    assert countdown_reward(turn(text), [n for n in numbers if n < 180] + [1] * 178, 5) == 0.0
    assert time.perf_counter() - start < 0.1


def test_nothing_is_executed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    events = []
    sys.addaudithook(
        lambda event, _: events.append(event) if watching else None
    )  # a hook cannot be removed again
    watching = True
    for attack in (
        "open('owned','w').write('1')",
        "__import__('os').system('touch owned')",
        "exec('import os; os.mkdir(\"owned\")')",
        "(lambda: 3)()",
        "3 + 5 + 7 if open('owned','w') else 0",
    ):
        for reward in REWARDS[1:3]:
            assert reward(turn(attack)) == 0.0
    watching = False
    assert not set(events) & {
        "open",
        "exec",
        "compile",
        "os.system",
        "subprocess.Popen",
        "import",
        "os.mkdir",
    }
    assert not list(tmp_path.iterdir())


# --- MATH ------------------------------------------------------------------------------------------------------------

# (answer, gold, expected, reason)
MATH = [
    # numbers
    ("204", "204", 1.0, "the number itself"),
    ("\\boxed{204}", "204", 1.0, "boxed"),
    ("so \\boxed{3}, no: $\\boxed{204}$.", "204", 1.0, "the last box counts"),
    ("\\boxed{204} or \\boxed{205}", "204", 0.0, "the last box counts, here too"),
    ("\\fbox{204}", "204", 1.0, "the other box"),
    ("$\\boxed 12$ and so on", "12", 1.0, "a box without braces ends at a space or dollar"),
    ("\\boxed 12", "1", 0.0, "not at its first digit, as in TeX"),
    ("\\boxed{204", "204", 0.0, "a box that is not closed is none"),
    ("\\boxed{}", "204", 0.0, "an empty box"),
    ("204", "$2\\cdot 102=\\boxed{204}$", 1.0, "the gold answer is the box of a solution"),
    ("102", "$2\\cdot 102=\\boxed{204}$", 0.0, "not what stands before the box"),
    ("73", "073", 1.0, "AIME writes three digits"),
    ("073", "73", 1.0, "on either side"),
    ("0.5", "\\frac{1}{2}", 1.0, "a decimal"),
    ("\\frac12", "0.5", 1.0, "LaTeX without braces"),
    ("\\dfrac{1}{2}", "1/2", 1.0, "the large fraction, and the plain one"),
    ("\\frac{2}{4}", "\\frac12", 1.0, "not in lowest terms"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", 1.0, "the place of the sign"),
    ("1/0", "1/0", 1.0, "the same text"),
    ("2/0", "1/0", 0.0, "no value"),
    ("3\\frac{1}{2}", "\\frac72", 1.0, "a mixed number"),
    ("-3\\frac{1}{2}", "-3.5", 1.0, "whose sign is that of the whole"),
    ("3 1/2", "3.5", 1.0, "a mixed number in plain text"),
    ("31/2", "3.5", 0.0, "is not 31 halves"),
    ("0.333333", "\\frac{1}{3}", 0.0, "nothing is rounded"),
    ("0.3333333333333333333333333", "1/3", 0.0, "nothing is rounded, however near"),
    ("10,000", "10000", 1.0, "thousands"),
    ("10{,}000", "10,\\!000", 1.0, "thousands in LaTeX"),
    ("50\\%", "50", 1.0, "percent"),
    ("90^\\circ", "90", 1.0, "degrees"),
    ("90°", "90^{\\circ}", 1.0, "degrees, another sign"),
    ("\\$5", "5", 1.0, "dollars"),
    ("5\\text{ cm}", "5", 1.0, "a unit"),
    ("5\\text{ cm}^2", "5", 1.0, "a square unit"),
    ("5 degrees", "5", 1.0, "a unit in words"),
    ("x = 5", "5", 1.0, "a name in front"),
    ("5", "x=5", 1.0, "a name in front of the gold answer"),
    ("y=5", "x=5", 0.0, "another line"),
    ("5.", "5", 1.0, "the end of a sentence"),
    ("-5", "5", 0.0, "the sign counts"),
    ("The answer is 5", "5", 0.0, "prose without a box"),
    ("5 or 6", "5", 0.0, "two guesses"),
    ("5\\text{ or six}", "5", 0.0, "two guesses, one of them disguised as a unit"),
    ("\\{" + ",".join(map(str, range(60))) + "\\}", "5", 0.0, "sixty guesses"),
    ("4=5", "5", 0.0, "an equation is no number"),
    # for a number, computations are not answers
    ("2+3", "5", 0.0, "the question might be 2+3"),
    ("\\sqrt{4}", "2", 0.0, "or the root of 4"),
    ("2^{10}", "1024", 0.0, "or a power"),
    ("\\sum_{i=1}^{100} i", "5050", 0.0, "or a sum"),
    ("1024", "2^{10}", 1.0, "the other way round it has been computed"),
    ("\\sin 60^\\circ", "\\frac{\\sqrt3}{2}", 0.0, "a function for an answer without one"),
    ("\\binom{4}{2}x", "6x", 0.0, "a binomial coefficient"),
    # text
    ("\\text{Evelyn}", "\\text{Evelyn}", 1.0, "text"),
    ("evelyn", "\\text{Evelyn}", 1.0, "text in lower case"),
    ("nylevE", "Evelyn", 0.0, "text is no product of letters"),
    ("C", "\\text{(C)}", 1.0, "a choice"),
    ("\\textbf{(C)}", "C", 1.0, "a bold choice"),
    ("D", "\\text{(C)}", 0.0, "another choice"),
    # expressions
    ("3+2x", "2x+3", 1.0, "the order of a sum"),
    ("2x-3", "2x+3", 0.0, "another expression"),
    ("(x+1)(x-1)", "x^2-1", 1.0, "factors"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt 3}", 1.0, "a rational denominator"),
    ("1.41421356", "\\sqrt{2}", 0.0, "nothing is rounded"),
    ("1.41421356237309504880168872420969807856967187538", "\\sqrt{2}", 0.0, "nor at 47 decimals"),
    ("3.14159", "\\pi", 0.0, "nor is pi"),
    (
        "x+0.14159265358979323846264338327950288419716939937",
        "x+\\pi-3",
        0.0,
        "nor in an expression",
    ),
    ("0.5\\pi", "\\frac{\\pi}{2}", 1.0, "an exact decimal"),
    ("2\\sqrt{3}\\text{ cm}^2", "2\\sqrt3", 1.0, "a unit"),
    ("3t", "3", 0.0, "a letter is no unit"),
    ("\\frac{x}{2}h", "\\frac{x}{2}", 0.0, "nor is h, as Math-Verify has it"),
    ("\\sin^2 x", "1-\\cos^2 x", 1.0, "functions where the gold answer has some"),
    ("1+2i", "2i+1", 1.0, "complex numbers"),
    ("2i\\sqrt3+x", "x+2\\sqrt{3}i", 1.0, "complex, however i is placed"),
    ("1-2i", "1+2i", 0.0, "the conjugate"),
    ("12_3", "12_{3}", 1.0, "a base"),
    ("12", "12_3", 0.0, "which counts"),
    ("12_3", "12", 0.0, "on either side"),
    # equations
    ("y=2x+3", "y=3+2x", 1.0, "an equation"),
    ("2x+3", "y=3+2x", 1.0, "its right side"),
    ("4x+6y=10", "2x+3y=5", 1.0, "twice the equation"),
    ("4x+6y=11", "2x+3y=5", 0.0, "another equation"),
    ("x<2", "(-\\infty,2)", 1.0, "an inequality is an interval"),
    ("x\\le 2", "(-\\infty,2)", 0.0, "with its end"),
    # collections
    ("\\left( 1,\\, 2.0 \\right)", "(1,2)", 1.0, "a tuple"),
    ("(2,1)", "(1,2)", 0.0, "whose order counts"),
    ("\\{2,1\\}", "\\{1,2\\}", 1.0, "a set, whose order does not"),
    ("\\{1,2,3\\}", "\\{1,2\\}", 0.0, "one more"),
    ("\\{1,1,2\\}", "\\{1,2\\}", 0.0, "one twice"),
    ("1,-2", "-2,1", 1.0, "several solutions in any order"),
    ("x=1\\text{ or }x=-2", "-2,1", 1.0, "with names"),
    ("1,2", "1,1", 0.0, "one solution does not serve for two"),
    ("1", "-2,1", 0.0, "one of them missing"),
    ("\\pm 2", "2,-2", 1.0, "both signs"),
    ("1\\pm\\sqrt2", "1-\\sqrt{2}, 1+\\sqrt{2}", 1.0, "both signs behind a number"),
    ("[0,\\frac12)", "[0,0.5)", 1.0, "an interval"),
    ("[0,1)", "[0,1]", 0.0, "its ends count"),
    ("(-\\infty,1)\\cup(2,\\infty)", "(2,\\infty)\\cup(-\\infty,1)", 1.0, "a union"),
    ("(-\\infty,1]\\cup(2,\\infty)", "(2,\\infty)\\cup(-\\infty,1)", 0.0, "its ends count"),
    (
        "\\begin{bmatrix}1&0.5\\\\x&4\\end{bmatrix}",
        "\\begin{pmatrix} 1 & \\frac12 \\\\ x & 4 \\end{pmatrix}",
        1.0,
        "matrix",
    ),
    (
        "\\begin{pmatrix}\\sqrt4\\\\x\\end{pmatrix}",
        "\\begin{pmatrix}2\\\\x\\end{pmatrix}",
        0.0,
        "a number, within one",
    ),
    (
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "\\begin{pmatrix}1&2\\end{pmatrix}",
        0.0,
        "a row is no column",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _worker() -> None:
    worker()  # it takes seconds to start, which belong to no answer


@pytest.mark.parametrize(("answer", "gold", "expected", "reason"), MATH)
def test_math(answer: str, gold: str, expected: float, reason: str) -> None:
    assert math_reward(turn(answer), gold) == expected, reason


def test_math_grades_the_answer_alone() -> None:
    assert math_reward("<think>\\boxed{5}</think>", "5") == 0.0
    assert math_reward("<think><answer>5</answer>", "5") == 0.0
    assert math_reward("<think>\\boxed{6}</think>\\boxed{7}<answer>5</answer>", "5") == 1.0
    assert math_reward(turn(""), "") == 0.0
    assert math_reward(turn("5" * (MAX_DIGITS + 1)), "5" * MAX_DIGITS) == 0.0


SLOW = "(x+y+z)^{9999}"  # passes every bound, and sympy would expand it for ever


def test_a_slow_comparison_is_cut_off_and_the_next_is_right() -> None:
    for _ in range(2):
        start = time.perf_counter()
        assert not equal_by_worker(SLOW, "x^2")
        assert 0.4 < time.perf_counter() - start < 1.0
        assert equal_by_worker("2x+3", "3+2x")


def test_many_threads_at_once() -> None:
    texts = [("2x+3", "3+2x"), (SLOW, "x^2"), ("2x-3", "3+2x")] * 2
    with ThreadPoolExecutor(len(texts)) as pool:
        assert (
            list(pool.map(lambda pair: equal_by_worker(*pair), texts)) == [True, False, False] * 2
        )


def test_a_worker_that_died_is_replaced() -> None:
    os.kill(rewards._worker[0].pid, signal.SIGKILL)
    rewards._worker[0].wait()
    assert math_reward(turn("2x+3"), "3+2x") == 1.0


def test_the_worker_ends_with_its_parent() -> None:
    program = "import os, rewards; rewards.worker(); print(rewards._worker[0].pid, flush=True); os.kill(os.getpid(), 9)"
    folder = os.path.dirname(rewards.__file__)
    parent = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert parent.returncode == -signal.SIGKILL
    for _ in range(100):
        try:
            os.kill(int(parent.stdout), 0)
        except ProcessLookupError:
            return
        # Where nobody collects orphans, an ended process stays as a zombie.
        with contextlib.suppress(OSError), open(f"/proc/{int(parent.stdout)}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.05)
    pytest.fail("the worker has outlived its parent")


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not math_verify_missing()
    monkeypatch.setattr(rewards, "find_spec", lambda name: None)
    assert math_verify_missing()
    with pytest.raises(ImportError, match="math-verify"):
        math_reward(turn("5"), "5")


HARD = (
    "9^{9^{9^9}} 10000! (10^{9999})! \\sum_{i=1}^{10^9} \\prod \\int_0^1 \\lim_{x\\to0} \\binom{10^6}{10^5} "
    "\\frac{ \\sqrt{ \\begin{pmatrix} & \\\\ \\end{pmatrix} ^{9999} (x+y)^{999} x y i ( ) { } [ ] , = < "
    "\\pm \\cup \\sin \\log | \\text{ } \\boxed{"
)
hard_text = st.lists(
    st.sampled_from([*HARD.split(), *CODE.split(), " ", "\0", "\ud800"]), max_size=12
).map("".join)


@settings(deadline=None, max_examples=100, derandomize="CI" in os.environ)
@given(st.one_of(any_text, hard_text), st.sampled_from(["5", "x^2+1", "\\sin x", "(1,\\sqrt2)"]))
def test_math_grades_any_text(text: str, gold: str) -> None:
    with ThreadPoolExecutor(1) as pool:  # not the main thread, where alone signal.alarm would work
        for completion, expected in ((text, gold), (turn(text), gold), (turn(gold), text)):
            start = time.perf_counter()
            assert pool.submit(math_reward, completion, expected).result() in (0.0, 1.0)
            assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}",
        "9^9^9^9",
        "10000!",
        "2^{99999}",
        "(x+y+z)^{9999}",
        "((x+1)^{99}+(y+1)^{99})^{99}",
        "\\sum_{i=1}^{10^9} i",
        "\\begin{pmatrix}" + "1&" * 70 + "1\\end{pmatrix}^{999}",
        "\\begin{pmatrix}" + "1&x" * 30_000 + "\\end{pmatrix}",
        "\\sqrt{" * 40 + "2" + "}" * 40,
        "(" * 24 + "x" + ")" * 24,
        "\\frac{1}{1+" * 20 + "x" + "}" * 20,
        "9" * 100_000,
        "(" * 100_000,
        "\\boxed{" * 14_000,
        "{" * 50_000 + "}" * 50_000,
        "\\frac" * 20_000,
        "\\text{" * 17_000,
        "a or " * 20_000,
        " " * 100_000,
        "x+" * 149 + "x",
        "__import__('os').system('touch owned')",
        "\0",
        "\ud800",
    ],
)
def test_math_grades_hard_text(text: str) -> None:
    for answer in (text, f"\\boxed{{{text}}}"):
        start = time.perf_counter()
        assert math_reward(turn(answer), "x^2+\\sqrt{2}") == 0.0
        assert time.perf_counter() - start < 1.0
