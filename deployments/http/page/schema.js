// What the service takes, from its OpenAPI document: one description for each field.

const IMAGES = "/v1/images/generations";
const EDITS = "/v1/images/edits";
const PICTURES = new Set(["image", "image[]", "mask", "mask_image", "control", "ip_adapters", "references"]);

/** The page sets these itself. */
const OWN = new Set([
  "prompt",
  "model",
  "n",
  "stream",
  "progress",
  "partial_images",
  "response_format",
  "quality",
  "moderation",
  "style",
  "background",
  "user",
  "input_fidelity",
]);

/**
 * The fields of requests by name, in the document's order.
 * @returns {{fields: Map, edits: Map|null}} `edits`: those of requests with a picture, where there is a path.
 */
export function readDocument(document) {
  const schemas = document.components?.schemas ?? {};
  const fieldsOf = (path) => {
    const content = document.paths?.[path]?.post?.requestBody?.content ?? {};
    const body = (content["multipart/form-data"] ?? content["application/json"])?.schema;
    return body ? describe(resolve(body, schemas).properties ?? {}, schemas) : null;
  };
  return { fields: fieldsOf(IMAGES) ?? new Map(), edits: fieldsOf(EDITS) };
}

/** Whether a field is for a person to set, and is no picture. */
export const isAsked = (name) => !OWN.has(name) && !PICTURES.has(name);

function describe(properties, schemas) {
  return new Map(Object.entries(properties).map(([name, schema]) => [name, field(schema, schemas)]));
}

/** @returns {{kind, text, choices, min, max, step, parts}} of one field; null is no value of its own here. */
function field(schema, schemas) {
  const whole = resolve(schema, schemas);
  const forms = (whole.anyOf ?? whole.oneOf ?? [whole])
    .map((form) => resolve(form, schemas))
    .filter((form) => form.type !== "null");
  const choices = forms.flatMap((form) => form.enum ?? ("const" in form ? [form.const] : []));
  const found = {
    text: schema.description ?? whole.description ?? "",
    choices: choices.filter((c) => c !== null),
  };
  const of = (...types) =>
    forms.find((form) => types.includes(form.type) && !form.enum && !("const" in form));
  const number = of("integer", "number");
  const list = of("array");
  if (number) {
    const step = number.type === "integer" ? 1 : "any";
    return { ...found, kind: "number", min: number.minimum, max: number.maximum, step };
  }
  if (found.choices.length) return { ...found, kind: "choice" };
  if (of("boolean")) return { ...found, kind: "choice", choices: [true, false] };
  if (list) {
    const item = resolve(list.items ?? {}, schemas);
    if (item.properties) return { ...found, kind: "rows", parts: describe(item.properties, schemas) };
    return { ...found, kind: "json" };
  }
  return { ...found, kind: of("string") ? "text" : "json" };
}

function resolve(schema, schemas) {
  if (!schema.$ref) return schema;
  const { $ref, ...rest } = schema;
  return { ...resolve(schemas[$ref.split("/").pop()] ?? {}, schemas), ...rest };
}
