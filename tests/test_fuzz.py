"""Whatever stands in a file, on the command line or in a completion: a result, or one line that says what is wrong.

Each property has a short form, always of the same examples, and a long one, ten minutes in all:

    uv run pytest -m study tests/test_fuzz.py

Time limits are of CPU time, for on a busy machine any wall clock is late; what is computed in a process of its own, as
some of math_reward is, test_rewards.py holds to the wall clock.
"""

import csv
import dataclasses
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from itertools import count
from pathlib import Path
from typing import get_type_hints

import datasets
import pytest
import torch
from conftest import byte_level_tokenizer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import R1ZeroTrain
from prompts import TASKS, UsageError, load_questions, render_prompt
from R1ZeroTrain import Config, parse_config
from rewards import evaluation, format_reward, sparkline, table


@pytest.fixture(
    params=[pytest.param(0, id="short"), pytest.param(75, id="long", marks=pytest.mark.study)]
)
def fuzz(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """fuzz(check, values, examples, share=1) checks so many values, and in the long form others for share·75 s more.

    None of them may take a second of this process's time.
    """

    def run(
        check: Callable[[object], None], values: st.SearchStrategy, examples: int, share: float = 1
    ) -> None:
        tried, began = 0, time.monotonic()

        def timed(value: object) -> None:
            nonlocal tried
            tried, start = tried + 1, time.process_time()
            check(value)
            assert time.process_time() - start < 1.0

        unhurried = settings(
            deadline=None,
            max_examples=examples,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        for number in count():
            seed(number)(unhurried(given(values)(timed)))()
            capsys.readouterr()  # rows that were left out are said on stderr
            if time.monotonic() - began >= share * request.param:
                break
        if request.param:
            with capsys.disabled():
                print(
                    f"\n{request.node.name}: {tried:,} examples in {time.monotonic() - began:.0f} s"
                )

    return run


def usage_error(call: Callable[[], object]) -> str | None:
    """The message of call's UsageError, None if it raises none. Everything else that is raised fails the test."""
    try:
        call()
    except UsageError as error:
        assert "; try " in str(error)
        return str(error)
    return None


# --- datasets --------------------------------------------------------------------------------------------------------

GOOD = {
    "countdown": [{"nums": [n % 7 + 1, n % 9 + 1, n], "target": n} for n in range(40)],
    # U+2028 ends a line for str.splitlines, and not for JSON
    "gsm8k": [
        {"question": f"What is\u2028{n} + 1?", "answer": f"so it is\n#### {n + 1:,}"}
        for n in range(40)
    ],
    "math": [{"problem": f"Halve ${n}$.", "answer": f"\\frac{{{n}}}{{2}}"} for n in range(40)],
}
task_names = st.sampled_from(list(TASKS))

any_text = st.text(st.characters(codec=None), max_size=20)
numbers = st.one_of(
    st.integers(), st.integers(-9, 99), st.just(10**400), st.floats(), st.decimals()
)
plausible = st.sampled_from(
    [
        "#### 7",
        "[1, 2]",
        "3.0",
        "1,23",
        "NaN",
        "nan",
        "\\boxed{5}",
        "\\boxed{",
        "$",
        "x",
        "</answer>",
        "<think>",
    ]
    + [
        "\\text{ }",
        "5" * 45,
        "x+" * 200 + "1",
        "\\ud800",
        "\ud800",
        "\0",
        " ",
        "#### -$1,000.50%",
        "[" * 199,
    ]
)
cells = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        numbers,
        any_text,
        plausible,
        st.binary(max_size=9),
        st.just(date(2025, 1, 1)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=3)
    ),
    max_leaves=6,
)
json_cells = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text, plausible),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=3)
    ),
    max_leaves=6,
)
# Bytes that mean something to one of the readers, or to what they read with.
bits = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [
            b"\n",
            b"\r",
            b'"',
            b'\\"',
            b",",
            b"{",
            b"}",
            b"[",
            b"]",
            b"null",
            b"NaN",
            b"-Infinity",
            b"1e999",
            b"\0",
        ]
        + [
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"PK\x03\x04",
            b"\x1f\x8b\x08",
            b"PAR1",
            b"9" * 5000,
            b"[" * 5000,
            b'{"a":' * 2000,
        ]
        + [b"\\ud800", b'{"data": ', b"\xe2\x80\xa8", b'{"nums": [1, 2], "target": 3}\n']
    ),
)


def earned(task: str, question: dict) -> bool:
    """Whether the reward pays for the answer itself, as a row's answer that nobody can earn is none."""
    if task == "countdown":
        return True  # not every problem has a solution
    gold = question["answer"]["gold"]
    return TASKS[task].reward(f"<think></think><answer>{gold}</answer>", gold) == 1.0


def test_any_row_is_none_or_a_question_that_can_be_earned(fuzz: Callable[..., None]) -> None:
    def check(case: tuple[str, object, object]) -> None:
        task, *values = case
        for columns in TASKS[task].columns:
            question = TASKS[task].read(dict(zip(columns, values, strict=True)))
            if question is not None:
                question["question"].encode()
                assert earned(task, question), question

    fuzz(check, st.tuples(task_names, cells | plausible, cells | plausible), 1000)


def as_bytes(suffix: str, rows: list) -> bytes:
    if suffix == ".csv":
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode(errors="surrogatepass")
    text = (
        json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return text.encode()


@st.composite
def files(draw: st.DrawFn, suffixes: tuple[str, ...]) -> tuple[str, str, bytes]:
    """A task, a suffix, and what such a file holds: odd rows among good ones, then odd bytes among those."""
    task, suffix = draw(task_names), draw(st.sampled_from(suffixes))
    rows: list = list(GOOD[task])
    if suffix == ".parquet":
        content = (datasets.Dataset.from_list(rows), io.BytesIO())
        content[0].to_parquet(content[1])
        content = content[1].getvalue()
    else:
        names = st.sampled_from([*rows[0], "other"])
        odd = st.dictionaries(names, json_cells)
        for row in draw(st.lists(odd if suffix == ".csv" else odd | json_cells, max_size=5)):
            rows.insert(draw(st.integers(0, len(rows))), row)
        content = as_bytes(suffix, rows if draw(st.booleans()) else rows[40:] or rows)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.sampled_from([start, start + 1, start + 30, len(content)]))
        content = content[:start] + draw(bits) + content[end:]
    return task, suffix, content


def keys(task: str, questions: list[dict]) -> set[str]:
    return {TASKS[task].key(question) for question in questions}


def check_loaded(task: str, path: Path) -> None:
    """One line that names the file, or questions that are whole and on one side."""

    def load() -> None:
        question_at, held_out = load_questions(task, str(path), 0, 1000)
        train = [question_at(i) for i in range(60)]
        assert not keys(task, train) & keys(task, held_out)
        for question in train + held_out:
            question["question"].encode()
            assert earned(task, question)

    message = usage_error(load)
    if message is not None:
        assert (
            message.startswith(f"--dataset {path}: ")
            and message.isprintable()
            and len(message) < 600
        )


@pytest.fixture
def _cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("suffixes", "examples"), [((".jsonl", ".json", ".csv"), 300), ((".parquet",), 60)]
)
@pytest.mark.usefixtures("_cache_in_tmp")
def test_any_file_is_refused_in_a_line_or_read(
    suffixes: tuple[str, ...], examples: int, fuzz: Callable[..., None], tmp_path: Path
) -> None:
    numbers = count()

    def check(case: tuple[str, str, bytes]) -> None:
        task, suffix, content = case
        path = (
            tmp_path / f"{next(numbers)}{suffix}"
        )  # datasets would find one of an old name in its cache
        path.write_bytes(content)
        check_loaded(task, path)
        path.unlink()

    fuzz(check, files(suffixes), examples)


def test_a_damaged_line_costs_no_other(fuzz: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"

    def check(case: tuple[str, int, bytes]) -> None:
        task, place, line = case
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in GOOD[task]]
        path.write_bytes(b"\n".join([*lines[:place], line, *lines[place:]]))
        question_at, held_out = load_questions(task, str(path), 0, 1000)
        found = keys(task, held_out + [question_at(i) for i in range(41)])
        assert found >= keys(task, [TASKS[task].read(row) for row in GOOD[task]])
        assert len(found) <= 41

    line = st.one_of(
        bits, st.lists(bits, max_size=4).map(b"".join), json_cells.map(json.dumps).map(str.encode)
    )
    damaged = line.map(lambda line: line.replace(b"\n", b"").replace(b"\r", b""))
    fuzz(check, st.tuples(task_names, st.integers(1, 39), damaged), 200, share=0.5)


names_of_files = st.one_of(
    any_text.map(lambda text: "a" + text.replace("/", "") + ".jsonl"),
    st.sampled_from(
        [
            "[1].jsonl",
            "*.csv",
            "[1].parquet",
            "**.json",
            "x::y.jsonl",
            "{a}.csv",
            "-.jsonl",
            "%s.csv",
        ]
    ),
)


@pytest.mark.usefixtures("_cache_in_tmp")
def test_any_name_of_a_file(fuzz: Callable[..., None], tmp_path: Path) -> None:
    """A name that can be given to a file is no pattern; one that no file has is refused in a line."""
    rows = GOOD["gsm8k"]

    def check(case: tuple[str, bool]) -> None:
        name, there = case
        path = f"{tmp_path}/{name}"
        if there and "\0" not in name and len(os.fsencode(name.encode(errors="replace"))) < 200:
            path = f"{tmp_path}/{name.encode(errors='replace').decode()}"
            content = as_bytes(Path(path).suffix, rows)
            if path.endswith(".parquet"):
                datasets.Dataset.from_list(rows).to_parquet(path)
            else:
                Path(path).write_bytes(content)
            assert len(load_questions("gsm8k", path, 0, 1000)[1]) < 40
            os.remove(path)
        message = usage_error(lambda: load_questions("gsm8k", path, 0, 8))
        assert message.startswith(f"--dataset {path}: there is no such file")

    names = names_of_files | st.integers(1, 5000).map(lambda size: "x" * size + ".jsonl")
    fuzz(check, st.tuples(names, st.booleans()), 60, share=0.5)


def test_any_question_typed_by_the_user(fuzz: Callable[..., None]) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.model_max_length, tokenizer.chat_template = 1024, "{{ messages[-1].content }}\n"

    def check(case: tuple[str, str, str]) -> None:
        task, text, template = case
        options = {"tokenizer": tokenizer, "template": template, "max_new_tokens": 8, "ask": text}
        try:
            _, [question] = load_questions(task, "", 0, 8, **options)
        except UsageError as error:
            assert str(error).startswith("--ask") and "; try " in str(error)
            return
        ids = tokenizer(render_prompt(tokenizer, question["question"], template))["input_ids"]
        assert len(ids) <= 1024 - 8 and text.strip() in tokenizer.decode(ids) or question["answer"]

    asked = any_text | st.sampled_from(
        ["8 7 4 = 36", "{question}", "{{ 7 }}", "{0}", "%s", "<think>", "\udcff?", "a" * 10**5]
    )
    fuzz(check, st.tuples(task_names, asked, st.sampled_from(["base", "chat"])), 100, share=0.25)


# --- the command line and what a run has saved -----------------------------------------------------------------------

FIELDS = {field.name: getattr(Config(), field.name) for field in dataclasses.fields(Config)}
BOUNDS = {
    name: kind.__metadata__[0]
    for name, kind in get_type_hints(Config, include_extras=True).items()
    if hasattr(kind, "__metadata__")
}
options = st.sampled_from([*FIELDS, "no_such_option", "", "step", "no_wandb"]).map(
    lambda name: f"--{name}"
)
odd_words = st.one_of(
    st.sampled_from(
        [
            "nan",
            "inf",
            "-inf",
            "1e999",
            "-1",
            "-0.0",
            "1_0",
            "0x10",
            "9" * 5000,
            "9" * 400,
            "٣",
            "1 2",
            "true",
            "%s",
            "@x",
        ]
        + [
            "%(default)s",
            "{}",
            "--",
            "---",
            "-",
            "--=",
            "=",
            "\n",
            "\0",
            "\udcff",
            "a" * 5000,
            "tiny",
            "gsm8k",
            "cpu",
            "1.5",
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    any_text,
)
words = st.one_of(options, options.map(lambda name: name.replace("_", "-")), odd_words)
command_lines = st.one_of(
    st.lists(words, max_size=6),
    st.tuples(options, odd_words).map(list),
    st.tuples(options, odd_words).map(lambda pair: ["=".join(pair)]),
).filter(lambda line: not {"-h", "--help"} & set(line))


def assert_within_bounds(cfg: Config) -> None:
    assert {name: type(value) for name, value in vars(cfg).items() if name in BOUNDS} == {
        name: type(FIELDS[name]) for name in BOUNDS
    }
    assert all(low <= getattr(cfg, name) <= high for name, (low, high) in BOUNDS.items())


def test_any_command_line_is_refused_in_a_line_or_has_options_in_range(
    fuzz: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(
        lambda line: usage_error(lambda: assert_within_bounds(parse_config(line))),
        command_lines,
        300,
    )


@pytest.mark.parametrize("line", [["--operands=--"], ["--recipe=--"], ["--model=--"]])
def test_two_dashes_are_no_value(line: list[str]) -> None:
    """argparse makes an empty list of them."""
    assert usage_error(lambda: parse_config(line)).startswith(line[0].removesuffix("=--"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has been saved after step 9."""
    policy = torch.nn.Linear(1, 1)
    R1ZeroTrain.save_checkpoint(tmp_path, 9, policy, torch.optim.AdamW(policy.parameters()), True)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def with_bits(good: bytes) -> st.SearchStrategy[bytes]:
    """`good`, with a piece of it replaced, left out or added."""
    places = st.integers(0, len(good))
    return st.tuples(places, places, bits).map(lambda cut: good[: cut[0]] + cut[2] + good[cut[1] :])


def test_any_saved_options_are_refused_in_a_line_or_in_range(
    fuzz: Callable[..., None], run_dir: Path
) -> None:
    values = st.one_of(json_cells, odd_words)
    saved = st.one_of(
        st.dictionaries(st.sampled_from([*FIELDS, "help", "other", "a b", ""]), values).map(
            lambda odd: FIELDS | odd
        ),
        st.sets(st.sampled_from([*FIELDS])).map(
            lambda lost: {k: v for k, v in FIELDS.items() if k not in lost}
        ),
        json_cells,
    )
    contents = saved.map(json.dumps).map(str.encode) | with_bits(json.dumps(FIELDS).encode())

    def check(content: bytes) -> None:
        (run_dir / "config.json").write_bytes(content)
        usage_error(lambda: assert_within_bounds(parse_config(["--resume", str(run_dir)])))

    fuzz(check, contents, 300)


def test_any_damaged_checkpoint_is_refused_by_name(
    fuzz: Callable[..., None], run_dir: Path
) -> None:
    (path,) = (run_dir / "checkpoint").iterdir()
    good = path.read_bytes()
    flipped = st.lists(
        st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=9
    )

    def flip(places: list[tuple[int, int]]) -> bytes:
        content = bytearray(good)
        for place, value in places:
            content[place] = value
        return bytes(content)

    def check(content: bytes) -> None:
        path.unlink()  # a mapping of the file before may be alive
        path.write_bytes(content)
        message = usage_error(lambda: R1ZeroTrain.read_checkpoint(str(run_dir)))
        assert (message is None) == (content == good) and (content == good or str(path) in message)

    fuzz(check, flipped.map(flip) | with_bits(good), 150, share=0.5)


# --- rewards ---------------------------------------------------------------------------------------------------------

pieces = st.one_of(
    any_text,
    plausible,
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "(",
            ")",
            "+",
            "-",
            "*",
            "/",
            "1",
            "2",
            "7",
            " ",
            ",",
        ]
    ),
    st.sampled_from(
        [
            ",000",
            "\\frac",
            "{",
            "}",
            "\\pm",
            "x",
            "=",
            "\\sqrt",
            "[",
            "]",
            "^",
            "_",
            "\\text{",
            "####",
            "$",
            "%",
            "/0",
            "/(2-2)",
        ]
    ),
)
texts = st.lists(pieces, max_size=12).map("".join) | st.sampled_from(
    ["1/0", "7/(2-2)", "\\frac{1}{0}", "1e9/0"]
)
completions = texts | texts.map(lambda text: f"<think></think><answer>{text}</answer>")


def test_any_completion_of_any_question_is_worth_0_or_1(fuzz: Callable[..., None]) -> None:
    def check(case: tuple[str, str, list[int] | None, int]) -> None:
        completion, gold, numbers, target = case
        if numbers is None:
            numbers = [int(number) for number in re.findall("0|[1-9][0-9]{0,20}", completion)]
        assert TASKS["countdown"].reward(completion, numbers, target) in (0.0, 1.0)
        assert TASKS["gsm8k"].reward(completion, gold) in (0.0, 1.0)
        assert TASKS["math"].reward(completion, gold) in (0.0, 1.0)

    whole = st.one_of(st.integers(-9, 9), st.integers(), st.just(10**5000))
    fuzz(
        check,
        st.tuples(completions, texts | completions, st.none() | st.lists(whole, max_size=6), whole),
        200,
    )


def test_any_samples_are_summed_up_and_shown(fuzz: Callable[..., None]) -> None:
    def check(questions: list[list[str]]) -> None:
        samples = [
            [
                {
                    "text": t,
                    "accuracy": t.count("7") % 2.0,
                    "format": format_reward(t),
                    "length": len(t),
                }
                for t in group
            ]
            for group in questions
        ]
        metrics = evaluation(
            [[sample | {"truncated": False} for sample in group] for group in samples]
        )
        means = {name: value for name, value in metrics.items() if not isinstance(value, tuple)}
        for name, value in means.items():
            low, high = metrics[f"{name}_interval"]
            assert low <= value <= high or math.isclose(low, value) or math.isclose(high, value)
            assert (
                0
                <= value
                <= (
                    1
                    if name != "length"
                    else max(len(text) for group in questions for text in group)
                )
            )
        assert table({"now": {f"eval_{name}": value for name, value in metrics.items()}}).count(
            "\n"
        ) == len(means)
        assert sparkline([float(len(t)) for group in questions for t in group])

    groups = st.integers(1, 4).flatmap(
        lambda k: st.lists(st.lists(completions, min_size=k, max_size=k), min_size=1, max_size=3)
    )
    fuzz(check, groups, 60, share=0.25)


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_on_a_file_where_everything_is_wrong_somewhere(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Among 40 good rows are damaged ones, duplicates, and one of a million characters, to no harm."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(40)]
    odd = [
        {"question": "a" * 10**6, "answer": "#### 7"},
        {"question": "What is NaN?", "answer": math.nan},
        [7],
        None,
    ]
    odd += [{"question": f"What is\t{n} + 1? ", "answer": n + 1} for n in range(8)]
    odd += [{"question": 5}, rows[7], {"question": "\ud800", "answer": 7}]
    lines = [json.dumps(row) for row in [*rows[:20], *odd, *rows[20:]]]
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_bytes(
        b"\xef\xbb\xbf" + "\n\n".join(lines).encode() + b'\n\0\xff\n{"question": "half a'
    )
    arguments = f"--model {tiny_llama} --task gsm8k --dataset {data} --run_dir {run_dir} --steps 12 --device cpu "
    arguments += "--questions_per_step 4 --group_size 2 --max_new_tokens 2 --eval_questions 99"
    assert R1ZeroTrain.run(arguments.split()) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--dataset")]
    assert said[0].endswith(
        ": 7 of 57 rows are damaged or have no usable answer: 22, 23, 24, 33, 35, …"
    )
    assert (
        ": 1 of 57 rows are left out as too long: 21; row 21 makes a prompt of 1,000," in said[1]
        and len(said) == 2
    )
    records = [
        json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()
    ]
    asked = Counter(
        (" ".join(record["question"].split()), "advantage" in record) for record in records
    )
    trained, held_out = (
        {question for question, training in asked if training is side} for side in (True, False)
    )
    assert trained and held_out and not trained & held_out
