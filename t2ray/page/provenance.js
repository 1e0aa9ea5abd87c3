// What stands beside an answer: the mixture that made it, how sure the dispatcher was, times and tokens. Draws the
// response's `t2ray` object and nothing else; knows no requests. It is drawn at the first chunk and at the end.

import { el, figure, svg } from "./dom.js";
import { hueOf } from "./hues.js";

const SHOWN = 4; // probabilities before the rest is folded away: more than anyone compares at a glance

/**
 * The parts of a mixture, the largest first: `[{ name, layers: [0.7], mean: 0.7 }]`. The base model holds what the
 * weights leave of 1, as in `z' = 1 + sum of alpha (z - 1)`.
 */
export function parts(mixture) {
  const found = Object.entries(mixture).map(([name, weight]) => {
    const layers = [weight].flat();
    return { name, layers, mean: layers.reduce((sum, w) => sum + w, 0) / layers.length };
  });
  found.sort((a, b) => Math.abs(b.mean) - Math.abs(a.mean));
  const left = 1 - found.reduce((sum, part) => sum + part.mean, 0);
  if (left > 0.005) found.push({ name: null, layers: [left], mean: left });
  return found;
}

/** A strip with a stretch for each part of the mixture, as wide (or high) as its weight. */
export function strip(mixture) {
  return parts(mixture).map(({ name, mean }) =>
    el("span", { "data-hue": name === null ? "base" : hueOf(name), vars: { "--share": Math.abs(mean) } }),
  );
}

/** The bars of a response's `t2ray` object: its mixture, and what the dispatcher found. */
export function bars(t2ray) {
  return [madeBy(t2ray), dispatcher(t2ray)].filter(Boolean);
}

function bar({ label, detail = "", share, value, hue, chart = null, negative = false }) {
  return el(
    "li",
    { class: "bar", "data-hue": hue, "data-negative": negative },
    el("span", { class: "bar-name", title: label }, label, detail ? el("small", {}, ` ${detail}`) : null),
    chart ?? el("span", { class: "bar-track" }, el("span", { class: "bar-fill", vars: { "--share": share } })),
    el("span", { class: "bar-value" }, value),
  );
}

function madeBy({ mixture, versions }) {
  const all = parts(mixture);
  const most = Math.max(1, ...all.flatMap((part) => part.layers.map(Math.abs)));
  const rows = all.map(({ name, layers, mean }) =>
    bar({
      label: name ?? "base model",
      detail: name !== null && versions?.[name] !== undefined ? `v${versions[name]}` : "",
      share: Math.abs(mean) / most,
      value: layers.length > 1 ? `≈ ${mean.toFixed(2)}` : mean.toFixed(2).replace("-", "−"),
      hue: name === null ? "base" : hueOf(name),
      chart: layers.length > 1 ? byLayer(name, layers, most) : null,
      negative: mean < 0,
    }),
  );
  return el("section", { class: "alphas" }, el("h3", {}, "Made by"), el("ul", { class: "bars" }, ...rows));
}

/** One small column a layer, upward for positive weights and downward for negative ones. */
function byLayer(name, layers, most) {
  const lowest = Math.min(0, ...layers);
  const span = most - lowest;
  const columns = layers.map((weight, layer) =>
    svg(
      "rect",
      { x: layer + 0.1, width: 0.8, y: most - Math.max(weight, 0), height: Math.max(Math.abs(weight), span / 40) },
      svg("title", {}, `layer ${layer}: ${figure(weight)}`),
    ),
  );
  const label = `Weight of ${name} by layer: ${layers.map((weight) => figure(weight)).join(", ")}`;
  const box = `0 0 ${layers.length} ${span}`;
  const picture = { class: "layers", viewBox: box, preserveAspectRatio: "none", role: "img", "aria-label": label };
  return svg("svg", picture, ...columns);
}

function dispatcher({ strategy, label, probabilities }) {
  const sorted = Object.entries(probabilities ?? {}).sort((a, b) => b[1] - a[1]);
  if (!sorted.length && !label) return null;
  const rows = sorted.map(([name, share]) =>
    bar({ label: name, share, value: `${(100 * share).toFixed(1)} %`, hue: name === "others" ? "base" : hueOf(name) }),
  );
  const rest = rows.slice(SHOWN);
  return el(
    "section",
    { class: "probabilities" },
    el("h3", {}, "Dispatcher", el("small", {}, ` ${strategy} chose ${label ?? "nothing"}`)),
    el("ul", { class: "bars thin" }, ...rows.slice(0, SHOWN)),
    rest.length
      ? el("details", {}, el("summary", {}, `${rest.length} more`), el("ul", { class: "bars thin" }, ...rest))
      : null,
  );
}

/** Times, tokens, seed and model: `answer` holds null for what is not known yet. */
export function figures({ t2ray, usage, model, seed, temperature, firstMs, over }) {
  const ms = (value) => (Number.isFinite(value) ? `${figure(value)} ms` : null);
  const rate = usage && t2ray?.pass2_ms > 0 ? usage.completion_tokens / (t2ray.pass2_ms / 1000) : NaN;
  const rows = [
    ["Pass 1", t2ray && (t2ray.cached ? "cached" : t2ray.pass1_ms > 0 ? ms(t2ray.pass1_ms) : "none")],
    ["Pass 2", t2ray && (ms(t2ray.pass2_ms) ?? (over ? "cut short" : "…"))],
    ["First text", ms(firstMs)],
    ["Tokens", usage && `${usage.prompt_tokens} in, ${usage.completion_tokens} out`],
    ["Speed", Number.isFinite(rate) ? `${figure(rate)} tokens/s` : null],
    ["Seed", temperature > 0 ? String(seed) : null], // a greedy answer needs none
    ["Model", model],
  ];
  return rows
    .filter(([, value]) => value)
    .map(([name, value]) => el("div", { "data-figure": name }, el("dt", {}, name), el("dd", {}, value)));
}
