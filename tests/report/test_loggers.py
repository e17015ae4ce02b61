"""TensorBoard, wandb and MLflow: with stand-ins that are always there, and with the clients where those are."""

import copy
import errno
import math
import pathlib
import subprocess
import sys
import threading
import types

import house
import pytest

import seedtriton.report.loggers as module
from seedtriton import ConfigurationError
from seedtriton.report.loggers import MlflowSink, TensorBoardSink, WandbSink
from seedtriton.report.sinks import Telemetry

CLIENTS = ("tensorboard", "torch.utils.tensorboard", "wandb", "mlflow")


def event(step, **fields):
    return {"event": "epoch", "seed": "s", "epoch": step, "step": step, "stage": "TRAINING", "ratio": 0.5, **fields}


def test_importing_seedtriton_imports_none_of_them():
    code = f"import sys, seedtriton.telemetry, seedtriton.cli; print([m for m in {CLIENTS!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=house.ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "make, missing, package",
    [
        (lambda: TensorBoardSink("runs"), "torch.utils.tensorboard", "tensorboard"),
        (WandbSink, "wandb", "wandb"),
        (MlflowSink, "mlflow", "mlflow"),
    ],
)
def test_one_that_is_not_installed_is_an_error_that_names_the_package(monkeypatch, make, missing, package):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigurationError, match=f"needs {package}: pip install {package}"):
        make()


def uncopyable(kind):
    """A client as they are: with a lock inside."""
    made = kind()
    made.lock = threading.Lock()
    return made


# --- TensorBoard ---


class Writer:
    def __init__(self, folder=None):
        self.folder, self.scalars, self.flushed, self.closed, self.full = folder, [], 0, False, False

    def add_scalar(self, name, value, step):
        if self.full:
            raise OSError(errno.ENOSPC, "disk full")
        self.scalars.append((name, value, step))

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.closed = True


def test_tensorboard_takes_a_writer_and_leaves_it_open():
    writer = Writer()
    sink = TensorBoardSink(writer)
    sink(event(4))
    assert writer.scalars == [("growth/s/stage", 3.0, 4), ("growth/s/ratio", 0.5, 4)]
    assert writer.flushed == 2
    writer.full = True
    with pytest.raises(OSError, match="disk full"):
        sink(event(5))
    writer.full = False
    sink(event(6))
    sink.close()
    assert [step for _, _, step in writer.scalars] == [4, 4, 6, 6]
    assert not writer.closed


def test_tensorboard_in_a_folder_goes_on_with_a_new_writer_once_there_is_room(monkeypatch, tmp_path):
    made, room = [], [True]

    def make(folder):
        made.append(Writer(folder))
        return made[-1]

    def check_room(folder):
        if not room[0]:
            raise OSError(errno.ENOSPC, "disk full")

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = make
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(module, "_check_room", check_room)
    sink = TensorBoardSink(tmp_path / "runs")
    telemetry = Telemetry([sink])
    for step in range(6):
        room[0] = step not in (2, 3)
        made[-1].full = step == 2
        telemetry.emit(event(step))
    sink.close()
    assert [writer.folder for writer in made] == [str(tmp_path / "runs")] * 2
    assert [[step for _, _, step in writer.scalars[::2]] for writer in made] == [[0, 1], [4, 5]]
    assert all(writer.closed for writer in made)
    assert telemetry.lost == 2


def test_a_copy_of_one_in_a_folder_has_a_writer_of_its_own_there(monkeypatch, tmp_path):
    made = []
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = lambda folder: made.append(uncopyable(lambda: Writer(folder))) or made[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    sink = TensorBoardSink(tmp_path / "runs")
    twin = copy.deepcopy(sink)
    twin(event(1))
    twin.close()
    sink(event(2))
    assert [writer.folder for writer in made] == [str(tmp_path / "runs")] * 2
    assert [[step for _, _, step in writer.scalars[::2]] for writer in made] == [[2], [1]]
    assert [writer.closed for writer in made] == [False, True]


def test_room_is_looked_for_in_folders_of_this_machine_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module._check_room(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    module._check_room("s3://bucket/run")
    assert not pathlib.Path("s3:").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        module._check_room(str(tmp_path / "file"))
    monkeypatch.setattr(module, "_ROOM", 1 << 62)
    monkeypatch.setattr(module, "bytes", lambda size: b"x", raising=False)
    with pytest.raises(OSError, match="No space left"):
        module._check_room(str(tmp_path))


def test_what_is_neither_a_writer_nor_a_folder_is_refused():
    with pytest.raises(ConfigurationError, match="a SummaryWriter or a folder, got 3"):
        TensorBoardSink(3)


def test_the_real_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink(event(3))
    sink(event(5, ratio=math.nan))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("growth/s/stage")] == [(3, 3.0), (5, 3.0)]
    assert [each.step for each in found.Scalars("growth/s/ratio")] == [3, 5]
    sink.close()


# --- wandb ---


class Run:
    """Rows as wandb keeps them: values join the one being filled until it is committed or a later one begins."""

    def __init__(self):
        self.step, self.rows, self.filled, self.defined = 0, [], {}, {}

    def define_metric(self, name, step_metric=None, hidden=None):
        self.defined[name] = step_metric

    def log(self, values, step=None, commit=None):
        if step is not None and step < self.step:
            return  # wandb warns, and drops it
        if step is not None and step > self.step:
            self._commit(step)
        self.filled.update(values)
        if commit or (commit is None and step is None):
            self._commit(self.step + 1)

    def finish(self):
        self._commit(self.step + 1)

    def _commit(self, step):
        self.rows += [self.filled] if self.filled else []
        self.step, self.filled = step, {}


def drawn(run, name):
    return [(row["growth/step"], row[name]) for row in run.rows if name in row]


@pytest.mark.parametrize(
    "mine",
    [None, lambda run, name, epoch: run.log({name: epoch}), lambda run, name, epoch: run.log({name: epoch}, step=epoch),
     lambda run, name, epoch: run.log({name: epoch}, step=10 * epoch)],
    ids=["logs nothing", "without steps", "by epochs", "by steps"],
)  # fmt: skip
def test_wandb_gets_every_number_once_and_the_script_keeps_its_own_steps(mine):
    run = Run()
    sink = WandbSink(run)
    assert run.defined == {"growth/step": None, "growth/*": "growth/step"}
    for epoch in range(1, 6):
        for _ in range(3 if mine else 0):
            mine(run, "before", epoch)
        sink({**event(10 * epoch), "seed": None, "stage": None, "accuracy": 0.1 * epoch})
        sink(event(10 * epoch, ratio=epoch / 2))
        sink({"event": "prune_cancelled", "seed": None, "step": 10 * epoch})
        if mine:
            mine(run, "after", epoch)
    run.finish()
    assert drawn(run, "growth/s/ratio") == [(10 * epoch, epoch / 2) for epoch in range(1, 6)]
    assert [step for step, _ in drawn(run, "growth/accuracy")] == [10, 20, 30, 40, 50]
    for name in ("before", "after") if mine else ():
        assert {row[name] for row in run.rows if name in row} == {1, 2, 3, 4, 5}


def test_wandb_takes_the_active_run_and_says_where_there_is_none(monkeypatch):
    stand_in = types.ModuleType("wandb")
    stand_in.run = Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    WandbSink()(event(1))
    assert stand_in.run.filled["growth/s/ratio"] == 0.5
    stand_in.run = None
    with pytest.raises(ConfigurationError, match=r"no active run: call wandb\.init\(\)"):
        WandbSink()


def test_the_real_wandb_takes_events_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="p", mode="offline", dir=str(tmp_path)) as run:
        sink = WandbSink()
        sink(event(3))
        run.log({"mine": 1.0}, step=1)
        sink(event(4))
        sink(event(5))
        assert run.step == 2  # the row of 4, which the script's has joined, was committed for that of 5
        assert (run.summary["growth/step"], run.summary["mine"]) == (4, 1.0)
        run.log({"mine": 2.0}, step=2)
        run.log({"mine": 3.0}, step=3)
        assert (run.summary["growth/step"], run.summary["mine"]) == (5, 2.0)


# --- MLflow ---


@pytest.fixture
def client(monkeypatch):
    """A stand-in for mlflow; what it was given."""
    found = types.SimpleNamespace(batches=[], active=None)
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    mlflow.active_run = lambda: found.active
    mlflow.MlflowClient = lambda: types.SimpleNamespace(
        log_batch=lambda run, metrics: found.batches.append((run, metrics))
    )
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    mlflow.entities = entities
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return found


def mlflow_run(name):
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))


def test_mlflow_logs_to_the_run_that_was_active(client):
    client.active = mlflow_run("first")
    sink = MlflowSink()
    client.active = mlflow_run("second")
    sink(event(4))
    assert client.batches == [("first", [("growth/s/stage", 3.0, 4), ("growth/s/ratio", 0.5, 4)])]
    sink({"event": "epoch", "seed": None, "step": 5})
    assert len(client.batches) == 1


@pytest.mark.parametrize("run", [mlflow_run("told"), "told"])
def test_mlflow_logs_to_the_run_that_it_was_given_and_with_names_that_it_takes(client, run):
    MlflowSink(run)({**event(4), "seed": "layers.0-a b:c/ä+[x]", "stage": None})
    assert client.batches == [("told", [("growth/layers.0-a b:c/___x_/ratio", 0.5, 4)])]


def test_mlflow_says_where_no_run_is_active(client):
    with pytest.raises(ConfigurationError, match=r"no active run: call mlflow\.start_run\(\)"):
        MlflowSink()


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_the_real_mlflow_keeps_what_was_logged(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    with mlflow.start_run() as run:
        sink = MlflowSink()
        for step in (3, 5):
            sink({**event(step, ratio=step / 8, loss=math.inf), "seed": "a+b"})
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "growth/a_b/ratio")
    assert [(each.step, each.value) for each in history] == [(3, 3 / 8), (5, 5 / 8)]


# --- copies ---


@pytest.mark.parametrize("sink, kind, taken", [(TensorBoardSink, Writer, "scalars"), (WandbSink, Run, "filled")])
def test_a_copy_logs_to_the_same_client(sink, kind, taken):
    client = uncopyable(kind)
    telemetry = Telemetry([sink(client)])
    copy.deepcopy(telemetry).emit(event(1))
    assert getattr(client, taken)


def test_a_copy_of_one_for_mlflow_logs_to_the_same_run(client):
    telemetry = Telemetry([MlflowSink("told")])
    telemetry.sinks[0]._client.lock = threading.Lock()
    copy.deepcopy(telemetry).emit(event(4))
    assert [run for run, _ in client.batches] == ["told"]
