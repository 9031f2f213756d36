"""Grows notebooks/tiny-base, the base model that `uv run R1ZeroTrain.py` trains: `uv run notebooks/grow_tiny_base.py`.

The base stands in for a pretrained model. It is trained by next-token prediction on synthetic search traces for
Countdown. A trace takes the three numbers in pairs, from the left: first and second, first and third, second and third.
It combines each pair with every operation, combines each result with the third number, and writes "no" after each
attempt that misses the target and "yes" after the one that hits it. Three in four traces give up after one or two
attempts and answer with the last of them. So the base knows arithmetic, the format and how to search, but it rarely
searches long enough. That longer search earns more reward is left for reinforcement learning to discover.

    Numbers: 8 7 4 Target: 36
    <think>
    7 + 8 = 15
    15 + 4 = 19 no
    15 - 4 = 11 no
    4 * 15 = 60 no
    8 - 7 = 1
    1 + 4 = 5 no
    </think>
    <answer>(8 - 7) + 4</answer>

No held-out problem appears in the corpus: of the 2,144 problems with three numbers from 1 to 9 and a target from 1 to
99, one in four is held out, by a hash of its sorted numbers and its target. Growing takes 24 minutes on 2 cores.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prompts import countdown_key, countdown_problem, is_held_out  # noqa: E402

# The default run uses numbers up to 9. They give only 1,600 training problems: a base grown on these alone memorized
# where the target is hit, and did not compare each result with the target. So half of the traces have numbers up to 15.
LARGEST_NUMBERS = (9, 15)
LARGEST = 99  # each whole number is a token, and no attempt leaves 0..99
PATIENT = 0.22  # share of the traces that hardly ever give up
DOCUMENTS = 320  # in a step, about 16,000 tokens
TOKENS = 2048  # in a micro-batch: what stays in the CPU's cache
QUESTION = 11  # tokens of a question: it is random, so there is nothing to learn from predicting it
STEPS = 1200
# The logits are multiplied by this. The small chances of a wrong token add up over a hundred tokens: trained by the
# default run, the base ended at an accuracy of 0.95 without this factor, and of 0.97 with it.
SHARPNESS = 1.4

# The prompt is short enough for a tiny model: `Numbers: 8 7 4 Target: 36`, cut out of TinyZero's sentence. Any other
# question stays as it is. The system message is left out.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' and 'Using the numbers [' in message.content -%}
{{- 'Numbers: ' + message.content.split('[')[1].split(']')[0].replace(',', '') }}
{{- ' Target: ' + message.content.split('equals ')[1].split('.')[0] + '\\n' }}
{%- elif message.role != 'system' -%}
{{- message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<think>\\n' }}
{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each whole number and each piece of the corpus, bytes for all else: any text can be encoded."""
    special = ["<|pad|>", "<|endoftext|>"]
    pieces = ["Numbers: ", " Target: ", "<think>", "</think>", "<answer>", "</answer>"]
    pieces += [" + ", " - ", " * ", " / ", " = ", ", ", " no\n", " yes\n", "\n", " ", "(", ")"]
    numbers = [str(number) for number in range(LARGEST + 1)]
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(special + pieces + numbers + single_bytes)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True, ignore_merges=True))
    cut = r"</?think>|</?answer>|Numbers: | Target: | [-+*/=] |, | no\n| yes\n|[0-9]+|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def one_step(a: int, b: int) -> list[tuple[int, str, int, int]]:
    """Every (x, operator, y, result) that combines two numbers, each result once and in 0..LARGEST, as + - * / go."""
    larger, smaller = max(a, b), min(a, b)
    results = {"+": a + b, "-": larger - smaller, "*": a * b}
    if smaller and larger % smaller == 0:
        results["/"] = larger // smaller
    first = {
        result: op for op, result in reversed(results.items()) if result <= LARGEST
    }  # of equal results
    return [
        (larger, op, smaller, result) for op, result in results.items() if first.get(result) == op
    ]


def written(rng: random.Random, a: int, operator: str, b: int) -> str:
    """The operation as text, with the operands of + and * in random order. In a fixed order, the base memorized
    traces: it wrote "no" where a held-out problem's target was hit, and the default run ended at 0.92."""
    return (
        f"{b} {operator} {a}" if operator in "+*" and rng.random() < 0.5 else f"{a} {operator} {b}"
    )


def attempts(rng: random.Random, a: int, b: int, c: int) -> Iterator[tuple[str, int, str, int]]:
    """All (first operation, its result, second operation, its result), one pair of the numbers after the other."""
    pairs = {tuple(sorted(pair)): third for *pair, third in [(a, b, c), (a, c, b), (b, c, a)]}
    for pair, third in pairs.items():
        for x, operator, y, result in one_step(*pair):
            first = written(rng, x, operator, y)
            for x, operator, y, last in one_step(result, third):
                yield first, result, written(rng, x, operator, y), last


def document(rng: random.Random) -> str:
    """A trace of attempts at one training problem, with the last attempt as the answer."""
    held_out = True
    while held_out:
        numbers, target = countdown_problem(
            rng, operand_range=(1, rng.choice(LARGEST_NUMBERS)), target_range=(1, LARGEST)
        )
        held_out = is_held_out(countdown_key(numbers, target))
    # The chance of giving up after an attempt that missed.
    gives_up = 0.01 if rng.random() < PATIENT else rng.uniform(0.5, 1.0)
    lines = [f"Numbers: {' '.join(map(str, numbers))} Target: {target}", "<think>"]
    line = ""
    for first, result, second, last in attempts(rng, *numbers):
        if line != (line := f"{first} = {result}"):
            lines.append(line)
        lines.append(f"{second} = {last} {'yes' if last == target else 'no'}")
        if last == target or rng.random() < gives_up:
            break
    # The second operation, with the first one in the place of its result.
    answer = re.sub(rf"\b{result}\b", f"({first})", second, count=1)
    return "\n".join([*lines, "</think>", f"<answer>{answer}</answer>"])


def microbatches(documents: list[list[int]]) -> list[torch.Tensor]:
    """Documents of similar length together, padded on the right with -1, at most TOKENS tokens in each."""
    batches: list[list[list[int]]] = []
    for document in sorted(documents, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > TOKENS:
            batches.append([])
        batches[-1].append(document)
    return [
        torch.tensor([ids + [-1] * (len(batch[0]) - len(ids)) for ids in batch])
        for batch in batches
    ]


def grow(steps: int, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,  # half the KV cache to read for each sampled token
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Muon for the matrices and AdamW for the rest learns this about three times faster than AdamW alone.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)]
    optimizers += [torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)]
    rates = [0.02, 3e-3]
    started = time.time()
    for step in range(steps):
        # Warm up over 20 steps, and cool down to 0 over the last 40%.
        scale = min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
        # Documents are not packed into one sequence: each is seen alone, as in sampling.
        texts = [document(rng) + tokenizer.eos_token for _ in range(DOCUMENTS)]
        documents = tokenizer(texts)["input_ids"]
        total, count = 0.0, sum(map(len, documents)) - DOCUMENTS * QUESTION
        for ids in microbatches(documents):
            # bfloat16 is twice as fast on a CPU that has it; the weights stay float32.
            with torch.autocast("cpu", torch.bfloat16):
                logits = (
                    model(input_ids=ids.clamp(min=0)[:, :-1], use_cache=False)
                    .logits[:, QUESTION - 1 :]
                    .float()
                )
            targets = ids[:, QUESTION:].flatten()
            loss = (
                F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum")
                / count
            )
            loss.backward()
            total += loss.item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {total:.4f}  {time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        model.model.norm.weight *= SHARPNESS  # the head multiplies this norm's output
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks" / "tiny-base")
    options = parser.parse_args()
    grow(options.steps, options.seed, options.folder)
