"""Finds the student and writes student.yaml and distilled.yaml."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from detectron2.config import CfgNode

from ..data import register_datasets, test_size_of, training_classes
from ..data.classes import class_names
from ..data.unlabeled import find_photos
from ..data.validation import read_coco
from ..detectors.dense import DenseView, view
from ..detectors.load import build_detector, read_detector_config
from ..engine.unlabeled import check_teacher
from ..matching import dense_student, match_classes, shared_levels
from ..teacher import Teacher, check_same_format
from ..utils.errors import ConfigError
from ..utils.files import sha256_of, sha256_of_text, write_whole
from .backbone import backbone_settings
from .choose import Wish, choose, refined, table
from .data import Data
from .measure import image_size, measured
from .schedule import batch_of, iterations_in, iterations_of, rescaled, schedule_settings
from .students import (
    Setting,
    candidate_of,
    candidates_for,
    config_of,
    finer,
    model_settings,
    spoken,
    yaml_of,
)
from .teacher_facts import TeacherFacts, facts_of
from .training import seconds_per_step

MARK = "written by tools/distill.py"
_FIRST = 300  # iterations in the config whose step is timed


@dataclass(frozen=True)
class Plan:
    """How a student is found and trained.

    Attributes:
        config: of the teacher.
        teacher: loaded.
        classes: names of the teacher's classes, as the user gave them.
        data: training and test set.
        unlabeled: folders of photos without annotations.
        wish: what the student must meet.
        student: a timm model, a YAML config, or "": any candidate.
        iterations, hours: length of the training; 0: not given.
        backbone_weights: a file, "random" or "".
        compare: whether the plain student is trained too.
        output: folder of student.yaml, distilled.yaml and the trainings.
        cache: file of the measured tables.
        device: on which the detectors are measured.
        say: is called with a line of text.
        imports: the user's modules that the trainings import.
        num_gpus: number of GPUs of each training.
    """

    config: str
    teacher: Teacher
    data: Data
    unlabeled: tuple[str, ...]
    wish: Wish
    student: str
    iterations: int
    hours: float
    backbone_weights: str
    compare: bool
    output: Path
    cache: Path
    device: str
    say: Callable[[str], None]
    imports: tuple[str, ...] = ()
    num_gpus: int = 1
    classes: tuple[str, ...] = ()

    @cached_property
    def own_config(self) -> CfgNode | None:
        """The user's config of a student; None: the student is found."""
        named = self.student.endswith((".yaml", ".yml"))
        return read_detector_config(self.student) if named else None

    @cached_property
    def facts(self) -> TeacherFacts:
        """What the student takes from the teacher."""
        return facts_of(self.config, self.teacher)

    @cached_property
    def num_classes(self) -> int:
        """The number of classes of the training set."""
        return len(class_names(self.data.train[0]))

    @cached_property
    def photos(self) -> int:
        """The number of photos without labels. Those of a labelled set are left out."""
        if not self.unlabeled:
            return 0
        labelled = (
            [{"file_name": os.path.join(folder, image["file_name"])} for image in content["images"]]
            for content, folder in (
                (read_coco(self.data.train[0], training=True), self.data.train[1]),
                (read_coco(self.data.test[0], training=False), self.data.test[1]),
            )
        )
        return len(find_photos(self.unlabeled, *labelled))


def student_table(plan: Plan) -> list[dict]:
    """The measured teacher and candidates. Before that, data and classes are checked.

    Raises:
        FgBgError: the data have a fault, or student and teacher do not fit together.
    """
    if plan.unlabeled:
        check_teacher(plan.teacher)
        plan.say(f"{plan.photos} photos without labels")
    facts, number = plan.facts, plan.num_classes
    if plan.own_config:
        _check_own(plan, plan.own_config)
        settings = {plan.student: [Setting("_BASE_", plan.student)]}
    else:
        settings = {str(c): model_settings(facts, c, number) for c in candidates_for(plan.student)}
    smallest = next(iter(settings.values()))
    _check_pair(_config(plan, [*smallest, *data_settings(plan.data)]), plan.teacher)
    # With its weights: from random weights, many boxes would reach NMS and take its time.
    builders = {"teacher": lambda: plan.teacher.detector}
    builders |= {name: lambda s=s: build_detector(_config(plan, s)) for name, s in settings.items()}
    content = read_coco(plan.data.test[0], training=False)
    size = image_size(content, facts.test_size, facts.test_limit)
    own_size = image_size(content, *test_size_of(plan.own_config)) if plan.own_config else size
    about = {
        "teacher": sha256_of_text(str(read_detector_config(plan.config))),
        "weights": _digest(plan.teacher.weights),
        "facts": asdict(facts),
        "students": sha256_of_text("".join(str(_config(plan, s)) for s in settings.values())),
    }

    def measured_here(builders):
        sizes = {name: size if name == "teacher" else own_size for name in builders}
        return measured(plan.cache, about, builders, sizes, plan.device, plan.say)

    rows = measured_here(builders)
    if plan.own_config:
        return rows

    def candidate_builder(name: str):
        return lambda: build_detector(config_of(model_settings(facts, candidate_of(name), number)))

    return refined(
        rows,
        plan.wish,
        lambda name: [str(c) for c in finer(candidate_of(name), _outputs(facts, number))],
        lambda names: measured_here(
            {"teacher": builders["teacher"], **{name: candidate_builder(name) for name in names}}
        ),
    )


def _check_own(plan: Plan, cfg: CfgNode) -> None:
    """Refuses a config of the user that distils, or whose batch the GPUs cannot share."""
    if cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller":
        raise ConfigError(
            f"--student {plan.student} is a config that distils (MODEL.META_ARCHITECTURE "
            "FgBgDistiller): give the config of the student alone."
        )
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch % plan.num_gpus:
        raise ConfigError(
            f"--student {plan.student}: SOLVER.IMS_PER_BATCH is {batch}, which cannot be divided "
            f"equally among {plan.num_gpus} GPUs: set a multiple of {plan.num_gpus}."
        )


def _outputs(facts: TeacherFacts, classes: int) -> int:
    """Channels of the outputs of a student's head."""
    sizes, ratios = (facts.anchors.get(k, [[0]])[0] for k in ("SIZES", "ASPECT_RATIOS"))
    return len(sizes) * len(ratios) * (classes + 4)


def _config(plan: Plan, settings: Sequence[Setting]) -> CfgNode:
    """:func:`~.students.config_of`, also for settings whose _BASE_ is the user's config."""
    return config_of((s for s in settings if s.key != "_BASE_"), plan.own_config)


def _check_pair(cfg: CfgNode, teacher: Teacher) -> None:
    register_datasets(cfg)
    student = dense_student(build_detector(cfg))
    check_same_format(student, teacher.view)
    shared_levels(student, teacher.view)
    if isinstance(teacher.view, DenseView):  # a copy, because its classes may be reduced
        reduced = view(copy.deepcopy(teacher.detector))
        match_classes(student, reduced, training_classes(cfg), teacher.class_names)


def data_settings(data: Data) -> list[Setting]:
    """The keys of DATASETS. Other files get other names, as Detectron2 registers a name once."""
    contents = [sha256_of(file) for file, _ in (data.train, data.test)]
    name = sha256_of_text(str([data.train, data.test, contents]))[:8]
    settings = []
    for part, (file, images) in (("TRAIN", data.train), ("TEST", data.test)):
        why = data.note if part == "TEST" else ""
        settings += [
            Setting(f"DATASETS.{part}", [f"{part.lower()}_{name}"]),
            Setting(f"DATASETS.{part}_JSON", file, why),
            Setting(f"DATASETS.{part}_IMAGES", images),
        ]
    return settings


def show_choice(plan: Plan, rows: list[dict]) -> dict:
    """Shows the table, also if no candidate meets the wish, and returns the row that is taken.

    Raises:
        ConfigError: no candidate meets the wish.
    """
    try:
        row = choose(rows, plan.wish)
    except ConfigError:
        plan.say(f"\n{table(rows)}\n")
        raise
    plan.say(f"\n{table(rows, row['name'])}\n")
    return row


def write_configs(plan: Plan, rows: list[dict]) -> str:
    """Chooses the student and writes both configs.

    Returns:
        The name of the candidate that is taken.

    Raises:
        ConfigError: no candidate meets the wish.
    """
    row = show_choice(plan, rows)
    taken = row["name"]
    plan.output.mkdir(parents=True, exist_ok=True)
    model, pretrained = _model(plan, taken)
    fixed = [*model, *data_settings(plan.data)]
    settings = [*fixed, *_schedule(plan, fixed, pretrained, row["ms"])]
    _write(plan, settings)
    for line in spoken(settings):
        plan.say(f"  {line}")
    plan.say(
        f"{plan.output / 'student.yaml'} and distilled.yaml hold these keys. To change them, use "
        "--configs-only, edit the files, and give the same command without it."
    )
    return taken


def _model(plan: Plan, taken: str) -> tuple[list[Setting], bool]:
    """The settings of the detector, and whether its backbone has trained weights."""
    if plan.own_config:
        return [Setting("_BASE_", os.path.abspath(plan.student), "--student")], True
    candidate = candidate_of(taken)
    why = f"the largest candidate that meets {plan.wish}" if str(plan.wish) else "--student"
    file = plan.output / "backbone.pth"
    weights, pretrained = backbone_settings(
        candidate.backbone, plan.backbone_weights, plan.facts, file, plan.say
    )
    return [*model_settings(plan.facts, candidate, plan.num_classes, why), *weights], pretrained


def _schedule(plan: Plan, fixed: list[Setting], pretrained: bool, ms: float) -> list[Setting]:
    """The settings of the schedule. A schedule of the user only gets another length.

    Args:
        fixed: the settings of detector and data.
        ms: time of the student for one image.
    """
    facts = plan.facts
    content = read_coco(plan.data.train[0], training=True)
    used = {a["image_id"] for a in content["annotations"] if not a.get("iscrowd")}
    if facts.further.get("DATALOADER.FILTER_EMPTY_ANNOTATIONS") is False:
        used = {image["id"] for image in content["images"]}
    images = len(used) + plan.photos
    # With photos without labels, each GPU gets an image of each kind.
    batch = batch_of(images, facts.batch, plan.num_gpus, each=2 if plan.photos else 1)

    def settings(iterations: int, why: str, **options) -> list[Setting]:
        if plan.own_config:
            return rescaled(plan.own_config, iterations, why, **options)
        return schedule_settings(batch, iterations, why, **options)

    if plan.iterations:
        return settings(plan.iterations, "--iterations")
    if plan.hours:
        _write(plan, [*fixed, *settings(_FIRST, "")])
        plan.say("Timing a step of the training ...")
        names = ("distilled", "student")[: 1 + plan.compare]
        step = sum(seconds_per_step(plan.output / f"{name}.yaml", plan.num_gpus) for name in names)
        tested = len(read_coco(plan.data.test[0], training=False)["images"])
        test = len(names) * tested * ms / 1000
        iterations, evaluations, why = iterations_in(plan.hours, step, test)
        return settings(iterations, why, evaluations=evaluations)
    if plan.own_config:
        return []
    return settings(*iterations_of(images, batch, facts.iterations * facts.batch, pretrained))


def _write(plan: Plan, settings: list[Setting]) -> None:
    """Writes student.yaml and distilled.yaml."""
    folder = plan.output.resolve()
    family = plan.facts.family
    if plan.own_config:
        family = plan.own_config.MODEL.META_ARCHITECTURE
    student = [*settings, Setting("OUTPUT_DIR", str(folder / "by_hand" / "plain"))]
    if not plan.own_config:
        student.append(Setting("VERSION", 2))
    title = [f"The student, {MARK}. Change it as you like.",
             "Plain training: tools/train_net.py --config-file student.yaml"]  # fmt: skip
    write_whole(plan.output / "student.yaml", yaml_of(title, student))
    distilled = [
        Setting("_BASE_", "student.yaml"),
        Setting("MODEL.META_ARCHITECTURE", "FgBgDistiller"),
        Setting("MODEL.KD.STUDENT", family),
        Setting("MODEL.KD.TEACHER.CONFIG", _in_full(plan.config)),
        Setting("MODEL.KD.TEACHER.WEIGHTS", _in_full(plan.teacher.weights)),
        Setting("OUTPUT_DIR", str(folder / "by_hand" / "distilled")),
    ]
    if plan.classes:
        names = Setting("MODEL.KD.TEACHER.CLASSES", list(plan.classes), "--classes")
        distilled.insert(-1, names)
    if plan.unlabeled:
        why = "photos without labels; MODEL.KD.UNLABELED says how they are used"
        distilled.insert(-1, Setting("DATASETS.UNLABELED", list(plan.unlabeled), why))
    title = [f"The student with its teacher, {MARK}. Its other keys are those of student.yaml.",
             "Training: tools/train_net.py --config-file distilled.yaml"]  # fmt: skip
    write_whole(plan.output / "distilled.yaml", yaml_of(title, distilled))


def _digest(path: str) -> str:
    """The sha256 of a file. A URL is not changed."""
    return sha256_of(path) if os.path.isfile(path) else path


def _in_full(path: str) -> str:
    """The absolute path of a file. A name of the model zoo or a URL is not changed."""
    return os.path.abspath(path) if os.path.isfile(path) else path
