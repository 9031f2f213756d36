"""prompts.py: templates, the Countdown generator and its held-out problems, and the loaders, on files made here."""

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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
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
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
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
    assert "<think> </think>" in prompts.SYSTEM_PROMPT and "<answer> </answer>" in prompts.SYSTEM_PROMPT
    assert render_prompt(tokenizer(None), question).count(question) == 1


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
    [(7,), (1, 1), (3, 5), (2, 4, 6), (1, 1, 1), (5, 5, 1), (0, 3, 4), (8, 8, 3, 3), (1, 5, 5, 5), (2, 3, 7, 11)],
)
def test_reachable_targets_are_all_and_only_those_there_are(numbers: tuple[int, ...]) -> None:
    expected = {int(value) for value in brute_force(numbers) if value.denominator == 1 and value >= 0}
    assert reachable_targets(list(numbers)) == expected
    assert reachable_targets(numbers[::-1]) == expected


def test_reachable_targets_by_hand() -> None:
    assert reachable_targets([2, 3]) == {1, 5, 6}  # 3 - 2, 2 + 3, 2 * 3
    assert 24 in reachable_targets([3, 3, 8, 8])  # 8 / (3 - 8 / 3)
    assert 24 in reachable_targets([1, 5, 5, 5])  # 5 * (5 - 1 / 5)
    assert 98 in reachable_targets([44, 19, 35])


def test_hash_has_not_changed() -> None:
    """These decide what a model has been trained on: if one fails, old checkpoints have seen the new test problems."""
    problems = [([1, 2, 3], target) for target in range(1, 10)] + [([44, 19, 35], 98), ([8, 7, 4], 36)]
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
        assert len({is_held_out(list(order), target) for order in itertools.permutations(numbers)}) == 1


@pytest.mark.parametrize(
    ("operands", "operand_range", "target_range", "draws"),
    [(2, (1, 9), (1, 99), 300), (3, (1, 9), (1, 99), 3000), (3, (1, 100), (1, 100), 100), (4, (1, 9), (20, 30), 60)],
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
        assert len(numbers) == operands and all(operand_range[0] <= n <= operand_range[1] for n in numbers)
        assert target_range[0] <= target <= target_range[1] and target in solutions[key]
        assert is_held_out(numbers, target) == held_out
        seen[held_out].add((key, target))
    assert not seen[True] & seen[False]


def test_numbers_are_uniform_and_independent() -> None:
    rng = random.Random(0)
    drawn = [countdown_problem(rng, held_out=False)[0] for _ in range(4000)]
    for place in range(3):
        counts = Counter(numbers[place] for numbers in drawn)
        assert set(counts) == set(range(1, 10)) and all(350 < count < 540 for count in counts.values())
    assert 0.27 < sum(len(set(numbers)) < 3 for numbers in drawn) / len(drawn) < 0.36  # 1 - 8/9 * 7/9 = 0.31


def test_generated_questions_are_a_function_of_seed_and_place() -> None:
    question_at, held_out = load_questions("countdown", None, seed=0, eval_questions=512)
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
        ({"target_range": (5000, 6000)}, "--target_range 5000 6000: no held-out problem with 3 numbers"),
        ({"target_range": (5000, 6000), "eval_questions": 0}, "--target_range 5000 6000: no training problem"),
        ({"eval_questions": 5000}, "--eval_questions 5000: there are only 5"),
        ({"eval_questions": -1}, "--eval_questions -1: "),
        ({"task": "chess"}, "--task chess: there are countdown, gsm8k; try countdown"),
    ],
)
def test_options_that_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_questions(**{"task": "countdown", "dataset": "", "seed": 0, "eval_questions": 8} | options)
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
        {"question": f"How much is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1:,}"}
        for n in range(count)
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
        datasets.Dataset.from_list([{k: str(v) for k, v in row.items()} for row in rows]).to_csv(path)
    return str(path)


def texts(questions: list[dict]) -> Counter:
    return Counter(question["question"] for question in questions)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("task", ["countdown", "gsm8k"])
def test_local_file(task: str, suffix: str, tmp_path: Path) -> None:
    rows = {"countdown": countdown_rows, "gsm8k": gsm8k_rows}[task](120)
    path = write(tmp_path / f"data{suffix}", rows)
    question_at, held_out = load_questions(task, path, seed=0, eval_questions=1000)  # more than there are: all of them
    size = 120 - len(held_out)
    assert 15 < len(held_out) < 60
    expected = [prompts.TASKS[task]["read"](row) for row in rows]
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
    assert load_questions(task, path, seed=1, eval_questions=10)[1] == load_questions(task, path, 0, 10)[1]
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
    assert prompts.read_gsm8k({"question": "Eggs?", "answer": "#### -$1.50"})["answer"] == {"gold": "-$1.50"}


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
    assert lines == [f"{path}: 2 of 100 rows have no usable answer, the first is row 5"]
    every = texts([question_at(i) for i in range(98 - len(held_out))]) + texts(held_out)
    assert every == texts([prompts.read_countdown(row) for row in rows if row not in (rows[4], rows[9])])


def test_the_same_question_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = countdown_rows(60)
    rows += [{"target": row["target"], "nums": row["nums"][::-1]} for row in rows]
    question_at, held_out = load_questions("countdown", write(tmp_path / "data.jsonl", rows), 0, 1000)
    train = [question_at(i) for i in range(120 - len(held_out))]
    keys = [
        {(*sorted(question["answer"]["numbers"]), question["answer"]["target"]) for question in side}
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
    "half.jsonl": (b'{"target": 3, "nums": [1, 2]}\n{"target": 3, "nu', "JSON parse error"),
    "half.json": (b'[{"target": 3, "nums": [1, 2]}, {"target": 3, "nu', "unreadable"),
    "half.csv": (b'target,nums\n3,"[1,2]"\n4,"[1,', "EOF"),
    "half.parquet": (b"PAR1abcdefgh", "Parquet"),
    "binary.jsonl": (bytes(range(128, 256)), "unreadable"),
    "binary.csv": (bytes(range(128, 256)), "unreadable"),
    "scalars.jsonl": (b"3\n4\n", "unreadable"),
    "columns.jsonl": (
        b'{"goal": 3, "numbers": [1, 2]}\n',
        "has the columns goal, numbers; --task countdown reads target and",
    ),
    "useless.jsonl": (b'{"target": 3, "nums": []}\n', "0 rows to train on and 0 held out"),
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
    printed = capfd.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == (
        name == "useless.jsonl"
    )  # nothing else on the terminal


def test_a_broken_file_is_reported_by_one_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_bytes(BROKEN["half.jsonl"][0])
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
    assert run.stderr.startswith(f"--dataset {path}: unreadable: JSON parse error") and run.stderr.count("\n") == 1
    assert run.returncode == 1 and not run.stdout


# --- hub datasets, with `load_dataset` replaced ----------------------------------------------------------------------


def on_the_hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict]) -> list[tuple]:
    calls = []

    def load_dataset(*args, **kwargs) -> datasets.DatasetDict:
        calls.append((args, kwargs))
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_gsm8k_has_splits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gsm8k_rows(50)
    calls = on_the_hub(monkeypatch, train=rows[:30], test=rows[30:])
    question_at, held_out = load_questions("gsm8k", None, seed=0, eval_questions=1000)
    assert calls == [(("openai/gsm8k", "main"), {})]
    assert texts(held_out) == texts([prompts.read_gsm8k(row) for row in rows[30:]])
    assert texts([question_at(i) for i in range(30)]) == texts([prompts.read_gsm8k(row) for row in rows[:30]])
    some = load_questions("gsm8k", "openai/gsm8k", seed=5, eval_questions=7)[1]
    assert len(texts(some)) == 7 and not texts(some) - texts(held_out)
    assert some == load_questions("gsm8k", "openai/gsm8k", seed=0, eval_questions=7)[1]


def test_a_validation_split_serves_where_there_is_no_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gsm8k_rows(50)
    calls = on_the_hub(monkeypatch, validation=rows[30:], train=rows[:30])
    held_out = load_questions("gsm8k", "someone/else", seed=0, eval_questions=1000)[1]
    assert calls == [(("someone/else", None), {})]
    assert texts(held_out) == texts([prompts.read_gsm8k(row) for row in rows[30:]])


def test_tinyzeros_dataset_is_cut_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Jiayi-Pan/Countdown-Tasks-3to4"
    assert prompts.HUB_CUTS[name] == (327_680, 1_024)
    monkeypatch.setitem(prompts.HUB_CUTS, name, (40, 8))
    rows = countdown_rows(60)
    on_the_hub(monkeypatch, train=rows)
    question_at, held_out = load_questions("countdown", name, seed=0, eval_questions=1000)
    assert texts(held_out) == texts([prompts.read_countdown(row) for row in rows[40:48]])
    assert texts([question_at(i) for i in range(40)]) == texts([prompts.read_countdown(row) for row in rows[:40]])


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
        datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."),
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


def test_importing_has_no_side_effect() -> None:
    code = (
        "import prompts, rewards, sys; print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(prompts.__file__).parent
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
