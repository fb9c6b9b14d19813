"""All steps from a slow detector to a fast one, in one function."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.classes import class_names
from ..data.unlabeled import digest_of_photos
from ..detectors.dense import DenseView
from ..engine.launch import check_gpus
from ..teacher import build_teacher
from ..utils.errors import ConfigError, RunError
from ..utils.files import read_json, sha256_of, write_whole
from ..utils.user_code import import_user_module
from .backbone import check_backbone_file
from .choose import Wish, table, verdict
from .data import Data, digest_of, prepare
from .outcome import result_rows, write_onnx, write_openvino, write_page, write_picture
from .plan import MARK, Plan, show_choice, student_table, write_configs
from .teacher_facts import check_class_order
from .training import BarRunner, find_train_net, teacher_ap

_CONFIGS = ("student.yaml", "distilled.yaml")


@dataclass(frozen=True)
class Distilled:
    """The result of :func:`distill`.

    Attributes:
        taken: name of the candidate that is the student; "": none yet (a dry run without a wish).
        candidates: rows of the teacher and the candidates: "name", "parameters_m", "gflops", "ms",
            "onnx_ms", "speedup".
        rows: rows of the teacher, the plain student (``compare``) and the distilled student: also
            "AP", "AP50", and with the extra openvino "openvino_ms", "int8_ms", "int8_AP". Empty
            if nothing was trained (``dry_run``, ``configs_only``).
        test_set: where the test set comes from.
        config: path of student.yaml, the student's config. None after a dry run.
        weights: path of the student's checkpoint. None if nothing was trained.
        onnx, openvino, int8, picture, report: files; None: not written.
        predict: the command that runs the student. "" if nothing was trained.
    """

    taken: str
    candidates: list[dict] = field(repr=False)
    rows: list[dict] = field(default_factory=list)
    test_set: str = ""
    config: Path | None = None
    weights: Path | None = None
    onnx: Path | None = None
    openvino: Path | None = None
    int8: Path | None = None
    picture: Path | None = None
    report: Path | None = None
    predict: str = ""


def distill(
    teacher: str | Sequence[str],
    train: str | Sequence[str],
    test: str | Sequence[str] = (),
    *,
    classes: Sequence[str] = (),
    unlabeled: str | Sequence[str] = (),
    speedup: float | None = None,
    latency: float | None = None,
    parameters: float | None = None,
    student: str = "",
    iterations: int = 0,
    hours: float = 0.0,
    backbone_weights: str = "",
    compare: bool = False,
    dry_run: bool = False,
    configs_only: bool = False,
    output: str | Path = "output/distill",
    runtime: str = "pytorch",
    device: str = "",
    imports: Sequence[str] = (),
    num_gpus: int = 1,
    say: Callable[[str], None] = print,
) -> Distilled:
    """Finds a student that is fast enough on this machine, and trains it with its teacher.

    An interrupted call continues if it is repeated. A finished call trains nothing then.

    Args:
        teacher: its config, or (config, checkpoint).
        train: (COCO file, folder of images), or the path of PASCAL VOC or YOLO data.
        test: the same. Empty: a part of ``train``, by groups of images.
        classes: the teacher's class names, in its order. Empty: those of its config, if known.
        unlabeled: folders of photos without annotations, for the distilled student.
        speedup: how many times as fast as the teacher the student must be.
        latency: largest number of milliseconds per image.
        parameters: largest number of parameters, in millions.
        student: a timm model, or a YAML config of a student. "": any candidate.
        iterations, hours: length of the training. 0: from the data and the teacher's schedule.
        backbone_weights: path of a state dict of timm's model; "random"; "": timm's own weights, if
            they are in its cache or can be downloaded.
        compare: whether the student is also trained without the teacher.
        dry_run: only measure. Only the table is written, beside ``output``.
        configs_only: write the configs, train nothing. The same call without it trains them.
        output: folder of the result.
        runtime: where speed-up and latency are measured, "pytorch" or "onnx".
        device: device on which detectors are measured. "": "cuda" if there is a GPU, else "cpu".
        imports, num_gpus: of each training, as --import and --num-gpus of tools/train_net.py.
        say: is called with each line of text.

    Raises:
        FgBgError: a fault of an argument, the data, the teacher or the folder, or no candidate is
            fast enough: nothing is trained then. Or a training failed.
    """
    data = map(_listed, (teacher, train, test, unlabeled, classes))
    wish = Wish(speedup, latency, parameters, runtime)
    student, backbone = map(os.path.expanduser, (student, backbone_weights))
    asked = _Asked(*data, wish, student, iterations, hours, backbone, device, num_gpus, compare)
    stop = "dry_run" if dry_run else "configs_only" if configs_only else ""
    return _run(asked, Path(output), stop, {"say": say, "imports": tuple(imports)})


class _Asked(NamedTuple):
    """The arguments of :func:`distill` on which its plan depends."""

    teacher: list[str]
    train: list[str]
    test: list[str]
    unlabeled: list[str]
    classes: list[str]
    wish: Wish
    student: str
    iterations: int
    hours: float
    backbone_weights: str
    device: str
    num_gpus: int
    compare: bool = False

    def request(self) -> dict[str, Any]:
        """The arguments and what their files hold, as values that JSON can hold."""
        files = (*self.teacher, self.student, self.backbone_weights)
        return {
            **self._asdict(),
            "wish": asdict(self.wish),
            "compare": self.compare and self.hours > 0,  # then it shortens the training
            "files": {file: sha256_of(file) for file in files if os.path.isfile(file)},
            "data": [digest_of(self.train), digest_of(self.test), digest_of_photos(self.unlabeled)],
        }


def _run(asked: _Asked, output: Path, stop: str, how: dict[str, Any]) -> Distilled:
    """The steps of :func:`distill`.

    Args:
        stop: "dry_run" or "configs_only", where to stop; "": at the end.
        how: the arguments of :class:`Plan` that do not change the plan.
    """
    _check(asked, stop)
    for module in how["imports"]:
        import_user_module(module)
    config, weights = [*asked.teacher, ""][:2]
    dry_run = stop == "dry_run"
    request = {} if dry_run else asked.request()
    known = {} if dry_run else _known_plan(output, request)
    loaded = build_teacher(config, weights, classes=asked.classes)
    with tempfile.TemporaryDirectory() as folder:
        data = known.get("data")
        if data is None:
            place = Path(folder) if dry_run else output / "data"
            data = prepare(asked.train, asked.test, place)
            check_class_order(loaded, asked.train, class_names(data.train[0]))
        plan = Plan(
            config=config,
            teacher=loaded,
            data=Data(*data),
            unlabeled=tuple(map(os.path.abspath, asked.unlabeled)),
            wish=asked.wish,
            student=asked.student,
            iterations=asked.iterations,
            hours=asked.hours,
            backbone_weights=asked.backbone_weights,
            device=asked.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            output=output,
            cache=output.parent / "measured_students.json",
            num_gpus=asked.num_gpus,
            compare=asked.compare,
            classes=tuple(asked.classes),
            **how,
        )
        rows = known.get("rows") or student_table(plan)
        if dry_run:
            return _dry(plan, rows)
    if known:
        plan.say(f"{output / 'student.yaml'} and distilled.yaml are used as they are.")
    else:
        known = {"taken": write_configs(plan, rows), "rows": rows, "data": data}
        written = {name: sha256_of(output / name) for name in _CONFIGS}
        content = {"request": request, "configs": written, **known}
        write_whole(output / "plan.json", json.dumps(content, indent=1))
    if stop:
        student = output / "student.yaml"
        plan.say(f"Wrote {student} and distilled.yaml. The same command trains them.")
        return Distilled(known["taken"], rows, test_set=plan.data.note, config=student)
    return _train(plan, known["taken"], rows)


def _listed(value: str | Sequence[str]) -> list[str]:
    """The values as a list, with the home folder in place of ~."""
    values = [value] if isinstance(value, (str, Path)) else value
    return [os.path.expanduser(v) for v in values]


def _check(asked: _Asked, stop: str) -> None:
    """Refuses arguments before anything is read, measured or trained."""
    asked.wish.check()
    if not (str(asked.wish) or asked.student or stop == "dry_run"):
        raise ConfigError(
            "Say how fast the student must be: --speedup 3 (times as fast as the teacher), "
            "--latency 15 (milliseconds), --parameters 4 (millions) or --student NAME. --dry-run "
            "shows the candidates."
        )
    if asked.device:
        try:
            torch.zeros(1, device=asked.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"--device {asked.device} cannot be used here ({reason}): give cpu, or cuda on a "
                "machine with a GPU."
            ) from None
    if asked.iterations and asked.hours:
        raise ConfigError("--iterations and --hours both set the length: give only one of them.")
    for name in ("iterations", "hours"):
        value = getattr(asked, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"--{name} is {value}: give a number over 0.")
    if asked.student.endswith((".yaml", ".yml")) and not os.path.isfile(asked.student):
        raise ConfigError(f"--student {asked.student}: there is no such file. Correct the path.")
    if asked.num_gpus < 1:
        raise ConfigError(f"--num-gpus is {asked.num_gpus}: give 1 or more. On a CPU, give 1.")
    check_backbone_file(asked.backbone_weights)
    check_gpus(asked.num_gpus)
    if not stop:
        find_train_net()


def _known_plan(output: Path, request: dict) -> dict[str, Any]:
    """The plan of the same command in this folder; {} if there is none.

    Raises:
        RunError: the folder holds trainings of another command, or configs that this command did
            not write.
    """
    file, configs = output / "plan.json", [output / name for name in _CONFIGS]
    if not file.is_file():
        for config in configs:
            if config.is_file() and MARK not in config.read_text(errors="replace"):
                raise RunError(
                    f"{config} was not written by this command: move it away, or give another "
                    "--output."
                )
        return {}
    plan = read_json(file)
    old, written = plan.pop("request"), plan.pop("configs", {})
    same = old == json.loads(json.dumps(request))
    if same and all(config.is_file() for config in configs):
        return plan
    if not same and any(
        (output / name / "metrics.json").is_file() for name in ("plain", "distilled")
    ):
        changed = [k for k in request if old.get(k) != request[k]]
        what = "; ".join(f"{k} was {old.get(k)!r}, is {request[k]!r}" for k in changed)
        raise RunError(
            f"{output} holds a training of another command ({what}): give another --output, or "
            "move it away."
        )
    for config in configs:
        if config.is_file() and sha256_of(config) != written.get(config.name):
            raise RunError(
                f"{config} was edited, and this command would overwrite it: give another "
                "--output, or move it away."
            )
    return {}


def _dry(plan: Plan, rows: list[dict]) -> Distilled:
    """Shows the table, and the candidate that would be taken."""
    taken = ""
    if str(plan.wish) or plan.student:
        taken = show_choice(plan, rows)["name"]
        plan.say(f"{str(plan.wish) or '--student'} takes {taken}.")
    else:
        plan.say(f"\n{table(rows)}\n")
        plan.say("Give --speedup, --latency or --parameters to choose.")
    _say_two_stages(plan)
    plan.say(plan.data.note)
    return Distilled(taken, rows, test_set=plan.data.note)


def _say_two_stages(plan: Plan) -> None:
    if not isinstance(plan.teacher.view, DenseView):
        plan.say("GFLOPs of the teacher: only its backbone and RPN are counted.")


def _train(plan: Plan, taken: str, rows: list[dict]) -> Distilled:
    output, say = plan.output, plan.say
    configs = {"distilled": output / "distilled.yaml"}
    if plan.compare:  # last, because a fault of the distillation must not come after hours
        configs["plain"] = output / "student.yaml"
    aps = {"teacher": teacher_ap(output / "distilled.yaml", output / "teacher", say=say)}
    file = Path(plan.teacher.weights)
    checkpoint = file if file.is_file() else None
    with BarRunner(imports=plan.imports, num_gpus=plan.num_gpus) as runner:
        for name, config in configs.items():
            say(f"{name}: training, log in {output / name / 'train.txt'}")
            of_teacher = checkpoint if name == "distilled" else None
            aps[name] = runner.run(name, config, output / name, [], of_teacher)
    aps = {name: aps[name] for name in ("teacher", "plain", "distilled") if name in aps}
    config, weights = output / "student.yaml", output / "distilled" / "model_final.pth"
    onnx = write_onnx(config, weights, output / "student.onnx", say)
    small = write_openvino(config, weights, output, say)
    found = result_rows(config, weights, plan.teacher, aps, plan.device, small)
    say(f"\n{table(found)}\n")
    if text := verdict(found[-1], found[0], plan.wish):
        say(text)
    say(f"One image at a time, {plan.device}, {torch.get_num_threads()} threads; {plan.data.note}.")
    _say_two_stages(plan)
    picture = write_picture(output, [*aps][1:], with_teacher=bool(aps["teacher"]))
    report = write_page(output, say)
    detector = str(onnx) if onnx else f"{config} --weights {weights}"
    predict = f"tools/predict.py {detector} photo.jpg --output predictions"
    for what, path in (("weights", weights), ("picture", picture), ("report", report)):
        if path:
            say(f"{what}: {path}")
    say(f"Run it on photos, folders of photos or films: {predict}")
    files = {"onnx": onnx, "picture": picture, "report": report}
    if small:
        files |= {"openvino": small.openvino, "int8": small.int8}
    return Distilled(taken, rows, found, plan.data.note, config, weights, predict=predict, **files)
