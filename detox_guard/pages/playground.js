// The playground: asks the server as any client would, and shows what came. Knows the API; keeps nothing.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { models: [], loose: false, view: "chat", turns: [], stop: null, key: "", last: "Hello!" };

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function headers() {
  return { "Content-Type": "application/json", ...(state.key && { Authorization: `Bearer ${state.key}` }) };
}

// --- what is asked

function passages() {
  return $("passages").value.split(/\n\s*\n/).map((one) => one.trim()).filter(Boolean);
}

function withPassages(text) {
  const found = passages();
  if (!found.length) return text;
  const shown = found.map((one, i) => `[${i + 1}] ${one}`).join("\n\n");
  return $("raw").checked ? `${shown}\n\n${text}` : `Passages:\n\n${shown}\n\nWith these passages in mind: ${text}`;
}

function isRaw() {
  return $("raw").checked || !modelNow()?.detox.chat;
}

function modelNow() {
  return state.models.find((one) => one.id === $("model").value);
}

function request(text, detox, turns = []) {
  const body = {
    model: $("model").value,
    max_tokens: Number($("length").value) || 60,
    temperature: Number($("temperature").value),
    detox,
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if (isRaw()) return { ...body, prompt: withPassages(text) };
  const system = $("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  return { ...body, messages: [...first, ...turns, { role: "user", content: withPassages(text) }] };
}

function steered() {
  if (!modelNow()?.detox.steered) return { alpha: 0 };
  return { alpha: Number($("alpha").value), rule: $("rule").value };
}

function guarded() {
  const guard = { threshold: Number($("threshold").value) };
  if (state.loose) guard.keep_discarded = true;
  return { ...steered(), guard };
}

const WAYS = {
  plain: () => ({ alpha: 0, guard: false }),
  steered: () => ({ ...steered(), guard: false }),
  guarded,
};

function canBeShown(way) {
  return way !== "steered" || modelNow()?.detox.steered;
}

// --- what comes

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(body, panel, signal) {
  const reply = replyIn(panel);
  panel.classList.add("busy");
  try {
    const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
    const told = { ...body, stream: true, detox: { ...body.detox, trace: true } };
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(told), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      reply.grow(choice.delta ? choice.delta.content ?? "" : choice.text, choice.detox?.trace ?? []);
      if (choice.finish_reason) reply.end(choice);
    }
    return reply.whole;
  } catch (error) {
    const words = error.name === "AbortError" ? "Stopped." : error.message;
    panel.append(element("p", { className: "facts failed", textContent: words }));
    return null;
  } finally {
    panel.classList.remove("busy");
  }
}

// A reply as it comes: its tokens, and behind them the text whose tokens were not told yet.
function replyIn(panel) {
  const text = panel.querySelector(".text");
  const figures = panel.querySelector(".figures");
  const rest = document.createTextNode("");
  const tokens = [];
  let told = 0;
  text.append(rest);
  moveAlong(text, tokens);
  return {
    whole: "",
    grow(piece, trace) {
      this.whole += piece;
      for (const one of trace) {
        const token = tokenOf(one, figures);
        if (!tokens.length) token.tabIndex = 0;
        tokens.push(token);
        rest.before(token);
        told += one.text.length;
      }
      rest.data = this.whole.slice(told);
    },
    end(choice) {
      const detox = choice.detox;
      for (const one of detox.interventions) (tokens[one.start] ?? rest).before(takenBack(one));
      const facts = [
        choice.finish_reason,
        `${detox.trace ? tokens.length : "?"} tokens`,
        `alpha ${detox.alpha.toFixed(2)}`,
        `KL ${detox.mean_kl_steering.toFixed(2)} nats a token`,
      ];
      if (detox.guard) facts.push(`guard: ${detox.guard}, ${detox.interventions.length} taken back`);
      panel.querySelector(".facts").textContent = facts.join(" · ");
    },
  };
}

function tokenOf(token, figures) {
  const told = token.preferred !== undefined; // a server whose guard is fixed does not tell it
  const replaced = told && token.preferred_id !== token.token_id && token.strength > 0.02;
  const made = element("span", { className: replaced ? "t replaced" : "t", textContent: token.text, tabIndex: -1 });
  made.style.setProperty("--s", token.strength.toFixed(2));
  const tell = () => {
    figures.textContent = [
      `${JSON.stringify(token.text)}: before ${token.p_before.toFixed(3)}, after ${token.p_after.toFixed(3)}`,
      ...(told ? [`plain model's first choice: ${JSON.stringify(token.preferred)} at ${token.preferred_p.toFixed(3)}`] : []),
      `KL of steering ${(token.kl_steering ?? 0).toFixed(2)}, of the detoxifier ${(token.kl_detoxifier ?? 0).toFixed(2)} nats`,
      `${(100 * token.clipped_mass).toFixed(0)} % of the nucleus was removed`,
    ].join("\n");
  };
  made.addEventListener("focus", tell);
  made.addEventListener("pointerenter", tell);
  return made;
}

function takenBack(one) {
  const next = one.next_alpha === null ? one.action : `decoded again at alpha ${one.next_alpha}`;
  const words = `↶ ${one.tokens} tokens taken back`;
  const text = one.text ?? "The server does not tell this text.";
  return element(
    "details",
    { className: "back" },
    element("summary", { textContent: words }),
    `score ${one.score.toFixed(2)} over ${one.threshold.toFixed(2)}; ${next}`,
    element(one.text === null ? "span" : "s", { textContent: text }),
  );
}

function moveAlong(text, tokens) {
  text.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (at < 0 || to === undefined || !tokens[to]) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  });
}

// --- what is on the page

function panelOf(title) {
  const text = element("div", { className: "text" });
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${title}: reply`);
  const figures = element("p", { className: "figures" });
  figures.setAttribute("role", "status");
  const heading = element("h3", { textContent: title });
  return element("article", { className: "reply" }, heading, text, element("p", { className: "facts" }), figures);
}

async function send(text) {
  const three = state.view === "compare";
  const names = three && state.loose ? Object.keys(WAYS).filter(canBeShown) : ["guarded"];
  const panels = names.map((name) => panelOf(three ? name : "Reply"));
  const replies = element("div", { className: three ? "replies three" : "replies" }, ...panels);
  $("log").append(element("p", { className: "asked", textContent: text }), replies);
  const turns = three || isRaw() ? [] : [...state.turns];
  const bodies = names.map((name) => request(text, WAYS[name](), turns));
  state.stop = new AbortController();
  busy(true);
  const said = await Promise.all(bodies.map((body, i) => ask(body, panels[i], state.stop.signal)));
  busy(false);
  $("said").textContent = said.every((one) => one === null) ? "No reply came." : "The reply is whole.";
  if (!three && !isRaw() && said[0] !== null) {
    state.turns.push(bodies[0].messages.at(-1), { role: "assistant", content: said[0] });
  }
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
}

function reset() {
  state.stop?.abort();
  state.turns = [];
  $("log").replaceChildren();
}

function setView(view) {
  state.view = view;
  $("conversation").textContent = view === "chat" ? "Chat" : "Plain, steered and guarded, side by side";
  for (const name of ["chat", "compare"]) $(`view-${name}`).setAttribute("aria-pressed", String(name === view));
  $("notice").textContent =
    view === "compare" && !state.loose ? "This server guards every reply, so there is nothing to compare with." : "";
  reset();
}

async function load() {
  const response = await fetch("/v1/models", { headers: headers() });
  $("key-field").hidden = response.status !== 401 && !state.key;
  if (!response.ok) {
    $("notice").textContent = (await response.json()).error.message;
    return;
  }
  const told = await response.json();
  $("notice").textContent = "";
  state.models = told.data;
  state.loose = told.detox.allow_unguarded;
  $("model").replaceChildren(...told.data.map((one) => element("option", { value: one.id, textContent: one.id })));
  const most = told.detox.guard_threshold;
  if (most !== null) $("threshold").value = most;
  if (most !== null && !state.loose) $("threshold").max = most;
  $("threshold").dispatchEvent(new Event("input"));
}

// --- the same in code

function code(kind) {
  const body = request($("prompt").value.trim() || state.last, guarded(), isRaw() ? [] : state.turns);
  if (body.detox.guard) delete body.detox.guard.keep_discarded;
  const base = `${location.origin}/v1`;
  const key = state.key ? "YOUR_KEY" : "none";
  const path = body.messages ? "chat/completions" : "completions";
  if (kind === "curl") {
    const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
    const bearer = state.key ? ` -H "Authorization: Bearer ${key}"` : "";
    return `curl ${base}/${path} -H "Content-Type: application/json"${bearer} -d '${quoted}'`;
  }
  const { detox, ...rest } = body;
  const words = Object.entries(rest).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  const extra = `    extra_body={"detox": ${python(detox)}},\n`;
  if (kind === "python") {
    const call = body.messages ? "chat.completions" : "completions";
    const said = body.messages ? "message.content" : "text";
    return `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="${key}")\nreply = client.${call}.create(\n${words}${extra})\nprint(reply.choices[0].${said})`;
  }
  const { messages, prompt, ...fields } = rest;
  const made = Object.entries(fields).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  const asked = python(messages ?? prompt);
  return `from langchain_openai import ChatOpenAI\n\nllm = ChatOpenAI(\n    base_url="${base}",\n    api_key="${key}",\n${made}${extra})\nprint(llm.invoke(${asked}).content)`;
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one)}`).join(", ")}}`;
}

async function copy(kind) {
  $("code").textContent = code(kind);
  $("code").hidden = false;
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("said").textContent = "Copied.";
  } catch {
    $("said").textContent = "The code is shown below; copy it there.";
  }
}

// --- what the reader does

for (const name of ["alpha", "threshold", "temperature"]) {
  $(name).addEventListener("input", () => ($(`${name}-out`).textContent = $(name).value));
}
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || $("send").disabled) return;
  $("prompt").value = "";
  state.last = text;
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", () => state.stop?.abort());
$("reset").addEventListener("click", reset);
$("view-chat").addEventListener("click", () => setView("chat"));
$("view-compare").addEventListener("click", () => setView("compare"));
$("use-key").addEventListener("click", () => {
  state.key = $("key").value.trim();
  load();
});
for (const button of document.querySelectorAll("[data-code]")) {
  button.addEventListener("click", () => copy(button.dataset.code));
}
load();
