function showComparison() {
  show(el("h1", {}, "Attention pruning runs"), el("div", { class: "soft name" }, data.name));
  const titles = ["", "Run", "Pruned", "Loss, nats for cross-entropy", "Retrieval", "Step", "Speed, to its dense twin", "Loss, to its dense twin", "Retrieval kept"];
  const number = (value, unit) => value === null ? "" : short(value) + unit;
  const rows = data.rows.map((row, n) => el("tr", {}, ...[
    n + 1, row.name + (row.finished ? "" : ` (unfinished, step ${row.step})`), row.sparsity === null ? "" : percent(row.sparsity), number(row.loss, ""),
    row.quality === null ? "" : percent(row.quality), number(row.seconds, " s")].map(text => el("td", {}, text)),
  ...row.figures.map(figure => el("td", { class: figure.judgement, title: figure.note }, figure.value))));
  show(el("h2", {}, `${data.rows.length} runs`), el("div", { class: "scroll" },
    el("table", { class: "runs" }, el("tr", {}, ...titles.map(text => el("th", {}, text))), ...rows)), el("div", { class: "soft" }, data.limits));
  const charts = data.charts.filter(chart => chart.points.length).map(scatter);
  show(el("h2", {}, "What a sparsity costs"), el("div", { class: "charts" }, ...charts));
}

function scatter(chart) {
  const { picture, x, y } = axes(`${chart.title}, ${chart.unit}`, [0, 1], chart.points.map(point => point.y), null, false);
  const labels = new Map();  // runs that share a place share its label
  for (const point of chart.points) {
    const at = [x(point.x), y(point.y)], name = `${point.run + 1} ${data.rows[point.run].name}` + (point.twin ? ", dense twin" : "");
    const dot = svg("circle", { class: point.twin ? "dot muted" : "dot", r: 5, cx: at[0], cy: at[1] });
    dot.append(svg("title", {}, `${name}: ${short(point.y)} at ${percent(point.x)} pruned`));
    picture.append(dot);
    const near = [...labels.keys()].find(other => Math.hypot(other[0] - at[0], other[1] - at[1]) < 10) ?? at;
    labels.set(near, [...labels.get(near) ?? [], point.run + 1]);
  }
  for (const [at, runs] of labels) {
    const left = at[0] > 430;
    picture.append(svg("text", { x: at[0] + (left ? -9 : 9), y: at[1] + 4, "text-anchor": left ? "end" : "start" }, runs.join(", ")));
  }
  const keys = el("div", { class: "keys" }, el("span", {}, swatch("main"), "pruned"), el("span", {}, swatch("muted"), "dense twins"), el("span", {}, "across: share of blocks pruned; numbers: runs of the table"));
  return captioned(chart.title, chart.unit, picture, keys);
}
