"""Questions for the policy: the prompt templates, the Countdown generator and the dataset loaders.

A question is a plain dict, `{"question": text, "answer": keyword arguments of the task's reward}`: for Countdown
`{"numbers": [44, 19, 35], "target": 98}`, for GSM8K `{"gold": "18"}`. `load_questions` is the way in for training.
"""

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError


class UsageError(ValueError):
    """An option whose value cannot work. The message is one line: the option, its value, and a value that works."""


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: every one ends in an open <think>, so that the completion begins with the thinking

# Table 1 of the DeepSeek-R1 paper in TinyZero's words, for a model that has no chat template.
BASE_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: {question}\n"
    "Assistant: Let me solve this step by step.\n"
    "<think>"
)
SYSTEM_PROMPT = (
    "You are a helpful assistant. First think about the reasoning process in <think> </think> tags, "
    "then give only the final answer in <answer> </answer> tags."
)
# TinyZero's closing sentences. The base template does not mention the tags, so the question has to.
SHOW_WORK = (
    "Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
    "for example <answer> {example} </answer>."
)


def render_prompt(tokenizer, question: str) -> str:
    """The whole prompt for a question, by the tokenizer's own chat template if it has one, else by BASE_TEMPLATE.

    It ends in exactly one open `<think>`: some chat templates (DeepSeek's distilled models) open the thinking
    themselves, with or without a line break after it, and then nothing is added.
    """
    if not tokenizer.chat_template:
        return BASE_TEMPLATE.format(question=question)
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # Gemma's templates refuse a system message
        messages = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{question}"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt if prompt.rstrip().endswith("<think>") else prompt + "<think>"


def countdown_question(numbers: list[int], target: int) -> str:
    """TinyZero's sentence (github.com/Jiayi-Pan/TinyZero, examples/data_preprocess/countdown.py)."""
    return (
        f"Using the numbers {list(numbers)}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. " + SHOW_WORK.format(example="(1 + 2) / 3")
    )


def _countdown(numbers: list[int], target: int) -> dict:
    return {"question": countdown_question(numbers, target), "answer": {"numbers": numbers, "target": target}}


# ---------------------------------------------------------------------------------------------------------------------
# The Countdown generator

TRIES = 1000  # draws without a find, after which there is taken to be nothing (more) to find
MAX_RANGE = 10_000  # the largest number or target
HELD_OUT_RNG = "held-out"  # seeds what is drawn for evaluation: the same questions whatever --seed, so runs compare
# Three numbers from 1 to 9 and targets from 1 to 99 make only 2,144 different problems. One in four is held out: one in
# five would be too few for an evaluation on 512.
HELD_OUT_ONE_IN = 4


def is_held_out(numbers: list[int], target: int) -> bool:
    """Whether a problem is for evaluation only, whatever the order of its numbers; the same on every machine."""
    return _hash_holds_out(f"{sorted(numbers)} {target}")


def _hash_holds_out(key: str) -> bool:
    # Not hash(): that of a string differs from process to process, and would leak test problems into training.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def reachable_targets(numbers: list[int]) -> frozenset[int]:
    """Every integer, 0 or more, that `numbers` (0 or more) make when each is used exactly once, by exact fractions."""
    return _integers(tuple(sorted(numbers)))


@lru_cache(maxsize=512)  # 3 or 4 numbers from 1 to 9 are 165 or 495 different problems
def _integers(numbers: tuple[int, ...]) -> frozenset[int]:
    return frozenset(int(value) for value in _values(numbers) if value.denominator == 1)


@lru_cache(maxsize=32)  # five numbers have 31 subsets; more of them would only be memory
def _values(numbers: tuple[int, ...]) -> frozenset[Fraction]:
    """The absolute values of all that can be made of `numbers`.

    They suffice: a minus sign further in only swaps a sum for a difference, so what is positive is made without one.
    """
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    values = set()
    for mask in range(1, 2 ** (len(numbers) - 1)):  # every cut in two, the last number on the right
        left = tuple(number for place, number in enumerate(numbers) if mask >> place & 1)
        right = tuple(number for place, number in enumerate(numbers) if not mask >> place & 1)
        for a in _values(left):
            for b in _values(right):
                values.update((a + b, abs(a - b), a * b))
                if b:
                    values.add(a / b)
                if a:
                    values.add(b / a)
    return frozenset(values)


def countdown_problem(
    rng: random.Random,
    held_out: bool,
    operands: int = 3,
    operand_range: tuple[int, int] = (1, 9),
    target_range: tuple[int, int] = (1, 99),
) -> tuple[list[int], int]:
    """A solvable problem `(numbers, target)` from the training problems, or from those held out.

    The numbers are drawn uniformly and independently of each other, then the target uniformly from those which they
    reach and which belong to the wanted side; where there is none, all is drawn again. Raises UsageError if nothing
    turns up.
    """
    low, high = target_range
    for _ in range(TRIES):
        numbers = [rng.randint(*operand_range) for _ in range(operands)]
        targets = [
            target
            for target in sorted(reachable_targets(numbers))
            if low <= target <= high and is_held_out(numbers, target) == held_out
        ]
        if targets:
            return numbers, rng.choice(targets)
    raise UsageError(
        f"--target_range {_pair(target_range)}: no {'held-out' if held_out else 'training'} problem with {operands} "
        f"numbers from --operand_range {_pair(operand_range)}; try --operand_range 1 9 --target_range 1 99"
    )


def _generated(seed: int, eval_questions: int, draw: Callable) -> tuple[Callable[[int], dict], list[dict]]:
    """`load_questions` for problems made on the spot; `draw(rng, held_out)` is a countdown_problem with its options."""
    rng = random.Random(HELD_OUT_RNG)
    found, repeats = {}, 0
    while len(found) < eval_questions and repeats < TRIES:
        numbers, target = draw(rng, held_out=True)
        key = (*sorted(numbers), target)
        repeats = repeats + 1 if key in found else 0
        found.setdefault(key, _countdown(numbers, target))
    if len(found) < eval_questions:
        raise UsageError(
            f"--eval_questions {eval_questions}: there are only {len(found)} held-out problems to be found "
            f"with these ranges; try {len(found)}"
        )
    draw(random.Random(seed), held_out=False)  # raises here, not in the middle of training
    return lambda i: _countdown(*draw(random.Random(f"{seed}/{i}"), held_out=False)), list(found.values())


def _check_ranges(operands: int, operand_range: tuple[int, int], target_range: tuple[int, int]) -> None:
    if not 2 <= operands <= 5:
        raise UsageError(f"--operands {operands}: a problem has 2 to 5 numbers; try 3")
    for option, bounds, works in (("operand_range", operand_range, "1 9"), ("target_range", target_range, "1 99")):
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= MAX_RANGE:
            raise UsageError(f"--{option} {_pair(bounds)}: needs 1 <= lowest <= highest <= {MAX_RANGE}; try {works}")


def _pair(bounds: tuple[int, ...]) -> str:
    return " ".join(str(bound) for bound in bounds)  # as it is written on the command line


# ---------------------------------------------------------------------------------------------------------------------
# Datasets: a reader makes a question of a row, or None of a row that has no answer which the reward could grade


def read_countdown(row: dict) -> dict | None:
    """A row of Jiayi-Pan/Countdown-Tasks-3to4; in a CSV file `nums` is text, "[44, 19, 35]"."""
    numbers = row["nums"]
    if isinstance(numbers, str) and len(numbers) < 200:  # the bound also keeps json from nesting too deep
        try:
            numbers = json.loads(numbers)
        except json.JSONDecodeError:
            return None
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= 20:
        return None
    numbers, target = [_whole_number(number) for number in numbers], _whole_number(row["target"])
    if target is None or any(number is None or number < 0 for number in numbers):
        return None
    return _countdown(numbers, target)


def _whole_number(value: object) -> int | None:
    # One odd value in a column makes floats or text of all the others: 3.0 and "3" are still 3.
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and abs(number) <= 1e9 else None


GOLD = re.compile(r"-?\$?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]*)?%?")  # 18, 1,234.50


def read_gsm8k(row: dict) -> dict | None:
    """A row of openai/gsm8k, whose answer text ends in `#### 18`; in a file of one's own it may be just the number."""
    question, gold = str(row["question"] or "").strip(), str(row["answer"]).rpartition("####")[2].strip()
    if not question or len(gold) > 40 or not GOLD.fullmatch(gold):
        return None
    return {"question": f"{question} {SHOW_WORK.format(example='42')}", "answer": {"gold": gold}}


# What a task needs: the dataset it uses when none is named ("" makes its questions on the spot), the columns read, the
# reader, and, for a dataset with a single split, which rows are held out.
TASKS = {
    "countdown": {
        "dataset": "",
        "columns": ["target", "nums"],
        "read": read_countdown,
        "held_out": lambda row: is_held_out(**read_countdown(row)["answer"]),
    },
    "gsm8k": {
        "dataset": "openai/gsm8k",
        "columns": ["question", "answer"],
        "read": read_gsm8k,
        "held_out": lambda row: _hash_holds_out(str(row["question"]).strip()),
    },
}
HUB_CONFIGS = {"openai/gsm8k": "main"}
# A single split that its authors cut by position: so many rows to train on, and so many after them to test on.
HUB_CUTS = {"Jiayi-Pan/Countdown-Tasks-3to4": (327_680, 1_024)}
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_questions(
    task: str,
    dataset: str | None,
    seed: int,
    eval_questions: int,
    operands: int = 3,
    operand_range: tuple[int, int] = (1, 9),
    target_range: tuple[int, int] = (1, 99),
) -> tuple[Callable[[int], dict], list[dict]]:
    """The questions of a task: `(question_at, held_out)`.

    `question_at(i)` is a pure function of (seed, i) for every i >= 0: a Countdown problem made on the spot, or the i-th
    row of endless passes over the training rows, each in an order of its own. `held_out` are `eval_questions` questions
    (all there are, where a dataset has fewer) which are the same for every seed and are not used for training.

    `dataset` is a hub dataset or a .jsonl, .json, .parquet or .csv file; empty means the task's own. The last three
    arguments are for Countdown made on the spot. Raises UsageError where an option cannot work.
    """
    if task not in TASKS:
        raise UsageError(f"--task {task}: there are {', '.join(TASKS)}; try countdown")
    if eval_questions < 0:
        raise UsageError(f"--eval_questions {eval_questions}: cannot be negative; try 64")
    dataset = dataset or TASKS[task]["dataset"]
    if not dataset:
        _check_ranges(operands, operand_range, target_range)

        def draw(rng: random.Random, held_out: bool) -> tuple[list[int], int]:
            return countdown_problem(rng, held_out, operands, operand_range, target_range)

        return _generated(seed, eval_questions, draw)

    train, test = _split_rows(task, dataset)
    read = TASKS[task]["read"]

    @lru_cache(maxsize=2)  # a step's questions may lie in two passes
    def order(epoch: int) -> list[int]:
        return random.Random(f"{seed}/{epoch}").sample(range(len(train)), len(train))

    def question_at(i: int) -> dict:
        epoch, place = divmod(i, len(train))
        return read(train[order(epoch)[place]])

    # Drawn rather than taken from the top: a file may be sorted.
    chosen = random.Random(HELD_OUT_RNG).sample(test, min(eval_questions, len(test)))
    return question_at, [read(row) for row in chosen]


def _split_rows(task: str, dataset: str) -> tuple[list[dict], list[dict]]:
    """The usable rows to train on and those held out; both have some."""
    splits = _load_dataset(dataset)
    names = list(splits)
    train = "train" if "train" in names else names[0]
    tests = [name for name in ("test", "validation") if name in names and name != train]
    if dataset in HUB_CUTS:
        end, more = HUB_CUTS[dataset]
        train_rows = _usable_rows(task, dataset, splits[train].select(range(end)))
        test_rows = _usable_rows(task, dataset, splits[train].select(range(end, end + more)))
    elif tests:
        train_rows = _usable_rows(task, dataset, splits[train])
        test_rows = _usable_rows(task, dataset, splits[tests[0]])
    else:
        rows, held_out = _usable_rows(task, dataset, splits[train]), TASKS[task]["held_out"]
        train_rows = [row for row in rows if not held_out(row)]
        test_rows = [row for row in rows if held_out(row)]
    if not train_rows or not test_rows:
        raise UsageError(
            f"--dataset {dataset}: {len(train_rows)} rows to train on and {len(test_rows)} held out, both need some "
            f"(of a single split one question in {HELD_OUT_ONE_IN} is held out); try a file of 100 rows or more"
        )
    return train_rows, test_rows


def _usable_rows(task: str, dataset: str, table) -> list[dict]:
    columns, read = TASKS[task]["columns"], TASKS[task]["read"]
    if not set(columns) <= set(table.column_names):
        raise UsageError(
            f"--dataset {dataset}: has the columns {', '.join(table.column_names)}; "
            f"--task {task} reads {' and '.join(columns)}; try a dataset with these"
        )
    rows = table.select_columns(columns).to_list()
    usable = [read(row) is not None for row in rows]
    if not all(usable):
        count, first = usable.count(False), usable.index(False) + 1
        print(
            f"{dataset}: {count} of {len(rows)} rows have no usable answer, the first is row {first}", file=sys.stderr
        )
    return [row for row, keep in zip(rows, usable, strict=True) if keep]


def _load_dataset(dataset: str) -> dict:
    """A hub dataset or a local file as `{split: datasets.Dataset}`."""
    import datasets  # takes seconds, and the generated Countdown does without

    path = Path(dataset)
    reader = FILE_READERS.get(path.suffix.lower())
    if path.is_file() and not reader:
        raise UsageError(f"--dataset {dataset}: cannot be read; try a {', '.join(FILE_READERS)} file")
    if reader and not path.is_file():
        raise UsageError(f"--dataset {dataset}: there is no such file; try openai/gsm8k or a path that exists")
    if reader and path.stat().st_size == 0:
        raise UsageError(f"--dataset {dataset}: the file is empty; try openai/gsm8k or a file with rows")
    try:
        if not reader:
            return datasets.load_dataset(dataset, HUB_CONFIGS.get(dataset))
        # A broken file is to be reported once, in the line below, and not by the library's log and progress bar too.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        return datasets.load_dataset(reader, data_files=dataset)
    # What datasets and huggingface_hub raise for a broken file, no network, no such dataset or configuration, a dataset
    # that is a script; StopIteration for a JSON file without a row.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(str(cause).split())[:200] or "no rows"
        raise UsageError(f"--dataset {dataset}: unreadable: {reason}; try openai/gsm8k or a .jsonl file") from None
