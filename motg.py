"""motg: *Learning to Reason with Mixture of Tokens* (MoT-G, arXiv 2509.21482) in one file.

A language model that reasons writes one sampled token a step and throws the rest of its
distribution away. MoT-G feeds back a weighted mixture of k token embeddings at each thinking step,
closes the thought with `</think>`, answers in ordinary tokens, and is trained by GRPO with rewards
that a program can verify:

    z --softmax(z/T)--> p --k candidates v--> weights w --sum_i w_i E[v_i]--> next input  (thought)
                         `--one token y, a one-hot w-------------------------> next input  (answer)

Read top to bottom: settings, mixtures, the score of a step, the end of a thought, rollouts,
log-probabilities, GRPO, tasks, contained scoring, models, probes, training, evaluation, command
line. Letters in shape comments: B rows (a row is one chain of one prompt), G chains a prompt, P
prompt length, T new tokens, k candidates, V vocabulary, d width, N steps picked out of B x T.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path

import reasoning_gym
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

transformers.utils.logging.disable_progress_bar()
INF, TAG = math.inf, "</think>"

# ---------------------------------------------------------------------------------- 1. settings
# One flat dataclass. Every field is a command-line flag; "paper" is the paper's own value.
ENDS = ("representative", "most-likely", "entropy", "steps")
LOGPROBS = ("representative", "weighted", "exact")
MEANS = ("chain", "token", "constant")


def setting(default, help, *choices):
    """A field of Config."""
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass
class Config:
    """Every setting. The defaults are the paper's recipe, where the text says nothing else."""

    # the run
    model: str = setting("Qwen/Qwen2.5-1.5B-Instruct", "Hugging Face name or local folder")
    task: str = setting("graph_color", "Reasoning-Gym task, several with commas, or 'all'")
    task_settings: str = setting("", 'the task\'s own settings as JSON, such as {"max_value": 20}')
    shots: str = setting("", "JSON file of [question, reply] pairs, shown before the question")
    method: str = setting("dirichlet", "a preset of METHODS; eval takes several with commas")
    seed: int = setting(0, "of the problems and the sampling")
    out: str = setting("", "the run's folder (runs/<task>-<method>-<seed> if empty)")
    resume: bool = setting(False, "continue the run in --out")
    smoke: bool = setting(False, "a tiny model made on the spot, small settings; your flags win")
    device: str = setting("auto", "auto: CUDA if there is one", "auto", "cuda", "cpu")
    precision: str = setting("auto", "auto: bf16 where that is fast", "auto", "fp32", "bf16")
    # the mixture
    sampling: str = setting("top-k", "which candidates")
    aggregation: str = setting("dirichlet", "their weights")
    k: int = setting(2, "candidates a step (paper: 2)")
    temperature: float = setting(0.9, "T in p = softmax(z / T) (paper: 0.9)")
    top_p: float = setting(0.95, "nucleus: the mass that the candidates reach")
    min_p: float = setting(0.05, "min-p: share of the largest p that is needed")
    concentration: float = setting(1.0, "dirichlet: c in w ~ Dir(c p^) (paper: 1)")
    moi_beta: float = setting(1.0, "posterior: beta of Mixture of Inputs")
    gumbel_tau: float = setting(1.0, "gumbel: tau of the softmax")
    mix_steps: int = setting(0, "mix in the first n steps of a thought only; 0: in all")
    mix_entropy: float = setting(0.0, "mix only where H(p) reaches this, in nats")
    end: str = setting("representative", "what ends a thought", *ENDS)
    end_entropy: float = setting(0.1, "end=entropy: H(p) below this, in nats, ...")
    end_patience: int = setting(256, "... for so many steps (Soft Thinking: 256)")
    end_steps: int = setting(128, "end=steps: steps before the tag is forced")
    logprob: str = setting("representative", "what of a step GRPO scores", *LOGPROBS)
    weight_passes: int = setting(0, "passes that carry the gradient through weights made of p")
    # GRPO
    chains: int = setting(10, "G, chains a prompt (paper: 10; 5 in its half-size runs)")
    prompts_per_step: int = setting(1, "prompts a step (paper: 1)")
    accumulate: int = setting(4, "steps an optimiser update (paper: 4)")
    steps: int = setting(1000, "steps, each one rollout (paper: 1000)")
    max_prompt_tokens: int = setting(1024, "longer prompts are skipped (paper: 1024)")
    max_new_tokens: int = setting(1024, "thought and answer together (paper: 1024)")
    lr: float = setting(5e-6, "AdamW's rate (paper: 5e-6, but on bf16 weights; here fp32)")
    warmup: float = setting(0.18, "share of updates that warm up (paper: 0.18)")
    grad_clip: float = setting(0.1, "largest gradient norm (paper: 0.1)")
    kl_beta: float = setting(0.1, "weight of the KL to the reference (paper: 0.1)")
    clip: float = setting(0.2, "PPO's clip of the ratio (paper: 0.2)")
    loss_average: str = setting("chain", "chain: paper; token: DAPO; constant: Dr. GRPO", *MEANS)
    micro_tokens: int = setting(4096, "tokens a micro-batch; lower it to save memory")
    # evaluation
    eval_problems: int = setting(100, "distinct test problems a task (paper: 100)")
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after")
    save_every: int = setting(100, "steps between checkpoints; the last step has one")


# A method is a set of settings, where they differ from Config's defaults.
DRAWN_TOKENS = {"sampling": "without-replacement", "aggregation": "probability"}
GUMBEL = {"sampling": "top-k", "aggregation": "gumbel"}
METHODS = {
    "single": DRAWN_TOKENS | {"k": 1},
    "dirichlet": {},
    "different-tokens": DRAWN_TOKENS | {"logprob": "weighted"},
    "soft-thinking": {"aggregation": "probability"},
    "mixture-of-inputs": {"aggregation": "posterior"},
    "multiplex": DRAWN_TOKENS | {"sampling": "with-replacement", "k": 3, "logprob": "exact"},
    "soft-grpo": GUMBEL | {"k": 5, "gumbel_tau": 0.1, "logprob": "exact"},
    "lepo": GUMBEL | {"k": 30, "gumbel_tau": 0.5, "mix_steps": 32, "logprob": "weighted"},
}
SMOKE = {"model": "", "task": "chain_sum", "max_prompt_tokens": 64, "max_new_tokens": 40}
SMOKE |= {"task_settings": '{"min_terms": 3, "max_terms": 4, "max_digits": 1}'}
SMOKE |= {"chains": 8, "prompts_per_step": 16, "accumulate": 1, "steps": 80, "save_every": 40}
SMOKE |= {"lr": 3e-5, "grad_clip": 1.0, "kl_beta": 0.01, "micro_tokens": 1024, "eval_problems": 256}
OR_ZERO = {"moi_beta", "end_entropy", "steps", "lr", "warmup", "kl_beta", "clip"}


class UserError(ValueError):
    """What the user got wrong, in one line; the program exits with status 2."""


def require(ok, message):
    """Raises UserError unless `ok`."""
    if not ok:
        raise UserError(message)


@contextmanager
def refusing(message):
    """Turns an exception inside into a UserError: `message`, and the first line of what it said."""
    try:
        yield
    except Exception as e:
        said = (str(e).strip() or repr(e)).splitlines()[0][:200]
        raise UserError(f"{message} ({said})") from e


def make_config(method="dirichlet", **overrides) -> Config:
    """Defaults, then --smoke's, then the method's, then `overrides`. Raises UserError."""
    require(method in METHODS, f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    unknown = overrides.keys() - Config.__annotations__.keys()
    require(not unknown, f"unknown settings: {', '.join(sorted(unknown))}")
    smoke = SMOKE if overrides.get("smoke") else {}
    cfg = Config(**smoke | METHODS[method] | overrides | {"method": method})
    for f in fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"] or RULES.get(f.name)
        if choices:
            require(value in choices, f"{f.name} = {value!r}; allowed: {', '.join(choices)}")
        elif f.type in (int, float):
            least = 0 if f.default == 0 or f.name in OR_ZERO else f.type(1e-6) or 1
            most = 1 if f.name in ("top_p", "min_p", "warmup", "clip") else 10**9
            require(least <= value <= most, f"{f.name} = {value}; allowed: {least} to {most}")
    for task in task_names(cfg):
        require(task in reasoning_gym.factory.DATASETS, f"Reasoning-Gym has no task {task!r}")
    require(cfg.seed < 10**6, f"seed = {cfg.seed}; allowed: less than 10^6")
    require(method != "single" or cfg.k == 1, f"k = {cfg.k}; allowed: 1, for the method single")
    return cfg


# ---------------------------------------------------------------------------------- 2. mixtures
# A thinking step is k candidates and k log-weights; a slot with log-weight -inf is empty. An
# ordinary token is a step with one filled slot, so answers, the single-token baseline and the end
# tag need no second code path. The representative is the candidate that a reader sees.
Mixture = namedtuple("Mixture", "tokens log_weights representative")  # (B, k), (B, k), (B,)


def token_distribution(logits, temperature):
    """log p = log softmax(z / T), float32. Sampler, scorer, reference and probes all call this."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def entropy_of(log_p):
    """H(p) in nats: (..., V) -> (...)."""
    return -(log_p.exp() * log_p.clamp(min=-99)).sum(-1)


def gumbel_noise(like, generator=None):
    """The Gumbel-max trick: argmax(log p + noise) is a draw from p."""
    return -torch.empty_like(like).exponential_(generator=generator).log()


def draw(log_p, generator=None):
    """One token a row from p, (B, V) -> (B,): inverse CDF, in float64: no tail is cut off."""
    cdf = log_p.exp().double().cumsum(-1)  # (B, V)
    u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device, generator=generator)  # (B, 1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)


def strike(log_p, token):
    """p without a token, renormalised in log space, since 1 - p(token) cancels where p is sharp."""
    return log_p.scatter(-1, token[..., None], -INF).log_softmax(-1)


# How candidates or weights are made: to try a new rule, add a row to SAMPLING or AGGREGATION.
# `make` makes them, `logprob` is the log-probability of what it drew, None where it draws nothing.
# Of drawn candidates the first is read; else that of the largest weight, or one drawn from Cat(w).
Rule = namedtuple("Rule", "make logprob reads_largest", defaults=(None, False))


def likely_candidates(log_p, cfg, generator=None):
    """The k most likely tokens (B, k) and their log p, -inf in slots that the rule leaves empty."""
    log_pv, tokens = log_p.topk(cfg.k)
    p = log_pv.exp()
    if cfg.sampling == "nucleus":  # a token stays while the mass *before* it is below top_p
        log_pv = log_pv.masked_fill(p.cumsum(-1) - p >= cfg.top_p, -INF)
    elif cfg.sampling == "min-p":
        log_pv = log_pv.masked_fill(p < cfg.min_p * p[:, :1], -INF)
    return tokens, log_pv


def drawn_candidates(log_p, cfg, generator=None):
    """k draws from p (B, V): independent ones, or each struck out before the next one."""
    drawn, rest = [draw(log_p, generator)], log_p
    while len(drawn) < cfg.k:
        if cfg.sampling == "without-replacement":  # the law of Gumbel top-k
            rest = strike(rest, drawn[-1])
        drawn.append(draw(rest, generator))
    tokens = torch.stack(drawn, dim=-1)
    return tokens, log_p.gather(-1, tokens)


def draws_logprob(log_p, tokens, filled, cfg):
    """sum_j log p(v_j); without replacement, - log(1 - sum_{i<j} p(v_i)) each (Plackett-Luce)."""
    score = 0.0
    for j in range(tokens.shape[-1]):
        if j > 0 and cfg.sampling == "without-replacement":
            rest = strike(log_p, tokens[..., j - 1])
            log_p = torch.where(filled[..., j - 1, None], rest, log_p)
        log_pv = log_p.gather(-1, tokens[..., j, None])[..., 0]  # (...)
        score = score + log_pv.masked_fill(~filled[..., j], 0.0)
    return score


SAMPLING = {
    "top-k": Rule(likely_candidates),
    "nucleus": Rule(likely_candidates),  # the smallest set whose mass reaches top_p, at most k
    "min-p": Rule(likely_candidates),  # p >= min_p max p, at most k
    "without-replacement": Rule(drawn_candidates, draws_logprob),
    "with-replacement": Rule(drawn_candidates, draws_logprob),
}


def dirichlet(log_hat, cfg, generator=None):
    """log w, w ~ Dir(c p^), but for a constant. c -> inf: w = p^; c -> 0: one token drawn from p^.

    A Dirichlet is normalised Gamma(a) draws. log Gamma(a) = log Gamma(a + 1) + log(U) / a stays in
    log space, where no a is too small; only float32 has an end, so p^ is kept above 1e-5.
    """
    a = cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (B, k)
    minus_log_u = torch.empty_like(a).exponential_(generator=generator)
    return torch._standard_gamma(a + 1, generator).log() - minus_log_u / a


def dirichlet_logdensity(log_hat, log_w, filled, cfg):
    """log Gamma(sum_i a_i) + sum_i (a_i - 1) log w_i - log Gamma(a_i), over the filled slots."""
    a = cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (..., k)
    terms = (a - 1) * log_w - a.lgamma()
    return (terms * filled).sum(-1) + (a * filled).sum(-1).lgamma()


def gumbel(log_hat, cfg, generator=None):
    """log w, w = softmax((log p^ + g) / tau), but for a constant (SofT-GRPO, LEPO)."""
    return (log_hat + gumbel_noise(log_hat, generator)) / cfg.gumbel_tau


def concrete_logdensity(log_hat, log_w, filled, cfg):
    """The density of such w, called Concrete (Maddison et al. 2017, eq. 10)."""
    n, x = filled.sum(-1), log_hat - cfg.gumbel_tau * log_w  # (...), (..., k)
    constant = n.float().lgamma() + (n - 1) * math.log(cfg.gumbel_tau)
    log_total = x.masked_fill(~filled, -INF).logsumexp(-1)
    return constant + ((x - log_w) * filled).sum(-1) - n * log_total


AGGREGATION = {
    "probability": Rule(lambda log_hat, cfg, generator=None: log_hat),  # w = p^
    "uniform": Rule(lambda log_hat, cfg, generator=None: torch.zeros_like(log_hat)),
    "max": Rule(lambda log_hat, cfg, generator=None: log_hat),  # to be read: see mixture_embedding
    "posterior": Rule(lambda log_hat, cfg, generator=None: log_hat),  # to be read: see `posterior`
    "dirichlet": Rule(dirichlet, dirichlet_logdensity),
    "gumbel": Rule(gumbel, concrete_logdensity, reads_largest=True),
}
RULES = {"sampling": SAMPLING, "aggregation": AGGREGATION}


def posterior(log_hat, log_p, read, cfg):
    """Mixture of Inputs: the token read is evidence, weighed against p^ by H(p) in [0, 1].

    w = (H p^ + (beta + 1 - H) onehot(y)) / (beta + 1); `read` is onehot(y), (..., k).
    """
    H = entropy_of(log_p)[..., None] / math.log(max(2, log_p.shape[-1]))  # (..., 1)
    w = (H * log_hat.exp() + (cfg.moi_beta + 1 - H) * read) / (cfg.moi_beta + 1)
    return w.clamp(min=1e-30).log().masked_fill(log_hat == -INF, -INF)


def slot_of(tokens, token):
    """One-hot (..., k), bool: the first slot that holds `token` (...)."""
    slot = (tokens == token[..., None]).int().argmax(-1, keepdim=True)
    return torch.arange(tokens.shape[-1], device=tokens.device) == slot


def sample_mixture(logits, cfg, generator=None) -> Mixture:
    """One thinking step: logits (B, V) to candidates, weights and the token that is read."""
    log_p = token_distribution(logits, cfg.temperature)  # (B, V)
    require(
        cfg.k <= log_p.shape[1], f"k = {cfg.k}; allowed: up to {log_p.shape[1]}, the vocabulary"
    )
    sampling, aggregation = SAMPLING[cfg.sampling], AGGREGATION[cfg.aggregation]
    tokens, log_pv = sampling.make(log_p, cfg, generator)
    log_hat = log_pv.log_softmax(-1)  # (B, k)
    log_w = aggregation.make(log_hat, cfg, generator)
    log_w = log_w.masked_fill(log_hat == -INF, -INF).log_softmax(-1)  # (B, k)
    if sampling.logprob:  # the first draw is an ordinary sample from p
        y = tokens[:, 0]  # (B,)
    else:
        noise = 0.0 if aggregation.reads_largest else gumbel_noise(log_w, generator)
        y = tokens.gather(-1, (log_w + noise).argmax(-1, keepdim=True))[:, 0]  # (B,)
    if cfg.aggregation == "posterior":
        log_w = posterior(log_hat, log_p, slot_of(tokens, y), cfg)
    return Mixture(tokens, log_w, y)


def mixture_embedding(table, tokens, log_weights, aggregation="probability"):
    """e = sum_i w_i E[v_i]: table (V, d), the rest (..., k) -> (..., d). "max": element-wise."""
    rows = F.embedding(tokens, table)  # (..., k, d)
    if aggregation == "max":
        return rows.masked_fill((log_weights == -INF)[..., None], -INF).amax(-2)
    return (log_weights.exp()[..., None] * rows).sum(-2).to(table.dtype)


# ----------------------------------------------------------------------- 3. the score of a step
# What is the log-probability of a mixture? The paper looks at tokens alone (`cfg.logprob`): the
# representative's, or the candidates' weighted by w. `exact` is that of what was drawn at this
# step, and of nothing else. Drawn candidates have a probability, drawn weights a density. Where
# both follow from p, chance has only decided which candidate is read, y ~ Cat(w), and that matters
# only if y ends the thought.


def mixture_logprob(logits, tokens, log_weights, representative, cfg, candidate=None, ending=None):
    """Log-prob (...) of recorded steps (..., k) under the model that gave `logits` (..., V).

    `candidate` and `ending` (..., k) are what a Rollout records for `exact`. Without them a step
    with one filled slot is an ordinary token, and any other one goes on.
    """
    log_p = token_distribution(logits, cfg.temperature)  # (..., V)
    filled = log_weights > -INF  # (..., k)
    log_pv = log_p.gather(-1, tokens)  # (..., k)
    if cfg.logprob == "representative":
        return log_p.gather(-1, representative[..., None])[..., 0]
    if cfg.logprob == "weighted":  # w is data: a gradient through it could push a chosen token down
        return (log_weights.detach().exp() * log_pv.masked_fill(~filled, 0.0)).sum(-1)
    sampling, aggregation = SAMPLING[cfg.sampling], AGGREGATION[cfg.aggregation]
    if sampling.logprob:
        score = sampling.logprob(log_p, tokens, filled, cfg)
    else:
        several = filled & (filled.sum(-1, keepdim=True) > 1)
        known = (several, several & False) if candidate is None else (candidate, ending)
        score = event_logprob(log_pv, slot_of(tokens, representative), *known, cfg)
    if aggregation.logprob:
        log_hat = log_pv.masked_fill(~filled, -INF).log_softmax(-1).masked_fill(~filled, 0.0)
        log_w = log_weights.masked_fill(~filled, 0.0)
        score = score + aggregation.logprob(log_hat, log_w, filled, cfg)
    return score


def event_logprob(log_pv, read, candidate, ending, cfg):
    """log P(event) of steps whose candidates follow from p, all (..., k) -> (...).

    P = q(event) / q(candidates), with q = w, or p^ if w is drawn too (the mean of w). A step that
    ends the thought is the event {y}; one that goes on is "none that ends it" or, if w was drawn
    and has its density, no event. `posterior` builds w on y: {y}, always. An ordinary token has no
    candidates but the whole vocabulary: P = p(y).
    """
    aggregation = AGGREGATION[cfg.aggregation]
    ordinary = ~candidate.any(-1, keepdim=True)  # (..., 1)
    pool = candidate | ordinary
    log_hat = log_pv.masked_fill(~pool, -INF).log_softmax(-1)
    log_q = log_hat if aggregation.logprob else aggregation.make(log_hat, cfg)
    log_q = torch.where(ordinary, log_pv, log_q).masked_fill(~pool, -INF)
    event = candidate if aggregation.logprob else candidate & ~ending
    event = torch.where(ordinary | (read & ending).any(-1, keepdim=True), read, event)
    event = read if cfg.aggregation == "posterior" else event
    log_total = log_q.logsumexp(-1).masked_fill(ordinary[..., 0], 0.0)
    return log_q.masked_fill(~event, -INF).logsumexp(-1) - log_total


# ----------------------------------------------------------------------- 4. the end of a thought
# `</think>` is looked for in the text and not among the ids: for Qwen2.5 it is three tokens, and
# the last one may swallow what follows (`>\n` is one token). So as not to decode every row at
# every step, a row keeps a number, how many characters of the tag its text ends with, and a table
# says what each token makes of it. What ends a thought (`cfg.end`):
#   representative   the text completes the tag
#   most-likely      it would with the arg-max token, which then is the step
#   entropy, steps   or p was sharp for end_patience steps, or end_steps are over: the tag is forced
# Nobody chose a forced token, nor an arg-max one: they carry no loss (`sampled` is False).


@lru_cache(maxsize=8)
def tag_table(tokenizer, vocabulary):
    """(8, V): characters of the tag matched after token v, if s were matched before; 8: closed."""
    table = torch.zeros(len(TAG), vocabulary, dtype=torch.long)
    ids = [[i] for i in range(min(len(tokenizer), vocabulary))]
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    for token, text in enumerate(texts):
        if "<" in text or ">" in text or text in TAG:  # no other text can begin or continue it
            for s in range(len(TAG)):
                seen = TAG[:s] + text
                longest = max(n for n in range(len(TAG)) if seen.endswith(TAG[:n]))
                table[s, token] = len(TAG) if TAG in seen else longest
    return table


# ---------------------------------------------------------------------------------- 5. rollouts
# One layout everywhere: prompts are padded on the left, so that step t of every row sits in slot
# P + t. Each prompt is read once; its keys and values are then copied to its G chains. A decoding
# step works in place on preallocated tensors and never asks the GPU for a value, so that CUDA can
# record it once and replay it as one graph.
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"  # it was renamed


@dataclass
class Rollout:
    """B trajectories. Ids and weights, never embeddings: a model looks them up in its own table."""

    prompt_ids: torch.Tensor  # (B, P) left-padded
    prompt_mask: torch.Tensor  # (B, P) bool
    tokens: torch.Tensor  # (B, T, k)
    log_weights: torch.Tensor  # (B, T, k)
    representative: torch.Tensor  # (B, T) what a reader sees
    thinking: torch.Tensor  # (B, T) steps of the thought, its tag included
    mask: torch.Tensor  # (B, T) steps before the row had ended
    sampled: torch.Tensor  # (B, T) those the policy chose: mask without forced tokens
    eos: torch.Tensor  # (B, T) the step that ended the row
    logprob: torch.Tensor  # (B, T) as sampled
    entropy: torch.Tensor  # (B, T) of p, in nats
    candidate: torch.Tensor  # (B, T, k) slots that y was read from; none: from the vocabulary
    ending: torch.Tensor  # (B, T, k) those of them that would have ended the thought
    texts: list  # thought, tag and answer as read

    def select(self, rows):
        """Some rows (a LongTensor), with the padding trimmed; texts are left behind."""
        P = max(1, int(self.prompt_mask[rows].sum(1).max()))
        T = max(1, int(self.mask[rows].sum(1).max()))
        tensors = {name: x[rows] for name, x in vars(self).items() if name != "texts"}
        cut = {n: x[:, -P:] if n.startswith("prompt") else x[:, :T] for n, x in tensors.items()}
        return Rollout(**cut, texts=[])


def forward(model, embeds, mask, position, cache, **more):
    """The model below its head, on embeddings (B, Q, d) behind what the cache holds."""
    more |= {"attention_mask": mask, "position_ids": position, CACHE: cache, "use_cache": True}
    return model.base_model(inputs_embeds=embeds, **more)


def read_prompts(model, ids, mask, chains, **more):
    """Read n distinct prompts (n, P); returns the output and a cache repeated for their chains."""
    cache = transformers.DynamicCache(config=model.config)
    position = (mask.cumsum(1) - 1).clamp(min=0)  # (n, P)
    embeds = F.embedding(ids, model.get_input_embeddings().weight)  # (n, P, d)
    out = forward(model, embeds, mask.long(), position, cache, **more)
    cache.batch_repeat_interleave(chains)
    return out, cache


class Decoder:
    """The state of a rollout, on tensors that stay where they are."""

    def __init__(self, model, tokenizer, ids, mask, cfg, generator):
        self.model, self.cfg, self.generator = model, cfg, generator
        P, T, rows = ids.shape[1], cfg.max_new_tokens, len(ids) * cfg.chains
        self.table, self.head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self.tag_table = tag_table(tokenizer, len(self.table)).to(ids.device)  # (8, V)
        self.tag_ids = ids.new_tensor(tokenizer.encode(TAG, add_special_tokens=False))
        eos = model.generation_config.eos_token_id  # one id, a list, or none
        eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.eos_ids = ids.new_tensor(sorted(eos))

        out, prompts = read_prompts(model, ids, mask, cfg.chains)
        self.logits = self.head(out.last_hidden_state[:, -1]).repeat_interleave(cfg.chains, 0)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=P + T)
        for i, layer in enumerate(prompts.layers):
            self.cache.update(layer.keys, layer.values, i)
        self.visible = F.pad(mask, (0, T)).repeat_interleave(cfg.chains, dim=0)  # (B, P + T)
        self.position = mask.sum(1).repeat_interleave(cfg.chains)  # (B,)
        self.matched, self.streak, self.forced = ids.new_zeros(3, rows)
        self.thinking, self.live = ids.new_ones(2, rows).bool()
        self.t, self.slot = ids.new_tensor([0]), ids.new_tensor([P])
        self.record = {}

    def completes_tag(self, tokens):
        """Would each of tokens (B, n) complete the tag?"""
        return self.tag_table[self.matched[:, None], tokens] == len(TAG)

    def close_thought(self, y, log_p, entropy):
        """What cfg.end makes of y (B,); rows whose token a rule forced; rows whose thought ends."""
        cfg, forced = self.cfg, torch.zeros_like(self.live)
        if cfg.end == "most-likely":
            best = log_p.argmax(-1)  # (B,)
            forced = self.thinking & self.completes_tag(best[:, None])[:, 0]
            return torch.where(forced, best, y), forced, forced
        if cfg.end in ("entropy", "steps"):
            enough = cfg.end_patience if cfg.end == "entropy" else cfg.end_steps
            forced = self.thinking & ((self.forced > 0) | (self.streak >= enough))
            self.streak.add_(1).mul_(entropy < cfg.end_entropy if cfg.end == "entropy" else 1)
            y = torch.where(forced, self.tag_ids[self.forced], y)
            self.forced.copy_((self.forced + 1) * forced % len(self.tag_ids))
        return y, forced, self.thinking & self.completes_tag(y[:, None])[:, 0]

    def choose(self):
        """From logits to the next input (B, 1, d): mix or sample, end thoughts, record."""
        cfg, live = self.cfg, self.live
        log_p = token_distribution(self.logits, cfg.temperature)  # (B, V)
        entropy = entropy_of(log_p)  # (B,)
        m = sample_mixture(self.logits, cfg, self.generator)
        drawn = SAMPLING[cfg.sampling].logprob is not None
        sample = m.tokens[:, 0] if drawn else draw(log_p, self.generator)  # (B,)
        mixes = self.thinking & (entropy >= cfg.mix_entropy)  # (B,) else: an ordinary token
        mixes = mixes & (self.t < (cfg.mix_steps or cfg.max_new_tokens))
        y = torch.where(mixes, m.representative, sample)  # (B,) what a reader sees
        y, forced, closes = self.close_thought(y * live, log_p, entropy)
        eos = torch.isin(y, self.eos_ids) & live & ~forced

        # All but a step inside a thought is one-hot. If y is one of candidates that follow from p,
        # the others are kept beside it for its score; else it was drawn from the vocabulary.
        one_hot = (~mixes | closes | eos | forced | ~live)[:, None]  # (B, 1)
        among = (mixes & live & ~forced & (not drawn))[:, None]  # (B, 1)
        tokens = torch.where(one_hot & ~among, y[:, None], m.tokens)  # (B, k)
        log_w = torch.where(one_hot, torch.where(slot_of(tokens, y), 0.0, -INF), m.log_weights)
        closing = self.completes_tag(m.tokens) & (cfg.end != "most-likely")  # (B, k)
        ending = among & (closing | torch.isin(m.tokens, self.eos_ids))  # (B, k)
        step = {"tokens": tokens, "log_weights": log_w, "representative": y, "ending": ending}
        step["candidate"] = among & (m.log_weights > -INF)
        logprob = mixture_logprob(self.logits, cfg=cfg, **step).masked_fill(forced | ~live, 0.0)
        step |= {"logprob": logprob, "entropy": entropy * live, "eos": eos, "mask": live}
        step |= {"sampled": live & ~forced, "thinking": self.thinking & live}
        for name, x in step.items():
            if name not in self.record:
                self.record[name] = x.new_zeros(len(x), cfg.max_new_tokens, *x.shape[1:])
            self.record[name].index_copy_(1, self.t, x[:, None])
        self.matched.copy_(self.tag_table[self.matched, y] % len(TAG))
        self.thinking.logical_and_(~closes)
        self.live.logical_and_(~eos)
        return mixture_embedding(self.table, tokens, log_w, cfg.aggregation)[:, None]

    def step(self):
        """Choose, feed, read the next logits."""
        embeds = self.choose()
        self.visible.index_fill_(1, self.slot, True)
        mask = self.visible[:, None, None]  # (B, 1, 1, P + T)
        out = forward(self.model, embeds, mask, self.position[:, None], self.cache)
        self.logits.copy_(self.head(out.last_hidden_state[:, 0]))
        for counter in (self.t, self.slot, self.position):
            counter.add_(1)

    def recorded_step(self):
        """The step as one CUDA graph: recorded here, run by each call of what is returned."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def rollout(model, tokenizer, prompts: list[str], cfg, generator=None) -> Rollout:
    """`cfg.chains` trajectories for each prompt, templated text that ends in the opened thought."""
    check_model(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    how = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    batch = tokenizer(prompts, **how, return_tensors="pt").to(model.device)
    ids, mask = batch.input_ids, batch.attention_mask.bool()  # (n, P)
    # inference_mode is a tenth faster, but does not go with CUDA graphs
    with torch.no_grad() if ids.is_cuda else torch.inference_mode():
        decoder = Decoder(model, tokenizer, ids, mask, cfg, generator)
        step = decoder.step
        for t in range(cfg.max_new_tokens):
            step()
            if ids.is_cuda and t == 0:  # the first step has warmed up what a recording needs
                step = decoder.recorded_step()
            if (t % 16 == 15 or not ids.is_cuda) and not decoder.live.any():  # to look is to wait
                break
    T = int(decoder.record["mask"].sum(1).max())
    r = {name: x[:, :T].clone() for name, x in decoder.record.items()}
    shown = zip(r["representative"].cpu(), (r["mask"] & ~r["eos"]).cpu())
    texts = [tokenizer.decode(y[i], clean_up_tokenization_spaces=False) for y, i in shown]
    ids, mask = (x.repeat_interleave(cfg.chains, dim=0) for x in (ids, mask))  # (B, P)
    return Rollout(ids, mask, texts=texts, **r)


# -------------------------------------------------------------------------- 6. log-probabilities
# The same numbers as while sampling, for all steps at once and with gradient. What would cost
# memory is the logits, (B, T, V) in float32: a chunk of them exists at a time, and is computed
# again in the backward pass.


def completion_hidden(model, r, cfg, log_weights, every_layer=False):
    """Hidden states (B, T, d) that predicted each step, of the last layer alone or of all.

    Two passes: each distinct prompt once, then all chains behind their prompt's keys and values,
    through which the prompt's gradient arrives. Returns a list, embeddings first.
    """
    ids = r.prompt_ids.masked_fill(~r.prompt_mask, -1)
    chains = torch.unique_consecutive(ids, dim=0, return_counts=True)[1]  # (n,) of each prompt
    first, more = chains.cumsum(0) - chains, {"output_hidden_states": every_layer}  # (n,)
    prompt, cache = read_prompts(model, r.prompt_ids[first], r.prompt_mask[first], chains, **more)
    table, T = model.get_input_embeddings().weight, r.mask.shape[1]
    embeds = mixture_embedding(table, r.tokens, log_weights, cfg.aggregation)  # (B, T, d)
    visible = F.pad(r.prompt_mask, (0, T), value=True).long()  # (B, P + T)
    steps = forward(model, embeds, visible, visible.cumsum(1)[:, -T:] - 1, cache, **more)
    before, after = [prompt.last_hidden_state], [steps.last_hidden_state]
    if every_layer:
        before, after = prompt.hidden_states, steps.hidden_states
    # what predicts step t is what precedes it: the prompt's end, then step t - 1
    ends = [h[:, -1:].repeat_interleave(chains, dim=0) for h in before]  # (B, 1, d)
    return [torch.cat([end, h[:, :-1]], dim=1) for end, h in zip(ends, after)]


# Under `probability` and `posterior` the weights are functions of p, so the parameters also act
# through the next input, and scores of recorded weights miss that part of the gradient. It can be
# had in parallel: a pass over the recorded inputs gives every step's weights as functions of theta,
# equal in value to the record; the next one, over inputs built from these, has one hop through w.
#     pass 0: e_t = sum_i w_ti E[v_ti]
#     pass n: e_t = sum_i w_ti(theta) E[v_ti], with w(theta) from pass n - 1
# A thought of T steps has T - 1 hops at most: as many `weight_passes` make the gradient exact.


def weights_of_p(logits, tokens, log_weights, representative, cfg, **_):
    """Recorded log w (N, k), in value; where p made them, with their gradient."""
    if cfg.aggregation not in ("probability", "posterior"):
        return log_weights
    log_p, empty = token_distribution(logits, cfg.temperature), log_weights == -INF
    log_w = log_p.gather(-1, tokens).masked_fill(empty, -INF).log_softmax(-1)
    if cfg.aggregation == "posterior":
        log_w = posterior(log_w, log_p, slot_of(tokens, representative), cfg)
    log_w = log_w.masked_fill(empty, 0.0)
    return log_weights + log_w - log_w.detach()


def rollout_logprobs(model, rollout, cfg, micro_batch=None):
    """Log-probs (B, T) of every sampled step under `model`, with gradient; 0 elsewhere."""
    r, steps, head = rollout, rollout.sampled, model.get_output_embeddings()
    if micro_batch:
        rows = torch.arange(len(r.mask), device=r.mask.device).split(micro_batch)
        parts = [rollout_logprobs(model, r.select(i), cfg) for i in rows]
        return torch.cat([F.pad(p, (0, r.mask.shape[1] - p.shape[1])) for p in parts])
    check_model(model)
    names = ("tokens", "log_weights", "representative", "candidate", "ending")
    recorded = [getattr(r, name)[steps] for name in names]  # (N, ...)
    log_weights, size = r.log_weights, max(1, 2**24 // len(head.weight))  # 64 MiB of logits

    def in_chunks(function):
        """function(logits, step) of all N steps, `size` of them at a time."""
        hidden = completion_hidden(model, r, cfg, log_weights)[-1][steps]  # (N, d)

        def of_chunk(hidden, *step):
            return function(head(hidden), cfg=cfg, **dict(zip(names, step)))

        how = {"use_reentrant": False, "preserve_rng_state": False}
        chunks = zip(*(x.split(size) for x in (hidden, *recorded)))
        return torch.cat([torch.utils.checkpoint.checkpoint(of_chunk, *c, **how) for c in chunks])

    with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16(model, cfg)):
        for _ in range(cfg.weight_passes if torch.is_grad_enabled() else 0):
            log_weights = r.log_weights.masked_scatter(steps[..., None], in_chunks(weights_of_p))
        scores = in_chunks(mixture_logprob)  # (N,)
    return torch.zeros_like(r.logprob).masked_scatter(steps, scores)


# --------------------------------------------------------------------------------------- 7. GRPO


def group_advantages(rewards):
    """A = (r - mean) / (std + 1e-4) within each group: (prompts, G) -> (prompts, G)."""
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)


def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, cfg, chains=None, tokens=None):
    """PPO's clipped objective with group advantages A (B,), plus a KL penalty; the rest (B, T).

        ratio = pi / pi_old        k3 = pi_ref / pi - log(pi_ref / pi) - 1 >= 0, unbiased
        loss  = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta k3

    `chains` and `tokens` count the whole batch that this is a micro-batch of, so that the gradient
    is the same however it is cut. With one update a batch the ratio is 1, the clip idles, and the
    first term's gradient is REINFORCE's. Returns the loss and its parts.
    """
    mask = mask.bool()
    chains, tokens = chains or len(mask), tokens or max(1, int(mask.sum()))
    if cfg.loss_average == "chain":  # the paper: mean over a chain's steps, then over chains
        count = mask.sum(1, keepdim=True).clamp(min=1) * chains
    elif cfg.loss_average == "token":  # DAPO: mean over all steps
        count = tokens
    else:  # Dr. GRPO: a constant, so that length has no influence
        count = chains * cfg.max_new_tokens
    A = advantages[:, None]  # (B, 1)
    ratio = (logprob - old_logprob).exp()  # (B, T)
    free, clipped = ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A
    log_r = torch.zeros_like(logprob) if ref_logprob is None else ref_logprob - logprob
    kl = log_r.exp() - log_r - 1

    def total(x):
        return (x.masked_fill(~mask, 0.0) / count).sum()

    loss = total(cfg.kl_beta * kl - torch.min(free, clipped))
    share = total((free > clipped).float())
    return loss, {"loss": loss.item(), "kl": total(kl).item(), "clipped": share.item()}


# -------------------------------------------------------------------------- 8. tasks and rewards
# Reasoning-Gym seeds item i with seed + i: neighbouring seeds share 999 of 1,000 items, and a split
# by seed leaks. Here the question's hash decides: one in ten is a test question, whichever seed
# drew it. Streams of items lie 10^9 apart: 0 is the test's, 1 the smoke model's, 2 + seed a run's.
PAPER_TASKS = "acre,graph_color,family_relationships,color_cube_rotation,zebra_puzzles,countdown"
PAPER_TASKS += ",number_sequence,prime_factorization,circuit_logic,syllogism,self_reference"
PAPER_TASKS += ",simple_integration"
PAPER_SETTINGS = {"family_relationships": {"min_family_size": 8, "max_family_size": 12}}
SYSTEM = "First think inside <think> and </think>, then give the final answer alone inside "
SYSTEM += "<answer> and </answer>."
FORMAT = r"((?!</think>|<answer>).)*</think>\s*<answer>((?!</?answer>).)*</answer>\s*"
counts = Counter()  # of a step: prompts "too_long"; answers "refused", "raised" or "died" of


def task_names(cfg):
    """The tasks of a run."""
    return (PAPER_TASKS if cfg.task == "all" else cfg.task).split(",")


@lru_cache(maxsize=64)
def dataset(task, seed, task_settings=""):
    """500 items of a task; always as many, since acre's items change with the size."""
    with refusing(f"task {task!r} cannot be made with task_settings {task_settings!r}"):
        settings = PAPER_SETTINGS.get(task, {}) | json.loads(task_settings or "{}")
        return reasoning_gym.create_dataset(task, size=500, seed=seed, **settings)


def chat_prompt(tokenizer, question, cfg):
    """The templated prompt with its worked examples, ending in the opened thought."""
    chat = [{"role": "system", "content": SYSTEM}]
    with refusing(f"shots = {cfg.shots!r}; allowed: a JSON file of [question, reply] pairs"):
        for asked, reply in json.loads(Path(cfg.shots).read_text()) if cfg.shots else []:
            chat.append({"role": "user", "content": asked})
            chat.append({"role": "assistant", "content": reply})
    chat.append({"role": "user", "content": question})
    how = {"tokenize": False, "add_generation_prompt": True}
    try:
        prompt = tokenizer.apply_chat_template(chat, **how)
    except Exception:  # noqa: BLE001  (a template refuses a system turn: the user's says it)
        chat[1]["content"] = f"{SYSTEM}\n\n{chat[1]['content']}"
        prompt = tokenizer.apply_chat_template(chat[1:], **how)
    return prompt if prompt.rstrip().endswith("<think>") else prompt + "<think>\n"


def problems(task, cfg, tokenizer, stream, items, test):
    """The problems (task, entry, prompt) of one split among a stream's items, lazily, each once."""
    seen, found = set(), False
    for i in (stream * 10**9 + item for item in items):
        random.seed(i)  # list_functions draws from the global generator
        entry = dataset(task, i // 500 * 500, cfg.task_settings)[i % 500]
        digest = hashlib.sha256(entry["question"].encode()).hexdigest()
        if (int(digest, 16) % 10 == 0) == test and digest not in seen:
            seen.add(digest)
            entry["metadata"]["task_settings"] = cfg.task_settings  # four scorers look at them
            prompt = chat_prompt(tokenizer, entry["question"], cfg)
            if len(tokenizer.encode(prompt, add_special_tokens=False)) <= cfg.max_prompt_tokens:
                found = True
                yield task, entry, prompt
            else:
                counts["too_long"] += 1
    require(found, f"{task}: no prompt has at most max_prompt_tokens = {cfg.max_prompt_tokens}")


def train_problem(cfg, tokenizer, n):
    """Problem n < 10^6 of a run: a function of (seed, n), so that nothing has to be remembered."""
    task = task_names(cfg)[n % len(task_names(cfg))]
    items = range(n, 10**9, 10**6)  # its own: the first that is short enough and not a test's
    return next(problems(task, cfg, tokenizer, 2 + cfg.seed, items, test=False))


def test_problems(cfg, tokenizer, task):
    """Up to `eval_problems` distinct test problems of a task, the same for every seed."""
    stream = problems(task, cfg, tokenizer, 0, range(60 * cfg.eval_problems), test=True)
    return list(islice(stream, cfg.eval_problems))


def extract_answer(text):
    """'1 + 1</think> <answer> 2 </answer>' -> '2': the last answer after the thought, or None."""
    _, closed, reply = text.rpartition(TAG)
    before, ended, _ = reply.rpartition("</answer>")
    _, began, answer = before.rpartition("<answer>")
    return answer.strip() if closed and began and ended else None


def rewards(problems, texts):
    """For each problem and text, the paper's reward and its parts; `correct` is a score of 1."""
    parts = []
    for (task, entry, _), text in zip(problems, texts, strict=True):
        points = score(task, extract_answer(text), entry)
        part = {"score": points, "format": float(bool(re.fullmatch(FORMAT, text, re.DOTALL)))}
        reward = 2 * points + 0.5 * part["format"] + 0.5 * (200 <= len(text.split()) <= 400)
        parts.append(part | {"reward": reward, "correct": float(points == 1)})
    return parts


# -------------------------------------------------------------------------- 9. contained scoring
# A model's text reaches a task's scorer thousands of times an hour. Nine scorers execute it (eval,
# or sympy's parse_expr, which is eval too), and others hang or die of it. So there are two walls:
# those nine see plain arithmetic and lists only, and every scorer runs in a child process with
# limits, which the kernel ends when it is late, in the middle of C code too.
EVALUATING = "countdown puzzle24 polynomial_multiplication simple_integration n_queens "
EVALUATING += "intermediate_integration binary_matrix spiral_matrix string_insertion"
NAME = r"[A-Za-z]_?\d?|pi|sqrt|exp|log|ln|[aA]bs|Rational|a?(sin|cos|tan)h?|cot|sec|csc"
PLAIN = rf"""((?<![\w'])({NAME})(?![\w'])|'\w'|"\w"|\.(?=\d)|[\s\d\[\],+*/()!-])*"""
SMALL = r"\s*(-?\d{1,2}(\.\d+)?|[a-zA-Z]|\(-?\d{1,2}(/\d{1,2})?\))(?!\s*(\*\*|!|[\w.(]))"
HUGE = rf"\*\*(?!{SMALL})|(\d{{3}}|[^\d\s])\s*!"  # 9**9**9, 999!, 9!!
ENDLESS = r"\bs?nan\d*[ij]?\b|\binf(?:inity)?[ij]?\b|\b[\d_.]+e\+?\d{3,}\b"


def harmless(task, answer, entry):
    """May this scorer see this answer? '2*x**2 + C' yes, '().__class__' and 'exit()' no."""
    right = (str(entry["answer"]).strip(), *entry["metadata"].get("valid_answers", ()))
    if answer.strip() in right:
        return True
    known = re.findall(ENDLESS, f"{entry['question']} {right[0]}".lower())
    for text in (answer.lower(), "".join(answer.lower().split())):  # [nan, nan] passes for sorted
        if set(re.findall(ENDLESS, text)) - set(known):
            return False
    plain = re.fullmatch(PLAIN, answer, re.ASCII) and not re.search(HUGE, answer)
    return len(answer) <= max(4096, 4 * len(right[0])) and (plain or task not in EVALUATING.split())


def score_forever(pipe):
    """The child: a score, "refused" or "raised" for each (task, answer, entry)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is the trainer's business
    sys.stdout = sys.stderr = None
    for limit, most in (("DATA", 2**32), ("FSIZE", 0), ("NOFILE", 16), ("NPROC", 0), ("CORE", 0)):
        with suppress(ValueError, OSError):  # the system refuses it; time always holds
            resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))
    while True:
        task, answer, entry = pipe.recv()
        verdict = "raised"
        signal.setitimer(signal.ITIMER_REAL, 2)  # SIGALRM, left to its default, kills at once
        with suppress(BaseException):  # SystemExit too
            data = dataset(task, 0, entry["metadata"].get("task_settings", ""))
            ok = harmless(task, answer, entry)
            verdict = float(data.score_answer(answer, entry)) if ok else "refused"
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(verdict)


@lru_cache(maxsize=1)
def scorer():
    """(process, pipe) of a child that scored a known right answer. Raises UserError if none can.

    It is forked from a server that has neither CUDA nor threads, but the slow imports done.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reasoning_gym", "transformers.models.auto.modeling_auto"])
    ours, theirs = context.Pipe()
    entry = dataset("chain_sum", 0)[0]
    with refusing("scoring does not work on this machine: no child process could start"):
        process = context.Process(target=score_forever, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        ours.send(("chain_sum", entry["answer"], entry))
        verdict = ours.recv()
    require(verdict == 1, f"scoring does not work on this machine: a right answer was {verdict}")
    return process, ours


def score(task, answer, entry) -> float:
    """The task's own score of `answer` in [0, 1], within about two seconds; 0 for None and where
    `counts` says why. Raises UserError where scoring does not work at all."""
    require(task in reasoning_gym.factory.DATASETS, f"Reasoning-Gym has no task {task!r}")
    if answer is None:
        return 0.0
    if not scorer()[0].is_alive():  # killed while it had nothing to do
        scorer.cache_clear()
    pipe, verdict = scorer()[1], "died"
    try:
        pipe.send((entry["metadata"].get("source_dataset", task), answer, entry))
        verdict = pipe.recv()
    except (EOFError, OSError):  # the kernel has ended it
        pass
    finally:
        if verdict == "died":  # or interrupted: its late answer must not become the next one's
            scorer.cache_clear()
    if isinstance(verdict, str):
        counts[verdict] += 1
    else:  # spell_backward sums up a bit beyond 1 for answers that are nearly right
        return verdict if 0 <= verdict <= 1 else 0.0
    return 0.0


# ------------------------------------------------------------------------------------ 10. models


@torch.no_grad()
def check_model(model):
    """Raises UserError unless the model is head(layers(embeddings)) with full causal attention."""
    if not hasattr(model, "motg_checked"):
        ids = torch.arange(10, device=model.device)[None] % model.config.vocab_size  # (1, 10)
        out, _ = read_prompts(model, ids, ids >= 0, 1)
        want, got = model(ids).logits, model.get_output_embeddings()(out.last_hidden_state)
        kinds = {*(getattr(model.config, "layer_types", None) or ["full_attention"])}
        same = torch.allclose(want, got, atol=1e-2, rtol=1e-2) and kinds == {"full_attention"}
        allowed = "full causal attention, unscaled embeddings and head, such as Qwen2 and Llama"
        require(same, f"{type(model).__name__}; allowed: {allowed}")
        model.motg_checked = True


def load_model(cfg, name):
    """An fp32 model, on its device, and its tokenizer. Raises UserError for what cannot be used."""
    cuda = torch.cuda.is_available()
    require(cuda or cfg.device != "cuda", "device = 'cuda', and there is none; allowed: 'cpu'")
    with refusing(f"model {str(name)!r} cannot be loaded; allowed: a hub name or a folder"):
        how = {"dtype": torch.float32, "use_safetensors": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **how).eval()
    require(tokenizer.chat_template, f"{name}: no chat template; use an instruction-tuned model")
    need = cfg.max_prompt_tokens + cfg.max_new_tokens
    most = getattr(model.config, "max_position_embeddings", need)
    require(need <= most, f"max_prompt_tokens + max_new_tokens = {need}; {name} allows {most}")
    check_model(model)
    if model.num_parameters() < 10**7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # waking a thread takes longer than its half of so small a product
    return model.to("cuda" if cuda and cfg.device != "cpu" else "cpu"), tokenizer


def in_bf16(model, cfg):
    """Is this model to compute in bf16? Its master weights stay fp32."""
    if cfg.precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() and model.num_parameters() > 10**7
        return fast or model.device.type == "cuda"
    return cfg.precision == "bf16"


def sampler_of(model, cfg):
    """What samples: in bf16, a copy to be loaded anew at each update; else the model itself."""
    if not in_bf16(model, cfg):
        return model
    return copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)


# The smoke world: sums of one-digit terms, and demonstrations in three habits: a third works the
# sum out, a third forgets the last term, a third guesses. Imitation learns all three; which one
# is right, only the reward tells.


def demonstration(entry, rng):
    """Thought and answer for a chain_sum entry, in a habit that `rng` draws."""
    terms, habit = entry["metadata"]["expression"].split(), rng.choice(["work", "forget", "guess"])
    total, thought = int(terms[0]), []
    for op, term in zip(terms[1::2], terms[2::2]):
        thought.append(f"{total} {op} {term} = {total + int(op + term)}")
        total += int(op + term)
    if habit == "forget":
        total = int(thought.pop().split()[0])
    if habit == "guess":
        thought, total = ["easy"], rng.randrange(-9, 28)
    return f"{', '.join(thought)}{TAG} <answer>{total}</answer><|im_end|>"


def warm_start(steps=500, batch=64, lr=2e-3):
    """A small Qwen2 and its tokenizer, trained on demonstrations, in about a minute."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.ByteLevelBPETokenizer({c: i for i, c in enumerate(alphabet)}, [])
    bpe.add_tokens(["State the final answer to the following arithmetic problem: ", "easy", TAG])
    bpe.add_tokens(
        [" <answer>", "</answer>", " + ", " - ", " = ", ", ", " =", *map(str, range(100))]
    )
    how = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    how["chat_template"] = "{{ messages[-1].content }}\n<think>\n"  # without the system's turn
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **how)

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    cfg, rng = make_config(smoke=True), random.Random(0)
    stream = problems("chain_sum", cfg, tokenizer, 1, range(10**9), test=False)
    for _ in tqdm(range(steps), desc="warm start", leave=False, disable=None):
        part = list(islice(stream, batch))
        texts = [prompt + demonstration(entry, rng) for _, entry, prompt in part]
        x = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        n = torch.tensor([len(tokenizer.encode(prompt)) for _, _, prompt in part])[:, None]
        learn = x.attention_mask.bool() & (torch.arange(x.input_ids.shape[1]) >= n)
        model(**x, labels=x.input_ids.masked_fill(~learn, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, tokenizer


def smoke_model(cfg):
    """The folder of the warm-started model: made once, and kept in the user's cache."""
    require(cfg.task == "chain_sum", "--smoke without a --model knows the task chain_sum alone")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "motg" / "smoke-4"  # counted up with each change of what is made here
    if not (folder / "done").exists():
        for part in warm_start():
            part.save_pretrained(folder)
        (folder / "done").touch()
    return folder


# ------------------------------------------------------------------------------------ 11. probes


def step_probes(r):
    """Means over thinking steps (entropies in nats, shares) and over chains (counts, lengths)."""
    w = r.log_weights.exp()  # (B, T, k)
    H = torch.special.entr(w).sum(-1)  # (B, T)
    of_steps = {"entropy": r.entropy, "weight_entropy": H, "support": H.exp()}
    of_steps |= {"gini_simpson": 1 - w.square().sum(-1), "one_hot": w.amax(-1) > 0.99}
    considered = (r.tokens + 1) * (r.thinking[..., None] & (w > 0))  # ids from 1; 0: nothing
    distinct = [len(set(row) - {0}) for row in considered.flatten(1).tolist()]
    of_chains = {"distinct_tokens": torch.tensor(distinct), "think_tokens": r.thinking.sum(1)}
    of_chains |= {"answer_tokens": (r.mask & ~r.thinking).sum(1), "truncated": ~r.eos.any(1)}
    of_chains |= {"tagged": torch.tensor([TAG in text for text in r.texts])}
    steps = max(1, int(r.thinking.sum()))
    means = {name: (x * r.thinking).sum().item() / steps for name, x in of_steps.items()}
    return means | {name: x.float().mean().item() for name, x in of_chains.items()}


def hidden_state_entropy(hidden):
    """Matrix-based (von Neumann) entropy of hidden states (..., T, d), in [0, 1]; of one state, 0.

    -sum lambda log lambda / log min(T, d), lambda the eigenvalues of H H^T / T and H's rows
    normalised (Giraldo et al. 2014; Skean et al. 2025); the paper's own definition is not public.
    """
    H, (T, d) = F.normalize(hidden.double(), dim=-1), hidden.shape[-2:]
    gram = H @ H.mT if T <= d else H.mT @ H  # the non-zero eigenvalues are the same
    entropy = torch.special.entr(torch.linalg.eigvalsh(gram / T).clamp(min=0)).sum(-1)
    entropy = entropy / math.log(max(min(T, d), 2))
    return entropy if entropy.dim() else entropy.item()


@torch.no_grad()
def hidden_probes(model, r, cfg, chains=32, window=8):
    """Hidden-state entropy of the first thoughts, by layer (embeddings first), and the last layer's
    over each `window` of steps, by the step it ends with."""
    layers, curve = [], defaultdict(list)
    for one in map(r.select, (r.thinking.sum(1) > 1).nonzero()[:chains]):
        states = completion_hidden(model, one, cfg, one.log_weights, every_layer=True)
        states = torch.stack(states)[:, 0, one.thinking[0]]  # (layers + 1, n, d)
        layers.append(hidden_state_entropy(states))
        for t in range(window, states.shape[1] + 1):
            curve[t].append(hidden_state_entropy(states[-1, t - window : t]))
    found = {"hidden_entropy": torch.stack(layers).mean(0).tolist()} if layers else {}
    found["hidden_entropy_curve"] = {t: sum(v) / len(v) for t, v in curve.items()}
    return found | {"hidden_chains": len(layers)}


# ---------------------------------------------------------------------------------- 12. training


def readable(r, row, tokenizer):
    """A trajectory as text, mixtures as `the{0.62}|a{0.38}`, what was read first."""
    text, one = "", r.select(torch.tensor([row], device=r.mask.device))
    for y, tokens, w in zip(one.representative[0], one.tokens[0], one.log_weights[0].exp()):
        order = (w + slot_of(tokens, y)).argsort(descending=True)[: (w > 0).sum()]
        mixed = [f"{tokenizer.decode([tokens[i]])}{{{w[i]:.2f}}}" for i in order]
        text += "|".join(mixed) if len(mixed) > 1 else tokenizer.decode([y])
    return text


def collect(sampler, tokenizer, cfg, step, generator):
    """A step's experience: rollouts, their advantages (B,), and what to log."""
    generator.manual_seed(cfg.seed * 1_000_003 + step + 1)  # the step is all the random state
    counts.clear()
    n = cfg.prompts_per_step
    batch = [train_problem(cfg, tokenizer, step * n + j) for j in range(n)]
    r = rollout(sampler, tokenizer, [prompt for _, _, prompt in batch], cfg, generator)
    parts = rewards([problem for problem in batch for _ in range(cfg.chains)], r.texts)
    reward = torch.tensor([p["reward"] for p in parts], device=r.mask.device).view(n, cfg.chains)
    log = {"step": step} | {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
    log |= step_probes(r) | {
        name: counts[name] for name in ("too_long", "refused", "raised", "died")
    }
    equal = (reward == reward[:, :1]).all(1)  # (prompts,) nothing to compare: no gradient
    log["no_gradient"] = equal.float().mean().item()
    return r, group_advantages(reward).flatten(), log


def update(policy, reference, optimizer, batch, cfg, lr):
    """One optimiser update on a batch of (Rollout, advantages, _), in micro-batches."""
    chains = sum(len(r.mask) for r, _, _ in batch)
    tokens = max(1, sum(int(r.sampled.sum()) for r, _, _ in batch))
    log, ref = Counter(), None
    for r, advantages, _ in batch:
        P, T = r.prompt_mask.shape[1], r.mask.shape[1]
        groups = cfg.micro_tokens // (
            P + cfg.chains * T
        )  # whole ones, which share a prompt, if any
        size = groups * cfg.chains or max(1, (cfg.micro_tokens - P) // T)
        for rows in torch.arange(len(r.mask), device=r.mask.device).split(size):
            part = r.select(rows)
            if reference is not None:
                with torch.no_grad():
                    ref = rollout_logprobs(reference, part, cfg)
            new = rollout_logprobs(policy, part, cfg)
            old = new.detach()  # one update a batch: it is this policy that has sampled
            A, mask = advantages[rows], part.sampled
            loss, stats = grpo_loss(new, old, ref, A, mask, cfg, chains, tokens)
            loss.backward()
            gap = (old - part.logprob).abs().sum().item() / tokens
            log.update(stats | {"sampler_gap": gap})
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip).item()
    optimizer.param_groups[0]["lr"] = lr
    finite = math.isfinite(norm) and math.isfinite(log["loss"])
    if finite:  # else the update is skipped, and that is logged
        optimizer.step()
    optimizer.zero_grad()
    return dict(log) | {"grad_norm": norm, "lr": lr, "skipped": int(not finite)}


def write_whole(path, text):
    """Beside, then swapped in: a kill leaves the old text or the new one."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(text)
    partial.rename(path)


def save_run(out, model, tokenizer, state):
    """`checkpoint`, a Hugging Face folder with trainer.pt in it; a kill leaves it, or its .old."""
    now, new, old = (out / f"checkpoint{end}" for end in ("", ".new", ".old"))
    with refusing(f"no checkpoint was written in {out}; --resume continues from the last one"):
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        torch.save(state, new / "trainer.pt")
        if now.exists():
            now.rename(old)
        new.rename(now)
        shutil.rmtree(old, ignore_errors=True)


def load_run(cfg, base):
    """(policy, tokenizer, optimizer, state), as the checkpoint in cfg.out has them, or new."""
    now, old = Path(cfg.out, "checkpoint"), Path(cfg.out, "checkpoint.old")
    if old.exists() and not now.exists():  # killed between the renames of a save
        old.rename(now)
    policy, tokenizer = load_model(cfg, now if now.exists() else base)
    how = {"betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, **how)
    state = {"step": 0, "metrics": "", "samples": ""}
    if now.exists():
        with refusing(f"{now} is damaged"):
            state = torch.load(now / "trainer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state.pop("optimizer"))
    return policy, tokenizer, optimizer, state


def train(cfg):
    """The whole method: roll out, reward, compare within groups, update."""
    scorer()  # raises where scoring does not work
    out, base = Path(cfg.out), cfg.model or smoke_model(cfg)
    policy, tokenizer, optimizer, state = load_run(cfg, base)
    reference = load_model(cfg, base)[0].requires_grad_(False) if cfg.kl_beta else None
    sampler, generator = sampler_of(policy, cfg), torch.Generator(policy.device)
    tests = [p for task in task_names(cfg) for p in test_problems(cfg, tokenizer, task)]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(asdict(cfg) | {"resume": False}, indent=1))

    def accuracy():
        return evaluate(sampler, tokenizer, cfg, generator, tests)["pass@1"]

    if "before" not in state:
        state["before"] = accuracy()
    bar = tqdm(total=cfg.steps, initial=state["step"], desc=cfg.method, disable=None)
    while state["step"] < cfg.steps:
        start, done = state["step"], min(state["step"] + cfg.accumulate, cfg.steps)
        batch = [collect(sampler, tokenizer, cfg, step, generator) for step in range(start, done)]
        warm = min(1, (start + cfg.accumulate) / max(1, cfg.warmup * cfg.steps))
        stats = update(policy, reference, optimizer, batch, cfg, cfg.lr * warm)
        if sampler is not policy:
            sampler.load_state_dict(policy.state_dict())

        logs = [log for _, _, log in batch]
        logs[-1] |= stats
        if cfg.eval_every and start // cfg.eval_every < done // cfg.eval_every:
            logs[-1]["test_accuracy"] = accuracy()
        saves = done == cfg.steps or start // cfg.save_every < done // cfg.save_every
        for row in range(cfg.chains if saves or start == 0 else 0):
            state["samples"] += f"step {start}: {readable(batch[0][0], row, tokenizer)}\n"
        state["metrics"] += "".join(json.dumps(log) + "\n" for log in logs)
        state["step"] = done
        (out / "metrics.jsonl").write_text(state["metrics"])
        (out / "samples.txt").write_text(state["samples"])
        shown = ("reward", "correct", "entropy", "think_tokens", "kl", "no_gradient")
        bar.set_postfix({name: f"{logs[-1].get(name, 0):.2f}" for name in shown}, refresh=False)
        bar.update(done - start)
        if saves:
            save_run(out, policy, tokenizer, state | {"optimizer": optimizer.state_dict()})
    result = {name: getattr(cfg, name) for name in ("task", "method", "seed", "steps")}
    result |= {"accuracy_before": state["before"], "accuracy_after": accuracy()}
    write_whole(out / "result.json", json.dumps(result, indent=1))
    print(f"{out}: accuracy {state['before']:.3f} -> {result['accuracy_after']:.3f}")


# -------------------------------------------------------------------------------- 13. evaluation


def pass_at_k(n, c, k) -> float:
    """Chance that one of k chains is right when c of n were, unbiased (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, tokenizer, cfg, generator, tests, probes=False):
    """Sampled accuracy on problems: pass@k, standard error over problems, the probes' means."""
    generator.manual_seed(cfg.seed)
    right, means, hidden, G, n = [], Counter(), {}, cfg.chains, len(tests)
    rows = min(512, 2**17 // (cfg.max_prompt_tokens + cfg.max_new_tokens))  # as the cache allows
    for i in range(0, n, max(1, rows // G)):
        part = tests[i : i + max(1, rows // G)]
        r = rollout(model, tokenizer, [prompt for _, _, prompt in part], cfg, generator)
        parts = rewards([problem for problem in part for _ in range(G)], r.texts)
        right += torch.tensor([p["correct"] for p in parts]).view(-1, G).sum(1).int().tolist()
        means.update({name: value * len(part) / n for name, value in step_probes(r).items()})
        hidden = hidden_probes(model, r, cfg) if probes and not hidden else hidden
    result = {f"pass@{k}": sum(pass_at_k(G, c, k) for c in right) / n for k in range(1, G + 1)}
    stderr = (torch.tensor(right) / G).std().item() / n**0.5 if n > 1 else math.nan
    return result | {"stderr": stderr, "problems": n} | means | hidden


def evaluation(configs):
    """`eval`: one model, read out by several methods, side by side; adds to eval.json."""
    model, tokenizer = load_model(configs[0], configs[0].model or smoke_model(configs[0]))
    sampler, generator = sampler_of(model, configs[0]), torch.Generator(model.device)
    path = Path(configs[0].out, "eval.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    for task in task_names(configs[0]):
        tests = test_problems(configs[0], tokenizer, task)
        found = [evaluate(sampler, tokenizer, cfg, generator, tests, True) for cfg in configs]
        found = [asdict(cfg) | {"task": task} | result for cfg, result in zip(configs, found)]
        for name in found[0]:
            print(f"{name:20}" + "".join(f"{row[name]!s:>22.20}" for row in found))
        rows += found
        write_whole(path, json.dumps(rows, indent=1))
    print(f"written to {path}")


# ------------------------------------------------------------------------------ 14. command line


def parse(argv):
    """The command, and the settings as far as they were given. Raises UserError."""
    parser = transformers.HfArgumentParser(Config, prog="motg.py", allow_abbrev=False)
    parser.add_argument("command", choices=("train", "eval"))

    def error(message):  # one line, where argparse would print its usage too
        raise UserError(message)

    parser.error = error
    parser.parse_args(argv)  # --help shows the defaults, which are then taken out
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    return given.pop("command"), given


def run_settings(folder):
    """The settings in a run's config.json; {} where there is none."""
    path = Path(folder, "config.json")
    with refusing(f"{path} is damaged; allowed is a run's"):
        return json.loads(path.read_text()) if path.exists() else {}


def train_config(given):
    """The Config of a new run, or of one that goes on, where flags win over its config.json."""
    cfg = make_config(**given)
    out = cfg.out or f"runs/{cfg.task.replace(',', '+')}-{cfg.method}-{cfg.seed}"
    run = run_settings(out)
    allowed = "allowed: an --out that holds a run with --resume, another --out without"
    require(cfg.resume == bool(run), f"out = {out!r}, resume = {cfg.resume}; {allowed}")
    cfg = make_config(**run | given | {"out": out})
    require(cfg.chains > 1, f"chains = {cfg.chains}; allowed: 2 or more, for GRPO compares them")
    possible = cfg.smoke or cfg.device == "cpu" or torch.cuda.is_available()
    require(possible, "no CUDA GPU; allowed: --smoke for a small model, --device cpu for any")
    return cfg


def eval_configs(given):
    """A Config for each method. Of a run's checkpoint, the run's own settings are the defaults."""
    model = Path(given.get("model", "smoke"))
    run = run_settings(model.parent) if model.name == "checkpoint" else {}
    run["out"] = str(model.parent) if run else f"runs/eval-{model.name}"
    methods, configs = given.pop("method", run.get("method", "dirichlet")).split(","), []
    for method in methods:
        own = METHODS.get(method, {}) if method != run.get("method") else {}
        flags = {name: x for name, x in given.items() if len(methods) == 1 or name not in own}
        kept = {name: x for name, x in run.items() if name not in own}
        configs.append(make_config(**kept | flags | {"method": method}))
    return configs


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    try:
        command, given = parse(argv)
        if command == "train":
            train(train_config(given))
        else:
            evaluation(eval_configs(given))
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print(f"motg: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
