// The attention matrix: all weights become one small picture, and a canvas shows a range of it with labels and marks.
// Lightness falls (or, on dark, rises) steadily from 0 to 1, so that the order survives colour blindness and grey print.
const HEAD_COLOURS = {
  light: ['#fdfcf9', '#eaf3d0', '#c5e5b9', '#84cabb', '#43acc1', '#2384b8', '#2459a0', '#25327f', '#0d1546'],
  dark: ['#191c21', '#262a57', '#2a437f', '#2a6392', '#2c8597', '#46a68d', '#80c57b', '#c3df7c', '#faf3ae'],
};
const HEAD_SCALES = {
  sqrt: { title: 'square root', place: (p) => Math.sqrt(p), ticks: [0, 0.05, 0.25, 0.5, 1] },
  linear: { title: 'linear', place: (p) => p, ticks: [0, 0.25, 0.5, 0.75, 1] },
  log: { title: 'logarithmic', place: (p) => (p > 1e-4 ? 1 + Math.log10(p) / 4 : 0), ticks: [1e-4, 1e-3, 1e-2, 0.1, 1] },
};
const FEWEST_CELLS = 2;
const LABEL_ROOM = 11;

// 256 colours, as [red, green, blue].
function weightColours(dark) {
  const stops = HEAD_COLOURS[dark ? 'dark' : 'light'].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    return stops[low].map((value, channel) => Math.round(value + (stops[low + 1][channel] - value) * (at - low)));
  });
}
const headColour = (colours, scale, p) => `rgb(${colours[Math.round(255 * HEAD_SCALES[scale].place(Math.min(1, p)))].join(' ')})`;

// Colours of the theme as the browser computes them: a canvas does not know custom properties.
function headInks(host) {
  const probe = el('span', { hidden: true });
  host.append(probe);
  const inks = Object.fromEntries(['ink', 'soft', 'hair', 'edge', 'paper', 'raised', 'accent', 'nuc', 'kq'].map((name) => {
    probe.style.color = `var(--${name})`;
    return [name, getComputedStyle(probe).color];
  }));
  probe.remove();
  return inks;
}

// One pixel per weight.
function matrixPicture(grid, scale, colours) {
  const [height, width] = [grid.rows.length, grid.columns.length];
  const canvas = el('canvas', { width, height });
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const packed = Uint32Array.from(colours, ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0);
  const { place } = HEAD_SCALES[scale];
  for (let i = 0; i < pixels.length; i += 1) pixels[i] = packed[(255 * place(Math.min(1, grid.weights[i])) + 0.5) | 0];
  context.putImageData(image, 0, 0);
  return canvas;
}

// First, second ... of some evenly spaced whole numbers, so far apart that their labels do not touch.
function matrixTicks(from, to, cell, room) {
  const step = cell >= room ? 1 : [2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((one) => one * cell >= 2.6 * room) ?? 10000;
  const ticks = [];
  for (let i = Math.ceil(from / step - 1e-9) * step; i < to - 0.4; i += step) if (i + 0.6 > from) ticks.push(i);
  return ticks;
}
const matrixLabel = (unit, cell, letters) => (cell >= LABEL_ROOM ? shorten(unit.label.trim() || '␣', letters) : String(unit.at));

class MatrixView {
  constructor({ name, onChoose, onRange, onCell }) {
    Object.assign(this, { name, onChoose, onRange, onCell, grid: null, scale: 'sqrt', marks: true, mode: 'zoom', query: -1, cursor: null, brush: null, range: null });
    this.pointers = new Map();
    this.canvas = el('canvas', {
      class: 'hd-matrix', tabindex: '0', role: 'application', 'aria-roledescription': 'attention matrix',
      pointerdown: (event) => this.press(event), pointermove: (event) => this.move(event), pointerup: (event) => this.release(event),
      pointercancel: (event) => this.release(event), pointerleave: (event) => this.leave(event), dblclick: () => this.show(this.whole()),
      keydown: (event) => this.type(event), focus: () => this.draw(), blur: () => this.draw(),
    });
    this.canvas.addEventListener('wheel', (event) => this.wheel(event), { passive: false });
    this.node = el('div', { class: 'hd-canvas' }, this.canvas);
    this.observer = new ResizeObserver(() => { if (this.node.clientWidth && this.node.clientWidth !== this.width) this.paintNow(); });
    this.observer.observe(this.node);
  }

  whole() { return { r0: 0, r1: this.grid.rows.length, c0: 0, c1: this.grid.columns.length }; }

  get isWhole() { return this.range.r1 - this.range.r0 >= this.grid.rows.length && this.range.c1 - this.range.c0 >= this.grid.columns.length; }

  set(changes) {
    const before = this.grid;
    Object.assign(this, changes);
    if (changes.grid && (!before || !this.range || before.rows.length !== this.grid.rows.length || before.columns.length !== this.grid.columns.length)) {
      this.range = changes.range ?? this.whole();
      this.cursor = null;
    }
    if (changes.range) this.range = this.fit(changes.range);
    if (changes.grid || changes.scale || changes.themed) this.picture = null;
    this.canvas.setAttribute('aria-label', this.description());
    this.draw();
  }

  description() {
    const { rows, columns } = this.grid;
    return `${this.name}: weights of ${plural(columns.length, 'key')} for ${plural(rows.length, 'query').replace('querys', 'queries')}. `
      + 'Arrow keys move over the cells, plus and minus zoom, 0 shows all, Enter chooses the query.';
  }

  // Ranges stay inside and keep a few cells.
  fit(range) {
    const one = (low, high, length) => {
      const span = Math.min(length, Math.max(Math.min(length, FEWEST_CELLS), high - low));
      const start = Math.max(0, Math.min(length - span, low));
      return [start, start + span];
    };
    const [r0, r1] = one(range.r0, range.r1, this.grid.rows.length);
    const [c0, c1] = one(range.c0, range.c1, this.grid.columns.length);
    return { r0, r1, c0, c1 };
  }

  show(range, told = true) {
    this.range = this.fit(range);
    this.draw();
    if (told) this.onRange?.(this.range);
  }

  zoom(factor, x = 0.5, y = 0.5) {
    const { r0, r1, c0, c1 } = this.range;
    const [row, column] = [r0 + y * (r1 - r0), c0 + x * (c1 - c0)];
    this.show({ r0: row - (row - r0) * factor, r1: row + (r1 - row) * factor, c0: column - (column - c0) * factor, c1: column + (c1 - column) * factor });
  }

  pan(rows, columns) {
    const { r0, r1, c0, c1 } = this.range;
    this.show({ r0: r0 + rows, r1: r1 + rows, c0: c0 + columns, c1: c1 + columns });
  }

  // Several changes in one frame are drawn once.
  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.paintNow(); });
  }

  // Words above the columns take room from the cells, not from the page: nothing moves while zooming.
  layout(width) {
    const [rows, columns] = [this.grid.rows.length, this.grid.columns.length];
    const left = Math.round(Math.max(54, Math.min(92, width * 0.18)));
    const room = width - left - 10;
    const height = Math.round(Math.max(Math.min(room, 150), Math.min(room * 1.2, (room * rows) / columns)));
    const words = room / (this.range.c1 - this.range.c0) >= LABEL_ROOM;
    const top = words ? 74 : 36;
    return { left, top, width: room, height: height + 36 - top, total: height + 44 };
  }

  paintNow() {
    if (!this.grid || !this.node.isConnected) return;
    const width = this.node.clientWidth;
    if (!width) return;
    this.width = width;
    this.box = this.layout(width);
    // One finger scrolls the page, unless there is something to move and the reader chose to.
    this.canvas.style.touchAction = this.mode === 'pan' && !this.isWhole ? 'none' : 'pan-y';
    const ratio = Math.min(3, devicePixelRatio || 1);
    const [w, h] = [Math.round(width * ratio), Math.round(this.box.total * ratio)];
    if (this.canvas.width !== w || this.canvas.height !== h) Object.assign(this.canvas, { width: w, height: h });
    this.canvas.style.height = `${this.box.total}px`;
    if (!this.picture) {
      this.inks = headInks(this.node);
      this.picture = matrixPicture(this.grid, this.scale, weightColours(theme.isDark()));
    }
    const context = this.canvas.getContext('2d');
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, w, h);
    this.paint(context, { box: this.box, ratio, inks: this.inks, picture: this.picture, live: true });
  }

  paint(context, { box, ratio, inks, picture, live }) {
    const { r0, r1, c0, c1 } = this.range;
    const cell = { width: box.width / (c1 - c0), height: box.height / (r1 - r0) };
    const place = { x: (column) => box.left + (column - c0) * cell.width, y: (row) => box.top + (row - r0) * cell.height };
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingEnabled = Math.min(cell.width, cell.height) * ratio < 1;
    context.imageSmoothingQuality = 'high';
    context.drawImage(picture, c0, r0, c1 - c0, r1 - r0, box.left, box.top, box.width, box.height);
    context.lineWidth = 1;
    context.strokeStyle = inks.edge;
    context.strokeRect(box.left - 0.5, box.top - 0.5, box.width + 1, box.height + 1);
    this.paintLabels(context, box, cell, place, inks);
    context.save();
    context.beginPath();
    context.rect(box.left, box.top, box.width, box.height);
    context.clip();
    if (this.marks && Math.min(cell.width, cell.height) >= 3.5) this.paintMarks(context, cell, place, inks);
    context.restore();
    this.paintDiffers(context, box, cell, place, inks);
    if (live) this.paintPointers(context, box, cell, place, inks);
  }

  paintLabels(context, box, cell, place, inks) {
    const { r0, r1, c0, c1 } = this.range;
    const font = headFont();
    context.font = `11px ${font}`;
    context.textBaseline = 'middle';
    const text = (value, x, y) => context.fillText(value, x, y);
    context.textAlign = 'right';
    for (const i of matrixTicks(r0, r1, cell.height, LABEL_ROOM)) {
      context.fillStyle = i === this.query ? inks.accent : inks.soft;
      context.font = `${i === this.query ? 700 : 400} 11px ${font}`;
      text(`\u2068${matrixLabel(this.grid.rows[i], cell.height, Math.floor((box.left - 8) / 6.3))}\u2069`, box.left - 6, place.y(i + 0.5));
    }
    context.font = `11px ${font}`;
    context.fillStyle = inks.soft;
    context.textAlign = 'left';
    for (const j of matrixTicks(c0, c1, cell.width, LABEL_ROOM)) {
      context.save();
      context.translate(place.x(j + 0.5), box.top - 6);
      const words = cell.width >= LABEL_ROOM;
      if (words) context.rotate(-Math.PI / 2);
      else context.textAlign = 'center';
      text(`\u2068${matrixLabel(this.grid.columns[j], cell.width, Math.floor((box.top - 8) / 6.3))}\u2069`, 0, words ? 0 : -4);
      context.restore();
    }
    context.fillStyle = inks.ink;
    context.textAlign = 'left';
    context.font = `600 11px ${font}`;
    if (cell.width < LABEL_ROOM) text('keys →', box.left, 8);
    text('queries ↓', 0, cell.width < LABEL_ROOM ? 8 : box.top - 10);
  }

  paintMarks(context, cell, place, inks) {
    const { r0, r1, c0, c1 } = this.range;
    const { support, selected, columns } = this.grid;
    const inset = Math.min(2, cell.width / 6);
    context.lineWidth = Math.max(1, Math.min(2, cell.width / 8));
    for (let i = Math.floor(r0); i < Math.min(this.grid.rows.length, r1); i += 1) {
      if (support) {
        context.strokeStyle = inks.edge;
        context.setLineDash([2, 2]);
        for (let j = Math.floor(c0); j < Math.min(columns.length, c1); j += 1) {
          if (support[i * columns.length + j]) context.strokeRect(place.x(j) + inset, place.y(i) + inset, cell.width - 2 * inset, cell.height - 2 * inset);
        }
        context.setLineDash([]);
      }
      const j = selected[i];
      if (j < 0 || j + 1 < c0 || j > c1) continue;
      context.strokeStyle = inks.nuc;
      context.strokeRect(place.x(j) + inset / 2, place.y(i) + inset / 2, cell.width - inset, cell.height - inset);
    }
  }

  // Queries whose selected token differs from the other matrix have a mark at the right.
  paintDiffers(context, box, cell, place, inks) {
    if (!this.grid.differs) return;
    context.fillStyle = inks.nuc;
    this.grid.differs.forEach((differs, i) => {
      if (differs && i + 1 > this.range.r0 && i < this.range.r1) {
        const top = Math.max(box.top, place.y(i));
        context.fillRect(box.left + box.width + 3, top, 6, Math.max(1, Math.min(box.top + box.height, place.y(i + 1)) - top - (cell.height > 4 ? 1 : 0)));
      }
    });
  }

  paintPointers(context, box, cell, place, inks) {
    context.lineWidth = 1.5;
    if (this.query >= this.range.r0 && this.query < this.range.r1) {
      const y = Math.max(box.top, place.y(this.query));
      context.strokeStyle = context.fillStyle = inks.accent;
      // A frame would hide rows that are thinner than its lines.
      if (cell.height >= 5) context.strokeRect(box.left, y, box.width, Math.min(cell.height, box.top + box.height - y));
      else {
        context.globalAlpha = 0.45;
        context.fillRect(box.left, y + cell.height / 2 - 0.5, box.width, 1);
        context.globalAlpha = 1;
        context.beginPath();
        context.moveTo(box.left, y + cell.height / 2);
        context.lineTo(box.left - 7, y + cell.height / 2 - 4);
        context.lineTo(box.left - 7, y + cell.height / 2 + 4);
        context.fill();
      }
    }
    if (this.cursor) {
      const [x, y] = [place.x(this.cursor.column), place.y(this.cursor.row)];
      context.strokeStyle = inks.ink;
      context.strokeRect(x - 1, y - 1, cell.width + 2, cell.height + 2);
      if (Math.min(cell.width, cell.height) < 6) {
        context.globalAlpha = 0.35;
        context.fillStyle = inks.ink;
        context.fillRect(box.left, y + cell.height / 2 - 0.5, box.width, 1);
        context.fillRect(x + cell.width / 2 - 0.5, box.top, 1, box.height);
        context.globalAlpha = 1;
      }
    }
    if (this.brush) {
      const { x0, y0, x1, y1 } = this.brush;
      context.strokeStyle = inks.ink;
      context.setLineDash([4, 3]);
      context.strokeRect(Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0));
      context.setLineDash([]);
    }
  }

  // Where in the matrix a pointer is: fractions of the shown range, and the cell.
  at(event) {
    const edge = this.canvas.getBoundingClientRect();
    const [px, py] = [event.clientX - edge.left, event.clientY - edge.top];
    const [x, y] = [(px - this.box.left) / this.box.width, (py - this.box.top) / this.box.height];
    const { r0, r1, c0, c1 } = this.range;
    const row = Math.min(this.grid.rows.length - 1, Math.floor(r0 + y * (r1 - r0)));
    const column = Math.min(this.grid.columns.length - 1, Math.floor(c0 + x * (c1 - c0)));
    return { px, py, x, y, row, column, inside: x >= 0 && x <= 1 && y >= 0 && y <= 1 };
  }

  press(event) {
    if (!this.box || event.button > 0) return;
    const at = this.at(event);
    // At the left of the matrix is the list of queries.
    if (!at.inside) { if (at.x < 0 && at.y >= 0 && at.y <= 1) this.onChoose?.(at.row); return; }
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, at);
    this.start = { at, range: this.range, moved: false };
    if (this.pointers.size === 2) { this.pinch = null; this.brush = null; }
  }

  move(event) {
    if (!this.box) return;
    const at = this.at(event);
    if (!this.pointers.has(event.pointerId)) { this.point(at.inside ? at : null); return; }
    this.pointers.set(event.pointerId, at);
    if (this.pointers.size === 2) { this.pinched(); return; }
    if (Math.hypot(at.px - this.start.at.px, at.py - this.start.at.py) > 4) this.start.moved = true;
    if (!this.start.moved) return;
    if (this.mode === 'pan') {
      const { r0, r1, c0, c1 } = this.start.range;
      const [rows, columns] = [((this.start.at.py - at.py) / this.box.height) * (r1 - r0), ((this.start.at.px - at.px) / this.box.width) * (c1 - c0)];
      this.show({ r0: r0 + rows, r1: r1 + rows, c0: c0 + columns, c1: c1 + columns });
    } else {
      const within = (value, low, size) => Math.max(low, Math.min(low + size, value));
      this.brush = { x0: this.start.at.px, y0: this.start.at.py, x1: within(at.px, this.box.left, this.box.width), y1: within(at.py, this.box.top, this.box.height) };
      this.draw();
    }
  }

  // Two fingers: the cells under them stay under them.
  pinched() {
    const [one, two] = [...this.pointers.values()];
    const now = { size: Math.max(20, Math.hypot(one.px - two.px, one.py - two.py)), px: (one.px + two.px) / 2, py: (one.py + two.py) / 2 };
    if (this.pinch) {
      this.zoom(this.pinch.size / now.size, (now.px - this.box.left) / this.box.width, (now.py - this.box.top) / this.box.height);
      this.pan(((this.pinch.py - now.py) / this.box.height) * (this.range.r1 - this.range.r0), ((this.pinch.px - now.px) / this.box.width) * (this.range.c1 - this.range.c0));
    }
    this.pinch = now;
    this.start.moved = true;
  }

  release(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    this.pinch = null;
    if (this.pointers.size) { this.start = { at: [...this.pointers.values()][0], range: this.range, moved: true }; return; }
    const { brush, start } = this;
    this.brush = null;
    if (brush && event.type !== 'pointercancel') this.brushed(brush);
    else if (!start.moved) {
      this.cursor = { row: start.at.row, column: start.at.column };
      this.onChoose?.(start.at.row);
    }
    this.draw();
  }

  // A brush that is thin one way zooms only the other way.
  brushed({ x0, y0, x1, y1 }) {
    const { r0, r1, c0, c1 } = this.range;
    const range = { r0, r1, c0, c1 };
    const column = (x) => c0 + ((x - this.box.left) / this.box.width) * (c1 - c0);
    const row = (y) => r0 + ((y - this.box.top) / this.box.height) * (r1 - r0);
    if (Math.abs(x1 - x0) > 6) Object.assign(range, { c0: Math.floor(column(Math.min(x0, x1))), c1: Math.ceil(column(Math.max(x0, x1))) });
    if (Math.abs(y1 - y0) > 6) Object.assign(range, { r0: Math.floor(row(Math.min(y0, y1))), r1: Math.ceil(row(Math.max(y0, y1))) });
    this.show(range);
  }

  leave(event) { if (!this.pointers.has(event.pointerId)) this.point(null); }

  // The page scrolls over a matrix that nobody works in; with focus, or with Control, the wheel zooms.
  wheel(event) {
    if (!this.box || !(event.ctrlKey || event.metaKey || document.activeElement === this.canvas)) return;
    const at = this.at(event);
    if (!at.inside) return;
    event.preventDefault();
    this.zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY * (event.deltaMode ? 16 : 1))) * 0.006), at.x, at.y);
  }

  point(at) {
    const before = this.cursor;
    this.cursor = at ? { row: at.row, column: at.column } : null;
    if (before?.row === this.cursor?.row && before?.column === this.cursor?.column) return;
    this.onCell?.(this.cursor);
    this.draw();
  }

  type(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { row, column } = this.cursor ?? { row: Math.max(0, this.query), column: Math.max(0, this.grid.selected[Math.max(0, this.query)]) };
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -1e9], End: [0, 1e9] };
    const acts = { '+': () => this.zoom(0.7), '=': () => this.zoom(0.7), '-': () => this.zoom(1 / 0.7), 0: () => this.show(this.whole()),
      Enter: () => this.onChoose?.(row), ' ': () => this.onChoose?.(row), Escape: () => this.point(null) };
    if (!(event.key in steps) && !(event.key in acts)) return;
    event.preventDefault();
    event.stopPropagation();
    if (acts[event.key]) { acts[event.key](); return; }
    const [down, right] = this.cursor ? steps[event.key] : [0, 0];
    const limit = (value, length) => Math.max(0, Math.min(length - 1, value));
    this.point({ row: limit(row + down, this.grid.rows.length), column: limit(column + right, this.grid.columns.length) });
    this.follow();
    announce(this.reading());
  }

  // The range moves along with the keyboard.
  follow() {
    const { r0, r1, c0, c1 } = this.range;
    const shift = (at, low, high) => (at < low ? at - low : Math.max(0, at + 1 - high));
    const [rows, columns] = [shift(this.cursor.row, r0, r1), shift(this.cursor.column, c0, c1)];
    if (rows || columns) this.pan(rows, columns);
  }

  reading(cell = this.cursor) {
    if (!cell) return '';
    const { rows, columns, weights, selected, support } = this.grid;
    const at = cell.row * columns.length + cell.column;
    const marks = [selected[cell.row] === cell.column && 'selected', support?.[at] && 'support token'].filter(Boolean);
    return `query ${headToken(rows[cell.row])}, key ${headToken(columns[cell.column])}: weight ${headWeight(weights[at])}${marks.length ? `, ${marks.join(', ')}` : ''}`;
  }

  // What is shown, at twice the size and on white.
  savePng(part) {
    onLightStage((stage) => {
      const canvas = el('canvas', { width: this.width * 2, height: this.box.total * 2 });
      const context = canvas.getContext('2d');
      context.fillStyle = '#fff';
      context.fillRect(0, 0, canvas.width, canvas.height);
      this.paint(context, { box: this.box, ratio: 2, inks: headInks(stage), picture: matrixPicture(this.grid, this.scale, weightColours(false)), live: false });
      savePng(canvas, part);
    });
  }

  dispose() {
    this.observer.disconnect();
    cancelAnimationFrame(this.frame);
  }
}
