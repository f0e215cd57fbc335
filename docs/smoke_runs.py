"""The README's smoke results: three methods, three seeds, one after the other; then a picture of them.

    python docs/smoke_runs.py              (runs into runs/smoke-*, then docs/smoke.json and docs/smoke.png)
"""
import json, os, subprocess, sys, time
from pathlib import Path

os.chdir(Path(__file__).resolve().parent.parent)
results, curves = [], {}
for method in ("single", "dirichlet", "different-tokens"):
    for seed in range(3):
        out, began = Path(f"runs/smoke-{method}-{seed}"), time.time()
        subprocess.run([sys.executable, "motg.py", "train", "--smoke", "--method", method, "--seed", str(seed), "--out", out],
                       check=True)
        results.append(json.loads((out / "result.json").read_text()) | dict(wall=round(time.time() - began, 1)))
        curves[method, seed] = [json.loads(line)["correct"] for line in (out / "metrics.jsonl").open()]
        Path("docs/smoke.json").write_text(json.dumps(results, indent=1))
        print(results[-1], flush=True)

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(7, 3.6))
for (method, seed), y in curves.items():
    smooth = [sum(y[max(0, i - 4) : i + 1]) / len(y[max(0, i - 4) : i + 1]) for i in range(len(y))]
    ax.plot(smooth, color=dict(zip(("single", "dirichlet", "different-tokens"), ("C7", "C0", "C1")))[method],
            label=method if seed == 0 else None)
ax.set(xlabel="GRPO step", ylabel="training accuracy (mean of 5 steps)", title="motg --smoke: three methods, three seeds", ylim=(0, 1))
ax.legend()
fig.tight_layout()
fig.savefig("docs/smoke.png", dpi=110)
