// The stage of the page: a slider through training, a grid of heads, and the stored effect of any set of them.
//
// engine/report/stage.py makes the payload.  Effects are whole numbers of hundredths of their measure's unit.
// Names come from models and prompts, whatever these hold: they are only ever set as text.

// `isShare`: said in per cent.  `falls`: less of it is nearer to the right answer, or to the clean run.
const MEASURES = {
  logit_diff: { label: "logit difference", unit: "nats" },
  success: { label: "success rate", unit: "of prompts", isShare: true },
  recovery: { label: "normalised recovery", unit: "of the gap", isShare: true },
  probability: { label: "probability", unit: "probability", says: "probability of the right answer's first token where the answers differ" },
  rank: { label: "rank", unit: "places", falls: true, says: "place of the right answer's first token where the answers differ, among all tokens; 0 is first" },
  kl: { label: "divergence", unit: "nats", falls: true, says: "divergence (KL) of the next token's probabilities from the clean run's" },
  sequence: { label: "whole answers", unit: "nats", says: "log-probability of the whole right answer less that of the wrong one" },
  answers: { label: "generated answers", unit: "of prompts", isShare: true, says: "prompts whose generated text begins with the right answer" },
};
const PACE = { "no-preference": 600, reduce: 1200 }; // milliseconds a checkpoint, while playing
const SVG = "http://www.w3.org/2000/svg";

// --- the numbers ---

async function unpack(packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const n = planes.length / packed.bytes;
  const values = new Int32Array(n);
  const unused = 32 - 8 * packed.bytes;
  for (let plane = 0; plane < packed.bytes; plane++) {
    for (let i = 0; i < n; i++) values[i] |= planes[plane * n + i] << (8 * plane);
  }
  for (let i = 0; i < n; i++) values[i] = (values[i] << unused) >> unused;
  if (packed.sums) addSums(values, packed.shape[packed.shape.length - 1]);
  return values;
}

// A set of heads was kept as how far it is from its first head and its other heads together.
function addSums(values, nSubsets) {
  for (let start = 0; start < values.length; start += nSubsets) {
    for (let bits = 3; bits < nSubsets; bits++) {
      const others = bits & (bits - 1);
      if (others) values[start + bits] += values[start + others] + values[start + (bits ^ others)];
    }
  }
}

// Every array of a payload in place of what it was packed to, however deep it lies.
async function unpackAll(value) {
  if (value === null || typeof value !== "object") return value;
  if (typeof value.data === "string" && value.shape) return unpack(value);
  if (Array.isArray(value)) return value.length && typeof value[0] === "object" ? Promise.all(value.map(unpackAll)) : value;
  const entries = await Promise.all(Object.entries(value).map(async ([name, inner]) => [name, await unpackAll(inner)]));
  return Object.fromEntries(entries);
}

const headsOfBits = (bits) => {
  const heads = [];
  for (let head = 0; bits >> head; head++) if ((bits >> head) & 1) heads.push(head);
  return heads;
};

class Run {
  constructor(packed, missing) {
    this.missing = missing;
    this.name = packed.name;
    this.nHeads = packed.n_heads;
    this.packed = packed;
  }

  async load() {
    Object.assign(this, await unpackAll(this.packed));
    this.labels = this.checkpoints.map((one) => one.label);
    const values = this.measures.logit_diff.mean;
    this.nRows = values.length / (this.checkpoints.length * this.layers.length);
    this.subsetHeads = this.lattice ? null : this.readMask();
    this.rowOf = new Map((this.subsetHeads || []).map((heads, row) => [heads.join(), row]));
    this.alone = Array.from({ length: this.nHeads }, (_, head) => this.row([head]));
    for (const of of Object.values(this.measures)) for (const one of [of, of.spread]) if (one?.rows) one.places = new Map(one.rows.map((row, at) => [row, at]));
    this.bySize = new Map();
  }

  readMask() {
    const width = Math.ceil(this.nHeads / 8);
    const has = (row, head) => (this.mask[row * width + (head >> 3)] >> (7 - (head & 7))) & 1;
    return Array.from({ length: this.nRows }, (_, row) =>
      Array.from({ length: this.nHeads }, (_, head) => head).filter((head) => has(row, head)));
  }

  // Where a set of heads stands along the subset axis; undefined where it was not patched, or is not on the page.
  row(heads) {
    if (this.lattice) return heads.reduce((bits, head) => bits | (1 << head), 0);
    return this.rowOf.get(heads.join());
  }

  headsOf(row) {
    return this.lattice ? headsOfBits(row) : this.subsetHeads[row];
  }

  rowsOfSize(size) {
    if (!this.bySize.has(size)) {
      const rows = Array.from({ length: this.nRows }, (_, row) => row);
      this.bySize.set(size, rows.filter((row) => this.headsOf(row).length === size));
    }
    return this.bySize.get(size);
  }

  // Where a number of a cell lies in `of`, which has all subsets of the page, or a few; undefined where it has none.
  place(of, checkpoint, layer, row) {
    const at = of.places ? of.places.get(row) : row;
    return at === undefined ? undefined : (checkpoint * this.layers.length + layer) * (of.places?.size ?? this.nRows) + at;
  }

  // {value, low, high} in hundredths; null where there is none.  `digits`: to which decimal the ends are known.
  read(measure, checkpoint, layer, row) {
    const of = this.measures[measure];
    const at = row === undefined ? undefined : this.place(of, checkpoint, layer, row);
    if (at === undefined) return null;
    if (of.restored) return { value: (100 * (of.restored[at] - of.broken[at])) / this.n_trials, low: null, high: null };
    if (of.n_clear) return this.readRecovery(of, checkpoint, at);
    return { value: of.mean[at], ...this.interval(of, checkpoint, layer, row, of.mean[at]) };
  }

  interval({ spread }, checkpoint, layer, row, mean) {
    const at = spread ? this.place(spread, checkpoint, layer, row) : undefined;
    if (at === undefined) return { low: null, high: null };
    if (spread.ratio) return roughly(mean, spread, at);
    const middle = spread.lean[at] + 2 * mean;
    return { low: (middle - spread.width[at]) / 2, high: (middle + spread.width[at]) / 2 };
  }

  readRecovery(of, checkpoint, at) {
    const known = (values) => (values[at] === this.missing ? null : values[at]);
    if (!of.n_clear[checkpoint]) return null;
    return { value: known(of.mean), low: known(of.low), high: known(of.high) };
  }

  // Whether the effect of a head alone is, by this measure; null where that is not known.
  isSignificant(measure, checkpoint, layer, head) {
    const { significant } = this.measures[measure];
    const place = significant ? significant.heads.indexOf(head) : -1;
    if (place < 0) return null;
    return significant.is[(checkpoint * this.layers.length + layer) * significant.heads.length + place] === 1;
  }

  // The gap between the unpatched source and target runs: as much is everything that a patch could move.
  gap(measure, checkpoint) {
    const { unpatched } = this.measures[measure];
    return unpatched[this.source][checkpoint] - unpatched[this.target][checkpoint];
  }

  smallest(which, checkpoint, layer) {
    const found = this[which];
    const at = checkpoint * this.layers.length + layer;
    return found && found.bits[at] >= 0 ? { heads: headsOfBits(found.bits[at]), count: found.count[at] } : null;
  }

  // Effects of the heads one by one, added up (hundredths); null where one was not patched alone.
  sumOfSingles(checkpoint, layer, heads) {
    if (!heads.every((head) => this.alone[head] !== undefined)) return null;
    const at = (checkpoint * this.layers.length + layer) * this.nHeads;
    return Math.round(heads.reduce((sum, head) => sum + this.fine[at + head], 0) / 100);
  }

  // Place among all sets of that size that were patched, the largest effect towards the source run first.
  rank(checkpoint, layer, row) {
    const rows = this.rowsOfSize(this.headsOf(row).length);
    const start = (checkpoint * this.layers.length + layer) * this.nRows;
    const sign = this.direction === "denoise" ? 1 : -1;
    const { mean } = this.measures.logit_diff;
    const better = rows.filter((other) => sign * mean[start + other] > sign * mean[start + row]).length;
    return { place: better + 1, of: rows.length };
  }

  largestAlone(measure) {
    let largest = 0;
    for (let checkpoint = 0; checkpoint < this.checkpoints.length; checkpoint++) {
      for (let layer = 0; layer < this.layers.length; layer++) {
        for (const row of this.alone) {
          const read = this.read(measure, checkpoint, layer, row);
          if (read && read.value !== null) largest = Math.max(largest, Math.abs(read.value));
        }
      }
    }
    return largest || 1;
  }
}

// An interval of which both half-widths are known within one per cent: its ends, to the smaller one's second digit.
function roughly(mean, { width, lean, ratio }, at) {
  const [below, above] = [width[at], width[at] + lean[at]].map((power) => (power ? 0.5 * ratio ** power : 0));
  const step = Math.max(1, 10 ** (Math.floor(Math.log10(Math.max(1, Math.min(below, above)))) - 1));
  const rounded = (value) => Math.round(value / step) * step;
  return { low: rounded(mean - below), high: rounded(mean + above), digits: Math.max(0, 2 - Math.log10(step)) };
}

// --- words ---

const minus = (text) => text.replace(/(?<![\w-])-(?=\d)/g, "−");

// Hundredths with their sign: +3.46; for shares +26 %.  With an ASCII minus, so that programs read it too.
function signed(measure, value, digits = 2) {
  const size = Math.round(Math.abs(value));
  const sign = value < 0 && size !== 0 ? "-" : "+";
  return `${sign}${MEASURES[measure].isShare ? `${size} %` : (size / 100).toFixed(digits)}`;
}

const bracketed = (measure, { low, high, digits }) => (low === null ? "" : `[${signed(measure, low, digits)}, ${signed(measure, high, digits)}]`);

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

function sizeWords(size) {
  return size === 1 ? "single heads" : size === 2 ? "pairs" : size === 3 ? "triples" : `sets of ${size} heads`;
}

// A token or a text in one line.
const shown = (text) => text.replaceAll("\n", "\\n").replaceAll("\t", "\\t");

// A subset's label, as in `--subsets` and on the axis `subset` of the store.
function labelOf(heads, nHeads) {
  const plain = heads.join();
  if (nHeads <= 2 && heads.length === 1) return plain;
  const every = Array.from({ length: nHeads }, (_, head) => head);
  const named = { none: [], all: every, even: every.filter((head) => head % 2 === 0), odd: every.filter((head) => head % 2) };
  return Object.keys(named).find((name) => named[name].join() === plain) ?? plain;
}

const stepWords = (one, byLabel) => (one.step >= 0 && !byLabel ? `step ${one.step.toLocaleString("en")}` : one.label);

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

// --- elements ---

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Sets only what differs: most of a grid stays the same from one checkpoint to the next.
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function mark(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

const titled = (text) => svg("title", {}, text);

// --- the stage ---

class Stage {
  constructor(root, payload, options) {
    this.root = root;
    this.payload = payload;
    this.options = options;
    this.runs = payload.runs.map((run) => new Run(run, payload.missing));
    this.focused = null; // the head that details are shown of: {layer, head}
    this.timer = null;
    this.leaving = new AbortController();
    this.listening = { signal: this.leaving.signal };
    this.width = 600; // of the line over training, until it is measured: asking for it at every step would cost a layout
    this.written = []; // when the address was written, as far as half a minute ago
  }

  async start() {
    this.mechanism = await unpackAll(this.payload.mechanism);
    await Promise.all(this.runs.map((run) => run.load()));
    [this.run] = this.runs;
    const { checkpoint, layer, heads } = this.payload.start;
    this.state = { checkpoint, layer: Math.max(0, this.run.layers.indexOf(layer)), heads, measure: "logit_diff" };
    if (heads.length) this.focused = { layer: this.state.layer, head: heads[0] };
    this.build();
    this.readColours();
    this.rebuild();
    if (this.options.address) {
      this.follow();
      addEventListener("hashchange", () => this.follow(), this.listening);
    }
    this.root.hidden = false;
    if (this.options.address && location.hash.includes("=")) this.root.scrollIntoView();
    this.sizes = new ResizeObserver(() => this.resized());
    this.sizes.observe(this.trajectory);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recoloured(), this.listening);
    this.root.dataset.ready = "";
    return this;
  }

  // Takes the stage away from its page.
  leave() {
    this.pause();
    this.sizes.disconnect();
    this.leaving.abort();
  }

  get subset() {
    return this.run.row(this.state.heads);
  }

  get layerNumber() {
    return this.run.layers[this.state.layer];
  }

  site(layer) {
    return this.run.joint ? this.run.layer_words : String(this.run.layers[layer]);
  }

  // Which layer a set lies in, in words.
  layerWords(layer) {
    return this.run.joint && this.run.patched_layers.length > 1 ? `layers ${this.site(layer)} together` : `layer ${this.site(layer)}`;
  }

  // The chosen heads in words, within a sentence.
  chosenWords() {
    const { heads, layer } = this.state;
    const named = labelOf(heads, this.run.nHeads);
    if (heads.length === 0) return `no head of ${this.layerWords(layer)}`;
    if (named === heads.join()) return heads.map((head) => this.headName(layer, head)).join(" ");
    return `${named} heads of ${this.layerWords(layer)}${named === "all" ? "" : ` (${heads.join(", ")})`}`;
  }

  headName(layer, head) {
    return `L${this.site(layer)}.H${head}`;
  }

  // --- the address ---

  address() {
    return `#${Object.entries(this.selection()).map(([name, value]) => `${name}=${encodeURIComponent(value).replaceAll("%2C", ",")}`).join("&")}`;
  }

  // Browsers count how often an address is written, and refuse after 200 times in half a minute.
  writeAddress() {
    clearTimeout(this.writing);
    const now = performance.now();
    this.written = this.written.filter((time) => now - time < 30_000);
    if (this.written.length < 150) {
      this.written.push(now);
      history.replaceState(null, "", this.address());
    } else {
      this.writing = setTimeout(() => this.writeAddress(), 500);
    }
  }

  // Show the state that stands in the address.  A plus is part of a run's name, not a space.
  follow() {
    const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B")));
    this.select(asked, "The address asks for what this page does not have");
  }

  // Show what is asked for, by names as in an address; what the page does not have is named and left as it is.
  select(asked, complaint) {
    const names = ["run", "checkpoint", "layer", "heads", "measure"].filter((name) => name in asked);
    if (!names.length) return;
    const before = this.run;
    const problems = [];
    if ("run" in asked && !this.takeRun(asked.run)) problems.push(`run ${asked.run}`);
    const options = { checkpoint: this.run.labels, layer: this.run.layers.map(String), measure: Object.keys(this.run.measures) };
    const next = { ...this.state };
    for (const name of Object.keys(options).filter((one) => one in asked)) {
      const place = options[name].indexOf(asked[name]);
      if (place < 0) problems.push(`${name} ${asked[name]}`);
      else next[name] = name === "measure" ? asked[name] : place;
    }
    if ("layer" in asked || "heads" in asked) {
      const heads = this.parseHeads(asked.heads ?? "");
      if (heads) next.heads = heads;
      else problems.push(`heads ${asked.heads}`);
    }
    this.state = next;
    this.focused = next.heads.length ? { layer: next.layer, head: next.heads[0] } : null;
    if (this.run === before) this.show();
    else this.rebuild();
    this.say(problems.length ? `${complaint}: ${problems.join(", ")}.` : "");
  }

  // What is shown, as `select` takes it.
  selection() {
    const { checkpoint, heads, measure } = this.state;
    return { run: this.run.name, checkpoint: this.run.labels[checkpoint], layer: this.layerNumber, heads, measure };
  }

  parseHeads(text) {
    if (text in this.sets()) return this.sets()[text]();
    const words = text === "" ? [] : text.split(",");
    const heads = [...new Set(words.map(Number))].sort((a, b) => a - b);
    return words.every((word) => /^\d+$/.test(word)) && heads.every((head) => head < this.run.nHeads) ? heads : null;
  }

  // Another run, at the same step, layer and heads as far as it has them.
  takeRun(name) {
    const run = this.runs.find((one) => one.name === name);
    if (!run) return false;
    const [label, layer] = [this.run.labels[this.state.checkpoint], this.layerNumber];
    this.run = run;
    const { heads, measure } = this.state;
    const at = run.labels.indexOf(label);
    this.state = {
      checkpoint: at >= 0 ? at : run.labels.length - 1,
      layer: Math.max(0, run.layers.indexOf(layer)),
      heads: heads.filter((head) => head < run.nHeads),
      measure: measure in run.measures ? measure : "logit_diff",
    };
    return true;
  }

  // --- changes ---

  set(change, message = "") {
    Object.assign(this.state, change);
    this.show();
    this.say(message);
    if (this.options.address) this.writeAddress();
    this.options.changed?.(this);
  }

  changeRun(name) {
    this.takeRun(name);
    this.rebuild();
    this.set({});
  }

  toggle(layer, head) {
    this.focused = { layer, head };
    if (layer !== this.state.layer) {
      const said = `A set lies within one layer: ${this.layerWords(this.state.layer)} is left, the set begins anew with ${this.headName(layer, head)}.`;
      this.set({ layer, heads: [head] }, this.state.heads.length ? said : "");
      return;
    }
    const { heads } = this.state;
    const next = heads.includes(head) ? heads.filter((other) => other !== head) : [...heads, head].sort((a, b) => a - b);
    this.set({ heads: next });
  }

  // Sets that one click chooses; null where there is none.
  sets() {
    const every = Array.from({ length: this.run.nHeads }, (_, head) => head);
    const smallest = (which) => this.run.smallest(which, this.state.checkpoint, this.state.layer)?.heads ?? null;
    return {
      all: () => every,
      even: () => every.filter((head) => head % 2 === 0),
      odd: () => every.filter((head) => head % 2 === 1),
      none: () => [],
      random: () => this.random(),
      complement: () => every.filter((head) => !this.state.heads.includes(head)),
      sufficient: () => smallest("sufficient"),
      necessary: () => smallest("necessary"),
    };
  }

  random() {
    const halves = this.run.rowsOfSize(Math.ceil(this.run.nHeads / 2));
    const rows = halves.length ? halves : Array.from({ length: this.run.nRows }, (_, row) => row);
    return this.run.headsOf(rows[Math.floor(Math.random() * rows.length)]);
  }

  goTo(checkpoint) {
    const last = this.run.labels.length - 1;
    this.set({ checkpoint: Math.min(last, Math.max(0, checkpoint)) });
  }

  // --- playing ---

  play() {
    const last = this.run.labels.length - 1;
    if (this.state.checkpoint === last) this.goTo(0);
    const pace = PACE[matchMedia("(prefers-reduced-motion: reduce)").matches ? "reduce" : "no-preference"];
    this.timer = setInterval(() => {
      if (this.state.checkpoint < this.run.labels.length - 1) this.goTo(this.state.checkpoint + 1);
      if (this.state.checkpoint >= this.run.labels.length - 1) this.pause();
    }, pace);
    this.showPlaying();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.showPlaying();
  }

  togglePlay() {
    if (this.timer === null) this.play();
    else this.pause();
  }

  showPlaying() {
    const isPlaying = this.timer !== null;
    put(this.playButton, isPlaying ? "Pause" : "Play");
    this.playButton.setAttribute("aria-pressed", String(isPlaying));
    this.effect.parentElement.setAttribute("aria-live", isPlaying ? "off" : "polite");
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const target = document.activeElement ?? document.body;
    const isFree = target === document.body ? this.options.address && isSeen(this.slider) : this.root.contains(target);
    if (!isFree || target.closest("select, textarea, a, summary")) return;
    if (event.key === " " && target.tagName !== "BUTTON") {
      event.preventDefault();
      this.togglePlay();
    }
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && target !== this.slider && !target.closest("[tabindex]")) {
      event.preventDefault();
      this.goTo(this.state.checkpoint + by);
    }
  }

  // --- building ---

  build() {
    this.root.replaceChildren(
      el("h2", {}, "The time-lapse"), this.buildBar(), this.buildStarts(), this.buildPanels(), this.buildTrajectory(), this.buildPrompts(),
      this.buildNotes(),
    );
    this.root.setAttribute("aria-label", "The time-lapse");
    addEventListener("keydown", (event) => this.pressed(event), this.listening);
  }

  buildBar() {
    this.playButton = el("button", { type: "button", class: "stage-play", "aria-pressed": "false", "aria-label": "Play through training", onclick: () => this.togglePlay() }, "Play");
    this.slider = el("input", { type: "range", name: "checkpoint", min: 0, step: 1, "aria-label": "Checkpoint", oninput: () => this.goTo(Number(this.slider.value)) });
    this.ticks = el("div", { class: "stage-ticks", "aria-hidden": "true" });
    this.where = el("output", { class: "stage-where", "data-role": "checkpoint" });
    const choose = (name, label, change) => {
      this[name] = el("select", { name: label, onchange: (event) => change(event.target.value) });
      return el("label", { class: "stage-select" }, el("span", {}, label), this[name]);
    };
    return el("div", { class: "stage-bar" },
      this.playButton, el("div", { class: "stage-slider" }, this.slider, this.ticks), this.where,
      el("div", { class: "stage-selects" },
        choose("runSelect", "run", (value) => this.changeRun(value)),
        choose("layerSelect", "layer", (value) => this.set({ layer: this.run.layers.indexOf(Number(value)) })),
        choose("measureSelect", "measure", (value) => this.set({ measure: value }))));
  }

  buildStarts() {
    this.starts = el("p", { class: "stage-soft stage-starts", "data-role": "starts" });
    return this.starts;
  }

  buildPanels() {
    this.grid = el("div", { class: "stage-grid", role: "group", "aria-label": "Heads, by layer", onkeydown: (event) => this.moveFocus(event) });
    this.hint = el("p", { class: "stage-soft stage-hint", "aria-hidden": "true" });
    this.legend = el("p", { class: "stage-legend stage-soft" });
    this.details = el("div", { class: "stage-details", "data-role": "details" });
    this.panels = el("div", { class: "stage-panels" },
      el("div", { class: "stage-map" }, el("div", { class: "stage-scroll" }, this.grid), this.hint, this.legend),
      this.buildChosen(), this.details);
    return this.panels;
  }

  buildChosen() {
    this.chosen = el("p", { class: "stage-chosen", "data-role": "chosen" });
    this.effect = el("b", { class: "stage-effect", "data-role": "effect" });
    this.unit = el("span", { class: "stage-unit" });
    this.range = el("span", { class: "stage-interval", "data-role": "interval" });
    this.facts = el("ul", { class: "stage-facts" });
    this.setButtons = Object.fromEntries(Object.keys(this.sets()).map((name) =>
      [name, el("button", { type: "button", "data-set": name, onclick: () => this.choose(name) }, name)]));
    this.status = el("p", { class: "stage-status", role: "status", "data-role": "status" });
    return el("div", { class: "stage-side" },
      this.chosen, el("p", { class: "stage-number", "aria-live": "polite" }, this.effect, " ", this.unit, " ", this.range), this.facts,
      el("div", { class: "stage-buttons", role: "group", "aria-label": "Sets of heads" }, ...Object.values(this.setButtons)),
      this.status, this.buildCopies());
  }

  choose(name) {
    const heads = this.sets()[name]();
    if (!heads) return;
    this.focused = heads.length === 1 ? { layer: this.state.layer, head: heads[0] } : this.focused;
    this.set({ heads });
  }

  buildCopies() {
    const action = (words, name, act) => el("button", { type: "button", "data-copy": name, onclick: act }, words);
    this.copied = el("pre", { class: "stage-copied", "data-role": "copied", tabindex: "0", "aria-label": "What was copied", hidden: true });
    const copies = { python: ["Python", () => this.asPython()], command: ["command", () => this.asCommand()], link: ["link", () => this.asLink()] };
    const saves = { png: "PNG", svg: "SVG", csv: "CSV" };
    return el("div", { class: "stage-copies" },
      el("span", { class: "stage-soft" }, "copy as"),
      ...Object.entries(copies).map(([name, [words, text]]) => action(words, name, () => this.copy(text()))),
      el("span", { class: "stage-soft" }, "save as"),
      ...Object.entries(saves).map(([name, words]) => action(words, name, () => this.save(name))),
      this.copied);
  }

  buildTrajectory() {
    this.trajectory = el("div", { class: "stage-trajectory" });
    this.trajectoryWords = el("p", { class: "stage-soft" });
    return el("div", {}, el("h3", {}, "Over training"), this.trajectory, this.trajectoryWords);
  }

  buildPrompts() {
    const { tokens, n } = this.payload.prompts;
    this.promptRows = [];
    this.promptList = el("div", { class: "stage-prompts", tabindex: "0", role: "region", "aria-label": "Prompts" });
    this.promptWords = el("p", { class: "stage-soft" });
    this.promptBox = el("details", { ontoggle: () => this.showPrompts() },
      el("summary", {}, tokens.length < n ? `The first ${tokens.length} of ${count(n, "prompt pair")}` : count(n, "prompt pair")),
      this.promptWords, this.promptList);
    this.promptBox.open = n <= 20;
    return el("div", {}, el("h3", {}, "Prompt by prompt"), this.promptBox);
  }

  buildNotes() {
    this.notes = el("ul", { class: "stage-soft stage-notes", "data-role": "notes" });
    return this.notes;
  }

  // What depends on the run: options, the slider's ticks, the cells of the grid.
  rebuild() {
    const { run } = this;
    const options = (select, entries, chosen) => select.replaceChildren(...entries.map(([value, words]) => el("option", { value, selected: value === chosen }, words)));
    options(this.runSelect, this.runs.map((one) => [one.name, one.name]), run.name);
    options(this.layerSelect, run.layers.map((layer, at) => [String(layer), this.site(at)]), String(this.layerNumber));
    options(this.measureSelect, Object.keys(run.measures).map((name) => [name, MEASURES[name].label]), this.state.measure);
    this.slider.max = String(run.labels.length - 1);
    this.slider.disabled = this.playButton.disabled = run.labels.length < 2;
    this.limits = Object.fromEntries(Object.keys(run.measures).map((name) => [name, run.largestAlone(name)]));
    this.buildTicks();
    this.buildGrid();
    this.notes.replaceChildren(...[...run.notes, ...this.payload.notes].map((note) => el("li", {}, `${note[0].toUpperCase()}${note.slice(1)}.`)));
    this.show();
  }

  buildTicks() {
    const last = Math.max(1, this.run.labels.length - 1);
    this.ticks.replaceChildren(...this.run.starts.map(({ checkpoint, heads }) =>
      el("i", { style: `left: ${(100 * checkpoint) / last}%`, title: `${stepWords(this.run.checkpoints[checkpoint], this.run.by_label)}: ${heads.join(", ")}` })));
  }

  buildGrid() {
    const { run } = this;
    this.grid.style.setProperty("--heads", run.nHeads);
    this.panels.classList.toggle("stage-many", run.nHeads > 16);
    this.cells = [];
    const rows = run.layers.map((_, layer) => {
      const buttons = Array.from({ length: run.nHeads }, (_, head) => this.buildCell(layer, head));
      this.cells.push(buttons);
      return [el("span", { class: "stage-axis", "aria-hidden": "true" }, this.site(layer)), ...buttons];
    });
    const heads = Array.from({ length: run.nHeads }, (_, head) => el("span", { class: "stage-axis", "aria-hidden": "true" }, String(head)));
    this.grid.replaceChildren(...rows.reverse().flat(), el("span", { class: "stage-axis", "aria-hidden": "true" }), ...heads);
  }

  buildCell(layer, head) {
    const point = () => this.showHint(layer, head);
    return el("button", {
      type: "button", "data-head": this.headName(layer, head), "aria-pressed": "false", tabindex: "-1",
      onclick: () => this.toggle(layer, head), onmouseenter: point, onfocus: point, onmouseleave: () => this.showHint(),
    });
  }

  moveFocus(event) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    const at = this.cells.flatMap((row, layer) => row.map((cell, head) => ({ cell, layer, head }))).find(({ cell }) => cell === event.target);
    if (!by || !at) return;
    event.preventDefault();
    const within = (value, n) => Math.min(n - 1, Math.max(0, value));
    const cell = this.cells[within(at.layer + by[0], this.cells.length)][within(at.head + by[1], this.run.nHeads)];
    this.cells.flat().forEach((other) => { other.tabIndex = other === cell ? 0 : -1; });
    cell.focus();
  }

  // --- showing ---

  show() {
    const { run, state } = this;
    const here = run.checkpoints[state.checkpoint];
    this.slider.value = String(state.checkpoint);
    this.slider.setAttribute("aria-valuetext", here.label === stepWords(here, run.by_label) ? here.label : `${stepWords(here, run.by_label)} (${here.label})`);
    put(this.where, stepWords(here, run.by_label));
    this.layerSelect.value = String(this.layerNumber);
    this.measureSelect.value = state.measure;
    const begins = run.starts.find((start) => start.checkpoint === state.checkpoint);
    put(this.starts, begins ? `First significant here: ${begins.heads.join(", ")}` : "\u00a0");
    this.showGrid();
    this.showChosen();
    this.showDetails();
    this.showTrajectory();
    this.showPrompts();
  }

  showGrid() {
    const { state } = this;
    const scale = this.scale();
    this.cells.forEach((row, layer) => row.forEach((cell, head) => {
      const read = this.run.read(state.measure, state.checkpoint, layer, this.run.alone[head]);
      const isKnown = read !== null && read.value !== null;
      const isDoubtful = isKnown && this.run.isSignificant(state.measure, state.checkpoint, layer, head) === false;
      const isChosen = layer === state.layer && state.heads.includes(head);
      cell.style.backgroundColor = isKnown ? scale(read.value) : "transparent";
      const looks = `${isKnown ? "" : "stage-unknown"} ${isDoubtful ? "stage-doubtful" : ""}`;
      if (cell.className !== looks) cell.className = looks;
      mark(cell, "aria-pressed", String(isChosen));
      mark(cell, "aria-label", this.cellWords(layer, head));
      if (this.run.nHeads <= 8) put(cell, isKnown ? this.short(read.value) : "");
    }));
    this.placeTabStop();
    this.showHint();
    const limit = this.limits[state.measure];
    this.showLegend(limit);
  }

  // One cell can be tabbed to; the arrows go on from there.
  placeTabStop() {
    const { layer, heads } = this.state;
    if (this.grid.contains(document.activeElement)) return;
    const stop = this.cells[layer][heads[0] ?? 0];
    this.cells.flat().forEach((cell) => { if (cell.tabIndex !== (cell === stop ? 0 : -1)) cell.tabIndex = cell === stop ? 0 : -1; });
  }

  short(value) {
    const size = MEASURES[this.state.measure].isShare ? String(Math.round(Math.abs(value))) : (Math.abs(value) / 100).toFixed(this.limits[this.state.measure] < 100 ? 2 : 1);
    return `${Number(size) === 0 ? "" : value < 0 ? "−" : "+"}${size}`;
  }

  cellWords(layer, head) {
    const { measure, checkpoint } = this.state;
    const read = this.run.read(measure, checkpoint, layer, this.run.alone[head]);
    const name = this.headName(layer, head);
    if (!read || read.value === null) return `${name}: ${this.run.alone[head] === undefined ? "not patched alone" : "no value here"}`;
    const significant = this.run.isSignificant(measure, checkpoint, layer, head);
    const doubt = significant === false ? ", not significant" : "";
    const range = read.low === null ? "" : `, interval ${signed(measure, read.low, read.digits)} to ${signed(measure, read.high, read.digits)}`;
    return `${name} alone ${signed(measure, read.value)} ${MEASURES[measure].unit}${range}${doubt}`;
  }

  showHint(layer = null, head = null) {
    put(this.hint, layer === null ? "Each cell is one head patched alone; choose heads to see them together." : minus(this.cellWords(layer, head)));
  }

  showLegend(limit) {
    const { measure } = this.state;
    const scale = this.scale();
    const stops = [-1, -0.5, 0, 0.5, 1].map((part) => scale(part * limit)).join(", ");
    const bar = el("span", { class: "stage-scale", style: `background: linear-gradient(to right, ${stops})`, "aria-hidden": "true" });
    const doubtful = this.run.measures[measure].significant ? [el("span", { class: "stage-key stage-doubtful", "aria-hidden": "true" }), " not significant (adjusted p above .05)"] : [];
    this.legend.replaceChildren(minus(signed(measure, -limit)), " ", bar, " ", signed(measure, limit), ` ${MEASURES[measure].unit} `, ...doubtful);
  }

  readColours() {
    const style = getComputedStyle(this.root);
    const colour = (name) => (style.getPropertyValue(name).match(/[0-9a-f]{2}/gi) ?? ["80", "80", "80"]).map((part) => parseInt(part, 16));
    this.colours = ["--away", "--neutral", "--towards"].map(colour);
  }

  recoloured() {
    this.readColours();
    this.show();
  }

  resized() {
    if (this.trajectory.clientWidth === this.width) return;
    this.width = this.trajectory.clientWidth;
    this.drawTrajectory();
  }

  // A colour for a value: blue towards the right answer, red away from it, as the page's style has them.
  scale() {
    const [away, neutral, towards] = this.colours;
    const limit = this.limits[this.state.measure];
    const { falls } = MEASURES[this.state.measure];
    return (value) => {
      const part = Math.min(1, Math.abs(value) / limit);
      const end = value < 0 === !falls ? away : towards;
      return `rgb(${neutral.map((from, i) => Math.round(from + (end[i] - from) * part)).join(", ")})`;
    };
  }

  showChosen() {
    const { run, state } = this;
    const { layer, checkpoint, measure } = state;
    const words = this.chosenWords();
    put(this.chosen, `${words[0].toUpperCase()}${words.slice(1)}`);
    const read = run.read(measure, checkpoint, layer, this.subset);
    const isKnown = read !== null && read.value !== null;
    put(this.effect, isKnown ? signed(measure, read.value) : "–");
    put(this.unit, MEASURES[measure].unit);
    put(this.range, isKnown ? this.intervalWords(read) : "");
    this.facts.replaceChildren(...this.factsOf(read).map((fact) => el("li", {}, typeof fact === "string" ? minus(fact) : fact)));
    for (const [name, button] of Object.entries(this.setButtons)) {
      const found = name === "random" ? true : this.sets()[name]();
      button.disabled = found === null;
      button.title = found === null ? `no ${name} set is known here: it takes all subsets, and an effect of all heads` : "";
    }
  }

  intervalWords(read) {
    const of = this.run.measures[this.state.measure];
    if (!of.restored) return bracketed(this.state.measure, read);
    const { restored, broken, right } = of;
    const at = this.run.place(of, this.state.checkpoint, this.state.layer, this.subset);
    const [n, answered] = [this.run.n_trials, right[this.state.checkpoint]];
    return `restores ${restored[at]} of ${n - answered} failing, breaks ${broken[at]} of ${answered}`;
  }

  factsOf(read) {
    if (this.subset === undefined) return this.missingFacts();
    return [...this.valueFacts(read), ...(this.state.measure === "logit_diff" ? this.setFacts() : [])];
  }

  // What the measure says, and how well its value is known.
  valueFacts(read) {
    const { checkpoint, layer, measure } = this.state;
    const { says, label } = MEASURES[measure];
    const facts = says ? [says] : [];
    const kept = this.run.measures[measure];
    const { n_clear } = kept;
    if (this.run.place(kept, checkpoint, layer, this.subset) === undefined) {
      facts.push(`the ${label} of this set is not on this page; it is in the store`);
    } else if (read === null || read.value === null) {
      facts.push("no prompt's clean and corrupt run are far enough apart here to normalise by");
    } else if (read.low !== null) {
      facts.push(`${this.payload.level} % interval over ${count(n_clear ? n_clear[checkpoint] : this.run.n_trials, "prompt")}`);
    } else if (kept.unpatched && this.run.n_trials > 1) {
      facts.push("its interval is not on this page");
    }
    return facts;
  }

  // Where the set stands among others, and whether its heads add up.
  setFacts() {
    const { heads, checkpoint, layer } = this.state;
    const facts = [];
    const { place, of } = this.run.rank(checkpoint, layer, this.subset);
    if (of > 1) facts.push(`rank ${place.toLocaleString("en")} of ${this.hasAll(heads.length, of) ? "all " : "the "}${of.toLocaleString("en")} ${sizeWords(heads.length)}${this.hasAll(heads.length, of) ? "" : " on this page"}`);
    const sum = heads.length > 1 ? this.run.sumOfSingles(checkpoint, layer, heads) : null;
    if (sum !== null) {
      const whole = this.run.read("logit_diff", checkpoint, layer, this.subset).value;
      facts.push(`sum of its heads alone ${signed("logit_diff", sum)} nats; together ${signed("logit_diff", whole - sum)} from that`);
    }
    for (const which of ["sufficient", "necessary"]) {
      const found = this.run.smallest(which, checkpoint, layer);
      if (found && found.heads.join() === heads.join()) facts.push(this.smallestWords(which, found));
    }
    return facts;
  }

  smallestWords(which, { count: n }) {
    const others = n > 1 ? `, the best of ${n} of its size` : "";
    return which === "sufficient" ? `smallest sufficient set: alone it has 80 % of the effect of all heads${others}`
      : `smallest necessary set: without it 80 % of the effect of all heads is gone${others}`;
  }

  hasAll(size, n) {
    let all = 1;
    for (let k = 0; k < size; k++) all = (all * (this.run.nHeads - k)) / (k + 1);
    return Math.round(all) === n;
  }

  missingFacts() {
    const { heads, checkpoint, layer } = this.state;
    const where = this.run.n_subsets > this.run.nRows ? "on this page" : "patched in this run";
    const facts = [el("span", {}, `not ${where}; to patch it: `, el("code", {}, this.asCommand()))];
    const sum = this.run.sumOfSingles(checkpoint, layer, heads);
    if (sum !== null) facts.push(`the heads one by one add up to ${signed("logit_diff", sum)} nats; together they can do more or less`);
    return facts;
  }

  // --- one head ---

  showDetails() {
    if (!this.focused || this.focused.layer >= this.run.layers.length || this.focused.head >= this.run.nHeads) {
      this.details.replaceChildren();
      return;
    }
    const { layer, head } = this.focused;
    const rows = [...this.shapleyRow(layer, head), ...this.attentionRow(layer, head), ...this.roleRow(layer, head)];
    if (!rows.length) {
      this.details.replaceChildren();
      return;
    }
    const table = rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, minus(text))]);
    this.details.replaceChildren(el("h3", {}, this.headName(layer, head)), el("dl", {}, ...table));
  }

  shapleyRow(layer, head) {
    const { shapley } = this.run;
    if (!shapley) return [];
    const at = (this.state.checkpoint * this.run.layers.length + layer) * this.run.nHeads + head;
    const read = { low: shapley.low[at], high: shapley.high[at] };
    const range = read.low === this.run.missing ? "" : ` ${bracketed("logit_diff", read)}`;
    return [["Shapley value", `${signed("logit_diff", shapley.value[at])} nats${range}${shapley.exact ? "" : ", sampled"}`]];
  }

  // Where the mechanism has this checkpoint and layer; null where it was not measured.
  mechanismAt(layer) {
    if (!this.mechanism || this.run.joint) return null;
    const checkpoint = this.mechanism.checkpoints.indexOf(this.run.labels[this.state.checkpoint]);
    const place = this.mechanism.layers.indexOf(this.run.layers[layer]);
    return checkpoint < 0 || place < 0 ? null : checkpoint * this.mechanism.layers.length + place;
  }

  attentionRow(layer, head) {
    const at = this.mechanismAt(layer);
    if (at === null || !this.mechanism.attention) return [];
    const { to, mean } = this.mechanism.attention;
    const shares = (run) => to.map((name, i) => `${name} ${mean[((at * this.run.nHeads + head) * 2 + run) * to.length + i]} %`).join(", ");
    return [["attends to, clean", shares(0)], ["corrupt", shares(1)]];
  }

  roleRow(layer, head) {
    const at = this.mechanismAt(layer);
    if (at === null || !this.mechanism.roles) return [];
    const { names, score, null: nulls, has } = this.mechanism.roles;
    const { missing } = this.run;
    const place = (at * this.run.nHeads + head) * names.length;
    const two = (value) => (value === missing ? "unknown" : signed("logit_diff", value).replace("+", ""));
    const known = names.map((name, i) => ({ name, i })).filter(({ i }) => score[place + i] !== missing);
    const words = ({ name, i }) => `${name} ${two(score[place + i])} (null ${two(nulls[place + i])})`;
    const own = known.filter(({ i }) => has[place + i] === 1);
    const others = known.filter(({ i }) => has[place + i] !== 1);
    return [
      ...(own.length ? [["roles", own.map(words).join(", ")]] : []),
      ...(others.length ? [[own.length ? "no role by" : "no role, by", others.map(words).join(", ")]] : []),
    ];
  }

  // --- over training ---

  series() {
    const { measure, layer } = this.state;
    return this.run.labels.map((_, checkpoint) => this.run.read(measure, checkpoint, layer, this.subset));
  }

  // The thin line: the unpatched source run, which is as far as everything that differs could take it.
  source() {
    const { measure } = this.state;
    const { n_clear, unpatched } = this.run.measures[measure];
    if (!n_clear && !unpatched) return null;
    return this.run.labels.map((_, at) => (n_clear ? 100 : this.run.gap(measure, at)));
  }

  showTrajectory() {
    const { heads, layer, measure } = this.state;
    if (this.drawn !== [this.run.name, layer, heads.join(), measure].join()) this.drawTrajectory();
    this.moveCursor();
  }

  drawTrajectory() {
    const width = Math.max(260, this.width);
    const { heads, layer, measure } = this.state;
    this.drawn = [this.run.name, layer, heads.join(), measure].join();
    const series = this.series();
    const source = this.source();
    this.plot = new Plot(this.run, series, source, width, 240);
    const drawing = this.plot.draw(measure);
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", this.trajectoryLabel(series));
    drawing.addEventListener("click", (event) => this.goTo(this.plot.nearest(event.clientX - drawing.getBoundingClientRect().left)));
    this.trajectory.replaceChildren(drawing);
    put(this.trajectoryWords, `${this.chosen.textContent}: how far the patch moves the ${this.run.target} run (the line at zero, unpatched)`
      + `${source ? `; thin line: the ${this.run.source} run, unpatched` : ""}${series.some((read) => read && read.low !== null) ? "; band: interval" : ""}. Click to go there.`);
    this.moveCursor();
  }

  trajectoryLabel(series) {
    const known = series.map((read, at) => ({ read, at })).filter(({ read }) => read && read.value !== null);
    const say = ({ read, at }) => `${signed(this.state.measure, read.value)} at ${this.run.labels[at]}`;
    const ends = known.length ? `${say(known[0])}, ${say(known[known.length - 1])}` : "no values";
    return `${this.chosen.textContent} over training: ${ends} ${MEASURES[this.state.measure].unit}`;
  }

  moveCursor() {
    this.plot?.point(this.state.checkpoint);
  }

  // --- prompts ---

  showPrompts() {
    if (!this.promptBox.open) return;
    if (!this.promptRows.length) this.buildPromptRows();
    const { run } = this;
    const effects = this.effectsByPrompt();
    const limit = effects ? Math.max(1, ...effects.map(Math.abs)) : 1;
    this.promptList.classList.toggle("stage-plain", effects === null);
    this.promptRows.forEach((row, trial) => this.showPrompt(row, trial, effects, limit));
    put(this.promptWords, this.promptsInWords(effects !== null));
  }

  promptsInWords(hasEffects) {
    const { run } = this;
    if (this.subset === undefined) return "";
    const { label, unit } = MEASURES[this.promptMeasure()];
    const said = hasEffects ? `Effect of ${this.chosenWords()} on each prompt's ${label}${label === unit ? "" : ` (${unit})`}, and that of the ${run.target} run with it.`
      : "The effect on each prompt is not on this page; it is in the store.";
    return `${said}${run.texts ? ` What the ${run.target} run writes then, and unpatched.` : ""}${this.attentionWords()}`;
  }

  attentionWords() {
    if (!this.focused || !this.mechanism?.attention?.by_prompt || this.mechanismAt(this.focused.layer) === null) return "";
    return ` Shaded: what ${this.headName(this.focused.layer, this.focused.head)} attends to in the clean prompt: the first token, the last two, and digits, these by what they get together.`;
  }

  // What is shown prompt by prompt: the chosen measure, or the logit difference where prompts have no number of it.
  promptMeasure() {
    const { measure } = this.state;
    return this.run.measures[measure].by_prompt ? measure : "logit_diff";
  }

  effectsByPrompt() {
    const { run, state } = this;
    const { by_prompt } = run.measures[this.promptMeasure()];
    if (!by_prompt || this.subset === undefined) return null;
    const start = (state.checkpoint * run.layers.length + state.layer) * run.n_trials;
    return Array.from({ length: run.n_trials }, (_, trial) => by_prompt.effect[(start + trial) * run.nRows + this.subset]);
  }

  buildPromptRows() {
    const { tokens, answers } = this.payload.prompts;
    const line = (name, pieces) => {
      const spans = pieces.map((piece) => el("span", { class: "token" }, shown(piece)));
      return { spans, element: el("div", { class: "tokens" }, el("span", { class: "stage-soft stage-run" }, name), ...spans) };
    };
    this.promptRows = tokens.map(([clean, corrupt], trial) => {
      const lines = [line("clean", clean), line("corrupt", corrupt)];
      const number = el("b", {});
      const bar = el("span", { class: "stage-bar-of", "aria-hidden": "true" }, el("i", {}));
      const words = el("span", { class: "stage-soft" });
      const wanted = el("span", { class: "stage-soft" }, `right ${shown(answers[trial][0])}, wrong ${shown(answers[trial][1])}`);
      const texts = el("div", { class: "tokens stage-text", hidden: true });
      const element = el("div", { class: "stage-prompt" }, el("div", { class: "stage-prompt-effect" }, number, bar, words),
        el("div", {}, ...lines.map((one) => one.element), texts, wanted));
      return { element, spans: lines.map((one) => one.spans), number, bar: bar.firstChild, words, texts };
    });
    this.promptList.replaceChildren(...this.promptRows.map((row) => row.element));
  }

  showPrompt(row, trial, effects, limit) {
    const { run, state } = this;
    const measure = this.promptMeasure();
    const { falls } = MEASURES[measure];
    const isNeverNegative = falls || measure === "probability";
    const level = (of) => signed(measure, of).slice(isNeverNegative ? 1 : 0);
    const value = effects ? effects[trial] : null;
    put(row.number, value === null ? "" : minus(signed(measure, value)));
    const width = value === null ? 0 : (50 * Math.abs(value)) / limit;
    row.bar.style.cssText = `left: ${value < 0 ? 50 - width : 50}%; width: ${width}%; background: var(${value < 0 === !falls ? "--away" : "--towards"})`;
    const unpatched = value === null ? 0 : run.measures[measure].by_prompt.target[state.checkpoint * run.n_trials + trial];
    put(row.words, value === null ? "" : minus(`${level(unpatched)} → ${level(unpatched + value)}`));
    row.spans.forEach((spans, which) => this.markPatched(spans, ["clean", "corrupt"][which] === run.target));
    this.shade(row.spans[0], trial);
    this.showTexts(row.texts, trial);
  }

  // What was generated with the chosen heads patched, and without.
  showTexts(line, trial) {
    const { run, state } = this;
    line.hidden = !run.texts || this.subset === undefined;
    if (line.hidden) return;
    const { words, patched, target } = run.texts;
    const at = ((state.checkpoint * run.layers.length + state.layer) * run.n_trials + trial) * run.nRows + this.subset;
    const text = (number) => el("span", { class: "token" }, shown(words[number]));
    line.replaceChildren(el("span", { class: "stage-soft stage-run" }, "writes"), " ", text(patched[at]), " ",
      el("span", { class: "stage-soft" }, "unpatched"), " ", text(target[state.checkpoint * run.n_trials + trial]));
  }

  // Frames the patched positions of the target run, where they are counted from the end.
  markPatched(spans, isTarget) {
    const { positions } = this.run;
    const last = positions === "last" ? 1 : positions === "all" ? spans.length : Number(/^end:(\d+)$/.exec(positions)?.[1] ?? 0);
    spans.forEach((span, at) => span.classList.toggle("patched", isTarget && at >= spans.length - last));
  }

  shade(spans, trial) {
    const at = this.focused && this.mechanism?.attention?.by_prompt ? this.mechanismAt(this.focused.layer) : null;
    const shares = new Map();
    if (at !== null) {
      const { to, by_prompt } = this.mechanism.attention;
      const start = ((at * this.run.nHeads + this.focused.head) * this.run.n_trials + trial) * to.length;
      const places = { first: 0, previous: spans.length - 2, itself: spans.length - 1 };
      to.forEach((name, i) => { if (places[name] >= 0) shares.set(places[name], by_prompt[start + i]); });
      const digits = to.indexOf("digits");
      const together = digits < 0 ? 0 : by_prompt[start + digits];
      spans.forEach((span, place) => { if (/\p{N}/u.test(span.textContent) && !shares.has(place)) shares.set(place, together); });
    }
    spans.forEach((span, place) => span.style.setProperty("--share", `${shares.get(place) ?? 0}%`));
  }

  // --- taking it along ---

  asPython() {
    const { checkpoint, heads } = this.state;
    const where = { checkpoint: this.run.labels[checkpoint], layer: this.layerNumber, subset: labelOf(heads, this.run.nHeads) };
    const text = (value) => JSON.stringify(value);
    return [
      "import headlapse as hl",
      `run = hl.open(${text(this.payload.store)}).run(${text(this.run.name)}).dataset`,
      `at = run.sel(${Object.entries(where).map(([name, value]) => `${name}=${text(value)}`).join(", ")})`,
      ...this.effectInPython(),
    ].join("\n");
  }

  effectInPython() {
    const { source, target } = this.run;
    const { measure } = this.state;
    const of = {
      success: `(at.logit_diff > 0).mean() - (at.${target}_logit_diff > 0).mean()`,
      answers: `at.success.mean() - at.${target}_success.mean()`,
      recovery: `((at.logit_diff - at.${target}_logit_diff) / gap).where(abs(gap) >= ${this.payload.clear}).mean()`,
    }[measure] ?? `(at["${measure}"] - at.${target}_${measure}).mean()`;
    const gap = measure === "recovery" ? [`gap = at.${source}_logit_diff - at.${target}_logit_diff`] : [];
    return [...gap, `print(float(${of}))`];
  }

  asCommand() {
    const { run, state } = this;
    const words = ["headlapse", "patch", this.payload.store, "--subsets", labelOf(state.heads, run.nHeads)];
    words.push("--layers", ...(run.joint ? run.patched_layers.map(String) : [String(this.layerNumber)]));
    if (run.joint) words.push("--joint");
    if (run.positions !== "last") words.push("--positions", run.positions);
    if (run.direction !== "denoise") words.push("--direction", run.direction);
    const isKept = run.measures[state.measure].unpatched && state.measure !== "logit_diff";
    if (isKept) words.push("--measures", state.measure);
    if (state.measure === "answers") words.push("--generate", String(run.generate));
    words.push("--checkpoints", run.labels[state.checkpoint]);
    return words.map(quoted).join(" ");
  }

  asLink() {
    return `${location.href.split("#")[0]}${this.address()}`;
  }

  async copy(text) {
    this.copied.hidden = false;
    put(this.copied, text);
    try {
      await navigator.clipboard.writeText(text);
      this.say("Copied.");
    } catch {
      this.say("This browser does not let a page copy; the text is below.");
    }
  }

  async save(kind) {
    const name = `headlapse-${this.run.name}-${this.run.labels[this.state.checkpoint]}`.replace(/[^\w.-]+/g, "_");
    if (kind === "csv") download(new Blob([this.asCsv()], { type: "text/csv" }), `${name}.csv`);
    const text = new XMLSerializer().serializeToString(this.asSvg());
    if (kind === "svg") download(new Blob([text], { type: "image/svg+xml" }), `${name}.svg`);
    if (kind === "png") download(await toPng(text), `${name}.png`);
  }

  // What is seen: each head alone at this checkpoint, then the chosen set over training.
  asCsv() {
    const { measure, checkpoint, layer, heads } = this.state;
    const cell = (value) => (value === null || value === undefined ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    const number = (value) => (value === null || value === undefined ? "" : (value / 100).toFixed(2));
    const line = (at, inLayer, chosen, read) => [this.run.name, this.run.labels[at], this.run.checkpoints[at].step, this.site(inLayer), chosen.join(" "),
      measure, number(read?.value), number(read?.low), number(read?.high)].map(cell).join();
    const alone = this.run.layers.flatMap((_, inLayer) => this.run.alone.map((row, head) => line(checkpoint, inLayer, [head], this.run.read(measure, checkpoint, inLayer, row))));
    const over = this.series().map((read, at) => line(at, layer, heads, read));
    return `${["run,checkpoint,step,layer,heads,measure,effect,low,high", ...alone, ...over].join("\n")}\n`;
  }

  asSvg() {
    const style = getComputedStyle(this.root);
    const [ink, paper, accent] = ["--ink", "--page", "--accent"].map((name) => style.getPropertyValue(name).trim());
    const width = 760;
    const side = Math.min(34, (width - 60) / this.run.nHeads);
    const below = 84 + side * this.run.layers.length + 36;
    const plot = new Plot(this.run, this.series(), this.source(), width - 40, 240);
    const drawing = plot.draw(this.state.measure, { ink, soft: ink, line: ink, accent });
    plot.point(this.state.checkpoint);
    const text = (x, y, words, size, anchor = "start") => svg("text", { x, y, "font-size": size, "text-anchor": anchor, fill: ink }, words);
    const effect = [this.effect, this.unit, this.range].map((one) => one.textContent).join(" ");
    const picture = svg("svg", { xmlns: SVG, viewBox: `0 0 ${width} ${below + 260}`, width, height: below + 260, "font-family": "system-ui, sans-serif" },
      svg("rect", { width: "100%", height: "100%", fill: paper }),
      text(20, 30, `${this.payload.model} on ${this.payload.task}, ${this.where.textContent}`, 16),
      text(20, 54, `${this.chosen.textContent}: ${effect}`, 14), ...this.drawCells(side, text, ink),
      svg("g", { transform: `translate(20, ${below})` }, ...drawing.childNodes));
    return picture;
  }

  drawCells(side, text, ink) {
    const scale = this.scale();
    const { checkpoint, measure, layer: chosenLayer, heads } = this.state;
    const n = this.run.layers.length;
    const cells = this.run.layers.flatMap((_, layer) => this.run.alone.map((row, head) => {
      const read = this.run.read(measure, checkpoint, layer, row);
      const isChosen = layer === chosenLayer && heads.includes(head);
      const looks = { fill: read && read.value !== null ? scale(read.value) : "none", stroke: ink, "stroke-width": isChosen ? 2 : 0.3 };
      return svg("rect", { x: 50 + head * side, y: 74 + (n - 1 - layer) * side, width: side - 2, height: side - 2, ...looks }, titled(this.cellWords(layer, head)));
    }));
    const layers = this.run.layers.map((_, layer) => text(42, 74 + (n - 0.5 - layer) * side + 3, this.site(layer), 10, "end"));
    const columns = this.run.alone.map((_, head) => text(50 + (head + 0.5) * side - 1, 74 + n * side + 10, String(head), 10, "middle"));
    return [...cells, ...layers, ...columns];
  }

  say(text) {
    put(this.status, text);
  }
}

function isSeen(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight;
}

function download(blob, name) {
  const address = URL.createObjectURL(blob);
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function toPng(text) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = el("canvas", { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

// --- a line with its band ---

class Plot {
  constructor(run, series, source, width, height) {
    Object.assign(this, { run, series, source, width, height });
    this.box = { left: 52, right: 14, top: 10, bottom: 38 };
    const xs = run.checkpoints.map((one) => one.x);
    this.x = linear(Math.min(...xs), Math.max(...xs), this.box.left, width - this.box.right);
    const values = series.flatMap((read) => (read ? [read.value, read.low, read.high] : [])).filter((value) => value !== null);
    const all = [0, ...values, ...(source ?? [])];
    const [low, high] = [Math.min(...all), Math.max(...all)];
    this.ticks = niceTicks(low, high);
    this.y = linear(Math.min(low, this.ticks[0]), Math.max(high, this.ticks[this.ticks.length - 1]), height - this.box.bottom, this.box.top);
  }

  place(checkpoint) {
    return this.x(this.run.checkpoints[checkpoint].x);
  }

  nearest(x) {
    const far = this.run.checkpoints.map((_, at) => Math.abs(this.place(at) - x));
    return far.indexOf(Math.min(...far));
  }

  draw(measure, colours = { ink: "currentColor", soft: "var(--soft)", line: "var(--line)", accent: "var(--accent)" }) {
    const { width, height } = this;
    const { accent } = colours;
    this.cursor = svg("line", { y1: this.box.top, y2: height - this.box.bottom, stroke: colours.ink, "stroke-width": 1, "stroke-dasharray": "2 2" });
    this.dot = svg("circle", { r: 4.5, fill: accent });
    const known = this.series.map((read, at) => ({ ...read, at })).filter(({ value }) => value !== undefined && value !== null);
    const runs = split(known, this.run);
    const points = (one) => one.map(({ at, value }) => `${this.place(at).toFixed(1)},${this.y(value).toFixed(1)}`).join(" ");
    const bands = runs.map((one) => one.filter(({ low }) => low !== null)).filter((one) => one.length > 1);
    const band = (one) => [...one.map(({ at, high }) => [at, high]), ...[...one].reverse().map(({ at, low }) => [at, low])]
      .map(([at, value]) => `${this.place(at).toFixed(1)},${this.y(value).toFixed(1)}`).join(" ");
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "stage-plot" },
      ...this.axes(measure, colours),
      ...this.sourceLine(colours),
      ...bands.map((one) => svg("polygon", { points: band(one), fill: accent, "fill-opacity": 0.18 })),
      ...known.filter(({ low }) => low !== null).map(({ at, low, high }) => this.whisker(at, low, high, accent)),
      ...runs.map((one) => svg("polyline", { points: points(one), fill: "none", stroke: accent, "stroke-width": 2 })),
      ...known.map(({ at, value }) => svg("circle", { cx: this.place(at).toFixed(1), cy: this.y(value).toFixed(1), r: 2.2, fill: accent })),
      this.cursor, this.dot);
  }

  whisker(at, low, high, stroke) {
    const x = this.place(at).toFixed(1);
    return svg("line", { x1: x, x2: x, y1: this.y(low).toFixed(1), y2: this.y(high).toFixed(1), stroke, "stroke-opacity": 0.35 });
  }

  sourceLine({ soft }) {
    if (!this.source) return [];
    return split(this.source.map((value, at) => ({ value, at })), this.run).map((one) =>
      svg("polyline", { points: one.map(({ at, value }) => `${this.place(at).toFixed(1)},${this.y(value).toFixed(1)}`).join(" "), fill: "none", stroke: soft, "stroke-width": 1 }));
  }

  axes(measure, { ink, soft, line }) {
    const { box, width, height } = this;
    const plain = (value) => minus(String(Number(value.toPrecision(6))));
    const write = (value) => (MEASURES[measure].isShare ? `${plain(value)} %` : plain(value / 100));
    const rules = this.ticks.flatMap((value) => [
      svg("line", { x1: box.left, x2: width - box.right, y1: this.y(value), y2: this.y(value), stroke: value === 0 ? ink : line, "stroke-width": value === 0 ? 1 : 0.6, "stroke-opacity": value === 0 ? 0.8 : 0.6 }),
      svg("text", { x: box.left - 6, y: this.y(value) + 4, "text-anchor": "end", "font-size": 12, fill: soft }, write(value)),
    ]);
    const labels = this.labelled().map((at) => svg("text", { x: this.place(at), y: height - box.bottom + 16, "text-anchor": "middle", "font-size": 12, fill: soft }, this.run.checkpoints[at].short));
    const name = svg("text", { x: (box.left + width - box.right) / 2, y: height - 4, "text-anchor": "middle", "font-size": 12, fill: soft }, `${this.run.axis}${this.run.is_log ? " (logarithmic)" : ""}`);
    return [...rules, ...labels, name];
  }

  // Checkpoints whose labels fit side by side: the ends first.
  labelled() {
    const chosen = [];
    const n = this.run.checkpoints.length;
    const wide = (at) => 7.5 * this.run.checkpoints[at].short.length + 10;
    const fits = (at) => chosen.every((other) => Math.abs(this.place(at) - this.place(other)) > (wide(at) + wide(other)) / 2);
    for (const at of new Set([n - 1, 0, ...Array.from({ length: n }, (_, i) => i)])) if (fits(at)) chosen.push(at);
    return chosen;
  }

  point(checkpoint) {
    const x = this.place(checkpoint);
    const read = this.series[checkpoint];
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    const isKnown = read && read.value !== null;
    this.dot.setAttribute("visibility", isKnown ? "visible" : "hidden");
    this.dot.setAttribute("cx", x);
    this.dot.setAttribute("cy", isKnown ? this.y(read.value) : 0);
  }
}

// Stretches of checkpoints that follow one another at known steps; an unknown step stands alone.
function split(points, run) {
  const stretches = [];
  let last = null;
  for (const point of points) {
    const isKnown = run.checkpoints[point.at].known;
    if (last !== null && isKnown && last === point.at - 1 && run.checkpoints[last].known) stretches[stretches.length - 1].push(point);
    else stretches.push([point]);
    last = point.at;
  }
  return stretches;
}

function linear(from, to, start, end) {
  return (value) => (to === from ? (start + end) / 2 : start + ((value - from) / (to - from)) * (end - start));
}

// A few round numbers from at or below `low` to at or above `high`.
function niceTicks(low, high) {
  const span = high - low || 100;
  const unit = 10 ** Math.floor(Math.log10(span / 3));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((size) => span / size <= 5);
  const first = Math.floor(low / step);
  return Array.from({ length: Math.ceil(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

// Shows the stage in an element.  `address`: whether its state stands in the page's address; `changed` is called with
// the stage after every change.
export async function mount(element, payload, { address = true, changed = null } = {}) {
  return new Stage(element, payload, { address, changed }).start();
}

// What the page of a comparison draws with.
export { PACE, el, linear, mark, minus, niceTicks, put, svg, unpackAll };
