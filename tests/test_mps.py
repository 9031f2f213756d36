"""Proves, on machines without MPS (the GPU of a Mac), that a run uses nothing that MPS lacks.

`OnMPS` is a tensor that reports the device `mps:0`, keeps its data on the CPU, and refuses what MPS refuses: an
operator without a kernel, float64, a second operand that was left on the CPU, `.numpy()`. The whole of `main` runs on
it: sampling, update, AdamW, evaluation, checkpoint, saving. The device path is every operation that takes or makes such
a tensor, backward included. Work on plain tensors, like the report, is not on it.

An operator has an MPS kernel if native_functions.yaml, which is part of torch, declares one for it or for the out=
variant that it delegates to. An operator without one runs as on MPS, by the kernel in the dispatcher's MPS slot. If the
operator is composed of others, this kernel exists, and the parts are dispatched here one by one. Otherwise torch raises
the error that a Mac would raise. PYTORCH_ENABLE_MPS_FALLBACK, which would hide a missing kernel, has no effect.

These tests cannot see whether an MPS kernel is correct or whether it is new in this version of torch. They do not test
autocast, because bfloat16 is not the default.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from accelerate.state import AcceleratorState, PartialState
from conftest import read_lines
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import PreTrainedModel

import R1ZeroTrain
from prompts import TASKS
from R1ZeroTrain import load_policy, main, parse_config

MPS = torch.device("mps", 0)
REAL = torch.backends.mps.is_available()
OPTIONS = "--steps 1 --questions_per_step 2 --group_size 4 --max_new_tokens 4 --eval_questions 2 --kl_beta 0.1 --temperature 3 --save_every 1"
CPU_INDICES = (
    "index.Tensor",
    "index_put",
    "index_put_",
    "_index_put_impl_",
)  # these operators move indices to the device


def declared() -> set[str]:
    """The operators with a kernel for MPS, as `name.overload`: their own, or that of the out= variant that they use."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    rows = yaml.load(path.read_text(), yaml.CSafeLoader)
    entries = {row["func"].partition("(")[0]: row for row in rows}

    def has(name: str | None) -> bool:
        return bool(re.search(r"\bMPS\b", str([*entries.get(name, {}).get("dispatch", [])])))

    return {name for name in entries if has(name) or has(entries[name].get("structured_delegate"))}


KERNELS = declared()


class OnMPS(Tensor):
    """See above. To C++ it is a meta tensor, so that tensors that C++ makes like it differ from those on the CPU."""

    @staticmethod
    def __new__(cls, kept: Tensor) -> "OnMPS":
        if kept.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
            )
        strides = {"strides": kept.stride(), "storage_offset": kept.storage_offset()}
        self = Tensor._make_wrapper_subclass(
            cls, kept.size(), **strides, dtype=kept.dtype, device="meta"
        )
        self.kept = kept
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: MPS)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})

    def tolist(self) -> list:
        return self.kept.tolist()

    def data_ptr(self) -> int:
        return self.kept.data_ptr()


class PretendMPS(TorchDispatchMode):
    """Intercepts operators that make a tensor on the device without taking one."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


SEEN: collections.Counter[str] = collections.Counter()  # operators on the device path


def dispatch(operator, args: tuple, kwargs: dict) -> object:
    """Runs an operator, on the device or off it. Raises what MPS would raise."""
    name, leaves = operator.__name__.removesuffix(".default"), tree_leaves((args, kwargs))
    here = [x for x in leaves if isinstance(x, OnMPS)]
    to = next((x.type for x in leaves if isinstance(x, torch.device)), None)
    if not here and to not in ("mps", "meta"):
        return operator(*args, **kwargs)
    SEEN[name] += 1
    copies = name in ("_to_copy", "copy_")  # between devices: every device has its own code for it
    given = [args[0], *args[2:]] if name in CPU_INDICES else leaves
    # A tensor without dimensions is a scalar, which may be on any device.
    elsewhere = [x for x in given if isinstance(x, Tensor) and x.dim() and not isinstance(x, OnMPS)]
    if here and elsewhere and not copies:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
    if not (name in KERNELS or copies or operator.is_view):  # a view computes nothing
        there = {"device": torch.device("meta")} if "device" in kwargs else {}
        with PretendMPS():
            parts = operator.redispatch(DispatchKeySet(DispatchKey.MPS), *args, **kwargs | there)
        if operator._schema.is_mutable:  # the parts have already written the result
            return parts

    def off(x: object) -> object:
        return torch.device("cpu") if isinstance(x, torch.device) else getattr(x, "kept", x)

    def on(x: Tensor) -> Tensor:  # returns the tensor that was written to, not a new one
        return ([h for h in here if h.kept is x] or [OnMPS(x)])[0]

    result = operator(*tree_map(off, args), **tree_map(off, kwargs))
    if name == "copy_" and not isinstance(args[0], OnMPS):
        return args[0]
    return result if to == "cpu" else tree_map_only(Tensor, on, result)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """A machine with MPS as its only accelerator. Yields a list with an entry for each release of the cache."""
    if REAL:
        pytest.skip("this machine has MPS; see the last test")
    released = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append(1))
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Not plain "mps", because C++ would ask the machine for the index of the current device.
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: MPS))

    def load(*args: object) -> PreTrainedModel:  # on the CPU, via a real meta device
        with _disable_current_modes():
            return load_policy(*args)

    monkeypatch.setattr(R1ZeroTrain, "load_policy", load)
    # The memory plan makes a real meta model, too.
    monkeypatch.setattr(R1ZeroTrain, "announce", lambda *_: None)
    save = torch.save  # which copies tensors to the CPU in C++
    monkeypatch.setattr(
        torch, "save", lambda state, file: save(tree_map_only(OnMPS, lambda x: x.kept, state), file)
    )
    future, swap = torch.__future__, torch.__future__.get_swap_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    future.set_swap_module_params_on_conversion(True)  # .to(device) keeps the parameter objects
    # torch.tensor(..., device=mps) makes the tensor on the CPU and then copies it.
    torch._C._set_only_lift_cpu_tensors(True)
    SEEN.clear()
    with PretendMPS():
        yield released
    future.set_swap_module_params_on_conversion(swap)
    torch._C._set_only_lift_cpu_tensors(lift)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(run_dir: Path, *more: str) -> list[dict]:
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse_config([*OPTIONS.split(), "--run_dir", str(run_dir), *more]))
    return [
        {k: v for k, v in line.items() if isinstance(v, float) and "second" not in k}
        for line in read_lines(run_dir)
    ]


# --- the proof -------------------------------------------------------------------------------------------------------


def test_a_run_needs_nothing_that_mps_lacks(
    pretend: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This rewards about half of the completions, so that there is something to learn.
    parity = dataclasses.replace(
        TASKS["countdown"], reward=lambda text, **_: float(sum(map(ord, text)) % 2)
    )
    monkeypatch.setitem(TASKS, "countdown", parity)
    lines = run(tmp_path / "mps")
    assert lines[0]["grad_norm"] > 0 and lines[1]["kl"] > 0, "the policy has learned nothing"
    # Each part of a run must have been seen on the device, or this test proves less than its name says.
    assert SEEN.keys() >= {
        *("searchsorted.Tensor", "cumsum"),  # sampling
        *("embedding_dense_backward", "silu_backward"),
        *("addcdiv_", "lerp_.Scalar", "linalg_vector_norm"),  # the optimizer and the norm
    }
    assert "uniform_" not in SEEN, "random numbers are drawn on the CPU, for any device"
    config = R1ZeroTrain.load_policy("notebooks/tiny-base").config
    assert config._attn_implementation == "eager", "fused attention is wrong on MPS with padding"
    assert len(pretend) == len(lines), "MPS would keep a buffer for each shape it has seen"

    # The results are those of the CPU, so the operators seen are those of a real run.
    before = SEEN.total()
    for line, expected in zip(lines, run(tmp_path / "cpu", "--device", "cpu"), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert SEEN.total() == before, "a run on the CPU is not on the device path"


# --- the proof can fail ----------------------------------------------------------------------------------------------


def no_kernel(x: Tensor) -> Tensor:
    return torch.linalg.eig(x.new_ones(2, 2))[0].real.sum()


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda rewards, _: rewards.double().flatten().float(), "float64"),
        (
            lambda rewards, _: rewards.flatten() + no_kernel(rewards),
            "Could not run 'aten::linalg_eig' with arguments from the 'MPS' backend",
        ),
        (lambda rewards, _: rewards.flatten() * torch.ones(rewards.numel()), "same device"),
        (lambda rewards, _: torch.from_numpy(rewards.flatten().numpy()), "numpy"),
    ],
)
def test_an_operation_that_mps_lacks_raises(
    pretend: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant, message: str
) -> None:
    monkeypatch.setattr(R1ZeroTrain, "group_advantages", mutant)
    monkeypatch.setattr(R1ZeroTrain, "evaluate", lambda *_: ({}, []))
    with pytest.raises((TypeError, RuntimeError), match=message):
        run(tmp_path / "run", "--max_new_tokens", "1")


def test_the_parts_of_an_operator_and_a_backward_are_seen(pretend: None) -> None:
    x = torch.ones(3, device=MPS)
    torch._foreach_add_([x], 1.0)  # composed of add, which has a kernel
    assert x.tolist() == [2, 2, 2] and SEEN["_foreach_add_.Scalar"] and SEEN["add_.Tensor"]
    (2 * x.requires_grad_()).sum().backward()
    assert x.grad.tolist() == [2, 2, 2] and x.grad.device == MPS
    x.register_hook(no_kernel)
    with pytest.raises(NotImplementedError, match="aten::linalg_eig"):
        (2 * x).sum().backward()
    with pytest.raises(NotImplementedError, match="aten::linalg_eig"):
        torch.linalg.eigvals(x.outer(x))  # with a gradient: composed of eig, which has none


def test_kernels_that_torch_declares_for_mps_are_found() -> None:
    own = {"searchsorted.Tensor", "embedding_dense_backward", "mm"}
    delegated = {"add.Tensor", "cumsum", "lerp_.Scalar", "isin.Tensor_Tensor", "sort.stable"}
    lacking = {"linalg_eig", "_scaled_dot_product_flash_attention_for_cpu", "_foreach_add.Scalar"}
    assert own | delegated <= KERNELS and not lacking & KERNELS


# --- where there is a Mac --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="needs a Mac")
def test_a_run_on_mps_equals_the_run_on_the_cpu(tmp_path: Path) -> None:
    lines, expected = (run(tmp_path / device, "--device", device) for device in ("mps", "cpu"))
    assert lines[0]["logp_gap"] < 1e-3, "the sampler's kernels and the trainer's agree"
    assert lines[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.05)
