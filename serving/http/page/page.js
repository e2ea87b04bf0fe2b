// The page: asks the server's own API and shows what comes, token by token.
// Whatever the server or the model says is set as text (`textContent`), never as HTML.

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
let apiKey = ""; // in memory only
let model = null; // name and limits, from /live
let asking = null; // the AbortController of the answer that is coming
let history = []; // of the chat: what the next question is asked after

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// -- The server ----------------------------------------------------------------------------------------------------

// An error in the server's own words. `status` 0: no answer came at all.
class ServerError extends Error {
  constructor(status, error, requestId) {
    super(error.message ?? `The server answered ${status}.`);
    this.status = status;
    this.details = [status || null, error.code, error.param && `field ${error.param}`, requestId && `request ${requestId}`]
      .filter(Boolean).join(" · ");
  }
}

async function call(path, body, signal) {
  const headers = apiKey ? { authorization: `Bearer ${apiKey}` } : {};
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store", credentials: "omit" };
  const response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "The server could not be reached. It may be restarting, or the network is down." });
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const failure = new ServerError(response.status, answer.error ?? {}, response.headers.get("x-request-id"));
  if (response.status === 401) demandKey(failure.message);
  throw failure;
}

// The data of server-sent events, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") return;
        if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  throw new ServerError(0, { message: "The connection broke before the answer was complete." });
}

function demandKey(message) {
  $("key-error").textContent = apiKey ? message : "";
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  if (/^[\x21-\x7e]+$/.test(apiKey)) return watch();
  apiKey = ""; // could not be sent in a header
  $("key-error").textContent = "A key has printable ASCII characters only, without spaces.";
});

// -- What the server does now --------------------------------------------------------------------------------------

const PERIOD = 1000;
const rates = []; // tokens a second, a number for each look
let last = null; // the snapshot before
let misses = 0;
let timer = 0;
let looks = 0; // tells the latest look from those that it overtook

async function watch() {
  clearTimeout(timer);
  const look = ++looks;
  let wait = PERIOD;
  try {
    const snapshot = await (await call("live")).json();
    if (look !== looks) return;
    misses = 0;
    $("key-form").hidden = true;
    show(snapshot);
  } catch (error) {
    if (look !== looks) return;
    wait = Math.min(PERIOD * 2 ** misses++, 10000);
    if (error.status === 401) return setState("locked", "needs an API key"); // goes on when a key is given
    setState("away", `${error.status ? error.message : "can't reach the server"}; trying again every ${wait / 1000} s`);
  }
  if (!document.hidden) timer = setTimeout(watch, wait);
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : watch()));

function setState(state, text) {
  $("state").dataset.state = state;
  if ($("state-text").textContent !== text) $("state-text").textContent = text; // the same again is no news
  $("send").disabled = state !== "ok";
}

function show(now) {
  setState(now.state, now.stage ?? { ok: "ready", dead: "its engine died" }[now.state] ?? now.state);
  if (last && last.started !== now.started) last = null; // another server: its counts began anew
  if (JSON.stringify(now.model) !== JSON.stringify(model)) showModel(now.model);
  const seconds = last ? now.time - last.time : 0;
  rates.push(seconds > 0 ? (now.generated_tokens - last.generated_tokens) / seconds : 0);
  if (rates.length > 120) rates.shift(); // the latest two minutes
  last = now;
  $("rate").textContent = count.format(Math.round(rates.at(-1)));
  drawChart();
  gauge("running", now.running, model?.max_running);
  gauge("waiting", now.waiting, model?.max_waiting);
  gauge("pages", now.pages_used, now.pages_total, true);
  $("host").hidden = !now.host_pages_total;
  gauge("host", now.host_pages_used, now.host_pages_total);
  const found = now.prompt_tokens ? now.cached_tokens / now.prompt_tokens : 0;
  gauge("hits", found, 1, false, now.prompt_tokens ? `${Math.round(found * 100)}%` : "–");
  showLatency("first", now.first_token_seconds);
  showLatency("between", now.between_tokens_seconds);
  showRequests(now.requests, now.requests_left_out);
}

function drawChart() {
  const top = Math.max(...rates, 1) * 1.1;
  const points = rates.map((rate, i) => `${120 - rates.length + i + 1},${(36 - (rate / top) * 36).toFixed(2)}`);
  const [area, line] = $("chart").children;
  line.setAttribute("d", `M${points.join("L")}`);
  area.setAttribute("d", `M${120 - rates.length + 1},36L${points.join("L")}L120,36Z`);
}

function gauge(id, value, limit, warns, text) {
  const [, number, meter] = $(id).children;
  number.textContent = text ?? (limit ? `${count.format(value)} of ${count.format(limit)}` : "–");
  const part = limit ? Math.min(value / limit, 1) : 0;
  meter.firstElementChild.style.width = `${part * 100}%`;
  meter.firstElementChild.classList.toggle("high", Boolean(warns) && part > 0.9);
  meter.setAttribute("aria-valuemax", limit ?? 0);
  meter.setAttribute("aria-valuenow", value);
}

function duration(seconds) {
  if (seconds < 0.1) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function showLatency(id, values) {
  const [, median, most] = $(id).children;
  [median.textContent, most.textContent] = values ? [duration(values.p50), duration(values.p95)] : ["–", "–"];
}

function showRequests(requests, leftOut) {
  const rows = requests.map((request) => {
    const row = element("tr");
    const cells = [request.prompt_tokens, request.cached_tokens, request.generated_tokens].map(count.format);
    row.append(...[duration(request.seconds), ...cells].map((text) => element("td", "", text)));
    return row;
  });
  $("requests").tBodies[0].replaceChildren(...rows);
  $("requests").hidden = !rows.length;
  $("more-requests").textContent = leftOut ? `and ${count.format(leftOut)} more` : rows.length ? "" : "None.";
}

function showModel(found) {
  if (found && found.chat !== model?.chat) {
    const [chat, completion] = $("modes").querySelectorAll("input");
    chat.disabled = !found.chat;
    (found.chat ? chat : completion).click();
  }
  model = found;
  $("model-name").textContent = model?.id ?? "";
  document.title = model ? `${model.id} · Twinax` : "Twinax";
  const facts = model && {
    Name: model.id, Family: model.family, Chat: model.chat ? "has a template" : "no template",
    Vocabulary: count.format(model.vocab_size), Context: `${count.format(model.max_model_len)} tokens`,
    Cache: `${count.format(model.cache_tokens)} tokens`,
  };
  $("facts").replaceChildren(
    ...Object.entries(facts ?? {}).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]),
  );
}

// -- Tokens --------------------------------------------------------------------------------------------------------

const encoder = new TextEncoder();
const tokens = new WeakMap(); // span -> { name, logprob, top: [[name, logprob]] }
const level = (logprob) => [0.05, 0.2, 0.5, 0.9].filter((p) => Math.exp(logprob) >= p).length;

function bytesOf(entry) {
  if (entry.bytes) return new Uint8Array(entry.bytes);
  // /v1/completions writes the bytes of a part of a character as bytes:\xe2\x82
  const hex = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(entry.token)?.[1];
  return hex ? new Uint8Array(hex.split("\\x").slice(1).map((pair) => parseInt(pair, 16))) : encoder.encode(entry.token);
}

// The log-probabilities of a chunk, of either endpoint, as [{ token, bytes?, logprob, top: [[token, logprob]] }].
function entriesOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({ ...one, top: one.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return logprobs.tokens.map((token, i) => ({
    token, logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

// The text of an answer as one span a token.
class Tokens {
  constructor(node) {
    this.node = node;
    this.count = 0;
    this.logprob = 0;
    this.text = "";
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.owed = ""; // text of the last token that the server still holds back
  }

  // A chunk's text is shared out among its tokens: each takes what its bytes decode to, the last what is left.
  add(text, entries) {
    this.text += text;
    let left = text;
    if (this.owed && left.startsWith(this.owed)) {
      this.node.lastElementChild.append(this.owed);
      left = left.slice(this.owed.length);
    }
    this.owed = "";
    const spans = entries.map((entry, i) => {
      const own = this.decoder.decode(bytesOf(entry), { stream: true });
      let part = left.startsWith(own) ? own : "";
      if (i === entries.length - 1) {
        if (own.startsWith(left)) this.owed = own.slice(left.length);
        part = left;
      }
      left = left.slice(part.length);
      return this.span(part, entry);
    });
    if (left) spans.push(left); // without probabilities
    this.node.append(...spans);
  }

  span(text, entry) {
    const span = element("span", `token p${level(entry.logprob)}`, text);
    if (!text) span.classList.add("blank");
    if (text.startsWith("\n")) span.classList.add("break");
    span.tabIndex = this.count ? -1 : 0;
    this.count++;
    this.logprob += entry.logprob;
    tokens.set(span, { name: entry.token, logprob: entry.logprob, top: entry.top });
    return span;
  }
}

const percent = (logprob) => {
  const part = Math.exp(logprob) * 100;
  return part >= 10 ? `${part.toFixed(1)}%` : part >= 0.001 ? `${part.toPrecision(2)}%` : "under 0.001%";
};
// A token's name with what can't be seen made visible.
const SIGNS = { "\n": "↵", "\t": "⇥", " ": "␣" };
const visible = (name) => name.replace(/^bytes:/, "").replace(/[\n\t ]/g, (one) => SIGNS[one]) || "(nothing)";

let chosen = null; // the span that the inspector shows

function inspect(span) {
  chosen?.classList.remove("chosen");
  chosen = span;
  $("inspector").hidden = !span;
  if (!span) return;
  span.classList.add("chosen");
  const { name, logprob, top } = tokens.get(span);
  const rank = top.findIndex(([other]) => other === name) + 1;
  const place = rank === 1 ? "the likeliest" : rank ? `number ${rank}` : top.length ? `not of the first ${top.length}` : "";
  const title = element("h3");
  title.append(element("code", "", visible(name)), element("span", "hint", place));
  const list = element("ol");
  const others = rank ? top : [...top, [name, logprob]];
  for (const [other, value] of others) {
    const item = element("li", other === name ? "own" : "");
    const bar = element("i");
    bar.style.width = `${Math.exp(value) * 100}%`;
    item.append(bar, element("code", "", visible(other)), element("span", "", percent(value)));
    list.append(item);
  }
  $("inspector").replaceChildren(title, list);
  placeInspector();
}

function placeInspector() {
  const box = chosen.getClientRects()[0];
  const { offsetWidth: width, offsetHeight: height } = $("inspector");
  const above = box.top - height - 8;
  $("inspector").style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  $("inspector").style.top = `${above > 8 ? above : box.bottom + 8}px`;
}

const tokenAt = (event) => (tokens.has(event.target) ? event.target : null);
let pinned = false; // by a click or the keyboard: stays when the pointer leaves

$("talk").addEventListener("pointerover", (event) => pinned || inspect(tokenAt(event)));
$("talk").addEventListener("pointerleave", () => pinned || inspect(null));
for (const kind of ["focusin", "focusout"]) {
  $("talk").addEventListener(kind, (event) => {
    const span = kind === "focusin" ? tokenAt(event) : null;
    pinned = span !== null;
    inspect(span);
  });
}
document.addEventListener("scroll", () => {
  if (!chosen) return;
  const { top, bottom } = chosen.getBoundingClientRect();
  bottom < 0 || top > innerHeight ? inspect(null) : placeInspector();
}, true);
$("talk").addEventListener("keydown", (event) => {
  const span = tokenAt(event);
  if (!span) return;
  const all = [...span.parentElement.children].filter((node) => tokens.has(node));
  const i = all.indexOf(span);
  const target = { ArrowRight: all[i + 1], ArrowLeft: all[i - 1], Home: all[0], End: all.at(-1) }[event.key];
  if (event.key === "Escape") span.blur();
  if (!target) return;
  event.preventDefault();
  span.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
});

// -- Asking --------------------------------------------------------------------------------------------------------

const mode = () => document.querySelector("[name=mode]:checked").value;

// Only what is filled in is sent: what is wrong with it, the server says.
function requestFor(kind, text) {
  const fields = {};
  for (const input of document.querySelectorAll("[data-number]")) {
    const text = input.value.trim();
    if (text) fields[input.dataset.number] = Number.isNaN(Number(text)) ? text : Number(text);
  }
  const stops = $("stops").value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stops.length) fields.stop = stops;
  const { alternatives = 0, ...rest } = fields;
  const common = { model: model.id, stream: true, stream_options: { include_usage: true }, ...rest };
  if (kind === "completion") return ["v1/completions", { ...common, prompt: text, logprobs: alternatives }];
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const messages = [...system, ...history, { role: "user", content: text }];
  return ["v1/chat/completions", { ...common, messages, logprobs: true, top_logprobs: alternatives }];
}

function addTurn(title, className) {
  const turn = $("turn").content.firstElementChild.cloneNode(true);
  turn.classList.add(className);
  turn.querySelector("h2").textContent = title;
  $("empty").hidden = true;
  $("talk").append(turn);
  return turn;
}

async function ask(kind, text) {
  const [path, body] = requestFor(kind, text);
  if (kind === "chat") addTurn("You", "asked").querySelector(".text").textContent = text;
  const turn = addTurn(model.id, "answered");
  const box = turn.querySelector(".text");
  box.setAttribute("aria-label", "Answer, token by token. The arrow keys move.");
  if (kind === "completion") box.append(element("span", "given", text));
  setBusy(turn, true);
  toBottom();
  const answer = new Tokens(box);
  const began = performance.now();
  let first = 0, reason = null, usage = null, failure = null;
  try {
    const response = await call(path, body, asking.signal);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new ServerError(0, chunk.error, response.headers.get("x-request-id"));
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const entries = entriesOf(choice.logprobs);
      if (entries.length && !first) first = performance.now();
      follow(() => answer.add(choice.delta?.content ?? choice.text ?? "", entries));
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped by you";
    else failure = error;
  }
  setBusy(turn, false);
  if (kind === "chat" && !failure) history.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
  const facts = summary(answer, reason, usage, first - began, performance.now() - first);
  follow(() => {
    if (failure) showFailure(turn, failure, () => ask(kind, text));
    turn.querySelector("footer").append(...facts.map((fact) => element("span", "", fact)));
  });
  if (!failure) $("announce").textContent = `The answer is complete. ${answer.text}`;
}

function summary(answer, reason, usage, toFirst, rest) {
  const facts = [];
  if (answer.count) {
    facts.push(`${count.format(usage?.completion_tokens ?? answer.count)} tokens`, `first after ${duration(toFirst / 1000)}`);
    if (answer.count > 1) facts.push(`${((answer.count - 1) / (rest / 1000)).toFixed(1)} a second`);
    facts.push(`typical probability ${percent(answer.logprob / answer.count)}`);
  }
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) facts.push(`prompt ${count.format(usage.prompt_tokens)}${cached ? `, ${count.format(cached)} of it cached` : ""}`);
  if (reason) facts.push({ length: "cut at its longest", stop: "ended by itself" }[reason] ?? reason);
  return facts;
}

function showFailure(turn, failure, again) {
  const box = turn.querySelector(".error");
  const [message, details] = box.querySelectorAll("p");
  message.textContent = failure.message;
  details.textContent = failure.details ?? "";
  box.hidden = false;
  box.querySelector("button").addEventListener("click", () => {
    if (asking || $("send").disabled) return;
    const question = turn.previousElementSibling;
    if (question?.classList.contains("asked")) question.remove();
    turn.remove();
    again();
  });
}

// On narrow screens the whole page scrolls, and the server's numbers lie below the question.
function toBottom() {
  const narrow = getComputedStyle($("talk")).overflowY === "visible";
  if (narrow) document.querySelector(".dock").scrollIntoView({ block: "end" });
  else $("talk").scrollTop = $("talk").scrollHeight;
}

// Change what is shown, and stay at its end unless the reader has gone elsewhere.
function follow(change) {
  const stays = $("talk").scrollTop > $("talk").scrollHeight - $("talk").clientHeight - 40 && !pinned;
  change();
  if (stays) toBottom();
}

function setBusy(turn, busy) {
  if (!busy && document.activeElement === $("stop")) $("prompt").focus(); // before the button goes
  asking = busy ? new AbortController() : null;
  turn.classList.toggle("busy", busy);
  $("send").hidden = $("clear").disabled = busy;
  $("stop").hidden = !busy;
}

function changeMode() {
  const chat = mode() === "chat";
  $("system-field").hidden = !chat;
  $("prompt").placeholder = chat ? "Write to the model" : "Begin a text, and the model goes on";
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || asking || $("send").disabled) return;
  $("prompt").value = "";
  grow();
  ask(mode(), text);
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => asking?.abort());
$("clear").addEventListener("click", () => {
  history = [];
  inspect(null);
  $("talk").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
});
$("settings-button").addEventListener("click", () => {
  $("settings-button").setAttribute("aria-expanded", !$("settings").toggleAttribute("hidden"));
});
$("shade").addEventListener("change", () => $("talk").classList.toggle("shaded", $("shade").checked));
$("modes").addEventListener("change", changeMode);
changeMode();
watch();
