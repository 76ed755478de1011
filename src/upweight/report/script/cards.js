// -- an example -----------------------------------------------------------------------------------

// Without anything that supports sizes the page shows order: ranks and bars, and no predicted change.
const caution = data.caution;
const MEANING = {
  rank: `place among those that raised, or lowered, its ${noun}, strongest first; ${caution}`,
  score: `positive raised the ${noun}, negative lowered it`,
  removed: `predicted change of the ${noun} if this alone is removed${data.newton ? ", corrected for its leverage" : ""}`,
  retrained: `change of the ${noun} after really removing it and retraining`,
};
const SHOWN = { rank: caution, score: !caution, removed: !caution && data.predicts, retrained: checks.length > 0 };

// What is shown of an example besides its picture.
function contentsOf(contents, full) {
  const nodes = [];
  if (contents.text !== undefined) nodes.push(longText(contents.text, full));
  for (const part of contents.custom ?? []) {
    if (part.text !== undefined) nodes.push(longText(part.text, full));
    if (part.pairs) nodes.push(pairs(element("dl", { class: "facts small" }), part.pairs));
    if (part.picture) nodes.push(element("img", { src: part.picture, alt: "", class: "picture", loading: "lazy" }));
  }
  return nodes;
}
const BRIEF = 220;
function longText(text, full) {
  if (full || text.length <= BRIEF) return element("p", { class: full ? "words full" : "words", dir: "auto" }, text);
  const details = element("details", { class: "words" }, element("summary", { dir: "auto" }, text.slice(0, BRIEF) + "…"));
  details.append(element("p", { dir: "auto" }, text));
  return details;
}
// Tokens coloured by their share of the score, and the strongest of them in words.
function tokensOf(tokens, scores, rest) {
  const most = Math.max(...scores.map(Math.abs)) || 1;
  const text = element("p", { class: "words tokens" });
  tokens.slice(0, scores.length).forEach((token, t) => {
    const span = element("span", caution ? {} : { title: number(scores[t], true) }, token), part = Math.abs(scores[t]) / most;
    if (part > 0.04) span.style.backgroundColor = heat(scores[t], most, 0.75);
    text.append(span, " ");
  });
  const strongest = scores.map((score, t) => [score, t]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 3);
  const whole = Math.abs(rest) + scores.reduce((sum, score) => sum + Math.abs(score), 0);
  const remainder = caution ? `${whole ? Math.round(100 * Math.abs(rest) / whole) : 0} %` : number(rest, true);
  return [text, element("p", { class: "hint" }, "most through ", ...strongest.flatMap(([score, t], k) =>
    [k ? ", “" : "“", own(tokens[t]), `”${caution ? "" : ` ${number(score, true)}`}`]),
    `; ${remainder} of the score not through any one token`)];
}
const heat = (value, most, strength = 1) =>
  `color-mix(in srgb, var(${value >= 0 ? "--raised" : "--lowered"}) ${(100 * strength * Math.min(1, Math.abs(value) / (most || 1))).toFixed(1)}%, transparent)`;

// One example: its picture or contents, its label, some numbers, and the tick that drops it.
function card(example, { rows, meter, side, differs, tokens, rest, tickable = true, notes = [] }) {
  const node = element("li", { class: "card" });
  const picture = tile("train", example.tile, 180, example.words);
  const label = element("div", { class: "head" }, element("b", {}, example.label || example.name), example.label ? element("span", {}, example.name) : "");
  node.append(picture, label);
  if (meter !== undefined) {
    const bar = element("div", { class: `meter ${side}`, "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${100 * meter}%`;
    node.append(bar);
  }
  if (tokens?.length && example.tokens) node.append(...tokensOf(example.tokens, tokens, rest));
  else node.append(...contentsOf(example.contents));
  if (rows.length) {
    const list = pairs(element("dl"), rows);
    list.querySelectorAll("dt").forEach(term => { if (MEANING[term.textContent]) term.title = MEANING[term.textContent]; });
    node.append(list);
  }
  node.append(...notes);
  if (differs?.length) node.append(differences(differs));
  if (caution) node.append(element("p", { class: "hint caution" }, caution));
  if (data.predicts) node.append(tickOf(example, tickable));
  return node;
}

function differences(rows) {
  const head = element("tr", {}, ...["differs most in", "query", "this"].map(t => element("th", { scope: "col" }, t)));
  const body = rows.map(([column, theirs, mine]) => element("tr", {}, element("th", { scope: "row" }, data.features[column]),
    element("td", {}, number(theirs)), element("td", {}, number(mine))));
  return element("table", { class: "differs" }, element("thead", {}, head), element("tbody", {}, ...body));
}
