"""Where entries of a JSON file are, and a file that holds something else for a while."""

from contextlib import contextmanager


def paths_of(content, before=()):
    """Return the way to every entry of nested objects and lists."""
    found = [before] if before else []
    if isinstance(content, dict):
        entries = content.items()
    else:
        entries = enumerate(content) if isinstance(content, list) else ()
    for key, inner in entries:
        found += paths_of(inner, (*before, key))
    return found


@contextmanager
def damaged(file, content):
    """Put ``content`` into a file for a while."""
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(original)
