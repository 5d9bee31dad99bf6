// The console: talks to the same API as every other client. No framework, no build step, and text is only ever set as text.
"use strict";

const byId = (id) => document.getElementById(id);
const messages = [];
let running = null;

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function call(path, options = {}) {
  const answer = await fetch(path, { headers: headers(), ...options });
  if (answer.status === 401) byId("key-label").hidden = false;
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message || "the server answered " + answer.status);
  }
  return answer;
}

function show(role, text) {
  const box = document.createElement("article");
  box.className = role;
  const words = document.createElement("pre");
  words.textContent = text;
  const note = document.createElement("small");
  box.append(words, note);
  byId("talk").append(box);
  box.scrollIntoView({ block: "end" });
  return { words, note };
}

// Server-sent events from a fetch body: the part after the last empty line waits for more.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (held + value).split("\n\n");
    held = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue;
      if (frame === "data: [DONE]") return;
      yield JSON.parse(frame.slice(6));
    }
  }
}

function question() {
  const asked = { model: byId("model").value, messages, stream: true, stream_options: { include_usage: true } };
  if (byId("preset").value) asked.preset = byId("preset").value;
  if (byId("temperature").value !== "") asked.temperature = Number(byId("temperature").value);
  if (byId("max-tokens").value !== "") asked.max_tokens = Number(byId("max-tokens").value);
  return asked;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  const { words, note } = show("assistant", "");
  const began = performance.now();
  let first = 0;
  running = new AbortController();
  busy(true);
  try {
    const answer = await call("v1/chat/completions", {
      method: "POST", body: JSON.stringify(question()), signal: running.signal,
    });
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content) {
        first ||= performance.now();
        words.textContent += choice.delta.content;
        byId("talk").scrollTop = byId("talk").scrollHeight;
      }
      if (choice?.finish_reason === "length") note.textContent = "cut at the token limit. ";
      if (event.usage && first) {
        const seconds = (performance.now() - first) / 1000;
        const rate = (event.usage.completion_tokens - 1) / Math.max(seconds, 0.001);
        note.textContent += `${event.usage.completion_tokens} tokens, first after ${Math.round(first - began)} ms, ` +
          `then ${rate.toFixed(1)} a second`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") note.textContent = "stopped";
    else show("error", error.message);
  }
  if (words.textContent) messages.push({ role: "assistant", content: words.textContent });
  else messages.pop();
  running = null;
  busy(false);
}

function busy(on) {
  byId("send").disabled = on;
  byId("stop").disabled = !on;
}

async function fill() {
  const models = await (await call("v1/models")).json();
  byId("model").replaceChildren(...models.data.map((model) => new Option(model.id)));
  const presets = await (await call("v1/presets")).json();
  const talking = presets.data.filter((row) => Object.keys(row.sampling).length);
  const options = talking.map((row) => {
    const option = new Option(row.name);
    option.title = row.title + ". " + row.reason;
    return option;
  });
  byId("preset").replaceChildren(new Option("none", ""), ...options);
}

let before = null;
async function watch() {
  try {
    if (!byId("model").value) await fill();
    const { limits, load } = await (await call("v1/limits")).json();
    const now = performance.now();
    const rate = before ? ((load.generation_tokens - before.tokens) * 1000) / (now - before.at) : 0;
    before = { tokens: load.generation_tokens, at: now };
    const rows = {
      "running": load.running,
      "waiting": load.waiting,
      "tokens a second": rate.toFixed(1),
      "KV cache": (100 * load.kv_cache_usage).toFixed(1) + " %",
      "KV tokens": limits.kv_cache_tokens.toLocaleString(),
      "context": limits.max_model_len.toLocaleString(),
      "generated": load.generation_tokens.toLocaleString(),
    };
    byId("stats").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const detail = document.createElement("dd");
      term.textContent = name;
      detail.textContent = value;
      return [term, detail];
    }));
    byId("state").textContent = "";
  } catch (error) {
    byId("state").textContent = error.message;
  }
  setTimeout(watch, document.hidden ? 10000 : 2000);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || running) return;
  byId("text").value = "";
  ask(text);
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  byId("talk").replaceChildren();
});
byId("key").addEventListener("change", () => fill().catch(() => {}));
watch();
