// The tokenizer playground: text tokenized while it is typed, with one vocabulary or with two side by side.
import { TokenCard, el, enableArrowKeys, fetchJson, legend, styleOf, tokenElement } from "./pieces.js";

const EXAMPLE = 'def greet(name="World"):\n    return f"HELLO, {name}! Naïve café, שלום, 東京 🙂"\n';
const TYPING_DELAY = 80; // milliseconds after a key press before the text is tokenized
const MAX_SHOWN = 4000; // tokens shown per panel

/** One vocabulary and the tokens that it makes of the text. */
class Panel {
  constructor(names, chosen, card, key) {
    this.key = key;
    const options = names.map((name) => el("option", { value: name, selected: name === chosen }, name || "none"));
    this.select = el("select", { "aria-label": "Vocabulary", onchange: () => this.tokenize(this.text) }, ...options);
    this.figures = el("dl", { class: "figures" });
    this.mix = el("div", { class: "mix", "aria-hidden": "true" });
    this.row = el("div", { class: "pieces", tabindex: "0", role: "region", "aria-label": "Tokens; use the arrow keys to move through them" });
    this.more = el("p", { class: "muted small", hidden: true });
    this.box = el("section", { class: "card" }, el("div", { class: "side-head" }, this.select, this.figures), this.mix,
      this.row, this.more);
    enableArrowKeys(this.row, card);
  }

  async tokenize(text) {
    this.text = text;
    const name = this.select.value;
    if (!name) return this.show(null);
    const request = (this.request = (this.request ?? 0) + 1);
    try {
      const result = await fetchJson("/api/cut", { vocabulary: name, text }, this.key());
      if (request === this.request) this.show(result, name);
    } catch (error) {
      if (request === this.request) this.row.replaceChildren(el("span", { class: "problem" }, error.message));
    }
  }

  show(result, name) {
    this.figures.replaceChildren();
    this.mix.replaceChildren();
    this.row.replaceChildren();
    this.more.hidden = true;
    if (!result) return;
    const { tokens, bytes, characters } = result;
    const figure = (term, value) => el("div", {}, el("dt", {}, term), el("dd", {}, value));
    this.figures.append(figure("tokens", tokens.length.toLocaleString("en")), figure("bytes", bytes.toLocaleString("en")),
      figure("bytes per token", tokens.length ? (bytes / tokens.length).toFixed(2) : "–"));
    if (characters !== bytes) this.figures.append(figure("characters", characters.toLocaleString("en")));
    const counts = new Map();
    for (const [, kind] of tokens) counts.set(styleOf(kind), (counts.get(styleOf(kind)) ?? 0) + 1);
    for (const [kind, count] of counts) {
      const part = el("i", { class: `piece-${kind}`, title: `${count} ${kind}` });
      part.style.flexGrow = count;
      this.mix.append(part);
    }
    // The text of a byte token may be its name; it is then shown as a mark.
    this.row.append(...tokens.slice(0, MAX_SHOWN).map(([text, kind, id, title]) =>
      tokenElement({ text: kind === "byte" && text.length > 1 ? "" : text, name: title, kind, id, source: name })));
    this.more.hidden = tokens.length <= MAX_SHOWN;
    this.more.textContent = `and ${(tokens.length - MAX_SHOWN).toLocaleString("en")} more tokens`;
  }
}

/** Render the playground into an element. `first`: the vocabulary selected at first; `key`: returns the API key. */
export async function playground(root, { first, key = () => "" } = {}) {
  const names = await fetchJson("/api/vocabularies", undefined, key());
  const explain = (token) => fetchJson(`/api/explain?vocabulary=${encodeURIComponent(token.source)}&id=${token.id}`, undefined, key());
  const card = new TokenCard(explain);
  const chosen = first ?? names[0];
  const others = ["", ...names.filter((name) => name !== chosen), chosen];
  const panels = [new Panel(names, chosen, card, key), new Panel(others, "", card, key)];
  const input = el("textarea", { id: "play-text", rows: "6", spellcheck: "false", maxlength: "20000" });
  const second = panels[1].select;
  const head = second.parentElement;
  second.setAttribute("aria-label", "Second vocabulary");
  head.prepend(el("label", { class: "field" }, el("span", {}, "compare with"), second));
  panels[0].select.parentElement.prepend(el("label", { class: "field" }, el("span", {}, "vocabulary"), panels[0].select));
  const tokenize = () => panels.forEach((panel) => panel.tokenize(input.value));
  let timer;
  input.addEventListener("input", () => (clearTimeout(timer), (timer = setTimeout(tokenize, TYPING_DELAY))));
  input.value = EXAMPLE;
  root.replaceChildren(el("label", { class: "field", for: "play-text" }, el("span", {}, "Text to tokenize"), input),
    legend(), el("div", { class: "sides" }, ...panels.map((panel) => panel.box)));
  tokenize();
}
