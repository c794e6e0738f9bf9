// Elements by a function call.

/** An element. Properties that begin with "on" are listeners; null and false are left out. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Seconds as people read them: "0.42 s", "12.3 s", "3 min 20 s". */
export function seconds(value) {
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** "1 worker", "2 workers". */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** "worker 1", "workers 0 and 1". */
export function workers(indices) {
  const names = [...indices].map(String);
  const last = names.pop();
  return names.length ? `workers ${names.join(", ")} and ${last}` : `worker ${last}`;
}
