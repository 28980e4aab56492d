"""A filter of system calls for bubblewrap (--seccomp), written as the kernel's classic BPF (linux/filter.h, seccomp.h).

What Python programs of a benchmark never need and what could get around the sandbox's limits is refused with EPERM:
new processes (threads may be made), so that the limit on one process's memory is one on all of the program's; shared
memory and memory files, which that limit does not count; tracing; keyrings; namespaces and mounts; io_uring, bpf, perf.
"""

import platform
import struct

CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # actions
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions: all on 32-bit words
NUMBER, ARCHITECTURE, ARGUMENT_0 = 0, 4, 16  # where they are in struct seccomp_data

# (x86_64, aarch64); None: there is no such call.
REFUSED = {
    "fork": (57, None), "vfork": (58, None),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "personality": (135, 92),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, AUDIT_ARCH, the number of clone
CLONE3 = 435


def program(machine: str = "") -> bytes | None:
    """The filter for a machine, as --seccomp wants it; None for one whose numbers are not known here."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return None
    column, architecture, clone = MACHINES[machine]

    def step(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, k)

    words = [step(LOAD, ARCHITECTURE), step(EQUAL, architecture, 1), step(RETURN, KILL), step(LOAD, NUMBER)]
    words += [step(AT_LEAST, 0x40000000, 0, 1), step(RETURN, ERRNO | EPERM)]  # x32's numbers
    for number in (numbers[column] for numbers in REFUSED.values()):
        if number is not None:
            words += [step(EQUAL, number, 0, 1), step(RETURN, ERRNO | EPERM)]
    words += [
        step(EQUAL, CLONE3, 0, 1),
        step(RETURN, ERRNO | ENOSYS),
    ]  # its flags are out of reach: clone is tried next
    words += [step(EQUAL, clone, 1), step(RETURN, ALLOW), step(LOAD, ARGUMENT_0)]
    words += [step(ANY_BIT, CLONE_THREAD, 0, 1), step(RETURN, ALLOW), step(RETURN, ERRNO | EPERM)]
    return b"".join(words)
