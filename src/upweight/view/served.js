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
  const seen = new Map();
  const see = examples => examples.forEach(one => seen.set(one.id, exampleOf(one)));
  const sideSeen = side => sideOf(side, id => seen.get(id));
  see(data.removed);
  return {
    n: data.n,
    queries: askedQueries,
    shown: id => seen.get(id),
    async query(q) {
      const { raised, lowered, histogram, query, examples } = await ask(`query/${q}`);
      see(examples);
      return { raised: sideSeen(raised), lowered: sideSeen(lowered), histogram, query };
    },
    async ranking(q, side, start) {
      const { examples, ...found } = await ask(`ranking/${q}/${side}`, { start });
      see(examples);
      return sideSeen(found);
    },
    examples: async ids => ids.length ? (await ask("examples", { ids: ids.join(",") })).map(one => exampleOf(one)) : [],
    hasAll: id => id >= 0 && id < data.n,
    drop: ids => ask("drop", { ids: ids.join(",") }),
    training: () => ask("training"),
    browse: (order, start) => ask(`browse/${order}`, { start }),
    sheet: (role, s) => address(`picture/${role}/${s}`, {}),
  };
})();
