// -- two texts side by side: what differs ---------------------------------------------------------

// Words, marks and spaces. Scripts that put no space between words are compared sign by sign.
const PIECES = /\s+|[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}]|[\p{L}\p{M}\p{N}_]+|./gsu;
const piecesOf = text => text.match(PIECES) ?? [];
const isSpace = piece => /^\s/u.test(piece), isWord = piece => /[\p{L}\p{N}]/u.test(piece);
const LIKE = 0.4; // below this share of words that both have, nearly everything would be marked
const MOST = 1000; // words of each text between its first and last difference that are compared

// The share of the words of the longer text that the other has too, in any order.
function likeness(a, b) {
  const words = text => piecesOf(text.toLowerCase()).filter(isWord), mine = words(a), theirs = words(b), counts = new Map();
  for (const word of theirs) counts.set(word, (counts.get(word) ?? 0) + 1);
  let both = 0;
  for (const word of mine) if (counts.get(word)) { counts.set(word, counts.get(word) - 1); both++; }
  return both / Math.max(1, mine.length, theirs.length);
}

// Longest common subsequence of the words, case aside: [[text, whether only this one has it]] of each.
function difference(one, two) {
  const [a, b] = [one, two].map(text => piecesOf(text).filter(piece => !isSpace(piece)).map(piece => piece.toLowerCase()));
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (end < Math.min(a.length, b.length) - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const n = Math.min(MOST, a.length - end - start), m = Math.min(MOST, b.length - end - start);
  const cut = n < a.length - end - start || m < b.length - end - start;
  const length = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1)); // of what is common to both from here on
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--)
    length[i][j] = a[start + i] === b[start + j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const onlyA = new Set(), onlyB = new Set();
  for (let i = 0, j = 0; i < n || j < m;) {
    if (i < n && j < m && a[start + i] === b[start + j]) { i++; j++; }
    else if (j >= m || (i < n && length[i + 1][j] >= length[i][j + 1])) onlyA.add(start + i++);
    else onlyB.add(start + j++);
  }
  return { cut, sides: [runsOf(one, onlyA), runsOf(two, onlyB)] };
}
// Pieces put together to runs. A space between two marked words is marked with them.
function runsOf(text, only) {
  const runs = [];
  let place = 0, spaces = "";
  for (const piece of piecesOf(text)) {
    if (isSpace(piece)) { spaces += piece; continue; }
    const marked = only.has(place++), last = runs.at(-1);
    if (last && last.marked === marked) last.text += spaces + piece;
    else if (last?.marked || !last) { if (spaces) runs.push({ text: spaces, marked: false }); runs.push({ text: piece, marked }); }
    else { last.text += spaces; runs.push({ text: piece, marked }); }
    spaces = "";
  }
  if (spaces) runs.push({ text: spaces, marked: false });
  return runs.reduce((all, run) => {
    if (all.length && all.at(-1).marked === run.marked) all.at(-1).text += run.text; else all.push(run);
    return all;
  }, []);
}

// What both have is told by its first and last words, so that what differs is seen in long texts.
const AROUND = 12;
function shortened({ text, marked }, k, runs) {
  const pieces = piecesOf(text), words = pieces.filter(isWord).length;
  if (marked || words <= 3 * AROUND) return [text];
  const taken = list => {
    let seen = 0;
    const stop = list.findIndex(piece => isWord(piece) && ++seen > AROUND);
    return list.slice(0, stop);
  };
  const before = k ? taken(pieces) : [], after = k < runs.length - 1 ? taken([...pieces].reverse()).reverse() : [];
  const left = words - before.filter(isWord).length - after.filter(isWord).length;
  return [before.join(""), element("span", { class: "hint alike" }, ` [… ${several(left, "word")} alike …] `), after.join("")];
}

// Both texts with what only one of them has, in words above and marked in them.
function compareTexts([one, two], [nameOne, nameTwo]) {
  if (one === two) return element("div", { class: "difference" }, element("p", { class: "hint" }, "As far as they are shown here, the two texts are the same."), longText(one));
  const { cut, sides } = difference(one, two);
  const list = runs => runs.filter(run => run.marked).map(run => run.text.trim());
  const told = (name, runs) => {
    const only = list(runs), some = only.slice(0, 6).flatMap((text, k) => [k ? ", “" : " “", own(text.length > 40 ? `${text.slice(0, 40)}…` : text), "”"]);
    return element("li", {}, "only in ", own(name), ": ", ...(only.length ? [...some, only.length > 6 ? ` and ${only.length - 6} more` : ""] : ["nothing"]));
  };
  const side = (name, runs) => element("div", {}, element("b", {}, own(name)),
    element("p", { class: "words full", dir: "auto" }, ...runs.flatMap((run, k) => run.marked ? [element("mark", { class: "only" }, run.text)] : shortened(run, k, runs))));
  const same = sides.every(runs => !list(runs).length);
  return element("div", { class: "difference" },
    same ? element("p", { class: "hint" }, "They differ in spaces, or in capital letters, alone.")
      : element("ul", { class: "hint" }, told(nameOne, sides[0]), told(nameTwo, sides[1])),
    cut ? element("p", { class: "hint" }, `They are long: from the first difference on, ${whole(MOST)} words of each were compared.`) : "",
    element("div", { class: "two-texts" }, side(nameOne, sides[0]), side(nameTwo, sides[1])));
}

// Folded, and only made when it is opened: a query has many cards.
function differenceOf(texts, names, words) {
  const share = likeness(...texts);
  if (share < LIKE) return "";
  const details = folded(`${words} (${Math.round(100 * share)} % of the words are the same)`);
  details.addEventListener("toggle", () => { if (details.open && details.childElementCount === 1) details.append(compareTexts(texts, names)); });
  return details;
}
const textOf = ({ text, tokens, special }) => text || (tokens ? tokens.filter((_, t) => !special?.includes(t)).join(special ? "" : " ") : "");
const textOfExample = ({ contents, tokens, special }) => textOf({ ...contents, tokens, special });
