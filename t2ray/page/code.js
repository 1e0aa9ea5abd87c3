// "Use it from code": the request that the page would make next, for a shell and for Python.

import { hasKey } from "./api.js";
import { byId } from "./dom.js";
import { codeBlock } from "./markdown.js";

/** Opens the dialog; `asked` is what `settings` in app.js returns. */
export function showCode(asked, question) {
  const base = new URL("v1", document.baseURI).href;
  byId("code-note").textContent = hasKey()
    ? "The API is OpenAI’s. Put the key into the environment variable T2RAY_API_KEY."
    : "The API is OpenAI’s. This server asks for no key.";
  byId("code-blocks").replaceChildren(
    codeBlock(curl(base, asked, question), "curl"),
    codeBlock(python(base, asked, question), "Python: pip install openai"),
  );
  byId("code-dialog").showModal();
}

/** The fields of a request beside its messages, by their names in the API. */
const fields = ({ temperature, maxTokens, seed }) =>
  Object.entries({ temperature, max_tokens: maxTokens, seed }).filter(([, value]) => value !== undefined);

function curl(base, asked, question) {
  const body = { model: asked.model, messages: [{ role: "user", content: question }], ...Object.fromEntries(fields(asked)) };
  const lines = Object.entries(body).map(([name, value]) => `  "${name}": ${JSON.stringify(value)}`);
  const json = `{\n${lines.join(",\n")}\n}`.replaceAll("'", "\\u0027"); // it stands between single quotes
  const key = hasKey() ? '  -H "Authorization: Bearer $T2RAY_API_KEY" \\\n' : "";
  return `curl ${base}/chat/completions \\\n  -H "Content-Type: application/json" \\\n${key}  -d '${json}'`;
}

function python(base, asked, question) {
  const text = JSON.stringify; // a JSON text is a Python text
  const key = hasKey() ? 'os.environ["T2RAY_API_KEY"]' : '"none"';
  return [
    ...(hasKey() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${text(base)}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    `    model=${text(asked.model)},`,
    `    messages=[{"role": "user", "content": ${text(question)}}],`,
    ...fields(asked).map(([name, value]) => `    ${name}=${value},`),
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}
