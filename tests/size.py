"""Print the lines of every room; with `--check`, fail where a limit of `LIMITS` is passed.

python tests/size.py [--check]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_trl"
LIMITS = {"package": 17_480, "templates": 1_100, "module": 335}  # lines of Python, of templates and CSS, of one module


def count(paths) -> dict[Path, int]:
    return {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(paths)}


modules = count(PACKAGE.rglob("*.py"))
templates = count(path for path in PACKAGE.rglob("*") if path.suffix in (".j2", ".css", ".jinja"))
rooms = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
for room in rooms:
    own = [lines for path, lines in modules.items() if room in path.parents]
    tests = sum(count((ROOT / "tests" / room.name).rglob("*.py")).values())
    print(f"{room.name:10} {sum(own):6} lines, {len(own):3} modules, {tests:6} lines of tests")
longest = max(modules, key=modules.__getitem__)
totals = {"package": sum(modules.values()), "templates": sum(templates.values()), "module": modules[longest]}
print(f"{'tests':10} {sum(count((ROOT / 'tests').rglob('*.py')).values()):6} lines in all")
print(f"{'longest':10} {totals['module']:6} lines: {longest.relative_to(ROOT)}")
print(f"{'templates':10} {totals['templates']:6} lines")
print(f"{'package':10} {totals['package']:6} lines")
over = [
    f"{what}: {totals[what]} lines, the limit is {limit}" for what, limit in LIMITS.items() if totals[what] > limit
]
if over and "--check" in sys.argv:
    sys.exit("\n".join(over))
