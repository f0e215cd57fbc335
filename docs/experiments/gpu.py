"""What only a CUDA GPU can show, in one call of about ten minutes.

    python docs/experiments/gpu.py --out runs/gpu      (--dry: the same code, tiny, on a CPU)

Results are rows of OUT/gpu.jsonl, one JSON object a line, each written as soon as it is known. A
part runs in a process of its own for so many seconds at most: one that fails, hangs or breaks its
CUDA context takes no other with it. The parts, the most important first:

    versions   of the software, and the GPU
    cudnn      attention's backends: NaN and wrong gradients by length, a new shape's price, speed
    graph      a rollout by CUDA graph equals one by eager steps, for all methods and ends
    tests      test_motg.py with the GPU visible and hidden; it runs beside the parts above
    decode     a step at the shape of Qwen2.5-1.5B, transformers' `generate`, and the least time
    profile    where a step's time goes, kernel by kernel
    recipe     one step of the paper's recipe: seconds and the largest memory
    smoke      `motg.py train --smoke --steps 40`
    smollm     README's run of a real model, if --real names its folder
"""

import argparse
import copy
import gc
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs/tools"))
from field import motg  # noqa: E402

transformers.utils.logging.set_verbosity_error()
LAYERS = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
QWEN = LAYERS | {"hidden_size": 1536, "intermediate_size": 8960, "vocab_size": 151_936}  # the 1.5B
FOUR = QWEN | {"num_hidden_layers": 4, "vocab_size": 4000}
TINY = FOUR | {"hidden_size": 96, "intermediate_size": 64}


def tried(function, *args):
    """The dict that a function returns, or the error that it raises; frees memory either way."""
    try:
        return function(*args)
    except Exception:  # noqa: BLE001  (one row failed, and the next is tried)
        return {"error": traceback.format_exc()[-900:]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def timed(function, *args):
    """Seconds of a call, its result, and the largest memory meanwhile in GiB."""
    finish = torch.cuda.synchronize if torch.cuda.is_initialized() else int
    finish()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = function(*args)
    finish()
    return time.perf_counter() - began, result, torch.cuda.max_memory_allocated() / 2**30


def milliseconds(function, times):
    """Of one call: the median of five loops of `times` calls."""
    function()
    loops = [timed(lambda: [function() for _ in range(times)])[0] for _ in range(5)]
    return 1e3 * median(loops) / times


def build(a, sizes, dtype=torch.float32, **more):
    """A Qwen2 with random weights, and the smoke model's tokenizer. The EOS is the vocabulary's
    last id, so that hardly any row ends by itself; a step is the same work wherever it is."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(motg.smoke_model(motg.Config()))
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, **more)
    with torch.device(a.device):
        model = transformers.Qwen2ForCausalLM(config).eval().to(dtype)
    model.generation_config.eos_token_id = sizes["vocab_size"] - 1
    return model, tokenizer


def sample(a, model, tokenizer, prompts, cfg, seed=0):
    return motg.rollout(model, tokenizer, prompts, cfg, torch.Generator(a.device).manual_seed(seed))


def versions(a):
    row = {"python": sys.version, "torch": torch.__version__, "cores": os.cpu_count()}
    row |= {"transformers": transformers.__version__, "cudnn": torch.backends.cudnn.version()}
    if not a.dry:
        row["nvidia-smi"] = subprocess.getoutput("nvidia-smi").splitlines()[2:11]
    yield row
    yield {"smoke_model_s": timed(motg.smoke_model, motg.Config())[0]}


# ----------------------------------------------------------------------------------------- cudnn
BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
BACKENDS["motg's"] = [SDPBackend.FLASH_ATTENTION, *BACKENDS["efficient"], *BACKENDS["math"]]
BACKENDS["any"] = [*BACKENDS["motg's"], *BACKENDS["cudnn"]]  # as torch likes
LENGTHS = [*range(1, 18), 31, 32, 33, 48, 63, 64, 65, 128, 256, 512, 1024, *range(100, 1101, 25)]


def attention_case(a, P, T, B=2):
    """Queries (B, 12, T, 128) of T steps behind prompts of P tokens, keys and values (B, 2, P + T,
    128), a mask that is causal and hides the padding on the left, and the output's gradient."""
    torch.manual_seed(T)
    how = {"device": a.device, "dtype": torch.bfloat16}
    q, grad = torch.randn(2, B, 12, T, 128, **how)
    k, v = torch.randn(2, B, 2, P + T, 128, **how)
    place = torch.arange(P + T, device=a.device)
    first = torch.arange(B, device=a.device)[:, None, None, None] * (P or T) // (B + 1)
    mask = (place <= place[P:, None]) & (place >= first)  # (B, 1, T, P + T)
    return q, k, v, mask, grad * mask.any(-1, keepdim=True)  # nothing depends on padding


def attend(name, grouped, q, k, v, mask, grad):
    """The backend that is taken; output and gradients. Keys and values are grouped or repeated."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    keys, values = (x if grouped else x.repeat_interleave(6, dim=1) for x in (k, v))
    how = {"attn_mask": mask, "enable_gqa": grouped}
    with sdpa_kernel(BACKENDS[name]):
        taken = SDPBackend(torch._fused_sdp_choice(q, keys, values, **how)).name
        out = F.scaled_dot_product_attention(q, keys, values, **how)
    return taken, [out * mask.any(-1, keepdim=True), *torch.autograd.grad(out, (q, k, v), grad)]


def gradients(a, name, grouped, P):
    """At which lengths a backend gives NaN, or something else than the formula does in fp32."""
    row = {"backend": name, "grouped": grouped, "prompt": P, "nan": [], "wrong": []}
    row |= {"taken": Counter(), "refused": {}}  # lengths by backend; lengths by message
    added = [0.0]  # what a shape's first call takes more than its second, in ms
    for T in LENGTHS[: 6 if a.dry else None]:
        q, k, v, mask, grad = case = attention_case(a, P, T)
        exact = attend("math", True, *(x.float() for x in (q, k, v)), mask, grad.float())[1]
        try:
            first, again = (timed(attend, name, grouped, *case) for _ in range(2))
        except RuntimeError as e:
            row["refused"].setdefault(str(e)[:80], []).append(T)
            continue
        added.append(1e3 * (first[0] - again[0]))
        taken, found = again[1]
        row["taken"][taken] += 1
        errors = [(x - y).norm() / y.norm().clamp(min=1) for x, y in zip(found, exact)]
        error = torch.stack(errors).max().item()  # NaN if one of them is
        if not error <= 0.03:
            row["wrong" if error < math.inf else "nan"].append(T)
    return row | {"new_shape_ms": median(added)}


def attention_speed(a, name, keys):
    """One layer: a decoding step (10 rows, 2,048 slots, as a graph) and an update's four rows."""
    S, grouped = 32 if a.dry else 2048, keys == "grouped"
    q, k, v, mask, _ = attention_case(a, S - 1, 1, B=10)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e9)
    if keys == "repeated":
        k, v = (x.repeat_interleave(6, dim=1) for x in (k, v))
    elif keys == "packed":  # six queries share their keys, as if they were six positions
        q = q.view(10, 2, 6, 128)

    def step():
        with sdpa_kernel(BACKENDS[name]):
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)

    step()
    replay = step if a.dry else motg.captured(step, torch.Generator(a.device))
    update = partial(attend, name, grouped, *attention_case(a, S // 2, S // 2, B=4))
    return {"step_ms": milliseconds(replay, 50), "update_ms": milliseconds(update, 3)}


def cudnn(a):
    cases = (("cudnn", False), ("motg's", False), ("any", False), ("cudnn", True))
    for case, P in product(cases, (0, 200, 203)):
        yield tried(gradients, a, *case, P)
    for keys, name in product(("packed", "repeated", "grouped"), ("efficient", "cudnn", "math")):
        yield {"backend": name, "keys": keys} | tried(attention_speed, a, name, keys)


# ---------------------------------------------------------------------------------- graph, tests
def graph_and_eager(a, model, tokenizer, prompts, cfg):
    """Two rollouts with one seed: is everything the same, and by how much do numbers differ?"""
    with mock.patch.object(motg, "print", create=True) as warned:
        one = sample(a, model, tokenizer, prompts, cfg)
    with mock.patch.object(motg, "captured", lambda step, generator: step):
        two = sample(a, model, tokenizer, prompts, cfg)
    row = {"tokens": int(one.mask.sum()), "mixed": int(one.mixed.sum())}
    names = ("tokens", "representative", "kind", "matched")
    row["equal"] = all(torch.equal(getattr(one, n), getattr(two, n)) for n in names)
    if row["equal"]:
        row["gap"] = (one.logprob - two.logprob).abs().max().item()
    return row | {"said": str(warned.call_args_list)[:200]}


def graph(a):
    smoke = motg.make_config(smoke=True, device=a.device)
    real = motg.load_model(smoke, motg.smoke_model(smoke))
    prompts = [motg.train_problem(smoke, real[1], n)[2] for n in range(2)]
    random = build(a, TINY if a.dry else FOUR, torch.bfloat16)
    settings = {"chains": 3, "max_new_tokens": 8 if a.dry else 40, "end_entropy": 9.0}
    settings |= {"end_patience": 6, "end_steps": 12}
    for name, model in {"smoke, fp32": real, "random, bf16": random}.items():
        for method in motg.METHODS:
            row = {"model": name, "method": method}
            for end in motg.CHOICES["end"]:
                cfg = motg.make_config(method, **settings, end=end)
                row[end] = tried(graph_and_eager, a, *model, prompts, cfg)
            yield row
    cfg, reserved = motg.make_config("dirichlet", **settings), []
    for seed in range(30):
        sample(a, *random, prompts, cfg, seed)
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    yield {"rollouts": 30, "reserved_mib": reserved, "grown_mib": reserved[-1] - reserved[1]}
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    dynamic = build(a, TINY, rope_parameters=rope)  # reads a value at each step: no graph
    for name, model in {"dynamic RoPE": dynamic, "smoke, after that": real}.items():
        yield {"model": name} | tried(graph_and_eager, a, *model, prompts, cfg)
    yield {"without a generator": motg.rollout(*real, prompts, cfg).texts}


def tests(a):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "test_motg.py"]
    command += ["--collect-only"] if a.dry else ["-n", str(max(1, os.cpu_count() // 2))]
    for gpu, more in {"visible": {}, "hidden": {"CUDA_VISIBLE_DEVICES": ""}}.items():
        log = Path(a.out, f"tests_{gpu}.txt")  # it is there even if time runs out
        how = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"} | more}
        with log.open("w") as file:
            done = subprocess.run(command, check=False, stdout=file, **how)
        yield {"gpu": gpu, "status": done.returncode, "last": log.read_text().splitlines()[-15:]}


# ------------------------------------------------------------------------------- decode, profile
def decode(a):
    sizes, P = (TINY, 8) if a.dry else (QWEN, 200)
    model, tokenizer = build(a, sizes, torch.bfloat16)
    short, long, baseline = (2, 6, 4) if a.dry else (32, 512, 128)
    weights = sum(p.nbytes for p in model.parameters())  # the tied table once, as the head reads it
    width = model.config.hidden_size // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    slot = 2 * 2 * width * sizes["num_hidden_layers"]  # bytes of a token's keys and values
    to, source = torch.empty(2, 2**20 if a.dry else 2**30, dtype=torch.uint8, device=a.device)
    copies = 2e3 * len(to) / milliseconds(partial(to.copy_, source), 20)  # bytes a second

    def rolled(method, rows, T):
        cfg = motg.make_config(method, chains=10, max_new_tokens=T)
        return timed(sample, a, model, tokenizer, [P * "a"] * (rows // 10), cfg)[0]

    def generated(_, rows, T):
        ids = torch.tensor([tokenizer.encode(P * "a")] * rows, device=a.device)
        how = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0}
        how |= {"min_new_tokens": T, "max_new_tokens": T, "attention_mask": torch.ones_like(ids)}
        return timed(partial(model.generate, ids, **how))[0]

    cases = {method: (rolled, long) for method in ("single", "dirichlet", "different-tokens")}
    cases["generate"] = (generated, baseline)
    for turn in range(3):  # the first warms up
        for rows in (10, 40):
            least = 1e3 * (weights + rows * (P + long / 2) * slot) / copies
            for name, (run, T) in cases.items():
                if turn == 0:
                    run(name, rows, short)
                    continue
                whole, start = run(name, rows, T), run(name, rows, short)
                ms = 1e3 * (whole - start) / (T - short)
                row = {"method": name, "rows": rows, "ms": ms, "tokens_s": 1e3 * rows / ms}
                row |= {"least_ms": least, "times_least": ms / least}
                yield row | {"copy_gb_s": copies / 1e9, "start_s": start}


KINDS = {  # by a kernel's name; the first that fits
    "attention": "fmha|flash|sdpa|attention",
    "products": "gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|dot_kernel|::mm|bmm",
    "sorts, scans": "sort|topk|radix|scan|search|cum",
    "elementwise, copies": "elementwise|vectorized|unrolled|copy|memset|gather|scatter|index",
    "others": "",
}


@torch.no_grad()
def first_step(a, model, tokenizer, n, P, cfg):
    """A decoder that has read n prompts of P tokens and made a step, and what makes the next."""
    ids, generator = torch.full((n, P), 5, device=a.device), torch.Generator(a.device)
    decoder = motg.Decoder(model, tokenizer, ids, ids >= 0, cfg, generator)
    decoder.step()
    return decoder, decoder.step if a.dry else motg.captured(decoder.step, generator)


@torch.no_grad()
def profile(a):
    model, tokenizer = build(a, TINY if a.dry else QWEN, torch.bfloat16)
    what = torch.profiler.ProfilerActivity.CPU if a.dry else torch.profiler.ProfilerActivity.CUDA
    for method in ("dirichlet", "single", "different-tokens"):
        cfg = motg.make_config(method, max_new_tokens=512)
        decoder, replay = first_step(a, model, tokenizer, 1, 8 if a.dry else 200, cfg)
        wall = milliseconds(replay, 3 if a.dry else 20)
        with torch.profiler.profile(activities=[what]) as seen:
            timed(lambda run=replay: [run() for _ in range(3)])
        seen.export_chrome_trace(f"{a.out}/trace.json")
        spent, calls, kinds = Counter(), Counter(), Counter()
        for event in json.loads(Path(a.out, "trace.json").read_text())["traceEvents"]:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset", a.dry and "cpu_op"):
                name, ms = event["name"], event["dur"] / 3e3
                kind = next(k for k in KINDS if re.search(KINDS[k], name, re.IGNORECASE))
                spent[name] += ms
                kinds[kind] += ms
                calls[name] += 1 / 3
        row = {"method": method, "wall_ms": wall, "kernels_ms": sum(spent.values())}
        top = [[ms, calls[kernel], kernel[:160]] for kernel, ms in spent.most_common(25)]
        yield row | {"kernels": sum(calls.values()), "kinds_ms": kinds, "top": top}
        del decoder, replay  # the next one's memory


# ---------------------------------------------------------------------------------------- recipe
def recipe(a):
    P, T = (10, 16) if a.dry else (1024, 1024)
    policy, tokenizer = build(a, TINY if a.dry else QWEN)
    default = motg.make_config("dirichlet", max_new_tokens=T)
    reference = copy.deepcopy(policy).requires_grad_(False)
    sampler = copy.deepcopy(reference).to(motg.compute_dtype(policy, default))
    optimizer = torch.optim.AdamW(policy.parameters(), 5e-6, (0.9, 0.99), 1e-8, 0.1, fused=True)

    def updated(r, micro_tokens, chunk):
        cfg = motg.make_config("dirichlet", micro_tokens=micro_tokens)
        rewards = torch.randn(len(r.kind) // cfg.chains, cfg.chains, device=a.device)
        task = (policy, reference, optimizer, r, motg.group_advantages(rewards).flatten(), cfg, 0.0)
        with mock.patch.object(motg, "LOGITS_CHUNK", chunk):
            seconds, log, gib = timed(motg.update, *task)
        row = {"micro_tokens": micro_tokens, "chunk": chunk, "update_s": seconds}
        return row | {"update_gib": gib, "norm": log["grad_norm"], "gap": log["sampler_gap"]}

    def evaluated(length):  # the first steps take all the memory that there is to take
        task = (first_step, a, sampler, tokenizer, 2 if a.dry else 32, length, default)
        _, (decoder, _), gib = timed(*task)
        return {"evaluation": length, "rows": len(decoder.rows), "gib": gib}

    few = sample(a, sampler, tokenizer, [P * "a"], motg.make_config(max_new_tokens=16))
    tried(updated, few, 4096, 2**24)  # warms up
    yield {"at_rest_gib": torch.cuda.memory_allocated() / 2**30, "sampler": str(sampler.dtype)}
    for prompts, length in ((1, P), (1, P // 5), (4, P)):  # the defaults sample four at once
        task = (a, sampler, tokenizer, [length * "a"] * prompts, default)
        seconds, r, gib = timed(sample, *task)
        row = {"prompt": length, "rows": len(r.kind), "rollout_s": seconds, "rollout_gib": gib}
        for how in ((4096, 2**24), (4096, 2**26), (1024, 2**24), (1024, 2**26))[: 4 // prompts]:
            yield row | tried(updated, r, *how)
    for length in (P // 5, P):
        yield tried(evaluated, length)


def trained(name, *flags):
    """`motg.py train` in a process of its own: seconds, accuracies, the last step's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, ROOT / "motg.py", "train", "--out", out, *flags]
        run = partial(subprocess.run, check=False, capture_output=True, text=True)
        seconds, done, _ = timed(run, command)
        row = {"run": name, "seconds": seconds}
        if done.returncode:
            return row | {"error": done.stderr[-900:]}
        result = json.loads((out / "result.json").read_text())
        row |= {key: result[key] for key in ("accuracy_before", "accuracy_after")}
        return row | {"last": json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])}


def smoke(a):
    flags = ["--smoke", "--device", a.device, "--steps", "2" if a.dry else "40"]
    flags += ["--eval-problems", "4", "--prompts-per-step", "2"] if a.dry else []
    for method in ("dirichlet", "different-tokens"):
        yield tried(trained, f"smoke {method}", *flags, "--method", method)


def smollm(a):
    text = Path(ROOT, "README.md").read_text()
    command = re.search(r"motg.py train (--device cpu .*?)```", text, re.DOTALL)[1]
    flags = shlex.split(command.replace("\\\n", " "))
    for method in ("single", "dirichlet", "different-tokens") if a.real else ():
        more = ("--model", a.real, "--device", a.device, "--method", method)  # the last one counts
        yield tried(trained, f"SmolLM2 {method}", *flags, *more)


# ------------------------------------------------------------------------------------------ main
PARTS = {versions: 60, cudnn: 90, graph: 110, tests: 60, decode: 110, profile: 45}
PARTS |= {recipe: 140, smoke: 100, smollm: 300}  # seconds at most


def record(a, part, row):
    """Adds a row to the file, and prints its beginning."""
    line = json.dumps({"part": part.__name__, "at": round(time.time() - a.began, 1)} | row)
    with Path(a.out, "gpu.jsonl").open("a") as file:
        print(line, file=file)
    print(re.sub(r"(\.\d\d\d)\d+", r"\1", line)[:400], flush=True)


def run(part, a):
    """The process of a part, and of a group that can be ended as a whole."""
    os.setsid()
    try:
        for row in part(a):
            record(a, part, row)
    except Exception:  # noqa: BLE001  (the next part is tried)
        record(a, part, {"error": traceback.format_exc()[-1500:]})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/gpu"), help="the folder")
    parser.add_argument("--parts", default="all", help="or some of them, with commas")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all")
    parser.add_argument("--real", help="a folder with SmolLM2-135M-Instruct")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    a = parser.parse_args()
    a.began, a.device = time.time(), "cpu" if a.dry else "cuda"
    Path(a.out).mkdir(parents=True, exist_ok=True)
    chosen = [p for p in PARTS if a.parts == "all" or p.__name__ in a.parts.split(",")]
    fork = multiprocessing.get_context("fork")  # what is imported is there at once
    processes = {part: fork.Process(target=run, args=(part, a)) for part in chosen}
    if tests in chosen:
        processes[tests].start()  # it runs beside those before it
    for part, process in processes.items():
        if part is not tests:
            process.start()
        process.join(max(1, min(PARTS[part], a.began + a.limit - time.time())))
        if process.is_alive():
            record(a, part, {"error": "ended, for its time was over"})
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        elif process.exitcode:
            record(a, part, {"error": f"its process ended with {process.exitcode}"})
    print(f"{time.time() - a.began:.0f} s: {a.out}/gpu.jsonl")


if __name__ == "__main__":
    main()
