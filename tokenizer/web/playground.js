// The tokenizer playground: a text, cut while it is typed by one vocabulary or by two side by side.
import { Card, ask, el, legend, look, piece, walkable } from "./pieces.js";

const EXAMPLE = 'def greet(name="World"):\n    return f"HELLO, {name}! Naïve café, שלום, 東京 🙂"\n';
const WAIT = 80; // milliseconds after a key, before the text is cut
const SHOWN = 4000; // tokens of a side that are shown

class Side {
  constructor(names, chosen, card, key) {
    this.key = key;
    const options = names.map((name) => el("option", { value: name, selected: name === chosen }, name || "none"));
    this.select = el("select", { "aria-label": "Vocabulary", onchange: () => this.cut(this.text) }, ...options);
    this.figures = el("dl", { class: "figures" });
    this.mix = el("div", { class: "mix", "aria-hidden": "true" });
    this.row = el("div", { class: "pieces", tabindex: "0", role: "region", "aria-label": "Tokens, arrow keys walk" });
    this.more = el("p", { class: "muted small", hidden: true });
    this.box = el("section", { class: "card" }, el("div", { class: "side-head" }, this.select, this.figures), this.mix,
      this.row, this.more);
    walkable(this.row, card);
  }

  async cut(text) {
    this.text = text;
    const name = this.select.value;
    if (!name) return this.show(null);
    const turn = (this.turn = (this.turn ?? 0) + 1);
    try {
      const found = await ask("/api/cut", { vocabulary: name, text }, this.key());
      if (turn === this.turn) this.show(found, name);
    } catch (error) {
      if (turn === this.turn) this.row.replaceChildren(el("span", { class: "problem" }, error.message));
    }
  }

  show(found, name) {
    this.figures.replaceChildren();
    this.mix.replaceChildren();
    this.row.replaceChildren();
    this.more.hidden = true;
    if (!found) return;
    const { tokens, bytes, characters } = found;
    const figure = (term, value) => el("div", {}, el("dt", {}, term), el("dd", {}, value));
    this.figures.append(figure("tokens", tokens.length.toLocaleString("en")), figure("bytes", bytes.toLocaleString("en")),
      figure("bytes per token", tokens.length ? (bytes / tokens.length).toFixed(2) : "–"));
    if (characters !== bytes) this.figures.append(figure("characters", characters.toLocaleString("en")));
    const counts = new Map();
    for (const [, kind] of tokens) counts.set(look(kind), (counts.get(look(kind)) ?? 0) + 1);
    for (const [kind, count] of counts) {
      const part = el("i", { class: `piece-${kind}`, title: `${count} ${kind}` });
      part.style.flexGrow = count;
      this.mix.append(part);
    }
    // Byte tokens have their name for a text; the row then shows the name as a mark.
    this.row.append(...tokens.slice(0, SHOWN).map(([text, kind, id, title]) =>
      piece({ text: kind === "byte" && text.length > 1 ? "" : text, name: title, kind, id, source: name })));
    this.more.hidden = tokens.length <= SHOWN;
    this.more.textContent = `and ${(tokens.length - SHOWN).toLocaleString("en")} more tokens`;
  }
}

/** Put the playground into an element. `first`: the vocabulary to begin with; `key`: gives the API key. */
export async function playground(root, { first, key = () => "" } = {}) {
  const names = await ask("/api/vocabularies", undefined, key());
  const explain = (token) => ask(`/api/explain?vocabulary=${encodeURIComponent(token.source)}&id=${token.id}`, undefined, key());
  const card = new Card(explain);
  const chosen = first ?? names[0];
  const sides = [new Side(names, chosen, card, key), new Side(["", ...names.filter((n) => n !== chosen), chosen], "", card, key)];
  const input = el("textarea", { id: "play-text", rows: "6", spellcheck: "false", maxlength: "200000" });
  const second = sides[1].select;
  const head = second.parentElement;
  second.setAttribute("aria-label", "Second vocabulary");
  head.prepend(el("label", { class: "field" }, el("span", {}, "compare with"), second));
  sides[0].select.parentElement.prepend(el("label", { class: "field" }, el("span", {}, "vocabulary"), sides[0].select));
  const cut = () => sides.forEach((side) => side.cut(input.value));
  let timer;
  input.addEventListener("input", () => (clearTimeout(timer), (timer = setTimeout(cut, WAIT))));
  input.value = EXAMPLE;
  root.replaceChildren(el("label", { class: "field", for: "play-text" }, el("span", {}, "Text to cut into tokens"), input),
    legend(), el("div", { class: "sides" }, ...sides.map((side) => side.box)));
  cut();
}
