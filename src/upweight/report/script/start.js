// -- pages and their addresses: #trust, #queries/17, #training, #outcomes --------------------------

const PAGES = ["queries", "trust", "training", "outcomes"].filter(name => byId(`page-${name}`));
let page = null;
function goTo(address, replace) {
  if (location.hash === address) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  route();
}
function route(event) {
  const [, asked, query] = /^#(trust|queries|training|outcomes)(?:\/(\d+))?$/.exec(location.hash) ?? [];
  const name = PAGES.includes(asked) ? asked : undefined;
  if (!name && page && location.hash) return; // an anchor within the page
  const before = page;
  page = name ?? "queries";
  for (const each of PAGES) byId(`page-${each}`).hidden = each !== page;
  for (const link of byId("pages").querySelectorAll("a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (before !== page) {
    drawPage();
    if (before) scrollTo(0, 0);
  }
  if (page === "queries") {
    const asked = query !== undefined && source.queries[Number(query)] ? Number(query) : current >= 0 ? current : data.start;
    if (query === undefined && location.hash) history.replaceState(null, "", `#queries/${asked}`); // for the way back
    if (asked !== current || before !== page) showQuery(asked);
  }
  if (page === "training") showTraining();
  if (dropped.size && page !== "queries" && before !== page) tellDropped();
  // Readers of a screen go on at the new page's heading.
  if (before && before !== page && event) byId(page === "queries" ? "query-title" : `${page}-title`).focus({ preventScroll: true });
}
function drawPage() {
  if (page === "trust") { drawSubsets(); drawScatter(); }
  if (page === "training" && trainingDrawn) redrawTraining();
}

byId("pages").hidden = false;
prepareFilters();
prepareDrop();
if (checkedQueries.includes(data.start)) checkedQuery = data.start;
if (checks.length) focused = checks[0].query === checkedQuery ? checks[0].keys[0] : null;
if (together && byId("scatter-table")) byId("scatter-table").open = true; // few and each of them named: worth reading at once
filter();
route();
addEventListener("hashchange", route);
addEventListener("popstate", route);
document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); byId("main").focus(); });
let drawnAt = innerWidth;
addEventListener("resize", () => { // figures are drawn to the width there is, so that text keeps its size
  if (innerWidth === drawnAt) return;
  drawnAt = innerWidth;
  drawPage();
  if (page === "queries") source.query(current).then(answer => { drawHistogram(answer); drawSpots(source.queries[current], answer); });
});
root.dataset.ready = "yes";
