/** Charts as plain SVG. */

import { number } from "./dom.js";

const SPACE = "http://www.w3.org/2000/svg";

export function svg(tag, props, ...children) {
  const node = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const exact = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

/** Bars over equal steps; a click on one calls onpick(from, to). */
export function histogram({ edges, counts, mean, quartiles }, label, onpick) {
  const [width, height] = [264, 72];
  const most = Math.max(...counts);
  const step = width / counts.length;
  const bars = counts.map((count, n) => {
    const tall = count ? Math.max((count / most) * height, 2) : 0;
    const [from, to] = [edges[n], edges[n + 1]];
    const said = `${exact.format(from)} to ${exact.format(to)}: ${number.format(count)}`;
    const last = n === counts.length - 1;
    const place = { x: n * step, width: step };
    const onclick = () => onpick(from, to, last);
    return svg(
      "g",
      { class: "bar", onclick },
      svg("rect", { ...place, class: "hit", y: 0, height }),
      svg("rect", { ...place, class: "drawn", y: height - tall, height: tall }),
      svg("title", {}, said),
    );
  });
  const summary =
    `median ${exact.format(quartiles[2])}, middle half ${exact.format(quartiles[1])} to ` +
    `${exact.format(quartiles[3])}, mean ${exact.format(mean)}`;
  const chart = svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height + 15}`,
      role: "img",
      "aria-label": `${label}: ${summary}`,
      class: "histogram",
    },
    ...bars,
    svg("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }),
    svg("text", { x: 0, y: height + 13 }, short.format(edges[0])),
    svg("text", { x: width, y: height + 13, "text-anchor": "end" }, short.format(edges.at(-1))),
  );
  return { chart, summary };
}
