"""Two updates of docs/with_trl.py beside `motg.update` on the same rollouts; one process and two.

pytest has `accelerate launch` run this file; `main` below is what each process does.
"""

# ruff: noqa: E402
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import gather_object

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "tools")]
import warm_start
import with_trl

motg = with_trl.motg
SETTINGS = """--smoke --device cpu --steps 2 --warmup 0 --lr 0.01 --grad-clip 1e9 --kl-beta 0.1
--prompts-per-step 3 --chains 4 --max-new-tokens 12 --micro-tokens 36 --end steps --end-steps 5
--save_strategy no --report_to none"""


class Recorder:
    """Stands in for an optimiser, and keeps the gradient."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self):
        self.gradient = gradient(self.model)

    def zero_grad(self):
        self.model.zero_grad()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def joined(parts, cfg):
    """One Rollout of several processes', whose prompts and rows have different lengths."""
    P = max(part.prompt_ids.shape[1] for part in parts)
    T = max(part.kind.shape[1] for part in parts)

    def steps(name, ended):
        found = [getattr(part, name).transpose(1, -1) for part in parts]  # (B, T) or (B, k, T)
        found = [F.pad(x, (0, T - x.shape[-1]), value=ended) for x in found]
        return torch.cat(found).transpose(1, -1)

    def prompts(name):
        found = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(x, (P - x.shape[1], 0)) for x in found])

    names = motg.Steps._fields
    record = motg.Steps(*(steps(x, motg.ENDED if x == "matched" else 0) for x in names))
    prompt = torch.arange(len(record.kind)) // cfg.chains
    texts = [text for part in parts for text in part.texts]
    both = prompts("prompt_ids"), prompts("prompt_mask")
    return motg.Rollout(record, *both, prompt, parts[0].tag, texts)


def pretended_rewards(problems, texts):
    """A random model is never right; this gives it something to learn."""
    return [{"reward": float(len(text) % 5), "correct": 0.0} for text in texts]


def main(argv):
    """Trains, and writes how far each update's gradient is from motg's."""
    motg.rewards = pretended_rewards
    trainer = with_trl.make_trainer(argv)
    torch.manual_seed(1)
    for p in trainer.ref_model.parameters():
        p.data += 0.02 * torch.randn_like(p)  # so that the KL has a gradient from the start
    sample, samples, gradients = trainer.rollout_func, [], []

    def recorded(*args):
        found = sample(*args)
        samples.append((copy.deepcopy(trainer.sampler).requires_grad_(True), trainer.rollout))
        return found

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **_):
            gradients.append(gradient(trainer.model))

    torch.manual_seed(2 + trainer.accelerator.process_index)
    trainer.rollout_func = recorded
    trainer.add_callback(Keep())
    trainer.train()
    cfg, found = trainer.cfg, {"errors": [], "forced": 0, "lengths": []}
    for (policy, part), got in zip(samples, gradients, strict=True):
        r = joined(gather_object([part]), cfg)
        reward = [x["reward"] for x in pretended_rewards(None, r.texts)]
        advantages = motg.group_advantages(torch.tensor(reward).view(-1, cfg.chains)).flatten()
        optimizer = Recorder(policy)
        motg.update(policy, trainer.ref_model, optimizer, r, advantages, cfg, cfg.lr)
        want = optimizer.gradient
        found["errors"].append(((got - want).norm() / want.norm()).item())
        found["forced"] += int((r.kind == motg.FORCED).sum())
        found["lengths"] += r.mask.sum(1).tolist()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    alike = [torch.equal(weights, other) for other in gather_object([weights])]
    found |= {"processes": len(alike), "alike": all(alike)}
    if trainer.is_world_process_zero():
        Path(trainer.cfg.out, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model of which many tokens end a row, so that rows have different lengths."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = warm_start.small_model(warm_start.WORDS, 0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(60)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CASES = {
    "one process": (1, "--method different-tokens --loss-average chain"),
    "two processes, a group on both": (2, "--method dirichlet"),
    "two processes, whole groups": (2, "--method multiplex --prompts-per-step 4"),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_motg_and_all_processes_have_the_same_weights(case, model, tmp_path):
    processes, more = CASES[case]
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    argv += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    argv += ["--multi_gpu"] * (processes > 1) + ["--main_process_port", "0", __file__]
    argv += [*SETTINGS.split(), *more.split(), "--model", str(model), "--out", str(tmp_path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == processes and found["alike"]
    assert len(found["errors"]) == 2 and max(found["errors"]) < 1e-4
    assert found["forced"] > 0 and len(set(found["lengths"])) > 3


if __name__ == "__main__":
    main(sys.argv[1:])
