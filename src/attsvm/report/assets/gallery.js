// Tables that can be sorted, filtered and exported. Rows that stand in the page are moved and hidden; rows that come
// as data are drawn a page at a time.
const collator = new Intl.Collator('en', { numeric: true });
const isMissing = (value) => value === null || value === undefined || value === '';

class Listing {
  // columns: {name, number}; rows: {values, node}; `node` returns the row of the table.
  constructor(id, columns, rows, filterColumn, pageSize = Infinity) {
    Object.assign(this, { id, columns, rows, filterColumn, pageSize, key: null, descending: false, find: '', filter: null, page: 0 });
    this.table = byId(id);
    this.noun = this.part('count').dataset.noun;
    this.heads = [...this.table.tHead.rows[0].cells].map((cell, index) => this.head(cell, index));
    this.choices();
    this.part('csv').addEventListener('click', () => this.export());
    this.part('direction').addEventListener('click', () => { this.descending = !this.descending; this.draw(); });
    this.part('sort').addEventListener('change', (event) => { this.key = event.target.value === '' ? null : Number(event.target.value); this.draw(); });
    this.part('find')?.addEventListener('input', (event) => { this.find = event.target.value.toLowerCase().trim(); this.page = 0; this.draw(); });
    this.part('tools').hidden = this.table.hidden = false;
    this.draw();
  }

  part(name) { return byId(`${this.id}-${name}`); }

  head(cell, index) {
    const name = cell.textContent.trim();
    const sign = el('span', { class: 'sign', 'aria-hidden': 'true' }, '↕');
    cell.replaceChildren(el('button', { type: 'button', click: () => this.sortBy(index) }, el('bdi', {}, name), sign));
    this.part('sort').append(el('option', { value: String(index) }, name));
    return { cell, sign };
  }

  choices() {
    const select = this.part('filter');
    const values = [...new Set(this.rows.map((row) => row.values[this.filterColumn]))].filter((value) => !isMissing(value));
    select.append(...values.map((value, index) => el('option', { value: String(index) }, shorten(String(value), 60))));
    select.addEventListener('change', () => { this.filter = select.value === '' ? null : values[Number(select.value)]; this.page = 0; this.draw(); });
  }

  sortBy(index) {
    this.descending = this.key === index ? !this.descending : false;
    this.key = index;
    this.draw();
  }

  matches(row) {
    if (this.filter !== null && row.values[this.filterColumn] !== this.filter) return false;
    row.text ??= row.values.map((value) => (isMissing(value) ? '' : String(value))).join('\n').toLowerCase();
    return !this.find || row.text.includes(this.find);
  }

  compare(a, b) {
    const [left, right] = [a.values[this.key], b.values[this.key]];
    // What is missing comes last in both orders.
    if (isMissing(left) || isMissing(right)) return isMissing(left) - isMissing(right);
    const numbers = typeof left === 'number' && typeof right === 'number';
    const order = numbers ? left - right : collator.compare(String(left), String(right));
    return this.descending ? -order : order;
  }

  chosen() {
    const found = this.rows.filter((row) => this.matches(row));
    return this.key === null ? found : found.sort((a, b) => this.compare(a, b));
  }

  draw() {
    const found = this.chosen();
    const pages = Math.max(1, Math.ceil(found.length / this.pageSize));
    this.page = Math.min(this.page, pages - 1);
    const first = this.page === 0 ? 0 : this.page * this.pageSize;
    const shown = found.slice(first, first + this.pageSize);
    this.table.tBodies[0].replaceChildren(...shown.map((row) => row.node()));
    this.heads.forEach(({ cell, sign }, index) => {
      const active = index === this.key;
      if (active) cell.setAttribute('aria-sort', this.descending ? 'descending' : 'ascending');
      else cell.removeAttribute('aria-sort');
      sign.textContent = { true: '▼', false: '▲' }[active && this.descending];
      if (!active) sign.textContent = '↕';
    });
    this.part('sort').value = this.key === null ? '' : String(this.key);
    this.part('direction').textContent = this.descending ? 'Descending' : 'Ascending';
    const range = pages > 1 ? `Showing ${count(first + 1)}–${count(first + shown.length)} of ` : '';
    const all = found.length === this.rows.length ? '' : ` (${count(this.rows.length)} in all)`;
    this.part('count').textContent = found.length ? `${range}${plural(found.length, this.noun)}${all}.` : `No ${this.noun} matches${all}.`;
    if (this.part('pager')) this.drawPager(pages);
  }

  drawPager(pages) {
    const go = (name, page, off) => el('button', { type: 'button', disabled: off, click: () => {
      this.page = page;
      this.draw();
      // The button that was pressed is gone: its successor, or its neighbour at the end, takes the focus.
      const again = [...this.part('pager').querySelectorAll('button')];
      (again.find((button) => button.textContent === name && !button.disabled) ?? again.find((button) => !button.disabled))?.focus();
    } }, name);
    const [at, last] = [this.page, pages - 1];
    this.part('pager').hidden = pages === 1;
    this.part('pager').replaceChildren(
      go('First', 0, at === 0), go('Previous', at - 1, at === 0),
      el('span', {}, `Page ${count(at + 1)} of ${count(pages)}`),
      go('Next', at + 1, at === last), go('Last', last, at === last),
    );
  }

  export() {
    const lines = [this.columns.map(({ name }) => name), ...this.chosen().map((row) => row.exported ?? row.values)];
    download(fileName(`${this.noun}s`, 'csv'), 'text/csv;charset=utf-8', `\ufeff${lines.map((cells) => cells.map(field).join(',')).join('\r\n')}\r\n`);
  }
}

function startNumbers() {
  const table = byId('number-table');
  if (!table) return;
  const columns = [...table.tHead.rows[0].cells].map((cell) => ({ name: cell.textContent.trim(), number: 'number' in cell.dataset }));
  const rows = [...table.tBodies[0].rows].map((node) => {
    const cells = [...node.cells];
    const values = cells.map((cell, index) => {
      const value = cell.dataset.value ?? cell.textContent.trim();
      return columns[index].number && value !== '' ? Number(value) : value;
    });
    return { values, exported: cells.map((cell, index) => cell.dataset.text ?? values[index]), node: () => node };
  });
  new Listing('number-table', columns, rows, columns.findIndex(({ name }) => name === 'Verdict'));
}

function startTrials() {
  const { columns: names, rows: values } = data.trials ?? {};
  if (!names || !byId('trial-table')) return;
  const columns = names.map((name, index) => ({ name, number: values.every((row) => row[index] === null || typeof row[index] === 'number') }));
  const shown = (value) => (typeof value === 'number' ? format(value, 5) : isMissing(value) ? '–' : shorten({ true: 'yes', false: 'no' }[value] ?? String(value), 200));
  const head = byId('trial-table').tHead.rows[0];
  head.append(...columns.map(({ name, number }) => el('th', { role: 'columnheader', scope: 'col', class: number && 'figure' }, name)));
  const rows = values.map((row) => ({
    values: row,
    node: () => el('tr', { role: 'row' }, ...row.map((value, index) => el(
      'td', { role: 'cell', 'data-name': columns[index].name, class: columns[index].number && 'figure' }, el('bdi', {}, shown(value)),
    ))),
  }));
  new Listing('trial-table', columns, rows, names.indexOf('case'), 50);
}

startNumbers();
startTrials();
