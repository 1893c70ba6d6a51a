// Tables of heads: sorted by any column, filtered by words, kinds and numbers, exported as they are shown.
const tableOrder = new Intl.Collator('en', { numeric: true });
const ROWS_AT_ONCE = 400;

// columns: {key, name, value(row), cell(row)?, number?, digits(row)?, title(row)?, exported: [[name, value(row)], ...]?}
class HeadTable {
  constructor({ id, noun, columns, rows, text, filters = [], sort, descending = false, mark = null, file }) {
    Object.assign(this, { id, noun, columns, rows, text, filters, key: sort, descending, mark, file, find: '', all: false, number: { key: '', least: true, value: null } });
    this.counted = el('p', { class: 'count', id: `${id}-count`, role: 'status' });
    this.head = el('tr', { role: 'row' });
    this.body = el('tbody', { role: 'rowgroup' });
    this.more = el('p', { class: 'pager' });
    const table = el('table', { class: 'head-table', id, role: 'table', 'aria-labelledby': 'view-title' }, el('thead', { role: 'rowgroup' }, this.head), this.body);
    this.node = el('div', {}, this.tools(), this.counted, el('div', { class: 'scroller', role: 'region', 'aria-label': `Table of ${noun}s`, tabindex: '0' }, table), this.more);
    this.draw();
  }

  tools() {
    const choices = this.filters.map((filter) => {
      const values = [...new Set(this.rows.map(filter.value))].sort(tableOrder.compare);
      const entries = [['', 'all'], ...values.map((value, i) => [String(i), value])];
      filter.chosen = null;
      return values.length > 1 ? labelled(filter.name, picker(`${this.id}-${filter.key}`, entries, '', (i) => {
        filter.chosen = i === '' ? null : values[Number(i)];
        this.draw();
      })) : null;
    });
    return el(
      'div', { class: 'tools' },
      labelled('Find', el('input', { type: 'search', id: `${this.id}-find`, input: (event) => { this.find = event.target.value.toLowerCase().trim(); this.draw(); } }), 'grow'),
      ...choices, this.numberFilter(),
      el('button', { type: 'button', id: `${this.id}-csv`, click: () => this.export() }, 'CSV ↓'),
    );
  }

  numberFilter() {
    const change = () => { this.number = { key: which.value, least: side.value === 'least', value: limit.value === '' ? null : Number(limit.value) }; this.draw(); };
    const numbers = this.columns.filter(({ number }) => number).map(({ key, name }) => [key, name]);
    const which = fill(picker(`${this.id}-number`, [['', 'any'], ...numbers], '', change), { 'aria-label': 'Number to filter by' }, []);
    const side = fill(picker(`${this.id}-side`, [['least', '≥'], ['most', '≤']], 'least', change), { 'aria-label': 'At least or at most' }, []);
    const limit = el('input', { type: 'number', step: 'any', id: `${this.id}-limit`, 'aria-label': 'Limit', placeholder: '0.5', input: change });
    return el('fieldset', { class: 'number-filter' }, el('legend', {}, 'Number'), which, side, limit);
  }

  column(key) { return this.columns.find((column) => column.key === key); }

  matches(row) {
    if (this.filters.some(({ chosen, value }) => chosen !== null && value(row) !== chosen)) return false;
    const { key, least, value: limit } = this.number;
    if (key !== '' && limit !== null) {
      const value = this.column(key).value(row);
      if (value === null || (least ? value < limit : value > limit)) return false;
    }
    return !this.find || this.text(row).toLowerCase().includes(this.find);
  }

  chosen() {
    const { value } = this.column(this.key);
    const found = this.rows.map((row, i) => [row, i, value(row)]).filter(([row]) => this.matches(row));
    found.sort(([, i, a], [, j, b]) => {
      // What is not known comes last in both orders.
      if (a === null || b === null) return (a === null) - (b === null) || i - j;
      const order = typeof a === 'number' && typeof b === 'number' ? a - b : tableOrder.compare(String(a), String(b));
      return (this.descending ? -order : order) || i - j;
    });
    return found.map(([row]) => row);
  }

  sortBy(column) {
    // Numbers begin with the largest, names with the first.
    this.descending = this.key === column.key ? !this.descending : Boolean(column.number);
    this.key = column.key;
    this.draw();
    this.head.querySelector(`[data-key="${CSS.escape(column.key)}"]`)?.focus({ preventScroll: true });
  }

  header(column) {
    const active = column.key === this.key;
    const sign = active ? (this.descending ? '▼' : '▲') : '↕';
    const order = active && (this.descending ? 'descending' : 'ascending');
    return el('th', { role: 'columnheader', scope: 'col', class: column.number && 'figure', 'aria-sort': order, title: column.hint },
      el('button', { type: 'button', 'data-key': column.key, click: () => this.sortBy(column) }, column.name, el('span', { class: 'sign', 'aria-hidden': 'true' }, sign)));
  }

  row(row) {
    return el('tr', { role: 'row', class: this.mark?.(row) && 'marked' }, ...this.columns.map((column, i) => el(
      i ? 'td' : 'th', { role: i ? 'cell' : 'rowheader', scope: i ? null : 'row', class: column.number && 'figure', title: column.title?.(row), 'data-name': column.name },
      column.cell ? column.cell(row) : showNumber(column.value(row), column.measure),
    )));
  }

  draw() {
    tooltip.hide();
    const found = this.chosen();
    const shown = this.all ? found : found.slice(0, ROWS_AT_ONCE);
    this.head.replaceChildren(...this.columns.map((column) => this.header(column)));
    this.body.replaceChildren(...shown.map((row) => this.row(row)));
    const all = found.length === this.rows.length ? '' : ` (${count(this.rows.length)} in all)`;
    this.counted.textContent = found.length ? `${plural(found.length, this.noun)}${all}.` : `No ${this.noun} matches${all}.`;
    const whole = el('button', { type: 'button', click: () => { this.all = true; this.draw(); } }, `Show all ${count(found.length)}`);
    this.more.replaceChildren(...(shown.length < found.length ? [whole] : []));
  }

  export() {
    const parts = this.columns.flatMap((column) => column.exported ?? [[column.name, column.value]]);
    saveCsv([parts.map(([name]) => name), ...this.chosen().map((row) => parts.map(([, value]) => value(row)))], this.file);
  }
}

function measureColumn(atlas, measure) {
  const part = (name) => (head) => atlas.estimate(head, measure.key)?.[name] ?? null;
  return {
    key: measure.key, name: measureLabel(measure), hint: measure.explanation, number: true, measure, value: part('mean'),
    title: (head) => {
      const { low = null, high = null } = atlas.estimate(head, measure.key) ?? {};
      return low === null ? null : `95 % interval ${showNumber(low, measure)} to ${showNumber(high, measure)}`;
    },
    exported: ['mean', 'low', 'high', 'n'].map((name) => [name === 'mean' ? measure.key : `${measure.key}.${name}`, part(name)]),
  };
}

// The solution that correlations, support tokens and twins refer to.
function mainSolution(atlas, head) {
  const { primary } = atlas.meta;
  return head.solutions.find(({ space, norm }) => space === primary?.space && norm === primary?.norm) ?? head.solutions[0] ?? null;
}

const topTokens = (head) => head.top_tokens.map(([token]) => token).join(' ');
const firstTokens = (head) => head.top_tokens.slice(0, 3).map(([token]) => token.trim() || '␣').join(' · ');
const nameOfKind = (head) => kindName(head.head_kind);

function headColumns(atlas) {
  const several = new Set(atlas.heads.map(({ kind }) => kind)).size > 1;
  const main = (name) => (head) => { const value = mainSolution(atlas, head)?.[name]; return typeof value === 'number' || typeof value === 'string' ? value : null; };
  const known = new Set(knownMeasures(atlas).map(({ key }) => key));
  const solved = [['status', 'Status', false], ['n_support', 'Support', true], ['rank', 'Rank', true], ['effective_rank', 'Effective rank', true]]
    .filter(([key]) => ![...known].some((name) => name === key || name.endsWith(`.${key}`)) && atlas.heads.some((head) => main(key)(head) !== null));
  return [
    {
      key: '(head)', name: 'Head', value: (head) => atlas.place.get(head.label), cell: (head) => el('a', { href: `#${head.label}` }, head.label),
      exported: [['head', ({ label }) => label], ['layer', ({ layer }) => layer], ['number', ({ head }) => head]],
    },
    ...(several ? [{ key: '(attention)', name: 'Attention', value: ({ kind }) => kind, cell: ({ kind }) => kind }] : []),
    { key: '(kind)', name: 'Kind', hint: 'The kind whose mass is most above its chance level', value: nameOfKind, cell: nameOfKind },
    ...knownMeasures(atlas).map((measure) => measureColumn(atlas, measure)),
    ...solved.map(([key, name, number]) => ({
      key: `(${key})`, name, number, hint: 'of the max-margin solution', value: main(key),
      cell: number ? null : (head) => (main(key)(head) ?? '–').toLowerCase().replaceAll('_', ' '),
    })),
    { key: '(tokens)', name: 'Selects most', value: topTokens, cell: (head) => el('bdi', { class: 'tokens-cell' }, shorten(firstTokens(head), 40) || '–') },
  ];
}

const tableChoice = { run: 0 };
function tableView() {
  const atlas = atlases[tableChoice.run];
  const table = new HeadTable({
    id: 'heads', noun: 'head', columns: headColumns(atlas), rows: atlas.heads, sort: '(head)', file: 'heads',
    text: (head) => `${head.label} ${head.kind} ${kindName(head.head_kind)} ${topTokens(head)} ${atlas.modules.get(head.module).name}`,
    filters: [
      { key: 'attention', name: 'Attention', value: ({ kind }) => kind },
      { key: 'kind', name: 'Kind of head', value: (head) => kindName(head.head_kind) },
    ],
  });
  const titles = atlases.map(({ index }) => [String(index), runTitle(index)]);
  const choose = (index) => { tableChoice.run = Number(index); showView('table'); };
  const runs = atlases.length > 1 ? labelled('Run', picker('table-run', titles, String(tableChoice.run), choose), 'run-choice') : null;
  return viewSection('All heads', ['Press a heading to sort. The CSV file holds the rows as they are shown, with the intervals.'], runs, table.node);
}
