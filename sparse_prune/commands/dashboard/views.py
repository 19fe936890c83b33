"""Makes a W&B workspace and a W&B report of the charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from sparse_prune.commands.dashboard.charts import AXIS, COLUMNS, SECTIONS, SWEEP, Chart, Section

WIDTH = 24
"""Columns of W&B's report grid."""
_WIDE = ("pictures", "table", "parallel")


@dataclass(frozen=True)
class Target:
    """The project and runs of a dashboard."""

    entity: str
    project: str
    runs: tuple[str, ...] = ()
    """Ids of the runs to show; empty: all runs of the project."""
    baseline: str | None = None
    """Id of the run without pruning, shown beside the others."""

    @property
    def shown(self) -> tuple[str, ...]:
        """Ids to filter by; empty: no filter."""
        both = (*self.runs, *([self.baseline] if self.baseline and self.runs else []))
        return tuple(dict.fromkeys(both))

    @property
    def sections(self) -> tuple[Section, ...]:
        """Sections of the dashboard, top to bottom, with `SWEEP` if there may be several runs."""
        return SECTIONS if len(self.shown) == 1 else (SWEEP, *SECTIONS)

    @property
    def filters(self) -> Any:
        """W&B's filter for `shown`."""
        return expr.And(expr.Metric("ID").isin(list(self.shown))) if self.shown else ""


def workspace(target: Target, name: str) -> ws.Workspace:
    """Make the dashboard as a saved view of the project."""
    runs = ws.RunsetSettings(
        filters=target.filters,
        pinned_columns=[f"summary:{column}" for column in COLUMNS],
        baseline_run=target.baseline,
    )
    sections = [
        ws.Section(
            name=section.name,
            panels=[panel(chart, target.shown) for chart in section.charts],
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=1 if section.charts[0].kind in _WIDE else 3, rows=2),
            panel_settings=ws.SectionPanelSettings(x_axis=AXIS),
        )
        for section in target.sections
    ]
    settings = ws.WorkspaceSettings(x_axis=AXIS, sort_panels_alphabetically=False)
    return ws.Workspace(
        entity=target.entity,
        project=target.project,
        name=name,
        sections=sections,
        settings=settings,
        runset_settings=runs,
    )


def report(target: Target, title: str, online: bool = True) -> wr.Report:
    """Make the dashboard as a report to share: every section with its question.

    If it is not `online`, runs are those of the report's own project, for which W&B's client asks no server.
    """
    where = {"entity": target.entity, "project": target.project} if online else {}
    blocks: list[Any] = [wr.TableOfContents()]
    for section in target.sections:
        runs = wr.Runset(**where, name="Runs", filters=target.filters)
        grid = wr.PanelGrid(runsets=[runs], panels=list(_laid_out(section.charts, target.shown)))
        blocks += [wr.H2(section.name), wr.P(section.question), grid]
    return wr.Report(
        entity=target.entity,
        project=target.project,
        title=title,
        description="Attention pruned step by step: made by `sparse-prune dashboard`.",
        blocks=blocks,
        width="fluid",
    )


def panel(chart: Chart, runs: Sequence[str] = ()) -> Any:
    """Make W&B's panel of a chart. W&B styles lines per run, so marks are points only for the named `runs`."""
    if chart.kind == "number":
        return wr.ScalarChart(title=chart.title, metric=wr.SummaryMetric(chart.keys[0]))
    if chart.kind == "pictures":
        return wr.MediaBrowser(title=chart.title, media_keys=list(chart.keys), num_columns=1)
    if chart.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=chart.keys[0])
    if chart.kind == "parallel":
        axes = (*(wr.Config(name) for name in chart.settings), *(wr.SummaryMetric(key) for key in chart.keys))
        columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
        return wr.ParallelCoordinatesPlot(title=chart.title, columns=columns)
    return wr.LinePlot(
        title=chart.title,
        x=AXIS,
        y=list(chart.keys),
        metric_regex=chart.pattern,
        title_x="optimizer step",
        title_y=chart.unit,
        range_y=(0.0, chart.top) if chart.top is not None else (None, None),
        log_y=chart.log or None,
        line_marks={f"{run}:{key}": "points" for run in runs for key in chart.marks} or None,
    )


def _laid_out(charts: Sequence[Chart], runs: Sequence[str]) -> Iterator[Any]:
    """Lay panels out: three per row, pictures and tables over the whole width."""
    x = y = 0
    for chart in charts:
        wide = chart.kind in _WIDE
        width, height = (WIDTH, 16) if wide else (WIDTH // 3, 4 if chart.kind == "number" else 8)
        if wide and x:
            x, y = 0, y + 8
        placed = panel(chart, runs)
        placed.layout = wr.Layout(x=x, y=y, w=width, h=height)
        yield placed
        x += width
        if x >= WIDTH:
            x, y = 0, y + height
