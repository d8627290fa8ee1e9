/** Dragging with a mouse, a pen or a finger; keys have their own ways. */

const SLACK = 5; // pixels before a press becomes a drag

/**
 * Make a node draggable onto elements with `data-place` or `data-before`.
 * ondrop(element): the element that it was dropped on.
 */
export function draggable(node, ondrop) {
  node.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const drag = { x: event.clientX, y: event.clientY, ghost: null, over: null };
    const move = (now) => moved(node, drag, now);
    const end = (now) => {
      node.removeEventListener("pointermove", move);
      for (const name of ["pointerup", "pointercancel"]) node.removeEventListener(name, end);
      removeEventListener("keydown", escape, true);
      const target = now.type === "pointerup" && drag.over;
      finish(node, drag);
      if (target) ondrop(target);
    };
    const escape = (now) => now.key === "Escape" && end(now);
    node.setPointerCapture(event.pointerId);
    node.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) node.addEventListener(name, end);
    addEventListener("keydown", escape, true);
  });
}

function moved(node, drag, { clientX: x, clientY: y }) {
  if (!drag.ghost) {
    if (Math.hypot(x - drag.x, y - drag.y) < SLACK) return;
    drag.ghost = node.cloneNode(true);
    drag.ghost.removeAttribute("id");
    drag.ghost.setAttribute("aria-hidden", "true");
    drag.ghost.classList.add("ghost");
    document.body.append(drag.ghost);
    document.body.classList.add("dragging");
  }
  drag.ghost.style.left = `${x}px`;
  drag.ghost.style.top = `${y}px`;
  const over = document.elementFromPoint(x, y)?.closest("[data-place], [data-before]") ?? null;
  if (over === drag.over) return;
  drag.over?.classList.remove("over");
  over?.classList.add("over");
  drag.over = over;
}

function finish(node, drag) {
  drag.over?.classList.remove("over");
  document.body.classList.remove("dragging");
  if (!drag.ghost) return;
  drag.ghost.remove();
  const swallow = (event) => event.stopPropagation();
  node.addEventListener("click", swallow, { capture: true, once: true });
  setTimeout(() => node.removeEventListener("click", swallow, true));
}
