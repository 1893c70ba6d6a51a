// A text as tokens, or a picture as patches: one of them asks, the others are coloured by the weight they are given.
const HEAD_RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
const HEAD_STRONG = /[\p{L}]/u;

// Set on the whole text; each token is isolated, so none turns its neighbours.
function textDirection(labels) {
  const first = labels.join(' ').slice(0, 4000).match(HEAD_STRONG);
  return first && HEAD_RIGHT_TO_LEFT.test(first[0]) ? 'rtl' : 'ltr';
}
let headFontName = null;
const headFont = () => (headFontName ??= getComputedStyle(document.body).fontFamily);
const headToken = (unit) => `“${shorten(unit.label.trim() || '␣', 40)}” (${unit.at})`;
const headWeight = (p) => (p === 0 ? '0' : p < 0.0005 ? '< 0.001' : p.toFixed(3));

const TOKEN_STATES = ['hd-query', 'hd-selected', 'hd-support', 'hd-differs'];

class TokenList {
  // asks: the tokens are queries, and one of them is chosen here. answers: they are coloured as keys.
  constructor({ name, asks, answers, onChoose, details }) {
    Object.assign(this, { name, asks, answers, onChoose, details, units: [], query: -1 });
    const over = (event) => {
      const token = event.target.closest?.('.hd-token');
      if (token) tooltip.show(token, this.details(Number(token.dataset.i)));
    };
    this.node = el('div', {
      class: `hd-tokens${asks ? ' hd-asks' : ''}`, role: asks ? 'listbox' : 'list', 'aria-label': name, tabindex: asks ? null : '0',
      pointerover: over, pointerleave: () => tooltip.hideSoon(), click: (event) => this.click(event), keydown: (event) => this.type(event),
    });
  }

  set({ units, margins }) {
    Object.assign(this, { units, query: -1, shares: new Int16Array(units.length), states: new Uint8Array(units.length) });
    this.node.dir = textDirection(units.filter((unit) => !unit.special).map((unit) => unit.label));
    const largest = margins ? Math.max(1e-9, ...[...margins].filter(Number.isFinite)) : 1;
    this.tokens = units.map((unit, i) => {
      const token = el('span', { class: ['hd-token', unit.joined && 'hd-joined', unit.special && 'hd-special'].filter(Boolean).join(' '), role: this.asks ? 'option' : 'listitem', 'data-i': i, tabindex: this.asks ? '-1' : null, 'aria-selected': this.asks ? 'false' : null },
        el('bdi', {}, shorten(unit.label, 60)));
      if (margins && this.asks) {
        const bar = el('i', { class: 'hd-bar', 'aria-hidden': 'true' });
        bar.style.width = `${Number.isFinite(margins[i]) ? Math.max(0, Math.min(100, (100 * margins[i]) / largest)) : 0}%`;
        token.append(bar);
      }
      return token;
    });
    this.node.replaceChildren(...this.tokens);
  }

  // weights: of the chosen query, one for each token here, or null. Only what changes is written: texts are long.
  paint({ query, weights, selected, support, differs }) {
    this.tokens.forEach((token, i) => {
      const share = this.answers && weights ? Math.round(60 * Math.sqrt(Math.min(1, weights[i]))) : 0;
      const states = (this.asks && i === query ? 1 : 0) | (this.answers && i === selected ? 2 : 0) | (this.answers && support?.[i] ? 4 : 0) | (differs?.[i] ? 8 : 0);
      if (share !== this.shares[i]) {
        this.shares[i] = share;
        token.style.setProperty('--hd-weight', `${share}%`);
      }
      const changed = states ^ this.states[i];
      if (!changed) return;
      this.states[i] = states;
      TOKEN_STATES.forEach((name, bit) => { if (changed & (1 << bit)) token.classList.toggle(name, (states & (1 << bit)) !== 0); });
      if (!this.asks || !(changed & 1)) return;
      token.tabIndex = i === query ? 0 : -1;
      token.setAttribute('aria-selected', String(i === query));
    });
    this.query = query;
    if (this.asks && this.tokens.length) this.tokens[0].tabIndex = query <= 0 ? 0 : -1;
  }

  reveal() { if (this.asks && this.query >= 0) this.scrollTo(this.tokens[this.query]); }

  // Scroll inside the box only: the page stays where it is.
  scrollTo(token) {
    if (!token || this.node.scrollHeight <= this.node.clientHeight) return;
    const [box, at] = [this.node.getBoundingClientRect(), token.getBoundingClientRect()];
    if (at.top < box.top) this.node.scrollTop -= box.top - at.top + 8;
    else if (at.bottom > box.bottom) this.node.scrollTop += at.bottom - box.bottom + 8;
  }

  find(i) {
    for (const found of this.node.querySelectorAll('.hd-found')) found.classList.remove('hd-found');
    this.scrollTo(this.tokens[i]);
    this.tokens[i]?.classList.add('hd-found');
    setTimeout(() => this.tokens[i]?.classList.remove('hd-found'), 3000);
  }

  click(event) {
    const token = event.target.closest('.hd-token');
    if (!token || !this.asks) return;
    this.onChoose(Number(token.dataset.i));
    token.focus({ preventScroll: true });
  }

  type(event) {
    if (!this.asks || event.ctrlKey || event.metaKey || event.altKey) return;
    const forward = this.node.dir === 'rtl' ? -1 : 1;
    const now = Math.max(0, this.query);
    const moves = { ArrowRight: now + forward, ArrowLeft: now - forward, ArrowDown: this.below(now, 1), ArrowUp: this.below(now, -1), Home: 0, End: this.tokens.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.max(0, Math.min(this.tokens.length - 1, moves[event.key]));
    this.onChoose(next);
    this.tokens[next].focus({ preventScroll: true });
  }

  // The token of the next or previous line that is nearest across.
  below(now, step) {
    const here = this.tokens[now].getBoundingClientRect();
    const middle = here.left + here.width / 2;
    let [best, distance, line] = [now, Infinity, null];
    for (let i = now + step; i >= 0 && i < this.tokens.length; i += step) {
      const edge = this.tokens[i].getBoundingClientRect();
      if (Math.abs(edge.top - here.top) < here.height / 2) continue;
      line ??= edge.top;
      if (Math.abs(edge.top - line) > here.height / 2) break;
      const away = Math.abs(edge.left + edge.width / 2 - middle);
      if (away < distance) [best, distance] = [i, away];
    }
    return best;
  }
}

// The patches of a picture in rows and columns; what is no patch (a class token, registers) is in a list below.
class PictureView {
  constructor({ name, picture, asks, onChoose, details }) {
    Object.assign(this, { name, picture, asks, onChoose, units: [], query: -1 });
    const { width, height, rows, columns } = picture;
    const [w, h] = [480 / columns, (480 * height) / width / rows];
    this.size = { w, h };
    this.cells = Array.from({ length: rows * columns }, (_, k) => svgEl('rect', { class: 'hd-patch', x: (k % columns) * w, y: Math.floor(k / columns) * h, width: w, height: h, 'data-k': k }));
    this.frames = svgEl('g', {});
    this.svg = svgEl('svg', {
      class: 'hd-picture', viewBox: `0 0 480 ${((480 * height) / width).toFixed(1)}`, tabindex: '0', role: 'application', 'aria-roledescription': 'picture in patches',
      'aria-label': `${name}: ${rows} rows of ${columns} patches. ${asks ? 'Arrow keys choose the patch that asks.' : ''}`,
      click: (event) => this.click(event), keydown: (event) => this.type(event), pointerleave: () => tooltip.hideSoon(),
      pointerover: (event) => { const i = this.unitAt(event.target); if (i >= 0) tooltip.show(event.target, details(i)); },
    }, svgEl('image', { href: picture.data, width: 480, height: (480 * height) / width, preserveAspectRatio: 'none' }), ...this.cells, this.frames);
    this.others = new TokenList({ name: `${name}: tokens that are no patch`, asks, answers: true, onChoose: (at) => onChoose(this.rest[at]), details: (at) => details(this.rest[at]) });
    this.node = el('div', { class: 'hd-picture-box' }, this.svg, this.others.node);
  }

  set({ units, margins }) {
    this.units = units;
    const plain = units.map((_, i) => i).filter((i) => !units[i].special);
    this.patches = plain.length === this.cells.length ? plain : plain.filter((i) => /^r\d+c\d+$/.test(units[i].label.trim()));
    const patch = new Set(this.patches);
    this.rest = units.map((_, i) => i).filter((i) => !patch.has(i));
    this.others.set({ units: this.rest.map((i) => units[i]), margins: margins && this.rest.map((i) => margins[i]) });
    this.others.node.hidden = this.rest.length === 0;
  }

  // What is not attended to darkens, so that the picture itself shows where the weight is.
  paint({ query, weights, selected, support, differs }) {
    this.query = query;
    const largest = weights ? Math.max(1e-6, ...weights) : 1;
    this.patches.forEach((i, k) => this.cells[k]?.setAttribute('fill-opacity', weights ? (0.78 * (1 - Math.sqrt(Math.min(1, weights[i] / largest)))).toFixed(3) : '0'));
    const frame = (i, kind, inset) => {
      const k = this.patches.indexOf(i);
      const { w, h } = this.size;
      return k < 0 ? null : svgEl('rect', { class: `hd-frame ${kind}`, x: (k % this.picture.columns) * w + inset, y: Math.floor(k / this.picture.columns) * h + inset, width: w - 2 * inset, height: h - 2 * inset });
    };
    const supports = support ? this.patches.filter((i) => support[i]).map((i) => frame(i, 'hd-support', 2)) : [];
    // A dark line under the coloured one: it shows on any picture.
    const both = (i, kind) => [frame(i, 'hd-under', 2), frame(i, kind, 2)];
    this.frames.replaceChildren(...[...supports, ...both(selected, 'hd-selected'), ...(this.asks ? both(query, 'hd-query') : [])].filter(Boolean));
    const pick = (values) => values && this.rest.map((i) => values[i]);
    this.others.paint({ query: this.rest.indexOf(query), selected: this.rest.indexOf(selected), weights: pick(weights), support: pick(support), differs: pick(differs) });
  }

  reveal() { this.others.reveal(); }

  find(i) {
    const cell = this.cells[this.patches.indexOf(i)];
    if (!cell) { this.others.find(this.rest.indexOf(i)); return; }
    cell.classList.add('hd-found');
    setTimeout(() => cell.classList.remove('hd-found'), 3000);
  }

  unitAt(target) { return target.dataset?.k === undefined ? -1 : (this.patches[Number(target.dataset.k)] ?? -1); }

  click(event) {
    const i = this.unitAt(event.target);
    if (i >= 0 && this.asks) this.onChoose(i);
  }

  type(event) {
    if (!this.asks || event.ctrlKey || event.metaKey || event.altKey) return;
    const { columns } = this.picture;
    const k = this.patches.indexOf(this.query);
    const moves = { ArrowRight: k + 1, ArrowLeft: k - 1, ArrowDown: k + columns, ArrowUp: k - columns, Home: 0, End: this.patches.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const next = k < 0 ? 0 : moves[event.key];
    if (next >= 0 && next < this.patches.length) this.onChoose(this.patches[next]);
  }
}
