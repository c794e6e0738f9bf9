// A colour for each request, the same wherever it is shown.

const COLOURS = 10; // as many as page.css has classes r0 … r9
const turns = new Map();
let next = 0;

/** The class of a request's colour. Requests that come one after the other have different ones. */
export function colourOf(request) {
  if (!turns.has(request)) {
    turns.set(request, next++ % COLOURS);
    if (turns.size > 2000) turns.delete(turns.keys().next().value);
  }
  return `r${turns.get(request)}`;
}

/** The short name of a request. */
export const shortName = (request) => request.slice(0, 6);
