// The chat page: one conversation, kept in this tab only, streamed from /v1/chat/completions.
// Everything that a model or a user wrote reaches the document through text nodes alone.
// An API key, where the server asks for one, is kept in sessionStorage: in this tab, until it closes.
"use strict";

const KEY_PLACE = "shoal-api-key";

const byId = (id) => document.getElementById(id);
const parts = {
  model: byId("model"),
  system: byId("system"),
  temperature: byId("temperature"),
  maxTokens: byId("max-tokens"),
  jsonMode: byId("json-mode"),
  conversation: byId("conversation"),
  empty: byId("empty"),
  error: byId("error"),
  document: byId("document"),
  keyForm: byId("key-form"),
  apiKey: byId("api-key"),
  keyProblem: byId("key-problem"),
  forgetKey: byId("forget-key"),
  composer: byId("composer"),
  question: byId("question"),
  clear: byId("clear"),
  copy: byId("copy"),
  stop: byId("stop"),
  send: byId("send"),
  status: byId("status"),
};

let turns = []; // {role, content} of the conversation so far
let running = null; // AbortController of the answer that streams now
let lastRequest = null; // body of the last request, for curl
let apiKey = storedKey();

// The server answered 401.
class KeyNeeded extends Error {}

async function loadModels() {
  try {
    const response = await call("v1/models");
    const found = await response.json();
    if (!response.ok) throw new Error(found.error.message);
    parts.model.replaceChildren(...found.data.map((model) => new Option(model.id, model.id)));
    parts.model.disabled = false;
    showKeyForm(false);
  } catch (error) {
    showFailure(error, `The list of models could not be read: ${error.message}`);
  }
}

// A browser may forbid storage altogether: the key then lives until the page is reloaded.
function storedKey() {
  try {
    return sessionStorage.getItem(KEY_PLACE) ?? "";
  } catch {
    return "";
  }
}

function setKey(key) {
  apiKey = key;
  try {
    if (key === "") sessionStorage.removeItem(KEY_PLACE);
    else sessionStorage.setItem(KEY_PLACE, key);
  } catch {
    return;
  }
}

function requestBody() {
  const system = parts.system.value.trim();
  const body = {
    model: parts.model.value,
    messages: system ? [{ role: "system", content: system }, ...turns] : [...turns],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (parts.temperature.value !== "") body.temperature = Number(parts.temperature.value);
  if (parts.maxTokens.value !== "") body.max_tokens = Number(parts.maxTokens.value);
  if (parts.jsonMode.checked) body.response_format = { type: "json_object" };
  return body;
}

async function ask(question) {
  showError("");
  turns.push({ role: "user", content: question });
  const asked = addTurn("user", question);
  lastRequest = requestBody();
  parts.copy.disabled = false;
  const view = addTurn("assistant", "");
  const answer = { text: "", reason: null, usage: null, numPieces: 0, firstMs: 0, startMs: performance.now() };
  setRunning(new AbortController());
  view.turn.classList.add("writing");
  try {
    await readAnswer(lastRequest, running.signal, (chunk) => takeChunk(answer, view, chunk));
  } catch (error) {
    if (error.name === "AbortError") answer.reason = "stopped";
    else showFailure(error, error.message);
  }
  view.turn.classList.remove("writing");
  setRunning(null);
  if (answer.text === "" && answer.reason === null) takeBack(asked, view);
  else finish(answer, view);
}

// Nothing was said: the question goes back to where it can be changed and sent again.
function takeBack(asked, view) {
  const { content } = turns.pop();
  asked.turn.remove();
  view.turn.remove();
  parts.empty.hidden = turns.length > 0;
  parts.status.textContent = "";
  if (parts.question.value === "") parts.question.value = content;
}

function takeChunk(answer, view, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.finish_reason) answer.reason = choice.finish_reason;
  const piece = choice.delta.content;
  if (!piece) return;
  if (answer.numPieces === 0) answer.firstMs = performance.now();
  answer.numPieces += 1;
  answer.text += piece;
  const isAtEnd = isScrolledToEnd();
  view.text.append(piece);
  if (isAtEnd) scrollToEnd();
}

function finish(answer, view) {
  turns.push({ role: "assistant", content: answer.text });
  const isAtEnd = isScrolledToEnd();
  view.facts.textContent = facts(answer);
  if (isAtEnd) scrollToEnd();
  parts.status.textContent = answer.reason === "stopped" ? "Stopped." : "Answer complete.";
}

function facts(answer) {
  const numTokens = answer.usage ? answer.usage.completion_tokens : answer.numPieces;
  const shown = [`${numTokens} tokens`];
  if (answer.numPieces > 0) {
    const seconds = (performance.now() - answer.firstMs) / 1000;
    shown.push(`first after ${Math.round(answer.firstMs - answer.startMs)} ms`);
    if (numTokens > 1 && seconds > 0) shown.push(`${((numTokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (answer.reason === "length") shown.push("cut at the most tokens");
  if (answer.reason === "stopped") shown.push("stopped");
  return shown.join(" · ");
}

// --- the wire --------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey !== "") headers.authorization = `Bearer ${apiKey}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) throw new KeyNeeded();
  return response;
}

async function readAnswer(body, signal, onChunk) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await errorText(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((text) => text.startsWith("data: "));
      if (!line) continue;
      if (line === "data: [DONE]") return;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      onChunk(chunk);
    }
  }
}

async function errorText(response) {
  try {
    return `${(await response.json()).error.message} (${response.status})`;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function curlCommand(body) {
  const quoted = JSON.stringify(body).replaceAll("'", `'\\''`);
  const address = new URL("v1/chat/completions", document.baseURI);
  const grant = apiKey === "" ? "" : ` -H "authorization: Bearer $SHOAL_API_KEY"`;
  return `curl -N ${address}${grant} -H 'content-type: application/json' -d '${quoted}'`;
}

// --- the document ----------------------------------------------------------------------------

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.append(text);
  return made;
}

function addTurn(role, content) {
  parts.empty.hidden = true;
  const turn = element("article", `turn ${role}`, "");
  const text = element("p", "text", content);
  text.dir = "auto";
  const factsLine = element("p", "facts", "");
  turn.append(element("h2", "", role === "user" ? "You" : "Model"), text);
  if (role === "assistant") turn.append(factsLine);
  parts.conversation.append(turn);
  scrollToEnd();
  return { turn, text, facts: factsLine };
}

function isScrolledToEnd() {
  const { scrollTop, scrollHeight, clientHeight } = parts.conversation;
  return scrollHeight - scrollTop - clientHeight < 48;
}

function scrollToEnd() {
  parts.conversation.scrollTop = parts.conversation.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  const isRunning = controller !== null;
  parts.send.hidden = isRunning;
  parts.stop.hidden = !isRunning;
  parts.clear.disabled = isRunning;
  parts.conversation.setAttribute("aria-busy", String(isRunning));
  if (isRunning) parts.status.textContent = "The model is writing…";
}

function showError(message) {
  parts.error.textContent = message;
  parts.error.hidden = message === "";
}

// A missing or wrong key is asked for; everything else is told.
function showFailure(error, message) {
  if (!(error instanceof KeyNeeded)) return showError(message);
  showKeyProblem(apiKey === "" ? "" : "The server does not know this key, or it has expired.");
  setKey("");
  showKeyForm(true);
}

function showKeyForm(isNeeded) {
  parts.keyForm.hidden = !isNeeded;
  parts.composer.hidden = isNeeded;
  parts.forgetKey.hidden = apiKey === "";
  parts.document.hidden = isNeeded || apiKey !== ""; // a link cannot carry a key
  (isNeeded ? parts.apiKey : parts.question).focus();
}

function showKeyProblem(message) {
  parts.keyProblem.textContent = message;
  parts.keyProblem.hidden = message === "";
}

parts.keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  const key = parts.apiKey.value.trim();
  parts.apiKey.value = "";
  showError("");
  if (!/^[\x21-\x7e]+$/.test(key)) return showKeyProblem("That is not an API key.");
  showKeyProblem("");
  setKey(key);
  loadModels();
});

parts.forgetKey.addEventListener("click", () => {
  setKey("");
  loadModels();
});

parts.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = parts.question.value.trim();
  if (running || question === "") return;
  parts.question.value = "";
  ask(question);
});

parts.question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  parts.composer.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

parts.stop.addEventListener("click", () => {
  running?.abort();
  parts.question.focus();
});

parts.clear.addEventListener("click", () => {
  turns = [];
  parts.conversation.replaceChildren(parts.empty);
  parts.empty.hidden = false;
  showError("");
  parts.status.textContent = "";
  parts.question.focus();
});

parts.copy.addEventListener("click", async () => {
  const command = curlCommand(lastRequest);
  try {
    await navigator.clipboard.writeText(command);
    parts.status.textContent = "Copied.";
  } catch {
    showError(`Copying is not allowed here. The command: ${command}`);
  }
});

parts.question.focus();
loadModels();
