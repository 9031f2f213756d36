"""Rule-based rewards (DeepSeek-R1, arXiv 2501.12948, section 2.2): a completion goes in, 0.0 or 1.0 comes out.

A policy under reinforcement learning finds every way to be paid. So nothing the model writes is ever executed, no
number is compared within a tolerance, and whatever the text, even a megabyte of brackets, the answer comes within a
second and without an exception: lengths are bounded before anything is computed, and every search is linear in it.

`completion` is always the whole assistant turn, beginning with the `<think>` that the prompt prefilled.
"""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 1000  # a longer answer is not graded
MAX_DIGITS = 50  # of one number
MAX_NESTING = 50  # parentheses within parentheses; the parser recurses once for each

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


# ---------------------------------------------------------------------------------------------------------------------
# Format


def format_reward(completion: str) -> float:
    """1.0 for exactly `<think> … </think> <answer> … </answer>`, with nothing but white space around the two blocks.

    Each of the four tags appears once and in this order, so a tag quoted in the thinking costs the reward. The thinking
    may be empty (how long to think is for the training to find); an empty answer is no answer. Source: section 2.2.
    """
    # Splitting at the tags leaves text at the even places and the tags themselves at the odd ones.
    pieces = re.split("(</?think>|</?answer>)", completion)
    if pieces[1::2] != TAGS:
        return 0.0
    before, _thinking, between, answer, after = (piece.strip() for piece in pieces[::2])
    return 0.0 if before or between or after or not answer else 1.0


def extract_answer(completion: str) -> str | None:
    """The text of the last complete `<answer>…</answer>` outside the thinking, stripped; None where there is none.

    `<think>` opens the thinking and the first `</think>` after it closes it, however often `<think>` is repeated in
    between: a model that quotes its instructions, "in <think> tags", opens nothing twice. A `<think>` after that opens
    the thinking again. Tags inside the thinking never count, and thinking that is never closed hides all that follows.
    """
    for turn in reversed(completion.split("<think>")):
        spoken = turn.partition("</think>")[2]
        # The last opening tag that has a closing tag behind it, up to the nearest one: with str.find this stays linear
        # for "<answer>" repeated a hundred thousand times, where the regex `<answer>.*?</answer>` would be quadratic.
        start = spoken.rfind("<answer>", 0, max(spoken.rfind("</answer>"), 0))
        if start >= 0:
            start += len("<answer>")
            return spoken[start : spoken.find("</answer>", start)].strip()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Countdown: reach the target with every number once


def countdown_reward(completion: str, numbers: list[int], target: int) -> float:
    """1.0 if the answer is an expression that uses each of `numbers` exactly once and equals `target` exactly.

    The expression has `+ - * /`, parentheses, white space and the numbers as they were given: ASCII digits without
    leading zeros. A sign may stand before a parenthesis, `-(3 - 5) * 2`, never before a number, `-3 + 5`. So powers,
    `//`, decimals, `=` and everything else that Python's `eval` would take are refused. The arithmetic is that of
    fractions: `7 + 1/(98*99*100)` is not 7. Task: TinyZero.
    """
    answer = extract_answer(completion)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    # Any other character becomes a token of its own, which the parser then refuses; so does the second 0 of "007".
    tokens = re.findall(r"0|[1-9][0-9]*|\S", answer)
    written = [token for token in tokens if is_number(token)]
    if any(len(token) > MAX_DIGITS for token in written) or any(type(n) is not int for n in [*numbers, target]):
        return 0.0
    if sorted(int(token) for token in written) != sorted(numbers):
        return 0.0
    try:
        return 1.0 if expression_value(tokens) == target else 0.0
    except (SyntaxError, ZeroDivisionError):
        return 0.0


def is_number(token: str) -> bool:
    return token.isascii() and token.isdigit()  # isdigit alone is true of "²" and of every other script's digits


def expression_value(tokens: list[str]) -> Fraction:
    """The exact value of an expression, by recursive descent over this grammar:

        total   = product { ("+" | "-") product }
        product = operand { ("*" | "/") operand }
        operand = number | [ "+" | "-" ] "(" total ")"

    Raises SyntaxError for anything else and for too deep a nesting, ZeroDivisionError for a division by zero. None of
    the operations makes a number longer than the digits that were written, so a short answer is also cheap to compute.
    """
    tokens = [*tokens, ""]  # marks the end, so that a token may always be looked at
    value, at = parse_total(tokens, 0, depth=0)
    if tokens[at] != "":
        raise SyntaxError(f"unexpected {tokens[at]!r}")
    return value


def parse_total(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    """The value of the total that begins with token number `at`, and the number of the token behind it."""
    value, at = parse_product(tokens, at, depth)
    while (operator := tokens[at]) in ("+", "-"):
        operand, at = parse_product(tokens, at + 1, depth)
        value = value + operand if operator == "+" else value - operand
    return value, at


def parse_product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = parse_operand(tokens, at, depth)
    while (operator := tokens[at]) in ("*", "/"):
        operand, at = parse_operand(tokens, at + 1, depth)
        value = value * operand if operator == "*" else value / operand
    return value, at


def parse_operand(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if is_number(tokens[at]):
        return Fraction(int(tokens[at])), at + 1
    sign = -1 if tokens[at] == "-" else 1
    if tokens[at] in ("+", "-"):
        at += 1
    if tokens[at] != "(" or depth == MAX_NESTING:
        raise SyntaxError(f"unexpected {tokens[at]!r}")
    value, at = parse_total(tokens, at + 1, depth + 1)
    if tokens[at] != ")":
        raise SyntaxError("a parenthesis is not closed")
    return sign * value, at + 1


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K: one number

# "1,23" and "1, 234" are two numbers each.
NUMBER = re.compile(
    r"(?:(?<![A-Za-z0-9.])-\\?\$?)?"  # -5 or -$5; behind a letter or a digit it is a hyphen, as in "covid-19"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"  # 1,234 or 1234 or 1234.50, or .50
)
# Digits joined by an operator, or by the e of 1e3: the model has left the computing to the grader.
EXPRESSION = re.compile(r"[0-9]\.?(?:[eE][-+]?|\s*[-+*/^:x×÷][-+*/^:x×÷\s($\\]*)\.?[0-9]")


def gsm8k_reward(completion: str, gold: str) -> float:
    """1.0 if the one number in the answer equals `gold`: a number, or GSM8K's answer text, which ends in `#### 1,234`.

    Dollar and percent signs, thousands separators, units, Markdown and trailing zeros do not matter: `**$18.00** per
    day` is 18. See `read_number` for what is no answer. Data: huggingface.co/datasets/openai/gsm8k.
    """
    answer = extract_answer(completion)
    expected = read_number(gold.rpartition("####")[2])
    return 1.0 if answer is not None and expected is not None and read_number(answer) == expected else 0.0


def read_number(text: str) -> Fraction | None:
    """The one number in `text`, exactly; None if there is none, or more than one (the same one twice is one).

    Several different numbers would be several guesses. What looks like an expression, `5-3`, `2/2` or `1e3`, is not a
    number, nor is anything with digits from outside ASCII: `5²` is not 5, `3½` is not 3.
    """
    if len(text) > MAX_ANSWER_CHARS or any(char.isnumeric() and not char.isascii() for char in text):
        return None
    text = text.replace("\u2212", "-")  # the typographic minus sign
    found = NUMBER.findall(text)
    if EXPRESSION.search(text) or any(len(number) > MAX_DIGITS for number in found):
        return None
    values = {Fraction(re.sub(r"[\\$,]", "", number)) for number in found}
    return values.pop() if len(values) == 1 else None
