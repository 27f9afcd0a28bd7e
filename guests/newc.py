#!/usr/bin/env python3
"""Writes a cpio archive in the "newc" format, the one that Linux unpacks as its initial root file system.

    newc.py OUTPUT ENTRY...

An entry is one of
    dir:/path                 a directory, mode 0755
    file:/path:mode:source    a regular file with the contents of `source`; mode is octal
    link:/path:target         a symbolic link
    tree:/path:source         a whole directory, without sockets, FIFOs and device files

Everything belongs to root, times are zero and the order is that of the arguments (names sorted within a tree), so the
same input gives the same bytes and no privilege is needed. Source of the format: cpio(5), "New ASCII Format".
"""

import os
import stat
import sys


class Archive:
    def __init__(self, out):
        self.out = out
        self.inode = 0
        self.seen = set()

    def _pad(self):
        self.out.write(b"\0" * (-self.out.tell() % 4))

    def _member(self, path, mode, size):
        name = path.lstrip("/").encode() + b"\0"
        if size >= 1 << 32:
            raise SystemExit(f"newc.py: {path} is larger than 4 GiB, which the format cannot hold")
        self.inode += 1
        fields = (self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name), 0)
        self.out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        self._pad()

    def directory(self, path, mode=0o755):
        if path.strip("/") and path not in self.seen:
            self.seen.add(path)
            self._member(path, stat.S_IFDIR | mode, 0)

    def parents(self, path):
        parts = path.strip("/").split("/")[:-1]
        for depth in range(len(parts)):
            self.directory("/" + "/".join(parts[: depth + 1]))

    def file(self, path, mode, source):
        self.parents(path)
        size = os.path.getsize(source)
        self._member(path, stat.S_IFREG | mode, size)
        written = 0
        with open(source, "rb") as handle:
            while chunk := handle.read(1 << 20):
                written += len(chunk)
                self.out.write(chunk)
        if written != size:
            raise SystemExit(f"newc.py: {source} changed while it was read; run it again")
        self._pad()

    def link(self, path, target):
        self.parents(path)
        data = target.encode()
        self._member(path, stat.S_IFLNK | 0o777, len(data))
        self.out.write(data)
        self._pad()

    def tree(self, path, source):
        base = path.rstrip("/")
        for root, directories, files in os.walk(source):
            directories.sort()
            inside = base + root[len(source.rstrip("/")):]
            for name in sorted(directories + files):
                full, shown = os.path.join(root, name), f"{inside}/{name}"
                status = os.lstat(full)
                if stat.S_ISLNK(status.st_mode):
                    self.link(shown, os.readlink(full))
                elif stat.S_ISDIR(status.st_mode):
                    self.parents(shown)
                    self.directory(shown, stat.S_IMODE(status.st_mode))
                elif stat.S_ISREG(status.st_mode):
                    self.file(shown, stat.S_IMODE(status.st_mode), full)

    def finish(self):
        self._member("TRAILER!!!", 0, 0)


def main(arguments):
    if len(arguments) < 2:
        raise SystemExit(__doc__)
    output = arguments[0]
    temporary = output + ".new"
    with open(temporary, "wb") as handle:
        archive = Archive(handle)
        for entry in arguments[1:]:
            kind, _, rest = entry.partition(":")
            if kind == "dir":
                archive.directory(rest)
            elif kind == "file":
                path, mode, source = rest.split(":", 2)
                archive.file(path, int(mode, 8), source)
            elif kind == "link":
                path, target = rest.split(":", 1)
                archive.link(path, target)
            elif kind == "tree":
                path, source = rest.split(":", 1)
                archive.tree(path, source)
            else:
                raise SystemExit(f"newc.py: entry {entry!r} has an unknown kind: use dir, file, link or tree")
        archive.finish()
    os.replace(temporary, output)


if __name__ == "__main__":
    main(sys.argv[1:])
