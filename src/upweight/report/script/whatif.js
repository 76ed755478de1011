// -- what if I drop these -------------------------------------------------------------------------

// Why not to read the size of a prediction of what is dropped; empty: it is supported.
const doubtOf = () => caution || (data.together !== null && dropped.size > data.together ? "size of so many together not supported" : "");
const dropped = new Map(); // id → example, in the order of ticking
let changesNow = null, panelRows = 40;

function tickOf(example, tickable) {
  const allowed = tickable === true || source.hasAll(example.id); // else what it does to this query is not known
  const box = element("input", { type: "checkbox" }), words = element("label", { class: "tick drop-tick" }, box, " drop");
  box.dataset.id = example.id;
  box.setAttribute("aria-label", `drop ${example.words}`);
  box.checked = dropped.has(example.id);
  if (!allowed) {
    box.disabled = true;
    words.title = "Its scores are not in this file.";
    box.setAttribute("aria-label", `drop ${example.words}: its scores are not in this file`);
  }
  box.addEventListener("change", () => toggleDrop(example, box.checked));
  return words;
}
async function toggleDrop(example, on) {
  if (on) dropped.set(example.id, example); else dropped.delete(example.id);
  markTicks();
  await tellDropped();
}
function markTicks() {
  document.querySelectorAll(".drop-tick input").forEach(box => { box.checked = dropped.has(Number(box.dataset.id)); });
}
let adding = 0;
async function tellDropped() {
  const host = byId("whatif"), ticket = ++adding;
  host.hidden = !dropped.size;
  root.classList.toggle("dropping", dropped.size > 0);
  if (!dropped.size) {
    changesNow = null;
    byId("drop-words").textContent = "";
    byId("drop-panel").hidden = true;
    byId("drop-all").setAttribute("aria-expanded", "false");
    return;
  }
  const changes = await source.drop([...dropped.keys()]);
  if (ticket !== adding) return;
  changesNow = changes;
  const doubt = doubtOf(), what = dropped.size === 1 ? `this ${thing}` : `these ${several(dropped.size, thing)}`;
  const words = [element("span", {}, `Without ${what}: `)];
  if (page === "queries" && current >= 0) {
    const change = changes[current], value = source.queries[current].value;
    if (Number.isNaN(change)) words.push(`the change of query ${current} is not known. `);
    else if (doubt) words.push(element("span", {}, `the ${noun} of query ${current} is predicted to `,
      element("b", { id: "drop-change" }, directionOf(change)), ` (${doubt}). `));
    else words.push(element("span", {}, `the ${noun} of query ${current} changes by about `,
      element("b", { id: "drop-change" }, number(change, true)), value === undefined ? ". " : `, from ${number(value)} to ${number(value + change)}${noun === "loss" && value >= 0 && value + change < 0 ? " (no loss is below 0: past where the prediction holds)" : ""}. `));
  }
  const order = sorted();
  if (source.queries.length > 1 && order.length) words.push(element("span", { class: "hint" }, `Largest of all queries: ${doubt ? "" : `${number(changes[order[0]], true)}, `}query ${order[0]}.`));
  byId("drop-words").replaceChildren(...words);
  byId("drop-all").hidden = source.queries.length < 2;
  byId("drop-python").textContent = `scores.predict(drop=torch.tensor([${[...dropped.keys()].join(", ")}]))`;
  byId("drop-done").textContent = "";
  if (!byId("drop-panel").hidden) drawDropped();
}
const directionOf = change => change > 0 ? "rise" : change < 0 ? "fall" : "stay";
const sorted = () => source.queries.map((_, q) => q).filter(q => !Number.isNaN(changesNow[q]))
  .sort((a, b) => Math.abs(changesNow[b]) - Math.abs(changesNow[a]) || a - b);

function drawDropped() {
  const host = byId("drop-panel"), doubt = doubtOf(), order = sorted(), unknown = source.queries.length - order.length;
  const most = order.length ? Math.abs(changesNow[order[0]]) : 0, valued = source.queries[0].value !== undefined;
  const gone = element("div", { class: "gone" }, ...[...dropped.values()].map(example => {
    const button = element("button", { type: "button", class: "chip", "aria-label": `keep ${example.words}` }, tile("train", example.tile, 24), own(example.label), " ", own(example.name), " ×");
    button.addEventListener("click", () => { toggleDrop(example, false); byId("drop-all").focus(); });
    return button;
  }));
  const rows = order.slice(0, panelRows).map(q => {
    const query = source.queries[q], change = changesNow[q];
    const link = element("a", { href: `#queries/${q}` }, tile("query", query.tile, 26), `Query ${q}`);
    const bar = element("span", { class: "bar-cell", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${most ? 50 * Math.abs(change) / most : 0}%`;
    bar.firstChild.className = change >= 0 ? "up" : "down";
    if (doubt) return [link, query.label, bar, directionOf(change), ...(valued ? [number(query.value)] : [])];
    return [link, query.label, bar, number(change, true), ...(valued ? [number(query.value), number(query.value + change)] : [])];
  });
  const up = order.filter(q => changesNow[q] > 0).length, total = order.reduce((sum, q) => sum + changesNow[q], 0);
  const parts = [gone, element("p", { class: "hint" },
    `First-order prediction: effects of removals add up${data.newton ? "; the corrected predictions on the cards do not" : ""}. `
    + `Of ${several(order.length, "query")} ${whole(up)} ${up === 1 ? "gains" : "gain"} and ${whole(order.length - up)} ${order.length - up === 1 ? "does" : "do"} not; ${doubt || `the mean change is ${number(total / (order.length || 1), true)}`}.`
    + (unknown ? ` Of ${several(unknown, "query")} the change is not known: this file does not hold all scores of what is ticked.` : ""))];
  parts.push(scrolling("Predicted change of every query", table(`Predicted change of the ${noun}, largest first`,
    ["query", "label", "", "change", ...(valued ? ["now", ...(doubt ? [] : ["then"])] : [])], rows, { class: "changes" })));
  if (order.length > panelRows) {
    const button = element("button", { type: "button", class: "plain" }, `Show ${whole(Math.min(200, order.length - panelRows))} more`);
    button.addEventListener("click", () => { panelRows += 200; drawDropped(); });
    parts.push(button);
  }
  if (source.hasAll(0) && source.hasAll(source.n - 1) && !data.groups) parts.push(addByNumber());
  host.replaceChildren(...parts);
}
function addByNumber() {
  const input = element("input", { type: "number", min: 0, max: source.n - 1, step: 1, "aria-label": `number of a ${thing}` });
  const form = element("form", { class: "add" }, element("label", {}, `Drop ${thing} number `, input), element("button", { type: "submit", class: "plain" }, "Add"));
  form.addEventListener("submit", async event => {
    event.preventDefault();
    const id = Number(input.value);
    if (input.value === "" || !Number.isInteger(id) || !source.hasAll(id)) return;
    const [example] = await source.examples([id]);
    await toggleDrop(example, true);
    byId("drop-panel").querySelector(".add input")?.focus();
  });
  return form;
}
// -- taking them along ----------------------------------------------------------------------------

async function copy(text, what, done = "drop-done") {
  try { await navigator.clipboard.writeText(text); } catch { // not allowed here: the older way
    const area = element("textarea", { "aria-label": what });
    area.value = text;
    byId(done).parentElement.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  byId(done).textContent = `${what} copied.`;
}
// A spreadsheet takes a text that starts so for a formula; the apostrophe makes it a text.
const cell = value => {
  const text = String(value ?? ""), safe = typeof value !== "number" && /^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};
function asCsv() {
  const rows = [...dropped.values()], columns = rows.find(one => one.contents.row)?.contents.row.map((_, c) => data.features[c]) ?? [];
  const has = name => rows.some(one => one[name] !== undefined && one[name] !== ""), texts = rows.some(one => one.contents.text !== undefined);
  const head = ["row", ...(has("given") ? ["id"] : []), ...(has("label") ? ["label"] : []), ...(has("predicted") ? ["predicted"] : []), ...(texts ? ["text"] : []), ...columns];
  const lines = rows.map(one => [one.id, ...(has("given") ? [one.given] : []), ...(has("label") ? [one.label] : []), ...(has("predicted") ? [one.predicted] : []),
    ...(texts ? [one.contents.text] : []), ...columns.map((_, c) => one.contents.row?.[c])]);
  return [head, ...lines].map(line => line.map(cell).join(",")).join("\r\n") + "\r\n";
}
function download(text, name) {
  const link = element("a", { download: name });
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function prepareDrop() {
  byId("command-copy")?.addEventListener("click", () => copy(byId("command-text").textContent, "Command", "command-done"));
  byId("drop-copy").addEventListener("click", () => copy([...dropped.values()].map(one => one.given ?? one.id).join("\n"), "Ids"));
  byId("drop-save").addEventListener("click", () => { download(asCsv(), "rows.csv"); byId("drop-done").textContent = "rows.csv downloaded."; });
  byId("drop-code").addEventListener("click", () => copy(byId("drop-python").textContent, "Python"));
  byId("drop-none").addEventListener("click", async () => { dropped.clear(); markTicks(); await tellDropped(); byId("main").focus({ preventScroll: true }); });
  byId("drop-all").addEventListener("click", () => {
    const shown = byId("drop-panel").hidden;
    byId("drop-panel").hidden = !shown;
    byId("drop-all").setAttribute("aria-expanded", shown);
    panelRows = 40;
    if (shown) drawDropped();
  });
}
