"""rewards.py: every rule by a hand-worked case, the exploits that earn nothing, and any text at all within a second."""

import os
import random
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import (
    MAX_ANSWER_CHARS,
    MAX_DIGITS,
    MAX_NESTING,
    countdown_reward,
    extract_answer,
    format_reward,
    gsm8k_reward,
    read_number,
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


@pytest.mark.parametrize(
    ("answer", "numbers", "target"),
    [
        ("44 + 19 + 35", [44, 19, 35], 98),
        ("35+44+19", [44, 19, 35], 98),
        ("(1 + 2) / 3", [3, 2, 1], 1),
        ("8 / (3 - 8 / 3)", [8, 8, 3, 3], 24),  # right only in exact fractions
        ("2 + 3 * 4", [2, 3, 4], 14),  # * before +
        ("9 - 3 - 2", [9, 3, 2], 4),  # from the left
        ("24 / 4 / 2", [24, 4, 2], 3),
        ("24 / 4 * 2", [24, 4, 2], 12),
        ("-(3 - 5) * 2", [3, 5, 2], 4),
        ("2 - -(3 + 1)", [2, 3, 1], 6),
        ("2 * -(3 - 5)", [2, 3, 5], 4),
        ("+(1 + 2)", [1, 2], 3),
        ("3 - 5", [3, 5], -2),
        ("((((7))))", [7], 7),
        ("(" * MAX_NESTING + "7" + ")" * MAX_NESTING, [7], 7),
        ("7 * 0", [7, 0], 0),
        ("7\n+\t1 ", [7, 1], 8),
        ("5 + 5", [5, 5], 10),
        ("9" * MAX_DIGITS + " - 1", [10**MAX_DIGITS - 1, 1], 10**MAX_DIGITS - 2),
    ],
)
def test_countdown_is_paid(answer: str, numbers: list[int], target: int) -> None:
    assert countdown_reward(turn(answer), numbers, target) == 1.0
    assert countdown_reward(turn(answer), numbers, target + 1) == 0.0
    assert countdown_reward(turn(answer), [*numbers, 1], target) == 0.0


@pytest.mark.parametrize(
    ("answer", "numbers", "target"),
    [
        # what reward functions built on eval pay, or hang on
        ("99**98**97", [99, 98, 97], 1),
        ("2**3+4", [2, 3, 4], 12),
        ("2* *3+4", [2, 3, 4], 12),
        ("7//2+1", [7, 2, 1], 4),
        ("7/ /2+1", [7, 2, 1], 4),
        ("1.5*2", [1, 5, 2], 3),
        ("1.5*2", [15, 2], 3),
        ("7 + 1/(98*99*100)", [7, 1, 98, 99, 100], 7),
        ("7%4", [7, 4], 3),
        ("1e3", [1, 3], 1000),
        ("0x10", [0, 10], 16),
        ("1_0 + 2", [10, 2], 12),
        ("1_0 + 2", [1, 0, 2], 12),
        ("1 0 + 2", [10, 2], 12),
        ("1 0 + 2", [1, 0, 2], 12),
        ("007 + 1", [7, 1], 8),
        ("07 + 1", [0, 7, 1], 8),
        ("6 # + 2", [6, 2], 6),
        ("6 or 2", [6, 2], 6),
        ("6, 2", [6, 2], 6),
        ("[6, 2][0]", [6, 2, 0], 6),
        ("3!", [3], 6),
        ("5^3", [5, 3], 6),
        ("~3 + 10", [3, 10], 6),
        ("__import__('os').system('exit 1') or 3 + 3", [3, 3], 6),
        ("print(3)", [3], 3),
        ("lambda: 3", [3], 3),
        # digits and operators of other scripts
        ("３ + 4", [3, 4], 7),
        ("٣ + 4", [3, 4], 7),
        ("3² + 4", [3, 4], 13),
        ("3² + 4", [3, 2, 4], 13),
        ("3 × 4", [3, 4], 12),
        ("5 \u2212 4", [5, 4], 1),
        # the numbers
        ("98", [44, 19, 35], 98),
        ("44 + 54", [44, 19, 35], 98),
        ("44 + 19 + 35", [44, 19, 35, 0], 98),
        ("44 + 19 + 35 + 1 - 1", [44, 19, 35], 98),
        ("5 + 5 + 5", [5, 5], 15),
        ("5", [5, 5], 5),
        # signs
        ("-3 + 5", [3, 5], 2),
        ("-3 + 5", [-3, 5], 2),
        ("+3 + 5", [3, 5], 8),
        ("2 - -3", [2, 3], 5),
        ("2 + -3", [2, 3], -1),
        ("--(3)", [3], 3),
        # syntax
        ("", [], 0),
        ("", [3], 3),
        ("()", [], 0),
        ("3()", [3], 3),
        ("(3", [3], 3),
        ("3)", [3], 3),
        (")3(", [3], 3),
        ("3 +", [3], 3),
        ("* 3", [3], 3),
        ("-", [], 0),
        ("(-)3", [3], 3),
        ("3 4", [3, 4], 7),
        ("3(4)", [3, 4], 12),
        ("(3)(4)", [3, 4], 12),
        ("[3 + 4]", [3, 4], 7),
        ("{3 + 4}", [3, 4], 7),
        ("3 + 4 = 7", [3, 4], 7),
        ("7 = 3 + 4", [3, 4], 7),
        ("7 == 3 + 4", [3, 4, 7], 1),
        ("x = 3 + 4", [3, 4], 7),
        ("$3 + 4$", [3, 4], 7),
        ("3 + 4\0", [3, 4], 7),
        ("3 + 4\ud800", [3, 4], 7),
        # division by zero
        ("3 / 0", [3, 0], 0),
        ("3 / (4 - 4)", [3, 4, 4], 0),
        ("0 / 0", [0, 0], 0),
        # bounds
        ("(" * (MAX_NESTING + 1) + "7" + ")" * (MAX_NESTING + 1), [7], 7),
        ("1" + "0" * MAX_DIGITS, [10**MAX_DIGITS], 10**MAX_DIGITS),
        ("3" + " " * MAX_ANSWER_CHARS + "+ 4", [3, 4], 7),
        # questions that cannot be
        ("1", [True], 1),
        ("1", [1], True),
        ("3", [3.0], 3),
        ("3", ["3"], 3),
        ("3", [3], None),
        ("3", [3], "3"),
    ],
)
def test_countdown_is_not_paid(answer: str, numbers: list, target: object) -> None:
    assert countdown_reward(turn(answer), numbers, target) == 0.0


def test_countdown_takes_huge_numbers() -> None:
    huge = 10**6000  # has no str(): Python refuses to write more than 4,300 digits
    assert countdown_reward(turn("3"), [huge], huge) == 0.0
    assert countdown_reward(turn("3"), [3], huge) == 0.0
    assert countdown_reward(turn("9" * 6000), [huge - 1], huge - 1) == 0.0


def test_countdown_grades_the_answer_alone() -> None:
    assert countdown_reward("<think>1 + 2</think>", [1, 2], 3) == 0.0
    assert countdown_reward("<think><answer>1 + 2</answer>", [1, 2], 3) == 0.0
    assert countdown_reward("<think><answer>1 + 2</answer></think><answer>2 + 2</answer>", [1, 2], 3) == 0.0
    assert countdown_reward("<think>a</think><answer>1 + 2</answer><answer>2 + 2</answer>", [1, 2], 3) == 0.0
    assert countdown_reward("<think>a</think>not the best form:<answer>1 + 2</answer> :-)", [1, 2], 3) == 1.0


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, list[int], Fraction]:
    """An expression by a random tree with redundant parentheses and white space, its numbers, and its value.

    The text is written with as few parentheses as precedence allows or with more; the value comes from the tree.
    """
    gap = st.sampled_from(["", "", " ", "  ", "\n", "\t"])
    numbers = draw(st.lists(st.integers(0, 120), min_size=1, max_size=6))

    def parenthesise(text: str) -> str:
        return f"({draw(gap)}{text}{draw(gap)})"

    def build(leaves: list[int]) -> tuple[str, Fraction, int]:  # text, value, precedence: 0 sum, 1 product, 2 operand
        if len(leaves) == 1:
            text, value, precedence = str(leaves[0]), Fraction(leaves[0]), 2
        else:
            cut = draw(st.integers(1, len(leaves) - 1))
            (left, a, left_precedence), (right, b, right_precedence) = build(leaves[:cut]), build(leaves[cut:])
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
            text, value = (parenthesise(sign + text), -value if sign == "-" else value) if sign else (text, value)
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


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("18", 18),
        ("18.", 18),
        ("18.0", 18),
        ("18.00", 18),
        ("018", 18),
        ("+18", 18),
        ("$18", 18),
        ("\\$18", 18),
        ("$18.00.", 18),
        ("18%", 18),
        ("18 %", 18),
        ("18 eggs", 18),
        ("18eggs", 18),
        ("$18 per day", 18),
        ("$18/day", 18),
        ("**18**", 18),
        ("**$18**", 18),
        ("*18*", 18),
        ("__18__", 18),
        ("`18`", 18),
        ("\\boxed{18}", 18),
        ("#### 18", 18),
        ("The answer is 18.", 18),
        ("x = 18", 18),
        ("18\n", 18),
        ("18, that is 18 eggs", 18),
        ("18 and 18.0", 18),
        ("1,234", 1234),
        ("1234", 1234),
        ("$1,234.50", Fraction(2469, 2)),
        ("1,234,567", 1234567),
        (".5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("-5", -5),
        ("x=-5", -5),
        ("-$5", -5),
        ("-\\$5", -5),
        ("$-5", -5),
        ("\u22125", -5),  # the typographic minus sign
        ("covid-19", 19),  # a hyphen
        ("0", 0),
        ("-0", 0),
        ("9" * MAX_DIGITS, 10**MAX_DIGITS - 1),
    ],
)
def test_one_number(answer: str, number: int | Fraction) -> None:
    assert read_number(answer) == number
    for gold in (str(number), f"They had to compute 2+3=<<2+3=5>>5 first.\n#### {number}"):
        if Fraction(number).denominator == 1:
            assert gsm8k_reward(turn(answer), gold) == 1.0
            assert gsm8k_reward(turn(answer), gold + "1") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "eighteen",
        "$",
        "-",
        ".",
        "1,234 or 1,235",
        "18 or 19",
        "5 -5",
        "1, 234",
        "12,34",
        "1,2345",
        "1,2341234",
        "1234,567",
        "1 234",
        "1.2.3",
        # expressions are not worked out, nor mistaken for one of their numbers
        "5-3",
        "3 - 3",
        "$3 - $3",
        "3 + 3",
        "1/2",
        "2/2",
        "2*2",
        "2**2",
        "2^2",
        "3 x 3",
        "3 × 3",
        "3:3",
        "1e1",
        "1E+1",
        "1.e1",
        # digits outside ASCII
        "１８",
        "5²",
        "3½",
        "18 ١٨",
        # bounds
        "9" * (MAX_DIGITS + 1),
        "18" + " " * MAX_ANSWER_CHARS + "eggs",
    ],
)
def test_no_one_number(answer: str) -> None:
    assert read_number(answer) is None
    for gold in ("1", "2", "3", "5", "10", "18", "234", "1234", answer):
        assert gsm8k_reward(turn(answer), gold) == 0.0


def test_gsm8k_gold() -> None:
    assert gsm8k_reward(turn("1234"), "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 1,234") == 1.0
    assert gsm8k_reward(turn("9"), "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 1,234") == 0.0
    assert gsm8k_reward(turn("-5"), "#### -5") == 1.0
    assert gsm8k_reward(turn("5"), "#### -5") == 0.0
    assert gsm8k_reward(turn("0.1"), "0.1") == 1.0
    assert gsm8k_reward(turn("0.1"), "0.1000000000000000055511151231257827") == 0.0  # what float takes it for
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
code_text = st.lists(st.sampled_from([*CODE.split(), " ", "\n", "\0", "\ud800"]), max_size=40).map("".join)


@thorough
@given(st.one_of(any_text, code_text, any_text.map(turn), code_text.map(turn)))
def test_any_text_is_graded(text: str) -> None:
    assert_graded_within_a_second(text)


@pytest.mark.parametrize("size", [100_000, 1_000_000])
@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>", "<answer>", "</answer>", "<answer></answer>", "</think><answer>", "<think></think><answer>"]
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
    for text in (body, f"<think></think>{body}", f"<think></think><answer>{body}</answer>", f"<think>{body}"):
        assert_graded_within_a_second(text)


def test_text_as_long_as_is_graded_is_cheap() -> None:
    """Texts just within the bounds, where the parsers do work."""
    for piece in ("(", "-(", "9", "9 ", "9-", "9 -", "9,", "9,999", "1e", "9*9", "9 * ", "9-+-+", ".9", "$", "(9)+"):
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
    sys.addaudithook(lambda event, _: events.append(event) if watching else None)  # a hook cannot be removed again
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
    assert not set(events) & {"open", "exec", "compile", "os.system", "subprocess.Popen", "import", "os.mkdir"}
    assert not list(tmp_path.iterdir())
