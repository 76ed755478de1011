// -- the training set -----------------------------------------------------------------------------

let trainingDrawn = false;
async function showTraining() {
  if (trainingDrawn) return;
  trainingDrawn = true;
  const host = byId("training");
  host.replaceChildren(element("p", { class: "hint", role: "status" }, "Loading …"));
  const found = await source.training();
  host.replaceChildren(await drawValue(found.value));
  if (found.suspicious) host.append(await drawSuspicious(found));
  if (found.classes) host.append(drawClasses(found.classes));
  if (found.groups.length) host.append(drawGroups(found.groups));
  if (found.twins) host.append(await drawTwins(found.twins));
  if (source.browse) host.append(await drawAll());
  redrawTraining();
}
const redraws = [];
const redrawTraining = () => redraws.forEach(draw => draw());
function figure(draw) { // drawn when it has its place and width, and again when the width changes
  const host = element("div", { class: "plot" });
  redraws.push(() => { if (host.isConnected) host.replaceChildren(draw(host)); });
  return host;
}
async function cards(rows, numbers, first = 0, { labels = false, open = 0 } = {}) {
  const examples = await source.examples(rows.map(row => row.id));
  const list = element("ol", { class: "cards" });
  list.classList.toggle("half", !data.sprites.train && examples.some(e => Object.keys(e.contents).length));
  list.append(...examples.map((example, k) => card(example, { rows: numbers(rows[k], first + k + 1), tickable: "whole", labels,
    notes: example.contents.row ? [wholeRow(example.contents.row, "Its row", k < open, true)] : [] })));
  return list;
}
const numbersOf = (row, rank) => [
  ...(caution ? [["rank", whole(rank)]] : [["sum |score|", number(row.absolute)], ["sum", number(row.signed, true)]]),
  ...(row.loss === undefined ? [] : [["loss", number(row.loss)]]),
  ...(row.self === undefined || caution ? [] : [["self-influence", number(row.self)]])];

// A sentence for each number of the cards below it.
const terms = rows => element("p", { class: "hint" }, explained(rows.length ? numbersOf(rows[0], 1).map(([term]) => term).filter(term => TERMS[term]) : []));

// The first rows are shown; a click shows the others.
function capped(list, most) {
  if (onPhone()) most = Math.min(most, 4);
  const rest = [...list.children].slice(most);
  if (!rest.length) return [list];
  rest.forEach(node => { node.hidden = true; });
  const button = element("button", { type: "button", class: "plain" }, `Show ${rest.length} more`);
  button.addEventListener("click", () => {
    rest.forEach(node => { node.hidden = false; });
    rest[0].querySelector("input, button, summary")?.focus();
    button.remove();
  });
  return [list, button];
}

async function drawValue(value) {
  const words = `${several(value.tenth, thing)} of ${whole(source.n)} ${value.tenth === 1 ? "holds" : "hold"} a tenth of all influence on these queries, and ${whole(value.half)} ${value.half === 1 ? "holds" : "hold"} half of it.`;
  const draw = name => host => {
    const values = value[name], n = source.n, low = Math.min(0, ...values), high = Math.max(0, ...values) || 1;
    const log = name === "absolute" && n > 20;
    const { svg, x, y } = axes(host, { x: log ? [1, n] : [0, Math.max(1, n - 1)], y: [low, high], height: caution ? 290 : 260, logX: log, bare: caution,
      xName: `${thing}s, sorted${log ? " (logarithmic)" : ""}`, yName: name === "signed" ? "sum of scores" : "sum of |score|",
      label: name === "signed" ? `Sorted sums of the scores: ${whole(value.positive)} of ${whole(n)} raised the ${noun} of all queries together.` : `Sorted sums of the absolute scores. ${words}` });
    svg.append(shape("path", { d: path(value.places.map((place, k) => [x(log ? place + 1 : place), y(values[k])])), class: "curve" }));
    return svg;
  };
  const rows = value.places.filter((_, k) => k % Math.ceil(value.places.length / 40) === 0);
  const at = place => value.places.indexOf(place);
  return panel("What the examples are worth", "value-title",
    element("p", { class: "lead" }, words),
    element("div", { class: "two" },
      element("div", {}, element("h3", {}, "Absolute scores, summed over queries"), figure(draw("absolute"))),
      element("div", {}, element("h3", {}, "Scores, summed over queries"), figure(draw("signed")))),
    caution ? "" : folded("The curves as a table", scrolling("The curves as a table", table("Sorted sums over all queries", ["rank", "sum of |score|", "sum of scores"],
      rows.map(place => [whole(place + 1), number(value.absolute[at(place)]), number(value.signed[at(place)], true)])))),
    element("h3", { class: "sub" }, "Largest absolute scores"), terms(value.top),
    ...capped(await cards(value.top, numbersOf), 8));
}

async function drawSuspicious({ suspicious, ranked_by: by, scatter }) {
  const meaning = by === "self-influence"
    ? `Ranked by self-influence: ${caution ? "which examples keep the loss on themselves down most" : "how much the loss on an example itself is predicted to rise when it alone is removed"}. Wrong labels are often memorized so; rare but right examples are too.`
    : "Ranked by loss. Wrong labels often have a large one; so have hard but right examples.";
  const parts = [element("p", { class: "lead" }, meaning)];
  if (scatter) parts.push(figure(host => {
    const positive = values => values.filter(v => v > 0), low = values => positive(values).reduce((a, b) => Math.min(a, b), Infinity);
    const high = values => values.reduce((a, b) => Math.max(a, b), -Infinity);
    // Losses and self-influences spread over decades; the smallest few are not what one looks for.
    const range = values => [Math.max(low(values), high(values) * 1e-6), high(values) * 1.3];
    if (!positive(scatter.loss).length || !positive(scatter.self).length) return element("p", { class: "none" }, "All are zero.");
    const rx = range(scatter.loss), ry = range(scatter.self), chosen = new Set(suspicious.map(row => row.id));
    const clip = (v, [a, b]) => Math.min(b, Math.max(a, v));
    const { svg, x, y } = axes(host, { x: rx, y: ry, height: 360, logX: true, logY: true, bare: caution, xName: "loss as trained", yName: "self-influence",
      label: `Self-influence over loss of ${several(scatter.id.length, thing)}. The ${suspicious.length} of largest self-influence are listed below.` });
    const dots = scatter.id.map((id, k) => [id, x(clip(scatter.loss[k], rx)), y(clip(scatter.self[k], ry))]);
    svg.append(cloud(dots.filter(([id]) => !chosen.has(id)).map(dot => dot.slice(1)), { class: "cloud s2", "stroke-width": 4 }),
      cloud(dots.filter(([id]) => chosen.has(id)).map(dot => dot.slice(1)), { class: "cloud s3 strong", "stroke-width": 7 }));
    return svg;
  }));
  if (scatter) parts.push(element("p", { class: "hint" }, "Both axes are logarithmic; what is more than a million times below the largest is drawn on the edge."));
  if (scatter && scatter.id.length < scatter.n) parts.push(element("p", { class: "hint" }, `${whole(scatter.id.length)} of ${whole(scatter.n)} are drawn: the 1,000 of largest self-influence, and the others evenly thinned.`));
  parts.push(element("h3", { class: "sub" }, `The ${suspicious.length} most suspicious`), terms(suspicious), ...capped(await cards(suspicious, numbersOf, 0, { labels: true, open: 4 }), 12));
  return panel("Suspicious labels", "suspicious-title", ...parts);
}

function drawClasses({ train, sizes, query, matrix }) {
  const most = Math.max(...matrix.flat().map(Math.abs)), power = caution || !most ? 0 : Math.floor(Math.log10(most));
  if (caution && most) matrix = matrix.map(row => row.map(value => value / most));
  const short = value => { // in one unit, so that cells compare at a glance
    const text = (value / 10 ** power).toFixed(1);
    return Number(text) === 0 ? "0" : text.replace("-", "−");
  };
  const head = element("tr", {}, element("th", { scope: "col" }, element("span", { class: "unseen" }, "trained on, asked")), ...query.map(name => element("th", { scope: "col" }, name)));
  const body = matrix.map((row, a) => element("tr", {}, element("th", { scope: "row" }, own(train[a]), element("small", {}, whole(sizes[a]))),
    ...row.map((value, b) => {
      const cell = element("td", { title: `trained on ${train[a]}, asked ${query[b]}: ${number(value, true)}` }, query.length <= 12 ? short(value) : element("span", { class: "unseen" }, number(value, true)));
      cell.style.backgroundColor = heat(value, caution ? 1 : most);
      return cell;
    })));
  return panel("Classes on classes", "classes-title",
    element("p", { class: "hint" }, `Mean score of one training example of a class (row) on a query of a class (column)${caution ? `, over the largest of them (${caution})` : query.length <= 12 && power !== 0 ? `, in units of ${powerOfTen(power)}` : ""}: `,
      element("span", { class: "swatch up" }), ` raised the ${noun}, `, element("span", { class: "swatch down" }), " lowered it."),
    scrolling("Mean score of training class on query class", element("table", { class: "matrix" }, element("caption", { class: "unseen" }, "Mean score of training class on query class"),
      element("thead", {}, head), element("tbody", {}, ...body))));
}

function drawGroups(groups) {
  const host = element("div"), choose = element("select", { id: "group-column" }, ...groups.map((group, g) => element("option", { value: g }, group.name)));
  const draw = all => {
    const { name, groups: names, sizes, totals, raised } = groups[Number(choose.value)];
    const most = Math.max(...totals.map(Math.abs)), count = all === true ? names.length : 15;
    const rows = names.slice(0, count).map((group, g) => {
      const bar = element("span", { class: "bar-cell", "aria-hidden": "true" }, element("span"));
      bar.firstChild.style.width = `${most ? 50 * Math.abs(totals[g]) / most : 0}%`;
      bar.firstChild.className = totals[g] >= 0 ? "up" : "down";
      if (caution) return [group, whole(sizes[g]), bar, percentOf(raised[g], source.queries.length)];
      return [group, whole(sizes[g]), bar, number(totals[g] / source.queries.length, true), number(sizes[g] ? totals[g] / sizes[g] / source.queries.length : 0, true), percentOf(raised[g], source.queries.length)];
    });
    const parts = [scrolling(`Groups by ${name}`, table(`Scores summed over the examples of a group, mean over queries; the largest first`,
      [name, "examples", "", ...(caution ? [] : ["sum", "per example"]), `queries whose ${noun} it raised`], rows, { class: "changes" }))];
    if (names.length > count) {
      const button = element("button", { type: "button", class: "plain" }, `Show ${names.length - count} more`);
      button.addEventListener("click", () => draw(true));
      parts.push(button);
    }
    host.replaceChildren(...parts);
  };
  choose.addEventListener("input", draw);
  draw();
  const label = groups.length > 1 ? element("label", { class: "filters" }, "Group by ", choose) : "";
  return panel("Groups", "groups-title", label, host);
}

async function drawTwins({ same, sizes, conflicts, sets, extra, near, candidates, among, read }) {
  const what = data.groups ? "groups" : `${kind}s`;
  const parts = [element("p", { class: "lead" }, sets
    ? `${several(sets, "set")} of training ${what} have the same input (${several(extra, "copy")} too many).`
      + (conflicts.some(Boolean) ? " Those whose copies carry different labels come first." : "")
    : `No two training ${what} have the same input.`)];
  const picture = async (ids, bare) => (await source.examples(ids)).map(example => {
    const box = element("div", { class: "twin" }, tile("train", example.tile, 72, example.words),
      element("span", {}, example.label ? element("b", {}, example.label) : "", " ", own(example.name)));
    if (!data.sprites.train && !bare) box.append(...contentsOf(example.contents));
    if (data.predicts) box.append(tickOf(example, "whole"));
    return box;
  });
  const pairOfTexts = (texts, names) => likeness(...texts) < LIKE
    ? element("div", { class: "two-texts" }, ...texts.map(text => longText(text)))
    : compareTexts(texts, names);
  if (same.length) {
    const list = element("ul", { class: "pairs" });
    for (const [g, ids] of same.entries()) list.append(element("li", {}, element("p", { class: "hint" },
      conflicts[g] ? element("span", { class: "mark" }, "labels differ") : "", ` ${sizes[g]} copies`), element("div", { class: "row-of" }, ...await picture(ids))));
    parts.push(element("h3", { class: "sub" }, "The same input"), ...capped(list, 6));
  }
  if (near.length) {
    const list = element("ul", { class: "pairs" });
    for (const [i, j, cosine] of near) {
      const [one, two] = await source.examples([i, j]), texts = [one, two].map(textOfExample);
      const hint = element("p", { class: "hint" }, `cosine ${cosine.toFixed(3)}`), both = texts.every(Boolean) && !data.sprites.train;
      list.append(element("li", both ? { class: "wide" } : {}, hint, element("div", { class: "row-of" }, ...await picture([i, j], both)), both ? pairOfTexts(texts, [one.name, two.name]) : ""));
    }
    parts.push(element("h3", { class: "sub" }, "Nearest pairs"),
      element("p", { class: "hint" }, `The largest cosines of normalized inputs between ${several(candidates, "candidate")} (the most suspicious and the most influential) and all ${whole(among)} examples. The model has no part in it; the nearest need not be near.${read ? ` Only the first ${whole(read)} characters of each text are compared.` : ""}`),
      ...capped(list, 8));
  }
  return panel("Near-duplicates", "twins-title", ...parts);
}

const ORDERS = { absolute: "sum of |score|", signed: "sum of scores", loss: "loss", self: "self-influence" };
// Every example, a page at a time, where the data are asked for and not held.
async function drawAll() {
  const host = element("div"), choose = element("select", { "aria-label": "order of the examples" }, ...data.orders.map(order => element("option", { value: order }, `largest ${ORDERS[order]} first`)));
  const told = element("p", { class: "hint", role: "status" }), before = element("button", { type: "button", class: "plain" }, "Previous"), after = element("button", { type: "button", class: "plain" }, "Next");
  const jump = element("input", { type: "number", min: 1, max: source.n, step: 1, "aria-label": "rank to go to" });
  let start = 0, size = 24;
  const show = async to => {
    start = Math.max(0, Math.min(source.n - 1, to));
    const { rows } = await source.browse(choose.value, start);
    size = Math.max(1, rows.length);
    host.replaceChildren(await cards(rows, numbersOf, start));
    told.textContent = `${whole(start + 1)} to ${whole(start + rows.length)} of ${whole(source.n)}`;
    before.setAttribute("aria-disabled", start === 0);
    after.setAttribute("aria-disabled", start + rows.length >= source.n);
  };
  choose.addEventListener("input", () => show(0));
  before.addEventListener("click", () => { if (start > 0) show(start - 24); });
  after.addEventListener("click", () => { if (start + size < source.n) show(start + 24); });
  const form = element("form", { class: "add" }, choose, element("label", {}, "from rank ", jump), element("button", { type: "submit", class: "plain" }, "Go"));
  form.addEventListener("submit", event => { event.preventDefault(); if (jump.value !== "") show(Math.trunc(Number(jump.value)) - 1); });
  await show(0);
  return panel(`All training ${data.groups ? "groups" : `${kind}s`}`, "all-title", form, told, host, element("div", { class: "drop-buttons" }, before, after));
}
