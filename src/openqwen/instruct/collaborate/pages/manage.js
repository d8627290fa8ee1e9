/** What the owner does: invitations, accounts, import and export. */

import * as api from "./api.js";
import { button, copyButton, h, toast } from "./dom.js";
import { section, table } from "./plots.js";
import { moment, t } from "./texts.js";

const EXPORTS = ["demonstrations", "preferences", "pairs", "ranks", "models", "events"];
const ROLES = ["annotator", "reviewer", "owner"];
const DAYS = 7; // that an invitation can be used

export class Management {
  constructor() {
    this.link = h("p", { class: "row link", hidden: true });
    this.lists = h("div", {});
  }

  sections() {
    return [
      section("invite.title", [this.form(), this.link, this.lists]),
      section("export.title", h("ul", {}, EXPORTS.map(exported))),
      section("import.title", importForm()),
    ];
  }

  /** Do something, then show the lists again. */
  async act(done) {
    try {
      const { link } = await done;
      if (link) this.showLink(link);
      await this.list();
    } catch (error) {
      toast(error.message);
    }
  }

  form() {
    const role = roleChoice("annotator", { id: "invite-role" });
    const onsubmit = (event) => {
      event.preventDefault();
      this.act(api.invite(role.value, DAYS));
    };
    const label = h("label", { for: "invite-role" }, t("invite.role"));
    const go = h("button", { class: "button primary" }, t("invite.do"));
    return h("form", { class: "row", onsubmit }, label, role, go);
  }

  showLink(link) {
    const text = h("code", { id: "invitation-link" }, link);
    const copy = copyButton(() => link, t("invite.copy"));
    this.link.replaceChildren(t("invite.once"), text, copy);
    this.link.hidden = false;
  }

  /** Show the open invitations and the accounts. */
  async list() {
    const [{ invitations }, { people }] = await Promise.all([api.invitations(), api.people()]);
    const columns = (...names) => names.map((name) => ({ name: t(`column.${name}`) }));
    const open = invitations.map(({ id, role, name, expires }) => [
      name ?? t(`role.${role}`),
      t("invite.until", { time: moment(expires) }),
      button(t("invite.revoke"), () => this.act(api.revoke(id)), "small"),
    ]);
    const accounts = people.map((one) => this.account(one));
    this.lists.replaceChildren(
      ...(open.length ? [table(t("invite.list"), columns("for", "state", "action"), open)] : []),
      table(t("people.list"), columns("name", "role", "since", "action"), accounts),
    );
  }

  account({ id, name, role, kind, active, since }) {
    const act = (text, done) => button(t(text), () => this.act(done()), "small");
    const onchange = (event) => this.act(api.change(id, { role: event.target.value }));
    const said = { "aria-label": `${t("column.role")}: ${name}` };
    const human = kind === "human";
    const actions = [
      act(active ? "people.stop" : "people.start", () => api.change(id, { active: !active })),
      human && act("people.reset", () => api.reset(id)),
    ];
    const choice = human ? roleChoice(role, { onchange, ...said }) : t(`kind.${kind}`);
    return [name, choice, moment(since), h("span", { class: "row" }, actions)];
  }
}

function roleChoice(chosen, props) {
  const option = (value) => h("option", { value, selected: value === chosen }, t(`role.${value}`));
  return h("select", props, ROLES.map(option));
}

const exported = (name) =>
  h("li", {}, h("a", { href: `api/export/${name}`, download: "" }, t(`export.${name}`)));

function importForm() {
  const report = h("div", { class: "note", role: "status" });
  const onchange = async () => {
    const [file] = input.files;
    report.replaceChildren(t("import.running"));
    try {
      const found = await api.upload(file);
      const faults = found.faults.map(({ where, message }) => h("li", {}, `${where}: ${message}`));
      report.replaceChildren(t("import.done", found), h("ul", {}, faults));
    } catch (error) {
      report.replaceChildren(error.message);
    }
    input.value = "";
  };
  const input = h("input", { type: "file", id: "import-file", onchange });
  return [h("label", { for: "import-file" }, t("import.file")), input, report];
}
