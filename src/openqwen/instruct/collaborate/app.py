"""`openqwen annotate PROJECT`: open a project, import, export, let a judge answer, or serve it."""

import asyncio
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from openqwen.http.gate import LOOPBACK, Gate
from openqwen.http.server import become_user, listen, open_url, run, uvicorn_server
from openqwen.instruct.collaborate.accounts import invite_first_owner
from openqwen.instruct.collaborate.export import write_exports
from openqwen.instruct.collaborate.read_tasks import ImportReport, import_file
from openqwen.instruct.collaborate.routes import application
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.support.progress import console, notice

_LARGEST = 2 << 20  # bytes of a request that is no import


def annotate(source: str, config: AnnotateConfig) -> None:
    """Serve a project until SIGTERM or SIGINT; with `export` or `judge` do that instead."""
    folder = Path(source)
    listener = None if config.export or config.judge else listen(config.host, config.port)
    become_user(config.user, folder if listener else None)
    site = Site(folder, config)
    try:
        for path in config.import_:
            _say(path, import_file(site.database, site.project, path))
        if config.judge:
            from openqwen.instruct.collaborate.judge_annotator import run_judge

            given = (config.judge, config.judge_tasks, None, config.judge_quantize)
            run_judge(site.database, site.project, *given)
        if config.export:
            for name, count in write_exports(site.database, site.project, config.export).items():
                console.print(f"{config.export / name}.jsonl: {count:,} records")
        if listener:
            url = open_url(listener)
            _greet(site, url)
            server = uvicorn_server(gated(site), config.idle, config.drain)
            asyncio.run(run(server, listener))
    finally:
        site.database.close()


def gated(site: Site) -> ASGIApp:
    """The site's application behind its gates. People show no key but a session.

    Only an import may be large: the body is read before anybody knows who sends it.
    """
    config, app = site.config, application(site)
    small, large = (
        Gate(app, [], site.hosts, frozenset(), limit, config.idle)
        for limit in (min(_LARGEST, config.max_body), config.max_body)
    )

    async def by_path(scope: Scope, receive: Receive, send: Send) -> None:
        gate = large if scope.get("path") == "/api/import" else small
        await gate(scope, receive, send)

    return by_path


def _greet(site: Site, url: str) -> None:
    console.print(f"{site.project.title}: {url}")
    if site.config.host not in LOOPBACK and not site.config.name:
        do = f"--name annotate.example.org; now it answers to {site.config.host} and localhost"
        notice("give the names by which browsers reach the site", do)
    with site.database.write() as connection:
        token = invite_first_owner(connection)
    if token:
        console.print("This link makes the first owner's account. It works once, for 7 days:")
        console.print(f"{url}/#/invitation/{token}")


def _say(path: Path, report: ImportReport) -> None:
    counts = f"{report.added:,} tasks added, {report.changed:,} changed, {report.same:,} known"
    console.print(f"{path}: {counts}, {report.answers:,} answers, {report.refused:,} refused")
    for fault in report.faults:
        notice(fault["message"], fault["where"])
