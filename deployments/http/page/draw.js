// The view to draw on: a prompt and settings in, a picture out.

import { byId, h } from "./dom.js";
import { Drawing } from "./drawing.js";
import { Fields } from "./fields.js";
import { Picture } from "./picture.js";
import { readDocument } from "./schema.js";
import { Stage } from "./stage.js";
import { Strip } from "./strip.js";

const GENERATIONS = "v1/images/generations";
const EDITS = "v1/images/edits";
const AT_ONCE = 4; // browsers keep six connections to one service, and the fleet is watched through another
const PREVIEWS = 8;
const LANDSCAPES = [
  "a lake at dusk, snowy mountains",
  "autumn trees on a meadow, a sunny day",
  "a desert at night, a full moon",
];
const IDEAS = { "builtin:landscapes": LANDSCAPES, "builtin:landscapes-sd3": LANDSCAPES };
const OTHER_IDEAS = [
  "a lighthouse in a storm, oil painting",
  "a fox asleep in autumn leaves",
  "a city street in the rain at night",
];

/** Starts the view. @returns {{offer, fail}} */
export function startDraw(needKey) {
  const fields = new Fields();
  const picture = new Picture(byId("picture"));
  let models = [];
  let taken = { fields: new Map(), edits: null };
  let underWay = 0;

  const stage = new Stage(byId("stage"), {
    "Another seed": (drawing) => submit({ ...drawing.asked, seed: undefined }, drawing.source),
    "Change one thing": (drawing) => {
      write({ ...drawing.asked, seed: drawing.result.seed });
      byId("f-prompt").focus();
    },
    "Start from this": (drawing) => (edits() ? picture.use(drawing.file) : sayNo(model().lacks.image)),
  });
  const strip = new Strip(byId("stage"), select);
  const model = () => models.find((card) => card.id === byId("f-model")?.value) ?? models[0];

  /** The fields of requests with a picture, where there is a path and the model takes them; else null. */
  const edits = () => ("image" in (model()?.lacks ?? {}) ? null : taken.edits);

  function select(drawing) {
    stage.show(drawing);
    strip.select(drawing);
  }

  function write({ prompt, model: id, ...values }) {
    byId("f-prompt").value = prompt;
    if (id && byId("f-model")) byId("f-model").value = id;
    offerFields();
    fields.write(values);
  }

  function offerFields() {
    if (!models.length) return;
    picture.offer(edits(), "mask_image" in (model().lacks ?? {}));
    const known = picture.taken && edits() ? edits() : taken.fields;
    fields.offer(known, model());
    const ideas = IDEAS[model().alias_of ?? model().id] ?? OTHER_IDEAS;
    byId("ideas").replaceChildren(
      ...ideas.map((idea) =>
        h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              class: "quiet",
              onclick: () => {
                byId("f-prompt").value = idea;
              },
            },
            idea,
          ),
        ),
      ),
    );
  }

  async function submit(asked, source) {
    if (underWay >= AT_ONCE) {
      sayNo(`${AT_ONCE} pictures are under way in this tab; wait for one, or cancel one.`);
      return;
    }
    const previews = Math.min(PREVIEWS, model().limits?.max_previews ?? 0);
    const own = { stream: true, progress: true, partial_images: previews };
    const drawing = source
      ? new Drawing(EDITS, asked, await source.form({ ...asked, ...own }, taken.edits))
      : new Drawing(GENERATIONS, asked, { ...asked, ...own });
    drawing.source = source;
    drawing.addEventListener("news", (event) => (byId("told").textContent = event.detail));
    strip.add(drawing);
    select(drawing);
    underWay += 1;
    await drawing.run();
    underWay -= 1;
    if (drawing.error) complain(drawing.error);
  }

  /** Say what is wrong with no field and no picture. */
  const sayNo = (message) => (byId("submit-error").textContent = message);

  function complain(error) {
    if (error.needsKey) needKey(error);
    else fields.blame(error.param, error.message);
  }

  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    fields.forgive();
    let asked;
    try {
      asked = { prompt: byId("f-prompt").value, ...fields.read() };
    } catch {
      return; // it is said beside the field
    }
    if (models.length > 1) asked.model = model().id;
    submit(asked, picture.taken && edits() ? picture.source() : null);
  });
  byId("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
  });
  picture.addEventListener("change", offerFields);

  return {
    offer(cards, document) {
      models = cards;
      taken = readDocument(document);
      stage.actions = Object.fromEntries(
        Object.entries(stage.actions).filter(([label]) => label !== "Start from this" || taken.edits),
      );
      byId("model-field")?.remove();
      if (cards.length > 1) byId("fields").before(modelField(cards, offerFields));
      offerFields();
      byId("submit").disabled = false;
    },
    fail: (error) => sayNo(error.message),
  };
}

function modelField(cards, changed) {
  const options = cards.map((card) =>
    h("option", { value: card.id }, card.alias_of ? `${card.id} (${card.alias_of})` : card.id),
  );
  return h(
    "div",
    { class: "field", id: "model-field" },
    h("label", { for: "f-model" }, "Model"),
    h("select", { id: "f-model", "aria-describedby": "f-model-error", onchange: changed }, options),
    h("p", { class: "error", id: "f-model-error" }),
  );
}
