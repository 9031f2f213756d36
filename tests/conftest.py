"""Shared by all tests: no network access, and model folders small enough to be trained in a second."""

import atexit
import os
import shutil
import sys
import tempfile

# Both are read when a library is imported, so they come before the imports below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads spin while they wait, and pytest has two processes
os.environ.pop("WANDB_MODE", None)
if os.environ.pop(
    "PYTHONDONTWRITEBYTECODE", None
):  # otherwise each Python process that a test starts would compile torch for 6 s
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
    sys.dont_write_bytecode = False

import ipaddress
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import rewards
from R1ZeroTrain import Rollout

sys.modules["notebooks.plot_runs"] = None  # as without matplotlib: it takes two seconds to import
ATTEMPTS: list[str] = []  # attempts to reach another machine


def is_local(address: object) -> bool:
    """Whether a socket address stays on this machine: a path (AF_UNIX), or a loopback host."""
    host = address[0] if isinstance(address, tuple) else None
    if host is None or host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a host name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest tests first, so that neither of pytest's two processes has one left at the end."""
    slow = ("test_walkthrough.py", "test_tiny_base.py")
    items.sort(key=lambda item: item.path.name not in slow)


@pytest.fixture(scope="session", autouse=True)
def _no_way_out() -> Iterator[None]:
    """Refuses connections to other machines, and look-ups of their names; `_no_network` reports them."""
    patch = pytest.MonkeyPatch()

    def guard(owner: object, name: str, address_of) -> None:
        allowed = getattr(owner, name)

        def guarded(*args, **kwargs):
            address = address_of(*args, **kwargs)
            if not is_local(address):
                ATTEMPTS.append(f"socket.{name} {address}")
                raise OSError(f"tests have no network: {name} {address}")
            return allowed(*args, **kwargs)

        patch.setattr(owner, name, guarded)

    guard(socket.socket, "connect", lambda _, address: address)
    guard(socket.socket, "connect_ex", lambda _, address: address)
    guard(socket.socket, "sendto", lambda _, data, *rest: rest[-1])
    # A name is looked up before a connection is made. Without a network, nothing but the look-up happens.
    guard(
        socket,
        "getaddrinfo",
        lambda host, *_, **__: (host.decode() if isinstance(host, bytes) else host,),
    )
    yield
    patch.undo()
    if rewards._worker:  # otherwise Python warns at exit that the process is still running
        rewards._worker.kill()
        rewards._worker.communicate()


@pytest.fixture(autouse=True)
def _no_network(_no_way_out: None) -> Iterator[None]:
    """Fails a test that tried to reach another machine, even if the code under test handled the refusal."""
    ATTEMPTS.clear()
    yield
    assert not ATTEMPTS, f"tests must not use the network, but this one tried {ATTEMPTS}"


# Extracts `8 7 4=36` from TinyZero's sentence, and leaves other questions unchanged: short prompts keep tests fast.
CHAT_TEMPLATE = (
    "{% set asked = messages[-1].content %}"
    "{% if '[' in asked %}{{ asked.split('[')[1].split(']')[0].replace(',', '') }}="
    "{{ asked.split('equals ')[1].split('.')[0] }}{% else %}{{ asked }}{% endif %}\n<think>"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the 256 bytes, in the alphabet of Qwen2Tokenizer; any text survives a round trip."""
    # The special tokens come last: id 0 is text, so that mistaking it for padding makes a test fail.
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_model(kind: type[PretrainedConfig], folder: Path, **options: object) -> Path:
    """A random model of 2 layers and width 32, saved with its tokenizer as any hub model is."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    config = kind(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # With the usual 0.02, a model would almost ignore the context, and errors in a cache would not show.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(LlamaConfig, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(Qwen2Config, tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(GPT2Config, tmp_path_factory.mktemp("tiny-gpt2"))


def prompt_of(rollout: Rollout, row: int) -> torch.Tensor:
    """The prompt's ids of a completion, without padding."""
    return rollout.prompt_ids[row][rollout.prompt_ids[row] >= 0]


def plain_forward(
    model: torch.nn.Module, rollout: Rollout, row: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp [T], entropy [T], all_logp [T, V]) of one completion by a plain forward pass: a single row, no padding,
    no cache, all logits, softmax in float64."""
    prompt, ids = prompt_of(rollout, row), rollout.ids[row, : rollout.lengths[row]]
    logits = model(torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    all_logp = torch.log_softmax(logits.double() / temperature, dim=-1)
    return all_logp.gather(1, ids[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(1), all_logp


def letter_reward(completion: str, numbers: list[int], target: int) -> float:
    """A reward that a random model earns from time to time. Without it, there would be nothing to learn from."""
    return float(any("a" <= c <= "z" for c in completion.removeprefix("<think>")))


def read_lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
