"""A world made for mixtures: *minimum non-negative sum* (Gozeten et al. 2025, CoT2).

Each of m numbers gets a sign so that their sum is as small as it can be without being negative.
Which sign is right at a step, only the numbers still to come tell. So the tokens of a thought must
guess or look ahead, while a mixture can hold all partial sums at once:

    numbers 3, 1, 4    step 1: -3, 3    step 2: -4, -2, 2, 4    step 3: -8, -6 .. 6, 8    answer 0

Importing this module registers the task `least_sum` with Reasoning-Gym, and motg then runs it by
name. `make_base` warm-starts a small model. CoT2's *continuous supervision* teaches a model to
think so: the input of a step is the mixture of the sums that can be reached, and its target is
their distribution.

    python docs/experiments/least_sum.py eval --method single,soft-thinking --k 16

makes a base for m = 4 where there is none, and hands the command line on to motg.
"""

import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path

import reasoning_gym
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs/tools")]
import warm_start as made  # noqa: E402
from field import motg  # noqa: E402

ASKED = "Choose a sign for each number so that the sum is the smallest that is not negative: "
ASKED_LAST = ". What is the sum?"
OPENED = "\n<think>"  # so ends the prompt of a small model: a template drops its last newline
WARM_SEED = 900_000  # motg's seeds from here on are for warm starts: no run draws their problems


# ------------------------------------------------------------------------------------ the data set
@dataclass
class LeastSumConfig:
    """The settings of the task; `size` and `seed` are Reasoning-Gym's."""

    count: int = 4  # m, how many numbers
    min_value: int = 1  # the smallest number
    max_value: int = 19  # the largest number
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert 1 <= self.count <= 20, "count must be 1 to 20"
        assert 0 <= self.min_value <= self.max_value, "allowed: 0 <= min_value <= max_value"


def in_one_order(numbers):
    """These numbers in an arbitrary order that is always the same for the same numbers.

    The answer does not depend on the order. If each order were a question of its own, motg's split
    by question would test on problems that were trained on in another order.
    """
    numbers = sorted(numbers)
    random.Random(repr(numbers)).shuffle(numbers)
    return numbers


class LeastSumDataset(reasoning_gym.factory.ProceduralDataset):
    """Item i is a function of seed + i, as in Reasoning-Gym's own data sets."""

    def __init__(self, config):
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, index):
        rng = random.Random(self.seed + index)
        low, high = self.config.min_value, self.config.max_value
        numbers = in_one_order(rng.randint(low, high) for _ in range(self.config.count))
        about = {"source_dataset": "least_sum", "source_index": index, "numbers": numbers}
        return {
            "question": ASKED + ", ".join(map(str, numbers)) + ASKED_LAST,
            "answer": str(least_sum(numbers)),
            "metadata": about | {"difficulty": {"count": self.config.count}},
        }

    def score_answer(self, answer, entry):
        """1 for the right number, else 0: how near a wrong one comes says nothing."""
        try:
            return float(int(answer) == least_sum(entry["metadata"]["numbers"]))
        except (TypeError, ValueError):
            return 0.0


def reachable(numbers):
    """For each step the sums that can be reached, each with its share of all choices of signs."""
    shares, steps = {0: 1.0}, []
    for number in numbers:
        after = Counter()
        for total, share in shares.items():
            after[total + number] += share / 2
            after[total - number] += share / 2
        shares = dict(after)
        steps.append(shares)
    return steps


def least_sum(numbers):
    """The smallest sum, of those that can be reached, that is not negative."""
    return min(total for total in reachable(numbers)[-1] if total >= 0)


if __name__ != "__main__":  # then main, below, imports it: motg's scorer finds it by its name
    reasoning_gym.factory.register_dataset("least_sum", LeastSumDataset, LeastSumConfig)


# ------------------------------------------------------------------------------------- the thoughts
@lru_cache(maxsize=100_000)
def best_walks(numbers):
    """The partial sums of every choice of signs (a tuple of numbers) that ends at the answer."""
    signs = product((1, -1), repeat=len(numbers))
    walks = [tuple(accumulate(s * n for s, n in zip(choice, numbers))) for choice in signs]
    return [walk for walk in walks if walk[-1] == least_sum(numbers)]


def soft_thought(numbers, rng):
    """All sums at once: what CoT2 calls continuous supervision."""
    return reachable(numbers)


def best_thought(numbers, rng):
    """One sum a step, on a way to the answer: who imitates it has to look ahead."""
    return [{total: 1.0} for total in rng.choice(best_walks(tuple(numbers)))]


def random_thought(numbers, rng):
    """One sum a step, signs by chance. (Tokens drawn one at a time from a model that has learnt
    soft thoughts are not such walks: it has never seen one sum alone after the first step.)"""
    return [{total: 1.0} for total in accumulate(rng.choice((1, -1)) * n for n in numbers)]


# What a warm start imitates; of several thoughts each demonstration shows one, by chance. Whatever
# the thought, the answer shown is right.
SUPERVISION = {
    "soft": (soft_thought,),
    "best": (best_thought,),
    "random": (random_thought,),
    "soft+best": (soft_thought, best_thought),
    "soft+random": (soft_thought, random_thought),
}


def demonstration(entry, thought, rng):
    """A completion as a list of steps, each {token's text: weight}; an ordinary token weighs 1."""
    sums = thought(entry["metadata"]["numbers"], rng)
    steps = [{sum_word(total): share for total, share in shares.items()} for shares in sums]
    reply = (motg.TAG, " <answer>", entry["answer"], "</answer>", "<|im_end|>")
    return steps + [{word: 1.0} for word in reply]


# ----------------------------------------------------------------------------------- the base model
def sum_word(total):
    """A partial sum as one token. The space keeps it apart from a number of the question."""
    return f" {total}"


def sum_of(word):
    """The partial sum that a token says, or None."""
    return int(word) if re.fullmatch(r" -?[0-9]+", word) else None


def words(count, max_value):
    """What is one token, besides the bytes."""
    most = count * max_value
    sums = [sum_word(total) for total in range(-most, most + 1)]
    numbers = [str(number) for number in range(max_value + 1)]
    fixed = [ASKED, ", ", ASKED_LAST, OPENED, motg.TAG, " <answer>", "</answer>"]
    return fixed + numbers + sums


def small_model(count, max_value, width=128, seed=0):
    """motg's small model, three layers and four heads, in another width; and its tokenizer."""
    model, tokenizer = made.small_model(words(count, max_value), seed)
    shape = model.config.to_dict() | {"hidden_size": width, "intermediate_size": 2 * width}
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)), tokenizer


def config(folder, method="single", count=4, max_value=19, **overrides):
    """motg's Config for this world on a CPU: its smoke settings, this task, the base in `folder`.

    T = 1, for at T = 1 the base has learnt p to be the distribution of the sums.
    """
    settings = {
        "smoke": True,
        "task": "least_sum",
        "task_settings": json.dumps({"count": count, "max_value": max_value}),
        "model": str(folder),
        "temperature": 1.0,
        "max_new_tokens": 24,
    }
    return motg.make_config(method, **settings | overrides)


def as_tensors(demonstrations, tokenizer):
    """Demonstrations of equal length as tokens and log-weights (B, T, K), empty slots at -inf."""
    most = max(len(step) for steps in demonstrations for step in steps)
    shape = len(demonstrations), len(demonstrations[0]), most
    tokens = torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    for row, steps in enumerate(demonstrations):
        for t, step in enumerate(steps):
            tokens[row, t, : len(step)] = torch.tensor(tokenizer.convert_tokens_to_ids(list(step)))
            weights[row, t, : len(step)] = torch.tensor(list(step.values()))
    return tokens, weights.log()


def imitation_loss(model, prompt_ids, tokens, log_weights):
    """Cross-entropy of each step's weights under p, all steps' inputs given: -sum_i w_i log p(v_i).

    prompt_ids (B, P); tokens, log_weights (B, T, K). Of an ordinary token it is the usual loss; of
    a mixture it is motg's `weighted` score, negated.
    """
    table = model.get_input_embeddings().weight  # (V, d)
    prompt = F.embedding(prompt_ids, table)  # (B, P, d)
    steps = motg.mixture_embedding(table, tokens[:, :-1], log_weights[:, :-1])  # (B, T - 1, d)
    embeds = torch.cat([prompt, steps], dim=1)  # (B, P + T - 1, d)
    logits = model(inputs_embeds=embeds, logits_to_keep=tokens.shape[1]).logits  # (B, T, V)
    log_p = motg.token_distribution(logits, 1.0)
    return -(log_weights.exp() * log_p.gather(-1, tokens)).sum(-1).mean()


def warm_start(
    count=4, max_value=19, width=128, supervision="soft", steps=1000, seed=0, batch=64, lr=2e-3
):
    """A small model and its tokenizer, trained on demonstrations of training problems."""
    model, tokenizer = small_model(count, max_value, width, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    cfg = config("", count=count, max_value=max_value, seed=WARM_SEED + seed)
    rng = random.Random(seed)
    losses = []
    for step in tqdm(range(steps), desc="warm start", leave=False, disable=None):
        numbers = range(step * batch, (step + 1) * batch)
        problems = [motg.train_problem(cfg, tokenizer, n) for n in numbers]
        shown = []
        for _, entry, _ in problems:
            shown.append(demonstration(entry, rng.choice(SUPERVISION[supervision]), rng))
        tokens, log_weights = as_tensors(shown, tokenizer)  # (B, T, K)
        prompts = tokenizer([prompt for *_, prompt in problems], return_tensors="pt").input_ids
        loss = imitation_loss(model, prompts, tokens, log_weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, tokenizer, losses


def make_base(folder, **settings):
    """The warm-started model in `folder`, made unless it is there. For m = 4 about 100 seconds.

    `settings` are those of `warm_start`. base.json keeps them, the time it took, and the loss every
    20 steps. Where two processes make the same base, the folder is that of the first.
    """
    folder, began = Path(folder), time.perf_counter()
    if not (folder / "base.json").exists():
        model, tokenizer, losses = warm_start(**settings)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:
            new = Path(new, "base")
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            seconds = round(time.perf_counter() - began, 1)
            about = {"settings": settings, "seconds": seconds, "losses": losses[19::20]}
            (new / "base.json").write_text(json.dumps(about))
            with suppress(OSError):  # it is there by now
                new.rename(folder)
    return folder


def main(argv):
    """motg's command line with this world as its default."""
    folder = make_base(ROOT / "runs/least_sum/base")
    cfg = config(folder)
    given = ["--smoke"]
    for name in ("task", "task_settings", "model", "temperature", "max_new_tokens"):
        given += [f"--{name}", str(getattr(cfg, name))]
    return motg.main(argv[:1] + given + argv[1:])


if __name__ == "__main__":
    import least_sum  # under its own name

    sys.exit(least_sum.main(sys.argv[1:]))
