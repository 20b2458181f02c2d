// Learning curves of the served runs as inline SVG.
import { el, fetchJson } from "./pieces.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 280, 50, 14, 10, 30];
const CHARTS = [
  { title: "Loss", unit: "nats per token", lines: [["val_loss", "validation"], ["loss", "training"]] },
  { title: "Validation bits per byte", unit: "bits", lines: [["val_bits_per_byte", "validation"]] },
  { title: "Learning rate", unit: "", lines: [["lr", ""]] },
];

/** Return about `count` round values within [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [10, 5, 2, 1].map((m) => m * power).find((s) => s <= rough * 1.4);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) values.push(value);
  return values;
}

const format = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3)));

function chart({ title, unit, lines }, runs) {
  const series = runs.flatMap(({ name, points }, number) => lines.flatMap(([field, label], index) => points[field]?.length
    ? [{ name: [runs.length > 1 ? name : "", label].filter(Boolean).join(", "), points: points[field], number, faint: index > 0 }] : []));
  if (!series.length) return null;
  const all = series.flatMap((s) => s.points);
  const [x0, x1] = [0, Math.max(...all.map((p) => p[0]))];
  const values = all.map((p) => p[1]);
  const pad = (Math.max(...values) - Math.min(...values)) * 0.05 || 1;
  const [y0, y1] = [Math.max(0, Math.min(...values) - pad), Math.max(...values) + pad];
  const x = (step) => LEFT + ((step - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0",
    "aria-label": `${title}: ${series.map((s) => `${s.name || title} ends at ${format(s.points.at(-1)[1])}`).join("; ")}` });
  for (const value of ticks(y0, y1, 5)) {
    svg.append(el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      el("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const step of ticks(x0, x1, 6)) {
    svg.append(el("text", { x: x(step), y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" }, step.toLocaleString("en")));
  }
  for (const { points, number, faint } of [...series].reverse()) {
    const path = points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(el("path", { class: `line-${number + 1}${faint ? " faint" : ""}`, d: path, fill: "none" }));
    if (points.length <= 40) {
      svg.append(...points.map(([step, value]) => el("circle", { class: `line-${number + 1}`, cx: x(step), cy: y(value), r: 3 })));
    }
  }
  const cross = el("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(cross);
  const readout = el("p", { class: "readout small", "aria-live": "polite" });
  const showStep = (step) => {
    cross.setAttribute("x1", x(step));
    cross.setAttribute("x2", x(step));
    const values = series.map(({ name, points }) => {
      const nearest = points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));
      return `${name || "value"} ${format(nearest[1])}`;
    });
    readout.textContent = `step ${Math.round(step).toLocaleString("en")}: ${values.join(" · ")}`;
  };
  const showFinalValues = () => {
    cross.setAttribute("x1", -9);
    cross.setAttribute("x2", -9);
    readout.replaceChildren(...series.map((s) => el("span", { class: "nowrap" }, el("i", { class: `key-line line-${s.number + 1}${s.faint ? " faint" : ""}` }),
      `${s.name ? `${s.name} ` : ""}${format(s.points.at(-1)[1])}`)));
  };
  let step = x1;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    showStep((step = x0 + Math.min(Math.max(share, 0), 1) * (x1 - x0)));
  });
  svg.addEventListener("pointerleave", showFinalValues);
  svg.addEventListener("blur", showFinalValues);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (move) event.preventDefault(), showStep((step = Math.min(Math.max(step + (move * (x1 - x0)) / 50, x0), x1)));
  });
  showFinalValues();
  const head = el("h3", {}, title, unit ? el("span", { class: "muted small" }, ` ${unit}`) : null);
  return el("figure", { class: "chart card" }, head, svg, readout);
}

/** Fill an element with the charts of one or two runs. `key` returns the API key. */
export async function curves(root, names, key) {
  const options = (chosen) => names.map((name) => el("option", { value: name, selected: name === chosen }, name));
  const selects = [el("select", { "aria-label": "Run" }, ...options(names[0]))];
  if (names.length > 1) selects.push(el("select", { "aria-label": "Second run" }, ...options(names[1])));
  const charts = el("div", { class: "charts" });
  const draw = async () => {
    const chosen = [...new Set(selects.map((select) => select.value))];
    const runs = await Promise.all(chosen.map(async (name) =>
      ({ name, points: await fetchJson(`/api/curve?run=${encodeURIComponent(name)}`, undefined, key()) })));
    const figures = CHARTS.map((spec) => chart(spec, runs)).filter(Boolean);
    charts.replaceChildren(...(figures.length ? figures : ["This run has no metrics.jsonl."]));
  };
  selects.forEach((select) => select.addEventListener("change", draw));
  root.replaceChildren(el("div", { class: "actions" }, ...selects), charts);
  await draw();
}
