"""Questions and prompts: prompt templates, the Countdown generator, datasets, and `TASKS`.

A question is a dict of its text and the keyword arguments of the reward that grades an answer:

    {"question": "Using the numbers ...", "answer": {"numbers": [44, 19, 35], "target": 98}}

`load_questions` returns the questions of a run. To train on a task of your own, add it to TASKS
before you call R1ZeroTrain.run. For example, harder.py is Countdown with four numbers up to 20:

    import dataclasses, sys
    import prompts, R1ZeroTrain

    def generate(rng):
        return prompts.countdown(*prompts.countdown_problem(rng, operands=4, operand_range=(1, 20)))

    prompts.TASKS["harder"] = dataclasses.replace(prompts.TASKS["countdown"], generate=generate)
    sys.exit(R1ZeroTrain.run(sys.argv[1:]))  # python harder.py --task harder
"""

import glob
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import combinations, product
from pathlib import Path
from random import Random

from rewards import countdown_reward, gsm8k_reward, last_box, math_reward, start_math_worker


class UsageError(ValueError):
    """Raised if the value of an option cannot work. Its one-line message names one that does."""


# ---- Templates ---------------------------------------------------------------------------------
# Every prompt ends in an open <think>, so that the completion begins with the thinking.

# Table 1 of DeepSeek-R1 (arXiv 2501.12948) in TinyZero's wording, for models without a chat
# template.
BASE_TEMPLATE = """\
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. \
The assistant first thinks about the reasoning process in the mind and then provides the user with \
the answer.
User: {question}
Assistant: Let me solve this step by step.
<think>"""
SYSTEM_PROMPT = """\
You are a helpful assistant. First think about the reasoning process in <think> </think> tags, \
then give only the final answer in <answer> </answer> tags."""
# The end of TinyZero's questions. The base template does not mention the tags, so questions do.
SHOW_WORK = """\
Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, \
for example <answer> {example} </answer>."""
# Replaces "think" in the messages that a chat template reads. No UTF-8 text has this character.
MASK = "\udfff"
# Some chat templates write today's date, but a prompt must be the same every day. At the start of a
# template, this macro replaces transformers' strftime_now. Other format codes stay as they are.
FIXED_DATE = """\
{% macro strftime_now(format) -%}
{{ format.replace('%d', '26').replace('%m', '07').replace('%b', 'Jul').replace('%B', 'July')
         .replace('%y', '24').replace('%Y', '2024').replace('%A', 'Friday') }}
{%- endmacro %}
"""


def uses_chat_template(tokenizer, template: str) -> bool:
    """Returns whether the chat template writes the prompts, including any BOS token.

    `template` is "auto" (if there is a chat template), "base" (never) or "chat" (always).
    """
    return template == "chat" or bool(template == "auto" and tokenizer.chat_template)


def render_prompt(tokenizer, question: str, template: str = "auto") -> str:
    """Returns the prompt for a question. It ends in exactly one open `<think>` and white space.

    See uses_chat_template for `template`. Raises UsageError if the chat template fails, or if the
    prompt would not contain the whole question and SYSTEM_PROMPT.
    """
    if not uses_chat_template(tokenizer, template):
        return BASE_TEMPLATE.format(question=question)

    # Some templates ignore a system message. Those of Gemma and early Mistral models reject it.
    for texts in (
        {"system": SYSTEM_PROMPT, "user": question},
        {"user": f"{SYSTEM_PROMPT}\n\n{question}"},
    ):
        try:
            return chat_prompt(tokenizer, texts)
        except Exception as error:  # a template is a program, and can raise anything
            reason = f"{error!r:.200}"
    raise UsageError(f"--template chat: the chat template fails with {reason}; try --template base")


def chat_prompt(tokenizer, texts: dict) -> str:
    """Returns the prompt that the chat template writes for `texts`, `{role of a message: text}`.

    Raises ValueError if the prompt lacks a part of a text, or if `<think>` cannot follow it.
    """
    # Some templates edit tags: SmolLM3's deletes "/think" from the system message. Masked texts
    # also contain no tags that could be mistaken for the template's own below.
    messages = [{"role": role, "content": texts[role].replace("think", MASK)} for role in texts]
    template = FIXED_DATE + tokenizer.get_chat_template()
    prompt = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,  # read by Qwen3's template
        thinking=True,  # read by DeepSeek-V3.1's
    )

    for message in messages:
        # An exception is a template that extracts the problem from a Countdown question, as
        # tiny-base's does with split('equals ').
        if message["content"].strip() not in prompt and "equals '" not in template:
            raise ValueError("it drops or changes the question or the instruction")

    # Some templates open the thinking, and some also close it at once to switch it off.
    before, opened = re.fullmatch(
        r"(?s)(.*?)(?:(<think>(?:\s*\Z)?)(?:\s*</think>\s*)?)?", prompt
    ).groups("<think>")
    # gpt-oss's prompt ends inside a header, "<|start|>assistant".
    if before.count("<think>") != before.count("</think>") or before.endswith("assistant"):
        raise ValueError("its prompt does not end where <think> can follow")
    return (before + opened).replace(MASK, "think")


def encode(tokenizer, prompts: str | list[str], template: str, **options) -> dict:
    """Returns the tokens of rendered prompts. `options` are those of the tokenizer."""
    special = not uses_chat_template(tokenizer, template)
    return tokenizer(prompts, add_special_tokens=special, **options)


# ---- Countdown: reach the target with every number once ----------------------------------------

DRAWS = 10_000  # give up after this many random draws without success

# "44 19 35 = 98", "44, 19, 35 = 98", "[44, 19, 35] = 98", "[44.0, 19.0, 35.0] = 98.0"
NUMBER = r"[0-9]{1,9}(?:\.0)?"
PROBLEM = rf"\s*(\[)?\s*{NUMBER}(?:[\s,]+{NUMBER})*\s*(?(1)\])\s*=\s*-?{NUMBER}\s*"


@lru_cache(256)  # three numbers up to 9 need 219; the values of four numbers take up to 100 kB
def reachable_values(numbers: tuple) -> set:
    """Returns the absolute values of all expressions that use each of `numbers` exactly once.

    `numbers` are sorted and not negative. The signs of partial results do not matter: they only
    turn a sum into a difference or back, and both are included.
    """
    if len(numbers) == 1:
        return {Fraction(numbers[0])}

    values = set()
    for size in range(1, len(numbers) // 2 + 1):
        for left in combinations(numbers, size):
            right = tuple((Counter(numbers) - Counter(left)).elements())
            for a, b in product(reachable_values(left), reachable_values(right)):
                # a / 0 has no value. It is replaced by a, which is in the set anyway as a + 0.
                values |= {a + b, abs(a - b), a * b, a / (b or 1), b / (a or 1)}
    return values


def countdown_problem(
    rng: Random, operands: int = 3, operand_range: tuple = (1, 9), target_range: tuple = (1, 99)
) -> tuple:
    """Draws a problem `(numbers, target)` that has a solution. Both ranges include their ends.

    The numbers are uniform and independent. The target is uniform among the integers in
    `target_range` that the numbers can reach. If there are none, the numbers are drawn again.
    Raises UsageError after DRAWS failures. Neither range may include a negative number.
    """
    low, high = target_range
    for _ in range(DRAWS):
        numbers = [rng.randint(*operand_range) for _ in range(operands)]
        values = reachable_values(tuple(sorted(numbers)))
        targets = [target for target in range(low, high + 1) if target in values]
        if targets:
            return numbers, rng.choice(targets)
    raise UsageError(f"target_range={target_range}: out of reach; try target_range=(1, 99)")


def countdown_key(numbers: list[int], target: int) -> str:
    """Returns the key of a problem. It does not depend on the order of the numbers."""
    return f"{sorted(numbers)} {target}"


def countdown(numbers: list[int], target: int) -> dict:
    """Returns the question in the wording of TinyZero's examples/data_preprocess/countdown.py."""
    question = (
        f"Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
        "arithmetic operations (+, -, *, /) and each number can only be used once. "
        f"{SHOW_WORK.format(example='(1 + 2) / 3')}"
    )
    return {"question": question, "answer": {"numbers": numbers, "target": target}}


def parse_countdown(text: str) -> dict | None:
    """Returns the question for a text such as "44 19 35 = 98", or None for any other text."""
    if not re.fullmatch(PROBLEM, text):
        return None
    *numbers, target = map(int, re.findall(r"(-?[0-9]+)(?:\.0)?", text))
    return countdown(numbers, target)


# ---- GSM8K and mathematics ---------------------------------------------------------------------


def ungraded(text: str) -> dict:
    """Returns a question without an answer."""
    return {"question": text, "answer": None}


def ask_for_work(text: str) -> dict:
    """Returns a question that asks for the tags and has no answer."""
    return ungraded(f"{str(text).strip()} {SHOW_WORK.format(example='42')}")


def graded(reward: Callable, text: str, gold: str) -> dict | None:
    """Returns a question with the answer `gold`, or None if the reward does not accept `gold`."""
    missing = {"", "None", "nan"}  # str() of a missing cell
    accepted = reward(f"<think></think><answer>{gold}</answer>", gold)
    if not accepted or missing & {str(text).strip(), gold}:
        return None
    return ask_for_work(text) | {"answer": {"gold": gold}}


def read_gsm8k(row: dict) -> dict | None:
    """Returns the question of a row of openai/gsm8k, whose `answer` ends in "#### 18".

    An `answer` may also be a plain number.
    """
    gold = str(row["answer"]).rpartition("####")[2].strip()
    return graded(gsm8k_reward, row["question"], gold)


def read_math(row: dict) -> dict | None:
    r"""Returns the question of a row with `problem` and `answer`.

    This is the format of agentica-org/DeepScaleR-Preview-Dataset, HuggingFaceH4/aime_2024 and
    HuggingFaceH4/MATH-500. MATH itself has a `solution` with a \boxed{} answer instead.
    """
    column = "answer" if "answer" in row else "solution"
    text = str(row[column])
    gold = last_box(text)
    if column == "solution" and gold == text.strip():
        return None  # there is no box
    return graded(math_reward, row["problem"], gold)


# ---- Tasks -------------------------------------------------------------------------------------


@dataclass
class Task:
    """A value of `--task`: the source of questions, and the reward that grades the answers."""

    reward: Callable  # reward(completion, **question["answer"]) -> 0.0 or 1.0
    # generate(rng) -> a random question, or None to be called again. It does not have to know which
    # questions are held out.
    generate: Callable = lambda rng: None
    dataset: str = ""  # default of --dataset; "": questions are generated
    eval_dataset: str = ""  # default of --eval_dataset if --dataset is not given either
    # read(row) -> the question of a row of a dataset, or None if the row has no usable answer.
    # Missing cells are None. A KeyError is reported as a missing column.
    read: Callable = lambda row: None
    # key(question) -> text. Questions with the same key are the same question, and the hash of the
    # key decides whether it is held out.
    key: Callable = lambda question: " ".join(question["question"].split())
    ask: Callable = ungraded  # ask(text) -> the question of --ask
    prepare: Callable = lambda: None  # called before the first reward


TASKS = {
    "countdown": Task(
        countdown_reward,
        generate=lambda rng: countdown(*countdown_problem(rng)),
        # A row of Jiayi-Pan/Countdown-Tasks-3to4. In a CSV file `nums` is text.
        read=lambda row: parse_countdown(f"{row['nums']} = {row['target']}"),
        key=lambda question: countdown_key(**question["answer"]),
        ask=lambda text: parse_countdown(text) or ungraded(text),
    ),
    "gsm8k": Task(
        gsm8k_reward,
        dataset="openai/gsm8k",
        read=read_gsm8k,
        ask=ask_for_work,
    ),
    "math": Task(
        math_reward,
        dataset="agentica-org/DeepScaleR-Preview-Dataset",
        eval_dataset="HuggingFaceH4/aime_2024",
        read=read_math,
        ask=ask_for_work,
        prepare=start_math_worker,
    ),
}


# ---- Datasets ----------------------------------------------------------------------------------

# This dataset has one split, which TinyZero cuts by position.
CUTS = {
    "Jiayi-Pan/Countdown-Tasks-3to4": {"train": "train[:327680]", "test": "train[327680:328704]"}
}


def load_splits(option: str, dataset: str) -> tuple:
    """Returns the training split of a dataset, and its test or validation split or None.

    Raises UsageError, whose message begins with `option`, if the dataset cannot be read.
    """
    import datasets  # takes seconds, and generated questions do not need it

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # errors are reported once, below
        logging.getLogger(library).setLevel(logging.CRITICAL)

    builder = Path(dataset).suffix.lower().strip(".l")  # that of .jsonl is "json"
    try:
        if builder in ("json", "csv", "parquet"):
            splits = datasets.load_dataset(builder, data_files=glob.escape(dataset))
        else:
            # GSM8K has two configurations, and so has a folder with a copy of it.
            name = "main" if dataset == "openai/gsm8k" or Path(dataset, "main").is_dir() else None
            splits = datasets.load_dataset(dataset, name, split=CUTS.get(dataset))
    except Exception as error:  # each library for a file format raises its own exceptions
        raise UsageError(
            f"{option}: cannot be read or has no rows ({error.__cause__ or error!r:.200}); "
            "try a .json, .jsonl, .csv or .parquet file, a folder of them, or a hub dataset"
        ) from error

    train = splits.get("train") or next(iter(splits.values()))
    return train, splits.get("test") or splits.get("validation")


def usable_rows(task: Task, fits: Callable, say: Callable, option: str, table) -> dict:
    """Returns `{key of the question: (table, row number)}` of the rows whose question fits.

    `say` reports rows that are left out. Raises UsageError, whose message begins with `option`, if
    a column is missing or no row is usable.
    """
    rows, unusable, too_long = {}, 0, 0
    try:
        for number, row in enumerate(table):
            question = task.read(row)
            if question is None:
                unusable += 1
            elif not fits(question):
                too_long += 1
            else:
                rows[task.key(question)] = table, number
    except (KeyError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option}: {error!r:.200} in the columns {str(table.column_names):.200}; "
            "try another --task or another dataset"
        ) from error

    count = (
        f"{option}: {len(rows):,} questions; rows left out: {unusable:,} without a usable answer, "
        f"{too_long:,} too long"
    )
    if not rows:
        raise UsageError(f"{count}; try another --task or a smaller --max_new_tokens")
    if unusable or too_long:
        say(count)
    return rows


def find_rows(dataset: str, eval_dataset: str, eval_only: bool, usable: Callable) -> tuple:
    """Returns a list of the rows to train on and a dict of those to evaluate, from usable_rows.

    `dataset` and `eval_dataset` are .json, .jsonl, .csv or .parquet files, folders or hub names.
    Evaluation uses the test or validation split of `eval_dataset`, or all of it if there is none.
    Without `eval_dataset`, it uses that split of `dataset`, or a quarter of `dataset` if there is
    none. Training rows share no key with evaluation rows. Raises UsageError if either set is empty.
    """
    evaluated = {}
    if eval_dataset:
        option = f"--eval_dataset {eval_dataset}"
        train, test = load_splits(option, eval_dataset)
        evaluated = usable(option, test or train)
    if not dataset or (evaluated and eval_only):
        return [], evaluated

    option = f"--dataset {dataset}"
    train, test = load_splits(option, dataset)
    if test and not evaluated:
        evaluated = usable(option, test)
        if eval_only:
            return [], evaluated

    rows = usable(option, train)
    evaluated = evaluated or {key: rows[key] for key in rows if is_held_out(key)}
    training = [rows[key] for key in rows if key not in evaluated]
    if not training or not evaluated:
        raise UsageError(
            f"{option}: {len(training):,} questions to train on and {len(evaluated):,} to "
            "evaluate; try a dataset with more rows or another --eval_dataset"
        )
    return training, evaluated


# ---- The questions of a run --------------------------------------------------------------------


def is_held_out(key: str) -> bool:
    """Returns whether questions with this key are for evaluation only. One key in four is.

    Unlike hash(), SHA-256 gives the same result in every process and on every machine. The byte
    must not change either: existing models were not trained on the questions that it holds out.
    """
    return hashlib.sha256(key.encode()).digest()[7] % 4 == 0


def load_questions(
    task: str,
    dataset: str,
    seed: int,
    eval_questions: int,
    eval_dataset: str = "",
    *,
    eval_only: bool = False,
    ask: str = "",
    tokenizer=None,
    template: str = "auto",
    max_new_tokens: int = 0,
    say: Callable = print,
    **_,
) -> tuple:
    """Returns the questions of a run as `(question_at, held_out)`.

    `question_at(i)` is a pure function of `seed` and i: a generated question, or entry i of endless
    passes over the training rows of find_rows. `held_out` has up to `eval_questions` questions, the
    same for every seed and never trained on. Questions whose prompt leaves no room for
    `max_new_tokens` are left out. `say` prints what is left out. With `ask`, that question is the
    only one. Raises UsageError if an option cannot work.
    """
    chosen = find_task(task)
    fits = length_check(tokenizer, template, max_new_tokens)
    if ask:
        question = chosen.ask(ask)
        if re.search("[\ud800-\udfff]", ask) or not fits(question):
            raise UsageError("--ask: too long for --max_new_tokens or not UTF-8; try less text")
        return None, [question]

    if not dataset:
        dataset, eval_dataset = chosen.dataset, eval_dataset or chosen.eval_dataset
    usable = partial(usable_rows, chosen, fits, say)
    training, evaluated = find_rows(dataset, eval_dataset, eval_only, usable)
    draw = partial(draw_question, task, fits)
    held_out = held_out_questions(chosen, evaluated, eval_questions, draw)
    if eval_only:
        return None, held_out
    return training_questions(chosen, training, evaluated, seed, draw), held_out


def held_out_questions(task: Task, evaluated: dict, count: int, draw: Callable) -> list[dict]:
    """Returns at most `count` questions from the rows `evaluated`, or `count` generated ones."""
    rng = Random("held-out")
    rows = rng.sample(list(evaluated.values()), len(evaluated))
    if rows:
        return [task.read(table[number]) for table, number in rows[:count]]

    questions = {}
    while len(questions) < count:
        question = draw(rng, True, questions)
        questions[task.key(question)] = question
    return list(questions.values())


def training_questions(task: Task, rows: list, evaluated: dict, seed: int, draw) -> Callable:
    """Returns question_at(i) over the training `rows`, or over generated ones if it is empty."""

    @lru_cache(2)  # the questions of a step may span two passes
    def order(epoch: int) -> list:
        return Random(f"{seed}/{epoch}").sample(rows, len(rows))

    def question_at(i: int) -> dict:
        if not rows:
            return draw(Random(f"{seed}/{i}"), False, evaluated)
        epoch, place = divmod(i, len(rows))
        table, number = order(epoch)[place]
        return task.read(table[number])

    question_at(0)  # raises now if there is nothing to train on
    return question_at


def draw_question(name: str, fits: Callable, rng: Random, held_out: bool, taken: dict) -> dict:
    """Generates a question that fits, is new to `taken`, and is held out exactly if `held_out`."""
    task = TASKS[name]
    for _ in range(DRAWS):
        question = task.generate(rng)
        if question and fits(question):
            key = task.key(question)
            if is_held_out(key) == held_out and key not in taken:
                return question
    raise UsageError(
        f"--task {name}: {DRAWS:,} draws gave no new question that fits; "
        f"try --eval_questions {len(taken)}, a smaller --max_new_tokens or a --dataset"
    )


def find_task(name: str) -> Task:
    """Prepares and returns a task. Raises UsageError if it is unknown or a library is missing."""
    if name not in TASKS:
        raise UsageError(f"--task {name}: not one of {', '.join(TASKS)}; try countdown")
    try:
        TASKS[name].prepare()
    except ImportError as error:
        raise UsageError(f"--task {name}: {error}") from error
    return TASKS[name]


def length_check(tokenizer, template: str, max_new_tokens: int) -> Callable:
    """Returns fits(question): whether its prompt leaves room for `max_new_tokens` tokens."""
    if tokenizer is None:
        return lambda question: True
    longest = tokenizer.model_max_length
    room = longest - max_new_tokens
    if room < 1:
        raise UsageError(
            f"--max_new_tokens {max_new_tokens}: the context length is {longest} tokens; "
            f"try {longest // 2}"
        )
    # Except for a few special tokens, a token has at least one byte, so most questions surely fit.
    enough = room - len(render_prompt(tokenizer, "", template).encode()) - 8

    def fits(question: dict) -> bool:
        text = question["question"]
        if len(text.encode()) <= enough:
            return True
        prompt = render_prompt(tokenizer, text, template)
        return len(encode(tokenizer, prompt, template, verbose=False)["input_ids"]) <= room

    return fits
