"""The picture of a run's report: in the order of the page, on one axis of steps."""

import pytest
from matplotlib.figure import Figure

from sparse_prune import BlockPattern
from sparse_prune.callbacks import SwapEvent
from sparse_prune.recipes.base.history import StepRecord
from sparse_prune.recipes.base.report import DenseRun, RunReport


def steps(asked, achieved):
    pairs = enumerate(zip(asked, achieved, strict=True), 1)
    return [StepRecord(step, 1.0, 2.0, "masked", False, found, wanted) for step, (wanted, found) in pairs]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a report; gives its axes, by title in their order in the picture."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **more):
        figures.append(figure)
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(records):
        pattern = BlockPattern.dense(2, 64, 64, 16, True)
        events = [SwapEvent(3, "a", "gather", 0.5, 2.0, 1.0)]
        dense = DenseRun(3.0, 2.0, steps([None] * 4, [0.0] * 4))
        RunReport({}, 2.0, 0.5, ["a"], records, events, {"a": pattern}, {}, {}, dense).write(tmp_path)
        (figure,) = figures
        places = {axes: axes.get_position() for axes in figure.axes}
        ordered = sorted(places, key=lambda axes: (-round(places[axes].y0, 1), places[axes].x0))
        return {axes.get_title(): axes for axes in ordered}

    return draw


def test_requested_and_achieved_sparsity_are_both_to_be_seen(drawn):
    axes = drawn(steps([None, 0.2, 0.4, 0.6], [0.0, 0.1, 0.4, 0.5]))
    assert list(axes)[1:] == ["Training loss", "Share of blocks pruned", "Sparsity per layer", "Step time"]
    assert list(axes)[0].startswith("Kept blocks")
    lines = {line.get_label(): line for line in axes["Share of blocks pruned"].lines}
    assert lines["requested"].get_xydata().tolist() == [[2, 0.2], [3, 0.4], [4, 0.6]]
    assert lines["achieved"].get_xydata().tolist() == [[1, 0.0], [2, 0.1], [3, 0.4], [4, 0.5]]
    assert lines["requested"].get_color() != lines["achieved"].get_color()
    assert all(place == round(place) for place in axes["Sparsity per layer"].get_xticks())
    for title in ("Training loss", "Share of blocks pruned", "Step time"):
        assert "layers swapped" in {line.get_label() for line in axes[title].lines}
        assert axes[title].get_xlim() == axes["Training loss"].get_xlim()


def test_a_schedule_of_thresholds_requests_no_share(drawn):
    axes = drawn(steps([None] * 4, [0.0, 0.1, 0.4, 0.5]))
    assert "requested" not in {line.get_label() for line in axes["Share of blocks pruned"].lines}
