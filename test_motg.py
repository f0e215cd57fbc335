"""Tests of motg.py, each against a reference that is none of its code: enumeration, transformers'
own `generate` and eager forward pass, torch.distributions, the scorers called plainly, loops.

A statistical test has a fixed seed; drawn anew, it would fail by chance less than once in 10^8.
"""

# ruff: noqa: E402
import ast
import copy
import hashlib
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle, permutations, product
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import reasoning_gym
import tokenizers
import torch
import torch.nn.functional as F
import transformers

torch.set_num_threads(1)
import motg

cases, config, UserError = pytest.mark.parametrize, motg.make_config, motg.UserError
DRAWN = ("without-replacement", "with-replacement")
WEIGHTS = ("probability", "dirichlet", "uniform", "max", "posterior", "gumbel")
ENDS = ("representative", "most-likely", "entropy", "steps")
LOGPROBS = ("representative", "weighted", "exact")
INF = math.inf


def seeded(n):
    return torch.Generator().manual_seed(n)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


# ----------------------------------------------------------------------- models and tokenizers
def tokenizer_of(pieces, merges=(), special=("<eos>", "<end>")):
    """Byte-level BPE with these tokens and no others."""
    vocab = {piece: i for i, piece in enumerate(pieces.split())}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


# Pieces of the tag cut in many ways, tokens that swallow what follows it, two kinds of EOS.
PIECES = "< / > t h i n k a b c Ċ </ th in thin think >Ċ </think a> << b</think>a k></th think><"
MERGES = [("<", "/"), ("t", "h"), ("i", "n"), ("th", "in"), ("thin", "k"), (">", "Ċ")]
SMALL = tokenizer_of(f"{PIECES} ></think", MERGES)
PROMPTS = ["a<think>\n", "bath<think>\n", "c", "thinkabab<think>\n"]
FIVE = tokenizer_of("a b c", special=("<eos>", "</think>"))  # few enough to enumerate
EOS, TAG = FIVE.convert_tokens_to_ids(["<eos>", "</think>"])


def random_model(tokenizer, family="Qwen2", seed=3, head=1.0, **settings):
    """A random model as transformers makes it; a small `head` makes p flat."""
    torch.manual_seed(seed)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": False}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
    kind = getattr(transformers, f"{family}Config")(**shape | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(kind).eval()
    model.lm_head.weight.data.mul_(head)
    stops = [i for token, i in tokenizer.get_vocab().items() if token in ("<eos>", "<end>")]
    model.generation_config.eos_token_id = stops
    return model


def bigram(tokenizer, follow):
    """A model whose next token depends on the last alone: `follow` is {token: {next: p}}."""
    model, ids = random_model(tokenizer), tokenizer.convert_tokens_to_ids
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(len(tokenizer), 32))
    model.lm_head.weight.data.fill_(-30 / 32**0.5)  # a one-hot state is normed to sqrt(32)
    for last, nexts in follow.items():
        for token, p in nexts.items():
            model.lm_head.weight.data[ids(token), ids(last)] = math.log(p) / 32**0.5
    return model


def eager(model):
    """A copy with transformers' plainest attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


@pytest.fixture(scope="module")
def small():
    return random_model(SMALL)


# ---------------------------------------------------------------------- the law of what is drawn
Z = torch.tensor([1.2, 0.3, -0.4, 0.8, -1.5])  # logits of five tokens
P = (Z.double() / 0.7).softmax(-1)  # 0.51 0.14 0.05 0.29 0.01
TOP = [0, 3, 1]  # the three most likely
HAT = P[TOP] / P[TOP].sum()


def law_of(p, k, replace):
    """{ordered candidates: probability} of k draws from p; without replacement, Plackett-Luce."""
    orders = product(range(len(p)), repeat=k) if replace else permutations(range(len(p)), k)
    orders = list(orders)
    q = p[torch.tensor(orders)]  # (N, k)
    struck = 0.0 if replace else q.cumsum(1) - q
    return dict(zip(orders, (q / (1 - struck)).prod(1)))


def assert_law(outcomes, law):
    """Observed outcomes against {outcome: probability}, those that are expected ten times or more.

    A chi-square statistic with d degrees of freedom exceeds d + 2 sqrt(20 d) + 40 with odds below
    e^-20 = 2e-9 (Laurent and Massart 2000).
    """
    seen = Counter(outcomes)
    n = seen.total()
    expected = {outcome: float(p) * n for outcome, p in law.items() if p * n >= 10}
    assert set(seen) <= set(law) and n * 0.99 < sum(expected.values()) < n * 1.00001
    chi2 = sum((seen[outcome] - e) ** 2 / e for outcome, e in expected.items())
    assert chi2 <= len(expected) + 2 * math.sqrt(20 * len(expected)) + 40


def mixtures(n, aggregation, sampling="top-k", k=3, **settings):
    """n mixtures of the logits Z at temperature 0.7, and their weights."""
    cfg = config(sampling=sampling, aggregation=aggregation, k=k, temperature=0.7, **settings)
    m = motg.sample_mixture(Z.expand(n, -1), cfg, seeded(k))
    return m, m.log_weights.exp().double()


@cases("vocabulary", [5, 131, 300])
def test_draw_follows_p_into_its_tail(vocabulary):
    z = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(0, -1, vocabulary - 2)])
    z = z[torch.randperm(vocabulary, generator=seeded(1))]
    z[2] = -INF  # a token of probability 0 is never drawn
    drawn = motg.draw(z.log_softmax(-1).expand(100_000, -1), seeded(0)).tolist()
    assert_law(drawn, dict(enumerate(z.double().softmax(-1))))
    assert 2 not in drawn


@cases("k", [1, 2, 3])
@cases("sampling", DRAWN)
def test_law_of_drawn_candidates_and_the_first_is_the_representative(sampling, k):
    m, w = mixtures(100_000, "probability", sampling, k)
    assert_law(map(tuple, m.tokens.tolist()), law_of(P, k, sampling == "with-replacement"))
    assert torch.equal(m.representative, m.tokens[:, 0])
    assert torch.allclose(w, P[m.tokens] / P[m.tokens].sum(1, keepdim=True), atol=1e-5)


KEPT = """top-k 1 3 3|top-k 1 5 5|nucleus 0.3 5 1|nucleus 0.7 5 2|nucleus 0.99 2 2|nucleus 1 5 5
min-p 0.3 5 2|min-p 0.05 2 2|min-p 1 5 1""".replace("\n", "|").split("|")


@cases("case", KEPT)
def test_truncation_keeps_the_right_set_and_reads_one_of_it(case):
    """`case` is the rule, its limit, k and how many are kept."""
    sampling, limit, k, kept = case.split()
    k, chosen = int(k), [0, 3, 1, 2, 4][: int(kept)]
    how = {"sampling": sampling, "k": k, "top_p": float(limit), "min_p": float(limit)}
    m, _ = mixtures(50_000, "probability", **how)
    filled = m.tokens.masked_fill(m.log_weights == -INF, -1)
    assert (filled == torch.tensor(chosen + [-1] * (k - len(chosen)))).all()
    assert_law(m.representative.tolist(), {v: P[v] / P[chosen].sum() for v in chosen})


def test_weights_against_their_formulas():
    third = torch.full((3,), 1 / 3, dtype=torch.double)
    for aggregation, want in {"probability": HAT, "max": HAT, "uniform": third}.items():
        m, w = mixtures(100_000, aggregation)
        assert (w - want).abs().max() < 1e-6
        assert_law(m.representative.tolist(), dict(zip(TOP, want)))
    m, w = mixtures(100_000, "posterior", moi_beta=0.5)
    H, read = -(P * P.log()).sum() / math.log(5), m.tokens == m.representative[:, None]
    assert (w - (H * HAT + (1.5 - H) * read) / 1.5).abs().max() < 1e-6
    assert_law(m.representative.tolist(), dict(zip(TOP, HAT)))


@cases("tau", [0.1, 1.0])
def test_of_gumbel_weights_the_largest_is_read_an_exact_draw_from_p_hat(tau):
    m, w = mixtures(200_000, "gumbel", gumbel_tau=tau)
    assert torch.equal(m.representative, m.tokens.gather(1, w.argmax(1, keepdim=True))[:, 0])
    assert_law(m.representative.tolist(), dict(zip(TOP, HAT)))
    # tau log(w_0 / w_1) - log(p_0 / p_1) is logistic; Hoeffding: odds of a miss are 5e-10 each
    log_ratio = tau * (m.log_weights[:, 0] - m.log_weights[:, 1]).double()
    for at in (-2.0, 0.0, 1.0):
        above = (log_ratio - (HAT[0] / HAT[1]).log() > at).double().mean()
        assert abs(above - 1 / (1 + math.exp(at))) < 0.0075


@cases("c", [1e-5, 0.3, 1.0, 8.0, 1e6])
def test_dirichlet_weights_run_from_one_drawn_token_to_probability(c):
    """Hoeffding: odds of a miss above 0.0075, or of 0.015 where the range is 2, are 4e-10 each."""
    m, w = mixtures(200_000, "dirichlet", concentration=c)
    assert (w.mean(0) - HAT).abs().max() < 0.0075
    assert (((w - HAT) ** 2).mean(0) - HAT * (1 - HAT) / (c + 1)).abs().max() < 0.0075
    read = (m.tokens == m.representative[:, None]).double()
    assert (read - w).mean(0).abs().max() < 0.015  # read is a draw from Cat(w), whatever w
    assert ((read - w) * w).sum(1).mean().abs() < 0.015
    assert c > 1e-3 or (read - w).abs().mean() < 1e-3
    assert c < 1e5 or (w - HAT).abs().max() < 0.01  # 20 standard deviations


@cases("dtype", [torch.float32, torch.bfloat16])
def test_sharp_logits_and_tiny_concentrations_stay_finite(dtype):
    z = torch.tensor([[1e4, -1e4, 0, 0, 0], [1e4] * 5, [-1e4, 1e4, 1e4, -1e4, 3]])
    z = z.to(dtype).repeat(100, 1)
    for sampling, aggregation, c in product(motg.SAMPLING, WEIGHTS, (1e-6, 1.0, 1e4)):
        how = {"sampling": sampling, "aggregation": aggregation, "k": 3, "concentration": c}
        m = motg.sample_mixture(z, config(**how), seeded(0))
        read = (m.tokens == m.representative[:, None]) & (m.log_weights > -INF)
        assert read.any(1).all(), how  # one of those that were mixed
        assert torch.allclose(m.log_weights.exp().sum(1), torch.ones(300), atol=1e-4), how
        for logprob in LOGPROBS:
            score = motg.mixture_logprob(z, *m, config(**how, logprob=logprob))
            assert score.isfinite().all() and score.dtype == torch.float32, (how, logprob)


def test_mixture_embedding_against_loops_and_its_gradient_reaches_the_table():
    E = torch.randn(7, 4, generator=seeded(0), requires_grad=True)
    tokens = torch.tensor([[[0, 6, 2], [1, 1, 3]]])  # (1, 2, 3)
    log_w = torch.tensor([[[0.25, 0.0, 0.75], [0.2, 0.3, 0.5]]]).log()  # a slot is empty
    got = motg.mixture_embedding(E, tokens, log_w)
    want = torch.stack([0.25 * E[0] + 0.75 * E[2], 0.5 * E[1] + 0.5 * E[3]])
    assert torch.allclose(got[0], want, atol=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), E)
    assert torch.allclose(grad[:, 0], torch.tensor([0.25, 0.5, 0.75, 0.5, 0, 0, 0]))
    largest = torch.stack([E[[0, 2]].amax(0), E[[1, 3]].amax(0)])
    assert torch.equal(motg.mixture_embedding(E, tokens, log_w, "max")[0], largest)
    assert motg.mixture_embedding(E.bfloat16(), tokens, log_w).dtype == torch.bfloat16


# ------------------------------------------------------------------------- the score of a step
def scored(tokens, w, read=None, **settings):
    """Log-probs of steps (N, k), given as lists, under the logits Z at temperature 0.7."""
    tokens, w = torch.tensor(tokens), torch.as_tensor(w, dtype=torch.float)
    read = tokens[:, 0] if read is None else torch.tensor(read)
    cfg = config(**{"k": tokens.shape[1], "temperature": 0.7} | settings)
    return motg.mixture_logprob(Z.expand(len(tokens), -1), tokens, w.log(), read, cfg)


def test_the_distribution_is_float32_at_the_temperature():
    z = torch.randn(4, 300, generator=seeded(0)).bfloat16() * 5
    got, want = motg.token_distribution(z, 0.7), (z.double() / 0.7).log_softmax(-1)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, atol=1e-5)
    assert torch.allclose(motg.entropy_of(got).double(), -(want.exp() * want).sum(-1), atol=1e-4)


def test_representative_and_weighted_by_hand():
    step = [[1, 4, 2]], [[0.2, 0.3, 0.5]], [2]
    assert scored(*step).item() == pytest.approx(P[2].log().item(), rel=1e-5)
    want = 0.2 * P[1].log() + 0.3 * P[4].log() + 0.5 * P[2].log()
    assert scored(*step, logprob="weighted").item() == pytest.approx(want.item(), rel=1e-5)


def test_no_gradient_through_the_weights_of_the_weighted_logprob():
    log_w, z = torch.tensor([[0.3, 0.7]]).log().requires_grad_(), Z[None].clone().requires_grad_()
    step, cfg = (torch.tensor([[1, 2]]), log_w, torch.tensor([1])), config(logprob="weighted")
    motg.mixture_logprob(z, *step, cfg).sum().backward()
    assert z.grad.abs().max() > 0 and (log_w.grad is None or log_w.grad.abs().max() == 0)


@cases("x", [0.3, 1.0, 5.0])
def test_exact_density_of_drawn_weights_against_torch_distributions(x):
    w = torch.tensor([[0.5, 0.2, 0.3], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]], dtype=torch.double)
    concrete = torch.distributions.RelaxedOneHotCategorical(torch.tensor(x).double(), HAT)
    densities = {"dirichlet": torch.distributions.Dirichlet(x * HAT), "gumbel": concrete}
    how = {"logprob": "exact", "concentration": x, "gumbel_tau": x}
    for aggregation, law in densities.items():
        how["aggregation"], want = aggregation, law.log_prob(w)
        assert torch.allclose(scored([TOP] * 3, w, **how).double(), want, atol=1e-4)
        for sampling in DRAWN:  # candidates and weights were drawn
            got = scored([TOP] * 3, w, sampling=sampling, **how).double()
            order = law_of(P, 3, sampling == "with-replacement")[tuple(TOP)].log()
            assert torch.allclose(got, want + order, atol=1e-4)


RULES = [{}, {"logprob": "weighted"}, {"logprob": "exact"}]
RULES += [{"aggregation": "gumbel", "logprob": "exact"}]
DRAWS = [{"sampling": sampling, "logprob": "exact"} for sampling in DRAWN]


@cases("how", RULES)
def test_empty_slots_change_nothing(how):
    padded = scored([[0, 3, 0, 2]], [[0.3, 0.7, 0.0, 0.0]], **how)
    assert torch.allclose(scored([[0, 3]], [[0.3, 0.7]], **how), padded, atol=1e-5)


@cases("how", RULES + DRAWS)
def test_one_filled_slot_is_an_ordinary_token(how):
    for slot, token in enumerate([4, 1, 2, 3]):
        score = scored([[4, 1, 2, 3]], torch.eye(4)[slot, None], [token], **how)
        assert score.item() == pytest.approx(P[token].log().item(), rel=1e-5)


# ------------------------------------------------- whole trajectories, enumerated on five tokens
def weights_by_formula(p, tokens, y, cfg):
    """Weights (N, k) of tokens (N, k), when those read are y (N, 1)."""
    hat = p[tokens] / p[tokens].sum(1, keepdim=True)
    if cfg.aggregation == "uniform":
        return torch.full_like(hat, 1 / hat.shape[1])
    if cfg.aggregation == "posterior":
        H, read = -(p * p.log()).sum() / math.log(5), tokens == y
        read = read & (read.cumsum(1) == 1)  # the first slot that holds it
        return (H * hat + (cfg.moi_beta + 1 - H) * read) / (cfg.moi_beta + 1)
    return hat


def likeliest(p, cfg):
    """The candidates that a truncating rule keeps, by a loop."""
    p, kept = p.detach(), []
    for v in p.argsort(descending=True).tolist()[: cfg.k]:
        if cfg.sampling == "nucleus" and sum(p[u] for u in kept) >= cfg.top_p:
            break
        if cfg.sampling == "min-p" and p[v] < cfg.min_p * p.max():
            break
        kept.append(v)
    return tuple(kept)


def outcomes(p, cfg, t, thinking):
    """[(probability, tokens, weights, token read)] of all that can be drawn at step t, given p."""
    one, ends = torch.ones(1), {EOS} if cfg.end == "most-likely" else {EOS, TAG}
    sure = -(p * p.log()).sum() < cfg.mix_entropy
    if not thinking or sure or (cfg.mix_steps and t >= cfg.mix_steps):
        return [(p[v], (v,), one, v) for v in range(5)]
    if cfg.sampling in DRAWN:
        law = law_of(p, cfg.k, cfg.sampling == "with-replacement")
        mixed = [v for v in law if v[0] not in ends]
        q, read = [law[v] for v in mixed], [v[0] for v in mixed]
        found = [(p[v], (v,), one, v) for v in ends]
    else:
        tokens = likeliest(p, cfg)
        hat = p / p[[*tokens]].sum()
        hat = torch.full((5,), 1 / len(tokens)) if cfg.aggregation == "uniform" else hat
        found = [(hat[v], (v,), one, v) for v in tokens if v in ends]
        read = [v for v in tokens if v not in ends]
        q, mixed = hat[read], [tokens] * len(read)
        if cfg.aggregation != "posterior":  # which of them is read makes no difference
            q, read = q.sum(0, keepdim=True), read[:1]
    if read:
        w = weights_by_formula(p, torch.tensor(mixed), torch.tensor(read)[:, None], cfg)
        found += zip(q, mixed, w, read)
    return found


def trajectories(model, cfg, prompt):
    """[(probability, steps)] of all that can happen behind embeddings (n, d); with gradient."""
    table, found, live = model.get_input_embeddings().weight, [], [(1.0, [], prompt, True)]
    for t in range(cfg.max_new_tokens):
        logits = model(inputs_embeds=torch.stack([inputs for _, _, inputs, _ in live])).logits
        law, branches = (logits[:, -1] / cfg.temperature).softmax(-1), live
        live = []
        for p, (before, steps, inputs, thinking) in zip(law, branches):
            stops = {"most-likely": p.argmax() == TAG, "steps": t == cfg.end_steps}
            forced = thinking and stops.get(cfg.end, False)
            tag = [(torch.tensor(1.0), (TAG,), torch.ones(1), TAG)]
            for q, tokens, w, y in tag if forced else outcomes(p, cfg, t, thinking):
                so_far = [*steps, (list(tokens), w.tolist(), y, thinking)]
                if y == EOS or t + 1 == cfg.max_new_tokens:
                    found.append((before * q, so_far))
                    continue
                rows = table[list(tokens)]  # (k, d)
                mixed = rows.amax(0) if cfg.aggregation == "max" else w @ rows
                thinks = thinking and not (forced or y == TAG and cfg.end != "most-likely")
                live.append((before * q, so_far, torch.cat([inputs, mixed[None]]), thinks))
        if not live:
            break
    return found


def picked(r, rows):
    """Rows of a Rollout, its padding kept."""
    return motg.Rollout(*(x[rows] for x in r[:-1]), texts=[])


def by_hand(sample, found, k):
    """A Rollout of trajectories: its documented fields are set, the others 0."""
    ids, mask, *steps = picked(sample, torch.zeros(len(found), dtype=torch.long))[:-1]
    r = motg.Rollout(ids, mask, *map(torch.zeros_like, steps), texts=[])

    def filled_up(tokens, w, y, thinking, real=True):
        more = k - len(tokens)
        return tokens + [0] * more, w + [0.0] * more, y, thinking, real

    padding = filled_up([0], [1.0], 0, False, False)
    rows = [[filled_up(*step) for step in steps] for _, steps in found]
    rows = [row + [padding] * (3 - len(row)) for row in rows]
    tokens, w, y, thinking, real = (
        torch.tensor([[step[i] for step in row] for row in rows]) for i in range(5)
    )
    known = {"representative": y, "thinking": thinking, "mask": real, "sampled": real}
    return r._replace(tokens=tokens, log_weights=w.log(), **known)


def what_happened(r, cfg):
    """For each row a key, which two rows share if and only if they are the same trajectory."""
    filled = (r.log_weights > -INF) & r.mask[..., None]
    keys = r.tokens.masked_fill(~filled, -1).sort(-1).values  # (B, T, k)
    if cfg.aggregation == "posterior":  # the token read has shaped the weights
        keys = torch.cat([keys, r.representative.masked_fill(~r.mask, -1)[..., None]], -1)
    return [tuple(key) for key in keys.flatten(1).tolist()]


ESTIMATORS = {"0 passes": {}, "1 pass": {"weight_passes": 1}, "2 passes": {"weight_passes": 2}}
ESTIMATORS |= {logprob: {"logprob": logprob} for logprob in LOGPROBS[:2]}
ALL = [{"sampling": s, "aggregation": a} for s in motg.SAMPLING for a in WEIGHTS[0::2] + ("max",)]
MORE = [{"end": "most-likely"}, {"end": "steps"}, {"mix_steps": 1}, {"mix_entropy": 1.5}]
ALL += [how | {"aggregation": a} for how in MORE for a in ("probability", "posterior")]


@cases("how", ALL)
def test_whole_trajectories_their_exact_scores_frequencies_and_policy_gradient(how):
    """Scores are log P(a), sum to 1, and sum_a P(a) R(a) grad log P(a) = grad E[R], R random.

    Where weights are made of p that takes T - 1 = 2 passes, and other scores never give it:
    `pytest -s -k gradient` shows a table.
    """
    drawn, found = how.get("sampling") in DRAWN, {}
    how = {"k": 2 if drawn else 4, "chains": 8000, "top_p": 0.7, "min_p": 0.6, "end_steps": 1} | how
    how |= {"temperature": 0.8, "max_new_tokens": 3}
    cfg = config(**how, logprob="exact")
    model = random_model(FIVE, seed=9 if cfg.end == "most-likely" else 10, head=0.25)
    twin, sample = eager(model), motg.rollout(model, FIVE, ["ab"], cfg, seeded(0))
    inputs = twin.get_input_embeddings()(torch.tensor(FIVE.encode("ab")))
    every = trajectories(twin, cfg, inputs)
    P, r = torch.stack([q for q, _ in every]), by_hand(sample, every, cfg.k)
    keys, seen = what_happened(r, cfg), what_happened(sample, cfg)
    if drawn:  # thousands, more than can be met; those of likely candidates are expected 20 times
        assert len(set(keys)) > 900 and set(seen) <= set(keys)
    else:
        assert_law(seen, dict(zip(keys, P.tolist())))
        r = picked(sample, torch.tensor([seen.index(key) for key in keys]))
    R = torch.rand(len(P), generator=seeded(0))
    R = R - (P * R).sum().detach()
    if not P.requires_grad:  # one candidate is left at each step: nothing is drawn
        assert (motg.rollout_logprobs(model, r, cfg).sum(1) - P.log()).abs().max() < 1e-4
        return
    want = flat(torch.autograd.grad((P * R).sum(), twin.parameters()))
    for name, more in ESTIMATORS.items():
        score = motg.rollout_logprobs(model, r, config(**how, **{"logprob": "exact"} | more)).sum(1)
        if "pass" in name:
            assert torch.allclose(score, P.log(), atol=1e-3)
            assert score.double().exp().sum().item() == pytest.approx(1, abs=1e-4)
        got = flat(torch.autograd.grad((P.detach() * R * score).sum(), model.parameters()))
        found[name] = relative_error(got, want)
        cosine = F.cosine_similarity(got, want, dim=0).item()
        print(f"{cfg.sampling:20} {cfg.aggregation:12} {name:15} {cosine:.4f} {found[name]:.1e}")
    of_p = cfg.aggregation in ("probability", "posterior")
    assert found["2 passes"] < 1e-5 and (of_p or found["0 passes"] < 1e-5)
    if drawn:
        assert not of_p or found["0 passes"] > found["1 pass"] > 1e-3
        assert min(found["representative"], found["weighted"]) > 0.05


@cases("aggregation", ["probability", "uniform", "dirichlet", "gumbel"])
def test_the_designs_example_of_a_closing_step(aggregation):
    """p = (.4, .3, .2, .1) and k = 2: the tag is drawn with .571 (.5 if uniform), so it scores."""
    model = bigram(FIVE, {"b": {"</think>": 0.4, "c": 0.3, "<eos>": 0.2, "a": 0.1}})
    how = {"temperature": 1.0, "chains": 20_000, "max_new_tokens": 1, "logprob": "exact"}
    r = motg.rollout(model, FIVE, ["ab"], config(aggregation=aggregation, **how), seeded(0))
    closed, want = r.representative[:, 0] == TAG, 0.5 if aggregation == "uniform" else 4 / 7
    assert abs(closed.double().mean() - want) < 0.024  # Hoeffding: odds of a miss are 2e-10
    assert torch.allclose(r.logprob[closed], torch.tensor(want).log(), atol=1e-4)


@cases("aggregation", ["dirichlet", "gumbel"])
def test_drawn_weights_end_a_thought_as_often_as_the_score_of_that_event_says(aggregation):
    """Of rows that still think, the share that ends is the mean of p^, their score that of y."""
    how = {"k": 4, "temperature": 0.8, "max_new_tokens": 3, "logprob": "exact", "chains": 15_000}
    cfg = config(aggregation=aggregation, concentration=2.0, gumbel_tau=0.5, **how)
    model = random_model(FIVE, seed=10, head=0.25)
    r = motg.rollout(model, FIVE, ["ab"], cfg, seeded(0))
    table = model.get_input_embeddings().weight
    mixed = (r.log_weights.exp()[..., None] * table[r.tokens]).sum(-2)  # (B, T, d)
    with torch.no_grad():
        z = eager(model)(inputs_embeds=torch.cat([table[r.prompt_ids], mixed], 1)).logits
    p = (z[:, 1:-1] / 0.8).softmax(-1)  # (B, T, V) of each step
    top, tokens = p.topk(4)
    hat = torch.zeros_like(p).scatter(-1, tokens, top / top.sum(-1, keepdim=True))
    for t, end in product(range(3), (EOS, TAG)):
        thinks, ends = r.thinking[:, t], r.thinking[:, t] & (r.representative[:, t] == end)
        gap = ends[thinks].double() - hat[thinks, t, end]  # Hoeffding: odds of a miss e^-22 each
        assert abs(gap.mean()) < math.sqrt(11 / len(gap)) and len(gap) > 1000 and ends.sum() > 100
        assert torch.allclose(r.logprob[ends, t].exp(), hat[ends, t, end], atol=1e-4)


# ------------------------------------------------------------------------------------ rollouts
def plain_logprobs(model, r, cfg):
    """What rollout_logprobs should give: row by row, no padding, no cache, no chunks."""
    table, scores = model.get_input_embeddings().weight, torch.zeros(r.mask.shape)
    for b, n in enumerate(r.mask.sum(1).tolist()):
        step = [x[b, :n] for x in (r.tokens, r.log_weights, r.representative)]
        w, vectors = step[1].exp()[..., None], table[step[0]]  # (n, k, 1), (n, k, d)
        mixed = (w * vectors).sum(1)
        if cfg.aggregation == "max":
            mixed = vectors.masked_fill(w == 0, -INF).amax(1)
        x = torch.cat([table[r.prompt_ids[b][r.prompt_mask[b].bool()]], mixed])
        z = model(inputs_embeds=x[None]).logits[0, -n - 1 : -1]
        scores[b, :n] = motg.mixture_logprob(z, *step, cfg) * r.sampled[b, :n]
    return scores


def check_rollout(r, tokenizer, cfg):
    """What holds of every rollout."""
    (B, T), n, filled = r.mask.shape, r.mask.sum(1), r.log_weights > -INF
    assert r.tokens.shape == r.log_weights.shape == (B, T, cfg.k) and len(r.texts) == B
    assert torch.equal(r.mask, torch.arange(T) < n[:, None])
    assert not ((r.sampled | r.thinking) & ~r.mask).any()
    assert r.logprob.isfinite().all() and (r.logprob[~r.sampled] == 0).all()
    read = (r.tokens == r.representative[..., None]) & filled
    assert read.any(-1)[r.mask].all()  # what is read was mixed
    assert (filled.sum(-1) == 1)[~(r.thinking & r.sampled)].all()  # all else is one-hot
    stops = set(tokenizer.convert_tokens_to_ids(["<eos>", "<end>"]))
    for b, row in enumerate(r.representative.tolist()):
        ids = row[: n[b]]
        ended = ids[-1] in stops
        assert not stops & set(ids[:-1]) and (ended or len(ids) == cfg.max_new_tokens)
        assert r.texts[b] == tokenizer.decode(ids[:-1] if ended else ids)
        if cfg.end == "representative":  # a thought ends where its text completes the tag
            closed = [t for t in range(1, len(ids)) if "</think>" in tokenizer.decode(ids[:t])]
            assert r.thinking[b].sum() == (closed or [len(ids)])[0], r.texts[b]


@cases("how", [{"method": "single"}, {"sampling": "nucleus", "top_p": 1e-6, "k": 3}])
def test_greedy_rows_equal_transformers_generate_for_prompts_of_any_length(small, how):
    """By a tiny temperature, or while thinking by a nucleus of one candidate at temperature 1."""
    one = "method" in how
    cfg = config(**how, temperature=1e-6 if one else 1.0, chains=2, max_new_tokens=12)
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
    check_rollout(r, SMALL, cfg)
    for i, prompt in enumerate(PROMPTS):
        x = SMALL(prompt, return_tensors="pt", return_token_type_ids=False)
        want, n = small.generate(**x, do_sample=False, max_new_tokens=12), x.input_ids.shape[1]
        for row in (2 * i, 2 * i + 1):  # the chains of a prompt are adjacent
            m = (r.mask if one else r.thinking)[row]
            assert torch.equal(r.representative[row][m], want[0, n : n + m.sum()]) and m.sum() > 1
            assert torch.equal(r.prompt_ids[row, -n:], x.input_ids[0])
            assert r.prompt_mask[row].sum() == r.prompt_mask[row, -n:].sum() == n


@cases("method", motg.METHODS)
def test_recomputed_logprobs_equal_a_plain_decoder_row_by_row(small, method):
    """But `exact` where the candidates follow from p: that is enumerated above."""
    how = {"soft-grpo": {"logprob": "weighted"}, "lepo": {"k": 8}}.get(method, {})
    cfg = config(method, chains=3, max_new_tokens=12, temperature=0.8, **how)
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
    check_rollout(r, SMALL, cfg)
    with torch.no_grad():
        got, want = motg.rollout_logprobs(small, r, cfg), plain_logprobs(eager(small), r, cfg)
        assert torch.allclose(got, want, atol=1e-3) and torch.allclose(got, r.logprob, atol=1e-3)
        for micro_batch in (1, 5):
            part = motg.rollout_logprobs(small, r, cfg, micro_batch=micro_batch)
            assert torch.allclose(part, got, atol=1e-4)


@cases("end", ENDS)
@cases("sampling", motg.SAMPLING)
def test_sampled_logprobs_equal_recomputed_ones_for_every_combination(small, sampling, end):
    how = {"sampling": sampling, "end": end, "end_steps": 3, "end_patience": 2, "end_entropy": 2.5}
    how |= {"top_p": 0.8, "min_p": 0.2, "concentration": 2.0, "chains": 3, "max_new_tokens": 7}
    scores, forced, answers = [{"logprob": logprob} for logprob in LOGPROBS], 0, 0
    scores += [{"logprob": "exact", "mix_steps": 2}, {"logprob": "exact", "mix_entropy": 2.2}]
    for i, (aggregation, score) in enumerate(product(WEIGHTS, scores)):
        cfg = config(aggregation=aggregation, **how | score)
        r = motg.rollout(small, SMALL, PROMPTS[:2], cfg, seeded(i))
        check_rollout(r, SMALL, cfg)
        with torch.no_grad():
            again = motg.rollout_logprobs(small, r, cfg)
        # a density is as steep as its log-weights are long
        steep = 1 + r.log_weights.nan_to_num(neginf=0.0).abs().amax(-1) * (cfg.logprob == "exact")
        assert ((again - r.logprob).abs() <= 1e-4 * steep).all(), cfg
        forced += int((r.mask & ~r.sampled).sum())
        answers += int((r.mask & ~r.thinking).sum())
    assert answers > 20 and (forced > 0) == (end != "representative")


@cases("logprob", LOGPROBS)
@cases("gate", [{"mix_steps": 3}, {"mix_entropy": 2.2}])
def test_a_gated_step_is_an_ordinary_token(small, gate, logprob):
    """One-hot, drawn from the whole vocabulary, and scored log p(y)."""
    cfg = config("dirichlet", chains=100, max_new_tokens=6, logprob=logprob, **gate)
    r = motg.rollout(small, SMALL, PROMPTS[:1], cfg, seeded(0))
    check_rollout(r, SMALL, cfg)
    gated = r.entropy < 2.2 if "mix_entropy" in gate else torch.arange(6) >= 3
    gated, mixed = gated & r.thinking, ~gated & r.thinking
    filled = (r.log_weights > -INF).sum(-1)
    assert (filled[gated] == 1).all() and (filled[mixed] == 2).sum() > 50
    assert len(set(r.representative[gated].tolist())) > 8
    want = plain_logprobs(eager(small), r, config("dirichlet"))
    assert torch.allclose(r.logprob[gated], want[gated], atol=1e-3)


@cases("family", ["Qwen2", "Llama", "Qwen3"])
def test_a_model_works_as_transformers_loads_it(family, tmp_path):
    how = {"num_hidden_layers": 2, "tie_word_embeddings": family == "Qwen3"}
    random_model(SMALL, family, **how).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    twin, cfg = eager(model), config("different-tokens", chains=2, max_new_tokens=8)
    r = motg.rollout(model, SMALL, PROMPTS, cfg, seeded(0))
    got, want = motg.rollout_logprobs(model, r, cfg), plain_logprobs(twin, r, cfg)
    assert torch.allclose(got, want, atol=1e-3) and torch.allclose(r.logprob, want, atol=1e-3)
    got = torch.autograd.grad(got.sum(), model.parameters())
    want = torch.autograd.grad(want.sum(), twin.parameters())
    assert relative_error(flat(got), flat(want)) < 1e-4


REFUSED = {"Mistral": {"sliding_window": 4}, "Gemma2": {}, "Granite": {"logits_scaling": 8.0}}
REFUSED |= {"Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}}


@cases("family", REFUSED)
def test_sliding_windows_and_scaled_heads_are_refused_in_one_line(family):
    model = random_model(SMALL, family, **REFUSED[family])
    with pytest.raises(UserError, match=f"^{family}[^\n]*$"):
        motg.rollout(model, SMALL, PROMPTS, config(chains=2, max_new_tokens=8), seeded(0))


def test_a_decoding_step_reads_no_value_of_a_tensor(small):
    """On the device `meta` tensors have no values: code that asks for one raises there.

    On a GPU it would wait for it, and could not be recorded as a graph, which also needs every
    tensor to stay where it is. The model is in bf16, what is scored in float32.
    """
    model = copy.deepcopy(small).bfloat16().to("meta")
    ids = torch.ones(2, 6, dtype=torch.long, device="meta")
    how = {"logprob": "exact", "mix_steps": 3, "mix_entropy": 0.1, "max_new_tokens": 8}
    rules = list(product(WEIGHTS, motg.SAMPLING))[::3]  # each weight, sampling and end
    for (aggregation, sampling), end in zip(rules, cycle(ENDS)):
        cfg = config(aggregation=aggregation, sampling=sampling, end=end, **how)
        with torch.no_grad():
            model.set_attn_implementation("eager")  # to read a prompt, sdpa looks at its mask
            decoder = motg.Decoder(model, SMALL, ids, ids.bool(), cfg, None)
            model.set_attn_implementation("sdpa")
            decoder.step()
            before = {n: x for n, x in vars(decoder).items() if isinstance(x, torch.Tensor)}
            decoder.step()
        assert all(vars(decoder)[name] is tensor for name, tensor in before.items())
        kinds = {x.dtype for x in decoder.record.values() if x.is_floating_point()}
        assert kinds == {torch.float32} and decoder.logits.dtype == torch.bfloat16


# ---------------------------------------------------------------------- the end of a thought
def test_tag_table_agrees_with_searching_the_decoded_text():
    """`</`, `think`, `>\\n`: by ids the tag would be missed, and `>` would end any thought."""
    assert SMALL.convert_ids_to_tokens(SMALL.encode("</think>\n")) == ["</", "think", ">Ċ"]
    table, rng, hits = motg.tag_table(SMALL, len(SMALL) + 7), random.Random(0), 0
    texts = [SMALL.decode([i]) for i in range(len(SMALL))]
    pieces = [i for i, text in enumerate(texts) if set(text) & set("<>/") or text in "</think>"]
    for _ in range(5000):
        state, ids = 0, []
        while state < 8 and len(ids) < 6:
            ids.append(rng.choice(pieces) if rng.random() < 0.95 else rng.randrange(len(texts)))
            state = int(table[state, ids[-1]])
            assert (state == 8) == ("</think>" in SMALL.decode(ids)), SMALL.decode(ids)
        hits += state == 8
    assert hits > 50


SCRIPTS = """3 </ think >Ċ b <eos>|5 > b </ think >Ċ c <end>|2 </think > c <eos>
1 b</think>a c <eos>
3 << / think>< c <eos>|5 < </ th in k></th c <eos>|5 </ think a> c <eos>|2 </ <eos>|1 <end>
3 b </think ></think > c <eos>""".replace("\n", "|").split("|")


@cases("script", SCRIPTS)
def test_a_thought_ends_where_its_text_completes_the_tag(script):
    """`script` is the number of its steps and what the model says for certain."""
    n, *said = script.split()
    follow = {a: {b: 1.0} for a, b in zip(["a", *said], said)}
    cfg = config(chains=2, max_new_tokens=9, temperature=1.0)
    r = motg.rollout(bigram(SMALL, follow), SMALL, ["a", "bba"], cfg, seeded(0))
    assert all(SMALL.convert_ids_to_tokens(row) == said for row in r.representative)
    assert r.mask.all() and r.sampled.all() and (r.thinking.sum(1) == int(n)).all()
    filled = (r.log_weights > -INF).sum(-1)  # the step that completes the tag is one token
    assert (filled[:, int(n) - 1 :] == 1).all() and (filled[:, : int(n) - 1] == 2).all()


FORCED = [("entropy", 3, 0.5, 6), ("entropy", 2, 0.5, 2), ("entropy", 1, 0.8, 1)]
FORCED += [("steps", 1, 0.0, 1), ("steps", 5, 0.0, 5)]


@cases("method", ["dirichlet", "different-tokens"])
@cases("end, n, below, at", FORCED)
def test_entropy_and_steps_force_the_tag_without_a_loss(method, end, n, below, at):
    """The tag is written at step `at`, its tokens one-hot, unsampled, without a log-prob."""
    follow = {"t": "i", "i": "n", "n": "ab", "a": "k", "b": "k", "k": "h", "h": "c"}
    follow = {last: {v: 1 / len(vs) for v in vs} for last, vs in follow.items()}
    follow |= {">": {"<end>": 0.5, "in": 0.5}, "in": {"<eos>": 1.0}}
    model = bigram(SMALL, follow)  # from t on the entropies are 0, 0, log 2, 0, 0, 0
    how = {"end": end, "end_entropy": below, "end_patience": n, "end_steps": n, "chains": 20}
    cfg = config(method, max_new_tokens=12, temperature=1.0, **how)
    r = motg.rollout(model, SMALL, ["t"], cfg, seeded(0))
    check_rollout(r, SMALL, cfg)
    tag, t = torch.tensor(SMALL.encode("</think>")), torch.arange(r.mask.shape[1])
    here = (t >= at) & (t < at + len(tag)) & r.mask
    assert (r.representative[:, at : at + len(tag)] == tag).all()
    assert torch.equal(r.mask & ~r.sampled, here) and (r.logprob[here] == 0).all()
    assert torch.equal(r.thinking, (t < at + len(tag)) & r.mask)
    assert {text.partition("</think>")[2] for text in r.texts} == {"", "in"}


@cases("p, ends", [(0.6, True), (0.4, False)])
def test_most_likely_ends_by_the_argmax_and_only_by_it_without_a_loss(p, ends):
    follow = {"a": {"</think": 1.0}, "</think": {">": p, "b": 1 - p}, ">": {"c": 1.0}}
    model = bigram(SMALL, follow | {"b": {"c": 1.0}, "c": {"<eos>": 1.0}})
    for logprob in LOGPROBS:
        how = {"end": "most-likely", "logprob": logprob, "chains": 100, "max_new_tokens": 5}
        r = motg.rollout(model, SMALL, ["a"], config(temperature=1.0, **how), seeded(0))
        check_rollout(r, SMALL, config(**how))
        assert ((r.thinking.sum(1) == 2) == ends).all()
        assert {"</think>" in text for text in r.texts} == ({True} if ends else {True, False})
        assert (r.sampled[:, 1] != ends).all() and r.sampled[:, 0].all()


# ---------------------------------------------------------------------------------------- GRPO
def test_advantages_by_hand():
    rewards = [[1.0, 0.0, 0.0, 3.0], [0.3, 0.3, 0.3, 0.3], [2.0, 2.0, 2.0, 2.1]]
    for row, got in zip(rewards, motg.group_advantages(torch.tensor(rewards)).tolist()):
        mean = sum(row) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / 3)
        assert got == pytest.approx([(x - mean) / (std + 1e-4) for x in row], abs=2e-3)


@cases("with_reference", [True, False])
@cases("average", ["chain", "token"])
def test_loss_by_hand(average, with_reference):
    new, old, ref = (-2 * torch.rand(4, 6, generator=seeded(seed)) for seed in range(3))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0], mask[1, :2], mask[2, [0, 2, 3]] = True, True, True
    cfg = config(loss_average=average, kl_beta=0.3, clip=0.2, max_new_tokens=50)
    A, want = [1.5, -0.7, -2.0, 1.0], 0.0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(new[b, t] - old[b, t])
        log_r = (ref[b, t] - new[b, t]).item() if with_reference else 0.0
        gain = min(ratio * A[b], min(max(ratio, 0.8), 1.2) * A[b])
        count = {"chain": 4 * int(mask[b].sum()), "token": 11}[average]
        want += (0.3 * (math.exp(log_r) - log_r - 1) - gain) / count
    for hidden in (0.0, INF):  # what the mask hides does not matter
        x, reference = new.masked_fill(~mask, hidden), ref if with_reference else None
        loss, _ = motg.grpo_loss(x, old, reference, torch.tensor(A), mask, cfg)
        assert loss.item() == pytest.approx(want, rel=1e-5)


def updated(model, reference, r, A, cfg):
    """The log of an update, and the gradient: what plain descent at rate 1 has subtracted."""
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    log = motg.update(policy, reference, optimizer, r, A, cfg, 1.0)
    return log, flat(model.parameters()) - flat(policy.parameters())


UPDATES = [{"method": "dirichlet"}, {"method": "different-tokens", "loss_average": "token"}]
UPDATES += [{"method": "different-tokens"}, {"method": "single", "kl_beta": 0.0}]


@cases("how", UPDATES)
def test_an_update_is_the_gradient_of_the_whole_batch_by_hand(small, how):
    """Every row on its own, by transformers, in one sum; whatever the micro-batch."""
    how = {"kl_beta": 0.5, "chains": 6, "max_new_tokens": 10, "grad_clip": 1e9} | how
    cfg, policy = config(**how), eager(small)
    reference = eager(random_model(SMALL, seed=9))
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(1))
    A = torch.randn(24, generator=seeded(2))
    new = plain_logprobs(policy, r, cfg)
    log_r = plain_logprobs(reference, r, cfg).detach() - new if cfg.kl_beta else 0.0 * new
    count = {"chain": r.sampled.sum(1, keepdim=True) * 24, "token": r.sampled.sum()}
    w, k3 = r.sampled / count[cfg.loss_average], log_r.exp() - log_r - 1
    loss = (w * (cfg.kl_beta * k3 - (new - new.detach()).exp() * A[:, None])).sum()
    want = flat(torch.autograd.grad(loss, policy.parameters()))
    for micro_tokens in (1, 40, 10**9):
        part = config(**how, micro_tokens=micro_tokens)
        log, grad = updated(small, reference if cfg.kl_beta else None, r, A, part)
        assert relative_error(grad, want) < 1e-3
        assert log["grad_norm"] == pytest.approx(want.norm().item(), rel=1e-3)
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-3)
        assert log["kl"] == pytest.approx((w * k3).sum().item(), rel=1e-3, abs=1e-6)


def test_a_micro_batch_holds_its_tokens_where_prompts_are_long(small, monkeypatch):
    """Of 12 prompts of 80 tokens and more, 6 chains of 5 steps each; a prompt may be split."""
    cfg = config(chains=6, max_new_tokens=5, micro_tokens=300)
    r = motg.rollout(small, SMALL, ["ab" * 40 + "c" * i for i in range(12)], cfg, seeded(0))
    sizes, scored = [], motg.rollout_logprobs

    def watched(model, part, cfg):
        prompts = len(torch.unique(part.prompt_mask.sum(1)))
        sizes.append(prompts * part.prompt_mask.shape[1] + part.mask.numel())
        return scored(model, part, cfg)

    monkeypatch.setattr(motg, "rollout_logprobs", watched)
    updated(small, None, r, torch.ones(72), cfg)
    assert len(sizes) > 3 and max(sizes) <= 300 + r.prompt_mask.shape[1]


def test_at_the_first_step_the_ratio_is_one_and_the_kl_zero_in_bf16_too(small):
    """A bf16 copy samples, autocast scores, and the gradient is the float32 weights'."""
    grads, A = [], torch.randn(24, generator=seeded(5))
    how = {"chains": 6, "max_new_tokens": 10, "grad_clip": 1e9, "micro_tokens": 40}
    for precision, kind, low, high in (
        ("fp32", torch.float32, 0, 1e-5),
        ("bf16", torch.bfloat16, 1e-4, 0.1),
    ):
        cfg = config(precision=precision, **how)
        assert motg.compute_dtype(small, cfg) == kind
        r = motg.rollout(copy.deepcopy(small).to(kind), SMALL, PROMPTS, cfg, seeded(0))
        assert r.logprob.dtype == r.log_weights.dtype == torch.float32
        log, _ = updated(small, copy.deepcopy(small), r, A, cfg)
        assert log["kl"] == 0 and log["clipped"] == 0 and low <= log["sampler_gap"] < high
        assert log["loss"] == pytest.approx(-A.mean().item(), abs=1e-5)
        same = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
        grads.append(updated(small, None, same, A, cfg)[1])
    assert 1e-4 < relative_error(*reversed(grads)) < 0.1


def test_a_large_vocabulary_is_scored_in_chunks_with_the_same_values_and_gradients():
    """With 2^19 tokens the float32 logits of 36 steps are 72 MiB."""
    how = {"vocab_size": 2**19, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    model, sizes = random_model(SMALL, **how), []
    cfg = config(chains=6, max_new_tokens=6, logprob="weighted", precision="fp32")
    r = motg.rollout(model, SMALL, ["a"], cfg, seeded(0))
    twin, factors = eager(model), torch.rand(6, 6, generator=seeded(1))
    model.lm_head.register_forward_hook(lambda head, x, out: sizes.append(out.numel()))
    got, want = motg.rollout_logprobs(model, r, cfg), plain_logprobs(twin, r, cfg)
    assert r.sampled.all() and torch.allclose(got, want, atol=1e-3) and max(sizes) <= 2**24
    got = torch.autograd.grad((got * factors).sum(), model.parameters())
    want = torch.autograd.grad((want * factors).sum(), twin.parameters())
    assert relative_error(flat(got), flat(want)) < 1e-4


def test_log_probabilities_read_each_prompt_once_for_its_chains(small):
    cfg, seen = config(chains=6, max_new_tokens=10), []
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(3))
    first = small.model.layers[0]
    hook = first.register_forward_hook(
        lambda layer, args, out: seen.append(args[0][..., 0].numel())
    )
    motg.rollout_logprobs(small, r, cfg)
    hook.remove()
    assert sum(seen) == 4 * r.prompt_mask.shape[1] + r.mask.numel()  # tokens that layer saw


# --------------------------------------------------------------------------------- a new rule
def logistic_normal(log_hat, cfg, generator=None):
    """log w, w = softmax(log p^ + noise), but for a constant."""
    return log_hat + torch.empty_like(log_hat).normal_(generator=generator)


def logistic_normal_logdensity(log_hat, log_w, filled, cfg):
    """The density of such w: a Gaussian's, of log(w / p^) less its mean; and 1 / prod_i w_i."""
    n = filled.sum(-1)  # (...)
    noise = (log_w - log_hat) * filled  # (..., k) but for a constant
    noise = (noise - noise.sum(-1, keepdim=True) / n[..., None]) * filled
    constant = (n - 1) * math.log(2 * math.pi) + n.log()
    return -(noise.square().sum(-1) + constant) / 2 - (log_w * filled).sum(-1)


def test_a_researchers_new_rule_has_its_density_and_is_rolled_out_and_scored(monkeypatch, small):
    rule = motg.Rule(logistic_normal, logistic_normal_logdensity)
    monkeypatch.setitem(motg.AGGREGATION, "logistic-normal", rule)
    how = {"aggregation": "logistic-normal", "logprob": "exact", "k": 3, "temperature": 0.7}
    x = torch.linspace(-14, 14, 281)  # a grid of log(w_1 / w_3) and log(w_2 / w_3)
    w = torch.cartesian_prod(x, x, torch.zeros(1)).softmax(-1).clamp(min=1e-30)
    density = scored([TOP] * len(w), w, **how).double().exp()
    mass = density * w.double().prod(1) * 0.1**2  # dw_1 dw_2 = w_1 w_2 w_3 dx_1 dx_2
    _, drawn = mixtures(200_000, "logistic-normal")
    assert mass.sum().item() == pytest.approx(1, abs=1e-4)
    for power in (1, 2):  # Hoeffding: odds of a miss above 0.0075 are 3e-10 each
        gap = (mass[:, None] * w**power).sum(0) - (drawn**power).mean(0)
        assert gap.abs().max() < 0.0075
    cfg = config(**how, chains=10, max_new_tokens=8)
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
    check_rollout(r, SMALL, cfg)
    assert torch.allclose(motg.rollout_logprobs(small, r, cfg), r.logprob, atol=1e-3)


# ------------------------------------------------------------------------------------- what all use
CLI_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CLI_CHATML += "{% endfor %}{{ '<|im_start|>assistant\n' }}"
CLI_NO_SYSTEM = "{{ raise_exception('no such role') if messages[0].role == 'system' }}" + CLI_CHATML


def cli_tokenizer(template=CLI_CHATML):
    """A token for each byte, and two special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.ByteLevelBPETokenizer({byte: i for i, byte in enumerate(alphabet)}, [])
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    how = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": template}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **how)


def cli_model(folder, template=CLI_CHATML):
    """A folder as from the hub: a random model of two layers and its tokenizer."""
    tokenizer = cli_tokenizer(template)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    shape |= {"max_position_embeddings": 1024}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def cli_folder(tmp_path_factory):
    return cli_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cli_here(tmp_path, monkeypatch):
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli_separated(text):
    """The parts of each line between `|`."""
    return [part for line in text.strip("\n").split("\n") for part in line.split("|")]


# -------------------------------------------------------------------------------------------- tasks
def task_questions(found):
    return [entry["question"] for _, entry, _ in found]


@pytest.mark.parametrize("task", ["chain_sum", "graph_color", "list_functions"])
def test_no_question_is_in_training_and_test(task):
    tokenizer = cli_tokenizer()
    held_out = []
    for seed in (0, 42):
        cfg = motg.make_config(task=task, seed=seed, max_prompt_tokens=9999, eval_problems=30)
        drawn = [motg.train_problem(cfg, tokenizer, n) for n in range(20)]
        again = [motg.train_problem(cfg, tokenizer, n) for n in range(20)]
        assert task_questions(drawn) == task_questions(again)  # a function of (seed, n)
        for stream in (0, 2 + seed):
            drawn += motg.problems(cfg, tokenizer, stream, range(500), test=False)
        held_out.append(task_questions(motg.test_problems(cfg, tokenizer)))
        assert len(set(task_questions(drawn))) > 100
        assert not set(task_questions(drawn)) & set(held_out[-1])
    assert held_out[0] == held_out[1]  # one test set for all seeds
    assert len(set(held_out[0])) == len(held_out[0]) == 30
    for question in held_out[0]:  # the question's own hash decides
        assert int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10 == 0


class TaskNumbers:
    """In place of `dataset`: item i of seed s is a question about the number s + i."""

    def __init__(self):
        self.drawn = []
        self.question = str

    def __call__(self, task, seed, task_settings=""):
        self.seed = seed
        return self

    def __getitem__(self, i):
        self.drawn.append(self.seed + i)
        return {"question": self.question(self.drawn[-1]), "answer": "0", "metadata": {}}

    def since(self):
        """The numbers drawn since the last call."""
        drawn, self.drawn = set(self.drawn), []
        return drawn


@pytest.fixture
def task_numbers(monkeypatch):
    numbers = TaskNumbers()
    monkeypatch.setattr(motg, "dataset", numbers)
    return numbers


def test_streams_of_items_cannot_overlap(task_numbers, monkeypatch, cli_here):
    """Every seed, the test problems and the warm start have a block of 10^9 numbers each."""
    tokenizer = cli_tokenizer()
    found = {"test": set()}
    for seed in (0, 1, 300, 999_999):  # no prompt is short enough: all that could be drawn is
        cfg = motg.make_config(seed=seed, max_prompt_tokens=1, eval_problems=10)
        for n in (0, 999_999):
            with pytest.raises(motg.UserError, match="max_prompt_tokens"):
                motg.train_problem(cfg, tokenizer, n)
        found[seed] = task_numbers.since()
        with pytest.raises(motg.UserError, match="max_prompt_tokens"):
            motg.test_problems(cfg, tokenizer)
        found["test"] |= task_numbers.since()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cli_here))
    task_numbers.question = mock.Mock(side_effect=[*"abcdef", KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        motg.smoke_model(motg.make_config(smoke=True))
    found["warm start"] = task_numbers.since()
    blocks = [{number // 10**9 for number in numbers} for numbers in found.values()]
    assert [len(each) for each in blocks] == [1] * 6, blocks
    assert len(set.union(*blocks)) == 6 and min(set.union(*blocks)) >= 0, blocks


def test_problems_of_a_run_share_no_item_and_are_drawn_until_one_is_short(task_numbers):
    def question(number):  # a fifth is short, and each comes again after 300 others
        number %= 301
        return str(number) if number < 60 else f"{number}, long" * 50

    task_numbers.question = question
    tokenizer = cli_tokenizer()
    cfg = motg.make_config(max_prompt_tokens=300)
    found, drawn = [], []
    for n in (0, 3, 7, 999_999, 0, 3):
        found += task_questions([motg.train_problem(cfg, tokenizer, n)])
        drawn.append(task_numbers.since())
    assert found[:2] == found[4:] and all(map(str.isdigit, found))
    assert drawn[:2] == drawn[4:] and sum(map(len, drawn)) > 10
    assert len(set.union(*drawn[:4])) == sum(map(len, drawn[:4]))
    for stream in (0, 5):
        motg.counts.clear()
        splits = []
        for test in (True, False):
            part = motg.problems(cfg, tokenizer, stream, range(900), test)
            splits.append(task_questions(part))
        assert sorted(map(int, splits[0] + splits[1])) == list(range(60))  # each once
        assert motg.counts["too_long"] == 301 - 60


def test_task_settings_reach_the_questions_and_the_scorer():
    tokenizer = cli_tokenizer()
    settings = '{"min_terms": 7, "max_terms": 7, "max_digits": 1}'
    cfg = motg.make_config(task="chain_sum", task_settings=settings)
    _, entry, _ = motg.train_problem(cfg, tokenizer, 0)
    assert len(re.findall(r"\b\d\b", entry["question"])) == 7
    settings = '{"min_num_decimal_places": 1, "max_num_decimal_places": 1}'
    cfg = motg.make_config(task="decimal_arithmetic", task_settings=settings)
    task, entry, _ = motg.train_problem(cfg, tokenizer, 0)
    near = f"{float(entry['answer']) + 0.05:.6f}"
    assert motg.score(task, near, entry) == 1.0  # right to one decimal place, not to three
    for wrong in ("{", "[]", '{"nope": 1}', '{"min_terms": 9}'):
        cfg = motg.make_config(task="chain_sum", task_settings=wrong)
        with pytest.raises(motg.UserError, match="^[^\n]*task_settings[^\n]*$"):
            motg.train_problem(cfg, tokenizer, 0)


def task_turns(cfg, template=CLI_CHATML):
    """[(role, text)] of the first training prompt, and its question."""
    _, entry, prompt = motg.train_problem(cfg, cli_tokenizer(template), 0)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    return turns, entry["question"]


def test_shots_are_turns_and_a_system_text_that_is_refused_is_in_the_users_turn():
    shots = [["1 + 1?", "a</think> <answer>2</answer>"], ["2 + 2?", "b</think> <answer>4</answer>"]]
    Path("shots.json").write_text(json.dumps(shots))
    for name, said in (("", []), ("shots.json", shots[0] + shots[1])):
        cfg = motg.make_config(task="chain_sum", shots=name)
        (system, *turns), question = task_turns(cfg)
        assert system[0] == "system" and "<think>" in system[1] and "<answer>" in system[1]
        assert turns == list(zip(itertools.cycle(["user", "assistant"]), [*said, question]))
        folded, _ = task_turns(cfg, CLI_NO_SYSTEM)
        assert folded == [("user", f"{system[1]}\n\n{turns[0][1]}"), *turns[1:]]
    for wrong in ("[1, 2]", '[["a"]]', "{"):
        Path("shots.json").write_text(wrong)
        with pytest.raises(motg.UserError, match="^shots = 'shots.json'[^\n]*$"):
            motg.train_problem(cfg, cli_tokenizer(), 0)


@pytest.mark.parametrize("end", ["<think>", "<think>{{ '\n' }}", "<think>{{ '\n\n' }}"])
def test_a_template_that_opens_the_thought_is_left_as_it_is(end):
    tokenizer = cli_tokenizer("{{ messages[-1].content }}" + end)
    _, entry, prompt = motg.train_problem(motg.make_config(task="chain_sum"), tokenizer, 0)
    assert prompt == entry["question"] + re.sub(r"{{ '|' }}", "", end)


# ------------------------------------------------------------------------------ answers and rewards
TASK_ANSWERS = """
2: 1</think> <answer>2</answer>|1 2~3 4: t</think>~<answer>~1 2~3 4~</answer>
2: t</think><answer>1</answer> no <answer> 2 </answer> bye|2: t</think><answer>1<answer>2</answer>
: t<answer>0</answer></think><answer></answer>|3: t</think>a</think><answer>3</answer>
None: t</think><answer>2|None: <answer>1</answer></think> so 2|None: <answer>7</answer>|None: 42
None: t</think></answer><answer>|None: t</think>2</answer>|None: """


@pytest.mark.parametrize("case", cli_separated(TASK_ANSWERS))
def test_an_answer_is_the_last_one_after_the_thought_with_its_newlines(case):
    answer, text = case.replace("~", "\n").split(": ")
    assert str(motg.extract_answer(text)) == answer


def test_rewards_and_their_parts():
    problem = motg.train_problem(motg.make_config(task="chain_sum"), cli_tokenizer(), 0)
    answer = f"<answer>\n{problem[1]['answer']}\n</answer>\n"
    want = {  # text: is right, has the format, is of 200 to 400 words
        f"a\nb\n</think>\n{answer}": (1, 1, 0),
        f"{'w ' * 196}</think> {answer}": (1, 1, 1),  # 200: `</think>`, the answer and its tags too
        f"{'w ' * 195}</think> {answer}": (1, 1, 0),
        f"{'w ' * 396}</think> {answer}": (1, 1, 1),
        f"{'w ' * 397}</think> {answer}": (1, 1, 0),
        f"a</think> so {answer}": (1, 0, 0),
        f"a</think>{answer} so": (1, 0, 0),
        f"a</think>{answer}{answer}": (1, 0, 0),
        f"a{answer}": (0, 0, 0),
        "a</think><answer>x</answer>": (0, 1, 0),
    }
    for text, found in zip(want, motg.rewards([problem] * len(want), list(want)), strict=True):
        right, form, words = want[text]
        assert (found["correct"], found["format"]) == (right, form), text[-60:]
        assert found["score"] == 1 if right else found["score"] < 0.1, text[-60:]
        reward = 2 * found["score"] + 0.5 * form + 0.5 * words
        assert found["reward"] == pytest.approx(reward), text[-60:]


@pytest.mark.parametrize("end", ["", "</think>", "</answer>", "</think><answer>1</answer> so"])
def test_long_texts_cost_linear_time(end):
    """200 kB each: what grows with the square of that would take minutes."""
    problem = motg.train_problem(motg.make_config(task="chain_sum"), cli_tokenizer(), 0)
    for piece in ("<answer>", "</think>", "<", " ", "</think><answer>", "</answer>", "<think>\n"):
        began = time.perf_counter()
        motg.rewards([problem], [piece * (200_000 // len(piece)) + end])
        assert time.perf_counter() - began < 2, piece


# -------------------------------------------------------------------------------- contained scoring
SCORE_TASKS = """
countdown puzzle24 polynomial_multiplication simple_integration intermediate_integration
binary_matrix n_queens spiral_matrix string_insertion number_sorting complex_arithmetic
acre graph_color family_relationships color_cube_rotation zebra_puzzles number_sequence
prime_factorization circuit_logic syllogism self_reference propositional_logic"""
SCORE_TASKS = SCORE_TASKS.split()
SCORE_EVALUATING = SCORE_TASKS[:9]  # their scorers run the answer, by eval or sympy's parse_expr
SCORE_OPEN = "open(chr(67),chr(119))"  # makes a file C where it is run
SCORE_CODE = r"""
OPEN|[OPEN]|[[OPEN]]|(OPEN,)|*OPEN,|{OPEN}|{1: OPEN}|[OPEN for _ in (1,)]|-OPEN|1+OPEN
(lambda: OPEN)()|lambda: OPEN|(f:=open)('CANARY','w')|f"{OPEN}"|[f'{OPEN}']|1 if OPEN else 2
OPEN or 1|not OPEN|sqrt(OPEN)|eval("OPEN")|exec("OPEN")|sqrt("OPEN")|sympify("OPEN")|S("OPEN")
N("OPEN")|Symbol("OPEN")|parse_expr("OPEN")|Rational("OPEN")|Lambda(x, OPEN)(1)|print(OPEN)
x.func(OPEN)|0.2[OPEN]|E.func(OPEN)|sin(OPEN)!|log(x, OPEN)|sqrt(*OPEN)|sqrt(x=OPEN)|x(OPEN)
getattr(__builtins__,'open')('CANARY','w')|globals()['__builtins__']['open']('CANARY','w')
vars()['OPEN']|1;OPEN|x=OPEN|@OPEN|await OPEN|yield OPEN|(_ for _ in [OPEN])
Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('CANARY','w')
().__class__.__base__.__subclasses__()[0](OPEN)|__import__('os').system('touch CANARY')
__import__('pathlib').Path('CANARY').touch()|(1).__class__.__base__.__subclasses__()|x.__class__
1..__class__|().__doc__|5 .Γ|sqrt.__globals__|breakpoint()|input()|help()|exit()|quit(0)|exit
os._exit(0)|__import__('os')._exit(0)|__import__('os').abort()|__import__('os').fork()|[exit()]
sqrt(exit())|__import__('os').kill(__import__('os').getppid(),9)
__import__('signal').setitimer(0,0)|(_ for _ in ()).throw(SystemExit)|oracle_answer|answer|self
entry['answer']|valid_solutions|entry.update(answer='1')|Integral(0,x)|C.__class__
Function('f')(x)|𝐨𝐩𝐞𝐧('CANARY','w')|ｅｖａｌ("OPEN")|'a' % OPEN"""
SCORE_SIZE = """
9**9**9**9|9**9**9|2**2**2**2**2**9|99999999!|99999!!!|(9**9)!|9!!!!|factorial(99999999)
gamma(10**9)|10**10**8|1<<10**10|0**-1|1e999999999|-1e999999999|1e99999999999999999999|0x1p9
1_0e9_9|[0]*10**10|'a'*10**10|[[0]*10**6]*10**6|bytes(10**10)|range(10**12)|exp(exp(exp(10**5)))
exp(exp(exp(exp(9))))|sin(10**999)|x**99999|(x+1)**9999|(x+y+1)**99|x**x**x**x**x
sqrt(10**4000+1)|log(9**4000)|NaN|nan|[NaN, 1]|[Infinity]|inf|-inf|Infinity|1e999|[1e999]|sNaN
nan123|nani|n an|∞|zoo|oo|1/0|0/0|٣|²|½|Ⅷ|-0|0e0|1j"""
SCORE_LONG = r"""
(~100000 1 )~100000|(~2000 1 )~2000|[~2000|[~2000 ]~2000|[~100000|{"a":~800|-~4000 1|1 +1~2000
9~4096|9*~2000 9|9**~1000 1|5 !~4000|,~100000|1,~2000|×~4000|1×~999|sqrt(~800 2 )~800
exp(~30 x )~30|x**~900 x|1/~2000 3|(1+x)*~700 1|[ 1e9,~900 1]|"~4095|\~4001|{~3000"""
SCORE_NASTY = cli_separated(SCORE_CODE.replace("OPEN", SCORE_OPEN)) + cli_separated(SCORE_SIZE)
for answer in cli_separated(SCORE_LONG):  # `9*~2000 9` is two thousand times `9*`, then a 9
    parts = [part.partition("~") for part in answer.split()]
    SCORE_NASTY.append("".join(text * int(count or 1) for text, _, count in parts))
SCORE_NASTY += [f"{text}{SCORE_OPEN}" for text in ("1 #\n", "1\n", "1\r", "\f", "\ufeff", "1\0")]
SCORE_NASTY += [f"1 \\\nif {SCORE_OPEN} else 2", "\0", "\0" * 4096, "\ud800", "a\udfff" * 9, ""]
SCORE_NASTY += [" ", "\n" * 4096, "\x1b[2J", "not " * 1000 + "1"]
SCORE_NASTY += [" ∧ ".join(f"v{i}" for i in range(40))]  # 2^40 rows of a truth table


def score_entry(task, **settings):
    """(data set, entry, a right answer or None); two tasks keep theirs in the metadata."""
    data = reasoning_gym.create_dataset(task, size=1, seed=0, **settings)
    entry = data[0]
    if task == "graph_color":
        return data, entry, json.dumps(entry["metadata"]["possible_answer"])
    return data, entry, entry["metadata"].get("example_answer", entry["answer"])


class ScoreMisdeed(dict):
    """An entry that runs its `code` in the child, when the scorer reads the right answer."""

    def __getitem__(self, name):
        if name == "answer":
            exec(self["code"])  # noqa: S102
        return super().__getitem__(name)


def score_anew(child=None):
    """The next score comes from a new child, and one that runs `child` in place of motg's."""
    motg.scorer()[0].kill()
    motg.scorer.cache_clear()
    motg.counts.clear()
    return mock.patch.object(motg, "score_forever", child or motg.score_forever)


@pytest.fixture
def score_sum(cli_here):
    """score_sum(answer=the right one, code): the score of one sum."""
    _, entry, right = score_entry("chain_sum")

    def score(answer=right, code="pass"):
        return motg.score("chain_sum", answer, ScoreMisdeed(entry | {"code": code}))

    score_anew()
    assert score() == 1.0 and score("x") < 1 and not motg.counts
    return score


def test_no_answer_runs_code_or_hangs(score_sum, cli_here):
    score_sum(code=SCORE_OPEN)  # a child that runs it would leave a file here
    (cli_here / "C").unlink()
    assert len(set(SCORE_NASTY)) == 182 and len(set(SCORE_TASKS)) == 22
    for task in SCORE_TASKS:
        _, entry, right = score_entry(task)
        assert motg.score(task, right, entry) == 1.0  # its imports are not on the clock
        for answer in SCORE_NASTY:
            began = time.perf_counter()
            value = motg.score(task, answer, entry)
            assert isinstance(value, float) and 0 <= value < 1, (task, answer[:80], value)
            assert time.perf_counter() - began < 4, (task, answer[:80])
        assert motg.score(task, right, entry) == 1.0 and not list(cli_here.iterdir()), task
    assert motg.counts["died"] <= 12  # two seconds each: nearly all are refused before


def test_the_evaluating_tasks_are_these_and_their_scorers_run_what_they_read(cli_here):
    data, entry, _ = score_entry("countdown")
    data.score_answer(f"cos({SCORE_OPEN})", entry)
    assert (cli_here / "C").exists()
    evaluates = re.compile(r"\b(eval|exec|parse_expr|sympify|literal_eval|compile)\(")
    kinds = {task: kind for task, (kind, _) in reasoning_gym.factory.DATASETS.items()}
    found = {t for t in kinds if evaluates.search(inspect.getsource(kinds[t].score_answer))}
    assert found == {*SCORE_EVALUATING, "number_sorting"}  # this one evaluates its own answer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_task_scores_as_it_does_plainly_and_nan_is_never_right():
    for task in sorted(set(reasoning_gym.factory.DATASETS) - {"composite"}):
        data, entry, right = score_entry(task)
        assert right is None or motg.score(task, right, entry) == 1.0, task
        for answer in ["0", "a", *([f" {right}", f"{right}0", right[1:]] if right else [])]:
            try:
                plain = data.score_answer(answer, entry)
            except (ValueError, TypeError):  # "a" has no prime factors
                plain = 0.0
            got = motg.score(task, answer, entry)
            refused = task in SCORE_EVALUATING and got == 0 and plain < 0.1
            assert got == plain or refused or plain > 1 > got, (task, answer, got, plain)
        shaped = {re.sub(r"\d+(\.\d+)?", nan, right or "") for nan in ("NaN", "1e999")} - {right}
        for answer in ("nan", "n an", "-NaN+nani", "[NaN, NaN]", "Infinity", "9" * 400, *shaped):
            is_right = motg.score(task, answer, entry) > 0.5
            assert not is_right or task == "game_of_life_halting", (task, answer)


@pytest.mark.parametrize("word", ["Nancy", "finance", "infinite", "nano", "nan", "inf"])
def test_words_are_not_numbers_and_an_answer_right_in_part_is_rewarded_but_not_correct(word):
    entry = {"question": f"Sort: b, {word}, a", "answer": f"a, b, {word}"}
    entry["metadata"] = {"sorted_words": ["a", "b", word]}
    text = f"t</think><answer>a,{word},b</answer>"
    (found,) = motg.rewards([("word_sorting", entry, "")], [text])
    assert found["score"] == pytest.approx(1 / 3) and found["correct"] == 0.0
    assert found["reward"] == pytest.approx(2 / 3 + 0.5)


SCORE_REWRITINGS = r"""
simple_integration: x: x**2/2 + C|C + x**2/2|x**2/2| x**2 / 2+C |0.5*x**2|1/2*x**2 + 7|(x**2)/(2)
simple_integration: x: x*x/2 - C|x**2/2 + c|+x**2/2|Rational(1, 2)*x**2|log(exp(x**2/2))|2*x**2/4
simple_integration: x: (x**2\n/2)|x**(2)/2 + K|x**2/2 + C_1|x**2/2 + 3!|x**2/2 + C\n
intermediate_integration: 1/x: log(x) + C|ln(x)|C + ln(3*x)
intermediate_integration: exp(x): exp(x) + C|E**x
intermediate_integration: 1/sqrt(x): 2*sqrt(x)|2*x**0.5 + C|2*x**(1/2)
intermediate_integration: cos(x): sin(x)+C
intermediate_integration: sin(x): -cos(x) + pi
intermediate_integration: 1/(x**2 + 1): atan(x)
intermediate_integration: x**2*exp(x): (x**2 - 2*x + 2)*exp(x) + C
polynomial_multiplication: 2*x**2 + 3*x - 5: -5 + 3*x + 2*x**2|2*x**2+3*x-5|2*x*x + x*3 - 5
countdown: 6*(98 - 54) - 34 - 66: (98 - 54)*6 - 66 - 34|-34-66+6*(98-54)|((98-54))*6-(34+66)
countdown: 6*(98 - 54) - 34 - 66: 6 * (98-54) -\t34 - 66|(6*\n(98-54)-34-66)
puzzle24: ?: 1*3*5 + 9|9+5*3*1|(9 - 1)*(6/2)|4! + 1 - 3 + 2|8/(3 - 8/3)"""


def test_rewritings_of_right_answers_score_one_and_lists_as_they_do_plainly():
    for line in SCORE_REWRITINGS.strip().split("\n"):
        task, right, answers = line.split(": ", 2)
        metadata = {"numbers": [6, 98, 54, 34, 66], "target": 164, "variable": "x"}
        entry = {"question": "", "answer": right, "metadata": metadata | {"integrand": right}}
        for answer in answers.replace(r"\n", "\n").replace(r"\t", "\t").split("|"):
            plain = score_entry(task)[0].score_answer(answer, entry)
            assert motg.score(task, answer, entry) == plain == 1.0, (task, answer)
    for task in SCORE_EVALUATING[5:]:
        settings = {"min_remove": 8, "max_remove": 8} if task == "n_queens" else {}
        data, entry, right = score_entry(task, **settings)
        rows = [[int(x) if x.isdigit() else x for x in row.split()] for row in right.split("\n")]
        answers = [str(list(right)), str(rows), str(rows[0]), json.dumps(rows), f" {right} "]
        for answer in answers + entry["metadata"].get("valid_answers", []):
            plain, got = data.score_answer(answer, entry), motg.score(task, answer, entry)
            assert got == plain or got == 0 < plain <= 0.1, (task, answer)  # may be refused


SCORE_MISDEEDS = """died: os._exit(0)|died: os.kill(os.getpid(), 9)|died: 9**9**9|raised: 1/0
raised: sys.exit(0)|raised: [bytes(1 << 28) for _ in range(40)]|raised: bytearray(1 << 40)
raised: quit()"""


@pytest.mark.parametrize("case", cli_separated(SCORE_MISDEEDS))
def test_a_scorer_that_goes_wrong_is_counted_and_the_next_answer_is_right(case, score_sum):
    verdict, code = case.split(": ")
    began = time.perf_counter()
    assert score_sum(code=code) == 0.0 and motg.counts == {verdict: 1}
    assert time.perf_counter() - began < 4
    assert score_sum() == 1.0 and score_sum("x") < 1 and motg.counts == {verdict: 1}
    assert time.perf_counter() - began < 5


def test_an_interrupted_score_is_not_the_next_answers(score_sum):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        score_sum(code="time.sleep(0.5)")  # its late score would be 1
    signal.signal(signal.SIGALRM, before)
    assert score_sum("x") < 1 and score_sum() == 1.0


@pytest.mark.parametrize("child", [id, operator.methodcaller("send", 0.0)])
def test_a_scorer_that_cannot_work_is_one_line_and_not_zeros(child, score_sum, capsys):
    """One child returns at once, the other says that the right answer scores 0."""
    with score_anew(child):
        with pytest.raises(motg.UserError, match="^scoring does not work[^\n]*$"):
            score_sum()
        cli_refused("train --smoke", "scoring does not work", capsys)
    assert score_sum() == 1.0


def score_without_limits(pipe):
    """On a system that refuses every limit, as macOS refuses some."""
    resource.setrlimit = mock.Mock(side_effect=ValueError("not allowed to raise maximum limit"))
    motg.score_forever(pipe)


def test_limits_that_the_system_refuses_are_left_out_but_time_always_holds(score_sum):
    with score_anew(score_without_limits):
        assert score_sum(code="open('C', 'w').write('x')") == 1.0  # no limit holds
    assert score_sum(code="9**9**9") == 0.0 and motg.counts == {"died": 1}


def test_what_is_refused_or_raised_scores_nothing_and_is_counted(score_sum):
    found = {"chain_sum": "1" * 5000, "number_sorting": "[nan]", "countdown": "exit()"}
    for task, answer in found.items():
        assert motg.score(task, answer, score_entry(task)[1]) == 0.0
    assert motg.score("prime_factorization", "two", score_entry("prime_factorization")[1]) == 0.0
    assert score_sum(None) == 0.0 and motg.counts == {"refused": 3, "raised": 1}


# --------------------------------------------------------------------------------- refused commands
CLI_RUN = "train --smoke --out out --task chain_sum --seed 1 --steps 4 --save-every 2 --chains 2 "
CLI_RUN += "--prompts-per-step 2 --eval-problems 3 --max_new_tokens 6 --max-prompt-tokens 300 "
CLI_RUN += "--lr 1e-3 --warmup 0 --model "


def cli_refused(command, pattern, capsys):
    """Runs motg: it must say what `pattern` asks for in one line, and change nothing on disk."""

    def on_disk():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*")}

    before = on_disk()
    capsys.readouterr()
    assert motg.main(command.split()) == 2
    assert re.fullmatch(f"motg: .*{pattern}.*\n", capsys.readouterr().err)
    assert on_disk() == before


CLI_REFUSED = """
--kk 3 => --kk|--no-smoke-please => --no|--steps many => steps.*many|extra => extra
--method dirichle => allowed: .*dirichlet|--sampling nope => allowed: .*with-replacement
--task nope => no task 'nope'|--end never => steps
--k 0 => k = 0; allowed|--k 100000 => k = 100000; allowed|--method single --k 4 => k = 4; allowed
--temperature 0 => temperature = 0.*allowed|--temperature nan => temperature = nan; allowed
--top-p 2 => top_p = 2.*allowed|--lr inf => lr = inf; allowed|--lr -1 => lr = -1.*; allowed
--seed -1 => seed = -1; allowed|--seed 1000000 => seed = 1000000; allowed
--max-new-tokens 0 => max_new_tokens = 0|--max_new_tokens 0 => max_new_tokens = 0
--chains 1 => chains = 1; allowed: 2|--max-prompt-tokens 5 => max_prompt_tokens = 5
--max-new-tokens 5000 => max_new_tokens = 5300.*1024|--task_settings { => task_settings '{'
--shots none.json => shots = 'none.json'; allowed|--device cuda => CUDA.*allowed
--task pool_matrix --seed 5 => pool_matrix|--resume => out = 'out'; allowed: --resume
--model /no/such => '/no/such'.*allowed|=> command|trian => train.*eval
train => no CUDA GPU; allowed: --smoke, or --device cpu|eval --task qqq => no task 'qqq'
eval --method single,zzz => 'zzz'; allowed
eval --method single --k 4 => k = 4; allowed: 1"""


@pytest.mark.parametrize("case", cli_separated(CLI_REFUSED))
def test_wrong_commands_are_one_line_and_change_nothing(case, cli_folder, capsys):
    command, pattern = case.split("=> ")
    if command.startswith(("--", "extra")):
        command = f"{CLI_RUN} {cli_folder} {command}"
    cli_refused(command, pattern, capsys)


@pytest.mark.parametrize("text", ['{"k": 2', "[1]", "3", '{"nope": 1}', '{"k": "x"}', "\0"])
def test_a_damaged_config_of_a_run_is_refused(text, cli_folder, capsys):
    Path("out").mkdir()
    Path("out/config.json").write_text(text)
    cli_refused(f"{CLI_RUN} {cli_folder} --resume", "", capsys)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        motg.main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in motg.Config.__dataclass_fields__:
        assert f"--{name}" in shown and f"--{name.replace('_', '-')}" in shown
    assert ended.value.code == 0


# --------------------------------------------------------------------------------------------- runs
@pytest.fixture
def cli_run(cli_folder):
    """cli_run(flags): the exit status of a run of four steps in the folder `out`."""
    return lambda flags="": motg.main(f"{CLI_RUN} {cli_folder} {flags}".split())


def cli_read(name):
    return json.loads(Path("out", name).read_text())


def cli_logged(name):
    """What the steps of a run have logged."""
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get(name) for line in lines]


def test_what_a_run_writes(cli_run, cli_folder, capsys):
    """On a CPU without --smoke; it computes no hidden-state probes."""
    flags = "--method different-tokens --k 3 --eval-every 2 --accumulate 1 --device cpu"
    with mock.patch.object(motg, "hidden_probes", None):  # a call would raise
        assert motg.main(f"{CLI_RUN} {cli_folder} {flags}".replace("--smoke ", "").split()) == 0
    files = {"config.json", "metrics.jsonl", "samples.txt", "result.json", "trainer.pt"}
    assert set(os.listdir("out")) == files | {"checkpoint"}
    assert cli_logged("step") == [0, 1, 2, 3]
    assert [x is None for x in cli_logged("test_accuracy")] == [True, False] * 2
    names = "reward score correct format entropy kl loss grad_norm lr no_gradient skipped too_long"
    names += " refused raised died sampler_gap clipped support one_hot think_tokens truncated"
    assert all(math.isfinite(sum(cli_logged(name))) for name in names.split())
    want = {"k": 3, "smoke": False, "max_new_tokens": 6, "max_prompt_tokens": 300}
    assert want.items() <= cli_read("config.json").items()
    names = {"task", "method", "seed", "accuracy_before", "accuracy_after"}
    assert names <= set(cli_read("result.json"))
    models = map(transformers.AutoModelForCausalLM.from_pretrained, (cli_folder, "out/checkpoint"))
    before, after = (model(torch.tensor([[5, 6, 7]])).logits for model in models)
    assert not torch.equal(before, after) and after.isfinite().all()
    assert transformers.AutoTokenizer.from_pretrained("out/checkpoint").chat_template == CLI_CHATML
    cli_refused(f"{CLI_RUN} {cli_folder} {flags}", "out = 'out'; allowed: --resume", capsys)


def test_samples_show_the_token_that_was_read_first(cli_run):
    """So the first candidates of all steps spell the text that was rewarded."""
    with mock.patch.object(motg, "rewards", side_effect=motg.rewards) as rewards:
        assert cli_run("--steps 1 --chains 8 --max-new-tokens 20") == 0
    samples = Path("out/samples.txt").read_bytes().decode()
    shown = re.sub(r"\{\d\.\d\d\}\|.*?\{\d\.\d\d\}", "", samples, flags=re.DOTALL)
    lines = [f"step 0: {text}\n" for text in rewards.call_args_list[1].args[1][:8]]
    without = str.maketrans("", "", "".join(map(chr, range(128, 2**16))))  # half characters
    assert shown.replace("<|im_end|>", "").translate(without) == "".join(lines).translate(without)
    assert samples.count("|") > 50


def test_eval_of_a_run_uses_its_settings_and_flags_and_presets_win(cli_run, capsys):
    assert cli_run("--k 4 --temperature 1 --steps 1 --eval-problems 5") == 0
    methods = ["single", "dirichlet", "multiplex"]
    command = f"eval --model out/checkpoint --method {','.join(methods)} --eval-problems 20"
    capsys.readouterr()
    with mock.patch.object(motg, "test_problems", side_effect=motg.test_problems) as drawn:
        assert motg.main(command.split()) == 0
    assert drawn.call_count == 1  # for all methods
    shown = capsys.readouterr().out
    for row in ("method +single +dirichlet +multiplex", "k +1 +4 +3", "temperature( +1.0){3}"):
        assert re.search(f"^{row}$", shown, re.MULTILINE), row
    assert motg.main(f"{command} --temperature 0.5 --k 5".split()) == 0
    rows = [json.loads(line) for line in Path("out/eval.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == methods * 2
    found = [(row["k"], row["temperature"]) for row in rows]
    assert found == [(1, 1.0), (4, 1.0), (3, 1.0), (1, 0.5), (5, 0.5), (3, 0.5)]
    for row in rows:
        assert 0 <= row["pass@1"] <= row["pass@2"] <= 1 and {"stderr", "entropy"} <= set(row)
        assert row["problems"] == 20 and row["max_new_tokens"] == 6
        assert row["hidden_chains"] == 32 and len(row["hidden_entropy"]) == 3  # of 40 chains


def test_a_resumed_run_remembers_its_settings_and_an_accuracy_of_zero(cli_run, monkeypatch):
    assert cli_run("--steps 2") == 0 and cli_read("result.json")["accuracy_before"] == 0.0
    monkeypatch.setattr(motg, "evaluate", lambda *args, **how: {"pass@1": 0.7})
    assert motg.main(["train", "--out", "out", "--resume", "--steps", "3", "--lr", "1e-5"]) == 0
    want = {"accuracy_before": 0.0, "accuracy_after": 0.7, "seed": 1, "steps": 3}
    assert want.items() <= cli_read("result.json").items()
    assert cli_logged("lr") == [1e-3, 1e-3, 1e-5] and cli_read("config.json")["chains"] == 2


# -------------------------------------------------------------------------------- kills and damages
def cli_outcome(out="out"):
    """What must not depend on interruptions."""
    names = "metrics.jsonl", "samples.txt", "checkpoint/model.safetensors"
    result = json.loads(Path(out, "result.json").read_text())
    found = result["accuracy_before"], result["accuracy_after"]
    return [*found, *(Path(out, name).read_bytes() for name in names)]


@pytest.fixture(scope="session")
def cli_straight(cli_folder, tmp_path_factory):
    """The outcome of an uninterrupted run."""
    out = tmp_path_factory.mktemp("straight")
    assert motg.main(f"{CLI_RUN} {cli_folder} --out {out}".split()) == 0
    return cli_outcome(out)


@pytest.fixture
def cli_goes_on(cli_run, cli_straight):
    """As a user does after a kill: the run ends as if there had been none."""

    def goes_on():
        assert cli_run("--resume" if Path("out/config.json").exists() else "") == 0
        assert cli_outcome() == cli_straight
        assert not [path for path in Path("out").iterdir() if path.suffix in (".new", ".old")]

    return goes_on


def test_a_killed_program_leaves_no_process_and_goes_on_to_the_same_bits(cli_folder, cli_goes_on):
    command = [sys.executable, motg.__file__, *CLI_RUN.split(), cli_folder]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not Path("out/trainer.pt").exists():
        assert trainer.poll() is None, trainer.stdout.read()
        time.sleep(0.005)
    trainer.kill()
    trainer.communicate(timeout=4)  # returns when nobody holds its stdout any more
    assert trainer.returncode == -signal.SIGKILL and not Path("out/result.json").exists()
    cli_goes_on()


# A program that has imported motg and runs a copy of itself for each line of its input, which dies
# before its n-th rename or is killed. A copy has no child for its scores, so it scores plainly.
CLI_COPIES = """
import itertools, os, sys, time
import motg, reasoning_gym

plain = reasoning_gym.create_dataset("chain_sum", size=1)
motg.scorer = list
motg.score = lambda task, answer, entry: plain.score_answer(answer, entry)
for line in sys.stdin:
    n, seconds, folder, *command = line.split()
    copy = os.fork()
    if copy == 0:
        renames = itertools.count()

        def die(event, args):
            if event == "os.rename" and next(renames) == int(n):
                os.kill(os.getpid(), 9)

        sys.addaudithook(die)
        sys.stdout = sys.stderr
        os.chdir(folder)
        os._exit(motg.main(command))
    if float(seconds):
        time.sleep(float(seconds))
        os.kill(copy, 9)
    print(os.waitpid(copy, 0)[1], flush=True)
"""


@pytest.fixture(scope="session")
def cli_killed(cli_folder):
    """cli_killed(n, seconds): starts or resumes a run and kills it; returns its exit status."""
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    how |= {"text": True, "cwd": Path(motg.__file__).parent}
    with subprocess.Popen([sys.executable, "-c", CLI_COPIES], **how) as program:

        def killed(n=-1, seconds=0):
            resume = "--resume" if Path("out/config.json").exists() else ""
            program.stdin.write(f"{n} {seconds} {Path.cwd()} {CLI_RUN} {cli_folder} {resume}\n")
            program.stdin.flush()
            return int(program.stdout.readline())

        yield killed
        program.stdin.close()


def test_a_run_killed_before_any_of_its_renames_goes_on(cli_killed, cli_goes_on):
    for n in itertools.count():
        status = cli_killed(n)
        if status == 0:
            break
        assert status == signal.SIGKILL
        cli_goes_on()
        shutil.rmtree("out")
    assert n >= 3  # config.json and two saves


def test_a_run_killed_at_random_moments_goes_on(cli_killed, cli_goes_on, cli_straight):
    for _ in range(int(os.environ.get("MOTG_KILLS", "3"))):
        assert cli_killed(seconds=random.uniform(0.02, 0.8)) in (0, signal.SIGKILL)
        if Path("out/result.json").exists():
            assert cli_outcome() == cli_straight
            shutil.rmtree("out")
    cli_goes_on()


@pytest.mark.parametrize("name", ["save", "save_pretrained"])
def test_a_save_that_fails_is_one_line_and_costs_no_checkpoint(name, cli_run, cli_goes_on, capsys):
    owner = torch if name == "save" else transformers.PreTrainedModel
    assert cli_run("--steps 2") == 0
    before = Path("out/trainer.pt").read_bytes()
    capsys.readouterr()
    with mock.patch.object(owner, name, side_effect=OSError(28, "No space left on device")):
        assert cli_run("--resume") == 2
    pattern = "--resume" if name == "save" else "No space left"
    assert re.fullmatch(f"motg: .*{pattern}.*\n", capsys.readouterr().err)
    assert name != "save" or Path("out/trainer.pt").read_bytes() == before
    cli_goes_on()


@pytest.mark.parametrize("harm", ["cut", "hostile", "empty"])
def test_a_damaged_checkpoint_is_refused_by_name(harm, cli_run, cli_folder, capsys):
    assert cli_run("--steps 2") == 0
    damaged = Path("out/trainer.pt")
    hostile = mock.Mock(__reduce__=lambda self: (os.system, ("touch broken-into",)))
    if harm == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-1000])
    else:
        torch.save({"step": 2, "optimizer": hostile} if harm == "hostile" else {}, damaged)
    cli_refused(f"{CLI_RUN} {cli_folder} --resume", "out/trainer.pt", capsys)
    assert not Path("broken-into").exists()


# ------------------------------------------------------------------------------------------ probes
def test_probes_by_hand_and_a_token_drawn_twice_is_one_token(small):
    """Of thinking steps, by a loop over dictionaries {token: weight}."""
    cfg = config("multiplex", chains=8, max_new_tokens=12, temperature=0.5)
    r = motg.rollout(small, SMALL, PROMPTS[:2], cfg, seeded(0))
    steps, found, seen = [], motg.step_probes(r), [set() for _ in r.mask]
    for b, t in r.thinking.nonzero().tolist():
        weight = Counter()
        for v, w in zip(r.tokens[b, t].tolist(), r.log_weights[b, t].exp().tolist()):
            weight[v] += w
        steps.append([w for w in weight.values() if w > 0])
        seen[b] |= {v for v, w in weight.items() if w > 0}
    assert any(len(set(row)) < 3 for row in r.tokens[r.thinking].tolist())
    H = torch.tensor([-sum(w * math.log(w) for w in step) for step in steps])
    want = {"weight_entropy": H, "support": H.exp(), "entropy": r.entropy[r.thinking]}
    want["gini_simpson"] = torch.tensor([1 - sum(w * w for w in step) for step in steps])
    want["one_hot"] = torch.tensor([float(max(step) > 0.99) for step in steps])
    want |= {"think_tokens": r.thinking.sum(1), "truncated": ~r.eos.any(1)}
    want |= {"distinct_tokens": torch.tensor([len(each) for each in seen])}
    want |= {"answer_tokens": (r.mask & ~r.thinking).sum(1)}
    for name, values in want.items():
        assert found[name] == pytest.approx(values.float().mean().item(), abs=1e-5), name


def test_hidden_state_entropy_is_that_of_the_squared_singular_values():
    """Scaling a state changes nothing; alike states have 0, orthogonal ones 1."""
    for T, d in ((6, 16), (16, 6), (5, 5)):
        h = torch.randn(2, T, d, generator=seeded(0))
        unit = h.double() / h.double().norm(dim=-1, keepdim=True)
        p = torch.linalg.svdvals(unit).square() / T  # (2, min(T, d)), of sum 1
        want = -(p * p.log()).sum(-1) / math.log(min(T, d))
        scale = 1 + torch.rand(2, T, 1, generator=seeded(1))
        assert torch.allclose(motg.hidden_state_entropy(h * scale), want, atol=1e-6)
    assert motg.hidden_state_entropy(torch.eye(7)) == pytest.approx(1)
    assert motg.hidden_state_entropy(torch.ones(7, 3)) == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------- does the whole loop learn?
@pytest.mark.parametrize("method", ["single", "dirichlet", "different-tokens"])
def test_training_raises_the_reward(method, cli_run, monkeypatch):
    """On a random model; the reward is the share of vowels in what is read."""

    def vowels(problems, texts):
        shares = [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in texts]
        return [{"reward": x, "score": x, "format": 0.0, "correct": x > 0.5} for x in shares]

    monkeypatch.setattr(motg, "rewards", vowels)
    flags = "--steps 30 --chains 8 --prompts-per-step 4 --lr 1e-2 --grad-clip 1 --kl-beta 0"
    assert cli_run(f"{flags} --save-every 100 --method {method}") == 0
    reward = cli_logged("reward")
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.12, reward


@pytest.mark.skipif(not os.environ.get("MOTG_SLOW"), reason="set MOTG_SLOW=1")
def test_the_smoke_run_learns_which_habit_is_right():
    """Half a minute, and one more where the smoke model is not in the cache."""
    flags = "--smoke --out out --steps 24 --lr 6e-5 --eval-problems 100 --save-every 100"
    assert motg.main(["train", *flags.split()]) == 0
    result = cli_read("result.json")  # of 8 chains for 100 problems: standard errors of 0.03
    assert result["accuracy_after"] > result["accuracy_before"] + 0.15, result


# ---------------------------------------------------------------------------- a pretrained model
@pytest.mark.skipif(not os.environ.get("MOTG_REAL"), reason="MOTG_REAL names no model's folder")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pretrained_model_samples_scores_trains_and_is_read_out(precision):
    real = os.environ["MOTG_REAL"]
    how = {"task": "gcd", "device": "cpu", "precision": precision, "chains": 4}
    cfg = motg.make_config("different-tokens", **how, max_new_tokens=12)
    model, tokenizer = motg.load_model(cfg, real)
    prompts = [motg.train_problem(cfg, tokenizer, n)[2] for n in range(2)]
    r = motg.rollout(model, tokenizer, prompts, cfg, seeded(0))
    gap = (motg.rollout_logprobs(model, r, cfg) - r.logprob).abs().max()
    assert gap < (1e-3 if precision == "fp32" else 0.5)
    flags = f"--model {real} --device cpu --precision {precision} --task gcd --chains 4 --out out"
    flags += " --max-new-tokens 16 --eval-problems 2 --accumulate 1 --prompts-per-step 2 --steps"
    for steps in ("1", "2 --resume"):
        assert motg.main(f"train {flags} {steps}".split()) == 0
    assert [log < 0.5 for log in cli_logged("sampler_gap")] == [True, True]
    flags = "--model out/checkpoint --method single,dirichlet,multiplex"
    assert motg.main(f"eval {flags}".split()) == 0


# -------------------------------------------------------------------------------- source and README
SOURCE = Path(motg.__file__)
README = SOURCE.with_name("README.md").read_text()


def test_the_source_is_one_open_file_of_short_functions_on_five_packages():
    text = SOURCE.read_text()
    lines = text.splitlines()
    prose = {n for n, line in enumerate(lines, 1) if not line.strip() or line.strip()[0] == "#"}
    starts, packages = [], set()
    for node in ast.walk(ast.parse(text)):
        kind, value = type(node), type(getattr(node, "value", None))
        assert (kind, value) not in ((ast.Expr, ast.Tuple), (ast.Assign, ast.Lambda)), node.lineno
        if isinstance(node, ast.stmt):
            starts.append(node.lineno)
        if kind in (ast.Module, ast.FunctionDef, ast.ClassDef):
            if ast.get_docstring(node):
                prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            else:  # of a method, or of what a function keeps to itself
                assert node.col_offset > 0, f"{node.name} has no docstring"
        if kind is ast.FunctionDef:
            assert node.end_lineno - node.lineno < 50, f"{node.name} is long"
        if kind in (ast.Import, ast.ImportFrom):
            names = [node.module] if kind is ast.ImportFrom else [each.name for each in node.names]
            packages |= {name.split(".")[0] for name in names}
    assert len(set(starts)) == len(starts)  # one statement a line
    allowed = {"torch", "transformers", "tokenizers", "reasoning_gym", "tqdm"}
    assert packages - sys.stdlib_module_names <= allowed
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 1100 and len(lines) - len(prose) <= 800, (len(lines), len(prose))


def test_the_readmes_commands_flags_and_links_exist_and_it_is_short():
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    commands = re.findall(r"python3? motg\.py ([^\n#|&>;]*)", blocks)
    assert {command.split()[0] for command in commands} == {"train", "eval"}
    settings = motg.Config.__dataclass_fields__
    for command in commands:
        given = {}
        for flag in re.split(r" --", command)[1:]:
            name, _, value = flag.partition(" ")
            name = name.replace("-", "_")
            given[name] = settings[name].type(value.strip() or True)
        for method in given.pop("method", "dirichlet").split(","):
            motg.make_config(method, **given)
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9_-]+)", README)}
    assert flags <= set(settings) | {"help"}
    links = re.findall(r"\]\((?!http|#)([^)#\s]+)", README)
    assert links and all((SOURCE.parent / link).exists() for link in links)
    assert len(README.split()) <= 1800


def test_the_readmes_python_runs(monkeypatch):
    """Block after block in one namespace, with a random model in place of the smoke model."""
    model = cli_model("model", "{{ messages[-1].content }}\n<think>\n")
    monkeypatch.setattr(motg, "smoke_model", lambda cfg: model)
    monkeypatch.setitem(motg.SMOKE, "max_prompt_tokens", 300)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    rules, names = len(motg.AGGREGATION), {}
    with mock.patch.dict(motg.AGGREGATION), mock.patch.dict(motg.SAMPLING):
        for block in blocks:
            exec(block, names)  # noqa: S102
        assert len(motg.AGGREGATION) + len(motg.SAMPLING) > rules  # one of them adds a rule


# ------------------------------------------------------------------------------------------- docs
DOCS = SOURCE.with_name("docs")


def test_the_documents_tables_are_what_the_results_give():
    plot = runpy.run_path(str(DOCS / "plot.py"))
    assert set(plot["DOCUMENTS"]) == {"evidence.md", "real.md"}
    for name, make in plot["DOCUMENTS"].items():
        text, tables = (DOCS / name).read_text(), make()
        assert plot["filled"](text, tables) == text
        assert set(re.findall(r"<!-- /(\w+) -->", text)) == set(tables)


def test_a_trace_is_one_page_that_needs_nothing_else(monkeypatch):
    model = cli_model("model", "{{ messages[-1].content }}\n<think>\n")
    monkeypatch.setattr(motg, "smoke_model", lambda cfg: model)
    page = runpy.run_path(str(DOCS / "trace.py"))["page"]
    given = {"smoke": True, "max_prompt_tokens": 300}
    text = page([""], "single,multiplex", given, problems=2, chains=2)
    assert text.count("<article>") == 8 and text.count("<section>") == 2
    assert not re.search(r"https?:|src=|<script|@import|url\(", text)


def test_a_real_models_read_out_counts_right_answers_by_problem(monkeypatch):
    """With answers put into its mouth: n % 3 of problem n's three chains are right."""
    monkeypatch.syspath_prepend(DOCS)
    real = runpy.run_path(str(DOCS / "real.py"))
    folder = cli_model("model", "{{ messages[-1].content }}\n<think>\n")
    how = {"smoke": True, "max_prompt_tokens": 300, "max_new_tokens": 6}
    cfg = config("multiplex", **how, eval_problems=20, chains=3)
    model, tokenizer = motg.load_model(cfg, folder)
    tests, rollout = motg.test_problems(cfg, tokenizer), motg.rollout
    spoken = {prompt: (n % 3, entry["answer"]) for n, (_, entry, prompt) in enumerate(tests)}

    def speak(model, tokenizer, prompts, *more):
        texts = []
        for n, answer in map(spoken.get, prompts):
            texts += [f"a</think> <answer>{answer}</answer>"] * n + ["c"] * (3 - n)
        return rollout(model, tokenizer, prompts, *more)._replace(texts=texts)

    monkeypatch.setattr(motg, "rollout", speak)
    found = real["read_out"](model, tokenizer, cfg)
    assert found["right"] == [n % 3 for n in range(20)] and found["chains"] == 3
    assert found["format"] == pytest.approx(19 / 60) and found["think_tokens"] > 0
    assert found["answers"][0] == [None, 41] and len(found["samples"]) == 5


def test_the_second_worlds_ways_are_shortest_and_its_thoughts_name_their_cells():
    """Against Reasoning-Gym's own search and scorer, and by walking the answer's directions."""
    paths = runpy.run_path(str(DOCS / "paths.py"))
    items, seen = motg.dataset("shortest_path", 0, paths["SETTINGS"]), Counter()
    shift = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
    for n in range(300):
        matrix = items[n]["metadata"]["matrix"]
        i, j = next((i, j) for i in range(4) for j in range(4) if matrix[i][j] == "*")
        goal = next((i, j) for i in range(4) for j in range(4) if matrix[i][j] == "#")
        text = paths["demonstration"](items[n], random.Random(n))
        thought, _, reply = text.removesuffix("<|im_end|>").partition("</think> ")
        answer = motg.extract_answer(f"</think>{reply}")
        right = items.score_answer(answer, items[n])
        if thought == "easy":
            seen["guess"] += 1
            continue
        _, moves = paths["way"](matrix, random.Random(n))
        assert len(moves) == len(items[n]["metadata"]["solution"])
        assert right == 1 or len(answer.split()) == abs(i - goal[0]) + abs(j - goal[1])
        seen["right" if right == 1 else "walls"] += 1
        if thought == "none":
            assert answer == "infeasible"
            continue
        for move, name in zip(answer.split(), thought.split(), strict=True):
            i, j = i + shift[move][0], j + shift[move][1]
            assert name == "abcd"[i] + "1234"[j]
        assert (i, j) == goal
    assert min(seen[kind] for kind in ("guess", "right", "walls")) > 30
    open_grid = [["*", "O", "X", "X"], ["O", "#", "X", "X"], ["X"] * 4, ["X"] * 4]
    ways = {tuple(paths["way"](open_grid, random.Random(n))[1]) for n in range(20)}
    assert ways == {("right", "down"), ("down", "right")}
    smoke = motg.SMOKE
    with paths["world"]("folder"):
        assert motg.make_config(smoke=True).task == "shortest_path"
    assert motg.SMOKE is smoke


def test_hidden_entropy_in_windows_is_that_of_each_thoughts_own_steps(monkeypatch):
    """Against `hidden_probes` of one thought at a time, cut to the window's steps."""
    monkeypatch.syspath_prepend(DOCS)
    evidence = runpy.run_path(str(DOCS / "evidence.py"))
    folder = cli_model("model", "{{ messages[-1].content }}\n<think>\n")
    how = {"smoke": True, "max_prompt_tokens": 300, "max_new_tokens": 11}
    cfg = config("multiplex", **how, eval_problems=6, chains=4)
    model, tokenizer = motg.load_model(cfg, folder)
    kept, rollout = [], motg.rollout

    def cut(*given):  # the random model never closes a thought: end the n-th at step n
        r = rollout(*given)
        steps = torch.arange(r.mask.shape[1]).expand_as(r.mask)
        kept.append(r._replace(thinking=steps < torch.arange(len(r.mask))[:, None]))
        return kept[-1]

    monkeypatch.setattr(motg, "rollout", cut)
    odd, W = (lambda _, texts: [{"correct": i % 2} for i in range(len(texts))]), evidence["WINDOW"]
    monkeypatch.setattr(motg, "rewards", odd)
    found = evidence["windows"](model, tokenizer, cfg, motg.test_problems(cfg, tokenizer))["own"]
    for window in range(2):
        for outcome, rows in (("right", range(1, 24, 2)), ("wrong", range(0, 24, 2))):
            rows, values = [row for row in rows if row >= W * (window + 1)], []
            for row in rows:
                one = kept[0].select(torch.tensor([row]))
                inside = one._replace(thinking=torch.zeros_like(one.mask))
                inside.thinking[:, W * window : W * (window + 1)] = True
                values.append(motg.hidden_probes(model, inside, cfg)["hidden_entropy"][-1])
            assert found[outcome][window][0] == len(rows) > 5
            assert found[outcome][window][1] == pytest.approx(sum(values) / len(rows), abs=1e-5)


def test_a_cold_answer_leaves_the_thought_warm_and_the_other_way_round(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    apart = runpy.run_path(str(DOCS / "evidence.py"))["Apart"]
    small = {"smoke": True, "max_prompt_tokens": 300}
    model, tokenizer = motg.load_model(config(**small), cli_model("model"))
    cfg = config("single", **small, chains=6, max_new_tokens=24, end="steps", end_steps=4)

    def entropies(*temperatures):
        monkeypatch.setattr(apart, "temperatures", temperatures)
        r = motg.rollout(model, tokenizer, ["a<think>"], cfg, torch.Generator().manual_seed(0))
        return r.entropy[r.thinking & r.sampled], r.entropy[r.mask & ~r.thinking]

    plain = entropies()
    monkeypatch.setattr(motg, "Decoder", apart)
    for a, b in zip(plain, entropies(cfg.temperature, cfg.temperature), strict=True):
        torch.testing.assert_close(a, b)
    thought, answer = entropies(cfg.temperature, 1e-4)
    assert thought.min() > 0.1 and answer.max() < 0.01
    thought, answer = entropies(1e-4, cfg.temperature)
    assert thought.max() < 0.01 and answer.min() > 0.1


def test_all_or_nothing_gives_no_part_and_a_slow_task_is_the_same_task(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    real = runpy.run_path(str(DOCS / "real.py"))
    cfg = real["config_of"]("gcd", "single")
    items = motg.dataset("gcd", 0, cfg.task_settings)
    entry = next(items[n] for n in range(500) if items[n]["answer"] == "1")
    assert 0 < motg.score("gcd", "12", entry) < 1
    assert [real["all_or_nothing"]("gcd", answer, entry) for answer in ("12", "1")] == [0, 1]
    slow = real["config_of"]("gcd-slow", "single")
    assert (slow.task, slow.task_settings) == ("gcd", cfg.task_settings) and slow.lr < cfg.lr
