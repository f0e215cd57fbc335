"""TRL's GRPOTrainer beside `motg.py train --smoke --method single`: accuracy and seconds.

    python -m venv trl && trl/bin/pip install -r requirements.txt trl
    trl/bin/python docs/experiments/against_trl.py --seeds 3

Both start from the same model, see the same prompts in the same order, and have the same rewards,
batch, learning rate, KL and clip; both are read out by motg's `evaluate`. They take turns. Seconds
are of training alone, on one thread, without start-up and evaluations. Rows are written to
docs/experiments/results/trl.json; three seeds take about five minutes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import motg  # noqa: E402


def trained_by_trl(cfg, folder):
    """Seconds, and the policy."""
    import datasets
    import trl

    policy, tokenizer = motg.load_model(cfg, motg.smoke_model(cfg))
    batch = cfg.prompts_per_step
    problems = [motg.train_problem(cfg, tokenizer, n) for n in range(cfg.steps * batch)]
    rows = [{"prompt": prompt, "number": n} for n, (*_, prompt) in enumerate(problems)]

    def reward(prompts, completions, number, **_):
        parts = motg.rewards([problems[n] for n in number], completions)
        return [part["reward"] for part in parts]

    settings = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=cfg.seed,
        max_steps=cfg.steps,
        per_device_train_batch_size=batch * cfg.chains,
        num_generations=cfg.chains,
        shuffle_dataset=False,
        max_completion_length=cfg.max_new_tokens,
        temperature=cfg.temperature,
        learning_rate=cfg.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=round(cfg.warmup * cfg.steps),
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=cfg.grad_clip,
        beta=cfg.kl_beta,
        epsilon=cfg.clip,
        loss_type="dapo" if cfg.loss_average == "token" else "grpo",
        use_bias_correction_kl=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list(rows)
    trainer = trl.GRPOTrainer(policy, reward, settings, data, processing_class=tokenizer)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began, policy, tokenizer


def trained_by_motg(cfg, folder):
    """The same of motg's own loop; its evaluations are left out."""
    policy, tokenizer = motg.load_model(cfg, motg.smoke_model(cfg))
    reference = motg.copy.deepcopy(policy).requires_grad_(False)
    sampler = motg.copy.deepcopy(reference)
    how = {"betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
    adamw, generator = torch.optim.AdamW(policy.parameters(), cfg.lr, **how), torch.Generator()
    began = time.perf_counter()
    for step in range(cfg.steps):
        task = (sampler, tokenizer, cfg, range(step, step + 1), generator)
        r, advantages, *_ = motg.collect(*task)
        lr = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup * cfg.steps))
        motg.update(policy, reference, adamw, r, advantages, cfg, lr)
        sampler.load_state_dict(policy.state_dict())
    return time.perf_counter() - began, policy, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", type=Path, default=HERE / "results/trl.json")
    a = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    motg.scorer()  # started before anything is timed
    rows = []
    trainers = {"motg": trained_by_motg, "TRL": trained_by_trl}
    for seed in range(a.seeds):
        for name in list(trainers)[:: 1 if seed % 2 == 0 else -1]:
            cfg = motg.make_config("single", smoke=True, seed=seed, steps=a.steps)
            torch.manual_seed(seed)
            with tempfile.TemporaryDirectory() as folder:
                seconds, policy, tokenizer = trainers[name](cfg, folder)
            tests = motg.test_problems(cfg, tokenizer)
            policy.eval().requires_grad_(False)
            found = motg.evaluate(policy, tokenizer, cfg, torch.Generator(), tests)
            row = {"trainer": name, "seed": seed, "seconds": round(seconds, 1)}
            row |= {"accuracy": round(found["pass@1"], 4), "stderr": round(found["stderr"], 4)}
            rows.append(row)
            print(row, flush=True)
    about = {name: version(name) for name in ("torch", "transformers", "trl")}
    a.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
