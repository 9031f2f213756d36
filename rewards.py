"""Rule-based rewards (DeepSeek-R1, arXiv 2501.12948, section 2.2): a completion goes in, 0.0 or 1.0 comes out.

A policy under reinforcement learning finds every way to be paid. So nothing the model writes is ever executed, no
number is compared within a tolerance, and whatever the text, even a megabyte of brackets, the answer comes within a
second and without an exception: lengths are bounded before anything is computed, and every search is linear in it.

`completion` is always the whole assistant turn, beginning with the `<think>` that the prompt prefilled.

Below the rewards stands what else comes out of a run: statistics, logs, files that a crash leaves whole.
"""

import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import BinaryIO

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


# ---------------------------------------------------------------------------------------------------------------------
# MATH: one exact value or expression

MAX_MATH_CHARS = 300  # of a boxed answer; the longest of MATH's own are matrices of about 150
MATH_SECONDS = 0.5  # of the processor for one answer, so that a busy machine does not change what is right

# What the library may read in an answer. Every other command names a computation, \sum or \binom or \lfloor: quoting
# the question would then be an answer to it, and many of them take sympy for ever.
PLAIN_COMMANDS = re.compile(
    "frac|sqrt|pi|cdot|times|div|infty|cup|cap|pm|mp|le|leq|ge|geq|ne|neq|lt|gt|in|begin|end|emptyset|mathbb|"
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|psi|omega"
)
# These only where the gold answer has one of them too: else \sin 60^\circ would be an answer to "what is sin 60°?".
FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|\|")

DIGITS = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
RATIONAL = re.compile(
    r"(?P<sign>[-+]?)(?:"
    rf"(?P<whole>[0-9]+)?\\frac\{{(?P<over>-?{DIGITS})\}}\{{(?P<under>-?{DIGITS})\}}"  # 1/2 in LaTeX, or 3 1/2
    rf"|(?:(?P<whole_>[0-9]+) )?(?P<over_>{DIGITS})/(?P<under_>{DIGITS})"  # the same in plain text
    rf"|(?P<number>{DIGITS}))"
)
UNITS = "units?|degrees?|dollars?|cents?|percent|inch(?:es)?|feet|miles?|cm|mm|km|seconds?|minutes?|hours?|days?|years?"

# Applied in this order to every answer and gold answer. None of them makes two values one.
TIDY = [
    (r"\s+", " "),
    (r",\\!|\{,\}", ","),  # 10,\!000 and 10{,}000
    (r"(\\\\)|\\[!,;: ]|~", r"\1 "),  # LaTeX's spaces, but not the \\ between two rows of a matrix
    (r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])", ""),
    (r"\\[()\[\]]|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|°|\*\*", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\varnothing", r"\\emptyset"),
    (r"(\\[A-Za-z]+)\s+(?=[0-9])", r"\1"),
    (r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (r"(?<=\S)\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}0-9,]*\}(?:\^\{?[23]\}?)?[\s.]*$", ""),  # 5\text{ cm}^2
    (rf"(?<=[0-9}}])\s+(?:(?:square|cubic) )?(?:{UNITS})\.?\s*$", ""),
    (r"^\s*\\(?:text|textbf|textrm|mbox|mathrm)\s*\{([^{}]*)\}[\s.]*$", r"\1"),  # nothing but text
    (r"\\frac\s*([0-9a-z])\s*([0-9a-z])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\\frac\s*([0-9a-z])\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*([0-9a-z])", r"\\frac\1{\2}"),
    (r"_\s*([0-9A-Za-z])", r"_{\1}"),
    # A space between two letters or digits stays: "3 1/2" is not "31/2".
    (r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", ""),
    (r"\.$", ""),
    (r"^\(([A-Z])\)$", r"\1"),  # of several choices, (C)
]


def math_reward(completion: str, gold: str) -> float:
    """1.0 if the answer's last box, or without a box the whole answer, is exactly the value of `gold`.

    `gold` is plain, `073` or `\\frac{14}{3}`, or a solution whose last box holds it. One value may be written in many
    ways, `0.5 = \\frac12` and `2x+3 = 3+2x`, but nothing is rounded: `0.333333` is not 1/3. Where the gold answer is a
    number, so must the answer be: `2+3` is not 5, or the question "what is 2+3?" would be its own answer. Tuples and
    intervals keep their order and brackets; of sets and of lists of solutions the order does not matter.

    What is no plain number is compared by Math-Verify (github.com/huggingface/Math-Verify). Raises ImportError if it is
    not installed. Data: huggingface.co/datasets/HuggingFaceH4/MATH-500, AIME.
    """
    if math_verify_missing():
        raise ImportError("math_reward needs the library math-verify; try uv run --extra math")
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    answer, gold = last_box(answer), last_box(gold)
    if max(len(answer), len(gold)) > MAX_MATH_CHARS:
        return 0.0
    equal = equal_at_sight(tidy(answer), tidy(gold))
    if equal is None:
        equal = equal_by_worker(tidy(answer), tidy(gold))
    return 1.0 if equal else 0.0


def math_verify_missing() -> bool:
    """Whether the optional library that math_reward needs is absent; takes no time, for it is not imported here."""
    return find_spec("math_verify") is None


def last_box(text: str) -> str:
    r"""What is in the last `\boxed{…}` or `\fbox{…}` of `text`; all of it, stripped, where there is no complete box."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return text.strip()
    content = re.sub(r"^\\(?:boxed|fbox)\s*", "", text[start:])
    if not content.startswith("{"):
        return re.split(r"[\s$]", content)[0]  # \boxed 5
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # \{ and \} do not count
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return content[1 : brace.start()].strip()
    return text.strip()


def tidy(text: str) -> str:
    r"""`text` without what does not change its value: `$\dfrac 12\text{ cm}$` becomes `\frac{1}{2}`."""
    for pattern, replacement in TIDY:
        text = re.sub(pattern, replacement, text.strip())
    if not re.search(r"[(\[]|\\\{", text):  # within brackets 1,234 is two numbers
        text = re.sub(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda found: found[0].replace(",", ""), text)
    return text


def rational(text: str) -> Fraction | None:
    r"""The value of a tidied integer, decimal, fraction or mixed number; None for anything else and for 1/0."""
    found = RATIONAL.fullmatch(strip_name(text)[1])
    if found is None or re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", text):
        return None
    group = found.groupdict()
    whole = Fraction(group["whole"] or group["whole_"] or 0)
    over = Fraction(group["over"] or group["over_"] or group["number"])
    under = Fraction(group["under"] or group["under_"] or 1)
    if under == 0:
        return None
    return (whole + over / under) * (-1 if group["sign"] == "-" else 1)


def strip_name(text: str) -> tuple[str, str]:
    r"""The name in front and the rest: `x=5` is ("x", "5"), `f(x)=2x` ("f(x)", "2x"), `5` ("", "5")."""
    found = re.fullmatch(r"(\\?[A-Za-z]+(?:_\{\w+\})?(?:\([a-z]\))?)(?:=|\\in(?![a-z]))([^=]+)", text)
    return (found[1], found[2]) if found else ("", text)


def equal_at_sight(answer: str, gold: str) -> bool | None:
    """Whether two tidied texts are the same value, where that needs no library; None where it does."""
    if answer == gold:
        return answer != ""
    number = rational(gold)
    if number is not None:
        (answer_name, _), (gold_name, _) = strip_name(answer), strip_name(gold)
        return rational(answer) == number and (not answer_name or not gold_name or answer_name == gold_name)
    if re.fullmatch("[A-Za-z]{3,}(?: [A-Za-z]+)*", gold):  # a word, and no product of letters
        return answer.lower() == gold.lower()
    return None if is_readable(answer, gold) else False


def is_readable(answer: str, gold: str) -> bool:
    """Whether the library may see this answer; what passes can still be slow, but hardly by accident."""
    functions = any(map(FUNCTIONS.fullmatch, commands(gold)))
    depth = deepest = 0
    for char in answer:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return (
        bool(re.fullmatch(r"[0-9A-Za-z+\-*/^_=<>()\[\]{}.,|&\\' ]+", answer))  # no "!", nothing outside ASCII
        and all(PLAIN_COMMANDS.fullmatch(name) or functions and FUNCTIONS.fullmatch(name) for name in commands(answer))
        and deepest <= MAX_NESTING // 2
        and not re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", answer)
        and not re.search(r"\^[({]*-?[0-9]{5}|\^[-0-9{}()]*\^", answer)  # 2^{10000}, 9^{9^9} and (9^9)^9
        and not re.search("[0-9]_", answer + " " + gold)  # 12_3, which the library would take for 12
    )


def commands(text: str) -> set[str]:
    r"""The names of the LaTeX commands in `text`, and "|"; the row break `\\` before a letter is none."""
    return set(re.findall(r"(?<=\\)[A-Za-z]+|\|", text.replace(r"\\", " ")))


def parts(text: str) -> tuple[str, list[str]]:
    r"""The kind of a collection and its members: `[0,1)` is ("[)", ["0", "1"]); a single value is ("", [text]).

    A set and a list of solutions are of one kind, "". A matrix is of the kind "1&2\\3&4" without its entries.
    """
    if found := re.fullmatch(r"\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}", text):
        rows = [row.split("&") for row in found[2].removesuffix(r"\\").split(r"\\")]
        return "\\".join("&" * len(row) for row in rows), [entry for row in rows for entry in row]
    kind = ""
    inner = split_at_commas(text[1:-1])
    if re.fullmatch(r"\\\{.*\\\}", text):
        text = text[2:-2]
    elif re.fullmatch(r"[(\[].*[)\]]", text) and len(inner) > 1:
        return text[0] + text[-1], inner
    members = []
    for member in split_at_commas(text):
        both = [member.replace(r"\pm", sign).replace(r"\mp", other) for sign, other in ("+-", "-+")]
        members += both if both[0] != both[1] else [member]
    return kind, members


def split_at_commas(text: str) -> list[str]:
    """The pieces between the commas outside all brackets; [text] if the brackets do not match."""
    pieces, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return [text]
        if char == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return pieces


def equal_by_library(answer: str, gold: str) -> bool:
    """Whether two tidied texts are the same value, by Math-Verify. Takes its time: the worker holds the limit."""
    equal = equal_at_sight(answer, gold)
    if equal is not None:
        return equal
    (answer_name, answer), (gold_name, gold) = strip_name(answer), strip_name(gold)
    if answer_name and gold_name and answer_name != gold_name:
        return False
    (answer_kind, answers), (gold_kind, golds) = parts(answer), parts(gold)
    if len(answers) == len(golds) == 1 and answer_kind == gold_kind:
        return equal_expressions(answers[0], golds[0])
    if answer_kind != gold_kind or len(answers) != len(golds):
        # x<2 is (-\infty,2): a relation and an interval are for the library to compare.
        return any(re.search("[<>]|\\\\[lg]e", text) for text in (answer, gold)) and equal_expressions(answer, gold)
    if gold_kind:
        return all(map(equal_by_library, answers, golds))
    for member in golds:
        match = next((other for other in answers if equal_by_library(other, member)), None)
        if match is None:
            return False
        answers.remove(match)
    return True


def equal_expressions(answer: str, gold: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig
    from sympy import I, Symbol

    # Its own removal of units would make 3t of 3 hours, and of the letter t.
    reading = LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="none"),
    )

    def read(text: str) -> list:
        # A decimal would become a float, and floats are compared with rounding.
        text = re.sub(DIGITS, lambda found: exact(found[0]) if "." in found[0] else found[0], text)
        found = parse(f"${text}$", [reading], "no_fallback", "first_match", parsing_timeout=None)
        # Whether it takes symbols for real depends on the text around them; then x is not x, and i is not i.
        return [
            value.xreplace({s: I if s.name == "i" else Symbol(s.name, real=True) for s in value.free_symbols})
            for value in found
        ]

    def exact(decimal: str) -> str:
        value = Fraction(decimal)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    if ("=" in answer) != ("=" in gold):
        return False  # the library would take the right side of any equation for the answer
    # Two expressions count as equal if their difference vanishes to this many digits: so many that no number of
    # MAX_DIGITS digits comes as near to another value.
    digits = 6 * MAX_DIGITS
    return verify(
        read(gold), read(answer), numeric_precision=digits, timeout_seconds=None, allow_set_relation_comp=True
    )


# sympy can take for ever, and Math-Verify's own limit, signal.alarm, works in a main thread only. So comparisons are
# made in a process of their own. It imports the library once, then forks for each comparison a child that the system
# kills when its time is up: whatever happens to the child, the next one starts from a fresh copy.

_worker: tuple[subprocess.Popen, socket.socket] | None = None
_worker_starts = threading.Lock()


def equal_by_worker(answer: str, gold: str) -> bool:
    """`equal_by_library` within MATH_SECONDS, False if it takes longer. May be called from any thread."""
    ours, theirs = socket.socketpair()
    with ours:
        try:
            with theirs:
                socket.send_fds(worker(), [b"."], [theirs.fileno()])
            ours.sendall(json.dumps([answer, gold]).encode())
            ours.shutdown(socket.SHUT_WR)
            return ours.recv(1) == b"1"  # nothing at all from a child that was killed
        except ConnectionError:  # killed before it had read all
            return False


def worker() -> socket.socket:
    """The socket on which the worker takes requests: a byte, and the socket that the comparison is sent over."""
    global _worker
    with _worker_starts:
        if _worker is None or _worker[0].poll() is not None:
            ours, theirs = socket.socketpair()
            with theirs:
                # This file is its program, so the caller's script is not run again. Its input ends with this process,
                # however that ends. In a session of its own, Ctrl-C in the terminal does not reach it.
                process = subprocess.Popen(
                    [sys.executable, __file__], stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True
                )
            if ours.recv(1) != b"!":  # comes when the library has been imported, which takes seconds
                raise RuntimeError("the process that compares answers by math-verify did not start")
            _worker = process, ours
    return _worker[1]


def serve(requests: socket.socket) -> None:
    """The worker's loop. Ends when its parent has."""
    logging.disable(logging.WARNING)  # each reading without a timeout would say so
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    # Parser and sympy are slow at what they meet for the first time; what they learn from it, the children inherit.
    equal_expressions(r"-\frac{1}{2}\sqrt{3}+2x^{2}\pi", r"(x+1)^2-\sqrt[3]{2}\cdot 5")
    equal_expressions(r"(-\infty,2)\cup[3,4)", r"x_{1}<3")
    equal_expressions("x^2+y=1", "x+y=2")
    requests.sendall(b"!")
    while True:
        byte, sockets, _, _ = socket.recv_fds(requests, 1, 1)
        if not byte:
            return
        if os.fork() == 0:
            try:
                signal.setitimer(signal.ITIMER_PROF, MATH_SECONDS)  # then the system kills it, whatever it is doing
                caller = socket.socket(fileno=sockets[0])
                answer, gold = json.load(caller.makefile())
                caller.sendall(b"1" if equal_by_library(answer, gold) else b"0")
            finally:
                os._exit(0)  # also from an exception, of sympy's many kinds: no reply then, which means not equal
        os.close(sockets[0])


# ---------------------------------------------------------------------------------------------------------------------
# Statistics over several completions and questions


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that of k completions, drawn without replacement from n with `correct` right ones, one is right.

    The unbiased estimate 1 - C(n-correct, k) / C(n, k) of equation 1 in Chen et al. 2021 (arXiv 2107.03374). Raises
    ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {n} completions, {correct} correct: k must be 1 to {n}, correct 0 to {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def normalized_answer(completion: str) -> str | None:
    """The key under which an answer's votes are counted, the same for `1,234`, `$1234.0$` and `\\boxed{1234}`.

    It knows no task, and only what can be seen: 1/2 and 0.5 are one key, x+1 and 1+x are two. None, no vote, where
    there is no answer or one too long to be graded.
    """
    answer = extract_answer(completion)
    answer = last_box(answer) if answer else ""
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return None
    key = tidy(answer)
    number = rational(key)
    return (str(number) if number is not None else key) or None


def majority(answers: list[str | None], correct: list[float]) -> float:
    """maj@K, also called cons@K: whether the most frequent of K answers is correct; of equals, the first seen.

    `answers` are keys from `normalized_answer`, `correct` their rewards. None has no vote; 0.0 if all are None.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    winner, _ = votes.most_common(1)[0]  # which keeps the order of first appearance among equals
    return correct[answers.index(winner)]


def step_means(samples: list[dict], group_size: int) -> dict[str, float]:
    """What is reported of a step's samples, those of a question side by side: means, and the share of equal groups."""
    names = ("reward", "accuracy", "format", "length", "truncated")
    means = {name: fmean(sample[name] for sample in samples) for name in names}
    groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
    return means | {"equal_groups": fmean(len({sample["reward"] for sample in group}) == 1 for group in groups)}


def evaluation(questions: list[list[dict]]) -> dict[str, float | tuple[float, float]]:
    """What is reported of an evaluation: means over questions, each with its 95% interval as `<name>_interval`.

    `questions` has K samples for each question, each with its `text`, `accuracy`, `format`, `length` and `truncated`.
    `pass@1` is the share of right samples, `pass@k` for k = 2, 4, 8 … K is unbiased, `maj@K` goes by majority.
    """
    k = len(questions[0])
    names, sizes = ("format", "length", "truncated"), sorted({*(2**i for i in range(k.bit_length())), k})
    values: dict[str, list[float]] = {f"pass@{size}": [] for size in sizes}
    values |= {f"maj@{k}": []} if k > 1 else {}
    values |= {name: [] for name in names}
    for samples in questions:
        correct = [sample["accuracy"] for sample in samples]
        for size in sizes:
            values[f"pass@{size}"].append(pass_at_k(k, round(sum(correct)), size))
        if k > 1:
            values[f"maj@{k}"].append(majority([normalized_answer(sample["text"]) for sample in samples], correct))
        for name in names:
            values[name].append(sum(sample[name] for sample in samples) / k)
    metrics: dict[str, float | tuple[float, float]] = {}
    for name, of_questions in values.items():
        metrics[name] = sum(of_questions) / len(of_questions)
        metrics[f"{name}_interval"] = bootstrap_interval(of_questions)
    return metrics


def bootstrap_interval(values: list[float], resamples: int = 1000) -> tuple[float, float]:
    """The 95% percentile interval of the mean of `values`, one value for each question.

    Questions are resampled, with replacement; the samples within a question are not, so the interval says how the mean
    would vary over other questions of the kind, which is more than it varies over seeds. Always the same for the same
    values. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("an interval of no values: give one value or more")
    if min(values) == max(values):
        return values[0], values[0]  # without the rounding of a mean
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    outside = round(0.025 * resamples)  # on either side
    return means[outside], means[-1 - outside]


# ---------------------------------------------------------------------------------------------------------------------
# The record of a run: what it logs, and what is shown of that


class UsageError(ValueError):
    """An option whose value cannot work. The message is one line: the option, its value, and a value that works."""


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Writes a file beside `path` and swaps it in: at every instant the old one or the new one is there as a whole.

    `{sha256}` in the file's name becomes the digest of what is in it. Raises OSError, or what `write` raises.
    """
    new = path.with_name("new")
    try:
        with new.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the name without what it stands for
        with new.open("rb") as file:
            path = path.with_name(path.name.format(sha256=hashlib.file_digest(file, "sha256").hexdigest()))
        new.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, has to reach the disk before the old file goes
        os.fsync(folder)
        os.close(folder)
    finally:
        new.unlink(missing_ok=True)
    return path


def open_run_dir(cfg: object) -> Path:
    """Makes the run's directory. Raises UsageError if it can't be written to, or holds what is not to be resumed."""
    run_dir = Path(cfg.run_dir or f"runs/{cfg.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        if (run_dir / "config.json").exists() and (cfg.eval_only or not cfg.resume):  # of a run, or of a model
            raise UsageError(f"--run_dir {run_dir}: is taken already; try another one, or --resume {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "config.json", lambda file: file.write(json.dumps(vars(cfg), indent=1).encode()))
    except OSError as error:
        raise UsageError(f"--run_dir {run_dir}: cannot be written ({error.strerror}); try runs/mine") from error
    return run_dir


def newest_whole(folder: Path) -> Path | None:
    """The last of the files named <step>-<sha256>.pt that holds what its name says; None if there are none.

    Raises UsageError if there are some, and all are damaged.
    """
    files = sorted(folder.glob("*-*.pt"), reverse=True)
    for path in files:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == path.stem.partition("-")[2]:
                return path
        print(f"{path} is damaged, and not used", file=sys.stderr)
    if files:
        raise UsageError(f"--resume {folder.parent}: {files[0]} is damaged, and there is no older one; try another run")
    return None


def save_model(folder: Path, model, tokenizer, needed: bool = False, score: float | None = None) -> None:
    """A plain save_pretrained folder, put in the place of an older one when it is whole; with its score, if it has one.

    A full disk costs a warning; UsageError if it is `needed`.
    """
    from safetensors import SafetensorError

    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    model.generation_config.do_sample = True  # as it was trained; else transformers refuses to save a temperature
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if score is not None:
            (new / "pass@1").write_text(f"{score}\n")
    except (OSError, ValueError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        message = f"{folder} cannot be written ({error})"
        if needed:
            raise UsageError(f"{message}; free some space, then try --resume {folder.parent}") from error
        return print(f"\n{message}; the run goes on", file=sys.stderr)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(run_dir: Path, step: int, size: int, write: Callable[[BinaryIO], None]) -> None:
    """checkpoint/<step>-<sha256>.pt of about `size` bytes; then, not before, the last one goes, so there always is one.

    A full disk costs a warning and the new one.
    """
    try:
        (run_dir / "checkpoint").mkdir(exist_ok=True)
        if size > (free := shutil.disk_usage(run_dir).free):
            raise OSError(f"it takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")
        kept = write_whole(run_dir / f"checkpoint/{step:08}-{{sha256}}.pt", write)
        for old in set(kept.parent.glob("*.pt")) - {kept}:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save raises the second on a full disk
        print(f"\nno checkpoint of step {step} ({error}); the run goes on", file=sys.stderr)


class Log:
    """A file with a JSON object a line. None is lost: what a full disk refuses waits for the next append."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, []

    def append(self, lines: list[dict]) -> None:
        self.waiting += [json.dumps(line) + "\n" for line in lines]
        content, size = "".join(self.waiting).encode(), self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(content) < len(content):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            self.waiting = []
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # the last line may be half written
            print(f"\n{self.path}: cannot be written ({error}); its lines wait in memory", file=sys.stderr)

    def close(self) -> None:
        """Writes what has been waiting. Raises UsageError if that is still impossible."""
        self.append([])
        if self.waiting:
            raise UsageError(f"{self.path} cannot be written; free some space, then try --resume {self.path.parent}")


def read(path: Path) -> list[dict]:
    """The lines of a log; of a run that was killed the last may be half written, and is left out."""
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is damaged ({error}); try a copy of it") from error


def cut_log(path: Path, step: int) -> None:
    """Leaves only what came before `step` in a log, so that a resumed run writes each step once."""
    kept = [json.dumps(line) + "\n" for line in read(path) if line["step"] < step]
    try:
        write_whole(path, lambda file: file.write("".join(kept).encode()))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error}); free some space, then try again") from error


def progress_bar(steps: int, start: int, visible: bool) -> tuple:
    """(tqdm's bar, show(phase, ids) which names on it what is going on)."""
    from tqdm import tqdm

    style = "{desc}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits 80 columns
    options = {"bar_format": style, "dynamic_ncols": True, "miniters": 0, "mininterval": 0.5, "smoothing": 0}
    bar = tqdm(total=steps, initial=start, disable=not visible, **options)

    def show(phase: str, ids: object = None) -> None:
        bar.set_description(phase, refresh=False)
        bar.update(0)  # redraws it, at most twice a second

    return bar, show


def table(columns: dict[str, dict]) -> str:
    """The eval_* metrics of each column's evaluation side by side, with their 95% intervals."""
    rows = [f"{'held-out questions':<20}" + "".join(f"{name:>28}" for name in columns)]
    shared = [name for name in list(columns.values())[-1] if all(f"{name}_interval" in c for c in columns.values())]
    for name in shared:
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(c[name], *c[f"{name}_interval"]) for c in columns.values()]
        rows.append(f"{name.removeprefix('eval_'):<20}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(rows)


def sparkline(values: list[float], width: int = 60) -> str:
    """Bars from the smallest value to the largest; of more than `width` values, every second, third or further one."""
    values = values[:: math.ceil(len(values) / width)]
    low, span = min(values), (max(values) - min(values)) or 1
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * (value - low) / span)] for value in values)


def printable(text: str) -> str:
    """What a model wrote, control characters escaped: a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def best_so_far(run_dir: Path) -> float:
    """The held-out pass@1 of the policy in best/; -1 where there is none."""
    path = run_dir / "best/pass@1"
    return float(path.read_text()) if path.exists() else -1.0


def trouble(lines: list[dict], run_dir: Path, lr: float, updates: int) -> str:
    """What should be said after the last of these lines of metrics.jsonl: mostly nothing.

    Raises UsageError where all `updates` of each of the last 5 steps were skipped: a run that no longer learns should
    not go on.
    """
    if len(lines) >= 5 and all(line["skipped_updates"] == updates for line in lines[-5:]):
        raise UsageError(
            f"--lr {lr}: in the last 5 steps every update had a gradient that is not finite, and was skipped: it may "
            f"be too high, or --dtype too coarse; try --resume {run_dir} --lr {lr / 10:g} or --dtype float32"
        )
    equal = [line["equal_groups"] == 1 for line in lines]
    if len(equal) < 20 or not all(equal[-20:]) or equal[-21:-20] == [True]:  # said once
        return ""
    accuracy = sum(line["accuracy"] for line in lines[-20:]) / 20
    advice = "easier questions, a larger --group_size, or a model that is sometimes right"
    return (
        f"for 20 steps all completions of each question were rewarded alike (accuracy {accuracy:.2f}), and where none "
        f"is better than another there is nothing to learn; try {'harder questions' if accuracy > 0.5 else advice}"
    )


def summary(run_dir: Path, task: str, steps: int) -> str:
    """What a run has achieved: before and after, the way there, a completion of each, and what can be done next."""
    lines = read(run_dir / "metrics.jsonl")
    text = table({"before": lines[0], "after": lines[-1]})
    for name in ("accuracy", "length"):
        values = [line[name] for line in lines]
        text += f"\n\n{name} in training, from {values[0]:.2f} to {values[-1]:.2f}\n{sparkline(values)}"
    held_out = [sample for sample in read(run_dir / "completions.jsonl") if "advantage" not in sample]
    before, after = ([s for s in held_out if s["step"] == lines[i]["step"]] for i in (0, -1))
    pair = max(zip(before, after, strict=False), key=lambda pair: pair[1]["accuracy"] - pair[0]["accuracy"])
    for when, sample in zip(("before", "after"), pair, strict=True):
        turn = sample["prompt"].rpartition("<think>")[0] + sample["text"]  # which begins with <think>
        text += f"\n\n{when} training, {'right' if sample['accuracy'] else 'wrong'}:\n{turn}"
    example = "8 7 4 = 36" if task == "countdown" else "your question"
    text += f"\n\nTo ask it: uv run R1ZeroTrain.py --resume {run_dir} --ask '{example}'"
    return printable(f"{text}\nTo go on: uv run R1ZeroTrain.py --resume {run_dir} --steps {2 * steps or 1}")


def write_card(command: str, run_dir: Path, model: str, task: str, dataset: str, steps: int, **_: object) -> None:
    """model/README.md: what the model was made of, by which command, and the evaluation before and after."""
    lines = read(run_dir / "metrics.jsonl")
    card = f"---\nbase_model: {model}\n---\n\n`{model}` after {steps} steps of GRPO on {task}, "
    card += f"{dataset or 'default data'}:\n\n    {command}\n\n```\n"
    card += table({"before": lines[0], "after": lines[-1]}) + "\n```\n"
    try:
        (run_dir / "model/README.md").write_text(card)
    except OSError as error:
        raise UsageError(f"{run_dir}/model/README.md: {error}; free some space, then try --resume {run_dir}") from error


if __name__ == "__main__":  # as worker() starts it
    serve(socket.socket(fileno=0))
