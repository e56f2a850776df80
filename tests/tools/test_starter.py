"""lab/starter.py: what it starts behaves like a process of subprocess.Popen. (All other tests of whole runs use it.)"""

import os
import signal
import time

from conftest import starter


def start(tmp_path, text, **more):
    """Starts a script with this text."""
    (tmp_path / "script.py").write_text(text)
    return starter().start(dict(
        command=["script.py", "--flag"], environment=dict(os.environ, MARK="here"), cwd=str(tmp_path),
        stdout=str(tmp_path / "said"), stderr=str(tmp_path / "said"), **more))


def test_a_script_has_its_own_folder_environment_arguments_and_output(tmp_path):
    started = start(tmp_path, "import os, sys\nprint(os.getcwd(), sys.argv, os.environ['MARK'], __name__)\nsys.exit(3)")
    assert started.wait() == started.returncode == 3
    assert (tmp_path / "said").read_text() == f"{tmp_path} ['script.py', '--flag'] here __main__\n"


class Late:
    """A pipe behind which one waits for two seconds."""

    def __init__(self, pipe):
        self.pipe = pipe

    def write(self, line):
        self.pipe.write(line)
        self.pipe.flush()
        time.sleep(2)


def test_a_process_that_ended_at_once_is_seen(tmp_path, monkeypatch):
    """Its end is told together with its beginning then: an answer that was read ahead would never be seen."""
    start(tmp_path, "").wait()  # the server has imported everything now
    monkeypatch.setattr(starter().process, "stdin", Late(starter().process.stdin))
    started = start(tmp_path, "")
    deadline = time.monotonic() + 20
    while started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.returncode == 0


def test_a_process_can_be_ended(tmp_path):
    started = start(tmp_path, "import time\nopen('begun', 'w').close()\ntime.sleep(600)")
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.poll() is None
    started.terminate()
    assert started.wait() == -signal.SIGTERM
    started.terminate()  # nothing is left to end


def test_where_one_process_fails_the_others_are_ended(tmp_path):
    text = "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(2)\ntime.sleep(600)"
    started = start(tmp_path, text, processes=2)
    assert started.wait() in (2, -signal.SIGTERM)
    assert started.codes == [-signal.SIGTERM, 2]
