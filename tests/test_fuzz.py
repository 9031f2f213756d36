"""Any file and any command line gives a result, or one line that says what is wrong.

Each property has a short form, which always uses the same examples, and a long form with other examples. The long
forms take ten minutes in all:

    uv run --group dev pytest -m study tests/test_fuzz.py
"""

import csv
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import datasets
import pytest
import torch
from conftest import byte_level_tokenizer
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from test_cli import LEAST

import R1ZeroTrain
from prompts import TASKS, UsageError, load_questions, render_prompt
from R1ZeroTrain import (
    Config,
    load_policy,
    load_tokenizer,
    open_run_dir,
    parse_config,
    read_checkpoint,
    save_checkpoint,
)


@pytest.fixture(params=[0, pytest.param(75, marks=pytest.mark.study)], ids=["short", "long"])
def fuzz(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """fuzz(check, values, examples) checks that many values and, in the long form, others for 75 s more."""

    def run(check: Callable[[object], None], values: st.SearchStrategy, examples: int) -> None:
        began = time.monotonic()
        health = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
        for number in count():
            seed(number)(settings(max_examples=examples, **health)(given(values)(check)))()
            capsys.readouterr()
            if time.monotonic() - began >= request.param:
                break

    return run


def refusal(call: Callable[..., object], *args: object) -> str | None:
    """The message of the UsageError, or None if there is none. Any other exception fails the test."""
    try:
        call(*args)
    except UsageError as error:
        assert "; try " in str(error)
        return str(error)
    return None


# --- datasets --------------------------------------------------------------------------------------------------------

GOOD = {
    "countdown": [{"nums": [n % 7 + 1, n % 9 + 1, n], "target": n} for n in range(40)],
    # U+2028 ends a line for str.splitlines, and not for JSON.
    "gsm8k": [
        {"question": f"What\u2028is {n} + 1?", "answer": f"#### {n + 1:,}"} for n in range(40)
    ],
    "math": [{"problem": f"Halve ${n}$.", "answer": f"\\frac{{{n}}}{{2}}"} for n in range(40)],
}
tasks = st.sampled_from(list(TASKS))
any_text = st.text(st.characters(codec=None), max_size=20)
PLAUSIBLE = "#### 7|[1, 2]|3.0|1,23|NaN|nan|\\boxed{5}|\\boxed{|$|x|</answer>|<think>|\\text{ }|\\ud800|\ud800|\0| "
plausible = st.sampled_from([*PLAUSIBLE.split("|"), "5" * 45, "x+" * 200 + "1", "[" * 199])
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text, plausible)


def deeper(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=3)


cells = st.recursive(plain, deeper, max_leaves=6)
# Bytes that mean something to one of the readers.
BITS = rb'\n|\r|"|\"|,|{|}|[|]|null|NaN|-Infinity|1e999|{"data": |\ud800|PAR1|{"nums": [1, 2], "target": 3}'
SPECIAL = [b"\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x1f\x8b\x08"]
bits = st.binary(max_size=30) | st.sampled_from([*BITS.split(b"|"), *SPECIAL, b"9" * 5000])
DEEP = st.sampled_from([b"[" * 5000, b'{"a":' * 2000])  # these crash pyarrow


def with_bits(
    good: bytes, bits: st.SearchStrategy[bytes] = bits | DEEP
) -> st.SearchStrategy[bytes]:
    """`good`, with pieces of it replaced, left out or added."""
    places = st.integers(0, len(good))
    cuts = st.tuples(places, places | st.just(len(good)), bits)
    return cuts.map(lambda cut: good[: cut[0]] + cut[2] + good[max(cut[:2]) :])


def earned(task: str, question: dict) -> bool:
    """Whether the gold answer earns the reward. Countdown always passes: not every problem has a solution."""
    gold = question["answer"].get("gold")
    completion = f"<think></think><answer>{gold}</answer>"
    return task == "countdown" or TASKS[task].reward(completion, gold) == 1.0


def test_any_row_gives_none_or_a_question_that_can_be_answered(fuzz: Callable[..., None]) -> None:
    def check(case: tuple[str, object, object]) -> None:
        task, *values = case
        question = TASKS[task].read(dict(zip(GOOD[task][0], values, strict=True)))
        assert question is None or earned(task, question)

    fuzz(check, st.tuples(tasks, cells, cells), 200)


def as_bytes(suffix: str, rows: list, names: list) -> bytes:
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file := io.BytesIO())
        return file.getvalue()
    if suffix == ".csv":
        writer = csv.DictWriter(text := io.StringIO(), names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if isinstance(row, dict))
        return text.getvalue().encode(errors="surrogatepass")
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    return text.encode()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """A task, a suffix, and the content of such a file: good rows mixed with odd rows and odd bytes."""
    task, suffix = draw(tasks), draw(st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
    rows: list = list(GOOD[task])
    names = [*rows[0], "other"]
    if suffix != ".parquet":
        odd = st.dictionaries(st.sampled_from(names), cells)
        for row in draw(st.lists(odd | cells, max_size=3)):
            rows.insert(draw(st.integers(0, len(rows))), row)
    content = as_bytes(suffix, rows, names)
    content = draw(st.just(content) | with_bits(content, bits))
    assume(not re.match(rb"[\[\s]*null", content))  # this crashes pyarrow, too
    return task, suffix, content


def test_any_file_is_refused_in_a_line_or_read(
    fuzz: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    numbers = count()

    def check(case: tuple[str, str, bytes]) -> None:
        task, suffix, content = case
        path = tmp_path / f"{next(numbers)}{suffix}"  # `datasets` caches files by name
        path.write_bytes(content)

        def load() -> None:
            question_at, held_out = load_questions(task, str(path), 0, 1000)
            train = [question_at(i) for i in range(60)]
            keys = [{TASKS[task].key(question) for question in side} for side in (train, held_out)]
            assert not keys[0] & keys[1] and all(keys)
            assert all(earned(task, question) for question in train + held_out)

        message = refusal(load)
        assert message is None or message.startswith(f"--dataset {path}: ")

    fuzz(check, files(), 60)


def test_any_question_typed_by_the_user(fuzz: Callable[..., None]) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.model_max_length, tokenizer.chat_template = 1024, "{{ messages[-1].content }}\n"

    def check(case: tuple[str, str, str]) -> None:
        task, text, template = case
        options = {"tokenizer": tokenizer, "template": template, "max_new_tokens": 8, "ask": text}

        def load() -> None:
            _, [question] = load_questions(task, "", 0, 8, **options)
            prompt = render_prompt(tokenizer, question["question"], template)
            assert len(tokenizer(prompt)["input_ids"]) <= 1024 - 8
            assert text.strip() in prompt or question["answer"]

        message = refusal(load)
        assert message is None or message.startswith("--ask")

    odd = ["8 7 4 = 36", "{question}", "{{ 7 }}", "{0}", "%s", "<think>", "\udcff?", "a" * 10**5]
    asked = any_text.filter(bool) | st.sampled_from(odd)
    fuzz(check, st.tuples(tasks, asked, st.sampled_from(["base", "chat"])), 100)


# --- the command line, run directories, model folders ----------------------------------------------------------------

ODD = "nan|inf|-inf|1e999|-1|-0.0|1_0|0x10|٣|1 2|true|%s|@x|%(default)s|{}|--|---|-|--=|=|\n|\0|\udcff|tiny|cpu|1.5"
odd_words = any_text | st.sampled_from([*ODD.split("|"), "9" * 5000, "a" * 5000])
odd_words |= st.integers().map(str) | st.floats().map(str)
options = st.sampled_from([*vars(Config()), "no_such_option", "", "step"]).map("--{}".format)
pairs = st.tuples(options, odd_words)
joined = pairs.map(lambda pair: ["=".join(pair)])
command_lines = st.lists(options | odd_words, max_size=6) | pairs.map(list) | joined


def parsed(words: list[str]) -> Config:
    cfg = parse_config(words)
    for name, least in LEAST.items():
        value = getattr(cfg, name)
        assert type(value) is type(getattr(Config, name)) and least <= value < math.inf
    return cfg


def test_any_command_line(fuzz: Callable[..., None]) -> None:
    def check(words: list[str]) -> None:
        refusal(parsed, words)

    # argparse reads "--steps=--" as an empty list.
    usable = command_lines.filter(lambda line: not {"-h", "--help"} & {*line})
    fuzz(check, usable.filter(lambda line: not any(x.endswith("=--") for x in line)), 60)


def with_damage(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of the files of a folder, damaged."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return st.sampled_from(sorted(contents)).flatmap(
        lambda name: st.tuples(st.just(name), with_bits(contents[name]))
    )


def test_any_files_of_a_run(fuzz: Callable[..., None], tmp_path: Path) -> None:
    """Damaged files are refused if they cannot be read, a damaged checkpoint unless its content is unchanged."""
    policy = torch.nn.Linear(1, 1)
    run_dir = tmp_path / "run"
    good = vars(Config())
    open_run_dir(Config(run_dir=str(run_dir)), 0)
    save_checkpoint(run_dir, 9, torch.optim.AdamW(policy.parameters()))
    for name in ("metrics.jsonl", "completions.jsonl"):
        (run_dir / name).write_text("".join(json.dumps({"step": i}) + "\n" for i in range(12)))
    backup = shutil.copytree(run_dir, tmp_path / "backup")
    (checkpoint,) = run_dir.glob("checkpoint/*.pt")
    saved = st.dictionaries(st.sampled_from([*good, "other", ""]), cells | odd_words)
    saved = saved.filter(lambda odd: "--" not in odd.values())  # see test_any_command_line
    saved = saved.map(lambda odd: ("config.json", json.dumps(good | odd).encode()))

    def state() -> str:
        return repr(read_checkpoint(str(run_dir)))

    undamaged = state()

    def resume() -> None:
        cfg = parsed(["--resume", str(run_dir)])
        assert state() == undamaged
        open_run_dir(cfg, 9)

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        shutil.rmtree(run_dir)
        shutil.copytree(backup, run_dir)
        (run_dir / name).write_bytes(content)
        message = refusal(resume)
        if run_dir / name == checkpoint and message:
            assert str(checkpoint) in message

    fuzz(check, with_damage(backup), 40)
    fuzz(check, saved, 30)


def test_any_model_folder(fuzz: Callable[..., None], tiny_llama: Path, tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        load_tokenizer(str(folder))
        load_policy(str(folder))

    def check(case: tuple[str, bytes]) -> None:
        folder = shutil.copytree(tiny_llama, tmp_path / "model", dirs_exist_ok=True)
        (folder / case[0]).write_bytes(case[1])
        message = refusal(load, folder)
        assert message is None or message.startswith(f"--model {folder}: ")

    fuzz(check, with_damage(tiny_llama), 30)


CHOICES = (
    "--loss dapo|--loss dr_grpo|--advantage_scale none|--dtype bfloat16|--template base|--kl_beta 0|--kl_beta 1e18|"
    "--gradient_checkpointing|--lr 1e18|--lr 0|--temperature 1e18|--temperature 0.001|--clip_low 0|"
    "--clip_high 1e18|--format_weight 1e18|--max_grad_norm 0.001|--max_grad_norm 1e18|--updates_per_rollout 2|"
    "--tokens_per_microbatch 1|--rollout_rows 1|--eval_samples 3|--eval_every 1|--save_every 1|--save_every 0|--steps 0"
)
SMALL = "--steps 2 --questions_per_step 2 --group_size 2 --max_new_tokens 4 --eval_questions 2 --device cpu"


def test_any_options_make_a_run(
    fuzz: Callable[..., None], tiny_llama: Path, tmp_path: Path
) -> None:
    numbers = count()

    def check(choices: list[str]) -> None:
        line = f"--model {tiny_llama} --run_dir {tmp_path}/{next(numbers)} {SMALL}"
        assert R1ZeroTrain.run(" ".join([line, *choices]).split()) == 0

    fuzz(check, st.lists(st.sampled_from(CHOICES.split("|")), min_size=2, max_size=8), 8)
