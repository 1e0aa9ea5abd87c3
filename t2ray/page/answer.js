// One answer on the page, from the moment it is asked for until it is complete, stopped or failed. Shows what it is
// given; the requests and the conversation are chat.js's.

import { announce, el } from "./dom.js";
import { bars, figures, strip } from "./provenance.js";

/**
 * `asked`: `{ model, seed, temperature, maxTokens }`; `again`: called for the button that asks the question again.
 * The result's `state` is "running", then "done", "stopped" or "failed"; `text` is what has come so far.
 */
export function createAnswer(asked, again) {
  const text = document.createTextNode("");
  const body = el("div", { class: "answer-text" }, text);
  const stripe = el("div", { class: "stripe", "aria-hidden": "true" });
  const made = el("div", { class: "made", role: "group", "aria-label": "How this answer was made" });
  const numbers = el("dl", { class: "numbers" });
  const notes = el("div", { class: "answer-notes" });
  const copyButton = el("button", { type: "button", class: "quiet", on: { click: copy } }, "Copy");
  const againButton = el("button", { type: "button", class: "quiet again", on: { click: again } }, "Ask again");
  const actions = el("div", { class: "actions", hidden: true }, copyButton, againButton);
  const node = el(
    "article",
    { class: "answer", "aria-label": "Answer", "aria-busy": "true", "data-state": "running" },
    stripe,
    el("div", { class: "answer-main" }, body, notes),
    made,
    el("footer", { class: "answer-footer" }, numbers, actions),
  );
  const started = performance.now();
  const answer = { node, state: "running", text: "", requestId: null, take, finish, stop, fail };
  const known = { ...asked, t2ray: null, usage: null, firstMs: null, over: false };
  let reason = null;
  draw();
  return answer;

  function draw() {
    numbers.replaceChildren(...figures(known));
    if (!known.t2ray) return;
    made.replaceChildren(...bars(known.t2ray));
    stripe.replaceChildren(...strip(known.t2ray.mixture));
  }

  function take(chunk) {
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content ?? "";
    if (piece) {
      known.firstMs ??= performance.now() - started;
      answer.text += piece;
      text.appendData(piece);
    }
    reason = choice?.finish_reason ?? reason;
    known.usage = chunk.usage ?? known.usage;
    known.t2ray = chunk.t2ray ?? known.t2ray;
    if (chunk.t2ray || chunk.usage) draw();
  }

  function end(state, said) {
    answer.state = state;
    known.over = true;
    node.dataset.state = state;
    node.setAttribute("aria-busy", "false");
    actions.hidden = false;
    copyButton.hidden = !answer.text;
    draw();
    announce(said);
  }

  function note(message) {
    notes.append(el("p", { class: "note" }, message));
  }

  function finish() {
    if (!answer.text) note("The model ended its answer at once, without a word.");
    if (reason === "length") note(`Cut at ${asked.maxTokens} tokens. Raise “Max tokens” for a longer answer.`);
    end("done", "The answer is complete.");
  }

  function stop() {
    note(answer.text ? "Stopped." : "Stopped before the first word; this turn is not sent along later.");
    end("stopped", "Stopped.");
  }

  function fail(error) {
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    notes.append(
      el(
        "div",
        { class: "failure", role: "alert" },
        el("p", {}, el("strong", {}, `${error.message}${wait}`)),
        el("p", { class: "note" }, "This turn is not sent along later."),
        answer.requestId || error.requestId
          ? el("p", { class: "note" }, "Request ", el("code", {}, error.requestId ?? answer.requestId))
          : null,
      ),
    );
    againButton.textContent = "Try again";
    end("failed", "");
  }

  async function copy() {
    try {
      await navigator.clipboard.writeText(answer.text);
      copyButton.textContent = "Copied";
    } catch {
      // Browsers give no clipboard to a page served over plain HTTP: leave the text marked for Ctrl+C.
      getSelection().selectAllChildren(body);
      copyButton.textContent = "Press Ctrl+C";
    }
    announce(copyButton.textContent);
    setTimeout(() => (copyButton.textContent = "Copy"), 2000);
  }
}
