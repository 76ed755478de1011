// -- where the data come from: this file ----------------------------------------------------------
// The page asks this one object, which promises; the same page served from a folder has another.
const source = (() => {
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const rowOf = new Map(data.whole.map((id, row) => [id, row]));
  const held = new Map(data.examples.map((one, place) => [one.id, exampleOf(one, place)]));
  const example = id => held.get(id) ?? exampleOf({ id, bare: true });
  let changes, listed;

  // Of an example without its column, the changes of the queries that show it are still known.
  function known(id) {
    if (!listed) {
      listed = new Map();
      data.answers.forEach((answer, q) => {
        for (const { ids, scores } of [answer.raised, answer.lowered]) ids.forEach((id, e) => {
          if (!listed.has(id)) listed.set(id, new Map());
          listed.get(id).set(q, -scores[e]);
        });
      });
    }
    return listed.get(id) ?? new Map();
  }
  return {
    n: data.n,
    queries: askedQueries,
    shown: example,
    async query(q) {
      const { raised, lowered, histogram, query } = data.answers[q], all = side => ({ ...sideOf(side, example), more: false });
      return { raised: all(raised), lowered: all(lowered), histogram, query };
    },
    async examples(ids) { return ids.map(example); },
    hasAll: id => rowOf.has(id),
    // Predicted change of every query when the examples are removed; NaN where it is not known.
    async drop(ids) {
      changes ??= new Float32Array(bytes(byId("columns").textContent).buffer);
      const q = askedQueries.length, sum = new Float64Array(q);
      for (const id of ids) {
        const row = rowOf.get(id);
        if (row === undefined) {
          const some = known(id);
          for (let k = 0; k < q; k++) sum[k] += some.has(k) ? some.get(k) : NaN;
        } else for (let k = 0; k < q; k++) sum[k] += changes[row * q + k];
      }
      return sum;
    },
    async training() { return data.training; },
    sheet: (role, s) => URL.createObjectURL(
      new Blob([bytes(byId(`sheet-${role}-${s}`).textContent)], { type: data.sprites[role].media })),
  };
})();
