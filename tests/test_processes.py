"""Several processes give the same completions, metrics, gradients and weights as one, in one run directory.

They use DDP with gloo on the CPU, in float64, so that rounding is far below the tolerance of 1e-5. They are forked from
a process that has already imported torch, so they start at once.

Measured with OMP_NUM_THREADS=1, the median of `seconds` of the default recipe's steps 0 to 3: one process on one core
takes 4.05 s; two on two cores take 2.71 s for the same 16 questions, a parallel efficiency of 75%. A step takes as long
as its slowest process. With 32 questions, at step 0, where completions are equally long, the efficiency is 93%.
"""

import re
import signal
import subprocess
import sys
import time
from functools import partial, partialmethod
from pathlib import Path

import psutil
import pytest
import torch
from conftest import read_lines, save_model
from safetensors.torch import load_file
from test_recovery import RESUME, TIMINGS, launch, signal_at
from transformers import AutoConfig, LlamaConfig

import R1ZeroTrain
from R1ZeroTrain import load_policy, read_checkpoint

# The processes have different numbers of micro-batches. 3 questions are evaluated by 2 processes.
OPTIONS = (
    "--steps 4 --questions_per_step 4 --group_size 4 --max_new_tokens 12 --device cpu --lr 0.003 --loss dapo "
    "--tokens_per_microbatch 38 --updates_per_rollout 2 --eval_questions 3 --save_every 2 --kl_beta 0.1"
)


def use(dtype: torch.dtype) -> None:
    """From here on, code that asks for float32 gets `dtype`."""
    torch.set_default_dtype(dtype)
    torch.float32, torch.Tensor.float = dtype, partialmethod(torch.Tensor.to, dtype)


def prepare(dtype: torch.dtype = torch.float64, stop_at: int = 0) -> None:
    """float64 in place of float32, completions of 1 to 12 tokens, Ctrl-C in train_step."""
    float32 = torch.float32
    use(dtype)

    def load(*args: object):
        use(float32)  # the dtype of the file
        policy = load_policy(*args)
        policy.generation_config.eos_token_id = list(range(0, 256, 16))
        use(dtype)
        return policy.to(dtype)

    R1ZeroTrain.load_policy = load
    if stop_at:
        signal_at(signal.SIGINT, "train_step", stop_at)


def assert_same_run(got: Path, expected: Path) -> None:
    for line, wanted in zip(read_lines(got), read_lines(expected), strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - TIMINGS:
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-9), (
                wanted["step"],
                key,
            )
    texts = [[r["text"] for r in read_lines(run, "completions.jsonl")] for run in (got, expected)]
    assert texts[0] == texts[1]
    weights, wanted = (load_file(run / "model/model.safetensors") for run in (got, expected))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (weights[name] - value).norm() <= 1e-5 * value.norm(), name
    assert {path.name for path in got.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.fixture(scope="module")
def words(tiny_llama: Path) -> list:
    return [*OPTIONS.split(), "--model", tiny_llama, "--run_dir"]


@pytest.fixture(scope="module")
def single(words: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    launch([*words, folder / "single"], folder / "out", 1, prepare)
    lines = read_lines(folder / "single")
    assert all(line["grad_norm"] > 0 for line in lines[:-1]) and lines[-1]["kl"] > 1e-3
    assert 1 < lines[0]["length"] < 12 and 0 < lines[0]["accuracy"] < 1
    (dtype,) = {x.dtype for x in load_file(folder / "single/model/model.safetensors").values()}
    assert dtype == torch.float64
    return folder / "single"


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.study)])
def test_several_processes_train_like_one(
    number: int, single: Path, words: list, tmp_path: Path
) -> None:
    said = launch([*words, tmp_path / "run"], tmp_path / "out", number, prepare)
    assert_same_run(tmp_path / "run", single)
    spoke = [(text.count("To continue:"), text.count("step: 100%") > 0) for text in said]
    assert spoke == [(1, True)] + [(0, False)] * (number - 1)


def test_a_run_can_be_resumed_by_more_or_fewer_processes(
    single: Path, words: list, tmp_path: Path
) -> None:
    """Ctrl-C stops 2 processes, then the single process that resumes the run. 2 processes finish it."""
    run_dir, out = tmp_path / "run", tmp_path / "out"
    words = [*words, run_dir]
    for number, saved in ((2, 2), (1, 4)):
        said = launch(words, out, number, partial(prepare, stop_at=35), 130)
        assert [text.count(f"stopped; to continue: {RESUME} {run_dir}\n") for text in said] == [
            rank == 0 for rank in range(number)
        ]
        assert read_checkpoint(str(run_dir))[0] == saved
        words = ["--resume", run_dir]
    launch(words, out, 2, prepare)
    assert_same_run(run_dir, single)


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    """With tied embeddings, gradient checkpointing and no reference."""
    tied = save_model(LlamaConfig, tmp_path / "tied", tie_word_embeddings=True)
    more = "--dtype bfloat16 --gradient_checkpointing --kl_beta 0 --steps 2 --updates_per_rollout 1"
    words = [*OPTIONS.split(), *more.split(), "--model", tied, "--run_dir"]
    one, two = tmp_path / "one", tmp_path / "two"
    launch([*words, one], tmp_path / "out", 1, partial(prepare, torch.float32))
    launch([*words, two], tmp_path / "out", 2, partial(prepare, torch.float32))
    line, expected = read_lines(two)[0], read_lines(one)[0]
    for key in ("reward", "length", "equal_groups", "entropy", "grad_norm"):
        assert line[key] == pytest.approx(expected[key], rel=0.02), key

    _, state = read_checkpoint(str(two))
    weights = load_file(two / "model/model.safetensors")
    adam = [x for kept in state["optimizer"]["state"].values() for x in kept.values()]
    assert {x.dtype for x in [*weights.values(), *state["weights"], *adam]} == {torch.float32}
    assert weights.keys() == load_file(tied / "model.safetensors").keys()
    assert AutoConfig.from_pretrained(two / "model").dtype == torch.float32


def test_a_process_may_have_no_question_to_evaluate(
    single: Path, words: list, tmp_path: Path
) -> None:
    words = [*words, tmp_path, "--steps", 0, "--eval_questions", 1]
    launch(words, tmp_path / "out", 2, prepare)
    got, wanted = (read_lines(run, "completions.jsonl") for run in (tmp_path, single))
    assert got[0] == wanted[0] and ["advantage" in sample for sample in got[:2]] == [False, True]


def test_only_one_process_reports_an_error(words: list, tmp_path: Path) -> None:
    words = [*words, tmp_path / "run", "--questions_per_step", 3]
    first, second = launch(words, tmp_path / "out", 2, code=2)
    assert re.fullmatch("R1ZeroTrain.py: --questions_per_step 3: .*2 processes.*try 8.*\n", first)
    assert "R1ZeroTrain.py" not in second and "Traceback" not in second


@pytest.mark.study
def test_one_process_killed_ends_the_others_and_the_run_can_be_continued(
    words: list, tmp_path: Path
) -> None:
    """Started with torchrun itself, as users do."""
    run_dir, script = tmp_path / "run", Path(R1ZeroTrain.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script]
    command = [*torchrun, *words, run_dir, "--steps", "100000", "--save_every", "1"]
    with subprocess.Popen(list(map(str, command))) as launcher:
        while not list(run_dir.glob("checkpoint/*.pt")):
            assert launcher.poll() is None
            time.sleep(0.1)
        _, second = psutil.Process(launcher.pid).children()
        second.kill()
        assert launcher.wait(60) != 0
    done, _ = read_checkpoint(str(run_dir))
    launch(["--resume", run_dir, "--steps", done + 1], tmp_path / "out")
    assert read_lines(run_dir)[-1]["step"] == done + 1
