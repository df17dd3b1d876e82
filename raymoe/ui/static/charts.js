"use strict";
// Small line charts in SVG. A series is {name, key}; a point is a sample of the history.

const SVG = "http://www.w3.org/2000/svg";

function svgElement(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

class Chart {
  constructor(figure, title, series, format, top) {
    Object.assign(this, { figure, title, series, format, top, points: [] });
    const caption = document.createElement("figcaption");
    const name = document.createElement("span");
    name.textContent = title;
    this.value = document.createElement("span");
    this.value.className = "value";
    caption.append(name, this.value);
    this.svg = svgElement("svg", { viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img" });
    for (const y of [0, 50, 100]) {
      this.svg.append(svgElement("line", { x1: 0, x2: 300, y1: y, y2: y, class: "grid" }));
    }
    this.paths = series.map((_, i) => svgElement("path", { class: `s${i}`, d: "" }));
    this.cursor = svgElement("line", { y1: 0, y2: 100, x1: 0, x2: 0, class: "cursor off" });
    this.svg.append(...this.paths, this.cursor);
    const axis = document.createElement("div");
    axis.className = "axis muted";
    this.from = document.createElement("span");
    this.most = document.createElement("span");
    axis.append(this.from, this.most);
    figure.replaceChildren(caption, this.svg, axis);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.draw(this.points));
  }

  draw(points) {
    this.points = points;
    const numbers = points.flatMap((p) => this.series.map((s) => p[s.key])).filter((v) => v != null);
    const top = this.top || niceTop(Math.max(0, ...numbers));
    const x = (i) => (points.length < 2 ? 300 : (300 * i) / (points.length - 1));
    this.series.forEach((series, s) => {
      let d = "", drawing = false;
      points.forEach((p, i) => {
        const v = p[series.key];
        if (v == null) { drawing = false; return; }
        d += `${drawing ? "L" : "M"}${x(i).toFixed(1)} ${(100 - (100 * Math.min(v, top)) / top).toFixed(2)}`;
        drawing = true;
      });
      this.paths[s].setAttribute("d", d);
    });
    this.cursor.setAttribute("class", "cursor off");
    const last = points[points.length - 1];
    this.say(last, "");
    this.most.textContent = numbers.length ? `top ${this.format(top)}` : "";
    this.from.textContent = points.length > 1 ? `${ago(last.at - points[0].at)} ago` : "";
    const said = last ? this.words(last) : "no figures yet";
    this.svg.setAttribute("aria-label", `${this.title}: ${said}`);
  }

  words(point) {
    const known = this.series.filter((s) => point[s.key] != null);
    if (!known.length) return "nothing to measure now";
    return known.map((s) => `${s.name} ${this.format(point[s.key])}`.trim()).join(", ");
  }

  say(point, when) {
    this.value.replaceChildren();
    if (!point) { this.value.textContent = "collecting…"; return; }
    const known = this.series.map((s, i) => [s, i]).filter(([s]) => point[s.key] != null);
    if (!known.length) this.value.textContent = "idle";
    for (const [series, i] of known) {
      if (this.series.length > 1) {
        const swatch = document.createElement("i");
        swatch.className = `swatch s${i}`;
        this.value.append(swatch);
      }
      this.value.append(`${series.name} ${this.format(point[series.key])}`.trim());
    }
    if (when) this.value.append(` ${when}`);
  }

  point(event) {
    const n = this.points.length;
    if (!n) return;
    const box = this.svg.getBoundingClientRect();
    const part = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const i = Math.round(part * (n - 1));
    const x = n < 2 ? 300 : (300 * i) / (n - 1);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("class", "cursor");
    this.say(this.points[i], `at ${clock(this.points[i].at)}`);
  }
}

function niceTop(value) {
  if (value <= 0) return 1;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * scale).find((step) => step >= value * 1.02) || value;
}

function ago(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

function clock(at) {
  return new Date(at * 1000).toLocaleTimeString([], { hour12: false });
}
