// One answer on the page, from the moment it is asked for until it is complete, stopped or failed. Shows what it is
// given; the requests and the conversation are chat.js's.

import { announce, copyButton, el } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { bars, figures, strip } from "./provenance.js";

/** The record of an answer that is asked for: plain JSON, all that is needed to show the answer again. */
const asking = (asked) => ({
  asked,
  state: "running",
  text: "",
  reasoning: "",
  plain: false,
  reason: null,
  t2ray: null,
  usage: null,
  firstMs: null,
  requestId: null,
  error: null,
});

/**
 * `asked`: `{ model, seed, temperature, maxTokens }`; `again`: called for the button that asks the question again;
 * `saved`: the record of an answer from before a reload. The record's `state` is "running", then "done", "stopped" or
 * "failed"; `text` is what has come so far, behind the model's `reasoning`.
 */
export function createAnswer(asked, again, saved = null) {
  const record = saved ?? asking(asked);
  const body = el("div", { class: "answer-text" });
  const thought = el("p", {});
  const reasoning = el("details", { class: "reasoning" }, el("summary", {}, "Reasoning"), thought);
  const stripe = el("div", { class: "stripe", "aria-hidden": "true" });
  const made = el("div", { class: "made", role: "group", "aria-label": "How this answer was made" });
  const numbers = el("dl", { class: "numbers" });
  const notes = el("div", { class: "answer-notes" });
  const plain = el("button", { type: "button", class: "quiet", on: { click: turnPlain } }, "As written");
  const copy = copyButton(() => record.text, body);
  const repeat = el("button", { type: "button", class: "quiet again", on: { click: again } }, "Ask again");
  const actions = el("div", { class: "actions", hidden: true }, plain, copy, repeat);
  const node = el(
    "article",
    { class: "answer", "aria-label": "Answer" },
    stripe,
    el("div", { class: "answer-main" }, reasoning, body, notes),
    made,
    el("footer", { class: "answer-footer" }, numbers, actions),
  );
  const started = performance.now();
  if (record.state === "running" && saved) record.state = "stopped"; // the page was left before its end
  write();
  draw();
  settle();
  return { node, record, take, finish, stop, fail };

  function write() {
    reasoning.hidden = !record.reasoning;
    thought.textContent = record.reasoning;
    body.toggleAttribute("data-plain", record.plain);
    if (record.plain) body.textContent = record.text;
    else showMarkdown(body, record.text);
  }

  function draw() {
    numbers.replaceChildren(...figures({ ...record, ...record.asked, over: record.state !== "running" }));
    if (!record.t2ray) return;
    made.replaceChildren(...bars(record.t2ray));
    stripe.replaceChildren(...strip(record.t2ray.mixture));
  }

  function take(chunk) {
    const choice = chunk.choices?.[0];
    const { content, reasoning_content: more } = choice?.delta ?? {};
    if (content || more) {
      record.firstMs ??= performance.now() - started;
      record.text += content ?? "";
      record.reasoning = (record.reasoning ?? "") + (more ?? "");
      write();
    }
    record.reason = choice?.finish_reason ?? record.reason;
    record.usage = chunk.usage ?? record.usage;
    record.t2ray = chunk.t2ray ?? record.t2ray;
    if (chunk.t2ray || chunk.usage) draw();
  }

  function turnPlain() {
    record.plain = !record.plain;
    plain.setAttribute("aria-pressed", String(record.plain));
    body.replaceChildren();
    write();
  }

  /** Draws the state. The way back to the text as it was written is offered where Markdown has changed it. */
  function settle() {
    const running = record.state === "running";
    node.dataset.state = record.state;
    node.setAttribute("aria-busy", String(running));
    if (running) return;
    plain.setAttribute("aria-pressed", String(record.plain));
    plain.hidden = !record.plain && body.textContent.trim() === record.text.trim();
    copy.hidden = !record.text;
    repeat.textContent = record.state === "failed" ? "Try again" : "Ask again";
    actions.hidden = false;
    notes.replaceChildren(...remarks());
  }

  function remarks() {
    const { state, text, reason, error } = record;
    const note = (...words) => el("p", { class: "note" }, ...words);
    const limit = record.asked.maxTokens ? `${record.asked.maxTokens} tokens` : "the longest that fits";
    if (state === "failed") return [failure(error, note)];
    if (state === "stopped") {
      return [note(text ? "Stopped." : "Stopped before the first word; this turn is not sent along later.")];
    }
    if (!text && !record.reasoning) return [note("The model ended its answer at once, without a word.")];
    return reason === "length" ? [note(`Cut at ${limit}. Raise “Max tokens” for a longer answer.`)] : [];
  }

  function failure({ message, retryAfter, requestId }, note) {
    const id = requestId ?? record.requestId;
    const wait = retryAfter ? ` Try again in ${retryAfter} s.` : "";
    return el(
      "div",
      { class: "failure", role: "alert" },
      el("p", {}, el("strong", {}, `${message}${wait}`)),
      note("This turn is not sent along later."),
      id ? note("Request ", el("code", {}, id)) : null,
    );
  }

  function end(state, said) {
    record.state = state;
    draw();
    settle();
    announce(said);
  }

  function finish() {
    end("done", "The answer is complete.");
  }

  function stop() {
    end("stopped", "Stopped.");
  }

  function fail({ message, retryAfter, requestId }) {
    record.error = { message, retryAfter, requestId };
    end("failed", "");
  }
}
