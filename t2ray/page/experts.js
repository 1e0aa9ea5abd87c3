// The list of experts: what is known of each, its heat map when it is opened, and the slider that mixes it in by hand.
// Not here: the choice between sliders and strategies (strategy.js).

import { getJson } from "./api.js";
import { byId, el } from "./dom.js";
import { heatMap } from "./heat.js";
import { hueOf } from "./hues.js";
import { keep, kept } from "./kept.js";

const FILTERED = 8; // from so many experts on, a filter helps more than it takes room

/** `onMix()`: called when a slider was moved by the user. */
export function createExperts({ onMix }) {
  const list = byId("experts");
  const filter = byId("filter");
  const weights = new Map(kept("weights") ?? []); // name -> slider's value, also of experts that are gone for the moment
  const open = new Set();
  let experts = [];

  filter.addEventListener("input", sift);
  byId("zero").addEventListener("click", () => {
    weights.clear();
    draw();
    mixed();
  });

  function show(found) {
    if (JSON.stringify(found) === JSON.stringify(experts)) return; // or a slider would jump away under the pointer
    experts = found;
    const focused = document.activeElement?.id;
    draw();
    if (focused?.startsWith("expert-")) document.getElementById(focused)?.focus();
  }

  function draw() {
    byId("experts-note").textContent = experts.length
      ? "Accuracy is on each one’s own validation prompts. Move a slider to mix them by hand."
      : "None yet: the base model answers. Train some, and they appear here by themselves.";
    byId("expert-heads").hidden = !experts.length;
    filter.hidden = experts.length < FILTERED;
    list.toggleAttribute("data-long", !filter.hidden);
    list.replaceChildren(...experts.map(row));
    sift();
    mark();
  }

  function sift() {
    const wanted = filter.value.trim().toLowerCase();
    for (const item of list.children) item.hidden = !item.dataset.name.includes(wanted);
  }

  function mixed() {
    keep("weights", [...weights]);
    onMix();
  }

  const mark = () => (byId("zero").hidden = !mixture().length);

  function row(expert) {
    const { name, version, accuracy, problem, classifies } = expert;
    const details = el("div", { class: "expert-details", id: `expert-details-${name}`, hidden: !open.has(name) });
    const opener = el(
      "button",
      {
        type: "button",
        class: "opener",
        id: `expert-${name}`,
        "aria-expanded": String(open.has(name)),
        "aria-controls": details.id,
      },
      el("span", { class: "swatch", "aria-hidden": "true" }),
      el("span", { class: "expert-name", title: name }, name),
      el("small", {}, `v${version}`),
      Number.isFinite(accuracy)
        ? el("small", { class: "accuracy" }, el("span", { class: "unseen" }, "accuracy "), `${(100 * accuracy).toFixed(0)} %`)
        : null,
    );
    const toggle = (wanted) => {
      open[wanted ? "add" : "delete"](name);
      opener.setAttribute("aria-expanded", String(wanted));
      details.hidden = !wanted;
      if (wanted && !details.childElementCount) fillDetails(details, expert);
    };
    opener.addEventListener("click", () => toggle(!open.has(name)));
    if (open.has(name)) fillDetails(details, expert);
    return el(
      "li",
      { class: "expert", "data-name": name, "data-hue": hueOf(name) },
      opener,
      problem || classifies
        ? el("span", { class: problem ? "badge bad" : "badge" }, problem ? "unavailable" : "dispatcher")
        : slider(name),
      details,
    );
  }

  function slider(name) {
    const at = weights.get(name) ?? 0;
    const output = el("output", { for: `expert-slider-${name}` }, at.toFixed(2));
    const input = el("input", {
      type: "range",
      min: 0,
      max: 1,
      step: 0.05,
      value: at,
      id: `expert-slider-${name}`,
      "aria-label": `Weight of ${name}`,
      vars: { "--at": at },
    });
    input.addEventListener("input", () => {
      weights.set(name, input.valueAsNumber);
      output.textContent = input.valueAsNumber.toFixed(2);
      input.style.setProperty("--at", input.value);
      mark();
      mixed();
    });
    return el("span", { class: "mixer" }, input, output);
  }

  async function fillDetails(details, { name, domain, accuracy, created, problem, classifies }) {
    const facts = [
      ["Domain", domain],
      ["Validation accuracy", Number.isFinite(accuracy) ? `${(100 * accuracy).toFixed(1)} %` : "unknown"],
      ["Made", created && new Date(created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })],
      ["Task", classifies ? "tells which expert a request needs" : null],
    ].filter(([, value]) => value);
    const rows = facts.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value)));
    const map = el("div", { class: "note" }, "Loading the heat map …");
    details.replaceChildren(
      ...(problem ? [el("p", { class: "failure" }, problem)] : []),
      el("dl", { class: "figures" }, ...rows),
      map,
    );
    try {
      const { heat } = await getJson(`v1/experts/${encodeURIComponent(name)}`);
      map.replaceWith(heat?.values?.length ? heatMap(heat, name) : el("p", { class: "note" }, "There is no heat map."));
    } catch (error) {
      map.textContent = `No heat map: ${error.message}`;
    }
  }

  /** What the sliders say: `[["math", 0.7], ["code", 0.3]]`, only experts that are there and above 0. */
  function mixture() {
    const usable = experts.filter(({ problem, classifies }) => !problem && !classifies);
    return usable.map(({ name }) => [name, weights.get(name) ?? 0]).filter(([, weight]) => weight > 0);
  }

  return { show, mixture };
}
