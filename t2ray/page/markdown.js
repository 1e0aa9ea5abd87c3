// An answer's Markdown as elements. marked reads the text into tokens; the HTML that it could make of them is never
// made. Each kind of token has its element here, and what has none, raw HTML first of all, stays the text that it is.

import { copyButton, el } from "./dom.js";
import { lexer } from "./marked.js";

const READ = { gfm: true, breaks: true };
const LEADS = /^(https?:|mailto:)/i; // where a link may lead; any other is text
const drawn = new WeakMap(); // a block's element -> the text that it was made of

/** Shows `text` in `node`. Blocks that have not changed stay, so that a reader can mark them while the rest comes. */
export function showMarkdown(node, text) {
  const found = read(text);
  const same = found.findIndex((token, i) => drawn.get(node.children[i]) !== token.raw);
  const keep = same < 0 ? found.length : same;
  while (node.childNodes.length > keep) node.lastChild.remove();
  for (const token of found.slice(keep)) {
    const made = block(token);
    drawn.set(made, token.raw);
    node.append(made);
  }
}

function read(text) {
  try {
    return lexer(text, READ).filter(({ type }) => type !== "space");
  } catch {
    return [{ type: "text", raw: text }]; // a text made to be deeper than marked can follow
  }
}

const BLOCKS = {
  heading: ({ depth, tokens }) => el(`h${Math.min(depth + 2, 6)}`, {}, ...inline(tokens)), // the question is an h2
  paragraph: ({ tokens }) => el("p", {}, ...inline(tokens)),
  hr: () => el("hr"),
  blockquote: ({ tokens }) => el("blockquote", {}, ...blocks(tokens)),
  code: ({ text, lang }) => codeBlock(text, lang),
  list: ({ ordered, start, items }) =>
    el(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, ...items.map(item)),
  table: ({ header, rows }) =>
    el(
      "div",
      { class: "table", tabindex: 0 },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...header.map((cell) => field("th", cell)))),
        el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => field("td", cell))))),
      ),
    ),
};

const INLINE = {
  strong: ({ tokens }) => el("strong", {}, ...inline(tokens)),
  em: ({ tokens }) => el("em", {}, ...inline(tokens)),
  del: ({ tokens }) => el("del", {}, ...inline(tokens)),
  codespan: ({ text }) => el("code", {}, text),
  br: () => el("br"),
  escape: ({ raw, text }) => ("()[]".includes(text) ? raw : text), // \( and \[ begin a formula
  link: ({ raw, href, tokens }) => (LEADS.test(href) ? link(href, ...inline(tokens)) : raw),
  image: ({ raw, href, text }) => (LEADS.test(href) ? link(href, text || href) : raw), // nothing is loaded from elsewhere
};

const block = (token) =>
  Object.hasOwn(BLOCKS, token.type) ? BLOCKS[token.type](token) : el("p", {}, ...inline(token.tokens ?? [token]));

const blocks = (tokens) => tokens.filter(({ type }) => type !== "space").map(block);

const inline = (tokens) =>
  tokens.map((token) => (Object.hasOwn(INLINE, token.type) ? INLINE[token.type](token) : (token.text ?? token.raw)));

/** A list's item: its text stands without a paragraph, as Markdown has it for lists without empty lines. */
function item({ tokens }) {
  const parts = tokens.flatMap((token) => {
    if (token.type === "checkbox") return [token.checked ? "☑ " : "☐ "];
    if (token.type === "text") return inline(token.tokens ?? [token]);
    return blocks([token]);
  });
  return el("li", {}, ...parts);
}

const field = (tag, { align, tokens }) => el(tag, { "data-align": align }, ...inline(tokens));

const link = (href, ...children) =>
  el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, ...children);

/** Code in a box with its language and a button that copies it. */
export function codeBlock(text, lang) {
  const code = el("code", {}, text);
  return el(
    "div",
    { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, lang || "code"), copyButton(() => text, code)),
    el("pre", { tabindex: 0 }, code),
  );
}
