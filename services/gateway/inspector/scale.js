// The scale of bits: seven steps from nothing to eight bits, and what is held exactly beside it.

/** Upper end of each step in bits, and what it means in words. */
export const STEPS = [
  [0.5, "none: the mean"],
  [1.5, "1 bit"],
  [2.5, "2 bits"],
  [3.5, "3 bits"],
  [4.75, "4 bits"],
  [6.5, "6 bits"],
  [12, "8 bits"],
];

/** The step of a number of bits: 0 to 6. */
export function step(bits) {
  const found = STEPS.findIndex(([most]) => bits <= most);
  return found < 0 ? STEPS.length - 1 : found;
}

/** The colours of the steps and of what is exact, as the present theme has them. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { steps: STEPS.map((_, index) => of(`--b${index}`)), exact: of("--exact"), ink: of("--ink") };
}

export function legend(into) {
  const entry = (kind, words) => {
    const item = document.createElement("span");
    const swatch = document.createElement("i");
    swatch.className = kind;
    item.append(swatch, words);
    return item;
  };
  into.replaceChildren(
    ...STEPS.map(([, words], index) => entry(`b${index}`, words)),
    entry("exact", "exact: the first and the most recent tokens"),
  );
}
