// A colour and a name for each request, the same wherever it is shown.

const COLOURS = 10; // as many as page.css has classes r0 … r9
const KEPT = 2000;
const turns = new Map();
const prompts = new Map();
let next = 0;

/** The class of a request's colour. Requests that come one after the other have different ones. */
export function colourOf(request) {
  if (!turns.has(request)) {
    turns.set(request, next++ % COLOURS);
    bound(turns);
  }
  return `r${turns.get(request)}`;
}

/** Call a request of this tab by its prompt. */
export function nameRequest(request, prompt) {
  prompts.set(request, prompt);
  bound(prompts);
}

/** What a request is called: by its prompt where this tab knows it, else by the beginning of its id. */
export const nameOf = (request) => prompts.get(request) ?? request.slice(0, 8);

function bound(map) {
  if (map.size > KEPT) map.delete(map.keys().next().value);
}
