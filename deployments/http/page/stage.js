// The stage shows one request: its picture, how far it is, and in the end how it was made.

import { colourOf } from "./colours.js";
import { count, h, seconds, svg, workers } from "./dom.js";
import { State } from "./drawing.js";

const WIDTH = 1000; // of the track, in units of its own
const PHASES = ["queued", "prepare", "denoise", "decode"];
const PHASE_NAMES = {
  queued: "waited",
  prepare: "prepared",
  denoise: "steps",
  decode: "decoded",
  other: "between",
};

export class Stage {
  #drawing = null;
  #due = false;
  #shown = null;

  /** @param actions what can be done with a finished picture: {label: function of the drawing}. */
  constructor(element, actions) {
    this.actions = actions;
    this.image = h("img", { alt: "", hidden: true });
    this.empty = h("p", { class: "empty" }, "The picture comes here.");
    this.frame = h("div", { class: "frame" }, this.image, this.empty);
    this.track = svg("svg", {
      viewBox: `0 0 ${WIDTH} 24`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    this.progress = h(
      "div",
      {
        class: "progress",
        role: "progressbar",
        "aria-label": "Steps",
        "aria-valuemin": 0,
        hidden: true,
      },
      this.track,
    );
    this.status = h("p", { class: "status" });
    this.cells = h("div", { class: "gang", "aria-hidden": "true" });
    this.cancel = h(
      "button",
      { type: "button", id: "cancel", hidden: true, onclick: () => this.#drawing.cancel() },
      "Cancel",
    );
    this.line = h("div", { class: "line", hidden: true }, this.cells, this.status, this.cancel);
    this.error = h("p", { class: "error", id: "stage-error", role: "alert" });
    this.result = h("div", { class: "result", hidden: true });
    this.element = h(
      "div",
      { class: "card show" },
      this.frame,
      this.progress,
      this.line,
      this.error,
      this.result,
    );
    element.prepend(this.element);
  }

  /** Show a request, and follow it until another one is shown. */
  show(drawing) {
    this.#drawing?.removeEventListener("change", this);
    this.#drawing = drawing;
    drawing.addEventListener("change", this);
    this.#draw();
  }

  handleEvent() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      this.#draw();
    });
  }

  #draw() {
    const drawing = this.#drawing;
    this.element.dataset.state = drawing.state;
    this.element.className = `card show ${drawing.id && colourOf(drawing.id)}`;
    this.image.hidden = !drawing.picture;
    this.empty.hidden = Boolean(drawing.picture);
    this.empty.textContent = drawing.underWay ? "The first preview comes here." : "There is no picture.";
    if (drawing.picture) {
      this.image.src = drawing.picture;
      this.image.alt = drawing.final ? drawing.asked.prompt : `Preview at step ${drawing.step}`;
    }
    this.frame.classList.toggle("preview", Boolean(drawing.picture) && !drawing.final);
    this.progress.hidden = drawing.steps === 0;
    this.progress.setAttribute("aria-valuemax", drawing.steps);
    this.progress.setAttribute("aria-valuenow", drawing.step);
    this.progress.setAttribute("aria-valuetext", `step ${drawing.step} of ${drawing.steps}`);
    this.track.replaceChildren(...marksOf(drawing));
    this.line.hidden = false;
    this.status.textContent = statusOf(drawing);
    this.cells.replaceChildren(
      ...(drawing.underWay ? drawing.gang : []).map((index) => h("span", { class: "cell" }, String(index))),
    );
    this.cancel.hidden = !drawing.underWay;
    this.error.textContent = drawing.state === State.FAILED ? drawing.error.message : "";
    const finished = drawing.state === State.DONE ? drawing : null;
    if (finished !== this.#shown) {
      this.#shown = finished;
      this.result.hidden = !finished;
      this.result.replaceChildren(...(finished ? this.#resultOf(finished) : []));
    }
  }

  #resultOf(drawing) {
    const { result } = drawing;
    const facts = {
      Seed: result.seed,
      Size: result.size.replace("x", " × "),
      Time: seconds(result.timings.total_s),
      Gang: result.gang_size,
      Exchange: typeof result.exchange === "string" ? result.exchange : "a mix",
      Repairs: result.repairs,
    };
    const buttons = Object.entries(this.actions).map(([label, act]) =>
      h("button", { type: "button", onclick: () => act(drawing) }, label),
    );
    const download = h(
      "a",
      { class: "button", href: drawing.picture, download: nameOf(drawing) },
      "Download",
    );
    return [
      h(
        "dl",
        { class: "facts" },
        Object.entries(facts).map(([name, value]) =>
          h("div", {}, h("dt", {}, name), h("dd", { class: "number" }, String(value))),
        ),
      ),
      phases(result.timings),
      h("div", { class: "actions" }, download, buttons),
      result.warnings.map((text) => h("p", { class: "warning" }, text)),
      h(
        "details",
        {},
        h("summary", {}, count(result.segments.length, "segment")),
        h(
          "ol",
          { class: "segments" },
          result.segments.map((segment) => h("li", {}, segmentText(segment))),
        ),
      ),
    ].flat();
  }
}

/** The track: a bar for each gang's steps, and a mark where it changed. */
function marksOf({ spans, marks, steps }) {
  const x = (step) => (WIDTH * step) / Math.max(1, steps);
  return [
    svg("rect", { class: "ground", x: 0, y: 8, width: WIDTH, height: 8 }),
    ...spans.map((span, place) =>
      svg("rect", {
        class: place % 2 ? "span odd" : "span",
        x: x(span.first),
        y: 8,
        width: Math.max(0, x(span.last) - x(span.first)),
        height: 8,
      }),
    ),
    ...marks.map((mark) =>
      svg("rect", { class: `mark ${mark.kind}`, x: x(mark.step) - 2, y: 2, width: 4, height: 20 }),
    ),
  ];
}

function statusOf(drawing) {
  const { state, step, steps, left, ahead, wait, marks } = drawing;
  const last = marks.at(-1);
  switch (state) {
    case State.ASKING:
      return "Asking…";
    case State.QUEUED:
      return ahead ? `Queued behind ${ahead}, about ${seconds(wait)}` : "Queued";
    case State.CANCELLED:
      return `Cancelled at step ${step}`;
    case State.FAILED:
      return "Not finished";
    case State.DONE:
      return marks.length ? marks.map((mark) => mark.text).join(" ") : `Drawn by ${workers(drawing.gang)}`;
  }
  const told = [steps ? `Step ${step} of ${steps}` : "Preparing", `gang of ${drawing.gang.length}`];
  if (steps && step >= steps) told[0] = "Decoding";
  else if (left !== null) told.push(`${seconds(left)} left`);
  if (last) told.push(last.kind === "repaired" ? "after a repair" : "regrouped");
  return told.join(" · ");
}

/** Seconds by phase, as one bar. */
function phases(timings) {
  const known = PHASES.map((name) => [name, timings[`${name}_s`]]);
  const other = timings.total_s - known.reduce((sum, [, value]) => sum + value, 0);
  const all = [...known, ["other", Math.max(0, other)]].filter(([, value]) => value > 0.005);
  const bar = h(
    "div",
    { class: "phases", "aria-hidden": "true" },
    all.map(([name, value]) => {
      const part = h("span", { class: `phase ${name}` });
      part.style.flexGrow = value;
      return part;
    }),
  );
  const words = all.map(([name, value]) =>
    h(
      "li",
      {},
      h("i", { class: `phase ${name}` }),
      `${PHASE_NAMES[name]} `,
      h("b", { class: "number" }, seconds(value)),
    ),
  );
  return h("div", {}, bar, h("ul", { class: "legend" }, words));
}

function segmentText(segment) {
  const step = segment.stale_step_s ?? segment.fresh_step_s;
  const how = typeof segment.exchange === "string" ? segment.exchange : "a mix";
  const pace = step ? `, ${seconds(step)} a step` : "";
  return `Steps ${segment.first_step} to ${segment.last_step} by ${workers(segment.workers)}, ${how}${pace}`;
}

function nameOf({ asked, result }) {
  const words = asked.prompt
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 40);
  return `${words || "picture"}-${result.seed}.${result.output_format}`;
}
