// The page of one head. renderHead(container, atlas, head, shown, options) draws it and returns how to take it away;
// shown is the number of a text. The page redraws itself: options.onShown(s) and options.onOptions(changes) only tell.
// What a reader has set stays from head to head, and the query and the zoom as long as the text is the same.
const headView = { scale: 'sqrt', shape: 'matrix', mode: 'zoom', marks: true, wanted: 100, logSpectrum: false, queries: new Map(), ranges: new Map(), pages: new Set() };
const HEAD_KINDS = { encoder: 'encoder self-attention', decoder: 'decoder self-attention', cross: 'cross-attention' };
const HEAD_CELL_HINT = 'Point at a cell, or focus a matrix and use the arrow keys, to read its weight.';
const HEAD_MATRIX_HELP = 'Drag over a range to zoom into it, or set the drag to move. Click into a matrix, then use the wheel, arrow keys, plus, minus and 0; Control and the wheel work without a click. Double-click shows all.';

// Rows or columns of the views: tokens, or the words they make up.
function headUnits(piece, { words, hideSpecial }) {
  const spaced = piece.tokens.some((token) => token.startsWith(' '));
  const units = [];
  piece.tokens.forEach((token, at) => {
    if (hideSpecial && piece.special[at]) return;
    const word = piece.words?.[at] ?? -1;
    const inside = word >= 0 && word === (piece.words[at - 1] ?? -1);
    const last = units[units.length - 1];
    if (words && inside && last?.word === word) {
      last.label += token;
      last.tokens.push(at);
      return;
    }
    units.push({ label: token.replace(/^ (?=.)/, ''), at, word, tokens: [at], special: Boolean(piece.special[at]), joined: at > 0 && (inside || (spaced && word >= 0 && !token.startsWith(' '))) });
  });
  return units;
}

// Weights of units: summed over the keys of a word, averaged over its queries; without the hidden keys, scaled to 1 again.
function headWeights(rows, columns, dense, width, renormalise) {
  const columnOf = new Int32Array(width).fill(-1);
  columns.forEach(({ tokens }, j) => { for (const at of tokens) columnOf[at] = j; });
  const weights = new Float32Array(rows.length * columns.length);
  rows.forEach(({ tokens }, i) => {
    for (const query of tokens) {
      let total = 0;
      if (renormalise) for (let at = 0; at < width; at += 1) if (columnOf[at] >= 0) total += dense[query * width + at];
      const factor = (renormalise ? (total > 0 ? 1 / total : 0) : 1) / tokens.length;
      for (let at = 0; at < width; at += 1) if (columnOf[at] >= 0) weights[i * columns.length + columnOf[at]] += factor * dense[query * width + at];
    }
  });
  return { weights, columnOf };
}

function unitGrid(rows, columns, { dense, width, selected, support }, renormalise) {
  const plain = rows.length * columns.length === dense.length;
  const { weights, columnOf } = plain ? { weights: dense, columnOf: null } : headWeights(rows, columns, dense, width, renormalise);
  if (plain) return { rows, columns, weights, selected, support };
  const merged = support && new Uint8Array(weights.length);
  const best = Int32Array.from(rows, ({ tokens }, i) => {
    if (merged) for (const query of tokens) for (let at = 0; at < width; at += 1) if (support[query * width + at] && columnOf[at] >= 0) merged[i * columns.length + columnOf[at]] = 1;
    // The recorded choice wins over equals, which the stored weights cannot tell apart.
    let found = selected[tokens[0]] >= 0 ? columnOf[selected[tokens[0]]] : -1;
    for (let j = 0; j < columns.length; j += 1) if (weights[i * columns.length + j] > (found < 0 ? 0 : weights[i * columns.length + found] + 1e-6)) found = j;
    return found;
  });
  return { rows, columns, weights, selected: best, support: merged };
}

// The arrays of one head out of those of its module.
function headArrays(atlas, record, h) {
  const { Tq, Tk, K } = record;
  const size = Tq * Tk;
  const codes = Float32Array.from({ length: 256 }, (_, code) => atlas.weight(code));
  const dense = new Float32Array(size);
  for (let i = 0; i < size; i += 1) dense[i] = codes[record.pattern[h * size + i]];
  const own = { dense, width: Tk, selected: record.selected.subarray(h * Tq, (h + 1) * Tq), support: record.support?.subarray(h * size, (h + 1) * size) ?? null };
  const margins = record.margin.subarray(h * Tq, (h + 1) * Tq);
  if (!record.twinIndex || !K) return { own, twin: null, margins };
  const twin = { dense: new Float32Array(size), width: Tk, selected: new Int32Array(Tq).fill(-1), support: own.support };
  for (let i = 0; i < Tq; i += 1) {
    for (let k = (h * Tq + i) * K; k < (h * Tq + i + 1) * K; k += 1) {
      const j = record.twinIndex[k];
      if (j < 0 || !record.twinWeight[k]) continue;
      twin.dense[i * Tk + j] = codes[record.twinWeight[k]];
      if (twin.selected[i] < 0 || twin.dense[i * Tk + j] > twin.dense[i * Tk + twin.selected[i]]) twin.selected[i] = j;
    }
  }
  return { own, twin, margins };
}

// Queries for which both select a token, and those for which it is not the same one.
function headAgreement(own, twin) {
  const differs = new Uint8Array(own.rows.length);
  let [both, same] = [0, 0];
  own.selected.forEach((j, i) => {
    if (j < 0 || twin.selected[i] < 0) return;
    both += 1;
    same += j === twin.selected[i] ? 1 : 0;
    differs[i] = j === twin.selected[i] ? 0 : 1;
  });
  return { differs, both, same };
}

class HeadPage {
  constructor(container, atlas, head, shown, options) {
    Object.assign(this, { container, atlas, head, shown, turn: 0, charts: [], ended: false });
    this.tell = options;
    this.options = { words: Boolean(options.words), hideSpecial: Boolean(options.hideSpecial) };
    this.module = atlas.meta.modules.find((module) => module.index === head.module) ?? atlas.meta.modules[head.module];
    const key = this.textKey();
    if (Number.isInteger(options.query)) headView.queries.set(key, options.query);
    this.query = -1;
    this.makeViews();
    container.replaceChildren(this.title(), this.textTools(), this.notice, this.parts, headNumbers(atlas, head));
    this.themes = new MutationObserver(() => this.repaint());
    this.themes.observe(document.documentElement, { attributes: true, attributeFilter: ['data-theme'] });
    this.media = matchMedia('(prefers-color-scheme: dark)');
    this.onMedia = () => this.repaint();
    this.media.addEventListener('change', this.onMedia);
    headView.pages.add(this);
    this.load();
  }

  // Pages beside this one that show the same queries and keys: they follow its query and zoom.
  linked() {
    return [...headView.pages].filter((page) => page !== this && page.grid && page.signature === this.signature);
  }

  textKey() { return `${this.atlas.index ?? 0}.${this.shown}.${this.module.query_side}`; }

  piece(side) {
    const text = this.atlas.meta.shown[this.shown];
    return side === 'target' && text.target ? text.target : text.source;
  }

  title() {
    const { head, module } = this;
    const facts = [HEAD_KINDS[head.kind] ?? head.kind, `layer ${head.layer}, head ${head.head}`, `${plural(module.n_heads, 'head')} in this module`,
      module.n_kv_heads !== module.n_heads ? `shares key-value head ${head.kv_head}` : null, module.d_head ? `d_head ${module.d_head}` : null,
      head.head_kind ? (head.head_kind === 'none' ? 'no known kind' : `kind: ${head.head_kind.replaceAll('_', ' ')}`) : null].filter(Boolean);
    return el('header', { class: 'hd-title' }, el('h2', {}, `Head ${head.label}`), el('p', { class: 'facts' }, ...facts.map((fact) => el('span', {}, fact))), el('p', { class: 'hd-note' }, el('code', {}, module.name)));
  }

  get wordsBox() { return this.wordsLabel.querySelector('input'); }

  textTools() {
    const texts = this.atlas.meta.shown.map((text, s) => el('option', { value: s, selected: s === this.shown }, `${s + 1}: ${shorten((text.picture ? 'picture' : text.text || text.source.tokens.join(' ')).replace(/\s+/g, ' ').trim(), 70)}`));
    const choose = el('select', { change: (event) => { this.shown = Number(event.target.value); this.tell.onShown?.(this.shown); this.load(); } }, ...texts);
    const check = (key, label) => el('label', { class: 'hd-check' }, el('input', { type: 'checkbox', checked: this.options[key], change: (event) => this.change({ [key]: event.target.checked }) }), label);
    return el('div', { class: 'tools hd-text-tools' }, el('label', { class: 'field grow' }, 'Shown text', choose), this.wordsLabel = check('words', 'Whole words'), check('hideSpecial', 'Hide special tokens'));
  }

  change(changes) {
    Object.assign(this.options, changes);
    this.tell.onOptions?.({ ...this.options });
    this.regrid();
  }

  makeViews() {
    this.notice = el('p', { class: 'notice', hidden: true });
    this.readout = el('p', { class: 'hd-readout' });
    this.cell = el('p', { class: 'hd-readout hd-cell' }, HEAD_CELL_HINT);
    this.agreement = el('p', { class: 'hd-note' });
    this.agreementTop = el('p', { class: 'hd-note' });
    this.beside = el('p', { class: 'hd-note', hidden: true });
    this.nextDiffering = el('button', { type: 'button', class: 'quiet', click: () => this.toDiffering() }, 'Next query that differs');
    const both = (make) => ['head', 'twin'].map((which) => make(which, which === 'head' ? `Head ${this.head.label}` : 'Its max-margin twin'));
    const choose = (i) => this.choose(i);
    [this.matrix, this.twinMatrix] = both((_, name) => new MatrixView({ name, onChoose: choose, onRange: (range) => this.ranged(range), onCell: (cell) => this.showCell(cell) }));
    [this.lines, this.twinLines] = both((_, name) => new LineView({ name, onChoose: choose, onScroll: (top) => { this.lines.scrollTo(top); this.twinLines.scrollTo(top); } }));
    this.texts = el('div', {});
    this.legend = el('div', { class: 'hd-scale' });
    this.marginChart = new HeadChart({ title: 'Logit margins in this text', part: this.part('margins'), explained: 'The largest logit minus the second largest, for each query.', draw: marginDrawing(() => this.margins ?? [], () => this.margins?.[this.query]) });
    this.spectrumChart = new HeadChart({ title: 'Singular values', part: this.part('spectrum'), explained: 'Of the head’s own matrix and of its max-margin solutions.', draw: spectrumDrawing(this.head.spectra ?? {}, (key) => headSeriesName(this.atlas, key), { get log() { return headView.logSpectrum; } }),
      tools: [headToggle('Logarithmic', headView.logSpectrum, (on) => { headView.logSpectrum = on; this.spectrumChart.draw(true); }), exportButton('CSV', 'Save the singular values as CSV', () => this.saveSpectra())] });
    this.charts = [this.marginChart, this.spectrumChart];
    this.parts = el('div', {}, this.textPart(), this.patternPart(), el('div', { class: 'hd-part' }, el('h3', {}, 'Margins and spectra'), el('div', { class: 'hd-pair' }, ...this.charts.map(({ node }) => node))));
  }

  part(name) { return `${this.head.label}-${name}`; }

  textPart() {
    const legend = el('ul', { class: 'hd-legend' }, el('li', {}, el('span', { class: 'hd-token hd-query' }, 'asks'), 'the chosen query'), el('li', {}, el('span', { class: 'hd-token hd-selected' }, 'key'), 'selected'),
      this.legendSupport = el('li', {}, el('span', { class: 'hd-token hd-support' }, 'key'), 'support token: its constraint is tight'), el('li', {}, el('span', { class: 'hd-swatch', 'aria-hidden': 'true' }), 'weight'), el('li', {}, el('span', { class: 'hd-swatch hd-swatch-bar', 'aria-hidden': 'true' }), 'margin of the token as a query'),
      this.legendDiffers = el('li', {}, el('span', { class: 'hd-token hd-differs' }, el('bdi', {}, 'token')), 'as a query the twin selects another key'));
    return el('div', { class: 'hd-part' }, el('h3', {}, 'What it selects'), this.readout, this.texts, legend,
      el('div', { class: 'hd-tools' }, this.agreementTop, this.nextDiffering, exportButton('CSV', 'Save selections and margins of all queries as CSV', () => this.saveQueries())), this.beside);
  }

  patternPart() {
    const act = (label, explained, run) => el('button', { type: 'button', class: 'quiet', 'aria-label': explained, title: explained, click: run }, label);
    const zoom = (factor) => () => this.matrix.zoom(factor);
    const select = (label, key, entries, then) => el('label', { class: 'field' }, label, el('select', { change: (event) => { headView[key] = event.target.value; then(); } }, ...entries.map(([value, text]) => el('option', { value, selected: String(headView[key]) === value }, text))));
    this.matrixTools = el('span', { class: 'hd-group' },
      select('Colour scale', 'scale', Object.entries(HEAD_SCALES).map(([key, { title }]) => [key, title]), () => this.restyle()),
      select('Drag', 'mode', [['zoom', 'zooms to a range'], ['pan', 'moves']], () => this.restyle()),
      el('span', { class: 'hd-group hd-buttons', role: 'group', 'aria-label': 'Zoom' }, act('+', 'Zoom in', zoom(0.6)), act('−', 'Zoom out', zoom(1 / 0.6)), act('All', 'Show the whole matrix', () => this.matrix.show(this.matrix.whole()))),
      headToggle('Marks', headView.marks, (on) => { headView.marks = on; this.restyle(); }));
    this.lineTools = el('span', { class: 'hd-group' }, select('Lines', 'wanted', LINE_COUNTS.map((number) => [String(number), `${number} strongest`]), () => this.restyle()));
    const shape = headSwitch('View', [['matrix', 'Matrix'], ['lines', 'Lines']], headView.shape, (value) => { headView.shape = value; this.reshape(); });
    const exported = (which, views, svgToo) => el('span', { class: 'hd-tools' }, ...[
      exportButton('SVG', `Save the ${which} as SVG`, () => this.savePattern(views, 'svg')), svgToo ? exportButton('PNG', `Save the ${which} as PNG`, () => this.savePattern(views, 'png')) : null].filter(Boolean));
    const pane = (title, matrix, lines, key) => el('figure', { class: 'hd-pane' }, el('figcaption', { class: 'hd-pane-head' }, el('h4', {}, title), exported(key === 'twin' ? 'max-margin twin' : 'head', { matrix, lines, key }, true)), matrix.node, lines.node);
    this.twinPane = pane('Max-margin twin', this.twinMatrix, this.twinLines, 'twin');
    return el('div', { class: 'hd-part' }, el('h3', {}, 'Attention'), el('div', { class: 'tools hd-pattern-tools' }, shape, this.matrixTools, this.lineTools), this.cell,
      el('div', { class: 'hd-pair' }, pane('The head', this.matrix, this.lines, 'head'), this.twinPane), this.legend, this.agreement, this.help = el('p', { class: 'hd-note' }, HEAD_MATRIX_HELP));
  }

  async load() {
    this.turn += 1;
    const turn = this.turn;
    try {
      const record = await this.atlas.shown(this.shown, this.head.module);
      if (this.ended || turn !== this.turn) return;
      this.notice.hidden = true;
      this.arrays = headArrays(this.atlas, record, this.head.head);
      this.parts.hidden = false;
      this.makeTexts();
      this.regrid();
    } catch (error) {
      if (this.ended || turn !== this.turn) return;
      this.notice.hidden = false;
      this.parts.hidden = true;
      this.notice.textContent = `The patterns of this text cannot be shown: ${error.message}`;
    }
  }

  // Lists of tokens, or pictures: the queries, and the keys of the head and of its twin.
  makeTexts() {
    const { query_side: querySide, key_side: keySide } = this.module;
    const { picture } = this.atlas.meta.shown[this.shown];
    const self = querySide === keySide;
    const common = (name, asks, answers, details) => ({ name, asks, answers, onChoose: (i) => this.choose(i, true), details });
    const keys = (name, which) => (picture && keySide === 'source' ? new PictureView({ ...common(name, self, true, (i) => this.details(which, i)), picture }) : new TokenList(common(name, self, true, (i) => this.details(which, i))));
    this.asking = self ? null : new TokenList(common('Queries, from the target text', true, false, (i) => this.details('query', i)));
    this.answers = { own: keys(self ? 'Tokens: choose the one that asks' : 'Keys, from the source text', 'own'), twin: this.arrays.twin ? keys('Max-margin twin', 'twin') : null };
    this.tops = { own: el('ol', { class: 'hd-top', 'aria-label': 'Strongest keys of the head' }), twin: el('ol', { class: 'hd-top', 'aria-label': 'Strongest keys of the twin' }) };
    const pane = (title, which) => (this.answers[which] ? el('div', { class: 'hd-pane' }, el('h4', {}, title), this.answers[which].node, this.tops[which]) : null);
    this.texts.replaceChildren(...[this.asking && el('div', { class: 'hd-pane' }, el('h4', {}, 'Queries (target text)'), this.asking.node),
      el('div', { class: 'hd-pair' }, pane(self ? 'The head' : 'Keys (source text), by the head', 'own'), pane(self ? 'Its max-margin twin' : 'Keys, by its max-margin twin', 'twin'))].filter(Boolean));
  }

  regrid() {
    if (!this.arrays) return;
    const { own, twin, margins } = this.arrays;
    this.wordsBox.disabled = ![this.module.query_side, this.module.key_side].some((side) => (this.piece(side).words ?? []).some((word) => word >= 0));
    const [rows, columns] = [headUnits(this.piece(this.module.query_side), this.options), headUnits(this.piece(this.module.key_side), this.options)];
    if (!rows.length || !columns.length) { this.notice.textContent = 'This text has only special tokens, which are hidden.'; this.notice.hidden = false; this.parts.hidden = true; return; }
    this.notice.hidden = true;
    this.parts.hidden = false;
    this.grid = unitGrid(rows, columns, own, this.options.hideSpecial);
    this.twin = twin && unitGrid(rows, columns, twin, this.options.hideSpecial);
    this.compared = this.twin && headAgreement(this.grid, this.twin);
    if (this.twin) this.grid.differs = this.twin.differs = this.compared.differs;
    this.margins = Float32Array.from(rows, ({ tokens }) => { const known = tokens.map((at) => margins[at]).filter(Number.isFinite); return known.length ? Math.min(...known) : NaN; });
    this.signature = [rows, columns].map((units) => units.map(({ label }) => label).join('\n')).join('\n\n');
    this.asking?.set({ units: rows, margins: this.margins });
    this.answers.own.set({ units: columns, margins: this.asking ? null : this.margins });
    this.answers.twin?.set({ units: columns, margins: null });
    this.twinPane.hidden = !this.twin;
    this.legendSupport.hidden = !this.grid.support;
    this.legendDiffers.hidden = !this.twin;
    this.rangeKey = `${this.textKey()}.${this.module.key_side}.${rows.length}.${columns.length}`;
    const range = headView.ranges.get(this.rangeKey);
    this.matrix.set({ grid: this.grid, range: range ?? { r0: 0, r1: rows.length, c0: 0, c1: columns.length } });
    this.lines.set({ grid: this.grid });
    if (this.twin) {
      this.twinMatrix.set({ grid: this.twin, range: this.matrix.range });
      this.twinLines.set({ grid: this.twin });
    }
    this.restyle();
    this.reshape();
    this.sayAgreement();
    for (const page of [this, ...this.linked()]) page.sayBeside();
    const at = headView.queries.get(this.textKey());
    const kept = at === undefined ? -1 : rows.findIndex(({ tokens }) => tokens.includes(at));
    this.choose(kept >= 0 ? kept : rows.length >> 1, false, true);
  }

  restyle() {
    const look = { scale: headView.scale, marks: headView.marks, mode: headView.mode };
    for (const view of this.views(this.matrix, this.twinMatrix)) view.set(look);
    for (const view of this.views(this.lines, this.twinLines)) view.set({ wanted: Number(headView.wanted) });
    this.drawLegend();
  }

  views(own, twin) { return this.twin ? [own, twin] : this.grid ? [own] : []; }

  reshape() {
    const lines = headView.shape === 'lines';
    for (const view of [this.matrix, this.twinMatrix]) view.node.hidden = lines;
    for (const view of [this.lines, this.twinLines]) view.node.hidden = !lines;
    this.matrixTools.hidden = this.legend.hidden = this.help.hidden = this.cell.hidden = lines;
    this.lineTools.hidden = !lines;
    for (const view of this.views(this.matrix, this.twinMatrix)) view.draw();
    for (const view of this.views(this.lines, this.twinLines)) {
      if (lines && this.query >= 0) view.reveal(this.query);
      view.draw();
    }
  }

  repaint() {
    for (const view of this.views(this.matrix, this.twinMatrix)) view.set({ themed: true });
    this.drawLegend();
  }

  ranged(range) {
    for (const page of [this, ...this.linked()]) {
      headView.ranges.set(page.rangeKey, range);
      for (const view of page.views(page.matrix, page.twinMatrix)) view.show(range, false);
    }
  }

  // spoken: the choice came from the keyboard or a click, and is read out.
  choose(i, spoken = false, forced = false) {
    if (i < 0 || i >= this.grid.rows.length || (i === this.query && !forced)) return;
    this.query = i;
    headView.queries.set(this.textKey(), this.grid.rows[i].at);
    const width = this.grid.columns.length;
    const row = (values) => values?.subarray(i * width, (i + 1) * width) ?? null;
    const differs = this.compared?.differs;
    this.asking?.paint({ query: i, selected: -1, weights: null, support: null, differs });
    for (const [which, grid] of [['own', this.grid], ['twin', this.twin]]) {
      if (!grid) continue;
      this.answers[which].paint({ query: i, weights: row(grid.weights), selected: grid.selected[i], support: row(grid.support), differs: this.asking ? null : differs });
      this.tops[which].replaceChildren(...headStrongest(grid, i, (j) => this.answers[which].find(j)));
    }
    for (const view of [...this.views(this.matrix, this.twinMatrix), ...this.views(this.lines, this.twinLines)]) { view.query = i; view.draw(); }
    this.readout.textContent = this.sentence(i);
    this.marginChart.draw(true);
    // Where things are is asked after everything is written, so that the page is laid out once.
    for (const view of [this.asking, this.answers.own, this.answers.twin]) view?.reveal();
    if (spoken) announce(this.readout.textContent);
    if (!forced) for (const page of this.linked()) page.choose(i, false, false);
  }

  sentence(i) {
    const { rows, columns, weights, selected, support } = this.grid;
    const j = selected[i];
    if (j < 0) return `Query ${headToken(rows[i])} attends to nothing here.`;
    const parts = [`Query ${headToken(rows[i])} selects ${headToken(columns[j])} with weight ${headWeight(weights[i * columns.length + j])}`];
    if (Number.isFinite(this.margins[i])) parts.push(`margin ${format(this.margins[i], 3)} logits`);
    if (support) parts.push(plural(support.subarray(i * columns.length, (i + 1) * columns.length).reduce((sum, one) => sum + (one ? 1 : 0), 0), 'support token'));
    const t = this.twin?.selected[i] ?? -1;
    const twin = t < 0 ? '' : t === j ? ' The twin selects the same.' : ` The twin selects ${headToken(columns[t])} instead.`;
    return `${parts.join(', ')}.${twin}`;
  }

  // Content of the tooltip of a token.
  details(which, at) {
    const { rows, columns } = this.grid;
    const unit = which === 'query' ? rows[at] : columns[at];
    const asks = which === 'query' || !this.asking;
    const pairs = [];
    if (which !== 'query' && this.query >= 0) {
      for (const [name, grid] of [['weight', this.grid], ['weight in the twin', this.twin]]) if (grid) pairs.push([name, headWeight(grid.weights[this.query * columns.length + at])]);
    }
    if (asks) {
      pairs.push(['margin as a query', Number.isFinite(this.margins[at]) ? format(this.margins[at], 3) : '–']);
      const [own, twin] = [this.grid.selected[at], this.twin?.selected[at] ?? -1];
      pairs.push(['selects', own < 0 ? '–' : headToken(columns[own])]);
      if (twin >= 0 && twin !== own) pairs.push(['twin selects', headToken(columns[twin])]);
    }
    return [el('p', { class: 'tip-head' }, el('bdi', {}, shorten(unit.label, 200)), el('span', {}, `position ${unit.at}`)),
      el('dl', {}, ...pairs.flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, el('bdi', {}, value))]))];
  }

  showCell(cell) {
    for (const view of this.views(this.matrix, this.twinMatrix)) {
      view.cursor = cell;
      view.draw();
    }
    const twin = cell && this.twin ? `; in the twin ${headWeight(this.twin.weights[cell.row * this.twin.columns.length + cell.column])}` : '';
    this.cell.textContent = cell ? `${this.matrix.reading(cell)}${twin}` : HEAD_CELL_HINT;
  }

  // Two heads beside each other: how often they choose alike.
  sayBeside() {
    const [other] = this.linked();
    this.beside.hidden = !other;
    if (!other) return;
    const { both, same, differs } = headAgreement(this.grid, other.grid);
    const differing = [...differs.keys()].filter((i) => differs[i]);
    const list = differing.slice(0, 12).map((i) => el('button', { type: 'button', class: 'quiet', click: () => this.choose(i, true) }, el('bdi', {}, shorten(this.grid.rows[i].label.trim() || '␣', 20)), ` ${this.grid.rows[i].at}`));
    this.beside.replaceChildren(`The two heads select the same for ${count(same)} of ${count(both)} queries. `, ...(differing.length ? ['They differ at ', ...list, differing.length > list.length ? ` and ${count(differing.length - list.length)} more.` : ''] : []));
  }

  sayAgreement() {
    const known = this.compared && this.compared.both > 0;
    const { both, same } = this.compared ?? {};
    const said = known
      ? `Head and twin select the same ${this.options.words ? 'word' : 'token'} for ${format((100 * same) / both, 3)} % of the queries (${count(same)} of ${count(both)}).`
      : 'No max-margin twin was recorded for this head.';
    this.agreementTop.textContent = said;
    const notes = [known && both > same && 'Queries that differ are marked: in the matrices at the right edge, among the lines in italics.',
      this.twin && 'Of the twin the largest weights of each query are recorded, so the rest shows as 0.',
      this.options.words && 'Words: weights are summed over the keys of a word and averaged over its queries; its margin is the smallest of its tokens.',
      this.options.hideSpecial && 'Special tokens are hidden and the weights scaled to sum to 1 without them; margins are those of the head itself.'];
    this.agreement.textContent = notes.filter(Boolean).join(' ');
    this.nextDiffering.hidden = !(known && both > same);
  }

  toDiffering() {
    const { differs } = this.compared;
    for (let step = 1; step <= differs.length; step += 1) {
      const i = (this.query + step) % differs.length;
      if (differs[i]) { this.choose(i, true); return; }
    }
  }

  drawLegend() {
    if (!this.grid) return;
    const colours = weightColours(theme.isDark());
    const { ticks, title, place } = HEAD_SCALES[headView.scale];
    const stops = colours.filter((_, i) => i % 15 === 0).map((colour, i, all) => svgEl('stop', { offset: i / (all.length - 1), 'stop-color': `rgb(${colour.join(' ')})` }));
    headView.ramps = (headView.ramps ?? 0) + 1;
    const name = `hd-ramp-${headView.ramps}`;
    const svg = svgEl('svg', { class: 'hd-chart-svg', width: 260, height: 34, viewBox: '0 0 260 34', role: 'img', 'aria-label': `Colours of the weights, ${title} scale, from 0 to 1` },
      svgEl('defs', {}, svgEl('linearGradient', { id: name }, ...stops)), svgEl('rect', { x: 10, y: 1, width: 240, height: 11, fill: `url(#${name})`, class: 'hd-ramp' }),
      ...ticks.map((tick) => svgEl('text', { x: 10 + 240 * Math.min(1, place(tick)), y: 27, 'text-anchor': 'middle' }, tick <= 1e-4 && tick > 0 ? '≤ 0.0001' : String(tick))));
    const key = (kind, text) => el('span', {}, el('span', { class: `hd-cellkey ${kind}`, 'aria-hidden': 'true' }), text);
    this.legend.replaceChildren(...[svg, headView.marks ? key('hd-selected', 'selected') : null, headView.marks && this.grid.support ? key('hd-support', 'support token') : null, key('hd-query', 'chosen query'),
      headView.marks ? el('span', { class: 'hd-note' }, 'Selected and support cells are outlined where cells are large enough.') : null].filter(Boolean));
  }

  saveQueries() {
    const { rows, columns, weights, selected, support } = this.grid;
    const width = columns.length;
    const token = (j) => (j < 0 ? [null, null] : [columns[j].at, columns[j].label]);
    const head = ['query', 'query_token', 'selected', 'selected_token', 'weight', 'margin', 'n_support', 'twin_selected', 'twin_selected_token', 'twin_weight', 'same'];
    const lines = rows.map((unit, i) => {
      const [j, t] = [selected[i], this.twin?.selected[i] ?? -1];
      return [unit.at, unit.label, ...token(j), j < 0 ? null : weights[i * width + j], Number.isFinite(this.margins[i]) ? this.margins[i] : null,
        support ? support.subarray(i * width, (i + 1) * width).reduce((sum, one) => sum + (one ? 1 : 0), 0) : null, ...token(t), t < 0 ? null : this.twin.weights[i * width + t], j < 0 || t < 0 ? null : j === t];
    });
    saveCsv([head, ...lines], this.part(`queries-${this.shown}`));
  }

  saveSpectra() {
    const keys = Object.keys(this.head.spectra ?? {});
    const longest = Math.max(0, ...keys.map((key) => this.head.spectra[key].length));
    saveCsv([['rank', ...keys], ...Array.from({ length: longest }, (_, i) => [i + 1, ...keys.map((key) => this.head.spectra[key][i])])], this.part('spectrum'));
  }

  savePattern({ matrix, lines, key }, kind) {
    const part = this.part(`${headView.shape}-${key}`);
    if (headView.shape === 'lines') saveLines(lines, part, kind);
    else if (kind === 'svg') saveMatrixSvg(matrix, part);
    else matrix.savePng(part);
  }

  dispose() {
    this.ended = true;
    headView.pages.delete(this);
    this.themes.disconnect();
    this.media.removeEventListener('change', this.onMedia);
    tooltip.hide();
    for (const part of [this.matrix, this.twinMatrix, this.lines, this.twinLines, ...this.charts]) part.dispose();
  }
}

function renderHead(container, atlas, head, shown, options = {}) {
  const page = new HeadPage(container, atlas, head, shown, options);
  return () => page.dispose();
}
