"""One model, one command: benchmark, compare, perplexity, generate, chat or gemm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nkat.engine.decoder import Decoder, make_decoder
from nkat.errors import NKATError
from nkat.gguf.split import without_number
from nkat.host import console, hardware
from nkat.host.console import counted, note, say
from nkat.host.files import check_apart, check_output, output_folder
from nkat.host.memory import memory
from nkat.host.page import REPORT, write_page
from nkat.host.record import check_record, recorded, write_json
from nkat.host.start import INTERRUPTED
from nkat.host.tables import Table, show
from nkat.host.tools import suggest
from nkat.hub.fetch import local_model
from nkat.inference import judging
from nkat.inference.judging import base_passages, check_judging
from nkat.inference.options import CHAT, TAKEN_BY, TASKS, USUAL_LENGTHS, WRITING, EngineOptions, parse_arguments
from nkat.inference.page import comparison_page
from nkat.inference.plots import plot_comparison
from nkat.inference.repl import converse
from nkat.inference.tables import (
    Comparison,
    Quality,
    benchmark_record,
    benchmark_table,
    benchmark_words,
    comparison_record,
    comparison_table,
    comparison_words,
)
from nkat.inference.writing import prompt_text, sampler_for, write_text
from nkat.lm.config import ModelConfig
from nkat.lm.load import LoadedModel, read_config
from nkat.lm.request import Request
from nkat.measure.base_file import open_base_file
from nkat.measure.compare import Base, check_base
from nkat.measure.judge import Judge, note_missing_chunks
from nkat.measure.layer_speed import bench_gemm, copy_speed, gemm_table
from nkat.measure.perplexity import paired
from nkat.measure.provenance import conditions_of, file_hash, provenance
from nkat.measure.speed import Arms, bench_decode, bench_prefill
from nkat.measure.startup import fresh_startup
from nkat.measure.tasks import READERS
from nkat.measure.texts import Text, load_text
from nkat.measure.tpe import byte_ratio
from nkat.theta.modelfile import ModelFile
from nkat.theta.options import lora_words, theta_words
from nkat.theta.set import LoraSet, TermSet, check_judging_text

Record = dict[str, Any]
JUDGING = ("perplexity", *TASKS)  # exact where nothing else is asked for, and no copy of the weights is worth its time
# What a command leaves in its folder.
LEAVES = {"benchmark": ("benchmark.json",), "compare": ("comparison.json", "comparison.png", REPORT)}


@dataclass(frozen=True)
class Job:
    """The model of this run, opened and checked but not loaded. theta: or a LoRA in its place; None when it has none.

    activations: "float", or "int8" where the layers' inputs are rounded
    """

    options: EngineOptions
    device: torch.device
    threads: int
    activations: str
    request: Request
    model_file: ModelFile
    theta: TermSet | None

    @property
    def has_text(self) -> bool:
        """Whether a text of its own is measured on, and not a base file's."""
        return self.options.command in TAKEN_BY["text"] and self.options.kl_base is None

    @cached_property
    def text(self) -> Text:
        """What is measured on."""
        return load_text(self.options.text)

    def check_text(self) -> None:
        """Raises NKATError for a text that cannot be read, or that Θ was made from and is to be judged on."""
        only_speed = self.options.command == "compare" and self.options.chunks == 0
        sha256 = self.text.sha256
        if self.theta is not None and not only_speed:
            files = [file.path for file in self.options.thetas]
            check_judging_text(self.theta, sha256, files[0] if len(files) == 1 else self.options.model)

    def load(self) -> LoadedModel:
        return self.request.load(self.model_file, self.theta)

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self.model_file)

    @cached_property
    def folder(self) -> Path | None:
        """Where --compare leaves its files and --benchmark its record; None where nothing is to be left."""
        options = self.options
        if options.command not in LEAVES:
            return None
        if options.command == "benchmark" and options.json and options.output_dir is None:
            return None  # the user has said where the record is to be
        name = f"{without_number(options.model).stem}_{datetime.now():%Y%m%d-%H%M%S}"
        return options.output_dir or Path("output", options.command, name)

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens to prefill, and steps behind them: as asked, else as usual as far as the model was made for them.

        Raises NKATError for more than it was made for.
        """
        options, context = self.options, self.config.context_length
        asked = options.seq_len, options.iterations
        iterations = options.iterations or min(USUAL_LENGTHS[1], max(1, context // 2))
        seq_len = options.seq_len or min(USUAL_LENGTHS[0], max(1, context - iterations))
        if asked == (None, None) and (seq_len, iterations) != USUAL_LENGTHS:
            note(f"warning: the model was made for {context} tokens: {seq_len} are run, and {iterations} behind them")
        self.config.check_length(seq_len + iterations, "--seq-len and --iterations", bool(options.beyond_context))
        return seq_len, iterations

    def tokens(self, loaded: LoadedModel) -> tuple[list[int], list[int]]:
        """The text's first tokens, and those behind them; see `lengths`."""
        first, total = self.lengths[0], sum(self.lengths)
        ids = loaded.tokenizer.encode(self.text.content, add_special=True)
        if len(ids) < total:
            raise NKATError(f"the text is too short: it has {counted(len(ids), 'token')}, and {total} are to be run")
        return ids[:first], ids[first:total]

    def judge(self, loaded: LoadedModel) -> Judge:
        """On the text's first chunks."""
        options = self.options
        if options.context is not None:
            self.config.check_length(options.context, "--context", bool(options.beyond_context))
        judge = Judge.open(
            loaded, self.text, options.chunks, context=options.context, batch=options.batch, diverging=True
        )
        note_missing_chunks(judge.passages, options.chunks)
        return judge

    def label(self, loaded: LoadedModel) -> str:
        """Of the arm with Θ, for people."""
        if isinstance(self.theta, LoraSet):
            return f"with the LoRA (rank {self.theta.rank})"
        return "" if self.theta is None else f"with Θ (rank {self.theta.rank}, gamma {loaded.gamma:g})"


def main() -> None:
    named = parse_arguments()
    options = replace(named, model=local_model(named.model), reference=local_model(named.reference))
    try:
        run(options, named.model)
    except torch.OutOfMemoryError:
        raise NKATError(
            f"{options.model}: does not fit into the GPU's memory; --no-cuda runs it on the processor"
        ) from None


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found: its record, the tables that are made from it, and words below them."""

    record: Record
    tables: Sequence[Table] = ()
    words: str = ""


def run(options: EngineOptions, named: Path) -> None:
    """named: the model as the user wrote it"""
    thetas = [file.path for file in (*options.thetas, *options.loras)]
    inputs = [options.model, *thetas, options.text, options.reference, options.kl_base, options.task_file]
    check_record(options.json, options.force, inputs)
    check_judging(options)
    count = hardware.set_threads(options.threads)
    device = hardware.pick_device(allow_cuda=not options.no_cuda)
    fast = device.type == "cpu" and options.command not in JUDGING
    activations = options.activations or ("int8" if fast else "float")
    # what the kernels compute in; a perplexity on the processor needs no copy of the weights in their layout
    kernel_dtypes = ("bfloat16", "float16") if device.type == "cuda" else ("float32",)
    request = Request(
        options.model,
        options.thetas,
        options.theta_gamma,
        str(device),
        options.dtype,
        int8_activations=activations == "int8",
        repack=(fast or device.type == "cuda") and options.dtype in (None, *kernel_dtypes),
        loras=options.loras,
    )
    model_file, theta = request.open()
    if model_file.unfinished:
        note(f"warning: the Θ behind {options.model} is incomplete or damaged; using the base model alone")
    if theta is not None and len(options.thetas) > 1:
        parts = " + ".join(f"{file.weight:g} · {file.path}" for file in options.thetas)
        note(f"Θ of rank {theta.rank}: {parts}")
    if theta is not None and options.theta_gamma == 1.0:
        note("warning: --theta-gamma 1 couples Θ with strength 0: it has no effect in this run")
    if options.loras and model_file.theta is not None:
        note(f"note: the Θ in {options.model} is left out: --lora runs in its place")
    if options.loras and options.command != "generate":
        note("note: where the tables say Θ, the LoRA is meant: it runs in its place")
    job = Job(options, device, count, activations, request, model_file, theta)
    if job.has_text:
        job.check_text()
    if options.command in TAKEN_BY["seq_len"]:
        _ = job.lengths  # what cannot be run is known before time is spent
    commands: dict[str, Callable[[Job], Result]] = {
        "benchmark": benchmark,
        "compare": compare,
        "perplexity": measure_perplexity,
        **dict.fromkeys(TASKS, measure_tasks),
        "generate": generate_text,
        CHAT: chat,
        "gemm": gemm,
    }
    with contextlib.nullcontext() if job.folder is None else result_folder(job, job.folder):
        result = commands[options.command](job)
        if job.folder is not None:
            write_json(result.record, str(job.folder / LEAVES[options.command][0]), options.force)
        with recorded(result.record, options.json, options.force):
            for table in result.tables:
                show(table)
            if result.words:
                say(f"\n{result.words}")
            if job.folder is not None and options.command == "compare":
                picture = job.folder / LEAVES["compare"][1]
                plot_comparison(picture, result.record, f"{options.model.name} without and with Θ", options.force)
                page = comparison_page(result.record, result.tables, result.words.splitlines(), picture)
                write_page(job.folder / REPORT, page, options.force)
            if job.folder is not None:
                note(f"\nfiles are in {job.folder}")
    if result.record.get("stopped") in ("interrupted", "terminated"):
        sys.exit(INTERRUPTED)
    suggest_next(options, named, theta is not None, result.record)


def suggest_next(options: EngineOptions, named: Path, has_theta: bool, record: Record) -> None:
    """What a user would do after these figures."""
    model: list[object] = ["--model", named, *theta_words(options.thetas), *lora_words(options.loras)]
    if options.command in WRITING or options.loras:  # whoever reads a text asks for no figures
        return
    if options.command == "gemm":
        suggest("engine", *model, "--benchmark")
    elif not has_theta:
        target = without_number(options.model).with_suffix(".nkat")  # not in the cache, where a name was given
        suggest("convert", "--input", named, "--output", target if named == options.model else target.name)
    elif options.command != "compare":
        suggest("engine", *model, "--compare")
    elif (record["estimated_perplexity_improvement"] or 0) <= 0:
        suggest("kobold", *model)
    else:
        suggest("optimize", "--model", named, "--mode", "quick", "--output-dir", "output/quick")


def benchmark(job: Job) -> Result:
    """Prefill and decoding, with and without Θ where there is one; loading and memory in a fresh process."""
    with console.bar(1, "loading in a fresh process", "start"):
        start = fresh_startup(job.request, job.text.content, job.threads)
    loaded = job.load()
    prefill, decode, decoder = measure_speed(job, loaded)
    held = memory(*job.model_file.files)
    record = {
        **benchmark_record(prefill, decode, start),
        **conditions(job, loaded, decoder),
        "peak_memory_bytes": held.peak,
        "memory": asdict(held),
    }
    return Result(record, [benchmark_table(record, speed_subject(job, record))], benchmark_words(record))


@contextlib.contextmanager
def result_folder(job: Job, folder: Path) -> Iterator[None]:
    """The folder, if there is nothing in the way of what the command leaves there."""
    paths = {name: folder / name for name in LEAVES[job.options.command]}
    check_apart({"--json": job.options.json, **paths})
    with output_folder(folder):
        for path in paths.values():
            check_output(path, job.options.force)
        yield


def compare(job: Job) -> Result:
    """Both arms, everything."""
    options = job.options
    if job.theta is None:
        raise NKATError(
            f"{options.model}: has no Θ, so there is nothing to compare; --benchmark or --perplexity measure it alone, "
            "nkat_gguf_converter.py adds Θ"
        )
    with console.bar(2, "loading in fresh processes", "start") as progress:
        starts = []
        for with_theta in (False, True):
            request = replace(job.request, gamma=job.request.gamma if with_theta else None, with_theta=with_theta)
            starts.append(fresh_startup(request, job.text.content, job.threads))
            progress.update()
    loaded = job.load()
    prefill, decode, decoder = measure_speed(job, loaded)
    held = memory(*job.model_file.files)
    quality = None
    if options.chunks:
        quality = measure_quality(job, loaded, job.theta)
    ratio = byte_ratio(
        loaded.tensors, job.theta.bytes_per_token(loaded.config.active_experts), loaded.config.active_experts
    )
    record = {
        **comparison_record(Comparison(prefill, decode, (starts[0], starts[1]), quality, ratio)),
        **conditions(job, loaded, decoder),
        "peak_memory_bytes": held.peak,
        "memory": asdict(held),
    }
    return Result(record, [comparison_table(record, speed_subject(job, record))], comparison_words(record))


def measure_quality(job: Job, loaded: LoadedModel, theta: TermSet) -> Quality:
    """Perplexity of both arms; and, where activations are rounded, what that changes without Θ."""
    judge = job.judge(loaded)
    score, without = judge.score(theta, loaded.gamma), judge.without()
    if job.activations == "float":
        return Quality(without, score, None)
    exact = replace(job.request, int8_activations=False, repack=False).load(loaded, None)
    unrounded = judge.other(exact).without(progress="without Θ, exact activations")
    return Quality(without, score, paired(unrounded, without))


def measure_speed(job: Job, loaded: LoadedModel) -> tuple[Arms, Arms, Decoder]:
    options = job.options
    first, following = job.tokens(loaded)
    decoder = make_decoder(loaded.model, len(first) + len(following))
    prefill = bench_prefill(decoder, first, loaded.gamma, repetitions=options.repetitions)
    decode = bench_decode(decoder, following, loaded.gamma, start=len(first), repetitions=options.repetitions)
    return prefill, decode, decoder


def speed_subject(job: Job, record: Record) -> str:
    """What was measured, and how."""
    options = job.options
    return (
        f"\n{options.model} on {job.text.name}: {counted(record['seq_len'], 'token')}, then "
        f"{record['iterations']} more one by one, {options.repetitions} times over\n"
        f"{record['machine']['device_name']}, {threads(job)}, {record['dtype']}, "
        f"activations {job.activations}, {record['decoder']}"
    )


def threads(job: Job) -> str:
    return f"{job.threads} thread{'s' if job.threads > 1 else ''}"


def generate_text(job: Job) -> Result:
    """One text, streamed."""
    prompt, sampler = prompt_text(job.options), sampler_for(job.options)  # mistakes are known before time is spent
    loaded = job.load()
    record, session = write_text(job.options, prompt, sampler, loaded)
    return Result({**record, **conditions(job, loaded, session)})


def chat(job: Job) -> Result:
    """A conversation."""
    loaded = job.load()
    record, session = converse(job.options, loaded)
    return Result({**record, **conditions(job, loaded, session)})


def gemm(job: Job) -> Result:
    """Each kind of layer of the model by itself."""
    options = job.options
    loaded = job.load()
    if loaded.gamma is None:
        note(f"{options.model} has no Θ: its layers are timed without the star term only")
    copy = copy_speed(job.device)
    rows = [row.record(copy) for row in bench_gemm(loaded.model, loaded.gamma, repetitions=options.repetitions)]
    record = {"copy_gb_per_second": copy / 1e9, "rows": rows, **conditions(job, loaded)}
    how = f"packed weight × x, {options.repetitions} calls of each, median; {record['dtype']}"
    where = f"{record['machine']['device_name']}, {threads(job)}; a copy reaches {copy / 1e9:.1f} GB/s"
    conditioned = {**conditions_of(record), "copy_gb_per_second": record["copy_gb_per_second"]}
    return Result(record, [gemm_table(rows, f"\n{options.model}: {how}\n{where}", conditioned)])


def conditions(job: Job, loaded: LoadedModel, decoder: Decoder | None = None) -> Record:
    """Under which conditions this run's figures hold; the model's hash only where somebody will read it."""
    options = job.options
    text = job.text if job.has_text else None
    record = provenance(options.model, loaded, theta=job.theta, theta_files=options.thetas, text=text, decoder=decoder)
    if options.command in TAKEN_BY["seq_len"]:
        record["seq_len"], record["iterations"] = job.lengths
    if options.repetitions:
        record["repetitions"] = options.repetitions
    if options.json or job.folder is not None:
        record["model_sha256"] = file_hash(job.model_file)
        for file in record["theta_files"]:
            file["sha256"] = file_hash(Path(file["file"]))
    return record


def measure_perplexity(job: Job) -> Result:
    """Scores the same chunks without Θ and, where there is one, with it; beside another base where one is given."""
    options = job.options
    base_file = None
    if options.kl_base is not None:
        base_file = open_base_file(options.kl_base)
        job.config.check_length(base_file.tokens.shape[1], "--kl-base", bool(options.beyond_context))
    loaded = job.load()
    base: Base | None = base_file
    if options.reference is not None:
        request = replace(job.request, model=options.reference, thetas=(), gamma=None, with_theta=False)
        base = request.load(request.open()[0], None)
    if base is not None:
        check_base(loaded, base)
    if base_file is None:
        judge = job.judge(loaded)
    else:
        note(f"note: {base_file.path} does not say of what text it is: whether Θ was made from that cannot be told")
        judge = Judge(loaded, base_passages(base_file, loaded, options.chunks), batch=options.batch)
    record, tables, words = judging.measure_perplexity(judge, job.theta, base, job.label(loaded))
    if options.save_kl_base is not None:
        judging.write_base(options, judge, base)
        note(f"wrote {options.save_kl_base}")
    what = f"{counted(record['chunks'], 'chunk')} of {record['context']} tokens, {record['scored_tokens']} scored"
    record = {**conditions(job, loaded), **record, "kl_base": options.kl_base and str(options.kl_base)}
    return Result(record, _under(f"\n{options.model} on {judge.passages.name}: {what}", tables, record), words)


def measure_tasks(job: Job) -> Result:
    """The score on HellaSwag, Winogrande or other multiple-choice tasks, without Θ and with it."""
    options = job.options
    assert options.task_file is not None
    tasks = READERS[options.command](options.task_file, options.tasks)
    loaded = job.load()
    record, table, words = judging.measure_tasks(options, loaded, job.theta, tasks, job.label(loaded))
    record = {**conditions(job, loaded), **record, "task_sha256": file_hash(options.task_file)}
    return Result(
        record, _under(f"\n{options.model} on {options.task_file.name}: {table.caption}", [table], record), words
    )


def _under(caption: str, tables: Sequence[Table], record: Record) -> list[Table]:
    """The tables with the conditions of all that was measured, and the first below its subject."""
    first, *others = (replace(table, conditions=conditions_of(record)) for table in tables)
    return [replace(first, caption=caption), *others]
