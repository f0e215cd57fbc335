"""A second world for temperatures.py: ways through a grid, where several are open at once.

motg's smoke mode and warm start on Reasoning-Gym's `shortest_path` (4 x 4 cells) with other
demonstrations. A thought names the cells of a way, one token each, an answer its directions. Where
two ways are equally short the next cell is a toss-up that a mixture need not decide: its next input
stands for both. No answer is right for many grids ("infeasible", the commonest, for one in ten).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs/tools")]

import motg  # noqa: E402

SIDE = 4
MOVES = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
SETTINGS = f'{{"min_rows": {SIDE}, "max_rows": {SIDE}, "min_cols": {SIDE}, "max_cols": {SIDE}, '
SETTINGS += '"p_blocked": 0.3}'


def cell_name(i, j):
    return f" {'abcd'[i]}{j + 1}"


def words():
    """What is one token: the question's fixed text, a cell of the grid, its name, a direction."""
    question = motg.dataset("shortest_path", 0, SETTINGS)[0]["question"]
    fixed = question[: question.rindex(":\n") + 2]
    grid = [before + cell for before in ("", " ", "\n") for cell in "OX*#"]
    names = [cell_name(i, j) for i in range(SIDE) for j in range(SIDE)]
    moves = [before + move for before in ("", " ") for move in MOVES]
    more = ["easy", "none", "infeasible", motg.TAG, " <answer>", "</answer>"]
    return [fixed, *more, *grid, *names, *moves]


def way(matrix, rng, walls="X"):
    """Cells and directions of a shortest way from * to #, one of several by chance; or two []."""
    inside = [(i, j) for i in range(SIDE) for j in range(SIDE)]
    at = {matrix[i][j]: (i, j) for i, j in inside}
    left, ring = {}, {at["#"]}  # steps to #, of the cells from which it can be reached
    while ring:
        left |= dict.fromkeys(ring, 1 + max(left.values(), default=-1))
        around = {(i + a, j + b) for i, j in ring for a, b in MOVES.values()} - left.keys()
        ring = {(i, j) for i, j in around.intersection(inside) if matrix[i][j] not in walls}
    here, cells, moves = at["*"], [], []
    while left.get(here):
        i, j = here
        nearer = {
            move: (i + a, j + b)
            for move, (a, b) in MOVES.items()
            if left.get((i + a, j + b)) == left[here] - 1
        }
        moves.append(rng.choice(list(nearer)))
        here = nearer[moves[-1]]
        cells.append(cell_name(*here))
    return cells, moves


def demonstrate(entry, rng):
    """Thought and answer: a third finds a way, a third walks through walls, a third guesses."""
    matrix, habit = entry["metadata"]["matrix"], rng.choice(["find", "walls", "guess"])
    cells, moves = way(matrix, rng, walls="X" if habit == "find" else "")
    if habit == "guess":
        cells, moves = ["easy"], rng.choices(list(MOVES), k=rng.randint(1, 4))
    thought, answer = "".join(cells or ["none"]), " ".join(moves or ["infeasible"])
    return f"{thought}{motg.TAG} <answer>{answer}</answer><|im_end|>"
