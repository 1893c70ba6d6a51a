// What is typed goes to the server that this page is from, and its answer takes the place of the atlas. One request is
// under way at a time; whatever was typed meanwhile goes next, so that the page is as quick as the model.
const live = {
  text: byId('live-text'), target: byId('live-target'), said: byId('live-said'), time: byId('live-time'), error: byId('live-error'),
  token: new URLSearchParams(location.search).get('token') ?? '',
  asked: null, waiting: null, busy: false,

  sentence() {
    const target = this.target?.value ?? '';
    return target.trim() ? { text: this.text.value, target } : { text: this.text.value };
  },

  typed() {
    this.waiting = performance.now();
    if (!this.busy) this.ask();
  },

  async ask() {
    const since = this.waiting;
    const sentence = this.sentence();
    const asked = JSON.stringify(sentence);
    this.waiting = null;
    if (asked === this.asked) return;
    this.asked = asked;
    if (!sentence.text.trim()) { this.complain('Type a text: there is nothing to read.'); return; }
    this.busy = true;
    let pause = 0;
    try {
      pause = await this.exchange(asked, since);
    } catch (error) {
      this.asked = null;
      this.complain(error instanceof TypeError ? 'The server does not answer: does attsvm serve still run?' : `The answer cannot be shown: ${error.message}`);
    } finally {
      this.busy = false;
    }
    if (pause) { this.asked = null; this.waiting ??= since; setTimeout(() => { if (!this.busy && this.waiting !== null) this.ask(); }, pause); } else if (this.waiting !== null) this.ask();
  },

  // Gives the milliseconds to wait before it is worth trying again, 0 after an answer.
  async exchange(body, since) {
    const response = await fetch(location.pathname, { method: 'POST', body, cache: 'no-store', credentials: 'omit', headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${this.token}` } });
    const answer = await response.json();
    if (response.status === 429 || response.status === 503) return 1000 * Math.max(0.2, Number(response.headers.get('Retry-After')) || 1);
    if (!response.ok) { this.complain(answer.error); return 0; }
    this.show(answer);
    await new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); });
    this.time.textContent = `${Math.round(performance.now() - since)} ms from key to picture, ${Math.round(1000 * answer.seconds)} ms of it the model`;
    return 0;
  },

  complain(sentence) {
    this.error.textContent = sentence;
    this.error.hidden = false;
    this.time.textContent = '';
  },

  show({ atlas, patterns }) {
    this.error.hidden = true;
    const { corpus } = atlas.meta;
    this.said.textContent = `${plural(corpus.n_tokens, 'token')}. ${corpus.notes.join(' ')}`;
    data.atlases[0] = atlas;
    packedPatterns[0] = patterns;
    atlases[0] = new Atlas(atlas, 0);
    this.redraw();
  },

  // The view that is open stays, with the chosen head, where the reader was.
  redraw() {
    const view = byId('view');
    const [top, focused] = [scrollY, document.activeElement?.id];
    tooltip.hide();
    // The page must not shrink and jump while a head's patterns are unpacked.
    clearTimeout(this.settled);
    view.style.minHeight = `${view.offsetHeight}px`;
    this.settled = setTimeout(() => { view.style.minHeight = ''; }, 600);
    if (state.view === 'head') {
      const sides = headsOf(decodeURIComponent(location.hash.slice(1))) ?? [findHead(state.head.label)];
      closeHead();
      openHeads(sides);
    } else showView(state.view);
    if (focused && document.activeElement?.id !== focused) byId(focused)?.focus({ preventScroll: true });
    scrollTo({ top, behavior: 'instant' });
  },
};
for (const box of [live.text, live.target]) box?.addEventListener('input', () => live.typed());
live.asked = JSON.stringify({ text: live.text.defaultValue });
live.typed(); // browsers keep what was typed before the page was loaded again
live.text.focus({ preventScroll: true });
live.text.setSelectionRange(live.text.value.length, live.text.value.length);
