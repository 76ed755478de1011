// A shape for each series besides its colour.
function marker(series, x, y, size = 5) {
  const s = series % 4, r = size;
  if (s === 0) return shape("circle", { cx: x, cy: y, r, class: "dot s0" });
  const path = [null, `M${x} ${y - r * 1.3}L${x + r * 1.3} ${y}L${x} ${y + r * 1.3}L${x - r * 1.3} ${y}Z`,
    `M${x - r} ${y - r}H${x + r}V${y + r}H${x - r}Z`,
    `M${x} ${y - r * 1.2}L${x + r * 1.2} ${y + r}H${x - r * 1.2}Z`][s];
  return shape("path", { d: path, class: `dot s${s}` });
}
function key(series) {
  const svg = shape("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" });
  svg.append(marker(series, 8, 8, 5));
  return svg;
}
document.querySelectorAll(".key").forEach(node => node.append(key(Number(node.dataset.series))));

// -- predicted against actual ---------------------------------------------------------------------

const { checks } = data;
const checkedQueries = [...new Set(checks.map(check => check.query))];
let checkedQuery = checkedQueries[0], focused = null;
const measured = new Map(); // "query:example" → the change that retraining gave
for (const check of checks) {
  check.keys = check.removed.map(ids => ids.join("+")); // a removal is known by what it takes out
  check.keys.forEach((key, e) => measured.set(`${check.query}:${key}`, check.actual[e]));
}
const exampleName = id => source.shown(id).name;
const together = checks.some(check => check.removed.some(ids => ids.length > 1));
const repeats = Math.max(1, ...checks.map(check => check.repeats));
const at = (c, key) => c.keys.indexOf(key);
const removalName = (c, key) => c.names?.[at(c, key)]
  ?? c.removed[at(c, key)].map(exampleName).join(", ");
function withError(c, e) { // both to two digits of the error
  const value = c.actual[e], error = c.errors?.[e];
  if (!(error > 1e-6 && error < 1e4)) return number(value, true) + (c.errors ? ` ± ${number(error)}` : "");
  const decimals = Math.max(0, 1 - Math.floor(Math.log10(error)));
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(decimals)} ± ${error.toFixed(decimals)}`;
}

const things = together ? `a set of training ${kind}s` : `one ${thing}`;
const seriesOf = query => checks.map((check, s) => ({ ...check, s })).filter(c => c.query === query);

function checkQuery(q) {
  checkedQuery = q;
  focused = null;
  drawScatter();
}

function drawScatter() {
  const host = byId("scatter");
  if (!host) return;
  const series = seriesOf(checkedQuery), refocus = host.contains(document.activeElement);
  const width = Math.max(260, Math.min(host.clientWidth, 560)), height = width * 0.9;
  const left = 66, right = 12, top = 10, bottom = 50;
  const all = series.flatMap(c => [...c.predicted, ...c.actual,
    ...(c.errors ?? []).flatMap((error, e) => [c.actual[e] - error, c.actual[e] + error])]);
  let low = Math.min(0, ...all), high = Math.max(0, ...all);
  const pad = (high - low || 1) * 0.06;
  low -= pad; high += pad;
  // The same scale on both axes: agreement is the diagonal.
  const x = v => left + (v - low) / (high - low) * (width - left - right);
  const y = v => height - bottom - (v - low) / (high - low) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  svg.append(shape("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom, class: "frame" }));
  const { ticks, label } = niceTicks(low, high, width / 100);
  for (const t of ticks) {
    const zero = Math.abs(t) < 1e-12 * (high - low) ? "zero" : "grid";
    svg.append(
      shape("line", { x1: x(t), x2: x(t), y1: top, y2: height - bottom, class: zero }),
      shape("line", { x1: left, x2: width - right, y1: y(t), y2: y(t), class: zero }),
      shape("text", { x: x(t), y: height - bottom + 17, "text-anchor": "middle" }, label(t)),
      shape("text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, label(t)));
  }
  svg.append(
    shape("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle", class: "name" }, `actual change of the ${noun}, retrained`),
    shape("text", { transform: `translate(14 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "name" }, `predicted change of the ${noun}`),
    shape("line", { x1: x(low), y1: y(low), x2: x(high), y2: y(high), class: "identity" }));
  for (const c of series) {
    if (c.slope === null || c.keys.length < 2) continue;
    // actual = slope · predicted + b through the means, cut to the dots' range.
    const mean = values => values.reduce((sum, v) => sum + v, 0) / values.length;
    const line = p => mean(c.actual) + c.slope * (p - mean(c.predicted));
    const [from, to] = [Math.min(...c.predicted), Math.max(...c.predicted)];
    svg.append(shape("line", { x1: x(line(from)), y1: y(from), x2: x(line(to)), y2: y(to), class: `fitted s${c.s % 4}` }));
  }
  for (const c of series) if (c.errors) c.errors.forEach((error, e) => svg.append(shape("line", {
    x1: x(c.actual[e] - error), x2: x(c.actual[e] + error), y1: y(c.predicted[e]), y2: y(c.predicted[e]),
    class: `error s${c.s % 4}` })));
  for (const c of series) c.keys.forEach((key, e) => {
    const dot = marker(c.s, x(c.actual[e]), y(c.predicted[e]), width < 400 ? 4 : 5);
    dot.dataset.removal = key;
    dot.addEventListener("pointerenter", () => focusDot(key));
    dot.addEventListener("click", () => focusDot(key));
    svg.append(dot);
  });
  const legend = element("ul", { class: "legend" }, ...series.map(c => {
    const item = element("li", {}, key(c.s), own(c.label));
    if (c.slope !== null) item.append(` (slope ${c.slope.toFixed(2).replace("-", "−")})`);
    return item;
  }), element("li", {}, "solid line: predicted = actual"));
  const plot = element("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "scatter plot",
    "aria-label": `Predicted against actual change of the ${noun} of query ${checkedQuery}: `
      + `${series[0].keys.length} removals. Arrow keys go through them in order of the actual change.` }, svg);
  plot.addEventListener("keydown", stepDots);
  const about = element("p", { class: "hint" }, `Query ${checkedQuery}: each dot is ${things}, removed${together ? " together" : ""}`
    + (repeats > 1 ? `; the mean of ${repeats} retrainings, each from another seed` : "")
    + (series.some(c => c.errors) ? ", its bar one standard error to each side." : "."));
  const parts = [about, legend, plot];
  if (checkedQueries.length > 1) {
    const choose = element("div", { class: "choose", role: "group", "aria-label": "Checked query" });
    for (const q of checkedQueries) {
      const button = element("button", { type: "button", "aria-pressed": q === checkedQuery }, `Query ${q}`);
      button.addEventListener("click", () => checkQuery(q));
      choose.append(button);
    }
    parts.unshift(choose);
  }
  host.replaceChildren(...parts);
  if (refocus) plot.focus();
  drawTable(series);
  markDots();
}

// Dots in the order of the actual change, each removal once.
function dotOrder() {
  const seen = new Map();
  for (const c of seriesOf(checkedQuery)) c.keys.forEach((key, e) => seen.set(key, c.actual[e]));
  return [...seen.keys()].sort((a, b) => seen.get(a) - seen.get(b));
}
function stepDots(event) {
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  const end = { Home: 0, End: -1 }[event.key];
  if (event.altKey || event.ctrlKey || event.metaKey || (step === undefined && end === undefined)) return;
  event.preventDefault();
  event.stopPropagation(); // inside the plot arrows go through dots, elsewhere through queries
  const order = dotOrder(), now = order.indexOf(focused);
  focusDot(end !== undefined ? order.at(end) : order[Math.max(0, Math.min(order.length - 1, now + step))]);
}
function focusDot(key) {
  focused = key;
  markDots();
}
function markDots() {
  document.querySelectorAll("#scatter .dot").forEach(dot =>
    dot.classList.toggle("on", dot.dataset.removal === focused));
  const readout = byId("readout"), series = seriesOf(checkedQuery).filter(c => c.keys.includes(focused));
  if (!readout) return;
  if (!series.length) {
    readout.replaceChildren(element("p", { class: "none" }, `Point at a dot, or press the arrow keys on the plot, to see ${together ? "what was removed" : `which ${thing} it is`}.`));
    return;
  }
  const first = series[0], ids = first.removed[at(first, focused)], single = ids.length === 1;
  const list = pairs(element("dl"), [["actual change", withError(first, at(first, focused))],
    ...series.map(c => [`predicted, ${c.label}`, number(c.predicted[at(c, focused)], true)])]);
  const label = single && source.shown(ids[0]).label ? [" label ", own(source.shown(ids[0]).label)] : [];
  const name = element("div", {}, element("b", {}, removalName(first, focused)), ...label, list);
  const picture = (id, side) => { const one = source.shown(id); return tile("train", one.tile, side, one.words); };
  const tiles = single ? [picture(ids[0], 76)]
    : [element("div", { class: "tiles" }, ...ids.slice(0, 20).map(id => picture(id, 26)))];
  readout.classList.toggle("several", !single);
  readout.replaceChildren(...(single ? [...tiles, name] : [name, ...tiles]));
}
function drawTable(series) {
  const cell = (c, key) => c.keys.includes(key) ? number(c.predicted[at(c, key)], true) : "";
  const actual = series.some(c => c.errors) ? "actual ± s.e." : "actual";
  const head = element("tr", {}, ...[together ? "removed" : thing, ...(together ? [] : ["label"]), actual, ...series.map(c => together ? `predicted, ${c.label}` : c.label)].map(t => element("th", { scope: "col" }, t)));
  const rows = dotOrder().map(key => {
    const c = series.find(one => one.keys.includes(key)), e = at(c, key);
    const label = together ? [] : [source.shown(c.removed[e][0]).label];
    return element("tr", {}, element("th", { scope: "row" }, removalName(c, key)),
      ...[...label, withError(c, e), ...series.map(one => cell(one, key))].map(t => element("td", {}, t)));
  });
  const table = element("table", {}, element("caption", {}, `Change of the ${noun} of query ${checkedQuery} when ${things} is removed`), element("thead", {}, head), element("tbody", {}, ...rows));
  const details = byId("scatter-table");
  details.replaceChildren(details.firstElementChild, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The dots as a table" }, table));
}

// -- predicted against measured, on subsets -------------------------------------------------------

function drawSubsets() {
  const host = byId("subsets");
  if (!host) return;
  const { predicted, measured, query, subsets, all } = data.comparison;
  const reach = Math.max(1e-300, ...predicted.map(Math.abs), ...measured.map(Math.abs)) * 1.06;
  const words = `Measured against predicted change of the ${noun} on ${several(subsets, "random subset")} of the data, each query about its own mean.`;
  const { svg, x, y, width } = axes(host, { x: [-reach, reach], y: [-reach, reach], height: Math.min(host.clientWidth || 480, 480) * 0.9,
    xName: `measured change of the ${noun}, retrained`, yName: `predicted change of the ${noun}`, label: words, most: 560 });
  svg.append(shape("line", { x1: x(-reach), y1: y(-reach), x2: x(reach), y2: y(reach), class: "identity" }),
    cloud(predicted.map((p, k) => [x(measured[k]), y(p)]), { class: "cloud s2", "stroke-width": width < 400 ? 4 : 5 }));
  const rows = predicted.slice(0, 200).map((p, k) => [`query ${query[k]}`, number(p, true), number(measured[k], true)]);
  const note = predicted.length < all ? ` ${whole(predicted.length)} of ${whole(all)} are drawn.` : "";
  host.replaceChildren(element("p", { class: "hint" }, words + note + " Solid line: predicted = measured."), svg,
    folded("The dots as a table", scrolling("The dots as a table",
      table(rows.length < predicted.length ? `The first ${rows.length} dots` : "The dots", ["", "predicted", "measured"], rows))));
}
