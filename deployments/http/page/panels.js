// What the fleet does in numbers and words: tiles, requests at work, how steps were shared, what happened.

import { colourOf, nameOf } from "./colours.js";
import { count, h, seconds, svg, workers } from "./dom.js";
import { MINUTE } from "./fleet.js";

const KEPT = 40; // happenings
const TIME = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hourCycle: "h23",
});
const sum = (values) => values.reduce((total, value) => total + value, 0);

export function tiles(fleet) {
  const hosts = fleet.hosts;
  const waits = [...fleet.pools.values()].map((pool) => pool.wait).filter((wait) => wait !== null);
  const outcomes = (name) =>
    sum(hosts.map((host) => host.outcomes[name] ?? 0)) + (name === "refused" ? fleet.refused : 0);
  const down = sum(hosts.map((host) => host.down));
  const busy = sum(hosts.map((host) => host.busy));
  const running = sum(hosts.map((host) => Object.keys(host.running).length));
  const others = ["cancelled", "failed", "refused", "invalid"]
    .map((name) => [outcomes(name), name])
    .filter(([number]) => number);
  return [
    tile(
      "Workers busy",
      `${busy} of ${sum(hosts.map((host) => host.workers))}`,
      down ? `${down} being replaced` : count(hosts.length, "host"),
    ),
    tile("Requests at work", running, `${sum(hosts.map((host) => host.waiting))} waiting`),
    tile(
      "Wait for a gang",
      waits.length ? seconds(Math.min(...waits)) : "–",
      waits.length ? "predicted for a request now" : "no host is up",
    ),
    tile(
      "Pictures finished",
      outcomes("finished"),
      others.map(([number, name]) => `${number} ${name}`).join(", ") || "none cancelled or failed",
    ),
  ];
}

const tile = (name, value, more) =>
  h(
    "div",
    { class: "card tile" },
    h("span", { class: "label" }, name),
    h("b", { class: "number" }, String(value)),
    h("span", { class: "hint" }, more),
  );

export function requests(fleet) {
  const rows = fleet.hosts.flatMap((host) =>
    Object.entries(host.running).map(([request, [step, steps]]) => {
      const gang =
        [...host.segments.values()].findLast((one) => one.request === request && one.ended === null)
          ?.workers ?? [];
      const track = svg(
        "svg",
        { viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { class: "ground", width: 100, height: 4 }),
        svg("rect", { class: "done", width: (100 * step) / Math.max(1, steps), height: 4 }),
      );
      return h(
        "li",
        { class: colourOf(request) },
        h("span", { class: "who" }, h("i", { class: "dot busy" }), nameOf(request)),
        h("span", { class: "hint number" }, `${step} of ${steps} · ${gang.length ? workers(gang) : "…"}`),
        track,
      );
    }),
  );
  return [
    h("h3", {}, "Requests at work"),
    rows.length ? h("ul", { class: "requests" }, rows) : h("p", { class: "hint" }, "None at this moment."),
  ];
}

/** How the steps of the last minute were shared, and what the ranks waited for each other. */
export function mixes(fleet) {
  const since = Date.now() / 1000 - MINUTE;
  const found = new Map();
  for (const host of fleet.hosts) {
    for (const { exchange, ended, first, last, step, waited, workers: gang } of host.segments.values()) {
      if (!exchange || ended === null || ended < since || last <= first) continue;
      const name = gang.length === 1 ? "alone" : exchange;
      const mix = found.get(name) ?? { steps: 0, seconds: 0, timed: 0, waited: 0, told: 0 };
      const made = last - first;
      mix.steps += made;
      if (step !== null) {
        mix.seconds += step * made;
        mix.timed += made;
      }
      if (waited !== null) {
        mix.waited += waited * made;
        mix.told += made;
      }
      found.set(name, mix);
    }
  }
  const title = h("h3", {}, "Exchange, last minute");
  if (!found.size) return [title, h("p", { class: "hint" }, "No segment has ended.")];
  const rows = [...found]
    .sort(([, one], [, other]) => other.steps - one.steps)
    .map(([name, mix]) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, name.replaceAll("_", " ")),
        h("td", {}, String(mix.steps)),
        h("td", {}, mix.timed ? `${Math.round((1000 * mix.seconds) / mix.timed)} ms` : "–"),
        h("td", {}, mix.told ? `${Math.round((100 * mix.waited) / mix.told)} %` : "–"),
      ),
    );
  const head = ["", "steps", "a step", "waited"].map((name) => h("th", { scope: "col" }, name));
  return [title, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows))];
}

/** A list of what happened, the newest first. */
export class Happenings {
  constructor() {
    this.list = h("ol", { role: "log", "aria-label": "What happened", "aria-live": "polite" });
    this.none = h("p", { class: "hint" }, "No regrouping, repair or cancellation yet.");
    this.element = h(
      "div",
      { class: "card panel happenings" },
      h("h3", {}, "What happened"),
      this.none,
      this.list,
    );
  }

  add(happened, anew) {
    if (anew) this.list.replaceChildren();
    for (const one of happened) {
      const { kind, at, segment } = one;
      this.list.prepend(
        h(
          "li",
          { class: `${kind} ${segment ? colourOf(segment.request) : ""}` },
          h("time", { class: "number" }, TIME.format(at * 1000)),
          h("span", {}, sentence(one)),
        ),
      );
    }
    while (this.list.children.length > KEPT) this.list.lastChild.remove();
    this.none.hidden = this.list.children.length > 0;
  }
}

function sentence({ kind, segment, outage, host }) {
  const name = segment && nameOf(segment.request);
  switch (kind) {
    case "regrouped":
      return `${name}: ${workers(segment.workers)} went on from step ${segment.first}, after ${workers(segment.former.workers)}`;
    case "repaired":
      return `${name}: repaired, ${workers(segment.workers)} went on from step ${segment.first}`;
    case "cancelled":
      return `${name}: cancelled at step ${segment.last}`;
    case "broken":
      return `${name}: its gang of ${segment.workers.length} broke at step ${segment.last}`;
    case "failed":
      return `${name}: refused`;
    case "died":
      return `Worker ${outage.worker} of host ${host.name} died`;
    case "replaced":
      return `Worker ${outage.worker} of host ${host.name} is back after ${seconds(outage.back - outage.out)}`;
  }
  return kind;
}
