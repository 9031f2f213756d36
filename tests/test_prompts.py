"""prompts.py: templates, the Countdown generator, held-out questions, and datasets in files made here."""

import ast
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import datasets
import pandas
import pytest
from conftest import byte_level_tokenizer, read_lines
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import prompts
from prompts import (
    TASKS,
    Task,
    UsageError,
    countdown,
    countdown_key,
    countdown_problem,
    is_held_out,
    load_questions,
    reachable_values,
    render_prompt,
)
from rewards import gsm8k_reward

ROOT = Path(prompts.__file__).parent


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "cache")


def refusal(*args, **options) -> str:
    """The message of the UsageError that load_questions raises."""
    with pytest.raises(UsageError) as error:
        load_questions(*args, **options)
    message = str(error.value)
    assert "\n" not in message and "; try " in message and message.startswith("--")
    return message


def python(code: str, **environment: str) -> str:
    """What the code prints in a new Python process, which must print no errors."""
    environment = os.environ | environment
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert run.stderr == ""
    return run.stdout


def numbers(questions: Iterable[dict]) -> list[int]:
    """The first number of each question, which identifies the questions of this file."""
    return sorted(int(re.search("[0-9]+", question["question"])[0]) for question in questions)


def sides(*args, **options) -> tuple[set[int], list[int]]:
    """The numbers of the training questions, from the first 900 places, and of the held-out questions."""
    question_at, held_out = load_questions(*args, **options)
    places = range(900) if question_at else ()
    return set(numbers(map(question_at, places))), numbers(held_out)


# --- prompts -------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = None, longest: int = 64) -> PreTrainedTokenizerFast:
    """One token for each byte, the most that a text can give, and a BOS token in front."""
    made = byte_level_tokenizer()
    made.bos_token = bos = "<|endoftext|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, made.eos_token_id)]
    )
    made.chat_template, made.model_max_length = chat_template, longest
    return made


def test_base_template_is_tinyzeros() -> None:
    assert render_prompt(tokenizer(), countdown([44, 19, 35], 98)["question"]) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
        "User: Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
        "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
        "Assistant: Let me solve this step by step.\n"
        "<think>"
    )


# The models' own templates, reduced to a system message and a question; raise_exception is from transformers.
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
NOT_UNLESS_TOLD = QWEN3.replace("is defined and", "is not defined or")
NEVER = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
ALTERNATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    f"{{% endif %}}{ALTERNATE}{{{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = f"{{{{ bos_token }}}}{ALTERNATE}{{{{ '[INST] ' + message['content'] + ' [/INST]' }}}}{{% endfor %}}"
BARE = "{{ messages[-1].content }}"  # nothing after the question
CLOSED = CHATML.replace("assistant\n", "assistant\n<think>no</think>\n")
# SmolLM3's template treats "/think" and "/no_think" in the system message as switches, and deletes them.
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set mode = '/think' if enable_thinking else '/no_think' %}<|im_start|>system\n"
    "{%- if messages[0].role == 'system' %}{% set system_message = messages[0].content %}"
    "{% if '/no_think' in system_message %}{% set mode = '/no_think' %}{% endif %}{% set custom_instructions "
    "= system_message.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{{ '\n## Metadata\n\nReasoning Mode: ' + mode + '\n\n## Custom Instructions\n\n' }}"
    "{% if custom_instructions %}{{ custom_instructions + '\n\n' }}{% else %}{{ 'You are SmolLM. Please use the "
    "format: <think> Thought section </think> Solution section.\n\n' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>user\n' + message.content "
    "+ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
SMOLLM3_START = (
    "<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n## Custom Instructions\n\n{system}\n\n"
    "<|im_end|>\n<|im_start|>user\n{question}"
)
# Nemotron-Nano-v2's template also does so in questions.
NEMOTRON = (
    "{% for message in messages %}{% set content = message['content'].replace('/think', '').replace('/no_think', '')"
    " %}{% if message['role'] == 'system' %}{{ '<SPECIAL_10>System\n' + content + '\n' }}{% else %}"
    "{{ '<SPECIAL_11>User\n' + content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<SPECIAL_11>Assistant\n' }}{% if '/no_think' in messages[0]['content'] %}{{ '<think></think>' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
DEEPSEEK_V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}"
    "{{ '<｜User｜>' + message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<｜Assistant｜>' }}{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}{% endif %}"
)
NO_SYSTEM = CHATML.replace("%}<", "if message.role != 'system' %}<", 1)
CHATML_START = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}"


@pytest.mark.parametrize(
    "question",
    [
        "What is 7 + 7?",
        "{braces} {{ 7 }}",
        "What does <think> do?",
        "7 <think>",
        "<think> </think>",
        "Is C:/think or C:/no_think empty?",
    ],
)
@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        (CLOSED, CHATML_START, "assistant\n<think>no</think>\n<think>"),
        (
            DEEPSEEK_R1_DISTILL,
            "<|endoftext|>{system}<｜User｜>{question}",
            "<｜Assistant｜><think>\n",
        ),
        (CHATML, CHATML_START, "assistant\n<think>"),
        (QWEN3, CHATML_START, "assistant\n<think>"),
        (NOT_UNLESS_TOLD, CHATML_START, "assistant\n<think>"),
        (NEVER, CHATML_START, "assistant\n<think>"),
        (
            GEMMA,
            "<|endoftext|><start_of_turn>user\n{system}\n\n{question}",
            "<start_of_turn>model\n<think>",
        ),
        (MISTRAL, "<|endoftext|>[INST] {system}\n\n{question}", " [/INST]<think>"),
        (BARE, "{system}\n\n{question}", "<think>"),
        (SMOLLM3, SMOLLM3_START, "assistant\n<think>"),
        (
            NEMOTRON,
            "<SPECIAL_10>System\n{system}\n<SPECIAL_11>User\n{question}",
            "\n<SPECIAL_11>Assistant\n<think>\n",
        ),
        (
            DEEPSEEK_V31,
            "<|endoftext|>{system}<｜User｜>{question}",
            "<｜Assistant｜><think>",
        ),
        (NO_SYSTEM, "<|im_start|>user\n{system}\n\n{question}", "assistant\n<think>"),
    ],
)
def test_the_thinking_is_opened_once(template: str, start: str, end: str, question: str) -> None:
    chat = tokenizer(template)
    prompt = render_prompt(chat, question)
    start = start.format(system=prompts.SYSTEM_PROMPT, question=question)
    rest = prompt.removeprefix(start)
    assert rest != prompt and rest.endswith(end)
    assert re.findall("</?think>", rest) == re.findall("</?think>", end)
    assert render_prompt(chat, question, "chat") == prompt
    assert render_prompt(chat, question, "base") == prompts.BASE_TEMPLATE.format(question=question)


# Templates that give no prompt with the question, the instruction and an open <think> at the end.
UNUSABLE = {
    "is not set": None,
    "words": "{{ raise_exception('no\nwords') }}",
    "no default": {"tool_use": CHATML, "rag": CHATML},
    "TypeError": CHATML.replace("message.content", "message.content + 7"),
    "UndefinedError": CHATML.replace("message.content", "message.parts[0].text"),
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "TemplateSyntaxError": "{% if %}",
    "drops .* the question": CHATML.replace("messages", "messages if message.role == 'system'", 1),
    "changes the question": CHATML.replace("message.content", "message.content.replace('</', '<')"),
    "or the instruction": CHATML.replace("message.content", "message.content[-20:]"),
    "end where <think> can": CHATML.replace("assistant\n", "assistant\n</think>\n"),
    # gpt-oss
    "where <think> can follow": "{% for message in messages %}{{ '<|start|>' + message.role + '<|message|>' + "
    "message.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
}


@pytest.mark.parametrize(("reason", "template"), UNUSABLE.items())
@pytest.mark.parametrize("option", ["chat", "auto"])
def test_a_chat_template_that_fails(option: str, reason: str, template: str | dict | None) -> None:
    chat, question = tokenizer(template), countdown([44, 19, 35], 98)["question"]
    if not template and option == "auto":
        return
    with pytest.raises(UsageError) as error:
        render_prompt(chat, question, option)
    assert re.fullmatch(f"--template chat: .*{reason}.*; try --template base", str(error.value))
    assert question in render_prompt(chat, question, "base")


def test_a_prompt_does_not_depend_on_the_day() -> None:
    today = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"  # Llama 3.2
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string + '\n' }}"
        '{% macro build_system_message() %}{{ strftime_now("%Y-%m-%d") }}{% endmacro %}'  # gpt-oss
        "{{ build_system_message() + '\n' + strftime_now('%B %d, %Y') + '\n' }}"  # Granite 3
    )
    prompt = render_prompt(tokenizer(today + CHATML), "Why?")
    dates = "26 Jul 2024\n2024-07-26\nJuly 26, 2024\n"
    assert prompt == dates + render_prompt(tokenizer(CHATML), "Why?")


@pytest.mark.parametrize("start", ["\n", " {% if 1 %}{% endif %}", "{{ ' ' }}"])
def test_fixing_the_date_does_not_change_the_start_of_a_prompt(start: str) -> None:
    """It adds nothing to a prompt and removes nothing."""
    messages = [
        {"role": "system", "content": prompts.SYSTEM_PROMPT},
        {"role": "user", "content": "Why?"},
    ]
    chat = tokenizer(start + CHATML)
    plain = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_prompt(chat, "Why?") == plain + "<think>"


@pytest.mark.parametrize("question", ["", " Why?\n"])
def test_a_template_may_strip_a_question(question: str) -> None:
    prompt = f"<start_of_turn>user\n{prompts.SYSTEM_PROMPT}\n\n{question}".rstrip()
    assert prompt in render_prompt(tokenizer(GEMMA), question)


def test_the_template_of_tiny_base_keeps_only_the_numbers() -> None:
    template = (ROOT / "notebooks/tiny-base/chat_template.jinja").read_text()
    for question, start in (
        (countdown([44, 19, 35], 98)["question"], "Numbers: 44 19 35 Target: 98"),
        ("Why <think>?", "Why <think>?"),
    ):
        assert render_prompt(tokenizer(template), question) == f"{start}\n<think>\n"


def test_a_chat_template_writes_the_bos_token_itself() -> None:
    for template, length in (("base", 4), ("chat", 3), ("auto", 3)):
        assert len(prompts.encode(tokenizer(CHATML), "abc", template)["input_ids"]) == length


# --- questions of the user -------------------------------------------------------------------------

PROBLEMS = "44 19 35 = 98|44, 19, 35 = 98|[44, 19, 35] = 98| 44  19,35=98.0 |44 ,19\n35= 98"
NONSENSE = "Why?|44 19 35|44 19 = |1 2 = 3 = 4|1.5 2 = 3|-1 2 = 1||= 3|[1 2 = 3|1 2 = 1234567890"


def test_a_countdown_problem_is_asked_as_one_and_any_other_text_as_it_stands() -> None:
    for text in PROBLEMS.split("|"):
        asked = load_questions("countdown", "", 0, 8, ask=text)
        assert asked == (None, [countdown([44, 19, 35], 98)])
    assert TASKS["countdown"].ask("5 = -50")["answer"] == {"numbers": [5], "target": -50}
    for text in NONSENSE.split("|"):
        assert TASKS["countdown"].ask(text) == {"question": text, "answer": None}
    assert refusal("countdown", "", 0, 8, ask="\udcff?").endswith("or not UTF-8; try less text")


def test_ask_words_a_question_as_the_dataset_of_the_task_does() -> None:
    text = "How many {eggs}?"
    for task, column in (("gsm8k", "question"), ("math", "problem")):
        row = TASKS[task].read({column: text, "answer": 3})
        assert TASKS[task].ask(text) == row | {"answer": None}


# --- the Countdown generator -------------------------------------------------------------------------


def every_value(numbers: tuple[int, int, int]) -> set[Fraction]:
    """The absolute values of all expressions of three numbers, each of them written out."""
    values = set()
    for order in itertools.permutations(map(Fraction, numbers)):
        for p, q in itertools.product("+-*/", repeat=2):
            for expression in (f"(a {p} b) {q} c", f"a {p} (b {q} c)"):
                with contextlib.suppress(ZeroDivisionError):
                    values.add(abs(eval(expression, dict(zip("abc", order)))))
    return values


def test_reachable_values_equal_those_of_all_expressions() -> None:
    for numbers in ((2, 4, 6), (1, 1, 1), (1, 5, 5), (0, 3, 4), (19, 35, 44)):
        assert reachable_values(numbers) == every_value(numbers)
    assert 24 in reachable_values((3, 3, 8, 8))  # 8 / (3 - 8 / 3)


def test_hash_has_not_changed() -> None:
    """The hash decides what a model is trained on. If it changes, old checkpoints have seen new held-out problems."""
    held_out = [n for n in range(1, 10) if is_held_out(countdown_key([2, 3, 1], n))]
    assert held_out == [2, 9] and not is_held_out(countdown_key([44, 19, 35], 98))
    code = "import prompts; print([n for n in range(99) if prompts.is_held_out(str(n))])"
    assert python(code, PYTHONHASHSEED="1") == python(code, PYTHONHASHSEED="2")


def test_a_quarter_of_the_problems_is_held_out() -> None:
    problems = [
        is_held_out(countdown_key(numbers, target))
        for numbers in itertools.combinations_with_replacement(range(1, 10), 3)
        for target in reachable_values(numbers).intersection(range(1, 100))
    ]
    assert len(problems) == 2144 and 512 <= sum(problems) < 0.28 * 2144


def test_problems_are_solvable_and_in_range() -> None:
    rng = random.Random(0)
    for operands, largest in [(2, 9), (3, 99), (4, 9), (5, 9)] * 9:
        numbers, target = countdown_problem(rng, operands, (2, largest), (8, 30))
        assert len(numbers) == operands and 2 <= min(numbers) <= max(numbers) <= largest
        assert target in reachable_values(tuple(sorted(numbers))) and target in range(8, 31)
    with pytest.raises(UsageError, match="target_range=.5000, 6000.: .*; try "):
        countdown_problem(rng, 2, target_range=(5000, 6000))


def test_numbers_are_uniform_and_independent_and_so_is_the_target() -> None:
    rng = random.Random(0)
    drawn = Counter(tuple(countdown_problem(rng, 2)[0]) for _ in range(8100))
    assert len(drawn) == 81 and set(drawn.values()) < set(range(60, 150))
    targets = Counter(countdown_problem(rng, 2, (3, 3))[1] for _ in range(3000))
    assert set(targets) == {1, 6, 9} and set(targets.values()) < set(range(900, 1100))


# --- generated questions -----------------------------------------------------------------------------


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Task:
    """A custom task whose questions are "0?" to "999?". Tests may change its fields."""

    def generate(rng: random.Random) -> dict | None:
        n = rng.randrange(1200)
        return {"question": f"{n}?", "answer": {"gold": str(n)}} if n < 1000 else None

    task = Task(gsm8k_reward, generate=generate)
    monkeypatch.setitem(TASKS, "mine", task)
    return task


def test_generated_questions_are_a_function_of_seed_and_place() -> None:
    question_at, held_out = load_questions("countdown", "", 0, 512, wandb="an option of others")
    other_at, same_held_out = load_questions("countdown", "", 1, 512)
    late = question_at(10**9)
    assert question_at(7) != other_at(7) and question_at(10**9) == late
    assert same_held_out == held_out
    assert load_questions("countdown", "", 2, 9, eval_only=True) == (None, held_out[:9])
    evaluated, trained = (
        {TASKS["countdown"].key(question) for question in questions}
        for questions in (held_out, map(question_at, range(900)))
    )
    assert len(evaluated) == 512 and all(map(is_held_out, evaluated))
    assert len(trained) > 500 and not any(map(is_held_out, trained))


def test_too_few_different_questions(mine: Task) -> None:
    message = refusal("countdown", "", 0, 5000)
    assert message.startswith("--task countdown: 10,000 draws gave no new question that fits")
    suggested = int(re.search("try --eval_questions ([0-9]+),", message)[1])
    assert len(load_questions("countdown", "", 0, suggested)[1]) == suggested > 512
    assert is_held_out("1 + 1?")  # so nothing is left to train on; then nothing at all
    for question in ({"question": "1 + 1?"}, None):
        mine.generate = lambda rng, question=question: question
        assert refusal("mine", "", 0, 1).endswith(" or a --dataset")


def test_tasks_that_cannot_work(mine: Task) -> None:
    def missing() -> None:
        raise ImportError("needs math-verify; try uv run --extra math")

    message = "--task chess: not one of countdown, gsm8k, math, mine; try countdown"
    assert refusal("chess", "", 0, 8) == message
    mine.prepare = missing
    assert refusal("mine", "", 0, 8) == "--task mine: needs math-verify; try uv run --extra math"


def test_the_example_in_the_docstring_trains(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    options = "--task harder --steps 2 --questions_per_step 2 --group_size 2 --max_new_tokens 8"
    options = f"harder.py {options} --eval_questions 4 --run_dir run --model {tiny_llama}"
    monkeypatch.setattr(sys, "argv", options.split())
    monkeypatch.setitem(TASKS, "harder", None)
    code = prompts.__doc__.partition("four numbers up to 20:\n")[2]
    with pytest.raises(SystemExit) as ended:
        exec(textwrap.dedent(code), {})
    assert ended.value.code == 0 and len(read_lines(Path("run"))) == 3
    for sample in read_lines(Path("run"), "completions.jsonl"):
        assert re.search(r"\[\d+, \d+, \d+, \d+\]", sample["question"])


def test_importing_has_no_side_effect_and_generating_needs_no_library() -> None:
    code = "import prompts, sys; prompts.load_questions('countdown', '', 0, 8); "
    code += "print({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules))"
    assert python(code) == "set()\n"


# --- files --------------------------------------------------------------------------------------------


def rows_of(task: str, count: int, start: int = 0) -> list[dict]:
    """Rows in the format of the hub datasets: TinyZero's Countdown, openai/gsm8k, DeepScaleR."""
    make = {
        "countdown": lambda n: {"target": n, "nums": [n, 1, 1]},
        "gsm8k": lambda n: {"question": f"{n}?", "answer": f"{n} = <<{n}>>\n#### {n:,}"},
        "math": lambda n: {"problem": f"${n}$?", "answer": f"\\frac{{{n}}}{{1}}", "solution": ""},
    }
    return [make[task](n) for n in range(start, start + count)]


def write(name: str, rows: list[dict]) -> str:
    """Writes a file, and returns its name."""
    frame, path = pandas.DataFrame(rows), Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return name


@pytest.mark.parametrize("name", ["data.jsonl", "data.JSON", "data.parquet", "data[1].csv"])
@pytest.mark.parametrize("task", ["countdown", "gsm8k", "math"])
def test_a_file(task: str, name: str, capfd: pytest.CaptureFixture) -> None:
    path = write(name, rows_of(task, 120))
    question_at, held_out = load_questions(task, path, seed=0, eval_questions=1000)
    assert capfd.readouterr() == ("", "")
    assert 15 < len(held_out) < 60
    assert all(is_held_out(TASKS[task].key(question)) for question in held_out)
    # Each pass has every training row once, in its own order. With the held-out rows, that is the whole file.
    size = 120 - len(held_out)
    passes = [[question_at(i + size * n) for i in range(size)] for n in (0, 1, 7)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert all(numbers(one + held_out) == list(range(120)) for one in passes)
    # Another seed gives another order and the same held-out questions.
    other_at, some = load_questions(task, path, seed=1, eval_questions=10)
    assert [other_at(i) for i in range(size)] != passes[0] and some == held_out[:10]
    # --eval_only asks the questions that training has held out.
    assert load_questions(task, path, 0, 1000, eval_only=True) == (None, held_out)


# Rows as in a .jsonl file -> the answers that are read from them; null: the row is not usable.
ROWS = r"""
countdown {"target": 98, "nums": [44, 19, 35]} -> {"numbers": [44, 19, 35], "target": 98}
countdown {"target": "98", "nums": "[44, 19, 35]"} -> {"numbers": [44, 19, 35], "target": 98}
countdown {"target": 98.0, "nums": [44.0, 19.0, 35.0]} -> {"numbers": [44, 19, 35], "target": 98}
gsm8k {"question": " Eggs? ", "answer": "16 - 3\n#### 1,234"} -> {"gold": "1,234"}
gsm8k {"question": "Eggs?", "answer": 18} -> {"gold": "18"}
gsm8k {"question": "Eggs?", "answer": "#### -$1.50"} -> {"gold": "-$1.50"}
math {"problem": "Eggs?", "answer": "\\frac{3}{4}"} -> {"gold": "\\frac{3}{4}"}
math {"problem": "Eggs?", "answer": " 204 ", "solution": "204"} -> {"gold": "204"}
math {"problem": "Eggs?", "answer": 0} -> {"gold": "0"}
math {"problem": "Eggs?", "answer": "$\\boxed{7}$", "solution": null} -> {"gold": "7"}
math {"problem": "Eggs?", "solution": "So \\boxed{1}, no, $\\boxed{\\frac{1}{2}}$."} -> {"gold": "\\frac{1}{2}"}
countdown {"target": null, "nums": [1, 2]} -> null
countdown {"target": "x", "nums": [1, 2]} -> null
countdown {"target": 2.5, "nums": [1, 2]} -> null
countdown {"target": true, "nums": [1, 2]} -> null
countdown {"target": NaN, "nums": [1, 2]} -> null
countdown {"target": Infinity, "nums": [1, 2]} -> null
countdown {"target": 1e30, "nums": [1, 2]} -> null
countdown {"target": 3, "nums": null} -> null
countdown {"target": 3, "nums": []} -> null
countdown {"target": 3, "nums": [1, null]} -> null
countdown {"target": 3, "nums": [1, 2.5]} -> null
countdown {"target": 3, "nums": [1, -2]} -> null
countdown {"target": 3, "nums": [[1], 2]} -> null
countdown {"target": 3, "nums": "[1, 2"} -> null
gsm8k {"question": "", "answer": "#### 18"} -> null
gsm8k {"question": null, "answer": "#### 18"} -> null
gsm8k {"question": "Eggs?", "answer": null} -> null
gsm8k {"question": "Eggs?", "answer": ""} -> null
gsm8k {"question": "Eggs?", "answer": "18 ####"} -> null
gsm8k {"question": "Eggs?", "answer": "#### eighteen"} -> null
gsm8k {"question": "Eggs?", "answer": "#### 1/2"} -> null
gsm8k {"question": "Eggs?", "answer": "#### 1,23"} -> null
math {"problem": null, "answer": "7"} -> null
math {"problem": "Eggs?", "answer": null} -> null
math {"problem": "Eggs?", "answer": NaN} -> null
math {"problem": "Eggs?", "answer": ""} -> null
math {"problem": "Eggs?", "answer": "", "solution": "\\boxed{7}"} -> null
math {"problem": "Eggs?", "answer": "</answer>"} -> null
math {"problem": "Eggs?", "solution": null} -> null
math {"problem": "Eggs?", "solution": "\\boxed{1"} -> null
math {"problem": "Eggs?", "solution": "It is 7."} -> null
math {"problem": "Eggs?", "solution": "\\boxed{}"} -> null
"""


@pytest.mark.parametrize("line", ROWS.strip().split("\n"))
def test_a_row_becomes_a_question(line: str) -> None:
    task, row, answer = re.fullmatch("(.*?) (.*) -> (.*)", line).groups()
    question = TASKS[task].read(json.loads(row))
    assert (question and question["answer"]) == json.loads(answer)


def test_rows_that_are_left_out_are_counted_in_a_line(capsys: pytest.CaptureFixture) -> None:
    rows = rows_of("countdown", 100)
    rows[98]["nums"], rows[99]["target"] = [], None
    trained, held_out = sides("countdown", write("data.jsonl", rows), 0, 1000)
    said = "98 questions; rows left out: 2 without a usable answer, 0 too long"
    assert capsys.readouterr() == (f"--dataset data.jsonl: {said}\n", "")
    assert trained | set(held_out) == set(range(98))


@pytest.mark.parametrize(("path", "evaluated"), [("data/train.jsonl", 11), ("data", 9)])
def test_questions_are_distinct_on_both_sides(path: str, evaluated: int) -> None:
    rows = rows_of("countdown", 60)
    rows += [row | {"nums": row["nums"][::-1]} for row in rows]
    write("data/train.jsonl", rows)
    write("data/test.jsonl", rows[:9] + rows[60:69])
    question_at, held_out = load_questions("countdown", path, 0, 1000)
    every = [question_at(i) for i in range(60 - evaluated)] + held_out
    assert len({countdown_key(**question["answer"]) for question in every}) == len(every) == 60


# The name of a file | its content | a part of the message.
BROKEN = r"""
notes.txt | b'hello' | try a .json, .jsonl, .csv or .parquet file
empty.jsonl | b'' | has no rows
empty.csv | b'' | No columns
empty.parquet | b'' | 0 bytes
blank.jsonl | b' \n\n' | no data
none.json | b'[]' | no data
header.csv | b'target,nums\n' | no data
half.jsonl | b'{"target": 3, "nums": [1, 2' | JSON parse error
half.json | b'[{"target": 3, "nums": [1, 2]}' | ValueError
half.csv | b'target,nums\n3,"[1,2]"\n4,"[1,' | EOF inside string starting at row 2
half.parquet | b'PAR1abcdefgh' | Parquet
line.jsonl | b'{"target": 3}\n{"target": 3}\noops\n{"target": 3}\n' | in row 2
scalars.jsonl | b'3\n4\n' | JSON parse error
utf16.csv | b'\xff\xfet\x00a\x00' | UnicodeDecodeError
latin.jsonl | b'{"target": 3, "nums": "\xff"}' | UnicodeDecodeError
packed.jsonl | b'\x04\x22\x4d\x18abcd' | pip install
packed.json | b'PK\x03\x04abcd' | BadZipFile
columns.jsonl | b'{"a": 3, "b": [1, 2]}' | KeyError('nums') in the columns ['a', 'b']
useless.jsonl | b'{"target": 3, "nums": []}' | 0 questions; rows left out: 1 without a usable
missing.jsonl | None | Unable to find
short.jsonl | b'\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xabV*I,JO' | EOFError
corrupt.jsonl | b'\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xff\xff\xff\xff' | Error -3
corrupt.csv | b'\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F\x02\x00!\x01\x16\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff' | LZMAError
one.jsonl | b'{"target": 3, "nums": [1, 2]}' | 1 questions to train on and 0 to evaluate
"""


@pytest.mark.parametrize("line", BROKEN.strip().split("\n"))
def test_a_broken_file(line: str, capfd: pytest.CaptureFixture) -> None:
    name, content, reason = line.split(" | ")
    if content != "None":
        Path(name).write_bytes(ast.literal_eval(content))
    message = refusal("countdown", name, 0, 8)
    assert message.startswith(f"--dataset {name}: ") and reason in message
    assert refusal("gsm8k", "", 0, 8, name).startswith(f"--eval_dataset {name}: ")
    assert capfd.readouterr() == ("", "")  # nothing else on the terminal


def test_a_broken_file_is_reported_by_one_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text("{")
    code = f"try: prompts.load_questions('countdown', {str(path)!r}, 0, 8)\n"
    code = f"import prompts\n{code}except prompts.UsageError as error: print(error)"
    # In a process of its own, because `datasets` logs to the stderr that it finds when it is imported.
    printed = python(code, HF_DATASETS_CACHE=str(tmp_path))
    assert printed.startswith(f"--dataset {path}: cannot be read ") and printed.count("\n") == 1


# --- splits and hub datasets ----------------------------------------------------------------------------


def test_a_folder_with_splits() -> None:
    write("data/train.jsonl", rows_of("gsm8k", 30))
    for split, start in (("validation", 30), ("test", 40)):
        write(f"data/{split}.jsonl", rows_of("gsm8k", 10, start))
        evaluated = list(range(start, start + 10))
        assert sides("gsm8k", "data", 0, 99) == (set(range(30)), evaluated)
    write("data/train.jsonl", [{"question": "", "answer": ""}])  # an evaluation does not need it
    assert sides("gsm8k", "data", 0, 99, eval_only=True) == (set(), evaluated)


def stand_in(name: str, configurations: dict[str, dict[str, list[dict]]]) -> None:
    """Makes a folder named like a hub dataset, which `datasets` reads instead: `{configuration: {split: rows}}`."""
    card = []
    for configuration, splits in configurations.items():
        files = []
        for split, rows in splits.items():
            write(f"{name}/{configuration}/{split}.jsonl", rows)
            files.append({"split": split, "path": f"{configuration}/{split}.jsonl"})
        card.append({"config_name": configuration, "data_files": files})
    Path(name, "README.md").write_text(f"---\n{json.dumps({'configs': card})}\n---\n")


def test_the_hub_datasets_of_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    main = {"train": rows_of("gsm8k", 30), "test": rows_of("gsm8k", 10, 30)}
    stand_in("openai/gsm8k", {"main": main, "socratic": {"train": rows_of("gsm8k", 9, 90)}})
    for dataset in ("", os.path.abspath("openai/gsm8k")):  # a folder with a copy of it
        assert sides("gsm8k", dataset, 0, 99) == (set(range(30)), list(range(30, 40)))
    name = "Jiayi-Pan/Countdown-Tasks-3to4"
    assert {name: {"train": "train[:327680]", "test": "train[327680:328704]"}} == prompts.CUTS
    monkeypatch.setitem(prompts.CUTS, name, {"train": "train[:40]", "test": "train[40:48]"})
    stand_in(name, {"default": {"train": rows_of("countdown", 60)}})
    assert sides("countdown", name, 0, 99) == (set(range(40)), list(range(40, 48)))
    stand_in("a/b", {"default": {"any": rows_of("gsm8k", 80)}})  # a single split is divided
    trained, held_out = sides("gsm8k", "a/b", 0, 99)
    assert 8 < len(held_out) < 35 and sorted([*trained, *held_out]) == list(range(80))


def test_without_a_hub(capfd: pytest.CaptureFixture) -> None:
    """HF_HUB_OFFLINE and a missing network both end in the ConnectionError of datasets."""
    message = refusal("math", "nobody/nothing", 0, 8)
    assert message.startswith("--dataset nobody/nothing: cannot be read or has no rows (Connection")
    assert capfd.readouterr() == ("", "")


# --- evaluation on another dataset ------------------------------------------------------------------------


def test_mathematics_is_evaluated_on_another_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TASKS["math"].dataset == "agentica-org/DeepScaleR-Preview-Dataset"
    assert TASKS["math"].eval_dataset == "HuggingFaceH4/aime_2024"
    here = replace(TASKS["math"], dataset="train.jsonl", eval_dataset="aime.jsonl")
    monkeypatch.setitem(TASKS, "math", here)
    write("train.jsonl", rows_of("math", 40))
    write("aime.jsonl", rows_of("math", 20, 40))
    write("500/test.jsonl", rows_of("math", 20, 60))
    write("500/train.jsonl", rows_of("math", 20, 80))
    aime, math_500 = list(range(40, 60)), list(range(60, 80))
    assert sides("math", "", 0, 99) == (set(range(40)), aime)
    assert sides("math", "", 0, 99, "500") == (set(range(40)), math_500)
    # --eval_only does not read the training data.
    here.dataset = "missing.jsonl"
    assert sides("math", "", 0, 99, eval_only=True) == (set(), aime)


def test_what_is_evaluated_is_not_trained_on(mine: Task) -> None:
    write("all.jsonl", rows_of("gsm8k", 99))
    write("some.jsonl", rows_of("gsm8k", 25))
    trained, held_out = sides("gsm8k", "all.jsonl", 0, 9, "some.jsonl")  # 9 are evaluated
    assert trained == set(range(25, 99)) and len(held_out) == 9
    assert " 0 questions to train on" in refusal("gsm8k", "some.jsonl", 0, 9, "all.jsonl")
    # Generated questions do not repeat those of the file either.
    mine.read = lambda row: {"question": row["question"], "answer": {}}
    trained, held_out = sides("mine", "", 0, 9, "some.jsonl")
    assert len(trained) > 300 and not trained & set(range(25)) and set(held_out) < set(range(25))


# --- prompts that are too long ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["base", "chat"])
def test_a_prompt_that_is_too_long_is_left_out(template: str) -> None:
    rows, text, said = rows_of("math", 60), tokenizer(CHATML), []
    for row in rows[:20]:  # some to train on, some held out
        row["problem"] += "é" * 500
    write("data.jsonl", rows)
    prompt = render_prompt(text, TASKS["math"].read(rows[10])["question"], template)
    needed = len(prompts.encode(text, prompt, template, verbose=False)["input_ids"])
    options = {"tokenizer": text, "template": template, "max_new_tokens": 99, "say": said.append}
    for longest, left_out in ((needed + 99, set()), (needed + 98, set(range(10, 20)))):
        text.model_max_length = longest
        trained, held_out = sides("math", "data.jsonl", 0, 99, **options)
        assert trained | set(held_out) == set(range(60)) - left_out
    [line] = said
    assert " 50 questions; rows left out: 0 without a usable answer, 10 too long" in line
    message = refusal("math", "", 0, 1, ask=rows[10]["problem"], **options)
    assert message.startswith("--ask: too long for --max_new_tokens ")


def test_where_no_prompt_fits() -> None:
    options = {"tokenizer": tokenizer(longest=400)}
    message = refusal("gsm8k", write("data.jsonl", rows_of("gsm8k", 9)), 0, 8, **options)
    assert "0 questions; rows left out: 0 without a usable answer, 9 too long; try " in message
    message = refusal("gsm8k", "data.jsonl", 0, 8, max_new_tokens=400, **options)
    assert message == "--max_new_tokens 400: the context length is 400 tokens; try 200"


def test_a_generated_question_that_is_too_long_is_drawn_again(mine: Task) -> None:
    mine.generate = lambda rng: {"question": "7" * rng.randrange(999)}
    text = tokenizer(longest=800)
    question_at, held_out = load_questions("mine", "", 0, 40, tokenizer=text)
    for asked in (*held_out, *map(question_at, range(40))):
        assert len(render_prompt(text, asked["question"])) < 800


def test_only_prompts_that_may_be_too_long_are_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "encode", None)
    path = write("data.jsonl", rows_of("math", 99))
    load_questions("math", path, 0, 9, tokenizer=tokenizer(CHATML, 2048))
