"""The script from the command line to what it prints and writes: every recipe, --eval_only, --ask, a run that
continues with a longer context, no network, and the README's own task.

The recipes run on a random model and on stand-ins for their hub datasets: a few rows with the columns, formats and
splits of the originals, which the real `datasets` reads. Apart from that, only sizes are overridden.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import read_lines
from transformers import AutoModelForCausalLM

import prompts
import R1ZeroTrain
import rewards
from prompts import BASE_TEMPLATE, TASKS
from R1ZeroTrain import RECIPES, parse_config

ROOT = Path(R1ZeroTrain.__file__).parent
SIZES = {
    **{"steps": 2, "questions_per_step": 2, "group_size": 4, "max_new_tokens": 8},
    **{"rollout_rows": 8, "eval_questions": 4, "device": "cpu", "dtype": "float32"},
}


# --- stand-ins for the hub datasets ----------------------------------------------------------------------------------


def gsm8k(n: int) -> dict:
    answer = f"She has {n}*1000 = <<{n}*1000={n * 1000}>>{n * 1000} eggs.\n#### {n * 1000:,}"
    return {"question": f"Ann's {n} hens lay 1000 eggs each. How many?", "answer": answer}


def countdown(n: int) -> dict:
    numbers = [n, n + 2, 90][: 2 + n % 2]
    return {"target": sum(numbers), "nums": numbers}


def deepscaler(n: int) -> dict:
    answer = f"\\frac{{{n}}}{{7}}" if n % 2 else f"\\boxed{{{n}}}"
    return {"problem": f"Simplify ${n}/7$.", "answer": answer, "solution": f"$\\boxed{{{n}}}$"}


def aime(n: int) -> dict:
    row = {"id": n, "problem": f"Find $m+n$ for ${n}$.", "solution": "", "answer": f"{n:03}"}
    return row | {"url": "https://artofproblemsolving.com/wiki", "year": "2024"}


HUB = {
    "openai/gsm8k": {"train": (gsm8k, range(2, 30)), "test": (gsm8k, range(50, 60))},
    "Jiayi-Pan/Countdown-Tasks-3to4": {"train": (countdown, range(1, 51))},
    "agentica-org/DeepScaleR-Preview-Dataset": {"train": (deepscaler, range(1, 30))},
    "HuggingFaceH4/aime_2024": {"train": (aime, range(60, 90))},
}
# Recipe -> its task, the hub datasets that it reads, its training rows, and its evaluation rows.
GSM8K = ("gsm8k", ["openai/gsm8k"], *HUB["openai/gsm8k"].values())
COUNTDOWN, *MATH = list(HUB)[1:]
EXPECTED = {
    "tiny": ("countdown", [], None, None),
    "tinyzero": ("countdown", [COUNTDOWN], (countdown, range(1, 41)), (countdown, range(41, 51))),
    "gsm8k": GSM8K,
    "7b": GSM8K,
    "mac": GSM8K,
    "deepscaler": ("math", MATH, *(HUB[name]["train"] for name in MATH)),
}


def write(path: Path, row: Callable[[int], dict], places: range) -> str:
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in places))
    return str(path)


def questions(task: str, row: Callable[[int], dict], places: range) -> set[str]:
    return {TASKS[task].read(row(n))["question"] for n in places}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple]:
    """Replaces the hub by the stand-ins. Returns the (name, configuration) requests. Local files are read as usual."""
    asked, read = [], datasets.load_dataset

    def load_dataset(
        name: str, config: str | None = None, data_files: object = None, split: object = None
    ) -> datasets.DatasetDict:
        if data_files is None:
            asked.append((name, config))
            data_files = {
                part: write(tmp_path / f"{part}{len(asked)}.jsonl", *rows)
                for part, rows in HUB[name].items()
            }
            if split:  # the original has 490,364 rows
                assert split == {"train": "train[:327680]", "test": "train[327680:328704]"}
                split = {"train": "train[:40]", "test": "train[40:50]"}
            name = "json"
        return read(name, data_files=data_files, split=split)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def pay(patch: pytest.MonkeyPatch) -> list[str]:
    """Rewards odd lengths, which half of a random model's completions have. Otherwise nothing would be learned.

    The task's own reward still grades each completion. Returns the tasks in the order of grading.
    """
    graded = []

    def paying(name: str, own: Callable[..., float]) -> Callable[..., float]:
        def reward(completion: str, **answer: object) -> float:
            graded.append(name)
            assert own(completion, **answer) == 0.0
            return float(len(completion) % 2)

        return reward

    for name, task in TASKS.items():
        patch.setitem(TASKS, name, dataclasses.replace(task, reward=paying(name, task.reward)))
    return graded


@pytest.fixture
def prompted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The questions that the policy has been asked -> their prompts."""
    seen, render = {}, R1ZeroTrain.render_prompt

    def spy(tokenizer, question: str, template: str) -> str:
        seen[question] = render(tokenizer, question, template)
        return seen[question]

    monkeypatch.setattr(R1ZeroTrain, "render_prompt", spy)
    return seen


def run(*words: object, **options: object) -> int:
    """Runs R1ZeroTrain.py with SIZES, which `options` override, and with additional words."""
    sizes = [word for name, value in (SIZES | options).items() for word in (f"--{name}", value)]
    return R1ZeroTrain.run([str(word) for word in [*sizes, *words]])


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True], ids=["hub", "files"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(
    recipe: str,
    local: bool,
    hub: list[tuple],
    prompted: dict[str, str],
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, names, training, evaluated = EXPECTED[recipe]
    options = {"recipe": recipe, "model": str(tiny_llama), "run_dir": "run"}
    if local:
        row = {"countdown": countdown, "gsm8k": gsm8k, "math": deepscaler}[task]
        names, training, evaluated = [], (row, range(1, 60)), (row, range(100, 110))
        options["dataset"] = write(Path("mine.jsonl"), *training)
        options["eval_dataset"] = write(Path("other.jsonl"), *evaluated)
    graded = pay(monkeypatch)
    assert run(**options) == 0
    main = {"openai/gsm8k": "main"}
    assert sorted(hub) == [(name, main.get(name)) for name in sorted(names)]
    cfg = vars(parse_config(["--recipe", recipe])) | SIZES | options
    assert json.loads(Path("run/config.json").read_text()) == cfg

    metrics = Path("run/metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity|null", metrics)
    lines, samples = read_lines(Path("run")), 16 if recipe == "deepscaler" else 1
    assert [line["step"] for line in lines] == [0, 1, 2]
    wanted = {f"pass@{2**i}" for i in range(samples.bit_length())} | {"format", "length"}
    wanted |= {"truncated"} | {f"maj@{samples}" for _ in range(samples > 1)}
    for line, keys in zip(lines, (wanted, set(), wanted), strict=True):
        assert set(re.findall(r"eval_(\S+)_interval", " ".join(line))) == keys
    assert graded == [task] * (3 * 8 + 2 * 4 * samples)

    # A base model gets the paper's template, although the tokenizer has a chat template.
    for question, prompt in prompted.items():
        assert (prompt == BASE_TEMPLATE.format(question=question)) == (recipe == "tinyzero")
    trained, tested = set(), set()
    for sample in read_lines(Path("run"), "completions.jsonl"):
        (trained if "advantage" in sample else tested).add(sample["question"])
    assert len(tested) == 4 and trained and not trained & tested
    if training:
        assert trained <= questions(task, *training) and tested <= questions(task, *evaluated)

    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tiny_llama, "run/model")
    )
    assert any(not torch.equal(after[name], before[name]) for name in before)
    said = capsys.readouterr().out
    assert "To plot it:  uv run --with matplotlib notebooks/plot_runs.py run curves.png\n" in said
    assert ("--ask '8 7 4 = 36'" in said) == (task == "countdown")
    hints = re.findall(r"uv run .*R1ZeroTrain.py (.*)", said)
    assert len(hints) == 2
    for hint in hints:
        hinted = parse_config(shlex.split(hint))
        assert (hinted.resume, hinted.task, hinted.template) == ("run", task, cfg["template"])


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a file, which has learned something."""
    folder = tmp_path_factory.mktemp("runs")
    data = write(folder / "data.jsonl", countdown, range(1, 60))
    with pytest.MonkeyPatch.context() as patch:
        pay(patch)
        assert run(model=tiny_llama, dataset=data, run_dir=folder / "run", lr=0.01) == 0
    return folder / "run"


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_continues_with_a_longer_context(
    interrupted: bool, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, "run")
    first, grown = read_lines(Path("run"))[:2], {"steps": 4, "max_new_tokens": 24, "group_size": 6}
    words = [str(word) for name, value in grown.items() for word in (f"--{name}", value)]
    if interrupted:  # before the first new checkpoint, when only config.json has the new options
        steps, step = iter("ab"), R1ZeroTrain.train_step

        def train_step(*args: object) -> tuple:
            if not next(steps, None):
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(R1ZeroTrain, "train_step", train_step)
            assert R1ZeroTrain.run(["--resume", "run", *words]) == 130
        words = []
    assert R1ZeroTrain.run(["--resume", "run", *words]) == 0
    lines = read_lines(Path("run"))
    assert lines[:2] == first and [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert ["eval_length" in line for line in lines] == [True, False, False, False, True]
    assert [line["length"] > 8 for line in lines] == [False, False, True, True, True]
    assert [line["lr"] for line in lines[2:]] == pytest.approx([0.005, 0.0025, 0])
    assert json.loads(Path("run/config.json").read_text()).items() >= grown.items()


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_eval_only_prints_a_table_and_writes_one_line(
    samples: int,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pay(monkeypatch)
    lines = []
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        options = {"model": tiny_llama, "eval_samples": samples, "seed": seed, "run_dir": name}
        assert run("--eval_only", **options) == 0
        assert {path.name for path in Path(name).iterdir()} >= {"config.json", "metrics.jsonl"}
        (line,) = read_lines(Path(name))
        shown = dict(re.findall(r"^(eval_\S+) +(\S.*?) *$", capsys.readouterr().out, re.MULTILINE))
        assert len(shown) == 4 + 3 * (samples > 1)
        for key, cell in shown.items():
            low, high = line[f"{key}_interval"]
            assert cell == f"{line[key]:.3f} ({low:.3f} to {high:.3f})" and low <= line[key] <= high
        lines.append(line)
    assert lines[0] == lines[1] != lines[2]


def test_eval_only_measures_a_run_and_leaves_it_as_it_is(
    trained: Path, prompted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pay(monkeypatch)
    before = digests(trained)
    other = write(Path("other.jsonl"), countdown, range(100, 140))
    for name, words in (("same", []), ("other", ["--eval_dataset", other])):
        prompted.clear()
        words = ["--resume", str(trained), "--eval_only", "--run_dir", name, *words]
        assert R1ZeroTrain.run(words) == 0
        (line,) = read_lines(Path(name))
        last = read_lines(trained)[-1]
        equal = all(last[key] == value for key, value in line.items())
        assert equal == (name == "same") and line["step"] == 2 and len(prompted) == 4
    assert set(prompted) <= questions("countdown", countdown, range(100, 140))
    assert digests(trained) == before


def test_two_evaluations_in_one_second_do_not_mix(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(R1ZeroTrain.time, "strftime", lambda _: "20250101-000000")
    codes = [run("--eval_only", model=tiny_llama, seed=seed) for seed in (0, 1)]
    assert sum(len(read_lines(folder)) for folder in Path("runs").iterdir()) == codes.count(0)


# --- ask -------------------------------------------------------------------------------------------------------------


def ask(capsys: pytest.CaptureFixture[str], question: str, *words: object) -> tuple[str, list[str]]:
    """What --ask prints: the completion, and the lines that follow it."""
    words = ["--ask", question, "--device", "cpu", *words]
    assert R1ZeroTrain.run([str(word) for word in words]) == 0
    text, _, verdict = capsys.readouterr().out.partition("\n\nanswer: ")
    return text, verdict.splitlines()


def test_ask_prints_a_completion_its_answer_and_a_verdict(
    prompted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [ask(capsys, "8 7 4 = 36", "--seed", seed) for seed in (0, 0, *range(1, 9))]
    assert set(prompted) == {prompts.parse_countdown("8 7 4 = 36")["question"]}
    for text, (answer, verdict) in shown:
        assert answer == str(rewards.extract_answer(text))
        right = TASKS["countdown"].reward(text, numbers=[8, 7, 4], target=36)
        assert verdict == ("right" if right else "wrong")
    assert shown[0] == shown[1] and {verdict for _, (_, verdict) in shown} == {"right", "wrong"}
    assert not list(tmp_path.iterdir()), "--ask makes no run directory"


def test_ask_uses_the_checkpoint_of_a_run_and_grades_only_countdown(
    trained: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(trained)
    sources = (["--resume", trained], ["--model", trained / "model"], ["--model", tiny_llama])
    resumed, saved, untrained = (
        ask(capsys, "Why?", *source, "--max_new_tokens", 16) for source in sources
    )
    assert resumed == saved != untrained and len(resumed[1]) == 1
    assert digests(trained) == before


def test_ask_escapes_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "red \x1b[31m\x07 \x9b0m\r back\b\x00\x7f é \u202e 日本 \n</think><answer>\x1b]0;title</answer>"
    rollout = SimpleNamespace(text=["<think>" + text])
    monkeypatch.setattr(R1ZeroTrain, "generate", lambda *_: rollout)
    shown, (answer,) = ask(capsys, "Why?")
    assert shown == (
        "<think>red \\x1b[31m\\x07 \\x9b0m\\r back\\x08\\x00\\x7f é \\u202e 日本 \n"
        "</think><answer>\\x1b]0;title</answer>"
    )
    assert answer == "\\x1b]0;title"


# --- one line --------------------------------------------------------------------------------------------------------

TINY_BASE = ["--model", str(ROOT / "notebooks/tiny-base")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "owner/name"], "--model owner/name: cannot be loaded"),
        (["--model", "owner/name", "--eval_only"], "--model owner/name: cannot be loaded"),
        (["--model", "owner/name", "--ask", "Why?"], "--model owner/name: cannot be loaded"),
        (["--recipe", "tinyzero", *TINY_BASE], f"--dataset {COUNTDOWN}: cannot be read"),
        (["--recipe", "gsm8k", *TINY_BASE], "--dataset openai/gsm8k: cannot be read"),
        (["--recipe", "mac", *TINY_BASE], "--dataset openai/gsm8k: cannot be read"),
        (["--recipe", "deepscaler", *TINY_BASE], f"--eval_dataset {MATH[1]}: cannot be read"),
        (["--task", "math"], "--task math: "),
        (["--task", "math", "--ask", "Why?"], "--task math: "),
    ],
)
def test_without_a_hub_or_a_library(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    if words[0] == "--task":
        monkeypatch.setattr(rewards, "_worker", None)
        monkeypatch.setattr(rewards, "find_spec", lambda _: None)
    assert run(*words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"R1ZeroTrain.py: {message}") and "; try " in line
    assert not list(tmp_path.iterdir())


def test_the_readmes_own_task_runs_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"`uv run --extra lora (dozens.py .*?)`", text)
    name, *words = shlex.split(command)
    Path(name).write_text(program)
    small = ["--steps", "1", "--max_new_tokens", "8", "--eval_questions", "4", "--run_dir", "run"]
    done = subprocess.run(
        [sys.executable, name, *words, *TINY_BASE, *small],  # tiny-base in place of a hub model
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [0, 1]
