// Before anything is painted: the theme that was chosen; without one, the system's.
document.documentElement.dataset.theme = localStorage.getItem("openqwen.theme") || "auto";
