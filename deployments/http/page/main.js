// Starts the page: which view is shown, the key, and what the service offers.

import { byId } from "./dom.js";
import { startDraw } from "./draw.js";
import { ask, key } from "./service.js";
import { startWatch } from "./watch.js";

const VIEWS = ["draw", "watch"];
const watch = startWatch(byId("watch"), askForKey);
const draw = startDraw(askForKey);

function showView() {
  const shown = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : VIEWS[0];
  for (const view of VIEWS) {
    byId(view).hidden = view !== shown;
    const link = byId(`to-${view}`);
    if (view === shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = shown === "watch" ? "Watch · distriray" : "distriray";
  watch.show(shown === "watch" && !document.hidden);
}

/** Learn what the service offers; again when a key was entered. */
async function meet() {
  try {
    const [models, document] = await Promise.all([ask("v1/models"), ask("openapi.json")]);
    draw.offer(models.data, document);
    showView();
  } catch (error) {
    if (error.needsKey) askForKey(error);
    else draw.fail(error);
  }
}

function askForKey(error) {
  const dialog = byId("key-dialog");
  byId("key-reason").textContent = error && key.get() ? error.message : "";
  byId("key").value = key.get();
  if (!dialog.open) dialog.showModal();
}

byId("key-button").addEventListener("click", () => askForKey(null));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key-dialog").close();
  meet();
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
window.addEventListener("hashchange", () => {
  showView();
  scrollTo(0, 0);
});
document.addEventListener("visibilitychange", showView);
showView();
meet();
