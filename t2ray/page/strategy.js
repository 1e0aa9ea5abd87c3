// Who answers: one of the models that the server lists, or a mixture by hand. Yields the model's name for a request.
// The sliders themselves are experts.js's.

import { byId, el } from "./dom.js";
import { keep, kept } from "./kept.js";

const HAND = "hand";

const KNOWN = {
  "t2ray:cls": ["Classification expert", "An expert trained to classify reads the request and names who answers."],
  "t2ray:prompt": ["Classification prompt", "The base model is asked what kind of request it is."],
};

/** `mixture()`: what the sliders say; `onChange(model)`: called when another model is in use. */
export function createStrategy({ mixture, onChange }) {
  const select = byId("strategy");
  const note = byId("strategy-note");
  let models = [];
  let chosen = kept("strategy");

  select.addEventListener("change", choose);

  function show(found) {
    if (JSON.stringify(found) === JSON.stringify(models)) return;
    models = found;
    const options = (kind) => models.filter((model) => model.t2ray?.kind === kind).map(option);
    const mixtures = options("mixture");
    select.replaceChildren(
      el("optgroup", { label: "For each request" }, ...options("strategy")),
      ...(mixtures.length ? [el("optgroup", { label: "Found by few-shot search" }, ...mixtures)] : []),
      el("optgroup", { label: "Always the same" }, ...options("base"), el("option", { value: HAND }, "By hand")),
    );
    const there = [...select.options].some(({ value, disabled }) => value === chosen && !disabled);
    select.value = there ? chosen : select.options[0].value; // what has gone may come back: it stays chosen
    changed();
  }

  function option({ id, t2ray }) {
    const plain = t2ray.kind === "base" ? "Base model" : id.replace(/^t2ray:(fewshot\/)?/, "");
    const name = id === "t2ray" ? "Automatic" : (KNOWN[id]?.[0] ?? plain);
    const detail = t2ray.problem ? " (unavailable)" : "";
    return el("option", { value: id, disabled: Boolean(t2ray.problem) }, name + detail);
  }

  /** The model's name for the next request. */
  function model() {
    if (select.value !== HAND) return select.value || "t2ray";
    const parts = mixture().map(([name, weight]) => `${name}:${Number(weight.toFixed(2))}`);
    return parts.length ? `t2ray:${parts.join(",")}` : "t2ray:base";
  }

  function describe() {
    if (select.value === HAND) {
      const total = mixture().reduce((sum, [, weight]) => sum + weight, 0);
      if (!total) return "All sliders are at 0: the base model alone.";
      const over = total > 1.005 ? " Above 1 the experts push further than they were trained to." : "";
      return `The weights add up to ${total.toFixed(2)}.${over}`;
    }
    const { kind, strategy } = models.find(({ id }) => id === select.value)?.t2ray ?? {};
    if (select.value === "t2ray") return KNOWN[`t2ray:${strategy}`]?.[1] ?? "The base model answers: there is nothing to choose from.";
    if (kind === "base") return "No expert: the model as it was before any training here.";
    if (kind === "mixture") return "One mixture for every request, found on a few labelled examples.";
    return KNOWN[select.value]?.[1] ?? "";
  }

  function changed() {
    note.textContent = describe();
    onChange(model());
  }

  function choose() {
    chosen = select.value;
    keep("strategy", chosen);
    changed();
  }

  /** A slider was moved: from now on the sliders decide. */
  function byHand() {
    select.value = HAND;
    choose();
  }

  return { show, model, byHand };
}
