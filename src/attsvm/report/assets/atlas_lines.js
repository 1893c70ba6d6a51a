// Queries at the left, keys at the right, a line for each of the strongest weights of the queries in view.
const LINE_ROW = 19;
const LINE_COUNTS = [50, 100, 200, 400];

// The strongest weights of some queries, strongest first.
function strongestLines(grid, from, to, wanted) {
  const width = grid.columns.length;
  const found = [];
  let floor = 0;
  for (let i = from; i < to; i += 1) {
    for (let j = 0; j < width; j += 1) {
      const weight = grid.weights[i * width + j];
      if (weight <= floor || weight < 1e-4) continue;
      found.push({ i, j, weight });
      // Now and then the weakest are thrown away, so that long texts do not fill the memory.
      if (found.length >= 8 * wanted) {
        found.sort((a, b) => b.weight - a.weight);
        found.length = wanted;
        floor = found[wanted - 1].weight;
      }
    }
  }
  return found.sort((a, b) => b.weight - a.weight).slice(0, wanted);
}

class LineView {
  constructor({ name, onChoose, onScroll }) {
    Object.assign(this, { name, onChoose, onScroll, grid: null, query: -1, hover: -1, wanted: 100, frame: 0 });
    this.svg = svgEl('svg', { class: 'hd-lines-svg', role: 'img', 'aria-label': name });
    this.space = el('div', { class: 'hd-lines-space' }, this.svg);
    this.node = el('div', {
      class: 'hd-lines', tabindex: '0', role: 'application', 'aria-roledescription': 'lines from queries to keys',
      scroll: () => { this.draw(); this.onScroll?.(this.node.scrollTop); },
      pointermove: (event) => this.point(event), pointerleave: () => this.over(-1), click: (event) => this.click(event), keydown: (event) => this.type(event),
    }, this.space);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.node);
  }

  set(changes) {
    Object.assign(this, changes);
    const { rows, columns } = this.grid;
    this.space.style.height = `${Math.max(rows.length, columns.length) * LINE_ROW + 12}px`;
    this.node.setAttribute('aria-label', `${this.name}: lines from each query to the keys it attends to. Up and down arrows choose the query; Page up and Page down scroll.`);
    this.draw();
  }

  scrollTo(top) { if (Math.abs(this.node.scrollTop - top) > 1) this.node.scrollTop = top; }

  draw() {
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.paint(); });
  }

  // Only what is in view is in the document, however long the text.
  window() {
    const [top, height] = [this.node.scrollTop, this.node.clientHeight];
    return { top, height, first: Math.max(0, Math.floor((top - 6) / LINE_ROW)), last: Math.ceil((top + height) / LINE_ROW) };
  }

  paint() {
    const width = this.space.clientWidth;
    if (!this.grid || !width || !this.node.clientHeight) return;
    const { top, height, first, last } = this.window();
    const { rows, columns } = this.grid;
    const column = Math.max(78, Math.min(190, width * 0.3));
    fill(this.svg, { width, height, viewBox: `0 0 ${width} ${height}`, 'aria-label': this.summary(first, Math.min(last, rows.length)) }, []);
    this.svg.style.top = `${top}px`;
    const y = (i) => 6 + (i + 0.5) * LINE_ROW - top;
    const focus = this.hover >= 0 ? this.hover : this.query;
    const strong = strongestLines(this.grid, first, Math.min(last, rows.length), this.wanted);
    const own = focus >= first && focus < last ? strongestLines(this.grid, focus, focus + 1, 12) : [];
    // Lines to keys out of view are fainter: many run along the edge.
    const inView = (j) => (j >= first && j < last ? 1 : 0.4);
    const line = ({ i, j, weight }, kind) => svgEl('line', { class: `hd-line ${kind}`, x1: column, y1: y(i), x2: width - column, y2: y(j), 'stroke-opacity': Math.max(0.04, Math.sqrt(weight) * inView(j) * (kind ? 1 : 0.75)).toFixed(3) });
    const letters = Math.floor((column - 14) / 7);
    const words = (units, x, anchor, marks) => units.slice(first, last).map((unit, at) => {
      const i = at + first;
      return svgEl('text', { class: `hd-line-word ${marks(i)}`, x, y: y(i) + 4, 'text-anchor': anchor, 'data-row': i, direction: 'ltr' }, `\u2068${shorten(unit.label.trim() || '␣', letters)}\u2069`);
    });
    const chosen = focus >= 0 ? this.grid.selected[focus] : -1;
    const supports = (j) => focus >= 0 && this.grid.support?.[focus * columns.length + j];
    this.svg.replaceChildren(
      ...strong.filter(({ i }) => i !== focus).map((one) => line(one, '')),
      ...own.map((one) => line(one, one.j === chosen ? 'hd-own hd-sel' : 'hd-own')),
      ...words(rows, column - 7, 'end', (i) => `${i === this.query ? 'hd-q' : ''} ${this.grid.differs?.[i] ? 'hd-differs' : ''}`),
      ...words(columns, width - column + 7, 'start', (j) => `${j === chosen ? 'hd-k' : ''} ${supports(j) ? 'hd-sup' : ''}`),
    );
  }

  summary(first, last) {
    return `${this.name}: ${this.wanted} strongest weights of queries ${first} to ${last - 1}`;
  }

  rowAt(event) {
    const edge = this.svg.getBoundingClientRect();
    const i = Math.floor((event.clientY - edge.top + this.node.scrollTop - 6) / LINE_ROW);
    return event.clientX - edge.left < edge.width * 0.6 && i >= 0 && i < this.grid.rows.length ? i : -1;
  }

  point(event) { if (event.pointerType === 'mouse') this.over(this.rowAt(event)); }

  over(i) {
    if (i === this.hover) return;
    this.hover = i;
    this.draw();
  }

  click(event) {
    const i = this.rowAt(event);
    if (i >= 0) this.onChoose?.(i);
  }

  type(event) {
    const moves = { ArrowUp: -1, ArrowDown: 1 };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.max(0, Math.min(this.grid.rows.length - 1, this.query + moves[event.key]));
    this.onChoose?.(next);
    this.reveal(next);
  }

  reveal(i) {
    const [y, { scrollTop, clientHeight }] = [i * LINE_ROW, this.node];
    if (y < scrollTop || y + 2 * LINE_ROW > scrollTop + clientHeight) this.node.scrollTop = Math.max(0, y - clientHeight / 2);
  }

  dispose() {
    this.observer.disconnect();
    cancelAnimationFrame(this.frame);
  }
}
