// The map: every head as a cell of its layer, coloured by one measure. Also the colours and words that all views use.
const VIRIDIS = ['440154', '482475', '414487', '355f8d', '2a788e', '21918c', '22a884', '44bf70', '7ad151', 'bddf26', 'fde725'];
const CONTRAST = ['0b3c72', '2f6ea5', '77a6cd', 'c3d6e6', 'f3f1ee', 'eccfb2', 'd99a5b', 'b3652a', '6f3609'];
const KIND_COLOURS = ['0072b2', 'e69f00', '009e73', 'cc79a7', '56b4e9', 'd55e00', 'f0e442', '7a5195', '8c6d31', '5f7f8f'];
const hexRgb = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
const rgbText = (rgb) => `rgb(${rgb.map(Math.round).join(' ')})`;
const NO_COLOUR = null;

function along(stops, t) {
  const at = Math.min(1, Math.max(0, t)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(at));
  const [a, b] = [hexRgb(stops[low]), hexRgb(stops[low + 1])];
  return a.map((part, i) => part + (b[i] - part) * (at - low));
}
function viridisRgb(t) { return along(VIRIDIS, t); }
function viridis(t) { return rgbText(viridisRgb(t)); }
// From -1 to 1; 0 is neutral.
function divergingRgb(t) { return along(CONTRAST, (t + 1) / 2); }
function diverging(t) { return rgbText(divergingRgb(t)); }
// Black or white, whichever is easier to read on a colour.
function inkOn(rgb) {
  const [r, g, b] = rgb.map((part) => { const c = part / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? '#000' : '#fff';
}

const KIND_NAMES = { encoder: 'Encoder', decoder: 'Decoder', cross: 'Cross-attention' };
const UNNAMED = new Set(['', 'none', 'mixed']);
const kindName = (kind) => (kind === '' || kind === 'none' ? 'no known kind' : kind.replaceAll('_', ' '));
const UNIT_SCALE = '0-1';

function showNumber(value, measure) {
  if (value === null || value === undefined) return '–';
  if (measure?.scale === UNIT_SCALE && (Math.abs(value) >= 0.001 || value === 0)) return value.toFixed(3).replace('-', '−');
  return format(value, Math.abs(value) >= 100 ? 4 : 3);
}
function showEstimate(estimate, measure) {
  if (!estimate || estimate.mean === null) return '–';
  const { mean, low, high } = estimate;
  const known = low !== null && high !== null;
  return showNumber(mean, measure) + (known ? ` (${showNumber(low, measure)} to ${showNumber(high, measure)})` : '');
}
function measureLabel({ title, unit, scale }) {
  const told = !unit || scale === UNIT_SCALE || title.toLowerCase().includes(unit.toLowerCase());
  return told ? title : `${title} (${unit})`;
}
const knownMeasures = (atlas) => atlas.meta.measures.filter(({ key }) => atlas.heads.some((head) => atlas.value(head, key) !== null));

// Parts of a page that many views have.
const definitions = (pairs) => el('dl', {}, ...pairs.flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)]));
const labelled = (name, control, more = '') => el('label', { class: `field ${more}` }, name, control);
function picker(id, entries, chosen, change) {
  const options = entries.map(([value, name]) => el('option', { value, selected: value === chosen }, name));
  return el('select', { id, change: (event) => change(event.target.value) }, ...options);
}
function viewSection(title, intro, ...content) {
  return el('section', { 'aria-labelledby': 'view-title' }, el('h2', { id: 'view-title', tabindex: '-1' }, title), el('p', { class: 'intro' }, ...intro), ...content);
}

function extent(values) {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  return known.length ? [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))] : null;
}

// Every kind of head has its colour, the most frequent first; heads without a known kind have none.
function kindPalette(heads) {
  const counts = new Map();
  for (const { head_kind: kind } of heads) counts.set(kind, (counts.get(kind) ?? 0) + 1);
  const named = [...counts].filter(([kind]) => !UNNAMED.has(kind)).sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  const colours = new Map(named.map(([kind], i) => [kind, i < KIND_COLOURS.length ? hexRgb(KIND_COLOURS[i]) : [128, 128, 128]]));
  return { colours, named };
}

function headTip(atlas, head, measure, more = []) {
  const estimate = measure ? atlas.estimate(head, measure.key) : null;
  const pairs = [
    ...(measure ? [[measure.title, showNumber(estimate?.mean ?? null, measure)]] : []),
    ...(estimate && estimate.low !== null && estimate.high !== null ? [['95 % interval', `${showNumber(estimate.low, measure)} to ${showNumber(estimate.high, measure)}`]] : []),
    ...(estimate?.n ? [['n', count(estimate.n)]] : []),
    ...more,
    ['kind', kindName(head.head_kind)],
  ];
  const tokens = head.top_tokens.slice(0, 4).flatMap(([token], i) => [i ? ' · ' : '', el('bdi', {}, shorten(token.trim() || '␣', 24))]);
  return [
    el('p', { class: 'tip-head' }, el('bdi', {}, head.label), atlases.length > 1 ? el('span', {}, shorten(atlas.name, 24)) : null),
    definitions(pairs),
    tokens.length ? el('p', { class: 'tip-states' }, 'selects ', ...tokens) : null,
  ].filter(Boolean);
}

// One grid for each kind of attention. `cell(head)` gives {rgb, text, spoken, tip, href}.
function mapGrids(atlas, cell, rowMean = null) {
  const kinds = [...new Set(atlas.meta.modules.map(({ kind }) => kind))];
  return kinds.map((kind) => {
    const heads = atlas.heads.filter((head) => head.kind === kind);
    const layers = [...new Set(heads.map(({ layer }) => layer))].sort((a, b) => a - b);
    const width = 1 + Math.max(-1, ...heads.map(({ head }) => head));
    return heads.length ? mapGrid({ title: kinds.length > 1 ? KIND_NAMES[kind] : null, kind, heads, layers, width, cell, rowMean }) : null;
  });
}

function mapGrid({ title, kind, heads, layers, width, cell, rowMean }) {
  const place = new Map(heads.map((head) => [`${head.layer}.${head.head}`, head]));
  const columns = [...Array(width).keys()];
  const rows = layers.map((layer) => el(
    'tr', { role: 'row' },
    el('th', { role: 'rowheader', scope: 'row' }, `L${layer}`),
    ...columns.map((column) => gridCell(place.get(`${layer}.${column}`), cell)),
    rowMean ? el('td', { role: 'gridcell', class: 'row-mean' }, rowMean(columns.map((column) => place.get(`${layer}.${column}`)).filter(Boolean))) : null,
  ));
  const table = el(
    'table', { class: 'head-grid', role: 'grid', 'aria-label': `${KIND_NAMES[kind]} heads: a row is a layer`, keydown: walkGrid },
    el('thead', {}, el('tr', { role: 'row' }, el('th', { role: 'columnheader' }, el('span', { class: 'unseen' }, 'Layer')),
      ...columns.map((column) => el('th', { role: 'columnheader', scope: 'col' }, `H${column}`)),
      rowMean ? el('th', { role: 'columnheader', scope: 'col', class: 'row-mean' }, 'mean') : null)),
    el('tbody', {}, ...rows),
  );
  table.style.setProperty('--columns', String(width));
  const first = table.querySelector('a');
  if (first) first.tabIndex = 0;
  return el('figure', { class: 'grid-figure', 'data-kind': kind }, title ? el('figcaption', {}, el('h3', {}, title)) : null, el('div', { class: 'wide' }, table));
}

function gridCell(head, cell) {
  if (!head) return el('td', { role: 'gridcell', class: 'absent' });
  const { rgb, text, spoken, tip, href } = cell(head);
  const show = (event) => tooltip.show(event.currentTarget, tip());
  const link = el('a', {
    href: href ?? `#${head.label}`, class: rgb === NO_COLOUR ? 'cell unknown' : 'cell', tabindex: '-1', 'aria-label': `${head.label}: ${spoken}`, 'data-head': head.label,
    pointerenter: show, pointerleave: () => tooltip.hideSoon(), focus: show, blur: () => tooltip.hide(),
  }, el('span', { 'aria-hidden': 'true' }, text));
  if (rgb !== NO_COLOUR) {
    link.style.backgroundColor = rgbText(rgb);
    link.style.color = inkOn(rgb);
  }
  return el('td', { role: 'gridcell' }, link);
}

// One stop of the Tab key for each grid; the arrow keys walk along layers and heads.
function walkGrid(event) {
  const here = event.target.closest('a.cell');
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
  const step = steps[event.key];
  if (!here || !step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const [row, column] = [here.closest('tr'), here.closest('td').cellIndex];
  const inRow = (tr) => [...tr.querySelectorAll('a.cell')];
  let next = null;
  if (Math.abs(step[1]) === Infinity) next = inRow(row).at(step[1] < 0 ? 0 : -1);
  else if (step[1]) next = inRow(row)[inRow(row).indexOf(here) + step[1]];
  else {
    const rows = [...row.parentElement.rows];
    const to = rows[rows.indexOf(row) + step[0]];
    next = to?.cells[column]?.querySelector('a.cell') ?? (to && inRow(to).at(-1));
  }
  if (!next) return;
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function colourLegend(low, high, colour, measure, middle = null) {
  const bar = el('span', { class: 'legend-bar', 'aria-hidden': 'true' });
  const stops = Array.from({ length: 21 }, (_, i) => `${rgbText(colour(i / 20))} ${5 * i}%`);
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(', ')})`;
  const ends = [low, high].map((value) => el('span', {}, showNumber(value, measure)));
  return el('p', { class: 'colour-legend' }, ends[0], bar, middle, ends[1], el('span', { class: 'legend-note' }, el('span', { class: 'swatch unknown' }), 'not defined'));
}

function kindLegend(heads, { colours, named }) {
  const unnamed = heads.some((head) => head.head_kind === 'mixed') ? 'mixed: no kind is clearly above its chance level' : 'no known kind';
  return el('ul', { class: 'kind-legend' }, ...named.map(([kind, many]) => {
    const swatch = el('span', { class: 'swatch' });
    swatch.style.backgroundColor = rgbText(colours.get(kind));
    return el('li', {}, swatch, `${kindName(kind)} (${count(many)})`);
  }), el('li', {}, el('span', { class: 'swatch unknown' }), unnamed));
}

// What colours the map: a measure, or the kinds. The choice is kept while other views are open.
const mapChoice = { key: null, scale: 'fit' };
const KINDS_KEY = '(kinds)';

function colouring(atlas, key, wanted) {
  const measure = atlas.measures.get(key);
  const scale = wanted === 'full' && measure?.scale !== UNIT_SCALE ? 'fit' : wanted;
  if (!measure) {
    const palette = kindPalette(atlas.heads);
    const cell = (head) => {
      const name = kindName(head.head_kind);
      const rgb = palette.colours.get(head.head_kind) ?? NO_COLOUR;
      return { rgb, text: rgb === NO_COLOUR ? '' : name, spoken: name, tip: () => headTip(atlas, head, null) };
    };
    return { cell, legend: kindLegend(atlas.heads, palette), rowMean: null, measure: null };
  }
  const values = atlas.heads.map((head) => atlas.value(head, key)).filter((value) => value !== null).sort((a, b) => a - b);
  const range = extent(values) ?? [0, 1];
  const [low, high] = scale === 'full' ? [Math.min(0, range[0]), Math.max(1, range[1])] : range;
  const rank = (value) => (values.indexOf(value) + values.lastIndexOf(value)) / 2 / Math.max(1, values.length - 1);
  const place = (value) => (scale === 'rank' ? rank(value) : high > low ? (value - low) / (high - low) : 0.5);
  const short = (value) => (value === null ? '' : measure.scale === UNIT_SCALE ? value.toFixed(2).replace('-', '−') : format(value, 2));
  const cell = (head) => {
    const value = atlas.value(head, key);
    const spoken = `${measure.title} ${showEstimate(atlas.estimate(head, key), measure)}, ${kindName(head.head_kind)}`;
    const rgb = value === null ? NO_COLOUR : viridisRgb(place(value));
    return { rgb, text: short(value), spoken, tip: () => headTip(atlas, head, measure) };
  };
  const rowMean = (heads) => {
    const known = heads.map((head) => atlas.value(head, key)).filter((value) => value !== null);
    return known.length ? short(known.reduce((a, b) => a + b) / known.length) : '–';
  };
  const middle = scale === 'rank' ? `by rank, median ${showNumber(values[values.length >> 1] ?? null, measure)}, up to` : null;
  return { cell, legend: colourLegend(low, high, viridisRgb, measure, middle), rowMean, measure };
}

// Measures of solutions are called <space>.<norm>.<name>.
function measureGroups(atlas, measures) {
  const groups = new Map([['Measures of the corpus', []]]);
  for (const measure of measures) {
    const solution = atlas.meta.solution_names.find(({ space, norm }) => measure.key.startsWith(`${space}.${norm}.`));
    const name = solution ? `Max-margin solution: ${solution.title}` : 'Measures of the corpus';
    groups.set(name, [...(groups.get(name) ?? []), measure]);
  }
  return [...groups].filter(([, members]) => members.length);
}

function measureSelect(id, measures, chosen, extra, change) {
  const groups = measureGroups(atlases[0], measures);
  const select = picker(id, groups.length > 1 ? [] : [...measures.map((one) => [one.key, measureLabel(one)]), ...extra], chosen, change);
  if (groups.length > 1) {
    for (const [label, members] of [...groups, ['Kinds', extra]]) {
      const entries = members.map((one) => (Array.isArray(one) ? one : [one.key, measureLabel(one)]));
      if (entries.length) select.append(el('optgroup', { label }, ...entries.map(([value, name]) => el('option', { value }, name))));
    }
    select.value = chosen;
  }
  return labelled('Colour by', select, 'grow');
}

// How close the heads come to their own main solution, where that is known.
function firstMeasure(atlas, measures) {
  const { primary } = atlas.meta;
  const close = `${primary?.space}.${primary?.norm}.correlation`;
  return (measures.find(({ key }) => key === close) ?? measures[0])?.key ?? null;
}

// Highest and lowest heads in words: the map for those who cannot see it.
function extremes(atlas, measure) {
  const ranked = atlas.heads.filter((head) => atlas.value(head, measure.key) !== null).sort((a, b) => atlas.value(b, measure.key) - atlas.value(a, measure.key));
  if (ranked.length < 2) return null;
  const part = (heads) => heads.flatMap((head, i) => [i ? ', ' : '', el('a', { href: `#${head.label}` }, head.label), ` ${showNumber(atlas.value(head, measure.key), measure)}`]);
  const many = Math.min(3, Math.floor(ranked.length / 2));
  return el('p', { class: 'extremes' }, 'Highest: ', ...part(ranked.slice(0, many)), '. Lowest: ', ...part(ranked.slice(-many).reverse()), '.');
}

function mapSvg(atlas, cell, title) {
  const [size, left, top] = [26, 40, 34];
  const parts = [svgEl('text', { x: 0, y: 12, 'font-size': 12 }, title)];
  let y = top;
  for (const kind of new Set(atlas.heads.map((head) => head.kind))) {
    const heads = atlas.heads.filter((head) => head.kind === kind);
    const layers = [...new Set(heads.map(({ layer }) => layer))].sort((a, b) => a - b);
    parts.push(svgEl('text', { x: 0, y: y - 6, 'font-size': 11 }, KIND_NAMES[kind]));
    layers.forEach((layer, row) => parts.push(svgEl('text', { x: left - 6, y: y + row * size + 17, 'font-size': 10, 'text-anchor': 'end' }, `L${layer}`)));
    for (const head of heads) {
      const { rgb, spoken } = cell(head);
      const at = { x: left + head.head * size, y: y + layers.indexOf(head.layer) * size, width: size - 1, height: size - 1 };
      const look = rgb === NO_COLOUR ? { fill: 'none', stroke: '#8a8d93' } : { fill: rgbText(rgb), stroke: 'none' };
      parts.push(svgEl('rect', { ...at, ...look }, svgEl('title', {}, `${head.label}: ${spoken}`)));
    }
    y += layers.length * size + 30;
  }
  const width = left + size * (1 + Math.max(...atlas.heads.map(({ head }) => head)));
  return svgEl('svg', { viewBox: `0 0 ${Math.max(width, 320)} ${y - 20}`, 'font-family': 'sans-serif', fill: '#1d1f23' }, ...parts);
}

function mapView() {
  const atlas = atlases[0];
  if (atlases.length > 1) return comparisonMap();
  const measures = knownMeasures(atlas);
  mapChoice.key ??= firstMeasure(atlas, measures) ?? KINDS_KEY;
  const box = el('div', { class: 'map' });
  const draw = () => {
    const { cell, legend, rowMean, measure } = colouring(atlas, mapChoice.key, mapChoice.scale);
    scaleField.hidden = !measure;
    scale.querySelector('[value=full]').disabled = measure?.scale !== UNIT_SCALE;
    const title = measure ? measureLabel(measure) : 'Kinds of heads';
    svg.onclick = () => saveSvg(mapSvg(atlas, cell, title), 'map', title);
    box.replaceChildren(...[
      el('p', { class: 'explanation' }, measure ? measure.explanation : 'The kind whose mass is most above its chance level.'),
      legend, ...mapGrids(atlas, cell, rowMean), measure && extremes(atlas, measure),
    ].filter(Boolean));
  };
  const svg = exportButton('SVG ↓', 'Download the map as SVG', null);
  const scales = [['fit', 'from lowest to highest'], ['full', 'from 0 to 1'], ['rank', 'by rank']];
  const scale = picker('map-scale', scales, mapChoice.scale, (value) => { mapChoice.scale = value; draw(); });
  const scaleField = labelled('Colours', scale);
  const tools = el(
    'div', { class: 'tools' },
    measureSelect('map-measure', measures, mapChoice.key, [[KINDS_KEY, 'Kind of head']], (key) => { mapChoice.key = key; draw(); }), scaleField, svg,
  );
  draw();
  return viewSection('Map of all heads', ['A row is a layer and a cell a head. Point at a cell for its value; open it for its page.'], tools, box);
}
