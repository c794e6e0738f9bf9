// Calls to the service that sent this page, with the key that was entered in this tab.

const ROOT = new URL("../", import.meta.url);
const KEY = "distriray key";

/** An answer that is no success: the service's own sentence, the field that it names, and its code. */
export class Refusal extends Error {
  constructor(status, { message, param = null, code = "unknown" }) {
    super(message);
    Object.assign(this, { status, param, code });
  }

  get needsKey() {
    return this.status === 401;
  }
}

/** The key lives as long as the tab. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The JSON of an answer. */
export async function ask(path) {
  return (await send(path, {})).json();
}

/**
 * The `data` of each server-sent event of an answer. To leave the loop ends the request.
 * @param body an object, sent as JSON, or FormData.
 */
export async function* stream(path, { body, signal } = {}) {
  const options = { signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = body instanceof FormData ? body : JSON.stringify(body);
    if (!(body instanceof FormData)) options.headers = { "Content-Type": "application/json" };
  }
  const answer = await send(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const frames = (text + value).split("\n\n");
      text = frames.pop();
      for (const frame of frames) {
        const data = frame.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(new URL(path, ROOT), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "The service cannot be reached.", code: "unreachable" });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refusal(answer.status, told?.error ?? { message: `The service answered ${answer.status}.` });
}
