"""`openqwen instructions tree FOLDER`: a page on which people refine a tree of tags."""

import getpass
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import Field

from openqwen.http import errors
from openqwen.http.gate import LOOPBACK
from openqwen.http.json_body import JSON, JSONRoute
from openqwen.http.server import become_user, client_keys, listen, open_url, serve_app
from openqwen.http.settings import HttpConfig
from openqwen.http.static import SHARED, PageFiles
from openqwen.instruct.collaborate.tree import TREE
from openqwen.instruct.collaborate.tree_editor import EditRequest, TreeEditor
from openqwen.support.progress import console

Name = Annotated[str, Query(max_length=200)]
Place = Annotated[int, Query(ge=0, lt=1 << 31)]


class TreeConfig(HttpConfig):
    """The defaults are safe: loopback only, and a limit on everything."""

    port: int = Field(8300, ge=0, le=65535, description="port to listen on; 0: any free port")
    max_body: int = Field(1 << 20, gt=0, description="largest request, in bytes")
    edits: Path | None = Field(
        None, description="file of edits, such as that of an earlier run; default: in the folder"
    )


def application(editor: TreeEditor, title: str, person: str = "") -> FastAPI:
    """The application without its `Gate`. Routes are plain functions: each runs in a thread.

    person: the name under which edits are made where nobody gives another.
    """
    app = FastAPI(title="OpenQwen tree of tags", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = JSONRoute
    identity = hashlib.sha256(str(editor.path.resolve()).encode()).hexdigest()[:12]

    @app.get("/api/about")
    def about() -> Response:
        return JSON({"title": title, "id": identity, "person": person})

    @app.get("/api/tree")
    def tree(by: Name = "", version: Place | None = None) -> Response:
        return JSON(editor.state(by, version))

    @app.get("/api/history")
    def history(before: Place) -> Response:
        return JSON(editor.earlier(before))

    @app.get("/api/tag")
    def tag(name: Name, offset: Place = 0) -> Response:
        return JSON(editor.tag(name, offset))

    @app.post("/api/edits")
    def edit(request: EditRequest) -> Response:
        editor.edit(request)
        return JSON(editor.state(request.by))

    page_files().install(app)
    errors.install(app)
    return app


def page_files() -> PageFiles:
    """The files of the page."""
    return PageFiles(SHARED, files("openqwen.instruct.collaborate") / "tree_page")


def tree(source: str, config: TreeConfig) -> None:
    """Show a tree of tags on a page until SIGTERM or SIGINT."""
    folder = Path(source).parent if source.endswith(TREE) else Path(source)
    listener = listen(config.host, config.port)
    keys = client_keys(config)
    edits = config.edits or folder
    become_user(config.user, edits if edits.is_dir() else edits.parent)
    editor = TreeEditor(folder, config.edits)
    try:
        state = editor.state()
        counts = f"{len(state['tags']):,} tags, {state['version']:,} edits"
        console.print(f"{source}: {counts} in {editor.path}; {open_url(listener)}", markup=False)
        person = _user() if config.host in LOOPBACK and not keys else ""
        app = application(editor, folder.absolute().name, person)
        serve_app(app, config, listener, keys, page_files().paths)
    finally:
        editor.close()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the system has no name for this user
        return ""
