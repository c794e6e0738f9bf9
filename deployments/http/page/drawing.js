// One request from this tab, from its submission to its end.

import { nameRequest } from "./colours.js";
import { workers } from "./dom.js";
import { stream } from "./service.js";

/** Where a request stands. */
export const State = Object.freeze({
  ASKING: "asking",
  QUEUED: "queued",
  RUNNING: "running",
  DONE: "done",
  FAILED: "failed",
  CANCELLED: "cancelled",
});

/**
 * Dispatches "change" after each event of the service, and "news" with a sentence where something happened.
 * @property picture  the URL of the last preview or of the result, and `file` the same as a Blob
 * @property spans  steps by gang: {workers, first, last}
 * @property marks  {step, kind, text}: "regrouped" or "repaired"
 */
export class Drawing extends EventTarget {
  state = State.ASKING;
  id = "";
  step = 0;
  steps = 0;
  wait = 0;
  ahead = 0;
  spans = [];
  marks = [];
  picture = null;
  file = null;
  final = false;
  result = null;
  error = null;
  #leave = new AbortController();
  #pace = null;

  /** @param asked the fields as they were set, @param body what is sent: asked as JSON, or FormData. */
  constructor(path, asked, body) {
    super();
    Object.assign(this, { path, asked, body });
  }

  get underWay() {
    return [State.ASKING, State.QUEUED, State.RUNNING].includes(this.state);
  }

  get gang() {
    return this.spans.at(-1)?.workers ?? [];
  }

  /** Seconds until the last step, as far as this gang's pace says; null before it is known. */
  get left() {
    const pace = this.#pace;
    if (this.state !== State.RUNNING || !pace || pace.last.step <= pace.first.step) return null;
    const perStep = (pace.last.seconds - pace.first.seconds) / (pace.last.step - pace.first.step);
    return perStep * (this.steps - this.step);
  }

  /** Leave: the gang stops after the step that it is in. */
  cancel() {
    if (!this.underWay) return;
    this.#end(State.CANCELLED, "Cancelled.");
    this.#leave.abort();
  }

  async run() {
    try {
      for await (const event of stream(this.path, { body: this.body, signal: this.#leave.signal })) {
        this.#hear(event);
      }
      if (this.underWay) this.#fail({ message: "The service broke off before the picture was finished." });
    } catch (error) {
      if (this.underWay) this.#fail(error);
    } finally {
      this.body = null;
    }
  }

  #hear(event) {
    if (!this.underWay) return;
    if (event.id && !this.id) nameRequest((this.id = event.id), this.asked.prompt);
    if (event.type === "error") return this.#fail(event.error);
    if (event.type.endsWith(".completed")) return this.#finish(event);
    if (event.type.endsWith(".partial_image")) {
      this.#show(event);
    } else {
      const take = this[`_${event.state}`];
      if (take) take.call(this, event);
    }
    this.#changed();
  }

  _queued({ position, predicted_wait_s: wait }) {
    Object.assign(this, { state: State.QUEUED, ahead: position, wait });
    if (position) this.#tell(`Queued behind ${position}.`);
  }

  _started({ workers: gang }) {
    this.state = State.RUNNING;
    this.#takeUp(gang, 0);
    this.#tell(`${workers(gang)} began.`);
  }

  _running({ step, num_steps: steps, seconds }) {
    const quarter = (done) => Math.floor((4 * done) / steps);
    if (quarter(step) > quarter(this.step) && step < steps) this.#tell(`Step ${step} of ${steps}.`);
    Object.assign(this, { step, steps });
    const span = this.spans.at(-1);
    if (span) span.last = Math.max(span.last, step);
    this.#pace = { first: this.#pace?.first ?? { step, seconds }, last: { step, seconds } };
  }

  _regrouped({ workers: gang, step }) {
    this.state = State.RUNNING;
    this.#takeUp(gang, step);
    this.#mark("regrouped", step, `${workers(gang)} went on from step ${step}.`);
  }

  _repaired({ lost_workers: lost, step }) {
    this.step = step;
    this.#pace = null;
    this.#mark(
      "repaired",
      step,
      `${lost.length ? `${workers(lost)} died` : "The gang broke"}; going on from step ${step}.`,
    );
  }

  #takeUp(gang, step) {
    this.step = step;
    this.#pace = null;
    this.spans.push({ workers: gang, first: step, last: step });
  }

  #mark(kind, step, text) {
    this.marks.push({ kind, step, text });
    this.#tell(text);
  }

  #finish(event) {
    const { b64_json: data, ...result } = event;
    this.result = result;
    this.step = this.steps;
    this.#show({ ...result, b64_json: data });
    this.final = true;
    this.#end(
      State.DONE,
      `The picture is finished, in ${result.timings.total_s.toFixed(1)} seconds, with seed ${result.seed}.`,
    );
  }

  #show({ b64_json: data, output_format: format }) {
    if (this.picture) URL.revokeObjectURL(this.picture);
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    this.file = new Blob([bytes], { type: `image/${format}` });
    this.picture = URL.createObjectURL(this.file);
  }

  #fail(error) {
    this.error = error;
    this.#end(State.FAILED, error.message);
  }

  #end(state, sentence) {
    this.state = state;
    this.#tell(sentence);
    this.#changed();
  }

  #tell(sentence) {
    const text = sentence[0].toUpperCase() + sentence.slice(1);
    this.dispatchEvent(new CustomEvent("news", { detail: text }));
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
