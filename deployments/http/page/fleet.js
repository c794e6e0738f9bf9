// What is known of the fleet, from what GET /v1/fleet/events tells. Times are seconds on the page's clock.

export const MINUTE = 60;
const KEPT_S = 75; // what ended before is forgotten

/** The pools by name. */
export class Fleet {
  pools = new Map();
  refused = 0; // by the router that tells, before a host had them
  #offset = 0;

  /** Take in what is told; returns what happened, oldest first: {at, kind, text parts}. */
  take(news) {
    this.#offset = Date.now() / 1000 - news.now;
    this.refused = news.refused;
    if (news.complete) this.pools.clear();
    const happened = [];
    for (const [name, told] of Object.entries(news.pools)) {
      if (!this.pools.has(name)) this.pools.set(name, { name, hosts: new Map() });
      const pool = this.pools.get(name);
      Object.assign(pool, { model: told.model, wait: told.predicted_wait_s ?? null });
      for (const gone of told.gone ?? []) pool.hosts.delete(gone);
      for (const silent of told.silent ?? [])
        if (pool.hosts.has(silent)) pool.hosts.get(silent).silent = true;
      for (const [id, hostNews] of Object.entries(told.hosts ?? {})) {
        if (!pool.hosts.has(id)) pool.hosts.set(id, new Host(id));
        happened.push(...pool.hosts.get(id).take(hostNews, this.#offset));
      }
    }
    return happened.sort((one, other) => one.at - other.at);
  }

  get hosts() {
    return [...this.pools.values()].flatMap((pool) => [...pool.hosts.values()]);
  }
}

/** @property segments  by serial: {serial, request, workers, first, last, began, ended, end, exchange, step, waited, former} */
export class Host {
  segments = new Map();
  outages = new Map();
  silent = false;

  constructor(id) {
    this.id = id;
    this.name = id.slice(0, 6);
  }

  take(news, offset) {
    const { segments, outages, ...now } = news;
    Object.assign(this, now, { silent: false });
    const happened = [];
    for (const told of segments) happened.push(...this.#segment(told, offset));
    for (const told of outages) happened.push(...this.#outage(told, offset));
    this.#forget(Date.now() / 1000 - KEPT_S);
    return happened.map((one) => ({ ...one, host: this }));
  }

  /** What a worker does: {state: "busy" | "free" | "out" | "dead", request}. */
  worker(index) {
    for (const outage of this.outages.values()) {
      if (outage.worker === index && outage.back === null) return { state: outage.died ? "dead" : "out" };
    }
    for (const segment of this.segments.values()) {
      if (segment.ended === null && segment.workers.includes(index))
        return { state: "busy", request: segment.request };
    }
    return { state: "free" };
  }

  get busy() {
    return this.#count("busy");
  }

  get down() {
    return this.#count("out") + this.#count("dead");
  }

  #count(state) {
    return Array.from({ length: this.workers }, (_, index) => this.worker(index)).filter(
      (w) => w.state === state,
    ).length;
  }

  #segment(told, offset) {
    const known = this.segments.get(told.serial);
    const former = known ? known.former : this.#former(told);
    const segment = {
      serial: told.serial,
      request: told.request,
      workers: told.workers,
      first: told.first_step,
      began: told.began_at + offset,
      last: told.last_step ?? null,
      ended: told.ended_at ? told.ended_at + offset : null,
      end: told.end ?? null,
      exchange: told.exchange ?? null,
      step: told.step_s ?? null,
      waited: told.waited ?? null,
      former,
    };
    this.segments.set(told.serial, segment);
    const happened = [];
    if (!known && former) {
      const kind = former.end === "broken" ? "repaired" : "regrouped";
      happened.push({ at: segment.began, kind, segment });
    }
    if (segment.end && !(known && known.end) && ["cancelled", "broken", "failed"].includes(segment.end)) {
      happened.push({ at: segment.ended, kind: segment.end, segment });
    }
    return happened;
  }

  /** The segment of the same request before this one. */
  #former(told) {
    const before = [...this.segments.values()].filter(
      (one) => one.request === told.request && one.serial < told.serial,
    );
    return before.at(-1) ?? null;
  }

  #outage(told, offset) {
    const id = `${told.worker} ${told.out_at}`;
    const known = this.outages.get(id);
    const back = told.back_at ? told.back_at + offset : null;
    const outage = { worker: told.worker, out: told.out_at + offset, back, died: told.died };
    this.outages.set(id, outage);
    const happened = [];
    if (outage.died && !known?.died) happened.push({ at: outage.out, kind: "died", outage });
    if (outage.died && back !== null && (known?.back ?? null) === null)
      happened.push({ at: back, kind: "replaced", outage });
    return happened;
  }

  #forget(before) {
    for (const [serial, segment] of this.segments)
      if (segment.ended !== null && segment.ended < before) this.segments.delete(serial);
    for (const [id, outage] of this.outages)
      if (outage.back !== null && outage.back < before) this.outages.delete(id);
  }
}
