"""deny.toml lets the dependencies of today through, and would not let others."""

import pytest
from conftest import REPOSITORY, run, tool

DENY = REPOSITORY / "deny.toml"


def check(config):
    # Offline: a build has fetched every package that the lock file names.
    command = [tool("cargo-deny"), "--locked", "--offline", "--config", config]
    return run(*command, "check", "--hide-inclusion-graph", "bans", "licenses", "sources", cwd=REPOSITORY)


def test_all_dependencies_are_allowed():
    done = check(DENY)
    assert done.returncode == 0, done.stderr
    assert "bans ok, licenses ok, sources ok" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ('  "ISC",\n', "", "licenses FAILED"),
        ('crate = "webpki-roots"', 'crate = "webpki-root"', "licenses FAILED"),
        ('wrappers = ["engine-tch"]', 'wrappers = ["engine"]', "bans FAILED"),
        ('{ crate = "tch", wrappers = ["engine-tch"] }', '"tonic"', "bans FAILED"),
        ('unknown-registry = "deny"', 'unknown-registry = "deny"\nallow-registry = []', "sources FAILED"),
    ],
)
def test_what_is_not_allowed_fails(tmp_path, old, new, verdict):
    text = DENY.read_text()
    assert text.count(old) == 1, old
    changed = tmp_path / "deny.toml"
    changed.write_text(text.replace(old, new))
    done = check(changed)
    assert done.returncode != 0
    assert verdict in done.stdout, done.stderr
