/** Logging in, accepting an invitation, and changing the password. */

import * as api from "./api.js";
import { show } from "./dialog.js";
import { at, h, toast } from "./dom.js";
import { message } from "./parts.js";
import { t } from "./texts.js";

const SHORTEST = 10; // characters of a password

function field(id, label, props = {}, hint = null) {
  const described = { "aria-describedby": hint && `${id}-hint` };
  const input = h("input", { id, required: true, ...described, ...props });
  const note = hint && h("p", { class: "hint", id: `${id}-hint` }, hint);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, note);
}

const secret = (id, label, autocomplete) => field(id, label, { type: "password", autocomplete });
const chosen = (id, label) =>
  field(
    id,
    label,
    { type: "password", autocomplete: "new-password", minlength: SHORTEST },
    t("login.passwordHint", { shortest: SHORTEST }),
  );
const value = (id) => at(id).value;

/** A form that says what is wrong when `act()` fails. */
function form(fields, action, act) {
  const wrong = h("p", { class: "wrong", role: "alert" });
  const button = h("button", { class: "button primary" }, action);
  const onsubmit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    wrong.textContent = "";
    await act().catch((error) => (wrong.textContent = error.message));
    button.disabled = false;
  };
  return h("form", { class: "entrance", onsubmit }, fields, wrong, h("p", {}, button));
}

/** Ask for name and password. onlogin(): somebody is logged in. */
export function showLogin(onlogin) {
  const name = field("name", t("login.name"), { autocomplete: "username" });
  const fields = [name, secret("password", t("login.password"), "current-password")];
  const enter = async () => {
    await api.login(value("name").trim(), value("password"));
    await onlogin();
  };
  message(t("login.title"), h("p", {}, t("login.text")), form(fields, t("login.do"), enter));
  at("name").focus();
}

/** Show an invitation, or a link to a new password. */
export async function showInvitation(token, onlogin) {
  let found;
  try {
    found = await api.invitation(token);
  } catch (error) {
    const back = h("a", { href: "#/" }, t("login.title"));
    return message(t("invitation.bad"), h("p", {}, error.message), h("p", {}, back));
  }
  const given = { autocomplete: "username", value: found.name, readonly: Boolean(found.name) };
  const hint = found.name ? null : t("invitation.nameHint");
  const name = field("name", t("login.name"), given, hint);
  const key = found.name ? "invitation.reset" : "invitation.text";
  const text = t(key, { project: found.project, role: t(`role.${found.role}`) });
  const fields = [name, chosen("password", t("login.password"))];
  const enter = async () => {
    await api.accept(token, value("name").trim(), value("password"));
    await onlogin();
  };
  message(t("invitation.title"), h("p", {}, text), form(fields, t("invitation.do"), enter));
  at(found.name ? "password" : "name").focus();
}

/** A window in which a person changes the own password. */
export function showPassword() {
  const fields = [
    secret("old", t("login.old"), "current-password"),
    chosen("fresh", t("login.new")),
  ];
  const change = async () => {
    await api.password(value("old"), value("fresh"));
    dialog.close();
    toast(t("login.changed"));
  };
  const dialog = show(t("login.change"), "narrow", form(fields, t("login.change"), change));
}
