/** The annotation site: who is logged in, which view the address names, and the line at the top. */

import * as api from "./api.js";
import { show } from "./dialog.js";
import { at, button, copy, h, iconButton, themeButton, toast, words } from "./dom.js";
import { press, showKeys } from "./keys.js";
import { showInvitation, showLogin, showPassword } from "./login.js";
import { MineView } from "./mine.js";
import { Outbox } from "./outbox.js";
import { message } from "./parts.js";
import { QualityView } from "./quality.js";
import { RankView } from "./rank.js";
import { ReviewView } from "./review.js";
import { languageChoice, speak, t } from "./texts.js";

const VIEWS = { rank: RankView, mine: MineView, review: ReviewView, quality: QualityView };
const ROLES = {
  annotator: ["rank", "mine"],
  reviewer: ["rank", "mine", "review", "quality"],
  owner: ["rank", "mine", "review", "quality"],
};
// A reviewer who opens the site takes no task: an open task of one's own cannot be reviewed.
const FIRST = { annotator: "rank", reviewer: "review", owner: "quality" };

/** What views share: who is logged in, the project, and the outbox. */
const site = {
  me: null,
  project: null,
  outbox: null,
  view: null,

  /** Show the view of the address anew. */
  async draw() {
    this.view?.close();
    this.view = null;
    const [, name = "", item = null] = location.hash.split("/");
    drawTop(name);
    if (name === "invitation" && item) return showInvitation(decodeURIComponent(item), enter);
    if (!this.me) return showLogin(enter);
    const allowed = ROLES[this.me.role];
    const chosen = allowed.includes(name) ? name : FIRST[this.me.role];
    const view = new VIEWS[chosen](this);
    this.view = view;
    document.title = `${t(`nav.${chosen}`)}: ${this.project.title}`;
    try {
      await view.open(item && decodeURIComponent(item));
    } catch (error) {
      if (this.view === view) this.trouble(error);
    }
  },

  /** Say what went wrong in place of the view. */
  trouble(error) {
    if (error.status === 401) return this.leave();
    const again = button(t("again"), () => this.draw(), "primary");
    message(t("trouble"), h("p", {}, error.message ?? String(error)), again);
    if (!(error instanceof api.Refusal)) throw error;
  },

  /** The session is over. What was done stays in this browser until the same person is back. */
  leave() {
    this.view?.close();
    this.outbox?.close();
    if (this.outbox?.waiting().length) toast(t("login.kept"));
    Object.assign(this, { me: null, outbox: null, view: null });
    return this.draw();
  },

  /** Open a task again that was answered or skipped. */
  async reopen(task) {
    try {
      const { task: found } = await api.reopen(task);
      if (!(this.view instanceof RankView)) history.pushState(null, "", "#/rank");
      this.view?.close(); // it may be waiting for the next task, which must not replace this one
      this.view = new RankView(this);
      drawTop("rank");
      this.view.start(found);
    } catch (error) {
      toast(error.message);
    }
  },

  /** Say beside the project's name what became of the work. */
  saved(text) {
    const n = this.outbox?.waiting().length;
    at("saved").textContent = n ? t("waiting", { n }) : text;
    at("saved").classList.toggle("wrong", Boolean(n));
  },
};

/** Learn who is logged in, and show the first view. */
async function enter() {
  const found = await api.me();
  site.outbox?.close();
  site.outbox = null;
  site.me = found?.person ?? null;
  site.project = found?.project ?? null;
  if (found) {
    await speak(found.project.language);
    site.outbox = new Outbox(`annotate.${found.project.id}.${found.person.id}`, {
      send: api.deliver,
      onchange: changed,
      onrefused: refused,
    });
    if (location.hash.startsWith("#/invitation")) history.replaceState(null, "", "#/");
  }
  await site.draw();
  const earlier = new Error(t("refused.earlier"));
  for (const entry of site.outbox?.list("refused") ?? []) refused(entry, earlier);
}

function changed() {
  site.saved(t("sent"));
  site.view?.settled?.();
}

/** The server does not take an answer: the person gets its text, so that nothing is lost. */
function refused(entry, error) {
  toast(t("refused", { why: error.message }), t("refused.copy"), async () => {
    await copy(JSON.stringify(entry.body, null, 2));
    site.outbox.drop("refused", entry.key);
    toast(words.copied);
  });
}

function drawTop(name) {
  const { me, project } = site;
  const links = me ? ROLES[me.role] : [];
  const current = links.includes(name) ? name : FIRST[me?.role];
  const link = (to) =>
    h("a", { href: `#/${to}`, "aria-current": to === current && "page" }, t(`nav.${to}`));
  at("top").replaceChildren(
    h("a", { class: "brand", href: "#/" }, project?.title ?? "OpenQwen"),
    links.length > 1 && h("nav", { "aria-label": t("nav.title") }, links.map(link)),
    h("span", { id: "saved", class: "hint", role: "status" }),
    h("span", { class: "gap" }),
    languageChoice(() => site.draw()),
    themeButton(t("theme")),
    me && iconButton("keys", t("keys.title"), showKeys),
    me && button(me.name, showPerson, "small", { "aria-haspopup": "dialog" }),
  );
  at("skip-link").textContent = t("skipLink");
}

/** Whose session this is, and what to do with it. */
function showPerson() {
  const { name, role } = site.me;
  const out = button(t("logout"), () => (dialog.close(), logout()), "primary");
  const change = button(t("login.change"), () => (dialog.close(), showPassword()));
  const actions = h("p", { class: "row" }, change, out);
  const dialog = show(name, "narrow", h("p", {}, t(`role.${role}`)), actions);
}

async function logout() {
  const n = site.outbox.waiting().length;
  if (n && !confirm(t("logout.waiting", { n }))) return;
  try {
    await api.logout();
    await site.leave();
  } catch (error) {
    toast(error.message);
  }
}

addEventListener("keydown", (event) => press(event, { help: showKeys, ...site.view?.keys?.() }));
addEventListener("hashchange", () => site.draw());
at("skip-link").addEventListener("click", (event) => (event.preventDefault(), at("main").focus()));
await speak();
await enter().catch((error) => (drawTop(""), site.trouble(error)));
