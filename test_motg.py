"""Tests of motg.py, each against a reference that is none of its code: enumeration, transformers'
own `generate` and eager forward pass, torch.distributions, the scorers called plainly, loops.

They follow motg.py: mixtures, scores, whole trajectories, rollouts, the end of a thought, GRPO;
then tasks, contained scoring, commands, runs, kills, devices, probes. References and models that
take more than a few lines are in docs/experiments/enumeration.py, here called `plain`. A test of
statistics has a fixed seed; drawn anew, it would fail by chance less than once in 10^8.
"""

# ruff: noqa: E402
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT = dict(os.environ)  # before motg is imported

import pytest
import reasoning_gym
import torch
import transformers

import motg

ROOT = Path(motg.__file__).parent
sys.path[:0] = [str(ROOT / "docs/experiments"), str(ROOT / "docs/tools")]
import enumeration as plain
import warm_start
from enumeration import DRAWN, FIVE, INF, PARTS, SMALL, THINK, flat, relative_error, seeded

torch.set_num_threads(1)

cases, config, UserError = pytest.mark.parametrize, motg.make_config, motg.UserError
WEIGHTS = ("probability", "dirichlet", "uniform", "gumbel", "posterior")
ENDS = ("drawn", "most-likely", "entropy", "steps")
LOGPROBS = ("representative", "weighted", "exact")
PROMPTS = ["a<think>\n", "bath<think>\n", "c", "thinkabab<think>\n"]
ID = SMALL.get_vocab()


@pytest.fixture(scope="module")
def small():
    return plain.random_model(SMALL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a model."""
    return plain.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------- the law of what is drawn
Z = torch.tensor([1.2, 0.3, -0.4, 0.8, -1.5])  # logits of five tokens
P = (Z.double() / 0.7).softmax(-1)  # 0.51 0.14 0.05 0.29 0.01
TOP = [0, 3, 1]  # the three most likely
HAT = P[TOP] / P[TOP].sum()


def mixtures(n, aggregation, sampling="top-k", k=3, **settings):
    """n mixtures of the logits Z at temperature 0.7, and their weights."""
    cfg = config(sampling=sampling, aggregation=aggregation, k=k, temperature=0.7, **settings)
    m = motg.sample_mixture(Z.expand(n, -1), cfg, seeded(k))
    return m, m.log_weights.exp().double()


@cases("vocabulary", [5, 131, 300])
def test_one_draw_is_an_ordinary_sample_from_p_and_its_tail(vocabulary):
    z = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(0, -1, vocabulary - 2)])
    z = z[torch.randperm(vocabulary, generator=seeded(1))]
    z[2] = -INF  # a token of probability 0 is never drawn
    m = motg.sample_mixture(z.expand(100_000, -1), config("single", temperature=1.0), seeded(0))
    assert torch.equal(m.tokens[:, 0], m.representative) and (m.log_weights == 0).all()
    plain.assert_law(m.representative.tolist(), dict(enumerate(z.double().softmax(-1))))
    assert 2 not in m.representative


@cases("k", [1, 2, 3])
@cases("sampling", DRAWN)
def test_law_of_drawn_candidates_and_the_first_is_the_representative(sampling, k):
    m, w = mixtures(100_000, "probability", sampling, k)
    law = plain.law_of(P, k, sampling)
    plain.assert_law(map(tuple, m.tokens.tolist()), law)
    assert torch.equal(m.representative, m.tokens[:, 0])
    assert torch.allclose(w, P[m.tokens] / P[m.tokens].sum(1, keepdim=True), atol=1e-5)


TRUNCATED = [("top-k", 1, 3, 3), ("top-k", 1, 5, 5), ("nucleus", 0.3, 5, 1), ("nucleus", 0.7, 5, 2)]
TRUNCATED += [("nucleus", 0.99, 2, 2), ("nucleus", 1, 5, 5), ("min-p", 0.3, 5, 2)]
TRUNCATED += [("min-p", 0.05, 2, 2), ("min-p", 1, 5, 1)]


@cases("sampling, limit, k, kept", TRUNCATED)
def test_truncation_keeps_the_right_set_and_reads_one_of_it(sampling, limit, k, kept):
    chosen = [0, 3, 1, 2, 4][:kept]
    m, _ = mixtures(50_000, "probability", sampling, k, top_p=limit, min_p=limit)
    filled = m.tokens.masked_fill(m.log_weights == -INF, -1)
    assert (filled == torch.tensor(chosen + [-1] * (k - kept))).all()
    plain.assert_law(m.representative.tolist(), {v: P[v] / P[chosen].sum() for v in chosen})


def test_weights_against_their_formulas():
    third = torch.full((3,), 1 / 3, dtype=torch.double)
    for aggregation, want in {"probability": HAT, "uniform": third}.items():
        m, w = mixtures(100_000, aggregation)
        assert (w - want).abs().max() < 1e-6
        plain.assert_law(m.representative.tolist(), dict(zip(TOP, want)))
    m, w = mixtures(100_000, "posterior", "drawn-and-top-k", moi_beta=0.5)
    H, read = -(P * P.log()).sum() / math.log(5), m.tokens == m.representative[:, None]
    hat = P[m.tokens] / P[m.tokens].sum(1, keepdim=True)
    assert (w - (H * hat + (1.5 - H) * read) / 1.5).abs().max() < 1e-6


@cases("tau", [0.1, 1.0])
def test_of_gumbel_weights_the_largest_is_read_an_exact_draw_from_p_hat(tau):
    m, w = mixtures(200_000, "gumbel", gumbel_tau=tau)
    assert torch.equal(m.representative, m.tokens.gather(1, w.argmax(1, keepdim=True))[:, 0])
    plain.assert_law(m.representative.tolist(), dict(zip(TOP, HAT)))
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
    assert motg.mixture_embedding(E.bfloat16(), tokens, log_w).dtype == torch.bfloat16


# ------------------------------------------------------------------------- the score of a step
def scored(tokens, w, read=None, **settings):
    """Log-probs of steps (N, k), given as lists, under the logits Z at temperature 0.7."""
    tokens, w = torch.tensor(tokens), torch.as_tensor(w, dtype=torch.float)
    read = tokens[:, 0] if read is None else torch.tensor(read)
    cfg = config(**{"k": tokens.shape[1], "temperature": 0.7} | settings)
    return motg.mixture_logprob(Z.expand(len(tokens), -1), tokens, w.log(), read, cfg)


def test_no_gradient_through_the_weights_of_the_weighted_logprob():
    log_w, z = torch.tensor([[0.3, 0.7]]).log().requires_grad_(), Z[None].clone().requires_grad_()
    step, cfg = (torch.tensor([[1, 2]]), log_w, torch.tensor([1])), config(logprob="weighted")
    motg.mixture_logprob(z, *step, cfg).sum().backward()
    assert z.grad.abs().max() > 0 and (log_w.grad is None or log_w.grad.abs().max() == 0)


@cases("tokens", [[0, 3], [4, 1, 2], [3, 2, 0, 1]])
def test_weighted_has_the_gradient_of_the_log_of_the_sets_mass(tokens):
    """Where w = p^: sum_i w_i grad log p(v_i) = grad log sum_i p(v_i)."""
    z, w = Z[None].clone().requires_grad_(), P[tokens] / P[tokens].sum()
    row = torch.tensor([tokens])
    cfg = config(logprob="weighted", k=len(tokens), temperature=0.7)
    score = motg.mixture_logprob(z, row, w.log().float()[None], row[:, 0], cfg)
    (got,) = torch.autograd.grad(score.sum(), z)
    (want,) = torch.autograd.grad((z[0] / 0.7).softmax(-1)[tokens].sum().log(), z)
    assert torch.allclose(got, want, atol=1e-5)


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
            order = plain.law_of(P, 3, sampling)[tuple(TOP)].log()
            assert torch.allclose(got, want + order, atol=1e-4)


@cases("how", [{}, {"aggregation": "gumbel"}, *({"sampling": sampling} for sampling in DRAWN)])
@cases("logprob", LOGPROBS)
def test_empty_slots_change_nothing_and_one_filled_slot_is_an_ordinary_token(logprob, how):
    if "sampling" not in how:
        padded = scored([[0, 3, 0, 2]], [[0.3, 0.7, 0.0, 0.0]], logprob=logprob, **how)
        want = scored([[0, 3]], [[0.3, 0.7]], logprob=logprob, **how)
        assert torch.allclose(padded, want, atol=1e-5)
    for slot, token in enumerate([4, 1, 2, 3]):
        w = torch.eye(4)[slot, None]
        score = scored([[4, 1, 2, 3]], w, [token], logprob=logprob, **how)
        assert score.item() == pytest.approx(P[token].log().item(), rel=1e-5)


COMMENTS = re.sub(r"\n# ?", "\n", Path(motg.__file__).read_text())  # the tutorial's


def numbers_in(pattern):
    """The numbers in the only match of a pattern in the tutorial."""
    (found,) = re.findall(pattern, COMMENTS, re.DOTALL)
    return [float(x) for x in re.findall(r"-?\d+\.?\d*", found)]


def test_the_tutorials_numbers_of_a_mixture_and_of_its_scores():
    p = numbers_in(r"\n +p  ( +a .*?</think> \S+)")
    p_of = dict(zip(["a", "b", "c", "d", THINK], p, strict=True))
    assert numbers_in(r"\n +p' ( .*?d \S+)") == pytest.approx([x / sum(p[:4]) for x in p[:4]])
    w = numbers_in(r"say (\(0\.\d+, 0\.\d+\))")
    assert numbers_in(r"\n +next ([^\n]*)") == w and sum(w) == pytest.approx(1)
    tokenizer = plain.tokenizer_of("a b c d", special=("<eos>", THINK))
    model = plain.bigram(tokenizer, {"a": p_of})
    for name in LOGPROBS:
        how = {"temperature": 1.0, "max_new_tokens": 1, "logprob": name, "chains": 999}
        r = motg.rollout(model, tokenizer, ["a"], config("different-tokens", **how), seeded(0))
        rows = r.mixed & (r.tokens == torch.tensor([0, 1])).all(-1)  # the draws were a, then b
        (want,) = numbers_in(rf"\n +{name}  [^\n]* = ([^\n]*)")
        assert rows.sum() > 100 and (r.logprob[rows] - want).abs().max() < 0.005
        hat = torch.tensor(numbers_in(r"p\^ [^\n]* = (\(0\.\d+, 0\.\d+\))"))
        assert torch.allclose(r.log_weights[rows].exp(), hat, atol=1e-5)


def test_advantages_by_hand_and_the_tutorials():
    """Of equal rewards they are 0, and a small spread counts little."""
    rewards = numbers_in(r"rewards (\([^)]*\))")
    groups = [rewards, [1.0, 0.0, 0.0, 3.0], [0.3] * 4, [2.0, 2.0, 2.0, 2.1]]
    found = motg.group_advantages(torch.tensor(groups)).tolist()
    assert found[0] == pytest.approx(numbers_in(r"advantages are (\([^)]*\))"), abs=1e-3)
    for group, got in zip(groups, found):
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert got == pytest.approx([(x - mean) / (std + 1e-4) for x in group], abs=2e-3)


# ------------------------------------------------- whole trajectories, enumerated on five tokens
RULES = [{"sampling": s, "aggregation": a} for s in motg.SAMPLING for a in WEIGHTS[::2]]
SPECIAL = [{"end": "most-likely"}, {"mix_steps": 1}, {"mix_entropy": 1.52}, {"end": "steps"}]
SPECIAL = [how | {"aggregation": a} for how in SPECIAL for a in ("probability", "posterior")]
ONE_DRAW = [{"sampling": sampling, "k": 1} for sampling in DRAWN]  # plain sampling
ENUMERATED = [(FIVE, how) for how in RULES + SPECIAL + ONE_DRAW]
ENUMERATED += [(PARTS, how) for how in RULES[:18] + SPECIAL[:6]]  # the tag is two tokens
ESTIMATORS = {"0 passes": {}, "1 pass": {"weight_passes": 1}, "2 passes": {"weight_passes": 2}}
ESTIMATORS |= {logprob: {"logprob": logprob} for logprob in LOGPROBS[:2]}


@cases("tokenizer, how", ENUMERATED)
def test_whole_trajectories_their_exact_scores_frequencies_and_policy_gradient(tokenizer, how):
    """Scores are log P(a), sum to 1, and sum_a P(a) R(a) grad log P(a) = grad E[R], R random.

    Where weights are made of p that takes T - 1 = 2 passes, and other scores never give it:
    `pytest -s -k policy_gradient` shows a table.
    """
    drawn, found = how.get("sampling") in DRAWN, {}
    how = {"k": 2 if drawn else 3, "chains": 4000, "top_p": 0.7, "min_p": 0.6, "end_steps": 1} | how
    how |= {"temperature": 0.8, "max_new_tokens": 3}
    cfg = config(**how, logprob="exact")
    seed = {FIVE: 16, PARTS: 20}[tokenizer] if cfg.end == "most-likely" else 10
    model = plain.random_model(tokenizer, seed=seed, head=0.25)
    twin, sample = plain.eager(model), motg.rollout(model, tokenizer, ["ab"], cfg, seeded(0))
    inputs = twin.get_input_embeddings()(torch.tensor(tokenizer.encode("ab")))
    every = plain.trajectories(twin, tokenizer, cfg, inputs)
    P, r = torch.stack([q for q, _ in every]), plain.by_hand(sample, every, cfg.k)
    law = dict(zip(plain.what_happened(r, cfg), P.tolist()))
    plain.assert_law(plain.what_happened(sample, cfg), law)
    if cfg.mix_steps or cfg.mix_entropy:  # the gate is open at times
        assert {motg.TOKEN, motg.MIXED} <= {*r.kind[r.matched == 0].tolist()}
    R = torch.rand(len(P), generator=seeded(0))
    R = R - (P * R).sum().detach()
    want = flat(torch.autograd.grad((P * R).sum(), twin.parameters()))
    for name, more in ESTIMATORS.items():
        score = motg.rollout_logprobs(model, r, config(**how, **{"logprob": "exact"} | more)).sum(1)
        if "pass" in name:
            assert torch.allclose(score, P.log(), atol=1e-3)
            assert score.double().exp().sum().item() == pytest.approx(1, abs=1e-4)
        got = flat(torch.autograd.grad((P.detach() * R * score).sum(), model.parameters()))
        found[name] = relative_error(got, want)
        cosine = torch.nn.functional.cosine_similarity(got, want, dim=0).item()
        print(f"{cfg.sampling:20} {cfg.aggregation:12} {name:15} {cosine:.4f} {found[name]:.1e}")
    of_p = cfg.k > 1 and cfg.aggregation in ("probability", "posterior")
    assert found["2 passes"] < 1e-5 and (of_p or found["0 passes"] < 1e-5)
    if drawn and cfg.k > 1:
        assert not of_p or found["0 passes"] > found["1 pass"] > 5e-4
        assert found["weighted"] > 0.05
        if cfg.sampling == "drawn-and-top-k":  # the token read is all that was drawn
            assert found["representative"] == found["0 passes"]
        else:
            assert found["representative"] > 0.05


@cases("sampling, aggregation", [*product(motg.SAMPLING, WEIGHTS)])
def test_a_thought_ends_with_the_probability_of_the_ending_tokens(sampling, aggregation):
    """Whatever the rule, and whatever it feeds: this model says the same behind any input."""
    p = {"</think": 0.3, ">": 0.2, "<eos>": 0.1, "b</think>a": 0.05, "a": 0.2, "c": 0.15}
    how = {"sampling": sampling, "aggregation": aggregation, "chains": 5000, "max_new_tokens": 3}
    cfg = config(**how, k=3, temperature=1.0)
    r = motg.rollout(plain.deaf(SMALL, p), SMALL, ["c"], cfg, seeded(0))
    for t, opened in ((0, False), (1, False), (1, True), (2, False), (2, True)):
        rows = r.thinking[:, t] & ((r.matched[:, t] == len("</think")) == opened)
        law = {ID[x]: p[x] for x in ["<eos>", "b</think>a", ">"][: 3 if opened else 2]}
        read = r.representative[rows, t].tolist()
        plain.assert_law([y if y in law else -1 for y in read], law | {-1: 1 - sum(law.values())})
        assert torch.equal(r.mixed[rows, t], torch.tensor([y not in law for y in read]))
        assert len(read) > 200


# ------------------------------------------------------------------------------------ rollouts
NUCLEUS_OF_ONE = {"sampling": "nucleus", "top_p": 1e-6, "k": 3, "end": "most-likely"}


@cases("how", [{"method": "single"}, NUCLEUS_OF_ONE])
def test_greedy_rows_equal_transformers_generate_for_prompts_of_any_length(small, how):
    """By a tiny temperature, or while thinking by a nucleus of one candidate at temperature 1."""
    one = "method" in how
    cfg = config(**how, temperature=1e-6 if one else 1.0, chains=2, max_new_tokens=12)
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
    plain.check_rollout(r, SMALL, cfg)
    for i, prompt in enumerate(PROMPTS):
        x = SMALL(prompt, return_tensors="pt", return_token_type_ids=False)
        want, n = small.generate(**x, do_sample=False, max_new_tokens=12), x.input_ids.shape[1]
        for row in (2 * i, 2 * i + 1):  # the chains of a prompt are adjacent
            m = (r.mask if one else r.thinking)[row]
            assert torch.equal(r.representative[row][m], want[0, n : n + m.sum()]) and m.sum() > 1
            assert torch.equal(r.prompt_ids[row, -n:], x.input_ids[0])
            assert r.prompt_mask[row].sum() == r.prompt_mask[row, -n:].sum() == n


@cases("method", [name for name in motg.METHODS if "cot2" not in name])
def test_recomputed_logprobs_equal_a_plain_decoder_row_by_row(small, method):
    how, twin = {"k": 8} if method == "lepo" else {}, plain.eager(small)
    cfg = config(method, chains=3, max_new_tokens=12, temperature=0.8, **how)
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
    plain.check_rollout(r, SMALL, cfg)
    with torch.no_grad():
        got, want = motg.rollout_logprobs(small, r, cfg), plain.logprobs(twin, SMALL, r, cfg)
        assert torch.allclose(got, want, atol=1e-3) and torch.allclose(got, r.logprob, atol=1e-3)
        for b, t, _, log_p in plain.distributions(twin, SMALL, r, cfg):
            H = torch.special.entr(log_p.exp()).sum().item()
            assert r.entropy[b, t].item() == pytest.approx(H, abs=1e-3)
        for micro_batch in (1, 5):
            part = motg.rollout_logprobs(small, r, cfg, micro_batch=micro_batch)
            assert torch.allclose(part, got, atol=1e-4)


@cases("end", ENDS)
@cases("sampling", motg.SAMPLING)
def test_sampled_logprobs_equal_recomputed_ones_for_every_combination(small, sampling, end):
    """And both equal the formulas. A density is as steep as its log-weights are long."""
    how = {"sampling": sampling, "end": end, "end_steps": 3, "end_patience": 2, "end_entropy": 2.5}
    how |= {"top_p": 0.8, "min_p": 0.2, "concentration": 2.0, "chains": 3, "max_new_tokens": 7}
    scores, forced, answers = [{"logprob": logprob} for logprob in LOGPROBS], 0, 0
    twin = plain.eager(small)
    scores += [{"logprob": "exact", "mix_steps": 2}, {"logprob": "exact", "mix_entropy": 2.2}]
    for i, (aggregation, score) in enumerate(product(WEIGHTS, scores)):
        cfg = config(aggregation=aggregation, k=3, **how | score)
        r = motg.rollout(small, SMALL, PROMPTS[:2], cfg, seeded(i))
        plain.check_rollout(r, SMALL, cfg)
        with torch.no_grad():
            again, want = motg.rollout_logprobs(small, r, cfg), plain.logprobs(twin, SMALL, r, cfg)
        steep = 1 + r.log_weights.nan_to_num(neginf=0.0).abs().amax(-1) * (cfg.logprob == "exact")
        assert ((again - r.logprob).abs() <= 1e-4 * steep).all(), cfg
        assert ((want - r.logprob).abs() <= 1e-3 * steep).all(), cfg
        forced += int((r.kind == motg.FORCED).sum())
        answers += int((r.mask & ~r.thinking).sum())
    assert answers > 10 and (forced > 0) == (end != "drawn")


@cases("thought, answer", [(1.3, 1e-3), (1e-3, 1.3), (0.9, 0.9)])
def test_answers_have_a_temperature_of_their_own(small, thought, answer):
    how, twin = {"end": "steps", "end_steps": 3, "chains": 20}, plain.eager(small)
    how |= {"max_new_tokens": 12}
    cfg = config("multiplex", temperature=thought, answer_temperature=answer, **how)
    r = motg.rollout(small, SMALL, PROMPTS[:1], cfg, seeded(0))
    plain.check_rollout(r, SMALL, cfg)
    with torch.no_grad():
        for want in (motg.rollout_logprobs(small, r, cfg), plain.logprobs(twin, SMALL, r, cfg)):
            assert torch.allclose(want, r.logprob, atol=1e-3)
    for thinks, T in ((True, thought), (False, answer)):
        entropy = r.entropy[r.sampled & (r.thinking == thinks)].mean()
        assert entropy < 0.1 if T < 0.1 else entropy > 0.5
    if thought == answer:  # the same as not setting it
        same = motg.rollout(small, SMALL, PROMPTS[:1], config("multiplex", **how), seeded(0))
        assert torch.equal(same.tokens, r.tokens)


@cases("sampling, aggregation", [*product(DRAWN, WEIGHTS)])
def test_one_draw_a_step_is_plain_sampling_whatever_the_weights(small, sampling, aggregation):
    """With the same random numbers it is the method `single`; drawn weights take more of them."""
    how = {"k": 1, "chains": 5, "max_new_tokens": 12, "logprob": "exact"}
    cfg = config("single", **how, sampling=sampling, aggregation=aggregation)
    want = motg.rollout(small, SMALL, PROMPTS, config("single", **how), seeded(0))
    got = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
    plain.check_rollout(got, SMALL, cfg)
    with torch.no_grad():
        score = plain.logprobs(plain.eager(small), SMALL, got, config("single"))
    assert not got.mixed.any() and torch.allclose(got.logprob, score, atol=1e-3)
    if aggregation not in ("dirichlet", "gumbel"):
        assert torch.equal(got.representative, want.representative)


@cases("family", ["Qwen2", "Llama", "Qwen3"])
def test_a_model_works_as_transformers_loads_it(family, tmp_path):
    how = {"num_hidden_layers": 2, "tie_word_embeddings": family == "Qwen3"}
    plain.random_model(SMALL, family, **how).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    twin, cfg = plain.eager(model), config("different-tokens", chains=2, max_new_tokens=8)
    r = motg.rollout(model, SMALL, PROMPTS, cfg, seeded(0))
    got, want = motg.rollout_logprobs(model, r, cfg), plain.logprobs(twin, SMALL, r, cfg)
    assert torch.allclose(got, want, atol=1e-3) and torch.allclose(r.logprob, want, atol=1e-3)
    got = torch.autograd.grad(got.sum(), model.parameters())
    want = torch.autograd.grad(want.sum(), twin.parameters())
    assert relative_error(flat(got), flat(want)) < 1e-4


REFUSED = {"Mistral": {"sliding_window": 4}, "Gemma2": {}, "Granite": {"logits_scaling": 8.0}}
REFUSED |= {"Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}}


@cases("family", REFUSED)
def test_sliding_windows_and_scaled_heads_are_refused_in_one_line(family):
    model = plain.random_model(SMALL, family, **REFUSED[family])
    with pytest.raises(UserError, match=f"^{family}[^\n]*$"):
        motg.rollout(model, SMALL, PROMPTS, config(chains=2, max_new_tokens=8), seeded(0))


# ---------------------------------------------------------------------- the end of a thought
SAID = [(3, "</ think >Ċ b <eos>"), (5, "> b </ think >Ċ c <end>"), (2, "</think > c <eos>")]
SAID += [(1, "b</think>a c <eos>"), (3, "<< / think>< c <eos>"), (5, "< </ th in k></th c <eos>")]
SAID += [(5, "</ think a> c <eos>"), (2, "</ <eos>"), (1, "<end>")]
SAID += [(3, "b </think ></think > c <eos>")]


@cases("n, said", SAID)
def test_a_thought_ends_where_its_text_completes_the_tag(n, said):
    """Of tokens said for certain n are the thought's: by ids the tag would be missed in `</`,
    `think`, `>\\n`, and `>` would end any thought."""
    assert SMALL.convert_ids_to_tokens(SMALL.encode("</think>\n")) == ["</", "think", ">Ċ"]
    said = said.split()
    follow = {a: {b: 1.0} for a, b in zip(["a", *said], said)}
    cfg = config(chains=2, max_new_tokens=9, temperature=1.0)
    r = motg.rollout(plain.bigram(SMALL, follow), SMALL, ["a", "bba"], cfg, seeded(0))
    assert all(SMALL.convert_ids_to_tokens(row) == said for row in r.representative)
    assert r.mask.all() and r.sampled.all() and (r.thinking.sum(1) == n).all()
    assert r.mixed[:, : n - 1].all() and not r.mixed[:, n - 1 :].any()


def test_thoughts_of_random_pieces_of_the_tag_end_where_their_text_says():
    pieces = [x for x in ID if set(x) & set("<>/") or x in THINK]
    model = plain.deaf(SMALL, {x: 1 / len(pieces) for x in pieces})
    cfg = config(chains=2000, max_new_tokens=6, temperature=1.0)
    r = motg.rollout(model, SMALL, ["a"], cfg, seeded(0))
    plain.check_rollout(r, SMALL, cfg)
    assert len({text for text in r.texts if THINK in text}) > 50


FORCED = [("entropy", 3, 0.5, 6), ("entropy", 2, 0.5, 2), ("entropy", 1, 0.8, 1)]
FORCED += [("steps", 1, 0.0, 1), ("steps", 5, 0.0, 5)]


@cases("method", ["dirichlet", "different-tokens"])
@cases("end, n, below, at", FORCED)
def test_entropy_and_steps_force_the_tag_without_a_loss(method, end, n, below, at):
    """The tag is written at step `at`, its tokens one-hot, unsampled, without a log-prob."""
    follow = {"t": "i", "i": "n", "n": "ab", "a": "k", "b": "k", "k": "h", "h": "c"}
    follow = {last: {v: 1 / len(vs) for v in vs} for last, vs in follow.items()}
    follow |= {">": {"<end>": 0.5, "in": 0.5}, "in": {"<eos>": 1.0}}
    model = plain.bigram(SMALL, follow)  # from t on the entropies are 0, 0, log 2, 0, 0, 0
    how = {"end": end, "end_entropy": below, "end_patience": n, "end_steps": n, "chains": 20}
    cfg = config(method, max_new_tokens=12, temperature=1.0, **how)
    r = motg.rollout(model, SMALL, ["t"], cfg, seeded(0))
    plain.check_rollout(r, SMALL, cfg)
    tag, t = torch.tensor(SMALL.encode(THINK)), torch.arange(r.mask.shape[1])
    here = (t >= at) & (t < at + len(tag)) & r.mask
    assert (r.representative[:, at : at + len(tag)] == tag).all()
    assert torch.equal(r.kind == motg.FORCED, here) and (r.logprob[here] == 0).all()
    assert torch.equal(r.thinking, (t < at + len(tag)) & r.mask)
    assert {text.partition(THINK)[2] for text in r.texts} == {"", "in"}


# ---------------------------------------------------------------------------------------- GRPO
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
UPDATES += [{"method": "multiplex", "aggregation": "uniform"}]  # exact scores


@cases("how", UPDATES)
def test_an_update_is_the_gradient_of_the_whole_batch_by_hand(small, how):
    """Every row on its own, by transformers, in one sum; whatever the micro-batch."""
    how = {"kl_beta": 0.5, "chains": 6, "max_new_tokens": 10, "grad_clip": 1e9} | how
    reference = plain.eager(plain.random_model(SMALL, seed=9))
    cfg, policy = config(**how), plain.eager(small)
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(1))
    A = torch.randn(24, generator=seeded(2))
    new = plain.logprobs(policy, SMALL, r, cfg)
    log_r = plain.logprobs(reference, SMALL, r, cfg).detach() - new if cfg.kl_beta else 0.0 * new
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


def read_by(r):
    """The tokens that were read in each row, without the padding."""
    return [tuple(y[real].tolist()) for y, real in zip(r.representative, r.mask)]


@cases("prompts", [["ab" * 40 + "c" * i for i in range(12)], PROMPTS * 3])
def test_micro_batches_hold_their_tokens_and_cover_each_row_once(small, prompts):
    """12 prompts, 6 chains each: of 80 tokens and more, and of a few; a prompt may be split."""
    cfg = config(chains=6, max_new_tokens=5, micro_tokens=300)
    r = motg.rollout(small, SMALL, prompts, cfg, seeded(0))
    with mock.patch.object(motg, "rollout_logprobs", side_effect=motg.rollout_logprobs) as scores:
        updated(small, None, r, torch.ones(72), cfg)
    parts = [call.args[1] for call in scores.call_args_list]
    sizes = [len(set(p.prompt.tolist())) * p.prompt_mask.shape[1] + p.mask.numel() for p in parts]
    assert len(parts) > 1 and max(sizes) <= 300 + r.prompt_mask.shape[1]
    rows = [Counter(zip(x.prompt.tolist(), read_by(x))) for x in (r, *parts)]
    assert sum(rows[1:], Counter()) == rows[0]


def test_at_the_first_step_the_ratio_is_one_and_the_kl_zero_in_bf16_too(small):
    """A bf16 copy samples, autocast scores, and the gradient is the float32 weights'."""
    grads, A = [], torch.randn(24, generator=seeded(5))
    for precision, low, high in (("fp32", 0, 1e-5), ("bf16", 1e-4, 0.1)):
        how = {"precision": precision, "chains": 6, "max_new_tokens": 10}
        cfg = config(**how, grad_clip=1e9, micro_tokens=40)
        sampler = copy.deepcopy(small).to(motg.compute_dtype(small, cfg))
        r = motg.rollout(sampler, SMALL, PROMPTS, cfg, seeded(0))
        assert (sampler.dtype == torch.bfloat16) == (precision == "bf16")
        assert r.logprob.dtype == r.log_weights.dtype == torch.float32
        log, _ = updated(small, copy.deepcopy(small), r, A, cfg)
        assert log["kl"] == 0 and log["clipped"] == 0 and low <= log["sampler_gap"] < high
        assert log["loss"] == pytest.approx(-A.mean().item(), abs=1e-5)
        same = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(0))
        grads.append(updated(small, None, same, A, cfg)[1])
    assert 1e-4 < relative_error(*reversed(grads)) < 0.1


def test_an_update_that_is_not_finite_is_skipped(small):
    cfg = config(chains=2, max_new_tokens=4)
    r = motg.rollout(small, SMALL, PROMPTS[:1], cfg, seeded(0))
    log, moved = updated(small, None, r, torch.tensor([INF, -INF]), cfg)
    assert not math.isfinite(log["grad_norm"]) and not moved.any()


def test_a_large_vocabulary_is_scored_in_chunks_with_the_same_values_and_gradients():
    """With 2^19 tokens the float32 logits of 36 steps are 72 MiB."""
    how = {"vocab_size": 2**19, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    model, sizes = plain.random_model(SMALL, **how), []
    cfg = config(chains=6, max_new_tokens=6, logprob="weighted", precision="fp32")
    r = motg.rollout(model, SMALL, ["a"], cfg, seeded(0))
    twin, factors = plain.eager(model), torch.rand(6, 6, generator=seeded(1))
    model.lm_head.register_forward_hook(lambda head, x, out: sizes.append(out.numel()))
    got, want = motg.rollout_logprobs(model, r, cfg), plain.logprobs(twin, SMALL, r, cfg)
    assert r.sampled.all() and torch.allclose(got, want, atol=1e-3) and max(sizes) <= 2**24
    got = torch.autograd.grad((got * factors).sum(), model.parameters())
    want = torch.autograd.grad((want * factors).sum(), twin.parameters())
    assert relative_error(flat(got), flat(want)) < 1e-4


def test_performance_log_probabilities_read_each_prompt_once_for_its_chains(small):
    cfg, seen, layer = config(chains=6, max_new_tokens=10), [], small.model.layers[0]
    r = motg.rollout(small, SMALL, PROMPTS, cfg, seeded(3))
    hook = layer.register_forward_hook(lambda _, args, out: seen.append(args[0][..., 0].numel()))
    motg.rollout_logprobs(small, r, cfg)
    hook.remove()
    assert sum(seen) == 4 * r.prompt_mask.shape[1] + r.mask.numel()  # tokens that layer saw


def test_cudnns_attention_is_off_once_a_model_has_been_used():
    """Its gradient is NaN with a mask at some lengths (pytorch#196678)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    motg.rollout(plain.random_model(SMALL), SMALL, PROMPTS, config(max_new_tokens=2), seeded(3))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# -------------------------------------------------------------------------------------------- tasks
def questions(problems):
    return [entry["question"] for _, entry, _ in problems]


@cases("task", ["chain_sum", "graph_color", "list_functions"])
def test_no_question_is_in_training_and_test(task):
    tokenizer, held_out = plain.byte_tokenizer(), []
    for seed in (0, 42):
        cfg = config(task=task, seed=seed, max_prompt_tokens=9999, eval_problems=30)
        drawn = [motg.train_problem(cfg, tokenizer, n) for n in range(20)]
        again = [motg.train_problem(cfg, tokenizer, n) for n in range(20)]
        assert questions(drawn) == questions(again)  # a function of (seed, n)
        for stream in (0, 2 + seed):
            drawn += motg.usable_problems(cfg, tokenizer, stream, range(500), test=False)
        held_out.append(questions(motg.test_problems(cfg, tokenizer)))
        assert len(set(questions(drawn))) > 100
        assert not set(questions(drawn)) & set(held_out[-1])
    assert held_out[0] == held_out[1]  # one test set for all seeds
    assert len(set(held_out[0])) == len(held_out[0]) == 30
    for question in held_out[0]:  # the question's own hash decides
        assert int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10 == 0


class Numbers:
    """In place of `dataset`: item i of seed s is a question about the number s + i."""

    question, drawn = str, ()

    def __call__(self, task, seed, task_settings=""):
        self.seed = seed
        return self

    def __getitem__(self, i):
        self.drawn += (self.seed + i,)
        return {"question": self.question(self.drawn[-1]), "answer": "0", "metadata": {}}

    def since(self):
        """The numbers drawn since the last call."""
        drawn, self.drawn = set(self.drawn), ()
        return drawn


@pytest.fixture
def numbers(monkeypatch):
    monkeypatch.setattr(motg, "dataset", Numbers())
    return motg.dataset


def test_streams_of_items_cannot_overlap(numbers):
    """Every seed, the test problems and the warm start have a block of 10^9 numbers each."""
    tokenizer, found = plain.byte_tokenizer(), {"test": set()}
    for seed in (0, 1, 300, 999_999):  # no prompt is short enough: all that could be drawn is
        cfg = config(seed=seed, max_prompt_tokens=1, eval_problems=10)
        for n in (0, 999_999):
            with pytest.raises(UserError, match="max_prompt_tokens"):
                motg.train_problem(cfg, tokenizer, n)
        found[seed] = numbers.since()
        with pytest.raises(UserError, match="max_prompt_tokens"):
            motg.test_problems(cfg, tokenizer)
        found["test"] |= numbers.since()
    numbers.question = mock.Mock(side_effect=[*"abcdef", KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        warm_start.warm_start(config(smoke=True))
    found["warm start"] = numbers.since()
    blocks = [{number // 10**9 for number in drawn} for drawn in found.values()]
    assert [len(each) for each in blocks] == [1] * 6, blocks
    assert len(set.union(*blocks)) == 6 and min(set.union(*blocks)) >= 0, blocks


def test_problems_of_a_run_share_no_item_and_are_drawn_until_one_is_short(numbers):
    def question(number):  # a fifth is short, and each comes again after 300 others
        number %= 301
        return str(number) if number < 60 else f"{number}, long" * 50

    numbers.question = question
    tokenizer, cfg, found, drawn = plain.byte_tokenizer(), config(max_prompt_tokens=300), [], []
    for n in (0, 3, 7, 999_999, 0, 3):
        found += questions([motg.train_problem(cfg, tokenizer, n)])
        drawn.append(numbers.since())
    assert found[:2] == found[4:] and all(map(str.isdigit, found))
    assert drawn[:2] == drawn[4:] and sum(map(len, drawn)) > 10
    assert len(set.union(*drawn[:4])) == sum(map(len, drawn[:4]))
    for stream in (0, 5):
        motg.counts.clear()
        stream_of = cfg, tokenizer, stream, range(900)
        found = questions(x for t in (True, False) for x in motg.usable_problems(*stream_of, t))
        assert sorted(map(int, found)) == list(range(60))  # each once
        assert motg.counts["too_long"] == 301 - 60


def test_task_settings_reach_the_questions_and_the_scorer():
    tokenizer = plain.byte_tokenizer()
    cfg = config(task="chain_sum", task_settings='{"min_terms": 7, "max_terms": 7}')
    _, entry, _ = motg.train_problem(cfg, tokenizer, 0)
    assert len(re.findall(r"\d+", entry["question"])) == 7
    settings = '{"min_num_decimal_places": 1, "max_num_decimal_places": 1}'
    cfg = config(task="decimal_arithmetic", task_settings=settings)
    task, entry, _ = motg.train_problem(cfg, tokenizer, 0)
    near = f"{float(entry['answer']) + 0.05:.6f}"
    assert motg.score(task, near, entry) == 1.0  # right to one decimal place, not to three
    for wrong in ("{", "[]", '{"nope": 1}', '{"min_terms": 9}'):
        with pytest.raises(UserError, match="^[^\n]*task_settings[^\n]*$"):
            motg.train_problem(config(task="chain_sum", task_settings=wrong), tokenizer, 0)


def test_the_smoke_modes_task_settings_are_for_its_own_task_only():
    """`train --smoke --task gcd` was refused, for gcd has no max_terms."""
    assert "max_terms" in config(smoke=True).task_settings
    cfg = config(smoke=True, task="gcd", max_prompt_tokens=999)
    assert cfg.task_settings == "{}" and cfg.chains == config(smoke=True).chains
    assert motg.train_problem(cfg, plain.byte_tokenizer(), 0)[0] == "gcd"
    given = '{"max_value": 20}'
    assert config(smoke=True, task="gcd", task_settings=given).task_settings == given


def turns_of(cfg, template=plain.CHATML):
    """[(role, text)] of the first training prompt, and its question."""
    _, entry, prompt = motg.train_problem(cfg, plain.byte_tokenizer(template), 0)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    return turns, entry["question"]


def test_shots_are_turns_and_a_system_text_that_is_refused_is_in_the_users_turn():
    shots = [["1 + 1?", "a</think> <answer>2</answer>"], ["2 + 2?", "b</think> <answer>4</answer>"]]
    Path("shots.json").write_text(json.dumps(shots))
    for name, said in (("", []), ("shots.json", shots[0] + shots[1])):
        cfg = config(task="chain_sum", shots=name)
        (system, *turns), question = turns_of(cfg)
        assert system[0] == "system" and "<think>" in system[1] and "<answer>" in system[1]
        assert turns == list(zip(itertools.cycle(["user", "assistant"]), [*said, question]))
        folded, _ = turns_of(cfg, plain.NO_SYSTEM)
        assert folded == [("user", f"{system[1]}\n\n{turns[0][1]}"), *turns[1:]]
    for wrong in ("[1, 2]", '[["a"]]', "{"):
        Path("shots.json").write_text(wrong)
        with pytest.raises(UserError, match="^shots = 'shots.json'[^\n]*$"):
            motg.train_problem(cfg, plain.byte_tokenizer(), 0)


@cases("end", ["<think>", "<think>{{ '\n' }}", "<think>{{ '\n\n' }}"])
def test_a_template_that_opens_the_thought_is_left_as_it_is(end):
    tokenizer = plain.byte_tokenizer("{{ messages[-1].content }}" + end)
    _, entry, prompt = motg.train_problem(config(task="chain_sum"), tokenizer, 0)
    assert prompt == entry["question"] + re.sub(r"{{ '|' }}", "", end)


# ------------------------------------------------------------------------------ answers and rewards
ANSWERS = [("1</think> <answer>2</answer>", "2"), ("t</think>2</answer>", None)]
ANSWERS += [("t</think>\n<answer>\n1 2\n3\n</answer>", "1 2\n3")]
ANSWERS += [("t</think><answer>1</answer> no <answer> 2 </answer> bye", "2"), ("", None)]
ANSWERS += [("t</think><answer>1<answer>2</answer>", "2"), ("t</think><answer>2", None)]
ANSWERS += [("t<answer>0</answer></think><answer></answer>", ""), ("42", None)]
ANSWERS += [("t</think>a</think><answer>3</answer>", "3"), ("<answer>7</answer>", None)]
ANSWERS += [("<answer>1</answer></think> so 2", None), ("t</think></answer><answer>", None)]


@cases("text, answer", ANSWERS)
def test_an_answer_is_the_last_one_after_the_thought_with_its_newlines(text, answer):
    assert motg.extract_answer(text) == answer


def test_rewards_and_their_parts():
    problem = motg.train_problem(config(task="chain_sum"), plain.byte_tokenizer(), 0)
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
        assert found["reward"] == pytest.approx(2 * found["score"] + (form + words) / 2)


# -------------------------------------------------------------------------------- contained scoring
# docs/experiments/test_hostile_answers.py goes through thousands of answers.
def entry_of(task, **settings):
    """(data set, entry, a right answer or None); two tasks keep theirs in the metadata."""
    data = reasoning_gym.create_dataset(task, size=1, seed=0, **settings)
    entry = data[0]
    if task == "graph_color":
        return data, entry, json.dumps(entry["metadata"]["possible_answer"])
    return data, entry, entry["metadata"].get("example_answer", entry["answer"])


class Misdeed(dict):
    """An entry that runs its `code` in the child, when the scorer reads the right answer."""

    def __getitem__(self, name):
        if name == "answer":
            exec(self["code"])  # noqa: S102
        return super().__getitem__(name)


def children(child):
    """Scores come from children that run `child`, within a second; nothing is counted yet."""
    motg.counts.clear()
    motg.scorer.cache_clear()
    return mock.patch.multiple(motg, score_each=child, SECONDS=1.0)


@pytest.fixture
def score_sum(here):
    """score_sum(answer=the right one, code): the score of one sum."""
    _, entry, right = entry_of("chain_sum")

    def score(answer=right, code="pass"):
        return motg.score("chain_sum", answer, Misdeed(entry | {"code": code}))

    motg.counts.clear()
    assert score() == 1.0 and score("x") < 1 and not motg.counts
    return score


ORDINARY = motg.score_each  # a child as motg has it
MISDEEDS = [("died", "os._exit(0)"), ("died", "os.kill(os.getpid(), 9)"), ("died", "9**9**9")]
MISDEEDS += [("raised", "1/0"), ("raised", "sys.exit(0)"), ("raised", "quit()")]
MISDEEDS += [("raised", "[bytes(1 << 28) for _ in range(40)]"), ("raised", "bytearray(1 << 40)")]


@cases("verdict, code", MISDEEDS)
def test_a_scorer_that_goes_wrong_is_counted_and_the_next_is_right(verdict, code, score_sum):
    began = time.perf_counter()
    assert score_sum(code=code) == 0.0 and motg.counts == {verdict: 1}
    assert time.perf_counter() - began < 4
    assert score_sum() == 1.0 and score_sum("x") < 1 and motg.counts == {verdict: 1}


def test_an_interrupted_score_is_not_the_next_answers(score_sum):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        score_sum(code="time.sleep(0.5)")  # its late score would be 1
    signal.signal(signal.SIGALRM, before)
    assert score_sum("x") < 1 and score_sum() == 1.0


@cases("child", [lambda *given: None, lambda pipe, parents: pipe.send(0.0)])
def test_a_scorer_that_cannot_work_is_one_line_and_not_zeros(child, score_sum, capsys):
    with children(child):
        for command in ("train", "eval"):
            refused(f"{command} --smoke", "scoring does not work", capsys)
    assert score_sum() == 1.0


def hung(pipe, parents):
    if os.fork() == 0:  # this one still holds the pipe when its parent has been killed
        time.sleep(6)
        os._exit(0)
    signal.pause()


def test_a_child_that_hangs_is_killed_and_leaves_no_one_waiting(score_sum):
    began = time.perf_counter()
    with children(hung):
        assert score_sum() == 0.0 and motg.counts == {"died": 1}
    assert time.perf_counter() - began < 4 and score_sum() == 1.0


def without_limits(*given):
    """On a system that refuses every limit, as macOS refuses some."""
    resource.setrlimit = mock.Mock(side_effect=ValueError("not allowed to raise maximum limit"))
    ORDINARY(*given)


def laden(*given):
    """In a program that has much in use, as the threads of a BLAS library have."""
    laden.ballast = bytes(3 << 30)
    ORDINARY(*given)


@cases("child, most", [(ORDINARY, 4), (laden, 4), (without_limits, None)])
def test_an_answer_has_4_gib_beyond_what_is_in_use_and_always_its_time(child, most, score_sum):
    with children(child):
        assert score_sum(code="bytes(7 << 29)") == 1.0  # 3.5 GiB
        assert score_sum(code="bytes(9 << 29)") == (0.0 if most else 1.0)
        assert score_sum(code="9**9**9") == 0.0 and motg.counts["died"] == 1
    motg.scorer.cache_clear()


OWN_TASK = """
from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset
from reasoning_gym.factory import register_dataset

class Sevens(ChainSumDataset):
    def score_answer(self, answer, entry):
        return 1.0 if answer == "7" else 0.25

register_dataset("sevens", Sevens, ChainSumConfig)
"""
SCRIPT = """
import os, reasoning_gym, torch
from transformers.utils import logging

def settings():
    mine = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    return dict(os.environ), mine

before = settings()
import motg, sevens
assert settings() == before, "importing motg changes settings of the process"
entry = reasoning_gym.create_dataset("sevens", size=1)[0]
print([motg.score("sevens", answer, entry) for answer in "79"])
"""


def test_a_script_without_a_guard_scores_a_task_of_its_own_and_importing_changes_nothing():
    """The script has no `if __name__ == "__main__":`, and its task is in a module beside it."""
    Path("sevens.py").write_text(OWN_TASK)
    Path("script.py").write_text(SCRIPT)
    how = {"capture_output": True, "text": True, "env": ENVIRONMENT | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, "script.py"], check=False, **how)
    assert done.stdout == "[1.0, 0.25]\n", done.stderr  # once: the child does not run it again


# --------------------------------------------------------------------------------- refused commands
RUN = "train --smoke --out out --task chain_sum --seed 1 --steps 4 --save-every 2 --chains 2 "
RUN += "--prompts-per-step 2 --eval-problems 3 --max_new_tokens 6 --max-prompt-tokens 300 "
RUN += "--lr 1e-3 --warmup 0 --model "


def refused(command, pattern, capsys):
    """Runs motg: it must say what `pattern` asks for in one line, and change nothing on disk."""

    def on_disk():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*")}

    before = on_disk()
    capsys.readouterr()
    assert motg.main(command.split()) == 2
    assert re.fullmatch(f"motg: .*{pattern}.*\n", capsys.readouterr().err), command
    assert on_disk() == before, command


def test_every_setting_is_a_flag_with_help_and_refuses_what_it_cannot_be(capsys):
    with pytest.raises(SystemExit) as ended:
        motg.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for field in dataclasses.fields(motg.Config):
        assert f"--{field.name}" in shown and f"--{field.name.replace('_', '-')}" in shown
        wrong = {int: [-1, 0.5, 10**11], float: [-1.0, math.nan, INF]}.get(field.type, [])
        for value in wrong + ["nope"] * (field.name in {"method", *motg.CHOICES}):
            with pytest.raises(UserError, match=f"^{field.name} = [^\n]*; allowed: [^\n]*$"):
                config(**{field.name: value})


WRONG = {
    "": "command",
    "trian": "train.*eval",
    "train": "no CUDA GPU; allowed: --smoke, or --device cpu",
    "eval --task qqq": "'qqq'; allowed",
    "eval --method zzz": "'zzz'; allowed",
    "eval --method single --k 4": "k = 4; allowed: 1",
    "RUN --kk 3": "--kk",
    "RUN --no-smoke-please": "--no",
    "RUN extra": "extra",
    "RUN --method single,dirichlet": "single,dirichlet",
    "RUN --method single --k 4": "k = 4; allowed",
    "RUN --steps many": "steps.*many",
    "RUN --k 0": "k = 0; allowed",
    "RUN --k 100000": "k = 100000; allowed",
    "RUN --temperature 0": "temperature = 0.*allowed",
    "RUN --top-p 2": "top_p = 2.*allowed",
    "RUN --seed 1000000": "seed = 1000000; allowed",
    "RUN --max_new_tokens 0": "max_new_tokens = 0; allowed",
    "RUN --chains 1": "chains = 1; allowed: 2",
    "RUN --max-prompt-tokens 5": "max_prompt_tokens = 5",
    "RUN --max-new-tokens 5000": "max_new_tokens = 5300.*1024",
    "RUN --task_settings {": "task_settings '{'",
    "RUN --shots none.json": "shots = 'none.json'; allowed",
    "RUN --device cuda": "CUDA.*allowed",
    "RUN --task pool_matrix --seed 5 --max-prompt-tokens 1000": "pool_matrix",
    "RUN --model /no/such": "'/no/such'.*allowed",
}


@cases("command", WRONG)
def test_wrong_commands_are_one_line_and_change_nothing(command, folder, capsys):
    refused(command.replace("RUN", f"{RUN} {folder}"), WRONG[command], capsys)


ODD = ('{"method": "single", "nope": 1}', '{"method": "single", "k": "x"}')


@cases("text", ['{"k": 2', "[1]", "3", "\0", *ODD])
def test_a_damaged_config_of_a_run_is_refused(text, folder, capsys):
    Path("out").mkdir()
    Path("out/config.json").write_text(text)
    refused(f"{RUN} {folder} --resume", "", capsys)


# --------------------------------------------------------------------------------------------- runs
@pytest.fixture
def run(folder):
    """run(flags): the exit status of a run of four steps in the folder `out`."""
    return lambda flags="": motg.main(f"{RUN} {folder} {flags}".split())


def read(name):
    return json.loads(Path("out", name).read_text())


def lines_of(name):
    """The JSON objects of a file, one a line."""
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


def logged(name):
    """What the steps of a run have logged."""
    return [log.get(name) for log in lines_of("metrics.jsonl")]


def test_what_a_run_writes_and_says(run, folder, capsys):
    """On a CPU without --smoke; it computes no hidden-state probes."""
    flags = "--method different-tokens --k 3 --eval-every 2 --accumulate 1 --device cpu"
    with mock.patch.object(motg, "hidden_probe", None):  # a call would raise
        assert motg.main(f"{RUN} {folder} {flags}".replace("--smoke ", "").split()) == 0
    said = capsys.readouterr().out
    files = {"config.json", "metrics.jsonl", "samples.jsonl", "result.json", "trainer.pt"}
    assert set(os.listdir("out")) == files | {"checkpoint"}
    assert logged("step") == [0, 1, 2, 3]
    assert [x is None for x in logged("test_accuracy")] == [True, False] * 2
    names = "reward score correct format entropy kl loss grad_norm lr no_gradient too_long refused"
    names += " raised died sampler_gap clipped support one_hot think_tokens truncated mixed"
    assert all(math.isfinite(sum(logged(name))) for name in names.split())
    want = {"k": 3, "smoke": False, "max_new_tokens": 6, "max_prompt_tokens": 300}
    assert want.items() <= read("config.json").items()
    assert {"method", "seed", "accuracy_before", "accuracy_after"} <= set(read("result.json"))
    models = map(transformers.AutoModelForCausalLM.from_pretrained, (folder, "out/checkpoint"))
    before, after = (model(torch.tensor([[5, 6, 7]])).logits for model in models)
    assert not torch.equal(before, after) and after.isfinite().all()
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/checkpoint")
    assert tokenizer.chat_template == plain.CHATML
    refused(f"{RUN} {folder} {flags}", "out = 'out'.*; allowed: --resume", capsys)
    refused(f"{RUN} {folder} --device cuda", "no CUDA GPU", capsys)  # it is looked for first
    # its last lines say what to do next: commands that work
    read_out, page = re.findall(r"python (\S+\.py [^;\n]*)", said)
    assert read_out == "motg.py eval --model out"
    assert motg.main(f"{read_out.removeprefix('motg.py ')} --eval-problems 2".split()) == 0
    assert (ROOT / page.split()[0]).exists() and page.endswith(" out")


def test_resume_on_an_empty_folder_starts_a_run(run):
    """A machine that may be taken away gets the same command each time."""
    Path("out").mkdir()
    assert run("--resume --steps 2") == 0 and logged("step") == [0, 1]
    assert run("--resume --steps 3") == 0 and logged("step") == [0, 1, 2]


def test_samples_hold_trajectories_whose_tokens_spell_the_text_that_was_rewarded(run):
    """Of the first step, and of steps behind which a checkpoint was saved."""
    with mock.patch.object(motg, "rewards", side_effect=motg.rewards) as rewards:
        flags = "--steps 3 --chains 8 --max-new-tokens 20 --save-every 2 --method different-tokens"
        assert run(flags) == 0
    samples, texts = lines_of("samples.jsonl"), rewards.call_args_list[1].args[1]
    assert [sample["step"] for sample in samples] == [0] * 8 + [1] * 8 + [2] * 8
    whole = str.maketrans("", "", "".join(map(chr, range(128, 2**16))))  # no half characters
    for sample, text in zip(samples, texts[:8]):
        steps = [step for step in sample["trajectory"] if step["kind"] != "pad"]
        spelled = "".join(step["read"] for step in steps).removesuffix("<|im_end|>")
        assert spelled.translate(whole) == text.translate(whole)
        assert {"reward", "correct"} <= set(sample)
        for step in steps:
            words, weights, p = zip(*step["candidates"])
            assert step["read"] in words and len(words) == (2 if step["kind"] == "mixed" else 1)
            assert list(weights) == pytest.approx([x / sum(p) for x in p], abs=2e-3)
            assert step["entropy"] >= 0 and (step["thinking"] or step["kind"] == "token")


@cases("flags, share", [("--method single", 0), ("", 1), ("--mix-steps 2", 1 / 3)])
def test_the_log_says_how_many_thinking_steps_mixed(flags, share, run):
    assert run(f"{flags} --steps 1") == 0  # hardly a row of this model ends before its sixth token
    assert logged("mixed") == [pytest.approx(share, abs=0.1)]


def test_eval_of_a_run_uses_its_settings_and_flags_and_presets_win(run, capsys):
    assert run("--k 4 --temperature 1 --steps 1 --eval-problems 5") == 0
    command = "eval --eval-problems 20 --model out"
    capsys.readouterr()
    assert motg.main(command.split()) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^pass@1 +[\d.]+$", shown, re.MULTILINE)
    assert not re.search(r"\d\.\d{6}", shown)  # it is rounded
    for flags in ("--method single", "--method multiplex", "--method different-tokens --k 3"):
        assert motg.main([*f"{command}/checkpoint --temperature 0.5".split(), *flags.split()]) == 0
    rows = lines_of("eval.jsonl")
    found = [(row["method"], row["k"], row["temperature"]) for row in rows]
    others = [("single", 1, 0.5), ("multiplex", 3, 0.5), ("different-tokens", 3, 0.5)]
    assert found == [("dirichlet", 4, 1.0), *others]
    for row in rows:
        assert 0 <= row["pass@1"] <= row["pass@2"] <= 1 and {"stderr", "entropy"} <= set(row)
        assert row["problems"] == 20 and row["max_new_tokens"] == 6
        assert 0 < row["hidden_entropy"] < 1


def test_eval_of_any_models_folder_whose_config_is_no_runs(folder):
    flags = "--smoke --max-new-tokens 6 --max-prompt-tokens 300 --eval-problems 2 --out out"
    assert motg.main(f"eval --model {folder} {flags}".split()) == 0
    assert [row["model"] for row in lines_of("eval.jsonl")] == [folder]


def test_a_resumed_run_remembers_its_settings_and_an_accuracy_of_zero(run, monkeypatch):
    assert run("--steps 2") == 0 and read("result.json")["accuracy_before"] == 0.0
    monkeypatch.setattr(motg, "evaluate", lambda *args, **how: {"pass@1": 0.7})
    assert motg.main(["train", "--out", "out", "--resume", "--steps", "3", "--lr", "1e-5"]) == 0
    want = {"accuracy_before": 0.0, "accuracy_after": 0.7, "seed": 1, "steps": 3}
    assert want.items() <= read("result.json").items()
    assert logged("lr") == [1e-3, 1e-3, 1e-5] and read("config.json")["chains"] == 2


# -------------------------------------------------------------------------------- kills and damages
def outcome(out="out"):
    """What must not depend on interruptions."""
    names = "metrics.jsonl", "samples.jsonl", "checkpoint/model.safetensors"
    result = json.loads(Path(out, "result.json").read_text())
    found = result["accuracy_before"], result["accuracy_after"]
    return [*found, *(Path(out, name).read_bytes() for name in names)]


@pytest.fixture(scope="session")
def straight(folder, tmp_path_factory):
    """The outcome of an uninterrupted run."""
    out = tmp_path_factory.mktemp("straight")
    assert motg.main(f"{RUN} {folder} --out {out}".split()) == 0
    return outcome(out)


@pytest.fixture
def goes_on(run, straight):
    """As a user does after a kill: the run ends as if there had been none."""

    def goes_on():
        assert run("--resume") == 0 and outcome() == straight
        assert not [path for path in Path("out").iterdir() if path.suffix in (".new", ".old")]

    return goes_on


def test_a_killed_program_leaves_no_process_and_goes_on_to_the_same_bits(folder, goes_on):
    command = [sys.executable, motg.__file__, *RUN.split(), folder, "--resume"]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not Path("out/trainer.pt").exists():
        assert trainer.poll() is None, trainer.stdout.read()
        time.sleep(0.005)
    trainer.kill()
    trainer.communicate(timeout=4)  # returns when nobody holds its stdout any more
    assert trainer.returncode == -signal.SIGKILL and not Path("out/result.json").exists()
    goes_on()


@pytest.fixture
def killed(folder):
    """killed(n, seconds): starts or goes on with a run in a copy of this process, which dies before
    its n-th rename, or is killed; returns its exit status. It scores without a child of its own."""
    data = reasoning_gym.create_dataset("chain_sum", size=1)

    def copy_of_a_run(n):
        renames = itertools.count()

        def die(event, args):
            if event == "os.rename" and next(renames) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        motg.scores = lambda items: [data.score_answer(*item[1:]) for item in items]
        return motg.main(f"{RUN} {folder} --resume".split())

    def killed(n=-1, seconds=None):
        process = os.fork()
        if process == 0:
            try:
                os._exit(copy_of_a_run(n))
            finally:
                os._exit(1)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    return killed


def test_a_run_killed_before_any_of_its_renames_goes_on(killed, goes_on):
    for n in itertools.count():
        status = killed(n)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        goes_on()
        shutil.rmtree("out")
    assert n >= 3  # config.json and two saves


def test_a_run_killed_at_20_random_moments_goes_on(killed, goes_on, straight):
    began = time.perf_counter()
    assert killed() == 0  # it is not, to see how long a run takes
    seconds = time.perf_counter() - began
    for _ in range(20):
        assert killed(seconds=random.uniform(0, seconds)) in (0, -signal.SIGKILL)
        if Path("out/result.json").exists():
            assert outcome() == straight
            shutil.rmtree("out")
    goes_on()


@cases("name", ["save", "save_pretrained"])
def test_a_save_that_fails_is_one_line_and_costs_no_checkpoint(name, run, goes_on, capsys):
    owner = torch if name == "save" else transformers.PreTrainedModel
    assert run("--steps 2") == 0
    before = Path("out/trainer.pt").read_bytes()
    capsys.readouterr()
    with mock.patch.object(owner, name, side_effect=OSError(28, "No space left on device")):
        assert run("--resume") == 2
    pattern = "--resume" if name == "save" else "No space left"
    assert re.fullmatch(f"motg: .*{pattern}.*\n", capsys.readouterr().err)
    assert name != "save" or Path("out/trainer.pt").read_bytes() == before
    goes_on()


@cases("harm", ["cut", "hostile", "empty"])
def test_a_damaged_checkpoint_is_refused_by_name(harm, run, folder, capsys):
    assert run("--steps 2") == 0
    damaged = Path("out/trainer.pt")
    hostile = mock.Mock(__reduce__=lambda self: (os.system, ("touch broken-into",)))
    if harm == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-1000])
    else:
        torch.save({"step": 2, "optimizer": hostile} if harm == "hostile" else {}, damaged)
    refused(f"{RUN} {folder} --resume", "out/trainer.pt", capsys)
    assert not Path("broken-into").exists()


# ----------------------------------------------------------------------------- devices and numbers
DTYPES = [(10**9, True, "auto", "bfloat16"), (10**9, True, "fp32", "float32")]
DTYPES += [(10**9, False, "auto", "float32")]  # a card that would emulate bf16
DTYPES += [(10**6, True, "auto", "float32"), (10**6, False, "bf16", "bfloat16")]  # or as told


@cases("parameters, supported, precision, want", DTYPES)
def test_a_gpu_computes_in_bf16_where_that_is_fast(parameters, supported, precision, want):
    model = mock.Mock(device=torch.device("cuda"), num_parameters=lambda: parameters)
    how = {"side_effect": lambda including_emulation=True: supported or including_emulation}
    with mock.patch.object(torch.cuda, "is_bf16_supported", **how):
        assert motg.compute_dtype(model, config(precision=precision)) == getattr(torch, want)


def test_a_driver_that_is_too_old_is_named_with_torchs_own_words(folder, capsys):
    words = "The NVIDIA driver on your system is too old (found version 11040)"
    with mock.patch.object(torch.cuda, "init", side_effect=RuntimeError(f"{words}.\nMore.")):
        refused("train", re.escape(words), capsys)
        refused(f"{RUN} {folder} --device cuda", re.escape(words), capsys)


@pytest.fixture(scope="session", autouse=True)
def on_pretended_gpu(request):
    """Starts the tests on a pretended GPU, if they are asked for. They run beside these, for they
    change settings of their whole process."""
    command = [sys.executable, "-m", "pytest", "-qx", "docs/pretended_gpu.py"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    asked = any(item.name == "test_on_a_pretended_gpu" for item in request.session.items)
    if not asked or os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        yield lambda: subprocess.Popen(command, **how)
        return
    process = subprocess.Popen(command, **how)
    yield lambda: process
    process.kill()


def test_on_a_pretended_gpu(on_pretended_gpu):
    process = on_pretended_gpu()
    said, _ = process.communicate()
    assert process.returncode == 0, said[-4000:]


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
    want = {"entropy": r.entropy[r.thinking], "mixed": r.mixed[r.thinking]}
    want |= {"weight_entropy": H, "support": H.exp(), "think_tokens": r.thinking.sum(1)}
    want |= {"answer_tokens": (r.mask & ~r.thinking).sum(1), "truncated": ~r.eos.any(1)}
    want["gini_simpson"] = torch.tensor([1 - sum(w * w for w in step) for step in steps])
    want["one_hot"] = torch.tensor([max(step) > 0.99 for step in steps])
    want["distinct_tokens"] = torch.tensor([len(each) for each in seen])
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


def test_pass_at_k_against_all_choices():
    for c, k in product(range(6), range(1, 6)):
        chosen = list(itertools.combinations([True] * c + [False] * (5 - c), k))
        assert motg.pass_at_k(5, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


# ----------------------------------------------------------------------- does the whole loop learn?
def vowels(problems, texts):
    """In place of `rewards`: the share of vowels in what is read."""
    shares = [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in texts]
    return [{"reward": x, "score": x, "format": 0.0, "correct": x > 0.5} for x in shares]


@cases("method", ["single", "dirichlet", "different-tokens"])
def test_training_raises_the_reward(method, run, monkeypatch):
    monkeypatch.setattr(motg, "rewards", vowels)
    flags = "--steps 30 --chains 8 --prompts-per-step 4 --lr 3e-3 --grad-clip 1 --kl-beta 0"
    assert run(f"{flags} --save-every 100 --seed 3 --method {method}") == 0
    reward = logged("reward")
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.12, reward
