import errno
import logging
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import grpo
from favchat_jax import command_line, train
from favchat_jax.config import Config
from favchat_jax.errors import RunError, UserError

CONFIG = "--config=configs/stage1.py"


@pytest.fixture(autouse=True)
def quiet_set_up(monkeypatch):
    """The process' logging and memory stay as they are."""
    monkeypatch.setattr(command_line, "_set_up_logging", lambda: None)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(command_line, "end_at_interrupt", lambda name: None)


@pytest.fixture
def options(monkeypatch):
    """Flags as the front doors have them, in a flag set of their own."""
    mine = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", mine)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # a second config is read into the first's module
    config = config_flags.DEFINE_config_file("config", None, "A config.", flag_values=mine)
    flags.DEFINE_integer("port", 1, "A number.", lower_bound=0, flag_values=mine)
    return config


def ending(capsys, main, *arguments, **how) -> tuple[int, str]:
    """Exit code and stderr of a command; nothing went to stdout."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["favchat_jax/command.py", *arguments])
        command_line.start(main, **how)
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    return ended.value.code, stderr


def test_a_command_that_did_its_work_exits_with_0(capsys, options):
    seen = []
    arguments = [CONFIG, "--config.batch=3", "--config.data.buckets=(64,96)", "--port=7"]
    code, stderr = ending(capsys, lambda: seen.append(options.value), *arguments)
    assert (code, stderr) == (0, "")
    assert (seen[0].batch, seen[0].data.buckets, flags.FLAGS.port) == (3, (64, 96), 7)


def test_the_tilde_of_an_option_is_the_users_home(capsys, options, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    place = flags.DEFINE_string("place", None, "A path.", flag_values=flags.FLAGS)
    seen = []
    arguments = [CONFIG, "--config.data.root=~/clips", "--place=~/run"]
    assert ending(capsys, lambda: seen.append((options.value.data.root, place.value)), *arguments) == (0, "")
    assert seen == [("/home/ada/clips", "/home/ada/run")]
    assert ending(capsys, lambda: seen.append(place.value), "--place=~") == (0, "") and seen[-1] == "~"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("clip.mp4 is empty: give another"), 2, "clip.mp4 is empty: give another"),
        (RunError("the loss of step 3 is nan"), 1, "the loss of step 3 is nan"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied"),
    ],
)
def test_a_failure_that_is_not_the_softwares_is_one_line_and_its_exit_code(error, code, line, capsys, options):
    def fail():
        raise error

    ended, stderr = ending(capsys, fail)
    assert ended == code and stderr.startswith(f"command: {line}") and stderr.count("\n") == 1


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_command_whose_reader_has_ended_ends_quietly(lines):
    main = f"lambda: [print('line') for _ in range({lines})]"
    code = f"import time; from favchat_jax import command_line; time.sleep(1); command_line.start({main}, ['command'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, b"")


@pytest.mark.parametrize("allocate", [lambda: jnp.zeros(2**48), lambda: np.ones(2**50)])
def test_a_lack_of_memory_is_one_line(allocate, capsys, options):
    ended, stderr = ending(capsys, allocate)
    assert ended == 1 and stderr.startswith("command: out of memory (") and stderr.count("\n") == 1
    assert "small-cards.md" in stderr
    ended, stderr = ending(capsys, allocate, less_memory="lower --config.batch")
    assert ended == 1 and stderr.endswith(": lower --config.batch\n")


def test_what_training_names_to_save_memory_are_fields_of_its_config():
    fields = Config.from_ml_collections(grpo.get_config()).to_json()
    named = re.findall(r"--config\.([\w.]+)|(rl\.\w+)", train.LESS_MEMORY)
    assert len(named) == 8
    for field in map("".join, named):
        part = fields
        for name in field.split("."):
            part = part[name]


@pytest.mark.parametrize(
    "error", [KeyError("weights"), OSError("a mistake"), ValueError("shape"), RuntimeError("INTERNAL: a kernel")]
)
def test_a_mistake_of_the_software_keeps_its_traceback(error, options):
    def fail():
        raise error

    with pytest.raises(type(error)):
        command_line.start(fail, ["command"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config.batchsize=3"], "unknown config option: --config.batchsize .see --print_config.\n"),
        (["--config.optimzer.learning_rate=3"], "--config.optimzer.learning_rate; did you mean optimizer.\n"),
        (["--config.data.nme=x"], "unknown config option: --config.data.nme; did you mean name.\n"),
        (["--config.model.umt.heads.no=3"], "unknown config option: .*model.umt.heads.no"),
        (["--config.batch=many"], "batch=many is not a whole number\n"),
        (["--config.batch=1.5"], "batch=1.5"),
        (["--config.data.flip=perhaps"], "data.flip=perhaps is not True or False\n"),
        (["--config.optimizer.learning_rate=fast"], "learning_rate=fast is not a number\n"),
        (["--config.model=3"], "model=3 is not a section: set one of its fields"),
        (["--nonsense=3"], "Unknown command line flag 'nonsense'"),
        (["--port=many"], "port=many"),
        (["--port=-1"], "port=-1"),
        (["--port"], "Missing value for flag --port"),
        (["stage3"], "unexpected argument 'stage3': options are written --name=value"),
        (["--config=configs/stage9.py"], "configs/stage9.py: there is no such file"),
        (["--config=configs"], "--config=configs: there is no such file"),
        (["--config=configs/stage1.py:preset=huge"], "preset=huge is unknown: choose one of tiny, base, paper"),
        (["--config=configs/stage1.py:flavour=sweet"], "'flavour=sweet' is unknown: use preset=, variant= or"),
        (["--config=README.md"], "README.md is not a config in Python; configs/ holds"),
        (["--config=configs/common.py"], "configs/common.py: .* missing .* 'stage'; expected is a get_config"),
        (["--config=configs/eval/rendered.py:preset=tiny"], "rendered.py.*get_config.. takes 0 .*; expected is"),
        (["--config=configs/__init__.py"], "--config=configs/__init__.py has no get_config..; configs/ holds"),
        (["--config", "configs/stage9.py"], "--config=configs/stage9.py: there is no such file"),
        (["--config.stepss=3"], "unknown config option: [^\\\\]*stepss[^\\\\]*$"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(arguments, line, capsys, options):
    if not any(argument.startswith("--config=") or argument == "--config" for argument in arguments):
        arguments = [CONFIG, *arguments]
    seen = []
    code, stderr = ending(capsys, lambda: seen.append(options.value), *arguments)
    assert code == 2 and stderr.count("\n") == 1 and stderr.startswith("command: "), stderr
    assert re.search(line, stderr), stderr
    assert not seen, "no work begins"


def test_a_mesh_is_read_from_its_text():
    assert command_line.read_mesh(None) is None
    assert command_line.read_mesh("data=2, tensor=4") == {"data": 2, "tensor": 4}
    for text in ("", "8", "data", "data=0", "model=2", "data=2;tensor=4", "data=-1", "data=2,data=x"):
        with pytest.raises(UserError, match=f"--mesh={text}: give numbers of devices along data, fsdp, tensor"):
            command_line.read_mesh(text)


def test_a_config_may_follow_its_option_after_a_space(capsys, options):
    seen = []
    code, stderr = ending(
        capsys, lambda: seen.append(options.value), "--config", "configs/stage3.py", "--config.batch=3"
    )
    assert (code, stderr, seen[0].stage, seen[0].batch) == (0, "", "stage3", 3)


def test_a_file_of_python_that_is_no_config_is_named(capsys, options, tmp_path):
    for text, line in (("def get_config(", "line 1: not a config in Python"), ("1 / 0", "cannot be read: .*division")):
        (tmp_path / "own.py").write_text(text)
        code, stderr = ending(capsys, lambda: None, f"--config={tmp_path}/own.py")
        assert code == 2 and re.search(f"own.py.*{line}", stderr) and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize("option", ["--help", "-help", "-h", "--helpshort", "--helpfull"])
def test_every_spelling_of_help_prints_the_options(option, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.start(lambda: None, ["command.py", option])
    assert ended.value.code == 0 and capsys.readouterr().err == ""


def test_messages_go_to_stderr_as_plain_lines_even_where_a_library_has_set_up_logging():
    script = (
        "import logging; logging.basicConfig(level='DEBUG', format='LIBRARY %(message)s')\n"
        "from favchat_jax import command_line\n"
        "def main():\n"
        "    logging.getLogger('favchat_jax').info('stage1 finished')\n"
        "    logging.getLogger('jax').info('no TPU here')\n"
        "    logging.getLogger('absl').error('a thread failed')\n"
        "command_line.start(main, ['command'])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "stage1 finished\n")
    assert logging.getLogger("favchat_jax").propagate, "a program that uses the package hears it in its own log"
