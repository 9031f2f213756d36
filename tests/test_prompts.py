"""prompts.py: templates, the Countdown generator and its held-out problems, and the loaders, on files made here."""

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import prompts
from prompts import (
    UsageError,
    countdown_problem,
    countdown_question,
    is_held_out,
    load_questions,
    reachable_targets,
    render_prompt,
)
from rewards import countdown_reward, gsm8k_reward


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and "; try " in message and message.startswith("--")
    return message


# --- prompts ---------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    )
    made.chat_template = chat_template
    return made


def test_base_template_is_tinyzeros() -> None:
    assert render_prompt(tokenizer(None), countdown_question([44, 19, 35], 98)) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
        "User: Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
        "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
        "Assistant: Let me solve this step by step.\n"
        "<think>"
    )


@pytest.mark.parametrize("opened", ["", "<think>", "<think>\n"])
def test_chat_template_gets_exactly_one_open_think(opened: str) -> None:
    question = "How many {braces} and {{ question }}?"
    template = CHATML.replace("assistant\n", "assistant\n" + opened)
    assert render_prompt(tokenizer(template), question) == (
        f"<|im_start|>system\n{prompts.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{opened or '<think>'}"
    )
    assert (
        "<think> </think>" in prompts.SYSTEM_PROMPT
        and "<answer> </answer>" in prompts.SYSTEM_PROMPT
    )
    assert render_prompt(tokenizer(None), question).count(question) == 1


# What the models' own templates come to for a system message and a question; raise_exception is transformers'.
DEEPSEEK_R1_DISTILL = (
    "{% set ns = namespace(system_prompt='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
QWEN3 = CHATML.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
)
NOT_UNLESS_TOLD = QWEN3.replace(
    "is defined and enable_thinking is false", "is not defined or enable_thinking is false"
)
NEVER = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
ALTERNATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATE + "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
)
BARE = "{{ messages[-1].content }}"  # nothing behind the question


@pytest.mark.parametrize(
    "question",
    ["What is 7 + 7?", "What does <think> do?", "7 <think>", "<think>", "<think> </think>"],
)
@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        (DEEPSEEK_R1_DISTILL, "<s>{system}<｜User｜>{question}", "<｜Assistant｜><think>\n"),
        (
            CHATML,
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}",
            "assistant\n<think>",
        ),
        (
            QWEN3,
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}",
            "assistant\n<think>",
        ),
        (NOT_UNLESS_TOLD, "<|im_start|>system\n{system}<|im_end|>\n", "assistant\n<think>"),
        (NEVER, "<|im_start|>system\n{system}<|im_end|>\n", "assistant\n<think>"),
        (GEMMA, "<s><start_of_turn>user\n{system}\n\n{question}", "<start_of_turn>model\n<think>"),
        (MISTRAL, "<s>[INST] {system}\n\n{question}", " [/INST]<think>"),
        (BARE, "{question}", "<think>"),
    ],
)
def test_the_thinking_is_opened_once(template: str, start: str, end: str, question: str) -> None:
    chat = tokenizer(template)
    chat.bos_token = "<s>"
    prompt = render_prompt(chat, question)
    assert prompt.startswith(start.format(system=prompts.SYSTEM_PROMPT, question=question))
    body = prompt.removeprefix(start.format(system=prompts.SYSTEM_PROMPT, question=question))
    assert body.endswith(end) and body.count("<think>") == 1 + (
        ("{question}" not in start) * question.count("<think>")
    )
    assert "</think>" not in body or "{question}" not in start
    assert render_prompt(chat, question, "chat") == prompt
    assert render_prompt(chat, question, "base") == prompts.BASE_TEMPLATE.format(question=question)


def test_template_option() -> None:
    plain = tokenizer(None)
    assert render_prompt(plain, "Why?", "base") == render_prompt(plain, "Why?")
    with pytest.raises(UsageError) as error:
        render_prompt(plain, "Why?", "chat")
    assert one_line(error).startswith("--template chat: ")
    with pytest.raises(UsageError) as error:
        render_prompt(tokenizer("{{ raise_exception('no\nwords') }}"), "Why?")
    assert one_line(error).startswith("--template chat: ") and "no words" in str(error.value)


# --- questions of the user -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["44 19 35 = 98", "44, 19, 35 = 98", "[44, 19, 35] = 98", " 44  19,35=98 ", "44 ,19\n35= 98"],
)
def test_a_countdown_problem_is_asked_as_one(text: str) -> None:
    assert prompts.ask_question("countdown", text) == prompts.read_countdown(
        {"target": 98, "nums": [44, 19, 35]}
    )


def test_other_questions_are_asked_as_the_task_asks() -> None:
    assert prompts.ask_question("countdown", "5 = 5")["answer"] == {"numbers": [5], "target": 5}
    assert prompts.ask_question("countdown", "2 2 = 1000")["answer"] == {
        "numbers": [2, 2],
        "target": 1000,
    }
    for text in (
        "Why?",
        "44 19 35",
        "44 19 = ",
        "1 2 = 3 = 4",
        "1.5 2 = 3",
        "-1 2 = 1",
        "",
        "= 3",
        "1 2 = " + "9" * 99,
    ):
        assert prompts.ask_question("countdown", text) == {"question": text, "answer": None}
    for task in ("gsm8k", "math"):
        asked = prompts.ask_question(task, "How many {eggs}?")
        columns = {
            "question": "How many {eggs}?",
            "problem": "How many {eggs}?",
            "answer": "#### 3",
        }
        assert asked == prompts.TASKS[task].read(columns) | {"answer": None}
    with pytest.raises(UsageError, match="^--task chess: "):
        prompts.ask_question("chess", "e4")


# --- a task of one's own ---------------------------------------------------------------------------------------------


def add(rng: random.Random) -> dict:
    a, b = rng.randrange(30), rng.randrange(30)
    return {"question": f"{a} + {b}?", "answer": {"gold": str(a + b)}}


def test_a_generated_task_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prompts.TASKS, "mine", prompts.Task(gsm8k_reward, generate=add))
    options = {
        "operands": 3,
        "operand_range": [1, 9],
        "target_range": [1, 99],
    }  # Countdown's, which main passes on
    question_at, held_out = load_questions("mine", "", 0, 150, **options)
    train = [question_at(i) for i in range(3000)]
    assert len(texts(held_out)) == len(held_out) == 150 and not texts(train) & texts(held_out)
    assert len(texts(train)) > 500  # of 900
    assert question_at(7) == train[7] and load_questions("mine", "", 1, 150)[1] == held_out
    assert load_questions("mine", "", 1, 150)[0](7) != train[7]
    assert load_questions("mine", "", 0, 150, eval_only=True) == (None, held_out)
    assert prompts.ask_question("mine", "2 + 2?") == {"question": "2 + 2?", "answer": None}
    for eval_questions, message in (
        (900, "--eval_questions 900: there are only 2"),
        (-1, "--eval_questions -1"),
    ):
        with pytest.raises(UsageError) as error:
            load_questions("mine", "", 0, eval_questions)
        assert one_line(error).startswith(message)
    with pytest.raises(UsageError) as error:
        load_questions("mine", "data.jsonl", 0, 8)
    assert one_line(error).startswith("--dataset data.jsonl: there is no such file")


def test_a_generator_of_too_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        prompts.TASKS,
        "one",
        prompts.Task(gsm8k_reward, generate=lambda rng: {"question": "1 + 1?"}),
    )
    for eval_questions in (0, 1):
        with pytest.raises(UsageError) as error:
            load_questions("one", "", 0, eval_questions)
    assert one_line(error).startswith("--task one: 1000 questions were made, and none is")


def test_a_task_of_ones_own_reads_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(row: dict) -> dict | None:
        return {"question": row["q"], "answer": {"gold": row["a"]}} if row["a"] else None

    monkeypatch.setitem(
        prompts.TASKS, "mine", prompts.Task(gsm8k_reward, columns=(("q", "a"),), read=read)
    )
    path = write(tmp_path / "data.jsonl", [{"q": f"Is it {n}?", "a": str(n)} for n in range(60)])
    question_at, held_out = load_questions("mine", path, 0, 1000)
    assert not texts([question_at(i) for i in range(60 - len(held_out))]) & texts(held_out)
    assert question_at(0)["question"] == f"Is it {question_at(0)['answer']['gold']}?"
    with pytest.raises(UsageError) as error:
        load_questions("mine", "", 0, 8)
    assert "--task mine makes no questions of its own" in one_line(error)


def test_the_example_in_the_docstring_works() -> None:
    example = prompts.__doc__.partition(":\n\n")[2].rpartition("    sys.exit")[0]
    code = (
        "import prompts, rewards\nif True:\n"
        + example
        + "    print(prompts.load_questions('double', '', 0, 64)[0](0))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(prompts.__file__).parent,
    )
    assert run.stdout.startswith("{'question': 'Twice ") and not run.stderr


# --- the Countdown generator -----------------------------------------------------------------------------------------


def brute_force(numbers: tuple[int, ...]) -> set[Fraction]:
    """All values, by merging any two of a list in every way until one is left: another method than the module's."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for place, number in enumerate(numbers) if place not in (i, j)]
        a, b = Fraction(numbers[i]), Fraction(numbers[j])
        for merged in [a + b, a - b, a * b] + ([a / b] if b else []):
            values |= brute_force((merged, *rest))
    return values


@pytest.mark.parametrize(
    "numbers",
    [
        (7,),
        (1, 1),
        (3, 5),
        (2, 4, 6),
        (1, 1, 1),
        (5, 5, 1),
        (0, 3, 4),
        (8, 8, 3, 3),
        (1, 5, 5, 5),
        (2, 3, 7, 11),
    ],
)
def test_reachable_targets_are_all_and_only_those_there_are(numbers: tuple[int, ...]) -> None:
    expected = {
        int(value) for value in brute_force(numbers) if value.denominator == 1 and value >= 0
    }
    assert reachable_targets(list(numbers)) == expected
    assert reachable_targets(numbers[::-1]) == expected


def test_reachable_targets_by_hand() -> None:
    assert reachable_targets([2, 3]) == {1, 5, 6}  # 3 - 2, 2 + 3, 2 * 3
    assert 24 in reachable_targets([3, 3, 8, 8])  # 8 / (3 - 8 / 3)
    assert 24 in reachable_targets([1, 5, 5, 5])  # 5 * (5 - 1 / 5)
    assert 98 in reachable_targets([44, 19, 35])


def test_hash_has_not_changed() -> None:
    """These decide what a model has been trained on: if one fails, old checkpoints have seen the new test problems."""
    problems = [([1, 2, 3], target) for target in range(1, 10)] + [
        ([44, 19, 35], 98),
        ([8, 7, 4], 36),
    ]
    assert [place for place, problem in enumerate(problems) if is_held_out(*problem)] == [1, 8]
    code = "import prompts; print(sum(prompts.is_held_out([a, 5, 7], t) for a in range(9) for t in range(99)))"
    counts = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(prompts.__file__).parent,
            env={"PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert counts[0] == counts[1]


def test_held_out_is_a_quarter_whatever_the_order() -> None:
    problems = [
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 10), 3)
        for target in reachable_targets(numbers)
        if 1 <= target <= 99
    ]
    assert len(problems) == 2144
    held_out = [problem for problem in problems if is_held_out(*problem)]
    assert len(held_out) >= 512 and abs(len(held_out) / len(problems) - 0.25) < 0.03
    for numbers, target in problems[::50]:
        assert (
            len({is_held_out(list(order), target) for order in itertools.permutations(numbers)})
            == 1
        )


@pytest.mark.parametrize(
    ("operands", "operand_range", "target_range", "draws"),
    [
        (2, (1, 9), (1, 99), 300),
        (3, (1, 9), (1, 99), 3000),
        (3, (1, 100), (1, 100), 100),
        (4, (1, 9), (20, 30), 60),
    ],
)
def test_problems_are_solvable_in_range_and_on_their_side(
    operands: int, operand_range: tuple[int, int], target_range: tuple[int, int], draws: int
) -> None:
    rng = random.Random(0)
    seen = {True: set(), False: set()}
    solutions: dict[tuple[int, ...], set] = {}
    for draw in range(draws):
        held_out = draw % 2 == 0
        numbers, target = countdown_problem(rng, held_out, operands, operand_range, target_range)
        key = tuple(sorted(numbers))
        if key not in solutions:
            solutions[key] = brute_force(key)
        assert len(numbers) == operands and all(
            operand_range[0] <= n <= operand_range[1] for n in numbers
        )
        assert target_range[0] <= target <= target_range[1] and target in solutions[key]
        assert is_held_out(numbers, target) == held_out
        seen[held_out].add((key, target))
    assert not seen[True] & seen[False]


def test_numbers_are_uniform_and_independent() -> None:
    rng = random.Random(0)
    drawn = [countdown_problem(rng, held_out=False)[0] for _ in range(4000)]
    for place in range(3):
        counts = Counter(numbers[place] for numbers in drawn)
        assert set(counts) == set(range(1, 10)) and all(
            350 < count < 540 for count in counts.values()
        )
    assert (
        0.27 < sum(len(set(numbers)) < 3 for numbers in drawn) / len(drawn) < 0.36
    )  # 1 - 8/9 * 7/9 = 0.31


def test_generated_questions_are_a_function_of_seed_and_place() -> None:
    question_at, held_out = load_questions("countdown", "", seed=0, eval_questions=512)
    again, held_out_again = load_questions("countdown", "", seed=1, eval_questions=512)
    assert held_out == held_out_again
    assert load_questions("countdown", "", seed=1, eval_questions=100)[1] == held_out[:100]
    late = question_at(10**9)
    assert [question_at(i) for i in (3, 0, 3)] == [question_at(3), question_at(0), question_at(3)]
    assert late == question_at(10**9)
    fresh, _ = load_questions("countdown", "", seed=0, eval_questions=0)
    assert [fresh(i) for i in range(300)] == [question_at(i) for i in range(300)]
    assert [again(i) for i in range(300)] != [question_at(i) for i in range(300)]

    def key(question: dict) -> tuple:
        return tuple(sorted(question["answer"]["numbers"])), question["answer"]["target"]

    held_out_keys = {key(question) for question in held_out}
    assert len(held_out_keys) == len(held_out) == 512
    train_keys = {key(question_at(i)) for i in range(5000)}
    assert not held_out_keys & train_keys and len(train_keys) > 1000
    for question in [*held_out[:20], question_at(0)]:
        assert question["question"] == countdown_question(**question["answer"])
        assert countdown_reward("<think></think><answer>1</answer>", **question["answer"]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operands": 1}, "--operands 1: "),
        ({"operands": 6}, "--operands 6: "),
        ({"operand_range": (0, 9)}, "--operand_range 0 9: "),
        ({"operand_range": (9, 1)}, "--operand_range 9 1: "),
        ({"operand_range": (1, 10**9)}, "--operand_range 1 1000000000: "),
        ({"operand_range": (1, 2, 3)}, "--operand_range 1 2 3: "),
        ({"target_range": (0, 99)}, "--target_range 0 99: "),
        ({"target_range": (99, 1)}, "--target_range 99 1: "),
        ({"target_range": (5,)}, "--target_range 5: "),
        (
            {"target_range": (5000, 6000)},
            "--target_range 5000 6000: no held-out problem with 3 numbers",
        ),
        (
            {"target_range": (5000, 6000), "eval_questions": 0},
            "--target_range 5000 6000: no training problem",
        ),
        ({"eval_questions": 5000}, "--eval_questions 5000: there are only 5"),
        ({"eval_questions": -1}, "--eval_questions -1: "),
        ({"task": "chess"}, "--task chess: there are countdown, gsm8k, math; try countdown"),
    ],
)
def test_options_that_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_questions(
            **{"task": "countdown", "dataset": "", "seed": 0, "eval_questions": 8} | options
        )
    assert one_line(error).startswith(message)


def test_the_number_of_eval_questions_that_is_suggested_works() -> None:
    with pytest.raises(UsageError) as error:
        load_questions("countdown", "", 0, 5000)
    suggested = int(one_line(error).rpartition("try ")[2])
    assert len(load_questions("countdown", "", 0, suggested)[1]) == suggested


# --- local files -----------------------------------------------------------------------------------------------------


def countdown_rows(count: int) -> list[dict]:
    rng = random.Random(0)
    rows = [countdown_problem(rng, held_out=place % 3 == 0) for place in range(count)]
    return [{"target": target, "nums": numbers} for numbers, target in rows]


def gsm8k_rows(count: int) -> list[dict]:
    return [
        {
            "question": f"How much is {n} + 1?",
            "answer": f"{n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1:,}",
        }
        for n in range(count)
    ]


def math_rows(count: int) -> list[dict]:
    """Rows as DeepScaleR-Preview-Dataset has them."""
    return [
        {
            "problem": f"Simplify $\\sqrt{{{n * n}}}$.",
            "answer": f"\\frac{{{n}}}{{1}}",
            "solution": "By hand.",
        }
        for n in range(1, count + 1)
    ]


def write(path: Path, rows: list[dict]) -> str:
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        datasets.Dataset.from_list([{k: str(v) for k, v in row.items()} for row in rows]).to_csv(
            path
        )
    return str(path)


def texts(questions: list[dict]) -> Counter:
    return Counter(question["question"] for question in questions)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("task", ["countdown", "gsm8k", "math"])
def test_local_file(task: str, suffix: str, tmp_path: Path) -> None:
    rows = {"countdown": countdown_rows, "gsm8k": gsm8k_rows, "math": math_rows}[task](120)
    path = write(tmp_path / f"data{suffix}", rows)
    question_at, held_out = load_questions(
        task, path, seed=0, eval_questions=1000
    )  # more than there are: all of them
    size = 120 - len(held_out)
    assert 15 < len(held_out) < 60
    expected = [prompts.TASKS[task].read(row) for row in rows]
    # Each pass has every training row once, in an order of its own; together with the held-out rows that is the file.
    passes = [[question_at(i) for i in range(start, start + size)] for start in (0, size, 7 * size)]
    for one in passes:
        assert texts(one) + texts(held_out) == texts(expected)
        assert not texts(one) & texts(held_out)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    # by seed: another order of the same training rows, the same held-out questions
    other_at, same_held_out = load_questions(task, path, seed=1, eval_questions=1000)
    other = [other_at(i) for i in range(size)]
    assert same_held_out == held_out and other != passes[0] and texts(other) == texts(passes[0])
    assert (
        load_questions(task, path, seed=1, eval_questions=10)[1]
        == load_questions(task, path, 0, 10)[1]
    )
    for question in passes[0]:
        assert question in expected


def test_rows_become_questions(tmp_path: Path) -> None:
    countdown = prompts.read_countdown({"target": 98, "nums": [44, 19, 35]})
    assert countdown == {
        "question": countdown_question([44, 19, 35], 98),
        "answer": {"numbers": [44, 19, 35], "target": 98},
    }
    assert prompts.read_countdown({"target": "98", "nums": "[44, 19, 35]"}) == countdown
    assert prompts.read_countdown({"target": 98.0, "nums": [44.0, 19.0, 35.0]}) == countdown
    gsm8k = prompts.read_gsm8k({"question": " Eggs? ", "answer": "16 - 3\n#### 1,234"})
    assert gsm8k["question"].startswith("Eggs? Show your work in <think> </think> tags.")
    assert "<answer> </answer>" in gsm8k["question"] and gsm8k["answer"] == {"gold": "1,234"}
    assert gsm8k_reward("<think></think><answer>1234</answer>", **gsm8k["answer"]) == 1.0
    assert prompts.read_gsm8k({"question": "Eggs?", "answer": 18})["answer"] == {"gold": "18"}
    assert prompts.read_gsm8k({"question": "Eggs?", "answer": "#### -$1.50"})["answer"] == {
        "gold": "-$1.50"
    }


@pytest.mark.parametrize(
    "row",
    [
        {"target": None, "nums": [1, 2]},
        {"target": "x", "nums": [1, 2]},
        {"target": 2.5, "nums": [1, 2]},
        {"target": True, "nums": [1, 2]},
        {"target": float("nan"), "nums": [1, 2]},
        {"target": float("inf"), "nums": [1, 2]},
        {"target": 10**400, "nums": [1, 2]},
        {"target": 10**10, "nums": [1, 2]},
        {"target": 3, "nums": None},
        {"target": 3, "nums": []},
        {"target": 3, "nums": [1, None]},
        {"target": 3, "nums": [1, 2.5]},
        {"target": 3, "nums": [True, 2]},
        {"target": 3, "nums": [1, -2]},
        {"target": 3, "nums": [[1], 2]},
        {"target": 3, "nums": [1] * 21},
        {"target": 3, "nums": 12},
        {"target": 3, "nums": "1, 2"},
        {"target": 3, "nums": "[1, 2"},
        {"target": 3, "nums": '{"a": 1}'},
        {"target": 3, "nums": "[" * 100_000},
    ],
)
def test_unusable_countdown_row(row: dict) -> None:
    assert prompts.read_countdown(row) is None


@pytest.mark.parametrize(
    "row",
    [
        {"question": "", "answer": "#### 18"},
        {"question": None, "answer": "#### 18"},
        {"question": "Eggs?", "answer": None},
        {"question": "Eggs?", "answer": ""},
        {"question": "Eggs?", "answer": "18 ####"},
        {"question": "Eggs?", "answer": "#### eighteen"},
        {"question": "Eggs?", "answer": "#### 1/2"},
        {"question": "Eggs?", "answer": "#### 1,23"},
        {"question": "Eggs?", "answer": "#### " + "9" * 100},
    ],
)
def test_unusable_gsm8k_row(row: dict) -> None:
    assert prompts.read_gsm8k(row) is None


def test_unusable_rows_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = countdown_rows(100)
    rows[4] = {"target": 3, "nums": []}
    rows[9] = {"target": 3, "nums": [-1, 2]}
    path = write(tmp_path / "data.jsonl", rows)
    question_at, held_out = load_questions("countdown", path, 0, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"--dataset {path}: 2 of 100 rows are damaged or have no usable answer: 5, 10"]
    every = texts([question_at(i) for i in range(98 - len(held_out))]) + texts(held_out)
    assert every == texts(
        [prompts.read_countdown(row) for row in rows if row not in (rows[4], rows[9])]
    )


def test_the_same_question_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = countdown_rows(60)
    rows += [{"target": row["target"], "nums": row["nums"][::-1]} for row in rows]
    question_at, held_out = load_questions(
        "countdown", write(tmp_path / "data.jsonl", rows), 0, 1000
    )
    train = [question_at(i) for i in range(120 - len(held_out))]
    keys = [
        {
            (*sorted(question["answer"]["numbers"]), question["answer"]["target"])
            for question in side
        }
        for side in (train, held_out)
    ]
    assert keys[0] and keys[1] and not keys[0] & keys[1]


BROKEN = {
    "missing.jsonl": (None, "no such file"),
    "notes.txt": (b"hello", "try a .jsonl, .json, .parquet, .csv file"),
    "empty.jsonl": (b"", "the file is empty"),
    "empty.json": (b"", "the file is empty"),
    "empty.csv": (b"", "the file is empty"),
    "empty.parquet": (b"", "the file is empty"),
    "blank.jsonl": (b" \n\n", "unreadable"),
    "none.json": (b"[]", "no data"),
    "header.csv": (b"target,nums\n", "no data"),
    "half.jsonl": (
        b'{"target": 3, "nums": [1, 2',
        "no row is a JSON object: Expecting ',' delimiter",
    ),
    "half.json": (b'[{"target": 3, "nums": [1, 2]}, {"target": 3, "nu', "unreadable"),
    "half.csv": (b'target,nums\n3,"[1,2]"\n4,"[1,', "line 2: unexpected end of data"),
    "half.parquet": (b"PAR1abcdefgh", "Parquet"),
    "binary.jsonl": (bytes(range(128, 256)), "unreadable"),
    "binary.csv": (bytes(range(128, 256)), "unreadable"),
    "scalars.jsonl": (b"3\n4\n", "unreadable"),
    "nulls.jsonl": (b"null\nnull\n", "no row is a JSON object"),  # pyarrow 26 would end the process
    "strings.json": (b'["a", "b"]', "no row is a JSON object"),
    "archive.jsonl": (
        gzip.compress(b'{"target": 3, "nums": [1, 2]}\n')[:-9],
        "no row is a JSON object",
    ),
    "columns.jsonl": (
        b'{"goal": 3, "numbers": [1, 2]}\n',
        "has the columns goal, numbers; --task countdown reads target and",
    ),
    "useless.jsonl": (b'{"target": 3, "nums": []}\n', "no row of 1 has a usable answer"),
    "one.jsonl": (b'{"target": 3, "nums": [1, 2]}\n', "both need some"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    capfd.readouterr()
    with pytest.raises(UsageError) as error:
        load_questions("countdown", str(tmp_path / name), 0, 8)
    assert message in one_line(error) and f"--dataset {tmp_path / name}: " in str(error.value)
    assert capfd.readouterr() == ("", "")  # nothing else on the terminal


def test_a_broken_file_is_reported_by_one_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "half.parquet"
    path.write_bytes(BROKEN["half.parquet"][0])
    code = (
        "import prompts, sys\n"
        "try: prompts.load_questions('countdown', sys.argv[1], 0, 8)\n"
        "except prompts.UsageError as error: sys.exit(str(error))"
    )
    # In a process of its own, for `datasets` logs to the stderr it finds when it is imported.
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(prompts.__file__).parent,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert (
        run.stderr.startswith(f"--dataset {path}: unreadable: Parquet magic bytes")
        and run.stderr.count("\n") == 1
    )
    assert run.returncode == 1 and not run.stdout


# --- hub datasets, with `load_dataset` replaced ----------------------------------------------------------------------


def on_the_hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict]) -> list[tuple]:
    calls = []

    def load_dataset(*args, **kwargs) -> datasets.DatasetDict:
        calls.append((args, kwargs))
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_gsm8k_has_splits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gsm8k_rows(50)
    calls = on_the_hub(monkeypatch, train=rows[:30], test=rows[30:])
    question_at, held_out = load_questions("gsm8k", "", seed=0, eval_questions=1000)
    assert calls == [(("openai/gsm8k", "main"), {})]
    assert texts(held_out) == texts([prompts.read_gsm8k(row) for row in rows[30:]])
    assert texts([question_at(i) for i in range(30)]) == texts(
        [prompts.read_gsm8k(row) for row in rows[:30]]
    )
    some = load_questions("gsm8k", "openai/gsm8k", seed=5, eval_questions=7)[1]
    assert len(texts(some)) == 7 and not texts(some) - texts(held_out)
    assert some == load_questions("gsm8k", "openai/gsm8k", seed=0, eval_questions=7)[1]


def test_a_validation_split_serves_where_there_is_no_test_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = gsm8k_rows(50)
    calls = on_the_hub(monkeypatch, validation=rows[30:], train=rows[:30])
    held_out = load_questions("gsm8k", "someone/else", seed=0, eval_questions=1000)[1]
    assert calls == [(("someone/else", None), {})]
    assert texts(held_out) == texts([prompts.read_gsm8k(row) for row in rows[30:]])


def test_tinyzeros_dataset_is_cut_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Jiayi-Pan/Countdown-Tasks-3to4"
    assert prompts.HUB_CUTS[name] == (327_680, 1_024)
    monkeypatch.setitem(prompts.HUB_CUTS, name, (40, 8))
    rows = [{"target": 100 + n, "nums": [n + 1, 99]} for n in range(60)]
    on_the_hub(monkeypatch, train=rows)
    question_at, held_out = load_questions("countdown", name, seed=0, eval_questions=1000)
    assert texts(held_out) == texts([prompts.read_countdown(row) for row in rows[40:48]])
    assert texts([question_at(i) for i in range(40)]) == texts(
        [prompts.read_countdown(row) for row in rows[:40]]
    )


def test_a_single_split_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gsm8k_rows(80)
    for split in ("train", "test", "anything"):
        on_the_hub(monkeypatch, **{split: rows})
        question_at, held_out = load_questions("gsm8k", "someone/else", seed=0, eval_questions=1000)
        train = texts([question_at(i) for i in range(80 - len(held_out))])
        assert 8 < len(held_out) < 35 and not train & texts(held_out)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\n(OfflineModeIsEnabled)"),
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'x' doesn't exist on the Hub or cannot be accessed."
        ),
        ValueError("BuilderConfig 'main' not found. Available: ['a',\n'b']"),
        RuntimeError("Dataset scripts are no longer supported, but found x.py"),
        StopIteration(),  # a dataset of empty JSON files
    ],
)
def test_hub_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args, **kwargs) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError) as usage_error:
        load_questions("gsm8k", "", 0, 8)
    assert one_line(usage_error).startswith("--dataset openai/gsm8k: ")
    assert " ".join(str(error).split()) in str(usage_error.value)


# --- mathematics, evaluation on another dataset, prompts that are too long -------------------------------------------


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"problem": "P", "answer": "\\frac{3}{4}"}, "\\frac{3}{4}"),
        ({"problem": "P", "answer": " 204 "}, "204"),
        ({"problem": "P", "answer": 204}, "204"),
        ({"problem": "P", "answer": "$\\boxed{7}$"}, "7"),
        ({"problem": "P", "answer": "", "solution": "\\boxed{7}"}, None),
        ({"problem": "P", "answer": None}, None),
        ({"problem": "P", "answer": float("nan")}, None),
        ({"problem": "P", "answer": True}, None),
        ({"problem": "P", "answer": [7]}, None),
        ({"problem": "P", "answer": "9" * 2000}, None),
        ({"problem": None, "answer": "7"}, None),
        ({"problem": ["P"], "answer": "7"}, None),
        (
            {"problem": "P", "solution": "So \\boxed{1}, no, $\\boxed{\\frac{1}{2}}$."},
            "\\frac{1}{2}",
        ),
        (
            {"problem": "P", "solution": "\\boxed{\\left\\{ 1 \\right.} and }"},
            "\\left\\{ 1 \\right.",
        ),
        ({"problem": "P", "solution": "\\boxed{1"}, None),
        ({"problem": "P", "solution": "The answer is 7."}, None),
        ({"problem": "P", "solution": "\\boxed{}"}, None),
        ({"problem": "P", "solution": None}, None),
        ({"problem": "P", "solution": "\\boxed{" * 50_000}, None),
    ],
)
def test_rows_of_mathematics(row: dict, gold: str | None) -> None:
    question = prompts.read_math(row)
    assert (question and question["answer"]) == (gold and {"gold": gold})
    assert not question or question["question"].startswith(
        "P Show your work in <think> </think> tags."
    )


# The hub's datasets, as far as their cards tell: columns, forms and splits; a few rows of each.
DEEPSCALER = {"train": math_rows(40)}
AIME_2024 = {
    "train": [
        {
            "id": n,
            "problem": f"Find $m+n+{n}$.",
            "solution": f"It is $\\boxed{{{n:03}}}$.",
            "answer": f"{n:03}",
        }
        | {"url": "https://artofproblemsolving.com/wiki", "year": "2024"}
        for n in range(60, 90)
    ]
}
MATH_500 = {
    "test": [
        {"problem": f"Compute ${n}^2$.", "solution": f"$\\boxed{{{n * n}}}$", "answer": str(n * n)}
        | {"subject": "Algebra", "level": 1, "unique_id": f"test/algebra/{n}.json"}
        for n in range(50)
    ]
}
MATH = {
    split: [
        {"problem": f"Halve ${n}$ ({split}).", "level": "Level 1", "type": "Algebra"}
        | {"solution": f"$\\boxed{{\\frac{{{n}}}{{2}}}}$"}
        for n in range(20)
    ]
    for split in ("train", "test")
}
HUB = {
    "openai/gsm8k": {"train": gsm8k_rows(30), "test": gsm8k_rows(50)[30:]},
    "agentica-org/DeepScaleR-Preview-Dataset": DEEPSCALER,
    "HuggingFaceH4/aime_2024": AIME_2024,
    "HuggingFaceH4/MATH-500": MATH_500,
    "EleutherAI/hendrycks_math": MATH,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked = []

    def load_dataset(name: str, config: str | None = None) -> datasets.DatasetDict:
        asked.append(name)
        assert config == {"openai/gsm8k": "main"}.get(name)
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in HUB[name].items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def asked_of(task: str, rows: list[dict]) -> Counter:
    return texts([prompts.TASKS[task].read(row) for row in rows])


def test_mathematics_trains_on_deepscaler_and_is_evaluated_on_aime(hub: list[str], capsys) -> None:
    question_at, held_out = load_questions("math", "", 0, 1000)
    assert texts(held_out) == asked_of("math", AIME_2024["train"]) and len(held_out) == 30
    assert texts([question_at(i) for i in range(40)]) == asked_of("math", DEEPSCALER["train"])
    assert sorted(hub) == sorted(
        ["HuggingFaceH4/aime_2024", "agentica-org/DeepScaleR-Preview-Dataset"]
    )
    assert capsys.readouterr() == ("", "")


def test_eval_dataset(hub: list[str], capsys) -> None:
    question_at, held_out = load_questions("math", "", 0, 1000, "HuggingFaceH4/MATH-500")
    assert texts(held_out) == asked_of("math", MATH_500["test"])
    assert texts([question_at(i) for i in range(40)]) == asked_of("math", DEEPSCALER["train"])
    question_at, held_out = load_questions(
        "math", "HuggingFaceH4/MATH-500", 0, 1000, "EleutherAI/hendrycks_math"
    )
    assert texts(held_out) == asked_of("math", MATH["test"])
    assert texts([question_at(i) for i in range(50)]) == asked_of("math", MATH_500["test"])
    # the same dataset twice is as if it had been named once
    name = "agentica-org/DeepScaleR-Preview-Dataset"
    once, twice = load_questions("math", name, 0, 9), load_questions("math", name, 0, 9, name)
    assert (
        once[1] == twice[1]
        and once[0](5) == twice[0](5)
        and not texts(once[1]) & texts([once[0](i) for i in range(99)])
    )
    assert (
        load_questions("gsm8k", "", 0, 9)[1] == load_questions("gsm8k", "", 0, 9, "openai/gsm8k")[1]
    )
    assert capsys.readouterr() == ("", "")


def test_what_is_evaluated_is_not_trained_on(tmp_path: Path, capsys) -> None:
    rows = countdown_rows(400)
    rows = list({prompts.countdown_key(row["nums"], row["target"]): row for row in rows}.values())
    train, other = write(tmp_path / "train.jsonl", rows), write(tmp_path / "eval.jsonl", rows[:25])
    question_at, held_out = load_questions(
        "countdown", train, 0, 9, other
    )  # however many of the 25 are asked
    rest = asked_of("countdown", rows[25:])
    assert texts([question_at(i) for i in range(len(rows) - 25)]) == rest and len(held_out) == 9
    assert (
        capsys.readouterr().err
        == f"{train}: 25 of its rows are also in the evaluation, and not trained on\n"
    )
    # problems made on the spot are not those of the file either, in whatever order
    question_at, held_out = load_questions("countdown", "", 0, 1000, other, operands=3)
    evaluated = {prompts.countdown_key(**question["answer"]) for question in held_out}
    assert len(evaluated) == 25
    assert not evaluated & {prompts.countdown_key(**question_at(i)["answer"]) for i in range(4000)}
    with pytest.raises(UsageError) as error:
        load_questions("countdown", other, 0, 9, train)
    assert one_line(error).startswith(f"--dataset {other}: the evaluation asks all its questions")


def test_eval_only(hub: list[str], tmp_path: Path, capsys) -> None:
    def evaluated(*args, **options) -> Counter:
        question_at, held_out = load_questions(*args, **options, eval_only=True)
        assert question_at is None
        return texts(held_out)

    aime, math_500 = "HuggingFaceH4/aime_2024", "HuggingFaceH4/MATH-500"
    assert evaluated("math", "", 0, 1000) == asked_of("math", AIME_2024["train"]) and hub == [aime]
    assert evaluated("math", "", 0, 1000, math_500) == asked_of(
        "math", MATH_500["test"]
    ) and hub == [aime, math_500]
    assert evaluated("math", math_500, 0, 1000) == asked_of("math", MATH_500["test"])
    assert evaluated("gsm8k", "", 0, 1000) == asked_of("gsm8k", HUB["openai/gsm8k"]["test"])
    assert capsys.readouterr() == ("", "")
    assert evaluated("math", aime, 0, 1000) == asked_of("math", AIME_2024["train"])
    assert capsys.readouterr().err == (
        f"evaluating all 30 rows of {aime}, which has no test split: "
        "a model trained on this file has seen most of them\n"
    )
    quarter = evaluated("math", aime, 0, 1000, resume="runs/one")
    assert 0 < len(quarter) < 20 and quarter == texts(load_questions("math", aime, 0, 1000)[1])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["dataset", "eval_dataset"])
def test_errors_name_the_option(option: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1, "text": "x"}\n')
    with pytest.raises(UsageError) as error:
        load_questions("math", seed=0, eval_questions=8, **{"dataset": "", option: str(path)})
    assert one_line(error) == (
        f"--{option} {path}: has the columns id, text; --task math reads problem and answer or problem and solution; "
        "try a dataset with these"
    )
    write(path, gsm8k_rows(9))
    with pytest.raises(UsageError) as error:
        load_questions("math", seed=0, eval_questions=8, **{"dataset": "", option: str(path)})
    assert one_line(error).endswith("; try --task gsm8k")


def test_mixed_types(tmp_path: Path, capsys) -> None:
    """Newer versions of datasets keep what they find, older ones refuse it: named rows, or one line."""
    rows = math_rows(80)
    for place, answer in enumerate([[1], {"a": 1}, None, True, "", 5, "x"]):
        rows[place] = {"problem": f"Odd {place}", "answer": answer, "solution": None}
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        question_at, held_out = load_questions("math", str(path), 0, 1000)
    except UsageError as error:
        assert str(error).startswith(f"--dataset {path}: unreadable: ") and "\n" not in str(error)
        return
    assert len(held_out) + len(texts([question_at(i) for i in range(75 - len(held_out))])) == 75
    assert (
        capsys.readouterr().err
        == f"--dataset {path}: 5 of 80 rows are damaged or have no usable answer: 1, 2, 3, 4, 5\n"
    )


def test_json_with_its_rows_under_data(tmp_path: Path) -> None:
    rows, path = math_rows(60), tmp_path / "data.json"
    path.write_text(json.dumps({"version": 1, "data": rows}))
    question_at, held_out = load_questions("math", str(path), 0, 1000)
    assert texts([question_at(i) for i in range(60 - len(held_out))]) + texts(held_out) == asked_of(
        "math", rows
    )


def test_a_folder_with_a_copy_of_a_hub_dataset(tmp_path: Path) -> None:
    rows = gsm8k_rows(50)
    card = "---\nconfigs:\n"
    for config in ("socratic", "main"):
        card += f"- config_name: {config}\n  data_files:\n"
        (tmp_path / "gsm8k" / config).mkdir(parents=True)
        for split, part in (("train", rows[:30]), ("test", rows[30:])):
            write(
                tmp_path / "gsm8k" / config / f"{split}-00000-of-00001.parquet",
                part if config == "main" else rows[:1],
            )
            card += f"  - split: {split}\n    path: {config}/{split}-*\n"
    (tmp_path / "gsm8k/README.md").write_text(card + "---\n")
    for folder in ("gsm8k", "gsm8k/main"):
        question_at, held_out = load_questions("gsm8k", str(tmp_path / folder), 0, 1000)
        assert texts(held_out) == asked_of("gsm8k", rows[30:])
        assert texts([question_at(i) for i in range(30)]) == asked_of("gsm8k", rows[:30])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as error:
        load_questions("gsm8k", str(tmp_path / "empty"), 0, 8)
    assert one_line(error).startswith(f"--dataset {tmp_path / 'empty'}: unreadable: ")
    with pytest.raises(UsageError) as error:
        load_questions("gsm8k", str(tmp_path / "missing"), 0, 8)
    assert "there is no such file" in one_line(error)


def test_without_a_hub(capfd) -> None:
    """HF_HUB_OFFLINE, which conftest.py sets, and no network end alike: in datasets' ConnectionError."""
    for option, given in (
        ("dataset", ("nobody/nothing",)),
        ("eval_dataset", ("", 0, 8, "nobody/nothing")),
    ):
        with pytest.raises(UsageError) as error:
            load_questions("math", *(given if len(given) > 1 else (*given, 0, 8)))
        message = one_line(error)
        assert message.startswith(
            f"--{option} nobody/nothing: could not be fetched from the Hugging Face hub ("
        )
        assert (
            f"try --{option} with a folder or file" in message
            and "default recipe, which needs nothing" in message
        )
    assert capfd.readouterr() == ("", "")


def bytes_tokenizer(model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """A token for each byte: as many as a tokenizer can make of a text. And a BOS that the base template needs."""
    vocabulary = {
        token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"])
    }
    made = Tokenizer(BPE(vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", model_max_length=model_max_length
    )


@pytest.mark.parametrize("template", ["base", "chat"])
@pytest.mark.parametrize("place", [4, 40])  # held out, and to train on
def test_a_prompt_that_is_too_long_is_left_out_and_named(
    template: str, place: int, tmp_path: Path, capfd
) -> None:
    rows = math_rows(60)
    rows[place]["problem"] = "é" * 500
    path, text = write(tmp_path / "data.jsonl", rows), bytes_tokenizer()
    text.chat_template = CHATML
    prompt = render_prompt(text, prompts.read_math(rows[place])["question"], template)
    needed = len(prompt.encode()) + (template == "base")
    options = {"tokenizer": text, "template": template, "max_new_tokens": 1024}

    def asked(**also: object) -> Counter:
        question_at, held_out = load_questions("math", path, 0, 1000, **options, **also)
        return texts(held_out) + texts([question_at(i) for i in range(200)] if question_at else [])

    text.model_max_length = needed + 1024
    assert set(asked()) == set(asked_of("math", rows)) and capfd.readouterr() == ("", "")
    text.model_max_length = needed + 1023
    said = (
        f"dataset {path}: 1 of 60 rows are left out as too long: {place + 1}; row {place + 1} makes a prompt of "
        f"{needed:,} tokens, and the model has room for {needed - 1:,} beside --max_new_tokens 1024\n"
    )
    rest = set(asked_of("math", rows[:place] + rows[place + 1 :]))
    assert set(asked()) == rest and capfd.readouterr() == ("", f"--{said}")
    assert set(asked(eval_dataset=write(tmp_path / "other.jsonl", gsm8k_as_math(9)))) > rest
    assert capfd.readouterr() == ("", f"--{said}")


def gsm8k_as_math(count: int) -> list[dict]:
    return [
        {"problem": row["question"], "answer": row["answer"].split()[-1]}
        for row in gsm8k_rows(count)
    ]


def test_where_all_prompts_are_too_long_one_is_named(hub: list[str]) -> None:
    options = {"tokenizer": bytes_tokenizer(400), "max_new_tokens": 10}
    with pytest.raises(
        UsageError, match="^--dataset openai/gsm8k: row 1 of its test split makes a prompt of"
    ):
        load_questions("gsm8k", "", 0, 8, **options)
    with pytest.raises(
        UsageError, match="^--task countdown: held-out question 1 makes a prompt of"
    ):
        load_questions("countdown", "", 0, 8, **options)
    with pytest.raises(UsageError) as error:
        load_questions("countdown", "", 0, 8, **options | {"max_new_tokens": 400})
    assert one_line(error).startswith("--max_new_tokens 400: the model reads 400 in all; try 200")


def test_a_question_made_for_training_that_is_too_long_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def question(rng: random.Random, held_out: bool) -> dict:
        long = not held_out and rng.random() < 0.5
        return {"question": f"{rng.random()}" + " long" * 300 * long, "answer": {}}

    made = prompts.Task(lambda text: 0.0, generate=question, options=("held_out",))
    monkeypatch.setitem(prompts.TASKS, "made", made)
    question_at, _ = load_questions(
        "made", "", 0, 8, tokenizer=bytes_tokenizer(1500), max_new_tokens=10
    )
    refused = []
    for i in range(40):
        try:
            assert "long" not in question_at(i)["question"]
        except UsageError as error:
            refused.append(str(error))
    assert 5 < len(refused) < 35
    for message in refused:
        assert message.startswith("--task made: a question makes a prompt of ")
        assert message.endswith("beside --max_new_tokens 10; try a smaller --max_new_tokens")


def test_only_prompts_that_may_be_too_long_are_tokenized(tmp_path: Path) -> None:
    text, calls = bytes_tokenizer(2048), []
    text.chat_template = CHATML
    apply = text.apply_chat_template
    text.apply_chat_template = lambda *args, **kwargs: calls.append(args) or apply(*args, **kwargs)
    load_questions("math", write(tmp_path / "d.jsonl", math_rows(99)), 0, 9, tokenizer=text)
    assert len(calls) <= 2


def test_importing_has_no_side_effect() -> None:
    code = "import prompts, rewards, sys; print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(prompts.__file__).parent,
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
