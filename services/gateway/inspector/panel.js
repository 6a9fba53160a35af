// The figures beside the conversation: memory, the price of a bit, exceptions, sessions, workers.

import { shown } from "./tokens.js";

const FEED = 40; // exceptions that are kept in the list
const $ = (id) => document.getElementById(id);

export function bytes(count) {
  for (const [size, unit] of [[2 ** 30, "GB"], [2 ** 20, "MB"], [2 ** 10, "KB"]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${count} B`;
}

function fill(element, share) {
  element.style.width = `${(100 * Math.min(1, share)).toFixed(1)}%`;
  element.classList.toggle("full", share > 0.98);
}

export function memory(view) {
  const held = view?.bytes.resident ?? 0;
  fill($("held"), view ? held / Math.max(view.bytes.fp16, held, 1) : 0);
  $("held").classList.remove("full");
  $("held-text").textContent = !view ? "No cache yet."
    : `${bytes(held)} for ${view.cached.toLocaleString()} tokens; in half precision ${bytes(view.bytes.fp16)}`
      + (held ? ` (${(view.bytes.fp16 / held).toFixed(1)}\u00d7)` : "");
  $("budget").hidden = !view;
  if (!view) return;
  const { worker, worker_budget: most } = view.bytes;
  fill($("worker-held"), most ? worker / most : 0);
  $("worker-held").parentElement.hidden = !most;
  $("worker-text").textContent = most
    ? `All caches of its worker: ${bytes(worker)} of ${bytes(most)}.`
    : `All caches of its worker: ${bytes(worker)}, without a limit.`;
}

/** The slider. `set` is called with a number of bits, or with null for the session's own target. */
export class Price {
  constructor(set) {
    this.input = $("bits");
    this.words = $("bits-text");
    this.note = $("price");
    this.busy = 0; // until when the slider is the user's, not the view's
    this.input.addEventListener("input", () => {
      this.busy = performance.now() + 1500;
      clearTimeout(this.timer);
      this.timer = setTimeout(() => set(this.#chosen()), 150);
      this.#say(Number(this.input.value));
    });
  }

  #chosen() {
    const value = Number(this.input.value);
    return value >= Number(this.input.max) - 1e-9 ? null : value;
  }

  #say(bits) {
    this.words.textContent = `${bits.toFixed(2)} bits an element`;
    this.input.setAttribute("aria-valuetext", this.words.textContent);
  }

  update(view) {
    const price = view?.price;
    this.input.disabled = !(price?.elastic && price.own_bits > 0);
    if (this.input.disabled) {
      this.words.textContent = "Bits an element";
      this.note.textContent = price && !price.elastic
        ? "This preset's precision is fixed; only balanced can change it."
        : "The price of a bit can be set once tokens are packed.";
      return;
    }
    if (performance.now() > this.busy) {
      const top = Math.max(1, Math.ceil(price.own_bits * 20) / 20);
      this.input.max = top;
      this.input.value = price.session_floor ? Math.min(price.bits, top) : top;
      this.#say(price.bits);
    }
    const raised = price.lambda / (price.own || price.lambda || 1);
    const squeezed = price.worker_floor > Math.max(price.own, price.session_floor);
    const why = squeezed ? ", which its worker's budget asks for" : "";
    this.note.textContent = `A bit costs ${price.lambda.toExponential(1)}`
      + (raised > 1.01 ? `, ${raised.toFixed(raised < 10 ? 1 : 0)} times its own price${why}.` : ", its own price.")
      + (price.recovering ? " Bits are coming back from the originals." : "");
  }
}

export class Exceptions {
  constructor(tokens, select) {
    this.tokens = tokens;
    this.select = select;
    this.feed = $("exceptions");
    this.rest = $("totals").textContent;
  }

  clear() {
    this.feed.replaceChildren();
    $("totals").textContent = this.rest;
  }

  update(view) {
    const { counts, since } = view;
    if (counts.exceptions || counts.narrowed) {
      $("totals").textContent = `${counts.exceptions.toLocaleString()} vectors asked for more bits, `
        + `${counts.requantized.toLocaleString()} got them (${bytes(counts.fetched_bytes)} fetched), `
        + `${counts.narrowed.toLocaleString()} gave some up`
        + (counts.missing ? `, ${counts.missing.toLocaleString()} had no original left.` : ".");
    }
    for (const [name, words] of [["asked", "asked"], ["answered", "came back"]]) {
      const most = [...since[`${name}_at`]].sort((one, other) => other[1] - one[1]).slice(0, 5);
      for (const [at, vectors] of most) this.#add(at, vectors, name, words);
    }
  }

  #add(at, vectors, name, words) {
    const row = document.createElement("li");
    const kind = Object.assign(document.createElement("span"), { className: name, textContent: words });
    const text = Object.assign(document.createElement("b"), { textContent: shown(this.tokens.text(at)) });
    const count = Object.assign(document.createElement("span"), {
      textContent: `token ${at}, ${vectors} ${vectors === 1 ? "vector" : "vectors"}`,
    });
    row.append(kind, text, count);
    row.addEventListener("pointerenter", () => this.select(at));
    this.feed.prepend(row);
    while (this.feed.childElementCount > FEED) this.feed.lastElementChild.remove();
  }
}

function row(current, ...parts) {
  const item = document.createElement("li");
  item.className = current ? "current" : "";
  item.append(...parts);
  return item;
}

const span = (textContent) => Object.assign(document.createElement("span"), { textContent });
const code = (textContent) => Object.assign(document.createElement("code"), { textContent });

function button(textContent, label, act) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent });
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

export function sessions(list, current, watch, close) {
  $("sessions").replaceChildren(...(list.length ? list.map((each) => row(
    each.id === current,
    code(each.id.slice(0, 10)),
    span(`${each.tokens.toLocaleString()} tokens${each.running ? ", generating" : ""}`),
    ...(each.tenant ? [span(each.tenant)] : []),
    Object.assign(document.createElement("span"), { className: "spacer" }),
    ...(each.id === current ? [span("shown")] : [button("show", `Show session ${each.id}`, () => watch(each.id))]),
    button("close", `Close session ${each.id}`, () => close(each.id)),
  )) : [row(false, span("None is open."))]));
}

/** @param {Array | null} list null: the key is not an operator's. */
export function workers(list, current) {
  const rows = (list ?? []).map((each) => {
    const gauge = Object.assign(document.createElement("div"), { className: "gauge" });
    const held = Object.assign(document.createElement("div"), { className: "fill other" });
    fill(held, each.kv_budget_bytes ? each.kv_bytes / each.kv_budget_bytes : 0);
    gauge.append(held);
    const most = each.kv_budget_bytes ? ` of ${bytes(each.kv_budget_bytes)}` : "";
    const price = each.lambda_floor ? `, a bit costs at least ${each.lambda_floor.toExponential(1)}` : "";
    return row(
      each.id === current,
      code(each.id),
      span(each.model),
      span(`${each.running} running, ${each.waiting} waiting, ${each.sessions} caches`),
      ...(each.kv_budget_bytes ? [gauge] : []),
      span(`${bytes(each.kv_bytes)}${most}${price}`),
    );
  });
  $("workers").replaceChildren(...(rows.length ? rows : [
    row(false, span(list === null ? "They are shown with an operator's key." : "None is ready.")),
  ]));
}
