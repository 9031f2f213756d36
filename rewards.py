"""Rule-based rewards (DeepSeek-R1, arXiv 2501.12948, section 2.2) and evaluation statistics.

A reward takes a completion and returns 0.0 or 1.0. `completion` is the whole assistant turn and
begins with the `<think>` that the prompt prefilled. Reinforcement learning exploits every grading
error. A reward therefore never executes what the model wrote and compares exact values only. For
any text, it returns within one second and raises no exception.
"""

import ast
import json
import operator
import os
import random
import re
import signal
import sys
from collections import defaultdict
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from math import comb
from statistics import fmean
from subprocess import PIPE, Popen
from threading import Lock

MAX_ANSWER_CHARS = 1000  # a longer answer earns 0.0

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


# --------------------------------------------------------------------------------------------------
# Format


def format_reward(completion: str) -> float:
    """Returns 1.0 if the completion is `<think>…</think> <answer>…</answer>` and nothing else.

    Each of the four tags must appear exactly once. White space around the two blocks is allowed.
    The thinking may be empty, the answer may not. Source: DeepSeek-R1, section 2.2.
    """
    if re.findall("</?think>|</?answer>", completion) != TAGS:
        return 0.0
    return float(
        re.fullmatch(r"(?s)\s*<think>.*</think>\s*<answer>\s*\S.*</answer>\s*", completion)
        is not None
    )


def extract_answer(completion: str) -> str | None:
    """Returns the text of the last complete `<answer>…</answer>` outside the thinking, or None.

    A `<think>` opens the thinking and the next `</think>` closes it. Tags inside the thinking do
    not count. An unclosed `<think>` hides everything after it.
    """
    # Linear even in a megabyte of "<answer>", where "<answer>.*?</answer>" would be quadratic.
    outside = [part.partition("</think>")[2] for part in completion.split("<think>")]
    ended = [block for part in outside for block in part.split("</answer>")[:-1]]
    answers = [block.rpartition("<answer>")[2] for block in ended if "<answer>" in block]
    return answers[-1].strip() if answers else None


# --------------------------------------------------------------------------------------------------
# Countdown

# Numbers without leading zeros, + - * /, parentheses and spaces. This excludes other Python syntax
# of the same characters: the operations ** and //, the call 3(4) and the tuple ().
EXPRESSION = r"(?!.*(?:\*\*|//|[0-9)] ?\(|\( ?\)))(?:[-+*/() ]|(?:0|[1-9][0-9]*)(?![0-9]))+"
# The functions of `operator` that compute the node types of `ast`.
OPERATIONS = {
    "Add": "add",
    "Sub": "sub",
    "Mult": "mul",
    "Div": "truediv",
    "UAdd": "pos",
    "USub": "neg",
}


def countdown_reward(completion: str, numbers: list[int], target: int) -> float:
    """Returns 1.0 if the answer uses each of `numbers` once and its value is exactly `target`.

    The answer is an expression of these numbers, `+ - * /`, parentheses and white space. A sign is
    an operator: `-3 + 5` uses 3 and 5. Task: github.com/Jiayi-Pan/TinyZero.
    """
    text = " ".join((extract_answer(completion) or "").split())
    if (
        len(text) > MAX_ANSWER_CHARS
        or not re.fullmatch(EXPRESSION, text)
        or sorted(map(int, re.findall("[0-9]+", text))) != sorted(numbers)
    ):
        return 0.0
    try:
        # ast.parse builds a tree. It executes nothing.
        return float(arithmetic_value(ast.parse(text, mode="eval").body) == target)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0


def arithmetic_value(node: ast.expr) -> Fraction:
    """Returns the exact value of a syntax tree of integers and OPERATIONS."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return getattr(operator, OPERATIONS[type(node.op).__name__])(*map(arithmetic_value, operands))


# --------------------------------------------------------------------------------------------------
# GSM8K: one number

UNITS = (
    "units?|points?|degrees?|radians?|dollars?|cents?|percent|[cdkm]m|in|inch(?:es)?|ft|feet|foot"
    "|yd|yards?|mi|miles?|(?:centi|milli|kilo)?(?:met(?:er|re)|gram|lit(?:er|re))s?|[km]g|oz|ounces?"
    "|lbs?|pounds?|tons?|acres?|gallons?|quarts?|cups?|mph|kph|sec(?:ond)?s?|min(?:ute)?s?|hrs?"
    "|hours?|days?|weeks?|months?|years?|people|students?|ways?"
)
POWER = r"(?: ?(?:\^ ?\{?[23]\}?|[²³]))"
# cm^2, m³ and \text{ cm}^{2}. The exponent is not a second number.
UNIT_POWER = rf"(?:(?<![A-Za-z])(?:{UNITS}|m)|\\text *\{{[^{{}}0-9]*\}}){POWER}"
NUMBER = (
    r"(?:(?<![A-Za-z0-9.])-\\?\$?)?"  # the sign of -5 or -$5, not the hyphen of covid-19
    r"(?:(?:[0-9]{1,3}(?:(?:,|\{,\}|,\\!)[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
NOT_A_NUMBER = (
    r"[0-9]\.?(?:[eE][-+]?|\s*[-+*/^:x×÷][-+*/^:x×÷\s($\\]*)\.?[0-9]"  # 5-3, 2/2, 3 x 3, 1e3
    r"|\^\{?[0-9]|(?![0-9])\d|[²³¹⁰-₉¼-¾⅐-↉①-⓿]"  # x^2, 5², 3½, digits of other scripts
    # 5k, 5 million, minus 5
    r"|[0-9][kK]\b|(?i:illion|thousand|hundred|dozen|\band a half|minus|negative)"
)


def gsm8k_reward(completion: str, gold: str) -> float:
    """Returns 1.0 if the one number in the answer equals `gold`.

    `gold` is a number or GSM8K's answer text, which ends in `#### 1,234`. Dollar and percent signs,
    thousands separators, units, Markdown and trailing zeros do not matter. See `read_number` for
    what does not count as an answer. Data: huggingface.co/datasets/openai/gsm8k.
    """
    answer = read_number(extract_answer(completion) or "")
    return float(answer is not None and answer == read_number(gold.rpartition("####")[2]))


def read_number(text: str) -> Fraction | None:
    """Returns the exact value of the only number in `text`, or None if it has none or several.

    A number that appears twice counts once. Two different numbers are two guesses. An expression is
    not a number, because computing its value is the model's task. `5 million` is not the number 5.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    text = re.sub(UNIT_POWER, " ", text.replace("−", "-"))
    if re.search(NOT_A_NUMBER, text):
        return None
    values = {Fraction(re.sub("[^-0-9.]", "", number)) for number in re.findall(NUMBER, text)}
    return values.pop() if len(values) == 1 else None


# --------------------------------------------------------------------------------------------------
# MATH: one exact value or expression

# A relation is rewritten within one member of a list, from START to END. BOUND has no variable.
START, END = "(?<![^;,∪«])", "(?![^;,∪»])"
SIDE = "([^<>≠=;,∪«»]+)"
BOUND = r"((?:[^A-Za-z\\<>≠=;,∪«»]|\\[A-Za-z]+)+)"
NAME = r"(\\?[A-Za-z]+)"
# The text of 5\text{ million}, 5\text{ p.m.} and 5\text{x} changes the value.
NOT_A_UNIT = (
    r"(?! ?(?:[a-fi-kn-rt-z]|squared|cubed) ?\}|(?i:[^{}]*(?:illion|thousand|hundred|dozen|hal[fv]"
    r"|third|(?:four|fif|six|seven|eigh|nin|ten|twelf)th|factorial|\b(?:base|plus|minus|times \w+"
    r"|over|divided|root|pi|than|not|to|[ap]\.? ?m)\b)))"
)

# `canonical` makes these replacements in this order. None of them makes different values equal. In
# the result, « » enclose a set, ⟦⟦ ⟧⟧ a matrix, and ; separates members, entries and rows.
CANONICAL = {
    # Spaces, delimiters and signs.
    r"\s+": " ",
    r"(?<=[0-9])(?:,\\!|\{,\}|\\[,!]) ?(?=[0-9]{3}(?![0-9]))": "",  # 10,\!000
    r"\\begin ?\{[pb]?matrix\}": "⟦⟦",
    r"(?:\\\\)? ?\\end ?\{[pb]?matrix\}": "⟧⟧",
    r"\\\\": "⟧;⟦",
    "&": ";",
    r"\\\{": "«",
    r"\\\}": "»",
    r"(?: |\\(?:[bB]igg?[lrm]?|left|right|displaystyle|textstyle|q?quad|degree)(?![A-Za-z])"
    r"|\\[!,;: ]|~|\\[()\[\]]|\\?[$%]|\^ ?(?:\\circ|\{ ?\\circ ?\})|°|^\*\*|\*\*\.?$)+": " ",
    "[−–]": "-",
    r"\\[lr]?vert(?![A-Za-z])": "|",
    r"(?<![\\A-Za-z])(?=(?:sin|cos|tan|ln|log|pi|sqrt)(?![A-Za-z]))": r"\\",  # sqrt(3)
    # \mathbf{5} is 5, 3+4\mathrm{i} is 3+4i, \mathrm{cm} is \text{cm}.
    r"\\(?:math(?:bf|it|sf)|boldsymbol|bm|text(?:bf|it)) ?\{([^{}]*)\}"
    r"|\\(?:mathrm|text) ?\{ ?([eij]|[0-9.]+) ?\}": r"\1\2",
    r"\\(?:mathrm|textrm|mbox|operatorname) ?(?=\{)": r"\\text",
    # 3, 5, and 7
    r",? ?(?:\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)|[,;] ": ";",
    # Units at the end: 5\text{ cm}^2, 5\mathrm{m^2} and 5 cm^2.
    rf"(?<=\S) ?\\text ?\{{{NOT_A_UNIT}[^{{}}0-9,;]*{POWER}? ?\}}{POWER}?[ .]*$"
    rf"|(?:(?<=[0-9}}π])|(?<=\\pi)|(?<=\\pi )) ?(?:(?:square|cubic|sq|cu)\.? )?(?:{UNITS})"
    rf"(?:(?:/| per )(?:{UNITS}|h|s))?{POWER}?[ .]*$": "",
    r"^ *\\text ?\{([^{}]*)\}[ .]*$": r"\1",
    # One name for each symbol.
    r"\\infty|\binfinity\b": "∞",
    r"\\in(?![a-z])|∈": "=",
    r"\\cup|(?<=[)\]]) ?U ?(?=[(\[])": "∪",
    r"\\leq?(?:slant)?|≤": "<=",
    r"\\geq?(?:slant)?|≥": ">=",
    r"\\neq?|!=": "≠",
    r"\\(?:times|cdot)(?![a-z])|[×·⋅]": "*",
    r"\\emptyset|\\varnothing": "∅",
    r"\\mathbb ?\{? ?R ?\}?|ℝ": "(-∞,∞)",
    # Braces around every argument: \frac12, \sqrt3, sqrt(3), x^10, x_1.
    r"\\(sin|cos|tan) ?\^ ?\{ ?-1 ?\}": r"\\arc\1 ",
    r"\\[dtc]frac": r"\\frac",
    r"(\\sqrt|\^) ?\(([^()]*)\)": r"\1{\2}",
    r"(\\frac|\\sqrt(?:\[[0-9]\])?) ?([0-9A-Za-zπ]|\\pi)": r"\1{\2}",
    r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-zπ]|\\pi)": r"\1{\2}",
    r"_ ?([0-9A-Za-z])": r"_{\1}",
    r"\^ ?(-?[0-9]+)": r"^{\1}",
    # The space in 3 1/2 and x y stays.
    "(?<![0-9A-Za-z]) | (?![0-9A-Za-z])": "",
    r"([^;,∪«»]*?)(?:±|\\pm(?![a-z]) ?)([^;,∪«»]*)": r"\1+\2;\1-\2",
    r"^=|\.$|(?<![^=(\[;,«])\+": "",
    # Parentheses around one number, as in (1)/(8); (C) of several choices; a set of one member.
    r"(?<![^-=(\[{;/])\(([0-9.]+|\\frac\{[0-9]+\}\{[0-9]+\})\)(?![^)\]};/=])"
    r"|(?<![^=(\[{;])\((-?[0-9.]+(?:/[0-9.]+)?)\)(?![^)\]};/=])"
    r"|^\(([A-Z])\)$|^«([^;,«»]*)»$": r"\1\2\3\4",
    # 2>x is x<2, which is x=(-∞;2). 1<x<=2 is x=(1;2].
    f"{START}{SIDE}>(=?){SIDE}{END}": r"\3<\2\1",
    f"{START}{SIDE}>(=?){SIDE}>(=?){SIDE}{END}": r"\5<\4\3<\2\1",
    f"{START}{NAME}(<=?)(?={BOUND}{END})": r"-∞<\1\2",
    f"{START}{BOUND}(<=?){NAME}{END}": r"\1\2\3<∞",
    f"{START}{BOUND}<(=?){NAME}<(=?){BOUND}{END}": r"\3=(\2\1;\5\4)",
    r"\(=": "[",
    r"=\)": "]",
    r"((\\?[A-Za-z]+)=[(\[][^()\[\]]*[)\]]);(?=\2=[(\[])": r"\1∪",  # x<1 or x>2
}
THOUSANDS = r"(?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])(?!.*[)\]»])"

WORDS = "(?:[A-Za-z]{3,}|[Nn]o)(?: [A-Za-z]+)*"
DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
# -5, 1/2 or 3 1/2, where \frac{1}{2} has become " 1/2"
RATIONAL = (
    rf"(?!--)(-?) ?(?:([0-9]+) (?={DIGITS}/{DIGITS}$))?(-?{DIGITS})(?:/(-?(?=[0.]*[1-9]){DIGITS}))?"
)
RELATION = "(<=|[=<≠])"
# With these, an answer could leave the computation to the grader: \sin 60 for \frac{\sqrt3}{2}.
FUNCTION = (
    r"\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|binom|[lr]floor|[lr]ceil)(?![A-Za-z])"
    "|[|!]"
)
# x=5, f(x)=5, x_{1}=5 or (x,y)=(1,2). Not (y,x)=(2,1), whose values are in another order.
NAMED = (
    rf"^(?!{FUNCTION})"
    r"(?:\\?[A-Za-z]+(?:_\{\w+\})?(?:\([a-z]\))?|\\text\{[A-Za-z ]+\}"
    r"|\((?:x;y(?:;z)?|a;b(?:;c(?:;d)?)?|m;n|p;q|r;s|u;v|r;\\theta)\))=([^=]+)$"
)
# What the parser reads correctly. It misreads x^T as x, \frac{d}{dx} as a derivative, and the mixed
# number in 2\frac{1}{2}x as a product.
READABLE = (
    r"(?!.*(?:\^\{?T|\\frac\{d|!!|[0-9] [0-9]|[0-9]\\frac\{[0-9.]+\}\{[0-9.]+\}))"
    rf"(?:[0-9A-Za-zα-ω+\-*/^_(){{}}.\[\] ]|{FUNCTION}|\\(?:frac|sqrt|pi|alpha|beta|gamma|delta"
    r"|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|psi|omega)(?![A-Za-z]))*"
)


def math_reward(completion: str, gold: str) -> float:
    r"""Returns 1.0 if the answer has exactly the value of `gold`.

    The last `\boxed{}` of the answer counts, or the whole answer if it has none. `gold` is an
    answer in LaTeX or plain text, or a solution whose last box holds the answer.

    A value may be written in many ways, `0.5` for `\frac12` or `3+2x` for `2x+3`, but nothing is
    rounded: `0.333333` is not 1/3. If the gold answer is a number, the answer must be a number too:
    `2+3` is not 5, because the question may be "What is 2+3?". Tuples and intervals keep their
    order and brackets. Sets, unions and lists of solutions have no order. Units, percent and degree
    signs are ignored. Notation that the parser cannot read, such as number bases, ratios and
    `\sum`, is compared as text.

    A comma that is followed by a space or inside brackets separates two values: `81, 256` and
    `(1,234)` have two. Any other comma before three digits is part of a number: `1,234` is 1234.
    But if the gold answer is a list, the answer `81,256` is a list, too. Two texts that differ only
    in spaces are equal.

    The parser of Math-Verify reads expressions, and SymPy compares them. A comparison that needs
    more than 0.5 s of CPU time gives 0.0. The first one waits until the libraries have loaded; see
    `start_math_worker`. Raises ImportError if math-verify is not installed.

    Data: huggingface.co/datasets/HuggingFaceH4/MATH-500, AIME, DeepScaleR.
    Parser: github.com/huggingface/Math-Verify.
    """
    answer, answer_list = canonical(last_box(extract_answer(completion) or ""))
    gold, gold_list = canonical(last_box(gold))
    if answer_list == gold_list:
        return float(gold != "")
    if ";" in gold and ";" not in answer:
        answer = answer_list
    if literal(gold) is not None:
        return float(equal(answer, gold))
    if re.search(FUNCTION, answer) and not re.search(FUNCTION, gold):
        return 0.0
    return ask_worker(answer, gold)


def last_box(text: str) -> str:
    r"""Returns the content of the last `\boxed{…}` or `\fbox{…}`, or `text` if there is none."""
    text = re.sub(r"(\\(?:boxed|fbox)) *([^\s${}]+)", r"\1{\2}", text)  # \boxed 5
    *before, content = re.split(r"\\(?:boxed|fbox)\s*(?={)", text)
    depth = 0
    for end, char in enumerate(content):
        depth += (char == "{") - (char == "}")
        if before and depth == 0:
            return content[1:end].strip()
    return text.strip()


def canonical(text: str) -> tuple[str, str]:
    """Returns `text` in two canonical forms: with `1,234` as one number, and as a list of two.

    Both are "" if `text` is too long or has no content.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return "", ""
    for pattern, replacement in CANONICAL.items():
        text = re.sub(pattern, replacement, text)
    number = re.sub(THOUSANDS, lambda found: found[0].replace(",", ""), text)
    return number.replace(",", ";"), text.replace(",", ";")


def literal(text: str) -> Fraction | str | None:
    """Returns the value of a canonical number, a canonical word in lower case, or None."""
    if re.fullmatch(WORDS, text):
        return text.lower()
    plain = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}$", r" \1/\2", text)
    found = re.fullmatch(RATIONAL, plain)
    if not found:
        return None
    sign, whole, over, under = found.groups()
    value = Fraction(whole or 0) + Fraction(over) / Fraction(under or 1)
    return -value if sign else value


def equal(answer: str, gold: str) -> bool:
    """Returns whether two canonical texts have the same value.

    Loads SymPy unless `gold` is a literal. Raises whatever the parser raises.
    """
    if answer == gold:
        return True
    if "=" not in answer or "=" not in gold:
        answer, gold = re.sub(NAMED, r"\1", answer), re.sub(NAMED, r"\1", gold)
    if literal(gold) is not None:
        return literal(answer) == literal(gold)
    (kind, golds), (answer_kind, answers) = parts(gold), parts(answer)
    if answer_kind != kind or len(answers) != len(golds):
        return False
    if kind not in ("", "∪"):  # the order of the members matters
        return all(map(equal, answers, golds)) or proportional(kind, answers, golds)
    if len(golds) > 1:
        return equal_in_any_order(answers, golds)
    return (read(answer) - read(gold)).equals(0) is True


def parts(text: str) -> tuple[str, list[str]]:
    """Returns the kind of a collection or relation, and its members.

    The kind of `[0;1)` is `[)`, of a matrix `⟦⟧`, of a relation its sign, of a union `∪`. Sets,
    lists of solutions and single values have the kind "".
    """
    kind, pieces, depth = "", [""], 0
    for char in text:
        depth += (char in "([{«⟦") - (char in ")]}»⟧")
        if char in ";∪" and depth == 0:
            kind = char.strip(";")
            pieces.append("")
        else:
            pieces[-1] += char
    if len(pieces) > 1:
        return kind, pieces
    if re.fullmatch(r"«.*»|⟦.*⟧|[(\[][^=]*;[^=]*[)\]]", text):
        return (text[0] + text[-1]).replace("«»", ""), parts(text[1:-1])[1]
    sides = re.split(RELATION, text)
    return "".join(sides[1::2]), sides[::2]


def equal_in_any_order(answers: list[str], golds: list[str]) -> bool:
    """Returns whether each of `golds` equals a different one of `answers`."""
    for gold in golds:
        for answer in answers:
            if equal(answer, gold):
                answers.remove(answer)
                break
        else:
            return False
    return True


def proportional(relation: str, answers: list[str], golds: list[str]) -> bool:
    """Returns whether two relations differ by a constant factor, as 4x+6y=10 and 2x+3y=5 do.

    The factor is the ratio of the differences of their sides. For inequalities it must be positive.
    Relations without a variable do not count, because then all true equations would be equal.
    """
    if relation not in "<=≠" or (relation == "=" and golds[0].isalpha()):
        return False
    left, right = (read(one) - read(other) for one, other in (answers, golds))
    ratio = (left / right).simplify()
    if relation in "=≠":
        ratio = ratio**2
    return bool(right.free_symbols and ratio.is_number and ratio.is_positive)


@cache
def read(text: str) -> object:
    """Returns a canonical text as a SymPy expression, read by the parser of Math-Verify."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import I, Rational, Symbol

    if not re.fullmatch(READABLE, text):
        return Symbol(text)
    # The parser rounds decimals and reads 2(3) as 2 + 3, so a symbol replaces each number.
    text = re.sub(DIGITS, r"{\\xi_{\g<0>}}", text)
    tree = latex2sympy(
        f"0+({text})",
        is_real=True,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    values = {Symbol("i", real=True): I}
    for symbol in tree.free_symbols:
        if symbol.name.startswith("xi_"):
            values[symbol] = Rational(symbol.name.strip("xi_{}"))
    return tree.xreplace(values)


# SymPy can take hours for a short text, and a thread cannot be stopped. So expressions are compared
# in another process. It loads the libraries once and forks a child for every comparison. The system
# kills the child at its time limit.
_worker = None
_lock = Lock()


def start_math_worker() -> None:
    """Starts the process that compares expressions, if it is not running. Does not wait for it.

    The process needs a few seconds to load the libraries. Call this when a run starts, so that the
    first reward does not have to wait. The process ends when this one does. Raises ImportError if
    math-verify is not installed.
    """
    global _worker
    if _worker and _worker.poll() is None:
        return
    if find_spec("math_verify") is None:
        raise ImportError("math_reward needs the library math-verify; try uv run --extra math")
    _worker = Popen(
        [sys.executable, __file__],
        bufsize=1,  # send every line at once
        stdin=PIPE,
        stdout=PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C in the terminal does not reach it
    )


def ask_worker(answer: str, gold: str) -> float:
    """Returns 1.0 if the worker finds two canonical texts equal within its time limit."""
    with _lock:
        start_math_worker()
        try:
            print(json.dumps([answer, gold]), file=_worker.stdin)
            return float(_worker.stdout.readline() or 0)  # "": the worker was killed
        except BrokenPipeError:  # it was killed before it could read the line
            return 0.0
        except BaseException:  # after Ctrl-C, the next comparison must not read this reply
            _worker.kill()
            _worker.wait()
            raise


# The parser and SymPy are slow the first time that they process a construct. The children inherit
# what the worker has cached from these.
WARM_UP = (
    r"-\frac{1}{2}\sqrt{3}+2x^{2}\pi (x+1)^{2}-\sqrt[3]{2}*5 \frac{-3+i\sqrt{7}}{4} 2(x-1)(y+3)/4 "
    r"x^{2}+y^{2}-9 e^{2x} \sin^{2}x+\cos(2x) \log_{2}3-\ln2 a_{n}+2^{n-1} |x-2| 2\pi*r^{3}\theta "
    r"\frac{x^{2}}{4}+\frac{y^{2}}{9}-1"
)


def serve() -> None:
    """Runs the worker: reads an answer and a gold answer per line, and writes the reward.

    It ends when its input ends, that is, when the parent process does.
    """
    for text in WARM_UP.split():
        equal(text, "2x^{2}-3")
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                signal.setitimer(signal.ITIMER_PROF, 0.5)  # then SIGPROF kills this child
                os._exit(not equal(*json.loads(line)))
            finally:  # an exception counts as not equal
                os._exit(1)
        _, status = os.wait()
        print(float(status == 0), flush=True)


# --------------------------------------------------------------------------------------------------
# Statistics of an evaluation and of a step


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns the probability that k of n completions include a correct one.

    The k are drawn without replacement; `correct` of the n are correct. This is the unbiased
    estimator 1 - C(n-correct, k) / C(n, k) of equation 1 in Chen et al. 2021 (arXiv 2107.03374).
    """
    return 1 - comb(n - correct, k) / comb(n, k)


def majority(answers: list[str | None], correct: list[float]) -> float:
    """Returns maj@K, also called cons@K: the reward of the most frequent of K answers.

    `answers` are keys from `normalized_answer`, `correct` their rewards. If several answers are
    equally frequent, the first one counts. None does not vote. Without any vote, maj@K is 0.0.
    """
    winner = max(filter(None, answers), key=answers.count, default=None)
    return correct[answers.index(winner)] if winner else 0.0


def normalized_answer(completion: str) -> str | None:
    """Returns the key under which votes for this answer are counted, or None if there is no answer.

    `1,234`, `$1234.0$` and `\\boxed{1234}` have the same key, for every task. Expressions are
    compared as text: `x+1` and `1+x` have different keys.
    """
    key = canonical(last_box(extract_answer(completion) or ""))[0]
    value = literal(re.sub(NAMED, r"\1", key))
    return str(key if value is None else value) or None


def eval_metrics(samples: list[dict], k: int) -> dict:
    """Returns the metrics of an evaluation: means over questions, and `<name>_interval` for each.

    `samples` are dicts with `text`, `accuracy`, `format`, `length` and `truncated`. Every k
    consecutive ones answer the same question. The metrics are `eval_pass@1`, 2, 4, … and k,
    `eval_maj@k` if k > 1, `eval_format`, `eval_length` (in the samples' unit) and `eval_truncated`.
    """
    columns = defaultdict(list)
    for start in range(0, len(samples), k):
        group = samples[start : start + k]
        correct = [sample["accuracy"] for sample in group]
        for size in [2**i for i in range((k - 1).bit_length())] + [k]:
            columns[f"pass@{size}"].append(pass_at_k(k, round(sum(correct)), size))
        if k > 1:
            columns[f"maj@{k}"].append(
                majority([normalized_answer(sample["text"]) for sample in group], correct)
            )
        for name in ("format", "length", "truncated"):
            columns[name].append(fmean(sample[name] for sample in group))
    metrics = {}
    for name, values in columns.items():
        metrics[f"eval_{name}"] = fmean(values)
        metrics[f"eval_{name}_interval"] = bootstrap_interval(values)
    return metrics


def step_means(samples: list[dict]) -> dict[str, float]:
    """Returns the means over the samples of a training step.

    `equal_groups` is the share of samples with an advantage of 0, nearly always because all rewards
    of their group are equal. They contribute nothing to the policy gradient.
    """
    names = ("reward", "accuracy", "format", "length", "truncated")
    means = {name: fmean(sample[name] for sample in samples) for name in names}
    return means | {"equal_groups": fmean(sample["advantage"] == 0 for sample in samples)}


def bootstrap_interval(values: list[float], resamples: int = 1000) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of the mean of `values`, one for each question.

    Questions are resampled, not the samples of a question. The interval therefore shows how the
    mean would vary over other questions of this kind. Equal values always give equal intervals.
    """
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    outside = round(0.025 * resamples)  # resamples outside, on either side
    return means[outside], means[-1 - outside]


if __name__ == "__main__":
    serve()
