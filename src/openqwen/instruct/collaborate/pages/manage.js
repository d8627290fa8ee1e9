/** What the owner does: invitations, accounts, import and export. */

import * as api from "./api.js";
import { copyButton, h, toast } from "./dom.js";
import { button } from "./parts.js";
import { section, table } from "./plots.js";
import { moment, t } from "./texts.js";

const EXPORTS = ["demonstrations", "preferences", "pairs", "ranks", "models", "events"];
const ROLES = ["annotator", "reviewer", "owner"];
const DAYS = 7; // that an invitation can be used

/** The sections of the page. */
export async function manage() {
  const page = { link: h("p", { class: "row link", hidden: true }), lists: h("div", {}) };
  await lists(page);
  return [
    section("invite.title", [invitationForm(page), page.link, page.lists]),
    section("export.title", h("ul", {}, EXPORTS.map(exported))),
    section("import.title", importForm()),
  ];
}

/** Do something, then show the lists again. */
async function act(page, done) {
  try {
    const { link } = await done;
    if (link) showLink(page, link);
    await lists(page);
  } catch (error) {
    toast(error.message);
  }
}

function roleChoice(chosen, props) {
  const option = (value) => h("option", { value, selected: value === chosen }, t(`role.${value}`));
  return h("select", props, ROLES.map(option));
}

function invitationForm(page) {
  const role = roleChoice("annotator", { id: "invite-role" });
  const onsubmit = (event) => {
    event.preventDefault();
    act(page, api.invite(role.value, DAYS));
  };
  const label = h("label", { for: "invite-role" }, t("invite.role"));
  const go = h("button", { class: "button primary" }, t("invite.do"));
  return h("form", { class: "row", onsubmit }, label, role, go);
}

function showLink({ link: place }, link) {
  const text = h("code", { id: "invitation-link" }, link);
  place.replaceChildren(t("invite.once"), text, copyButton(() => link, t("invite.copy")));
  place.hidden = false;
}

async function lists(page) {
  const [{ invitations }, { people }] = await Promise.all([api.invitations(), api.people()]);
  const columns = (...names) => names.map((name) => ({ name: t(`column.${name}`) }));
  const open = invitations.map(({ id, role, name, expires }) => [
    name ?? t(`role.${role}`),
    t("invite.until", { time: moment(expires) }),
    button(t("invite.revoke"), () => act(page, api.revoke(id)), "small"),
  ]);
  const accounts = people.map((one) => account(page, one));
  page.lists.replaceChildren(
    ...(open.length ? [table(t("invite.list"), columns("for", "state", "action"), open)] : []),
    table(t("people.list"), columns("name", "role", "since", "action"), accounts),
  );
}

function account(page, { id, name, role, kind, active, since }) {
  const onchange = (event) => act(page, api.change(id, { role: event.target.value }));
  const props = { onchange, "aria-label": `${t("column.role")}: ${name}` };
  const state = active ? "people.stop" : "people.start";
  const actions = [
    button(t(state), () => act(page, api.change(id, { active: !active })), "small"),
    kind !== "model" && button(t("people.reset"), () => act(page, api.reset(id)), "small"),
  ];
  const choice = kind === "model" ? t("role.model") : roleChoice(role, props);
  return [name, choice, moment(since), h("span", { class: "row" }, actions)];
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
