// -- figures --------------------------------------------------------------------------------------

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

const DECADES = (low, high) => {
  const ticks = [];
  for (let p = Math.ceil(Math.log10(low) - 1e-9); p <= Math.log10(high) + 1e-9; p++) ticks.push(10 ** p);
  return ticks;
};

const powerOfTen = p => `10${p < 0 ? "⁻" : ""}${[...String(Math.abs(p))].map(d => SUPERSCRIPTS[d]).join("")}`;

// Axes of one figure: places of values, grid, ticks and names; `bare` without numbers upwards.
function axes(host, { x: [x0, x1], y: [y0, y1], height, xName, yName, logX, logY, label, bare, most = 760 }) {
  const width = Math.max(250, Math.min(host.clientWidth || 600, most));
  const left = 62, right = 14, top = 12, bottom = 48;
  const part = (v, low, high, log) => log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low || 1);
  const x = v => left + part(v, x0, x1, logX) * (width - left - right);
  const y = v => height - bottom - part(v, y0, y1, logY) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.style.maxWidth = `${width}px`;
  const each = (low, high, log, about) => {
    if (!log) return niceTicks(low, high, about);
    const ticks = DECADES(low, high), step = Math.ceil(ticks.length / about);
    return { ticks: ticks.filter((_, k) => k % step === 0), label: v => v >= 1 && v < 1e6 ? whole(Math.round(v)) : powerOfTen(Math.round(Math.log10(v))) };
  };
  const across = each(x0, x1, logX, width / 110), up = each(y0, y1, logY, Math.max(3, height / 60));
  for (const t of across.ticks) svg.append(
    shape("line", { x1: x(t), x2: x(t), y1: top, y2: height - bottom, class: !logX && Math.abs(t) < 1e-12 * (x1 - x0) ? "zero" : "grid" }),
    shape("text", { x: Math.min(x(t), width - 4 - 3.6 * across.label(t).length), y: height - bottom + 17, "text-anchor": "middle" }, across.label(t)));
  for (const t of up.ticks) svg.append(
    shape("line", { x1: left, x2: width - right, y1: y(t), y2: y(t), class: !logY && Math.abs(t) < 1e-12 * (y1 - y0) ? "zero" : "grid" }),
    ...(bare ? [] : [shape("text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, up.label(t))]));
  svg.append(
    shape("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom, class: "frame" }),
    shape("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle", class: "name" }, xName),
    shape("text", { transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "name" }, bare ? `${yName} (${bare})` : yName));
  return { svg, x, y, width, height };
}
const path = points => "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
// Many dots as one path of round caps: thousands of elements would make scrolling slow.
const cloud = (points, attributes) => shape("path",
  { d: points.map(([x, y]) => `M${x.toFixed(1)} ${y.toFixed(1)}h0`).join(""), ...attributes });

function drawHistogram(query) {
  const host = byId("histogram"), { start, width: step, counts, low, high } = query.histogram;
  const total = counts.reduce((a, b) => a + b, 0);
  const width = Math.max(250, Math.min(host.clientWidth, 620)), height = 168, left = Math.max(44, 12 + 7.2 * whole(10 ** Math.floor(Math.log10(Math.max(...counts)))).length), right = 14, top = 22, bottom = 38;
  const end = start + step * counts.length, most = Math.max(...counts);
  const x = v => left + (step ? (v - start) / (end - start) : 0.5) * (width - left - right);
  // Logarithmic: nearly all scores are near zero, and the few that are not are what one looks for.
  const y = c => height - bottom - (c ? Math.log10(c) + 0.3 : 0) / (Math.log10(most) + 0.3 || 1) * (height - top - bottom);
  const up = query.histogram.positive;
  const words = `Histogram of ${total} scores${caution ? `; ${caution}` : `, from ${number(low, true)} to ${number(high, true)}`}: ${up} above zero.`;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
  svg.append(shape("text", { x: left, y: 12 }, `${total.toLocaleString("en-US")} ${total === 1 ? "score" : "scores"}${caution ? `; ${caution}` : `, ${number(low, true)} to ${number(high, true)}`}`));
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
    if (!caution) for (const t of ticks) svg.append(shape("text", { x: Math.min(x(t), width - 4 - 3.6 * label(t).length), y: height - bottom + 16, "text-anchor": "middle" }, label(t)));
  }
  svg.append(
    shape("text", { x: left, y: height - 4, class: "name" }, "← lowered"),
    shape("text", { x: width - right, y: height - 4, "text-anchor": "end", class: "name" }, "raised →"));
  if (caution) return host.replaceChildren(svg);
  const rows = counts.map((c, b) => [`${number(start + b * step, true)} to ${number(start + (b + 1) * step, true)}`, whole(c)]).filter((_, b) => counts[b]);
  const open = host.querySelector("details")?.open ?? false, details = folded("The bars as a table",
    scrolling("The bars as a table", table(words, ["score", "examples"], rows)));
  details.open = open; // as the reader left it at the last query
  host.replaceChildren(svg, details);
}
