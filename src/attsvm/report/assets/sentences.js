// The list of sentences: filtered and sorted as a whole, drawn one page at a time.
const PAGE_SIZE = 20;
const TOKENS_SHOWN = 60;
const TOKEN_LENGTH = 40;
const TEXT_LENGTH = 600;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
const STRONG = /[A-Za-z\u00c0-\u024f\u0370-\u058f\u0590-\u08ff\u0900-\u1fff\u3040-\ud7ff\ufb1d-\ufdff\ufe70-\ufefc]/;

const list = { which: data.parameterizations[0], key: 'index', descending: false, text: '', label: null, agreement: 'all', page: 0 };
const valuesOf = (i) => list.which.values[i];

function differs(i) {
  const [selected, optimal] = [valuesOf(i).selected, data.sentences[i].optimal];
  return selected === null || optimal === null ? null : selected !== optimal;
}

// What the columns hold: a value to sort by, and a cell to show.
const COLUMNS = [
  { key: 'index', name: '#', value: (i) => i, cell: (i) => count(i) },
  { key: 'label', name: 'Label', value: (i) => data.sentences[i].label, cell: (i) => el('bdi', {}, shorten(data.sentences[i].label ?? '–', 60)) },
  { key: 'sentence', name: 'Sentence' },
  { key: 'margin', name: 'Margin', hint: 'smallest margin of the solution', value: (i) => valuesOf(i).smallest_margin, number: true },
  { key: 'trained', name: 'Trained margin', hint: 'smallest margin of the trained matrix', value: (i) => valuesOf(i).smallest_trained_margin, number: true },
  { key: 'attention', name: 'Attention', hint: 'trained attention on the selected token', value: (i) => valuesOf(i).attention, number: true },
  { key: 'length', name: 'Tokens', value: (i) => data.sentences[i].n_tokens, cell: (i) => count(data.sentences[i].n_tokens), number: true },
  { key: 'differs', name: 'Optimal', hint: 'is the selected token the optimal one', value: differs, cell: (i) => ({ true: 'no', false: 'yes' }[differs(i)] ?? '–') },
];
const SORTABLE = COLUMNS.filter((column) => column.value);
const column = () => COLUMNS.find((item) => item.key === list.key);

const haystacks = [];
const haystack = (i) => (haystacks[i] ??= `${data.sentences[i].text}\n${data.sentences[i].tokens.join(' ')}`.toLowerCase());

function matches(i) {
  if (list.label !== null && data.sentences[i].label !== list.label) return false;
  if (list.agreement === 'proof' && !list.which.proof.includes(i)) return false;
  if (list.agreement === 'agree' && differs(i) !== false) return false;
  if (list.agreement === 'differ' && differs(i) !== true) return false;
  return !list.text || haystack(i).includes(list.text);
}

function compare(a, b) {
  const [left, right] = [column().value(a), column().value(b)];
  // What is not known comes last in either direction.
  if (left === null || right === null) return (left === null) - (right === null) || a - b;
  const order = typeof left === 'string' ? left.localeCompare(right) : left - right;
  return (list.descending ? -order : order) || a - b;
}

const chosen = () => data.sentences.map((_, i) => i).filter(matches).sort(compare);

function states(i, t) {
  const values = valuesOf(i);
  return [
    t === values.selected && 'selected',
    t === data.sentences[i].optimal && 'optimal',
    values.support.includes(t) && 'support',
    data.sentences[i].masked.includes(t) && 'masked',
  ].filter(Boolean);
}
const STATE_WORDS = { selected: 'selected', optimal: 'optimal', support: 'support token', masked: 'not attended' };

function tokenDetails(i, t) {
  const [sentence, values] = [data.sentences[i], valuesOf(i)];
  const words = states(i, t).map((state) => STATE_WORDS[state]);
  const margin = t === values.selected ? 'none: selected' : format(values.margins[t]);
  const trained = t === values.selected ? 'none: selected' : format(values.trained_margins[t]);
  const pairs = [['margin', margin], ['trained margin', trained], ['label score', format(sentence.scores[t])],
    ['attention', format(values.probabilities[t])], ['dual', format(values.duals[t])]];
  return [
    el('p', { class: 'tip-head' }, el('bdi', {}, shorten(sentence.tokens[t], 200)), el('span', {}, `position ${t}`)),
    words.length ? el('p', { class: 'tip-states' }, words.join(' · ')) : null,
    el('dl', {}, ...pairs.flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)])),
  ].filter(Boolean);
}

function tokenButton(i, t, tabbable) {
  const found = states(i, t);
  const text = shorten(data.sentences[i].tokens[t], TOKEN_LENGTH);
  const glyph = { selected: '◆', optimal: '★' };
  const marks = found.filter((state) => glyph[state]).map((state) => el('span', { class: 'mark', 'aria-hidden': 'true' }, glyph[state]));
  const spoken = found.length ? el('span', { class: 'unseen' }, ` (${found.map((state) => STATE_WORDS[state]).join(', ')})`) : null;
  const show = (event) => tooltip.show(event.currentTarget, tokenDetails(i, t));
  return el('button', {
    type: 'button', class: ['token', ...(data.sentences[i].joined.includes(t) ? ['joined'] : []), ...found.map((state) => `t-${state}`)].join(' '), tabindex: tabbable ? '0' : '-1', 'data-t': String(t),
    pointerenter: show, pointerleave: () => tooltip.hideSoon(), focus: show, click: show, blur: () => tooltip.hide(),
  }, ...marks, el('bdi', {}, text), spoken);
}

// Each sentence is one stop of the Tab key; the arrow keys walk along its tokens.
function walk(event) {
  const here = event.target.closest('.token');
  if (!here) return;
  const box = event.currentTarget;
  const all = [...box.querySelectorAll('.token')];
  const forward = box.dir === 'rtl' ? -1 : 1;
  const at = all.indexOf(here);
  const moves = { ArrowRight: at + forward, ArrowLeft: at - forward, Home: 0, End: all.length - 1 };
  const next = all[moves[event.key]];
  if (!next) return;
  event.preventDefault();
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function tokenRow(i, whole) {
  const { tokens, text, optimal } = data.sentences[i];
  const { selected } = valuesOf(i);
  const first = (text || tokens.filter((token) => !/^[[<].*[\]>]$/.test(token)).join(' ')).slice(0, 2000).match(STRONG);
  const box = el('div', { class: 'tokens', role: 'toolbar', 'aria-label': `Tokens of sentence ${i}`, dir: first && RIGHT_TO_LEFT.test(first[0]) ? 'rtl' : 'ltr', keydown: walk });
  const limit = whole ? tokens.length : Math.min(TOKENS_SHOWN, tokens.length);
  const home = selected !== null ? selected : 0;
  for (let t = 0; t < limit; t += 1) box.append(tokenButton(i, t, t === home));
  if (limit < tokens.length) {
    // The marked tokens are what the row is for: they show even when they come late.
    const late = [...new Set([selected, optimal])].filter((t) => t !== null && t >= limit).sort((a, b) => a - b);
    for (const t of late) box.append(el('span', { class: 'gap', 'aria-hidden': 'true' }, '…'), tokenButton(i, t, t === home));
    box.append(el('button', { type: 'button', class: 'more', click: () => box.replaceWith(tokenRow(i, true)) }, `… all ${count(tokens.length)} tokens`));
  }
  return box;
}

function textPart(i) {
  const { text } = data.sentences[i];
  if (!text) return null;
  const content = el('div', { class: 'raw', hidden: true });
  const open = el('button', { type: 'button', class: 'more', 'aria-expanded': 'false' }, 'Text');
  open.addEventListener('click', () => {
    content.hidden = !content.hidden;
    open.setAttribute('aria-expanded', String(!content.hidden));
    if (content.childElementCount) return;
    const shown = el('bdi', {}, shorten(text, TEXT_LENGTH));
    content.append(shown);
    if (text.length <= TEXT_LENGTH) return;
    const rest = el('button', { type: 'button', class: 'more' }, `Show all ${count(text.length)} characters`);
    rest.addEventListener('click', () => { shown.textContent = text; rest.remove(); });
    content.append(rest);
  });
  return el('div', { class: 'text-part' }, open, content);
}

// The same number of decimals in a column lets the eye compare.
const decimal = (value) => (value !== null && Math.abs(value) >= 0.001 && Math.abs(value) < 1000 ? value.toFixed(3).replace('-', '−') : format(value));

function row(i) {
  return el('tr', { role: 'row' }, ...COLUMNS.map((item) => {
    if (item.key === 'sentence') return el('td', { role: 'cell', class: 'c-sentence' }, tokenRow(i, false), textPart(i));
    const shown = item.cell ? item.cell(i) : decimal(item.value(i));
    const state = item.key === 'differs' && differs(i) ? ' disagrees' : '';
    return el('td', { role: 'cell', class: `c-${item.key}${item.number ? ' figure' : ''}${state}`, 'data-name': item.name }, shown);
  }));
}

function header(item) {
  const sorted = item.key === list.key;
  const order = sorted ? (list.descending ? 'descending' : 'ascending') : null;
  const sign = el('span', { class: 'sign', 'aria-hidden': 'true' }, sorted ? (list.descending ? '▼' : '▲') : '↕');
  const content = item.value ? el('button', { type: 'button', 'data-sort': item.key, title: item.hint }, item.name, sign) : item.name;
  return el('th', { role: 'columnheader', scope: 'col', class: `c-${item.key}${item.number ? ' figure' : ''}`, 'aria-sort': order }, content);
}

function sortBy(key) {
  list.descending = list.key === key && !list.descending;
  list.key = key;
  list.page = 0;
  drawList();
  document.querySelector(`[data-sort=${key}]`)?.focus();
}

function turn(page) {
  list.page = page;
  drawList();
  byId('sentence-table').scrollIntoView({ block: 'nearest' });
}

function pager(pages) {
  const button = (name, page, off) => el('button', { type: 'button', disabled: off, click: () => turn(page) }, name);
  const [first, last] = [list.page === 0, list.page >= pages - 1];
  byId('pager').hidden = pages < 2;
  byId('pager').replaceChildren(button('First', 0, first), button('Previous', list.page - 1, first),
    el('span', {}, `Page ${count(list.page + 1)} of ${count(pages)}`), button('Next', list.page + 1, last), button('Last', pages - 1, last));
}

function drawList() {
  tooltip.hide();
  const found = chosen();
  const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  list.page = Math.min(list.page, pages - 1);
  const start = list.page * PAGE_SIZE;
  const shown = found.slice(start, start + PAGE_SIZE);
  const table = byId('sentence-table');
  table.tHead.rows[0].replaceChildren(...COLUMNS.map(header));
  table.tBodies[0].replaceChildren(...shown.map(row));
  const part = found.length ? `Showing ${count(start + 1)}–${count(start + shown.length)} of ${plural(found.length, 'sentence')}` : 'No sentence matches';
  byId('sentence-count').textContent = found.length === data.sentences.length ? `${part}.` : `${part} (${count(data.sentences.length)} in all).`;
  byId('sort-key').value = list.key;
  byId('sort-direction').textContent = list.descending ? 'Descending' : 'Ascending';
  pager(pages);
}

function csv() {
  const token = (i, t) => (t === null ? null : data.sentences[i].tokens[t]);
  const head = ['index', 'label', 'n_tokens', 'optimal_index', 'optimal_token'];
  for (const { key } of data.parameterizations) {
    for (const name of ['selected_index', 'selected_token', 'smallest_margin', 'smallest_trained_margin', 'attention', 'n_support']) head.push(`${key}.${name}`);
  }
  const rows = chosen().map((i) => {
    const { label, n_tokens: length, optimal, text } = data.sentences[i];
    const parts = data.parameterizations.flatMap(({ values: all }) => {
      const values = all[i];
      return [values.selected, token(i, values.selected), values.smallest_margin, values.smallest_trained_margin, values.attention, values.support.length];
    });
    return [i, label, length, optimal, token(i, optimal), ...parts, text];
  });
  return [[...head, 'text'], ...rows].map((cells) => cells.map(field).join(',')).join('\r\n');
}

function startList() {
  if (!list.which) return;
  const change = (id, event, set) => byId(id).addEventListener(event, () => { set(byId(id).value); list.page = 0; drawList(); });
  const labels = [...new Set(data.sentences.map((sentence) => sentence.label))].filter((label) => label !== null).sort();
  byId('filter-label').append(el('option', { value: '' }, 'all labels'), ...labels.map((label, i) => el('option', { value: String(i) }, shorten(label, 40))));
  if (data.parameterizations.some((one) => one.proof.length)) byId('filter-agreement').append(el('option', { value: 'proof' }, 'in the proof of infeasibility'));
  byId('sort-key').append(...SORTABLE.map((item) => el('option', { value: item.key }, item.name === '#' ? 'Number' : item.name)));
  change('filter-text', 'input', (value) => { list.text = value.toLowerCase().trim(); });
  change('filter-label', 'change', (value) => { list.label = value === '' ? null : labels[Number(value)]; });
  change('filter-agreement', 'change', (value) => { list.agreement = value; });
  change('sort-key', 'change', (value) => { list.key = value; });
  byId('sort-direction').addEventListener('click', () => { list.descending = !list.descending; drawList(); });
  byId('csv').addEventListener('click', () => download(fileName('sentences', 'csv'), 'text/csv;charset=utf-8', `\ufeff${csv()}\r\n`));
  byId('sentence-table').tHead.addEventListener('click', (event) => {
    const button = event.target.closest('[data-sort]');
    if (button) sortBy(button.dataset.sort);
  });
  for (const radio of document.querySelectorAll('[name=parameterization]')) radio.addEventListener('change', () => choose(radio.value));
  byId('sentence-tools').hidden = byId('sentence-table').hidden = false;
  drawList();
}

function choose(key) {
  list.which = data.parameterizations.find((one) => one.key === key);
  const radio = document.querySelector(`[name=parameterization][value=${key}]`);
  if (radio) radio.checked = true;
  drawList();
}

function showProof(key) {
  list.agreement = byId('filter-agreement').value = 'proof';
  list.text = byId('filter-text').value = '';
  list.label = null;
  byId('filter-label').value = '';
  list.page = 0;
  choose(key);
  byId('sentences').scrollIntoView();
  byId('filter-agreement').focus({ preventScroll: true });
}
