"""The curves of the library's schedules.

python docs/pictures/schedules.py
"""

import matplotlib.pyplot as plt
from paper import save

from sparse_prune import ConstantSchedule, CosineSchedule, CubicSchedule, ExponentialSchedule, LinearSchedule

RAMP = {"final": 0.7, "begin_step": 100, "end_step": 800}
SCHEDULES = [
    ConstantSchedule(final=0.7, begin_step=100),
    CubicSchedule(**RAMP),
    LinearSchedule(**RAMP),
    CosineSchedule(**RAMP),
    ExponentialSchedule(**RAMP),
]

figure, axes = plt.subplots(figsize=(7, 3.6))
for schedule in SCHEDULES:
    axes.plot(range(1001), [schedule(step) for step in range(1001)], label=type(schedule).__name__, linewidth=2)
axes.set(xlabel="optimizer step", ylabel="requested share of pruned blocks", xlim=(0, 1000), ylim=(0, 0.75))
axes.axvspan(800, 1000, color="0.94")
axes.text(900, 0.05, "settling", ha="center", color="0.35")
axes.grid(alpha=0.3)
axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
save(figure, "schedules.svg")
