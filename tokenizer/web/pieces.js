// Texts as rows of tokens, and the card that tells how a token is made. Text only ever becomes text: no HTML is parsed.

export const LOOKS = {
  base: "a common short word or part, as it was found",
  merge: "two tokens joined, again and again",
  phrase: "tokens of neighbouring words joined",
  char: "one character beyond ASCII",
  byte: "one byte, of what is in no entry",
  case: "a mark: the next token is in upper case (↑), or its first letter is (⇧)",
  space: "spaces and line breaks",
  special: "a sign for the model, never text",
};
const MARKS = { "<UP>": "⇧", "<CAPS>": "↑", "<EOS>": "■" };

export const look = (kind) => (["sp", "nl", "run"].includes(kind) ? "space" : kind);

/** An element: el("p", { class: "note", onclick }, "text", child, …). */
export function el(tag, properties = {}, ...children) {
  const svg = ["svg", "path", "circle", "line", "text", "g", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** JSON from the server. Raises Error with the server's own words. */
export async function ask(path, body, key = "") {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const how = body === undefined ? { headers } : {
    method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" },
  };
  const answer = await fetch(path, how);
  const tree = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(tree.error?.message ?? `the server answered ${answer.status}`),
    { status: answer.status });
  return tree;
}

/** One token { id, text, kind, name } of a row. */
export function piece(token) {
  const made = el("span", { class: `piece piece-${look(token.kind)}`, tabindex: "-1" }, token.text);
  // Shown but not part of the text: copying a row gives the text itself.
  if (!token.text) made.dataset.mark = MARKS[token.name] ?? token.name.replace(/^<0x(..)>$/, "$1");
  else if (token.text.includes("\n")) made.dataset.mark = "↵";
  made.token = token;
  return made;
}

/** Let a row of pieces be walked with the arrow keys, and tell the card which one is looked at. */
export function walkable(row, card) {
  const at = (event) => event.target.closest?.(".piece");
  const go = (to) => to && (to.focus(), to.scrollIntoView({ block: "nearest" }));
  row.addEventListener("keydown", (event) => {
    const pieces = [...row.querySelectorAll(".piece")];
    const now = pieces.indexOf(document.activeElement);
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: pieces.length - 1 }[event.key];
    if (to === undefined || !pieces.length) return;
    event.preventDefault();
    go(pieces[Math.min(Math.max(to, 0), pieces.length - 1)]);
  });
  row.addEventListener("focusin", (event) => at(event) && card.show(at(event)));
  row.addEventListener("focusout", () => card.hide());
  row.addEventListener("pointerover", (event) => event.pointerType === "mouse" && at(event) && card.show(at(event)));
  row.addEventListener("pointerout", (event) => event.pointerType === "mouse" && card.hide());
  row.addEventListener("click", (event) => at(event)?.focus());
}

const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

function tree(made) {
  const name = el("code", { class: `piece piece-${look(made.kind)}` }, visible(made.name));
  const id = made.kind === "byte" || made.id === null ? made.bytes : `#${made.id}`;
  const line = el("span", {}, name, el("small", { class: "muted" }, ` ${made.kind} ${id}`));
  if (!made.parts.length) return el("li", {}, line);
  // The bytes of a word in one line: a line for each would bury the merges.
  const flat = made.parts.every((part) => !part.parts.length && ["byte", "sp", "nl"].includes(part.kind));
  const parts = flat
    ? el("ul", {}, el("li", {}, ...made.parts.map((p) => el("code", { class: `piece piece-${look(p.kind)}` }, visible(p.name))),
      el("small", { class: "muted" }, ` ${made.bytes}`)))
    : el("ul", {}, ...made.parts.map(tree));
  return el("li", {}, line, parts);
}

/** The card: what a token is, how probable it was, and what it is made of. `explain(token)` gives its tree. */
export class Card {
  constructor(explain) {
    this.explain = explain;
    this.known = new Map();
    this.box = el("div", { class: "token-card card", role: "status", id: "token-card", hidden: true });
    document.body.append(this.box);
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    addEventListener("scroll", () => this.hide(), { passive: true });
  }

  async show(piece) {
    this.now?.classList.remove("looked-at");
    this.now = piece;
    piece.classList.add("looked-at");
    const { token } = piece;
    const shown = token.text ? visible(token.text) : token.name;
    const head = el("p", { class: "token-head" }, el("code", { class: `piece piece-${look(token.kind)}` }, shown),
      el("span", { class: "muted small" }, ` ${token.kind} · id ${token.id}`));
    const parts = el("div", { class: "small" });
    this.box.replaceChildren(head, ...this.chances(token), parts);
    this.box.hidden = false;
    this.place(piece);
    const key = `${token.source}:${token.id}`;
    if (!this.known.has(key)) this.known.set(key, this.explain(token).catch((error) => ({ problem: error.message })));
    const made = await this.known.get(key);
    if (this.now !== piece) return;
    if (made.problem) parts.append(made.problem);
    else if (made.parts.length) parts.append(el("ul", { class: "tree" }, tree(made)));
    else parts.append(`${LOOKS[look(made.kind)] ?? ""}${made.bytes ? ` (${made.bytes})` : ""}`);
    this.place(piece);
  }

  chances(token) {
    if (token.logprob === null || token.logprob === undefined) return [];
    const rivals = (token.top ?? []).filter(([id]) => id !== token.id);
    const rows = [[token.id, token.name, token.logprob], ...rivals].sort((a, b) => b[2] - a[2]);
    const lines = rows.map(([id, name, logprob]) => {
      const bar = el("i", { class: "bar" });
      bar.style.width = `${Math.max(100 * Math.exp(logprob), 0.5)}%`;
      return el("tr", { class: id === token.id ? "chosen" : "" }, el("td", {}, el("code", {}, visible(name))), el("td", { class: "number" }, percent(logprob)),
        el("td", { class: "bar-cell" }, bar));
    });
    return [el("table", { class: "chances", "aria-label": "How probable the model found it, and what else" },
      el("tbody", {}, ...lines))];
  }

  place(piece) {
    if (matchMedia("(max-width: 640px)").matches) return; // there it is a sheet at the bottom (CSS)
    const at = piece.getClientRects()[0] ?? piece.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const below = at.bottom + 8 + height <= innerHeight || at.top < height + 8;
    this.box.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
    this.box.style.top = `${below ? at.bottom + 8 : at.top - height - 8}px`;
  }

  hide() {
    this.now?.classList.remove("looked-at");
    this.now = undefined;
    this.box.hidden = true;
  }
}

/** What the colours mean. */
export const legend = (kinds) => el("ul", { class: "legend small" }, ...Object.keys(LOOKS)
  .filter((name) => !kinds || kinds.has(name))
  .map((name) => el("li", { title: LOOKS[name] }, el("span", { class: `piece piece-${name}` }, name))));
