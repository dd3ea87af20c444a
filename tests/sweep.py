"""Mutation testing: flip every sign and every comparison of the arithmetic, one at a time, and run the tests.

    python tests/sweep.py                          all files, an hour on two cores
    python tests/sweep.py minipref/optim.py ...    only these
    python tests/sweep.py --all                    also the equivalent mutants

Mutations: a + b and a - b, a * b and a / b (also +=, -=, *=, /=), -a, the six comparisons, `is`, `in`, `not a` and
`a if b else c`. Each mutant runs the quick tests in a forked process with a time limit, until the first failure. The
exit code is 1 if a mutant survives that is not in `EQUIVALENT`, which gives the reason why no test can detect it.
`tests/test_mutations.py` runs this for two files as a slow test.
"""

import argparse
import ast
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # as in conftest.py, before the import of torch

import torch
from mutation import failures, mutated, source_of

SECONDS = 1200          # a mutant that runs longer counts as detected: it has an endless loop

# File -> its tests, the most likely to fail first.
TESTS = {
    "minipref/model.py": ["test_positions", "test_attention", "test_encoder", "test_golden", "test_fast",
                          "test_parity"],
    "minipref/auxiliary.py": ["test_encoder"],
    "minipref/fast/__init__.py": ["test_fast", "test_encoder", "test_golden", "test_parity"],
    "minipref/fast/attention.py": ["test_fast", "test_attention", "test_encoder", "test_golden", "test_parity"],
    "minipref/fast/layers.py": ["test_fast", "test_encoder", "test_attention"],
    "minipref/optim.py": ["test_optim"],
}

# Equivalent mutants and the reason: (file, change), or (file, expression) for all mutations of the expression.
CUT = "division into blocks and tiles: changes only the speed"
NEAR = "more keys count as near: changes only the speed"
ROOM = "surplus columns of a table: any number is enough"
FORM = "either implementation of dropout: same distribution, other memory"
EQUIVALENT = {
    ("minipref/model.py", "log_bucket(torch.tensor(i - j), position_buckets, max_distance) + position_buckets"):
        "the table has 2 * position_buckets rows: a negative index finds the same row from its end",
    ("minipref/model.py", "distance.abs() <= exact -> distance.abs() < exact"):
        "at the last exact distance the logarithm is 0 and the formula gives that distance too",
    ("minipref/auxiliary.py", "-1"): "logits have two dimensions: the last is dimension 1",
    ("minipref/optim.py", "norm > max_norm -> norm >= max_norm"): "if they are equal, gradients are multiplied by 1",
    ("minipref/fast/attention.py", "q.dtype if is_one_block(L) else wide"):
        "only the rounding of bfloat16 sums",
    ("minipref/fast/attention.py", "L * L <= BLOCK_SCORES"): "only the rounding of bfloat16 sums",
    ("minipref/fast/attention.py", "L * L"): "only the rounding of bfloat16 sums",
    ("minipref/fast/attention.py", "BLOCK_SCORES // (len(keys) * n)"): CUT,
    ("minipref/fast/attention.py", "max(n, ends[stop]) ** 2 * (stop + 1 - start) <= most_scores"): CUT,
    ("minipref/fast/attention.py", "max(n, ends[stop]) ** 2 * (stop + 1 - start)"): CUT,
    ("minipref/fast/attention.py", "stop + 1 - start"): CUT,
    ("minipref/fast/attention.py", "stop + 1 -> stop - 1"): CUT,
    ("minipref/fast/attention.py",
     "min(max(others // 4, 64), 128) if dtype.itemsize > 2 else min(max(others, 64), 512)"):
        CUT,
    ("minipref/fast/attention.py", "dtype.itemsize > 2"): CUT,
    ("minipref/fast/attention.py", "others // 4"): CUT,
    ("minipref/fast/attention.py",
     "self.first + self.queries.shape[1] - 1 -> self.first + self.queries.shape[1] + 1"): NEAR,
    ("minipref/fast/attention.py", "self.first - reach + 1 -> self.first - reach - 1"): NEAR,
    ("minipref/fast/attention.py", "start >= LEAST_FAR -> start > LEAST_FAR"): NEAR,
    ("minipref/fast/attention.py", "stop <= n - LEAST_FAR -> stop < n - LEAST_FAR"): NEAR,
    ("minipref/fast/attention.py", "keys.start < keys.stop -> keys.start <= keys.stop"): "a product of no keys",
    ("minipref/fast/attention.py", "stop - start -> stop + start"): ROOM,
    ("minipref/fast/attention.py", "width % 512 == 0"): ROOM,
    ("minipref/fast/attention.py", "width += LANES"): ROOM,
    ("minipref/fast/attention.py", "-(b - a + others - 1) // LANES"): ROOM,
    ("minipref/fast/attention.py", "b - a + others - 1"): ROOM,
    ("minipref/fast/attention.py", "b - a"): ROOM,
    ("minipref/fast/attention.py", "2 * L - 1"): ROOM,
    ("minipref/fast/attention.py", "(len(buckets) + 1) // 2"): ROOM,
    ("minipref/fast/attention.py", "len(buckets) + 1"): ROOM,
    ("minipref/fast/attention.py", "others + c"): "an assertion that holds with a margin",
    ("minipref/fast/attention.py", "len(self.buffers[name]) < size"):
        "a buffer of exactly this size is used or allocated again",
    ("minipref/fast/layers.py", "2 ** 16 - 1"): "a rate above 0.99999",
    ("minipref/fast/layers.py", "-out.numel() // 4"): "more numbers are drawn than needed",
    ("minipref/fast/layers.py", "self.dropped - 2 ** 15"): "numbers of 16 bits: both sums are the same modulo 2^16",
    ("minipref/fast/layers.py", "self.p > 0"): FORM,
    ("minipref/fast/layers.py", "x.device.type == 'cpu'"): FORM,
}

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
OPPOSITES = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
             ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
ENDS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}       # differ only in equality


class Mutant(NamedTuple):
    file: str
    line: int
    expression: str       # 'a + b'
    change: str           # 'a + b -> a - b'
    source: str           # the mutated file

    @property
    def excuse(self) -> str | None:
        """The reason why it is equivalent, if it is listed."""
        return EQUIVALENT.get((self.file, self.change), EQUIVALENT.get((self.file, self.expression)))


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    source = source_of(file)
    found = []
    for node in ast.walk(ast.parse(source)):
        for other in turned(node):
            expression = ast.unparse(node)
            change = f"{expression} -> {ast.unparse(other)}"
            found.append(Mutant(file, node.lineno, expression, change, _spliced(source, node, other)))
    return sorted(found, key=lambda mutant: mutant.line)


def turned(node: ast.AST) -> list[ast.AST]:
    """The mutations of a node."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        return [_with(node, op=OPERATORS[type(node.op)]())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [_with(node, body=node.orelse, orelse=node.body)]
    if isinstance(node, ast.Compare):
        kinds = [type(op) for op in node.ops]
        return [_with(node, ops=[*node.ops[:i], table[kind](), *node.ops[i + 1:]])
                for i, kind in enumerate(kinds) for table in (OPPOSITES, ENDS) if kind in table]
    return []


def _with(node: ast.AST, **changes) -> ast.AST:
    return type(node)(**{name: getattr(node, name) for name in node._fields} | changes)


def _spliced(source: str, node: ast.AST, other: ast.AST) -> str:
    """The source with `node` replaced by `other`."""
    lines = source.encode().splitlines(keepends=True)                    # ast counts columns in bytes
    start = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    text = ast.unparse(other) if isinstance(node, ast.stmt) else f"({ast.unparse(other)})"
    return (source.encode()[:start] + text.encode() + source.encode()[end:]).decode()


def judged(found: list[Mutant], at_once: int, tests: list[str]) -> Iterator[tuple[Mutant, str]]:
    """Run these test files on each mutant, several in parallel. Yields it with the first failed test, or ''."""
    waiting, running = list(found), {}                     # pipe -> (mutant, process, time of its start)
    while waiting or running:
        while waiting and len(running) < at_once:
            mutant = waiting.pop(0)
            pipe, process = _started(mutant, tests)
            running[pipe] = mutant, process, time.monotonic()
        for pipe in select.select(list(running), [], [], 1)[0]:
            mutant, process, _ = running.pop(pipe)
            answer = os.read(pipe, 4000).decode()
            os.close(pipe)
            _, status = os.waitpid(process, 0)
            yield mutant, answer.removeprefix("failed: ") if status == 0 and answer else f"the process died ({status})"
        for pipe, (mutant, process, start) in list(running.items()):
            if time.monotonic() - start > SECONDS:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                os.close(pipe)
                del running[pipe]
                yield mutant, f"no end within {SECONDS} seconds"


def _started(mutant: Mutant, tests: list[str]) -> tuple[int, int]:
    """Run the tests on the mutant in a forked process, which may crash or hang. Returns its pipe and its id."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return reader, process
    answer = ""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        torch.set_num_threads = lambda number: None        # ignore conftest.py: this process has one core
        with mutated(mutant.file, mutant.source):
            answer = "failed: " + next(iter(failures([f"tests/{name}.py" for name in tests])), "")
    except BaseException as problem:                       # any exception is caused by the mutant
        answer = f"{type(problem).__name__}: {problem}"
    finally:
        os.write(writer, answer.encode()[:4000])
        os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--all", action="store_true", help="also run those listed as equivalent")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), metavar="N")
    arguments = parser.parse_args()
    import hypothesis  # noqa: F401 - imported once here, every forked process has it
    from transformers.models.deberta_v2 import modeling_deberta_v2  # noqa: F401

    unlisted, tests = [], list(dict.fromkeys(test for file in arguments.files for test in TESTS[file]))
    for _, test in judged([Mutant(arguments.files[0], 0, "", "", source_of(arguments.files[0]))], 1, tests):
        if test:
            print(f"{test} fails without any mutant")
            return 1
    for file in arguments.files:
        start, everything = time.monotonic(), mutants(file)
        found = [mutant for mutant in everything if arguments.all or not mutant.excuse]
        for mutant, test in judged(found, arguments.at_once, TESTS[file]):
            print(f"{file}:{mutant.line}: {mutant.change}: {test or f'SURVIVED ({mutant.excuse})'}", flush=True)
            if not (test or mutant.excuse):
                unlisted.append(mutant)
        print(f"{file}: {len(everything)} mutants, {len(everything) - len(found)} left out as equivalent, "
              f"{time.monotonic() - start:.0f} s", flush=True)
        stale = {text for name, text in EQUIVALENT if name == file}
        stale -= {m.change for m in everything} | {m.expression for m in everything}
        if stale:
            print(f"{file}: listed as equivalent and no longer there: {stale}")
            return 1
    for mutant in unlisted:
        print(f"NO TEST NOTICED {mutant.file}:{mutant.line}: {mutant.change}")
    return 1 if unlisted else 0


if __name__ == "__main__":
    sys.exit(main())
