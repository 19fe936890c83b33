"""A guard against logging that costs ten times what the benchmark found."""

import importlib.util
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "logging_overhead.py"


def test_logging_costs_little_at_the_default_cadence():
    spec = importlib.util.spec_from_file_location("logging_overhead", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    # 1.1 ms a step on a quiet machine; the best of three, for a busy one.
    costs = (benchmark.measure(60, "csv")["ms_per_step"] for _ in range(3))
    assert any(cost < 11.0 for cost in costs)
