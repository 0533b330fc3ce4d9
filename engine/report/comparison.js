// The small multiples of a comparison: a grid of heads and lines over training for every training run, and one slider
// through all of them.
//
// engine/report/comparison_stage.py makes the payload.  Effects are whole numbers of hundredths of a nat.  Names are
// only ever set as text.
import { PACE, el, linear, mark, minus, niceTicks, put, svg, unpackAll } from "./stage.js";

const COLOURS = { head_1: "clean", all: "all", parity: "even" };
const DASHES = { head_1: "none", all: "1 3", parity: "6 3" };
const SIZE = { width: 340, height: 150, left: 34, right: 8, top: 8, bottom: 20 };

const inNats = (hundredths) => minus(`${hundredths < 0 ? "-" : "+"}${(Math.abs(hundredths) / 100).toFixed(2)}`);

class Multiples {
  constructor(root, payload) {
    Object.assign(this, { root, payload, timer: null });
    const values = payload.runs.flatMap((run) => (run.heads ? [...run.heads.effect] : []));
    this.limit = values.reduce((most, value) => (value === payload.missing ? most : Math.max(most, Math.abs(value))), 1);
    const lines = payload.runs.flatMap((run) => Object.values(run.lines).flatMap((line) => [...line]))
      .filter((value) => value !== payload.missing);
    this.ticks = niceTicks(Math.min(0, ...lines), Math.max(1, ...lines));
    this.panels = payload.runs.map((run) => new Panel(run, this));
  }

  start() {
    const { payload } = this;
    const last = payload.positions.length - 1;
    this.slider = el("input", { type: "range", name: "checkpoint", id: "multiples-checkpoint", min: 0, max: last, step: 1, value: this.fromAddress() ?? last });
    this.where = el("output", { for: "multiples-checkpoint" });
    this.button = el("button", { type: "button", "aria-pressed": "false", "aria-label": "Play through training" }, "Play");
    this.button.addEventListener("click", () => (this.timer === null ? this.play() : this.pause()));
    this.slider.addEventListener("input", () => { this.pause(); this.go(Number(this.slider.value)); });
    window.addEventListener("hashchange", () => { const at = this.fromAddress(); if (at !== null) this.go(at, false); });
    this.root.replaceChildren(
      el("h2", {}, "The time-lapse"),
      el("div", { class: "multiples-bar" }, this.button,
        el("label", { for: "multiples-checkpoint", class: "soft" }, payload.unit === "tokens" ? "tokens seen" : "training step"), this.slider, this.where),
      this.legend(),
      el("div", { class: "multiples-panels" }, ...this.panels.map((panel) => panel.build())));
    this.root.hidden = false;
    this.readColours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recoloured());
    this.go(Number(this.slider.value), false);
  }

  // The colours of the scale as they are: a thousand cells with variables would take twice as long at every step.
  readColours() {
    const style = getComputedStyle(this.root);
    this.shades = Array.from({ length: this.payload.levels }, (_, level) => style.getPropertyValue(`--effect-${level}`).trim());
  }

  recoloured() {
    this.readColours();
    for (const panel of this.panels) panel.repaint();
  }

  legend() {
    const names = Object.entries(this.payload.named).filter(([name]) => this.payload.runs.some((run) => run.lines[name]));
    const key = ([name, words]) => el("span", { class: "multiples-key" },
      svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, ...stroke(name) })), words);
    const scale = el("span", { class: "multiples-scale", "aria-hidden": "true" });
    const n = this.payload.levels;
    scale.style.background = `linear-gradient(to right, ${Array.from({ length: n }, (_, level) => `var(--effect-${level})`).join(", ")})`;
    return el("p", { class: "soft" }, el("span", { class: "multiples-key" }, inNats(-this.limit), scale, `${inNats(this.limit)} nats, a head alone`),
      el("span", { class: "multiples-key" }, el("span", { class: "multiples-hatch", "aria-hidden": "true" }), "not significant"), ...names.map(key));
  }

  // A place on the axis that all share, from #at=STEP or #at=TOKENS: the last at or before it.
  fromAddress() {
    const asked = new URLSearchParams(location.hash.slice(1)).get("at");
    if (asked === null || asked === "" || !Number.isFinite(Number(asked))) return null;
    return Math.max(0, this.payload.positions.filter((position) => position <= Number(asked)).length - 1);
  }

  go(place, isAsked = true) {
    this.slider.value = place;
    const label = this.payload.labels[place];
    put(this.where, label);
    this.slider.setAttribute("aria-valuetext", `${label} ${this.payload.unit}`);
    for (const panel of this.panels) panel.show(place);
    clearTimeout(this.naming);
    this.naming = setTimeout(() => this.panels.forEach((panel) => panel.name()), 150);
    if (isAsked) history.replaceState(null, "", `#at=${this.payload.positions[place]}`);
  }

  play() {
    const last = this.payload.positions.length - 1;
    if (Number(this.slider.value) === last) this.go(0);
    this.button.setAttribute("aria-pressed", "true");
    put(this.button, "Pause");
    const pace = PACE[matchMedia("(prefers-reduced-motion: reduce)").matches ? "reduce" : "no-preference"];
    this.timer = setInterval(() => {
      const next = Number(this.slider.value) + 1;
      this.go(next);
      if (next >= last) this.pause();
    }, pace);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.button.setAttribute("aria-pressed", "false");
    put(this.button, "Play");
  }
}

// One training run.
class Panel {
  constructor(run, whole) {
    Object.assign(this, { run, whole, active: null, at: null });
    this.id = `multiples-${whole.payload.runs.indexOf(run)}`;
  }

  build() {
    this.when = el("p", { class: "soft" });
    this.words = el("p", { class: "multiples-words", "aria-live": "polite" });
    const grid = this.run.heads ? this.buildGrid() : el("p", { class: "soft" }, "Its heads were not patched one by one.");
    return el("section", { class: "multiples-panel", "aria-labelledby": this.id }, el("h3", { id: this.id }, this.run.name), this.when, grid, this.words, this.drawLines());
  }

  buildGrid() {
    const { layers, n_heads: n } = this.run.heads;
    const cell = (layer, head) => el("span", { role: "gridcell", id: `${this.id}-${layer}-${head}` });
    this.cells = layers.map((_, layer) => Array.from({ length: n }, (_, head) => cell(layer, head)));
    const rows = this.cells.map((cells, layer) => el("div", { role: "row" }, el("span", { role: "rowheader", class: "soft" }, String(layers[layer])), ...cells));
    const columns = el("div", { "aria-hidden": "true", class: "soft" }, el("span", {}), ...Array.from({ length: n }, (_, head) => el("span", {}, String(head))));
    this.grid = el("div", { role: "grid", tabindex: 0, class: "multiples-grid", "aria-label": `Effect of each head alone, ${this.run.name}` }, ...rows.reverse());
    this.grid.style.setProperty("--heads", n);
    columns.style.setProperty("--heads", n);
    columns.classList.add("multiples-columns");
    this.grid.addEventListener("keydown", (event) => this.move(event));
    this.grid.addEventListener("focus", () => this.point(this.active ?? [this.cells.length - 1, 0]));
    this.grid.addEventListener("blur", () => this.point(null));
    this.cells.forEach((row, layer) => row.forEach((one, head) => {
      one.addEventListener("pointerenter", () => this.point([layer, head]));
    }));
    this.grid.addEventListener("pointerleave", () => this.point(null));
    return el("div", { class: "multiples-box" }, this.grid, columns);
  }

  move(event) {
    const by = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (!by || !this.active) return;
    event.preventDefault();
    const inside = (value, n) => Math.min(n - 1, Math.max(0, value));
    this.point([inside(this.active[0] + by[0], this.cells.length), inside(this.active[1] + by[1], this.cells[0].length)]);
  }

  point(place) {
    if (this.active) this.cells[this.active[0]][this.active[1]].classList.remove("active");
    this.active = place;
    if (place) {
      this.cells[place[0]][place[1]].classList.add("active");
      this.grid.setAttribute("aria-activedescendant", `${this.id}-${place[0]}-${place[1]}`);
    } else this.grid.removeAttribute("aria-activedescendant");
    this.tell();
  }

  // The run's last checkpoint at or before a place on the shared axis; null before its first.
  show(place) {
    const at = this.run.places.filter((own) => own <= place).length - 1;
    this.at = at < 0 ? null : at;
    const isOver = at === this.run.places.length - 1 && this.run.places[at] < place;
    put(this.when, at < 0 ? "no checkpoint yet" : `${isOver ? "its last, " : ""}${this.run.checkpoints[at]}`);
    if (this.run.heads) this.colour();
    this.pointLines();
    this.tell();
  }

  // Where the numbers of a head lie; null before the first checkpoint.
  placeOf(layer, head) {
    const { heads } = this.run;
    return this.at === null ? null : (this.at * heads.layers.length + layer) * heads.n_heads + head;
  }

  read(layer, head) {
    const place = this.placeOf(layer, head);
    if (place === null) return null;
    const { heads } = this.run;
    const known = (value) => (value === this.whole.payload.missing ? null : value);
    const [value, low, high] = ["effect", "low", "high"].map((name) => known(heads[name][place]));
    return value === null ? null : { value, low, high, isSignificant: heads.significant[place] === 1 };
  }

  // Only what changes is touched, and names wait until the slider rests: with many training runs these take longest.
  colour() {
    const { levels } = this.whole.payload;
    this.cells.forEach((row, layer) => row.forEach((cell, head) => {
      const at = this.placeOf(layer, head);
      const { effect, significant } = this.run.heads;
      const isKnown = at !== null && effect[at] !== this.whole.payload.missing;
      const level = isKnown ? Math.min(levels - 1, Math.floor(((effect[at] / this.whole.limit + 1) / 2) * levels)) : null;
      const isDoubtful = isKnown && significant[at] !== 1;
      if (cell.level !== level) cell.style.backgroundColor = isKnown ? this.whole.shades[level] : "transparent";
      if (cell.isDoubtful !== isDoubtful) cell.classList.toggle("doubtful", isDoubtful);
      Object.assign(cell, { level, isDoubtful });
    }));
  }

  repaint() {
    if (!this.run.heads) return;
    for (const cell of this.cells.flat()) cell.level = undefined;
    this.colour();
  }

  // The names of all cells, as a screen reader goes through them.
  name() {
    if (!this.run.heads) return;
    this.cells.forEach((row, layer) => row.forEach((cell, head) => mark(cell, "aria-label", this.say(layer, head, this.read(layer, head)))));
  }

  say(layer, head, read) {
    const name = `L${this.run.heads.layers[layer]}.H${head}`;
    if (!read) return `${name}: no value`;
    const interval = read.low === null ? "" : ` [${inNats(read.low)}, ${inNats(read.high)}]`;
    return `${name} ${inNats(read.value)}${interval} nats${read.isSignificant ? "" : ", not significant"}`;
  }

  // The head that is pointed at, else the largest at this checkpoint.
  tell() {
    if (!this.run.heads) return;
    if (this.active) {
      const [layer, head] = this.active;
      const words = this.say(layer, head, this.read(layer, head));
      mark(this.cells[layer][head], "aria-label", words);
      put(this.words, words);
      return;
    }
    const most = this.largest();
    put(this.words, most ? `largest: ${this.say(...most, this.read(...most))}` : "");
  }

  // [layer, head] of the head with the largest effect at this checkpoint; null where there is none.
  largest() {
    if (this.at === null) return null;
    const { effect, layers, n_heads: n } = this.run.heads;
    const { missing } = this.whole.payload;
    const start = this.at * layers.length * n;
    let most = null;
    for (let at = 0; at < layers.length * n; at++) {
      const value = effect[start + at];
      if (value !== missing && (most === null || Math.abs(value) > Math.abs(effect[start + most]))) most = at;
    }
    return most === null ? null : [Math.floor(most / n), most % n];
  }

  drawLines() {
    const { payload, ticks } = this.whole;
    const { width, height, left, right, top, bottom } = SIZE;
    const x = linear(payload.x[0], payload.x[payload.x.length - 1], left, width - right);
    const y = linear(ticks[0], ticks[ticks.length - 1], height - bottom, top);
    this.place = { x: (at) => x(payload.x[this.run.places[at]]), y };
    const rules = ticks.flatMap((value) => [
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: value === 0 ? "var(--soft)" : "var(--line)", "stroke-width": value === 0 ? 1 : 0.6 }),
      svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, minus(String(value / 100)))]);
    const ends = [0, payload.x.length - 1].map((at, which) => svg("text", { x: x(payload.x[at]), y: height - 4, "text-anchor": which ? "end" : "start" }, payload.labels[at]));
    this.cursor = svg("line", { y1: top, y2: height - bottom, stroke: "var(--ink)", "stroke-dasharray": "2 2" });
    this.dots = Object.keys(this.run.lines).map((name) => [name, svg("circle", { r: 3.5, fill: `var(--${COLOURS[name]})` })]);
    const lines = Object.entries(this.run.lines).map(([name, line]) => svg("polyline", { points: this.points(line), fill: "none", ...stroke(name) }));
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "multiples-lines", role: "img", "aria-label": this.linesInWords() },
      ...rules, ...ends, ...lines, this.cursor, ...this.dots.map(([, dot]) => dot));
  }

  known(line) {
    return [...line].map((value, at) => ({ value, at })).filter(({ value }) => value !== this.whole.payload.missing);
  }

  points(line) {
    return this.known(line).map(({ value, at }) => `${this.place.x(at).toFixed(1)},${this.place.y(value).toFixed(1)}`).join(" ");
  }

  linesInWords() {
    const words = Object.entries(this.run.lines).map(([name, line]) => {
      const known = this.known(line);
      const who = name === "head_1" && this.run.largest ? `${this.run.largest}, its largest head` : this.whole.payload.named[name];
      return `${who} from ${inNats(known[0].value)} to ${inNats(known[known.length - 1].value)} nats`;
    });
    return `${this.run.name} over training: ${words.join("; ")}`;
  }

  pointLines() {
    const x = this.at === null ? SIZE.left : this.place.x(this.at);
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, x);
    for (const [name, dot] of this.dots) {
      const value = this.at === null ? this.whole.payload.missing : this.run.lines[name][this.at];
      dot.setAttribute("visibility", value === this.whole.payload.missing ? "hidden" : "visible");
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", this.place.y(value === this.whole.payload.missing ? 0 : value));
    }
  }
}

function stroke(name) {
  return { stroke: `var(--${COLOURS[name]})`, "stroke-width": name === "all" ? 1.5 : 2, "stroke-dasharray": DASHES[name] };
}

// Shows a comparison in an element.
export async function show(element, payload) {
  const multiples = new Multiples(element, await unpackAll(payload));
  multiples.start();
  return multiples;
}
