"""How fast is a step of R1ZeroTrain.py: beside TRL's GRPOTrainer, and beside what the machine could do at best?

    uv run --with trl tests/benchmark.py                     # both trainers; without TRL ours alone
    uv run --with trl tests/benchmark.py --only narrow --steps 3
    python3 tests/benchmark.py --device cuda --dtype bfloat16 --shape 0.5b
    python3 tests/benchmark.py --model runs/mine/model --questions 4 --group 8 --prompt_tokens 200 --new_tokens 300
    python3 tests/benchmark.py --flatness                    # what grows with the number of tokens, or of rows?

Two random models in Qwen2's shape, nothing downloaded: `narrow` (0.9 M parameters, where calls cost more than sums)
and `wide` (43 M, nearly all of them in a vocabulary of 151,936). Both trainers get the same weights, prompts, reward,
group, lengths, precision, learning rate and beta 0.04, and make one update of each rollout. No completion ends early,
so both do the same work. Each trainer is a process of its own; they take turns step by step, one idle while the other
works, so that what disturbs the machine disturbs both. The first step is not counted; figures are medians.

- sampling: from questions to completions; scoring: rewards (ours: and advantages); update: the reference's
  log-probabilities, forward, backward, optimizer step (of TRL: all that is left of its step).
- tokens/s: completion tokens over the seconds of sampling.
- GB: the process's peak resident set; on CUDA the peak of what torch allocated; on MPS what the driver holds.
- of limit: the operations that a step needs, over the rate of large matrix products measured between the steps, over
  the time it took. Needed are: each prompt read once, N·T tokens decoded, a reference forward, a policy forward and
  backward (three forwards) over N·(P + T) tokens, the head at the T positions that are scored, and attention over what
  is visible. On a GPU a decode step takes no less than its bytes (weights, KV cache) over the measured bandwidth.

The last line of the output is JSON with all figures.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

if "--worker" in sys.argv:  # the parent stays small and idle
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    import R1ZeroTrain
    from prompts import TASKS, Task, render_prompt

# width, inner width, layers, heads, key-value heads, vocabulary; Q, G, P, T
MODELS = {
    "narrow": (128, 384, 4, 4, 4, 384, 8, 16, 170, 128),
    "wide": (256, 1024, 4, 4, 4, 151_936, 4, 8, 170, 64),
    "0.5b": (896, 4864, 24, 14, 2, 151_936, 64, 8, 170, 512),  # Qwen2.5's
    "1.5b": (1536, 8960, 28, 12, 2, 151_936, 64, 8, 170, 512),
}
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SIZES = ("questions", "group", "prompt_tokens", "new_tokens")
PARTS = ("sampling", "scoring", "update")


@dataclass
class Work:
    """What a worker is told: which model, and what a step of it is."""

    name: str
    model: str  # a folder; empty: random weights in the shape called `name`
    questions: int
    group: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    device: str
    dtype: str
    options: dict  # of our Config
    trl_rows: int  # in one of TRL's forward passes; 0: all
    trl_checkpointing: bool

    @property
    def rows(self) -> int:
        return self.questions * self.group


# ---- In a worker: the same model, questions and reward for both -----------------------------------------------------
def reward(text: str, **_: object) -> float:
    """The share of ones: cheap, and different from completion to completion."""
    text = text.removeprefix("<think>")
    return text.count("1") / max(1, len(text))


def make_tokenizer(vocabulary: int):
    """The 256 bytes, then padding, then tokens that are only ever sampled."""
    tokens = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "<|pad|>",
        *map(str, range(1000, vocabulary + 743)),
    ]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {
        "pad_token": "<|pad|>",
        "chat_template": "{{ messages[-1].content }}",
        "model_max_length": 4096,
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def make(work: Work):
    """(policy in float32, tokenizer) with an EOS that is never sampled."""
    if work.model:
        policy, tokenizer = (
            R1ZeroTrain.load_policy(work.model),
            R1ZeroTrain.load_tokenizer(work.model),
        )
    else:
        shape = dict(zip((*SHAPE, "vocab_size"), MODELS[work.name], strict=False))
        shape |= {"max_position_embeddings": 4096, "tie_word_embeddings": True}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        torch.manual_seed(0)
        with torch.device(work.device):
            config = transformers.Qwen2Config(**shape, **tokens)
            policy = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32
            ).eval()
        policy.plain_head = R1ZeroTrain.has_plain_head(policy)
        tokenizer = make_tokenizer(shape["vocab_size"])
    tokenizer.add_special_tokens(
        {"eos_token": "<|never|>"}
    )  # behind all tokens that the model was made for
    policy.generation_config.eos_token_id = None
    return policy, tokenizer


def make_questions(tokenizer, work: Work) -> list[str]:
    """Digits, as many as make prompts of about `prompt_tokens` tokens: 5% more or less, so that there is padding."""
    questions = []
    for i in range(work.questions * (work.steps + 1)):
        draw, text = random.Random(i), "Which of these digits is the most frequent? "
        tokens = round(work.prompt_tokens * draw.uniform(0.95, 1.05))
        while (lacking := tokens - len(tokenizer(render_prompt(tokenizer, text))["input_ids"])) > 0:
            text += "".join(draw.choices("0123456789", k=lacking))
        questions.append(text)
    return questions


def describe(policy, tokenizer, work: Work, questions: list[str]) -> dict:
    """What was measured, and the sizes per token that `limit` counts with."""
    config, head = policy.config.get_text_config(), policy.get_output_embeddings().weight
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = {id(p): p.numel() for p in policy.parameters() if p.dim() > 1}
    matrices[id(policy.get_input_embeddings().weight)] = matrices[id(head)] = (
        0  # a look-up; counted by itself
    )
    lengths = [
        len(tokenizer(render_prompt(tokenizer, question))["input_ids"]) for question in questions
    ]
    sizes = {
        "layers": layers,
        "width": config.hidden_size,
        "vocabulary": len(head),
        "head": head.numel(),
    }
    sizes |= {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "body": sum(matrices.values()),
    }
    sizes |= {"attention": layers * heads * head_dim, "kv": 2 * layers * kv_heads * head_dim}
    machine = {
        "kind": work.device,
        "chip": torch.cuda.get_device_name() if work.device == "cuda" else work.device,
    }
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return (
        sizes
        | machine
        | {"transformers": transformers.__version__, "prompt": sum(lengths) / len(lengths)}
    )


def clock(work: Work) -> float:
    """Seconds, when all that was asked of the device is done."""
    if work.device != "cpu":
        getattr(torch, work.device).synchronize()
    return time.perf_counter()


def peak(work: Work) -> float:
    """GB: see the top."""
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if work.device == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def quiet(message: str, ids: object = None) -> None:
    """In place of a progress bar."""


# ---- The workers: each waits for its turns, and tells what each has taken -------------------------------------------
def set_up(work: Work):
    """Ours, as R1ZeroTrain.main sets it up."""
    TASKS["benchmark"] = Task(reward)
    sizes = {
        "questions_per_step": work.questions,
        "group_size": work.group,
        "max_new_tokens": work.new_tokens,
    }
    machine = {"device": work.device, "dtype": work.dtype, "steps": work.steps + 2}
    algorithm = {
        "task": "benchmark",
        "kl_beta": 0.04,
        "lr": 1e-6,
        "lr_final": 1.0,
        "format_weight": 0.0,
    }
    cfg = R1ZeroTrain.Config(**sizes, **machine, **algorithm, **work.options)
    accelerator = R1ZeroTrain.make_accelerator(cfg)
    policy, tokenizer = make(work)
    reference = copy.deepcopy(policy).requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    return cfg, accelerator, policy, reference, optimizer, tokenizer


def ours(work: Work, wait: Callable, tell: Callable, with_update: bool = True) -> None:
    cfg, accelerator, policy, reference, optimizer, tokenizer = set_up(work)
    model, questions = accelerator.unwrap_model(policy), make_questions(tokenizer, work)
    shared = {id(weight): weight for weight in model.parameters()} if cfg.dtype == "float32" else {}
    sampler, facts = copy.deepcopy(model, shared), describe(model, tokenizer, work, questions)
    R1ZeroTrain.refresh(sampler, model, cfg.dtype)
    for step in range(work.steps + 1):
        wait(facts)
        mine = range(step * work.questions, (step + 1) * work.questions)
        tasks = [{"question": questions[i], "answer": {}, "index": i} for i in mine]
        times = [clock(work)]
        rollout = R1ZeroTrain.generate(sampler, tokenizer, tasks, work.group, cfg, "train", quiet)
        times.append(clock(work))
        samples = R1ZeroTrain.score(rollout, tasks, cfg)
        rewards = torch.tensor([sample["reward"] for sample in samples], device=accelerator.device)
        advantages = R1ZeroTrain.group_advantages(rewards.view(-1, work.group), cfg.advantage_scale)
        times.append(clock(work))
        if with_update:
            R1ZeroTrain.update(
                policy, reference, optimizer, step, rollout, advantages, cfg, accelerator, quiet
            )
            R1ZeroTrain.refresh(sampler, model, cfg.dtype)
        times.append(clock(work))
        seconds = {part: times[i + 1] - times[i] for i, part in enumerate(PARTS)}
        tell(seconds | {"tokens": int(rollout.lengths.sum()), "memory": peak(work)})


def sampling_only(work: Work, wait: Callable, tell: Callable) -> None:
    """Times attention besides, which must grow with what there is to attend to, as nothing else may."""
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def timed(*args, **kwargs):
        began = clock(work)
        result = attention(*args, **kwargs)
        calls.append(clock(work) - began)
        return result

    def tell_both(figures: dict) -> None:
        tell(figures | {"attention": sum(calls)})
        calls.clear()

    torch.nn.functional.scaled_dot_product_attention = timed
    ours(work, wait, tell_both, with_update=False)


def update_only(work: Work, wait: Callable, tell: Callable) -> None:
    """Of completions that nobody sampled: what sampling needs would hide the update's peak."""
    cfg, accelerator, policy, reference, optimizer, _ = set_up(work)
    sizes = ((work.questions, work.prompt_tokens), (work.rows, work.new_tokens))
    prompt_ids, ids = (torch.randint(256, size, device=work.device) for size in sizes)
    lengths, logp = (
        torch.full_like(ids[:, 0], work.new_tokens),
        torch.zeros(sizes[1], device=work.device),
    )
    rollout = R1ZeroTrain.Rollout(
        prompt_ids, prompt_ids >= 0, ids, lengths, logp, lengths > 0, [], []
    )
    advantages = torch.randn(work.rows, device=work.device)
    wait({"memory": peak(work)})
    began = clock(work)
    R1ZeroTrain.update(
        policy, reference, optimizer, 0, rollout, advantages, cfg, accelerator, quiet
    )
    tell({"update": clock(work) - began, "memory": peak(work)})


def trl(work: Work, wait: Callable, tell: Callable) -> None:
    import trl
    from datasets import Dataset

    policy, tokenizer = make(work)
    folder = tempfile.mkdtemp()  # TRL reads its reference from a folder; the parent removes it
    policy.save_pretrained(folder)
    del policy
    now, rows = {}, work.trl_rows or work.rows

    def timed(part: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            began = clock(work)
            result = function(*args, **kwargs)
            now[part] = clock(work) - began
            if part == "sampling":
                now["tokens"] = sum(map(len, result[1]))
            return result

        return wrapper

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            wait({"trl_version": trl.__version__})
            now["began"] = clock(work)

        def on_step_end(self, args, state, control, **_) -> None:
            rest = clock(work) - now.pop("began") - now["sampling"] - now["scoring"]
            tell(now | {"update": rest, "memory": peak(work)})

    options = {
        "output_dir": folder,
        "max_steps": work.steps + 1,
        "shuffle_dataset": False,
        "disable_tqdm": True,
    }
    options |= {
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    options |= {
        "num_generations": work.group,
        "max_completion_length": work.new_tokens,
        "temperature": 1.0,
    }
    options |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": work.rows // rows,
    }
    options |= {
        "beta": 0.04,
        "loss_type": "grpo",
        "use_bias_correction_kl": False,
        "disable_dropout": True,
    }
    options |= {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
    }
    options |= {"model_init_kwargs": {"dtype": "float32"}, "bf16": work.dtype == "bfloat16"}
    options |= {"use_cpu": work.device == "cpu", "gradient_checkpointing": work.trl_checkpointing}
    prompts = [render_prompt(tokenizer, question) for question in make_questions(tokenizer, work)]
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        args=trl.GRPOConfig(**options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    trainer._generate = timed("sampling", trainer._generate)
    trainer._calculate_rewards = timed("scoring", trainer._calculate_rewards)
    trainer.train()


def rate(work: Work, wait: Callable, tell: Callable) -> None:
    """Operations/s of large matrix products in the step's precision, and bytes/s of a large copy; best of 5."""
    size, repeats, numel = (2048, 1, 2**27) if work.device == "cpu" else (8192, 10, 2**30)
    shared = {"device": work.device, "dtype": getattr(torch, work.dtype)}
    a, b, product = (torch.randn(size, size, **shared) for _ in range(3))
    source, target = (torch.ones(numel, dtype=torch.uint8, device=work.device) for _ in range(2))

    def seconds(function: Callable) -> float:
        began = clock(work)
        for _ in range(repeats):
            function()
        return (clock(work) - began) / repeats

    while True:
        wait({})
        matmul = min(seconds(lambda: torch.matmul(a, b, out=product)) for _ in range(5))
        copied = min(seconds(lambda: target.copy_(source)) for _ in range(5))
        tell(
            {"operations_per_second": 2 * size**3 / matmul, "bytes_per_second": 2 * numel / copied}
        )


WORKERS = {worker.__name__: worker for worker in (ours, sampling_only, update_only, trl, rate)}


def be_worker(kind: str, work: Work) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print what they like
    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    work, said = replace(work, device=best if work.device == "auto" else work.device), []

    def tell(figures: dict) -> None:
        print(json.dumps(figures), file=replies, flush=True)

    def wait(facts: dict) -> None:
        """Says once that all is ready, with facts; returns when it is this worker's turn."""
        if not said:
            tell(facts)
            said.append(facts)
        if not sys.stdin.readline():
            os._exit(0)  # no more turns

    WORKERS[kind](work, wait, tell)


# ---- The parent -----------------------------------------------------------------------------------------------------
class Worker:
    """A process that is ready when this is made; then each call is a turn."""

    def __init__(self, stack: ExitStack, kind: str, work: Work) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.kind, self.log = kind, Path(folder, "log")
        environment = offline | os.environ | {"TMPDIR": folder}
        command = [sys.executable, __file__, "--worker", kind, json.dumps(asdict(work))]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "env": environment,
        }
        with self.log.open("w") as log:
            self.process = stack.enter_context(subprocess.Popen(command, stderr=log, **pipes))
        stack.callback(self.process.kill)
        self.facts = self.answer()

    def answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(
            f"the worker {self.kind!r} has ended with:\n{self.log.read_text()[-3000:]}"
        )

    def __call__(self) -> dict:
        print("go", file=self.process.stdin, flush=True)
        figures = self.answer()
        # OpenMP's threads go on spinning for up to 0.2 s. OMP_WAIT_POLICY=passive would stop that, but a step of a
        # small model, which is thousands of short parallel loops, would then take longer than it does in real life.
        time.sleep(0.3)
        return figures


def limit(facts: dict, work: Work) -> dict[str, float]:
    """Seconds that the parts of a step take at least: see the top."""
    n, p, t, speed = work.rows, facts["prompt"], work.new_tokens, facts["operations_per_second"]
    body, head = 2 * facts["body"], 2 * facts["head"]

    def seen(first: float, last: float) -> float:
        """Attention's operations for the queries at positions first to last, each over all keys up to its own."""
        return 4 * facts["attention"] * (last * (last + 1) - first * (first + 1)) / 2

    prefill = work.questions * (p * body + seen(0, p) + head)
    decode = n * ((t - 1) * (body + head) + seen(p, p + t - 1))
    update = 4 * n * ((p + t) * body + seen(0, p + t) + t * head)
    numbers = (
        facts["body"] + facts["head"] + n * (p + t / 2) * facts["kv"]
    )  # that one decode step reads
    moved = (t - 1) * numbers * (2 if work.dtype == "bfloat16" else 4) / facts["bytes_per_second"]
    # A small model stays in a CPU's caches, which are faster than its memory.
    sampling = prefill / speed + (
        decode / speed if facts["kind"] == "cpu" else max(decode / speed, moved)
    )
    parts = {"sampling": sampling, "update": update / speed, "step": sampling + update / speed}
    return parts | {
        "operations": prefill + decode + update,
        "decode_operations": decode / speed,
        "decode_bytes": moved,
    }


def compare(work: Work, with_trl: bool) -> dict:
    """Steps of each trainer in turn: the figures, printed as a table and returned."""
    names, rounds = ["ours", "trl"] if with_trl else ["ours"], []
    with ExitStack() as stack:
        workers = {name: Worker(stack, name, work) for name in (*names, "rate")}
        for i in range(work.steps + 1):
            rounds.append({name: worker() for name, worker in workers.items()})
            for name in names:
                rounds[i][name]["step"] = sum(rounds[i][name][part] for part in PARTS)
                if rounds[i][name]["tokens"] != work.rows * work.new_tokens:
                    raise RuntimeError(
                        f"{name}: completions have ended early, so the work is not the same"
                    )
            took = ", ".join(f"{name} {rounds[i][name]['step']:.2f} s" for name in names)
            print(f"{work.name}, step {i or 'to warm up'}: {took}", file=sys.stderr, flush=True)
    result, counted = asdict(work), rounds[1:]
    for name in names:
        result |= workers[name].facts
    result |= {
        key: median(r["rate"][key] for r in counted)
        for key in ("operations_per_second", "bytes_per_second")
    }
    result["limit"] = limit(result, work)
    for name in names:
        f = result[name] = {
            part: median(r[name][part] for r in counted) for part in (*PARTS, "step")
        }
        f["tokens_per_second"] = work.rows * work.new_tokens / f["sampling"]
        f["memory"] = max(r[name]["memory"] for r in rounds)
        f["of_limit"] = {
            part: result["limit"][part] / f[part] for part in ("sampling", "update", "step")
        }
        f["steps"] = [r[name]["step"] for r in counted]
    if with_trl:
        a, b = result["ours"], result["trl"]
        result["ratio"] = {
            key: b[key] / a[key] for key in (*PARTS, "step", "tokens_per_second", "memory")
        }
        result["ratio"]["steps"] = [y / x for x, y in zip(a["steps"], b["steps"], strict=True)]
    print_table(work, result)
    return result


def print_table(work: Work, result: dict) -> None:
    shape = "{layers} layers, width {width}, vocabulary {vocabulary:,}".format_map(result)
    print(
        f"\n{work.name}: {shape}, {result['parameters'] / 1e6:.1f} M parameters; {work.dtype} on {result['chip']}"
    )
    size = f"{work.questions} questions x {work.group} completions of {work.new_tokens} tokens"
    print(
        f"a step: {size}, prompts of about {result['prompt']:.0f}; seconds, medians of {work.steps}"
    )
    row = "{:<11}{:>9}{:>9}{:>9}{:>10}{:>19}{:>11}{:>9}{:>10}".format
    print(
        row(
            "",
            "sampling",
            "scoring",
            "update",
            "step",
            "fastest, slowest",
            "tokens/s",
            "GB",
            "of limit",
        )
    )
    labels = {"ours": "ours", "trl": f"TRL {result.get('trl_version')}", "ratio": "TRL / ours"}
    for name in [name for name in labels if name in result]:
        f, x = result[name], "x" if name == "ratio" else ""
        cells = [f"{f[part]:.2f}x" if x else f"{f[part]:.3f}" for part in (*PARTS, "step")]
        cells.append(f"{min(f['steps']):.2f}{x}, {max(f['steps']):.2f}{x}")
        cells.append(f"{f['tokens_per_second']:.2f}x" if x else f"{f['tokens_per_second']:,.0f}")
        print(
            row(
                labels[name],
                *cells,
                f"{f['memory']:.2f}{x}",
                "" if x else f"{f['of_limit']['step']:.1%}",
            )
        )
    f, speed = result["limit"], result["operations_per_second"] / 1e9
    print(
        row(
            "limit",
            f"{f['sampling']:.3f}",
            "",
            f"{f['update']:.3f}",
            f"{f['step']:.3f}",
            "",
            "",
            "",
            "",
        )
    )
    print(f"limit: {f['operations'] / 1e9:,.0f} GFLOP at the measured {speed:,.0f} GFLOP/s", end="")
    if result["kind"] == "cpu":
        return print()
    each, took = 1000 / (work.new_tokens - 1), 1000 * result["ours"]["sampling"] / work.new_tokens
    print(f"; {result['bytes_per_second'] / 1e9:,.0f} GB/s. A decode step needs")
    print(
        f"{f['decode_bytes'] * each:.3f} ms for its bytes, {f['decode_operations'] * each:.3f} ms for its",
        end=" ",
    )
    print(f"operations; ours took {took:.3f} ms")


def flatness(work: Work) -> dict:
    """Sampling time per token as completions get longer, and the update's memory as there are more of them."""
    sampling, memory = {}, {}
    print(f"{work.name}, {work.rows} rows: ms of sampling per token, medians of {work.steps}")
    print("  new tokens    whole  attention  all else  of the first")
    with ExitStack() as stack:
        sizes = (64, 128, 256, 512, 1024)
        workers = [Worker(stack, "sampling_only", replace(work, new_tokens=size)) for size in sizes]
        rounds = [[worker() for worker in workers] for _ in range(work.steps + 1)][
            1:
        ]  # the first is to warm up
    for size, steps in zip(sizes, zip(*rounds, strict=True), strict=True):
        each = [(f["sampling"], f["attention"], f["sampling"] - f["attention"]) for f in steps]
        f = [1000 * median(parts) / size for parts in zip(*each, strict=True)]
        sampling[size] = dict(zip(("whole", "attention", "rest"), f, strict=True))
        print(
            f"{size:>12}{f[0]:>9.2f}{f[1]:>11.2f}{f[2]:>10.2f}{f[2] / sampling[64]['rest']:>13.2f}x"
        )
    print(
        "\nupdate, each in a process of its own\n        rows    GB before  peak GB  of the first    seconds"
    )
    for rows in (64, 128, 256, 512):
        with ExitStack() as stack:
            worker = Worker(stack, "update_only", replace(work, questions=rows // work.group))
            f = memory[rows] = {"before": worker.facts["memory"]} | worker()
        ratio = f["memory"] / memory[64]["memory"]
        print(
            f"{rows:>12}{f['before']:>13.3f}{f['memory']:>9.3f}{ratio:>13.2f}x{f['update']:>11.2f}",
            flush=True,
        )
    return {"ms_per_token": sampling, "update": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["narrow", "wide"], help="one of the two models")
    parser.add_argument(
        "--shape",
        choices=["0.5b", "1.5b"],
        help="random weights in the shape of this Qwen2.5 instead",
    )
    parser.add_argument("--model", default="", help="a causal model's folder instead")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="of a step; each model has its own default")
    parser.add_argument("--steps", type=int, default=5, help="steps that count")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name in ("rollout_rows", "tokens_per_microbatch"):
        parser.add_argument(f"--{name}", type=int, help="of our Config, whose default holds")
    parser.add_argument(
        "--trl_rows", type=int, default=0, help="rows of TRL's forward passes; 0: all in one"
    )
    parser.add_argument(
        "--trl_checkpointing",
        action="store_true",
        help="TRL's own default: slower, with less memory",
    )
    parser.add_argument("--flatness", action="store_true", help="ours alone, over sizes")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if args["worker"]:
        return be_worker(args["worker"][0], Work(**json.loads(args["worker"][1])))
    options = {name: args[name] for name in ("rollout_rows", "tokens_per_microbatch") if args[name]}
    same = ("model", "steps", "device", "dtype", "trl_rows", "trl_checkpointing")
    only = (
        args["model"] or args["shape"] or args["only"] or ("narrow" if args["flatness"] else None)
    )
    works = []
    for name in [only] if only else ["narrow", "wide"]:
        sizes = zip(SIZES, MODELS.get(name, MODELS["wide"])[-4:], strict=True)
        sizes = {size: args[size] or default for size, default in sizes}
        works.append(Work(name, **sizes, **{name: args[name] for name in same}, options=options))
    if args["flatness"]:
        figures = {"flatness": flatness(works[0])}
    else:
        with_trl = importlib.util.find_spec("trl") is not None
        if not with_trl:
            print(
                "TRL is not installed, so this measures ours alone: uv run --with trl tests/benchmark.py has both"
            )
        figures = {"models": [compare(work, with_trl) for work in works]}
    machine = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    print(f"\n{json.dumps(machine | figures)}")


if __name__ == "__main__":
    main()
