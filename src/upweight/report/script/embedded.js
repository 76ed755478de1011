// -- where the data come from: this file ----------------------------------------------------------
// The page asks this one object, which promises; the same page served from a folder has another.
const source = (() => {
  const { train, queries, sprites } = data, placeOf = new Map(train.column.map((id, place) => [id, place]));
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const rowOf = new Map(data.whole.map((id, row) => [id, row]));
  let changes, listed;

  function example(id) {
    const place = placeOf.get(id);
    if (place === undefined) return { id, name: `#${id}`, label: "", words: `${thing} ${id}`, contents: {} };
    const index = train.index[place], label = train.label[place];
    return { id, label, name: data.groups ? index : `#${index}`,
      words: `${thing} ${index}${label ? `, label ${label}` : ""}`,
      tile: sprites.train ? place : undefined, contents: train.contents[place] ?? {}, tokens: train.tokens?.[place] };
  }
  // Of an example without its column, the changes of the queries that show it are still known.
  function known(id) {
    if (!listed) {
      listed = new Map();
      queries.forEach((query, q) => {
        for (const { places, scores } of [query.raised, query.lowered]) places.forEach((place, e) => {
          const id = train.column[place];
          if (!listed.has(id)) listed.set(id, new Map());
          listed.get(id).set(q, -scores[e]);
        });
      });
    }
    return listed.get(id) ?? new Map();
  }
  return {
    n: data.n,
    queries: queries.map((query, q) => ({ ...query, tile: sprites.query ? q : undefined,
      contents: query, text: query.text ?? "" })),
    shown: place => example(train.column[place]),
    async query(q) {
      const sides = {};
      for (const side of ["raised", "lowered"]) {
        const { places, scores, changes, differs, tokens, rest } = queries[q][side];
        sides[side] = { more: false, entries: places.map((place, e) => ({ example: example(train.column[place]),
          score: scores[e], change: changes ? changes[e] : data.predicts ? -scores[e] : undefined,
          differs: differs?.[e], tokens: tokens?.[e], rest: rest?.[e] })) };
      }
      return { ...sides, histogram: queries[q].histogram };
    },
    async examples(ids) { return ids.map(example); },
    hasAll: id => rowOf.has(id),
    // Predicted change of every query when the examples are removed; NaN where it is not known.
    async drop(ids) {
      changes ??= new Float32Array(bytes(byId("columns").textContent).buffer);
      const q = queries.length, sum = new Float64Array(q);
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
      new Blob([bytes(byId(`sheet-${role}-${s}`).textContent)], { type: sprites[role].media })),
  };
})();
