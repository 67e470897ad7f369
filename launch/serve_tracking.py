"""Start the MLflow server that jobs log to and people look at; it ends with Ctrl-C, its data stay in `out`.

    python launch/serve_tracking.py out=runs/tracking                              one machine: a SQLite file, loopback
    python launch/serve_tracking.py out=/srv/jmt-tracking store=postgresql         a team: a PostgreSQL of its own in out
    python launch/serve_tracking.py out=/srv/jmt-tracking store=postgresql host=0.0.0.0 auth=true 'allowed_hosts=[tracking.internal]'

The last one is for the network of a cluster: user and password, and only under the names given. jmt_dist/track/README.md has more.
"""

from __future__ import annotations

from jmt_dist.program import run
from jmt_dist.recipe import build, word_layer


def main(words: list[str]) -> int:
    """Run the server until it is asked to end."""
    from jmt_dist.track.server import ServeOptions, serve

    return serve(build(ServeOptions, [word_layer(word) for word in words]))


if __name__ == "__main__":
    from jmt_dist.track.server import ServeOptions

    run(main, __doc__, [("Options", "", ServeOptions)])
