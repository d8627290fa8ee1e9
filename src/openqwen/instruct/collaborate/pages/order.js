/** The order of responses. `places`: slot → place; 1 is the best, an equal place is a tie. */

/** Tiers of slots, best first; slots without a place are left out. */
export function tiers(places, slots) {
  const numbers = [...new Set(Object.values(places))].sort((a, b) => a - b);
  return numbers.map((n) => slots.filter((slot) => places[slot] === n));
}

/** Places 1, 2, 3 … of tiers; empty tiers do not count. */
export function placesOf(all) {
  const filled = all.filter((tier) => tier.length);
  return Object.fromEntries(filled.flatMap((tier, n) => tier.map((slot) => [slot, n + 1])));
}

/** Give a slot a place; null takes its place away. */
export function placed(places, slot, place) {
  const { [slot]: _, ...others } = places;
  return place === null ? others : { ...others, [slot]: place };
}

/** Put a slot on a place of its own, before the slots whose place is `before` or worse. */
export function inserted(places, slots, slot, before) {
  const others = placed(places, slot, null);
  const better = tiers(others, slots).filter((tier) => others[tier[0]] < before);
  const worse = tiers(others, slots).filter((tier) => others[tier[0]] >= before);
  return placesOf([...better, [slot], ...worse]);
}

/**
 * Move a slot one step, up (-1) or down (1): out of a tie to a place of its own, or from a place
 * of its own into a tie. Such steps reach every order.
 */
export function stepped(places, slots, slot, step, ties = true) {
  if (!(slot in places)) return placesOf([...tiers(places, slots), [slot]]);
  const all = tiers(places, slots);
  const at = all.findIndex((tier) => tier.includes(slot));
  if (all[at].length > 1) {
    const rest = all[at].filter((other) => other !== slot);
    all.splice(at, 1, ...(step < 0 ? [[slot], rest] : [rest, [slot]]));
  } else if (all[at + step]) {
    if (ties) {
      all[at + step] = [...all[at + step], slot];
      all.splice(at, 1);
    } else [all[at], all[at + step]] = [all[at + step], all[at]];
  }
  return placesOf(all);
}

/**
 * What keeps an order from being sent: null, "unplaced", or "tied".
 * best: how many of the best must have a place, null for all.
 */
export function missing(places, slots, best = null, ties = true) {
  const needed = Math.min(best ?? slots.length, slots.length);
  if (Object.keys(places).length < needed) return "unplaced";
  if (!ties && tiers(places, slots).some((tier) => tier.length > 1)) return "tied";
  return null;
}
