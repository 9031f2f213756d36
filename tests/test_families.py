"""Small random models of many families: sampling and training are compared with a plain forward pass.

The plain pass is the model's own, one row at a time, without padding, cache or fused attention. A model that gives
other numbers with padding and a cache is refused when it is loaded.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import plain_forward, read_lines
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import R1ZeroTrain
from prompts import TASKS, UsageError, load_questions
from R1ZeroTrain import Config, forward, generate, load_policy, load_tokenizer, token_logprobs

TINY_BASE = Path(R1ZeroTrain.__file__).parent / "notebooks/tiny-base"
WINDOW = 8  # far shorter than prompts and completions, so that a mistake in a sliding window shows
SLIDING = ["sliding_attention", "full_attention"]
# With the usual initializer_range of 0.02, models would almost ignore the context, and errors in a cache would not
# show.
SMALL = {
    "vocab_size": 376,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
# Name of the family, its config class, and its special options.
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
    "gemma2": ("Gemma2Config", GEMMA | {"layer_types": SLIDING, "attn_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3TextConfig", GEMMA | {"layer_types": SLIDING}),
    "phi3": ("Phi3Config", {}),
    "phi3-longrope": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 8, "norm_topk_prob": True}),
    "deepseek-v3": (
        "DeepseekV3Config",
        EXPERTS
        | {
            **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
            **{"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "head_dim": 4},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
            "num_key_value_heads": 4,
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),  # distances instead of positions
    # Heads that are more than a matrix product, and one that is not.
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "attention_multiplier": 0.35}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),  # a bias
    "olmo2": ("Olmo2Config", {}),
}
OTHER_HEADS = {"gemma2", "gemma3", "granite", "cohere", "phi"}
QUESTIONS = [
    {"question": question, "answer": {}, "index": i}
    for i, question in enumerate(
        ["7", "Which of all these numbers is the largest, and why? 12 5 88 3 41 9", "1 2 3 4 5 ="]
    )
]


def config(**options: object) -> Config:
    return Config(**({"max_new_tokens": 30, "rollout_rows": 12} | options))


def save(name: str, options: dict, folder: Path) -> Path:
    """A random model with tiny-base's tokenizer. Like chat models, it has several EOS tokens: one id in 16."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL | options)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases, norms and routers start at 0 or 1, where errors in their use would not show.
            parameter += 0.1 * torch.randn_like(parameter)
    if causal:
        model.generation_config.eos_token_id = list(range(1, 376, 16))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda family: save(*FAMILIES[family], tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_scores_and_gradients_equal_a_plain_forward_pass(
    family: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with logits in pieces of the vocabulary and all at once; both must equal a plain pass in float64."""
    monkeypatch.setattr(R1ZeroTrain, "LOGITS_AT_ONCE", 10_000)
    path = str(folder(family))
    policy, tokenizer = load_policy(path), load_tokenizer(path)
    assert policy.plain_head == (family not in OTHER_HEADS)
    double = family not in (
        "qwen3-moe",
        "deepseek-v3",
        "gpt-oss",
    )  # the library's experts are float32
    book = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64 if double else torch.float32
    ).eval()
    lengths = set()
    for questions, temperature in (
        (QUESTIONS, 1.0),
        (QUESTIONS[1:2], 0.7),  # one prompt needs no padding
        (QUESTIONS[:2], 1.6),
    ):
        cfg = config(temperature=temperature)
        rollout = generate(policy, tokenizer, questions, 6, cfg)
        lengths |= {*rollout.lengths.tolist()}
        assert rollout.prompt_ids.shape[1] + int(rollout.lengths.max()) > 4 * WINDOW

        book.zero_grad()
        rows = torch.arange(len(rollout.ids))
        plain = [plain_forward(book, rollout, row, temperature)[:2] for row in rows.tolist()]
        expected = [torch.cat(part) for part in zip(*plain)]
        weights = torch.linspace(-1, 1, len(expected[0])).roll(7)
        (expected[0] * weights).sum().backward()
        sampled = rollout.logp_sampled[rollout.ids >= 0]
        torch.testing.assert_close(sampled.double(), expected[0], atol=1e-4, rtol=0)

        for plain_head in {policy.plain_head, False}:
            policy.plain_head = plain_head
            policy.zero_grad()
            *found, mask = token_logprobs(policy, rollout, rows, cfg)
            (found[0][mask] * weights).sum().backward()
            pairs = {
                "logp": (found[0][mask], expected[0]),
                "entropy": (found[1][mask], expected[1]),
            }
            for (name, p), wanted in zip(policy.named_parameters(), book.parameters()):
                assert (p.grad is None) == (wanted.grad is None), name
                if p.grad is not None and wanted.grad.any():
                    pairs[name] = p.grad, wanted.grad
            for name, (actual, wanted) in pairs.items():
                assert (actual - wanted).norm() < 1e-5 * wanted.norm(), name
        policy.plain_head = family not in OTHER_HEADS
    assert len(lengths) > 2, "rows must leave the batch, or this test shows little"


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_experts_have_room_for_every_token(family: str, folder: Callable[[str], Path]) -> None:
    """If experts dropped tokens beyond a capacity, a row would depend on how many others chose the same expert."""
    policy = load_policy(str(folder(family)))
    rows = torch.randint(376, (33, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, crowded, among_others = (
            forward(policy, ids, ids >= 0, Config())[0]
            for ids in (rows[:1], rows[:1].repeat(33, 1), rows)
        )
    for logits in (crowded, among_others):
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_training_steps(
    family: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random models solve no Countdown problem. Part of each group earns this reward, so there is something to learn.
    coin = dataclasses.replace(
        TASKS["countdown"], reward=lambda text, **_: float(sum(map(ord, text)) % 2)
    )
    monkeypatch.setitem(TASKS, "countdown", coin)
    words = f"--model {folder(family)} --run_dir {tmp_path} --steps 2 --questions_per_step 2 --group_size 4 --device cpu"
    words += " --max_new_tokens 16 --eval_questions 4 --lr 0.001 --tokens_per_microbatch 200"
    assert R1ZeroTrain.run(words.split()) == 0
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["logp_gap"] < 1e-4 and line["grad_norm"] > 0 for line in lines)
    assert lines[0]["kl"] == 0 < lines[2]["kl"]

    before, after = (
        load_policy(str(path)).parameters() for path in (folder(family), tmp_path / "model")
    )
    changed = [not torch.equal(*pair) for pair in zip(before, after)]
    assert sum(changed) > 0.8 * len(changed), "all weights but those that no token was routed to"


def test_longrope_context_ends_at_the_original_length(
    folder: Callable[[str], Path],
) -> None:
    """Beyond that length, a plain forward pass rotates keys by other angles than those in the cache."""
    tokenizer = load_tokenizer(str(folder("phi3-longrope")))
    policy, question = load_policy(str(folder("phi3-longrope"))), QUESTIONS[1]
    prompt = generate(policy, tokenizer, [question], 1, config(max_new_tokens=1)).prompt_ids.shape[
        1
    ]
    options = {"tokenizer": tokenizer, "ask": question["question"]}
    assert load_questions("countdown", "", 0, 1, max_new_tokens=128 - prompt, **options)
    with pytest.raises(UsageError, match="--ask"):
        load_questions("countdown", "", 0, 1, max_new_tokens=129 - prompt, **options)


REFUSED: dict[str, tuple[str, dict]] = {
    "mamba": ("MambaConfig", {}),  # a recurrent state instead of a KV cache
    "rwkv": ("RwkvConfig", {}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {}),
    "jamba": ("JambaConfig", {}),
    "qwen3_next": ("Qwen3NextConfig", EXPERTS | {"num_experts": 4}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "t5": ("T5Config", {"d_model": 32, "d_ff": 32}),  # not causal
    "bart": ("BartConfig", {"d_model": 32}),
    "bert": ("BertConfig", {}),
    "git": ("GitConfig", {"vision_config": {"image_size": 8, "patch_size": 4}}),  # ignores padding
    "openai-gpt": ("OpenAIGPTConfig", {"n_embd": 32, "n_head": 4, "n_layer": 2}),  # no cache
}


def refusal(words: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run prints if it is refused before it creates a directory."""
    capsys.readouterr()
    assert R1ZeroTrain.run([*words.split(), "--run_dir", str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not run_dir.exists()
    return line


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_gives_other_numbers_is_refused(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(*REFUSED[family], tmp_path / "model")
    words = f"--model {model} --eval_questions 4 --max_new_tokens 9"
    line = refusal(words, tmp_path / "run", capsys)
    assert line.startswith(f"R1ZeroTrain.py: --model {model}: cannot be loaded (")
    reason = "AutoModelForCausalLM" if family == "t5" else "(its probabilities change"
    assert reason in line and "; try " in line


MIXED = {
    "xglm": ("XGLMConfig", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
}


@pytest.mark.parametrize("family", MIXED)
def test_a_model_that_cannot_mix_precisions_is_refused_in_bfloat16(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(*MIXED[family], tmp_path / "model")
    words = f"--model {model} --steps 0 --eval_questions 2 --max_new_tokens 4 --device cpu"
    assert R1ZeroTrain.run([*words.split(), "--run_dir", str(tmp_path / "float32")]) == 0
    line = refusal(f"{words} --dtype bfloat16", tmp_path / "bfloat16", capsys)
    assert line.startswith(f"R1ZeroTrain.py: --dtype bfloat16 --model {model}: cannot be loaded (")
