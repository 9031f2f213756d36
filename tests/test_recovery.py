"""A run cannot be lost: killed, asked to end, out of disk, out of memory, its files damaged, its numbers not finite.

Runs are processes of their own here. They are forked from one that has imported torch already, so they start at once.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import letter_reward

import R1ZeroTrain
import rewards
from prompts import TASKS, UsageError
from R1ZeroTrain import Config, main, parse_config, read_checkpoint

STEPS = 10
TIMINGS = {"completion_tokens_per_second", "seconds"}
KILLS = [pytest.param(3, id="short"), pytest.param(20, id="full", marks=pytest.mark.study)]


@pytest.fixture(autouse=True)
def _letter_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TASKS, "countdown", dataclasses.replace(TASKS["countdown"], reward=letter_reward)
    )


def child(words: list[str], output: Path, file_limit: int | None) -> None:
    """A run in a process of its own. Each file takes 10 ms to reach the disk, so that some kill comes meanwhile."""
    with output.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    fsync = os.fsync
    os.fsync = lambda number: (time.sleep(0.01), fsync(number))
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    TASKS["countdown"] = dataclasses.replace(TASKS["countdown"], reward=letter_reward)
    code = R1ZeroTrain.run(words)
    sys.stdout.flush()
    os._exit(code)


class Runs:
    """Starts runs of one and the same command, each in a directory of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["R1ZeroTrain"])
        self.model, self.folder, self.output = model, folder, folder / "output"

    def start(self, run_dir: Path, file_limit: int | None = None) -> multiprocessing.Process:
        """Begins the run, or goes on with what is left of it: a run that was killed before it had a name begins."""
        options = {
            **{
                "model": self.model,
                "run_dir": run_dir,
                "steps": STEPS,
                "lr": 0.01,
                "max_new_tokens": 8,
            },
            **{
                "questions_per_step": 2,
                "group_size": 4,
                "eval_questions": 4,
                "save_every": 2,
                "eval_every": 4,
            },
            **{"device": "cpu"},
        }
        words = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        words = ["--resume", str(run_dir)] if (run_dir / "config.json").exists() else words
        process = self.context.Process(target=child, args=(words, self.output, file_limit))
        process.start()
        return process

    def finish(self, run_dir: Path, file_limit: int | None = None) -> None:
        process = self.start(run_dir, file_limit)
        process.join(60)
        assert process.exitcode == 0, self.output.read_text()[-2000:]


def what_it_achieved(run_dir: Path) -> dict:
    """Everything that two runs have to have in common, byte for byte."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": (run_dir / "model/model.safetensors").read_bytes(),
        "best": (run_dir / "best/model.safetensors").read_bytes(),
        "metrics": [
            {name: value for name, value in line.items() if name not in TIMINGS} for line in lines
        ],
        "completions": (run_dir / "completions.jsonl").read_bytes(),
    }


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_llama, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> tuple[dict, float]:
    """What an uninterrupted run achieves, and the seconds that it takes."""
    runs.finish(runs.folder / "first")  # and imports what the others find imported
    began = time.perf_counter()
    runs.finish(runs.folder / "undisturbed")
    took = time.perf_counter() - began
    achieved = what_it_achieved(runs.folder / "undisturbed")
    assert [line["step"] for line in achieved["metrics"]] == list(range(STEPS + 1))
    assert achieved["weights"] != (runs.model / "model.safetensors").read_bytes(), (
        "else nothing was learned"
    )
    return achieved, took


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.0005)


# --- killed, or asked to end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_run_ends_as_if_nothing_had_been(
    runs: Runs, undisturbed: tuple, tmp_path: Path, kills: int
) -> None:
    achieved, took = undisturbed
    rng, hits = random.Random(kills), 0
    for kill in range(kills):
        run_dir = tmp_path / str(kill)
        process = runs.start(run_dir)
        if kill % 3 == 0:  # in the middle of writing a checkpoint
            after = 2 * rng.randrange(STEPS // 2)
            wait_for(lambda: any(run_dir.glob(f"checkpoint/{after:08}-*")) or after == 0, process)  # noqa: B023
            wait_for((run_dir / "checkpoint/new").exists, process)
            hits += process.is_alive()
        else:
            process.join(rng.uniform(0, took))
        process.kill()
        process.join()
        states = list(run_dir.glob("checkpoint/*.pt"))
        if len(states) == 1:
            assert read_checkpoint(str(run_dir))["step"] == int(states[0].name.partition("-")[0])
        runs.finish(run_dir)
        assert what_it_achieved(run_dir) == achieved, f"kill {kill}"
    assert hits, "no kill came while a checkpoint was written"


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_saves_and_goes_on_later(
    runs: Runs, undisturbed: tuple, tmp_path: Path, number: signal.Signals, kills: int
) -> None:
    achieved, took = undisturbed
    rng = random.Random(kills)
    for kill in range(max(1, kills // 3)):
        run_dir, before = tmp_path / str(kill), runs.output.stat().st_size
        process = runs.start(run_dir)
        wait_for((run_dir / "metrics.jsonl").exists, process)
        process.join(rng.uniform(0, took / 2))
        os.kill(process.pid, number)
        process.join(30)
        said = runs.output.read_bytes()[before:].decode()
        assert process.exitcode == 0, said
        if not (run_dir / "model").exists():  # else it was done anyway
            done = len((run_dir / "metrics.jsonl").read_text().splitlines())
            assert f"To go on: uv run R1ZeroTrain.py --resume {run_dir}" in said
            assert read_checkpoint(str(run_dir))["step"] == done, (
                "the step that was under way is finished and saved"
            )
        runs.finish(run_dir)
        assert what_it_achieved(run_dir) == achieved


def test_a_second_ctrl_c_ends_at_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*args: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("this should not be reached")

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(R1ZeroTrain, "update", impatient)
    assert R1ZeroTrain.run(["--model", str(tiny_llama), "--run_dir", str(tmp_path), *SMALL]) == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    runs: Runs, undisturbed: tuple, tmp_path: Path
) -> None:
    """The system refuses to write files longer than a limit that lies between the model's and the checkpoint's."""
    achieved, _ = undisturbed
    model = (runs.model / "model.safetensors").stat().st_size
    before = runs.output.stat().st_size
    runs.finish(tmp_path / "full", file_limit=2 * model)
    assert what_it_achieved(tmp_path / "full") == achieved
    assert not list((tmp_path / "full/checkpoint").iterdir()), "no half of one either"
    said = runs.output.read_bytes()[before:].decode()
    assert all(f"no checkpoint of step {step} (" in said for step in range(2, STEPS + 1, 2))

    # Full for a while, between two kills: the checkpoint from before that while is still there.
    run_dir = tmp_path / "for a while"
    process = runs.start(run_dir)
    wait_for(lambda: any(run_dir.glob("checkpoint/00000004-*")), process)
    process.kill()
    process.join()
    process = runs.start(run_dir, file_limit=2 * model)
    wait_for(lambda: '{"step": 7' in (run_dir / "metrics.jsonl").read_text(), process)
    process.kill()
    process.join()
    assert read_checkpoint(str(run_dir))["step"] == 4
    runs.finish(run_dir)
    assert what_it_achieved(run_dir) == achieved


def test_without_room_for_the_model_the_run_ends_with_a_line_and_can_be_finished(
    runs: Runs, undisturbed: tuple, tmp_path: Path
) -> None:
    before = runs.output.stat().st_size
    process = runs.start(
        tmp_path / "run", file_limit=(runs.model / "model.safetensors").stat().st_size // 2
    )
    process.join(60)
    last = runs.output.read_bytes()[before:].decode().splitlines()[-1]
    assert process.exitcode == 2 and last.startswith(
        f"R1ZeroTrain.py: {tmp_path / 'run/model'} cannot be written ("
    )
    assert last.endswith(f"; free some space, then try --resume {tmp_path / 'run'}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.json", "metrics.jsonl", "completions.jsonl", "checkpoint")
    }, "nothing half written is left"
    runs.finish(tmp_path / "run")
    assert what_it_achieved(tmp_path / "run") == undisturbed[0]


@contextlib.contextmanager
def longest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_log_loses_no_line_to_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = rewards.Log(tmp_path / "log.jsonl")
    log.append([{"step": 0, "text": "x" * 1000}])
    with longest_file(2500):
        for step in (1, 2, 3):
            log.append([{"step": step, "text": "x" * 1000}])
        assert [line["step"] for line in rewards.read(log.path)] == [0, 1] and len(log.waiting) == 2
        assert log.path.read_text().endswith("}\n"), "nothing is left of the line that did not fit"
        with pytest.raises(UsageError, match="free some space"):
            log.close()
    assert "wait in memory" in capsys.readouterr().err
    log.append([{"step": 4}])
    assert [line["step"] for line in rewards.read(log.path)] == [0, 1, 2, 3, 4] and not log.waiting


def test_no_checkpoint_is_begun_that_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    rewards.write_checkpoint(tmp_path, 3, 1001, lambda file: pytest.fail("it was begun"))
    assert "no checkpoint of step 3" in capsys.readouterr().err
    rewards.write_checkpoint(tmp_path, 4, 1000, lambda file: file.write(b"state"))
    assert rewards.newest_whole(tmp_path / "checkpoint").name.startswith("00000004-")


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(runs: Runs, undisturbed: tuple, tmp_path: Path) -> Path:
    """A run that was killed after its checkpoint of step 4 or a later one."""
    run_dir = tmp_path / "stopped"
    process = runs.start(run_dir)
    wait_for(lambda: any(run_dir.glob("checkpoint/00000004-*")), process)
    process.kill()
    process.join()
    for older in sorted(run_dir.glob("checkpoint/*.pt"))[
        :-1
    ]:  # it may have been killed just before this
        older.unlink()
    return run_dir


def refusal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What --resume says when it refuses the run, in a line."""
    before = sorted((path, path.read_bytes()) for path in run_dir.rglob("*.jsonl"))
    assert R1ZeroTrain.run(["--resume", str(run_dir)]) == 2
    assert sorted((path, path.read_bytes()) for path in run_dir.rglob("*.jsonl")) == before, (
        "nothing is lost by it"
    )
    return capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_by_name(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewards.newest_whole(stopped / "checkpoint")
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [whole[: len(whole) * tenth // 10] for tenth in range(10)] + [
        whole[:-1],
        whole + b"\0",
    ]
    for place in rng.sample(range(len(whole)), 10):
        damaged.append(
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        )
    for content in damaged:
        path.write_bytes(content)
        assert f"{path} is damaged" in refusal(stopped, capsys)


def test_an_older_state_is_used_where_the_newest_is_damaged(
    stopped: Path, runs: Runs, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = rewards.newest_whole(stopped / "checkpoint")
    newer = older.with_name(f"{STEPS:08}-{older.stem.partition('-')[2]}.pt")
    newer.write_bytes(older.read_bytes()[:-1])
    runs.finish(stopped)
    assert f"{newer} is damaged, and not used" in runs.output.read_text()
    assert what_it_achieved(stopped) == undisturbed[0]


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_checkpoint_with_code_is_refused_and_the_code_not_run(
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    old = rewards.newest_whole(stopped / "checkpoint")
    for write in (
        lambda file: torch.save({"step": 5, "policy": Evil()}, file),
        lambda file: pickle.dump(Evil(), file),
    ):
        old.unlink()
        old = rewards.write_whole(stopped / "checkpoint/00000005-{sha256}.pt", write)
        assert f"{old} is no checkpoint" in refusal(stopped, capsys)
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("part", ["weights", "names", "states"])
def test_a_checkpoint_of_another_model_is_refused(
    part: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = rewards.newest_whole(stopped / "checkpoint")
    saved = torch.load(old, weights_only=True)
    if part == "weights":
        saved["policy"]["lm_head.weight"] = saved["policy"]["lm_head.weight"][:-1]
    elif part == "names":
        saved["policy"] = {f"gpt.{name}": weight for name, weight in saved["policy"].items()}
    else:  # as torch's optimizer numbers them
        saved["optimizer"]["state"] = dict(enumerate(saved["optimizer"]["state"].values()))
    old.unlink()
    rewards.write_whole(
        stopped / "checkpoint/00000005-{sha256}.pt", lambda file: torch.save(saved, file)
    )
    assert "is not a run of" in (said := refusal(stopped, capsys)) and said.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_damaged_log_is_refused_by_name(
    stopped: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    log = stopped / name
    log.write_bytes(b"\xff" + log.read_bytes()[1:])
    assert f"{log}: is damaged" in refusal(stopped, capsys)


# --- numbers that are not finite, rewards that are all equal ---------------------------------------------------------

SMALL = [
    "--steps",
    "7",
    "--questions_per_step",
    "2",
    "--group_size",
    "4",
    "--max_new_tokens",
    "8",
    "--device",
    "cpu",
]
SMALL += ["--eval_questions", "4", "--save_every", "1", "--lr", "0.01"]


def poison(
    monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float
) -> list[list[torch.Tensor]]:
    """Makes the loss of these steps `value`; returns the weights as each update found them."""
    seen, update, grpo_loss = [], R1ZeroTrain.update, R1ZeroTrain.grpo_loss
    now = []

    def spy(policy, reference, optimizer, step: int, *rest: object, **more: object):
        now[:] = [step]
        seen.append([p.detach().clone() for p in policy.parameters()])
        return update(policy, reference, optimizer, step, *rest, **more)

    def poisoned(*args: object, **more: object):
        loss, metrics = grpo_loss(*args, **more)
        return loss * value if now[0] in steps else loss, metrics

    monkeypatch.setattr(R1ZeroTrain, "update", spy)
    monkeypatch.setattr(R1ZeroTrain, "grpo_loss", poisoned)
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    seen = poison(monkeypatch, {1, 2, 4}, value)
    main(parse_config(["--model", str(tiny_llama), "--run_dir", str(tmp_path), *SMALL]))
    moved = [not all(map(torch.equal, a, b)) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, False, False, True, False, True, True]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 0, 1, 0, 0, 0]
    assert [line["grad_norm"] is None for line in lines] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert all(bool(p.isfinite().all()) for weights in seen for p in weights)


def test_five_such_updates_in_a_row_end_the_run_and_name_its_checkpoint(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, {1, 2, 3, 4, 5}, math.nan)
    assert R1ZeroTrain.run(["--model", str(tiny_llama), "--run_dir", str(tmp_path), *SMALL]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "--lr 0.01" in said
        and f"try --resume {tmp_path} --lr 0.001" in said
        and "not finite" in said
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    state = read_checkpoint(str(tmp_path))
    assert all(bool(p.isfinite().all()) for p in state["policy"].values())


def lines_of(equal: list[float], accuracy: float) -> list[dict]:
    return [{"equal_groups": value, "accuracy": accuracy, "skipped_updates": 0} for value in equal]


def test_twenty_steps_of_equal_rewards_are_explained_once(tmp_path: Path) -> None:
    def said(equal: list[float], accuracy: float = 0.0) -> str:
        return rewards.trouble(lines_of(equal, accuracy), tmp_path, 0.01, 1)

    assert not said([1.0] * 19) and not said([1.0] * 10 + [0.5] + [1.0] * 19)
    assert "easier questions" in said([1.0] * 20) and "easier questions" in said([0.5] + [1.0] * 20)
    assert "harder questions" in said([1.0] * 20, accuracy=1.0)
    assert not said([1.0] * 21), "said once"


def test_a_run_without_a_reward_says_so(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(
        TASKS, "countdown", dataclasses.replace(TASKS["countdown"], reward=lambda *_, **__: 0.0)
    )
    words = [*SMALL, "--steps", "20", "--save_every", "0", "--kl_beta", "0"]
    main(parse_config(["--model", str(tiny_llama), "--run_dir", str(tmp_path), *words]))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("nothing to learn; try easier questions") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["equal_groups"] == 1 and line["grad_norm"] == 0 for line in lines)


# --- out of memory ---------------------------------------------------------------------------------------------------


def fail(
    monkeypatch: pytest.MonkeyPatch, name: str, calls: set[int], error: Exception
) -> list[Config]:
    """Makes these calls of a function of R1ZeroTrain fail; returns the options of all its calls."""
    seen, function = [], getattr(R1ZeroTrain, name)

    def failing(*args: object, **more: object):
        seen.append(next(arg for arg in (*args, *more.values()) if isinstance(arg, Config)))
        if len(seen) in calls:
            raise error
        return function(*args, **more)

    monkeypatch.setattr(R1ZeroTrain, name, failing)
    return seen


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried"),
    RuntimeError("MPS backend out of memory (MPS"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("name", ["sample", "token_logprobs"])
def test_out_of_memory_the_step_is_done_again_with_half_the_rows_and_tokens(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    words = [*SMALL, "--model", str(tiny_llama), "--steps", "2"]
    main(parse_config([*words, "--run_dir", str(tmp_path / "undisturbed")]))
    seen = fail(monkeypatch, name, {4}, error)
    main(parse_config([*words, "--run_dir", str(tmp_path / "disturbed")]))
    assert (seen[3].tokens_per_microbatch, seen[3].rollout_rows) == (8192, 256)
    assert (seen[4].tokens_per_microbatch, seen[4].rollout_rows) == (4096, 128)
    assert (seen[-1].tokens_per_microbatch, seen[-1].rollout_rows) == (8192, 256), (
        "the next step has all again"
    )
    assert what_it_achieved(tmp_path / "disturbed") == what_it_achieved(tmp_path / "undisturbed")


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_twice_ends_the_run_and_says_what_to_lower(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: Exception,
) -> None:
    fail(monkeypatch, "token_logprobs", {3, 4}, error)
    assert R1ZeroTrain.run(["--model", str(tiny_llama), "--run_dir", str(tmp_path), *SMALL]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory: try --rollout_rows 128 --tokens_per_microbatch 4096" in said


def test_out_of_memory_after_the_weights_have_moved_is_not_tried_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fail(
        monkeypatch, "token_logprobs", {3}, OUT_OF_MEMORY[0]
    )  # the reference's, the first epoch's, the second
    words = [
        *SMALL,
        "--model",
        str(tiny_llama),
        "--run_dir",
        str(tmp_path),
        "--updates_per_rollout",
        "2",
    ]
    assert R1ZeroTrain.run(words) == 2
    assert len(seen) == 3


def test_another_runtime_error_is_not_taken_for_too_little_memory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "token_logprobs", {1}, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(parse_config(["--model", str(tiny_llama), "--run_dir", str(tmp_path), *SMALL]))


# --- the best policy -------------------------------------------------------------------------------------------------


def test_best_is_the_policy_of_the_highest_held_out_accuracy(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies, evaluate = iter([0.9, 0.3, 0.6, 0.6, 0.5]), R1ZeroTrain.evaluate
    weights = []

    def scripted(sampler, *args: object, **more: object):
        nonlocal accuracies
        weights.append([p.clone() for p in sampler.parameters()])
        metrics, samples = evaluate(sampler, *args, **more)
        return metrics | {"eval_pass@1": next(accuracies)}, samples

    monkeypatch.setattr(R1ZeroTrain, "evaluate", scripted)
    words = [
        *SMALL,
        "--steps",
        "4",
        "--eval_every",
        "1",
        "--model",
        str(tiny_llama),
        "--run_dir",
        str(tmp_path),
    ]
    main(parse_config(words))
    best = R1ZeroTrain.load_policy(str(tmp_path / "best"))
    assert all(map(torch.equal, best.parameters(), weights[2])), (
        "of the trained ones; of equals the first"
    )
    assert not all(map(torch.equal, best.parameters(), weights[3]))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "metrics.jsonl", "completions.jsonl", "checkpoint", "best", "model")
    }, "nothing half written is left"
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1, "the last one is kept"

    accuracies = iter(
        [0.4, 0.7]
    )  # going on, its last line is written again, and a worse policy is no new best
    main(parse_config(["--resume", str(tmp_path), "--steps", "5"]))
    best = R1ZeroTrain.load_policy(str(tmp_path / "best"))
    assert (
        all(map(torch.equal, best.parameters(), weights[6]))
        and (tmp_path / "best/pass@1").read_text() == "0.7\n"
    )


def test_a_run_dir_that_is_a_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        main(
            parse_config(["--model", str(tiny_llama), "--run_dir", str(tmp_path / "file"), *SMALL])
        )
