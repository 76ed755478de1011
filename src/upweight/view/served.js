// -- where the data come from: the process that served this page ----------------------------------
const source = (() => {
  const token = new URLSearchParams(location.search).get("token");
  const address = (path, parameters) => `${path}?${new URLSearchParams({ ...parameters, token })}`;
  async function ask(path, parameters = {}) {
    let answer;
    try { answer = await fetch(address(path, parameters)); } catch { answer = { ok: false, status: 0 }; }
    document.querySelector(".lost")?.remove();
    if (answer.ok) return answer.json();
    byId("main").prepend(element("p", { class: "notice lost", role: "alert" },
      answer.status === 0 ? "The view no longer answers: start it again where it ran." : await answer.text()));
    return new Promise(() => {}); // what asked stays as it is
  }
  return {
    n: data.n,
    queries: data.queries.map((query, q) => ({ ...query, tile: data.sprites.query ? q : undefined,
      contents: query, text: query.text ?? "" })),
    query: q => ask(`query/${q}`),
    ranking: (q, side, start) => ask(`ranking/${q}/${side}`, { start }),
    examples: ids => ids.length ? ask("examples", { ids: ids.join(",") }) : Promise.resolve([]),
    hasAll: id => id >= 0 && id < data.n,
    drop: ids => ask("drop", { ids: ids.join(",") }),
    training: () => ask("training"),
    browse: (order, start) => ask(`browse/${order}`, { start }),
    sheet: (role, s) => address(`picture/${role}/${s}`, {}),
  };
})();
