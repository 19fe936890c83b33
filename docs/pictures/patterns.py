"""One small pattern: what it means, how it goes on at another length, what the KV cache keeps of it.

python docs/pictures/patterns.py
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from paper import BLOCKS, EXTRA, HIDDEN, KEPT, PRUNED, save

from sparse_prune import BlockPattern

BLOCK, LEARNED, LONGER = 64, 8, 12
ROWS = ["#.......", "##......", "###.....", "#.##....", "##.##...", "#...##..", "#.#..##.", "#...#.##"]


def draw(axes: plt.Axes, values: torch.Tensor, title: str) -> None:
    axes.imshow(values, cmap=BLOCKS, vmin=0, vmax=3)
    rows, columns = values.shape
    axes.set_xticks(torch.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(torch.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.set(title=title, xlabel="key block", ylabel="query block", xticks=range(columns), yticks=range(rows))
    axes.spines[:].set_visible(False)


def legend(figure: plt.Figure, *entries: tuple[str, str]) -> None:
    patches = [Patch(facecolor=colour, edgecolor="0.7", label=text) for colour, text in entries]
    figure.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, -0.1), ncols=len(patches), frameon=False)


def blocks(pattern: BlockPattern) -> torch.Tensor:
    """0 hidden, 1 pruned, 2 kept, (q_blocks, kv_blocks)."""
    return pattern.possible.int() + pattern.keep[0].int()


keep = torch.tensor([[[mark == "#" for mark in row] for row in ROWS]])
pattern = BlockPattern(keep, (BLOCK, BLOCK), True, LEARNED * BLOCK, LEARNED * BLOCK)

figure, axes = plt.subplots(figsize=(4.2, 4.2))
draw(axes, blocks(pattern), f"{pattern.kept_blocks} of {pattern.possible_count} possible blocks kept")
legend(figure, (KEPT, "kept"), (PRUNED, "pruned"), (HIDDEN, "hidden by causality"))
save(figure, "pattern.svg")

longer = blocks(pattern.at(LONGER * BLOCK, LONGER * BLOCK))
longer[LEARNED:][longer[LEARNED:] == 2] = 3
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), width_ratios=(5, LONGER))
draw(left, blocks(pattern.at(5 * BLOCK, 5 * BLOCK)), "5 blocks: the corner")
draw(right, longer, f"{LONGER} blocks: the last learned row goes on")
legend(figure, (KEPT, "learned"), (EXTRA, "by the rule"), (PRUNED, "pruned"), (HIDDEN, "hidden by causality"))
save(figure, "longer.svg")

lengths = range(1, LONGER + 1)
held = torch.zeros(LONGER, LONGER, dtype=torch.int32)
for length in lengths:
    needed = pattern.needed_after(length * BLOCK)[0]
    held[length - 1, :length] = 1 + needed.int()
figure, axes = plt.subplots(figsize=(5.2, 5.2))
draw(axes, held, "what this head's cache holds as the text grows")
axes.set(ylabel="blocks of text so far", yticklabels=lengths)
legend(figure, (KEPT, "held"), (PRUNED, "freed"), (HIDDEN, "not there yet"))
save(figure, "cache.svg")
