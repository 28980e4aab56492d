"""A filter of system calls for bubblewrap (--seccomp), written as the kernel's classic BPF (linux/filter.h, seccomp.h).

What Python programs of a benchmark never need, and what could get around the sandbox's limits or reach the machine
through what is bound read-only, is refused with EPERM: such files can still be watched, locked and flushed to disk.
"""

import platform
import struct

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # actions; the last one ends the whole process
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions: all on 32-bit words
NUMBER, ARCHITECTURE, ARGUMENTS = (
    0,
    4,
    16,
)  # where they are in struct seccomp_data; an argument has 8 bytes, low ones first

# (x86_64, aarch64); None: there is no such call.
REFUSED = {
    # New processes, so that the limit on one process's memory is one on all of the program's; for threads see clone.
    "fork": (57, None), "vfork": (58, None),
    # Memory that this limit does not count.
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "io_setup": (206, 0),
    "vmsplice": (278, 75),
    # Other processes: their memory, descriptors and priorities.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # What other programs open or have in the page cache, and the kernel's log.
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "mincore": (27, 232), "cachestat": (451, 451), "preadv2": (327, 286), "pwritev2": (328, 287), "syslog": (103, 116),
    # Locks on the machine's files (see fcntl, too), their times, their place in the page cache and on disk (sync, too).
    "flock": (73, 32),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "fadvise64": (221, 223), "readahead": (187, 213),
    "syncfs": (306, 267), "fsync": (74, 82), "fdatasync": (75, 83), "msync": (26, 227), "sync_file_range": (277, 84),
    # Keyrings, mounts, namespaces, and large parts of the kernel that hold most of its bugs.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "personality": (135, 92),
    "modify_ldt": (154, None),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
}  # fmt: skip

# It cannot report an error: a program would go on as if it had flushed the machine's disks.
FATAL = {"sync": (162, 81)}

# Allowed for some values of one argument: the calls' numbers, which argument, the values.
AF_UNIX = 1  # not every other family is shut in by a network namespace (vsock), and TCP's memory is the machine's
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ = 0, 1, 2, 3, 4, 1030, 1032
SOME = {
    "prlimit64": ((302, 261), 0, (0,)),  # of this process alone
    "fcntl": ((72, 25), 1, (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ)),  # no locks
    "socket": ((41, 198), 0, (AF_UNIX,)),
}

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
CLONE, CLONE3, CLONE_THREAD = (56, 220), 435, 0x00010000


def program(machine: str = "") -> bytes | None:
    """The filter for a machine, as --seccomp wants it; None for one whose numbers are not known here."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return None
    column, architecture = MACHINES[machine]

    def step(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, k)

    refuse, allow = step(RETURN, ERRNO | EPERM), step(RETURN, ALLOW)
    words = [step(LOAD, ARCHITECTURE), step(EQUAL, architecture, 1), step(RETURN, KILL), step(LOAD, NUMBER)]
    words += [step(AT_LEAST, 0x40000000, 0, 1), refuse]  # x32's numbers
    for calls, action in ((REFUSED, refuse), (FATAL, step(RETURN, KILL))):
        for numbers in calls.values():
            if numbers[column] is not None:
                words += [step(EQUAL, numbers[column], 0, 1), action]
    for numbers, argument, values in SOME.values():
        words += [step(EQUAL, numbers[column], 0, 3 + len(values)), step(LOAD, ARGUMENTS + 8 * argument)]
        words += [step(EQUAL, value, len(values) - i) for i, value in enumerate(values)] + [refuse, allow]
    words += [
        step(EQUAL, CLONE3, 0, 1),
        step(RETURN, ERRNO | ENOSYS),
    ]  # its flags are out of reach: clone is tried next
    words += [step(EQUAL, CLONE[column], 1), allow, step(LOAD, ARGUMENTS)]
    words += [step(ANY_BIT, CLONE_THREAD, 0, 1), allow, refuse]
    return b"".join(words)
