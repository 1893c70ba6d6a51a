// Charts drawn at the width they have, so that text stays readable on a phone; redrawn when that changes.
const HEIGHT = 250;
const view = { linearSteps: false };

function niceStep(span, wanted) {
  const raw = span / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].find((step) => step * power >= raw * 0.999) * power;
}

function linearScale(low, high, start, end, room = 64) {
  const place = (value) => start + ((value - low) / (high - low || 1)) * (end - start);
  const step = niceStep(high - low || 1, Math.max(2, Math.abs(end - start) / room));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return { place, ticks };
}

function logScale(low, high, start, end) {
  const [from, to] = [Math.log10(low), Math.log10(high)];
  const place = (value) => start + ((Math.log10(value) - from) / (to - from || 1)) * (end - start);
  const ticks = [];
  const decades = Math.floor(to + 1e-9) - Math.ceil(from - 1e-9) + 1;
  const every = Math.ceil(decades / (Math.abs(end - start) / 34));
  for (let power = Math.ceil(from - 1e-9); power <= to + 1e-9; power += every) ticks.push(10 ** power);
  if (ticks.length >= 2) return { place, ticks };
  return { place, ticks: linearScale(low, high, start, end).ticks.filter((tick) => tick > 0) };
}

// log(1 + step): step 0 has a place, and the early steps, where most happens, have room.
function stepScale(low, high, start, end) {
  const place = (value) => start + (Math.log1p(value - low) / Math.log1p(high - low || 1)) * (end - start);
  const candidates = [low];
  for (let power = 1; power <= high - low; power *= 10) candidates.push(low + power);
  if (high > low + 1) candidates.push(high);
  const ticks = candidates.filter((tick, i) => i === candidates.length - 1 || tick === low || Math.abs(place(high) - place(tick)) > 44);
  return { place, ticks };
}

const superscript = (power) => String(power).replace('-', '⁻').replace(/\d/g, (digit) => '⁰¹²³⁴⁵⁶⁷⁸⁹'[digit]);
function tickText(value, log) {
  if (log && value > 0 && (value < 0.01 || value >= 1e4)) {
    const power = Math.round(Math.log10(value));
    if (Math.abs(value / 10 ** power - 1) < 1e-9) return `10${superscript(power)}`;
  }
  return value >= 1000 ? count(value) : format(value);
}

function extent(values, floor) {
  const known = values.filter((value) => value !== null && value > floor);
  return known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
}

function scales(chart, box) {
  const log = chart.y_scale === 'log';
  const xs = chart.series.flatMap((series) => series.x);
  const [x0, x1] = extent(xs, -Infinity);
  let [y0, y1] = chart.y_range ?? extent(chart.series.flatMap((series) => series.y), log ? 0 : -Infinity);
  if (!chart.y_range && !log) y0 = Math.min(0, y0);
  if (!log && !chart.y_range) y1 += (y1 - y0) * 0.04 || 1;
  // A log axis over less than a decade has no ticks worth reading; whole decades do.
  if (log) [y0, y1] = [10 ** Math.floor(Math.log10(y0) + 1e-9), 10 ** Math.ceil(Math.log10(y1) - 1e-9)];
  if (log && y0 === y1) y1 *= 10;
  const steps = chart.x_scale === 'steps' && !view.linearSteps;
  return {
    x: (steps ? stepScale : linearScale)(x0, x1, box.left, box.right),
    y: (log ? logScale : linearScale)(y0, y1, box.bottom, box.top, 36),
    log,
  };
}

function axes(chart, box, scale) {
  const group = svgEl('g', { class: 'axes' });
  for (const tick of scale.y.ticks) {
    const y = scale.y.place(tick);
    group.append(
      svgEl('line', { class: 'grid', x1: box.left, x2: box.right, y1: y, y2: y }),
      svgEl('text', { x: box.left - 8, y: y + 4, 'text-anchor': 'end' }, tickText(tick, scale.log)),
    );
  }
  for (const tick of scale.x.ticks) {
    const x = scale.x.place(tick);
    group.append(
      svgEl('line', { class: 'axis', x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4 }),
      svgEl('text', { x, y: box.bottom + 18, 'text-anchor': 'middle' }, tickText(tick)),
    );
  }
  group.append(
    svgEl('line', { class: 'axis', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svgEl('text', { class: 'label', x: box.right, y: box.bottom + 35, 'text-anchor': 'end' }, chart.x_label),
    svgEl('text', { class: 'label', x: 0, y: box.top - 13 }, chart.y_label),
  );
  return group;
}

function legend(chart, width) {
  const group = svgEl('g', { class: 'legend-row' });
  let [x, y] = [0, 12];
  for (const series of chart.series) {
    const room = 30 + series.name.length * 6.9 + 14;
    if (x > 0 && x + room > width) [x, y] = [0, y + 18];
    const sample = chart.kind === 'bars'
      ? svgEl('rect', { class: `bar s-${series.style}`, x: x + 1, y: y - 9, width: 20, height: 10 })
      : svgEl('line', { class: `line s-${series.style}`, x1: x, x2: x + 24, y1: y - 4, y2: y - 4 });
    group.append(sample);
    if (chart.kind === 'points') group.append(mark(series.style, x + 12, y - 4));
    group.append(svgEl('text', { x: x + 30, y }, series.name));
    x += room;
  }
  return { group, height: y + 6 };
}

function mark(style, x, y) {
  const shapes = { fro: `M${x - 3},${y - 3}h6v6h-6z`, nuc: `M${x},${y - 4}l4,7h-8z` };
  return svgEl('path', { class: `mark-shape s-${style}`, d: shapes[style] ?? `M${x - 3},${y}a3,3 0 1 0 6,0a3,3 0 1 0 -6,0` });
}

function lines(chart, scale) {
  return chart.series.map((series) => {
    const group = svgEl('g');
    let path = '';
    let pen = 'M';
    const dots = [];
    series.y.forEach((value, i) => {
      if (value === null || (scale.log && value <= 0)) { pen = 'M'; return; }
      const [x, y] = [scale.x.place(series.x[i]), scale.y.place(value)];
      // A value between two gaps would be a line of no length; it gets a dot.
      const alone = pen === 'M' && (i + 1 === series.y.length || series.y[i + 1] === null);
      path += `${pen}${x.toFixed(1)},${y.toFixed(1)}`;
      pen = 'L';
      if (alone || (chart.kind === 'points' && series.y.length <= 48)) dots.push(mark(series.style, x, y));
    });
    group.append(svgEl('path', { class: `line s-${series.style}`, d: path }), ...dots);
    return group;
  });
}

function bars(chart, scale, box) {
  return chart.series.map((series) => {
    if (series.style !== 'trained') {
      return svgEl('g', {}, ...series.y.map((value, i) => {
        const [x0, x1] = [scale.x.place(series.x[i]), scale.x.place(series.x[i + 1])];
        const y = scale.y.place(value);
        return svgEl('rect', { class: `bar s-${series.style}`, x: x0 + 0.5, y, width: Math.max(0.5, x1 - x0 - 1), height: box.bottom - y });
      }));
    }
    let path = `M${scale.x.place(series.x[0])},${box.bottom}`;
    series.y.forEach((value, i) => { path += `V${scale.y.place(value).toFixed(1)}H${scale.x.place(series.x[i + 1]).toFixed(1)}`; });
    return svgEl('path', { class: `line s-${series.style}`, d: `${path}V${box.bottom}` });
  });
}

function draw(chart, width) {
  const key = legend(chart, width);
  const box = { left: 46, right: width - 18, top: key.height + 34, bottom: HEIGHT - 40 };
  const scale = scales(chart, box);
  const root = svgEl('svg', { class: 'chart-svg', width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: 'img', 'aria-label': `${chart.title}. ${chart.summary}` });
  root.append(key.group, axes(chart, box, scale));
  root.append(...(chart.kind === 'bars' ? bars(chart, scale, box) : lines(chart, scale)));
  if (chart.rule !== null) {
    const x = scale.x.place(chart.rule);
    root.append(svgEl('line', { class: 'rule', x1: x, x2: x, y1: box.top, y2: box.bottom }));
  }
  const cursor = svgEl('line', { class: 'cursor', y1: box.top, y2: box.bottom, visibility: 'hidden' });
  root.append(cursor);
  return { root, cursor, place: scale.x.place };
}

// Positions the cursor can stand on: recorded steps, indices, or the middle of each bin.
function stops(chart) {
  const longest = chart.series.reduce((best, series) => (series.x.length > best.x.length ? series : best)).x;
  return chart.kind === 'bars' ? longest.slice(0, -1).map((edge, i) => (edge + longest[i + 1]) / 2) : longest;
}

function reading(chart, stop, position) {
  const values = chart.series.map((series) => {
    const i = chart.kind === 'bars' ? stop : series.x.indexOf(position);
    return `${series.name} ${format(series.y[i])}`;
  });
  const edges = chart.series[0].x;
  const where = chart.kind === 'bars'
    ? `${chart.x_label} ${format(edges[stop])} to ${format(edges[stop + 1])}`
    : `${chart.x_label} ${count(position)}`;
  return `${where}: ${values.join(', ')}`;
}

function valueTable(chart) {
  const bins = chart.kind === 'bars';
  const head = el('tr', {}, el('th', { scope: 'col' }, bins ? `${chart.x_label}, from` : chart.x_label),
    ...chart.series.map((series) => el('th', { scope: 'col' }, series.name)));
  const rows = (bins ? chart.series[0].x.slice(0, -1) : stops(chart)).map((position, stop) => el('tr', {},
    el('th', { scope: 'row' }, format(position, 6)),
    ...chart.series.map((series) => el('td', {}, format(series.y[bins ? stop : series.x.indexOf(position)])))));
  return el('div', { class: 'value-table', tabindex: '0', role: 'region', 'aria-label': `Values of ${chart.title}` },
    el('table', {}, el('thead', {}, head), el('tbody', {}, ...rows)));
}

const EXPORTED = ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-family', 'font-size', 'font-style', 'font-weight'];

// The file is for papers: light colours, a fixed width, and every style written into the elements.
function exportSvg(chart) {
  const { root, cursor } = draw(chart, 560);
  cursor.remove();
  const stage = el('div', { class: 'export-stage' }, root);
  document.body.append(stage);
  for (const node of [root, ...root.querySelectorAll('*')]) {
    const style = getComputedStyle(node);
    for (const name of EXPORTED) node.setAttribute(name, style.getPropertyValue(name));
    node.removeAttribute('class');
  }
  stage.remove();
  root.prepend(svgEl('title', {}, chart.title), svgEl('desc', {}, chart.summary), svgEl('rect', { width: '100%', height: '100%', fill: '#fff' }));
  return new XMLSerializer().serializeToString(root);
}

class ChartFigure {
  constructor(figure, chart) {
    this.chart = chart;
    this.plot = figure.querySelector('.plot');
    this.readout = figure.querySelector('.readout');
    this.stops = stops(chart);
    this.stop = null;
    this.width = 0;
    fill(this.plot, {
      tabindex: '0',
      role: 'group',
      'aria-label': `${chart.title}: left and right arrow keys read the values`,
      pointermove: (event) => this.point(event),
      pointerleave: () => this.show(null),
      blur: () => this.show(null),
      keydown: (event) => this.press(event),
    }, []);
    this.readout.textContent = '';
    new ResizeObserver(() => this.resize()).observe(this.plot);
    this.resize();
    this.tools(figure);
  }

  tools(figure) {
    for (const button of figure.querySelectorAll('button')) button.hidden = false;
    figure.querySelector('[data-action=svg]').addEventListener('click', () => download(fileName(this.chart.id, 'svg'), 'image/svg+xml', exportSvg(this.chart)));
    const toggle = figure.querySelector('[data-action=table]');
    toggle.addEventListener('click', () => {
      const open = figure.querySelector('.value-table');
      if (open) open.remove();
      else figure.append(valueTable(this.chart));
      toggle.setAttribute('aria-expanded', String(!open));
    });
  }

  resize() {
    const width = Math.floor(this.plot.clientWidth);
    if (width > 0 && width !== this.width) this.redraw(width);
  }

  redraw(width = this.width) {
    this.width = width;
    this.drawn = draw(this.chart, width);
    this.plot.replaceChildren(this.drawn.root);
    this.show(this.stop);
  }

  point(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const distances = this.stops.map((position) => Math.abs(this.drawn.place(position) - x));
    this.show(distances.indexOf(Math.min(...distances)));
  }

  press(event) {
    const last = this.stops.length - 1;
    const moves = { ArrowLeft: (this.stop ?? 1) - 1, ArrowRight: (this.stop ?? -1) + 1, Home: 0, End: last };
    if (event.key === 'Escape') this.show(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.show(Math.max(0, Math.min(last, moves[event.key])));
    announce(this.readout.textContent);
  }

  show(stop) {
    this.stop = stop;
    this.readout.textContent = stop === null ? '' : reading(this.chart, stop, this.stops[stop]);
    this.drawn.cursor.setAttribute('visibility', stop === null ? 'hidden' : 'visible');
    if (stop === null) return;
    const x = this.drawn.place(this.stops[stop]);
    this.drawn.cursor.setAttribute('x1', x);
    this.drawn.cursor.setAttribute('x2', x);
  }
}
