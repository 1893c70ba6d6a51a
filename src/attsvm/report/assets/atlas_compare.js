// Two runs beside each other, or two layers: heads are matched, and each measure is compared.
const runTitle = (index) => `${String.fromCharCode(65 + index)}: ${shorten(atlases[index].name, 40)}`;
const SAME_KEY = '(same)';
const SAME_MEASURE = {
  key: SAME_KEY, title: 'Same selections', unit: '', scale: UNIT_SCALE,
  explanation: 'Share of the queries of the shown texts for which both heads select the same key.',
};
const compareChoice = { key: null, a: null, b: null };

// A head of one run and the head of the other at the same kind, layer and number. Runs with one kind each are matched
// by layer and number alone.
function matchHeads(a, b) {
  const kinds = [a, b].map((atlas) => new Set(atlas.heads.map(({ kind }) => kind)));
  const alike = [...kinds[0]].some((kind) => kinds[1].has(kind)) || kinds.some((set) => set.size > 1);
  const name = (head) => `${alike ? head.kind : ''}.${head.layer}.${head.head}`;
  const others = new Map(b.heads.map((head) => [name(head), head]));
  const pairs = a.heads.map((head) => ({ a: head, b: others.get(name(head)) ?? null }));
  const matched = new Set(pairs.map((pair) => pair.b));
  return { pairs: pairs.filter((pair) => pair.b), onlyA: pairs.filter((pair) => !pair.b).map((pair) => pair.a), onlyB: b.heads.filter((head) => !matched.has(head)) };
}

let matchedOnce = null;
const matched = () => (matchedOnce ??= matchHeads(atlases[0], atlases.at(-1)));
const partnerOf = (index, head) => matched().pairs.find((pair) => (index === 0 ? pair.a : pair.b) === head)?.[index === 0 ? 'b' : 'a'] ?? null;

// The sides that can be chosen: all heads of a run (two runs only), or one module of a run.
function comparable() {
  const whole = atlases.length > 1 ? atlases.map((atlas) => ({ id: `${atlas.index}`, atlas, module: null, title: `${runTitle(atlas.index)}, all layers` })) : [];
  const single = atlases.flatMap((atlas) => atlas.meta.modules.map((module) => ({
    id: `${atlas.index}.${module.index}`, atlas, module: module.index,
    title: `${atlases.length > 1 ? `${runTitle(atlas.index)}, ` : ''}${KIND_NAMES[module.kind].toLowerCase()} layer ${module.layer}`,
  })));
  return [...whole, ...single];
}

function pairsOf(a, b) {
  if (a.module === null && b.module === null) {
    if (a.atlas === b.atlas) return a.atlas.heads.map((head) => ({ a: head, b: head }));
    return a.atlas.index === 0 ? matched().pairs : matched().pairs.map((pair) => ({ a: pair.b, b: pair.a }));
  }
  const of = (side, other) => side.atlas.heads.filter((head) => head.module === (side.module ?? other.module));
  const others = new Map(of(b, a).map((head) => [head.head, head]));
  return of(a, b).filter((head) => others.has(head.head)).map((head) => ({ a: head, b: others.get(head.head) }));
}

const sameTokens = (a, b, module) => ['query_side', 'key_side'].every((side) => {
  const piece = (text) => (module[side] === 'target' && text.target ? text.target : text.source).tokens;
  return JSON.stringify(piece(a)) === JSON.stringify(piece(b));
});

// How often both heads of each pair select the same key, over the texts that both runs show.
async function sameSelections(pairs, a, b) {
  const totals = new Map(pairs.map((pair) => [pair, [0, 0]]));
  for (const [s, text] of a.atlas.meta.shown.entries()) {
    for (const pair of pairs) {
      const [first, second] = [a.atlas.modules.get(pair.a.module), b.atlas.modules.get(pair.b.module)];
      const other = b.atlas.meta.shown[s];
      if (!other || first.query_side !== second.query_side || first.key_side !== second.key_side || !sameTokens(text, other, first)) continue;
      const [left, right] = await Promise.all([a.atlas.shown(s, first.index), b.atlas.shown(s, second.index)]);
      const total = totals.get(pair);
      for (let q = 0; q < left.Tq; q += 1) {
        const [i, j] = [left.selected[pair.a.head * left.Tq + q], right.selected[pair.b.head * right.Tq + q]];
        if (i < 0 || j < 0) continue;
        total[0] += i === j ? 1 : 0;
        total[1] += 1;
      }
    }
  }
  return new Map([...totals].map(([pair, [same, all]]) => [pair, all ? same / all : null]));
}

const differenceOf = (a, b) => (a === null || b === null ? null : b - a);
// null where an interval is not known.
function intervalsApart(a, b) {
  const ends = [a?.low, a?.high, b?.low, b?.high];
  return ends.some((end) => end === null || end === undefined) ? null : a.high < b.low || b.high < a.low;
}
const apartness = ({ apart }) => (apart === null ? 'not known' : apart ? 'apart' : 'overlap');
const signed = (value, measure) => (value === null ? '–' : `${value > 0 ? '+' : ''}${showNumber(value, measure)}`);

function compareRows(a, b, key, same) {
  return pairsOf(a, b).map((pair) => {
    if (key === SAME_KEY) return { pair, a: null, b: null, difference: same.get(pair) ?? null, apart: null };
    const [left, right] = [a.atlas.estimate(pair.a, key), b.atlas.estimate(pair.b, key)];
    const [first, second] = [left?.mean ?? null, right?.mean ?? null];
    return { pair, a: first, b: second, left, right, difference: differenceOf(first, second), apart: intervalsApart(left, right) };
  });
}

const pairAddress = ({ a, b }, plain) => (plain ? `#${a.label}` : `#${a.label}~${b.label}`);

function differenceLegend(largest, measure) {
  return colourLegend(-largest, largest, (t) => divergingRgb(2 * t - 1), measure);
}

function shortDifference(value, measure, shares) {
  if (value === null) return '';
  const digits = measure.scale === UNIT_SCALE ? value.toFixed(2).replace('-', '−') : format(value, 2);
  return `${value > 0 && !shares ? '+' : ''}${digits}`;
}

// The heads of the first side, coloured by how much the second side differs.
function differenceGrids(a, b, rows, measure, plain) {
  // Where nothing differs any scale will do.
  const largest = Math.max(...rows.map(({ difference }) => Math.abs(difference ?? 0))) || 1;
  const byHead = new Map(rows.map((row) => [row.pair.a, row]));
  const shares = measure.key === SAME_KEY;
  const colour = (value) => (shares ? viridisRgb(value) : divergingRgb(value / largest));
  const cell = (head) => {
    const row = byHead.get(head);
    if (!row) return { rgb: NO_COLOUR, text: '', spoken: 'has no partner', tip: () => headTip(a.atlas, head, null, [['partner', 'none']]) };
    const told = shares ? showNumber(row.difference, measure) : signed(row.difference, measure);
    const more = [[shares ? measure.title : 'difference', told], ...(shares ? [] : [['intervals', apartness(row)]])];
    const tip = () => [
      el('p', { class: 'tip-head' }, `${row.pair.a.label} and ${row.pair.b.label}`),
      definitions(shares ? more : [['first', showEstimate(row.left, measure)], ['second', showEstimate(row.right, measure)], ...more]),
    ];
    const rgb = row.difference === null ? NO_COLOUR : colour(row.difference);
    const spoken = `${measure.title}: ${told}${row.apart ? ', intervals apart' : ''}`;
    return { rgb, text: shortDifference(row.difference, measure, shares), spoken, tip, href: pairAddress(row.pair, plain) };
  };
  const part = a.module === null && b.module === null ? a.atlas : { ...a.atlas, heads: rows.map(({ pair }) => pair.a), meta: { modules: a.atlas.meta.modules } };
  return [shares ? colourLegend(0, 1, viridisRgb, measure) : differenceLegend(largest, measure), ...mapGrids(part, cell)];
}

function compareTable(a, b, rows, measure, plain) {
  const shares = measure.key === SAME_KEY;
  const number = (key, name, value, cell) => ({ key, name, number: true, measure, value, cell });
  const side = (name, pick, which) => ({
    ...number(name, name, (row) => row[which], (row) => showEstimate(pick(row), measure)),
    exported: ['mean', 'low', 'high'].map((part) => [`${name} ${part}`, (row) => pick(row)?.[part] ?? null]),
  });
  const kinds = ({ pair }) => [pair.a, pair.b].map(nameOfKind);
  const columns = [
    {
      key: '(pair)', name: 'Heads', value: ({ pair }) => a.atlas.place.get(pair.a.label),
      cell: ({ pair }) => el('a', { href: pairAddress(pair, plain) }, pair.a.label === pair.b.label ? pair.a.label : `${pair.a.label} ~ ${pair.b.label}`),
      exported: [['first head', ({ pair }) => pair.a.label], ['second head', ({ pair }) => pair.b.label]],
    },
    ...(shares ? [number('difference', measure.title, (row) => row.difference)] : [
      side('First', (row) => row.left, 'a'), side('Second', (row) => row.right, 'b'),
      number('difference', 'Difference', (row) => row.difference, (row) => signed(row.difference, measure)),
      number('size', '|Difference|', (row) => (row.difference === null ? null : Math.abs(row.difference))),
      {
        key: '(apart)', name: 'Intervals', hint: 'Whether the two 95 % intervals have nothing in common', value: apartness,
        cell: (row) => `${row.apart ? '● ' : ''}${apartness(row)}`, exported: [['intervals', apartness]],
      },
    ]),
    { key: '(kinds)', name: 'Kinds', value: (row) => kinds(row).join(' / '), cell: (row) => [...new Set(kinds(row))].join(' → ') },
  ];
  return new HeadTable({
    id: 'pairs', noun: 'pair', columns, rows, sort: shares ? 'difference' : 'size', descending: !shares, mark: (row) => row.apart,
    file: `compare-${measure.key.replace(/[^\w.]/g, '')}`,
    text: ({ pair }) => `${pair.a.label} ${pair.b.label} ${kindName(pair.a.head_kind)} ${kindName(pair.b.head_kind)}`,
    filters: [{ key: 'apart', name: 'Intervals', value: apartness }, { key: 'attention', name: 'Attention', value: ({ pair }) => pair.a.kind }],
  }).node;
}

function unmatchedNote() {
  const { onlyA, onlyB } = matched();
  const some = (heads) => [...heads.slice(0, 4).map(({ label }) => label), ...(heads.length > 4 ? ['…'] : [])].join(', ');
  const part = (heads, index) => (heads.length ? `${plural(heads.length, 'head')} of ${runTitle(index)} (${some(heads)})` : null);
  const said = [part(onlyA, 0), part(onlyB, 1)].filter(Boolean);
  return said.length ? el('p', { class: 'notice' }, `Without a partner: ${said.join('; ')}.`) : null;
}

function sharedMeasures() {
  const second = new Set(knownMeasures(atlases.at(-1)).map(({ key }) => key));
  return [...knownMeasures(atlases[0]).filter(({ key }) => second.has(key)), SAME_MEASURE];
}

// What two kinds of view share: the choice of the measure, and a box that is drawn again when it changes.
function comparison(measures, sides, draw) {
  compareChoice.key ??= firstMeasure(atlases[0], measures);
  const box = el('div', { class: 'comparison' });
  let turn = 0;
  const redraw = async () => {
    const measure = measures.find(({ key }) => key === compareChoice.key) ?? measures[0];
    const [a, b] = sides();
    turn += 1;
    const mine = turn;
    let same = null;
    if (measure.key === SAME_KEY) {
      box.replaceChildren(el('p', { class: 'muted' }, 'Comparing the selections …'));
      same = new Map();
      const pairs = pairsOf(a, b);
      const found = await sameSelections(pairs, a, b);
      if (mine !== turn) return;
      // Pairs are made anew for each drawing; their heads are what stays.
      const byLabels = new Map(pairs.map((pair) => [`${pair.a.label}\n${pair.b.label}`, found.get(pair)]));
      same = { get: (pair) => byLabels.get(`${pair.a.label}\n${pair.b.label}`) };
    }
    box.replaceChildren(el('p', { class: 'explanation' }, measure.explanation), ...draw(a, b, compareRows(a, b, measure.key, same), measure).filter(Boolean));
  };
  const select = measureSelect('compare-measure', measures, compareChoice.key, [], (key) => { compareChoice.key = key; redraw(); });
  return { box, redraw, select };
}

function comparisonMap() {
  const sides = () => atlases.map((atlas) => ({ atlas, module: null }));
  const { box, redraw, select } = comparison(sharedMeasures(), sides, (a, b, rows, measure) => differenceGrids(a, b, rows, measure, true));
  redraw();
  const intro = [el('bdi', {}, runTitle(1)), ' minus ', el('bdi', {}, runTitle(0)), '. A cell opens both heads beside each other.'];
  return viewSection('Map of differences', intro, unmatchedNote(), el('div', { class: 'tools' }, select), box);
}

function compareView() {
  const all = comparable();
  compareChoice.a ??= all[0].id;
  compareChoice.b ??= (all[1] ?? all[0]).id;
  const pick = (key) => all.find(({ id }) => id === compareChoice[key]);
  const plain = (a, b) => atlases.length > 1 && a.module === null && b.module === null && a.atlas.index === 0 && b.atlas.index === 1;
  const { box, redraw, select } = comparison(sharedMeasures(), () => [pick('a'), pick('b')], (a, b, rows, measure) => (rows.length
    ? [...differenceGrids(a, b, rows, measure, plain(a, b)), compareTable(a, b, rows, measure, plain(a, b))]
    : [el('p', { class: 'notice' }, 'These two sides have no heads to compare.')]));
  const sides = all.map(({ id, title }) => [id, title]);
  const side = (key, name) => labelled(name, picker(`compare-${key}`, sides, compareChoice[key], (id) => { compareChoice[key] = id; redraw(); }), 'grow');
  redraw();
  const intro = 'Heads are matched by kind, layer and number, or by their number where a layer is chosen. '
    + 'The difference is second minus first; rows are marked where the two 95 % intervals have nothing in common.';
  return viewSection(atlases.length > 1 ? 'Comparison of two runs' : 'Comparison of two layers', [intro],
    atlases.length > 1 ? unmatchedNote() : null, el('div', { class: 'tools' }, side('a', 'First'), side('b', 'Second'), select), box);
}
