"""A run that is interrupted at any instant, for any reason, continues with --resume and ends with the same files.

Each run that is killed is a separate process. It is forked from one that has already imported torch, so it starts at
once.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import read_lines
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import R1ZeroTrain
from prompts import TASKS
from R1ZeroTrain import (
    open_run_dir,
    parse_config,
    read_checkpoint,
    save_checkpoint,
)

OPTIONS = (
    "--steps 6 --lr 0.01 --max_new_tokens 8 --questions_per_step 2 --group_size 4 --eval_questions 4 "
    "--save_every 2 --eval_every 4 --device cpu"
)
RESUME = "uv run R1ZeroTrain.py --resume"
TIMINGS = {"completion_tokens_per_second", "seconds"}


def parity(completion: str, **_: object) -> float:
    """A reward that about half of a random model's completions earn."""
    return float(sum(map(ord, completion)) % 2)


def child(
    rank: int, number: int, port: int, words: list, output: Path, prepare: Callable[[], object]
) -> None:
    """One process of a run, as torchrun would start it."""
    if number > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        os.environ |= {name: str(value) for name, value in place.items()}
    with output.with_name(f"output-{rank}").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    R1ZeroTrain.IS_MAIN = rank == 0
    TASKS["countdown"] = dataclasses.replace(TASKS["countdown"], reward=parity)
    prepare()
    code = R1ZeroTrain.run([str(word) for word in words])
    sys.stdout.flush()
    os._exit(code)


def launch(
    words: list, output: Path, number: int = 1, prepare: Callable[[], object] = int, code: int = 0
) -> list[str]:
    """Runs a command line in `number` processes, which must all exit with `code`. Returns what each has printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["R1ZeroTrain"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=child, args=(rank, number, port, words, output, prepare))
        for rank in range(number)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)  # torch may have to be read from a cold disk first
        said = [output.with_name(f"output-{rank}").read_text() for rank in range(number)]
        assert [process.exitcode for process in processes] == [code] * number, "\n".join(
            text[-3000:] for text in said
        )
        return said
    finally:
        for process in processes:
            process.kill()  # a process that waits for another would outlive the tests


def signal_at(sent: signal.Signals, function: str, nth: int) -> None:
    """Makes this process send itself a signal before the nth line that functions of this name execute."""
    lines = count(1)

    def trace(frame, event: str, _):
        if frame.f_code.co_name != function:
            return None
        if event == "line" and next(lines) == nth:
            os.kill(os.getpid(), sent)
        return trace

    sys.settrace(trace)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_complete_at_every_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each line of save_checkpoint, takes the files as a kill leaves them, and as a power failure leaves them,
    which loses what has not been synced."""
    policy = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(policy.parameters())
    folder, fsync = tmp_path / "run/checkpoint", os.fsync
    folder.mkdir(parents=True)
    synced, expected, moments = {}, {}, []

    def note_sync(number: int) -> None:
        fsync(number)
        synced[os.fstat(number).st_ino] = (folder / "new").read_bytes()

    def trace(frame, *_: object):
        if frame.f_code.co_name != "save_checkpoint":
            return None
        files = list(folder.iterdir())
        moments.append({path.name: path.read_bytes() for path in files})
        moments.append({path.name: synced.get(path.stat().st_ino, b"") for path in files})
        return trace

    monkeypatch.setattr(os, "fsync", note_sync)
    for step in (1, 2):
        policy.weight.data += 1
        expected[step] = policy.weight.detach().clone()
        sys.settrace(trace if step == 2 else None)
        save_checkpoint(tmp_path / "run", step, optimizer)
        sys.settrace(None)

    found = []
    for i, files in enumerate(moments):
        (tmp_path / f"{i}/checkpoint").mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / f"{i}/checkpoint" / name).write_bytes(content)
        step, saved = read_checkpoint(str(tmp_path / f"{i}"))
        assert torch.equal(saved["weights"][0], expected[step])
        found.append(step)
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 20
    assert len(list(folder.iterdir())) == 1, "the previous checkpoint has been deleted"


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_checkpoint_with_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoint").mkdir()
    Path("config.json").write_text("{}")
    torch.save({"weights": Evil()}, "new")
    path = Path("new").rename("checkpoint/5.pt")
    assert R1ZeroTrain.run(["--resume", "."]) == 2 and not Path("executed").exists()
    assert_one_line(capsys)
    path.write_bytes(b"damaged")
    assert R1ZeroTrain.run(["--resume", "."]) == 2
    assert_one_line(capsys, f"--resume {path}: cannot be loaded")


def assert_one_line(capsys: pytest.CaptureFixture[str], *mentions: object) -> str:
    """The last line of stderr is the only one besides progress bars."""
    *bars, said = capsys.readouterr().err.split("R1ZeroTrain.py: ")
    assert said.count("\n") == 1 and "Traceback" not in "".join(bars)
    assert all(str(mention) in said for mention in mentions), said
    return said


# --- interrupted and resumed -----------------------------------------------------------------------------------------


def achieved(run_dir: Path) -> dict:
    """What two runs must have in common, bit for bit."""
    files = {path.name: path.read_bytes() for path in run_dir.glob("model/*")}
    files["completions"] = read_lines(run_dir, "completions.jsonl")
    files["metrics"] = [x | dict.fromkeys(TIMINGS) for x in read_lines(run_dir)]
    leaves = tree_leaves(read_checkpoint(str(run_dir)))  # torch reads a tuple as a list
    return files | {"checkpoint": [x.tolist() if torch.is_tensor(x) else x for x in leaves]}


@pytest.fixture(scope="module")
def words(tiny_llama: Path) -> list:
    return [*OPTIONS.split(), "--model", tiny_llama, "--run_dir"]


@pytest.fixture(scope="module")
def undisturbed(words: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    launch([*words, run_dir], run_dir.with_name("out"))
    lines = read_lines(run_dir)
    assert [line["step"] for line in lines] == list(range(7)) and lines[-1]["kl"] > 0.01
    return run_dir


def finish(words: list, run_dir: Path) -> dict:
    """Continues a run, or starts it again if it was killed before it saved its options."""
    begun = (run_dir / "config.json").exists()
    launch(["--resume", run_dir] if begun else [*words, run_dir], run_dir.with_name("out"))
    return achieved(run_dir)


# Functions in which a run is interrupted, and a number of lines that each of them certainly executes.
PLACES = {"save_checkpoint": 28, "write_log": 40, "open_run_dir": 15, "_save": 300}
PLACES |= {"save_pretrained": 90, "sample": 100, "update": 100, "main": 100}
ENDS = [
    (signal.SIGKILL, "save_checkpoint", 22),
    (signal.SIGKILL, "write_log", 23),
    (signal.SIGINT, "sample", 80),
    (signal.SIGTERM, "update", 60),
]
RNG = random.Random(0)
for sent in [signal.SIGKILL] * 20 + [signal.SIGINT, signal.SIGTERM] * 3:
    place = RNG.choice(list(PLACES))
    ENDS.append(pytest.param(sent, place, RNG.randint(1, PLACES[place]), marks=pytest.mark.study))


@pytest.mark.parametrize(("sent", "function", "nth"), ENDS)
def test_a_run_interrupted_anywhere_ends_like_an_uninterrupted_one(
    sent: signal.Signals, function: str, nth: int, words: list, undisturbed: Path, tmp_path: Path
) -> None:
    code = -9 if sent == signal.SIGKILL else 130
    stop = partial(signal_at, sent, function, nth)
    (said,) = launch([*words, tmp_path / "run"], tmp_path / "out", 1, stop, code)
    if code == 130 and (tmp_path / "run/config.json").exists():
        assert said.endswith(
            f"\nR1ZeroTrain.py: stopped; to continue: {RESUME} {tmp_path / 'run'}\n"
        )
    assert finish(words, tmp_path / "run") == achieved(undisturbed)


@pytest.mark.parametrize("size", [5_000, -5])
def test_a_full_disk_ends_the_run_with_a_line(
    size: int, words: list, undisturbed: Path, tmp_path: Path
) -> None:
    """The system refuses to write files longer than `size`: a log, or a checkpoint that is 5 bytes longer."""
    size %= max(undisturbed.glob("checkpoint/*.pt")).stat().st_size
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    (said,) = launch([*words, tmp_path / "run"], tmp_path / "out", 1, limit, 2)
    assert "Traceback" not in said and said.splitlines()[-1].startswith("R1ZeroTrain.py: ")
    assert finish(words, tmp_path / "run") == achieved(undisturbed)


def test_without_room_for_the_model_the_run_can_be_continued(
    words: list, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    (said,) = launch(["--resume", tmp_path / "run"], tmp_path / "out", 1, limit, 2)
    assert "Traceback" not in said and said.endswith(f"{RESUME} {tmp_path / 'run'}\n")
    assert finish(words, tmp_path / "run") == achieved(undisturbed)


LOGS = ["metrics.jsonl", "completions.jsonl"]


@pytest.mark.parametrize("name", LOGS)
def test_resume_cuts_the_logs_back_to_the_checkpoint(
    name: str, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    lines = (run_dir / name).read_bytes().splitlines(keepends=True)
    (run_dir / name).write_bytes(b"".join(lines) + lines[0][:9])
    open_run_dir(parse_config(["--resume", str(run_dir)]), 4)
    kept = (run_dir / name).read_bytes().splitlines(keepends=True)
    assert kept == [line for line in lines if json.loads(line)["step"] < 4]


@pytest.mark.parametrize("name", [*LOGS, "config.json"])
@pytest.mark.parametrize("damage", [b"junk\n", b"[1]\n", b'{"stop": "a"}\n', b"\xff\n", b"\0\n"])
def test_a_damaged_file_is_named_in_a_line(
    name: str, damage: bytes, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    log = run_dir / name
    log.write_bytes(damage + log.read_bytes())
    assert R1ZeroTrain.run(["--resume", str(run_dir)]) == 2
    assert_one_line(
        capsys,
        f"--resume {run_dir}",
        name.removesuffix(".json") if name in LOGS else "",
        "; try ",
    )
    assert log.read_bytes().startswith(damage)


# --- out of memory, and numbers that are not finite ------------------------------------------------------------------


def spoil(name: str, nth: int, error: Exception | None = None) -> None:
    """Makes the nth call of a function of R1ZeroTrain raise an error or return a loss that is not finite."""
    calls, function = count(1), getattr(R1ZeroTrain, name)

    def call(*args: object):
        result = function(*args)
        if next(calls) != nth:
            return result
        if error:
            raise error
        return result[0] * torch.nan, result[1]

    setattr(R1ZeroTrain, name, call)


OUT_OF_MEMORY = [
    ("sample", 12, torch.OutOfMemoryError("CUDA out of memory. Tried")),
    ("token_logprobs", 20, RuntimeError("DefaultCPUAllocator: can't allocate memory: you")),
]


@pytest.mark.parametrize(("name", "nth", "error"), OUT_OF_MEMORY)
def test_after_out_of_memory_the_run_continues_with_less(
    name: str, nth: int, error: Exception, words: list, undisturbed: Path, tmp_path: Path
) -> None:
    """Samples are the same. Weights are the same up to rounding, because gradients are summed in another order."""
    run_dir = tmp_path / "run"
    tight = [*words, run_dir, "--tokens_per_microbatch", 60, "--rollout_rows", 5]
    (said,) = launch(tight, tmp_path / "out", 1, partial(spoil, name, nth, error), 2)
    less = "--tokens_per_microbatch 30 --rollout_rows 2"
    line = f"R1ZeroTrain.py: out of memory; to continue: {RESUME} {run_dir} {less}"
    assert said.splitlines()[-1] == line
    launch(["--resume", run_dir, *less.split()], tmp_path / "out")

    got, wanted = achieved(run_dir), achieved(undisturbed)
    assert got["completions"] == wanted["completions"]
    weights, expected = (
        load_file(run / "model/model.safetensors") for run in (run_dir, undisturbed)
    )
    for key, value in expected.items():
        assert (weights[key] - value).norm() <= 1e-6 * value.norm(), key


def test_an_update_that_is_not_finite_is_skipped(words: list, tmp_path: Path) -> None:
    poison = partial(spoil, "grpo_loss", 3)
    launch([*words, tmp_path / "run"], tmp_path / "out", 1, poison)
    lines = read_lines(tmp_path / "run")
    assert [line["grad_norm"] is None for line in lines] == [line["step"] == 2 for line in lines]


def test_a_bug_in_the_code_is_raised_not_reported_in_a_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(R1ZeroTrain, "update", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        R1ZeroTrain.run([*OPTIONS.split(), "--model", str(tiny_llama), "--run_dir", str(tmp_path)])
