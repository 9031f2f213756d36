"""Several processes do what one does: the same completions, metrics, gradients and weights, in one run directory.

On the CPU with gloo, by DDP as torchrun starts them and by FSDP2, in float64, so that what is left of rounding is far
below the 1e-5 that are allowed. The processes are forked from one that has imported torch already, so that they start
at once.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import read_lines, save_model
from safetensors.torch import load_file
from transformers import LlamaConfig

import R1ZeroTrain
from prompts import TASKS

ROOT = Path(R1ZeroTrain.__file__).parent
OPTIONS = {
    **{
        "steps": 5,
        "questions_per_step": 4,
        "group_size": 4,
        "max_new_tokens": 12,
        "device": "cpu",
        "lr": 0.003,
    },
    # Micro-batches that differ in number from process to process, and some of them of completions of a single token,
    # which take one call of the model instead of two: DDP would hang without broadcast_buffers=False. 3 questions by 2.
    **{
        "tokens_per_microbatch": 38,
        "updates_per_rollout": 2,
        "eval_questions": 3,
        "save_every": 2,
        "loss": "dapo",
    },
    "kl_beta": 0.1,
}
TIMINGS = ("completion_tokens_per_second", "seconds")
NUMBERS = [pytest.param(2, id="2"), pytest.param(4, id="4", marks=pytest.mark.study)]


def parity(completion: str, **_: object) -> float:
    """About half of the completions earn it."""
    return float(sum(map(ord, completion)) % 2)


def fsdp_on_cpu(cpu: bool, **options: object) -> Accelerator:
    """Accelerate gives processes on CPUs DDP, whatever is asked for. Told that they are on XPUs, once they have met by
    gloo, it takes them to its FSDP2 as it takes those on GPUs."""
    PartialState(cpu=cpu)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    accelerator = Accelerator(**options)
    assert accelerator.is_fsdp2 and accelerator.device.type == "cpu"
    return accelerator


class AskedAfter:
    """In place of ends_when_asked: asks the run to end after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @contextmanager
    def __call__(self) -> Iterator["AskedAfter"]:
        yield self

    def __bool__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


def child(
    rank: int,
    world: int,
    port: int,
    words: list[str],
    output: Path,
    fsdp: bool,
    ends_after: int,
    double: bool,
) -> None:
    """One process of a run."""
    if world > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        place["OMP_NUM_THREADS"] = 1  # as torchrun sets it
        os.environ.update(
            {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}
        )
    with output.with_name(f"output-{rank}").open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    if fsdp:
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
        }  # as accelerate launch sets them
        R1ZeroTrain.Accelerator = fsdp_on_cpu
    if ends_after:
        R1ZeroTrain.ends_when_asked = AskedAfter(ends_after)
    float32, load_policy = torch.float32, R1ZeroTrain.load_policy
    if double:
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float, torch.float32 = (
            torch.Tensor.double,
            torch.float64,
        )  # whatever asks for float32 gets float64

    def load(*args: object):
        dtype, torch.float32 = torch.float32, float32  # which the file on the disk has
        policy = load_policy(*args).to(dtype)
        torch.float32 = dtype
        policy.generation_config.eos_token_id = list(
            range(0, 256, 16)
        )  # completions of 1 to 12 tokens
        return policy

    def count(*args: object) -> list:
        batches = microbatches(*args)
        print("micro-batches:", len(batches))
        return batches

    R1ZeroTrain.load_policy, microbatches, R1ZeroTrain.microbatches = (
        load,
        R1ZeroTrain.microbatches,
        count,
    )
    TASKS["countdown"] = dataclasses.replace(TASKS["countdown"], reward=parity)
    code = R1ZeroTrain.run(words)
    sys.stdout.flush()
    os._exit(code)


def start(
    number: int,
    output: Path,
    fsdp: bool = False,
    ends_after: int = 0,
    double: bool = True,
    **options: object,
) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["R1ZeroTrain"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    more = (port, words, output, fsdp, ends_after, double)
    processes = [
        context.Process(target=child, args=(rank, number, *more)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[multiprocessing.Process], output: Path, code: int = 0) -> None:
    try:
        for rank, process in enumerate(processes):
            process.join(180)  # torch may have to be read from a cold disk first
            assert process.exitcode == code, output.with_name(f"output-{rank}").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()  # one that waits for another would outlive the tests


def assert_same_run(got: Path, expected: Path) -> None:
    for line, wanted in zip(read_lines(got), read_lines(expected), strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - set(TIMINGS):
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-9), (
                f"step {wanted['step']}: {key}"
            )
    texts, wanted = (
        [r["text"] for r in read_lines(folder, "completions.jsonl")] for folder in (got, expected)
    )
    assert texts == wanted
    weights, wanted = (load_file(folder / "model/model.safetensors") for folder in (got, expected))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (weights[name] - value).norm() <= 1e-5 * value.norm(), name
    assert {path.name for path in got.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.fixture(scope="module")
def single(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    finish(
        start(1, folder / "out", model=tiny_llama, run_dir=folder / "single", **OPTIONS),
        folder / "out",
    )
    lines = read_lines(folder / "single")
    assert all(line["grad_norm"] > 0 for line in lines[:-1]) and lines[-1]["kl"] > 1e-3, (
        "else it has shown little"
    )
    assert 1 < lines[0]["length"] < 12 and 0 < lines[0]["accuracy"] < 1
    assert (
        next(iter(load_file(folder / "single/model/model.safetensors").values())).dtype
        == torch.float64
    )
    return folder / "single"


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("number", NUMBERS)
def test_processes_train_as_one_does(
    number: int, fsdp: bool, single: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    processes = start(
        number, tmp_path / "out", fsdp, model=tiny_llama, run_dir=tmp_path / "run", **OPTIONS
    )
    finish(processes, tmp_path / "out")
    assert_same_run(tmp_path / "run", single)
    first, *others = ((tmp_path / f"output-{rank}").read_text() for rank in range(number))
    assert (
        len({tuple(re.findall(r"micro-batches: (\d+)", text)) for text in (first, *others)}) > 1
    ), "not put to the test"
    assert "To go on:" in first and "5/5" in first
    assert not any("To go on:" in text or "5/5" in text for text in others), "one process speaks"


def test_processes_that_are_asked_to_end_go_on_as_one(
    single: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    processes = start(2, tmp_path / "out", model=tiny_llama, run_dir=tmp_path / "run", **OPTIONS)
    log = tmp_path / "run/metrics.jsonl"
    while processes[0].is_alive() and not (log.exists() and '{"step": 1' in log.read_text()):
        time.sleep(0.001)
    os.kill(processes[1].pid, signal.SIGTERM)  # one is enough: they agree
    finish(processes, tmp_path / "out")
    assert not (tmp_path / "run/model").exists(), "it was to end before its time"
    finish(start(1, tmp_path / "out", resume=tmp_path / "run"), tmp_path / "out")
    assert_same_run(tmp_path / "run", single)


def test_any_processes_go_on_with_the_checkpoint_of_any_others(
    single: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "run"
    finish(start(1, out, ends_after=1, model=tiny_llama, run_dir=run_dir, **OPTIONS), out)
    for steps, fsdp in ((1, True), (1, False), (1, True)):
        finish(start(2, out, fsdp, steps, resume=run_dir), out)
    assert (R1ZeroTrain.read_checkpoint(str(run_dir))["step"], (run_dir / "model").exists()) == (
        4,
        False,
    )
    finish(start(1, out, resume=run_dir), out)
    assert_same_run(run_dir, single)


def test_fsdp_computes_in_bfloat16_and_keeps_float32(tmp_path: Path) -> None:
    """With tied embeddings, layers that are run again, and groups of equal rewards that are left out."""
    tied = save_model(LlamaConfig, tmp_path / "tied", tie_word_embeddings=True)
    options = OPTIONS | {
        "model": tied,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "kl_beta": 0,
        "steps": 2,
    }
    options |= {"updates_per_rollout": 1}
    for number, name in ((1, "one"), (2, "two")):
        processes = start(
            number, tmp_path / "out", number > 1, double=False, run_dir=tmp_path / name, **options
        )
        finish(processes, tmp_path / "out")
    line, expected = (read_lines(tmp_path / name)[0] for name in ("two", "one"))
    for key in ("reward", "length", "equal_groups", "entropy", "grad_norm"):
        assert line[key] == pytest.approx(expected[key], rel=0.02), key
    assert line["logp_gap"] < expected["logp_gap"], (
        "it is trained with the sampler's own bfloat16 weights"
    )
    state, folder = R1ZeroTrain.read_checkpoint(str(tmp_path / "two")), tmp_path / "two/model"
    weights = load_file(folder / "model.safetensors")
    assert (
        weights.keys() == load_file(tied / "model.safetensors").keys()
        and "lm_head.weight" not in weights
    )
    moments = [x for kept in state["optimizer"]["state"].values() for x in kept.values()]
    assert {x.dtype for x in [*weights.values(), *state["policy"].values(), *moments]} == {
        torch.float32
    }
    config = json.loads((folder / "config.json").read_text())
    assert (
        config == json.loads((tmp_path / "one/model/config.json").read_text())
        and config["dtype"] == "float32"
    )


def test_there_may_be_fewer_questions_than_processes(tiny_llama: Path, tmp_path: Path) -> None:
    options = {
        "model": tiny_llama,
        "run_dir": tmp_path / "run",
        "device": "cpu",
        "max_new_tokens": 4,
        "steps": 0,
    }
    options |= {"eval_questions": 1, "questions_per_step": 2, "group_size": 2}
    finish(start(2, tmp_path / "out", **options), tmp_path / "out")
    assert len(read_lines(tmp_path / "run")) == 1


def test_a_mistake_is_said_once(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"model": tiny_llama, "device": "cpu", "questions_per_step": 3}
    finish(start(2, tmp_path / "out", **options), tmp_path / "out", code=2)
    said = (tmp_path / "output-0").read_text()
    assert (
        "--questions_per_step 3: not a multiple of 2 processes; try 8" in said
        and "Traceback" not in said
    )
    assert (tmp_path / "output-1").read_text() == ""


@pytest.mark.study
def test_one_process_killed_ends_the_others_and_the_run_goes_on(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """By torchrun itself, as users start it."""
    options = OPTIONS | {
        "model": tiny_llama,
        "run_dir": tmp_path / "run",
        "steps": 100_000,
        "save_every": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*torchrun, ROOT / "R1ZeroTrain.py", *words], env=environment
    ) as launcher:
        while len(list(tmp_path.glob("run/checkpoint/*.pt"))) == 0:
            assert launcher.poll() is None
            time.sleep(0.1)
        children = subprocess.run(
            ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
        ).stdout.split()
        began = time.monotonic()
        os.kill(int(children[1]), signal.SIGKILL)
        assert launcher.wait(60) != 0
        print("ended after", time.monotonic() - began, "s")
    done = R1ZeroTrain.read_checkpoint(str(tmp_path / "run"))["step"]
    assert done > 0
    finish(start(1, tmp_path / "out", resume=tmp_path / "run", steps=done + 1), tmp_path / "out")
