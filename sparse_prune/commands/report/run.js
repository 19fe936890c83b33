function showRun() {
  show(el("h1", {}, "Attention pruning run"), el("div", { class: "soft name" }, data.name), el("p", { class: "sentence" }, data.sentence));
  show(el("div", { class: "figures" }, ...data.figures.map(figure => el("div", { class: "figure " + figure.judgement },
    el("span", { class: "soft" }, figure.label), el("b", {}, figure.value), el("small", {}, figure.note)))));
  show(el("div", { class: "soft" }, data.limits));
  show(el("dl", { class: "facts" }, ...data.facts.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, value)))));
  if (data.also.length) show(el("p", { class: "soft" }, data.also.join(" · ")));
  if (data.frames.length) showAtlas();
  if (data.charts.length) show(el("h2", {}, "Over the run ", el("span", { class: "soft" }, "all charts share the axis: optimizer steps taken")), stepCharts(data.charts));
  if (data.more.length) show(fold("More charts", stepCharts(data.more)));
  if (data.table.length) show(fold("Layers and heads", el("div", { class: "soft" }, "Share of blocks pruned, per head on the right."), layerTable()));
  const settings = Object.entries(data.settings);
  if (settings.length) show(fold("All settings", el("div", { class: "scroll" },
    el("table", {}, ...settings.map(row => el("tr", {}, ...row.map(text => el("td", {}, text))))))));
}

const fold = (title, ...nodes) => el("details", {}, el("summary", {}, title), ...nodes);

function layerTable() {
  const heads = Math.max(...data.table.map(row => row.heads.length));
  const titles = ["Layer", "Pruned", "Attention kept", "State", "At step", ...Array.from({ length: heads }, (_, h) => "h" + h)];
  const rows = data.table.map((row, n) => el("tr", { id: "layer-" + n },
    ...[`${n} ${row.layer}`, percent(row.sparsity), row.kept === null ? "" : percent(row.kept), row.state, row.settled ?? ""].map(text => el("td", {}, text)),
    ...row.heads.map(share => el("td", { style: `background: color-mix(in srgb, var(--main) ${Math.round(45 * share)}%, transparent)` }, percent(share)))));
  return el("div", { class: "scroll" }, el("table", {}, el("tr", {}, ...titles.map(text => el("th", {}, text))), ...rows));
}

function openRow(layer) {
  const row = document.getElementById("layer-" + layer);
  row.closest("details").open = true;
  document.querySelector("tr.chosen")?.classList.remove("chosen");
  row.classList.add("chosen");
  row.scrollIntoView({ block: "center" });
}

const bits = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const bit = (packed, place) => packed[place >> 3] >> (7 - (place & 7)) & 1;
const level = (layer, place) => layer.depth === 1 ? bit(layer.keep, place)
  : bit(layer.keep, 2 * place) << 1 | bit(layer.keep, 2 * place + 1);

function why(row, head) {
  if (row.state === "dense again") return "all kept: the layer was given its connections back";
  if (row.heads[head] <= 0) return "kept whole";
  const scores = Math.max(0, 1 - row.sink[head] - row.recent[head]);
  return `of what is kept, ${percent(row.sink[head])} are sinks, ${percent(row.recent[head])} the recent blocks, and ${percent(scores)} was chosen by score`;
}

function showAtlas() {
  const unpacked = new Map();
  const frame = n => {
    if (!unpacked.has(n)) unpacked.set(n, data.frames[n].layers.map(l => ({ ...l, keep: bits(l.keep), possible: bits(l.possible) })));
    return unpacked.get(n);
  };
  const final = data.frames.at(-1).layers, layers = final.length, most = key => Math.max(...final.map(layer => layer[key]));
  const [heads, wide, high] = [most("heads"), most("cols"), most("rows")];
  // The longer side runs across, so that two layers of many heads fill the width as well.
  const turned = heads > layers, [across, down] = turned ? [heads, layers] : [layers, heads];
  const place = (layer, head) => turned ? [head, layer] : [layer, head];
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": "Kept blocks of every layer and head; arrow keys move, Enter opens the layer's row" });
  const told = el("div", { class: "told", "aria-live": "polite" }), at = el("span");
  const slider = el("input", { type: "range", min: 0, max: data.frames.length - 1, "aria-label": "Step of the patterns" });
  slider.value = data.frames.length - 1;
  const play = el("button", { type: "button" }, "Play");
  const legend = [["main", "kept"], ["pruned", "pruned"], ["regrown", "regrown"], ["lost", "pruned since the step before"]];
  show(el("h2", {}, "Patterns"), el("div", { class: "soft" },
    `A ${turned ? "row" : "column"} per layer, a ${turned ? "column" : "row"} per head; in each, query blocks downwards and key blocks to the right. `
    + (data.merged > 1 ? `A cell stands for ${data.merged} x ${data.merged} blocks: the darker, the more of them are kept.` : "")),
  el("div", { class: "soft legend" }, ...legend.map(([colour, text]) => el("span", {}, el("i", { style: `background: var(--${colour})` }), text))));
  if (data.frames.length > 1) show(el("div", { class: "controls" }, play, slider, at));
  show(el("div", { class: "scroll" }, canvas), told);

  const label = 24, least = Math.max(13, Math.min(40, wide, 1100 / across));
  let tile = null, chosen = null;
  function draw() {
    const style = getComputedStyle(document.documentElement), n = +slider.value;
    const rgb = name => { const hex = style.getPropertyValue("--" + name).trim().replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3"); return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)); };
    const paint = Object.fromEntries(["main", "pruned", "regrown", "lost"].map(name => [name, rgb(name)]));
    canvas.style.minWidth = label + across * least + "px";
    const scale = matchMedia("print").matches ? 4 : devicePixelRatio || 1, room = canvas.clientWidth || 1100, gap = across > 40 ? 2 : 4;
    const side = Math.min((room - label) / across - gap, Math.max(24, 560 / down) * wide / high * 1.4);
    tile = { w: side + gap, h: side * high / wide + gap, label };
    canvas.width = room * scale; canvas.height = (label + down * tile.h) * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale); pen.imageSmoothingEnabled = false;
    pen.fillStyle = style.getPropertyValue("--soft"); pen.font = "11px system-ui"; pen.textAlign = "center";
    for (let i = 0; i < across; i += Math.ceil(20 / tile.w)) pen.fillText(i, label + i * tile.w + side / 2, 15);
    for (let i = 0; i < down; i += Math.ceil(13 / tile.h)) pen.fillText(i, 10, label + i * tile.h + tile.h / 2);
    const now = frame(n), before = n ? frame(n - 1) : [];
    const sheet = new OffscreenCanvas(wide, high), ink = sheet.getContext("2d");
    now.forEach((layer, l) => {
      const old = before[l]?.rows === layer.rows && before[l]?.cols === layer.cols ? before[l] : null, full = 2 ** layer.depth - 1;
      for (let h = 0; h < layer.heads; h++) {
        const image = new ImageData(layer.cols, layer.rows);
        for (let cell = 0; cell < layer.rows * layer.cols; cell++) {
          if (!bit(layer.possible, cell)) continue;
          const index = h * layer.rows * layer.cols + cell, is = level(layer, index), was = old ? level(old, index) : is;
          const share = is / full;
          const colour = is > was ? paint.regrown : is < was ? paint.lost : paint.pruned.map((p, i) => p + (paint.main[i] - p) * share);
          image.data.set([...colour, 255], 4 * cell);
        }
        ink.clearRect(0, 0, wide, high);
        ink.putImageData(image, 0, 0);
        const [x, y] = place(l, h);
        pen.drawImage(sheet, 0, 0, layer.cols, layer.rows, label + x * tile.w, label + y * tile.h, side * layer.cols / wide, side * layer.rows / wide);
      }
    });
    if (chosen) {
      const [x, y] = place(...chosen);
      pen.strokeStyle = style.getPropertyValue("--accent"); pen.lineWidth = 2;
      pen.strokeRect(label + x * tile.w - 1, label + y * tile.h - 1, tile.w - gap + 2, tile.h - gap + 2);
    }
    at.textContent = `step ${data.frames[n].step}`;
  }
  function tell(layer, head) {
    const row = data.table[layer];
    if (!row || !(head in row.heads)) return;
    if (chosen?.[0] !== layer || chosen?.[1] !== head) { chosen = [layer, head]; draw(); }
    const link = el("a", { href: "#layer-" + layer }, "its layer's row in the table");
    link.addEventListener("click", event => { event.preventDefault(); openRow(layer); });
    told.replaceChildren(el("b", {}, `Layer ${layer}, head ${head}: ${percent(1 - row.heads[head])} of the blocks kept`),
      `, half of its rows reach back ${row.reach[head]} tokens or more, sinks apart; ${why(row, head)}. See `, link, ".");
  }
  const under = event => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left - label) / tile.w, (event.clientY - box.top - label) / tile.h].map(Math.floor);
    return x < 0 || y < 0 || x >= across || y >= down ? null : turned ? [y, x] : [x, y];
  };
  canvas.addEventListener("pointermove", event => { const found = under(event); if (found) tell(...found); });
  canvas.addEventListener("click", event => {
    const found = under(event);
    if (!found) return;
    tell(...found);
    if (event.pointerType !== "touch") openRow(found[0]);  // a finger cannot point without a click
  });
  canvas.addEventListener("keydown", event => {
    if (event.key === "Enter" && chosen) return openRow(chosen[0]);
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    const [x, y] = chosen ? place(...chosen) : [-by[0], -by[1]], to = [x + by[0], y + by[1]];
    if (to[0] >= 0 && to[1] >= 0 && to[0] < across && to[1] < down) tell(...(turned ? [to[1], to[0]] : to));
  });
  slider.addEventListener("input", draw);
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value >= data.frames.length - 1) slider.value = 0;
    play.textContent = "Pause";
    draw();
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      draw();
      if (+slider.value >= data.frames.length - 1) stop();
    }, 250);
  });
  for (const event of ["resize", "beforeprint", "afterprint"]) addEventListener(event, draw);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
  draw();
  const around = canvas.parentElement, hidden = around.scrollWidth > around.clientWidth;
  told.append("Point at a head, or move with the arrow keys: density, reach, and why its blocks were kept."
    + (hidden ? ` Scroll sideways to see all ${across} ${turned ? "heads" : "layers"}.` : ""));
}
