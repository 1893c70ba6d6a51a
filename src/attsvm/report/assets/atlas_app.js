// Which view is open, said by the address: #map, #table, #compare, #similarity, #record; a head such as #L5.H3 and
// #cross.L0.H2; two heads beside each other, #L5.H3~L6.H3.
const VIEWS = { map: () => mapView(), table: () => tableView(), compare: () => compareView(), similarity: () => similarityView() };
const VIEW_NAMES = { map: 'Map', table: 'Table', compare: 'Compare', similarity: 'Similarity', record: 'Record' };
const state = { shown: 0, words: false, hideSpecial: false, query: null, view: null, target: null, head: null, close: [] };

function closeHead() {
  for (const close of state.close) close?.();
  state.close = [];
  state.head = null;
}

// The first of two runs, unless only the second has a head of that name.
function findHead(label, first = 0) {
  for (const index of [first, 1 - first]) {
    const head = atlases[index]?.byLabel.get(label);
    if (head) return { atlas: atlases[index], head };
  }
  return null;
}

function headPane(box, { atlas, head }, others) {
  let close = null;
  const draw = (shown) => {
    close?.();
    const options = {
      words: state.words, hideSpecial: state.hideSpecial, query: state.query,
      onShown: (s) => { state.shown = s; state.query = null; for (const other of others()) other.draw(s); },
      onOptions: (changed) => {
        const before = [state.words, state.hideSpecial].join();
        Object.assign(state, changed);
        if ([state.words, state.hideSpecial].join() !== before) for (const other of others()) other.draw(state.shown);
      },
    };
    close = renderHead(box, atlas, head, Math.min(shown, atlas.meta.shown.length - 1), options);
  };
  return { draw, close: () => close?.() };
}

function headChoice(atlas, chosen) {
  const groups = atlas.meta.modules.map((module) => {
    const heads = atlas.heads.filter((head) => head.module === module.index);
    const options = heads.map((head) => el('option', { value: head.label, selected: head === chosen }, `${head.label} – ${kindName(head.head_kind)}`));
    return heads.length ? el('optgroup', { label: `${KIND_NAMES[module.kind]} layer ${module.layer}` }, ...options) : null;
  });
  return el('select', { id: 'head-choice', 'aria-label': 'Head', change: (event) => { location.hash = event.target.value; } }, ...groups.filter(Boolean));
}

function neighbours(atlas, head) {
  const at = atlas.place.get(head.label);
  const order = atlas.meta.modules.map(({ index }) => index);
  const module = (step) => atlas.heads.filter((other) => other.module === order[order.indexOf(head.module) + step]);
  const beside = (heads) => heads.find((other) => other.head === head.head) ?? heads.at(-1) ?? null;
  return { ArrowLeft: atlas.heads[at - 1] ?? null, ArrowRight: atlas.heads[at + 1] ?? null, ArrowUp: beside(module(-1)), ArrowDown: beside(module(1)) };
}

function headBar(atlas, head) {
  const around = neighbours(atlas, head);
  const step = (key, sign, name) => (around[key]
    ? el('a', { class: 'step', href: `#${around[key].label}`, 'aria-label': `${name}: ${around[key].label}`, title: `${name}: ${around[key].label}` }, sign)
    : el('span', { class: 'step', 'aria-hidden': 'true' }, sign));
  return el('nav', { class: 'head-bar', 'aria-label': 'Heads' }, el('a', { href: '#map' }, 'All heads'),
    step('ArrowLeft', '←', 'Previous head'), headChoice(atlas, head), step('ArrowRight', '→', 'Next head'),
    step('ArrowUp', '↑', 'Layer above'), step('ArrowDown', '↓', 'Layer below'));
}

function openHeads(sides) {
  const panes = [];
  const boxes = sides.map((side) => el('div', { class: 'head-page' },
    atlases.length > 1 ? el('p', { class: 'eyebrow' }, el('bdi', {}, runTitle(side.atlas.index))) : null, el('div', { class: 'head-pane' })));
  const { atlas, head } = sides[0];
  byId('view').replaceChildren(headBar(atlas, head), el('div', { class: sides.length > 1 ? 'beside' : '' }, ...boxes));
  sides.forEach((side, i) => panes.push(headPane(boxes[i].querySelector('.head-pane'), side, () => panes.filter((_, j) => j !== i))));
  state.close = panes.map((pane) => () => pane.close());
  state.head = head;
  if (!atlas.meta.shown.length) byId('view').append(el('p', { class: 'notice' }, 'This run kept no text to show.'));
  for (const pane of panes) pane.draw(state.shown);
}

function headsOf(target) {
  const [first, second] = target.split('~').map((label, i) => (label === undefined ? null : findHead(label, atlases.length > 1 ? i : 0)));
  if (!first || (target.includes('~') && !second)) return null;
  if (second) return [first, second];
  const partner = atlases.length > 1 ? partnerOf(first.atlas.index, first.head) : null;
  if (!partner) return [first];
  const other = { atlas: atlases[1 - first.atlas.index], head: partner };
  return first.atlas.index === 0 ? [first, other] : [other, first];
}

function showView(name) {
  closeHead();
  byId('view').replaceChildren(...(VIEWS[name] ? [VIEWS[name]()] : []));
  byId('record-view').hidden = name !== 'record';
  byId('overview').hidden = name !== 'map';
}

function unknownHead(target) {
  // Perhaps the kind was left out.
  const alike = atlases[0].heads.filter(({ label }) => label.endsWith(`.${target}`)).map(({ label }) => el('a', { href: `#${label}` }, label));
  const links = alike.flatMap((link, i) => [i ? ', ' : ' There is ', link]);
  return el('p', { class: 'notice' }, `This page has no head called ${shorten(target, 60)}.`, ...links, alike.length ? '.' : null);
}

function route() {
  let target = location.hash.slice(1);
  try { target = decodeURIComponent(target); } catch { /* not an address of this page; shown as it is */ }
  // The link to the content keeps the view; what is open already is not drawn again.
  if (target === 'main' || target === state.target) return;
  state.target = target;
  tooltip.hide();
  const sides = Object.hasOwn(VIEW_NAMES, target) || target === '' ? null : headsOf(target);
  const name = Object.hasOwn(VIEW_NAMES, target) ? target : 'map';
  closeHead();
  if (sides) {
    byId('overview').hidden = byId('record-view').hidden = true;
    openHeads(sides);
  } else showView(name);
  if (!sides && target !== '' && target !== name) byId('view').prepend(unknownHead(target));
  const title = sides ? sides.map(({ head }) => head.label).join(' and ') : VIEW_NAMES[name];
  document.title = `${title} – ${shorten(data.name, 60)} – attsvm`;
  for (const link of document.querySelectorAll('[data-view]')) {
    if (!sides && link.dataset.view === name) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  if (state.view !== null) {
    announce(title);
    // Where the bar of the heads had the focus it stays there, so that the arrows go on; else reading starts at the top.
    scrollTo({ top: 0, behavior: 'instant' });
    const heading = byId('view').querySelector('h2') ?? byId('record-view').querySelector('h2');
    if (heading) { heading.tabIndex = -1; heading.focus({ preventScroll: true }); }
  }
  state.view = sides ? 'head' : name;
}

const KEYS = [
  ['m', 'map of all heads'], ['t', 'table'], ['c', 'comparison'], ['s', 'similarity'], ['r', 'record of the run'], ['← →', 'previous and next head (on the page of a head)'],
  ['Shift ↑ ↓', 'the same head one layer up or down'], ['arrows in the map', 'walk along the heads; Enter opens one'],
  ['/', 'find in the table'], ['?', 'this help'], ['Esc', 'close'],
];
function helpBox() {
  const box = el('dialog', { id: 'help', 'aria-labelledby': 'help-title' }, el('h2', { id: 'help-title' }, 'Keys and links'),
    el('dl', { class: 'keys' }, ...KEYS.flatMap(([key, what]) => [el('dt', {}, el('kbd', {}, key)), el('dd', {}, what)])),
    el('p', { class: 'muted' }, `The address names what is open: #${atlases[0].heads[0]?.label ?? 'L0.H0'} is a head, #table the table, and two heads joined by ~ stand beside each other.`),
    el('form', { method: 'dialog' }, el('button', {}, 'Close')));
  document.body.append(box);
  return box;
}
const help = helpBox();
const openHelp = () => { if (!help.open) help.showModal(); };

function pressKey(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const target = event.target.closest?.('input, select, textarea, [contenteditable], canvas, svg, [role=grid], [role=listbox], [role=radiogroup], [role=slider], .scroller, pre');
  if (target && !(target.matches('svg') && !target.hasAttribute('tabindex'))) return;
  const views = { m: 'map', t: 'table', c: 'compare', s: 'similarity', r: 'record' };
  if (views[event.key]) location.hash = views[event.key];
  else if (event.key === '?') openHelp();
  else if (event.key === '/') {
    event.preventDefault();
    if (state.view !== 'table' && state.view !== 'compare') {
      location.hash = 'table';
      route();
    }
    document.querySelector('#view input[type=search]')?.focus();
  } else if (state.head && atlases.length) {
    // Up and down alone scroll the page, as everywhere.
    const next = neighbours(findHead(state.head.label).atlas, state.head)[event.key];
    if (!next || event.shiftKey !== ['ArrowUp', 'ArrowDown'].includes(event.key)) return;
    event.preventDefault();
    location.hash = next.label;
  }
}

for (const button of document.querySelectorAll('[data-json]')) {
  button.hidden = false;
  button.addEventListener('click', () => {
    const { meta, heads } = data.atlases[Number(button.dataset.json)];
    download(`${meta.name.replace(/[^\w.-]+/g, '-').slice(0, 60) || 'run'}.json`, 'application/json', JSON.stringify({ ...meta, heads }, null, 1));
  });
}
byId('help-button').hidden = false;
byId('help-button').addEventListener('click', openHelp);
document.addEventListener('keydown', pressKey);
// In the frame of a notebook the address of a link is that of the notebook: the frame goes there itself.
if (document.baseURI.split('#')[0] !== location.href.split('#')[0]) {
  document.addEventListener('click', (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (!link || event.defaultPrevented) return;
    event.preventDefault();
    if (link.getAttribute('href') === '#main') byId('main').focus();
    else location.hash = link.getAttribute('href');
  });
}
addEventListener('hashchange', route);
route();
