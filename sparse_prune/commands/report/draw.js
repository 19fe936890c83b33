const el = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const svg = (name, attributes = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const show = (...nodes) => document.getElementById("page").append(...nodes);
const percent = share => (100 * share).toFixed(1) + " %";
const large = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k", 1e3]];
const short = value => {
  const found = large.find(([least]) => Math.abs(value) >= least);
  if (found) return +(value / (found[2] ?? found[0])).toPrecision(3) + found[1];
  return value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
};

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= raw);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
  return found;
}

// Axes of a chart: the picture, and functions from values to its places.
function axes(title, [x0, x1], values, top, whole) {
  const width = 560, height = 220, left = 50, right = 14, high = 10, bottom = 24;
  let [y0, y1] = top === null ? [Math.min(...values), Math.max(...values)] : [0, top];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const pad = top === null ? (y1 - y0) * .06 || Math.abs(y0) * .1 || 1 : 0;
  y0 -= pad; y1 += pad;
  const x = v => left + (v - x0) / (x1 - x0) * (width - left - right);
  const y = v => height - bottom - (v - y0) / (y1 - y0) * (height - high - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": title });
  for (const t of ticks(y0, y1, 4)) picture.append(
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
    svg("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, short(t)));
  for (const t of ticks(x0, x1, 6)) if (!whole || Number.isInteger(t) && t >= 0)
    picture.append(svg("text", { x: x(t), y: height - 6, "text-anchor": "middle" }, t));
  const upright = (name, at) => svg("line", { class: name, x1: x(at), x2: x(at), y1: high, y2: height - bottom });
  const step = clientX => {
    const box = picture.getBoundingClientRect();
    const at = x0 + ((clientX - box.left) / box.width * width - left) / (width - left - right) * (x1 - x0);
    return Math.round(Math.max(x0, Math.min(x1, at)));
  };
  return { picture, x, y, upright, step, span: [x0, x1] };
}

const captioned = (title, unit, ...nodes) =>
  el("figure", {}, el("figcaption", {}, title + " ", el("span", {}, unit)), ...nodes);
const swatch = style => el("i", { style: style === "main" ? "" : `--shade: var(--${style})` });

const wide = new Set(["muted", "second"]);  // what other lines are compared with lies under them, and is seen beside them

// All charts of steps share one axis: a step pointed at in one is told in all.
const listeners = [];
const pointAt = step => listeners.forEach(tell => tell(step));

function stepChart(chart) {
  const plain = chart.lines.filter(line => line.style !== "thin"), deep = chart.lines.filter(line => line.style === "thin");
  const values = chart.lines.flatMap(line => line.points.map(point => point[1]));
  const { picture, x, y, upright, step, span } = axes(`${chart.title}, ${chart.unit}, over steps`, data.span, values, chart.top, true);
  for (const at of data.swaps) picture.append(upright("swap", at));
  const shade = n => `--shade: color-mix(in oklab, var(--deep) ${100 * n / Math.max(1, deep.length - 1)}%, var(--shallow))`;
  for (const line of chart.lines) {
    const style = line.style === "thin" ? shade(deep.indexOf(line)) : "";
    picture.append(svg("polyline", { class: "line " + line.style, style, points: line.points.map(p => `${x(p[0])},${y(p[1])}`).join(" ") }));
    if (line.points.length < 3) for (const p of line.points)
      picture.append(svg("circle", { class: "dot " + line.style, style, r: wide.has(line.style) ? 6 : 3, cx: x(p[0]), cy: y(p[1]) }));
  }
  const rule = upright("rule", span[0]), keys = el("div", { class: "keys" });
  rule.setAttribute("visibility", "hidden");
  picture.append(rule);
  let now = null;
  const tell = at => {
    now = at;
    const value = line => at === null ? null : line.points.filter(point => point[0] <= at).at(-1)?.[1] ?? null;
    keys.replaceChildren(...plain.map(line =>
      el("span", {}, swatch(line.style), line.name + (value(line) === null ? "" : " " + short(value(line))))));
    if (deep.length) {
      const found = deep.map(value).filter(v => v !== null);
      const range = found.length ? `: ${short(Math.min(...found))} to ${short(Math.max(...found))}` : "";
      keys.append(el("span", {}, "layer 0", el("i", { class: "ramp" }), `${deep.length - 1}${range}`));
    }
    if (data.swaps.length && at === null) keys.append(el("span", {}, swatch("accent"), "dotted: layers swapped"));
    if (at !== null) keys.append(el("span", {}, `step ${at}`));
    rule.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) rule.setAttribute(end, x(at));
  };
  listeners.push(tell);
  tell(null);
  picture.addEventListener("pointermove", event => pointAt(step(event.clientX)));
  for (const away of ["pointerleave", "blur"]) picture.addEventListener(away, () => pointAt(null));
  picture.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    pointAt(Math.max(span[0], Math.min(span[1], (now ?? span[1]) + by)));
  });
  return captioned(chart.title, chart.unit, picture, keys);
}
const stepCharts = charts => el("div", { class: "charts" }, ...charts.map(stepChart));
