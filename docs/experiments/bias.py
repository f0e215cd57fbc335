"""Bias and variance of the policy gradient under each score, on a problem that can be enumerated.

    python docs/experiments/bias.py    docs/experiments/results/bias.json, ten minutes

A random transformers model with five tokens thinks for two steps, at most, and writes the rest of
four tokens as an answer, which is right if its last token is `a`. Where only tokens are drawn,
every trajectory is listed with its probability (enumeration.py), and the true gradient of the
expected reward is known. For drawn weights it is estimated from 200,000 trajectories by the exact
score, which is unbiased there; `noise` says how well: the relative difference of two halves,
divided by 2. The first edition (commit e556bde) had a problem without an answer: it read
the last token of a mixture, which `weighted` does not credit.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import enumeration as plain  # noqa: E402
import plot  # noqa: E402
import temperatures  # noqa: E402
from enumeration import motg  # noqa: E402

FIVE, PROMPT = plain.FIVE, "ab"
P_HAT = {"aggregation": "probability"}
RULES = {
    "top-k, p^": {"k": 2, "sampling": "top-k"} | P_HAT,
    "without replacement, p^": {"k": 2, "sampling": "without-replacement"} | P_HAT,
    "with replacement, p^": {"k": 2, "sampling": "with-replacement"} | P_HAT,
    "top-k, dirichlet": {"k": 2, "aggregation": "dirichlet"},
    "top-k, gumbel": {"k": 2, "aggregation": "gumbel", "gumbel_tau": 0.5},
}
SCORES = {
    "representative": {"logprob": "representative"},
    "weighted": {"logprob": "weighted"},
    "exact": {"logprob": "exact"},
    "exact, 1 pass": {"logprob": "exact", "weight_passes": 1},
}
COMMON = {"temperature": 0.8, "end": "steps", "end_steps": 2, "max_new_tokens": 4}


def gradient(value, model):
    """Of a number, with respect to all parameters, (parameters,)."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return plain.flat(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found))


def gradients(model, r, cfg):
    """The gradient of each trajectory's score, (B, parameters)."""
    rows = [r.select(torch.tensor([row])) for row in range(len(r.mask))]
    return torch.stack([gradient(motg.rollout_logprobs(model, x, cfg).sum(), model) for x in rows])


def reward(r):
    """1 where the last token read is `a`, (B,)."""
    last = r.mask.sum(1, keepdim=True) - 1
    return (r.representative.gather(1, last)[:, 0] == FIVE.convert_tokens_to_ids("a")).float()


def by_sampling(model, cfg, rows, batches=10):
    """(gradient of E[R], its noise) by the exact score."""
    parts = []
    for seed in range(batches):
        cfg = motg.make_config(**vars(cfg) | {"chains": rows, "logprob": "exact"})
        r = motg.rollout(model, FIVE, [PROMPT], cfg, plain.seeded(1000 + seed))
        R = reward(r)
        score = motg.rollout_logprobs(model, r, cfg, micro_batch=5000).sum(1)
        parts.append(gradient(((R - R.mean()) * score).mean(), model))
    halves = torch.stack(parts[0::2]).mean(0), torch.stack(parts[1::2]).mean(0)
    want = torch.stack(parts).mean(0)
    return want, ((halves[0] - halves[1]).norm() / want.norm() / 2).item()


def by_token_read(every):
    """Trajectories of a rule that draws no candidates, told apart by the tokens that are read too,
    each drawn from w: nothing depends on them, but `representative` scores them."""
    found = []
    for P, steps in every:
        branches = [(P.detach(), [])]
        for tokens, w, read, kind, text in steps:
            reads = zip(tokens, w) if kind == motg.MIXED else [(read, 1.0)]
            branches = [
                (p * share, [*before, (tokens, w, y, kind, text)])
                for y, share in reads
                for p, before in branches
            ]
        found += branches
    return found


def by_enumeration(model, cfg):
    """(all trajectories, their probabilities (B,), gradient of E[R])."""
    sample, twin = motg.rollout(model, FIVE, [PROMPT], cfg, plain.seeded(0)), plain.eager(model)
    prompt = twin.get_input_embeddings()(torch.tensor(FIVE.encode(PROMPT)))
    every = plain.trajectories(twin, FIVE, cfg, prompt)
    P, R = torch.stack([p for p, _ in every]), reward(plain.by_hand(sample, every, cfg.k))
    want = gradient((P * R).sum(), twin)
    if not motg.SAMPLING[cfg.sampling].logprob:
        every = by_token_read(every)
    P = torch.stack([p.detach() for p, _ in every])
    return plain.by_hand(sample, every, cfg.k), P / P.sum(), want


def group_cosines(P, R, grads, want, G, groups=2000):
    """Cosines with the truth of one group's estimate (its mean), and of the mean of all groups'
    estimates, each divided by the standard deviation of its rewards, as GRPO does."""
    rows = torch.multinomial(P, groups * G, replacement=True, generator=plain.seeded(G))
    rows = rows.view(groups, G)
    r, found, total = R[rows], [], torch.zeros_like(want)
    centered, normed = r - r.mean(1, keepdim=True), motg.group_advantages(r)
    for index, a, A in zip(rows, centered, normed):
        one = F.cosine_similarity(a @ grads[index], want, dim=0)
        found.append(one if a.any() else torch.tensor(0.0))
        total += A @ grads[index]
    return torch.stack(found).mean().item(), F.cosine_similarity(total, want, dim=0).item()


def measured(rule, head, name, chains, samples, groups):
    """Rows of the table: one rule, one sharpness, every score."""
    how = COMMON | RULES[rule] | {"chains": chains}
    model, rows, noise = plain.random_model(FIVE, seed=10, head=head), [], 0.0
    exact = motg.make_config(**how, logprob="exact")
    drawn = motg.AGGREGATION[exact.aggregation].logdensity
    if drawn:
        r = motg.rollout(model, FIVE, [PROMPT], exact, plain.seeded(0))
        P = torch.full([chains], 1 / chains)
        want, noise = by_sampling(model, exact, samples)
    else:
        r, P, want = by_enumeration(model, exact)
    R = reward(r)
    A = R - (P * R).sum()
    for score, kind in SCORES.items():
        if "pass" in score and drawn:
            continue
        grads = gradients(model, r, motg.make_config(**how | kind))
        each = A[:, None] * grads
        got = want if drawn and score == "exact" else P @ each  # the truth was taken from it
        variance = (P @ each.square().sum(1) - got.square().sum()) / want.square().sum()
        row = {"candidates, weights": rule, "p": name, "score": score}
        row["cosine of E"] = f"{F.cosine_similarity(got, want, dim=0).item():.3f}"
        row["relative error of E"] = f"{plain.relative_error(got, want):.3f}"
        row["noise"] = f"{noise:.3f}" if noise else "0"
        row["variance / truth^2"] = f"{variance.item():.3g}"
        for G in (8, 64):
            one, normed = group_cosines(P, R, grads, want, G, groups)
            row[f"cosine, G = {G}"] = f"{one:.3f}"
        row["cosine of E, / std"] = f"{normed:.3f}"
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=2000, help="where weights are drawn")
    parser.add_argument(
        "--samples", type=int, default=20_000, help="ten times, for the truth there"
    )
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=HERE / "results/bias.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for rule in RULES:
        for name, head in (("flat", 0.25), ("sharp", 1.0)):
            began = time.perf_counter()
            rows += measured(rule, head, name, a.chains, a.samples, a.groups)
            print(f"{rule}, {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    about = {"commit": temperatures.commit_of(), "torch": torch.__version__}
    new = a.json.with_suffix(".new")
    new.write_text(json.dumps({"about": about, "rows": rows}, indent=0) + "\n")
    os.replace(new, a.json)
    print(plot.bias(a.json))


if __name__ == "__main__":
    main()
