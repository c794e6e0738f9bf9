// One host: its workers as cells, and their last minute beside them.

import { colourOf, nameOf } from "./colours.js";
import { count, h, seconds } from "./dom.js";
import { Timeline } from "./timeline.js";

const STATES = { free: "free", out: "being linked", dead: "being replaced" };

export class HostCard {
  constructor(pool, host, open) {
    this.pool = pool;
    this.host = host;
    this.cells = Array.from({ length: host.workers }, (_, index) =>
      h("li", { class: "worker" }, h("b", {}, String(index))),
    );
    this.timeline = new Timeline(host);
    this.about = h("span", { class: "about" });
    this.few = h("span", { class: "few", "aria-hidden": "true" });
    this.element = h(
      "details",
      { class: "card host", open },
      h(
        "summary",
        {},
        h("span", { class: "host-name" }, pool.name, h("i", {}, ` · ${host.name}`)),
        this.few,
        this.about,
      ),
      h(
        "div",
        { class: "rows-of-workers" },
        h("ul", { class: "workers", "aria-label": `Workers of host ${host.name}` }, this.cells),
        this.timeline.element,
      ),
    );
    this.element.addEventListener("toggle", () => this.timeline.draw());
  }

  draw() {
    const { host } = this;
    this.element.classList.toggle("silent", host.silent);
    this.about.textContent = host.silent
      ? "does not answer"
      : [
          count(host.workers, `${host.device} worker`),
          host.waiting ? `${host.waiting} of ${host.max_queue} places in its queue taken` : "nothing waits",
          host.backlog_s > 0.05 ? `${seconds(host.backlog_s)} of work` : null,
        ]
          .filter(Boolean)
          .join(" · ");
    const dots = [];
    for (const [index, cell] of this.cells.entries()) {
      const { state, request } = host.worker(index);
      const colour = request ? colourOf(request) : "";
      cell.className = `worker ${state} ${colour}`;
      const label = `Worker ${index}: ${request ? `works for ${nameOf(request)}` : STATES[state]}`;
      if (cell.getAttribute("aria-label") !== label) cell.setAttribute("aria-label", label);
      cell.title = label;
      dots.push(h("span", { class: `dot ${state} ${colour}` }));
    }
    this.few.replaceChildren(...dots);
    if (this.element.open) this.timeline.draw();
  }

  move() {
    if (this.element.open) this.timeline.move();
  }
}
