"use strict";
// Text from the data only ever becomes textContent or an attribute: nothing here parses markup.
(() => {
const root = document.documentElement;
addEventListener("error", event => { root.dataset.error = event.message; });
const data = JSON.parse(document.getElementById("data").textContent);
const { queries, train, checks, noun, kind } = data;
const byId = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// -- words and numbers ----------------------------------------------------------------------------

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function number(value, signed = false) {
  if (value === 0) return "0";
  const sign = value < 0 ? "−" : signed ? "+" : "", size = Math.abs(value);
  const [mantissa, power] = size.toExponential(2).split("e");
  if (power > -4 && power < 6) return sign + Number(size.toPrecision(3)).toLocaleString("en-US",
    { minimumFractionDigits: Math.max(2 - power, 0), maximumFractionDigits: 8 });
  const digits = [...String(Math.abs(power))].map(d => SUPERSCRIPTS[d]).join("");
  return `${sign}${mantissa}×10${power < 0 ? "⁻" : ""}${digits}`;
}
const isGroup = place => typeof train.index[place] === "string";
const exampleName = place => isGroup(place) ? train.index[place] : `#${train.index[place]}`;
const labelOf = place => train.label[place];
const trainWord = place => (isGroup(place) ? "group " : `training ${kind} `)
  + train.index[place] + (labelOf(place) ? `, label ${labelOf(place)}` : "");
function queryWord(q) {
  const { label, prediction, value } = queries[q];
  return [`Query ${q}`, label && `label ${label}`, prediction !== undefined && `predicted ${prediction}`,
    value !== undefined && `${noun} ${number(value)}`].filter(Boolean).join(" · ");
}

// -- elements -------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function shape(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function pairs(list, rows) {
  list.replaceChildren(...rows.flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, value)]));
  return list;
}

// One PNG holds all the images of a set: a tile is a window on it, moved by its background.
function tile(role, place, side, words) {
  const sheet = data.sprites[role];
  if (!sheet) return "";
  const scale = side / Math.max(sheet.width, sheet.height), { width, height, columns, rows, gutter } = sheet;
  const across = width + 2 * gutter, down = height + 2 * gutter, wide = columns * across, tall = rows * down;
  const node = element("span", { class: `tile ${role}` });
  if (words) { node.setAttribute("role", "img"); node.setAttribute("aria-label", words); }
  else node.setAttribute("aria-hidden", "true");
  node.classList.toggle("coarse", scale > 1.5); // enlarged thumbnails: show the pixels there are
  // In percent of the tile, so that it may shrink with its column: a background position of 100%
  // puts the right edge of the sheet at the right edge of the tile.
  const left = (place % columns) * across + gutter, above = Math.floor(place / columns) * down + gutter;
  Object.assign(node.style, {
    width: `${width * scale}px`, maxWidth: "100%", aspectRatio: `${width} / ${height}`,
    backgroundSize: `${100 * wide / width}% ${100 * tall / height}%`,
    backgroundPosition: `${100 * left / (wide - width)}% ${100 * above / (tall - height)}%`,
  });
  return node;
}

function niceTicks(low, high, about) {
  const rough = (high - low) / about, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * unit).find(s => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
  return { ticks, label: value => {
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    if (decimals > 4 || step >= 1e5) return number(value);
    return value.toFixed(decimals).replace(/^-/, Number(value.toFixed(decimals)) === 0 ? "" : "−");
  } };
}

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

const checkedQueries = [...new Set(checks.map(check => check.query))];
let checkedQuery = checkedQueries[0], focused = null;
const measured = new Map(); // "query:place" → the change that retraining gave
for (const check of checks) {
  check.keys = check.removed.map(places => places.join("+")); // a removal is known by what it takes out
  check.keys.forEach((key, e) => measured.set(`${check.query}:${key}`, check.actual[e]));
}
const together = checks.some(check => check.removed.some(places => places.length > 1));
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

const things = together ? `a set of training ${kind}s` : `one training ${isGroup(0) ? "group" : kind}`;
const seriesOf = query => checks.map((check, s) => ({ ...check, s })).filter(c => c.query === query);

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
    const item = element("li", {}, key(c.s), c.label);
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
      button.addEventListener("click", () => showQuery(q));
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
    readout.replaceChildren(element("p", { class: "none" }, `Point at a dot, or press the arrow keys on the plot, to see ${together ? "what was removed" : `which training ${kind} it is`}.`));
    return;
  }
  const first = series[0], places = first.removed[at(first, focused)], single = places.length === 1;
  const list = pairs(element("dl"), [["actual change", withError(first, at(first, focused))],
    ...series.map(c => [`predicted, ${c.label}`, number(c.predicted[at(c, focused)], true)])]);
  const label = single && labelOf(places[0]) ? ` label ${labelOf(places[0])}` : "";
  const name = element("div", {}, element("b", {}, removalName(first, focused)), label, list);
  const tiles = single ? [tile("train", places[0], 76, trainWord(places[0]))]
    : [element("div", { class: "tiles" }, ...places.slice(0, 20).map(p => tile("train", p, 26, trainWord(p))))];
  readout.classList.toggle("several", !single);
  readout.replaceChildren(...(single ? [...tiles, name] : [name, ...tiles]));
}
function drawTable(series) {
  const cell = (c, key) => c.keys.includes(key) ? number(c.predicted[at(c, key)], true) : "";
  const actual = series.some(c => c.errors) ? "actual ± s.e." : "actual";
  const head = element("tr", {}, ...[together ? "removed" : `training ${kind}`, ...(together ? [] : ["label"]), actual, ...series.map(c => together ? `predicted, ${c.label}` : c.label)].map(t => element("th", { scope: "col" }, t)));
  const rows = dotOrder().map(key => {
    const c = series.find(one => one.keys.includes(key)), e = at(c, key);
    const label = together ? [] : [labelOf(c.removed[e][0])];
    return element("tr", {}, element("th", { scope: "row" }, removalName(c, key)),
      ...[...label, withError(c, e), ...series.map(one => cell(one, key))].map(t => element("td", {}, t)));
  });
  const table = element("table", {}, element("caption", {}, `Change of the ${noun} of query ${checkedQuery} when ${things} is removed`), element("thead", {}, head), element("tbody", {}, ...rows));
  const details = byId("scatter-table");
  details.replaceChildren(details.firstElementChild, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The dots as a table" }, table));
}

// -- one query ------------------------------------------------------------------------------------

let current = -1, found = queries.map((_, q) => q);

function showQuery(q) {
  if (q === current || !queries[q]) return;
  current = q;
  const query = queries[q], words = queryWord(q);
  byId("bar-text").textContent = words;
  byId("bar-tile").replaceChildren(tile("query", q, 40));
  byId("query-title").textContent = `Query ${q}`;
  byId("query-image").replaceChildren(tile("query", q, 148, `the ${kind} of query ${q}`));
  const facts = [];
  if (query.label) facts.push(["label", query.label]);
  if (query.prediction !== undefined) facts.push(["predicted", query.prediction]);
  if (query.value !== undefined) facts.push([noun, number(query.value)]);
  pairs(byId("query-facts"), facts);
  if (query.wrong) byId("query-facts").querySelectorAll("dd")[query.label ? 1 : 0].classList.add("no");
  const largest = Math.max(0, ...query.raised.scores, ...query.lowered.scores.map(score => -score));
  for (const side of ["raised", "lowered"]) {
    const list = byId(side), { places, scores, changes, differs } = query[side];
    const entries = places.map((place, e) => ({ place, score: scores[e],
      change: changes ? changes[e] : data.predicts ? -scores[e] : undefined, differs: differs?.[e] }));
    list.classList.toggle("wide", !data.sprites.train && data.features.length > 0);
    list.replaceChildren(...entries.map(entry => card(entry, q, largest)));
    const things = isGroup(0) ? "group" : `training ${kind}`;
    byId(`${side}-hint`).textContent = entries.length
      ? `${entries.length} ${entries.length === 1 ? things : things + "s"}, strongest first`
      : `No ${things} ${side} it.`;
  }
  drawHistogram(query);
  const place = found.indexOf(q);
  // Not `disabled`, which would take the focus from a reader who pressed the button to the end.
  byId("previous").setAttribute("aria-disabled", place === 0);
  byId("next").setAttribute("aria-disabled", place === found.length - 1);
  for (const option of byId("strip").children) {
    const on = option.dataset.query === String(q);
    option.setAttribute("aria-selected", on);
    if (on) {
      byId("strip").setAttribute("aria-activedescendant", option.id);
      // Not scrollIntoView: it would scroll the whole page to the strip as well.
      byId("strip").scrollLeft = option.offsetLeft - byId("strip").offsetLeft - byId("strip").clientWidth / 2 + option.clientWidth / 2;
    }
  }
  if (checkedQueries.includes(q) && q !== checkedQuery) { checkedQuery = q; focused = null; drawScatter(); }
  history.replaceState(null, "", `#query=${q}`);
}

function card(entry, q, largest) {
  const { place } = entry, actual = measured.get(`${q}:${place}`);
  const meter = element("div", { class: "meter", "aria-hidden": "true" }, element("span"));
  meter.firstChild.style.width = `${100 * Math.abs(entry.score) / largest}%`;
  const rows = [["score", number(entry.score, true)]];
  if (entry.change !== undefined) rows.push(["removed", number(entry.change, true)]);
  if (actual !== undefined) rows.push(["retrained", number(actual, true)]);
  const list = pairs(element("dl"), rows);
  list.querySelectorAll("dt").forEach(term => { term.title = MEANING[term.textContent]; });
  const head = element("div", { class: "head" }, element("b", {}, labelOf(place) || exampleName(place)), labelOf(place) ? element("span", {}, exampleName(place)) : "");
  const node = element("li", { class: "card" }, tile("train", place, 180, trainWord(place)), head, meter, list);
  if (entry.differs) node.append(differences(entry.differs));
  return node;
}
const MEANING = {
  score: `positive raised the ${noun}, negative lowered it`,
  removed: `predicted change of the ${noun} if this alone is removed${data.newton ? ", by a Newton step" : ""}`,
  retrained: `change of the ${noun} after really removing it and retraining`,
};

const SHOWN = { score: true, removed: data.predicts, retrained: checks.length > 0 };

function differences(rows) {
  const head = element("tr", {}, ...["differs most in", "this query", "this row"].map(t => element("th", { scope: "col" }, t)));
  const body = rows.map(([column, theirs, mine]) => element("tr", {}, element("th", { scope: "row" }, data.features[column]),
    element("td", {}, number(theirs)), element("td", {}, number(mine))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function drawHistogram(query) {
  const host = byId("histogram"), { start, width: step, counts, low, high } = query.histogram;
  const total = counts.reduce((a, b) => a + b, 0);
  const width = Math.max(250, host.clientWidth), height = 168, left = 44, right = 14, top = 22, bottom = 38;
  const end = start + step * counts.length, most = Math.max(...counts);
  const x = v => left + (step ? (v - start) / (end - start) : 0.5) * (width - left - right);
  // Logarithmic: nearly all scores are near zero, and the few that are not are what one looks for.
  const y = c => height - bottom - (c ? Math.log10(c) + 0.3 : 0) / (Math.log10(most) + 0.3 || 1) * (height - top - bottom);
  const up = query.histogram.positive;
  const words = `Histogram of ${total} scores, from ${number(low, true)} to ${number(high, true)}: ${up} above zero.`;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
  svg.append(shape("text", { x: left, y: 12 }, `${total.toLocaleString("en-US")} ${total === 1 ? "score" : "scores"}, ${number(low, true)} to ${number(high, true)}`));
  for (let c = 1; c <= most; c *= 10) svg.append(
    shape("line", { x1: left, x2: width - right, y1: y(c), y2: y(c), class: "grid" }),
    shape("text", { x: left - 7, y: y(c) + 4, "text-anchor": "end" }, c.toLocaleString("en-US")));
  counts.forEach((c, b) => {
    if (!c) return;
    const from = step ? x(start + b * step) : left, to = step ? x(start + (b + 1) * step) : width - right;
    svg.append(shape("rect", { x: from + 0.5, y: y(c), width: Math.max(1, to - from - 1), height: height - bottom - y(c),
      class: start + (b + 0.5) * step >= 0 ? "raised" : "lowered" }));
  });
  svg.append(shape("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "zero" }));
  if (step) {
    const { ticks, label } = niceTicks(start, end, width / 110);
    for (const t of ticks) svg.append(shape("text", { x: x(t), y: height - bottom + 16, "text-anchor": "middle" }, label(t)));
  }
  svg.append(
    shape("text", { x: left, y: height - 4, class: "name" }, "← lowered"),
    shape("text", { x: width - right, y: height - 4, "text-anchor": "end", class: "name" }, "raised →"));
  host.replaceChildren(svg);
}

// -- choosing -------------------------------------------------------------------------------------

function filter() {
  const words = byId("search").value.trim().toLowerCase(), label = byId("label").value, order = byId("order").value;
  found = queries.map((_, q) => q).filter(q => {
    const query = queries[q];
    const matches = !words || `#${q}` === words || String(q) === words
      || query.label.toLowerCase().includes(words) || String(query.prediction ?? "").toLowerCase().includes(words);
    return matches && (!label || query.label === label) && (!byId("wrong").checked || query.wrong);
  });
  if (order !== "given") {
    const sign = order === "high" ? -1 : 1;
    found.sort((a, b) => sign * (queries[a].value - queries[b].value) || a - b);
  }
  byId("found").textContent = found.length === queries.length ? "" : `${found.length} of ${queries.length}`;
  byId("strip").replaceChildren(...found.map(q => {
    const query = queries[q];
    const option = element("div", { class: "option", role: "option", id: `query-${q}`, "aria-selected": "false", "aria-label": queryWord(q) },
      tile("query", q, 48), element("span", { class: "word" }, query.label || `#${q}`), query.label ? element("span", {}, `#${q}`) : "");
    option.dataset.query = q;
    option.addEventListener("click", () => showQuery(q));
    return option;
  }));
  const keep = found.includes(current) ? current : found[0];
  if (keep !== undefined) { current = -1; showQuery(keep); }
}
function step(by) {
  const place = found.indexOf(current);
  const next = found[Math.max(0, Math.min(found.length - 1, place + by))];
  if (next !== undefined) showQuery(next);
}
function prepareFilters() {
  const labels = [...new Set(queries.map(query => query.label).filter(Boolean))];
  labels.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  byId("label").append(...labels.map(label => element("option", { value: label }, label)));
  // A control that can change nothing is only in the way.
  byId("label").parentElement.hidden = labels.length < 2 || labels.length > 200;
  byId("order").parentElement.hidden = queries.some(query => query.value === undefined);
  byId("wrong").parentElement.hidden = !queries.some(query => query.wrong);
  byId("filters").hidden = byId("strip").hidden = queries.length < 2;
  byId("previous").hidden = byId("next").hidden = queries.length < 2;
  byId("filters").addEventListener("submit", event => event.preventDefault());
  for (const id of ["search", "label", "order", "wrong"]) byId(id).addEventListener("input", filter);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
}
addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // the browser's own
  if (event.target.closest("input, select, textarea, .scroll")) return;
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
});
const asked = () => Number((/^#query=(\d+)$/.exec(location.hash) ?? [])[1] ?? -1);
addEventListener("hashchange", () => showQuery(asked()));

// -- start ----------------------------------------------------------------------------------------

byId("bar").hidden = byId("queries").hidden = false;
prepareFilters();
byId("terms").textContent = Object.entries(MEANING).filter(([term]) => SHOWN[term])
  .map(([term, meaning]) => `${term}: ${meaning}`).join(" · ");
current = queries[asked()] ? asked() : data.start;
if (checkedQueries.includes(current)) checkedQuery = current;
if (checks.length) focused = checks[0].query === checkedQuery ? checks[0].keys[0] : null;
if (together) byId("scatter-table").open = true; // few and each of them named: worth reading at once
filter();
drawScatter();
let drawnAt = innerWidth;
addEventListener("resize", () => { // figures are drawn to the width there is, so that text keeps its size
  if (innerWidth === drawnAt) return;
  drawnAt = innerWidth;
  drawScatter();
  drawHistogram(queries[current]);
});
root.dataset.ready = "yes";
})();
