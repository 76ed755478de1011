// -- an example -----------------------------------------------------------------------------------

// Without anything that supports sizes the page shows order: ranks and bars, and no predicted change.
const caution = data.caution;
const MEANING = {
  rank: `place among those that raised, or lowered, its ${noun}, strongest first; ${caution}`,
  score: `positive raised the ${noun}, negative lowered it`,
  "standard error": `how far the score may be off by chance, from what was drawn at random: within two of them on either side 19 times in 20`,
  removed: `predicted change of the ${noun} if this alone is removed${data.newton ? ", corrected for its leverage" : ""}`,
  retrained: `change of the ${noun} after really removing it and retraining`,
};
const TERMS = {
  "sum |score|": `the size of its scores, added over ${several(data.queries.length, "query")}`,
  sum: `its scores with their signs, added over ${several(data.queries.length, "query")}: above 0 it raised the ${noun} on the whole`,
  loss: "its own loss, as trained",
  "self-influence": "how much its own loss is predicted to rise without it",
};
Object.assign(MEANING, TERMS);
const explained = terms => terms.map(term => `${term}: ${MEANING[term]}`).join(" · ");
const SHOWN = { rank: caution, score: !caution, "standard error": data.errs, removed: !caution && data.predicts, retrained: checks.length > 0 };

// What is shown of an example besides its picture.
function contentsOf(contents, full, against) {
  const nodes = [];
  if (contents.text !== undefined) nodes.push(longText(contents.text, full, against));
  for (const part of contents.custom ?? []) {
    if (part.text !== undefined) nodes.push(longText(part.text, full));
    if (part.pairs) nodes.push(pairs(element("dl", { class: "facts small" }), part.pairs));
    if (part.picture) nodes.push(element("img", { src: part.picture, alt: "", class: "picture", loading: "lazy" }));
  }
  return nodes;
}
const BRIEF = 220;
function longText(text, full, against) {
  if (full || text.length <= BRIEF) return element("p", full ? { class: "words full", dir: "auto", tabindex: "0", role: "group", "aria-label": "text" } : { class: "words", dir: "auto" }, ...sharedText(text, against));
  const details = element("details", { class: "words" }, element("summary", { dir: "auto" }, ...sharedText(text.slice(0, BRIEF) + "…", against)));
  details.append(element("p", { dir: "auto" }, ...sharedText(text, against)));
  return details;
}
// Which words of `mine` stand in a run of at least three that `theirs` has too: longest runs first.
const RUN = 3, COMPARED = 400;
function shared(mine, theirs) {
  const a = mine.slice(0, COMPARED).map(word => word.trim().toLowerCase()), b = theirs.slice(0, COMPARED).map(word => word.trim().toLowerCase());
  const taken = new Array(a.length).fill(false), gone = new Array(b.length).fill(false);
  for (let round = 0; round < 20; round++) {
    let best = 0, end = 0, stop = 0, before = new Array(b.length + 1).fill(0);
    for (let i = 0; i < a.length; i++) {
      const now = new Array(b.length + 1).fill(0);
      for (let j = 0; j < b.length; j++) if (a[i] && a[i] === b[j] && !taken[i] && !gone[j]) {
        now[j + 1] = before[j] + 1;
        if (now[j + 1] > best) { best = now[j + 1]; end = i; stop = j; }
      }
      before = now;
    }
    if (best < RUN) break;
    for (let k = 0; k < best; k++) { taken[end - k] = true; gone[stop - k] = true; }
  }
  return taken;
}
function sharedText(text, against) {
  if (!against) return [text];
  const words = text.split(/(?<=\s)/u), taken = shared(words, against.split(/(?<=\s)/u)), nodes = [];
  for (let i = 0; i < words.length;) {
    let j = i;
    while (j < words.length && Boolean(taken[j]) === Boolean(taken[i])) j++;
    const part = words.slice(i, j).join("");
    nodes.push(taken[i] ? element("mark", { class: "same" }, part) : part);
    i = j;
  }
  return nodes;
}
// Tokens coloured by their share of the score, and the strongest of them in words. Special tokens are
// not shown; what goes through them is told.
function tokensOf({ tokens, special }, scores, rest, against) {
  const hidden = new Set(special ?? []), shown = scores.map((_, t) => t).filter(t => !hidden.has(t));
  const most = Math.max(0, ...shown.map(t => Math.abs(scores[t]))) || 1, gap = special ? "" : " ";
  const taken = against ? shared(shown.map(t => tokens[t]), against) : [];
  const text = element("p", { class: "words tokens", dir: "auto" });
  shown.forEach((t, place) => {
    const token = tokens[t], start = token.trimStart(), before = place ? token.slice(0, token.length - start.length) : "";
    const span = element("span", caution ? {} : { title: number(scores[t], true) }, start), part = Math.abs(scores[t]) / most;
    if (part > 0.04) span.style.backgroundColor = heat(scores[t], most);
    if (taken[place]) span.className = "same";
    text.append(before, span, gap);
  });
  const strongest = [...shown].sort((a, b) => Math.abs(scores[b]) - Math.abs(scores[a])).slice(0, 3);
  const whole = Math.abs(rest) + scores.reduce((sum, score) => sum + Math.abs(score), 0);
  const share = value => `${whole ? Math.round(100 * Math.abs(value) / whole) : 0} %`;
  const remainder = caution ? share(rest) : `${number(rest, true)} (${share(rest)})`;
  const specially = [...hidden].filter(t => t < scores.length).reduce((sum, t) => sum + Math.abs(scores[t]), 0);
  return [text, element("p", { class: "hint" }, "most through ", ...strongest.flatMap((t, k) =>
    [k ? ", “" : "“", own(tokens[t].trim()), `”${caution ? "" : ` ${number(scores[t], true)}`}`]),
    hidden.size ? `; ${share(specially)} through special tokens` : "",
    `; ${remainder} of the score not through any one token`)];
}
// The strongest is as strong as text on it stays readable.
const heat = (value, most) =>
  `color-mix(in srgb, var(${value >= 0 ? "--raised-heat" : "--lowered-heat"}) ${(100 * Math.min(1, Math.abs(value) / (most || 1))).toFixed(1)}%, transparent)`;

// One example: its picture or contents, its label, some numbers, and the tick that drops it.
function card(example, { rows, meter, side, differs, alike, tokens, rest, theirs, theirsRest, asked, first, labels, tickable = true, notes = [] }) {
  const node = element("li", { class: "card" });
  node.dataset.example = example.id;
  const picture = tile("train", example.tile, 180, example.words);
  const label = element("div", { class: "head" }, element("b", {}, example.label || example.name), example.label ? element("span", {}, example.name) : "");
  node.append(picture, label);
  if (labels && example.predicted !== undefined) node.append(labelsOf(example));
  if (meter !== undefined) {
    const bar = element("div", { class: `meter ${side}`, "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${100 * meter}%`;
    node.append(bar);
  }
  if (tokens?.length && example.tokens) node.append(...tokensOf(example, tokens, rest, asked?.tokens ?? undefined));
  else node.append(...contentsOf(example.contents, false, asked?.text));
  if (theirs?.length && asked?.tokens) {
    const other = folded("The query, by the same score", ...tokensOf(asked, theirs, theirsRest));
    other.open = Boolean(first);
    node.append(other);
  }
  const texts = asked ? [textOfExample(example), textOf(asked)] : [];
  if (texts.length && texts.every(Boolean)) node.append(differenceOf(texts, [example.name, "the query"], "What differs from the query"));
  if (rows.length) {
    const list = pairs(element("dl"), rows);
    list.querySelectorAll("dt").forEach(term => { if (MEANING[term.textContent]) term.title = MEANING[term.textContent]; });
    node.append(list);
  }
  node.append(...notes);
  if (alike?.length) node.append(compared("alike in", alike));
  if (differs?.length) node.append(compared("differs most in", differs));
  node.append(element("p", { class: caution ? `pill ${data.verdict.level} caution` : `pill ${data.verdict.level}` }, caution || (data.verdict.level === "unchecked" ? "not checked" : data.verdict.title)));
  if (data.predicts) node.append(tickOf(example, tickable));
  return node;
}
// The label that was given beside what the model predicts. No proposal: the model was trained on the label.
function labelsOf({ label, predicted }) {
  if (predicted === label) return element("p", { class: "labels" }, "given ", element("b", {}, label), " · the model predicts it too");
  return element("p", { class: "labels" }, "given ", element("b", {}, label), " · the model predicts ", element("b", { class: "no" }, predicted));
}

function compared(what, rows) {
  const head = element("tr", {}, ...[what, "query", "this"].map(t => element("th", { scope: "col" }, t)));
  const body = rows.map(([column, theirs, mine]) => element("tr", {}, element("th", { scope: "row" }, data.features[column]),
    element("td", {}, number(theirs)), element("td", {}, number(mine))));
  return element("table", { class: "differs" }, element("thead", {}, head), element("tbody", {}, ...body));
}
