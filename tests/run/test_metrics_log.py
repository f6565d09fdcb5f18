import io
import json
import math
import time

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from dnas_ens.errors import UserError
from dnas_ens.run.metrics_log import MetricsLog


def accumulated(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_the_same_scalars_in_both_places_and_no_line_twice_when_resumed(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 7):
        log.log({"loss": 10.0 + step}, step=step, epoch=step // 2, phase="search")
        log.log({"loss": -1.0}, step=step, phase="retrain")
    # Both can be read while the log is open: a killed process loses nothing.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log.read() == lines
    assert [line["epoch"] for line in lines[::2]] == [0, 1, 1, 2, 2, 3]
    assert lines[1]["epoch"] is None
    # The process ends without closing anything, perhaps within a line.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"time": 1, "pha')

    # TensorBoard orders event files by the second in their names; within one, by a count compared as text.
    time.sleep(1.1)
    resumed = MetricsLog(tmp_path)
    resumed.truncate("search", step=4)
    for step in (5, 6, 7):
        resumed.log({"loss": 20.0 + step}, step=step, phase="search")
    resumed.close()
    log.close()
    expected = {1: 11.0, 2: 12.0, 3: 13.0, 4: 14.0, 5: 25.0, 6: 26.0, 7: 27.0}
    assert [(line["step"], line["loss"]) for line in resumed.read("search")] == list(expected.items())
    assert [line["step"] for line in resumed.read("retrain")] == [1, 2, 3, 4, 5, 6]
    events = accumulated(tmp_path / "tensorboard" / "search").Scalars("search/loss")
    assert {event.step: event.value for event in events} == expected
    assert len(events) == len(expected)
    others = accumulated(tmp_path / "tensorboard" / "retrain").Scalars("retrain/loss")
    assert [event.step for event in others] == [1, 2, 3, 4, 5, 6]


def test_nan_is_null_in_json_and_nan_in_tensorboard(tmp_path):
    log = MetricsLog(tmp_path)
    log.truncate("search", step=3)
    assert log.read() == []
    log.log({"tau": math.nan, "big": math.inf}, step=1, phase="search")
    with pytest.raises(ValueError, match="step"):
        log.log({"step": 1.0}, step=1, phase="search")
    log.close()
    (line,) = log.read()
    assert (line["tau"], line["big"]) == (None, None)
    assert math.isnan(accumulated(tmp_path / "tensorboard" / "search").Scalars("search/tau")[0].value)


def test_a_damaged_line_is_told_and_the_others_read(tmp_path, capsys):
    log = MetricsLog(tmp_path)
    log.path.write_bytes(b'{"phase": "a", "step": 1}\n{"time": \xff]\n{"phase": "a", "step": 2}\n')
    assert [line["step"] for line in log.read()] == [1, 2]
    assert "line 2 is passed over" in capsys.readouterr().err
    # Resuming goes on, and so does the file.
    log.truncate("a", step=1)
    assert [line["step"] for line in log.read()] == [1]
    for line in ("5", '{"phase": "search"}'):
        log.path.write_text(line + "\n")
        with pytest.raises(UserError, match="line 1 is not of this log"):
            log.read()


def test_figures_and_hyper_parameters_stand_beside_the_scalars(tmp_path):
    # Its own folder for TensorBoard, as a member's log has.
    log = MetricsLog(tmp_path / "members" / "3", tensorboard=tmp_path / "tensorboard")
    log.add_figure("cells", Figure(figsize=(2, 1), dpi=50, facecolor=(1.0, 0.0, 0.0)), step=4, phase="search")
    config = {"seed": 3, "bilevel": {"epochs": 5, "augment": True}, "penalty": "js", "knots": [0, 1]}
    log.add_hparams(config, phase="search", metrics=["loss"])
    log.log({"loss": 0.5}, step=9, phase="search")
    log.close()
    accumulator = accumulated(tmp_path / "tensorboard" / "search")
    (image,) = accumulator.Images("search/cells")
    assert (image.step, image.width, image.height) == (4, 100, 50)
    assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == (255, 0, 0)).all()
    assert [event.step for event in accumulator.Scalars("search/loss")] == [9]
    plugin = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data
    started = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}
    expected = {"seed": 3.0, "bilevel.epochs": 5.0, "bilevel.augment": True, "penalty": "js", "knots": "[0, 1]"}
    assert values == expected
    plugin = accumulator.summary_metadata["_hparams_/experiment"].plugin_data
    experiment = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["search/loss"]
