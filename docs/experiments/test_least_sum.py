"""Tests of the least-sum world: against brute force, and through motg's own functions."""

import random
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import reasoning_gym
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import least_sum as world
import least_sum_runs as runs
from least_sum import motg


def all_signs(numbers):
    """Every choice of signs, as its list of partial sums."""
    for signs in product((-1, 1), repeat=len(numbers)):
        yield [sum(s * n for s, n in zip(signs[:t], numbers)) for t in range(1, len(numbers) + 1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base trained for so few steps that it knows little but the form, and its Config."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    world.make_base(folder, count=3, max_value=19, width=64, steps=40, lr=5e-3)
    return folder, world.config(folder, count=3, max_value=19)


def test_the_answer_and_the_scorer_against_brute_force():
    data = reasoning_gym.create_dataset("least_sum", seed=7, size=50, count=5, max_value=12)
    for entry in data:
        numbers = entry["metadata"]["numbers"]
        least = min(walk[-1] for walk in all_signs(numbers) if walk[-1] >= 0)
        assert entry["answer"] == str(least)
        assert len(numbers) == 5 and 1 <= min(numbers) <= max(numbers) <= 12
        assert data.score_answer(str(least), entry) == 1
        for wrong in (str(least + 1), str(-least - 1), "", "least", f"{least} or so", None):
            assert data.score_answer(wrong, entry) == 0


def test_items_are_a_function_of_their_seed():
    first = reasoning_gym.create_dataset("least_sum", seed=3, size=20)
    again = reasoning_gym.create_dataset("least_sum", seed=3, size=20)
    other = reasoning_gym.create_dataset("least_sum", seed=10**9, size=20)
    assert list(first) == list(again)
    assert list(first) != list(other)
    orders = [world.in_one_order(numbers) for numbers in ([1, 2, 3, 4], [4, 2, 3, 1])]
    assert orders[0] == orders[1] and sorted(orders[0]) == [1, 2, 3, 4]
    with pytest.raises(AssertionError):
        reasoning_gym.create_dataset("least_sum", count=0)


@pytest.mark.parametrize("numbers", [[3], [3, 1, 4], [2, 2, 2, 2], [1, 2, 4, 8, 9]])
def test_soft_targets_are_the_shares_of_all_choices_of_signs(numbers):
    walks = list(all_signs(numbers))
    for t, shares in enumerate(world.reachable(numbers)):
        count = Counter(walk[t] for walk in walks)
        assert shares == {total: n / len(walks) for total, n in count.items()}


def test_the_thoughts_that_are_imitated():
    rng = random.Random(0)
    numbers = [3, 1, 4, 1]  # the answer is 1, by four ways
    walks = [tuple(walk) for walk in all_signs(numbers)]
    best = {walk for walk in walks if walk[-1] == world.least_sum(numbers)}
    seen = {"best": set(), "random": set()}
    for _ in range(400):
        for name, thought in (("best", world.best_thought), ("random", world.random_thought)):
            steps = thought(numbers, rng)
            assert all(list(step.values()) == [1.0] for step in steps)
            seen[name].add(tuple(total for step in steps for total in step))
    assert seen["best"] == best  # a walk is missed once in 10^19 times
    assert seen["random"] == set(walks)
    for thoughts in world.SUPERVISION.values():
        for thought in thoughts:
            assert len(thought(numbers, rng)) == len(numbers)


def test_imitation_of_single_tokens_is_the_usual_loss():
    model, tokenizer = world.small_model(3, 9, width=64)
    prompt = tokenizer(["1, 2"], return_tensors="pt").input_ids  # (1, 3)
    steps = [{" -3": 1.0}, {" 4": 1.0}, {motg.TAG: 1.0}]
    tokens, log_weights = world.as_tensors([steps], tokenizer)
    ids = torch.cat([prompt, tokens[..., 0]], dim=1)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    with torch.no_grad():
        usual = model(input_ids=ids, labels=labels).loss
        assert torch.allclose(world.imitation_loss(model, prompt, tokens, log_weights), usual)


def test_a_demonstration_mixes_sums_and_ends_in_ordinary_tokens():
    entry = reasoning_gym.create_dataset("least_sum", seed=1, size=1, count=4, max_value=9)[0]
    _, tokenizer = world.small_model(4, 9)
    steps = world.demonstration(entry, world.soft_thought, random.Random(0))
    tokens, log_weights = world.as_tensors([steps], tokenizer)
    assert tokens.shape[:2] == (1, 4 + 5)
    assert torch.allclose(log_weights.exp().sum(-1), torch.ones(1, 9))
    assert (tokens < len(tokenizer)).all() and tokenizer.unk_token_id is None
    for step in steps:
        assert None not in tokenizer.convert_tokens_to_ids(list(step))
    text = "".join(word for step in steps[4:] for word in step)
    assert text == f"{motg.TAG} <answer>{entry['answer']}</answer><|im_end|>"


def test_a_number_and_a_sum_and_the_end_are_one_token_each():
    _, tokenizer = world.small_model(4, 9)
    for word in (" -36", " 0", " 36", "9", motg.TAG, world.ASKED):
        assert len(tokenizer.encode(word)) == 1
    assert tokenizer.decode(tokenizer.encode(" 12 -3</think> <answer>3")) == (
        " 12 -3</think> <answer>3"
    )


def test_what_a_token_says():
    assert [world.sum_of(world.sum_word(total)) for total in (-36, 0, 7)] == [-36, 0, 7]
    assert [world.sum_of(word) for word in ("7", " +7", "\u00b2", motg.TAG, " ")] == [None] * 5


def test_motg_splits_and_prompts_by_name(base):
    folder, cfg = base
    _, tokenizer = motg.load_model(cfg, folder)
    tests = motg.test_problems(cfg, tokenizer)
    questions = {entry["question"] for _, entry, _ in tests}
    assert len(questions) == len(tests) > 50
    for n in range(200):
        task, entry, prompt = motg.train_problem(cfg, tokenizer, n)
        assert task == "least_sum" and len(entry["metadata"]["numbers"]) == 3
        assert entry["question"] not in questions
        assert prompt == entry["question"] + world.OPENED


def test_a_base_rolls_out_and_is_scored(base):
    folder, cfg = base
    model, tokenizer = motg.load_model(cfg, folder)
    tests = motg.test_problems(cfg, tokenizer)[:16]
    cfg = world.config(folder, "soft-thinking", k=8, count=3, max_value=19, chains=2)
    r = motg.rollout(model, tokenizer, [prompt for *_, prompt in tests], cfg)
    assert r.thinking.sum(1).float().mean() < 8  # it has learnt that a thought has an end
    right = f" 0{motg.TAG} <answer>{tests[0][1]['answer']}</answer>"
    scores = motg.rewards(tests[:1] * 2, [right, right.replace("<answer>", "<answer>1")])
    assert [x["correct"] for x in scores] == [1.0, 0.0]
    found = runs.read_out(model, tokenizer, cfg, tests)
    assert 0 <= found["hard"] <= 1 and len(found["support"]) == 3
    assert 1 <= found["support"][0] <= 8 and 0 <= found["overlap"][0] <= 1


def test_support_and_overlap_of_a_true_mixture():
    shares = world.reachable([1, 2, 4])[-1]
    step = {world.sum_word(total): share for total, share in shares.items()}
    assert runs.support(step) == pytest.approx(8)
    assert runs.overlap(step, shares) == pytest.approx(1)
    assert runs.overlap({" 7": 1.0}, shares) == pytest.approx(1 / 8)


def test_a_thought_is_a_walk_where_each_sum_follows_from_the_one_before():
    _, tokenizer = world.small_model(4, 9)
    ids = tokenizer.convert_tokens_to_ids([" 3", " 2", motg.TAG, " 4"])
    r = SimpleNamespace(representative=torch.tensor([ids]))
    assert runs.legal_steps(r, 0, [3, 1, 4], tokenizer) == [True, True, False]
    assert runs.legal_steps(r, 0, [3, 5, 1, 4], tokenizer) == [True, False, False, False]
    assert runs.legal_steps(r, 0, [2, 1], tokenizer) == [False, True]


def test_every_variant_makes_a_config():
    assert len(runs.VARIANTS) == len({runs.path_of(name, 0) for name in runs.VARIANTS})
    for base, flags, reads, _ in runs.VARIANTS.values():
        task = runs.task_of(base)
        assert base.get("supervision", "soft") in world.SUPERVISION
        for how in reads.values():
            world.config("", **task, **how)
        if flags:
            world.config("", **task, **runs.GRPO | flags)
