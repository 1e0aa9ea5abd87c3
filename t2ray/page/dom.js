// The page's only way to make elements. Text always becomes a text node: nothing here, or anywhere, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id; the page is broken without it. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/**
 * An element: `el("p", { class: "note" }, "text", child)`. Attributes that are null, undefined or false are left out;
 * `on` holds listeners, `vars` CSS custom properties (set through the CSSOM, which the content policy allows).
 */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, { on = {}, vars = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  for (const [name, value] of Object.entries(vars)) node.style.setProperty(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A number for people: `figure(1204)` is "1,204", `figure(0.043, 2)` "0.043" (two significant digits at least). */
export function figure(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** Says something to a screen reader without showing it. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** A button that copies `text()`; where the browser gives no clipboard, `node`, which shows it, is left marked. */
export function copyButton(text, node) {
  const button = el("button", { type: "button", class: "quiet", on: { click: copy } }, "Copy");
  return button;

  async function copy() {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      // Browsers give no clipboard to a page served over plain HTTP: leave the text marked for Ctrl+C.
      getSelection().selectAllChildren(node);
      button.textContent = "Press Ctrl+C";
    }
    announce(button.textContent);
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }
}
