"""The judges of code benchmarks: they run in a sandbox beside the candidate's (see inside.py), on the standard library.

Each takes the candidate and the data of its trial and returns the verdicts on its groups of tests, {group: status} with
status passed, failed, timeout, died or garbled, and the reason of the first that is not passed.
"""

import copy
import json
import math
import reprlib
import time

from sandbox.inside import MAX_BYTES, MAX_OBJECTS, Failed, Remote, encode


def judge_asserts(candidate, data):
    """Run tests that are Python code (HumanEval's `check`, MBPP's asserts).

    data: program; reference, executed here, gives the tests the names that they use; remote, those of them that are the
    program's instead (None: every function and class of the reference); tests, {group: code}, of which one that is not
    passed fails the following ones, too.
    """
    namespace = {"__name__": "reference"}
    exec(data["reference"], namespace)
    remote = data["remote"] or [
        name for name, x in namespace.items() if callable(x) and getattr(x, "__module__", "") == "reference"
    ]
    namespace.update({name: Remote(candidate, name) for name in remote})
    verdict = dict.fromkeys(data["tests"], "failed")
    group, status, reason = "", "passed", ""
    try:
        with candidate.timed():
            candidate.load(data["program"])
            for group, tests in data["tests"].items():
                exec(tests, namespace)
                if candidate.failure:
                    raise Failed(candidate.failure)
                verdict[group] = "passed"
    except (Failed, Exception) as e:
        status = e.why if isinstance(e, Failed) else candidate.failure or "failed"
        reason = f"{group} {e!r:.300}".strip()
    return {**{g: v if v == "passed" else status for g, v in verdict.items()}, "reason": reason}


def judge_inputs(candidate, data):
    """EvalPlus: the program and the reference must agree on every input; base and plus inputs apart.

    data: program, reference, entry_point, task (MBPP's number, or 0), base and plus (lists of argument lists), atol,
    least and factor: a call may take max(least, factor * the reference's time) seconds.

    Unlike in EvalPlus, inputs whose answer is too large to be sent are left out: 5 of the 112 of Mbpp/255.
    """
    namespace = {"__name__": "reference"}
    exec(data["reference"], namespace)
    reference, name = namespace[data["entry_point"]], data["entry_point"]
    groups = [group for group in ("base", "plus") if group in data]
    verdict = {group: "failed" for group in groups}
    i, group = 0, groups[0]
    try:
        with candidate.timed():
            candidate.load(data["program"])
        for group in groups:
            atol = data["atol"]
            for i, arguments in enumerate(mbpp_inputs(data["task"], data[group])):
                start = time.monotonic()
                expected = reference(*copy.deepcopy(arguments))
                limit = max(data["least"], data["factor"] * (time.monotonic() - start))
                if leaves(expected) > MOST_LEAVES:
                    continue
                candidate.room = room(expected)
                if atol == 0 and is_floats(expected):
                    atol = 1e-6  # from here on, as in EvalPlus
                with candidate.timed(limit):
                    out = candidate.call(name, *arguments)
                    if not agree(name, data["task"], arguments, out, expected, atol):
                        out, expected = reprlib.repr(out), reprlib.repr(expected)
                        verdict["reason"] = f"{group} input {i}: {out:.100}, not {expected:.100}"
                        return verdict
            verdict[group] = "passed"
    except Failed as e:
        verdict |= {g: e.why for g in groups if verdict[g] != "passed"}
        verdict["reason"] = f"{group} input {i}"
    except Exception as e:
        verdict["reason"] = f"{group} input {i}: {e!r:.300}"
    return {"reason": "", **verdict}


MOST_LEAVES = 2_000_000


def leaves(x):
    """About how many numbers (or 8 characters) a value holds; no more are counted than it takes to say too many."""
    n, todo = 0, [x]
    while todo and n <= MOST_LEAVES:
        v = todo.pop()
        if isinstance(v, str):
            n += len(v) // 8
        elif isinstance(v, list | tuple | set | frozenset | dict):
            n += len(v)
            todo.extend(v.values() if isinstance(v, dict) else v)
    return n


def room(expected):
    """(bytes, objects) that an answer may have: twice as much as the right one, where that is large."""
    if (n := leaves(expected)) < MAX_OBJECTS // 4:
        return MAX_BYTES, MAX_OBJECTS
    size = len(json.dumps(encode(expected, lambda x: 0)))
    return max(MAX_BYTES, 2 * size), max(MAX_OBJECTS, 4 * n)


# ---------------------------------------------------------------------------------------------------------------------
# When outputs agree: EvalPlus' oracles
# ---------------------------------------------------------------------------------------------------------------------

# Tasks of MBPP where the order of the answer is free, and those where any answer but None is a match.
AS_SETS = (2, 7, 111, 140, 232, 249, 579, 769)
NOT_NONE = ("check_str", "text_match_three", "text_starta_endb")


def agree(name, task, arguments, out, expected, atol):
    """Whether an output is right. name: the function's; task: its number in MBPP, 0 for HumanEval."""
    if not task and name == "find_zero":  # any root of the polynomial
        return abs(sum(c * math.pow(out, i) for i, c in enumerate(*arguments))) <= max(atol, 1e-6)
    same = out == expected
    if task == 164:  # the task's tests contradict its text
        return True
    if task == 295:
        same = same or out == 0
    elif task == 558:
        same = same or out == digit_distance(*arguments)
    elif task == 581:
        same = same or abs(out - surface_area(*arguments)) <= atol
    elif task in AS_SETS:
        same = set(out) == set(expected)
    elif task and name in NOT_NONE:
        same = out == (expected is not None) if isinstance(out, bool) else (out is not None) == (expected is not None)
    if same or atol == 0:
        return bool(same)
    return type(out) is type(expected) and close(out, expected, atol)


def is_floats(x):
    """A float, or a list or tuple of floats that is not empty."""
    return isinstance(x, float) or (isinstance(x, list | tuple) and x and all(isinstance(v, float) for v in x))


def close(out, expected, atol, rtol=1e-7):
    """numpy.allclose for nested lists and tuples of numbers, which must have the same shape."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(out, list | tuple)
            and len(out) == len(expected)
            and all(close(a, b, atol, rtol) for a, b in zip(out, expected, strict=True))
        )
    return out == expected or abs(out - expected) <= atol + rtol * abs(expected) < math.inf


def digit_distance(a, b):
    width = max(len(str(a)), len(str(b)))
    return sum(abs(int(x) - int(y)) for x, y in zip(str(a).zfill(width), str(b).zfill(width), strict=True))


def surface_area(edge, height):
    """Of a square pyramid whose height is that of its apex, not of its sides."""
    return round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))


# ---------------------------------------------------------------------------------------------------------------------
# MBPP+'s inputs are JSON: which lists are tuples, sets or complex numbers depends on the task
# ---------------------------------------------------------------------------------------------------------------------


def tuples(x):
    return tuple(x)


def lists_of_tuples(x):
    return [tuple(v) for v in x]


def same(x):
    return x


def all_tuples(x):
    return tuple(all_tuples(v) for v in x) if isinstance(x, list) else x


# What is done to each argument; the last one serves for all that follow.
MBPP_ARGUMENTS = {
    tuples: "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    lists_of_tuples: "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
    (lists_of_tuples, same): "75 413 444 753",
    (same, tuples): "106 750",
    (tuples, same): "250 307 405 446 617 720 763 808",
    (lambda x: tuple(tuple(v) for v in x)): "259 401 445",
    (lambda x: tuple(tuple(v) if isinstance(v, list) else v for v in x)): "278",
    (lambda x: [set(v) if isinstance(v, list) and v else {} for v in x]): "115",
    (float, complex): "124",
    complex: "252",
    (lambda x: {k: tuple(v) for k, v in x.items()}, same): "722",
    all_tuples: "580 615 791",
}
CONVERSIONS = {int(task): how for how, tasks in MBPP_ARGUMENTS.items() for task in tasks.split()}


def mbpp_inputs(task, inputs):
    """The inputs of a task of MBPP+ with Python's types, from those of JSON. task 0 is HumanEval+: as they are."""
    if task not in CONVERSIONS:
        return inputs
    how = CONVERSIONS[task]
    how = how if isinstance(how, tuple) else (how,)
    return [[how[min(i, len(how) - 1)](x) for i, x in enumerate(arguments)] for arguments in inputs]
