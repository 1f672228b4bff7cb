"""Jobs that several real processes share: the same table, no finished part lost, one line for all that goes wrong."""

import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import joint_job
import numpy as np
import pytest
from joint_job import ITEMS, begin, together

from jaxid import io as results
from jaxid.errors import InputError
from jaxid.meshes import ONE, Axes
from jaxid.places import Place, recognised, taken
from jaxid.processes import ALONE, Team, team, worker_devices

ROWS = [item for item in range(ITEMS) for _ in range(item % 3 + 1)]


def all_told(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("told*"))]


def started(folder: Path, count: int, **changes: object) -> list[ForkServerProcess]:
    """Several processes of one job in the folder `job`; what they print is in the files told0, told1 ..."""
    folder.mkdir(exist_ok=True)
    return [
        begin(folder / "job", arguments, told=folder / f"told{index}", **changes)
        for index, arguments in enumerate(together(count))
    ]


def codes(running: list[ForkServerProcess], seconds: float = 60.0) -> list[int | None]:
    """The exit codes of processes."""
    for process in running:
        process.join(seconds)
    found = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return found


def done(folder: Path) -> set[int]:
    stored = [int(path.stem) for path in (folder / "job" / "parts").glob("[0-9]*.parquet")]
    return {3 * part + item for part in stored for item in range(3)}


def require_whole(folder: Path) -> None:
    """The job is finished, and its table is that of a job that nothing happened to."""
    table = results.read_table(folder / "job" / "table.parquet")
    assert table["item"].to_pylist() == ROWS
    assert table["third"].to_pylist() == [row / 3 for row in ROWS]
    names = sorted(path.name for path in (folder / "job").iterdir())
    assert names == [".lock", "parts", "settings.json", "table.parquet"]
    assert len(list((folder / "job" / "parts").iterdir())) == ITEMS // 3


def test_processes_share_the_items(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert codes(started(tmp_path, 2, log=log)) == [0, 0]
    require_whole(tmp_path)
    assert sorted(map(int, log.read_text().split())) == list(range(ITEMS))
    assert all_told(tmp_path) == ["resumed 0 notes [[0], [1]]\n", ""]
    # Three processes find it finished.
    assert codes(started(tmp_path, 3, log=log)) == [0, 0, 0]
    assert all_told(tmp_path) == [f"resumed {ITEMS} notes [[0], [1], [2]]\n", "", ""]
    assert len(log.read_text().split()) == ITEMS


def killed_and_resumed(folder: Path, seed: int) -> None:
    """Kills one of two processes at a random moment, and resumes with one, two or three."""
    random = np.random.default_rng(seed)
    log, victim = folder.parent / f"{folder.name}-log", int(random.integers(2))
    running = started(folder, 2, pause=0.05, log=log)
    # One in five dies before it computes anything.
    computing, deadline = random.integers(5) > 0, time.monotonic() + 30
    while computing and not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.8))
    running[victim].kill()
    before = codes(running)
    assert before[victim] in (-signal.SIGKILL, 0)
    if before[victim] and before[1 - victim]:
        assert before[1 - victim] in (2, -signal.SIGABRT)
        told = (folder / f"told{1 - victim}").read_text()
        assert told.startswith("error: ") and told.count("\n") == 1, told
    there = done(folder)
    count = seed % 3 + 1
    log.write_text("")
    assert codes(started(folder, count, log=log)) == [0] * count, all_told(folder)
    require_whole(folder)
    assert sorted(map(int, log.read_text().split())) == sorted(set(range(ITEMS)) - there)


def test_a_process_is_killed(tmp_path: Path) -> None:
    running = started(tmp_path, 2, pause=0.05)
    while not {0, 30} <= done(tmp_path):
        time.sleep(0.01)
    running[1].kill()
    assert codes(running) == [2, -signal.SIGKILL]
    there = done(tmp_path)
    # Process 0 did all its own items.
    assert set(range(30)) < there < set(range(ITEMS))
    told = all_told(tmp_path)[0]
    assert told.startswith(
        f"error: process 1 stopped before its items were done: {len(there)} of {ITEMS} items are finished; run the "
        "same command again (it was not heard of for "
    )
    assert told.count("\n") == 1
    assert codes(started(tmp_path, 1)) == [0]
    require_whole(tmp_path)


@pytest.mark.slow
def test_process_0_is_killed(tmp_path: Path) -> None:
    running = started(tmp_path, 2, pause=0.05)
    while not {0, 30} <= done(tmp_path):
        time.sleep(0.01)
    running[0].kill()
    assert codes(running) == [-signal.SIGKILL, -signal.SIGABRT]
    there = done(tmp_path)
    assert all_told(tmp_path)[1] == (
        "error: process 0 stopped, and with it the coordinator; what is finished is kept: run the same command again.\n"
    )
    log = tmp_path / "log"
    assert codes(started(tmp_path, 3, log=log)) == [0, 0, 0]
    require_whole(tmp_path)
    assert set(map(int, log.read_text().split())) == set(range(ITEMS)) - there


@pytest.mark.slow
def test_one_of_two_is_killed_again_and_again(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        # Either process, early and late, and one that has computed nothing; resumed with one, two and three.
        seeds = (1, 3, 11, 17)
        for future in [pool.submit(killed_and_resumed, tmp_path / str(seed), seed) for seed in seeds]:
            future.result()


def failing(folder: Path, *each: Mapping[str, object], outs: Sequence[str] = ("job", "job")) -> list[str]:
    """The one line that each of several processes with their own changes prints when all must fail."""
    running = [
        begin(folder / outs[index], arguments, told=folder / f"told{index}", **changes)
        for index, (arguments, changes) in enumerate(zip(together(len(each)), each, strict=True))
    ]
    assert codes(running) == [2] * len(each)
    told = all_told(folder)
    assert all(text.startswith("error: ") and text.count("\n") == 1 for text in told), told
    return [text.removeprefix("error: ").strip() for text in told]


def test_other_settings_and_versions(tmp_path: Path) -> None:
    told = failing(tmp_path, {}, {"model": "other"})
    differ = 'settings: model is "none" in process 0, "other" in process 1'
    assert told == [f"the processes do not agree on {differ}; start all of them with the same options."] * 2
    assert not (tmp_path / "job").exists()
    told = failing(tmp_path, {}, {"jax": "0.1.2"})
    assert len(set(told)) == 1 and told[0].endswith('"0.1.2" in process 1; start all of them with the same options.')
    assert not (tmp_path / "job").exists()


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    told = failing(tmp_path, {"patience": 1.5}, {"patience": 1.5}, outs=("here", "there"))
    assert told[0].startswith(f"process 1 does not see the files that process 0 writes to {tmp_path / 'here'}; give")
    assert told[0].endswith("run the items in slices, --shard 1/N to N/N, and join them with jaxid merge.")


@pytest.mark.slow
def test_a_bad_item_of_either_process(tmp_path: Path) -> None:
    bad = {"bad": 40, "pause": 0.01}
    running = started(tmp_path, 2, **bad)
    assert codes(running) == [2, 2]
    told = all_told(tmp_path)
    line = "item '40': a bad one; --skip-bad skips such items."
    assert told[1] == f"error: {line}\n"
    assert told[0].startswith("error: process 1 stopped before its items were done: ")
    assert told[0].endswith(f"run the same command again ({line[:-1]}).\n")
    assert set(range(30)) <= done(tmp_path)
    other = tmp_path / "other"
    assert codes(started(other, 2, bad=4, pause=0.2)) == [2, 2]
    line = "item '4': a bad one; --skip-bad skips such items."
    assert all_told(other) == [f"error: {line}\n", f"error: process 0 stopped: {line}\n"]


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path) -> None:
    place = f"127.0.0.1:{joint_job.port()}"
    other = f"127.0.0.1:{joint_job.port()}"  # each waits for another one
    begun = time.monotonic()
    first = begin(tmp_path / "job", together(2, place)[0], told=tmp_path / "told0", join=3.0)
    second = begin(tmp_path / "job", together(2, other)[1], told=tmp_path / "told1", join=2.0)
    assert codes([first, second]) == [2, 2]
    told = all_told(tmp_path)
    assert told[0] == (
        f"error: not all of the 2 processes joined at {place} within 3 s; start each of them, with its own --process "
        "and the same --coordinator and --processes.\n"
    )
    assert told[1].startswith(f"error: the coordinator {other} does not answer (Connection refused, tried for 2 s); is")
    assert told[1].count("\n") == 1
    assert time.monotonic() - begun < 40


def test_a_port_in_use(tmp_path: Path) -> None:
    with joint_job.socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        place = f"127.0.0.1:{busy.getsockname()[1]}"
        assert codes([begin(tmp_path / "job", together(2, place)[0], told=tmp_path / "told0")]) == [2]
    assert all_told(tmp_path)[0] == (
        f"error: port {place.rpartition(':')[2]} of --coordinator is in use on this machine, or may not be used; "
        "choose another one.\n"
    )


def test_options_are_taken_off_the_command_line() -> None:
    rest, place = taken(["run", "x", "--processes=2", "--seed", "1", "--process", "1", "--coordinator", "[::1]:99"])
    assert rest == ["run", "x", "--seed", "1"] and place == Place("[::1]:99", 2, 1)
    assert taken(["run", "x"]) == (["run", "x"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 2 --process 0", r"--coordinator is missing"),
        ("--processes auto --process 0", r"or --processes auto alone; --coordinator is missing"),
        ("--coordinator a:1 --processes 2 --process 2", r"--process 2 is out of range: of 2 processes, the last has"),
        ("--coordinator a:1 --processes two --process 0", r"--processes is a whole number, not 'two'"),
        ("--coordinator a --processes 2 --process 0", r"the address of process 0, such as node1:9876, not 'a'"),
        ("--coordinator a:70000 --processes 2 --process 0", r"such as node1:9876, not 'a:70000'"),
        ("--process 1 --process 1", r"--process needs to be given once"),
        ("--coordinator a:1 --processes", r"--processes needs one value"),
        ("--processes auto", r"recognises Slurm, Open MPI, TPU pods, Kubernetes and torchrun, and finds none"),
    ],
)
def test_options_that_do_not_fit(arguments: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        taken(arguments.split())


def test_torchrun_and_slurm_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}
    assert recognised(torchrun) == Place("node0:29501", 8, 3, [1])
    slurm = {
        "SLURM_JOB_ID": "4096",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_NTASKS": "6",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert taken(["--processes", "auto"])[1] == Place("gpu07:61440", 6, 5, [1])
    # A process that is alone on its machine uses all of its devices.
    assert recognised(torchrun | {"LOCAL_WORLD_SIZE": "1"}).local_devices is None
    for node, tasks, own in (("1", "1(x4)", None), ("2", "2(x2),1", None), ("1", "2(x2),1", [1]), ("0", "8", [1])):
        monkeypatch.setenv("SLURM_NODEID", node)
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        assert taken(["--processes", "auto"])[1] == Place("gpu07:61440", 6, 5, own)


def test_alone_a_process_has_everything() -> None:
    assert team(Axes(4, 2)) == ALONE and ALONE.share([1, 2, 3]) == [1, 2, 3] and ALONE.exchange("x") == ["x"]
    axes, devices = worker_devices(Axes(4, 2))
    assert axes == (4, 2) and len(devices) == 8
    assert worker_devices(ONE)[0] == ONE


def test_shares_are_even_and_whole() -> None:
    for count in (0, 1, 7, 60):
        shares = [Team(worker, 4).share(range(count)) for worker in range(4)]
        assert [one for share in shares for one in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
