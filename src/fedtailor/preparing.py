"""What must hold before anything is trained: rows read, the base loaded, and the one fits the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtailor import answering, baselines, models, packaged, poisoning
from fedtailor import data as rows_of
from fedtailor.data import SILO_FIELDS, Row, SiloData
from fedtailor.errors import SiloError, UserError, suggest
from fedtailor.experiment import Experiment, name_of
from fedtailor.faults import SENT, struck
from fedtailor.rows import digest, plain

NEEDS = {
    "hand_written": "a method that begins with prompts", "noiseless": "method.noise",
    "routed": "method.name = 'rag', and [baseline.routed] route, the number of silos asked at most",
    "untrained": "method.name = 'rag' with a trainer",
}  # fmt: skip


def prepare(
    experiment: Experiment, afar: Sequence[str] = (), at_hand: rows_of.Loaded | None = None
) -> tuple[rows_of.Loaded, models.Resident]:
    """The first seed's rows, then the base. Raises UserError for whatever can be known to fail later, all that can be
    known without the base at once. `afar`: silos that keep their rows themselves, and try them on contact. `at_hand`: the
    first seed's rows, where they were read before."""
    loaded = _told_together(experiment, afar, at_hand)
    classes = any(rows.labels for rows in loaded.silos.values())
    resident = models.load(experiment.model)
    _answerable(experiment, resident, classes)
    taken, told = 0, max(len(rows.labels) for rows in loaded.silos.values())
    if hasattr(experiment.method, "put_on"):
        taken = experiment.method.put_on(resident, told).shift
    _struck(experiment, resident, told)
    if loaded.public and hasattr(experiment.method, "suited"):
        labels = next((rows.labels for rows in loaded.silos.values() if rows.labels), ())
        experiment.method.suited(resident, loaded.public, labels)
    if afar and hasattr(experiment.method, "ready"):
        experiment.method.ready(resident, loaded.silos)
    for seed in () if afar else experiment.seeds:  # another seed deals other rows, and draws other examples
        again = loaded if seed == experiment.seeds[0] else rows_of.load(experiment.data, experiment.silo, seed)
        fits(resident, again.silos, taken=taken)
        if (faults := experiment.faults).attack == "backdoor":
            for rows in (poisoning.poisoned(again.silos, faults, seed), poisoning.triggered(again.silos, faults)):
                fits(resident, rows, taken=taken, advice="it has a trigger in front; set data.max_words")
        if hasattr(experiment.method, "ready"):
            experiment.method.ready(resident, again.silos)
        if "few_shot" in experiment.rows and not resident.classifier:
            _few_shot_fits(experiment, resident, again.silos, seed)
    return loaded, resident


def kept_afar(experiment: Experiment, silos: Sequence[str]) -> rows_of.Loaded:
    """What the server knows of silos in processes of their own: their names, and the label words."""
    labels = experiment.data.labels
    if experiment.data.label and not labels:
        raise UserError("[data] labels: over a federation no one reads all rows, so write the label words into the experiment")
    if experiment.data.public_fraction:
        raise UserError("[data] public_fraction holds out rows of one table: over a federation name the server's with public")
    public = rows_of.known_to_all(experiment.data, labels, experiment.seeds[0])
    of_public = digest([plain(row) for row in public]) if public else ""
    own = {name: {k: v for k, v in settings.items() if k not in SILO_FIELDS} for name, settings in experiment.silo.items()}
    return rows_of.Loaded({name: SiloData((), (), (), labels, own.get(name, {})) for name in silos}, of_public, {}, public)


def _told_together(experiment: Experiment, afar: Sequence[str], at_hand: rows_of.Loaded | None) -> rows_of.Loaded:
    errors: list[str] = []
    name = experiment.model.name
    if not packaged.known(name):
        errors.append(f"[model] name = {name!r}: no model, folder or hub id{suggest(name, packaged.listing())}")
    loaded = None
    try:
        first = experiment.seeds[0]
        loaded = kept_afar(experiment, afar) if afar else at_hand or rows_of.load(experiment.data, experiment.silo, first)
        experiment.faults.check(loaded.silos)
    except UserError as error:
        errors.append(str(error))
    errors += [
        f"rows: {row!r} needs {what}; leave it out"
        for row, what in NEEDS.items()
        if row in experiment.rows and not _has(experiment, row)
    ]
    try:
        _measurable(experiment, bool(experiment.data.label))
    except UserError as error:
        errors.append(str(error))
    if loaded is not None and getattr(experiment.method, "needs_public", False) and not loaded.public:
        errors.append("[data] the method needs rows that the server may hold: set public to a file, or public_fraction")
    if loaded is not None:
        errors += poisoning.unfit(loaded.silos, experiment.faults, afar)
    errors += _never_warm(experiment)
    if loaded is not None and hasattr(experiment.method, "unaffordable"):
        errors += experiment.method.unaffordable(loaded.silos, experiment.rounds)
    if errors or loaded is None:
        raise UserError("\n".join(errors))
    return loaded


def _few_shot_fits(
    experiment: Experiment, resident: models.Resident, silos: Mapping[str, SiloData], seed: int
) -> None:
    count = experiment.evaluate.examples
    examples = baselines.few_shot(silos, count, seed)
    told = {name: SiloData((), (), tuple(examples.told(row) for row in rows.test)) for name, rows in silos.items()}
    advice = f"the few_shot row puts {count} examples in front: lower evaluate.examples, or leave few_shot out of rows"
    fits(resident, told, advice=advice)


def fits(
    resident: models.Resident, silos: Mapping[str, SiloData], taken: int = 0, advice: str = "shorten it or set data.max_words"
) -> None:
    """Every row fits the model's context beside `taken` virtual tokens. Raises UserError naming the first that does not."""
    for name, rows in silos.items():  # a silo may map its own columns
        pictures = {row.image is not None for split in ("train", "val", "test") for row in getattr(rows, split)}
        if pictures - {resident.kind == "vision"}:
            reads = "looks at pictures; set data.image" if resident.kind == "vision" else "reads text; set data.template"
            raise UserError(f"silo {name!r}: the base, {resident.source}, {reads}, or [model] name to another base")
    if resident.classifier:
        return  # an encoder's texts are cut to fit, pictures to size
    for name, rows in silos.items():
        for split in ("train", "val", "test"):
            # a token is at least one byte: only rows that could be too long are tokenized, and chats, for their turns
            for row in (row for row in getattr(rows, split) if row.messages or _bytes(row) >= resident.context - taken):
                try:
                    answering.encode(resident, [row], stop=True, taken=taken)
                except SiloError as error:
                    raise UserError(f"silo {name!r}, {split}, row {row.id or '?'}: {error}; {advice}") from error


def _measurable(experiment: Experiment, classes: bool) -> None:
    known = ("loss", "accuracy", "macro_f1") if classes else ("loss", "exact_match", "rouge_l", "bleu")
    if hasattr(experiment.method, "judge"):
        known = experiment.method.chooses_by
    if known and experiment.evaluate.best_by not in known:
        raise UserError(
            f"[evaluate] best_by = {experiment.evaluate.best_by!r}: not measured on this task (choices: {', '.join(known)})"
        )


def _never_warm(experiment: Experiment) -> list[str]:
    """Rows whose learning rate would still be rising when the last round ends, and never reach method.lr."""
    rows = {"[method]": experiment.method} | {f"[baseline.{r}]": experiment.method_of(r) for r in experiment.baseline}
    warm = {place: getattr(method, "warmup_rounds", 0.0) for place, method in rows.items()}
    most = experiment.rounds
    why = f"the run has {most} rounds, so the rate would never reach lr; choose {most} at most, or more rounds"
    found = [f"{place} warmup_rounds = {n:g}: {why}" for place, n in warm.items() if n > most]
    return found[:1] if found and found[0].startswith("[method]") else found  # baselines inherit it


def _answerable(experiment: Experiment, resident: models.Resident, classes: bool) -> None:
    name = experiment.model.name
    if resident.classifier and not classes:
        what = "a vision model" if resident.kind == "vision" else "an encoder"
        raise UserError(f"[model] name = {name!r}: {what} tells labels, it writes no text; set data.label, or a causal model")
    if experiment.data.messages and not getattr(resident.tokenizer, "chat_template", None):
        raise UserError(f"[data] messages: {name!r} has no chat template; use template and answer, or a chat model")


def _struck(experiment: Experiment, resident: models.Resident, labels: int) -> None:
    """Faults that change tensors find some."""
    which, method = experiment.faults, experiment.method
    what = [f"attack = {which.attack!r}"] * bool(which.attackers and which.attack in SENT)
    what += [f"noise = {which.noise:g}"] * bool(which.noise)
    if what and hasattr(method, "example") and not struck(method.example(resident, labels)):
        why = f"changes what is averaged, and silos of method {name_of(type(method))!r} send no such tensors; leave it out"
        raise UserError(f"[faults] {what[0]} {why}")


def _has(experiment: Experiment, row: str) -> bool:
    if row == "routed":
        return bool(getattr(experiment.method_of(row), "route", 0))
    made = getattr(experiment.method, row, None)
    return made is not None and (row == "hand_written" or made() is not None)


def _bytes(row: Row) -> int:
    return len(row.prompt.encode()) + len(row.answer.encode()) + 3  # a token in front, a space between, the end
