"""motg: *Learning to Reason with Mixture of Tokens* (MoT-G, arXiv 2509.21482) in one file.

A language model that reasons writes one sampled token a step and throws the rest of its
distribution away. MoT-G feeds back a weighted mixture of k token embeddings at each thinking step,
ends the thought with `</think>`, answers in ordinary tokens, and is trained with GRPO. One step is

    logits z --softmax(z / T)--> p --k candidates v, weights w--> sum_i w_i E[v_i] --> next input

Part One is the method, and a student can stop at its end. Part Two is the program around it.
Letters in shapes: B rows (a row is one chain, one completion of a prompt), G chains a prompt, n
prompts, P the longest prompt, T new tokens (in formulas T is the temperature), k candidates, V
vocabulary, d width, N steps picked out of B x T, Q inputs of a pass, S places in a cache."""

import os

if __name__ == "__main__":  # these must be set before torch is loaded; your own values win
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads sleep instead of spinning
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages make bf16 updates faster

import argparse
import copy
import hashlib
import inspect
import json
import math
import multiprocessing
import random
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import reasoning_gym
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, inf
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"  # transformers 5.24 renamed it
LOGITS_CHUNK = 2**24  # numbers in a chunk of logits (section 6)


# PART ONE: THE METHOD
# ---------------------------------------------------------------------------------- 1. settings
@dataclass
class Config:
    """All settings: each is a flag, its comment the help text. Some say (paper: x) or (ours)."""

    # a mixture (section 2), the end of a thought (3), the score of a step (4)
    method: str = "dirichlet"  # a preset of METHODS (section 2; more in docs/tools/field.py)
    sampling: str = "top-k"  # the rule that chooses the candidates
    aggregation: str = "dirichlet"  # the rule that weights the candidates
    k: int = 2  # candidates a step (paper: 2)
    temperature: float = 0.9  # T in p = softmax(z / T) (paper: 0.9)
    answer_temperature: float = 0.0  # T of the answer; 0: the same as in the thought (ours)
    concentration: float = 1.0  # dirichlet: c in w ~ Dir(c p^) (paper: 1)
    mix_steps: int = 0  # mix in the first n steps of a thought only; 0: in all (ours)
    mix_entropy: float = 0.0  # mix only where H(p) reaches this, in nats (ours)
    logprob: str = "representative"  # a step's score: representative, weighted or exact (ours)
    weight_passes: int = 0  # extra passes, for the gradient through weights computed from p (ours)
    end: str = "drawn"  # the rule that ends a thought: drawn or most-likely
    # GRPO (7) and the training loop (8)
    chains: int = 10  # G, the chains (sampled completions) of a prompt (paper: 10 or 5)
    prompts_per_step: int = 1  # prompts a training step (paper: 1)
    accumulate: int = 4  # steps in an optimiser update; they are sampled together (paper: 4)
    steps: int = 1000  # training steps (paper: 1000)
    lr: float = 5e-6  # AdamW's learning rate (paper: 5e-6, but on bf16 weights; here they are fp32)
    warmup: float = 0.18  # the share of the steps in which the learning rate rises (paper: 0.18)
    grad_clip: float = 0.1  # the largest norm of a gradient (paper: 0.1)
    kl_beta: float = 0.1  # weight of the KL to the reference (paper: 0.1)
    clip: float = 0.2  # PPO's clip of the ratio (paper: 0.2)
    loss_average: Literal["chain", "token"] = "chain"  # first over each chain (paper), or at once
    micro_tokens: int = 4096  # tokens in a micro-batch; lower it to save memory
    # the task, the model, the run
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # a hub name or a local folder
    task: str = "graph_color"  # any Reasoning-Gym task
    task_settings: str = "{}"  # the task's own settings as JSON, such as {"max_value": 20}
    shots: str = ""  # a JSON file of [question, reply] pairs; a reply begins with <think>
    max_prompt_tokens: int = 1024  # longer prompts are skipped (paper: 1024)
    max_new_tokens: int = 1024  # thought and answer together (paper: 1024)
    eval_problems: int = 100  # distinct test problems (paper: 100)
    eval_every: int = 0  # steps between evaluations; 0: only before and after training
    save_every: int = 100  # steps between checkpoints; the last step always has one
    seed: int = 0  # the seed of the training problems and of the sampling
    out: str = ""  # the run's folder (if empty: runs/<command>-<method>-<seed>)
    resume: bool = False  # continue the run in --out, or begin it
    smoke: bool = False  # the model and settings of docs/smoke_model; your flags win
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA; only --smoke may fall back
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where that is fast


# -------------------------------------------------------------------------------- 2. a mixture
# A thinking step is k candidates v and k weights w. The model's next input is the weighted sum of
# the candidates' embeddings. Say the vocabulary is a, b, c, d and the end tag, and at this step
#     p         a 0.40   b 0.24   c 0.12   d 0.04   </think> 0.20
#     p'        a 0.50   b 0.30   c 0.15   d 0.05             p without the tag: see section 3
#     top 2     a, b     with p^ = p' over the candidates alone = (0.625, 0.375)
#     weights   w = p^, or drawn around it: w ~ Dir(c p^), say (0.7, 0.3)
#     next      0.7 E[a] + 0.3 E[b]
# An ordinary token is a mixture whose first weight is 1, so answers, the single-token baseline and
# the end tag are fed by the same code. A candidate fills a slot; a slot with log-weight -inf is
# empty. The representative, also called the token read, is the candidate that goes into the text.
class Mixture(NamedTuple):
    """One step of B rows."""

    tokens: Tensor  # (B, k)
    log_weights: Tensor  # (B, k)
    representative: Tensor  # (B,)


def token_distribution(logits, temperature):
    """log p = log softmax(z / T) in float32, (..., V). Sampler and scorer get p from here."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def draw(log_p, generator=None):
    """One token a row from p, (B, V) -> (B,): the first whose cumulative p exceeds u ~ U(0, 1). In
    float32 the sum would lose rare tokens. (A CUDA graph could not replay torch.multinomial.)"""
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)  # (B, V)
    total = cumulative[:, -1:]  # (B, 1)
    u = torch.empty_like(total).uniform_(generator=generator)
    token = torch.searchsorted(cumulative, u * total, right=True)  # (B, 1)
    return token[:, 0].clamp(max=log_p.shape[1] - 1)


class Candidates(NamedTuple):
    """A sampling rule. choose(log_p (B, V), first (B,), cfg, generator) returns tokens (B, k) and
    their log p, -inf in empty slots. A rule that draws them has `first`, drawn from p, in slot 0 as
    the token read, and has logprob(log_p (..., V), tokens (..., k), cfg) -> (...)."""

    choose: Callable
    logprob: Callable = None


class Weights(NamedTuple):
    """An aggregation rule; p^ is p over the candidates alone, log_hat (..., k) its logarithm.
    weigh(log_hat, log_p, cfg, generator) returns log w up to a constant. A rule that draws weights
    has logdensity(log_hat, log_w, filled, cfg) -> (...) as well. If the candidates were not drawn,
    the token read is drawn from w, or it is that of the largest w (`reads_largest`)."""

    weigh: Callable = lambda log_hat, *_: log_hat  # w = p^
    logdensity: Callable = None
    reads_largest: bool = False


def top_k(log_p, first, cfg, generator=None):
    """The k most likely tokens."""
    log_pv, tokens = log_p.topk(cfg.k)
    return tokens, log_pv


def without_replacement(log_p, first, cfg, generator=None):
    """k different tokens, each drawn from p without the ones before it (as Gumbel top-k does)."""
    drawn, rest = [first], log_p
    while len(drawn) < cfg.k:
        rest = rest.scatter(-1, drawn[-1][..., None], -inf).log_softmax(-1)  # (B, V)
        drawn.append(draw(rest, generator))
    tokens = torch.stack(drawn, dim=-1)  # (B, k)
    return tokens, log_p.gather(-1, tokens)


def plackett_luce(log_p, tokens, cfg):
    """log P of draws without replacement: sum_j [log p(v_j) - log(1 - sum_{i<j} p(v_i))]. The loop
    renormalises p instead, because that difference loses its digits where p is sharp."""
    score = 0.0
    for token in tokens.split(1, dim=-1):  # (..., 1)
        score = score + log_p.gather(-1, token)[..., 0]
        log_p = log_p.scatter(-1, token, -inf).log_softmax(-1)
    return score


def dirichlet(log_hat, log_p, cfg, generator=None):
    """w ~ Dir(c p^), whose mean is p^: c -> inf gives p^, c -> 0 one token drawn from p^. Drawn as
    Gamma(a), a = c max(p^, 1e-5), in logs, where nothing underflows: Gamma(a + 1) U^(1 / a)."""
    a = cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (B, k)
    minus_log_u = torch.empty_like(a).exponential_(generator=generator)
    return torch._standard_gamma(a + 1, generator).log() - minus_log_u / a


def dirichlet_logdensity(log_hat, log_w, filled, cfg):
    """log Gamma(sum_i a_i) + sum_i ((a_i - 1) log w_i - log Gamma(a_i)), over filled slots."""
    a = cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (..., k)
    terms = (a - 1) * log_w - a.lgamma()
    return (terms * filled).sum(-1) + (a * filled).sum(-1).lgamma()


SAMPLING = {"top-k": Candidates(top_k)}
SAMPLING["without-replacement"] = Candidates(without_replacement, plackett_luce)
AGGREGATION = {"probability": Weights(), "dirichlet": Weights(dirichlet, dirichlet_logdensity)}
DRAWS = {"sampling": "without-replacement", "aggregation": "probability"}
METHODS = {
    "single": DRAWS | {"k": 1},  # ordinary tokens
    "dirichlet": {"sampling": "top-k", "aggregation": "dirichlet"},  # the paper's
    "different-tokens": DRAWS | {"logprob": "weighted"},  # the paper's
    "soft-thinking": {"sampling": "top-k", "aggregation": "probability"},  # arXiv 2505.15778
}


def weigh(log_hat, log_p, cfg, generator=None):
    """log w (..., k) of candidates with log p^ (..., k); slots without a candidate stay empty."""
    log_w = AGGREGATION[cfg.aggregation].weigh(log_hat, log_p, cfg, generator)
    return log_w.masked_fill(log_hat == -inf, -inf).log_softmax(-1)


def sample_mixture(logits, cfg, generator=None, first=None) -> Mixture:
    """A mixture from logits (B, V) of p', here called p. `first` (B,): a draw from it, if any."""
    candidates = SAMPLING[cfg.sampling]
    weights = AGGREGATION[cfg.aggregation]
    log_p = token_distribution(logits, cfg.temperature)  # (B, V)
    read = draw(log_p, generator) if first is None else first  # (B,)
    tokens, log_pv = candidates.choose(log_p, read, cfg, generator)  # (B, k) both
    log_hat = log_pv.log_softmax(-1)  # (B, k)
    log_w = weigh(log_hat, log_p, cfg, generator)  # (B, k)
    if not candidates.logprob:
        rank = log_w
        if not weights.reads_largest:  # log w + Gumbel noise has its maximum at a draw from w
            rank = log_w - torch.empty_like(log_w).exponential_(generator=generator).log()
        read = tokens.gather(-1, rank.argmax(-1, keepdim=True))[:, 0]
    return Mixture(tokens, log_w, read)


def mixture_embedding(table, tokens, log_weights):
    """The next input: table (V, d), tokens and log-weights (..., k) -> (..., d)."""
    rows = F.embedding(tokens, table)  # (..., k, d)
    return (log_weights.exp()[..., None] * rows).sum(-2).to(table.dtype)


# ----------------------------------------------------------------------- 3. the end of a thought
# A thinking step first draws an ordinary token y from p. If y is an EOS, or its text completes
# `</think>`, the thought ends with it, as in any language model. If not, the step mixes from p',
# which is p without the ending tokens: no model has seen an input that is a fifth `</think>`. The
# tag is looked for in the text, not among the ids: for Qwen2.5 it is three tokens, and the last one
# may hold what follows too. So the state of a text, called `matched`, is how many characters of the
# tag it ends with, 0 to 7, or ANSWER, or ENDED.
TAG = "</think>"
ANSWER = len(TAG)  # the tag is complete
ENDED = ANSWER + 1  # an EOS was read


class TagTable(NamedTuple):
    """What a token does, by the state before it and its id."""

    after: Tensor  # (10, V) the state after it
    ends: Tensor  # (10, V) bool: it ends a thought


@lru_cache(maxsize=8)
def text_states(tokenizer, vocabulary):
    """The state after each token (10, V), as far as the token's text decides it."""
    after = torch.zeros(ENDED + 1, vocabulary, dtype=torch.long)
    ids = [[i] for i in range(min(len(tokenizer), vocabulary))]
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    for token, text in enumerate(texts):
        if "<" in text or ">" in text or text in TAG:  # no other text begins or continues the tag
            for matched in range(ANSWER):
                seen = TAG[:matched] + text
                longest = max(n for n in range(ANSWER) if seen.endswith(TAG[:n]))
                after[matched, token] = ANSWER if TAG in seen else longest
    after[ANSWER] = ANSWER
    return after


def tag_of(model, tokenizer) -> TagTable:
    """The TagTable of a model and its tokenizer."""
    after = text_states(tokenizer, model.config.vocab_size).clone()
    eos = model.generation_config.eos_token_id  # one, a list of them, or none
    eos = tokenizer.eos_token_id if eos is None else eos
    after[:, torch.tensor(eos, dtype=torch.long)] = ENDED
    after[ENDED] = ENDED
    ends = after >= ANSWER
    ends[ANSWER:] = False  # there is no thought to end
    return TagTable(after.to(model.device), ends.to(model.device))


def step_distribution(logits, matched, tag, cfg):
    """log p (..., V) of steps that begin in the states `matched` (...)."""
    temperature = cfg.temperature
    if cfg.answer_temperature:
        temperature = torch.where(matched < ANSWER, temperature, cfg.answer_temperature)[..., None]
    if cfg.end == "most-likely":  # no draw may end the thought: p is p'
        logits = logits.masked_fill(tag.ends[matched], -inf)
    return token_distribution(logits, temperature)


# The rule so far is `drawn`. With `most-likely`, a thought ends where the arg-max of the logits
# ends it. A rule gets section 5's Decoder and returns which rows it forces (B,), with what tokens.
END = {
    "drawn": lambda d: (d.matched < 0, d.matched),  # it forces no row; the tokens are not used
    "most-likely": lambda d: (d.tag.ends[d.matched, d.logits.argmax(-1)], d.logits.argmax(-1)),
}


# --------------------------------------------------------------- 4. the log-probability of a step
# GRPO raises the log-probability of steps that led to rewards. For a mixture we first have to say
# what that is. A step is of one of four kinds. At the first two nothing was drawn, so they have 0:
#     PAD      the row had already ended                                    0
#     FORCED   a rule put this token in                                     0
#     TOKEN    y ~ p was fed: in an answer, to end a thought, or unmixed    log p(y)
#     MIXED    y ~ p did not end the thought, so a mixture was fed          one of three scores
# If draws without replacement gave a, then b, in the example, and w = p^, the three scores are
#     representative   log p of the token read  log 0.40                                     = -0.92
#     weighted         sum_i w_i log p(v_i)     0.625 log 0.40 + 0.375 log 0.24              = -1.11
#     exact            of all that was drawn    log 0.80 + log 0.50 + log(0.30 / (1 - 0.50)) = -1.43
# The paper scores tokens, by the first two. `exact` makes R grad log P an unbiased estimate of the
# policy gradient, for an R that sees only the states of a thought. Where w = p^ this needs section
# 6's extra passes; where w is drawn, jumps of top-k are left out. For a MIXED step it is the sum of
#     log(1 - p_end)    p_end is the chance that y ~ p ends the thought (section 3)
#     log P'(v)         if the candidates were drawn; P' is the probability under p'
#     log f(w)          if the weights were drawn; f is a density
#     log P(state)      if the token read was drawn from w: the sum of w that leads to its state
PAD, FORCED, TOKEN, MIXED = range(4)


def mixture_logprob(logits, tokens, log_weights, representative, cfg):
    """Log-prob (...) of steps (..., k) under the model that gave `logits` (..., V), where no token
    ends a thought. A step with one filled slot counts as a TOKEN, any other as MIXED."""
    kind = torch.where((log_weights > -inf).sum(-1) > 1, MIXED, TOKEN)  # (...)
    step = Steps(tokens, log_weights, representative, kind, torch.zeros_like(kind))
    never = tokens.new_zeros(1, logits.shape[-1])
    return step_logprob(logits, step, TagTable(never, never > 0), cfg)


def step_logprob(logits, step, tag, cfg):
    """Log-prob (...) of Steps (section 5), from `logits` (..., V). Callers zero PAD and FORCED."""
    tokens, log_w, read, kind, matched = step[:5]
    log_p = step_distribution(logits, matched, tag, cfg)  # (..., V)
    log_y = log_p.gather(-1, read[..., None])[..., 0]  # (...)
    if cfg.logprob == "representative":
        return log_y
    empty = log_w == -inf  # (..., k)
    if cfg.logprob == "weighted":
        w = log_w.detach().exp()  # a gradient through w could push a chosen token down
        return (w * log_p.gather(-1, tokens).masked_fill(empty, 0.0)).sum(-1)
    candidates = SAMPLING[cfg.sampling]
    weights = AGGREGATION[cfg.aggregation]
    score, log_q, log_hat = going_on(log_p, step, tag)
    if candidates.logprob:
        score = score + candidates.logprob(log_q, tokens, cfg)
    elif not weights.reads_largest:  # the chance that a draw from w leads to the same state
        log_read = log_w if weights.logdensity else weigh(log_hat, log_q, cfg)
        leads_to = tag.after[matched[..., None], tokens]  # (..., k) a state each
        led_to = tag.after[matched, read]  # (...)
        other = leads_to != led_to[..., None]  # (..., k)
        score = score + log_read.masked_fill(other, -inf).logsumexp(-1)
    if weights.logdensity:
        log_hat = log_hat.masked_fill(empty, 0.0)
        log_w = log_w.masked_fill(empty, 0.0)
        score = score + weights.logdensity(log_hat, log_w, ~empty, cfg)
    return torch.where(kind == MIXED, score, log_y)


def going_on(log_p, step, tag):
    """log(1 - p_end) (...), log_q = log p' (..., V), log p^ (..., k); unmixed steps: p' = p."""
    mixed = (step.kind == MIXED)[..., None]  # (..., 1)
    ends = tag.ends[step.matched] & mixed  # (..., V)
    log_on = log_p.masked_fill(ends, -inf)  # (..., V)
    log_go_on = log_on.logsumexp(-1)  # (...)
    log_q = log_on - log_go_on[..., None]  # (..., V)
    empty = step.log_weights == -inf  # (..., k)
    log_hat = log_q.gather(-1, step.tokens).masked_fill(empty, -inf).log_softmax(-1)  # (..., k)
    return log_go_on, log_q, log_hat


# ---------------------------------------------------------------------------------- 5. rollouts
# For one chain, and without a cache, a rollout would be
#     inputs, text = E[prompt], []
#     while the row has not ended:
#         z = model(inputs)[-1]
#         y = a draw from softmax(z / T)
#         v, w, read = y, 1, y
#         if the thought is open and y does not end it:
#             v, w, read = sample_mixture(z without the ending tokens, first=y)
#         inputs, text = inputs + [sum_i w_i E[v_i]], text + [read]
# This section does so for all chains at once. Prompts are padded on the left, so step t of each row
# is at place P + t of the cache. A prompt is read once and copied to its G chains. A step works in
# place and never asks the GPU for a value, so that CUDA can replay it as one graph.
class Steps(NamedTuple):
    """Recorded steps: ids and weights; each model looks embeddings up in its own table. One step
    is (B, k) and (B,) instead, N steps picked out are (N, k) and (N,)."""

    tokens: Tensor  # (B, T, k)
    log_weights: Tensor  # (B, T, k) ordinary tokens are one-hot, in the first slot
    representative: Tensor  # (B, T) the token read
    kind: Tensor  # (B, T) PAD, FORCED, TOKEN or MIXED
    matched: Tensor  # (B, T) the state before the step
    log_pv: Tensor = None  # (B, T, k) log p of the tokens
    logprob: Tensor = None  # (B, T) the score, 0 where nothing was drawn
    entropy: Tensor = None  # (B, T) H(p) in nats


class Rollout(NamedTuple):
    """B trajectories, the chains of a prompt side by side. It has the fields of `steps` too."""

    steps: Steps
    prompt_ids: Tensor  # (B, P) padded on the left
    prompt_mask: Tensor  # (B, P) False on the padding
    prompt: Tensor  # (B,) which prompt a row belongs to
    tag: TagTable
    texts: list[str] = None

    mask = property(lambda self: self.kind > PAD)  # (B, T) real steps
    sampled = property(lambda self: self.kind > FORCED)  # (B, T) those with a score and a loss
    mixed = property(lambda self: self.kind == MIXED)  # (B, T) those that fed a mixture
    thinking = property(lambda self: self.matched < ANSWER)  # (B, T) the thought and its end
    after = property(lambda self: self.tag.after[self.matched, self.representative])  # (B, T)
    eos = property(lambda self: self.mask & (self.after == ENDED))  # (B, T) it ended the row

    def __getattr__(self, name):
        return getattr(self.steps, name)

    def select(self, rows):
        """These rows (a LongTensor), with the padding trimmed and without texts."""
        P = max(1, int(self.prompt_mask[rows].sum(1).max()))
        T = max(1, int(self.mask[rows].sum(1).max()))
        prompts = self.prompt_ids[rows, -P:], self.prompt_mask[rows, -P:], self.prompt[rows]
        return Rollout(Steps(*(x[rows, :T] for x in self.steps)), *prompts, self.tag)


def forward(model, inputs, mask, cache, position=None):
    """The last layer's states (B, Q, d) of ids (B, Q) or embeddings (B, Q, d) after a cache. `mask`
    (B, S) covers cache and inputs and gives positions. With `position`, it is a bias instead."""
    if inputs.dim() == 2:
        inputs = F.embedding(inputs, model.get_input_embeddings().weight)
    if position is None:
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]  # (B, Q)
    how = {"attention_mask": mask, "position_ids": position, CACHE: cache, "use_cache": True}
    return model.base_model(inputs_embeds=inputs, **how).last_hidden_state


class Decoder:
    """The state of a rollout: what the B chains of n prompts have written so far."""

    def __init__(self, model, tokenizer, ids, mask, cfg, generator):
        self.model, self.cfg, self.generator = model, cfg, generator
        self.head, self.tag = model.get_output_embeddings(), tag_of(model, tokenizer)
        self.tag_ids = ids.new_tensor(tokenizer.encode(TAG, add_special_tokens=False))
        (n, self.P), T = mask.shape, cfg.max_new_tokens
        places = (self.P + T + 15) // 16 * 16  # attention would pad other lengths in each layer
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=places)
        hidden = forward(model, ids, mask, self.cache)  # (n, P, d)
        self.logits = self.head(hidden[:, -1])  # (n, V)
        self.start = mask.sum(1, keepdim=True)  # (n, 1) lengths of the prompts
        closed = F.pad(~mask, (0, places - self.P), value=True)[:, None, None]  # (n, 1, 1, S)
        self.attention_bias = closed.to(model.dtype) * -1e9  # 0 where a row may look, else -1e9
        self.matched = ids.new_zeros(n)  # the text's state
        self.rows = torch.arange(n * cfg.chains, device=ids.device)  # (B,) rows of the record
        self.keep(self.rows // cfg.chains)  # each prompt's row is copied to its chains
        self.t = ids.new_zeros(1)
        self.one_hot = F.one_hot(self.t, cfg.k).log()  # (1, k) all weight in slot 0, since t is 0
        one = ids.new_zeros(len(self.rows), T)  # a number for each step
        each = ids.new_zeros(len(self.rows), T, cfg.k)  # a number for each candidate
        self.record = Steps(
            tokens=each,
            log_weights=each + self.one_hot,
            representative=one,
            kind=one + PAD,
            matched=one + ENDED,
            log_pv=each.float(),
            logprob=one.float(),
            entropy=one.float(),
        )

    def keep(self, rows):
        """Goes on with these rows (a LongTensor); a row may come more than once."""
        self.start = self.start[rows]
        self.logits = self.logits[rows]
        self.matched = self.matched[rows]
        self.attention_bias = self.attention_bias[rows]
        self.cache.reorder_cache(rows)

    def step(self):
        """Draws a token, mixes where it leaves the thought open, records the step, and feeds it."""
        cfg, matched, tag, z = self.cfg, self.matched, self.tag, self.logits
        log_p = step_distribution(z, matched, tag, cfg)  # (B, V)
        entropy = -(log_p.exp() * log_p.clamp(min=-99)).sum(-1)  # (B,) in nats
        forced, token = END[cfg.end](self)
        y = torch.where(forced, token, draw(log_p, self.generator))  # (B,)
        mixes = (matched < ANSWER) & ~forced & ~tag.ends[matched, y]  # (B,)
        mixes &= (entropy >= cfg.mix_entropy) & (self.t < (cfg.mix_steps or inf))
        mixes &= cfg.k > 1 or not SAMPLING[cfg.sampling].logprob  # one draw is an ordinary token
        z_on = z.masked_fill(tag.ends[matched], -inf)  # (B, V) the logits of p'
        m = sample_mixture(z_on, cfg, self.generator, first=y)  # for the rows that mix
        tokens = torch.where(mixes[:, None], m.tokens, y[:, None])  # (B, k)
        log_w = torch.where(mixes[:, None], m.log_weights, self.one_hot)
        kind = torch.where(forced, FORCED, torch.where(mixes, MIXED, TOKEN))
        kind = kind.masked_fill(matched == ENDED, PAD)
        read = torch.where(mixes, m.representative, y)
        step = Steps(tokens, log_w, read, kind, matched)
        logprob = step_logprob(z, step, tag, cfg).masked_fill(kind <= FORCED, 0.0)
        log_pv = log_p.gather(1, tokens)
        step = step._replace(log_pv=log_pv, logprob=logprob, entropy=entropy)
        for recorded, chosen in zip(self.record, step):
            recorded[self.rows, self.t] = chosen
        matched.copy_(tag.after[matched, read])
        self.attention_bias.index_fill_(3, self.P + self.t, 0.0)
        table = self.model.get_input_embeddings().weight
        embeds = mixture_embedding(table, tokens, log_w)  # (B, d)
        position = self.start + self.t  # (B, 1)
        hidden = forward(self.model, embeds[:, None], self.attention_bias, self.cache, position)
        z.copy_(self.head(hidden[:, 0]))
        self.t.add_(1)


def captured(step, generator):
    """Returns `step` as one CUDA graph. Capturing records what it does without doing it."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    before = {g: g.clone_state() for g in (generator, *torch.cuda.default_generators)}
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception as e:  # noqa: BLE001  (some models read a value at each step)
        for g, state in before.items():  # a failed capture leaves the generators unusable
            g.graphsafe_set_state(state)
        print(f"motg: goes on without a CUDA graph, slower: {e!r:.200}", file=sys.stderr)
        return step
    return graph.replay


def rollout(model, tokenizer, prompts, cfg, generator=None) -> Rollout:
    """`cfg.chains` trajectories of each prompt; a prompt ends with the opened thought."""
    check_model(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    how = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    batch = tokenizer(prompts, return_tensors="pt", **how).to(model.device)
    ids, mask = batch.input_ids, batch.attention_mask.bool()  # (n, P)
    if generator is None:  # torch.manual_seed decides
        generator = torch.Generator(ids.device).manual_seed(torch.randint(2**62, ()).item())
    with torch.no_grad() if ids.is_cuda else torch.inference_mode():  # CUDA graphs need no_grad
        decoder = Decoder(model, tokenizer, ids, mask, cfg, generator)
        step, rows = decoder.step, decoder.rows
        for t in range(cfg.max_new_tokens):
            step()
            if ids.is_cuda and t == 0:  # the first step has set up what a capture needs
                step = captured(step, generator)
            if ids.is_cuda and t % 16 < 15:
                continue  # the next lines wait for the GPU
            live = decoder.matched < ENDED  # (B,)
            if not live.any():
                break
            if t % 8 == 7 and not (ids.is_cuda or live.all()):  # a graph cannot shrink
                decoder.rows = decoder.rows[live]
                decoder.keep(live.nonzero()[:, 0])
    prompt = rows // cfg.chains  # (B,)
    r = Rollout(decoder.record, ids[prompt], mask[prompt], prompt, decoder.tag).select(rows)
    shown = zip(r.representative.cpu(), (r.mask & ~r.eos).cpu())
    texts = [tokenizer.decode(y[i], clean_up_tokenization_spaces=False) for y, i in shown]
    return r._replace(texts=texts)


# ------------------------------------------------------------- 6. log-probabilities in parallel
# While sampling, a step waits for the one before it. Afterwards all inputs are known, and one pass
# gives every step's logits, with gradient. All at once, (B, T, V) in float32, they would fill the
# memory, so they are made in chunks, and once more in the backward pass.
def completion_hidden(model, r, log_weights):
    """The last layer's hidden states (B, T, d), from which the head predicts each step."""
    _, chains = torch.unique_consecutive(r.prompt, return_counts=True)  # (n,) rows a prompt
    first = chains.cumsum(0) - chains  # (n,) a prompt's first row
    cache = transformers.DynamicCache(config=model.config)
    prompts = forward(model, r.prompt_ids[first], r.prompt_mask[first], cache)  # (n, P, d)
    cache.batch_repeat_interleave(chains)
    table = model.get_input_embeddings().weight
    embeds = mixture_embedding(table, r.tokens, log_weights)  # (B, T, d)
    visible = F.pad(r.prompt_mask, (0, r.kind.shape[1]), value=True)  # (B, P + T)
    states = forward(model, embeds, visible, cache)  # (B, T, d)
    # the prompt's last state predicts step 0, that of step t - 1 predicts step t
    before = prompts[:, -1:].repeat_interleave(chains, dim=0)  # (B, 1, d)
    return torch.cat([before, states[:, :-1]], dim=1)


# If w is computed from p, the parameters act by a second path: theta -> w_1 -> the input of step 2
# -> p_2. Recorded weights have no gradient along it. An extra pass computes the weights again:
# equal values, but with a gradient. The next pass mixes its inputs by them. So n extra passes cover
# paths through n weights in a row; T steps need n = T - 1. (You may skip this at a first reading.)
def weights_of_p(logits, step, tag, cfg):
    """log w (N, k) of recorded Steps: the value is the record's, the gradient that of w(p)."""
    weights = AGGREGATION[cfg.aggregation]
    if weights.logdensity:  # they were drawn, so they are data
        return step.log_weights
    log_p = step_distribution(logits, step.matched, tag, cfg)
    _, log_q, log_hat = going_on(log_p, step, tag)  # (N, V), (N, k)
    of_p = weigh(log_hat, log_q, cfg)
    of_p = of_p.masked_fill(step.log_weights == -inf, 0.0)
    return step.log_weights + of_p - of_p.detach()


def rollout_logprobs(model, r, cfg, micro_batch=None):
    """Log-probs (B, T) with gradient, 0 where not sampled; at most `micro_batch` rows at a time."""
    check_model(model)
    sampled = r.sampled
    head = model.get_output_embeddings()
    if micro_batch:
        found = torch.zeros_like(r.logprob)
        for rows in torch.arange(len(found), device=found.device).split(micro_batch):
            part = rollout_logprobs(model, r.select(rows), cfg)
            found[rows, : part.shape[1]] = part
        return found
    steps = Steps(*(x[sampled] for x in r.steps))  # (N, k) or (N,)

    def in_chunks(function, log_weights):
        """`function` of every step, with inputs mixed by these log-weights (B, T, k)."""

        def of_chunk(hidden, *step):
            return function(head(hidden), Steps(*step), r.tag, cfg)

        hidden = completion_hidden(model, r, log_weights)[sampled]  # (N, d)
        size = max(1, LOGITS_CHUNK // len(head.weight))
        parts = [x.split(size) for x in (hidden, *steps)]
        chunks = zip(*parts)
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(of_chunk, *chunk, **how) for chunk in chunks])

    log_weights = r.log_weights
    passes = cfg.weight_passes if head.weight.requires_grad else 0
    bf16 = compute_dtype(model, cfg) == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for _ in range(passes):
            of_p = in_chunks(weights_of_p, log_weights)  # (N, k)
            log_weights = r.log_weights.masked_scatter(sampled[..., None], of_p)
        scores = in_chunks(step_logprob, log_weights)  # (N,)
    return torch.zeros_like(r.logprob).masked_scatter(sampled, scores)


# --------------------------------------------------------------------------------------- 7. GRPO
# A chain's advantage is how much better it did than its prompt's G chains on average: rewards (2.5,
# 0.5, 0.5, 0.5) have mean 1.0 and standard deviation 1.0: advantages are (1.5, -0.5, -0.5, -0.5).
def group_advantages(rewards):
    """A = (r - mean) / (std + 1e-4) within each group: (n, G) -> (n, G)."""
    mean = rewards.mean(-1, keepdim=True)
    std = rewards.std(-1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)


def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, cfg, chains=None, tokens=None):
    """PPO's clipped objective on advantages A (B,), plus a KL penalty; other tensors are (B, T).
        ratio = pi / pi_old      k3 = pi_ref / pi - log(pi_ref / pi) - 1, unbiased for draws from pi
        loss  = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta k3
    `chains` and `tokens` count the whole batch, of which this may be a part. Returns the loss and a
    dict of means. With one update a batch the ratio is 1, and nothing is clipped."""
    if cfg.loss_average == "token":  # the mean of all sampled steps
        weight = mask / (tokens or mask.sum().clamp(min=1))  # (B, T)
    else:  # the mean of a chain's steps, and then of the chains
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1)  # (B, T)
        weight = weight / (chains or len(mask))
    A = advantages[:, None]  # (B, 1)
    ratio = (logprob - old_logprob).masked_fill(mask == 0, 0.0).exp()  # (B, T)
    free = ratio * A
    clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A
    ref_logprob = logprob if ref_logprob is None else ref_logprob
    log_r = (ref_logprob - logprob).masked_fill(mask == 0, 0.0)
    kl = log_r.exp() - log_r - 1
    parts = {
        "loss": weight * (cfg.kl_beta * kl - torch.min(free, clipped)),
        "kl": weight * kl,
        "clipped": weight * (free > clipped),
    }
    means = {name: x.sum().item() for name, x in parts.items()}
    return parts["loss"].sum(), means


# --------------------------------------------------------------------------- 8. the training loop
def attempt(model, tokenizer, problems, cfg, generator):
    """Rolls out G chains a problem; returns the Rollout and, for each row, a dict of rewards."""
    r = rollout(model, tokenizer, [prompt for _, _, prompt in problems], cfg, generator)
    return r, rewards([problem for problem in problems for _ in range(cfg.chains)], r.texts)


def collect(sampler, tokenizer, cfg, steps, generator):
    """The chains of some steps (a range): a Rollout, advantages (B,), rewards, a log."""
    generator.manual_seed(cfg.seed * 1_000_003 + steps.start + 1)  # --resume needs no other state
    counts.clear()
    numbers = range(steps.start * cfg.prompts_per_step, steps.stop * cfg.prompts_per_step)
    batch = [train_problem(cfg, tokenizer, n) for n in numbers]
    r, parts = attempt(sampler, tokenizer, batch, cfg, generator)
    reward = r.logprob.new_tensor([part["reward"] for part in parts]).view(-1, cfg.chains)  # (n, G)
    means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
    means["no_gradient"] = (reward == reward[:, :1]).all(1).float().mean().item()  # all A are 0
    bad = {name: counts[name] for name in ("too_long", "refused", "raised", "died")}
    log = {"step": steps.start, **means, **step_probes(r), **bad}
    return r, group_advantages(reward).flatten(), parts, log


def micro_batches(r, cfg):
    """The rows (LongTensors) of micro-batches of about `micro_tokens` tokens, sorted by length."""
    G = cfg.chains
    longest, order = r.mask.sum(1).view(-1, G).amax(1).sort()  # (n,) both
    rows = torch.arange(len(r.kind), device=order.device).view(-1, G)[order].flatten()
    lengths = longest.repeat_interleave(G) + r.prompt_mask.shape[1] / G  # chains share a prompt
    sizes = [0]
    for length in lengths.tolist():  # ascending
        if sizes[-1] and (sizes[-1] + 1) * length > cfg.micro_tokens:
            sizes.append(0)
        sizes[-1] += 1
    return rows.split(sizes)


def update(policy, reference, optimizer, r, advantages, cfg, lr):
    """One optimiser update on a Rollout and its advantages (B,); returns a dict of its numbers."""
    chains, tokens, log = len(r.kind), max(1, int(r.sampled.sum())), Counter()
    for rows in micro_batches(r, cfg):
        part, A = r.select(rows), advantages[rows]
        ref = rollout_logprobs(reference, part, cfg) if reference else None
        new = rollout_logprobs(policy, part, cfg)  # (B, T)
        old = new.detach()  # one update a batch: the policy is still the one that sampled
        loss, stats = grpo_loss(new, old, ref, A, part.sampled, cfg, chains, tokens)
        loss.backward()
        gap = (old - part.logprob).abs().sum().item()  # the sampler may be a bf16 copy
        log.update(stats | {"sampler_gap": gap / tokens})  # a Counter adds
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip).item()
    optimizer.param_groups[0]["lr"] = lr
    if math.isfinite(norm):  # otherwise this batch is skipped
        optimizer.step()
    optimizer.zero_grad()
    return log | {"grad_norm": norm, "lr": lr}


def train(cfg):
    """The whole method: roll out, reward, compare within groups, update."""
    policy, tokenizer, reference, sampler, optimizer, tests, run = begin(cfg)
    generator = torch.Generator(policy.device)
    test = partial(evaluate, sampler, tokenizer, cfg, generator, tests)
    run["before"] = run["before"] or test()
    bar = tqdm(range(run["step"], cfg.steps, cfg.accumulate), desc=cfg.method, disable=None)
    for step in bar:
        done = run["step"] = min(step + cfg.accumulate, cfg.steps)
        r, advantages, parts, log = collect(sampler, tokenizer, cfg, range(step, done), generator)
        lr = cfg.lr * min(1, (step + cfg.accumulate) / max(1, cfg.warmup * cfg.steps))
        log |= update(policy, reference, optimizer, r, advantages, cfg, lr)
        sampler.load_state_dict(policy.state_dict())
        if cfg.eval_every and step // cfg.eval_every < done // cfg.eval_every:
            log["test_accuracy"] = test()["pass@1"]
        saves = done == cfg.steps or step // cfg.save_every < done // cfg.save_every
        if saves or step == 0:  # writes down the first prompt's chains
            for row in range(cfg.chains):
                prompt = tokenizer.decode(r.prompt_ids[row][r.prompt_mask[row]])
                sample = {"step": step, "prompt": prompt, "trajectory": readable(r, row, tokenizer)}
                run["samples"] += json.dumps(sample | parts[row]) + "\n"
        run["metrics"] += json.dumps(log) + "\n"
        for name in ("metrics", "samples"):
            write(cfg, f"{name}.jsonl", run[name])
        bar.set_postfix_str(f"reward {log['reward']:.2f}, correct {log['correct']:.2f}")
        if saves:
            state = {"model": policy.state_dict(), "optimizer": optimizer.state_dict()}
            write(cfg, "trainer.pt", run | state)
    accuracy = {"accuracy_before": run["before"]["pass@1"], "accuracy_after": test()["pass@1"]}
    policy.save_pretrained(f"{cfg.out}/checkpoint")
    tokenizer.save_pretrained(f"{cfg.out}/checkpoint")
    write(cfg, "result.json", json.dumps(vars(cfg) | accuracy, indent=1))
    print(cfg.out, *(f"{name} {share:.3f}" for name, share in accuracy.items()), sep=", ")
    print(f"next: python motg.py eval --model {cfg.out}; python docs/tools/run_page.py {cfg.out}")


# PART TWO: WHAT SURROUNDS IT
# -------------------------------------------------------------------- 9. settings are checked
CHOICES = {"method": METHODS, "sampling": SAMPLING, "aggregation": AGGREGATION, "end": END}
CHOICES["logprob"] = "representative", "weighted", "exact"
CHOICES["task"] = reasoning_gym.factory.DATASETS
SMOKE = Path(__file__).with_name("docs") / "smoke_model"  # a tiny model, and its settings
MAY_BE_0 = {"steps", "lr", "warmup", "kl_beta", "clip"}  # and numbers whose default is 0
MOST = {"warmup": 1, "clip": 1, "seed": 10**6 - 1}


class UserError(ValueError):
    """What the user got wrong, in one line; the program exits with status 2."""


def require(ok, message):
    """Raises UserError unless `ok`."""
    if not ok:
        raise UserError(message)


@contextmanager
def refusing(message):
    """Turns an exception into a UserError: `message`, then what the exception says."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{message} ({e})") from e


def make_config(method="dirichlet", **overrides) -> Config:
    """Defaults, changed by --smoke, then by the method, then by `overrides`. Raises UserError."""
    smoke = json.loads((SMOKE / "settings.json").read_text()) if overrides.get("smoke") else {}
    if overrides.get("task", smoke.get("task")) != smoke.get("task"):
        smoke.pop("task_settings", None)  # they are for the smoke mode's own task
    with refusing("unknown setting; allowed: those of --help, with docs/tools/field.py more"):
        cfg = Config(**smoke | METHODS.get(method, {}) | overrides | {"method": method})
    for name, kind, value in ((f.name, f.type, getattr(cfg, f.name)) for f in fields(cfg)):
        if choices := CHOICES.get(name, get_args(kind)):
            require(value in choices, f"{name} = {value!r}; allowed: {', '.join(choices)}")
        elif kind in (int, float):
            may_be_0 = getattr(Config, name) == 0 or name in MAY_BE_0
            least = 0 if may_be_0 else {int: 1, float: 1e-6}[kind]
            most = MOST.get(name, 10**9)
            ok = type(value) in (int, kind) and least <= value <= most
            require(ok, f"{name} = {value!r}; allowed: {least} to {most}")
    require(method != "single" or cfg.k == 1, f"k = {cfg.k}; allowed: 1, for the method single")
    return cfg


# ------------------------------------------------------------------------- 10. tasks and rewards
# Reasoning-Gym makes item i from seed + i, so a split by seed would leak: the question's hash
# decides, and one in ten is for tests. Streams of items lie 10^9 seeds apart: 0 for tests, 1 for
# the warm start, 2 + seed for a run.
SYSTEM = "Think inside <think> and </think>, then give the answer inside <answer> and </answer>."
FORMAT = r"((?!</think>|<answer>).)*</think>\s*<answer>((?!</?answer>).)*</answer>\s*"
counts = Counter()  # since `collect` began: "too_long" prompts; answers "refused", "raised", "died"


@lru_cache(maxsize=64)
def dataset(task, seed, task_settings="{}"):
    """500 items of a task. The size is fixed, because acre's items change with it."""
    with refusing(f"task {task!r} cannot be made with task_settings {task_settings!r}"):
        return reasoning_gym.create_dataset(task, size=500, seed=seed, **json.loads(task_settings))


def chat_prompt(tokenizer, question, cfg):
    """The prompt in the chat template, with the shots; it ends with the opened thought."""
    turns = [("system", SYSTEM)]
    with refusing(f"shots = {cfg.shots!r}; allowed: a JSON file of [question, reply] pairs"):
        for asked, reply in json.loads(Path(cfg.shots).read_text()) if cfg.shots else []:
            turns += [("user", asked), ("assistant", reply)]
    chat = [{"role": role, "content": text} for role, text in (*turns, ("user", question))]
    template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        prompt = template(chat)
    except Exception:  # noqa: BLE001  (no system turn in this template: the user's turn says it)
        chat[1]["content"] = f"{SYSTEM}\n\n{chat[1]['content']}"
        prompt = template(chat[1:])
    return prompt if prompt.rstrip().endswith("<think>") else prompt + "<think>\n"


def usable_problems(cfg, tokenizer, stream, items, test):
    """Yields the problems (task, entry, prompt) of one split of a stream's items, each once."""
    seen, found = set(), False
    for i in (stream * 10**9 + item for item in items):
        random.seed(i)  # the task list_functions draws from this generator
        with refusing(f"task {cfg.task!r} cannot be made"):
            entry = dataset(cfg.task, i // 500 * 500, cfg.task_settings)[i % 500]
        number = int(hashlib.sha256(entry["question"].encode()).hexdigest(), 16)
        if (number % 10 == 0) == test and number not in seen:
            seen.add(number)
            entry.setdefault("metadata", {})["task_settings"] = cfg.task_settings  # for its scorer
            prompt = chat_prompt(tokenizer, entry["question"], cfg)
            if len(tokenizer.encode(prompt, add_special_tokens=False)) <= cfg.max_prompt_tokens:
                found = True
                yield cfg.task, entry, prompt
            else:
                counts["too_long"] += 1
    require(found, f"no prompt is within max_prompt_tokens = {cfg.max_prompt_tokens}")


def train_problem(cfg, tokenizer, n):
    """Problem n < 10^6 of a run: its stream's first usable item among n, n + 10^6, ..."""
    return next(usable_problems(cfg, tokenizer, 2 + cfg.seed, range(n, 10**9, 10**6), test=False))


def test_problems(cfg, tokenizer):
    """Up to `eval_problems` distinct test problems, the same for every seed."""
    stream = usable_problems(cfg, tokenizer, 0, range(60 * cfg.eval_problems), test=True)
    return [problem for _, problem in zip(range(cfg.eval_problems), stream)]


def extract_answer(text):
    """'1 + 1</think> <answer> 2 </answer>' -> '2': the last answer after the last tag, or None."""
    _, closed, reply = text.rpartition(TAG)
    answers = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", reply, re.DOTALL)
    return answers[-1].strip() if closed and answers else None


def rewards(problems, texts):
    """For each problem and text the paper's reward; its parts but length; `correct`: score is 1."""
    pairs, found = zip(problems, texts, strict=True), []
    items = [(task, extract_answer(text), entry) for (task, entry, _), text in pairs]
    for points, text in zip(scores(items), texts):
        form = float(re.fullmatch(FORMAT, text, re.DOTALL) is not None)
        reward = 2 * points + 0.5 * form + 0.5 * (200 <= len(text.split()) <= 400)
        parts = {"score": points, "format": form, "correct": float(points == 1)}
        found.append({"reward": reward, **parts})
    return found


# -------------------------------------------------------------------------- 11. contained scoring
# EVALS are eleven scorers: nine execute the model's text (eval, or sympy's parse_expr), two count
# nan as right. Beside the right answer they see plain arithmetic and lists: '[1, 2]' or '3!', not
# 'exit()', '().__class__', '9**9**9', '999!'. Some others hang, die, or give more than 1, so every
# scorer runs in a forked child, which is killed when an answer takes SECONDS.
EVALS = """countdown puzzle24 polynomial_multiplication simple_integration string_insertion n_queens
intermediate_integration binary_matrix spiral_matrix number_sorting complex_arithmetic"""
NAME = r"[A-Za-z]_?\d?|pi|sqrt|exp|log|ln|[aA]bs|Rational|a?(sin|cos|tan)h?|cot|sec|csc"
PLAIN = rf"""((?<![A-Za-z_])({NAME})(?!\w)|['"](-?[\d.]+|\w)['"]|\.(?=\d)|[\s\d\[\],+*/()!-])*"""
SMALL = r"\s*(-?\d{1,2}(\.\d+)?|[a-zA-Z]|\(-?\d{1,2}(/\d{1,2})?\))(?!\s*(\*\*|!|[\w.(]))"
HUGE = rf"\*\*(?!{SMALL})|(\d{{3}}|[^\d\s])\s*!"
SECONDS = 2.0  # for an answer


def harmless(answer, entry):
    """May the scorer see this answer? '2*x**2 + C' yes, 'exit()' no."""
    right = (str(entry["answer"]).strip(), *entry["metadata"].get("valid_answers", ()))
    plain = re.fullmatch(PLAIN, answer, re.ASCII) and not re.search(HUGE, answer)
    short = len(answer) <= max(4096, 4 * len(right[0]))
    plain = plain or entry["metadata"].get("source_dataset") not in EVALS.split()
    return answer.strip() in right or (short and plain)


def score_each(pipe, parents):
    """The child: for each (task, answer, entry) it sends a score, "refused" or "raised"."""
    parents.close()  # so that recv ends when the parent has died
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the program around has set
    sys.stdout = sys.stderr = None
    with suppress(ValueError, OSError, TypeError):  # without it, the time limit still holds
        used = re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]
        resource.setrlimit(resource.RLIMIT_DATA, (2**32 + 1024 * int(used),) * 2)
    while items := pipe.recv():
        signal.alarm(60 + 2 * len(items))  # no orphan lives on
        for task, answer, entry in items:
            verdict = 0.0 if answer is None else "raised"
            with suppress(BaseException):  # SystemExit too, and what None raises
                data = dataset(task, 0, entry["metadata"].get("task_settings", "{}"))
                ok = harmless(answer, entry)
                verdict = float(data.score_answer(answer, entry)) if ok else "refused"
            pipe.send(verdict)
        signal.alarm(0)


@lru_cache(maxsize=1)
def scorer():
    """(process, pipe) of a child, forked. It never touches CUDA."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=score_each, args=(theirs, ours), daemon=True)
    child.start()
    theirs.close()
    return child, ours


def scores(items):
    """The tasks' own scores in [0, 1] of (task, answer, entry) items; 0 for None, and for what
    cannot be scored in SECONDS. Where an answer ends the child, a new child goes on behind it."""
    verdicts = []
    while len(verdicts) < len(items):
        child, pipe = scorer()
        try:
            with suppress(EOFError, OSError):  # the child has died
                pipe.send(items[len(verdicts) :])
                while len(verdicts) < len(items) and pipe.poll(SECONDS):
                    verdicts.append(pipe.recv())
        finally:
            if len(verdicts) < len(items):  # or interrupted: no late verdict for the next answer
                scorer.cache_clear()
                child.kill()
                verdicts.append("died")
    counts.update(verdict for verdict in verdicts if isinstance(verdict, str))
    return [x if isinstance(x, float) and 0 <= x <= 1 else 0.0 for x in verdicts]


def score(task, answer, entry) -> float:
    """The score of one answer."""
    return scores([(task, answer, entry)])[0]


# ------------------------------------------------------------------------------------ 12. models
def smoke_model(cfg):
    """The folder of the smoke mode's model, made by docs/tools/warm_start.py."""
    return SMOKE


@torch.no_grad()
def check_model(model):
    """Raises UserError unless the model is head(layers(embeddings)) with full causal attention."""
    if hasattr(model, "motg_checked"):
        return
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for each shape
    config, head = model.config, model.get_output_embeddings()
    other = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    full = not (other or getattr(config, "sliding_window", None))
    ids = torch.arange(10, device=model.device)[None] % config.vocab_size  # (1, 10)
    hidden = forward(model, ids, ids >= 0, transformers.DynamicCache(config=config))
    got, want = head(hidden), model(ids).logits
    same = full and (got - want).norm() < 0.1 * want.norm()  # bf16 rounds by about 0.01
    require(same, f"{type(model).__name__}; allowed: full attention, unscaled embeddings and head")
    model.motg_checked = True


def device_of(cfg):
    """The device of a run. Raises UserError, with torch.cuda's reason, where there is none."""
    if cfg.device == "cpu" or cfg.smoke and cfg.device == "auto" and not torch.cuda.is_available():
        return "cpu"
    with refusing("no CUDA GPU; allowed: --smoke, or --device cpu"):
        torch.cuda.init()  # raises where the driver is too old for this torch, say
    return "cuda"


def load_model(cfg, name=None):
    """An fp32 model (by default cfg.model), on its device, and its tokenizer. Raises UserError."""
    device = device_of(cfg)
    entry = dataset("chain_sum", 0)[0]
    require(score("chain_sum", entry["answer"], entry) == 1, "scoring does not work here")
    name = name or cfg.model or smoke_model(cfg)
    transformers.utils.logging.disable_progress_bar()
    with refusing(f"model {str(name)!r} cannot be loaded; allowed: a hub name or a folder"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.to(device)
    require(tokenizer.chat_template, f"{name}: no chat template; use an instruction-tuned model")
    need = cfg.max_prompt_tokens + cfg.max_new_tokens
    most = getattr(model.config, "max_position_embeddings", need)
    require(need <= most, f"max_prompt_tokens + max_new_tokens = {need}; {name} allows {most}")
    check_model(model)
    most = int((~tag_of(model, tokenizer).ends).sum(1).min())  # tokens that a mixture may hold
    require(cfg.k <= most, f"k = {cfg.k}; allowed: 1 to {most}")
    if model.num_parameters() < 10**7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # in a model this small, waking a thread costs more than it saves
    return model, tokenizer


def compute_dtype(model, cfg):
    """The dtype in which sampler and update compute; the master weights stay fp32."""
    on_gpu = model.device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    auto = cfg.precision == "auto" and fast and model.num_parameters() > 10**7
    return torch.bfloat16 if auto or cfg.precision == "bf16" else torch.float32


# ------------------------------------------------------------------------------------ 13. probes
def step_probes(r):
    """Means over thinking steps (entropies in nats) and over chains. A token that fills two slots
    counts once: `whole` is the sum of the weights w of all slots that hold the same token."""
    tokens, w = r.tokens[r.thinking], r.log_weights[r.thinking].exp()  # (N, k) both
    whole = ((tokens[..., None] == tokens[:, None]) * w[:, None]).sum(-1)  # (N, k)
    H = -(w * whole.clamp(min=1e-30).log()).sum(-1)  # (N,)
    fed = r.thinking[..., None] & (r.log_weights.exp() > 0)  # (B, T, k)
    values = {
        "entropy": r.entropy[r.thinking],
        "mixed": r.mixed[r.thinking],
        "weight_entropy": H,
        "support": H.exp(),
        "gini_simpson": 1 - (w * whole).sum(-1),
        "one_hot": whole.amax(-1) > 0.99,
        "distinct_tokens": torch.tensor([len(t[f].unique()) for t, f in zip(r.tokens, fed)]),
        "think_tokens": r.thinking.sum(1),
        "answer_tokens": (r.mask & ~r.thinking).sum(1),
        "truncated": ~r.eos.any(1),
    }
    return {name: x.float().mean().item() for name, x in values.items()}


def hidden_state_entropy(hidden):
    """Matrix-based (von Neumann) entropy of states (..., T, d), in [0, 1]: that of H H^T / T's
    eigenvalues (unit rows in H), over log min(T, d) (Giraldo et al. 2014; Skean et al. 2025)."""
    H, (T, d) = F.normalize(hidden.double(), dim=-1), hidden.shape[-2:]
    gram = H @ H.mT if T <= d else H.mT @ H  # the non-zero eigenvalues are the same
    entropy = torch.special.entr(torch.linalg.eigvalsh(gram / T).clamp(min=0)).sum(-1)
    entropy = entropy / math.log(max(min(T, d), 2))
    return entropy if entropy.dim() else entropy.item()


# ------------------------------------------------------------- 14. a run's folder, and evaluation
def begin(cfg):
    """What `train` needs. Raises UserError for what is wrong, before anything is written."""
    require(cfg.chains > 1, f"chains = {cfg.chains}; allowed: 2 or more, for GRPO compares them")
    device_of(cfg)
    path = Path(cfg.out, "trainer.pt")
    free = cfg.resume or not (path.exists() or path.with_name("config.json").exists())
    require(free and cfg.out, f"out = {cfg.out!r}; allowed: --resume, or a folder without a run")
    policy, tokenizer = load_model(cfg)
    reference = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_beta else None
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, 0.99), 1e-8, 0.1, fused=True)
    run = {"step": 0, "before": None, "metrics": "", "samples": ""}
    if path.exists():
        with refusing(f"{path} is damaged"):
            run = torch.load(path, map_location="cpu", weights_only=True)
            policy.load_state_dict(run.pop("model"))
            optimizer.load_state_dict(run.pop("optimizer"))
    sampler = copy.deepcopy(policy).requires_grad_(False).to(compute_dtype(policy, cfg))
    train_problem(cfg, tokenizer, 0)  # raises where there is none
    tests = test_problems(cfg, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(cfg, "config.json", json.dumps(vars(cfg) | {"resume": False}, indent=1))
    return policy, tokenizer, reference, sampler, optimizer, tests, run


def write(cfg, name, content):
    """Writes a file of a run's folder, never in part; --resume reads config.json and trainer.pt."""
    path = Path(cfg.out, name)
    new = path.with_suffix(".new")
    with refusing(f"{path} was not written; --resume goes on from the last checkpoint"):
        new.write_text(content) if isinstance(content, str) else torch.save(content, new)
        new.rename(path)


def readable(r, row, tokenizer):
    """A trajectory as a list of steps for JSON; a candidate is [text, weight, p]."""
    columns = r.representative, r.kind, r.thinking, r.entropy, r.tokens, r.log_weights.exp()
    columns = (x[row, : max(1, r.mask[row].sum())].tolist() for x in (*columns, r.log_pv.exp()))
    steps = []
    for y, kind, thinking, H, *candidates in zip(*columns):
        step = {"read": tokenizer.decode([y]), "kind": ("pad", "forced", "token", "mixed")[kind]}
        mixed = [[tokenizer.decode([v]), w, p] for v, w, p in zip(*candidates) if w]
        steps.append(step | {"thinking": thinking, "entropy": H, "candidates": mixed})
    return steps


def pass_at_k(n, c, k) -> float:
    """The chance that at least one of k chains is right, if c of n were (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@torch.no_grad()
def hidden_probe(model, r, chains=32):
    """Mean hidden-state entropy of the last layer, of the first `chains` thoughts."""
    ones = map(r.select, (r.thinking.sum(1) > 1).nonzero()[:chains])
    states = (completion_hidden(model, one, one.log_weights)[one.thinking] for one in ones)
    found = [hidden_state_entropy(thought) for thought in states]
    return sum(found) / max(1, len(found))


def evaluate(model, tokenizer, cfg, generator, tests, probes=False):
    """Of sampled chains: pass@k, the standard error of pass@1 over problems, the probes' means."""
    generator.manual_seed(cfg.seed)
    correct, means, G, n = [], Counter(), cfg.chains, len(tests)
    for part in (tests[i : i + 32] for i in range(0, n, 32)):  # the caches of 32 prompts fit
        r, parts = attempt(model, tokenizer, part, cfg, generator)
        correct += [int(row["correct"]) for row in parts]
        means.update({name: value * len(part) / n for name, value in step_probes(r).items()})
    right = [sum(correct[i : i + G]) for i in range(0, n * G, G)]  # of each problem
    if probes:
        means["hidden_entropy"] = hidden_probe(model, r)  # of the last problems
    found = {f"pass@{k}": sum(pass_at_k(G, c, k) for c in right) / n for k in range(1, G + 1)}
    found["stderr"] = torch.tensor(right).div(G).std().item() / n**0.5 if n > 1 else math.nan
    return {**found, **means, "problems": n}


def read_out(cfg):
    """`eval`: prints the accuracy and the probes of a model, and appends them to eval.jsonl."""
    model, tokenizer = load_model(cfg)
    model.to(compute_dtype(model, cfg))
    tests, generator = test_problems(cfg, tokenizer), torch.Generator(model.device)
    found = evaluate(model, tokenizer, cfg, generator, tests, probes=True)
    print(*(f"{name:16} {value:.4g}" for name, value in found.items()), sep="\n")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with Path(cfg.out, "eval.jsonl").open("a") as file:
        file.write(json.dumps(vars(cfg) | found) + "\n")


# ------------------------------------------------------------------------------ 15. command line
def config_of(command, given):
    """The Config of a command. Flags win over the settings of the run in --out (eval: --model)."""
    method = given.get("method", "dirichlet")
    out = f"runs/{command}-{method}-{given.get('seed', 0)}"
    folder = Path(given.get("model" if command == "eval" else "out", out))
    folder = folder.parent if folder.name == "checkpoint" else folder
    path = folder / "config.json"
    with refusing(f"{path} is damaged"):
        run = dict(json.loads(path.read_text())) if path.exists() else {}
    if "method" not in run:  # no run, or a model's own config.json
        return make_config(**{"out": out} | given)
    if command == "eval":  # a run's folder stands for its model
        given["model"] = str(folder / "checkpoint")
    if given.get("method", run["method"]) != run["method"]:
        for name in METHODS.get(run["method"], {}) | METHODS.get(method, {}):
            run.pop(name, None)
    return make_config(**run | given)


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    source = "".join(map(inspect.getsource, Config.__mro__[:-1]))
    comments = dict(re.findall(r"(\w+): .* = .*?  # (.*)", source))
    parser = argparse.ArgumentParser("motg.py", argument_default=argparse.SUPPRESS)
    parser.error = partial(require, False)  # one line, without argparse's usage
    parser.add_argument("command", choices=("train", "eval"))
    for name, kind, default in ((f.name, f.type, f.default) for f in fields(Config)):
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        how = {bool: {"action": "store_true"}, int: {"type": int}, float: {"type": float}}
        parser.add_argument(*flags, **how.get(kind, {}), help=f"{comments[name]} [{default}]")
    try:
        given = vars(parser.parse_args(argv))
        command = given.pop("command")
        {"train": train, "eval": read_out}[command](config_of(command, given))
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print("motg:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
