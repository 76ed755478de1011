// Text from the data only ever becomes textContent or an attribute: nothing here parses markup.
const root = document.documentElement;
addEventListener("error", event => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", event => { root.dataset.error = String(event.reason); });
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { noun, kind } = data;
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
const whole = value => value.toLocaleString("en-US");
const several = (count, noun) => `${whole(count)} ${count === 1 ? noun : noun.endsWith("y") ? noun.slice(0, -1) + "ies" : noun + "s"}`;
const percent = share => `${number(100 * share)} %`;
const thing = data.groups ? "group" : `training ${kind}`;
const percentOf = (part, all) => all ? percent(part / all) : "–";
function queryWord(q) {
  const { label, name, prediction, value } = source.queries[q];
  return [name ?? `Query ${q}`, label && `label ${label}`, prediction !== undefined && `predicted ${prediction}`,
    value !== undefined && `${noun} ${number(value)}`].filter(Boolean).join(" · ");
}

// -- what both sources of the data are read by ----------------------------------------------------

const askedQueries = data.queries.map((query, q) => ({ ...query, tile: data.sprites.query ? q : undefined,
  contents: query, text: query.text ?? "" }));
function exampleOf({ id, name, label = "", predicted, bare, tokens, special, ...contents }, place = id) {
  return { id, name: name ?? `#${id}`, given: name, label, predicted, tokens, special, contents, words: `${thing} ${name ?? id}${label ? `, label ${label}` : ""}`,
    tile: data.sprites.train && !bare ? place : undefined };
}
const sideOf = ({ ids, scores, errors, changes, more, differs, alike, tokens, rest, theirs, theirs_rest, uncoloured }, example) => ({ more, uncoloured,
  entries: ids.map((id, e) => ({ example: example(id), score: scores[e], error: errors?.[e], differs: differs?.[e], alike: alike?.[e],
    tokens: tokens?.[e], rest: rest?.[e], theirs: theirs?.[e], theirsRest: theirs_rest?.[e],
    change: changes ? changes[e] : data.predicts ? -scores[e] : undefined })) });

// -- elements -------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
// A text of the data beside other words: what it does to the direction of text ends with it.
const own = text => element("bdi", {}, text);
function shape(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function pairs(list, rows) {
  list.replaceChildren(...rows.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  return list;
}
function table(caption, head, rows, attributes = {}) {
  return element("table", attributes, element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...head.map(text => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map(([first, ...others]) => element("tr", {},
      element("th", { scope: "row" }, first), ...others.map(cell => element("td", {}, cell))))));
}
const scrolling = (label, ...children) =>
  element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, ...children);
function folded(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), ...children);
}
function panel(title, id, ...children) {
  return element("section", { class: "panel", "aria-labelledby": id }, element("h2", { id }, title), ...children);
}

const onPhone = () => matchMedia("(max-width: 520px)").matches;

// Sheets hold the thumbnails of a set: a tile is a window on one, moved by its background. A sheet
// gets its rule, and is decoded, when the first of its tiles is made.
const sheetRules = new Set();
function sheetClass(role, s) {
  const name = `${role}-${s}`;
  if (!sheetRules.has(name)) {
    sheetRules.add(name);
    document.styleSheets[0].insertRule(`.tile.${name} { background-image: url("${source.sheet(role, s)}"); }`);
  }
  return name;
}
function tile(role, place, side, words) {
  const sheet = data.sprites[role];
  if (!sheet || place === undefined || place === null) return "";
  const { width, height, gutter, tiles } = sheet, s = Math.floor(place / tiles), at = place % tiles;
  const [columns, rows] = sheet.sheets?.[s] ?? [1, 1], scale = side / Math.max(width, height);
  const across = width + 2 * gutter, down = height + 2 * gutter, wide = columns * across, tall = rows * down;
  const node = element("span", { class: `tile ${sheetClass(role, s)}` });
  if (words) { node.setAttribute("role", "img"); node.setAttribute("aria-label", words); }
  else node.setAttribute("aria-hidden", "true");
  node.classList.toggle("coarse", scale > 1.5); // enlarged thumbnails: show the pixels there are
  // In percent of the tile, so that it may shrink with its column: a background position of 100%
  // puts the right edge of the sheet at the right edge of the tile.
  const left = (at % columns) * across + gutter, above = Math.floor(at / columns) * down + gutter;
  Object.assign(node.style, {
    width: `${width * scale}px`, maxWidth: "100%", aspectRatio: `${width} / ${height}`,
    backgroundSize: `${100 * wide / width}% ${100 * tall / height}%`,
    backgroundPosition: `${100 * left / (wide - width)}% ${100 * above / (tall - height)}%`,
  });
  return node;
}
