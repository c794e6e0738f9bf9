// The settings of a request: a control for every field that the service takes, and errors beside them.

import { makeControl, NoValue } from "./controls.js";
import { byId, h } from "./dom.js";
import { isAsked } from "./schema.js";

/** In this order, at once; what else the service takes is under "More settings". */
const FIRST = ["negative_prompt", "size", "num_inference_steps", "guidance_scale", "seed", "gang_size"];
const LABELS = {
  negative_prompt: "Negative prompt",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  gang_size: "Gang",
  scheduler: "Scheduler",
  exchange: "Exchange",
  deadline_s: "Deadline, seconds",
  guidance_rescale: "Guidance rescale",
  guidance_end: "Guidance end",
  clip_skip: "CLIP skip",
  prompt_2: "Prompt, second encoder",
  negative_prompt_2: "Negative prompt, second encoder",
  prompt_3: "Prompt, third encoder",
  negative_prompt_3: "Negative prompt, third encoder",
  original_size: "Original size",
  crops_coords_top_left: "Cut off left, top",
  target_size: "Target size",
  output_format: "Format",
  output_compression: "Quality",
  loras: "Adapters",
  strength: "Strength",
};
/** The texts of the others are their descriptions in the document. */
const QUIET = new Set([
  "negative_prompt",
  "size",
  "num_inference_steps",
  "guidance_scale",
  "seed",
  "gang_size",
]);

/** Of a field's control; its hint and its error have this and "-hint" or "-error". */
export const idOf = (name) => `f-${name}`;

const label = (name) => LABELS[name] ?? (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

export class Fields {
  #controls = new Map();

  /** Show the fields of a model; what was typed stays where the field does. */
  offer(fields, card) {
    const typed = this.#typed();
    this.#controls.clear();
    const asked = [...fields.keys()].filter((name) => isAsked(name) && !(name in (card.lacks ?? {})));
    const names = asked.filter((name) => name !== "loras" || namesOf(card.loras).length > 0);
    const first = FIRST.filter((name) => names.includes(name));
    const rest = names.filter((name) => !first.includes(name));
    byId("fields").replaceChildren(...first.map((name) => this.#field(name, fields.get(name), card)));
    byId("more-fields").replaceChildren(...rest.map((name) => this.#field(name, fields.get(name), card)));
    byId("more").hidden = rest.length === 0;
    this.write(typed);
  }

  /** What is set, by the names of the HTTP interface; raises after it has said what is no value. */
  read() {
    const values = {};
    for (const [name, control] of this.#controls) {
      try {
        const value = control.read();
        if (value !== undefined) values[name] = value;
      } catch (error) {
        if (error instanceof NoValue) this.blame(name, error.message);
        throw error;
      }
    }
    return values;
  }

  /** Set these, and leave all others to the service. */
  write(values) {
    for (const [name, control] of this.#controls) control.write(values[name]);
  }

  /** Say what is wrong beside the field that is to blame, itself or an entry of it; whether there is one. */
  blame(param, message) {
    const id = idOf(param?.split(".")[0]);
    const element = byId(`${id}-error`);
    if (!param || !element) return false;
    element.textContent = message;
    const input = byId(id);
    input.setAttribute("aria-invalid", "true");
    const details = input.closest("details");
    if (details) details.open = true;
    input.focus();
    return true;
  }

  forgive() {
    document.querySelectorAll("#form .error").forEach((element) => (element.textContent = ""));
    document
      .querySelectorAll("#form [aria-invalid]")
      .forEach((input) => input.removeAttribute("aria-invalid"));
  }

  #typed() {
    const values = {};
    for (const [name, control] of this.#controls) {
      try {
        values[name] = control.read();
      } catch {
        // what is no value is not kept
      }
    }
    return values;
  }

  #field(name, field, card) {
    const described = { ...field, ...bounds(name, card) };
    const id = idOf(name);
    const make = { size, seed, gang_size: gang }[name];
    const control = make ? make(described, card) : makeControl(id, described, namesOf(card[name]));
    this.#controls.set(name, control);
    const told = QUIET.has(name) ? "" : described.text;
    const target = control.element.querySelector(`#${id}`) ?? control.element;
    target.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    return h(
      "div",
      { class: `field field-${name}` },
      control.group
        ? h("span", { class: "label", id: `${id}-label` }, label(name))
        : h("label", { for: id }, label(name)),
      control.element,
      h("p", { class: "hint", id: `${id}-hint` }, told),
      h("p", { class: "error", id: `${id}-error` }),
    );
  }
}

/** What a model says of a field: its own value, and its limits. */
function bounds(name, card) {
  const own = card.defaults?.[name];
  const limits = {
    num_inference_steps: "max_steps",
    guidance_scale: "max_guidance_scale",
    clip_skip: "max_clip_skip",
  };
  const found = own === null || own === undefined ? {} : { placeholder: String(own) };
  if (name in limits) found.max = card.limits?.[limits[name]];
  if (name === "negative_prompt") return { ...found, placeholder: "what it must not show" };
  return found.placeholder || !["num_inference_steps", "guidance_scale"].includes(name)
    ? found
    : { ...found, placeholder: "the model’s own" };
}

/** The names in what a model lists of a field, such as its adapters. */
const namesOf = (listed) =>
  Array.isArray(listed)
    ? listed.map((one) => (typeof one === "string" ? one : one?.name)).filter(Boolean)
    : [];

function size(field, card) {
  const [width, height] = (card.default_size ?? "x").split("x");
  const unit = card.size_unit ?? 8;
  const side = (id, named, own) =>
    h("input", {
      id,
      type: "number",
      inputmode: "numeric",
      "aria-label": named,
      placeholder: own || "auto",
      min: Math.ceil((card.limits?.min_side ?? unit) / unit) * unit,
      max: card.limits?.max_side,
      step: unit,
    });
  const across = side("f-size", "Width in pixels", width);
  const down = side("f-size-height", "Height in pixels", height);
  const turn = h(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": "Exchange width and height",
      title: "Exchange width and height",
      onclick: () => ([across.value, down.value] = [down.value, across.value]),
    },
    "⇄",
  );
  const read = () => {
    if (across.validity.badInput || down.validity.badInput) throw new NoValue("Write the sides in pixels.");
    if (!across.value && !down.value) return undefined;
    return `${across.value || width}x${down.value || height}`;
  };
  const write = (value) => ([across.value, down.value] = value ? value.split("x") : ["", ""]);
  const element = h(
    "div",
    { class: "pair", role: "group", "aria-labelledby": "f-size-label" },
    across,
    turn,
    down,
  );
  return { element, read, write, group: true };
}

function seed(field) {
  const input = h("input", {
    id: "f-seed",
    type: "text",
    inputmode: "numeric",
    placeholder: "random",
    autocomplete: "off",
  });
  const dice = h(
    "button",
    {
      type: "button",
      class: "quiet",
      "aria-label": "Draw a seed by lot",
      title: "Draw a seed by lot",
      onclick: () => (input.value = crypto.getRandomValues(new Uint32Array(1))[0]),
    },
    "⚄",
  );
  const read = () => {
    const value = input.value.trim();
    if (!value) return undefined;
    if (!/^-?\d+$/.test(value)) throw new NoValue("A seed is a whole number.");
    if (!Number.isSafeInteger(Number(value))) {
      throw new NoValue(`This page carries seeds up to ${Number.MAX_SAFE_INTEGER}; the HTTP interface all.`);
    }
    return Number(value);
  };
  return {
    element: h("div", { class: "pair" }, input, dice),
    read,
    write: (value) => (input.value = value ?? ""),
  };
}

function gang(field, card) {
  const sizes = ["auto", ...(card.gang_sizes ?? [])];
  const buttons = sizes.map((one, place) =>
    h(
      "label",
      {},
      h("input", {
        type: "radio",
        name: "gang",
        id: place ? null : "f-gang_size",
        value: one,
        checked: !place,
      }),
      String(one),
    ),
  );
  const element = h(
    "div",
    { class: "switch", role: "radiogroup", "aria-labelledby": "f-gang_size-label" },
    buttons,
  );
  const inputs = buttons.map((button) => button.firstChild);
  const read = () => {
    const chosen = inputs.find((input) => input.checked)?.value ?? "auto";
    return chosen === "auto" ? undefined : Number(chosen);
  };
  const write = (value) =>
    inputs.forEach((input) => (input.checked = input.value === String(value ?? "auto")));
  return { element, read, write, group: true };
}
