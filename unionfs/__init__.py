"""A userspace copy-on-write union file system on pyfuse3 and trio.

How one request travels: kernel -> pyfuse3 -> `operations` (translates) -> `tree` (the verbs) -> `resolve` (the
union rule) over the facts that `layer` and `upper` read from disk.  `copyup` makes a lower object writable,
`inodes` remembers what the kernel remembers, `session` mounts and serves, `client` starts a server for others.
"""

__version__ = "0.1.0"
