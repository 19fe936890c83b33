"""The loop of pruning: what follows what, and where it goes round.

python docs/pictures/loop.py
"""

import matplotlib.pyplot as plt
from paper import KEPT, save

STEPS = {
    "probe": "how much attention\nfalls into each block",
    "score": "running average,\nsummed over ranks",
    "threshold": "one for all layers\nand heads",
    "pattern": "blocks below it go,\nothers come back",
    "settle": "a layer's pattern\nstands still: frozen",
    "swap": "measured: sparse\nkernel or dense",
    "export": "patterns beside\nthe model's files",
}
WIDTH, GAP = 2.5, 0.6

figure, axes = plt.subplots(figsize=(10, 4.4))
centres = {}
for index, (name, text) in enumerate(STEPS.items()):
    row, column = divmod(index, 4)
    x, y = column * (WIDTH + GAP), -2.9 * row
    centres[name] = (x + WIDTH / 2, y)
    axes.add_patch(plt.Rectangle((x, y - 0.8), WIDTH, 1.6, facecolor="#eef3f9", edgecolor=KEPT, linewidth=1.3))
    axes.text(x + WIDTH / 2, y + 0.46, name, ha="center", va="center", weight="bold", color=KEPT)
    axes.text(x + WIDTH / 2, y - 0.22, text, ha="center", va="center", fontsize=10)


def arrow(start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": "0.25", "linewidth": 1.4, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)


names = list(STEPS)
for left, right in zip(names, names[1:], strict=False):
    (x0, y0), (x1, y1) = centres[left], centres[right]
    if y0 == y1:
        arrow((x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1))
    else:
        arrow((x0 - WIDTH / 4, y0 - 0.8), (x1 + WIDTH / 2, y1 + 0.8))
(x0, y0), (x1, y1) = centres["pattern"], centres["probe"]
arrow((x0, y0 + 0.8), (x1, y1 + 0.8), bend=0.16)
axes.text((x0 + x1) / 2, 2.15, "every_n_steps optimizer steps", ha="center", color="0.25", fontsize=10)
axes.set(xlim=(-0.1, 4 * WIDTH + 3 * GAP + 0.1), ylim=(-3.8, 2.6))
axes.axis("off")
save(figure, "loop.svg")
