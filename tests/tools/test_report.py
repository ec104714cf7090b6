"""tools/report.py as it is called."""

import os
import subprocess
import sys
from pathlib import Path

from tests.report.run_folders import check_page, write_config


def test_command_writes_the_page_and_refuses_a_wrong_folder(tmp_path):
    write_config(tmp_path)
    root = Path(__file__).parents[2]
    command, environment = [sys.executable, str(root / "tools/report.py")], os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    check_page((tmp_path / "report.html").read_text())
    command += [str(tmp_path / "nowhere")]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: found no folder")
