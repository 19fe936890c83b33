import re
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger

from sparse_prune import BlockPattern, metrics
from sparse_prune.callbacks import KernelSwap
from sparse_prune.commands.dashboard.charts import _charts
from sparse_prune.commands.dashboard.views import panel
from sparse_prune.commands.report.logs import read_run
from sparse_prune.commands.report.page import describe
from sparse_prune.metrics import METRICS, Chart, Metric, markdown_table
from support.tiny import TinyModule, batches, pruning, trainer

MONITORING = Path(__file__).parents[1] / "docs" / "monitoring.md"


def test_the_docs_have_the_table_of_the_registry():
    assert (
        f"<!-- metrics: made by sparse_prune.metrics.markdown_table -->\n{markdown_table()}\n" in MONITORING.read_text()
    )


def test_keys_are_unique_and_told_apart():
    for metric in METRICS:
        key = metric.of_layer(7)
        assert [other for other in METRICS if other.keys([key])] == [metric], key


def test_layers_are_in_the_order_of_their_numbers():
    keys = [metrics.LAYER_SPARSITY.of_layer(number) for number in range(120)]
    assert metrics.LAYER_SPARSITY.keys(reversed([*keys, "sparsity/total", "other"])) == keys
    assert keys[3] == "sparsity/layer_03"
    assert keys[110] == "sparsity/layer_110"


def test_a_metric_says_when_and_how_it_is_read():
    with pytest.raises(ValueError, match=r"`at` and `read` must be given together, got 'swap' and None"):
        Metric("a/b", "", "", Chart("", "", "Layers"), at="swap")


def test_a_metric_that_is_added_is_logged_and_drawn(tmp_path, monkeypatch):
    """As CONTRIBUTING says: an entry in the registry is all it takes."""

    def count(now):
        return {name: float(state.layer.num_heads) for name, state in now.pruner.layers.items()}

    chart = Chart("Heads of a layer", "heads", "Layers")
    heads = Metric(
        "count/heads_layer_NN", "its query heads", "layer", chart, "thin",
        at="decision", read=count,
    )  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, heads))
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, [pruning(), KernelSwap("gather")], logger=logger).fit(TinyModule(), batches())
    run = read_run(tmp_path)
    assert {value for _, value in run.metrics["count/heads_layer_01"]} == {4.0}
    drawn = {chart["title"]: chart for chart in describe(run)["more"]}["Heads of a layer"]
    assert [line["name"] for line in drawn["lines"]] == ["layer 00", "layer 01"]
    assert drawn["unit"] == "heads"
    added = {chart.title: chart for chart in _charts("Layers")}["Heads of a layer"]
    assert re.fullmatch(added.pattern, "count/heads_layer_12")
    assert panel(added).metric_regex == added.pattern
    assert "| `count/heads_layer_NN` | its query heads | heads |" in markdown_table()


def test_values_of_another_size_than_keys_count_as_they_are():
    pattern = BlockPattern.dense(2, 8, 8, 4, True)
    assert pattern.flops(16, value_dim=8)[1] * 4 == pattern.flops(16)[1] * 3
    assert pattern.flops(16, value_dim=16) == pattern.flops(16)
