// The last minute of one host: a row for each worker, a bar for each segment, marks where something happened.

import { colourOf, nameOf } from "./colours.js";
import { h, seconds, svg, workers } from "./dom.js";
import { MINUTE } from "./fleet.js";

const ROW = 30; // pixels of a row, as in watch.css
const BAR = 20;
const MARKS = { cancelled: "×", regrouped: "◆", repaired: "✚", failed: "!" };

export class Timeline {
  #bars = new Map();
  #zero = Date.now() / 1000; // the time at x = 0 of what moves

  constructor(host) {
    this.host = host;
    this.moving = svg("g");
    this.svg = svg("svg", { role: "img", height: ROW * host.workers }, this.moving);
    const times = [60, 45, 30, 15, 0].map((ago) => h("span", {}, ago ? `${ago} s` : "now"));
    this.element = h(
      "div",
      { class: "timeline" },
      this.svg,
      h("div", { class: "times", "aria-hidden": "true" }, times),
    );
    this.width = 0;
    new ResizeObserver(([entry]) => {
      this.width = entry.contentRect.width;
      this.#bars.clear();
      this.moving.replaceChildren();
      this.draw();
    }).observe(this.svg);
  }

  /** Show what the host has become; between two of these, `move` is enough. */
  draw() {
    if (!this.width) return;
    const { segments, outages } = this.host;
    const shown = new Set([...segments.keys(), ...outages.keys()]);
    for (const [id, one] of segments) this.#place(id, one, one.ended, `${one.end}`, segmentMarks);
    for (const [id, one] of outages) this.#place(id, one, one.back, `${one.back} ${one.died}`, outageMarks);
    for (const [id, { group }] of this.#bars) {
      if (shown.has(id)) continue;
      group.remove();
      this.#bars.delete(id);
    }
    this.svg.setAttribute("aria-label", this.#inWords());
    this.move();
  }

  /** Let time go on. */
  move() {
    if (!this.width) return;
    const now = Date.now() / 1000;
    this.moving.setAttribute("transform", `translate(${this.width - this.#x(now)} 0)`);
    for (const { group, item, grows } of this.#bars.values()) {
      if (grows) size(group, this.#x(began(item)), this.#x(now));
    }
  }

  #x(at) {
    return ((at - this.#zero) * this.width) / MINUTE;
  }

  /** Make the bars of something anew if its `state` is another one. */
  #place(id, item, ended, state, make) {
    const known = this.#bars.get(id);
    if (known && known.state === state) return;
    known?.group.remove();
    const group = make(item);
    size(group, this.#x(began(item)), this.#x(ended ?? Date.now() / 1000));
    if (group.querySelector(".mark"))
      this.moving.append(group); // marks are above the bars of others
    else this.moving.prepend(group);
    this.#bars.set(id, { group, item, state, grows: ended === null });
  }

  #inWords() {
    const states = Array.from({ length: this.host.workers }, (_, index) => {
      const { state, request } = this.host.worker(index);
      return `worker ${index} ${state === "busy" ? `works for ${nameOf(request)}` : `is ${state}`}`;
    });
    return `The last minute of host ${this.host.name}: ${states.join(", ")}.`;
  }
}

const began = (item) => item.began ?? item.out;

/** A bar in each row of its gang, and a mark at its beginning or end. */
function segmentMarks(segment) {
  const group = svg(
    "g",
    {
      class: `segment ${colourOf(segment.request)}`,
      "data-end": segment.end,
      "data-request": segment.request,
    },
    svg("title", {}, describe(segment)),
  );
  const open = segment.end === "broken" ? "bar broken" : "bar";
  for (const row of segment.workers)
    group.append(svg("rect", { class: open, y: row * ROW + (ROW - BAR) / 2, height: BAR, rx: 4 }));
  const top = Math.min(...segment.workers) * ROW + ROW / 2;
  if (segment.former)
    group.append(mark(segment.former.end === "broken" ? "repaired" : "regrouped", top, "first"));
  if (segment.end === "cancelled" || segment.end === "failed") group.append(mark(segment.end, top, "last"));
  return group;
}

function outageMarks(outage) {
  const kind = outage.died ? "dead" : "out";
  const text = outage.died ? `Worker ${outage.worker} died` : `Worker ${outage.worker} was linked anew`;
  const back =
    outage.back === null ? "" : `, ${seconds(outage.back - outage.out)} until it could be lent again`;
  return svg(
    "g",
    { class: `outage ${kind}` },
    svg("title", {}, text + back),
    svg("rect", { class: "bar", y: outage.worker * ROW + (ROW - BAR) / 2, height: BAR, rx: 4 }),
  );
}

const mark = (kind, y, place) =>
  svg(
    "g",
    { class: `mark ${kind}`, "data-place": place, "data-y": y },
    svg("circle", { r: 8 }),
    svg("text", { y: 0.5 }, MARKS[kind]),
  );

/** Let the bars of a group begin and end there, and its marks be at their ends. */
function size(group, from, to) {
  for (const rect of group.querySelectorAll("rect")) {
    rect.setAttribute("x", from + 0.5);
    rect.setAttribute("width", Math.max(1.5, to - from - 1));
  }
  for (const one of group.querySelectorAll(".mark")) {
    one.setAttribute("transform", `translate(${one.dataset.place === "first" ? from : to} ${one.dataset.y})`);
  }
}

function describe(segment) {
  const steps =
    segment.last === null ? `from step ${segment.first}` : `steps ${segment.first} to ${segment.last}`;
  const parts = [`${nameOf(segment.request)}: ${steps} by ${workers(segment.workers)}`];
  if (segment.exchange) parts.push(segment.exchange);
  if (segment.step) parts.push(`${seconds(segment.step)} a step`);
  if (segment.waited !== null) parts.push(`waited ${Math.round(100 * segment.waited)} %`);
  if (segment.end && segment.end !== "finished") parts.push(segment.end);
  return parts.join(", ");
}
