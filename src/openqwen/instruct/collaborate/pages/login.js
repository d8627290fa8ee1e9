/** Logging in, and accepting an invitation. */

import * as api from "./api.js";
import { at, h } from "./dom.js";
import { t } from "./texts.js";

const SHORTEST = 10; // characters of a password

function field(id, label, props = {}) {
  const input = h("input", { id, required: true, ...props });
  const hint = props.hint && h("p", { class: "hint", id: `${id}-hint` }, props.hint);
  if (hint) input.setAttribute("aria-describedby", `${id}-hint`);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, hint);
}

function form(title, text, fields, action, onsubmit) {
  const wrong = h("p", { class: "wrong", role: "alert" });
  const button = h("button", { class: "button primary" }, action);
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    wrong.textContent = "";
    try {
      await onsubmit();
    } catch (error) {
      wrong.textContent = error.message;
    }
    button.disabled = false;
  };
  at("main").replaceChildren(
    h(
      "form",
      { class: "message-box entrance", onsubmit: submit },
      h("h1", {}, title),
      text && h("p", {}, text),
      fields,
      wrong,
      h("p", {}, button),
    ),
  );
  at("name")?.focus();
}

const name = () => at("name").value.trim();
const password = () => at("password").value;

/** Ask for name and password. onlogin(): somebody is logged in. */
export function showLogin(onlogin) {
  const fields = [
    field("name", t("login.name"), { autocomplete: "username" }),
    field("password", t("login.password"), { type: "password", autocomplete: "current-password" }),
  ];
  form(t("login.title"), t("login.text"), fields, t("login.do"), async () => {
    await api.login(name(), password());
    await onlogin();
  });
}

/** Show an invitation, and make an account with it. */
export async function showInvitation(token, onlogin) {
  let found;
  try {
    found = await api.invitation(token);
  } catch (error) {
    const text = h("p", {}, error.message);
    const more = h("p", {}, h("a", { href: "#/" }, t("login.title")));
    const title = h("h1", {}, t("invitation.bad"));
    at("main").replaceChildren(h("section", { class: "message-box" }, title, text, more));
    return;
  }
  const fields = [
    field("name", t("login.name"), { autocomplete: "username", hint: t("invitation.nameHint") }),
    field("password", t("login.password"), {
      type: "password",
      autocomplete: "new-password",
      minlength: SHORTEST,
      hint: t("invitation.passwordHint", { shortest: SHORTEST }),
    }),
  ];
  const text = t("invitation.text", { project: found.project, role: t(`role.${found.role}`) });
  form(t("invitation.title"), text, fields, t("invitation.do"), async () => {
    await api.accept(token, name(), password());
    await onlogin();
  });
}
