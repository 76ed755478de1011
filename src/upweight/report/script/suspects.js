// Decisions on suspect rows, kept in the page until they are downloaded.
const data = JSON.parse(document.getElementById("data").textContent);
const decided = new Map(); // place -> {action, to}
const nodes = [...document.querySelectorAll(".suspect")];
const tally = document.getElementById("tally"), download = document.getElementById("download");
const number = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(3);

function show(place) {
  const node = nodes[place], made = decided.get(place), proposed = data.cards[place].proposed;
  if (made) node.dataset.decided = made.action; else delete node.dataset.decided;
  const byButton = made && !(made.action === "relabel" && made.to !== proposed);
  for (const button of node.querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(Boolean(byButton) && made.action === button.dataset.action));
  const other = node.querySelector("select"), isOther = Boolean(made) && !byButton;
  other.value = isOther ? String(made.to) : "";
  other.classList.toggle("on", isOther);
}
function count() {
  const all = [...decided.entries()], of = (action) => all.filter(([, made]) => made.action === action).length;
  let text = all.length ? `${all.length} of ${nodes.length} decided: ${of("relabel")} relabelled, ${of("drop")} dropped, ${of("keep")} kept.` : "Nothing decided yet.";
  // The first-order change is known of proposals and drops, not of other labels.
  const known = all.filter(([place, made]) => made.action === "drop" || (made.action === "relabel" && made.to === data.cards[place].proposed));
  if (known.length && data.cards[0].removing !== null) {
    const sum = known.reduce((total, [place, made]) => total + data.cards[place][made.action === "drop" ? "removing" : "relabelling"], 0);
    text += ` Predicted change of the validation measure ${number(sum)}, to first order.`;
  }
  tally.textContent = text;
  download.setAttribute("aria-disabled", String(!all.length));
}
function decide(place, action, to) {
  const made = decided.get(place);
  if (made && made.action === action && made.to === to) decided.delete(place);
  else decided.set(place, { action, to });
  show(place);
  count();
}
nodes.forEach((node, place) => {
  const proposed = data.cards[place].proposed, proposes = proposed !== data.cards[place].label;
  const by = (action) => decide(place, action, action === "relabel" ? proposed : null);
  for (const button of node.querySelectorAll("button"))
    button.addEventListener("click", () => by(button.dataset.action));
  node.querySelector("select").addEventListener("change", (event) => {
    if (event.target.value === "") { decided.delete(place); show(place); count(); }
    else decide(place, "relabel", Number(event.target.value));
  });
  node.addEventListener("keydown", (event) => {
    if (event.target !== node || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = { k: "keep", r: "relabel", d: "drop" }[event.key];
    if (!action || (action === "relabel" && !proposes)) return;
    by(action);
    if (place + 1 < nodes.length) nodes[place + 1].focus();
  });
});
function asText() {
  const rows = [...decided.entries()].sort((a, b) => a[0] - b[0]).map(([place, made]) => {
    const card = data.cards[place], row = { row: card.row, label: data.names[card.label], action: made.action };
    if (made.action === "relabel") row.new = data.names[made.to];
    return row;
  });
  return JSON.stringify({ format: data.format, rows: data.rows, decisions: rows }, null, 1) + "\n";
}
download.addEventListener("click", () => {
  if (!decided.size) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asText()], { type: "application/json" }));
  link.download = "decisions.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
count();
