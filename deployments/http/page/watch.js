// The view to watch: every host's workers now and over the last minute, what waits, and what happened.

import { h } from "./dom.js";
import { Fleet } from "./fleet.js";
import { HostCard } from "./host.js";
import { Happenings, mixes, requests, tiles } from "./panels.js";
import { stream } from "./service.js";

const FRAME_MS = 66; // between two pictures of what moves
const FRAME_STILL_MS = 1000; // the same for people who do not want things to move
const AGAIN_MS = [1000, 2000, 5000, 10000]; // waits before the service is asked again after errors
const OPEN = 12; // hosts whose timelines are shown unasked

/** What the marks of timelines mean. */
const KEY = () =>
  h(
    "p",
    { class: "key" },
    h("span", {}, h("b", {}, "◆"), "regrouped"),
    h("span", {}, h("b", {}, "✚"), "repaired"),
    h("span", {}, h("b", {}, "×"), "cancelled"),
    h("span", {}, h("b", { class: "swatch" }), "worker died, until it is replaced"),
  );

/** Starts the view. @returns {{show}} `show(false)` asks for nothing any more. */
export function startWatch(element, needKey) {
  const fleet = new Fleet();
  const cards = new Map();
  const state = h("p", { class: "live", role: "status" });
  const overview = h("div", { class: "tiles" });
  const pools = h("div", { class: "pools" });
  const atWork = h("div", { class: "card panel" });
  const exchange = h("div", { class: "card panel" });
  const happenings = new Happenings();
  element.append(
    h("div", { class: "watch-top" }, h("h2", {}, "The fleet, live"), state),
    overview,
    h(
      "div",
      { class: "watch-body" },
      h("div", { class: "pools-and-key" }, pools, KEY()),
      h("div", { class: "side" }, atWork, exchange, happenings.element),
    ),
  );

  let leave = null;
  let timer = 0;

  function draw() {
    overview.replaceChildren(...tiles(fleet));
    atWork.replaceChildren(...requests(fleet));
    exchange.replaceChildren(...mixes(fleet));
    const shown = new Set();
    for (const pool of fleet.pools.values()) {
      for (const host of pool.hosts.values()) {
        const id = `${pool.name} ${host.id}`;
        shown.add(id);
        if (cards.get(id)?.host !== host) {
          cards.get(id)?.element.remove();
          cards.set(id, new HostCard(pool, host, cards.size < OPEN));
          pools.append(cards.get(id).element);
        }
        cards.get(id).draw();
      }
    }
    for (const [id, card] of cards) {
      if (shown.has(id)) continue;
      card.element.remove();
      cards.delete(id);
    }
    pools.classList.toggle("none", cards.size === 0);
  }

  async function follow(signal) {
    let failures = 0;
    while (!signal.aborted) {
      try {
        for await (const news of stream("v1/fleet/events", { signal })) {
          failures = 0;
          say("live", "Live");
          happenings.add(fleet.take(news), news.complete);
          draw();
        }
      } catch (error) {
        if (signal.aborted) return;
        say("lost", error.message);
        if (error.needsKey) return needKey(error);
        failures += 1;
      }
      await pause(AGAIN_MS[Math.min(failures, AGAIN_MS.length - 1)], signal);
    }
  }

  function say(kind, text) {
    if (state.dataset.kind === kind && state.textContent === text) return;
    state.dataset.kind = kind;
    state.textContent = text;
  }

  function move() {
    for (const card of cards.values()) card.move();
  }

  return {
    show(shown) {
      if (shown === Boolean(leave)) return;
      leave?.abort();
      clearInterval(timer);
      leave = shown ? new AbortController() : null;
      if (!shown) return;
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      timer = setInterval(move, still ? FRAME_STILL_MS : FRAME_MS);
      say("", "Asking…");
      follow(leave.signal);
    },
  };
}

const pause = (ms, signal) =>
  new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), done()), { once: true });
  });
