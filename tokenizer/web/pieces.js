// Rows of tokens, and the card that explains a token. All text is inserted as text: no HTML is parsed.

export const KIND_DESCRIPTIONS = {
  base: "a common short word or part of one",
  merge: "two tokens joined, repeatedly",
  phrase: "tokens of neighboring words joined",
  char: "one character beyond ASCII",
  byte: "one byte of text without an entry",
  case: "a mark: the next token is in upper case (↑), or its first letter is (⇧)",
  space: "spaces and line breaks",
  special: "a marker for the model, never text",
};
const MARKS = { "<UP>": "⇧", "<CAPS>": "↑", "<EOS>": "■" };

/** The style of a kind of token: a key of KIND_DESCRIPTIONS. */
export const styleOf = (kind) => (["sp", "nl", "run"].includes(kind) ? "space" : kind);

/** Create an element: el("p", { class: "note", onclick }, "text", child, …). */
export function el(tag, properties = {}, ...children) {
  const svg = ["svg", "path", "circle", "line", "text", "g", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Fetch JSON: POST if there is a body, else GET. Throws an Error with the server's message and its `status`. */
export async function fetchJson(path, body, key = "") {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? { headers } : {
    method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" },
  };
  const response = await fetch(path, options);
  const tree = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(tree.error?.message ?? `the server responded with status ${response.status}`),
    { status: response.status });
  return tree;
}

/** The element of one token { id, text, kind, name } of a row. */
export function tokenElement(token) {
  const element = el("span", { class: `piece piece-${styleOf(token.kind)}`, tabindex: "-1" }, token.text);
  // Marks are shown by CSS and are not part of the text: copying a row gives the text itself.
  if (!token.text) element.dataset.mark = MARKS[token.name] ?? token.name.replace(/^<0x(..)>$/, "$1");
  else if (token.text.includes("\n")) element.dataset.mark = "↵";
  element.token = token;
  return element;
}

/** Let the arrow keys move through a row of tokens, and show the card of the active one. */
export function enableArrowKeys(row, card) {
  const tokenAt = (event) => event.target.closest?.(".piece");
  const activate = (element) => element && (element.focus(), element.scrollIntoView({ block: "nearest" }));
  row.addEventListener("keydown", (event) => {
    const elements = [...row.querySelectorAll(".piece")];
    const current = elements.indexOf(document.activeElement);
    const target = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: elements.length - 1 }[event.key];
    if (target === undefined || !elements.length) return;
    event.preventDefault();
    activate(elements[Math.min(Math.max(target, 0), elements.length - 1)]);
  });
  row.addEventListener("focusin", (event) => tokenAt(event) && card.show(tokenAt(event)));
  row.addEventListener("focusout", () => card.hide());
  row.addEventListener("pointerover", (event) => event.pointerType === "mouse" && tokenAt(event) && card.show(tokenAt(event)));
  row.addEventListener("pointerout", (event) => event.pointerType === "mouse" && card.hide());
  row.addEventListener("click", (event) => tokenAt(event)?.focus());
}

const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

/** A list item for an explanation and, below it, for its parts. */
function explanationItem(explanation) {
  const name = el("code", { class: `piece piece-${styleOf(explanation.kind)}` }, visible(explanation.name));
  const id = explanation.kind === "byte" || explanation.id === null ? explanation.bytes : `#${explanation.id}`;
  const line = el("span", {}, name, el("small", { class: "muted" }, ` ${explanation.kind} ${id}`));
  if (!explanation.parts.length) return el("li", {}, line);
  // The bytes of a word share one line: a line for each would hide the merges.
  const onlyBytes = explanation.parts.every((part) => !part.parts.length && ["byte", "sp", "nl"].includes(part.kind));
  const parts = onlyBytes
    ? el("ul", {}, el("li", {}, ...explanation.parts.map((part) => el("code", { class: `piece piece-${styleOf(part.kind)}` }, visible(part.name))),
      el("small", { class: "muted" }, ` ${explanation.bytes}`)))
    : el("ul", {}, ...explanation.parts.map(explanationItem));
  return el("li", {}, line, parts);
}

/** A card with a token's kind, its probability if known, and its parts. `explain(token)` resolves to its explanation. */
export class TokenCard {
  constructor(explain) {
    this.explain = explain;
    this.cache = new Map();
    this.box = el("div", { class: "token-card card", role: "status", id: "token-card", hidden: true });
    document.body.append(this.box);
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    addEventListener("scroll", () => this.hide(), { passive: true });
  }

  async show(element) {
    this.active?.classList.remove("active");
    this.active = element;
    element.classList.add("active");
    const { token } = element;
    const shown = token.text ? visible(token.text) : token.name;
    const head = el("p", { class: "token-head" }, el("code", { class: `piece piece-${styleOf(token.kind)}` }, shown),
      el("span", { class: "muted small" }, ` ${token.kind} · id ${token.id}`));
    const parts = el("div", { class: "small" });
    this.box.replaceChildren(head, ...this.probabilities(token), parts);
    this.box.hidden = false;
    this.position(element);
    const key = `${token.source}:${token.id}`;
    if (!this.cache.has(key)) this.cache.set(key, this.explain(token).catch((error) => ({ problem: error.message })));
    const explanation = await this.cache.get(key);
    if (this.active !== element) return;
    if (explanation.problem) parts.append(explanation.problem);
    else if (explanation.parts.length) parts.append(el("ul", { class: "tree" }, explanationItem(explanation)));
    else parts.append(`${KIND_DESCRIPTIONS[styleOf(explanation.kind)] ?? ""}${explanation.bytes ? ` (${explanation.bytes})` : ""}`);
    this.position(element);
  }

  probabilities(token) {
    if (token.logprob === null || token.logprob === undefined) return [];
    const alternatives = (token.top ?? []).filter(([id]) => id !== token.id);
    const rows = [[token.id, token.name, token.logprob], ...alternatives].sort((a, b) => b[2] - a[2]);
    const lines = rows.map(([id, name, logprob]) => {
      const bar = el("i", { class: "bar" });
      bar.style.width = `${Math.max(100 * Math.exp(logprob), 0.5)}%`;
      return el("tr", { class: id === token.id ? "chosen" : "" }, el("td", {}, el("code", {}, visible(name))), el("td", { class: "number" }, percent(logprob)),
        el("td", { class: "bar-cell" }, bar));
    });
    return [el("table", { class: "chances", "aria-label": "Probability of the token and of its alternatives" },
      el("tbody", {}, ...lines))];
  }

  position(element) {
    if (matchMedia("(max-width: 640px)").matches) return; // CSS shows the card as a sheet at the bottom
    const anchor = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const below = anchor.bottom + 8 + height <= innerHeight || anchor.top < height + 8;
    this.box.style.left = `${Math.max(8, Math.min(anchor.left, document.documentElement.clientWidth - width - 8))}px`;
    this.box.style.top = `${below ? anchor.bottom + 8 : anchor.top - height - 8}px`;
  }

  hide() {
    this.active?.classList.remove("active");
    this.active = undefined;
    this.box.hidden = true;
  }
}

/** The legend of the colors: of all kinds, or of a Set of them. */
export const legend = (kinds) => el("ul", { class: "legend small" }, ...Object.keys(KIND_DESCRIPTIONS)
  .filter((name) => !kinds || kinds.has(name))
  .map((name) => el("li", { title: KIND_DESCRIPTIONS[name] }, el("span", { class: `piece piece-${name}` }, name))));
