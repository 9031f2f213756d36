"""rewards.py: hand-checked answers with reasons, exploits that earn nothing, and any text graded within a second.

Each line of a table is a case: columns separated by " | ", then the reason after "  # ". A `⏎` is a line break.
"""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    MAX_ANSWER_CHARS,
    countdown_reward,
    extract_answer,
    format_reward,
    gsm8k_reward,
    math_reward,
    normalized_answer,
    start_math_worker,
)

thorough = settings(deadline=None, max_examples=300, derandomize="CI" in os.environ)


def turn(answer: str) -> str:
    return f"<think> 1 + 2 = 3 </think>\n<answer> {answer} </answer>"


def rows(table: str) -> list[list[str]]:
    """The columns of each line of a table."""
    lines = [line.partition("  # ")[0].replace("⏎", "\n") for line in table.split("\n") if line]
    return [line.strip(" ").split(" | ") for line in lines]


# --- format --------------------------------------------------------------------------------------

WELL_FORMED = r"""
<think>a</think><answer>b</answer>
⏎ <think>⏎a⏎⏎b < c </think>⏎⏎<answer>⏎1 + 2⏎</answer>⏎⏎
<think></think><answer>b</answer>
<think>a</b> <Answer> </think><answer> <b> </answer>  # other tags are text
"""
MALFORMED = r"""
<think>
<think>a</think>
<answer>b</answer>
<think>a</think><answer>b
<think>a</think><answer>b</answer
<think>a</think><answer> ⏎ </answer>  # nothing was answered
a</think><answer>b</answer>
<answer>b</answer><think>a</think>
<think>a<answer>b</answer></think>
<think>a</think>so<answer>b</answer>
so<think>a</think><answer>b</answer>
<think>a</think><answer>b</answer>done
<think>a</think><answer>b</answer><|im_end|>
<think><think>a</think><answer>b</answer>
<think>a</think></think><answer>b</answer>
<think>a</think><answer>b</answer></answer>
<think>a</think><answer>b</answer><answer>b</answer>
<think>in <answer> tags</think><answer>b</answer>
<think>a</think><think>a</think><answer>b</answer>
<THINK>a</THINK><ANSWER>b</ANSWER>
<think >a</think><answer>b</answer>
"""


def test_format() -> None:
    assert [row for row in rows(WELL_FORMED) if format_reward(*row) != 1.0] == []
    assert [row for row in rows(MALFORMED) + [[""]] if format_reward(*row) != 0.0] == []
    assert format_reward("<think>a</think><answer>b</answer>\0") == 0.0


# --- which answer is graded ----------------------------------------------------------------------

GRADED = r"""
<think>a</think><answer>1</answer> | 1
<think>a</think>⏎well⏎<answer>⏎1 +⏎2⏎</answer>⏎⏎ | 1 +⏎2
a</think><answer>1</answer> | 1
<think>a</think><answer>1</answer><answer>2</answer> | 2  # the last complete one
<think>a</think><answer>1</answer> or <answer>2 | 1
<think>a</think><answer>1</answer> or </answer> | 1
<think>a</think><answer>1<answer>2</answer> | 2
<think>a</think><answer>1<answer>2</answer>3</answer> | 2
<think>a</think></answer><answer>1</answer> | 1
<think>a</think>1 | None
<think>a</think><answer>1 | None
<think>a</think>1</answer> | None
<think>a</think></answer>1<answer> | None
<answer>1</answer> | None
<think><answer>1</answer> | None  # inside the thinking nothing counts
<think><answer>1</answer></think> | None
<think><answer>1</think></answer> | None
<think><answer>1</answer></think><answer>2</answer> | 2
<think><answer>1</answer></think>so <answer>2 | None
<think>use <think> tags, <answer>1</answer></think><answer>2</answer> | 2
<think>a</think><answer>1</answer><think>or <answer>2</answer></think> | 1
<think>a</think><answer>1</answer><think>or <answer>2</answer> | 1
<think>a</think><answer>1<think>b</think></answer> | None
<think>a</think><think>b</think><answer>2</answer> | 2
<think>a</think><answer>1</answer><think>b</think><answer>2</answer> | 2
<think>use <think> </think> tags <answer>1</answer> so </think> <answer>2</answer> | 2
"""


def test_extract_answer() -> None:
    assert [row for row in rows(GRADED) if str(extract_answer(row[0])) != row[1]] == []
    assert extract_answer("") is None
    assert extract_answer(turn("")) == ""


@pytest.mark.parametrize(
    ("reward", "gold"), [(countdown_reward, ([1, 2], 3)), (gsm8k_reward, "3"), (math_reward, "3")]
)
def test_the_answer_alone_is_graded(reward, gold) -> None:
    right = "1 + 2" if reward is countdown_reward else "3"
    gold = gold if isinstance(gold, tuple) else (gold,)
    block = f"<answer>{right}</answer>"
    assert (
        reward(f"<think>\\boxed{{4}}</think> \\boxed{{5}} not well-formed {block} :-)", *gold)
        == 1.0
    )
    for text in (right, f"<think>{right}</think>", f"<think>{block}", f"<think>{block}</think>"):
        assert reward(text, *gold) == 0.0
    assert reward(f"<think></think>{block}<answer>4</answer>", *gold) == 0.0


# --- countdown -----------------------------------------------------------------------------------

REACHED = r"""
44 + 19 + 35 | 44 19 35 | 98
35+44+19 | 44 19 35 | 98  # any order, no white space
(1 + 2) / 3 | 3 2 1 | 1
8 / (3 - 8 / 3) | 8 8 3 3 | 24  # 8 / (1/3): right only in exact fractions
2 + 3 * 4 | 2 3 4 | 14  # * before +
9 - 3 - 2 | 9 3 2 | 4  # from the left: 9 - (3 - 2) would be 8
24 / 4 / 2 | 24 4 2 | 3
24 / 4 * 2 | 24 4 2 | 12
-(3 - 5) * 2 | 3 5 2 | 4  # signs
2 - -(3 + 1) | 2 3 1 | 6
2 * -(3 - 5) | 2 3 5 | 4
-3 + 5 | 3 5 | 2
+3 + 5 | 3 5 | 8
2 - -3 | 2 3 | 5
--(3) | 3 | 3
3 - 5 | 3 5 | -2  # a negative target
((((7)))) | 7 | 7
7 * 0 | 7 0 | 0
7⏎+	1 | 7 1 | 8  # any white space
5 + 5 | 5 5 | 10
"""
MISSED = r"""
99**98**97 | 99 98 97 | 1  # would never end
2**3+4 | 2 3 4 | 12
2* *3+4 | 2 3 4 | 12
7//2+1 | 7 2 1 | 4
7/ /2+1 | 7 2 1 | 4
1.5*2 | 1 5 2 | 3
1.5*2 | 15 2 | 3
7 + 1/(98*99*100) | 7 1 98 99 100 | 7  # near is not equal
7%4 | 7 4 | 3
1e3 | 1 3 | 1000
0x10 | 0 10 | 16
1_0 + 2 | 10 2 | 12
1_0 + 2 | 1 0 2 | 12
1 0 + 2 | 10 2 | 12
1 0 + 2 | 1 0 2 | 12
007 + 1 | 7 1 | 8  # leading zeros could stand for a 0 that must be used
07 + 1 | 0 7 1 | 8
00 + 1 | 0 1 | 1
6 # + 2 | 6 2 | 6  # a comment would hide a number
6 or 2 | 6 2 | 6
6, 2 | 6 2 | 6
[6, 2][0] | 6 2 0 | 6
3! | 3 | 6
5^3 | 5 3 | 6  # Python's xor
~3 + 10 | 3 10 | 6
__import__('os').system('exit 1') or 3 + 3 | 3 3 | 6
print(3) | 3 | 3
lambda: 3 | 3 | 3
３ + 4 | 3 4 | 7  # digits and operators that int() or a reader would accept
٣ + 4 | 3 4 | 7
3² + 4 | 3 4 | 13
3² + 4 | 3 2 4 | 13
3 × 4 | 3 4 | 12
5 − 4 | 5 4 | 1
98 | 44 19 35 | 98  # the target itself
44 + 54 | 44 19 35 | 98
44 + 19 + 35 | 44 19 35 0 | 98
44 + 19 + 35 + 1 - 1 | 44 19 35 | 98
5 + 5 + 5 | 5 5 | 15
5 | 5 5 | 5
-3 + 5 | -3 5 | 2
() |  | 0
3() | 3 | 3
3( ) | 3 | 3
(3 | 3 | 3
3) | 3 | 3
)3( | 3 | 3
3 + | 3 | 3
* 3 | 3 | 3
- |  | 0
(-)3 | 3 | 3
3 4 | 3 4 | 7
3(4) | 3 4 | 12
3 (4) | 3 4 | 12
(3)(4) | 3 4 | 12
[3 + 4] | 3 4 | 7
{3 + 4} | 3 4 | 7
3 + 4 = 7 | 3 4 | 7
7 == 3 + 4 | 3 4 7 | 1
x = 3 + 4 | 3 4 | 7
$3 + 4$ | 3 4 | 7
3 / 0 | 3 0 | 0
3 / (4 - 4) | 3 4 4 | 0
0 / 0 | 0 0 | 0
"""


def countdown(answer: str, numbers: str, target: str, *extra: int) -> float:
    return countdown_reward(turn(answer), [*map(int, numbers.split()), *extra], int(target))


def test_countdown() -> None:
    for answer, numbers, target in rows(REACHED):
        assert countdown(answer, numbers, target) == 1.0, answer
        assert countdown(answer, numbers, target + "1") == 0.0, answer
        assert countdown(answer, numbers, target, 1) == 0.0, answer
    assert [row for row in rows(MISSED) if countdown(*row) != 0.0] == []
    assert countdown_reward(turn("-" * 990 + "3"), [3], 3) in (0.0, 1.0)  # deep, but never an error
    for answer in ("", "3 + 4\0", "3 + 4\ud800", "3+4" + "+0" * MAX_ANSWER_CHARS):
        assert countdown_reward(turn(answer), [3, 4] + [0] * answer.count("0"), 7) == 0.0


def test_countdown_takes_huge_numbers() -> None:
    huge = 10**6000  # has no str(): Python refuses to write more than 4,300 digits
    assert countdown_reward(turn("3"), [huge], huge) == 0.0
    assert countdown_reward(turn("3"), [3], huge) == 0.0
    assert countdown_reward(turn("9" * 6000), [huge - 1], huge - 1) == 0.0


EXPRESSIONS = st.recursive(
    st.integers(0, 120).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", " - ", "*", "\n/ ", "/-", "*+"]), inner).map("".join)
        | inner.map("( {})".format)
        | inner.map("-({} )".format)
    ),
    max_leaves=6,
)


@thorough
@given(EXPRESSIONS, st.randoms(use_true_random=False), st.integers(0, 120))
def test_countdown_requires_the_value_and_the_numbers(text: str, rng, other: int) -> None:
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    try:
        value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", f"({text})"), {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    target = round(value or 0)
    rng.shuffle(numbers)
    assert countdown_reward(turn(text), numbers, target) == (value == target)
    assert countdown_reward(turn(text), numbers, target + 1) == 0.0
    for changed in (numbers[1:], [*numbers, other], [*numbers[1:], numbers[0] + 1]):
        assert countdown_reward(turn(text), changed, target) == 0.0


# --- GSM8K ---------------------------------------------------------------------------------------

GSM8K_RIGHT = r"""
18 | 18
18. | 18
18.00 | 18
018 | 18
+18 | 18
$18 | 18
\$18 | 18
$18.00. | 18
18% | 18
18 % | 18
18 eggs | 18
18eggs | 18
$18 per day | 18
$18/day | 18
**18** | 18
**$18** | 18
**18.** | 18
*18* | 18
__18__ | 18
`18` | 18
\boxed{18} | 18
#### 18 | 18
The answer is 18. | 18
x = 18 | 18
18⏎ | 18
18, that is 18 eggs | 18  # the same number twice
18 and 18.0 | 18
1,234 | 1234
1234 | 1,234
1{,}234 | 1234
1,\!234 | 1234
$1,234.50 | 1234.5
1,234,567 | 1234567
.5 | 0.5
0.50 | 0.5
-5 | -5
x=-5 | -5
-$5 | -5
-\$5 | -5
$-5 | -5
−5 | -5
covid-19 | 19  # a hyphen is not a sign
-0 | 0
36 cm^2 | 36  # the power of a unit
36 m² | 36
36m^2 | 36
36\text{ cm}^{2} | 36
36 square feet | 36
1234 | Janet sells 16 - 3 = <<16-3=13>>13 eggs.⏎#### 1,234
-5 | #### -5
"""
GSM8K_WRONG = r"""
5 | -5
10.00 | 1
13 | Janet sells 16 - 3 = <<16-3=13>>13 eggs.⏎#### 1,234
19 | 18
1.8 | 18
180 | 18
0.333333 | 0.33333333  # nothing is rounded
0.1 | 0.1000000000000000055511151231257827  # the value of the float 0.1
eighteen | 18
$ | 18
1,234 or 1,235 | 1234
18 or 19 | 18
18 or 19 | 19
5 -5 | 5
2 hours 30 minutes | 2
1, 234 | 234
12,34 | 1234  # not a thousands separator
1,2345 | 12345
1,2341234 | 12341234
1234,567 | 1234567
1 234 | 1234
1.2.3 | 1.2
5-3 | 2  # an expression is not computed, nor is it mistaken for one of its numbers
3 - 3 | 3
$3 - $3 | 3
3 + 3 | 3
1/2 | 0.5
2/2 | 2
2*2 | 2
2**2 | 2
2^2 | 2
x^2 | 2
3 x 3 | 3
3 × 3 | 3
3:3 | 3
1e1 | 1
1E+1 | 10
1.e1 | 1
１８ | 18  # digits outside ASCII
5² | 5
3½ | 3
18 ١٨ | 18
5 million | 5  # words that change the value
5 Thousand | 5
5k | 5
5 dozen | 5
5 and a half | 5
minus 5 | 5
negative 5 | 5
5-3 | 5-3  # a gold answer without a number
18 or 19 | 18 or 19
3½ | 3½
"""


def test_gsm8k() -> None:
    for answer, gold in rows(GSM8K_RIGHT):
        assert gsm8k_reward(turn(answer), gold) == 1.0, answer
        assert gsm8k_reward(turn(answer), gold + "1") == 0.0, answer
    assert [row for row in rows(GSM8K_WRONG) if gsm8k_reward(turn(row[0]), row[1]) != 0.0] == []
    for answer, gold in (("", ""), ("18", ""), ("", "18"), ("18" + " eggs" * 200 + "!", "18")):
        assert gsm8k_reward(turn(answer), gold) == 0.0


# --- MATH ----------------------------------------------------------------------------------------

MATH_RIGHT = r"""
\boxed{204} | 204
so \boxed{3}, no: $\boxed{204}$. | 204
\fbox{204} | 204
$\boxed 12$ and so on | 12  # ends at a space or dollar
204 | $2\cdot 102=\boxed{204}$  # a solution
73 | 073  # AIME
073 | 73
0.5 | \frac{1}{2}
\frac12 | 0.5
\dfrac{1}{2} | 1/2
\frac{2}{4} | \frac12
(1)/(8) | \frac{1}{8}
(-1)/(2) | -\frac12
-(1)/(2) | -\frac12
(1/2) | \frac12
\left(\frac{1}{2}\right) | \frac12
-\frac{1}{2} | \frac{-1}{2}
1/0 | 1/0  # the same text
3\frac{1}{2} | \frac72
-3\frac{1}{2} | -3.5
3 1/2 | 3.5
10,000 | 10000
10{,}000 | 10,\!000
1\,000\,000 | 1000000
11,\! 111,\! 100 | 11,111,100
50\% | 50
90^\circ | 90
90° | 90^{\circ}
45\degree | 45
\$5 | 5
$\$18.90$ | 18.9
5 | x=5  # names
x = 5 | 5
\text{Area} = 5\text{ cm}^2 | 5
= 5 | 5
+5 | 5
5. | 5
**5** | 5
(5) | 5
\( 5 \) | 5
\{5\} | 5
\mathbf{5} | 5
\text{5} | 5
5\text{ cm} | 5  # units
5 \, \text{cm}^2 | 5
5~\mathrm{m^2} | 5
36 cm^2 | 36
36 square cm | 36
5 degrees | 5
3 miles per hour | 3
5 \text{ m/s}^2 | 5
2\sqrt{3}\text{ cm}^2 | 2\sqrt3
\text{Evelyn} | evelyn  # text
\text{No solution} | no solution
C | \text{(C)}
\textbf{(C)} | C
3+2x | 2x+3  # expressions
(x+1)(x-1) | x^2-1
x^10 | x^{10}
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt 3}
1024 | 2^{10}
0.5\pi | \frac{\pi}{2}
2π | 2\pi
sqrt(3)/2 | \frac{\sqrt3}{2}
1+2i | 2i+1
2\mathrm{i}\sqrt3+x | x+2\sqrt{3}i
\sin^2 x | 1-\cos^2 x
\sin^{-1}(1/3) | \arcsin\frac13
\lvert x-2\rvert | |x-2|
2:3 | 2:3  # unreadable notation is compared as text
12_3 | 12_{3}
y=2x+3 | y=3+2x  # equations
2x+3 | y=3+2x
4x+6y=10 | 2x+3y=5
x^2+y^2=9 | x^2 + y^2 - 9 = 0
(x,y)=(3,2) | (3,2)  # tuples
\left( 1,\, 2.0 \right) | (1,2)
81, 256 | 81, 256  # lists
256, 81 | 81, 256
81,256 | 256, 81
1,000 and 2,000 | 1000, 2000
\{2,1\} | \{1,2\}
\{1,-2\} | -2,1
x=1\text{ or }x=-2 | -2,1
\pm 2 | 2,-2
x = 1\pm\sqrt2 | 1-\sqrt{2}, 1+\sqrt{2}
(0,1) and (1,0) | (1,0), (0,1)
[0,\frac12) | [0,0.5)  # intervals
x ≤ 2 | (-\infty,2]
x \in [2,\infty) | x \ge 2
1 < x \le 2 | (1,2]
2 > x > 1 | 1<x<2
(-∞,1) ∪ (2,∞) | (2,\infty)\cup(-\infty,1)
x<1 or x>2 | (-\infty,1)\cup(2,\infty)
\mathbb{R} | (-\infty,\infty)
\begin{bmatrix}1&0.5\\x&4\end{bmatrix} | \begin{pmatrix} 1 & \frac12 \\ x & 4 \end{pmatrix}
"""
MATH_WRONG = r"""
\boxed{204} or \boxed{205} | 204
\boxed 12 | 1
\boxed{204 | 204
\boxed{} | 204
102 | $2\cdot 102=\boxed{204}$
2/0 | 1/0  # numbers
31/2 | 3.5
1/2/3 | \frac16
\frac{1}{2}3 | \frac{1}{23}
--5 | 5
0.333333 | \frac{1}{3}
0.3333333333333333333333333 | 1/3
-5 | 5
5.1 | 5
5,000 | 5
3\;5 | 35
1\,23 | 123
12,34 | 1234
0.123 | 123
5_2 | 5
5² | 5
٥ | 5
½ | 0.5
5! | 5
|5| | 5
The answer is 5 | 5
5 or 6 | 5  # several guesses
5, 5 | 5
\pm 5 | 5
5 to 6 | 5
5--6 | 5
4=5 | 5
2x=5 | 5
x>5 | 5
x\ne 5 | 5
y=5 | x=5
5i | 5
5\text{ or six} | 5  # not units
5\text{ million} | 5
5\text{ Thousand} | 5
5\text{ dozen} | 5
5\text{ sixths} | 5
5\text{ and a half} | 5
5\text{ squared} | 5
5\text{ factorial} | 5
5\text{ times ten} | 5
5\text{ over two} | 5
5\text{ pi} | 5
5\text{ p.m.} | 5
5\text{x} | 5
5 cm 6 | 5
3t | 3
\frac{x}{2}h | \frac{x}{2}
2+3 | 5  # the question might be 2+3
\sqrt{4} | 2
2^{10} | 1024
\sum_{i=1}^{100} i | 5050
\binom{4}{2} | 6
\sin 60^\circ | \frac{\sqrt3}{2}
\binom{4}{2}x | 6x
\begin{pmatrix}\sqrt4\\x\end{pmatrix} | \begin{pmatrix}2\\x\end{pmatrix}
nylevE | Evelyn  # text
D | \text{(C)}
2:3 | 3:2
2/3 | 2:3
12 | 12_3
12_3 | 12
2x-3 | 2x+3  # expressions
x^2y | xy^2
x_1 | x_2
X | x
1-2i | 1+2i
i | 1
\log_2 3 | \log_3 2
\sin(x)^2 | \sin(x^2)
n!! | (n!)!
x^T | x
\frac{d}{dx}x^2 | 2x
2\frac{1}{2}x | x
0.\overline{3} | 0.3
1.41421356 | \sqrt{2}
1.41421356237309504880168872420969807856967187538 | \sqrt{2}
3.14159 | \pi
x+0.14159265358979323846264338327950288419716939937 | x+\pi-3
1=2 | x^2-2x+10=0  # equations
0=0 | x^2-2x+10=0
x^2+1=0 | x^2-2x+10=0
\log_4(9)=\frac32 | \log_4(8)=\frac32
4x+6y=11 | 2x+3y=5
1=2 | 3=5
-2x+y<-4 | 2x-y<4
81256 | 81, 256  # lists and tuples
81, 257 | 81, 256
(1,234) | 1234
1234 | (1,234)
1234 | 1, 234
(5),(300) | 5300
\{1,2,3\} | \{1,2\}
\{1,1,2\} | \{1,2\}
1,2 | 1,1
1 | -2,1
(2,1) | (1,2)
[1,2] | (1,2)
1,2 | (1,2)
(y,x)=(3,2) | (3,2)
x\le 2 | (-\infty,2)  # intervals
x<2 | (2,\infty)
x<2 | y<2
[0,1) | [0,1]
1<x<2 | [1,2)
(-\infty,1]\cup(2,\infty) | (2,\infty)\cup(-\infty,1)
x<1 or x\ge2 | (-\infty,1)\cup(2,\infty)
(1,2)\cup(3,4) | (1,2),(3,4)
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | (1,2)
\begin{vmatrix}1&2\\3&4\end{vmatrix} | -2
"""


@pytest.fixture(scope="module", autouse=True)
def _worker() -> None:
    math_reward(turn("2x"), "x+x")  # waits for the libraries, which take seconds to load


@pytest.mark.parametrize(("table", "expected"), [(MATH_RIGHT, 1.0), (MATH_WRONG, 0.0)])
def test_math(table: str, expected: float) -> None:
    pairs = rows(table)
    assert [pair for pair in pairs if math_reward(turn(pair[0]), pair[1]) != expected] == []


def test_math_of_an_empty_and_of_a_very_long_answer() -> None:
    assert math_reward(turn(""), "") == 0.0
    assert math_reward(turn("\\{" + "5," * MAX_ANSWER_CHARS + "5\\}"), "5") == 0.0


# --- the process that compares expressions -------------------------------------------------------

SLOW = "(x+y+z)^{9999}"  # SymPy would expand it forever
EQUAL = ("2x+3", "3+2x")


def compare(answer: str, gold: str) -> float:
    return math_reward(turn(answer), gold)


def test_a_slow_comparison_is_cut_off_and_the_next_is_right() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert compare(SLOW, "x^2") == 0.0
        seconds.append(time.perf_counter() - start)
        assert compare(*EQUAL) == 1.0
    # The limit is on CPU time, which the worker shares with everything else that is running.
    assert 0.4 < min(seconds) < max(1.0, os.getloadavg()[0] / os.cpu_count())


def test_many_threads_at_once() -> None:
    pairs = [EQUAL, ("2x-3", "3+2x"), ("x", "y")] * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: compare(*pair), pairs)) == [1.0, 0.0, 0.0] * 20


def test_a_forked_process_has_its_own_worker() -> None:
    pairs = [(SLOW, "x^2"), EQUAL] * 2
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        theirs = pool.map(compare, *zip(*pairs))  # at the same time
        assert [compare(*pair) for pair in pairs] == [0.0, 1.0] * 2
        assert list(theirs) == [0.0, 1.0] * 2


def test_a_worker_that_died_is_replaced() -> None:
    worker = rewards._worker
    worker.kill()
    assert compare(*EQUAL) in (0.0, 1.0)  # it may not be dead yet
    worker.wait()
    assert compare(*EQUAL) == 1.0
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(compare, SLOW, "x^2")
        time.sleep(0.1)
        rewards._worker.kill()
        assert slow.result() == 0.0


def test_after_ctrl_c_the_next_comparison_is_right() -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        compare(SLOW, "x^2")
    signal.signal(signal.SIGALRM, before)
    assert compare(*EQUAL) == 1.0


def test_the_worker_ends_with_its_parent() -> None:
    program = (
        "import os, rewards; rewards.math_reward('</think><answer>2x</answer>', 'x+x'); os.abort()"
    )
    # The worker inherits stderr, so this also waits for the worker to end.
    parent = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(rewards.__file__).parent,
        capture_output=True,
        timeout=100,
    )
    assert parent.returncode == -signal.SIGABRT


def test_starting_the_worker_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "_worker", None)
    begin = time.perf_counter()
    start_math_worker()
    started = time.perf_counter()
    worker = rewards._worker
    start_math_worker()
    assert rewards._worker is worker
    assert compare(*EQUAL) == 1.0  # waits for the libraries
    assert started - begin < (time.perf_counter() - started) / 4
    worker.kill()


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "find_spec", lambda name: None)
    monkeypatch.setattr(rewards, "_worker", None)
    with pytest.raises(ImportError, match="math-verify"):
        compare(*EQUAL)


# --- any text ------------------------------------------------------------------------------------

REWARDS = [
    format_reward,
    lambda text: countdown_reward(text, [3, 5, 7], 15),
    lambda text: gsm8k_reward(text, "18"),
    lambda text: gsm8k_reward(turn("18"), text),
    lambda text: math_reward(text, "18"),
    lambda text: normalized_answer(text) is None,
]


def assert_graded_within_a_second(text: str) -> None:
    for reward in REWARDS:
        start = time.process_time()
        assert reward(text) in (0.0, 1.0)
        assert time.process_time() - start < 1.0


TOKENS = r"""<think> </think> <answer> </answer> ( ) + - * / ** // 3 5 7 15 18 99 1,234 9,999 $ % . , = e E _ ²
٣ #### eval( exec( __import__('os') os.abort() open('x','w') lambda : 1/0 while True: pass \boxed{ } # ; [ ] 9- 1e
\boxed \frac \text{ { \begin{pmatrix} \end{pmatrix} \\ & \{ \} \pm ± < > \le ∪ « » ⟦ 10000! x y ^{9999} (x+y)^{999}
-( 9** .9 <answer></answer> </think><answer> \sqrt{ \sin \log | i a\ or\ ^ \xi \int_0^1"""
PIECES = [*TOKENS.split(), " ", "\n", "\0", "\ud800"]
code = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
any_text = st.text(st.characters(codec=None)) | code  # surrogates and NUL included


@thorough
@given(any_text)
def test_any_text_is_graded(text: str) -> None:
    assert_graded_within_a_second(text)
    assert_graded_within_a_second(turn(text))


@settings(thorough, max_examples=60)
@given(any_text, st.sampled_from(["5", "x^2+1", r"\sin x", r"(1,\sqrt2)", "x<2", "y=2x"]))
def test_math_grades_any_text(text: str, gold: str) -> None:
    assert compare(text, gold) in (0.0, 1.0)
    assert compare(gold, text) in (0.0, 1.0)


@pytest.mark.parametrize("piece", PIECES)
def test_long_text_is_graded(piece: str) -> None:
    body = piece * (300_000 // len(piece))
    for text in (body, f"<think></think>{body}", turn(body), f"<think>{body}", turn(body[:990])):
        assert_graded_within_a_second(text)


HARD = r"""
9^{9^{9^9}}
9^9^9^9
2^{99999}
\sqrt{\sqrt{\sqrt{\sqrt{\sqrt{\sqrt{\sqrt{\sqrt{2}}}}}}}}
((x+1)^{99}+(y+1)^{99})^{99}
\sum_{i=1}^{10^9} i
e^{e^{e^{e^e}}}
\binom{10^9}{10^8}
(x+y+z+w)^{60}=1
"""


def test_math_grades_hard_text() -> None:
    long = ["(" * 400 + "x" + ")" * 400, "\\frac{1}{1+" * 75 + "x" + "}" * 75, "x+" * 490 + "x"]
    for answer in [*HARD.split("\n"), *long, "(1," * 300 + "x" + ")" * 300, "-" * 900 + "x"]:
        assert compare(answer, r"x^2+\sqrt{2}") == 0.0
        assert compare(answer, "x^2=2") == 0.0
    assert compare(*EQUAL) == 1.0


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "_worker", None)  # the next one starts in this folder
    assert compare(*EQUAL) == 1.0
    watching, events = True, []
    sys.addaudithook(lambda event, _: watching and events.append(event))  # cannot be removed again
    for attack in (
        "os.mkdir('owned')",  # means the same after the grader's replacements
        "open('owned','w').write('1')",
        "__import__('os').system('touch owned')",
        "exec('import os; os.mkdir(\"owned\")')",
        "3 + 5 + 7 if open('owned','w') else 0",
        "(lambda: 3)()",
    ):
        for reward in [*REWARDS, lambda text: math_reward(text, "x+y"), normalized_answer]:
            reward(turn(attack))
            reward(turn(f"\\boxed{{{attack}}}"))
    watching = False
    assert not set(events) & {"open", "exec", "os.system", "subprocess.Popen", "import", "os.mkdir"}
    assert not list(tmp_path.iterdir())
    rewards._worker.kill()
