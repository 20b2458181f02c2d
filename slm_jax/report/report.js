"use strict";
// Reads values out of the charts: under the pointer, or with the arrow keys. All else works without scripts.
(() => {
  const element = document.getElementById("tracks");
  if (!element) return;
  const tracks = JSON.parse(element.textContent);
  const words = { step: "step", tokens: "tokens", seconds: "time", flops: "FLOPs" };

  const number = (value) => {
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(4)));
  };
  const clock = (value) => {
    if (value < 60) return number(value) + " s";
    const s = Math.round(value), two = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(s / 60);
    return minutes < 60 ? `${minutes}:${two(s % 60)}` : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${two(s % 60)}`;
  };
  const forms = { number, percent: (value) => (100 * value).toFixed(1) + " %" };

  // The index of the point nearest to x; points are in order.
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - points[low - 1] < points[low] - x ? low - 1 : low;
  };

  const visible = (plot) => [...plot.querySelectorAll(".view")].find((view) => view.offsetParent !== null);

  for (const figure of document.querySelectorAll("figure.chart")) {
    const plot = figure.querySelector(".plot");
    const lines = JSON.parse(figure.querySelector("script.lines").textContent);
    const form = forms[figure.dataset.form];
    const ruler = document.createElement("div"), readout = document.createElement("div");
    ruler.className = "ruler"; readout.className = "readout";
    ruler.hidden = readout.hidden = true;
    plot.append(ruler, readout);
    let at = -1; // the point of the first line, for the keys

    const show = (x, spoken) => {
      const view = visible(plot);
      if (!view) return;
      const axis = view.dataset.axis, low = Number(view.dataset.low), high = Number(view.dataset.high);
      const smooth = !document.querySelector(".smoothing:not(:checked)");
      const rows = [];
      let place = null;
      for (const line of lines) {
        const points = tracks[line.track][axis], i = nearest(points, x);
        const y = smooth && line.smooth ? line.smooth[i] : line.y[i];
        if (y === null || points[i] === null) continue;
        if (place === null) { place = points[i]; at = i; }
        if (Math.abs(points[i] - place) > 0.5 * (high - low)) continue;
        const apart = Math.abs(points[i] - place) > 0.01 * (high - low);
        rows.push({ line, y, where: apart ? points[i] : null });
      }
      if (place === null) { hide(); return; }
      const name = (value) => (axis === "seconds" ? clock(value) : number(value));
      const head = document.createElement("b");
      head.textContent = `${words[axis]} ${name(place)}`;
      readout.replaceChildren(head);
      for (const { line, y, where } of rows) {
        const row = document.createElement("div"), key = document.createElement("span");
        key.className = "key " + line.style;
        row.append(key, `${line.name} ${form(y)}` + (where === null ? "" : ` (at ${name(where)})`));
        readout.append(row);
      }
      readout.setAttribute("aria-live", spoken ? "polite" : "off");
      const area = view.querySelector(".area"), share = (place - low) / (high - low);
      const left = area.offsetLeft + share * area.offsetWidth;
      ruler.style.left = left + "px";
      ruler.style.top = area.offsetTop + "px";
      ruler.style.height = area.offsetHeight + "px";
      ruler.hidden = readout.hidden = false;
      const wanted = share < 0.5 ? left + 12 : left - readout.offsetWidth - 12;
      readout.style.left = Math.max(0, Math.min(wanted, plot.offsetWidth - readout.offsetWidth)) + "px";
    };
    const hide = () => { ruler.hidden = readout.hidden = true; };

    const follow = (event) => {
      const view = visible(plot);
      if (!view) return;
      const box = view.querySelector(".area").getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const low = Number(view.dataset.low), high = Number(view.dataset.high);
      show(low + share * (high - low), false);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const view = visible(plot);
      if (!view || !lines.length) return;
      const points = tracks[lines[0].track][view.dataset.axis], last = points.length - 1;
      const far = Math.max(1, Math.round(points.length / 20));
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -far, PageDown: far, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") { hide(); return; }
      if (step === undefined) return;
      event.preventDefault();
      at = Math.min(last, Math.max(0, (at < 0 ? last + 1 : at) + step));
      show(points[at], true);
    });
  }
})();
