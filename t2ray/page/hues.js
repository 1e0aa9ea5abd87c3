// One colour for each expert wherever it shows up: eight that are told apart in light and dark, given out in the order
// in which names are first seen. The colours themselves are in style.css; text never depends on them alone.

const seen = new Map();

/** The value of `data-hue` for an expert's name. */
export function hueOf(name) {
  if (!seen.has(name)) seen.set(name, seen.size % 8);
  return String(seen.get(name));
}
