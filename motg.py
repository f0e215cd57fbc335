"""motg: *Learning to Reason with Mixture of Tokens* (MoT-G, arXiv 2509.21482), the whole method in one file.

A language model that reasons writes one sampled token a step and forgets the rest of its distribution. MoT-G feeds
back a weighted *mixture* of k token embeddings at each thinking step, closes the thought with `</think>`, answers in
ordinary tokens, and is trained by GRPO on those mixture trajectories with rewards that a program can verify.

    logits z --softmax(z/T)--> p --k candidates v--> weights w --sum_i w_i E[v_i]--> next input       (thinking)
                               `--one token y: the same with a one-hot w-----------> next input       (answering)

Read it top to bottom; the sections follow the data:
    1 settings    2 mixtures    3 the end of a thought    4 rollouts    5 log-probabilities    6 GRPO
    7 tasks and rewards    8 contained scoring    9 models    10 probes    11 a run's folder    12 training
    13 evaluation and the command line
Run it:    python motg.py train --smoke      (on a CPU, in minutes)      python motg.py train --task graph_color
Shapes:    B rows, one a (prompt, chain); G chains a prompt; P prompt length; T new tokens; k candidates a step;
           V vocabulary; d width; L cache slots; N steps scored at once
Where it departs from the paper and from the paper's code, and why, is listed in README.md.
"""
from __future__ import annotations

import argparse, atexit, collections, copy, dataclasses, difflib, fcntl, functools, hashlib, inspect, itertools, json
import math, os, random, re, shutil, signal, sys, time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

# Waiting OpenMP threads spin by default; beside another busy process that makes small matrix products 50 times slower.
# The runtime reads this once, so it is set before torch is imported. A user's own setting stands.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

NEG_INF, TAG = float("-inf"), "</think>"

class UserError(ValueError):
    """A mistake of the caller's in one line: what was wrong, what is allowed. The program exits with `status`."""
    status = 2

class RunError(UserError):
    """Something a run met that it cannot go on from; what it had saved is intact."""
    status = 1

# ------------------------------------------------------------------------------------------------ 1. settings

def opt(group, default, help, lo=None, hi=None, choices=None):
    """One setting: its --help group, default and text, and what is allowed (bounds are inclusive)."""
    return field(default=default, metadata=dict(group=group, help=help, lo=lo, hi=hi, choices=choices))

TINY = 1e-6  # the least a setting may be that has to be above zero

@dataclass
class Config:
    """Every setting, flat; each is a flag. The defaults are the paper's recipe where the text says nothing else."""
    model: str = opt("run", "Qwen/Qwen2.5-1.5B-Instruct", "Hugging Face name or local folder (--smoke makes its own)")
    task: str = opt("run", "graph_color", "Reasoning-Gym task, several with commas, or 'all' for the paper's twelve")
    task_config: str = opt("run", "{}", "JSON with the task's own Reasoning-Gym settings")
    method: str = opt("run", "dirichlet", "preset of the mixture settings; eval takes several with commas")
    seed: int = opt("run", 0, "of the problems drawn and of the sampling", lo=0)
    out: str = opt("run", "", "the run's folder (default runs/<task>-<method>-<seed>)")
    resume: bool = opt("run", False, "continue the run in --out")
    smoke: bool = opt("run", False, "a small model made on the spot and small settings, on a CPU; your flags still win")
    sampling: str = opt("mixture", "top-k", "which candidates a thinking step takes", choices=(
        "top-k", "nucleus", "min-p", "without-replacement", "with-replacement"))
    aggregation: str = opt("mixture", "dirichlet", "how the candidates are weighted", choices=(
        "probability", "dirichlet", "uniform", "max", "posterior", "gumbel"))
    k: int = opt("mixture", 2, "candidates a step (paper: 2)", lo=1)
    temperature: float = opt("mixture", 0.9, "T in p = softmax(z/T), everywhere (paper: 0.9)", lo=TINY)
    top_p: float = opt("mixture", 0.95, "nucleus: the mass that the candidates reach", lo=TINY, hi=1)
    min_p: float = opt("mixture", 0.05, "min-p: the share of the largest p that a candidate needs", lo=TINY, hi=1)
    concentration: float = opt("mixture", 1.0, "dirichlet: c in w ~ Dir(c p^) (paper's code: 1)", lo=TINY)
    moi_beta: float = opt("mixture", 1.0, "posterior: beta of Mixture of Inputs", lo=0)
    gumbel_tau: float = opt("mixture", 1.0, "gumbel: tau of the softmax", lo=TINY)
    end: str = opt("mixture", "representative", "what ends a thought (section 3)", choices=(
        "representative", "most-likely", "entropy", "steps"))
    end_entropy: float = opt("mixture", 0.1, "end=entropy: H(p) below this, in nats, ...", lo=0)
    end_patience: int = opt("mixture", 256, "... for this many steps in a row (Soft Thinking: 256)", lo=1)
    end_steps: int = opt("mixture", 128, "end=steps: thinking steps before the tag is forced", lo=1)
    logprob: str = opt("mixture", "representative", "what of a step GRPO scores", choices=(
        "representative", "weighted", "exact"))
    chains: int = opt("GRPO", 10, "G, chains a prompt (paper: 10, and 5 for half the trajectories)", lo=1)
    prompts_per_step: int = opt("GRPO", 1, "prompts a step (paper: 1)", lo=1)
    accumulate: int = opt("GRPO", 4, "steps an optimiser update (paper: 4)", lo=1)
    steps: int = opt("GRPO", 1000, "steps, each a rollout (paper: 1,000)", lo=0)
    max_prompt_tokens: int = opt("GRPO", 1024, "longer prompts are skipped and counted, never cut (paper: 1,024)", lo=1)
    max_new_tokens: int = opt("GRPO", 1024, "thought and answer together (paper: 1,024)", lo=1)
    lr: float = opt("GRPO", 5e-6, "AdamW's rate (paper: 5e-6, on bf16 weights; here the master weights are fp32)", lo=0)
    warmup: float = opt("GRPO", 0.18, "share of the updates that warm the rate up (paper: 0.18)", lo=0, hi=1)
    weight_decay: float = opt("GRPO", 0.1, "AdamW's (paper: 0.1)", lo=0)
    grad_clip: float = opt("GRPO", 0.1, "largest gradient norm (paper: 0.1)", lo=TINY)
    kl_beta: float = opt("GRPO", 0.1, "weight of the KL to the reference, 0 keeps none (paper: 0.1)", lo=0)
    clip: float = opt("GRPO", 0.2, "PPO's clip below ratio 1", lo=0, hi=1)
    clip_high: float = opt("GRPO", 0.2, "PPO's clip above ratio 1 (DAPO: 0.28)", lo=0)
    loss_average: str = opt("GRPO", "chain", "within chains, then over them (paper's code); over all tokens (DAPO); over "
                            "the constant chains x max_new_tokens (Dr. GRPO)", choices=("chain", "token", "constant"))
    scale_advantages: bool = opt("GRPO", True, "divide advantages by the group's std (Dr. GRPO: no)")
    micro_tokens: int = opt("GRPO", 16384, "padded tokens a micro-batch; lower it when memory runs out", lo=1)
    checkpoint_activations: bool = opt("GRPO", False, "recompute layers in the backward pass: less memory, more time")
    score_weight: float = opt("reward", 2.0, "times the task's score in [0, 1] (paper: 2)", lo=0)
    format_weight: float = opt("reward", 0.5, "for ...</think> <answer>...</answer> (paper: 0.5)", lo=0)
    length_weight: float = opt("reward", 0.5, "for 200 to 400 words (paper: 0.5)", lo=0)
    eval_problems: int = opt("evaluation", 100, "distinct test problems a task (paper: 100)", lo=1)
    eval_every: int = opt("evaluation", 0, "steps between evaluations; 0: only before and after", lo=0)
    eval_rows: int = opt("evaluation", 256, "rows decoded at once", lo=1)
    save_every: int = opt("evaluation", 100, "steps between checkpoints; the last step always has one", lo=1)

# A named method is nothing but settings. The papers of `soft-thinking` and `mixture-of-inputs` do not train.
METHODS = {
    "single": dict(sampling="without-replacement", aggregation="probability", k=1, logprob="representative"),
    "dirichlet": dict(sampling="top-k", aggregation="dirichlet", logprob="representative"),
    "different-tokens": dict(sampling="without-replacement", aggregation="probability", logprob="weighted"),
    "soft-thinking": dict(sampling="top-k", aggregation="probability", logprob="representative"),
    "mixture-of-inputs": dict(sampling="top-k", aggregation="posterior", logprob="representative"),
    "multiplex": dict(sampling="with-replacement", aggregation="probability", logprob="exact"),
    "soft-grpo": dict(sampling="top-k", aggregation="gumbel", logprob="exact")}
SMOKE = dict(model="", task="chain_sum", task_config='{"min_terms": 3, "max_terms": 4, "max_digits": 1}', chains=8,
             prompts_per_step=16, accumulate=1, steps=80, max_prompt_tokens=64, max_new_tokens=40, lr=5e-5, grad_clip=1.0,
             kl_beta=0.01, length_weight=0.0, eval_problems=256, save_every=40)
DRAWN = ("without-replacement", "with-replacement")  # rules whose candidates are drawn; the first is a sample from p

def closest(name, known):
    """The end of an error message: the likely spelling of `name`, or all that is allowed."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else "allowed: " + ", ".join(map(repr, known))

def make_config(method="dirichlet", **overrides) -> Config:
    """Defaults, then --smoke's, then the method's, then `overrides`; checked. Raises UserError."""
    known = [f.name for f in fields(Config)]
    for name in overrides:
        if name not in known:
            raise UserError(f"unknown setting {name!r}; {closest(name, known)}")
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; {closest(method, list(METHODS))}")
    return check_config(Config(**{**(SMOKE if overrides.get("smoke") else {}), **METHODS[method], "method": method,
                                  **overrides}))

def check_config(cfg: Config) -> Config:
    """The one place where settings are checked; returns `cfg`. Raises UserError naming what is allowed."""
    for f in fields(cfg):
        value, m, kind = getattr(cfg, f.name), f.metadata, {"int": int, "float": float, "bool": bool}.get(f.type, str)
        if kind is float and type(value) is int:
            setattr(cfg, f.name, value := float(value))
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise UserError(f"{f.name} = {value!r}: expected {'a finite number' if kind is float else kind.__name__}")
        if m["choices"] and value not in m["choices"]:
            raise UserError(f"{f.name} = {value!r}: {closest(value, m['choices'])}")
        if (m["lo"] is not None and value < m["lo"]) or (m["hi"] is not None and value > m["hi"]):
            raise UserError(f"{f.name} = {value!r}: allowed is {m['lo']} or more" + (f", up to {m['hi']}" if m["hi"] else ""))
    density = cfg.sampling == "top-k" and cfg.aggregation in ("dirichlet", "gumbel")
    if cfg.logprob == "exact" and (cfg.aggregation == "max" or not (cfg.sampling in DRAWN or density)):
        raise UserError(f"logprob 'exact' is not defined for {cfg.sampling} + {cfg.aggregation}; allowed: top-k with "
                        f"dirichlet or gumbel, or {DRAWN[0]} or {DRAWN[1]} with anything but max")
    if cfg.end == "steps" and cfg.end_steps >= cfg.max_new_tokens:
        raise UserError(f"end_steps = {cfg.end_steps}: allowed is less than max_new_tokens = {cfg.max_new_tokens}")
    try:
        assert isinstance(json.loads(cfg.task_config), dict)
    except (ValueError, AssertionError):
        raise UserError(f"task_config = {cfg.task_config!r}: expected a JSON object") from None
    return cfg

# ------------------------------------------------------------------------------------------------ 2. mixtures
# A step is k candidates `tokens` and k `log_weights`; a slot with log-weight -inf is empty. An ordinary token is a
# step with one filled slot, so that answers, the single-token baseline and the end tag need no second code path.

class Mixture(NamedTuple):
    """One step of B rows: what is mixed, and the one candidate that a reader sees."""
    tokens: torch.Tensor  # (B, k)
    log_weights: torch.Tensor  # (B, k) float32, -inf in an empty slot
    representative: torch.Tensor  # (B,) always one of `tokens`

def token_distribution(logits, temperature):
    """log p = log softmax(z / T) in float32, shape of `logits`. Sampler, scorer, reference and probes all call this."""
    return F.log_softmax(logits.float() / temperature, dim=-1)

def entropy_of(log_p):
    """H(p) in nats, (..., V) -> (...)."""
    return torch.special.entr(log_p.exp()).sum(-1)

def draw(log_p, generator=None, block=128):
    """One token a row from p, (B, V) -> (B,): inverse CDF in float64, so no tail is cut off, in two stages (a block of
    the vocabulary, then a token of it), so sums stay short. Noise for every token (Gumbel-max) would cost ten times it."""
    p = F.pad(log_p.exp(), (0, -log_p.shape[1] % block)).unflatten(1, (-1, block))  # (B, V/128, 128)
    u = torch.rand(len(p), 2, dtype=torch.float64, device=p.device, generator=generator)  # (B, 2)
    cdf = p.sum(-1).double().cumsum(-1)  # (B, V/128)
    b = torch.searchsorted(cdf, u[:, :1] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1)
    cdf = p.gather(1, b[..., None].expand(-1, -1, block)).squeeze(1).double().cumsum(-1)  # (B, 128)
    i = torch.searchsorted(cdf, u[:, 1:] * cdf[:, -1:], right=True)  # (B, 1)
    return (b * block + i).squeeze(1).clamp(max=log_p.shape[1] - 1)

def strike(log_p, token):
    """p without `token` (...), renormalised in log space, since 1 - p(token) cancels where p is sharp."""
    return log_p.scatter(-1, token[..., None], NEG_INF).log_softmax(-1)

def gumbel_noise(like, generator=None):
    """Standard Gumbel noise g; argmax(log w + g) is a draw from Cat(w)."""
    return -torch.empty_like(like).exponential_(generator=generator).log()

def candidates(log_p, cfg, generator=None):
    """The sampling rule: tokens (B, k) and their log p (B, k), -inf where the rule leaves a slot empty."""
    if cfg.sampling == "with-replacement":
        tokens = torch.stack([draw(log_p, generator) for _ in range(cfg.k)], dim=-1)  # (B, k)
    elif cfg.sampling == "without-replacement":  # k times: draw, strike out (the law of Gumbel top-k: Plackett-Luce)
        drawn, rest = [draw(log_p, generator)], log_p
        while len(drawn) < cfg.k:
            rest = strike(rest, drawn[-1])
            drawn.append(draw(rest, generator))
        tokens = torch.stack(drawn, dim=-1)  # (B, k)
    else:
        top, tokens = log_p.topk(cfg.k)  # (B, k), descending
        if cfg.sampling == "nucleus":  # a token stays while the mass *before* it is below top_p
            top = top.masked_fill(top.exp().cumsum(-1) - top.exp() >= cfg.top_p, NEG_INF)
        if cfg.sampling == "min-p":
            top = top.masked_fill(top < top[:, :1] + math.log(cfg.min_p), NEG_INF)
        return tokens, top
    return tokens, log_p.gather(-1, tokens)

def dirichlet_alpha(log_hat, cfg):
    """c p^, p^ kept above 1e-5: a drawn log-weight is of size 1/p^, and float32 would lose the density of larger ones."""
    return cfg.concentration * log_hat.exp().clamp(min=1e-5)

def mixing_weights(log_hat, entropy, cfg, generator=None):
    """The aggregation rule: log p^ (B, k), renormalised over the candidates, to log w (B, k) and the representative's
    slot (B,): the first draw of a drawing rule, else one draw from Cat(w). `entropy` (B,) is H(p) / log V."""
    log_w, empty = log_hat, log_hat == NEG_INF  # `probability`; also `max`, for a reader: it has no weights
    if cfg.aggregation == "uniform":
        log_w = torch.zeros_like(log_hat).masked_fill(empty, NEG_INF).log_softmax(-1)
    elif cfg.aggregation == "gumbel":  # SofT-GRPO
        log_w = ((log_hat + gumbel_noise(log_hat, generator)) / cfg.gumbel_tau).log_softmax(-1)
    elif cfg.aggregation == "dirichlet":
        # Mean p^. As c grows, w -> p^ (`probability`); as c -> 0, w becomes one candidate drawn from p^. In log space,
        # log Gamma(a) = log Gamma(a + 1) + log(U) / a for the variates, no a > 0 is too small; -log U is exponential.
        a = dirichlet_alpha(log_hat, cfg)  # (B, k)
        log_gamma = (torch._standard_gamma(a + 1, generator=generator).log()
                     - torch.empty_like(a).exponential_(generator=generator) / a)  # (B, k)
        log_w = log_gamma.masked_fill(empty, NEG_INF).log_softmax(-1)
    if cfg.sampling in DRAWN:
        slot = torch.zeros_like(entropy, dtype=torch.long)  # (B,)
    else:
        slot = (log_w + gumbel_noise(log_w, generator)).argmax(-1)  # (B,)
    if cfg.aggregation == "posterior":  # Mixture of Inputs: the token drawn is evidence, weighed against p^ by H
        H, y = entropy[:, None], F.one_hot(slot, log_hat.shape[-1])  # (B, 1), (B, k)
        log_w = ((H * log_hat.exp() + (cfg.moi_beta + 1 - H) * y) / (cfg.moi_beta + 1)).log()
    return log_w, slot

def mix(log_p, entropy, cfg, generator=None) -> Mixture:
    """Candidates, weights, representative from log p (B, V) and its entropy (B,)."""
    tokens, log_hat = candidates(log_p, cfg, generator)  # (B, k) both
    scale = math.log(max(log_p.shape[-1], 2))
    log_w, slot = mixing_weights(log_hat.log_softmax(-1), entropy / scale, cfg, generator)
    return Mixture(tokens, log_w, tokens.gather(-1, slot[:, None]).squeeze(-1))

def sample_mixture(logits, cfg, generator=None) -> Mixture:
    """One thinking step from logits (B, V). Raises UserError when k exceeds the vocabulary."""
    check_k(cfg, logits.shape[-1])
    log_p = token_distribution(logits, cfg.temperature)
    return mix(log_p, entropy_of(log_p), cfg, generator)

def check_k(cfg, vocabulary):
    """Raises UserError when there are fewer tokens than candidates asked for."""
    if cfg.k > vocabulary:
        raise UserError(f"k = {cfg.k}: allowed is 1 to the vocabulary's {vocabulary}")

def mixture_embedding(table, tokens, log_weights, aggregation="probability"):
    """e = sum_i w_i E[v_i], summed in float32: table (V, d), the rest (..., k) -> (..., d). `max`: element-wise."""
    rows = F.embedding(tokens, table)  # (..., k, d)
    if aggregation == "max":
        return rows.masked_fill((log_weights == NEG_INF)[..., None], NEG_INF).amax(-2)
    return (log_weights.exp()[..., None] * rows).sum(-2).to(table.dtype)

def mixture_logprob(logits, tokens, log_weights, representative, cfg):
    """Log-prob (...) of recorded steps (..., k) under the model that gave `logits` (..., V), as `cfg.logprob` says.
    A step with one filled slot is an ordinary token: log p(token), always."""
    return step_logprob(token_distribution(logits, cfg.temperature), tokens, log_weights, representative, cfg)

def step_logprob(log_p, tokens, log_weights, representative, cfg):
    """`mixture_logprob` from log p."""
    empty = log_weights == NEG_INF  # (..., k)
    log_pv = log_p.gather(-1, tokens)  # (..., k)
    token = log_pv.masked_fill(empty, 0.0).sum(-1)  # (...) log p(token) where one slot is filled
    if cfg.logprob == "representative":
        score = log_p.gather(-1, representative[..., None]).squeeze(-1)
    elif cfg.logprob == "weighted":  # weights are data: a gradient through them could push a chosen token *down*
        score = (log_weights.detach().exp() * log_pv.masked_fill(empty, 0.0)).sum(-1)
    else:
        score = exact_logprob(log_p, log_pv, tokens, log_weights, empty, cfg)
    return torch.where((~empty).sum(-1) == 1, token, score)

def exact_logprob(log_p, log_pv, tokens, log_weights, empty, cfg):
    """What neither the paper nor its code has: the log-probability of the candidates drawn, plus the log-density of the
    weights drawn given them (over the simplex)."""
    score = torch.zeros_like(log_pv[..., 0])
    if cfg.sampling == "with-replacement":
        score = log_pv.masked_fill(empty, 0.0).sum(-1)
    elif cfg.sampling == "without-replacement":  # Plackett-Luce: sum_j log p(v_j) - log(1 - sum_{i<j} p(v_i))
        rest = log_p
        for j in range(tokens.shape[-1]):
            rest = strike(rest, tokens[..., j - 1]) if j else rest
            score = score + rest.gather(-1, tokens[..., j : j + 1]).masked_fill(empty[..., j : j + 1], 0.0).squeeze(-1)
    log_hat = log_pv.masked_fill(empty, NEG_INF).log_softmax(-1).masked_fill(empty, 0.0)  # (..., k)
    log_w, n = log_weights.masked_fill(empty, 0.0), (~empty).sum(-1)  # (..., k), (...)
    if cfg.aggregation == "dirichlet":
        a = dirichlet_alpha(log_hat, cfg) * ~empty  # (..., k)
        score = score + ((a - 1) * log_w - torch.lgamma(a + empty)).sum(-1) + torch.lgamma(a.sum(-1))
    elif cfg.aggregation == "gumbel":  # the Concrete density, Maddison et al. 2017, eq. 10
        tau = cfg.gumbel_tau
        norm = (log_hat - tau * log_w).masked_fill(empty, NEG_INF).logsumexp(-1)  # (...)
        score = (score + torch.lgamma(n.float()) + (n - 1) * math.log(tau) - n * norm
                 + ((log_hat - (tau + 1) * log_w) * ~empty).sum(-1))
    return score

# ------------------------------------------------------------------------------------------------ 3. the end of a thought
# `</think>` is looked for in the text, not among the ids: for Qwen2.5 it is three tokens, and the last may swallow what
# follows (`>\n` is one token). Instead of decoding every row at every step, a row keeps one number, how many of the tag's
# eight characters its text ends with, and a table says what each token makes of that number.
#
# Four rules end a thought. `representative`: the text read so far completes the tag; `most-likely`: it would with the
# arg-max token; `entropy` (H(p) low for end_patience steps in a row) and `steps` (end_steps taken) write the tag
# themselves. Those tokens are forced: the policy did not choose them, so they carry no loss.

@functools.lru_cache(maxsize=8)
def tag_table(tokenizer, vocabulary):
    """(8, V): how many characters of the tag are matched after token v, from s matched before; 8 completes it."""
    table = torch.zeros(len(TAG), vocabulary, dtype=torch.long)
    texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), vocabulary))],
                                   clean_up_tokenization_spaces=False)
    for token, text in enumerate(texts):
        if "<" in text or ">" in text or text in TAG:  # no other text can begin or lengthen a match
            for s in range(len(TAG)):
                seen = TAG[:s] + text
                table[s, token] = len(TAG) if TAG in seen else next(
                    n for n in range(len(TAG) - 1, -1, -1) if seen.endswith(TAG[:n]))
    return table

def eos_ids(model, tokenizer):
    """Every id that ends an answer: the generation config's and the tokenizer's. Raises UserError if there is none."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = {*(ids if isinstance(ids, (list, tuple)) else [ids]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise UserError("neither the tokenizer nor the generation config names an EOS token; one is needed")
    return sorted(ids)

# ------------------------------------------------------------------------------------------------ 4. rollouts
# Token j of a row sits in cache slot j: prompts are padded on the right, and each row's own tokens then overwrite its
# padding, so "slot <= position" is the only mask, for prompts of any lengths. A decoding step works on preallocated
# tensors and never asks the GPU for a value: CUDA records it once and replays it as one graph.

@dataclass
class Rollout:
    """B trajectories, those of a prompt adjacent. Ids and log-weights, never embeddings: every model looks them up in
    its own table."""
    prompt_ids: torch.Tensor  # (B, P) left-padded
    prompt_mask: torch.Tensor  # (B, P)
    tokens: torch.Tensor  # (B, T, k)
    log_weights: torch.Tensor  # (B, T, k)
    representative: torch.Tensor  # (B, T)
    thinking: torch.Tensor  # (B, T) steps of the thought, its tag included
    mask: torch.Tensor  # (B, T) real steps
    sampled: torch.Tensor  # (B, T) those the policy chose: without forced tags
    eos: torch.Tensor  # (B, T) the step that ended the row
    logprob: torch.Tensor  # (B, T) as sampled
    entropy: torch.Tensor  # (B, T) of p, in nats
    texts: list[str]  # thought, tag and answer as read, without the EOS token

    def select(self, rows):
        """The given rows (a LongTensor), padding trimmed to the longest of them; texts are left behind."""
        P, T = (max(1, int(m[rows].sum(1).max())) for m in (self.prompt_mask, self.mask))
        return Rollout(texts=[], **{n: v[rows][:, -P:] if n.startswith("prompt") else v[rows][:, :T]
                                    for n, v in vars(self).items() if n != "texts"})

def grouped_attention(module, q, k, v, mask, scaling=None, **_):
    """softmax(q k^T) v for transformers: (B, heads, Q, D) -> (B, Q, heads, D). In a decoding step the query heads that
    share a key head become rows of one head, so that keys are read once and not copied for each of them."""
    if q.shape[2] == 1:
        grouped = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, key heads, queries each, D)
        return F.scaled_dot_product_attention(grouped, k, v, mask, scale=scaling).reshape(len(q), 1, q.shape[1], -1), None
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2), None

transformers.AttentionInterface.register("motg", grouped_attention)

class KVCache:
    """Keys and values (B, heads, L, D) a layer, behind the one method that transformers' attention layers call."""
    def __init__(self, rows, length):
        self.rows, self.length, self.visible, self.slot, self.layers = rows, length, length, None, {}

    def update(self, k, v, layer, *_, **__):
        """Store new keys and values; return those to attend to. A prefill (`slot` None) has one row a prompt, and its
        keys are shared out to the prompt's chains; a step has one token a row, for slot (B,)."""
        if layer not in self.layers:  # zeros: what a mask hides must still be finite
            self.layers[layer] = [x.new_zeros(self.rows, x.shape[1], self.length, x.shape[3]) for x in (k, v)]
        for cache, new in zip(self.layers[layer], (k, v)):
            if self.slot is None:
                cache[:, :, : new.shape[2]] = new.repeat_interleave(self.rows // len(new), dim=0)
            else:
                cache[torch.arange(self.rows, device=new.device), :, self.slot] = new[:, :, 0]
        return (k, v) if self.slot is None else [cache[:, :, : self.visible] for cache in self.layers[layer]]

class Decoder:
    """What decoding B rows keeps from step to step, and the step. Reused by the next rollout of its shape."""
    def __init__(self, model, tokenizer, cfg, rows, length, generator):
        self.model, self.cfg, self.generator, self.rows, self.length = model, replace(cfg), generator, rows, length
        self.table = model.get_input_embeddings().weight  # (V, d)
        self.cache, self.graphs, self.logits = KVCache(rows, length), {}, None
        with model.device:  # the device on which these are made
            self.tag_table = tag_table(tokenizer, len(self.table)).to(model.device)  # (8, V)
            self.tag_ids = torch.tensor(tokenizer(TAG, add_special_tokens=False)["input_ids"])
            self.eos_ids = torch.tensor(eos_ids(model, tokenizer))
            self.slot0 = torch.arange(cfg.k) == 0  # (k,)
            self.t, self.position, self.matched, self.streak, self.forced = (  # this step; (B,) the rest: slot to write,
                torch.zeros(n, dtype=torch.long) for n in (1, rows, rows, rows, rows))  # tag matched, see `choose`
            self.thinking, self.live = torch.ones(2, rows, dtype=torch.bool)
            B, T, k, kinds = rows, cfg.max_new_tokens, cfg.k, dict(r=torch.long, t=torch.bool, m=torch.bool, s=torch.bool)
            self.record = {n: torch.zeros(B, T, dtype=d) for n, d in dict(
                representative=torch.long, thinking=torch.bool, mask=torch.bool, sampled=torch.bool, eos=torch.bool,
                logprob=torch.float, entropy=torch.float).items()}
            self.record |= dict(tokens=torch.zeros(B, T, k, dtype=torch.long), log_weights=torch.zeros(B, T, k))

    def forward(self, embeds, position):
        """Hidden states (B, Q, d) at `position` (B, Q), attending to every slot up to it."""
        visible = torch.arange(self.cache.visible, device=embeds.device) <= position[:, None, :, None]  # (B, 1, Q, L)
        return self.model.base_model(inputs_embeds=embeds, attention_mask=visible, position_ids=position,
                                     past_key_values=self.cache, use_cache=True).last_hidden_state

    def start(self, ids):
        """Prefill each prompt once; keep the logits (B, V) of its last token for each of its chains."""
        G, last = self.rows // len(ids), torch.tensor([len(i) - 1 for i in ids], device=self.table.device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True).to(self.table.device)
        self.cache.slot, self.cache.visible = None, padded.shape[1]
        position = torch.arange(padded.shape[1], device=padded.device).expand_as(padded)
        hidden = self.forward(F.embedding(padded, self.table), position)  # (prompts, P, d)
        hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)  # (prompts, d)
        logits = self.model.get_output_embeddings()(hidden).repeat_interleave(G, dim=0)  # (B, V)
        self.logits = logits if self.logits is None else self.logits.copy_(logits)
        for state in (self.t, self.matched, self.streak, self.forced, *self.record.values()):
            state.zero_()
        self.position.copy_(last.repeat_interleave(G) + 1)
        self.thinking.fill_(True), self.live.fill_(True)
        self.cache.slot = self.position

    def choose(self):
        """Sections 2 and 3 in one step: from the logits to the next input (B, 1, d), recorded."""
        cfg, thinking, live = self.cfg, self.thinking, self.live
        log_p = token_distribution(self.logits, cfg.temperature)  # (B, V)
        entropy = entropy_of(log_p)  # (B,)
        m = mix(log_p, entropy, cfg, self.generator)
        y = torch.where(thinking, m.representative, m.tokens[:, 0] if cfg.sampling in DRAWN else draw(log_p, self.generator))
        force = torch.zeros_like(thinking)  # (B,) is a rule writing the tag?
        if cfg.end == "most-likely":
            best = log_p.argmax(-1)  # (B,)
            y = torch.where(thinking & (self.tag_table[self.matched, best] == len(TAG)), best, y)
        elif cfg.end != "representative":  # `streak` steps in a row were of the kind that ends a thought
            enough = cfg.end_patience if cfg.end == "entropy" else cfg.end_steps
            force = (self.forced > 0) | (thinking & (self.streak >= enough))
            self.streak.add_(1).mul_(entropy < cfg.end_entropy if cfg.end == "entropy" else 1)
            y = torch.where(force, self.tag_ids[self.forced], y)
            self.forced.copy_((self.forced + 1) * force % len(self.tag_ids))
        y = y * live
        matched = self.tag_table[self.matched, y]  # (B,)
        closes = thinking & (matched == len(TAG)) & ((y == best) if cfg.end == "most-likely" else True)
        ends = (y[:, None] == self.eos_ids).any(-1) & live & ~force
        one_hot = (~thinking | closes | ends | force | ~live)[:, None]  # (B, 1)
        tokens = torch.where(one_hot, y[:, None] * self.slot0, m.tokens)  # (B, k)
        log_w = torch.where(one_hot, torch.where(self.slot0, 0.0, NEG_INF), m.log_weights)  # (B, k)
        score = step_logprob(log_p, tokens, log_w, y, cfg)  # (B,)
        for name, value in dict(tokens=tokens, log_weights=log_w, representative=y, mask=live, sampled=live & ~force,
                                thinking=thinking & live, eos=ends, entropy=entropy * live,
                                logprob=score.masked_fill(force | ~live, 0.0)).items():
            self.record[name].index_copy_(1, self.t, value[:, None])
        thinking.logical_and_(~closes), live.logical_and_(~ends)
        self.matched.copy_(matched % len(TAG)), self.t.add_(1)
        return mixture_embedding(self.table, tokens, log_w, cfg.aggregation)[:, None]

    def step(self):
        """Choose, feed, read the next logits, on tensors that stay where they are."""
        hidden = self.forward(self.choose(), self.position[:, None])  # (B, 1, d)
        self.logits.copy_(self.model.get_output_embeddings()(hidden[:, 0]))
        self.position.add_(1)

    def run(self, visible):
        """A step with `visible` slots in sight. On CUDA the second one with a given number is recorded (the first warms
        up) and replayed from then on: one launch for some 1,500 kernels."""
        self.cache.visible = visible
        seen = self.graphs.setdefault(visible, "cpu" if self.table.device.type == "cpu" else None)
        if seen is None or seen == "cpu":
            self.graphs[visible] = seen or "warm"
            return self.step()
        if seen == "warm":
            self.graphs[visible] = graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.graphs.setdefault("pool", torch.cuda.graph_pool_handle())):
                self.step()
        self.graphs[visible].replay()

@torch.no_grad()
def rollout(model, tokenizer, prompts: list[str], cfg, generator=None) -> Rollout:
    """`cfg.chains` trajectories a prompt. Prompts are templated text that ends in the opened think tag, so that every
    row starts thinking. Raises UserError for an empty prompt or a k above the vocabulary."""
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    if not ids or not all(ids):
        raise UserError("rollout needs prompts of at least one token each")
    check_k(cfg, len(model.get_input_embeddings().weight))
    cuda, P, rows = model.device.type == "cuda", max(map(len, ids)), len(ids) * cfg.chains
    length, d = (max(P, cfg.max_prompt_tokens) if cuda else P) + cfg.max_new_tokens, getattr(model, "decoder", None)
    if d is None or (d.cfg, d.rows, d.generator) != (cfg, rows, generator) or d.length < length:
        d = model.decoder = Decoder(model, tokenizer, cfg, rows, length, generator)
    d.start(ids)
    bucket, every = (256, 16) if cuda else (1, 1)  # graphs come in steps of 256 slots; a stop test makes the GPU wait
    for t in range(cfg.max_new_tokens):
        d.run(min(d.length, -(-(P + t + 1) // bucket) * bucket))
        if (t + 1) % every == 0 and not d.live.any():
            break
    r = {n: v[:, : int(d.record["mask"].sum(1).max())].clone() for n, v in d.record.items()}
    texts = [tokenizer.decode(y[keep], clean_up_tokenization_spaces=False)
             for y, keep in zip(r["representative"].cpu(), (r["mask"] & ~r["eos"]).cpu())]
    left = torch.tensor([[-1] * (P - len(i)) + i for i in ids], device=model.device).repeat_interleave(cfg.chains, dim=0)
    return Rollout(prompt_ids=left.clamp(min=0), prompt_mask=left >= 0, texts=texts, **r)

# ------------------------------------------------------------------------------------------------ 5. log-probabilities
# The same numbers as while sampling, from one pass over whole rows and with gradient. What would cost memory is the
# logits, (B, T, V) in float32: they exist a few positions at a time, and again in the backward pass.

def completion_hidden(model, r, cfg, **kwargs):
    """The model's output and the hidden states (B, T, d) that predicted each completion step. Rows are shifted left, so
    that padding comes last and plain causal attention is right without a mask."""
    table, (B, P), T = model.get_input_embeddings().weight, r.prompt_ids.shape, r.mask.shape[1]
    embeds = torch.cat([F.embedding(r.prompt_ids, table),
                        mixture_embedding(table, r.tokens, r.log_weights, cfg.aggregation)], dim=1)  # (B, P + T, d)
    length, slots = r.prompt_mask.sum(1, keepdim=True), torch.arange(P + T, device=table.device)  # (B, 1), (P + T,)
    embeds = embeds.gather(1, (slots + P - length).clamp(max=P + T - 1)[..., None].expand_as(embeds))
    out = model.base_model(inputs_embeds=embeds, position_ids=slots.expand(B, -1), use_cache=False, **kwargs)
    at = (slots[:T] + length - 1)[..., None].expand(-1, -1, embeds.shape[2])  # (B, T, d)
    return out, [h.gather(1, at) for h in (out.hidden_states or [out.last_hidden_state])]

def score_chunk(head, hidden, tokens, log_weights, representative, cfg):
    """Log-probs (N,) of N steps from the hidden states (N, d) that predicted them."""
    return mixture_logprob(head(hidden), tokens, log_weights, representative, cfg)

def rollout_logprobs(model, rollout, cfg, micro_batch=None):
    """Log-probs (B, T) of every sampled step under `model`, recomputed in parallel with gradient; 0 elsewhere."""
    if micro_batch:
        rows = torch.arange(len(rollout.mask), device=rollout.mask.device).split(micro_batch)
        parts = [rollout_logprobs(model, rollout.select(i), cfg) for i in rows]
        return torch.cat([F.pad(p, (0, rollout.mask.shape[1] - p.shape[1])) for p in parts])
    steps, head = rollout.sampled, model.get_output_embeddings()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = completion_hidden(model, rollout, cfg)[1][-1][steps]  # (N, d)
        n = max(1, 2**24 // len(head.weight))  # steps a chunk: 64 MiB of float32 logits
        chunks = list(zip(*(x.split(n) for x in (
            hidden, rollout.tokens[steps], rollout.log_weights[steps], rollout.representative[steps]))))
        call = functools.partial(recompute, score_chunk, use_reentrant=False) if len(chunks) > 1 else score_chunk
        scores = torch.cat([call(head, *chunk, cfg) for chunk in chunks])  # (N,) float32
    return torch.zeros_like(rollout.logprob).masked_scatter(steps, scores)

# ------------------------------------------------------------------------------------------------ 6. GRPO

def group_advantages(rewards, scale=True):
    """(prompts, G) -> (r - mean) / (std + 1e-4) within each group; a group of equal rewards gets zeros."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-4) if scale else centred

def token_weights(mask, cfg, chains, tokens):
    """What each step's loss counts, (B, T), by the counts of the *whole* batch, `chains` and `tokens`: the gradient is
    the same however the batch is cut into micro-batches."""
    if cfg.loss_average == "chain":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / chains
    return mask / (max(tokens, 1) if cfg.loss_average == "token" else chains * cfg.max_new_tokens)

def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, cfg, weights=None):
    """PPO's clipped objective with group advantages A (B,), plus kl_beta times the k3 estimate of KL(policy || reference)
    (Schulman 2020); log-probs and mask (B, T). Returns the loss and its parts, each weighed by `weights` (B, T).

        ratio = pi / pi_old       k3 = pi_ref / pi - log(pi_ref / pi) - 1  >= 0, unbiased
        loss  = -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A) + kl_beta k3

    With one update a batch the ratio is 1 and the clip idles: the first term's gradient is REINFORCE's."""
    weights = token_weights(mask, cfg, len(mask), int(mask.sum())) if weights is None else weights
    ratio, A = (logprob - old_logprob).exp(), advantages[:, None]  # (B, T), (B, 1)
    free, clipped = ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip_high) * A
    log_r = torch.zeros_like(logprob) if ref_logprob is None else ref_logprob - logprob
    k3 = log_r.exp() - log_r - 1
    total = lambda x: (x.masked_fill(~mask.bool(), 0.0) * weights).sum()
    loss = total(cfg.kl_beta * k3 - torch.min(free, clipped))
    return loss, dict(loss=loss.item(), kl=total(k3).item(), clipped=total((free > clipped).float()).item())

# ------------------------------------------------------------------------------------------------ 7. tasks and rewards
# Reasoning-Gym seeds item i with seed + i: neighbouring seeds share 999 of 1,000 items, and a split by seed leaks. Here
# the question itself decides: by its hash, one in ten is a test question, whichever seed drew it.

PAPER_TASKS = ("acre", "graph_color", "family_relationships", "color_cube_rotation", "zebra_puzzles", "number_sequence",
               "countdown", "prime_factorization", "circuit_logic", "syllogism", "self_reference", "simple_integration")
PAPER_SIZES = {"family_relationships": dict(min_family_size=8, max_family_size=12)}
CHUNK = 500  # items a dataset object; one number, since acre's items change with it
SYSTEM = ("Solve the user's problem. First think inside <think> and </think>, then give the final answer alone inside "
          "<answer> and </answer>.")
FORMAT = re.compile(r"(?:(?!</think>|<answer>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)

def task_names(cfg):
    """The tasks of `cfg.task`. Raises UserError for one that Reasoning-Gym lacks."""
    from reasoning_gym.factory import DATASETS
    names = PAPER_TASKS if cfg.task == "all" else tuple(n.strip() for n in cfg.task.split(","))
    for name in names:
        if name not in DATASETS:
            raise UserError(f"unknown task {name!r}; {closest(name, sorted(DATASETS))}")
    return names

@functools.lru_cache(maxsize=64)
def dataset(task, settings, seed):
    """CHUNK items of a task; `settings` is JSON. Raises UserError for settings that the task lacks."""
    import reasoning_gym
    try:
        return reasoning_gym.create_dataset(task, size=CHUNK, seed=seed, **PAPER_SIZES.get(task, {}) | json.loads(settings))
    except (TypeError, AssertionError, ValueError) as e:
        raise UserError(f"task_config = {settings} does not fit {task}: {e}") from None

def problems(task, cfg, tokenizer, stream, numbers, test, counts):
    """Of a stream's items with these numbers, those of the split asked for that are short enough, as (task, entry,
    prompt). Stream 0 holds the test problems; training's, stream 1 + seed, is at least 10^9 item seeds away from it."""
    base = 10**9 + stream * 10_000_019 % (3 * 10**9) if stream else 0
    for i in numbers:
        random.seed(base + i)  # list_functions draws from the global generator
        entry = dataset(task, cfg.task_config, base + i // CHUNK * CHUNK)[i % CHUNK]
        if (int(hashlib.sha256(entry["question"].encode()).hexdigest(), 16) % 10 == 0) == test:
            prompt = tokenizer.apply_chat_template(
                [dict(role="system", content=SYSTEM), dict(role="user", content=entry["question"])], tokenize=False,
                add_generation_prompt=True)
            prompt += "" if prompt.rstrip().endswith("<think>") else "<think>\n"
            if len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) <= cfg.max_prompt_tokens:
                yield task, entry, prompt
            else:
                counts["too_long"] += 1

def train_problem(cfg, tokenizer, n, counts):
    """Problem n of a run, from 50 item numbers of its own: a function of (seed, n), so nothing is to be remembered."""
    names = task_names(cfg)
    found = problems(names[n % len(names)], cfg, tokenizer, 1 + cfg.seed, range(50 * n, 50 * n + 50), False, counts)
    for problem in found:
        return problem
    raise UserError(f"{names[n % len(names)]}: 50 prompts in a row exceed max_prompt_tokens = {cfg.max_prompt_tokens}")

@functools.lru_cache(maxsize=16)
def _test_problems(task, settings, tokenizer, longest, count):
    cfg, found, counts = Config(task_config=settings, max_prompt_tokens=longest), {}, collections.Counter()
    for problem in problems(task, cfg, tokenizer, 0, range(60 * count), True, counts):
        found.setdefault(problem[1]["question"], problem)
        if len(found) == count:
            break
    if not found:
        raise UserError(f"{task}: no test prompt has at most max_prompt_tokens = {longest} tokens")
    return list(found.values())

def test_problems(task, cfg, tokenizer):
    """Up to `eval_problems` distinct test problems; tasks with few problems have fewer."""
    return _test_problems(task, cfg.task_config, tokenizer, cfg.max_prompt_tokens, cfg.eval_problems)

def extract_answer(text):
    """The last `<answer>...</answer>` after the thought, ends stripped, inner newlines kept.

        '1 + 1</think> <answer> 2 </answer>' -> '2'        '<answer>2' -> None"""
    text = text.rpartition(TAG)[2]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None

def rewards(problem, text, cfg):
    """The reward and its parts. Partial scores count in it; `correct` is a score of exactly 1."""
    points, words = score(problem[0], extract_answer(text), problem[1]), len(text.split())
    well_formed = float(FORMAT.fullmatch(text) is not None)
    reward = cfg.score_weight * points + cfg.format_weight * well_formed + cfg.length_weight * (200 <= words <= 400)
    return dict(reward=reward, score=points, format=well_formed, correct=float(points == 1.0))

# ------------------------------------------------------------------------------------------------ 8. contained scoring

score_counts = collections.Counter()
@functools.lru_cache(None)
def _ds(t):
    import reasoning_gym
    return reasoning_gym.create_dataset(t, size=1, seed=0)
def score(task, answer, entry):
    try: return float(_ds(task).score_answer(answer, entry)) if answer is not None else 0.0
    except Exception: return 0.0

# ------------------------------------------------------------------------------------------------ 9. models

def device():
    """The one GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

def load_model(cfg):
    """Policy, fp32 on the device, and tokenizer. Raises UserError for what cannot be loaded or trained here."""
    name, need = cfg.model or str(smoke_model(cfg)), cfg.max_prompt_tokens + cfg.max_new_tokens
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except Exception as e:
        raise UserError(f"model {name!r} cannot be loaded; allowed is a hub name, or a folder with config.json, "
                        f"model.safetensors and a tokenizer ({str(e).strip().splitlines()[0][:150]})") from None
    model = model.to(device()).eval()
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name!r} has no chat template; an instruction-tuned model is needed")
    check_k(cfg, len(model.get_input_embeddings().weight))
    if getattr(model.config, "max_position_embeddings", need) < need:
        raise UserError(f"{name!r} has {model.config.max_position_embeddings} positions: allowed is that many for "
                        f"max_prompt_tokens + max_new_tokens, which are {need}")
    ids = [i % len(model.get_input_embeddings().weight) for i in range(7, 17)]
    with torch.no_grad():  # is it what section 4 takes it for, head(base(embedding)) under plain causal attention?
        want = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        model.set_attn_implementation("motg")
        d = Decoder(model, tokenizer, cfg, 1, 10, None)
        d.start([ids])
    if (set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
            or not torch.allclose(want, d.logits[0], atol=1e-3, rtol=1e-3)):
        raise UserError(f"{name!r} ({model.config.model_type}): allowed are causal models with full attention and an "
                        "unscaled output head, such as Qwen2 and Llama")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the ratio needs the policy that sampled
    if cfg.checkpoint_activations:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer

def working_copy(model):
    """What samples: on CUDA a bf16 copy of the fp32 master weights (buffers like the rotary frequencies stay fp32)."""
    if model.device.type == "cpu":
        return model
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    for p in twin.parameters():
        p.data = p.data.bfloat16()
    return twin

@torch.no_grad()
def refresh(twin, model):
    """The master weights into the working copy, in place: recorded graphs go on reading the same memory."""
    if twin is not model:
        for new, old in zip(model.parameters(), twin.parameters()):
            old.copy_(new)

# The smoke world: sums of one-digit terms, and demonstrations in three habits: a third works the sum out, a third forgets
# the last term, a third guesses. Imitation learns all three; which one is right, only the reward tells. Nothing is
# downloaded, and the base is cached on disk, so that all methods and seeds start from the same one.

WARM = dict(steps=400, batch=64, lr=2e-3, layers=3, width=128)

def demonstration(entry, rng):
    """Thought and answer for a chain_sum entry, in a habit that `rng` draws."""
    terms, habit = entry["metadata"]["expression"].split(), rng.choice(["work", "forget", "guess"])
    total, thought = int(terms[0]), []
    pairs = list(zip(terms[1::2], terms[2::2]))
    for op, term in pairs[:-1] if habit == "forget" else pairs:
        new = total + int(op + term)
        thought.append(f"{total} {op} {term} = {new}")
        total = new
    if habit == "guess":
        thought, total = ["easy"], rng.randrange(-9, 28)
    return f"{', '.join(thought)}{TAG} <answer>{total}</answer><|im_end|>"

def smoke_tokenizer():
    """Byte-level, with the numbers and phrases of this world as tokens of their own, and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens([SYSTEM, "system\n", "user\n", "assistant\n<think>\n", "easy", TAG, " <answer>", "</answer>", " + ", " - ",
                    " = ", ", ", " =", "State the final answer to the following arithmetic problem: ",
                    *map(str, range(100))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"))

def smoke_model(cfg):
    """The folder with the warm-started smoke model: made once, in about a minute, and cached."""
    if cfg.task != "chain_sum":
        raise UserError(f"--smoke: task {cfg.task!r} needs a --model; allowed without one is 'chain_sum'")
    recipe = (WARM, SYSTEM, cfg.task_config, *map(inspect.getsource, (demonstration, smoke_tokenizer, warm_start)))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motg"
    folder = home / ("smoke-" + hashlib.sha256(repr(recipe).encode()).hexdigest()[:12])
    if not folder.exists():
        tokenizer = smoke_tokenizer()
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=WARM["width"], intermediate_size=4 * WARM["width"],
            num_hidden_layers=WARM["layers"], num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        warm_start(model, tokenizer, cfg)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(partial), tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder

def warm_start(model, tokenizer, cfg):
    """Supervised training on demonstrations; the loss counts their completions alone."""
    rng, base = random.Random(0), 10**6  # a stream of problems that no training seed uses
    stream = problems("chain_sum", cfg, tokenizer, base, itertools.count(), False, collections.Counter())
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM["lr"], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = lambda step: min(1.0, (step + 1) / 40) * max(0.05, 1 - step / WARM["steps"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in tqdm(range(WARM["steps"]), desc="warm start", leave=False, disable=None):
        pairs = [(prompt, demonstration(entry, rng)) for _, entry, prompt in itertools.islice(stream, WARM["batch"])]
        pairs = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in pairs]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        ids = pad([torch.tensor(p + c) for p, c in pairs])  # (B, S), padding last, where causal attention never looks
        labels = pad([torch.tensor([-100] * len(p) + c) for p, c in pairs], padding_value=-100)
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()

# ------------------------------------------------------------------------------------------------ 10. probes

def step_probes(r):
    """Of a rollout's thinking steps, means: entropy of p, entropy (both nats) and Gini-Simpson 1 - sum w^2 of the weights,
    distinct tokens considered a chain; and lengths, the share cut off, the share with the tag."""
    w, n = r.log_weights.exp(), r.thinking.sum().clamp(min=1)  # (B, T, k), ()
    mean = lambda x: ((x * r.thinking).sum() / n).item()
    seen = (r.tokens + 1) * (r.thinking[..., None] & (w > 0))  # (B, T, k) ids from 1; 0: nothing considered
    ordered = F.pad(seen.flatten(1).sort(dim=1).values, (1, 0))  # (B, 1 + T k)
    return dict(entropy=mean(r.entropy), weight_entropy=mean(torch.special.entr(w).sum(-1)),
                gini_simpson=mean(1 - w.square().sum(-1)),
                distinct_tokens=ordered.diff(dim=1).ne(0).sum(1).float().mean().item(),
                think_tokens=r.thinking.sum(1).float().mean().item(),
                answer_tokens=(r.mask & ~r.thinking).sum(1).float().mean().item(),
                truncated=(~r.eos.any(1)).float().mean().item(), tagged=sum(TAG in t for t in r.texts) / len(r.texts))

def hidden_state_entropy(hidden):
    """Matrix-based (von Neumann) entropy of hidden states (..., T, d), in [0, 1] (Giraldo et al. 2014; Skean et al. 2025):
    -sum lambda log lambda over the eigenvalues of K = H H^T / T, the rows of H normalised so that K has trace 1, over
    log min(T, d). A float; a tensor (...) where there are leading dimensions. One state has entropy 0."""
    H = F.normalize(hidden.double(), dim=-1)
    T, d = H.shape[-2:]
    gram = H @ H.mT if T <= d else H.mT @ H  # of both, the non-zero eigenvalues are the same
    entropy = torch.special.entr(torch.linalg.eigvalsh(gram / T).clamp(min=0)).sum(-1) / math.log(max(min(T, d), 2))
    return entropy if entropy.dim() else entropy.item()

@torch.no_grad()
def hidden_probes(model, r, cfg, window=8):
    """Hidden-state entropy of the thoughts: a mean a layer (embeddings first), and a curve over the thinking steps, at
    step t that of the last layer over the `window` steps up to t."""
    layers, curve = [], collections.defaultdict(list)
    for row in torch.arange(len(r.mask), device=r.mask.device)[r.thinking.sum(1) > 1]:
        one = r.select(row[None])
        states = torch.cat(completion_hidden(model, one, cfg, output_hidden_states=True)[1])  # (layers + 1, T, d)
        states = states[:, one.thinking[0]]  # (layers + 1, n, d)
        layers.append(hidden_state_entropy(states))
        if states.shape[1] >= window:
            for t, value in enumerate(hidden_state_entropy(states[-1].unfold(0, window, 1).mT).tolist(), window):
                curve[t].append(value)
    return dict(hidden_entropy=torch.stack(layers).mean(0).tolist() if layers else [],
                hidden_entropy_curve={t: sum(v) / len(v) for t, v in sorted(curve.items())})

# ------------------------------------------------------------------------------------------------ 11. a run's folder

def open_run(out, resume):
    """Make and lock a run's folder; returns the lock, which dies with the process. Raises UserError when the folder holds
    another run, or another process works in it."""
    exists = (out / "config.json").exists()
    if exists != resume:
        raise UserError(f"{out} holds a run; allowed: --resume to continue it, or another --out" if exists else
                        f"--resume: no run in {out}; allowed is an --out that has a config.json")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process works in {out}; allowed: wait for it, or another --out") from None
    return lock

def write_whole(path, text):
    """Beside, to the disk, swapped in: a crash leaves the old text or the new one."""
    partial = path.with_name(path.name + ".new")
    with open(partial, "w") as f:
        f.write(text), f.flush(), os.fsync(f.fileno())
    partial.rename(path)

def save_checkpoint(out, model, tokenizer, state):
    """A Hugging Face folder with trainer.pt in it, written beside the old checkpoint and swapped in whole."""
    new, now, old = (out / f"checkpoint{end}" for end in (".new", "", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new), tokenizer.save_pretrained(new)
        digest = hashlib.sha256((new / "model.safetensors").read_bytes()).hexdigest()
        torch.save(state | dict(digest=digest), new / "trainer.pt")
        for path in [*new.iterdir(), new]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd), os.close(fd)
    except Exception as e:
        shutil.rmtree(new, ignore_errors=True)
        raise RunError(f"no checkpoint could be written in {out} ({e}); the one before is intact, --resume continues "
                       "from it") from None
    shutil.rmtree(old, ignore_errors=True)
    if now.exists():
        now.rename(old)
    new.rename(now)
    shutil.rmtree(old, ignore_errors=True)

def load_checkpoint(out, model, optimizer):
    """Restore model and optimiser; returns the rest of what was saved, or {} where nothing was. Raises UserError naming a
    checkpoint that is damaged or another model's, before anything is restored."""
    new, now, old = (out / f"checkpoint{end}" for end in (".new", "", ".old"))
    if old.exists() and not now.exists():
        new.rename(now)  # killed between the two renames of a save: the new one was complete
    if not now.exists():
        return {}
    try:
        state = torch.load(now / "trainer.pt", weights_only=True, map_location="cpu")
        if hashlib.sha256((now / "model.safetensors").read_bytes()).hexdigest() != state["digest"]:
            raise ValueError("model.safetensors is not the file that was saved")
        saved = transformers.AutoModelForCausalLM.from_pretrained(now, dtype=torch.float32, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(state["optimizer"])
    except Exception as e:
        raise UserError(f"{now} is damaged or another model's: {str(e).strip().splitlines()[0][:150]}") from None
    return state

# ------------------------------------------------------------------------------------------------ 12. training

def play(model, tokenizer, cfg, part, generator):
    """Roll out the problems in `part` and reward every chain: the Rollout, and a dict of reward parts a row."""
    r = rollout(model, tokenizer, [prompt for _, _, prompt in part], cfg, generator)
    return r, [rewards(part[row // cfg.chains], text, cfg) for row, text in enumerate(r.texts)]

def readable(r, row, tokenizer):
    """A trajectory as text, mixtures as `the{0.62}|a{0.38}`."""
    pieces = []
    for ids, weights in zip(r.tokens[row][r.mask[row]].tolist(), r.log_weights[row][r.mask[row]].exp().tolist()):
        mixed = sorted(((w, tokenizer.decode([i])) for i, w in zip(ids, weights) if w >= 0.005), reverse=True)
        pieces.append(mixed[0][1] if len(mixed) == 1 else "|".join(f"{text}{{{w:.2f}}}" for w, text in mixed))
    return "".join(pieces)

def collect(sampler, tokenizer, cfg, step, generator):
    """A step's experience: the Rollout, its advantages (B,), and what to log."""
    counts = collections.Counter(too_long=0)
    part = [train_problem(cfg, tokenizer, step * cfg.prompts_per_step + j, counts) for j in range(cfg.prompts_per_step)]
    generator.manual_seed(cfg.seed * 1_000_003 + step + 1)  # the step number is all the random state there is
    score_counts.clear()
    r, parts = play(sampler, tokenizer, cfg, part, generator)
    reward = torch.tensor([p["reward"] for p in parts], device=r.mask.device).view(-1, cfg.chains)  # (prompts, G)
    log = {n: sum(p[n] for p in parts) / len(parts) for n in parts[0]} | step_probes(r) | counts
    log |= {f"scorer_{n}": score_counts[n] for n in ("timeout", "rejected", "raised")}
    log["no_gradient"] = (reward == reward[:, :1]).all(1).float().mean().item()  # groups of equal rewards teach nothing
    return r, group_advantages(reward, cfg.scale_advantages).flatten(), log

def micro_batches(r, cfg):
    """Rows of similar length together, at most `micro_tokens` padded tokens each (or one row)."""
    length, batch = r.prompt_mask.sum(1) + r.mask.sum(1), []  # (B,)
    for row in length.argsort().tolist():
        if batch and (len(batch) + 1) * int(length[row]) > cfg.micro_tokens:
            yield torch.tensor(batch, device=length.device)
            batch = []
        batch.append(row)
    yield torch.tensor(batch, device=length.device)

def update(policy, reference, optimizer, batch, cfg, number):
    """Optimiser update `number` on a batch of (Rollout, advantages); a non-finite loss or gradient skips it."""
    chains, tokens = sum(len(r.mask) for r, _ in batch), sum(int(r.sampled.sum()) for r, _ in batch)
    log = collections.Counter(loss=0, kl=0, clipped=0)
    for r, advantages in batch:
        for rows in micro_batches(r, cfg):
            part = r.select(rows)
            with torch.no_grad():
                ref = rollout_logprobs(reference, part, cfg) if reference is not None else None
            loss, stats = grpo_loss(rollout_logprobs(policy, part, cfg), part.logprob, ref, advantages[rows], part.sampled,
                                    cfg, token_weights(part.sampled, cfg, chains, tokens))
            loss.backward()
            log.update(stats)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip).item()
    warm = cfg.warmup * cfg.steps / cfg.accumulate
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * min(1.0, (number + 1) / max(warm, 1))
    skipped = not (math.isfinite(norm) and math.isfinite(log["loss"]))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return dict(log) | dict(grad_norm=norm, lr=optimizer.param_groups[0]["lr"], skipped=int(skipped))

def train(cfg) -> int:
    """The whole method: roll out, reward, compare within groups, update. Returns the exit status."""
    if device().type == "cpu" and not cfg.smoke:
        raise UserError("no CUDA GPU; allowed on a CPU is --smoke, a small model with small settings")
    if cfg.chains < 2:
        raise UserError(f"chains = {cfg.chains}: GRPO compares a prompt's chains; allowed is 2 or more")
    task_names(cfg)
    out, began, stop = run_folder(cfg), time.time(), []
    lock = open_run(out, cfg.resume)
    policy, tokenizer = load_model(cfg)
    reference = working_copy(copy.deepcopy(policy).requires_grad_(False)) if cfg.kl_beta else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay,
                                  fused=True)
    state = load_checkpoint(out, policy, optimizer) if cfg.resume else {}
    write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg) | dict(resume=False), indent=1))
    sampler, generator = working_copy(policy), torch.Generator(policy.device)
    test = lambda: evaluate(sampler, tokenizer, cfg, generator)["pass@1"]
    before, first, bad = state.get("before") or test(), state.get("step", 0), 0
    seconds = lambda: state.get("seconds", 0.0) + time.time() - began
    if (out / "metrics.jsonl").exists():  # each step once: what came after the checkpoint is done again
        write_whole(out / "metrics.jsonl", "".join((out / "metrics.jsonl").open().readlines()[:first]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    batch, bar = [], tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=cfg.method, disable=None)
    for step in bar:
        r, advantages, log = collect(sampler, tokenizer, cfg, step, generator)
        batch.append((r, advantages))
        if updated := len(batch) == cfg.accumulate or step + 1 == cfg.steps:
            log |= update(policy, reference, optimizer, batch, cfg, step // cfg.accumulate)
            refresh(sampler, policy)
            batch, bad = [], (bad + 1) * log["skipped"]
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            log["test_accuracy"] = test()
        with open(out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(dict(step=step) | log) + "\n")
        bar.set_postfix_str("reward {reward:.2f} right {correct:.2f} H {entropy:.2f} length {think_tokens:.0f} kl {kl:.3f} "
                            "flat {no_gradient:.2f}".format(**dict(kl=0) | log))
        if step % cfg.save_every == 0:
            with open(out / "samples.txt", "a") as f:
                f.write("".join(f"--- step {step}\n{readable(r, row, tokenizer)}\n" for row in range(min(4, len(r.mask)))))
            bar.write(f"step {step}: {readable(r, 0, tokenizer)}")
        if updated and (stop or bad == 3 or step + 1 == cfg.steps or (step + 1) % cfg.save_every < cfg.accumulate):
            save_checkpoint(out, policy, tokenizer, dict(step=step + 1, before=before, seconds=seconds(),
                                                         optimizer=optimizer.state_dict()))
            if bad == 3:
                raise RunError(f"loss or gradient was not finite three times in a row; saved in {out}. Likely cause: lr = "
                               f"{cfg.lr} is too high for this model, or its weights hold a nan")
            if stop:
                print(f"stopped by signal {stop[0]} after step {step + 1}; --resume --out {out} continues", file=sys.stderr)
                return 128 + stop[0]
    after = test()
    write_whole(out / "result.json", json.dumps(dict(task=cfg.task, method=cfg.method, seed=cfg.seed, accuracy_before=before,
                accuracy_after=after, seconds=seconds(), steps=cfg.steps), indent=1))
    print(f"{cfg.task}, {cfg.method}, seed {cfg.seed}: accuracy {before:.3f} -> {after:.3f} in {seconds():.0f} s, see {out}")
    return 0

# ------------------------------------------------------------------------------------------------ 13. evaluation

def pass_at_k(n, c, k):
    """Chance that at least one of k chains is right when c of n were, without bias (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def evaluate(model, tokenizer, cfg, generator, probes=False):
    """Sampled accuracy on the test problems of `cfg.task`: pass@k, the standard error of pass@1 over problems, with
    `probes` also section 10's. The last checkpoint is what counts, not the best one on the test set."""
    generator.manual_seed(cfg.seed)
    test = [p for task in task_names(cfg) for p in test_problems(task, cfg, tokenizer)]
    n, right, seen, hidden = max(1, cfg.eval_rows // cfg.chains), [], collections.Counter(), {}
    for i in range(0, len(test), n):
        r, parts = play(model, tokenizer, cfg, test[i : i + n], generator)
        right += torch.tensor([p["correct"] for p in parts]).view(-1, cfg.chains).sum(1).int().tolist()
        if probes:
            seen.update({name: v * len(parts) / cfg.chains / len(test) for name, v in step_probes(r).items()})
            hidden = hidden or hidden_probes(model, r.select(torch.arange(min(32, len(parts)), device=model.device)), cfg)
    share = torch.tensor(right) / cfg.chains  # (problems,)
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k < cfg.chains} | {cfg.chains})
    result = {f"pass@{k}": sum(pass_at_k(cfg.chains, c, k) for c in right) / len(right) for k in ks}
    error = (share.std() / len(share) ** 0.5).item() if len(share) > 1 else float("nan")
    return result | dict(stderr=error, problems=len(test), chains=cfg.chains) | dict(seen) | hidden

def evaluation(configs) -> int:
    """`eval`: every task with every method on one model, a table and eval.json. Returns the exit status."""
    cfg = configs[0]
    pairs = [(task, c) for task in task_names(cfg) for c in configs]
    model, tokenizer = load_model(cfg)
    rows, sampler, generator = [], working_copy(model), torch.Generator(model.device)
    out = Path(cfg.out) if cfg.out else Path(cfg.model).parent if is_run(cfg.model) else Path("runs/eval-" + Path(
        cfg.model or "smoke").name)
    columns = ("pass@1", "stderr", f"pass@{cfg.chains}", "think_tokens", "answer_tokens", "truncated", "tagged", "entropy",
               "weight_entropy", "gini_simpson", "distinct_tokens")
    print(f"{'task':22} {'method':18}" + "".join(f"{c[:13]:>14}" for c in (*columns, "hidden_last")))
    for task, c in pairs:
        row = evaluate(sampler, tokenizer, replace(c, task=task), generator, probes=True)
        print(f"{task:22} {c.method:18}" + "".join(f"{row[name]:14.3f}" for name in columns)
              + "".join(f"{h:14.3f}" for h in row["hidden_entropy"][-1:]), flush=True)
        rows.append(dict(task=task, method=c.method, model=c.model or "smoke", seed=c.seed, temperature=c.temperature) | row)
    out.mkdir(parents=True, exist_ok=True)
    old = json.loads((out / "eval.json").read_text()) if (out / "eval.json").exists() else []
    write_whole(out / "eval.json", json.dumps(old + rows, indent=1))  # earlier evaluations stay
    print(f"written to {out / 'eval.json'}")
    return 0

def is_run(model):
    """Is this model the checkpoint of a run of ours?"""
    return bool(model) and Path(model).name == "checkpoint" and (Path(model).parent / "config.json").exists()

def run_folder(cfg):
    return Path(cfg.out or f"runs/{cfg.task.replace(',', '+')}-{cfg.method}-{cfg.seed}")

class Parser(argparse.ArgumentParser):
    """argparse with its errors in one line."""
    def error(self, message):
        raise UserError(message)

def parse(argv):
    """The command and the settings given, as typed."""
    parser = Parser(prog="motg.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | eval", parser_class=Parser)
    for name, help in dict(train="train a model by GRPO", eval="evaluate a model").items():
        groups, command = {}, commands.add_parser(name, help=help, allow_abbrev=False)
        for f in fields(Config):
            group = groups.setdefault(f.metadata["group"], None) or command.add_argument_group(f.metadata["group"])
            groups[f.metadata["group"]] = group
            flags = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name] + ["--tasks"] * (f.name == "task"))
            kind = dict(action=argparse.BooleanOptionalAction) if f.type == "bool" else dict(
                type={"int": int, "float": float}.get(f.type, str), metavar=f.type.upper(), choices=f.metadata["choices"])
            group.add_argument(*flags, dest=f.name, default=argparse.SUPPRESS,
                               help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; {closest(unknown[0], ['--' + f.name for f in fields(Config)])}")
    return vars(given).pop("command"), vars(given)

FREE = ("steps", "eval_every", "eval_problems", "eval_rows", "save_every", "micro_tokens", "checkpoint_activations", "out",
        "resume")  # what may change when a run is resumed

def main(argv=None) -> int:
    """The command line; returns the exit status."""
    try:
        command, given = parse(sys.argv[1:] if argv is None else argv)
        methods = given.pop("method", None)
        if command == "train" and given.get("resume"):
            out = run_folder(make_config(methods or "dirichlet", **given))
            saved = read_config(out)
            for name, value in dict(given, **(dict(method=methods) if methods else {})).items():
                if name not in FREE and saved.get(name) != value:
                    raise UserError(f"--resume: the run in {out} has {name} = {saved.get(name)!r}, not {value!r}")
            return train(check_config(Config(**{**saved, **given, "out": str(out)})))
        if command == "train":
            return train(make_config(methods or "dirichlet", **given))
        if is_run(given.get("model")):  # a run's checkpoint is evaluated on its own task and lengths
            saved = read_config(Path(given["model"]).parent)
            given = {n: saved[n] for n in ("task", "task_config", "temperature", "max_prompt_tokens", "max_new_tokens",
                     "chains", "eval_problems", "seed", "smoke") if n in saved} | given
            methods = methods or saved["method"]
        return evaluation([make_config(m.strip(), **given) for m in (methods or "dirichlet").split(",")])
    except UserError as e:
        print(f"motg: {e}", file=sys.stderr)
        return e.status
    except torch.cuda.OutOfMemoryError:
        print("motg: out of GPU memory; lower --micro-tokens, --chains or --max-new-tokens, or set --checkpoint-activations",
              file=sys.stderr)
        return 1
    except OSError as e:
        print(f"motg: {e}; what was saved before is intact, --resume continues from it", file=sys.stderr)
        return 1

def read_config(out):
    """The settings a run was started with. Raises UserError for a folder without them."""
    try:
        saved = json.loads((out / "config.json").read_text())
        return {f.name: saved[f.name] for f in fields(Config)}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"no run in {out}: its config.json is missing or damaged; allowed is the --out of a run") from None

if __name__ == "__main__":
    sys.exit(main())
