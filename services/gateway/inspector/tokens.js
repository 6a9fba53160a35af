// The conversation, token by token: the text, and what the cache holds of it.

import { step } from "./scale.js";

/** A token's text on one line, for a list of facts. */
export const shown = (text) => text.replaceAll("\n", "\u21b5") || "\u2423";

export class Tokens {
  /**
   * @param {HTMLElement} into where the tokens are shown
   * @param {HTMLElement} facts where the facts of the token under the pointer are shown
   */
  constructor(into, facts) {
    this.into = into;
    this.facts = facts;
    this.welcome = into.firstElementChild;
    into.addEventListener("pointerover", (event) => this.#point(event.target));
    into.addEventListener("keydown", (event) => this.#move(event));
    this.clear();
  }

  clear() {
    this.first = null; // position of the first token whose text is known
    this.spans = [];
    this.told = []; // the text of each
    this.view = null;
    this.at = null;
    this.into.replaceChildren(this.welcome);
    this.facts.textContent = "";
  }

  text(position) {
    return this.told[position - (this.first ?? 0)] ?? "";
  }

  /** Shows a view of the cache. */
  update(view) {
    const below = this.into.scrollHeight - this.into.scrollTop - this.into.clientHeight < 40;
    this.#add(view.text);
    this.view = view;
    if (this.first === null && view.cached) {
      this.into.replaceChildren(Object.assign(document.createElement("p"), {
        className: "empty", textContent: "The text is another tenant's. The map shows what its cache holds.",
      }));
    }
    for (let place = 0; place < this.spans.length; place++) this.#paint(this.spans[place], this.first + place);
    for (const name of ["asked", "answered"]) for (const [at] of view.since[`${name}_at`]) this.#flash(at, name);
    if (below && view.phase !== "idle") this.into.scrollTop = this.into.scrollHeight;
    if (this.at !== null) this.#tell(this.at);
    else if (!this.facts.textContent) this.facts.textContent = "Point at a token, or use the arrow keys.";
  }

  #add({ first, tokens }) {
    if (!tokens.length) return;
    if (this.first === null || first < this.first || first > this.first + this.spans.length) {
      this.first = first;
      this.spans = [];
      this.told = [];
      this.into.replaceChildren();
      if (first > 0) this.into.append(Object.assign(document.createElement("p"), {
        className: "empty", textContent: `${first.toLocaleString()} earlier tokens`,
      }));
    }
    while (this.spans.length > first - this.first) this.spans.pop().remove();
    this.told.length = this.spans.length;
    for (const { text, special } of tokens) {
      const span = document.createElement("span");
      span.className = "t coming";
      span.textContent = text;
      span.dataset.special = special ? " special" : "";
      this.spans.push(span);
      this.told.push(text);
      this.into.append(span);
    }
  }

  #bits(position) {
    const { view } = this;
    const place = position - view.first;
    if (place < 0 || position >= view.cached) return null;
    return [view.key_bits[place], view.value_bits[place]];
  }

  #paint(span, position) {
    const bits = this.#bits(position);
    let kind = "coming";
    if (bits) kind = this.#exact(position) ? "exact" : `b${step((bits[0] + bits[1]) / 2)}`;
    const name = `t ${kind}${span.dataset.special}${this.at === position ? " at" : ""}`;
    if (span.dataset.name !== name) {
      span.className = span.dataset.name = name;
    }
  }

  #exact(position) {
    return position < this.view.exact_before || position >= this.view.exact_from;
  }

  #flash(position, name) {
    const span = this.spans[position - this.first];
    if (!span) return;
    span.classList.remove("asked", "answered");
    void span.offsetWidth; // the animation begins again
    span.classList.add(name);
  }

  #point(target) {
    const place = this.spans.indexOf(target);
    if (place >= 0) this.select(this.first + place);
  }

  #move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!steps || !this.spans.length) return;
    event.preventDefault();
    const last = this.first + this.spans.length - 1;
    this.select(Math.min(last, Math.max(this.first, (this.at ?? last) + steps)));
    this.spans[this.at - this.first].scrollIntoView({ block: "nearest" });
  }

  select(position) {
    if (this.at !== null) this.spans[this.at - this.first]?.classList.remove("at");
    this.at = position;
    this.spans[position - this.first]?.classList.add("at");
    this.#tell(position);
  }

  #tell(position) {
    const { view } = this;
    const bits = this.#bits(position);
    const place = position - view.first;
    const facts = [["token", shown(this.text(position))], ["position", position.toLocaleString()]];
    if (!bits) {
      facts.push(["in the cache", "not yet"]);
    } else if (this.#exact(position)) {
      facts.push(["held", position < view.exact_before ? "exactly, one of the first" : "exactly, one of the last"]);
    } else {
      facts.push(["key", `${bits[0]} bits`], ["value", `${bits[1]} bits`]);
    }
    if (bits) {
      facts.push(
        ["attention", view.attention[place].toExponential(1)],
        ["age", `${(view.cached - 1 - position).toLocaleString()} tokens`],
        ["re-quantized", `${view.requantized[place]} vectors`],
      );
    }
    this.facts.replaceChildren(...facts.map(([name, value]) => {
      const row = document.createElement("div");
      row.append(
        Object.assign(document.createElement("dt"), { textContent: name }),
        Object.assign(document.createElement("dd"), { textContent: value }),
      );
      return row;
    }));
  }
}
