// The runs of this page: records, and patterns that are unpacked when they are asked for.
const packedPatterns = JSON.parse(byId('blobs').textContent);

// Weights are stored as round(255 sqrt(p)).
const weightOf = Float32Array.from({ length: 256 }, (_, code) => (code / 255) ** 2);

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function halfFloat(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// Entries row by row: how many, the steps between them (255: go on adding), and their values.
function* sparseEntries(sections, name) {
  const [counts, gaps, values] = ['counts', 'gaps', 'values'].map((part) => sections[`${name}.${part}`]);
  let [at, entry] = [0, 0];
  for (let row = 0; row < counts.length / 2; row += 1) {
    let column = 0;
    for (let left = counts[2 * row] + 256 * counts[2 * row + 1]; left > 0; left -= 1) {
      while (gaps[at] === 255) { column += 255; at += 1; }
      column += gaps[at];
      at += 1;
      yield [row, column, values ? values[entry] : 1];
      entry += 1;
    }
  }
}

function matrixOf(sections, name, size, width) {
  if (sections[name]) return sections[name];
  const matrix = new Uint8Array(size);
  for (const [row, column, value] of sparseEntries(sections, name)) matrix[row * width + column] = value;
  return matrix;
}

// The twin's largest weights of each query, largest first; -1 where there are fewer than K.
function twinOf(sections, rows, K) {
  if (!sections['twin.counts']) return [null, null];
  const [index, weight] = [new Int32Array(rows * K).fill(-1), new Uint8Array(rows * K)];
  const filled = new Uint16Array(rows);
  for (const [row, column, value] of sparseEntries(sections, 'twin')) {
    let place = row * K + filled[row];
    for (; place > row * K && weight[place - 1] < value; place -= 1) {
      index[place] = index[place - 1];
      weight[place] = weight[place - 1];
    }
    index[place] = column;
    weight[place] = value;
    filled[row] += 1;
  }
  return [index, weight];
}

function readPattern(bytes, { H, Tq, Tk, K, sections: lengths }) {
  const sections = Object.create(null);
  let offset = 0;
  for (const [name, length] of lengths) {
    sections[name] = bytes.subarray(offset, offset + length);
    offset += length;
  }
  const words = (name) => { const part = sections[name]; return Array.from({ length: part.length / 2 }, (_, i) => part[2 * i] + 256 * part[2 * i + 1]); };
  const [twinIndex, twinWeight] = twinOf(sections, H * Tq, K);
  return {
    H, Tq, Tk, K, twinIndex, twinWeight,
    pattern: matrixOf(sections, 'pattern', H * Tq * Tk, Tk),
    selected: Int32Array.from(words('selected'), (position) => (position > 0xfff0 ? position - 0x10000 : position)),
    margin: Float32Array.from(words('margin'), halfFloat),
    support: sections['support.counts'] ? matrixOf(sections, 'support', H * Tq * Tk, Tk) : null,
    // Code of the weight of each query that this page left out, or null when it left out nothing.
    tail: sections.tail ?? null,
  };
}

class Atlas {
  constructor(record, index) {
    Object.assign(this, record, { index, name: record.meta.name });
    this.byLabel = new Map(this.heads.map((head) => [head.label, head]));
    this.place = new Map(this.heads.map((head, place) => [head.label, place]));
    this.modules = new Map(record.meta.modules.map((module) => [module.index, module]));
    this.measures = new Map(record.meta.measures.map((measure) => [measure.key, measure]));
    this.kept = new Map();
  }

  // What module m did in shown text s. The last few are kept: a matrix of 16 heads and 512 tokens has 4 MB.
  shown(s, m) {
    const key = `${s}.${m}`;
    const found = this.kept.get(key) ?? this.read(s, m);
    this.kept.delete(key);
    this.kept.set(key, found);
    if (this.kept.size > 8) this.kept.delete(this.kept.keys().next().value);
    return found;
  }

  async read(s, m) {
    const blob = packedPatterns[this.index].blobs.find(({ layout }) => layout.s === s && layout.m === m);
    if (!blob) throw new RangeError(`This page does not hold text ${s} for module ${m}.`);
    return readPattern(await unpack(blob.data), blob.layout);
  }

  weight(code) { return weightOf[code]; }

  // Share of queries for which two heads select the same key, heads x heads, or null; NaN where it is not known.
  async similarity() {
    const { similarity } = packedPatterns[this.index];
    if (!similarity) return null;
    this.similar ??= Float32Array.from(await unpack(similarity), (code) => (code === 255 ? NaN : code / 250));
    return this.similar;
  }

  estimate(head, key) { return head.values[key] ?? null; }

  value(head, key) { return head.values[key]?.mean ?? null; }
}

const atlases = data.atlases.map((record, index) => new Atlas(record, index));
