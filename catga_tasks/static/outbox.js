// The Outbox tab: its numbers every two seconds, the list of messages, and changes by hand.
(function () {
  "use strict";

  const POLL = 2000, LIST_EVERY = 5000, AUDIT_EVERY = 15000, ROWS = 50, PAST = 600;
  const byId = (id) => document.getElementById(id);
  const page = byId("outbox") || byId("outbox-message");
  const root = page.dataset.root;
  const unchangeable = page.dataset.unchangeable;
  const wholeNumbers = new Intl.NumberFormat("en");

  // Small helpers ----------------------------------------------------------------------------------------------------

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) { made.textContent = text; }
    if (className) { made.className = className; }
    return made;
  }

  function row(cells) {
    const made = element("tr");
    cells.forEach((cell) => made.appendChild(cell));
    return made;
  }

  function number(value) {
    return value === null || value === undefined ? "—" : wholeNumbers.format(value);
  }

  function rate(value) {
    return value >= 100 ? wholeNumbers.format(Math.round(value)) : String(Math.round(value * 10) / 10);
  }

  function span(seconds) {
    if (seconds < 1) { return `${Math.round(seconds * 1000)} ms`; }
    if (seconds < 90) { return `${Math.round(seconds)} s`; }
    if (seconds < 5400) { return `${Math.round(seconds / 60)} min`; }
    return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
  }

  function fill(id, rows, columns, empty) {
    if (!rows.length) {
      const cell = element("td", empty, "outbox-empty");
      cell.colSpan = columns;
      rows = [row([cell])];
    }
    byId(id).replaceChildren(...rows);
  }

  function cookie(name) {
    const found = document.cookie.match(`(?:^|;)\\s*${name}\\s*=\\s*([^;]+)`);
    return found ? decodeURIComponent(found[1]) : "";
  }

  async function ask(path, body) {
    const options = { headers: {} };
    if (body !== undefined) {
      options.method = "POST";
      options.headers = { "Content-Type": "application/json", "X-XSRFToken": cookie("_xsrf") };
      options.body = JSON.stringify(body);
    }
    let answer, found;
    try {
      answer = await fetch(root + path, options);
      found = await answer.json();
    } catch (error) {
      throw new Error(answer ? `Flower answered ${answer.status}.` : "Flower doesn't answer.");
    }
    if (!answer.ok) { throw new Error(found.error || `Flower answered ${answer.status}.`); }
    return found;
  }

  function toast(message, kind) {
    const made = element("div", null, `toast align-items-center text-bg-${kind} border-0`);
    made.setAttribute("role", kind === "danger" ? "alert" : "status");
    const inner = element("div", null, "d-flex");
    inner.appendChild(element("div", message, "toast-body"));
    made.appendChild(inner);
    byId("toast-container").appendChild(made);
    made.addEventListener("hidden.bs.toast", () => made.remove());
    bootstrap.Toast.getOrCreateInstance(made, { delay: kind === "danger" ? 10000 : 5000 }).show();
  }

  function confirmed(title, text, label, dangerous) {
    const dialog = byId("outbox-dialog"), yes = byId("outbox-dialog-yes");
    byId("outbox-dialog-title").textContent = title;
    byId("outbox-dialog-text").textContent = text;
    yes.textContent = label;
    yes.className = `btn ${dangerous ? "btn-danger" : "btn-primary"}`;
    return new Promise((resolve) => {
      const modal = bootstrap.Modal.getOrCreateInstance(dialog);
      let said = false;
      yes.onclick = () => { said = true; modal.hide(); };
      // Bootstrap ignores what is clicked while the dialog fades in.
      yes.disabled = true;
      dialog.addEventListener("shown.bs.modal", () => { yes.disabled = false; yes.focus(); }, { once: true });
      dialog.addEventListener("hidden.bs.modal", () => resolve(said), { once: true });
      modal.show();
    });
  }

  // Changes ----------------------------------------------------------------------------------------------------------

  const VERBS = { replay: ["Replay", "replayed"], discard: ["Discard", "discarded"] };

  async function change(verb, chosen, count) {
    const letters = count === 1 ? "1 dead letter" : `${number(count)} dead letters`;
    const what = verb === "replay"
      ? `${letters} will be put back into the outbox and published again.`
      : `${letters} will be deleted for good.`;
    if (!await confirmed(`${VERBS[verb][0]} ${letters}?`, what, VERBS[verb][0], verb === "discard")) { return false; }
    const done = await ask(`/api/dead/${verb}`, chosen);
    const stay = done.left ? ` ${number(done.left)} stay: other messages hold their unique keys.` : "";
    toast(`${number(done.count)} ${VERBS[verb][1]}.${stay}`, done.left ? "warning" : "success");
    return true;
  }

  if (page.id === "outbox-message") {
    page.querySelectorAll("[data-verb]").forEach((button) => button.addEventListener("click", async () => {
      try {
        if (await change(button.dataset.verb, { ids: [Number(page.dataset.number)] }, 1)) {
          setTimeout(() => { window.location = `${root}`; }, 700);
        }
      } catch (error) { toast(error.message, "danger"); }
    }));
    return;
  }

  // The numbers ------------------------------------------------------------------------------------------------------

  let serverNow = Date.now() / 1000;

  function showProblem(message) {
    byId("outbox-problem").classList.toggle("d-none", !message);
    byId("outbox-problem-text").textContent = message || "";
    byId("outbox-dot").className = `status-dot ${message ? "status-dot-error" : "status-dot-live"}`;
    byId("outbox-status").textContent = message ? "Trying again…" : "Live";
  }

  function showSummary(found) {
    serverNow = found.at;
    ["pending", "scheduled", "retrying", "dead", "published"].forEach((name) => {
      byId(`tile-${name}`).textContent = number(found[name]);
    });
    const oldest = found.oldest_age_seconds, note = byId("note-pending");
    note.textContent = oldest === null ? "nothing is due" : `oldest due for ${span(oldest)}`;
    note.classList.toggle("outbox-late", oldest !== null && oldest > 60);
    if (found.counted_seconds_ago > 5) { note.textContent += `, counted ${span(found.counted_seconds_ago)} ago`; }
    byId("note-scheduled").textContent = found.waiting
      ? `and ${number(found.waiting)} for the one before them` : "wait for their time";
    drawRates(found.rates, found.at);
    showRelays(found.relays);
    showQueues(found);
    fill("inbox", found.inbox.map((each) => row([
      element("td", each.task), element("td", number(each.suppressed), "text-end"),
      element("td", number(each.too_old), "text-end"),
    ])), 3, "None so far.");
  }

  function showRelays(relays) {
    fill("relays", relays.map((relay) => {
      const name = element("td", relay.id);
      if (relay.broker) { name.appendChild(element("span", `broker ${relay.broker}`, "outbox-aside")); }
      return row([
        name, element("td", relay.queues.join(", ") || "all"),
        element("td", span(relay.lag_seconds), `text-end${relay.lag_seconds > 60 ? " outbox-late" : ""}`),
        element("td", `${span(relay.heartbeat_age_seconds)} ago`, "text-end outbox-secondary"),
        element("td", number(relay.published), "text-end"),
      ]);
    }), 5, "No relay is alive: start one with “celery -A <your app> outbox relay”.");
  }

  function showQueues(found) {
    const known = new Map();
    const key = (each) => JSON.stringify([each.broker, each.queue]);
    found.queues.forEach((each) => known.set(key(each), { ...each }));
    const none = { pending: 0, scheduled: 0, waiting: 0, retrying: 0, dead: 0 };
    found.paused.forEach((each) => known.set(key(each), { ...none, ...known.get(key(each)), ...each, paused: true }));
    const queues = [...known.values()];
    fill("queues", queues.map((queue) => {
      const name = element("td", queue.queue);
      if (queue.broker) { name.appendChild(element("span", `broker ${queue.broker}`, "outbox-aside")); }
      if (queue.paused) {
        name.appendChild(document.createTextNode(" "));
        const badge = element("span", "paused", "badge outbox-state-paused");
        badge.title = `by ${queue.paused_by}, ${span(queue.seconds)} ago`;
        name.appendChild(badge);
      }
      const steer = element("td", null, "text-end");
      if (!unchangeable) { steer.appendChild(pauseButton(queue)); }
      const shown = ["pending", "scheduled", "waiting", "retrying", "dead"].map((each) => element(
        "td", number(queue[each]), `text-end${["pending", "dead"].includes(each) ? "" : " outbox-secondary"}`));
      return row([name, ...shown, steer]);
    }), 7, "No messages.");
    byId("outbox-queues").replaceChildren(...queues.map((queue) => new Option(queue.queue)));
  }

  function pauseButton(queue) {
    const verb = queue.paused ? "resume" : "pause";
    const button = element("button", queue.paused ? "Resume" : "Pause", "btn btn-outline-secondary");
    button.type = "button";
    button.addEventListener("click", async () => {
      try {
        await ask(`/api/queues/${verb}`, { queue: queue.queue, broker: queue.broker });
        await Promise.all([poll(), loadAudit()]);
      } catch (error) { toast(error.message, "danger"); }
    });
    return button;
  }

  function drawRates(rates, now) {
    const chart = byId("rate-chart"), width = chart.clientWidth || 600, height = chart.clientHeight || 176;
    const left = 46, right = width - 12, top = 12, bottom = height - 24;
    const shapes = [];
    function shape(tag, attributes, text) {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
      if (text !== undefined) { made.textContent = text; }
      shapes.push(made);
    }
    const most = niceCeiling(Math.max(1, ...rates.map((each) => Math.max(each.enqueued, each.published))));
    const x = (at) => right - (now - at) / PAST * (right - left);
    const y = (value) => bottom - value / most * (bottom - top);
    [0, 0.5, 1].forEach((part) => {
      shape("line", { class: "grid", x1: left, x2: right, y1: y(most * part), y2: y(most * part) });
      shape("text", { x: left - 6, y: y(most * part) + 4, "text-anchor": "end" }, rate(most * part));
    });
    [10, 5, 0].forEach((minutes) => shape("text", {
      x: x(now - minutes * 60), y: height - 6, "text-anchor": { 10: "start", 5: "middle", 0: "end" }[minutes],
    }, minutes ? `${minutes} min ago` : "now"));
    ["enqueued", "published"].forEach((name) => {
      const points = rates.filter((each) => now - each.at <= PAST)
        .map((each) => `${x(each.at).toFixed(1)},${y(each[name]).toFixed(1)}`);
      if (points.length) { shape("polyline", { class: `line ${name}`, points: points.join(" ") }); }
      const last = rates[rates.length - 1];
      byId(`rate-${name}`).textContent = last ? rate(last[name]) : "—";
    });
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.replaceChildren(...shapes);
  }

  function niceCeiling(value) {
    const unit = 10 ** Math.floor(Math.log10(value));
    return unit * [1, 2, 5, 10].find((step) => step * unit >= value);
  }

  async function poll() {
    try {
      showSummary(await ask("/api/summary"));
      showProblem("");
    } catch (error) { showProblem(error.message); }
  }

  // The list ---------------------------------------------------------------------------------------------------------

  const form = byId("filters");
  const FILTERS = ["task", "queue", "older_than", "text"];
  let state = "", trail = [], cursor = null, next = null, marked = new Set(), turn = 0, searching = false;

  function readAddress() {
    const given = new URLSearchParams(window.location.search);
    FILTERS.forEach((name) => { form.elements[name].value = given.get(name) || ""; });
    const wanted = given.get("state") || "";
    state = document.querySelector(`[data-state="${CSS.escape(wanted)}"]`) ? wanted : "";
  }

  function filter() {
    return Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value.trim()]).filter((each) => each[1]));
  }

  function showChoice() {
    document.querySelectorAll("[data-state]").forEach((button) => {
      const on = button.dataset.state === state;
      button.classList.toggle("active", on);
      button.setAttribute("aria-pressed", String(on));
    });
    const dead = state === "dead";
    byId("changes").classList.toggle("d-none", !dead || Boolean(unchangeable));
    byId("unchangeable").classList.toggle("d-none", !dead || !unchangeable);
    byId("unchangeable").textContent = unchangeable;
    document.querySelector(".outbox-messages").classList.toggle("outbox-markable", dead && !unchangeable);
    const query = new URLSearchParams({ ...(state ? { state } : {}), ...filter() }).toString();
    window.history.replaceState(null, "", query ? `?${query}` : window.location.pathname);
  }

  function showMarks() {
    document.querySelectorAll('[data-scope="ids"]').forEach((button) => { button.disabled = !marked.size; });
    const boxes = [...byId("messages").querySelectorAll("input[type=checkbox]")];
    boxes.forEach((box) => { box.checked = marked.has(Number(box.value)); });
    byId("mark-all").checked = boxes.length > 0 && boxes.every((box) => box.checked);
  }

  function messageRow(message) {
    const mark = element("td", null, "outbox-mark");
    if (message.state === "dead") {
      const box = element("input", null, "form-check-input");
      Object.assign(box, { type: "checkbox", value: message.id });
      box.setAttribute("aria-label", `Mark message ${message.id}`);
      box.addEventListener("change", () => {
        if (box.checked) { marked.add(message.id); } else { marked.delete(message.id); }
        showMarks();
      });
      mark.appendChild(box);
    }
    const link = element("a", message.id);
    link.href = page.dataset.message.replace(/0$/, message.id);
    const name = element("td", null, "outbox-id");
    name.appendChild(link);
    const stateCell = element("td");
    stateCell.appendChild(element("span", message.state, `badge outbox-state-${message.state}`));
    const details = element("td", null, "outbox-details");
    if (message.error) { details.appendChild(element("span", message.error, "outbox-wrong")); }
    else if (message.arguments) { details.appendChild(element("code", message.arguments)); }
    details.title = [message.arguments, message.error].filter(Boolean).join("\n");
    const queue = element("td", message.queue, "outbox-queue");
    if (message.broker) { queue.appendChild(element("span", message.broker, "outbox-aside")); }
    return row([mark, name, stateCell, element("td", message.task, "outbox-task"), queue,
      element("td", span(Math.max(0, serverNow - message.created_at)), "outbox-age"),
      element("td", message.attempts || "", "outbox-tries"), details]);
  }

  async function load() {
    const mine = ++turn, limit = ROWS;
    let found = [], where = cursor;
    showChoice();
    try {
      do {
        const query = new URLSearchParams({ ...filter(), limit: limit - found.length });
        if (state) { query.set("state", state); }
        if (where) { query.set("before", where); }
        const part = await ask(`/api/messages?${query}`);
        if (mine !== turn) { return; }
        found = found.concat(part.messages);
        where = next = part.next;
        searching = next !== null && found.length < limit;
        showRows(found);
      } while (searching);
    } catch (error) {
      if (mine === turn) { searching = false; byId("pager-text").textContent = error.message; }
    }
  }

  function showRows(found) {
    fill("messages", found.map(messageRow), 8, searching ? "Searching…" : "No messages match.");
    byId("pager-older").disabled = searching || next === null;
    byId("pager-newer").disabled = !trail.length;
    byId("pager-stop").hidden = !searching;
    byId("pager-text").textContent = searching
      ? `${number(found.length)} found so far, searching below message ${number(next)}…`
      : found.length ? `${number(found.length)} messages, the newest first` : "";
    showMarks();
  }

  function restart() {
    [trail, cursor, marked] = [[], null, new Set()];
    return load();
  }

  document.querySelectorAll("[data-state]").forEach((button) => button.addEventListener("click", () => {
    state = button.dataset.state;
    restart();
  }));
  let typing;
  form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(restart, 300); });
  form.addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(typing); restart(); });
  byId("pager-older").addEventListener("click", () => { trail.push(cursor); cursor = next; load(); });
  byId("pager-newer").addEventListener("click", () => { cursor = trail.pop(); load(); });
  byId("pager-stop").addEventListener("click", () => {
    turn += 1;
    searching = false;
    byId("pager-stop").hidden = true;
    byId("pager-older").disabled = false;
    byId("pager-text").textContent = `Stopped; “Older” goes on below message ${number(next)}.`;
  });
  byId("mark-all").addEventListener("change", () => {
    const ids = [...byId("messages").querySelectorAll("input[type=checkbox]")].map((box) => Number(box.value));
    ids.forEach((id) => { if (byId("mark-all").checked) { marked.add(id); } else { marked.delete(id); } });
    showMarks();
  });

  byId("changes").querySelectorAll("[data-verb]").forEach((button) => button.addEventListener("click", async () => {
    const { verb, scope } = button.dataset;
    try {
      let chosen = { ids: [...marked] }, count = marked.size;
      if (scope === "filter") {
        const wanted = filter(), preview = await ask(`/api/dead/count?${new URLSearchParams(wanted)}`);
        count = preview.count;
        chosen = { ...(Object.keys(wanted).length ? { filter: wanted } : { all: true }), dead_by: preview.dead_by };
        if (!count) { toast("No dead letters match.", "secondary"); return; }
      }
      if (await change(verb, chosen, count)) { await Promise.all([restart(), poll(), loadAudit()]); }
    } catch (error) { toast(error.message, "danger"); }
  }));

  // The record -------------------------------------------------------------------------------------------------------

  function describe(selection) {
    const words = Object.entries(selection).map(([name, value]) => {
      if (name === "ids") { return value.length > 5 ? `${value.length} marked` : `message ${value.join(", ")}`; }
      return name === "older_than" ? `older than ${span(value)}` : `${name} ${value}`;
    });
    return words.join(", ") || "all";
  }

  async function loadAudit() {
    try {
      const { changes } = await ask("/api/audit");
      fill("audit", changes.map((each) => {
        const who = element("td", each.who);
        who.appendChild(element("span", each.via, "outbox-aside"));
        const when = element("td", new Date(each.at * 1000).toLocaleString("sv"));
        return row([when, who, element("td", each.action),
          element("td", ["pause", "resume"].includes(each.action) ? "" : number(each.rows), "text-end"),
          element("td", describe(each.selection))]);
      }), 5, "None so far.");
    } catch (error) { /* the numbers say what is wrong */ }
  }

  // Start ------------------------------------------------------------------------------------------------------------

  function every(milliseconds, work) {
    setInterval(() => { if (!document.hidden) { work(); } }, milliseconds);
  }

  readAddress();
  const first = JSON.parse(byId("outbox-summary").textContent);
  if (first) { showSummary(first); showProblem(""); }
  load();
  loadAudit();
  every(POLL, poll);
  every(LIST_EVERY, () => {
    const asked = byId("outbox-dialog").classList.contains("show");
    if (!cursor && !marked.size && !searching && !asked) { load(); }
  });
  every(AUDIT_EVERY, loadAudit);
  window.addEventListener("resize", poll);
}());
