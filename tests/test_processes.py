"""Several processes do what one does: the same completions, metrics, gradients and weights, in one run directory.

On the CPU with gloo, as torchrun starts them, in float64, so that what is left of rounding is far below the 1e-5 that
are allowed. The processes are forked from one that has imported torch already, so that they start at once.
"""

import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import read_lines
from safetensors.torch import load_file

import R1ZeroTrain
from prompts import TASKS

ROOT = Path(R1ZeroTrain.__file__).parent
OPTIONS = {
    **{"steps": 5, "questions_per_step": 4, "group_size": 4, "max_new_tokens": 12, "device": "cpu", "lr": 0.003},
    # More than one micro-batch, and not the same number of them in each process; an evaluation of 3 questions by 2.
    **{"tokens_per_microbatch": 90, "updates_per_rollout": 2, "eval_questions": 3, "save_every": 2, "loss": "dapo"},
    "kl_beta": 0.1,
}
TIMINGS = ("completion_tokens_per_second", "seconds")
NUMBERS = [pytest.param(2, id="2"), pytest.param(4, id="4", marks=pytest.mark.study)]


def parity(completion: str, **_: object) -> float:
    """About half of the completions earn it."""
    return float(sum(map(ord, completion)) % 2)


def child(rank: int, world: int, port: int, words: list[str], output: Path) -> None:
    """One process of a run."""
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        place["OMP_NUM_THREADS"] = 1  # as torchrun sets it
        os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()})
    with output.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    float32, load_policy = torch.float32, R1ZeroTrain.load_policy
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64  # whatever asks for float32 gets float64

    def load(*args: object):
        torch.float32 = float32  # which the file on the disk has
        policy = load_policy(*args).double()
        torch.float32 = torch.float64
        policy.generation_config.eos_token_id = list(range(0, 256, 16))  # completions of 1 to 12 tokens
        return policy

    R1ZeroTrain.load_policy = load
    TASKS["countdown"] = dataclasses.replace(TASKS["countdown"], reward=parity)
    code = R1ZeroTrain.run(words)
    sys.stdout.flush()
    os._exit(code)


def start(number: int, output: Path, **options: object) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["R1ZeroTrain"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    processes = [
        context.Process(target=child, args=(rank, number, port, words, output.with_name(f"output-{rank}")))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[multiprocessing.Process], output: Path, code: int = 0) -> None:
    for rank, process in enumerate(processes):
        process.join(100)
        assert process.exitcode == code, output.with_name(f"output-{rank}").read_text()[-3000:]


def assert_same_run(got: Path, expected: Path) -> None:
    for line, wanted in zip(read_lines(got), read_lines(expected), strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - set(TIMINGS):
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-9), f"step {wanted['step']}: {key}"
    texts, wanted = ([r["text"] for r in read_lines(folder, "completions.jsonl")] for folder in (got, expected))
    assert texts == wanted
    weights, wanted = (load_file(folder / "model/model.safetensors") for folder in (got, expected))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (weights[name] - value).norm() <= 1e-5 * value.norm(), name
    assert {path.name for path in got.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.fixture(scope="module")
def single(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    finish(start(1, folder / "out", model=tiny_llama, run_dir=folder / "single", **OPTIONS), folder / "out")
    lines = read_lines(folder / "single")
    assert all(line["grad_norm"] > 0 for line in lines[:-1]) and lines[-1]["kl"] > 1e-3, "else it has shown little"
    assert 1 < lines[0]["length"] < 12 and 0 < lines[0]["accuracy"] < 1
    assert next(iter(load_file(folder / "single/model/model.safetensors").values())).dtype == torch.float64
    return folder / "single"


@pytest.mark.parametrize("number", NUMBERS)
def test_processes_train_as_one_does(number: int, single: Path, tiny_llama: Path, tmp_path: Path) -> None:
    processes = start(number, tmp_path / "out", model=tiny_llama, run_dir=tmp_path / "run", **OPTIONS)
    finish(processes, tmp_path / "out")
    assert_same_run(tmp_path / "run", single)
    first, *others = ((tmp_path / f"output-{rank}").read_text() for rank in range(number))
    assert "To go on:" in first and "5/5" in first
    assert not any("To go on:" in text or "5/5" in text for text in others), "one process speaks"


def test_processes_that_are_asked_to_end_go_on_as_one(single: Path, tiny_llama: Path, tmp_path: Path) -> None:
    processes = start(2, tmp_path / "out", model=tiny_llama, run_dir=tmp_path / "run", **OPTIONS)
    log = tmp_path / "run/metrics.jsonl"
    while processes[0].is_alive() and not (log.exists() and '{"step": 1' in log.read_text()):
        time.sleep(0.001)
    os.kill(processes[1].pid, signal.SIGTERM)  # one is enough: they agree
    finish(processes, tmp_path / "out")
    assert not (tmp_path / "run/model").exists(), "it was to end before its time"
    finish(start(1, tmp_path / "out", resume=tmp_path / "run"), tmp_path / "out")
    assert_same_run(tmp_path / "run", single)


def test_there_may_be_fewer_questions_than_processes(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"model": tiny_llama, "run_dir": tmp_path / "run", "device": "cpu", "max_new_tokens": 4, "steps": 0}
    options |= {"eval_questions": 1, "questions_per_step": 2, "group_size": 2}
    finish(start(2, tmp_path / "out", **options), tmp_path / "out")
    assert len(read_lines(tmp_path / "run")) == 1


def test_a_mistake_is_said_once(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"model": tiny_llama, "device": "cpu", "questions_per_step": 3}
    finish(start(2, tmp_path / "out", **options), tmp_path / "out", code=2)
    said = (tmp_path / "output-0").read_text()
    assert "--questions_per_step 3: not a multiple of 2 processes; try 8" in said and "Traceback" not in said
    assert (tmp_path / "output-1").read_text() == ""


@pytest.mark.study
def test_one_process_killed_ends_the_others_and_the_run_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    """By torchrun itself, as users start it."""
    options = OPTIONS | {"model": tiny_llama, "run_dir": tmp_path / "run", "steps": 100_000, "save_every": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*torchrun, ROOT / "R1ZeroTrain.py", *words], env=environment) as launcher:
        while len(list(tmp_path.glob("run/checkpoint/*.pt"))) == 0:
            assert launcher.poll() is None
            time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        began = time.monotonic()
        os.kill(int(children[1]), signal.SIGKILL)
        assert launcher.wait(60) != 0
        print("ended after", time.monotonic() - began, "s")
    done = R1ZeroTrain.read_checkpoint(str(tmp_path / "run"))["step"]
    assert done > 0
    finish(start(1, tmp_path / "out", resume=tmp_path / "run", steps=done + 1), tmp_path / "out")
