// The controls of sampling: their values for a request, checked. A number that cannot be used is told where it stands.

import { byId } from "./dom.js";
import { keep, kept } from "./kept.js";

const WHOLE = {
  "max-tokens": "Max tokens is a whole number from 1 on, or empty: then an answer may be as long as fits.",
  seed: "A seed is a whole number from 0 on, or empty: then one is drawn for each answer.",
};
const KEPT = ["temperature", "max-tokens", "seed"];

/** `onWrong()`: called before a field that cannot be used gets the focus, so that it can be brought into view. */
export function createSampling({ onWrong }) {
  const temperature = byId("temperature");
  const memory = byId("memory");
  const before = kept("sampling");
  if (before) {
    for (const id of KEPT) byId(id).value = before[id];
    memory.checked = before.memory;
  }
  for (const id of KEPT) byId(id).addEventListener("input", changed);
  memory.addEventListener("change", changed);
  show();

  function changed() {
    show();
    keep("sampling", { ...Object.fromEntries(KEPT.map((id) => [id, byId(id).value])), memory: memory.checked });
  }

  function show() {
    byId("temperature-value").textContent = temperature.value;
    temperature.style.setProperty("--at", temperature.valueAsNumber / Number(temperature.max));
    for (const [id, message] of Object.entries(WHOLE)) {
      const good = byId(id).checkValidity();
      byId(id).setAttribute("aria-invalid", String(!good));
      byId(`${id}-wrong`).hidden = good;
      byId(`${id}-wrong`).textContent = good ? "" : message;
    }
  }

  /** `{ temperature, maxTokens, seed, memory }`, of which an empty field is undefined; null where one is wrong. */
  function values() {
    const wrong = Object.keys(WHOLE).find((id) => !byId(id).checkValidity());
    if (wrong) {
      onWrong();
      byId(wrong).focus();
      return null;
    }
    const number = (id) => (byId(id).value === "" ? undefined : byId(id).valueAsNumber);
    return {
      temperature: temperature.valueAsNumber,
      maxTokens: number("max-tokens"),
      seed: number("seed"),
      memory: memory.checked,
    };
  }

  return { values };
}
