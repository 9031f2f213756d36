"""Any causal model of the hub: small random ones of many families, sampled and trained, against a plain forward pass.

The forward pass is the model's own, of one row at a time, without padding, cache or fused attention. A family that the
sampler can't follow has to be refused by its config.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import prompt_of, read_lines
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import R1ZeroTrain
from prompts import TASKS as REGISTRY
from R1ZeroTrain import (
    Config,
    Rollout,
    forward,
    generate,
    load_policy,
    load_questions,
    load_tokenizer,
    token_logprobs,
)

TINY_BASE = Path(R1ZeroTrain.__file__).parent / "notebooks/tiny-base"
WINDOW = 8  # far shorter than prompts and completions, so that a mistake in a sliding window shows
SLIDING = ["sliding_attention", "full_attention"]
SMALL = {
    **{
        "vocab_size": 376,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    # Far from the usual 0.02, which would be close to ignoring the context: mistakes in a cache have to show.
    **{"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 8,
    "hidden_activation": "gelu_pytorch_tanh",
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
# Name of the family, its config class, and what is special to it.
FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2-windows": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": SLIDING,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {
            **GEMMA,
            "layer_types": SLIDING,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "layer_types": SLIDING[:1] + SLIDING,
            "num_hidden_layers": 3,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3Config", {}),
    "phi3-longrope": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 8, "norm_topk_prob": True}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **EXPERTS,
            **{
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "n_group": 2,
                "topk_group": 1,
                "num_key_value_heads": 4,
            },
            **{"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "head_dim": 4},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
}
QUESTIONS = [
    "7",
    "Which of all these numbers is the largest, and why? 12 5 88 3 41 9",
    "1 2 3 4 5 =",
    "8 + 3 - 9 * 2 = ?",
]
TASKS = [{"question": question, "answer": {}, "index": i} for i, question in enumerate(QUESTIONS)]


def config(**options: object) -> Config:
    return Config(
        **({"max_new_tokens": 30, "group_size": 6, "rollout_rows": 12, "device": "cpu"} | options)
    )


def save(name: str, options: dict, folder: Path, eos: int) -> Path:
    """A random model of the family with tiny-base's tokenizer; one id in `eos` ends a completion, as chat models do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**SMALL | options))
    with torch.no_grad():
        for parameter in (
            model.parameters()
        ):  # biases, norms and routers start at 0 or 1, and would hide their part
            parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = list(range(1, 376, eos))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(
        lambda family: save(*FAMILIES[family], tmp_path_factory.mktemp(family), eos=16)
    )


def plainly(folder: Path) -> Callable[[Rollout, int, float], Tensor]:
    """Log-probabilities of a completion by the book: one row, no padding, no cache, attention written out, float64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()

    @torch.no_grad()
    def logp(rollout: Rollout, row: int, temperature: float) -> Tensor:
        prompt = prompt_of(rollout, row)
        body = rollout.ids[row, : rollout.lengths[row]]
        logits = (
            model(input_ids=torch.cat([prompt, body])[None], use_cache=False).logits[0].double()
        )
        all_logp = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
        return all_logp[torch.arange(len(body)), body]

    return logp


def largest_gap(actual: Tensor, rollout: Rollout, plain: list[Tensor]) -> float:
    return max(float((actual[i, : len(row)] - row).abs().max()) for i, row in enumerate(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_and_scoring_equal_a_plain_forward_pass(
    family: str, folder: Callable[[str], Path]
) -> None:
    policy, tokenizer = load_policy(str(folder(family))), load_tokenizer(str(folder(family)))
    plain_logp = plainly(folder(family))
    batches: list[int] = []
    policy.register_forward_pre_hook(
        lambda _, __, call: batches.append(len(call["input_ids"])), with_kwargs=True
    )
    for tasks, temperature in (
        (TASKS, 1.0),
        (TASKS[1:2], 0.7),
        (TASKS[:2], 1.6),
    ):  # one prompt needs no padding
        cfg = config(temperature=temperature)
        batches.clear()
        rollout = generate(policy, tokenizer, tasks, cfg.group_size, cfg, "test", lambda *_: None)
        shrinks = sum(after < before for before, after in zip(batches, batches[1:], strict=False))
        assert shrinks >= 1 and len(set(rollout.lengths.tolist())) > 3, (
            "rows have to leave, else this shows little"
        )
        assert bool(rollout.prompt_mask.all()) == (len(tasks) == 1)
        assert int(rollout.prompt_mask.sum(1).max() + rollout.lengths.max()) > 4 * WINDOW

        plain = [plain_logp(rollout, row, temperature) for row in range(len(rollout.ids))]
        with torch.no_grad():
            scored = token_logprobs(policy, rollout, torch.arange(len(plain)), cfg)[0]
        gaps = (
            largest_gap(rollout.logp_sampled, rollout, plain),
            largest_gap(scored, rollout, plain),
        )
        print(f"{family} temperature {temperature}: sampled {gaps[0]:.1e}, scored {gaps[1]:.1e}")
        assert max(gaps) < 1e-4


@pytest.mark.parametrize(
    "family",
    [family for family, (_, special) in FAMILIES.items() if EXPERTS.items() <= special.items()],
)
def test_experts_have_room_for_every_token(family: str, folder: Callable[[str], Path]) -> None:
    """Were an expert to drop tokens beyond its capacity, a row would depend on how many others chose the same one."""
    policy = load_policy(str(folder(family)))
    rows = torch.randint(376, (33, 20), generator=torch.Generator().manual_seed(0))
    alone, crowded, among_others = rows[:1], rows[:1].repeat(33, 1), rows
    with torch.no_grad():
        expected, *others = (
            forward(policy, ids, None, 20, "float32")[0] for ids in (alone, crowded, among_others)
        )
    for logits in others:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


HEADS = {  # families whose head is more than a matrix product, and one where it is not
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "attention_multiplier": 0.35}, False),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}, False),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}, False),  # a bias
    "olmo2": ("Olmo2Config", {}, True),
}


@pytest.mark.parametrize("family", [*FAMILIES, *HEADS])
def test_log_probabilities_and_gradients_equal_the_plain_path(
    family: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece of the vocabulary or all logits at once: each as by the book, a row at a time, in float64."""
    monkeypatch.setattr(R1ZeroTrain, "LOGITS_AT_ONCE", 10_000)
    name, special, plain = HEADS.get(family) or (*FAMILIES[family], None)
    path = save(name, special, tmp_path, eos=16) if family in HEADS else folder(family)
    policy, tokenizer = load_policy(str(path)), load_tokenizer(str(path))
    assert policy.plain_head == (
        "final_logit_softcapping" not in special if plain is None else plain
    )
    cfg = config(temperature=0.8)
    rollout = generate(policy, tokenizer, TASKS[:3], cfg.group_size, cfg, "test", lambda *_: None)
    rows, weights = (
        range(len(rollout.ids)),
        torch.randn(rollout.ids.shape, generator=torch.Generator().manual_seed(0)),
    )

    # The library has no float64 experts.
    dtype = (
        torch.float32
        if EXPERTS.items() <= special.items() or family == "gpt-oss"
        else torch.float64
    )
    book = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=dtype
    ).eval()
    expected = []
    for row in rows:
        prompt, body = prompt_of(rollout, row), rollout.ids[row, : rollout.lengths[row]]
        logits = book(input_ids=torch.cat([prompt, body])[None], use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        all_logp = torch.log_softmax(logits / cfg.temperature, dim=-1)
        logp, entropy = (
            all_logp[torch.arange(len(body)), body],
            -(all_logp.exp() * all_logp).sum(-1),
        )
        (logp * weights[row, : len(body)]).sum().backward()
        expected.append(torch.stack([logp, entropy]).detach())
    expected, gradients = (
        torch.cat(expected, dim=1),
        {name: p.grad for name, p in book.named_parameters()},
    )

    for plain_head in {policy.plain_head, False}:
        policy.plain_head = plain_head
        policy.zero_grad()
        logp, entropy, mask = token_logprobs(policy, rollout, torch.arange(len(rows)), cfg)
        (logp * weights[:, : logp.shape[1]])[mask].sum().backward()
        for found, wanted in zip((logp.detach()[mask], entropy[mask]), expected, strict=True):
            assert float((found - wanted).norm() / wanted.norm()) < 1e-5
        for name, parameter in policy.named_parameters():
            wanted, found = gradients[name], parameter.grad
            assert (found is None) == (wanted is None), name
            if wanted is not None and wanted.any():
                assert float((found - wanted).norm() / wanted.norm()) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_two_training_steps(
    family: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random models solve no Countdown: without a reward that some of a group earn there would be nothing to learn from.
    coin = dataclasses.replace(
        REGISTRY["countdown"], reward=lambda text, **_: float(sum(map(ord, text)) % 2)
    )
    monkeypatch.setitem(REGISTRY, "countdown", coin)
    options = {
        **{
            "model": folder(family),
            "run_dir": tmp_path / "run",
            "steps": 2,
            "questions_per_step": 2,
            "group_size": 4,
        },
        **{
            "max_new_tokens": 16,
            "eval_questions": 4,
            "device": "cpu",
            "lr": 0.001,
            "tokens_per_microbatch": 200,
        },
    }
    assert (
        R1ZeroTrain.run(
            [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        )
        == 0
    )
    lines = read_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(
        math.isfinite(line[name])
        for line in lines
        for name in line
        if not name.endswith("_interval")
    )
    assert all(line["logp_gap"] < 1e-4 for line in lines)
    assert lines[0]["kl"] == 0 < lines[2]["kl"] and lines[0]["grad_norm"] > 0

    before, after = (
        load_policy(str(path)).state_dict() for path in (folder(family), tmp_path / "run/model")
    )
    changed = [not torch.equal(weight, after[name]) for name, weight in before.items()]
    assert sum(changed) > 0.8 * len(changed), "all but what no token was routed to"


def test_longrope_ends_where_it_would_turn_all_positions_anew(
    folder: Callable[[str], Path],
) -> None:
    """Past that length the keys in the cache are turned by other angles than those of a plain forward pass."""
    path = str(folder("phi3-longrope"))
    policy, tokenizer = load_policy(path), load_tokenizer(path)
    prompt = len(
        generate(
            policy, tokenizer, TASKS[1:2], 1, config(max_new_tokens=1), "", lambda *_: None
        ).prompt_ids[0]
    )
    room = 128 - prompt
    assert generate(
        policy, tokenizer, TASKS[1:2], 1, config(max_new_tokens=room), "", lambda *_: None
    ).text
    options = {"tokenizer": tokenizer, "ask": TASKS[1]["question"]}
    assert load_questions("countdown", "", 0, 1, max_new_tokens=room, **options)
    with pytest.raises(
        R1ZeroTrain.UsageError,
        match=f"has room for {prompt - 1} beside --max_new_tokens {room + 1};",
    ):
        load_questions("countdown", "", 0, 1, max_new_tokens=room + 1, **options)


# What can't be supported, and a word of the reason.
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "mamba": (transformers.MambaConfig(), "state"),
    "rwkv": (transformers.RwkvConfig(), "state"),
    "jamba": (transformers.JambaConfig(), "state"),
    "qwen3_next": (transformers.Qwen3NextConfig(), "state"),
    "lfm2": (
        transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
        "state",
    ),
    "t5": (transformers.T5Config(), "left to right"),
    "bart": (transformers.BartConfig(), "left to right"),
    "bert": (transformers.BertConfig(), "left to right"),
    "openai-gpt": (transformers.OpenAIGPTConfig(), "takes no"),
    "bloom": (transformers.BloomConfig(), "position_ids"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_sampled_is_refused_by_its_config(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (family_config, reason) = tmp_path / "model", REFUSED[family]
    family_config.save_pretrained(model)
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(model)
    (
        model / "model.safetensors"
    ).touch()  # were it opened, the message would be that it cannot be loaded
    options = ["--model", str(model), "--run_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert R1ZeroTrain.run(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"R1ZeroTrain.py: --model {model}: cannot be loaded (a {family} model ")
    assert reason in line and "; try " in line
    assert not (tmp_path / "run/metrics.jsonl").exists()
