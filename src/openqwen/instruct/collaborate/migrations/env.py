"""Alembic's environment: migrations run on the connection that `database.py` passes."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], transactional_ddl=True, render_as_batch=True
)
context.run_migrations()
