/** The difference of two texts by words (Myers 1986, "An O(ND) Difference Algorithm"). */

const WORDS = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]|[\p{L}\p{N}_]+|\s+|./gsu;
const MOST_WORDS = 20_000;
const MOST_EDITS = 1_500; // the memory grows with the square

/** Pieces in order: {kind: "same" | "removed" | "added", text}. */
export function difference(before, after) {
  const [a, b] = [before.match(WORDS) ?? [], after.match(WORDS) ?? []];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  const room = Math.min(a.length, b.length) - start;
  while (end < room && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const [left, right] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const steps = left.length + right.length > MOST_WORDS ? null : edits(left, right);
  const pieces = [];
  const add = (kind, text) => {
    if (!text) return;
    if (pieces.at(-1)?.kind === kind) pieces.at(-1).text += text;
    else pieces.push({ kind, text });
  };
  add("same", a.slice(0, start).join(""));
  for (const [kind, word] of steps ?? []) add(kind, word);
  if (!steps) {
    add("removed", left.join(""));
    add("added", right.join(""));
  }
  add("same", a.slice(a.length - end).join(""));
  return pieces;
}

/** The shortest list of [kind, word] that leads from one list to the other, or null. */
function edits(a, b) {
  const most = Math.min(a.length + b.length, MOST_EDITS);
  let reached = new Map([[1, 0]]); // diagonal (place in a minus place in b) -> place in a
  const rounds = [];
  for (let d = 0; d <= most; d++) {
    rounds.push(new Map(reached));
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d || (k !== d && (reached.get(k - 1) ?? -1) < (reached.get(k + 1) ?? -1));
      let x = down ? reached.get(k + 1) : reached.get(k - 1) + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x += 1;
      reached.set(k, x);
      if (x >= a.length && x - k >= b.length) return back(a, b, rounds, d);
    }
  }
  return null;
}

function back(a, b, rounds, last) {
  const steps = [];
  let [x, y] = [a.length, b.length];
  for (let d = last; d >= 0; d--) {
    const reached = rounds[d];
    const k = x - y;
    const down = k === -d || (k !== d && (reached.get(k - 1) ?? -1) < (reached.get(k + 1) ?? -1));
    const from = d === 0 ? 0 : down ? reached.get(k + 1) : reached.get(k - 1);
    const fromY = d === 0 ? 0 : from - (down ? k + 1 : k - 1);
    const [midX, midY] = d === 0 ? [0, 0] : down ? [from, fromY + 1] : [from + 1, fromY];
    while (x > midX && y > midY) {
      steps.push(["same", a[x - 1]]);
      x -= 1;
      y -= 1;
    }
    if (d > 0) steps.push(down ? ["added", b[fromY]] : ["removed", a[from]]);
    [x, y] = [from, fromY];
  }
  return steps.reverse();
}
