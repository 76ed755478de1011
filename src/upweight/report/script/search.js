// Text from the data only ever becomes textContent or an attribute: nothing here parses markup.
const root = document.documentElement, byId = id => document.getElementById(id);
addEventListener("error", event => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", event => { root.dataset.error = String(event.reason); });
const token = new URLSearchParams(location.search).get("token");
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  node.append(...children);
  return node;
}
const number = value => value === 0 ? "0" : `${value < 0 ? "−" : "+"}${Math.abs(value).toLocaleString("en-US", { maximumSignificantDigits: 3 })}`;
const heat = (value, most) =>
  `color-mix(in srgb, var(${value >= 0 ? "--raised-heat" : "--lowered-heat"}) ${(100 * Math.min(1, Math.abs(value) / most)).toFixed(1)}%, transparent)`;

// Tokens, coloured by their share of the score and underlined where the other text has them too.
function words(tokens, copied, shares, most) {
  return tokens.map((word, t) => {
    const span = element("span", copied[t] ? { class: "copied" } : {}, word);
    if (shares) {
      span.title = number(shares[t]);
      if (Math.abs(shares[t]) > 0.04 * most) span.style.backgroundColor = heat(shares[t], most);
    }
    return span;
  });
}

function passage(found, most) {
  const facts = element("dl");
  const rows = [["score", number(found.score)], ["BM25", `${found.bm25.toFixed(1)}, place ${found.bm25_rank.toLocaleString("en-US")}`],
    ["in common", found.longest ? `${found.longest} tokens in a row` : "no run"], ["from", found.source]];
  rows.forEach(([name, value]) => facts.append(element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  const text = element("p", { class: "words tokens", dir: "auto" }, ...words(found.tokens, found.copied, found.shares, most));
  const notes = [`${number(found.rest)} of the score not through any one token`];
  if (found.span) notes.push(`longest run “${found.span}”`);
  if (found.cut) notes.push(`${found.cut} more tokens`);
  return element("li", { class: "passage", "data-id": found.id }, facts,
    element("div", {}, text, element("p", { class: "hint" }, notes.join("; "))));
}

let asking = 0;
async function ask() {
  const mine = ++asking, state = byId("state"), text = byId("text").value;
  state.textContent = "looking…";
  document.querySelector(".lost")?.remove();
  let answer;
  try {
    answer = await fetch(`top?${new URLSearchParams({ text, k: byId("k").value, order: byId("order").value, token })}`);
  } catch { answer = { ok: false, status: 0 }; }
  const found = answer.ok ? await answer.json() : answer.status ? await answer.text() : "The view no longer answers: start it again where it ran.";
  if (mine !== asking) return; // a later question is on its way
  state.textContent = "";
  if (!answer.ok) {
    byId("answer").hidden = true;
    byId("ask").after(element("p", { class: "notice lost", role: "alert" }, found));
    return;
  }
  const most = Math.max(...found.results.flatMap(one => one.shares.map(Math.abs))) || 1;
  byId("asked").replaceChildren(...words(found.tokens, found.copied));
  byId("results").replaceChildren(...found.results.map(one => passage(one, most)));
  byId("answer").hidden = false;
  state.textContent = [`${found.results.length} passages in ${found.seconds.toFixed(2)} s`, ...found.notes].join("; ");
}
byId("ask").addEventListener("submit", event => { event.preventDefault(); ask(); });
["order", "k"].forEach(id => byId(id).addEventListener("change", () => { if (byId("text").value.trim()) ask(); }));
byId("text").addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); } });
