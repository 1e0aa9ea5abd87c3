"""What isolates the sandbox: namespaces, resource limits, a filter of system calls.

It runs inside the sandbox's fresh interpreter, which starts in 20 ms: it imports nothing of t2ray and no slow module
(no `typing`, `json`, `re`). It supports Linux on x86-64 and aarch64; on another machine the filter raises KeyError,
which the child reports as "no isolation".
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_MACHINE = os.uname().machine

# linux/mount.h, sched.h, prctl.h
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_KEPT_FLAGS = 1 | 2 | 4 | 8  # read-only, nosuid, nodev, noexec: a user namespace may not clear them on a remount
_DETACH = 2
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

# System calls that computing an answer never needs, by their numbers on x86-64 and aarch64 (None: there is no such
# call): new processes, threads and programs; signals to others; reading other processes' memory; sockets; memory
# outside the limit; and the kernel's larger attack surfaces.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "setpriority": (141, 140), "sched_setscheduler": (144, 119),
}  # fmt: skip
_ARCHITECTURE = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of _REFUSED, AUDIT_ARCH_*


def _call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def die_with_parent() -> None:
    """Has this process killed when its parent ends, however the parent ends."""
    _call(_libc.prctl(_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")


def end_with_child() -> None:
    """Continues in a child process; the calling process stays and, when the child ends, ends all that is left of it.

    A process that leaves the session, or whose parent has ended, becomes a child of the calling process and is ended
    too. SIGTERM ends them earlier, and so does the end of the calling process's parent.

    Raises:
        OSError: the system does not allow it.
    """
    import signal  # slow; only a sandbox without isolation needs it

    awaited = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    _call(_libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
    _call(_libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0), "prctl")
    child = os.fork()
    if not child:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        return
    while signal.sigwait(awaited) != signal.SIGTERM:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    while True:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            os._exit(0)


def enter_namespaces(shown: list[str]) -> None:
    """Continues in a child process, in namespaces of its own, with a root folder that has only the paths `shown`.

    These paths are read-only. There is no network, no other process, no /proc, /dev, /home or /etc; the working folder
    is an empty file system of 16 MB. If root calls it, the child gets a user id that nobody else has. The calling
    process waits for the child and ends with its exit code.

    Raises:
        OSError: the system does not allow it.
    """
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    user, group = os.geteuid(), os.getegid()
    if user != 0 or _libc.unshare(flags) != 0:
        _call(_libc.unshare(_NEWUSER | flags), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        stranger = None
    else:
        # An id that no account has: no file belongs to it, and the process limit counts this sandbox's processes alone.
        stranger = 0x60000000 | int.from_bytes(os.urandom(3), "big")
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    _new_root([os.path.realpath(path) for path in shown], shown)
    if stranger is not None:
        os.setgroups([])
        os.setresgid(stranger, stranger, stranger)
        os.setresuid(stranger, stranger, stranger)
    die_with_parent()  # after the change of user, which resets it


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _new_root(sources: list[str], shown: list[str]) -> None:
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("box", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    pivot_root = _REFUSED["pivot_root"][_ARCHITECTURE[_MACHINE][0]]
    _call(_libc.syscall(pivot_root, b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    for source, path in zip(sources, shown, strict=True):
        if os.path.isdir(f"/old{source}"):
            os.makedirs(path, exist_ok=True)
            _mount(f"/old{source}", path, None, _BIND | _REC)
            kept = os.statvfs(path).f_flag & _KEPT_FLAGS
            _mount(None, path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)
    os.mkdir("/box")
    enter_box()
    _call(_libc.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def enter_box() -> None:
    """Makes an empty file system of 16 MB and 255 files the working folder, at /box.

    Raises:
        OSError: the system does not allow it.
    """
    _mount("box", "/box", "tmpfs", _NOSUID | _NODEV, "size=16m,nr_inodes=256,mode=777")
    os.chdir("/box")


def limit(memory_mb: int, cpu_s: int) -> None:
    """Limits this process: address space, CPU seconds, files of 16 MB, 64 open files, no core dump, no new process."""
    for kind, most in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 1),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def give_up_rights(refuse_calls: bool) -> None:
    """Drops all capabilities for good, hides this process's memory from others of its user; may filter its calls."""
    header = struct.pack("=Ii", 0x20080522, 0)
    _call(_libc.capset(header, bytes(24)), "capset")
    _call(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _call(_libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    if refuse_calls:
        _filter_calls()


def _filter_calls() -> None:
    """Installs a seccomp filter (linux/filter.h): EPERM for refused calls; a call of another architecture kills."""
    column, architecture = _ARCHITECTURE[_MACHINE]
    numbers = [pair[column] for pair in _REFUSED.values()]
    refused = [number for number in numbers if number is not None]

    def instruction(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    program = [
        instruction(load, 0, 0, 4),  # seccomp_data.arch
        instruction(equal, 1, 0, architecture),
        instruction(answer, 0, 0, 0x80000000),  # kill the process
        instruction(load, 0, 0, 0),  # seccomp_data.nr
        instruction(at_least, len(refused) + 1, 0, 0x40000000),  # x86-64's second set of numbers (x32)
    ]
    for i, number in enumerate(refused):
        program.append(instruction(equal, len(refused) - i, 0, number))
    program.append(instruction(answer, 0, 0, 0x7FFF0000))  # allow
    program.append(instruction(answer, 0, 0, 0x00050000 | 1))  # EPERM
    code = ctypes.create_string_buffer(b"".join(program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _call(_libc.prctl(_SET_SECCOMP, 2, head, 0, 0), "seccomp")
