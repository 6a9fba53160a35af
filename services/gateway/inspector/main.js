// The inspector: one session that is watched, and the calls that the page makes.

import { Refused, call, key, session, setKey, stream } from "./api.js";
import { EXAMPLE } from "./example.js";
import { Heat } from "./heat.js";
import * as panel from "./panel.js";
import { legend } from "./scale.js";
import { Shadow } from "./shadow.js";
import { Tokens } from "./tokens.js";

const LIST_MS = 10000; // between two looks at sessions and workers: each counts for the tenant's quota
const REFUSED_MS = 60000; // after one that the quota refused
const MOST_TOKENS = 2048; // that are shown one by one
const NEW_TOKENS = 600; // of an answer
const TEMPERATURE = 0.5;
const MOST_SESSIONS = 12; // in the list

const $ = (id) => document.getElementById(id);
const tokens = new Tokens($("tokens"), $("token"));
const heat = new Heat($("heat"), $("cell"));
const exceptions = new panel.Exceptions(tokens, (at) => tokens.select(at));
const price = new panel.Price((bits) => attempt(setPrecision(bits)));
const shadow = new Shadow(() => refollow());

let current = null; // id of the session that is shown
let watching = null; // its AbortController
let answering = null; // that of the answer under way
let worker = null; // that has the cache
let managed = true; // the key may see workers
let quietUntil = 0; // the lists are not asked for before
let everybody = true; // the key may be an operator's, who sees all tenants' sessions

function notice(text, good = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("good", good);
  $("notice").hidden = !text;
}

function state(text, live = false) {
  $("state").textContent = text;
  $("state").classList.toggle("live", live);
}

/** Shows an error, where there is one. */
async function attempt(work) {
  try {
    return await work;
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (error instanceof Refused && error.status === 401) {
      notice("This server asks for a key. Put it into the field at the top; it is kept for this tab alone.");
      $("key").placeholder = "needed";
      $("key").focus();
    } else {
      notice(error.message);
    }
    return undefined;
  }
}

// -- the session that is shown

async function open() {
  const body = { model: $("models").value, cache: { preset: $("preset").value } };
  const opened = await call("/v1/sessions", { method: "POST", body });
  watch(opened.id);
  return opened.id;
}

function watch(id) {
  watching?.abort();
  current = id;
  worker = null;
  tokens.clear();
  exceptions.clear();
  heat.update(null);
  panel.memory(null);
  price.update(null);
  shadow.update(null);
  if (id === null) {
    state("no session");
    return;
  }
  refollow();
}

/** Follows the session that is shown with what is wanted of it now. */
function refollow() {
  if (current === null) return;
  watching?.abort();
  watching = new AbortController();
  follow(current, watching.signal);
}

/** Reads the session's events for as long as it is shown. */
async function follow(id, signal) {
  for (let wait = 1000; !signal.aborted; wait = Math.min(2 * wait, 10000)) {
    try {
      const path = `${session(id)}/cache/events?tokens=${MOST_TOKENS}&columns=96&rate=4&shadow=${shadow.wanted}`;
      for await (const report of stream(path, { signal })) {
        if (signal.aborted) return;
        show(report);
        wait = 1000;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 404) {
        notice("There is no such session for this key: it was closed, or is another tenant's.");
        watch(null);
        return;
      }
      if (error.status === 401) {
        await attempt(Promise.reject(error));
        return;
      }
      state(`${error.message} Trying again.`);
    }
    await new Promise((again) => setTimeout(again, wait));
  }
}

const PHASES = { idle: "at rest", prefill: "reading the prompt", decode: "answering", preempted: "waiting for memory" };

function show(report) {
  const view = report.cache;
  if (worker && report.worker && report.worker !== worker) {
    notice(`The session has moved to the worker ${report.worker}.`, true);
  }
  worker = report.worker ?? worker;
  if (!view) {
    state(report.unreachable ? "its worker does not answer" : "no cache yet", !report.unreachable);
    return;
  }
  const progress = view.phase === "prefill" ? `, ${view.cached} of ${view.total} tokens` : "";
  state(PHASES[view.phase] + progress, true);
  tokens.update(view);
  heat.update(view);
  panel.memory(view);
  price.update(view);
  shadow.update(view);
  exceptions.update(view);
}

async function setPrecision(bits) {
  if (current === null) return;
  await call(`${session(current)}/cache`, { method: "PUT", body: bits === null ? {} : { target_bits: bits } });
}

// -- asking

async function ask(text) {
  notice("");
  const id = current ?? (await open());
  answering = new AbortController();
  busy(true);
  try {
    const body = {
      session_id: id, messages: [{ role: "user", content: text }], stream: true,
      max_completion_tokens: NEW_TOKENS, temperature: TEMPERATURE,
    };
    // The tokens are shown with what the cache holds of them, by `follow`.
    for await (const _ of stream("/v1/chat/completions", { method: "POST", body, signal: answering.signal }));
  } finally {
    answering = null;
    busy(false);
    lists();
  }
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
}

// -- lists

async function lists() {
  if (document.hidden || performance.now() < quietUntil) return;
  const refused = (error) => {
    everybody &&= error.status !== 403;
    if (error.status === 429) quietUntil = performance.now() + REFUSED_MS;
    return null;
  };
  let all = everybody ? await call("/v1/sessions?all_tenants=true").catch(refused) : null;
  all ??= performance.now() < quietUntil ? null : await call("/v1/sessions").catch(refused);
  if (all) panel.sessions(all.data.toReversed().slice(0, MOST_SESSIONS), current, watch, (id) => attempt(close(id)));
  if (managed) {
    const workers = await call("/v1/workers").catch((error) => {
      managed = error.status !== 403;
      return null;
    });
    panel.workers(workers?.data ?? null, worker);
  }
}

async function close(id) {
  await call(session(id), { method: "DELETE" });
  if (id === current) watch(null);
  await lists();
}

// -- the page

/** The models that a new session may be of. */
function offer(models) {
  $("models").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  $("choice").hidden = models.length < 2;
  const say = () => {
    const { id, max_model_len: context } = models[$("models").selectedIndex];
    $("model").textContent = `${id}, ${context.toLocaleString()} tokens of context`;
  };
  $("models").onchange = say;
  if (models.length) say();
}

async function begin() {
  everybody = managed = true;
  const models = await attempt(call("/v1/models"));
  if (!models) {
    state("not connected");
    return;
  }
  notice("");
  offer(models.data);
  if (current === null) state("no session");
  await lists();
}

legend($("legend"));
$("key").value = key();
$("key").addEventListener("change", () => {
  if (!/^[\x21-\x7e]*$/.test($("key").value.trim())) {
    notice("A key has letters, digits and signs of ASCII alone.");
    return;
  }
  setKey($("key").value);
  begin();
  if (current !== null) watch(current);
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || answering) return;
  $("prompt").value = "";
  attempt(ask(text));
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => answering?.abort());
$("new").addEventListener("click", () => attempt(open()));
$("example").addEventListener("click", () => {
  $("prompt").value = EXAMPLE;
  $("prompt").focus();
});
for (const input of document.getElementsByName("side")) {
  input.addEventListener("change", () => heat.show(input.value));
}
setInterval(lists, LIST_MS);
begin();
