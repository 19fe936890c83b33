function showComparison() {
  show(el("h1", {}, "Attention pruning runs"), el("div", { class: "soft name" }, data.name));
  const titles = ["Run", "Pruned", "Loss", "Retrieval", "Step", "Speed, to its dense twin", "Loss, to its dense twin", "Retrieval kept"];
  const number = (value, unit) => value === null ? "" : short(value) + unit;
  const rows = data.rows.map(row => el("tr", {}, ...[
    row.name + (row.finished ? "" : ` (unfinished, step ${row.step})`), row.sparsity === null ? "" : percent(row.sparsity), number(row.loss, ""),
    row.quality === null ? "" : percent(row.quality), number(row.seconds, " s")].map(text => el("td", {}, text)),
  ...row.figures.map(figure => el("td", { class: figure.judgement, title: figure.note }, figure.value))));
  show(el("h2", {}, `${data.rows.length} runs`), el("div", { class: "scroll" },
    el("table", {}, el("tr", {}, ...titles.map(text => el("th", {}, text))), ...rows)), el("div", { class: "soft" }, data.limits));
  const charts = data.charts.filter(chart => chart.points.length).map(scatter);
  show(el("h2", {}, "What a sparsity costs"), el("div", { class: "charts" }, ...charts));
}

function scatter(chart) {
  const { picture, x, y } = axes(`${chart.title}, ${chart.unit}`, [0, 1], chart.points.map(point => point.y), null, false);
  for (const point of chart.points) {
    const name = point.twin ? `${point.name}, dense twin` : point.name;
    const dot = svg("circle", { class: point.twin ? "dot muted" : "dot", r: 5, cx: x(point.x), cy: y(point.y) });
    dot.append(svg("title", {}, `${name}: ${short(point.y)} at ${percent(point.x)} pruned`));
    picture.append(dot);
    if (!point.twin) picture.append(svg("text", { x: x(point.x) + (point.x > .7 ? -9 : 9), y: y(point.y) + 4, "text-anchor": point.x > .7 ? "end" : "start" }, name));
  }
  const keys = el("div", { class: "keys" }, el("span", {}, swatch("main"), "pruned"), el("span", {}, swatch("muted"), "dense twins"), el("span", {}, "across: share of blocks pruned"));
  return captioned(chart.title, chart.unit, picture, keys);
}
