"""Comparison of methods: each method trains the same student with several seeds."""

import datetime
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ..config import method_options
from ..engine import load_config, read_config
from ..methods import build_method
from ..utils.errors import RunError
from ..utils.files import read_rows, sha256_of_text, write_whole
from .method_specs import PLAIN, TEACHER, method_overrides
from .result_rows import add_result, group
from .runner import Runner, check_folder, surroundings
from .settings import RUN_KEYS, flat, task_of
from .tables import PARTS, PLOT, comparison_tables, fill, plot, without_folders
from .teacher_runs import teacher_evaluation, train_or_find_teacher
from .tide import has_objects, run_errors, tide, truth_of


@dataclass(frozen=True)
class Comparison:
    """The methods, seeds and settings of a comparison.

    Attributes:
        config_file: a config that distils.
        methods: such as "plain", "FgBg" or "PKD WEIGHT=2" (:func:`.method_overrides`).
        output: folder for all runs, results.jsonl and results.md.
        seeds: number of seeds. The seeds are 0 to seeds - 1.
        overrides: [key, value, ...] for all methods.
        jobs: number of runs at a time. They share the cores of the CPU.
        errors: whether the kinds of errors are measured too (:mod:`.tide`).
        imports: the user's modules that register methods or detectors.
    """

    config_file: str
    methods: Sequence[str]
    output: Path
    seeds: int = 5
    overrides: Sequence[str] = ()
    jobs: int = 1
    errors: bool = False
    imports: Sequence[str] = ()

    @property
    def config(self) -> str:
        """The path of the config, the same however it was typed."""
        path = os.path.relpath(self.config_file)
        return os.path.abspath(path) if path.startswith("..") else path

    @property
    def results(self) -> Path:
        return self.output / "results.jsonl"

    @property
    def folder(self) -> Path:
        """The folder of the runs with these overrides."""
        name = folder_name(" ".join(self.overrides)) if self.overrides else "as_configured"
        return self.output / name


def compare_methods(comparison: Comparison, train_net: Path) -> None:
    """Trains and evaluates the student with each method and seed. Writes rows, tables and plots.

    A finished run is not repeated. An interrupted run is resumed. Each finished run adds a row to
    results.jsonl. Then results.md is written from all rows.

    Args:
        train_net: path of tools/train_net.py.

    Raises:
        ConfigError: a method or a key does not exist.
        RunError: the result would not be valid, or runs failed. This is raised after the other runs
            are finished.
    """
    cfg = load_config(comparison.config_file, list(comparison.overrides))
    overrides, options = _method_settings(comparison, cfg)
    _check(comparison, cfg)
    comparison.output.mkdir(parents=True, exist_ok=True)
    cores = max(1, (os.cpu_count() or 1) // comparison.jobs)
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
    runner = Runner(train_net, threads, comparison.imports)
    with runner, ThreadPoolExecutor(comparison.jobs) as pool:
        try:
            teacher = train_or_find_teacher(runner, cfg)
            shared = {"task": task_of(cfg, teacher), **surroundings(threads, comparison.jobs)}
            runs = [  # the first pairs finish early
                _Run(comparison, spec, seed, opts, None if spec.split()[0] == PLAIN else teacher)
                for seed in range(comparison.seeds)
                for spec, opts in overrides.items()
            ]
            for run in runs:  # before any of them trains for hours
                run.check()
            _evaluate_teacher(comparison, runner, cfg, teacher, shared)
            jobs = {pool.submit(run, runner): (run, options[run.spec]) for run in runs}
            failures = _record_as_they_end(jobs, comparison, runner, shared)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    if failures:
        raise RunError("\n\n".join([*failures, f"{len(failures)} of {len(jobs)} runs failed"]))


def _method_settings(comparison: Comparison, cfg) -> tuple[dict[str, list], dict[str, dict]]:
    """Overrides and options of each method.

    Each method is built once. A value that a method refuses is therefore an error before the first
    run.
    """
    overrides, options = {}, {}
    for spec in comparison.methods:
        overrides[spec] = [*comparison.overrides, *method_overrides(cfg, spec)]
        options[spec] = {}
        if spec.split()[0] != PLAIN:
            changed = read_config(comparison.config_file, overrides[spec])
            options[spec] = method_options(changed)
            build_method(changed.MODEL.KD.METHOD, [1], [1], **options[spec])
    return overrides, options


def _check(comparison: Comparison, cfg) -> None:
    """Refuses a comparison whose result would not be valid.

    Raises:
        RunError: the test set or an override does not fit, or tidecv is missing.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise RunError(f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} sets: name exactly one set.")
    if taken := sorted({*comparison.overrides[::2]} & {*RUN_KEYS}):
        raise RunError(
            f"--set {' '.join(taken)}: compare.py sets it for each run. Use --seeds and --output."
        )
    truth = truth_of(flat(cfg))
    if truth and truth.is_file() and not has_objects(truth):
        raise RunError(
            f"{truth} has no box that counts, so AP is not defined: name another test set."
        )
    if comparison.errors:
        tide()
        if truth is None:
            raise RunError(
                f"--errors: the COCO file of {cfg.DATASETS.TEST[0]} is not known. Name it in "
                "DATASETS.TEST_JSON."
            )


@dataclass(frozen=True)
class _Run:
    """A run of a student. A call trains and evaluates it."""

    comparison: Comparison
    spec: str
    seed: int
    overrides: list[str]
    checkpoint: Path | None

    @property
    def folder(self) -> Path:
        return self.comparison.folder / folder_name(self.spec) / f"seed{self.seed}"

    @property
    def title(self) -> str:
        return f"{self.spec}, seed {self.seed}"

    @property
    def _opts(self) -> list[str]:
        return [*self.overrides, "SEED", str(self.seed), "TEST.EVAL_PERIOD", "0"]

    def check(self) -> None:
        """Refuses a folder that holds a run of other settings."""
        check_folder(self.folder, self.comparison.config_file, self._opts, self.checkpoint)

    def __call__(self, runner: Runner) -> dict:
        config = self.comparison.config_file
        result = runner.run(self.title, config, self.folder, self._opts, self.checkpoint)
        return _with_errors(self.comparison, result, self.folder)


def _with_errors(comparison: Comparison, result: dict, folder: Path) -> dict:
    return {**result, "errors": run_errors(folder)} if comparison.errors else result


def _evaluate_teacher(comparison: Comparison, runner: Runner, cfg, teacher, shared: dict) -> None:
    """Adds the teacher's row. If the teacher cannot be evaluated on the test set, because it has
    other classes for example, the table has no such row."""
    folder = comparison.folder / TEACHER
    try:
        config, opts = teacher_evaluation(cfg, teacher)
        result = runner.run(TEACHER, config, folder, opts, teacher, eval_only=True)
        result = _with_errors(comparison, result, folder) | {"seconds_per_step": None}
        _add_row(comparison, shared, TEACHER, None, {}, result, folder)
    except RunError as error:
        runner.say(f"The teacher is not evaluated: {str(error).splitlines()[-1]}")


def _record_as_they_end(jobs: dict, comparison: Comparison, runner: Runner, shared) -> list[str]:
    """Adds a row when a run ends. Returns a message for each run that failed."""
    failures = []
    for number, job in enumerate(as_completed(jobs), 1):
        run, options = jobs[job]
        try:
            result = job.result()
            row = _add_row(comparison, shared, run.spec, run.seed, options, result, run.folder)
            outcome = f"{row['AP']:.2f} AP"
        except RunError as error:
            failures.append(f"{run.title}: {error}")
            outcome = "FAILED"
        runner.say(f"{number}/{len(jobs)} {run.title}: {outcome} ({run.folder})")
    return failures


def _add_row(comparison, shared: dict, method: str, seed, options: dict, result, folder) -> dict:
    row = {
        "method": method,
        "seed": seed,
        "config": comparison.config,
        "overrides": list(comparison.overrides),
        "options": options,
        **result,
        "folder": str(folder),
        "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        **shared,
    }
    row = add_result(comparison.results, row)
    text = tables_of([comparison.results], pictures=comparison.output)
    write_whole(comparison.output / "results.md", text)
    return row


def tables_of(
    files: Sequence[Path],
    parts: Sequence[str] = PARTS,
    pictures: Path | None = None,
    document_folder: Path | None = None,
) -> str:
    """The tables of all comparisons in files with rows, in Markdown.

    Args:
        files: paths of results.jsonl files. A missing file has no rows.
        parts: see :func:`.comparison_tables`.
        pictures: folder for a plot of each comparison; None: no plots.
        document_folder: folder of the document that shows the plots. Default: `pictures`.
    """
    texts = []
    rows = [row for file in files for row in read_rows(file)]
    for title, methods in group(rows).items():
        texts.append(f"`{without_folders(title)}`\n\n{comparison_tables(methods, parts)}\n")
        if pictures:
            # Several files of a document can have rows of the same comparison.
            name = f"{files[0].stem} {title}" if document_folder else title
            picture = pictures / f"{folder_name(name)}.png"
            plot(methods, picture)
            link = picture.relative_to(document_folder or pictures).as_posix()
            texts.append(f"![AP of every seed]({link})\n")
    return "\n".join(texts)


def fill_document(file: Path, say) -> None:
    """Updates the tables in a document from the files with rows that it names (:func:`.fill`).

    The paths of these files are relative to the current folder. A table whose file has no rows does
    not change. The part "plot" of a table is written into the folder that has the document's name:
    docs/results for docs/results.md.

    Args:
        say: a function that gets a line about each table.
    """

    def filled(name: str, parts: list[str]) -> str:
        pictures = file.with_suffix("") if PLOT in parts else None
        if pictures:
            pictures.mkdir(exist_ok=True)
        tables = [part for part in parts if part != PLOT]
        made = tables_of([Path(name)], tables, pictures, file.parent)
        say(f"{name}: {'made anew' if made else 'no rows here, the table stays'}")
        return made

    write_whole(file, fill(file.read_text(), filled))


def folder_name(text: str) -> str:
    """The name of a folder for a text. Different texts have different names."""
    name = re.sub(r"[^\w.=+-]+", "_", text)
    return name if name == text else f"{name[:60]}-{sha256_of_text(text)[:6]}"
