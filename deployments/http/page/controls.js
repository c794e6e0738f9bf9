// One control for each kind of field. Each has `element`, `read()`, which gives undefined for what is left
// to the service, and `write(value)`.

import { h } from "./dom.js";

/** Raised by `read` for what is typed but is no value. */
export class NoValue extends Error {}

export function makeControl(id, field, offered) {
  const make = { number, choice, rows, json, text }[field.kind];
  return make(id, field, offered);
}

function number(id, field) {
  if (field.choices.length) return choice(id, { ...field, choices: field.choices });
  const input = h("input", {
    id,
    type: "number",
    inputmode: field.step === 1 ? "numeric" : "decimal",
    min: field.min,
    max: field.max,
    step: field.step,
    placeholder: field.placeholder,
  });
  const read = () => {
    if (input.validity.badInput) throw new NoValue("Write a number.");
    return input.value === "" ? undefined : Number(input.value);
  };
  return { element: input, read, write: (value) => (input.value = value ?? "") };
}

function text(id, field) {
  const input = h("input", { id, type: "text", placeholder: field.placeholder, autocomplete: "off" });
  return {
    element: input,
    read: () => input.value || undefined,
    write: (value) => (input.value = value ?? ""),
  };
}

function choice(id, field) {
  const empty = h("option", { value: "" }, field.placeholder ?? "as the model has it");
  const select = h("select", { id }, empty);
  select.append(...field.choices.map((value, place) => h("option", { value: place + 1 }, String(value))));
  const read = () => (select.value ? field.choices[select.value - 1] : undefined);
  const write = (value) => (select.value = field.choices.indexOf(value) + 1 || "");
  return { element: select, read, write };
}

function json(id) {
  const area = h("textarea", { id, rows: 2, spellcheck: "false", placeholder: "JSON" });
  const read = () => {
    if (!area.value.trim()) return undefined;
    try {
      return JSON.parse(area.value);
    } catch (error) {
      throw new NoValue(`This is no JSON: ${error.message}`);
    }
  };
  return {
    element: area,
    read,
    write: (value) => (area.value = value === undefined ? "" : JSON.stringify(value)),
  };
}

/** A list of small objects, such as adapters with their scales. `offered` are names that the model has. */
function rows(id, field, offered = []) {
  const lines = h("div", { class: "rows" });
  const add = h("button", { id, type: "button", onclick: () => line({}).focus() }, "Add");
  const element = h("div", { class: "rows-field" }, lines, add);
  const known = new Map();

  function line(values) {
    const controls = [...field.parts].map(([name, part]) => {
      const described =
        name === "name" && offered.length ? { ...part, kind: "choice", choices: offered } : part;
      const control = makeControl(null, { ...described, placeholder: name });
      control.element.setAttribute("aria-label", name);
      control.write(values[name]);
      return [name, control];
    });
    const remove = h("button", { type: "button", class: "quiet", "aria-label": "Remove" }, "×");
    const row = h(
      "div",
      { class: "row" },
      controls.map(([, control]) => control.element),
      remove,
    );
    remove.addEventListener("click", () => {
      known.delete(row);
      row.remove();
      add.focus();
    });
    known.set(row, controls);
    lines.append(row);
    return controls[0][1].element;
  }

  const read = () => {
    const values = [...known.values()].map((controls) =>
      Object.fromEntries(
        controls.map(([name, one]) => [name, one.read()]).filter(([, v]) => v !== undefined),
      ),
    );
    return values.length ? values : undefined;
  };
  const write = (values) => {
    lines.replaceChildren();
    known.clear();
    (values ?? []).forEach(line);
  };
  return { element, read, write };
}
