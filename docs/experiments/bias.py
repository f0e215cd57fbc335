"""Bias and variance of the policy gradient under each score, on a problem that can be enumerated.

    python docs/bias.py        docs/results/bias.json, in about ten minutes on one thread

A random transformers model with five tokens writes three steps; an answer is right if the last
token read is `a`. Where only tokens are drawn, every trajectory is listed with its probability, by
the tests' own enumeration, and the true gradient of the expected reward is known. For drawn weights
it is estimated from 200,000 trajectories by the exact score, which is unbiased there; `noise` says
how well: the relative difference of two halves, divided by 2.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import motg  # noqa: E402
import test_motg as tests  # noqa: E402

P_HAT = {"aggregation": "probability"}
RULES = {
    "top-k, p^": {"k": 4} | P_HAT,
    "without replacement, p^": {"k": 2, "sampling": "without-replacement"} | P_HAT,
    "with replacement, p^": {"k": 2, "sampling": "with-replacement"} | P_HAT,
    "top-k, dirichlet": {"k": 4, "aggregation": "dirichlet"},
    "top-k, gumbel": {"k": 4, "aggregation": "gumbel", "gumbel_tau": 0.5},
}
SCORES = {"representative": {"logprob": "representative"}, "weighted": {"logprob": "weighted"}}
SCORES |= {"exact": {"logprob": "exact"}, "exact, 1 pass": {"logprob": "exact", "weight_passes": 1}}


def gradients(model, r, cfg):
    """The gradient of each trajectory's score, (B, parameters)."""
    found = []
    for row in range(len(r.mask)):
        score = motg.rollout_logprobs(model, r.select(torch.tensor([row])), cfg).sum()
        if score.requires_grad:
            grads = torch.autograd.grad(score, model.parameters(), allow_unused=True)
            grads = [
                torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads)
            ]
            found.append(tests.flat(grads))
        else:
            found.append(torch.zeros(model.num_parameters()))
    return torch.stack(found)


def reward(r):
    """1 where the last token read is `a`."""
    last = r.mask.sum(1, keepdim=True) - 1
    return (r.representative.gather(1, last)[:, 0] == tests.FIVE.convert_tokens_to_ids("a")).float()


def by_sampling(model, cfg, batches=10, rows=20_000):
    """(gradient of E[R], its noise) by the exact score."""
    parts = []
    for seed in range(batches):
        how = vars(cfg) | {"chains": rows, "logprob": "exact"}
        exact = motg.make_config(**how)
        r = motg.rollout(model, tests.FIVE, ["ab"], exact, tests.seeded(1000 + seed))
        R = reward(r)
        score = motg.rollout_logprobs(model, r, exact, micro_batch=5000).sum(1)
        grads = torch.autograd.grad(((R - R.mean()) * score).mean(), model.parameters())
        parts.append(tests.flat(grads))
    halves = torch.stack(parts[0::2]).mean(0), torch.stack(parts[1::2]).mean(0)
    want = torch.stack(parts).mean(0)
    return want, ((halves[0] - halves[1]).norm() / want.norm() / 2).item()


def group_cosines(P, R, grads, want, G, groups=2000):
    """Cosines with the truth of one group's estimate (its mean), and of the mean of all groups'
    estimates, each divided by the standard deviation of its rewards, as GRPO does."""
    rows = torch.multinomial(P, groups * G, replacement=True, generator=tests.seeded(G))
    r, found, total = R[rows].view(groups, G), [], torch.zeros_like(want)
    for index, a, normed in zip(
        rows.view(groups, G), r - r.mean(1, keepdim=True), motg.group_advantages(r)
    ):
        estimate = a @ grads[index]
        found.append(F.cosine_similarity(estimate, want, dim=0) if a.any() else torch.tensor(0.0))
        total += normed @ grads[index]
    return torch.stack(found).mean().item(), F.cosine_similarity(total, want, dim=0).item()


def measured(rule, settings, head, name):
    """Rows of the table: one rule, one sharpness, every score."""
    how = {"temperature": 0.8, "max_new_tokens": 3, "chains": 2000} | settings
    model, rows = tests.random_model(tests.FIVE, seed=10, head=head), []
    exact = motg.make_config(**how, logprob="exact")
    sample = motg.rollout(model, tests.FIVE, ["ab"], exact, tests.seeded(0))
    noise = 0.0
    if motg.AGGREGATION[exact.aggregation].logprob:
        r, P = sample, torch.full([len(sample.mask)], 1 / len(sample.mask))
        want, noise = by_sampling(model, exact)
    else:
        twin = tests.eager(model)
        inputs = twin.get_input_embeddings()(torch.tensor(tests.FIVE.encode("ab")))
        every = tests.trajectories(twin, exact, inputs)
        P, r = torch.stack([q for q, _ in every]), tests.by_hand(sample, every, exact.k)
        if exact.sampling == "top-k":  # what was drawn is in a sampled record only
            seen, keys = (tests.what_happened(x, exact) for x in (sample, r))
            known = [i for i, key in enumerate(keys) if key in set(seen)]
            P, r = (
                P[known],
                tests.picked(sample, torch.tensor([seen.index(keys[i]) for i in known])),
            )
        R = reward(r)
        grads = torch.autograd.grad((P * R).sum(), twin.parameters(), allow_unused=True)
        want = tests.flat(
            torch.zeros_like(p) if g is None else g for p, g in zip(twin.parameters(), grads)
        )
        P = P.detach() / P.detach().sum()
    R = reward(r)
    A = R - (P * R).sum()
    for score, kind in SCORES.items():
        if "pass" in score and exact.aggregation != "probability":
            continue
        grads = gradients(model, r, motg.make_config(**how | kind))
        each = A[:, None] * grads
        got = P @ each
        if noise and score == "exact":  # it is what the truth was taken from
            got = want
        variance = (P @ each.square().sum(1) - got.square().sum()) / want.square().sum()
        row = {"candidates, weights": rule, "p": name, "score": score}
        row["cosine of E"] = f"{F.cosine_similarity(got, want, dim=0).item():.3f}"
        row["relative error of E"] = f"{tests.relative_error(got, want):.3f}"
        row["noise"] = f"{noise:.3f}" if noise else "0"
        row["variance / truth^2"] = f"{variance.item():.3g}"
        for G in (8, 64):
            one, normed = group_cosines(P, R, grads, want, G)
            row[f"cosine, G = {G}"] = f"{one:.3f}"
        row["cosine of E, / std"] = f"{normed:.3f}"
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    torch.set_num_threads(1)
    rows = []
    for rule, settings in RULES.items():
        for name, head in (("flat", 0.25), ("sharp", 1.0)):
            rows += measured(rule, settings, head, name)
    path = HERE / "results/bias.json"
    path.with_suffix(".new").write_text(json.dumps({"rows": rows}, indent=0) + "\n")
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    main()
