"""What a command imports for good is not searched for cycles."""

import subprocess
import sys


def test_what_is_imported_is_left_alone_from_then_on():
    code = (
        "import gc, sys\n"
        "from alignkit.cli.lasting_imports import lasting_imports\n"
        "with lasting_imports():\n"
        "    assert not gc.isenabled()\n"
        "    kept = [[] for _ in range(10_000)]\n"
        "assert gc.isenabled()\n"
        "count = gc.get_freeze_count()\n"
        "assert count >= 10_000, count\n"
        "sys.modules['torch'] = sys\n"
        "with lasting_imports():\n"  # another command of a process that has everything
        "    assert gc.isenabled()\n"
        "    more = [[] for _ in range(10_000)]\n"
        "assert gc.get_freeze_count() <= count\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_import_that_fails_switches_the_search_on_again():
    code = (
        "import gc\n"
        "from alignkit.cli.lasting_imports import lasting_imports\n"
        "try:\n"
        "    with lasting_imports():\n"
        "        import there_is_no_such_module\n"
        "except ImportError:\n"
        "    assert gc.isenabled()\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
