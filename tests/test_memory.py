"""The memory plan: what it counts, what a run prints at its start, and (in a study) what a run really takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import read_lines
from transformers import AutoConfig, LlamaConfig

import R1ZeroTrain
from R1ZeroTrain import Config, memory_plan, run

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# A layer: q and o [64, 64], k and v [32, 64], gate and up [100, 64], down [64, 100], two norms [64].
LAYER = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 100 + 2 * 64
WEIGHTS = 3 * LAYER + 1000 * 64 + 64
THROUGH = 3 * (2 * 128 + 2 * 96 + 3 * 164 + 2 * 64)  # what the layers read and write per token
KV = 3 * 2 * 32


def plan(**options: object) -> dict[str, float]:
    sizes = {"questions_per_step": 2, "group_size": 3, "max_new_tokens": 40}
    return memory_plan(CONFIG, Config(**sizes | options), 10)


def gb(**sizes: float) -> dict[str, float]:
    names = {"adam": "gradients and Adam", "kv": "KV cache", "batch": "micro-batch"}
    return {names.get(k, k): pytest.approx(size / 1e9) for k, size in sizes.items()}


def test_a_plan_by_hand() -> None:
    full = {"weights": 4 * WEIGHTS, "adam": 14 * WEIGHTS, "kv": 6 * 50 * KV * 4}
    batch = 4096 * (THROUGH + 2 * KV) * 4
    assert plan() == gb(**full, reference=4 * WEIGHTS, sampler=0, batch=batch)
    assert plan(kl_beta=0.0)["reference"] == 0
    assert plan(rollout_rows=2)["KV cache"] == pytest.approx(plan()["KV cache"] / 3)
    assert plan(tokens_per_microbatch=1024)["micro-batch"] == pytest.approx(batch / 4e9)
    assert plan(gradient_checkpointing=True)["micro-batch"] == pytest.approx(batch / 12e9)


def test_bfloat16_halves_what_is_not_trained() -> None:
    low, full = plan(dtype="bfloat16"), plan()
    assert low["weights"] == pytest.approx(full["weights"])
    assert low["gradients and Adam"] == full["gradients and Adam"]
    assert low["reference"] == low["sampler"] == full["reference"] / 2
    assert low["KV cache"] == full["KV cache"] / 2


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_lora_trains_adapters_and_copies_nothing(dtype: str, size: int) -> None:
    adapters = 8 * THROUGH  # the plan counts adapters for norms, too
    got = plan(dtype=dtype, lora_rank=8)
    wanted = gb(weights=WEIGHTS * size + 4 * adapters, adam=14 * adapters, reference=0, sampler=0)
    assert {name: got[name] for name in wanted} == wanted


def said(tiny_llama: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list:
    words = ["--device", "cpu", "--steps", "0", "--eval_questions", "4", "--max_new_tokens", "8"]
    words += ["--model", str(tiny_llama), "--run_dir", str(folder / "run"), *more]
    assert run(words) == 0
    return capsys.readouterr().out.splitlines()


def test_the_start_of_a_run_says_what_it_will_do(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, memory, *_ = said(tiny_llama, tmp_path, capsys)
    assert re.fullmatch(
        rf"countdown: 0 questions to train on, 4 held out, (chat|base) template, output in {tmp_path}/run/",
        task,
    )
    parts = r"weights (\S+), gradients and Adam \S+, reference \S+, sampler \S+, KV cache \S+, "
    start = f"{tiny_llama} in float32 on cpu, memory "
    assert re.fullmatch(rf"{start}\S+ GB of \S+ free \({parts}micro-batch \S+\)", memory)


def test_a_run_that_may_not_fit_names_options_that_help_and_goes_on(
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little = type("", (), {"available": 1_000_000})
    monkeypatch.setattr(R1ZeroTrain.psutil, "virtual_memory", lambda: little)
    task, memory, *_ = said(tiny_llama, tmp_path, capsys, "--template", "base")
    assert "base template" in task and " GB of 0.00 free (" in memory
    for option in ("--lora_rank 16", "--gradient_checkpointing", "--tokens_per_microbatch 1024"):
        assert option in memory.split("; try ")[1]
    assert len(read_lines(tmp_path / "run")) == 1


# --- what a run takes ------------------------------------------------------------------------------------------------


def peak_of_a_run(shape: str, words: list[str], folder: str) -> None:
    """In its own process: prints the plan and the peak minus the memory of imports, in GB."""
    import benchmark  # the shapes

    benchmark.add_digits(prompt := 170, spread=0)
    words = [*words, *benchmark.MODELS[shape][-1].split(), "--task", "digits", "--steps", "3"]
    words += ["--eval_questions", "8"]
    words += ["--model", folder, "--run_dir", f"{folder}/run{os.getpid()}"]
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    assert run(words) == 0
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    total = sum(
        memory_plan(
            AutoConfig.from_pretrained(folder), R1ZeroTrain.parse_config(words[:-2]), prompt
        ).values()
    )
    print("MEASURED", total, (peak - before) / 1e9)


@pytest.mark.study
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_a_run_takes_what_the_plan_says(shape: str, tmp_path: Path) -> None:
    """The plan is right within 20%, and for the large model LoRA takes at most half the memory of full training."""
    make = f"""import sys; sys.argv.append("--worker"); import benchmark, os
os.rename(benchmark.make_model("{shape}"), "{tmp_path}/model")"""
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": f"{tests}:{Path(tests).parent}"}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run([sys.executable, "-c", make], env=environment, check=True, capture_output=True)

    peaks = {}
    for lora in ("0", "8"):
        for dtype in ("float32", "bfloat16"):
            words = ["--lora_rank", lora, "--dtype", dtype, "--device", "cpu"]
            code = "import sys; sys.argv.append('--worker'); import test_memory as t; "
            code += f"t.peak_of_a_run({shape!r}, {words}, '{tmp_path}/model')"
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            planned, peak = map(float, re.search(r"MEASURED (\S+) (\S+)", done.stdout).groups())
            print(f"{shape} --lora_rank {lora} {dtype}: planned {planned:.3f}, peak {peak:.3f} GB")
            assert 0.8 < peak / planned < 1.2 or 0.8 < planned / peak < 1.2
            peaks[lora, dtype] = peak
    if shape == "wide":
        assert peaks["8", "float32"] <= peaks["0", "float32"] / 2
        assert peaks["8", "bfloat16"] <= peaks["0", "bfloat16"] / 2
