"""The ways to use the script, each from the command line to what it prints and writes: every recipe, --eval_only,
--ask, a finished run that goes on in a longer context, no network, and the README's task of one's own.

The recipes run on a random model and on stand-ins of their hub datasets: few rows, in the datasets' own columns, forms
and splits. All that is set besides are sizes.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import read_lines
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import prompts
import R1ZeroTrain
from prompts import BASE_TEMPLATE, RECIPES, TASKS, load_questions
from R1ZeroTrain import Config, generate, load_tokenizer, parse_config, printable, update

ROOT = Path(R1ZeroTrain.__file__).parent
TINY_BASE = ROOT / "notebooks/tiny-base"

# --- stand-ins of the hub's datasets ---------------------------------------------------------------------------------

GSM8K, COUNTDOWN = "openai/gsm8k", "Jiayi-Pan/Countdown-Tasks-3to4"
DEEPSCALER, AIME_2024 = "agentica-org/DeepScaleR-Preview-Dataset", "HuggingFaceH4/aime_2024"


def gsm8k_row(n: int) -> dict:
    answer = f"She has {n}*1000 = <<{n}*1000={n * 1000}>>{n * 1000} eggs.\n#### {n * 1000:,}"
    return {"question": f"Ann's {n} hens lay 1000 eggs each. How many?", "answer": answer}


def countdown_row(n: int) -> dict:
    numbers = [n, n + 2, 90][: 2 + n % 2]
    return {"target": sum(numbers), "nums": numbers}


def math_row(n: int) -> dict:
    answer = f"\\frac{{{n}}}{{7}}" if n % 2 else f"\\boxed{{{n}}}"
    return {
        "problem": f"Simplify $\\frac{{{3 * n}}}{{21}}$.",
        "answer": answer,
        "solution": f"$\\boxed{{{n}}}$",
    }


def aime_row(n: int) -> dict:
    row = {
        "id": n,
        "problem": f"Find $m+n$ for ${n}$.",
        "solution": f"It is $\\boxed{{{n:03}}}$.",
        "answer": f"{n:03}",
    }
    return row | {"url": "https://artofproblemsolving.com/wiki", "year": "2024"}


HUB = {
    (GSM8K, "main"): {
        "train": [*map(gsm8k_row, range(2, 30))],
        "test": [*map(gsm8k_row, range(50, 60))],
    },
    (COUNTDOWN, None): {
        "train": [*map(countdown_row, range(1, 51))]
    },  # to be cut at 40 and 50: see `hub`
    (DEEPSCALER, None): {"train": [*map(math_row, range(1, 30))]},
    (AIME_2024, None): {"train": [*map(aime_row, range(60, 90))]},
}
ASKED_OF_HUB = {
    "tiny": set(),
    "tinyzero": {(COUNTDOWN, None)},
    "gsm8k": {(GSM8K, "main")},
    "mac": {(GSM8K, "main")},
    "deepscaler": {(DEEPSCALER, None), (AIME_2024, None)},
}
ROWS = {"countdown": countdown_row, "gsm8k": gsm8k_row, "math": math_row}  # of a local file
TASK_OF = {
    "tiny": "countdown",
    "tinyzero": "countdown",
    "gsm8k": "gsm8k",
    "mac": "gsm8k",
    "deepscaler": "math",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """What is asked of the hub, which has the stand-ins; local files are read as ever."""
    asked, from_files = [], datasets.load_dataset

    def load_dataset(name: str, *config: str | None, **options: object) -> datasets.DatasetDict:
        if options:
            return from_files(name, **options)
        asked.append((name, *config))
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(rows)
                for split, rows in HUB[(name, *config)].items()
            }
        )

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setitem(prompts.HUB_CUTS, COUNTDOWN, (40, 10))  # it has 490,364 rows
    return asked


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs without --run_dir go to runs/ of the directory that one is in."""
    monkeypatch.chdir(tmp_path)


def pay(patch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Pays for an odd second character, which a random model writes half the time: else nothing would be learned.

    The task's own reward is called all the same. Returns the completions that each task has graded.
    """
    graded: dict[str, list[str]] = {name: [] for name in TASKS}

    def paying(name: str, own: Callable[..., float]) -> Callable[..., float]:
        def reward(completion: str, **answer: object) -> float:
            graded[name].append(completion)
            right = answer.get("gold") or "+".join(map(str, answer["numbers"]))
            if name != "countdown" or sum(answer["numbers"]) == answer["target"]:
                assert own(f"<think></think><answer>{right}</answer>", **answer) == 1.0
            assert own(completion, **answer) == 0.0
            return float(ord(completion.removeprefix("<think>")[1:2] or "0") % 2)

        return reward

    for name, task in TASKS.items():
        patch.setitem(TASKS, name, dataclasses.replace(task, reward=paying(name, task.reward)))
    return graded


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    return pay(monkeypatch)


SIZES = {
    **{
        "steps": 2,
        "questions_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 8,
        "rollout_rows": 8,
    },
    **{"eval_questions": 4, "save_every": 2, "device": "cpu", "dtype": "float32"},
}


def run(*arguments: object, **options: object) -> int:
    """R1ZeroTrain.py with SIZES, which `options` override, and further arguments."""
    words = [
        str(word) for name, value in (SIZES | options).items() for word in (f"--{name}", value)
    ]
    return R1ZeroTrain.run(words + [str(argument) for argument in arguments])


def numbers(line: dict) -> list[float]:
    return [
        x
        for value in line.values()
        for x in (value if isinstance(value, list) else [value])
        if x is not None
    ]


def eval_keys(samples: int) -> set[str]:
    sizes = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 16: [1, 2, 4, 8, 16]}[samples]
    names = (
        [f"pass@{k}" for k in sizes]
        + [f"maj@{samples}"] * (samples > 1)
        + ["format", "length", "truncated"]
    )
    return {f"eval_{name}{more}" for name in names for more in ("", "_interval")}


def evaluated(line: dict, samples: int) -> dict:
    """What a line has of an evaluation: every key, each value within its interval."""
    found = {key: value for key, value in line.items() if key.startswith("eval_")}
    assert set(found) == eval_keys(samples)
    for name in (name for name in found if not name.endswith("_interval")):
        low, high = found[f"{name}_interval"]
        assert low - 1e-9 <= found[name] <= high + 1e-9
        assert name == "eval_length" or 0 <= low <= high <= 1
    return found


def write_rows(path: Path, row: Callable[[int], dict], places: range) -> Path:
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in places))
    return path


def questions(task: str, rows: list[dict]) -> set[str]:
    return {TASKS[task].read(row)["question"] for row in rows}


def one_line(capfd: pytest.CaptureFixture[str], *mentions: str) -> str:
    err = capfd.readouterr().err
    assert err.startswith("R1ZeroTrain.py: ") and len(err.splitlines()) == 1 and "; try " in err
    for mention in mentions:
        assert mention in err
    return err


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(
    recipe: str,
    hub: list,
    paid: dict,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, samples, task = tmp_path / "run", 16 if recipe == "deepscaler" else 1, TASK_OF[recipe]
    assert run(recipe=recipe, model=tiny_llama, run_dir=run_dir) == 0
    assert len(hub) == len(set(hub)) and set(hub) == ASKED_OF_HUB[recipe]
    printed = capsys.readouterr().out

    wanted = dataclasses.asdict(parse_config(["--recipe", recipe])) | SIZES
    wanted |= {"model": str(tiny_llama), "run_dir": str(run_dir)}
    assert json.loads((run_dir / "config.json").read_text()) == wanted, (
        "nothing but the sizes is overridden"
    )

    lines = read_lines(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(x) for line in lines for x in numbers(line))
    assert evaluated(lines[0], samples) and evaluated(lines[2], samples)
    assert not [key for key in lines[1] if key.startswith("eval_")]
    assert lines[0]["grad_norm"] > 0 or lines[1]["grad_norm"] > 0
    assert {name for name, completions in paid.items() if completions} == {task}
    assert len(paid[task]) == 3 * 8 + 2 * 4 * samples

    # What it is asked: the base template for a base model, though the tokenizer has one of its own.
    records = read_lines(run_dir, "completions.jsonl")
    for record in records:
        base = record["prompt"] == BASE_TEMPLATE.format(question=record["question"])
        assert base == (recipe == "tinyzero")
    asked = {
        held_out: {r["question"] for r in records if ("advantage" in r) != held_out}
        for held_out in (True, False)
    }
    assert len(asked[True]) == 4 and len(asked[False]) == 3, (
        "of a step's completions, those of a question are shown"
    )
    if recipe == "tiny":
        return_of = {q["question"] for q in load_questions("countdown", "", 0, 4)[1]}
        assert asked[True] == return_of and not asked[True] & asked[False]
    else:
        train, test = {
            "countdown": (HUB[COUNTDOWN, None]["train"][:40], HUB[COUNTDOWN, None]["train"][40:]),
            "gsm8k": tuple(HUB[GSM8K, "main"].values()),
            "math": (HUB[DEEPSCALER, None]["train"], HUB[AIME_2024, None]["train"]),
        }[task]
        assert asked[True] <= questions(task, test) and asked[False] <= questions(task, train)

    trained = AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    assert AutoTokenizer.from_pretrained(run_dir / "model").chat_template

    card = (run_dir / "model/README.md").read_text()
    assert (
        card.startswith(f"---\nbase_model: {tiny_llama}\n---\n")
        and f"2 steps of GRPO on {task}" in card
    )
    rows = card.split("```\n")[1]
    assert rows in printed and rows.splitlines()[0].split() == [
        "held-out",
        "questions",
        "before",
        "after",
    ]
    for name in {key.removesuffix("_interval") for key in eval_keys(samples)}:
        cells = [[line[name], *line[f"{name}_interval"]] for line in (lines[0], lines[2])]
        row = re.findall(rf"^{name.removeprefix('eval_')} .*$", rows, re.MULTILINE)
        assert [float(x) for x in re.findall(r" \(?([\d.]+)", row[0])] == pytest.approx(
            sum(cells, []), abs=5e-4
        )
    (command,) = re.findall(r"^    uv run R1ZeroTrain.py (.*)$", card, re.MULTILINE)
    again = parse_config(shlex.split(command))
    assert dataclasses.replace(again, dtype="float32") == Config(**wanted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_local_files(
    recipe: str, hub: list, paid: dict, tiny_llama: Path, tmp_path: Path
) -> None:
    task, row = TASK_OF[recipe], ROWS[TASK_OF[recipe]]
    mine = write_rows(tmp_path / "mine.jsonl", row, range(1, 60))
    sizes = {"recipe": recipe, "model": tiny_llama, "eval_samples": 2, "steps": 1}
    assert run(**sizes, dataset=mine, run_dir=tmp_path / "one") == 0
    # The recipe's own evaluation stays what it is, and is never what --dataset holds out.
    assert hub == ([(AIME_2024, None)] if recipe == "deepscaler" else [])
    hub.clear()
    other = write_rows(tmp_path / "other.jsonl", row, range(100, 110))
    assert run(**sizes, dataset=mine, eval_dataset=other, run_dir=tmp_path / "two") == 0
    assert hub == []
    for name, tests in (
        ("one", HUB[AIME_2024, None]["train"] if recipe == "deepscaler" else None),
        ("two", None),
    ):
        records = read_lines(tmp_path / name, "completions.jsonl")
        trained = {record["question"] for record in records if "advantage" in record}
        tested = {record["question"] for record in records if "advantage" not in record}
        assert trained <= questions(task, [row(n) for n in range(1, 60)]) and not trained & tested
        rows = tests or [row(n) for n in (range(1, 60) if name == "one" else range(100, 110))]
        assert len(tested) == 4 and tested <= questions(task, rows)
        lines = read_lines(tmp_path / name)
        assert evaluated(lines[0], 2) and evaluated(lines[-1], 2)
        assert all(math.isfinite(x) for line in lines for x in numbers(line))


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a file, which has learned something."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_rows(folder / "trained.jsonl", countdown_row, range(1, 60))
    with pytest.MonkeyPatch.context() as patch:
        pay(patch)
        assert run(model=tiny_llama, dataset=data, run_dir=folder / "run", lr=0.01) == 0
    first, *_, last = read_lines(folder / "run")
    assert evaluated(first, 1) != evaluated(last, 1), "else tests of it would show little"
    return folder / "run"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The held-out questions of each evaluation."""
    seen, evaluate = [], R1ZeroTrain.evaluate

    def spy(policy, tokenizer, held_out: list[dict], **rest):
        seen.extend(held_out)
        return evaluate(policy, tokenizer, held_out, **rest)

    monkeypatch.setattr(R1ZeroTrain, "evaluate", spy)
    return seen


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def table_in(printed: str) -> dict[str, list[float]]:
    rows = [
        line.split(maxsplit=1)
        for line in printed.split("held-out questions")[1].splitlines()[1:]
        if line
    ]
    return {
        f"eval_{name}": [float(x) for x in re.findall(r"[\d.]+", cells)] for name, cells in rows
    }


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_eval_only_prints_a_table_and_writes_one_line(
    samples: int, paid: dict, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        options = {"model": tiny_llama, "eval_samples": samples, "seed": seed, "run_dir": name}
        assert run("--eval_only", **options) == 0
        (line,) = read_lines(tmp_path / name)
        assert line["step"] == 0 and set(line) == {"step", *evaluated(line, samples)}
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "config.json",
            "metrics.jsonl",
        }
        shown = table_in(capsys.readouterr().out)
        expected = {
            key: [line[key], *line[f"{key}_interval"]] for key in line if f"{key}_interval" in line
        }
        assert set(shown) == set(expected)
        assert all(shown[key] == pytest.approx(expected[key], abs=5e-4) for key in shown)
        lines.append(line)
    assert lines[0] == lines[1] and lines[0] != lines[2]
    assert {*tmp_path.iterdir()} == {tmp_path / name for name in ("one", "two", "other")}


def test_eval_only_of_a_run_measures_its_checkpoint_and_leaves_its_files_alone(
    trained: Path, paid: dict, tmp_path: Path, asked: list[dict]
) -> None:
    before = digests(trained)
    resume = ["--resume", trained, "--eval_only"]
    assert R1ZeroTrain.run([str(word) for word in resume]) == 0
    assert digests(trained) == before
    (folder,) = (tmp_path / "runs").iterdir()
    (line,) = read_lines(folder)
    last = read_lines(trained)[-1]
    assert line["step"] == 2 and evaluated(line, 1) == evaluated(last, 1), (
        "the trained policy, on the same questions"
    )
    tested = {
        record["question"]
        for record in read_lines(trained, "completions.jsonl")
        if "advantage" not in record
    }
    assert {task["question"] for task in asked} == tested

    # the folder that it has saved is the same policy, if it is told what the run was about
    cfg = json.loads((trained / "config.json").read_text())
    of_model = {
        "model": trained / "model",
        "eval_dataset": cfg["dataset"],
        "run_dir": "model",
        "eval_questions": 60,
    }
    asked.clear()
    assert run("--eval_only", **of_model) == 0 and len(asked) == 59, (
        "all of a file that is named for evaluation"
    )
    assert digests(trained) == before


def test_eval_only_on_another_dataset(trained: Path, tmp_path: Path, asked: list[dict]) -> None:
    before = digests(trained)
    other = write_rows(tmp_path / "other.jsonl", countdown_row, range(100, 140))
    wanted = questions("countdown", [countdown_row(n) for n in range(100, 140)])
    for option in ("dataset", "eval_dataset"):
        for source in (["--resume", trained], ["--model", trained / "model"]):
            asked.clear()
            words = [
                *source,
                "--eval_only",
                f"--{option}",
                other,
                "--run_dir",
                tmp_path / f"{option}{source[0]}",
            ]
            more = ["--eval_questions", 6, "--max_new_tokens", 8, "--device", "cpu"]
            assert R1ZeroTrain.run([str(word) for word in words + more]) == 0
            assert len(asked) == 6 and {task["question"] for task in asked} <= wanted
            (line,) = read_lines(tmp_path / f"{option}{source[0]}")
            assert evaluated(line, 1)
    assert digests(trained) == before


def test_eval_every_says_at_which_steps_it_is_evaluated(
    paid: dict, tiny_llama: Path, tmp_path: Path
) -> None:
    assert run(model=tiny_llama, steps=5, eval_every=2, eval_samples=2, run_dir="run") == 0
    lines = read_lines(tmp_path / "run")
    assert [line["step"] for line in lines if evaluated_keys(line)] == [0, 2, 4, 5]
    assert all(evaluated(lines[step], 2) for step in (0, 2, 4, 5))


def evaluated_keys(line: dict) -> set[str]:
    return {key for key in line if key.startswith("eval_")}


# --- ask -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rollouts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[SimpleNamespace]:
    """What --ask has sampled: the text, and the pieces of it that were printed when each token had been drawn."""
    seen = []

    def spy(policy, tokenizer, tasks, group_size, cfg, stream, progress):
        printed = [capsys.readouterr().out]

        def show(phase: str, ids: Tensor) -> None:
            progress(phase, ids)
            printed.append(capsys.readouterr().out)

        rollout = generate(policy, tokenizer, tasks, group_size, cfg, stream, show)
        assert group_size == 1 and len(rollout.text) == 1
        seen.append(
            SimpleNamespace(text=rollout.text[0], printed=printed, question=tasks[0]["question"])
        )
        return rollout

    monkeypatch.setattr(R1ZeroTrain, "generate", spy)
    return seen


def ask(question: str, *arguments: object) -> int:
    words = ["--ask", question, "--device", "cpu", "--max_new_tokens", 160, *arguments]
    return R1ZeroTrain.run([str(word) for word in words])


def test_ask_prints_the_completion_while_it_is_sampled_then_the_answer_and_the_verdict(
    rollouts: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, verdicts = [], set()
    for seed in (0, 0, 1, 2, 3, 4, 5):
        assert ask("8 7 4 = 36", "--seed", seed) == 0
        seen, rest = rollouts[-1], capsys.readouterr()
        assert "Using the numbers [8, 7, 4], create an equation that equals 36." in seen.question
        written = "".join(seen.printed) + rest.out
        body, _, verdict = written.partition("\n\nanswer: ")
        assert "".join(body.split()) == "".join(seen.text.split())
        assert sum(map(bool, seen.printed)) > 8, "piece by piece"
        answer, right = verdict.splitlines()
        assert answer == (R1ZeroTrain.extract_answer(seen.text) or "none")
        graded = TASKS["countdown"].reward(seen.text, numbers=[8, 7, 4], target=36)
        assert right == ("right" if graded else "wrong")
        verdicts.add(right)
        outputs.append(written)
        assert rest.err == ""
    assert outputs[0] == outputs[1] and len(set(outputs)) > 3, "the seed says what is written"
    assert verdicts == {"right", "wrong"}, "else this has shown little"
    assert not list(tmp_path.iterdir()), "no run directory"


def test_ask_gives_no_verdict_where_nothing_can_grade(
    rollouts: list,
    tiny_llama: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = [
        ["--model", tiny_llama],
        ["--model", tiny_llama, "--task", "gsm8k"],
        ["--resume", trained],
    ]
    before = digests(trained)
    for source in sources:
        assert ask("Why is the sky blue?", *source, "--max_new_tokens", 12) == 0
        written = "".join(rollouts[-1].printed) + capsys.readouterr().out
        assert rollouts[-1].question.startswith("Why is the sky blue?")
        assert re.search(r"\n\nanswer: .*\n\Z", written) and not re.search(
            r"(right|wrong)\n\Z", written
        )
    assert digests(trained) == before and not list(tmp_path.iterdir())


def test_ask_takes_the_checkpoint_of_a_run(
    rollouts: list, trained: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same_options = ["--max_new_tokens", 16, "--temperature", 0.7]
    for source in (["--resume", trained], ["--model", trained / "model"], ["--model", tiny_llama]):
        assert ask("3 4 = 7", *source, *same_options) == 0
    resumed, saved, untrained = (rollout.text for rollout in rollouts)
    assert resumed == saved != untrained


def test_ask_escapes_what_a_terminal_would_obey(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "red \x1b[31m\x07 \x9b0m\r back\b\x00\x7f é \u202e 日本 \n</think><answer>\x1b]0;title\x07 7</answer>"
    tokenizer = load_tokenizer(str(tiny_llama))
    ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])

    def fake(policy, tokenizer, tasks, group_size, cfg, stream, progress) -> SimpleNamespace:
        for t in range(ids.shape[1]):
            progress(f"token {t + 1}", ids[:, : t + 1])
        lengths = torch.tensor([ids.shape[1]])
        rollout = SimpleNamespace(text=["<think>" + text], prompts=["<think>"], lengths=lengths)
        rollout.truncated = torch.tensor([False])
        return rollout

    monkeypatch.setattr(R1ZeroTrain, "generate", fake)
    assert ask("3 4 = 7", "--model", tiny_llama) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out == f"<think>{printable(text)}\n\nanswer: \\x1b]0;title\\x07 7\nwrong\n"
    assert out.startswith(
        "<think>red \\x1b[31m\\x07 \\x9b0m\\r back\\x08\\x00\\x7f é \\u202e 日本 \n</think>"
    )


def test_ask_refuses_a_question_that_the_model_cannot_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ask("1 2 3 " * 1000 + "?") == 2
    err = capsys.readouterr().err
    assert err.startswith("R1ZeroTrain.py: --") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- a run goes on in a longer context -------------------------------------------------------------------------------

GROWN = ["--steps", "4", "--max_new_tokens", "24", "--group_size", "6", "--lr", "0.0005"]


def assert_grown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = json.loads((run_dir / "config.json").read_text())
    assert [saved[name] for name in ("steps", "max_new_tokens", "group_size", "lr")] == [
        4,
        24,
        6,
        0.0005,
    ]
    checkpoint = R1ZeroTrain.read_checkpoint(str(run_dir))
    assert checkpoint["step"] == 4
    lines = read_lines(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [bool(evaluated_keys(line)) for line in lines] == [True, False, False, False, True]
    assert [line["length"] > 8 for line in lines] == [False, False, True, True, True]
    assert [line["lr"] for line in lines[2:4]] == pytest.approx([0.00025, 0.000125]), (
        "falls from the new rate on"
    )
    shown = read_lines(run_dir, "completions.jsonl")
    assert [sum(record["step"] == step for record in shown) for step in range(5)] == [8, 4, 4, 4, 8]
    AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert "before" in capsys.readouterr().out


def test_a_finished_run_grows_its_context(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    first = read_lines(run_dir)
    assert R1ZeroTrain.run(["--resume", str(run_dir), *GROWN]) == 0
    assert_grown(run_dir, capsys)
    assert read_lines(run_dir)[:2] == first[:2], (
        "what it has done before it was stopped stays as it was"
    )


def test_an_interrupted_run_grows_its_context(
    tiny_llama: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def until_step_3(policy, reference, optimizer, step: int, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return update(policy, reference, optimizer, step, *rest)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(R1ZeroTrain, "update", until_step_3)
        assert run(model=tiny_llama, steps=6, run_dir=run_dir, lr=0.01) == 130
    assert "stopped; --resume and the run's directory go on" in capsys.readouterr().err
    assert [line["step"] for line in read_lines(run_dir)] == [0, 1, 2]
    assert R1ZeroTrain.read_checkpoint(str(run_dir))["step"] == 2
    assert R1ZeroTrain.run(["--resume", str(run_dir), *GROWN]) == 0
    assert_grown(run_dir, capsys)


# --- without a network, without math-verify --------------------------------------------------------------------------


def test_math_without_its_library_is_one_line(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prompts, "math_verify_missing", lambda: True)
    data = write_rows(tmp_path / "mine.jsonl", math_row, range(1, 60))
    for more in ((), ("--dataset", data), ("--eval_only",), ("--ask", "Why?")):
        assert run("--task", "math", *more, model=tiny_llama) == 2
        one_line(capfd, "--task math: ", "uv run --extra math R1ZeroTrain.py --task math")
    assert run(recipe="deepscaler", model=tiny_llama) == 2
    one_line(capfd, "uv run --extra math")
    assert not (tmp_path / "runs").exists()
    assert run(model=tiny_llama, steps=1) == 0, "other tasks do without it"


def test_no_hub_for_a_model_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = time.perf_counter()
    for recipe in ("tiny", "gsm8k"):
        assert run(recipe=recipe, model="owner/name") == 2
        one_line(
            capfd, "--model owner/name: ", "notebooks/tiny-base", "local folder", "need no hub"
        )
    assert (
        run("--eval_only", model="owner/name") == 2 and ask("1 2 = 3", "--model", "owner/name") == 2
    )
    assert time.perf_counter() - start < 15, "of several attempts: nothing is tried again and again"
    assert not list(tmp_path.iterdir())


def test_no_hub_for_a_dataset_is_one_line(
    tiny_llama: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = time.perf_counter()
    mine = write_rows(tmp_path / "mine.jsonl", math_row, range(1, 60))
    for recipe, more, option, name in (
        ("gsm8k", (), "dataset", GSM8K),
        ("mac", (), "dataset", GSM8K),
        ("tinyzero", (), "dataset", COUNTDOWN),
        ("deepscaler", (), "eval_dataset", AIME_2024),
        ("deepscaler", ("--dataset", mine), "eval_dataset", AIME_2024),
    ):
        assert run(*more, recipe=recipe, model=tiny_llama) == 2
        ways_out = (
            f"try --{option} with a folder or file",
            "the default recipe, which needs nothing",
        )
        one_line(
            capfd, f"--{option} {name}: could not be fetched from the Hugging Face hub", *ways_out
        )
    assert time.perf_counter() - start < 15, "of several attempts: nothing is tried again and again"
    assert not (tmp_path / "runs").exists()


# --- the README's task of one's own ----------------------------------------------------------------------------------


def own_task(readme: str) -> tuple[str, list[str]]:
    """Of the section "Your own task": its first Python block, and the words behind `uv run` of its first command."""
    section = re.split(
        r"^## ", readme.split("\n## Your own task\n", 1)[1], maxsplit=1, flags=re.MULTILINE
    )[0]
    (program, *_) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (shell, *_) = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    commands = [
        shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines()
    ]
    return program, next(words[2:] for words in commands if words[:2] == ["uv", "run"])


def test_the_readmes_own_task_runs_as_it_stands(tmp_path: Path) -> None:
    program, words = own_task((ROOT / "README.md").read_text())
    name = next(word for word in words if word.endswith(".py"))
    (tmp_path / name).write_text(program)
    small = {
        "steps": 1,
        "questions_per_step": 2,
        "group_size": 2,
        "max_new_tokens": 8,
        "eval_questions": 4,
    }
    small["model"] = ROOT / "notebooks/tiny-base"  # in the place of one from the hub
    more = [str(word) for n, value in small.items() for word in (f"--{n}", value)]
    done = subprocess.run(
        [sys.executable, *words, *more, "--device", "cpu", "--run_dir", str(tmp_path / "run")],
        **{
            "cwd": tmp_path,
            "env": os.environ | {"PYTHONPATH": str(ROOT)},
            "capture_output": True,
            "text": True,
        },
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [0, 1]
    assert json.loads((tmp_path / "run/config.json").read_text())["task"] not in TASKS, (
        "it is a new one"
    )


# --- at the edges ----------------------------------------------------------------------------------------------------


def test_ask_prints_the_completion_to_the_letter(
    rollouts: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the rewards read it: with what the prompt has behind <think>, and the special tokens that the policy wrote."""
    assert ask("8 7 4 = 36") == 0
    written = "".join(rollouts[-1].printed) + capsys.readouterr().out
    assert written.partition("\n\nanswer: ")[0] == rollouts[-1].text


def test_ask_names_a_way_out_of_a_question_that_is_too_long(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert ask("1 2 3 " * 1000 + "?") == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and "try -" not in err, err
    assert out == ""


@pytest.mark.parametrize("words", [["--task", "math"], ["--task", "chess"]])
def test_ask_refuses_a_task_before_a_model_is_loaded(
    words: list[str], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    monkeypatch.setattr(prompts, "math_verify_missing", lambda: True)
    assert ask("Why?", "--model", tiny_llama, *words) == 2


def test_the_cards_command_has_the_options_that_override_the_recipe(
    hub: list, tiny_llama: Path
) -> None:
    """Also where they override it with Config's own default: --dtype float32."""
    assert run(recipe="gsm8k", model=tiny_llama, run_dir="run", steps=1) == 0
    (command,) = re.findall(
        r"^    uv run R1ZeroTrain.py (.*)$", Path("run/model/README.md").read_text(), re.MULTILINE
    )
    assert vars(parse_config(shlex.split(command))) == json.loads(
        Path("run/config.json").read_text()
    )


@pytest.mark.parametrize("recipe", ["tinyzero", "gsm8k"])
def test_the_hint_how_to_ask_has_the_runs_task_and_template(
    recipe: str, hub: list, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe=recipe, model=tiny_llama, run_dir="run", steps=1) == 0
    (hint,) = re.findall(
        r"^To ask it: uv run R1ZeroTrain.py (.*)$", capsys.readouterr().out, re.MULTILINE
    )
    cfg = parse_config(shlex.split(hint))
    assert (cfg.task, cfg.template) == (TASK_OF[recipe], "base" if recipe == "tinyzero" else "auto")


def test_two_evaluations_in_one_second_do_not_mix(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(R1ZeroTrain.time, "strftime", lambda _: "20250101-000000")
    codes = [
        R1ZeroTrain.run(["--resume", str(trained), "--eval_only", "--seed", seed]) for seed in "01"
    ]
    assert codes == [0, 2]
    assert [len(read_lines(folder)) for folder in (tmp_path / "runs").iterdir()] == [1]


def test_an_evaluation_is_not_written_into_the_run(trained: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    R1ZeroTrain.run(
        [
            "--resume",
            str(run_dir),
            "--eval_only",
            "--run_dir",
            str(run_dir),
            "--eval_questions",
            "3",
        ]
    )
    assert digests(run_dir) == digests(trained)


def test_growing_that_was_interrupted_goes_on_growing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first checkpoint was still to come: the options are in config.json alone."""

    def until_step_3(policy, reference, optimizer, step: int, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return update(policy, reference, optimizer, step, *rest)

    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(R1ZeroTrain, "update", until_step_3)
        assert R1ZeroTrain.run(["--resume", str(run_dir), *GROWN]) == 130
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 4
    assert R1ZeroTrain.run(["--resume", str(run_dir)]) == 0
    assert [line["step"] for line in read_lines(run_dir)] == [0, 1, 2, 3, 4]


def test_a_run_of_no_steps_names_no_command_that_cannot_work(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model=tiny_llama, steps=0, run_dir="run") == 0
    for hint in re.findall(
        r"^To go on: uv run R1ZeroTrain.py (.*)$", capsys.readouterr().out, re.MULTILINE
    ):
        parse_config(shlex.split(hint))
