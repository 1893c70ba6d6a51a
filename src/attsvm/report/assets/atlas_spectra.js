// The numbers of a head: two small charts (margins, singular values), and tables with their intervals.
const HEAD_CHART = { height: 230, left: 44, right: 14, top: 30, bottom: 40 };
const HEAD_SERIES = ['hd-s-own', 'hd-s-1', 'hd-s-2', 'hd-s-3', 'hd-s-4'];

function headTicks(low, high, wanted) {
  const raw = (high - low || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(Number((i * step).toPrecision(10)));
  return ticks;
}

// Frame, ticks and the names of both axes; returns where values go.
function headAxes(width, { x, y, xTitle, yTitle, xTicks, yTicks, yPlace, yText = format, extra = 0 }) {
  const { left, right, bottom } = HEAD_CHART;
  const [height, top] = [HEAD_CHART.height + extra, HEAD_CHART.top + extra];
  const place = {
    x: (value) => left + ((value - x[0]) / (x[1] - x[0] || 1)) * (width - left - right),
    y: (value) => height - bottom - (yPlace ? yPlace(value) : (value - y[0]) / (y[1] - y[0] || 1)) * (height - top - bottom),
  };
  const group = svgEl('g', {});
  for (const tick of yTicks ?? headTicks(y[0], y[1], 4)) {
    group.append(svgEl('line', { class: 'hd-grid', x1: left, x2: width - right, y1: place.y(tick), y2: place.y(tick) }),
      svgEl('text', { x: left - 7, y: place.y(tick) + 4, 'text-anchor': 'end' }, yText(tick)));
  }
  for (const tick of xTicks ?? headTicks(x[0], x[1], Math.max(2, width / 80))) {
    group.append(svgEl('line', { class: 'hd-axis', x1: place.x(tick), x2: place.x(tick), y1: height - bottom, y2: height - bottom + 4 }),
      svgEl('text', { x: place.x(tick), y: height - bottom + 17, 'text-anchor': 'middle' }, format(tick)));
  }
  group.append(svgEl('line', { class: 'hd-axis', x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    svgEl('text', { x: width - right, y: height - 6, 'text-anchor': 'end' }, xTitle), svgEl('text', { x: 0, y: 13 + extra }, yTitle));
  return { group, place };
}

// A chart that is drawn again when its width changes, with a button that saves it.
class HeadChart {
  constructor({ title, part, explained, draw, tools = [] }) {
    Object.assign(this, { title, drawing: draw, width: 0 });
    this.plot = el('div', { class: 'hd-plot' });
    this.summary = el('p', { class: 'hd-note' });
    this.node = el('figure', { class: 'hd-chart' },
      el('figcaption', {}, el('h4', {}, title), explained ? el('p', { class: 'hd-note' }, explained) : null),
      this.plot, this.summary,
      el('div', { class: 'hd-tools' }, ...tools, exportButton('SVG', `Save the chart “${title}” as SVG`, () => { const svg = this.plot.querySelector('svg'); if (svg) saveSvg(svg, part, title); })));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.plot);
  }

  draw(again = false) {
    // The width is asked for only when it may have changed: the answer waits for the whole page to be laid out.
    const width = again && this.width ? this.width : Math.floor(this.plot.clientWidth);
    if (!width || (width === this.width && !again)) return;
    this.width = width;
    const { nodes, summary, extra = 0 } = this.drawing(width);
    const height = HEAD_CHART.height + extra;
    this.summary.textContent = summary;
    this.plot.replaceChildren(svgEl('svg', { class: 'hd-chart-svg', width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${this.title}. ${summary}` }, ...nodes));
  }

  dispose() { this.observer.disconnect(); }
}

// Bins of round width that hold all values.
function headBins(values, wanted = 24) {
  const sorted = [...values].filter(Number.isFinite).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const [low, high] = [Math.min(0, sorted[0]), sorted[sorted.length - 1]];
  const ticks = headTicks(low, high > low ? high : low + 1, wanted);
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
  const first = Math.floor(low / step + 1e-9) * step;
  const counts = new Array(Math.floor((high - first) / step + 1e-9) + 1).fill(0);
  for (const value of sorted) counts[Math.min(counts.length - 1, Math.floor((value - first) / step + 1e-9))] += 1;
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  return { first, step, counts, median, n: sorted.length, smallest: sorted[0], largest: high };
}

function marginDrawing(margins, chosen) {
  return (width) => {
    const bins = headBins(margins());
    if (!bins) return { nodes: [], summary: 'No query of this text has two keys to choose from, so there is no margin.' };
    const { first, step, counts, median, n } = bins;
    const { group, place } = headAxes(width, { x: [first, first + step * counts.length], y: [0, Math.max(...counts) * 1.05], xTitle: 'logit margin', yTitle: 'queries' });
    const bars = counts.map((number, i) => (number === 0 ? null : svgEl('rect', {
      class: 'hd-bin', x: place.x(first + i * step) + 0.5, y: place.y(number), width: Math.max(1, place.x(step) - place.x(0) - 1), height: place.y(0) - place.y(number),
    }, svgEl('title', {}, `${format(first + i * step)} to ${format(first + (i + 1) * step)}: ${plural(number, 'query').replace('querys', 'queries')}`))));
    const rule = (value, kind) => svgEl('line', { class: `hd-rule ${kind}`, x1: place.x(value), x2: place.x(value), y1: place.y(0), y2: HEAD_CHART.top - 4 });
    const own = chosen();
    return {
      nodes: [group, ...bars.filter(Boolean), rule(median, ''), Number.isFinite(own) ? rule(own, 'hd-rule-own') : null].filter(Boolean),
      summary: `${count(n)} margins from ${format(bins.smallest, 3)} to ${format(bins.largest, 3)}, median ${format(median, 3)} (dashed)${Number.isFinite(own) ? `; the chosen query has ${format(own, 3)} (solid)` : ''}.`,
    };
  };
}

const SPECTRUM_FLOOR = 1e-4;
function spectrumDrawing(spectra, names, state) {
  return (width) => {
    const keys = Object.keys(spectra).filter((key) => spectra[key]?.length);
    if (!keys.length) return { nodes: [], summary: 'No singular values were recorded for this head.' };
    const longest = Math.max(...keys.map((key) => spectra[key].length));
    const { log } = state;
    const extra = 17 * keys.length + 8;
    const { group, place } = headAxes(width, {
      x: [1, Math.max(2, longest)], y: [0, 1], extra, xTitle: 'singular value, by rank', yTitle: 'size, largest = 1',
      ...(log ? { yPlace: (value) => 1 - Math.log10(Math.max(SPECTRUM_FLOOR, value)) / Math.log10(SPECTRUM_FLOOR), yTicks: [1e-4, 1e-3, 0.01, 0.1, 1], yText: String } : {}),
    });
    const lines = keys.map((key, at) => {
      const points = spectra[key].map((value, i) => `${place.x(i + 1).toFixed(1)},${place.y(Math.max(log ? SPECTRUM_FLOOR : 0, value)).toFixed(1)}`);
      // A single value would be a line of no length.
      if (points.length === 1) points.push(points[0].replace(/^[\d.]+/, (x) => String(Number(x) + 3)));
      return svgEl('polyline', { class: `hd-series ${HEAD_SERIES[at % HEAD_SERIES.length]}`, points: points.join(' ') });
    });
    return { extra, nodes: [group, ...lines, spectrumKey(keys, names)], summary: keys.map((key) => `${names(key)}: ${count(headEffective(spectra[key]))} values carry 90 % of the squares`).join('; ').concat('.') };
  };
}

// How many of the largest values hold 90 % of the sum of squares.
function headEffective(values) {
  const total = values.reduce((sum, value) => sum + value * value, 0);
  let [sum, i] = [0, 0];
  while (i < values.length && sum < 0.9 * total) { sum += values[i] ** 2; i += 1; }
  return i;
}

function spectrumKey(keys, names) {
  return svgEl('g', {}, ...keys.flatMap((key, at) => [
    svgEl('line', { class: `hd-series ${HEAD_SERIES[at % HEAD_SERIES.length]}`, x1: 0, x2: 26, y1: 9 + at * 17, y2: 9 + at * 17 }),
    svgEl('text', { class: 'hd-key', x: 33, y: 13 + at * 17 }, names(key))]));
}

const headSeriesName = (atlas, key) => {
  if (key === 'own') return 'the head itself';
  const named = atlas.meta.solution_names.find(({ space, norm }) => `${space}.${norm}` === key);
  return named ? named.title : key;
};

function headToggle(label, on, then) {
  const button = el('button', { type: 'button', class: 'quiet hd-toggle', 'aria-pressed': String(on), click: () => {
    const now = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', String(now));
    then(now);
  } }, label);
  return button;
}

let headSwitches = 0;
function headSwitch(title, entries, value, then) {
  headSwitches += 1;
  const name = `hd-switch-${headSwitches}`;
  return el('fieldset', { class: 'switch' }, el('legend', {}, title), ...entries.map(([key, text]) => el('label', {}, el('input', { type: 'radio', name, value: key, checked: key === value, change: () => then(key) }), el('span', {}, text))));
}

// The strongest keys of one query, with bars; a click finds the key in the text.
function headStrongest(grid, i, find, wanted = 5) {
  const width = grid.columns.length;
  const found = strongestLines(grid, i, i + 1, wanted);
  return found.map(({ j, weight }) => {
    const bar = el('i', { class: 'hd-share', 'aria-hidden': 'true' });
    bar.style.width = `${(100 * weight).toFixed(1)}%`;
    const marks = [grid.selected[i] === j && 'selected', grid.support?.[i * width + j] && 'support'].filter(Boolean).join(', ');
    const name = el('button', { type: 'button', class: 'hd-top-name', title: 'Find it in the text', click: () => find(j) }, el('bdi', {}, shorten(grid.columns[j].label.trim() || '␣', 40)), el('small', {}, ` ${grid.columns[j].at}${marks ? ` · ${marks}` : ''}`));
    return el('li', {}, name, el('span', { class: 'hd-track' }, bar), el('span', { class: 'hd-number' }, headWeight(weight)));
  });
}

// A mean with its interval on a line from 0 to 1.
function headInterval({ mean, low, high }) {
  const x = (value) => 4 + 92 * Math.max(0, Math.min(1, value));
  return svgEl('svg', { class: 'hd-interval', width: 100, height: 14, viewBox: '0 0 100 14', 'aria-hidden': 'true' }, svgEl('line', { class: 'hd-axis', x1: 4, x2: 96, y1: 7, y2: 7 }),
    low === null || high === null ? null : svgEl('line', { class: 'hd-range', x1: x(low), x2: x(high), y1: 7, y2: 7 }), svgEl('circle', { class: 'hd-mean', cx: x(mean), cy: 7, r: 3 }));
}

function headTable(title, part, columns, rows, csv, note) {
  const cell = (value, i) => el(i ? 'td' : 'th', i ? {} : { scope: 'row' }, ...(Array.isArray(value) ? value : [value]));
  return el('div', { class: `hd-table hd-table-${part.split('-').at(-1)}` }, el('div', { class: 'hd-pane-head' }, el('h4', {}, title), exportButton('CSV', `Save the table “${title}” as CSV`, () => saveCsv(csv(), part))), note ? el('p', { class: 'hd-note' }, note) : null,
    el('div', { class: 'wide', role: 'region', tabindex: '0', 'aria-label': title }, el('table', { class: 'plain' }, el('thead', {}, el('tr', {}, ...columns.map((name) => el('th', { scope: 'col' }, name)))), el('tbody', {}, ...rows.map((row) => el('tr', {}, ...row.map(cell)))))));
}

function headValues(atlas, head) {
  const { measures } = atlas.meta;
  const unit = (measure) => (measure.unit && !measure.title.toLowerCase().includes(measure.unit) ? ` (${measure.unit})` : '');
  const rows = measures.map((measure) => {
    const value = head.values[measure.key];
    const name = el('span', { title: measure.explanation }, `${measure.title}${unit(measure)}`);
    if (!value || value.mean === null) return [name, '–', '', '', ''];
    const known = value.low !== null && value.low !== undefined && value.high !== null && value.high !== undefined;
    return [name, format(value.mean, 3), known ? el('span', { class: 'hd-nowrap' }, `${format(value.low, 3)} to ${format(value.high, 3)}`) : '–', measure.scale === '0-1' ? [headInterval(value)] : '', value.n === null || value.n === undefined ? '' : count(value.n)];
  });
  const csv = () => [['measure', 'mean', 'low', 'high', 'n', 'unit'], ...measures.map(({ key, unit: of }) => { const value = head.values[key]; return [key, value?.mean, value?.low, value?.high, value?.n, of]; })];
  return headTable('Values over the corpus', `${head.label}-values`, ['Measure', 'Mean', '95 % interval', 'from 0 to 1', 'n'], rows, csv);
}

const HEAD_SOLUTION_ROWS = [
  ['status', 'Status', (value) => String(value).replaceAll('_', ' ')], ['gap', 'Duality gap'], ['size', 'Norm of the solution'], ['correlation', 'Correlation with the head'], ['null_correlation', 'the same for a random matrix\'s selections'],
  ['recovery', 'Correlation of a random matrix with its own'], ['heldout', 'Held-out agreement'], ['heldout_n', 'Held-out queries'], ['n_queries', 'Queries'], ['n_constraints', 'Constraints'], ['n_support', 'Support tokens'],
  ['rank', 'Rank'], ['effective_rank', 'Effective rank'], ['own_rank', 'Rank of the head'], ['own_effective_rank', 'Effective rank of the head'], ['seconds', 'Seconds'], ['note', 'Note', String],
];
function headSolutions(atlas, head) {
  const solutions = head.solutions ?? [];
  if (!solutions.length) return el('p', { class: 'notice' }, 'No max-margin solution was computed for this head.');
  const { primary } = atlas.meta;
  const names = solutions.map(({ space, norm }) => headSeriesName(atlas, `${space}.${norm}`) + (primary && primary.space === space && primary.norm === norm ? ' (main)' : ''));
  const known = (value) => value !== null && value !== undefined && value !== '';
  const shown = HEAD_SOLUTION_ROWS.filter(([key]) => solutions.some((one) => known(one[key])));
  const rows = shown.map(([key, title, text]) => [title, ...solutions.map((one) => (!known(one[key]) ? '–' : text ? text(one[key]) : Number.isInteger(one[key]) ? count(one[key]) : format(one[key], 3)))]);
  const csv = () => [['property', ...solutions.map(({ space, norm }) => `${space}.${norm}`)], ...HEAD_SOLUTION_ROWS.map(([key]) => [key, ...solutions.map((one) => one[key])])];
  const why = atlas.meta.modules.find(({ index }) => index === head.module)?.residual;
  const note = [primary?.why ? `Main solution: ${primary.why}.` : '', why ? `No residual space: ${why}.` : ''].filter(Boolean).join(' ').replaceAll('..', '.');
  return headTable('Max-margin solutions', `${head.label}-solutions`, ['', ...names], rows, csv, note);
}

function headTopTokens(head) {
  const largest = Math.max(1e-9, ...head.top_tokens.map(([, share]) => share));
  const rows = head.top_tokens.map(([token, share]) => {
    const bar = el('i', { class: 'hd-share', 'aria-hidden': 'true' });
    bar.style.width = `${((100 * share) / largest).toFixed(1)}%`;
    return [el('bdi', { class: 'hd-top-token' }, shorten(token, 40) || '␣'), `${format(100 * share, 3)} %`, el('span', { class: 'hd-track' }, bar)];
  });
  return headTable('Tokens that it selects most', `${head.label}-tokens`, ['Token', 'Share of the selections', ''], rows, () => [['token', 'share'], ...head.top_tokens]);
}

function headSoft(head) {
  const rows = Object.entries(head.soft).filter(([, value]) => value !== null && typeof value !== 'object').map(([key, value]) => [key.replaceAll('_', ' '), typeof value === 'number' ? format(value, 3) : String(value)]);
  return headTable('Finite and directional part', `${head.label}-soft`, ['', 'Value'], rows, () => [['property', 'value'], ...Object.entries(head.soft)], 'For a head that spreads its weight: the part of its matrix that stays finite, and the direction of the part that grows.');
}

function headNumbers(atlas, head) {
  return el('div', { class: 'hd-part' }, el('h3', {}, 'Numbers'), el('div', { class: 'hd-pair' }, headValues(atlas, head),
    el('div', {}, headSolutions(atlas, head), head.top_tokens?.length ? headTopTokens(head) : null, head.soft ? headSoft(head) : null)));
}
