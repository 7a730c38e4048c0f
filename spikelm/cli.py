"""The command line: `spikelm COMMAND`, or `python -m spikelm COMMAND`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spikelm import __version__
from spikelm.errors import SpikelmError

EVAL_EXAMPLES = """\
examples:
  spikelm eval --model runs/stories/student --data stories.txt --teacher stories260k
  spikelm eval --model stories260k runs/stories/student --tasks arc_easy.jsonl blimp/*.jsonl --output figures.json
  spikelm eval --model stories260k --tasks piqa blimp --limit 100       # lm-eval's own tasks; data from the Hub
"""
GENERATE_EXAMPLES = """\
example:
  spikelm generate --model runs/stories/student --prompt "Once upon a time" --max-new-tokens 60 --deploy
"""
ENERGY_EXAMPLES = """\
example:
  spikelm energy --model runs/stories/student --data stories.txt --teacher stories260k --output energy.json
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure in one line on stderr, 130 interrupted.

    Wrong usage leaves with 2 (argparse).
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    given.command_line = shlex.join(["spikelm", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        status: int = given.run(given)
        return status
    except SpikelmError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except OSError as error:  # a disk that is full, a reader that went away
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1


def run_doctor(given: argparse.Namespace) -> int:
    """What is installed and runs here."""
    from spikelm.doctor import report

    text, right = report()
    print(text)
    return 0 if right else 1


def run_eval(given: argparse.Namespace) -> int:
    """The table of several models."""
    if given.data is None and not given.tasks:
        given.parser.error("--data, --tasks, or both are needed")
    _refuse_without(given, "data", "teacher", "context_length", "held_out", "max_contexts")
    _refuse_without(given, "tasks", "limit", "num_fewshot", "max_length", "target_delimiter", "seed")
    _require_transformers()
    from spikelm.compare import Measures, compare_models, comparison_table
    from spikelm.files import write_json

    output = _writable(given.output)
    fields = ("data", "context_length", "held_out", "max_contexts", "tasks", "target_delimiter", "max_length", "limit")
    measures = Measures(
        **{name: getattr(given, name) for name in (*fields, "batch_size")},
        num_fewshot=given.num_fewshot or 0,
        seed=given.seed or 0,
    )
    result = compare_models(given.model, measures, teacher=given.teacher, device=given.device, dtype=given.dtype)
    for name, figures in result["models"].items():
        cut = (figures["tasks"] or {}).get("truncated")
        if cut:
            length = figures["tasks"]["max_length"]
            print(f"{name}: {cut} inputs were longer than {length} tokens and lost their beginning", file=sys.stderr)
    print(comparison_table(result))
    if output is not None:
        write_json(output, {"command": given.command_line} | result)
    return 0


def _refuse_without(given: argparse.Namespace, needed: str, *options: str) -> None:
    """Usage error for options that would have no effect, because the one that they belong to is not given."""
    for name in options:
        if not getattr(given, needed) and getattr(given, name) is not None:
            given.parser.error(f"--{name.replace('_', '-')} has no effect without --{needed}")


def run_generate(given: argparse.Namespace) -> int:
    """The greedy continuation of a prompt."""
    _require_transformers()
    from spikelm.compare import open_model
    from spikelm.evaluate import generate_sample
    from spikelm.interop.lm_eval import longest_context

    model, tokenizer = open_model(given.model, given.device, given.dtype)
    longest = longest_context(model.config)
    prompt = len(tokenizer(given.prompt, add_special_tokens=False, verbose=False)["input_ids"])
    prompt += tokenizer.bos_token_id is not None
    if longest is not None and prompt + given.max_new_tokens > longest:
        raise SpikelmError(
            f"the prompt's {prompt} tokens and {given.max_new_tokens} new ones are more than the {longest} that "
            f"{given.model} takes"
        )
    if given.deploy:
        from spikelm.deploy import deploy

        deploy(model)
    print(generate_sample(model, tokenizer, given.prompt, given.max_new_tokens))
    return 0


def run_energy(given: argparse.Namespace) -> int:
    """An estimate of energy from counted spikes."""
    _require_transformers()
    import torch

    from spikelm.compare import Measures, check_device, check_model, check_vocabularies, open_model, read_contexts
    from spikelm.energy.costs import cost_table
    from spikelm.energy.report import report
    from spikelm.run import versions, write_json

    output, picture = _writable(given.output), _writable(given.picture, ".png")
    costs = cost_table(given.costs)
    check_device(given.device, given.dtype)
    names = [(given.model, "model")] + ([(given.teacher, "teacher")] if given.teacher else [])
    opened = [check_model(name, role) for name, role in names]
    if given.teacher:
        check_vocabularies(given.model, opened[0], given.teacher, opened[1])
    measures = Measures(data=given.data, context_length=given.context_length, max_contexts=given.max_contexts).resolve(
        config for config, _ in opened
    )
    rows = read_contexts(measures, opened[0][1])
    batch = {"input_ids": torch.tensor(rows["input_ids"][:], device=given.device)}
    models: list[Any] = [open_model(name, given.device, given.dtype, role)[0] for name, role in names]
    result = report(models[0], batch, costs, teacher=models[1] if given.teacher else None)
    print(result.to_markdown())
    if output is not None:
        write_json(output, {"command": given.command_line, "versions": versions()} | result.to_dict())
    if picture is not None:
        result.plot(picture)
    return 0


def _parser() -> argparse.ArgumentParser:
    program = "python -m spikelm" if Path(sys.argv[0]).name == "__main__.py" else "spikelm"
    parser = argparse.ArgumentParser(prog=program, description="Spiking language models: measure, generate, estimate.")
    parser.add_argument("--version", action="version", version=f"spikelm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed, which backends run here, and why others do not")
    doctor.set_defaults(run=run_doctor)
    doctor.formatter_class, doctor.epilog = argparse.RawDescriptionHelpFormatter, "example:\n  spikelm doctor"
    _add_eval(commands)
    _add_generate(commands)
    _add_energy(commands)
    return parser


def _command(commands: Any, name: str, about: str, examples: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run, parser=command)
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    command.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights"
    )
    return command


def _add_eval(commands: Any) -> None:
    about = "perplexity, bits per byte, KL to a teacher and tasks of lm-evaluation-harness, a table of several models"
    command = _command(commands, "eval", about, EVAL_EXAMPLES, run_eval)
    add = command.add_argument
    add("--model", nargs="+", required=True, metavar="DIR", help="directories or Hub ids of causal LMs")
    text = "a .txt, .md or .jsonl file (also hub:owner/name): perplexity and bits per byte"
    add("--data", metavar="FILE", help=text)
    add("--teacher", metavar="DIR", help="KL(teacher || model) on --data; the same vocabulary")
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="local .jsonl files (offline) or names of lm-eval's tasks",
    )
    add("--output", type=Path, metavar="FILE.json", help="every figure, settings, versions and machine")
    add("--limit", type=_positive, metavar="N", help="only the first N examples of each task")
    add("--num-fewshot", type=_count, metavar="N", help="examples before each question (0)")
    add("--max-length", type=_positive, metavar="TOKENS", help="seen at once in tasks (what the model takes, or 2048)")
    add("--target-delimiter", metavar="TEXT", help="between prompt and choice of local files (see docs/evaluation.md)")
    add("--context-length", type=_positive, metavar="TOKENS", help="of --data (256, or less if the model takes less)")
    add("--held-out", type=_fraction, metavar="FRACTION", help="only this last part of --data, as the examples do")
    add("--max-contexts", type=_positive, metavar="N", help="only so many contexts of --data")
    add("--batch-size", type=_positive, default=8, metavar="N", help="contexts or requests at a time (8)")
    add("--seed", type=_seed, metavar="N", help="of the few-shot examples (0)")


def _add_generate(commands: Any) -> None:
    about = "the greedy continuation of a prompt"
    command = _command(commands, "generate", about, GENERATE_EXAMPLES, run_generate)
    command.add_argument("--model", required=True, metavar="DIR", help="directory or Hub id of a causal LM")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued")
    command.add_argument("--max-new-tokens", type=_positive, default=100, metavar="N", help="at most (100)")
    text = "decode a spiking model in the form that reads the weights of active channels alone (docs/inference.md)"
    command.add_argument("--deploy", action="store_true", help=text)


def _add_energy(commands: Any) -> None:
    about = "an estimate of the energy of a spiking model from the spikes that it fires on a text"
    command = _command(commands, "energy", about, ENERGY_EXAMPLES, run_energy)
    add = command.add_argument
    add("--model", required=True, metavar="DIR", help="directory or Hub id of a causal LM")
    add("--data", required=True, metavar="FILE", help="a .txt, .md or .jsonl file, whose first contexts are run")
    add("--teacher", metavar="DIR", help="a dense model to compare with")
    add("--costs", default="45nm-fp32", metavar="NAME", help="what an operation costs (45nm-fp32; see docs/energy.md)")
    add("--output", type=Path, metavar="FILE.json", help="every figure")
    add("--picture", type=Path, metavar="FILE.png", help="the estimate as a figure")
    add("--context-length", type=_positive, metavar="TOKENS", help="(256, or less if the model takes less)")
    add("--max-contexts", type=_positive, default=8, metavar="N", help="how many contexts are run (8)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # what numpy takes
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def _writable(path: Path | None, suffix: str = ".json") -> Path | None:
    """The path, once a file could be made beside it: before the work, not after. SpikelmError where none can."""
    if path is None:
        return None
    if path.suffix != suffix:
        raise SpikelmError(f"{path} cannot be written: a name ending in {suffix} is accepted")
    if path.is_dir():
        raise SpikelmError(f"{path} cannot be written: it is a directory")
    probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SpikelmError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise SpikelmError('this command needs transformers: pip install "spikelm[hf]"')
