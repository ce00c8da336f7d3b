"""Do the tests notice faults? Plants those of `faults.txt`, one at a time, and runs the test that must fail.

    python tests/plant_faults.py            # about 15 minutes on two CPU cores
    python tests/plant_faults.py --check    # first see that the named tests pass as the code is
    python tests/plant_faults.py --only losses --only callbacks/export.py
    python tests/plant_faults.py --dry      # only see that each can be planted, in a second

`faults.txt` has a block of lines for each fault, with an empty line between two: `file`, `old` (a part of one line,
which stands in the file once), `new` (what takes its place), `test` (as pytest names it) and `why` (what would go
wrong). Where code or tests move, `file` and `test` have to follow.

A fault is caught if its test fails while it runs. A test that cannot be imported, or is not there, catches nothing.
The exit code is 0 if all are caught. Faults that other tests would notice too are planted all the same: what is counted
is whether each named test still guards what it guarded.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("faults.txt")
LIMIT = 900  # seconds of one test; pytest's own limit is shorter
PASSED, FAILED = 0, 1
REASONS = {
    PASSED: "the test passes",
    2: "the test cannot be collected",
    4: "there is no such test",
    5: "no test was run",
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        file: Where, from the root.
        old: A part of one of its lines.
        new: What takes its place.
        test: What must fail.
        why: What would go wrong.
    """

    file: str
    old: str
    new: str
    test: str
    why: str


def read_faults(path: Path) -> list[Fault]:
    """The faults of a table.

    Raises:
        ValueError: Naming the line of a block that lacks a key, or has one twice or an unknown one.
    """
    faults: list[Fault] = []
    block: dict[str, str] = {}
    keys = set(Fault.__dataclass_fields__)
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        if line.startswith("#"):
            continue
        if line.strip():
            key, _, value = line.partition(":")
            if key not in keys or key in block:
                raise ValueError(f"{path}:{number}: '{key}' is twice in its block or none of {', '.join(sorted(keys))}")
            block[key] = value.removeprefix(" ")
        elif block:
            if block.keys() != keys:
                raise ValueError(f"{path}:{number}: the block above lacks {', '.join(sorted(keys - block.keys()))}")
            faults.append(Fault(**block))
            block = {}
    return faults


def copy_tree(target: Path) -> None:
    """Copy what git knows, and what it does not ignore, as it stands now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in sorted(set(filter(None, listed.stdout.split("\0")))):
        if (ROOT / name).is_file():  # one that was deleted is listed still
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def planted(fault: Fault, root: Path) -> str | None:
    """The text with the fault in it; None if the old text is not there exactly once, or the new one is no Python."""
    path = root / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not fault.old or text.count(fault.old) != 1:
        return None
    changed = text.replace(fault.old, fault.new)
    try:
        ast.parse(changed)
    except SyntaxError:  # in a process that a test starts it would look like a failure
        return None
    return changed


def run_tests(root: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of pytest in a copy; marks leave no test out, and nothing is taken from elsewhere."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]
    # A file that changes twice in a second could be taken from its compiled form.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, ""
    return run.returncode, run.stdout


def outcome(fault: Fault, root: Path) -> str:
    """What becomes of one fault: `caught`, or what else; the copy is then as before."""
    path = root / fault.file
    text = planted(fault, root)
    if text is None:
        return "could not plant"
    before = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    try:
        code, _ = run_tests(root, "-x", fault.test)
    finally:
        path.write_text(before, encoding="utf-8")
    return "caught" if code == FAILED else f"MISSED ({REASONS.get(code, f'exit code {code}')})"


def check_unchanged(faults: list[Fault], root: Path) -> bool:
    """Whether the named tests pass as the code is, in one run."""
    tests = list(dict.fromkeys(fault.test for fault in faults))
    code, said = run_tests(root, *tests)
    print(f"unchanged: {said.strip().splitlines()[-1] if said.strip() else f'exit code {code}'}", flush=True)
    if code != PASSED:
        print(said)
    return code == PASSED


def main() -> int:
    """Print a line a fault, and how many are caught."""
    parser = argparse.ArgumentParser(description="Plant the faults of faults.txt, and see that the tests notice.")
    parser.add_argument("--check", action="store_true", help="first run the named tests on the unchanged code")
    parser.add_argument("--dry", action="store_true", help="only see that each fault can be planted")
    parser.add_argument("--only", action="append", help="faults whose file holds this text; can be given again")
    options = parser.parse_args()
    faults = read_faults(TABLE)
    if options.only:
        faults = [fault for fault in faults if any(word in fault.file for word in options.only)]
    if options.dry:
        wrong = [fault for fault in faults if planted(fault, ROOT) is None]
        for fault in wrong:
            print(f"could not plant: {fault.file}: {fault.old}")
        print(f"{len(faults) - len(wrong)} of {len(faults)} can be planted")
        return int(bool(wrong))
    caught = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        copy_tree(root)
        if options.check and not check_unchanged(faults, root):
            return 1
        for number, fault in enumerate(faults, start=1):
            begin = time.monotonic()
            found = outcome(fault, root)
            caught += found == "caught"
            seconds = time.monotonic() - begin
            print(f"{number:3} {found}: {fault.file}: {fault.why}  [{fault.test}, {seconds:.0f} s]", flush=True)
    print(f"{caught} of {len(faults)} caught")
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())
