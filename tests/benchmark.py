"""Measures a step of R1ZeroTrain.py, beside TRL's GRPOTrainer and beside what the machine allows.

    uv run --with trl tests/benchmark.py                     # both trainers; without TRL ours alone
    uv run --with trl tests/benchmark.py --only narrow --steps 3
    python3 tests/benchmark.py --device cuda --dtype bfloat16 --shape 0.5b
    python3 tests/benchmark.py --model runs/mine/model --questions 4 --group 8 --prompt_tokens 200 --new_tokens 300
    python3 tests/benchmark.py --flatness                    # what grows with the number of tokens, or of rows?

Two random models in the architecture of Qwen2, nothing is downloaded: `narrow` (0.9 M parameters, where the overhead
of calls dominates) and `wide` (43 M parameters, nearly all in a vocabulary of 151,936). Both trainers get the same
weights, prompts, reward, group size, lengths, precision, learning rate and beta 0.04, and make one update per rollout.
No completion ends early, so both do the same work. Each trainer is a process of its own. They take turns step by step,
and one is idle while the other works, so that a disturbance of the machine affects both. The first step warms up and
is not counted; figures are medians.

- sampling: from questions to completions. scoring: rewards. update: the rest of the step (advantages, the reference's
  log-probabilities, forward, backward, optimizer step).
- tokens/s: completion tokens divided by the seconds of sampling.
- GB: the peak resident set of the process; on CUDA the peak of torch's allocations; on MPS what the driver holds.
- of limit: the least time for the step's operations, at the rate of large matrix products measured between the steps,
  divided by the time that the step took. Counted are: each prompt read once, N·T tokens decoded, a reference forward
  and a policy forward and backward (three forwards) over N·(P + T) tokens, the head at the T positions that are
  scored, and attention over what is visible. On a GPU a decode step takes at least the time to read its bytes (weights
  and KV cache) at the measured bandwidth.
- ratio: TRL divided by ours.

Why these figures: wide gains most, because logits [N, T, V] never exist as a whole. They are computed for a piece of the
vocabulary at a time, and again in the backward pass. Of narrow's step, half is the update, near the rate of the machine's
matrix products (1.6 of 1.8 s); half is sampling, where each row reads its own copy of its prompt's keys and values. Reading
them once for each question took some fifty lines more and 1.19 s in place of 1.67 s, and gained nothing in the default
run (18,000 tokens/s, 20,300 without), so it was left out. With --flatness on narrow, sampling a token takes 17 ms where 64
are sampled and 30 ms where 1,024 are; the difference is attention, which has more to attend to. All else stays between
0.88 and 1.00 of the first, and the update's peak memory goes from 1.17 GB with 64 rows to 1.19 GB with 512.

The last line of the output is JSON with all figures.
"""

import argparse
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
import timeit
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, median

if "--worker" in sys.argv:  # the parent process stays small and idle
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
SIZES = ("questions", "group", "prompt_tokens", "new_tokens")
OPTIONS = ("rollout_rows", "tokens_per_microbatch")


@dataclass
class Work:
    """What a worker is told: the model, and the size of a step."""

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


# ---- In a worker: the model, questions and reward of both trainers --------------------------------------------------
def reward(text: str, **_: object) -> float:
    """The share of ones: cheap, and different for each completion."""
    return text.count("1") / (1 + len(text))


def make_model(work: Work) -> str:
    """A folder with the model and its tokenizer, whose EOS is never sampled. The parent removes it."""
    if work.model:
        policy = R1ZeroTrain.load_policy(work.model)
        tokenizer = R1ZeroTrain.load_tokenizer(work.model)
    else:
        width, inner, layers, heads, kv_heads, vocabulary, *_ = MODELS[work.name]
        config = transformers.Qwen2Config(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

        # The 256 bytes, then padding, then tokens that occur in completions only.
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|pad|>"]
        tokens += map(str, range(1000, vocabulary + 743))
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<|pad|>",
            # The question alone. prompts.chat_prompt lets only templates with "equals '" drop the rest.
            chat_template="{{ messages[-1].content.split('equals ')[-1] }}",
        )
    # The EOS token comes after all tokens that the model was made for.
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    policy.generation_config = transformers.GenerationConfig()
    folder = tempfile.mkdtemp()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_questions(tokenizer, work: Work) -> tuple[list[str], float]:
    """Random digits, and the mean length of their prompts: `prompt_tokens`, give or take 5% for some padding."""

    def length(question: str) -> int:
        return len(tokenizer(render_prompt(tokenizer, question))["input_ids"])

    questions = []
    for i in range(work.questions * (work.steps + 1)):
        rng = random.Random(i)
        digits = round(work.prompt_tokens * rng.uniform(0.95, 1.05)) - length("")
        questions.append("".join(rng.choices("0123456789", k=digits)))
    return questions, mean(map(length, questions))


def describe(policy, work: Work) -> dict:
    """What is measured, and the sizes that `limit` needs."""
    config, head = policy.config.get_text_config(), policy.get_output_embeddings().weight
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = {p for p in policy.parameters() if p.dim() > 1}
    body = matrices - {policy.get_input_embeddings().weight, head}  # a look-up; counted by itself
    return {
        "layers": layers,
        "width": config.hidden_size,
        "vocabulary": len(head),
        "parameters": policy.num_parameters(),
        "head": head.numel(),
        "body": sum(p.numel() for p in body),
        "attention": layers * heads * head_dim,
        "kv": 2 * layers * kv_heads * head_dim,
        "kind": work.device,
        "chip": torch.cuda.get_device_name() if work.device == "cuda" else work.device,
        "torch": torch.__version__,
    }


def clock(work: Work) -> float:
    """Seconds, once the device has finished everything that it was given."""
    if work.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak(work: Work) -> float:
    """GB: see the top."""
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if work.device == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


TIMES = Counter()  # seconds of the parts of a step, and its completion tokens


def timed(work: Work, part: str, owner: object, name: str) -> None:
    """From now on, every call of owner.name adds its seconds to TIMES[part]."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = clock(work)
        result = function(*args, **kwargs)
        TIMES[part] += clock(work) - start
        return result

    setattr(owner, name, wrapper)


def step_figures(work: Work) -> dict:
    """The figures of the step that has just ended. TIMES starts again at 0."""
    update = TIMES["step"] - TIMES["sampling"] - TIMES["scoring"]
    figures = dict(TIMES) | {"update": update, "memory": peak(work)}
    TIMES.clear()
    return figures


# ---- The workers. turn(figures) hands figures in, and returns when it is the worker's turn again --------------------
def ours(work: Work, turn: Callable) -> None:
    TASKS["benchmark"] = Task(reward)
    cfg = R1ZeroTrain.Config(
        model=make_model(work),
        task="benchmark",
        questions_per_step=work.questions,
        group_size=work.group,
        max_new_tokens=work.new_tokens,
        format_weight=0.0,
        lr=1e-6,
        kl_beta=0.04,
        device=work.device,
        dtype=work.dtype,
        **work.options,
    )
    accelerator = R1ZeroTrain.make_accelerator(cfg)
    models = R1ZeroTrain.set_up(cfg, accelerator, {})
    tokenizer = R1ZeroTrain.load_tokenizer(cfg.model)
    texts, prompt = make_questions(tokenizer, work)
    questions = [{"question": text, "answer": {}, "index": i} for i, text in enumerate(texts)]
    for part, name in {"sampling": "generate", "scoring": "score", "step": "train_step"}.items():
        timed(work, part, R1ZeroTrain, name)

    turn(describe(models[0], work) | {"prompt": prompt, "before": peak(work)})
    for i in range(0, len(questions), work.questions):
        batch = questions[i : i + work.questions]
        _, samples = R1ZeroTrain.train_step(*models, tokenizer, batch, cfg, accelerator)
        TIMES["tokens"] = sum(sample["length"] for sample in samples)
        turn(step_figures(work))


def sampling_only(work: Work, turn: Callable) -> None:
    """Without updates. Measures attention too, the only part that may grow with the length."""
    R1ZeroTrain.update = lambda *_: {}
    timed(work, "attention", torch.nn.functional, "scaled_dot_product_attention")
    ours(work, turn)


def update_only(work: Work, turn: Callable) -> None:
    """With made-up completions: the memory that sampling needs would hide the update's peak."""

    def generate(*_) -> R1ZeroTrain.Rollout:
        with torch.device(work.device):
            prompt_ids = torch.randint(256, (work.questions, work.prompt_tokens))
            ids = torch.randint(256, (work.rows, work.new_tokens))
            return R1ZeroTrain.Rollout(
                prompt_ids=prompt_ids.repeat_interleave(work.group, 0),
                ids=ids,
                lengths=torch.full((work.rows,), work.new_tokens),
                truncated=torch.ones(work.rows),
                logp_sampled=torch.zeros(ids.shape),
                text=[str(i) for i in range(work.rows)],
            )

    R1ZeroTrain.generate = generate
    ours(work, turn)


def trl(work: Work, turn: Callable) -> None:
    import trl
    from datasets import Dataset

    folder, rows = make_model(work), work.trl_rows or work.rows
    tokenizer = R1ZeroTrain.load_tokenizer(folder)
    prompts = [render_prompt(tokenizer, text) for text in make_questions(tokenizer, work)[0]]

    def rewards(completions: list[str], completion_ids: list, **_: object) -> list[float]:
        TIMES["tokens"] += sum(map(len, completion_ids))
        return list(map(reward, completions))

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            turn({"trl_version": trl.__version__})

        def on_step_begin(self, *_, **__) -> None:
            TIMES["step"] -= clock(work)

        def on_step_end(self, *_, **__) -> None:
            TIMES["step"] += clock(work)
            turn(step_figures(work))

    args = trl.GRPOConfig(
        output_dir=folder,
        max_steps=work.steps + 1,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        num_generations=work.group,
        max_completion_length=work.new_tokens,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=work.rows // rows,
        beta=0.04,
        loss_type="grpo",
        use_bias_correction_kl=False,
        disable_dropout=True,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        model_init_kwargs={"dtype": "float32"},
        bf16=work.dtype == "bfloat16",
        use_cpu=work.device == "cpu",
        gradient_checkpointing=work.trl_checkpointing,
    )
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    timed(work, "sampling", trainer, "_generate")
    timed(work, "scoring", trainer, "_calculate_rewards")
    trainer.train()


def rate(work: Work, turn: Callable) -> None:
    """Operations/s of large matrix products in the precision of the step, and bytes/s of a large copy; best of 5."""
    size, repeats, numel = (2048, 1, 2**27) if work.device == "cpu" else (8192, 10, 2**30)
    shared = {"device": work.device, "dtype": getattr(torch, work.dtype)}
    a, b, product = (torch.randn(size, size, **shared) for _ in range(3))
    source, target = (torch.ones(numel, dtype=torch.uint8, device=work.device) for _ in range(2))

    def per_second(amount: float, function: Callable) -> float:
        seconds = timeit.repeat(function, number=repeats, timer=lambda: clock(work))
        return amount * repeats / min(seconds)

    figures = {}
    while True:
        turn(figures)
        products = per_second(2 * size**3, lambda: torch.matmul(a, b, out=product))
        copies = per_second(2 * numel, lambda: target.copy_(source))
        figures = {"operations_per_second": products, "bytes_per_second": copies}


WORKERS = {worker.__name__: worker for worker in (ours, sampling_only, update_only, trl, rate)}


def be_worker(kind: str, work: Work) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    if work.device == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        work = replace(work, device=best.type if best else "cpu")

    def turn(figures: dict) -> None:
        print(json.dumps(figures), file=replies, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # no more turns

    WORKERS[kind](work, turn)


# ---- The parent -----------------------------------------------------------------------------------------------------
class Worker:
    """A process that is ready once this is made. Then each call is a turn, and returns its figures."""

    def __init__(self, stack: ExitStack, kind: str, work: Work) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = Path(folder, "log")
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "--worker", kind, json.dumps(asdict(work))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=offline | os.environ | {"TMPDIR": folder},
            )
        self.process = stack.enter_context(process)
        stack.callback(process.kill)
        self.facts = self.answer()

    def answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"a worker failed:\n{self.log.read_text()[-3000:]}")

    def __call__(self) -> dict:
        print("go", file=self.process.stdin, flush=True)
        figures = self.answer()
        # The threads of OpenMP spin for up to 0.2 s more. OMP_WAIT_POLICY=passive would prevent that, but it slows
        # down a small model, whose step consists of thousands of short parallel loops.
        time.sleep(0.3)
        return figures


def limit(facts: dict, work: Work) -> dict[str, float]:
    """The least seconds of the parts of a step: see the top."""
    n, p, t, speed = work.rows, facts["prompt"], work.new_tokens, facts["operations_per_second"]
    body, head = 2 * facts["body"], 2 * facts["head"]

    def seen(first: float, last: float) -> float:
        """Operations of attention for the queries first to last, each over all keys up to its own."""
        return 2 * facts["attention"] * (last * (last + 1) - first * (first + 1))

    prefill = work.questions * (p * body + seen(0, p) + head)
    decode = n * ((t - 1) * (body + head) + seen(p, p + t - 1))
    update = 4 * n * ((p + t) * body + seen(0, p + t) + t * head)

    # The numbers that a decode step reads. A small model stays in a CPU's caches, which are faster than its memory.
    numbers = facts["body"] + facts["head"] + n * (p + t / 2) * facts["kv"]
    moved = (t - 1) * numbers * (2 if work.dtype == "bfloat16" else 4) / facts["bytes_per_second"]
    decode_seconds = decode / speed if facts["kind"] == "cpu" else max(decode / speed, moved)
    sampling = prefill / speed + decode_seconds
    return {
        "sampling": sampling,
        "update": update / speed,
        "step": sampling + update / speed,
        "operations": prefill + decode + update,
    }


def compare(work: Work, names: list[str]) -> dict:
    """The figures of the trainers, which take turns. Prints them as a table."""
    with ExitStack() as stack:
        workers = {name: Worker(stack, name, work) for name in (*names, "rate")}
        rounds = []
        for i in range(work.steps + 1):
            rounds.append({name: worker() for name, worker in workers.items()})
            for name in names:
                figures = rounds[i][name]
                if figures["tokens"] != work.rows * work.new_tokens:
                    raise RuntimeError(f"{name}: completions ended early, so the work differs")
                print(f"{work.name}, step {i}, {name}: {figures['step']:.2f} s", file=sys.stderr)

    del rounds[0]  # it was to warm up
    result = asdict(work)
    for name, worker in workers.items():
        medians = {key: median(r[name][key] for r in rounds) for key in rounds[0][name]}
        result |= worker.facts | {name: medians}
    result |= result.pop("rate")
    result["limit"] = limit(result, work)
    for name in names:
        figures, steps = result[name], [r[name]["step"] for r in rounds]
        figures |= {"fastest": min(steps), "slowest": max(steps)}
        figures["tokens/s"] = figures["tokens"] / figures["sampling"]
        figures["memory"] = max(r[name]["memory"] for r in rounds)
        figures["of_limit"] = result["limit"]["step"] / figures["step"]
        result["ratio"] = {key: figures[key] / result["ours"][key] for key in figures}
    about = (
        "\n{name}: {layers} layers, width {width}, vocabulary {vocabulary:,}, {parameters:,} "
        "parameters; {dtype} on {chip}\na step: {questions} questions x {group} completions of "
        "{new_tokens} tokens, prompts of about {prompt:.0f}; seconds, medians of {steps}; GB\n"
        "limit: {operations:,.0f} operations at {operations_per_second:,.0f} a second"
    )
    print(about.format_map(result | result["limit"]))
    lines = [*names, "ratio", "limit"] if "trl" in names else ["ours", "limit"]
    print_table({name: result[name] for name in lines})
    return result


def print_table(lines: dict[object, dict]) -> None:
    """The first line has all columns."""
    columns = next(iter(lines.values()))
    print(f"{'':5}" + "".join(f"{column:>11}" for column in columns))
    for name, figures in lines.items():
        cells = [f"{figures[key]:,.3f}" if key in figures else "" for key in columns]
        print(f"{name:5}" + "".join(f"{cell:>11}" for cell in cells))


def flatness(work: Work) -> dict:
    """Sampling time per token over the length of completions, and the update's memory over their number."""
    sampling, updates = {}, {}
    with ExitStack() as stack:
        workers = {
            tokens: Worker(stack, "sampling_only", replace(work, new_tokens=tokens))
            for tokens in (64, 128, 256, 512, 1024)
        }
        rounds = [{t: worker() for t, worker in workers.items()} for _ in range(work.steps + 1)]
    for t in workers:
        parts = ("sampling", "attention")
        f = {part: 1000 / t * median(r[t][part] for r in rounds[1:]) for part in parts}
        sampling[t] = f | {"rest": f["sampling"] - f["attention"]}
        sampling[t]["of_first"] = sampling[t]["rest"] / sampling[64]["rest"]
    print(f"{work.name}, {work.rows} rows: ms per token over new tokens, medians of {work.steps}")
    print_table(sampling)

    for rows in (64, 128, 256, 512):
        with ExitStack() as stack:
            worker = Worker(stack, "update_only", replace(work, questions=rows // work.group))
            updates[rows] = {"before": worker.facts["before"]} | worker()
        updates[rows]["of_first"] = updates[rows]["memory"] / updates[64]["memory"]
    print("\nupdate: seconds and GB over rows, each in a process of its own")
    print_table(updates)
    return {"ms_per_token": sampling, "update": updates}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=["narrow", "wide"], help="one of the two models")
    add("--shape", choices=["0.5b", "1.5b"], help="random weights in the shape of this Qwen2.5")
    add("--model", default="", help="folder of a causal model instead")
    for name in SIZES:
        add(f"--{name}", type=int, help="of a step; the default depends on the model")
    add("--steps", type=int, default=5, help="steps that count")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name in OPTIONS:
        add(f"--{name}", type=int, help="of our Config, whose default applies")
    add("--trl_rows", type=int, default=0, help="rows of TRL's forward passes; 0: all in one")
    add("--trl_checkpointing", action="store_true", help="TRL's default: slower, less memory")
    add("--flatness", action="store_true", help="ours alone, over sizes")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if args["worker"]:
        kind, work = args["worker"]
        return be_worker(kind, Work(**json.loads(work)))

    one = args["model"] or args["shape"] or args["only"] or args["flatness"] and "narrow"
    works = []
    for name in [one] if one else ["narrow", "wide"]:
        defaults = zip(SIZES, MODELS.get(name, MODELS["wide"])[-4:], strict=True)
        sizes = {size: args[size] or default for size, default in defaults}
        options = {option: args[option] for option in OPTIONS if args[option]}
        values = args | sizes | {"name": name, "options": options}
        works.append(Work(**{field.name: values[field.name] for field in fields(Work)}))

    if args["flatness"]:
        figures = {"flatness": flatness(works[0])}
    else:
        names = ["ours", "trl"]
        if importlib.util.find_spec("trl") is None:
            names = ["ours"]
            print("TRL is not installed; for both: uv run --with trl tests/benchmark.py")
        figures = {"models": [compare(work, names) for work in works]}
    system = {"system": platform.platform(), "cores": os.cpu_count()}
    print(f"\n{json.dumps(system | {'python': platform.python_version()} | figures)}")


if __name__ == "__main__":
    main()
