// What was drawn in this tab: a small picture each, the newest first. They are gone with the tab.

import { colourOf } from "./colours.js";
import { h } from "./dom.js";
import { State } from "./drawing.js";

const KEPT = 60;
const RING = 100; // per cent

export class Strip {
  #entries = new Map();

  constructor(element, choose) {
    this.choose = choose;
    this.list = h("ul", { class: "strip", "aria-label": "Drawn in this tab" });
    element.append(this.list);
  }

  add(drawing) {
    const image = h("img", { alt: "", hidden: true });
    const ring = h("span", { class: "ring" });
    const button = h("button", { type: "button", onclick: () => this.choose(drawing) }, image, ring);
    const item = h("li", {}, button);
    this.#entries.set(drawing, { button, image, ring, item });
    this.list.prepend(item);
    drawing.addEventListener("change", () => this.#update(drawing));
    this.#update(drawing);
    this.#forget();
  }

  select(drawing) {
    for (const [one, { button }] of this.#entries) button.setAttribute("aria-pressed", one === drawing);
  }

  #update(drawing) {
    const entry = this.#entries.get(drawing);
    if (!entry) return;
    entry.button.className = drawing.id && colourOf(drawing.id);
    entry.button.dataset.state = drawing.state;
    entry.button.setAttribute("aria-label", `${drawing.asked.prompt}, ${drawing.state}`);
    entry.button.title = drawing.asked.prompt;
    entry.image.hidden = !drawing.picture;
    if (drawing.picture && entry.image.src !== drawing.picture) entry.image.src = drawing.picture;
    const share = drawing.steps ? Math.round((RING * drawing.step) / drawing.steps) : 0;
    entry.ring.style.setProperty("--share", `${share}%`);
    entry.ring.hidden = !drawing.underWay;
    entry.ring.textContent = drawing.state === State.QUEUED ? "…" : "";
  }

  #forget() {
    for (const [drawing, { item }] of this.#entries) {
      if (this.#entries.size <= KEPT) return;
      if (drawing.underWay) continue;
      if (drawing.picture) URL.revokeObjectURL(drawing.picture);
      item.remove();
      this.#entries.delete(drawing);
    }
  }
}
