// A picture to start from, and the part of it that is to be drawn anew, painted by hand.

import { byId, h } from "./dom.js";

const STEP = 0.02; // of the canvas, for each press of an arrow key

/** Dispatches "change" when there is another picture, or none. */
export class Picture extends EventTarget {
  #file = null;
  #painted = false;
  #at = { x: 0.5, y: 0.5 };

  constructor(element) {
    super();
    this.element = element;
    this.input = h("input", {
      id: "f-image",
      type: "file",
      accept: "image/png,image/jpeg,image/webp",
      "aria-describedby": "f-image-error",
    });
    this.input.addEventListener("change", () => this.#take(this.input.files[0] ?? null));
    this.shown = h("img", { alt: "The picture to start from" });
    this.canvas = h("canvas", {
      id: "f-mask",
      tabindex: 0,
      role: "application",
      "aria-describedby": "f-mask-hint f-mask-error",
      "aria-label": "Paint what is to be drawn anew",
    });
    this.brush = h("input", { id: "brush", type: "range", min: 2, max: 40, value: 12 });
    this.rub = h("input", { id: "rub", type: "checkbox" });
    this.desk = h(
      "div",
      { class: "desk", hidden: true },
      h("div", { class: "paper" }, this.shown, this.canvas),
      h(
        "div",
        { class: "actions" },
        h("label", { for: "brush" }, "Brush"),
        this.brush,
        h("label", { class: "tick" }, this.rub, "Rub out"),
        h("button", { type: "button", class: "clear", onclick: () => this.#clear() }, "Clear"),
        h("button", { type: "button", onclick: () => this.use(null) }, "No picture"),
      ),
      h(
        "p",
        { class: "hint", id: "f-mask-hint" },
        "Paint what is to be drawn anew, or nothing for all of it. By keys: arrows move the brush, Space paints.",
      ),
      h("p", { class: "error", id: "f-mask-error" }),
    );
    element.append(
      h(
        "div",
        { class: "field" },
        h("label", { for: "f-image" }, "Picture to start from"),
        this.input,
        h("p", { class: "error", id: "f-image-error" }),
      ),
      this.desk,
    );
    this.#listen();
  }

  /** Whether there is a picture. */
  get taken() {
    return this.#file !== null;
  }

  /** Show the control where the service has fields for it, and of it no mask where none is taken. */
  offer(edits, unmasked) {
    this.element.hidden = !edits;
    this.desk.classList.toggle("unmasked", unmasked);
  }

  /** Start from this picture, a Blob, or from none. */
  use(file) {
    this.input.value = "";
    return this.#take(file);
  }

  /** What is to be sent, as it is now; `form` makes the body of a request. */
  source() {
    const file = this.#file;
    const mask = this.#painted && !this.desk.classList.contains("unmasked") ? this.#mask() : null;
    return { form: async (asked, edits) => formOf(asked, edits, file, await mask) };
  }

  async #take(file) {
    this.#file = file;
    this.desk.hidden = !file;
    if (this.shown.src) URL.revokeObjectURL(this.shown.src);
    if (file) {
      this.shown.src = URL.createObjectURL(file);
      try {
        await this.shown.decode();
        [this.canvas.width, this.canvas.height] = [this.shown.naturalWidth, this.shown.naturalHeight];
        byId("f-image-error").textContent = "";
      } catch {
        byId("f-image-error").textContent = "The browser cannot read this picture.";
        this.#file = null;
        this.desk.hidden = true;
      }
    }
    this.#painted = false;
    this.dispatchEvent(new Event("change"));
  }

  #listen() {
    const { canvas } = this;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#at = place(event);
      this.#paint(this.#at);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) this.#paint(place(event));
    });
    canvas.addEventListener("keydown", (event) => {
      const moves = {
        ArrowLeft: [-STEP, 0],
        ArrowRight: [STEP, 0],
        ArrowUp: [0, -STEP],
        ArrowDown: [0, STEP],
      };
      const move = moves[event.key];
      if (!move && event.key !== " ") return;
      event.preventDefault();
      const to = move ? { x: within(this.#at.x + move[0]), y: within(this.#at.y + move[1]) } : this.#at;
      if (!move || event.shiftKey) this.#paint(to);
      this.#at = to;
    });
  }

  #paint(to) {
    const { width, height } = this.canvas;
    const pen = this.canvas.getContext("2d");
    pen.globalCompositeOperation = this.rub.checked ? "destination-out" : "source-over";
    pen.strokeStyle = "rgb(230 70 110)";
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = (Number(this.brush.value) / 100) * Math.min(width, height);
    pen.beginPath();
    pen.moveTo(this.#at.x * width, this.#at.y * height);
    pen.lineTo(to.x * width, to.y * height);
    pen.stroke();
    this.#at = to;
    this.#painted = true;
  }

  #clear() {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#painted = false;
  }

  /** A PNG that is transparent where the canvas is painted. */
  #mask() {
    const mask = h("canvas");
    [mask.width, mask.height] = [this.canvas.width, this.canvas.height];
    const pen = mask.getContext("2d");
    pen.fillRect(0, 0, mask.width, mask.height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(this.canvas, 0, 0);
    return new Promise((done) => mask.toBlob(done, "image/png"));
  }
}

const within = (share) => Math.min(1, Math.max(0, share));

/** The multipart body: what the service knows of the fields, the picture and its mask. */
function formOf(asked, edits, file, mask) {
  const form = new FormData();
  for (const [name, value] of Object.entries(asked)) {
    if (value === undefined || !edits.has(name)) continue;
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  form.append("image", file, "image");
  if (mask) form.append("mask", mask, "mask.png");
  return form;
}
