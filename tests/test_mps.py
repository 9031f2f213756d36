"""A proof that a run needs nothing that MPS, the GPU of a Mac, lacks: for machines that have none.

`OnMPS` is a tensor that says it lives on `mps:0`, keeps its numbers on the CPU, and refuses what MPS refuses: an
operator without a kernel, float64, a second operand that was left on the CPU, `.numpy()`. The whole of `main` runs on
it: sampling, update, AdamW, evaluation, checkpoint, saving. The device path is thus what takes or makes such a tensor,
backward included; what is done with plain tensors, like the report, is not on it.

An operator has an MPS kernel if torch's own native_functions.yaml, which every torch brings along, declares one for it
or for the out= variant that it delegates to. One without is run as MPS would: by the kernel in the dispatcher's MPS
slot, which is there if the operator is composed of others (they come back here one by one) and is missing otherwise, so
that torch itself raises what a Mac would. PYTORCH_ENABLE_MPS_FALLBACK, which would hide a missing kernel, has no say.

Attention: MPS has no fused kernel with a gradient. Where a gradient is wanted, it takes
`_scaled_dot_product_attention_math`, which is what runs here, operator by operator; where none is, it takes
`_scaled_dot_product_attention_math_for_mps`, which a test looks up. What no test here can see: whether an MPS kernel is
right, whether it is new in this torch, and autocast, as bfloat16 is not the default.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchgen
import transformers.integrations.sdpa_attention as sdpa_attention
import yaml
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

import R1ZeroTrain
from prompts import TASKS
from R1ZeroTrain import load_policy, main, parse_config

MPS = torch.device("mps", 0)
REAL = torch.backends.mps.is_available()
OPTIONS = "--steps 1 --questions_per_step 2 --group_size 4 --max_new_tokens 4 --eval_questions 2 --operands 2 --temperature 3"
CPU_INDICES = (
    "index.Tensor",
    "index_put",
    "index_put_",
    "_index_put_impl_",
)  # which move them to the device


def declared() -> set[str]:
    """The operators with a kernel for MPS, as `name.overload`: their own, or that of the out= they delegate to."""
    text = (
        Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    ).read_text()
    entries = {
        entry["func"].partition("(")[0]: entry for entry in yaml.load(text, yaml.CSafeLoader)
    }

    def has(name: str | None) -> bool:
        keys = entries[name].get("dispatch", {}) if name else {}
        return any("MPS" in [key.strip() for key in group.split(",")] for group in keys)

    return {
        name
        for name, entry in entries.items()
        if has(name) or has(entry.get("structured_delegate"))
    }


KERNELS = declared()


class OnMPS(Tensor):
    """See above. C++ takes it for a meta tensor, so that what C++ makes like it is told from what is on the CPU."""

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
    is_mps = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})

    def tolist(self) -> list:
        return self.kept.tolist()

    def data_ptr(self) -> int:
        return self.kept.data_ptr()

    def __reduce_ex__(self, protocol: int) -> tuple:  # torch.save
        return self.kept.__reduce_ex__(protocol)


class PretendMPS(TorchDispatchMode):
    """Sees what makes a tensor on the device out of none that is there."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


SEEN: collections.Counter[str] = collections.Counter()  # operators on the device path
PARTS: set[tuple] = (
    set()
)  # composed operators that have been looked into, with these kinds of arguments


def dispatch(operator, args: tuple, kwargs: dict) -> object:
    """An operator on the device, or off it; raises what MPS would."""
    name, leaves = operator.__name__.removesuffix(".default"), tree_leaves((args, kwargs))
    here = [x for x in leaves if isinstance(x, OnMPS)]
    to = next((x.type for x in leaves if isinstance(x, torch.device)), None)
    if not here and to not in ("mps", "meta"):
        return operator(*args, **kwargs)
    SEEN[name] += 1
    copies = name in ("_to_copy", "copy_")  # between devices: each has code of its own for it
    given = [args[0], *args[2:]] if name in CPU_INDICES else leaves
    elsewhere = [
        x for x in given if isinstance(x, Tensor) and x.dim() and not isinstance(x, OnMPS)
    ]  # not a number
    if here and elsewhere and not copies:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
    if not (name in KERNELS or copies or operator.is_view):  # a view has nothing to compute
        kinds = [(x.dtype, x.dim()) if isinstance(x, Tensor) else type(x) for x in leaves]
        if operator._schema.is_mutable or (name, *kinds) not in PARTS:
            there = {"device": torch.device("meta")} if "device" in kwargs else {}
            with PretendMPS():
                result = operator.redispatch(
                    DispatchKeySet(DispatchKey.MPS), *args, **kwargs | there
                )
            PARTS.add((name, *kinds))
            if operator._schema.is_mutable:  # its parts have written already
                return result

    def off(x: object) -> object:
        return (
            x.kept
            if isinstance(x, OnMPS)
            else torch.device("cpu")
            if isinstance(x, torch.device)
            else x
        )

    def on(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        written = [h for h in here if h.kept is x]  # is given back, and not another tensor
        return written[0] if written else OnMPS(x)

    result = operator(*tree_map(off, args), **tree_map(off, kwargs))
    if name == "copy_" and not isinstance(args[0], OnMPS):
        return args[0]
    return result if to == "cpu" else tree_map(on, result)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """A machine with MPS, and nothing else; yields a list with an entry for each release of the allocator's cache."""
    released = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append(1))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(sdpa_attention, "_is_torch_mps_available", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Not plain "mps": C++ would ask the machine for the number of the current one.
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: MPS))

    def load(*args: object) -> PreTrainedModel:  # on the CPU, by way of a true meta device
        with _disable_current_modes():
            return load_policy(*args)

    monkeypatch.setattr(R1ZeroTrain, "load_policy", load)
    swap, lift = (
        torch.__future__.get_swap_module_params_on_conversion(),
        torch._C._only_lift_cpu_tensors(),
    )
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # .to(device) keeps the parameters' identity
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=mps) makes it on the CPU, then copies it
    AcceleratorState._reset_state(reset_partial_state=True)
    SEEN.clear()
    with PretendMPS():
        yield released
    torch.__future__.set_swap_module_params_on_conversion(swap)
    torch._C._set_only_lift_cpu_tensors(lift)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(run_dir: Path, *more: str) -> list[dict]:
    main(parse_config([*OPTIONS.split(), "--run_dir", str(run_dir), *more]))
    timings = ("completion_tokens_per_second", "seconds")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in timings and not isinstance(v, list)}
        for line in lines
    ]


# --- the proof -------------------------------------------------------------------------------------------------------


def parity_reward(completion: str, numbers: list[int], target: int) -> float:
    """A reward that about half of the completions earn: there has to be something to learn."""
    return float(sum(map(ord, completion)) % 2)


@pytest.mark.skipif(REAL, reason="there is a real one, see the last test")
def test_a_run_needs_nothing_that_mps_lacks(
    pretend: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        TASKS, "countdown", dataclasses.replace(TASKS["countdown"], reward=parity_reward)
    )
    lines = run(tmp_path / "mps", "--kl_beta", "0.1", "--save_every", "1")
    assert lines[0]["grad_norm"] > 0 and lines[1]["kl"] > 0, (
        "a run that has learned nothing proves nothing"
    )
    assert {path.name for path in (tmp_path / "mps").iterdir()} >= {"checkpoint", "model"}
    # Each part of a run has been seen on the device, or this has proved less than it says.
    sampling, backward = (
        {"searchsorted.Tensor", "cumsum"},
        {"embedding_dense_backward", "silu_backward"},
    )
    optimizer, clipping = {"addcdiv_", "lerp_.Scalar"}, {"linalg_vector_norm"}
    assert sampling | backward | optimizer | clipping <= set(SEEN)
    assert "uniform_" not in SEEN, (
        "what is random is drawn on the CPU, so that a seed gives one run on any device"
    )
    assert not any("flash" in name or "efficient" in name for name in SEEN), (
        "attention that MPS doesn't have"
    )
    assert not any("scaled_dot_product" in name for name in SEEN), (
        "which is wrong there with padding"
    )
    assert len(pretend) == len(lines), "the allocator would keep a buffer for each shape it has met"

    # It has computed what the CPU does, so what was seen is what a run does.
    AcceleratorState._reset_state(reset_partial_state=True)
    before = sum(SEEN.values())
    for line, expected in zip(
        lines, run(tmp_path / "cpu", "--kl_beta", "0.1", "--device", "cpu"), strict=True
    ):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert sum(SEEN.values()) == before, "what is on the CPU is not on the device path"


# --- the proof can fail ----------------------------------------------------------------------------------------------


def to_double(rewards: Tensor, scale: str) -> Tensor:
    return rewards.double().flatten().float()


def eigenvalues(rewards: Tensor, scale: str) -> Tensor:
    return rewards.flatten() + torch.linalg.eig(rewards.T @ rewards)[0].real.sum()


def left_on_the_cpu(rewards: Tensor, scale: str) -> Tensor:
    return rewards.flatten() * torch.ones(rewards.numel())


def by_numpy(rewards: Tensor, scale: str) -> Tensor:
    return torch.from_numpy(rewards.flatten().numpy())


class NoKernelBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * torch.linalg.eig(gradient.new_ones(2, 2))[0].real.sum()


@pytest.mark.skipif(REAL, reason="pretends")
@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (to_double, "float64"),
        (eigenvalues, "Could not run 'aten::linalg_eig' with arguments from the 'MPS' backend"),
        (left_on_the_cpu, "same device"),
        (by_numpy, "numpy"),
    ],
)
def test_a_step_that_mps_cannot_do_is_refused(
    pretend: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant, message: str
) -> None:
    monkeypatch.setattr(R1ZeroTrain, "group_advantages", mutant)
    monkeypatch.setattr(R1ZeroTrain, "evaluate", lambda *_, **__: ({}, []))
    with pytest.raises((TypeError, RuntimeError), match=message):
        run(tmp_path / "run", "--max_new_tokens", "1")


@pytest.mark.skipif(REAL, reason="pretends")
def test_a_backward_that_mps_cannot_do_is_refused(pretend: None) -> None:
    x = torch.ones(3, device=MPS, requires_grad=True)
    with pytest.raises(NotImplementedError, match="linalg_eig"):
        NoKernelBackward.apply(x).sum().backward()
    (2 * x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2] and x.grad.device == MPS


@pytest.mark.skipif(REAL, reason="pretends")
def test_an_operator_made_of_others_is_as_good_as_its_parts(pretend: None) -> None:
    matrix = torch.ones(2, 2, device=MPS)
    torch._foreach_add_([matrix], 1.0)  # composed of add, which has a kernel
    assert (
        matrix.tolist() == [[2, 2], [2, 2]] and SEEN["_foreach_add_.Scalar"] and SEEN["add_.Tensor"]
    )
    with pytest.raises(NotImplementedError, match="aten::linalg_eig"):
        torch.linalg.eigvals(
            matrix.requires_grad_()
        )  # with a gradient: composed of eig, which has none


def test_what_torch_declares_for_mps_is_read_rightly() -> None:
    own = {
        "searchsorted.Tensor",
        "_scaled_dot_product_attention_math_for_mps",
        "embedding_dense_backward",
        "mm",
    }
    delegated = {
        "add.Tensor",
        "cumsum",
        "lerp_.Scalar",
        "isin.Tensor_Tensor",
        "gather",
        "sort.stable",
    }
    assert own | delegated <= KERNELS
    assert (
        not {"linalg_eig", "_scaled_dot_product_flash_attention_for_cpu", "_foreach_add.Scalar"}
        & KERNELS
    )
    assert len(KERNELS) > 500


# --- where there is a Mac --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="needs a Mac")
def test_a_run_on_mps_is_the_run_on_the_cpu(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = run(tmp_path / "mps", "--kl_beta", "0.1", "--device", "mps")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert lines[0]["logp_gap"] < 1e-3, "the sampler's kernels and the trainer's agree"
    assert lines[0]["grad_norm"] == pytest.approx(
        run(tmp_path / "cpu", "--device", "cpu")[0]["grad_norm"], rel=0.05
    )
