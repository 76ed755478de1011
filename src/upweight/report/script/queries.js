// -- one query ------------------------------------------------------------------------------------

let current = -1, asking = 0, found = source.queries.map((_, q) => q);

async function showQuery(q) {
  if (!source.queries[q]) return;
  const ticket = ++asking, query = source.queries[q];
  current = q;
  byId("query-title").replaceChildren(`Query ${q}`, query.name === undefined ? "" : element("small", {}, " ", own(query.name)));
  byId("query-image").replaceChildren(tile("query", query.tile, 148, `the ${kind} of query ${q}`));
  const facts = [];
  if (query.label) facts.push(["label", query.label]);
  if (query.prediction !== undefined) facts.push(["predicted", query.prediction]);
  if (query.value !== undefined) facts.push([noun, number(query.value)]);
  pairs(byId("query-facts"), facts);
  if (query.wrong) byId("query-facts").querySelectorAll("dd")[query.label ? 1 : 0].classList.add("no");
  const parts = contentsOf(query.contents, true);
  if (query.contents.row) parts.push(wholeRow(query.contents.row, "The row of this query", query.contents.row.length <= 16));
  byId("query-content").replaceChildren(...parts);
  mark(q);
  const answer = await source.query(q);
  if (ticket !== asking) return; // another was asked for meanwhile
  const largest = Math.max(0, ...answer.raised.entries.map(e => e.score), ...answer.lowered.entries.map(e => -e.score));
  const asked = { text: query.text || undefined, ...answer.query };
  for (const side of ["raised", "lowered"]) fillSide(q, side, answer[side], largest, asked);
  document.querySelector(".sides").classList.toggle("one", !answer.raised.entries.length || !answer.lowered.entries.length);
  drawHistogram(answer);
  drawSpots(query, answer);
  byId("terms").replaceChildren(...termsOf(answer));
  byId("told").textContent = queryWord(q);
  if (dropped.size) await tellDropped();
}

const FOLDED = 6; // cards of many lines that are shown before the reader asks for the others
function fillSide(q, side, { entries, more }, largest, asked) {
  const list = byId(side), rich = entries.some(e => e.differs || e.tokens || e.example.contents.text !== undefined || e.example.contents.custom);
  list.classList.toggle("wide", rich && !data.sprites.train);
  list.replaceChildren(...entries.map((entry, e) => scoredCard(entry, q, side, largest, e + 1, asked)));
  byId(`${side}-hint`).textContent = entries.length
    ? `${several(entries.length, thing)}, strongest first` : `No ${thing} ${side} it.`;
  const first = onPhone() ? 4 : data.sprites.train ? entries.length : FOLDED, rest = [...list.children].slice(first);
  if (rest.length > 1) {
    rest.forEach(node => { node.hidden = true; });
    const unfold = element("button", { type: "button", class: "plain unfold" }, `Show ${rest.length} more`), last = element("li", { class: "fold" }, unfold);
    unfold.addEventListener("click", () => {
      rest.forEach(node => { node.hidden = false; });
      rest[0].querySelector("input, button, summary")?.focus();
      list.querySelector(".further")?.removeAttribute("hidden");
      last.remove();
    });
    list.append(last);
  }
  if (!more) return;
  const button = element("button", { type: "button", class: "plain" }, "Show more");
  const item = element("li", { class: "card further" }, button);
  item.hidden = rest.length > 1;
  button.addEventListener("click", async () => {
    button.setAttribute("aria-disabled", "true");
    const before = list.children.length - 1, next = await source.ranking(q, side, before);
    if (current !== q) return;
    item.before(...next.entries.map((entry, e) => scoredCard(entry, q, side, largest, before + e + 1, asked)));
    byId(`${side}-hint`).textContent = `${several(list.children.length - 1, thing)}, strongest first`;
    button.removeAttribute("aria-disabled");
    if (!next.more) item.remove();
  });
  list.append(item);
}

function scoredCard(entry, q, side, largest, rank, asked) {
  const actual = measured.get(`${q}:${entry.example.id}`);
  const rows = [caution ? ["rank", whole(rank)] : ["score", number(entry.score, true)]];
  const notes = [];
  if (data.errs) {
    rows.push(["standard error", caution ? `${percentOf(entry.error, Math.abs(entry.score))} of it` : number(entry.error)]);
    if (Math.abs(entry.score) < 2 * entry.error) notes.push(element("p", { class: "hint" }, "May be chance: it is less than two standard errors from 0."));
  }
  if (!caution && entry.change !== undefined) rows.push(["removed", number(entry.change, true)]);
  if (actual !== undefined) rows.push(["retrained", number(actual, true)]);
  return card(entry.example, { rows, meter: largest ? Math.abs(entry.score) / largest : 0, side, ...entry, asked, first: rank === 1, notes });
}
function termsOf(answer) {
  const told = Object.entries(MEANING).filter(([term]) => SHOWN[term]).map(([term, meaning]) => `${term}: ${meaning}`);
  const entries = [...answer.raised.entries, ...answer.lowered.entries], uncoloured = answer.raised.uncoloured ?? answer.lowered.uncoloured;
  if (entries.some(e => e.alike?.length)) told.push("alike: both far from the mean on the same side, and near each other");
  if (entries.some(e => e.example.contents.text !== undefined)) told.push(`underlined: ${RUN} words or more in a row that the query has too`);
  if (entries.some(e => e.tokens)) told.push(`coloured: its share of the score, orange raised the ${noun}, blue lowered it`);
  if (uncoloured) told.push(uncoloured);
  return [told.join(" · ")];
}

// -- where the strongest lie ----------------------------------------------------------------------

let across = null, upward = null; // columns that the reader chose
function drawSpots(query, answer) {
  const host = byId("spots"), mine = query.contents.row;
  const dots = ["raised", "lowered"].flatMap(side => answer[side].entries.map(({ example, differs }) => ({ side, example, differs, row: example.contents.row })))
    .filter(dot => dot.row && dot.row.length === mine?.length);
  host.hidden = dots.length < 2 || mine.length < 2;
  if (host.hidden) { host.replaceChildren(); return; }
  const often = new Map();
  for (const { differs } of dots) differs?.forEach(([column], k) => { if (column < mine.length) often.set(column, (often.get(column) ?? 0) + 3 - k); });
  const [one, two] = [...often.entries()].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([column]) => column), far = [one ?? 0, two ?? (one === 1 ? 0 : 1)];
  const choose = (now, words, set) => {
    const select = element("select", { "aria-label": words }, ...mine.map((_, c) => element("option", { value: c }, data.features[c])));
    select.value = now;
    select.addEventListener("input", () => { set(Number(select.value)); draw(); });
    return element("label", {}, `${words} `, select);
  };
  const plot = element("div", { class: "plot" });
  function draw() {
    const cx = across ?? far[0], cy = upward ?? far[1], padded = values => {
      const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * 0.08;
      return [low - pad, high + pad];
    };
    const { svg, x, y } = axes(plot, { x: padded([mine[cx], ...dots.map(dot => dot.row[cx])]), y: padded([mine[cy], ...dots.map(dot => dot.row[cy])]),
      height: 300, xName: data.features[cx], yName: data.features[cy], label: `The ${several(dots.length, thing)} of the cards in ${data.features[cx]} and ${data.features[cy]}, with the query as a cross.` });
    for (const { side, example, row } of dots) {
      const [a, b, r] = [x(row[cx]), y(row[cy]), 5.5];
      const dot = side === "raised" ? shape("circle", { cx: a, cy: b, r, class: "raised spot" })
        : shape("path", { d: `M${a} ${b - r}L${a + r} ${b}L${a} ${b + r}L${a - r} ${b}Z`, class: "lowered spot" });
      dot.append(shape("title", {}, `${example.name}${example.label ? `, ${example.label}` : ""}`));
      dot.addEventListener("click", () => document.querySelector(`#${side} [data-example="${example.id}"]:not([hidden])`)?.scrollIntoView({ block: "center" }));
      svg.append(dot);
    }
    const [a, b, r] = [x(mine[cx]), y(mine[cy]), 8];
    svg.append(shape("path", { d: `M${a - r} ${b}H${a + r}M${a} ${b - r}V${b + r}`, class: "asked-spot" }));
    plot.replaceChildren(svg);
  }
  const details = folded("Where they lie", element("div", { class: "filters more" },
    choose(across ?? far[0], "across", c => { across = c; }), choose(upward ?? far[1], "upward", c => { upward = c; })),
    element("p", { class: "hint" }, element("span", { class: "swatch up" }), ` raised (circles), `, element("span", { class: "swatch down" }), " lowered (diamonds), + the query. At first the two columns in which they differ from it most."), plot);
  details.open = host.querySelector("details")?.open ?? false; // the cards come first
  details.addEventListener("toggle", () => { if (details.open) draw(); });
  host.replaceChildren(details);
  if (details.open) draw();
}

function wholeRow(row, words, open, small = false) {
  const rows = row.map((value, c) => [data.features[c], number(value)]);
  const more = data.features.length > row.length ? ` (the first ${row.length} of ${data.features.length} columns)` : "";
  const grid = pairs(element("dl", { class: "facts row" }), rows);
  const details = folded(`${words}${more}`, small ? scrolling(words, grid) : grid);
  details.open = open;
  return details;
}

// -- choosing -------------------------------------------------------------------------------------

const CHUNK = 120; // options made at a time: a thousand at once would delay the first picture
function grow(until) {
  const list = byId("list");
  for (let k = list.childElementCount; k < Math.min(until, found.length); k++) list.append(option(found[k]));
}
function option(q) {
  const query = source.queries[q];
  const wrong = query.prediction !== undefined && query.wrong, facts = wrong ? ["predicted ", own(query.prediction)] : [];
  if (query.value !== undefined) facts.push(`${wrong ? " · " : ""}${noun} ${number(query.value)}`);
  const node = element("div", { class: "option", role: "option", id: `query-${q}`, "aria-selected": String(q === current), "aria-label": queryWord(q) },
    tile("query", query.tile, 44),
    element("span", { class: "lines" },
      element("span", { class: "word" }, own(query.label || `Query ${q}`), query.label || query.name ? element("small", {}, " ", own(query.name ?? `#${q}`)) : ""),
      query.text ? element("span", { class: "snippet", dir: "auto" }, query.text.slice(0, 90)) : "",
      element("span", { class: query.wrong ? "under no" : "under" }, ...facts)));
  node.dataset.query = q;
  return node;
}
function mark(q) {
  const place = found.indexOf(q), list = byId("list");
  // Not `disabled`, which would take the focus from a reader who pressed the button to the end.
  byId("previous").setAttribute("aria-disabled", place <= 0);
  byId("next").setAttribute("aria-disabled", place === found.length - 1);
  list.querySelectorAll("[aria-selected=true]").forEach(node => node.setAttribute("aria-selected", "false"));
  list.removeAttribute("aria-activedescendant");
  if (place < 0) return;
  grow(place + CHUNK);
  const node = list.children[place];
  node.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", node.id);
  // Not scrollIntoView: it would scroll the whole page to the list as well.
  const { top, bottom, left, right } = node.getBoundingClientRect(), view = list.getBoundingClientRect();
  if (top < view.top || bottom > view.bottom) list.scrollTop += top - view.top - view.height / 2 + (bottom - top) / 2;
  if (left < view.left || right > view.right) list.scrollLeft += left - view.left - view.width / 2 + (right - left) / 2;
}
function filter() {
  const words = byId("search").value.trim().toLowerCase(), label = byId("label").value, order = byId("order").value;
  const bound = (id, none) => byId(id).value === "" ? none : Number(byId(id).value);
  const least = bound("least", -Infinity), most = bound("most", Infinity), bounded = least > -Infinity || most < Infinity;
  found = source.queries.map((_, q) => q).filter(q => {
    const query = source.queries[q];
    const matches = !words || `#${q}` === words || String(q) === words || (query.name ?? "").toLowerCase().includes(words) || query.label.toLowerCase().includes(words)
      || String(query.prediction ?? "").toLowerCase().includes(words) || query.text.toLowerCase().includes(words);
    return matches && (!label || query.label === label) && (!byId("wrong").checked || query.wrong)
      && (!bounded || (query.value >= least && query.value <= most));
  });
  if (order !== "given") {
    const sign = order === "high" ? -1 : 1;
    found.sort((a, b) => sign * (source.queries[a].value - source.queries[b].value) || a - b);
  }
  const all = source.queries.length;
  byId("found").textContent = found.length === all ? several(all, "query") : `${whole(found.length)} of ${several(all, "query")}`;
  byId("list").replaceChildren();
  grow(CHUNK);
  if (found.includes(current)) mark(current);
  else if (page === "queries" && found.length) goTo(`#queries/${found[0]}`, true);
}
function step(by, replace) {
  const place = found.indexOf(current);
  const next = found[Math.max(0, Math.min(found.length - 1, place + by))];
  if (next !== undefined && next !== current) goTo(`#queries/${next}`, replace);
}
function prepareFilters() {
  const labels = [...new Set(source.queries.map(query => query.label).filter(Boolean))];
  labels.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  byId("label").append(...labels.map(label => element("option", { value: label }, label)));
  // A control that can change nothing is only in the way.
  const valued = source.queries.every(query => query.value !== undefined), one = source.queries.length < 2;
  byId("label").parentElement.hidden = labels.length < 2 || labels.length > 200;
  byId("order").parentElement.hidden = byId("range").hidden = !valued;
  byId("wrong").parentElement.hidden = !source.queries.some(query => query.wrong);
  byId("more-filters").hidden = byId("label").parentElement.hidden && !valued && byId("wrong").parentElement.hidden;
  byId("more-filters").open = matchMedia("(min-width: 1000px)").matches;
  byId("previous").parentElement.hidden = byId("list").closest(".panel").hidden = one;
  byId("list").closest(".desk").classList.toggle("alone", one);
  byId("filters").addEventListener("submit", event => event.preventDefault());
  for (const id of ["search", "label", "order", "wrong", "least", "most"]) byId(id).addEventListener("input", filter);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  const list = byId("list");
  list.addEventListener("click", event => {
    const node = event.target.closest(".option");
    if (node) goTo(`#queries/${node.dataset.query}`);
  });
  list.addEventListener("scroll", () => {
    const near = list.scrollTop + 2 * list.clientHeight > list.scrollHeight && list.scrollLeft + 2 * list.clientWidth > list.scrollWidth;
    if (near) grow(list.childElementCount + CHUNK);
  }, { passive: true });
}
addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, dialog")) return;
  if (event.key === "?") { event.preventDefault(); byId("keys").showModal(); }
  if (event.key === "/" && source.queries.length > 1) {
    event.preventDefault();
    if (page !== "queries") goTo("#queries");
    byId("search").focus();
  }
});
byId("keys-open").addEventListener("click", () => byId("keys").showModal());
addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // the browser's own
  if (page !== "queries" || event.target.closest("input, select, textarea, dialog, .scroll")) return;
  const inList = event.target.id === "list" ? { ArrowDown: 1, ArrowUp: -1 } : {};
  const by = { ArrowRight: 1, ArrowLeft: -1, j: 1, k: -1, ...inList }[event.key];
  if (by) { event.preventDefault(); step(by, true); }
});
